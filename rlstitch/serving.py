"""`launch/serve_reward.py`: a reward of a recipe becomes what rewards.server serves."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor

from rlstitch import config as cfg
from rlstitch.asking import ask
from rlstitch.filling import nearest
from rlstitch.part_checks import reward_faults, unknown_rewards
from rlstitch.parts import at_hand
from rlstitch.ranges import Range, Text, Threads
from rlstitch.schema import RunConfig
from rlstitch.types import Batch


@dataclass
class ServeConfig:
    """rewards: those of the recipe; reward: the one to serve, which need not be named where there is but one. host: 127.0.0.1 is reached from this machine alone; port: 0 takes a
    free one. A training recipe will do: its other keys are not read."""

    rewards: dict[str, Any] = field(default_factory=dict)
    reward: str = ""
    host: Text = "127.0.0.1"
    port: Annotated[int, Range(0, 65_535)] = 8765
    threads: Threads = 0
    check: bool = False


def checked(given: dict[str, Any], name: str) -> ServeConfig:
    """The typed recipe, or one UserError that lists every fault."""
    own, others = {f.name for f in fields(ServeConfig)}, {f.name for f in fields(RunConfig)}
    config, faults = cfg.fill(ServeConfig, {k: v for k, v in given.items() if k in own})
    faults += [f"unknown key '{key}'{nearest(str(key), own)}" for key in given if key not in own | others]
    if not config.reward and len(config.rewards) == 1:
        config.reward = next(iter(config.rewards))
    if not config.reward:
        faults.append(f"'reward' must name the one to serve, of {', '.join(config.rewards) or 'which the recipe has none'}")
    else:
        faults += unknown_rewards("reward", [config.reward], config.rewards)
    if config.reward in config.rewards:
        faults += reward_faults(f"rewards.{config.reward}", config.rewards[config.reward])
    if faults:
        raise cfg.report(faults, name)
    config.rewards = {config.reward: config.rewards[config.reward]}
    return checked(given, name) if at_hand(SimpleNamespace(model={}, rewards=config.rewards, check=config.check)) else config


class Served:
    """The reward of a checked recipe, built, and held to what rewards are held to everywhere."""

    def __init__(self, config: ServeConfig):
        if config.threads:
            torch.set_num_threads(config.threads)
        self.name, self.device = config.reward, "cuda" if torch.cuda.is_available() else "cpu"
        self.reward = cfg.build(config.rewards[config.reward], kind="reward", device=self.device)

    def score(self, images: Tensor, batch: Any) -> Tensor:
        whole = Batch(batch.prompts, batch.group, batch.seeds, batch.facts)
        return ask(self.name, self.reward, images.to(self.device), whole)
