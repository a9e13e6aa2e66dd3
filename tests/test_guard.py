"""The guard against over-optimisation: its rule on made-up histories, its measurements by hand."""

import json

import pytest
import torch

from benchmarks.guard_rates import rate
from rlstitch import sampling, schedule
from rlstitch.checks import checked
from rlstitch.config import compose, merge
from rlstitch.data import PromptSet
from rlstitch.distributed import Engine
from rlstitch.guard import Guard, probe
from rlstitch.oracles import Weighted
from rlstitch.schema import GuardConfig
from rlstitch.stops import Fixed, UniformWindow
from rlstitch.types import UserError

N = 64


def scores(mean, seed=0):
    """The same prompts each time: their own spread stays, so that a small fall is significant."""
    return {
        "judge": mean
        + torch.randn(N, generator=torch.Generator().manual_seed(0))
        + 0.05 * torch.randn(N, generator=torch.Generator().manual_seed(seed))
    }


def test_a_fallen_judge_under_a_climbing_reward_stops_after_patience():
    guard = Guard(GuardConfig(patience=2), ["other", "judge"])
    assert guard.see(scores(0.0), "", 1.0) is None
    assert guard.see(scores(0.3, 1), "", 1.2) is None  # better: the new best
    assert guard.see(scores(0.2, 2), "", 1.3) is None
    why = guard.see(scores(0.1, 3), "", 1.4)
    assert why and "'judge'" in why and "2 evaluations" in why and guard.verdict() == why


@pytest.mark.parametrize(
    "history",
    [
        [(0.3, 1.2), (0.2, 1.1), (0.1, 1.0), (0.0, 0.9)],  # the reward falls, too: that is no over-optimisation
        [(0.3, 1.2), (0.2, 1.3), (0.3001, 1.4), (0.2, 1.5)],  # it recovers in between
    ],
)
def test_what_does_not_stop(history):
    guard = Guard(GuardConfig(patience=2), ["judge"])
    assert not any(guard.see(scores(m, 7), "", t) for m, t in history)


def test_a_fall_within_the_margin_is_noise():
    """One standard error, and one for every standard deviation by which the best of those seen flatters itself."""
    wobble, base = torch.tensor([1.0, -1.0]).repeat(N // 2), torch.zeros(N)
    error = float(wobble.double().std()) / 8
    for seen, margin in ((1, 1.0), (2, 1 + 0.5895), (5, 1 + 1.1798)):  # of a normal's maximum: .564, 1.163
        guard = Guard(GuardConfig(patience=1), ["judge"])
        for k in range(seen):
            assert guard.see({"judge": base - 1e-6 * (k > 0)}, "", 1.0 - k) is None
        assert guard.see({"judge": base + wobble - (margin - 0.01) * error}, "", 2.0) is None
        guard.seen = seen
        assert guard.see({"judge": base + wobble - (margin + 0.01) * error}, "", 2.0) is not None


def test_false_stops_and_caught_hackings():
    """A judge flat in the mean stops few runs however many evaluations there are; one that falls under a climbing reward stops them."""
    flat = {n: rate(evaluations=n, runs=400, seed=n) for n in (5, 16)}
    caught = rate(evaluations=8, runs=100, fall=1.0, seed=1)
    assert max(flat.values()) < 0.05 and caught > 0.95, (flat, caught)


def test_a_score_that_is_not_known_does_not_blind_the_rule():
    """Prompts are compared where both evaluations know them; an evaluation without any known score says nothing."""
    guard, holed = Guard(GuardConfig(patience=1), ["judge"]), scores(0.5)["judge"]
    holed[:8] = float("nan")
    assert guard.see({"judge": torch.full((N,), float("nan"))}, "", 1.0) is None and not guard.best
    assert guard.see({"judge": holed}, "", 1.0) is None
    assert guard.see({"judge": torch.full((N,), float("nan"))}, "", 1.1) is None
    assert guard.see(scores(0.1, 1), "", torch.full((N,), float("nan"))) is None  # whether the trained reward climbed is not known
    climbing = torch.full((N,), 1.2)
    climbing[:32] = float("nan")
    again = Guard(GuardConfig(patience=1), ["judge"])
    again.load_state(json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert guard.see(scores(0.1, 1), "", climbing) == again.see(scores(0.1, 1), "", climbing) is not None


def test_a_new_stage_is_judged_by_itself():
    """Rewards of different stages have different scales: what stage 1 reached says nothing about stage 2."""
    guard = Guard(GuardConfig(patience=1), ["judge"])
    guard.see(scores(0.5), "clip", 0.7)
    assert guard.see(scores(0.1, 1), "hps", 22.0) is None
    assert guard.see(scores(0.0, 2), "hps", 23.0) is not None
    again = Guard(GuardConfig(patience=1), ["judge"])
    again.load_state(guard.state())
    assert again.verdict() == guard.verdict()


def test_patience_zero_never_stops_and_state_resumes():
    off, on = Guard(GuardConfig(patience=0), ["judge"]), Guard(GuardConfig(patience=2), ["judge"])
    for k in range(4):
        assert off.see(scores(-0.1 * k, k), "", k) is None
    on.see(scores(0.3), "", 1.0)
    on.see(scores(0.1, 1), "", 1.1)
    again = Guard(GuardConfig(patience=2), ["judge"])
    again.load_state(on.state())
    assert again.see(scores(0.1, 2), "", 1.2) == on.see(scores(0.1, 2), "", 1.2) is not None


def test_probe_measures_the_gap_of_a_biased_value_however_it_is_cut(backbone):
    """A value that is twice the truth plus a constant has correlation 1 and a gap by hand, in spreads of the truth, read in the middle of the stop window; one score
    that is not known is left out. The figures do not depend on the number of pictures at once, nor on that of ranks."""

    class Truth:
        differentiable = True

        def score(self, images, batch):
            pictures.append(images)
            light = images.flatten(1).mean(1)
            return torch.where(batch.seeds == 5 * 1_000_003 + 4, torch.nan, light)

    class Biased:
        names, weights, differentiable, sigma_range = ["r"], [1.0], True, (0.0, 1.0)

        def __call__(self, latent, batch):
            sigmas.append(float(latent.sigma[0]))
            done = sampling.sample(backbone.bind(batch.text), latent.z, grid[2:]).z
            return (2 * backbone.decode(done).flatten(1).mean(1) + 0.5)[:, None]

    grid, sigmas, pictures = schedule.sigmas(4, 3.0, "plain"), [], []
    prompts = ["a red circle", "two blue stars", "a blue star"]
    held = PromptSet(prompts, [{}] * 3, backbone.encode_prompts(prompts))
    config, window = GuardConfig(prompts=3, images=3), UniformWindow(1, 3)

    def figures(batch_size, engine=None, **changed):
        case = {"oracle": Biased(), "rewards": {"r": Truth()}, "stop": window} | changed
        return probe(
            backbone, case["oracle"], case["rewards"], case["stop"], grid, held, engine or OneOf(1, 0), config, guidance=1.0, batch_size=batch_size, seed=5
        )  # fmt: skip

    out = figures(64)
    assert set(sigmas) == {float(grid[2])}  # of the steps 1 to 3
    (whole,) = pictures
    light = whole.flatten(1).mean(1)[torch.arange(9) != 4]
    apart = [(a - b).square().mean() for group in whole.split(3) for k, a in enumerate(group) for b in group[:k]]
    assert out["diversity"] == pytest.approx(float(torch.stack(apart).mean() ** 0.5), rel=1e-4)
    assert out["correlation/r"] == pytest.approx(1.0, abs=1e-4) and out["gap/r"] == pytest.approx(
        float((light.mean() + 0.5) / light.std()), rel=1e-3
    )
    for batch_size in (4, 2):
        assert figures(batch_size) == pytest.approx(out, rel=1e-3)
    assert max(len(p) for p in pictures[-5:]) == 2
    gathered = [torch.empty(0)] * 2
    for rank in (0, 1, 0):  # the last one has both parts at hand
        shared = figures(64, OneOf(2, rank, gathered))
    assert shared == pytest.approx(out, rel=1e-3)
    joined = figures(64, oracle=Weighted([Biased(), Biased()], [0.5, 2.0]))  # both columns are about one reward
    for name in ("gap", "correlation"):
        assert [joined[f"{name}/{k}.r"] for k in (0, 1)] == pytest.approx([out[f"{name}/r"]] * 2, rel=1e-3)
    alone = figures(64, oracle=None, rewards={}, stop=Fixed(4))
    assert set(alone) == {"diversity"} and alone["diversity"] == pytest.approx(out["diversity"], rel=1e-4)


class OneOf(Engine):
    """One rank of several, asked one after the other: what each gives to `gather` is kept in `parts`."""

    def __init__(self, world, rank, parts=None):
        self.world, self.rank, self.device, self.parts, self.precision = world, rank, torch.device("cpu"), parts, "fp32"

    def together(self, action):
        return action()

    def gather(self, tensor):
        if self.world == 1:
            return tensor
        self.parts[self.rank] = tensor
        return torch.cat([part if part.shape == tensor.shape else torch.zeros_like(tensor) for part in self.parts])


def test_faults():
    with pytest.raises(UserError) as error:
        checked(merge(compose("draft_stitch"), {"guard": {"judge": "preference", "images": 1, "patience": -1}}), "draft_stitch")
    for told in ("did you mean 'preference_b'", "at least 2 pictures", "'guard.patience' must not be negative"):
        assert told in str(error.value)
