"""MARBLE (arXiv 2605.06507): several rewards at once on top of DiffusionNFT, along the direction that none of them speaks against.

At a full solve the gradient g_k of every reward's own loss is taken, and min |sum_k a_k g_k / |g_k||^2 is solved over the simplex: at its solution every
reward's gradient has a cosine >= 0 with the direction. Between full solves the coefficients of the last ones mix the rewards' weights, at NFT's price.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import advantages
from rlstitch.algorithms.nft import NFT, Slot
from rlstitch.distributed import mean_over_ranks, world_size
from rlstitch.policy import Policy
from rlstitch.ranges import Count, CountOrNone, Guidance, NotNegative, Positive, Range
from rlstitch.types import Batch, Oracle, Rollout, UserError

TINY = 1e-12  # a gradient shorter than this says nothing about its direction


def min_norm(gram: Tensor, *, tolerance: float = 1e-12) -> Tensor:
    """Weights a [K] on the simplex of the shortest vector sum_k a_k g_k in the convex hull of K vectors, from their Gram matrix [K, K].

    Wolfe's algorithm (Finding the nearest point in a polytope, 1976), in float64: the affine minimum over a growing set of vectors, those whose weight turns
    negative dropped. `tolerance`: how much a vector must promise to enter, as a part of the largest squared length. Exact in a finite number of steps.
    """
    g = gram.double()
    scale = tolerance * float(g.diagonal().max())
    a = torch.zeros(len(g), dtype=torch.float64)
    active = [int(g.diagonal().argmin())]
    a[active] = 1.0
    best, length = a, float("inf")
    while True:
        towards = g @ a  # of every vector with the point so far
        if float(a @ towards) >= length:  # in exact arithmetic it falls every time
            return best
        best, length = a, float(a @ towards)
        entering = int(towards.argmin())
        if entering in active or length - float(towards[entering]) <= scale:
            return a
        active.append(entering)
        while True:
            n = len(active)
            system = torch.ones(n + 1, n + 1, dtype=torch.float64)  # [G 1; 1 0] [y; -m] = [0; 1], the affine minimum
            system[:n, :n], system[n, n] = g[active][:, active], 0.0
            right = torch.zeros(n + 1, 1, dtype=torch.float64)
            right[n] = 1.0
            y = torch.linalg.lstsq(system, right, driver="gelsd").solution[:n, 0]
            if bool((y > 0).all()):
                a = torch.zeros_like(a)
                a[active] = y / y.sum()
                break
            x = a[active]
            falling = y <= 0
            part = float((x / (x - y).clamp(min=1e-300))[falling].min().clamp(max=1.0))
            x = (1 - part) * x + part * y
            x[falling & (x <= x[falling].min())] = 0.0
            kept = x > 0
            a = torch.zeros_like(a)
            a[active] = torch.where(kept, x, 0.0)
            active = [k for k, keep in zip(active, kept.tolist()) if keep]


def balance(gram: Tensor) -> tuple[Tensor, Tensor]:
    """What the Gram matrix [K, K] of the rewards' gradients asks for: (a [K] on the simplex, c [K] with sum_k c_k g_k the update).

    a solves the quadratic program on unit gradients; the update is sum_k a_k g_k / |g_k| times the mean of the |g_k|, so c_k = a_k mean |g| / |g_k|. A gradient that
    is not finite or shorter than 1e-12 takes no part; a single one left is taken alone; where none is left both are zero.
    """
    gram = torch.nan_to_num(gram.double(), nan=0.0, posinf=0.0, neginf=0.0)
    size = gram.diagonal().sqrt()
    part = size >= TINY
    a, c = torch.zeros_like(size), torch.zeros_like(size)
    if bool(part.any()):
        size = size[part]
        a[part] = min_norm(gram[part][:, part] / (size[:, None] * size))
        c[part] = a[part] * size.mean() / size
    return a, c


def cosines(gram: Tensor, c: Tensor) -> Tensor:
    """Cosine of every gradient [K] with the direction sum_k c_k g_k, from the Gram matrix; NaN for a gradient without a direction, 0 with no update at all."""
    gram = torch.nan_to_num(gram.double(), nan=0.0, posinf=0.0, neginf=0.0)
    size, length = gram.diagonal().sqrt(), (c @ gram @ c).clamp(min=TINY**2).sqrt()
    return torch.where(size >= TINY, gram @ c / (size.clamp(min=TINY) * length), torch.nan)


def mix(weights: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(w [B], share [B]) of the one NFT loss that is sum_k c_k L_k, L_k the loss of weights w_k [B, K], NaN where a reward is not known.

    The loss is affine in w: sum_k c_k (w_k L+ + (1 - w_k) L-) = s (w L+ + (1 - w) L-) with s = sum_k c_k and w = sum_k c_k w_k / s over the known ones.
    In advantages this is A = sum_k c_k A_k with NaN as 0, each A_k clipped by itself, and it is exact with masks, too.
    """
    known, c = ~torch.isnan(weights), c.to(weights.device)
    share = (known * c).sum(1)
    w = (torch.where(known, weights, 0.0) * c).sum(1) / share
    return torch.where(share > 0, w, 0.5).to(weights.dtype), share.to(weights.dtype)


def gram_matrix(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products [K, K] of K gradients, each a list of the same parameters' parts, in float64 on the CPU."""
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for parts in zip(*gradients):
        rows = torch.stack([part.flatten() for part in parts]).double()
        total += (rows @ rows.T).cpu()
    return total


@dataclass
class Held:
    """The values [K] and gradients [K][parameters] of one slot's losses, summed over the micro-batches so far."""

    values: list[float]
    gradients: list[list[Tensor]]

    def add(self, values: list[float], gradients: list[list[Tensor]]) -> None:
        if not self.gradients:
            self.values, self.gradients = values, gradients
            return
        self.values = [a + b for a, b in zip(self.values, values)]
        for total, more in zip(self.gradients, gradients):
            torch._foreach_add_(total, more)

    def mean(self, parts: int) -> tuple[list[float], list[list[Tensor]]]:
        """Over the micro-batches, the gradients over the ranks, too."""
        over_ranks = mean_over_ranks([g / parts for row in self.gradients for g in row], world_size())
        width = len(self.gradients[0])
        return [v / parts for v in self.values], [over_ranks[k : k + width] for k in range(0, len(over_ranks), width)]


class MARBLE:
    """NFT whose rewards are balanced by their gradients. Rollout, loss, KL and old policy are NFT's, and so are its options.

    every: updates between full solves. A full solve takes the gradients on the first training time of every sample of the update, over all micro-batches and ranks,
    so that it is the same however the update is cut, and trains that time along the solution, the KL's gradient beside it. In the first update, and the
    first with other rewards, every training time is a full solve.
    mixture: what the other training times mix the rewards' losses by, averaged over the full solves (x <- rho x + (1 - rho) x_new): `c`, which holds the gradients'
    lengths, so that the mixture is the solution's own direction as long as the gradients are as they were; or `a`, as released, which on gradients of unequal
    lengths is another direction, and one of ten times the others' length may turn it against one of them.
    solve: `marble`; for comparison `equal` (a_k = 1 / K) and `sum` (the weighted total's advantage, as NFT), which train like NFT and measure at the same slots.

    Logged at full solves: `coefficient/<reward>` (a; the oracle's weights of `sum`), `cosine/<reward>` of its gradient with this training time's direction, without
    the KL, their least as `worst_cosine`, and `amortised_worst_cosine`, the same for the direction that the mixture of the solves before takes on these samples;
    of `marble` also `amortised_worst_cosine/a` and `/c`, whichever of them is in use.
    """

    needs_gradient, collects, keeps_old = NFT.needs_gradient, NFT.collects, NFT.keeps_old
    learns_from, needs_oracle, whole_groups = "prompts", True, False
    balances = True
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
        every: Count = 10,
        rho: Annotated[float, Range(0, 1, "high", "at 1 the coefficients would never move")] = 0.7,
        mixture: Literal["c", "a"] = "c",
        solve: Literal["marble", "equal", "sum"] = "marble",
    ):
        self.nft = NFT(
            backbone,
            policy,
            oracle,
            grid,
            guidance=guidance,
            beta=beta,
            clip=clip,
            kl=kl,
            old_decay=old_decay,
            solver=solver,
            times=times,
            spread=spread,
            adaptive=adaptive,
            per_reward=solve != "sum",
        )
        self.every, self.rho, self.by, self.solve = every, rho, mixture, solve
        self.coefficients: dict[str, float] = {}  # a of each reward, averaged over the full solves so far
        self.scaled: dict[str, float] = {}  # c of each, likewise
        self.before: tuple[dict[str, float], dict[str, float]] | None = None  # both, until the update that moves them is taken
        self.updates = 0
        self.due = self.first = False  # has this update a full solve; is every slot of it one
        self.parts = self.seen = 0  # micro-batches of this update, and those begun
        self.mixture = torch.empty(0)  # coefficients of this update's other slots
        self.held: dict[int, Held] = {}  # what a full solve has gathered so far, by slot

    @property
    def oracle(self) -> Oracle:
        return self.nft.oracle

    @oracle.setter
    def oracle(self, oracle: Oracle) -> None:
        self.nft.oracle = oracle

    @staticmethod
    def faults(options: dict[str, Any], stops: range) -> list[str]:
        """What a recipe may get wrong about this algorithm, found before anything loads."""
        return NFT.faults(options, stops)

    @staticmethod
    def backwards(options: dict[str, Any], stops: range) -> int:
        """NFT's: a full solve takes its gradients beside the one backward of its slot."""
        return NFT.backwards(options, stops)

    def rollout(self, batch: Batch, stop: int) -> Rollout:
        """NFT's."""
        return self.nft.rollout(batch, stop)

    def score(self, rollout: Rollout) -> Tensor:
        return self.nft.score(rollout)

    def compare(self, rollouts: Sequence[Rollout], scores: Tensor, group_ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Weights w [B, K] of each reward by itself, NaN where it is not known; `sum` has the total's behind them, [B, K + 1]."""
        if self.before is not None:  # the last update was skipped
            self.coefficients, self.scaled = self.before
        if set(self.coefficients) != set(self.oracle.names):
            self.coefficients, self.scaled = {}, {}
        self.before = self.coefficients, self.scaled
        self.first = not self.coefficients
        self.due = self.first or self.updates % self.every == 0
        self.parts, self.seen, self.held, self.mixture = len(rollouts), 0, {}, self._amortised(self.by)
        together, metrics = self.nft.compare(rollouts, scores, group_ids)
        weights = self.nft.weigh(advantages.group_normalise(scores, group_ids, spread=self.nft.spread))
        return torch.cat([weights, together[:, None]], 1) if self.solve == "sum" else weights, metrics

    def losses(self, rollout: Rollout, weights: Tensor, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss a training time; samples without a score take no part."""
        weights = weights.to(rollout.latent.z.device)
        self.seen += 1
        for k, slot in enumerate(self.nft.slots(rollout, count)):
            w, share = mix(weights, self.mixture)
            loss, measured = self._full(k, slot, weights) if self.due and (self.first or k == 0) else (None, {})
            known = share > 0 if loss is None else (~weights.isnan()).any(1)
            loss = self.nft.policy_loss(slot, w, share) if loss is None else loss
            loss, metrics = self.nft.regularised(slot, loss, known.to(share.dtype))
            yield loss, metrics | measured

    def _amortised(self, by: str) -> Tensor:
        """What the columns of the weights are mixed by between full solves, `a` or `c`; equal parts before the first."""
        names, known = self.oracle.names, {"a": self.coefficients, "c": self.scaled}[by]
        if self.solve == "sum":
            return torch.tensor([0.0] * len(names) + [1.0]).double()
        return torch.tensor([known.get(n, 1 / len(names)) for n in names]).double()

    def _full(self, k: int, slot: Slot, weights: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One micro-batch's part of a full solve: -> the loss to train on (None: the mixture's) and, at the last micro-batch, what was measured.

        The update along the solution is linear in the gradients, so it is left to the last micro-batch, which knows them all; those before it add nothing.
        """
        one = torch.ones(1, dtype=torch.float64)
        each = [self.nft.policy_loss(slot, *mix(column[:, None], one)) for column in weights.unbind(1)]
        kept = self.solve != "marble" or slot.reference is not None  # is the graph needed after this
        held = self.held.setdefault(k, Held([], []))
        held.add([float(loss.detach()) for loss in each], [self._gradient(loss, kept or loss is not each[-1]) for loss in each])
        if self.seen < self.parts:
            return (self._along(None, 0.0) if self.solve == "marble" else None), {}
        values, gradients = self.held.pop(k).mean(self.parts)
        gram = gram_matrix(gradients)
        mixtures = {by: self._amortised(by) for by in "ac"} if self.solve == "marble" else {}
        c = self._solve(gram)
        measured = self._measured(gram, c, mixtures)
        if self.solve != "marble":
            return None, measured
        taking_part = [k for k, x in enumerate(c.tolist()) if x]  # the others may hold what is no number
        direction = [sum(float(c[k]) * parts[k] for k in taking_part) for parts in zip(*gradients)]
        value = sum(float(c[k]) * values[k] for k in taking_part)
        return self._along([self.parts * part for part in direction], self.parts * value), measured

    def _along(self, direction: list[Tensor] | None, value: float) -> Tensor:
        """A loss of this value whose gradient is `direction`, or nothing."""
        parameters = self.nft.policy.parameters()
        with torch.autocast(parameters[0].device.type, enabled=False):
            linear = torch.stack([(p * (0.0 if direction is None else g)).sum() for p, g in zip(parameters, direction or parameters)]).sum()
            return linear - linear.detach() + value

    def _measured(self, gram: Tensor, c: Tensor, mixtures: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a full solve logs; `mixtures` as they were before it."""
        names, device = self.oracle.names, self.nft.backbone.device
        angle = cosines(gram, c)[: len(names)]
        measured = {f"coefficient/{n}": torch.tensor(a) for n, a in self.coefficients.items()}
        measured |= {f"cosine/{n}": x for n, x in zip(names, angle) if not x.isnan()}
        if not bool(angle.isnan().all()):
            measured["worst_cosine"] = angle[~angle.isnan()].min()
            if not self.first or self.solve != "marble":
                for name, mixture in {"": self.mixture, **{f"/{by}": m for by, m in mixtures.items()}}.items():
                    between = cosines(gram, mixture)[: len(names)]
                    measured[f"amortised_worst_cosine{name}"] = between[~between.isnan()].min()
        return {key: value.float().to(device) for key, value in measured.items()}

    def _solve(self, gram: Tensor) -> Tensor:
        """Move the coefficients by a full solve on the Gram matrix of the columns; -> the coefficients of this slot."""
        names = self.oracle.names
        if self.solve == "sum":
            self.coefficients = dict(zip(names, map(float, self.oracle.weights)))
            return self._amortised("a")
        a, c = balance(gram)
        if self.solve == "equal" or not bool(a.any()):
            equal = dict.fromkeys(names, 1 / len(names))
            self.coefficients, self.scaled = self.coefficients or equal, self.scaled or equal
            return self._amortised(self.by)
        self.coefficients, self.scaled = self._averaged(self.coefficients, a), self._averaged(self.scaled, c)
        return c

    def _averaged(self, before: dict[str, float], new: Tensor) -> dict[str, float]:
        keep = self.rho if before else 0.0
        return {n: keep * before.get(n, 0.0) + (1 - keep) * float(x) for n, x in zip(self.oracle.names, new)}

    def _gradient(self, loss: Tensor, retain: bool) -> list[Tensor]:
        """d loss / d policy; retain: the slot's graph stays, for another reward's gradient or the slot's own backward."""
        with torch.autocast(loss.device.type, enabled=False):
            return list(torch.autograd.grad(loss, self.nft.policy.parameters(), retain_graph=retain, materialize_grads=True))

    def end_step(self, step: int) -> None:
        """NFT's; one update more."""
        self.nft.end_step(step)
        self.before = None
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """Count of updates, a and c of each reward."""
        kept = dict(zip(("coefficient", "scaled"), self.before or (self.coefficients, self.scaled)))
        numbers = {f"{kind}/{n}": torch.tensor(x, dtype=torch.float64) for kind, known in kept.items() for n, x in known.items()}
        return {"updates": torch.tensor(self.updates)} | numbers

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError where the state is of another algorithm, UserError where it is of before there was a mixture by c, which it would need."""
        self.updates = int(tensors["updates"])
        self.coefficients, self.scaled = (
            {key.removeprefix(kind): float(x) for key, x in tensors.items() if key.startswith(kind)} for kind in ("coefficient/", "scaled/")
        )
        if self.coefficients and not self.scaled and (self.by, self.solve) == ("c", "marble"):
            raise UserError(
                "this checkpoint knows MARBLE's coefficients a alone, and not c, by which algorithm.mixture=c mixes: set algorithm.mixture=a"
            )
