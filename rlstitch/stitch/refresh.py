"""Refresh: a value model drifts as its policy moves. Measure V against the true reward on some rollouts; where the gap opens, distil on the policy's own latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlstitch import sampling
from rlstitch.asking import ask
from rlstitch.distributed import Engine
from rlstitch.schema import RefreshConfig
from rlstitch.stitch.distill import DistillConfig, distill, targets_of
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Rollout


class Refresher:
    """Watches the value models of a Stitched oracle during training.

    After every update `fraction` of the first micro-batch is finished by the current policy, decoded and scored by the true rewards. The gap of a value
    model is |mean(V - r)| over the spread of r, both running means; one above `threshold` starts `steps` of distillation on the last `buffer` finished latents.
    """

    def __init__(
        self,
        config: RefreshConfig,
        models: Mapping[str, StitchedValueModel],
        backbone: Any,
        rewards: Mapping[str, Any],
        engine: Engine,
        *,
        guidance: float,
    ):
        self.config, self.models, self.backbone, self.engine, self.guidance = config, dict(models), backbone, engine, guidance
        self.rewards = {name: rewards[name] for name in models}
        self.latents = torch.empty(0, *backbone.latent_shape)
        self.error = dict.fromkeys(models, 0.0)
        self.spread = dict.fromkeys(models, 0.0)
        self.seen, self.count = 0, 0

    @torch.no_grad()
    def measure(self, rollout: Rollout, names: Sequence[str], grid: Tensor, stop: int) -> dict[str, float]:
        """Finish some of the rollout, compare, remember the latents; -> the gap of every value model that its scores [B, K] have a column of, called `names`."""
        rows = max(1, round(self.config.fraction * len(rollout.batch)))
        part, z = rollout.batch[slice(0, rows)], rollout.latent.z[:rows].detach()
        with self.engine.autocast():
            if stop < len(grid) - 1:
                z = sampling.sample(self.backbone.bind(part.text, self.guidance), z, grid[stop:]).z
            images = self.backbone.decode(z)
            truths = {
                name: self.engine.together(lambda: ask(name, self.rewards[name], images, part)) for name in names if name in self.rewards
            }
        gaps = {}
        self.seen += 1
        keep = 1 - max(0.1, 1 / self.seen)  # a plain mean at first, then about the last ten updates
        for k, name in enumerate(names):
            if name not in truths:
                continue
            pair = torch.stack([rollout.scores[:rows, k].detach().float(), truths[name]], 1)
            pair = self.engine.gather(pair)
            error = float((pair[:, 0] - pair[:, 1]).mean())
            spread = float(pair[:, 1].std()) if len(pair) > 1 else 1.0
            self.error[name] = keep * self.error[name] + (1 - keep) * error
            self.spread[name] = keep * self.spread[name] + (1 - keep) * spread
            gaps[name] = abs(self.error[name]) / max(self.spread[name], 1e-8)
        self.latents = torch.cat([self.latents, self.engine.gather(z.float()).cpu()])[-self.config.buffer :]
        return gaps

    def after(self, rollout: Rollout, names: Sequence[str], grid: Tensor, stop: int) -> dict[str, float]:
        """What the trainer calls after an update, `names` the oracle's columns in it; -> figures for the log."""
        gaps = self.measure(rollout, names, grid, stop)
        wide = [name for name, gap in gaps.items() if gap > self.config.threshold]
        full = len(self.latents) >= min(self.config.buffer, 64)
        for name in wide if full else []:
            self.refresh(name)
        return {f"gap/{name}": gap for name, gap in gaps.items()} | {"refreshed": float(bool(wide) and full)}

    def refresh(self, name: str) -> None:
        """A few steps of distillation of one value model on the policy's own latents, noised anew; all ranks do the same."""
        model, latents = self.models[name], self.latents.to(self.backbone.device)
        with torch.no_grad():
            images = torch.cat([self.backbone.decode(latents[k : k + 64]) for k in range(0, len(latents), 64)])
            targets, tokens, _ = targets_of(self.rewards[name], images)
        self.count += 1
        config = replace(
            DistillConfig(**model.card.get("distill", {})), steps=self.config.steps, lr=self.config.lr, batch_size=min(self.config.batch_size, len(latents)), warmup=1, decay=False,
            uniform_share=0.3, seed=self.count,
        )  # fmt: skip
        distill(model.thaw(), latents, targets, tokens, config)
        if self.engine.world > 1:
            for p in (*model.stitch.parameters(), *model.tail.parameters()):
                dist.broadcast(p.data, 0)
        model.freeze()
        self.error[name] = 0.0  # what was measured is about the model as it was
        self.seen = 0

    # ------------------------------------------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs beside `progress`: the refreshed weights and the buffer."""
        out = {"latents": self.latents}
        for name, model in self.models.items():
            out |= {f"{name}.{k}": v.detach() for k, v in model.state_dict().items() if k.startswith(("stitch.", "tail."))}
        return out

    def progress(self) -> dict[str, Any]:
        return {"error": self.error, "spread": self.spread, "seen": self.seen, "count": self.count}

    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        self.latents = tensors["latents"]
        for name, model in self.models.items():
            own = {k.removeprefix(f"{name}."): v.to(self.backbone.device) for k, v in tensors.items() if k.startswith(f"{name}.")}
            model.load_state_dict(own, strict=False)
        self.error, self.spread, self.seen, self.count = progress["error"], progress["spread"], progress["seen"], progress["count"]
