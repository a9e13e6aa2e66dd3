"""A job's results appear all at once, in the place of earlier ones, and never in the place of anything else."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlstitch.distributed import Engine
from rlstitch.paths import ready
from rlstitch.types import UserError


def foreign(folder: Path, names: str, mark: str) -> str:
    """What lies at the folder of a job's results and was not written by such a job: it is never removed. '' where there is nothing.

    names: a pattern of what a job writes, below the folder; mark: the file without which a folder is no job's.
    """
    if not folder.exists():
        return ""
    if folder.is_symlink() or not (folder / mark).is_file():
        return "something else than earlier results"
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    return next((name for name in found if not re.fullmatch(names, name)), "")


def fault(out: str, name: str, names: str, mark: str) -> str:
    """Why results of that name cannot be written; '' where they can."""
    folder = Path(out) / name
    strange = foreign(folder, names, mark)
    return (
        f"'name': {folder} holds {strange}, which would be replaced, and no job of this kind has written it: choose another name or out"
        * bool(strange)
    )


@contextmanager
def replaced(folder: Path, names: str, mark: str, engine: Engine | None = None) -> Iterator[Path]:
    """A folder to write results into, that of all ranks, which takes the place of `folder` when the block ends without an exception."""
    main, by_main = engine is None or engine.is_main, (lambda action: action()) if engine is None else engine.by_main
    own: list[tempfile.TemporaryDirectory] = []

    def begun() -> str:
        ready(folder).parent.mkdir(parents=True, exist_ok=True)
        own.append(tempfile.TemporaryDirectory(prefix=".results-", dir=folder.parent))
        (Path(own[0].name) / "new").mkdir()
        return own[0].name

    def ended() -> str:
        if strange := foreign(folder, names, mark):
            raise UserError(f"{folder} holds {strange} by now, which is not replaced: start again with another name")
        if folder.exists():
            os.replace(folder, Path(own[0].name) / "old")
        os.replace(Path(own[0].name) / "new", folder)
        return ""

    try:
        yield Path(by_main(begun)) / "new"
        by_main(ended)
    finally:
        if main and own:
            own[0].cleanup()
