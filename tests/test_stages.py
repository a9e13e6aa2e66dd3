"""Staged schedules: each stage trains on its own reward, the weights go on, and a resume lands in the right stage."""

import pytest

from rlstitch import stages
from rlstitch.checks import checked
from rlstitch.config import compose, merge
from rlstitch.types import UserError

CLIP = {"_target_": "rlstitch.oracles.Stitched", "weights": {"clip": 1.0}}
HPS = {"_target_": "rlstitch.oracles.Stitched", "weights": {"hps": 1.0}}


def recipe(*entries):
    return merge(compose("draft_stitch"), {"stages": list(entries)})


def test_the_sum_of_the_stages_is_the_run():
    config = checked(recipe({"updates": 3, "oracle": CLIP}, {"updates": 4, "oracle": HPS, "prompts": "shapes:held_out.jsonl"}), "staged")
    assert config.updates == 7
    first, second = stages.expand(config)
    assert first.oracle == CLIP and second.oracle == HPS
    assert first.data.prompts == "shapes:train.jsonl" and second.data.prompts == "shapes:held_out.jsonl"
    assert first.stop == second.stop == config.stop


def test_every_update_has_its_stage():
    parts = [stages.Stage("a", 2, None, None, None), stages.Stage("b", 5, None, None, None)]
    assert [stages.at(parts, k).name for k in range(6)] == ["a", "a", "b", "b", "b", "b"]


def test_faults_name_the_stage_and_common_ones_are_told_once():
    with pytest.raises(UserError) as error:
        checked(
            merge(
                recipe({"name": "first", "updates": 0, "oracle": CLIP}, {"updates": 2, "oracle": HPS | {"weights": {"hqs": 1.0}}}),
                {"data": {"prompts": "none.txt"}},
            ),
            "staged",
        )
    text = str(error.value)
    assert "never ends: stage 'first'" in text and "stage '2'" in text and "did you mean 'hps'?" in text
    assert text.count("'data.prompts'") == 1


def test_an_unknown_key_of_a_stage_is_named():
    with pytest.raises(UserError, match=r"entry 2: unknown key 'update' \(did you mean 'updates'\?\)"):
        checked(recipe({"updates": 1}, {"update": 1}), "staged")
