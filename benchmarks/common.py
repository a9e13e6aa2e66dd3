"""What the benchmark scripts share: arguments and results on disk; timing and peak memory are rlstitch.metrics'."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlstitch.cli import keep_freed_memory
from rlstitch.config import hardware
from rlstitch.files import write_json, write_text
from rlstitch.metrics import TRAINING, interleaved, peak_megabytes

__all__ = ["RESULTS", "arguments", "interleaved", "peak_megabytes", "save", "row", "spread", "table", "train", "training_hours"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def arguments(defaults: dict[str, str]) -> dict[str, str]:
    """key=value arguments over defaults; an unknown key ends the script. Memory is kept as the launchers keep it."""
    keep_freed_memory()
    given = dict(a.partition("=")[::2] for a in sys.argv[1:])
    if odd := set(given) - set(defaults):
        sys.exit(f"unknown argument {', '.join(odd)}; there are {', '.join(defaults)}")
    return defaults | given


def row(name: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row `key` of results/<name>.json, made where it is not there and kept at once, with its machine: seeds may be run on different days."""
    file = RESULTS / f"{name}.json"
    kept = lambda: json.loads(file.read_text()) if file.exists() else {"rows": {}}  # noqa: E731
    if (known := kept()["rows"].get(key)) is not None:
        return known
    made = make() | {"hardware": hardware()}
    held = kept()  # once more: other seeds may have been kept meanwhile
    write_json(file, held | {"rows": held["rows"] | {key: made}})
    return made


def train(recipe: str, name: str, out: Path, *overrides: str) -> dict:
    """Run (or resume) one training run in a process of its own; -> its summary."""
    summary = out / name / "summary.json"
    if not summary.exists():
        command = [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            f"recipe={recipe}",
            f"name={name}",
            f"out={out}",
            "logging.wandb=off",
            *overrides,
        ]
        subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(summary.read_text())


def training_hours(hours: dict[str, float]) -> float:
    """Device-hours by phase, of a summary or of a row of the log, added up without evaluation and without the one-off cost of the value models."""
    return sum(hours.get(k, 0.0) for k in TRAINING)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and, of several, standard deviation, as a table shows them."""
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> None:
    """results/<name>.md: a Markdown table, and a line of what it was made with below it."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    write_text(RESULTS / f"{name}.md", "\n".join([*lines, *(["", note] if note else [])]) + "\n")


def save(name: str, result: dict[str, Any]) -> None:
    """results/<name>.json, with the machine's name."""
    told = [a for a in sys.argv[1:] if not a.startswith("out=")]  # where the runs lie says nothing
    result = {"hardware": hardware(), "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *told]), **result}
    write_json(RESULTS / f"{name}.json", result)
    print(json.dumps(result, indent=1))
