"""Cutting a diffusers transformer between two blocks, by its own forward: what runs before the first block and after the last is never written down here.

A cut is taken by letting the model's forward run until block k has returned, and leaving it there; it is resumed by calling the same forward with blocks 1..k
answering at once, the last of them with what was kept. Only three things are known of an architecture: which module lists its blocks stand in, how many tensors a
block of each list returns, and which of them is the picture. Stand-ins take a block's place in its list for the call, so that what sits on the blocks themselves
(compiled code, hooks of ZeRO or of offloading) stays there. The forward is left by an exception: hooks behind the whole transformer do not run, and one that holds
weights there must not be cut (under ZeRO 3 values have copies of their blocks). One cut of a transformer at a time; a cut runs without activation checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class Lists(Protocol):
    """What is known of an architecture's blocks: the module lists they stand in, how many tensors a block of each returns (`STREAMS`), lists of refiners that run
    ahead of them (`BEFORE`), and the modules that run behind them (`TAIL`)."""

    LISTS: Sequence[str]
    STREAMS: Sequence[int]
    BEFORE: Sequence[str]
    TAIL: Sequence[str]


class _Reached(Exception):
    """The last block that was asked for has returned."""


class _StandIn(nn.Module):
    def __init__(self, answer: Callable[..., Any]):
        super().__init__()
        self.forward = answer


Place = tuple[nn.ModuleList, str]


def places(model: nn.Module, lists: Sequence[str]) -> list[Place]:
    """Where each block stands, in the order in which they run."""
    return [(getattr(model, name), key) for name in lists for key in getattr(model, name)._modules]


def blocks_of(model: nn.Module, lists: Sequence[str]) -> list[nn.Module]:
    return [group._modules[key] for group, key in places(model, lists)]


@contextmanager
def _standing_in(model: nn.Module, answers: Mapping[Place, Callable[..., Any]]) -> Iterator[None]:
    kept, checkpointing = {place: place[0]._modules[place[1]] for place in answers}, getattr(model, "gradient_checkpointing", False)
    try:
        model.gradient_checkpointing = False  # it would run a stand-in again, after it has gone
        for (group, key), answer in answers.items():
            group._modules[key] = _StandIn(answer)
        yield
    finally:
        model.gradient_checkpointing = checkpointing
        for (group, key), block in kept.items():
            group._modules[key] = block


def _streams(args: tuple, kwargs: dict[str, Any], count: int) -> tuple[Tensor, ...]:
    """What a block is called with of what it returns."""
    return tuple(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim == 3)[:count]


def _passing(streams: int) -> Callable[..., Any]:
    """A block that hands on as many tensors as a block returns; what they hold is never read."""

    def answer(*args, **kwargs):
        given = _streams(args, kwargs, streams)
        return given[0] if streams == 1 else given

    return answer


def _keeping(returned: Any, streams: int) -> Callable[..., Any]:
    """A block that gives what was kept of it. Raises ValueError where that is of other lengths than the call's: rows of a ragged batch without its longest prompt."""

    def answer(*args, **kwargs):
        kept = [tuple(t.shape) for t in (returned if isinstance(returned, tuple) else (returned,)) if t is not None]
        if not set(kept) <= (called := {tuple(t.shape) for t in _streams(args, kwargs, streams)}):
            raise ValueError(
                f"a cut holds {kept} and is resumed in a forward of {sorted(called)}: rows of it that leave out the batch's longest prompt cannot be resumed; cut them alone"
            )
        return returned

    return answer


def run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    arch: Lists,
    *,
    start: tuple[int, Any] | None = None,
    stop: int | None = None,
    see: Callable[[int, Any], None] | None = None,
) -> Any:
    """model(**inputs) from a kept cut (k, what block k returned) on, to its end, whose output is given, or until block `stop` has returned, which is given then.

    see: is shown every block's number, from 1, and what it returned.
    """
    where = places(model, arch.LISTS)
    streams = [n for name, n in zip(arch.LISTS, arch.STREAMS) for _ in getattr(model, name)]
    answers: dict[Place, Callable[..., Any]] = {}
    if start is not None:
        answers = {place: _passing(1) for place in places(model, arch.BEFORE)}
        answers |= {where[k]: _passing(streams[k]) for k in range(start[0] - 1)}
        answers[where[start[0] - 1]] = _keeping(start[1], streams[start[0] - 1])
    reached: list[Any] = []

    def watched(k: int) -> Callable[..., Any]:
        group, key = where[k - 1]
        own = answers.get((group, key)) or group._modules[key]

        def answer(*args, **kwargs):
            returned = own(*args, **kwargs)
            if see is not None:
                see(k, returned)
            if k == stop:
                reached.append(returned)
                raise _Reached
            return returned

        return answer

    for k in range(1, len(where) + 1):
        if see is not None or k == stop:
            answers[where[k - 1]] = watched(k)
    with _standing_in(model, answers):
        try:
            return model(**inputs)
        except _Reached:
            return reached[0]


def truncated(model: nn.Module, arch: Lists, blocks: int, *, share: bool) -> nn.Module:
    """A frozen copy of the model up to block `blocks`; later blocks and the tail are left out. It shares the model's tensors, or owns copies."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    memo |= {id(group._modules[key]): None for group, key in places(model, arch.LISTS)[blocks:]}
    memo |= {id(getattr(model, name)): nn.Identity() for name in arch.TAIL}
    out = copy.deepcopy(model, memo)
    for name in arch.LISTS:
        setattr(out, name, nn.ModuleList(block for block in getattr(out, name) if block is not None))
    out.gradient_checkpointing = False
    return out.requires_grad_(False).eval()
