"""Gradient guidance (DPS, arXiv:2605.19804, eqs. 4 and 40): the sampling law tilted by a value's gradient."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from rlstitch.ranges import Positive, StepIndex
from rlstitch.sampling import Kernel, euler
from rlstitch.types import Value, Velocity


def tilt(sigma: float, scale: float = 1.0, max_coefficient: float = 20.0) -> float:
    """scale sigma / (1 - sigma): how much of grad V a velocity loses in the exactly tilted flow; clamped where it is singular (sigma -> 1)."""
    return scale * min(sigma / (1 - sigma) if sigma < 1 else float("inf"), max_coefficient)


def value_gradient(value: Value, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(V [B], grad_z V [B, ...]) at one noise level; each row's value depends on its own latent alone. Raises ValueError where V has no gradient."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        v = value(leaf, sigma)
        if not v.requires_grad:
            raise ValueError(
                "the value has no gradient with respect to the latent: DPS needs a differentiable oracle (Stitched, or Tweedie of a differentiable reward)"
            )
        return v.detach(), torch.autograd.grad(v.sum(), leaf)[0]


def dps(
    velocity: Velocity,
    value: Value,
    z: Tensor,
    sigmas: Tensor,
    *,
    scale: float = 1.0,
    kernel: Kernel = euler,
    steps: Container[StepIndex] | None = None,
    max_coefficient: Positive = 20.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Walk z [B, C, H, W] down the grid with v' = v - scale sigma / (1 - sigma) grad V, and return z0.

    With the soft value V = log E[exp(r(z0)) | z] and scale 1 this samples p(z0) exp(r(z0)) exactly (in the limit of small steps), by the ODE and by every
    SDE whose kernel computes its score from v': there the drift gains (sigma / (1 - sigma) + g^2 / 2) grad V, which is 3t / (1 - t) for the paper's g.
    steps: the step indices that are guided (None: all). The value is asked before the velocity, so that a shared prefix runs once.
    """
    if not torch.isfinite(torch.tensor(scale)):
        raise ValueError(f"scale must be finite, not {scale}")
    levels = sigmas.tolist()
    for k in range(len(levels) - 1):
        sigma = torch.full((len(z),), levels[k], device=z.device)
        guided = scale != 0 and (steps is None or k in steps)
        gradient = value_gradient(value, z, sigma)[1] if guided else None
        with torch.no_grad():
            v = velocity(z, sigma)
            if gradient is not None:
                v = v - tilt(levels[k], scale, max_coefficient) * gradient.to(v.dtype)
            z = kernel(z, v, levels[k], levels[k + 1], generator=generator)
    return z
