"""The VAE-stitched baseline: the reward's tail straight on the noisy latent, no denoiser in front (method.md 1, baseline a)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlstitch import schedule
from rlstitch.stitch.distill import DistillConfig, draw_sigma
from rlstitch.stitch.model import StitchedValueModel, StitchLayer, resample
from rlstitch.stitch.search import solve
from rlstitch.types import Conditioning


class IdentityPrefix(nn.Module):
    """A prefix of no block: the image stream is the latent itself."""

    def __init__(self):
        super().__init__()
        self.blocks: list[nn.Module] = []

    def forward(self, z: Tensor, sigma: Tensor, text: Conditioning) -> SimpleNamespace:
        return SimpleNamespace(grid=z)

    def fingerprint(self) -> str:
        return "identity"


@torch.no_grad()
def vae_stitch(backbone: Any, reward: Any, images: Tensor, latents: Tensor, *, norm: float, seed: int = 0) -> StitchedValueModel:
    """Closed-form stitch from z_sigma to the reward's patch embeddings (sigma ~ U[0, 1]), ready to be distilled like any other."""
    generator = torch.Generator().manual_seed(seed)
    sigma = draw_sigma(len(latents), DistillConfig(uniform_share=1.0), (0.0, 1.0), generator).to(latents.device)
    z = schedule.interpolate(latents, torch.randn(latents.shape, generator=generator).to(latents.device), sigma)
    f = resample(z.double(), reward.grid).flatten(2).transpose(1, 2).flatten(0, 1)
    g = reward.patches(images.to(latents.device)).double().flatten(0, 1)
    f_mean, g_mean = f.mean(0), g.mean(0)
    weight = solve((f - f_mean).T @ (f - f_mean), (f - f_mean).T @ (g - g_mean)).T
    stitch = StitchLayer(weight.float(), (g_mean - weight @ f_mean).float(), reward.grid).to(latents.device)
    return StitchedValueModel(
        IdentityPrefix(), backbone.null, stitch, reward.tail(1), reward, normalise=False, norm=norm, sigma_range=(0.0, 1.0), card={}
    )
