"""A LoRA from elsewhere as layers of a transformer: its names matched with the linears', or converted by diffusers; put on as a frozen adapter, or merged into the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlstitch import adapters
from rlstitch.adapters import Layers
from rlstitch.telling import say
from rlstitch.types import UserError


def linears(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear, by name."""
    return {n: (m.out_features, m.in_features) for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}


def fitting(path: str | Path, arch: Any, there: Mapping[str, tuple[int, int]], model: Any) -> tuple[Layers, int]:
    """(the layers of a LoRA file by the linears that they are on, how many tensors of text encoders it has beside).

    Names are those of the model's own linears, with dots or, as kohya's scripts flatten them, with underscores; others go through the converter of the
    architecture's pipeline. Raises UserError where they are none of this model's, or of another shape, and where not all is there that the file says.
    """
    adapter = adapters.read(path)
    flat = {name.replace(".", "_"): name for name in there}

    def named(layers: Layers) -> dict[str, str]:
        return {n: own if (own := adapters.bare(n)) in there else flat.get(own, "") for n in layers}

    layers, why = adapters.pairs(adapter.tensors, adapter.file), ""
    names, converted = named(layers), False
    if adapter.others or not all(names.values()):
        for given in (dict(adapter.tensors), *([] if adapter.others else [_flattened(layers)])):
            try:
                rows, given = _outputs(given), arch.PIPELINE.lora_state_dict(given)
                others = adapters.pairs(given, adapter.file)
                converted = all(named(others).values()) and len(given) == 2 * len(others) and _outputs(given) == rows
            except Exception as error:  # the converters raise many kinds for names that they do not know
                why = why or (f" ({str(error).strip().splitlines()[0][:120]})" if str(error).strip() else "")
            if converted:
                break
        if not converted:
            if adapter.others:
                raise UserError(
                    f"{adapter.file} is no LoRA: {len(adapter.others)} of its {len(adapter.tensors)} tensors are none of one, e.g. {adapter.others[0]}"
                )
            odd = sorted(n for n, own in names.items() if not own)
            raise UserError(
                f"the LoRA {adapter.file} does not fit model {model}: {len(odd)} of its {len(names)} layers are none of a {arch.TRANSFORMER.__name__}'s, e.g. {odd[0]}{why}. It was trained on another architecture, or has names that diffusers does not convert for this one."
            )
        layers, names = others, named(others)
    if len(set(names.values())) < len(names):
        raise UserError(f"the LoRA {adapter.file} gives layers twice, under two names")
    found = {names[n]: two for n, two in layers.items()}
    odd = {n for n, (a, b) in found.items() if a.ndim != 2 or b.ndim != 2 or (len(b), a.shape[1]) != there[n]}
    odd |= set() if converted else {n for n in there if adapter.expects(n)} - set(found)
    if odd:
        raise UserError(
            f"the LoRA {adapter.file} does not fit model {model}: {len(odd)} layers differ, e.g. {min(odd)}. It was trained on another architecture."
        )
    return found, adapter.text


def _flattened(layers: Layers) -> dict[str, Tensor]:
    """As kohya's scripts name them, which is the form in which the converters know the layers of a model's first code best."""
    flat = {f"lora_unet_{adapters.bare(n).replace('.', '_')}": two for n, two in layers.items()}
    tensors = {f"{n}.lora_{half}.weight": t for n, two in flat.items() for half, t in zip(("down", "up"), two)}
    return tensors | {f"{n}.alpha": torch.tensor(float(len(a))) for n, (a, _) in flat.items()}


def _outputs(tensors: Mapping[str, Tensor]) -> int:
    """Rows of all Bs: a converter keeps their number, which splits fused layers, where it leaves none out."""
    return sum(len(t) for n, t in tensors.items() if re.search(r"(lora_B|up)(\.\w+)?\.weight$", n))


def load(path: str | Path, backbone: Any) -> Layers:
    """`fitting` on a backbone, and what there is to say of it."""
    layers, text = fitting(path, backbone.arch, linears(backbone.transformer), backbone.path)
    if text:
        say(f"the LoRA {path} has {text} tensors for text encoders, which stay as they are: they are left out")
    return layers


def put_on(transformer: nn.Module, layers: Layers, name: str) -> None:
    """As a frozen adapter `name` of the transformer."""
    state = {f"{layer}.lora_{half}.weight": t for layer, two in layers.items() for half, t in zip("AB", two)}
    transformer.load_lora_adapter(state, prefix=None, adapter_name=name)
    transformer.requires_grad_(False)


@torch.no_grad()
def merge(transformer: nn.Module, several: Sequence[Layers]) -> None:
    """Into the weights, W + B A + ..., in float32 and rounded once."""
    for name in dict.fromkeys(name for layers in several for name in layers):
        weight = transformer.get_submodule(name).weight
        added = sum(b @ a for a, b in (layers[name] for layers in several if name in layers))
        weight.copy_(weight.float() + added.to(weight.device))
