"""The CLIP family: CLIP score, HPSv2, DFN-CLIP, PickScore, SigLIP, and heads on the image embedding (aesthetic v2 and v2.5).

Preprocessing is torch and differentiable, as the model's own file says it (rewards.preprocessing).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlstitch import hub
from rlstitch.figures import exact
from rlstitch.files import read_json, require, worthless
from rlstitch.fingerprints import hash_tensors
from rlstitch.ranges import DeviceName, Dtype, Text
from rlstitch.rewards import checkpoints, known
from rlstitch.rewards.checkpoints import WHAT
from rlstitch.rewards.openclip import Activation
from rlstitch.rewards.preprocessing import Resize
from rlstitch.rewards.towers import VisionTail, image_width, logit, read_text
from rlstitch.types import Batch, UserError
from rlstitch.weights import read_checkpoint, settled

_ACTIVATIONS = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}


_HEAD = "the reward's head"
_LAYER = re.compile(r"(?:.+\.)?(\d+)\.(weight|bias)")  # layers.0.weight of aesthetic v2, scoring_head.0.weight of v2.5


def load_head(path: str, activation: str, width: int) -> nn.Sequential:
    """An MLP of an embedding [B, width] to a score [B, 1], from safetensors or a pickle of tensors (weights.read_checkpoint) with `<n>.weight` and `<n>.bias`, whatever stands
    before the number, dropout left out, `activation` between the layers. Raises UserError where a tensor is missing, has another name or does not fit the one before it."""
    if activation not in _ACTIVATIONS:
        raise UserError(f"head_activation must be one of {', '.join(_ACTIVATIONS)}, not '{activation}'")
    found = read_checkpoint(hub.fetch(path, [], None, _HEAD), _HEAD)
    if why := worthless(found):
        raise UserError(f"{_HEAD} {path} holds no weights to work with: {why}. Take the file from where it came from again")
    tensors = {f"{k[1]}.{k[2]}" if (k := _LAYER.fullmatch(name)) else name: value for name, value in found.items()}
    places = sorted({int(n) for k in tensors if (n := k.split(".")[0]).isdigit()})
    wanted = {f"{n}.{part}" for n in places for part in ("weight", "bias")}
    if not places or wanted != set(tensors) or len(tensors) != len(found):
        raise UserError(
            f"the reward's head {path} is no list of linear layers: {', '.join(sorted(wanted ^ set(tensors))[:5]) or 'nothing'} is missing or has another name"
        )
    modules: list[nn.Module] = []
    for place in places:
        weight, bias = tensors[f"{place}.weight"], tensors[f"{place}.bias"]
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise UserError(
                f"the reward's head {path}: {place}.weight is {list(weight.shape)} with a bias of {list(bias.shape)}, and takes {width} channels"
            )
        width = weight.shape[0]
        linear = nn.Linear(weight.shape[1], width)
        linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        modules += [linear, _ACTIVATIONS[activation]()]
    if width != 1:
        raise UserError(f"the reward's head {path} ends in {width} channels, and a score is one")
    return nn.Sequential(*modules[:-1])


def _head_here(path: str) -> None:
    """Raises UserError where a head's file, as far as it is here, cannot be read."""
    if not (hub.parsed_file(path, pickles=True) and hub.file_here(path) is None):
        read_checkpoint(hub.fetch(path, [], None, _HEAD), _HEAD)


TEXTS_KEPT = 65_536  # embeddings of prompts that a reward holds


class ClipReward:
    """Cosine between image and prompt embeddings, or a head on the image embedding. path: a folder of `CLIPModel` or `SiglipModel` with tokenizer and
    preprocessor_config.json (or processor_config.json), a checkpoint in open_clip's layout (.pt, .bin, .safetensors) or a folder with one, `shapes:NAME`, or a hub id,
    owner/name or owner/name/FILE.

    tokenizer: the folder or hub id that has it, where it is not beside the model; processor: that has tokenizer and preprocessing. activation: of the MLPs, by default as
    files or known names say (a checkpoint of open_clip's holds nothing of it).
    scale multiplies the cosine (PickScore: exp(logit_scale), given as "logit", with SigLIP's logit bias); resize: how other sizes are brought to the tower's, `auto` as the
    file says; variant: of the weight file, e.g. fp16 (default: the plain one, or the only one there is);
    On the device meta it has no weights and no tokenizer: what a call would cost can be counted.
    head: an MLP on the unit embedding in place of the cosine (the aesthetic predictors); the prompt then does not matter.
    """

    differentiable = True

    @property
    def reads_prompt(self) -> bool:
        """Whether the prompt matters: a head reads the picture alone."""
        return self.head is None

    def __init__(
        self,
        path: Text,
        *,
        resize: Resize = "auto",
        scale: float | Literal["logit", "surrogate"] = 1.0,
        head: Text | None = None,
        head_activation: Literal["none", "gelu", "relu"] = "none",
        device: DeviceName = "cpu",
        dtype: Dtype = "float32",
        variant: Text | None = None,
        tokenizer: Text | None = None,
        processor: Text | None = None,
        activation: Activation | None = None,
    ):
        options = dict(
            path=path, resize=resize, variant=variant, tokenizer=tokenizer, processor=processor, activation=activation, head=head
        )
        self.path, self.device, self.dtype = str(path), torch.device(device), getattr(torch, dtype)
        bare = self.device.type == "meta"
        if not bare:
            hub.fetch(path, self.needs(options), variant, WHAT)
        found = checkpoints.source(options)
        if not bare:
            checkpoints.check(found)
        self.tokenizer = None if bare or (head is not None and not found.file) else checkpoints.tokenizer(found)  # a head reads no prompt
        # On a CPU in bf16 the fused kernel's backward is the slower one; in float32 both are alike backward, and forward it takes .8 of the time.
        kernel = "eager" if self.device.type == "cpu" else "sdpa"
        model = (checkpoints.empty if bare else partial(checkpoints.load, tokens=self.tokenizer))(found, attn_implementation=kernel)
        temperature, bias = (1.0, 0.0) if bare else logit(model)  # before the cast: in bf16 100 would become 99
        self.model = settled(model, self.device, self.dtype)
        vision, self.window = self.model.config.vision_config, self.model.config.text_config.max_position_embeddings
        self.size = vision.image_size
        self.preprocessing = checkpoints.prepared(found, self.size)
        self.num_blocks = len(self.model.vision_model.encoder.layers)
        self.width, self.grid = vision.hidden_size, self.size // vision.patch_size
        self.offset = bias if scale == "logit" else 0.0
        if scale == "surrogate":
            line = read_json(
                require(found.home / "surrogate.json", "the surrogate's scale"), "the surrogate's scale", scale=float, offset=float
            )
            self.scale, self.offset = line["scale"], line["offset"]
        else:
            self.scale = temperature if scale == "logit" else float(scale)
        wide = image_width(self.model)
        self.head = None if head is None else settled(load_head(head, head_activation, wide), self.device)
        self._whole = VisionTail(self.model, 1)
        self._texts: dict[str, Tensor] = {}

    weightless = staticmethod(known.weightless)

    @staticmethod
    def needs(options: dict[str, Any]) -> list[str]:
        """What is loaded of a repository: its weights, or one checkpoint."""
        return checkpoints.needs(checkpoints.source(options))

    @staticmethod
    def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
        """(key, why) of what keeps a recipe's reward from loading, from its small files and the headers of its weights alone."""
        out: list[tuple[str, str]] = []

        def attempt(key: str, action: Callable[[], Any]) -> Any:
            try:
                return action()
            except (UserError, OSError) as error:
                out.append((key, str(error)))

        if (found := attempt("path", lambda: checkpoints.source(options))) is None:
            return out
        attempt(
            "path", lambda: hub.missing(options["path"], checkpoints.needs(found), options.get("variant"), WHAT) or checkpoints.check(found)
        )
        others = [key for key in ("processor", "tokenizer") if options.get(key)]
        for key in others:
            attempt(key, lambda: hub.model_folder(options[key], f"the reward's {key}"))  # noqa: B023
        if found.file is None or (not out and checkpoints.here(found)):
            attempt("processor" if "processor" in others else "path", lambda: checkpoints.prepared(found, checkpoints.side(found)))
        if not out and (options.get("head") is None or found.file):
            attempt(others[-1] if others else "path", lambda: checkpoints.tokenizer(found))
        if options.get("head"):
            attempt("head", lambda: hub.missing(options["head"], [], None, _HEAD) or _head_here(options["head"]))
        return out

    @staticmethod
    def cut_prompts(options: dict[str, Any], prompts: list[str]) -> list[tuple[str, int, int]]:
        """(prompt, its tokens, the limit) of prompts whose ends a recipe's reward does not see, by its tokenizer alone."""
        if options.get("head") or not checkpoints.here(found := checkpoints.source(options)):
            return []
        limit = checkpoints.towers(found)[1].max_position_embeddings
        lengths = [len(ids) for ids in checkpoints.tokenizer(found)(checkpoints.written(found.kind, prompts)).input_ids]
        return [(p, n, limit) for p, n in zip(prompts, lengths) if n > limit]

    # ---------------------------------------------------------------------------------------- scoring

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B] on the pictures' device, wherever the reward itself is."""
        return self.score_embedding(F.normalize(self.encode(images.to(self.device))[0], dim=-1), batch).to(images.device)

    @exact
    def score_embedding(self, embedding: Tensor, batch: Batch) -> Tensor:
        """From an image embedding [B, D] (unit norm for a clean picture) to the reward [B]; also inside autocast in float32: bf16 would round scores of 4 to 8 to 1/32."""
        if self.head is not None:
            return self.head_of(embedding)
        return self.scale * (embedding * self.embed_texts(batch.prompts).to(embedding.device)).sum(-1) + self.offset

    @exact
    def head_of(self, embedding: Tensor) -> Tensor:
        """The head's score [B] of an embedding."""
        with torch.autocast(self.device.type, enabled=False):  # it may be elsewhere
            return self.head(embedding.to(self.device))[:, 0].to(embedding.device)

    def tokens(self, prompts: list[str]) -> Tensor:
        """[B, L] of prompts, cut and padded to the text tower's window."""
        texts = checkpoints.written(self.model.config.model_type, prompts)
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.window, return_tensors="pt").input_ids

    def read_text(self, ids: Tensor) -> Tensor:
        """Text embeddings [B, D] of tokens [B, L], before normalisation."""
        return read_text(self.model, ids)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Unit text embeddings [B, D]. Each prompt is encoded once and by itself: in a batch, its last bits would depend on its neighbours, and with
        them on what was scored before a resume."""
        for prompt in dict.fromkeys(p for p in prompts if p not in self._texts):
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                embedding = self.read_text(self.tokens([prompt]).to(self.device)).float()
            self._texts[prompt] = F.normalize(embedding, dim=-1)[0]
        rows = torch.stack([self._texts[p] for p in prompts])
        self._texts |= {p: self._texts.pop(p) for p in dict.fromkeys(prompts)}  # the latest last
        while len(self._texts) > TEXTS_KEPT:
            del self._texts[next(iter(self._texts))]
        return rows

    # ---------------------------------------------------------------------------------------- stitching

    def view(self, height: int, width: int) -> tuple[float, float, float, float]:
        return self.preprocessing.view(height, width)

    def patches(self, images: Tensor) -> Tensor:
        """What the patch embedding produces [B, N, W]: images after preprocessing, no [CLS], no positions."""
        pixels = self.preprocessing(images.to(self.device))
        weight = self.model.vision_model.embeddings.patch_embedding
        return weight(pixels.to(weight.weight.dtype)).flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(image embedding [B, D] before normalisation, output tokens [B, N, W], [CLS] first where the tower has one)."""
        embedding, tokens = self._whole(self.patches(images))
        return embedding.float(), tokens.float()

    def inputs_of_block(self, images: Tensor, last: int) -> list[Tensor]:
        """Inputs of blocks 1..last [B, N, W], one forward for all; j = 1 is what the patch embedding produces, j >= 2 starts with [CLS] where the tower has one."""
        tokens = self.patches(images)
        out, x = [tokens], self._whole.enter(tokens)
        for layer in self._whole.layers[: last - 1]:
            x = layer(x, None)
            out.append(x)
        return out

    def prefix(self, images: Tensor, j: int) -> Tensor:
        """Input of block j [B, N, W], patch tokens only."""
        return self.inputs_of_block(images, j)[j - 1][:, -(self.grid**2) :]

    def tail(self, j: int) -> VisionTail:
        """A trainable float32 copy of the tower from block j on."""
        return copy.deepcopy(VisionTail(self.model, j)).float().requires_grad_(True)

    def suffix(self, tokens: Tensor, j: int, cls: Tensor | None = None) -> Tensor:
        """Unit image embedding [B, D] from the input of block j; for j >= 2 give [CLS] [B, W], too, where the tower has one."""
        return F.normalize(VisionTail(self.model, j)(tokens, cls)[0].float(), dim=-1)

    def fingerprint(self) -> str:
        """Hash of every weight that the score depends on."""
        head = {} if self.head is None else {f"head.{k}": v for k, v in self.head.named_parameters()}
        return hash_tensors(dict(self.model.named_parameters()) | head)
