"""Stable Diffusion 3 and 3.5 (MM-DiT) behind rlstitch's seams, over diffusers' classes. It never loops over time.

Loads any SD3/SD3.5 pipeline directory: dual attention or not, qk-norm or none, any patch size, with and without T5. 1000 sigma appears only here.
"""

from __future__ import annotations

import copy
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import AutoTokenizer

from rlstitch.backbones import directory
from rlstitch.backbones.attention import PlainJointAttention
from rlstitch.cache import is_kept, keep, kept
from rlstitch.files import hash_tensors, quick_fingerprint, read_json, read_weights, require
from rlstitch.ranges import DeviceName, Dtype, Range, Side, Text
from rlstitch.telling import progress
from rlstitch.types import Conditioning, UserError
from rlstitch.weights import load_strictly

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass
class Activations:
    """The denoiser after its first `block` blocks: image tokens [B, N, W], text tokens [B, L, W], modulation [B, W], the latent's height and width."""

    image: Tensor
    text: Tensor | None
    modulation: Tensor
    block: int
    size: tuple[int, int]

    @property
    def grid(self) -> Tensor:
        """The image stream as a map [B, W, h, w] of patches."""
        b, _, w = self.image.shape
        return self.image.transpose(1, 2).reshape(b, w, *self.size)

    def _map(self, change: Callable[[Tensor, Tensor], Tensor], other: Activations) -> Activations:
        text = None if self.text is None or other.text is None else change(self.text, other.text)
        return Activations(change(self.image, other.image), text, change(self.modulation, other.modulation), self.block, self.size)

    def detach(self) -> Activations:
        return self._map(lambda mine, _: mine.detach(), self)

    def rows(self, index: Tensor) -> Activations:
        return self._map(lambda mine, _: mine[index], self)

    def join(self, other: Activations) -> Activations:
        """Two batches after the same block, one behind the other."""
        return self._map(lambda mine, theirs: torch.cat([mine, theirs.to(mine.dtype)]), other)


def enter(model: nn.Module, z: Tensor, sigma: Tensor, text: Conditioning) -> Activations:
    """Patch, time and text embeddings: the activations before block 1. `model` is an SD3Transformer2DModel or a Prefix."""
    size = (z.shape[-2] // model.patch_size, z.shape[-1] // model.patch_size)
    image = model.pos_embed(z).contiguous()
    return Activations(image, model.context_embedder(text.tokens), model.time_text_embed(1000 * sigma, text.pooled), 0, size)


def advance(blocks: Sequence[nn.Module], state: Activations, to: int) -> Activations:
    """Run blocks state.block .. to - 1 (so that `to` blocks have run)."""
    image, text = state.image, state.text
    for block in blocks[state.block : to]:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=state.modulation, joint_attention_kwargs=None)
    return Activations(image, text, state.modulation, to, state.size)


class Prefix(nn.Module):
    """The embeddings and first `blocks` blocks of a transformer, frozen, without any LoRA in them. It shares the base's tensors, or owns copies."""

    def __init__(self, transformer: SD3Transformer2DModel, blocks: int, *, share: bool = True):
        super().__init__()
        if any("lora_" in name for name, _ in transformer.named_parameters()):
            raise AssertionError("take the value model's prefix before LoRA is added to the transformer")
        memo = {id(t): t for t in (*transformer.parameters(), *transformer.buffers())} if share else {}

        def clone(module: nn.Module) -> nn.Module:
            return copy.deepcopy(module, memo)

        self.patch_size, self.width = transformer.config.patch_size, transformer.inner_dim
        self.pos_embed, self.time_text_embed = clone(transformer.pos_embed), clone(transformer.time_text_embed)
        self.context_embedder = clone(transformer.context_embedder)
        self.blocks = nn.ModuleList(clone(block) for block in transformer.transformer_blocks[:blocks])
        self.requires_grad_(False).eval()

    def fingerprint(self) -> str:
        return hash_tensors({n: t for n, t in self.named_parameters()})

    def forward(self, z: Tensor, sigma: Tensor, text: Conditioning) -> Activations:
        return advance(self.blocks, enter(self, z, sigma, text), len(self.blocks))


class SD3Backbone:
    """An SD3 pipeline directory. `transformer` and `vae` are loaded at once and frozen; text encoders only while prompts are encoded.

    path: directory or `shapes:NAME`; dtype: of the frozen weights; variant: of the weight files, e.g. fp16 (default: the plain ones, or the only one there is);
    max_sequence_length: T5 tokens (zeros where there is no T5; 0 adds none); image_size: side in pixels (default: the transformer's own); cache: folder of encoded
    prompts and pictures, None for none.
    """

    def __init__(
        self,
        path: Text,
        *,
        dtype: Dtype = "float32",
        variant: Text | None = None,
        max_sequence_length: Annotated[int, Range(0, 100_000)] = 256,
        image_size: Side | None = None,
        device: DeviceName = "cpu",
        cache: Text | None = None,
    ):
        self.path, self.device, self.dtype = require(path, "the model directory"), torch.device(device), getattr(torch, dtype)
        self.variant = variant
        for part in self.parts:
            require(self.path / part, f"the {part} of model '{path}'")
        self.transformer = self._load(SD3Transformer2DModel, "transformer")
        self.vae = self._load(AutoencoderKL, "vae")
        if self.device.type == "cpu":
            self.transformer.set_attn_processor(PlainJointAttention())
        self.max_sequence_length, self.cache = max_sequence_length, None if cache is None else Path(cache)
        self.num_blocks, self.width = len(self.transformer.transformer_blocks), self.transformer.inner_dim
        self.transformer.patch_size = self.transformer.config.patch_size
        self.scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = image_size or self.transformer.config.sample_size * self.scale_factor
        if side % (self.scale_factor * self.transformer.config.patch_size):
            raise UserError(
                f"image_size {side} does not divide into patches of {self.scale_factor * self.transformer.config.patch_size} pixels"
            )
        self.image_size = side
        self.latent_shape = (self.transformer.config.in_channels, side // self.scale_factor, side // self.scale_factor)
        self.image_tokens = self.count_image_tokens(path, image_size)
        self._null: Conditioning | None = None
        self._text_folder: Path | None = None

    lora_targets = LORA_TARGETS
    checkpointing = False  # of activations
    parts, faults = directory.PARTS, staticmethod(directory.faults)

    @staticmethod
    def count_image_tokens(path: str, image_size: int | None = None) -> int:
        """Patches of a picture, which a scheduler may shift by: from the configurations alone."""
        folder = require(path, "the model directory")
        transformer = read_json(folder / "transformer" / "config.json", "the transformer's config", patch_size=int, sample_size=int)
        vae = read_json(folder / "vae" / "config.json", "the vae's config", block_out_channels=list)
        side = transformer["sample_size"] if image_size is None else image_size // 2 ** (len(vae["block_out_channels"]) - 1)
        return (side // transformer["patch_size"]) ** 2

    @staticmethod
    def parameter_counts(path: str, rank: int) -> dict[str, int]:
        """Parameters of transformer, autoencoder and LoRA, from the configurations alone (call it under accelerate's init_empty_weights)."""
        folder = require(path, "the model directory")
        transformer = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder / "transformer"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        linears = [m for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and n.endswith(LORA_TARGETS)]
        return {
            "transformer": sum(p.numel() for p in transformer.parameters()),
            "vae": sum(p.numel() for p in vae.parameters()),
            "lora": sum(rank * (m.in_features + m.out_features) for m in linears),
        }

    def _load(self, cls, part: str):
        return (
            load_strictly(cls, self.path / part, f"the {part}", variant=self.variant, dtype=self.dtype)
            .to(self.device)
            .requires_grad_(False)
            .eval()
        )

    def load_lora(self, folder: str | Path) -> None:
        """Put a trained LoRA on the frozen transformer: the `lora/` of a run, or any folder that diffusers wrote. Prefixes made before stay without it.

        Raises UserError where the file is missing, corrupt, or was trained on another architecture.
        """
        file = require(Path(require(folder, "the LoRA folder")) / "pytorch_lora_weights.safetensors", "the LoRA's weights")
        tensors = read_weights(file)
        state, metadata = StableDiffusion3Pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, local_files_only=True, return_lora_metadata=True
        )
        linears = {n: m for n, m in self.transformer.named_modules() if isinstance(m, nn.Linear)}
        targets = tuple((metadata or {}).get("transformer.target_modules", ()))
        odd = {n for n in linears if targets and n.endswith(targets)}  # what it should be on and is not, or is on and should not be
        for name, value in tensors.items():
            layer, _, kind = name.removeprefix("transformer.").partition(".lora_")
            linear, down = linears.get(layer), kind.startswith("A")
            if linear is not None and value.shape[down] == (linear.in_features if down else linear.out_features):
                odd.discard(layer)
            else:
                odd.add(layer)
        if odd:
            raise UserError(
                f"the LoRA in {folder} does not fit model {self.path}: {len(odd)} layers differ, e.g. {min(odd)}. It was trained on another architecture."
            )
        StableDiffusion3Pipeline.load_lora_into_transformer(state, self.transformer, metadata=metadata)
        self.transformer.requires_grad_(False)

    # ------------------------------------------------------------------------------------------------ text

    @property
    def null(self) -> Conditioning:
        """The encoding [1, ...] of the empty prompt: guidance's unconditional branch and the text of every value model."""
        if self._null is None:
            self._null = self.encode_prompts([""])
        return self._null

    def text_fingerprint(self) -> str:
        prints = quick_fingerprint(self.path, ("text_encoder*/*.safetensors", "text_encoder*/config.json", "tokenizer*/*"))
        return hashlib.sha256(f"{prints}:{self.max_sequence_length}:{self.dtype}".encode()).hexdigest()[:20]

    def picture_fingerprint(self) -> str:
        """Of everything that latents of pictures depend on beside the pictures."""
        c = self.vae.config
        prints = hash_tensors(dict(self.vae.named_parameters()))
        told = f"{prints}:{c.scaling_factor}:{c.shift_factor}:{self.image_size}:{self.dtype}:{self.device.type}"
        return hashlib.sha256(told.encode()).hexdigest()[:20]

    def encode_prompts(self, prompts: Sequence[str], *, batch_size: int = 64) -> Conditioning:
        """Text of N prompts, from the cache where it is there. The encoders are loaded once for all that are missing and freed again."""
        files = self._text_files(prompts)
        known = {p: Conditioning(**text) for p, f in files.items() if f is not None and (text := kept(f)) is not None}
        missing = {p: f for p, f in files.items() if p not in known}
        known |= {prompt: Conditioning(t.clone(), p.clone()) for prompt, t, p in self._encoded(missing, batch_size)}
        rows = [known[p] for p in prompts]
        return Conditioning(torch.stack([r.tokens for r in rows]), torch.stack([r.pooled for r in rows])).to(self.device)

    def remember(self, prompts: Sequence[str], *, batch_size: int = 64) -> None:
        """Put the text of prompts into the cache, holding no more than a batch: a large set takes gigabytes (1.6 MiB a prompt at SD3.5's size)."""
        for _ in self._encoded({p: f for p, f in self._text_files(prompts).items() if not is_kept(f)}, batch_size):
            pass

    def _text_files(self, prompts: Sequence[str]) -> dict[str, Path | None]:
        """Where the cache keeps each prompt's text; None without a cache."""
        if self.cache is None:
            return dict.fromkeys(prompts)
        if self._text_folder is None:
            self._text_folder = self.cache / self.text_fingerprint()
        return {p: self._text_folder / f"{hashlib.sha256(p.encode()).hexdigest()[:32]}.safetensors" for p in prompts}

    def _encoded(self, files: dict[str, Path | None], batch_size: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(prompt, tokens, pooled) on the CPU, each put into its file, where it has one, batch by batch."""
        if not files:
            return
        pipeline, prompts = self._text_pipeline(), list(files)
        bar = progress(len(prompts), "encoding prompts", "prompt", shown=len(prompts) > 8 * batch_size)
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # text is the same whatever it is asked in the midst of
                tokens, _, pooled, _ = pipeline.encode_prompt(
                    part, None, None, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_sequence_length
                )
            for prompt, t, p in zip(part, tokens.cpu(), pooled.cpu()):
                if files[prompt] is not None:
                    keep(files[prompt], {"tokens": t, "pooled": p})
                yield prompt, t, p
            bar.update(len(part))
        bar.close()
        del pipeline
        gc.collect()

    def too_long(self, prompts: Sequence[str]) -> list[tuple[str, int, int]]:
        """(prompt, its tokens, the limit) of prompts that the widest encoder would cut: T5's limit where there is one, else CLIP's."""
        return self.cut_prompts({"path": self.path, "max_sequence_length": self.max_sequence_length}, prompts)

    @staticmethod
    def cut_prompts(options: dict[str, Any], prompts: Sequence[str]) -> list[tuple[str, int, int]]:
        """`too_long` of a recipe's model, by its tokenizer alone."""
        folder = require(options["path"], "the model directory")
        t5 = (folder / "tokenizer_3").is_dir()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / ("tokenizer_3" if t5 else "tokenizer"), local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a missing or damaged file
            raise UserError(f"the tokenizer of model '{folder}' cannot be loaded: {error}") from error
        limit = options.get("max_sequence_length", 256) if t5 else tokenizer.model_max_length
        lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
        return [(p, n, limit) for p, n in zip(prompts, lengths) if n > limit]

    def _text_pipeline(self) -> StableDiffusion3Pipeline:
        index = read_json(self.path / "model_index.json", "the pipeline's index")
        parts = {
            name: self._load(cls, name) if index.get(name, [None])[0] is not None else None for name, cls in directory.ENCODERS.items()
        }
        if parts["text_encoder_3"] is None:
            parts["tokenizer_3"] = None
        others = dict.fromkeys(("transformer", "vae", "scheduler"))  # which text does not need
        try:
            pipeline = StableDiffusion3Pipeline.from_pretrained(self.path, **others, local_files_only=True, **parts)
        except Exception as error:  # diffusers raises many kinds for a missing or damaged file
            raise UserError(f"the text encoders of model '{self.path}' cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        pipeline.transformer = self.transformer  # for its joint_attention_dim, where there is no T5
        return pipeline.to(self.device)

    # ------------------------------------------------------------------------------------------------ denoiser

    def velocity(self, z: Tensor, sigma: Tensor, text: Conditioning, *, guidance: float = 1.0) -> Tensor:
        """v [B, C, H, W] float32 at z, sigma [B]; classifier-free guidance v_null + w (v - v_null), both branches in one batch, gradient through both."""
        if guidance == 1.0:
            return self._forward(z, sigma, text)
        null = self.null.expand(len(z))
        both = Conditioning(torch.cat([null.tokens, text.tokens]), torch.cat([null.pooled, text.pooled]))
        v_null, v = self._forward(torch.cat([z, z]), torch.cat([sigma, sigma]), both).chunk(2)
        return v_null + guidance * (v - v_null)

    def bind(self, text: Conditioning, guidance: float = 1.0):
        """velocity(z, sigma) with the prompt and the guidance bound in."""
        return lambda z, sigma: self.velocity(z, sigma, text, guidance=guidance)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Hold no more of a forward with gradient than what enters each block, and run a block again in the backward pass: a third more time, a fraction of the memory."""
        self.checkpointing = on
        self.transformer.enable_gradient_checkpointing() if on else self.transformer.disable_gradient_checkpointing()

    def _forward(self, z: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        output = self.transformer(
            hidden_states=z.to(self.dtype),
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )
        return output[0].float()

    def prefix(self, z: Tensor, sigma: Tensor, blocks: int, text: Conditioning | None = None) -> Activations:
        """Run only the first `blocks` blocks (text None: the null text). `resume` finishes them into a velocity."""
        text = self.null.expand(len(z)) if text is None else text
        state = enter(self.transformer, z.to(self.dtype), sigma, text)
        return advance(self.transformer.transformer_blocks, state, blocks)

    def extend(self, state: Activations, blocks: int) -> Activations:
        """Go on from a prefix's activations until `blocks` blocks have run."""
        return advance(self.transformer.transformer_blocks, state, blocks)

    def walk(self, z: Tensor, sigma: Tensor) -> Iterator[Activations]:
        """Activations under the null text after block 1, 2, ... to the last, each block run once."""
        state = enter(self.transformer, z.to(self.dtype), sigma, self.null.expand(len(z)))
        for i in range(1, self.num_blocks + 1):
            state = advance(self.transformer.transformer_blocks, state, i)
            yield state

    def resume(self, state: Activations) -> Tensor:
        """The full velocity [B, C, H, W] from a prefix's activations, without running its blocks again."""
        model, (h, w) = self.transformer, state.size
        state = advance(model.transformer_blocks, state, self.num_blocks)
        out = model.proj_out(model.norm_out(state.image, state.modulation))
        p, c = model.config.patch_size, model.out_channels
        return out.view(len(out), h, w, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(len(out), c, h * p, w * p).float()

    def make_prefix(self, blocks: int, *, share: bool = True) -> Prefix:
        return Prefix(self.transformer, blocks, share=share)

    # ------------------------------------------------------------------------------------------------ autoencoder

    @staticmethod
    def _parts(x: Tensor, factor: int, pixels: int = 8 * 512**2) -> tuple[Tensor, ...]:
        """A batch cut so that the autoencoder, whose activations outweigh everything else, sees no more than so many pixels at once; whole where gradients flow."""
        if torch.is_grad_enabled() and x.requires_grad:
            return (x,)
        return x.split(max(1, pixels // (x.shape[-1] * x.shape[-2] * factor**2)))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> latents after shift and scale (the posterior's mode); without gradient a few at a time."""
        if len(parts := self._parts(images, 1)) > 1:
            return torch.cat([self.encode(part) for part in parts])
        mode = self.vae.encode((2 * images - 1).to(self.dtype)).latent_dist.mode().float()
        return (mode - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [0, 1], differentiable inside the range; without gradient a few at a time."""
        if len(parts := self._parts(z, self.scale_factor)) > 1:
            return torch.cat([self.decode(part) for part in parts])
        raw = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(raw.to(self.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
