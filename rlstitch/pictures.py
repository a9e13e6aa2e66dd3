"""A user's own pictures for stitching and for training on data: a folder with or without captions, and pairs of a better and a worse picture.

All give uint8 [N, 3, H, W] (pairs [N, 2, 3, H, W], the better first) and the N prompts; recipes name them under `images` or `data.images`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rlstitch.files import require
from rlstitch.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def images_from_folder(path: str, size: int, *, captions: bool | None = None, skip_unreadable: bool = False) -> tuple[Tensor, list[str]]:
    """Every picture under a folder, short side to `size` and cropped.

    Its prompt is its line in `metadata.jsonl` (keys file_name and text or prompt) or the text file of the same name beside it. captions: True wants a
    prompt for every picture, False reads none, None takes them where every picture has one, and none where none has. Raises UserError for pictures
    that cannot be read (all counted, some named) unless skip_unreadable, and for pictures without a prompt where others have one.
    """
    root = require(path, "the image folder")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"no picture under {path}")
    told = {} if captions is False else _captions(root, files)
    silent = [file for file in files if file not in told]
    if silent and (told or captions):
        raise UserError(
            f"{len(silent)} of {len(files)} pictures under {path} have no prompt: {_some(str(f.relative_to(root)) for f in silent)}. Write it into metadata.jsonl (file_name, text) or a .txt of the same name, or set captions: false"
        )
    good = _read_all(files, size, str(path), skip_unreadable)
    return torch.stack(list(good.values())), [told.get(file, "") for file in good]


def pairs_from_file(path: str, size: int, *, skip_unreadable: bool = False) -> tuple[Tensor, list[str]]:
    """Preference pairs of a .jsonl file: `prompt`, `chosen` and `rejected` a line, the last two as paths from where the file lies."""
    file = require(path, "the file of pairs")
    rows = _rows(file, ("prompt", "chosen", "rejected"))
    if not rows:
        raise UserError(f"{path} holds no pair")
    sides = [(file.parent / row["chosen"], file.parent / row["rejected"]) for row in rows]
    good = _read_all(list(dict.fromkeys(f for side in sides for f in side)), size, str(path), skip_unreadable)
    kept = [k for k, side in enumerate(sides) if all(f in good for f in side)]
    if not kept:
        raise UserError(f"{path}: no pair has two pictures that can be read")
    return torch.stack([torch.stack([good[f] for f in sides[k]]) for k in kept]), [rows[k]["prompt"] for k in kept]


def _some(names: Iterable[str], shown: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + ("..." if len(names) > shown else "")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start}. Save it as UTF-8.") from error


def _rows(file: Path, keys: tuple[str, ...]) -> list[dict[str, str]]:
    """Lines of a .jsonl file, each with non-empty strings under `keys`."""
    rows = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from error
        lacking = [k for k in keys if not isinstance(row, dict) or not isinstance(row.get(k), str) or not row[k].strip()]
        if lacking:
            raise UserError(f"{file}, line {number}: needs a non-empty string under {' and '.join(repr(k) for k in lacking)}")
        rows.append(row)
    return rows


def _captions(root: Path, files: list[Path]) -> dict[Path, str]:
    """Prompts by picture, of those that have one."""
    listing = root / "metadata.jsonl"
    if listing.exists():
        rows = _rows(listing, ("file_name",))
        texts = {root / row["file_name"]: row.get("text") or row.get("prompt") or "" for row in rows}
    else:
        texts = {f: _text(f.with_suffix(".txt")).strip() for f in files if f.with_suffix(".txt").exists()}
    return {file: text for file, text in texts.items() if text}


def _read_all(files: list[Path], size: int, where: str, skip_unreadable: bool) -> dict[Path, Tensor]:
    """Pictures [3, size, size] uint8 by file; those that cannot be read are an error, or left out if told so."""
    good: dict[Path, Tensor] = {}
    bad = []
    for file in files:
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            good[file] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
        except (UnidentifiedImageError, OSError) as error:
            bad.append(f"{file.name} ({type(error).__name__})")
    if bad and not skip_unreadable:
        raise UserError(
            f"{len(bad)} of {len(files)} pictures under {where} cannot be read: {_some(bad)}. Mend or remove them, or set skip_unreadable: true"
        )
    if bad:
        print(f"left out {len(bad)} unreadable pictures of {len(files)}: {_some(bad)}", flush=True)
    if not good:
        raise UserError(f"none of the {len(files)} pictures under {where} can be read")
    return good
