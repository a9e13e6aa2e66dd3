"""Against over-optimisation: what the trained reward cannot show (held-out judge, diversity, the value's gap to the truth), and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from rlstitch import sampling
from rlstitch.asking import ask
from rlstitch.data import PromptSet
from rlstitch.distributed import Engine
from rlstitch.figures import correlation, exact, known, plain
from rlstitch.oracles import rewards_of
from rlstitch.schema import GuardConfig
from rlstitch.stops import Stop
from rlstitch.types import Latent, Oracle, noise_like


@exact
def square_distance(z: Tensor) -> Tensor:
    """Mean squared distance [per number] between two samples of z [B, ...], B of 2 or more. 0: all samples are alike."""
    return 2 * z.flatten(1).var(0).mean()


def flattery(count: int) -> float:
    """By how many standard deviations the best of `count` normal draws is expected to flatter itself: the mean of their maximum (Blom 1958); 0 for one."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


class Guard:
    """The stop rule and the measurements that each evaluation on the way adds.

    Rule: an evaluation is *fallen* when the judge, prompt by prompt against its own best evaluation, is lower by more than 1 + `flattery` standard errors of that
    difference, while the trained reward of the same prompts is higher than it was then. The best of m evaluations is the luckiest of them, too, and looks the
    better the larger m is; without `flattery` a judge that does not move at all stops two runs in three of 16 evaluations, with it one in thirty
    (benchmarks/guard_rates.py). `patience` fallen evaluations in a row end the run; 0 never does. The checkpoint of the best evaluation is kept.
    """

    def __init__(self, config: GuardConfig, judges: Sequence[str]):
        self.config = config
        self.judge = config.judge or (judges[-1] if judges else "")
        self.best: list[float] = []
        self.best_trained: list[float] = []
        self.best_step, self.seen, self.fallen, self.stage = 0, 0, 0, ""

    def see(self, scores: Mapping[str, Tensor], stage: str, trained: Tensor | float, step: int = 0) -> str | None:
        """Scores [N] of the evaluation's prompts after update `step`, always the same ones, and the trained reward of this stage, of each of them [N] or in all;
        NaN where not known; -> why to stop, or None. Prompts are compared where both evaluations know them; where none is, the evaluation says nothing.

        Every stage is judged by itself: rewards of different stages cannot be compared.
        """
        if not self.judge or not self.config.patience:
            return None
        if stage != self.stage:
            self.best, self.seen, self.fallen, self.stage = [], 0, 0, stage
        now = scores[self.judge].double().cpu()
        gained = torch.as_tensor(trained, dtype=torch.float64).cpu().expand(len(now))
        change, climb = (_change(a, b) for a, b in ((now, self.best), (gained, self.best_trained)))
        if not len(change):
            return self.verdict()
        if not self.best or float(change.mean()) >= 0:
            self.best, self.best_trained, self.best_step, self.fallen = now.tolist(), gained.tolist(), step, 0
        elif len(climb):
            error = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
            fallen = float(change.mean()) < -(1 + flattery(self.seen)) * error and float(climb.mean()) > 0
            self.fallen = self.fallen + 1 if fallen else 0
        self.seen += 1
        return self.verdict()

    def verdict(self) -> str | None:
        """Why the run should end here, also after a resume."""
        if not self.config.patience or self.fallen < self.config.patience:
            return None
        kept = f"step-{self.best_step:06d}"
        better = (
            f"The best was {kept}, which is kept: resume=RUN/checkpoints/{kept} updates={self.best_step} makes its LoRA and evaluation"
            if self.best_step
            else "The untrained model was best: lower optimiser.lr, or weigh the regulariser more"
        )
        return (
            f"the held-out judge '{self.judge}' stayed below its best in {self.fallen} evaluations in a row while the trained reward climbed: "
            f"the reward is being over-optimised. {better}; to go on all the same, set guard.patience=0"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; unknown scores are None there."""
        names = ("best", "best_trained", "best_step", "seen", "fallen", "stage")
        return plain({name: getattr(self, name) for name in names})

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_trained = ([math.nan if x is None else x for x in state[name]] for name in ("best", "best_trained"))
        self.best_step, self.seen, self.fallen, self.stage = (state[name] for name in ("best_step", "seen", "fallen", "stage"))


def _change(now: Tensor, before: list[float]) -> Tensor:
    """Of the prompts [N] that are known now and were before, the difference; where nothing was before, of those known now."""
    change = now - torch.tensor(before, dtype=torch.float64) if before else now
    return change[torch.isfinite(change)]


@torch.no_grad()
def probe(
    backbone: Any,
    oracle: Oracle | None,
    rewards: Mapping[str, Any],
    stop: Stop,
    grid: Tensor,
    prompts: PromptSet,
    engine: Engine,
    config: GuardConfig,
    *,
    guidance: float,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """`images` pictures of each of the first `prompts` held-out prompts by the current policy: `diversity` (RMS pixel distance within a prompt) and, for each value
    model, `gap/NAME` = mean(V - r) / spread of r and `correlation/NAME`, V read at the middle of the stop window and r on the finished picture, where both are
    known; what nothing is known of is left out. Every rank takes every world-th prompt, at most `batch_size` pictures at once; the figures are the same.
    """
    last = len(grid) - 1
    halts = stop.steps(last)
    middle = min((halts.start + halts.stop - 1) // 2, last)
    asked = (
        {n: about for n, about in zip(oracle.names, rewards_of(oracle)) if about in rewards} if oracle is not None and middle < last else {}
    )
    count, found = min(config.prompts, len(prompts)), []
    mine, together = engine.share(count), max(1, batch_size // config.images)
    for some in (mine[k : k + together] for k in range(0, len(mine), together)):
        places = [place for place in some for _ in range(config.images)]
        numbers = torch.tensor(some)[:, None] * config.images + torch.arange(config.images)
        pictures, pairs = [], []
        for rows in (slice(k, k + batch_size) for k in range(0, len(places), batch_size)):
            batch = prompts.batch(places[rows], numbers.flatten()[rows] + seed * 1_000_003)
            with engine.autocast():
                velocity = backbone.bind(batch.text, guidance)
                noise = noise_like(backbone.latent_shape, batch.seeds, device=backbone.device)
                z = sampling.sample(velocity, noise, grid, stop=middle)
                done: Latent = z if middle == last else sampling.sample(velocity, z.z, grid[middle:])
                images = backbone.decode(done.z)
                values = dict(zip(oracle.names, oracle(z, batch).float().unbind(1))) if asked else {}
                truths = {n: engine.together(lambda n=n: ask(n, rewards[n], images, batch)) for n in dict.fromkeys(asked.values())}
                told = [x.to(images) for n, about in asked.items() for x in (values[n], truths[about])]
            pictures.append(images)
            pairs.append(torch.stack(told, 1) if told else images.new_empty(len(images), 0))
        apart = [square_distance(x) for x in torch.cat(pictures).unflatten(0, (len(some), -1))]
        found.append(torch.cat([torch.stack(apart)[:, None], torch.cat(pairs).reshape(len(some), -1)], 1))
    every = engine.in_order(torch.cat(found), count).cpu()
    out = {"diversity": float(every[:, 0].double().nanmean() ** 0.5)}
    columns = every[:, 1:].reshape(count * config.images, len(asked), 2).double()
    for name, (value, truth) in zip(asked, columns.permute(1, 2, 0)):
        error, spread = known(value - truth).nanmean(), truth[torch.isfinite(value - truth)].std()
        out |= {f"gap/{name}": float(error / spread.clamp(min=1e-8)), f"correlation/{name}": correlation(value, truth)}
    return {key: figure for key, figure in out.items() if math.isfinite(figure)}
