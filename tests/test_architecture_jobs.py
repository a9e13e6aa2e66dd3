"""Every architecture through the jobs: stitch, train by every method, resume, evaluate, steer, and the LoRA back into the stock pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from rlstitch import steer
from rlstitch.backbones import Diffusers
from rlstitch.checks import checked
from rlstitch.stitch import recipe as stitch
from rlstitch.trainer import Trainer
from rlstitch.types import noise_like
from tests import warm
from tests.conftest import write_clip
from tests.pipelines import WRITERS
from tests.test_architectures import LENGTH, PROMPTS, stock
from tests.test_train import ROOT

METHODS = {
    "draft": {"algorithm": {"_target_": "rlstitch.algorithms.draft.Draft", "grad_steps": 1, "regulariser": 0.01}},
    "nft": {"algorithm": {"_target_": "rlstitch.algorithms.nft.NFT"}, "batch": {"images_per_prompt": 2}},
    "flow_grpo_fast": {"algorithm": {"_target_": "rlstitch.algorithms.flow_grpo.FlowGRPO", "window": 1}, "batch": {"images_per_prompt": 2}},
    "marble": {
        "algorithm": {"_target_": "rlstitch.algorithms.marble.MARBLE"},
        "batch": {"images_per_prompt": 2},
        "oracle": {"_target_": "rlstitch.oracles.Stitched", "weights": {"clip": 1.0, "other": 0.5}},
    },
    "dpo_online": {"algorithm": {"_target_": "rlstitch.algorithms.dpo.OnlineDPO"}, "batch": {"images_per_prompt": 2, "micro_batch": 4}},
}


@pytest.fixture(scope="module", params=WRITERS)
def world(request, tmp_path_factory):
    """A tiny model of a kind, a reward, pictures twice as wide as high, prompts, and a value model stitched from them by the job."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder / "model")
    write_clip(folder / "clip")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for k in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 32, 3), dtype=np.uint8)).save(folder / "pictures" / f"{k}.png")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "a blue ring", "one green cross"]))
    model = {
        "_target_": "rlstitch.backbones.Diffusers", "path": str(folder / "model"), "height": 16, "width": 32,
        "max_sequence_length": LENGTH.get(request.param, 48),
    }  # fmt: skip
    pictures = {"_target_": "rlstitch.pictures.images_from_folder", "path": str(folder / "pictures"), "size": 16, "width": 32}
    reward = {"_target_": "rlstitch.rewards.clip.ClipReward", "path": str(folder / "clip")}
    stitch.run(
        stitch.checked(
            {
                "name": "clip", "out": str(folder / "values"), "model": model, "reward": reward, "images": pictures, "held_out": pictures,
                "max_reward_block": 1, "distill": {"steps": 2, "batch_size": 4, "autocast": False}, "max_fraction": 1.0, "blocks": "best",
            },
            "clip",
        )
    )  # fmt: skip
    given = {
        "out": str(folder / "runs"), "updates": 2, "threads": 1, "model": model, "rewards": {"clip": reward, "other": reward}, "values": dict.fromkeys(("clip", "other"), str(folder / "values" / "clip")),
        "oracle": {"_target_": "rlstitch.oracles.Stitched", "weights": {"clip": 1.0}},
        "stop": {"_target_": "rlstitch.stops.UniformWindow", "low": 2, "high": 3},
        "sampler": {"num_steps": 4, "spacing": "auto"}, "data": {"prompts": str(folder / "prompts.txt")},
        "batch": {"prompts_per_update": 2, "images_per_prompt": 1, "micro_batch": 2}, "lora": {"rank": 2, "alpha": 4}, "optimiser": {"lr": 0.01},
        "evaluation": {"prompts": str(folder / "prompts.txt"), "num_steps": 2, "max_prompts": 2, "rewards": ["clip"], "spacing": "auto", "final": ["ema"]},
        "logging": {"wandb": "off", "progress": False}, "checkpoint": {"every": 1},
    }  # fmt: skip
    return request.param, folder, given


def merged(given, **changes):
    return {
        k: (v | changes[k] if isinstance(v, dict) and k in changes and k not in ("algorithm", "oracle") else changes.get(k, v))
        for k, v in given.items()
    } | {k: v for k, v in changes.items() if k not in given}


def trained(given, name, **changes):
    trainer = Trainer(checked(merged(given, name=name, **changes), name))
    try:
        trainer.train()
    finally:
        trainer.engine.close()
    return trainer


@pytest.mark.parametrize("method", ["draft", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "draft")])
def test_every_method_trains_and_resumes_bit_for_bit(world, method):
    name, folder, given = world
    trained(given, f"{method}-whole", **METHODS[method])
    trained(given, f"{method}-cut", **(METHODS[method] | {"updates": 1}))
    trained(given, f"{method}-cut", **METHODS[method])
    whole, cut = (
        load_file(folder / "runs" / f"{method}-{k}" / "checkpoints" / "step-000002" / "policy.safetensors") for k in ("whole", "cut")
    )
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    first = load_file(folder / "runs" / f"{method}-whole" / "checkpoints" / "step-000001" / "policy.safetensors")
    raw = [k for k in whole if k.startswith("raw.") and ".lora_B." in k]
    places = {k: ".".join(k.split(".")[1:3]) for k in raw}  # `transformer_blocks.2`: a block
    moved = {places[k] for k in raw if bool(whole[k].any())}
    assert moved == set(places.values()), "every block is trained"
    assert any(not torch.equal(first[k], whole[k]) for k in raw)


@pytest.mark.slow
def test_zero_3_gives_the_same_weights(world):
    """A whole job in a process of its own, with the value's blocks beside a denoiser that is cut into parts."""
    _, folder, given = world
    found = []
    for stage in (0, 3):
        recipe = merged(given, name=f"zero-{stage}", distributed={"zero_stage": stage}, **METHODS["draft"])
        (folder / "zero.yaml").write_text(yaml.safe_dump(recipe))
        code, output = warm.run(ROOT / "launch" / "train.py", f"recipe={folder / 'zero.yaml'}")
        assert code == 0, output
        found.append(load_file(folder / "runs" / f"zero-{stage}" / "checkpoints" / "step-000002" / "policy.safetensors"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-5)


def test_a_lora_gives_the_stock_pipeline_the_same_picture(world):
    name, folder, given = world
    trained(given, "lora", **METHODS["draft"])
    lora = folder / "runs" / "lora" / "lora"
    backbone = Diffusers(str(folder / "model"), height=16, width=32, max_sequence_length=LENGTH.get(name, 48))
    z, sigma, text = noise_like(backbone.latent_shape, torch.tensor([1, 2])), torch.tensor([0.3, 0.9]), backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        base = backbone.velocity(z, sigma, text)
        backbone.load_lora(lora)
        own = backbone.velocity(z, sigma, text)
        pipeline = stock(backbone)
        pipeline.load_lora_weights(lora)
        inputs = backbone.arch.inputs(pipeline.transformer, z, sigma, text, backbone.embedded)
        theirs = backbone.arch.output(pipeline.transformer(**inputs), z)
    assert (own - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [pytest.param("dps", marks=pytest.mark.slow), "fk"])
def test_steering_by_the_value(world, method):
    name, folder, given = world
    how = {
        "dps": {"_target_": "rlstitch.steering.dps", "scale": 0.5},
        "fk": {"_target_": "rlstitch.steering.fk", "num_particles": 2, "resample_steps": [0, 1], "lam": 2.0},
    }[method]
    recipe = {
        "name": method, "out": str(folder / "steered"), "model": given["model"], "rewards": given["rewards"], "values": given["values"],
        "oracle": given["oracle"], "method": how, "sampler": {"num_steps": 3, "guidance": 2.0, "spacing": "auto"}, "prompts": str(folder / "prompts.txt"),
        "max_prompts": 2, "judges": ["clip"], "progress": False,
    }  # fmt: skip
    steer.Job(steer.checked(recipe, method)).run()
    assert (folder / "steered" / method / "grid.png").is_file()
    scores = json.loads((folder / "steered" / method / "scores.json").read_text())
    assert scores and yaml.safe_load((folder / "steered" / method / "recipe.yaml").read_text())["model"]["path"] == str(folder / "model")
