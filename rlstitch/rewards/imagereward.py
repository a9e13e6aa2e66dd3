"""ImageReward (arXiv:2304.05977): a BLIP whose text encoder reads prompt and picture together by cross-attention, and an MLP on its first token.

A value model of it is stitched into its image tower; the score is read from the tail's tokens as it is from those of a picture. The weights are the published file's (ImageReward.pt), or the same tensors in safetensors; the modules are those of transformers.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rlstitch import hub
from rlstitch.figures import exact
from rlstitch.fingerprints import hash_tensors
from rlstitch.ranges import DeviceName, Dtype, Text
from rlstitch.rewards.preprocessing import OPENAI, Resize, stated
from rlstitch.types import Batch, UserError
from rlstitch.weights import fill_strictly, read_checkpoint, settled

WHAT = "the reward's weights"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the published model's scores over its own data
WINDOW = 35  # tokens of a prompt that it was trained on
VISION = (  # from the published names to those of transformers, in order
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")  # of BLIP's pretraining


class BlipTail(nn.Module):
    """BLIP's image tower from block j on (1-based): tokens [B, N, W] -> ([CLS] [B, W], all output tokens [B, N + 1, W] with [CLS] first), both after the last norm.

    j = 1 takes what the patch embedding produces, prepends [CLS] and adds positions. For j >= 2 the tokens carry their positions already; [CLS] starts from `cls`, a
    learnable vector.
    """

    def __init__(self, vision: BlipVisionModel, j: int):
        super().__init__()
        if not 1 <= j <= len(vision.encoder.layers):
            raise ValueError(f"a tower of {len(vision.encoder.layers)} blocks cannot be entered at block {j}")
        self.j, own = j, vision.embeddings.class_embedding
        self.cls = nn.Parameter(own.detach()[0, 0].clone() if j == 1 else torch.zeros_like(own[0, 0]))
        if j == 1:
            self.positions = vision.embeddings.position_embedding
        self.layers, self.after = nn.ModuleList(vision.encoder.layers[j - 1 :]), vision.post_layernorm

    def enter(self, tokens: Tensor) -> Tensor:
        """What the first of its blocks takes [B, N + 1, W]."""
        x = torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], 1)
        return x + self.positions if self.j == 1 else x

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.after(x)
        return x[:, 0], x


class ImageReward:
    """(r - mean) / std of the published model, about -2 to 2. path: its file (.pt or .safetensors), here or at the hub, owner/name/FILE; tokenizer: of bert-base-uncased.

    mean and std: of the raw scores; others than the published model's for one that was trained further. Pictures are brought to the tower's size as its own code does, by
    their shorter side and a crop. Prompts are cut to 35 tokens, as it was trained.
    """

    differentiable = True

    def __init__(
        self,
        path: Text,
        *,
        tokenizer: Text = "google-bert/bert-base-uncased",
        resize: Resize = "auto",
        mean: float = MEAN,
        std: float = STD,
        device: DeviceName = "cpu",
        dtype: Dtype = "float32",
    ):
        if std == 0:
            raise UserError("'std' is 0, and scores are divided by it")
        self.path, self.device, self.dtype, self.mean, self.std = str(path), torch.device(device), getattr(torch, dtype), mean, std
        file = hub.fetch(path, [], None, WHAT)
        parts = _parts(read_checkpoint(file, WHAT), file)
        self.tokenizer = AutoTokenizer.from_pretrained(hub.model_folder(tokenizer, "the reward's tokenizer"))
        self.vision, self.text = (settled(m, self.device, self.dtype) for m in parts[:2])
        self.mlp = settled(parts[2], self.device)  # small, and in float32
        side = self.vision.config.image_size
        self.num_blocks, self.width = len(self.vision.encoder.layers), self.vision.config.hidden_size
        self.grid, self._whole = side // self.vision.config.patch_size, BlipTail(self.vision, 1).requires_grad_(False).eval()
        word = "shortest_crop" if resize == "auto" else resize
        self.preprocessing = stated(word, side, mean=tuple(OPENAI[0]), std=tuple(OPENAI[1]))

    @staticmethod
    def needs(options: dict[str, Any]) -> list[str]:
        """What is loaded of a repository beside the file that `path` names: nothing."""
        return []

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B] on the pictures' device, wherever the reward itself is."""
        return self.score_tokens(self.encode(images.to(self.device))[1], batch).to(images.device)

    @exact
    def score_tokens(self, tokens: Tensor, batch: Batch) -> Tensor:
        """From all of the image tower's output tokens [B, N, W], [CLS] first, and the prompts to the score [B]; also inside autocast in the reward's own precision."""
        tokens = tokens.to(self.device)
        told = self.tokenizer(batch.prompts, padding="max_length", truncation=True, max_length=WINDOW, return_tensors="pt").to(self.device)
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=self.device)
        read = self.text(
            input_ids=told.input_ids,
            attention_mask=told.attention_mask,
            encoder_hidden_states=tokens.to(self.dtype),
            encoder_attention_mask=seen,
        )
        return (self.mlp(read.last_hidden_state[:, 0].float())[:, 0] - self.mean) / self.std

    # ---------------------------------------------------------------------------------------- stitching

    def view(self, height: int, width: int) -> tuple[float, float, float, float]:
        return self.preprocessing.view(height, width)

    def patches(self, images: Tensor) -> Tensor:
        """What the patch embedding produces [B, N, W]: images after preprocessing, no [CLS], no positions."""
        weight = self.vision.embeddings.patch_embedding
        return weight(self.preprocessing(images.to(self.device)).to(weight.weight.dtype)).flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """([CLS] [B, W], all output tokens [B, N + 1, W]), after the last norm."""
        cls, tokens = self._whole(self.patches(images))
        return cls.float(), tokens.float()

    def inputs_of_block(self, images: Tensor, last: int) -> list[Tensor]:
        """Inputs of blocks 1..last, one forward for all; j = 1 is what the patch embedding produces, j >= 2 starts with [CLS]."""
        tokens = self.patches(images)
        out, x = [tokens], self._whole.enter(tokens)
        for layer in self._whole.layers[: last - 1]:
            x = layer(x)
            out.append(x)
        return out

    def tail(self, j: int) -> BlipTail:
        """A trainable float32 copy of the tower from block j on."""
        return copy.deepcopy(BlipTail(self.vision, j)).float().requires_grad_(True)

    @staticmethod
    def cut_prompts(options: dict[str, Any], prompts: list[str]) -> list[tuple[str, int, int]]:
        """(prompt, its tokens, the limit) of prompts whose ends the reward does not see, by its tokenizer alone."""
        tokenizer = AutoTokenizer.from_pretrained(
            hub.model_folder(options.get("tokenizer", "google-bert/bert-base-uncased"), "the reward's tokenizer")
        )
        return [(p, n, WINDOW) for p, ids in zip(prompts, tokenizer(prompts).input_ids) if (n := len(ids)) > WINDOW]

    def fingerprint(self) -> str:
        """Hash of every weight that the score depends on."""
        modules = {"vision": self.vision, "text": self.text, "mlp": self.mlp}
        return hash_tensors({f"{part}.{k}": v for part, module in modules.items() for k, v in module.named_parameters()})


def _parts(found: dict[str, Tensor], source: Path) -> tuple[BlipVisionModel, BlipTextModel, nn.Sequential]:
    """Image tower, text encoder and MLP of the published tensors, whose shapes say how large they are. Raises UserError where they are of another model."""
    groups: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "mlp": {}}
    strange = []
    for name, value in found.items():
        if name.startswith("blip.visual_encoder."):
            own = name.removeprefix("blip.visual_encoder.")
            for old, new in VISION:
                own = re.sub(old, new, own)
            groups["vision"][own] = value
        elif name.startswith("blip.text_encoder.") and not UNUSED.fullmatch(name):
            groups["text"][name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp.layers."):
            groups["mlp"][name.removeprefix("mlp.layers.")] = value
        elif not UNUSED.fullmatch(name):
            strange.append(name)
    if strange or not all(groups.values()):
        lacks = [part for part, own in groups.items() if not own]
        raise UserError(
            f"{WHAT} {source} are no ImageReward's: "
            + (f"there is {', '.join(strange[:3])}" if strange else f"there is no {' and no '.join(lacks)}")
        )
    groups = {part: {name: value.float() for name, value in own.items()} for part, own in groups.items()}
    try:
        sizes, mlp = (_vision_config(groups["vision"]), _text_config(groups["text"])), _mlp(groups["mlp"])
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{WHAT} {source} are no ImageReward's: their tensors do not tell its size ({str(error).splitlines()[0][:120]})"
        ) from error
    vision = fill_strictly(BlipVisionModel, sizes[0], groups["vision"], source, WHAT)
    return vision, fill_strictly(BlipTextModel, sizes[1], groups["text"], source, WHAT, add_pooling_layer=False), mlp


def _layers(own: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in own if (found := re.match(pattern, name)))


def _vision_config(own: dict[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = own["embeddings.patch_embedding.weight"].shape
    places = own["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=own["encoder.layers.0.mlp.fc1.weight"].shape[0], patch_size=patch,
        num_hidden_layers=_layers(own, r"encoder\.layers\.(\d+)\."), num_attention_heads=max(1, width // 64), image_size=round(places**0.5) * patch,
        hidden_act="gelu", layer_norm_eps=1e-6, attention_dropout=0.0,
    )  # fmt: skip


def _text_config(own: dict[str, Tensor]) -> BlipTextConfig:
    vocabulary, width = own["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=own["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(own, r"encoder\.layer\.(\d+)\."), num_attention_heads=max(1, width // 64),
        max_position_embeddings=own["embeddings.position_embeddings.weight"].shape[0],
        encoder_hidden_size=own["encoder.layer.0.crossattention.self.key.weight"].shape[1], hidden_act="gelu", layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, is_decoder=True, use_cache=False, pad_token_id=0,
    )  # fmt: skip


def _mlp(own: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers without activations, at the places that dropout leaves them; strictly."""
    places = sorted({int(name.split(".")[0]) for name in own})
    mlp = nn.Sequential(*(nn.Identity() for _ in range(places[-1] + 1)))
    for k in places:
        mlp[k] = nn.Linear(*own[f"{k}.weight"].shape[::-1])
    mlp.load_state_dict(own)
    return mlp
