"""DiffusionNFT: advantages, loss and solver by hand and in closed form; the job on pixel rewards and on stitched values, resumed."""

from types import SimpleNamespace

import pytest
import torch

from rlstitch import losses, sampling, schedule
from rlstitch.advantages import dead_groups, group_normalise, of_samples
from rlstitch.algorithms.nft import NFT as NFTMethod
from rlstitch.algorithms.nft import Slot
from rlstitch.policy import Policy
from rlstitch.types import Batch, noise_like
from tests.test_schedule import velocity as gaussian_velocity
from tests.test_train import rows, start, weights, world  # noqa: F401  (a fixture)

NAN = float("nan")


def test_advantages_by_hand():
    scores, groups = torch.tensor([[1.0], [3.0], [10.0], [20.0]]), torch.tensor([7, 7, 2, 2])
    spread = scores.double().std(unbiased=False).item()
    torch.testing.assert_close(group_normalise(scores, groups)[:, 0], torch.tensor([-1.0, 1.0, -5.0, 5.0]) / (spread + 1e-4))
    torch.testing.assert_close(
        group_normalise(scores, groups, spread="group")[:, 0], torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=2e-4, rtol=0
    )
    with pytest.raises(ValueError, match="'batch'"):
        group_normalise(scores, groups, spread="batch")


def test_unknown_scores_are_masked_and_never_zero():
    scores, groups = torch.tensor([[1.0, NAN], [3.0, 5.0], [NAN, 5.0], [7.0, 9.0]]), torch.tensor([0, 0, 0, 1])
    for spread in ("global", "group"):
        a = group_normalise(scores, groups, spread=spread)
        assert torch.equal(torch.isnan(a), torch.isnan(scores))
        assert a[0, 0] == -a[1, 0] != 0 and a[1, 1] == a[2, 1] == 0 and a[3].tolist() == [0, 0]
    assert dead_groups(scores[:, 0], groups) == 0.5 and dead_groups(scores[:, 1], groups) == 1.0
    assert dead_groups(torch.tensor([1.0, 2.0, NAN, NAN, NAN, 3.0]), torch.tensor([0, 0, 1, 1, 2, 2])) == pytest.approx(
        2 / 3
    )  # none, or one, known


def test_groups_split_over_ranks_give_the_same_advantages(generator):
    scores, groups = torch.randn(24, 2, generator=generator), torch.arange(6).repeat(4)  # a group's samples lie on different ranks
    whole = group_normalise(scores, groups)
    order = torch.randperm(24, generator=generator)
    torch.testing.assert_close(group_normalise(scores[order], groups[order]), whole[order])


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_the_minimiser_of_nft(w, generator):
    old, target = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    beta, v = 0.4, torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([v], lr=1, max_iter=100, tolerance_grad=1e-12)

    def closure():
        optimiser.zero_grad()
        loss = losses.nft(v, old, target, torch.tensor([w]), beta, torch.tensor([0.5]), adaptive=False).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(v.detach(), old + (2 * w - 1) / beta * (target - old), atol=1e-4, rtol=1e-4)


def test_the_adaptive_loss_is_the_released_one_on_x0(generator):
    """|x0+ - x0|^2 / mean|x0+ - x0| with x0+ = z - t v+, each over the mean of all but the batch, by hand; its gradient leaves the denominator alone."""
    z0, noise, v, old = torch.randn(4, 3, 2, 4, 4, generator=generator)
    v.requires_grad_()
    t, w, beta = torch.tensor([0.2, 0.6, 0.95]), torch.tensor([0.1, 0.5, 0.9]), 0.7
    z = schedule.interpolate(z0, noise, t)
    by_hand = slope = 0.0
    for share, sign, mixed in ((w, 1, (1 - beta) * old + beta * v), (1 - w, -1, (1 + beta) * old - beta * v)):
        error = (schedule.posterior_mean(z, mixed, t) - z0).detach()
        size = error.abs().mean((1, 2, 3))
        by_hand = by_hand + share * error.square().mean((1, 2, 3)) / size / beta
        slope = slope - sign * (share * t / size).view(-1, 1, 1, 1) * 2 * error / error[0].numel()
    loss = losses.nft(v, old, noise - z0, w, beta, t)
    torch.testing.assert_close(loss.detach(), by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), v)[0], slope, rtol=1e-4, atol=1e-6)
    near = losses.nft(torch.full((1, 4), 1e-6), torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1), 1.0, t[1:2])  # errors below the floor
    torch.testing.assert_close(near, torch.tensor([0.6 * 1e-12 / (1e-5 / 0.6)]), rtol=1e-4, atol=0)


def test_gradient_variance_near_the_stop_stays_bounded(generator):
    """As sigma -> tau the bridge's target explodes: the plain loss's gradient with it, the adaptive one's not."""
    tau, n, z_tau = 0.6, 4000, torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    spread = {}
    for adaptive in (True, False):
        for margin in (0.2, 0.01, 0.0001):
            v = torch.zeros(n, 8, requires_grad=True)
            sigma = torch.full((n,), tau + margin)
            _, target = schedule.bridge(z_tau, tau, sigma, torch.randn(n, 8, generator=generator))
            losses.nft(v, torch.zeros(n, 8), target, torch.ones(n), 1.0, sigma, adaptive=adaptive).sum().backward()
            spread[adaptive, margin] = float(v.grad.var(0).mean())
    assert spread[False, 0.0001] > 100 * spread[False, 0.2]
    assert spread[True, 0.0001] < 2 * spread[True, 0.2]


def method(policy=None, backbone=None, **options):
    return NFTMethod(backbone, policy, None, schedule.sigmas(10, 3.0, "plain"), **options)


@pytest.mark.parametrize(
    "decay, by_hand",
    [
        ("none", {1: 0.0, 75: 0.0, 600: 0.0}),
        ("slow", {1: 0.001, 75: 0.075, 499: 0.499, 600: 0.5}),
        ("late", {1: 0.0, 74: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 300: 0.999}),
    ],
)
def test_how_the_old_policy_follows(decay, by_hand):
    seen = []
    nft = method(policy=SimpleNamespace(update_old=seen.append), old_decay=decay)
    for update in by_hand:
        nft.end_step(update - 1)
    assert seen == pytest.approx(list(by_hand.values()))


def test_training_times_lie_above_the_stop_without_repeats_and_belong_to_the_seed():
    grid, seeds = schedule.sigmas(10, 3.0, "plain"), torch.arange(50)
    above = grid[grid > float(grid[6]) + 1e-6]
    drawn = schedule.draw_above(grid, float(grid[6]), seeds, 4, stream=13)
    assert drawn.shape == (50, 4) and all(len(set(row.tolist())) == 4 for row in drawn)
    assert set(drawn.flatten().tolist()) == set(above.tolist())  # sigma = 1 is among them, the stop is not
    assert torch.equal(drawn[7], schedule.draw_above(grid, float(grid[6]), seeds[7:8], 4, stream=13)[0])
    assert not torch.equal(drawn, schedule.draw_above(grid, float(grid[6]), seeds, 4, stream=14))
    assert NFTMethod.backwards({}, range(40, 41)) == 39 and NFTMethod.backwards({"times": 4}, range(40, 41)) == 4


@pytest.fixture
def moved(backbone):
    """A policy away from its base, and a batch of two samples of one prompt."""
    policy = Policy(backbone.transformer, rank=2, alpha=4.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9, old=True)
    for n, p in policy.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    text = backbone.encode_prompts(["a red circle"] * 2)
    return policy, Batch(["a red circle"] * 2, torch.zeros(2, dtype=torch.long), torch.arange(2), [{}] * 2, text)


@pytest.fixture
def asked(backbone, moved, monkeypatch):
    """The adapter of every call of the denoiser."""
    policy, calls, velocity = moved[0], [], backbone.velocity
    monkeypatch.setattr(backbone, "velocity", lambda *a, **k: (calls.append(policy.active), velocity(*a, **k))[1])
    return calls


def test_the_rollout_is_the_old_policys(backbone, moved, asked):
    policy, batch = moved
    z = method(policy, backbone, solver="euler").rollout(batch, 4).latent.z
    assert set(asked) == {"old"}
    start, grid, ends = noise_like(backbone.latent_shape, batch.seeds), schedule.sigmas(10, 3.0, "plain"), {}
    for name in ("old", "default"):
        with policy.use(name), torch.no_grad():
            ends[name] = sampling.sample(backbone.bind(batch.text), start, grid, stop=4).z
    assert torch.equal(z, ends["old"]) and (z - ends["default"]).abs().max() > 0.01


def test_weights_and_the_loss_carry_the_clip_as_released(generator):
    """w = (clip(A, -c, c) / c + 1) / 2, and c in front of the loss, so that c w / beta is A's own scale whatever c is."""
    nft = method(clip=2.0, beta=0.4)
    torch.testing.assert_close(nft.weigh(torch.tensor([-9.0, -1.0, 0.0, 1.5, 3.0])), torch.tensor([0.0, 0.25, 0.5, 0.875, 1.0]))
    scores, groups = torch.tensor([[1.0, 2.0], [4.0, 1.0], [0.0, 9.0], [9.0, 3.0]]), torch.tensor([0, 0, 1, 1])
    oracle = SimpleNamespace(weights=[1.0, 3.0], total=lambda s: s @ torch.tensor([1.0, 3.0]))
    for spread, per_reward in (("group", False), ("global", True)):
        nft = NFTMethod(None, None, oracle, None, clip=2.0, beta=0.4, spread=spread, per_reward=per_reward)
        wanted, _ = of_samples(oracle, scores, groups, spread=spread, per_reward=per_reward)
        torch.testing.assert_close(nft.compare([], scores, groups)[0], (wanted + 2) / 4)
    v, old, target = torch.randn(3, 3, 1, 2, 2, generator=generator)
    sigma, w, share = torch.tensor([0.2, 0.6, 0.9]), torch.tensor([0.3, 0.5, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    by_hand = 2.0 * (share * losses.nft(v, old, target, w, 0.4, sigma)).sum() / 3
    torch.testing.assert_close(nft.policy_loss(Slot(sigma, v, old, target, None), w, share), by_hand)


def test_an_old_policy_that_is_a_copy_is_not_asked_again(backbone, moved, asked):
    """The same loss and gradient as by its forward: where every update ends with a copy, current and old policy are one."""
    policy, batch = moved
    policy.update_old(0.0)
    found = {}
    for decay in ("none", "slow"):
        nft = method(policy, backbone, kl=0.0, old_decay=decay)
        rollout = nft.rollout(batch, 4)
        asked.clear()
        ((loss, _),) = list(nft.losses(rollout, torch.tensor([0.2, 0.9]), 1))
        found[decay] = [loss, *torch.autograd.grad(loss, policy.parameters())]
        assert asked == (["default"] if decay == "none" else ["old", "default"])
    torch.testing.assert_close(found["none"], found["slow"])
    assert any(bool(g.any()) for g in found["none"][1:])


def test_the_base_is_not_asked_where_there_is_no_kl_and_the_kl_is_the_mean_square(backbone, moved, asked):
    policy, batch = moved
    for kl in (0.0, 0.5):
        nft = method(policy, backbone, kl=kl, guidance=2.0)
        rollout = nft.rollout(batch, 4)
        asked.clear()
        ((loss, metrics),) = list(nft.losses(rollout, torch.tensor([0.2, float("nan")]), 1))
        assert asked == (["old", "default"] if not kl else ["old", "reference", "default"])
    sigma = nft.levels(rollout, 1)[:, 0]
    z, _ = schedule.bridge(rollout.latent.z, rollout.latent.sigma, sigma, noise_like(backbone.latent_shape, batch.seeds, stream=101))
    with torch.no_grad():
        current = backbone.velocity(z, sigma, batch.text, guidance=2.0)
        with policy.use("reference"):
            base = backbone.velocity(z, sigma, batch.text, guidance=2.0)
    by_hand = (current - base).square().mean((1, 2, 3))[0] / 2  # the sample without a score takes no part
    torch.testing.assert_close(metrics["deviation"], by_hand, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss.detach(), metrics["policy_loss"] + 0.5 * by_hand, rtol=1e-4, atol=1e-7)
    for k, slot in enumerate(nft.slots(rollout, 3)):  # each time has its own level and its own noise
        assert torch.equal(slot.sigma, nft.levels(rollout, 3)[:, k])
        noise = noise_like(backbone.latent_shape, batch.seeds, stream=101 + k)
        torch.testing.assert_close(slot.target, schedule.bridge(rollout.latent.z, rollout.latent.sigma, slot.sigma, noise)[1])


def test_dpm2_is_second_order_and_euler_first_on_a_gaussian():
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def velocity(z, sigma):
        return gaussian_velocity(z, sigma[:, None].double())

    def end(solver, n):
        return solver(velocity, z, schedule.sigmas(n, 1.0, "plain"), stop=int(0.8 * n)).z.double()

    exact = end(sampling.sample, 20_000)
    errors = {s: [float((end(s, n) - exact).abs().max()) for n in (20, 40, 80)] for s in (sampling.sample, sampling.sample_dpm2)}
    first, second = errors.values()
    assert first[0] / first[2] == pytest.approx(4, rel=0.3)
    assert second[0] / second[2] > 9 and second[2] < 0.3 * first[2]
    rough = schedule.sigmas(8, 1.0, "plain")
    before, done = sampling.sample_dpm2(velocity, z, rough, stop=7), sampling.sample_dpm2(velocity, z, rough)
    torch.testing.assert_close(done.z, before.z - rough[7].double() * velocity(before.z, before.sigma))  # the step to 0 is Euler's
    with pytest.raises(ValueError, match="1..4"):
        sampling.sample_dpm2(velocity, z, schedule.sigmas(4, 1.0, "plain"), stop=5)


NFT = (
    "algorithm._target_=rlstitch.algorithms.nft.NFT",
    "algorithm.beta=0.5",
    "algorithm.times=2",
    "batch.prompts_per_update=2",
    "batch.images_per_prompt=4",
    "batch.micro_batch=2",
)
PIXEL = ("oracle._target_=rlstitch.oracles.Terminal", "stop._target_=rlstitch.stops.End")


@pytest.mark.parametrize("oracle", [(), PIXEL], ids=["stitched", "terminal"])
def test_nft_runs_and_resumes_bit_for_bit(world, oracle):  # noqa: F811
    name = "nft-pixel" if oracle else "nft-stitch"
    for run, updates in ((name, 4), (f"{name}-halves", 2), (f"{name}-halves", 4)):
        code, output = start(world, f"name={run}", f"updates={updates}", *NFT, *oracle)
        assert code == 0, output
    assert rows(world, name) == rows(world, f"{name}-halves")
    whole, halves = weights(world, name), weights(world, f"{name}-halves")
    assert {k.split(".")[0] for k in whole} == {"raw", "ema", "old"} and all(torch.equal(whole[k], halves[k]) for k in whole)
    assert any(not torch.equal(whole[k], whole[k.replace("raw.", "old.", 1)]) for k in whole if k.startswith("raw."))
    last = rows(world, name)[-1]
    assert last["grad_norm"] > 0 and 0 <= last["dead_groups"] <= 1 and last["masked"] == 0


def test_two_ranks_do_what_one_does(world):  # noqa: F811
    """Also where the four images of the one prompt of an update are cut in two."""
    one_prompt = ("batch.prompts_per_update=1", "batch.micro_batch=2")
    for name, ranks in (("nft-one", 1), ("nft-two", 2)):
        code, output = start(world, f"name={name}", "updates=2", *NFT, *one_prompt, ranks=ranks)
        assert code == 0, output
    one, two = weights(world, "nft-one", 2), weights(world, "nft-two", 2)
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=2e-5, rtol=2e-3)


def test_faults_of_nft(world):  # noqa: F811
    code, output = start(world, "name=bad", *NFT, "algorithm.beta=0", "algorithm.times=9")
    assert code == 2 and "'algorithm.beta' must be positive" in output and "only 2 times lie above" in output
    code, output = start(world, "name=bad", *NFT, "algorithm.solver=heun")
    assert code == 2 and "'algorithm.solver' must be one of euler, dpm2, not 'heun'" in output
