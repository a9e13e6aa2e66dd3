"""Recipes: YAML composed from pieces, a typed schema, overrides, and every fault found at once.

Parts that vary (model, rewards, algorithm, oracle, stop) name their class by dotted path (`_target_`), so there is no registry to keep.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlstitch import holding, protocols, strict_yaml
from rlstitch.asking import PartError, inside
from rlstitch.filling import fill, nearest
from rlstitch.paths import below, home, what_is
from rlstitch.protocols import load_class
from rlstitch.ranges import Name, Weights, misfit, shown
from rlstitch.schema import RunConfig
from rlstitch.types import UserError

HERE = Path(__file__).parent
RECIPES = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes"  # of an installed package, or of a checkout
LARGEST = 1 << 20  # bytes of a recipe

INJECTED = (  # given by the job, not by the recipe
    *("self", "backbone", "rewards", "values", "policy", "images_per_prompt"),
    *("velocity", "value", "z", "sigmas", "kernel", "generator", "trace"),
)


# ---------------------------------------------------------------------------------------------------- reading


def find_recipe(name: str, folder: Path | None = None, only: Callable[[], Iterable[str]] = list) -> Path:
    """A recipe by name under recipes/, or by path. `only` gives the names to list where there is none such, by default all; it is not asked before."""
    folder = folder or RECIPES
    for path in (folder / f"{name}.yaml", Path(os.path.expanduser(name))):
        if os.path.isfile(path):
            return path
    if there := what_is(os.path.expanduser(name)):
        inside = os.path.join(name, "recipe.yaml")
        raise UserError(f"recipe {shown(name)} is {there}, not a recipe file" + f": a run's is {inside}" * os.path.isfile(inside))
    names = list(only()) or [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
    names.sort(key=lambda n: -difflib.SequenceMatcher(None, name, n).ratio())
    raise UserError(f"no recipe {shown(name)} (did you mean '{names[0]}'?), and no file of that name; there are: {', '.join(names)}")


def top_keys(path: Path) -> set[str]:
    """Keys that a recipe and the pieces it uses give, read without anything being imported."""
    content = _read(path)
    return set(content).union(*(top_keys(find_recipe(piece)) for piece in content.get("use") or []))


class Some(dict[str, Any]):
    """Keys given one by one, by dotted paths: they join what is there. A plain dict was given whole."""


def _read(path: Path) -> Some:
    """A recipe file; its keys with dots (`oracle.weights.hps: 0.5`) go deeper, as overrides do."""
    try:
        size = path.stat().st_size
        content = strict_yaml.load(path.read_text(encoding="utf-8-sig")) if size <= LARGEST else {}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if size > LARGEST:
        raise UserError(f"{path} has {size} bytes: it is no recipe")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values, not {type(content).__name__}")
    return merge(
        Some((k, v) for k, v in content.items() if "." not in k), _nested([(k, v) for k, v in content.items() if "." in k], str(path))
    )


def compose(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The recipe merged over the pieces it names under `use`, in order."""
    return merge({}, _composed(name, folder))


def _composed(name: str, folder: Path | None, above: tuple[Path, ...] = ()) -> Some:
    """`above` are the recipes that this one is a piece of."""
    try:
        path = find_recipe(name, folder).resolve()
    except UserError as error:
        raise UserError(f"'use' in {above[-1]}: {error}" if above else str(error)) from error
    if path in above:
        raise UserError(f"recipes use each other in a circle: {' -> '.join(p.stem for p in (*above, path))}. Take one `use` out")
    content, merged = _read(path), Some()
    pieces = content.pop("use", None) or []
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise UserError(f"'use' in {path} must list recipes, e.g. use: [draft], not {pieces!r}")
    for piece in pieces:
        merged = merge(merged, _composed(piece, folder, (*above, path)))
    return merge(merged, content)


def model_named(name: str) -> dict[str, Any]:
    """The part of a model: that of a recipe in recipes/model by this name, or by its own path (a hub id, whatever the @revision); else a folder or hub id as its architecture
    is run by default."""
    for piece in sorted((RECIPES / "model").glob("*.yaml")):
        node = compose(str(piece))["model"]
        if name in (piece.stem, f"model/{piece.stem}"):
            return node
        if name.partition("@")[0] == node["path"]:
            return node | {"path": name}
    return {"_target_": "rlstitch.backbones.Diffusers", "path": name}


def short_name(recipe: str) -> str:
    """What a job is called by its recipe: the file's name without folder and suffix."""
    return recipe.rsplit("/", 1)[-1].removesuffix(".yaml")


def named(config: Any, recipe: str, faults: list[str]) -> None:
    """Give a job its name, by default its recipe's, and `out` its home folder for a `~`; a fault where its results have no place."""
    config.name = config.name or short_name(recipe)
    if fault := misfit(config.name, Name):
        faults.append(f"'name' {fault}")
        return
    try:
        config.out = str(home(config.out))
    except UserError as error:
        faults.append(f"'out' {error}")
        return
    try:
        below(config.out, config.name)
    except UserError as error:
        faults.append(f"'name': {error}")


def differences(saved: dict[str, Any], config: Any) -> list[str]:
    """`key: was -> is` of everything in which a saved recipe trains otherwise than this config; what is told, how it is cut and how long it runs do not count."""
    free = ("name", "out", "updates", "threads", "check", "resume", "checkpoint", "logging", "evaluation", "guard", "distributed")
    free += ("held_out", "measure_every")  # of a stitch job
    free += ("batch.micro_batch", "batch.rollout_batch", "sampler.activation_checkpointing")

    def flat(node: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(node, dict) or not node:
            return {path: node}
        return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}".lstrip(".")).items()}

    before, now = (flat(asdict(c)) for c in (fill(type(config), saved)[0], config))
    trained = {k.rsplit(".", 1)[-1] for k in (*before, *now) if ".weights." in k}  # a reward that is only evaluated may come and go
    keys = [k for k in dict.fromkeys([*before, *now]) if k == "distributed.precision" or (k not in free and k.split(".")[0] not in free)]
    keys = [k for k in keys if not k.startswith(("rewards.", "values.")) or k.split(".")[1] in trained]
    keys = [k for k in keys if not k.startswith("rewards.") or k.split(".", 2)[-1] not in _handling(config.rewards.get(k.split(".")[1]))]
    return [f"{k}: {before.get(k, 'not given')} -> {now.get(k, 'not given')}" for k in keys if before.get(k) != now.get(k)]


def _handling(node: Any) -> tuple[str, ...]:
    """Keys of a reward that say how it is asked, not what it scores."""
    return () if node is None else tuple(protocols.said(load_class(node["_target_"]), "handling", ()))


TABLES = ("rewards", "values", "weights", "compare", "pairs", "graded")  # mappings whose keys are names


def merge(base: dict, over: dict, names: bool = False) -> Any:
    """`over` laid over `base`, deep. A part whose `_target_` changes keeps only the keys that the new class takes. A mapping from names (TABLES, those in them,
    and those that a part takes) is replaced when given whole; keys given one by one (Some) join it, and null takes one out. `names`: these two are one.
    """
    out = type(base)(base)
    if "_target_" in over and over["_target_"] != base.get("_target_", over["_target_"]):
        try:
            takes = protocols.takes(load_class(over["_target_"]))
        except UserError:
            takes = base  # the checks will say what is wrong with the target
        out = type(base)((key, value) for key, value in base.items() if key in takes)
    part = "_target_" in out or "_target_" in over
    for key, value in over.items():
        if isinstance(value, dict):
            old = out[key] if isinstance(out.get(key), dict) else None
            table = (key in TABLES or part or names) and not any("_target_" in node for node in (value, old or {}))
            if old is None or (table and not isinstance(value, Some)):
                old = type(value)() if isinstance(base, Some) else {}
            out[key] = merge(old, value, table)
        elif value is None and names and not isinstance(base, Some):
            out.pop(key, None)
        else:
            out[key] = value
    return out


def _nested(items: Iterable[tuple[str, Any]], where: str) -> Some:
    """(dotted key, value) pairs as nested mappings of single keys, later ones over earlier ones."""
    out = Some()
    for key, value in items:
        steps = key.split(".")
        if not all(steps):
            raise UserError(f"cannot read the key '{key}' in {where}: write names with single dots between them, e.g. optimiser.lr")
        for step in reversed(steps):
            value = Some({step: value})
        out = merge(out, value)
    return out


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """key=value arguments (dots go deeper) as nested dicts, values read as YAML; `key=` is empty text."""
    bad = [a for a in arguments if "=" not in a or a.startswith(("-", "="))]
    if bad:
        raise UserError(f"cannot read {', '.join(repr(b) for b in bad)}: write overrides as key=value, e.g. optimiser.lr=1e-4")
    items = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        try:
            items.append((key, strict_yaml.load(text) if text else ""))
        except ValueError as error:
            raise UserError(f"cannot read the override {argument!r}: {error}; text with signs in it goes into quotes") from error
    return _nested(items, "the overrides")


LAUNCHERS = {
    "algorithm": "train.py",
    "method": "steer.py",
    "distill": "stitch.py",
    "compare": "evaluate_value.py",
    "surrogate": "surrogate.py",
    "layout": "evaluate.py",
}  # the key that tells what a recipe is for


def for_launcher(given: dict[str, Any], script: str, name: str) -> None:
    """Refuse a recipe of another launcher, naming that launcher."""
    other = next((launcher for key, launcher in LAUNCHERS.items() if key in given), script)
    if other != script:
        raise UserError(f"recipe '{name}' is not for launch/{script}: run `launch/{other} recipe={name}`")


# ---------------------------------------------------------------------------------------------------- checking


def structure(given: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """The typed config of a training recipe and every fault of keys, types and ranges."""
    return fill(RunConfig, given)


def check_part(where: str, node: dict[str, Any], *, kind: str) -> list[str]:
    """Faults of one `_target_` node against the protocol of its kind (see rlstitch.protocols), and against the signature it names with the ranges that stand
    there; `weights` are finite numbers by name in any part, and those of an oracle always."""
    if not isinstance(node, dict):
        return [f"'{where}' must be a group of keys with a '_target_', e.g. {{_target_: {node}}}, not {node!r}"]
    if "_target_" not in node:
        return [f"'{where}' needs a '_target_' (the class to build)"]
    try:
        cls = load_class(node["_target_"])
    except UserError as error:
        return [f"'{where}': {error}"]
    if wrong := protocols.unfit(kind, cls):
        return [f"'{where}': {node['_target_']} {wrong}"]
    signature, hints = inspect.signature(cls), protocols.hints(cls)
    settable = {n: p for n, p in signature.parameters.items() if n not in INJECTED}
    faults = []
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in settable:
            faults.append(f"unknown key '{where}.{key}'{nearest(key, settable)}")
        elif fault := misfit(
            value, Weights if (kind, key) == ("oracle", "weights") else hints.get(key, Weights if key == "weights" else Any)
        ):
            faults.append(f"'{where}.{key}' {fault}")
    missing = [n for n, p in settable.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n not in node]
    return faults + [f"'{where}.{name}' is missing: {node['_target_']} needs it" for name in missing]


def own_faults(where: str, node: dict[str, Any], kind: str) -> list[str]:
    """What the class that a sound node names finds wrong with it: `faults(options) -> [(key, why)]`, where it has that."""
    if check_part(where, node, kind=kind):
        return []
    try:
        options = {k: v for k, v in node.items() if k != "_target_"}
        return [
            f"'{where}.{key}': {why}" for key, why in protocols.asked(kind, load_class(node["_target_"]), "faults", options, default=())
        ]
    except PartError as error:
        return [f"'{where}': {error}"]
    except UserError as error:
        return [f"'{where}.path': {error}"]


def sound(where: str, node: dict[str, Any], kind: str) -> dict[str, Any]:
    """The arguments of a `_target_` node that fit, for checks that look at several together."""
    if not isinstance(node, dict):
        return {}
    faults = check_part(where, node, kind=kind)
    bad = {k for k in node for f in faults if f.startswith((f"'{where}.{k}' ", f"unknown key '{where}.{k}'"))}
    return {k: v for k, v in node.items() if k not in bad and k != "_target_"}


def build(node: dict[str, Any], kind: str = "", **injected: Any) -> Any:
    """Build a checked `_target_` node; of `injected` it gets what its signature asks for. kind: what it is held to (rlstitch.holding) where it is not of this project."""
    cls = load_class(node["_target_"])
    wanted = inspect.signature(cls).parameters
    given = {k: v for k, v in injected.items() if k in wanted and k not in node}
    with inside(node["_target_"]):
        return holding.built(kind, cls, **{k: v for k, v in node.items() if k != "_target_"}, **given)


def report(faults: list[str], recipe: str) -> UserError:
    return UserError(
        f"recipe '{recipe}' has {len(faults)} fault{'s' * (len(faults) > 1)}:\n" + "\n".join(f"  - {fault}" for fault in faults)
    )


def hardware() -> str:
    """One line that names the machine a figure was measured on."""
    import platform

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def to_yaml(config: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
