"""What a run writes while it works: metrics.jsonl, W&B, progress bars, sample grids, the clock of device-hours."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PHASES = ("rollout", "oracle", "update", "refresh", "eval")


class Clock:
    """Device-hours by phase, summed over ranks that work in step; it goes on from a checkpoint."""

    def __init__(self, world: int, hours: dict[str, float] | None = None, stitching: float = 0.0):
        self.world, self.unit = world, "gpu_hours" if torch.cuda.is_available() else "cpu_hours"
        self.hours = {phase: 0.0 for phase in PHASES} | (hours or {})
        self.stitching = stitching  # the one-off cost of the value models in use, shown as an offset

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.hours[name] += (time.perf_counter() - started) * self.world / 3600

    @property
    def training(self) -> float:
        return sum(self.hours[p] for p in ("rollout", "oracle", "update", "refresh"))


class Log:
    """metrics.jsonl (one JSON object a line; rows after a resumed step are dropped first) and W&B, on the main rank only."""

    def __init__(self, run: Path, *, active: bool, start_step: int, wandb_mode: str, project: str, x_axis: str, config: dict[str, Any]):
        self.path, self.active, self.x_axis, self.wandb = run / "metrics.jsonl", active, x_axis, None
        if not active:
            return
        kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= start_step] if self.path.exists() else []
        self.path.write_text("".join(line + "\n" for line in kept))
        mode = ("online" if os.environ.get("WANDB_API_KEY") else "offline") if wandb_mode == "auto" else wandb_mode
        if mode != "off":
            import wandb

            self.wandb = wandb.init(
                project=project,
                name=run.name,
                id=run.name.replace("/", "-"),
                resume="allow",
                dir=str(run),
                mode=mode,
                config=config,
                settings=wandb.Settings(silent=True),
            )
            self.wandb.define_metric(x_axis)
            self.wandb.define_metric("*", step_metric=x_axis)

    def write(self, row: dict[str, Any]) -> None:
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            self.wandb.log(_flat(row))

    def image(self, name: str, path: Path, hours: float) -> None:
        if self.active and self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(str(path)), self.x_axis: hours})

    def close(self) -> None:
        if self.active and self.wandb is not None:
            self.wandb.finish()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in row.items():
        out.update(_flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, path)


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


def interleaved(cases: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of each case, the cases taken in turn so that a busy moment hits them alike; one warm-up round."""
    seconds: dict[Any, list[float]] = {name: [] for name in cases}
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
