"""LoRA sets on one base: off is the base bit for bit, EMA by hand, gradients only where they belong, round trip through stock diffusers."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from rlstitch.backbones import sd3
from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.policy import CURRENT, EMA, REFERENCE, Policy
from rlstitch.types import UserError
from tests.conftest import write_sd3
from tests.test_backbone import inputs


def policy_on(backbone, rank=4, decay=0.9, alpha=8.0):
    return Policy(backbone.transformer, rank=rank, alpha=alpha, targets=backbone.lora_targets, seed=0, ema_decay=decay)


def nudge(policy, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))


def test_adapters_off_is_the_base_bit_for_bit(backbone):
    z, sigma, text = inputs(backbone)
    with torch.no_grad():
        base = backbone.velocity(z, sigma, text)
        policy = policy_on(backbone)
        assert torch.equal(backbone.velocity(z, sigma, text), base), "B = 0 at the start"
        sets = policy.state_dict()
        assert all(torch.equal(v, sets[k.replace("raw.", "ema.", 1)]) for k, v in sets.items()), "A is the same in all sets"
        nudge(policy)
        assert not torch.allclose(backbone.velocity(z, sigma, text), base)
        with policy.use(REFERENCE):
            assert torch.equal(backbone.velocity(z, sigma, text), base)
        with policy.use(EMA):
            assert torch.equal(backbone.velocity(z, sigma, text), base), "EMA has not moved yet"


def test_use_never_changes_what_trains(backbone):
    policy = policy_on(backbone)
    trains = {n for n, p in backbone.transformer.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in policy.named_parameters()} and all("lora_" in n for n in trains)
    for name in (REFERENCE, EMA, CURRENT, REFERENCE):
        with policy.use(name):
            assert {n for n, p in backbone.transformer.named_parameters() if p.requires_grad} == trains
    assert {n for n, p in backbone.transformer.named_parameters() if p.requires_grad} == trains
    with policy.use(EMA):
        with policy.use(REFERENCE):
            assert policy.active == REFERENCE
        assert policy.active == EMA
    assert policy.active == CURRENT
    z, sigma, text = inputs(backbone)
    backbone.velocity(z, sigma, text).sum().backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_lora_covers_the_joint_attention_projections(backbone):
    names = {n.split(".attn.")[1].split(".lora")[0] for n, _ in policy_on(backbone).named_parameters() if ".attn." in n}
    assert names == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


def test_ema_by_hand(backbone):
    policy = policy_on(backbone, decay=0.5)
    name, p = policy.named_parameters()[0]
    ema = dict(backbone.transformer.named_parameters())[name.replace(f".{CURRENT}.", f".{EMA}.")]
    expected = ema.clone()
    for step in range(1, 12):
        nudge(policy, step)
        policy.update_ema()
        d = min(0.5, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * p.detach()
        torch.testing.assert_close(ema, expected)


def test_state_round_trip_keeps_raw_and_ema_apart(sd3_dir):
    first, second = SD3Backbone(str(sd3_dir), max_sequence_length=0), SD3Backbone(str(sd3_dir), max_sequence_length=0)
    a, b = policy_on(first), policy_on(second)
    nudge(a)
    a.update_ema()
    b.load_state_dict(a.state_dict())
    z, sigma, text = inputs(first)
    with torch.no_grad():
        for name in (CURRENT, EMA):
            with a.use(name), b.use(name):
                assert torch.equal(first.velocity(z, sigma, text), second.velocity(z, sigma, text))
    wrong = policy_on(SD3Backbone(str(sd3_dir), max_sequence_length=0), rank=2)
    with pytest.raises(UserError, match="another rank or width"):
        wrong.load_state_dict(a.state_dict())
    with pytest.raises(UserError, match="another architecture"):
        b.load_state_dict({"raw.x": torch.zeros(1)})


def with_alpha_in_the_header(file, rank, alpha):
    """The same LoRA as it was written once: B as it is trained, alpha told by the header alone."""
    told = {"transformer.r": rank, "transformer.lora_alpha": alpha, "transformer.target_modules": sorted(sd3.LORA_TARGETS)}
    tensors = {k: v * (rank / alpha if ".lora_B." in k else 1) for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(told)})


def test_an_exported_lora_means_the_same_in_every_reader(tmp_path):
    """alpha is three times the rank: as a folder, as a state dict, and with the header stripped; by stock diffusers and by our own reader, which takes old files, too."""
    folder = write_sd3(tmp_path / "sd3", dual=(0, 1))
    backbone = SD3Backbone(str(folder), max_sequence_length=0)
    policy = policy_on(backbone, rank=4, alpha=12.0)
    nudge(policy)
    policy.update_ema()
    policy.export(tmp_path / "lora")  # the EMA
    policy.export(tmp_path / "raw", CURRENT)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert file.stat().st_mode & 0o777 == (folder / "model_index.json").stat().st_mode & 0o777, "as the umask has it"
    z, sigma, text = inputs(backbone)
    with torch.no_grad(), policy.use(EMA):
        expected = backbone.velocity(z, sigma, text)
    with torch.no_grad(), policy.use(CURRENT):
        raw = backbone.velocity(z, sigma, text)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)

    def asked():
        return pipeline.transformer(
            hidden_states=z, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=1000 * sigma
        ).sample

    def stock(lora):
        pipeline.load_lora_weights(lora)
        out = asked()
        pipeline.unload_lora_weights()
        return out

    def own():
        fresh = SD3Backbone(str(folder), max_sequence_length=0)
        fresh.load_lora(tmp_path / "lora")
        return fresh.velocity(z, sigma, text)

    with torch.no_grad():
        assert (expected - asked()).abs().max() > 1e-2 and (expected - raw).abs().max() > 1e-3
        torch.testing.assert_close(stock(tmp_path / "raw"), raw, atol=1e-5, rtol=1e-5)
        found = {"folder": stock(tmp_path / "lora"), "state dict": stock(load_file(file)), "own": own()}
        with_alpha_in_the_header(file, 4, 12.0)
        found |= {"old": stock(tmp_path / "lora"), "own, old": own()}
        policy.export(tmp_path / "lora")
        save_file(load_file(file), file)
        found |= {"stripped": stock(tmp_path / "lora"), "own, stripped": own()}
    for how, velocity in found.items():
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5, msg=how)


def test_prefix_must_be_taken_before_lora(backbone):
    prefix = backbone.make_prefix(2)
    policy = policy_on(backbone)
    z, sigma, _ = inputs(backbone)
    before = prefix(z, sigma, backbone.null.expand(2)).grid
    nudge(policy)
    assert torch.equal(prefix(z, sigma, backbone.null.expand(2)).grid, before), "no adapter reaches the value model"
    with pytest.raises(AssertionError, match="before LoRA"):
        backbone.make_prefix(2)
