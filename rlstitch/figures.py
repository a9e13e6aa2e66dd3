"""The figures that runs log and decide by: float32 or wider whatever the forward passes run in, and made of what is known (NaN and infinity are not)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: `function` runs with autocast off, and tensors among its arguments that are narrower than float32 come as float32. Inside autocast a matrix
    product, such as a weighted sum of scores, would be rounded to bf16: steps of 1/128 where scores lie about 1."""

    def wide(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < 4 else x

    @wraps(function)
    def in_full(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as plain:
            for device in {x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}:
                plain.enter_context(torch.autocast(device, enabled=False))
            return function(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})

    return in_full


def known(scores: Tensor) -> Tensor:
    """Scores of any shape with NaN for everything that is no number; no gradient flows through it."""
    return torch.where(torch.isfinite(scores), scores, torch.nan)


@exact
def known_sum(values: Tensor) -> Tensor:
    """Sum and count [2], float64, of the values of any shape that are not NaN: what means over micro-batches and ranks are added up from."""
    there = ~torch.isnan(values)
    return torch.stack([torch.where(there, values.detach().double(), 0.0).sum(), there.sum().double()])


def means_over(gather: Callable[[Tensor], Tensor], sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of figures over all ranks from each one's `known_sum`s; gather: [n, ...] of every rank, put together. NaN where nothing is known."""
    if not sums:
        return {}
    total, count = gather(torch.stack(list(sums.values()))[None]).sum(0).unbind(1)
    return dict(zip(sums, (total / count).tolist()))


@exact
def correlation(a: Tensor, b: Tensor, groups: Tensor | None = None) -> float:
    """Pearson's correlation of a and b [N] where both are known, in float64; groups [N]: within the groups, whose means are removed. NaN where either is constant."""
    a, b = a.double(), b.double()
    there = torch.isfinite(a) & torch.isfinite(b)
    place = torch.zeros_like(a, dtype=torch.long) if groups is None else groups
    place = place[there].unique(return_inverse=True)[1].to(a.device)
    centred = []
    for x in (a[there], b[there]):
        count = torch.bincount(place).double()
        apart = x - (torch.zeros_like(count).index_add_(0, place, x) / count)[place]
        if not len(x) or float(apart.abs().max()) <= 1e-12 * float(x.abs().max()):
            return float("nan")
        centred.append(apart)
    one, two = centred
    return float((one * two).sum() / (one.square().sum() * two.square().sum()).sqrt())


def plain(value: Any) -> Any:
    """A nest of mappings and lists as strict JSON has it: numbers that are none become None."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value


def sendable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a prompt file as strict JSON has it: what JSON does not know (a date of a parquet file) as text."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): one(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [one(v) for v in value]
        return value if value is None or isinstance(value, str | int | float) else str(value)

    return plain(one(row))
