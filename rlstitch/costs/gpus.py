"""What GPUs can do by their makers' data sheets: dense bfloat16 TFLOP/s with float32 sums, and gigabytes."""

from __future__ import annotations

from dataclasses import dataclass

from rlstitch.filling import nearest
from rlstitch.types import UserError


@dataclass(frozen=True)
class Gpu:
    name: str
    tflops: float
    memory: float  # GB


GPUS = {
    g.name: g
    for g in (
        Gpu("h100", 989, 80), Gpu("h200", 989, 141), Gpu("gh200", 989, 96), Gpu("b200", 2250, 180), Gpu("a100", 312, 80), Gpu("a100-40", 312, 40),
        Gpu("l40s", 362, 48), Gpu("l4", 121, 24), Gpu("a6000", 155, 48), Gpu("rtx3090", 71, 24), Gpu("rtx4090", 165, 24), Gpu("rtx5090", 210, 32),
        Gpu("mi300x", 1307, 192),
    )
}  # fmt: skip


def gpu(name: str, tflops: float = 0.0, memory: float = 0.0) -> Gpu:
    """By its name, or one of the user's own figures. Raises UserError for a name that is not known."""
    if tflops and memory:
        return Gpu(name, tflops, memory)
    key = name.lower().replace(" ", "").replace("_", "").removeprefix("nvidia").removeprefix("amd").removeprefix("-")
    if key not in GPUS:
        raise UserError(
            f"'gpu' {name!r} is not known{nearest(key, GPUS)}; there are {', '.join(GPUS)}. Of any other give tflops=NUMBER (dense bfloat16 TFLOP/s) and memory=NUMBER (GB)"
        )
    found = GPUS[key]
    return Gpu(found.name, tflops or found.tflops, memory or found.memory)
