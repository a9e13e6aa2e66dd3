"""Qwen-Image: double blocks alone, text of any length under a mask, an autoencoder for video given one frame, guidance brought back to the conditional's norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.linalg import vector_norm
from transformers import Qwen2_5_VLForConditionalGeneration

from rlstitch.backbones import autoencoders, shared
from rlstitch.types import Conditioning

PIPELINE, TRANSFORMER, VAE = QwenImagePipeline, QwenImageTransformer2DModel, AutoencoderKLQwenImage
ENCODERS = {"text_encoder": Qwen2_5_VLForConditionalGeneration}
OPTIONAL, LIMITED = (), {}
LISTS, STREAMS, BEFORE, TAIL = ("transformer_blocks",), (2,), (), ("norm_out", "proj_out")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT = ("tokens",)
MAX_SEQUENCE_LENGTH, NEGATIVE, EMBEDDED, MASKED, WINDOW = 512, " ", None, True, False
VAES = autoencoders.OneFrame
shift, prepare, largest, reader, few_steps = shared.shift, shared.nothing, shared.unlimited, shared.by_key, shared.unsaid
to_pipeline, from_pipeline = shared.pack, shared.unpack


def latent(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int, int]:
    factor = VAES.factor(vae)
    return transformer["in_channels"] // 4, factor, 2, 128 * factor


def inputs(model: Any, z: Tensor, sigma: Tensor, text: Conditioning, embedded: float | None) -> dict[str, Any]:
    return {
        "hidden_states": shared.pack(z),
        "timestep": shared.time(sigma, z),
        "encoder_hidden_states": text.tokens,
        "encoder_hidden_states_mask": text.get("mask"),
        "img_shapes": [[(1, z.shape[-2] // 2, z.shape[-1] // 2)]] * len(z),
        "return_dict": False,
    }


def output(out: Any, z: Tensor) -> Tensor:
    return shared.unpack(out[0], *z.shape[-2:])


def picture(returned: Any, model: Any, z: Tensor) -> Tensor:
    return shared.grid(returned[1], z, 2)


def guided(v: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance whose tokens keep the length that they have in the conditional velocity."""
    mixed, own = shared.pack(shared.linear(v, null, scale)), shared.pack(v)
    length = vector_norm(mixed, dim=-1, keepdim=True).clamp_min(torch.finfo(mixed.dtype).tiny)  # a token that is zero stays so
    return shared.unpack(mixed * (vector_norm(own, dim=-1, keepdim=True) / length), *v.shape[-2:])


def text(pipeline: Any, prompts: Sequence[str], length: int, device: Any) -> list[dict[str, Tensor]]:
    tokens, mask = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)
    return [{"tokens": t if mask is None else t[mask[i].bool()]} for i, t in enumerate(tokens)]


def count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens behind the template that every prompt is put into."""
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=tokenizer, transformer=None)
    whole = shared.count(tokenizer, [pipeline.prompt_template_encode.format(p) for p in prompts])
    return [n - pipeline.prompt_template_encode_start_idx for n in whole]
