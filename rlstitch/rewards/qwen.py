"""Preference models on Qwen2-VL, such as HPSv3 (arXiv:2508.03789): a head that reads the language model's last state at a token of its own.

Pictures are prepared in torch, so that the score has a gradient; one picture and prompt at a time, as these models were trained, so that a batch equals its pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from rlstitch import hub
from rlstitch.figures import exact
from rlstitch.files import read_json, worthless
from rlstitch.fingerprints import hash_tensors
from rlstitch.prompts import read_text
from rlstitch.ranges import Count, CountOrNone, DeviceName, Dtype, Text
from rlstitch.rewards.preprocessing import OPENAI
from rlstitch.types import Batch, UserError
from rlstitch.weights import fill_strictly, read_checkpoint, settled

WHAT = "the reward's weights"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
TOKEN = "<|Reward|>"
ASPECT = 200  # beyond which the model's own code refuses a picture
PICTURE = "<|image_pad|>"  # stands for one patch of the language model's


class QwenPreference:
    """Output `output` of the head, for HPSv3 its mean score, which has no bounds; good pictures have 7 to 13. path: the file of weights (safetensors, `rm_head.*` among them);
    base: the folder or hub id that has the configuration and the tokenizer.

    instruction: what is asked, with {prompt} in it and the token that the head reads; a text, or a file that holds it (HPSv3's stands in its repository). token: that token;
    pixels: about how many a picture is brought to, in whole multiples of two patches.
    """

    differentiable = True

    def __init__(
        self,
        path: Text,
        *,
        instruction: Text,
        base: Text = BASE,
        token: Text = TOKEN,
        output: CountOrNone = 0,
        pixels: Count = 256 * 28 * 28,
        device: DeviceName = "cpu",
        dtype: Dtype = "bfloat16",
    ):
        self.path, self.device, self.dtype, self.output, self.pixels = (
            str(path),
            torch.device(device),
            getattr(torch, dtype),
            output,
            pixels,
        )
        self.instruction = asked(instruction, token)
        folder = hub.model_folder(base, "the reward's base model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.add_tokens([token], special_tokens=True)
        self.token = self.tokenizer.convert_tokens_to_ids(token)
        file = hub.fetch(path, [], None, WHAT)
        model, self.head = _parts(read_checkpoint(file, WHAT), read_json(folder / "config.json", "the base model's config"), file)
        if self.token >= (rows := model.get_input_embeddings().num_embeddings):
            raise UserError(
                f"{WHAT} {path} have {rows} words, and '{token}' would be number {self.token}: it is the token of another model, or base is"
            )
        if self.output >= (there := [m for m in self.head if isinstance(m, nn.Linear)][-1].out_features):
            raise UserError(f"'output' is {output}, and the head of {path} has {there} outputs, counted from 0")
        self.model = settled(model, self.device, self.dtype)
        self.head = settled(self.head, self.device)  # in float32, as it was trained
        self.patch, self.merge = model.config.vision_config.patch_size, model.config.vision_config.spatial_merge_size

    @staticmethod
    def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
        """(key, why) of what keeps a recipe's reward from loading, by its small files alone."""
        looks: dict[str, Callable[[], Any]] = {
            "path": lambda: hub.missing(options["path"], [], None, WHAT) or hub.model_folder(options["path"], WHAT),
            "base": lambda: hub.model_folder(options.get("base", BASE), "the reward's base model"),
            "instruction": lambda: asked(options["instruction"], options.get("token", TOKEN)),
        }
        out = []
        for key, look in looks.items():
            try:
                look()
            except (UserError, OSError) as error:
                out.append((key, str(error)))
        return out

    @staticmethod
    def needs(options: dict[str, Any]) -> list[str]:
        """What is loaded of a repository beside the file that `path` names: nothing."""
        return []

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B] on the pictures' device, wherever the reward itself is."""
        return torch.stack([self.score_one(image, prompt) for image, prompt in zip(images.to(self.device), batch.prompts)]).to(
            images.device
        )

    def score_one(self, image: Tensor, prompt: str) -> Tensor:
        """The score of a picture [3, H, W] under a prompt, a scalar; also inside autocast as outside."""
        patches, grid = self.patches(image)
        ids = self.ids(prompt, int(grid.prod()) // self.merge**2)
        return self._read(patches, grid, ids)

    @exact
    def _read(self, patches: Tensor, grid: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            states = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=patches.to(self.dtype), image_grid_thw=grid[None],
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(), use_cache=False,
            ).last_hidden_state  # fmt: skip
            return self.head(states[0, (ids[0] == self.token).nonzero()[-1, 0]].float())[self.output]

    def ids(self, prompt: str, count: int) -> Tensor:
        """[1, L]: the model's chat with a picture of `count` tokens and the instruction."""
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.instruction.replace("{prompt}", prompt)}]}]
        text = self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        if text.count(PICTURE) != 1:  # a prompt may hold it, too
            head, _, tail = text.partition(PICTURE)
            text = head + PICTURE + tail.replace(PICTURE, "")
        return self.tokenizer(text.replace(PICTURE, PICTURE * count), return_tensors="pt").input_ids.to(self.device)

    def patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(patches [N, 3 * 2 * p * p], (frames, rows, columns)) of a picture [3, H, W] in [0, 1], resized as Qwen2-VL's own processor does, a picture being two equal frames."""
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        height, width = smart_resize(image.shape[-2], image.shape[-1], self.patch * self.merge, self.pixels)
        if (height, width) != tuple(image.shape[-2:]):
            for size in ((image.shape[-2], width), (height, width)):  # PIL's two passes
                if size != tuple(image.shape[-2:]):
                    image = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
        mean, std = (torch.tensor(v, device=image.device, dtype=image.dtype).view(3, 1, 1) for v in OPENAI)
        p, m = self.patch, self.merge
        x = ((image - mean) / std).reshape(3, height // (m * p), m, p, width // (m * p), m, p).permute(1, 4, 2, 5, 0, 3, 6)
        x = x.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1)
        return x.reshape(-1, 3 * 2 * p * p), torch.tensor([1, height // p, width // p], device=image.device)

    def fingerprint(self) -> str:
        """Hash of every weight that the score depends on."""
        parts = {"model": self.model, "head": self.head}
        return hash_tensors({f"{part}.{k}": v for part, module in parts.items() for k, v in module.named_parameters()})


def asked(instruction: str, token: str) -> str:
    """The instruction, from a file where it names one. Raises UserError where the prompt or the token has no place in it, or more than one."""
    text = read_text(instruction, "the instruction") if "{prompt}" not in instruction else instruction
    if text.count("{prompt}") != 1 or text.count(token) != 1:
        raise UserError(
            f"the instruction must hold {{prompt}} once and {token} once; it holds them {text.count('{prompt}')} and {text.count(token)} times"
        )
    return text


def smart_resize(height: int, width: int, factor: int, pixels: int) -> tuple[int, int]:
    """The size that a picture is brought to: multiples of `factor`, with the picture's shape and `pixels` pixels as nearly as may be."""
    if max(height, width) / min(height, width) > ASPECT:
        raise UserError(f"a picture of {width} x {height} is too long for Qwen2-VL, which takes sides of 1 to {ASPECT}")
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > pixels:
        beta = math.sqrt(height * width / pixels)
        return max(factor, math.floor(height / beta / factor) * factor), max(factor, math.floor(width / beta / factor) * factor)
    if h * w < pixels:
        beta = math.sqrt(pixels / (height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def _parts(found: dict[str, Tensor], told: dict[str, Any], source: Path) -> tuple[Qwen2VLModel, nn.Sequential]:
    """The model without its word head, and the reward's head in float32. Raises UserError where the tensors are another model's."""
    own: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, value in found.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = value.float()
        elif not name.startswith("lm_head."):
            name = re.sub(r"^(model\.)?visual\.", "visual.", name)
            own[re.sub(r"^model\.(language_model\.)?", "language_model.", name)] = value
    if not head or "language_model.embed_tokens.weight" not in own:
        raise UserError(
            f"{WHAT} {source} are of no preference model on Qwen2-VL: there is no {'rm_head' if not head else 'model.embed_tokens'}"
        )
    if told.get("model_type") != "qwen2_vl":
        raise UserError(f"the reward's base model is a {told.get('model_type')}, and only qwen2_vl is read here")
    config = Qwen2VLConfig(**{k: v for k, v in told.items() if k != "model_type"})
    config.text_config.vocab_size = len(own["language_model.embed_tokens.weight"])
    if why := worthless(head):
        raise UserError(f"{WHAT} {source}: {why}")
    model = fill_strictly(Qwen2VLModel, config, own, source, WHAT)
    return model, _head(head, config.text_config.hidden_size, source)


def _head(own: dict[str, Tensor], width: int, source: Path) -> nn.Sequential:
    """A linear layer, or several with ReLU between them, whatever numbers dropout and activations leave them."""
    plain = {f"0.{k}": v for k, v in own.items()} if set(own) <= {"weight", "bias"} else own
    places = sorted({int(k.split(".")[0]) for k in plain if k.split(".")[0].isdigit()})
    modules: list[nn.Module] = []
    for k in places:
        weight, bias = plain.get(f"{k}.weight"), plain.get(f"{k}.bias")
        if weight is None or weight.ndim != 2 or weight.shape[1] != width:
            raise UserError(f"{WHAT} {source}: rm_head.{k} does not take {width} channels")
        width = weight.shape[0]
        linear = nn.Linear(weight.shape[1], width, bias=bias is not None)
        linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        modules += [linear, nn.ReLU()]
    if not modules or len(plain) != sum(len(list(m.parameters())) for m in modules):
        raise UserError(f"{WHAT} {source}: rm_head is no list of linear layers ({', '.join(sorted(own)[:4])})")
    return nn.Sequential(*modules[:-1])
