"""Autoencoders behind one pair of functions: pictures [B, 3, H, W] in [0, 1] <-> latents as the denoiser takes them. Both are differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KL:
    """AutoencoderKL: one scale and one shift for all channels (SD3, FLUX.1, Z-Image)."""

    @staticmethod
    def factor(config: dict[str, Any]) -> int:
        """Pixels a latent, along a side."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    @staticmethod
    def encode(vae: Any, images: Tensor) -> Tensor:
        mode = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode().float()
        return (mode - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @staticmethod
    def decode(vae: Any, z: Tensor) -> Tensor:
        raw = z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(raw.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


class OneFrame:
    """A video autoencoder that is given one frame, with a mean and a standard deviation for each channel (Qwen-Image)."""

    @staticmethod
    def factor(config: dict[str, Any]) -> int:
        return 2 ** len(config["temperal_downsample"])

    @staticmethod
    def _statistics(vae: Any, z: Tensor) -> list[Tensor]:
        return [torch.tensor(x, device=z.device).view(1, -1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)]

    @staticmethod
    def encode(vae: Any, images: Tensor) -> Tensor:
        mode = vae.encode((2 * images - 1).to(vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0].float()
        mean, std = OneFrame._statistics(vae, mode)
        return (mode - mean) / std

    @staticmethod
    def decode(vae: Any, z: Tensor) -> Tensor:
        mean, std = OneFrame._statistics(vae, z)
        return (vae.decode((z * std + mean).to(vae.dtype)[:, :, None]).sample[:, :, 0].float() / 2 + 0.5).clamp(0, 1)


class BatchNormed:
    """AutoencoderKLFlux2: 2 x 2 latents are one of four times the channels, brought to mean 0 and variance 1 by the running statistics of a batch norm (FLUX.2)."""

    @staticmethod
    def factor(config: dict[str, Any]) -> int:
        return 2 * KL.factor(config)

    @staticmethod
    def _statistics(vae: Any) -> list[Tensor]:
        std = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
        return [x.view(1, -1, 1, 1) for x in (vae.bn.running_mean.float(), std)]

    @staticmethod
    def encode(vae: Any, images: Tensor) -> Tensor:
        mode = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode().float()
        mean, std = BatchNormed._statistics(vae)
        return (torch.nn.functional.pixel_unshuffle(mode, 2) - mean) / std

    @staticmethod
    def decode(vae: Any, z: Tensor) -> Tensor:
        mean, std = BatchNormed._statistics(vae)
        raw = torch.nn.functional.pixel_shuffle(z * std + mean, 2)
        return (vae.decode(raw.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
