"""How a denoiser runs changes nothing of what it computes: attention by another kernel, blocks compiled, under cuts, LoRA sets and checkpointing."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers.models import attention_dispatch as kernels

from rlstitch.backbones import Diffusers, attention, execution
from rlstitch.compiled import blocks_within
from rlstitch.part_checks import model_faults
from rlstitch.policy import Policy
from rlstitch.types import Batch, Conditioning, Latent, UserError, noise_like
from tests.conftest import write_clip, write_sd3
from tests.pipelines import WRITERS
from tests.test_architectures import PROMPTS, backbone_of, kind  # noqa: F401  (a fixture)


def text_of(backbone):
    """Text of two prompts that no encoder has made, of different lengths where the architecture knows a mask."""
    c, draw = backbone.transformer.config, lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    width = c.get("joint_attention_dim") or c.cap_feat_dim
    rows = [{"tokens": draw(n, width)} for n in ((5, 9) if backbone.arch.MASKED else (9, 9))]
    return Conditioning.stack(
        [row | ({"pooled": draw(c.pooled_projection_dim)} if "pooled" in backbone.text_fields else {}) for row in rows]
    )


def asked(backbone, text):
    """(velocity, its gradient in z) at two noise levels."""
    z = noise_like(backbone.latent_shape, torch.tensor([1, 2])).requires_grad_(True)
    v = backbone.velocity(z, torch.tensor([0.3, 0.9]), text)
    return v.detach(), torch.autograd.grad(v.square().sum(), z)[0]


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_attention_by_another_kernel_is_the_same(kind, monkeypatch):  # noqa: F811
    """It is that kernel that runs, in prefixes, too, and no other model is touched."""
    usual, other = backbone_of(kind), backbone_of(kind, attention="_native_math")
    text, name, ran = text_of(usual), kernels.AttentionBackendName._NATIVE_MATH, []
    math = kernels._AttentionBackendRegistry._backends[name]
    monkeypatch.setitem(kernels._AttentionBackendRegistry._backends, name, lambda *a, **k: ran.append(1) or math(*a, **k))
    close(asked(other, text), asked(usual, text))
    passes, z, sigma = len(ran), noise_like(usual.latent_shape, torch.tensor([1, 2])), torch.tensor([0.3, 0.9])
    assert passes >= usual.num_blocks
    close([other.make_prefix(2)(z, sigma, text).grid], [usual.make_prefix(2)(z, sigma, text).grid])
    assert passes < len(ran) < 2 * passes
    assert kernels._AttentionBackendRegistry.get_active_backend()[0] != name


@pytest.mark.parametrize(
    "options, key, why",
    [
        ({"attention": "nativ"}, "attention", "no attention backend of diffusers, which has flash, .*native"),
        ({"attention": "flash"}, "attention", "flash.* cannot do .*attention of float32 on cpu.*flash-attn"),
        ({"attention": "_native_cudnn"}, "attention", "cannot do"),
        ({"attention": "flex"}, "attention", "with gradient.*backward on CPU"),
        ({"attention": "flash_hub"}, "attention", "fetches code .*take flash"),
        ({"dtype": "float16", "attention": "native"}, "dtype", "float16 does not run on a CPU"),
        ({"compile": True}, "compile", "C.. compiler"),
        ({"quantise": "int8"}, "quantise", r"torchao, which is not installed: pip install 'rlstitch\[torchao\]'"),
        ({"quantise": "nf4"}, "quantise", "bitsandbytes, which is not installed"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_told_before_weights_are_read(sd3_dir, options, key, why, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    monkeypatch.setattr("rlstitch.backbones.directory.load", lambda *a, **k: pytest.fail("weights are read"))
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": str(sd3_dir), **options}
    (told,) = model_faults(node)
    assert told.startswith(f"'model.{key}': ")
    with pytest.raises(UserError, match=f"{key}: .*{why}"):
        Diffusers(str(sd3_dir), **options)


def test_a_masked_attention_takes_no_kernel_without_masks(tmp_path):
    WRITERS["qwen"](tmp_path)
    with pytest.raises(UserError, match="_native_flash cannot do masked attention .*attn_mask"):
        Diffusers(str(tmp_path), attention="_native_flash")


def test_four_bits_take_a_gpu(sd3_dir, monkeypatch):
    monkeypatch.setattr(execution, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="nf4 runs on a GPU"):
        Diffusers(str(sd3_dir), quantise="nf4")
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": str(sd3_dir)}
    assert model_faults(node | {"quantise": "int8"}) == []


@pytest.mark.parametrize("packed, most", [("nf4", 2), ("int8", 0)])
def test_packed_weights_and_zero_are_told(packed, most, monkeypatch):
    from rlstitch import checks, config

    monkeypatch.setattr(execution, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for stage in range(4):
        given = config.merge(config.compose("draft_stitch"), {"model": {"quantise": packed}, "distributed": {"zero_stage": stage}})
        told = [f for f in checks.recipe_faults(config.structure(given)[0]) if "model.quantise" in f]
        assert bool(told) == (stage > most) and all(f"zero_stage={most} at most, not {stage}" in f for f in told)


@pytest.mark.parametrize("name", ["sd3", *(pytest.param(n, marks=pytest.mark.slow) for n in WRITERS if n != "sd3")])
def test_compiled_blocks_compute_the_same(name, tmp_path, monkeypatch):
    """Under cuts, in prefixes, with LoRA put on them later and its sets switched, with checkpointing; names of parameters stay."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # its graphs and guards, without a compiler
    torch._dynamo.reset()
    write_sd3(tmp_path, layers=2) if name == "sd3" else WRITERS[name](tmp_path)
    plain, compiled = (backbone_of((name, tmp_path), compile=on) for on in (False, True))
    text, sigma = text_of(plain), torch.tensor([0.3, 0.9])
    z = noise_like(plain.latent_shape, torch.tensor([1, 2])).requires_grad_(True)
    close(asked(compiled, text), asked(plain, text))
    assert graphs() > 0
    assert [n for n, _ in compiled.transformer.named_parameters()] == [n for n, _ in plain.transformer.named_parameters()]
    prefixes = [b.make_prefix(1) for b in (compiled, plain)]
    assert prefixes[0].fingerprint() == prefixes[1].fingerprint() and prefixes[0].shares_with(compiled.transformer)
    sets = [Policy(b.transformer, rank=2, alpha=4.0, targets=["to_q"], seed=0, ema_decay=0.9, old=True) for b in (compiled, plain)]
    for policy in sets:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in (p for params in policy._sets.values() for p in params):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    found = {}
    for use in ("default", "old", "reference", "default"):
        with sets[0].use(use), sets[1].use(use):
            found[use] = asked(compiled, text)
            close(found[use], asked(plain, text))
            close([compiled.resume(compiled.prefix(z, sigma, 1, text)).detach()], found[use][:1])
    assert len({float(v.sum()) for v, _ in found.values()}) == 3
    close([prefixes[0](z, sigma, text).grid.detach()], [prefixes[1](z, sigma, text).grid.detach()])
    made = graphs()
    for b in (compiled, plain):
        b.checkpoint_activations()
    close(asked(compiled, text), asked(plain, text))
    assert graphs() == made, "what was compiled is found again"


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_values_tail_computes_the_same(tmp_path, monkeypatch):
    from rlstitch.oracles import Stitched
    from rlstitch.rewards.clip import ClipReward
    from rlstitch.stitch.model import StitchedValueModel

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    write_sd3(tmp_path / "model", layers=1)
    reward, values = ClipReward(str(write_clip(tmp_path / "clip"))), []
    for on in (False, True):
        backbone = Diffusers(str(tmp_path / "model"), max_sequence_length=0, compile=on)
        values.append(
            StitchedValueModel.from_search(
                backbone, reward, 1, 1, torch.ones(reward.width, backbone.width) / 9, torch.zeros(reward.width), cls_state=torch.zeros(1),
                norm=1.0, normalise=True, sigma_range=(0.0, 1.0), card={},
            ).freeze()
        )  # fmt: skip
    latent = Latent(noise_like(backbone.latent_shape, torch.tensor([1, 2])), torch.tensor([0.3, 0.9]))
    batch = Batch(PROMPTS, torch.arange(2), torch.arange(2))
    before = graphs()
    assert torch.equal(values[1].value(latent, batch), values[0].value(latent, batch))
    assert graphs() >= before + 2, "a block of the prefix and one of the tail"
    assert values[1].state_dict().keys() == values[0].state_dict().keys()
    ways = lambda value: [block._compiled_call_impl for part in (value.prefix, value.tail) for block in blocks_within(part)]  # noqa: E731
    plain, before = values[0].value(latent, batch), ways(values[0])
    found, after = [], []
    for _ in range(2):  # the tail alone, which is compiled once
        found.append(Stitched({"r": values[0]}, {"r": 1.0}, compile=True)(latent, batch)[:, 0])
        after.append(ways(values[0]))
    assert torch.equal(found[0], plain) and torch.equal(found[1], plain) and after[0] == after[1]
    tail = len(blocks_within(values[0].tail))
    assert not any(before) and not any(after[0][:-tail]) and all(after[0][-tail:])


@pytest.mark.parametrize("native, length, fused", [(True, 40, False), (True, 600, True), (False, 40, True)])
def test_a_cpu_takes_the_fused_kernel_but_for_short_rows_in_bf16_of_its_own(native, length, fused, monkeypatch, generator):
    """In float32 always; either way it is softmax(q k' / sqrt(d)) v, with its gradient."""
    ran, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "NATIVE", native)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *a: ran.append(1) or kernel(*a))
    q, k, v = (torch.randn(1, 2, length, 8, generator=generator).requires_grad_() for _ in range(3))
    exact = ((q.double() @ k.double().mT) / 8**0.5).softmax(-1) @ v.double()
    wanted = [exact, *torch.autograd.grad(exact.square().mean(), (q, k, v))]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        ran.clear()
        out = attention.attention(*(x.to(dtype) for x in (q, k, v)))
        assert bool(ran) is (fused or dtype == torch.float32) and out.dtype == dtype
        found = [out, *torch.autograd.grad(out.float().square().mean(), (q, k, v))]
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
