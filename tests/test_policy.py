"""LoRA sets on one base: off is the base bit for bit, EMA by hand, gradients only where they belong, round trip through stock diffusers."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.policy import CURRENT, EMA, REFERENCE, Policy
from rlstitch.types import UserError
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


@pytest.mark.parametrize("name", [CURRENT, EMA])
def test_export_loads_in_stock_diffusers_with_the_same_picture(sd3_dir, tmp_path, name):
    """alpha differs from rank, so the scale must travel too."""
    backbone = SD3Backbone(str(sd3_dir), max_sequence_length=0)
    policy = policy_on(backbone, rank=4, alpha=12.0)
    nudge(policy)
    policy.update_ema()
    policy.export(tmp_path, name)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_dir, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(tmp_path)
    z, sigma, text = inputs(backbone)
    with torch.no_grad(), policy.use(name):
        stock = pipeline.transformer(
            hidden_states=z, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=1000 * sigma
        ).sample
        torch.testing.assert_close(backbone.velocity(z, sigma, text), stock, atol=1e-5, rtol=1e-5)


def test_prefix_must_be_taken_before_lora(backbone):
    prefix = backbone.make_prefix(2)
    policy = policy_on(backbone)
    z, sigma, _ = inputs(backbone)
    before = prefix(z, sigma, backbone.null.expand(2)).image
    nudge(policy)
    assert torch.equal(prefix(z, sigma, backbone.null.expand(2)).image, before), "no adapter reaches the value model"
    with pytest.raises(AssertionError, match="before LoRA"):
        backbone.make_prefix(2)
