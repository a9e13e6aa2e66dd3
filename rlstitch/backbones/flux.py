"""FLUX.1: double blocks on two streams, then single blocks on one, guidance embedded where the model was distilled with it (config `guidance_embeds`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from rlstitch.backbones import autoencoders, shared
from rlstitch.types import Conditioning

PIPELINE, TRANSFORMER, VAE = FluxPipeline, FluxTransformer2DModel, AutoencoderKL
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
OPTIONAL, LIMITED = (), {"text_encoder": "tokenizer"}
LISTS, STREAMS, BEFORE, TAIL = ("transformer_blocks", "single_transformer_blocks"), (2, 2), (), ("norm_out", "proj_out")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT = ("tokens", "pooled")
MAX_SEQUENCE_LENGTH, NEGATIVE, EMBEDDED, MASKED, WINDOW = 512, "", 3.5, False, False
VAES = autoencoders.KL
guided, shift, count, prepare, largest = shared.linear, shared.shift, shared.count, shared.nothing, shared.unlimited
to_pipeline, from_pipeline = shared.pack, shared.unpack


def latent(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int, int]:
    factor = VAES.factor(vae)
    return transformer["in_channels"] // 4, factor, 2, 128 * factor


def inputs(model: Any, z: Tensor, sigma: Tensor, text: Conditioning, embedded: float | None) -> dict[str, Any]:
    height, width = z.shape[-2] // 2, z.shape[-1] // 2
    return {
        "hidden_states": shared.pack(z),
        "timestep": shared.time(sigma, z),
        "guidance": torch.full((len(z),), embedded, device=z.device) if model.config.guidance_embeds else None,
        "pooled_projections": text.pooled,
        "encoder_hidden_states": text.tokens,
        "txt_ids": torch.zeros(text.tokens.shape[1], 3, device=z.device),
        "img_ids": shared.positions(height, width, z.device),
        "return_dict": False,
    }


def few_steps(transformer: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """FLUX.1-schnell has no guidance embedded and an unshifted grid."""
    plain = not (transformer.get("guidance_embeds") or scheduler.get("use_dynamic_shifting")) and scheduler.get("shift", 1.0) == 1.0
    return "it embeds no guidance and its scheduler does not shift" if plain else ""


def output(out: Any, z: Tensor) -> Tensor:
    return shared.unpack(out[0], *z.shape[-2:])


def picture(returned: Any, model: Any, z: Tensor) -> Tensor:
    return shared.grid(returned[1], z, 2)


def text(pipeline: Any, prompts: Sequence[str], length: int, device: Any) -> list[dict[str, Tensor]]:
    tokens, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=device, max_sequence_length=length)
    return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled)]


def reader(encoders: set[str]) -> tuple[str, bool]:
    return "tokenizer_2", True
