"""How a recipe is read: what lies over what, what YAML's words mean, and what a run says it trains on."""

import pytest
import torch

from rlstitch import config as cfg
from rlstitch import steer
from rlstitch.checks import checked
from rlstitch.describe import goals
from rlstitch.files import write_weights
from rlstitch.stitch import compare
from rlstitch.stitch import recipe as stitch
from rlstitch.types import UserError

DARK = {"_target_": "rlstitch.rewards.simple.Darkness"}
PAIR = {"clip": 1.0, "hps": 1.0}


def over(*arguments, recipe="draft"):
    return cfg.merge(cfg.compose(recipe), cfg.parse_overrides(list(arguments)))


@pytest.mark.parametrize(
    "given, weights",
    [
        (["oracle.weights={clip: 2.0}"], {"clip": 2.0}),
        (["oracle={weights: {clip: 2.0}}"], {"clip": 2.0}),
        (["oracle={_target_: rlstitch.oracles.Tweedie, weights: {clip: 2.0}}"], {"clip": 2.0}),
        (["oracle._target_=rlstitch.oracles.Tweedie"], PAIR),
        (["oracle.weights.hps=.5"], {"clip": 1.0, "hps": 0.5}),
        (["oracle.weights.aesthetic=.5"], PAIR | {"aesthetic": 0.5}),
        (["oracle.weights.hps=null"], {"clip": 1.0}),
        (["oracle.weights={clip: 1.0, hps: null}"], {"clip": 1.0}),
        (["oracle.weights={clip: 1.0}", "oracle.weights.hps=.5"], {"clip": 1.0, "hps": 0.5}),
        (["oracle.weights.hps=.5", "oracle.weights={clip: 1.0}"], {"clip": 1.0}),
        (["oracle.weights={}"], {}),
    ],
)
def test_weights_given_whole_take_the_place_of_others_and_single_ones_join(given, weights):
    assert over(*given)["oracle"]["weights"] == weights


def test_every_mapping_from_names_is_replaced_and_every_group_merges(tmp_path):
    given = over("rewards={dark: {_target_: rlstitch.rewards.simple.Darkness}}", "values={clip: mine}", "optimiser={warmup: 3}")
    assert given["rewards"] == {"dark": DARK} and given["values"] == {"clip": "mine"}
    assert given["optimiser"] == cfg.compose("draft")["optimiser"] | {"warmup": 3}
    joined = over(
        "rewards.dark={_target_: rlstitch.rewards.simple.Darkness}", "rewards.clip.path=mine", "rewards.hps=null", "values.hps=null"
    )
    assert set(joined["rewards"]) == {"clip", "aesthetic", "preference_b", "detector", "dark"} and "hps" not in joined["values"]
    assert joined["rewards"]["clip"] == cfg.compose("draft")["rewards"]["clip"] | {"path": "mine"}
    table = over("compare={clip: {Mine: a}}", recipe="evaluate_value")["compare"]
    assert table == {"clip": {"Mine": "a"}}
    assert over("compare.clip={Mine: a}", recipe="evaluate_value")["compare"]["clip"] == {"Mine": "a"}
    assert over("compare.clip.Mine=a", recipe="evaluate_value")["compare"]["clip"] == {"StitchVM": "shapes:value_clip", "Mine": "a"}
    (tmp_path / "piece.yaml").write_text("rewards.dark: {_target_: rlstitch.rewards.simple.Darkness}\noracle.weights.hps: null\n")
    (tmp_path / "mine.yaml").write_text(f"use: [nft, {tmp_path}/piece.yaml]\noracle.weights.dark: 0.5\n")
    mine = cfg.compose(str(tmp_path / "mine.yaml"))
    assert mine["oracle"]["weights"] == {"clip": 1.0, "dark": 0.5} and mine["rewards"] == cfg.compose("nft")["rewards"] | {"dark": DARK}
    (tmp_path / "mine.yaml").write_text("use: [nft]\noracle: {_target_: rlstitch.oracles.Terminal, weights: {jpeg: 1.0}}\n")
    assert cfg.compose(str(tmp_path / "mine.yaml"))["oracle"]["weights"] == {"jpeg": 1.0}


TRAINED = {  # what every shipped training recipe trains on
    **dict.fromkeys(["draft", "draft_stitch", "draft_stitch_flux", "align_prop", "refl", "nft", "nft_stitch", "nft_released", "nft_released_stitch", "dpo_online", "dpo_online_stitch"], "clip x1 + hps x1"),
    **dict.fromkeys(["flow_grpo", "flow_grpo_fast", "flow_grpo_fast_stitch"], "clip x1 + hps x1"),
    **dict.fromkeys(["marble", "marble_stitch"], "clip x1 + hps x1 + aesthetic x1"),
    **dict.fromkeys(["soar", "sft", "dpo"], "3000 pictures"),
    "pdtr": "clip x1 | hps x1",
}  # fmt: skip
STOPS = {
    "draft": "trains on clip x1 + hps x1; stops after 10 of 10 steps, sigma 0",
    "draft_stitch": "trains on clip x1 + hps x1; stops after 6..9 of 10 steps, sigma .67 to .25",
    "soar": "learns from 3000 pictures",
}


def test_what_shipped_recipes_train_on():
    names = [p.stem for p in cfg.RECIPES.glob("*.yaml") if "sd35" not in p.stem]
    told = {n: goals(checked(given, n)) for n in names if "algorithm" in (given := cfg.compose(n))}
    what = lambda line: line.split("trains on ")[-1].split("learns from ")[-1].split(";")[0]  # noqa: E731
    assert {n: " | ".join(map(what, lines)) for n, lines in told.items()} == TRAINED
    assert {n: told[n] for n in STOPS} == {n: [line] for n, line in STOPS.items()}
    assert told["pdtr"][1] == "stage hps, 60 updates: " + STOPS["draft_stitch"].replace("clip x1 + ", "")
    others = {"draft_sd35": {"dfn": 1.0, "hps": 1.0}, "draft_stitch_sd35": {"dfn": 1.0, "hps": 1.0}}
    steered = ("dps", "dps_stitch", "fk", "fk_stitch", "svdd", "svdd_stitch", "best_of_n")
    assert {n: cfg.compose(n)["oracle"]["weights"] for n in (*others, *steered)} == others | dict.fromkeys(steered, PAIR)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("5e5", 5e5),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("off", "off"),
        ("No", "No"),
        ("true", True),
        ("~", None),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("", ""),
    ],
)
def test_words_and_numbers_are_those_of_yaml_1_2(text, value):
    (read,) = cfg.parse_overrides([f"key={text}"]).values()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        ("1: x", "a key must be text, not 1"),
        ("[a]: 1", "a key must be text"),
        ("a:\n\tb: 1", "line 2: .*indent with spaces"),
        ("a: !!python/object/apply:os.system [true]", "no tags"),
        ("a: !!set {b, c}", "no tags"),
        ("[" * 5000, "deep"),
        ("[" * 60 + "]" * 60, "deep"),
        ("a: &a [*a]", "deep"),
        ("\n".join(["a: &a0 [x, x]", *(f"b{k}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]" for k in range(9))]), "more than 100000 values"),
        ("a: 'open", "line 1"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x07", "special characters"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("- a", "must hold keys and values, not list"),
        ("seed..x: 1", "cannot read the key 'seed..x'"),
        ("use: draft", "must list recipes"),
    ],
)
def test_a_recipe_that_is_no_yaml_says_where(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=f"(?s)r.yaml.*{said}|{said}.*r.yaml"):
        cfg.compose(str(tmp_path / "r.yaml"))


def test_files_that_are_no_text_and_overrides_that_are_none(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"a: \xff")
    (tmp_path / "big.yaml").write_bytes(b"# " + b"x" * (2 << 20))
    for name, said in (("r.yaml", "not UTF-8"), ("big.yaml", "is no recipe")):
        with pytest.raises(UserError, match=said):
            cfg.compose(str(tmp_path / name))
    for argument in ("seed", "--seed=3", "=3", "seed=[1", ".=1", "a..b=1", "seed={1: 2}"):
        with pytest.raises(UserError, match="cannot read"):
            cfg.parse_overrides([argument])


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "/abs", "a//b", "a/../b", "a/", "a\nb", "x" * 300, "a.", " a", "~/a", "a\\b", "taken", "taken/a", "link/a"]
)
def test_a_name_is_a_folder_below_out(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "taken").write_text("mine")
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    for recipe, check in (("draft", checked), ("fk", steer.checked), ("stitch_clip", stitch.checked), ("evaluate_value", compare.checked)):
        given = cfg.merge(cfg.compose(recipe), {"name": name, "out": str(tmp_path / "out")})
        with pytest.raises(UserError, match="'name'"):
            check(given, recipe)
    assert sorted(p.name for p in tmp_path.rglob("*") if "link" not in p.parts) == ["out", "taken"]
    assert checked(over("name=tries/first 1", f"out={tmp_path}"), "draft").name == "tries/first 1"


def test_a_recipe_s_own_keys_stand_for_values_and_nothing_of_the_environment_does(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    config, faults = cfg.structure({"seed": 3, "name": "s${seed}", "updates": "${evaluation.batch_size}", "evaluation": {"batch_size": 7}})
    assert not faults and config.name == "s3" and config.updates == 7
    for value in (
        "${oc.env:SECRET}",
        "a${oc.env:SECRET}",
        "${${oc.env:SECRET}}",
        "${oc.decode:1}",
        "${name}",
        "${none}",
        "${evaluation}",
        "${",
        "${a b}",
    ):
        _, (fault,) = cfg.structure({"name": value})
        assert "'name'" in fault and "hidden" not in fault
    _, (fault,) = cfg.structure({"model": {"path": ["${oc.env:SECRET}"]}})
    assert "'model.path.0'" in fault
    doubled = {f"k{n}": {"a": f"${{k{n + 1}.a}}${{k{n + 1}.a}}"} for n in range(40)} | {"k40": {"a": "x"}}
    assert cfg.structure({"model": doubled})[1]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    before = (tmp_path / "w.safetensors").read_bytes()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="1 of 2 tensors hold NaN or Inf, e.g. b"):
            write_weights(tmp_path / "w.safetensors", {"a": torch.ones(2), "b": torch.tensor([1.0, bad])})
    assert (tmp_path / "w.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
