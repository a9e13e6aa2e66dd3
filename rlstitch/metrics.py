"""What a run writes while it works: metrics.jsonl, W&B, progress bars, sample grids, the clock of device-hours."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rlstitch.figures import plain
from rlstitch.files import replacing, write_text
from rlstitch.telling import say
from rlstitch.tracker import Tracker

TRAINING = ("rollout", "oracle", "update", "refresh", "wait", "checkpoint")
PHASES = ("setup", *TRAINING, "eval")


class Clock:
    """Device-hours by phase: all the wall time from its making on, times the ranks, each of which holds a device that long. It goes on from a checkpoint.

    A phase within another one counts by itself. `setup` is what comes before `begin`; what lies in no phase after it is `wait`: for other ranks above all. One
    device a rank is counted; a second one that a reward has for itself is not, nor is work that a kill undid.
    """

    def __init__(self, world: int):
        self.world, self.unit = world, "gpu_hours" if torch.cuda.is_available() else "cpu_hours"
        self.stitching = 0.0  # the one-off cost of the value models in use, shown as an offset
        self.broke = ""  # the innermost phase that an exception ended
        self._hours = dict.fromkeys(PHASES, 0.0)
        self._open, self._since = ["setup"], time.perf_counter()

    def begin(self, before: dict[str, float]) -> None:
        """The run starts, or goes on after so many hours by phase."""
        for name, hours in before.items():
            self._hours[name] += hours
        self._turn()
        self._open = ["wait"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except BaseException:
            self.broke = self.broke or name
            raise
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        self._hours[self._open[-1]] += (now - self._since) * self.world / 3600
        self._since = now

    @property
    def now(self) -> str:
        """The phase that is under way."""
        return self._open[-1]

    @property
    def hours(self) -> dict[str, float]:
        """By phase, until now."""
        self._turn()
        return dict(self._hours)

    @property
    def row(self) -> dict[str, dict[str, float]]:
        """`hours` as the log has them, with `total`: training and the one-off cost of the value models, not evaluation."""
        hours = self.hours
        return {self.unit: {"total": sum(hours[p] for p in TRAINING) + self.stitching, **hours}}


class Log:
    """metrics.jsonl (one JSON object a line; rows after a resumed step are dropped first) and W&B, on the main rank only."""

    def __init__(self, run: Path, *, active: bool, start_step: int, wandb_mode: str, project: str, x_axis: str, config: dict[str, Any]):
        self.path, self.active = run / "metrics.jsonl", active
        if not active:
            return
        found, lost = _rows(self.path)
        if lost:
            say(f"{self.path}: {lost} row{'s' * (lost > 1)} cut or damaged, left out")
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in found if row["step"] <= start_step))
        self.tracker = Tracker(run, mode=wandb_mode, project=project, x_axis=x_axis, config=config)

    def write(self, row: dict[str, Any]) -> None:
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(plain(row), allow_nan=False) + "\n")
            self.tracker.log(row)

    def image(self, name: str, path: Path, hours: float) -> None:
        if self.active:
            self.tracker.image(name, path, hours)

    def close(self) -> None:
        if self.active:
            self.tracker.close()


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a log that may be damaged, and how many lines are none: cut, or without their step."""
    rows: list[dict[str, Any]] = []
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.exists() else []
    for line in lines:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows, len(lines) - len(rows)


def read(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, without those that are damaged."""
    return _rows(run / "metrics.jsonl")[0]


def to_image(picture: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1], clamped to it, as eight bits a channel."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images: Tensor, captions: list[str], path: Path, *, columns: int = 4, side: int = 160) -> None:
    """A PNG of pictures [N, 3, H, W] in [0, 1] with a caption under each, written under a temporary name and renamed.

    A caption is a prompt, of which three lines are shown, and, behind " | ", pairs of a name and its score, all of which are.
    """
    line, texts = 12, [_caption(c, side // 6) for c in captions]
    height = side + max(map(len, texts), default=0) * line + 10
    sheet = Image.new("RGB", (columns * (side + 8) + 8, -(-len(images) // columns) * height + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (image, lines) in enumerate(zip(images, texts)):
        x, y = 8 + k % columns * (side + 8), 8 + k // columns * height
        sheet.paste(to_image(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for n, text in enumerate(lines):
            draw.text((x, y + side + 2 + n * line), text, fill="black")
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _caption(text: str, width: int, most: int = 3) -> list[str]:
    """Lines under a picture: the prompt, cut after `most` of them, then its scores, a name never parted from its number."""
    prompt, scores = text.rsplit(" | ", 1) if " | " in text else (text, "")
    lines, words = _wrap(prompt.split(), width), scores.split()
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: width - 3] + "..."]
    return lines + (_wrap([" ".join(pair) for pair in zip(words[::2], words[1::2])], width) if words else [])


def _wrap(pieces: list[str], width: int) -> list[str]:
    lines = [""]
    for piece in pieces:
        if len(lines[-1]) + len(piece) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".strip()
    return lines


def peak_memory_mb() -> float:
    """Peak memory of this process: the accelerator's where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def interleaved(
    cases: dict[Any, Callable[[], Any]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = True,
    most: float = math.inf,
) -> dict[Any, float]:
    """Median seconds of each case, the cases taken in turn so that a busy moment hits them alike; one warm-up round where it is wanted, and no further round once
    `most` seconds have gone. clock: by default the wall's; a process' own time says more of one thread on a shared core."""
    seconds: dict[Any, list[float]] = {name: [] for name in cases}
    began = time.perf_counter()
    for round_ in range(repeats + warm):
        for name, case in cases.items():
            started = clock()
            case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warm:
                seconds[name].append(clock() - started)
        if round_ >= warm and time.perf_counter() - began > most:
            break
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_megabytes(case: Callable[[], Any]) -> float:
    """Most memory that one call holds at once, beyond what was held before: CUDA's own count, or the CPU allocator's by the profiler's events."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case()
    events = [
        e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"
    ]  # a trace file of a large case takes gigabytes
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
