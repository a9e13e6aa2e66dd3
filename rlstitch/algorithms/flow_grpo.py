"""Flow-GRPO and Flow-GRPO-Fast: group-relative policy gradient on a window of stochastic steps, also MixGRPO's sliding window and GRPO-Guard's ratio."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import advantages, losses, sampling
from rlstitch.data import prompt_seeds, update_number
from rlstitch.policy import REFERENCE, Policy
from rlstitch.ranges import Count, CountOrNone, Guidance, NotNegative, Positive, Range
from rlstitch.types import Batch, Latent, Oracle, Rollout, Transition, UserError, noise_like


class FlowGRPO:
    """window: consecutive stochastic steps of a rollout, the only ones trained; all others are Euler's.

    Where the rollout runs to the end the window starts anywhere in `window_range` (0: the whole grid but its last step), by `strategy`: random, or
    progressive (it moves on by its own size every `every` updates). Where it halts early, on a stitched value, it is the last steps before the stop, so that the
    value at the window's end is the credit. sde_type: sde (Flow-GRPO) or cps (Flow-CPS). clip_range is small because log-probabilities are means over the
    latent; with one optimiser step a rollout, as here, the ratio is 1 up to rounding and the clip does not bind. branch: all images of a prompt share one noise
    and the way to the window (as Flow-GRPO-Fast was first released, and MixGRPO), so that they differ by the noise that is trained alone, and the way is walked
    once a prompt. noise_level: a of sde's g = a sqrt(sigma / (1 - sigma)), or of cps' std = sigma_next sin(a pi / 2). clip: advantages are clipped to +-clip. kl: weight of
    |mean - mean_base|^2 / (2 std^2), of sde without the step's sqrt(h). guard: GRPO-Guard's ratio. spread, per_reward: of the advantages, see advantages.of_samples.
    """

    needs_gradient, collects, keeps_old = False, True, False
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
        window: Count = 3,
        window_range: CountOrNone = 0,
        strategy: Literal["random", "progressive"] = "random",
        every: Count = 25,
        sde_type: Literal["sde", "cps"] = "cps",
        noise_level: Annotated[float, Range(0, 100, "low", "a deterministic step has no log-probability to learn from")] = 0.8,
        branch: bool = False,
        clip_range: Positive = 1e-5,
        clip: Positive = 5.0,
        kl: NotNegative = 0.0,
        guard: bool = False,
        spread: Literal["global", "group"] = "global",
        per_reward: bool = False,
    ):
        self.backbone, self.policy, self.oracle, self.grid = backbone, policy, oracle, grid
        self.guidance = guidance
        self.window, self.window_range, self.strategy, self.every = window, window_range, strategy, every
        self.sde_type, self.noise_level, self.clip_range, self.clip = sde_type, noise_level, clip_range, clip
        self.branch = branch
        self.kl, self.guard, self.spread, self.per_reward = kl, guard, spread, per_reward
        self.updates = 0
        last = len(grid) - 1
        if sde_type == "cps" and kl > 0 and last in (window, window_range):
            raise UserError(
                f"'algorithm.kl' is {kl}, and the last of {last} cps steps, which the window takes in, has no noise to divide it by: set algorithm.window and algorithm.window_range to {last - 1} or less, algorithm.sde_type=sde, or algorithm.kl=0"
            )

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]:
        """What a recipe may get wrong about this algorithm, found before anything loads."""
        window, reach = options.get("window", 3), options.get("window_range", 0)
        out = []
        if window > stops.start:
            out.append(f"'algorithm.window' must be within 1..{stops.start} (the earliest stop), not {window}")
        if reach and not window <= reach <= stops.stop - 1:
            out.append(f"'algorithm.window_range' must be within {window}..{stops.stop - 1}, not {reach}")
        last = stops.stop - 1 if stops.stop - stops.start == 1 else 0  # the grid's length, where the rollout runs to its end
        if options.get("sde_type", "cps") == "cps" and reach and reach == last and options.get("kl", 0) > 0:
            out.append(
                f"'algorithm.window_range' is {reach}, and the last step of a cps rollout has no noise to divide the KL by: set it to {reach - 1} or less"
            )
        if options.get("sde_type", "cps") == "cps" and options.get("noise_level", 0.8) >= 1 + 1e-9:
            out.append(f"'algorithm.noise_level' of cps must be at most 1, not {options['noise_level']}")
        return out

    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int:
        """Backward passes a micro-batch needs for one update: one a step of the window."""
        return options.get("window", 3)

    def start_of_window(self, batch: Batch, stop: int) -> int:
        """The same for every sample of an update on every rank: the update's number is in its seeds."""
        last = len(self.grid) - 1
        if stop < last:
            return stop - self.window
        places = (self.window_range or max(self.window, last - 1)) - self.window + 1  # the last step has no noise worth the name
        if self.strategy == "random":
            return random.Random(f"window {update_number(batch.seeds)}").randrange(places)
        starts = [*range(0, places - 1, self.window), places - 1]  # slides by its own length; the last one may overlap
        return starts[self.updates // self.every % len(starts)]

    def step(self, z: Tensor, v: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        """Mean and standard deviation of a stochastic step."""
        if self.sde_type == "cps":
            return sampling.cps(z, v, sigma, sigma_next, self.noise_level)
        return sampling.flow_grpo_sde(z, v, sigma, sigma_next, self.noise_level, first=float(self.grid[1]))

    def log_prob(self, z_next: Tensor, mean: Tensor, std: float) -> Tensor:
        """[B]; of cps every constant is dropped, the variance too, as released."""
        if self.sde_type == "cps":
            return -(z_next.float() - mean.float()).square().flatten(1).mean(1)
        return sampling.log_prob(z_next, mean, std)

    def shared_way(self, batch: Batch, start: int) -> Tensor:
        """z [B, C, H, W] at the window's start by one Euler walk a prompt. Its noise comes from the update and the prompt alone: a group may be cut anywhere."""
        prompts, place = batch.group.unique(return_inverse=True)
        z = noise_like(self.backbone.latent_shape, prompt_seeds(batch.seeds, prompts), stream=500, device=self.backbone.device)
        if start:
            places = place.tolist()
            first = torch.tensor([places.index(k) for k in range(len(prompts))], device=z.device)
            z = sampling.sample(self.backbone.bind(batch.text[first], self.guidance), z, self.grid, stop=start).z
        return z[place.to(z.device)]

    @torch.no_grad()
    def rollout(self, batch: Batch, stop: int) -> Rollout:
        """z_stop of the current policy and the transitions of its window."""
        if batch.text is None:
            raise UserError("Flow-GRPO needs the batch's encoded prompts")
        velocity, levels, transitions = self.backbone.bind(batch.text, self.guidance), self.grid.tolist(), []
        start = self.start_of_window(batch, stop)
        if self.branch:
            begin, z = start, self.shared_way(batch, start)
        else:
            begin, z = 0, noise_like(self.backbone.latent_shape, batch.seeds, device=self.backbone.device)
        for k in range(begin, stop):
            v = velocity(z, torch.full((len(z),), levels[k], device=z.device))
            if start <= k < start + self.window:
                mean, std = self.step(z, v, levels[k], levels[k + 1])
                z_next = mean + std * noise_like(self.backbone.latent_shape, batch.seeds, stream=501 + k, device=z.device)
                log_prob = self.log_prob(z_next, mean, std)
                transitions.append(Transition(z, z_next, levels[k], levels[k + 1], log_prob, mean if self.guard else None))
                z = z_next
            else:
                z = sampling.euler(z, v, levels[k], levels[k + 1])
        return Rollout(batch, Latent(z, torch.full((len(z),), levels[stop], device=z.device)), transitions=transitions)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        return self.oracle(rollout.latent, rollout.batch)

    def compare(self, rollouts: Sequence[Rollout], scores: Tensor, group_ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Advantages [B] of all samples of the update, clipped; NaN where no score is known."""
        advantage, metrics = advantages.of_samples(self.oracle, scores, group_ids, spread=self.spread, per_reward=self.per_reward)
        return advantage.clamp(-self.clip, self.clip), metrics

    def losses(self, rollout: Rollout, advantage: Tensor, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss a step of the window; samples without a score take no part."""
        known = ~torch.isnan(advantage)
        a = torch.where(known, advantage, 0.0).to(rollout.latent.z.device)
        velocity = self.backbone.bind(rollout.batch.text, self.guidance)
        for t in rollout.transitions:
            sigma = torch.full((len(t.z),), t.sigma, device=t.z.device)
            reference = None
            if self.kl:  # before the policy's forward, whose graph would lie beside this one's working memory
                with torch.no_grad(), self.policy.use(REFERENCE):
                    reference, _ = self.step(t.z, velocity(t.z, sigma), t.sigma, t.sigma_next)
            mean, std = self.step(t.z, velocity(t.z, sigma), t.sigma, t.sigma_next)
            log_prob, old = self.log_prob(t.z_next, mean, std), t.log_prob
            guard = None
            if self.guard:  # std times the log-probability that the old mean has lost, by which its ratio is off in the mean
                log_prob, old = log_prob * std, old * std
                guard = (mean - t.mean).square().flatten(1).mean(1) * (std if self.sde_type == "cps" else 1 / (2 * std))
            policy, ratio = losses.clipped_surrogate(log_prob, old, a, self.clip_range, guard=guard)
            loss = policy.mean()
            metrics = {"policy_loss": loss.detach(), "ratio": ratio.detach().mean()}
            if reference is not None:
                length = 1.0 if self.sde_type == "cps" else t.sigma - t.sigma_next  # sde's sqrt(h) is left out of the released KL
                apart = (mean - reference).square().flatten(1).mean(1) / (2 * std**2 / length)
                kl = torch.where(known.to(apart.device), apart, 0.0).mean()
                loss = loss + self.kl * kl
                metrics["kl"] = kl.detach()
            yield loss, {"loss": loss.detach(), **metrics}

    def end_step(self, step: int) -> None:
        """On-policy: every update samples anew from the current weights. One update more, by which a progressive window moves."""
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """Count of updates."""
        return {"updates": torch.tensor(self.updates)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError where the state is of another algorithm."""
        self.updates = int(tensors["updates"])
