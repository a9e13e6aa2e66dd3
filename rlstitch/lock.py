"""One process trains in a run folder at a time: a lock that the operating system holds, and lets go of when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from rlstitch.telling import say
from rlstitch.types import UserError

LOCK = ".lock"


def refuse_if_held(folder: Path) -> None:
    """Raises UserError where another process trains in the folder; writes nothing."""
    if (folder / LOCK).exists():
        with (folder / LOCK).open() as file:
            _flock(file, fcntl.LOCK_SH, folder)


@contextmanager
def held(folder: Path, by_main: Callable[[Callable[[], str]], str]) -> Iterator[None]:
    """Hold the folder's lock. `by_main` runs a function on the main rank and brings its UserError to all; raises that where another process has the lock."""
    files: list[IO[bytes]] = []

    def take() -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.append((folder / LOCK).open("ab+", buffering=0))
            _flock(files[0], fcntl.LOCK_EX, folder, patience=1.0)
            files[0].truncate(0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().astimezone().isoformat(" ", "seconds")}
            files[0].write(f"{json.dumps(holder)}\n".encode())
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written ({error}): choose another with out=FOLDER or name=NAME") from error
        return ""

    try:
        by_main(take)
        yield
    finally:
        for file in files:  # the file stays: to remove it would let two others lock two files of one name
            file.close()


def _flock(file: IO[Any], kind: int, folder: Path, patience: float = 0.0) -> None:
    """Lock at once, or within `patience` seconds: one who only looks has the lock for a moment, too."""
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise UserError(
                    f"{folder} is in use: {_holder(file)}. Wait for it or stop it, or give this run a folder of its own with name=NAME"
                ) from error
            time.sleep(0.05)
        except OSError as error:
            say(f"{folder}: this file system keeps no locks ({error.strerror}); see to it that no other run writes there")
            return None


def _holder(file: IO[Any]) -> str:
    file.seek(0)
    try:
        told = json.loads(file.read())
        return f"process {told['pid']} on {told['host']} trains there since {told['since']}"
    except (ValueError, KeyError, TypeError):  # between taking the lock and saying so
        return "another process trains there"
