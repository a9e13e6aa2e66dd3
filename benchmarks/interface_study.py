"""Where to cut (the paper's Figure 6): closed-form loss against final Recall@1 over the whole (i, j) grid, j into the late blocks, as two heat maps.

    python -m benchmarks.interface_study [reward=clip] [steps=100] [images=4000] [sigma=0.5] [threads=0] [out=values/interface]

Every pair is distilled by the reward's recipe with the same short budget from the same scenes; finished pairs are kept under `out`, so that the script goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from benchmarks.common import RESULTS, arguments, save
from benchmarks.material import Material
from rlstitch.files import write_json, write_text
from rlstitch.report import heat_map
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.distill import distill
from rlstitch.stitch.measure import srcc
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.stitch.search import search


class Study(Material):
    """Closed-form stitches of one reward over all cuts; `cell` distils one pair."""

    def __init__(self, options: dict[str, str]):
        super().__init__(options["reward"], int(options["images"]))
        pictures = self.images[: self.recipe.search_images].float() / 255
        self.search = search(self.backbone, self.reward, pictures, max_reward_block=self.reward.num_blocks, seed=self.recipe.seed)
        self.steps = int(options["steps"])

    def cell(self, i: int, j: int) -> dict[str, dict[str, float]]:
        """Quality by sigma of the pair after the budget."""
        pair = next(p for p in self.search.table if (p.i, p.j) == (i, j))
        targets, tokens, norm = self.targets
        model = StitchedValueModel.from_search(
            self.backbone, self.reward, i, j, pair.weight, pair.bias, cls_state=self.search.cls[j], norm=norm,
            normalise=self.recipe.normalise, sigma_range=(0.0, 1.0), card={},
        )  # fmt: skip
        seconds = distill(model, self.latents, targets, tokens, dataclasses.replace(self.recipe.distill, steps=self.steps))
        quality = stitch.quality(model, self.held[0], self.prompts, self.held[1])
        return {"loss": pair.loss, "normalised": pair.normalised, "seconds": round(seconds, 1), "quality": quality}


def main() -> None:
    options = arguments({"reward": "clip", "steps": "100", "images": "4000", "sigma": "0.5", "threads": "0", "out": "values/interface"})
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    reward, steps, study = options["reward"], options["steps"], Study(options)
    rows, columns = range(1, study.reward.num_blocks + 1), range(1, study.backbone.num_blocks + 1)
    cells = {}
    for j in rows:
        for i in columns:
            file = Path(options["out"]) / f"{reward}-{i}-{j}-{steps}-{options['images']}.json"
            if not file.exists():
                write_json(file, study.cell(i, j))
            cells[i, j] = json.loads(file.read_text())
            cells[i, j] |= cells[i, j].pop("quality")[options["sigma"]]
            print(i, j, cells[i, j], flush=True)
    figure = "recall_at_1" if study.reward.head is None else "correlation"
    maps = {"normalised closed-form loss": "normalised", f"{figure} at sigma {options['sigma']} after {steps} steps": figure}
    for title, key in maps.items():
        table = [[cells[i, j][key] for i in columns] for j in rows]
        svg = heat_map(table, title=title, x_label="denoiser block i", y_label="reward block j", x=list(columns), y=list(rows))
        write_text(RESULTS / f"interface_{reward}_{key}.svg", svg)
    losses, final = (torch.tensor([c[key] for c in cells.values()]) for key in ("normalised", figure))
    pairs = [{"i": i, "j": j, **c} for (i, j), c in cells.items()]
    save(f"interface_study_{reward}", {"steps": int(steps), "rank_correlation": round(srcc(losses, final), 4), "pairs": pairs})


if __name__ == "__main__":
    main()
