"""The nouns of rlstitch and the seams between its rooms. Shapes stand on the fields; B samples, K rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z [B, C, H, W], sigma [B]) -> [B, C, H, W]
Value = Callable[[Tensor, Tensor], Tensor]  # (z [B, C, H, W], sigma [B]) -> [B]


class UserError(ValueError):
    """A mistake of the user's, told as cause, offending value and remedy. Launchers print it without a traceback."""


@dataclass
class Latent:
    """A noisy latent on the path of eq. (1): `z` [B, C, H, W] after the VAE's shift and scale, `sigma` [B] the flow time (0 clean, 1 noise)."""

    z: Tensor
    sigma: Tensor


RAGGED = "tokens"  # how the names of fields begin whose second dimension is a prompt's length


class Conditioning:
    """What the denoiser sees of B prompts: named tensors [B, ...], which are attributes, too.

    `tokens` [B, L, D] is always there. An architecture may add `pooled` [B, P], and `mask` [B, L] (bool, True on tokens that are the prompt's) where lengths differ.
    """

    def __init__(self, **fields: Tensor):
        self.fields = fields

    def __getattr__(self, name: str) -> Tensor:
        if name != "fields" and name in self.fields:
            return self.fields[name]
        raise AttributeError(f"the text has no {name}")

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(value) for name, value in self.fields.items()})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> Conditioning:
        return self.map(lambda value: value[index])

    def get(self, name: str) -> Tensor | None:
        return self.fields.get(name)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def expand(self, batch: int) -> Conditioning:
        """One prompt for a batch of any size."""
        return self.map(lambda value: value.expand(batch, *value.shape[1:]))

    def to(self, *args, **kwargs) -> Conditioning:
        """As Tensor.to; a precision is for what is no mask and no number of anything."""
        place, told = [a for a in args if not isinstance(a, torch.dtype)], {k: v for k, v in kwargs.items() if k != "dtype"}
        return self.map(lambda value: value.to(*args, **kwargs) if value.is_floating_point() else value.to(*place, **told))

    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        mask = self.get("mask")
        return [self.tokens.shape[1]] * len(self) if mask is None else mask.sum(1).tolist()

    def rows(self) -> list[dict[str, Tensor]]:
        """Each prompt alone, as long as it is: what `stack` takes."""
        own = {name: value for name, value in self.fields.items() if name != "mask"}
        return [
            {name: value[i, :n] if name.startswith(RAGGED) else value[i] for name, value in own.items()}
            for i, n in enumerate(self.lengths())
        ]

    @staticmethod
    def stack(rows: Sequence[dict[str, Tensor]]) -> Conditioning:
        """Of single prompts, whose `tokens` are [L, D]: padded with zeros to the longest, with a mask where lengths differ."""
        lengths = torch.tensor([len(row["tokens"]) for row in rows])
        longest = int(lengths.max())
        mask = torch.arange(longest)[None] < lengths[:, None]

        def joined(name: str) -> Tensor:
            values = [row[name] for row in rows]
            return pad_sequence(values, batch_first=True) if name.startswith(RAGGED) else torch.stack(values)

        fields = {name: joined(name) for name in rows[0]}
        return Conditioning(**fields, **({} if bool(mask.all()) else {"mask": mask.to(fields["tokens"].device)}))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Batches one behind the other, padded to the longest; a mask where one of them has it or lengths differ."""
        if len({p.tokens.shape[1] for p in parts}) == 1 and all(p.get("mask") is None for p in parts):
            return Conditioning(**{name: torch.cat([p.fields[name] for p in parts]) for name in parts[0].fields})
        return Conditioning.stack([row for p in parts for row in p.rows()])


@dataclass
class Batch:
    """B samples of a global batch: prompts, the group and the noise seed of each, the denoiser's text where it is known."""

    prompts: list[str]
    group: Tensor  # [B] long, a draw of a prompt: the prompt's place in its set of N, plus N for each time it came before in the update
    seeds: Tensor  # [B] long, one per sample and update, the same whatever the number of ranks
    facts: list[dict[str, Any]] = field(default_factory=list)  # a row of the prompt file for judges that need more than text
    text: Conditioning | None = None
    clean: Tensor | None = None  # latents of the data's pictures [B, C, H, W], or of pairs [B, 2, C, H, W], the better first

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: slice) -> Batch:
        text = None if self.text is None else self.text[index]
        clean = None if self.clean is None else self.clean[index]
        return Batch(self.prompts[index], self.group[index], self.seeds[index], self.facts[index], text, clean)

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """Batches of the same kind, one behind the other."""
        text = [p.text for p in parts if p.text is not None]
        clean = [p.clean for p in parts if p.clean is not None]
        return Batch(
            [x for p in parts for x in p.prompts], torch.cat([p.group for p in parts]), torch.cat([p.seeds for p in parts]), [x for p in parts for x in p.facts],
            Conditioning.cat(text) if text else None, torch.cat(clean) if clean else None,
        )  # fmt: skip

    def interleave(self, copies: int) -> Batch:
        """Every row `copies` times, the copies side by side; seeds are repeated, too."""
        if copies == 1:
            return self
        index = torch.arange(len(self)).repeat_interleave(copies)
        rows = index.tolist()
        text = None if self.text is None else self.text[index.to(self.text.device)]
        facts = [self.facts[i] for i in rows] if self.facts else []
        clean = None if self.clean is None else self.clean[index]
        return Batch([self.prompts[i] for i in rows], self.group[index], self.seeds[index], facts, text, clean)


@dataclass
class Transition:
    """One stochastic step as it was taken: from z at `sigma` to z_next at `sigma_next`, with its log-probability [B] under the sampling policy, and its mean where that is asked for again."""

    z: Tensor
    z_next: Tensor
    sigma: float
    sigma_next: float
    log_prob: Tensor
    mean: Tensor | None = None

    def rows(self, index: slice) -> Transition:
        mean = None if self.mean is None else self.mean[index]
        return Transition(self.z[index], self.z_next[index], self.sigma, self.sigma_next, self.log_prob[index], mean)


@dataclass
class Rollout:
    """What a policy made of a batch. `velocities` and `states` hold the steps that carry gradient, for regularisers."""

    batch: Batch
    latent: Latent
    scores: Tensor | None = None  # [B, K]
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (z, sigma) entering each step with gradient
    velocities: list[Tensor] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)  # stochastic steps that a policy gradient is taken through

    def split(self, size: int) -> list[Rollout]:
        """The same samples, `size` at a time; for rollouts without gradient (no states, no velocities)."""
        if len(self.batch) <= size:
            return [self]
        return [self.rows(slice(k, k + size)) for k in range(0, len(self.batch), size)]

    def rows(self, index: slice) -> Rollout:
        """Some of its samples; those behind them in `latent`, as DRaFT-LV's copies are, are left out."""
        scores = None if self.scores is None else self.scores[index]
        return Rollout(
            self.batch[index],
            Latent(self.latent.z[index], self.latent.sigma[index]),
            scores,
            transitions=[t.rows(index) for t in self.transitions],
        )

    @staticmethod
    def joined(parts: Sequence[Rollout]) -> Rollout:
        """Batch, latents and scores of several, one behind the other."""
        latent = Latent(torch.cat([p.latent.z for p in parts]), torch.cat([p.latent.sigma for p in parts]))
        return Rollout(Batch.joined([p.batch for p in parts]), latent, torch.cat([p.scores for p in parts]))


class Backbone(Protocol):
    """A denoiser with its autoencoder and text encoders; what an adapter for another architecture has to give. It never loops over time.

    parts: folders that its directory must hold. transformer: the module that LoRA is added to, on the linears named `lora_targets`, or `targets` of a recipe's own; `load_lora` puts one of any trainer on it as a frozen adapter and gives its layers. latent_shape (C, H, W), size (height, width) of a picture in pixels, image_tokens of one in the transformer, width of a block's tokens.
    too_long: (prompt, tokens, limit) of prompts that the encoders would cut; a static `cut_prompts(options, prompts)` says so of a recipe's options before anything loads, of rewards, too. cache: folder of encoded text, None for none; `remember` fills it; latents of pictures are kept there by `picture_fingerprint`. image_tokens_of and shift_of tell of a recipe's model, before anything loads, what its scheduler shifts by, and `setting` its pictures' height and width and its embedded guidance. From `prefix` on is what stitching needs beside training; a cut has `block`, `grid`, `detach` and `rows` (backbones.core.Cut).
    """

    path: Any
    parts: tuple[str, ...]
    transformer: Any
    lora_targets: Sequence[str]
    num_blocks: int
    width: int
    latent_shape: tuple[int, int, int]
    size: tuple[int, int]
    image_tokens: int
    device: torch.device
    dtype: torch.dtype
    cache: Any
    checkpointing: bool
    null: Conditioning  # of the empty prompt

    @staticmethod
    def image_tokens_of(options: dict[str, Any]) -> int: ...
    @staticmethod
    def setting(options: dict[str, Any]) -> tuple[int, int, float]: ...
    @staticmethod
    def shift_of(path: str, settings: dict[str, Any], tokens: int | None) -> Any: ...
    @staticmethod
    def parameter_counts(path: str, rank: int) -> dict[str, int]: ...
    def targets(self, own: Sequence[str]) -> Sequence[str]: ...
    def load_lora(self, path: str, name: str = "lora") -> dict[str, tuple[Tensor, Tensor]]: ...
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning: ...
    def remember(self, prompts: Sequence[str]) -> None: ...
    def picture_fingerprint(self) -> str: ...
    def too_long(self, prompts: Sequence[str]) -> list[tuple[str, int, int]]: ...
    def velocity(self, z: Tensor, sigma: Tensor, text: Conditioning, *, guidance: float = 1.0) -> Tensor: ...
    def bind(self, text: Conditioning, guidance: float = 1.0) -> Velocity: ...
    def checkpoint_activations(self, on: bool = True) -> None: ...  # and `checkpointing` says whether it is on
    def prefix(self, z: Tensor, sigma: Tensor, blocks: int, text: Conditioning | None = None) -> Any: ...
    def extend(self, state: Any, blocks: int) -> Any: ...
    def resume(self, state: Any) -> Tensor: ...
    def guided(self, v: Tensor, null: Tensor, scale: float) -> Tensor: ...
    def walk(self, z: Tensor, sigma: Tensor, see: Callable[[Any], None], text: Conditioning | None = None) -> None: ...
    def make_prefix(self, blocks: int, *, share: bool = True) -> Any: ...
    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, z: Tensor) -> Tensor: ...


class Reward(Protocol):
    """Scores pictures [B, 3, H, W] in [0, 1] -> [B]; higher is better. `differentiable`, of the class, says whether gradients reach the pictures.

    `batch.prompts` are the texts, `batch.facts` the whole rows of the prompt file. A picture that cannot be scored is NaN. One that needs more of a row than its
    prompt may say so before a run begins by `unreadable(rows) -> why`, or, where that depends on a recipe's options, `lacking(options, rows) -> why`, static methods; '' where it
    can read them. `reads_prompt`: False where the prompt does not matter (rlstitch.contract). `alone`: what a policy is known to learn from it where nothing else is trained on, e.g. "blank pictures"; a run is then warned.
    `handling`: its keys that do not change a score (a service's address, a timeout), with which a run may be gone on with otherwise than it was begun.
    """

    differentiable: bool

    def score(self, images: Tensor, batch: Batch) -> Tensor: ...


@runtime_checkable
class Judge(Protocol):
    """A reward that also splits its mean into classes, with the figure to report as `overall`."""

    def breakdown(self, scores: Tensor, rows: list[dict[str, Any]]) -> dict[str, float]: ...


class StitchableReward(Reward, Protocol):
    """A transformer on patches that can be entered at block j (1-based; j = 1 takes what the patch embedding produces) and so be stitched; rewards.clip.ClipReward.

    `width` of a token, `grid` patches a side, `head`: None where the score is a cosine with the prompt's embedding. Embeddings are [B, D]. A tower may have a [CLS]: it then
    stands before the grid^2 patches from block 2 on, and a tail has it as `cls`, to learn where it begins. One whose patches are not of
    the whole picture has `view(height, width)`, the (top, left, bottom, right) that they are of, as shares of the sides.

    One that reads its score from all output tokens and the prompt together, by cross-attention (rewards.imagereward.ImageReward), has `score_tokens(tokens, batch)` -> [B] in place
    of `score_embedding`, `embed_texts`, `head` and `head_of`; its tail's tokens are those that are read.
    """

    num_blocks: int
    width: int
    grid: int
    device: torch.device
    dtype: torch.dtype
    head: Any

    def patches(self, images: Tensor) -> Tensor: ...  # [B, N, W], no [CLS], no positions
    def inputs_of_block(self, images: Tensor, last: int) -> list[Tensor]: ...  # of blocks 1..last, patches last
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]: ...  # embedding, output tokens
    def tail(self, j: int) -> Any: ...  # a trainable copy from block j on: (tokens, cls) -> (embedding, output tokens)
    def embed_texts(self, prompts: list[str]) -> Tensor: ...
    def score_embedding(self, embedding: Tensor, batch: Batch) -> Tensor: ...  # [B]
    def head_of(self, embedding: Tensor) -> Tensor: ...  # [B]
    def fingerprint(self) -> str: ...  # of every weight that the score depends on


class Oracle(Protocol):
    """Scores latents. `names` [K] labels the columns, `weights` [K] weigh them, `differentiable` says whether gradients reach z, `sigma_range` where it may be asked."""

    names: list[str]
    weights: list[float]
    differentiable: bool
    sigma_range: tuple[float, float]

    def __call__(self, latent: Latent, batch: Batch) -> Tensor: ...  # [B, K]
    def total(self, scores: Tensor) -> Tensor: ...  # [B, K] -> [B] on the stated scales


class Algorithm(Protocol):
    """One training method; the trainer calls these in this order for every update.

    needs_gradient: the oracle must be differentiable. keeps_old: wants a second policy to sample with. collects: compares samples across the whole update
    (`compare` turns all scores into weights) before the first loss; otherwise each micro-batch is learned from at once, while its graph is alive.
    learns_from: `prompts` (it samples), `images` or `pairs` (it takes clean latents from `Batch.clean`). needs_oracle: False where no reward is asked; the
    recipe then has neither oracle nor stop, and `score` gives [B, 0]. whole_groups: all samples of a prompt must lie in one micro-batch.
    balances: weighs the gradients of several rewards against each other. One that is known to blur models that were distilled to few steps may say
    `blurs_distilled`, and a run on such a model is warned. `state` is what a checkpoint keeps beside the policy, the same on every rank.
    `faults` and `backwards` are asked of the class, before anything loads, with the recipe's options and the steps after which a rollout may halt. One of a user's
    own is held to all this (rlstitch.holding).
    """

    learns_from: Literal["prompts", "images", "pairs"]
    needs_oracle: bool
    whole_groups: bool
    balances: bool
    needs_gradient: bool
    collects: bool
    keeps_old: bool

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]: ...
    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int: ...  # of a micro-batch in one update
    def rollout(self, batch: Batch, stop: int) -> Rollout: ...
    def score(self, rollout: Rollout) -> Tensor: ...  # [B, K]
    def compare(
        self, rollouts: Sequence[Rollout], scores: Tensor, group_ids: Tensor
    ) -> tuple[Tensor, dict[str, float]]: ...  # where it collects
    def losses(
        self, rollout: Rollout, *compared
    ): ...  # yields (loss, metrics), `backwards` of them; a metric is a scalar of the micro-batch, or of samples, NaN where it knows none
    def end_step(self, step: int) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


def noise_like(shape: Sequence[int], seeds: Tensor, *, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise [B, *shape], row i drawn from (seeds[i], stream) alone, so that neither ranks nor batch sizes change it."""
    noise, generator = torch.empty(len(seeds), *shape), torch.Generator()
    for row, seed in zip(noise, seeds.tolist()):
        row.normal_(generator=generator.manual_seed((seed * 1_000_003 + stream) % (2**63)))
    return noise.to(device)
