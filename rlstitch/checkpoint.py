"""Checkpoints: megabytes, written under a temporary name and renamed whole, so that the last good one always loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlstitch.distributed import Engine
from rlstitch.files import read_tensors, sha256, write_json, write_tensors
from rlstitch.policy import Policy
from rlstitch.types import Algorithm, UserError

DONE = "complete.json"


def folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob(f"step-*/{DONE}"))


def save(
    run: Path,
    step: int,
    engine: Engine,
    policy: Policy,
    progress: dict[str, Any],
    *,
    keep: int,
    spare: int = 0,
    refresher: Any = None,
    algorithm: Algorithm | None = None,
) -> Path:
    """Write checkpoints/step-N: LoRA (raw and EMA), optimiser, RNG of every rank, refreshed value models, the algorithm's state, `progress`. The last `keep` stay, and that of step `spare`.

    A collective; raises UserError where the disk is full.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    weights = policy.state_dict()

    def together(write: Callable[[], None]) -> None:
        """Every rank writes its part, and all give up where one cannot."""
        problem = ""
        try:
            write()
        except OSError as error:
            problem = str(error)
        if engine.any(bool(problem)):
            if engine.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"checkpoint {final.name} could not be written ({problem or 'another rank failed'}); the last good one is {folders(run)[-1].name if folders(run) else 'none'}. Free some space and start again: the run resumes from there."
            )

    def begin() -> None:
        if engine.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def contents() -> None:
        write_tensors(temporary / f"rng-{engine.rank}.safetensors", {"torch": torch.get_rng_state()})
        if engine.is_main:
            write_tensors(temporary / "policy.safetensors", weights)
            if refresher is not None:
                write_tensors(temporary / "values.safetensors", refresher.tensors())
            if algorithm is not None and (state := algorithm.state()):
                write_tensors(temporary / "algorithm.safetensors", state)
        if engine.zero_stage:
            engine.deepspeed.save_checkpoint(str(temporary), tag="deepspeed", exclude_frozen_parameters=True)
        elif engine.is_main:
            write_tensors(temporary / "optimiser.safetensors", engine.optimiser_state())

    def finish() -> None:
        if not engine.is_main:
            return
        told = {
            "step": step,
            "world": engine.world,
            "zero_stage": engine.zero_stage,
            "policy_updates": policy.updates,
            "scaler": engine.scaler_state(),
        }
        told |= {} if refresher is None else {"refresh": refresher.progress()}
        told |= {"sha256": {p.name: sha256(p) for p in temporary.glob("*.safetensors")}}
        write_json(temporary / DONE, progress | told)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in folders(run)[:-keep]:
            if old.name != f"step-{spare:06d}":
                shutil.rmtree(old, ignore_errors=True)

    for part in (begin, contents, finish):
        together(part)
    return final


def load(folder: Path, engine: Engine, policy: Policy, refresher: Any = None, algorithm: Algorithm | None = None) -> dict[str, Any]:
    """Restore a checkpoint in place; -> its progress. Raises UserError where it is damaged, or for another number of ranks or ZeRO stage."""
    if not (folder / DONE).exists():
        raise UserError(f"{folder} is no complete checkpoint (it has no {DONE})")
    progress = json.loads((folder / DONE).read_text())
    if progress["zero_stage"] != engine.zero_stage:
        raise UserError(
            f"{folder.name} was saved under distributed.zero_stage={progress['zero_stage']}, this run has {engine.zero_stage}: use the same stage, or resume=never"
        )
    if engine.zero_stage and progress["world"] != engine.world:
        raise UserError(
            f"{folder.name} was saved by {progress['world']} ranks and ZeRO cannot cut it anew for {engine.world}: start {progress['world']} ranks"
        )
    hashes = progress["sha256"]
    policy.load_state_dict(read_tensors(folder / "policy.safetensors", hashes["policy.safetensors"]))
    policy.updates = progress["policy_updates"]
    if engine.zero_stage:
        engine.deepspeed.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
    else:
        engine.load_optimiser_state(read_tensors(folder / "optimiser.safetensors", hashes["optimiser.safetensors"]))
    engine.load_scaler_state(progress.get("scaler", {}))
    if refresher is not None and "values.safetensors" in hashes:
        refresher.restore(read_tensors(folder / "values.safetensors", hashes["values.safetensors"]), progress["refresh"])
    if algorithm is not None and "algorithm.safetensors" in hashes:
        algorithm.load_state(read_tensors(folder / "algorithm.safetensors", hashes["algorithm.safetensors"]))
    rng = f"rng-{engine.rank}.safetensors"
    if (folder / rng).exists():
        torch.set_rng_state(read_tensors(folder / rng, hashes[rng])["torch"])
    return progress
