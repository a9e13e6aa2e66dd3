"""The paper's Table 3 and Figures 4, 5 and 7 in miniature: every training method with pixel rewards and with stitched values, against device-hours.

    python -m benchmarks.paper_tables [parts=table3,released,windows,marble,pictures,recipes] [seeds=0,1,2] [out=runs/paper] [updates=0: the recipes'] [threads=0] [max_prompts=0: all]
        [methods=all: rows of table3, e.g. methods=DRaFT-1,DRaFT-1 + StitchVM]

table3:  base, Flow-GRPO-Fast, DRaFT-1, DRaFT-3, DiffusionNFT, and all four with StitchVM: device-hours (the value models' one-off cost beside them), trained
         rewards, held-out judges; time to the pixel method's best reward; every metric against device-hours as SVG (Figures 4 and 5), means over the seeds.
released: DiffusionNFT with and without StitchVM, with the released share of training times (9 of 10 a sample), as the paper trains it.
windows: NFT + StitchVM under four stopping windows (Figure 7).
marble:  five rewards, one of which pulls the other way: how often the update goes against the worst one, under MARBLE and under the weighted sum, and the cost.
pictures: SOAR, plain SFT and Diffusion-DPO at equal updates.
recipes: what every shipped training recipe makes of its reward, and in how many minutes.
Each run is kept under `out` and resumes; parts share the runs that they have in common, and seeds can be run apart and the tables be written from all at the end.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, arguments, save, spread, table, train, training_hours
from rlstitch import metrics
from rlstitch.files import write_text
from rlstitch.report import line_plot

METHODS = {  # name: (recipe, overrides, the pixel method it is held against)
    "Flow-GRPO-Fast": ("flow_grpo_fast", (), None),
    "DRaFT-1": ("draft", (), None),
    "DRaFT-3": ("draft", ("algorithm.grad_steps=3",), None),
    "DiffusionNFT": ("nft", (), None),
    "Flow-GRPO-Fast + StitchVM": ("flow_grpo_fast_stitch", (), "Flow-GRPO-Fast"),
    "DRaFT-1 + StitchVM": ("draft_stitch", (), "DRaFT-1"),
    "DRaFT-3 + StitchVM": ("draft_stitch", ("algorithm.grad_steps=3",), "DRaFT-3"),
    "DiffusionNFT + StitchVM": ("nft_stitch", (), "DiffusionNFT"),
}
RELEASED = {  # with as many training times as the released DiffusionNFT takes
    "DiffusionNFT": ("nft_released", (), None),
    "DiffusionNFT + StitchVM": ("nft_released_stitch", (), "DiffusionNFT"),
}
WINDOWS = ((2, 3), (4, 5), (5, 6), (7, 8))
# Large batches, since darkness is told by every picture and the other rewards by few, and few updates: it has no bound, and where every gradient counts alike it
# has cost clip its gain after 18 and turned most pictures black after 28. Its small weight is the weighted sum's alone; MARBLE asks for none.
FIVE = (
    "updates=12",
    "ema_decay=0.9",
    "optimiser.lr=4.5e-4",
    "batch.prompts_per_update=24",
    "algorithm.every=2",
    "evaluation.every=4",
    "rewards.darkness={_target_: rlstitch.rewards.simple.Darkness}",
    "oracle.weights={clip: 1.0, hps: 1.0, aesthetic: 0.1, detector: 1.0, darkness: 0.1}",
    "evaluation.rewards=[clip, hps, aesthetic, preference_b, detector, darkness]",
)
RECIPES = (
    "draft", "draft_stitch", "align_prop", "refl", "nft", "nft_stitch", "flow_grpo", "flow_grpo_fast", "flow_grpo_fast_stitch",
    "marble", "marble_stitch", "dpo_online", "dpo_online_stitch", "pdtr", "soar", "sft", "dpo",
)  # fmt: skip
JUDGES = ("clip", "hps", "preference_b", "aesthetic", "detector")
TRAINED = ("clip", "hps")
Runs = dict[str, list[tuple[Path, dict[str, Any]]]]  # (folder, summary) of every seed, by row of a table


def hours_at(row: dict[str, Any]) -> float:
    """Device-hours of training until a row of the log."""
    return training_hours(next(v for k, v in row.items() if k.endswith("_hours")))


def curve(run: Path, metric: str) -> list[tuple[float, float]]:
    """(device-hours of training, score) of a run's evaluations on the way; `reward` is the sum of the trained ones. Without the value models' one-off cost, whose
    offset would be most of a picture."""
    points = []
    for row in metrics.read(run):
        if "eval" in row:
            points.append((hours_at(row), sum(row["eval"][n] for n in TRAINED) if metric == "reward" else row["eval"][metric]))
    return points


def mean_curve(runs: list[Path], metric: str) -> list[tuple[float, float]]:
    """The mean over runs of one recipe, evaluation by evaluation."""
    return [tuple(map(statistics.mean, zip(*points))) for points in zip(*(curve(run, metric) for run in runs))]


def hours_to(points: list[tuple[float, float]], goal: float) -> float | None:
    """Device-hours at which a curve first reaches the goal, between evaluations by interpolation; None where it never does."""
    for (h0, r0), (h1, r1) in zip(points, points[1:]):
        if r1 >= goal:
            return h1 if r1 == r0 or r0 >= goal else h0 + (h1 - h0) * (goal - r0) / (r1 - r0)
    return None


def reach(own: list[tuple[float, float]], rival: list[tuple[float, float]]) -> dict[str, float | None]:
    """The rival's best reward, its hours to it, and the share of them after which the own curve is there; None where it never is."""
    hours, goal = max(rival, key=lambda point: point[1])
    mine = hours_to(own, goal)
    return {"reward": round(goal, 4), "rival_hours": round(hours, 5), "share": None if mine is None else round(mine / hours, 3)}


def cost_of_full_solves(runs: list[Path]) -> dict[str, float]:
    """Median seconds of an update with NFT's passes alone and with a full solve (a run's first update, all of whose slots are full solves, left out), and NFT's
    speed that is left where every tenth update has one."""
    plain, full = [], []
    for run in runs:
        before = None
        for row in metrics.read(run):
            if "loss" in row:
                hours = hours_at(row)
                if before is not None:
                    (full if "worst_cosine" in row else plain).append(3600 * (hours - before))
                before = hours
    p, f = statistics.median(plain), statistics.median(full)
    return {
        "seconds_plain": round(p, 3),
        "seconds_with_full_solve": round(f, 3),
        "speed_at_every_10": round(p / (0.9 * p + 0.1 * f), 4),
    }


class Tables:
    def __init__(self, options: dict[str, str]):
        self.out, self.seeds = Path(options["out"]), [int(s) for s in options["seeds"].split(",")]
        self.prompts = int(options["max_prompts"])
        self.methods = list(METHODS) if options["methods"] == "all" else options["methods"].split(",")
        if odd := set(self.methods) - set(METHODS):
            raise SystemExit(f"unknown methods {', '.join(sorted(odd))}; there are {', '.join(METHODS)}")
        self.evaluation = [f"threads={options['threads']}", f"evaluation.max_prompts={self.prompts}"]
        self.base = self.scores_of_base("draft", "base")
        self.common = [*self.evaluation, "evaluation.final=[ema]", "guard.patience=0"]
        if options["updates"] != "0":
            self.common += [f"updates={options['updates']}", f"evaluation.every={max(1, int(options['updates']) // 5)}"]

    def scores_of_base(self, recipe: str, name: str, *overrides: str) -> dict[str, float]:
        """The untrained model's, which are the same in every run with these rewards."""
        once = ("updates=1", "evaluation.every=0", "evaluation.final=[base]")
        return train(recipe, name, self.out, *self.evaluation, *overrides, *once)["eval"]["base"]

    def runs(self, label: str, recipe: str, *overrides: str) -> list[tuple[Path, dict[str, Any]]]:
        """(folder, summary) of every seed."""
        slug = label.lower().replace(" + ", "-").replace(" ", "-") if overrides else recipe
        names = [(f"{slug}-seed{seed}", seed) for seed in self.seeds]
        return [(self.out / name, train(recipe, name, self.out, f"seed={seed}", *overrides, *self.common)) for name, seed in names]

    def row(self, label: str, summaries: list[dict[str, Any]], judges: Sequence[str]) -> list[str]:
        hours = spread([training_hours(s["device_hours"]) for s in summaries], 4)
        once = f"{statistics.mean(s['device_hours']['stitching'] for s in summaries):.3f}"
        return [label, hours, once, *(spread([s["eval"]["ema"][j] for s in summaries]) for j in judges)]

    def figures(self, name: str, runs: Runs, curves: Sequence[str]) -> None:
        """One SVG a metric, means over the seeds, everything against device-hours."""
        for metric in curves:
            lines = {label: mean_curve([run for run, _ in found], metric) for label, found in runs.items()}
            lines = {label: points for label, points in lines.items() if len(points) > 1}
            if lines:
                svg = line_plot(lines, x_label="device-hours of training", y_label=metric, width=640, height=420, standalone=True)
                write_text(RESULTS / f"{name}_{metric}.svg", svg)

    def write(
        self, name: str, runs: Runs, base: dict[str, float], *, judges: Sequence[str] = JUDGES, curves: Sequence[str] = ("reward",)
    ) -> None:
        """The table <name>.md of what all runs end with, and a picture of each of the `curves`."""
        rows = [["base", "", "", *(f"{base[j]:.3f}" for j in judges)]]
        rows += [self.row(label, [s for _, s in found], judges) for label, found in runs.items()]
        prompts = f"first {self.prompts}" if self.prompts else "all"
        listed = ", ".join(map(str, self.seeds))
        over = f"mean and standard deviation over seeds {listed}" if len(self.seeds) > 1 else f"seed {listed}"
        note = f"EMA weights, {prompts} held-out prompts, 40 steps, guidance 1; {over}."
        table(name, ["", "device-hours", "value models, once", *judges], rows, note)
        self.figures(name, runs, curves)

    def table3(self) -> dict[str, Any]:
        chosen = {label: METHODS[label] for label in METHODS if label in self.methods}
        return self.raced(
            "table3", {label: self.runs(label, recipe, *overrides) for label, (recipe, overrides, _) in chosen.items()}, chosen
        )

    def released(self) -> dict[str, Any]:
        return self.raced("released", {label: self.runs(recipe, recipe) for label, (recipe, *_) in RELEASED.items()}, RELEASED)

    def raced(self, name: str, runs: Runs, chosen: Mapping[str, tuple[str, tuple[str, ...], str | None]]) -> dict[str, Any]:
        """A table of runs, and the hours that each takes to its rival's best reward."""
        self.write(name, runs, self.base, curves=("reward", *JUDGES))
        reached = {}
        for label, (_, _, rival) in chosen.items():
            if rival in runs:
                own, other = ([run for run, _ in runs[name]] for name in (label, rival))
                each = [reach(curve(mine, "reward"), curve(theirs, "reward")) for mine, theirs in zip(own, other)]
                reached[label] = {"by_the_mean_curves": reach(mean_curve(own, "reward"), mean_curve(other, "reward")), "by_seed": each}
        return {"summaries": {k: [s for _, s in v] for k, v in runs.items()}, "time_to_the_rivals_best_reward": reached}

    def windows(self) -> dict[str, Any]:
        runs = {}
        for low, high in WINDOWS:
            label = f"NFT + StitchVM, steps {low} to {high}"
            runs[label] = self.runs(f"windows {low}-{high}", "nft_stitch", f"stop.low={low}", f"stop.high={high}", "algorithm.times=2")
        self.write("windows", runs, self.base)
        return {label: [s for _, s in found] for label, found in runs.items()}

    def marble(self) -> dict[str, Any]:
        runs = {
            "MARBLE": self.runs("marble five", "marble", *FIVE),
            "weighted sum": self.runs("marble five sum", "marble", *FIVE, "algorithm.solve=sum"),
        }
        self.write("marble", runs, self.scores_of_base("marble", "base five", *FIVE), judges=(*JUDGES, "darkness"), curves=())
        out: dict[str, Any] = {}
        for label, found in runs.items():
            rows = [r for run, _ in found for r in metrics.read(run)]
            out[label] = cost_of_full_solves([run for run, _ in found]) | {"ema": [s["eval"]["ema"] for _, s in found]}
            for key in ("worst_cosine", "amortised_worst_cosine"):
                if measured := [r[key] for r in rows if key in r]:
                    out[label][key] = {
                        "updates": len(measured),
                        "share_positive": round(sum(c > 0 for c in measured) / len(measured), 4),
                        "mean": round(statistics.mean(measured), 4),
                    }
        return out

    def pictures(self) -> dict[str, Any]:
        runs = {label: self.runs(label, recipe) for label, recipe in (("SFT", "sft"), ("SOAR", "soar"), ("Diffusion-DPO", "dpo"))}
        self.write("pictures", runs, self.base, curves=("hps", "detector"))
        return {label: [s for _, s in found] for label, found in runs.items()}

    def recipes(self) -> dict[str, Any]:
        runs = {recipe: self.runs(recipe, recipe) for recipe in RECIPES}
        self.write("recipes", runs, self.base, curves=())
        return {
            recipe: {
                "minutes": [round(60 * training_hours(s["device_hours"]), 2) for _, s in found],
                "ema": [s["eval"]["ema"] for _, s in found],
            }
            for recipe, found in runs.items()
        }


def main() -> None:
    options = arguments(
        {
            "parts": "table3,released,windows,marble,pictures,recipes",
            "seeds": "0,1,2",
            "out": "runs/paper",
            "updates": "0",
            "threads": "0",
            "max_prompts": "0",
            "methods": "all",
        }
    )
    tables = Tables(options)
    for part in options["parts"].split(","):
        save(f"paper_{part}", {"seeds": options["seeds"], "base": tables.base, **getattr(tables, part)()})


if __name__ == "__main__":
    main()
