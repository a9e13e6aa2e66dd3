"""Steering by a stitched value against steering by pixel rewards, on the miniature, over seeds.

    python -m benchmarks.steering [parts=dps,fk,scaling,cross] [reward=clip] [prompts=48] [seeds=0,1,2] [out=steered/benchmark]

dps:     each method over its scales; both at their own best scale by the mean of target, preference_b and detector ranks.
fk:      FK + StitchVM (N = 4, M = 2) against FK and best-of-N at the same N, and at the larger N that the same wall-clock time buys.
cross:   values stitched on `shapes` steer `shapes-large` (the paper's Table 6): DPS and FK with them against unsteered, DPS through Tweedie and best-of-N.
scaling: reward against seconds a picture for N = 1 .. 8 (FK), and M = 1 .. 4 at N = 2 (FK + StitchVM).
Every job is cached under `out` by its settings, so that the script goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, arguments, save
from rlstitch import config as cfg
from rlstitch import steer
from rlstitch.files import write_text
from rlstitch.report import line_plot

SCALES = {"dps": (1.0, 3.0, 10.0, 30.0), "dps_stitch": (1.0, 3.0, 10.0, 30.0)}


class Bench:
    def __init__(self, options: dict[str, str]):
        self.reward, self.prompts, self.out = options["reward"], int(options["prompts"]), Path(options["out"])
        self.seeds = [int(s) for s in options["seeds"].split(",")]
        self.judges = list(dict.fromkeys([self.reward, "preference_b", "detector"]))

    def job(self, recipe: str, seed: int, method: dict[str, Any], model: str) -> dict[str, Any]:
        """One steering job's result without its list of pictures; cached."""
        given = cfg.merge(
            cfg.compose(recipe),
            {
                "seed": seed, "max_prompts": self.prompts, "prompts": self._spread(), "judges": self.judges, "progress": False,
                "oracle": {"weights": None}, "method": method, "out": str(self.out), "model": {"path": model},
            },
        )  # fmt: skip
        given["oracle"]["weights"] = {self.reward: 1.0}
        key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]
        given["name"] = f"{recipe}-{seed}-{key}"
        file = self.out / given["name"] / "scores.json"
        if not file.exists():
            steer.Job(steer.checked(given, recipe)).run()
        result = json.loads(file.read_text())
        print(
            given["name"],
            method,
            {k: round(result["means"]["steered"][k], 4) for k in self.judges},
            result["seconds_per_image"],
            flush=True,
        )
        return result

    def _spread(self) -> str:
        """A prompt file with every class of the held-out set: each k-th line of it."""
        from rlstitch.files import require

        lines = require("shapes:held_out.jsonl", "the held-out prompts").read_text().splitlines()
        step = max(1, len(lines) // self.prompts)
        path = self.out / f"prompts-{self.prompts}.jsonl"
        write_text(path, "\n".join(lines[::step][: self.prompts]) + "\n")
        return str(path)

    def over_seeds(self, recipe: str, model: str = "shapes:shapes", **method: Any) -> dict[str, Any]:
        """Mean and spread of every judge, seconds a picture."""
        results = [self.job(recipe, seed, method, model) for seed in self.seeds]
        row: dict[str, Any] = {"recipe": recipe, "method": method}
        for judge in self.judges:
            values = [r["means"]["steered"][judge] for r in results]
            row[judge] = round(statistics.mean(values), 4)
            row[f"{judge}_stdev"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        row["seconds_per_image"] = round(statistics.median(r["seconds_per_image"]["steered"] for r in results), 4)
        return row

    # ------------------------------------------------------------------------------------------------ parts

    def dps(self) -> dict[str, Any]:
        rows = {name: [self.over_seeds(name, scale=s) for s in scales] for name, scales in SCALES.items()}
        unsteered = self.over_seeds("dps_stitch", scale=0.0)
        best = {}
        for name, table in rows.items():
            places = [sum(sorted(r[j] for r in table).index(row[j]) for j in self.judges) for row in table]
            best[name] = table[max(range(len(table)), key=places.__getitem__)]
        return {"unsteered": unsteered, "sweep": rows, "best": best}

    def fk(self) -> dict[str, Any]:
        stitched = self.over_seeds("fk_stitch", num_particles=4)
        out = {"FK + StitchVM, N = 4, M = 2": stitched}
        for label, recipe in (("FK", "fk"), ("best of N", "best_of_n")):
            same = out[f"{label}, N = 4"] = self.over_seeds(recipe, num_particles=4)
            more = max(1, round(4 * stitched["seconds_per_image"] / same["seconds_per_image"]))
            if more > 4:
                out[f"{label}, N = {more} (equal time)"] = self.over_seeds(recipe, num_particles=more)
        return out

    def cross(self) -> dict[str, Any]:
        large = "shapes:shapes-large"
        return {
            "unsteered": self.over_seeds("dps_stitch", large, scale=0.0),
            "DPS + StitchVM of shapes": [self.over_seeds("dps_stitch", large, scale=s) for s in SCALES["dps_stitch"]],
            "DPS": [self.over_seeds("dps", large, scale=s) for s in SCALES["dps"]],
            "FK + StitchVM of shapes, N = 4, M = 2": self.over_seeds("fk_stitch", large, num_particles=4),
            "best of N, N = 4": self.over_seeds("best_of_n", large, num_particles=4),
        }

    def scaling(self) -> dict[str, Any]:
        curves = {
            "N-scaling (FK, Tweedie)": [self.over_seeds("fk", num_particles=n) for n in (1, 2, 4, 8)],
            "N-scaling (FK + StitchVM, M = 1)": [self.over_seeds("fk_stitch", num_particles=n, num_proposals=1) for n in (1, 2, 4, 8)],
            "M-scaling (FK + StitchVM, N = 2)": [self.over_seeds("fk_stitch", num_particles=2, num_proposals=m) for m in (1, 2, 4)],
        }
        lines = {name: [(r["seconds_per_image"], r[self.reward]) for r in rows] for name, rows in curves.items()}
        svg = line_plot(
            lines, x_label="seconds a picture", y_label=f"{self.reward}, mean of finished pictures", width=620, height=380, standalone=True
        )
        write_text(RESULTS / f"steering_scaling_{self.reward}.svg", svg)
        return curves


def main() -> None:
    options = arguments({"parts": "dps,fk,scaling,cross", "reward": "clip", "prompts": "48", "seeds": "0,1,2", "out": "steered/benchmark"})
    bench = Bench(options)
    for part in options["parts"].split(","):
        save(
            f"steering_{part}_{bench.reward}",
            {"reward": bench.reward, "prompts": bench.prompts, "seeds": bench.seeds, "result": getattr(bench, part)()},
        )


if __name__ == "__main__":
    main()
