"""What lies in a run folder between two starts: locks, temporaries, broken files, other inputs, the log; and that nothing of the user's is lost."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlstitch import checkpoint, cli, lock, resume, zero
from rlstitch.checks import checked
from rlstitch.distributed import Engine
from rlstitch.policy import Policy
from rlstitch.resume import resumable
from rlstitch.trainer import Trainer
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
    run = world / "runs" / name
    shutil.copytree(steps, run)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("name: steps", f"name: {name}"))
    return run


def names(run):
    return sorted(f.name for f in (run / "checkpoints").iterdir())


def again(world, name, *overrides):  # noqa: F811
    return train(world, name, "checkpoint.every=1", "checkpoint.keep=3", *overrides)


def config_of(world, name, *overrides):  # noqa: F811
    recipe, given = cli.recipe_and_overrides([f"recipe={world / 'recipe.yaml'}", f"name={name}", *overrides])
    return checked(given, recipe)


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


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_to_a_checkpoint_is_seen(steps, tmp_path, damage):
    name, harm, said = DAMAGE[damage]
    shutil.copytree(steps / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step-000004"
    assert checkpoint.fault(newest) == ""
    harm(newest / name)
    assert said in checkpoint.fault(newest) and str(newest) in checkpoint.fault(newest)
    with pytest.raises(UserError, match=f"{said}.*newest whole checkpoint beside it: resume=.*step-000003"):
        checkpoint.whole(newest)
    assert checkpoint.newest(tmp_path, keep_aside=False).name == "step-000003" and len(names(tmp_path)) == 3


def test_a_broken_checkpoint_is_told_stepped_over_and_kept_aside(world, steps, capsys):  # noqa: F811
    """And made anew, bit for bit what it was."""
    run = copied(world, steps, "broken")
    flip(run / "checkpoints" / "step-000004" / "optimiser.safetensors")
    again(world, "broken")
    out = capsys.readouterr().out
    assert "checkpoint step-000004 is broken: " in out and "optimiser.safetensors is not the file that was saved" in out
    assert "kept as broken-step-000004; going on from step-000003" in out and "resumed from step-000003" in out
    assert names(run) == ["broken-step-000004", "step-000002", "step-000003", "step-000004"]
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
    told.write_text(json.dumps(content))
    assert "is not as it was saved" in checkpoint.fault(told.parent)  # its seal is of what it said
    bare = {k: v for k, v in content.items() if k != "seal"}
    told.write_text(json.dumps(bare))
    assert "is not as it was saved" in checkpoint.fault(told.parent)
    told.write_text(json.dumps(bare | {"seal": checkpoint._seal(bare)}))
    again(world, "pruned", "checkpoint.keep=2")
    assert names(run) == ["step-000002", "step-000004"]


def test_a_full_disk_keeps_the_last_good_checkpoint(backbone, monkeypatch, tmp_path):
    """What is loaded is what was saved, the state of torch's random numbers and of fp16's loss scale with it; written again at a signal it is due all the same."""
    policy = Policy(backbone.transformer, rank=2, alpha=4, targets=backbone.lora_targets, seed=0, ema_decay=0.9)
    engine = Engine(zero_stage=0, precision="fp32", accumulation=1, micro_batch=1, clip_norm=1.0)
    engine.prepare(backbone.transformer, torch.optim.AdamW(policy.parameters(), lr=1e-3), policy.parameters())
    engine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # as under fp16
    checkpoint.save(tmp_path, 1, engine, policy, {"hours": {}}, keep=2)
    folder = checkpoint.save(tmp_path, 1, engine, policy, {"hours": {}}, keep=2, due=False)
    assert checkpoint.told(folder)["due"] is True
    drawn = torch.rand(3)
    engine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    checkpoint.load(folder, engine, policy)
    assert engine.accelerator.scaler.state_dict()["scale"] == 8.0 and torch.equal(torch.rand(3), drawn)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match="No space left.*last good one is step-000001"):
        checkpoint.save(tmp_path, 2, engine, policy, {"hours": {}}, keep=2)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoint.load(folder, engine, policy)["step"] == 1


def test_a_removal_that_is_cut_short_leaves_no_part_of_a_checkpoint(steps, tmp_path, monkeypatch):
    shutil.copytree(steps / "checkpoints", tmp_path / "checkpoints")
    true, left = Path.unlink, [2]

    def killed(path, missing_ok=False):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        true(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 2, 0)
    monkeypatch.undo()
    assert [name for name in names(tmp_path) if name.startswith("step")] == ["step-000003", "step-000004"]
    checkpoint.tidy(tmp_path)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_one_process_trains_in_a_folder(world, steps):  # noqa: F811
    """The second is told who is there before anything is written, reading goes on, and a kill lets go."""

    run = copied(world, steps, "busy")
    code = f"import sys, time; from pathlib import Path; from rlstitch import lock\nwith lock.held(Path({str(run)!r}), lambda take: take()):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert holder.stdout.readline() == "held\n"
    state = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    try:
        config = config_of(world, "busy", "resume=never")
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
    file.write_bytes(good.encode() + b'[1]\n{"loss": 1.0}\n{"step": "2"}\n\xff\n' + good.encode()[:50])
    again(world, "log")
    assert "metrics.jsonl: 5 rows cut or damaged, left out" in capsys.readouterr().out
    assert rows(world, "log") == rows(world, "steps")


CHANGES = {
    "a prompt": ("prompts.txt", lambda f: f.write_text(f.read_text().replace("two", "three")), "data.prompts = .*evaluation.prompts = "),
    "a value model": ("value/value.safetensors", None, "values.clip = "),
    "a reward": ("clip/preprocessor_config.json", lambda f: f.write_text(f.read_text().replace("0.3", "0.4")), "rewards.clip.path = "),
    "the model": ("sd3/transformer/diffusion_pytorch_model.safetensors", flip, "model.path = "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_gone_on_with_on_other_files(world, steps, change, tmp_path):  # noqa: F811
    """Prompts, value models, rewards and the model are part of the maths; a new start or a checkpoint by name goes on all the same."""
    name, harm, said = CHANGES[change]
    file, config = world / name, config_of(world, "steps")
    before = {f: f.read_bytes() for f in (file, file.with_name("value.json")) if f.exists()}
    resumable(config)
    try:
        if harm is None:  # stitched anew: weights and card
            from safetensors.torch import load_file, save_file

            from rlstitch.files import sha256

            save_file({k: v + 1 for k, v in load_file(file).items()}, file)
            card = file.with_name("value.json")
            card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": sha256(file)}))
        else:
            harm(file)
        with pytest.raises(UserError, match=f"{said}.*holds something else.*resume=never.*resume="):
            resumable(config)
        resumable(config_of(world, "steps", "resume=never"))
        resumable(config_of(world, "steps", f"resume={steps / 'checkpoints' / 'step-000004'}"))
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    resumable(config)


def test_a_folder_with_files_of_the_users_is_not_written_over(world):  # noqa: F811
    (folder := world / "runs" / "thesis").mkdir(parents=True)
    (folder / "summary.json").write_text("mine")
    for overrides in ((), ("resume=never",)):
        with pytest.raises(UserError, match="thesis holds summary.json but no run.*name=NAME"):
            resumable(config_of(world, "thesis", *overrides))
    (folder / "summary.json").rename(folder / "draft.json")
    resumable(config_of(world, "thesis"))


def test_another_value_model_or_precision_is_another_recipe(world, steps):  # noqa: F811
    shutil.copytree(world / "value", world / "value2", dirs_exist_ok=True)
    with pytest.raises(UserError, match="values.clip: .*value -> .*value2; distributed.precision: fp32 -> bf16"):
        resumable(config_of(world, "steps", f"values.clip={world / 'value2'}", "distributed.precision=bf16"))
    resumable(config_of(world, "steps", f"values.spare={world / 'value2'}", "distributed.zero_stage=0"))


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


def test_wandb_never_stops_a_run(tmp_path, monkeypatch, capsys):
    """No key, no network, a project that W&B refuses, errors while logging: one line each, offline where that works. One id a folder."""
    import wandb

    from rlstitch.tracker import ID, Tracker

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    settings = {"x_axis": "cpu_hours/total", "config": {}}
    one = Tracker(tmp_path / "a:;,#?%b", mode="online", project="rlstitch", **settings)
    assert one.run is not None and one.run.offline and capsys.readouterr().out.count("\n") == 1
    one.log({"step": 1, "rewards": {"clip": 0.5}})
    one.close()
    kept = (tmp_path / "a:;,#?%b" / ID).read_text()
    two = Tracker(tmp_path / "a:;,#?%b", mode="offline", project="rlstitch", **settings)
    assert two.run.id == kept.strip() and (tmp_path / "a:;,#?%b" / ID).read_text() == kept

    def unreachable(*_, **__):
        raise wandb.errors.CommError("no such host\nat all")

    two.run.finish()
    two.run = type("Failing", (), {"log": unreachable, "finish": unreachable})()
    two.log({"step": 1})
    two.log({"step": 2})
    two.close()
    assert capsys.readouterr().out == "logging to W&B does not work (no such host); the run goes on, with metrics.jsonl as its log\n"
    assert Tracker(tmp_path / "b", mode="offline", project="p/q:#", **settings).run is None
    assert "Invalid project name" in capsys.readouterr().out
    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    nowhere = Tracker(tmp_path / "b", mode="auto", project="rlstitch", **settings)
    assert nowhere.run is None and capsys.readouterr().out.count("\n") == 2
    nowhere.log({"step": 1}), nowhere.close()
    assert Tracker(tmp_path / "off", mode="off", project="rlstitch", **settings).run is None and not (tmp_path / "off").exists()


def test_a_run_that_is_done_says_that_nothing_is_left_to_train():
    source = Path("step-000009")
    assert resume.gone_on(None, 0, 4) == "" and resume.gone_on(source, 9, 12) == "; resumed from step-000009"
    assert "is beyond the 4 updates asked for: nothing is left to train" in resume.gone_on(source, 9, 4)
    assert "which is the last: nothing is left to train" in resume.gone_on(source, 9, 9)
