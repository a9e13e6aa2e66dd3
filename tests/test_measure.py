"""Figures of value models by hand, the baselines, and the evaluation job."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from rlstitch.shapes.images import graded_looks, preference_pairs
from rlstitch.stitch import compare, measure
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.baselines import PreferenceHead, noisy_clip, train_preference_head, vae_stitch
from rlstitch.stitch.distill import DistillConfig, distill, latents_of, targets_of
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Latent, UserError
from tests import warm
from tests.test_stitch_job import folder, given  # noqa: F401  (a fixture)


def test_figures_by_hand(generator):
    image, text = torch.eye(4)[[0, 1, 3, 2]], torch.eye(4)
    assert measure.recall(image, text) == 0.5 and measure.recall(text, image) == 0.5
    of = torch.tensor([0, 0, 1, 2, 3])  # two captions of the first picture, of which the second is the nearer
    found = measure.recalls(torch.eye(4), torch.eye(4)[[1, 0, 2, 3, 3]], of)
    assert found == {"recall_at_1": 0.25, "recall_at_1_text_to_image": pytest.approx(0.4)}
    assert measure.flattened([["a", "b"], ["c"]])[0] == ["a", "b", "c"] and measure.flattened([["a", "b"], ["c"]])[1].tolist() == [0, 0, 1]
    a, b = torch.randn(50, generator=generator).round(decimals=1), torch.randn(50, generator=generator).round(decimals=1)
    assert measure.srcc(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-6)  # with ties
    figures = measure.calibration(2 * a + 1, a)
    assert figures["slope"] == pytest.approx(0.5) and figures["correlation"] == pytest.approx(1)
    assert figures["mean_error"] == pytest.approx(float((a + 1).double().mean())) and figures["rmse"] == pytest.approx(
        float(np.sqrt(np.mean((a.numpy() + 1) ** 2))), rel=1e-5
    )


def test_monte_carlo_means_its_rollouts_and_references_are_on_the_policy(backbone, reward):
    batch = measure.batch_of(["a red circle", "a blue star"], backbone.encode_prompts(["a red circle", "a blue star"]))
    refs = measure.references(backbone, {"r": reward, "again": reward}, batch, rollouts=6, sigmas=(0.3, 0.8), num_steps=5)
    assert set(refs) == {"0.3", "0.8"} and refs["0.3"].scores.shape == (6, 2, 2)
    assert float(refs["0.3"].latent.sigma[0]) == pytest.approx(0.3)
    assert refs["0.8"].of("r").std(0).mean() > 0 and torch.equal(refs["0.8"].of("r"), refs["0.8"].of("again"))
    mc = measure.monte_carlo_calibrations(2, refs, "r", 4)["0.3"]
    assert mc["mean_error"] == pytest.approx(float(refs["0.3"].of("r")[4:].mean() - refs["0.3"].of("r")[:4].mean()), abs=1e-6)
    truth = measure.Subject("truth", lambda latent, batch: refs["0.3"].of("r")[:4].mean(0))
    exact = measure.calibrations(truth, {"0.3": refs["0.3"]}, "r", 4)["0.3"]
    assert exact["rmse"] == pytest.approx(0, abs=1e-6) and exact["slope"] == pytest.approx(1, abs=1e-3)


def test_tweedie_subject_is_the_oracle(backbone, reward):
    from rlstitch.oracles import Tweedie

    prompts = ["a red circle", "a blue star"]
    batch = measure.batch_of(prompts, backbone.encode_prompts(prompts))
    latent = Latent(torch.randn(2, *backbone.latent_shape), torch.full((2,), 0.4))
    for prompt in (True, False):
        subject, oracle = measure.tweedie("t", backbone, reward, prompt=prompt), Tweedie(backbone, {"r": reward}, {"r": 1.0}, prompt=prompt)
        torch.testing.assert_close(subject.value(latent, batch), oracle(latent, batch)[:, 0])


@pytest.mark.parametrize("kind", ["vae", "noisy_clip"])
def test_baselines_learn_and_are_saved_and_loaded(backbone, reward, kind, tmp_path, generator):
    images = torch.rand(48, 3, 16, 16, generator=generator)
    latents, (targets, tokens, norm) = latents_of(backbone, images), targets_of(reward, images)
    from rlstitch.fingerprints import vae_fingerprint

    card = {"vae_sha256": vae_fingerprint(backbone.path)}
    if kind == "vae":
        model = vae_stitch(backbone, reward, images, latents, norm=norm, normalise=False, card=card)
    else:
        model = noisy_clip(backbone, reward, norm=norm, normalise=False, card=card)
        assert model.stitch.linear.in_channels == 4 * model.prefix.fold**2
    config = DistillConfig(steps=60, batch_size=16, lr=2e-3, warmup=5, autocast=False)

    def error():
        latent = measure.noised(latents, 0.1)
        return float((measure.stitched("", model).output(latent, measure.batch_of([])) - targets).square().sum(-1).mean().detach())

    before = error()
    distill(model, latents, targets, tokens, config)
    assert error() < 0.8 * before
    model.save_pretrained(tmp_path / kind, half=False)
    loaded = StitchedValueModel.from_pretrained(tmp_path / kind, backbone=backbone, reward=reward)
    batch, latent = measure.batch_of(["a red circle"] * 48), measure.noised(latents, 0.5)
    torch.testing.assert_close(loaded.value(latent, batch), model.value(latent, batch).detach())


def test_a_preference_head_learns_pairs_under_the_prompt(backbone, generator):
    n = 64
    prompts = ["a red circle"] * n
    text = backbone.encode_prompts(prompts)
    first, second = torch.randn(2, n, *backbone.latent_shape, generator=generator)
    wins = torch.rand(n, generator=generator) < 0.5
    first[wins, 0] += 2.0  # the winner is brighter in one channel
    second[~wins, 0] += 2.0
    head = PreferenceHead(backbone, 1)
    assert not any(p.requires_grad for p in backbone.transformer.parameters())
    last = train_preference_head(head, (first, second), prompts, text, wins, steps=150, batch_size=32, lr=3e-3)
    assert last < 0.6
    figures = measure.pair_accuracy(measure.Subject("d", head.value), (first, second), prompts, wins, text, sigmas=(0.1,))
    assert figures["0.1"]["pair_accuracy"] > 0.85
    with pytest.raises(UserError, match="encoded prompts"):
        head.value(Latent(first, torch.full((n,), 0.5)), measure.batch_of(prompts))


def test_data_for_pairs_and_looks():
    first, second, prompts, wins = preference_pairs(24, seed=3)
    assert first.shape == second.shape == (24, 3, 64, 64) and len(prompts) == 24 and 2 < int(wins.sum()) < 24
    images, prompts, truth = graded_looks(24, seed=3)
    assert images.dtype == torch.uint8 and truth.shape == (24,) and truth.std() > 0.3


def test_the_evaluation_job(folder, sd3_dir, clip_dir, tmp_path, capsys):  # noqa: F811
    for kind in ("stitch", "vae"):
        stitch.run(stitch.checked(given(folder, sd3_dir, clip_dir, kind=kind, name=kind), kind))
    recipe = {
        "name": "tiny",
        "out": str(tmp_path / "ev"),
        "model": given(folder, sd3_dir, clip_dir)["model"],
        "rewards": {"r": given(folder, sd3_dir, clip_dir)["reward"]},
        "compare": {"r": {"StitchVM": str(folder / "values" / "stitch"), "VAE stitch": str(folder / "values" / "vae")}},
        "held_out": {"_target_": "tests.test_measure.tiny_pictures", "n": 10},
        "pairs": {"r": {"_target_": "tests.test_measure.tiny_pairs", "n": 10}},
        "calibration": {"count": 3, "rollouts": 2, "extra": 2, "num_steps": 3},
        "sigmas": [0.25, 0.75],
        "timing_batch": 4,
        "timing_repeats": 1,
    }
    results = compare.run(compare.checked(recipe, "tiny"))
    rows = results["rewards"]["r"]["rows"]
    assert list(rows) == [
        "StitchVM",
        "VAE stitch",
        "Tweedie (null text)",
        "Tweedie (true prompt)",
        "Monte Carlo, 1 rollout",
        "Monte Carlo, 2 rollouts",
    ]
    assert set(rows["StitchVM"]["0.25"]) == {
        "recall_at_1",
        "recall_at_1_text_to_image",
        "pair_accuracy",
        "mean_error",
        "slope",
        "correlation",
        "rmse",
    }
    said = capsys.readouterr().out
    assert (
        "'pairs.r': the model reads the first" in said and said.count(": 1 of 10 are longer") == 2 and "'pairs.r': reward 'r' reads" in said
    )
    saved = tmp_path / "ev" / "tiny"
    assert json.loads((saved / "evaluation.json").read_text())["rewards"] == results["rewards"]
    assert "| VAE stitch |" in (saved / "table.md").read_text() and (saved / "r_recall_at_1.svg").read_text().startswith("<svg xmlns")
    assert results["rewards"]["r"]["cost"]["StitchVM"]["gradient_megabytes"] > 0
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(recipe | {"name": "ranks"}))
    code, output = warm.run(warm.ROOT / "launch" / "evaluate_value.py", f"recipe={tmp_path / 'ranks.yaml'}", ranks=2)
    assert code == 0 and output.count("written to") == 1 and output.count("r: StitchVM") == 1, output
    two = json.loads((tmp_path / "ev" / "ranks" / "evaluation.json").read_text())
    assert two["hardware"].startswith("2 x ") and two["rewards"]["r"]["cost"].keys() == results["rewards"]["r"]["cost"].keys()
    assert two["rewards"]["r"]["clean"] == pytest.approx(results["rewards"]["r"]["clean"], abs=2e-4)
    for name, by_level in two["rewards"]["r"]["rows"].items():
        for level, figures in by_level.items():
            assert figures == pytest.approx(rows[name][level], abs=2e-4), (name, level)
    assert {row: len(by_level) for row, by_level in two["rewards"]["r"]["rows"].items()} == {row: 2 for row in rows}
    bad = recipe | {"rivals": ["tweedy"], "sigmas": [1.5], "compare": {"q": {"StitchVM": "nowhere"}}}
    with pytest.raises(UserError) as caught:
        compare.checked(bad, "tiny")
    assert all(part in str(caught.value) for part in ("'tweedy'", "1.5", "'q'", "nowhere"))


def tiny_pictures(n: int = 10):
    generator = torch.Generator().manual_seed(0)
    shapes = ("circle", "square", "star", "triangle", "cross")
    return torch.randint(0, 255, (n, 3, 16, 16), generator=generator, dtype=torch.uint8), [
        f"{'a red' if k % 2 else 'two'} {shapes[k // 2 % 5]}" for k in range(n)
    ]


def tiny_pairs(n: int = 10):
    (first, prompts), generator = tiny_pictures(n), torch.Generator().manual_seed(1)
    prompts[0] += " red" * 90
    return first, first.flip(0), prompts, torch.rand(n, generator=generator) < 0.5
