"""What `check=true` prints for every launcher, and the lines that a job begins with. Nothing is built and no weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlstitch import checkpoint, lengths, protocols, schedule, scheduler, stages
from rlstitch import config as cfg
from rlstitch.checks import counted, geometry, halts
from rlstitch.data import read_prompts
from rlstitch.distributed import world_size
from rlstitch.part_checks import class_of
from rlstitch.parts import to_fetch
from rlstitch.schema import RunConfig


def goals(config: RunConfig) -> list[str]:
    """What a checked run trains on and where its rollouts stop, a line a stage: `trains on clip x1 + hps x1; stops after 6..9 of 10 steps, sigma .67 to .25`."""
    lines = []
    for name, part in zip(stages.names(config), stages.expand(config)):
        if part.oracle:
            stop, steps, s = halts(part), part.sampler.num_steps, part.sampler
            shift = scheduler.of_recipe("sampler.shift", s.shift, part.model, [])
            grid = [f"{v:.2f}".removeprefix("0") if v else "0" for v in schedule.sigmas(steps, shift, s.spacing).tolist()]
            low, high = (stop.start, stop.stop - 1) if stop else (0, 0)
            after, sigma = (f"{low}..{high}", f"{grid[low]} to {grid[high]}") if high > low else (f"{low}", grid[low])
            where = f"after {after} of {steps} steps, sigma {sigma}" if stop else f"where {part.stop['_target_']} says"
            line = f"trains on {weighed(part.oracle['weights'])}; stops {where}"
        else:
            images = part.data.images
            line = (
                f"learns from {images['n']} pictures"
                if "n" in images
                else f"learns from the pictures of {images.get('path', images['_target_'])}"
            )
        lines.append(f"stage {name}, {part.updates} updates: {line}" if config.stages else line)
    lines += [f"starts from the LoRA {config.lora.init}, which stays beside the trained one"] * bool(config.lora.init)
    return lines + distilled(config) + alone(config) + lengths.unread_by(stages.expand(config))


def alone(config: RunConfig) -> list[str]:
    """A line where all that a stage trains on is known to be hacked without a reward beside it."""
    lines = []
    for weights in (part.oracle.get("weights", {}) for part in stages.expand(config) if part.oracle):
        said = {
            n: protocols.said(class_of(config.rewards[n], "reward"), "alone", "") for n, w in weights.items() if w and n in config.rewards
        }
        if said and all(said.values()):
            learnt = " and ".join(dict.fromkeys(said.values()))
            lines.append(
                f"warning: nothing but {', '.join(said)} is trained on, from which policies are known to learn {learnt}: add a reward that looks at the picture, e.g. a preference model"
            )
    return list(dict.fromkeys(lines))


def distilled(config: RunConfig) -> list[str]:
    """A line where a model that was distilled to few steps is to be trained by a method that is known to blur such models."""
    method, target = config.algorithm["_target_"], cfg.load_class(config.model["_target_"])
    if not protocols.said(cfg.load_class(method), "blurs_distilled", False):
        return []
    options = {k: v for k, v in config.model.items() if k != "_target_"}
    why = protocols.asked("model", target, "distilled", options, default="")
    blurred = f"others report that {method.rsplit('.', 1)[-1]} blurs such models: train the one that it was distilled from, or look at the pictures early"
    return [f"warning: model {config.model['path']} seems to be distilled to few steps ({why}); {blurred}"] if why else []


def whole(goals: list[str], config: Any, more: list[str]) -> str:
    """What would be done, the resolved recipe, and what else is known of it."""
    more = [*more, *to_fetch(config)]
    return "\n".join([*goals, "", cfg.to_yaml(config).rstrip(), *([""] if more else []), *more])


def part(node: dict[str, Any]) -> str:
    """A part in a few words: its class or function with what it is given."""
    return f"{node['_target_'].rsplit('.', 1)[-1]}({', '.join(f'{k}={v}' for k, v in node.items() if k != '_target_')})"


def weighed(weights: dict[str, float]) -> str:
    return " + ".join(f"{name} x{weight:g}" for name, weight in weights.items())


def steering(config: Any) -> str:
    """Of a steering job."""
    prompts = read_prompts(config.prompts, config.column)
    count = min(config.max_prompts or len(prompts), len(prompts)) * config.images_per_prompt
    goals = [
        f"steers {count} pictures of {config.prompts} by {part(config.method)} with {config.oracle['_target_'].rsplit('.', 1)[-1]} of {weighed(config.oracle['weights'])}",
        f"{config.sampler.num_steps} steps from noise to picture ({config.kernel}), guidance {config.sampler.guidance:g}, {config.prompts_per_batch} at a time"
        + f" on each of {world_size()} ranks" * (world_size() > 1)
        + (", the same noise unsteered beside it" if config.baseline else ""),
        f"judged by {', '.join(config.judges) or 'nobody (judges=[...])'}; results in {Path(config.out) / config.name}",
    ]
    return whole(goals, config, lengths.unread(config.rewards, prompts.prompts))


def stitching(config: Any) -> str:
    """Of a stitch job."""
    d, where = config.distill, {"best": "where it fits best", "cheapest": f"as early as fits within {config.margin:g} of the best"}
    cut = where.get(config.blocks, f"after block {config.blocks}") if config.kind == "stitch" else f"as a baseline ({config.kind})"
    goals = [
        f"stitches {', '.join(map(part, config.nodes.values()))} onto {part(config.model)}, {cut}, sigma {config.sigma_low:g} to {config.sigma_high:g}",
        f"pictures: {part(config.images)}" + (f" and {config.generate.count} of the model's own" if config.generate.count else ""),
        f"search on {config.search_images} of them, then {d.steps} steps of distillation on {d.batch_size} at a time; measured on {part(config.held_out)}",
        f"on {world_size()} ranks, each with {d.batch_size // world_size()} of them" * (world_size() > 1),
        f"saved to {', '.join(str(Path(config.out) / config.name / name) for name in config.nodes)}",
    ]
    return whole(list(filter(None, goals)), config, [])


def surrogate(config: Any) -> str:
    """Of a surrogate job."""
    (name, node), g = next(iter(config.rewards.items())), config.generate
    goals = [
        f"distils reward '{name}', {part(node)}, into {part(config.start)}",
        f"on {g.count} pictures of the model's own under {1 + config.others} prompts each, {config.steps} steps of {config.batch_size}; measured on {config.held_generations} of {config.held_out}",
        f"saved to {Path(config.out) / config.name}",
    ]
    return whole(goals, config, lengths.unread(config.rewards, read_prompts(config.held_out).prompts))


def comparing(config: Any) -> str:
    """Of a comparison of value models."""
    c = config.calibration
    goals = [f"{name}: {', '.join(rows)} beside {', '.join(config.rivals) or 'nothing'}" for name, rows in config.compare.items()]
    goals += [
        f"at sigma {', '.join(f'{s:g}' for s in config.sigmas)}, against {c.rollouts} finished rollouts from each of {c.count} latents at every level",
        f"written to {Path(config.out) / config.name}",
    ]
    return whole(goals, config, lengths.unread(config.rewards, read_prompts(c.prompts, c.column).prompts))


def judging(config: Any) -> str:
    """Of an evaluation of a model."""
    s, prompts = config.sampler, read_prompts(config.prompts, config.column)
    count = min(config.max_prompts or len(prompts), len(prompts))
    what = part(config.model) + (f" with the LoRA {config.lora}" if config.lora else "")
    goals = [
        f"evaluates {what} on {count} prompts of {config.prompts}, {config.images_per_prompt} pictures each, by {', '.join(config.judges)}",
        f"{s.num_steps} steps, guidance {s.guidance:g}; written to {Path(config.out) / config.name}",
    ]
    return whole(goals, config, lengths.unread(config.rewards, prompts.prompts))


def evaluating(folder: Path, config: RunConfig, lora: str = "") -> str:
    """Of the evaluation of a run, or of a LoRA on its model."""
    e, newest = config.evaluation, None if lora else checkpoint.newest(folder, keep_aside=False)
    what = f"the LoRA {lora} on the model of {folder}" if lora else f"{', '.join(e.final)} of {newest}"
    prompts = read_prompts(e.prompts, e.column)
    goals = [
        f"evaluates {what} on {min(e.max_prompts or len(prompts), len(prompts))} prompts of {e.prompts} by {', '.join(e.rewards)}",
        f"{e.num_steps} steps, guidance {e.guidance:g}; written to {folder / 'evaluation.json'}",
    ]
    return whole(goals, config, lengths.unread({n: config.rewards[n] for n in e.rewards}, prompts.prompts))


def describe(config: RunConfig) -> str:
    """Of a training run: resolved recipe, geometry, parameters and a memory estimate, from the model's configuration alone."""
    from accelerate import init_empty_weights

    cut = geometry(config, counted(config))
    with init_empty_weights():
        cls, own = cfg.load_class(config.model["_target_"]), [config.lora.targets] * bool(config.lora.targets)
        sizes = protocols.asked("model", cls, "parameter_counts", config.model["path"], config.lora.rank, *own, default={})
    width = 2 if config.model.get("dtype") in ("bfloat16", "float16") else 4
    packed = {"nf4": 0.5, "int8": 1}.get(config.model.get("quantise"), width)
    frozen = sum(v * (packed if k == "transformer" else width) for k, v in sizes.items() if k != "lora")
    trained = sizes.get("lora", 0)
    partitions = cut.world if config.distributed.zero_stage else 1
    memory = frozen + trained * 4 * 3 + trained * 8 / partitions
    e = config.evaluation
    held = read_prompts(e.prompts, e.column)
    count = min(e.max_prompts or len(held), len(held))
    steps = [
        f"{config.updates} updates, then an evaluation of {', '.join(e.final)} on {count} prompts by {', '.join(e.rewards) or 'no reward'}, in {e.num_steps} steps each; results in {Path(config.out) / config.name}",
    ]
    more = [
        f"geometry: {cut}",
        "parameters: " + (", ".join(f"{k} {v / 1e6:.2f} M" for k, v in sizes.items()) or "not told by this backbone"),
        f"memory without activations: about {memory / 2**20:.0f} MiB a rank (frozen weights {frozen / 2**20:.0f}, LoRA with gradient, EMA and AdamW {(memory - frozen) / 2**20:.0f})",
    ]
    return whole([*goals(config), *steps], config, more)
