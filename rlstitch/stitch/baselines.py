"""What a stitched value is held against (arXiv:2605.19804): the VAE stitch, NoisyCLIP, and a preference head on diffusion features (DiNa-LRM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlstitch import schedule
from rlstitch.stitch.distill import DistillConfig, draw_sigma
from rlstitch.stitch.layer import StitchLayer, view_of
from rlstitch.stitch.model import LatentPrefix, StitchedValueModel
from rlstitch.stitch.search import fit
from rlstitch.types import Batch, Latent, UserError


def _on_latents(
    backbone: Any, reward: Any, stitch: StitchLayer, fold: int, norm: float, normalise: bool, card: dict[str, Any]
) -> StitchedValueModel:
    card = {"prefix": "latent", "fold": fold, "blocks": 0, "reward_block": 1} | card
    return StitchedValueModel(
        LatentPrefix(fold), backbone.null, stitch, reward.tail(1), reward, normalise=normalise, norm=norm, sigma_range=(0.0, 1.0), card=card
    )


@torch.no_grad()
def vae_stitch(
    backbone: Any,
    reward: Any,
    images: Tensor,
    latents: Tensor,
    *,
    norm: float,
    normalise: bool,
    seed: int = 0,
    card: dict[str, Any] | None = None,
) -> StitchedValueModel:
    """No denoiser in front: a closed-form stitch from z_sigma to the reward's patch embeddings (sigma ~ U[0, 1]), ready to be distilled like any other."""
    generator = torch.Generator().manual_seed(seed)
    sigma = draw_sigma(len(latents), DistillConfig(uniform_share=1.0), (0.0, 1.0), generator).to(latents.device)
    z = schedule.interpolate(latents, torch.randn(latents.shape, generator=generator).to(latents.device), sigma)
    stitch = fit(z, reward.patches(images.to(latents.device)), reward.grid, view=view_of(reward, backbone.size))
    return _on_latents(backbone, reward, stitch, 1, norm, normalise, card or {})


def noisy_clip(
    backbone: Any, reward: Any, *, norm: float, normalise: bool, seed: int = 0, card: dict[str, Any] | None = None
) -> StitchedValueModel:
    """The reward model retrained on noisy latents: whole patches of the latent through a projection that starts at random, then the reward's own weights."""
    channels, *sides = backbone.latent_shape
    fold = max(k for k in range(1, max(1, min(sides) // reward.grid) + 1) if not any(side % k for side in sides))
    width = channels * fold**2
    weight = torch.randn(reward.width, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5
    stitch = StitchLayer(weight, torch.zeros(reward.width), reward.grid, view_of(reward, backbone.size)).to(backbone.device)
    return _on_latents(backbone, reward, stitch, fold, norm, normalise, card or {})


class PreferenceHead(nn.Module):
    """DiNa-LRM in small: a scalar head on the frozen denoiser's image tokens after `blocks` blocks **under the prompt**, pooled by learned queries.

    It knows pictures only through preference pairs; `value(latent, batch)` like any value model. Only the head is trained.
    """

    sigma_range = (0.0, 1.0)

    def __init__(self, backbone: Any, blocks: int, queries: int = 4, seed: int = 0):
        super().__init__()
        width = backbone.width
        self.backbone, self.blocks = [backbone], blocks  # in a list, so that the frozen denoiser is no submodule
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(width)
            self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
            self.key, self.content = nn.Linear(width, width), nn.Linear(width, width)
            self.score = nn.Sequential(nn.Linear(queries * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))
        self.to(backbone.device)

    def features(self, latent: Latent, batch: Batch) -> Tensor:
        """Frozen image tokens [B, N, W]."""
        if batch.text is None:
            raise UserError("a preference head reads the denoiser under the prompt: the batch needs its encoded prompts")
        with torch.set_grad_enabled(torch.is_grad_enabled() and latent.z.requires_grad):
            return self.backbone[0].prefix(latent.z, latent.sigma, self.blocks, batch.text).grid.flatten(2).transpose(1, 2).float()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens)
        attention = (self.queries @ self.key(x).transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1)
        return self.score((attention @ self.content(x)).flatten(1))[:, 0]

    def value(self, latent: Latent, batch: Batch) -> Tensor:
        return self(self.features(latent, batch))


def train_preference_head(
    head: PreferenceHead,
    pair: tuple[Tensor, Tensor],
    prompts: Sequence[str],
    text: Any,
    first_wins: Tensor,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    config: DistillConfig | None = None,
) -> float:
    """Bradley-Terry on pairs of clean latents [N, ...], both noised to one level with one noise; returns the last hundred steps' mean loss."""
    generator, config = torch.Generator().manual_seed(seed), config or DistillConfig(uniform_share=0.3)
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    head.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - 0.98 * step / steps)
        index = torch.randint(len(first_wins), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *pair[0].shape[1:], generator=generator).to(pair[0].device)
        sigma = draw_sigma(batch_size, config, head.sigma_range, generator).to(noise.device)
        batch = Batch([prompts[i] for i in index.tolist()], index, index, [], text[index.to(text.device)])
        first, second = (head.value(Latent(schedule.interpolate(side[index], noise, sigma), sigma), batch) for side in pair)
        sign = (2 * first_wins[index].float() - 1).to(first.device)
        loss = F.softplus(-sign * (first - second)).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
    head.eval()
    return sum(losses[-100:]) / len(losses[-100:])
