"""What may stand behind a `_target_`: a class or function that fits its node's protocol (rlstitch.types), looked at before anything of it is called.

A recipe that came from somewhere else must not run what is no part: nothing of the standard library, and no callable that merely exists.
"""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
import traceback
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from rlstitch.asking import failed, one_line, out_of_memory
from rlstitch.filling import nearest
from rlstitch.types import UserError

OURS = "rlstitch."
METHODS = {  # of each kind of class: what is called on it, and with how many arguments (None: that depends)
    "reward": {"score": 2},
    "stop": {"steps": 1, "draw": 2},
    "oracle": {"__call__": 2, "total": 1},
    "algorithm": {"rollout": 2, "score": 1, "losses": None, "end_step": 1, "state": 0, "load_state": 1, "faults": 2, "backwards": 2},
    "model": {"encode_prompts": 1, "velocity": 3, "bind": 1, "encode": 1, "decode": 1},
}
FLAGS = {"algorithm": ("learns_from", "needs_oracle", "whole_groups", "balances", "needs_gradient", "collects", "keeps_old")}
RESULTS = {  # of each kind of function: what it returns
    "images": tuple[Tensor, list[str]],
    "pairs": tuple[Tensor, Tensor, list[str], Tensor],
    "graded": tuple[Tensor, list[str], Tensor],
    "method": Tensor,
}
PARAMETERS = {"method": ("velocity", "z", "sigmas")}
NAMES = {"model": "a backbone", "oracle": "an oracle", "algorithm": "an algorithm", "method": "a steering method", "images": "a function that gives pictures and their prompts"} | {
    "pairs": "a function that gives preference pairs", "graded": "a function that gives graded pictures"
}  # fmt: skip

_USERS: dict[str, str] = {}  # modules of parts that are not of this project, and the `_target_` that named them


def ours(target: Any) -> bool:
    """Whether a `_target_` is of this project; what is not may be a user's, and is not built to check a recipe."""
    return str(target).startswith(OURS)


def load_class(target: Any) -> Any:
    """The class or function at a dotted path. Raises UserError where it is no such path, cannot be imported, or is of the standard library, which is not imported for it."""
    text = target if isinstance(target, str) else repr(target)
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text):
        raise UserError(f"'_target_: {text[:80]}' is not a dotted path such as rlstitch.oracles.Stitched")
    module, _, name = text.rpartition(".")
    _refuse_standard(text, module)
    try:
        found = import_module(module)
    except ImportError as error:
        raise UserError(
            f"'_target_: {text}' cannot be imported ({one_line(error)}): install its package, or put the folder that holds it on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"'_target_: {text}' cannot be imported, {module} fails with {one_line(error)} (RLSTITCH_TRACEBACK=1 shows where)"
        ) from error
    if name not in vars(found):
        names = [n for n, v in vars(found).items() if inspect.isclass(v) or inspect.isfunction(v)]
        raise UserError(f"'_target_: {text}': {module} has no '{name}'{nearest(name, names)}")
    part = vars(found)[name]
    if not inspect.isclass(part) and not inspect.isfunction(part):
        raise UserError(f"'_target_: {text}' is a {type(part).__name__}, neither a class nor a function that makes a part")
    _refuse_standard(text, part.__module__)
    if not ours(part.__module__):
        _USERS[part.__module__] = text
    return part


def look_in(folder: Path) -> None:
    """Have the user's own modules in a folder found, behind all others."""
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def _refuse_standard(target: str, module: str | None) -> None:
    if str(module).split(".")[0] in sys.stdlib_module_names:
        raise UserError(f"'_target_: {target}' is of Python's standard library, which has no part of a recipe")


@contextmanager
def naming() -> Iterator[None]:
    """An exception that came through code of a part that is not of this project becomes a PartError that names it; our own mistakes keep their traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
        part = next((_USERS[module] for module in reversed(frames) if module in _USERS), None)
        if part is None or out_of_memory(error):
            raise
        raise failed(part, error) from error


def unfit(kind: str, part: Any) -> str:
    """Why a class or function is no part of this kind (a key of METHODS or RESULTS), '' where it is one. Nothing of it is called."""
    wrong = _misfit(kind, part)
    if not wrong:
        return ""
    other = next((k for k in (*METHODS, *RESULTS) if k != kind and not _misfit(k, part)), None)
    return f"is {NAMES.get(other, f'a {other}')}, not {_called(kind)}" if other else f"is not {_called(kind)}: {wrong}"


def _called(kind: str) -> str:
    return NAMES.get(kind, f"a {kind}")


def _misfit(kind: str, part: Any) -> str:
    if kind in METHODS:
        if not inspect.isclass(part):
            return f"it must be a class with {', '.join(METHODS[kind])}"
        methods = METHODS[kind]
        lacking = [name for name in methods if not _takes(part, name, methods[name])]
        lacking += [name for name in FLAGS.get(kind, ()) if not hasattr(part, name)]
        return f"it has no {', no '.join(f'{n}({_arguments(methods[n])})' if n in methods else n for n in lacking)}" if lacking else ""
    if not inspect.isfunction(part):
        return "it must be a function"
    takes = inspect.signature(part).parameters
    if missing := [name for name in PARAMETERS.get(kind, ()) if name not in takes]:
        return f"it does not take {', '.join(missing)}"
    returns = hints(part).get("return")
    if returns == RESULTS[kind]:
        return ""
    told = str(RESULTS[kind]).replace("torch.", "").replace("<class '", "").replace("'>", "")
    if ours(part.__module__) or _installed(part):
        return f"it must return {told}"
    loose = (
        returns is None
        or returns in (tuple, Any)
        or (typing.get_origin(returns) or returns) is (typing.get_origin(RESULTS[kind]) or RESULTS[kind])
    )
    return "" if loose else f"it returns {returns}, not {told}"


def _arguments(count: int | None) -> str:
    return {None: "...", 0: "", 1: "one argument"}.get(count, f"{count} arguments")


def _takes(cls: type, name: str, count: int | None) -> bool:
    """Whether instances have a method that can be called with that many arguments."""
    raw = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
    if not callable(function) or count is None:
        return callable(function)
    try:
        inspect.signature(function).bind(*[None] * (count + (not isinstance(raw, staticmethod))))
    except (TypeError, ValueError):
        return False
    return True


def hints(part: Any) -> dict[str, Any]:
    """Annotations of a function, or of what builds a class, with their ranges; none where they cannot be read."""
    try:
        return typing.get_type_hints(part.__init__ if inspect.isclass(part) else part, include_extras=True)
    except Exception:  # an annotation is code of the user's, and may name what is not there
        return {}


def _installed(function: Any) -> bool:
    """Whether a function is of an installed package rather than a user's own module."""
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    return file is None or any(folder in Path(file).resolve().parents for folder in folders)
