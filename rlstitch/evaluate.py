"""Full denoising and clean rewards on held-out prompts; exact counts at any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rlstitch import sampling
from rlstitch.asking import ask
from rlstitch.data import PromptSet
from rlstitch.distributed import Engine
from rlstitch.policy import Policy
from rlstitch.types import Judge, Reward, noise_like


@dataclass
class Evaluation:
    """`means`: every reward's mean and, where the prompts carry facts, the detector's classes under `detector/*`; `scores` by reward [N]; pictures in prompt order."""

    means: dict[str, float]
    scores: dict[str, Tensor]
    images: Tensor

    def captions(self, prompts: list[str]) -> list[str]:
        names = [n for n in self.scores if not n.startswith("detector/")]
        return [f"{p} | " + " ".join(f"{n} {self.scores[n][i]:.3f}" for n in names) for i, p in enumerate(prompts)]


@torch.no_grad()
def evaluate(
    backbone: Any,
    policy: Policy,
    adapter: str,
    prompts: PromptSet,
    rewards: Mapping[str, Reward],
    grid: Tensor,
    engine: Engine,
    *,
    guidance: float,
    batch_size: int,
    seed: int,
    limit: int = 0,
    label: str = "evaluation",
    progress: bool = True,
) -> Evaluation:
    """Score `adapter` (default, ema or reference) on the first `limit` prompts (0: all), one picture each with noise from (seed, prompt).

    Every rank takes every world-th prompt, padded to equal numbers; the padding is dropped after gathering, so means and counts are exact.
    """
    count = min(limit, len(prompts)) if limit else len(prompts)
    share = -(-count // engine.world)
    mine = [min(engine.rank + k * engine.world, count - 1) for k in range(share)]
    parts: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {name: [] for name in rewards}
    bar = tqdm(total=count, desc=label, disable=not (progress and engine.is_main), leave=False, unit="image")
    with policy.use(adapter):
        for start in range(0, share, batch_size):
            index = mine[start : start + batch_size]
            batch = prompts.batch(index, torch.tensor(index) + seed * 1_000_003)
            z = noise_like(backbone.latent_shape, batch.seeds, device=backbone.device)
            with engine.autocast():
                done = sampling.sample(backbone.bind(batch.text, guidance), z, grid)
                images = backbone.decode(done.z)
                for name, reward in rewards.items():
                    columns[name].append(engine.together(lambda: ask(name, reward, images, batch)))
            parts.append(images)
            bar.update(len(index) * engine.world)
    bar.close()

    def whole(pieces: list[Tensor]) -> Tensor:
        """[share] of each rank -> [count] in prompt order."""
        mixed = engine.gather(torch.cat(pieces))
        return mixed.view(engine.world, share, *mixed.shape[1:]).transpose(0, 1).flatten(0, 1)[:count].cpu()

    scores = {name: whole(column) for name, column in columns.items()}
    means = {name: float(column.mean()) for name, column in scores.items()}
    for name, reward in rewards.items():
        if isinstance(reward, Judge):
            means |= {f"{name}/{k}": v for k, v in reward.breakdown(scores[name], prompts.rows[:count]).items()}
            means[name] = means.pop(f"{name}/overall")
    return Evaluation(means, scores, whole(parts))
