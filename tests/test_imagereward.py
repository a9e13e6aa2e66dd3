"""ImageReward against its architecture written out over the published file's own names, on random weights of a small cut of it."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import BertTokenizer

from rlstitch.contract import broken, contract
from rlstitch.files import write_tensors
from rlstitch.rewards.imagereward import ImageReward
from rlstitch.rewards.preprocessing import OPENAI
from rlstitch.types import Batch, UserError

WIDTH, HEADS, DEPTH, PATCH, SIDE, TEXT, LAYERS, WORDS = 128, 2, 2, 16, 32, 64, 2, 12
PROMPTS = ["a red cat", "a cat and a dog on the moon", "moon " * 40]


def tensors():
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: 0.2 * torch.randn(*shape, generator=generator)  # noqa: E731
    vit, bert = "blip.visual_encoder", "blip.text_encoder"
    out = {f"{vit}.cls_token": normal(1, 1, WIDTH), f"{vit}.pos_embed": normal(1, 1 + (SIDE // PATCH) ** 2, WIDTH)}

    def linear(name, outputs, inputs):
        out[f"{name}.weight"], out[f"{name}.bias"] = normal(outputs, inputs), normal(outputs)

    def norm(name, width):
        out[f"{name}.weight"], out[f"{name}.bias"] = 1 + normal(width), normal(width)

    out[f"{vit}.patch_embed.proj.weight"], out[f"{vit}.patch_embed.proj.bias"] = normal(WIDTH, 3, PATCH, PATCH), normal(WIDTH)
    for k in range(DEPTH):
        block = f"{vit}.blocks.{k}"
        norm(f"{block}.norm1", WIDTH), norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH), linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", 2 * WIDTH, WIDTH), linear(f"{block}.mlp.fc2", WIDTH, 2 * WIDTH)
    norm(f"{vit}.norm", WIDTH)
    out[f"{bert}.embeddings.word_embeddings.weight"] = normal(WORDS, TEXT)
    out[f"{bert}.embeddings.position_embeddings.weight"] = normal(40, TEXT)
    out[f"{bert}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{bert}.embeddings.LayerNorm", TEXT)
    for k in range(LAYERS):
        layer = f"{bert}.encoder.layer.{k}"
        for kind, inputs in (("attention", TEXT), ("crossattention", WIDTH)):
            linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}.{kind}.self.key", TEXT, inputs), linear(f"{layer}.{kind}.self.value", TEXT, inputs)
            linear(f"{layer}.{kind}.output.dense", TEXT, TEXT), norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 2 * TEXT, TEXT), linear(f"{layer}.output.dense", TEXT, 2 * TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 8, WIDTH), linear("blip.text_proj", 8, TEXT)
    for place, (outputs, inputs) in {0: (16, TEXT), 2: (8, 16), 4: (4, 8), 6: (2, 4), 7: (1, 2)}.items():
        linear(f"mlp.layers.{place}", outputs, inputs)
    return out


def expected(t, pixels, ids, mask):
    """BLIP's image-grounded text encoder and ImageReward's MLP, written out."""

    def linear(name, x):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def attend(q, k, v, heads, hidden=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        logits = logits if hidden is None else logits.masked_fill(hidden[:, None, None], -math.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    vit, bert = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(pixels, t[f"{vit}.patch_embed.proj.weight"], t[f"{vit}.patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([t[f"{vit}.cls_token"].expand(len(x), -1, -1), x], 1) + t[f"{vit}.pos_embed"]
    for k in range(DEPTH):
        block = f"{vit}.blocks.{k}"
        q, key, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, key, v, HEADS))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{vit}.norm", x, 1e-6)
    words = t[f"{bert}.embeddings.word_embeddings.weight"][ids] + t[f"{bert}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(f"{bert}.embeddings.LayerNorm", words, 1e-12)
    for k in range(LAYERS):
        layer = f"{bert}.encoder.layer.{k}"
        for kind, other, hidden in (("attention", None, mask == 0), ("crossattention", seen, None)):
            own = f"{layer}.{kind}"
            source = x if other is None else other
            q, key, v = linear(f"{own}.self.query", x), linear(f"{own}.self.key", source), linear(f"{own}.self.value", source)
            x = norm(f"{own}.output.LayerNorm", x + linear(f"{own}.output.dense", attend(q, key, v, 1, hidden)), 1e-12)
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x))), 1e-12)
    x = x[:, 0]
    for place in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{place}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    write_tensors(folder / "ImageReward.safetensors", tensors())
    torch.save(tensors(), folder / "ImageReward.pt")
    words = folder / "bert"
    words.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "and", "moon", "the"]
    (words / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(words / "vocab.txt")).save_pretrained(words)
    return folder


def test_it_is_the_published_model(files):
    reward = ImageReward(str(files / "ImageReward.safetensors"), tokenizer=str(files / "bert"))
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    told = reward.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert told.attention_mask.sum(1).tolist()[2] == 35 and told.attention_mask.sum(1).tolist()[0] == 5
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in OPENAI)
    wanted = expected(tensors(), (images - mean) / std, told.input_ids, told.attention_mask)
    batch = Batch(PROMPTS, torch.arange(3), torch.arange(3))
    with torch.no_grad():
        torch.testing.assert_close(reward.score(images, batch), wanted, atol=1e-5, rtol=1e-5)
        again = ImageReward(str(files / "ImageReward.pt"), tokenizer=str(files / "bert"))
        assert torch.equal(again.score(images, batch), reward.score(images, batch)) and again.fingerprint() == reward.fingerprint()
    assert [n for _, n, _ in ImageReward.cut_prompts({"tokenizer": str(files / "bert")}, PROMPTS)] == [42]


def test_another_model_is_no_imagereward(files, tmp_path):
    for change, message in (
        (lambda t: {k: v for k, v in t.items() if not k.startswith("mlp.")}, "are no ImageReward's: there is no mlp"),
        (lambda t: t | {"logit_scale": torch.ones(1)}, "are no ImageReward's: there is logit_scale"),
        (lambda t: t | {"mlp.layers.7.bias": torch.ones(3)}, "do not tell its size"),
        (lambda t: {k: v for k, v in t.items() if "crossattention" not in k}, "do not tell its size"),
        (lambda t: {k: v for k, v in t.items() if "blocks.0.norm1.bias" not in k}, "1 are missing .encoder.layers.0.layer_norm1.bias."),
        (lambda t: t | {"blip.text_encoder.encoder.layer.1.output.dense.bias": torch.full((TEXT,), torch.nan)}, "NaN|not finite"),
    ):
        write_tensors(tmp_path / "odd.safetensors", change(tensors()))
        with pytest.raises(UserError, match=message):
            ImageReward(str(tmp_path / "odd.safetensors"), tokenizer=str(files / "bert"))


def test_it_keeps_the_contract(files):
    reward = ImageReward(str(files / "ImageReward.safetensors"), tokenizer=str(files / "bert"))
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(2))
    assert not broken(contract("imagereward", reward, images, PROMPTS))
