"""DRaFT with stitched values against DRaFT with pixel rewards at equal device-hours: trained reward, held-out detector and preference_b, over seeds.

    python -m benchmarks.draft_vs_stitch [recipes=draft_stitch,draft] [seeds=0,1,2] [grad_steps=3] [out=runs/draft_vs_stitch]
        [updates=0: the recipe's] [threads=0] [max_prompts=0: all]

The first ten updates of each, run one after the other, give the cost of an update; `draft` gets as many updates as fit into the stitched run's device-hours.
Runs are kept under `out` and resume, so seeds can be run apart and the table be written from all of them at the end.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, arguments, save
from rlstitch import metrics
from rlstitch.config import compose
from rlstitch.files import write_text

ROOT = Path(__file__).parents[1]
JUDGES = ("clip", "hps", "aesthetic", "preference_b", "detector")


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


def budgets(recipes: list[str], out: Path, k: str, updates: int, common: list[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Updates of each recipe at the stitched one's device-hours, and seconds of an update; the stitched one alone needs no measurement."""
    if recipes == ["draft_stitch"]:
        return {"draft_stitch": updates}, {}
    quick = ("updates=10", "evaluation.every=0", "evaluation.max_prompts=8")
    cost = {r: training_hours(train(r, f"probe-{r}-k{k}", out, *common, *quick)) for r in ("draft_stitch", "draft")}
    return {r: max(1, round(updates * cost["draft_stitch"] / cost[r])) for r in recipes}, {r: round(360 * h, 3) for r, h in cost.items()}


def main() -> None:
    options = arguments(
        {
            "recipes": "draft_stitch,draft", "seeds": "0,1,2", "grad_steps": "3", "out": "runs/draft_vs_stitch", "updates": "0",
            "threads": "0", "max_prompts": "0",
        }
    )  # fmt: skip
    out, k, recipes = Path(options["out"]), options["grad_steps"], options["recipes"].split(",")
    common = [f"algorithm.grad_steps={k}", f"threads={options['threads']}", "guard.patience=0"]
    budget, seconds = budgets(recipes, out, k, int(options["updates"]) or compose("draft_stitch")["updates"], common)
    whole = [*common, f"evaluation.max_prompts={options['max_prompts']}"]
    seeds = options["seeds"].split(",")
    runs = {r: [train(r, f"{r}-k{k}-seed{seed}", out, f"seed={seed}", f"updates={n}", *whole) for seed in seeds] for r, n in budget.items()}

    def spread(summaries: list[dict], which: str) -> dict[str, dict[str, float | None]]:
        columns = {m: [s["eval"][which][m] for s in summaries] for m in JUDGES}
        return {
            m: {"mean": round(statistics.mean(v), 4), "stdev": round(statistics.stdev(v), 4) if len(v) > 1 else None}
            for m, v in columns.items()
        }

    table = {"base": spread(runs["draft_stitch"], "base")} | {r: spread(found, "ema") for r, found in runs.items()}
    hours = {r: round(statistics.mean(map(training_hours, found)), 4) for r, found in runs.items()}
    lines = ["| | device-hours | " + " | ".join(JUDGES) + " |", "|---|---|" + "---|" * len(JUDGES)]
    for name, row in table.items():
        cells = [f"{c['mean']:.4f}" + ("" if c["stdev"] is None else f" ± {c['stdev']:.4f}") for c in row.values()]
        lines.append(f"| {name} | {hours.get(name, '')} | " + " | ".join(cells) + " |")
    name = f"{recipes[0] if len(recipes) == 1 else 'draft_vs_stitch'}_k{k}"
    write_text(RESULTS / f"{name}.md", "\n".join(lines) + "\n")
    results = {
        "seeds": options["seeds"],
        "device_hours": hours,
        "updates": budget,
        "seconds_per_update": seconds,
        "table": table,
        "each": {r: [s["eval"]["ema"] for s in found] for r, found in runs.items()},
    }
    save(name, results | ({"hours_to_drafts_best_reward": [reach(out, k, seed) for seed in seeds]} if "draft" in recipes else {}))


if __name__ == "__main__":
    main()
