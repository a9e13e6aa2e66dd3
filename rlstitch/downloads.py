"""How a download is shown: one line, and one bar that a log file can hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlstitch.telling import is_main, progress


class Silent(tqdm):
    """The client draws several bars; ours is one, and readable in a log file."""

    def __init__(self, *args: Any, **options: Any):
        options.pop("name", None)
        super().__init__(*args, **(options | {"disable": True}))


def amount(files: dict[str, int]) -> str:
    """`5 files, 23.8 GB`."""
    total = sum(files.values())
    return f"{len(files)} file{'s' * (len(files) > 1)}, " + (f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.1f} MB")


@contextmanager
def shown(name: str, blobs: Path, total: int) -> Iterator[None]:
    """A bar of how much has come, drawn by the rank that speaks, whichever of this machine it is that fetches."""
    if not is_main():
        yield
        return

    def size() -> int:
        found = 0
        for file in blobs.glob("*"):
            with suppress(OSError):  # it has just got its final name
                found += file.stat().st_size
        return found // 10**6

    start, bar, done = size(), progress(max(1, total // 10**6), name, "megabyte"), threading.Event()

    def look() -> None:
        seen = start
        while not done.wait(1.0):
            now = max(seen, size())
            bar.update(now - seen)
            seen = now

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        bar.close()
