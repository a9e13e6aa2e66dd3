"""At real size, random weights: pixel path against stitched path of SD3.5-Medium, its autoencoder and a ViT-H/14@378 reward, side by side in one run.

    python -m benchmarks.real_size [size=sd35_medium|tiny] [pixels=512,1024] [parts=query,DPS,...] [blocks=4] [repeats=5] [seconds=1200] [threads=1] [again=true] [flops=only]

Value query (forward, gradient), a DPS step and an FK step under guidance, a DRaFT-1 update, an NFT update of two pictures: time, TFLOP, peak memory of both, and how much of
the ratio of TFLOP the ratio of times reaches. parts: cases by what their names hold. Every case is kept as it comes, its time before its memory, in
results/real_size_SIZE_MACHINE.json and a table beside it; a run goes on where the last one on this machine stopped, unless again=true. seconds: a case's rounds end
there, after one at least. flops=only counts the parts on the meta device.

bf16 where the machine multiplies it, in weights and in autocast, as jobs run; else float32. Seconds on a GPU are the wall's; on a CPU they are the process' own, of
`threads` threads. Memory is what a call holds at most beyond weights and inputs: CUDA's own count, or the CPU allocator's by torch's profiler. TFLOP are counted by torch
in the very call: products and convolutions, with what checkpointing makes again. The roof is a product of two 4096 x 4096 matrices, timed beside.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, arguments, interleaved, peak_megabytes, save, table
from benchmarks.real_parts import count, floors, load, write
from rlstitch import schedule, steering
from rlstitch.algorithms.draft import Draft
from rlstitch.algorithms.nft import NFT
from rlstitch.config import hardware
from rlstitch.distributed import autocast, native_bf16
from rlstitch.files import write_json
from rlstitch.oracles import Stitched, Terminal, Tweedie
from rlstitch.policy import Policy
from rlstitch.steering.model import Steered
from rlstitch.types import Batch, Latent

WAYS = ("pixel", "stitched")
STEERING = ("query forward", "query gradient", "DPS step", "FK, two steps")
UPDATES = ("DRaFT-1 update", "NFT update")
Row = dict[str, Any]
Case = dict[str, Callable[[], object]]  # by way


class Bench:
    """The cases of one size of pictures. Steering ones first: a LoRA ends the sharing of a prefix with guidance's branch, and slows pixel queries."""

    def __init__(self, folder: Path, size: str, pixels: int, blocks: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = precision()
        self.backbone, self.reward, self.value = load(folder, size, pixels, blocks, self.device, self.dtype)
        text = self.backbone.null.map(torch.randn_like)
        self.batch = Batch(["a red circle"], torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), [{}], text)
        self.z = torch.randn(1, *self.backbone.latent_shape, device=self.device)
        self.sigma = torch.full((1,), 0.5, device=self.device)
        self.stitched = Stitched({"r": self.value}, {"r": 1.0})

    def within(self, run: Callable[[Any], object], argument: Any) -> Callable[[], object]:
        """A call in the precision of a job."""

        def called() -> object:
            with autocast(self.device, "bf16" if self.dtype == torch.bfloat16 else "fp32"):
                return run(argument)

        return called

    def steering(self) -> dict[str, Case]:
        backbone, batch, z, sigma = self.backbone, self.batch, self.z, self.sigma

        def forward(oracle: Any) -> object:
            with torch.no_grad():
                return oracle(Latent(z, sigma), batch)

        def gradient(oracle: Any) -> object:
            leaf = z.clone().requires_grad_(True)
            return torch.autograd.grad(oracle(Latent(leaf, sigma), batch).sum(), leaf)

        def dps(oracle: Any) -> object:
            steered = Steered(backbone, oracle, batch, guidance=4.5)
            return steering.dps(steered.velocity, steered.value, z, torch.tensor([0.5, 0.45]), scale=1.0)

        def fk(oracle: Any) -> object:
            """Values of four particles and their steps; the stitched ones also draw two proposals each."""
            steered, proposals = Steered(backbone, oracle, batch, guidance=4.5), 2 if oracle is self.stitched else 1
            four = z.repeat(4, 1, 1, 1) + 0.01 * torch.randn(4, *z.shape[1:], device=z.device)
            return steering.fk(
                steered.velocity, steered.value, four, torch.tensor([0.5, 0.45, 0.4]), num_particles=4, num_proposals=proposals,
                proposal_steps=(0, 1), resample_steps=(0, 1), lam=1.0,
            )  # fmt: skip

        if not Steered(backbone, self.stitched, batch, guidance=4.5)._depths:
            raise AssertionError("the stitched case does not share its prefix")
        oracles = (Tweedie(backbone, {"r": self.reward}, {"r": 1.0}), self.stitched)
        return {
            name: {way: self.within(run, oracle) for way, oracle in zip(WAYS, oracles)}
            for name, run in zip(STEERING, (forward, gradient, dps, fk))
        }

    def updates(self) -> dict[str, Case]:
        """Ten steps to the end, or five to a stopped latent. NFT learns from two pictures of one prompt, at one training time; no KL."""
        backbone = self.backbone
        policy = Policy(backbone.transformer, rank=8, alpha=16.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9, old=True)
        backbone.checkpoint_activations()
        grid, pair = schedule.sigmas(10, 3.0, "plain"), replace(self.batch.interleave(2), seeds=torch.arange(2))

        def learn(method: Any, losses: Any) -> None:
            for loss, _ in losses:
                loss.backward()
            for p in method.policy.parameters():
                p.grad = None

        def draft(end: tuple[Any, int]) -> None:
            method = Draft(backbone, policy, end[0], grid, regulariser=0.0)
            done = method.rollout(self.batch, end[1])
            done.scores = method.score(done)
            learn(method, method.losses(done))

        def nft(end: tuple[Any, int]) -> None:
            method = NFT(backbone, policy, end[0], grid, times=1, kl=0.0)
            done = method.rollout(pair, end[1])
            weight, _ = method.compare([done], method.score(done), pair.group.to(self.z.device))
            learn(method, method.losses(done, weight, 1))

        ends = ((Terminal(backbone, {"r": self.reward}, {"r": 1.0}), 10), (self.stitched, 5))
        return {name: {way: self.within(run, end) for way, end in zip(WAYS, ends)} for name, run in zip(UPDATES, (draft, nft))}


def precision() -> torch.dtype:
    return torch.bfloat16 if native_bf16("cuda" if torch.cuda.is_available() else "cpu") else torch.float32


def clock() -> Callable[[], float]:
    """A process' own time is that of one thread alone; several may wait for each other."""
    return time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time


def roof(side: int = 4096) -> float:
    """TFLOP/s of a plain product in the precision of the cases."""
    a, b = (torch.randn(side, side, dtype=precision(), device="cuda" if torch.cuda.is_available() else "cpu") for _ in range(2))
    return 2 * side**3 / 1e12 / interleaved({"": lambda: a @ b}, 5, clock=clock())[""]


def timed(case: Case, row: Row, repeats: int, most: float) -> None:
    """TFLOP, counted in a first round that warms up, and median seconds of both ways."""
    tflop = {way: count(run) for way, run in case.items()}
    seconds = interleaved(case, repeats, clock=clock(), warm=False, most=most)
    for way in WAYS:
        row |= {f"{way}_tflop": round(tflop[way], 6), f"{way}_seconds": float(f"{seconds[way]:.5g}")}
    times, flops = seconds["pixel"] / seconds["stitched"], tflop["pixel"] / tflop["stitched"]
    row |= {"times_faster": round(times, 3), "tflop_ratio": round(flops, 3), "of_the_tflop_ratio": round(times / flops, 3)}


def weighed(case: Case, row: Row) -> None:
    found = {way: peak_megabytes(run) for way, run in case.items()}
    row |= {f"{way}_megabytes": round(found[way], 1) for way in WAYS}
    row["memory_ratio"] = round(found["stitched"] / found["pixel"], 3)


def measure(
    size: str, pixels: int, blocks: int, repeats: int, parts: str = "", rows: dict[str, Row] | None = None, keep: Callable[[], None] = lambda: None,
    *, folder: Path, most: float = math.inf,
) -> dict[str, Row]:  # fmt: skip
    """{case: figures}: those that `rows` lacks, `keep` called after each. Nothing is built where none is lacking."""
    rows, machine = {} if rows is None else rows, hardware()
    lacking = [
        name
        for name in STEERING + UPDATES
        if any(part.lower() in name.lower() for part in parts.split(",")) and "memory_ratio" not in _held(rows, name, machine, blocks)
    ]
    if not lacking:
        return rows
    bench = Bench(folder, size, pixels, blocks)
    for cases in (bench.steering, bench.updates):
        if not (names := [name for name in (STEERING if cases == bench.steering else UPDATES) if name in lacking]):
            continue
        made = cases()
        for name in names:
            row = rows[name] = _held(rows, name, machine, blocks) or {"hardware": machine, "blocks": blocks}
            if "times_faster" not in row:
                timed(made[name], row, repeats, most)
                keep()
            weighed(made[name], row)
            keep()
    return rows


def _held(rows: dict[str, Row], name: str, machine: str, blocks: int) -> Row:
    """A row that is of this machine and this cut."""
    row = rows.get(name, {})
    return row if (row.get("hardware"), row.get("blocks")) == (machine, blocks) else {}


def machine_name() -> str:
    return re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else "cpu"


HEAD = ("case", "pixel s", "stitched s", "times faster", "ratio of TFLOP", "of it", "share of the roof", "memory, MB", "ratio")


def tell(name: str, told: dict[str, Any]) -> None:
    """results/NAME.md."""
    lines = []
    for pixels, rows in told["by_pixels"].items():
        for case, row in rows.items():
            if "times_faster" not in row:
                continue
            share = " / ".join(f"{row[f'{way}_tflop'] / row[f'{way}_seconds'] / told['roof_tflops']:.2f}" for way in WAYS)
            memory = " / ".join(f"{row[f'{way}_megabytes']:,.0f}" for way in WAYS) if "memory_ratio" in row else ""
            lines.append(
                [f"{pixels} px, {case}", f"{row['pixel_seconds']:.3g}", f"{row['stitched_seconds']:.3g}", f"{row['times_faster']:.2f}",
                 f"{row['tflop_ratio']:.2f}", f"{row['of_the_tflop_ratio']:.2f}", share, memory, f"{row.get('memory_ratio', '')}"]
            )  # fmt: skip
    note = f"{told['hardware']}, {told['precision']}, random weights, value cut after {told['blocks']} blocks; roof: {told['roof_tflops']:.3g} TFLOP/s, a product of two 4096 x 4096 matrices."
    table(name, HEAD, lines, note)


def main() -> None:
    options = arguments(
        {"size": "sd35_medium", "pixels": "512,1024", "blocks": "4", "repeats": "5", "seconds": "1200", "threads": "1", "again": "", "flops": "", "parts": ""}
    )  # fmt: skip
    size, blocks, sizes = options["size"], int(options["blocks"]), options["pixels"].split(",")
    if options["flops"] == "only":
        told = {p: {"tflop": {k: round(v, 6) for k, v in floors(size, int(p), blocks).items()}} for p in sizes}
        return save(f"real_size_{size}_flops", {"size": size, "blocks": blocks, "by_pixels": told})
    torch.set_num_threads(int(options["threads"]))
    name = f"real_size_{size}_{machine_name()}"
    file, kind = RESULTS / f"{name}.json", str(precision()).removeprefix("torch.")
    held = json.loads(file.read_text()) if file.exists() and not options["again"] else {}
    result = {"hardware": hardware(), "precision": kind, "size": size, "blocks": blocks, "roof_tflops": float(f"{roof():.4g}")}
    result["by_pixels"] = held.get("by_pixels", {}) if held.get("precision") == kind else {}

    def keep() -> None:
        write_json(file, result)
        tell(name, result)
        print((RESULTS / f"{name}.md").read_text(), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), size, "cuda" if torch.cuda.is_available() else "cpu", precision())
        for p in sizes:
            rows = result["by_pixels"].setdefault(p, {})
            measure(
                size,
                int(p),
                blocks,
                int(options["repeats"]),
                options["parts"],
                rows,
                keep,
                folder=Path(folder),
                most=float(options["seconds"]),
            )


if __name__ == "__main__":
    main()
