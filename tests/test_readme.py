"""README as people use it: every python snippet runs as printed, in order; every command names a launcher, a recipe and keys that there are."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from rlstitch import checks, evaluation, serving, steer
from rlstitch import config as cfg
from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.cli import recipe_and_overrides
from rlstitch.policy import Policy
from rlstitch.prompts import read_prompts
from rlstitch.stitch import compare, recipe, surrogate
from tests.sets import lay_out

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def test_python_snippets_run_as_printed(tmp_path, monkeypatch):
    (tmp_path / "rlstitch").symlink_to(ROOT / "rlstitch")
    backbone = SD3Backbone("shapes:shapes", max_sequence_length=0)
    policy = Policy(backbone.transformer, rank=2, alpha=4.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9)
    policy.export(tmp_path / "runs" / "draft_stitch" / "lora")
    monkeypatch.chdir(tmp_path)
    from diffusers import StableDiffusion3Pipeline

    made, call = [], StableDiffusion3Pipeline.__call__

    def quick(self, *args, **kwargs):  # as printed, but for the number of steps
        made.append(call(self, *args, **kwargs | {"num_inference_steps": 3}).images)
        return made[-1]

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", quick)
    names = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert [len(images) for images in made] == [1, 2] and made[0][0].size == (64, 64)
    assert names["pipe"].text_encoder.dtype == torch.float32


CHECKED = {
    "train.py": checks.checked,
    "steer.py": steer.checked,
    "evaluate.py": evaluation.checked,
    "stitch.py": recipe.checked,
    "evaluate_value.py": compare.checked,
    "surrogate.py": surrogate.checked,
    "serve_reward.py": serving.checked,
}
COMMANDS = [line.split(" #")[0] for block in blocks("bash") for line in block.splitlines() if "launch/" in line and "--help" not in line]


PICTURES = ("images", "held_out", "pairs", "graded")  # keys under which a command names a set of pictures


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    lay_out(folder)
    (folder / "prompts.txt").write_text("a red circle\n")
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_name_what_there_is(line, sets, monkeypatch):
    script, *arguments = shlex.split(line[line.index("launch/") :])
    assert (ROOT / script).is_file()
    monkeypatch.chdir(sets)
    if ".parquet" in line.split(" #")[0]:
        pytest.importorskip("pyarrow")
    if (check := CHECKED.get(Path(script).name)) is None or any(a.startswith("run=") for a in arguments):
        return
    laid = {"laid": evaluation.laid} if script.endswith("evaluate.py") else {}
    name, given = recipe_and_overrides(arguments, Path(script).stem, **laid)
    config = check(given, name)
    if script.endswith("evaluate.py"):
        assert read_prompts(config.prompts).prompts
    for key in (a.split("=")[0] for a in arguments):  # pictures are read when a job begins: here, too
        where = key.removeprefix("data.").split(".")
        if where[0] in PICTURES:
            node = {"data.images": lambda: config.data.images}.get(key, lambda: getattr(config, where[0]))()
            made = cfg.build(node[where[1]] if len(where) > 1 else node)
            assert len(made[0]) and made[0].dtype == torch.uint8 and made[0].shape[-2:] == (64, 64)
