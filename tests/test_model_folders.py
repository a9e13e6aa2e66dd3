"""Model folders as people have them: strict about weights, free about layout, refused in one line before anything loads."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModelWithProjection, T5EncoderModel

from rlstitch import files, fingerprints, resume
from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.part_checks import model_faults, reward_faults
from rlstitch.rewards.clip import ClipReward
from rlstitch.types import Conditioning, UserError
from rlstitch.weights import load_strictly
from tests.conftest import write_clip, write_sd3


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("with_t5"), t5=True)


@pytest.fixture
def copied(t5_dir, tmp_path):
    return shutil.copytree(t5_dir, tmp_path / "model")


PARTS = {
    "transformer": SD3Transformer2DModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}  # fmt: skip


def rewritten(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", [*PARTS, "reward"])
def test_no_weight_is_made_up_or_left_out(copied, tmp_path, part):
    folder, cls = (write_clip(tmp_path / "clip"), CLIPModel) if part == "reward" else (copied / part, PARTS[part])
    file = next(folder.glob("*.safetensors"))
    whole, name = file.read_bytes(), max(set(load_file(file)) - {"shared.weight"})  # that one has two names
    load_strictly(cls, folder, "the part")
    for change, why in (
        (lambda t: t.update({"stray.weight": t.pop(name)}), f"1 are missing .{name}.; 1 are unknown to it .stray.weight."),
        (lambda t: t.pop(name), f"1 are missing .{name}."),
        (lambda t: t.update({"stray.weight": torch.zeros(2)}), "1 are unknown to it .stray.weight."),
        (lambda t: t.update({name: torch.zeros(3, 3, 7)}), name),
    ):
        file.write_bytes(whole)
        rewritten(file, change)
        with pytest.raises(UserError, match=f"the part of .*cannot be loaded.*{why}"):
            load_strictly(cls, folder, "the part")
    file.write_bytes(whole)
    rewritten(file, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(24)[None]}))
    if part == "text_encoder_3":
        rewritten(file, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()}))
    load_strictly(cls, folder, "the part")  # what older libraries saved is no stranger
    if part.startswith("text_encoder"):
        rewritten(file, lambda t: t.pop(name))
        with pytest.raises(UserError, match=f"the {part} of .*{name}"):
            SD3Backbone(str(copied), max_sequence_length=4).encode_prompts(["a red circle"])
    if part == "reward":
        rewritten(file, lambda t: t.pop(name))
        with pytest.raises(UserError, match=name):
            ClipReward(str(folder))


def test_a_heads_file_is_strict_too(clip_dir, tmp_path):
    good = {"0.weight": torch.ones(3, 12), "0.bias": torch.zeros(3), "2.weight": torch.ones(1, 3), "2.bias": torch.zeros(1)}
    save_file(good, tmp_path / "head.safetensors")
    ClipReward(str(clip_dir), head=str(tmp_path / "head.safetensors"))
    for change in (
        lambda t: t.pop("0.bias"),
        lambda t: t.update({"scale": torch.ones(1)}),
        lambda t: t.update({"2.weight": torch.ones(1, 4)}),
    ):
        save_file(good, tmp_path / "head.safetensors")
        rewritten(tmp_path / "head.safetensors", change)
        with pytest.raises(UserError, match="the reward's head"):
            ClipReward(str(clip_dir), head=str(tmp_path / "head.safetensors"))


def velocity(folder, encode=False, **options):
    """Under a text of its own encoders, or a fixed one."""
    backbone = SD3Backbone(str(folder), max_sequence_length=4, **options)
    text = backbone.encode_prompts(["a red circle"]) if encode else Conditioning(tokens=torch.ones(1, 5, 32), pooled=torch.ones(1, 32))
    with torch.no_grad():
        return backbone.velocity(torch.ones(1, 4, 8, 8), torch.tensor([0.5]), text)


def test_every_layout_that_diffusers_writes_loads(t5_dir, copied, tmp_path):
    """Shards with an index, a variant beside the plain files, a variant alone."""
    from diffusers import StableDiffusion3Pipeline

    plain, options = velocity(t5_dir), {"_target_": "rlstitch.backbones.sd3.SD3Backbone", "max_sequence_length": 4}
    pipeline = StableDiffusion3Pipeline.from_pretrained(t5_dir)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 2
    torch.testing.assert_close(velocity(tmp_path / "shards", encode=True), velocity(t5_dir, encode=True))
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="20KB")
    assert not (tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors").exists()
    velocity(tmp_path / "half", encode=True)
    half = velocity(tmp_path / "half")
    torch.testing.assert_close(half, plain, atol=2e-2, rtol=2e-2)
    pipeline.save_pretrained(copied, variant="fp16")
    assert torch.equal(velocity(copied), plain) and torch.equal(velocity(copied, variant="fp16"), half)
    for folder in (tmp_path / "shards", tmp_path / "half", copied):
        assert not model_faults(options | {"path": str(folder)})
    next((tmp_path / "shards" / "transformer").glob("*-00002-*")).unlink()
    assert "lacks diffusion_pytorch_model-00002-of" in model_faults(options | {"path": str(tmp_path / "shards")})[0]


def test_an_autoencoder_is_known_by_its_tensors(t5_dir, copied, tmp_path):
    """Whole, in shards, saved anew, in bfloat16, in float16, with a variant beside it; another one is another."""
    vae = AutoencoderKL.from_pretrained(t5_dir / "vae")
    card = fingerprints.vae_names(t5_dir)
    again = {"shards": dict(max_shard_size="5KB"), "anew": {}, "half": dict(variant="fp16")}
    for name, options in again.items():
        vae.save_pretrained(tmp_path / name / "vae", **options)
        assert fingerprints.same_vae(card, tmp_path / name)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        AutoencoderKL.from_pretrained(t5_dir / "vae").to(dtype).save_pretrained(tmp_path / name / "vae")
        assert fingerprints.same_vae(card, tmp_path / name) and fingerprints.same_vae(fingerprints.vae_names(tmp_path / name), t5_dir)
    AutoencoderKL.from_pretrained(t5_dir / "vae").half().save_pretrained(copied / "vae", variant="fp16")
    assert fingerprints.same_vae(card, copied)
    old = {"vae_sha256": fingerprints.files_fingerprint(t5_dir, "vae")}  # cards hashed the file once
    assert fingerprints.same_vae(old, copied) and not fingerprints.same_vae(old, tmp_path / "shards")
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 0.1
    vae.save_pretrained(tmp_path / "tuned" / "vae")
    vae.register_to_config(scaling_factor=0.9)
    config = tmp_path / "anew" / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 1.3', '"scaling_factor": 0.9'))
    assert not fingerprints.same_vae(card, tmp_path / "tuned") and not fingerprints.same_vae(card, tmp_path / "anew")


def identity(folder):
    """What checkpoints, caches of text and of generated pictures know a model by."""
    (hashed,) = resume.hashes_of({"model": {"path": str(folder)}}).values()
    return (
        hashed,
        SD3Backbone(str(folder), max_sequence_length=4).text_fingerprint(),
        fingerprints.weights_fingerprint(folder, "transformer"),
    )


def test_a_model_is_known_by_its_tensors_and_configurations(t5_dir, copied, tmp_path, monkeypatch):
    """In shards, saved anew with another's metadata, in linked folders, also where only the ends of tensors are read; a number or a setting makes it another."""
    from diffusers import StableDiffusion3Pipeline

    StableDiffusion3Pipeline.from_pretrained(t5_dir).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for part in ("model_index.json", "transformer/config.json", "text_encoder/config.json"):
        edited(tmp_path / "shards" / part, _diffusers_version="0.1", _name_or_path="elsewhere", transformers_version="0.1", dtype="drop")
    for file in copied.rglob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt", "author": "somebody"})
    (tmp_path / "linked").mkdir()
    for part in t5_dir.iterdir():
        (tmp_path / "linked" / part.name).symlink_to(part)
    for most in (fingerprints.LARGE, 0):
        monkeypatch.setattr(fingerprints, "LARGE", most)
        monkeypatch.setattr(fingerprints, "ENDS", 16)
        fingerprints._raw_hash.cache_clear()
        one = identity(t5_dir)
        assert all(identity(folder) == one for folder in (tmp_path / "shards", copied, tmp_path / "linked"))
    old = {f"model.path = {t5_dir}": resume._files(t5_dir)}  # an older checkpoint's
    now = resume.hashes_of({"model": {"path": str(t5_dir)}})
    assert not resume.changed_files(old, now) and resume.changed_files(dict.fromkeys(old, "another"), now)
    rewritten(
        copied / "text_encoder" / "model.safetensors",
        lambda t: t.update({k: v + 1 for k, v in t.items() if k.endswith("final_layer_norm.bias")}),
    )
    edited(tmp_path / "shards" / "scheduler" / "scheduler_config.json", shift=2.0)
    rewritten(next((tmp_path / "shards" / "transformer").glob("*-00002-*")), lambda t: t.update({k: v + 1 for k, v in t.items()}))
    for folder, same in ((copied, [False, False, True]), (tmp_path / "shards", [False, True, False])):
        assert [a == b for a, b in zip(identity(folder), one)] == same


def test_weights_are_hashed_once(copied, monkeypatch):
    fingerprints.vae_fingerprint(copied)
    monkeypatch.setattr(fingerprints, "opened", None)  # from here on nothing can be read
    fingerprints.vae_fingerprint(copied)
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes())
    import os

    os.utime(file, ns=(1, 1))
    with pytest.raises(TypeError):
        fingerprints.vae_fingerprint(copied)


def edited(file, **change):
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | change).items() if v != "drop"}))


def _pickles(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def _cut(file):
    file.write_bytes(file.read_bytes()[:-9])


BROKEN = {
    "another pipeline": (lambda f: edited(f / "model_index.json", _class_name="PixArtSigmaPipeline"), {}, "'model.path': .*PixArtSigmaPipeline, and what is known here is StableDiffusion3Pipeline, FluxPipeline"),
    "another architecture": (lambda f: edited(f / "model_index.json", _class_name="FluxPipeline"), {}, "'model.path': .*transformer/config.json is of a SD3Transformer2DModel, and a FluxPipeline has a FluxTransformer2DModel"),
    "no index": (lambda f: (f / "model_index.json").unlink(), {}, "'model.path': .*model_index.json"),
    "T5 not on disk": (lambda f: shutil.rmtree(f / "text_encoder_3"), {}, "'model.path': .*no text_encoder_3.*null"),
    "pickles": (_pickles, {}, "'model.path': .*diffusion_pytorch_model.bin.*save_pretrained"),
    "no weights": (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), {}, "'model.path': the text_encoder .*no weights"),
    "older config": (lambda f: edited(f / "vae" / "config.json", use_quant_conv="drop", use_post_quant_conv="drop"), {}, '"use_quant_conv": false and "use_post_quant_conv": false'),
    "an index of another kind": (lambda f: edited(f / "model_index.json", text_encoder=5), {}, "'model.path': .*text_encoder is 5"),
    "no first encoder": (lambda f: edited(f / "model_index.json", text_encoder=[None, None]), {}, "'model.path': .*text_encoder is .None, None."),
    "no limit of tokens": (lambda f: edited(f / "tokenizer_2" / "tokenizer_config.json", model_max_length="drop"), {}, "'model.path': .*tokenizer_2.*model_max_length"),
    "an endless limit": (lambda f: edited(f / "tokenizer" / "tokenizer_config.json", model_max_length=10**30), {}, "'model.path': .*model_max_length 1e.30"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_3"), {}, "'model.path': .*has no tokenizer_3/tokenizer_config.json, without which its text_encoder_3 reads no prompt"),
    "no patches": (lambda f: edited(f / "transformer" / "config.json", patch_size=0), {}, "'model.path': .*patch_size 0, which must be a positive"),
    "a million blocks": (lambda f: edited(f / "transformer" / "config.json", num_layers=10**6), {}, "'model.path': .*num_layers 1000000, and no model has more than 1000 of a kind"),
    "no scale": (lambda f: edited(f / "vae" / "config.json", scaling_factor=float("nan")), {}, "'model.path': .*scaling_factor nan"),
    "a config of no object": (lambda f: (f / "text_encoder_2" / "config.json").write_text("[]"), {}, "'model.path': the config of the text_encoder_2 .*list"),
    "a cut file": (lambda f: _cut(f / "text_encoder" / "model.safetensors"), {}, "'model.path': .*text_encoder/model.safetensors cannot be read as safetensors"),
    "too large": (lambda f: None, {"image_size": 68}, "'model.image_size': 68 is beyond the 64 pixels"),
    "guidance that is not embedded": (lambda f: None, {"embedded_guidance": 3.5}, "'model.embedded_guidance': .*no embedding of it"),
    "a height alone": (lambda f: None, {"height": 16}, "'model.height': 16 stands alone: give width"),
    "guidance that nobody is told": (lambda f: edited(f / "transformer" / "config.json", guidance_embeds=True), {}, "'model.path': .*guidance_embeds.*tells its model none"),
    "odd size": (lambda f: None, {"image_size": 18}, "'model.image_size': 18 does not divide into patches of 4"),
    "half on a CPU": (lambda f: None, {"dtype": "float16"}, "'model.dtype': float16"),
    "no such variant": (lambda f: None, {"variant": "fp61"}, "'model.variant': no part of .* has weights of a variant 'fp61': leave it out"),
    "no such dtype": (lambda f: None, {"dtype": "float99"}, "'model.dtype' must be one of float32, bfloat16, float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_run_is_told_by_key_before_anything_loads(copied, name):
    from rlstitch.config import check_part

    change, options, why = BROKEN[name]
    node = {"_target_": "rlstitch.backbones.sd3.SD3Backbone", "path": str(copied)} | options
    assert not model_faults(
        node
        | {
            k: v
            for k, v in (("dtype", "float32"), ("image_size", 16), ("embedded_guidance", None), ("height", None), ("variant", None))
            if k in options
        }
    )
    change(copied)
    if name == "half on a CPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    import re

    faults = check_part("model", node, kind="model") + model_faults(node)
    assert len(faults) == 1 and re.search(why, faults[0]), faults


def test_a_rewards_folder_is_looked_at_first(tmp_path):
    folder = write_clip(tmp_path / "clip")
    node = {"_target_": "rlstitch.rewards.clip.ClipReward", "path": str(folder)}
    assert not reward_faults("rewards.mine", node)
    edited(folder / "preprocessor_config.json", resample=1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    faults = reward_faults("rewards.mine", node)
    assert len(faults) == 2 and "'rewards.mine.path'" in faults[0] and "pytorch_model.bin" in faults[0] and "resample 1" in faults[1]


WORTHLESS = {
    "one is not finite": (lambda t: t["visual_projection.weight"][0].fill_(float("inf")), "1 of .* tensors hold NaN or Inf, e.g. visual_projection.weight"),
    "all are zero": (lambda t: [value.zero_() for value in t.values()], "all .* tensors are zero"),
    "whole numbers": (lambda t: t.update({"visual_projection.weight": t["visual_projection.weight"].int()}), r"visual_projection.weight \(I32\).*quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", WORTHLESS)
def test_weights_that_are_worth_nothing_are_refused(clip_dir, tmp_path, case):
    change, why = WORTHLESS[case]
    file = shutil.copytree(clip_dir, tmp_path / "clip") / "model.safetensors"
    rewritten(file, change)
    with pytest.raises(UserError, match=f"(?s){file.parent}.*{why}"):
        load_strictly(CLIPModel, file.parent, "the reward model")
    if case != "whole numbers":  # values, LoRA files and heads
        with pytest.raises(UserError, match=f"{file} holds no weights to work with: {why}"):
            files.read_weights(file)
    file.write_bytes(file.read_bytes()[:-9])
    assert "cannot be read as safetensors" in str(
        reward_faults("rewards.r", {"_target_": "rlstitch.rewards.clip.ClipReward", "path": str(file.parent)})
    )


DISTILLED = {  # what is changed of a tiny pipeline, the name of its folder, and what tells
    "flux": ({"transformer/config.json": {"guidance_embeds": False}, "scheduler/scheduler_config.json": {"use_dynamic_shifting": False, "shift": 1.0}}, "m", "does not shift"),
    "flux with guidance": ({"scheduler/scheduler_config.json": {"use_dynamic_shifting": False, "shift": 1.0}}, "m", ""),
    "flux2": ({"model_index.json": {"is_distilled": True}}, "m", "says is_distilled"),
    "flux2 base": ({"model_index.json": {"is_distilled": False}}, "FLUX.2-klein-base-4B", ""),
    "zimage": ({"scheduler/scheduler_config.json": {"shift": 3.0}}, "m", "shifts by 3"),
    "sd3 by name": ({}, "stable-diffusion-3.5-large-turbo", "its name says turbo"),
    "sd3 in a cache": ({}, "models--x--Hyper-SD35-8steps/snapshots/0123abcd", "its name says Hyper"),
    "sd3": ({}, "turbos/hyperion-distillery", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", DISTILLED)
def test_a_model_distilled_to_few_steps_is_warned_of(case, tmp_path):
    """At the start and at the check, under the methods that are reported to blur it, and under no other."""
    from rlstitch import config as cfg
    from rlstitch.checks import checked
    from rlstitch.describe import goals
    from tests.pipelines import WRITERS

    changes, name, told = DISTILLED[case]
    folder = tmp_path / name
    WRITERS[case.split()[0]](folder)
    for file, change in changes.items():
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    lines = {}
    (tmp_path / "p.txt").write_text("a red circle\ntwo stars\n")
    for recipe in ("nft", "flow_grpo", "draft"):
        given = cfg.merge(
            cfg.compose(recipe),
            {"model": {"path": str(folder), "image_size": 16, "max_sequence_length": 512}, "data": {"prompts": str(tmp_path / "p.txt")}, "evaluation": {"prompts": str(tmp_path / "p.txt"), "rewards": ["clip"]}},
        )  # fmt: skip
        lines[recipe] = [line for line in goals(checked(given, recipe)) if line.startswith("warning")]
    assert lines["draft"] == [] and len(lines["nft"]) == len(lines["flow_grpo"]) == bool(told)
    if told:
        assert told in lines["nft"][0] and str(folder) in lines["nft"][0] and "FlowGRPO blurs such models" in lines["flow_grpo"][0]
