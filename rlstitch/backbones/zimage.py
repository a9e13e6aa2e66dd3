"""Z-Image: one stream of picture and text behind refiners of each. Its network gives data minus noise, at 1 - sigma; its pipeline's guidance_scale is rlstitch's
guidance minus 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Model

from rlstitch.backbones import autoencoders, shared
from rlstitch.types import Conditioning

PIPELINE, TRANSFORMER, VAE = ZImagePipeline, ZImageTransformer2DModel, AutoencoderKL
ENCODERS = {"text_encoder": Qwen3Model}
OPTIONAL, LIMITED = (), {}
LISTS, STREAMS, BEFORE, TAIL = ("layers",), (1,), ("noise_refiner", "context_refiner"), ("all_final_layer",)
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("tokens",)
MAX_SEQUENCE_LENGTH, NEGATIVE, EMBEDDED, MASKED, WINDOW = 512, "", None, True, False
VAES = autoencoders.KL
guided, shift, prepare, largest, reader = shared.linear, shared.shift, shared.nothing, shared.unlimited, shared.by_key
to_pipeline = from_pipeline = shared.as_it_is


def latent(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int, int]:
    return transformer["in_channels"], VAES.factor(vae), 2, 1024


def inputs(model: Any, z: Tensor, sigma: Tensor, text: Conditioning, embedded: float | None) -> dict[str, Any]:
    return {
        "x": list(z.unsqueeze(2).unbind()),
        "t": (1000 - 1000 * sigma.float()) / 1000,  # rounded as its pipeline does
        "cap_feats": [row["tokens"] for row in text.rows()],
        "return_dict": False,
    }


def few_steps(transformer: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """The base is shifted by 6."""
    return "its scheduler shifts by 3, as Z-Image-Turbo's does" if scheduler.get("shift") == 3 else ""


def output(out: Any, z: Tensor) -> Tensor:
    return -torch.stack(list(out[0])).squeeze(2)


def picture(returned: Any, model: Any, z: Tensor) -> Tensor:
    return shared.grid(returned[:, : z.shape[-2] * z.shape[-1] // 4], z, 2)


def text(pipeline: Any, prompts: Sequence[str], length: int, device: Any) -> list[dict[str, Tensor]]:
    rows, _ = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=length)
    return [{"tokens": row} for row in rows]


def count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    return shared.chat_count(tokenizer, prompts, enable_thinking=True)
