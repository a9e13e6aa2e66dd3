"""Stable Diffusion 3 and 3.5 (MM-DiT, arXiv:2403.03206): dual attention or not, qk-norm or none, any patch size, with and without T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from rlstitch import scheduler
from rlstitch.backbones import autoencoders, core, shared
from rlstitch.backbones.attention import PlainJointAttention
from rlstitch.types import Conditioning

PIPELINE, TRANSFORMER, VAE = StableDiffusion3Pipeline, SD3Transformer2DModel, AutoencoderKL
ENCODERS = {"text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection, "text_encoder_3": T5EncoderModel}
OPTIONAL, LIMITED = ("text_encoder_3",), {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
LISTS, STREAMS, BEFORE, TAIL = ("transformer_blocks",), (2,), (), ("norm_out", "proj_out")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT = ("tokens", "pooled")
MAX_SEQUENCE_LENGTH, NEGATIVE, EMBEDDED, MASKED, WINDOW = 256, "", None, False, True
VAES = autoencoders.KL
guided, shift, count, few_steps = shared.linear, scheduler.of_file, shared.count, shared.unsaid
to_pipeline = from_pipeline = shared.as_it_is

SD3Backbone = core.Diffusers  # what older recipes and cards call it


def latent(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int, int]:
    """Channels of a latent, pixels of one along a side, latents of a token along a side, the model's own side in pixels."""
    factor = VAES.factor(vae)
    return transformer["in_channels"], factor, transformer["patch_size"], transformer["sample_size"] * factor


def largest(transformer: dict[str, Any]) -> int:
    """Tokens along a side that there are positions for."""
    return transformer["pos_embed_max_size"]


def prepare(transformer: Any, device: str, attention: str | None) -> None:
    if device == "cpu" or attention:
        transformer.set_attn_processor(PlainJointAttention())


def inputs(model: Any, z: Tensor, sigma: Tensor, text: Conditioning, embedded: float | None) -> dict[str, Any]:
    return {
        "hidden_states": z, "timestep": 1000 * sigma, "encoder_hidden_states": text.tokens, "pooled_projections": text.pooled, "return_dict": False,
    }  # fmt: skip


def output(out: Any, z: Tensor) -> Tensor:
    return out[0]


def picture(returned: Any, model: Any, z: Tensor) -> Tensor:
    return shared.grid(returned[1], z, model.config.patch_size)


def text(pipeline: Any, prompts: Sequence[str], length: int, device: Any) -> list[dict[str, Tensor]]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), None, None, do_classifier_free_guidance=False, device=device, max_sequence_length=length
    )
    return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled)]


def reader(encoders: set[str]) -> tuple[str, bool]:
    """(folder of the tokenizer that decides how long a prompt may be, whether max_sequence_length is its limit)."""
    return ("tokenizer_3", True) if "text_encoder_3" in encoders else ("tokenizer", False)
