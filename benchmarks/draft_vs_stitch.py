"""DRaFT with stitched values against DRaFT with pixel rewards at equal device-hours: trained reward, held-out detector and preference_b, over seeds.

    python -m benchmarks.draft_vs_stitch [seeds=0,1,2] [grad_steps=1] [out=runs/draft_vs_stitch] [updates=0: the recipe's]

Each stitched run sets the budget; `draft` gets as many updates as fit into the same device-hours (measured on its first five).
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import arguments, save

ROOT = Path(__file__).parents[1]


def train(recipe: str, name: str, out: Path, *overrides: str) -> dict:
    """Run (or resume) one training run in a process of its own; -> its summary."""
    summary = out / name / "summary.json"
    if not summary.exists():
        command = [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            f"recipe={recipe}",
            f"name={name}",
            f"out={out}",
            "logging.wandb=off",
            *overrides,
        ]
        subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(summary.read_text())


def training_hours(summary: dict) -> float:
    return sum(summary["device_hours"][k] for k in ("rollout", "oracle", "update", "refresh"))


def main() -> None:
    options = arguments({"seeds": "0,1,2", "grad_steps": "1", "out": "runs/draft_vs_stitch", "updates": "0"})
    out, k = Path(options["out"]), options["grad_steps"]
    common = [f"algorithm.grad_steps={k}", *([f"updates={options['updates']}"] if options["updates"] != "0" else [])]
    rows = []
    for seed in options["seeds"].split(","):
        stitched = train("draft_stitch", f"stitch-k{k}-seed{seed}", out, f"seed={seed}", *common)
        probe = train("draft", f"probe-k{k}", out, common[0], "updates=5", "evaluation.every=0", "evaluation.max_prompts=8")
        updates = max(1, int(training_hours(stitched) / (training_hours(probe) / 5)))
        pixel = train("draft", f"draft-k{k}-seed{seed}", out, f"seed={seed}", common[0], f"updates={updates}")
        rows.append({"seed": int(seed), "draft_stitch": stitched, "draft": pixel})

    def spread(recipe: str, which: str, metric: str) -> dict[str, float | None]:
        values = [r[recipe]["eval"][which][metric] for r in rows]
        return {"mean": round(statistics.mean(values), 4), "stdev": round(statistics.stdev(values), 4) if len(values) > 1 else None}

    metrics = ("clip", "hps", "aesthetic", "preference_b", "detector")
    table = {"base": {m: spread("draft_stitch", "base", m) for m in metrics}} | {
        r: {m: spread(r, "ema", m) for m in metrics} for r in ("draft_stitch", "draft")
    }
    hours = {r: round(statistics.mean(training_hours(row[r]) for row in rows), 4) for r in ("draft_stitch", "draft")}
    lines = ["| | device-hours | " + " | ".join(metrics) + " |", "|---|---|" + "---|" * len(metrics)]
    for name, row in table.items():
        cells = [f"{c['mean']:.4f}" + ("" if c["stdev"] is None else f" ± {c['stdev']:.4f}") for c in row.values()]
        lines.append(f"| {name} | {hours.get(name, '')} | " + " | ".join(cells) + " |")
    (Path(__file__).parent / "results" / f"draft_vs_stitch_k{k}.md").write_text("\n".join(lines) + "\n")
    save(
        f"draft_vs_stitch_k{k}",
        {
            "seeds": options["seeds"],
            "device_hours": hours,
            "updates": {r: [row[r]["steps"] for row in rows] for r in hours},
            "table": table,
        },
    )


if __name__ == "__main__":
    main()
