"""The stitch itself: from a denoiser's map of patches to the tokens that a reward's block takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

View = tuple[float, float, float, float]  # top, left, bottom, right, as shares of the sides
WHOLE: View = (0.0, 0.0, 1.0, 1.0)


class StitchLayer(nn.Module):
    """h -> y = Up(F(h)), y + G(y): F a 1x1 convolution set to the closed-form map, Up bilinear to the reward's grid, G a residual that starts at zero. view: what the
    reward sees of a picture, see `resample`."""

    def __init__(self, weight: Tensor, bias: Tensor, grid: int, view: View = WHOLE):
        super().__init__()
        out_channels, in_channels = weight.shape
        self.grid, self.view = grid, view
        self.linear = nn.Conv2d(in_channels, out_channels, 1)
        with torch.no_grad():
            self.linear.weight.copy_(weight.view(out_channels, in_channels, 1, 1))
            self.linear.bias.copy_(bias)
        hidden = max(1, out_channels // 8)
        self.residual = nn.Sequential(nn.SiLU(), nn.Conv2d(out_channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, out_channels, 1))
        nn.init.zeros_(self.residual[-1].weight)
        nn.init.zeros_(self.residual[-1].bias)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, W, h, w] -> tokens [B, grid^2, W']."""
        y = resample(self.linear(grid), self.grid, self.view)
        return (y + self.residual(y)).flatten(2).transpose(1, 2)


def resample(grid: Tensor, side: int, view: View = WHOLE) -> Tensor:
    """Bilinear to [B, C, side, side] of what `view` is of the map; nothing where that is the whole, of this size already. Beyond the map's edge stands what is at it."""
    if view == WHOLE:
        return grid if grid.shape[-2:] == (side, side) else F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    places = (torch.arange(side, device=grid.device, dtype=grid.dtype) + 0.5) / side
    y, x = (2 * (low + (high - low) * places) - 1 for low, high in (view[::2], view[1::2]))
    where = torch.stack([x.expand(side, side), y[:, None].expand(side, side)], -1)
    return F.grid_sample(grid, where.expand(len(grid), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False)


def view_of(reward: Any, size: tuple[int, int]) -> View:
    """What a reward sees of pictures of this height and width."""
    return reward.view(*size) if hasattr(reward, "view") else WHOLE
