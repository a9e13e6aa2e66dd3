"""Whole training jobs in one process: stages, the guard, rollouts at their own batch size, unknown scores, and the options of draft.py, all resumed."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file

from rlstitch import cli, metrics
from rlstitch.algorithms.draft import Draft
from rlstitch.asking import PartError
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


def test_device_hours_are_all_the_time_that_a_run_holds_its_machines(world, monkeypatch):  # noqa: F811
    """Also what it waits for other ranks, here .2 s a gather; none of it is training that another method would not be charged with."""
    from rlstitch.distributed import Engine

    true, waited = Engine.gather, []

    def slow(engine, tensor):
        waited.append(0.2)
        time.sleep(0.2)
        return true(engine, tensor)

    monkeypatch.setattr(Engine, "gather", slow)
    recipe, given = cli.recipe_and_overrides(
        [f"recipe={world / 'recipe.yaml'}", "name=held", "updates=4", "checkpoint.every=1", "evaluation.final=[raw]", "evaluation.every=2"]
    )
    checked_ = checked(given, recipe)
    started = time.perf_counter()
    hours = Trainer(checked_).train()["device_hours"]
    wall = time.perf_counter() - started
    spent = {k: 3600 * v for k, v in hours.items() if k != "stitching"}
    assert sum(spent.values()) == pytest.approx(wall, rel=0.02)
    assert min(spent["setup"], spent["checkpoint"], spent["eval"]) > 0 and 0.5 * sum(waited) < spent["wait"] < sum(waited) + 0.5
    last = [r for r in metrics.read(world / "runs" / "held") if "loss" in r][-1]["cpu_hours"]
    assert last["total"] == pytest.approx(hours["stitching"] + sum(last[k] for k in metrics.TRAINING)) and last["wait"] > 0


DARK = ("rewards.dark={_target_: rlstitch.rewards.simple.Darkness}", "evaluation.rewards=[clip, dark]")
GUARDED = (*DARK, "evaluation.every=1", "evaluation.every_prompts=4", "guard.prompts=2", "guard.patience=2")


def test_every_evaluation_on_the_way_is_watched_and_a_fallen_judge_ends_the_run(world, monkeypatch):  # noqa: F811
    """A judge that falls by .1 an evaluation (the second one is the best) under a trained reward that climbs: two fallen ones in a row, so it ends after 3, with
    the best checkpoint beside the last, from which the run can be finished."""
    from rlstitch import trainer

    true, count = trainer.evaluate, iter(range(100))

    def falling(*arguments, **options):
        result, k = true(*arguments, **options), next(count)
        result.scores["dark"] = torch.full_like(result.scores["dark"], -0.1 * abs(k - 1))
        result.scores["clip"] = torch.full_like(result.scores["clip"], float(k))
        return result

    monkeypatch.setattr(trainer, "evaluate", falling)
    summary = train(world, "watched", *GUARDED, "checkpoint.every=1", "checkpoint.keep=1")
    assert "The best was step-000001, which is kept" in summary["stopped"]
    kept = [folder.name for folder in sorted((world / "runs" / "watched" / "checkpoints").iterdir())]
    assert kept == ["step-000001", "step-000003"]
    assert summary["steps"] == 3 and "'dark' stayed below its best in 2 evaluations" in summary["stopped"]
    evaluated = [r["eval"] for r in rows(world, "watched") if "eval" in r]
    assert len(evaluated) == 4 and all(e["diversity"] > 0 and math.isfinite(e["gap/clip"]) for e in evaluated)
    stored = json.loads((world / "runs" / "watched" / "summary.json").read_text())
    assert stored["stopped"] == summary["stopped"]
    best = f"resume={world / 'runs' / 'watched' / 'checkpoints' / kept[0]}"
    again = train(world, "watched", *GUARDED, best, "updates=1")
    assert again["steps"] == 1 and "stopped" not in again


def test_curves_reach_from_the_untrained_model_to_the_last_update(world):  # noqa: F811
    train(world, "curve", "updates=3", "evaluation.every=2", "evaluation.every_prompts=2", "guard.prompts=0")
    assert [r["step"] for r in rows(world, "curve") if "eval" in r] == [0, 2, 3]


@pytest.mark.parametrize("oracle", [(), PIXEL], ids=["stitched", "terminal"])
def test_rollouts_of_another_batch_size_are_the_same_samples(world, oracle):  # noqa: F811
    name = "wide" + "-pixel" * bool(oracle)
    train(world, name, *NFT, *oracle, "updates=2", "batch.micro_batch=2")
    train(world, f"{name}-8", *NFT, *oracle, "updates=2", "batch.micro_batch=2", "batch.rollout_batch=8")
    one, two = weights(world, name, 2), weights(world, f"{name}-8", 2)
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=2e-5, rtol=2e-3)


class Partial:
    """A reward whose score is `instead` for the prompts whose place in the set is in `lost`."""

    differentiable = True

    def __init__(self, lost, instead=float("nan"), device="cpu"):
        self.lost, self.instead = set(lost), instead

    def score(self, images, batch):
        scores = images.mean((1, 2, 3))
        return torch.where(torch.tensor([int(g) in self.lost for g in batch.group]), self.instead, scores)


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


PIXEL_OF = "oracle={_target_: rlstitch.oracles.Terminal, weights: {clip: 0.0, %s}}"
DRAFT_ONE = ("algorithm.grad_steps=1", PIXEL[1])


@pytest.mark.parametrize("method", [NFT, DRAFT_ONE], ids=["nft", "draft"])
def test_infinite_scores_take_no_part_either(world, method):  # noqa: F811
    """As if they were NaN, and the run goes on."""
    for name, instead in (("inf", ".inf"), ("none", ".nan")):
        reward = f"rewards.partial={{_target_: tests.test_jobs.Partial, lost: [3, 5], instead: {instead}}}"
        train(world, f"{name}-{len(method)}", *method, PIXEL_OF % "partial: 1.0", PIXEL[1], reward, "updates=3")
    same(world, f"inf-{len(method)}", f"none-{len(method)}", 3)
    assert any(r["masked"] for r in rows(world, f"inf-{len(method)}"))
    assert all(r["masked"] < 1 and not r["skipped"] and r["grad_norm"] > 0 for r in rows(world, f"inf-{len(method)}"))


@pytest.mark.parametrize("method", [NFT, DRAFT_ONE], ids=["nft", "draft"])
def test_an_update_without_a_total_ends_the_run_with_what_was_learned(world, method):  # noqa: F811
    """Two rewards, each of which knows what the other does not: no picture has a total."""
    half = "rewards.%s={_target_: tests.test_jobs.Partial, lost: %s}"
    lost = [half % ("one", "[0, 1, 2, 3]"), half % ("two", "[4, 5, 6, 7]")]
    name = f"apart-{len(method)}"
    with pytest.raises(UserError, match="update 1: none of . pictures has a score .* from all of one, two"):
        train(world, name, *method, PIXEL_OF % "one: 1.0, two: 1.0", PIXEL[1], *lost, "updates=2")
    train(
        world,
        f"{name}-0",
        *method,
        PIXEL_OF % "one: 1.0, two: 0.0",
        PIXEL[1],
        half % ("one", "[]"),
        half % ("two", "[0, 1, 2, 3, 4, 5, 6, 7]"),
        "updates=2",
    )  # only looked at
    assert all(r["masked"] == 0 for r in rows(world, f"{name}-0"))
    fails = (
        f"rewards.one={{_target_: tests.test_jobs.Failing, calls: {4 if method is DRAFT_ONE else 2}}}"  # one of them before the training
    )
    with pytest.raises(UserError, match="update [23]: one gave no score"):
        train(world, f"{name}-f", *method, PIXEL_OF % "one: 1.0", PIXEL[1], fails, "updates=4", "checkpoint.every=1000")
    (kept,) = (world / "runs" / f"{name}-f" / "checkpoints").iterdir()
    assert int(kept.name[-1]) == len(rows(world, f"{name}-f")) > 0


class Failing(Partial):
    """A reward that knows nothing any more after so many calls."""

    def __init__(self, calls, device="cpu"):
        super().__init__([])
        self.calls = calls

    def score(self, images, batch):
        self.calls -= 1
        return super().score(images, batch) if self.calls >= 0 else torch.full((len(images),), torch.nan) + 0 * images.mean((1, 2, 3))


class Hungry(Partial):
    """A reward that asks for a million GiB after so many calls."""

    left = 0

    def __init__(self, device="cpu"):
        super().__init__([])

    def score(self, images, batch):
        Hungry.left -= 1
        return super().score(images, batch) if Hungry.left >= 0 else torch.empty(1 << 48)


def test_memory_that_runs_out_is_told_with_the_keys_that_ask_for_less_and_loses_no_update(world):  # noqa: F811
    """By the allocator's own error: in the second micro-batch of the third update, and in the final evaluation."""
    hungry = (PIXEL_OF % "hungry: 1.0", *DRAFT_ONE, "rewards.hungry={_target_: tests.test_jobs.Hungry}", "checkpoint.every=1000")
    evaluated = (*hungry, "evaluation.rewards=[hungry]", "evaluation.final=[raw]")
    Hungry.left = 10**6
    train(world, "fed", *evaluated)
    Hungry.left = 7  # two when it is probed, two an update
    with pytest.raises(
        UserError, match=r"out of memory \(1.05e\+06 GiB were asked for\).* batch.micro_batch, 2 now.*goes on from update 2"
    ) as caught:
        train(world, "hungry", *evaluated)
    assert "activation_checkpointing=true" in str(caught.value) and "\n" not in str(caught.value)
    assert [f.name for f in (world / "runs" / "hungry" / "checkpoints").iterdir()] == ["step-000002"]
    Hungry.left = 6
    with pytest.raises(UserError, match="evaluation.batch_size, 2 now.*goes on from update 4"):
        train(world, "hungry", *evaluated)
    Hungry.left = 10**6
    train(world, "hungry", *evaluated)
    same(world, "fed", "hungry", 4)


TWEEDIE = "oracle._target_=rlstitch.oracles.Tweedie"
OPTIONS = {
    "draft-pixel": PIXEL,
    "align_prop": (*PIXEL, "algorithm.truncation=uniform"),
    "draft-lv": (*PIXEL, "algorithm.grad_steps=1", "algorithm.variance_reduction=2"),
    "align_prop-stitch": ("algorithm.truncation=uniform",),
    "draft-lv-stitch": ("algorithm.grad_steps=1", "algorithm.variance_reduction=2"),
    "refl": (TWEEDIE, "algorithm.grad_steps=0", "algorithm.ceiling=3.0", "algorithm.regulariser=0"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_options_of_draft_resume_bit_for_bit(world, option):  # noqa: F811
    for name, updates in ((option, 4), (f"{option}-halves", 2), (f"{option}-halves", 4)):
        train(world, name, f"updates={updates}", *OPTIONS[option])
    same(world, option, f"{option}-halves", 4)
    start = load_file(world / "runs" / f"{option}-halves" / "checkpoints" / "step-000002" / "policy.safetensors")
    assert any(not torch.equal(v, start[k]) for k, v in weights(world, option).items())


class Listed(Draft):
    def state(self):
        return [torch.zeros(1)]


def test_a_state_that_no_checkpoint_can_hold_is_told_at_the_start(world):  # noqa: F811
    with pytest.raises(PartError, match=r"Listed\.state gave .*a dict of tensors by name"):
        train(world, "listed", f"algorithm._target_={__name__}.Listed", "resume=never")
