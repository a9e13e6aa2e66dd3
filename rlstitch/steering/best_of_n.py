"""Best of N: independent rollouts, the best by value; cut short where the value can read a noisy latent."""

from __future__ import annotations

import torch
from torch import Tensor

from rlstitch import sampling
from rlstitch.ranges import Count, Particles
from rlstitch.sampling import Kernel, euler
from rlstitch.steering.particles import Trace
from rlstitch.types import Value, Velocity


@torch.no_grad()
def best_of_n(
    velocity: Velocity,
    value: Value,
    z: Tensor,
    sigmas: Tensor,
    *,
    num_particles: Particles,
    stop: Count | None = None,
    kernel: Kernel = euler,
    generator: torch.Generator | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """N rollouts a prompt, z [B N, ...] with those of a prompt side by side -> the best z0 [B, ...] of each.

    A search: the law is that of the best of N draws, which is no tilted one.
    stop: score all after this many steps and finish only the best (None: score finished latents, sigma = 0). NaN never wins against a number.
    A velocity with prompts bound in must accept B N rows before the stop and B after it (`steering.model.Steered` does).
    """
    if num_particles < 1 or len(z) % num_particles or not len(z):
        raise ValueError(f"{len(z)} latents are no whole number of prompts with {num_particles} particles each")
    last = len(sigmas) - 1
    if stop is not None and not 1 <= stop <= last:
        raise ValueError(f"stop must be within 1..{last} on this grid, not {stop}")
    halted = sampling.sample(velocity, z, sigmas, stop=stop, kernel=kernel, generator=generator)
    values = value(halted.z, halted.sigma).view(-1, num_particles)
    if trace is not None:
        trace.queries += len(z)
        trace.fallbacks += int(torch.isnan(values).all(1).sum())
    best = torch.where(torch.isnan(values), -torch.inf, values).argmax(1)
    z = halted.z[torch.arange(len(values), device=z.device) * num_particles + best]
    if stop is None or stop == last:
        return z
    return sampling.sample(velocity, z, sigmas[stop:], kernel=kernel, generator=generator).z
