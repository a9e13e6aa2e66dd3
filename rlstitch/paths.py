"""Names of files and folders as people give them: what they stand for, what is there, and whether results can go there. Nothing that is there is opened or changed."""

from __future__ import annotations

import glob
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from rlstitch.types import UserError


def home(path: str | Path) -> Path:
    """A path with a leading `~` as the home folder that it stands for. Raises UserError where no file can be called that, or be looked for there."""
    try:
        found = Path(path).expanduser()
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, links in a circle, no such user
        raise UserError(f"{str(path)[:80]!r} cannot be looked for ({getattr(error, 'strerror', None) or error})") from error
    return found


def matching(pattern: str, what: str = "file") -> list[str]:
    """The files and folders at a path or a pattern, in the order of their names: *, ? and [...] as in a shell, {00..12} as WebDataset has it. Raises UserError where there are
    none, or one of a range is not there."""
    if what_is(home(pattern)):
        return [str(home(pattern))]
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = range(int(found[1]), int(found[2]) + 1)
        return [f for k in numbers for f in matching(f"{pattern[: found.start()]}{k:0{len(found[1])}}{pattern[found.end() :]}", what)]
    if not (files := sorted(glob.glob(str(home(pattern))))):
        raise UserError(f"no {what} at '{pattern}': name one, or a pattern such as folder/*.tar or folder/{{00000..00099}}.tar")
    return files


def what_is(path: str | Path) -> str:
    """What is at a path, in words: `a file`, `a folder`, `a pipe`, ...; '' where nothing is."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "a link that leads nowhere" if os.path.islink(path) else ""
    named = ((stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in named if test(mode)), "a device")


def below(out: str | Path, name: str) -> Path:
    """The folder out/name that a job's results go to. Raises UserError where that is a file, lies below one, cannot be written to, or where a link in it leads out."""
    root = home(out)
    folder = root / name
    try:
        there = next(p for p in (folder, *folder.parents) if what_is(p))
        if what_is(there) != "a folder":
            raise UserError(f"the results would go to {folder}, and {there} is {what_is(there)}: choose another name or out")
        if not folder.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"the results would go to {folder}, which a link leads to {folder.resolve()}, out of {out}: choose another name"
            )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        why = getattr(error, "strerror", None) or error
        raise UserError(f"no folder {folder} can be made ({why}): choose another name or out") from error
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the results would go to {folder}, and nothing may be written to {there}: choose another out")
    return folder


def ready(folder: Path) -> Path:
    """The folder of a job's results, tried before hours of work: raises UserError where nothing can be written to it. What was made for that is gone again."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the results would go to {folder}, and nothing can be written there ({error.strerror}): choose another out"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    return folder
