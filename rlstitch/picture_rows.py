"""Rows of pictures that are read when they are asked for: in files, in shards, or as bytes; decoded by threads, a batch ahead of whoever works on them.

Functions that recipes name under `images` list such rows and give all pictures at once; `rows_of` gives the list instead, so that a set need not fit into memory.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rlstitch.paths import what_is
from rlstitch.telling import say
from rlstitch.types import UserError

SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Member:
    """A picture inside a file: `size` bytes from `offset` on."""

    file: Path
    offset: int
    size: int

    def content(self) -> bytes:
        with self.file.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


Source = Path | bytes | Member  # of a picture
Row = tuple[Source, str, Any]  # a picture, what it is called, its prompt or its captions


def some(names: Iterable[str]) -> str:
    """The first names of many."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + ("..." if len(names) > SHOWN else "")


def _rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """The first frame in RGB as it is to be seen, and what had to be done for that. 16-bit numbers are scaled, 32-bit ones read as 0..65535, floats as 0..1."""
    notes = ["animated, its first frame"] if getattr(image, "n_frames", 1) > 1 else []
    if image.getexif().get(0x0112, 1) != 1:  # orientation
        notes.append("turned as its EXIF says")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        top, values = (1.0 if image.mode == "F" else 65535.0), np.asarray(image).astype(np.float64)
        if not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"{values.min():g} to {values.max():g}, where 0 to {top:g} is read: save it with 8 or 16 bits")
        image = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("with transparency, put on white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), notes


_ear = threading.local()  # `words`: what Pillow says of the picture that this thread reads


@contextmanager
def _listening() -> Iterator[None]:
    """Warnings of a thread that reads a picture are that picture's; others are shown as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        once: set[str] = set()

        def hear(message: Any, category: Any, *place: Any, **more: Any) -> None:
            if (words := getattr(_ear, "words", None)) is not None:
                words.append(str(message).split(". ")[0][:100])
            elif str(message) not in once:
                once.add(str(message))
                shown(message, category, *place, **more)

        warnings.showwarning = hear
        yield


def _decoded(source: Source, size: tuple[int, int]) -> tuple[Tensor, list[str]] | str:
    """A picture [3, H, W] uint8 and what was changed in it, or why it cannot be read."""
    if isinstance(source, Path) and (there := what_is(source)) != "a file":  # opening a pipe would wait for ever
        return there or "not there"
    _ear.words = []
    try:
        content = source.content() if isinstance(source, Member) else source
        empty = not (content if isinstance(content, bytes) else content.stat().st_size)
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
            picture, notes = _rgb(image)
            fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        notes += sorted({f"read with a word from Pillow ({word})" for word in _ear.words})
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1), notes
    except UnidentifiedImageError:
        return "empty" if empty else "no picture"
    except Exception as error:  # Pillow raises many kinds for a damaged file, and one for a picture that is too large to be meant
        return f"{type(error).__name__}: {error}"
    finally:
        _ear.words = None


class Reader:
    """Reads pictures to `size`, a width and a height, by threads; keeps count of those that it cannot read, and of what was changed in others.

    where: what the pictures are under, for messages. Use it as a context manager.
    """

    def __init__(self, size: tuple[int, int], where: str, skip_unreadable: bool):
        self.size, self.where, self.skip = size, where, skip_unreadable
        self.asked, self.bad = 0, 0
        self.names: list[str] = []
        self.noted: dict[str, tuple[int, list[str]]] = {}

    def __enter__(self) -> Reader:
        self._hearing = _listening()
        self._hearing.__enter__()
        self._pool = ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1)), "pictures")
        return self

    def __exit__(self, *fault: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._hearing.__exit__(*fault)

    def begin(self, sources: Iterable[Source]) -> list[Future]:
        """Start to read; `end` gives what has come of it."""
        return [self._pool.submit(_decoded, source, self.size) for source in sources]

    def end(self, begun: Sequence[Future], names: Iterable[Path | str]) -> list[Tensor | None]:
        """Pictures [3, H, W] uint8 in the order of `begin`; None for one that cannot be read where that is allowed. Else a UserError that names those of this call."""
        out: list[Tensor | None] = []
        bad: list[str] = []
        for future, called in zip(begun, names):
            name, found = getattr(called, "name", called), future.result()
            out.append(None if isinstance(found, str) else found[0])
            if isinstance(found, str):
                bad.append(f"{name[:100]} ({found})")
                continue
            for note in found[1]:
                count, listed = self.noted.get(note, (0, []))
                self.noted[note] = count + 1, [*listed, name][: SHOWN + 1]
        self.asked, self.bad, self.names = self.asked + len(out), self.bad + len(bad), [*self.names, *bad][: SHOWN + 1]
        if bad and not self.skip:
            raise UserError(
                f"{len(bad)} of {len(out)} pictures under {self.where} cannot be read: {some(bad)}. Mend or remove them, or set skip_unreadable: true"
            )
        return out

    def tell(self) -> None:
        """What was left out and what was changed, once."""
        lines = [f"left out {self.bad} unreadable pictures of {self.asked}: {some(self.names)}"] if self.bad else []
        say(
            *lines,
            *(f"{count} of {self.asked} pictures under {self.where} {note}: {some(names)}" for note, (count, names) in self.noted.items()),
        )


def read_pictures(files: Mapping[Source, Path | str], size: tuple[int, int], where: str, skip_unreadable: bool) -> dict[Source, Tensor]:
    """Pictures [3, H, W] uint8 of `size`, a width and a height, of sources and what they are called; those that cannot be read are an error, or left out if told
    so. What was changed in them is said once."""
    with Reader(size, where, skip_unreadable) as reader:
        found = reader.end(reader.begin(files), files.values())
    reader.tell()
    good = {source: picture for source, picture in zip(files, found) if picture is not None}
    if not good:
        raise UserError(f"none of the {len(files)} pictures under {where} can be read")
    return good


@dataclass
class PictureRows:
    """Rows of pictures, to be read to `size`, a width and a height. said: of the prompts that are missing."""

    rows: list[Row]
    size: tuple[int, int]
    where: str
    skip_unreadable: bool = False
    said: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[Any]:
        return [prompt for *_, prompt in self.rows]

    def digest(self, rows: range) -> str:
        """Hash of what the files of some rows hold, and of the size that they are read to."""
        digest = hashlib.sha256(f"{self.size}".encode())
        for k in rows:
            source = self.rows[k][0]
            try:
                content = source.read_bytes() if isinstance(source, Path) else source if isinstance(source, bytes) else source.content()
            except OSError as error:  # which reading it will tell
                content = str(error).encode()
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def reader(self) -> Reader:
        return Reader(self.size, self.where, self.skip_unreadable)

    def begin(self, reader: Reader, rows: Iterable[int]) -> list[Future]:
        return reader.begin(self.rows[k][0] for k in rows)

    def end(self, reader: Reader, begun: Sequence[Future], rows: Iterable[int]) -> list[Tensor | None]:
        return reader.end(begun, (self.rows[k][1] for k in rows))

    def tell_bare(self, kept: int | None = None, bare: int | None = None) -> None:
        """How many pictures have no prompt, where some have and some that were looked for were not found."""
        bare = sum(not prompt for prompt in self.prompts) if bare is None else bare
        if bare and self.said is not None:
            say(
                f"{bare} of {len(self) if kept is None else kept} pictures of {self.where} have no prompt"
                + f" ({self.said})" * bool(self.said)
            )

    def whole(self) -> tuple[Tensor, list[Any]]:
        """All pictures uint8 [N, 3, H, W] and their prompts."""
        good = read_pictures({source: name for source, name, _ in self.rows}, self.size, self.where, self.skip_unreadable)
        kept = [(good[source], prompt) for source, _, prompt in self.rows if source in good]
        self.tell_bare(len(kept), sum(not prompt for _, prompt in kept))
        return torch.stack([picture for picture, _ in kept]), [prompt for _, prompt in kept]


def pictures_at_once(listing: Callable[..., PictureRows]) -> Callable[..., tuple[Tensor, list[Any]]]:
    """A function that gives all pictures, uint8 [N, 3, H, W], and the N prompts, made of one that lists them, which is kept for `rows_of`. Captions of a picture may be several."""

    @wraps(listing)
    def whole(*arguments: Any, **options: Any) -> tuple[Tensor, list[Any]]:
        return listing(*arguments, **options).whole()

    prompts = list[list[str]] if listing.__name__.endswith("all_captions") else list[str]
    whole.__annotations__ = {**listing.__annotations__, "return": tuple[Tensor, prompts]}
    whole.listing = listing  # type: ignore[attr-defined]
    return whole


def rows_of(function: Callable[..., Any]) -> Callable[..., PictureRows] | None:
    """What lists the rows of a function that gives pictures; None where it cannot."""
    return getattr(function, "listing", None)
