"""SOAR (arXiv:2604.12617): reward-free self-correction on pictures; with `points` = 0 it is plain supervised finetuning.

The model takes one guided step from a noised picture, and from where it ends up it is taught the velocity back to that picture: it learns to repair its own
errors, which finetuning on noised pictures alone never shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from rlstitch import losses, schedule
from rlstitch.policy import Policy
from rlstitch.ranges import Guidance, NotNegative, Range, Shift
from rlstitch.types import Batch, Latent, Rollout, UserError, noise_like

STEP = 1 / 40  # of unshifted t: what the rollout moves by


class SOAR:
    """Loss: (sum of the main terms + weight * sum of the auxiliary terms) / (their counts, weighted alike); at weight 1 the main term has 1 / (1 + points) of it.

    Main: flow matching at sigma_0, t_0 ~ logit-normal(0, 1) through the training table. Auxiliary: `points` levels between sigma_1, where the step ends, and the
    upper end, on the line from there to the same noise; their target is (z - z0) / sigma. upper_ratio: the upper end is min(upper_ratio sigma_0, 1); None
    is 1, which is what the released code does whatever its option sigma_upper_ratio says. rollout_guidance: of that step alone; what is trained is the conditional
    velocity. One deterministic path a sample, the released default; its optional stochastic paths are left out. shift: of the training table.
    """

    needs_gradient, collects, keeps_old = False, False, False
    learns_from, needs_oracle, whole_groups = "images", False, False
    balances = False

    def __init__(
        self,
        backbone: Any,
        policy: Policy,
        *,
        shift: Shift = 3.0,
        points: Annotated[int, Range(0, 1000)] = 6,
        weight: NotNegative = 1.0,
        rollout_guidance: Guidance = 4.5,
        upper_ratio: Annotated[float, Range(1, why="it multiplies sigma_0, and the levels lie above it")] | None = None,
    ):
        self.backbone, self.policy, self.shift = backbone, policy, shift
        self.points, self.weight, self.guidance, self.upper_ratio = points if weight else 0, weight, rollout_guidance, upper_ratio

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]:
        """What a recipe may get wrong about this algorithm, found before anything loads."""
        return []

    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int:
        """Backward passes a micro-batch needs for one update: the main term and each auxiliary one, so that one graph is held at a time."""
        return 1 + (options.get("points", 6) if options.get("weight", 1.0) else 0)

    @torch.no_grad()
    def rollout(self, batch: Batch, stop: int) -> Rollout:
        """z_1 at sigma_1, one guided Euler step from the noised picture z_0 at sigma_0, which is kept in `states`. `stop` means nothing here."""
        if batch.text is None or batch.clean is None:
            raise UserError("SOAR needs the batch's encoded prompts and pictures")
        noise = noise_like(batch.clean.shape[1:], batch.seeds, device=batch.clean.device)
        t = noise_like((1,), batch.seeds, stream=701, device=noise.device)[:, 0].double().sigmoid()
        sigma = schedule.training_sigma(t, self.shift)
        z = schedule.interpolate(batch.clean, noise, sigma)
        latent = Latent(z, sigma)
        if self.points:
            lower = schedule.training_sigma((t - STEP).clamp(min=0), self.shift)
            v = self.backbone.velocity(z, sigma, batch.text, guidance=self.guidance)
            latent = Latent(z + (lower - sigma).view(-1, 1, 1, 1) * v, lower)
        return Rollout(batch, latent, states=[(z, sigma)])

    def score(self, rollout: Rollout) -> Tensor:
        """No reward: [B, 0]."""
        return torch.empty(len(rollout.batch), 0, device=rollout.latent.z.device)

    def corrections(self, rollout: Rollout, noise: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(z, sigma, target) of every auxiliary point, towards `noise` from where the step ended."""
        end, lower, (_, sigma) = rollout.latent.z, rollout.latent.sigma, rollout.states[0]
        upper = torch.ones_like(sigma) if self.upper_ratio is None else (self.upper_ratio * sigma).clamp(max=1)
        uniform = torch.special.ndtr(noise_like((self.points,), rollout.batch.seeds, stream=702, device=end.device))
        for u in uniform.unbind(1):
            level = lower + u * (upper - lower)
            a = ((level - lower) / (1 - lower)).view(-1, 1, 1, 1)
            z = (1 - a) * end + a * noise
            yield z, level, (z - rollout.batch.clean) / level.view(-1, 1, 1, 1)

    def losses(self, rollout: Rollout) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """1 + points losses whose mean is the objective."""
        batch, (z, sigma) = rollout.batch, rollout.states[0]
        noise = noise_like(batch.clean.shape[1:], batch.seeds, device=z.device)
        velocity = self.backbone.bind(batch.text)
        share = (1 + self.points) / (1 + self.weight * self.points)
        error = losses.flow_matching(velocity(z, sigma), batch.clean, noise).mean()
        yield share * error, {"loss": (share * error).detach(), "flow_matching": error.detach()}
        table = schedule.training_table(self.shift).to(z.device)
        for z, level, target in self.corrections(rollout, noise):
            nearest = table[(table - level[:, None]).abs().argmin(1)]  # the denoiser is told the table's sigma, as released
            error = (velocity(z, nearest) - target).square().mean()
            yield self.weight * share * error, {"loss": (self.weight * share * error).detach(), "correction": error.detach()}

    def end_step(self, step: int) -> None:
        """Nothing follows the policy."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the policy."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing beside the policy."""
