"""What the benchmark scripts share: arguments and results on disk; timing and peak memory are rlstitch.metrics'."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rlstitch.cli import keep_freed_memory
from rlstitch.config import hardware
from rlstitch.files import write_json
from rlstitch.metrics import interleaved, peak_megabytes

__all__ = ["RESULTS", "arguments", "interleaved", "peak_megabytes", "save", "spread"]

RESULTS = Path(__file__).parent / "results"


def arguments(defaults: dict[str, str]) -> dict[str, str]:
    """key=value arguments over defaults; an unknown key ends the script. Memory is kept as the launchers keep it."""
    keep_freed_memory()
    given = dict(a.partition("=")[::2] for a in sys.argv[1:])
    if odd := set(given) - set(defaults):
        sys.exit(f"unknown argument {', '.join(odd)}; there are {', '.join(defaults)}")
    return defaults | given


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and, of several, standard deviation, as a table shows them."""
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def save(name: str, result: dict[str, Any]) -> None:
    """results/<name>.json, with the machine's name."""
    told = [a for a in sys.argv[1:] if not a.startswith("out=")]  # where the runs lie says nothing
    result = {"hardware": hardware(), "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *told]), **result}
    write_json(RESULTS / f"{name}.json", result)
    print(json.dumps(result, indent=1))
