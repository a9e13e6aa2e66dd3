"""Prompts, and other rows with text: one reader for all formats that people keep them in. Every file of lines or rows that a user gives is read here.

Lines end at \\n or \\r\\n and nowhere else: U+2028, U+2029, U+0085, \\x0b and \\x0c are letters of a line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlstitch import hub
from rlstitch.files import require, sha256
from rlstitch.paths import what_is
from rlstitch.types import Batch, Conditioning, UserError

MAX_FILE_BYTES = 512 << 20  # Karpathy's dataset_coco.json has 138 MiB, HPDv2's train.json more
COLUMNS = ("prompt", "text", "caption", "prompts")  # where prompts are looked for, the first one that is there
STYLES = {"anime", "concept-art", "paintings", "photo"}  # of HPDv2's benchmark
BOM = "\ufeff"
# What a file begins with that is no text in UTF-8, or not the text that was meant.
SIGNS = (
    (b"\x1f\x8b", "packed with gzip", "unpack it with gunzip"),
    (b"PK\x03\x04", "a zip archive, as .xlsx and .npz are, too", "unpack it, or save the sheet as .csv"),
    (b"PAR1", "parquet", "name it .parquet"),
    (b"\xff\xfe", "UTF-16 or UTF-32", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "fetch it with git lfs pull"),
    (b"<!doctype", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (b"<?xml", "XML", "write a prompt a line, or .jsonl"),
    (b"<svg", "a drawing", "name a file of prompts"),
    (b"%PDF", "a PDF", "write a prompt a line, or .jsonl"),
    (b"{\\rtf", "RTF", "save it as plain text"),
)
SEPARATORS = {",": "commas (.csv)", "\t": "tabs (.tsv)", ";": "semicolons"}
JSON_BEGINS = re.compile(r'[\[{]\s*(["\[{]|$)')
csv.field_size_limit(MAX_FILE_BYTES)


@dataclass
class PromptSet:
    """N prompts with the rows they came from and, once encoded, the denoiser's text.

    `text` is that of all prompts; where a cache on disk has it, `lookup` reads it batch by batch instead.
    Where pictures are learned from: `pictures` uint8 [N, 3, H, W], or [N, 2, 3, H, W] for pairs with the better first; once encoded, their latents `clean`.
    """

    prompts: list[str]
    rows: list[dict[str, Any]]
    text: Conditioning | None = field(default=None, repr=False)
    lookup: Callable[[list[str]], Conditioning] | None = field(default=None, repr=False)
    pictures: Tensor | None = field(default=None, repr=False)
    clean: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def two(self) -> Batch:
        """The first and the last row, to ask about blank pictures."""
        index = torch.tensor([0, len(self) - 1])
        return Batch([self.prompts[i] for i in index], index, index, [self.rows[i] for i in index])

    def batch(self, index: list[int], seeds: Tensor) -> Batch:
        if self.lookup is not None:
            text = self.lookup([self.prompts[i] for i in index])
        else:
            text = None if self.text is None else self.text[torch.tensor(index, device=self.text.device)]
        clean = None if self.clean is None else self.clean[torch.tensor(index)].to("cpu" if text is None else text.device)
        return Batch([self.prompts[i] for i in index], torch.tensor(index), seeds, [self.rows[i] for i in index], text, clean)


def read_prompts(path: str, column: str = "") -> PromptSet:
    """The prompts of a file in any of FORMATS: its column `column`, by default the one named prompt, text, caption or prompts. Other columns are kept as facts. Of a folder
    of .txt files, as DPG-Bench comes, each is a prompt, in the order of their names. `hub:datasets/owner/name/FILE` is a file of a data set at the hub.

    Raises UserError with the line at fault, and where the file is of another kind than its name says.
    """
    table = read_table(path, "the prompt file")
    if not table.rows:
        raise UserError(f"{path} holds no prompt")
    prompts = table.texts(table.prompt_column(column))
    return PromptSet(prompts, [row | {"prompt": prompt} for row, prompt in zip(table.rows, prompts)])


@dataclass
class Table:
    """Rows of a file, with its columns in the order met and where each row stands, for messages."""

    path: str
    columns: list[str]
    rows: list[dict[str, Any]]
    places: list[str]

    def find(self, name: str) -> str | None:
        """The column of that name, else the one whose name differs in case alone; None where there is none. UserError where it could be either of two."""
        for found in ([c for c in self.columns if c == name], [c for c in self.columns if c.strip().lower() == name.lower()]):
            if len(found) > 1:
                raise UserError(f"{self.path} has {len(found)} columns named {' and '.join(repr(c) for c in found)}: leave one")
            if found:
                return found[0]
        return None

    def prompt_column(self, column: str = "") -> str:
        """The column to take prompts from."""
        found = [c for c in map(self.find, [column] if column else COLUMNS) if c is not None]
        if not found:
            has = ", ".join(repr(c) for c in self.columns[:12]) + ("..." if len(self.columns) > 12 else "")
            wanted = f"no column '{column}'" if column else f"no column named {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
            raise UserError(f"{self.path} has {wanted}; it has {has}. Name the one with the prompts as `column`, beside the file")
        return found[0]

    def texts(self, column: str) -> list[str]:
        """The column's strings without white space around them. UserError where a row has none."""
        faults = [(place, why) for place, row in zip(self.places, self.rows) if (why := no_text(row.get(column)))]
        if faults:
            more = f" ({len(faults) - 1} more rows are at fault)" if len(faults) > 1 else ""
            raise UserError(f"{self.path}, {faults[0][0]}: needs a non-empty string under '{column}', not {faults[0][1]}{more}")
        return [row[column].replace(BOM, "").strip() for row in self.rows]


def no_text(value: Any) -> str:
    """What a value is where it is no text to prompt with; '' where it is."""
    if not isinstance(value, str):
        return "nothing" if value is None else f"{str(value)[:40]} ({type(value).__name__})"
    if "\0" in value:
        return "one with a NUL in it"
    return "" if value.replace(BOM, "").strip() else "an empty one"


def read_table(path: str | Path, what: str, pictures: bool = False) -> Table:
    """All rows of a file of FORMATS, by its name's ending in any case; a name without an ending is a .txt. UserError where that is not what it holds. pictures: keep the
    bytes that a parquet file holds."""
    if (folder := file_of(path, what)).is_dir() and (files := _one_each(folder)):
        rows = [{COLUMNS[0]: read_text(file, what).strip(), "file": file.name} for file in files]
        if many := [row["file"] for row in rows if "\n" in row[COLUMNS[0]]]:
            raise UserError(
                f"{what} '{path}' is a folder, whose files would be a prompt each, and {len(many)} have several lines ({', '.join(many[:3])}): name one file"
            )
        return Table(str(path), [COLUMNS[0], "file"], rows, [file.name for file in files])
    if pictures and folder.suffix.lower() == ".parquet":
        numbered = list(_parquet(folder, str(path), pictures=True))
        return Table(
            str(path), list(dict.fromkeys(c for _, row in numbered for c in row)), [r for _, r in numbered], [p for p, _ in numbered]
        )
    file, raw = _raw(path, what)
    suffix = file.suffix.lower() or ".txt"
    content = file if suffix == ".parquet" else _text(path, raw)
    if suffix not in FORMATS:
        raise UserError(
            f"{path}: a file named {suffix} is not read; name it by what it holds, {', '.join(FORMATS)} (.txt: a prompt a line)"
        )
    numbered = list(FORMATS[suffix](content, str(path)))
    rows = [row for _, row in numbered]
    return Table(str(path), list(dict.fromkeys(c for row in rows for c in row)), rows, [place for place, _ in numbered])


def read_text(path: str | Path, what: str) -> str:
    """A whole file as text. UserError where it is none."""
    return _text(path, _raw(path, what)[1])


def _one_each(folder: Path) -> list[Path]:
    """The files of a folder of prompts, if it is one and holds nothing else."""
    files = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    return files if all(f.suffix == ".txt" and what_is(f) == "a file" for f in files) else []


def file_of(path: str | Path, what: str) -> Path:
    """The file or folder that a path of data names, here or, `hub:datasets/owner/name/FILE[@revision]`, at the hub."""
    return hub.dataset_file(str(path), what) if str(path).startswith("hub:") else require(path, what)


def fingerprint(path: str | Path, what: str = "the prompt file") -> str:
    """Hash of a file of prompts, or of a folder of them."""
    found = file_of(path, what)
    return (
        sha256(found) if found.is_file() else hashlib.sha256("".join(sha256(f) for f in sorted(found.glob("*.txt"))).encode()).hexdigest()
    )


def _raw(path: str | Path, what: str) -> tuple[Path, bytes]:
    file = file_of(path, what)
    if file.is_dir():
        raise UserError(f"{what} '{path}' is a folder: name a file of text")
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise UserError(f"{path} has {size >> 20} MiB; {what} may have {MAX_FILE_BYTES >> 20}. Is it the right file?")
    try:
        return file, file.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _text(path: str | Path, raw: bytes) -> str:
    begins = raw[:64].removeprefix(BOM.encode()).lstrip().lower()
    for sign, kind, remedy in SIGNS:
        if begins.startswith(sign.lower()):
            raise UserError(f"{path} is {kind}: {remedy}")
    try:
        text = raw.decode("utf-8").replace(BOM, "")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} in line {line}. Save it as UTF-8, or unpack it where it is an archive."
        ) from error
    if "\0" in text:
        raise UserError(
            f"{path} is not text: NUL in line {text[: text.index(chr(0))].count(chr(10)) + 1}. Save it as UTF-8 text, or unpack it where it is an archive."
        )
    return text


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(place, line) of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.removesuffix("\r")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(sorted(k for k, _ in pairs))[:80]}")
    return found


def _json(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is a letter to JSON and none to UTF-8
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error


def _row(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {COLUMNS[0]: value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: needs a string or an object, not {json.dumps(value)[:40]}")
    return value


def _looks_like(text: str) -> str:
    """What a text is where it is no prompt a line; '' where it is."""
    lines = [line for _, line in _lines(text)]
    first = lines[0].strip() if lines else ""
    if JSON_BEGINS.match(first):
        return ".json or .jsonl"
    for separator, kind in ((",", ".csv"), ("\t", ".tsv"), (";", ".csv with semicolons")):
        cells = [cell.strip('"') for cell in first.split(separator)]
        if any(c.lower() in COLUMNS for c in cells) and all(re.fullmatch(r"(\w([\w .-]{0,40}\w)?)?", c) for c in cells):
            return kind
    tabs = {line.count("\t") for line in lines}
    return ".tsv without a first line that names its columns" if len(tabs) == 1 and tabs != {0} else ""


def _plain(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if kind := _looks_like(text):
        raise UserError(f"{path} looks like {kind}, not like a prompt a line: name it so, or take out what is no prompt")
    for place, line in _lines(text):
        if "\r" in line.strip():
            raise UserError(f"{path}, {place}: lines end with \\r alone: save it with \\n or \\r\\n at the ends")
        yield place, {COLUMNS[0]: line.strip()}


def _json_lines(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if text.lstrip()[:1] == "[":
        raise UserError(f"{path} is one array, not an object a line: name it .json")
    for place, line in _lines(text):
        yield place, _row(_json(line, f"{path}, {place}"), f"{path}, {place}")


def _json_array(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        value = _json(text, path) if text.strip() else []
    except UserError as error:
        raise UserError(f"{error}. Where it holds an object a line, name it .jsonl") from error
    if isinstance(value, dict) and isinstance(value.get("images"), list) and (rows := _captioned(value, path)):
        yield from rows
        return
    if isinstance(value, dict) and value and value.keys() <= STYLES and all(isinstance(v, list) for v in value.values()):
        value = [_row(item, f"{path}, {style}") | {"style": style} for style, listed in value.items() for item in listed]
    if isinstance(value, dict):
        lists = [k for k, v in value.items() if isinstance(v, list)]
        if len(lists) != 1:
            many = f"{len(lists)} lists ({', '.join(lists[:8])})" if lists else "no list"
            raise UserError(f"{path} is an object with {many}: write one array, of strings or of objects with a key 'prompt'")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise UserError(f"{path} holds {json.dumps(value)[:40]}: write an array, of strings or of objects with a key 'prompt'")
    for number, item in enumerate(value, 1):
        yield f"item {number}", _row(item, f"{path}, item {number}")


def _captioned(value: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a file of captions, one a picture, as COCO has it (images, annotations) or Karpathy's splits of COCO and Flickr30k (images with sentences): the first caption
    as `caption`, all of them as `captions`, and `file_name` and `split`. None where the file is of another layout."""
    images = [image for image in value["images"] if isinstance(image, dict)]
    told: dict[Any, list[str]] = {}
    for note in value.get("annotations") or ():
        if isinstance(note, dict) and isinstance(note.get("caption"), str):
            told.setdefault(note.get("image_id"), []).append(note["caption"])
    rows = []
    for number, image in enumerate(images, 1):
        sentences = [s.get("raw") for s in image.get("sentences") or () if isinstance(s, dict)]
        captions = [text.strip() for text in sentences or told.get(image.get("id"), []) if isinstance(text, str) and text.strip()]
        name = "/".join(str(part) for part in (image.get("filepath"), image.get("file_name") or image.get("filename")) if part)
        if captions and name:
            rows.append(
                (f"picture {number}", {"caption": captions[0], "captions": captions, "file_name": name, "split": image.get("split", "")})
            )
    if rows and len(rows) < len(images) and not told:
        raise UserError(f"{path}: {len(images) - len(rows)} of {len(images)} pictures have no caption")
    return rows


def _separated(separator: str) -> Callable[[str, str], Iterator[tuple[str, dict[str, Any]]]]:
    """A reader of cells parted by `separator`, the first line naming them. Where a .tsv's quotes cannot be those of CSV, they are letters."""

    def parse(text: str, path: str, quoting: int) -> Iterator[tuple[str, dict[str, Any]]]:
        header: list[str] = []
        cells = csv.reader((line + "\n" for line in text.split("\n")), delimiter=separator, strict=True, quoting=quoting)
        try:
            for row in cells:
                place = f"line {cells.line_num}"
                if not any(cell.strip() for cell in row):
                    continue
                if not header:
                    header = row
                    if len(named := [c for c in row if c.strip()]) > len(set(named)):
                        raise UserError(f"{path} names a column twice: {', '.join(row)}")
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, {place}: {len(row)} cells, but the first line names {len(header)}: put text with a {SEPARATORS[separator].split()[0].removesuffix('s')} in it between double quotes"
                    )
                yield place, dict(zip(header, row))
        except csv.Error as error:
            raise UserError(f"{path}, line {cells.line_num}: not a table that can be read ({error})") from error

    def read(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        first = next((line for _, line in _lines(text)), "")
        if JSON_BEGINS.match(first):
            raise UserError(f"{path} looks like .json or .jsonl, not like a table: name it so")
        if separator not in first and (other := next((name for letter, name in SEPARATORS.items() if letter in first), None)):
            raise UserError(f"{path}: the first line is parted by {other}, not by {SEPARATORS[separator]}: name it so, or save it so")
        if separator == ",":
            return parse(text, path, csv.QUOTE_MINIMAL)
        try:
            rows = list(parse(text, path, csv.QUOTE_MINIMAL))
        except UserError:
            return parse(text, path, csv.QUOTE_NONE)
        if any("\t" in cell or "\n" in cell for _, row in rows for cell in row.values()):  # from one quote to another, lines away
            with suppress(UserError):
                rows = list(parse(text, path, csv.QUOTE_NONE))
        return iter(rows)

    return read


def _parquet(file: Path, path: str, pictures: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path}: .parquet is read with pyarrow, which is not installed: pip install 'rlstitch[parquet]', or save the file as .jsonl"
        ) from error
    try:
        source = parquet.ParquetFile(file)
        columns = [f.name for f in source.schema_arrow if pictures or "binary" not in str(f.type)]  # pictures stored beside their prompts
        rows = source.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


FORMATS: dict[str, Callable[[Any, str], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
