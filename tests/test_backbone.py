"""The SD3 adapter against diffusers itself: forward, prefix and resume, guidance, text, autoencoder, for several kinds of SD3."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rlstitch import schedule
from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.cache import kept
from rlstitch.files import write_tensors
from rlstitch.sampling import sample
from rlstitch.types import Conditioning, UserError
from tests.conftest import write_sd3

KINDS = {
    "plain": dict(),
    "no_qk_norm": dict(qk_norm=None),
    "dual_attention": dict(dual=(0, 1)),
    "patch_1": dict(patch=1),
    "t5": dict(t5=True),
}


@pytest.fixture(scope="module", params=KINDS)
def any_backbone(request, tmp_path_factory):
    folder = write_sd3(tmp_path_factory.mktemp(request.param), **KINDS[request.param])
    return SD3Backbone(str(folder), max_sequence_length=4 if request.param == "t5" else 0)


def inputs(backbone, height=8, width=8, n=2):
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(n, 4, height, width, generator=g),
        torch.tensor([0.3, 0.9])[:n],
        backbone.encode_prompts(["a red circle", "two stars"][:n]),
    )


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_velocity_prefix_and_resume_equal_diffusers(any_backbone, size):
    z, sigma, text = inputs(any_backbone, *size)
    with torch.no_grad():
        expected = any_backbone.transformer(
            hidden_states=z, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=1000 * sigma
        ).sample
        assert torch.equal(any_backbone.velocity(z, sigma, text), expected)
        for blocks in range(1, any_backbone.num_blocks + 1):
            state = any_backbone.prefix(z, sigma, blocks, text)
            assert state.block == blocks and state.grid.shape[-2:] == (
                size[0] // any_backbone.transformer.patch_size,
                size[1] // any_backbone.transformer.patch_size,
            )
            assert torch.equal(any_backbone.resume(state), expected)


def test_plain_attention_equals_the_stock_processor(any_backbone):
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    z, sigma, text = inputs(any_backbone)
    with torch.no_grad():
        ours = any_backbone.velocity(z, sigma, text)
        ran = any_backbone.transformer.attn_processors
        any_backbone.transformer.set_attn_processor(JointAttnProcessor2_0())
        torch.testing.assert_close(ours, any_backbone.velocity(z, sigma, text), atol=1e-5, rtol=1e-5)
        any_backbone.transformer.set_attn_processor(ran)


def test_prefix_runs_only_its_blocks(backbone):
    z, sigma, _ = inputs(backbone)
    ran = []
    hooks = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(backbone.transformer.transformer_blocks)]
    cut = backbone.prefix(z, sigma, 2)
    assert ran == [0, 1]
    backbone.resume(cut)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(backbone.num_blocks)), "those that a cut stands for are not run again"


def test_frozen_prefix_equals_the_transformers_and_shares_its_tensors(backbone):
    z, sigma, _ = inputs(backbone)
    null = backbone.null.expand(2)
    for share in (True, False):
        prefix = backbone.make_prefix(2, share=share)
        assert torch.equal(prefix(z, sigma, null).grid, backbone.prefix(z, sigma, 2).grid)
        same = prefix.model.pos_embed.proj.weight.data_ptr() == backbone.transformer.pos_embed.proj.weight.data_ptr()
        assert same is share


def test_walk_visits_every_block_once(backbone):
    z, sigma, _ = inputs(backbone)
    seen = []
    backbone.walk(z, sigma, seen.append)
    assert [state.block for state in seen] == list(range(1, backbone.num_blocks + 1))
    for state in seen:
        assert torch.equal(state.grid, backbone.prefix(z, sigma, state.block).grid)


def test_guidance_mixes_both_branches_and_carries_gradient(backbone):
    z, sigma, text = inputs(backbone)
    null = backbone.null.expand(2)
    v, v_null = backbone.velocity(z, sigma, text), backbone.velocity(z, sigma, null)
    torch.testing.assert_close(backbone.velocity(z, sigma, text, guidance=3.0), v_null + 3 * (v - v_null), atol=1e-5, rtol=1e-5)
    z = z.requires_grad_(True)
    both = torch.autograd.grad(backbone.velocity(z, sigma, text, guidance=3.0).sum(), z)[0]
    apart = torch.autograd.grad((backbone.velocity(z, sigma, null) * -2 + 3 * backbone.velocity(z, sigma, text)).sum(), z)[0]
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=1e-5)


def test_guidance_may_leave_out_the_gradient_of_its_unconditional_branch(backbone):
    """As the released Flow-GRPO has it: the same velocity, and w times the conditional's gradient, in weights and latents alike."""
    z, sigma, text = inputs(backbone)
    z, weight = z.requires_grad_(True), backbone.transformer.proj_out.weight.requires_grad_(True)
    whole = backbone.velocity(z, sigma, text, guidance=3.0)
    own = torch.autograd.grad(3 * backbone.velocity(z, sigma, text).square().sum() / 2, (z, weight))
    backbone.guidance_gradient = "conditional"
    part = backbone.velocity(z, sigma, text, guidance=3.0)
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    slope = backbone.velocity(z, sigma, text).detach()
    for got, wanted in zip(torch.autograd.grad((part * slope).sum(), (z, weight)), own):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_text_equals_the_pipelines_and_is_cached(sd3_dir, tmp_path):
    backbone = SD3Backbone(str(sd3_dir), max_sequence_length=5, cache=str(tmp_path))
    prompts = ["a red circle", "", "two stars"]
    got = backbone.encode_prompts(prompts)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_dir, text_encoder_3=None, tokenizer_3=None)
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=5)
    torch.testing.assert_close(got.tokens, tokens)
    torch.testing.assert_close(got.pooled, pooled)
    backbone.texts.pipeline = None  # from here on only the cache can answer
    again = backbone.encode_prompts(list(reversed(prompts)))
    torch.testing.assert_close(again.tokens, tokens.flip(0))


def test_text_that_a_cache_lost_is_made_anew(sd3_dir, tmp_path, capsys):
    """Cut, zeroed behind a sound header, emptied, or without the hash that an older version did not write: never an error, never other numbers."""
    prompts = ["a red circle", "two stars", "a blue ring", "a green cross"]
    backbone = SD3Backbone(str(sd3_dir), max_sequence_length=0, cache=str(tmp_path))
    right = backbone.encode_prompts(prompts)
    files = [backbone.texts.files(prompts)[p] for p in prompts]
    whole = [f.read_bytes() for f in files]
    files[0].write_bytes(whole[0][:-7])
    files[1].write_bytes(whole[1][:-64] + bytes(64))
    files[2].write_bytes(b"")
    write_tensors(files[3], {"tokens": right.tokens[3] * 0, "pooled": right.pooled[3]})
    backbone.remember(prompts)  # sees what is not whole, without reading the numbers
    assert [kept(f) is not None for f in files] == [True, False, True, True]
    got = backbone.encode_prompts(prompts)
    torch.testing.assert_close((got.tokens, got.pooled), (right.tokens, right.pooled), atol=1e-5, rtol=1e-5)
    assert kept(files[1]) is not None
    assert capsys.readouterr().out.count("made anew") == 1


def test_a_cached_prompt_set_is_read_batch_by_batch(sd3_dir, tmp_path):
    """A large set does not fit on a device: with a cache it holds no text, and its batches are the same."""
    from rlstitch.data import PromptSet, encode

    prompts = ["a red circle", "two stars", "a blue ring"]
    plain, cached = (SD3Backbone(str(sd3_dir), max_sequence_length=0, cache=c) for c in (None, str(tmp_path)))
    whole, lean = (encode(b, PromptSet(list(prompts), [{}] * 3))[0] for b in (plain, cached))
    assert lean.text is None and whole.text is not None
    cached.texts.pipeline = None
    a, b = (s.batch([2, 0], torch.tensor([0, 1])).text for s in (whole, lean))
    torch.testing.assert_close(a.tokens, b.tokens)
    torch.testing.assert_close(a.pooled, b.pooled)


def test_the_autoencoder_takes_a_large_batch_in_parts(backbone):
    """With gradient only where activations are checkpointed, each part run again: the same gradient."""
    images = torch.rand(5, 3, 16, 16)
    z = backbone.encode(images)
    decoded = backbone.decode(z)
    backbone.at_once = {False: 2 * 16**2, True: 16**2}
    sizes = []
    backbone.vae.decoder.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    torch.testing.assert_close(backbone.encode(images), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.decode(z), decoded, atol=1e-5, rtol=1e-5)
    assert sizes == [2, 2, 1]
    leaf = z.clone().requires_grad_(True)
    backbone.decode(leaf).sum().backward()
    assert sizes[3:] == [5] and leaf.grad.abs().sum() > 0
    backbone.checkpoint_activations()
    again = z.clone().requires_grad_(True)
    parted = backbone.decode(again)
    assert sizes[4:] == [1] * 5
    parted.sum().backward()
    assert sizes[4:] == [1] * 10
    torch.testing.assert_close((parted.detach(), again.grad), (decoded, leaf.grad), atol=1e-5, rtol=1e-5)


def test_whole_sampling_equals_the_stock_pipeline(sd3_dir):
    backbone = SD3Backbone(str(sd3_dir), max_sequence_length=0)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_dir, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    for guidance in (1.0, 2.5):
        stock = pipeline(
            "a red circle",
            negative_prompt="",
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=z.clone(),
            height=16,
            width=16,
            max_sequence_length=0,
            output_type="pt",
        ).images
        with torch.no_grad():
            done = sample(backbone.bind(backbone.encode_prompts(["a red circle"]), guidance), z, schedule.sigmas(4, 3.0))
            ours = backbone.decode(done.z)
        torch.testing.assert_close(ours, stock, atol=2e-5, rtol=0)


def test_encode_and_decode_use_shift_and_scale(backbone):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z = backbone.encode(images)
    raw = backbone.vae.encode(2 * images - 1).latent_dist.mode()
    torch.testing.assert_close(z, (raw - 0.1) * 1.3)
    torch.testing.assert_close(backbone.decode(z), (backbone.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1))


def test_missing_and_corrupt_models_are_named(tmp_path, sd3_dir):
    with pytest.raises(UserError, match="nowhere"):
        SD3Backbone(str(tmp_path / "nowhere"))
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(sd3_dir, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="vae.* cannot be read as safetensors"):
        SD3Backbone(str(broken))


def test_conditioning_of_several_lengths():
    """Rows are padded to the longest under a mask, and come out as they went in, whatever is joined with them; a mask keeps its kind."""
    rows = [{"tokens": torch.full((n, 2), float(n)), "pooled": torch.full((3,), float(n))} for n in (2, 4, 1)]
    text = Conditioning.stack(rows)
    assert text.tokens.shape == (3, 4, 2) and text.lengths() == [2, 4, 1] and float(text.tokens[0, 2:].abs().sum()) == 0
    alone = Conditioning.stack(rows[1:2])
    assert alone.get("mask") is None and alone.lengths() == [4] and alone.expand(5).tokens.shape == (5, 4, 2)
    both = Conditioning.cat([alone, text[torch.tensor([2, 0])]])
    assert both.lengths() == [4, 1, 2]
    for got, wanted in zip(both.rows(), (rows[1], rows[2], rows[0])):
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    for half in (text.to(torch.bfloat16), text.to(dtype=torch.bfloat16), text.to("cpu", torch.bfloat16)):
        assert half.tokens.dtype == half.pooled.dtype == torch.bfloat16 and half.mask.dtype == torch.bool
    with pytest.raises(AttributeError, match="no guidance"):
        _ = text.guidance


def test_conditioning_expands():
    one = Conditioning(tokens=torch.zeros(1, 2, 3), pooled=torch.zeros(1, 4))
    assert one.expand(5).tokens.shape == (5, 2, 3) and one.expand(5).pooled.shape == (5, 4)
