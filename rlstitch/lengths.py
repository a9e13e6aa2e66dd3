"""How long prompts are beside what text encoders read: counted by tokenizers alone, before a weight is loaded."""

from __future__ import annotations

from typing import Any

from rlstitch import config as cfg
from rlstitch import protocols
from rlstitch.prompts import PromptSet, read_prompts
from rlstitch.schema import RunConfig
from rlstitch.types import UserError

Cut = list[tuple[str, int, int]]  # (prompt, its tokens, the limit)


def cut_by(kind: str, node: dict[str, Any], prompts: list[str]) -> Cut:
    """The prompts that a recipe's model or reward would cut; of a class without `cut_prompts` none are known. Raises UserError where its tokenizer cannot be read."""
    options = {k: v for k, v in node.items() if k != "_target_"}
    return protocols.asked(kind, cfg.load_class(node["_target_"]), "cut_prompts", options, prompts, default=[])


def message(cut: Cut, count: int, allow: str) -> str:
    """What is said of prompts that the denoiser would see cut; `allow`: the key that lets them be."""
    shown = "; ".join(f"'{prompt[:60]}...' ({tokens} tokens)" for prompt, tokens, _ in cut[:3])
    remedy = f"Shorten them, or set {allow}=true to train and sample with what is left" if allow else "Shorten them"
    return f"{len(cut)} of {count} prompts are longer than the {cut[0][2]} tokens that the text encoder takes: {shown}. {remedy}"


def fitting(
    faults: list[str], where: str, path: str, column: str, model: dict[str, Any], allow: str = "", truncate: bool = False
) -> PromptSet | None:
    """The prompts of a file. What is wrong with it, and those that the model would cut unless `truncate`, become faults of `where`."""
    try:
        prompts = read_prompts(path, column)
    except UserError as error:
        faults.append(f"'{where}': {error}")
        return None
    if truncate or not {"path", "_target_"} <= model.keys() or any(f.startswith(("'model", "unknown key 'model")) for f in faults):
        return prompts
    try:
        if cut := cut_by("model", model, prompts.prompts):
            faults.append(f"'{where}': {message(cut, len(prompts), allow)}")
    except UserError as error:
        faults.append(f"'model.path': {error}")
    return prompts


def unread(rewards: dict[str, Any], prompts: list[str]) -> list[str]:
    """A line for each reward, given by its node, that reads no more than the beginning of some prompts."""
    found = {name: cut for name, node in rewards.items() if (cut := cut_by("reward", node, prompts))}
    return [
        f"reward '{name}' reads the first {cut[0][2]} tokens of a prompt: {len(cut)} of {len(prompts)} are longer, and it does not see their ends"
        for name, cut in found.items()
    ]


def unread_by(parts: list[RunConfig]) -> list[str]:
    """The same for the rewards that a checked run, given stage by stage, asks, on all of its prompts."""
    files = {(p.data.prompts, p.data.column): None for p in parts if not p.data.images}
    files |= {(p.evaluation.prompts, p.evaluation.column): None for p in parts}
    prompts = list(dict.fromkeys(prompt for file in files for prompt in read_prompts(*file).prompts))
    names = dict.fromkeys(name for p in parts for name in (*p.oracle.get("weights", {}), *p.evaluation.rewards))
    return unread({name: parts[0].rewards[name] for name in names}, prompts)
