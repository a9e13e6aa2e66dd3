"""Memory that runs out ends a job in one line: what was asked for, and what makes it smaller."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rlstitch.schema import RunConfig
from rlstitch.types import UserError

SIGNS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate", "bad_alloc", "CUDA error: out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Memory that ran out, the accelerator's or the machine's; it is the job's affair, in whatever part it happened."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in words(error) for sign in SIGNS)


def words(error: BaseException) -> str:
    """What an exception says; of a user's class even that may fail."""
    try:
        return str(error)
    except Exception:
        return "(its message cannot be read)"


def asked_for(error: BaseException) -> str:
    """What an error says it wanted: " (2.50 GiB were asked for)"; empty where it says nothing."""
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", words(error), re.IGNORECASE)
    if found is None:
        return ""
    amount, unit = found.groups()
    return f" ({float(amount) / 2**30:.3g} GiB were asked for)" if unit == "bytes" else f" ({amount} {unit} were asked for)"


def smaller(config: RunConfig, phase: str) -> str:
    """The keys of a training recipe that ask for less in the phase that broke."""
    if phase == "eval":
        return f"evaluation.batch_size, {config.evaluation.batch_size} now"
    batch, checkpointed = config.batch, config.sampler.activation_checkpointing
    keys = [f"batch.micro_batch, {batch.micro_batch} now", f"batch.rollout_batch, {batch.rollout_batch or batch.micro_batch} now"]
    return ", ".join([*keys, *["sampler.activation_checkpointing=true"] * (not checkpointed), "model.dtype=bfloat16"])


def batches() -> str:
    """What asks for less in any job."""
    return "smaller batches (keys that end in batch_size, micro_batch or prompts_per_batch), or dtype: bfloat16 of the model"


@contextmanager
def told(keys: Callable[[], str] = batches, save: Callable[[], str] = str) -> Iterator[None]:
    """What runs out of memory within becomes a UserError. keys: those that ask for less; save: keeps what there is to keep, and says what it kept."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        why, cause = f"out of memory{asked_for(error)}", error
        while cause is not None:  # what the frames hold is given back before anything is written
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise UserError(f"{why}. These ask for less: {keys()}{save()}") from error
