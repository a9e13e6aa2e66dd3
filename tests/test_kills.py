"""Kills at any moment: a run that is killed and started again ends as the uninterrupted one, bit for bit, under every method, on one rank and on two under ZeRO, in processes of their own (warm.py)."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from rlstitch import config as cfg
from rlstitch import lock
from tests import warm
from tests.test_train import REFRESH, ROOT, VOLATILE, world  # noqa: F401  (a fixture)

STITCHED = "oracle={_target_: rlstitch.oracles.Stitched, weights: {clip: 1.0, hps: 1.0}}"
TERMINAL = ("oracle={_target_: rlstitch.oracles.Terminal, weights: {clip: 1.0, hps: 1.0}}", "stop={_target_: rlstitch.stops.End}")
GROUPS = "batch={prompts_per_update: 4, images_per_prompt: 2, micro_batch: 4}"
ALONE = "{{name: {0}, updates: 2, oracle: {{_target_: rlstitch.oracles.Stitched, weights: {{{0}: 1.0}}}}}}"
STAGES = f"stages=[{ALONE.format('clip')}, {ALONE.format('hps')}]"
METHODS = {  # the shipped recipe whose algorithm it is, its keys that four steps change, and the rest of the recipe
    "draft_stitch": ({}, (STITCHED, *REFRESH)),
    "nft_stitch": ({"times": 2}, (STITCHED, GROUPS)),
    "flow_grpo_fast": ({"window": 2, "window_range": 3}, (*TERMINAL, GROUPS)),
    "marble_stitch": ({"every": 2, "times": 2}, (STITCHED, GROUPS)),
    "dpo_online": ({}, (*TERMINAL, GROUPS)),
    "pdtr": ({}, (STITCHED, STAGES)),
}
RANKS = {"one": (1, ()), "two": (2, ("distributed.zero_stage=2",))}
AIMED = {  # killed before call n of a function; of a checkpoint of four, the third is aimed at where it is named by call
    "a tensor file": ("rlstitch.checkpoint.write_tensors", 5),
    "a tensor file's rename": ("rlstitch.files.os.replace", 14),
    "complete.json": ("rlstitch.checkpoint.write_json", 3),
    "the rename": ("rlstitch.checkpoint.Path.rename", 3),
    "pruning": ("rlstitch.checkpoint.prune", 4),
    "half pruned": ("rlstitch.checkpoint.Path.rmdir", 1),
    "final evaluation": ("rlstitch.trainer.evaluate", 5),
    "export": ("rlstitch.policy.write_weights", 1),
    "summary": ("rlstitch.trainer.write_json", 1),
    "report": ("rlstitch.report.write_text", 1),
    "last checkpoint": ("rlstitch.checkpoint.Path.rename", 5),
    "last pruned": ("rlstitch.checkpoint.prune", 5),
}


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
        elif file.suffix == ".safetensors":  # whose header keeps its entries in any order
            with safe_open(file, "pt") as tensors:
                out[name] = (tensors.metadata(), {k: tensors.get_tensor(k).numpy().tobytes() for k in tensors.keys()})  # noqa: SIM118
        else:
            out[name] = None if name in (".lock", "recipe.yaml", "report.html") else file.read_bytes()
    return out


def forked(folder, *jobs):
    """What became of each job (its name, overrides, ranks and how it is killed; `share`: after that share of the first job's seconds): the status of its ranks, and what it printed."""
    found, whole = [], 0.0
    for name, overrides, ranks, how in jobs:
        kill = {"after": how["share"] * whole} if "share" in how else how
        codes, said, seconds = warm.outcome(
            ROOT / "launch" / "train.py", *overrides, f"name={name}", ranks=ranks, cwd=folder, limit=900, **kill
        )
        whole = whole or seconds
        found.append((codes, said))
    return found


def differing(folder, one, two):
    """The files in which two runs differ, times apart, and those that only one has."""
    a, b = contents(folder / "runs" / one), contents(folder / "runs" / two)
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name])


def killed(folder, method, ranks, overrides, *histories):
    """The uninterrupted run, then a run for each history of kills, finished at last: the same files. -> the first exit status at each kill."""
    label = "".join(overrides).replace(".", "-").replace("=", "")
    names = [f"{method}-{ranks}{label}-{k}" for k in range(len(histories) + 1)]
    base = [*recipe(folder, method), *overrides]
    jobs = [(name, base, ranks, how) for name, history in zip(names, ([], *histories)) for how in (*history, {})]
    results = forked(folder, *jobs)
    for (name, *_, how), (codes, said) in zip(jobs, results):
        assert how or codes == [0] * ranks, (name, codes, said[-3000:])
        assert codes[0] in (0, -9), (name, codes, said[-3000:])
    for name in names[1:]:
        assert not (other := differing(folder, names[0], name)), (name, other)
    return [codes[0] for (*_, how), (codes, _) in zip(jobs, results) if how]


def test_two_ranks_agree_on_what_is_broken_and_on_who_holds_the_folder(world):  # noqa: F811
    """Under ZeRO 2: a damaged optimiser of the other rank is seen by both, what was trained since is made anew bit for bit, and both are refused in one line."""
    base = [f"recipe={world / 'recipe.yaml'}", "updates=2", "checkpoint.every=1", "distributed.zero_stage=2"]
    forked(world, ("whole", base, 2, {}))
    shutil.copytree(world / "runs" / "whole", run := world / "runs" / "pair")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("name: whole", "name: pair"))
    file = run / "checkpoints" / "step-000002" / "optimiser-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with lock.held(run, lambda take: take()):
        ((codes, said),) = forked(world, ("pair", base, 2, {}))
        assert codes == [2, 2] and said.count("is in use: process") == 1 and "Traceback" not in said, said
    ((codes, said),) = forked(world, ("pair", base, 2, {}))
    assert codes == [0, 0] and said.count("checkpoint step-000002 is broken") == 1 and "resumed from step-000001" in said, said
    assert {name.split("/")[1] for name in differing(world, "whole", "pair")} == {"broken-step-000002"}
    assert {f.suffix for f in (run / "checkpoints").glob("step-*/*")} == {".safetensors", ".json"}


CASES = [(method, ranks) for method in METHODS for ranks in RANKS]


@pytest.mark.slow
@pytest.mark.parametrize("method,ranks", CASES)
def test_a_killed_run_ends_as_the_uninterrupted_one(two_rewards, method, ranks):
    """On one rank a run that is killed at three random moments and one at an aimed place; on two, where a start takes longer, one at an aimed place and a random moment: 36 kills in all."""
    count, overrides = RANKS[ranks]
    place = CASES.index((method, ranks))
    moments = random.Random(place)
    aimed = {"target": list(AIMED.values())[place]}
    later = [{"share": moments.uniform(0.25, 0.6)} for _ in range(2)]
    histories = ([{"share": moments.uniform(0.4, 0.9)}, *later], [aimed]) if count == 1 else ([aimed, later[0]],)
    kills = killed(two_rewards, method, count, overrides, *histories)
    assert kills[3 if count == 1 else 0] == -9


@pytest.mark.slow
@pytest.mark.parametrize("stage,ranks", [(1, 1), (2, 1), (3, 1), (1, 2), (3, 2)])
def test_every_zero_stage_resumes_bit_for_bit(two_rewards, stage, ranks):
    kills = killed(two_rewards, "draft_stitch", ranks, (f"distributed.zero_stage={stage}",), [{"target": ["rlstitch.checkpoint.prune", 3]}])
    assert kills == [-9]
