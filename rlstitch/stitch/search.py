"""Where to cut: closed-form stitches between every block of the denoiser and every early block of the reward (arXiv:2605.19804).

One streaming pass over the pictures gathers the float64 Gram matrices of all pairs; one factorisation per denoiser block then solves every reward block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlstitch import schedule
from rlstitch.distributed import mean_over_ranks
from rlstitch.stitch.layer import WHOLE, StitchLayer, View, resample, view_of
from rlstitch.types import Conditioning, UserError


@dataclass
class Pair:
    """One candidate: the denoiser after block i, the reward entered at block j. `normalised` is loss over the variance of the target."""

    i: int
    j: int
    loss: float
    normalised: float
    weight: Tensor = field(repr=False)  # [W', W]
    bias: Tensor = field(repr=False)  # [W']


@dataclass
class SearchResult:
    """`table` of all pairs (i, j, loss, normalised loss, weight, bias), `best` by the normalised loss; `cls` [j] mean [CLS] state entering block j, None where none does (j = 1, and towers without)."""

    table: list[Pair]
    num_blocks: int
    cls: dict[int, Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def best(self) -> Pair:
        return min(self.table, key=lambda pair: pair.normalised)

    def cheapest(self, *, margin: float = 0.05, max_fraction: float = 0.5) -> Pair:
        """The smallest i (then the best j) whose normalised loss is within `margin` (relative) of the best among i <= max_fraction of the blocks."""
        allowed = [pair for pair in self.table if pair.i <= max(1, int(max_fraction * self.num_blocks))]
        limit = (1 + margin) * min(pair.normalised for pair in allowed)
        return min((pair for pair in allowed if pair.normalised <= limit), key=lambda pair: (pair.i, pair.normalised))

    def rows(self) -> list[dict[str, float]]:
        return [{"i": p.i, "j": p.j, "loss": p.loss, "normalised": p.normalised} for p in self.table]


def drawn(backbone: Any, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a batch of the search is looked at with: sigma [count] ~ U[0, 1] and noise [count, *latent_shape]."""
    return torch.rand(count, generator=generator), torch.randn(count, *backbone.latent_shape, generator=generator)


@torch.no_grad()
def features(
    backbone: Any, reward: Any, images: Tensor, max_reward_block: int, sigma: Tensor, noise: Tensor, text: Conditioning | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """One batch's denoiser features after every block and reward inputs of every early block, float64 [B N', W] on the reward's grid, and [CLS] states where there are."""
    z0 = backbone.encode(images.to(backbone.device))
    sigma, noise = sigma.to(z0.device), noise.to(z0.device)
    denoiser, view = [], view_of(reward, backbone.size)
    backbone.walk(
        schedule.interpolate(z0, noise, sigma),
        sigma,
        lambda state: denoiser.append(resample(state.grid.double(), reward.grid, view).flatten(2).transpose(1, 2).flatten(0, 1)),
        **({} if text is None else {"text": text}),
    )
    if len(denoiser) != backbone.num_blocks:
        raise UserError(f"{backbone.path}: its walk showed {len(denoiser)} blocks, and it says that it has {backbone.num_blocks}")
    inputs, patches = reward.inputs_of_block(images.to(backbone.device), max_reward_block), reward.grid**2
    targets = [x[:, -patches:].double().flatten(0, 1) for x in inputs]
    return denoiser, targets, [x[:, 0].double() if x.shape[1] > patches else None for x in inputs]


def solve(gram: Tensor, cross: Tensor, ridge: float = 0.0) -> Tensor:
    """gram^-1 cross for a positive semi-definite Gram matrix [W, W], scaled to unit diagonal first; pseudo-inverse where it is singular.

    ridge: what is added to the unit diagonal, i.e. the penalty ridge * |w_k|^2 gram_kk on the weights of every input channel k.
    """
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    scaled = gram * scale[:, None] * scale[None]
    scaled.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(scaled)
    if int(info) == 0:
        return scale[:, None] * torch.cholesky_solve(scale[:, None] * cross, factor)
    values, vectors = torch.linalg.eigh(scaled)
    keep = values > values[-1] * len(values) * torch.finfo(gram.dtype).eps
    inverse = torch.where(keep, 1 / values.where(keep, torch.ones_like(values)), torch.zeros_like(values))
    return scale[:, None] * (vectors * inverse) @ (vectors.T @ (scale[:, None] * cross))


@torch.no_grad()
def fit(grid: Tensor, tokens: Tensor, side: int, ridge: float = 0.0, view: View = WHOLE) -> StitchLayer:
    """The stitch of one pair whose features are at hand: maps [B, W, h, w] brought to side x side, onto the reward's tokens [B, side^2, W'], float64."""
    f = resample(grid.double(), side, view).flatten(2).transpose(1, 2).flatten(0, 1)
    g = tokens.double().flatten(0, 1)
    f_mean, g_mean = f.mean(0), g.mean(0)
    weight = solve((f - f_mean).T @ (f - f_mean), (f - f_mean).T @ (g - g_mean), ridge).T
    return StitchLayer(weight.float(), (g_mean - weight @ f_mean).float(), side, view).to(grid.device)


@torch.no_grad()
def search(
    backbone: Any,
    reward: Any,
    images: Tensor,
    *,
    max_reward_block: int = 4,
    batch_size: int = 25,
    seed: int = 0,
    ridge: float = 0.0,
    text_of: Callable[[Tensor], Conditioning] | None = None,
    rank: int = 0,
    world: int = 1,
) -> SearchResult:
    """Fit W_ij = argmin |W F_i + b - G_j|^2 (plus `ridge`, see `solve`) for all blocks i and j <= max_reward_block over images [N, 3, H, W] in [0, 1], one sigma ~ U[0, 1] each.

    Losses are means over tokens of the squared error summed over channels. text_of: gives the text of rows [B] that the denoiser is run under (None: the null text).
    rank, world: each rank takes every world-th batch, and the sums are added up. Raises ValueError where j exceeds the reward's blocks.
    """
    if not 1 <= max_reward_block <= reward.num_blocks:
        raise ValueError(f"max_reward_block must be within 1..{reward.num_blocks}, not {max_reward_block}")
    generator = torch.Generator().manual_seed(seed)
    offsets: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        sigma, noise = drawn(backbone, len(part), generator)
        own = start // batch_size % world == rank
        if start and not own:
            continue
        text = None if text_of is None else text_of(torch.arange(start, start + len(part)))
        denoiser, targets, states = features(backbone, reward, part, max_reward_block, sigma, noise, text)
        widths = [g.shape[1] for g in targets]
        if not start:  # of every rank: shifting by the first batch's means keeps the later subtraction of means exact
            offsets = mean_over_ranks([x.mean(0) for x in (*denoiser, *targets)], world)
            f_offsets, g_offsets = offsets[: len(denoiser)], offsets[len(denoiser) :]
            count = torch.zeros((), dtype=torch.float64, device=denoiser[0].device)
            sums = {
                "f": [torch.zeros_like(o) for o in f_offsets],
                "g": [torch.zeros_like(o) for o in g_offsets],
                "ff": [torch.zeros(len(o), len(o), dtype=o.dtype, device=o.device) for o in f_offsets],
                "fg": [torch.zeros(len(o), sum(widths), dtype=o.dtype, device=o.device) for o in f_offsets],
                "gg": [torch.zeros_like(o) for o in g_offsets],
                "cls": [torch.zeros_like(g_offsets[0]) if s is None else torch.zeros_like(s[0]) for s in states],
            }
            has_cls = [s is not None for s in states]
            if not own:
                continue
        count += len(targets[0])
        targets = [g - o for g, o in zip(targets, g_offsets)]
        for j, (g, s) in enumerate(zip(targets, states)):
            sums["g"][j] += g.sum(0)
            sums["gg"][j] += g.square().sum(0)
            if s is not None:
                sums["cls"][j] += s.sum(0)
        every = torch.cat(targets, 1)
        for i, f in enumerate(denoiser):
            f = f - f_offsets[i]
            sums["f"][i] += f.sum(0)
            sums["ff"][i] += f.T @ f
            sums["fg"][i] += f.T @ every
    count, sums = _added_up(count, sums, world)
    table = []
    for i in range(backbone.num_blocks):
        f_mean = sums["f"][i] / count
        gram = sums["ff"][i] - count * torch.outer(f_mean, f_mean)
        g_means = [g / count for g in sums["g"]]
        crosses = [fg - count * torch.outer(f_mean, g) for fg, g in zip(sums["fg"][i].split(widths, 1), g_means)]
        solutions = solve(gram, torch.cat(crosses, 1), ridge).split([c.shape[1] for c in crosses], 1)
        for j, (cross, w, g_mean) in enumerate(zip(crosses, solutions, g_means)):
            variance = sums["gg"][j].sum() - count * g_mean.square().sum()
            if not variance > 0:
                raise UserError(
                    "the pictures of the search are all alike, so that there is nothing to fit: give others, or more of them (search_images)"
                )
            loss = float(variance - 2 * (w * cross).sum() + (w * (gram @ w)).sum()) / count
            bias = g_mean + g_offsets[j] - w.T @ (f_mean + f_offsets[i])
            table.append(Pair(i + 1, j + 1, loss, loss / (float(variance) / count), w.T.contiguous(), bias))
    means = {j: s / len(images) if has else None for j, (s, has) in enumerate(zip(sums["cls"], has_cls), 1)}
    return SearchResult(table, backbone.num_blocks, means)


def _added_up(count: Tensor, sums: dict[str, list[Tensor]], world: int) -> tuple[int, dict[str, list[Tensor]]]:
    """Tokens and sums of all ranks, in one all-reduce."""
    flat = mean_over_ranks([count, *(t for listed in sums.values() for t in listed)], world)
    total, rest = round(float(flat[0]) * world), iter(flat[1:])
    return total, {name: [next(rest) * world for _ in listed] for name, listed in sums.items()}
