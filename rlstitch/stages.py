"""Staged schedules: a run cut into parts, each with its own oracle, stop and prompts (UniPic 2.0 trains one reward after the other)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlstitch.data import UpdateStream
from rlstitch.schema import RunConfig
from rlstitch.stops import Stop
from rlstitch.types import Oracle


@dataclass
class Stage:
    """What differs between the parts of a run, until update `end`."""

    name: str
    end: int
    oracle: Oracle | None  # None where the algorithm asks no reward
    stop: Stop
    stream: UpdateStream


def expand(config: RunConfig) -> list[RunConfig]:
    """One whole config a stage; the config itself where it has none."""
    if not config.stages:
        return [config]
    return [
        replace(
            config,
            stages=[],
            updates=stage.updates,
            oracle=stage.oracle or config.oracle,
            stop=stage.stop or config.stop,
            data=replace(config.data, prompts=stage.prompts or config.data.prompts),
        )
        for stage in config.stages
    ]


def names(config: RunConfig) -> list[str]:
    """The stages' names; a nameless one is called by its place."""
    return [stage.name or str(k) for k, stage in enumerate(config.stages, 1)] or [""]


def at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that update `step` (0-based) belongs to; the last one at the end of the run."""
    return next((stage for stage in stages if step < stage.end), stages[-1])
