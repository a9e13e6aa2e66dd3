"""torch.compile by regions: each block by itself and in place, so that lists of blocks, names of parameters, hooks and fingerprints stay as they are."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

GRAPHS = 64  # of one kind of block: LoRA sets, shapes, with gradient and without; beyond them torch would run the block as it is


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile modules when they are first called. What a block's code depends on (its LoRA sets and which of them is in use, shapes, precision, gradient) is guarded by
    torch: it is compiled again where that is new, and found again where it is not. A copy of a block is not compiled."""
    import torch._dynamo  # not before it is wanted: it takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks:
        block.compile()


def blocks_within(module: nn.Module) -> list[nn.Module]:
    """The modules that stand in the lists of a network, its blocks; itself where it has none."""
    return [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part] or [module]


def lacking() -> str:
    """What this machine lacks to compile, '' where it can."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton, which compiles for this GPU: install torch with it"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"a C++ compiler, which torch.compile needs on a CPU ({compiler} is not there): install g++"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers, which torch.compile needs on a CPU: install python3-dev"
    return ""
