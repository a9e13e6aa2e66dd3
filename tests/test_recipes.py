"""Every shipped recipe resolves; the two DRaFT recipes differ in two lines."""

import json
from pathlib import Path

import pytest

from rlstitch import config as cfg
from rlstitch.stitch import recipe as stitch
from rlstitch.types import UserError

README = Path(__file__).parents[1] / "README.md"
NAMES = sorted(str(p.relative_to(cfg.RECIPES).with_suffix("")) for p in cfg.RECIPES.glob("*.yaml"))
TRAINING = [n for n in NAMES if "algorithm" in cfg.compose(n)]


def test_every_recipe_is_of_a_kind_that_a_launcher_takes():
    for name in NAMES:
        given = cfg.compose(name)
        assert [s for s in cfg.LAUNCHERS.values() if not _refused(given, s, name)] == [
            next(v for k, v in cfg.LAUNCHERS.items() if k in given)
        ]


def test_hardware_says_how_an_update_is_done_and_not_what_it_is_made_of():
    said = {(p.stem, key) for p in (cfg.RECIPES / "hardware").glob("*.yaml") for key in cfg.compose(f"hardware/{p.stem}").get("batch", {})}
    assert {key for _, key in said} == {"micro_batch", "rollout_batch"}
    assert cfg.compose("draft_stitch_sd35")["batch"] == {"prompts_per_update": 2048, "images_per_prompt": 1, "micro_batch": 8}


def _refused(given, script, name):
    try:
        cfg.for_launcher(given, script, name)
    except UserError as error:
        assert f"recipe={name}" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", TRAINING)
def test_training_recipes_resolve(name):
    config, faults = cfg.structure(cfg.compose(name))
    assert not faults
    parts = [("model", config.model), ("algorithm", config.algorithm), *(("reward", r) for r in config.rewards.values())]
    given = ("'algorithm.oracle' is missing", "'algorithm.grid' is missing")
    assert not [f for where, node in parts for f in cfg.check_part(where, node, kind=where) if not f.startswith(given)]


def only_files_are_missing(error):
    """Whether all that a recipe lacks are models, pictures and prompts of the user's."""
    faults = str(error).splitlines()[1:]
    return bool(faults) and all("is not there" in fault or "is not in the hub cache" in fault for fault in faults)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("stitch_")])
def test_stitch_recipes_resolve(name):
    try:
        assert stitch.checked(cfg.compose(name), name).name.startswith("value_")
    except UserError as error:
        assert (name == "stitch_detector" or "sd35" in name) and only_files_are_missing(error)


def test_the_recipe_in_the_readme_lacks_nothing_but_files(tmp_path):
    from rlstitch.checks import checked

    (block,) = [b.split("```")[0] for b in README.read_text().split("```yaml\n") if "\nuse:" in b.split("```")[0]]
    (tmp_path / "mine.yaml").write_text(block)
    with pytest.raises(UserError) as error:
        checked(cfg.compose(str(tmp_path / "mine.yaml")), str(tmp_path / "mine.yaml"))
    assert only_files_are_missing(error.value) and "recipe" in str(error.value)
    config, faults = cfg.structure(cfg.compose(str(tmp_path / "mine.yaml")))
    assert not faults and config.batch.micro_batch == 1 and config.values == {"mine": "values/mine"}


@pytest.mark.parametrize("name", ["draft_sd35", "draft_stitch_sd35"])
def test_sd35_recipes_lack_nothing_but_files(name):
    from rlstitch.checks import checked

    with pytest.raises(UserError) as error:
        checked(cfg.compose(name), name)
    assert only_files_are_missing(error.value)


def test_use_is_a_list_that_leads_back_to_nothing(tmp_path):
    for name, use, said in (
        ("text", "draft", "must list recipes, e.g. use: \\[draft\\], not 'draft'"),
        ("circle", [str(tmp_path / "other.yaml")], "in a circle: circle -> other -> circle"),
    ):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"use": use}))
        (tmp_path / "other.yaml").write_text(json.dumps({"use": [str(tmp_path / "circle.yaml")]}))
        with pytest.raises(UserError, match=said):
            cfg.compose(str(tmp_path / f"{name}.yaml"))
    (tmp_path / "none.yaml").write_text("use:\nseed: 3\n")
    assert cfg.compose(str(tmp_path / "none.yaml")) == {"seed": 3}


def test_a_job_is_called_by_its_recipe_s_file(tmp_path):
    given = cfg.merge(cfg.compose("stitch_clip"), {"name": ""})
    assert stitch.checked(given, str(tmp_path / "mine.yaml")).name == "mine"


def test_a_reward_that_cannot_be_entered_is_sent_to_the_surrogate():
    given = cfg.compose("stitch_clip") | {"reward": {"_target_": "rlstitch.rewards.simple.Darkness"}, "max_reward_block": 0}
    with pytest.raises(UserError, match="(?s)'max_reward_block' must be positive, not 0.*launch/surrogate.py"):
        stitch.checked(given, "mine")


def test_what_counts_as_another_recipe():
    config = lambda *changes: cfg.structure(cfg.merge(cfg.compose("draft"), cfg.parse_overrides(list(changes))))[0]  # noqa: E731
    saved = cfg.compose("draft")
    told = [
        "updates=7",
        "evaluation.every=3",
        "batch.micro_batch=8",
        "rewards.new={_target_: rlstitch.rewards.simple.Darkness}",
        "threads=1",
    ]
    assert cfg.differences(saved, config()) == cfg.differences(saved, config(*told)) == []
    changed = cfg.differences(saved, config("optimiser.lr=1e-4", "oracle.weights.hps=2.0", "seed=1", "rewards.clip.path=mine"))
    assert changed == [
        "seed: 0 -> 1",
        "rewards.clip.path: shapes:clip -> mine",
        "oracle.weights.hps: 1.0 -> 2.0",
        "optimiser.lr: 0.0008 -> 0.0001",
    ]


def test_draft_and_draft_stitch_differ_in_oracle_and_stop_only():
    a, b = cfg.compose("draft"), cfg.compose("draft_stitch")
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {"oracle", "stop"}


def test_overrides_reach_any_depth_and_a_new_target_keeps_what_it_takes():
    given = cfg.merge(
        cfg.compose("draft_stitch"),
        cfg.parse_overrides(["oracle._target_=rlstitch.oracles.Terminal", "stop._target_=rlstitch.stops.End", "optimiser.lr=1e-3"]),
    )
    assert given["oracle"] == {"_target_": "rlstitch.oracles.Terminal", "weights": {"clip": 1.0, "hps": 1.0}}
    assert given["stop"] == {"_target_": "rlstitch.stops.End"} and given["optimiser"]["lr"] == 1e-3 and given["optimiser"]["warmup"] > 0


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'draft_stitch'"):
        cfg.compose("draft_stich")


@pytest.mark.parametrize("name", [n for n in TRAINING if "sd35" not in n])
def test_shipped_recipes_pass_every_check(name):
    from rlstitch.checks import checked

    assert checked(cfg.compose(name), name).name == name


def test_a_model_and_a_machine_are_laid_over_a_recipe(tmp_path):
    """By composition alone: the model's own shift and grid, nothing of the miniature's left, on one card of 24 GB and on eight of 80."""
    for model in sorted(p.stem for p in (cfg.RECIPES / "model").glob("*.yaml") if p.stem != "shapes"):
        for method in ("draft_stitch", "nft_stitch"):
            for machine in ("gpu24", "h100x8"):
                mine = tmp_path / "mine.yaml"
                mine.write_text(f"use: [{method}, model/{model}, hardware/{machine}]\n")
                given, alone = cfg.compose(str(mine)), cfg.compose(f"model/{model}")["model"]
                assert {k: given["model"][k] for k in alone} == alone and given["model"].keys() <= alone.keys() | {"max_sequence_length"}
                assert given["sampler"]["shift"] == given["evaluation"].get("shift", "auto") == given["evaluation"]["spacing"] == "auto"
                assert given["sampler"]["activation_checkpointing"] and given["distributed"]["precision"] == "bf16"
                assert given["batch"]["prompts_per_update"] == cfg.compose(method)["batch"]["prompts_per_update"]
