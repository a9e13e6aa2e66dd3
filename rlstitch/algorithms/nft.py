"""DiffusionNFT (arXiv:2605.19804, eqs. 65-71; on stitched values 72-77): forward-process policy optimisation, likelihood-free, with any solver.

z_stop comes from the old policy; samples better than their group pull the velocity towards the path through them, worse ones push it away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlstitch import advantages, losses, sampling, schedule
from rlstitch.policy import OLD, REFERENCE, Policy
from rlstitch.ranges import CountOrNone, Guidance, NotNegative, Positive
from rlstitch.types import Batch, Oracle, Rollout, UserError, noise_like


@dataclass
class Slot:
    """One training time of a micro-batch: sigma [B], the trained velocity with its graph, and what it is held against."""

    sigma: Tensor
    v: Tensor
    v_old: Tensor
    target: Tensor
    reference: Tensor | None  # of the base; None without KL


class NFT:
    """beta: how far a step goes (small is far). clip: advantages are clipped to +-clip and mapped to w in [0, 1]. kl: weight of |v - v_base|^2, 0 skips its forward.

    old_decay: how the old policy follows after every update: `none` (a copy: with one optimiser step a rollout it is the current policy wherever a loss is taken,
    so its forward is not run, and beta drops out of the gradient), `slow` (min(0.001 s, 0.5)), `late` (a copy for 75 updates, then min(0.0075 (s - 75), 0.999)).
    solver: of the rollout. times: training times a sample and update, drawn without replacement from the sampler's grid above the stop; 0 takes the released 99 %
    of them. spread (global or group), per_reward: of the advantages, see advantages.of_samples. adaptive: the released self-normalised loss; False is the plain
    squared error, whose variance has no bound where a rollout halts early, so that it is for rollouts to the end alone.
    """

    needs_gradient, collects, keeps_old = False, True, True
    learns_from, needs_oracle, whole_groups = "prompts", True, False
    balances = False
    blurs_distilled = True

    def __init__(
        self,
        backbone: Any,
        policy: Policy,
        oracle: Oracle,
        grid: Tensor,
        *,
        guidance: Guidance = 1.0,
        beta: Positive = 1.0,
        clip: Positive = 5.0,
        kl: NotNegative = 1e-4,
        old_decay: Literal["none", "slow", "late"] = "slow",
        solver: Literal["euler", "dpm2"] = "dpm2",
        times: CountOrNone = 0,
        spread: Literal["global", "group"] = "global",
        adaptive: bool = True,
        per_reward: bool = False,
    ):
        self.backbone, self.policy, self.oracle, self.grid = backbone, policy, oracle, grid
        self.guidance, self.beta, self.clip, self.kl = guidance, beta, clip, kl
        self.old_decay, self.solver, self.times, self.spread, self.adaptive = old_decay, solver, times, spread, adaptive
        self.per_reward = per_reward

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]:
        """What a recipe may get wrong about this algorithm, found before anything loads."""
        if options.get("times", 0) > stops.start:
            return [f"'algorithm.times' is {options['times']}, but only {stops.start} times lie above the earliest stop"]
        return []

    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int:
        """Backward passes a micro-batch needs for one update; the same at every stop, so that accumulation is fixed."""
        return options.get("times", 0) or max(1, int(0.99 * stops.start))

    # ------------------------------------------------------------------------------------------------ rollout

    @torch.no_grad()
    def rollout(self, batch: Batch, stop: int) -> Rollout:
        """z_stop of the old policy, without gradient."""
        if batch.text is None:
            raise UserError("NFT needs the batch's encoded prompts")
        z = noise_like(self.backbone.latent_shape, batch.seeds, device=self.backbone.device)
        solve = sampling.sample_dpm2 if self.solver == "dpm2" else sampling.sample
        with self.policy.use(OLD):
            return Rollout(batch, solve(self.backbone.bind(batch.text, self.guidance), z, self.grid, stop=stop))

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        return self.oracle(rollout.latent, rollout.batch)

    def compare(self, rollouts: Sequence[Rollout], scores: Tensor, group_ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Weights w [B] in [0, 1] of all samples of the update from their scores [B, K] and prompts [B]; NaN where no score is known."""
        advantage, metrics = advantages.of_samples(self.oracle, scores, group_ids, spread=self.spread, per_reward=self.per_reward)
        return self.weigh(advantage), metrics

    def weigh(self, advantage: Tensor) -> Tensor:
        """Advantages of any shape, clipped and mapped to w in [0, 1]; NaN stays NaN."""
        return (advantage.clamp(-self.clip, self.clip) / self.clip + 1) / 2

    # ------------------------------------------------------------------------------------------------ losses

    def levels(self, rollout: Rollout, count: int) -> Tensor:
        """Training times [B, count]: each sample its own draw without replacement from the grid above its stop."""
        return schedule.draw_above(self.grid, float(rollout.latent.sigma[0]), rollout.batch.seeds, count, stream=13)

    def losses(self, rollout: Rollout, weight: Tensor, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss a training time; samples without a score take no part."""
        known = ~torch.isnan(weight)
        w, share = (x.to(rollout.latent.z.device) for x in (torch.where(known, weight, 0.5), known.float()))
        for slot in self.slots(rollout, count):
            yield self.regularised(slot, self.policy_loss(slot, w, share), share)

    def slots(self, rollout: Rollout, count: int) -> Iterator[Slot]:
        """The forwards of each training time, one after the other: old policy where it is another one, base where there is a KL, and current policy."""
        z_tau, tau, batch = rollout.latent.z, rollout.latent.sigma, rollout.batch
        velocity = self.backbone.bind(batch.text, self.guidance)
        for slot, sigma in enumerate(self.levels(rollout, count).to(z_tau.device).unbind(1)):
            noise = noise_like(self.backbone.latent_shape, batch.seeds, stream=101 + slot, device=z_tau.device)
            z, target = schedule.bridge(z_tau, tau, sigma, noise)
            v_old = reference = None
            with torch.no_grad():
                if self.old_decay != "none":
                    with self.policy.use(OLD):
                        v_old = velocity(z, sigma)
                if self.kl:
                    with self.policy.use(REFERENCE):
                        reference = velocity(z, sigma)
            v = velocity(z, sigma)
            yield Slot(sigma, v, v.detach() if v_old is None else v_old, target, reference)

    def policy_loss(self, slot: Slot, w: Tensor, share: Tensor) -> Tensor:
        """Mean of eq. 71 over the samples, each by its weight w [B] in [0, 1] and its share [B] in the loss, times `clip` as released."""
        loss = losses.nft(slot.v, slot.v_old, slot.target, w, self.beta, slot.sigma, adaptive=self.adaptive)
        return (share * self.clip * loss).mean()

    def regularised(self, slot: Slot, loss: Tensor, share: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss with its KL over the samples of `share` [B], and what to log of both."""
        metrics = {"policy_loss": loss.detach()}
        if slot.reference is not None:
            deviation = (share * losses.output_regulariser(slot.v, slot.reference)).mean()
            loss = loss + self.kl * deviation
            metrics["deviation"] = deviation.detach()
        return loss, {"loss": loss.detach(), **metrics}

    def end_step(self, step: int) -> None:
        """theta_old <- d theta_old + (1 - d) theta."""
        s = step + 1
        decay = {"none": 0.0, "slow": min(0.001 * s, 0.5), "late": 0.0 if s < 75 else min(0.0075 * (s - 75), 0.999)}[self.old_decay]
        self.policy.update_old(decay)

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the policy."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing beside the policy."""
