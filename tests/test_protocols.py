"""What may stand behind a `_target_`: nothing that is no part of its kind is called, or imported where it need not be."""

import sys

import pytest
import torch

from rlstitch import cli, protocols
from rlstitch import config as cfg
from rlstitch.asking import PartError
from rlstitch.checks import checked
from rlstitch.types import UserError
from tests.test_train import start, world  # noqa: F401  (a fixture)

KINDS = {
    "model": ["rlstitch.backbones.sd3.SD3Backbone"],
    "reward": ["rlstitch.rewards.clip.ClipReward", "rlstitch.rewards.simple.Darkness", "rlstitch.shapes.reward.DetectorReward"],
    "stop": ["rlstitch.stops.End", "rlstitch.stops.Fixed", "rlstitch.stops.UniformWindow"],
    "oracle": [f"rlstitch.oracles.{name}" for name in ("Terminal", "Tweedie", "MonteCarlo", "Stitched", "Weighted")],
    "algorithm": [f"rlstitch.algorithms.{name}" for name in ("draft.Draft", "nft.NFT", "flow_grpo.FlowGRPO", "marble.MARBLE", "soar.SOAR", "dpo.OnlineDPO", "dpo.OfflineDPO")],
    "images": [f"rlstitch.shapes.images.{name}" for name in ("scenes", "curated", "distinct", "ranked_pairs")] + ["rlstitch.pictures.images_from_folder"],
    "captioned": ["rlstitch.picture_sets.images_with_all_captions"],
    "pairs": ["rlstitch.shapes.images.preference_pairs"],
    "graded": ["rlstitch.shapes.images.graded_looks"],
    "method": [f"rlstitch.steering.{name}" for name in ("dps", "fk", "svdd", "best_of_n")],
}  # fmt: skip
NO_PART = [
    "torch.load",
    "torch.hub.load",
    "torch.nn.Linear",
    "torch.Tensor",
    "numpy.load",
    "numpy.ndarray",
    "rlstitch.config.build",
    "rlstitch.config.load_class",
]
NO_PART += ["rlstitch.files.write_text", "rlstitch.stitch.model.build", "rlstitch.oracles._scores", "rlstitch.cli.main", "rlstitch.types.UserError", "omegaconf.OmegaConf"]  # fmt: skip
STANDARD = [
    "os.system",
    "subprocess.Popen",
    "subprocess.run",
    "builtins.exec",
    "builtins.print",
    "shutil.rmtree",
    "pathlib.Path",
    "antigravity.geohash",
]
STANDARD += ["importlib.import_module", "this.s", "posix.system", "types.SimpleNamespace", "pickle.load", "collections.abc.Callable"]


def test_every_part_of_ours_fits_its_kind_and_no_other():
    for kind, targets in KINDS.items():
        for target in targets:
            fits = [k for k in KINDS if not protocols.unfit(k, cfg.load_class(target))]
            assert fits == [kind], target
    assert protocols.unfit("reward", cfg.load_class("rlstitch.stops.End")) == "is a stop, not a reward"
    assert protocols.unfit("stop", cfg.load_class("rlstitch.rewards.simple.Darkness")) == "is a reward, not a stop"


@pytest.mark.parametrize(
    "target", [*NO_PART, *STANDARD, "", "x", "a b.c", ".a.b", "rlstitch.stops", 3, None, [], {}, "rlstitch.stops.Stop.x"]
)
def test_what_is_no_part_is_refused_by_key_and_never_called(target):
    for kind in KINDS:
        (fault,) = cfg.check_part("here", {"_target_": target}, kind=kind)
        assert fault.startswith("'here': ") and "\n" not in fault
        if target in STANDARD:
            assert "of Python's standard library" in fault
    assert "antigravity" not in sys.modules and "this" not in sys.modules


MINE = """
from os import system as system
import nowhere_at_all_{k}
"""


def test_modules_that_cannot_be_imported_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    protocols.look_in(tmp_path)
    for name, body, said in (
        ("leaving", "raise SystemExit(0)", "fails with SystemExit: 0"),
        ("broken", "1 / 0", "fails with ZeroDivisionError"),
        ("misspelt", "def f(:", "fails with SyntaxError"),
        ("lacking", "import nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("lending", "from os import system as Mine", "standard library|neither a class nor a function"),
        ("other", "class Other: pass", "did you mean 'Other'|there are: Other"),
        ("plain", "Mine = 3", "is a int, neither"),
    ):
        (tmp_path / f"mine_{name}.py").write_text(body)
        with pytest.raises(UserError, match=said) as error:
            cfg.load_class(f"mine_{name}.Mine")
        assert "\n" not in str(error.value) and f"mine_{name}" in str(error.value)


THEIRS = """
from pathlib import Path
import torch

class Reward:
    differentiable = True
    def __init__(self, device="cpu"):
        Path(__file__).with_name("built-reward").touch()
    def score(self, images, batch):
        return images.mean((1, 2, 3))

class Stop:
    def __init__(self):
        Path(__file__).with_name("built-stop").touch()
    def steps(self, num_steps):
        return range(num_steps, num_steps + 1)
    def draw(self, num_steps, seed):
        return num_steps

class Late(Stop):
    def draw(self, num_steps, seed):
        raise KeyError("no such step")

def images(n):
    Path(__file__).with_name("built-images").touch()
    return torch.zeros(n, 3, 16, 16, dtype=torch.uint8), ["a red star"] * n
"""


def test_parts_beside_the_recipe_are_found_and_check_builds_none_of_them(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "theirs_apart.py").write_text(THEIRS)
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"use: ['{world / 'recipe.yaml'}']\nname: own\nrewards.own: {{_target_: theirs_apart.Reward}}\nstop: {{_target_: theirs_apart.Stop}}\n"
        "oracle: {_target_: rlstitch.oracles.Terminal, weights: {own: 1.0}}\nevaluation.rewards: [own]\nupdates: 1\n"
    )
    name, given = cli.recipe_and_overrides([f"recipe={recipe}", "check=true"])
    from rlstitch.describe import describe

    assert "stops where theirs_apart.Stop says" in describe(checked(given, name))
    assert not list(tmp_path.glob("built-*"))
    with pytest.raises(UserError, match="'rewards.own': theirs_apart.Stop is a stop, not a reward"):
        checked(cfg.merge(given, cfg.parse_overrides(["rewards.own._target_=theirs_apart.Stop"])), name)


def test_what_goes_wrong_inside_a_part_names_it_and_what_is_our_own_mistake_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    protocols.look_in(tmp_path)
    (tmp_path / "theirs_late.py").write_text(THEIRS)
    stop = cfg.build({"_target_": "theirs_late.Late"})
    with pytest.raises(PartError, match=r"^theirs_late.Late failed: KeyError: 'no such step' \(RLSTITCH"):
        with protocols.naming():
            stop.draw(3, 0)
    with pytest.raises(ZeroDivisionError):
        with protocols.naming():
            1 / 0  # noqa: B018
    with pytest.raises(PartError, match="^theirs_late.images failed: TypeError"):
        cfg.build({"_target_": "theirs_late.images", "n": torch.zeros(2)})


def test_an_oracles_weights_are_by_name_whatever_its_class_says():
    node = {"_target_": "rlstitch.oracles.Weighted", "oracles": [], "weights": [1.0]}
    assert cfg.check_part("oracle", node, kind="oracle") == ["'oracle.weights' must be a group of keys, not [1.0]"]
