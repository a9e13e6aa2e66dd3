"""A rule-based detector: reads a picture of the `shapes` world back into objects and scores it like GenEval.

1. A pixel is foreground where it is colourful; its hue decides among the six colours.
2. Connected regions of one colour are objects (all pictures at once).
3. A region's mask, brought to a common size by its area, is compared by intersection over union with every shape at several angles.

Nothing is learned, so no finetuned generator can fool it except by drawing the thing that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch.shapes.prompts import KINDS, FactTable, Prompt, PromptTable, fractions, met
from rlstitch.shapes.scenes import COLOURS, HUES, SHAPES, SIZE, coverage

MIN_CHROMA = 0.28  # of a foreground pixel; backgrounds of the world stay below 0.12
MIN_AREA = 36  # pixels at 64 x 64; the smallest object drawn covers about 70
MIN_IOU = 0.72  # below it a region is an object of unknown shape
MAX_REGIONS = 8
_GRID = 28  # side of the common frame that masks are compared in
_AREA = 0.30  # share of the frame that a mask fills after scaling
_ANGLES = torch.linspace(-0.30, 0.30, 7)


@dataclass
class Detections:
    """Up to eight regions of each of N pictures. `shape` and `colour` [N, 8] are -1 where unknown, and both are -1 where there is none."""

    shape: Tensor
    colour: Tensor
    centre: Tensor  # [N, 8, 2] pixels
    area: Tensor  # [N, 8] pixels; 0 where there is no region
    iou: Tensor  # [N, 8] with the best shape
    dark: Tensor  # [N]

    def facts(self) -> FactTable:
        return FactTable.from_objects(self.shape, self.colour, self.centre, self.dark)


@lru_cache(maxsize=1)
def _templates() -> Tensor:
    """Masks [6 x 7, grid^2] of every shape and angle, centred on their centre of mass and scaled to one area."""
    out = []
    for shape in range(len(SHAPES)):
        count = len(_ANGLES)
        index, middle = torch.full((count,), shape), torch.full((count, 2), SIZE / 2)
        mask = coverage(index, middle, torch.full((count,), 20.0), _ANGLES)
        out.append(_to_frame(mask))
    return torch.cat(out).flatten(1)


def _to_frame(mask: Tensor) -> Tensor:
    """Resample masks [M, H, W] so that centre of mass and area are the same for all -> [M, grid, grid]."""
    m, h, w = mask.shape
    y, x = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    area = mask.sum((1, 2)).clamp(min=1)
    cx, cy = (mask.sum(1) * x).sum(1) / area, (mask.sum(2) * y).sum(1) / area
    side = (area / _AREA).sqrt()  # of the window, pixels
    steps = (torch.arange(_GRID) + 0.5) / _GRID - 0.5
    gx = (cx[:, None] + steps * side[:, None]) / w * 2 - 1
    gy = (cy[:, None] + steps * side[:, None]) / h * 2 - 1
    grid = torch.stack([gx[:, None, :].expand(m, _GRID, _GRID), gy[:, :, None].expand(m, _GRID, _GRID)], -1)
    return F.grid_sample(mask[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def _hue(images: Tensor) -> tuple[Tensor, Tensor]:
    """Chroma [N, H, W] and hue in degrees [N, H, W]."""
    high, arg = images.max(1)
    chroma = high - images.amin(1)
    r, g, b = images.unbind(1)
    safe = chroma.clamp(min=1e-6)
    sector = torch.stack([((g - b) / safe) % 6, (b - r) / safe + 2, (r - g) / safe + 4])
    return chroma, 60 * sector.gather(0, arg[None])[0]


def _runs(kind: Tensor) -> Tensor:
    """Number the runs of equal values along the last axis of [N, H, W]; different rows and pictures never share a run."""
    starts = torch.ones_like(kind, dtype=torch.bool)
    starts[..., 1:] = kind[..., 1:] != kind[..., :-1]
    return starts.flatten().cumsum(0) - 1


def _label(kind: Tensor) -> Tensor:
    """Connected regions (4 neighbours) of equal values in maps [N, H, W]; -> [N, H, W] one number a region, none shared between pictures.

    Every pixel starts with its own number; the largest spreads along whole runs of a row, then of a column, until nothing changes.
    """
    rows, columns = _runs(kind), _runs(kind.transpose(1, 2))
    ids = torch.arange(kind.numel()).view(kind.shape)
    while True:
        spread = ids.flatten()
        spread = torch.zeros(int(rows[-1]) + 1, dtype=torch.long).scatter_reduce_(0, rows, spread, "amax", include_self=False)[rows]
        spread = spread.view(kind.shape).transpose(1, 2).flatten()
        spread = torch.zeros(int(columns[-1]) + 1, dtype=torch.long).scatter_reduce_(0, columns, spread, "amax", include_self=False)[
            columns
        ]
        spread = spread.view(kind.shape[0], kind.shape[2], kind.shape[1]).transpose(1, 2).contiguous()
        if torch.equal(spread, ids):
            return ids
        ids = spread


@torch.no_grad()
def detect(images: Tensor) -> Detections:
    """Objects in images [N, 3, 64, 64] in [0, 1]. Raises ValueError for another size."""
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"the detector reads [N, 3, {SIZE}, {SIZE}] pictures, not {list(images.shape)}: resize them first")
    images = images.detach().float().cpu().clamp(0, 1)
    n = len(images)
    chroma, hue = _hue(images)
    foreground = chroma > MIN_CHROMA
    difference = (hue[:, None] - torch.tensor(HUES).view(1, -1, 1, 1) + 180) % 360 - 180
    nearest = difference.abs().argmin(1)
    votes = F.one_hot(nearest, len(COLOURS)).permute(0, 3, 1, 2) * foreground[:, None]
    # Edge pixels drift between neighbouring hues: a pixel joins the majority colour around it.
    kind = F.avg_pool2d(votes.float(), 5, stride=1, padding=2).argmax(1).where(foreground, torch.tensor(-1))

    shape, colour = torch.full((n, MAX_REGIONS), -1), torch.full((n, MAX_REGIONS), -1)
    centre, area, best = torch.zeros(n, MAX_REGIONS, 2), torch.zeros(n, MAX_REGIONS), torch.zeros(n, MAX_REGIONS)
    dark = images.mean(1).flatten(1).median(1).values < 0.5
    labels = _label(kind)
    keys, counts = torch.unique(labels[foreground], return_counts=True)
    keys, counts = keys[counts >= MIN_AREA], counts[counts >= MIN_AREA]
    if not len(keys):
        return Detections(shape, colour, centre, area, best, dark)
    picture = keys // (SIZE * SIZE)
    regions = (labels[picture] == keys[:, None, None]).float()
    framed = _to_frame(regions).flatten(1)
    templates = _templates()
    overlap = framed @ templates.T
    iou = overlap / (framed.sum(1)[:, None] + templates.sum(1)[None] - overlap)
    score, which = iou.view(len(keys), len(SHAPES), -1).amax(2).max(1)
    grid = torch.arange(SIZE) + 0.5
    cx, cy = (regions.sum(1) * grid).sum(1) / counts, (regions.sum(2) * grid).sum(1) / counts
    colours = kind.flatten()[keys]
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[torch.argsort(picture[order], stable=True)]
    _, sizes = torch.unique_consecutive(picture[order], return_counts=True)
    slot = torch.cat([torch.arange(s) for s in sizes.tolist()])
    keep = slot < MAX_REGIONS
    i, k, o = picture[order][keep], slot[keep], order[keep]
    shape[i, k] = torch.where(score >= MIN_IOU, which, torch.tensor(-1))[o]
    colour[i, k] = colours[o]
    centre[i, k] = torch.stack([cx, cy], -1)[o]
    area[i, k] = counts[o].float()
    best[i, k] = score[o]
    return Detections(shape, colour, centre, area, best, dark)


def correct(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """Whether picture i shows what prompt i asks for; images [N, 3, 64, 64] in [0, 1] -> bool [N]."""
    return met(detect(images).facts(), PromptTable.from_prompts(prompts))


def soft_scores(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """Share of each prompt's requirements that its picture shows, the black-box reward -> [N] in [0, 1]."""
    return fractions(detect(images).facts(), PromptTable.from_prompts(prompts))


def summary(right: Tensor, prompts: list[Prompt]) -> dict[str, float]:
    """Accuracy of each of the six classes and `overall`, the mean of the classes (GenEval's score). Classes without prompts are left out."""
    out = {}
    for kind in KINDS:
        rows = [bool(r) for r, p in zip(right.tolist(), prompts) if p.kind == kind]
        if rows:
            out[kind] = sum(rows) / len(rows)
    out["overall"] = sum(out.values()) / len(out)
    return out
