"""The loop of a stitch job: it can be killed at any moment and goes on bit for bit, logs as it trains, and measures on the way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlstitch import checkpoint, resume, tracker
from rlstitch import config as cfg
from rlstitch.distributed import Engine
from rlstitch.files import write_text
from rlstitch.interrupt import Interrupted, noted
from rlstitch.metrics import Clock, Log
from rlstitch.stitch.distill import Distillation
from rlstitch.telling import progress, say

Figures = dict[str, Any]  # by sigma, of several value models by name first


class Loop:
    """One job in its folder. `source` is the checkpoint that it goes on from, None where it begins; `found` is what that says of the search before it."""

    def __init__(self, folder: Path, recipe: Any, inputs: dict[str, str]):
        self.folder, self.recipe, self.inputs = folder, recipe, inputs
        self.engine = Engine(zero_stage=0, precision="fp32", accumulation=1, micro_batch=recipe.distill.batch_size, clip_norm=1.0)
        self.unit, self._since, self.before = Clock(self.engine.world).unit, time.perf_counter(), 0.0
        self.source: Path | None = None
        self.found: dict[str, Any] = {}
        self.begun: float | None = None  # the hours at which distillation began
        self.figures: Figures = {}  # the last that were measured

    @property
    def hours(self) -> float:
        """Device-hours until now, with those of the starts before that a checkpoint has kept."""
        return self.before + (time.perf_counter() - self._since) * self.engine.world / 3600

    def add(self, seconds: float) -> None:
        """Count what was not done now but when a cache was filled."""
        self.before += seconds / 3600

    def begin(self) -> None:
        """Find where to go on, remove what an earlier start has left behind it, say so, and keep the recipe. The folder's lock must be held."""
        found = self.engine.by_main(self._tidied)
        self.source = Path(found) if found else None
        if self.source is not None:
            told = checkpoint.told(self.source)
            self.found, self.before, self.begun = told["found"], told["hours"], told["begun"]
            self.figures = told["figures"]
            say(f"{self.folder}: resumed from {self.source.name}")

    def _tidied(self) -> str:
        """What `begin` does to the folder; -> the checkpoint to go on from, '' for none."""
        checkpoint.tidy(self.folder)
        source: Path | None = None
        if self.recipe.resume == "auto":
            source = checkpoint.newest(self.folder, keep_aside=True)
        elif self.recipe.resume != "never":
            source = checkpoint.whole(Path(self.recipe.resume))
        at = checkpoint.number(source) if source is not None else -1
        for later in (f for f in checkpoint.folders(self.folder) if checkpoint.number(f) > at):
            checkpoint.discard(later)
        for stale in ("metrics.jsonl", tracker.ID) if source is None else ():
            (self.folder / stale).unlink(missing_ok=True)
        write_text(self.folder / "recipe.yaml", cfg.to_yaml(self.recipe))
        return str(source or "")

    def train(self, training: Distillation, found: dict[str, Any], measured: Callable[[], Figures]) -> Figures:
        """Distil to the end, from the checkpoint where there is one; -> the last figures. found: what the search gave, which a resume does not do again; measured: figures on held-out
        pictures, asked every `measure_every` steps. Raises Interrupted, behind a checkpoint, after a signal."""
        recipe, steps = self.recipe, self.recipe.distill.steps
        self.engine.prepare(training.models, training.optimiser, training.parameters)
        if self.source is not None:
            checkpoint.load(self.source, self.engine, training, algorithm=training)
        self.begun = self.hours if self.begun is None else self.begun
        told = dataclasses.asdict(recipe.logging)
        log = Log(
            self.folder, active=self.engine.is_main, start_step=training.updates, wandb_mode=told["wandb"], project=told["project"],
            x_axis=f"{self.unit}/total", config=dataclasses.asdict(recipe),
        )  # fmt: skip

        def row(**figures: Any) -> dict[str, Any]:
            return {"step": training.updates, **figures, self.unit: {"total": self.hours}}

        def save(due: bool = True) -> None:
            record = {"hours": self.hours, "begun": self.begun, "found": found, "figures": self.figures, "inputs": self.inputs}
            keep = recipe.checkpoint.keep
            checkpoint.save(self.folder, training.updates, self.engine, training, record, keep=keep, algorithm=training, due=due)

        caught: list[int] = []
        bar = progress(steps, recipe.name, "step", shown=told["progress"], initial=training.updates)
        with noted(caught):
            if self.source is None:
                save()
            while training.updates < steps:
                metrics = training.step()
                bar.update()
                if training.updates % 20 == 1:
                    bar.set_postfix_str(", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
                log.write(row(**metrics))
                last = training.updates == steps
                if last or (recipe.measure_every and training.updates % recipe.measure_every == 0):
                    training.models.eval()
                    self.figures = measured() if self.engine.is_main else {}  # the others wait for their next gradient
                    training.models.train()
                    log.write(row(quality=self.figures))
                due = last or training.updates % recipe.checkpoint.every == 0
                stopping = self.engine.any(bool(caught))
                if due or stopping:
                    save(due)
                if stopping:
                    bar.close()
                    log.close()
                    raise Interrupted(caught)
        bar.close()
        log.close()
        training.models.eval()
        return self.figures

    def end(self) -> None:
        """The value model is saved: what was kept for a resume has served."""
        if not self.engine.is_main:
            return
        for folder in checkpoint.folders(self.folder):
            checkpoint.discard(folder)


def inputs_of(recipe: Any) -> dict[str, str]:
    """Hashes of the files that a job reads."""
    nodes = {f"rewards.{name}": node for name, node in recipe.rewards.items()} or {"reward": recipe.reward}
    return resume.hashes_of({"model": recipe.model, **nodes, "data.images": recipe.images})
