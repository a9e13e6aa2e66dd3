"""The strict way to load a model's weights: none is made up, none is left out, and no code of a file's is run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlstitch.files import PICKLES, not_finite, opened, read_tensors, weight_files, worthless
from rlstitch.types import UserError

COUNTS = ("num_batches_tracked",)  # of a batch norm, which are whole numbers
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SPARE = ("lm_head.", "decoder.", "text_projection.")  # what a whole language model has behind the encoder that is asked for
ALIGNMENT = 64  # bytes, of what torch allocates on a CPU
BENIGN = ("position_ids",)  # buffers that older libraries saved, counted from 0 again by the newer ones


def whole_files(folder: Path, what: str, variant: str | None = None) -> tuple[str | None, list[Path]]:
    """`files.weight_files` of a part, of which the headers have been read. Raises UserError where a file is cut or empty, and where what it holds is quantised."""
    variant, files = weight_files(folder, what, variant)
    for file in files:
        with opened(file) as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys() if not name.endswith((*BENIGN, *COUNTS))}  # noqa: SIM118
        if odd := [name for name, kind in kinds.items() if kind not in FLOATS]:
            raise UserError(
                f"{what} in {folder} has {len(odd)} tensors that are no floating-point numbers, e.g. {odd[0]} ({kinds[odd[0]]}) in {file.name}: it is quantised or damaged; take the files in float32, bfloat16 or float16"
            )
    return variant, files


def load_strictly(cls: Any, folder: Path, what: str, *, variant: str | None = None, **options: Any) -> Any:
    """cls.from_pretrained(folder) of diffusers or transformers, refused where a weight would be random or be left out.

    Raises UserError that names the missing, unexpected and misshapen weights (buffers of positions apart), and those that are no numbers.
    """
    variant, _ = whole_files(folder, what, variant)
    return _strictly(cls, folder, folder, what, variant=variant, use_safetensors=True, local_files_only=True, **options)


def fill_strictly(cls: Any, config: Any, state: dict[str, Tensor], source: Path, what: str, **options: Any) -> Any:
    """The same of a model of transformers by its configuration, from tensors that were read from `source`."""
    return _strictly(cls, None, source, what, config=config, state_dict=state, **options)


def _strictly(cls: Any, given: Path | None, folder: Path, what: str, **options: Any) -> Any:
    spare = ()
    if cls.__module__.startswith("transformers."):
        spare = SPARE
        options["ignore_mismatched_sizes"] = True  # they are told below, by name
    try:
        model, told = cls.from_pretrained(given, output_loading_info=True, **options)
    except Exception as error:  # both libraries raise many kinds for a damaged file
        raise UserError(
            f"{what} of {folder} cannot be loaded: {str(error).strip().splitlines()[0][:300] or type(error).__name__}"
        ) from error
    kinds = {"are missing": "missing_keys", "are unknown to it": "unexpected_keys", "have another shape": "mismatched_keys"}
    odd = []
    for kind, key in kinds.items():
        names = sorted(n for entry in told[key] if not (n := entry if isinstance(entry, str) else entry[0]).endswith(BENIGN))
        names = [n for n in names if kind != "are unknown to it" or not n.startswith(spare)]
        odd += [f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"] if names else []
    if odd:
        raise UserError(
            f"{what} of {folder} cannot be loaded: of the weights of {cls.__name__}, {'; '.join(odd)}. The file is of another model or is incomplete: download or convert it again"
        )
    state = model.state_dict()
    # what was quantised as it was loaded is unpacked one at a time
    packed = {name: t for name, t in state.items() if is_traceable_wrapper_subclass(t)}
    why = next((told for name, t in packed.items() if (told := not_finite({name: t.dequantize()}))), "")
    if why := why or worthless({name: t for name, t in state.items() if name not in packed}):
        raise UserError(f"{what} of {folder} cannot be loaded: {why}. Download or convert it again")
    return model


def settled(model: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """A loaded model as it is asked: on its device and frozen. On a CPU every weight lies where torch itself would put it: some loads leave it within a mapped file, at any
    place, on which the last bits of a product depend, so that one process and several ranks would not compute the same."""
    model = model.to(device) if dtype is None else model.to(device, dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (nn.Parameter, Tensor) and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model.requires_grad_(False).eval()


def read_checkpoint(path: Path, what: str, *, shapes: bool = False) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, or of a pickle in which there is nothing but tensors and plain values: torch.load(weights_only=True) runs no code of it.

    Those under `state_dict` where a trainer has put them there. shapes: on the meta device, without numbers. Raises UserError, in one line, for any other file.
    """
    if path.suffix not in PICKLES:
        if not shapes:
            return read_tensors(path)
        with opened(path) as tensors:
            return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in tensors.keys()}  # noqa: SIM118
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="meta" if shapes else "cpu", weights_only=True)
    except Exception as error:  # it raises many kinds for what is no such file
        text = " ".join(str(error).split())
        code = re.search(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL) (\S+)", text)
        why = (
            f"it names {code[1]}, which would be run" if code
            else "it is a TorchScript archive, which is a program" if "TorchScript" in text
            else f"{type(error).__name__} {text[:100]}".strip()
        )  # fmt: skip
        raise UserError(
            f"{what} {path} is a pickle that torch.load does not read with weights_only=True ({why}), and otherwise it could run code: take the model's file in safetensors, or download it again"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise UserError(f"{what} {path} holds no tensors by name but {type(found).__name__}: take the file that the model was published in")
    if odd := [str(name) for name, value in found.items() if not isinstance(value, Tensor) or not isinstance(name, str)]:
        raise UserError(f"{what} {path} holds {len(odd)} entries that are no tensors, e.g. {odd[0][:80]}: take a file of weights alone")
    return dict(found)
