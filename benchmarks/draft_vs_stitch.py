"""DRaFT with stitched values against DRaFT with pixel rewards at equal device-hours: trained reward, held-out detector and preference_b, over seeds.

    python -m benchmarks.draft_vs_stitch [seeds=0,1,2] [grad_steps=3] [out=runs/draft_vs_stitch] [updates=0: the recipe's] [threads=0] [max_prompts=0: all]

The first ten updates of each, run one after the other, give the cost of an update; `draft` gets as many updates as fit into the stitched run's device-hours.
Runs are kept under `out` and resume, so seeds can be run apart and the table be written from all of them at the end.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import arguments, save
from rlstitch import metrics
from rlstitch.config import compose

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


def reach(out: Path, k: str, seed: str) -> dict[str, float | None]:
    """Training hours at which `draft` has its best clean reward (clip + hps, evaluations on the way) and at which the stitched run has reached that."""
    curves = {}
    for recipe in ("draft_stitch", "draft"):
        rows = [r for r in metrics.read(out / f"{recipe}-k{k}-seed{seed}") if "eval" in r]
        spent = [sum(next(v for n, v in r.items() if n.endswith("_hours"))[p] for p in ("rollout", "oracle", "update")) for r in rows]
        curves[recipe] = [(h, r["eval"]["clip"] + r["eval"]["hps"]) for h, r in zip(spent, rows)]
    best = max(curves["draft"], key=lambda point: point[1])
    hit = next((h for h, r in curves["draft_stitch"] if r >= best[1]), None)
    return {"draft": round(best[0], 4), "draft_stitch": None if hit is None else round(hit, 4)}


def main() -> None:
    options = arguments(
        {"seeds": "0,1,2", "grad_steps": "3", "out": "runs/draft_vs_stitch", "updates": "0", "threads": "0", "max_prompts": "0"}
    )
    out, k = Path(options["out"]), options["grad_steps"]
    common = [f"algorithm.grad_steps={k}", f"threads={options['threads']}", "guard.patience=0"]
    quick = ("updates=10", "evaluation.every=0", "evaluation.max_prompts=8")
    cost = {r: training_hours(train(r, f"probe-{r}-k{k}", out, *common, *quick)) for r in ("draft_stitch", "draft")}
    updates = int(options["updates"]) or compose("draft_stitch")["updates"]
    budget = {"draft_stitch": updates, "draft": max(1, round(updates * cost["draft_stitch"] / cost["draft"]))}
    whole = [*common, f"evaluation.max_prompts={options['max_prompts']}"]
    rows = []
    for seed in options["seeds"].split(","):
        runs = {r: train(r, f"{r}-k{k}-seed{seed}", out, f"seed={seed}", f"updates={n}", *whole) for r, n in budget.items()}
        rows.append({"seed": int(seed), **runs} | {"reach": reach(out, k, seed)})

    def spread(recipe: str, which: str, metric: str) -> dict[str, float | None]:
        values = [r[recipe]["eval"][which][metric] for r in rows]
        return {"mean": round(statistics.mean(values), 4), "stdev": round(statistics.stdev(values), 4) if len(values) > 1 else None}

    metrics = ("clip", "hps", "aesthetic", "preference_b", "detector")
    table = {"base": {m: spread("draft_stitch", "base", m) for m in metrics}} | {
        r: {m: spread(r, "ema", m) for m in metrics} for r in ("draft_stitch", "draft")
    }
    (Path(__file__).parent / "results").mkdir(exist_ok=True)
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
            "seconds_per_update": {r: round(3600 * h / 10, 3) for r, h in cost.items()},
            "hours_to_drafts_best_reward": [r["reach"] for r in rows],
        },
    )


if __name__ == "__main__":
    main()
