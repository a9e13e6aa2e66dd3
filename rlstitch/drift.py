"""Over-optimisation made visible: how alike the pictures of a prompt have become, and how far all of them are from those of another evaluation, by a reward's image embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rlstitch.files import require
from rlstitch.types import UserError


def embeddings(reward: Any, images: Tensor) -> Tensor:
    """Unit image embeddings [B, D], float32 on the CPU, of pictures [B, 3, H, W]."""
    with torch.no_grad():
        return F.normalize(reward.encode(images.to(reward.device))[0].float(), dim=-1).cpu()


def diversity(found: Tensor, per: int) -> float:
    """1 - cosine, the mean over pairs of pictures of a prompt and over prompts; found [N * per, D], unit rows, the pictures of a prompt in a row."""
    groups = found.double().view(-1, per, found.shape[-1])
    alike = (groups.sum(1).square().sum(-1) - per) / (per * (per - 1))  # the mean cosine of pairs, from the length of the sum
    return float(1 - alike.mean())


def kernel_distance(found: Tensor, other: Tensor) -> float:
    """The kernel distance (KID, arXiv:1801.01401) of as many rows of both: the unbiased squared MMD under (x y / D + 1)^3. 0 in the mean where both are drawn alike."""
    try:
        from torchmetrics.image.kid import poly_mmd
    except ImportError as error:
        raise UserError(
            "the distance from another evaluation's pictures is taken with torchmetrics, which is not installed: pip install 'rlstitch[drift]'"
        ) from error
    n = min(len(found), len(other))
    scale = found.shape[-1] ** 0.5  # unit rows would leave the kernel flat
    return float(poly_mmd(scale * found[:n].double(), scale * other[:n].double()))


def pictures_of(folder: str) -> list[Path]:
    """The pictures of an evaluation, in their order. Raises UserError where it has kept none."""
    root = require(folder, "the other evaluation") / "images"
    files = sorted(root.rglob("*.png")) if root.is_dir() else []
    if len(files) < 2:
        raise UserError(f"{folder} has {len(files)} pictures under images: name an evaluation that was made with layout=flat or geneval")
    return files


def read(reward: Any, files: list[Path], batch_size: int) -> Tensor:
    """Embeddings [N, D] of picture files."""
    out = []
    for first in range(0, len(files), batch_size):
        batch = [np.array(Image.open(file).convert("RGB")) for file in files[first : first + batch_size]]
        out.append(embeddings(reward, torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255))
    return torch.cat(out)
