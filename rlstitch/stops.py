"""Stopping-step samplers: after how many steps of the grid a rollout halts. One draw an update, the same on every rank and for every group."""

from __future__ import annotations

import random
from typing import Protocol

from rlstitch.ranges import Count


class Stop(Protocol):
    def steps(self, num_steps: int) -> range:
        """Every step count that can be drawn on a grid of num_steps."""

    def draw(self, num_steps: int, seed: int) -> int: ...


class End:
    """Run the grid to its end: the only stop that a terminal reward can score."""

    def steps(self, num_steps: int) -> range:
        return range(num_steps, num_steps + 1)

    def draw(self, num_steps: int, seed: int) -> int:
        return num_steps


class Fixed:
    """Always halt after `after` steps."""

    def __init__(self, after: Count):
        self.after = after

    def steps(self, num_steps: int) -> range:
        return range(self.after, self.after + 1)

    def draw(self, num_steps: int, seed: int) -> int:
        return self.after


class UniformWindow:
    """Halt after k steps, k uniform on [low, high], both ends included (the paper's k ~ U{3..7} of 10)."""

    def __init__(self, low: Count, high: Count):
        self.low, self.high = low, high

    def steps(self, num_steps: int) -> range:
        return range(self.low, self.high + 1)

    def draw(self, num_steps: int, seed: int) -> int:
        return random.Random(seed).randint(self.low, self.high)
