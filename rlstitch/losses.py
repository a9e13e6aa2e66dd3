"""Pure losses on tensors."""

from __future__ import annotations

from torch import Tensor


def output_regulariser(v: Tensor, v_reference: Tensor) -> Tensor:
    """Mean squared difference between the finetuned and the frozen velocity on the sampled states (DRaFT+'s form, method.md 3): [B, ...] -> [B]."""
    return (v.float() - v_reference.float()).square().flatten(1).mean(1)


def flow_matching(v: Tensor, z0: Tensor, noise: Tensor) -> Tensor:
    """Conditional flow-matching error |v - (noise - z0)|^2, mean over all but the batch: [B, ...] -> [B]."""
    return (v.float() - (noise - z0).float()).square().flatten(1).mean(1)
