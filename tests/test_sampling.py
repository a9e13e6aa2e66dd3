"""The one loop: gradients by finite differences, marginals of the kernels on a Gaussian prior, stops."""

import pytest
import torch

from rlstitch import sampling, schedule
from rlstitch.steering.fk import _keep
from rlstitch.steering.particles import resample
from rlstitch.stops import End, Fixed, UniformWindow
from tests.test_schedule import MEAN, STD, marginal, velocity

SDE = sampling.stochastic(sampling.linear_sde, g=lambda s: s)


def exact(z, sigma):
    return velocity(z, sigma[:, None])


def test_ode_and_linear_sde_keep_the_gaussian_marginals(generator):
    grid, n = schedule.sigmas(200, 1.0, "plain"), 40_000
    start = torch.randn(n, 1, generator=generator)
    for kernel in (sampling.euler, sampling.stochastic(sampling.linear_sde, g=lambda s: 0.8 * s)):
        for stop in (100, 200):
            done = sampling.sample(exact, start, grid, stop=stop, kernel=kernel, generator=torch.Generator().manual_seed(1))
            m, var = marginal(float(grid[stop]))
            assert abs(done.z.mean().item() - m) < 0.02, kernel
            assert abs(done.z.std().item() - var**0.5) < 0.02, kernel
            assert float(done.sigma[0]) == pytest.approx(float(grid[stop]))
    assert MEAN > 0 and STD < 1


def test_gradient_through_the_last_steps_by_finite_differences():
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    grid, start = schedule.sigmas(5, 2.0, "plain"), torch.tensor([[0.4], [-1.1]], dtype=torch.float64)

    def outcome(parameter, frozen, k):
        """Steps before the last k use `frozen`, the last k use `parameter`."""
        z = sampling.sample(lambda z, s: torch.sin(frozen * z) + frozen * s[:, None].double(), start, grid, stop=5 - k) if k < 5 else None
        z = start if z is None else z.z
        for j in range(5 - k, 5):
            s = torch.full((2,), float(grid[j]), dtype=torch.float64)
            z = sampling.euler(z, torch.sin(parameter * z) + parameter * s[:, None], float(grid[j]), float(grid[j + 1]))
        return z.sum()

    for k in (1, 2, 5):
        theta.grad = None
        sampling.sample(lambda z, s: torch.sin(theta * z) + theta * s[:, None].double(), start, grid, num_grad_steps=k).z.sum().backward()
        h, frozen = 1e-6, theta.detach()
        numeric = (outcome(frozen + h, frozen, k) - outcome(frozen - h, frozen, k)) / (2 * h)
        assert theta.grad.item() == pytest.approx(numeric.item(), rel=1e-5)


def test_no_gradient_steps_means_no_graph():
    theta = torch.tensor(0.3, requires_grad=True)
    grid = schedule.sigmas(4, 1.0, "plain")
    assert not sampling.sample(lambda z, s: theta * z, torch.ones(1, 1), grid).z.requires_grad
    with torch.no_grad():
        assert not sampling.sample(lambda z, s: theta * z, torch.ones(1, 1), grid, num_grad_steps=2).z.requires_grad
    begin = torch.ones(1, 1, requires_grad=True)  # what enters the steps with gradient is detached, also where all steps have one
    z = sampling.sample(lambda z, s: theta * z, begin, grid, num_grad_steps=4).z
    assert torch.autograd.grad(z.sum(), [theta, begin], allow_unused=True)[1] is None


@pytest.mark.parametrize(
    "bad", [dict(stop=0), dict(stop=6), dict(num_grad_steps=6), dict(stop=2, num_grad_steps=3), dict(num_grad_steps=-1)]
)
def test_bad_stops_are_refused(bad):
    with pytest.raises(ValueError, match="must be within"):
        sampling.sample(lambda z, s: z, torch.ones(1, 1), schedule.sigmas(5), **bad)


def test_linear_sde_mean_and_std_by_hand():
    z, v = torch.tensor([[1.0]]), torch.tensor([[0.5]])
    mean, std = sampling.linear_sde(z, v, 0.5, 0.3, g=lambda s: 0.4)
    score = -(1.0 + 0.5 * 0.5) / 0.5
    assert mean.item() == pytest.approx(1.0 + 0.2 * (-0.5 + 0.5 * 0.16 * score))
    assert std == pytest.approx(0.4 * 0.2**0.5)
    kernel = sampling.stochastic(sampling.linear_sde, g=lambda s: 0.4)
    done = sampling.sample(lambda *_: v, z, torch.tensor([0.5, 0.3]), kernel=kernel, generator=torch.Generator().manual_seed(5))
    drawn = torch.randn(1, 1, generator=torch.Generator().manual_seed(5))  # of the generator that was given
    torch.testing.assert_close(done.z, mean + std * drawn)


def test_stops():
    assert End().draw(10, 3) == 10 and list(End().steps(10)) == [10]
    assert Fixed(4).draw(10, 3) == 4 and list(Fixed(4).steps(10)) == [4] and UniformWindow(3, 7).steps(10) == range(3, 8)
    drawn = [UniformWindow(3, 7).draw(10, seed) for seed in range(400)]
    assert set(drawn) == {3, 4, 5, 6, 7} and drawn == [UniformWindow(3, 7).draw(10, seed) for seed in range(400)]


@pytest.mark.parametrize("scheme", ["multinomial", "systematic", "residual"])
def test_what_is_drawn_for_a_prompt_does_not_depend_on_who_shares_its_batch(scheme):
    """Streams: each group's noise, ancestors and children are those that its own generator gives it alone, whatever stands beside it."""
    weights = torch.tensor([[0.05, 0.5, 0.25, 0.2], [0.3, 0.3, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    z, values = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0), torch.randn(3, 8)

    def draw(groups):
        generator = sampling.Streams([7 + g for g in groups])
        rows = torch.cat([torch.arange(4 * g, 4 * g + 4) for g in groups])
        noised = SDE(z[rows], z[rows], 0.5, 0.4, generator=generator)
        kept = _keep(values[groups].flatten(), 2, 1.0, generator).view(-1, 4) - 8 * torch.arange(len(groups))[:, None]
        return [noised.view(-1, 4, 5, 2), resample(weights[groups], scheme, generator), kept]

    alone = [torch.cat(parts) for parts in zip(*(draw([g]) for g in range(3)))]
    for found, wanted in zip(draw([0, 1, 2]), alone):
        assert torch.equal(found, wanted)
    for found, wanted in zip(draw([2, 0]), alone):
        assert torch.equal(found, wanted[[2, 0]])
    plain = SDE(z[:4], z[:4], 0.5, 0.4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(plain, alone[0][0]) and not torch.equal(alone[0][1], alone[0][0])
    with pytest.raises(ValueError, match="4 rows are no multiple of the 3 prompts"):
        SDE(z[:4], z[:4], 0.5, 0.4, generator=sampling.Streams([1, 2, 3]))
