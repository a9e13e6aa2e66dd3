"""What `check=true` prints for every launcher, and the lines that a job begins with. Nothing is built and no weight is loaded."""

from __future__ import annotations

from rlstitch import config as cfg
from rlstitch import lengths, schedule, scheduler, stages
from rlstitch.checks import counted, geometry, halts
from rlstitch.schema import RunConfig


def goals(config: RunConfig) -> list[str]:
    """What a checked run trains on and where its rollouts stop, a line a stage: `trains on clip x1 + hps x1; stops after 6..9 of 10 steps, sigma .67 to .25`."""
    lines = []
    for name, part in zip(stages.names(config), stages.expand(config)):
        if part.oracle:
            weights = " + ".join(f"{reward} x{weight:g}" for reward, weight in part.oracle["weights"].items())
            stop, steps, s = halts(part), part.sampler.num_steps, part.sampler
            shift = scheduler.of_recipe("sampler.shift", s.shift, part.model, [])
            grid = [f"{v:.2f}".removeprefix("0") if v else "0" for v in schedule.sigmas(steps, shift, s.spacing).tolist()]
            low, high = (stop.start, stop.stop - 1) if stop else (0, 0)
            after, sigma = (f"{low}..{high}", f"{grid[low]} to {grid[high]}") if high > low else (f"{low}", grid[low])
            where = f"after {after} of {steps} steps, sigma {sigma}" if stop else f"where {part.stop['_target_']} says"
            line = f"trains on {weights}; stops {where}"
        else:
            images = part.data.images
            line = (
                f"learns from {images['n']} pictures"
                if "n" in images
                else f"learns from the pictures of {images.get('path', images['_target_'])}"
            )
        lines.append(f"stage {name}, {part.updates} updates: {line}" if config.stages else line)
    return lines + lengths.unseen(stages.expand(config))


def describe(config: RunConfig) -> str:
    """What `check=true` prints: resolved recipe, geometry, parameters and a memory estimate, from the model's configuration alone."""
    from accelerate import init_empty_weights

    cut = geometry(config, counted(config))
    with init_empty_weights():
        sizes = cfg.load_class(config.model["_target_"]).parameter_counts(config.model["path"], config.lora.rank)
    width = 2 if config.model.get("dtype") in ("bfloat16", "float16") else 4
    base, trained = sum(v for k, v in sizes.items() if k != "lora"), sizes["lora"]
    partitions = cut.world if config.distributed.zero_stage else 1
    memory = base * width + trained * 4 * 3 + trained * 8 / partitions
    lines = [
        *goals(config),
        "",
        cfg.to_yaml(config).rstrip(),
        "",
        f"geometry: {cut}",
        "parameters: " + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in sizes.items()),
    ]
    lines.append(
        f"memory without activations: about {memory / 2**20:.0f} MiB a rank (frozen weights {base * width / 2**20:.0f}, LoRA with gradient, EMA and AdamW {(memory - base * width) / 2**20:.0f})"
    )
    return "\n".join(lines)
