"""One place where parts that a user may have written are run: what goes wrong inside is told in one line that names the part."""

from __future__ import annotations

import copy
import os
import signal
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rlstitch.memory import out_of_memory, words
from rlstitch.ranges import shown
from rlstitch.types import Batch, UserError


class PartError(UserError):
    """A part (a reward, a stop, an oracle, a function that gives pictures ...) failed, or gave what its protocol does not allow. The message names it."""


def one_line(error: BaseException, most: int = 400) -> str:
    """`Type: message` without line breaks."""
    text = " ".join(f"{type(error).__name__}: {words(error)}".split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it is gone
        return ""


SHARED = {  # what all parts of a process share and none may leave otherwise than it was: how it is read, and put back
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "inference mode": (torch.is_inference_mode_enabled, lambda on: None),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    "the working directory": (_folder, lambda folder: os.chdir(folder) if folder else None),
}


@contextmanager
def inside(part: str) -> Iterator[None]:
    """Run a part of the recipe: anything it raises, SystemExit, too, becomes a PartError that begins with `part`, e.g. "reward 'clip'", and so does a change of what
    is SHARED. Signals pass."""
    with sharing(part):
        try:
            yield
        except PartError:
            raise
        except UserError as error:
            raise PartError(f"{part}: {error}") from error
        except BaseException as error:
            if by_signal(error) or out_of_memory(error):
                raise
            raise failed(part, error) from error


@contextmanager
def sharing(part: str) -> Iterator[None]:
    """Put back what is SHARED, and tell of a part that has changed it."""
    before, changed = {name: read() for name, (read, _) in SHARED.items()}, []
    try:
        yield
    finally:
        for name, (read, put) in SHARED.items():
            if (now := read()) != before[name]:
                changed.append(f"{name} (from {before[name]} to {now})")
                put(before[name])
    if changed:
        raise PartError(
            f"{part} changed {' and '.join(changed)} for everything else, too: let it put back what it sets, as a `with` block does"
        )


def by_signal(error: BaseException) -> bool:
    """Whether Ctrl-C raised it: code may raise a KeyboardInterrupt as well, but where signals are noted (rlstitch.interrupt) nothing else does."""
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def failed(part: str, error: BaseException) -> PartError:
    """What is told of an exception inside a part."""
    show(error)
    return PartError(f"{part} failed: {one_line(error)} (RLSTITCH_TRACEBACK=1 shows where)")


def show(error: BaseException) -> None:
    """Where an exception happened, for those who want to see it; at once, since checks pass on no more than a line."""
    if os.environ.get("RLSTITCH_TRACEBACK") == "1":
        traceback.print_exception(error)


def ask(name: str, reward: Any, images: Tensor, batch: Batch) -> Tensor:
    """What a reward says of pictures [B, 3, H, W]: [B] float32 on their device, with gradient where it has one. A score may be NaN or infinite.

    Raises PartError with the reward's name where it fails, gives anything but B real numbers, or writes into the pictures. What else it reads, it is lent as a copy.
    """
    part = f"reward '{name}'"
    version = None if images.is_inference() else images._version
    lent = replace(batch, prompts=[*batch.prompts], facts=copy.deepcopy(batch.facts), group=batch.group.clone(), seeds=batch.seeds.clone())
    with inside(part):
        scores = reward.score(images, lent)
        if wrong := unlike(scores, (len(images),), of=f" for {len(images)} pictures"):
            raise PartError(f"{part} gave {wrong}: return one number a picture")
    if version is not None and images._version != version:
        raise PartError(f"{part} wrote into the pictures it was given, which others read, too: let it work on images.clone()")
    return scores.float().to(images.device)


def breakdown(name: str, judge: Any, scores: Tensor, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What a judge's mean splits into, of known scores [N] on N `rows` of a prompt file: numbers by class, and `overall`. Raises PartError with its name otherwise."""
    part = f"the breakdown of judge '{name}'"
    with inside(part):
        found = judge.breakdown(scores, rows)
        if not isinstance(found, Mapping):
            raise PartError(f"{part} is {told(found)}, not a dict of numbers by class")
        odd = [
            f"{told(k)}: {told(v)}" for k, v in found.items() if not isinstance(k, str) or not isinstance(v, Real) or isinstance(v, bool)
        ]
        if odd:
            raise PartError(f"{part} holds {', '.join(odd[:3])}, not a number by name: return float(...) of each class")
        if "overall" not in found:
            raise PartError(f"{part} has no 'overall', the figure to report; it has {', '.join(found) or 'nothing'}")
        return {k: float(v) for k, v in found.items()}


def unlike(value: Any, shape: tuple[int | None, ...], *, of: str = "", floating: bool = False) -> str:
    """'' for a plain tensor of real numbers in this shape (None: any size), else what it is, `of` what, and what it should be."""
    sizes = f"[{', '.join('...' if n is None else str(n) for n in shape)}]"
    if not isinstance(value, Tensor):
        return f"{told(value)}{of}, not a tensor {sizes}"
    if kind := strange(value):
        return f"a {kind} tensor{of}, which does not hold its numbers one by one, not a plain tensor {sizes}"
    if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape)):
        return f"{told(value)}{of}, not {sizes}"
    if value.is_complex() or value.dtype == torch.bool or (floating and not value.is_floating_point()):
        return f"{value.dtype}{of}, not real numbers (.float() makes them)"
    return ""


def strange(tensor: Tensor) -> str:
    """'' for a tensor that is its numbers one by one, else what kind it is."""
    kinds = {
        "meta": tensor.is_meta,
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "sparse": tensor.layout is not torch.strided,
    }
    return next((kind for kind, is_one in kinds.items() if is_one), "")


def told(value: Any) -> str:
    """A value as a person would say it."""
    if value is None or isinstance(value, bool | int | float | str | range):
        return shown(value)
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    shape = f" {list(value.shape)}" if hasattr(value, "shape") else f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__module__}.{type(value).__name__}{shape}".replace("builtins.", "")


def has_gradient(reward: Any) -> bool:
    """Whether a reward says that gradients reach the pictures; one that says nothing has none."""
    return bool(getattr(reward, "differentiable", False))


def probe_rewards(rewards: Mapping[str, Any], names: Iterable[str], batch: Batch, size: tuple[int, int], device: Any) -> None:
    """Probe those rewards that are asked about the pictures of such a batch of two."""
    for name in (n for n in names if n in rewards):
        probe(name, rewards[name], batch, size, device)


def probe(name: str, reward: Any, batch: Batch, size: tuple[int, int], device: Any) -> None:
    """Ask a reward about two blank pictures [2, 3, *size], grey with a little noise, before anything depends on it. Raises PartError where it does not
    keep to its protocol, changes the pictures behind autograd's back, or says `differentiable` and gives no gradient."""
    noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    leaf = (0.4 + 0.2 * noise).to(device).requires_grad_(has_gradient(reward))
    with torch.set_grad_enabled(leaf.requires_grad):
        images = leaf + 0.0  # as it comes in training: no leaf
        before = images.detach().clone()
        scores = ask(name, reward, images, batch)
    if not torch.equal(before, images.detach()):
        raise PartError(f"reward '{name}' wrote into the pictures it was given, which others read, too: let it work on images.clone()")
    if not leaf.requires_grad or not bool(torch.isfinite(scores).any()):
        return
    known = torch.where(torch.isfinite(scores), scores, 0.0)
    with inside(f"the gradient of reward '{name}'"):
        gradient = torch.autograd.grad(known.sum(), leaf, allow_unused=True)[0] if known.requires_grad else None
    if gradient is None:
        raise PartError(
            f"reward '{name}' says `differentiable`, but no gradient reaches the pictures: leave out detach, no_grad and numpy, or set differentiable = False"
        )
