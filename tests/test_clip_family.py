"""The CLIP family in the layouts that it is published in, against references of its own: open_clip's towers written anew, transformers' models, PIL."""

import json
import math
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from rlstitch.part_checks import reward_faults
from rlstitch.rewards import openclip, preprocessing
from rlstitch.rewards.clip import ClipReward
from rlstitch.rewards.towers import VisionTail
from rlstitch.shapes import tokenizer as shapes_tokenizer
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.stitch.search import search
from rlstitch.types import Batch, Latent, UserError
from tests.pipelines import tokenizer as byte_tokenizer
from tests.test_preprocessing import picture

PROMPTS = ["a red circle", "Two stars, and a blue square"]
BATCH = Batch(PROMPTS, torch.arange(2), torch.arange(2))
TARGET = "rlstitch.rewards.clip.ClipReward"


# ---------------------------------------------------------------------------------------------------- open_clip's layout


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, hidden, act):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True), nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, hidden), gelu=act(), c_proj=nn.Linear(hidden, width)))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, *sizes, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*sizes) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, heads, layers, grid, patch, dim, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, heads, 96, act, layers=layers)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, dim))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP in the names and the arithmetic of open_clip's own model: fused projections, bare parameters, the text read off at the largest token."""

    def __init__(self, vocabulary, *, quick, width=128, heads=2, layers=2, grid=2, patch=14, dim=24, window=24):
        super().__init__()
        act = QuickGelu if quick else nn.GELU
        self.visual = Visual(width, heads, layers, grid, patch, dim, act)
        self.token_embedding, self.positional_embedding = nn.Embedding(vocabulary, 64), nn.Parameter(torch.randn(window, 64))
        self.transformer, self.ln_final = Blocks(64, 1, 80, act, layers=3), nn.LayerNorm(64)
        self.text_projection, self.logit_scale = nn.Parameter(torch.randn(64, dim)), nn.Parameter(torch.tensor(4.6))

    def text(self, ids):
        mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def write_open_clip(file, *, quick=False, beginning="", text="", tokenizer=True, seed=0, **sizes):
    """A random checkpoint; -> the reference."""
    torch.manual_seed(seed)
    words = shapes_tokenizer.build(file.parent / ("" if tokenizer else "words"))
    model = OpenClip(len(words), quick=quick, **sizes).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))  # norms and biases, too
    state = {f"{beginning}{'' if n.startswith(('visual.', 'logit')) else text}{n}": p.contiguous() for n, p in model.state_dict().items()}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(
        {"epoch": 3, "name": "x", "state_dict": state} if beginning else state, file
    )
    return model


def close(reward, model, images):
    ids = reward.tokens(PROMPTS)
    pixels = reward.preprocessing(images)
    image, text = F.normalize(model.visual(pixels), dim=-1), F.normalize(model.text(ids), dim=-1)
    torch.testing.assert_close(F.normalize(reward.encode(images)[0], dim=-1), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward.embed_texts(PROMPTS), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward.score(images, BATCH), (image * text).sum(-1), atol=1e-5, rtol=0)


LAYOUTS = {  # the file, what stands before its names, sizes that are not the usual ones
    "a trainer's pickle": ("laion/tiny.pt", dict(beginning="module.")),
    "a text tower of its own": ("dfn5b/open_clip_pytorch_model.bin", dict(text="text.", quick=True)),
    "safetensors": ("openai-tiny.safetensors", dict(quick=True, layers=3, grid=3, patch=8)),
    "heads 80 wide": ("hps_wide.pt", dict(width=1280, heads=16, layers=1, patch=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_open_clip_is_its_own_forward(tmp_path, generator, layout):
    name, how = LAYOUTS[layout]
    (file := tmp_path / name).parent.mkdir(exist_ok=True)
    model = write_open_clip(file, **how)
    images = torch.rand(2, 3, 40, 40, generator=generator)
    path = str(file.parent if file.name in openclip.FILES else file)
    node = {"_target_": TARGET, "path": path}
    assert not reward_faults("rewards.r", node)
    reward = ClipReward(path, scale="logit")
    assert reward.scale == pytest.approx(float(model.logit_scale.exp())) and reward.grid == how.get("grid", 2)
    assert reward.preprocessing.edge == (
        {"dfn5b": ("exact", 28, 28), "hps_wide.pt": ("longest", 4, 0)}.get(name.split("/")[0]) or ("shortest", reward.size, 0)
    )
    reward.scale = 1.0
    close(reward, model, images)
    other = "gelu" if how.get("quick") else "quick_gelu"
    assert not torch.allclose(ClipReward(path, activation=other).score(images, BATCH), reward.score(images, BATCH), atol=1e-5)
    assert ClipReward.cut_prompts(node, ["a red circle " * 9]) == [("a red circle " * 9, 29, 24)]


def test_what_shapes_do_not_tell_stands_beside_the_file(tmp_path, generator):
    file = tmp_path / "mine.bin"
    model = write_open_clip(file, width=96, heads=3, quick=True, grid=3, patch=8)  # three heads of 32
    assert "whose heads are told by no rule" in str(
        reward_faults("rewards.r", {"_target_": TARGET, "path": str(file), "activation": "gelu"})
    )
    said = {"model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": {"width": 96, "head_width": 32}, "text_cfg": {"heads": 1}}}
    said["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5, 0.4, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / openclip.SETTINGS).write_text(json.dumps(said))
    reward = ClipReward(str(tmp_path))
    assert (reward.preprocessing.edge, reward.preprocessing.filter, reward.preprocessing.std) == (
        ("exact", 24, 24),
        "bilinear",
        (0.5, 0.4, 0.3),
    )
    close(reward, model, torch.rand(2, 3, 30, 40, generator=generator))
    said["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    (tmp_path / openclip.SETTINGS).write_text(json.dumps(said))
    assert "its open_clip_config.json has pool_type" in str(reward_faults("rewards.r", {"_target_": TARGET, "path": str(file)}))


def torchvisions(mode, image, side):
    """The three ways of open_clip, by PIL."""
    h, w = image.shape[-2:]
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    if mode == "squash":
        return pil.resize((side, side), Image.BICUBIC)
    if mode == "shortest":
        size = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
        return pil.resize(size, Image.BICUBIC).crop((left, top, left + side, top + side))
    scale = side / max(h, w)
    size = (round(w * scale), round(h * scale))
    out = Image.new("RGB", (side, side))
    out.paste(pil.resize(size, Image.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2))
    return out


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_pictures_are_prepared_as_open_clip_does(mode):
    """Within 1.5 grey levels of PIL's, which rounds after each of its passes (see tests/test_preprocessing.py for pictures that shrink more in height)."""
    found = preprocessing.of_open_clip({"resize_mode": mode}, 56, "auto", "squash")
    mean, std = (np.array(v)[:, None, None] for v in preprocessing.OPENAI)
    for size in ((64, 64), (97, 64), (64, 101), (57, 56), (56, 56), (40, 40), (130, 71), (71, 139), (83, 160), (55, 57), (200, 113)):
        image = picture(*size)
        expected = (np.asarray(torchvisions(mode, image, 56)).transpose(2, 0, 1) / 255 - mean) / std
        levels = 6.5 if mode == "squash" and size[0] > size[1] else 1.5
        assert np.abs(found(image[None].float() / 255)[0].numpy() - expected).max() < levels / 255 / 0.26, size


class Code:
    def __reduce__(self):
        return (print, ("run",))


def _edited(change):
    def write(file):
        write_open_clip(file)
        found = torch.load(file, weights_only=True)
        change(found)
        torch.save(found, file)

    return write


WRONG = {
    "a weight is missing": (_edited(lambda s: s.pop("visual.transformer.resblocks.1.ln_2.bias")), "1 are missing .vision_model.encoder.layers.1.layer_norm2.bias."),
    "one too many": (_edited(lambda s: s.update({"visual.ls": torch.ones(2)})), r"1 are unknown to it .visual.ls."),
    "another shape": (_edited(lambda s: s.update({"ln_final.weight": torch.ones(3)})), "1 have another shape .text_model.final_layer_norm.weight."),
    "SigLIP's bias": (_edited(lambda s: s.update({"logit_bias": torch.tensor(1.0)})), "unknown to it .logit_bias."),
    "a tower of timm": (_edited(lambda s: s.update({"visual.trunk.x": torch.ones(1)})), "an image tower that is a model of timm"),
    "a ResNet": (_edited(lambda s: s.update({"visual.layer1.0.x": torch.ones(1)})), "an image tower that is a ResNet"),
    "no CLIP": (lambda file: torch.save({"weight": torch.ones(2)}, file), "is no CLIP in open_clip's layout: it has no visual.conv1.weight"),
    "not finite": (_edited(lambda s: s["visual.proj"].fill_(math.nan)), "1 of .* tensors hold NaN or Inf"),
    "numbers beside them": (_edited(lambda s: s.update({"step": 3})), "holds 1 entries that are no tensors, e.g. step"),
    "code": (lambda file: torch.save({"visual.proj": Code()}, file), r"does not read with weights_only=True \(it names (builtins.)?print, which would be run\)"),
    "a program": (lambda file: torch.jit.script(nn.Linear(2, 2)).save(str(file)), "it is a TorchScript archive, which is a program"),
    "a page of HTML": (lambda file: file.write_text("<html>not found</html>"), "does not read with weights_only=True"),
    "no tokenizer": (lambda file: write_open_clip(file, tokenizer=False), "has no tokenizer beside it: set tokenizer to a folder or hub id that has CLIP's"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_one_line(tmp_path, case, capsys):
    write, why = WRONG[case]
    write(file := tmp_path / "laion.pt")
    with pytest.raises(UserError, match=why) as told:
        ClipReward(str(file))
    assert "\n" not in str(told.value) and "run\n" not in capsys.readouterr().out
    faults = reward_faults("rewards.r", {"_target_": TARGET, "path": str(file)})  # before weights load, as far as names and shapes tell
    assert len(faults) == 1 if case not in ("a weight is missing", "one too many", "another shape", "SigLIP's bias", "not finite") else True


def test_a_wrong_checkpoint_under_a_right_name(tmp_path, monkeypatch):
    write_open_clip(file := tmp_path / "HPS_v2.1_compressed.pt")
    (fault,) = reward_faults("rewards.r", {"_target_": TARGET, "path": str(file)})
    assert (
        "is called HPSv2, which is a ViT-H/14 of 32 blocks for 224 pixels, and holds one of 2 blocks of width 128, patches of 14, for 28 pixels"
        in fault
    )
    right = {"vision_config": {"hidden_size": 1280, "num_hidden_layers": 32, "patch_size": 14, "image_size": 224}}
    assert not openclip.another(str(file), file, right)  # of an unknown hash
    monkeypatch.setattr(openclip, "_md5", lambda *_: "fd9180de357abf01fdb4eaad64631db4")
    assert "is called HPSv2.1, and by its md5 is HPSv2.0" in openclip.another(str(file), file, right)
    assert not openclip.another("xswu/HPSv2/HPS_v2_compressed.pt", file, right)
    monkeypatch.setattr(openclip, "_md5", lambda *_: "4067542e34ba2553a738c5ac6c1d75c0")
    assert not openclip.another(str(file), file, right)
    assert "is called HPSv2.0, and by its md5 is HPSv2.1" in openclip.another("HPS_v2_compressed.pt", file, right)
    file.rename(plain := tmp_path / "plain.pt")
    node = {"_target_": TARGET, "path": str(plain)}
    assert "does not tell its activation" in str(reward_faults("rewards.r", node))
    assert not reward_faults("rewards.r", node | {"activation": "gelu"})
    CLIPTokenizer(vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[]).save_pretrained(tmp_path / "few")
    with pytest.raises(UserError, match="the tokenizer has 3, of which 2 ends a prompt: set tokenizer"):
        ClipReward(str(plain), activation="gelu", tokenizer=str(tmp_path / "few"))
    assert "'rewards.r.tokenizer'" in str(reward_faults("rewards.r", node | {"activation": "gelu", "tokenizer": str(tmp_path / "none")}))


# ---------------------------------------------------------------------------------------------------- SigLIP


def write_siglip(folder, *, kind="siglip", size=28, patch=7, layers=3, seed=0):
    torch.manual_seed(seed)
    text = dict(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2, image_size=size, patch_size=patch)
    model = SiglipModel(SiglipConfig(text_config=text | tokens, vision_config=vision))
    with torch.no_grad():
        model.logit_scale.fill_(4.7), model.logit_bias.fill_(-16.5)
        for parameter in model.vision_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    byte_tokenizer(64).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_dir(tmp_path_factory):
    return write_siglip(tmp_path_factory.mktemp("siglip"))


def test_siglip_is_transformers_own(siglip_dir):
    """Text padded to the window of 64, small letters alone, scale and bias of its logits; pictures by its processor on PIL, within grey levels, for ten sizes."""
    assert not reward_faults("rewards.r", {"_target_": TARGET, "path": str(siglip_dir)})
    reward, model = ClipReward(str(siglip_dir), scale="logit"), SiglipModel.from_pretrained(siglip_dir).eval()
    ids = reward.tokenizer([p.lower() for p in PROMPTS], padding="max_length", max_length=64, return_tensors="pt").input_ids
    assert ids.shape == (2, 64)
    processor = SiglipImageProcessorPil.from_pretrained(siglip_dir)
    for size in ((28, 28), (40, 40), (64, 33), (33, 64), (29, 28), (20, 20), (57, 74), (112, 112), (90, 31), (31, 45)):
        images = torch.stack([picture(*size, seed=k) for k in range(2)])
        stock = processor([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images])["pixel_values"]
        prepared = reward.preprocessing(images.float() / 255)
        assert (prepared - torch.tensor(np.stack(stock))).abs().max() < (8 if size[0] > size[1] else 1.5) / 127.5
        with torch.no_grad():
            seen = model(input_ids=ids, pixel_values=prepared)
        torch.testing.assert_close(F.normalize(reward.encode(images.float() / 255)[0], dim=-1), seen.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(reward.embed_texts(PROMPTS), seen.text_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(reward.score(images.float() / 255, BATCH), seen.logits_per_image.diagonal(), atol=1e-4, rtol=1e-5)
    assert ClipReward(str(siglip_dir)).offset == 0 and reward.offset == pytest.approx(-16.5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tail_is_the_rest_of_the_tower_from_every_block(kind, clip_dir, siglip_dir, generator):
    reward = ClipReward(str({"clip": clip_dir, "siglip": siglip_dir}[kind]))
    images, patches = torch.rand(2, 3, reward.size, reward.size, generator=generator), reward.grid**2
    embedding, tokens = reward.encode(images)
    whole = reward.model.vision_model(pixel_values=reward.preprocessing(images)).pooler_output
    torch.testing.assert_close(reward.model.visual_projection(whole) if kind == "clip" else whole, embedding, atol=1e-5, rtol=0)
    assert tokens.shape[1] == patches + (kind == "clip")
    for j, x in enumerate(reward.inputs_of_block(images, reward.num_blocks), 1):
        tail = reward.tail(j)
        assert (tail.cls is None) == (kind == "siglip")
        cls = x[:, 0] if x.shape[1] > patches else None
        found = VisionTail(reward.model, j)(x[:, -patches:], cls)
        assert torch.equal(found[0], embedding) and torch.equal(found[1], tokens), j
        copied = tail(x[:, -patches:], cls)  # whose tensors lie elsewhere in memory
        torch.testing.assert_close(copied[0], embedding, atol=1e-5, rtol=0)
        assert torch.equal(reward.prefix(images, j), x[:, -patches:])
        assert torch.equal(reward.suffix(x[:, -patches:], j, cls), F.normalize(embedding, dim=-1))


def test_a_value_is_stitched_onto_a_tower_without_cls(backbone, siglip_dir, tmp_path, generator):
    reward, images = ClipReward(str(siglip_dir)), torch.rand(6, 3, 16, 16, generator=generator)
    found = search(backbone, reward, images, max_reward_block=3, batch_size=3)
    assert len(found.table) == 9 and set(found.cls.values()) == {None}
    pair = next(p for p in found.table if (p.i, p.j) == (2, 2))
    card = {"backbone": {"path": str(backbone.path)}, "blocks": 2, "reward_block": 2}
    from rlstitch.fingerprints import vae_names

    model = StitchedValueModel.from_search(
        backbone, reward, 2, 2, pair.weight, pair.bias, cls_state=found.cls[2], norm=2.0, normalise=False, sigma_range=(0.0, 1.0), card=card | vae_names(backbone.path)
    )  # fmt: skip
    z = torch.randn(2, *backbone.latent_shape, generator=generator).requires_grad_(True)
    value = model.value(Latent(z, torch.tensor([0.3, 0.6])), BATCH)
    assert torch.autograd.grad(value.sum(), z)[0].abs().sum() > 0 and "tail.cls" not in model.state_dict()
    model.save_pretrained(tmp_path / "value", half=False)
    again = StitchedValueModel.from_pretrained(tmp_path / "value", backbone=backbone, reward=reward)
    torch.testing.assert_close(again.value(Latent(z, torch.tensor([0.3, 0.6])), BATCH), value)


def test_other_kinds_are_refused_by_name(siglip_dir, tmp_path):
    folder = shutil.copytree(siglip_dir, tmp_path / "other")
    for kind, why in (
        ("siglip2", "of a variable grid .NaFlex., and only those of a fixed grid"),
        ("blip", "is a blip, and only clip and siglip"),
    ):
        config = json.loads((siglip_dir / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        with pytest.raises(UserError, match=why):
            ClipReward(str(folder))
    (folder / "config.json").unlink()
    save_file({"x": torch.ones(1)}, folder / "b.safetensors")
    with pytest.raises(UserError, match=r"has no config.json, and 2 files of weights \(b.safetensors, model.safetensors\): name one"):
        ClipReward(str(folder))
    with pytest.raises(UserError, match="is no folder and no file of weights"):
        ClipReward(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("kind", "beginning", "places"), [("clip", "layers.", (0, 2, 4, 6, 7)), ("siglip", "scoring_head.", (0, 2, 4, 6, 8))]
)
def test_an_aesthetic_head_is_read_as_it_was_published(kind, beginning, places, clip_dir, siglip_dir, tmp_path, generator):
    """v2 has linears at 0, 2, 4, 6 and 7, v2.5 at 0 to 8, both on the unit embedding with nothing between them but dropout."""
    reward = ClipReward(str({"clip": clip_dir, "siglip": siglip_dir}[kind]))
    images = torch.rand(2, 3, reward.size, reward.size, generator=generator)
    x = F.normalize(reward.encode(images)[0], dim=-1)
    state, sizes = {}, [x.shape[-1], 10, 8, 6, 4, 1]
    for place, (a, b) in zip(places, zip(sizes, sizes[1:])):
        weight, bias = torch.randn(b, a, generator=generator), torch.randn(b, generator=generator)
        state |= {f"{beginning}{place}.weight": weight, f"{beginning}{place}.bias": bias}
        x = x @ weight.T + bias
    torch.save(state, tmp_path / "head.pth")
    save_file(state, tmp_path / "head.safetensors")
    for file in ("head.pth", "head.safetensors"):
        scored = ClipReward(reward.path, head=str(tmp_path / file))
        torch.testing.assert_close(scored.score(images, BATCH), x[:, 0], atol=1e-5, rtol=1e-5)
    node = {"_target_": TARGET, "path": reward.path, "head": str(tmp_path / "none.pth")}
    assert "'rewards.r.head'" in str(reward_faults("rewards.r", node))
