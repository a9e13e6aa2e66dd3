"""The main job on a tiny world, as users start it: processes, files, kill and resume, ranks, ZeRO, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.metrics import PHASES
from rlstitch.rewards.clip import ClipReward
from tests import warm
from tests.conftest import write_clip, write_sd3
from tests.test_stitch import stitched

ROOT = Path(__file__).parents[1]
VOLATILE = ("cpu_hours", "gpu_hours")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, reward, value model, prompts and recipe."""
    folder = tmp_path_factory.mktemp("world")
    write_sd3(folder / "sd3")
    write_clip(folder / "clip")
    backbone, reward = SD3Backbone(str(folder / "sd3"), max_sequence_length=0), ClipReward(str(folder / "clip"))
    stitched(backbone, reward, sigma_range=(0.05, 0.98))[0].save_pretrained(folder / "value")
    (folder / "prompts.txt").write_text(
        "\n".join(f"{n} {c} {s}" for n in ("a", "two") for c in ("red", "blue") for s in ("circle", "star"))
    )
    (folder / "recipe.yaml").write_text(
        f"""
name: tiny
out: {folder / "runs"}
updates: 4
threads: 1
model: {{_target_: rlstitch.backbones.sd3.SD3Backbone, path: {folder / "sd3"}, max_sequence_length: 0}}
rewards:
  clip: {{_target_: rlstitch.rewards.clip.ClipReward, path: {folder / "clip"}}}
values: {{clip: {folder / "value"}}}
algorithm: {{_target_: rlstitch.algorithms.draft.Draft, grad_steps: 2, regulariser: 0.01}}
oracle: {{_target_: rlstitch.oracles.Stitched, weights: {{clip: 1.0}}}}
stop: {{_target_: rlstitch.stops.UniformWindow, low: 2, high: 3}}
sampler: {{num_steps: 4}}
data: {{prompts: {folder / "prompts.txt"}}}
batch: {{prompts_per_update: 4, images_per_prompt: 1, micro_batch: 2}}
lora: {{rank: 2, alpha: 4}}
optimiser: {{lr: 0.01}}
evaluation: {{prompts: {folder / "prompts.txt"}, num_steps: 3, max_prompts: 5, batch_size: 2, rewards: [clip], grid: 16}}
logging: {{wandb: "off", progress: false}}
checkpoint: {{every: 2}}
"""
    )
    return folder


def start(world, *overrides, ranks=1, recipe="recipe.yaml"):
    """A job in processes of its own; -> (status, what it printed)."""
    return warm.run(ROOT / "launch" / "train.py", f"recipe={world / recipe}", *overrides, ranks=ranks, cwd=world)


def truly(world, *overrides, ranks=1, wait=True):
    """The same as users start it, with Python and torchrun; `wait`: else -> the process."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "launch" / "train.py"), f"recipe={world / 'recipe.yaml'}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=world)
    return (process.communicate(timeout=300)[0], process.returncode)[::-1] if wait else process


def rows(world, name):
    lines = [json.loads(line) for line in (world / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]


def weights(world, name, step=4):
    return load_file(world / "runs" / name / "checkpoints" / f"step-{step:06d}" / "policy.safetensors")


@pytest.fixture(scope="module")
def reference(world):
    """The uninterrupted run on one rank."""
    code, output = truly(world, "name=reference")
    assert code == 0 and output.startswith("trains on clip x1; stops after 2..3 of 4 steps, sigma .75 to .50\n"), output
    return "reference"


def test_a_run_leaves_everything_that_it_promises(world, reference):
    run = world / "runs" / reference
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["samples"] == 16 and summary["seed"] == 0 and summary["peak_memory_mb"] > 0
    assert set(summary["device_hours"]) == {*PHASES, "stitching"}
    assert set(summary["eval"]) == {"base", "raw", "ema"} and all("clip" in means for means in summary["eval"].values())
    assert (run / "recipe.yaml").exists() and (run / "samples" / "ema.png").exists()
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "http" not in page.replace("http://www.w3.org", "")
    steps = [r["step"] for r in rows(world, reference)]
    assert steps == [1, 2, 3, 4]
    assert all(r["grad_norm"] > 0 and r["stop"] in (2, 3) and set(r["rewards"]) == {"clip"} for r in rows(world, reference))
    assert sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file()) < 2_000_000


def test_lora_of_a_run_loads_in_stock_diffusers_with_the_same_picture(world, reference):
    from rlstitch.policy import EMA, Policy
    from rlstitch.types import noise_like

    backbone = SD3Backbone(str(world / "sd3"), max_sequence_length=0)
    text = backbone.encode_prompts(["a red star"])
    policy = Policy(backbone.transformer, rank=2, alpha=4, targets=backbone.lora_targets, seed=0, ema_decay=0.9)
    policy.load_state_dict(weights(world, reference))
    pipeline = StableDiffusion3Pipeline.from_pretrained(world / "sd3", text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(world / "runs" / reference / "lora")
    pipeline.set_progress_bar_config(disable=True)
    z = noise_like(backbone.latent_shape, torch.tensor([7]))
    from rlstitch import sampling, schedule

    with torch.no_grad(), policy.use(EMA):
        ours = backbone.decode(sampling.sample(backbone.bind(text), z, schedule.sigmas(3, 3.0)).z)
    stock = pipeline(
        "a red star", num_inference_steps=3, guidance_scale=1.0, latents=z, height=16, width=16, max_sequence_length=0, output_type="pt"
    ).images
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluating_a_run_again_gives_the_same_figures_on_any_number_of_ranks(world, reference, ranks):
    """All three sets of weights on one rank, and on two only those that are asked for."""
    run = world / "runs" / reference
    wanted = ["base", "raw", "ema"] if ranks == 1 else ["ema"]
    told = (f"run={run}", f"evaluation.final=[{', '.join(wanted)}]")
    code, output = warm.run(ROOT / "launch" / "evaluate.py", *told, ranks=ranks, cwd=world)
    assert code == 0, output
    again, first = json.loads((run / "evaluation.json").read_text()), json.loads((run / "summary.json").read_text())["eval"]
    assert list(again) == wanted
    for which, means in again.items():
        assert means["clip"] == pytest.approx(first[which]["clip"], abs=1e-6)


def test_kill_and_resume_is_bit_for_bit(world, reference):
    """4 updates equal 2 + kill -9 + resume + 2, in metrics and weights. (Two ranks, other methods and other moments: test_kills.)"""
    process = truly(world, "name=killed", "updates=400", wait=False)
    deadline = time.time() + 200
    while not (world / "runs" / "killed" / "checkpoints" / "step-000002" / "complete.json").exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = sorted((world / "runs" / "killed" / "checkpoints").glob("step-*/complete.json"))
    for later in kept[1:] if len(kept) > 1 and kept[0].parent.name == "step-000002" else []:
        later.unlink()  # it may have got further before the signal arrived
    if kept[0].parent.name != "step-000002":
        pytest.skip("the process outran the signal")
    code, output = truly(world, "name=killed")
    assert code == 0 and "resumed from step-000002" in output, output
    assert rows(world, "killed") == rows(world, reference)
    a, b = weights(world, "killed"), weights(world, reference)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sigterm_checkpoints_and_exits_143(world):
    process = truly(world, "name=term", "updates=4000", "checkpoint.every=1000000", wait=False)
    metrics = world / "runs" / "term" / "metrics.jsonl"
    deadline = time.time() + 200
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "a checkpoint was written" in output and "Traceback" not in output
    assert len(list((world / "runs" / "term" / "checkpoints").glob("*/complete.json"))) == 1


@pytest.mark.parametrize("overrides,ranks", [(("batch.micro_batch=4",), 1), ((), 2)])
def test_ranks_and_accumulation_do_not_change_the_maths(world, reference, overrides, ranks):
    name = f"geometry{ranks}{len(''.join(overrides))}"
    code, output = truly(world, f"name={name}", *overrides, ranks=ranks)
    assert code == 0, output
    for ours, theirs in zip(rows(world, name), rows(world, reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4) and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    a, b = (json.loads((world / "runs" / n / "summary.json").read_text())["eval"]["raw"]["clip"] for n in (name, reference))
    assert a == pytest.approx(b, abs=1e-4)


BAD = {
    "misspelt key": (["optimizer.lr=1"], "unknown key 'optimizer' (did you mean 'optimiser'?)"),
    "wrong type": (["updates=many"], "'updates'"),
    "unknown part": (["oracle._target_=rlstitch.oracles.Stitchd"], "did you mean 'Stitched'?"),
    "missing weights": (["rewards.clip.path=/no/where"], "/no/where"),
    "stop beyond the grid": (["stop.high=9"], "the grid has 4"),
    "stop outside the value's range": (["stop.low=1", "stop.high=4", "algorithm.grad_steps=1"], "answers only for sigma in [0.05, 0.98]"),
    "terminal reward before the end": (["oracle._target_=rlstitch.oracles.Terminal"], "use rlstitch.stops.End"),
    "oracle without gradient": (["oracle._target_=rlstitch.oracles.MonteCarlo"], "needs gradients"),
    "too many gradient steps": (["algorithm.grad_steps=3"], "earliest stop"),
    "unknown weights to evaluate": (
        ["evaluation.final=[ema, best]"],
        "'evaluation.final' has the entry 2, which must be one of base, raw, ema, not 'best'",
    ),
    "seed out of range": (["seed=-1"], "'seed' must not be negative, not -1"),
    "fp16 under ZeRO": (["distributed.precision=fp16", "distributed.zero_stage=2"], "no loss scaling under ZeRO"),
    "ReFL at the end": (
        ["oracle._target_=rlstitch.oracles.Tweedie", "algorithm.grad_steps=0", "algorithm.regulariser=0", "stop.low=2", "stop.high=4"],
        "nothing left to guess",
    ),
    "a guard that sees nothing": (
        ["rewards.dark={_target_: rlstitch.rewards.simple.Darkness}", "evaluation.rewards=[dark]", "evaluation.every=2"],
        "none of it (clip)",
    ),
    "a judge that cannot read these prompts": (
        ["rewards.seen={_target_: rlstitch.shapes.reward.DetectorReward}", "evaluation.rewards=[clip, seen]"],
        "'evaluation.rewards' names 'seen', which needs prompts that say what is to be seen",
    ),
    "a reward that is a word": (["rewards.clip=my.Reward"], "must be a group of keys with a '_target_'"),
    "a class out of reach": (["rewards.mine={_target_: nowhere.Mine}"], "on PYTHONPATH"),
    "not an override": (["--lr", "3"], "key=value"),
}


def refusal(recipe, *overrides):
    """The message that a recipe is refused with, in one process: what the launcher prints before anything loads."""
    from rlstitch import cli
    from rlstitch.checks import checked
    from rlstitch.types import UserError

    with pytest.raises(UserError) as caught:
        name, given = cli.recipe_and_overrides([f"recipe={recipe}", *overrides])
        checked(given, name)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_get_one_clear_message(world, case, capsys):
    overrides, expected = BAD[case]
    assert expected in refusal(world / "recipe.yaml", *overrides)


def test_all_faults_come_at_once_with_exit_2_and_nothing_written(world):
    code, output = start(world, "name=bad", "optimizer.lr=1", "updates=-3", "lora.rnk=2", "evaluation.rewards=[clop]")
    assert code == 2 and "Traceback" not in output
    for part in ("4 faults", "optimiser", "'updates' must be positive, not -3", "did you mean 'rank'", "did you mean 'clip'"):
        assert part in output, output
    assert not (world / "runs" / "bad").exists()


def test_a_model_that_is_one_file_is_told_how_to_become_a_folder(world, tmp_path):
    (tmp_path / "sd35.safetensors").write_bytes(b"")
    for path in (tmp_path / "sd35.safetensors", tmp_path):
        said = refusal(world / "recipe.yaml", f"model.path={path}")
        assert "no transformer/config.json and no vae/config.json" in said and "from_single_file" in said and said.count("model.path") == 1


def test_a_reward_may_say_only_when_built_that_it_has_no_gradient(world):
    from rlstitch.part_checks import without_gradient

    rewards = {"clip": "rlstitch.rewards.clip.ClipReward", "seen": "rlstitch.shapes.reward.DetectorReward", "late": "tests.test_train.Late"}
    assert without_gradient(["late", "seen", "other", "clip"], {n: {"_target_": target} for n, target in rewards.items()}) == ["seen"]
    said = refusal(world / "recipe.yaml", "rewards.late={_target_: tests.test_train.Late, path: a word}", "updates=0")
    assert "'updates'" in said and "late" not in said  # its `path` is its own affair


class Late:
    """Known to be differentiable or not only once it is built."""

    def __init__(self, path: str):
        self.differentiable = path == "a word"

    def score(self, images, batch):
        return images.mean((1, 2, 3))


def test_a_run_of_another_recipe_is_not_gone_on_with(world, reference):
    run = world / "runs" / reference
    before = {f: (run / f).read_bytes() for f in ("recipe.yaml", "summary.json", "metrics.jsonl")}
    code, output = start(world, f"name={reference}", "optimiser.lr=0.02", "seed=1")
    assert code == 2 and "seed: 0 -> 1; optimiser.lr: 0.01 -> 0.02" in output and "name=NAME" in output and "Traceback" not in output, (
        output
    )
    assert all((run / f).read_bytes() == content for f, content in before.items())


def test_check_prints_and_leaves_nothing(world):
    code, output = start(world, "name=dry", "check=true", "batch.prompts_per_update=20")
    assert code == 0 and "10 micro-batches of 2" in output and "memory" in output and "prompts_per_update: 20" in output
    assert "20 samples an update (2.5 times through the 8 that there are)" in output
    assert not (world / "runs" / "dry").exists()


def test_long_prompts_are_named_and_cut_only_on_request(world):
    (world / "long.txt").write_text("a red star\n" + "a " * 40 + "circle\n")
    for key in ("data", "evaluation"):
        said = refusal(world / "recipe.yaml", f"{key}.prompts={world / 'long.txt'}")
        assert (
            f"'{key}.prompts': 1 of 2 prompts are longer than the 24 tokens" in said
            and "set data.truncate=true" in said
            and "1 fault" in said
        )
    code, output = start(world, "name=long", f"data.prompts={world / 'long.txt'}", "updates=1", "data.truncate=true")
    assert code == 0 and "(2 times through the 2 that there are)" in output, output
    assert output.count("reward 'clip' reads the first 24 tokens of a prompt: 1 of 9 are longer") == 1


class Cliff:
    """A reward whose score is a number and whose gradient is none."""

    differentiable = True

    def score(self, images, batch):
        return (0 * images.mean((1, 2, 3))).sqrt()


def test_nan_is_skipped_then_given_up_with_weights_untouched(world):
    cliff = ("rewards.cliff={_target_: tests.test_train.Cliff}", "oracle={_target_: rlstitch.oracles.Terminal, weights: {cliff: 1.0}}")
    code, output = start(world, "name=nan", *cliff, "stop={_target_: rlstitch.stops.End}", "max_bad_steps=3")
    assert code == 2 and "3 updates in a row" in output and "last good checkpoint: " in output and "Traceback" not in output, output
    assert [r["skipped"] for r in rows(world, "nan")] == [True, True]


REFRESH = ("refresh.fraction=1", "refresh.agreement=1", "refresh.pairs=6", "refresh.steps=2", "refresh.buffer=1", "refresh.batch_size=2")


def test_refreshed_value_models_resume_bit_for_bit(world):
    code, output = start(world, "name=refreshed", *REFRESH)
    assert code == 0, output
    code, output = start(world, "name=halves", "updates=2", *REFRESH)
    assert code == 0, output
    code, output = start(world, "name=halves", *REFRESH)
    assert code == 0 and "resumed from step-000002" in output, output
    whole, halves = rows(world, "refreshed"), rows(world, "halves")
    assert whole == halves and [row["drift"]["refreshed"] for row in whole] == [
        0,
        1,
        0,
        1,
    ]  # 4 pairs an update, over two updates 6 are known
    assert all(row["drift"]["gap/clip"] > 0 and row["drift"]["correlation/clip"] < 1 for row in whole)
    for name, file in (("refreshed", "values.safetensors"), ("refreshed", "policy.safetensors")):
        pair = [load_file(world / "runs" / n / "checkpoints" / "step-000004" / file) for n in (name, "halves")]
        assert all(torch.equal(pair[0][k], pair[1][k]) for k in pair[0])


def test_refresh_needs_a_value_model(world):
    code, output = start(
        world, "name=none", "refresh.fraction=0.5", "refresh.steps=0", "oracle._target_=rlstitch.oracles.Terminal", "stop._target_=rlstitch.stops.End"
    )  # fmt: skip
    assert code == 2 and "'refresh.steps' must be positive" in output and "this oracle has none" in output
