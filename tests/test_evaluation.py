"""The evaluation job: a model judged on a prompt set, whatever the ranks, with every setting that moves a score beside the scores."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlstitch import cli, drift, evaluation, resume, sampling, schedule
from rlstitch import config as cfg
from rlstitch.data import encode
from rlstitch.files import SHAPES
from rlstitch.prompts import PromptSet
from rlstitch.types import UserError, noise_like
from tests import warm

ROOT = Path(__file__).parents[1]
FEW = ["max_prompts=3", "images_per_prompt=2", "sampler.num_steps=4", "sampler.guidance=2", "precision=fp32", "progress=false", "grid=4"]


def given(*overrides):
    return cli.recipe_and_overrides([*FEW, *overrides], default="evaluate", laid=evaluation.laid)[1]


def test_scores_are_those_of_the_pictures_and_the_same_on_two_ranks(tmp_path):
    config = evaluation.checked(given(f"out={tmp_path}", "name=one", "layout=geneval", "batch_size=4"), "evaluate")
    job = evaluation.Job(config)
    told = job.run()
    row = job.prompts.rows[2]
    prompts = encode(job.backbone, PromptSet([row["prompt"]], [row]))[0]
    z = noise_like(job.backbone.latent_shape, torch.tensor([3 + 1234 * 1_000_003]))  # the second picture of the second prompt
    with torch.no_grad():
        batch = prompts.batch([0], torch.zeros(1))
        z = sampling.sample(job.backbone.bind(batch.text, 2.0), z, schedule.sigmas(4, 3.0, "diffusers")).z
        images = job.backbone.decode(z)
        for name, reward in job.rewards.items():
            assert told["scores"][name][3] == pytest.approx(float(reward.score(images, batch)), abs=1e-4), name
    saved = torch.tensor(list(Image.open(tmp_path / "one" / "images" / "00001" / "samples" / "00001.png").get_flattened_data()))
    torch.testing.assert_close(saved.float() / 255, images[0].clamp(0, 1).flatten(1).T, atol=0.503 / 255, rtol=0)
    assert json.loads((tmp_path / "one" / "images" / "00001" / "metadata.jsonl").read_text())["prompt"] == row["prompt"]
    means = torch.tensor(told["scores"]["clip"]).view(3, 2).mean(1)
    assert told["means"]["clip"] == pytest.approx(float(means.mean()), abs=1e-5)
    assert told["standard_errors"]["clip"] == pytest.approx(float(means.std()) / 3**0.5, abs=1e-5)  # over prompts, not pictures

    code, output = warm.run(ROOT / "launch" / "evaluate.py", *FEW, f"out={tmp_path}", "name=two", "batch_size=2", ranks=2)
    assert code == 0, output
    assert sum(line.startswith("two ") for line in output.splitlines()) == 1  # a table, once
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    for name, scores in told["scores"].items():
        assert two["scores"][name] == pytest.approx(scores, abs=1e-4), name
    assert sorted(p.name for p in (tmp_path / "two" / "images").iterdir()) == [f"{k:05d}.png" for k in range(6)]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")] and not evaluation.differing(told, two)
    page = (tmp_path / "two" / "index.html").read_text()
    assert "3 prompts, 2 pictures each, 4 steps, guidance 2, 64 x 64 px" in page and "preference_b" in page


def test_results_that_differ_in_a_setting_say_which(tmp_path, capsys, monkeypatch):
    def told(*overrides):
        return {
            "settings": evaluation.Job(evaluation.checked(given(f"out={tmp_path}", "judges=[clip]", *overrides), "evaluate")).settings()
        }

    plain = told()
    for override, key in (
        ("sampler.num_steps=5", "sampling.num_steps"),
        ("sampler.guidance=1", "sampling.guidance"),
        ("sampler.shift=2", "sampling.sigmas"),
        ("seed=3", "sampling.seed"),
        ("max_prompts=2", "prompts.count"),
        ("prompts=shapes:train.jsonl", "prompts.sha256"),
        ("precision=bf16", "sampling.precision"),
        ("model.path=shapes:shapes-large", "model.path"),
    ):
        assert any(line.startswith(f"{key}: ") for line in evaluation.differing(plain, told(override))), override
    assert not evaluation.differing(plain, told("batch_size=3"))
    rows = (SHAPES / "held_out.jsonl").read_text()
    (tmp_path / "again.jsonl").write_text(rows)
    assert not evaluation.differing(plain, told(f"prompts={tmp_path / 'again.jsonl'}"))  # the same, by another name
    monkeypatch.chdir(tmp_path)  # what lies beside is named without a slash
    (tmp_path / "ask.txt").write_text("{prompt}")
    assert list(resume.hashes_of({"rewards.r": {"instruction": "ask.txt", "dtype": "ask"}})) == ["rewards.r.instruction = ask.txt"]
    capsys.readouterr()
    long = [{"prompt": "a red circle", "long": " ".join(["red"] * 60), "day": "2026-01-02"} for _ in range(3)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    one, other = (told(f"prompts={tmp_path / 'two.jsonl'}", "truncate=true", f"column={c}") for c in ("prompt", "long"))
    assert evaluation.differing(one, other) == ["prompts.column: prompt and long"]
    assert capsys.readouterr().out.count("reward 'clip' reads the first 24 tokens of a prompt: 3 of 3 are longer") == 1


def test_drift_and_diversity(tmp_path):
    found = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [1 - float(found[a] @ found[b]) for g in (0, 3) for a in range(g, g + 3) for b in range(g, a)]
    assert drift.diversity(found, 3) == pytest.approx(sum(pairs) / 6, abs=1e-6) and drift.diversity(
        found[:1].expand(4, -1), 2
    ) == pytest.approx(0, abs=1e-6)
    pytest.importorskip("torchmetrics")
    other = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)) + 1, dim=-1)
    kernel = lambda x, y: float((x.double() @ y.double() + 1) ** 3)  # noqa: E731
    inside = [sum(kernel(x[a], x[b]) for a in range(4) for b in range(4) if a != b) / 12 for x in (found, other)]
    assert drift.kernel_distance(found, other) == pytest.approx(
        sum(inside) - 2 * sum(kernel(a, b) for a in found[:4] for b in other) / 16, rel=1e-5
    )

    options = [f"out={tmp_path}", "judges=[hps]", "features=clip", "max_prompts=2", "sampler.num_steps=2"]
    evaluation.run(evaluation.checked(given(*options, "name=one"), "evaluate"))
    told = evaluation.run(evaluation.checked(given(*options, "name=two", f"against={tmp_path / 'one'}", "layout=none"), "evaluate"))
    # the same pictures: unbiased, it counts no picture against itself within a set, and once between the two
    assert list(told["scores"]) == ["hps"] and 0 < told["means"]["diversity"] < 1
    assert told["means"]["distance"] < 0 and not (tmp_path / "two" / "images").exists()
    for options, message in (
        (["features=detector"], "gives no image embeddings"),
        (["features=clip", "images_per_prompt=1"], "set images_per_prompt to 2 or more"),
        ([f"against={tmp_path / 'two'}"], "(?s)has 0 pictures under images.*'against' needs `features`"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.checked(given(*options), "evaluate")


def test_models_and_rewards_by_name(tmp_path):
    config = given("model=flux1_dev", "rewards=[darkness, clip]")
    assert config["model"] == cfg.compose("model/flux1_dev")["model"] and config["judges"] == ["darkness", "clip"]
    assert given("model=someone/model")["model"] == {"_target_": "rlstitch.backbones.Diffusers", "path": "someone/model"}
    for known in ("shapes", "shapes_large", "sd35_medium"):  # by its path, with how it is to be run
        node = cfg.compose(f"model/{known}")["model"]
        assert given(f"model={node['path']}")["model"] == node
    assert given(f"model={node['path']}@abc")["model"] == node | {"path": f"{node['path']}@abc"}
    assert (
        cli.recipe_and_overrides(["recipe=draft_stitch", "model=shapes_flux", "model.embedded_guidance=2"])[1]["model"]["embedded_guidance"]
        == 2
    )
    both = given("rewards=[hps, hpsv21]")
    assert (
        both["judges"] == ["hps", "hpsv21"]
        and both["rewards"]["hps"] != both["rewards"]["hpsv21"] == cfg.compose("reward/hpsv21")["rewards"]["hps"]
    )
    (tmp_path / "mine.yaml").write_text("rewards.mine: {_target_: rlstitch.rewards.simple.Darkness}")
    assert given(f"rewards=[reward/jpeg, {tmp_path / 'mine.yaml'}]")["judges"] == ["jpeg", "mine"] and given("rewards=clip")["judges"] == [
        "clip"
    ]
    with pytest.raises(UserError, match="asks for 'vqa_list', .*: take a file of prompts that it reads, or another reward"):
        evaluation.checked(given("rewards=[geneval2]"), "evaluate")
    with pytest.raises(
        UserError, match=r"'rewards' names 'darknes', which is neither in recipes/reward nor in the recipe \(did you mean 'darkness'\?\)"
    ):
        given("rewards=[darknes]")
    with pytest.raises(UserError, match="'judges' names no reward"):
        evaluation.checked(given("judges=[]"), "evaluate")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than earlier results, which would be replaced"):
        evaluation.checked(given(f"out={tmp_path}", "name=mine"), "evaluate")
