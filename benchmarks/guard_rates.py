"""How often the guard stops a run that nothing is wrong with, and how soon one that is: its own rule on simulated judges.

    python -m benchmarks.guard_rates [runs=1000] [prompts=64] [patience=3] [seed=0]

A judge's score of a prompt is that prompt's own level, plus noise that is new at every evaluation (correlation 0) or follows the one before (.5, .8: weights move
slowly and the noise seeds are shared), plus a mean that stays, or falls after the first evaluation by so many standard errors of a difference of two evaluations each.
The trained reward always climbs, which is the worst case. Evaluations: 4, 5, 8 and 16; the shipped recipes of the miniature have 5 or 6, draft_stitch_sd35 17.
"""

from __future__ import annotations

import torch

from benchmarks.common import arguments, save, table
from rlstitch.guard import Guard
from rlstitch.schema import GuardConfig

EVALUATIONS = (4, 5, 8, 16, 32)


def rate(*, evaluations: int, runs: int, seed: int, fall: float = 0.0, memory: float = 0.0, prompts: int = 64, patience: int = 3) -> float:
    """Share of `runs` that the guard stops within so many evaluations. fall: of the judge's mean at each one after the first, in standard errors; memory: correlation
    of a prompt's noise with that of the evaluation before."""
    generator, stopped = torch.Generator().manual_seed(seed), 0
    step = fall * (2 / prompts) ** 0.5
    for _ in range(runs):
        guard = Guard(GuardConfig(patience=patience), ["judge"])
        level, noise = torch.randn(2, prompts, generator=generator, dtype=torch.float64)
        for k in range(evaluations):
            if k:
                noise = memory * noise + (1 - memory**2) ** 0.5 * torch.randn(prompts, generator=generator, dtype=torch.float64)
            if guard.see({"judge": level + noise - k * step}, "", float(k)):
                stopped += 1
                break
    return stopped / runs


def main() -> None:
    options = arguments({"runs": "1000", "prompts": "64", "patience": "3", "seed": "0"})
    common = {k: int(options[k]) for k in ("runs", "prompts", "patience", "seed")}
    cases = {
        "flat, noise new at every evaluation": {},
        "flat, noise correlated .5": {"memory": 0.5},
        "flat, noise correlated .8": {"memory": 0.8},
        "falls by 1 standard error an evaluation": {"fall": 1.0},
        "falls by 2 standard errors an evaluation": {"fall": 2.0},
    }
    found = {label: {n: rate(evaluations=n, **common, **case) for n in EVALUATIONS} for label, case in cases.items()}
    rows = [[label, *(f"{share:.3f}" for share in by.values())] for label, by in found.items()]
    note = f"Share of simulated runs that are stopped; {options['runs']} runs a figure, {options['prompts']} prompts, patience {options['patience']}, seed {options['seed']}."
    table("guard_rates", ["judge", *(f"{n} evaluations" for n in EVALUATIONS)], rows, note)
    save("guard_rates", {"options": options, "rates": found})


if __name__ == "__main__":
    main()
