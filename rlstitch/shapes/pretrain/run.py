"""One command trains the world: which parts there are, in which order, for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from rlstitch import config as cfg
from rlstitch.files import SHAPES, require, resolve
from rlstitch.paths import below, home
from rlstitch.ranges import Seed, Text, Threads
from rlstitch.shapes import prompts
from rlstitch.shapes.pretrain import flux, generator, grow, rewards, vae
from rlstitch.types import UserError

# Minutes are wall time on one core (vae, clip, the rewards and shapes-large) or two (shapes, shapes-flux: two ranks under torchrun); a part ends with its steps or its minutes, whichever comes first.
BUDGET = {
    "vae": dict(steps=20_000, minutes=28),
    "clip": dict(steps=4_000, minutes=18),
    "shapes": dict(steps=20_000, minutes=85),
    "shapes-large": dict(steps=6_000, minutes=45),
    "shapes-flux": dict(steps=40_000, minutes=85),
    "hps": dict(steps=1_500, minutes=9),
    "aesthetic": dict(steps=3_000, minutes=None),
    "preference_b": dict(steps=2_500, minutes=10),
}
SEEDS = {"vae": 0, "clip": 1, "shapes": 2, "shapes-large": 3, "hps": 4, "aesthetic": 5, "preference_b": 61, "shapes-flux": 7}


def vae_folder(out: Path) -> Path:
    """Where the autoencoder lies: by itself while the world is trained, inside the pipeline where only that was shipped."""
    return out / "vae" if (out / "vae").exists() else out / "shapes" / "vae"


def load_vae(out: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(vae_folder(out), dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def trainers(out: Path, work: Path, seed: int, init: str = "") -> dict[str, Callable[[], None]]:
    def args(part: str) -> dict:
        return dict(out=out, work=work, seed=SEEDS[part] + 1000 * seed, **BUDGET[part])

    return {
        "vae": lambda: vae.train(**args("vae")),
        "clip": lambda: rewards.train_clip(vae=load_vae(out), **args("clip")),
        "shapes": lambda: generator.train(vae_folder=resolve(init) / "vae" if init else vae_folder(out), init=init, **args("shapes")),
        "hps": lambda: rewards.train_preference("hps", vae=load_vae(out), start_from=out / "clip", **args("hps")),
        "aesthetic": lambda: rewards.train_aesthetic(vae=load_vae(out), **args("aesthetic")),
        "preference_b": lambda: rewards.train_preference("preference_b", vae=load_vae(out), **args("preference_b")),
        "shapes-large": lambda: grow.train(**args("shapes-large")),
        "shapes-flux": lambda: flux.train(init=init, **args("shapes-flux")),
    }


@dataclass
class PretrainConfig:
    """parts: names with commas between them, done in this order. init: a pipeline whose weights the generator goes on from."""

    parts: Text = ",".join(("prompts", *SEEDS))
    seed: Seed = 0
    out: Text = str(SHAPES)
    threads: Threads = 0
    init: str = ""


def checked(given: dict[str, Any], name: str) -> PretrainConfig:
    """The typed options, or one UserError that lists every fault."""
    config, faults = cfg.fill(PretrainConfig, given)
    parts = ("prompts", *SEEDS)
    faults += [
        f"'parts' names {part!r}, which there is not{cfg.nearest(part, parts)}" for part in config.parts.split(",") if part not in parts
    ]
    if config.init:
        try:
            require(f"{config.init}/vae", "the autoencoder of the pipeline to go on from")
        except UserError as error:
            faults.append(f"'init': {error}")
    try:
        config.out = str(home(config.out))
        below(config.out, ".work")
    except UserError as error:
        faults.append(f"'out': {error}")
    if faults:
        raise cfg.report(faults, name)
    return config


def run(config: PretrainConfig) -> None:
    """Train the parts that have no card.json yet."""
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    steps = trainers(out, work, config.seed, config.init)
    steps["prompts"] = lambda: [
        prompts.write_prompts(out / f"{name}.jsonl", rows) for name, rows in prompts.make_splits(config.seed).items()
    ]
    for part in config.parts.split(","):
        folder = vae_folder(out) if part == "vae" else out / part
        if (folder / "card.json").exists():
            print(f"{part}: done already ({folder / 'card.json'})")
            continue
        steps[part]()
