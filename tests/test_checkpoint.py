"""What lies in a run folder between two starts: locks, temporaries, broken files, other inputs, the log; and that nothing of the user's is lost."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlstitch import checkpoint, lock, zero
from rlstitch.types import UserError
from tests.test_jobs import same, train
from tests.test_train import ROOT, rows, world  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def steps(world):  # noqa: F811
    """An uninterrupted run of 4 updates with a checkpoint after each."""
    train(world, "steps", "checkpoint.every=1", "checkpoint.keep=3")
    return world / "runs" / "steps"


def copied(world, steps, name):  # noqa: F811
    """The run as it was after update 4, under another name, without the files of its end."""
    import shutil

    run = world / "runs" / name
    shutil.copytree(steps, run)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("name: steps", f"name: {name}"))
    return run


def names(run):
    return sorted(f.name for f in (run / "checkpoints").iterdir())


def again(world, name, *overrides):  # noqa: F811
    return train(world, name, "checkpoint.every=1", "checkpoint.keep=3", *overrides)


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def number_told(file: Path):
    """A digit of complete.json changed, which is JSON still."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"policy_updates": content["policy_updates"] + 1}))


DAMAGE = {
    "flipped": ("policy.safetensors", flip, "is not the file that was saved"),
    "cut": ("optimiser.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-9]), "is not the file that was saved"),
    "missing": ("rng-0.safetensors", Path.unlink, "is missing"),
    "no JSON": ("complete.json", lambda f: f.write_text(f.read_text()[:40]), "is not JSON"),
    "not UTF-8": ("complete.json", lambda f: f.write_bytes(b"\xff\xfe{"), "is not UTF-8"),
    "another number": ("complete.json", number_told, "is not as it was saved"),
    "another shape": ("complete.json", lambda f: f.write_text("[]"), "holds list, not an object"),
    "no complete.json": ("complete.json", Path.unlink, "it has no complete.json"),
}


def test_a_broken_checkpoint_is_told_stepped_over_and_kept_aside(world, steps, capsys):  # noqa: F811
    """Every damage in turn, to the newest checkpoint of one run, which makes it anew: bit for bit what it was."""
    run = copied(world, steps, "broken")
    for place, (name, harm, said) in enumerate(DAMAGE.values(), 1):
        harm(run / "checkpoints" / "step-000004" / name)
        with pytest.raises(UserError, match=f"{said}.*newest whole checkpoint beside it: resume=.*step-000003"):
            again(world, "broken", f"resume={run / 'checkpoints' / 'step-000004'}")
        again(world, "broken")
        out = capsys.readouterr().out
        assert f"checkpoint step-000004 is broken: {run / 'checkpoints' / 'step-000004' / name}"[:-15] in out and said in out, out
        assert "going on from step-000003" in out and "resumed from step-000003" in out
        assert names(run)[-3:] == ["step-000002", "step-000003", "step-000004"] and len(names(run)) == 3 + place
        same(world, "broken", "steps", 4)


def test_a_run_without_a_whole_checkpoint_ends_and_loses_nothing(world, steps):  # noqa: F811
    run = copied(world, steps, "lost")
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "policy.safetensors")
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != lock.LOCK}
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint of .*lost is whole: .*step-000004.*resume=never"):
            again(world, "lost")
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != lock.LOCK} == before


def test_nothing_is_removed_that_was_not_written_here(world, steps):  # noqa: F811
    """Folders and files of the user's beside and within the checkpoints stay, through a resume and through a new start; what a killed process was writing goes."""
    run = copied(world, steps, "mine")
    folder = run / "checkpoints"
    mine = [
        folder / "step-backup" / "complete.json",
        folder / "step-000009" / "notes.txt",
        folder / "step-000003" / "notes.txt",
        folder / ".writing-mine" / "x",
        folder / "step-000004.tmp" / "complete.json",
        run / "notes.txt",
    ]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    (left := folder / ".writing-0123456789abcdef").mkdir()
    (left / "policy.safetensors.77.tmp").write_bytes(b"half")
    assert [f.name for f in checkpoint.folders(run)] == ["step-000002", "step-000003", "step-000004"]
    again(world, "mine", "updates=5")
    assert not left.exists() and all(f.read_text() == "{}" for f in mine)
    again(world, "mine", "resume=never")
    same(world, "mine", "steps", 4)
    mine[2] = folder / "broken-step-000003" / "notes.txt"  # its place was needed
    assert all(f.read_text() == "{}" for f in mine)


def test_checkpoints_of_a_resumed_run_are_those_of_the_uninterrupted_one(world, steps):  # noqa: F811
    """Killed between a rename and the removal of the oldest, after the last update; and one that was written at a signal, which no recipe asked for."""
    run = copied(world, steps, "pruned")
    assert names(run) == ["step-000002", "step-000003", "step-000004"]
    train(world, "early", "updates=1")
    (world / "runs" / "early" / "checkpoints" / "step-000001").rename(run / "checkpoints" / "step-000001")
    again(world, "pruned")
    assert names(run) == names(steps)
    told = run / "checkpoints" / "step-000003" / "complete.json"
    content = json.loads(told.read_text()) | {"due": False}
    told.write_text(json.dumps({k: v for k, v in content.items() if k != "seal"}))
    again(world, "pruned", "checkpoint.keep=2")
    assert names(run) == ["step-000002", "step-000004"]


def test_one_process_trains_in_a_folder(world, steps):  # noqa: F811
    """The second is told who is there before anything is written, reading goes on, and a kill lets go."""
    from rlstitch.checks import checked, resumable
    from rlstitch.trainer import Trainer

    run = copied(world, steps, "busy")
    code = f"import sys, time; from pathlib import Path; from rlstitch import lock\nwith lock.held(Path({str(run)!r}), lambda take: take()):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert holder.stdout.readline() == "held\n"
    state = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    try:
        from rlstitch import cli

        name, given = cli.recipe_and_overrides([f"recipe={world / 'recipe.yaml'}", "name=busy", "resume=never"])
        config = checked(given, name)
        for refused in (lambda: resumable(config), Trainer(config).train):
            with pytest.raises(UserError, match=f"busy is in use: process {holder.pid} on .* trains there since 2"):
                refused()
        assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == state
        assert set(Trainer(config).evaluate_checkpoint(run)) == {"base", "raw", "ema"}
    finally:
        holder.kill()
        holder.wait()
    resumable(config)
    again(world, "busy")


def test_a_damaged_log_is_repaired_with_a_line(world, steps, capsys):  # noqa: F811
    run = copied(world, steps, "log")
    file = run / "metrics.jsonl"
    good = file.read_text()
    file.write_bytes(good.encode() + b'[1]\n{"loss": 1.0}\n{"step": "2"}\n\xff\n' + good.encode()[: len(good) // 3][:-20])
    again(world, "log")
    assert "metrics.jsonl: 5 rows cut or damaged, left out" in capsys.readouterr().out
    assert rows(world, "log") == rows(world, "steps")


def test_files_have_the_mode_of_the_umask(world, steps):  # noqa: F811
    files = [f for f in steps.rglob("*") if f.is_file() and f.name != lock.LOCK]
    umask = os.umask(0o022)
    os.umask(umask)
    assert files and {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o666 & ~umask}


class Parted:
    """What zero.py reads of DeepSpeed's optimisers: flat float32 parts and the optimiser within."""

    def __init__(self, stage, sizes, seed):
        torch.manual_seed(seed)
        self.parts = [torch.randn(n) for n in sizes]
        setattr(self, "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups", self.parts)
        self.optimizer = torch.optim.AdamW(self.parts, lr=0.1)

    def step(self, k):
        for part in self.parts:
            part.grad = torch.full_like(part, 1.0 + k).cumsum(0)
        self.optimizer.step()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_state_goes_on_bit_for_bit_and_only_where_it_fits(stage):
    one, two = Parted(stage, [5, 3], 0), Parted(stage, [5, 3], 1)
    for k in range(3):
        one.step(k)
    two.step(7)
    saved = {k: v.clone() for k, v in zero.state(one, stage).items()}
    assert set(saved) == {f"{k}.{name}" for k in (0, 1) for name in ("weights", "step", "exp_avg", "exp_avg_sq")}
    zero.load_state(two, stage, saved)
    one.step(3), two.step(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parts, two.parts))
    with pytest.raises(UserError, match="'0.weights': \\[5\\]"):
        zero.load_state(Parted(stage, [4, 4], 0), stage, saved)
