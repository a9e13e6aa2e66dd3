"""Steering by a stitched value against steering by pixel rewards, on the miniature, over seeds.

    python -m benchmarks.steering [parts=cost,dps,fk,scaling,cross] [reward=clip] [prompts=32] [seeds=0,1,2] [steps=20] [threads=0] [out=steered/benchmark]

cost:    a DPS step through Tweedie and through a stitched value, in time and memory, and the latter's floor: its parts timed alone, the shared prefix counted once.
dps:     each method over its scales; both at their own best scale: the largest sum of gains over unsteered of target, preference_b and detector, each
         gain as a share of the largest change that any scale of either method makes to that judge.
fk:      FK + StitchVM (N = 4, M = 2) against FK and best-of-N at the same N, and at the larger N that the same wall-clock time buys.
cross:   values stitched on `shapes` steer `shapes-large` (the paper's Table 6): DPS and FK with them against unsteered, DPS through Tweedie and best-of-N.
scaling: reward against seconds a picture for N = 1 .. 8 (FK), and M = 1 .. 8 at N = 2 (FK + StitchVM).
steps: of the sampler; FK's schedule of 40 steps is scaled to it. Every job is cached under `out` by its settings, so that the script goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, arguments, interleaved, peak_megabytes, save, table
from rlstitch import config as cfg
from rlstitch import steer, steering
from rlstitch.files import require, write_text
from rlstitch.report import line_plot
from rlstitch.steering.model import Steered
from rlstitch.stitch.model import read_card
from rlstitch.types import Latent

SCALES = {"dps": (3.0, 10.0, 30.0), "dps_stitch": (3.0, 10.0, 30.0, 100.0)}


class Bench:
    def __init__(self, options: dict[str, str]):
        self.reward, self.prompts, self.out = options["reward"], int(options["prompts"]), Path(options["out"])
        self.steps, self.threads = int(options["steps"]), int(options["threads"])
        self.seeds = [int(s) for s in options["seeds"].split(",")]
        self.judges = list(dict.fromkeys([self.reward, "preference_b", "detector"]))

    def recipe(self, name: str, method: dict[str, Any], model: str = "shapes:shapes") -> dict[str, Any]:
        """A steering recipe on one reward, its schedule scaled to the sampler's steps."""
        given = cfg.merge(
            cfg.compose(name),
            {
                "max_prompts": self.prompts, "judges": self.judges, "progress": False, "threads": self.threads,
                "oracle": {"weights": None}, "method": method, "out": str(self.out), "model": {"path": model}, "sampler": {"num_steps": self.steps},
            },
        )  # fmt: skip
        given["oracle"]["weights"] = {self.reward: 1.0}
        for key in ("resample_steps", "proposal_steps"):
            if key in given["method"]:
                given["method"][key] = sorted({k * self.steps // 40 for k in given["method"][key]})
        return given

    def job(self, name: str, seed: int, method: dict[str, Any], model: str) -> dict[str, Any]:
        """One steering job's result without its list of pictures; cached."""
        given = self.recipe(name, method, model) | {"seed": seed, "prompts": self._spread()}
        used = [read_card(given["values"][self.reward])["sha256"]] if name.endswith("_stitch") else []
        key = hashlib.sha256(json.dumps([given, used], sort_keys=True).encode()).hexdigest()[:12]
        given["name"] = f"{name}-{seed}-{key}"
        file = self.out / given["name"] / "scores.json"
        if not file.exists():
            steer.Job(steer.checked(given, name)).run()
        result = json.loads(file.read_text())
        told = {k: round(result["means"]["steered"][k], 4) for k in self.judges}
        print(given["name"], method, told, result["seconds_per_image"]["steered"], flush=True)
        return result

    def _spread(self) -> str:
        """A prompt file with every class of the held-out set: each k-th line of it."""
        lines = require("shapes:held_out.jsonl", "the held-out prompts").read_text().splitlines()
        step = max(1, len(lines) // self.prompts)
        path = self.out / f"prompts-{self.prompts}.jsonl"
        write_text(path, "\n".join(lines[::step][: self.prompts]) + "\n")
        return str(path)

    def over_seeds(self, name: str, model: str = "shapes:shapes", **method: Any) -> dict[str, Any]:
        """Mean and spread of every judge, seconds a picture."""
        results = [self.job(name, seed, method, model) for seed in self.seeds]
        row: dict[str, Any] = {"recipe": name, "method": method}
        for judge in self.judges:
            values = [r["means"]["steered"][judge] for r in results]
            row[judge] = round(statistics.mean(values), 4)
            row[f"{judge}_stdev"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        row["seconds_per_image"] = round(statistics.median(r["seconds_per_image"]["steered"] for r in results), 4)
        return row

    def best_scales(self, model: str = "shapes:shapes") -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The unsteered row, DPS over its scales, and each method's row at its own best one."""
        unsteered = self.over_seeds("dps_stitch", model, scale=0.0)
        sweep = {name: [self.over_seeds(name, model, scale=s) for s in scales] for name, scales in SCALES.items()}
        most = {j: max(abs(row[j] - unsteered[j]) for table in sweep.values() for row in table) or 1.0 for j in self.judges}

        def gain(row: dict[str, Any]) -> float:
            return sum((row[j] - unsteered[j]) / most[j] for j in self.judges)

        return unsteered, sweep, {name: max(table, key=gain) for name, table in sweep.items()}

    # ------------------------------------------------------------------------------------------------ parts

    def cost(self, rows: int = 8, repeats: int = 7) -> dict[str, Any]:
        """One DPS step of `rows` latents at sigma .5 under guidance, both ways, interleaved with the stitched one's parts."""
        jobs = {name: steer.Job(steer.checked(self.recipe(name, {}) | {"name": f"cost-{name}"}, name)) for name in SCALES}
        cases: dict[str, Any] = {}
        for name, job in jobs.items():
            batch, guidance = (
                job.prompts.batch([k % len(job.prompts) for k in range(rows)], torch.arange(rows)),
                job.config.sampler.guidance,
            )
            z = torch.randn(rows, *job.backbone.latent_shape, generator=torch.Generator().manual_seed(0)).to(job.backbone.device)
            step = torch.tensor([0.5, 0.45])

            def dps(job=job, batch=batch, z=z, step=step, guidance=guidance):
                with job.autocast():
                    model = Steered(job.backbone, job.oracle, batch, guidance=guidance)
                    return steering.dps(model.velocity, model.value, z, step)

            cases[name] = dps
        sigma, backbone = torch.full((rows,), 0.5, device=z.device), job.backbone  # the stitched job's from here on
        depth = job.oracle.models[0].prefix.depth

        def part(ask):
            def run():
                with job.autocast():
                    ask()

            return run

        def value():
            leaf = z.clone().requires_grad_(True)
            torch.autograd.grad(job.oracle(Latent(leaf, sigma), batch).sum(), leaf)

        parts = {
            "value with gradient": part(value),
            "two denoiser passes": part(torch.no_grad()(lambda: backbone.velocity(z, sigma, batch.text, guidance=guidance))),
            "prefix": part(torch.no_grad()(lambda: backbone.prefix(z, sigma, depth))),
        }
        seconds = interleaved(cases | parts, repeats)
        memory = {name: peak_megabytes(run) for name, run in cases.items()}
        floor = seconds["value with gradient"] + seconds["two denoiser passes"] - seconds["prefix"]
        return {
            "rows": rows,
            "seconds": {k: round(v, 5) for k, v in seconds.items()},
            "megabytes": {k: round(v, 2) for k, v in memory.items()},
            "times_faster": round(seconds["dps"] / seconds["dps_stitch"], 3),
            "memory_ratio": round(memory["dps_stitch"] / memory["dps"], 3),
            "of_its_floor": round(seconds["dps_stitch"] / floor, 3),
        }

    def dps(self) -> dict[str, Any]:
        unsteered, sweep, best = self.best_scales()
        labels = {"dps": "DPS through Tweedie", "dps_stitch": "DPS + StitchVM"}
        self.table("dps", {"unsteered": unsteered} | {f"{labels[n]}, scale {r['method']['scale']:g}": r for n, r in best.items()})
        return {"unsteered": unsteered, "sweep": sweep, "best": best}

    def fk(self) -> dict[str, Any]:
        stitched = self.over_seeds("fk_stitch", num_particles=4)
        out = {"FK + StitchVM, N = 4, M = 2": stitched}
        for label, name in (("FK", "fk"), ("best of N", "best_of_n")):
            same = out[f"{label}, N = 4"] = self.over_seeds(name, num_particles=4)
            more = max(1, round(4 * stitched["seconds_per_image"] / same["seconds_per_image"]))
            if more > 4:
                out[f"{label}, N = {more} (equal time)"] = self.over_seeds(name, num_particles=more)
        self.table("fk", out)
        return out

    def cross(self) -> dict[str, Any]:
        large = "shapes:shapes-large"
        unsteered, sweep, best = self.best_scales(large)
        out = {
            "unsteered": unsteered,
            f"DPS + StitchVM of shapes, scale {best['dps_stitch']['method']['scale']:g}": best["dps_stitch"],
            f"DPS through Tweedie, scale {best['dps']['method']['scale']:g}": best["dps"],
            "FK + StitchVM of shapes, N = 4, M = 2": self.over_seeds("fk_stitch", large, num_particles=4),
            "best of N, N = 4": self.over_seeds("best_of_n", large, num_particles=4),
        }
        self.table("cross", out)
        return {"rows": out, "sweep": sweep}

    def scaling(self) -> dict[str, Any]:
        curves = {
            "N-scaling (FK, Tweedie)": [self.over_seeds("fk", num_particles=n) for n in (1, 2, 4, 8)],
            "N-scaling (FK + StitchVM, M = 1)": [self.over_seeds("fk_stitch", num_particles=n, num_proposals=1) for n in (1, 2, 4, 8)],
            "M-scaling (FK + StitchVM, N = 2)": [self.over_seeds("fk_stitch", num_particles=2, num_proposals=m) for m in (1, 2, 4, 8)],
        }
        lines = {name: [(r["seconds_per_image"], r[self.reward]) for r in rows] for name, rows in curves.items()}
        svg = line_plot(
            lines, x_label="seconds a picture", y_label=f"{self.reward}, mean of finished pictures", width=620, height=380, standalone=True
        )
        write_text(RESULTS / f"steering_scaling_{self.reward}.svg", svg)
        return curves

    def table(self, part: str, rows: dict[str, dict[str, Any]]) -> None:
        """Markdown: a row a method."""
        lines = []
        for label, row in rows.items():
            cells = [f"{row[j]:.3f}" + (f" ± {s:.3f}" if (s := row[f"{j}_stdev"]) is not None else "") for j in self.judges]
            lines.append([label, *cells, f"{row['seconds_per_image']:.2f}"])
        note = f"{self.prompts} held-out prompts, {self.steps} steps, seeds {', '.join(map(str, self.seeds))}."
        table(f"steering_{part}_{self.reward}", ["", *self.judges, "seconds a picture"], lines, note)


def main() -> None:
    defaults = {"parts": "cost,dps,fk,scaling,cross", "reward": "clip", "prompts": "32", "seeds": "0,1,2", "steps": "20", "threads": "0"}
    options = arguments(defaults | {"out": "steered/benchmark"})
    bench = Bench(options)
    for part in options["parts"].split(","):
        told = {"reward": bench.reward, "prompts": bench.prompts, "seeds": bench.seeds, "steps": bench.steps}
        save(f"steering_{part}_{bench.reward}", told | {"result": getattr(bench, part)()})


if __name__ == "__main__":
    main()
