"""What may stand behind a `_target_`: a class or function that fits its node's protocol (rlstitch.types), looked at before anything of it is called.

A recipe that came from somewhere else must not run what is no part: nothing of the standard library, and no callable that merely exists.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
import sys
import sysconfig
import traceback
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from rlstitch.asking import PartError, by_signal, failed, inside, one_line, sharing, show
from rlstitch.filling import nearest
from rlstitch.memory import out_of_memory
from rlstitch.ranges import Count, NotNegative, misfit
from rlstitch.types import UserError

OURS = "rlstitch."
METHODS = {  # of each kind of class: what is called on it, and with how many arguments (None: that depends)
    "reward": {"score": 2},
    "stop": {"steps": 1, "draw": 2},
    "oracle": {"__call__": 2, "total": 1},
    "algorithm": {"rollout": 2, "score": 1, "losses": None, "end_step": 1, "state": 0, "load_state": 1, "faults": 2, "backwards": 2},
    "model": {"encode_prompts": 1, "velocity": 3, "bind": 1, "encode": 1, "decode": 1},
}
CUT, WHY = list[tuple[Any, int, int]], list[tuple[str, str]]
STATIC = {  # of each kind of class: what is asked of the class itself, with how many arguments, and what that gives; beyond METHODS it need not be there
    "reward": {"unreadable": (1, str), "lacking": (2, str), "cut_prompts": (2, CUT), "faults": (1, WHY), "needs": (1, list[str])},
    "algorithm": {"faults": (2, list[str]), "backwards": (2, Count)},
    "model": {
        "cut_prompts": (2, CUT),
        "faults": (1, WHY),
        "needs": (1, list[str]),
        "lora_fault": (2, str),
        "targets_fault": (2, str),
        "image_tokens_of": (1, Count),
        "setting": (1, tuple[Count, Count, NotNegative]),
        "parameter_counts": (2, dict[str, int]),
        "distilled": (1, str),
    },
}
FLAGS = ("needs_oracle", "whole_groups", "balances", "needs_gradient", "collects", "keeps_old")
SAID = {  # of each kind of class: what it says of itself; an algorithm says all of it, others what they like, or once they are built
    "reward": {"differentiable": bool, "alone": str, "handling": tuple[str, ...]},
    "oracle": {"differentiable": bool, "sigma_range": tuple[float, float]},
    "algorithm": {"learns_from": Literal["prompts", "images", "pairs"], **dict.fromkeys(FLAGS, bool)},
    "model": {"parts": tuple[str, ...]},
}
RESULTS = {  # of each kind of function: what it returns
    "images": tuple[Tensor, list[str]],
    "captioned": tuple[Tensor, list[list[str]]],
    "pairs": tuple[Tensor, Tensor, list[str], Tensor],
    "graded": tuple[Tensor, list[str], Tensor],
    "method": Tensor,
}
PARAMETERS = {"method": ("velocity", "z", "sigmas")}
NAMES = {"model": "a backbone", "oracle": "an oracle", "algorithm": "an algorithm", "method": "a steering method", "images": "a function that gives pictures and their prompts"} | {
    "captioned": "a function that gives pictures and the captions of each", "pairs": "a function that gives preference pairs", "graded": "a function that gives graded pictures"
}  # fmt: skip

_UNSAID = object()
_USERS: dict[str, dict[str, None]] = {}  # modules of parts that are not of this project, and the `_target_`s that named them, in order


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
        with sharing(f"'_target_: {text}': {module}"):
            return _of_module(text, import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"'_target_: {text}' cannot be imported ({one_line(error)}): install its package, or put the folder that holds it on PYTHONPATH"
        ) from error
    except UserError:
        raise
    except BaseException as error:
        if by_signal(error):
            raise
        show(error)
        raise UserError(
            f"'_target_: {text}' cannot be imported, {module} fails with {one_line(error)} (RLSTITCH_TRACEBACK=1 shows where)"
        ) from error


def _of_module(text: str, found: ModuleType, name: str) -> Any:
    if name not in vars(found):
        names = [n for n, v in vars(found).items() if inspect.isclass(v) or inspect.isfunction(v)]
        raise UserError(f"'_target_: {text}': {found.__name__} has no '{name}'{nearest(name, names)}")
    part = vars(found)[name]
    if not inspect.isclass(part) and not inspect.isfunction(part):
        raise UserError(f"'_target_: {text}' is a {type(part).__name__}, neither a class nor a function that makes a part")
    _refuse_standard(text, part.__module__)
    inherited = (base.__module__ for base in getattr(part, "__mro__", ()) if not _installed(base.__module__))
    for module in (part.__module__, *inherited):
        if not ours(module):
            _USERS.setdefault(module, {})[text] = None
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
    except BaseException as error:
        frames = [(f.f_globals.get("__name__"), f.f_code.co_qualname.split(".")[0]) for f, _ in traceback.walk_tb(error.__traceback__)]
        found = next(((_USERS[module], name) for module, name in reversed(frames) if module in _USERS), None)
        if found is None or by_signal(error) or out_of_memory(error):
            raise
        targets, name = found  # of the parts of that module, the one whose own code it was
        raise failed(next((t for t in targets if t.endswith(f".{name}")), [*targets][-1]), error) from error


def code_of(part: Any) -> str:
    """A hash that names the code of a part that is not of this project, by its class and the files that it and what it inherits are written in; '' of one that is.
    What is kept for the next time is kept by it, too: it may be of the same weights and yet do something else."""
    own = dict.fromkeys(base.__module__ for base in type(part).__mro__ if not ours(base.__module__) and not _installed(base.__module__))
    files = b"".join(Path(str(sys.modules[module].__file__)).read_bytes() for module in own)
    return hashlib.sha256(type(part).__qualname__.encode() + files).hexdigest()[:16] if own else ""


def theirs() -> list[str]:
    """The `_target_`s that are not of this project, as far as they have been loaded."""
    return list(dict.fromkeys(target for targets in _USERS.values() for target in targets))


def unfit(kind: str, part: Any) -> str:
    """Why a class or function is no part of this kind (a key of METHODS or RESULTS), '' where it is one. Nothing of it is called."""
    try:
        takes(part)
        wrong = _misfit(kind, part)
        other = next((k for k in (*METHODS, *RESULTS) if k != kind and not _misfit(k, part)), None) if wrong else None
    except BaseException as error:  # of a metaclass, or of a signature that it makes up
        if by_signal(error):
            raise
        return f"cannot be looked at: {error if isinstance(error, UserError) else failed('asking for its attributes', error)}"
    if not wrong:
        return ""
    return f"is {NAMES.get(other, f'a {other}')}, not {_called(kind)}" if other else f"is not {_called(kind)}: {wrong}"


def _called(kind: str) -> str:
    return NAMES.get(kind, f"a {kind}")


def _misfit(kind: str, part: Any) -> str:
    if kind in METHODS:
        if not inspect.isclass(part):
            return f"it must be a class with {', '.join(METHODS[kind])}"
        if getattr(part, "_is_protocol", False) or inspect.isabstract(part):
            return f"it is {'a protocol' if getattr(part, '_is_protocol', False) else 'abstract'}, which says what a part must have; name a class that has it"
        methods, static = METHODS[kind], STATIC.get(kind, {})
        lacking = [name for name in methods if name not in static and not _takes(part, name, methods[name])]
        lacking += [name for name in static if name in methods and not hasattr(part, name)]
        lacking += [name for name in SAID.get(kind, {}) if kind == "algorithm" and not hasattr(part, name)]
        if lacking:
            return f"it has no {', no '.join(f'{n}({_arguments(methods[n])})' if n in methods else n for n in lacking)}"
        found = {name: said(part, name, _UNSAID) for name in SAID.get(kind, {})}
        odd = [f"its {n} {fault}" for n, v in found.items() if v is not _UNSAID and (fault := misfit(v, SAID[kind][n]))]
        odd += [
            f"its {n} must be known before it is built, not by a property" for n, v in found.items() if v is _UNSAID and kind == "algorithm"
        ]
        odd += [
            f"its {name} must be a static method with {_arguments(n)}" for name, (n, _) in static.items() if not _asked_with(part, name, n)
        ]
        return ", and ".join(odd)
    if not inspect.isfunction(part):
        return "it must be a function"
    if missing := [name for name in PARAMETERS.get(kind, ()) if name not in takes(part)]:
        return f"it does not take {', '.join(missing)}"
    returns = hints(part).get("return")
    if returns == RESULTS[kind]:
        return ""
    told = str(RESULTS[kind]).replace("torch.", "").replace("<class '", "").replace("'>", "")
    if ours(part.__module__) or _installed(part.__module__):
        return f"it must return {told}"
    loose = (
        returns is None
        or returns in (tuple, Any)
        or (typing.get_origin(returns) or returns) is (typing.get_origin(RESULTS[kind]) or RESULTS[kind])
    )
    return "" if loose else f"it returns {returns}, not {told}"


def _arguments(count: int | None) -> str:
    return {None: "...", 0: "", 1: "one argument"}.get(count, f"{count} arguments")


def said(cls: type, name: str, default: Any) -> Any:
    """What a class says of itself before it is built; `default` where it says nothing yet, as with a property."""
    value = getattr(cls, name, default)
    return default if inspect.isdatadescriptor(value) or isinstance(value, cached_property) else value


def asked(kind: str, cls: Any, name: str, *arguments: Any, default: Any = None) -> Any:
    """What a class of this kind, which fits it, gives where it is asked by a name in STATIC; `default` where it has no such method. A user's is given copies, and
    what it gives must be as STATIC says: PartError otherwise."""
    if not hasattr(cls, name):
        return default
    if ours(cls.__module__):
        return getattr(cls, name)(*arguments)
    part = f"{cls.__module__}.{cls.__qualname__}.{name}"
    with inside(part):
        given = getattr(cls, name)(*copy.deepcopy(arguments))
        if wrong := misfit(given, STATIC[kind][name][1]):
            raise PartError(f"{part} gave something that {wrong}")
    return given


def _asked_with(cls: type, name: str, count: int) -> bool:
    """Whether a class, if it has the method at all, can be asked by it, with so many arguments, without being built."""
    method = getattr(cls, name, _UNSAID)
    if method is _UNSAID:
        return True
    try:
        inspect.signature(method).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def _takes(cls: type, name: str, count: int | None) -> bool:
    """Whether instances have a method that can be called with that many arguments."""
    bases = (base for base in cls.__mro__ if not getattr(base, "_is_protocol", False))  # whose methods are empty
    raw = next((vars(base)[name] for base in bases if name in vars(base)), None)
    function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
    if not callable(function) or count is None:
        return callable(function)
    try:
        inspect.signature(function).bind(*[None] * (count + (not isinstance(raw, staticmethod))))
    except (TypeError, ValueError):
        return False
    return True


def takes(part: Any) -> Mapping[str, inspect.Parameter]:
    """What a class or function takes. Raises UserError where it cannot be asked that."""
    try:
        return inspect.signature(part).parameters
    except BaseException as error:
        if by_signal(error):
            raise
        raise UserError(f"it cannot be asked what it takes ({one_line(error)})") from error


def hints(part: Any) -> dict[str, Any]:
    """Annotations of a function, or of what builds a class, with their ranges; none where they cannot be read."""
    try:
        return typing.get_type_hints(part.__init__ if inspect.isclass(part) else part, include_extras=True)
    except Exception:  # an annotation is code of the user's, and may name what is not there
        return {}


def _installed(module: str) -> bool:
    """Whether a module is of an installed package, or of Python, rather than a user's own."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or _among_packages(file)


@cache
def _among_packages(file: str) -> bool:
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    return any(folder in Path(file).resolve().parents for folder in folders)
