"""SIGINT and SIGTERM, noted while a step is under way and acted on after it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Interrupted(Exception):
    """A signal arrived, on this rank (its number is in `caught`) or on another one; a checkpoint was written. `code` is the exit status to leave with."""

    def __init__(self, caught: Sequence[int]):
        self.code = 128 + (caught[0] if caught else signal.SIGTERM)


@contextmanager
def noted(caught: list[int]) -> Iterator[None]:
    """Note SIGINT and SIGTERM instead of dying in mid-step."""
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
