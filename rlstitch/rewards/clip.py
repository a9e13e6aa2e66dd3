"""The CLIP family over transformers' `CLIPModel`: CLIP score, HPSv2, DFN-CLIP, PickScore, and heads on the image embedding (aesthetic).

Preprocessing is torch and differentiable, as the model's own file says it (rewards.preprocessing).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from rlstitch.figures import exact
from rlstitch.files import read_json, read_weights, require
from rlstitch.fingerprints import hash_tensors
from rlstitch.hub import fetch, missing, model_folder
from rlstitch.ranges import DeviceName, Dtype, Text
from rlstitch.rewards import preprocessing
from rlstitch.rewards.preprocessing import Resize
from rlstitch.types import Batch, UserError
from rlstitch.weights import load_strictly, whole_files


class VisionTail(nn.Module):
    """A CLIP vision tower from block j on (1-based): tokens [B, N, W] -> (image embedding [B, D], all output tokens [B, N + 1, W]).

    j = 1 takes what the patch embedding produces, prepends [CLS] and adds positions, as the tower does. For j >= 2 the tokens carry their
    positions already; [CLS] starts from `cls`, a learnable vector.
    """

    def __init__(self, model: CLIPModel, j: int):
        super().__init__()
        vision = model.vision_model
        if not 1 <= j <= len(vision.encoder.layers):
            raise ValueError(f"a tower of {len(vision.encoder.layers)} blocks cannot be entered at block {j}")
        self.j = j
        if j == 1:
            self.cls, self.positions = vision.embeddings.class_embedding, vision.embeddings.position_embedding
            self.before = vision.pre_layrnorm
        else:
            self.cls = nn.Parameter(torch.zeros_like(vision.embeddings.class_embedding))
        self.layers = nn.ModuleList(vision.encoder.layers[j - 1 :])
        self.after, self.projection = vision.post_layernorm, model.visual_projection

    def forward(self, tokens: Tensor, cls: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first = self.cls if cls is None else cls
        x = torch.cat([first.expand(len(tokens), 1, -1) if first.ndim == 1 else first[:, None], tokens], 1)
        if self.j == 1:
            x = self.before(x + self.positions.weight)
        for layer in self.layers:
            x = layer(x, None)
        return self.projection(self.after(x[:, 0])), x


_ACTIVATIONS = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}


def load_head(path: str, activation: str, width: int) -> nn.Sequential:
    """An MLP of an embedding [B, width] to a score [B, 1], from safetensors with `<n>.weight` and `<n>.bias` (or `layers.<n>.*`), dropout left out, `activation`
    between the layers. Raises UserError where a tensor is missing, has another name or does not fit the one before it."""
    if activation not in _ACTIVATIONS:
        raise UserError(f"head_activation must be one of {', '.join(_ACTIVATIONS)}, not '{activation}'")
    tensors = {k.removeprefix("layers."): v for k, v in read_weights(require(path, "the reward's head")).items()}
    places = sorted({int(n) for k in tensors if (n := k.split(".")[0]).isdigit()})
    wanted = {f"{n}.{part}" for n in places for part in ("weight", "bias")}
    if not places or wanted != set(tensors):
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


def _vision(folder: Path) -> dict[str, Any]:
    """The vision tower's configuration; what its file leaves out is transformers' own."""
    said = read_json(require(folder / "config.json", "the reward model's config"), "the reward model's config")
    return CLIPVisionConfig(**(said.get("vision_config") or {})).to_dict()


def _tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a missing or damaged file
        raise UserError(f"the tokenizer of the reward model '{folder}' cannot be loaded: {error}") from error


WHAT = "the reward model"
TEXTS_KEPT = 65_536  # embeddings of prompts that a reward holds


class ClipReward:
    """Cosine between image and prompt embeddings, or a head on the image embedding. path: a CLIPModel directory with tokenizer and preprocessor_config.json (or processor_config.json), `shapes:NAME`, or a hub id.

    scale multiplies the cosine (PickScore: exp(logit_scale), given as "logit"); resize: how other sizes are brought to the tower's, `auto` as the file says;
    variant: of the weight file, e.g. fp16 (default: the plain one, or the only one there is);
    head: an MLP on the unit embedding in place of the cosine (the aesthetic predictor); the prompt then does not matter.
    """

    differentiable = True

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
    ):
        folder = fetch(path, self.needs({}), variant, WHAT)
        self.path, self.device, self.dtype = str(path), torch.device(device), getattr(torch, dtype)
        # On a CPU the fused kernel's backward is several times slower than plain attention at these lengths.
        kernel = "eager" if self.device.type == "cpu" else "sdpa"
        model = load_strictly(CLIPModel, folder, "the reward model", variant=variant, dtype=torch.float32, attn_implementation=kernel)
        temperature = float(model.logit_scale.detach().exp())  # before the cast: in bf16 100 would become 99
        self.model = model.to(self.device, self.dtype).requires_grad_(False).eval()
        self.tokenizer = _tokenizer(folder)
        self.size = self.model.config.vision_config.image_size
        self.preprocessing = preprocessing.read(folder, self.size, resize)
        self.num_blocks = len(self.model.vision_model.encoder.layers)
        self.width, self.grid = self.model.config.vision_config.hidden_size, self.size // self.model.config.vision_config.patch_size
        self.offset = 0.0
        if scale == "surrogate":
            line = read_json(
                require(folder / "surrogate.json", "the surrogate's scale"), "the surrogate's scale", scale=float, offset=float
            )
            self.scale, self.offset = line["scale"], line["offset"]
        else:
            self.scale = temperature if scale == "logit" else float(scale)
        wide = self.model.config.projection_dim
        self.head = None if head is None else load_head(head, head_activation, wide).to(self.device).requires_grad_(False).eval()
        self._whole = VisionTail(self.model, 1)
        self._texts: dict[str, Tensor] = {}

    @staticmethod
    def needs(options: dict[str, Any]) -> list[str]:
        """The folders whose weights are loaded: it is not made of parts."""
        return [""]

    @staticmethod
    def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
        """(key, why) of what keeps a recipe's reward from loading, from its small files alone."""
        folder, out, variant = model_folder(options["path"], WHAT), [], options.get("variant")
        for read in (
            lambda: missing(options["path"], [""], variant, WHAT) or whole_files(folder, WHAT, variant),
            lambda: preprocessing.read(folder, _vision(folder)["image_size"], options.get("resize", "auto")),
        ):
            try:
                read()
            except UserError as error:
                out.append(("path", str(error)))
        return out

    @staticmethod
    def cut_prompts(options: dict[str, Any], prompts: list[str]) -> list[tuple[str, int, int]]:
        """(prompt, its tokens, the limit) of prompts whose ends a recipe's reward does not see, by its tokenizer alone."""
        if options.get("head"):
            return []
        folder = model_folder(options["path"], WHAT)
        said = read_json(require(folder / "config.json", "the reward model's config"), "the reward model's config")
        limit = CLIPTextConfig(**(said.get("text_config") or {})).max_position_embeddings
        lengths = [len(ids) for ids in _tokenizer(folder)(prompts).input_ids]
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

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Unit text embeddings [B, D]. Each prompt is encoded once and by itself: in a batch, its last bits would depend on its neighbours, and with
        them on what was scored before a resume."""
        for prompt in dict.fromkeys(p for p in prompts if p not in self._texts):
            ids = self.tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).input_ids
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                embedding = self.model.text_projection(self.model.text_model(input_ids=ids.to(self.device)).pooler_output).float()
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
        """(image embedding [B, D] before normalisation, output tokens [B, N + 1, W])."""
        embedding, tokens = self._whole(self.patches(images))
        return embedding.float(), tokens.float()

    def inputs_of_block(self, images: Tensor, last: int) -> list[Tensor]:
        """Inputs of blocks 1..last [B, N (+ 1 for j >= 2), W], one forward for all; j = 1 is what the patch embedding produces, j >= 2 starts with [CLS]."""
        tokens = self.patches(images)
        out, whole = [tokens], self._whole
        x = whole.before(torch.cat([whole.cls.expand(len(tokens), 1, -1), tokens], 1) + whole.positions.weight)
        for layer in whole.layers[: last - 1]:
            x = layer(x, None)
            out.append(x)
        return out

    def prefix(self, images: Tensor, j: int) -> Tensor:
        """Input of block j [B, N, W], patch tokens only."""
        tokens = self.inputs_of_block(images, j)[j - 1]
        return tokens if j == 1 else tokens[:, 1:]

    def tail(self, j: int) -> VisionTail:
        """A trainable float32 copy of the tower from block j on."""
        return copy.deepcopy(VisionTail(self.model, j)).float().requires_grad_(True)

    def suffix(self, tokens: Tensor, j: int, cls: Tensor | None = None) -> Tensor:
        """Unit image embedding [B, D] from the input of block j; for j >= 2 give [CLS] [B, W] too."""
        return F.normalize(VisionTail(self.model, j)(tokens, cls)[0].float(), dim=-1)

    def fingerprint(self) -> str:
        """Hash of every weight that the score depends on."""
        head = {} if self.head is None else {f"head.{k}": v for k, v in self.head.named_parameters()}
        return hash_tensors(dict(self.model.named_parameters()) | head)
