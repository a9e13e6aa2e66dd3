"""FLUX.2-klein: few double blocks, many single ones on a joined stream, modulation made once outside of them; a scheduler that shifts by tokens and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen3ForCausalLM

from rlstitch import scheduler
from rlstitch.backbones import autoencoders, shared
from rlstitch.schedule import Shift
from rlstitch.types import Conditioning

PIPELINE, TRANSFORMER, VAE = Flux2KleinPipeline, Flux2Transformer2DModel, AutoencoderKLFlux2
ENCODERS = {"text_encoder": Qwen3ForCausalLM}
OPTIONAL, LIMITED = (), {}
LISTS, STREAMS, BEFORE, TAIL = ("transformer_blocks", "single_transformer_blocks"), (2, 1), (), ("norm_out", "proj_out")
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    "single_transformer_blocks.*.attn.to_out",
)  # fmt: skip
TEXT = ("tokens",)
MAX_SEQUENCE_LENGTH, NEGATIVE, EMBEDDED, MASKED, WINDOW = 512, "", 4.0, False, False
VAES = autoencoders.BatchNormed
guided, prepare, largest, reader, few_steps = shared.linear, shared.nothing, shared.unlimited, shared.by_key, shared.unsaid


def latent(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int, int]:
    factor = VAES.factor(vae)
    return transformer["in_channels"], factor, 1, 64 * factor


def inputs(model: Any, z: Tensor, sigma: Tensor, text: Conditioning, embedded: float | None) -> dict[str, Any]:
    words = torch.zeros(text.tokens.shape[1], 4, device=z.device)
    words[:, 3] = torch.arange(len(words), device=z.device)
    return {
        "hidden_states": to_pipeline(z),
        "timestep": shared.time(sigma, z),
        "guidance": torch.full((len(z),), embedded, device=z.device) if model.config.guidance_embeds else None,
        "encoder_hidden_states": text.tokens,
        "txt_ids": words,
        "img_ids": shared.positions(*z.shape[-2:], z.device, axes=4),
        "return_dict": False,
    }


def output(out: Any, z: Tensor) -> Tensor:
    return from_pipeline(out[0], *z.shape[-2:])


def picture(returned: Any, model: Any, z: Tensor) -> Tensor:
    """Of a double block's (text, picture), or behind the text in a single block's one stream."""
    tokens = returned[1] if isinstance(returned, tuple) else returned[:, -z.shape[-2] * z.shape[-1] :]
    return shared.grid(tokens, z, 1)


def text(pipeline: Any, prompts: Sequence[str], length: int, device: Any) -> list[dict[str, Tensor]]:
    tokens, _ = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)
    return [{"tokens": t} for t in tokens]


def count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    return shared.chat_count(tokenizer, prompts, enable_thinking=False)


def shift(settings: dict[str, Any], tokens: int | None) -> Shift:
    """With dynamic shifting mu is not the file's: linear in the tokens at 10 and at 200 steps, and in the steps between; beyond 4300 tokens that of 200 steps."""
    law = shared.shift(settings, tokens)
    if not law.dynamic or tokens is None:
        return law
    many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    slope = 0.0 if tokens > 4300 else (many - few) / 190
    return replace(law, factor=scheduler.exponential(many - 200 * slope), per_step=slope)


def to_pipeline(z: Tensor) -> Tensor:
    return z.flatten(2).transpose(1, 2)


def from_pipeline(latents: Tensor, height: int, width: int) -> Tensor:
    return latents.transpose(1, 2).unflatten(2, (height, width))
