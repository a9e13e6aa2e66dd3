"""Pure losses on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def output_regulariser(v: Tensor, v_reference: Tensor) -> Tensor:
    """Mean squared difference between the finetuned and the frozen velocity on the sampled states (DRaFT+'s form, as arXiv:2605.19804 has it): [B, ...] -> [B]."""
    return (v.float() - v_reference.float()).square().flatten(1).mean(1)


def flow_matching(v: Tensor, z0: Tensor, noise: Tensor) -> Tensor:
    """Conditional flow-matching error |v - (noise - z0)|^2, mean over all but the batch: [B, ...] -> [B]."""
    return (v.float() - (noise - z0).float()).square().flatten(1).mean(1)


def nft(v: Tensor, v_old: Tensor, target: Tensor, weight: Tensor, beta: float, sigma: Tensor, *, adaptive: bool = True) -> Tensor:
    """DiffusionNFT's loss (arXiv:2605.19804, eqs. 65-71): [B, ...] velocities and `weight` w [B] in [0, 1] -> [B].

    w L(v+) + (1 - w) L(v-), over beta, with v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v. adaptive: L = sigma mean(e^2) / max(mean|e|,
    1e-5 / sigma) for e = v+- - target, the denominator without gradient: the released loss on x0, written in e so that it holds for the bridge, too, whose
    target's variance has no bound near the stop. Otherwise L = mean(e^2), whose minimiser in v is v_old + ((2 w - 1) / beta)(target - v_old).
    """

    def error(mixed: Tensor) -> Tensor:
        e = (mixed.float() - target.float()).flatten(1)
        if not adaptive:
            return e.square().mean(1)
        size = e.detach().double().abs().mean(1)
        floor = 1e-5 / sigma.double().clamp(min=1e-8)
        return sigma * e.square().mean(1) / size.maximum(floor).float()

    positive, negative = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    return (weight * error(positive) + (1 - weight) * error(negative)) / beta


def dpo(v: Tensor, v_reference: Tensor, target: Tensor, beta: float, weight: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO's loss (arXiv:2311.12908, eq. 14) for velocities, and its implicit margin: all [P, 2, ...], the better of a pair first -> [P], [P].

    -log sigmoid(margin) with margin = -(beta / 2) weight (d_better - d_worse) and d = |v - target|^2 - |v_reference - target|^2, means over all but pair and
    place, as released. Both of a pair share sigma and noise. weight [P] tempers pairs whose targets scatter, see schedule.bridge_variance.
    """

    def error(guess: Tensor) -> Tensor:
        return (guess.float() - target.float()).square().flatten(2).mean(2)

    d = error(v) - error(v_reference)
    margin = -beta / 2 * weight * (d[:, 0] - d[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin


def clipped_surrogate(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip: float, *, guard: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) and the ratio, [B] each. guard: GRPO-Guard's correction, added to the log-ratio."""
    ratio = (log_prob - log_prob_old + (0 if guard is None else guard)).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)), ratio
