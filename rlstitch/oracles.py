"""Oracles score latents: exactly at the end (Terminal), through a one-step guess (Tweedie), by finishing the rollout (MonteCarlo), or at once (Stitched)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from rlstitch import sampling, schedule, scheduler
from rlstitch.asking import ask, has_gradient
from rlstitch.distributed import autocast
from rlstitch.figures import exact
from rlstitch.ranges import AutoShift, GridSteps, Range, Seed, Weights
from rlstitch.stitch.model import StitchedValueModel, values
from rlstitch.types import Backbone, Batch, Latent, Oracle, Reward, UserError, Velocity, noise_like


class _Mixed:
    """Names, weights and the weighted total that all oracles share. The total is on the rewards' raw scales unless the weights say otherwise."""

    def __init__(self, weights: Weights):
        if not weights:
            raise UserError("an oracle needs at least one reward")
        self.names, self.weights = list(weights), list(weights.values())

    @exact
    def total(self, scores: Tensor) -> Tensor:
        """Weighted sum of the columns: [B, K] -> [B], float32 or the scores' float64. A reward of weight 0 is only looked at, and may fail."""
        weights = torch.tensor(self.weights, dtype=scores.dtype, device=scores.device)
        return (torch.where(weights == 0, 0.0, scores) * weights).sum(-1)

    def asked(self, scores_of: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Scores `scores_of(z)` [B, K], through which a row without a total gives z [B, ...] no gradient: the infinite slope of what was masked, times 0, would be NaN
        and spoil the whole update."""
        if not (torch.is_grad_enabled() and z.requires_grad):
            return scores_of(z)
        seen = z.view_as(z)
        scores = scores_of(seen)
        lost = ~torch.isfinite(self.total(scores.detach()))
        seen.register_hook(lambda slope: torch.where(lost.view(-1, *[1] * (slope.ndim - 1)).to(slope.device), 0.0, slope))
        return scores


def rewards_of(oracle: Oracle | None) -> list[str]:
    """The reward that each column is about [K]: by default its name; several columns of a Weighted oracle may be about one."""
    return [] if oracle is None else getattr(oracle, "about", oracle.names)


def recomputed(oracle: Oracle, latent: Latent, batch: Batch) -> Tensor:
    """An oracle's scores [B, K] with gradient, asked row by row, each row's graph (decoder, reward, prefix, tail) made again in the backward pass and freed with it.

    Scores and gradients are those of `oracle(latent, batch)`; what is held at once is one row's, not the batch's. Autocast is as it was; which adapter is in use is not
    remembered, so that gradients must be taken under the same one.
    """
    one = lambda z, sigma, row: oracle(Latent(z, sigma), row)  # noqa: E731
    rows = (slice(k, k + 1) for k in range(len(latent.z)))
    with set_checkpoint_early_stop(False):  # torch stops early by an exception, which a reward or whoever runs it may take for its own
        return torch.cat([checkpoint(one, latent.z[r], latent.sigma[r], batch[r], use_reentrant=False) for r in rows])


class _Pixel(_Mixed):
    """What the oracles on pixel rewards share: `rewards` in the order of `weights`."""

    def __init__(self, backbone: Backbone, rewards: Mapping[str, Reward], weights: Mapping[str, float]):
        super().__init__(weights)
        self.backbone, self.rewards = backbone, {name: rewards[name] for name in weights}

    def finished(self, z: Tensor, batch: Batch) -> Tensor:
        """Scores [B, K], float32, of clean latents z: decoded once, then every reward; one of weight 0 without gradient."""

        def scores(z: Tensor) -> Tensor:
            images, columns = self.backbone.decode(z), []
            for (name, reward), weight in zip(self.rewards.items(), self.weights):
                with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                    columns.append(ask(name, reward, images, batch))
            return torch.stack(columns, 1)

        return self.asked(scores, z)


class Terminal(_Pixel):
    """r(D(z0)): pixel rewards of a finished latent; accepts sigma = 0 only."""

    sigma_range = (0.0, 0.0)

    def __init__(self, backbone: Backbone, rewards: Mapping[str, Reward], weights: Weights):
        super().__init__(backbone, rewards, weights)
        self.differentiable = all(map(has_gradient, self.rewards.values()))

    def __call__(self, latent: Latent, batch: Batch) -> Tensor:
        if bool((latent.sigma > 0).any()):
            raise UserError(
                f"a terminal reward scores finished pictures (sigma = 0), not latents at sigma {latent.sigma.max().item():g}: use stop End, or a Stitched or Tweedie oracle"
            )
        return self.finished(latent.z, batch)


class Tweedie(_Pixel):
    """r(D(z - sigma v)): the posterior mean decoded and scored. prompt: condition v on the batch's prompt, or on the null text."""

    sigma_range = (0.0, 1.0)

    def __init__(self, backbone: Backbone, rewards: Mapping[str, Reward], weights: Weights, *, prompt: bool = True):
        super().__init__(backbone, rewards, weights)
        self.prompt = prompt
        self.differentiable = all(map(has_gradient, self.rewards.values()))

    def __call__(self, latent: Latent, batch: Batch) -> Tensor:
        if not bool((latent.sigma > 0).any()):
            return self.finished(latent.z, batch)
        text = batch.text if self.prompt else self.backbone.null.expand(len(latent.z))
        if text is None:
            raise UserError("a Tweedie oracle with prompt=true needs the batch's encoded prompts")
        return self.from_velocity(latent, self.backbone.velocity(latent.z, latent.sigma, text), batch)

    def from_velocity(self, latent: Latent, v: Tensor, batch: Batch) -> Tensor:
        """Scores [B, K] by a velocity that is known already, guided or not."""
        return self.finished(schedule.posterior_mean(latent.z, v, latent.sigma), batch)


class MonteCarlo(_Pixel):
    """Mean r over n completed rollouts from the latent, by a stochastic kernel: the reference that every value is compared with. No gradient.

    shift: a number, or auto for the model's own. precision: fp32, bf16 or auto, of the denoiser's passes alone; None is the caller's. at_once: latents that the models
    see at a time (0: all). A row's noise is drawn from (seed, the row's own seed) alone, so that neither ranks nor batch sizes change its score.
    """

    sigma_range = (0.0, 1.0)
    differentiable = False

    def __init__(
        self,
        backbone: Backbone,
        rewards: Mapping[str, Reward],
        weights: Weights,
        *,
        rollouts: Annotated[int, Range(1, 10_000)] = 4,
        num_steps: GridSteps = 10,
        shift: AutoShift = scheduler.AUTO,
        precision: Literal["auto", "fp32", "bf16"] | None = None,
        seed: Seed = 0,
        at_once: Annotated[int, Range(0, 1_000_000)] = 0,
    ):
        super().__init__(backbone, rewards, weights)
        self.precision, self.rollouts, self.at_once = precision, rollouts, at_once
        self.grid, self.seed = schedule.sigmas(num_steps, scheduler.resolve("oracle.shift", shift, backbone), "plain"), seed

    def __call__(self, latent: Latent, batch: Batch) -> Tensor:
        return self.each(latent, batch).mean(0)

    @torch.no_grad()
    def each(self, latent: Latent, batch: Batch, which: Sequence[int] | None = None) -> Tensor:
        """Scores of every rollout [n, B, K], or of those by these numbers; from a finished latent there is but one."""
        start = float(latent.sigma[0])
        if bool((latent.sigma != start).any()):
            raise UserError("a Monte-Carlo oracle completes a batch from one noise level; this batch mixes several")
        if start == 0:
            return self._finished(latent.z, batch)[None]
        grid = torch.cat([torch.tensor([start]), self.grid[self.grid < start]])
        seeds, out = batch.seeds + 1_000_003 * (1 + self.seed), []
        velocity = bound(self.backbone, batch, self.at_once)
        for rollout in range(self.rollouts) if which is None else which:
            draws = itertools.count(rollout * (len(grid) - 1))
            noise = lambda z, draws=draws: noise_like(z.shape[1:], seeds, stream=next(draws), device=z.device).to(z.dtype)  # noqa: E731
            kernel = sampling.stochastic(sampling.linear_sde, noise=noise)
            with autocast(latent.z.device.type, self.precision) if self.precision else nullcontext():
                done = sampling.sample(velocity, latent.z, grid, kernel=kernel)
            out.append(self._finished(done.z, batch))
        return torch.stack(out)

    def _finished(self, z: Tensor, batch: Batch) -> Tensor:
        return torch.cat([self.finished(z[rows], batch[rows]) for rows in slices(len(z), self.at_once)])


def slices(count: int, size: int) -> list[slice]:
    """`count` rows, `size` at a time (0: all at once)."""
    size = size or count
    return [slice(k, k + size) for k in range(0, count, size)]


def bound(backbone: Backbone, batch: Batch, size: int) -> Velocity:
    """The velocity of a batch's own prompts, the denoiser run on `size` rows at a time (0: all at once)."""
    parts = [(rows, backbone.bind(batch[rows].text)) for rows in slices(len(batch), size)]
    return lambda z, sigma: torch.cat([velocity(z[rows], sigma[rows]) for rows, velocity in parts])


class Stitched(_Mixed):
    """V(z, sigma, prompt) of StitchVMs; those cut at the same block share one prefix. compile: their tails by torch.compile, block by block, also where the denoiser is not
    (model.compile is for both)."""

    differentiable = True

    def __init__(self, values: Mapping[str, StitchedValueModel], weights: Weights, *, compile: bool = False):
        super().__init__(weights)
        self.models = [values[name] for name in weights]
        for model in self.models if compile else ():
            model.compile_tail()
        self.sigma_range = (max(m.sigma_range[0] for m in self.models), min(m.sigma_range[1] for m in self.models))

    def __call__(self, latent: Latent, batch: Batch, activations: Callable[[StitchedValueModel], Any] | None = None) -> Tensor:
        return self.asked(lambda z: values(self.models, Latent(z, latent.sigma), batch, activations, weights=self.weights), latent.z)


class Weighted(_Mixed):
    """Several oracles side by side, e.g. a stitched and a Tweedie one; columns and totals are joined, each total times its weight. A column is called
    `PLACE.NAME`, and is `about` the reward that it is in its own oracle. For code alone: a recipe's oracle has its weights by name."""

    def __init__(self, oracles: Sequence[Oracle], weights: Sequence[float]):
        if len(oracles) != len(weights):
            raise UserError(f"{len(oracles)} oracles but {len(weights)} weights")
        super().__init__(
            {f"{i}.{name}": w * inner for i, (o, w) in enumerate(zip(oracles, weights)) for name, inner in zip(o.names, o.weights)}
        )
        self.about = [name for o in oracles for name in rewards_of(o)]
        self.oracles, self.shares = list(oracles), list(weights)
        self.differentiable = all(o.differentiable for o in oracles)
        self.sigma_range = (max(o.sigma_range[0] for o in oracles), min(o.sigma_range[1] for o in oracles))

    def __call__(self, latent: Latent, batch: Batch) -> Tensor:
        columns = []
        for oracle, share in zip(self.oracles, self.shares):
            with torch.set_grad_enabled(torch.is_grad_enabled() and share != 0):
                columns.append(oracle(latent, batch))
        return torch.cat(columns, 1)
