"""Every key of every recipe, and every argument of every class of ours that a recipe names, with values that nobody should give: each is accepted by the checks
or refused in one message that names the key; nothing else ever comes out, and no number is ever NaN, infinite, empty or absurdly large."""

import copy
import dataclasses
import inspect
import json
import typing
from pathlib import Path

import pytest

from rlstitch import checks, config, evaluation, protocols, steer
from rlstitch.filling import hints_of
from rlstitch.schema import RunConfig, StageConfig
from rlstitch.shapes.pretrain import run as pretrain
from rlstitch.stitch import compare, surrogate
from rlstitch.stitch import recipe as stitch
from rlstitch.types import UserError
from tests import warm

ROOT = Path(__file__).parents[1]
VALUES = [None, -1, 0, 1e30, float("nan"), float("inf"), "", "x", [], {}, True, 10**400, "${oc.env:HOME}"]
NEVER = [v for v in VALUES if v not in (-1, 0) or v is True]  # no number is one of these
JOBS = {
    "train": (checks.checked, RunConfig, ["draft_stitch", "nft", "marble", "flow_grpo_fast", "dpo_online", "refl", "soar", "dpo"]),
    "stitch": (stitch.checked, stitch.StitchRecipe, ["stitch_aesthetic"]),
    "steer": (steer.checked, steer.SteerConfig, ["fk_stitch", "dps", "svdd", "best_of_n"]),
    "evaluate": (evaluation.checked, evaluation.EvaluateConfig, ["evaluate"]),
    "evaluate_value": (compare.checked, compare.CompareConfig, ["evaluate_value"]),
    "surrogate": (surrogate.checked, surrogate.SurrogateConfig, ["surrogate_detector"]),
}  # fmt: skip


def leaves(schema, prefix=()):
    """(path, hint) of every key that is no group."""
    for key, hint in hints_of(schema).items():
        if dataclasses.is_dataclass(hint):
            yield (*prefix, key), None
            yield from leaves(hint, (*prefix, key))
        else:
            yield (*prefix, key), hint


def parts(given, prefix=()):
    """(path, node) of every part of a recipe."""
    for key, value in given.items() if isinstance(given, dict) else ():
        if isinstance(value, dict):
            if "_target_" in value:
                yield (*prefix, key), value
            yield from parts(value, (*prefix, key))


def put(given, path, value):
    """A copy of a recipe with one key set."""
    if not path:
        return value
    inner = given.get(path[0]) if isinstance(given, dict) else None
    return {**(given if isinstance(given, dict) else {}), path[0]: put(inner, path[1:], value)}


def is_number(hint):
    """Whether a hint is of a number alone."""
    kinds = {typing.get_args(hint)[0]} if typing.get_origin(hint) is typing.Annotated else {hint}
    return kinds <= {int, float}


def ask(check, given, path, hint, value, name):
    """Hand one value to the checks: they accept it, or refuse it by its key. -> what is wrong with that, or nothing."""
    try:
        check(put(given, path, value), name)
    except UserError as error:
        return [] if path[-1] in str(error) else [f"{name}: {'.'.join(path)}={value!r:.60} is refused without its name: {error}"]
    except Exception as error:
        return [f"{name}: {'.'.join(path)}={value!r:.60} ends in {type(error).__name__}: {error}"]
    number = hint is not None and is_number(hint) and any(value is n or (type(value) is type(n) and value == n) for n in NEVER)
    return [f"{name}: {'.'.join(path)}={value!r:.60} is accepted for a number"] * number


@pytest.fixture
def asked_once(monkeypatch):
    """A class that is asked the same again, as it is of every part whose key is not the one that changes, is not asked: tokenizers and weight files are read once."""
    own, kept = protocols.asked, {}

    def asked(kind, cls, name, *arguments, **options):
        key = repr((kind, cls, name, arguments, options))
        if key not in kept:
            try:
                kept[key] = own(kind, cls, name, *arguments, **options), None
            except UserError as error:
                kept[key] = None, error
        found, error = kept[key]
        if error:
            raise error
        return copy.deepcopy(found)

    monkeypatch.setattr(protocols, "asked", asked)


@pytest.mark.parametrize("job", JOBS)
def test_no_value_of_any_key_ends_in_anything_but_its_name(job, tmp_path, monkeypatch, capsys, asked_once):
    monkeypatch.chdir(tmp_path)
    check, schema, recipes = JOBS[job]
    (tmp_path / "few.jsonl").write_text("".join((ROOT / "rlstitch/shapes/weights/held_out.jsonl").read_text().splitlines(True)[:40]))
    wrong, walked = [], set()
    for index, name in enumerate(recipes):
        given = small(config.compose(name))
        check(given, name)  # the recipe itself is sound
        keys = [k for k in leaves(schema)] if index == 0 else []
        keys += [(("stages",), None)] if schema is RunConfig and not index else []
        for path, hint in keys:
            for value in VALUES:
                wrong += ask(check, given, path, hint, value, name)
        for path, node in parts(given):
            if node["_target_"] in walked:
                continue
            walked.add(node["_target_"])
            part = config.load_class(node["_target_"])
            hints = {k: h for k, h in protocols.hints(part).items() if k in inspect.signature(part).parameters and k not in config.INJECTED}
            for key, hint in {"_target_": None, **hints}.items():
                for value in VALUES:
                    wrong += ask(check, given, (*path, key), hint, value, name)
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert not list(tmp_path.glob("[!f]*")) and "Traceback" not in capsys.readouterr().err


def small(given):
    """The same recipe with few prompts and few rewards, which are checked at once."""
    text = json.dumps(given)
    for name in ("train", "held_out"):
        text = text.replace(f"shapes:{name}.jsonl", "few.jsonl")
    given = json.loads(text)
    kept = ["clip", "aesthetic"] if "MARBLE" in text else ["clip"]
    if "weights" in given.get("oracle", {}):
        given["oracle"]["weights"] = dict.fromkeys(kept, 1.0)
    if "clip" in given.get("rewards", {}) and "compare" not in given:
        given["rewards"] = {n: given["rewards"][n] for n in kept}
        for group in (given, given.get("evaluation", {})):
            group |= {key: kept for key in ("judges", "rewards") if isinstance(group.get(key), list)}
    return given


def test_every_key_of_a_stage_is_walked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"prompt": "a red circle"}\n')
    given, wrong = small(config.compose("draft_stitch")), []
    for path, hint in leaves(StageConfig):
        for value in VALUES:
            wrong += ask(
                lambda g, n: checks.checked(config.merge(given, {"stages": [{"updates": 1, **g}]}), n), {}, path, hint, value, "stages"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("launcher", ["train recipe=draft updates=1e30", "steer recipe=fk sampler.num_steps=1000000000"])
def test_a_launcher_ends_with_exit_2_and_the_key(launcher, tmp_path):
    script, *arguments = launcher.split()
    code, output = warm.run(ROOT / "launch" / f"{script}.py", *arguments, cwd=tmp_path)
    key = arguments[1].split("=")[0]
    assert code == 2 and f"'{key}'" in output and "Traceback" not in output, output
    assert not list(tmp_path.iterdir())


def test_pretraining_refuses_by_name_too():
    hints = hints_of(pretrain.PretrainConfig)
    assert not [
        fault for key, hint in hints.items() for value in VALUES for fault in ask(pretrain.checked, {}, (key,), hint, value, "shapes")
    ]
    with pytest.raises(UserError, match="'clp', which there is not .did you mean 'clip'"):
        pretrain.checked({"parts": "vae,clp"}, "pretrain_shapes")
