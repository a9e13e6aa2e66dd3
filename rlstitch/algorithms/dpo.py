"""Diffusion-DPO (arXiv:2311.12908) for flow models: on given pairs of pictures, and online on the best and the worst of each prompt's own samples.

The better picture's velocity error must fall below the base model's by more than the worse one's does. Online with a stitched value the pair are latents
at sigma_tau, and the velocity is regressed on the bridge from there (arXiv:2605.19804, eqs. 74-77); the paper has no such variant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlstitch import losses, sampling, schedule
from rlstitch.advantages import dead_groups
from rlstitch.policy import REFERENCE, Policy
from rlstitch.ranges import Count, Guidance, Positive, Shift
from rlstitch.types import Batch, Latent, Oracle, Rollout, UserError, Velocity, noise_like


def _loss(
    policy: Policy, velocity: Velocity, z: Tensor, sigma: Tensor, target: Tensor, beta: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """losses.dpo of the policy against its base, with both of a pair in one forward: z, target [P, 2, C, H, W], sigma, weight [P] -> [P], margin [P]."""
    both, levels = z.flatten(0, 1), sigma.repeat_interleave(2)
    with torch.no_grad(), policy.use(REFERENCE):
        reference = velocity(both, levels).view_as(z)
    return losses.dpo(velocity(both, levels).view_as(z), reference, target, beta, weight)


def _told(loss: Tensor, margin: Tensor, share: Tensor) -> dict[str, Tensor]:
    """accuracy: the share of pairs that the policy, held against its base, tells apart rightly; pairs of share 0 are left out (NaN)."""
    there, right = share > 0, (margin > 0).float()
    return {
        "loss": loss.detach(),
        "margin": torch.where(there, margin.detach(), torch.nan),
        "accuracy": torch.where(there, right, torch.nan),
    }


def _faults(options: dict[str, Any], levels: int) -> list[str]:
    """What both have in common and a recipe may get wrong; `levels` is how many training times there are to draw from."""
    if options.get("times", 1) > levels:
        return [f"'algorithm.times' is {options['times']}, but only {levels} times lie above the earliest stop"]
    return []


class OfflineDPO:
    """On pairs of pictures. beta: of the margin; the larger, the smaller a departure from the base suffices (released: 2000 for SD1.5, 5000 for SDXL).

    times: noise levels a pair and update, each with a backward of its own. draw: `logit_normal` through the training table, as SD3 is trained, or `grid`, from
    the sampler's. shift: of the training table.
    """

    needs_gradient, collects, keeps_old = False, False, False
    learns_from, needs_oracle, whole_groups = "pairs", False, False
    balances = False

    def __init__(
        self,
        backbone: Any,
        policy: Policy,
        grid: Tensor,
        *,
        shift: Shift = 3.0,
        beta: Positive = 2000.0,
        times: Count = 1,
        draw: Literal["logit_normal", "grid"] = "logit_normal",
    ):
        self.backbone, self.policy, self.grid = backbone, policy, grid
        self.shift, self.beta, self.times, self.draw = shift, beta, times, draw

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]:
        """What a recipe may get wrong about this algorithm, found before anything loads."""
        return _faults(options, stops.start if options.get("draw") == "grid" else 1000)

    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int:
        """Backward passes a micro-batch needs for one update."""
        return options.get("times", 1)

    def rollout(self, batch: Batch, stop: int) -> Rollout:
        """The given pairs [B, 2, C, H, W] at sigma 0: nothing is sampled, and `stop` means nothing here."""
        if batch.text is None or batch.clean is None:
            raise UserError("offline DPO needs the batch's encoded prompts and pairs of pictures")
        return Rollout(batch, Latent(batch.clean, torch.zeros(len(batch), device=batch.clean.device)))

    def score(self, rollout: Rollout) -> Tensor:
        """No reward: [B, 0]."""
        return torch.empty(len(rollout.batch), 0, device=rollout.latent.z.device)

    def levels(self, seeds: Tensor) -> Tensor:
        """Noise levels [B, times], one draw for both of a pair."""
        if self.draw == "grid":
            return schedule.draw_above(self.grid, 0.0, seeds, self.times, stream=29)
        return schedule.training_sigma(noise_like((self.times,), seeds, stream=701).double().sigmoid(), self.shift)

    def losses(self, rollout: Rollout) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss a noise level."""
        batch, pair = rollout.batch, rollout.latent.z
        velocity = self.backbone.bind(batch.interleave(2).text)
        for slot, sigma in enumerate(self.levels(batch.seeds).to(pair.device).unbind(1)):
            noise = noise_like(pair.shape[2:], batch.seeds, stream=101 + slot, device=pair.device)[:, None]
            z, target = schedule.interpolate(pair, noise, sigma), noise - pair
            each, margin = _loss(self.policy, velocity, z, sigma, target, self.beta, share := torch.ones_like(sigma))
            loss = each.mean()
            yield loss, _told(loss, margin, share)

    def end_step(self, step: int) -> None:
        """The reference is the base, which stays."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the policy."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing beside the policy."""


class OnlineDPO:
    """On the best and the worst of each prompt's samples from the current policy, by the oracle's total. Samples without a score take no part.

    Groups whose known scores are all alike are skipped. times: noise levels a pair and update, from the sampler's grid above the stop. Off the end the pair's
    weight is 1 / (1 + the bridge target's extra variance), so that the gradient stays bounded as sigma -> tau. solver: of the rollout.
    """

    needs_gradient, collects, keeps_old = False, True, False
    learns_from, needs_oracle, whole_groups = "prompts", True, True
    balances = False

    def __init__(
        self,
        backbone: Any,
        policy: Policy,
        oracle: Oracle,
        grid: Tensor,
        *,
        guidance: Guidance = 1.0,
        images_per_prompt: int,
        beta: Positive = 2000.0,
        times: Count = 1,
        solver: Literal["euler", "dpm2"] = "dpm2",
    ):
        self.backbone, self.policy, self.oracle, self.grid = backbone, policy, oracle, grid
        self.guidance, self.images = guidance, images_per_prompt
        self.beta, self.times, self.solver = beta, times, solver

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]:
        """What a recipe may get wrong about this algorithm, found before anything loads."""
        return _faults(options, stops.start)

    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int:
        """Backward passes a micro-batch needs for one update."""
        return options.get("times", 1)

    @torch.no_grad()
    def rollout(self, batch: Batch, stop: int) -> Rollout:
        """z_stop of the current policy, without gradient."""
        if batch.text is None:
            raise UserError("online DPO needs the batch's encoded prompts")
        z = noise_like(self.backbone.latent_shape, batch.seeds, device=self.backbone.device)
        solve = sampling.sample_dpm2 if self.solver == "dpm2" else sampling.sample
        return Rollout(batch, solve(self.backbone.bind(batch.text, self.guidance), z, self.grid, stop=stop))

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        return self.oracle(rollout.latent, rollout.batch)

    def compare(self, rollouts: Sequence[Rollout], scores: Tensor, group_ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Totals [B] of all samples of the update, NaN where no score is known; each micro-batch holds whole groups and pairs them itself."""
        total = self.oracle.total(scores)
        return total, {
            "reward": float(total.nanmean()),
            "dead_groups": dead_groups(total, group_ids),
            "masked": float(total.isnan().float().mean()),
        }

    def pairs(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [G, 2] of the best and the worst of each group, and whether [G] they differ; totals [B] stand group by group."""
        grouped = total.view(-1, self.images)
        best = torch.where(grouped.isnan(), -torch.inf, grouped).max(1)
        worst = torch.where(grouped.isnan(), torch.inf, grouped).min(1)
        first = torch.arange(len(grouped), device=total.device) * self.images
        return torch.stack([first + best.indices, first + worst.indices], 1), best.values > worst.values

    def losses(self, rollout: Rollout, total: Tensor, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss a noise level, the mean over all groups, of which skipped ones count nothing."""
        batch, device, tau = rollout.batch, rollout.latent.z.device, float(rollout.latent.sigma[0])
        rows, differ = (x.to(device) for x in self.pairs(total))
        pair, share = rollout.latent.z[rows], differ.float()
        seeds = batch.seeds[:: self.images]
        velocity = self.backbone.bind(batch.text[rows.flatten()], self.guidance)
        for slot, sigma in enumerate(schedule.draw_above(self.grid, tau, seeds, count, stream=29).to(device).unbind(1)):
            noise = noise_like(pair.shape[2:], seeds, stream=101 + slot, device=device)[:, None].expand_as(pair)
            z, target = schedule.bridge(pair, tau, sigma, noise)
            weight = 1 / (1 + schedule.bridge_variance(tau, sigma))
            each, margin = _loss(self.policy, velocity, z, sigma, target, self.beta, weight)
            loss = (share * each).mean()
            yield loss, _told(loss, margin, share)

    def end_step(self, step: int) -> None:
        """On-policy: every update samples anew from the current weights; the reference is the base, which stays."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the policy."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing beside the policy."""
