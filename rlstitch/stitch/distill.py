"""Distillation of a stitched value model from its frozen pixel reward, on unlabeled pictures (arXiv:2605.19804, eqs. 8, 78, 79)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch import schedule
from rlstitch.distributed import autocast
from rlstitch.ranges import Count, CountOrNone, Decay, NotNegative, Positive, Range, Rate, Seed, Share
from rlstitch.stitch.model import StitchedValueModel, reads_tokens
from rlstitch.types import Batch, Conditioning, UserError

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
    z: Tensor,
    sigma: Tensor,
    target: Tensor,
    target_tokens: Tensor,
    config: DistillConfig,
    text: Conditioning | None = None,
    prompts: list[str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (8): embedding error (summed over channels) + lambda_tok token error (mean over tokens and channels) + lambda_sc score error.

    target [B, D] is the frozen reward's unit embedding of the clean picture, target_tokens [B, N + 1, W] its output tokens. With an un-normalised student
    the minimiser of the first term is E[target | z]: V is then the value function itself, not only its ranking. text: of the pictures' prompts, for a value model
    that is run under it. The last term is the head's; of a reward that reads its score from tokens and prompt, it is the score's under the pictures' own `prompts`, where they have any.
    """
    with torch.no_grad():
        grid = model.activations(z, sigma, text).grid
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


class Distillation:
    """Stitch and tail of a value model under training on N clean latents with their targets; what it needs to go on where it stopped is `state_dict`, `state` and
    `optimiser`'s.

    target_tokens: tokens [N, T, W], or what gives those of rows [B]. text_of: gives the prompts' text of rows [B], for a value model that is run under it. prompts_of: the prompts of rows [B], for a reward
    that reads tokens and prompt together. objective: the loss to descend, with the signature of `distillation_loss`.
    """

    def __init__(
        self,
        model: StitchedValueModel,
        latents: Tensor,
        targets: Tensor,
        target_tokens: Tensor | Callable[[Tensor], Tensor],
        config: DistillConfig,
        *,
        text_of: Callable[[Tensor], Conditioning] | None = None,
        prompts_of: Callable[[Tensor], list[str]] | None = None,
        objective: Callable[..., tuple[Tensor, dict[str, Tensor]]] = distillation_loss,
    ):
        self.model, self.latents, self.targets, self.target_tokens, self.config = model, latents, targets, target_tokens, config
        self.text_of, self.prompts_of, self.objective = text_of, prompts_of, objective
        self.generator = torch.Generator().manual_seed(config.seed)
        stitch, tail = list(model.stitch.parameters()), [p for p in model.tail.parameters() if p.requires_grad]
        self.parameters, self.updates = [*stitch, *tail], 0
        self.rates = [config.lr * config.stitch_lr_factor, config.lr]
        groups = [{"params": part, "lr": lr} for part, lr in zip((stitch, tail), self.rates)]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        model.train()

    def step(self) -> dict[str, float]:
        """One optimiser step on a batch drawn anew; -> its loss and what that is made of. Raises UserError where the gradient is not finite."""
        config, model, device = self.config, self.model, self.latents.device
        factor = min(1.0, (self.updates + 1) / max(1, config.warmup))
        if config.decay:
            factor *= 1 - 0.98 * self.updates / config.steps
        for group, lr in zip(self.optimiser.param_groups, self.rates):
            group["lr"] = lr * factor
        index = torch.randint(len(self.latents), (config.batch_size,), generator=self.generator)
        noise = torch.randn(config.batch_size, *self.latents.shape[1:], generator=self.generator).to(device)
        sigma = draw_sigma(config.batch_size, config, model.sigma_range, self.generator).to(device)
        z = schedule.interpolate(self.latents[index].float(), noise, sigma)
        told: dict[str, Tensor] = {}
        for rows in torch.arange(config.batch_size).split(config.micro_batch or config.batch_size):
            picked, share = index[rows], len(rows) / config.batch_size
            tokens = self.target_tokens(picked) if callable(self.target_tokens) else self.target_tokens[picked]
            text = self.text_of(picked) if self.text_of is not None else None
            prompts = self.prompts_of(picked) if self.prompts_of is not None else None
            target = self.targets[picked].to(device)
            with autocast(device.type, "auto" if config.autocast else "fp32"):
                loss, parts = self.objective(model, z[rows], sigma[rows], target, tokens.float().to(device), config, text, prompts)
            (loss * share).backward()
            for key, value in {"loss": loss.detach(), **parts}.items():
                told[key] = told.get(key, 0.0) + share * value
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        if not torch.isfinite(norm):
            raise UserError(f"distillation: the gradient norm is {norm.item()} at step {self.updates}; lower lr (now {config.lr:g})")
        self.optimiser.step()
        torch.clear_autocast_cache()  # inside a caller's autocast, the casts of the old weights would be used again
        self.optimiser.zero_grad(set_to_none=True)
        self.updates += 1
        return {k: float(v) for k, v in told.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that train."""
        return {k: v for k, v in self.model.state_dict().items() if k.startswith(TRAINED)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(tensors, strict=False)

    def state(self) -> dict[str, Tensor]:
        """Of the draws to come."""
        return {"generator": self.generator.get_state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.generator.set_state(tensors["generator"])


def distill(*arguments: Any, progress: Callable[[int, dict[str, float]], None] | None = None, **options: Any) -> float:
    """Train stitch and tail in place, with the arguments of `Distillation`, to the end; returns the seconds it took. `progress(step, metrics)` is called every step."""
    training, started = Distillation(*arguments, **options), time.perf_counter()
    for step in range(training.config.steps):
        metrics = training.step()
        if progress is not None:
            progress(step, metrics)
    training.model.eval()
    return time.perf_counter() - started
