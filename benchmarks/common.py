"""What the benchmark scripts share: arguments, timing, peak memory, results on disk."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rlstitch.config import hardware
from rlstitch.files import write_json

RESULTS = Path(__file__).parent / "results"


def arguments(defaults: dict[str, str]) -> dict[str, str]:
    """key=value arguments over defaults; an unknown key ends the script."""
    given = dict(a.partition("=")[::2] for a in sys.argv[1:])
    if odd := set(given) - set(defaults):
        sys.exit(f"unknown argument {', '.join(odd)}; there are {', '.join(defaults)}")
    return defaults | given


def interleaved(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each case, the cases taken in turn so that a busy moment hits them alike; one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_megabytes(case: Callable[[], Any]) -> float:
    """Most memory that one call holds at once, beyond what was held before: CUDA's own count, or the profiler's on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def save(name: str, result: dict[str, Any]) -> None:
    """results/<name>.json, with the machine's name."""
    result = {"hardware": hardware(), "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]), **result}
    write_json(RESULTS / f"{name}.json", result)
    print(json.dumps(result, indent=1))
