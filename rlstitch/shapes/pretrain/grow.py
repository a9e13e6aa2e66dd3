"""`shapes-large`: `shapes` at twice its depth. A new block follows every block of the old transformer, starts as the identity, and is all that is trained and stored.

Storing only the new blocks keeps the shipped weights small; `rlstitch.files` puts the whole pipeline directory together when `shapes:shapes-large` is first asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from rlstitch.files import GROWN, GROWN_WEIGHTS, sha256, write_json, write_tensors
from rlstitch.shapes.pretrain.common import device, fit, ranks, write_card
from rlstitch.shapes.pretrain.generator import build_transformer, objective


def kept_places(layers: int) -> list[int]:
    """Where the old blocks stand among twice as many: 0, 2, 4, ..., and the last one (which drops its text stream) still last."""
    return [*range(0, 2 * (layers - 1), 2), 2 * layers - 1]


def grow(old: SD3Transformer2DModel) -> tuple[SD3Transformer2DModel, list[int]]:
    """A transformer of twice the depth that computes what `old` does, and the places of its new blocks.

    A new block is a copy of the block before it whose modulation starts at zero: its gates shut both residual branches of both streams.
    """
    layers = old.config.num_layers
    model, kept = build_transformer(2 * layers, old.config.num_attention_heads), kept_places(layers)
    rest = {k: v for k, v in old.state_dict().items() if not k.startswith("transformer_blocks.")}
    model.load_state_dict(rest, strict=False)
    new = sorted(set(range(2 * layers)) - set(kept))
    for place, block in zip(kept, old.transformer_blocks):
        model.transformer_blocks[place].load_state_dict(block.state_dict())
    for place in new:
        before = old.transformer_blocks[min(place // 2, layers - 2)].state_dict()
        shut = {k: torch.zeros_like(v) for k, v in before.items() if k.startswith(("norm1.linear", "norm1_context.linear"))}
        model.transformer_blocks[place].load_state_dict(before | shut)
    return model, new


def train(
    out: Path,
    work: Path,
    *,
    seed: int,
    steps: int,
    minutes: float | None,
    lr: float = 1e-3,
    batch: int = 64,
    pool_size: int = 24_000,
) -> None:
    """Grow `out`/shapes and train the new blocks; writes them to `out`/shapes-large."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    rank, world = ranks()
    base, folder = out / "shapes", out / "shapes-large"
    vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32).to(device())
    tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer")
    encoders = [
        CLIPTextModelWithProjection.from_pretrained(base / name, dtype=torch.float32).requires_grad_(False)
        for name in ("text_encoder", "text_encoder_2")
    ]
    transformer, new = grow(SD3Transformer2DModel.from_pretrained(base / "transformer", dtype=torch.float32))
    transformer.requires_grad_(False)
    for place in new:
        transformer.transformer_blocks[place].requires_grad_(True)
    model, loss_of = objective(transformer, encoders, tokenizer, vae, seed=seed, batch=batch // world, pool_size=pool_size)
    facts = fit("shapes-large", model, loss_of, steps=steps, lr=lr, seed=seed, work=work, minutes=minutes, weight_decay=0.01, log_every=50)
    if rank:
        return
    blocks = {
        k: v.half() for k, v in transformer.state_dict().items() if k.startswith(tuple(f"transformer_blocks.{place}." for place in new))
    }
    write_tensors(folder / GROWN_WEIGHTS, blocks)
    layers = len(transformer.transformer_blocks)
    base_weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    told = {
        "base": base.name,
        "base_sha256": sha256(base_weights),
        "layers": layers,
        "kept": kept_places(layers // 2),
        "sha256": sha256(folder / GROWN_WEIGHTS),
    }
    write_json(folder / GROWN, told)
    trained = sum(v.numel() for v in blocks.values())
    facts |= {"part": "shapes-large", "seed": seed, "parameters": sum(p.numel() for p in transformer.parameters()), "trained": trained}
    write_card(folder, facts)
    print(facts, flush=True)
