"""What can be made again and is kept on disk: tensors with a hash of them beside them, so that a file that was cut, emptied or changed is made anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlstitch.files import made_anew, write_tensors

HASH = "sha256"


def keep(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors into a cache, with a hash of them, for `kept`."""
    write_tensors(path, tensors, metadata={HASH: _hash_bytes(tensors)})


def is_kept(path: Path) -> bool:
    """Whether `kept` will find a file that is whole; its numbers are not read."""
    try:
        with safe_open(path, "pt") as file:
            return HASH in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def kept(path: Path) -> dict[str, Tensor] | None:
    """The tensors that `keep` wrote. None where there are none, or not those, which is said once: what a cache has lost is made anew."""
    if not path.exists():
        return None
    if is_kept(path):
        with safe_open(path, "pt") as file:
            tensors, digest = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()[HASH]  # noqa: SIM118
        if _hash_bytes(tensors) == digest:
            return tensors
    made_anew(path.parent)
    return None


def _hash_bytes(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
