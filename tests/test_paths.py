"""What people give for a file or a folder: names that nothing can have, things of another kind, folders that cannot be written to. Each is told in one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlstitch import cli, config, files
from rlstitch.paths import below, home, ready, what_is
from rlstitch.resume import as_it_should_be, resumable
from rlstitch.telling import legible, of_machine
from rlstitch.types import UserError

ROOT = Path(__file__).parents[1]
NAMELESS = ["x" * 5000, "x/" * 2500, "a\0b", "~no-such-user/x", "loop", "loop/x"]  # no file can be called that, or looked for there
THINGS = {
    "folder": "a folder",
    "pipe": "a pipe",
    "nowhere": "a link that leads nowhere",
    "/dev/null": "a device",
    "loop": "a link that leads nowhere",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with one thing of each kind, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    Path("nowhere").symlink_to("missing")
    Path("loop").symlink_to("loop")
    Path("empty.yaml").touch()
    yield
    assert sorted(os.listdir(tmp_path)) == ["empty.yaml", "folder", "loop", "nowhere", "pipe"] and not os.listdir("folder")


@pytest.mark.parametrize("name", NAMELESS)
def test_a_name_that_no_file_can_have_is_told_by_every_reader(name):
    readers = [home, files.resolve, lambda n: files.require(n, "the file"), lambda n: below(n, "a")]
    readers += [lambda n: cli.recipe_and_overrides([f"recipe={n}"]), lambda n: cli.run_and_overrides([f"run={n}"])]
    for read in readers:
        with pytest.raises(UserError) as error:
            read(name)
        assert name[:20] in str(error.value).replace("\\x00", "\0") and len(str(error.value)) < 1500


@pytest.mark.parametrize("name", THINGS)
def test_a_thing_of_another_kind_is_called_what_it_is(name):
    assert what_is(name) == THINGS[name] and what_is("empty.yaml") == "a file" and not what_is("missing")
    with pytest.raises(UserError, match=f"{name}' is {THINGS[name]}, not a recipe file"):
        config.find_recipe(name)
    if name != "folder":
        with pytest.raises(UserError, match=f"{THINGS[name]}|not there|links"):
            files.require(name, "the prompt file")
        with pytest.raises(UserError, match=f"{THINGS[name]}|links"):
            below(name, "mine")
    with pytest.raises(UserError, match=f"is {THINGS[name]}"):
        files.read_json(Path(name), "the card")


def test_results_go_to_a_folder_that_takes_them_and_home_is_where_it_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "folder"))
    assert below("~/out", "mine") == tmp_path / "folder" / "out" / "mine" == ready(tmp_path / "folder" / "out" / "mine")
    for check, recipe in (("train", "draft"), ("steer", "best_of_n")):
        module = __import__("rlstitch.checks" if check == "train" else "rlstitch.steer", fromlist=["checked"])
        assert module.checked(config.merge(config.compose(recipe), {"out": "~/out"}), recipe).out == str(tmp_path / "folder" / "out")
    for folder in ("pipe/x", "/dev/null/x", "/proc/x/y"):
        with pytest.raises(UserError, match=f"{folder}.*choose another out"):
            ready(Path(folder))


def test_what_the_machine_will_not_do_is_one_line():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "values/mine/value.safetensors")
    assert of_machine(full).startswith("values/mine/value.safetensors: No space left on device. Free some space")
    assert of_machine(OSError("one\ntwo")).startswith("one. ") and "\n" not in of_machine(OSError("one\ntwo"))
    assert legible("a\x1b[31mé\ud800\u202e\nb") == "a\\x1b[31mé\\ud800\\u202e\nb"
    script = "import sys\nfrom rlstitch import cli\ndef run(arguments): open('pipe/x')\nsys.argv = ['x', 'a=b']\ncli.main(run)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "pipe/x: Not a directory" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "recipe.yaml", "checkpoints", "lora"])
def test_what_is_of_another_kind_in_a_run_folder_is_told_before_it_is_waited_for(name, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    os.mkfifo(run / name)
    asked = config.merge(config.compose("draft"), {"out": str(run.parent), "name": run.name})
    for look in (lambda: as_it_should_be(run), lambda: resumable(config.structure(asked)[0])):
        with pytest.raises(UserError, match=f"{name} is a pipe, not a f.*: move it out"):
            look()
    (run / name).unlink()
    as_it_should_be(run)
