"""Pools of rendered scenes with their prompts, made once and drawn from many times."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch.shapes.pretrain.common import autocast, batches, device
from rlstitch.shapes.prompts import FactTable, Prompt, draw_prompt, full_captions, scenes_for
from rlstitch.shapes.scenes import COLOURS, RELATIONS, SHAPES, Scenes, patch_labels, render, sample_scenes


@dataclass
class Pool:
    images: Tensor  # [N, 3, 64, 64] uint8
    scenes: Scenes
    captions: list[Prompt]  # the full caption of each scene
    prompts: list[Prompt]  # a prompt that it meets: the one it was drawn for, else the full caption
    facts: FactTable

    def pixels(self, index: Tensor) -> Tensor:
        return self.images[index].float() / 255


def concat(parts: list[Scenes]) -> Scenes:
    return Scenes(**{name: torch.cat([getattr(p, name) for p in parts]) for name in Scenes.__dataclass_fields__})


def to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def make_pool(n: int, seed: int, *, drawn_for_prompt: float = 0.6) -> Pool:
    """N scenes: a share is drawn for one of GenEval's six kinds of prompt, the rest holds one to four random objects."""
    rng = random.Random(seed)
    k = int(n * drawn_for_prompt)
    prompts = [draw_prompt(rng) for _ in range(k)]
    parts = [scenes_for(prompts, seed)]
    if k < n:
        parts.append(sample_scenes(n - k, torch.Generator().manual_seed(seed + 1)))
    scenes = concat(parts)
    captions = full_captions(scenes, rng)
    images = torch.cat([to_bytes(render(scenes[p])) for p in batches(n, 256)])
    return Pool(images, scenes, captions, prompts + captions[k:], FactTable.from_scenes(scenes))


def labels_of(pool: Pool) -> tuple[Tensor, Tensor]:
    """What stands at every patch of the pool's pictures."""
    parts = [patch_labels(pool.scenes[p]) for p in batches(len(pool.images), 512)]
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])


@torch.no_grad()
def reconstruct(vae, images: Tensor) -> Tensor:
    """decode(encode(x)) of uint8 images, as uint8: what the autoencoder makes of clean scenes."""
    out = []
    for part in batches(len(images), 64):
        x = images[part].to(device()).float() / 127.5 - 1
        with autocast():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        out.append(to_bytes((y.float().cpu() + 1) / 2))
    return torch.cat(out)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Worsen looks at random, each picture its own way: wash out colours, lower the contrast, blur, add noise. [B, 3, H, W] in [0, 1]."""
    b = len(images)

    def draw(low: float, high: float, chance: float) -> Tensor:
        on = (torch.rand(b, 1, 1, 1, generator=generator) < chance).float()
        return on * (torch.rand(b, 1, 1, 1, generator=generator) * (high - low) + low)

    grey = images.mean(1, keepdim=True)
    x = torch.lerp(images, grey, draw(0.1, 0.7, 0.5))
    x = torch.lerp(x, x.mean((2, 3), keepdim=True), draw(0.1, 0.6, 0.4))
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    x = torch.lerp(x, blurred, draw(0.3, 1.0, 0.3))
    return (x + draw(0.02, 0.1, 0.3) * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def mutate(prompt: Prompt, rng: random.Random) -> Prompt:
    """A prompt whose scenes break one requirement of this one: another colour, shape, number or relation, or swapped colours."""
    needs, relation = list(prompt.needs), prompt.relation
    options = ["shape"]
    options += ["colour"] * 2 * any(n.colour for n in needs) + ["swap"] * 2 * (prompt.kind == "color_attr")
    options += ["relation"] * 3 * (relation is not None) + ["drop"] * (len(needs) > 1) + ["count"] * 3 * any(n.exact for n in needs)
    what = rng.choice(options)
    k = rng.randrange(len(needs))
    need = needs[k]
    if what == "shape":
        needs[k] = type(need)(rng.choice([s for s in SHAPES if all(s != n.shape for n in needs)]), need.colour, need.count, need.exact)
    elif what == "colour":
        needs[k] = type(need)(need.shape, rng.choice([c for c in COLOURS if c != need.colour]), need.count, need.exact)
    elif what == "swap":
        a, b = needs
        needs = [type(a)(a.shape, b.colour), type(b)(b.shape, a.colour)]
    elif what == "count":
        needs[k] = type(need)(need.shape, need.colour, rng.choice([c for c in (1, 2, 3, 4) if c != need.count]), need.exact)
    elif what == "drop":
        needs.pop(k)
        relation = None
    elif what == "relation":
        relation = RELATIONS[RELATIONS.index(relation) ^ 1]
    return Prompt(prompt.text, prompt.kind, tuple(needs), relation)
