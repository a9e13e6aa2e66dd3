"""Feynman-Kac steering (arXiv:2605.19804, eq. 9, Algorithm 1) with StitchVM's proposal scaling, and SVDD: search over the noise of an SDE by values of noisy latents."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import sampling
from rlstitch.ranges import NotNegative, Particles, Range, StepIndex
from rlstitch.sampling import Kernel
from rlstitch.steering.particles import Potential, Potentials, Scheme, Trace, effective_size, is_deterministic, normalised, resample
from rlstitch.types import Value, Velocity

linear_sde = sampling.stochastic(sampling.linear_sde)


def _steps(name: str, steps: Collection[int], count: int) -> set[int]:
    if outside := [k for k in steps if not 0 <= k < count]:
        raise ValueError(f"{name} {outside[:5]} lie beyond the grid: its steps are 0..{count - 1}")
    return set(steps)


def _propose(z: Tensor, v: Tensor, kernel: Kernel, sigma: float, sigma_next: float, m: int, generator: torch.Generator | None) -> Tensor:
    """m children of every row, side by side: [R, ...] -> [R m, ...]."""
    return kernel(z.repeat_interleave(m, 0), v.repeat_interleave(m, 0), sigma, sigma_next, generator=generator)


def _keep(values: Tensor, m: int, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Index of one child a parent among rows [R m]: the best, or drawn with weight exp(V / temperature). NaN never wins against a number."""
    table = values.view(-1, m)
    if temperature > 0:
        weights = normalised(table / temperature)[0].cpu()
        pick = lambda own, first, rows: torch.multinomial(weights[first : first + rows], 1, generator=own)  # noqa: E731
        choice = sampling.drawn(pick, len(weights), generator)[:, 0].to(values.device)
    else:
        choice = torch.where(torch.isnan(table), -torch.inf, table).argmax(1)
    return torch.arange(len(table), device=values.device) * m + choice


def _weighted(values: Tensor, m: int, potentials: Potentials, *, last: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Index [G N] of one child a particle among the rows of values [G N M], drawn by its potential, and the log of the children's mean weight [G, N].

    E[mean weight x f(child drawn)] = E[weight x f(child)]: properly weighted (nested importance sampling), where the best child is not.
    """
    groups, n = potentials.spent.shape
    potentials.select(torch.arange(n).repeat_interleave(m).expand(groups, -1))  # every child begins where its particle is
    log_weights = potentials.step(values.view(groups, n * m), last=last)
    kept = _keep(log_weights.flatten(), m, 1.0, generator)
    potentials.select(kept.view(groups, n) % (n * m))
    siblings = torch.where(torch.isnan(log_weights), -torch.inf, log_weights).view(groups, n, m)
    return kept.to(values.device), siblings.logsumexp(2) - math.log(m)


@torch.no_grad()
def fk(
    velocity: Velocity,
    value: Value,
    z: Tensor,
    sigmas: Tensor,
    *,
    num_particles: Particles,
    num_proposals: Particles = 1,
    resample_steps: Collection[StepIndex],
    proposal_steps: Collection[StepIndex] = (),
    proposals: Literal["greedy", "weighted"] = "greedy",
    lam: float,
    lam_unit: Literal["absolute", "spread"] = "absolute",
    potential: Potential = "diff",
    resampling: Scheme = "systematic",
    ess_threshold: Annotated[float, Range(0, 1, "low")] | None = None,
    kernel: Kernel = linear_sde,
    generator: torch.Generator | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """N particles a prompt, z [B N, ...] with those of a prompt side by side -> z0 [B N, ...], approximately from p(z0) exp(lam V(z0, 0)).

    Step k leads from sigmas[k] to sigmas[k + 1]. In `proposal_steps` every particle draws M = `num_proposals` children and keeps one. After `resample_steps`,
    and always after the last step, particles are resampled by their potential. Values are those of the **children**, scored in one batch; `value` must take
    M rows a particle, side by side.
    proposals: `greedy` keeps the child of highest value, as the paper does: a search, whose law is not the tilted one with however many particles. `weighted`
    draws a child by its potential and weighs the particle by the mean of its children's: that law again, as without proposals.
    lam_unit `spread`: lam counts standard deviations of the value within a prompt, so that one setting serves rewards of any scale. They are `trace.spread`
    where it is known (`value_spread` measures it), else measured at the first resampling of this call and left there for the calls to come.
    ess_threshold: resample a prompt's particles only where their effective size is below this share of N; until then weights are carried, not dropped.
    Raises ValueError for N or M below 1, steps beyond the grid, a kernel without noise (copies would never part), weighted proposals by an unknown spread.
    """
    last, n, m = len(sigmas) - 2, num_particles, num_proposals
    if n < 1 or m < 1:
        raise ValueError(f"num_particles and num_proposals must be at least 1, not {n} and {m}")
    if len(z) % n or not len(z):
        raise ValueError(f"{len(z)} latents are no whole number of prompts with {n} particles each")
    if proposals not in ("greedy", "weighted"):
        raise ValueError(f"proposals must be greedy or weighted, not {proposals!r}")
    weighted = proposals == "weighted"
    resample_at = _steps("resample_steps", resample_steps, last + 1) | {last}
    propose_at = _steps("proposal_steps", proposal_steps, last + 1) if m > 1 and not (weighted and lam == 0) else set()
    if ess_threshold is not None and not 0 < ess_threshold <= 1:
        raise ValueError(f"ess_threshold is a share of the particles in (0, 1], not {ess_threshold}")
    levels = sigmas.tolist()
    if (n > 1 or m > 1) and is_deterministic(kernel, z, levels[0], levels[1]):
        raise ValueError("the kernel adds no noise, so resampled copies would stay identical: use a stochastic one such as linear_sde")
    trace = Trace() if trace is None else trace
    trace.lam = lam if lam_unit == "absolute" or lam == 0 else trace.in_spreads(lam)
    if trace.lam is None and weighted and propose_at:
        raise ValueError(
            "weighted proposals need lam from the first of them on, before the spread is seen: give trace=Trace(spread=value_spread(...))"
        )
    potentials = Potentials(potential, lam if trace.lam is None else trace.lam, len(z) // n, n)
    carried = torch.zeros(len(z) // n, n, dtype=torch.float64)
    for k in range(last + 1):
        v = velocity(z, torch.full((len(z),), levels[k], device=z.device))
        children = m if k in propose_at else 1
        z, values = _propose(z, v, kernel, levels[k], levels[k + 1], children, generator), None
        if lam == 0 and children == 1:
            continue
        if children > 1 or (k in resample_at and n > 1):
            values = value(z, torch.full((len(z),), levels[k + 1], device=z.device)).float()
            trace.queries += len(z)
        if children > 1 and weighted:
            kept, mean = _weighted(values, children, potentials, last=k == last, generator=generator)
            blind = torch.isneginf(mean).all(1, keepdim=True)  # of a prompt without any known value all children are as good
            trace.fallbacks += int(blind.sum())
            z, values, carried = z[kept], None, carried + torch.where(blind, 0.0, mean)
        elif children > 1:
            kept = _keep(values, children, 0.0, generator)
            z, values = z[kept], values[kept]
        if k not in resample_at or n == 1 or lam == 0:
            continue
        if values is not None:  # weighted children have been weighed
            if trace.lam is None:
                trace.spread = float(values.view(-1, n).std(1).nanmean())
                potentials.lam = trace.lam = trace.in_spreads(lam)
            carried = carried + potentials.step(values.view(-1, n), last=k == last)
        weights, bad = normalised(carried)
        trace.fallbacks += int(bad.sum())
        size = effective_size(weights)
        trace.ess.append(float(size.mean()))
        ancestors = resample(weights, resampling, generator)
        if ess_threshold is not None and k != last:
            stay = size >= ess_threshold * n
            ancestors = torch.where(stay[:, None], torch.arange(n), ancestors)
            carried = torch.where(stay[:, None], weights.log(), 0.0)
        else:
            carried = torch.zeros_like(carried)
        potentials.select(ancestors)
        rows = (torch.arange(len(ancestors))[:, None] * n + ancestors).flatten()
        z = z[rows.to(z.device)]
    return z


def value_spread(
    velocity: Velocity,
    value: Value,
    z: Tensor,
    sigmas: Tensor,
    *,
    num_particles: int,
    resample_steps: Collection[int],
    proposal_steps: Collection[int] = (),
    proposals: Literal["greedy", "weighted"] = "greedy",
    **options: Any,
) -> float:
    """Mean standard deviation of the value among a prompt's N particles, z [B N, ...], where `fk` of these options first resamples them; NaN where N is 1.

    Greedy proposals are made on the way there, weighted ones, which would have to know it, are not.
    """
    first, trace = min([*resample_steps, len(sigmas) - 2]), Trace()
    also = [k for k in proposal_steps if k <= first] if proposals == "greedy" else ()
    fk(
        velocity, value, z, sigmas[: first + 2], num_particles=num_particles, resample_steps=(), proposal_steps=also,
        **options | {"lam": 1.0, "lam_unit": "spread", "trace": trace},
    )  # fmt: skip
    return math.nan if trace.spread is None else trace.spread


@torch.no_grad()
def svdd(
    velocity: Velocity,
    value: Value,
    z: Tensor,
    sigmas: Tensor,
    *,
    num_proposals: Particles,
    proposal_steps: Collection[StepIndex] | None = None,
    temperature: NotNegative = 0.0,
    kernel: Kernel = linear_sde,
    generator: torch.Generator | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """SVDD: at every step (or those given) draw M children of each z [B, ...], keep one by value -> z0 [B, ...].

    temperature 0 keeps the best (the released code): a search. Otherwise one is drawn with weight exp(V / temperature) (the paper), which for many children and
    V = temperature log E[exp(r(z0) / temperature) | z] draws from p(z0) exp(r(z0) / temperature) where the kernel is memoryless, g^2 = 2 sigma / (1 - sigma):
    `stochastic(flow_grpo_sde, noise_level=2**0.5)`. Under another, also the default one, a path remembers where it began, and the law is another.
    Raises ValueError like `fk`.
    """
    if num_proposals < 1:
        raise ValueError(f"num_proposals must be at least 1, not {num_proposals}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, not {temperature}")
    levels, m = sigmas.tolist(), num_proposals
    chosen = set(range(len(levels) - 1)) if proposal_steps is None else _steps("proposal_steps", proposal_steps, len(levels) - 1)
    if m > 1 and is_deterministic(kernel, z, levels[0], levels[1]):
        raise ValueError("the kernel adds no noise, so all children would be the same: use a stochastic one such as linear_sde")
    trace = Trace() if trace is None else trace
    for k in range(len(levels) - 1):
        v = velocity(z, torch.full((len(z),), levels[k], device=z.device))
        children = m if k in chosen else 1
        z = _propose(z, v, kernel, levels[k], levels[k + 1], children, generator)
        if children > 1:
            values = value(z, torch.full((len(z),), levels[k + 1], device=z.device)).float()
            trace.queries += len(z)
            trace.fallbacks += int(torch.isnan(values).view(-1, children).all(1).sum())
            z = z[_keep(values, children, temperature, generator)]
    return z
