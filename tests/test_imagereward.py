"""ImageReward against its architecture written out over the published file's own names, on random weights of a small cut of it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BertTokenizer

from rlstitch import config as cfg
from rlstitch.checks import checked
from rlstitch.contract import broken, contract
from rlstitch.files import write_tensors
from rlstitch.rewards.imagereward import ImageReward
from rlstitch.rewards.preprocessing import OPENAI
from rlstitch.stitch import compare, measure
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.distill import DistillConfig, distillation_loss, targets_of
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.trainer import Trainer
from rlstitch.types import Batch, Latent, UserError
from tests.test_stitch_job import given

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


def test_the_score_is_read_from_any_tails_tokens(files):
    """Entered at any block, the tower gives the tokens of a whole forward, from which the score of the picture is read."""
    reward = ImageReward(str(files / "ImageReward.safetensors"), tokenizer=str(files / "bert"))
    images, batch = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(2)), Batch(PROMPTS, torch.arange(3), torch.arange(3))
    with torch.no_grad():
        whole = reward.vision(reward.preprocessing(images)).last_hidden_state
        score = reward.score(images, batch)
        for j, inputs in enumerate(reward.inputs_of_block(images, DEPTH), 1):
            tail, known = reward.tail(j), 3 if j == 1 else 1
            if j > 1:
                tail.cls.copy_(inputs[0, 0])  # one vector for all pictures, so that it is right for the first alone
            tokens = tail(inputs[:known, -(reward.grid**2) :])[1]
            torch.testing.assert_close(tokens, whole[:known], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(reward.score_tokens(tokens, batch[:known]), score[:known], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot be entered at block 9"):
        reward.tail(9)


def test_a_value_of_it_is_stitched_trained_on_and_measured(files, sd3_dir, tmp_path):
    """By the jobs: the recipe of any reward, another name in it. The value is differentiable in the latent, and the distillation sees the score under the pictures' prompts."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(PROMPTS[k % 2])
    node = {
        "_target_": "rlstitch.rewards.imagereward.ImageReward",
        "path": str(files / "ImageReward.safetensors"),
        "tokenizer": str(files / "bert"),
    }
    options = dict(reward=node, distill={"steps": 12, "batch_size": 8, "autocast": False, "lr": 1e-3, "warmup": 1})
    recipe = stitch.checked(given(folder, sd3_dir, "", **options), "tiny")
    model = stitch.run(recipe)[""]
    assert all(set(row) == {"correlation"} for row in model.card["quality"].values()) and "clean_recall_at_1" not in model.card
    loaded = StitchedValueModel.from_pretrained(folder / "values" / "tiny")
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    batch, sigma = measure.batch_of(PROMPTS[:2]), torch.tensor([0.3, 0.8])
    torch.testing.assert_close(
        loaded.value(Latent(z, sigma), batch), model.value(Latent(z, sigma), batch), atol=2e-2, rtol=2e-2
    )  # kept in half
    slope = torch.autograd.grad(loaded.value(Latent(z, sigma), batch).sum(), z)[0]
    with torch.no_grad():
        way, h = slope / slope.norm(), 1e-2
        ahead, behind = (loaded.value(Latent(z + s * h * way, sigma), batch).sum() for s in (1, -1))
    assert float((ahead - behind) / (2 * h)) == pytest.approx(float(slope.norm()), rel=0.02)
    told, own = loaded.value(Latent(z, sigma), batch), loaded.value(Latent(z, sigma), measure.batch_of(PROMPTS[1::-1]))
    assert not torch.allclose(told, own)  # it reads the prompt

    reward, images = loaded.reward, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    unit, tokens, _ = targets_of(reward, images)
    with torch.no_grad():
        grid = loaded.activations(z, sigma).grid
    _, parts = distillation_loss(loaded, grid, sigma, unit, tokens.float(), DistillConfig(), PROMPTS[:2])
    by_hand = (told - reward.score(images, batch)).square().mean()
    torch.testing.assert_close(parts["score"], by_hand.detach(), atol=1e-3, rtol=1e-3)
    model.train()
    with_score, without = (
        distillation_loss(model, grid, sigma, unit, tokens.float(), DistillConfig(score_weight=2.0), p) for p in (PROMPTS[:2], None)
    )
    assert "score" not in without[1] and float(with_score[0] - without[0]) == pytest.approx(2 * float(with_score[1]["score"]), rel=1e-4)
    assert torch.autograd.grad(with_score[0] - without[0], model.stitch.linear.weight)[0].abs().max() > 0

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    oracle = {"_target_": "rlstitch.oracles.Stitched", "weights": {"mine": 1.0}}
    changed = {
        "model": recipe.model, "rewards": {"mine": node}, "values": {"mine": str(folder / "values" / "tiny")}, "oracle": oracle, "updates": 1,
        "data": {"prompts": str(tmp_path / "prompts.txt")}, "batch": {"prompts_per_update": 4}, "evaluation": {"prompts": str(tmp_path / "prompts.txt"), "rewards": ["mine"], "num_steps": 2},
        "sampler": {"num_steps": 2}, "stop": {"_target_": "rlstitch.stops.Fixed", "after": 1}, "out": str(tmp_path / "runs"), "refresh": {"fraction": 1.0, "pairs": 4, "buffer": 4, "agreement": 1.0, "steps": 1},
        "logging": {"wandb": "off", "progress": False},
    }  # fmt: skip
    Trainer(checked(cfg.merge(cfg.compose("draft_stitch"), changed), "draft_stitch")).train()
    lines = (tmp_path / "runs" / "draft_stitch" / "metrics.jsonl").read_text().splitlines()
    assert [row["drift"]["refreshed"] for row in map(json.loads, lines) if "drift" in row] == [1.0]
    measured = {
        "model": recipe.model, "rewards": {"mine": node}, "compare": {"mine": {"StitchVM": str(folder / "values" / "tiny")}}, "out": str(tmp_path), "name": "measured",
        "held_out": recipe.held_out, "pairs": {"mine": {"_target_": "tests.test_measure.tiny_pairs", "n": 6}}, "sigmas": [0.5], "timing_batch": 2, "timing_repeats": 1,
        "calibration": {"prompts": str(tmp_path / "prompts.txt"), "count": 2, "rollouts": 1, "extra": 1, "num_steps": 2},
    }  # fmt: skip
    rows = compare.run(compare.checked(measured, "measured"))["rewards"]["mine"]["rows"]
    assert (
        set(rows["StitchVM"]["0.5"])
        == set(rows["Tweedie (null text)"]["0.5"])
        == {"pair_accuracy", "mean_error", "slope", "correlation", "rmse"}
    )
