"""launch/stitch.py from a folder of pictures, and its user's mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import UserError
from tests import warm


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
        "logging": {"wandb": "off"},
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


LAUNCHER = warm.ROOT / "launch" / "stitch.py"
AT = {  # where a job is killed, at which call of it
    "before the search": ("rlstitch.stitch.search.features", 1),
    "before the first step": ("rlstitch.stitch.distill.Distillation.step", 1),
    "between two checkpoints": ("rlstitch.stitch.distill.Distillation.step", 6),
    "while a checkpoint is written": ("rlstitch.checkpoint.sha256", 5),
    "before the value model is saved": ("rlstitch.stitch.model.StitchedValueModel.save_pretrained", 1),
    "when it is saved": ("rlstitch.stitch.loop.Loop.end", 1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sd3_dir, clip_dir):
    """A recipe as a file, and the weights, card and log of its job without a kill."""
    tmp_path = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{k:02d}.png")
    told = given(tmp_path, sd3_dir, clip_dir, measure_every=3, checkpoint={"every": 4})
    told["distill"] |= {"steps": 10, "lr": 1e-3}
    (tmp_path / "mine.yaml").write_text(json.dumps(told))
    code, output = warm.run(LAUNCHER, f"recipe={tmp_path / 'mine.yaml'}", f"out={tmp_path / 'values'}")
    assert code == 0, output
    return tmp_path / "mine.yaml", left(tmp_path / "values" / "tiny")


def left(folder):
    """What a job leaves: weights, what its card and log say but for times."""
    card, rows = (
        json.loads((folder / "value.json").read_text()),
        [json.loads(r) for r in (folder / "metrics.jsonl").read_text().splitlines()],
    )
    assert not list((folder / "checkpoints").iterdir())
    times = {"search_seconds", "distill_seconds", "device_hours", "cpu_hours"}
    weights = (folder / "value.safetensors").read_bytes()
    return weights, *([{k: v for k, v in row.items() if k not in times} for row in part] for part in ([card], rows))


@pytest.mark.parametrize("when", AT)
def test_a_killed_stitch_goes_on_bit_for_bit(when, whole, tmp_path):
    recipe, wanted = whole
    command = [LAUNCHER, f"recipe={recipe}", f"out={tmp_path}"]
    codes, output, _ = warm.outcome(*command, target=AT[when])
    assert codes == [-9], output
    code, output = warm.run(*command)
    resumed = when not in ("before the search", "before the first step")
    assert code == 0 and ("resumed from" in output) >= resumed, output
    assert left(tmp_path / "tiny") == wanted


def test_a_stitch_measures_on_its_way(whole):
    rows = whole[1][2]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "quality" in row] == [3, 6, 9, 10]
    assert all(set(row["quality"]["0.5"]) >= {"correlation", "recall_at_1"} for row in rows if "quality" in row)


def test_a_stitch_of_another_recipe_is_not_gone_on_with(whole, tmp_path):
    command = [LAUNCHER, f"recipe={whole[0]}", f"out={tmp_path}"]
    warm.outcome(*command, target=AT["between two checkpoints"])
    code, output = warm.run(*command, "distill.lr=1.0e-4")
    assert code == 2 and "distill.lr: 0.001 -> 0.0001" in output and "resume=never" in output, output
    code, output = warm.run(*command, "distill.lr=1.0e-4", "resume=never")
    assert code == 0 and "resumed" not in output, output
