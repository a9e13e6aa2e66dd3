"""Steering against closed forms: a Gaussian prior with a linear and with a quadratic reward, where value, guided samples and tilted law are exact."""

import math

import pytest
import torch

from rlstitch import sampling, schedule, steering
from rlstitch.steering.particles import Potentials, Trace, effective_size, normalised, resample
from tests.test_schedule import MEAN, STD, marginal, posterior, velocity

SDE = sampling.stochastic(sampling.linear_sde, g=lambda s: s)
A, B, C = 1.5, 4.0, 0.2  # rewards A z0 and -B (z0 - C)^2 / 2


def denoiser(z, sigma):
    return velocity(z, sigma[:, None])


def spread(t):
    """Variance of z0 given z_t."""
    return STD**2 * t**2 / marginal(t)[1]


def linear_value(z, sigma):
    """log E[exp(A z0) | z]."""
    return (A * posterior(z, sigma[:, None]) + A**2 * spread(sigma[:, None]) / 2)[:, 0]


def quadratic_value(z, sigma):
    m, p = posterior(z, sigma[:, None]), spread(sigma[:, None])
    return (-0.5 * torch.log1p(B * p) - B * (m - C) ** 2 / (2 * (1 + B * p)))[:, 0]


def guess(z, sigma):
    """The quadratic reward of the posterior mean: a value that is only roughly right."""
    m = posterior(z, sigma[:, None]) if float(sigma[0]) > 0 else z
    return (-B * (m - C) ** 2 / 2)[:, 0]


LINEAR = (MEAN + A * STD**2, STD**2)
QUADRATIC = ((MEAN / STD**2 + B * C) / (1 / STD**2 + B), 1 / (1 / STD**2 + B))


def start(n, seed=0):
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [sampling.euler, SDE], ids=["ode", "sde"])
@pytest.mark.parametrize("value, law", [(linear_value, LINEAR), (quadratic_value, QUADRATIC)], ids=["linear", "quadratic"])
def test_dps_at_scale_one_samples_the_tilted_law(kernel, value, law):
    z = steering.dps(
        denoiser,
        value,
        start(20_000),
        schedule.sigmas(400, 1.0, "plain"),
        kernel=kernel,
        max_coefficient=1e4,
        generator=torch.Generator().manual_seed(1),
    )
    assert z.mean().item() == pytest.approx(law[0], abs=0.012)
    assert z.var().item() == pytest.approx(law[1], rel=0.05)


def test_dps_scales_and_steps():
    grid = schedule.sigmas(20, 1.0, "plain")
    plain = sampling.sample(denoiser, start(64), grid).z
    for options in (dict(scale=0.0), dict(scale=1.0, steps=())):
        torch.testing.assert_close(steering.dps(denoiser, linear_value, start(64), grid, **options), plain, rtol=0, atol=0)
    means = [steering.dps(denoiser, linear_value, start(4000), grid, scale=s).mean().item() for s in (-1.0, 0.0, 1.0, 2.0)]
    assert means == sorted(means) and means[-1] - means[0] > 0.5
    with pytest.raises(ValueError, match="no gradient"):
        steering.dps(denoiser, lambda z, s: torch.zeros(len(z)), start(4), grid)
    with pytest.raises(ValueError, match="nan"):
        steering.dps(denoiser, linear_value, start(4), grid, scale=float("nan"))


@pytest.mark.parametrize("potential", ["diff", "max", "add", "rt"])
@pytest.mark.parametrize("gate", [None, 0.5])
def test_fk_samples_the_tilted_law_whatever_the_potential(potential, gate):
    n, grid = 12_000, schedule.sigmas(60, 1.0, "plain")
    z = steering.fk(
        denoiser,
        guess,
        start(n),
        grid,
        num_particles=n,
        resample_steps=(20, 40, 50),
        lam=1.0,
        potential=potential,
        ess_threshold=gate,
        kernel=SDE,
        generator=torch.Generator().manual_seed(2),
    )
    assert z.mean().item() == pytest.approx(QUADRATIC[0], abs=0.025)
    assert z.var().item() == pytest.approx(QUADRATIC[1], rel=0.12)


@pytest.mark.parametrize("potential, children", [("diff", 2), ("diff", 4), ("max", 2)])
def test_weighted_proposals_keep_the_tilted_law_and_greedy_ones_do_not(potential, children):
    n, grid, found = 12_000, schedule.sigmas(60, 1.0, "plain"), {}
    for proposals in ("weighted", "greedy"):
        found[proposals] = steering.fk(
            denoiser, guess, start(n), grid, num_particles=n, num_proposals=children, proposal_steps=range(24), proposals=proposals,
            resample_steps=(20, 40, 50), lam=1.0, potential=potential, kernel=SDE, generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
    assert found["weighted"].mean().item() == pytest.approx(QUADRATIC[0], abs=0.025)
    assert found["weighted"].var().item() == pytest.approx(QUADRATIC[1], rel=0.12)
    assert abs(found["greedy"].mean().item() - QUADRATIC[0]) > 0.25


def test_a_particle_weighs_what_its_children_do_in_the_mean():
    """exp(lam V) of 1 and 3, of 2 and 2, and of 0 (unknown) and 4 have one mean, whichever child is drawn: no particle is worth more than another."""
    children, trace = torch.tensor([1.0, 3.0, 2.0, 2.0, torch.nan, 4.0]).log() / 2, Trace()
    steering.fk(
        denoiser, lambda z, s: children, start(3), schedule.sigmas(1, 1.0, "plain"), num_particles=3, num_proposals=2, proposal_steps=(0,),
        proposals="weighted", resample_steps=(), lam=2.0, kernel=sampling.stochastic(lambda z, v, s, t: (z, 1.0)), trace=trace,
    )  # fmt: skip
    assert trace.ess == [pytest.approx(3)]
    told, trace = iter([torch.full((4,), torch.nan), torch.tensor([1.0, 1.0, 3.0, 3.0]).log()]), Trace()
    steering.fk(
        denoiser, lambda z, s: next(told), start(2), schedule.sigmas(2, 1.0, "plain"), num_particles=2, num_proposals=2, proposal_steps=(0, 1),
        proposals="weighted", resample_steps=(), lam=1.0, kernel=sampling.stochastic(lambda z, v, s, t: (z, 1.0)), trace=trace,
    )  # fmt: skip
    assert (
        trace.ess == [pytest.approx(16 / 10)] and trace.fallbacks == 1
    )  # where nothing was known nothing is lost: 1 and 3 weigh as they are


def test_weighted_proposals_alone_and_at_the_last_step_keep_the_tilted_law():
    """Two particles a prompt, proposals to the end; also of one child in four whose value is unknown: it never wins, and its place counts for nothing."""

    def value(z, sigma):
        return torch.where(torch.arange(len(z)) % 4 == 1, torch.nan, guess(z, sigma))

    options = dict(resample_steps=(), proposals="weighted", kernel=SDE, generator=torch.Generator().manual_seed(2))
    z = steering.fk(
        denoiser,
        value,
        start(8000),
        schedule.sigmas(20, 1.0, "plain"),
        num_particles=8000,
        num_proposals=8,
        proposal_steps=[19],
        lam=1.0,
        **options,
    )
    assert z.mean().item() == pytest.approx(QUADRATIC[0], abs=0.04) and z.var().item() == pytest.approx(QUADRATIC[1], rel=0.12)


@pytest.mark.parametrize("memoryless", [True, False])
def test_svdd_draws_from_the_tilted_law_under_the_memoryless_kernel_alone(memoryless):
    """By the exact value of r / T, at T = .5: a temperature turned round would tilt by a quarter of it."""
    kernel = sampling.stochastic(sampling.flow_grpo_sde, noise_level=2**0.5) if memoryless else SDE
    z = steering.svdd(
        denoiser, lambda z, s: 0.5 * quadratic_value(z, s), start(4000), schedule.sigmas(60, 1.0, "plain"), num_proposals=32, temperature=0.5,
        kernel=kernel, generator=torch.Generator().manual_seed(8),
    )  # fmt: skip
    if memoryless:
        assert z.mean().item() == pytest.approx(QUADRATIC[0], abs=0.03) and z.var().item() == pytest.approx(QUADRATIC[1], rel=0.12)
    else:
        assert QUADRATIC[0] + 0.08 < z.mean().item() < MEAN and z.var().item() > 1.2 * QUADRATIC[1]


def test_the_law_of_best_of_n():
    """N draws from the prior, the one nearest to the reward's optimum: density N p(z) P(|z' - C| > |z - C|)^(N - 1)."""
    n, z = 8, torch.linspace(MEAN - 8 * STD, MEAN + 8 * STD, 40_001, dtype=torch.float64)
    prior, far = torch.distributions.Normal(torch.tensor(MEAN).double(), STD), (z - C).abs()
    density = n * prior.log_prob(z).exp() * (1 - prior.cdf(C + far) + prior.cdf(C - far)) ** (n - 1)
    mean, square = (torch.trapezoid(density * x, z).item() for x in (z, z**2))
    best = steering.best_of_n(denoiser, guess, start(8 * 6000), schedule.sigmas(60, 1.0, "plain"), num_particles=n)
    assert torch.trapezoid(density, z).item() == pytest.approx(1, abs=1e-6) and len(best) == 6000
    assert best.mean().item() == pytest.approx(mean, abs=0.008) and best.var().item() == pytest.approx(square - mean**2, rel=0.1)


def test_the_values_after_proposals_are_those_of_the_children_that_were_kept():
    """At a lambda without mercy all particles of a prompt become its best child. One whose value is not known, here the first of three, never wins."""
    asked, known = [], torch.arange(36) % 3 > 0

    def value(z, sigma):
        asked.append(z)
        return torch.where(known, guess(z, sigma), torch.nan)

    for proposals in ("greedy", "weighted"):
        z = steering.fk(
            denoiser, value, start(12), schedule.sigmas(3, 1.0, "plain"), num_particles=4, num_proposals=3, proposal_steps=(2,), proposals=proposals,
            resample_steps=(), lam=1e6, kernel=SDE, generator=torch.Generator().manual_seed(9),
        )  # fmt: skip
        children = asked.pop().view(3, 12)
        values = torch.where(known, guess(children.view(-1, 1), torch.zeros(1)), -torch.inf)
        best = children.gather(1, values.view(3, 12).argmax(1, keepdim=True))
        assert torch.equal(z.view(3, 4), best.expand(3, 4)) and not asked


def test_particles_stay_where_their_effective_size_is_large_enough():
    """Values so far apart that resampling would leave few; the potential is carried to the end instead, where it counts once."""
    asked, begin = [], 10 * torch.arange(4.0)[:, None]

    def shaken(z, v, sigma, sigma_next, generator=None):
        return z + 0.01 * torch.rand(z.shape, generator=generator)

    for gate in (0.05, None):
        asked.clear()
        steering.fk(
            lambda z, sigma: z, lambda z, sigma: asked.append(z.round().flatten().tolist()) or 0.1 * z[:, 0], begin, schedule.sigmas(3, 1.0, "plain"),
            num_particles=4, resample_steps=(0, 1), lam=1.0, ess_threshold=gate, kernel=shaken, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert (asked[1:] == [[0, 10, 20, 30]] * 2) is (gate is not None)


def test_fk_without_pull_is_plain_sampling_and_one_proposal_is_plain_fk():
    grid = schedule.sigmas(12, 1.0, "plain")

    def fk(**options):
        settings = dict(num_particles=4, resample_steps=(3, 6), lam=2.0, kernel=SDE, generator=torch.Generator().manual_seed(3)) | options
        return steering.fk(denoiser, guess, start(16), grid, **settings)

    plain = sampling.sample(denoiser, start(16), grid, kernel=SDE, generator=torch.Generator().manual_seed(3)).z
    assert torch.equal(fk(lam=0.0), plain)
    assert torch.equal(fk(num_proposals=1, proposal_steps=(0, 1, 2, 3)), fk())
    assert not torch.equal(fk(), plain)
    walked = sampling.sample(denoiser, start(16), grid).z
    assert all(torch.equal(steering.best_of_n(denoiser, guess, start(16), grid, num_particles=1, stop=k), walked) for k in (5, 12, None))
    assert torch.equal(
        steering.svdd(denoiser, guess, start(16), grid, num_proposals=1, kernel=SDE, generator=torch.Generator().manual_seed(3)), plain
    )


def test_more_proposals_and_particles_raise_the_reward():
    grid = schedule.sigmas(12, 1.0, "plain")

    def reward(z):
        return guess(z, torch.zeros(len(z))).mean().item()

    def svdd(m, temperature=0.0):
        return reward(
            steering.svdd(
                denoiser,
                guess,
                start(2000),
                grid,
                num_proposals=m,
                temperature=temperature,
                kernel=SDE,
                generator=torch.Generator().manual_seed(4),
            )
        )

    assert svdd(1) < svdd(2) < svdd(6)
    assert svdd(1) < svdd(6, 0.5) < svdd(6)
    best = [reward(steering.best_of_n(denoiser, guess, start(2000 * n), grid, num_particles=n)) for n in (1, 2, 8)]
    assert best == sorted(best)
    early = [reward(steering.best_of_n(denoiser, guess, start(8000), grid, num_particles=4, stop=k)) for k in (4, 12)]
    assert best[0] < early[0] <= early[1] + 1e-6
    both = [
        reward(
            steering.fk(
                denoiser, guess, start(4000), grid, num_particles=4, num_proposals=m, resample_steps=(4, 8), proposal_steps=range(5), lam=1.0, kernel=SDE,
                generator=torch.Generator().manual_seed(5),
            )
        )
        for m in (1, 4)
    ]  # fmt: skip
    assert both[0] < both[1]


@pytest.mark.parametrize("scheme", ["multinomial", "systematic", "residual"])
def test_resampling_is_unbiased(scheme):
    weights = torch.tensor([[0.05, 0.5, 0.25, 0.2], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    counts, draws = torch.zeros(3, 4), 4000
    for _ in range(draws):
        counts += torch.nn.functional.one_hot(resample(weights, scheme, generator), 4).sum(1)
    torch.testing.assert_close(counts / draws, (4 * weights).float(), atol=0.06, rtol=0)
    assert counts[2].tolist() == [0, 4 * draws, 0, 0]
    if scheme != "multinomial":  # equal weights leave every particle alone
        assert (counts[1] == draws).all()


def test_weights_that_are_nan_or_all_zero():
    table = torch.tensor([[0.0, float("nan"), 0.0], [float("nan")] * 3, [-torch.inf] * 3, [1e6, 0.0, -1e6]])
    weights, bad = normalised(table)
    torch.testing.assert_close(weights[0], torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(weights[1:3], torch.full((2, 3), 1 / 3, dtype=torch.float64))
    assert bad.tolist() == [False, True, True, False] and weights[3].tolist() == [1, 0, 0]
    assert effective_size(weights).tolist() == pytest.approx([2, 3, 3, 1])
    trace = Trace()

    def broken(z, sigma):
        return torch.full((len(z),), float("nan"))

    z = steering.fk(
        denoiser, broken, start(8), schedule.sigmas(6, 1.0, "plain"), num_particles=4, resample_steps=(2,), lam=1.0, kernel=SDE, trace=trace
    )
    assert torch.isfinite(z).all() and trace.fallbacks == 4 and trace.ess == [4.0, 4.0] and trace.queries == 16


def test_potentials_by_hand():
    first, second, final = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 2.0]])
    expected = {
        "diff": ([2, 4], [4, -2], [-2, 2]),
        "max": ([2, 4], [6, 4], [-4, -4]),
        "add": ([2, 4], [8, 6], [-6, -6]),
        "rt": ([2, 4], [6, 2], [-4, -2]),
    }
    for kind, rows in expected.items():
        potentials = Potentials(kind, 2.0, 1, 2)
        got = [potentials.step(v, last=k == 2)[0].tolist() for k, v in enumerate((first, second, final))]
        assert got == [list(map(float, row)) for row in rows], kind
        assert potentials.spent.tolist() == [[4.0, 4.0]]  # lambda r(z0) in all


def test_lambda_in_units_of_the_spread():
    def run(scale, unit):
        trace = Trace()
        z = steering.fk(
            denoiser, lambda z, s: scale * guess(z, s), start(64), schedule.sigmas(10, 1.0, "plain"), num_particles=8, resample_steps=(3, 6), lam=2.0,
            lam_unit=unit, kernel=SDE, generator=torch.Generator().manual_seed(7), trace=trace,
        )  # fmt: skip
        return z, trace.lam

    (small, lam_small), (large, lam_large) = run(0.01, "spread"), run(100.0, "spread")
    torch.testing.assert_close(small, large)
    assert lam_small / lam_large == pytest.approx(1e4, rel=1e-3)
    assert run(1.0, "absolute")[1] == 2.0


def test_one_lambda_for_all_calls_that_share_a_trace():
    """The first call's spread is that of its particles where they are first resampled; later ones, of whatever batch, take it from the trace."""
    grid, settings = schedule.sigmas(10, 1.0, "plain"), dict(num_particles=8, resample_steps=(3, 6), lam=2.0, lam_unit="spread", kernel=SDE)

    def run(value, n, **more):
        return steering.fk(denoiser, value, start(n), grid, generator=torch.Generator().manual_seed(7), **settings | more)

    tables, trace = [], Trace()
    run(lambda z, s: tables.append(guess(z, s)) or tables[-1], 64, trace=trace)
    spread = tables[0].view(8, 8).std(1).mean().item()
    assert trace.spread == pytest.approx(spread) and trace.lam == pytest.approx(2 / spread)
    assert steering.value_spread(denoiser, guess, start(64), grid, generator=torch.Generator().manual_seed(7), **settings) == pytest.approx(
        spread
    )
    run(lambda z, s: 100 * guess(z, s), 8, trace=trace)
    assert trace.lam == pytest.approx(2 / spread)
    with pytest.raises(ValueError, match="value_spread"):
        run(guess, 8, num_proposals=2, proposal_steps=(1,), proposals="weighted")
    run(guess, 8, num_proposals=2, proposal_steps=(1,), proposals="weighted", trace=trace)
    assert trace.lam == pytest.approx(2 / spread) and math.isnan(
        steering.value_spread(denoiser, guess, start(4), grid, **settings | {"num_particles": 1})
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_particles=0), "at least 1"),
        (dict(num_proposals=0), "at least 1"),
        (dict(num_particles=3), "whole number of prompts"),
        (dict(resample_steps=(2, 40)), r"\[40\] lie beyond the grid: its steps are 0..9"),
        (dict(num_proposals=2, proposal_steps=(-1,)), r"\[-1\] lie beyond"),
        (dict(kernel=sampling.euler), "adds no noise"),
        (dict(ess_threshold=1.5), "1.5"),
        (dict(proposals="best"), "'best'"),
        (dict(potential="sum"), "'sum'"),
        (dict(resampling="none"), "'none'"),
    ],
)
def test_bad_arguments_of_fk(options, message):
    settings = dict(num_particles=4, resample_steps=(2,), lam=1.0, kernel=SDE) | options
    with pytest.raises(ValueError, match=message):
        steering.fk(denoiser, guess, start(8), schedule.sigmas(10, 1.0, "plain"), **settings)


def test_bad_arguments_of_the_others():
    grid = schedule.sigmas(4, 1.0, "plain")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        steering.svdd(denoiser, guess, start(4), grid, num_proposals=0)
    with pytest.raises(ValueError, match="same"):
        steering.svdd(denoiser, guess, start(4), grid, num_proposals=2, kernel=sampling.euler)
    with pytest.raises(ValueError, match="1..4"):
        steering.best_of_n(denoiser, guess, start(4), grid, num_particles=2, stop=5)
    with pytest.raises(ValueError, match="whole number"):
        steering.best_of_n(denoiser, guess, start(4), grid, num_particles=3)
