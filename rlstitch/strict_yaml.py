"""YAML as its version 1.2 means it, and no more of it than a recipe needs: `off` is a word, 1e-4 a number, 010 and 2026-01-01 are text; no tags, no key twice.

Every fault is a ValueError that says where. PyYAML's own loader reads version 1.1, under which `no` is false, 1e-4 is text, 010 is 8 and 1:30 is 90.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LARGEST, DEEPEST = 100_000, 40  # values in a file, with what its aliases repeat; mappings and lists inside each other


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise ValueError(
                    f"line {key.start_mark.line + 1}: a key must be text{f', not {key.value}: put it in quotes' if isinstance(key.value, str) else ', no list and no mapping'}"
                )
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key '{key.value}' is there twice; take one out")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


_Loader.add_constructor("tag:yaml.org,2002:bool", lambda loader, node: node.value.lower() == "true")
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float", lambda loader, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
)


def load(text: str) -> Any:
    """The value that a text holds: dicts with text keys, lists, text, numbers, true, false, null."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"its brackets stand in each other more than {DEEPEST} deep") from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{error.problem}{_hint(error)}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    _measure(value, [LARGEST], 0)
    return value


def _hint(error: yaml.MarkedYAMLError) -> str:
    told = error.problem or ""
    if "constructor" in told:
        return "; a recipe holds text, numbers, lists and keys, and no tags with !"
    return "; indent with spaces" if "'\\t'" in told else ""


def _measure(value: Any, left: list[int], depth: int) -> None:
    """Refuse what a few lines of aliases can blow up, and what leads back into itself."""
    left[0] -= 1
    if left[0] < 0 or depth > DEEPEST:
        raise ValueError(f"it holds more than {LARGEST} values, or is nested more than {DEEPEST} deep")
    if isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            _measure(entry, left, depth + 1)
