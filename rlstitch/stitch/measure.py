"""How good a value of noisy latents is: retrieval, preference pairs, rank correlation and calibration against Monte Carlo, by noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch import sampling, schedule, scheduler
from rlstitch.distributed import Engine, autocast
from rlstitch.figures import correlation, exact
from rlstitch.oracles import MonteCarlo, bound, slices
from rlstitch.stitch.distill import batch_of
from rlstitch.stitch.model import StitchedValueModel, reads_tokens, score_output
from rlstitch.types import Batch, Latent

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass
class Subject:
    """What is measured: `value(latent, batch)` -> [B], and where it makes one, `output(latent, batch)` -> what its reward reads the score from: an image embedding [B, D]
    of the reward's space, or output tokens [B, N, W]."""

    name: str
    value: Callable[[Latent, Batch], Tensor]
    output: Callable[[Latent, Batch], Tensor] | None = None


def stitched(name: str, model: StitchedValueModel) -> Subject:
    def output(latent: Latent, batch: Batch) -> Tensor:
        return model.output(model.activations(latent.z, latent.sigma, batch.text))

    return Subject(name, model.value, output)


def tweedie(name: str, backbone: Any, reward: Any, *, prompt: bool) -> Subject:
    """r(D(z - sigma v)) with v under the batch's own prompt, or under the null text."""

    def output(latent: Latent, batch: Batch) -> Tensor:
        text = batch.text if prompt else backbone.null.expand(len(latent.z))
        v = backbone.velocity(latent.z, latent.sigma, text)
        embedding, tokens = reward.encode(backbone.decode(schedule.posterior_mean(latent.z, v, latent.sigma)))
        return tokens if reads_tokens(reward) else F.normalize(embedding, dim=-1)

    return Subject(name, lambda latent, batch: score_output(reward, output(latent, batch), batch), output)


def embeds_text(reward: Any) -> bool:
    """Whether a score is a cosine with the prompt's embedding, so that pictures and prompts can be retrieved by each other."""
    return not reads_tokens(reward) and reward.head is None


@torch.no_grad()
def scored(reward: Any, outputs: Tensor, prompts: Sequence[str], size: int = 64) -> Tensor:
    """[N] from what the scores of N pictures are read from, under these prompts."""
    batch = batch_of(prompts)
    return torch.cat([score_output(reward, outputs[p], batch[p]) for p in slices(len(outputs), size)])


def in_parts(ask: Callable[[Latent, Batch], Tensor], latent: Latent, batch: Batch, size: int = 64) -> Tensor:
    """`ask` on slices of a large batch."""
    with torch.no_grad():
        return torch.cat([ask(Latent(latent.z[p], latent.sigma[p]), batch[p]).float() for p in slices(len(latent.z), size)])


def divided(count: int, action: Callable[[int], Tensor], engine: Engine | None) -> Tensor:
    """[count, ...] of `action(k)` for every k, which the ranks of an engine share out."""
    return torch.stack([action(k) for k in range(count)]) if engine is None else engine.divided(count, action)


def shared(ask: Callable[[int, slice], Tensor], count: int, *, levels: int = 1, engine: Engine | None = None, size: int = 64) -> Tensor:
    """[levels, count, ...] of `ask(level, rows)`, which gives a tensor's rows. The ranks of an engine share out the slices of all levels; how they are cut does not depend on
    the ranks, and so neither does any figure."""
    parts = slices(count, size)

    def part(k: int) -> Tensor:
        found = ask(k // len(parts), parts[k % len(parts)])
        return torch.cat([found, found.new_zeros(size - len(found), *found.shape[1:])])

    return divided(levels * len(parts), part, engine).unflatten(0, (levels, len(parts))).flatten(1, 2)[:, :count]


def at_levels(
    ask: Callable[[Latent, Batch], Tensor], latent_at: Callable[[int], Latent], levels: int, batch: Batch, engine: Engine | None = None
) -> Tensor:
    """`ask` [levels, N, ...] on slices of the N latents that `latent_at` gives of each level."""
    held: dict[int, Latent] = {}

    def part(level: int, rows: slice) -> Tensor:
        if level not in held:  # one level's at a time
            held.clear()
            held[level] = latent_at(level)
        with torch.no_grad():
            return ask(Latent(held[level].z[rows], held[level].sigma[rows]), batch[rows]).float()

    return shared(part, len(batch), levels=levels, engine=engine)


def noised(latents: Tensor, level: float, seed: int = 0) -> Latent:
    """Clean latents [N, ...] brought to one noise level; the same noise whatever the level."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    sigma = torch.full((len(latents),), level, device=latents.device)
    return Latent(schedule.interpolate(latents, noise, sigma), sigma)


# ---------------------------------------------------------------------------------------------------- figures


@exact
def recall(query: Tensor, key: Tensor, query_of: Tensor | None = None, key_of: Tensor | None = None) -> float:
    """Recall@1: the share of queries [N, D] whose most similar key [M, D] is of their own picture; `query_of` [N] and `key_of` [M] say of which each is, by default of the
    one of its place. With five captions a picture as keys, or as queries, the protocol of COCO's 5k and Flickr30k's 1k."""
    key = key.to(query.device)
    own, others = (torch.arange(len(x)) if of is None else of for x, of in ((query, query_of), (key, key_of)))
    return float((others[(query @ key.T).argmax(1).cpu()] == own).float().mean())


def recalls(image: Tensor, text: Tensor, text_of: Tensor | None = None) -> dict[str, float]:
    """Both ways, of images [N, D] and texts [M, D], which are of the pictures `text_of` [M]."""
    return {"recall_at_1": recall(image, text, None, text_of), "recall_at_1_text_to_image": recall(text, image, text_of)}


def ranks(x: Tensor) -> Tensor:
    """Ranks with ties shared."""
    values, inverse, counts = x.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2.0)[inverse]


def srcc(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation, where both are known."""
    there = torch.isfinite(a) & torch.isfinite(b)
    return correlation(ranks(a[there]), ranks(b[there]))


def calibration(value: Tensor, truth: Tensor) -> dict[str, float]:
    """mean error V - truth, slope of truth regressed on V (1 where V is calibrated: E[truth | V] = V), correlation, root mean square error; where both are known."""
    v, r = value.double(), truth.double()
    there = torch.isfinite(v) & torch.isfinite(r)
    v, r = v[there], r[there]
    centred = v - v.mean()
    return {
        "mean_error": float((v - r).mean()),
        "slope": float((centred * (r - r.mean())).sum() / centred.square().sum().clamp(min=1e-12)),
        "correlation": correlation(v, r),
        "rmse": float((v - r).square().mean().sqrt()),
    }


def retrieval(
    subject: Subject,
    reward: Any,
    latents: Tensor,
    prompts: list[str],
    text: Any,
    sigmas: Sequence[float] = SIGMAS,
    captions: Sequence[Sequence[str]] | None = None,
    engine: Engine | None = None,
) -> dict[str, dict]:
    """Recall@1 both ways by sigma over N latents with pairwise distinct prompts, or with several `captions` each; the value sees the prompt."""
    told, text_of = flattened(captions or [[p] for p in prompts])
    texts = reward.embed_texts(told)
    images = at_levels(subject.output, lambda k: noised(latents, sigmas[k]), len(sigmas), batch_of(prompts, text), engine)
    return {f"{level:g}": recalls(image, texts, text_of) for level, image in zip(sigmas, images)}


def flattened(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """All captions [M], and of which picture each is [M]."""
    return [c for own in captions for c in own], torch.tensor([k for k, own in enumerate(captions) for _ in own])


def pair_accuracy(
    subject: Subject,
    pair: tuple[Tensor, Tensor],
    prompts: list[str],
    first_wins: Tensor,
    text: Any,
    sigmas: Sequence[float] = SIGMAS,
    engine: Engine | None = None,
) -> dict[str, dict]:
    """Share of pairs of latents under one prompt whose better picture has the higher value; both get the same noise."""
    first, second = (
        at_levels(subject.value, lambda k, side=side: noised(side, sigmas[k]), len(sigmas), batch_of(prompts, text), engine)
        for side in pair
    )
    right = (first > second).cpu() == first_wins
    return {f"{level:g}": {"pair_accuracy": float(row.float().mean())} for level, row in zip(sigmas, right)}


def rank_agreement(
    subject: Subject,
    latents: Tensor,
    truth: Tensor,
    prompts: list[str],
    text: Any,
    sigmas: Sequence[float] = SIGMAS,
    engine: Engine | None = None,
) -> dict[str, dict]:
    """SRCC of the value with what it stands for, e.g. stated looks."""
    found = at_levels(subject.value, lambda k: noised(latents, sigmas[k]), len(sigmas), batch_of(prompts, text), engine)
    return {f"{level:g}": {"srcc": srcc(row, truth)} for level, row in zip(sigmas, found.cpu())}


@dataclass
class Reference:
    """A policy's own latents at one noise level and the scores of n completed rollouts from each: `scores` [n, B, K] by the K rewards `names`."""

    latent: Latent
    batch: Batch
    scores: Tensor
    names: tuple[str, ...]

    def of(self, reward: str) -> Tensor:
        """One reward's scores [n, B]."""
        return self.scores[:, :, self.names.index(reward)]


@torch.no_grad()
def references(
    backbone: Any,
    rewards: Mapping[str, Any],
    batch: Batch,
    *,
    rollouts: int,
    sigmas: Sequence[float] = SIGMAS,
    num_steps: int = 20,
    shift: float | str = scheduler.AUTO,
    precision: str = "auto",
    seed: int = 0,
    at_once: int = 64,
    engine: Engine | None = None,
) -> dict[str, Reference]:
    """Walk the policy from noise to each level (so that the latents are its own, not noised data) and finish every latent `rollouts` times, for all rewards at once;
    the models see `at_once` latents at a time, and the ranks of `engine` share out the walks and the rollouts."""
    grid = schedule.sigmas(num_steps, scheduler.resolve("shift", shift, backbone), "plain")
    start = torch.randn(len(batch), *backbone.latent_shape, generator=torch.Generator().manual_seed(seed)).to(backbone.device)

    def walk(k: int) -> Tensor:
        down = torch.cat([grid[grid > sigmas[k]], torch.tensor([sigmas[k]])])
        with autocast(backbone.device.type, precision):
            return sampling.sample(bound(backbone, batch, at_once), start, down).z

    oracle = MonteCarlo(
        backbone,
        rewards,
        dict.fromkeys(rewards, 1.0),
        rollouts=rollouts,
        num_steps=num_steps,
        shift=shift,
        precision=precision,
        seed=seed,
        at_once=at_once,
    )
    reached = divided(len(sigmas), walk, engine)
    latents = [Latent(z, torch.full((len(batch),), level, device=z.device)) for z, level in zip(reached, sigmas)]
    finish = lambda k: oracle.each(latents[k // rollouts], batch, [k % rollouts])[0]  # noqa: E731
    scores = divided(len(sigmas) * rollouts, finish, engine).unflatten(0, (len(sigmas), rollouts))
    return {f"{level:g}": Reference(*found, tuple(rewards)) for level, *found in zip(sigmas, latents, [batch] * len(sigmas), scores)}


def calibrations(
    subject: Subject, references: Mapping[str, Reference], reward: str, truth_rollouts: int, engine: Engine | None = None
) -> dict[str, dict]:
    """By sigma: the value against the mean reward of the first `truth_rollouts` rollouts."""
    refs = list(references.values())
    found = at_levels(subject.value, lambda k: refs[k].latent, len(refs), refs[0].batch, engine).cpu()
    return {level: calibration(row, ref.of(reward)[:truth_rollouts].mean(0).cpu()) for (level, ref), row in zip(references.items(), found)}


def monte_carlo_calibrations(n: int, references: Mapping[str, Reference], reward: str, truth_rollouts: int) -> dict[str, dict]:
    """A Monte-Carlo value of n rollouts against the mean of `truth_rollouts` others."""
    return {
        level: calibration(ref.of(reward)[truth_rollouts : truth_rollouts + n].mean(0).cpu(), ref.of(reward)[:truth_rollouts].mean(0).cpu())
        for level, ref in references.items()
    }
