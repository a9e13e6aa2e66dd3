"""DRaFT-K and DRaFT-LV (arXiv:2605.19804, eqs. 63-64), AlignProp and ReFL: maximise the oracle through the last K steps before the stop, with a regulariser against the frozen base."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import losses, sampling, schedule
from rlstitch.data import update_number
from rlstitch.oracles import recomputed
from rlstitch.policy import REFERENCE, Policy
from rlstitch.ranges import CountOrNone, Guidance, NotNegative, Positive, Range
from rlstitch.types import Batch, Latent, Oracle, Rollout, UserError, noise_like


class Draft:
    """Loss: -total(oracle(z_stop)) + regulariser * mean over the K steps of |v - v_base|^2.

    grad_steps: K, the last steps before the stop that carry gradient; 0 leaves the gradient to an oracle that runs the policy itself, which with a Tweedie
    oracle is ReFL. truncation: fixed K; or AlignProp's randomised one, a new K every update: uniform on 1..stop, or gaussian with mean `grad_steps` and
    `grad_steps_std`, rounded down and drawn again until it is within 1..stop. regulariser: the paper's lambda, 0 for none. ceiling: the hinge
    max(ceiling - reward, 0) in place of -reward (ReFL's 2).
    variance_reduction: DRaFT-LV; the stopped latent is noised back to the last step's level this many more times and each is denoised once with gradient (K = 1).
    """

    needs_gradient, collects, keeps_old = True, False, False
    learns_from, needs_oracle, whole_groups = "prompts", True, False
    balances = False

    def __init__(
        self,
        backbone: Any,
        policy: Policy,
        oracle: Oracle,
        grid: Tensor,
        *,
        guidance: Guidance = 1.0,
        grad_steps: CountOrNone = 1,
        truncation: Literal["fixed", "uniform", "gaussian"] = "fixed",
        grad_steps_std: Positive = 1.0,
        ceiling: float | None = None,
        regulariser: NotNegative = 0.01,
        variance_reduction: Annotated[int, Range(0, 1000)] = 0,
    ):
        self.backbone, self.policy, self.oracle, self.grid = backbone, policy, oracle, grid
        self.guidance = guidance
        self.grad_steps, self.truncation, self.grad_steps_std = grad_steps, truncation, grad_steps_std
        self.ceiling, self.regulariser, self.variance_reduction = ceiling, regulariser, variance_reduction

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]:
        """What a recipe may get wrong about this algorithm, found before anything loads."""
        k, lv = options.get("grad_steps", 1), options.get("variance_reduction", 0)
        out = []
        if k > stops.start:
            out.append(f"'algorithm.grad_steps' must be within 1..{stops.start} (the earliest stop), or 0 under a Tweedie oracle, not {k}")
        if k == 0 and options.get("regulariser", 0.01) > 0:
            out.append("'algorithm.regulariser' needs steps with gradient, and algorithm.grad_steps is 0: set algorithm.regulariser=0")
        if k == 0 and options.get("truncation", "fixed") != "fixed":
            out.append(
                f"'algorithm.truncation={options['truncation']}' draws steps with gradient, and algorithm.grad_steps is 0: set it to the mean"
            )
        if lv and (k != 1 or options.get("truncation", "fixed") != "fixed"):
            out.append(f"'algorithm.variance_reduction' is {lv}: DRaFT-LV needs grad_steps=1 and truncation=fixed")
        return out

    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int:
        """Backward passes a micro-batch needs for one update."""
        return 1

    def depth(self, batch: Batch, stop: int) -> int:
        """K of this update, the same for every sample on every rank: the update's number is in its seeds."""
        if self.truncation == "fixed":
            return self.grad_steps
        source = random.Random(f"depth {update_number(batch.seeds)}")  # a stream of its own: the stop is drawn from the plain number
        if self.truncation == "uniform":
            return source.randint(1, stop)
        while not 1 <= (k := int(source.gauss(self.grad_steps, self.grad_steps_std))) <= stop:
            continue
        return k

    def rollout(self, batch: Batch, stop: int) -> Rollout:
        """z_stop with the graph of its last K steps; the states and velocities of those steps are kept for the regulariser."""
        if batch.text is None:
            raise UserError("DRaFT needs the batch's encoded prompts")
        rollout = Rollout(batch, Latent(torch.empty(0), torch.empty(0)))
        velocity = self.backbone.bind(batch.text, self.guidance)

        def recorded(z: Tensor, sigma: Tensor) -> Tensor:
            v = velocity(z, sigma)
            if torch.is_grad_enabled():
                rollout.states.append((z.detach(), sigma))
                rollout.velocities.append(v)
            return v

        start = noise_like(self.backbone.latent_shape, batch.seeds, device=self.backbone.device)
        rollout.latent = sampling.sample(recorded, start, self.grid, stop=stop, num_grad_steps=self.depth(batch, stop))
        if self.variance_reduction:
            rollout.latent = self._renoised(rollout, recorded, stop)
        return rollout

    def _renoised(self, rollout: Rollout, velocity: Any, stop: int) -> Latent:
        """DRaFT-LV: further one-step samples around the same stopped latent, stacked behind the first; scores are averaged by `losses`.

        The level is noised along the bridge from the stop's sigma to the last step's, which is plain noising where the stop is the end.
        """
        high, low, z = float(self.grid[stop - 1]), float(self.grid[stop]), rollout.latent.z
        out = [z]
        for k in range(self.variance_reduction):
            noise = noise_like(self.backbone.latent_shape, rollout.batch.seeds, stream=k + 1, device=z.device)
            noised, _ = schedule.bridge(z.detach(), low, high, noise)
            out.append(sampling.euler(noised, velocity(noised, torch.full((len(z),), high, device=z.device)), high, low))
        return Latent(torch.cat(out), rollout.latent.sigma.repeat(1 + self.variance_reduction))

    def score(self, rollout: Rollout) -> Tensor:
        """Oracle scores [B, K] of the stopped latents, averaged over DRaFT-LV's copies."""
        copies = 1 + self.variance_reduction
        batch, b = rollout.batch, len(rollout.batch)
        wide = (
            batch
            if copies == 1
            else Batch(
                batch.prompts * copies,
                batch.group.repeat(copies),
                batch.seeds.repeat(copies),
                batch.facts * copies,
                batch.text[torch.arange(b).repeat(copies)],
            )
        )
        scores = recomputed(self.oracle, rollout.latent, wide) if self.backbone.checkpointing else self.oracle(rollout.latent, wide)
        return scores.view(copies, b, -1).mean(0)

    def losses(self, rollout: Rollout) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss; samples without a score add nothing to it but the regulariser."""
        reward = self.oracle.total(rollout.scores)
        each, missing = -reward if self.ceiling is None else (self.ceiling - reward).relu(), reward.isnan()
        loss, metrics = torch.where(missing, 0.0, each).mean(), {"masked": missing.float()}
        if self.regulariser > 0:
            with torch.no_grad(), self.policy.use(REFERENCE):
                velocity = self.backbone.bind(rollout.batch.text, self.guidance)
                reference = [velocity(z, sigma) for z, sigma in rollout.states]
            deviation = torch.stack([losses.output_regulariser(v, r).mean() for v, r in zip(rollout.velocities, reference)]).mean()
            loss = loss + self.regulariser * deviation
            metrics["deviation"] = deviation.detach()
        yield loss, {"loss": loss.detach(), "reward": reward.detach(), **metrics}

    def end_step(self, step: int) -> None:
        """DRaFT keeps no second policy."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the policy."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing beside the policy."""
