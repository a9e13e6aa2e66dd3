"""What particle methods share: resampling schemes, effective sample size, potentials as log-weights. Rows of a group lie side by side: [G, N]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlstitch.sampling import Kernel, drawn

Scheme = Literal["multinomial", "systematic", "residual"]
Potential = Literal["diff", "max", "add", "rt"]


@dataclass
class Trace:
    """What particle runs did, for reports: effective sample size at every resampling, groups that fell back to uniform weights, value queries, lambda as used.

    spread: standard deviation of the value within a prompt, the unit of `lam_unit: spread`. One trace given to many calls keeps it, so that all have one lambda.
    """

    ess: list[float] = field(default_factory=list)
    fallbacks: int = 0
    queries: int = 0
    lam: float | None = None
    spread: float | None = None

    def in_spreads(self, lam: float) -> float | None:
        """lam spreads in absolute units, None while no spread is known; lam itself where all values are alike or unknown."""
        if self.spread is None:
            return None
        return lam / self.spread if self.spread > 0 else lam


def normalised(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over each row of [G, N] -> (weights, bad [G]). NaN counts as weight zero; a row without any weight becomes uniform and is marked bad."""
    clean = torch.where(torch.isnan(log_weights), -torch.inf, log_weights.double())
    top = clean.amax(1, keepdim=True)
    bad = ~torch.isfinite(top[:, 0])
    shifted = torch.where(torch.isposinf(clean), 0.0, clean - torch.where(torch.isfinite(top), top, 0.0))
    weights = torch.where(torch.isposinf(top), torch.isposinf(clean).double(), shifted.exp())
    weights = torch.where(torch.isneginf(top), 1.0, weights)
    return weights / weights.sum(1, keepdim=True), bad


def effective_size(weights: Tensor) -> Tensor:
    """1 / sum w^2 of normalised weights [G, N] -> [G], between 1 and N."""
    return 1 / weights.square().sum(1)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator else like.device
    draw = lambda own, _, rows: torch.rand(rows, *shape[1:], generator=own, device=device, dtype=torch.float64)  # noqa: E731
    return drawn(draw, shape[0], generator).to(like.device)


def resample(weights: Tensor, scheme: Scheme = "systematic", generator: torch.Generator | None = None) -> Tensor:
    """Ancestor indices [G, N] by normalised weights [G, N]. Every scheme is unbiased: particle i has N w_i children on average.

    `multinomial`: N independent draws; `residual`: floor(N w) children for certain, the rest drawn; `systematic`: one draw, evenly spaced (least variance).
    """
    groups, n = weights.shape
    if scheme == "multinomial":
        points = _uniform((groups, n), weights, generator)
    elif scheme == "systematic":
        points = (torch.arange(n, device=weights.device, dtype=torch.float64) + _uniform((groups, 1), weights, generator)) / n
    elif scheme == "residual":
        return drawn(lambda own, first, rows: _residual(weights[first : first + rows], own), groups, generator)
    else:
        raise ValueError(f"resampling must be multinomial, systematic or residual, not {scheme!r}")
    return torch.searchsorted(weights.double().cumsum(1).clamp(max=1.0).contiguous(), points.contiguous(), right=True).clamp(max=n - 1)


def _residual(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    groups, n = weights.shape
    counts = (n * weights.double() + 1e-9).floor().long()
    rest = (n * weights.double() - counts).clamp(min=0)
    rows = []
    for g in range(groups):
        sure = torch.repeat_interleave(torch.arange(n, device=weights.device), counts[g])
        if (missing := n - len(sure)) > 0:
            share = (rest[g] / rest[g].sum())[None].expand(missing, n).cumsum(1).clamp(max=1.0).contiguous()
            sure = torch.cat(
                [sure, torch.searchsorted(share, _uniform((missing, 1), weights, generator), right=True)[:, 0].clamp(max=n - 1)]
            )
        rows.append(sure)
    return torch.stack(rows)


def is_deterministic(kernel: Kernel, z: Tensor, sigma: float, sigma_next: float) -> bool:
    """Whether two draws of a step from one state are the same: copies of a particle would then stay identical for ever."""
    state, generator = z[:1].detach(), torch.Generator().manual_seed(0)
    first, second = (kernel(state, torch.zeros_like(state), sigma, sigma_next, generator=generator) for _ in range(2))
    return bool((first == second).all())


class Potentials:
    """FK's incremental weights (FK steering, Algorithm 1 and its released code) as log-weights [G, N], kept per lineage.

    diff: lambda (V_new - V_old), V_old = 0 at first; max: lambda max V so far; add: lambda sum of V so far; rt: lambda V. At the last step all of
    them give lambda V(z0) minus what the lineage was weighted with before, so that the product is exp(lambda V(z0)) and the target law is the same.
    """

    def __init__(self, kind: Potential, lam: float, groups: int, particles: int):
        if kind not in ("diff", "max", "add", "rt"):
            raise ValueError(f"potential must be diff, max, add or rt, not {kind!r}")
        self.kind, self.lam = kind, lam
        self.spent = torch.zeros(groups, particles, dtype=torch.float64)
        self.memory = torch.full((groups, particles), -torch.inf if kind == "max" else 0.0, dtype=torch.float64)

    def step(self, values: Tensor, *, last: bool) -> Tensor:
        """Log-weights of this step for values [G, N]; the lineage remembers them."""
        values = values.double().cpu()
        if self.kind == "max":
            self.memory = torch.fmax(self.memory, values)
        elif self.kind == "add":
            self.memory = self.memory + values.nan_to_num(0.0)
        else:
            self.memory = values
        if last or self.kind == "diff":
            log_weights = self.lam * values - self.spent
        else:
            log_weights = self.lam * self.memory
        log_weights = torch.where(torch.isnan(values), torch.nan, log_weights)
        self.spent = self.spent + log_weights.nan_to_num(0.0)
        return log_weights

    def select(self, ancestors: Tensor) -> None:
        """Follow the surviving lineages, [G, N] indices within each group."""
        self.spent, self.memory = self.spent.gather(1, ancestors.cpu()), self.memory.gather(1, ancestors.cpu())
