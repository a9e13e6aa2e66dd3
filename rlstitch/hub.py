"""Models by hub id, `owner/name` or `owner/name@revision`, and single files of one, `owner/name/FILE@revision`: from the local hub cache (HF_HOME, HF_HUB_CACHE), else
fetched into it.

What is fetched is data alone: JSON, text, tokenizers, chat templates and safetensors; a pickle only where a part that reads it without running it (weights.read_checkpoint)
asks for it by name. First come the small files, which are enough for every check; then the weights, of the parts that are loaded and in one variant.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from rlstitch.downloads import Silent, amount, shown
from rlstitch.files import PICKLES, cache_folder, read_json, require, weight_files
from rlstitch.paths import what_is
from rlstitch.telling import say
from rlstitch.types import UserError

T = TypeVar("T")

_WORD = r"(?![.-])(?:(?!--|\.\.)[\w.-]){1,96}(?<![.-])"
_REVISION = r"(?:@((?!.*\.\.)\w[\w./+-]*))?"
ID = re.compile(rf"({_WORD}/{_WORD})(?<!\.git){_REVISION}", re.ASCII)
FILE_ID = re.compile(
    rf"({_WORD}/{_WORD})(?<!\.git)(?:/((?:[\w+-][\w.+ -]*/)*[\w+-][\w.+ -]*\.(?:safetensors|bin|pth?)))?{_REVISION}", re.ASCII
)
DATASET = re.compile(rf"hub:datasets/({_WORD}/{_WORD})/((?:[\w+-][\w.+ -]*/)*[\w+-][\w.+ -]*){_REVISION}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL = ("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja")
INDEXES = (
    "model_index.json",
    "config.json",
    "open_clip_config.json",
)  # of a pipeline, of a single model: fetched last, so that what was cut short has none
KEYS = ("path", "head", "tokenizer", "processor", "base", "clip")  # of a part, that may be hub ids
AGAIN = 60.0  # seconds before a hub that did not answer is asked again
_libraries_alone = False  # whether it is `keep_libraries_offline` that said HF_HUB_OFFLINE
_unanswered: dict[tuple[str | None, ...], tuple[float, str]] = {}
_asked: set[Path] = set()  # snapshots that have all the small files that there are


# ---------------------------------------------------------------------------------------------------- names


def parsed(path: Any) -> tuple[str, str | None] | None:
    """(owner/name, revision or None) of a hub id; None for anything else. What lies here by that name is no hub id."""
    found = ID.fullmatch(path) if isinstance(path, str) else None
    return None if found is None or what_is(path) else (found[1], found[2])


def parsed_file(path: Any, pickles: bool = False) -> tuple[str, str | None, str | None] | None:
    """(owner/name, file in it or None, revision or None) of a hub id of one file; None for anything else. What lies here by that name is no hub id."""
    found = FILE_ID.fullmatch(path) if isinstance(path, str) else None
    return None if found is None or what_is(path) or (Path(found[2] or "").suffix in PICKLES and not pickles) else found.groups()


def pinned(path: Any, what: str = "the model directory") -> Any:
    """A hub id, also of a file, with the commit that it stands for, owner/name@COMMIT; anything else as it is."""
    if (named := parsed_file(path, pickles=True)) is None or COMMIT.fullmatch(named[2] or ""):
        return path
    name, inside, revision = named
    if inside is None:
        return f"{name}@{model_folder(path, what).name}"
    if found := file_here(path):
        return f"{name}/{inside}@{commit_of(found)}"
    import huggingface_hub

    return f"{name}/{inside}@{_ask(path, what, lambda: huggingface_hub.HfApi().model_info(name, revision=revision).sha)}"


def ids_of(node: Any) -> list[str]:
    """Keys of a part's node that are hub ids."""
    own = str(node.get("_target_")).startswith("rlstitch.")  # what another's class does with its keys is its own affair
    return [key for key in KEYS[: None if own else 1] if parsed_file(node.get(key), pickles=True)]


def commit_of(file: Path) -> str:
    """Of a file in the cache."""
    return next(folder for folder in file.parents if folder.parent.name == "snapshots").name


def model_folder(path: str | Path, what: str = "the model directory") -> Path:
    """`files.require`, or the snapshot of a hub id with at least its small files. Raises UserError where there is no such model, or none to be had now."""
    if (named := parsed(path)) is None:
        try:
            return require(path, what)
        except UserError as error:
            if re.match(r"\w+://|[\w.-]+[/@]", str(path)) and not what_is(path):
                raise UserError(f"{error} Nor is it a hub id, which is owner/name or owner/name@revision") from error
            raise
    folder = _local(*named)
    if folder is None or _gaps(folder):
        folder = _small(path, what, *named)
    return folder


def _local(name: str, revision: str | None) -> Path | None:
    """The snapshot that the cache has, by its index."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for index in INDEXES:
        try:
            found = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[index])
        except LocalEntryNotFoundError:
            continue
        if COMMIT.fullmatch(Path(found).name) and (Path(found) / index).is_file():
            return Path(found)
    return None


def _gaps(folder: Path) -> list[str]:
    """Parts that a snapshot's index names and that have no configuration in it, though the hub may have it."""
    if folder in _asked or not (folder / INDEXES[0]).is_file():
        return []
    index = read_json(folder / INDEXES[0], "the pipeline's index")
    parts = [part for part, entry in index.items() if isinstance(entry, list) and any(entry) and Path(part).name == part]
    return [part for part in parts if not part.startswith("_") and not any(f.is_file() for f in (folder / part).glob("*.json"))]


# ---------------------------------------------------------------------------------------------------- the network


def keep_libraries_offline() -> None:
    """The libraries that load models ask no network by themselves; what is fetched is fetched here, unless the user has said HF_HUB_OFFLINE."""
    global _libraries_alone
    if not (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")):
        os.environ["HF_HUB_OFFLINE"], _libraries_alone = "1", True


def offline() -> bool:
    """Whether the user wants nothing fetched."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE and not _libraries_alone


def _ask(path: Any, what: str, action: Callable[[], T], lacks: str = "", parts: Iterable[str] = ()) -> T:
    """What the hub gives. Raises UserError, in one line, where it gives nothing; one that does not answer is left alone for a while.

    lacks, parts: what is missing of a model that the cache has in part.
    """
    from huggingface_hub import constants, errors

    data = DATASET.fullmatch(path)
    name, file, revision = named = (data or FILE_ID.fullmatch(path)).groups()
    wanted = [f"'{file}'"] if file else [f"--include '{p}'" for p in _globs(parts)]
    fetch = " ".join(
        [
            "hf download",
            *(["--repo-type dataset"] if data else []),
            name,
            *wanted[: bool(file)],
            *([f"--revision {revision}"] if revision else []),
            *wanted[bool(file) :],
        ]
    )
    short = f"{what} '{path}' is no {'file' if file else 'folder'} here, and " + (
        f"the hub cache has no more than a part of it (it lacks {lacks})"
        if lacks
        else f"it is not in the hub cache ({constants.HF_HUB_CACHE})"
    )
    remedy = f"where there is a network, run {fetch}"
    if offline():
        raise UserError(f"{short}; HF_HUB_OFFLINE keeps it from being fetched: unset that, or {remedy}")
    since, why = _unanswered.get(named, (-AGAIN, ""))
    if time.monotonic() - since < AGAIN:
        raise UserError(why)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        return action()
    except errors.GatedRepoError as error:
        why, cause = f"{name} is gated: accept its licence on the model's page at the hub, then run hf auth login", error
    except errors.RepositoryNotFoundError as error:
        why = f"{what} '{path}' is not here, and the hub has no {'data set' if data else 'model'} {name} that can be seen from here: look at its spelling, or, where it is private, run hf auth login"
        cause = error
    except errors.RevisionNotFoundError as error:
        why, cause = (
            f"{name} has no revision '{revision or 'main'}' at the hub: give a branch, a tag or a commit of it, or leave it out",
            error,
        )
    except Exception as error:  # the client raises many kinds, its own and the network's
        if isinstance(error, UserError) or getattr(error, "errno", None):  # a full disk, a cache that may not be written to
            raise
        told = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        why, cause = f"{short}; the hub gives nothing ({told[0][:200]}): try again, or {remedy}", error
    finally:
        constants.HF_HUB_OFFLINE = before
    _unanswered[named] = (time.monotonic(), why)
    raise UserError(why) from cause


def _globs(parts: Iterable[str]) -> list[str]:
    """What to have `hf download` include: small files, and the weights of parts, or of whatever may be one."""
    files, folders = _split(parts)
    wanted = [*files, *(f"{part}/*.safetensors".lstrip("/") for part in folders)]
    return [*SMALL, *(wanted or ["*/*.safetensors", "model*.safetensors"])]


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """One process of a machine fetches a model at a time; others wait."""
    file = cache_folder() / "hub" / f"{name.replace('/', '--')}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(name: str, revision: str | None, include: Iterable[str], exclude: Iterable[str] = ()) -> Path:
    import huggingface_hub

    how = dict(allow_patterns=list(include), ignore_patterns=list(exclude) or None, tqdm_class=Silent)
    return Path(huggingface_hub.snapshot_download(name, revision=revision, **how))


def _small(path: Any, what: str, name: str, revision: str | None) -> Path:
    """The snapshot with all its small files, fetched where they are not there."""

    def fetch() -> Path:
        folder = _download(name, revision, SMALL, INDEXES)
        for index in reversed(INDEXES):
            _download(name, folder.name, [index])
        return folder

    with nullcontext() if offline() else _alone(name):
        folder = _local(name, revision)
        gaps = _gaps(folder) if folder is not None else []
        if folder is None or gaps:
            folder = _ask(path, what, fetch, ", ".join(f"{part}/" for part in gaps))
    _asked.add(folder)
    return folder


@lru_cache(maxsize=16)
def _listing(name: str, commit: str | None) -> dict[str, int]:
    """Bytes of every file that a commit (or a branch; None: the main one) has at the hub."""
    import huggingface_hub

    files = huggingface_hub.HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in files}


# ---------------------------------------------------------------------------------------------------- weights


def missing(path: Any, parts: Iterable[str], variant: str | None = None, what: str = "the model directory") -> dict[str, int]:
    """Files of the weights of `parts` (folders of a pipeline; '' is the root) that a hub id's snapshot is still to get, with their bytes; none of a folder's.

    Of each part that is the one variant which `files.weight_files` would read if all were here. Raises UserError where the hub has none that is read, or does not answer.
    """
    if (named := parsed(path)) is None:
        return _missing_file(path, what)
    folder = model_folder(path, what)
    files, parts = _split(parts)
    lacking = [part for part in parts if not _has(folder / part, variant)]
    bare = [part for part in lacking if not _has(folder / part, variant, exactly=False)]
    bare += (absent := [file for file in files if not (folder / file).is_file()])
    if not (lacking or absent) or (offline() and not bare):
        return {}
    try:
        lacks = "the weights of " + ", ".join(part or "the model" for part in lacking) if lacking else ", ".join(absent)
        listing = _ask(path, what, lambda: _listing(named[0], folder.name), lacks, bare)
    except UserError:
        if bare:
            raise
        return {}  # another variant is here, and will do as it does in a folder
    out = {file: listing[file] for file in absent}
    for part in lacking:
        start = f"{part}/" if part else ""
        names = [n.removeprefix(start) for n in listing if n.startswith(start) and "/" not in n.removeprefix(start)]
        files = weight_files(folder / part, f"the {part or 'model'} of {named[0]}", variant, names)[1]
        out |= {f"{start}{f.name}": listing[f"{start}{f.name}"] for f in files if not f.is_file()}
    return out


def _split(parts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Single files, and folders, among what a part needs."""
    parts = list(parts)
    files = [part for part in parts if Path(part).suffix in (".safetensors", *PICKLES)]
    return files, [part for part in parts if part not in files]


def _missing_file(path: Any, what: str) -> dict[str, int]:
    """`missing` of a hub id of one file."""
    if (named := parsed_file(path, pickles=True)) is None or file_here(path):
        return {}
    listing = _ask(path, what, lambda: _listing(named[0], named[2]))
    if named[1] not in listing:
        weights = sorted(f for f in listing if Path(f).suffix in (".safetensors", *PICKLES))
        raise UserError(f"{named[0]} has no file {named[1]}: it has {', '.join(weights[:5]) or 'no weights'}")
    return {named[1]: listing[named[1]]}


def names(path: Any, what: str = "the model directory") -> set[str]:
    """Names of the files at the top of a folder, or of a hub id's repository: as the cache has it or, where that is without weights, as the hub tells."""
    folder = model_folder(path, what)
    here = {f.name for f in folder.iterdir() if f.is_file()}
    if (named := parsed(path)) is None or offline() or _split(here)[0]:
        return here
    return here | {n for n in _ask(path, what, lambda: _listing(named[0], folder.name), "its weights") if "/" not in n}


def _has(folder: Path, variant: str | None, exactly: bool = True) -> bool:
    try:
        return weight_files(folder, "the model", variant)[0] == variant or not exactly
    except UserError:
        return False


def fetch(path: Any, parts: Iterable[str], variant: str | None = None, what: str = "the model directory") -> Path:
    """`model_folder` of a model whose weights, of `parts`, are then there, too; of a hub id of one file that file."""
    if (named := parsed(path)) is None:
        return file(path, what) if parsed_file(path, pickles=True) else model_folder(path, what)
    path, parts = pinned(path), list(parts)
    folder = model_folder(path, what)
    if wanted := missing(path, parts, variant, what):
        say(f"{named[0]}: {amount(wanted)} of weights are fetched into the hub cache")
        with shown(named[0], folder.parents[1] / "blobs", sum(wanted.values())), _alone(named[0]):
            if wanted := missing(path, parts, variant, what):  # by now another process may have been here
                names = [glob.escape(n) for n in wanted]
                _ask(path, what, lambda: _download(named[0], folder.name, names), ", ".join(wanted), parts)
    return folder


def file_here(path: str, pick: Callable[[list[str], str], str] = lambda names, path: "") -> Path | None:
    """What `file` gives where the cache has it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, inside, revision = parsed_file(path, pickles=True)
    patterns = [glob.escape(inside) if inside else "*.safetensors"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        return None
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    found = folder / (inside or (pick(files, path) if files else ""))
    return found if found.is_file() else None


def file(path: str, what: str, pick: Callable[[list[str], str], str] = lambda names, path: "", beside: Iterable[str] = ()) -> Path:
    """The file that `parsed_file` names, or the one that `pick` takes of the safetensors at a repository's top (their names; what they are in); files named `beside` come
    with it. Raises UserError where there is none, or none to be had now."""
    name, inside, revision = parsed_file(path, pickles=True)

    def fetched() -> Path:
        listing = _listing(name, revision)
        if inside and inside not in listing:
            raise UserError(
                f"{name} has no file {inside}: it has {', '.join(sorted(f for f in listing if f.endswith('.safetensors'))[:5]) or 'none in safetensors'}"
            )
        one = inside or pick(sorted(f for f in listing if "/" not in f), path)
        say(
            f"{name}: {amount({one: listing[one]})} of {what.removeprefix('the ')} {'is' if listing[one] else 'are'} fetched into the hub cache"
        )
        return _download(name, revision, [glob.escape(f) for f in (one, *(str(Path(one).with_name(b)) for b in beside))]) / one

    if found := file_here(path, pick):
        return found
    with nullcontext() if offline() else _alone(name):
        return file_here(path, pick) or _ask(path, what, fetched)


def dataset_file(path: str, what: str) -> Path:
    """The file that `hub:datasets/owner/name/FILE[@revision]` names, from the local hub cache or fetched into it. Raises UserError where there is none, or none to be had now."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = DATASET.fullmatch(path)
    if found is None:
        raise UserError(
            f"{what} '{path}': a file of a data set at the hub is named hub:datasets/OWNER/NAME/FILE, with @REVISION behind it where it is not the newest"
        )
    name, inside, revision = found.groups()
    how = dict(revision=revision, repo_type="dataset", allow_patterns=[glob.escape(inside)])

    def there() -> Path | None:
        try:
            file = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **how)) / inside
        except LocalEntryNotFoundError:
            return None
        return file if file.is_file() else None

    def fetched() -> Path:
        file = Path(huggingface_hub.snapshot_download(name, tqdm_class=Silent, **how)) / inside
        if not file.is_file():
            raise UserError(f"{what} '{path}': the data set {name} has no file {inside}")
        return file

    with nullcontext() if offline() else _alone(f"datasets/{name}"):
        return there() or _ask(path, what, fetched)
