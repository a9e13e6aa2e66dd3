"""StitchVM: the first blocks of a frozen diffusion transformer, a small stitch, the tail of a pixel reward model (arXiv:2605.19804, eqs. 57-58)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlstitch.compiled import blocks_within, compile_blocks
from rlstitch.config import build as build_part
from rlstitch.config import check_part, load_class
from rlstitch.files import read_json, read_weights, require, sha256, write_json, write_weights
from rlstitch.fingerprints import same_vae, vae_fingerprint
from rlstitch.ranges import Count, CountOrNone, NotNegative, Positive, Share, misfit
from rlstitch.stitch.layer import StitchLayer, view_of
from rlstitch.types import Batch, Conditioning, Latent, UserError

CARD, WEIGHTS = "value.json", "value.safetensors"
NULL = "null_"  # what the names of the empty prompt's tensors begin with in that file
CLASS = 1.5  # pixels of pictures, to those that a value was distilled on or the other way round, up to which it is used
NAMEABLE = ("rlstitch.backbones.", "rlstitch.rewards.", "rlstitch.shapes.reward")  # modules whose classes a card may name


SAID = {  # what stands in a card and can be used, beyond its type
    "norm": Positive,
    "blocks": CountOrNone,
    "reward_block": Count,
    "sigma_range": tuple[Share, Share],
    "device_hours": NotNegative,
    "vae_half_sha256": str,
    "prefix": Literal["latent"],
    "fold": Count,
    "text": Literal["empty", "prompt"],
    "embedded_guidance": NotNegative,
    "size": tuple[Count, Count],  # height and width of the pictures
}


class OtherDenoiser(UserError):
    """The value model was stitched from another denoiser than the one given."""


def reads_tokens(reward: Any) -> bool:
    """Whether a reward reads its score from its tower's output tokens and the prompt together (by cross-attention), not from one embedding of the picture."""
    return hasattr(reward, "score_tokens")


def score_output(reward: Any, output: Tensor, batch: Batch) -> Tensor:
    """[B] from what a reward's score is read from: output tokens [B, N, W], or an embedding [B, D] of unit norm where it is of a clean picture."""
    return reward.score_tokens(output, batch) if reads_tokens(reward) else reward.score_embedding(output, batch)


def _fits_half(x: Tensor) -> bool:
    """Whether no number is beyond float16, as hidden states of a large text encoder may be."""
    return not x.numel() or bool(x.abs().max() <= torch.finfo(torch.float16).max)


class LatentPrefix(nn.Module):
    """A prefix of no block, for baselines: the image stream is the latent itself, `fold` x `fold` patches of it put into channels."""

    def __init__(self, fold: int = 1):
        super().__init__()
        self.fold, self.depth = fold, 0

    def forward(self, z: Tensor, sigma: Tensor, text: Conditioning) -> SimpleNamespace:
        return SimpleNamespace(grid=F.pixel_unshuffle(z, self.fold))

    def fingerprint(self) -> str:
        return f"latent-{self.fold}"


class StitchedValueModel(nn.Module):
    """V(z, sigma, prompt) = reward head( tail_{>=j}( stitch( prefix_{<=i}(z, sigma, null text) ) ) ).

    The card's `text: prompt` runs the prefix under the prompts' own text instead, for denoisers that have no unconditional branch to share it with.
    `prefix` is frozen and without LoRA; `stitch` and `tail` are what distillation trains; `reward` is the frozen pixel reward, whose text tower
    or head turns the embedding into a score, or whose text encoder reads the tail's tokens by cross-attention. `normalise`: the student embedding is brought to unit norm, as the paper has it (ranks, but its
    magnitude is not E[r | z]); otherwise it is the raw projection over `norm`, and V is E[r | z] at the minimiser of the distillation.
    """

    def __init__(
        self,
        prefix: nn.Module,
        null: Conditioning,
        stitch: StitchLayer,
        tail: nn.Module,
        reward: Any,
        *,
        normalise: bool,
        norm: float,
        sigma_range: tuple[float, float],
        card: dict[str, Any],
    ):
        super().__init__()
        self.prefix, self.stitch, self.tail = prefix, stitch, tail
        self._null_fields = list(null.fields)
        for name, value in null.fields.items():
            self.register_buffer(f"null_{name}", value.clone(), persistent=False)
        self.reward, self.normalise, self.norm, self.sigma_range, self.card = reward, normalise, norm, sigma_range, card
        self.compiled = False
        if getattr(prefix, "compiled", False):  # as the denoiser that it is of
            self.compile_tail()

    @classmethod
    def from_search(
        cls,
        backbone: Any,
        reward: Any,
        blocks: int,
        reward_block: int,
        weight: Tensor,
        bias: Tensor,
        *,
        cls_state: Tensor | None,
        norm: float,
        normalise: bool,
        sigma_range: tuple[float, float],
        card: dict[str, Any],
        share: bool = True,
    ) -> StitchedValueModel:
        """Put a stitch together from the closed-form map; the tail is a trainable copy of the reward's, whose [CLS], if it has one, begins as `cls_state` where it is
        entered late."""
        stitch = StitchLayer(weight.float(), bias.float(), reward.grid, view_of(reward, backbone.size)).to(weight.device)
        tail = reward.tail(reward_block)
        if reward_block > 1 and cls_state is not None:
            tail.cls.data.copy_(cls_state)
        return cls(
            backbone.make_prefix(blocks, share=share),
            backbone.null,
            stitch,
            tail,
            reward,
            normalise=normalise,
            norm=norm,
            sigma_range=sigma_range,
            card=card,
        )

    @property
    def null(self) -> Conditioning:
        """The empty prompt [1, ...], as its denoiser sees it."""
        return Conditioning(**{name: getattr(self, f"null_{name}") for name in self._null_fields})

    @property
    def prompted(self) -> bool:
        """Whether the prefix is run under the prompts' own text, not under the empty prompt."""
        return self.card.get("text") == "prompt"

    def activations(self, z: Tensor, sigma: Tensor, text: Conditioning | None = None) -> Any:
        """The frozen prefix in its own precision, under the null text, or under the prompts' own `text` where it was stitched so. Raises UserError where that is missing."""
        if self.prompted and text is None:
            raise UserError(
                "this value model was stitched under the prompts' own text (text: prompt) and is asked without it: give the batch's encoded prompts, backbone.encode_prompts(prompts)"
            )
        text = text if self.prompted else self.null.expand(len(z))
        return self.prefix(z.to(self.null.tokens.dtype), sigma, text)

    def embed(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """From the prefix's image stream [B, W, h, w] to (embedding [B, D], tail's tokens [B, N + 1, W'])."""
        embedding, tokens = self.tail(self.stitch(grid.to(self.stitch.linear.weight.dtype)))
        embedding = embedding.float()
        return (F.normalize(embedding, dim=-1) if self.normalise else embedding / self.norm), tokens.float()

    def output(self, activations: Any) -> Tensor:
        """What the reward's score is read from: an embedding [B, D], or the tail's tokens [B, N, W]."""
        return self.embed(activations.grid)[reads_tokens(self.reward)]

    def check_range(self, sigma: Tensor) -> None:
        low, high = self.sigma_range
        if bool((sigma < low - 1e-6).any()) or bool((sigma > high + 1e-6).any()):
            raise UserError(
                f"the value model was trained for sigma in [{low:g}, {high:g}] and was asked at {sigma.min().item():g}..{sigma.max().item():g}: choose a stop inside the range or distil it over a wider one"
            )

    def value(self, latent: Latent, batch: Batch) -> Tensor:
        """V [B] of a latent; differentiable in z. Raises UserError outside the trained sigma range."""
        self.check_range(latent.sigma)
        return self.value_from(self.activations(latent.z, latent.sigma, batch.text), batch)

    def value_from(self, activations: Any, batch: Batch) -> Tensor:
        """V from activations that were computed already, e.g. by guidance's unconditional branch at the same (z, sigma)."""
        return score_output(self.reward, self.output(activations), batch)

    # ------------------------------------------------------------------------------------------------ files

    def save_pretrained(self, path: str | Path, *, half: bool = True) -> None:
        """`value.safetensors` (stitch, tail, null text) and `value.json` (the card). What it was stitched from is named by hash."""
        folder = Path(path)
        tensors = {k: v for k, v in self.state_dict().items() if k.startswith(("stitch.", "tail."))}
        tensors |= {f"{NULL}{name}": value for name, value in self.null.fields.items()}
        kept = {k: v.half() if half and v.is_floating_point() and _fits_half(v) else v for k, v in tensors.items()}
        write_weights(folder / WEIGHTS, kept)
        card = self.card | {
            "normalise": self.normalise,
            "norm": self.norm,
            "sigma_range": list(self.sigma_range),
            "sha256": sha256(folder / WEIGHTS),
            **({} if (embedded := getattr(self.prefix, "embedded", None)) is None else {"embedded_guidance": embedded}),
            "prefix_sha256": self.prefix.fingerprint(),
            "reward_sha256": self.reward.fingerprint(),
        }
        write_json(folder / CARD, card)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, backbone: Any = None, reward: Any = None, share: bool = True, device: str | None = None
    ) -> StitchedValueModel:
        """Load a value model. What it was stitched from is taken from `backbone` and `reward`, or built from the card on `device` (default: that of the
        part that is given, else the CPU); both must match by hash.

        Call it before LoRA is added to the backbone. Raises UserError for missing, corrupt or foreign parts (OtherDenoiser where only the denoiser is another one).
        """
        folder, card = require(path, "the value model"), read_card(path)
        tensors = read_weights(require(folder / WEIGHTS, "the value model's weights"), card["sha256"])
        given = next((part.device for part in (backbone, reward) if part is not None), "cpu")
        where = str(given if device is None else device)
        backbone = build(card.get("backbone"), "model", where) if backbone is None else backbone
        reward = build(card.get("reward"), "reward", where) if reward is None else reward
        if lacking := [n for n in ("stitch.linear.weight", "stitch.linear.bias", f"{NULL}tokens") if n not in tensors]:
            raise UserError(f"value model '{path}' is not whole: it has no {' and no '.join(lacking)}: restore it or stitch it again")
        check_vae(card, backbone.path, path)
        linear, on_latents = tensors["stitch.linear.weight"], card.get("prefix") == "latent"
        width = backbone.latent_shape[0] * card["fold"] ** 2 if on_latents else backbone.width
        own = linear.shape[1] if linear.ndim == 4 else 0
        if own != width or card["blocks"] > backbone.num_blocks:
            raise OtherDenoiser(
                f"value model '{path}' is for a denoiser of width {own} cut after block {card['blocks']}; this one has width {width} and {backbone.num_blocks} blocks"
            )
        null = Conditioning(**{k.removeprefix(NULL): v for k, v in tensors.items() if k.startswith(NULL)}).to(
            backbone.device, backbone.dtype
        )
        own = {name: value.shape for name, value in getattr(backbone, "null", null).fields.items()}
        if lacking := [n for n in getattr(backbone, "text_fields", ()) if n not in null.fields]:
            raise OtherDenoiser(
                f"value model '{path}' is for another denoiser or is not whole: it has no {NULL}{lacking[0]}, which the empty prompt of {backbone.path} has: restore it or stitch it again"
            )
        if odd := [n for n, v in null.fields.items() if n not in own or v.ndim != len(own[n]) or v.shape[2:] != own[n][2:] or len(v) != 1]:
            raise OtherDenoiser(
                f"value model '{path}' is for another denoiser or is not whole: its {NULL}{odd[0]} is {list(null.fields[odd[0]].shape)}, no empty prompt of {backbone.path}: restore it or stitch it again"
            )
        try:
            view = view_of(reward, backbone.size)
            stitch = StitchLayer(linear[:, :, 0, 0].float(), tensors["stitch.linear.bias"].float(), reward.grid, view)
            tail = reward.tail(card["reward_block"])
        except (ValueError, RuntimeError) as error:
            raise UserError(f"value model '{path}' does not fit its reward model: {error}") from error
        model = cls(
            LatentPrefix(card["fold"]) if on_latents else backbone.make_prefix(card["blocks"], share=share),
            null,
            stitch,
            tail,
            reward,
            normalise=card["normalise"],
            norm=card["norm"],
            sigma_range=tuple(card["sigma_range"]),
            card=card,
        )
        for what, found, wanted, kind in (
            ("reward model", reward.fingerprint(), card["reward_sha256"], UserError),
            ("denoiser", model.prefix.fingerprint(), card["prefix_sha256"], OtherDenoiser),
        ):
            if found != wanted:
                raise kind(
                    f"value model '{path}' was stitched from another {what} (hash {wanted[:12]}..., this one has {found[:12]}...): stitch it again with launch/stitch.py"
                )
        if why := misused(card, *backbone.size, getattr(backbone, "embedded", None) or 0.0):
            raise UserError(f"value model '{path}' {why}")
        trained = {k: v.float() for k, v in tensors.items() if not k.startswith(NULL)}
        wanted = {k for k in model.state_dict() if k.startswith(("stitch.", "tail."))}
        if odd := sorted(wanted ^ set(trained)):
            raise UserError(
                f"value model '{path}' is not whole: {len(odd)} weights are missing or are not its own ({', '.join(odd[:5])}): restore it or stitch it again"
            )
        try:
            model.load_state_dict(trained, strict=False)
        except RuntimeError as error:
            raise UserError(f"value model '{path}' does not fit its reward model: {error}") from error
        return model.to(backbone.device).freeze()

    def freeze(self) -> StitchedValueModel:
        """As it is asked: nothing trains, and stitch and tail are in the reward's precision, so that they need no casting (a float32 tail costs twice a bfloat16 one)."""
        for part in (self.stitch, self.tail):
            part.to(self.reward.dtype)
        return self.requires_grad_(False).eval()

    def compile_tail(self) -> None:
        """Have torch.compile make the tail's blocks faster, each by itself; once is enough."""
        if not self.compiled:
            compile_blocks(blocks_within(self.tail))
        self.compiled = True

    def thaw(self) -> StitchedValueModel:
        """As it is distilled: stitch and tail train, in float32."""
        for part in (self.stitch, self.tail):
            part.float().requires_grad_(True)
        return self.train()


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a value model, without its weights."""
    file, hashes = (
        require(require(path, "the value model") / CARD, "the value model's card"),
        ("vae_sha256", "sha256", "prefix_sha256", "reward_sha256"),
    )
    plain = {
        "normalise": bool,
        "norm": float,
        "blocks": int,
        "reward_block": int,
        "sigma_range": [float] * 2,
    }
    remedy = "take it from where the value model came from, or stitch anew"
    card = read_json(file, "the value model's card", remedy, **plain, **dict.fromkeys(hashes, str))
    wrong = [f"{key!r} {fault}" for key, hint in SAID.items() if key in card and (fault := misfit(card[key], hint))]
    if card.get("prefix") == "latent" and "fold" not in card:
        wrong.append("'fold' is missing")
    if not wrong and not card["sigma_range"][0] < card["sigma_range"][1]:
        wrong.append(f"'sigma_range' must rise, not {card['sigma_range']}")
    if wrong:
        raise UserError(f"the value model's card {file}: {'; '.join(wrong)}: {remedy}")
    return card


def misused(card: dict[str, Any], height: int, width: int, embedded: float) -> str:
    """Why a value model with this card is not one for pictures of such a size, of a model that is told such a guidance (0 where it embeds none); '' where it is."""
    told = 0.0 if card.get("prefix") == "latent" else card.get("embedded_guidance") or 0.0
    if card.get("prefix") != "latent" and not math.isclose(told, embedded):
        return f"was made at embedded guidance {told:g} and the model is told {embedded:g}, which changes what its blocks give: set model.embedded_guidance={told:g}, or stitch again"
    if (size := card.get("size")) and not 1 / CLASS <= height * width / (size[0] * size[1]) <= CLASS:
        return f"was made for pictures of {size[1]} x {size[0]} pixels, and the model makes them {width} x {height}: set model.height={size[0]} and model.width={size[1]}, or stitch one at this size"
    return ""


def check_vae(card: dict[str, Any], backbone_path: str | Path, path: str | Path) -> None:
    """Latents of different autoencoders are not comparable: refuse."""
    if not same_vae(card, backbone_path):
        raise UserError(
            f"value model '{path}' reads latents of another autoencoder (vae hash {card['vae_sha256'][:12]}..., model '{backbone_path}' has {vae_fingerprint(backbone_path)[:12]}...): stitch one for this model"
        )


def build(spec: Any, kind: str, device: str) -> Any:
    """Build the part of a kind (`model`, `reward`) that a card names. A card travels with weights, so it may name classes of this project alone, with plain values;
    how they run is this machine's own affair."""
    node = {k: v for k, v in spec.items() if k not in ("device", "attention", "compile")} if isinstance(spec, dict) else {}
    target = str(node.get("_target_"))
    if not target.startswith(NAMEABLE) or not load_class(target).__module__.startswith(NAMEABLE):
        raise UserError(
            f"the card names '{target}', which is no backbone or reward of rlstitch and will not be imported from a file: build it and pass it to from_pretrained"
        )
    told = [(k, part) for k, v in node.items() if v is not None for part in (v if isinstance(v, list) else [v])]
    if odd := [k for k, part in told if not isinstance(part, str | int | float)]:
        raise UserError(f"the card gives {target} {', '.join(odd)} that are no plain values, which is not done from a file")
    if faults := check_part(f"{kind} of the card", node, kind=kind):
        raise UserError("; ".join(faults))
    return build_part(node, device=device)


def values(
    models: Sequence[StitchedValueModel],
    latent: Latent,
    batch: Batch,
    activations: Callable[[StitchedValueModel], Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """[B, K] of several value models; those cut at the same block of the same prefix share its activations, those of weight 0 give no gradient.

    activations: where a caller has them at hand already (guidance's unconditional branch), it gives them by model.
    """
    cache: dict[tuple[Any, ...], Any] = {}

    def prefix(model: StitchedValueModel) -> Any:
        if activations is not None:
            return activations(model)
        key = (
            model.prompted,
            model.prefix.fingerprint() if isinstance(model.prefix, LatentPrefix) else model.prefix.depth,
            *map(id, model.prefix.parameters()),
        )
        if key not in cache:
            cache[key] = model.activations(latent.z, latent.sigma, batch.text)
        return cache[key]

    out = []
    for model, weight in zip(models, [1.0] * len(models) if weights is None else weights):
        model.check_range(latent.sigma)
        state = prefix(model)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            out.append(model.value_from(state, batch))
    return torch.stack(out, 1)
