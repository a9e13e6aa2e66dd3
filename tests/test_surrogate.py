"""A black box distilled into something that can be stitched."""

import json
import math

import pytest
import torch

from rlstitch.rewards.clip import ClipReward
from rlstitch.stitch import measure, surrogate
from rlstitch.stitch.surrogate import Student, SurrogateConfig
from rlstitch.types import UserError


class Redness:
    """A black box: how red a picture is, twice that under prompts that ask for red."""

    differentiable = False

    def score(self, images, batch):
        red = images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))
        return red * torch.tensor([2.0 if "red" in p else 1.0 for p in batch.prompts])


class Broken:
    differentiable = False

    def score(self, images, batch):
        return torch.full((len(images),), float("nan"))


class Forgetful(Redness):
    """It gives no score of the first picture that it is asked about in each batch, as a service may."""

    def score(self, images, batch):
        scores = super().score(images, batch)
        scores[:1] = float("inf")
        return scores


def given(tmp_path, sd3_dir, clip_dir, target="Redness", **more):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue stars\na green square\na red star\n")
    return {
        "name": "redness", "out": str(tmp_path), "held_out": str(prompts), "start": {"_target_": "rlstitch.rewards.clip.ClipReward", "path": str(clip_dir)}, "surrogate": True,
        "model": {"_target_": "rlstitch.backbones.sd3.SD3Backbone", "path": str(sd3_dir), "max_sequence_length": 0},
        "rewards": {"redness": {"_target_": f"tests.test_surrogate.{target}"}},
        "generate": {"count": 16, "num_steps": 2, "prompts": str(prompts)}, "held_generations": 8, "steps": 3, "batch_size": 8, **more,
    }  # fmt: skip


def test_a_student_learns_a_black_box(clip_dir):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(96, 3, 1, 1, generator=generator) * torch.ones(96, 3, 16, 16) * 255).byte()
    prompts = ["a red circle", "two blue stars"] * 48
    truth = Redness().score(images.float() / 255, measure.batch_of(prompts))
    student = Student(ClipReward(str(clip_dir)))
    last = surrogate.fit(student, images, prompts, truth, SurrogateConfig(name="t", steps=250, batch_size=32, lr=3e-3))
    assert last < 0.15 * float(truth.var())


def test_the_job_saves_a_reward_that_can_be_loaded_and_stitched(tmp_path, sd3_dir, clip_dir, monkeypatch, capsys):
    """Also where a few pictures have no score, which are neither learned from nor measured by."""
    monkeypatch.setattr(surrogate, "UNKNOWN", 0.25)
    card = surrogate.run(surrogate.checked(given(tmp_path, sd3_dir, clip_dir, "Forgetful"), "redness"))
    assert "gave no score for 1 of 16 pictures, which are left out" in capsys.readouterr().out
    assert all(math.isfinite(card[key]) for key in ("train_loss", "held_out_correlation", "held_out_rmse")) and math.isfinite(
        card["mean_score"]["truth"]
    )
    saved = json.loads((tmp_path / "redness" / "surrogate.json").read_text())
    assert saved == card and saved["pictures"] == 16 and -1 <= saved["held_out_correlation"] <= 1
    reward = ClipReward(str(tmp_path / "redness"), scale="surrogate")
    assert (reward.scale, reward.offset) == (saved["scale"], saved["offset"])
    images, batch = torch.rand(2, 3, 16, 16), measure.batch_of(["a red circle", "a blue star"])
    cosine = (torch.nn.functional.normalize(reward.encode(images)[0], dim=-1) * reward.embed_texts(batch.prompts)).sum(-1)
    torch.testing.assert_close(reward.score(images, batch), saved["scale"] * cosine + saved["offset"])
    assert reward.prefix(images, 1).shape[0] == 2  # stitchable


def test_scores_that_are_not_finite_are_never_learned(tmp_path, sd3_dir, clip_dir):
    with pytest.raises(UserError, match="16 scores of 16 that are not finite"):
        surrogate.run(surrogate.checked(given(tmp_path, sd3_dir, clip_dir, "Broken"), "redness"))


def test_faults_at_once(tmp_path, sd3_dir, clip_dir):
    bad = given(tmp_path, sd3_dir, clip_dir, held_out="nowhere", steps=0, stepps=3)
    bad["rewards"]["other"] = {"_target_": "tests.test_surrogate.Broken"}
    with pytest.raises(UserError) as caught:
        surrogate.checked(bad, "redness")
    assert all(part in str(caught.value) for part in ("nowhere", "'steps' must be positive", "stepps", "not 2"))
