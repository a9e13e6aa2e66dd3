"""How a run ends: with a table, or early with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlstitch.asking import PartError
from rlstitch.distributed import AgreedError, Engine
from rlstitch.protocols import naming
from rlstitch.scoring import NoScore
from rlstitch.telling import means_table


@contextmanager
def kept(engine: Engine, step: Callable[[], int], save: Callable[[], None]) -> Iterator[None]:
    """An exception inside a part, or an update without a score, ends the run with a checkpoint of the last whole update; what was begun is not learned from."""
    try:
        with naming():
            yield
    except (NoScore, PartError) as error:
        if not step() or not (engine.world == 1 or isinstance(error, NoScore | AgreedError)):
            raise  # ranks that have left at different places cannot write together
        engine.forget()
        save()
        if isinstance(error, NoScore):
            raise
        raise PartError(f"{error}. Update {step()} is kept: the same command goes on from there") from error


def keep_alone(engine: Engine, step: int, save: Callable[[], None]) -> str:
    """Where one rank fell over by itself: write the last whole update, `step`, if there is one and no other rank is needed for it. -> where a start goes on."""
    engine.forget()
    if alone := step and engine.world == 1:
        save()
    return ". The same command goes on from " + (f"update {step}" if alone else "the last checkpoint")


def run_table(summary: Mapping[str, Any], unit: str, report: Path) -> str:
    """The last lines of a run: means, what it took, how much of that was evaluation, and where the report is."""
    hours = {k: v for k, v in summary["device_hours"].items() if k != "stitching"}
    spent = sum(hours.values())
    share = hours["eval"] / spent if spent else 0.0
    took = f"{spent:.3g} {unit.replace('_', '-')} for {summary['steps']} updates" + (
        f", and {summary['device_hours']['stitching']:.3g} for the value models before" if summary["device_hours"]["stitching"] else ""
    )
    told = f"{share:.0%} of the time" + (
        " (fewer prompts with evaluation.max_prompts, or less often with evaluation.every)" if share > 0.5 else ""
    )
    return means_table(summary["eval"], ("device-hours", took), ("evaluation", told), ("report", str(report)))
