"""Beyond the paper's recipe: each change to a stitch alone, at the same cut, data and steps, by held-out Recall@1 and correlation at every noise level.

    python -m benchmarks.beyond [reward=clip] [variants=all] [steps=300] [seeds=0] [images=8000] [out=values/beyond] [threads=0]

ridge:  weight on the closed-form map. taps: all earlier blocks of the prefix beside the last one enter the stitch. level: the noise level enters it, as
constant maps of sin and cos of log sigma. weight: the loss weighted by 1 - sigma or by sigma (mean one over a batch). not normalised: a student
whose norm is free.
Finished variants are kept under `out`, so that the script goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import arguments, save, table
from benchmarks.material import Material
from rlstitch import schedule
from rlstitch.backbones import cut
from rlstitch.files import write_json
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.distill import DistillConfig, distill, distillation_loss
from rlstitch.stitch.layer import StitchLayer
from rlstitch.stitch.model import StitchedValueModel, read_card
from rlstitch.stitch.search import fit
from rlstitch.types import Conditioning

VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "ridge 1e-3": {"ridge": 1e-3},
    "ridge 1e-1": {"ridge": 1e-1},
    "taps after every block": {"taps": True},
    "level in the stitch": {"level": True},
    "weight 1 - sigma": {"weight": lambda sigma: 1 - sigma},
    "weight sigma": {"weight": lambda sigma: sigma},
    "not normalised": {"normalise": False},
}


def level_maps(sigma: Tensor, size: tuple[int, int], count: int = 4) -> Tensor:
    """[B, 2 count, h, w]: sin and cos of 1, 2, 4, ... times log(sigma + .01), constant over the map."""
    angle = (sigma + 0.01).log()[:, None] * 2.0 ** torch.arange(count, device=sigma.device)
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :, None, None].expand(-1, -1, *size)


class WidePrefix(nn.Module):
    """A prefix whose image stream has further channels: the stream after earlier blocks, and maps of the noise level."""

    def __init__(self, prefix: nn.Module, *, taps: bool, level: bool):
        super().__init__()
        self.inner, self.taps, self.level, self.depth = prefix, taps, level, prefix.depth

    def forward(self, z: Tensor, sigma: Tensor, text: Conditioning) -> SimpleNamespace:
        inner, grids = self.inner, []

        def see(block: int, returned: Any) -> None:
            if self.taps or block == self.depth:
                grids.append(inner.picture(returned, z))

        cut.run(inner.model, inner.arch.inputs(inner.model, z, sigma, text, inner.embedded), inner.arch, stop=self.depth, see=see)
        if self.level:
            grids.append(level_maps(sigma, grids[0].shape[-2:]))
        return SimpleNamespace(grid=torch.cat(grids, 1))


@torch.no_grad()
def closed_form(
    prefix: nn.Module, null: Conditioning, reward: Any, images: Tensor, latents: Tensor, seed: int, ridge: float
) -> StitchLayer:
    """The stitch to the reward's patch embeddings, sigma ~ U[0, 1], float64."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(len(latents), generator=generator)
    z = schedule.interpolate(latents.cpu(), torch.randn(latents.shape, generator=generator), sigma).to(latents.device)
    grid = prefix(z, sigma.to(z.device), null.expand(len(z))).grid
    return fit(grid, reward.patches(images.to(z.device)), reward.grid, ridge)


def weighted(weight: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """`distillation_loss` of every row alone, weighted by its noise level."""

    def objective(
        model: StitchedValueModel,
        grid: Tensor,
        sigma: Tensor,
        target: Tensor,
        target_tokens: Tensor,
        config: DistillConfig,
        prompts: Any = None,
    ):
        embedding, tokens = model.embed(grid)
        rows = (embedding - target).square().sum(-1) + config.token_weight * (tokens - target_tokens).square().mean((1, 2))
        if model.reward.head is not None:
            rows = rows + config.score_weight * (model.reward.head_of(embedding) - model.reward.head_of(target)).square()
        w = weight(sigma)
        loss = (rows * w).sum() / w.sum()
        return loss, {"loss": loss.detach()}

    return objective


class Bench(Material):
    def __init__(self, options: dict[str, str]):
        super().__init__(options["reward"], int(options["images"]))
        card = read_card(f"shapes:value_{options['reward']}")
        if card["reward_block"] != 1:
            raise SystemExit("beyond: this script fits the stitch into the patch embeddings (reward block 1) only")
        self.blocks = card["blocks"]

    def run(self, change: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
        """Stitch, distil and measure one variant."""
        torch.manual_seed(seed)
        targets, tokens, norm = self.targets
        prefix = WidePrefix(self.backbone.make_prefix(self.blocks), taps=change.get("taps", False), level=change.get("level", False))
        pictures, latents = self.images[: self.recipe.search_images].float() / 255, self.latents[: self.recipe.search_images]
        layer = closed_form(prefix, self.backbone.null, self.reward, pictures, latents, seed, change.get("ridge", 0.0))
        model = StitchedValueModel(
            prefix, self.backbone.null, layer, self.reward.tail(1), self.reward, normalise=change.get("normalise", True), norm=norm,
            sigma_range=(0.0, 1.0), card={},
        )  # fmt: skip
        objective = weighted(change["weight"]) if "weight" in change else distillation_loss
        config = dataclasses.replace(self.recipe.distill, steps=steps, seed=seed)
        seconds = distill(model, self.latents, targets, tokens, config, objective=objective)
        return {"seconds": round(seconds, 1), "quality": stitch.quality(model, self.held[0], self.prompts, self.held[1])}


def main() -> None:
    defaults = {"reward": "clip", "variants": "all", "steps": "300", "seeds": "0", "images": "8000", "out": "values/beyond", "threads": "0"}
    options = arguments(defaults)
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    wanted = list(VARIANTS) if options["variants"] == "all" else options["variants"].split(",")
    out, steps, bench, found = Path(options["out"]), int(options["steps"]), None, {}
    for name in wanted:
        for seed in options["seeds"].split(","):
            file = out / f"{options['reward']}-{name.replace(' ', '_')}-{steps}-{options['images']}-{seed}.json"
            if not file.exists():
                bench = bench or Bench(options)
                write_json(file, bench.run(VARIANTS[name], int(seed), steps))
            found.setdefault(name, []).append(json.loads(file.read_text()))
            print(name, seed, found[name][-1], flush=True)
    levels = list(next(iter(found.values()))[0]["quality"])
    figure = "recall_at_1" if "recall_at_1" in found[wanted[0]][0]["quality"][levels[0]] else "correlation"
    lines = []
    for name, rows in found.items():
        cells = [
            f"{statistics.mean(r['quality'][level][figure] for r in rows):.3f} / {statistics.mean(r['quality'][level]['correlation'] for r in rows):.3f}"
            for level in levels
        ]
        lines.append([name, f"{statistics.mean(r['seconds'] for r in rows):.0f}", *cells])
    note = f"{figure} / correlation with the clean reward over matched and mismatched prompts; {steps} steps, seeds {options['seeds']}."
    table(f"beyond_{options['reward']}", ["", "seconds", *(f"sigma {level}" for level in levels)], lines, note)
    save(f"beyond_{options['reward']}", {"steps": steps, "seeds": options["seeds"], "variants": found})


if __name__ == "__main__":
    main()
