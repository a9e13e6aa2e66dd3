"""What studies of a stitch share: denoiser, reward, scenes and held-out pictures of a shipped stitch recipe, built once for many value models."""

from __future__ import annotations

import torch

from rlstitch import config as cfg
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.distill import latents_of, targets_of


class Material:
    """recipe, backbone, reward; images with their `latents` and `targets` (embeddings, tokens, norm); `prompts` and `held` (latents, embeddings) of the held-out pictures."""

    def __init__(self, reward: str, images: int):
        self.recipe = stitch.checked(cfg.compose(f"stitch_{reward}"), f"stitch_{reward}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.backbone, self.reward = cfg.build(self.recipe.model, device=device), cfg.build(self.recipe.reward, device=device)
        self.images, _ = cfg.build(self.recipe.images | {"n": images})
        self.latents, self.targets = latents_of(self.backbone, self.images), targets_of(self.reward, self.images)
        held, self.prompts = cfg.build(self.recipe.held_out)
        self.held = latents_of(self.backbone, held), targets_of(self.reward, held)[0]
