"""Where to cut (the paper's Figure 6): closed-form loss against final Recall@1 over the whole (i, j) grid, j into the late blocks, as two heat maps.

    python -m benchmarks.interface_study [reward=clip] [steps=200] [images=4000] [sigma=0.5] [out=values/interface]

Every pair is distilled with the same short budget from the same data; finished pairs are kept under `out`, so that the script goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import RESULTS, arguments, save
from rlstitch import config as cfg
from rlstitch.files import write_text
from rlstitch.report import heat_map
from rlstitch.stitch import recipe as stitch


def main() -> None:
    options = arguments({"reward": "clip", "steps": "200", "images": "4000", "sigma": "0.5", "out": "values/interface"})
    out, cells = Path(options["out"]), {}
    base = cfg.compose(f"stitch_{options['reward']}")
    backbone, reward = cfg.build(base["model"]), cfg.build(base["reward"])
    rows, columns = range(1, reward.num_blocks + 1), range(1, backbone.num_blocks + 1)
    for j in rows:
        for i in columns:
            given = cfg.merge(
                base,
                {
                    "name": f"{options['reward']}-{i}-{j}",
                    "out": str(out),
                    "blocks": str(i),
                    "reward_block": j,
                    "max_reward_block": reward.num_blocks,
                },
            )
            given["images"]["n"], given["distill"]["steps"] = int(options["images"]), int(options["steps"])
            card = out / given["name"] / "value.json"
            if not card.exists():
                stitch.run(stitch.checked(given, given["name"]))
            told = json.loads(card.read_text())
            pair = next(p for p in told["search"] if (p["i"], p["j"]) == (i, j))
            cells[i, j] = {
                "loss": pair["loss"], "normalised": pair["normalised"], **told["quality"][options["sigma"]], "seconds": told["distill_seconds"],
            }  # fmt: skip
    figure = "recall_at_1" if reward.head is None else "correlation"
    maps = {"normalised closed-form loss": "normalised", f"{figure} at sigma {options['sigma']} after {options['steps']} steps": figure}
    for title, key in maps.items():
        table = [[cells[i, j][key] for i in columns] for j in rows]
        svg = heat_map(table, title=title, x_label="denoiser block i", y_label="reward block j", x=list(columns), y=list(rows))
        write_text(RESULTS / f"interface_{options['reward']}_{key}.svg", svg)
    save(
        f"interface_study_{options['reward']}",
        {"steps": int(options["steps"]), "pairs": [{"i": i, "j": j, **c} for (i, j), c in cells.items()]},
    )


if __name__ == "__main__":
    main()
