"""The strict way to load a model's weights: none is made up, none is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlstitch.files import not_finite, opened, weight_files, worthless
from rlstitch.types import UserError

COUNTS = ("num_batches_tracked",)  # of a batch norm, which are whole numbers
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SPARE = ("lm_head.", "decoder.", "text_projection.")  # what a whole language model has behind the encoder that is asked for
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
    spare = ()
    if cls.__module__.startswith("transformers."):
        spare = SPARE
        options["ignore_mismatched_sizes"] = True  # they are told below, by name
    try:
        model, told = cls.from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
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
