"""Pictures of the `shapes` world for stitching: rendered scenes, with captions, as uint8."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from rlstitch.ranges import Count, Range, Seed
from rlstitch.shapes.pretrain.pool import make_pool
from rlstitch.shapes.pretrain.rewards import distinct_captions


def scenes(n: Count, seed: Seed = 0) -> tuple[Tensor, list[str]]:
    """n scenes [n, 3, 64, 64] uint8 and a prompt that each meets."""
    pool = make_pool(n, seed)
    return pool.images, [p.text for p in pool.prompts]


def curated(n: Count = 2000, seed: Seed = 0, keep: Annotated[float, Range(0.001, 1)] = 0.25) -> tuple[Tensor, list[str]]:
    """n scenes [n, 3, 64, 64] uint8 drawn for prompts like the held-out ones, the `keep` with the best stated looks of those drawn: data that is worth finetuning on."""
    from rlstitch.shapes.looks import looks

    pool = make_pool(round(n / keep), seed, drawn_for_prompt=1.0)
    best = torch.cat([looks(part.float() / 255) for part in pool.images.split(512)]).topk(n).indices.sort().values
    return pool.images[best], [pool.prompts[i].text for i in best.tolist()]


def distinct(n: Count = 500, seed: Seed = 0) -> tuple[Tensor, list[str]]:
    """n scenes with pairwise distinct captions that specify them fully, for Recall@1."""
    pool = distinct_captions(n, seed)
    return pool.images, [c.text for c in pool.captions]


def _vae():
    from diffusers import AutoencoderKL

    from rlstitch.files import require

    folder = require("shapes:shapes/vae", "the miniature's autoencoder")
    return AutoencoderKL.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


def preference_pairs(
    n: Count = 1000, seed: Seed = 0, utility: Literal["hps", "preference_b"] = "hps"
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """n pairs of pictures [n, 3, 64, 64] uint8 under one prompt each, and whether the first is better by the stated utility of that preference model."""
    from rlstitch.shapes.pretrain.rewards import Pairs

    pairs = Pairs(n, seed, utility, _vae())
    return pairs.images[0], pairs.images[1], [p.text for p in pairs.prompts], pairs.first_wins


def ranked_pairs(n: Count = 1000, seed: Seed = 0, utility: Literal["hps", "preference_b"] = "hps") -> tuple[Tensor, list[str]]:
    """n pairs of pictures [n, 2, 3, 64, 64] uint8 under one prompt each, the better first by the stated utility of that preference model."""
    first, second, prompts, first_wins = preference_pairs(n, seed, utility)
    pairs = torch.stack([first, second], 1)
    return torch.where(first_wins.view(-1, 1, 1, 1, 1), pairs, pairs.flip(1)), prompts


def graded_looks(n: Count = 1000, seed: Seed = 0) -> tuple[Tensor, list[str], Tensor]:
    """n pictures, half of them worsened, with their prompts and stated, noisy looks on `aesthetic`'s scale."""
    from rlstitch.shapes.looks import looks
    from rlstitch.shapes.pretrain.pool import degrade, to_bytes
    from rlstitch.shapes.pretrain.rewards import AESTHETIC_NOISE, with_reconstructions

    pool, generator = with_reconstructions(make_pool(n, seed), _vae()), torch.Generator().manual_seed(seed)
    images = pool.images.float() / 255
    bad = torch.rand(n, generator=generator) < 0.5
    images[bad] = degrade(images[bad], generator)
    truth = 10 * (looks(images) + AESTHETIC_NOISE * torch.randn(n, generator=generator))
    return to_bytes(images), [p.text for p in pool.prompts], truth
