"""What can be wrong with the parts that every recipe has, and be found before a weight is loaded: model, rewards, judges, value models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlstitch import compiled, hub, protocols
from rlstitch import config as cfg
from rlstitch.files import require
from rlstitch.fingerprints import same_vae
from rlstitch.hub import model_folder
from rlstitch.parts import values_used
from rlstitch.prompts import PromptSet
from rlstitch.stitch.model import misused, read_card
from rlstitch.types import UserError


def attempt(faults: list[str], where: str, action, *args):
    """What the action gives; None where it fails, which becomes a fault of `where`."""
    try:
        return action(*args)
    except (UserError, ValueError, OSError) as error:
        faults.append(f"'{where}': {error}")
        return None


def value_cards(config: Any, faults: list[str]) -> dict[str, dict[str, Any]]:
    """Cards of the value models that a recipe's oracle uses; each must read this model's latents. `config` has model, rewards, values and oracle."""
    cards, backbone = {}, class_of(config.model, "model")
    sound = not any(f.startswith(("'model", "unknown key 'model")) for f in faults)
    try:
        used = values_used(config.oracle)
    except (UserError, KeyError, TypeError):
        return {}  # the broken oracle is reported already
    if used and config.oracle.get("compile") is True and (why := compiled.lacking()):
        faults.append(f"'oracle.compile': this machine lacks {why}, or leave it out")
    for name in used:
        if name not in config.values:
            faults.append(f"'oracle.weights' names '{name}', which is not under 'values'{cfg.nearest(name, config.values)}")
            continue
        card = attempt(faults, f"values.{name}", read_card, config.values[name])
        if card is None:
            continue
        cards[name] = card
        if name not in config.rewards:
            faults.append(f"value model '{name}' needs its pixel reward: add '{name}' under 'rewards'")
        try:
            if not same_vae(card, config.model.get("path", "")):
                faults.append(
                    f"'values.{name}': {config.values[name]} reads latents of another autoencoder than model {config.model['path']}: stitch one for this model with launch/stitch.py"
                )
            elif (card.get("backbone") or {}).get("path") == config.model["path"]:  # of another denoiser its own is built
                setting = sound and backbone and protocols.asked("model", backbone, "setting", config.model)
                faults += [f"'values.{name}': {config.values[name]} {why}"] if setting and (why := misused(card, *setting)) else []
                then, now = (node.get("max_sequence_length") for node in (card["backbone"], config.model))
                if card.get("text") == "prompt" and None not in (then, now) and then != now:
                    faults.append(
                        f"'values.{name}': {config.values[name]} was stitched under the prompts' own text at max_sequence_length {then}, and the model encodes them at {now}: set model.max_sequence_length={then}, or stitch again"
                    )
        except UserError:
            continue  # the missing model is reported already
    return cards


def part_faults(config: Any) -> list[str]:
    """Faults of the parts that every recipe has: model and rewards, with their files."""
    faults = cfg.check_part("model", config.model, kind="model") or model_faults(config.model)
    for name, node in config.rewards.items():
        faults += reward_faults(f"rewards.{name}", node)
    return faults


def model_faults(model: dict[str, Any]) -> list[str]:
    """Faults of a model's directory, which has to hold the `parts` that the backbone's class names."""
    faults: list[str] = []
    found = attempt(faults, "model.path", model_folder, model["path"]) if "path" in model else None
    parts = protocols.said(class_of(model, "model"), "parts", ())
    lacking = [part for part in parts if found is not None and not (found / part / "config.json").is_file()]
    if lacking:
        faults.append(
            f"'model.path': {model['path']} is no pipeline directory of diffusers, it has no {' and no '.join(f'{p}/config.json' for p in lacking)}: load the model once with diffusers (from_pretrained, or from_single_file for a single .safetensors) and write it with save_pretrained"
        )
    return faults or cfg.own_faults("model", model, "model")


def reward_faults(where: str, node: Any) -> list[str]:
    """Faults of a reward's node and of the files that a reward of ours reads, where its class does not tell them itself; what another class does with its keys is its own affair."""
    faults, cls = cfg.check_part(where, node, kind="reward"), class_of(node, "reward")
    if isinstance(node, dict) and str(node.get("_target_")).startswith("rlstitch.") and not hasattr(cls, "faults"):
        for key in ("path", "head"):
            if isinstance(node.get(key), str):
                attempt(faults, f"{where}.{key}", _to_be_had, node[key], key == "path")
    return faults or cfg.own_faults(where, node, "reward")


def _to_be_had(path: str, folder: bool) -> None:
    """Raises UserError where what a reward reads is neither here nor, by a hub id of one file or, with `folder`, of a model, at the hub."""
    if hub.parsed_file(path, pickles=True) and not (folder and hub.parsed(path)):
        hub.missing(path, [], None, "the reward's file")
    else:
        (model_folder if folder else require)(path, "the reward's file")


def judge_faults(where: str, names: list[str], rewards: dict[str, Any], prompts: PromptSet | None) -> list[str]:
    """Faults of the rewards that judge finished pictures of some prompts: unknown ones, and those that need more than these prompts say."""
    faults = unknown_rewards(where, names, rewards)
    for name in names if prompts is not None else ():
        others = [n for n in names if n != name]
        remedy = (
            f"leave it out, e.g. {where}=[{', '.join(others)}]" if others else "take a file of prompts that it reads, or another reward"
        )
        faults += unread(where, [name], rewards, prompts, remedy)
    return faults


def unread(where: str, names: Iterable[str], rewards: dict[str, Any], prompts: PromptSet, remedy: str) -> list[str]:
    """Faults of rewards that cannot score pictures of these prompts, as far as their classes say so before they are built; `where`: the key that asks them."""
    faults: list[str] = []
    for name, node, cls in ((name, rewards.get(name), class_of(rewards.get(name), "reward")) for name in names):
        why = cls and attempt(faults, f"rewards.{name}", protocols.asked, "reward", cls, "unreadable", prompts.rows)
        if cls and not why and not cfg.check_part(name, node, kind="reward"):
            options = {k: v for k, v in node.items() if k != "_target_"}
            why = attempt(faults, f"rewards.{name}", protocols.asked, "reward", cls, "lacking", options, prompts.rows)
        faults += [f"'{where}' names '{name}', which {why}: {remedy}"] if why else []
    return faults


def without_gradient(names: Iterable[str], rewards: dict[str, Any]) -> list[str]:
    """Those rewards whose class says that no gradient reaches the pictures; one that says so only once it is built is believed until then."""
    return [n for n in names if n in rewards and protocols.said(class_of(rewards[n], "reward"), "differentiable", True) is False]


def answered(oracle: Any, cards: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """The sigmas at which an oracle's class, or all of its value models, may be asked."""
    ranges = [card["sigma_range"] for card in cards.values()] or [protocols.said(oracle, "sigma_range", (0.0, 1.0))]
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def class_of(node: Any, kind: str) -> Any:
    """The class that a node names; None where it cannot be loaded or is of another kind, which check_part reports."""
    try:
        cls = cfg.load_class(node["_target_"])
    except (UserError, KeyError, TypeError):
        return None
    return None if protocols.unfit(kind, cls) else cls


def unknown_rewards(where: str, names: list[str], rewards: dict[str, Any]) -> list[str]:
    """Names of rewards that a recipe does not give. One that its pieces give is gone where the recipe gives `rewards` whole."""
    return [
        f"'{where}' names '{n}', which is not under 'rewards'{cfg.nearest(n, rewards)}; `rewards.{n}: ...` adds one to those of the recipe's pieces"
        for n in names
        if n not in rewards
    ]
