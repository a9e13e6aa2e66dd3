"""Any flow transformer of diffusers behind rlstitch's seams: one backbone for all, over the model's own forward. It never loops over time."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlstitch import adapters, compiled, hub
from rlstitch.backbones import cut, directory, execution, known, loras
from rlstitch.backbones.shared import architecture, distilled, lora_targets, targets_fault
from rlstitch.backbones.texts import Texts, cut_prompts
from rlstitch.files import require
from rlstitch.fingerprints import hash_tensors, vae_factors
from rlstitch.ranges import DeviceName, Dtype, NotEmpty, Range, Side, Text
from rlstitch.schedule import Shift
from rlstitch.types import Conditioning, UserError


@dataclass
class Cut:
    """A denoiser that stopped after its first `block` blocks: what the last of them returned, and what the forward was called with."""

    returned: Any
    block: int
    z: Tensor
    sigma: Tensor
    text: Conditioning
    picture: Callable[[Any, Tensor], Tensor]

    @property
    def grid(self) -> Tensor:
        """The image stream as a map [B, W, h, w] of patches."""
        return self.picture(self.returned, self.z)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Cut:
        several = isinstance(self.returned, tuple)
        streams = tuple(t if t is None else change(t) for t in (self.returned if several else (self.returned,)))
        return replace(
            self, returned=streams if several else streams[0], z=change(self.z), sigma=change(self.sigma), text=self.text.map(change)
        )

    def detach(self) -> Cut:
        return self._map(lambda t: t.detach())

    def rows(self, index: Tensor) -> Cut:
        return self._map(lambda t: t[index])


class Prefix(nn.Module):
    """A transformer without the blocks behind the first `depth` and without its tail, frozen, no LoRA in it. It shares the base's tensors, or owns copies."""

    def __init__(
        self, transformer: nn.Module, arch: Any, depth: int, *, embedded: float | None = None, share: bool = True, compile: bool = False
    ):
        super().__init__()
        if any("lora_" in name for name, _ in transformer.named_parameters()):
            raise AssertionError("take the value model's prefix before LoRA is added to the transformer")
        self._arch = arch.__name__  # a module cannot be copied with the prefix
        self.depth, self.embedded, self.compiled = depth, embedded, compile
        self.model = cut.truncated(transformer, arch, depth, share=share)
        if compile:
            compiled.compile_blocks(cut.blocks_of(self.model, (*arch.BEFORE, *arch.LISTS)))

    @property
    def arch(self) -> Any:
        return sys.modules[self._arch]

    @property
    def blocks(self) -> list[nn.Module]:
        return cut.blocks_of(self.model, self.arch.LISTS)

    def picture(self, returned: Any, z: Tensor) -> Tensor:
        return self.arch.picture(returned, self.model, z)

    def fingerprint(self) -> str:
        """Of its weights as they compute, the first list's blocks called `blocks`, as they always were."""
        return hash_tensors(
            {n.replace(f"{self.arch.LISTS[0]}.", "blocks."): execution.unpacked(t) for n, t in self.model.named_parameters()}
        )

    def shares_with(self, transformer: nn.Module) -> bool:
        """Whether it is this transformer's own beginning: the same tensors, and no adapter anywhere on them."""
        left_out = [id(b) for b in cut.blocks_of(transformer, self.arch.LISTS)[self.depth :]] + [
            id(getattr(transformer, n)) for n in self.arch.TAIL
        ]
        skipped = {id(p) for m in transformer.modules() if id(m) in left_out for p in m.parameters()}
        own = [id(p) for p in transformer.parameters() if id(p) not in skipped]
        return own == [id(p) for p in self.model.parameters()]

    def forward(self, z: Tensor, sigma: Tensor, text: Conditioning) -> Cut:
        inputs = self.arch.inputs(self.model, z, sigma, text, self.embedded)
        return Cut(cut.run(self.model, inputs, self.arch, stop=self.depth), self.depth, z, sigma, text, self.picture)


class Diffusers:
    """A pipeline directory of diffusers, of any architecture of `shared.ARCHITECTURES`. `transformer` and `vae` are loaded at once and frozen; text encoders only while
    prompts are encoded.

    path: directory, `shapes:NAME` or a hub id, owner/name or owner/name@revision; dtype: of the frozen weights; variant: of the weight files, e.g. fp16 (default: the
    plain ones, or the only one there is); max_sequence_length: tokens of a prompt, where an encoder has no limit of its own (for SD3 those of T5, zeros where there is no T5; 0 adds none); image_size: side
    in pixels (default: the transformer's own), or height and width of a picture that is no square; embedded_guidance: what a guidance-distilled model is told (default:
    its pipeline's); attention: a backend of diffusers' attention, by its name there; compile: every block, and those of value models' tails, by torch.compile; quantise:
    the frozen transformer's linears in 4 bits or in 8 (LoRA on them is not); text_encoder_3: `none` goes without T5 where a model can (its tokens are zeros then); merge: LoRA files or folders of any
    trainer that are added to the weights, so that the base, also of value models, is the merged model; cache: folder of encoded prompts and pictures, None for none.
    On the device meta no weight is loaded and no text encoded: what a call would cost can be counted.
    """

    def __init__(
        self,
        path: Text,
        *,
        dtype: Dtype = "float32",
        variant: Text | None = None,
        max_sequence_length: Annotated[int, Range(0, 100_000)] | None = None,
        image_size: Side | None = None,
        height: Side | None = None,
        width: Side | None = None,
        embedded_guidance: Annotated[float, Range(0, 1000)] | None = None,
        attention: Text | None = None,
        compile: bool = False,
        quantise: execution.Quantised | None = None,
        text_encoder_3: Literal["none"] | None = None,
        merge: Text | Annotated[list[Text], NotEmpty()] | None = None,
        device: DeviceName = "cpu",
        cache: Text | None = None,
    ):
        self.path, self.variant = hub.model_folder(path), variant
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        for part in self.parts:
            require(self.path / part, f"the {part} of model '{path}'")
        self.arch = architecture(path)
        self.latent_shape, self.size, self.image_tokens = directory.sizes(path, height or image_size, width or image_size)
        if why := directory.unable(
            path, attention=attention, compile=compile, quantise=quantise, dtype=dtype, text_encoder_3=text_encoder_3, merge=merge
        ):
            raise UserError(f"the model {path} cannot run as asked: {why}")
        if self.device.type != "meta":
            hub.fetch(path, directory.needs({"path": path, "text_encoder_3": text_encoder_3}), variant)
        self.transformer = directory.load(self.arch.TRANSFORMER, self.path, "transformer", self.dtype, variant, self.device, quantise)
        self.merged = [adapters.fingerprint(lora) for lora in adapters.listed(merge)]
        loras.merge(self.transformer, [loras.load(lora, self) for lora in adapters.listed(merge)])
        self.vae = directory.load(self.arch.VAE, self.path, "vae", self.dtype, variant, self.device)
        self.arch.prepare(self.transformer, self.device.type, attention)
        if attention is not None:
            execution.attend(self.transformer, attention)
        self.compiled, self.quantise = compile, quantise
        if compile:
            compiled.compile_blocks(cut.blocks_of(self.transformer, (*self.arch.BEFORE, *self.arch.LISTS)))
        self.cache = None if cache is None else Path(cache)
        length = self.arch.MAX_SEQUENCE_LENGTH if max_sequence_length is None else max_sequence_length
        self._read = {"path": path, "max_sequence_length": length, "text_encoder_3": text_encoder_3}  # what says how long a prompt may be
        self.texts = Texts(
            self.arch, self.path, self.transformer, dtype=self.dtype, variant=variant, device=self.device, length=length,
            without=directory.left_out(self._read), cache=self.cache,
        )  # fmt: skip
        self.num_blocks = len(cut.blocks_of(self.transformer, self.arch.LISTS))
        self.width = getattr(self.transformer, "inner_dim", None) or self.transformer.dim
        self.lora_targets, self.text_fields = lora_targets(self.arch, self.transformer), self.arch.TEXT
        distilled = bool(self.transformer.config.get("guidance_embeds"))
        if embedded_guidance is not None and not distilled:
            raise UserError(f"embedded_guidance is {embedded_guidance:g}, and the model {path} has no embedding of it: leave it out")
        self.embedded = (self.arch.EMBEDDED if embedded_guidance is None else embedded_guidance) if distilled else None
        self._null: Conditioning | None = None

    checkpointing, guidance_gradient = False, "both"  # of activations; of guided velocities
    parts, faults, cut_prompts = directory.PARTS, staticmethod(directory.faults), staticmethod(cut_prompts)
    needs, weightless = staticmethod(directory.needs), staticmethod(known.weightless)

    @staticmethod
    def image_tokens_of(options: dict[str, Any]) -> int:
        """Patches of a picture, which a scheduler may shift by: of a recipe's model, from the configurations alone."""
        side = options.get("image_size")
        return directory.sizes(options["path"], options.get("height") or side, options.get("width") or side)[2]

    @staticmethod
    def setting(options: dict[str, Any]) -> tuple[int, int, float]:
        """Height and width of a recipe's pictures, and the guidance that its model is told (0 where it embeds none): what value models depend on, from files alone."""
        side, arch, config = options.get("image_size"), architecture(options["path"]), directory.skeleton(options["path"]).config
        height, width = directory.sizes(options["path"], options.get("height") or side, options.get("width") or side)[1]
        told = options.get("embedded_guidance")
        return height, width, float((arch.EMBEDDED if told is None else told) or 0.0) if config.get("guidance_embeds") else 0.0

    @staticmethod
    def shift_of(path: str | Path, settings: dict[str, Any], tokens: int | None) -> Shift:
        """The shift of noise levels that a directory's scheduler settings ask for."""
        return architecture(path).shift(settings, tokens)

    @staticmethod
    def distilled(options: dict[str, Any]) -> str:
        """What says that a recipe's model was distilled to few steps; '' where nothing does."""
        return distilled(options["path"])

    @staticmethod
    def parameter_counts(path: str, rank: int, targets: Sequence[str] = ()) -> dict[str, int]:
        """Parameters of transformer, autoencoder and LoRA, from the configurations alone (call it under accelerate's init_empty_weights)."""
        folder, arch = hub.model_folder(path), architecture(path)
        transformer = arch.TRANSFORMER.from_config(arch.TRANSFORMER.load_config(folder / "transformer"))
        vae = arch.VAE.from_config(arch.VAE.load_config(folder / "vae"))
        linears = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        on = {n for target in lora_targets(arch, transformer, targets) for n in adapters.matching(target, linears)}
        return {
            "transformer": sum(p.numel() for p in transformer.parameters()),
            "vae": sum(p.numel() for p in vae.parameters()),
            "lora": sum(rank * (m.in_features + m.out_features) for m in map(linears.get, sorted(on))),
        }

    @staticmethod
    def lora_fault(options: dict[str, Any], path: str) -> str:
        """Why a LoRA cannot be put on a recipe's model; '' where it can. From its file and the model's configurations alone."""
        try:
            loras.fitting(path, architecture(options["path"]), loras.linears(directory.skeleton(options["path"])), options["path"])
        except UserError as error:
            return str(error)
        return ""

    @staticmethod
    def targets_fault(options: dict[str, Any], targets: list[str]) -> str:
        """Why LoRA cannot be trained on these targets (none: the architecture's) of a recipe's model; '' where it can."""
        return targets_fault(architecture(options["path"]), directory.skeleton(options["path"]), targets)

    def targets(self, own: Sequence[str]) -> Sequence[str]:
        """What LoRA goes on: a recipe's own targets, or else `lora_targets`. Ask before a LoRA is put on."""
        return lora_targets(self.arch, self.transformer, own) if own else self.lora_targets

    def load_lora(self, path: str | Path, name: str = "lora") -> adapters.Layers:
        """Put a LoRA of any kind on the frozen transformer as the adapter `name`; -> its layers. Prefixes made before stay without it. Raises UserError where it does not fit."""
        loras.put_on(self.transformer, layers := loras.load(path, self), name)
        return layers

    # ------------------------------------------------------------------------------------------------ text

    @property
    def null(self) -> Conditioning:
        """The encoding [1, ...] of the empty prompt (for Qwen-Image a space): guidance's unconditional branch and the text of every value model."""
        if self._null is None:
            self._null = self.texts.blank() if self.device.type == "meta" else self.encode_prompts([self.arch.NEGATIVE])
        return self._null

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self.texts.encode(prompts)

    def remember(self, prompts: list[str]) -> None:
        self.texts.remember(prompts)

    def texts_together(self) -> AbstractContextManager[None]:
        """Within it the text encoders are loaded once at most."""
        return self.texts.together()

    def text_fingerprint(self) -> str:
        return self.texts.fingerprint()

    def too_long(self, prompts: list[str]) -> list[tuple[str, int, int]]:
        """(prompt, its tokens, the limit) of prompts that the widest encoder would cut."""
        return cut_prompts(self._read, prompts)

    # ------------------------------------------------------------------------------------------------ denoiser

    def velocity(self, z: Tensor, sigma: Tensor, text: Conditioning, *, guidance: float = 1.0) -> Tensor:
        """v [B, ...] float32 at z, sigma [B]; classifier-free guidance as the architecture has it, both branches in one batch. The gradient is through both, or, where
        `guidance_gradient` is `conditional`, through the conditional branch alone."""
        if guidance == 1.0:
            return self._forward(z, sigma, text)
        if self.guidance_gradient == "conditional" and torch.is_grad_enabled():
            v = self._forward(z, sigma, text)
            with torch.no_grad():
                v_null = self._forward(z, sigma, self.null.expand(len(z)))
            return self.guided(v, v_null, guidance)
        both = Conditioning.cat([self.null.expand(len(z)), text])
        v_null, v = self._forward(torch.cat([z, z]), torch.cat([sigma, sigma]), both).chunk(2)
        return self.guided(v, v_null, guidance)

    def guided(self, v: Tensor, null: Tensor, scale: float) -> Tensor:
        """The guided velocity of the two branches'; linear for most: v_null + w (v - v_null)."""
        return self.arch.guided(v, null, scale)

    def bind(self, text: Conditioning, guidance: float = 1.0):
        """velocity(z, sigma) with the prompt and the guidance bound in."""
        return lambda z, sigma: self.velocity(z, sigma, text, guidance=guidance)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Hold no more of a forward with gradient than what enters each block (and, of many pictures, the autoencoder), and run it again in the backward pass: a third more
        time, a fraction of the memory."""
        self.checkpointing = on
        self.transformer.enable_gradient_checkpointing() if on else self.transformer.disable_gradient_checkpointing()

    def _inputs(self, z: Tensor, sigma: Tensor, text: Conditioning) -> dict[str, Any]:
        return self.arch.inputs(self.transformer, z.to(self.dtype), sigma, text, self.embedded)

    def _forward(self, z: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        return self.arch.output(self.transformer(**self._inputs(z, sigma, text)), z).float()

    # ------------------------------------------------------------------------------------------------ what stitching needs beside

    def _cut(self, z: Tensor, sigma: Tensor, text: Conditioning, **how: Any) -> Any:
        return cut.run(self.transformer, self._inputs(z, sigma, text), self.arch, **how)

    def picture(self, returned: Any, z: Tensor) -> Tensor:
        return self.arch.picture(returned, self.transformer, z)

    def prefix(self, z: Tensor, sigma: Tensor, blocks: int, text: Conditioning | None = None) -> Cut:
        """Run only the first `blocks` blocks, at least one (text None: the null text). `resume` finishes them into a velocity."""
        text = self.null.expand(len(z)) if text is None else text
        return Cut(self._cut(z, sigma, text, stop=blocks), blocks, z, sigma, text, self.picture)

    def extend(self, state: Cut, blocks: int) -> Cut:
        """Go on from a cut until `blocks` blocks have run."""
        if blocks == state.block:
            return state
        return replace(
            state, returned=self._cut(state.z, state.sigma, state.text, start=(state.block, state.returned), stop=blocks), block=blocks
        )

    def walk(self, z: Tensor, sigma: Tensor, see: Callable[[Cut], None], text: Conditioning | None = None) -> None:
        """One forward (text None: under the null text) that shows `see` the cut after block 1, 2, ... to the last."""
        text = self.null.expand(len(z)) if text is None else text
        self._cut(z, sigma, text, stop=self.num_blocks, see=lambda k, returned: see(Cut(returned, k, z, sigma, text, self.picture)))

    def resume(self, state: Cut) -> Tensor:
        """The full velocity [B, ...] from a cut, without running its blocks again."""
        return self.arch.output(self._cut(state.z, state.sigma, state.text, start=(state.block, state.returned)), state.z).float()

    def make_prefix(self, blocks: int, *, share: bool = True) -> Prefix:
        return Prefix(self.transformer, self.arch, blocks, embedded=self.embedded, share=share, compile=self.compiled)

    # ------------------------------------------------------------------------------------------------ autoencoder

    def picture_fingerprint(self) -> str:
        """Of everything that latents of pictures depend on beside the pictures."""
        c = self.vae.config
        prints = hash_tensors({**dict(self.vae.named_parameters()), **dict(self.vae.named_buffers())})
        told = f"{prints}:{vae_factors(c)}:{self.size}:{self.dtype}:{self.device.type}"
        return hashlib.sha256(told.encode()).hexdigest()[:20]

    # pixels that the autoencoder sees at once, without gradient and with it: its activations outweigh everything else
    at_once = {False: 8 * 512**2, True: 512**2}

    def _in_parts(self, run: Callable[[Any, Tensor], Tensor], x: Tensor, factor: int) -> Tensor:
        """run(vae, x) a few pictures at a time. With gradient that saves nothing unless activations are checkpointed: then each part is run again in the backward pass."""
        graph = torch.is_grad_enabled() and x.requires_grad
        parts = x.split(max(1, self.at_once[graph] // (x.shape[-1] * x.shape[-2] * factor**2)))
        if len(parts) == 1 or (graph and not self.checkpointing):
            return run(self.vae, x)
        one = partial(checkpoint, run, use_reentrant=False) if graph else run
        return torch.cat([one(self.vae, part) for part in parts])

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> latents as the denoiser takes them (the posterior's mode); a few at a time, see `_in_parts`."""
        return self._in_parts(self.arch.VAES.encode, images, 1)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [0, 1], differentiable inside the range; a few at a time, see `_in_parts`."""
        return self._in_parts(self.arch.VAES.decode, z, self.size[0] // self.latent_shape[-2])
