"""An SD3 pipeline directory as it lies on disk: what is in it, and what keeps it from loading or running, told before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from rlstitch.files import names_in, read_json, require, weight_files
from rlstitch.types import UserError
from rlstitch.weights import whole_files

PARTS = ("transformer", "vae")  # folders that are loaded at once
ENCODERS = {"text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection, "text_encoder_3": T5EncoderModel}

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # of those that cut prompts at the tokenizer's own limit
LONGEST = 100_000  # tokens; a tokenizer whose file says nothing has 1e30


def _limit(file: Path) -> None:
    """Raises UserError where a tokenizer does not say how many tokens its encoder takes."""
    if not 0 < (said := read_json(file, "the tokenizer's config", model_max_length=float)["model_max_length"]) <= LONGEST:
        raise UserError(
            f"the tokenizer's config {file} says model_max_length {said:g}, and no encoder takes that many tokens: restore it, or put 77 there (CLIP's)"
        )


def _not_positive(transformer: dict[str, Any], vae: dict[str, Any]) -> list[str]:
    """Numbers of the configurations that everything is divided by and cannot be."""
    told = [(f"transformer/config.json says {key}", transformer[key]) for key in ("patch_size", "sample_size")]
    told += [
        ("vae/config.json says block_out_channels", len(vae["block_out_channels"])),
        ("vae/config.json says scaling_factor", vae.get("scaling_factor", 1.0)),
    ]
    return [
        f"{what} {value}, which must be a positive number"
        for what, value in told
        if not (isinstance(value, int | float) and 0 < value < float("inf"))
    ]


def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, why) of what keeps a recipe's model from loading or running, from its small files and its weights' names alone."""
    folder, out = require(options["path"], "the model directory"), []
    index = read_json(folder / "model_index.json", "the pipeline's index")
    if not str(name := index.get("_class_name")).startswith("StableDiffusion3"):
        return [("path", f"{folder} holds a {name}, not a StableDiffusion3Pipeline, which is what SD3Backbone takes")]
    variant = options.get("variant")
    for part in ENCODERS:
        entry = index.get(part, [None, None])
        absent = part == "text_encoder_3" and entry == [None, None]
        if not absent and not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            out.append(
                (
                    "path",
                    f"{folder}/model_index.json says {part} is {str(entry)[:60]}, and SD3 takes a library and a class there: download it whole",
                )
            )
    if out:
        return out
    for part in [*PARTS, *(n for n in ENCODERS if index.get(n, [None])[0] is not None)]:
        if not (folder / part / "config.json").is_file():
            spare = ", or, for a model without T5, set it and tokenizer_3 to [null, null] in that file" if part == "text_encoder_3" else ""
            out.append(("path", f"{folder} has no {part}/config.json, which its model_index.json names: download it whole{spare}"))
            continue
        try:
            whole_files(folder / part, f"the {part}", variant)
            read_json(folder / part / "config.json", f"the config of the {part}")
            if part in TOKENIZERS:
                _limit(folder / TOKENIZERS[part] / "tokenizer_config.json")
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
    out += [("path", f"{folder}/{why}: restore it") for why in _not_positive(transformer, vae)]
    if out:
        return out
    scale, patch, size = 2 ** (len(vae["block_out_channels"]) - 1), transformer["patch_size"], options.get("image_size")
    if isinstance(size, int) and (size <= 0 or size % (scale * patch)):
        out.append(("image_size", f"{size} does not divide into patches of {scale * patch} pixels"))
    elif isinstance(size, int) and size > (most := transformer.get("pos_embed_max_size", 96) * scale * patch):
        out.append(("image_size", f"{size} is beyond the {most} pixels that this transformer has positions for"))
    if options.get("dtype") == "float16" and not torch.cuda.is_available():
        out.append(("dtype", "float16 does not run on a CPU: take bfloat16 or float32"))
    return out
