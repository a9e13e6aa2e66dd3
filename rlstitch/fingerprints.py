"""What names a model, whatever files it lies in: hashes of tensors, and of folders too large to be read whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
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


PICKLED = "open_clip_pytorch_model.bin"  # the one kind of pickle that a model may lie in, see weights.read_checkpoint
LARGE = 1 << 28  # bytes of a folder's tensors up to which they are hashed whole
ENDS = 1 << 16  # bytes of the beginning and of the end of each tensor that are read of larger ones
TELLS = ("_class_name",)  # of the keys of a configuration that begin with _, those that are more than where it came from
ORIGINS = (
    "name_or_path",
    "is_local",
    "local_files_only",
    "transformers_version",
    "torch_dtype",
    "dtype",
)  # and the others; precisions the tensors tell


def folder_fingerprint(folder: Path) -> str:
    """What names a model in a folder, whatever files its tensors lie in and whoever wrote them: its tensors, see `tensors_fingerprint`, and its configurations and other
    small files as they are read. Linked folders are followed."""
    digest = hashlib.sha256()
    for inner in sorted(_folders(folder)):
        tensors, words, pickled = list(inner.glob("*.safetensors")), [*inner.glob("*.json"), *inner.glob("*.txt")], inner / PICKLED
        if not (tensors or words or pickled.is_file()):
            continue
        digest.update(f"{inner.relative_to(folder)}:{tensors_fingerprint(tensors)}:{words_fingerprint(words)}".encode())
        digest.update(quick_fingerprint(folder, [pickled] * pickled.is_file()).encode())
    return digest.hexdigest()


def _folders(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for place, inner, _ in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:  # a link to a folder above it
            inner.clear()
            continue
        seen.add(here)
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield Path(place)


def words_fingerprint(files: Iterable[Path]) -> str:
    """Of small files by their names: what a configuration says, without who wrote it; the others as they are. Indexes of shards are none of them."""
    digest = hashlib.sha256()
    for file in sorted(f for f in files if ".safetensors.index." not in f.name):
        content = file.read_bytes()
        try:
            told = json.dumps(_said(json.loads(content)), sort_keys=True).encode() if file.suffix == ".json" else content
        except (ValueError, RecursionError):  # whoever reads it tells what is wrong with it
            told = content
        digest.update(f"{file.name}:{len(told)}:".encode() + told)
    return digest.hexdigest()


def _said(node: Any) -> Any:
    if isinstance(node, list):
        return [_said(value) for value in node]
    if not isinstance(node, dict):
        return node
    return {k: _said(v) for k, v in node.items() if k in TELLS or not (k.startswith("_") or k in ORIGINS)}


def tensors_fingerprint(files: Iterable[Path]) -> str:
    """Of the tensors in safetensors files, whatever file each lies in: names, precisions, shapes, and all numbers, or, beyond LARGE, the first and the last of each."""
    return _raw_hash(tuple(_stamp(f) for f in sorted(files)))


@lru_cache
def _raw_hash(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    tensors = []
    for file, *_ in stamps:
        with opened(file), file.open("rb") as content:  # opened: the header is sound
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
        tensors += [
            (name, told["dtype"], str(told["shape"]), str(file), *(8 + length + at for at in told["data_offsets"]))
            for name, told in header.items()
            if name != "__metadata__"
        ]
    whole, digest = sum(end - start for *_, start, end in tensors) <= LARGE, hashlib.sha256()
    for name, dtype, shape, file, start, end in sorted(tensors):
        digest.update(f"{name}:{dtype}:{shape}".encode())
        with open(file, "rb") as content:
            for begin, stop in [(start, end)] if whole or end - start <= 2 * ENDS else [(start, start + ENDS), (end - ENDS, end)]:
                content.seek(begin)
                digest.update(content.read(stop - begin))
    return digest.hexdigest()


def weights_fingerprint(model: str | Path, part: str, variant: str | None = None) -> str:
    """Hash of the tensors of one part of a pipeline directory. UserError where it has none in safetensors."""
    return tensors_fingerprint(weight_files(model_folder(model) / part, f"the {part}", variant)[1])


def files_fingerprint(model: str | Path, part: str) -> str:
    """Hash of the weight files of one part of a pipeline directory, as old cards have it."""
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
    return bool(wanted & set(vae_fingerprints(model))) or files_fingerprint(model, "vae") in wanted


def _stamps(folder: Path, what: str) -> tuple[tuple[Path, int, int], ...]:
    """(file, size, time) of a part's weights: what its hashes are remembered by."""
    return tuple(map(_stamp, weight_files(folder, what)[1]))


def _stamp(file: Path) -> tuple[Path, int, int]:
    return file, file.stat().st_size, file.stat().st_mtime_ns


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
