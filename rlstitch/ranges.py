"""Ranges stand beside what they bound: `lr: Positive = 5e-5` in a recipe's schema, `beta: Positive = 1.0` among the arguments of a class that a recipe names.

A hint may say `Annotated[float, Range(0, 1)]`, or one of the names below for it; every number without a range of its own is finite and below LARGE.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections import abc
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

LARGE = 1e15  # beyond it, squares leave float32
MANY = 1_000_000
LONGEST = 4096  # characters of a text; a path is no longer


@dataclass(frozen=True)
class Range:
    """low <= value <= high; an `open` end does not belong to it. why: what is told beside the fault."""

    low: float = -LARGE
    high: float = LARGE
    open: Literal["", "low", "high", "both"] = ""
    why: str = ""

    def fault(self, value: float) -> str:
        """'' for a number in the range, else what it must be."""
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        if above and below:
            return ""
        if value != value or abs(value) == float("inf"):
            said = "must be a finite number"
        elif self.high <= 1:
            left, right = ("(" if self.open in ("low", "both") else "["), (")" if self.open in ("high", "both") else "]")
            said = f"must be in {left}{self.low:g}, {self.high:g}{right}"
        elif above:
            said = f"must be at most {self.high:.16g}"
        elif self.low == 0:
            said = "must be positive" if self.open else "must not be negative"
        else:
            said = "must be positive" if self.low == 1 and isinstance(value, int) else f"must be at least {self.low:.16g}"
        return f"{said}, not {shown(value)}" + f": {self.why}" * bool(self.why)


@dataclass(frozen=True)
class NotEmpty:
    """A text or a list that holds something."""

    def fault(self, value: Any) -> str:
        return "" if (value.strip() if isinstance(value, str) else value) else f"must not be empty, not {shown(value)}"


@dataclass(frozen=True)
class FolderName:
    """One or more plain parts of a path, each of which is a folder below the one that the results go to; '' is given the recipe's name."""

    def fault(self, value: str) -> str:
        parts = value.split("/")
        wrong = (
            "begins with / or has an empty part" if value and not all(parts)
            else "leads out of the folder" if {".", ".."} & set(parts)
            else "holds control characters" if not value.isprintable()
            else "has a part of more than 150 bytes" if any(len(part.encode(errors="replace")) > 150 for part in parts)
            else "has a part that begins or ends with a space, or ends with a dot" if any(part != part.strip() or part.endswith(".") for part in parts)
            else "holds a backslash" if "\\" in value
            else "begins with ~ or -" if value.startswith(("~", "-"))
            else ""
        )  # fmt: skip
        return wrong and f"names a folder below 'out' by plain parts such as tries/first; {shown(value)} {wrong}"


@dataclass(frozen=True)
class Device:
    """A device as torch names it."""

    def fault(self, value: str) -> str:
        fits = re.fullmatch(r"(cpu|cuda|mps|xpu|npu|hpu)(:[0-9]{1,3})?", value)
        return "" if fits else f"must be a device such as cpu or cuda:1, not {shown(value)}"


Count = Annotated[int, Range(1, MANY)]
CountOrNone = Annotated[int, Range(0, MANY)]
GridSteps = Annotated[int, Range(1, 10_000)]
Threads = Annotated[int, Range(0, 4096)]
Seed = Annotated[int, Range(0, 2**40)]
Positive = Annotated[float, Range(0, open="low")]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Shift = Annotated[float, Range(0, 1000, open="low")]
AutoShift = Shift | Literal["auto"]  # `auto`: what the scheduler of the model's directory says
Guidance = Annotated[float, Range(0, 1000)]
Rate = Annotated[float, Range(0, 100, open="low")]
Decay = Annotated[float, Range(0, 1000)]
Particles = Annotated[int, Range(1, 4096)]
StepIndex = Annotated[int, Range(0, 10_000)]
Side = Annotated[int, Range(1, 16_384)]
Dtype = Literal["float32", "bfloat16", "float16"]
Spacing = Literal["plain", "diffusers", "auto"]
Text = Annotated[str, NotEmpty()]
Name = Annotated[str, FolderName()]
DeviceName = Annotated[str, Device()]
Weights = Annotated[abc.Mapping[str, float], NotEmpty()]


def shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = " ".join(line.strip() for line in repr(value).splitlines())
    return text if len(text) <= 80 else text[:77] + "..."


_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_LISTS = (list, tuple, abc.Sequence, abc.Collection, abc.Container, abc.Iterable)


def misfit(value: Any, hint: Any) -> str:
    """'' where a value fits a type hint with its ranges, else what it must be, and what it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [b for b in arguments[1:] if hasattr(b, "fault")]
        number = any(isinstance(b, Range) for b in bounds)
        told = _plain(value, arguments[0]) if number else misfit(value, arguments[0])
        return told or next((fault for b in bounds if (fault := b.fault(value))), "")
    if origin in (Union, types.UnionType):
        told = {h: misfit(value, h) for h in arguments}
        if not all(told.values()):
            return ""
        near = [t for h, t in told.items() if _base(h) and isinstance(value, _base(h)) and not isinstance(value, bool)]
        return near[0] if near else f"must be {' or '.join(map(said, arguments))}, not {shown(value)}"
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
        return "" if fits else f"must be {said(hint)}, not {shown(value)}"
    kind = origin or hint
    if kind in _MAPPINGS:
        if not isinstance(value, dict):
            return f"must be a group of keys, not {shown(value)}"
        entries = [(f"has the entry '{k}', which ", v, arguments[1]) for k, v in value.items()] if arguments else []
    elif kind in _LISTS:
        if not isinstance(value, list | tuple):
            return f"must be a list, not {shown(value)}"
        if kind is tuple and ... not in arguments and arguments and len(value) != len(arguments):
            return f"must be a list of {len(arguments)}, not {shown(value)}"
        each = arguments if kind is tuple and ... not in arguments else arguments[:1] * len(value)
        entries = [(f"has the entry {k}, which ", v, inner) for k, (v, inner) in enumerate(zip(value, each), 1)]
    else:
        return _plain(value, hint) or (Range().fault(value) if hint in (int, float) else "")
    return next((f"{at}{fault}" for at, entry, inner in entries if (fault := misfit(entry, inner))), "")


def _base(hint: Any) -> Any:
    """The types of values that a hint is about, for `isinstance`; () where that is not plain."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return {float: (int, float), int: (int,), str: (str,)}.get(hint, ())


def _plain(value: Any, hint: Any) -> str:
    """The fault of a value's type alone."""
    if hint in (Any, inspect.Parameter.empty):
        return ""
    if hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif hint in (None, type(None)):
        fits = value is None
    elif hint is str and isinstance(value, str):
        if len(value) > LONGEST:
            return f"must be at most {LONGEST} characters, not {len(value)}"
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            return f"must be text that can stand in a file, not {shown(value)}"
        return ""
    elif hint in (str, bool, bytes):
        fits = isinstance(value, hint)
    else:
        return ""
    return "" if fits else f"must be {said(hint)}, not {shown(value)}"


def said(hint: Any) -> str:
    """A type hint as a person would say it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if typing.get_origin(hint) is Annotated:
        return said(arguments[0])
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null", None: "null"}
    return names.get(hint) or getattr(hint, "__name__", str(hint))


def fitted(value: Any, hint: Any) -> Any:
    """A value in the type that its hint means where YAML's differs without loss: 64 for a float, 7 for text. Anything else stays, for `misfit` to tell."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fitted(value, arguments[0])
    if isinstance(value, int) and not isinstance(value, bool) and hint in (float, str) and abs(value) < 2**53:
        return hint(value)
    if isinstance(value, list) and arguments and origin not in (Union, types.UnionType, Literal):
        return [fitted(entry, arguments[0]) for entry in value]
    return value
