"""Configurations of published models, for where a model is to be priced and its small files are not at hand. What is left out is its class's default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlstitch import hub
from rlstitch.files import write_json
from rlstitch.types import UserError

_KL = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_SD3 = {
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "qk_norm": "rms_norm",
}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # by hub id: the pipeline's class, the transformer's configuration, the autoencoder's
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        _SD3 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
        _KL,
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "StableDiffusion3Pipeline", _SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}, _KL
    ),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", {"guidance_embeds": True}, _KL),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        "Flux2KleinPipeline",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
        {},
    ),
    "Qwen/Qwen-Image": ("QwenImagePipeline", {}, {}),
    "Tongyi-MAI/Z-Image": ("ZImagePipeline", {}, _KL),
}  # fmt: skip


def weightless(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Options under which a model is built on the meta device: by its own small files, else by those of a published one, written into `folder`. Raises UserError where
    neither is to be had."""
    own = {k: v for k, v in options.items() if k not in ("quantise", "compile", "merge", "cache", "attention", "variant")}
    try:
        hub.model_folder(path := options["path"])
        return own
    except UserError:
        name = (hub.parsed(path) or [""])[0]
        if name not in MODELS:
            raise
    pipeline, transformer, vae = MODELS[name]
    write_json(folder / "model_index.json", {"_class_name": pipeline})
    for part, config in (("transformer", transformer), ("vae", vae)):
        write_json(folder / part / "config.json", config)
    return own | {"path": str(folder)}
