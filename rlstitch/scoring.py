"""Scores of rollouts: asked one after the other, or beside the next rollout where a pixel reward has a device of its own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rlstitch.distributed import Engine
from rlstitch.figures import known
from rlstitch.metrics import Clock
from rlstitch.oracles import Terminal
from rlstitch.telling import say
from rlstitch.types import Oracle, Rollout, UserError


def _elsewhere(device: Any, here: torch.device) -> bool:
    """Whether a reward's device is another one; a name without a number is any device of its kind, one that torch does not know (a service) is elsewhere."""
    kind, _, number = str(device).partition(":")
    return kind != here.type or (number.isdigit() and int(number) != (here.index or 0))


def has_own_device(oracle: Oracle | None, device: torch.device) -> bool:
    """Whether finished pictures are scored by a reward whose `device` is not the denoiser's, so that both can work at once."""
    rewards = oracle.rewards.values() if isinstance(oracle, Terminal) else ()
    return any(_elsewhere(getattr(reward, "device", device), device) for reward in rewards)


class NoScore(UserError):
    """An update has nothing to learn from. The weights are those of the update before."""


class Scorer:
    """Fills in the scores of an update's rollouts. Where the algorithm compares them only after the last one, and a reward has its own device, a thread
    scores rollout n while rollout n + 1 is made; the scores are the same."""

    def __init__(self, engine: Engine, clock: Clock):
        self.engine, self.clock = engine, clock
        self.thread: ThreadPoolExecutor | None = None
        self.pending: list[tuple[Rollout, Future]] = []
        self.told = False

    def ask(self, algorithm: Any, rollout: Rollout) -> None:
        """Score a rollout now, or have it scored by `finish`."""
        if not (algorithm.collects and has_own_device(algorithm.oracle, self.engine.device)):
            with self.clock.phase("oracle"), self.engine.autocast():
                rollout.scores = known(self.engine.together(lambda: algorithm.score(rollout)))
            return
        if self.thread is None:
            here = self.engine.device
            on_gpu = {"initializer": torch.cuda.set_device, "initargs": (here,)} if here.type == "cuda" and here.index is not None else {}
            self.thread = ThreadPoolExecutor(1, "rewards", **on_gpu)  # a thread begins on GPU 0, whatever its rank
        self.pending.append((rollout, self.thread.submit(self._score, algorithm, rollout)))

    def _score(self, algorithm: Any, rollout: Rollout) -> Tensor:
        with self.engine.autocast():  # of this thread: it is not inherited
            return known(algorithm.score(rollout))

    def finish(self) -> None:
        """Wait for what is not scored yet; an error in a reward is raised here."""
        with self.clock.phase("oracle"):
            pending, self.pending = self.pending, []
            for rollout, future in pending:
                rollout.scores = self.engine.together(future.result)

    def check(self, scores: Tensor, groups: Tensor, oracle: Oracle, update: int, masked: float | None = None) -> None:
        """Scores [B, K] of all ranks and their prompts [B]: a reward with a weight and without one known score ends the run, one without any for a prompt is told
        once.

        What is not known takes no part in the update, but an update without any would still move the weights by the optimiser's momentum: `masked` is the share
        of samples that take none, by default those without a total. Raises NoScore.
        """
        there = ~torch.isnan(scores)
        summed = {name: column for name, weight, column in zip(oracle.names, oracle.weights, there.unbind(1)) if weight}
        silent = [name for name, column in summed.items() if not bool(column.any())]
        if masked is None:
            masked = float(oracle.total(scores).isnan().float().mean())
        if silent or masked == 1:
            told = [why for n in silent if (why := getattr(getattr(oracle, "rewards", {}).get(n), "failure", ""))]
            why = (
                "; ".join([f"{' and '.join(silent)} gave no score for any of {len(scores)} pictures (NaN or infinite)", *told])
                if silent
                else f"none of {len(scores)} pictures has a score (neither NaN nor infinite) from all of {', '.join(summed)}, so none has a total to learn from; where the algorithm has it, algorithm.per_reward=true compares each reward by itself"
            )
            raise NoScore(
                f"update {update}: {why}; the weights are those of the last update. Mend the reward, then start the same command again"
            )
        if self.told or not self.engine.is_main:
            return
        prompts, place = groups.unique(return_inverse=True)
        seen = torch.zeros(len(prompts), len(oracle.names), device=scores.device).index_add_(0, place, there.float())
        lost = {n: prompts[k == 0].tolist() for n, w, k in zip(oracle.names, oracle.weights, seen.unbind(1)) if w and not bool(k.all())}
        if lost:
            self.told = True
            shown = "; ".join(f"{name}: {len(rows)} groups, e.g. number {rows[0]}" for name, rows in lost.items())
            say(
                f"update {update}: no score for any picture of some prompts ({shown}). They take no part; this is said once, `masked` in metrics.jsonl counts on"
            )
