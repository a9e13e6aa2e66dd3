"""Everything about a recipe that can be wrong and be found before a weight is loaded: parts, pairings, files, geometry."""

from __future__ import annotations

import math
from typing import Any

from rlstitch import config as cfg
from rlstitch import lengths, protocols, resume, schedule, scheduler, stages
from rlstitch.data import DIMENSIONS, Geometry, resolve_geometry
from rlstitch.distributed import world_size
from rlstitch.files import require
from rlstitch.oracles import Tweedie
from rlstitch.part_checks import (
    answered,
    attempt,
    class_of,
    judge_faults,
    model_faults,
    part_faults,
    unknown_rewards,
    unread,
    value_cards,
    without_gradient,
)  # fmt: skip
from rlstitch.parts import at_hand
from rlstitch.schema import RunConfig
from rlstitch.stops import End


def recipe_faults(config: RunConfig) -> list[str]:
    """All faults of a structurally sound config, in the recipe's order; those of one stage alone name it."""
    each = [_faults(part) for part in stages.expand(config)]
    common = [f for f in each[0] if all(f in faults for faults in each)]
    endless = [
        f"'stages' never ends: stage '{name}' has updates={stage.updates}; give every stage a positive number of updates"
        for name, stage in zip(stages.names(config), config.stages)
        if not stage.updates
    ]
    alone = [f"stage '{name}': {f}" for name, faults in zip(stages.names(config), each) for f in faults if f not in common]
    ignored = [
        f"stage '{name}' has prompts of its own, but the run learns from the pictures of data.images and their prompts: remove them"
        for name, stage in zip(stages.names(config), config.stages)
        if stage.prompts and config.data.images
    ]
    return common + endless + ignored + alone


def method_faults(config: RunConfig) -> list[str]:
    """Of a recipe's method with its oracle and stop, whatever model they are for."""
    faults = [f for f in cfg.check_part("algorithm", config.algorithm, kind="algorithm") if not _given(f)]
    method = class_of(config.algorithm, "algorithm")
    for where in ("oracle", "stop"):
        if method is None or method.needs_oracle:
            faults += cfg.check_part(where, getattr(config, where), kind=where)
        elif getattr(config, where):
            faults.append(f"'{where}' is given, but {config.algorithm['_target_']} asks no reward and would not use it: remove '{where}'")
    return faults


def _faults(config: RunConfig) -> list[str]:
    faults, method = part_faults(config) + method_faults(config), class_of(config.algorithm, "algorithm")
    count = _data(config, method, faults)
    held, cut = config.evaluation, config.data.truncate
    held_out = lengths.fitting(faults, "evaluation.prompts", held.prompts, held.column, config.model, "data.truncate", cut)
    faults += judge_faults("evaluation.rewards", config.evaluation.rewards, config.rewards, held_out)
    faults += guard_faults(config)
    if config.distributed.zero_stage and config.distributed.precision == "fp16":
        faults.append("'distributed.precision' fp16 has no loss scaling under ZeRO here: use bf16 or fp32, or zero_stage=0")
    most = {"nf4": 2, "int8": 0}.get(
        str(config.model.get("quantise")), 3
    )  # DeepSpeed cuts packed weights wrongly, and moves those of int8 not at all
    if config.distributed.zero_stage > most:
        faults.append(
            f"'model.quantise' {config.model['quantise']} goes with distributed.zero_stage={most} at most, not {config.distributed.zero_stage}: LoRA alone trains, so that ZeRO saves little beside it"
        )
    attempt(faults, "batch", geometry, config, count)
    faults += lora_faults("lora.init", config.lora.init, config.model) if config.lora.init else []
    if not any(f.startswith(("'model'", "'model.path'")) for f in faults):
        faults += target_faults(config.lora.targets, config.model)
    if config.resume not in ("auto", "never"):
        attempt(faults, "resume", require, config.resume, "the checkpoint to resume from")
    cards = value_cards(config, faults)
    faults += refresh_faults(config)
    if config.refresh.fraction and not cards:
        faults.append(
            "'refresh' measures value models against their rewards, and this oracle has none: use rlstitch.oracles.Stitched, or refresh.fraction=0"
        )
    backbone = class_of(config.model, "model")
    if config.sampler.guidance_gradient != "both" and backbone is not None and protocols.said(backbone, "guidance_gradient", None) is None:
        faults.append(
            f"'sampler.guidance_gradient' is {config.sampler.guidance_gradient}, and {config.model['_target_']} does not say that it does so (by a guidance_gradient of its own, which is then set): leave it out"
        )
    shift = scheduler.of_recipe("sampler.shift", config.sampler.shift, config.model, faults)
    scheduler.of_recipe("evaluation.shift", config.evaluation.shift, config.model, faults)
    broken = ("'oracle", "unknown key 'oracle", "'stop", "unknown key 'stop", "'sampler")
    if shift is not None and method is not None and not any(f.startswith(broken) for f in faults):
        _pairings(config, shift, cards, faults)
    return faults + (_comparisons(config, method) if method is not None and method.needs_oracle else [])


def _given(fault: str) -> bool:
    """Whether check_part misses a parameter that the trainer itself hands in."""
    return any(f"'algorithm.{name}' is missing" in fault for name in ("oracle", "grid"))


def _data(config: RunConfig, method: Any, faults: list[str]) -> int | None:
    """Faults of what is learned from; -> how many prompts or pictures there are, where that is known before they are made."""
    images, target = config.data.images, config.algorithm.get("_target_")
    if method is None or method.learns_from == "prompts":
        if images and method is not None:
            faults.append(f"'data.images' is given, but {target} learns from prompts and makes its own pictures: remove it")
        d = config.data
        prompts = lengths.fitting(faults, "data.prompts", d.prompts, d.column, config.model, "data.truncate", d.truncate)
        if prompts is not None and method is not None and method.needs_oracle:
            faults += unread(
                "oracle.weights",
                trained_on(config),
                config.rewards,
                prompts,
                "take prompts that it reads (data.prompts), or another reward",
            )
        return None if prompts is None else len(prompts)
    if not images:
        _, shape, example = DIMENSIONS[method.learns_from]
        faults.append(
            f"'data.images' is missing: {target} learns from {method.learns_from} {shape}; give a part that makes them, e.g. {{_target_: rlstitch.shapes.images.{example}, n: 2000}}"
        )
        return None
    faults += cfg.check_part("data.images", images, kind="images")
    return images["n"] if isinstance(images.get("n"), int) else None


def counted(config: RunConfig) -> int | None:
    """How many prompts or pictures a checked config learns from, where that is known before they are made."""
    return _data(config, class_of(config.algorithm, "algorithm"), [])


def _comparisons(config: RunConfig, method: Any) -> list[str]:
    """Faults of an algorithm that compares samples within groups, or the gradients of rewards."""
    target, faults = config.algorithm["_target_"], []
    if method.collects and config.batch.images_per_prompt == 1:
        faults.append(
            f"'batch.images_per_prompt' is 1, but {target} compares the pictures of a prompt with each other and would learn nothing: set it to 2 or more (8 to 24 are usual)"
        )
    if not method.balances or "weights" not in (oracle := cfg.sound("oracle", config.oracle, "oracle")):
        return faults
    weights = oracle["weights"]
    if len(weights) == 1:
        faults.append(
            f"'oracle.weights' has one reward, {next(iter(weights))}, but {target} balances several: add another, or use rlstitch.algorithms.nft.NFT"
        )
    faults += [
        f"'oracle.weights.{name}' must be positive, not {weight}: {target} raises every reward; leave out what is only to be measured"
        for name, weight in weights.items()
        if not weight > 0
    ]
    if config.distributed.zero_stage == 3 or config.distributed.precision == "fp16":
        faults.append(
            f"{target} takes gradients of each reward, which needs whole parameters and no loss scaling: set distributed.zero_stage to 2 or less and distributed.precision to bf16 or fp32, not zero_stage {config.distributed.zero_stage} with {config.distributed.precision}"
        )
    return faults


def geometry(config: RunConfig, count: int | None = None) -> Geometry:
    """How the recipe's global batch is cut on the ranks that there are; `count` is the number of prompts or pictures, where it is known."""
    batch, method = config.batch, class_of(config.algorithm, "algorithm")
    whole, collects = (False, False) if method is None else (method.whole_groups, method.collects)
    return resolve_geometry(
        batch.prompts_per_update, batch.images_per_prompt, batch.micro_batch, world_size(), count, whole_groups=whole,
        rollout=batch.rollout_batch if collects else 0,
    )  # fmt: skip


def trained_on(config: RunConfig) -> list[str]:
    """Names of the rewards that a run trains on, as far as its oracle can be read."""
    weights = config.oracle.get("weights", {})
    return list(weights) if isinstance(weights, dict) else []


def refresh_faults(config: RunConfig) -> list[str]:
    """A watch that would never see enough to act on."""
    refresh, samples = config.refresh, config.batch.prompts_per_update * config.batch.images_per_prompt
    if not refresh.fraction:
        return []
    if refresh.fraction * samples < 1:
        return [
            f"'refresh.fraction' is {refresh.fraction}, which is no sample of the {samples} of an update: set it to {1 / samples:.4g} or more, or to 0"
        ]
    seen = math.ceil(refresh.fraction * config.batch.prompts_per_update) * config.batch.images_per_prompt * config.updates
    if seen < refresh.pairs:
        return [
            f"'refresh.pairs' is {refresh.pairs}, but {config.updates} updates give {seen} at refresh.fraction={refresh.fraction}: it would never act; lower refresh.pairs, or raise refresh.fraction"
        ]
    return []


def guard_faults(config: RunConfig) -> list[str]:
    guard, judges = config.guard, config.evaluation.rewards
    faults = []
    if guard.judge and guard.judge not in judges:
        faults.append(f"'guard.judge' is '{guard.judge}', which is not among evaluation.rewards{cfg.nearest(guard.judge, judges)}")
    trained = trained_on(config)
    watching = config.evaluation.every and guard.patience and judges and all(n in config.rewards for n in judges)
    if watching and trained and not set(trained) & set(judges):
        faults.append(
            f"the guard holds the held-out judge against the trained reward, and none of it ({', '.join(trained)}) is among evaluation.rewards: add it there, or set guard.patience=0"
        )
    if guard.prompts and guard.images < 2:
        faults.append(f"'guard.images' is {guard.images}: diversity within a prompt takes at least 2 pictures (or guard.prompts=0)")
    return faults


def lora_faults(where: str, path: str, model: dict[str, Any]) -> list[str]:
    """Faults of a LoRA that is to go on a recipe's model, whose own faults are told already."""
    faults: list[str] = []
    cls = class_of(model, "model")
    if cls is None or cfg.check_part("model", model, kind="model") or [f for f in model_faults(model) if f.startswith("'model.path'")]:
        attempt(faults, where, require, path, "the LoRA")
        return faults
    if not hasattr(cls, "load_lora"):
        return [f"'{where}' is given, but {model['_target_']} takes no LoRA (it has no load_lora): leave it out"]
    options = {k: v for k, v in model.items() if k != "_target_"}
    why = attempt(faults, where, protocols.asked, "model", cls, "lora_fault", options, path)
    return faults + ([f"'{where}': {why}"] if why else [])


def target_faults(targets: list[str], model: dict[str, Any]) -> list[str]:
    """Faults of what LoRA is to be trained on, of a sound model."""
    faults: list[str] = []
    cls, options = cfg.load_class(model["_target_"]), {k: v for k, v in model.items() if k != "_target_"}
    if targets and not hasattr(cls, "targets"):
        return [f"'lora.targets' is given, and {model['_target_']} has targets of its own alone: leave it out"]
    why = attempt(faults, "model.path", protocols.asked, "model", cls, "targets_fault", options, targets)
    return faults + ([f"'lora.targets': {why}"] if why else [])


def halts(config: RunConfig) -> range | None:
    """The steps after which a rollout may halt. None where check=true would have to build a stop of the user's own for it."""
    target = config.stop["_target_"]
    if config.check and not protocols.ours(target):
        return None
    return cfg.build(config.stop, kind="stop").steps(config.sampler.num_steps)


def _pairings(config: RunConfig, shift: schedule.Shift, cards: dict[str, dict[str, Any]], faults: list[str]) -> None:
    """Oracle against stop, oracle against algorithm, algorithm against stop."""
    steps = config.sampler.num_steps
    algorithm, options = cfg.load_class(config.algorithm["_target_"]), cfg.sound("algorithm", config.algorithm, "algorithm")
    own = lambda stops: attempt(faults, "algorithm", protocols.asked, "algorithm", algorithm, "faults", options, stops) or []  # noqa: E731
    if not algorithm.needs_oracle:
        faults += own(End().steps(steps))
        return
    grid = schedule.sigmas(steps, shift, config.sampler.spacing).tolist()
    stops = attempt(faults, "stop", halts, config)
    if stops is None:
        return
    if not len(stops) or stops.start < 1 or stops.stop - 1 > steps:
        faults.append(f"'stop' halts after {stops.start}..{stops.stop - 1} steps, but the grid has {steps}: keep it within 1..{steps}")
        return
    oracle = cfg.load_class(config.oracle["_target_"])
    weights = config.oracle["weights"]
    low, high = answered(oracle, cards)
    outside = [k for k in stops if not low - 1e-6 <= grid[k] <= high + 1e-6]
    if outside:
        k = outside[0]
        faults.append(
            f"'stop' may halt after {k} steps at sigma {grid[k]:.3f}, but {config.oracle['_target_']} answers only for sigma in [{low:g}, {high:g}]: "
            + ("use rlstitch.stops.End" if high == 0 else "choose other steps")
        )
    blind = [] if cards else without_gradient(weights, config.rewards)
    faults += [] if cards else unknown_rewards("oracle.weights", list(weights), config.rewards)
    if algorithm.needs_gradient and (blind or protocols.said(oracle, "differentiable", True) is False):
        what = ", ".join(blind) or config.oracle["_target_"]
        faults.append(
            f"'algorithm' {config.algorithm['_target_']} needs gradients, and {what} has none: use a differentiable reward, or a StitchVM of a surrogate of it"
        )
    if options.get("grad_steps") == 0 and not issubclass(oracle, Tweedie):
        faults.append(
            f"'algorithm.grad_steps' is 0, so the gradient has to come through the oracle, and {config.oracle['_target_']} does not run the policy: use rlstitch.oracles.Tweedie (ReFL), or grad_steps=1"
        )
    elif options.get("grad_steps") == 0 and grid[stops.stop - 1] == 0:
        faults.append(
            f"'algorithm.grad_steps' is 0 and 'stop' may halt after all {steps} steps, where Tweedie has nothing left to guess and no gradient: halt after {steps - 1} at most"
        )
    faults += own(stops)


def checked(given: dict[str, Any], name: str) -> RunConfig:
    """The typed config, or one UserError that lists every fault."""
    cfg.for_launcher(given, "train.py", name)
    config, faults = cfg.structure(given)
    if not faults:
        resume.keep_commits(config, name)
    faults += recipe_faults(config)
    cfg.named(config, name, faults)
    if faults:
        raise cfg.report(list(dict.fromkeys(faults)), name)
    if config.stages:
        config.updates = sum(stage.updates for stage in config.stages)
    return checked(given, name) if at_hand(config) else config
