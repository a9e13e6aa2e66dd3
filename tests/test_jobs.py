"""Whole training jobs in one process: stages, the guard, rollouts at their own batch size, unknown scores, and the options of draft.py, all resumed."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from rlstitch import cli
from rlstitch.checks import checked
from rlstitch.trainer import Trainer
from rlstitch.types import UserError
from tests.test_nft import NFT, PIXEL
from tests.test_train import rows, weights, world  # noqa: F401  (a fixture)


def train(world, name, *overrides):  # noqa: F811
    recipe, given = cli.recipe_and_overrides([f"recipe={world / 'recipe.yaml'}", f"name={name}", *overrides])
    return Trainer(checked(given, recipe)).train()


def same(world, a, b, step):  # noqa: F811
    assert rows(world, a) == rows(world, b)
    one, two = weights(world, a, step), weights(world, b, step)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


STAGES = (
    """stages=[{name: first, updates: 2}, {name: second, updates: 2, oracle: {_target_: rlstitch.oracles.Tweedie, weights: {clip: 2.0}}}]"""
)


def test_a_staged_run_changes_its_oracle_and_resumes_in_the_right_stage(world):  # noqa: F811
    train(world, "staged", STAGES, "checkpoint.every=1")
    found = [(r["stage"], r["rewards"]["clip"]) for r in rows(world, "staged")]
    assert [s for s, _ in found] == ["first", "first", "second", "second"]
    train(world, "staged-halves", STAGES, "checkpoint.every=1", "checkpoint.keep=4")
    for later in (3, 4):  # as if it had been killed before the third update
        for file in (folder := world / "runs" / "staged-halves" / "checkpoints" / f"step-{later:06d}").iterdir():
            file.unlink()
        folder.rmdir()
    assert train(world, "staged-halves", STAGES, "checkpoint.every=1")["steps"] == 4
    same(world, "staged", "staged-halves", 4)


GUARDED = ("evaluation.every=1", "evaluation.every_prompts=4", "guard.prompts=2", "guard.judge=clip", "guard.patience=2")


def test_every_evaluation_on_the_way_is_watched_and_a_fallen_judge_ends_the_run(world, monkeypatch):  # noqa: F811
    """A judge that falls by .1 an evaluation (the first of all is the best) under a trained reward that climbs: two fallen ones in a row, so it ends after 2."""
    from rlstitch import trainer

    true, count = trainer.evaluate, iter(range(100))

    def falling(*arguments, **options):
        result, k = true(*arguments, **options), next(count)
        result.scores["clip"] = torch.full_like(result.scores["clip"], -0.1 * k)
        result.means["clip"] = float(k)  # what the trained reward is read from
        return result

    monkeypatch.setattr(trainer, "evaluate", falling)
    summary = train(world, "watched", *GUARDED)
    assert summary["steps"] == 2 and "'clip' stayed below its best in 2 evaluations" in summary["stopped"]
    evaluated = [r["eval"] for r in rows(world, "watched") if "eval" in r]
    assert len(evaluated) == 3 and all(e["diversity"] > 0 and math.isfinite(e["gap/clip"]) for e in evaluated)
    stored = json.loads((world / "runs" / "watched" / "summary.json").read_text())
    assert stored["stopped"] == summary["stopped"]


@pytest.mark.parametrize("oracle", [(), PIXEL], ids=["stitched", "terminal"])
def test_rollouts_of_another_batch_size_are_the_same_samples(world, oracle):  # noqa: F811
    name = "wide" + "-pixel" * bool(oracle)
    train(world, name, *NFT, *oracle, "updates=2", "batch.micro_batch=2")
    train(world, f"{name}-8", *NFT, *oracle, "updates=2", "batch.micro_batch=2", "batch.rollout_batch=8")
    one, two = weights(world, name, 2), weights(world, f"{name}-8", 2)
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=2e-5, rtol=2e-3)


class Partial:
    """A reward that knows no score of the prompts whose place in the set is in `lost`."""

    differentiable = False

    def __init__(self, lost, device="cpu"):
        self.lost = set(lost)

    def score(self, images, batch):
        scores = images.mean((1, 2, 3))
        return torch.where(torch.tensor([int(g) in self.lost for g in batch.group]), torch.nan, scores)


def test_prompts_without_a_score_are_told_once_and_take_no_part(world, capsys):  # noqa: F811
    reward = "rewards.partial={_target_: tests.test_jobs.Partial, lost: %s}"
    weighed = "oracle={_target_: rlstitch.oracles.Terminal, weights: {partial: 1.0}}"
    train(world, "partial", *NFT, weighed, PIXEL[1], reward % "[3]", "updates=4")
    assert capsys.readouterr().out.count("no score for any picture of some prompts (partial: ") == 1
    masked = [r["masked"] for r in rows(world, "partial")]
    assert any(masked) and not all(m == 1 for m in masked)
    with pytest.raises(UserError, match="update 1: partial gave no score for any of 8 pictures"):
        train(world, "silent", *NFT, weighed, PIXEL[1], reward % "[0, 1, 2, 3, 4, 5, 6, 7]")
    assert not (world / "runs" / "silent" / "checkpoints").exists()


TWEEDIE = "oracle._target_=rlstitch.oracles.Tweedie"
OPTIONS = {
    "draft-pixel": PIXEL,
    "align_prop": (*PIXEL, "algorithm.truncation=uniform"),
    "draft-lv": (*PIXEL, "algorithm.grad_steps=1", "algorithm.variance_reduction=2"),
    "refl": (TWEEDIE, "algorithm.grad_steps=0", "algorithm.ceiling=3.0", "algorithm.regulariser=0"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_options_of_draft_resume_bit_for_bit(world, option):  # noqa: F811
    for name, updates in ((option, 4), (f"{option}-halves", 2), (f"{option}-halves", 4)):
        train(world, name, f"updates={updates}", *OPTIONS[option])
    same(world, option, f"{option}-halves", 4)
    start = load_file(world / "runs" / f"{option}-halves" / "checkpoints" / "step-000002" / "policy.safetensors")
    assert any(not torch.equal(v, start[k]) for k, v in weights(world, option).items())
