"""Diffusion-DPO: loss and gradient by hand, pairing and masks, the bridge's weight; the job offline and online, on pixel rewards and stitched values, resumed."""

import math

import pytest
import torch

from rlstitch import losses, schedule
from rlstitch.algorithms.dpo import OfflineDPO, OnlineDPO
from rlstitch.data import resolve_geometry
from rlstitch.types import UserError
from tests import pictures
from tests.test_train import refusal, rows, start, weights, world  # noqa: F401  (a fixture)

NAN = float("nan")


def test_the_loss_by_hand():
    """One pair, one coordinate: |3-1|^2 - |2-1|^2 = 3 for the better, |1-0|^2 - |3-0|^2 = -8 for the worse."""
    v, reference, target = torch.tensor([[[3.0], [1.0]]]), torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[1.0], [0.0]]])
    loss, margin = losses.dpo(v, reference, target, beta=0.2, weight=torch.tensor([0.5]))
    assert float(margin) == pytest.approx(-0.2 / 2 * 0.5 * 11)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(0.55)))


def test_at_the_base_the_loss_is_log_2_and_the_gradient_takes_sides(generator):
    v, target = torch.randn(2, 3, 2, 4, 2, 2, generator=generator)
    moved = v.clone().requires_grad_()
    loss, margin = losses.dpo(moved, v, target, beta=7.0)
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)))
    loss.sum().backward()
    by_hand = 7.0 / 2 * 0.5 * 2 * (v - target) / 16
    torch.testing.assert_close(moved.grad[:, 0], by_hand[:, 0])  # towards the better one's target
    torch.testing.assert_close(moved.grad[:, 1], -by_hand[:, 1])  # away from the worse one's


def test_the_gradient_against_finite_differences(generator):
    v, reference, target = torch.randn(3, 1, 2, 5, generator=generator)
    moved, weight, step = v.clone().requires_grad_(), torch.tensor([0.6]), 1e-2
    losses.dpo(moved, reference, target, 1.5, weight)[0].sum().backward()
    for place in ((0, 0, 2), (0, 1, 4)):
        up, down = v.clone(), v.clone()
        up[place] += step
        down[place] -= step
        slope = (losses.dpo(up, reference, target, 1.5, weight)[0] - losses.dpo(down, reference, target, 1.5, weight)[0]) / (2 * step)
        assert float(moved.grad[place]) == pytest.approx(float(slope), abs=1e-4)


def test_bridge_variance_is_the_scatter_of_the_target(generator):
    """Measured given z_sigma, by regressing the target and the plain one on it; and 0 on the plain path."""
    tau, sigma, n = 0.5, 0.7, 400_000
    noise, more = torch.randn(2, n, generator=generator).double()
    z, target = schedule.bridge(tau * noise, tau, sigma, more)  # z0 = 0
    residual = target - z / sigma
    assert abs(float(residual.mean())) < 0.01 and abs(float((residual * z).mean())) < 0.01
    assert float(residual.var()) == pytest.approx(float(schedule.bridge_variance(tau, sigma)), rel=0.01)
    assert schedule.bridge_variance(0.0, torch.tensor([0.1, 1.0])).tolist() == [0.0, 0.0]


def test_the_gradient_stays_bounded_as_sigma_meets_tau(generator):
    tau, n, z_tau = 0.6, 2000, torch.randn(2000, 2, 8, generator=torch.Generator().manual_seed(1))
    spread = {}
    for weighted in (True, False):
        for margin in (0.2, 0.01, 0.0001):
            v, sigma = torch.zeros(n, 2, 8, requires_grad=True), torch.full((n,), tau + margin)
            _, target = schedule.bridge(z_tau, tau, sigma, torch.randn(n, 1, 8, generator=generator).expand(n, 2, 8))
            weight = 1 / (1 + schedule.bridge_variance(tau, sigma)) if weighted else torch.ones(n)
            losses.dpo(v, torch.zeros(n, 2, 8), target, 2.0, weight)[0].sum().backward()
            spread[weighted, margin] = float(v.grad.var(0).mean())
    assert spread[False, 0.0001] > 100 * spread[False, 0.2]
    assert max(spread[True, m] for m in (0.01, 0.0001)) < 2 * spread[True, 0.2]


def test_pairs_are_the_best_and_the_worst_that_are_known():
    algorithm = OnlineDPO(None, None, None, schedule.sigmas(4), images_per_prompt=3)
    total = torch.tensor([1.0, 3.0, 2.0, NAN, 5.0, 4.0, 7.0, 7.0, 7.0, NAN, NAN, 9.0, NAN, NAN, NAN])
    index, differ = algorithm.pairs(total)
    assert index[:2].tolist() == [[1, 0], [4, 5]] and differ.tolist() == [True, True, False, False, False]


def test_skipped_groups_and_unknown_scores_move_nothing(backbone):
    """The mean is over all groups, and a group without a pair adds neither loss nor gradient."""
    from rlstitch.policy import Policy
    from rlstitch.types import Batch, Latent, Rollout

    policy = Policy(backbone.transformer, rank=2, alpha=4, targets=backbone.lora_targets, seed=0, ema_decay=0.9)
    algorithm = OnlineDPO(backbone, policy, None, schedule.sigmas(4), images_per_prompt=2, beta=50.0)
    prompts = ["a red star"] * 2 + ["two blue circles"] * 2
    batch = Batch(prompts, torch.tensor([0, 0, 1, 1]), torch.arange(4), [{}] * 4, backbone.encode_prompts(prompts))
    z = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    rollout = Rollout(batch, Latent(z, torch.zeros(4)))

    def gradient(total):
        ((loss, metrics),) = algorithm.losses(rollout, total, 1)
        policy.transformer.zero_grad()
        loss.backward()
        return loss.item(), metrics, torch.cat([p.grad.flatten().clone() for p in policy.parameters()])

    both, _, whole = gradient(torch.tensor([2.0, 1.0, 4.0, 3.0]))
    assert both == pytest.approx(math.log(2))
    first, metrics, a = gradient(torch.tensor([2.0, 1.0, 4.0, NAN]))
    _, _, b = gradient(torch.tensor([5.0, 5.0, 4.0, 3.0]))
    assert first == pytest.approx(math.log(2) / 2)
    assert metrics["accuracy"][0] == 0 and metrics["accuracy"][1].isnan() and metrics["margin"][1].isnan()  # of the pair that is one
    torch.testing.assert_close(a + b, whole, atol=1e-6, rtol=1e-4)
    none, _, nothing = gradient(torch.tensor([5.0, 5.0, NAN, NAN]))
    assert none == 0 and not nothing.any()


def test_online_pairs_on_the_bridge_are_tempered_by_its_variance(backbone):
    """The job's own loss at a stop, by hand: each pair's margin times 1 / (1 + the target's extra variance)."""
    from rlstitch.policy import Policy
    from rlstitch.types import Batch, Latent, Rollout, noise_like

    policy = Policy(backbone.transformer, rank=2, alpha=4, targets=backbone.lora_targets, seed=0, ema_decay=0.9)
    for n, p in policy.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    grid, prompts = schedule.sigmas(4, 3.0, "plain"), ["a red star"] * 2 + ["two blue circles"] * 2
    algorithm = OnlineDPO(backbone, policy, None, grid, images_per_prompt=2, beta=50.0)
    batch = Batch(prompts, torch.tensor([0, 0, 1, 1]), torch.arange(4), [{}] * 4, backbone.encode_prompts(prompts))
    z, tau = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)), float(grid[3])
    with torch.no_grad():
        ((loss, metrics),) = algorithm.losses(Rollout(batch, Latent(z, torch.full((4,), tau))), torch.tensor([2.0, 1.0, 3.0, 4.0]), 1)
    margins = []
    for seed, (best, worst) in ((0, (0, 1)), (2, (3, 2))):
        sigma = schedule.draw_above(grid, tau, torch.tensor([seed]), 1, stream=29)[:, 0]
        errors, noise = {}, noise_like(backbone.latent_shape, torch.tensor([seed]), stream=101)
        for name in ("default", "reference"):
            for row in (best, worst):
                state, target = schedule.bridge(z[row : row + 1], tau, sigma, noise)
                with torch.no_grad(), policy.use(name):
                    v = backbone.velocity(state, sigma, batch.text[row : row + 1])
                errors[name, row] = float((v - target).square().mean())
        d = {row: errors["default", row] - errors["reference", row] for row in (best, worst)}
        margins.append(-25.0 * (d[best] - d[worst]) / (1 + float(schedule.bridge_variance(tau, sigma))))
    assert float(loss) == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 2, rel=1e-3)
    assert metrics["margin"].tolist() == pytest.approx(margins, rel=1e-2, abs=1e-4)
    assert metrics["accuracy"].tolist() == [float(m > 0) for m in margins]


def test_both_of_a_pair_share_level_and_noise(backbone, monkeypatch):
    """The margin by hand of a policy that adds .1 to a base of zeros: d = .01 - .2 mean(noise - z0), so that it is -.1 beta (mean z0 of the better - of the worse)."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    from rlstitch.types import Batch

    clean = torch.randn(3, 2, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
    prompts, seen, on = ["a red star", "a blue star", "two red stars"], [], [0.1]

    @contextmanager
    def use(name):
        on.append(0.0)
        yield
        on.pop()

    batch = Batch(prompts, torch.arange(3), torch.arange(3) + 9, [{}] * 3, backbone.encode_prompts(prompts), clean)
    for draw in ("logit_normal", "grid"):
        algorithm = OfflineDPO(backbone, SimpleNamespace(use=use), schedule.sigmas(4), times=2, draw=draw, beta=5.0)
        monkeypatch.setattr(backbone, "velocity", lambda z, sigma, text, **_: seen.append((z, sigma, text)) or torch.full_like(z, on[-1]))
        with torch.no_grad():
            for loss, metrics in algorithm.losses(algorithm.rollout(batch, 4)):
                margin = -0.1 * 5 * (clean[:, 0] - clean[:, 1]).mean((1, 2, 3))
                torch.testing.assert_close(metrics["margin"], margin, atol=1e-5, rtol=1e-3)
                torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margin).mean(), atol=1e-5, rtol=1e-3)
    assert len(seen) == 8  # base and policy at two levels, in both draws
    drawn = []
    for z, sigma, text in seen:
        assert torch.equal(sigma[::2], sigma[1::2]) and all(torch.equal(text.tokens[k::2], batch.text.tokens) for k in (0, 1))
        s = sigma.view(-1, 1, 1, 1)
        noise = z - (1 - s) * clean.flatten(0, 1)
        torch.testing.assert_close(noise[::2], noise[1::2], atol=1e-5, rtol=1e-4)
        drawn.append(noise / s)
    assert (drawn[0] - drawn[2]).abs().max() > 0.1  # each level has its own noise
    drawn, grid = {s for _, sigma, _ in seen[4:] for s in sigma.tolist()}, schedule.sigmas(4).tolist()
    assert drawn <= set(grid[:-1]) and grid[-2] in drawn  # down to the last above 0


@pytest.mark.parametrize("micro_batch,micro", [(4, 4), (7, 4), (8, 8), (99, 16)])
def test_whole_groups_stay_in_one_micro_batch(micro_batch, micro):
    g = resolve_geometry(8, 4, micro_batch, 2, whole_groups=True)
    assert g.micro_batch == micro and g.accumulation * g.micro_batch * g.world == 32


def test_impossible_groups_name_what_would_do():
    for arguments, expected in (
        ((8, 1, 4, 1), "images_per_prompt is 1, and this algorithm compares"),
        ((8, 4, 3, 1), "batch.micro_batch=4 or more, or batch.images_per_prompt=3 or fewer"),
        ((6, 4, 4, 4), "prompts_per_update=4 or 8"),
    ):
        with pytest.raises(UserError, match=expected):
            resolve_geometry(*arguments, whole_groups=True)
    assert resolve_geometry(6, 4, 4, 4).micro_batch == 3  # where groups may be cut, this is no fault


OFFLINE = ("algorithm._target_=rlstitch.algorithms.dpo.OfflineDPO", "algorithm.times=2", "data.images._target_=tests.pictures.tiny_pairs")
ONLINE = (
    "algorithm._target_=rlstitch.algorithms.dpo.OnlineDPO",
    "batch.prompts_per_update=4",
    "batch.images_per_prompt=2",
    "batch.micro_batch=4",
)
PIXEL = ("oracle._target_=rlstitch.oracles.Terminal", "stop._target_=rlstitch.stops.End")
JOBS = {"offline": OFFLINE, "stitched": ONLINE, "terminal": (*ONLINE, *PIXEL)}


@pytest.mark.parametrize("job", JOBS)
def test_dpo_runs_and_resumes_bit_for_bit(world, job):  # noqa: F811
    recipe, halves = pictures.without_reward(world) if job == "offline" else "recipe.yaml", f"dpo-{job}-halves"
    for run, updates in ((f"dpo-{job}", 4), (halves, 2), (halves, 4)):
        code, output = start(world, f"name={run}", f"updates={updates}", *JOBS[job], recipe=recipe)
        assert code == 0, output
    whole = rows(world, f"dpo-{job}")
    assert whole == rows(world, halves)
    a, b = weights(world, f"dpo-{job}"), weights(world, halves)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole[0]["loss"] == pytest.approx(math.log(2)) and whole[0]["accuracy"] == 0 and whole[0]["grad_norm"] > 0
    assert whole[-1]["loss"] != whole[0]["loss"]


@pytest.mark.slow
def test_two_ranks_and_larger_micro_batches_do_what_one_does(world):  # noqa: F811
    for name, ranks, more in (("dpo-one", 1, ()), ("dpo-two", 2, ()), ("dpo-wide", 1, ("batch.micro_batch=8",))):
        code, output = start(world, f"name={name}", "updates=2", *ONLINE, *more, ranks=ranks)
        assert code == 0, output
    one = weights(world, "dpo-one", 2)
    for other in ("dpo-two", "dpo-wide"):
        two = weights(world, other, 2)
        for k in one:
            torch.testing.assert_close(one[k], two[k], atol=2e-4, rtol=2e-2)


FAULTS = {
    "alone in its group": ("recipe.yaml", (*ONLINE, "batch.images_per_prompt=1"), "compares the images of a prompt: set it to 2 or more"),
    "a group cut in two": ("recipe.yaml", (*ONLINE, "batch.images_per_prompt=6"), "batch.micro_batch=6 or more"),
    "group size set twice": ("recipe.yaml", (*ONLINE, "algorithm.images_per_prompt=4"), "unknown key 'algorithm.images_per_prompt'"),
    "more times than levels": ("recipe.yaml", (*ONLINE, "algorithm.times=3"), "only 2 times lie above the earliest stop"),
    "no pairs": ("free.yaml", OFFLINE[:1], "'data.images' is missing: rlstitch.algorithms.dpo.OfflineDPO learns from pairs"),
    "a reward that nobody asks": ("recipe.yaml", OFFLINE, "'stop' is given, but rlstitch.algorithms.dpo.OfflineDPO asks no reward"),
    "beta of nothing": ("free.yaml", (*OFFLINE, "algorithm.beta=0"), "'algorithm.beta' must be positive, not 0"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_told_before_anything_loads(world, case):  # noqa: F811
    pictures.without_reward(world)
    recipe, overrides, expected = FAULTS[case]
    assert expected in refusal(world / recipe, *overrides)


def test_the_recipes_pass_every_check_and_the_online_ones_differ_in_two_lines():
    from rlstitch.checks import checked
    from rlstitch.config import compose

    for name in ("dpo", "dpo_online", "dpo_online_stitch"):
        assert checked(compose(name), name).name == name
    a, b = compose("dpo_online"), compose("dpo_online_stitch")
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {"oracle", "stop"}
