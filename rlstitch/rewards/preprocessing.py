"""What a reward does to pictures before its tower, as its own file says it: the image processors of transformers (CLIP, SigLIP, ViT), in torch and differentiable.

Antialiased interpolation differs from PIL's by PIL's rounding to whole grey levels after each of its two passes: 1.5 levels at most. (Pillow 13 takes the vertical
pass first where a picture is more than twice as tall as wide, or shrinks more in height: then what overshoots at sharp edges is cut off elsewhere, up to 6 levels there.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch.files import read_json, require
from rlstitch.types import UserError

Resize = Literal["auto", "shortest_crop", "squash", "longest_pad"]
FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # by PIL's numbers
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALVES = ([0.5] * 3, [0.5] * 3)
# What a file that leaves a key out means by it: filter, whether it crops, whether a plain number is the shortest edge (or a square), mean and deviation.
FAMILIES = {"CLIP": (3, True, True, OPENAI), "Siglip": (3, False, False, HALVES), "ViT": (2, False, False, HALVES)}
SUFFIXES = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")


@dataclass(frozen=True)
class Preprocessing:
    """Pictures [B, 3, H, W] in [0, 1] -> [B, 3, side, side]: resize, crop, scale, normalise, in this order.

    edge: ("shortest" | "longest", pixels, 0), ("exact", height, width) or None; crop: the middle (height, width), padded with black where the picture is smaller;
    scale: of pixels in [0, 1]; even: an odd margin is halved to an even number of pixels, as torchvision does and open_clip with it, and not always down.
    """

    side: int
    edge: tuple[str, int, int] | None
    crop: tuple[int, int] | None
    filter: str = "bicubic"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    even: bool = False

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size that pictures are brought to. CLIP cuts the long side to an integer; HPSv2 rounds the short one."""
        if self.edge is None:
            return height, width
        kind, a, b = self.edge
        if kind == "exact":
            return a, b
        if kind == "shortest":
            return (a, int(a * width / height)) if height <= width else (int(a * height / width), a)
        scale = a / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def view(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) of what the tower sees of a picture, as shares of its height and width; beyond 0 and 1 where it is padded."""
        h, w = self.target(height, width)
        if self.crop is None:
            return 0.0, 0.0, 1.0, 1.0
        (ch, cw), top, left = self.crop, self._before(h - self.crop[0]), self._before(w - self.crop[1])
        return top / h, left / w, (top + ch) / h, (left + cw) / w

    def _before(self, margin: int) -> int:
        """What is cut off before the middle, of all that is."""
        return round(margin / 2) if self.even and margin > 0 else margin // 2

    def __call__(self, images: Tensor) -> Tensor:
        """Raises UserError where pictures of this shape do not come out as the tower takes them."""
        images = images.to(
            torch.promote_types(images.dtype, torch.float32)
        )  # half precision is coarser than a grey level, and not resized on a CPU
        given = (images.shape[-2], images.shape[-1])
        height, width = self.target(*given)
        for size in ((given[0], width), (height, width)):  # PIL's two passes, each of which cuts off what bicubic overshoots
            if size != images.shape[-2:]:
                smooth = {} if self.filter == "nearest-exact" else {"antialias": True, "align_corners": False}
                images = F.interpolate(images, size, mode=self.filter, **smooth).clamp(0, 1)
        if self.crop is not None:
            images = self._cropped(images, *self.crop)
        if images.shape[-2:] != (self.side, self.side):
            raise UserError(
                f"the reward's preprocessing brings pictures of {given[1]} x {given[0]} to {images.shape[-1]} x {images.shape[-2]}, and its tower takes {self.side} x {self.side}: give the reward resize: shortest_crop or squash"
            )
        mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (self.mean, self.std))
        return (images * self.scale - mean) / std

    def _cropped(self, images: Tensor, height: int, width: int) -> Tensor:
        h, w = images.shape[-2:]
        if h < height or w < width:
            # the odd pixel of black: CLIP puts it before the picture, HPSv2 behind
            half = math.floor if self.edge is not None and self.edge[0] == "longest" else math.ceil
            above, before = half(max(0, height - h) / 2), half(max(0, width - w) / 2)
            images = F.pad(images, (before, max(0, width - w) - before, above, max(0, height - h) - above))
            h, w = images.shape[-2:]
        top, left = self._before(h - height), self._before(w - width)
        return images[..., top : top + height, left : left + width]


def stated(resize: str, side: int, **rest: Any) -> Preprocessing:
    """The geometry of a recipe's own word: `shortest_crop` is CLIP's, `squash` DFN's, `longest_pad` HPSv2's (black before normalisation)."""
    edge = {"shortest_crop": ("shortest", side, 0), "squash": ("exact", side, side), "longest_pad": ("longest", side, 0)}[resize]
    return Preprocessing(side, edge, None if resize == "squash" else (side, side), **rest)


def read(folder: Path, side: int, resize: str = "auto") -> Preprocessing:
    """The preprocessing of a model's folder (processor_config.json's `image_processor`, or preprocessor_config.json) for a tower of side x side pixels.

    resize: `auto` is the file's own geometry, another word that one. Raises UserError for what the file asks for and is not done here, by its key.
    """
    path, said = settings(folder)
    try:
        return _of_settings(said, side, resize)
    except UserError as error:
        raise UserError(f"the reward's preprocessing {path} {error}") from error


def of_open_clip(said: dict[str, Any], side: int, resize: str, usual: str) -> Preprocessing:
    """The same by the `preprocess_cfg` of an open_clip_config.json, with open_clip's own where it leaves something out; usual: how other sizes are brought to the
    tower's where neither it nor `resize` tells."""
    modes = {"shortest": "shortest_crop", "squash": "squash", "longest": "longest_pad"}
    mode, filters = said.get("resize_mode"), {"bicubic": 3, "bilinear": 2, "random": 3}
    filter_name = said.get("interpolation") or "bicubic"
    try:
        for key, value, known in (("resize_mode", mode or "shortest", modes), ("interpolation", filter_name, filters)):
            if value not in known:
                raise UserError(f"has {key} {value!r}, which is none of {', '.join(known)}")
        if said.get("fill_color"):
            raise UserError(f"has fill_color {said['fill_color']!r}, and only black is put around pictures here")
        word = resize if resize != "auto" else modes.get(mode, usual)
        told = {"resample": filters[filter_name], "image_mean": said.get("mean"), "image_std": said.get("std")}
        return replace(_of_settings(told, side, word), even=True)
    except UserError as error:
        raise UserError(f"the reward's preprocessing open_clip_config.json {error}") from error


def told(folder: Path) -> bool:
    """Whether a folder says how pictures are prepared."""
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that says how pictures are prepared, and what it says; what transformers 5 writes comes first, as in transformers."""
    whole = folder / "processor_config.json"
    nested = read_json(whole, "the reward's preprocessing").get("image_processor") if whole.is_file() else None
    if isinstance(nested, dict):
        return whole, nested
    plain = require(folder / "preprocessor_config.json", "the reward's preprocessing")
    return plain, read_json(plain, "the reward's preprocessing")


def _of_settings(said: dict[str, Any], side: int, resize: str) -> Preprocessing:
    auto = resize == "auto"
    name = said.get("image_processor_type") or said.get("feature_extractor_type") or "CLIPImageProcessor"
    family = next((f for f in FAMILIES if name in {f + s for s in SUFFIXES}), None)
    if family is None and auto:
        raise UserError(
            f"is a {name}, and only those of {', '.join(FAMILIES)} are read here: give the reward resize: shortest_crop, squash or longest_pad"
        )
    filter_number, crops, shortest, (mean, std) = FAMILIES[family or "CLIP"]
    number = said.get("resample", filter_number)
    if number not in FILTERS or isinstance(number, bool):
        raise UserError(f"has resample {number!r}, which is none of {', '.join(f'{k} ({v})' for k, v in FILTERS.items())}")
    factor = said.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or factor == 0:
        raise UserError(f"has rescale_factor {factor!r}")
    rest = {"filter": FILTERS[number], "scale": 255.0 * factor if _flag(said, "do_rescale", True) else 255.0}
    if abs(rest["scale"] - 1) < 1e-6:
        rest["scale"] = 1.0
    if _flag(said, "do_normalize", True):
        rest |= {"mean": _channels(said, "image_mean", mean), "std": _channels(said, "image_std", std)}
        if 0 in rest["std"]:
            raise UserError("has image_std 0")
    if not auto:
        return stated(resize, side, **rest)
    if _flag(said, "do_pad", False):
        raise UserError("has do_pad, which is not done here: give the reward resize: longest_pad (HPSv2's), or take it out")
    edge = _edge(said.get("size", side), shortest) if _flag(said, "do_resize", True) else None
    crop = _square(said.get("crop_size", side)) if _flag(said, "do_center_crop", crops) else None
    if (last := crop or (edge is not None and edge[0] == "exact" and edge[1:]) or (side, side)) != (side, side):
        raise UserError(
            f"{'crops' if crop else 'resizes'} to {last[1]} x {last[0]} pixels, and the tower takes {side} x {side}: mend {'crop_size' if crop else 'size'}"
        )
    return Preprocessing(side, edge, crop, **rest)


def _edge(size: Any, shortest: bool) -> tuple[str, int, int]:
    if isinstance(size, dict):
        keys = {k for k, v in size.items() if v is not None}
        if keys == {"shortest_edge"} and _is_pixels(size["shortest_edge"]):
            return "shortest", size["shortest_edge"], 0
        if keys == {"height", "width"}:
            return "exact", *_square(size)
    elif _is_pixels(size) and shortest:
        return "shortest", size, 0
    elif not isinstance(size, dict):
        return "exact", *_square(size)
    raise UserError(f"has size {size!r}, which is neither a shortest_edge nor a height and width in pixels")


def _square(size: Any) -> tuple[int, int]:
    """A number, [height, width] or {height, width}."""
    sides = [size, size] if _is_pixels(size) else [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(map(_is_pixels, sides)):
        raise UserError(f"has the size {size!r}, which is no height and width in pixels")
    return sides[0], sides[1]


def _flag(said: dict[str, Any], key: str, default: bool) -> bool:
    value = said.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"has {key} {value!r}, which is neither true nor false")
    return default if value is None else value


def _channels(said: dict[str, Any], key: str, default: list[float]) -> tuple[float, ...]:
    value = said.get(key)
    value = default if value is None else [value] * 3 if _is_number(value) else value
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
        raise UserError(f"has {key} {value!r}, which is no list of three numbers")
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pixels(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
