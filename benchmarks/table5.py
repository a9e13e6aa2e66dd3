"""The paper's Table 5 in miniature: stitched values against VAE stitch, NoisyCLIP, DiNa-LRM, Tweedie and Monte Carlo, by noise level.

    python -m benchmarks.table5 [rewards=clip,hps,aesthetic] [rows=vae,noisy,dina] [again=clip,hps,aesthetic] [out=values/table5] [calibration=172]
        [steps=0: the recipes'] [threads=0]

Baselines are stitched by the same recipes: VAE stitch with three times the steps, NoisyCLIP with twice the steps and twice the scenes, DiNa-LRM on 8,000
preference pairs for as many steps as StitchVM; `raw` is StitchVM with a student that is not normalised. again: rewards whose StitchVM is stitched with two
further seeds, too (the shipped one is seed 0). Trained ones are kept under `out`, so that the script goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, arguments, save
from rlstitch import config as cfg
from rlstitch.files import write_text
from rlstitch.stitch import compare, measure
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.baselines import PreferenceHead, train_preference_head
from rlstitch.stitch.distill import latents_of

ROWS = {
    "seed1": ("StitchVM, seed 1", 1, {"seed": 1, "distill": {"seed": 1}}),
    "seed2": ("StitchVM, seed 2", 1, {"seed": 2, "distill": {"seed": 2}}),
    "raw": ("StitchVM, not normalised", 1, {"normalise": False}),
    "vae": ("VAE stitch", 3, {"kind": "vae"}),
    "noisy": ("NoisyCLIP", 2, {"kind": "noisy_clip", "images": {"n": 12000}}),
}


def stitched(reward: str, row: str, out: Path, steps: int) -> str:
    """A baseline of one reward, stitched unless it is there already."""
    _, times, change = ROWS[row]
    given = cfg.merge(cfg.compose(f"stitch_{reward}"), {"name": f"{reward}_{row}" + f"_{steps}" * bool(steps), "out": str(out), **change})
    given["distill"]["steps"] = times * (steps or given["distill"]["steps"])  # more steps over the same pictures: more epochs
    folder = out / given["name"]
    if not (folder / "value.json").exists():
        stitch.run(stitch.checked(given, given["name"]))
    return str(folder)


def dina(steps: int, pairs: int = 8000) -> Any:
    """A maker of DiNa-LRM's row for `hps`: a head on the denoiser after a third of its blocks, trained on preference pairs of another seed."""

    def rows(reward: Any) -> list[measure.Subject]:
        recipe = cfg.compose("evaluate_value")
        backbone = cfg.build(recipe["model"], device="cuda" if torch.cuda.is_available() else "cpu")
        first, second, prompts, wins = cfg.build(recipe["pairs"]["hps"] | {"n": pairs, "seed": 505})
        head = PreferenceHead(backbone, max(1, backbone.num_blocks // 3))
        sides = (latents_of(backbone, first), latents_of(backbone, second))
        train_preference_head(head, sides, prompts, backbone.encode_prompts(prompts), wins, steps=steps)
        return [measure.Subject("DiNa-LRM", head.requires_grad_(False).value)]

    return rows


def main() -> None:
    options = arguments(
        {
            "rewards": "clip,hps,aesthetic", "rows": "vae,noisy,dina", "again": "clip,hps,aesthetic", "out": "values/table5",
            "calibration": "172", "steps": "0", "threads": "0",
        }
    )  # fmt: skip
    if odd := set(options["rows"].split(",")) - {*ROWS, "dina", "none"}:
        raise SystemExit(f"unknown rows {', '.join(sorted(odd))}; there are {', '.join(ROWS)}, dina and none")
    out, names, rows = Path(options["out"]), options["rewards"].split(","), options["rows"].split(",")
    given, steps = cfg.compose("evaluate_value"), int(options["steps"])
    rivals = given["compare"]
    for reward in names:
        wanted = (["seed1", "seed2"] if reward in options["again"].split(",") else []) + [row for row in rows if row in ROWS]
        rivals[reward] |= {ROWS[row][0]: stitched(reward, row, out, steps) for row in wanted}
    given["compare"] = {reward: rivals[reward] for reward in names}
    given["calibration"]["count"] = int(options["calibration"])
    config = compare.checked(given | {"out": str(out), "name": "table", "threads": int(options["threads"])}, "table5")
    extra = {"hps": dina(steps or cfg.compose("stitch_hps")["distill"]["steps"])} if "dina" in rows else None
    results = compare.run(config, extra)
    for reward in names:  # a file each, so that one can be made anew without the others
        own = {reward: results["rewards"][reward]}
        write_text(RESULTS / "table5" / f"{reward}.md", compare.table(own, config.sigmas))
        compare.plots(own, config.sigmas, RESULTS / "table5")
        save(f"table5/{reward}", results | {"calibration": config.calibration.count, "rewards": own})


if __name__ == "__main__":
    main()
