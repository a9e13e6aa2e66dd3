"""Full denoising and clean rewards on held-out prompts; exact counts at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlstitch import sampling, telling
from rlstitch.asking import ask, breakdown
from rlstitch.data import PromptSet
from rlstitch.distributed import Engine
from rlstitch.figures import known
from rlstitch.types import Judge, Reward, noise_like


@dataclass
class Evaluation:
    """Of N prompts. `means`: every reward's mean over the pictures that it knows a score of (NaN where it knows none), how many it does not under
    `unscored/NAME` where there are any, and, where the prompts carry facts, a judge's classes under `NAME/*`; `scores` by reward [N], NaN where not known;
    `images`: the pictures of the first prompts, on the CPU."""

    means: dict[str, float]
    scores: dict[str, Tensor]
    images: Tensor

    def captions(self, prompts: list[str]) -> list[str]:
        names = [n for n in self.scores if not n.startswith("detector/")]
        return [f"{p} | " + " ".join(f"{n} {self.scores[n][i]:.3f}" for n in names) for i, p in enumerate(prompts)]


@torch.no_grad()
def evaluate(
    backbone: Any,
    using: AbstractContextManager,
    prompts: PromptSet,
    rewards: Mapping[str, Reward],
    grid: Tensor,
    engine: Engine,
    *,
    guidance: float,
    batch_size: int,
    seed: int,
    limit: int = 0,
    keep: int = 16,
    label: str = "evaluation",
    progress: bool = True,
    see: Callable[[list[int], Tensor], None] | None = None,
) -> Evaluation:
    """Score the model, as it is within `using` (e.g. `policy.use("ema")`), on the first `limit` prompts (0: all), one picture each with noise from (seed, prompt).

    see: is shown this rank's pictures [B, 3, H, W] and whose they are, batch by batch.

    Every rank takes every world-th prompt, padded to equal numbers; the padding is dropped after gathering, so means and counts are exact. The pictures of the
    first `keep` prompts are kept and no others, so that memory does not grow with the prompt set.
    """
    count = min(limit, len(prompts)) if limit else len(prompts)
    mine = engine.share(count)
    shown: list[Tensor] = []
    drawn = -(-keep // engine.world)  # of this rank's pictures
    columns: dict[str, list[Tensor]] = {name: [] for name in rewards}
    bar = telling.progress(count, label, "image", shown=progress and engine.is_main)
    with using:
        for start in range(0, len(mine), batch_size):
            index = mine[start : start + batch_size]
            batch = prompts.batch(index, torch.tensor(index) + seed * 1_000_003)
            z = noise_like(backbone.latent_shape, batch.seeds, device=backbone.device)
            with engine.autocast():
                done = sampling.sample(backbone.bind(batch.text, guidance), z, grid)
                images = backbone.decode(done.z)
                for name, reward in rewards.items():
                    columns[name].append(known(engine.together(lambda: ask(name, reward, images, batch))))
            if see is not None:
                engine.together(lambda: see(index, images))
            shown.append(images[: max(0, drawn - start)].to("cpu", copy=True))  # a view would keep the whole batch
            bar.update(len(index) * engine.world)
    bar.close()
    scores = {name: engine.in_order(torch.cat(column), count).cpu() for name, column in columns.items()}
    return Evaluation(means_of(scores, rewards, prompts.rows), scores, engine.in_order(torch.cat(shown), min(keep, count)).cpu())


def unscored(label: str, scores: Mapping[str, Tensor]) -> list[str]:
    """What there is to say of pictures that have no score, of scores [N] by reward; label: whose pictures."""
    lost = {name: int((~torch.isfinite(column)).sum()) for name, column in scores.items()}
    return [
        f"{label}: '{n}' gave no score for {k} of {len(scores[n])} pictures (NaN or infinite); "
        + ("its mean is over the others" if k < len(scores[n]) else "it has no mean")
        for n, k in lost.items()
        if k
    ]


def means_of(scores: Mapping[str, Tensor], rewards: Mapping[str, Reward], rows: list[dict[str, Any]]) -> dict[str, float]:
    """`Evaluation.means` of scores [N] by reward on the first N `rows` of a prompt file."""
    means: dict[str, float] = {}
    for name, column in scores.items():
        there = torch.isfinite(column)
        means[name] = float(column[there].double().mean())
        if lost := int((~there).sum()):
            means[f"unscored/{name}"] = lost
        if isinstance(rewards[name], Judge) and bool(there.any()):
            parts = breakdown(name, rewards[name], column[there], [row for row, one in zip(rows, there.tolist()) if one])
            means |= {name: parts.pop("overall")} | {f"{name}/{k}": v for k, v in parts.items()}
    return means
