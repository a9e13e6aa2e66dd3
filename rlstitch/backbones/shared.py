"""What several architectures have in common, and how a pipeline directory tells which one it is.

An architecture is a module of this package, stateless; what it must hold stands in `Architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch import scheduler
from rlstitch.adapters import matching
from rlstitch.files import read_json
from rlstitch.filling import nearest
from rlstitch.hub import model_folder
from rlstitch.schedule import Shift
from rlstitch.types import Conditioning, UserError

# by the pipeline's class in model_index.json
ARCHITECTURES = {
    "StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux", "Flux2KleinPipeline": "flux2", "QwenImagePipeline": "qwen", "ZImagePipeline": "zimage",
}  # fmt: skip
LIBRARIES = ("diffusers", "transformers")


class Architecture(Protocol):
    """What is known of an architecture beside its own forward, which is run as it is.

    The maths' latents z [B, C, H, W] are never packed; velocities are noise minus data; sigma is in [0, 1]. What a transformer takes otherwise is turned in `inputs` and `output`.
    """

    PIPELINE: Any
    TRANSFORMER: Any
    VAE: Any
    VAES: Any  # how it is used, of backbones.autoencoders
    ENCODERS: dict[str, Any]  # classes of the text encoders by folder; a model may lack the optional ones
    OPTIONAL: Sequence[str]  # of the encoders, those that a model may be without
    LIMITED: dict[str, str]  # tokenizers that cut prompts at a limit of their own, by encoder
    LISTS: Sequence[str]  # module lists of blocks, in the order in which they run
    STREAMS: Sequence[int]  # tensors that a block of each list returns
    BEFORE: Sequence[str]  # lists of refiners ahead of them
    TAIL: Sequence[str]  # modules that run behind the last block
    LORA_TARGETS: Sequence[str]  # ends of linears' names; one with a * is of whole names
    TEXT: Sequence[str]  # fields of its Conditioning beside the mask
    MAX_SEQUENCE_LENGTH: int  # tokens of a prompt, by default
    NEGATIVE: str  # the prompt of guidance's other branch
    EMBEDDED: float | None  # guidance that a model distilled with it is told, by default
    MASKED: bool  # whether attention is given a mask where prompts differ in length
    WINDOW: bool  # whether CLIP's window of tokens stands before those of max_sequence_length

    def latent(self, transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int, int]: ...
    def largest(self, transformer: dict[str, Any]) -> int | None: ...
    def prepare(self, transformer: Any, device: str, attention: str | None) -> None: ...
    def inputs(self, model: Any, z: Tensor, sigma: Tensor, text: Conditioning, embedded: float | None) -> dict[str, Any]: ...
    def output(self, out: Any, z: Tensor) -> Tensor: ...
    def picture(self, returned: Any, model: Any, z: Tensor) -> Tensor: ...  # of a block -> [B, W, h, w]
    def guided(self, v: Tensor, null: Tensor, scale: float) -> Tensor: ...
    def text(self, pipeline: Any, prompts: Sequence[str], length: int, device: Any) -> list[dict[str, Tensor]]: ...  # unpadded
    def reader(self, encoders: set[str]) -> tuple[str, bool]: ...  # the tokenizer that limits a prompt; whether a key is the limit
    def count(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]: ...
    def shift(self, settings: dict[str, Any], tokens: int | None) -> Shift: ...
    def few_steps(self, transformer: dict[str, Any], scheduler: dict[str, Any]) -> str: ...  # what of the files says that it is distilled
    def to_pipeline(self, z: Tensor) -> Tensor: ...  # latents as the stock pipeline hands them to callbacks
    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor: ...


def architecture(path: str | Path) -> Architecture:
    """The architecture of a pipeline directory, by the class that its model_index.json names. Raises UserError for one that is not known, and where the file takes a
    part from elsewhere than LIBRARIES: it would be imported."""
    folder = model_folder(path)
    index = read_json(folder / "model_index.json", "the pipeline's index")
    name = str(index.get("_class_name"))
    if name not in ARCHITECTURES:
        raise UserError(f"{folder} holds a {name}, and what is known here is {', '.join(ARCHITECTURES)}")
    pairs = {part: entry for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)}
    if odd := [f"{part} from {entry[0]!r}" for part, entry in pairs.items() if entry[0] not in LIBRARIES]:
        raise UserError(f"{folder}/model_index.json takes {', '.join(odd)}, and parts are taken from {' and '.join(LIBRARIES)} alone")
    return import_module(f"rlstitch.backbones.{ARCHITECTURES[name]}")


def lora_targets(arch: Architecture, transformer: Any, own: Sequence[str] = ()) -> tuple[str, ...]:
    """What LoRA goes on, a recipe's `own` or the architecture's, with every * filled in."""
    names = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    return tuple(name for t in own or arch.LORA_TARGETS for name in (matching(t, names) if "*" in t else [t]))


def targets_fault(arch: Architecture, transformer: Any, own: Sequence[str]) -> str:
    """Why LoRA cannot go on a recipe's `own` targets, or on the architecture's: one is of nothing, or of what is no linear, or a block would have none; '' where it can."""
    modules, told = dict(transformer.named_modules()), []
    linears = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear)]
    for target in own:
        if not (hit := matching(target, linears)):
            told.append(f"{target!r} is the end of no linear's name in a {type(transformer).__name__}{nearest(target, _ends(linears))}")
        elif other := set(matching(target, modules) if "*" not in target else hit) - set(linears):
            told.append(f"{target!r} is also {min(other)}, which is no linear: write more of the name")
    on = [n for target in own or arch.LORA_TARGETS for n in matching(target, linears)]
    blocks = [f"{group}.{k}" for group in (*arch.BEFORE, *arch.LISTS) for k in range(len(getattr(transformer, group)))]
    if not told and (left := [b for b in blocks if not any(n.startswith(f"{b}.") for n in on)]):
        shown = ", ".join(left[:6]) + (", ..." if len(left) > 6 else "")
        told.append(f"{len(left)} of {len(blocks)} blocks would have no LoRA and learn nothing: {shown}; add a linear of theirs")
    return "; ".join(told)


def _ends(names: Sequence[str]) -> list[str]:
    """What a target may be: the names of linears without the blocks that they are in."""
    return sorted(
        {re.sub(r"^.*\.\d+\.(?=\D)", "", n) for n in names} | {n for name in names if not (n := name.rsplit(".", 1)[-1]).isdigit()}
    )


def linear(v: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_null + w (v - v_null)."""
    return null + scale * (v - null)


def shift(settings: dict[str, Any], tokens: int | None) -> Shift:
    """What the scheduler's file says, on the evenly spaced grid that most pipelines hand to it."""
    return replace(scheduler.of_file(settings, tokens), spacing="plain")


def count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(prompts)).input_ids]


def by_key(encoders: set[str]) -> tuple[str, bool]:
    """A prompt may be as long as the key max_sequence_length says, by the only tokenizer."""
    return "tokenizer", True


def chat_count(tokenizer: Any, prompts: Sequence[str], *, enable_thinking: bool) -> list[int]:
    """Tokens of prompts in the tokenizer's chat template."""
    said = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return count(
        tokenizer,
        [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking) for m in said],
    )


def nothing(transformer: Any, device: str, attention: str | None) -> None:
    """There is nothing to prepare."""


def unlimited(transformer: dict[str, Any]) -> None:
    """Positions are computed: a picture may have any size."""


FEW_STEPS = re.compile(r"(?<![a-z])(turbo|schnell|lightning|hyper|lcm|dmd2?|distil(led)?|[1-9][0-9]?-?steps?)(?![a-z])", re.IGNORECASE)


def distilled(path: str | Path) -> str:
    """What says that a pipeline directory holds a model that was distilled to few steps: its configurations, or else its name; '' where nothing does."""
    folder, arch = model_folder(path), architecture(path)
    files = [folder / "model_index.json", folder / "transformer" / "config.json", folder / "scheduler" / "scheduler_config.json"]
    index, *configs = (read_json(f, "the model's configuration") if f.is_file() else {} for f in files)
    if said := "its model_index.json says is_distilled" if index.get("is_distilled") else arch.few_steps(*configs):
        return said
    parts = Path(path).parts  # a cache of the hub has the name above its revisions
    name = parts[-3] if "snapshots" in parts[-2:-1] and len(parts) > 2 else parts[-1]
    return f"its name says {found[0]}" if (found := FEW_STEPS.search(name)) else ""


def unsaid(transformer: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """Nothing of the files tells a distilled model from its base."""
    return ""


def time(sigma: Tensor, z: Tensor) -> Tensor:
    """sigma as the pipelines hand it over, rounded to the latents' precision."""
    return (1000 * sigma).to(z.dtype) / 1000


def as_it_is(latents: Tensor, *_: int) -> Tensor:
    return latents


def grid(tokens: Tensor, z: Tensor, patch: int) -> Tensor:
    """Tokens [B, N, W] of the patches of z, row by row, as a map [B, W, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, (z.shape[-2] // patch, z.shape[-1] // patch))


def pack(z: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 W/2, 4 C]: a token is a 2 x 2 patch, channel by channel."""
    return F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Back to [B, C, height, width]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def positions(height: int, width: int, device: torch.device, axes: int = 3) -> Tensor:
    """[height width, axes]: row and column of each token in the second and the third place, zeros elsewhere."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)[None]
    return ids.flatten(0, 1)
