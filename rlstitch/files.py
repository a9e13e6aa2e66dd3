"""Files: names like `shapes:clip`, hashes, atomic writes. Everything on disk is safetensors, JSON, YAML or an image."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlstitch.types import UserError

SHAPES = Path(__file__).parent / "shapes" / "weights"
GROWN, GROWN_WEIGHTS = "grown.json", "blocks.safetensors"


def resolve(path: str | Path) -> Path:
    """A folder or file; `shapes:NAME` is the one shipped with the package under that name. A grown model (GROWN) is put together first."""
    text = str(path)
    found = SHAPES / text.removeprefix("shapes:") if text.startswith("shapes:") else Path(text).expanduser()
    return assembled(found) if (found / GROWN).exists() else found


def cache_folder() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/rlstitch`, by default ~/.cache/rlstitch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlstitch"


def assembled(folder: Path) -> Path:
    """The whole pipeline directory of a model that is stored as the blocks by which it outgrew another one beside it; made once, kept in the cache.

    GROWN names the base, the depth, and where the base's blocks stand now. Raises UserError where either file is not the one that was trained.
    """
    told = read_json(folder / GROWN, "the grown model", base=str, sha256=str, base_sha256=str, kept=list, layers=int)
    if Path(told["base"]).name != told["base"]:
        raise UserError(f"the grown model {folder / GROWN}: 'base' must be the name of a folder beside it, not {told['base']!r}")
    whole = cache_folder() / f"{folder.name}-{told['sha256'][:12]}-{told['base_sha256'][:12]}"
    if whole.exists():
        return whole
    base, inside = folder.parent / told["base"], Path("transformer") / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(folder / GROWN_WEIGHTS, told["sha256"])
    for name, value in read_tensors(base / inside, told["base_sha256"]).items():
        stem, _, rest = name.partition("transformer_blocks.")
        place, _, tail = rest.partition(".")
        tensors[f"{stem}transformer_blocks.{told['kept'][int(place)]}.{tail}" if rest else name] = value
    whole.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=whole.parent))
    try:
        shutil.copytree(base, temporary, dirs_exist_ok=True)
        shutil.copy(folder / "card.json", temporary / "card.json")
        write_tensors(temporary / inside, tensors, metadata={"format": "pt"})
        config = read_json(temporary / "transformer" / "config.json", "the transformer's config")
        write_json(temporary / "transformer" / "config.json", config | {"num_layers": told["layers"]})
        os.replace(temporary, whole)
    except OSError:
        if not whole.exists():  # another process may have made it meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return whole


def require(path: str | Path, what: str) -> Path:
    """The resolved path, or a UserError that says what is missing and what there is beside it."""
    found = resolve(path)
    if not found.exists():
        parent = found.parent
        beside = sorted(p.name for p in parent.iterdir() if not p.name.startswith(".")) if parent.is_dir() else []
        raise UserError(
            f"{what} '{path}' is not there ({found}). "
            + (f"Beside it: {', '.join(beside[:12])}." if beside else f"The folder {parent} does not exist either.")
        )
    return found


def read_json(path: Path, what: str, remedy: str = "restore it or make it again", **fields: Any) -> dict[str, Any]:
    """The JSON object in a file, which has at least `fields`, by name and type: str, int, bool, dict, list, float (finite; an int will do), or [float] * n for a
    list of n of them. Raises UserError with what the file is, what is wrong with it and the remedy."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}): {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}): {remedy}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds {type(value).__name__}, not an object of names and values: {remedy}")
    if lacking := [name for name in fields if name not in value]:
        raise UserError(f"{what} {path} has no {' and no '.join(map(repr, lacking))}: {remedy}")
    for name, kind in fields.items():
        if not _is(value[name], kind):
            told = f"{len(kind)} numbers" if isinstance(kind, list) else kind.__name__
            raise UserError(f"{what} {path}: {name!r} must be {told}, not {str(value[name])[:100]!r}: {remedy}")
    return value


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and len(value) == len(kind) and all(map(_is, value, kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and values, these rounded to bfloat16: a model hashes alike whether it was loaded in float32 or in bfloat16."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to(torch.bfloat16).float().cpu().contiguous()
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def quick_fingerprint(folder: Path, patterns: tuple[str, ...]) -> str:
    """Fingerprint of possibly very large files: names, sizes, first and last MiB."""
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)}:{size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                if size > 1 << 20:
                    file.seek(-(1 << 20), os.SEEK_END)
                    digest.update(file.read())
    return digest.hexdigest()


def vae_fingerprint(model: str | Path) -> str:
    """Hash of a pipeline directory's autoencoder weights, read without loading it: latents are comparable only where it agrees."""
    return weights_fingerprint(model, "vae")


def weights_fingerprint(model: str | Path, part: str) -> str:
    """Hash of all weights of one part of a pipeline directory. UserError where it has none in safetensors."""
    files = sorted((require(model, "the model directory") / part).glob("*.safetensors"))
    if not files:
        raise UserError(f"model '{model}' has no {part}/*.safetensors")
    return hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file; UserError where it is corrupt or is not the file that was meant."""
    if expected_sha256 is not None and (found := sha256(path)) != expected_sha256:
        raise UserError(
            f"{path} is not the file that was saved: sha256 {found[:16]}... instead of {expected_sha256[:16]}.... Restore it or make it again."
        )
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise UserError(
            f"{path} is a pickle, which can run code and is not read here: convert it where you trust it, with safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); its sha256 is {sha256(path)[:16]}.... The file is corrupt: restore it or make it again."
        ) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write under a temporary name, flush to disk, then rename."""
    with replacing(path) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
        except SafetensorError as error:  # what a full disk looks like from there
            raise OSError(f"{path} cannot be written: {error}") from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, this process's own, that takes the place of `path` once it is on disk, and is removed where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; some writers make a private file of their own
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
