"""The key reference that `keys=true` prints: every key of a launcher's recipe with its default, its range and what it means, from the schema itself."""

from __future__ import annotations

import inspect
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from rlstitch import protocols
from rlstitch.config import INJECTED, load_class
from rlstitch.types import UserError


def reference(schema: type, given: dict[str, Any]) -> str:
    """Keys of a schema by group, each group with its docstring, then what the parts of a recipe take."""
    lines = _group(schema, "") + ["", "parts, which take what their class or function takes:"]
    for where, node in _parts(given, ""):
        lines += ["", f"{where}: {node['_target_']}", *_arguments(node["_target_"], f"{where}.")]
    if not given:
        lines.append("  name a recipe beside keys=true, and its parts are listed here")
    return "\n".join(lines)


def _group(schema: type, prefix: str) -> list[str]:
    hints, own, groups = typing.get_type_hints(schema, include_extras=True), [], []
    for f in fields(schema):
        inner = next((t for t in (hints[f.name], *typing.get_args(hints[f.name])) if isinstance(t, type) and is_dataclass(t)), None)
        if inner is None:
            own.append(f"  {prefix}{f.name} = {_default(f)}{told(hints[f.name])}")
        else:
            groups += ["", *_group(inner, f"{prefix}{f.name}" + (".N." if f.default_factory is list else "."))]
    return [*_doc(schema), *own, *groups]


def _doc(thing: Any) -> list[str]:
    """A docstring's lines; what dataclass writes by itself is none."""
    text = inspect.getdoc(thing) or ""
    return [] if text.startswith(f"{getattr(thing, '__name__', '')}(") else [f"# {line}" for line in text.splitlines() if line]


def _default(f: Field) -> str:
    if f.default is not MISSING:
        return repr(f.default)
    return repr(f.default_factory()) if f.default_factory is not MISSING else "(needed)"


def told(hint: Any) -> str:
    """A type with its range, as a person would say it: '   a number, 0 to 1'."""
    extras = getattr(hint, "__metadata__", ())
    plain = typing.get_args(hint)[0] if extras else hint
    origin = typing.get_origin(plain)
    if origin is typing.Literal:
        name = " | ".join(map(str, typing.get_args(plain)))
    elif origin is typing.Union or type(plain).__name__ == "UnionType":
        name = " | ".join("null" if t is type(None) else told(t).strip() for t in typing.get_args(plain))
    else:
        name = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}.get(plain, "")
    ends = [end for extra in extras if hasattr(extra, "low") for end in (extra.low, extra.high)]
    low, high = ("" if abs(end) >= 1e15 else f"{end:g}" for end in ends) if ends else ("", "")
    bounds = f"{low} to {high}" if low and high else f"{low} or more" if low else f"{high} or less" if high else ""
    said = ", ".join(filter(None, (name, bounds)))
    return f"   {said}" if said else ""


def _parts(given: Any, where: str) -> typing.Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(given, dict):
        if "_target_" in given:
            yield where, given
        for key, value in given.items():
            yield from _parts(value, f"{where}.{key}".lstrip("."))


def _arguments(target: str, prefix: str) -> list[str]:
    try:
        part = load_class(target)
        takes = protocols.takes(part)
    except UserError as error:
        return [f"  {error}"]
    hints = protocols.hints(part)
    own = {n: p for n, p in takes.items() if n not in INJECTED}
    lines = [f"  {prefix}{n}{' (needed)' if p.default is p.empty else f' = {p.default!r}'}{told(hints.get(n))}" for n, p in own.items()]
    return _doc(part) + lines
