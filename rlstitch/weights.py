"""The strict way to load a model's weights: none is made up, none is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlstitch.files import weight_files
from rlstitch.types import UserError

BENIGN = ("position_ids",)  # buffers that older libraries saved, counted from 0 again by the newer ones


def load_strictly(cls: Any, folder: Path, what: str, *, variant: str | None = None, **options: Any) -> Any:
    """cls.from_pretrained(folder) of diffusers or transformers, refused where a weight would be random or be left out.

    Raises UserError that names the missing, unexpected and misshapen weights (buffers of positions apart).
    """
    variant, _ = weight_files(folder, what, variant)
    if cls.__module__.startswith("transformers."):
        options["ignore_mismatched_sizes"] = True  # they are told below, by name
    try:
        model, told = cls.from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # both libraries raise many kinds for a damaged file
        raise UserError(f"{what} of {folder} cannot be loaded: {error}") from error
    kinds = {"are missing": "missing_keys", "are unknown to it": "unexpected_keys", "have another shape": "mismatched_keys"}
    odd = []
    for kind, key in kinds.items():
        names = sorted(n for entry in told[key] if not (n := entry if isinstance(entry, str) else entry[0]).endswith(BENIGN))
        odd += [f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"] if names else []
    if odd:
        raise UserError(
            f"{what} of {folder} cannot be loaded: of the weights of {cls.__name__}, {'; '.join(odd)}. The file is of another model or is incomplete: download or convert it again"
        )
    return model
