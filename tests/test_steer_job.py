"""launch/steer.py: what it writes, and its user's mistakes."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from launch import steer as launcher
from rlstitch import config as cfg
from rlstitch import steer
from rlstitch.config import RECIPES
from rlstitch.types import UserError
from tests import warm
from tests.test_stitch import stitched

LAUNCHER = Path(launcher.__file__)
STEERING = ("dps", "dps_stitch", "fk", "fk_stitch", "best_of_n", "svdd", "svdd_stitch")


def given(tmp_path, sd3_dir, clip_dir, **more):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue stars\na green square\n")
    return {
        "name": "tiny",
        "out": str(tmp_path / "out"),
        "prompts": str(prompts),
        "prompts_per_batch": 2,
        "precision": "fp32",
        "progress": False,
        "model": {"_target_": "rlstitch.backbones.sd3.SD3Backbone", "path": str(sd3_dir), "max_sequence_length": 0},
        "rewards": {"r": {"_target_": "rlstitch.rewards.clip.ClipReward", "path": str(clip_dir)}, "detector": {"_target_": "rlstitch.shapes.reward.DetectorReward"}},
        "oracle": {"_target_": "rlstitch.oracles.Tweedie", "weights": {"r": 1.0}},
        "method": {"_target_": "rlstitch.steering.fk", "num_particles": 2, "resample_steps": [1, 2], "lam": 2.0, "lam_unit": "spread"},
        "sampler": {"num_steps": 4, "spacing": "plain", "guidance": 2.0},
        "judges": ["r"],
        **more,
    }  # fmt: skip


def test_a_job_writes_pictures_scores_and_a_grid(tmp_path, sd3_dir, clip_dir):
    recipe = given(tmp_path, sd3_dir, clip_dir, baseline=True, images_per_prompt=2)
    result = steer.Job(steer.checked(recipe, "tiny")).run()
    folder = tmp_path / "out" / "tiny"
    assert [p.name for p in sorted((folder / "images").iterdir())] == [f"{k:05d}.png" for k in range(6)]
    assert Image.open(folder / "images" / "00000.png").size == (16, 16) and Image.open(folder / "grid.png").size[0] > 300
    saved = json.loads((folder / "scores.json").read_text())
    assert saved == result and len(saved["images"]) == 6 and saved["images"][1]["prompt"] == "a red circle"
    assert saved["value_queries_per_image"] == 2 * 3 and saved["seconds_per_image"]["steered"] > 0 and saved["peak_memory_mb"] > 0
    assert saved["means"]["steered"]["r"] == pytest.approx(sum(row["r"] for row in saved["images"]) / 6, abs=1e-4)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tiny"]
    again = steer.Job(steer.checked(cfg.compose(str(folder / "recipe.yaml")), "tiny")).run()
    assert [row["r"] for row in again["images"]] == [row["r"] for row in result["images"]]


def test_pictures_without_a_score_are_told_and_are_null_in_the_results(tmp_path, sd3_dir, clip_dir, capsys):
    recipe = given(tmp_path, sd3_dir, clip_dir, judges=["r", "partial", "silent"])
    for name, lost in (("partial", [1]), ("silent", [0, 1, 2])):
        recipe["rewards"][name] = {"_target_": "tests.test_jobs.Partial", "lost": lost, "instead": float("inf")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    launcher.run([f"recipe={tmp_path / 'tiny.yaml'}"])
    told = capsys.readouterr().out
    assert "steered: 'partial' gave no score for 1 of 3 pictures" in told and "'silent' gave no score for 3 of 3 pictures" in told
    (row,) = [line.split() for line in told.splitlines() if line.startswith("steered ")]
    assert row[-1] == "-" and 0 < float(row[-2]) < 1
    text = (tmp_path / "out" / "tiny" / "scores.json").read_text()
    saved = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    assert saved["means"]["steered"]["silent"] is None and saved["means"]["steered"]["unscored/partial"] == 1
    assert [row["partial"] is None for row in saved["images"]] == [False, True, False]


@pytest.mark.parametrize(
    "method",
    [
        {"_target_": "rlstitch.steering.dps", "scale": 1.0},
        {"_target_": "rlstitch.steering.svdd", "num_proposals": 2},
        {"_target_": "rlstitch.steering.best_of_n", "num_particles": 3, "stop": 2},
    ],
)
def test_every_method_runs(tmp_path, sd3_dir, clip_dir, method):
    result = steer.Job(steer.checked(given(tmp_path, sd3_dir, clip_dir, method=method), "tiny")).run()
    assert len(result["images"]) == 3 and all(-1 <= row["r"] <= 1 for row in result["images"])


@pytest.mark.parametrize("proposals", ["greedy", "weighted"])
def test_lambda_in_spreads_is_the_jobs_whoever_shares_a_batch(tmp_path, sd3_dir, clip_dir, proposals, monkeypatch):
    used, pictures, fk = [], [], steer.cfg.load_class("rlstitch.steering.fk")

    def spied(*args, **options):
        z = fk(*args, **options)
        used.append(options["trace"].lam)
        return z

    method = {"num_particles": 3, "num_proposals": 2, "proposal_steps": [0, 1], "proposals": proposals}
    recipe = given(tmp_path, sd3_dir, clip_dir, images_per_prompt=2)
    recipe["method"] |= method
    for together in (1, 2, 6):
        job = steer.Job(steer.checked(recipe | {"prompts_per_batch": together, "name": f"by{together}"}, "tiny"))
        monkeypatch.setattr("rlstitch.steering.fk", spied)
        monkeypatch.setattr(spied, "__signature__", inspect.signature(fk), raising=False)
        saved = job.run()
        monkeypatch.setattr("rlstitch.steering.fk", fk)
        used.append(saved["lambda"])
        assert saved["lambda"] == pytest.approx(2.0 / saved["value_spread"]) and saved["value_spread"] > 0
        pictures.append(torch.tensor([row["r"] for row in saved["images"]]))
    assert len(used) == 6 + 3 + 1 + 3 and len(set(used)) == 1
    torch.testing.assert_close(pictures[0], pictures[1], atol=2e-4, rtol=0)  # noise is a prompt's own, too
    torch.testing.assert_close(pictures[0], pictures[2], atol=2e-4, rtol=0)
    assert pictures[0].std() > 0.005


METHODS = {
    "dps_stitch": {"_target_": "rlstitch.steering.dps", "scale": 1.0},
    "fk_stitch": {
        "_target_": "rlstitch.steering.fk", "num_particles": 3, "num_proposals": 2, "proposals": "weighted", "resampling": "residual",
        "resample_steps": [1], "proposal_steps": [0, 2], "lam": 2.0, "lam_unit": "spread",
    },
    "best_of_n": {"_target_": "rlstitch.steering.best_of_n", "num_particles": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_make_the_pictures_of_one(tmp_path, sd3_dir, clip_dir, backbone, reward, name, monkeypatch):
    """Six pictures in three batches, or in two uneven ones: bit for bit, with the same figures beside them, told by one rank alone; nothing is kept from one to the other."""
    recipe = given(tmp_path, sd3_dir, clip_dir, method=METHODS[name], baseline=True, images_per_prompt=2, max_prompts=3, grid=3, threads=1)
    if name == "best_of_n":
        recipe["oracle"] = {"_target_": "rlstitch.oracles.Terminal", "weights": {"r": 1.0}}
    else:
        stitched(backbone, reward)[0].save_pretrained(tmp_path / "value")
        recipe |= {"oracle": {"_target_": "rlstitch.oracles.Stitched", "weights": {"r": 1.0}}, "values": {"r": str(tmp_path / "value")}}
    recipe["prompts_per_batch"] = 4 if name == "dps_stitch" else 2
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    saved, output = {}, {}
    for ranks in (1, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{ranks}"))
        code, output[ranks] = warm.run(LAUNCHER, f"recipe={tmp_path / 'tiny.yaml'}", f"name=on{ranks}", ranks=ranks)
        assert code == 0, output[ranks]
        folder = tmp_path / "out" / f"on{ranks}"
        files = [*sorted((folder / "images").iterdir()), folder / "grid.png"]
        told = json.loads((folder / "scores.json").read_text())
        assert set(told.pop("seconds_per_image")) == {"steered", "baseline"} and told.pop("hardware").startswith(f"{ranks} x ")
        told.pop("peak_memory_mb")
        saved[ranks] = told, {file.name: file.read_bytes() for file in files}
    assert saved[1] == saved[2] and len(saved[1][1]) == 7
    assert output[2].count("results ") == 1 and [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []
    assert len(set(saved[1][1].values())) == 7 and saved[1][0]["means"]["steered"] != saved[1][0]["means"]["baseline"]


def test_ranks_without_work_are_told_and_a_fault_on_one_ends_all_in_one_line(tmp_path, sd3_dir, clip_dir):
    recipe = given(tmp_path, sd3_dir, clip_dir, method=METHODS["dps_stitch"], prompts_per_batch=4)
    recipe["rewards"]["mine"] = {"_target_": "tests.test_asking.Breaking", "calls": 1, "rank": 1}  # the call is the probe's
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    code, output = warm.run(LAUNCHER, f"recipe={tmp_path / 'tiny.yaml'}", ranks=2)
    assert (
        code == 0 and "3 pictures make 1 batch of prompts_per_batch=4, and 1 of 2 ranks have nothing to do: prompts_per_batch=2" in output
    )
    code, output = warm.run(LAUNCHER, f"recipe={tmp_path / 'tiny.yaml'}", "judges=[r, mine]", "name=broken", "prompts_per_batch=2", ranks=2)
    lines = [line for line in output.splitlines() if "rlstitch: " in line]
    assert code == 2 and len(lines) == 1 and "reward 'mine' failed: ConnectionError: 503" in lines[0], output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tiny"] and "Traceback" not in output
    code, output = warm.run(LAUNCHER, f"recipe={tmp_path / 'tiny.yaml'}", "check=true", ranks=2)
    assert code == 0 and output.count("steers 3 pictures") == 1 and "4 at a time on each of 2 ranks" in output


def test_a_trained_policy_is_steered(tmp_path, sd3_dir, clip_dir):
    """With a LoRA and scale 0 the job draws what the policy draws; the LoRA of another model is refused."""
    from rlstitch import sampling, schedule
    from rlstitch.backbones.sd3 import SD3Backbone
    from rlstitch.policy import Policy
    from rlstitch.types import noise_like
    from tests.conftest import write_sd3

    backbone = SD3Backbone(str(sd3_dir), max_sequence_length=0)
    policy = Policy(backbone.transformer, rank=4, alpha=8, targets=backbone.lora_targets, seed=0, ema_decay=0.0)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    policy.export(tmp_path / "lora", "default")
    method = {"_target_": "rlstitch.steering.dps", "scale": 0.0}
    recipe = given(tmp_path, sd3_dir, clip_dir, method=method, kernel="ode", lora=str(tmp_path / "lora"))
    job = steer.Job(steer.checked(recipe, "tiny"))
    z = noise_like(backbone.latent_shape, steer._row_seeds(0, [0, 1], 1))
    text, grid = backbone.encode_prompts(["a red circle", "two blue stars"]), schedule.sigmas(4, 3.0, "plain")
    with torch.no_grad():
        wanted = sampling.sample(backbone.bind(text, 2.0), z, grid).z
        with policy.use("reference"):
            base = sampling.sample(backbone.bind(text, 2.0), z, grid).z
    torch.testing.assert_close(job.latents([0, 1]), wanted, atol=1e-5, rtol=1e-4)
    assert (wanted - base).abs().max() > 0.05
    for layers in (2, 4):
        recipe["model"] = recipe["model"] | {"path": str(write_sd3(tmp_path / f"other{layers}", layers=layers))}
        with pytest.raises(UserError, match="trained on another architecture"):
            steer.Job(steer.checked(recipe, "tiny"))
    with pytest.raises(UserError, match="'lora': .*(is no folder|is not there)"):
        steer.checked(recipe | {"lora": str(tmp_path / "none")}, "tiny")


def test_what_is_no_result_of_steering_is_never_replaced(tmp_path, sd3_dir, clip_dir):
    run = tmp_path / "out" / "tiny"
    run.mkdir(parents=True)
    (run / "scores.json").write_text("{}")
    (run / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="metrics.jsonl, which would be replaced, and no job of this kind has written it"):
        steer.checked(given(tmp_path, sd3_dir, clip_dir), "tiny")
    (run / "metrics.jsonl").unlink()
    assert steer.checked(given(tmp_path, sd3_dir, clip_dir), "tiny").name == "tiny"


def test_the_best_particle_is_kept(tmp_path, sd3_dir, clip_dir):
    """Best of six by the pixel reward beats the first of them for every prompt, and is reproduced by best of six on the judge itself."""
    method = {"_target_": "rlstitch.steering.best_of_n", "num_particles": 6}
    oracle = {"_target_": "rlstitch.oracles.Terminal", "weights": {"r": 1.0}}
    job = steer.Job(steer.checked(given(tmp_path, sd3_dir, clip_dir, method=method, oracle=oracle, baseline=True, kernel="ode"), "tiny"))
    means = job.run()["means"]
    assert means["steered"]["r"] > means["baseline"]["r"] and len(steer._row_seeds(0, [0, 1], 6).unique()) == 12
    best = job.judge(job.latents([0, 1]), [0, 1])[1]["r"]
    job.config.method["num_particles"] = 3
    assert (best >= job.judge(job.latents([0, 1]), [0, 1])[1]["r"] - 1e-6).all()


def test_all_faults_at_once(tmp_path, sd3_dir, clip_dir):
    bad = given(tmp_path, sd3_dir, clip_dir, kernel="heun", judges=["q"], prompts=str(tmp_path / "none.txt"), seeds=3)
    bad["method"]["num_particle"] = 4
    bad["oracle"]["weights"] = {"hps": 1.0}
    with pytest.raises(UserError) as caught:
        steer.checked(bad, "tiny")
    for part in ("'kernel' must be one of ode, sde, not 'heun'", "'judges' names 'q'", "none.txt", "unknown key 'seeds'", "num_particles"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(method={"_target_": "rlstitch.steering.fk", "num_particles": 0, "resample_steps": [], "lam": 1.0}),
            "'method.num_particles' must be positive, not 0",
        ),
        (dict(method={"_target_": "rlstitch.steering.fk", "num_particles": 2, "resample_steps": [7], "lam": 1.0}), "beyond the grid"),
        (dict(kernel="ode"), "adds no noise"),
        (
            dict(oracle={"_target_": "rlstitch.oracles.Terminal", "weights": {"r": 1.0}}),
            "answers only in .0, 0.: use a Stitched or a Tweedie oracle",
        ),
        (
            dict(
                oracle={"_target_": "rlstitch.oracles.Tweedie", "weights": {"detector": 1.0}}, method={"_target_": "rlstitch.steering.dps"}
            ),
            "needs the value's gradient",
        ),
        (dict(oracle={"_target_": "rlstitch.oracles.Stitched", "weights": {"r": 1.0}}), "not under 'values'"),
        (
            dict(oracle={"_target_": "rlstitch.oracles.Stitched", "weights": {"r": 1.0}, "compile": True}),
            "'oracle.compile': this machine lacks g.., or leave it out",
        ),
    ],
)
def test_method_and_oracle_must_fit(tmp_path, sd3_dir, clip_dir, change, message, monkeypatch):
    monkeypatch.setattr("rlstitch.compiled.lacking", lambda: "g++")
    with pytest.raises(UserError, match=message):
        steer.checked(given(tmp_path, sd3_dir, clip_dir, **change), "tiny")


def test_a_judge_that_needs_facts_says_so_before_the_work(tmp_path, sd3_dir, clip_dir):
    with pytest.raises(
        UserError, match="'judges' names 'detector', which needs prompts that say what is to be seen.*leave it out, e.g. judges="
    ):
        steer.checked(given(tmp_path, sd3_dir, clip_dir, judges=["r", "detector"]), "tiny")


def test_long_and_empty_prompt_files(tmp_path, sd3_dir, clip_dir):
    recipe = given(tmp_path, sd3_dir, clip_dir)
    (tmp_path / "prompts.txt").write_text("a red circle " * 20)
    with pytest.raises(UserError, match="'prompts': 1 of 1 prompts are longer than the 24 tokens.*set truncate=true"):
        steer.checked(recipe, "tiny")
    assert len(steer.Job(steer.checked(recipe | {"truncate": True}, "tiny")).prompts) == 1
    (tmp_path / "prompts.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        steer.checked(recipe, "tiny")


@pytest.mark.parametrize("name", STEERING)
def test_shipped_recipes_are_sound(name):
    assert (RECIPES / f"{name}.yaml").exists()
    config = steer.checked(cfg.compose(name), name)
    assert config.name == name and torch.isfinite(torch.tensor(config.sampler.guidance))
