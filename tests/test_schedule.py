"""The path, posterior mean, score and bridge against a Gaussian prior, where all of them are exact."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlstitch import sampling, schedule

MEAN, STD = 0.7, 0.4  # z0 ~ N(MEAN, STD^2), one dimension


def marginal(t):
    """Mean and variance of z_t = (1 - t) z0 + t eps."""
    return (1 - t) * MEAN, (1 - t) ** 2 * STD**2 + t**2


def posterior(z, t):
    """E[z0 | z_t] by conjugacy."""
    m, v = marginal(t)
    return MEAN + (1 - t) * STD**2 / v * (z - m)


def velocity(z, t):
    """E[eps - z0 | z_t] = (z - E[z0 | z]) / t."""
    return (z - posterior(z, t)) / t


@pytest.mark.parametrize("steps", [1, 10, 25, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_spacing_is_the_schedulers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(schedule.sigmas(steps, shift, "diffusers"), scheduler.sigmas, atol=1e-6, rtol=0)


def test_grids_by_the_reference_tables():
    ten = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    plain = [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25, 0]
    torch.testing.assert_close(schedule.sigmas(10, 3.0), torch.tensor(ten), atol=6e-5, rtol=0)
    torch.testing.assert_close(schedule.sigmas(10, 3.0, "plain"), torch.tensor(plain), atol=6e-5, rtol=0)


@pytest.mark.parametrize("bad", [dict(num_steps=0), dict(num_steps=5, shift=0.0), dict(num_steps=5, spacing="linear")])
def test_bad_grids_are_refused(bad):
    with pytest.raises(ValueError, match=str(list(bad.values())[-1])):
        schedule.sigmas(**bad)


def test_posterior_mean_and_score_are_exact_on_a_gaussian():
    z = torch.linspace(-2, 2, 9)[:, None]
    for t in (0.05, 0.3, 0.8, 1.0):
        v = velocity(z, t)
        torch.testing.assert_close(schedule.posterior_mean(z, v, t), posterior(z, t))
        m, var = marginal(t)
        torch.testing.assert_close(schedule.score(z, v, t), -(z - m) / var, atol=1e-5, rtol=1e-5)


def test_per_sample_sigma_equals_scalar_sigma(generator):
    z0, noise = torch.randn(2, 3, 2, 2, 2, generator=generator)
    sigma = torch.tensor([0.2, 0.5, 0.9])
    rows = [schedule.interpolate(z0[i : i + 1], noise[i : i + 1], float(sigma[i])) for i in range(3)]
    torch.testing.assert_close(schedule.interpolate(z0, noise, sigma), torch.cat(rows))


def test_bridge_keeps_the_marginal_and_its_target_has_the_marginal_velocity_as_mean(generator):
    tau, t, n = 0.4, 0.7, 400_000
    m, var = marginal(tau)
    z_tau = m + var**0.5 * torch.randn(n, 1, generator=generator)
    z, target = schedule.bridge(z_tau, tau, t, torch.randn(n, 1, generator=generator))
    m_t, var_t = marginal(t)
    assert abs(z.mean().item() - m_t) < 5 * (var_t / n) ** 0.5
    assert abs(z.var().item() - var_t) < 5 * var_t * (2 / n) ** 0.5
    # E[target | z] is linear in z for Gaussians: the least-squares line must be the exact velocity.
    design = torch.cat([z, torch.ones_like(z)], 1).double()
    slope, offset = torch.linalg.lstsq(design, target.double()).solution[:, 0].tolist()
    at = torch.tensor([[0.0], [1.0]])
    exact = velocity(at, t)
    residual = float((target - (slope * z + offset)).std())
    assert abs(offset - exact[0].item()) < 6 * residual / n**0.5
    assert abs(slope - (exact[1] - exact[0]).item()) < 6 * residual / (n * var_t) ** 0.5


def test_bridge_at_tau_zero_is_the_plain_path(generator):
    z0, noise = torch.randn(2, 4, 2, 2, 2, generator=generator)
    z, target = schedule.bridge(z0, 0.0, 0.6, noise)
    torch.testing.assert_close(z, schedule.interpolate(z0, noise, 0.6))
    torch.testing.assert_close(target, noise - z0)


def test_bridge_target_is_the_time_derivative(generator):
    z_tau, noise = torch.randn(2, 4, 3, generator=generator, dtype=torch.float32)
    h = 1e-3
    ahead, behind = schedule.bridge(z_tau, 0.3, 0.6 + h, noise)[0], schedule.bridge(z_tau, 0.3, 0.6 - h, noise)[0]
    torch.testing.assert_close(schedule.bridge(z_tau, 0.3, 0.6, noise)[1], (ahead - behind) / (2 * h), atol=2e-3, rtol=1e-3)


def test_bridge_refuses_to_run_backwards():
    for tau, sigma in (
        (0.5, 0.5),
        (0.5, torch.tensor([0.7, 0.5])),
        (torch.tensor([0.5, 0.8]), torch.tensor([0.7, 0.7])),
    ):  # one bad row is enough
        with pytest.raises(ValueError, match="tau"):
            schedule.bridge(torch.zeros(2, 1), tau, sigma, torch.zeros(2, 1))


@pytest.mark.parametrize("given", ["number", "scalar", "rows"])
def test_float64_is_kept_and_less_is_float32(given):
    """Every function of the path and every kernel against the same arithmetic on Python's floats."""
    x, n, v, s, t, tau = 0.3, -1.7, 0.9, 0.7, 0.6, 0.1
    a = (1 - s) / (1 - tau)
    spread = ((s - a * tau) * (s + a * tau)) ** 0.5
    growth = (s + a * tau**2 / (1 - tau)) / spread
    std = t * math.sin(0.4 * math.pi)
    exact = {
        "interpolate": (1 - s) * x + s * n,
        "posterior_mean": x - s * v,
        "score": -(x + (1 - s) * v) / s,
        "bridge": a * x + spread * n,
        "bridge target": -x / (1 - tau) + growth * n,
        "bridge_variance": ((tau * spread / (1 - tau) + growth * a * tau) / s) ** 2,
        "euler": x + (t - s) * v,
        "linear_sde": x + (s - t) * (-v - 0.5 * (3 * s**2) ** 2 * (x + (1 - s) * v) / s),
        "cps": (1 - t) * (x - s * v) + (t**2 - std**2) ** 0.5 * (x + (1 - s) * v),
        "log_prob": -((x - n) ** 2) / (2 * 0.3**2) - math.log(0.3) - 0.5 * math.log(2 * math.pi),
    }
    for dtype, error in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        z, noise, velocity = (torch.full((2, 1, 2), value, dtype=dtype) for value in (x, n, v))
        make = {"number": float, "scalar": lambda v: torch.tensor(v, dtype=dtype), "rows": lambda v: torch.full((2,), v, dtype=dtype)}[
            given
        ]  # noqa: B023
        sigma, start = make(s), make(tau)
        bridge, target = schedule.bridge(z, start, sigma, noise)
        got = {
            "interpolate": schedule.interpolate(z, noise, sigma),
            "posterior_mean": schedule.posterior_mean(z, velocity, sigma),
            "score": schedule.score(z, velocity, sigma),
            "bridge": bridge,
            "bridge target": target,
            "bridge_variance": schedule.bridge_variance(start, sigma),
            "euler": sampling.euler(z, velocity, s, t),
            "linear_sde": sampling.linear_sde(z, velocity, s, t)[0],
            "cps": sampling.cps(z, velocity, s, t, 0.8)[0],
            "log_prob": sampling.log_prob(z, noise, 0.3),
        }
        for name, result in got.items():
            assert result.dtype == (torch.float32 if (name, given) == ("bridge_variance", "number") else dtype), name
            close = 1e-6 if result.dtype == torch.float32 else error
            torch.testing.assert_close(result.double(), torch.full_like(result, exact[name]).double(), rtol=close, atol=close), name
        for walk in (sampling.sample, sampling.sample_dpm2):
            done = walk(lambda z, sigma: z * sigma[:, None, None], z, schedule.sigmas(4), stop=3)
            assert done.z.dtype == done.sigma.dtype == dtype
    half = torch.full((2, 1, 2), 0.5, dtype=torch.bfloat16)
    assert schedule.score(half, half, make(s)).dtype == sampling.log_prob(half, half, 0.3).dtype == torch.float32


# Grids of stock pipelines: (shift, steps, first four, last two above 0).
GOLDEN = [
    (schedule.Shift(3.0), 28, "1 .98738 .97411 .96013", ".11091 .00893"),
    (schedule.Shift(3.0), 10, "1 .96013 .91335 .85769", ".27805 .00893"),
    (schedule.Shift(math.exp(0.63), dynamic=True, spacing="plain"), 28, "1 .98066 .96064 .93993", ".12620 .06502"),
    (schedule.Shift(math.exp(1.15), dynamic=True, spacing="plain"), 28, "1 .98841 .97622 .96339", ".19545 .10472"),
    (schedule.Shift(math.exp(0.53871), dynamic=True, terminal=0.02, spacing="plain"), 50, "1 .98806 .97593 .96358", ".05332 .02000"),
    (schedule.Shift(math.exp(0.69355), dynamic=True, terminal=0.02, spacing="plain"), 50, "1 .98970 .97919 .96847", ".05848 .02000"),
    (schedule.Shift(6.0, spacing="plain"), 50, "1 .99661 .99310 .98947", ".20000 .10909"),
    (schedule.Shift(3.0, spacing="plain"), 8, "1 .95455 .90000 .83333", ".50000 .30000"),
]


@pytest.mark.parametrize("law, steps, first, last", GOLDEN)
def test_a_models_own_grid(law, steps, first, last):
    grid = schedule.sigmas(steps, law, "auto")
    wanted = [float(x) for x in f"{first} {last}".split()]
    assert [*grid[:4].tolist(), *grid[-3:-1].tolist()] == pytest.approx(wanted, abs=1e-5) and grid[-1] == 0


def test_a_shift_that_grows_with_the_steps():
    """FLUX.2's, at 512 px (1024 tokens), at 1024 px (4096), and beyond 4300 tokens, where it does not."""
    from rlstitch.backbones import flux2

    settings = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    for tokens, steps, mu in ((1024, 50, 1.70196), (4096, 50, 2.02335), (4096, 4, 2.29118), (5000, 50, 1.30302), (5000, 4, 1.30302)):
        assert math.log(flux2.shift(settings, tokens).at(steps)) == pytest.approx(mu, abs=2e-5), (tokens, steps)
    grid = schedule.sigmas(50, flux2.shift(settings, 1024), "auto")
    assert [*grid[:4].tolist(), *grid[-3:-1].tolist()] == pytest.approx([1, 0.99629, 0.99246, 0.98850, 0.18602, 0.10066], abs=1e-5)
