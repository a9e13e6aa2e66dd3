"""Under classifier-free guidance: the gradient of both branches against the released Flow-GRPO form, in which the unconditional one is detached.

    python -m benchmarks.guidance_gradient [recipes=draft_stitch,flow_grpo_fast_stitch] [guidance=3.0] [seeds=0,1,2] [threads=0] [max_prompts=172] [out=runs/guidance]

Each recipe is trained and evaluated at this guidance, with `sampler.guidance_gradient` both and conditional; device-hours of training, held-out judges of the EMA
weights, and those of the base. Runs are kept under `out` and resume, their rows in results/.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.common import arguments, row, spread, table, train, training_hours

KINDS = ("both", "conditional")
JUDGES = ("clip", "hps", "preference_b", "aesthetic", "detector")


def main() -> None:
    options = arguments(
        dict(
            recipes="draft_stitch,flow_grpo_fast_stitch", guidance="3.0", seeds="0,1,2", threads="0", max_prompts="172", out="runs/guidance"
        )
    )
    told = [
        f"sampler.guidance={options['guidance']}", f"evaluation.guidance={options['guidance']}", f"evaluation.max_prompts={options['max_prompts']}",
        f"threads={options['threads']}", "evaluation.every=0", "evaluation.final=[base, ema]",
    ]  # fmt: skip
    rows: list[list[str]] = []
    for recipe in options["recipes"].split(","):
        for kind in KINDS:

            def made(seed: str, recipe: str = recipe, kind: str = kind) -> dict:
                name, gradient = f"{recipe}-{kind}-{seed}", f"sampler.guidance_gradient={kind}"
                run = train(recipe, name, Path(options["out"]), f"seed={seed}", gradient, *told)
                return {"hours": training_hours(run["device_hours"]), "ema": run["eval"]["ema"], "base": run["eval"]["base"]}

            setting = f"guidance {options['guidance']}, {options['max_prompts']} prompts"
            runs = [
                row("guidance_gradient", f"{recipe} {kind} seed {seed}, {setting}", partial(made, seed))
                for seed in options["seeds"].split(",")
            ]
            if not rows:
                rows.append(["base", "", *(f"{runs[0]['base'][judge]:.3f}" for judge in JUDGES)])
            hours = spread([run["hours"] for run in runs], 4)
            rows.append([f"{recipe}, {kind}", hours, *(spread([run["ema"][judge] for run in runs]) for judge in JUDGES)])
    table(
        "guidance_gradient",
        ["", "device-hours", *JUDGES],
        rows,
        f"EMA weights, guidance {options['guidance']}, {len(options['seeds'].split(','))} seeds.",
    )


if __name__ == "__main__":
    main()
