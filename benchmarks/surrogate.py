"""A black box made stitchable (the paper's stated limit): the rule-based detector distilled into a CLIP model, then stitched; both against the truth.

    python -m benchmarks.surrogate [seeds=0,1,2] [steps=0: the recipe's] [threads=0] [out=values/surrogate]

On pictures of the generator for held-out prompts, each under its own prompt and under another one's: correlation of the surrogate with the detector, and of the stitched
surrogate with the detector by noise level. Finished seeds are kept under `out`, so that the script goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, save, spread, table
from rlstitch import config as cfg
from rlstitch.data import encode, read_prompts
from rlstitch.stitch import measure, surrogate
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.distill import targets_of
from rlstitch.stitch.generate import generate, pictures_of
from rlstitch.stitch.model import StitchedValueModel


def made(seed: int, steps: int, out: Path, rewards: dict[str, Any] | None = None) -> tuple[surrogate.SurrogateConfig, Path]:
    """The surrogate's settings and the folder of its value model, both trained unless they are there; of the detector, or of another black box."""
    name = f"{next(iter(rewards or {'detector': 0}))}-{steps or 'recipe'}-seed{seed}"
    given = cfg.merge(
        cfg.compose("surrogate_detector"), {"name": name, "out": str(out), "seed": seed, **({"steps": steps} if steps else {})}
    ) | ({"rewards": rewards} if rewards else {})
    config = surrogate.checked(given, name)
    if not (out / name / "surrogate.json").exists():
        surrogate.run(config)
    change: dict[str, Any] = {
        "name": f"value-{name}",
        "out": str(out),
        "reward": {"path": str(out / name)},
        "seed": seed,
        "distill": {"seed": seed},
    }
    given = cfg.merge(cfg.compose("stitch_detector"), change)
    given["distill"]["steps"] = steps or given["distill"]["steps"]
    if not (out / f"value-{name}" / "value.json").exists():
        stitch.run(stitch.checked(given, f"value-{name}"))
    return config, out / f"value-{name}"


def agreement(config: surrogate.SurrogateConfig, value: Path) -> dict[str, float]:
    """Correlation with the detector of the surrogate on finished pictures (`clean`) and of the value model by sigma."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = cfg.build(config.model, device=device)
    black_box = cfg.build(next(iter(config.rewards.values())), device=device)
    model = StitchedValueModel.from_pretrained(value, backbone=backbone)
    prompts = encode(backbone, read_prompts(config.held_out))
    latents, rows, _ = generate(backbone, prompts, dataclasses.replace(config.generate, count=config.held_generations, seed=1), "held-out")
    pictures = pictures_of(backbone, latents)
    asked, truth = surrogate.pairs_of("detector", black_box, pictures, prompts, rows, config.others)
    batch, times = measure.batch_of(asked), 1 + config.others
    embedding = targets_of(model.reward, pictures)[0]
    found = {"clean": measure.correlation(model.reward.score_embedding(embedding.repeat(times, 1), batch).cpu(), truth)}
    for level in measure.SIGMAS:
        told = measure.in_parts(model.value, measure.noised(latents.repeat(times, 1, 1, 1), level), batch)
        found[f"{level:g}"] = measure.correlation(told.cpu(), truth)
    return {k: round(v, 4) for k, v in found.items()}


def main() -> None:
    options = arguments({"seeds": "0,1,2", "steps": "0", "threads": "0", "out": "values/surrogate"})
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    seeds = options["seeds"].split(",")
    found = {seed: agreement(*made(int(seed), int(options["steps"]), Path(options["out"]))) for seed in seeds}
    columns = list(next(iter(found.values())))
    cells = [spread([row[column] for row in found.values()]) for column in columns]
    head = ["correlation with the detector", "finished pictures", *(f"sigma {c}" for c in columns[1:])]
    table("surrogate", head, [["surrogate, then stitched", *cells]], f"Seeds {options['seeds']}.")
    save("surrogate", {"seeds": found})


if __name__ == "__main__":
    main()
