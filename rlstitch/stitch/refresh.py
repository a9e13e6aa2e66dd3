"""Refresh: a value model drifts as its policy moves. Measure V against the true reward on some rollouts; where the two part, distil on the policy's own latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlstitch import sampling
from rlstitch.asking import ask
from rlstitch.distributed import Engine
from rlstitch.figures import correlation
from rlstitch.prompts import PromptSet
from rlstitch.schema import RefreshConfig
from rlstitch.stitch.distill import DistillConfig, distill, targets_of
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Conditioning, Rollout

SET = 2**32  # a latent's prompt is its place in its set, and this times the set's own place


class Refresher:
    """Watches the value models of a Stitched oracle during training.

    After every update a `fraction` of its groups are finished by the current policy, decoded and scored by the true rewards. The last `pairs` known
    (V, r) of a value model are kept, over updates and prompts. Once there are so many, a correlation below `agreement` starts `steps` of distillation on the last
    `buffer` finished latents, and the watching begins anew. Where prompts have several samples the correlation is the one within a prompt's samples of an update,
    which is what advantages are made of: an error that all of them share does no harm. With one image a prompt it is the one across prompts and updates.
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
        prompts: Sequence[PromptSet] = (),
    ):
        self.config, self.models, self.backbone, self.engine, self.guidance = config, dict(models), backbone, engine, guidance
        self.rewards = {name: rewards[name] for name in models}
        self.prompts = list(prompts)  # every stage's
        self.latents, self.places = torch.empty(0, *backbone.latent_shape), torch.empty(0, dtype=torch.long)  # of the prompts
        self.pairs = {name: torch.empty(0, 3, dtype=torch.float64) for name in models}  # V, r, which prompt of which update
        self.updates, self.count = 0, 0

    def watched(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Tensor]:
        """This rank's samples that are watched, as much at a time as it sampled at once, and which [n] of the samples that all ranks give count.

        They are whole groups, spread evenly over the update's, so that they are the same on any number of ranks. All ranks give as many, or some would be waited for
        in vain (ZeRO-3 gathers weights in every forward): what is missing is made up by a sample again.
        """
        own = torch.cat([r.batch.group for r in rollouts]).to(self.backbone.device)
        every = self.engine.gather(own).cpu()
        _, place, sizes = every.unique_consecutive(return_inverse=True, return_counts=True)
        wanted = math.ceil(self.config.fraction * len(sizes))
        chosen = torch.isin(place, torch.arange(wanted) * len(sizes) // wanted).view(self.engine.world, -1)
        counts = chosen.sum(1)
        rows = chosen[self.engine.rank].nonzero()[:, 0].tolist()
        rows += [0] * (int(counts.max()) - len(rows))
        size = len(rollouts[0].batch)
        picked = [rollouts[k // size].rows(slice(k % size, k % size + 1)) for k in rows]
        counted = torch.arange(len(rows)) < counts[:, None]
        return [Rollout.joined(picked[k : k + size]) for k in range(0, len(picked), size)], counted.flatten()

    @torch.no_grad()
    def measure(self, rollouts: Sequence[Rollout], names: Sequence[str], grid: Tensor, stop: int, prompts: PromptSet | None = None) -> None:
        """Finish some of an update's samples, this rank's `rollouts`, and remember their latents, and their pairs for every value model that the scores [B, K] have a
        column of, called `names`."""
        zs, columns, asked = [], [], [(k, name) for k, name in enumerate(names) if name in self.rewards]
        parts, counted = self.watched(rollouts)
        for rollout in parts:
            part, z = rollout.batch, rollout.latent.z
            with self.engine.autocast():
                if stop < len(grid) - 1:
                    z = sampling.sample(self.backbone.bind(part.text, self.guidance), z, grid[stop:]).z
                images = self.backbone.decode(z)
                truths = [self.engine.together(lambda n=n: ask(n, self.rewards[n], images, part)) for _, n in asked]
            zs.append(z.float())
            told = [x for (k, _), truth in zip(asked, truths) for x in (rollout.scores[:, k].to(z), truth.to(z))]
            columns.append(torch.stack([part.group.to(z), *told], 1).double())
        every = self.engine.gather(torch.cat(columns)).cpu()[counted]
        place = every[:, 0] + self.updates * 2.0**32
        for k, (_, name) in enumerate(asked):
            pairs = torch.cat([every[:, 1 + 2 * k : 3 + 2 * k], place[:, None]], 1)
            self.pairs[name] = torch.cat([self.pairs[name], pairs[pairs.isfinite().all(1)]])[-self.config.pairs :]
        self.updates += 1
        self.latents = torch.cat([self.latents, self.engine.gather(torch.cat(zs)).cpu()[counted]])[-self.config.buffer :]
        known = next((k for k, s in enumerate(self.prompts) if s is prompts), 0)
        own = every[:, 0].long() % len(prompts or every) + known * SET
        self.places = torch.cat([self.places, own])[-self.config.buffer :]

    def agreement(self, name: str) -> float:
        """Correlation of V with r over the pairs kept; 0 where V is the same whatever r is, NaN where r is."""
        value, truth, place = self.pairs[name].unbind(1)
        together = place if len(place.unique()) < len(place) else None
        found = correlation(value, truth, together)
        return 0.0 if math.isnan(found) and not math.isnan(correlation(truth, truth, together)) else found

    def after(
        self, rollouts: Sequence[Rollout], names: Sequence[str], grid: Tensor, stop: int, prompts: PromptSet | None = None
    ) -> dict[str, float]:
        """What the trainer calls after an update with this rank's rollouts of `prompts`, `names` the oracle's columns in it; -> figures for the log: `correlation/NAME`, and
        `gap/NAME`, the mean error in spreads of r, which nothing is decided by."""
        self.measure(rollouts, names, grid, stop, prompts)
        figures: dict[str, float] = {}
        full, apart = len(self.latents) >= min(self.config.buffer, 64), []
        for name in (n for n in names if n in self.pairs):
            value, truth, _ = self.pairs[name].unbind(1)
            found = self.agreement(name)
            figures |= {f"correlation/{name}": found, f"gap/{name}": float((value - truth).mean().abs() / truth.std().clamp(min=1e-8))}
            if full and len(truth) >= self.config.pairs and found < self.config.agreement:
                apart.append(name)
        for name in apart:
            self.refresh(name)
        return figures | {"refreshed": float(bool(apart))}

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
        text_of = self.text_of if model.prompted else None
        distill(model.thaw(), latents, targets, tokens, config, text_of=text_of, prompts_of=self.prompts_of if self.prompts else None)
        if self.engine.world > 1:
            for p in (*model.stitch.parameters(), *model.tail.parameters()):
                dist.broadcast(p.data, 0)
        model.freeze()
        self.pairs[name] = self.pairs[name][:0]  # what was measured is about the model as it was

    def places_of(self, rows: Tensor) -> list[tuple[PromptSet, int]]:
        """The prompts that the kept latents [B] were made for: sets, and places in them."""
        return [(self.prompts[place // SET], place % SET) for place in self.places[rows].tolist()]

    def text_of(self, rows: Tensor) -> Conditioning:
        return Conditioning.cat([known.batch([place], torch.zeros(1)).text for known, place in self.places_of(rows)])

    def prompts_of(self, rows: Tensor) -> list[str]:
        return [known.prompts[place] for known, place in self.places_of(rows)]

    # ------------------------------------------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs beside `progress`: the refreshed weights, the latents and the pairs."""
        out = {"latents": self.latents, "places": self.places} | {f"pairs/{name}": pairs for name, pairs in self.pairs.items()}
        for name, model in self.models.items():
            out |= {f"{name}.{k}": v.detach() for k, v in model.state_dict().items() if k.startswith(("stitch.", "tail."))}
        return out

    def progress(self) -> dict[str, Any]:
        return {"updates": self.updates, "count": self.count}

    def restore(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        self.latents = tensors["latents"]
        self.places = tensors.get("places", torch.zeros(len(self.latents), dtype=torch.long))  # checkpoints of old, of null-text values
        for name, model in self.models.items():
            own = {k.removeprefix(f"{name}."): v.to(self.backbone.device) for k, v in tensors.items() if k.startswith(f"{name}.")}
            model.load_state_dict(own, strict=False)
        self.pairs = {name: tensors[f"pairs/{name}"] for name in self.models}
        self.updates, self.count = progress["updates"], progress["count"]
