"""Costs against truth: what is counted and priced is what the profiler sees of the same update, and what a graph is said to hold is what it holds."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlstitch import config as cfg
from rlstitch.costs import counting, report
from rlstitch.costs.counting import Call
from rlstitch.costs.gpus import gpu
from rlstitch.costs.pricing import Prices, fused
from rlstitch.trainer import Trainer
from rlstitch.types import UserError


def recipe(name, *overrides):
    config, faults = cfg.structure(cfg.merge(cfg.compose(name), cfg.parse_overrides(["lora.rank=4", *overrides])))
    assert not faults
    return config


@pytest.mark.parametrize(
    "name",
    [pytest.param("draft", marks=pytest.mark.slow), "draft_stitch", "nft_stitch", pytest.param("flow_grpo_fast", marks=pytest.mark.slow)],
)
def test_an_update_costs_what_the_profiler_counts(name, tmp_path, capsys):
    """On the miniature, which is then its own twin: the second update, when prompts are known to the rewards."""
    config = recipe(name, "stop={_target_: rlstitch.stops.Fixed, after: 6}" if "stitch" in name else "seed=0")
    trainer = Trainer(counting.twin(config, str(tmp_path)))
    trainer._start()
    with counting.watched(trainer) as fresh:
        trainer._update()
        ledger = fresh()
        with fused(), FlopCounterMode(display=False) as counter:  # the profiler does not know a CPU's own fused attention
            trainer._update()
    prices = Prices(dataclasses.replace(config, rewards=trainer.config.rewards, values=trainer.config.values), "cpu")
    told = sum(n * prices.of(call).forward for call, n in ledger.forward.items())
    told += sum(n * prices.of(call).backward for call, n in ledger.backward.items())
    assert told == pytest.approx(counter.get_total_flops() / 1e12, rel=0.02)
    assert not prices.unknown and not prices.assumed
    assert sum(ledger.backward.values()) > 0


def test_a_graph_holds_what_is_told():
    """Of two samples twice what one is told to hold, within a tenth."""
    prices = Prices(recipe("draft"), "cpu")
    told = prices.of(Call("denoiser", "rollout", "default", True, False)).held
    from rlstitch.backbones import Diffusers
    from rlstitch.policy import Policy

    backbone, kept = Diffusers("shapes:shapes", max_sequence_length=0), {}
    Policy(backbone.transformer, rank=4, alpha=8.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9)

    weights = {p.untyped_storage().data_ptr() for p in backbone.transformer.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    z, sigma = torch.randn(2, *backbone.latent_shape), torch.full((2,), 0.5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = backbone.velocity(z, sigma, backbone.null.expand(2))
    assert out.requires_grad and 2 * told == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.1)


def test_a_published_model_is_priced_without_its_files():
    """FLOPs of SD3.5-Medium at 512 px as README tells them, of DFN's ViT-H/14 at 378, and a value that is not stitched yet."""
    prices = Prices(recipe("draft_stitch_sd35", "model.max_sequence_length=256", "lora.rank=1"))
    assert prices.of(Call("denoiser", "", "reference")).forward == pytest.approx(2.44, rel=0.01)
    assert prices.of(Call("decoder", "")).forward == pytest.approx(2.51, rel=0.01)
    assert prices.of(Call("reward dfn", "")).forward == pytest.approx(1.01, rel=0.01)
    assert prices.of(Call("prefix dfn", "")).forward == pytest.approx(0.46, rel=0.01)
    assert len(prices.assumed) == 2 and "cut after block 4 of 24" in prices.assumed[0]


def test_gpus_are_known_by_name():
    assert gpu("NVIDIA H100").tflops == 989 and gpu("mine", 100, 16).memory == 16 and gpu("l4", memory=22).tflops == 121
    with pytest.raises(UserError, match="'h10' is not known .did you mean 'h100'.*tflops=NUMBER"):
        gpu("h10")


def test_faults_come_at_once():
    with pytest.raises(UserError) as caught:
        report.of(cfg.merge(cfg.compose("draft"), {"optimizer": {"lr": 1}, "updates": -3}), "draft")
    assert "2 faults" in str(caught.value) and "did you mean 'optimiser'" in str(caught.value) and "'updates'" in str(caught.value)
    with pytest.raises(UserError, match="'utilisation'"):
        report.of(cfg.compose("draft") | {"utilisation": 2.0}, "draft")
