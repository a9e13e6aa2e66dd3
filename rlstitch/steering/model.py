"""A denoiser and an oracle bound to one batch of prompts, so that what both need is computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlstitch.oracles import Stitched, Tweedie
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Batch, Conditioning, Latent, Oracle, UserError


@dataclass
class _Seen:
    """What is known about the latents asked last: per-row prompt and, where computed, cuts of the null text's and of the prompt's own pass, conditional and guided velocity."""

    z: Tensor
    sigma: float
    prompt: Tensor
    null: Any = None
    own: Any = None
    conditional: Tensor | None = None
    guided: Tensor | None = None


def _same_text(a: Tensor, b: Tensor) -> bool:
    """Whether two encodings are one but for the half precision that a value model keeps its own in."""
    return a.shape == b.shape and bool((a.float() - b.float()).abs().max() <= 0.01 * b.float().abs().max())


class Steered:
    """`velocity(z, sigma)` and `value(z, sigma)` of P prompts for any multiple of P rows, a prompt's rows side by side; one noise level a call.

    What the value computed at a latent is used again by the next velocity there, also after rows were selected or resampled: with a Stitched oracle
    the null-text prefix is guidance's unconditional branch, and the prefix of a value under the prompt's own text the conditional one (they are resumed, not run again); with Tweedie the velocity itself. Results are the same as
    without sharing. guided_tweedie: Tweedie's guess from the guided velocity (gradient through both branches), else from the conditional one alone.
    """

    def __init__(
        self, backbone: Any, oracle: Oracle, batch: Batch, *, guidance: float = 1.0, guided_tweedie: bool = True, share: bool = True
    ):
        if batch.text is None:
            raise UserError("steering needs the batch's encoded prompts")
        self.backbone, self.oracle, self.batch, self.guidance, self.guided_tweedie = backbone, oracle, batch, guidance, guided_tweedie
        self._seen: _Seen | None = None
        self._share = share
        shared = share and isinstance(oracle, Stitched) and all(self._same_base(m) for m in oracle.models)
        models = oracle.models if shared else ()
        self._depths = {
            prompted: depths for prompted in (False, True) if (depths := sorted({m.prefix.depth for m in models if m.prompted is prompted}))
        }

    def _same_base(self, model: StitchedValueModel) -> bool:
        """Whether the value's prefix is this denoiser's own first blocks under the same text: the same tensors, and no adapter on them."""
        own, null = model.null.fields, self.backbone.null.fields
        same = model.prompted or (own.keys() == null.keys() and all(_same_text(own[name], null[name]) for name in own))
        if not model.prefix.depth or not same:
            return False
        return model.prefix.shares_with(self.backbone.transformer)

    # ------------------------------------------------------------------------------------------------ rows

    def _copies(self, z: Tensor) -> int:
        copies, rest = divmod(len(z), len(self.batch))
        if rest or not copies:
            raise ValueError(f"{len(z)} latents are no multiple of the {len(self.batch)} prompts that are bound in")
        return copies

    def _prompt_of(self, z: Tensor) -> Tensor:
        return torch.arange(len(self.batch), device=z.device).repeat_interleave(self._copies(z))

    def _find(self, z: Tensor, sigma: float) -> Tensor | None:
        """Rows of the last latents that these are, exactly and with the same prompt; None where any is new."""
        seen = self._seen
        if not self._share or seen is None or seen.sigma != sigma:
            return None
        prompt, few = self._prompt_of(z), slice(0, 16)
        same = (z.flatten(1)[:, None, few] == seen.z.flatten(1)[None, :, few]).all(-1) & (prompt[:, None] == seen.prompt[None])
        index = same.float().argmax(1)
        return index if bool(same.any(1).all()) and torch.equal(seen.z[index], z) else None

    def _note(self, z: Tensor, sigma: float) -> _Seen:
        index = self._find(z, sigma)
        if (
            self._seen is None
            or index is None
            or len(index) != len(self._seen.z)
            or not torch.equal(index, torch.arange(len(index), device=index.device))
        ):
            self._seen = _Seen(z.detach(), sigma, self._prompt_of(z))
        return self._seen

    # ------------------------------------------------------------------------------------------------ the two callables

    def velocity(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Guided velocity [R, ...] of R latents at one noise level."""
        index, text = self._find(z, float(sigma[0])), self.batch.interleave(self._copies(z)).text
        seen = self._seen
        if index is None or torch.is_grad_enabled():
            return self.backbone.velocity(z, sigma, text, guidance=self.guidance)
        if seen.guided is not None:
            return seen.guided[index]
        if seen.null is seen.own is seen.conditional is None:
            return self.backbone.velocity(z, sigma, text, guidance=self.guidance)

        def branch(cut: Any, text: Conditioning) -> Tensor:
            return self.backbone.velocity(z, sigma, text) if cut is None else self.backbone.resume(cut.rows(index))

        own = seen.conditional[index] if seen.conditional is not None else branch(seen.own, text)
        if self.guidance == 1.0:
            return own
        return self.backbone.guided(own, branch(seen.null, self.backbone.null.expand(len(z))), self.guidance)

    def value(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The oracle's weighted total [R]; differentiable in z where the oracle is."""
        batch, latent = self.batch.interleave(self._copies(z)), Latent(z, sigma)
        if self._depths:
            scores = self.oracle(latent, batch, self._prefixes(z, sigma, batch.text))
        elif isinstance(self.oracle, Tweedie) and float(sigma[0]) > 0:  # finished latents need no guess
            scores = self.oracle.from_velocity(latent, self._guess(z, sigma, batch), batch)
        else:
            scores = self.oracle(latent, batch)
        return self.oracle.total(scores)

    def _prefixes(self, z: Tensor, sigma: Tensor, text: Conditioning) -> Callable[[StitchedValueModel], Any]:
        """Activations by model: one walk a text over the denoiser's first blocks, read at every depth that a value model is cut at."""
        cuts, note = {}, self._note(z, float(sigma[0]))
        for prompted, depths in self._depths.items():
            cut = self.backbone.prefix(z, sigma, depths[0], text if prompted else None)
            for depth in depths:
                cut = cuts[prompted, depth] = self.backbone.extend(cut, depth)
            if prompted:
                note.own = cut.detach()
            else:
                note.null = cut.detach()
        return lambda model: cuts[model.prompted, model.prefix.depth]

    def _guess(self, z: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """The velocity that Tweedie's posterior mean is made of: the guided or the conditional one; kept without its graph."""
        if not isinstance(self.oracle, Tweedie) or not self.oracle.prompt:
            return self.backbone.velocity(z, sigma, self.backbone.null.expand(len(z)))
        note = self._note(z, float(sigma[0]))
        if self.guided_tweedie:
            v = self.backbone.velocity(z, sigma, batch.text, guidance=self.guidance)
            note.guided = v.detach()
        else:
            v = self.backbone.velocity(z, sigma, batch.text)
            note.conditional = v.detach()
        return v
