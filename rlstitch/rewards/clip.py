"""The CLIP family over transformers' `CLIPModel`: CLIP score, HPSv2, DFN-CLIP, PickScore, and heads on the image embedding (aesthetic).

Preprocessing is torch and differentiable: antialiased bicubic, the processor's own mean and standard deviation.
"""

from __future__ import annotations

import copy
import json
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from rlstitch.files import hash_tensors, read_tensors, require
from rlstitch.types import Batch, UserError

Resize = Literal["shortest_crop", "squash", "longest_pad"]


def preprocess(images: Tensor, size: int, mean: Tensor, std: Tensor, resize: Resize = "shortest_crop") -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> normalised [B, 3, size, size]. `shortest_crop` is CLIP's, `squash` DFN's, `longest_pad` HPSv2's (zeros before normalisation)."""
    h, w = images.shape[-2:]
    if (h, w) != (size, size):
        if resize == "squash":
            target = (size, size)
        else:
            scale = size / (min(h, w) if resize == "shortest_crop" else max(h, w))
            target = (max(1, round(h * scale)), max(1, round(w * scale)))
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        h, w = target
        if resize == "shortest_crop":
            top, left = (h - size) // 2, (w - size) // 2
            images = images[..., top : top + size, left : left + size]
        elif resize == "longest_pad":
            left, top = (size - w) // 2, (size - h) // 2
            images = F.pad(images, (left, size - w - left, top, size - h - top))
    return (images - mean) / std


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


def load_head(path: str, activation: str) -> nn.Sequential:
    """An MLP from safetensors with `<n>.weight` and `<n>.bias` (or `layers.<n>.*`), dropout left out, `activation` between the layers."""
    if activation not in _ACTIVATIONS:
        raise UserError(f"head_activation must be one of {', '.join(_ACTIVATIONS)}, not '{activation}'")
    tensors = {k.removeprefix("layers."): v for k, v in read_tensors(require(path, "the reward's head")).items()}
    modules: list[nn.Module] = []
    for place in sorted({int(k.split(".")[0]) for k in tensors}):
        weight = tensors[f"{place}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight.float(), "bias": tensors[f"{place}.bias"].float()})
        modules += [linear, _ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


class ClipReward:
    """Cosine between image and prompt embeddings, or a head on the image embedding. path: a CLIPModel directory with tokenizer and preprocessor_config.json, or `shapes:NAME`.

    scale multiplies the cosine (PickScore: exp(logit_scale), given as "logit"); resize: how other sizes are brought to the tower's;
    head: an MLP on the unit embedding in place of the cosine (the aesthetic predictor); the prompt then does not matter.
    """

    differentiable = True

    def __init__(
        self,
        path: str,
        *,
        resize: Resize = "shortest_crop",
        scale: float | str = 1.0,
        head: str | None = None,
        head_activation: str = "none",
        device: str = "cpu",
        dtype: str = "float32",
    ):
        folder = require(path, "the reward model")
        self.path, self.device, self.resize = str(path), torch.device(device), resize
        try:
            # On a CPU the fused kernel's backward is several times slower than plain attention at these lengths.
            kernel = "eager" if self.device.type == "cpu" else "sdpa"
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel)
            temperature = float(model.logit_scale.detach().exp())  # before the cast: in bf16 100 would become 99
            self.model = model.to(self.device, getattr(torch, dtype)).requires_grad_(False).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds for a missing or damaged file
            raise UserError(f"the reward model '{path}' cannot be loaded: {error}") from error
        settings = json.loads(require(folder / "preprocessor_config.json", "the reward's preprocessing").read_text())
        self.mean = torch.tensor(settings["image_mean"], device=self.device).view(3, 1, 1)
        self.std = torch.tensor(settings["image_std"], device=self.device).view(3, 1, 1)
        self.size = self.model.config.vision_config.image_size
        self.num_blocks = len(self.model.vision_model.encoder.layers)
        self.width, self.grid = self.model.config.vision_config.hidden_size, self.size // self.model.config.vision_config.patch_size
        self.offset = 0.0
        if scale == "surrogate":
            line = json.loads(require(folder / "surrogate.json", "the surrogate's scale").read_text())
            self.scale, self.offset = line["scale"], line["offset"]
        else:
            self.scale = temperature if scale == "logit" else float(scale)
        self.head = None if head is None else load_head(head, head_activation).to(self.device).requires_grad_(False).eval()
        self._whole = VisionTail(self.model, 1)
        self._texts: dict[str, Tensor] = {}

    # ---------------------------------------------------------------------------------------- scoring

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B] on the pictures' device, wherever the reward itself is."""
        return self.score_embedding(F.normalize(self.encode(images.to(self.device))[0], dim=-1), batch).to(images.device)

    def score_embedding(self, embedding: Tensor, batch: Batch) -> Tensor:
        """From an image embedding [B, D] (unit norm for a clean picture) to the reward [B]."""
        if self.head is not None:
            return self.head_of(embedding)
        return self.scale * (embedding * self.embed_texts(batch.prompts).to(embedding.device)).sum(-1) + self.offset

    def head_of(self, embedding: Tensor) -> Tensor:
        """The head's score [B] of an embedding, in float32 also inside autocast: bf16 would round scores of 4 to 8 to 1/32."""
        with torch.autocast(self.device.type, enabled=False):
            return self.head(embedding.to(self.device).float())[:, 0].to(embedding.device)

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
        return torch.stack([self._texts[p] for p in prompts])

    # ---------------------------------------------------------------------------------------- stitching

    def patches(self, images: Tensor) -> Tensor:
        """What the patch embedding produces [B, N, W]: images after preprocessing, no [CLS], no positions."""
        pixels = preprocess(images.to(self.device), self.size, self.mean, self.std, self.resize)
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
