"""What every reward has to keep, whoever wrote it, clause by clause on a few pictures: what `launch/check_reward.py` prints and the tests hold ours to."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlstitch.asking import PartError, ask, has_gradient, inside
from rlstitch.types import Batch

STEPS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2)  # of finite differences, root mean square of a pixel
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Clause:
    """One thing that a reward has to keep: whether it does (None: it is none of this one's), and what was seen."""

    name: str
    held: bool | None
    seen: str


def batch_of(prompts: Sequence[str], rows: Sequence[dict[str, Any]]) -> Batch:
    places = torch.arange(len(prompts))
    return Batch(list(prompts), places, places, list(rows))


def contract(name: str, reward: Any, images: Tensor, prompts: Sequence[str], rows: Sequence[dict[str, Any]] | None = None) -> list[Clause]:
    """Hold a built reward to its contract on N pictures [N, 3, H, W] in [0, 1], N >= 2, with a different prompt each and, where it reads more, the rows of their prompt file.

    A reward says by `reads_prompt` whether the prompt matters (it does where nothing is said), by `differentiable` whether it has a gradient. What it raises is a clause not
    kept, not an error here.
    """
    rows = [{"prompt": p} for p in prompts] if rows is None else rows
    count, images = len(prompts), images.float()
    loose = getattr(reward, "dtype", torch.float32) in HALF
    whole = batch_of(prompts, rows)
    clauses: list[Clause] = []

    def hold(clause: str, look: Callable[[], tuple[bool | None, str]]) -> None:
        try:
            clauses.append(Clause(clause, *look()))
        except PartError as error:
            clauses.append(Clause(clause, False, str(error)))

    @torch.no_grad()
    def scores(pictures: Tensor, batch: Batch) -> Tensor:
        return ask(name, reward, pictures, batch).cpu().double()

    def every() -> Tensor:
        """Every picture under every prompt [N, N]."""
        rows_of = [i for _ in range(count) for i in range(count)]
        under = batch_of([prompts[i] for i in rows_of], [rows[i] for i in rows_of])
        return scores(images.repeat_interleave(count, 0), under).view(count, count)

    found: list[Tensor] = []

    def moves(dim: int, matters: bool, what: str) -> tuple[bool, str]:
        found[:] = found or [every()]
        table = found[0]
        spread = float((table.amax(dim) - table.amin(dim)).max())
        size = float(table.abs().max())
        moved = spread > (1e-2 if loose else 1e-4) * max(size, 1e-3)
        told = f"up to {spread:.3g} between {count} {what}, of {size:.3g}"
        if not matters:
            return not moved, told + (
                ", though it says that the prompt does not matter (reads_prompt)" if moved else "; it says that the prompt does not matter"
            )
        return moved, told if moved else f"{told}: {'it does not see the prompt' if dim else 'it gives all pictures the same'}" + (
            " (one that is not meant to says reads_prompt = False)" if dim else ""
        )

    def finite() -> tuple[bool, str]:
        noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
        kinds = {"black": torch.zeros_like(images[0]), "white": torch.ones_like(images[0]), "noise": noise}
        told = scores(torch.stack(list(kinds.values())), batch_of([prompts[0]] * 3, [rows[0]] * 3)).tolist()
        return all(torch.isfinite(torch.tensor(told)).tolist()), ", ".join(f"{kind} {value:.4g}" for kind, value in zip(kinds, told))

    def alone() -> tuple[bool, str]:
        together = scores(images, whole)
        one = torch.cat([scores(images[i : i + 1], whole[i : i + 1]) for i in range(count)])
        apart = float((together - one).abs().max())
        size = max(float(together.abs().max()), float(together.max() - together.min()), 1e-3)
        return apart <= (2e-2 if loose else 1e-4) * size, f"{apart:.2g} apart, of {size:.3g}"

    def gradient() -> tuple[bool | None, str]:
        if not has_gradient(reward):
            return None, "it claims none"
        here, under = 0.2 + 0.6 * images[:2], whole[:2]
        leaf = here.clone().requires_grad_(True)
        score = ask(name, reward, leaf + 0.0, under)
        with inside(f"the gradient of reward '{name}'"):
            slope = torch.autograd.grad(score.sum(), leaf, allow_unused=True)[0] if score.requires_grad else None
        if slope is None:
            return False, "none reaches the pictures: leave out detach, no_grad and numpy, or say differentiable = False"
        if not bool(torch.isfinite(slope).all()):
            return False, f"{int((~torch.isfinite(slope)).sum())} of {slope.numel()} numbers of it are NaN or Inf"
        if not (size := float(slope.square().mean().sqrt())):
            return False, "it is zero everywhere"
        way, most = slope / size, 0.3 if loose else 0.05
        wanted, off = float((slope.double() * way.double()).sum()), float("inf")
        for step in STEPS:  # short ones are lost in rounding where a reward is flat, long ones leave the slope where it is steep
            up, down = (float(scores(here + sign * step * way, under).sum()) for sign in (1, -1))
            if (off := min(off, abs((up - down) / (2 * step) - wanted) / wanted)) < most:
                break
        return off < most, f"{100 * off:.2g} % off finite differences along it"

    def untouched() -> tuple[bool, str]:
        lent = images.clone()
        scores(lent, whole)
        same = torch.equal(lent, images)
        return (
            same,
            "the pictures are as they were" if same else "it wrote into the pictures that it was given: let it work on images.clone()",
        )

    def spent() -> tuple[None, str]:
        on_gpu = images.is_cuda
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device) if on_gpu else _peak()
        took, asked = [], images.clone().requires_grad_(has_gradient(reward))
        for _ in range(2):
            started = time.perf_counter()
            with torch.set_grad_enabled(asked.requires_grad):
                score = ask(name, reward, asked + 0.0, whole)
                if score.requires_grad:
                    torch.autograd.grad(score.sum(), asked, allow_unused=True)
            float(score.detach().sum())
            took.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(images.device) if on_gpu else _peak()
        more = max(0.0, peak - before) / count / 1e6
        return (
            None,
            f"{1e3 * min(took) / count:.3g} ms a picture{' with its gradient' * asked.requires_grad}, at most {more:.3g} MB more{'' if on_gpu else ' than before'}",
        )

    hold("moves with the prompt", lambda: moves(1, getattr(reward, "reads_prompt", True), "prompts for one picture"))
    hold("moves with the picture", lambda: moves(0, True, "pictures under one prompt"))
    hold("finite on black, white, noise", finite)
    hold("a batch is its pictures one by one", alone)
    hold("gradient", gradient)
    hold("leaves its input alone", untouched)
    hold("speed and memory", spent)
    return clauses


def _peak() -> float:
    """Bytes of this process's largest resident set so far."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def broken(clauses: Sequence[Clause]) -> list[str]:
    """Names of the clauses that are not kept."""
    return [clause.name for clause in clauses if clause.held is False]
