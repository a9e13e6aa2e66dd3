"""Pictures of the generator itself, to distil on beside real ones: values are asked about its latents, not about noised photographs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import sampling, schedule, scheduler
from rlstitch.cache import keep, kept
from rlstitch.distributed import autocast, resolve_precision
from rlstitch.files import cache_folder
from rlstitch.fingerprints import weights_fingerprint
from rlstitch.lengths import fitting
from rlstitch.prompts import PromptSet
from rlstitch.protocols import code_of
from rlstitch.ranges import AutoShift, Count, CountOrNone, GridSteps, Guidance, NotEmpty, Seed, Text
from rlstitch.telling import progress, say
from rlstitch.types import noise_like


@dataclass
class GenerateConfig:
    """`count` pictures of the model on `prompts` in turn, by the ODE; the batches take the guidances in turn. truncate: cut prompts that the encoder would cut, or refuse them. shift: a number, or auto for the model's own."""

    count: CountOrNone = 0
    prompts: Text = "shapes:train.jsonl"
    column: str = ""
    guidance: Annotated[list[Guidance], NotEmpty()] = field(default_factory=lambda: [1.0, 3.0])
    num_steps: GridSteps = 20
    shift: AutoShift = scheduler.AUTO
    batch_size: Count = 64
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    truncate: bool = False
    seed: Seed = 0


def faults(where: str, config: GenerateConfig, model: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with a recipe's node `where`, whose pictures are of `model`."""
    out: list[str] = []
    if config.count > 0:
        fitting(out, f"{where}.prompts", config.prompts, config.column, model or {}, f"{where}.truncate", config.truncate)
    return out


@torch.no_grad()
def generate(backbone: Any, prompts: PromptSet, config: GenerateConfig, label: str) -> tuple[Tensor, list[int], float]:
    """Finished latents [N, C, H, W] of encoded prompts, the prompt index of each, and the seconds it took. Kept in the cache by what made them: the same are not made twice."""
    index = [k % len(prompts) for k in range(config.count)]
    device_type = backbone.device.type
    shift = scheduler.resolve("generate.shift", config.shift, backbone)
    told = dataclasses.asdict(config) | {
        "precision": resolve_precision(device_type, config.precision),
        "prompts": prompts.prompts,
        "text": backbone.text_fingerprint(),
        "model": weights_fingerprint(backbone.path, "transformer"),
        "shift": shift.factor if shift == schedule.Shift(shift.factor) else dataclasses.asdict(shift),
        "shape": list(backbone.latent_shape),
        "dtype": str(backbone.dtype),
        **({"merged": merged} if (merged := getattr(backbone, "merged", None)) else {}),
        **({"quantise": packed} if (packed := getattr(backbone, "quantise", None)) else {}),
        **({"code": code} if (code := code_of(backbone)) else {}),
    }
    file = cache_folder() / "generations" / f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"
    if (found := kept(file)) is not None:
        return found["latents"].to(backbone.device), index, float(found["seconds"])
    started = time.perf_counter()
    grid, out, batch_size = schedule.sigmas(config.num_steps, shift, "plain"), [], config.batch_size
    bar = progress(config.count, label, "picture")
    for start in range(0, config.count, batch_size):
        rows = index[start : start + batch_size]
        guidance = config.guidance[start // batch_size % len(config.guidance)]
        batch = prompts.batch(rows, torch.arange(start, start + len(rows)) + config.seed * 1_000_003)
        z = noise_like(backbone.latent_shape, batch.seeds, device=backbone.device)
        with autocast(device_type, config.precision):
            out.append(sampling.sample(backbone.bind(batch.text, guidance), z, grid).z.float())
        bar.update(len(rows))
    bar.close()
    latents, seconds = torch.cat(out), time.perf_counter() - started
    try:
        keep(file, {"latents": latents, "seconds": torch.tensor(seconds)})
    except OSError as error:
        say(f"{label} cannot be kept for the next time ({error}); set XDG_CACHE_HOME to a folder with room. This run goes on with them.")
    return latents, index, seconds


@torch.no_grad()
def pictures_of(backbone: Any, latents: Tensor, batch_size: int = 64) -> Tensor:
    """Decoded pictures uint8 [N, 3, H, W], on the CPU."""
    return torch.cat([(backbone.decode(part) * 255).round().byte().cpu() for part in latents.split(batch_size)])
