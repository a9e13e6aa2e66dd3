"""Everything about a recipe that can be wrong and be found before a weight is loaded: parts, pairings, files, geometry."""

from __future__ import annotations

from typing import Any

from rlstitch import config as cfg
from rlstitch import schedule, stages
from rlstitch.data import PromptSet, read_prompts, resolve_geometry
from rlstitch.distributed import world_size
from rlstitch.files import require, vae_fingerprint
from rlstitch.oracles import values_used
from rlstitch.schema import RunConfig
from rlstitch.stitch.model import read_card
from rlstitch.types import UserError


def _catch(faults: list[str], where: str, action, *args):
    try:
        return action(*args)
    except (UserError, ValueError) as error:
        faults.append(f"'{where}': {error}")
        return None


def recipe_faults(config: RunConfig) -> list[str]:
    """All faults of a structurally sound config, in the recipe's order; those of one stage alone name it."""
    each = [_faults(part) for part in stages.expand(config)]
    common = [f for f in each[0] if all(f in faults for faults in each)]
    endless = [
        f"'stages' never ends: stage '{name}' has updates={stage.updates}; give every stage a positive number of updates"
        for name, stage in zip(stages.names(config), config.stages)
        if stage.updates < 1
    ]
    alone = [f"stage '{name}': {f}" for name, faults in zip(stages.names(config), each) for f in faults if f not in common]
    return common + endless + alone


def _faults(config: RunConfig) -> list[str]:
    faults = part_faults(config)
    for where in ("algorithm", "oracle", "stop"):
        extra = {"algorithm": (), "oracle": ("weights",), "stop": ()}[where]
        faults += [f for f in cfg.check_part(where, getattr(config, where), extra=extra) if not _given(f)]
    prompts = _catch(faults, "data.prompts", read_prompts, config.data.prompts)
    _catch(faults, "evaluation.prompts", read_prompts, config.evaluation.prompts)
    faults += unknown_rewards("evaluation.rewards", config.evaluation.rewards, config.rewards)
    _geometry(config, prompts, faults)
    if config.resume not in ("auto", "never"):
        _catch(faults, "resume", require, config.resume, "the checkpoint to resume from")
    cards = value_cards(config, faults)
    if config.refresh.fraction and not cards:
        faults.append(
            "'refresh' measures value models against their rewards, and this oracle has none: use rlstitch.oracles.Stitched, or refresh.fraction=0"
        )
    if not any(
        f.startswith(("'oracle", "unknown key 'oracle", "'stop", "unknown key 'stop", "'sampler", "'algorithm", "unknown key 'algorithm"))
        for f in faults
    ):
        _pairings(config, cards, faults)
    return faults


def _given(fault: str) -> bool:
    """Whether check_part misses a parameter that the trainer itself hands in."""
    return any(f"'algorithm.{name}' is missing" in fault for name in ("oracle", "grid"))


def _geometry(config: RunConfig, prompts: PromptSet | None, faults: list[str]) -> None:
    batch = config.batch
    _catch(
        faults,
        "batch",
        resolve_geometry,
        batch.prompts_per_update,
        batch.images_per_prompt,
        batch.micro_batch,
        world_size(),
        None if prompts is None else len(prompts),
    )


def value_cards(config: Any, faults: list[str]) -> dict[str, dict[str, Any]]:
    """Cards of the value models that a recipe's oracle uses; each must read this model's latents. `config` has model, rewards, values and oracle."""
    cards = {}
    try:
        used = values_used(config.oracle)
    except (UserError, KeyError, TypeError):
        return {}  # the broken oracle is reported already
    for name in used:
        if name not in config.values:
            faults.append(f"'oracle.weights' names '{name}', which is not under 'values'{cfg.nearest(name, config.values)}")
            continue
        card = _catch(faults, f"values.{name}", read_card, config.values[name])
        if card is None:
            continue
        cards[name] = card
        if name not in config.rewards:
            faults.append(f"value model '{name}' needs its pixel reward: add '{name}' under 'rewards'")
        try:
            if vae_fingerprint(config.model.get("path", "")) != card["vae_sha256"]:
                faults.append(
                    f"'values.{name}': {config.values[name]} reads latents of another autoencoder than model {config.model['path']}: stitch one for this model with launch/stitch.py"
                )
        except UserError:
            continue  # the missing model is reported already
    return cards


def part_faults(config: Any) -> list[str]:
    """Faults of the parts that every recipe has: model and rewards, with their files."""
    faults = cfg.check_part("model", config.model)
    for name, node in config.rewards.items():
        faults += cfg.check_part(f"rewards.{name}", node)
        for key in ("path", "head"):
            if isinstance(node.get(key), str):
                _catch(faults, f"rewards.{name}.{key}", require, node[key], "the reward's file")
    if "path" in config.model:
        _catch(faults, "model.path", require, config.model["path"], "the model directory")
    return faults


def unknown_rewards(where: str, names: list[str], rewards: dict[str, Any]) -> list[str]:
    return [f"'{where}' names '{n}', which is not under 'rewards'{cfg.nearest(n, rewards)}" for n in names if n not in rewards]


def _pairings(config: RunConfig, cards: dict[str, dict[str, Any]], faults: list[str]) -> None:
    """Oracle against stop, oracle against algorithm, algorithm against stop."""
    steps = config.sampler.num_steps
    grid = schedule.sigmas(steps, config.sampler.shift, config.sampler.spacing).tolist()
    stops = cfg.build(config.stop).steps(steps)
    if not len(stops) or stops.start < 1 or stops.stop - 1 > steps:
        faults.append(f"'stop' halts after {stops.start}..{stops.stop - 1} steps, but the grid has {steps}: keep it within 1..{steps}")
        return
    oracle, algorithm = cfg.load_class(config.oracle["_target_"]), cfg.load_class(config.algorithm["_target_"])
    weights = config.oracle.get("weights", {})
    if not isinstance(weights, dict) or not weights:
        faults.append("'oracle.weights' must give at least one reward and its weight, e.g. {clip: 1.0}")
        return
    if cards:
        low, high = max(c["sigma_range"][0] for c in cards.values()), min(c["sigma_range"][1] for c in cards.values())
    else:
        low, high = getattr(oracle, "sigma_range", (0.0, 1.0))
    outside = [k for k in stops if not low - 1e-6 <= grid[k] <= high + 1e-6]
    if outside:
        k = outside[0]
        faults.append(
            f"'stop' may halt after {k} steps at sigma {grid[k]:.3f}, but {config.oracle['_target_']} answers only for sigma in [{low:g}, {high:g}]: "
            + ("use rlstitch.stops.End" if high == 0 else "choose other steps")
        )
    blind = [n for n in weights if n in config.rewards and not cards and not cfg.load_class(config.rewards[n]["_target_"]).differentiable]
    faults += [] if cards else unknown_rewards("oracle.weights", list(weights), config.rewards)
    if algorithm.needs_gradient and (blind or getattr(oracle, "differentiable", True) is False):
        what = ", ".join(blind) or config.oracle["_target_"]
        faults.append(
            f"'algorithm' {config.algorithm['_target_']} needs gradients, and {what} has none: use a differentiable reward, or a StitchVM of a surrogate of it"
        )
    faults += algorithm.faults({k: v for k, v in config.algorithm.items() if k != "_target_"}, stops)


def checked(given: dict[str, Any], name: str) -> RunConfig:
    """The typed config, or one UserError that lists every fault."""
    cfg.for_launcher(given, "train.py", name)
    config, faults = cfg.structure(given)
    faults += recipe_faults(config)
    if faults:
        raise cfg.report(list(dict.fromkeys(faults)), name)
    if config.stages:
        config.updates = sum(stage.updates for stage in config.stages)
    if not config.name:
        config.name = name.rsplit("/", 1)[-1].removesuffix(".yaml")
    return config


def describe(config: RunConfig) -> str:
    """What `check=true` prints: resolved recipe, geometry, parameters and a memory estimate, from the model's configuration alone."""
    from accelerate import init_empty_weights

    geometry = resolve_geometry(config.batch.prompts_per_update, config.batch.images_per_prompt, config.batch.micro_batch, world_size())
    with init_empty_weights():
        sizes = cfg.load_class(config.model["_target_"]).parameter_counts(config.model["path"], config.lora.rank)
    width = 2 if config.model.get("dtype") in ("bfloat16", "float16") else 4
    base, trained = sum(v for k, v in sizes.items() if k != "lora"), sizes["lora"]
    partitions = geometry.world if config.distributed.zero_stage else 1
    memory = base * width + trained * 4 * 3 + trained * 8 / partitions
    lines = [
        cfg.to_yaml(config).rstrip(),
        "",
        f"geometry: {geometry}",
        "parameters: " + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in sizes.items()),
    ]
    lines.append(
        f"memory without activations: about {memory / 2**20:.0f} MiB a rank (frozen weights {base * width / 2**20:.0f}, LoRA with gradient, EMA and AdamW {(memory - base * width) / 2**20:.0f})"
    )
    return "\n".join(lines)
