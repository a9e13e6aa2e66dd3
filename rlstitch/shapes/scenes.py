"""Scenes of the `shapes` world and their anti-aliased renderer, vectorised over scenes.

A scene holds one to four flat objects on a quiet background. Everything is drawn from signed distances in pixel units, so that an edge
is covered by `clamp(1/2 - distance, 0, 1)` and gradients of grey along it keep the hue of the object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
HUES = (0.0, 28.0, 54.0, 125.0, 222.0, 285.0)  # degrees
RELATIONS = ("left of", "right of", "above", "below")
SIZE, MAX_OBJECTS = 64, 4
RADII = {1: (10.0, 17.0), 2: (9.0, 14.0), 3: (8.0, 12.0), 4: (7.5, 10.5)}  # pixels, by the number of objects
_GAP, _MARGIN = 2.5, 2.0


@dataclass
class Scenes:
    """N scenes. `shape`, `colour` [N, 4] hold indices, -1 where there is no object; positions and radii are in pixels."""

    shape: Tensor
    colour: Tensor
    centre: Tensor  # [N, 4, 2] as (x, y), y grows downwards
    radius: Tensor  # [N, 4]
    angle: Tensor  # [N, 4] radians
    rgb: Tensor  # [N, 4, 3]
    background: Tensor  # [N, 2, 3] top and bottom colour of a vertical gradient
    dark: Tensor  # [N] bool

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index) -> Scenes:
        return Scenes(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    @property
    def count(self) -> Tensor:
        return (self.shape >= 0).sum(1)


def _uniform(shape, low, high, generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _hsv(hue_degrees: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV to RGB; all inputs [...], output [..., 3]."""
    offset = torch.tensor([5.0, 3.0, 1.0])
    k = (offset + (hue_degrees / 60.0)[..., None]) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


def place(count: Tensor, generator: torch.Generator, *, relation: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centres [N, 4, 2] and radii [N, 4] without overlap. `relation` [N] (index into RELATIONS, -1 for none) binds objects 0 and 1."""
    n = len(count)
    low = torch.tensor([0.0] + [RADII[k][0] for k in range(1, 5)])[count]
    high = torch.tensor([0.0] + [RADII[k][1] for k in range(1, 5)])[count]
    centre, radius = torch.zeros(n, MAX_OBJECTS, 2), torch.zeros(n, MAX_OBJECTS)
    todo = torch.arange(n)
    present = torch.arange(MAX_OBJECTS) < count[:, None]
    while len(todo):
        r = _uniform((len(todo), MAX_OBJECTS), 0, 1, generator) * (high - low)[todo, None] + low[todo, None]
        c = torch.rand(len(todo), MAX_OBJECTS, 2, generator=generator) * (SIZE - 2 * (r[..., None] + _MARGIN)) + r[..., None] + _MARGIN
        distance = (c[:, :, None] - c[:, None]).norm(dim=-1)
        both = present[todo, :, None] & present[todo, None, :] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
        ok = ((distance > r[:, :, None] + r[:, None] + _GAP) | ~both).flatten(1).all(1)
        if relation is not None:
            held = relation_holds(c[:, 0], c[:, 1])  # [m, 4]
            wanted = relation[todo]
            ok &= (wanted < 0) | held.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        centre[todo[ok]], radius[todo[ok]] = c[ok], r[ok]
        todo = todo[~ok]
    return centre, radius


def relation_holds(first: Tensor, second: Tensor, margin: float = 6.0) -> Tensor:
    """Which of RELATIONS hold between centres [..., 2]: offset beyond `margin` pixels along an axis that is the larger one. -> [..., 4]."""
    dx, dy = (first - second).unbind(-1)
    wide, tall = dx.abs() >= dy.abs(), dy.abs() >= dx.abs()
    return torch.stack([wide & (dx < -margin), wide & (dx > margin), tall & (dy < -margin), tall & (dy > margin)], -1)


def dress(shape: Tensor, colour: Tensor, dark: Tensor, generator: torch.Generator, *, relation: Tensor | None = None) -> Scenes:
    """Give objects of stated shape and colour [N, 4] (-1: none; objects come first) a place, a size, a tint and a background."""
    n, count = len(shape), (shape >= 0).sum(1)
    centre, radius = place(count, generator, relation=relation)
    hue = torch.tensor(HUES)[colour.clamp(min=0)] + _uniform((n, MAX_OBJECTS), -4, 4, generator)
    saturation = _uniform((n, 1), 0.68, 1.0, generator) + _uniform((n, MAX_OBJECTS), -0.04, 0.0, generator)
    value = _uniform((n, MAX_OBJECTS), 0.78, 1.0, generator)
    luminance = torch.where(dark, _uniform((n,), 0.04, 0.24, generator), _uniform((n,), 0.76, 0.97, generator))
    slope = _uniform((n, 1, 1), -0.04, 0.04, generator) * torch.tensor([-1.0, 1.0])[None, :, None]
    tint = _uniform((n, 1, 3), -0.03, 0.03, generator)
    return Scenes(
        shape=shape,
        colour=colour,
        centre=centre,
        radius=radius,
        angle=_uniform((n, MAX_OBJECTS), -0.2, 0.2, generator),
        rgb=_hsv(hue, saturation, value),
        background=(luminance[:, None, None] + slope + tint).clamp(0, 1),
        dark=dark,
    )


def sample_scenes(n: int, generator: torch.Generator, *, counts=(0.2, 0.35, 0.25, 0.2)) -> Scenes:
    """Scenes with objects drawn at random; `counts` are the probabilities of 1 to 4 objects."""
    count = torch.multinomial(torch.tensor(counts), n, replacement=True, generator=generator) + 1
    present = torch.arange(MAX_OBJECTS) < count[:, None]
    shape = torch.randint(len(SHAPES), (n, MAX_OBJECTS), generator=generator).where(present, torch.tensor(-1))
    colour = torch.randint(len(COLOURS), (n, MAX_OBJECTS), generator=generator).where(present, torch.tensor(-1))
    return dress(shape, colour, torch.rand(n, generator=generator) < 0.5, generator)


def signed_distances(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Distances in pixels from points (x, y) in the object's frame to the edge of every shape of radius r; negative inside. -> [6, ...]."""
    rho = torch.sqrt(x * x + y * y + 1e-12)
    ax, ay = x.abs(), y.abs()
    square = torch.maximum(ax, ay) - 0.84 * r
    # An equilateral triangle pointing up, of circumradius 1.12 r, centred a little low so that its box is centred.
    yt = y - 0.16 * r
    triangle = torch.maximum(yt, ax * math.cos(math.pi / 6) - yt * 0.5) - 0.58 * r
    # A five-pointed star: fold the plane to half a sector, then the line from an outer to an inner corner.
    sector = 2 * math.pi / 5
    fold = torch.atan2(x, -y)
    fold = (torch.remainder(fold + sector / 2, sector) - sector / 2).abs()
    outer, inner = 1.14, 0.50
    px, py = rho * torch.sin(fold), rho * torch.cos(fold)
    ix, iy = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
    nx, ny = outer - iy, ix
    norm = math.hypot(nx, ny)
    star = (px * nx + (py - outer * r) * ny) / norm
    bar = 0.34 * r
    cross = torch.minimum(torch.maximum(ax - bar, ay - r), torch.maximum(ax - r, ay - bar))
    ring = (rho - 0.76 * r).abs() - 0.24 * r
    return torch.stack([rho - r, square, triangle, star, cross, ring])


def coverage(shape: Tensor, centre: Tensor, radius: Tensor, angle: Tensor, size: int = SIZE) -> Tensor:
    """Anti-aliased masks [M, size, size] of M objects; shape [M], centre [M, 2], radius [M], angle [M]."""
    grid = torch.arange(size) + 0.5
    dx = grid[None, None, :] - centre[:, 0, None, None]
    dy = grid[None, :, None] - centre[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    distance = signed_distances(cos * dx + sin * dy, cos * dy - sin * dx, radius[:, None, None])
    return (0.5 - distance[shape, torch.arange(len(shape))]).clamp(0, 1)


def render(scenes: Scenes, size: int = SIZE) -> Tensor:
    """Images [N, 3, size, size] in [0, 1]. `size` other than 64 scales the whole scene."""
    n, scale = len(scenes), size / SIZE
    ramp = torch.linspace(0, 1, size)[None, None, :, None]
    top, bottom = scenes.background[:, 0, :, None, None], scenes.background[:, 1, :, None, None]
    image = (top + (bottom - top) * ramp).expand(n, 3, size, size).clone()
    for k in range(MAX_OBJECTS):
        has = scenes.shape[:, k] >= 0
        if has.any():
            mask = coverage(scenes.shape[has, k], scenes.centre[has, k] * scale, scenes.radius[has, k] * scale, scenes.angle[has, k], size)[
                :, None
            ]
            image[has] = image[has] * (1 - mask) + scenes.rgb[has, k, :, None, None] * mask
    return image


def patch_labels(scenes: Scenes, patch: int = 8, least: float = 0.1) -> tuple[Tensor, Tensor]:
    """Shape and colour of the object that covers most of each patch (index + 1; 0 where none covers `least` of it): two [N, (64 / patch)^2]."""
    n, side = len(scenes), SIZE // patch
    share = torch.zeros(n, MAX_OBJECTS, side * side)
    for k in range(MAX_OBJECTS):
        has = scenes.shape[:, k] >= 0
        if has.any():
            mask = coverage(scenes.shape[has, k], scenes.centre[has, k], scenes.radius[has, k], scenes.angle[has, k])
            share[has, k] = mask.view(-1, side, patch, side, patch).mean((2, 4)).flatten(1)
    most, which = share.max(1)
    return tuple((values.gather(1, which) + 1) * (most >= least) for values in (scenes.shape, scenes.colour))
