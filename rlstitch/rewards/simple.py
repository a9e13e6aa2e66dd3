"""Rewards that are a line of arithmetic on the pixels: cheap, differentiable, and good for showing how rewards pull against each other."""

from __future__ import annotations

from torch import Tensor

from rlstitch.types import Batch


class Darkness:
    """1 - mean brightness, in [0, 1] whatever the prompt: 1 is black. Alone it makes every picture black, so it pulls against rewards that read the picture."""

    differentiable = True

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        return 1 - images.mean((1, 2, 3))
