"""Pictures in the formats that published sets come in: WebDataset shards, parquet files, caption files of COCO and Flickr30k beside a folder, AVA's grades.

Like `pictures`, all give uint8 [N, 3, H, W] and N prompts; recipes name them under `images`, `data.images`, `held_out` or `graded`.
"""

from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlstitch.paths import matching
from rlstitch.picture_rows import Member, PictureRows, Row, Source, pictures_at_once, read_pictures
from rlstitch.pictures import SUFFIXES, bytes_of, captions_of, first_text
from rlstitch.prompts import COLUMNS, file_of, read_table, read_text
from rlstitch.ranges import Count, CountOrNone, Seed, Side, Text
from rlstitch.types import UserError


@pictures_at_once
def images_from_shards(
    path: Text, size: Side, *, width: Side | None = None, column: str = "", skip_unreadable: bool = False, n: CountOrNone = 0
) -> PictureRows:
    """The first n (0: all) pictures of WebDataset shards: `path` is a .tar or a pattern such as shards/*.tar or shards/{00000..00099}.tar, members KEY.jpg beside KEY.txt, or
    KEY.json with prompt, text or caption (or `column`). Shards are read as they are, in the order of their names; nothing is unpacked to disk. size and width as in
    `images_from_folder`."""
    found: list[Row] = []
    keys: dict[str, None] = {}  # of KEY.json
    shards = _files(path, "shard")
    for shard in shards:
        for key, picture, prompt in _members(shard, column, keys) if not n or len(found) < n else ():
            found.append((picture, f"{shard.name}:{key}", prompt))
            if len(found) == n:
                break
    if not found:
        raise UserError(f"no picture in {len(shards)} shards at '{path}': members KEY{', KEY'.join(SUFFIXES)} are read")
    if column and column.lower() not in {key.lower() for key in keys}:
        raise UserError(
            f"no KEY.json in {path} has '{column}'" + (f"; they have {', '.join(list(keys)[:12])}" if keys else ": there is none")
        )
    return PictureRows(
        found,
        (width or size, size),
        path,
        skip_unreadable,
        f"KEY.json has {', '.join(list(keys)[:12])}" if keys else "there is no KEY.txt or KEY.json",
    )


def _files(path: str, what: str) -> list[Path]:
    """Of a path, a pattern, or a file at the hub."""
    return [file_of(path, f"the {what}")] if path.startswith("hub:") else [Path(file) for file in matching(path, what)]


def _members(shard: Path, column: str, keys: dict[str, None]) -> Iterator[tuple[str, Source, str]]:
    """(key, picture, prompt or '') of a shard's samples, whose members stand together; into `keys` go those of their .json. A picture is read later, from a compressed
    shard at once, which has no places to come back to."""
    try:
        with tarfile.open(shard, "r:*") as archive:
            sample: dict[str, Any] = {}
            now, plain = "", not hasattr(archive.fileobj, "_fp") and archive.fileobj.__class__ is io.BufferedReader
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile() or not stem:
                    continue
                if key != now:
                    yield from _sample(shard, now, sample, column, keys)
                    now, sample = key, {}
                kind = f".{suffix.lower()}"
                if kind in SUFFIXES and plain and not member.issparse():
                    sample[kind] = Member(shard, member.offset_data, member.size)
                elif kind in (*SUFFIXES, ".txt", ".json"):
                    sample[kind] = archive.extractfile(member).read()
            yield from _sample(shard, now, sample, column, keys)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{shard} cannot be read as a .tar ({error}): fetch it again") from error


def _sample(shard: Path, key: str, sample: dict[str, Any], column: str, keys: dict[str, None]) -> Iterator[tuple[str, Source, str]]:
    picture = next((sample[s] for s in SUFFIXES if s in sample), None)
    if picture is None:
        return
    try:
        told = json.loads(sample[".json"]) if ".json" in sample else {}
        row = {str(k).lower(): v for k, v in told.items()} if isinstance(told, dict) else {}
        keys.update(dict.fromkeys(told if isinstance(told, dict) else ()))
        prompt = next(filter(None, (first_text(row.get(c.lower())) for c in ([column] if column else COLUMNS))), "")
        yield key, picture, prompt or ("" if column else sample.get(".txt", b"").decode("utf-8-sig").strip())
    except ValueError as error:
        raise UserError(f"{shard}, {key}: its prompt cannot be read ({error})") from error


@pictures_at_once
def images_from_parquet(
    path: Text, size: Side, *, width: Side | None = None, column: str = "", skip_unreadable: bool = False, n: CountOrNone = 0
) -> PictureRows:
    """The first n (0: all) pictures that parquet files hold as bytes, or as a data set of the hub holds them ({bytes, path}), in their one column of pictures, with the
    prompts beside them. `path`: a file, a pattern, or hub:datasets/owner/name/FILE. size and width as in `images_from_folder`."""
    found: list[Row] = []
    columns: dict[str, None] = {}
    for file in [path] if path.startswith("hub:") else matching(path):
        if n and len(found) >= n:
            break
        table = read_table(file, "the file of pictures", pictures=True)
        columns.update(dict.fromkeys(table.columns))
        holds = [c for c in table.columns if any(bytes_of(row.get(c)) for row in table.rows[:8])]
        if len(holds) != 1:
            raise UserError(
                f"{file} has {len(holds)} columns that hold pictures' bytes{': ' + ', '.join(holds) if holds else ''}; it has {', '.join(table.columns[:12])}: one is read"
            )
        said = [c for c in map(table.find, [column] if column else COLUMNS) if c is not None]
        if column and not said:
            table.prompt_column(column)
        for place, row in zip(table.places, table.rows):
            if (not n or len(found) < n) and (picture := bytes_of(row.get(holds[0]))):
                found.append((picture, f"{Path(file).name}, {place}", first_text(row.get(said[0])) if said else ""))
    return PictureRows(found, (width or size, size), path, skip_unreadable, f"its columns are {', '.join(list(columns)[:12])}")


@pictures_at_once
def images_with_captions(
    path: Text,
    images: Text,
    size: Side,
    *,
    width: Side | None = None,
    split: str = "",
    column: str = "",
    skip_unreadable: bool = False,
    n: CountOrNone = 0,
) -> PictureRows:
    """The first n (0: all) pictures of a file of captions, each with its first one, from the folder `images`: COCO's captions_*.json, Karpathy's dataset_coco.json or
    dataset_flickr30k.json (whose `split` test is the 5k or 1k of Recall@1), or any table with `file_name`, `filename` or `image` and captions (prompt, text, caption, raw, or
    `column`). size and width as in `images_from_folder`."""
    rows = [(source, name, captions[0]) for source, name, captions in _captioned(path, images, split, column, n)]
    return PictureRows(rows, (width or size, size), images, skip_unreadable)


@pictures_at_once
def images_with_all_captions(
    path: Text,
    images: Text,
    size: Side,
    *,
    width: Side | None = None,
    split: str = "",
    column: str = "",
    captions: Count = 5,
    skip_unreadable: bool = False,
    n: CountOrNone = 0,
) -> PictureRows:
    """`images_with_captions` with the first `captions` of each picture: Recall@1 of COCO's 5k and Flickr30k's 1k is taken over all five (`held_out` of evaluate_value)."""
    rows = [(source, name, told[:captions]) for source, name, told in _captioned(path, images, split, column, n)]
    return PictureRows(rows, (width or size, size), images, skip_unreadable)


def _captioned(path: str, images: str, split: str, column: str, n: int) -> list[tuple[Path, str, list[str]]]:
    """The first n pictures of a file of captions, what they are called, and all captions of each."""
    table, folder = read_table(path, "the file of captions"), file_of(images, "the folder of pictures")
    rows = [(place, row) for place, row in zip(table.places, table.rows) if not split or row.get(table.find("split") or "") == split]
    if not rows:
        has = ", ".join(sorted({str(row.get(table.find("split") or "")) for row in table.rows}))
        raise UserError(f"{path} has no picture of split '{split}'; it has {has}" if table.rows else f"{path} names no picture")
    found = [c for c in map(table.find, [column] if column else ["captions", *COLUMNS, "raw"]) if c is not None]
    told, named = (
        found[0] if found else table.prompt_column(column),
        next(filter(None, map(table.find, ("file_name", "filename", "image"))), None),
    )
    if named is None:
        raise UserError(f"{path} has no column file_name; it has {', '.join(table.columns[:12])}")
    out = []
    for place, row in rows[: n or None]:
        if not (captions := captions_of(row[told])):
            raise UserError(f"{path}, {place}: needs a caption under '{told}', not {str(row[told])[:40]!r}")
        file = _inside(folder, row[named], path)
        out.append((file, file.name, captions))
    return out


def _inside(folder: Path, name: Any, path: str) -> Path:
    file = folder / str(name)
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} names {str(name)[:100]!r}, which lies outside {folder}")
    return file if file.exists() else folder / Path(str(name)).name  # val2014/x.jpg beside a folder that is val2014


def graded_by_ava(
    path: Text, images: Text, size: Side, *, width: Side | None = None, skip_unreadable: bool = False, n: CountOrNone = 0, seed: Seed = 0
) -> tuple[Tensor, list[str], Tensor]:
    """n (0: all) pictures of AVA drawn at random by `seed`, with no prompts and the mean of each one's grades, 1 to 10: `path` is AVA.txt (number, id, ten counts of grades,
    tags), `images` the folder of ID.jpg, or one above it. Pictures that the folder lacks are passed over, as public copies lack some."""
    grades: dict[Path, float] = {}
    there = {f.stem: f for f in sorted(file_of(images, "the folder of pictures").rglob("*")) if f.suffix.lower() in (".jpg", ".jpeg")}
    for number, line in enumerate(read_text(path, "AVA's list").splitlines(), 1):
        if not (cells := line.split()):
            continue
        if len(cells) < 12 or not all(cell.isdigit() for cell in cells[:12]) or not any(counts := [int(c) for c in cells[2:12]]):
            raise UserError(f"{path}, line {number}: needs a number, an id and ten counts of grades, not {line[:60]!r}")
        if file := there.get(cells[1]):
            grades[file] = sum(k * c for k, c in enumerate(counts, 1)) / sum(counts)
    if not grades:
        raise UserError(f"{images} has no picture ID.jpg of those that {path} grades")
    chosen = sorted(grades)
    random.Random(seed).shuffle(chosen)
    good = read_pictures({file: file for file in chosen[: n or None]}, (width or size, size), images, skip_unreadable)
    return torch.stack(list(good.values())), [""] * len(good), torch.tensor([grades[file] for file in good])
