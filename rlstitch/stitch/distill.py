"""Distillation of a stitched value model from its frozen pixel reward, on unlabeled pictures (arXiv:2605.19804, eqs. 8, 78, 79)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch import schedule
from rlstitch.distributed import autocast, mean_over_ranks
from rlstitch.ranges import Count, CountOrNone, Decay, NotNegative, Positive, Range, Rate, Seed, Share
from rlstitch.stitch.model import StitchedValueModel, reads_tokens
from rlstitch.types import Batch, Conditioning, UserError

ALONE = "value"  # what the one model of a job is called where a name is needed
TRAINED = ("stitch.", "tail.")  # what the names of the weights that are distilled begin with


@dataclass
class DistillConfig:
    """The paper's settings are lr 1e-5, stitch_lr_factor 5, batch_size 128, warmup 100, logit-normal(0, 1), weights 1.

    sigma is drawn logit-normal(mean, std), except for a share `uniform_share` drawn uniformly; both are kept inside sigma_range.
    micro_batch: rows that are run at once, their gradients added up to the batch's (0: all). token_weight is lambda_tok; score_weight lambda_sc, used where the reward has a head or reads tokens; loss: squared error or Smooth-L1.
    """

    steps: Count = 1500
    batch_size: Count = 128
    micro_batch: CountOrNone = 0
    lr: Rate = 1e-5
    stitch_lr_factor: Annotated[float, Range(0, 10_000)] = 5.0
    weight_decay: Decay = 0.0
    warmup: CountOrNone = 100
    decay: bool = True
    clip_norm: Positive = 1.0
    sigma_mean: Annotated[float, Range(-100, 100)] = 0.0
    sigma_std: Annotated[float, Range(0, 100)] = 1.0
    uniform_share: Share = 0.0
    token_weight: NotNegative = 1.0
    score_weight: NotNegative = 1.0
    loss: Literal["squared", "smooth_l1"] = "squared"
    autocast: bool = True
    seed: Seed = 0


def draw_sigma(n: int, config: DistillConfig, sigma_range: tuple[float, float], generator: torch.Generator) -> Tensor:
    """n noise levels by the config's law, clamped to the range."""
    centred = torch.sigmoid(config.sigma_mean + config.sigma_std * torch.randn(n, generator=generator))
    uniform = torch.rand(n, generator=generator)
    picked = torch.rand(n, generator=generator) < config.uniform_share
    return torch.where(picked, uniform, centred).clamp(*sigma_range)


def _error(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Elementwise loss."""
    return (a - b).square() if kind == "squared" else F.smooth_l1_loss(a, b, reduction="none")


def distillation_loss(
    model: StitchedValueModel,
    grid: Tensor,
    sigma: Tensor,
    target: Tensor,
    target_tokens: Tensor,
    config: DistillConfig,
    prompts: list[str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (8): embedding error (summed over channels) + lambda_tok token error (mean over tokens and channels) + lambda_sc score error.

    grid [B, W, h, w] is the frozen prefix's image stream of (z, sigma), target [B, D] the frozen reward's unit embedding of the clean picture, target_tokens
    [B, N + 1, W] its output tokens. With an un-normalised student the minimiser of the first term is E[target | z]: V is then the value function itself, not only
    its ranking. The last term is the head's; of a reward that reads its score from tokens and prompt, it is the score's under the pictures' own `prompts`, where they have any.
    """
    embedding, tokens = model.embed(grid)
    parts = {
        "embedding": _error(embedding, target, config.loss).sum(-1).mean(),
        "tokens": _error(tokens, target_tokens, config.loss).mean(),
    }
    loss = parts["embedding"] + config.token_weight * parts["tokens"]
    reward, scores = model.reward, None
    if reads_tokens(reward):
        if prompts is not None:
            batch = batch_of(prompts)
            with torch.no_grad():
                known = reward.score_tokens(target_tokens, batch)
            scores = reward.score_tokens(tokens, batch), known
    elif reward.head is not None:
        scores = reward.head_of(embedding), reward.head_of(target)
    if scores is not None:
        parts["score"] = _error(*scores, config.loss).mean()
        loss = loss + config.score_weight * parts["score"]
    return loss, {k: v.detach() for k, v in parts.items()}


def batch_of(prompts: Sequence[str], text: Any = None) -> Batch:
    """Prompts without facts, each a group of its own."""
    index = torch.arange(len(prompts))
    return Batch(list(prompts), index, index, [{}] * len(prompts), text)


@torch.no_grad()
def outputs_of(reward: Any, images: Tensor, batch_size: int = 64) -> Tensor:
    """What the frozen reward reads its score of clean pictures from: unit embeddings [N, D], or output tokens [N, T, W] in float32."""
    if not reads_tokens(reward):
        return targets_of(reward, images, batch_size, most_bytes=0)[0]
    return torch.cat([reward.encode(_pixels(part).to(reward.device))[1] for part in images.split(batch_size)])


@torch.no_grad()
def targets_of(
    reward: Any, images: Tensor, batch_size: int = 64, *, most_bytes: int = 4 << 30
) -> tuple[Tensor, Tensor | Callable[[Tensor], Tensor], float]:
    """Frozen reward on clean pictures: unit embeddings [N, D], output tokens [N, T, W] (half precision), mean norm of the raw embedding.

    Tokens of more than `most_bytes` are not kept (a ViT-H/14 at 378 px makes 1.9 MB a picture): then a function gives those of any rows when they are asked for.
    """
    unit, tokens, norm = [], [], 0.0
    kept = len(images) * (reward.grid**2 + 1) * reward.width * 2 <= most_bytes
    for start in range(0, len(images), batch_size):
        raw, h = reward.encode(_pixels(images[start : start + batch_size]).to(reward.device))
        norm += float(raw.norm(dim=-1).sum())
        unit.append(F.normalize(raw, dim=-1))
        if kept:
            tokens.append(h.half())
    if kept:
        return torch.cat(unit), torch.cat(tokens), norm / len(images)

    @torch.no_grad()
    def again(index: Tensor) -> Tensor:
        return reward.encode(_pixels(images[index.to(images.device)]).to(reward.device))[1]

    return torch.cat(unit), again, norm / len(images)


@torch.no_grad()
def latents_of(backbone: Any, images: Tensor, batch_size: int = 64) -> Tensor:
    """Clean latents [N, C, H, W] of pictures, uint8 or float in [0, 1]. Raises UserError where they have another size than the model's."""
    if tuple(images.shape[-2:]) != tuple(backbone.size):
        raise UserError(
            f"the pictures have {images.shape[-1]} x {images.shape[-2]} pixels, the model takes {backbone.size[1]} x {backbone.size[0]}: resize them, or set model.image_size, or height and width"
        )
    return torch.cat([backbone.encode(_pixels(images[s : s + batch_size]).to(backbone.device)) for s in range(0, len(images), batch_size)])


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def batches_of(images: Tensor, batch_size: int = 64) -> list[Tensor]:
    """Pictures, uint8 or float, as floats in [0, 1], some at a time; none where there are none."""
    return [_pixels(part) for part in images.split(batch_size)] if len(images) else []


class Held:
    """N pictures to distil on, in memory: clean latents [N, C, H, W], and of each reward its targets [N, D] and tokens [N, T, W], or what gives the tokens of rows [B].

    text_of: gives the prompts' text of rows [B], for a value model that is run under it. prompts_of: the prompts of rows [B], for a reward that reads tokens and
    prompt together.
    """

    def __init__(
        self,
        clean: Tensor,
        targets: Mapping[str, tuple[Tensor, Tensor | Callable[[Tensor], Tensor]]],
        text_of: Callable[[Tensor], Conditioning] | None = None,
        prompts_of: Callable[[Tensor], list[str]] | None = None,
    ):
        self.clean, self.by_reward, self.text_of, self.prompts_of = clean, targets, text_of, prompts_of

    def __len__(self) -> int:
        return len(self.clean)

    def latents(self, index: Tensor) -> Tensor:
        """Clean latents of rows [B], float32 on the CPU or where they are held."""
        return self.clean[index].float()

    def targets(self, name: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """A reward's unit embeddings [B, D] and tokens [B, T, W] of rows [B]."""
        targets, tokens = self.by_reward[name]
        return targets[index], tokens(index) if callable(tokens) else tokens[index]


Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class Distillation:
    """Stitches and tails of value models under training on the same pictures under the same noise; what it needs to go on where it stopped is `state_dict`, `state` and
    `optimiser`'s.

    data: the pictures, as `Held` has them. models: by the names of their rewards; those cut at one block share the frozen prefix's run, and `extend(cut, block)` goes
    on from there to deeper ones (Backbone.extend). rank, world: each rank takes its part of the same batch, so that the number of ranks changes nothing but the order of sums.
    objective: the loss to descend, with the signature of `distillation_loss`.
    """

    def __init__(
        self,
        models: Mapping[str, StitchedValueModel],
        data: Any,
        config: DistillConfig,
        *,
        extend: Callable[[Any, int], Any] | None = None,
        objective: Objective = distillation_loss,
        rank: int = 0,
        world: int = 1,
    ):
        self.models, self.data, self.config, self.extend, self.objective = torch.nn.ModuleDict(), data, config, extend, objective
        self.models.update({name or ALONE: model for name, model in models.items()})
        self.names, self.rank, self.world, self.updates = list(models), rank, world, 0
        self.device = next(iter(models.values())).stitch.linear.weight.device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.parameters, self.rates, groups = [], [config.lr * config.stitch_lr_factor, config.lr], []
        self.own: dict[str, list[torch.nn.Parameter]] = {}
        for name, model in models.items():
            stitch, tail = list(model.stitch.parameters()), [p for p in model.tail.parameters() if p.requires_grad]
            self.own[name] = [*stitch, *tail]
            self.parameters += self.own[name]
            groups += [{"params": part, "lr": lr} for part, lr in zip((stitch, tail), self.rates)]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        self.models.train()

    def grids(self, z: Tensor, sigma: Tensor, text: Conditioning | None) -> dict[str, Tensor]:
        """What each model's stitch reads; a prefix that several share is run once."""
        out: dict[str, Tensor] = {}
        state, reached = None, 0
        with torch.no_grad():
            for name in sorted(self.names, key=lambda name: self._model(name).prefix.depth):
                model = self._model(name)
                if not reached or (self.extend is None and reached != model.prefix.depth):
                    state = model.activations(z, sigma, text)
                elif reached != model.prefix.depth:
                    state = self.extend(state, model.prefix.depth)
                reached, out[name] = model.prefix.depth, state.grid
        return out

    def _model(self, name: str) -> StitchedValueModel:
        return self.models[name or ALONE]

    def step(self) -> dict[str, float]:
        """One optimiser step on a batch drawn anew; -> its loss and what that is made of, of several models behind their names. Raises UserError where a gradient is not finite."""
        config, device = self.config, self.device
        factor = min(1.0, (self.updates + 1) / max(1, config.warmup))
        if config.decay:
            factor *= 1 - 0.98 * self.updates / config.steps
        for group, lr in zip(self.optimiser.param_groups, self.rates * len(self.names)):
            group["lr"] = lr * factor
        index = torch.randint(len(self.data), (config.batch_size,), generator=self.generator)
        own = torch.arange(config.batch_size).tensor_split(self.world)[self.rank]  # before the draws, which every rank makes whole
        clean = self.data.latents(index[own]).to(device)
        noise = torch.randn(config.batch_size, *clean.shape[1:], generator=self.generator)[own].to(device)
        sigma = draw_sigma(config.batch_size, config, self._model(self.names[0]).sigma_range, self.generator)[own].to(device)
        z = schedule.interpolate(clean, noise, sigma)
        told: dict[str, Tensor] = {}
        for rows in torch.arange(len(own)).split(config.micro_batch or len(own)):
            picked, share = index[own[rows]], len(rows) * self.world / config.batch_size
            text = self.data.text_of(picked) if self.data.text_of is not None else None
            prompts = self.data.prompts_of(picked) if self.data.prompts_of is not None else None
            with autocast(device.type, "auto" if config.autocast else "fp32"):
                grids = self.grids(z[rows], sigma[rows], text)
            for name in self.names:
                target, tokens = (part.to(device) for part in self.data.targets(name, picked))
                with autocast(device.type, "auto" if config.autocast else "fp32"):
                    loss, parts = self.objective(self._model(name), grids[name], sigma[rows], target, tokens.float(), config, prompts)
                (loss * share).backward()
                for key, value in {"loss": loss.detach(), **parts}.items():
                    key = f"{name}/{key}" if name else key
                    told[key] = told.get(key, 0.0) + share * value
        self._agree(told)
        for name, weights in self.own.items():
            norm = torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
            if not torch.isfinite(norm):
                raise UserError(
                    f"distillation{f' of {name}' * bool(name)}: the gradient norm is {norm.item()} at step {self.updates}; lower lr (now {config.lr:g})"
                )
        self.optimiser.step()
        torch.clear_autocast_cache()  # inside a caller's autocast, the casts of the old weights would be used again
        self.optimiser.zero_grad(set_to_none=True)
        self.updates += 1
        return {k: float(v) for k, v in told.items()}

    def _agree(self, told: dict[str, Tensor]) -> None:
        """Means over the ranks, of gradients and figures, in place."""
        if self.world > 1:
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
            *gradients, figures = mean_over_ranks([*gradients, torch.stack(list(told.values())).float()], self.world)
            for p, mean in zip(self.parameters, gradients):
                p.grad = mean
            told.update(zip(told, figures))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that train."""
        return {
            f"{name}.{k}" if name else k: v
            for name in self.names
            for k, v in self._model(name).state_dict().items()
            if k.startswith(TRAINED)
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name in self.names:
            before = f"{name}." if name else ""
            self._model(name).load_state_dict({k.removeprefix(before): v for k, v in tensors.items() if k.startswith(before)}, strict=False)

    def state(self) -> dict[str, Tensor]:
        """Of the draws to come."""
        return {"generator": self.generator.get_state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.generator.set_state(tensors["generator"])


def distill(
    model: StitchedValueModel,
    latents: Tensor,
    targets: Tensor,
    target_tokens: Tensor | Callable[[Tensor], Tensor],
    config: DistillConfig,
    *,
    text_of: Callable[[Tensor], Conditioning] | None = None,
    prompts_of: Callable[[Tensor], list[str]] | None = None,
    objective: Objective = distillation_loss,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> float:
    """Train one value model's stitch and tail in place, to the end, on pictures in memory (see `Held`); returns the seconds it took. `progress(step, metrics)` is called every step."""
    data = Held(latents, {"": (targets, target_tokens)}, text_of, prompts_of)
    training, started = Distillation({"": model}, data, config, objective=objective), time.perf_counter()
    for step in range(config.steps):
        metrics = training.step()
        if progress is not None:
            progress(step, metrics)
    model.eval()
    return time.perf_counter() - started
