"""The world's stated notion of looks, in pixels: saturation, contrast and balance. `aesthetic` and the preference models learn it from noisy labels."""

from __future__ import annotations

import torch
from torch import Tensor


def saturation(images: Tensor) -> Tensor:
    """Mean chroma (max minus min channel) of the most colourful tenth of the pixels; images [B, 3, H, W] in [0, 1] -> [B]."""
    chroma = (images.amax(1) - images.amin(1)).flatten(1)
    return chroma.topk(max(1, chroma.shape[1] // 10), dim=1).values.mean(1)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation over pixels of the distance to the mean colour -> [B]."""
    flat = images.flatten(2)
    return (flat - flat.mean(2, keepdim=True)).square().sum(1).mean(1).sqrt()


def balance(images: Tensor) -> Tensor:
    """1 minus the distance of the centre of colour from the middle, in half widths -> [B]."""
    chroma = (images.amax(1) - images.amin(1)).clamp(min=1e-4)
    h, w = chroma.shape[-2:]
    y = torch.linspace(-1, 1, h, device=images.device)[:, None]
    x = torch.linspace(-1, 1, w, device=images.device)[None, :]
    total = chroma.sum((1, 2))
    return 1 - torch.hypot((chroma * x).sum((1, 2)) / total, (chroma * y).sum((1, 2)) / total).clamp(max=1)


def looks(images: Tensor, weights: tuple[float, float, float] = (0.5, 0.3, 0.2)) -> Tensor:
    """Weighted mean of the three, each on a scale of about [0, 1]; `weights` are those of saturation, contrast and balance -> [B]."""
    s, c, b = weights
    return s * saturation(images) + c * (contrast(images) / 0.45).clamp(max=1.2) + b * balance(images)
