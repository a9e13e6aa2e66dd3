"""A user's own pictures for stitching and for training on data: a folder with or without captions, and pairs of a better and a worse picture.

All give uint8 [N, 3, H, W] (pairs [N, 2, 3, H, W], the better first) and the N prompts; recipes name them under `images` or `data.images`.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlstitch.files import require
from rlstitch.paths import matching, what_is
from rlstitch.picture_rows import PictureRows, Source, pictures_at_once, read_pictures, some
from rlstitch.prompts import COLUMNS, Table, file_of, no_text, read_table, read_text
from rlstitch.ranges import CountOrNone, Side, Text
from rlstitch.telling import say
from rlstitch.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif")
OTHERS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr")  # which hold pictures, too, and are not read
LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@pictures_at_once
def images_from_folder(
    path: Text, size: Side, *, width: Side | None = None, captions: bool | None = None, column: str = "", skip_unreadable: bool = False
) -> PictureRows:
    """Every picture under a folder, short side to `size` and cropped to a square, or, with `width`, to `size` pixels in height and so many in width.

    Its prompt is its row in a `metadata.jsonl`, `.csv` or `.parquet` in its folder or one above it (`file_name`, a path from there, and prompt, text or caption,
    or `column`), else the text file of the same name beside it. captions: True wants a prompt for every picture, False reads none, None takes them where
    every picture has one, and none where none has. Raises UserError for pictures that cannot be read (all counted, some named) unless skip_unreadable, for
    pictures without a prompt where others have one, and for rows and texts that fit no picture.
    """
    root = require(path, "the image folder")
    if not root.is_dir():
        raise UserError(f"the image folder '{path}' is no folder")
    below = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    files = sorted(p for p in below if p.suffix.lower() in SUFFIXES and not p.is_dir())
    linked = sorted(str(p.relative_to(root)) for p in below if p.is_symlink() and p.is_dir())
    passed = f"{len(linked)} folders under {path} are links, which are not followed: {some(linked)}" if linked else ""
    if not files:
        raise UserError(f"no picture under {path}: {', '.join(SUFFIXES)} are read" + f"; {passed}" * bool(linked))
    others = sorted(str(p.relative_to(root)) for p in below if p.suffix.lower() in OTHERS)
    say(*[passed] * bool(linked), *[f"{len(others)} pictures under {path} are of kinds that are not read: {some(others)}"] * bool(others))
    told = {} if captions is False else _captions(root, files, column)
    silent = [file for file in files if file not in told]
    if silent and (told or captions):
        raise UserError(
            f"{len(silent)} of {len(files)} pictures under {path} have no prompt: {some(str(f.relative_to(root)) for f in silent)}. Write it into metadata.jsonl (file_name, text) or a .txt of the same name, or set captions: false"
        )
    return PictureRows([(file, file.name, told.get(file, "")) for file in files], (width or size, size), str(path), skip_unreadable, None)


def pairs_from_file(
    path: Text, size: Side, *, width: Side | None = None, column: str = "", skip_unreadable: bool = False, n: CountOrNone = 0
) -> tuple[Tensor, list[str]]:
    """Preference pairs, one a row of a file that `prompts.read_table` reads (a pattern: of several): the prompt and, as paths from where the file lies, `chosen` and
    `rejected`; or as HPDv2 (`image_path` or `file_path`, `human_preference` or `rank`; the pictures of train.json may lie in train/) and Pick-a-Pic (`jpg_0`, `jpg_1`,
    `label_0`) have it, rows without a preference left out. size and width as in `images_from_folder`; n: the first so many pairs, 0 for all."""
    better, worse, prompts, _ = _pairs(path, size, width, column, skip_unreadable, n)
    return torch.stack([better, worse], 1), prompts


def judged_pairs(
    path: Text, size: Side, *, width: Side | None = None, column: str = "", skip_unreadable: bool = False, n: CountOrNone = 0
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """The pairs of `pairs_from_file` to measure a reward by: first pictures, second ones, prompts, and whether the first is the better one. Of files that name the better
    one by its column, every second pair is turned round."""
    better, worse, prompts, first_wins = _pairs(path, size, width, column, skip_unreadable, n)
    turned = first_wins.view(-1, 1, 1, 1)
    return torch.where(turned, better, worse), torch.where(turned, worse, better), prompts, first_wins


def _pairs(path: str, size: int, width: int | None, column: str, skip_unreadable: bool, n: int) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Better pictures, worse ones, prompts, and whether the better one comes first."""
    pairs: list[tuple[str, str, Source, Source, bool]] = []  # what a pair is called, its prompt, and the two
    rows = 0
    for file in [path] if path.startswith("hub:") else matching(path):
        if n and len(pairs) >= n:
            break
        table = read_table(file, "the file of pairs", pictures=True)
        prompts = table.texts(table.prompt_column(column)) if table.rows else []
        folder, rows = file_of(file, "the file of pairs").parent, rows + len(table.rows)
        for k, row in enumerate(table.rows):
            pairs += [(f"{table.path}, {table.places[k]}", prompts[k], *pair) for pair in _preferred(table, k, row, folder)]
    if not rows:
        raise UserError(f"{path} holds no pair")
    pairs = pairs[: n or None]
    if same := [place for place, _, better, worse, _ in pairs if better == worse]:
        raise UserError(f"{some(same)}: chosen and rejected are one picture, of which nothing is learned: take the row out")
    names = {source: source if isinstance(source, Path) else place for place, _, *two, _ in pairs for source in two}
    good = read_pictures(names, (width or size, size), str(path), skip_unreadable)
    kept = [pair for pair in pairs if pair[2] in good and pair[3] in good]
    if not kept:
        raise UserError(f"{path}: no pair has two pictures that can be read" if pairs else f"{path}: no row prefers one of its pictures")
    sides = [torch.stack([good[pair[side]] for pair in kept]) for side in (2, 3)]
    return *sides, [prompt for _, prompt, *_ in kept], torch.tensor([first for *_, first in kept])


def _preferred(table: Table, k: int, row: dict[str, Any], folder: Path) -> list[tuple[Source, Source, bool]]:
    """(better, worse, whether the better one comes first) of a row; none where it prefers neither."""
    place, own = f"{table.path}, {table.places[k]}", folder / Path(table.path).stem

    def at(*names: str) -> Any:
        return next((row[c] for c in map(table.find, names) if c is not None and row.get(c) is not None), None)

    def picture(name: Any) -> Path:
        file = folder / str(name).strip()
        return own / str(name).strip() if not what_is(file) and what_is(own / str(name).strip()) else file

    if table.find("jpg_0"):
        label, two = at("label_0"), [bytes_of(at(name)) for name in ("jpg_0", "jpg_1")]
        if at("has_label") is False or label == 0.5 or (label is None and table.find("label_0")):
            return []
        if not all(two) or not _number(label):
            raise UserError(f"{place}: needs two pictures' bytes under jpg_0 and jpg_1 and a number under label_0")
        return [(*(two if label > 0.5 else two[::-1]), label > 0.5)]
    if table.find("image_path") or table.find("file_path"):
        files, liked, rank = at("image_path", "file_path"), at("human_preference"), at("rank")
        order = liked or rank
        if not isinstance(files, list) or not isinstance(order, list) or not len(files) == len(order) >= 2 or not all(map(_number, order)):
            raise UserError(
                f"{place}: needs a list under image_path and one as long under human_preference (1 for the better) or rank (1 is the best)"
            )
        merit, files = order if liked else [-v for v in order], [picture(f) for f in files]
        return [
            (files[i], files[j], True) if merit[i] > merit[j] else (files[j], files[i], False)
            for i in range(len(files)) for j in range(i + 1, len(files)) if merit[i] != merit[j]
        ]  # fmt: skip
    better, worse = at("chosen"), at("rejected")
    if faults := [f"'{name}'" for name, value in (("chosen", better), ("rejected", worse)) if no_text(value)]:
        raise UserError(
            f"{place}: needs a path under {' and '.join(faults)}, or the columns of HPDv2 (image_path, human_preference) or Pick-a-Pic (jpg_0, jpg_1, label_0); it has {', '.join(row)[:200]}"
        )
    return [(picture(better), picture(worse), k % 2 == 0)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def bytes_of(value: Any) -> bytes | None:
    """A picture's bytes in a cell: as they are, or as a data set of the hub holds them, {bytes, path}."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) and value else None


def first_text(value: Any) -> str:
    """The text of a cell; of several captions the first."""
    found = captions_of(value)
    return found[0] if found else ""


def captions_of(value: Any) -> list[str]:
    """The captions of a cell: a text, a list of texts, also written as JSON, or of objects with `raw`."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    listed = [v.get("raw") if isinstance(v, dict) else v for v in (value if isinstance(value, list) else [value])]
    return [text.strip() for text in listed if isinstance(text, str) and text.strip()]


def _captions(root: Path, files: list[Path], column: str) -> dict[Path, str]:
    """Prompts by picture, of those that have one. Raises UserError with every row and text that cannot be one."""
    told: dict[Path, str] = {}
    bad: list[str] = []
    for folder in sorted({root, *(p for file in files for p in file.parents if root in p.parents)}):
        listings = [folder / name for name in LISTINGS if what_is(folder / name)]
        if len(listings) > 1:
            raise UserError(f"{folder} has {' and '.join(f.name for f in listings)}: keep the one that holds")
        for listing in listings:
            _listed(listing, set(files), column, told, bad)
    for file in files:
        beside = file.with_suffix(".txt")
        if not told.get(file) and what_is(beside):
            try:
                if text := read_text(beside, "the caption").strip():
                    told[file] = text
            except UserError as error:
                bad.append(str(error))
    if bad:
        raise UserError(f"{len(bad)} captions under {root} cannot be used: {'; '.join(bad[:4])}{'...' if len(bad) > 4 else ''}")
    return {file: text for file, text in told.items() if text}


def _listed(listing: Path, files: set[Path], column: str, told: dict[Path, str], bad: list[str]) -> None:
    """Add a listing's prompts to `told`, '' where a row has none, and to `bad` what is wrong with it."""
    table = read_table(listing, "the listing of pictures")
    if table.rows and not table.find("file_name"):
        raise UserError(f"{listing} has no column file_name; it has {', '.join(table.columns[:12])}")
    names = table.texts(table.find("file_name") or "") if table.rows else []
    columns = [c for c in map(table.find, [column] if column else COLUMNS) if c is not None]
    if column and not columns:
        table.prompt_column(column)
    if table.rows and not columns:
        say(
            f"{listing} has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, and so no prompts; it has {', '.join(table.columns[:12])}"
        )
    for place, row, name in zip(table.places, table.rows, names):
        inside, where = Path(os.path.normpath(name)), f"{listing.name}, {place}: {name}"
        file = listing.parent / inside
        given = next((value for c in columns if (value := row.get(c)) not in (None, "", [])), "")
        given = first_text(given) or given if isinstance(given, list) else given
        if inside.is_absolute() or inside.parts[:1] == ("..",):
            bad.append(f"{where} lies outside {listing.parent}")
        elif file not in files:
            bad.append(f"{where[:200]} is {f'no picture under {listing.parent}' if what_is(file) else 'not there'}")
        elif file in told:
            bad.append(f"{where} is named twice")
        elif given and (why := no_text(given)):
            bad.append(f"{where} has {why} for a caption")
        else:
            told[file] = given and given.strip()
