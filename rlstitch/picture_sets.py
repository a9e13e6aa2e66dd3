"""Pictures in the formats that published sets come in: WebDataset shards, parquet files, caption files of COCO and Flickr30k beside a folder, AVA's grades.

Like `pictures`, all give uint8 [N, 3, H, W] and N prompts; recipes name them under `images`, `data.images`, `held_out` or `graded`.
"""

from __future__ import annotations

import glob
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlstitch.paths import home
from rlstitch.pictures import SUFFIXES, Source, read_pictures
from rlstitch.prompts import COLUMNS, file_of, read_table, read_text
from rlstitch.ranges import CountOrNone, Seed, Side, Text
from rlstitch.types import UserError

Row = tuple[Source, str, str]  # a picture, what it is called, its prompt


def images_from_shards(
    path: Text, size: Side, *, width: Side | None = None, column: str = "", skip_unreadable: bool = False, n: CountOrNone = 0
) -> tuple[Tensor, list[str]]:
    """The first n (0: all) pictures of WebDataset shards: `path` is a .tar or a pattern such as shards/*.tar, members KEY.jpg beside KEY.txt, or KEY.json with prompt, text or
    caption (or `column`). Shards are read as they are, in the order of their names; nothing is unpacked to disk. size and width as in `images_from_folder`."""
    shards = sorted(glob.glob(str(home(path))))
    if not shards:
        raise UserError(f"no shard at '{path}': give a .tar file or a pattern such as shards/*.tar")
    found: list[Row] = []
    for shard in shards:
        for key, picture, prompt in _members(Path(shard), column):
            if n and len(found) == n:
                break
            found.append((picture, f"{Path(shard).name}:{key}", prompt))
    if not found:
        raise UserError(f"no picture in {len(shards)} shards at '{path}': members KEY{', KEY'.join(SUFFIXES)} are read")
    return _read(found, size, width, path, skip_unreadable)


def _read(found: list[Row], size: int, width: int | None, where: str, skip_unreadable: bool) -> tuple[Tensor, list[str]]:
    good = read_pictures({source: name for source, name, _ in found}, (width or size, size), where, skip_unreadable)
    kept = [(good[source], prompt) for source, _, prompt in found if source in good]
    return torch.stack([picture for picture, _ in kept]), [prompt for _, prompt in kept]


def _members(shard: Path, column: str) -> Iterator[tuple[str, bytes, str]]:
    """(key, picture, prompt or '') of a shard's samples, whose members stand together."""
    try:
        with tarfile.open(shard, "r:*") as archive:
            sample: dict[str, bytes] = {}
            now = ""
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile() or not stem:
                    continue
                if key != now:
                    yield from _sample(shard, now, sample, column)
                    now, sample = key, {}
                if f".{suffix.lower()}" in (*SUFFIXES, ".txt", ".json"):
                    sample[f".{suffix.lower()}"] = archive.extractfile(member).read()
            yield from _sample(shard, now, sample, column)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard} cannot be read as a .tar ({error}): fetch it again") from error


def _sample(shard: Path, key: str, sample: dict[str, bytes], column: str) -> Iterator[tuple[str, bytes, str]]:
    picture = next((sample[s] for s in SUFFIXES if s in sample), None)
    if picture is None:
        return
    try:
        told = json.loads(sample[".json"]) if ".json" in sample else {}
        prompt = next((told[c] for c in ([column] if column else COLUMNS) if isinstance(told, dict) and isinstance(told.get(c), str)), None)
        yield key, picture, (prompt or sample.get(".txt", b"").decode()).strip()
    except ValueError as error:
        raise UserError(f"{shard}, {key}: its prompt cannot be read ({error})") from error


def images_from_parquet(
    path: Text, size: Side, *, width: Side | None = None, column: str = "", skip_unreadable: bool = False, n: CountOrNone = 0
) -> tuple[Tensor, list[str]]:
    """The first n (0: all) pictures that parquet files hold as bytes, or as a data set of the hub holds them ({bytes, path}), in their one column of pictures, with the
    prompts beside them. `path`: a file, a pattern, or hub:datasets/owner/name/FILE. size and width as in `images_from_folder`."""
    files = [path] if path.startswith("hub:") else sorted(glob.glob(str(home(path))))
    if not files:
        raise UserError(f"no file at '{path}'")
    found: list[Row] = []
    for file in files:
        table = read_table(file, "the file of pictures", pictures=True)
        holds = [c for c in table.columns if any(_bytes(row.get(c)) for row in table.rows[:8])]
        if len(holds) != 1:
            raise UserError(
                f"{file} has {len(holds)} columns that hold pictures' bytes{': ' + ', '.join(holds) if holds else ''}; it has {', '.join(table.columns[:12])}: one is read"
            )
        said = [c for c in map(table.find, [column] if column else COLUMNS) if c is not None]
        if column and not said:
            table.prompt_column(column)
        for place, row in zip(table.places, table.rows):
            if (not n or len(found) < n) and (picture := _bytes(row.get(holds[0]))):
                prompt = row.get(said[0]) if said else ""
                prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt  # several captions: the first
                found.append((picture, f"{Path(file).name}, {place}", prompt.strip() if isinstance(prompt, str) else ""))
    return _read(found, size, width, path, skip_unreadable)


def _bytes(value: Any) -> bytes | None:
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) and value else None


def images_with_captions(
    path: Text, images: Text, size: Side, *, width: Side | None = None, split: str = "", skip_unreadable: bool = False, n: CountOrNone = 0
) -> tuple[Tensor, list[str]]:
    """The first n (0: all) pictures of a file of captions, each with its first one, from the folder `images`: COCO's captions_*.json, Karpathy's dataset_coco.json or
    dataset_flickr30k.json (whose `split` test is the 5k or 1k of Recall@1), or any table with `file_name` and caption. size and width as in `images_from_folder`."""
    table, folder = read_table(path, "the file of captions"), file_of(images, "the folder of pictures")
    rows = [row for row in table.rows if not split or row.get("split") == split]
    if not rows:
        has = ", ".join(sorted({str(row.get("split")) for row in table.rows}))
        raise UserError(f"{path} has no picture of split '{split}'; it has {has}" if table.rows else f"{path} names no picture")
    column, named = table.prompt_column(), table.find("file_name")
    if named is None:
        raise UserError(f"{path} has no column file_name; it has {', '.join(table.columns[:12])}")
    files = [(_inside(folder, row[named], path), row[column].strip()) for row in rows[: n or None]]
    return _read([(file, file.name, prompt) for file, prompt in files], size, width, images, skip_unreadable)


def _inside(folder: Path, name: Any, path: str) -> Path:
    file = folder / str(name)
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} names {str(name)[:100]!r}, which lies outside {folder}")
    return file if file.exists() else folder / Path(str(name)).name  # val2014/x.jpg beside a folder that is val2014


def graded_by_ava(
    path: Text, images: Text, size: Side, *, width: Side | None = None, skip_unreadable: bool = False, n: CountOrNone = 0, seed: Seed = 0
) -> tuple[Tensor, list[str], Tensor]:
    """n (0: all) pictures of AVA drawn at random by `seed`, with no prompts and the mean of each one's grades, 1 to 10: `path` is AVA.txt (number, id, ten counts of grades,
    tags), `images` the folder of ID.jpg. Pictures that the folder lacks are passed over, as public copies lack some."""
    folder, grades = file_of(images, "the folder of pictures"), {}
    for number, line in enumerate(read_text(path, "AVA's list").splitlines(), 1):
        if not (cells := line.split()):
            continue
        if len(cells) < 12 or not all(cell.isdigit() for cell in cells[:12]) or not any(counts := [int(c) for c in cells[2:12]]):
            raise UserError(f"{path}, line {number}: needs a number, an id and ten counts of grades, not {line[:60]!r}")
        if (file := folder / f"{cells[1]}.jpg").is_file():
            grades[file] = sum(k * c for k, c in enumerate(counts, 1)) / sum(counts)
    if not grades:
        raise UserError(f"{images} has no picture ID.jpg of those that {path} grades")
    chosen = sorted(grades)
    random.Random(seed).shuffle(chosen)
    good = read_pictures({file: file for file in chosen[: n or None]}, (width or size, size), images, skip_unreadable)
    return torch.stack(list(good.values())), [""] * len(good), torch.tensor([grades[file] for file in good])
