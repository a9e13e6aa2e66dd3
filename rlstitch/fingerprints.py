"""What names a model, whatever files it lies in: hashes of tensors, and of folders too large to be read whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlstitch.files import names_in, opened, read_json, require, sha256, weight_files
from rlstitch.hub import model_folder

OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # names of an older diffusers


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and values, these rounded to bfloat16: a model hashes alike whether it was loaded in float32 or in bfloat16."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to(torch.bfloat16).float().cpu().contiguous()
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def quick_fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """Fingerprint of possibly very large files in a folder: names, sizes, first and last MiB."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            if size > 1 << 20:
                file.seek(-(1 << 20), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()


def weights_fingerprint(model: str | Path, part: str) -> str:
    """Hash of the weight files of one part of a pipeline directory. UserError where it has none in safetensors."""
    return _files_hash(_stamps(model_folder(model) / part, f"the {part}"))


def vae_fingerprint(model: str | Path) -> str:
    """What names a pipeline directory's autoencoder, read without loading it: the first of `vae_fingerprints`."""
    return vae_fingerprints(model)[0]


def vae_fingerprints(model: str | Path) -> tuple[str, str]:
    """Hashes of an autoencoder's tensors and of its scale and shift; the tensors rounded to bfloat16, and to float16 first. Two directories hold the same one where they share either: whole or in shards,
    saved anew, in float32, or cast to bfloat16 or to float16. (A cast to bfloat16 beside a cast to float16, the original gone, share none.)"""
    folder = model_folder(model) / "vae"
    config = read_json(require(folder / "config.json", "the vae's config"), "the vae's config")
    return _tensor_hashes(_stamps(folder, "the vae"), vae_factors(config, " "))


def vae_factors(config: Mapping[str, Any], between: str = ":") -> str:
    """The numbers by which an autoencoder's latents are brought to the denoiser's scale."""
    usual = [str(config.get(key)) for key in ("scaling_factor", "shift_factor")]
    return between.join(
        usual + [str(config[key]) for key in ("latents_mean", "latents_std", "batch_norm_eps") if config.get(key) is not None]
    )


def vae_names(model: str | Path) -> dict[str, str]:
    """What a card keeps of the autoencoder that its value was made for."""
    first, second = vae_fingerprints(model)
    return {"vae_sha256": first, "vae_half_sha256": second}


def same_vae(card: dict[str, Any], model: str | Path) -> bool:
    """Whether a model's autoencoder is the one that a card was written for; cards of old hash its files."""
    wanted = {card["vae_sha256"], card.get("vae_half_sha256")}
    return bool(wanted & set(vae_fingerprints(model))) or weights_fingerprint(model, "vae") in wanted


def _stamps(folder: Path, what: str) -> tuple[tuple[Path, int, int], ...]:
    """(file, size, time) of a part's weights: what its hashes are remembered by."""
    return tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in weight_files(folder, what)[1])


@lru_cache
def _files_hash(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    return hashlib.sha256("".join(sha256(file) for file, *_ in stamps).encode()).hexdigest()


@lru_cache
def _tensor_hashes(stamps: tuple[tuple[Path, int, int], ...], factors: str) -> tuple[str, str]:
    """One tensor at a time, by name, whatever file it lies in."""
    where, digests = {}, (hashlib.sha256(factors.encode()), hashlib.sha256(factors.encode()))
    for file, *_ in stamps:
        where |= dict.fromkeys(names_in([file]), file)
    now = {name: _current(name) for name in where}
    for name in sorted(where, key=now.__getitem__):
        with opened(where[name]) as tensors:
            value = tensors.get_tensor(name).float()
        for digest, rounded in zip(digests, (value, value.half().float())):
            digest.update(f"{now[name]}{list(value.shape)}".encode())
            digest.update(rounded.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digests[0].hexdigest(), digests[1].hexdigest()


def _current(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name
