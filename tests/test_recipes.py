"""Every shipped recipe resolves; the two DRaFT recipes differ in two lines."""

import pytest

from rlstitch import config as cfg
from rlstitch.stitch import recipe as stitch
from rlstitch.types import UserError

NAMES = sorted(str(p.relative_to(cfg.RECIPES).with_suffix("")) for p in cfg.RECIPES.glob("*.yaml"))
TRAINING = [n for n in NAMES if "algorithm" in cfg.compose(n)]


def test_every_recipe_is_of_a_kind_that_a_launcher_takes():
    for name in NAMES:
        given = cfg.compose(name)
        assert [s for s in cfg.LAUNCHERS.values() if not _refused(given, s, name)] == [
            next(v for k, v in cfg.LAUNCHERS.items() if k in given)
        ]


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
    parts = [("model", config.model), ("algorithm", config.algorithm), *((f"rewards.{n}", r) for n, r in config.rewards.items())]
    given = ("'algorithm.oracle' is missing", "'algorithm.grid' is missing")
    assert not [f for where, node in parts for f in cfg.check_part(where, node) if not f.startswith(given)]


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("stitch_")])
def test_stitch_recipes_resolve(name):
    assert stitch.checked(cfg.compose(name), name).name.startswith("value_")


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
