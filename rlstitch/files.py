"""Files: names like `shapes:clip`, hashes, atomic writes. Everything on disk is safetensors, JSON, YAML or an image."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from rlstitch.figures import plain
from rlstitch.paths import home, what_is
from rlstitch.types import UserError

SHAPES = Path(__file__).parent / "shapes" / "weights"
GROWN, GROWN_WEIGHTS = "grown.json", "blocks.safetensors"
MADE = "made.json"  # what is in a folder of the cache
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers, of transformers
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def resolve(path: str | Path) -> Path:
    """A folder or file; `shapes:NAME` is the one shipped with the package under that name. A grown model (GROWN) is put together first. Raises UserError where
    nothing can be called that."""
    text = str(path)
    found = home(SHAPES / text.removeprefix("shapes:") if text.startswith("shapes:") else text)
    return assembled(found) if (found / GROWN).exists() else found


def cache_folder() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/rlstitch`, by default ~/.cache/rlstitch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlstitch"


def assembled(folder: Path) -> Path:
    """The whole pipeline directory of a model that is stored as the blocks by which it outgrew another one beside it; made once, kept in the cache.

    GROWN names the base, the depth, and where the base's blocks stand now. A folder in the cache that is not what was put together is put together anew. Raises
    UserError where either file is not the one that was trained.
    """
    told = read_json(folder / GROWN, "the grown model", base=str, sha256=str, base_sha256=str, kept=list, layers=int)
    if Path(told["base"]).name != told["base"]:
        raise UserError(f"the grown model {folder / GROWN}: 'base' must be the name of a folder beside it, not {told['base']!r}")
    whole = cache_folder() / f"{folder.name}-{told['sha256'][:12]}-{told['base_sha256'][:12]}"
    if _intact(whole):
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    with (whole.parent / ".lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        if not _intact(whole):
            _assemble(folder, told, whole)
    return whole


def _assemble(folder: Path, told: dict[str, Any], whole: Path) -> None:
    base, inside = folder.parent / told["base"], Path("transformer") / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(folder / GROWN_WEIGHTS, told["sha256"])
    for name, value in read_tensors(base / inside, told["base_sha256"]).items():
        stem, _, rest = name.partition("transformer_blocks.")
        place, _, tail = rest.partition(".")
        tensors[f"{stem}transformer_blocks.{told['kept'][int(place)]}.{tail}" if rest else name] = value
    temporary = Path(tempfile.mkdtemp(dir=whole.parent))
    try:
        shutil.copytree(base, temporary, dirs_exist_ok=True)
        shutil.copy(folder / "card.json", temporary / "card.json")
        write_tensors(temporary / inside, tensors, metadata={"format": "pt"})
        config = read_json(temporary / "transformer" / "config.json", "the transformer's config")
        write_json(temporary / "transformer" / "config.json", config | {"num_layers": told["layers"]})
        write_json(temporary / MADE, {str(f.relative_to(temporary)): sha256(f) for f in sorted(temporary.rglob("*")) if f.is_file()})
        if whole.exists():
            made_anew(whole)
            shutil.rmtree(whole)
        os.replace(temporary, whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _intact(folder: Path) -> bool:
    """Whether a folder of the cache holds what was put there; files that have not changed since are not read again."""
    stats = ((f, f.stat()) for f in sorted(folder.rglob("*")) if f.is_file())
    return (folder / MADE).is_file() and _as_made(folder, tuple((str(f), s.st_size, s.st_mtime_ns) for f, s in stats))


@lru_cache(maxsize=64)
def _as_made(folder: Path, files: tuple[tuple[str, int, int], ...]) -> bool:
    try:
        made = read_json(folder / MADE, "the list of what was made")
    except UserError:
        return False
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in made.items())


@cache
def made_anew(cache: Path) -> None:
    print(f"{cache} holds what is not as it was written, or is of an older version: it is made anew", flush=True)


def require(path: str | Path, what: str) -> Path:
    """The resolved path of a file or folder, or a UserError that says what is missing and what there is beside it."""
    try:
        found = resolve(path)
    except UserError as error:
        raise UserError(f"{what} {error}") from error
    there = what_is(found)
    if there not in ("a file", "a folder", ""):
        raise UserError(f"{what} '{path}' is {there}, not a file or a folder that can be read")
    if not there:
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
    if (there := what_is(path)) not in ("a file", ""):  # to read a pipe would wait for ever
        raise UserError(f"{what} {path} is {there}, not a file: {remedy}")
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


def weight_files(
    folder: Path, what: str, variant: str | None = None, names: Collection[str] | None = None
) -> tuple[str | None, list[Path]]:
    """(variant, safetensors files) of one part's folder: whole or in shards with an index. A `variant` such as fp16 is taken where it is there, else the plain
    files, and without either the only variant that there is. names: of the files that the folder will have, where not all are here yet (indexes are). Raises UserError
    where there are none, where shards are missing, and where several would do."""
    there = {p.name for p in folder.glob("*") if p.is_file()} if names is None else set(names)
    for chosen in dict.fromkeys((variant, None)):
        if files := _files(folder, what, chosen, there):
            return chosen, files
    variants = sorted({v for name in there if (v := _variant_of(name)) and _files(folder, what, v, there)})
    if len(variants) == 1:
        return variants[0], _files(folder, what, variants[0], there)
    if variants:
        raise UserError(
            f"{what} in {folder} has weights in several variants ({', '.join(variants)}) and none without: name one with variant"
        )
    pickled = sorted(name for name in there if Path(name).suffix in PICKLES)
    raise UserError(
        f"{what} in {folder} has no weights in safetensors"
        + (
            f", only {', '.join(pickled[:3])}, which can run code and is not read here: where you trust it, load the folder once with the library that wrote it and "
            "write it anew, model.save_pretrained(folder, safe_serialization=True)"
            if pickled
            else f" ({' or '.join(f'{stem}.safetensors' for stem in STEMS)}): download it whole"
        )
    )


def _files(folder: Path, what: str, variant: str | None, there: set[str]) -> list[Path]:
    """The files of exactly this variant; none where it is not there."""
    dot = f".{variant}" if variant else ""
    for stem in STEMS:
        if (whole := f"{stem}{dot}.safetensors") in there:
            return [folder / whole]
        if (index := folder / f"{stem}.safetensors.index{dot}.json").name in there:
            names = sorted(set(read_json(index, f"the index of {what}", weight_map=dict)["weight_map"].values()), key=str)
            if lacking := [str(n) for n in names if not isinstance(n, str) or Path(n).name != n or n not in there]:
                raise UserError(f"{what} in {folder} lacks {', '.join(lacking[:5])}, which {index.name} names: download it whole")
            return [folder / name for name in names]
    return []


def _variant_of(name: str) -> str | None:
    """`fp16` of model.fp16.safetensors and of model.safetensors.index.fp16.json; a shard is of none."""
    if re.search(r"-\d{5}-of-\d{5}\.", name):
        return None
    for stem in STEMS:
        for start, end in ((f"{stem}.", ".safetensors"), (f"{stem}.safetensors.index.", ".json")):
            if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end):
                return name[len(start) : -len(end)]
    return None


def names_in(files: list[Path]) -> set[str]:
    """Names of the tensors in safetensors files, from their headers."""
    names: set[str] = set()
    for file in files:
        with opened(file) as tensors:
            names |= set(tensors.keys())
    return names


def opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}): restore it or download it again") from error


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file; UserError where it is corrupt or is not the file that was meant."""
    if expected_sha256 is not None and (found := sha256(path)) != expected_sha256:
        raise UserError(
            f"{path} is not the file that was saved: sha256 {found[:16]}... instead of {expected_sha256[:16]}.... Restore it or make it again."
        )
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code and is not read here: convert it where you trust it, with safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); its sha256 is {sha256(path)[:16]}.... The file is corrupt: restore it or make it again."
        ) from error


def read_weights(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """read_tensors of a model's weights. Raises UserError where they are worth nothing, too."""
    tensors = read_tensors(path, expected_sha256)
    odd = [name for name, t in tensors.items() if not t.is_floating_point()]
    if told := worthless(tensors) or (odd and f"{len(odd)} tensors are whole numbers, e.g. {odd[0]}"):
        raise UserError(f"{path} holds no weights to work with: {told}. Take the file from where it came from again, or make it again")
    return tensors


def worthless(tensors: dict[str, Tensor]) -> str:
    """Why a model's weights cannot be meant: some are no numbers, or all are zero; '' where they can be."""
    zero = not any(bool(t.any()) for t in tensors.values() if t.is_floating_point())
    return not_finite(tensors) or f"all {len(tensors)} tensors are zero" * zero


def not_finite(tensors: dict[str, Tensor]) -> str:
    """'' where all numbers are finite, else how many tensors hold others."""
    ends = {name: torch.stack(t.detach().aminmax()) for name, t in tensors.items() if t.numel() and t.is_floating_point()}
    bad = [name for name, two in ends.items() if not bool(torch.isfinite(two).all())]
    return f"{len(bad)} of {len(tensors)} tensors hold NaN or Inf, e.g. {bad[0]}" if bad else ""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write under a temporary name, flush to disk, then rename."""
    with replacing(path) as temporary:
        # not by save_file, which writes to a name of its own first and leaves that behind where it is killed
        temporary.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=metadata))


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """write_tensors of a model's weights. Raises UserError where some are not finite: they are worth nothing, and nothing that is there is replaced by them."""
    if told := not_finite(tensors):
        raise UserError(f"{path.name} is not written: {told}. The training has diverged: lower the learning rate")
    write_tensors(path, tensors, metadata)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: numbers that are none become null."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


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
