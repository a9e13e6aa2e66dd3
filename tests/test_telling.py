"""What a run says: help, keys, check=true, progress, tables, and the packaged recipes."""

import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

from rlstitch import cli, telling
from rlstitch import config as cfg
from rlstitch.endings import run_table

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.stem for p in (ROOT / "launch").glob("*.py"))


def launch(script, *arguments, monkeypatch, capsys):
    """A launcher in this process: its exit status and what it printed."""
    spec = util.spec_from_file_location(f"launch_{script}", ROOT / "launch" / f"{script}.py")
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"launch_{script}", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    capsys.readouterr()
    try:
        module.main()
        code = 0
    except SystemExit as left:
        code = left.code
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_launcher_has_a_page_with_its_own_recipes_alone(script, monkeypatch, capsys):
    whose = "train" if script == "cost" else script
    own = {n for n, keys in ((p.stem, cfg.top_keys(p)) for p in cfg.RECIPES.glob("*.yaml")) if next((s for k, s in cfg.LAUNCHERS.items() if k in keys), "") == f"{whose}.py"}  # fmt: skip
    for arguments, status in ((["--help"], 0), (["recipe=draft", "-h"], 0), ([], 2)):
        if script == "evaluate_value" and not arguments:
            continue  # it has a recipe by default
        code, said = launch(script, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == status and "Traceback" not in said and ("key=value" in said or script == "pretrain_shapes")
        listed = {line.split()[0] for line in said.partition("recipes (")[2].splitlines()[1:]}
        assert listed == own
    if own:
        code, said = launch(script, "recipe=drft", monkeypatch=monkeypatch, capsys=capsys)
        names = said.rpartition("there are: ")[2].strip().split(", ")
        assert code == 2 and set(names) == own and f"did you mean '{names[0]}'" in said


def test_the_key_reference_has_every_key_with_its_default_and_those_of_the_parts(monkeypatch, capsys):
    for script, (module, name) in cli.SCHEMAS.items():
        code, said = launch(script.removesuffix(".py"), "keys=true", monkeypatch=monkeypatch, capsys=capsys)
        keys = {line.split()[0] for line in said.splitlines() if line.startswith("  ") and " = " in line}
        schema = getattr(import_module(module), name)()
        assert code == 0 and {k for k, v in vars(schema).items() if not hasattr(v, "__dataclass_fields__") and k != "stages"} <= keys
    code, said = launch("train", "--keys", "recipe=draft", monkeypatch=monkeypatch, capsys=capsys)
    assert "  optimiser.lr = 5e-05" in said and "  algorithm.grad_steps" in said and "  rewards.clip.path (needed)" in said


CHECKS = {
    "train": (["recipe=draft"], "trains on clip x1 + hps x1; stops after 10 of 10 steps"),
    "steer": (["recipe=fk_stitch"], "steers 64 pictures"),
    "stitch": (["recipe=stitch_clip"], "1400 steps of distillation on 96"),
    "evaluate_value": ([], "clip: StitchVM beside tweedie_prompt"),
    "surrogate": (["recipe=surrogate_detector"], "distils reward 'detector'"),
}


@pytest.mark.parametrize("script", CHECKS)
def test_check_tells_what_would_be_done_and_builds_nothing(script, monkeypatch, capsys, tmp_path):
    arguments, expected = CHECKS[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cfg, "build", lambda node, **_: pytest.fail(f"built {node}") if "stops" not in node["_target_"] else BUILD(node))
    code, said = launch(script, *arguments, "check=true", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and expected in said and not list(tmp_path.iterdir()), said
    code, said = launch(script, *arguments, "check=true", "model.path=nowhere", "nme=x", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "did you mean 'name'" in said and "nowhere" in said and "Traceback" not in said


BUILD = cfg.build


def test_progress_in_a_pipe_is_a_line_every_ten_seconds_from_one_rank(monkeypatch, capsys):
    now = iter(range(0, 1000, 4))  # seconds between two looks at the clock
    monkeypatch.setattr(telling.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    bar = telling.progress(10, "draft", "update")
    for _ in range(10):
        bar.set_postfix_str("reward 0.5")
        bar.update()
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "draft: 3 of 10 updates, 12 s, about 28 s left; reward 0.5" and len(lines) == 3
    monkeypatch.setenv("RANK", "1")
    bar = telling.progress(10, "draft", "update")
    bar.update()
    telling.say("twice")
    assert capsys.readouterr().out == "" and telling.duration(90) == "90 s" and telling.duration(7200) == "2.0 h"


def test_a_run_ends_in_a_table_of_six_rows():
    means = {"clip": 0.123456789, "detector": 0.5, "detector/two": 0.1}
    summary = {"steps": 4, "eval": dict.fromkeys(("base", "raw", "ema"), means), "device_hours": {"rollout": 1.0, "eval": 3.0, "stitching": 0.0}}  # fmt: skip
    lines = run_table(summary, "cpu_hours", Path("runs/x/report.html")).splitlines()
    assert len(lines) == 7 and lines[0].split() == ["clip", "detector"] and lines[1].split() == ["base", "0.1235", "0.5"]
    assert (
        "4 cpu-hours for 4 updates" in lines[4] and "75% of the time" in lines[5] and lines[6].split() == ["report", "runs/x/report.html"]
    )


@pytest.mark.slow
def test_a_wheel_has_its_recipes_and_launchers(tmp_path):
    source = tmp_path / "source"
    for name in ("rlstitch", "recipes", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel], check=True)
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "rlstitch.launch.train", "recipe=draft_stitch", "check=true"]
    said = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert said.returncode == 0 and "trains on clip x1 + hps x1" in said.stdout, said.stderr
    assert (tmp_path / "site" / "bin" / "rlstitch-train").is_file() and not list((tmp_path / "elsewhere").iterdir())
