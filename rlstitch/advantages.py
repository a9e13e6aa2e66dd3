"""Group statistics: how good a sample is among the samples of its own prompt. NaN means that a reward does not apply, or failed, and is masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rlstitch.types import Oracle


def group_normalise(scores: Tensor, group_ids: Tensor, *, spread: Literal["global", "group"] = "global", epsilon: float = 1e-4) -> Tensor:
    """(scores - mean of the group) / (spread + epsilon), each reward by itself: [B, K] and [B] -> [B, K], NaN where the score is NaN.

    spread: the population standard deviation of all scores (DiffusionNFT), or of the sample's own group (GRPO). Computed in float64. A group whose
    scores are all alike gets zeros: it says nothing about which sample is better.
    """
    x = scores.double()
    known = ~torch.isnan(x)
    filled = torch.where(known, x, 0.0)
    _, inverse = group_ids.unique(return_inverse=True)
    groups = int(inverse.max()) + 1

    def per_group(values: Tensor) -> Tensor:
        return torch.zeros(groups, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, inverse, values)

    count = per_group(known.double()).clamp(min=1)
    centred = torch.where(known, x - (per_group(filled) / count)[inverse], 0.0)
    if spread == "group":
        deviation = (per_group(centred.square()) / count).sqrt()[inverse]
    elif spread == "global":
        total = known.double().sum(0).clamp(min=1)
        mean = filled.sum(0) / total
        deviation = (torch.where(known, (x - mean).square(), 0.0).sum(0) / total).sqrt().expand_as(x)
    else:
        raise ValueError(f"spread must be 'global' or 'group', not {spread!r}")
    return torch.where(known, centred / (deviation + epsilon), torch.nan).to(scores.dtype)


def combine(advantages: Tensor, weights: Sequence[float]) -> Tensor:
    """Advantages of each reward by itself [B, K] -> of the sample [B]: sum_k w_k A_k / sum_k |w_k|, both over the known ones; NaN where none is known.

    A weight counts here for a reward's share alone, not for its scale; a negative one turns its reward round.
    """
    known = ~torch.isnan(advantages)
    w = torch.tensor(list(weights), dtype=torch.float64, device=advantages.device)
    share = (known * w.abs()).sum(1)
    mixed = (torch.where(known, advantages.double(), 0.0) * w).sum(1) / share
    return torch.where(share > 0, mixed, torch.nan).to(advantages.dtype)


def of_samples(
    oracle: Oracle, scores: Tensor, group_ids: Tensor, *, spread: Literal["global", "group"] = "global", per_reward: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """Advantages [B] of all samples of an update from their scores [B, K] and prompts [B], and figures for the log.

    The weighted total is normalised within the groups, NaN where any of its scores is; per_reward: each reward by itself, then `combine`d by the
    oracle's weights, so that neither a reward's scale nor a failure of another one counts.
    """
    total = oracle.total(scores)
    if per_reward:
        advantage = combine(group_normalise(scores, group_ids, spread=spread), oracle.weights)
        reward, compared = oracle.total(scores.nanmean(0, keepdim=True)), advantage
    else:
        advantage = group_normalise(total[:, None], group_ids, spread=spread)[:, 0]
        reward, compared = total.nanmean(), total
    return advantage, {
        "reward": float(reward),
        "dead_groups": dead_groups(compared, group_ids),
        "masked": float(advantage.isnan().float().mean()),
    }


def dead_groups(scores: Tensor, group_ids: Tensor) -> float:
    """Share of groups in which all known scores [B] are the same: they carry no signal."""
    dead = []
    for group in group_ids.unique():
        known = scores[group_ids == group]
        known = known[~torch.isnan(known)]
        dead.append(len(known) < 2 or float(known.max() - known.min()) == 0)
    return sum(dead) / len(dead)
