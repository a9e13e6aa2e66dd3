"""The shift of a model's noise levels, as the scheduler file of its own directory says it (diffusers' FlowMatchEulerDiscreteScheduler)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlstitch import protocols
from rlstitch.files import read_json
from rlstitch.hub import model_folder
from rlstitch.schedule import Shift
from rlstitch.telling import say
from rlstitch.types import UserError

AUTO = "auto"
FILE = Path("scheduler") / "scheduler_config.json"
# What a file of an older diffusers leaves out means what it means there.
DEFAULTS = {
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "shift_terminal": None, "time_shift_type": "exponential", "invert_sigmas": False, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip
BARE = {"_class_name": "FlowMatchEulerDiscreteScheduler"}  # settings that leave all out
OTHER_GRIDS = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")
_told: set[str] = set()


def of_file(settings: dict[str, Any], tokens: int | None) -> Shift:
    """The shift that a scheduler's settings ask for at `tokens` image tokens of the transformer (None: not known). Raises UserError for what is not sampled here.

    With dynamic shifting mu runs linearly from base_shift to max_shift over the image tokens (arXiv:2403.03206, section 5.3.2); the factor is e^mu
    (`exponential`) or mu itself (`linear`).
    """
    name = settings.get("_class_name")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise UserError(f"is a {name}, not a FlowMatchEulerDiscreteScheduler")
    said = DEFAULTS | settings
    if odd := [key for key in OTHER_GRIDS if said[key]]:
        raise UserError(f"asks for {' and '.join(odd)}, which is not sampled here")
    if said["num_train_timesteps"] != 1000:
        raise UserError(f"has num_train_timesteps {said['num_train_timesteps']}, and 1000 is what is sampled here")
    for key in ("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift_terminal"):
        if said[key] is not None and not _number(said[key]):
            raise UserError(f"has {key} {said[key]!r}, which is no number")
    terminal = said["shift_terminal"] or None
    if terminal is not None and not 0 < terminal < 1:
        raise UserError(f"has shift_terminal {terminal}, which lies outside (0, 1)")
    if not said["use_dynamic_shifting"]:
        factor = said["shift"]
    elif said["time_shift_type"] not in ("exponential", "linear"):
        raise UserError(f"has time_shift_type {said['time_shift_type']!r}, which is neither exponential nor linear")
    elif tokens is None:
        raise UserError("shifts by the picture's size, which this backbone does not tell before it is loaded")
    elif said["max_image_seq_len"] == said["base_image_seq_len"]:
        raise UserError(f"has max_image_seq_len and base_image_seq_len both {said['max_image_seq_len']}")
    else:
        slope = (said["max_shift"] - said["base_shift"]) / (said["max_image_seq_len"] - said["base_image_seq_len"])
        mu = said["base_shift"] + slope * (tokens - said["base_image_seq_len"])
        factor = exponential(mu) if said["time_shift_type"] == "exponential" else mu
    if not factor > 0:
        raise UserError(f"comes to a shift of {factor}, which is not positive")
    return Shift(float(factor), dynamic=bool(said["use_dynamic_shifting"]), terminal=terminal)


MOST = 50.0  # mu of a dynamic shift; e^50 leaves no level but 1


def exponential(mu: float) -> float:
    """e^mu. Raises UserError where that is no shift to sample with."""
    if abs(mu) > MOST:
        raise UserError(f"comes to a shift of e^{mu:.4g} at this size")
    return math.exp(mu)


def resolve(where: str, stated: float | str, backbone: Any) -> Shift:
    """The shift that a key `where` states for a backbone that is loaded."""
    return of_directory(where, stated, backbone.path, backbone.image_tokens, getattr(backbone, "shift_of", None))


def of_recipe(where: str, stated: Any, model: dict[str, Any], faults: list[str]) -> Shift | None:
    """The shift that a recipe's key `where` states for its `model`, before anything loads; None where it cannot be told, which is one more of `faults` unless the
    model is what is wrong."""
    if any(f.startswith(("'model", "unknown key 'model")) for f in faults):
        return None if stated == AUTO else Shift(float(stated))
    try:
        path = model_folder(model.get("path", ""))
        backbone = protocols.load_class(model["_target_"])
        count = protocols.asked("model", backbone, "image_tokens_of", model)
        return of_directory(where, stated, path, count, getattr(backbone, "shift_of", None))
    except (UserError, KeyError) as error:
        faults.append(str(error))
        return None


def of_directory(
    where: str,
    stated: float | str,
    model: str | Path,
    tokens: int | None,
    law: Callable[[Any, dict[str, Any], int | None], Shift] | None = None,
) -> Shift:
    """The shift that a key `where` states: `auto` is that of the model's own scheduler, a number stands as it is (where the file says another one, that is told once).

    law: (model, settings, tokens) -> Shift, where a backbone reads its scheduler otherwise than `of_file`. Raises UserError for anything else, and where `auto` finds no file or one that asks for another kind of grid.
    """
    if stated == AUTO:
        path = Path(model) / FILE
        own = "give a number, e.g. 3.0 (SD3's), or put the model's scheduler file there"
        if not path.is_file():
            raise UserError(f"'{where}' is auto, and {model} has no {FILE}: {own}")
        try:
            settings = read_json(path, "the model's scheduler")
            return of_file(settings, tokens) if law is None else law(model, settings, tokens)
        except UserError as error:
            raise UserError(f"'{where}' is auto, and {path} {error}: {own}") from error
    if not _number(stated) or not stated > 0:
        raise UserError(f"'{where}' must be auto (the model's own scheduler) or a positive number, not {stated!r}")
    stands = Shift(float(stated))
    try:
        own_shift = of_directory(where, AUTO, model, tokens, law)
        stands = replace(stands, spacing=own_shift.spacing)
    except UserError:  # there is nothing to differ from; how a pipeline spaces its steps does not stand in its scheduler's file
        return stands if law is None else replace(stands, spacing=law(model, BARE, tokens or 1).spacing)
    if (
        own_shift != stands
        and (line := f"{where} is {stated:g}; the model's own scheduler ({model}) says {own_shift}. {where}=auto takes that") not in _told
    ):
        _told.add(line)
        if os.environ.get("RANK", "0") == "0":
            say(line)
    return stands


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
