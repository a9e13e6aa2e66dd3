"""A recipe's values put into a typed dataclass, each held against its hint and range (rlstitch.ranges), every fault found at once."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

from rlstitch.ranges import LONGEST, fitted, misfit, shown

T = TypeVar("T")
hints_of = cache(lambda schema: typing.get_type_hints(schema, include_extras=True))


def nearest(word: str, among: Iterable[str]) -> str:
    """' (did you mean X?)' or the list of what there is."""
    among = sorted(among)
    close = difflib.get_close_matches(word, among, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else f" (there are: {', '.join(among)})" if among else ""


def fill(schema: type[T], given: dict[str, Any]) -> tuple[T, list[str]]:
    """A dataclass filled from a recipe, and every key, type and number that did not fit; what does not fit is left at its default."""
    faults: list[str] = []
    return _filled(schema(), substituted(given, schema(), faults), "", faults), faults


def _filled(default: T, given: dict[str, Any], prefix: str, faults: list[str]) -> T:
    hints, values = hints_of(type(default)), {}
    for key, value in given.items():
        path = f"{prefix}{key}"
        if key not in hints:
            faults.append(f"unknown key '{path}'{nearest(str(key), hints)}")
            continue
        hint, entry = hints[key], next(iter(typing.get_args(hints[key])), None)
        if is_dataclass(hint):
            if isinstance(value, dict):
                values[key] = _filled(getattr(default, key), value, path + ".", faults)
            else:
                faults.append(f"'{path}' must be a group of keys, not {shown(value)}")
        elif is_dataclass(entry) and isinstance(entry, type) and isinstance(value, list):
            values[key] = [_entry(entry, item, f"'{path}', entry {k}: ", faults) for k, item in enumerate(value, 1)]
        elif value is None and typing.get_origin(hint) is dict:
            values[key] = {}  # a part or a table taken out
        elif fault := misfit(value, hint):
            faults.append(f"'{path}' {fault}")
        else:
            values[key] = fitted(value, hint)
    return replace(default, **values)


def _entry(schema: type[T], given: Any, where: str, faults: list[str]) -> T:
    """An entry of a list of groups."""
    wrong: list[str] = []
    if not isinstance(given, dict):
        wrong.append(f"must be a group of keys, not {shown(given)}")
    filled = _filled(schema(), given if isinstance(given, dict) else {}, "", wrong)
    faults += [where + fault for fault in wrong]
    return filled


# ---------------------------------------------------------------------------------------------------- ${key}


def substituted(given: dict[str, Any], defaults: Any, faults: list[str]) -> dict[str, Any]:
    """A recipe with `${key}` replaced by that key's value, as given or by default. Nothing of the environment or of files is ever put in: it would be saved
    with the recipe. What cannot be replaced is a fault, and left out."""
    return _Substituted(given, asdict(defaults), faults).tree(given, "")


class _Substituted:
    def __init__(self, given: dict[str, Any], defaults: dict[str, Any], faults: list[str]):
        self.given, self.defaults, self.faults = given, defaults, faults
        self.known: dict[str, Any] = {}

    def tree(self, node: Any, path: str) -> Any:
        if isinstance(node, dict):
            return {k: v for k, entry in node.items() if (v := self.tree(entry, f"{path}.{k}".lstrip("."))) is not _Left}
        if isinstance(node, list):
            return [v for k, entry in enumerate(node) if (v := self.tree(entry, f"{path}.{k}")) is not _Left]
        if not isinstance(node, str) or "${" not in node:
            return node
        try:
            return self.text(node, (path,))
        except ValueError as error:
            self.faults.append(f"'{path}' {error}")
            return _Left

    def text(self, text: str, above: tuple[str, ...]) -> Any:
        if ":" in "".join(re.findall(r"\$\{[^}]*", text)):
            raise ValueError(
                f"is {shown(text)}: a recipe is saved and shown as it was run, so nothing is read into it from the environment or from elsewhere; write the value, or have the shell put it into an override"
            )
        if whole := re.fullmatch(r"\$\{([\w.]+)\}", text):
            return self.value(whole[1], above)
        told = re.sub(r"\$\{([\w.]+)\}", lambda m: str(self.value(m[1], above)), text)
        if "${" in told or len(told) > LONGEST:
            raise ValueError(
                f"is {shown(text)}: write ${{key}} with a key of this recipe, e.g. ${{sampler.shift}}, and no more than {LONGEST} characters"
            )
        return told

    def value(self, key: str, above: tuple[str, ...]) -> Any:
        """The value that a dotted key has in this recipe, else by default."""
        if key in self.known:
            return self.known[key]
        if key in above or len(above) > 20:
            raise ValueError(f"leads back to itself: {' -> '.join((*above, key)[:6])}")
        for root in (self.given, self.defaults):
            node: Any = root
            for part in key.split("."):
                node = node.get(part, _Left) if isinstance(node, dict) else _Left
            if node is not _Left:
                break
        if node is _Left or isinstance(node, dict | list):
            raise ValueError(f"names ${{{key}}}, which is no single value of this recipe")
        self.known[key] = self.text(node, (*above, key)) if isinstance(node, str) and "${" in node else node
        return self.known[key]


class _Left:
    """Stands for a value that is left out."""
