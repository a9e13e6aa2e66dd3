"""launch/stitch.py from a folder of pictures, and its user's mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{k:02d}.png")
    return tmp_path


def given(folder, sd3_dir, clip_dir, **more):
    pictures = {"_target_": "rlstitch.pictures.images_from_folder", "path": str(folder), "size": 16}
    return {
        "name": "tiny",
        "out": str(folder / "values"),
        "model": {"_target_": "rlstitch.backbones.sd3.SD3Backbone", "path": str(sd3_dir), "max_sequence_length": 0},
        "reward": {"_target_": "rlstitch.rewards.clip.ClipReward", "path": str(clip_dir)},
        "images": pictures,
        "held_out": pictures,
        "max_reward_block": 2,
        "distill": {"steps": 3, "batch_size": 4, "autocast": False},
        **more,
    }


def test_a_stitch_job_saves_a_value_model_with_a_card(folder, sd3_dir, clip_dir):
    stitch.run(stitch.checked(given(folder, sd3_dir, clip_dir, blocks="best"), "tiny"))
    card = json.loads((folder / "values" / "tiny" / "value.json").read_text())
    assert len(card["search"]) == 3 * 2 and {"i", "j", "loss", "normalised"} == set(card["search"][0])
    assert set(card["quality"]) == {"0.1", "0.25", "0.5", "0.75", "0.9"} and card["device_hours"] > 0 and card["hardware"]
    best = min(card["search"], key=lambda row: row["normalised"])
    assert (card["blocks"], card["reward_block"]) == (best["i"], best["j"])
    assert StitchedValueModel.from_pretrained(folder / "values" / "tiny").sigma_range == (0.0, 1.0)


def test_a_value_is_stitched_under_the_pictures_prompts(folder, sd3_dir, clip_dir, monkeypatch):
    """Search, distillation and quality see each picture's own caption; pictures without captions are refused."""
    recipe = stitch.checked(
        given(folder, sd3_dir, clip_dir, text="prompt", generate={"count": 4, "num_steps": 2, "guidance": [1.0]}), "tiny"
    )
    with pytest.raises(UserError, match="'text' is prompt, and the pictures of 'images' have no prompts"):
        stitch.run(recipe)
    for k in range(12):
        (folder / f"{k:02d}.txt").write_text(f"{k} red circles")
    seen, own = [], stitch.PromptSet.batch
    monkeypatch.setattr(stitch.PromptSet, "batch", lambda self, index, seeds: seen.append(own(self, index, seeds)) or seen[-1])
    stitch.run(recipe)
    asked = [b for b in seen if b.prompts[0].endswith("red circles") and torch.equal(b.group, b.seeds)]
    assert {p for b in asked for p in b.prompts} >= {f"{k} red circles" for k in range(12)} and {len(b) for b in asked} == {4, 12, 16}
    model = StitchedValueModel.from_pretrained(folder / "values" / "tiny")
    assert model.prompted and model.card["text"] == "prompt"


def test_the_recipe_chooses_where_to_cut(folder, sd3_dir, clip_dir):
    stitch.run(stitch.checked(given(folder, sd3_dir, clip_dir, blocks="1", reward_block=2), "tiny"))
    card = json.loads((folder / "values" / "tiny" / "value.json").read_text())
    assert (card["blocks"], card["reward_block"]) == (1, 2)
    with pytest.raises(UserError, match="no pair with blocks=9"):
        stitch.run(stitch.checked(given(folder, sd3_dir, clip_dir, blocks="9"), "tiny"))


def test_all_faults_of_a_stitch_recipe_come_at_once(folder, sd3_dir, clip_dir):
    bad = given(folder, sd3_dir, clip_dir, blocks="deepest", sigma_low=0.9, sigma_high=0.2, distil={"steps": 3})
    bad["model"]["pth"] = "x"
    with pytest.raises(UserError) as caught:
        stitch.checked(bad, "tiny")
    for part in ("4 faults", "did you mean 'distill'", "'blocks' must be best", "0 <= low < high", "unknown key 'model.pth'"):
        assert part in str(caught.value)
