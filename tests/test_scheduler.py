"""The noise levels that a model's own scheduler file asks for, against diffusers' scheduler and its stock pipeline."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from rlstitch import schedule, scheduler
from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.sampling import sample
from rlstitch.types import UserError

DYNAMIC = {"use_dynamic_shifting": True}
FILES = {
    "shift_1": {"shift": 1.0},
    "shift_3": {"shift": 3.0},
    "dynamic": DYNAMIC,
    "dynamic_of_flux": DYNAMIC | {"base_shift": 0.3, "max_shift": 1.2, "base_image_seq_len": 16, "max_image_seq_len": 200, "shift": 3.0},
    "linear": DYNAMIC | {"time_shift_type": "linear"},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "dynamic_terminal": DYNAMIC | {"shift_terminal": 0.02},
}


@pytest.mark.parametrize("name", FILES)
def test_grids_equal_diffusers_scheduler(name):
    stock = FlowMatchEulerDiscreteScheduler(**FILES[name])
    said = stock.config
    for tokens in (64, 1024, 4096) if said.use_dynamic_shifting else (None,):
        mu = None
        if tokens:
            line = (said.max_shift - said.base_shift) / (said.max_image_seq_len - said.base_image_seq_len)
            mu = said.base_shift + line * (tokens - said.base_image_seq_len)
        shift = scheduler.of_file({"_class_name": "FlowMatchEulerDiscreteScheduler"} | FILES[name], tokens)
        for steps in (2, 4, 28):
            stock.set_timesteps(steps, mu=mu)
            assert torch.equal(schedule.sigmas(steps, shift), stock.sigmas)  # to the last bit, which a network given 1000 sigma sees
            plain = np.linspace(1, 1 / steps, steps)  # what the pipelines of dynamically shifted models hand over
            stock.set_timesteps(sigmas=plain, mu=mu)
            assert torch.equal(schedule.sigmas(steps, shift, "plain"), stock.sigmas)
    assert schedule.sigmas(1, shift).tolist() == [1.0, 0.0]


def test_training_levels_are_shifted_once_by_the_same_factor():
    shift = scheduler.of_file({"_class_name": "FlowMatchEulerDiscreteScheduler"} | DYNAMIC, 256)
    assert shift.factor == pytest.approx(math.exp(0.5))
    t = torch.tensor([0.0, 0.5, 0.9])
    assert torch.equal(schedule.training_sigma(t, shift), schedule.training_sigma(t, shift.factor))


def with_scheduler(source, folder, **settings):
    """A copy of a pipeline directory with another scheduler file; a setting of None is left out of it."""
    shutil.copytree(source, folder)
    told = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | settings
    (folder / scheduler.FILE).write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    return folder


@pytest.mark.parametrize(("name", "side"), [("shift_1", 16), ("dynamic_of_flux", 16), ("dynamic_of_flux", 24), ("dynamic_terminal", 16)])
def test_four_steps_equal_the_stock_pipeline(sd3_dir, tmp_path, name, side):
    folder = with_scheduler(sd3_dir, tmp_path / "model", **FILES[name])
    backbone = SD3Backbone(str(folder), max_sequence_length=0, image_size=side)
    z = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        "a red circle", num_inference_steps=4, guidance_scale=1.0, latents=z.clone(), height=side, width=side, max_sequence_length=0, output_type="latent",
    ).images  # fmt: skip
    text = backbone.encode_prompts(["a red circle"])
    grids = {stated: schedule.sigmas(4, scheduler.resolve("sampler.shift", stated, backbone)) for stated in ("auto", 3.0)}
    with torch.no_grad():
        ours, fixed = (sample(backbone.bind(text), z, grid).z for grid in grids.values())
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    assert (fixed - stock).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (dict(use_karras_sigmas=True), "use_karras_sigmas"),
        (dict(invert_sigmas=True), "invert_sigmas"),
        (dict(use_beta_sigmas=True, use_exponential_sigmas=True), "use_exponential_sigmas and use_beta_sigmas"),
        (dict(stochastic_sampling=True), "stochastic_sampling"),
        (dict(num_train_timesteps=500), "num_train_timesteps 500"),
        (dict(shift="three"), "shift 'three'"),
        (dict(shift=-1.0), "not positive"),
        (dict(use_dynamic_shifting=True, max_shift=1e6), "comes to a shift of e.-5"),
        (dict(shift_terminal=1.5), "shift_terminal 1.5"),
        (dict(use_dynamic_shifting=True, time_shift_type="cosine"), "time_shift_type 'cosine'"),
        (dict(_class_name="DPMSolverMultistepScheduler"), "DPMSolverMultistepScheduler"),
    ],
)  # fmt: skip
def test_a_grid_of_another_kind_is_refused_by_name(sd3_dir, tmp_path, settings, why):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / scheduler.FILE).write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"} | settings))
    with pytest.raises(UserError, match=f"'evaluation.shift' is auto, and .*{why}.*give a number"):
        scheduler.of_directory("evaluation.shift", "auto", tmp_path, 64)
    law = lambda path, settings, tokens: replace(scheduler.of_file(settings, tokens), spacing="plain")  # noqa: E731
    assert scheduler.of_directory("evaluation.shift", 2, tmp_path, 64) == schedule.Shift(2.0)
    assert scheduler.of_directory("evaluation.shift", 2, tmp_path, 64, law) == schedule.Shift(2.0, spacing="plain")


def test_a_number_that_differs_is_told_once_and_what_is_no_number_is_refused(sd3_dir, tmp_path, capsys):
    tell = lambda stated, where="sampler.shift": scheduler.of_directory(where, stated, sd3_dir, 16)  # noqa: E731
    assert tell("auto") == tell(3) == schedule.Shift(3.0) and not capsys.readouterr().out
    assert tell(1.5) == tell(1.5) == schedule.Shift(1.5)
    assert capsys.readouterr().out.count("sampler.shift is 1.5; the model's own scheduler") == 1
    for bad in (0, -1.0, float("nan"), float("inf"), True, None, [], "three", {}):
        with pytest.raises(UserError, match="'sampler.shift' must be auto .* or a positive number"):
            tell(bad)
    with pytest.raises(UserError, match="has no scheduler/scheduler_config.json"):
        scheduler.of_directory("sampler.shift", "auto", tmp_path, 16)
