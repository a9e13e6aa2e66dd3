"""HunyuanImage-2.1 as far as its blocks are counted (benchmarks.stitch_cost): a module like those of rlstitch.backbones, without what running it would take.

Its text is that of both encoders, 1000 tokens of one and 128 of the other, all taken as the first's: the second's projection, one small network, is not counted.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLHunyuanImage, HunyuanImageTransformer2DModel
from torch import Tensor

from rlstitch.backbones import shared
from rlstitch.types import Conditioning

TRANSFORMER, VAE = HunyuanImageTransformer2DModel, AutoencoderKLHunyuanImage
LISTS, STREAMS, BEFORE, TAIL = ("transformer_blocks", "single_transformer_blocks"), (2, 2), (), ("norm_out", "proj_out")


class VAES:
    @staticmethod
    def encode(vae: Any, images: Tensor) -> Tensor:
        return vae.encode(2 * images - 1).latent_dist.mode().float() * vae.config.scaling_factor


def latent(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int, int]:
    factor = vae["spatial_compression_ratio"]
    return transformer["in_channels"], factor, 1, 64 * factor


def inputs(model: Any, z: Tensor, sigma: Tensor, text: Conditioning, embedded: float | None) -> dict[str, Any]:
    return {
        "hidden_states": z,
        "timestep": 1000 * sigma,
        "encoder_hidden_states": text.tokens,
        "encoder_attention_mask": text.tokens.new_ones(text.tokens.shape[:2]),
        "return_dict": False,
    }


def picture(returned: Any, model: Any, z: Tensor) -> Tensor:
    return shared.grid(returned[0], z, 1)
