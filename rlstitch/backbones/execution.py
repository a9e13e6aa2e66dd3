"""How a transformer runs, beside what it computes: the kernel of its attention, compiled blocks, quantised weights. What a machine lacks for it is told before a
weight is read."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from diffusers.models import attention_dispatch as kernels
from diffusers.utils import logging
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlstitch import compiled
from rlstitch.backbones.shared import Architecture

KERNELS = [name.value for name in kernels.AttentionBackendName]
Quantised = Literal["nf4", "int8"]
LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao"}


def faults(arch: Architecture, options: dict[str, Any], transformer: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, why) of what this machine cannot do of what a recipe's model asks for, whose transformer has this configuration."""
    out, head = [], transformer.get("attention_head_dim") or transformer["dim"] // transformer["n_heads"]
    if options.get("dtype") == "float16" and not torch.cuda.is_available():
        return [("dtype", "float16 does not run on a CPU: take bfloat16 or float32")]
    if (name := options.get("attention")) is not None:
        why = _no_kernel(name, getattr(torch, options.get("dtype", "float32")), head, masked=arch.MASKED)
        out += [("attention", why)] if why else []
    if options.get("compile") and (why := compiled.lacking()):
        out.append(("compile", f"this machine lacks {why}, or leave it out"))
    if (kind := options.get("quantise")) is not None:
        library = LIBRARIES[kind]
        if find_spec(library) is None:
            out.append(
                ("quantise", f"{kind} is done by {library}, which is not installed: pip install 'rlstitch[{library}]', or leave it out")
            )
        elif kind == "nf4" and not torch.cuda.is_available():
            out.append(("quantise", "nf4 runs on a GPU, and this machine has none: take int8, or leave it out"))
        if options.get("merge"):
            out.append(
                (
                    "merge",
                    f"weights that are packed as they are read ({kind}) take nothing in: save the merged model first, or leave quantise out",
                )
            )
    return out


def _no_kernel(name: str, dtype: torch.dtype, head: int, *, masked: bool) -> str:
    """Why attention cannot be had by a backend of diffusers, on this machine and in this precision, with gradient; '' where it can."""
    usual = "leave it out for the usual one, native"
    if name not in KERNELS:
        return f"{name!r} is no attention backend of diffusers, which has {', '.join(k for k in KERNELS if not k.endswith('_hub'))}"
    if name.endswith("_hub"):
        own = name.removesuffix("_hub")
        return f"{name} fetches code and runs it, which is not done here: {f'install its library and take {own}, or ' * (own in KERNELS)}{usual}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 16, 2, head, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=device) if masked else None
    try:
        kernels._check_attention_backend_requirements(kernels.AttentionBackendName(name))
        with torch.enable_grad():
            kernels.dispatch_attention_fn(q, q, q, attn_mask=mask, backend=name).sum().backward()
    except Exception as error:  # kernels refuse a device, a precision, a mask or a gradient each in its own way
        told = " ".join(str(error).split())[:200].rstrip(".")
        what = f"{'masked ' * masked}attention of {str(dtype).removeprefix('torch.')} on {device}, with gradient"
        return f"{name} cannot do {what}, here ({told or type(error).__name__}): {usual}"
    return ""


def attend(transformer: Any, name: str) -> None:
    """Have a transformer's attention computed by a backend of diffusers, and no other model's."""
    before, level = kernels._AttentionBackendRegistry.get_active_backend()[0], logging.get_verbosity()
    logging.set_verbosity_error()  # it says of every model that this is an experiment of theirs
    try:
        transformer.set_attention_backend(name)
    finally:
        logging.set_verbosity(level)
        kernels._AttentionBackendRegistry.set_active_backend(before)


def unpacked(weight: Tensor) -> Tensor:
    """A weight as its linear computes with it, quantised or not."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.detach(), weight.quant_state)
    return weight.detach().dequantize() if is_traceable_wrapper_subclass(weight) else weight.detach()


def quantisation(kind: Quantised, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What diffusers' from_pretrained takes to hold a model's linears in 4 bits (NF4, arXiv:2305.14314) or 8, computed with in `dtype`, on a device."""
    if kind == "nf4":
        config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": config, **({} if device.type == "cpu" else {"device_map": {"": str(device)}})}
