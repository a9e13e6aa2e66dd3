"""Every architecture on tiny random pipelines: against the stock pipeline, cut between any two blocks, and through the jobs."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlstitch import schedule, scheduler
from rlstitch.backbones import Diffusers
from rlstitch.sampling import sample
from rlstitch.types import noise_like
from tests.pipelines import WRITERS

PROMPTS = ["a red circle", "two stars on a blue ground"]
SIZES = {"square": (16, 16), "wide": (16, 32)}
LENGTH = {"qwen": 512}  # its template alone is longer than the others' prompts
# How the stock pipeline is told rlstitch's guidance.
GUIDED = {
    "sd3": lambda g: {"guidance_scale": g},
    "flux": lambda g: {"true_cfg_scale": g, "negative_prompt": ["", ""], "guidance_scale": 3.5},
    "flux2": lambda g: {"guidance_scale": g},
    "qwen": lambda g: {"true_cfg_scale": g, "negative_prompt": [" ", " "]},
    "zimage": lambda g: {"guidance_scale": g - 1},
}


@pytest.fixture(scope="module", params=WRITERS)
def kind(request, tmp_path_factory):
    return request.param, WRITERS[request.param](tmp_path_factory.mktemp(request.param))


def backbone_of(kind, size=SIZES["square"], **options):
    name, folder = kind
    return Diffusers(str(folder), max_sequence_length=LENGTH.get(name, 48), height=size[0], width=size[1], **options)


def stock(backbone):
    pipeline = backbone.arch.PIPELINE.from_pretrained(backbone.path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("size", SIZES)
def test_sampling_equals_the_stock_pipeline(kind, size):
    """Grid, every latent on the way and the picture: 4 steps from the same noise, two prompts of different length, with guidance and without."""
    name, _ = kind
    backbone = backbone_of(kind, SIZES[size])
    pipeline, text, noise = stock(backbone), backbone.encode_prompts(PROMPTS), noise_like(backbone.latent_shape, torch.tensor([1, 2]))
    assert backbone.image_tokens == (16 if size == "square" else 32)
    grid = schedule.sigmas(4, scheduler.resolve("shift", "auto", backbone), "auto")
    for guidance in (1.0, 4.0):
        seen = []

        def keep(pipe, step, time, tensors, seen=seen):
            seen.append(backbone.arch.from_pipeline(tensors["latents"], *backbone.latent_shape[-2:]))
            return tensors

        pictures = pipeline(
            prompt=list(PROMPTS), height=SIZES[size][0], width=SIZES[size][1], num_inference_steps=4, max_sequence_length=backbone.texts.length,
            latents=noise if name == "flux2" else backbone.arch.to_pipeline(noise), output_type="pt", callback_on_step_end=keep,
            **GUIDED[name](guidance),
        ).images  # fmt: skip
        torch.testing.assert_close(pipeline.scheduler.sigmas, grid, atol=1e-6, rtol=0)
        velocity, path = backbone.bind(text, guidance), []
        with torch.no_grad():
            for stop in range(1, 5):
                path.append(sample(velocity, noise, grid, stop=stop).z)
            for theirs, ours in zip(seen, path, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(backbone.decode(path[-1]), pictures, atol=1e-5, rtol=1e-5)


def test_a_cut_is_resumed_bit_for_bit_at_every_block(kind):
    """prefix + resume = the whole forward, extend = prefix, a truncated copy = the prefix, with activation checkpointing, too; gradients as well."""
    backbone = backbone_of(kind, SIZES["wide"])
    text, sigma = backbone.encode_prompts(PROMPTS), torch.tensor([0.3, 0.9])
    z = noise_like(backbone.latent_shape, torch.tensor([1, 2])).requires_grad_(True)
    v = backbone.velocity(z, sigma, text)
    (slope,) = torch.autograd.grad(v.square().sum(), z)
    for checkpointing in (False, True):
        backbone.checkpoint_activations(checkpointing)
        torch.testing.assert_close(torch.autograd.grad(backbone.velocity(z, sigma, text).square().sum(), z)[0], slope, atol=1e-5, rtol=1e-5)
        first, seen = backbone.prefix(z, sigma, 1, text), []
        for k in range(1, backbone.num_blocks + 1):
            cut = backbone.prefix(z, sigma, k, text)
            assert cut.grid.shape == (2, backbone.width, *(cut.grid.shape[-2:])) and cut.grid.shape[-1] == 2 * cut.grid.shape[-2] == 8
            assert torch.equal(backbone.resume(cut), v) and torch.equal(backbone.extend(first, k).grid, cut.grid)
            rows = torch.tensor([1])
            torch.testing.assert_close(backbone.resume(cut.rows(rows)), v[1:], atol=1e-6, rtol=1e-5)
            try:  # without the longest prompt: the same, or told where padding is the batch's
                torch.testing.assert_close(backbone.resume(cut.rows(1 - rows)), v[:1], atol=1e-5, rtol=1e-5)
            except ValueError as error:
                assert "leave out the batch's longest prompt" in str(error)
            for share in (True, False):
                prefix = backbone.make_prefix(k, share=share)
                assert torch.equal(prefix(z, sigma, text).grid, cut.grid) and prefix.shares_with(backbone.transformer) is share
                assert len(prefix.blocks) == k
        torch.testing.assert_close(torch.autograd.grad(backbone.resume(cut).square().sum(), z)[0], slope, atol=1e-5, rtol=1e-5)
        backbone.walk(z, sigma, seen.append)
        for k, cut in enumerate(seen, 1):
            assert cut.block == k and torch.equal(cut.grid, backbone.prefix(z, sigma, k).grid)
        assert len(seen) == backbone.num_blocks
        seen.clear()
        backbone.walk(z, sigma, seen.append, text)
        assert torch.equal(backbone.resume(seen[0]), v)
    assert torch.isfinite(backbone.guided(0 * v, 0 * v, 4.0)).all()


def test_pictures_go_through_the_autoencoder_as_the_pipeline_takes_them(kind):
    """decode(encode(x)) is the autoencoder's own reconstruction, and gradients of decode are those of finite differences."""
    backbone = backbone_of(kind)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z = backbone.encode(images)
    assert z.shape[1:] == torch.Size(backbone.latent_shape)
    frame = (lambda x: x[:, :, None]) if backbone.vae.__class__.__name__ == "AutoencoderKLQwenImage" else (lambda x: x)
    with torch.no_grad():
        mode = backbone.vae.encode(frame(2 * images - 1)).latent_dist.mode()
        whole = backbone.vae.decode(mode).sample.reshape(2, 3, 16, 16) / 2 + 0.5
        torch.testing.assert_close(backbone.decode(z), whole.clamp(0, 1), atol=1e-5, rtol=1e-5)
        prints = [backbone.picture_fingerprint()]
        for buffer in backbone.vae.buffers():
            buffer += 1
            prints.append(backbone.picture_fingerprint())
        for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps"):
            if (value := backbone.vae.config.get(key)) is not None:
                backbone.vae.register_to_config(**{key: [2 * x for x in value] if isinstance(value, list | tuple) else 2 * value})
                prints.append(backbone.picture_fingerprint())
    assert len(set(prints)) == len(prints) > 1  # of all that latents depend on


def test_text_is_cached_unpadded_and_stacked_as_it_was(kind, tmp_path):
    plain, cached = backbone_of(kind), backbone_of(kind, cache=str(tmp_path))
    cached.remember([*PROMPTS, ""])
    cached.texts.pipeline = None  # from here on only the cache can answer
    alone = plain.encode_prompts(PROMPTS[:1])
    together, again = plain.encode_prompts(PROMPTS), cached.encode_prompts(PROMPTS)
    assert together.fields.keys() == again.fields.keys() and together.lengths() == again.lengths()
    for name, value in together.fields.items():
        torch.testing.assert_close(again.fields[name], value, atol=1e-5, rtol=1e-5)
    whole = shutil.copytree(kind[1], tmp_path / "whole")  # language models with more than their encoder
    for file in whole.glob("text_encoder*/*.safetensors"):
        save_file(load_file(file) | {"decoder.layers.0.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    torch.testing.assert_close(backbone_of((kind[0], whole)).encode_prompts(PROMPTS[:1]).tokens, alone.tokens)
    z, sigma = noise_like(plain.latent_shape, torch.tensor([1, 2])), torch.tensor([0.4, 0.4])
    with torch.no_grad():  # a prompt's length is its own, whatever stands beside it
        torch.testing.assert_close(plain.velocity(z, sigma, together)[:1], plain.velocity(z[:1], sigma[:1], alone), atol=1e-5, rtol=1e-5)


def test_lora_reaches_every_block(kind):
    backbone = backbone_of(kind)
    from rlstitch.backbones import cut

    for number, block in enumerate(cut.blocks_of(backbone.transformer, (*backbone.arch.LISTS, *backbone.arch.BEFORE))):
        hit = [
            n
            for n, m in block.named_modules()
            if isinstance(m, torch.nn.Linear) and f".{n}".endswith(tuple(f".{t}" for t in backbone.lora_targets))
        ]
        assert hit, (number, [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)])


def test_both_guides_steer_the_stock_pipeline(kind):
    """A value that is known in closed form, -|z|^2 / 2, so that the guide's step is z + h tilt(sigma) (-z): packed latents or not."""
    from rlstitch.steering import pipeline as guides
    from rlstitch.steering.dps import tilt

    name, _ = kind
    size = SIZES["wide"]
    backbone = backbone_of(kind, size)
    pipeline, noise = stock(backbone), noise_like(backbone.latent_shape, torch.tensor([1, 2, 3, 4]))

    class Norm:
        sigma_range, names, weights, differentiable = (0.0, 1.0), ["norm"], [1.0], True

        def __init__(self):
            self.backbone, self.seen = backbone, []

        def __call__(self, latent, batch):
            assert latent.z.shape[1:] == torch.Size(backbone.latent_shape)
            self.seen.append(latent.z.detach().clone())
            return -latent.z.flatten(1).square().sum(1, keepdim=True) / 2

        def total(self, scores):
            return scores[:, 0]

    def run(guide, copies=2):
        return pipeline(
            prompt=list(PROMPTS), height=size[0], width=size[1], num_inference_steps=2, max_sequence_length=backbone.texts.length,
            num_images_per_prompt=copies, latents=noise if name == "flux2" else backbone.arch.to_pipeline(noise), output_type="pt",
            callback_on_step_end=guide, **GUIDED[name](1.0),
        ).images  # fmt: skip

    value, moved = Norm(), []
    guide = guides.GradientGuide(value, PROMPTS, scale=0.5, steps=[0], height=size[0], width=size[1])

    def guided(pipe, step, time, tensors):
        out = guide(pipe, step, time, tensors)
        moved.append(backbone.arch.from_pipeline(out["latents"], *backbone.latent_shape[-2:]))
        return out

    run(guided)
    sigma = float(pipeline.scheduler.sigmas[1])
    torch.testing.assert_close(moved[0], value.seen[0] * (1 - sigma * tilt(sigma, 0.5, 20.0)), atol=1e-5, rtol=1e-5)
    if noise.shape != backbone.arch.to_pipeline(noise).shape:
        with pytest.raises(guides.UserError, match="height and width"):
            run(guides.GradientGuide(value, PROMPTS, scale=0.5))
        with pytest.raises(guides.UserError, match="made for pictures of 16 x 16"):
            run(guides.GradientGuide(value, PROMPTS, scale=0.5, height=16, width=16))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, stochastic_sampling=True)
    particles = guides.ParticleGuide(value, PROMPTS, num_particles=2, resample_steps=[0], lam=1e6, height=size[0], width=size[1])
    pictures = run(particles)
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(
        pictures[0], pictures[2]
    )  # the better copy of each prompt alone is left
