"""A LoRA that was trained elsewhere, put on a frozen transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import nn

from rlstitch.files import read_weights, require
from rlstitch.types import UserError


def load_lora(backbone: Any, folder: str | Path) -> None:
    """Put a trained LoRA on a backbone's transformer: the `lora/` of a run, or any folder that diffusers wrote.

    Raises UserError where the file is missing, corrupt, or was trained on another architecture.
    """
    file = require(Path(require(folder, "the LoRA folder")) / LORA_WEIGHT_NAME_SAFE, "the LoRA's weights")
    tensors, pipeline = read_weights(file), backbone.arch.PIPELINE
    state, *_, metadata = pipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, local_files_only=True, return_lora_metadata=True
    )
    linears = {n: m for n, m in backbone.transformer.named_modules() if isinstance(m, nn.Linear)}
    targets = tuple((metadata or {}).get("transformer.target_modules", ()))
    odd = {n for n in linears if targets and n.endswith(targets)}  # what it should be on and is not, or is on and should not be
    for name, value in tensors.items():
        layer, _, kind = name.removeprefix("transformer.").partition(".lora_")
        linear, down = linears.get(layer), kind.startswith("A")
        if linear is not None and value.shape[down] == (linear.in_features if down else linear.out_features):
            odd.discard(layer)
        else:
            odd.add(layer)
    if odd:
        raise UserError(
            f"the LoRA in {folder} does not fit model {backbone.path}: {len(odd)} layers differ, e.g. {min(odd)}. It was trained on another architecture."
        )
    backbone.transformer.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    backbone.transformer.requires_grad_(False)
