"""Kills at any moment: a run that is killed and started again ends as the uninterrupted one, bit for bit, under every method, on one rank and on two under ZeRO.

Runs are forked from a process that has imported everything, so that one takes seconds; they are killed from outside, or by themselves at a place that is aimed at.
"""

import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from rlstitch import config as cfg
from tests.test_train import REFRESH, ROOT, VOLATILE, world  # noqa: F401  (a fixture)

STITCHED = "oracle={_target_: rlstitch.oracles.Stitched, weights: {clip: 1.0, hps: 1.0}}"
TERMINAL = ("oracle={_target_: rlstitch.oracles.Terminal, weights: {clip: 1.0, hps: 1.0}}", "stop={_target_: rlstitch.stops.End}")
GROUPS = "batch={prompts_per_update: 4, images_per_prompt: 2, micro_batch: 4}"
ALONE = "{{name: {0}, updates: 2, oracle: {{_target_: rlstitch.oracles.Stitched, weights: {{{0}: 1.0}}}}}}"
STAGES = f"stages=[{ALONE.format('clip')}, {ALONE.format('hps')}]"
METHODS = {  # the shipped recipe whose algorithm it is, its keys that four steps change, and the rest of the recipe
    "draft_stitch": ({}, (STITCHED, *REFRESH)),
    "nft_stitch": ({}, (STITCHED, GROUPS)),
    "flow_grpo_fast": ({"window": 2, "window_range": 3}, (*TERMINAL, GROUPS)),
    "marble_stitch": ({"every": 2}, (STITCHED, GROUPS)),
    "dpo_online": ({}, (*TERMINAL, GROUPS)),
    "pdtr": ({}, (STITCHED, STAGES)),
}
RANKS = {"one": (1, ()), "two": (2, ("distributed.zero_stage=2",))}
AIMED = {  # killed before call n of a function; of a checkpoint of four, the third is aimed at where it is named by call
    "a tensor file": ("rlstitch.checkpoint.write_tensors", 8),
    "a tensor file's rename": ("rlstitch.files.os.replace", 14),
    "complete.json": ("rlstitch.checkpoint.write_json", 3),
    "the rename": ("rlstitch.checkpoint.Path.rename", 3),
    "pruning": ("rlstitch.checkpoint.prune", 4),
    "half pruned": ("rlstitch.checkpoint.Path.rmdir", 1),
    "final evaluation": ("rlstitch.trainer.evaluate", 5),
    "export": ("rlstitch.policy.StableDiffusion3Pipeline.save_lora_weights", 1),
    "summary": ("rlstitch.trainer.write_json", 1),
    "report": ("rlstitch.report.write_text", 1),
    "last checkpoint": ("rlstitch.checkpoint.Path.rename", 4),
    "last pruned": ("rlstitch.checkpoint.prune", 5),
}


# ---------------------------------------------------------------------------------------------------- in the process that forks


def aim(place: str, count: int) -> None:
    """Have this process kill itself before the `count`-th call of the function at a dotted place."""
    package, module, *inner, name = place.split(".")
    thing = import_module(f"{package}.{module}")
    for part in inner:
        thing = getattr(thing, part)
    true, left = getattr(thing, name), [count]

    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*arguments, **options)

    setattr(thing, name, counted)


def fork(arguments: list[str], log: str, rank: int, ranks: int, port: int, target: list | None) -> int:
    if pid := os.fork():
        return pid
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    if ranks > 1:
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({key: str(value) for key, value in told.items()})
    code = 1
    try:
        if target and rank == 0:
            aim(*target)
        sys.argv = ["train.py", *arguments]
        runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def start(arguments: list[str], log: str, ranks: int, *, after: float | None = None, target: list | None = None) -> tuple[int, float]:
    """Run to the end, or killed `after` seconds or at `target`; -> the exit status (-9: killed), seconds. Where one rank dies, the others are killed, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    alive = {fork(arguments, log, rank, ranks, port, target) for rank in range(ranks)}
    status, ends = 0, begun + (after or 300)
    while alive:
        pid, told = os.waitpid(-1, os.WNOHANG)
        if pid:
            alive.discard(pid)
            if told and not status:
                status = os.waitstatus_to_exitcode(told)
        if (status or time.monotonic() > ends) and alive:
            status = status or -9
            for other in alive:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.005)
    return status, time.monotonic() - begun


def serve(jobs: list[dict]) -> None:
    """Each job in turn, its result as a line of JSON; `share` of a job is the moment of its kill as a share of the first job's seconds."""
    from rlstitch import checks, report, trainer  # noqa: F401

    whole = 0.0
    for job in jobs:
        after = job["share"] * whole if "share" in job else None
        code, seconds = start(job["arguments"], job["log"], job["ranks"], after=after, target=job.get("target"))
        whole = whole or seconds
        print(json.dumps({"code": code, "seconds": seconds}), flush=True)


# ---------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def two_rewards(world):  # noqa: F811
    """The tiny world with a second reward and its value model."""
    from rlstitch.backbones.sd3 import SD3Backbone
    from rlstitch.rewards.clip import ClipReward
    from tests.conftest import write_clip
    from tests.test_stitch import stitched

    write_clip(world / "hps", seed=1)
    backbone, reward = SD3Backbone(str(world / "sd3"), max_sequence_length=0), ClipReward(str(world / "hps"))
    stitched(backbone, reward, sigma_range=(0.05, 0.98))[0].save_pretrained(world / "value_hps")
    return world


def recipe(folder, method):
    changed, others = METHODS[method]
    algorithm = {k: v for k, v in (cfg.compose(method)["algorithm"] | changed).items()}
    return [
        f"recipe={folder / 'recipe.yaml'}",
        f"algorithm={json.dumps(algorithm)}",
        f"rewards.hps={{_target_: rlstitch.rewards.clip.ClipReward, path: {folder / 'hps'}}}",
        f"values.hps={folder / 'value_hps'}",
        *("evaluation.every=2", "evaluation.every_prompts=3", "evaluation.rewards=[clip, hps]", "guard.prompts=1", "guard.images=2"),
        *("checkpoint.every=1", "checkpoint.keep=2", "optimiser.lr=0.001"),
        *others,
    ]


def without_time(value):
    return (
        {k: without_time(v) for k, v in value.items() if k not in (*VOLATILE, "hours", "seal", "device_hours", "peak_memory_mb")}
        if isinstance(value, dict)
        else value
    )


def contents(run: Path) -> dict[str, object]:
    """Everything in a run folder, times and names apart."""
    out: dict[str, object] = {}
    for file in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(file.relative_to(run))
        if file.suffix in (".json", ".jsonl"):
            out[name] = [
                without_time(json.loads(line))
                for line in (file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()])
            ]
        else:
            out[name] = None if name in (".lock", "recipe.yaml", "report.html") else file.read_bytes()
    return out


def killed(folder, method, ranks, overrides, *histories):
    """The uninterrupted run, then a run for each history of kills, finished at last; every folder is compared. -> the exit status of each kill."""
    (folder / "logs").mkdir(exist_ok=True)
    names = [f"{method}-{ranks}-{k}{''.join(overrides).replace('.', '-').replace('=', '')}" for k in range(len(histories) + 1)]
    runs = [(name, how) for name, history in zip(names, ([], *histories)) for how in (*history, {})]
    base = [*recipe(folder, method), *overrides]
    jobs = [{"arguments": [*base, f"name={name}"], "ranks": ranks, "log": str(folder / "logs" / name), **how} for name, how in runs]
    command = [sys.executable, "-c", "import json, sys; from tests.test_kills import serve; serve(json.load(sys.stdin))"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, cwd=folder, timeout=900)
    codes = [json.loads(line)["code"] for line in done.stdout.splitlines()]
    said = "\n".join(f"{name}: {(folder / 'logs' / name).read_text()[-3000:]}" for name in names if (folder / "logs" / name).exists())
    ends, kills = [], []
    for (_, how), code in zip(runs, codes, strict=True):
        (kills if how else ends).append(code)
    assert not any(ends) and set(kills) <= {-9, 0}, (codes, done.stderr[-2000:], said)
    whole = contents(folder / "runs" / names[0])
    for name in names[1:]:
        found = contents(folder / "runs" / name)
        assert whole.keys() == found.keys(), (sorted(whole.keys() ^ found.keys()), said)
        other = [k for k in whole if whole[k] != found[k]]
        assert not other, (name, other, [(whole[k], found[k]) for k in other if k.endswith("metrics.jsonl")], said)
    return kills


CASES = [(method, ranks) for method in METHODS for ranks in RANKS]


@pytest.mark.slow
@pytest.mark.parametrize("method,ranks", CASES)
def test_a_killed_run_ends_as_the_uninterrupted_one(two_rewards, method, ranks):
    """One that is killed at two random moments, and one at a place that is aimed at: 36 kills in all."""
    count, overrides = RANKS[ranks]
    place = CASES.index((method, ranks))
    moments = random.Random(place)
    at_random = [{"share": moments.uniform(0.3, 0.9)}, {"share": moments.uniform(0.2, 0.6)}]
    aimed = [{"target": list(AIMED.values())[place]}]
    kills = killed(two_rewards, method, count, overrides, at_random, aimed)
    assert kills[0] == kills[2] == -9


@pytest.mark.slow
@pytest.mark.parametrize("stage,ranks", [(1, 1), (2, 1), (3, 1), (1, 2), (3, 2)])
def test_every_zero_stage_resumes_bit_for_bit(two_rewards, stage, ranks):
    kills = killed(two_rewards, "draft_stitch", ranks, (f"distributed.zero_stage={stage}",), [{"target": ["rlstitch.checkpoint.prune", 3]}])
    assert kills == [-9]
    for file in (two_rewards / "runs").glob(f"draft_stitch-{ranks}-1*stage{stage}/checkpoints/*/*"):
        assert file.is_dir() or file.suffix in (".safetensors", ".json")
