"""One place where parts that a user may have written are run: what goes wrong inside is told in one line that names the part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlstitch.memory import out_of_memory
from rlstitch.types import Batch, UserError


class PartError(UserError):
    """A part (a reward, a stop, an oracle, a function that gives pictures ...) failed, or gave what its protocol does not allow. The message names it."""


def one_line(error: BaseException, most: int = 400) -> str:
    """`Type: message` without line breaks."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else text[: most - 3] + "..."


@contextmanager
def inside(part: str) -> Iterator[None]:
    """Run a part of the recipe: anything it raises, SystemExit, too, becomes a PartError that begins with `part`, e.g. "reward 'clip'". Signals pass."""
    try:
        yield
    except PartError:
        raise
    except UserError as error:
        raise PartError(f"{part}: {error}") from error
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise failed(part, error) from error


def failed(part: str, error: BaseException) -> PartError:
    """What is told of an exception inside a part."""
    return PartError(f"{part} failed: {one_line(error)} (RLSTITCH_TRACEBACK=1 shows where)")


def ask(name: str, reward: Any, images: Tensor, batch: Batch) -> Tensor:
    """What a reward says of pictures [B, 3, H, W]: [B] float32 on their device, with gradient where it has one. A score may be NaN or infinite.

    Raises PartError with the reward's name where it fails, gives anything but B real numbers, or writes into the pictures.
    """
    part = f"reward '{name}'"
    version = None if images.is_inference() else images._version
    with inside(part):
        scores = reward.score(images, batch)
    if not isinstance(scores, Tensor):
        raise PartError(
            f"{part} gave {_told(scores)} for {len(images)} pictures, not a tensor [{len(images)}]: return one number a picture"
        )
    if scores.shape != (len(images),):
        raise PartError(
            f"{part} gave a tensor {list(scores.shape)} for {len(images)} pictures, not [{len(images)}]: return one number a picture"
        )
    if scores.is_complex() or scores.dtype == torch.bool:
        raise PartError(f"{part} gave {scores.dtype}, not real numbers: return .float()")
    if version is not None and images._version != version:
        raise PartError(f"{part} wrote into the pictures it was given, which others read, too: let it work on images.clone()")
    return scores.float().to(images.device)


def _told(value: Any) -> str:
    """A value that is no tensor, as a person would say it."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    shape = f" {list(value.shape)}" if hasattr(value, "shape") else f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__module__}.{type(value).__name__}{shape}".replace("builtins.", "")


def has_gradient(reward: Any) -> bool:
    """Whether a reward says that gradients reach the pictures; one that says nothing has none."""
    return bool(getattr(reward, "differentiable", False))


def probe_rewards(rewards: Mapping[str, Any], names: Iterable[str], batch: Batch, size: int, device: Any) -> None:
    """Probe those rewards that are asked about the pictures of such a batch of two."""
    for name in (n for n in names if n in rewards):
        probe(name, rewards[name], batch, size, device)


def probe(name: str, reward: Any, batch: Batch, size: int, device: Any) -> None:
    """Ask a reward about two blank pictures [2, 3, size, size], grey with a little noise, before anything depends on it. Raises PartError where it does not
    keep to its protocol, changes the pictures behind autograd's back, or says `differentiable` and gives no gradient."""
    noise = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
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
