"""Pictures of the generator itself, to distil on beside real ones: values are asked about its latents, not about noised photographs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
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


class Generated:
    """The pictures that a config asks for, as latents, a part at a time: each part is kept in the cache by what made it, so that the same are not made twice.

    prompts: encoded. label: of what is said and shown.
    """

    def __init__(self, backbone: Any, prompts: PromptSet, config: GenerateConfig, label: str):
        self.backbone, self.set, self.config, self.label = backbone, prompts, config, label
        self.index = [k % len(prompts) for k in range(config.count)]
        self.shift = scheduler.resolve("generate.shift", config.shift, backbone)
        told = {k: v for k, v in dataclasses.asdict(config).items() if k != "count"} | {
            "precision": resolve_precision(backbone.device.type, config.precision),
            "prompts": prompts.prompts,
            "text": backbone.text_fingerprint(),
            "model": weights_fingerprint(backbone.path, "transformer"),
            "shift": self.shift.factor if self.shift == schedule.Shift(self.shift.factor) else dataclasses.asdict(self.shift),
            "shape": list(backbone.latent_shape),
            "dtype": str(backbone.dtype),
            **({"merged": merged} if (merged := getattr(backbone, "merged", None)) else {}),
            **({"quantise": packed} if (packed := getattr(backbone, "quantise", None)) else {}),
            **({"code": code} if (code := code_of(backbone)) else {}),
        }
        self.told = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def prompts(self) -> list[str]:
        """Of every picture."""
        return [self.set.prompts[k] for k in self.index]

    def parts(self, size: int) -> list[range]:
        """All pictures, some `size` at a time: batches are not cut, so that a picture does not depend on the part that it is in."""
        whole = max(1, size // self.config.batch_size) * self.config.batch_size
        return [range(k, min(k + whole, self.config.count)) for k in range(0, self.config.count, whole)]

    def digest(self, rows: range) -> str:
        """Of what makes the pictures of a part."""
        return hashlib.sha256(f"{self.told}:{rows.start}:{rows.stop}".encode()).hexdigest()

    @torch.no_grad()
    def latents(self, rows: range, shown: Callable[[int], Any] = lambda count: None) -> tuple[Tensor, float]:
        """Finished latents [n, C, H, W] of a part of `parts`, and the seconds that it took. shown: is told how many more are done."""
        file = cache_folder() / "generations" / f"{self.digest(rows)[:32]}.safetensors"
        if (found := kept(file)) is not None:
            shown(len(rows))
            return found["latents"].to(self.backbone.device), float(found["seconds"])
        started, config, out = time.perf_counter(), self.config, []
        grid, device = schedule.sigmas(config.num_steps, self.shift, "plain"), self.backbone.device
        for start in range(rows.start, rows.stop, config.batch_size):
            places = range(start, min(start + config.batch_size, rows.stop))
            guidance = config.guidance[start // config.batch_size % len(config.guidance)]
            batch = self.set.batch([self.index[k] for k in places], torch.tensor(places) + config.seed * 1_000_003)
            z = noise_like(self.backbone.latent_shape, batch.seeds, device=device)
            with autocast(device.type, config.precision):
                out.append(sampling.sample(self.backbone.bind(batch.text, guidance), z, grid).z.float())
            shown(len(places))
        latents, seconds = torch.cat(out), time.perf_counter() - started
        try:
            keep(file, {"latents": latents, "seconds": torch.tensor(seconds)})
        except OSError as error:
            say(
                f"{self.label} cannot be kept for the next time ({error}); set XDG_CACHE_HOME to a folder with room. This run goes on with them."
            )
        return latents, seconds


def generate(backbone: Any, prompts: PromptSet, config: GenerateConfig, label: str) -> tuple[Tensor, list[int], float]:
    """All finished latents [N, C, H, W] of encoded prompts at once, the prompt index of each, and the seconds it took."""
    made, bar = Generated(backbone, prompts, config, label), progress(config.count, label, "picture")
    found = [made.latents(rows, bar.update) for rows in made.parts(config.count)]
    bar.close()
    return torch.cat([latents for latents, _ in found]), made.index, sum(seconds for _, seconds in found)


@torch.no_grad()
def pictures_of(backbone: Any, latents: Tensor, batch_size: int = 64) -> Tensor:
    """Decoded pictures uint8 [N, 3, H, W], on the CPU."""
    return torch.cat([(backbone.decode(part) * 255).round().byte().cpu() for part in latents.split(batch_size)])
