"""Under classifier-free guidance: the gradient of both branches against the released Flow-GRPO form, in which the unconditional one is detached.

    python -m benchmarks.guidance_gradient [recipes=draft_stitch,flow_grpo_fast_stitch] [guidance=3.0] [seeds=0,1,2] [threads=0] [max_prompts=172] [out=runs/guidance]

Each recipe is trained and evaluated at this guidance, with `sampler.guidance_gradient` both and conditional; device-hours of training, held-out judges of the EMA
weights, and those of the base. Runs are kept under `out` and resume.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import arguments, save, spread, table, train, training_hours

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
    rows, kept = [], {}
    for recipe in options["recipes"].split(","):
        for kind in KINDS:
            runs = [
                train(recipe, f"{recipe}-{kind}-{seed}", Path(options["out"]), f"seed={seed}", f"sampler.guidance_gradient={kind}", *told)
                for seed in options["seeds"].split(",")
            ]
            hours = [training_hours(run["device_hours"]) for run in runs]
            kept[f"{recipe} {kind}"] = {"hours": hours, "ema": [run["eval"]["ema"] for run in runs], "base": runs[0]["eval"]["base"]}
            if not rows:
                rows.append(["base", "", *(f"{runs[0]['eval']['base'][judge]:.3f}" for judge in JUDGES)])
            rows.append([f"{recipe}, {kind}", spread(hours, 4), *(spread([run["eval"]["ema"][judge] for run in runs]) for judge in JUDGES)])
    save("guidance_gradient", {"guidance": float(options["guidance"]), "runs": kept})
    table(
        "guidance_gradient",
        ["", "device-hours", *JUDGES],
        rows,
        f"EMA weights, guidance {options['guidance']}, {len(options['seeds'].split(','))} seeds.",
    )


if __name__ == "__main__":
    main()
