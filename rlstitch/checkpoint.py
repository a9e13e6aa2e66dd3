"""Checkpoints: megabytes of tensors and JSON, written in a hidden folder and renamed whole, so that the last good one always loads. Nothing is removed that was not written here."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlstitch.distributed import Engine
from rlstitch.files import read_json, read_tensors, sha256, write_json, write_tensors, write_weights
from rlstitch.policy import Policy
from rlstitch.telling import say
from rlstitch.types import Algorithm, UserError

DONE = "complete.json"
_NAME = re.compile(r"step-(\d+)")
_WRITING = re.compile(r"\.writing-[0-9a-f]{16}")
_OURS = re.compile(r"(complete\.json|(policy|values|algorithm|optimiser(-\d+)?|rng-\d+)\.safetensors)(\.\d+\.tmp)?")
_HALF = re.compile(
    r"(recipe\.yaml|(metrics|summary|evaluation)\.jsonl?|report\.html|wandb-id|[\w-]+\.png|pytorch_lora_weights\.safetensors)\.\d+\.tmp"
)
_SEAL = "seal"
_KEYS = {"step": int, "world": int, "zero_stage": int, "policy_updates": int, "sha256": dict}


# ---------------------------------------------------------------------------------------------------- which there are


def number(folder: Path) -> int:
    """The update that a folder step-N is of; -1 where it has another name."""
    named = _NAME.fullmatch(folder.name)
    return int(named[1]) if named else -1


def folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((p.parent for p in (run / "checkpoints").glob(f"step-*/{DONE}") if number(p.parent) >= 0), key=number)


def told(folder: Path) -> dict[str, Any]:
    """What a checkpoint's complete.json says. Raises UserError where there is none, or where it is damaged."""
    file = folder / DONE
    if not file.exists():
        raise UserError(f"{folder} is no complete checkpoint (it has no {DONE})")
    found = read_json(file, "the checkpoint's record", "go on from another with resume=PATH, or start over with resume=never", **_KEYS)
    if found.pop(_SEAL, None) != _seal(found):
        raise UserError(f"{file} is not as it was saved")
    return found


def fault(folder: Path) -> str:
    """Which file of a checkpoint is not as it was saved, and why; empty where it is whole."""
    try:
        found = told(folder)
    except UserError as error:
        return str(error)
    if number(folder) not in (-1, found["step"]):
        return f"{folder / DONE} is of step {found['step']}"
    for name, wanted in found["sha256"].items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if (is_now := sha256(folder / name)) != wanted:
            return f"{folder / name} is not the file that was saved: sha256 {is_now[:16]}... instead of {str(wanted)[:16]}..."
    return ""


def newest(run: Path, *, keep_aside: bool) -> Path | None:
    """The newest checkpoint that is whole; None where a run has none at all. Newer ones that are broken are told and, where `keep_aside`, renamed.

    Raises UserError where there are some and none is whole.
    """
    inside = (run / "checkpoints").iterdir() if (run / "checkpoints").is_dir() else ()
    found = sorted((f for f in inside if number(f) >= 0 and f.is_dir() and any(_OURS.fullmatch(p.name) for p in f.iterdir())), key=number)
    broken: list[tuple[Path, str]] = []
    for folder in reversed(found):
        if not (why := fault(folder)):
            break
        broken.append((folder, why))
    else:
        if broken:
            raise UserError(
                f"no checkpoint of {run} is whole: {'; '.join(why for _, why in broken)}. Restore the files, or start over with resume=never"
            )
        return None
    for other, why in broken:
        kept = f"kept as {_aside(other).name}; " if keep_aside else ""
        say(f"checkpoint {other.name} is broken: {why}; {kept}going on from {folder.name}")
    return folder


def whole(folder: Path) -> Path:
    """The folder itself. Raises UserError where it is no whole checkpoint, naming the newest whole one beside it."""
    if why := fault(folder):
        good = [f for f in folders(folder.parent.parent) if f.name != folder.name and not fault(f)]
        raise UserError(
            f"{why}. " + (f"The newest whole checkpoint beside it: resume={good[-1]}" if good else "Name another with resume=PATH")
        )
    return folder


def _seal(progress: dict[str, Any]) -> str:
    """Hash of what complete.json says beside it, the same after a way through JSON."""
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------- what is removed


def _hidden() -> str:
    """A name for what is being written or removed, that no glob finds."""
    return f".writing-{secrets.token_hex(8)}"


def discard(folder: Path) -> None:
    """Remove a checkpoint, first from sight, so that a part of one is never seen. Where files of the user's lie in its folder, they and it stay."""
    if all(_OURS.fullmatch(path.name) for path in folder.iterdir()):
        _empty(folder.rename(folder.with_name(_hidden())))
    else:
        _empty(folder)


def _empty(folder: Path) -> None:
    (folder / DONE).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def tidy(run: Path) -> None:
    """Remove what a killed process was writing."""
    for file in (f for folder in (run, run / "samples", run / "lora") for f in folder.glob("*.tmp")):
        if _HALF.fullmatch(file.name):
            file.unlink()
    for folder in (run / "checkpoints").glob(".writing-*"):
        if _WRITING.fullmatch(folder.name):
            _empty(folder)


def prune(run: Path, keep: int, spare: int) -> None:
    """Remove all but the newest, the last `keep` of those that were due, and that of step `spare`. One written at a signal was not due, so that it displaces none."""
    found = {folder: due for folder in folders(run) if (due := _due(folder)) is not None}  # a damaged one stays
    due = [folder for folder, was_due in found.items() if was_due]
    stay = {*due[-keep:], *list(found)[-1:]}
    for folder in found:
        if folder not in stay and number(folder) != spare:
            discard(folder)


def _due(folder: Path) -> bool | None:
    """Whether a recipe asked for a checkpoint; None where it is damaged or not there."""
    try:
        return bool(told(folder).get("due", True))
    except UserError:
        return None


def _aside(folder: Path) -> Path:
    """Rename a folder to a name that no checkpoint has."""
    names = (folder.with_name(f"broken-{folder.name}{f'-{k}' * (k > 1)}") for k in range(1, 10_000))
    return folder.rename(next(name for name in names if not name.exists()))


# ---------------------------------------------------------------------------------------------------- saving, loading


def save(
    run: Path,
    step: int,
    engine: Engine,
    policy: Policy,
    progress: dict[str, Any],
    *,
    keep: int,
    spare: int = 0,
    due: bool = True,
    refresher: Any = None,
    algorithm: Algorithm | None = None,
) -> Path:
    """Write checkpoints/step-N: LoRA (raw and EMA), optimiser, RNG of every rank, refreshed value models, the algorithm's state, `progress`. The last `keep` of those
    that are `due` stay, and that of step `spare`.

    A collective; raises UserError where the disk is full, or where weights are not finite.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    temporary = final.with_name(engine.by_main(_hidden))
    weights = policy.state_dict()

    def together(write: Callable[[], None]) -> None:
        """Every rank writes its part, and all give up where one cannot."""
        problem, remedy = "", "Free some space and start again"
        try:
            write()
        except OSError as error:
            problem = str(error)
        except UserError as error:
            problem, remedy = str(error), "Mend that and start again"
        if engine.any(bool(problem)):
            if engine.is_main and temporary.exists():
                _empty(temporary)
            raise UserError(
                f"checkpoint {final.name} could not be written ({problem or 'another rank failed'}); the last good one is {folders(run)[-1].name if folders(run) else 'none'}. {remedy}: the run resumes from there."
            )

    def begin() -> None:
        if engine.is_main:
            temporary.mkdir(parents=True)

    def contents() -> None:
        write_tensors(temporary / f"rng-{engine.rank}.safetensors", {"torch": torch.get_rng_state()})
        if engine.is_main:
            write_weights(temporary / "policy.safetensors", weights)
            if refresher is not None:
                write_weights(temporary / "values.safetensors", refresher.tensors())
            if algorithm is not None and (state := algorithm.state()):
                write_tensors(temporary / "algorithm.safetensors", state)
        if engine.is_main or engine.zero_stage:
            write_tensors(temporary / _optimiser(engine), engine.optimiser_state())

    def finish() -> None:
        if not engine.is_main:
            return
        what = {
            "step": step,
            "due": due or bool(_due(final)),
            "world": engine.world,
            "zero_stage": engine.zero_stage,
            "policy_updates": policy.updates,
            "scaler": engine.scaler_state(),
        }
        what |= {} if refresher is None else {"refresh": refresher.progress()}
        what |= {"sha256": {p.name: sha256(p) for p in sorted(temporary.glob("*.safetensors"))}}
        what = json.loads(json.dumps(progress | what))
        write_json(temporary / DONE, what | {_SEAL: _seal(what)})
        if final.exists():
            discard(final)
        if final.exists():  # something of the user's is in it
            _aside(final)
        temporary.rename(final)
        prune(run, keep, spare)

    for part in (begin, contents, finish):
        together(part)
    return final


def _optimiser(engine: Engine) -> str:
    return f"optimiser-{engine.rank}.safetensors" if engine.zero_stage else "optimiser.safetensors"


def load_weights(folder: Path, policy: Policy) -> dict[str, Any]:
    """Restore the LoRA alone, on any number of ranks; -> its progress. Raises UserError where it is damaged."""
    progress = told(folder)
    try:
        policy.load_state_dict(read_tensors(folder / "policy.safetensors", progress["sha256"]["policy.safetensors"]))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is gone: a run that goes on there has replaced it by a newer one. Start again") from error
    policy.updates = progress["policy_updates"]
    return progress


def load(folder: Path, engine: Engine, policy: Policy, refresher: Any = None, algorithm: Algorithm | None = None) -> dict[str, Any]:
    """Restore a checkpoint in place; -> its progress. Raises UserError where it is damaged, or for another number of ranks or ZeRO stage."""
    progress = told(folder)
    hashes = progress["sha256"]
    if progress["zero_stage"] != engine.zero_stage:
        raise UserError(
            f"{folder.name} was saved under distributed.zero_stage={progress['zero_stage']}, this run has {engine.zero_stage}: use the same stage, or resume=never"
        )
    if engine.zero_stage and progress["world"] != engine.world:
        raise UserError(
            f"{folder.name} was saved by {progress['world']} ranks and ZeRO cannot cut it anew for {engine.world}: start {progress['world']} ranks"
        )
    if (optimiser := _optimiser(engine)) not in hashes:
        raise UserError(
            f"{folder} keeps ZeRO's optimiser state as a pickle, which can run code and is not read any more: start over with resume=never"
        )
    load_weights(folder, policy)
    engine.load_optimiser_state(read_tensors(folder / optimiser, hashes[optimiser]))
    engine.load_scaler_state(progress.get("scaler", {}))
    if refresher is not None and "values.safetensors" in hashes:
        refresher.restore(read_tensors(folder / "values.safetensors", hashes["values.safetensors"]), progress["refresh"])
    if algorithm is not None and "algorithm.safetensors" in hashes:
        algorithm.load_state(read_tensors(folder / "algorithm.safetensors", hashes["algorithm.safetensors"]))
    if (rng := f"rng-{engine.rank}.safetensors") in hashes:
        torch.set_rng_state(read_tensors(folder / rng, hashes[rng])["torch"])
    return progress
