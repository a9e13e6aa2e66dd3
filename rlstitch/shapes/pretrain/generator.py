"""The miniature's generator: a genuine `StableDiffusion3Pipeline` whose MM-DiT and text encoders are trained together from scratch."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from rlstitch.files import require
from rlstitch.shapes import tokenizer as shapes_tokenizer
from rlstitch.shapes.pretrain.common import autocast, batches, device, fit, ranks, run_in_float32, write_card
from rlstitch.shapes.pretrain.pool import labels_of, make_pool
from rlstitch.shapes.scenes import COLOURS, SHAPES

LAYERS, HEADS = 6, 4
EMPTY_PROMPT_RATE = 0.1


def build_transformer(layers: int = LAYERS, heads: int = HEADS) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        attention_head_dim=32,
        joint_attention_dim=128,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        num_layers=layers,
        num_attention_heads=heads,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.view(model.inner_dim, -1))
    return model


def text_encoder(tokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return CLIPTextModelWithProjection(config)


def conditioning(encoders: list[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token states [B, L, 128] and pooled vector [B, 128], put together as StableDiffusion3Pipeline does (penultimate states, no T5 tokens)."""
    outputs = [encoder(input_ids=ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o.text_embeds for o in outputs], -1)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 images -> latents after shift and scale, half precision, on the CPU."""
    out = []
    for part in batches(len(images), 128):
        with autocast():
            mean = vae.encode(images[part].to(device()).float() / 127.5 - 1).latent_dist.mode()
        out.append(((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu())
    return torch.cat(out)


def patch_loss(logits: Tensor, labels: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """What stands at every patch, read from the middle block's image tokens [B, N, S + C + 2] and weighted by [B]: it teaches the denoiser objects early."""
    parts = logits.split([len(SHAPES) + 1, len(COLOURS) + 1], -1)
    losses = [F.cross_entropy(part.transpose(1, 2), label, reduction="none").mean(1) for part, label in zip(parts, labels)]
    return (weight * sum(losses)).mean()


def start(transformer: SD3Transformer2DModel, encoders: list[CLIPTextModelWithProjection], clip_folder: Path, init: str) -> None:
    """Weights to begin with: those of the pipeline `init`, or a fresh denoiser whose first text encoder is clip's text tower."""
    if init:
        folder = require(init, "the pipeline to go on from")
        transformer.load_state_dict(SD3Transformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32).state_dict())
        for encoder, name in zip(encoders, ("text_encoder", "text_encoder_2")):
            encoder.load_state_dict(CLIPTextModelWithProjection.from_pretrained(folder / name, dtype=torch.float32).state_dict())
        return
    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    encoders[0].text_model.load_state_dict(clip.text_model.state_dict())
    encoders[0].text_projection.load_state_dict(clip.text_projection.state_dict())


def objective(
    transformer: SD3Transformer2DModel,
    encoders: list[CLIPTextModelWithProjection],
    tokenizer,
    vae: AutoencoderKL,
    *,
    seed: int,
    batch: int,
    pool_size: int,
) -> tuple[nn.ModuleDict, Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]]:
    """What is trained (with a probe for `patch_loss`) and its flow-matching loss of a step, for `fit`; `batch` is this rank's."""
    rank, _ = ranks()
    probe = nn.Linear(transformer.inner_dim, len(SHAPES) + len(COLOURS) + 2)
    parts = {"transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1], "probe": probe}
    model = nn.ModuleDict(parts).to(device())
    pool = make_pool(pool_size, seed + 1)
    latents = encode_latents(vae, pool.images)
    labels = labels_of(pool)
    middle = transformer.transformer_blocks[len(transformer.transformer_blocks) // 2]

    def tokens(prompts) -> Tensor:
        return tokenizer([p.text for p in prompts], padding="max_length", truncation=True, return_tensors="pt").input_ids

    ids = torch.stack([tokens(pool.prompts), tokens(pool.captions)])
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def loss_of(step: int, generator: torch.Generator):
        rng = random.Random((seed * 7919 + step) * 64 + rank)
        index = torch.randint(len(latents), (batch,), generator=generator)
        which = torch.tensor([int(rng.random() < 0.25) for _ in range(batch)])
        batch_ids = ids[which, index].clone()
        batch_ids[torch.rand(batch, generator=generator) < EMPTY_PROMPT_RATE] = empty
        z0 = latents[index].float()
        noise = torch.randn(z0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator) + 0.6)
        t = torch.where(torch.rand(batch, generator=generator) < 0.2, torch.rand(batch, generator=generator), t)
        z0, noise, t = z0.to(device()), noise.to(device()), t.to(device())
        z = torch.lerp(z0, noise, t.view(-1, 1, 1, 1))
        seen: list[Tensor] = []
        hook = middle.register_forward_hook(lambda _, __, output: seen.append(output[1]))
        with autocast():
            context, pooled = conditioning(encoders, batch_ids.to(device()))
            v = transformer(
                hidden_states=z, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t, return_dict=False
            )[0]
        hook.remove()
        error = (v.float() - (noise - z0)).square().mean()
        dense = patch_loss(probe(seen[0].float()), tuple(label[index].to(t.device) for label in labels), 1 - t)
        return error + 0.1 * dense, {"loss": error.detach(), "dense": dense.detach()}

    return model, loss_of


def train(
    out: Path,
    vae_folder: Path,
    work: Path,
    *,
    seed: int,
    steps: int,
    minutes: float | None,
    init: str = "",
    lr: float = 1.5e-3,
    batch: int = 64,
    pool_size: int = 24_000,
) -> None:
    torch.manual_seed(seed)
    rank, world = ranks()
    folder = out / "shapes"
    vae = AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32).to(device())
    tokenizer = shapes_tokenizer.build(folder / "tokenizer")
    shapes_tokenizer.build(folder / "tokenizer_2")
    transformer, encoders = build_transformer(), [text_encoder(tokenizer, 96, 3), text_encoder(tokenizer, 32, 2)]
    start(transformer, encoders, out / "clip", init)
    model, loss_of = objective(transformer, encoders, tokenizer, vae, seed=seed, batch=batch // world, pool_size=pool_size)
    facts = fit(
        "shapes",
        model,
        loss_of,
        steps=steps,
        lr=lr,
        seed=seed,
        work=work,
        minutes=minutes,
        weight_decay=0.01,
        ema_decay=0.999,
        log_every=100,
    )
    if rank:
        return
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(),
        vae=vae.half(),
        text_encoder=encoders[0].half(),
        text_encoder_2=encoders[1].half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    run_in_float32(folder)
    shutil.copy(vae_folder / "card.json", folder / "vae" / "card.json")
    write_card(folder, facts | {"part": "shapes", "seed": seed, "parameters": sum(p.numel() for p in transformer.parameters())})
    print(facts, flush=True)
