"""A recipe becomes parts, in one way for every job: backbone, rewards, value models, oracle and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlstitch import adapters, hub, protocols
from rlstitch.asking import probe_rewards
from rlstitch.config import build as build_part
from rlstitch.config import load_class
from rlstitch.data import encode
from rlstitch.distributed import Engine
from rlstitch.downloads import amount
from rlstitch.oracles import Stitched
from rlstitch.prompts import PromptSet
from rlstitch.stitch.model import OtherDenoiser, StitchedValueModel, build, misused, read_card
from rlstitch.telling import say
from rlstitch.types import Backbone, Batch, Oracle, Reward, UserError


@dataclass
class Parts:
    """What a job has built of its recipe. `engine`: of a job on several ranks, which then act together; alone without one."""

    backbone: Backbone
    rewards: dict[str, Reward]
    device: str
    engine: Engine | None = None
    values: dict[str, StitchedValueModel] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Mapping[str, Any], rewards: Mapping[str, Any], *, engine: Engine | None = None) -> Parts:
        """The denoiser and the rewards that a recipe's nodes name, on this process's device."""
        device = str(engine.device) if engine is not None else "cuda" if torch.cuda.is_available() else "cpu"
        if engine is not None:
            _agree(engine, [hub.pinned(node[key]) for node in (model, *rewards.values()) for key in hub.ids_of(node)])
        made = lambda name: build_part(rewards[name], kind="reward", device=device)  # noqa: E731
        services = {name for name, node in rewards.items() if protocols.said(load_class(node["_target_"]), "device", "") == "service"}
        asked = {name: made(name) for name in services}  # whether they are there is known before weights load
        backbone = build_part(model, kind="model", device=device)
        return cls(backbone, {name: asked[name] if name in asked else made(name) for name in rewards}, device, engine)

    def probe(self, names: Iterable[str], batch: Batch) -> None:
        """Ask the rewards of two blank pictures under two prompts, see `asking.probe_rewards`."""
        ask = lambda: probe_rewards(self.rewards, names, batch, self.backbone.size, self.device)  # noqa: E731
        ask() if self.engine is None else self.engine.together(ask)

    def load_values(self, node: Mapping[str, Any], paths: Mapping[str, str], *, share: bool = True) -> None:
        """Add the value models of a recipe's oracle node, on the rewards; those that are there are not loaded again. Call it before LoRA is added.

        One that was stitched on another denoiser of the same latents brings that one's first blocks with it (arXiv:2605.19804, Table 6): its card says whose.
        share: prefixes hold the denoiser's own tensors, not copies.
        """
        donors: dict[str, Backbone] = {}
        for name in (n for n in values_used(node) if n not in self.values):
            try:
                backbone = self.backbone
                value = StitchedValueModel.from_pretrained(paths[name], backbone=backbone, reward=self.rewards[name], share=share)
            except OtherDenoiser:
                spec = read_card(paths[name]).get("backbone", {})
                key = json.dumps(spec, sort_keys=True)
                if key not in donors:
                    packed = "".join(
                        f" {word} {spec[key]}" for word, key in (("in", "quantise"), ("merged with", "merge")) if spec.get(key)
                    )
                    say(f"{paths[name]} was stitched on {spec.get('path')}{packed}: its first blocks are loaded beside {backbone.path}")
                    donors[key] = build(spec, "model", self.device)
                value = StitchedValueModel.from_pretrained(paths[name], backbone=donors[key], reward=self.rewards[name], share=share)
                if why := misused(value.card | {"embedded_guidance": 0}, *self.backbone.size, 0.0):  # its own guidance it is told
                    raise UserError(f"value model '{paths[name]}' {why}") from None
                if value.prompted and donors[key].text_fingerprint() != self.backbone.text_fingerprint():
                    raise UserError(
                        f"{paths[name]} was stitched on {spec.get('path')} under the prompts' own text, which model {self.backbone.path} encodes otherwise: stitch one for this model, or one with text: empty"
                    ) from None
            self.values[name] = value

    def oracle(self, node: Mapping[str, Any]) -> Oracle:
        return build_part(node, kind="oracle", backbone=self.backbone, rewards=self.rewards, values=self.values)

    def encoded(self, *sets: PromptSet, truncate: bool = False, allow: str = "data.truncate") -> list[PromptSet]:
        """Prompts (and their pictures) as the denoiser takes them, see `data.encode`; before the value models, which ask for the empty one's text, by one loading of
        the encoders for all."""
        return encode(self.backbone, *sets, truncate=truncate, engine=self.engine, allow=allow)


def _agree(engine: Engine, ids: list[str]) -> None:
    """The caches of several machines may hold several commits under one name."""
    main = json.loads(engine.by_main(lambda: json.dumps(ids)))

    def same() -> None:
        if main != ids:
            raise UserError(
                f"rank 0 takes {', '.join(main)} and rank {engine.rank} {', '.join(ids)}: name one commit, model.path=OWNER/NAME@COMMIT"
            )

    engine.together(same)


def from_hub(config: Any) -> list[tuple[str, dict[str, Any], str, list[str]]]:
    """(where, node, its key, what it loads of that) of every hub id of a config's model and rewards whose class says what it needs of its path."""
    said = vars(config)
    nodes = {key: said[key] for key in ("model", "reward", "start") if said.get(key)}
    nodes |= {f"rewards.{name}": node for name, node in said.get("rewards", {}).items()}
    out = []
    for key, node in nodes.items():
        if ids := hub.ids_of(node):
            kind, options = "model" if key == "model" else "reward", {k: v for k, v in node.items() if k != "_target_"}
            needs = protocols.asked(kind, load_class(node["_target_"]), "needs", options)
            out += [] if needs is None else [(key, node, name, list(needs) if name == "path" else []) for name in ids]
    return out


def pinned(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node with the commit of its hub id, as a card keeps it."""
    return dict(node) | {key: hub.pinned(node[key]) for key in hub.ids_of(node)}


def at_hand(config: Any) -> bool:
    """Name the commits of a sound config's hub ids in it and, unless it is only checked, fetch their weights; -> whether any came, which no check has seen."""
    came = False
    if isinstance(lora := vars(config).get("lora"), str):
        config.lora = adapters.pinned(lora)
    elif lora is not None:
        lora.init = adapters.pinned(lora.init)
    if config.model.get("merge") and protocols.ours(config.model["_target_"]):
        config.model["merge"] = adapters.pinned(config.model["merge"])
    for _, node, key, needs in from_hub(config):
        node[key] = hub.pinned(node[key])
        if not config.check and hub.missing(node[key], needs, node.get("variant")):
            hub.fetch(node[key], needs, node.get("variant"), "the weights")
            came = True
    return came


def to_fetch(config: Any) -> list[str]:
    """Of every hub id of a checked config, a line on what a run would fetch first."""
    found = [(where, node[key], hub.missing(node[key], needs, node.get("variant"))) for where, node, key, needs in from_hub(config)]
    return [f"{where} {path}: " + (f"{amount(files)} would be fetched" if files else "in the hub cache") for where, path, files in found]


def values_used(node: Mapping[str, Any]) -> list[str]:
    """Names of the value models that a recipe's oracle node asks for: the columns of a Stitched one, else none."""
    weights = node.get("weights", {})
    return list(weights) if isinstance(weights, Mapping) and weights and issubclass(load_class(node["_target_"]), Stitched) else []
