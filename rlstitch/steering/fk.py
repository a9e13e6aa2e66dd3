"""Feynman-Kac steering (arXiv:2605.19804, eq. 9, Algorithm 1) with StitchVM's proposal scaling, and SVDD: search over the noise of an SDE by values of noisy latents."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from rlstitch import sampling
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
        choice = torch.multinomial(normalised(table / temperature)[0].cpu(), 1, generator=generator)[:, 0].to(values.device)
    else:
        choice = torch.where(torch.isnan(table), -torch.inf, table).argmax(1)
    return torch.arange(len(table), device=values.device) * m + choice


@torch.no_grad()
def fk(
    velocity: Velocity,
    value: Value,
    z: Tensor,
    sigmas: Tensor,
    *,
    num_particles: int,
    num_proposals: int = 1,
    resample_steps: Collection[int],
    proposal_steps: Collection[int] = (),
    lam: float,
    lam_unit: Literal["absolute", "spread"] = "absolute",
    potential: Potential = "diff",
    resampling: Scheme = "systematic",
    ess_threshold: float | None = None,
    kernel: Kernel = linear_sde,
    generator: torch.Generator | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """N particles a prompt, z [B N, ...] with those of a prompt side by side -> z0 [B N, ...], approximately from p(z0) exp(lam V(z0, 0)).

    Step k leads from sigmas[k] to sigmas[k + 1]. In `proposal_steps` every particle draws M = `num_proposals` children and keeps the one of highest value
    (greedy: a search, no longer unbiased). After `resample_steps`, and always after the last step, particles are resampled by their potential. Values are
    those of the **children**, scored in one batch; `value` must take M rows a particle, side by side.
    lam_unit `spread`: lam counts standard deviations of the first values within a prompt, so that one setting serves rewards of any scale.
    ess_threshold: resample a prompt's particles only where their effective size is below this share of N; until then weights are carried, not dropped.
    Raises ValueError for N or M below 1, steps beyond the grid and a kernel without noise (copies would never part).
    """
    last, n, m = len(sigmas) - 2, num_particles, num_proposals
    if n < 1 or m < 1:
        raise ValueError(f"num_particles and num_proposals must be at least 1, not {n} and {m}")
    if len(z) % n or not len(z):
        raise ValueError(f"{len(z)} latents are no whole number of prompts with {n} particles each")
    resample_at = _steps("resample_steps", resample_steps, last + 1) | {last}
    propose_at = _steps("proposal_steps", proposal_steps, last + 1) if m > 1 else set()
    if ess_threshold is not None and not 0 < ess_threshold <= 1:
        raise ValueError(f"ess_threshold is a share of the particles in (0, 1], not {ess_threshold}")
    levels = sigmas.tolist()
    if (n > 1 or m > 1) and is_deterministic(kernel, z, levels[0], levels[1]):
        raise ValueError("the kernel adds no noise, so resampled copies would stay identical: use a stochastic one such as linear_sde")
    trace = Trace() if trace is None else trace
    potentials = Potentials(potential, lam, len(z) // n, n)
    carried = torch.zeros(len(z) // n, n, dtype=torch.float64)
    trace.lam = lam if lam_unit == "absolute" or lam == 0 else None
    for k in range(last + 1):
        v = velocity(z, torch.full((len(z),), levels[k], device=z.device))
        children = m if k in propose_at else 1
        z, values = _propose(z, v, kernel, levels[k], levels[k + 1], children, generator), None
        if lam == 0 and children == 1:
            continue
        if children > 1 or (k in resample_at and n > 1):
            values = value(z, torch.full((len(z),), levels[k + 1], device=z.device)).float()
            trace.queries += len(z)
        if children > 1:
            kept = _keep(values, children, 0.0, generator)
            z, values = z[kept], values[kept]
        if k not in resample_at or n == 1 or lam == 0:
            continue
        table = values.view(-1, n)
        if trace.lam is None:
            spread = float(torch.nan_to_num(table.std(1)).mean())
            potentials.lam = trace.lam = lam / spread if spread > 0 else lam
        carried = carried + potentials.step(table, last=k == last)
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


@torch.no_grad()
def svdd(
    velocity: Velocity,
    value: Value,
    z: Tensor,
    sigmas: Tensor,
    *,
    num_proposals: int,
    proposal_steps: Collection[int] | None = None,
    temperature: float = 0.0,
    kernel: Kernel = linear_sde,
    generator: torch.Generator | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """SVDD: at every step (or those given) draw M children of each z [B, ...], keep one by value -> z0 [B, ...].

    temperature 0 keeps the best (the released code); otherwise one is drawn with weight exp(V / temperature) (the paper). Raises ValueError like `fk`.
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
