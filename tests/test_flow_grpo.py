"""Flow-GRPO: its steps and log-probabilities against torch.distributions, ratio and KL, the window, and the job resumed."""

import math
from dataclasses import replace

import pytest
import torch

from rlstitch import losses, sampling, schedule
from rlstitch.algorithms.flow_grpo import FlowGRPO
from rlstitch.config import check_part, compose
from rlstitch.policy import Policy
from rlstitch.types import Batch, UserError, noise_like
from tests.test_nft import PIXEL
from tests.test_schedule import MEAN, STD, marginal
from tests.test_schedule import velocity as gaussian_velocity
from tests.test_train import rows, start, weights, world  # noqa: F401  (a fixture)

NAN = float("nan")


def test_the_sde_step_by_its_released_formula(generator):
    z, v = torch.randn(2, 3, 2, 4, 4, generator=generator)
    s, t, a, first = 0.8, 0.7, 0.7, 0.95
    for sigma in (s, 1.0):
        std = a * (sigma / (1 - (sigma if sigma < 1 else first))) ** 0.5
        dt = t - sigma
        by_hand = z * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        mean, total = sampling.flow_grpo_sde(z, v, sigma, t, a, first)
        torch.testing.assert_close(mean, by_hand, rtol=1e-4, atol=1e-5)
        assert total == pytest.approx(std * (-dt) ** 0.5)


def test_both_kernels_keep_the_marginals_of_a_gaussian():
    grid, n = schedule.sigmas(200, 1.0, "plain"), 40_000
    begin = torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    for step in (sampling.flow_grpo_sde, sampling.cps):
        kernel = sampling.stochastic(step, noise_level=0.5 if step is sampling.flow_grpo_sde else 0.15)
        z = sampling.sample(
            lambda z, s: gaussian_velocity(z, s[:, None]), begin, grid, stop=150, kernel=kernel, generator=torch.Generator().manual_seed(1)
        ).z
        m, var = marginal(float(grid[150]))
        assert z.mean().item() == pytest.approx(m, abs=0.02), step
        if step is sampling.flow_grpo_sde:
            assert z.std().item() == pytest.approx(var**0.5, abs=0.02)


@pytest.mark.parametrize("level", [0.3, 0.8])
def test_cps_loses_variance_as_released_by_its_closed_form(level):
    """On a Gaussian a step is linear, z' = slope z + offset + std eps: mean and variance by recursion. Noise that replaces x1hat's share is not x1hat's size."""
    grid, n = schedule.sigmas(40, 1.0, "plain"), 40_000
    kernel = sampling.stochastic(sampling.cps, noise_level=level)
    z = sampling.sample(
        lambda z, s: gaussian_velocity(z, s[:, None]),
        torch.randn(n, 1, generator=torch.Generator().manual_seed(0)),
        grid,
        kernel=kernel,
        generator=torch.Generator().manual_seed(1),
    ).z
    mean, var = 0.0, 1.0
    for s, t in zip(grid.double().tolist(), grid.double().tolist()[1:]):
        m, total = marginal(s)
        gain, std = (
            (1 - s) * STD**2 / total,
            t * math.sin(level * math.pi / 2),
        )  # x0hat = MEAN + gain (z - m), x1hat = (z - (1 - s) x0hat) / s
        clean, noise = 1 - t, (t**2 - std**2) ** 0.5
        slope = clean * gain + noise * (1 - (1 - s) * gain) / s
        x0 = MEAN + gain * (mean - m)
        mean, var = clean * x0 + noise * (mean - (1 - s) * x0) / s, slope**2 * var + std**2
    assert z.mean().item() == pytest.approx(mean, abs=0.01) and z.var().item() == pytest.approx(var, rel=0.03)
    assert mean == pytest.approx(MEAN, abs=0.02) and (var**0.5 < 0.9 * STD) is (level == 0.8)


def test_log_probability_against_torch(generator):
    mean, z = torch.randn(2, 5, 2, 4, 4, generator=generator)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(z).flatten(1).mean(1)
    torch.testing.assert_close(sampling.log_prob(z, mean, 0.3), expected)


def test_clipped_surrogate_by_hand():
    old, new = torch.zeros(4), torch.tensor([0.0, 0.3, 0.3, -0.3])
    a = torch.tensor([2.0, 1.0, -1.0, -1.0])
    loss, ratio = losses.clipped_surrogate(new, old, a, 0.1)
    r = new.exp()
    torch.testing.assert_close(ratio, r)
    torch.testing.assert_close(loss, torch.stack([-2.0 * r[0], torch.tensor(-1.1), r[2], torch.tensor(0.9)]))
    _, guarded = losses.clipped_surrogate(new, old, a, 0.1, guard=torch.tensor([0.2, -0.3, 0.0, 0.1]))
    torch.testing.assert_close(guarded.log(), torch.tensor([0.2, 0.0, 0.3, -0.2]))


@pytest.fixture
def algorithm(backbone, reward):
    from rlstitch.oracles import Terminal

    policy = Policy(backbone.transformer, rank=2, alpha=4.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9)
    for n, p in policy.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    oracle = Terminal(backbone, {"r": reward}, {"r": 1.0})

    def make(**options):
        return FlowGRPO(backbone, policy, oracle, schedule.sigmas(6, 3.0, "plain"), **options), policy

    return make


def batch_of(backbone):
    prompts = ["a red circle"] * 4
    return Batch(prompts, torch.zeros(4, dtype=torch.long), torch.arange(4), [{}] * 4, backbone.encode_prompts(prompts))


@pytest.mark.parametrize("kernel, guard", [("sde", False), ("cps", False), ("sde", True)])
def test_the_ratio_is_one_at_the_first_step_and_both_terms_have_a_gradient(algorithm, backbone, kernel, guard):
    method, policy = algorithm(sde_type=kernel, noise_level=0.7, window=2, kl=0.5, guard=guard, guidance=2.0)
    rollout = method.rollout(batch := batch_of(backbone), 6)
    first, second = rollout.transitions
    assert torch.equal(first.z_next, second.z) and not rollout.latent.z.requires_grad
    start, velocity, begin = (
        method.start_of_window(batch, 6),
        backbone.bind(batch.text, 2.0),
        noise_like(backbone.latent_shape, batch.seeds),
    )
    with torch.no_grad():  # Euler's steps before and after the window
        before = sampling.sample(velocity, begin, method.grid, stop=start).z if start else begin
        torch.testing.assert_close(first.z, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rollout.latent.z, sampling.sample(velocity, second.z_next, method.grid[start + 2 :]).z)
    for k, t in enumerate(rollout.transitions, start):  # each step has its own noise
        with torch.no_grad():
            mean, std = method.step(t.z, velocity(t.z, torch.full((4,), t.sigma)), t.sigma, t.sigma_next)
        noise = noise_like(backbone.latent_shape, batch.seeds, stream=501 + k)
        torch.testing.assert_close(t.z_next, mean + std * noise, rtol=1e-4, atol=1e-5)
    for advantage in (torch.tensor([1.0, -1.0, 0.5, float("nan")]), torch.zeros(4)):
        for loss, metrics in method.losses(rollout, advantage, 2):
            for p in policy.parameters():
                p.grad = None
            loss.backward()
            assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-5) and float(metrics["kl"]) > 0
            assert any(p.grad.abs().max() > 0 for p in policy.parameters())


def test_kl_ratio_and_guard_away_from_the_first_step_by_hand(algorithm, backbone):
    """After the weights have moved: B.2's KL without sde's sqrt(h), cps's log-probability without constants, B.3's guarded ratio whose bias is gone; a sample
    without a score takes no part in the KL either."""
    for kernel, guard in (("sde", False), ("sde", True), ("cps", False), ("cps", True)):
        method, policy = algorithm(sde_type=kernel, noise_level=0.7, window=1, window_range=3, clip_range=10.0, kl=0.5, guard=guard)
        rollout = method.rollout(batch_of(backbone), 6)
        (t,) = rollout.transitions
        with torch.no_grad():
            for n, p in policy.named_parameters():
                if "lora_B" in n:
                    p.add_(0.5)
        loss, metrics = next(method.losses(rollout, torch.tensor([1.0, -1.0, 0.5, torch.nan]), 1))
        advantage, part = torch.tensor([1.0, -1.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])

        def mean_of(policy_name):
            with torch.no_grad(), policy.use(policy_name):
                v = backbone.velocity(t.z, torch.full((4,), t.sigma), rollout.batch.text)
            s, r, level = t.sigma, t.sigma_next, 0.7
            if kernel == "sde":
                scale = level * (s / (1 - (s if s < 1 else float(method.grid[1])))) ** 0.5
                drift = t.z * scale**2 / (2 * s) + v * (1 + scale**2 * (1 - s) / (2 * s))
                return t.z + drift * (r - s), scale * (s - r) ** 0.5
            std = r * math.sin(level * math.pi / 2)
            return (1 - r) * (t.z - s * v) + (r**2 - std**2) ** 0.5 * (t.z + (1 - s) * v), std

        (new, std), (base, _) = mean_of("default"), mean_of("reference")

        def log_prob(mean):
            if kernel == "cps":
                return -(t.z_next - mean).square().mean((1, 2, 3))
            return torch.distributions.Normal(mean, std).log_prob(t.z_next).mean((1, 2, 3))

        assert (t.mean is not None) is guard  # nobody else asks for it
        change = (log_prob(new) - (log_prob(t.mean) if guard else t.log_prob)) * (std if guard else 1.0)
        if guard:
            moved = (new - t.mean).square().mean((1, 2, 3))
            change = change + (moved * std if kernel == "cps" else moved / (2 * std))
        ratio = change.exp()
        scale = std if kernel == "cps" else std / (t.sigma - t.sigma_next) ** 0.5
        kl = (part * (new - base).square().mean((1, 2, 3)) / (2 * scale**2)).mean()
        assert (ratio - 1).abs().max() > 1e-4
        torch.testing.assert_close(metrics["ratio"], ratio.mean(), rtol=0, atol=2e-5)  # the guard's own part is 1e-3
        torch.testing.assert_close(metrics["kl"], kl, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(loss.detach(), (-advantage * ratio).mean() + 0.5 * kl, rtol=1e-3, atol=1e-5)


def test_advantages_are_clipped(algorithm, backbone):
    method, _ = algorithm(clip=1.2)
    scores = torch.tensor([[0.0], [0.0], [0.0], [4.0], [NAN]])
    advantage, metrics = method.compare([], scores, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(advantage, torch.tensor([-(3**-0.5)] * 3 + [1.2, NAN]), equal_nan=True, atol=1e-3, rtol=0)
    assert metrics["masked"] == pytest.approx(0.2)
    alone, _ = algorithm(spread="group")  # each group by its own spread
    advantage, _ = alone.compare([], torch.tensor([[0.0], [2.0], [0.0], [10.0]]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(advantage, torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=1e-3, rtol=0)


def test_the_last_cps_step_has_no_kl(algorithm):
    for options in ({"window": 6, "window_range": 0}, {"window": 1, "window_range": 6}):
        with pytest.raises(UserError, match="the last of 6 cps steps"):
            algorithm(sde_type="cps", kl=0.1, **options)
        algorithm(sde_type="cps", **options), algorithm(sde_type="sde", kl=0.1, **options)


def test_a_step_along_the_loss_makes_the_better_sample_likelier(algorithm, backbone):
    method, policy = algorithm(sde_type="sde", noise_level=0.7, window=1, clip_range=0.2)
    rollout = method.rollout(batch_of(backbone), 6)
    t = rollout.transitions[0]

    def likelihood():
        v = backbone.velocity(t.z, torch.full((4,), t.sigma), rollout.batch.text)
        return method.log_prob(t.z_next, *method.step(t.z, v, t.sigma, t.sigma_next)).detach()

    before = likelihood()
    loss, _ = next(method.losses(rollout, torch.tensor([1.0, 0.0, 0.0, 0.0]), 1))
    loss.backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-2 * p.grad / max(float(p.grad.norm()), 1e-12)
    assert likelihood()[0] > before[0]


def test_where_the_window_lies(algorithm, backbone):
    method, _ = algorithm(window=2, window_range=4)
    batch = batch_of(backbone)

    def at(update):
        return replace(batch, seeds=batch.seeds + update * 1_000_000)

    starts = {method.start_of_window(at(u), 6) for u in range(40)}
    assert starts == {0, 1, 2}  # wholly within the first four steps
    assert {method.start_of_window(at(u), 5) for u in range(9)} == {3}  # halted early: the last steps before the stop
    slide, _ = algorithm(window=2, window_range=6, strategy="progressive", every=3)
    seen = []
    for step in range(12):  # it slides by its own length, every third update, whatever the seed
        seen.append(slide.start_of_window(at(77 + step), 6))
        slide.end_step(step)
    assert seen == [0] * 3 + [2] * 3 + [4] * 3 + [0] * 3
    again, _ = algorithm(window=3, window_range=5, strategy="progressive", every=1)
    again.load_state({"updates": slide.state()["updates"] - 11})
    assert again.start_of_window(at(0), 6) == 2  # the last start is where the window just fits
    wide, _ = algorithm(window=5)
    assert wide.start_of_window(at(1), 6) == 0


def test_a_branched_group_shares_all_but_the_windows_noise(algorithm, backbone):
    """One noise and one walk a prompt, whatever the micro-batch; the next update's is another."""
    method, _ = algorithm(window=2, branch=True)
    prompts, group = ["a red circle", "two blue stars"], torch.tensor([7, 7, 7, 3, 3, 3])
    text = backbone.encode_prompts([prompts[0]] * 3 + [prompts[1]] * 3)
    batch = Batch([prompts[0]] * 3 + [prompts[1]] * 3, group, torch.arange(6) + 5_000_000, [{}] * 6, text)
    for stop, first in ((4, 2), (2, 0)):  # halted early, the window is the last steps
        rollout = method.rollout(batch, stop)
        z = rollout.transitions[0].z
        assert rollout.transitions[0].sigma == float(method.grid[first])
        assert torch.equal(z[0].expand(3, -1, -1, -1), z[:3]) and torch.equal(z[3].expand(3, -1, -1, -1), z[3:])
        assert all((a - b).abs().max() > 0.05 for a, b in ((z[0], z[3]), rollout.latent.z[:2], rollout.latent.z[4:]))
        cut = torch.cat([method.rollout(batch[part], stop).latent.z for part in (slice(0, 2), slice(2, 6))])
        torch.testing.assert_close(cut, rollout.latent.z, rtol=1e-4, atol=1e-5)
    later = Batch(batch.prompts, group, batch.seeds + 1_000_000, batch.facts, text)
    assert (method.rollout(later, 4).transitions[0].z - method.rollout(batch, 4).transitions[0].z).abs().max() > 0.1
    walked = sampling.sample(backbone.bind(text[:1]), method.shared_way(batch[:1], 0), method.grid, stop=2).z
    torch.testing.assert_close(method.rollout(batch, 4).transitions[0].z[:1], walked, rtol=1e-4, atol=1e-5)


GRPO = (
    "algorithm._target_=rlstitch.algorithms.flow_grpo.FlowGRPO",
    "algorithm.window=2",
    "algorithm.kl=0.01",
    "batch.prompts_per_update=2",
    "batch.images_per_prompt=4",
    "batch.micro_batch=4",
)


@pytest.mark.parametrize("oracle", [(), PIXEL], ids=["stitched", "terminal"])
def test_flow_grpo_runs_and_resumes_bit_for_bit(world, oracle):  # noqa: F811
    name = "grpo-pixel" if oracle else "grpo-stitch"
    also = ("algorithm.branch=true",) if oracle else ()
    for run, updates in ((name, 4), (f"{name}-halves", 2), (f"{name}-halves", 4)):
        code, output = start(world, f"name={run}", f"updates={updates}", *GRPO, *oracle, *also)
        assert code == 0, output
    assert rows(world, name) == rows(world, f"{name}-halves")
    whole, halves = weights(world, name), weights(world, f"{name}-halves")
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    assert all(row["ratio"] == pytest.approx(1, abs=1e-5) and row["grad_norm"] > 0 for row in rows(world, name))


def test_a_deterministic_kernel_is_refused():
    (fault,) = check_part("algorithm", compose("flow_grpo")["algorithm"] | {"noise_level": 0.0, "oracle": 0, "grid": 0}, kind="algorithm")
    assert "'algorithm.noise_level' must be positive, not 0.0: a deterministic step has no log-probability" in fault


def test_faults_of_flow_grpo(world):  # noqa: F811
    code, output = start(world, "name=bad", *GRPO, "algorithm.window=4", "algorithm.noise_level=1.2", "algorithm.clip_range=0")
    assert code == 2 and "within 1..2" in output and "at most 1, not 1.2" in output and "'algorithm.clip_range' must be positive" in output
