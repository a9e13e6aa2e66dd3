"""Inference-time steering over two callables: `velocity(z, sigma)` of a denoiser and `value(z, sigma)` of an oracle (arXiv:2605.19804)."""

from rlstitch.steering.best_of_n import best_of_n
from rlstitch.steering.dps import dps
from rlstitch.steering.fk import fk, svdd, value_spread

__all__ = ["best_of_n", "dps", "fk", "svdd", "value_spread"]
