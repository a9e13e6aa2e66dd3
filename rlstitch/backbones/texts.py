"""Prompts as a denoiser sees them: encoded once by the pipeline's own encoders, which are loaded for that alone, and kept on disk, each prompt as long as it is."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlstitch.backbones import directory
from rlstitch.backbones.shared import Architecture, architecture
from rlstitch.cache import is_kept, keep, kept
from rlstitch.files import read_json
from rlstitch.fingerprints import weights_fingerprint, words_fingerprint
from rlstitch.hub import SMALL, model_folder
from rlstitch.telling import progress
from rlstitch.types import Conditioning, UserError

CLIP, USUAL = 77, 64  # tokens: of CLIP's window, and of a prompt where nothing says how long it is


class Texts:
    """The encoders of a pipeline directory. length: tokens of the longest prompt, for those that have no limit of their own; without: encoders that are left out;
    cache: a folder, or None."""

    def __init__(
        self,
        arch: Architecture,
        path: Path,
        transformer: Any,
        *,
        dtype: torch.dtype,
        variant: str | None,
        device: torch.device,
        length: int,
        without: Collection[str],
        cache: Path | None,
    ):
        self.arch, self.path, self.transformer = arch, path, transformer
        self.dtype, self.variant, self.device, self.length, self.without, self.cache = dtype, variant, device, length, without, cache
        self._folder: Path | None = None
        self._null: dict[str, Tensor] | None = None  # text of the prompt of guidance's other branch, once it is known
        self._stay: ExitStack | None = None  # until when encoders that are loaded now stay
        self._pipeline: Any = None

    def fingerprint(self) -> str:
        """Of everything that a prompt's text depends on, and of nothing that lies beside that."""
        parts = sorted(directory.encoders(self.arch, self.path) - set(self.without))
        prints = [
            weights_fingerprint(self.path, name, self.variant) + words_fingerprint([self.path / name / "config.json"]) for name in parts
        ]
        prints += [words_fingerprint(f for kind in SMALL for f in folder.glob(kind)) for folder in sorted(self.path.glob("tokenizer*"))]
        left_out = "".join(f":{name}" for name in sorted(self.without))
        return hashlib.sha256(f"{parts}:{prints}:{self.length}:{self.dtype}{left_out}".encode()).hexdigest()[:20]

    def blank(self) -> Conditioning:
        """Text [1, ...] of the shape that a prompt's has, without numbers: a prompt of `USUAL` tokens where they differ in length."""
        config, length = self.transformer.config, min(self.length, USUAL) if self.arch.MASKED else self.length
        said = self.path / "tokenizer" / "tokenizer_config.json"
        window = read_json(said, "the tokenizer's config").get("model_max_length", CLIP) if said.is_file() else CLIP
        tokens = max(1, length + window * self.arch.WINDOW), config.get("joint_attention_dim") or config.get("cap_feat_dim")
        shapes = {"tokens": tokens, "pooled": (config.get("pooled_projection_dim"),)}
        return Conditioning(**{name: torch.empty(1, *shapes[name], device=self.device, dtype=self.dtype) for name in self.arch.TEXT})

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is encoded within it, by however many calls, is encoded by one loading of the encoders, at the first prompt that no cache has; then they leave."""
        if self._stay is not None:
            yield
            return
        with ExitStack() as self._stay:
            try:
                yield
            finally:
                self._stay = self._pipeline = None

    def encode(self, prompts: Sequence[str], *, batch_size: int = 64) -> Conditioning:
        """Text of N prompts, from the cache where it is there. The encoders are loaded once for all that are missing and freed again; guidance's other branch, which
        will be wanted, too, is then encoded with them."""
        null, files = self.arch.NEGATIVE, self.files(prompts)
        known = {p: text for p, f in files.items() if f is not None and (text := kept(f)) is not None}
        known |= {} if self._null is None else {null: self._null}
        missing = {p: f for p, f in files.items() if p not in known}
        missing |= self.files([null]) if missing and null not in known else {}
        known |= {prompt: {name: value.clone() for name, value in row.items()} for prompt, row in self._encoded(missing, batch_size)}
        self._null = known.get(null)
        return Conditioning.stack([known[p] for p in prompts]).to(self.device)

    def remember(self, prompts: Sequence[str], *, batch_size: int = 64) -> None:
        """Put the text of prompts, and of guidance's other branch, into the cache, holding no more than a batch: a large set takes gigabytes (1.6 MiB a prompt at SD3.5's
        size)."""
        for _ in self._encoded({p: f for p, f in self.files([*prompts, self.arch.NEGATIVE]).items() if not is_kept(f)}, batch_size):
            pass

    def files(self, prompts: Sequence[str]) -> dict[str, Path | None]:
        """Where the cache keeps each prompt's text; None without a cache."""
        if self.cache is None:
            return dict.fromkeys(prompts)
        if self._folder is None:
            self._folder = self.cache / self.fingerprint()
        return {p: self._folder / f"{hashlib.sha256(p.encode()).hexdigest()[:32]}.safetensors" for p in prompts}

    def _encoded(self, files: dict[str, Path | None], batch_size: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(prompt, its text on the CPU), each put into its file, where it has one, batch by batch; the empty prompt alone, so that its last bits are nobody else's affair."""
        if not files:
            return
        null, prompts = self.arch.NEGATIVE, [p for p in files if p != self.arch.NEGATIVE]
        parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)] + [[null]] * (null in files)
        bar = progress(len(files), "encoding prompts", "prompt", shown=len(files) > 8 * batch_size)
        with self.together():
            if self._pipeline is None:
                self._stay.enter_context(aside(self.transformer))
                self._pipeline = self.pipeline()
            for part in parts:
                # text is the same whatever it is asked in the midst of
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    rows = self.arch.text(self._pipeline, part, self.length, self.device)
                for prompt, row in zip(part, rows):
                    row = {name: value.cpu() for name, value in row.items()}
                    if files[prompt] is not None:
                        keep(files[prompt], row)
                    yield prompt, row
                bar.update(len(part))
            del rows
        bar.close()

    def pipeline(self) -> Any:
        """The stock pipeline with its encoders alone."""
        there, parts = directory.encoders(self.arch, self.path) - set(self.without), {}
        for name, cls in self.arch.ENCODERS.items():
            parts[name] = directory.load(cls, self.path, name, self.dtype, self.variant, self.device) if name in there else None
            if parts[name] is None:
                parts[name.replace("text_encoder", "tokenizer")] = None
        others = dict.fromkeys(("transformer", "vae", "scheduler"))  # which text does not need
        try:
            pipeline = self.arch.PIPELINE.from_pretrained(self.path, **others, local_files_only=True, **parts)
        except Exception as error:  # diffusers raises many kinds for a missing or damaged file
            raise UserError(f"the text encoders of model '{self.path}' cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        pipeline.to(self.device)
        pipeline.transformer = SimpleNamespace(config=self.transformer.config)  # which some read; itself, it stays where it is
        return pipeline


@contextmanager
def aside(model: Any) -> Iterator[None]:
    """A frozen model on the CPU while others need its place on an accelerator. One that trains stays: its optimiser holds parts of it."""
    home = model.device
    if home.type == "cpu":  # where the encoders need no place; they hold no circle of references, and go with their last one
        yield
        return
    if any(p.requires_grad for p in model.parameters()):
        yield
        gc.collect()
        return
    model.to("cpu")
    try:
        yield
    finally:
        gc.collect()
        if home.type == "cuda":
            torch.cuda.empty_cache()  # or what the encoders leave behind may be in too many pieces for it
        model.to(home)


def cut_prompts(options: dict[str, Any], prompts: Sequence[str]) -> list[tuple[str, int, int]]:
    """(prompt, its tokens, the limit) of prompts that the encoders of a recipe's model would cut, by the tokenizer alone."""
    folder, arch = model_folder(options["path"]), architecture(options["path"])
    name, by_key = arch.reader(directory.encoders(arch, folder) - directory.left_out(options))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a missing or damaged file
        raise UserError(f"the tokenizer of model '{folder}' cannot be loaded: {str(error).strip().splitlines()[0]}: restore it") from error
    limit = options.get("max_sequence_length")
    limit = (arch.MAX_SEQUENCE_LENGTH if limit is None else limit) if by_key else tokenizer.model_max_length
    return [(p, n, limit) for p, n in zip(prompts, arch.count(tokenizer, prompts)) if n > limit]
