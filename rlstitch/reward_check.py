"""`launch/check_reward.py`: a reward, by the name of its recipe or by its class, is built and held to its contract (rlstitch.contract)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor

from rlstitch import config as cfg
from rlstitch.contract import Clause, broken, contract
from rlstitch.part_checks import reward_faults, unread
from rlstitch.parts import at_hand, to_fetch
from rlstitch.pictures import images_from_folder
from rlstitch.prompts import PromptSet, read_prompts
from rlstitch.ranges import Range, Side, Text, Threads
from rlstitch.shapes.prompts import Prompt, scenes_for
from rlstitch.shapes.scenes import render, sample_scenes
from rlstitch.telling import say, table
from rlstitch.types import UserError


@dataclass
class CheckConfig:
    """reward: the name or path of a recipe that has `rewards`, a class by its dotted path, or a part (`{_target_: mine.Reward, scale: 2}`). only: of a recipe's rewards, those
    named. prompts: a file of at least `count` different ones, whose rows the reward gets, too; pictures: a folder to take them from, with captions that are then the prompts;
    without it scenes are drawn, `size` pixels a side, which meet the prompts where those are of the shapes world."""

    reward: Text | dict[str, Any] = ""
    only: list[Text] = field(default_factory=list)
    prompts: Text = "shapes:held_out.jsonl"
    column: str = ""
    pictures: str = ""
    count: Annotated[int, Range(2, 64)] = 4
    size: Side = 256
    threads: Threads = 0
    check: bool = False


def named(reward: str | dict[str, Any]) -> dict[str, Any]:
    """Nodes of rewards by name, of what a user calls a reward. Raises UserError where there is no such."""
    if isinstance(reward, dict):
        return {str(reward.get("_target_", "reward")).rpartition(".")[2]: reward}
    for name in (f"reward/{reward}", reward):
        try:
            path = cfg.find_recipe(name)
        except UserError as error:
            fault = error
            continue
        if not (found := cfg.compose(str(path)).get("rewards")):
            raise UserError(f"recipe {path} has no rewards")
        return found
    if re.fullmatch(r"\w+(\.\w+)+", reward) and not reward.endswith((".yaml", ".yml")):
        return {reward.rpartition(".")[2]: {"_target_": reward}}
    raise UserError(f"{fault}. A class is named by its dotted path, e.g. reward=mine.Reward")


def checked(given: dict[str, Any]) -> tuple[CheckConfig, dict[str, Any], PromptSet]:
    """The typed settings, the rewards by name, and the prompts; or one UserError that lists every fault."""
    config, faults = cfg.fill(CheckConfig, given)
    if not config.reward and not faults:
        faults.append("'reward' must name one: reward=pickscore for recipes/reward/pickscore.yaml, or a class, reward=mine.Reward")
    if faults:
        raise cfg.report(faults, "check_reward")
    nodes = named(config.reward)
    faults += [f"'only' names '{name}', and the recipe has {', '.join(nodes)}" for name in config.only if name not in nodes]
    nodes = {name: node for name, node in nodes.items() if not config.only or name in config.only}
    for name, node in nodes.items():
        faults += reward_faults(f"rewards.{name}", node)
    prompts = read_prompts(config.prompts, config.column)
    rows = list({prompt: k for k, prompt in reversed([*enumerate(prompts.prompts)])}.values())[::-1][: config.count]
    if len(rows) < config.count:
        faults.append(f"'prompts': {config.prompts} has {len(rows)} different ones, and 'count' asks for {config.count}")
    prompts = PromptSet([prompts.prompts[i] for i in rows], [prompts.rows[i] for i in rows])
    faults += unread("prompts", nodes, nodes, prompts, "give a file that has it, prompts=FILE")
    if faults:
        raise cfg.report(faults, "check_reward")
    if at_hand(SimpleNamespace(model={}, rewards=nodes, check=config.check)):
        return checked(given)
    return config, nodes, prompts


def pictures(config: CheckConfig, prompts: PromptSet) -> tuple[Tensor, PromptSet]:
    """[N, 3, H, W] in [0, 1], and their prompts."""
    if config.pictures:
        images, texts = images_from_folder(config.pictures, config.size)
        if len(images) < config.count:
            raise UserError(f"'pictures': {config.pictures} has {len(images)}, and 'count' asks for {config.count}")
        texts = list(texts[: config.count])
        own = PromptSet(texts, [{"prompt": t} for t in texts]) if len(set(texts)) == config.count else prompts
        return images[: config.count].float() / 255, own
    try:
        scenes = scenes_for([Prompt.from_json(row) for row in prompts.rows], seed=0)
    except UserError:  # prompts of the user's: whatever is drawn will do
        scenes = sample_scenes(config.count, torch.Generator().manual_seed(0))
    return render(scenes, config.size), prompts


def run(given: dict[str, Any]) -> None:
    """A table of every reward's clauses. Raises UserError where one is not kept."""
    config, nodes, prompts = checked(given)
    if config.check:
        return say(*to_fetch(SimpleNamespace(model={}, rewards=nodes)), f"would hold {', '.join(nodes)} to what a reward has to keep")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, prompts = pictures(config, prompts)
    lost = {}
    for name, node in nodes.items():
        reward = cfg.build(node, kind="reward", device=device)
        clauses = contract(name, reward, images.to(device), prompts.prompts, prompts.rows)
        say(shown(name, clauses))
        lost |= {name: broken(clauses)} if broken(clauses) else {}
        del reward
    if lost:
        raise UserError("; ".join(f"reward '{name}' does not keep: {', '.join(clauses)}" for name, clauses in lost.items()))


def shown(name: str, clauses: list[Clause]) -> str:
    word = {True: "ok", False: "NOT KEPT", None: "-"}
    return table([f"reward '{name}'", ""], [[clause.name, f"{word[clause.held]:<8}  {clause.seen}"] for clause in clauses])
