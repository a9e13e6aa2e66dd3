"""What the scripts under launch/ share: recipe and overrides in, exit status out. A user's mistake ends in one message, not a traceback."""

from __future__ import annotations

import ctypes.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlstitch.types import UserError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h


def recipe_and_overrides(arguments: list[str], default: str | None = None) -> tuple[str, dict[str, Any]]:
    """`recipe=NAME key=value ...` -> the recipe's name and the composed dict with overrides merged in."""
    from rlstitch import config as cfg

    chosen = [a for a in arguments if a.startswith("recipe=")]
    if len(chosen) > 1 or not (chosen or default):
        raise UserError("name one recipe, as recipe=NAME")
    name = chosen[0].removeprefix("recipe=") if chosen else str(default)
    given = cfg.compose(name)
    return name, cfg.merge(given, cfg.parse_overrides([a for a in arguments if not a.startswith("recipe=")]))


def run_and_overrides(arguments: list[str]) -> tuple[Path, dict[str, Any]]:
    """`run=FOLDER key=value ...` -> the folder and the recipe saved in it with overrides merged in."""
    from rlstitch import config as cfg

    chosen = [a for a in arguments if a.startswith("run=")]
    if len(chosen) != 1:
        raise UserError("name one run folder, as run=runs/NAME")
    folder = Path(chosen[0].removeprefix("run="))
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml")
    return folder, cfg.merge(
        cfg.compose(str(folder / "recipe.yaml")), cfg.parse_overrides([a for a in arguments if not a.startswith("run=")])
    )


def keep_freed_memory() -> None:
    """Have glibc keep what large tensors free: a CPU run otherwise asks the system for zeroed pages at every operation.

    Of a small denoiser's forward and backward that is a tenth in float32 and a thirtieth in bf16 where pages are dear, and next to nothing where they are not.
    """
    libc = ctypes.util.find_library("c")
    if sys.platform != "linux" or not libc or not hasattr(library := ctypes.CDLL(libc), "mallopt"):
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
        library.mallopt(option, value)


def announce(lines: list[str]) -> None:
    """Lines that a job begins with, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)


def main(run: Callable[[list[str]], None]) -> None:
    """Run a launcher: UserError -> its message and status 2; a signal -> 128 + its number."""
    keep_freed_memory()
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters on one base are what we want
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|diffusers|deepspeed")
    import torch.distributed as dist

    from rlstitch import watch
    from rlstitch.interrupt import Interrupted

    try:
        run(sys.argv[1:])
        watch.leave()
    except UserError as error:
        watch.leave(str(error))
        rank, together = os.environ.get("RANK", "0"), not (dist.is_available() and dist.is_initialized())
        if rank == "0" or not together:  # before the ranks have joined they all find the same fault, and one message will do
            print(f"rlstitch{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Interrupted as stop:
        watch.leave()
        print("rlstitch: stopped on a signal; a checkpoint was written, the same command resumes", file=sys.stderr, flush=True)
        sys.exit(stop.code)
    except Exception as error:
        watch.end_if_lost(error)
        watch.leave(f"{type(error).__name__}: {error}")
        raise
