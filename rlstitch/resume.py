"""May a run be gone on with? Not while another process trains there, not by another recipe, and not on other files: a checkpoint keeps the hashes of what it was trained on."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlstitch import adapters, checkpoint, hub, lock, protocols
from rlstitch import config as cfg
from rlstitch.files import resolve, sha256
from rlstitch.fingerprints import folder_fingerprint, quick_fingerprint
from rlstitch.paths import home, what_is
from rlstitch.prompts import fingerprint as prompts_fingerprint
from rlstitch.schema import RunConfig
from rlstitch.stages import expand
from rlstitch.stitch.model import read_card
from rlstitch.types import UserError

_MODEL = ("**/*.safetensors", "**/*.json", "**/*.txt", "**/open_clip_pytorch_model.bin")
NAMED = (*hub.KEYS, "instruction", "images")  # arguments that name a file or folder though it lies beside, without a slash
LARGE = 1 << 28  # bytes of a file up to which it is hashed whole
TENSORS = "tensors:"  # what the hash of a model folder begins with


KINDS = {
    **dict.fromkeys((lock.LOCK, "recipe.yaml", "metrics.jsonl", "summary.json", "evaluation.json", "report.html"), "a file"),
    **dict.fromkeys(("checkpoints", "samples", "lora"), "a folder"),
}


def as_it_should_be(run: Path) -> None:
    """Raises UserError where something in a run folder is of another kind than what is kept under that name: a pipe would be waited for, a folder never replaced."""
    odd = [f"{run / name} is {there}, not {kind}" for name, kind in KINDS.items() if (there := what_is(run / name)) not in ("", kind)]
    if odd:
        raise UserError(f"{'; '.join(odd)}: move it out of the run folder, or give this run one of its own with name=NAME")


def resumable(config: RunConfig) -> None:
    """`may_go_on` of a training run, which must not start from a LoRA that it would write over either."""
    run = Path(config.out) / config.name
    if config.lora.init and adapters.find(config.lora.init).resolve().is_relative_to(run.resolve()):
        raise UserError(f"lora.init is {config.lora.init}, which this run would write over: give it a folder of its own with name=NAME")
    may_go_on(config, lambda: hashes(config))


def may_go_on(config: Any, hashes: Callable[[], dict[str, str]]) -> None:
    """Raises UserError where another process trains in the run folder, where that holds files that are not ours, and where resume=auto would go on with a run of
    another recipe or on other files, whose weights and figures would then pass for this one's. hashes: of the files that it reads."""
    run = Path(config.out) / config.name
    as_it_should_be(run)
    lock.refuse_if_held(run)
    found = checkpoint.folders(run)
    written = ("recipe.yaml", "metrics.jsonl", "summary.json", "evaluation.json", "report.html")
    if not found and not (run / lock.LOCK).exists() and (others := [name for name in written if (run / name).exists()]):
        raise UserError(
            f"{run} holds {', '.join(others)} but no run of rlstitch, which would write over them: give this one a folder of its own with name=NAME"
        )
    if config.resume != "auto" or not found or not (run / "recipe.yaml").is_file():
        return
    changed, now = cfg.differences(cfg.compose(str(run / "recipe.yaml")), config), hashes()
    for folder in reversed(found):
        with suppress(UserError):  # a damaged one is stepped over when the run goes on
            changed += changed_files(checkpoint.told(folder).get("inputs", {}), now)
            break
    if changed:
        raise UserError(
            f"{run} holds a run of another recipe ({'; '.join(changed)}). Give this one a folder of its own with name=NAME, start over with resume=never, or go on all the same with resume={found[-1]}"
        )


def keep_commits(config: RunConfig, name: str) -> None:
    """Where a config goes on with a run, a hub id without a revision stands for the commit that the run has."""
    if config.resume == "never":
        return
    with suppress(UserError):  # which `resumable` tells
        run = home(config.out) / (config.name or cfg.short_name(name)) if config.resume == "auto" else Path(config.resume).parent.parent
        if not checkpoint.folders(run) or not (run / "recipe.yaml").is_file():
            return
        saved = cfg.structure(cfg.compose(str(run / "recipe.yaml")))[0]
        pairs = [(config.model, saved.model), *((node, saved.rewards.get(name)) for name, node in config.rewards.items())]
        config.lora.init = _kept(config.lora.init, saved.lora.init)
        if config.model.get("merge") and isinstance(saved.model, dict):
            config.model["merge"] = _kept(config.model["merge"], saved.model.get("merge"))
        for node, before in pairs:
            for key in hub.ids_of(node) if isinstance(node, dict) and isinstance(before, dict) else ():
                node[key] = before[key] if str(before.get(key)).startswith(f"{node[key]}@") else node[key]


def _kept(loras: Any, before: Any) -> Any:
    """A recipe's LoRA, each as the run that is gone on with has it where that is the same hub id with its commit."""
    now, then = adapters.listed(loras), adapters.listed(before)
    if len(now) != len(then):
        return loras
    kept = [b if hub.parsed_file(n) and re.match(rf"{re.escape(n)}[@/]", str(b)) else n for n, b in zip(now, then)]
    return kept[0] if isinstance(loras, str) else kept if loras else loras


def gone_on(source: Path | None, step: int, updates: int) -> str:
    """What a run's first line says of the checkpoint that it goes on from."""
    if source is None:
        return ""
    beyond = f"is beyond the {updates} updates asked for" if step > updates else "is the last"
    return f"; resumed from {source.name}" + (
        f", which {beyond}: nothing is left to train, it is evaluated as it is" if step >= updates else ""
    )


def hashes(config: RunConfig) -> dict[str, str]:
    """`key = path` of every file and folder that the maths reads -> hash: prompt files and heads whole, value models by their weights, LoRA whole, model folders by
    their tensors, pictures by name and size."""
    parts = expand(config)
    trained = {name for part in parts for name in part.oracle.get("weights", {})}
    out = {f"data.prompts = {p.data.prompts}": prompts_fingerprint(p.data.prompts) for p in parts if not config.data.images}
    out[f"evaluation.prompts = {config.evaluation.prompts}"] = prompts_fingerprint(config.evaluation.prompts)
    out |= {f"values.{name} = {path}": read_card(path)["sha256"] for name, path in config.values.items() if name in trained}
    given = {"lora.init": config.lora.init, "model.merge": config.model.get("merge") if protocols.ours(config.model["_target_"]) else None}
    loras = [(key, path) for key, paths in given.items() for path in adapters.listed(paths) if path]
    out |= {f"{key} = {path}": adapters.fingerprint(path) for key, path in loras}
    nodes = {"model": {k: v for k, v in config.model.items() if f"model.{k}" not in given}, "data.images": config.data.images} | {
        f"rewards.{n}": node for n, node in config.rewards.items() if n in trained
    }
    return out | hashes_of(nodes)


def hashes_of(nodes: Mapping[str, Any]) -> dict[str, str]:
    """`key = path` of every file and folder that parts name, by their keys -> hash."""
    out = {}
    for where, node in nodes.items():
        for key, path in _paths(node, where):
            found = resolve(path)
            whole = _file if found.is_file() else _listing if where == "data.images" else _weights
            out[f"{key} = {path}"] = whole(found)
    return out


def changed_files(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """Which of the files that both read are others; a path that is another one is the recipe's affair. Of a model folder an older checkpoint hashed the files."""

    def same(key: str, told: str) -> bool:
        is_now = now.get(key, told)
        old = is_now.startswith(TENSORS) and not told.startswith(TENSORS)
        return (_files(resolve(key.partition(" = ")[2])) if old else is_now) == told

    return [f"{key} holds something else" for key, told in saved.items() if not same(key, told)]


def started_elsewhere(folder: Path, config: RunConfig) -> list[str]:
    """Which LoRA that a checkpoint's weights stand beside are others by now, or were given for this evaluation alone."""
    saved, now = checkpoint.told(folder).get("inputs", {}), hashes(config)
    before, start = ([told for key, told in found.items() if key.startswith("lora.init = ")] for found in (saved, now))
    changed = changed_files({key: told for key, told in saved.items() if key.startswith("model.merge = ")}, now)
    return changed + [f"lora.init = {config.lora.init or 'none'} is not what it began with"] * (before != start)


def _paths(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """The arguments of a part that name a file or folder, by key."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict):
            yield from _paths(value, f"{where}.{key}")
        elif isinstance(value, list):
            yield from _paths(dict(enumerate(value)), f"{where}.{key}")
        elif isinstance(value, str) and (
            value.startswith("shapes:") or ((key in NAMED or "/" in value) and value and os.path.exists(os.path.expanduser(value)))
        ):
            yield f"{where}.{key}", value


def _file(file: Path) -> str:
    return sha256(file) if file.stat().st_size < LARGE else quick_fingerprint(file.parent, [file])


def _weights(folder: Path) -> str:
    return f"{TENSORS}{folder_fingerprint(folder)}"


def _files(folder: Path) -> str:
    return quick_fingerprint(folder, (file for pattern in _MODEL for file in sorted(folder.glob(pattern))))


def _listing(folder: Path) -> str:
    told = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return hashlib.sha256(repr(told).encode()).hexdigest()
