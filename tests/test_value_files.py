"""A stitched value model on disk, and what is asked of it when it is loaded."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.files import sha256
from rlstitch.part_checks import value_cards
from rlstitch.rewards.clip import ClipReward
from rlstitch.stitch.baselines import noisy_clip
from rlstitch.stitch.model import OtherDenoiser, StitchedValueModel, misused, read_card, values
from rlstitch.stitch.search import drawn, features
from rlstitch.types import Latent, UserError
from tests.conftest import write_clip, write_sd3
from tests.test_stitch import IMAGES, batch_of, stitched


def test_files_round_trip_and_refuse_what_is_foreign(backbone, reward, tmp_path):
    model, _, _ = stitched(backbone, reward, normalise=True, sigma_range=(0.1, 0.9))
    nn.init.normal_(model.stitch.residual[-1].weight, std=0.1)
    model.save_pretrained(tmp_path / "v", half=False)
    latent, batch = Latent(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.5])), batch_of(["a red circle", "two stars"])
    for again in (
        StitchedValueModel.from_pretrained(tmp_path / "v", backbone=backbone, reward=reward),
        StitchedValueModel.from_pretrained(tmp_path / "v"),
    ):
        torch.testing.assert_close(again.value(latent, batch), model.value(latent, batch))
        assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match=r"sigma in \[0.1, 0.9\]"):
        again.value(Latent(latent.z, torch.tensor([0.95, 0.5])), batch)
    other = ClipReward(str(write_clip(tmp_path / "other", seed=9)))
    with pytest.raises(UserError, match="another reward model"):
        StitchedValueModel.from_pretrained(tmp_path / "v", backbone=backbone, reward=other)

    held = backbone.null
    backbone._null = held.map(lambda t: t[..., :-1])
    with pytest.raises(OtherDenoiser, match=r"its null_tokens is \[1, .*\], no empty prompt of"):
        StitchedValueModel.from_pretrained(tmp_path / "v", backbone=backbone, reward=reward)
    backbone._null = held
    foreign = SD3Backbone(str(write_sd3(tmp_path / "sd3", seed=8)), max_sequence_length=0)
    with pytest.raises(UserError, match="another autoencoder"):
        StitchedValueModel.from_pretrained(tmp_path / "v", backbone=foreign, reward=reward)
    weights = tmp_path / "v" / "value.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(UserError, match="sha256"):
        StitchedValueModel.from_pretrained(tmp_path / "v", backbone=backbone, reward=reward)


def test_a_value_of_another_denoiser_brings_its_own_blocks(backbone, reward, tmp_path, capsys):
    """Cross-backbone use (the paper's Table 6): same autoencoder, another transformer; two such values share one donor."""
    from rlstitch.parts import Parts

    model, _, _ = stitched(backbone, reward)
    for name in ("v", "w"):
        model.save_pretrained(tmp_path / name, half=False)
    other = write_sd3(tmp_path / "sd3", seed=8, layers=4)
    shutil.rmtree(other / "vae")
    shutil.copytree(backbone.path / "vae", other / "vae")
    foreign = SD3Backbone(str(other), max_sequence_length=0)
    with pytest.raises(OtherDenoiser, match="stitched from another denoiser"):
        StitchedValueModel.from_pretrained(tmp_path / "v", backbone=foreign, reward=reward)
    node = {"_target_": "rlstitch.oracles.Stitched", "weights": {"clip": 1.0, "hps": 1.0}}
    paths = {"clip": str(tmp_path / "v"), "hps": str(tmp_path / "w")}
    parts = Parts(foreign, {"clip": reward, "hps": reward}, "cpu")
    parts.load_values(node, paths)
    loaded = parts.values
    assert "its first blocks are loaded beside" in capsys.readouterr().out
    latent, batch = Latent(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.2])), batch_of(["a red circle", "two stars"])
    for one in loaded.values():
        torch.testing.assert_close(one.value(latent, batch), model.value(latent, batch))
    first, second = ([p.data_ptr() for p in one.prefix.parameters()] for one in loaded.values())
    assert first == second
    card = tmp_path / "w" / "value.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"text": "prompt"}))
    with pytest.raises(UserError, match="under the prompts' own text, which model .* encodes otherwise"):
        Parts(foreign, {"clip": reward, "hps": reward}, "cpu").load_values(node, paths)


def test_a_card_cannot_name_foreign_code(tmp_path, backbone, reward):
    model, _, _ = stitched(backbone, reward)
    model.save_pretrained(tmp_path)
    card = json.loads((tmp_path / "value.json").read_text())
    system = {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}
    bridge = {"_target_": "rlstitch.config.build", "node": system}
    imported = {"_target_": "rlstitch.rewards.clip.Tensor", "data": "x"}
    nested = {"_target_": "rlstitch.rewards.clip.ClipReward", "path": system}
    other = {"_target_": "rlstitch.rewards.clip.VisionTail", "model": "x", "j": 1}
    for spec, said in ((system, "no backbone or reward"), (bridge, "no backbone or reward"), (imported, "no backbone or reward"), (nested, "path that are no plain values"), (other, "is not a reward: it has no score")):  # fmt: skip
        (tmp_path / "value.json").write_text(json.dumps(card | {"reward": spec}))
        with pytest.raises(UserError, match=said):
            StitchedValueModel.from_pretrained(tmp_path, backbone=backbone)
    (tmp_path / "value.json").write_text(json.dumps(card | {"norm": None}))
    with pytest.raises(UserError, match="value.json: 'norm' must be float"):
        StitchedValueModel.from_pretrained(tmp_path, backbone=backbone)
    assert not (tmp_path / "ran").exists()


def test_a_value_file_is_whole_or_refused(backbone, reward, tmp_path):
    stitched(backbone, reward)[0].save_pretrained(tmp_path)
    whole, card = load_file(tmp_path / "value.safetensors"), json.loads((tmp_path / "value.json").read_text())
    name = max(k for k in whole if k.startswith("tail."))
    linear, bias = "stitch.linear.weight", "stitch.linear.bias"
    for tensors, told in (
        ({k: v for k, v in whole.items() if k != name}, f"is not whole: 1 weights .*{name}"),
        (whole | {"stray": torch.ones(1)}, "is not whole: 1 weights .*stray"),
        ({k: v for k, v in whole.items() if k not in (bias, "null_tokens")}, f"is not whole: it has no {bias} and no null_tokens"),
        ({k: v for k, v in whole.items() if k != "null_pooled"}, "for another denoiser or is not whole: it has no null_pooled"),
        (whole | {linear: whole[linear][:, :, 0, 0].clone()}, "for a denoiser of width 0"),
        (whole | {bias: whole[bias][:-1].clone()}, "does not fit its reward model"),
        (whole | {name: whole[name].int()}, "are whole numbers"),
        (whole | {name: whole[name] * torch.nan}, "NaN or Inf"),
    ):
        save_file(tensors, tmp_path / "value.safetensors")
        (tmp_path / "value.json").write_text(json.dumps(card | {"sha256": sha256(tmp_path / "value.safetensors")}))
        with pytest.raises(UserError, match=told):
            StitchedValueModel.from_pretrained(tmp_path, backbone=backbone, reward=reward)
    save_file(whole, tmp_path / "value.safetensors")
    for key, value in (("norm", 0), ("reward_block", 0), ("blocks", -1), ("sigma_range", [-3, 7]), ("sigma_range", [0.9, 0.1]), ("device_hours", -1), ("vae_half_sha256", []), ("prefix", "x"), ("prefix", "latent")):  # fmt: skip
        (tmp_path / "value.json").write_text(json.dumps(card | {key: value}))
        with pytest.raises(UserError, match=f"value.json: '{'fold' if value == 'latent' else key}'"):
            read_card(tmp_path)
    (tmp_path / "value.json").write_text(json.dumps(card | {"reward_block": 99, "sha256": sha256(tmp_path / "value.safetensors")}))
    with pytest.raises(UserError, match="does not fit its reward model.*99"):
        StitchedValueModel.from_pretrained(tmp_path, backbone=backbone, reward=reward)


def test_a_value_under_the_prompts_own_text(backbone, reward, tmp_path):
    """By hand; its text goes through the search's features, shares nothing with the null text's prefix, is demanded, and is written in the card."""
    model, null = (stitched(backbone, reward)[0] for _ in range(2))
    model.card = model.card | {"text": "prompt"}
    batch = replace(batch_of(["a red circle", "two stars"]), text=backbone.encode_prompts(["a red circle", "two stars"]))
    latent = Latent(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7]))
    by_hand = reward.score_embedding(model.tail(model.stitch(model.prefix(latent.z, latent.sigma, batch.text).grid))[0] / 2, batch)
    assert torch.equal(model.value(latent, batch), by_hand) and not torch.allclose(null.value(latent, batch), by_hand)
    assert torch.equal(values([null, model], latent, batch), torch.stack([null.value(latent, batch), by_hand], 1))
    with pytest.raises(UserError, match="text: prompt.*encode_prompts"):
        model.value(latent, batch_of(["a red circle", "two stars"]))
    model.save_pretrained(tmp_path / "v", half=False)
    again = StitchedValueModel.from_pretrained(tmp_path / "v", backbone=backbone, reward=reward)
    torch.testing.assert_close(again.value(latent, batch), by_hand)
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": str(backbone.path), "max_sequence_length": 5}
    card = json.loads((tmp_path / "v" / "value.json").read_text())
    oracle = {"_target_": "rlstitch.oracles.Stitched", "weights": {"clip": 1.0}}
    for length, text, count in ((5, "prompt", 0), (7, "prompt", 1), (7, "empty", 0)):  # what prompts are padded and cut to
        (tmp_path / "v" / "value.json").write_text(json.dumps(card | {"backbone": node, "text": text}))
        asked = SimpleNamespace(
            model=node | {"max_sequence_length": length}, rewards={"clip": {}}, values={"clip": str(tmp_path / "v")}, oracle=oracle
        )
        value_cards(asked, faults := [])
        assert len(faults) == count and all("at max_sequence_length 5, and the model encodes them at 7" in f for f in faults), faults
    told = [
        features(backbone, reward, IMAGES[:2], 1, *drawn(backbone, 2, torch.Generator().manual_seed(0)), text)[0][1]
        for text in (None, backbone.null.expand(2), batch.text)
    ]
    assert torch.equal(told[0], told[1]) and not torch.allclose(told[0], told[2])


def test_embedded_guidance_is_asked_of_values_that_run_its_blocks(backbone, reward, tmp_path):
    models = {
        "stitch": stitched(backbone, reward)[0],
        "latent": noisy_clip(backbone, reward, norm=1.0, normalise=True, card=stitched(backbone, reward)[0].card),
    }
    models["stitch"].prefix.embedded = backbone.embedded = 3.5
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        StitchedValueModel.from_pretrained(tmp_path / name, backbone=backbone, reward=reward)
    backbone.embedded = 2.0
    StitchedValueModel.from_pretrained(tmp_path / "latent", backbone=backbone, reward=reward)
    with pytest.raises(UserError, match="made at embedded guidance 3.5 and the model is told 2"):
        StitchedValueModel.from_pretrained(tmp_path / "stitch", backbone=backbone, reward=reward)


def test_a_value_is_for_pictures_of_about_its_size(backbone, reward, tmp_path):
    card = {"size": [16, 16], "embedded_guidance": 2.0}
    assert not misused(card, 16, 16, 2.0) and not misused(card, 12, 32, 2.0) and not misused({}, 99, 99, 0.0)
    assert "made for pictures of 16 x 16 pixels, and the model makes them 32 x 16: set model.height=16" in misused(card, 16, 32, 2.0)
    assert "embedded guidance 2 and the model is told 0" in misused(card, 8, 8, 0.0) and "16 x 16" in misused(
        card | {"prefix": "latent"}, 8, 8, 0.0
    )
    model = stitched(backbone, reward)[0]
    model.card = model.card | {"size": [32, 32]}
    model.save_pretrained(tmp_path / "v")
    with pytest.raises(UserError, match="made for pictures of 32 x 32 pixels"):
        StitchedValueModel.from_pretrained(tmp_path / "v", backbone=backbone, reward=reward)


def test_numbers_of_the_null_text_that_half_precision_does_not_hold_are_kept(backbone, reward, tmp_path):
    model = stitched(backbone, reward)[0]
    model.null_tokens = model.null_tokens.clone().index_fill_(1, torch.tensor([0]), 1e5)
    model.save_pretrained(tmp_path / "v")
    again = StitchedValueModel.from_pretrained(tmp_path / "v", backbone=backbone, reward=reward)
    assert torch.equal(again.null.tokens, model.null.tokens)
