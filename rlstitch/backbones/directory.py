"""An SD3 pipeline directory as it lies on disk: what is in it, and what keeps it from loading or running, told before a weight is read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from rlstitch.files import names_in, read_json, require, weight_files
from rlstitch.types import UserError
from rlstitch.weights import whole_files

PARTS = ("transformer", "vae")  # folders that are loaded at once
ENCODERS = {"text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection, "text_encoder_3": T5EncoderModel}


def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, why) of what keeps a recipe's model from loading or running, from its small files and its weights' names alone."""
    folder, out = require(options["path"], "the model directory"), []
    index = read_json(folder / "model_index.json", "the pipeline's index")
    if not str(name := index.get("_class_name")).startswith("StableDiffusion3"):
        return [("path", f"{folder} holds a {name}, not a StableDiffusion3Pipeline, which is what SD3Backbone takes")]
    variant = options.get("variant")
    for part in [*PARTS, *(n for n in ENCODERS if index.get(n, [None])[0] is not None)]:
        if not (folder / part / "config.json").is_file():
            spare = ", or, for a model without T5, set it and tokenizer_3 to [null, null] in that file" if part == "text_encoder_3" else ""
            out.append(("path", f"{folder} has no {part}/config.json, which its model_index.json names: download it whole{spare}"))
            continue
        try:
            whole_files(folder / part, f"the {part}", variant)
        except UserError as error:
            out.append(("path", str(error)))
    if out:
        return out
    transformer = read_json(folder / "transformer" / "config.json", "the transformer's config", patch_size=int, sample_size=int)
    vae = read_json(folder / "vae" / "config.json", "the vae's config", block_out_channels=list)
    saved = names_in(weight_files(folder / "vae", "the vae", variant)[1])
    lacking = [k for k in ("quant_conv", "post_quant_conv") if vae.get(f"use_{k}", True) and f"{k}.weight" not in saved]
    if lacking:
        told = " and ".join(f'"use_{k}": false' for k in lacking)
        out.append(
            (
                "path",
                f"{folder}/vae/config.json asks for {' and '.join(lacking)}, which its weights do not have (an older diffusers left that out): put {told} into it",
            )
        )
    scale, patch, size = 2 ** (len(vae["block_out_channels"]) - 1), transformer["patch_size"], options.get("image_size")
    if isinstance(size, int) and (size <= 0 or size % (scale * patch)):
        out.append(("image_size", f"{size} does not divide into patches of {scale * patch} pixels"))
    elif isinstance(size, int) and size > (most := transformer.get("pos_embed_max_size", 96) * scale * patch):
        out.append(("image_size", f"{size} is beyond the {most} pixels that this transformer has positions for"))
    if options.get("dtype") == "float16" and not torch.cuda.is_available():
        out.append(("dtype", "float16 does not run on a CPU: take bfloat16 or float32"))
    return out
