"""Against over-optimisation: what the trained reward cannot show (held-out judge, diversity, the value's gap to the truth), and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlstitch import sampling
from rlstitch.asking import ask
from rlstitch.data import PromptSet
from rlstitch.distributed import Engine
from rlstitch.schema import GuardConfig
from rlstitch.stops import Stop
from rlstitch.types import Latent, Oracle, noise_like


def spread_within(z: Tensor, groups: Tensor) -> float | None:
    """Root mean square distance [per number] between samples of one group: z [B, ...], groups [B]. None where no group has two. 0: all samples of a prompt are alike."""
    flat, total, count = z.float().flatten(1), 0.0, 0
    for group in groups.unique():
        members = flat[groups == group]
        if len(members) > 1:
            total += float(members.var(0).mean()) * 2  # the mean squared distance of two independent draws
            count += 1
    return (total / count) ** 0.5 if count else None


class Guard:
    """The stop rule and the measurements that each evaluation on the way adds.

    Rule: an evaluation is *fallen* when the judge, prompt by prompt against its own best evaluation, is lower by more than one standard error while the trained
    reward is higher than it was then. `patience` fallen evaluations in a row end the run; 0 never does. The checkpoint of the best evaluation is kept.
    """

    def __init__(self, config: GuardConfig, judges: Sequence[str]):
        self.config = config
        self.judge = config.judge or (judges[-1] if judges else "")
        self.best: list[float] = []
        self.best_trained, self.best_step, self.fallen, self.stage = 0.0, 0, 0, ""

    def see(self, scores: Mapping[str, Tensor], stage: str, trained: float, step: int = 0) -> str | None:
        """Scores [N] of the evaluation's prompts after update `step`, always the same ones, and the trained reward of this stage; -> why to stop, or None.

        Every stage is judged by itself: rewards of different stages cannot be compared.
        """
        if not self.judge or not self.config.patience:
            return None
        if stage != self.stage:
            self.best, self.fallen, self.stage = [], 0, stage
        now = scores[self.judge].double()
        change = now - (torch.tensor(self.best, dtype=torch.float64) if self.best else now)
        change = change[~torch.isnan(change)]  # of the prompts whose score is known both times
        if not len(change):
            return self.verdict()
        if not self.best or float(change.mean()) >= 0:
            self.best, self.best_trained, self.best_step, self.fallen = now.tolist(), trained, step, 0
            return None
        error = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
        fallen = float(change.mean()) < -error and trained > self.best_trained
        self.fallen = self.fallen + 1 if fallen else 0
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
        return {
            "best": self.best,
            "best_trained": self.best_trained,
            "best_step": self.best_step,
            "fallen": self.fallen,
            "stage": self.stage,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_trained, self.fallen = list(state["best"]), state["best_trained"], state["fallen"]
        self.best_step, self.stage = state.get("best_step", 0), state["stage"]


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
    seed: int,
) -> dict[str, float]:
    """`images` pictures of each of the first `prompts` held-out prompts by the current policy: `diversity` (RMS pixel distance within a prompt) and, for each value
    model, `gap/NAME` = mean(V - r) / spread of r and `correlation/NAME`, V read at the middle of the stop window and r on the finished picture."""
    places = [i for i in range(min(config.prompts, len(prompts))) for _ in range(config.images)]
    batch = prompts.batch(places, torch.arange(len(places)) + seed * 1_000_003)
    last = len(grid) - 1
    halts = stop.steps(last)
    middle = min((halts.start + halts.stop - 1) // 2, last)
    with engine.autocast():
        velocity = backbone.bind(batch.text, guidance)
        z = sampling.sample(velocity, noise_like(backbone.latent_shape, batch.seeds, device=backbone.device), grid, stop=middle)
        done: Latent = z if middle == last else sampling.sample(velocity, z.z, grid[middle:])
        images = backbone.decode(done.z)
        out = {}
        if (diversity := spread_within(images, batch.group)) is not None:
            out["diversity"] = diversity
        if oracle is not None and middle < last:
            told = oracle(z, batch).float()
            for name, value in zip(oracle.names, told.unbind(1)):
                if name in rewards:
                    truth = engine.together(lambda: ask(name, rewards[name], images, batch))
                    out[f"gap/{name}"] = float((value - truth).mean() / truth.std().clamp(min=1e-8))
                    agreement = float(torch.corrcoef(torch.stack([value, truth]))[0, 1])
                    out |= {} if math.isnan(agreement) else {f"correlation/{name}": agreement}
    return out
