"""Step kernels and `sample()`, the one loop over time. A step goes from sigma to sigma_next < sigma; h = sigma - sigma_next > 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlstitch import schedule
from rlstitch.types import Latent, Velocity

Kernel = Callable[..., Tensor]  # (z, v, sigma, sigma_next, generator=None) -> z_next


def euler(z: Tensor, v: Tensor, sigma: float, sigma_next: float, generator: torch.Generator | None = None) -> Tensor:
    """One step of the probability-flow ODE: z + (sigma_next - sigma) v."""
    return z + (sigma_next - sigma) * v


def square_diffusion(sigma: float, norm: float = 3.0) -> float:
    """g(sigma) = norm sigma^2, the coefficient whose released norm is 3."""
    return norm * sigma**2


def linear_sde(
    z: Tensor, v: Tensor, sigma: float, sigma_next: float, g: Callable[[float], float] = square_diffusion
) -> tuple[Tensor, float]:
    """Mean and standard deviation of one Euler-Maruyama step of the SDE with the ODE's marginals and diffusion g: (mean [B, ...], std)."""
    h, diffusion = sigma - sigma_next, g(sigma)
    drift = -schedule.wide(v) + 0.5 * diffusion**2 * schedule.score(z, v, sigma)
    return z + h * drift, diffusion * h**0.5


def flow_grpo_sde(
    z: Tensor, v: Tensor, sigma: float, sigma_next: float, noise_level: float = 0.7, first: float | None = None
) -> tuple[Tensor, float]:
    """Flow-GRPO's step: linear_sde with g = noise_level sqrt(sigma / (1 - sigma)); at sigma = 1 the denominator takes `first` (default: sigma_next) instead."""
    safe = sigma if sigma < 1 else (sigma_next if first is None else first)
    return linear_sde(z, v, sigma, sigma_next, g=lambda s: noise_level * (s / (1 - safe)) ** 0.5)


def cps(z: Tensor, v: Tensor, sigma: float, sigma_next: float, noise_level: float = 0.8) -> tuple[Tensor, float]:
    """Flow-CPS: mean and std of a step that keeps the coefficients of clean and noise: std = sigma_next sin(noise_level pi / 2)."""
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    clean, noise = schedule.posterior_mean(z, v, sigma), z + (1 - sigma) * v
    return (1 - sigma_next) * clean + (sigma_next**2 - std**2) ** 0.5 * noise, std


def log_prob(z_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian log-density of a step, its **mean** over all but the batch (Flow-GRPO's convention), in float32 or float64: [B, ...] -> [B]."""
    error = (schedule.wide(z_next) - schedule.wide(mean)).square() / (2 * std**2)
    return (-error - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


class Streams(torch.Generator):
    """A generator a prompt, for batches in which a prompt's rows lie side by side: what is drawn for it is its own, whoever shares its batch. To whoever draws from it as
    from a plain generator it is one, seeded like the first prompt's."""

    def __new__(cls, seeds: Sequence[int]):
        return super().__new__(cls)

    def __init__(self, seeds: Sequence[int]):
        super().__init__()
        self.manual_seed(seeds[0])
        self.each = [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(draw: Callable[[torch.Generator | None, int, int], Tensor], rows: int, generator: torch.Generator | None) -> Tensor:
    """`draw(generator, first, rows)`, which is random [rows, ...], of all rows at once, or of each prompt's from its own of `Streams`."""
    if not isinstance(generator, Streams):
        return draw(generator, 0, rows)
    each, rest = divmod(rows, len(generator.each))
    if rest:
        raise ValueError(f"{rows} rows are no multiple of the {len(generator.each)} prompts that noise is drawn for")
    return torch.cat([draw(own, k * each, each) for k, own in enumerate(generator.each)])


def stochastic(step: Callable[..., tuple[Tensor, float]], *, noise: Callable[[Tensor], Tensor] | None = None, **options) -> Kernel:
    """Turn a (mean, std) step into a kernel that draws from it; noise: the standard normal draw for a state, by default the generator's for the whole batch."""

    def normal(z: Tensor, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator else z.device
        draw = lambda own, _, rows: torch.randn(rows, *z.shape[1:], generator=own, device=device, dtype=z.dtype)  # noqa: E731
        return drawn(draw, len(z), generator).to(z.device)

    def kernel(z: Tensor, v: Tensor, sigma: float, sigma_next: float, generator: torch.Generator | None = None) -> Tensor:
        mean, std = step(z, v, sigma, sigma_next, **options)
        return mean + std * (normal(z, generator) if noise is None else noise(z))

    return kernel


def _level(z: Tensor, sigma: float) -> Tensor:
    """sigma [B] for every row of z, in float64 where z is."""
    return torch.full((len(z),), sigma, device=z.device, dtype=schedule.precision(z))


def sample(
    velocity: Velocity,
    z: Tensor,
    sigmas: Tensor,
    *,
    stop: int | None = None,
    num_grad_steps: int = 0,
    kernel: Kernel = euler,
    generator: torch.Generator | None = None,
) -> Latent:
    """Walk z [B, C, H, W] down the grid for `stop` steps (None: to its end) and keep the gradient through the last `num_grad_steps` (DRaFT-K, eq. 63).

    The latent that enters those steps is detached; the steps before run without gradient. Raises ValueError where stop or num_grad_steps do not fit.
    """
    last = len(sigmas) - 1
    stop = last if stop is None else stop
    if not 1 <= stop <= last:
        raise ValueError(f"stop must be within 1..{last} on this grid, not {stop}")
    if not 0 <= num_grad_steps <= stop:
        raise ValueError(f"num_grad_steps must be within 0..{stop} (the number of steps taken), not {num_grad_steps}")
    levels = sigmas.tolist()
    for k in range(stop):
        grad = k >= stop - num_grad_steps
        if k == stop - num_grad_steps:
            z = z.detach()
            torch.clear_autocast_cache()  # torch before 2.10 would use the casts made without gradient again, and none would reach the weights
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            v = velocity(z, _level(z, levels[k]))
            z = kernel(z, v, levels[k], levels[k + 1], generator=generator)
    return Latent(z, _level(z, levels[stop]))


def sample_dpm2(velocity: Velocity, z: Tensor, sigmas: Tensor, *, stop: int | None = None) -> Latent:
    """The deterministic second-order multistep solver in data prediction (2M in lambda = log((1 - sigma) / sigma)), for rollouts without gradient.

    First step and the step to sigma = 0 are Euler's; the second is, too, as lambda is -inf at sigma = 1. Same arguments and errors as `sample`.
    """
    last = len(sigmas) - 1
    stop = last if stop is None else stop
    if not 1 <= stop <= last:
        raise ValueError(f"stop must be within 1..{last} on this grid, not {stop}")
    levels = sigmas.double().tolist()

    def log_snr(sigma: float) -> float:
        return math.log((1 - sigma) / sigma) if 0 < sigma < 1 else math.copysign(math.inf, 0.5 - sigma)

    previous: Tensor | None = None
    with torch.no_grad():
        for k in range(stop):
            s, t = levels[k], levels[k + 1]
            v = schedule.wide(velocity(z, _level(z, s)))
            guess = schedule.posterior_mean(z, v, s)
            if previous is None or t == 0 or s == 1:
                z = euler(z, v, s, t)
            else:
                h, h0 = log_snr(t) - log_snr(s), log_snr(s) - log_snr(levels[k - 1])
                slope = (guess - previous) * (h / h0)
                z = (t / s) * z - (1 - t) * math.expm1(-h) * (guess + 0.5 * slope)
            previous = guess
    return Latent(z, _level(z, levels[stop]))
