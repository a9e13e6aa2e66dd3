"""DRaFT and the oracles: the loss by hand, the gradient by finite differences, who is allowed to score what."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from rlstitch import sampling, schedule
from rlstitch.algorithms.draft import Draft
from rlstitch.figures import known
from rlstitch.metrics import peak_megabytes
from rlstitch.oracles import MonteCarlo, Stitched, Terminal, Tweedie, Weighted, recomputed
from rlstitch.policy import REFERENCE
from rlstitch.types import Batch, Latent, UserError, noise_like
from tests.test_policy import nudge, policy_on
from tests.test_stitch import stitched

GRID = schedule.sigmas(4, 3.0, "plain")


@pytest.fixture
def setup(backbone, reward):
    value = stitched(backbone, reward)[0].requires_grad_(False)
    policy = policy_on(backbone)
    nudge(policy)
    prompts = ["a red circle", "two stars"]
    batch = Batch(prompts, torch.arange(2), torch.tensor([11, 12]), [{}, {}], backbone.encode_prompts(prompts))
    oracles = {"stitched": Stitched({"clip": value}, {"clip": 2.0}), "terminal": Terminal(backbone, {"clip": reward}, {"clip": 2.0})}
    return backbone, policy, batch, oracles


def run(algorithm, batch, stop):
    rollout = algorithm.rollout(batch, stop)
    rollout.scores = algorithm.score(rollout)
    ((loss, metrics),) = algorithm.losses(rollout)
    return loss, metrics, rollout


@pytest.mark.parametrize("oracle,stop,steps", [("stitched", 2, 1), ("terminal", 4, 3)])
def test_loss_is_minus_the_reward_plus_the_deviation(setup, oracle, stop, steps):
    """The deviation is the mean over all of the K steps with gradient."""
    backbone, policy, batch, oracles = setup
    loss, metrics, rollout = run(
        Draft(backbone, policy, oracles[oracle], GRID, grad_steps=steps, regulariser=0.5, guidance=2.0), batch, stop
    )
    apart, velocity = [], backbone.bind(batch.text, 2.0)
    with torch.no_grad():
        start = noise_like(backbone.latent_shape, batch.seeds)
        latent = sampling.sample(velocity, start, GRID, stop=stop)
        reward = 2.0 * oracles[oracle](latent, batch)[:, 0]
        for k in range(stop - steps, stop):
            before = sampling.sample(velocity, start, GRID, stop=k)
            v = velocity(before.z, before.sigma)
            with policy.use(REFERENCE):
                apart.append((v - velocity(before.z, before.sigma)).square().mean())
    deviation = torch.stack(apart).mean()
    assert deviation > 0 and (steps == 1 or abs(apart[-1] / deviation - 1) > 0.01)
    assert loss.item() == pytest.approx((-reward.mean() + 0.5 * deviation).item(), rel=1e-4)
    assert metrics["deviation"].item() == pytest.approx(deviation.item(), rel=1e-4)
    half = Draft(backbone, policy, oracles[oracle], GRID, regulariser=0.0).losses(
        SimpleNamespace(scores=torch.tensor([[torch.nan], [3.0]]))
    )
    assert next(half)[0].item() == -3.0  # of weight 2: the mean is over both samples, whatever is known


@pytest.mark.parametrize("oracle,stop,k", [("stitched", 3, 2), ("terminal", 4, 1)])
def test_gradient_by_finite_differences_on_one_lora_direction(setup, oracle, stop, k):
    """With k gradient steps only the last k feel the parameter; the finite difference replays just those."""
    backbone, policy, batch, oracles = setup
    algorithm = Draft(backbone, policy, oracles[oracle], GRID, grad_steps=k, regulariser=0.0)
    loss, _, rollout = run(algorithm, batch, stop)
    loss.backward()
    p = max(policy.parameters(), key=lambda q: q.grad.abs().sum())
    direction = p.grad / p.grad.norm()
    entry = rollout.states[0][0]

    def outcome(h):
        with torch.no_grad():
            p.add_(h * direction)
            z = entry
            for j in range(stop - k, stop):
                z = sampling.euler(
                    z, backbone.velocity(z, torch.full((2,), float(GRID[j])), batch.text), float(GRID[j]), float(GRID[j + 1])
                )
            value = -2.0 * oracles[oracle](Latent(z, torch.full((2,), float(GRID[stop]))), batch)[:, 0].mean()
            p.sub_(h * direction)
        return value.double()

    h = 2e-2
    assert ((outcome(h) - outcome(-h)) / (2 * h)).item() == pytest.approx(p.grad.norm().item(), rel=2e-2)


@pytest.mark.parametrize("oracle, stop, k", [("stitched", 3, 2), ("terminal", 4, 2), ("tweedie", 3, 0)])
def test_checkpointing_changes_nothing_but_the_memory(setup, reward, oracle, stop, k, monkeypatch):
    """Denoiser, decoder, reward, prefix and tail run again in the backward pass, the last four a row at a time, in the same precision and by the same adapter."""
    backbone, policy, batch, oracles = setup
    oracles["tweedie"] = Tweedie(backbone, {"clip": reward}, {"clip": 2.0})
    batch = Batch(batch.prompts * 2, batch.group.repeat(2), torch.arange(4), [{}] * 4, batch.text[torch.arange(2).repeat(2)])
    algorithm = Draft(backbone, policy, oracles[oracle], GRID, grad_steps=k, guidance=2.0, regulariser=0.1 if k else 0.0)
    grads, held, seen, rows, velocity, score = [], [], [], [], backbone.velocity, reward.score
    monkeypatch.setattr(
        backbone, "velocity", lambda *a, **o: (seen.append((torch.is_autocast_enabled("cpu"), policy.active)), velocity(*a, **o))[1]
    )
    monkeypatch.setattr(reward, "score", lambda images, batch: (rows.append(len(images)), score(images, batch))[1])

    def update(on, autocast=False):
        backbone.checkpoint_activations(on)
        kept: list[int] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            loss = run(algorithm, batch, stop)[0]
        held.append(sum(kept))
        return torch.autograd.grad(loss, policy.parameters())

    for on in (False, True):
        grads.append(update(on))
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)
    assert any(bool(g.any()) for g in grads[0]) and held[1] < 0.5 * held[0]
    assert rows == ([] if oracle == "stitched" else [4] + [1] * 8)  # with gradient once, then each row forward and backward
    seen.clear()
    half = update(True, autocast=True)
    assert {precise for precise, _ in seen} == {True} and {name for _, name in seen} == {"default"} | ({"reference"} if k else set())
    cosine = torch.nn.functional.cosine_similarity(*(torch.cat([g.flatten() for g in x]) for x in (half, grads[0])), dim=0)
    assert cosine > 0.98
    if oracle == "tweedie":
        assert len(seen) == stop + 2 * len(batch)  # each row's velocity once forward, once backward


def test_recomputed_scores_hold_one_rows_graph_at_a_time(setup):
    backbone, _, batch, oracles = setup
    batch, z = batch.interleave(2), torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def graph(ask):
        return lambda: torch.autograd.grad(ask(oracles["terminal"], Latent(z, torch.zeros(4)), batch).sum(), z)[0]

    ways = [graph(recomputed), graph(lambda oracle, latent, batch: oracle(latent, batch))]
    torch.testing.assert_close(ways[0](), ways[1](), atol=1e-6, rtol=1e-5)
    a_row, whole = map(peak_megabytes, ways)
    assert a_row < 0.5 * whole


@pytest.mark.parametrize("oracle, stop", [("terminal", 4), ("stitched", 2)])
def test_variance_reduction_by_hand(setup, oracle, stop):
    """DRaFT-LV: the stopped latent noised twice to the last step's level, each copy denoised once with gradient, scores averaged over the three."""
    backbone, policy, batch, oracles = setup
    loss, _, rollout = run(Draft(backbone, policy, oracles[oracle], GRID, variance_reduction=2, regulariser=0.0), batch, stop)
    high, low, text = float(GRID[stop - 1]), float(GRID[stop]), batch.text
    with torch.no_grad():
        start = noise_like(backbone.latent_shape, batch.seeds)
        before = sampling.sample(backbone.bind(text), start, GRID, stop=stop - 1).z
        stopped = sampling.sample(backbone.bind(text), start, GRID, stop=stop).z
    scores = []
    for k in range(3):
        if k == 0:
            z = before
        else:  # z_high = a z_low + s noise, the path's own noising from low to high
            a, noise = (1 - high) / (1 - low), noise_like(backbone.latent_shape, batch.seeds, stream=k)
            z = a * stopped + (high**2 - (a * low) ** 2) ** 0.5 * noise
        z = z + (low - high) * backbone.velocity(z, torch.full((2,), high), text)
        scores.append(2.0 * oracles[oracle](Latent(z, torch.full((2,), low)), batch)[:, 0])
    torch.testing.assert_close(2.0 * rollout.scores[:, 0], torch.stack(scores).mean(0), rtol=1e-4, atol=1e-5)
    expected = -torch.stack(scores).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and torch.stack(scores).mean(1).std() > 0
    ours, theirs = (torch.autograd.grad(x, policy.parameters()) for x in (loss, expected))
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)


class Holed:
    """A reward without a score for every other picture: 0 / 0 is computed for it, whose slope is NaN, or nothing is. `inner`: what scores the others."""

    differentiable, device = True, torch.device("cpu")

    def __init__(self, inner, divides=True):
        self.inner, self.divides = inner, divides

    def score(self, x, batch):
        holes = torch.arange(len(x)) % 2 == 0
        if self.divides:
            nothing = 0 * x.flatten(1).sum(1)
            return self.inner(x, batch) + torch.where(holes, nothing / (nothing + ~holes), 0.0)
        out = torch.full((len(x),), torch.nan)
        out[~holes] = self.inner(x[~holes], batch[1::2])
        return out

    score_embedding = score


@pytest.mark.parametrize(
    "kind,stop,weight", [("terminal", 4, 1.0), ("stitched", 2, 1.0), ("refl", 3, 1.0), ("terminal", 4, 0.0), ("stitched", 2, 0.0)]
)
def test_a_sample_without_a_score_adds_only_the_regulariser(setup, reward, kind, stop, weight, monkeypatch):
    """Whatever its reward does to reach no score, the update is that of a reward that never computes it, half that of the other sample alone; a reward that is
    only looked at (weight 0) may fail as it likes."""
    backbone, policy, batch, oracles = setup
    model = oracles["stitched"].models[0]
    options = {"grad_steps": 0, "regulariser": 0.0} if kind == "refl" else {"grad_steps": 1, "regulariser": 0.0}

    def gradient(divides, rows=slice(0, 2)):
        holed, weights = (
            Holed(model.reward.score_embedding if kind == "stitched" else reward.score, divides),
            {"holed": weight, "clip": 1.0 - weight},
        )
        if kind == "stitched":
            other = copy.copy(model)
            other._modules = model._modules
            other.__dict__["reward"] = holed
            oracle = Stitched({"holed": other, "clip": model}, weights)
        else:
            oracle = (Tweedie if kind == "refl" else Terminal)(backbone, {"holed": holed, "clip": reward}, weights)
        method = Draft(backbone, policy, oracle, GRID, **options)
        rollout = method.rollout(batch[rows], stop)
        rollout.scores = known(method.score(rollout))
        ((loss, metrics),) = method.losses(rollout)
        return torch.autograd.grad(loss, policy.parameters()), metrics

    ours, metrics = gradient(True)
    never, _ = gradient(False)
    assert metrics["masked"].tolist() == [weight, 0] and metrics["reward"].isnan().tolist() == [weight == 1, False]
    assert sum(float(g.abs().sum()) for g in ours) > 0
    for one, two in zip(ours, never):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-4)


def test_oracles(setup, reward):
    backbone, policy, batch, oracles = setup
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    clean, noisy = Latent(z, torch.zeros(2)), Latent(z, torch.full((2,), float(GRID[2])))
    with pytest.raises(UserError, match="sigma = 0"):
        oracles["terminal"](noisy, batch)
    with policy.use(REFERENCE), torch.no_grad():
        tweedie = Tweedie(backbone, {"clip": reward}, {"clip": 1.0})
        v = backbone.velocity(z, noisy.sigma, batch.text)
        direct = reward.score(backbone.decode(z - noisy.sigma[:, None, None, None] * v), batch)
        torch.testing.assert_close(tweedie(noisy, batch)[:, 0], direct)
        null = Tweedie(backbone, {"clip": reward}, {"clip": 1.0}, prompt=False)(noisy, batch)
        assert not torch.allclose(null[:, 0], direct)
        carlo = MonteCarlo(backbone, {"clip": reward}, {"clip": 1.0}, rollouts=2, num_steps=3)
        torch.testing.assert_close(carlo(clean, batch)[:, 0], reward.score(backbone.decode(z), batch))
        each = carlo.each(noisy, batch)
        assert torch.equal(each, carlo.each(noisy, batch)) and carlo(noisy, batch).shape == (2, 1) and not torch.allclose(each[0], each[1])
        apart = [
            carlo.each(Latent(z[k : k + 1], noisy.sigma[:1]), batch[k : k + 1]) for k in range(2)
        ]  # as other ranks or micro-batches have them
        torch.testing.assert_close(torch.cat(apart, 1), each, atol=1e-5, rtol=0)
        twice = carlo.each(Latent(z[:1].repeat(2, 1, 1, 1), noisy.sigma), dataclasses.replace(batch, prompts=[batch.prompts[0]] * 2))
        assert not torch.allclose(twice[:, 0], twice[:, 1])  # each sample has noise of its own
        other = MonteCarlo(backbone, {"clip": reward}, {"clip": 1.0}, rollouts=2, num_steps=3, seed=1)
        assert not torch.allclose(other.each(noisy, batch), each)
        told, plain, start = [], backbone.velocity, float(GRID[2])
        backbone.velocity = lambda z, sigma, *a, **k: (told.append(float(sigma[0])), plain(z, sigma, *a, **k))[1]
        MonteCarlo(backbone, {"clip": reward}, {"clip": 1.0}, rollouts=1, num_steps=9)(noisy, batch)
        below = [s for s in schedule.sigmas(9, 3.0, "plain").tolist() if 0 < s < start]
        assert told == pytest.approx([start, *below]) and len(below) > 3  # every level of its grid from there on
        both = Weighted([oracles["stitched"], tweedie], [0.5, 3.0])
        scores = both(noisy, batch)
        torch.testing.assert_close(both.total(scores), 0.5 * oracles["stitched"].total(scores[:, :1]) + 3.0 * scores[:, 1])


def test_oracles_together_answer_where_all_of_them_do():
    models = {"a": SimpleNamespace(sigma_range=(0.0, 0.8)), "b": SimpleNamespace(sigma_range=(0.1, 0.9))}
    one, two = (Stitched({name: model}, {name: 1.0}) for name, model in models.items())
    assert Stitched(models, {"a": 1.0, "b": 1.0}).sigma_range == Weighted([one, two], [1.0, 1.0]).sigma_range == (0.1, 0.8)
    z = torch.ones(2, 3, requires_grad=True)  # only a row without a total has no gradient: a reward of weight 0 may fail
    scores = Terminal(None, dict.fromkeys("ab"), {"a": 1.0, "b": 0.0}).asked(
        lambda z: torch.stack([z.sum(1) + torch.tensor([0.0, torch.nan]), torch.full((2,), torch.nan)], 1), z
    )
    assert torch.autograd.grad(scores[:, 0].sum(), z)[0].tolist() == [[1.0] * 3, [0.0] * 3]


def test_recipe_faults():
    assert Draft.faults({"grad_steps": 3}, range(3, 8)) == []
    assert "earliest stop" in Draft.faults({"grad_steps": 4}, range(3, 8))[0]
    assert "DRaFT-LV" in Draft.faults({"grad_steps": 2, "variance_reduction": 2}, range(5, 6))[0]


def test_refl_learns_through_the_tweedie_oracle_alone(setup):
    """grad_steps=0: loss = mean max(ceiling - r(D(z - sigma v)), 0), and the gradient is that of the one velocity of the estimate."""
    backbone, policy, batch, oracles = setup
    oracle = Tweedie(backbone, {"clip": oracles["terminal"].rewards["clip"]}, {"clip": 1.0})
    loss, _, rollout = run(Draft(backbone, policy, oracle, GRID, grad_steps=0, ceiling=2.0, regulariser=0.0), batch, 3)
    z, sigma = rollout.latent.z, rollout.latent.sigma
    assert not z.requires_grad
    got = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
    v = backbone.velocity(z, sigma, batch.text)
    images = backbone.decode(schedule.posterior_mean(z, v, sigma))
    by_hand = (2.0 - oracle.rewards["clip"].score(images, batch)).clamp(min=0).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    wanted = torch.autograd.grad(by_hand, policy.parameters(), allow_unused=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, wanted) if b is not None)
    assert sum(float(g.abs().sum()) for g in got if g is not None) > 0


def test_a_ceiling_below_the_reward_leaves_nothing_to_learn(setup):
    backbone, policy, batch, oracles = setup
    loss, _, _ = run(Draft(backbone, policy, oracles["stitched"], GRID, ceiling=-1e3, regulariser=0.0), batch, 3)
    assert loss.item() == 0


@pytest.mark.parametrize("truncation,mean", [("uniform", 2.5), ("gaussian", 2.0)])
def test_randomised_truncation(setup, truncation, mean):
    """AlignProp's K: within 1..stop, the same for all samples of an update, with the stated mean; and it is what the rollout records."""
    backbone, policy, batch, oracles = setup
    algorithm = Draft(backbone, policy, oracles["terminal"], GRID, grad_steps=2, truncation=truncation, grad_steps_std=0.7)

    def at(update):
        return Batch(batch.prompts, batch.group, torch.tensor([0, 1]) + update * 1_000_000, batch.facts, batch.text)

    drawn = [algorithm.depth(at(update), 4) for update in range(600)]
    assert set(drawn) <= {1, 2, 3, 4} and len(set(drawn)) > 2
    expected = mean if truncation == "uniform" else 1.6  # int() rounds down, and draws below 1 are drawn again
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.2)
    odd = next(u for u in range(600) if drawn[u] == 3)
    assert len(algorithm.rollout(at(odd), 4).states) == 3
    assert algorithm.depth(at(odd), 4) == algorithm.depth(at(odd)[slice(1, 2)], 4)


def test_draft_faults():
    assert not Draft.faults({"grad_steps": 2, "truncation": "gaussian"}, range(10, 11))
    assert "Tweedie" in Draft.faults({"grad_steps": 11}, range(10, 11))[0]
    assert "regulariser" in Draft.faults({"grad_steps": 0}, range(6, 10))[0]
    assert "DRaFT-LV" in Draft.faults({"variance_reduction": 2, "truncation": "uniform"}, range(10, 11))[0]
