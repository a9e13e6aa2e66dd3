"""Rewards that are a line of arithmetic on the pixels: cheap, and good for showing how rewards pull against each other."""

from __future__ import annotations

import io

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch.figures import exact
from rlstitch.metrics import to_image
from rlstitch.types import Batch


class Darkness:
    """1 - mean brightness, in [0, 1] whatever the prompt: 1 is black. Alone it makes every picture black, so it pulls against rewards that read the picture."""

    differentiable = True
    reads_prompt = False
    alone = "black pictures"

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        return 1 - images.mean((1, 2, 3))


class JpegSize:
    """Minus the kilobytes (1000 bytes) of the picture as JPEG at quality 95, DDPO's compressibility (arXiv:2305.13301); larger: plus, its incompressibility. No gradient."""

    differentiable = False
    device = torch.device("cpu")
    reads_prompt = False
    alone = "blank pictures (or noise, with larger: true)"

    def __init__(self, *, larger: bool = False):
        self.sign = 1 if larger else -1

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        return torch.tensor([self.sign * self.kilobytes(image) for image in images], device=images.device)

    def kilobytes(self, image: Tensor) -> float:
        buffer = io.BytesIO()
        to_image(image.detach().float()).save(buffer, format="JPEG", quality=95)
        return buffer.tell() / 1000


class Sharpness:
    """Variance of the Laplacian of the brightness (Rec. 601, 0 to 255), the usual measure of focus: some tens for a blurred photograph, hundreds for a sharp one, thousands for
    noise; 0 for an even one. Differentiable."""

    differentiable = True
    reads_prompt = False
    alone = "noise"

    @exact
    def score(self, images: Tensor, batch: Batch) -> Tensor:
        images = images.float()
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
        kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=images.device)
        brightness = 255 * (images * weights[:, None, None]).sum(1, keepdim=True)
        return F.conv2d(brightness, kernel[None, None]).flatten(1).var(1, correction=0)
