"""Checkpoints in open_clip's layout (HPSv2, DFN, LAION's and their like): their architecture by their shapes, their weights as those of transformers' `CLIPModel`.

What shapes do not tell is stated: the activation, and how pictures come to the tower. It stands in `open_clip_config.json` beside the file, or is known by a name.
"""

from __future__ import annotations

import hashlib
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import CLIPConfig

from rlstitch.files import read_json
from rlstitch.types import UserError

Activation = Literal["gelu", "quick_gelu"]
SETTINGS = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")  # as its hub names them
KNOWN = {  # by what a file or its folder is called: activation, and how other sizes are brought to the tower's
    r"hps": ("gelu", "longest_pad"),
    r"dfn": ("quick_gelu", "squash"),
    r"openai": ("quick_gelu", "shortest_crop"),
    r"laion|datacomp|pickscore": ("gelu", "shortest_crop"),
}
HPS = {"fd9180de357abf01fdb4eaad64631db4": "2.0", "4067542e34ba2553a738c5ac6c1d75c0": "2.1"}  # versions by the md5 of xswu/HPSv2's files
ODD_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}  # of image towers whose heads are not 64 wide (ViT-H, g, bigG, e)
COUNTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # what OpenAI's own files hold beside weights
TOWER = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"
}  # fmt: skip
NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
    **{
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in (
            ("visual.ln_pre", "vision_model.pre_layrnorm"),
            ("visual.ln_post", "vision_model.post_layernorm"),
            ("ln_final", "text_model.final_layer_norm"),
        )
        for part in ("weight", "bias")
    },
}
TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # [width, D] there, a Linear's here
INNER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
FUSED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what trainers put before the names (`module.`, and `text.` of a text tower that is a module of its own), and without counts."""
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return {name.removeprefix("text."): value for name, value in state.items() if name not in COUNTS}


def architecture(state: dict[str, Tensor], settings: dict[str, Any], what: str) -> dict[str, Any]:
    """`vision_config`, `text_config` and `projection_dim` of transformers by the shapes of `plain` tensors; heads by `settings`, else as open_clip's models have them.
    Raises UserError where they are of no plain ViT with a text transformer."""
    model = settings.get("model_cfg") or {}
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    if odd := [k for known, told in ((TOWER, vision), (TEXT, text)) for k, v in told.items() if k not in known and v not in (None, False)]:
        raise UserError(f"{what} is of a kind that is not read here: its {SETTINGS} has {', '.join(sorted(odd))}")
    shape = {name: list(value.shape) for name, value in state.items()}
    for beginning, kind in (
        ("visual.trunk.", "a model of timm"),
        ("visual.layer1.", "a ResNet"),
        ("visual.head.", "a model of another kind"),
    ):
        if any(name.startswith(beginning) for name in shape):
            raise UserError(
                f"{what} has an image tower that is {kind} ({beginning}*), and only a plain ViT is read here: take the model in transformers' layout"
            )
    needed = (
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.proj",
        "token_embedding.weight",
        "positional_embedding",
        "text_projection",
    )
    if lacking := [name for name in needed if name not in shape]:
        raise UserError(
            f"{what} is no CLIP in open_clip's layout: it has no {', no '.join(lacking)} but {', '.join(sorted(shape)[:3])}, ...; a model in transformers' layout is given as its folder"
        )
    width, _, patch, _ = shape["visual.conv1.weight"]
    grid = math.isqrt(shape["visual.positional_embedding"][0] - 1)
    if grid**2 + 1 != shape["visual.positional_embedding"][0]:
        raise UserError(f"{what} has {shape['visual.positional_embedding'][0]} positions, which are no square of patches and a [CLS]")
    vocabulary, inner = shape["token_embedding.weight"]
    heads = width // vision["head_width"] if vision.get("head_width") else ODD_HEADS.get(width, width // 64 if width % 64 == 0 else 0)
    text_heads = text.get("heads") or (inner // 64 if inner % 64 == 0 else 0)
    if not heads or width % heads or not text_heads or inner % text_heads:
        raise UserError(
            f"{what} has towers of width {width} and {inner}, whose heads are told by no rule: put the {SETTINGS} of the model beside the file"
        )

    def tower(start: str, width: int, heads: int) -> dict[str, int]:
        blocks = {int(found[2]) for name in shape if (found := INNER.fullmatch(name)) and (found[1] or "") == start}
        hidden = shape.get(f"{start}transformer.resblocks.0.mlp.c_fc.weight", [4 * width])[0]
        return {"hidden_size": width, "num_hidden_layers": len(blocks), "num_attention_heads": heads, "intermediate_size": hidden}

    return {
        "projection_dim": shape["visual.proj"][-1],
        "vision_config": tower("visual.", width, heads) | {"patch_size": patch, "image_size": grid * patch},
        "text_config": tower("", inner, text_heads)
        | {"vocab_size": vocabulary, "max_position_embeddings": shape["positional_embedding"][0]},
    }


def configuration(found: dict[str, Any], activation: Activation, ends: int) -> CLIPConfig:
    """Of transformers' model, by `architecture`; ends: the token that a prompt ends with, where the text is read off."""
    told = {"hidden_act": activation, "projection_dim": found["projection_dim"]}
    tokens = {"eos_token_id": ends, "bos_token_id": None, "pad_token_id": None}
    return CLIPConfig(
        projection_dim=found["projection_dim"],
        vision_config=found["vision_config"] | told,
        text_config=found["text_config"] | told | tokens,
    )


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`plain` tensors under the names of transformers' CLIPModel; what is unknown keeps its own, to be told as that."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in TURNED:
            out[TURNED[name]] = value.T.contiguous()
        elif name in NAMES:
            out[NAMES[name]] = value
        elif found := FUSED.fullmatch(name):
            for part, rows in zip("qkv", value.chunk(3)):
                out[f"{_layer(found)}.self_attn.{part}_proj.{found[3]}"] = rows.contiguous()
        elif (found := INNER.fullmatch(name)) and found[3] in BLOCK:
            out[f"{_layer(found)}.{BLOCK[found[3]]}.{found[4]}"] = value
        else:
            out[name] = value
    return out


def _layer(found: re.Match[str]) -> str:
    return f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"


# ---------------------------------------------------------------------------------------------------- what shapes do not tell


def settings(folder: Path | None) -> dict[str, Any]:
    """What open_clip_config.json of a folder says; nothing where there is none."""
    file = None if folder is None else folder / SETTINGS
    return read_json(file, "the reward model's settings") if file is not None and file.is_file() else {}


def known(name: str) -> tuple[Activation, str] | None:
    """(activation, resize) by what a checkpoint is called: its file and the folder or repository that it lies in."""
    called = "/".join(name.split("/")[-2:]).lower()
    return next((said for pattern, said in KNOWN.items() if re.search(pattern, called)), None)


def activation_of(name: str, told: dict[str, Any], given: Activation | None) -> Activation:
    """Of the MLPs: given, by open_clip_config.json, or by a known name. Raises UserError where none says so: weights do not tell, and the wrong one scores a little wrong."""
    if given is not None:
        return given
    if "model_cfg" in told:
        return "quick_gelu" if told["model_cfg"].get("quick_gelu") else "gelu"
    if (found := known(name)) is None:
        raise UserError(
            f"'{name}' does not tell its activation, which no weight does: set activation: quick_gelu (OpenAI's and Apple's DFN models) or gelu (LAION's, HPSv2, PickScore)"
        )
    return found[0]


def another(name: str, file: Path, found: dict[str, Any]) -> str:
    """Why a checkpoint that is called HPSv2 is not that, by its shapes, or is another version than its name says, by its md5; '' where nothing speaks against it."""
    claim = re.search(r"hps[_-]?v?2(?:[._]?([01]))?_compressed", name.lower())
    if claim is None:
        return ""
    vision = found["vision_config"]
    if (size := [vision[k] for k in ("hidden_size", "num_hidden_layers", "patch_size", "image_size")]) != [1280, 32, 14, 224]:
        return f"is called HPSv2, which is a ViT-H/14 of 32 blocks for 224 pixels, and holds one of {size[1]} blocks of width {size[0]}, patches of {size[2]}, for {size[3]} pixels"
    said, version = f"2.{claim[1] or 0}", HPS.get(_md5(file, file.stat().st_size, file.stat().st_mtime_ns))
    return f"is called HPSv{said}, and by its md5 is HPSv{version}: give the file its own name" if version not in (None, said) else ""


@lru_cache(maxsize=8)
def _md5(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
