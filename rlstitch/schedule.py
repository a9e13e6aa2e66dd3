"""Sigma grids, the straight path of arXiv:2605.19804, eq. (1), and what follows from it in closed form. sigma = t: 0 clean, 1 noise.

What is given in float64 is computed and returned in it; grids and tables are float32, as the samplers take them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def precision(x: Tensor) -> torch.dtype:
    """float64 where x is, else float32: what its noise levels are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in float64 where it is, anything else in float32."""
    return x.to(precision(x))


def _like(sigma: float | Tensor, z: Tensor) -> Tensor:
    """sigma as a tensor that broadcasts over z [B, ...]: a number in z's precision, a tensor in its own, neither below float32."""
    sigma = wide(sigma).to(z.device) if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=precision(z), device=z.device)
    return sigma.view(-1, *[1] * (z.ndim - 1)) if sigma.ndim else sigma


TRAINED_STEPS = 50  # of the grid whose shift a training table takes, where it depends on the steps


@dataclass(frozen=True)
class Shift:
    """How noise levels are shifted: by `factor`, and the last one above 0 is then brought to `terminal`, where there is one, the rest stretched with it.

    dynamic: the factor was made for one picture size, and diffusers does not apply it to the ends of its table as well, see `sigmas`. per_step: what its logarithm gains
    with every step of the grid. spacing: of the model's own grid, `diffusers` or `plain`.
    """

    factor: float = 1.0
    dynamic: bool = False
    terminal: float | None = None
    per_step: float = 0.0
    spacing: str = "diffusers"

    def at(self, num_steps: int) -> float:
        """The factor on a grid of so many steps."""
        return self.factor * math.exp(self.per_step * num_steps)

    def __str__(self) -> str:
        at_size = " at this size" if self.dynamic else ""
        at_steps = f" and {TRAINED_STEPS} steps ({self.per_step:+.3g} in its logarithm with each)" if self.per_step else ""
        return f"{self.at(TRAINED_STEPS if self.per_step else 0):.4g}{at_size}{at_steps}" + (
            "" if self.terminal is None else f", ending at sigma {self.terminal:g}"
        )


def shift_of(shift: float | Shift) -> Shift:
    """A plain number is a factor that does not depend on the picture."""
    return shift if isinstance(shift, Shift) else Shift(float(shift))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The timestep shift of SD3: s -> shift s / (1 + (shift - 1) s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(num_steps: int, shift: float | Shift = 1.0, spacing: Literal["diffusers", "plain", "auto"] = "diffusers") -> Tensor:
    """Sampling grid [num_steps + 1], float32, falling from 1 to 0.

    `plain` shifts 1 - k/N. `diffusers` is FlowMatchEulerDiscreteScheduler's: a static shift is applied to 1/1000 .. 1 at construction and again to N
    equally spaced points between its ends, so that the last non-zero sigma hardly depends on N (0.0089 for shift 3); a dynamic one to the points alone.
    `auto` is what the shift says of its model.
    Raises ValueError on bad arguments.
    """
    law = shift_of(shift)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    if not law.factor > 0:
        raise ValueError(f"shift must be positive, not {law.factor}")
    spacing = law.spacing if spacing == "auto" else spacing
    if spacing == "plain":  # in float32 from here on, as diffusers has it: networks take 1000 sigma, where a last bit tells
        grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1].float()
    elif spacing == "diffusers":
        lowest = shift_sigma(torch.tensor(1 / 1000), 1.0 if law.dynamic else law.factor)
        grid = torch.linspace(1, float(lowest), num_steps, dtype=torch.float64)
    else:
        raise ValueError(f"spacing must be 'diffusers', 'plain' or 'auto', not {spacing!r}")
    factor = law.at(num_steps)
    # the numerator is a tensor: torch takes a number times the reciprocal, which is a bit off
    grid = grid.new_tensor(factor) / (factor + (1 / grid - 1)) if law.dynamic else shift_sigma(grid, factor)
    grid[0] = 1  # which float32 may miss by a bit
    if law.terminal is not None and num_steps > 1:  # a single level is 1 and stays there
        grid = 1 - (1 - grid) / ((1 - grid[-1]) / (1 - law.terminal))
    return torch.cat([grid, grid.new_zeros(1)]).float()


def training_table(shift: float | Shift) -> Tensor:
    """The 1000 sigmas that SD3 is trained on, float32 and falling: i/1000 shifted once, where the sampling grid `diffusers` is shifted twice."""
    return shift_sigma(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000, shift_of(shift).at(TRAINED_STEPS)).float()


def training_sigma(t: Tensor, shift: float | Shift) -> Tensor:
    """Entry floor((1 - t) 1000) of the training table for t [B] in [0, 1], float32; t = 0 takes the last one, which is above 0."""
    index = ((1 - t.double()) * 1000).floor().clamp(0, 999).long()
    return training_table(shift).to(t.device)[index]


def interpolate(z0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """z_sigma = (1 - sigma) z0 + sigma noise, eq. (1); all [B, ...], sigma a float or [B]."""
    sigma = _like(sigma, z0)
    return (1 - sigma) * z0 + sigma * noise


def posterior_mean(z: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """E[z0 | z] = z - sigma v (Tweedie)."""
    return z - _like(sigma, z) * v


def score(z: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """grad log p_sigma(z) = -(z + (1 - sigma) v) / sigma, in float32 or float64; sigma > 0."""
    sigma = _like(sigma, z)
    return -(wide(z) + (1 - sigma) * wide(v)) / sigma


def bridge(z_tau: Tensor, tau: float | Tensor, sigma: float | Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The noising bridge anchored at z_tau and its velocity target, eqs. (74)-(77); tau < sigma, floats or [B].

    z_sigma = a z_tau + s noise with a = (1 - sigma) / (1 - tau), s^2 = sigma^2 - a^2 tau^2, and the target is the time derivative of that line.
    Its mean given z_sigma is the marginal velocity; its variance grows without bound as sigma -> tau. tau = 0 is the plain path.
    """
    tau, sigma = _like(tau, z_tau), _like(sigma, z_tau)
    if not bool((sigma > tau).all()):
        raise ValueError("the bridge runs from tau up to sigma: every sigma must exceed its tau")
    a = (1 - sigma) / (1 - tau)
    s = ((sigma - a * tau) * (sigma + a * tau)).sqrt()
    ds = (sigma + a * tau**2 / (1 - tau)) / s
    return a * z_tau + s * noise, -z_tau / (1 - tau) + ds * noise


def bridge_variance(tau: float | Tensor, sigma: float | Tensor) -> Tensor:
    """How far the bridge's target scatters about the plain path's: its variance per coordinate given z0 and z_sigma, ((a' tau s - s' a tau) / sigma)^2.

    0 at tau = 0, without bound as sigma -> tau. tau < sigma, floats or [B]; in the notation of `bridge`.
    """
    both = torch.as_tensor(tau * sigma)
    tau, sigma = _like(tau, both), _like(sigma, both)
    a = (1 - sigma) / (1 - tau)
    s = ((sigma - a * tau) * (sigma + a * tau)).sqrt()
    ds = (sigma + a * tau**2 / (1 - tau)) / s
    return ((tau * s / (1 - tau) + ds * a * tau) / sigma).square()


def draw_above(grid: Tensor, tau: float, seeds: Tensor, count: int, *, stream: int) -> Tensor:
    """Levels [B, count] of a grid that lie above tau: each of the noise seeds [B] has its own draw without replacement, another one in another `stream`."""
    above = grid[grid > tau + 1e-6]
    generators = (torch.Generator().manual_seed((seed * 7919 + stream) % 2**63) for seed in seeds.tolist())
    return above[torch.stack([torch.randperm(len(above), generator=g)[:count] for g in generators])]
