"""Every reward that has what it needs here keeps the contract; a reward that breaks a clause is told by that clause and by no other."""

import pytest
import torch

from rlstitch import config as cfg
from rlstitch import reward_check
from rlstitch.contract import broken, contract
from rlstitch.prompts import read_prompts
from rlstitch.rewards.clip import ClipReward
from rlstitch.shapes.prompts import Prompt, scenes_for
from rlstitch.shapes.scenes import render
from rlstitch.types import UserError
from tests.test_clip_family import siglip_dir  # noqa: F401

OWN = [("shapes", "clip"), ("shapes", "aesthetic"), ("shapes", "detector"), ("darkness", "darkness"), ("jpeg", None), ("sharpness", None)]
PROMPTS = read_prompts("shapes:held_out.jsonl")
ROWS = PROMPTS.rows[:3]
IMAGES = render(scenes_for([Prompt.from_json(row) for row in ROWS], seed=0), 64)


def held(reward, images=IMAGES):
    return contract("r", reward, images, PROMPTS.prompts[:3], ROWS)


@pytest.mark.parametrize(("recipe", "name"), OWN)
def test_our_rewards_keep_the_contract(recipe, name):
    nodes = reward_check.named(recipe)
    reward = cfg.build(nodes[name or next(iter(nodes))], kind="reward", device="cpu")
    clauses = held(reward)
    assert not broken(clauses), clauses
    assert {c.name: c.held for c in clauses}["gradient"] is (True if reward.differentiable else None)


def test_a_tower_without_cls_keeps_it_in_half_precision(siglip_dir):  # noqa: F811
    clauses = held(ClipReward(str(siglip_dir), dtype="bfloat16", scale=30.0))
    assert not broken(clauses), clauses


class Good:
    """A reward of a user's: colour of the picture against a number that is the prompt's."""

    differentiable = True

    def score(self, images, batch):
        wanted = torch.tensor([sum(map(ord, p)) % 97 / 97 for p in batch.prompts])
        return 1 - (images.mean((1, 2, 3)) - wanted).abs() + images[:, 0].square().mean((1, 2))


def bad(clause, change):
    class Bad(Good):
        def score(self, images, batch):
            return change(super().score, images, batch)

    return pytest.param(clause, Bad(), id=clause + change.__name__)


def blind(score, images, batch):
    return images[:, 0].square().mean((1, 2))


def prompt_alone(score, images, batch):
    return torch.tensor([float(len(p)) for p in batch.prompts]) + 0 * images.mean((1, 2, 3))


def nan_on_black(score, images, batch):
    return torch.where(images.amax((1, 2, 3)) == 0, torch.nan, score(images, batch))


def of_the_batch(score, images, batch):
    return score(images, batch) - score(images, batch).mean().detach()


def wrong_slope(score, images, batch):
    return score(2 * images - images.detach(), batch) if images.requires_grad else score(images, batch)


def no_slope(score, images, batch):
    return score(images.detach(), batch)


def not_finite_slope(score, images, batch):
    return score(images, batch) + (images - images).square().sum((1, 2, 3)).sqrt()


def writes(score, images, batch):
    with torch.no_grad():
        found = score(images, batch)
        images.data.mul_(0.5)
    return found


def raises(score, images, batch):
    raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("clause", "reward"),
    [
        bad("moves with the prompt", blind),
        bad("moves with the picture", prompt_alone),
        bad("finite on black, white, noise", nan_on_black),
        bad("a batch is its pictures one by one", of_the_batch),
        bad("gradient", wrong_slope),
        bad("gradient", no_slope),
        bad("gradient", not_finite_slope),
        bad("leaves its input alone", writes),
        bad("leaves its input alone", raises),
    ],
)
def test_a_clause_that_is_not_kept_is_told(clause, reward):
    clauses = {c.name: c for c in held(reward)}
    assert clauses[clause].held is False, clauses
    if (change := type(reward)) and clause == "moves with the prompt":
        change.reads_prompt = False
        assert not broken(held(reward))
    if clause.startswith("moves with the picture"):
        assert "gives all pictures the same" in clauses[clause].seen


def test_the_launcher_takes_recipes_and_classes(capsys, tmp_path):
    reward_check.run({"reward": "tests.test_contract.Good", "size": 32, "count": 3})
    said = capsys.readouterr().out
    assert "reward 'Good'" in said and said.count("ok ") == 6 and "ms a picture with its gradient" in said
    reward_check.run({"reward": {"_target_": "tests.test_contract.Good"}, "size": 32, "count": 2})
    with pytest.raises(UserError, match="reward 'Blind' does not keep: moves with the prompt$"):
        reward_check.run({"reward": "tests.test_contract.Blind", "size": 32})
    assert "it does not see the prompt" in capsys.readouterr().out
    reward_check.run({"reward": "shapes", "only": ["detector"], "check": True})
    assert "would hold detector to what" in capsys.readouterr().out
    for given, why in (
        ({}, "'reward' must name one"),
        ({"reward": "pickscor"}, "no recipe 'pickscor' .*A class is named by its dotted path"),
        ({"reward": "cpu.yaml"}, "no recipe"),
        ({"reward": "hardware/cpu"}, "has no rewards"),
        ({"reward": "torch.nn.Linear"}, "Linear is not a reward"),
        ({"reward": "shapes", "only": ["klip"]}, "'only' names 'klip', and the recipe has clip, hps"),
        ({"reward": "shapes", "count": 1}, "'count' must be at least 2"),
    ):
        with pytest.raises(UserError, match=why):
            reward_check.run(given)
    (tmp_path / "few.txt").write_text("one\none\n")
    with pytest.raises(UserError, match="has 1 different ones, and 'count' asks for 4"):
        reward_check.run({"reward": "tests.test_contract.Good", "prompts": str(tmp_path / "few.txt")})
    with pytest.raises(UserError, match="'prompts' names 'detector', which needs prompts that say what is to be seen"):
        (tmp_path / "few.txt").write_text("one\ntwo\nthree\nfour\n")
        reward_check.run({"reward": "shapes", "only": ["detector"], "prompts": str(tmp_path / "few.txt")})


class Blind(Good):
    def score(self, images, batch):
        return blind(None, images, batch)
