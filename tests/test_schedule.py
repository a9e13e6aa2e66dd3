"""The path, posterior mean, score and bridge against a Gaussian prior, where all of them are exact."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlstitch import schedule

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
    with pytest.raises(ValueError, match="tau"):
        schedule.bridge(torch.zeros(2, 1), 0.5, 0.5, torch.zeros(2, 1))
