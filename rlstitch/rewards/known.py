"""Towers of published rewards of the CLIP family, for where one is to be priced and its small files are not at hand. Text towers are of CLIP's usual size: they run once a prompt."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from rlstitch import hub
from rlstitch.files import write_json
from rlstitch.rewards import checkpoints
from rlstitch.types import UserError


def _clip(width: int, layers: int, patch: int, side: int, joint: int) -> dict[str, Any]:
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 16}
    return {
        "model_type": "clip",
        "projection_dim": joint,
        "vision_config": vision | {"patch_size": patch, "image_size": side},
        "text_config": {},
    }


_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
REWARDS: dict[str, dict[str, Any]] = {  # by hub id: config.json
    "openai/clip-vit-large-patch14": _clip(1024, 24, 14, 224, 768),
    "openai/clip-vit-large-patch14-336": _clip(1024, 24, 14, 336, 768),
    "yuvalkirstain/PickScore_v1": _clip(1280, 32, 14, 224, 1024),
    "xswu/HPSv2": _clip(1280, 32, 14, 224, 1024),
    "apple/DFN5B-CLIP-ViT-H-14-378": _clip(1280, 32, 14, 378, 1024),
    "google/siglip-so400m-patch14-384": {"model_type": "siglip", "vision_config": _SO400M, "text_config": {}},
    "google/siglip2-so400m-patch14-384": {"model_type": "siglip", "vision_config": _SO400M, "text_config": {}},
}


def weightless(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Options under which a reward is built on the meta device: by its own small files, else by those of a published one, written into `folder`. A head is left out, which
    costs nothing beside its tower. Raises UserError where neither is to be had."""
    own = {k: v for k, v in options.items() if k in ("resize", "activation")}
    with suppress(UserError):
        if checkpoints.here(checkpoints.source(options)):
            return own | {"path": options["path"]}
    name = (hub.parsed_file(options["path"], pickles=True) or hub.parsed(options["path"]) or [""])[0]
    if name not in REWARDS:
        raise UserError(f"{options['path']} is not here: hf download {name or options['path']} config.json")
    side = REWARDS[name]["vision_config"]["image_size"]
    write_json(folder / "config.json", REWARDS[name])
    write_json(
        folder / "preprocessor_config.json", {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    return own | {"path": str(folder)}
