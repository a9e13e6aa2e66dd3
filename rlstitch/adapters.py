"""LoRA files from anywhere: found, read, everything that is no LoRA refused by its name, every scale folded in. Whose layers they are is the backbones' affair."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor

from rlstitch import hub
from rlstitch.files import PICKLES, not_finite, opened, read_json, read_tensors, require, sha256, worthless
from rlstitch.ranges import Count, NotNegative, misfit
from rlstitch.types import UserError

Layers = dict[str, tuple[Tensor, Tensor]]  # by a linear's name: A [r, in] and B [out, r], and B A is added to its weight

CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
OTHERS = {  # by what a tensor's name holds: adapters that are no LoRA, or more than one
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.boft_": "BOFT",
    r"\.oft_": "OFT",
    r"\.ia3_": "(IA)^3",
    r"vera_lambda": "VeRA",
    r"lora_E\b|ranknum": "AdaLoRA",
    r"lora_mid": "a LoRA of convolutions (lora_mid)",
    r"lora_embedding_": "a LoRA of embeddings",
    r"lora_(B|up)\.(\w+\.)?bias": "a LoRA with biases (lora_bias)",
    r"\.diff(_b)?$|\.(w|b)_norm$|modules_to_save": "weights to replace the model's own (diff, modules_to_save)",
}
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it is
SAID = {
    "r": Count,
    "lora_alpha": NotNegative,
    "rank_pattern": dict[str, Count],
    "alpha_pattern": dict[str, NotNegative],
    "use_rslora": bool,
}
TEXT = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d)?\.|text_model\.|lora_te\d?_|clip_[lg]\.|t5xxl\.)")
PREFIX = re.compile(r"(module\.)?(base_model\.model\.)?(transformer\.|(model\.)?diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)?")
PART = re.compile(r"(.+)\.(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up))(?:\.\w+)?\.weight|(.+)\.alpha")


@dataclass
class Adapter:
    """A LoRA file's content. tensors: by their names there, in float32, the scale of each layer in its B, so that every `.alpha` is the rank. text: how many more there
    are of text encoders. others: those whose names are no LoRA's as it is known here, which a converter of diffusers may know."""

    file: Path
    tensors: dict[str, Tensor]
    others: list[str]
    config: LoraConfig | None
    text: int

    def expects(self, name: str) -> bool:
        """Whether it says that it is on a linear of this name."""
        return self.config is not None and self.config.target_modules is not None and bool(check_target_module_exists(self.config, name))


def listed(paths: str | Sequence[str] | None) -> list[str]:
    """One path, several or none, as a list."""
    return [paths] if isinstance(paths, str) else list(paths or ())


def find(path: str | Path) -> Path:
    """The safetensors file of a LoRA: itself, that of a folder as diffusers or PEFT wrote it, the only one of a folder, or that of a run's `lora/`; of a hub id (of a
    repository, or owner/name/FILE.safetensors), as `hub.file` has it. Raises UserError where there is none, or several."""
    if hub.parsed_file(path):
        return hub.file(str(path), "the LoRA", _picked, beside=[CONFIG])
    found = require(path, "the LoRA")
    if found.is_file():
        return found
    inner = found / "lora"
    if (found / "recipe.yaml").is_file() and not any(inner.glob("*.safetensors")):
        raise UserError(f"the run {path} has no LoRA in its lora/ yet: that is written when it ends")
    folder = inner if any(inner.glob("*.safetensors")) and not any(found.glob("*.safetensors")) else found
    return folder / _picked([f.name for f in sorted(folder.iterdir())], str(folder))


def pinned(paths: str | Sequence[str] | None) -> Any:
    """The same with every hub id as the file and the commit that it stands for."""
    if isinstance(paths, str) and (named := hub.parsed_file(paths)):
        file = find(paths)
        commit = hub.commit_of(file)
        return f"{named[0]}/{str(file).rpartition(f'/{commit}/')[2]}@{commit}"
    return [pinned(path) for path in paths] if isinstance(paths, list) else paths


def _picked(names: list[str], where: str) -> str:
    """The LoRA among a folder's files: as diffusers or PEFT name it, or the only safetensors file."""
    files = [n for n in names if n.endswith(".safetensors")]
    named = [n for n in (LORA_WEIGHT_NAME_SAFE, PEFT_FILE) if n in files]
    if named or len(files) == 1:
        return (named or files)[0]
    if files:
        raise UserError(f"{where} holds {len(files)} safetensors files ({', '.join(files[:5])}): name the LoRA's own")
    pickled = [n for n in names if Path(n).suffix in PICKLES]
    raise UserError(
        f"{where} holds no LoRA in safetensors"
        + (
            f", only {', '.join(pickled[:3])}, which can run code and is not read here"
            if pickled
            else f" (such as {LORA_WEIGHT_NAME_SAFE})"
        )
    )


def fingerprint(path: str | Path) -> str:
    """Of all that a LoRA does: its file, and the configuration beside it."""
    file = find(path)
    parts = [sha256(f) for f in (file, file.with_name(CONFIG)) if f.is_file()]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def matching(target: str, names: Iterable[str]) -> list[str]:
    """Those of some modules' names that a target of LoRA is about: that are it or end in it, or that a pattern with * fits."""
    return [n for n in names if (fnmatchcase(n, target) if "*" in target else n == target or n.endswith(f".{target}"))]


def bare(name: str) -> str:
    """A layer's or tensor's name without what trainers put before it, and what torch.compile puts into it."""
    name = name.replace("_orig_mod.", "")
    return name[PREFIX.match(name).end() :]


def pairs(tensors: Mapping[str, Tensor], file: Path) -> Layers:
    """The A and B of each layer, by its name with what stands before it. Raises UserError where one of the two is missing or their ranks differ."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if (part := PART.fullmatch(name)) and part[1]:
            half = "A" if part["A"] else "B"
            if half in found.setdefault(part[1], {}):
                raise UserError(f"the LoRA {file} gives {part[1]} twice")
            found[part[1]][half] = value
    if odd := sorted(
        n for n, two in found.items() if len(two) < 2 or two["A"].ndim < 2 or not len(two["A"]) or two["A"].shape[:1] != two["B"].shape[1:2]
    ):
        raise UserError(
            f"the LoRA {file} is damaged: {len(odd)} of its {len(found)} layers lack A or B, or their ranks differ, e.g. {odd[0]}"
        )
    return {name: (two["A"], two["B"]) for name, two in found.items()}


def read(path: str | Path) -> Adapter:
    """A LoRA as diffusers, PEFT or kohya's scripts write it. Raises UserError where it is none, is damaged, holds numbers that are not finite, or does not say its scale."""
    file = find(path)
    tensors = read_tensors(file)
    for pattern, kind in OTHERS.items():
        if odd := [n for n in tensors if re.search(pattern, n)]:
            raise UserError(
                f"{file} is not a plain LoRA: it holds {kind}, e.g. {odd[0]}, which would be left out: merge it where it was trained, or train a plain one"
            )
    text = {n for n in tensors if TEXT.match(n)}
    own = {n: t for n, t in tensors.items() if n not in text}
    if not own:
        raise UserError(f"the LoRA {file} is {'for text encoders alone, which are not changed here' if text else 'empty'}")
    if odd := [n for n, t in own.items() if not t.is_floating_point() and not n.endswith(".alpha")]:
        raise UserError(
            f"the LoRA {file} has {len(odd)} tensors that are no floating-point numbers, e.g. {odd[0]}: it is quantised or damaged"
        )
    own = {n: t.float() for n, t in own.items()}
    config = _config(file, own)
    scaled = _scaled(own, config, file)
    if told := not_finite(own) or not_finite(scaled) or worthless({n: t for n, t in own.items() if not n.endswith(".alpha")}):
        raise UserError(f"the LoRA {file} is worth nothing: {told}. Take the file from where it came from again")
    return Adapter(file, scaled, [n for n in own if not PART.fullmatch(n)], config, len(text))


def _config(file: Path, tensors: Mapping[str, Tensor]) -> LoraConfig | None:
    """What the file's header says of the adapter, or, where names are PEFT's, the configuration beside it."""
    peft, told, what = any(n.startswith("base_model.") for n in tensors), {}, f"the header of the LoRA {file}"
    with opened(file) as content:
        header = (content.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if header is not None:
        try:
            told = json.loads(header)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{what} is not JSON ({error})") from error
        if not isinstance(told, dict):
            raise UserError(f"{what} holds {type(told).__name__}, not names and values")
        own = {k.removeprefix("transformer."): v for k, v in told.items() if k.startswith("transformer.")}
        told = own or {k: v for k, v in told.items() if "." not in k}
    elif (beside := file.with_name(CONFIG)).is_file() and (peft or all(n == bare(n) for n in tensors)):
        told, what = read_json(beside, "the adapter's configuration"), f"the adapter's configuration {beside}"
    elif peft:
        raise UserError(
            f"the LoRA {file} has PEFT's names and no {CONFIG} beside it, which says by what it is scaled: put it there, or write one with its r and lora_alpha"
        )
    if not told:
        return None
    if (kind := str(told.get("peft_type", "LORA"))) != "LORA":
        raise UserError(f"{what} says {kind}: that is not a plain LoRA")
    extra = [
        k
        for k in (
            "use_dora",
            "lora_bias",
            "use_qalora",
            "modules_to_save",
            "target_parameters",
            "layer_replication",
            "trainable_token_indices",
        )
        if told.get(k)
    ]
    if extra or told.get("init_lora_weights") not in PLAIN:
        raise UserError(
            f"{what} asks for {', '.join(extra) or 'init_lora_weights ' + str(told['init_lora_weights'])}, which is more than a plain LoRA: merge it where it was trained"
        )
    if lacking := [k for k in ("r", "lora_alpha") if told.get(k) is None]:
        raise UserError(f"{what} does not say {' and '.join(lacking)}, by which it is scaled")
    picked = {k: told[k] for k in SAID if told.get(k) is not None}
    if wrong := [f"{k!r} {fault}" for k, v in picked.items() if (fault := misfit(v, SAID[k]))]:
        raise UserError(f"{what}: {'; '.join(wrong)}")
    where = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    targets = {k: told[k] for k in where if told.get(k) is not None} if told.get("target_modules") != "all-linear" else {}
    try:
        config = LoraConfig(**picked, **targets)
        check_target_module_exists(config, "a.0.b") if targets else None  # its patterns are read
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            get_pattern_key([pattern], "a.0.b")
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{what} cannot be read ({str(error).splitlines()[0]})") from error
    return config


def _scaled(tensors: dict[str, Tensor], config: LoraConfig | None, file: Path) -> dict[str, Tensor]:
    """The same with every layer's scale in its B."""
    out, layers = dict(tensors), pairs(tensors, file)
    if strays := [n for n in tensors if n.endswith(".alpha") and n.removesuffix(".alpha") not in layers]:
        raise UserError(f"the LoRA {file} is damaged: {len(strays)} scales are of no layer, e.g. {strays[0]}")
    if config is not None and (twice := [n for n in tensors if n.endswith(".alpha")]):
        raise UserError(f"the LoRA {file} says its scale twice, by its configuration and by tensors such as {twice[0]}")
    for name, (down, _) in layers.items():
        rank, alpha, divisor = len(down), float(len(down)), float(len(down))
        if config is not None:
            own = bare(name)
            wanted = config.rank_pattern.get(get_pattern_key(config.rank_pattern, own), config.r)
            if wanted != rank:
                raise UserError(f"the LoRA {file} does not fit its own configuration: {own} has rank {rank}, which says {wanted}")
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, own), config.lora_alpha)
            divisor = math.sqrt(rank) if config.use_rslora else rank
        elif (told := tensors.get(f"{name}.alpha")) is not None:
            if told.numel() != 1:
                raise UserError(f"the LoRA {file} is damaged: {name}.alpha holds {told.numel()} numbers, not one")
            alpha, out[f"{name}.alpha"] = float(told), torch.tensor(float(rank))
        if alpha != divisor:
            (up,) = (n for n in tensors if (part := PART.fullmatch(n)) and part[1] == name and part["B"])
            out[up] = tensors[up] * (alpha / divisor)
    return out
