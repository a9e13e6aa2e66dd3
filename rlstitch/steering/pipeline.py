"""Steering a stock diffusers pipeline: callbacks for `callback_on_step_end`, for any flow-matching scheduler.

value = StitchedValueModel.from_pretrained("shapes:value_clip")
guide = GradientGuide(value, prompts, scale=2.0)
pipe(prompts, callback_on_step_end=guide)

Some pipelines (FLUX, Qwen-Image) hand packed latents to callbacks, which do not tell the picture's sides: the guides then need those of the call, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rlstitch.steering.dps import tilt, value_gradient
from rlstitch.steering.particles import Potential, Potentials, Scheme, Trace, effective_size, normalised, resample
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Batch, Conditioning, Latent, UserError


def flow_sigma(pipe: Any, step: int) -> float:
    """Flow time of the latents that enter step `step` of a pipeline's schedule (its length: the finished latent, 0). Refuses schedulers of other paths."""
    config, timesteps = pipe.scheduler.config, pipe.scheduler.timesteps
    kind = type(pipe.scheduler).__name__
    if not ("FlowMatch" in kind or config.get("use_flow_sigmas", False) or config.get("prediction_type", "") == "flow_prediction"):
        raise UserError(
            f"a value of flow-matching latents cannot read those of {kind}: use a flow-matching scheduler, e.g. FlowMatchEulerDiscreteScheduler"
        )
    return float(timesteps[step]) / config.num_train_timesteps if step < len(timesteps) else 0.0


class _Bound:
    """A value model (or an oracle) with the prompts and the picture's size of one pipeline call bound in."""

    def __init__(
        self,
        value: Any,
        prompts: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        text: Conditioning | None = None,
    ):
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("no prompt was given to steer by")
        index = torch.arange(len(prompts))
        if text is not None and len(text) != len(prompts):
            raise UserError(f"the guide was given {len(prompts)} prompts and the text of {len(text)}: as many of both")
        self.batch = Batch(prompts, index, index, text=text)
        self.ask: Callable[[Latent, Batch], Tensor] = (
            value.value if isinstance(value, StitchedValueModel) else lambda latent, batch: value.total(value(latent, batch))
        )
        self.sigma_range, self.size = value.sigma_range, (height, width)
        prefix = next((m.prefix for m in (value, *getattr(value, "models", ())) if hasattr(m, "prefix")), None)
        self.arch = getattr(prefix, "arch", None) or getattr(getattr(value, "backbone", None), "arch", None)
        self.device = value.reward.device if isinstance(value, StitchedValueModel) else None

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        copies, rest = divmod(len(z), len(self.batch))
        if rest:
            raise UserError(
                f"the pipeline holds {len(z)} latents, no multiple of the {len(self.batch)} prompts that the guide was made with"
            )
        if self.device is not None and torch.device(self.device).type != z.device.type:
            raise UserError(
                f"the pipeline runs on {z.device}, the value on {self.device}: load it there with StitchedValueModel.from_pretrained(..., device='{z.device}')"
            )
        return self.ask(Latent(z.float(), sigma), self.batch.interleave(copies))

    def unpacked(self, pipe: Any, latents: Tensor) -> Tensor:
        """Latents of a callback as the value takes them, float32 [B, C, H, W]. Raises UserError where they are packed and nothing tells the picture's sides."""
        if latents.ndim != 3:
            return latents.float()
        if self.arch is None or None in self.size:
            raise UserError(
                f"this pipeline hands over packed latents {list(latents.shape)}, from which a picture's sides cannot be told: give the guide the height and width of the call"
            )
        channels, factor, patch, _ = self.arch.latent(pipe.transformer.config, pipe.vae.config)
        height, width = self.size[0] // factor, self.size[1] // factor
        if height % patch or width % patch or height * width * channels != latents[0].numel():
            raise UserError(
                f"the guide was made for pictures of {self.size[1]} x {self.size[0]}, and the pipeline's latents {list(latents.shape)} are of another size: give it the height and width of the call"
            )
        return self.arch.from_pipeline(latents.float(), height, width)

    def packed(self, z: Tensor, latents: Tensor) -> Tensor:
        """Back to what the callback gave."""
        return (z if latents.ndim != 3 else self.arch.to_pipeline(z)).to(latents.dtype)

    def answers(self, sigma: float) -> bool:
        return self.sigma_range[0] <= sigma <= self.sigma_range[1]


class GradientGuide:
    """DPS by operator splitting: after every step the latents gain h scale sigma / (1 - sigma) grad V, h the length of the step to come.

    The same first-order law as `steering.dps`, without touching the pipeline's solver. steps: indices after which to guide (None: all that the value
    answers for). value: a StitchedValueModel or an oracle; prompts: those of the call (its num_images_per_prompt may be any); height, width: its picture's, where
    latents are packed; text: backbone.encode_prompts(prompts), for a value that was stitched under the prompts' own text.
    """

    tensor_inputs = ["latents"]

    def __init__(
        self,
        value: Any,
        prompts: str | Sequence[str],
        *,
        scale: float = 1.0,
        steps: Collection[int] | None = None,
        max_coefficient: float = 20.0,
        height: int | None = None,
        width: int | None = None,
        text: Conditioning | None = None,
    ):
        self.value = _Bound(value, prompts, height, width, text)
        self.scale, self.steps, self.max_coefficient = scale, steps, max_coefficient

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sigma, after = flow_sigma(pipe, step + 1), flow_sigma(pipe, step + 2)
        if sigma == 0 or self.scale == 0 or not self.value.answers(sigma) or (self.steps is not None and step not in self.steps):
            return tensors
        latents = tensors["latents"]
        z = self.value.unpacked(pipe, latents)
        _, gradient = value_gradient(self.value, z, torch.full((len(z),), sigma, device=z.device))
        shift = (sigma - after) * tilt(sigma, self.scale, self.max_coefficient)
        return tensors | {"latents": self.value.packed(z + shift * gradient, latents)}


class ParticleGuide:
    """FK steering of a pipeline called with num_images_per_prompt = N: after the steps in `resample_steps`, and at the end, latents are resampled by value.

    The scheduler must add noise (FlowMatchEulerDiscreteScheduler with stochastic_sampling=True): copies would never part under a deterministic one.
    """

    tensor_inputs = ["latents"]

    def __init__(
        self,
        value: Any,
        prompts: str | Sequence[str],
        *,
        num_particles: int,
        resample_steps: Collection[int],
        lam: float,
        potential: Potential = "diff",
        resampling: Scheme = "systematic",
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        text: Conditioning | None = None,
    ):
        if num_particles < 1:
            raise UserError(f"num_particles must be at least 1, not {num_particles}")
        self.value, self.particles, self.steps = _Bound(value, prompts, height, width, text), num_particles, set(resample_steps)
        self.lam, self.potential, self.resampling, self.generator = lam, potential, resampling, generator
        self.trace = Trace(lam=lam)
        self._potentials: Potentials | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not pipe.scheduler.config.get("stochastic_sampling", False):
            raise UserError(
                "this pipeline's scheduler adds no noise, so resampled copies would stay identical: "
                "set pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)"
            )
        latents, last = tensors["latents"], len(pipe.scheduler.timesteps) - 1
        if outside := [k for k in self.steps if not 0 <= k <= last]:
            raise UserError(f"resample_steps {outside[:5]} lie beyond the schedule: its steps are 0..{last}")
        if len(latents) != len(self.value.batch) * self.particles:
            raise UserError(
                f"the pipeline holds {len(latents)} latents, not {len(self.value.batch)} prompts x {self.particles} particles: call it with num_images_per_prompt={self.particles}"
            )
        if step == 0:
            self._potentials = Potentials(self.potential, self.lam, len(self.value.batch), self.particles)
        if step not in self.steps and step != last:
            return tensors
        sigma = torch.full((len(latents),), flow_sigma(pipe, step + 1), device=latents.device)
        with torch.no_grad():
            values = self.value(self.value.unpacked(pipe, latents), sigma).view(-1, self.particles)
        self.trace.queries += len(latents)
        weights, bad = normalised(self._potentials.step(values, last=step == last))
        self.trace.fallbacks += int(bad.sum())
        self.trace.ess.append(float(effective_size(weights).mean()))
        ancestors = resample(weights, self.resampling, self.generator)
        self._potentials.select(ancestors)
        rows = (torch.arange(len(ancestors))[:, None] * self.particles + ancestors).flatten()
        return tensors | {"latents": latents[rows.to(latents.device)]}
