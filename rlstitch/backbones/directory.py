"""A pipeline directory as it lies on disk: what is in it, and what keeps it from loading or running, told before a weight is read."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlstitch import adapters
from rlstitch.backbones import execution, loras
from rlstitch.backbones.shared import Architecture, architecture
from rlstitch.files import names_in, read_json, weight_files
from rlstitch.hub import missing, model_folder
from rlstitch.types import UserError
from rlstitch.weights import load_strictly, settled, whole_files

PARTS = ("transformer", "vae")  # folders that are loaded at once


def load(
    cls: Any,
    path: Path,
    part: str,
    dtype: torch.dtype,
    variant: str | None,
    device: torch.device,
    quantise: execution.Quantised | None = None,
) -> Any:
    """One part of a pipeline, frozen; on the meta device without its weights."""
    if device.type == "meta":
        with device:
            return cls.from_config(cls.load_config(path / part)).to(dtype).requires_grad_(False).eval()
    how = {} if quantise is None else execution.quantisation(quantise, dtype, device)
    model = load_strictly(cls, path / part, f"the {part}", variant=variant, dtype=dtype, **how)
    return settled(model, device)


MOST_BLOCKS = 1000  # of a transformer in its configuration; building a million would take for ever


def skeleton(path: str | Path) -> nn.Module:
    """The transformer of a directory without weights, from its configuration alone. Raises UserError where there can be none such."""
    file = model_folder(path) / "transformer" / "config.json"
    return _skeleton(architecture(path).TRANSFORMER, file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _skeleton(cls: Any, file: Path, written: int) -> nn.Module:
    try:
        with torch.device("meta"):
            return cls.from_config(cls.load_config(file.parent))
    except Exception as error:  # a configuration can be wrong in many ways
        raise UserError(f"{file} describes no {cls.__name__} ({str(error).strip().splitlines()[0][:200]}): restore it") from error


def encoders(arch: Architecture, folder: Path) -> set[str]:
    """The text encoders that a directory has, of those that its architecture knows."""
    index = read_json(folder / "model_index.json", "the pipeline's index")
    return {name for name in arch.ENCODERS if index.get(name) not in (None, [None, None])}


def left_out(options: dict[str, Any]) -> set[str]:
    """The text encoders that a recipe's model is to go without, though its directory may have them."""
    return {key for key, value in options.items() if key.startswith("text_encoder") and value == "none"}


def needs(options: dict[str, Any]) -> list[str]:
    """The parts of a recipe's model whose weights are loaded."""
    folder = model_folder(options["path"])
    return [*PARTS, *sorted(encoders(architecture(folder), folder) - left_out(options))]


def _needed(arch: Architecture, options: dict[str, Any]) -> list[tuple[str, str]]:
    needed = left_out(options) - set(arch.OPTIONAL)
    return [(key, f"{arch.PIPELINE.__name__} has no text without its {key}: leave the key out") for key in sorted(needed)]


def _configs(arch: Architecture, folder: Path) -> list[dict[str, Any]]:
    """config.json of transformer and autoencoder, with what it leaves out as the class has it by default."""
    out = []
    for part, cls in zip(PARTS, (arch.TRANSFORMER, arch.VAE)):
        usual = {n: p.default for n, p in inspect.signature(cls.__init__).parameters.items() if p.default is not inspect.Parameter.empty}
        out.append(usual | {k: v for k, v in read_json(folder / part / "config.json", f"the {part}'s config").items() if v is not None})
    return out


def _others(arch: Architecture, folder: Path) -> list[str]:
    """Parts that are not what their pipeline is made of."""
    out = []
    for part, cls in zip(PARTS, (arch.TRANSFORMER, arch.VAE)):
        name = read_json(folder / part / "config.json", f"the {part}'s config").get("_class_name", cls.__name__)
        if name != cls.__name__:
            out.append(f"{folder}/{part}/config.json is of a {name}, and a {arch.PIPELINE.__name__} has a {cls.__name__}")
    return out


LONGEST = 100_000  # tokens; a tokenizer whose file says nothing has 1e30


def _limit(file: Path) -> None:
    """Raises UserError where a tokenizer does not say how many tokens its encoder takes."""
    if not 0 < (said := read_json(file, "the tokenizer's config", model_max_length=float)["model_max_length"]) <= LONGEST:
        raise UserError(
            f"the tokenizer's config {file} says model_max_length {said:g}, and no encoder takes that many tokens: restore it, or put 77 there (CLIP's)"
        )


def _absurd(transformer: dict[str, Any], vae: dict[str, Any]) -> list[str]:
    """Numbers of the configurations that everything is divided by and cannot be, or that nothing can be built of."""
    told = [
        (f"transformer/config.json says {key}", transformer[key])
        for key in ("patch_size", "sample_size", "in_channels")
        if key in transformer
    ]
    told += [("vae/config.json says block_out_channels", len(vae["block_out_channels"]))] if "block_out_channels" in vae else []
    told += [("vae/config.json says scaling_factor", vae["scaling_factor"])] if "scaling_factor" in vae else []
    many = [f"{key} {value}" for key, value in transformer.items() if "layers" in key and isinstance(value, int) and value > MOST_BLOCKS]
    return [
        f"{what} {value}, which must be a positive number"
        for what, value in told
        if not (isinstance(value, int | float) and 0 < value < float("inf"))
    ] + [f"transformer/config.json says {told}, and no model has more than {MOST_BLOCKS} of a kind" for told in many]


def sizes(path: str | Path, height: int | None = None, width: int | None = None) -> tuple[tuple[int, ...], tuple[int, int], int]:
    """(a latent's shape, the picture's height and width, its tokens in the transformer) of a directory, from its configurations alone. Raises UserError where a size
    does not divide into patches."""
    folder, arch = model_folder(path), architecture(path)
    transformer, vae = _configs(arch, folder)
    channels, factor, patch, own = arch.latent(transformer, vae)
    size = (height or own, width or own)
    if odd := [side for side in size if side % (factor * patch)]:
        raise UserError(f"{odd[0]} does not divide into patches of {factor * patch} pixels")
    latent = [side // factor for side in size]
    tokens = (latent[0] // patch) * (latent[1] // patch)
    most = arch.largest(transformer)
    if most is not None and max(latent) // patch > most:
        raise UserError(f"{max(size)} is beyond the {most * factor * patch} pixels that this transformer has positions for")
    return (channels, *latent), size, tokens


def unable(path: str | Path, **options: Any) -> str:
    """What a model, or this machine, cannot do of what it is asked to run with; '' where there is nothing."""
    folder, arch = model_folder(path), architecture(path)
    return "; ".join(f"{key}: {why}" for key, why in _needed(arch, options) + execution.faults(arch, options, _configs(arch, folder)[0]))


def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, why) of what keeps a recipe's model from loading or running, from its small files and the names of its weights, as far as these are here."""
    folder, out = model_folder(options["path"]), []
    try:
        arch = architecture(folder)
    except UserError as error:
        return [("path", str(error))]
    variant, without = options.get("variant"), left_out(options)
    if needed := _needed(arch, options):
        return needed
    index = read_json(folder / "model_index.json", "the pipeline's index")
    for part in arch.ENCODERS:
        entry = index.get(part, [None, None])
        absent = part in arch.OPTIONAL and (entry == [None, None] or part in without)
        if not absent and not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            why = f"says {part} is {str(entry)[:60]}, and {arch.PIPELINE.__name__} takes a library and a class there: download it whole"
            out.append(("path", f"{folder}/model_index.json {why}"))
    if out:
        return out
    parts = needs(options)
    try:
        coming = {name.split("/")[0] for name in missing(options["path"], parts, variant)}
    except UserError as error:
        return [("path", str(error))]
    for part in parts:
        if not (folder / part / "config.json").is_file():
            spare = f", or set model.{part}=none (or in that file it and its tokenizer to [null, null])" if part in arch.OPTIONAL else ""
            out.append(("path", f"{folder} has no {part}/config.json, which its model_index.json names: download it whole{spare}"))
            continue
        try:
            if part not in coming:
                whole_files(folder / part, f"the {part}", variant)
            read_json(folder / part / "config.json", f"the config of the {part}")
            words = folder / part.replace("text_encoder", "tokenizer") / "tokenizer_config.json"
            if part in arch.ENCODERS and not words.is_file():
                raise UserError(f"{folder} has no {words.relative_to(folder)}, without which its {part} reads no prompt: download it whole")
            if part in arch.LIMITED:
                _limit(folder / arch.LIMITED[part] / "tokenizer_config.json")
        except UserError as error:
            out.append(("path", str(error)))
    out += [] if out else [("path", why) for why in _others(arch, folder)]
    if variant and not (out or coming) and all(weight_files(folder / part, f"the {part}", variant)[0] != variant for part in parts):
        out.append(("variant", f"no part of {folder} has weights of a variant {variant!r}: leave it out for those that are there"))
    if out:
        return out
    transformer, vae = _configs(arch, folder)
    saved = set() if "vae" in coming else names_in(weight_files(folder / "vae", "the vae", variant)[1])
    lacking = [k for k in ("quant_conv", "post_quant_conv") if saved and vae.get(f"use_{k}") and f"{k}.weight" not in saved]
    if lacking:
        told = " and ".join(f'"use_{k}": false' for k in lacking)
        out.append(
            (
                "path",
                f"{folder}/vae/config.json asks for {' and '.join(lacking)}, which its weights do not have (an older diffusers left that out): put {told} into it",
            )
        )
    out += [("path", f"{folder}/{why}: restore it") for why in _absurd(transformer, vae)]
    if out:
        return out
    for key in ("image_size", "height", "width"):
        if isinstance(side := options.get(key), int):
            try:
                sizes(folder, side, side)
            except UserError as error:
                out.append((key, str(error)))
    sides = {key: options.get(key) for key in ("height", "width")}
    if sum(side is None for side in sides.values()) == 1 and options.get("image_size") is None:
        given, lacking = sorted(sides, key=lambda key: sides[key] is None)
        out.append((given, f"{sides[given]} stands alone: give {lacking}, too, or image_size for a square"))
    if transformer.get("guidance_embeds") and arch.EMBEDDED is None:
        out.append(
            ("path", f"{folder} is distilled with its guidance (guidance_embeds), and a {arch.PIPELINE.__name__} tells its model none")
        )
    if options.get("embedded_guidance") is not None and not transformer.get("guidance_embeds"):
        out.append(("embedded_guidance", f"{folder} was not distilled with guidance and has no embedding of it: leave it out"))
    out += execution.faults(arch, options, transformer)
    for lora in adapters.listed(options.get("merge")):
        try:
            loras.fitting(lora, arch, loras.linears(skeleton(folder)), options["path"])
        except UserError as error:
            out.append(("merge", str(error)))
    return out
