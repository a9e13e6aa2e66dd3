"""Jobs that begin with a LoRA from elsewhere: training from it, merged models through every job, an evaluation of it on a run's model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import evaluate as launcher
from rlstitch import cli, resume, steer
from rlstitch.backbones import Diffusers
from rlstitch.checks import checked
from rlstitch.describe import goals
from rlstitch.policy import REFERENCE
from rlstitch.stitch.model import OtherDenoiser, StitchedValueModel
from rlstitch.trainer import Trainer
from rlstitch.types import UserError
from tests.test_jobs import train
from tests.test_stitch import stitched
from tests.test_train import rows, weights, world  # noqa: F401  (a fixture)


def given(world, *overrides):  # noqa: F811
    recipe, found = cli.recipe_and_overrides([f"recipe={world / 'recipe.yaml'}", *overrides])
    return checked(found, recipe)


@pytest.fixture(scope="module")
def lora(world):  # noqa: F811
    """As kohya's scripts write it."""
    backbone, g, tensors = Diffusers(str(world / "sd3")), torch.Generator().manual_seed(0), {}
    for name, m in backbone.transformer.named_modules():
        if isinstance(m, torch.nn.Linear) and name.endswith(("to_q", "ff.net.2")):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = 0.3 * torch.randn(3, m.in_features, generator=g)
            tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(m.out_features, 3, generator=g)
    save_file(tensors, world / "mine.safetensors")
    return world / "mine.safetensors"


def test_a_run_that_starts_from_a_lora(world, lora, capsys):  # noqa: F811
    """It resumes bit for bit, its base is the model with the LoRA, an evaluation and steering by the exported one are those of its EMA; another file is told."""
    start = (f"lora.init={lora}", "lora.targets=[to_k, to_add_out]", "checkpoint.every=1", "updates=2")
    whole = train(world, "started", *start, "evaluation.final=[base, ema]")["eval"]
    train(world, "started-cut", *start, "updates=1", "evaluation.final=[raw]")
    train(world, "started-cut", *start, "evaluation.final=[raw]")
    one, two = weights(world, "started", 2), weights(world, "started-cut", 2)
    assert rows(world, "started") == rows(world, "started-cut") and all(torch.equal(one[k], two[k]) for k in one)
    plain = train(world, "plain", "updates=1", "evaluation.final=[base]")["eval"]
    assert whole["base"]["clip"] != plain["base"]["clip"]
    run = world / "runs" / "plain"
    told = {}
    for path in (lora, world / "runs" / "started"):
        launcher.run([f"run={run}", f"lora={path}"])
        told[path.name] = json.loads((run / "evaluation.json").read_text())["lora"]["clip"]
    assert told == pytest.approx({lora.name: whole["base"]["clip"], "started": whole["ema"]["clip"]}, abs=1e-5)
    assert f"starts from the LoRA {lora}, which stays beside the trained one" in goals(given(world, *start))
    capsys.readouterr()
    launcher.run([f"run={run}", f"lora={lora}", "check=true"])
    assert f"evaluates the LoRA {lora} on the model of {run}" in capsys.readouterr().out
    resume.resumable(config := given(world, "name=started", *start))
    assert f"lora.init = {lora}" in resume.hashes(config)
    with pytest.raises(UserError, match="which this run would write over"):
        resume.resumable(given(world, "name=started", f"lora.init={world / 'runs' / 'started'}"))
    before = lora.read_bytes()
    save_file({k: 2 * v for k, v in load_file(lora).items()}, lora)
    with pytest.raises(UserError, match="lora.init = .* holds something else"):
        resume.resumable(config)
    with pytest.raises(UserError, match="was trained beside another LoRA .lora.init = .* is not what it began with"):
        launcher.run([f"run={world / 'runs' / 'started'}"])
    with pytest.raises(UserError, match="lora.init = .* is not what it began with"):
        launcher.run([f"run={run}", f"lora.init={lora}"])
    lora.write_bytes(before)
    with pytest.raises(UserError, match="lora.init: .*mine.safetensors -> (;|.)"):
        resume.resumable(given(world, "name=started", *start, "lora.init="))
    with pytest.raises(UserError) as caught:
        given(world, "lora.init=none", "lora.targets=[transformer_blocks.0.attn.to_q]")
    assert "'lora.init': the LoRA 'none' is not there" in str(caught.value) and "'lora.targets': 2 of 3 blocks would have no LoRA" in str(
        caught.value
    )


def test_a_merged_model_goes_through_every_job(world, lora, capsys):  # noqa: F811
    """A value of the base brings the base's blocks along; one that is stitched on the merged model shares its blocks, and does not fit the base."""
    merged = f"model.merge={lora}"
    config = given(world, merged, "name=merged", "updates=1")
    assert f"model.merge = {lora}" in resume.hashes(config)
    trainer = Trainer(config)
    assert "was stitched on" in capsys.readouterr().out
    base = Diffusers(str(world / "sd3"), max_sequence_length=0)
    assert not trainer.values["clip"].prefix.shares_with(trainer.backbone.transformer)
    z, sigma = torch.randn(2, *base.latent_shape), torch.tensor([0.3, 0.9])
    with trainer.policy.use(REFERENCE), torch.no_grad():
        own = trainer.backbone.velocity(z, sigma, base.null.expand(2))
        base.load_lora(lora)
        torch.testing.assert_close(own, base.velocity(z, sigma, base.null.expand(2)), atol=1e-5, rtol=1e-5)
    trainer.train()
    fresh = Diffusers(str(world / "sd3"), max_sequence_length=0, merge=[str(lora)])
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": str(world / "sd3"), "max_sequence_length": 0, "merge": [str(lora)]}
    reward = trainer.rewards["clip"]
    value = stitched(fresh, reward, sigma_range=(0.0, 1.0))[0]
    value.card |= {"backbone": node}
    value.save_pretrained(world / "merged-value")
    loaded = StitchedValueModel.from_pretrained(world / "merged-value", reward=reward)  # its denoiser by the card, which lists the LoRA
    assert loaded.prefix.fingerprint() == fresh.make_prefix(loaded.prefix.depth).fingerprint()
    with pytest.raises(OtherDenoiser):
        StitchedValueModel.from_pretrained(
            world / "merged-value", backbone=Diffusers(str(world / "sd3"), max_sequence_length=0), reward=reward
        )
    recipe = {
        "name": "merged", "out": str(world / "steered"), "model": node, "rewards": {"clip": config.rewards["clip"]}, "values": {"clip": str(world / "merged-value")},
        "oracle": config.oracle, "method": {"_target_": "rlstitch.steering.fk", "num_particles": 2, "resample_steps": [1], "lam": 2.0}, "judges": ["clip"],
        "sampler": {"num_steps": 3, "guidance": 2.0}, "prompts": str(world / "prompts.txt"), "max_prompts": 1, "progress": False,
    }  # fmt: skip
    job = steer.Job(steer.checked(recipe, "merged"))
    assert job.oracle.models[0].prefix.shares_with(job.backbone.transformer)
    job.run()
