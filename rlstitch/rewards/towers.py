"""The two kinds of towers that picture and prompt are read by: CLIP's, whose image tower starts with [CLS] and reads it off, and SigLIP's, which has none and pools by
attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPModel, SiglipModel

Model = CLIPModel | SiglipModel
MODELS = {"clip": CLIPModel, "siglip": SiglipModel}  # by the `model_type` of a config.json


class VisionTail(nn.Module):
    """An image tower from block j on (1-based): tokens [B, N, W] -> (image embedding [B, D], all output tokens [B, N, W], with [CLS] first where the tower has one).

    j = 1 takes what the patch embedding produces, prepends [CLS] and adds positions, as the tower does. For j >= 2 the tokens carry their positions already; [CLS] starts
    from `cls`, a learnable vector. `cls` is None in a tower without.
    """

    def __init__(self, model: Model, j: int):
        super().__init__()
        vision, with_cls = model.vision_model, isinstance(model, CLIPModel)
        if not 1 <= j <= len(vision.encoder.layers):
            raise ValueError(f"a tower of {len(vision.encoder.layers)} blocks cannot be entered at block {j}")
        self.j = j
        own = vision.embeddings.class_embedding if with_cls else None
        self.cls = own if own is None or j == 1 else nn.Parameter(torch.zeros_like(own))
        if j == 1:
            self.positions = vision.embeddings.position_embedding
            self.before = vision.pre_layrnorm if with_cls else nn.Identity()
        self.layers = nn.ModuleList(vision.encoder.layers[j - 1 :])
        self.after, self.projection = vision.post_layernorm, model.visual_projection if with_cls else vision.head

    def enter(self, tokens: Tensor, cls: Tensor | None = None) -> Tensor:
        """What the first of its blocks takes [B, N (+ 1), W]."""
        first, x = self.cls if cls is None else cls, tokens
        if first is not None:
            x = torch.cat([first.expand(len(tokens), 1, -1) if first.ndim == 1 else first[:, None], tokens], 1)
        return self.before(x + self.positions.weight) if self.j == 1 else x

    def forward(self, tokens: Tensor, cls: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.enter(tokens, cls)
        for layer in self.layers:
            x = layer(x, None)
        return self.projection(self.after(x if self.cls is None else x[:, 0])), x


def read_text(model: Model, ids: Tensor) -> Tensor:
    """Text embeddings [B, D] of tokens [B, L], before normalisation. SigLIP's tower has no causal mask and sees the padding, so L is its whole window."""
    pooled = model.text_model(input_ids=ids).pooler_output
    return model.text_projection(pooled) if isinstance(model, CLIPModel) else pooled


def logit(model: Model) -> tuple[float, float]:
    """(scale, bias) of a cosine as the model itself gives it; only SigLIP has a bias."""
    bias = float(model.logit_bias.detach()) if isinstance(model, SiglipModel) else 0.0
    return float(model.logit_scale.detach().exp()), bias


def image_width(model: Model) -> int:
    """Channels D of an image embedding."""
    return model.config.projection_dim if isinstance(model, CLIPModel) else model.config.vision_config.hidden_size
