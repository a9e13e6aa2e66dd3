"""Refresh on a strongly finetuned policy: the value models' gap to the truth while DRaFT + StitchVM trains on them, with refresh and without.

    python -m benchmarks.refresh [seeds=0,1,2] [updates=200] [every=20] [lr=1.6e-3] [fraction=0.125] [agreement=0.5] [max_prompts=64] [threads=0] [out=runs/refresh]

The policy is driven far on purpose: twice the recipe's learning rate and updates, no regulariser. gap: mean(V - r) over the spread of r, V read in the middle
of the stop window, r on the finished picture, both of the current policy on held-out prompts. The results kept here are of an earlier
rule, which acted where the gap exceeded a quarter of a spread. Runs are kept under `out` and resume.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, arguments, save, spread, table, train, training_hours
from rlstitch import metrics
from rlstitch.files import write_text
from rlstitch.report import line_plot

TRAINED = ("clip", "hps")
JUDGES = ("preference_b", "detector")


def gaps(run: Path) -> list[dict[str, float]]:
    """Of every evaluation on the way: the update, each value model's gap and correlation."""
    keys = [f"{figure}/{name}" for figure in ("gap", "correlation") for name in TRAINED]
    return [{"update": row["step"], **{k: row["eval"].get(k, math.nan) for k in keys}} for row in metrics.read(run) if "eval" in row]


def told(label: str, runs: list[tuple[dict[str, Any], list[dict[str, float]]]]) -> list[str]:
    """One row of the table, means over the seeds."""
    last = [spread([abs(rows[-1][f"gap/{n}"]) for _, rows in runs], 2) for n in TRAINED]
    whole = [spread([statistics.mean(abs(r[f"gap/{n}"]) for r in rows) for _, rows in runs], 2) for n in TRAINED]
    agree = [spread([rows[-1][f"correlation/{n}"] for _, rows in runs], 2) for n in TRAINED]
    scores = [spread([s["eval"]["ema"][n] for s, _ in runs]) for n in (*TRAINED, *JUDGES)]
    return [label, *whole, *last, *agree, *scores, spread([training_hours(s["device_hours"]) for s, _ in runs])]


def main() -> None:
    options = arguments(
        {
            "seeds": "0,1,2", "updates": "200", "every": "20", "lr": "1.6e-3", "fraction": "0.125", "agreement": "0.5", "max_prompts": "64",
            "threads": "0", "out": "runs/refresh",
        }
    )  # fmt: skip
    out, common = Path(options["out"]), [f"{k}={options[k]}" for k in ("updates", "threads")]
    common += [f"evaluation.{k}={options[k]}" for k in ("every", "max_prompts")]
    common += [f"optimiser.lr={options['lr']}", "algorithm.regulariser=0", "guard.patience=0"]
    cases = {"no refresh": [], "refresh": [f"refresh.fraction={options['fraction']}", f"refresh.agreement={options['agreement']}"]}
    found: dict[str, list[tuple[dict[str, Any], list[dict[str, float]]]]] = {}
    for seed in options["seeds"].split(","):
        for label, overrides in cases.items():
            name = f"{label.replace(' ', '-')}-lr{options['lr']}-{options['updates']}-seed{seed}"
            summary = train("draft_stitch", name, out, f"seed={seed}", *common, *overrides)
            found.setdefault(label, []).append((summary, gaps(out / name)))
    head = [
        "",
        *(f"mean abs. gap, {n}" for n in TRAINED),
        *(f"last abs. gap, {n}" for n in TRAINED),
        *(f"last correlation, {n}" for n in TRAINED),
    ]
    head += [*TRAINED, *JUDGES, "device-hours"]
    note = f"DRaFT-1 + StitchVM, lr {options['lr']}, {options['updates']} updates, no regulariser, seeds {options['seeds']}; gaps in spreads of the reward."
    table("refresh", head, [told(label, runs) for label, runs in found.items()], note)
    curves = {f"{n}, {label}": [(r["update"], r[f"gap/{n}"]) for r in runs[0][1]] for label, runs in found.items() for n in TRAINED}
    plot = line_plot(
        curves, x_label="updates", y_label="V - r on the policy's own pictures, in spreads of r", width=620, height=380, standalone=True
    )
    write_text(RESULTS / "refresh.svg", plot)
    save(
        "refresh",
        {
            "options": {k: v for k, v in options.items() if k != "out"},
            "runs": {k: [{"eval": s["eval"], "gaps": rows} for s, rows in v] for k, v in found.items()},
        },
    )


if __name__ == "__main__":
    main()
