"""SOAR and supervised finetuning: levels, targets and weights by hand arithmetic; the job on pictures without a reward, resumed; its faults."""

import json

import pytest
import torch

from rlstitch import schedule
from rlstitch.algorithms.soar import SOAR
from rlstitch.data import PromptSet, encode, encode_pictures
from rlstitch.shapes import images
from rlstitch.types import UserError
from tests import pictures
from tests.test_train import refusal, rows, start, weights, world  # noqa: F401  (a fixture)


@pytest.fixture
def batch(backbone):
    shown, prompts = pictures.tiny(3)
    return encode(backbone, PromptSet(prompts, [{}] * 3, pictures=shown))[0].batch([0, 1, 2], torch.tensor([5, 6, 7]))


def soar(backbone, **options):
    return SOAR(backbone, None, **options)


def objective(parts):
    values = [loss for loss, _ in parts]
    return sum(values) / len(values), len(values)


def test_the_training_table_is_shifted_once():
    """Against diffusers' scheduler as it is constructed."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    table = schedule.training_table(3.0)
    torch.testing.assert_close(table, FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000], atol=1e-6, rtol=0)
    t = torch.tensor([1.0, 0.9995, 0.9985, 0.5, 0.0004, 0.0])
    assert torch.equal(schedule.training_sigma(t, 3.0), table[torch.tensor([0, 0, 1, 500, 999, 999])])


def test_pictures_are_encoded_once_and_follow_their_prompts(backbone):
    shown, prompts = pictures.tiny_pairs(5)
    known = encode(backbone, PromptSet(prompts, [{}] * 5, pictures=shown))[0]
    assert known.pictures is None and known.clean.shape == (5, 2, *backbone.latent_shape)
    batch = known.batch([3, 1], torch.tensor([0, 1]))
    torch.testing.assert_close(batch.clean[0, 1], backbone.encode(shown[3, 1:].float() / 255)[0])
    assert batch.prompts == [prompts[3], prompts[1]] and torch.equal(batch[1:].clean[0], batch.clean[1])
    assert torch.equal(batch.interleave(2).clean[1], batch.clean[0])
    with pytest.raises(UserError, match="pictures of 32 x 32, the model takes 16 x 16"):
        encode_pictures(backbone, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_step_and_its_correction_by_hand(backbone, batch):
    """z_1 = z_0 + (s1 - s0) (v_null + w (v - v_null)); every point lies between it and the noise, and its target leads to the picture."""
    algorithm = soar(backbone, points=4, rollout_guidance=3.0)
    rollout = algorithm.rollout(batch, 0)
    (z, sigma), lower = rollout.states[0], rollout.latent.sigma
    table = schedule.training_table(3.0)
    index = [int((table == s).nonzero()) for s in sigma]
    assert [int((table == s).nonzero()) - i for s, i in zip(lower, index)] == [25] * 3  # 1/40 of the 1000 entries
    noise = (z - (1 - sigma.view(-1, 1, 1, 1)) * batch.clean) / sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        null, v = backbone.velocity(z, sigma, backbone.null.expand(3)), backbone.velocity(z, sigma, batch.text)
    torch.testing.assert_close(rollout.latent.z, z + (lower - sigma).view(-1, 1, 1, 1) * (null + 3 * (v - null)), atol=1e-5, rtol=1e-4)
    for point, level, target in algorithm.corrections(rollout, noise):
        assert bool((level > lower).all()) and bool((level < 1).all())
        share = ((1 - level) / (1 - lower)).view(-1, 1, 1, 1)
        torch.testing.assert_close(point, share * rollout.latent.z + (1 - share) * noise, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(schedule.posterior_mean(point, target, level), batch.clean, atol=1e-5, rtol=1e-4)


def test_the_upper_end_is_one_as_released_unless_a_ratio_is_asked_for(backbone, batch):
    def highest(**options):
        algorithm = soar(backbone, points=200, **options)
        rollout = algorithm.rollout(batch, 0)
        levels = torch.stack([level for _, level, _ in algorithm.corrections(rollout, torch.zeros_like(batch.clean))])
        return levels.max(0).values, rollout.states[0][1]

    released, sigma = highest()
    assert bool((released > 0.95).all()) and bool((sigma < 0.95).any())
    asked, sigma = highest(upper_ratio=1.1)
    limit = (1.1 * sigma).clamp(max=1)
    assert bool((asked <= limit + 1e-6).all()) and bool((asked > 0.97 * limit).all())
    far, _ = highest(upper_ratio=9.0)
    assert bool((far > 0.95).all()) and bool((far <= 1).all())


@pytest.mark.parametrize("points,weight", [(6, 1.0), (3, 0.5)])
def test_terms_are_weighted_by_their_counts(backbone, batch, points, weight, monkeypatch):
    """And the denoiser is told levels of the training table alone."""
    algorithm = soar(backbone, points=points, weight=weight)
    rollout = algorithm.rollout(batch, 0)
    told, plain = [], backbone.velocity
    monkeypatch.setattr(backbone, "velocity", lambda z, sigma, *a, **k: (told.extend(sigma.tolist()), plain(z, sigma, *a, **k))[1])
    with torch.no_grad():
        parts = list(algorithm.losses(rollout))
    assert len(told) == len(batch) * (1 + points) and set(told) <= set(schedule.training_table(algorithm.shift).tolist())
    main, extra = parts[0][1]["flow_matching"], [m["correction"] for _, m in parts[1:]]
    total, count = objective(parts)
    torch.testing.assert_close(total, (main + weight * sum(extra)) / (1 + weight * points))
    assert count == len(extra) + 1 == SOAR.backwards({"points": points, "weight": weight}, range(4, 5))


@pytest.mark.parametrize("options", [{"points": 0}, {"weight": 0.0}])
def test_finetuning_is_the_case_without_auxiliary_points(backbone, batch, options):
    algorithm = soar(backbone, **options)
    rollout = algorithm.rollout(batch, 0)
    z, sigma = rollout.states[0]
    noise = (z - (1 - sigma.view(-1, 1, 1, 1)) * batch.clean) / sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        total, count = objective(algorithm.losses(rollout))
        expected = (backbone.velocity(z, sigma, batch.text) - (noise - batch.clean)).square().mean()
    torch.testing.assert_close(total, expected)
    assert count == 1 == SOAR.backwards(options, range(4, 5))


def test_ranked_pairs_put_the_better_one_first(monkeypatch):
    first, second = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 3, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(images, "preference_pairs", lambda *_: (first, second, ["a", "b"], torch.tensor([True, False])))
    pairs, prompts = images.ranked_pairs(2)
    assert pairs.shape == (2, 2, 3, 4, 4) and pairs[:, 0, 0, 0, 0].tolist() == [0, 1] and prompts == ["a", "b"]


SOAR_JOB = (
    "algorithm._target_=rlstitch.algorithms.soar.SOAR",
    "algorithm.points=2",
    "data.images._target_=tests.pictures.tiny",
    "data.prompts=nowhere.txt",  # ignored, as documented
)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_soar_runs_and_resumes_bit_for_bit(world, ranks):  # noqa: F811
    recipe, whole, halves = pictures.without_reward(world), f"soar{ranks}", f"soar{ranks}-halves"
    for run, updates in ((whole, 4), (halves, 2), (halves, 4)):
        code, output = start(world, f"name={run}", f"updates={updates}", *SOAR_JOB, ranks=ranks, recipe=recipe)
        assert code == 0, output
    assert rows(world, whole) == rows(world, halves)
    a, b = weights(world, whole), weights(world, halves)
    assert all(torch.equal(a[k], b[k]) for k in a)
    last = rows(world, whole)[-1]
    assert last["grad_norm"] > 0 and last["loss"] > 0 and last["rewards"] == {} and not {"reward", "stop", "sigma"} & last.keys()
    assert "The loss while training" in (world / "runs" / whole / "report.html").read_text()
    assert "clip" in json.loads((world / "runs" / whole / "summary.json").read_text())["eval"]["ema"]
    if ranks == 2:
        code, output = start(world, "name=soar1", "updates=4", *SOAR_JOB, recipe=recipe)
        assert code == 0, output
        for ours, theirs in zip(rows(world, whole), rows(world, "soar1"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


FAULTS = {
    "a reward that nobody asks": ("recipe.yaml", SOAR_JOB, "'oracle' is given, but rlstitch.algorithms.soar.SOAR asks no reward"),
    "no pictures": ("free.yaml", SOAR_JOB[:2], "'data.images' is missing"),
    "pictures for an algorithm that samples": ("recipe.yaml", SOAR_JOB[2:3], "'data.images' is given, but rlstitch.algorithms.draft.Draft"),
    "misspelt key": ("free.yaml", (*SOAR_JOB, "data.images.sed=3"), "unknown key 'data.images.sed' (did you mean 'seed'?)"),
    "ratio below 1": (
        "free.yaml",
        (*SOAR_JOB, "algorithm.upper_ratio=0.5"),
        "'algorithm.upper_ratio' must be at least 1, not 0.5: it multiplies sigma_0",
    ),
    "negative points": ("free.yaml", (*SOAR_JOB, "algorithm.points=-1"), "'algorithm.points' must not be negative, not -1"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_told_before_anything_loads(world, case):  # noqa: F811
    pictures.without_reward(world)
    recipe, overrides, expected = FAULTS[case]
    assert expected in refusal(world / recipe, *overrides)


def test_curated_pictures_are_the_best_looking_share_of_those_drawn():
    from rlstitch.shapes.images import curated
    from rlstitch.shapes.looks import looks

    (every, _), (best, prompts) = (curated(n, 3, keep) for n, keep in ((40, 1.0), (10, 0.25)))
    assert best.shape == (10, 3, 64, 64) and best.dtype == torch.uint8 and len(prompts) == 10
    expected = looks(every.float() / 255).sort().values[-10:]
    torch.testing.assert_close(looks(best.float() / 255).sort().values, expected)


def test_pairs_given_for_pictures_are_refused_in_one_message(world):  # noqa: F811
    recipe = pictures.without_reward(world)
    code, output = start(world, "name=bad", *SOAR_JOB, "data.images._target_=tests.pictures.tiny_pairs", recipe=recipe)
    assert code == 2 and "gives [8, 2, 3, 16, 16]" in output and "images.scenes" in output and "Traceback" not in output


def test_the_recipes_pass_every_check_and_differ_in_the_points():
    from rlstitch.checks import checked
    from rlstitch.config import compose

    soar, sft = (checked(compose(name), name) for name in ("soar", "sft"))
    assert soar.algorithm | {"points": 0} == sft.algorithm and soar.data == sft.data and soar.optimiser == sft.optimiser


def test_stages_of_a_run_on_pictures_have_no_prompts_of_their_own():
    from rlstitch.checks import checked
    from rlstitch.config import compose, merge

    with pytest.raises(UserError, match="stage '2' has prompts of its own, but the run learns from the pictures") as caught:
        checked(merge(compose("soar"), {"stages": [{"updates": 1}, {"updates": 2, "prompts": "shapes:held_out.jsonl"}]}), "soar")
    assert "1 fault:" in str(caught.value)
