"""Parts of a user's own that break what they promise, in whole jobs: named in one line, before anything is built where that can be known."""

import pytest
import torch

from rlstitch import cli
from rlstitch.asking import PartError
from rlstitch.backbones import Diffusers
from rlstitch.checks import checked
from rlstitch.config import compose, merge
from rlstitch.evaluate import means_of
from rlstitch.types import UserError
from tests.sound_parts import Mine, Stop
from tests.test_jobs import train
from tests.test_train import world  # noqa: F401  (a fixture)

HERE = __name__


class Unreading(Mine):
    @staticmethod
    def unreadable(rows):
        return "needs boxes" if any("boxes" not in row for row in rows) else ""


class Leaving(Stop):
    """It keeps to its protocol for one update."""

    calls = 0

    def steps(self, num_steps):
        return range(num_steps, num_steps + 1)

    def draw(self, num_steps, seed):
        type(self).calls += 1
        if type(self).calls > 1:
            raise SystemExit(0)
        return num_steps


PIXELS = (
    "oracle={_target_: rlstitch.oracles.Terminal, weights: {clip: 1.0}}",
    "updates=2",
    "evaluation.final=[raw]",
    "evaluation.max_prompts=2",
)


def test_rewards_that_cannot_read_their_prompts_are_told_wherever_they_are_asked(world):  # noqa: F811
    mine = [f"rewards.mine={{_target_: {HERE}.Unreading}}", f"recipe={world / 'recipe.yaml'}", "check=true"]
    for key, more in (
        ("oracle.weights", [PIXELS[0].replace("clip", "mine"), "stop={_target_: rlstitch.stops.End}"]),
        ("evaluation.rewards", ["evaluation.rewards=[clip, mine]"]),
    ):
        with pytest.raises(UserError, match=f"'{key}' names 'mine', which needs boxes: ") as error:
            checked(*reversed(cli.recipe_and_overrides([*mine, *more])))
        assert str(error.value).count("needs boxes") == 1
    boxed = world / "boxed.jsonl"
    boxed.write_text('{"prompt": "a red star", "boxes": []}\n')
    for stage, fits in (("", True), (world / "prompts.txt", False)):
        stages = f"stages=[{{updates: 1}}, {{updates: 1, prompts: '{stage}'}}]"
        given = cli.recipe_and_overrides(
            [*mine, PIXELS[0].replace("clip", "mine"), "stop={_target_: rlstitch.stops.End}", f"data.prompts={boxed}", stages]
        )
        if fits:
            checked(*reversed(given))
        else:
            with pytest.raises(UserError, match="stage '2': 'oracle.weights' names 'mine', which needs boxes"):
                checked(*reversed(given))


def test_a_stop_that_leaves_in_training_ends_the_run_with_its_checkpoint(world):  # noqa: F811
    Leaving.calls = 0
    with pytest.raises(PartError, match=rf"^{HERE}\.Leaving\.draw failed: SystemExit: 0 \(.*\)\. Update 1 is kept"):
        train(world, "left", *PIXELS, f"stop={{_target_: {HERE}.Leaving}}")
    assert [f.name for f in (world / "runs" / "left" / "checkpoints").iterdir()] == ["step-000001"]


def test_means_are_made_of_what_a_judge_may_give():
    scores = {"mine": torch.tensor([1.0, 2.0])}
    assert means_of(scores, {"mine": Mine()}, [{}, {}]) == {"mine": 1.5, "mine/red": 1.0}
    own = type("Own", (Mine,), {"breakdown": lambda *a: {"red": 1.0}})
    with pytest.raises(PartError, match="'mine' has no 'overall'"):
        means_of(scores, {"mine": own()}, [{}, {}])


def test_recipes_that_cannot_be_are_told_once_and_with_the_recipe_that_names_them(tmp_path):
    (tmp_path / "big.yaml").write_text("x: 1\n" * 300_000)
    (tmp_path / "lacking.yaml").write_text("use: [nowhere]\n")
    for name, said in (("big", "has 1500000 bytes: it is no recipe"), ("lacking", "^'use' in .*lacking.yaml: no recipe 'nowhere'")):
        with pytest.raises(UserError, match=said) as error:
            cli.recipe_and_overrides([f"recipe={tmp_path / name}.yaml"])
        assert str(error.value).count(str(tmp_path)) == 1


class Both(Diffusers):
    """A backbone that knows no other gradient of guided velocities than the whole one."""

    guidance_gradient = None


def test_a_backbone_that_does_not_know_a_gradient_is_not_asked_for_it():
    given = merge(compose("draft_stitch"), {"model": {"_target_": "tests.test_parts.Both"}, "sampler": {"guidance": 2.0}})
    checked(given, "draft_stitch")
    with pytest.raises(UserError, match="'sampler.guidance_gradient' is conditional, and tests.test_parts.Both does not say"):
        checked(merge(given, {"sampler": {"guidance_gradient": "conditional"}}), "draft_stitch")
    checked(merge(compose("draft_stitch"), {"sampler": {"guidance_gradient": "conditional"}}), "draft_stitch")
