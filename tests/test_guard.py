"""The guard against over-optimisation: its rule on made-up histories, its measurements by hand."""

import pytest
import torch

from rlstitch import schedule
from rlstitch.checks import checked
from rlstitch.config import compose, merge
from rlstitch.data import PromptSet
from rlstitch.guard import Guard, probe, spread_within
from rlstitch.schema import GuardConfig
from rlstitch.stops import Fixed
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


def test_a_fall_within_one_standard_error_is_noise():
    guard, base = Guard(GuardConfig(patience=1), ["judge"]), torch.zeros(N)
    wobble = torch.tensor([1.0, -1.0]).repeat(N // 2)  # standard error 1 / 8 = .126
    assert guard.see({"judge": base}, "", 1.0) is None
    assert guard.see({"judge": base + wobble - 0.12}, "", 2.0) is None
    assert guard.see({"judge": base + wobble - 0.13}, "", 2.0) is not None


def test_a_score_that_is_not_known_does_not_blind_the_rule():
    """Prompts are compared where both evaluations know them; an evaluation without any known score says nothing."""
    guard, holed = Guard(GuardConfig(patience=1), ["judge"]), scores(0.5)["judge"]
    holed[:8] = float("nan")
    assert guard.see({"judge": torch.full((N,), float("nan"))}, "", 1.0) is None and not guard.best
    assert guard.see({"judge": holed}, "", 1.0) is None
    assert guard.see({"judge": torch.full((N,), float("nan"))}, "", 1.1) is None
    assert guard.see(scores(0.1, 1), "", 1.2) is not None


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


def test_spread_within_by_hand():
    z = torch.tensor([[0.0, 0.0], [2.0, 2.0], [5.0, 5.0], [5.0, 5.0], [9.0, 9.0]])
    assert spread_within(z, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(((4 + 0) / 2) ** 0.5)
    assert spread_within(z, torch.arange(5)) is None


def test_probe_measures_the_gap_of_a_biased_value(backbone):
    """A value that is the truth plus a constant has correlation 1 and the constant over the spread as its gap."""

    class Truth:
        differentiable = True

        def score(self, images, batch):
            return images.flatten(1).mean(1)

    class Biased:
        names, weights = ["r"], [1.0]

        def __call__(self, latent, batch):
            nonlocal asked
            asked = latent
            done = finish(latent)
            return (Truth().score(backbone.decode(done), batch) + 0.5)[:, None]

    class Plain:
        autocast = staticmethod(torch.no_grad)
        together = staticmethod(lambda action: action())

    asked, grid = None, schedule.sigmas(4, 3.0, "plain")
    prompts = ["a red circle", "two blue stars"]
    held = PromptSet(prompts, [{}, {}], backbone.encode_prompts(prompts))

    def finish(latent):
        from rlstitch import sampling

        text = held.batch([0, 0, 0, 1, 1, 1], torch.arange(6)).text
        return sampling.sample(backbone.bind(text), latent.z, grid[2:]).z

    config = GuardConfig(prompts=2, images=3)
    out = probe(backbone, Biased(), {"r": Truth()}, Fixed(2), grid, held, Plain(), config, guidance=1.0, seed=5)
    assert float(asked.sigma[0]) == pytest.approx(float(grid[2]))
    assert out["correlation/r"] == pytest.approx(1.0, abs=1e-4) and out["gap/r"] > 0 and out["diversity"] > 0
    alone = probe(backbone, None, {}, Fixed(4), grid, held, Plain(), config, guidance=1.0, seed=5)
    assert set(alone) == {"diversity"} and alone["diversity"] == pytest.approx(out["diversity"], rel=1e-4)


def test_faults():
    with pytest.raises(UserError) as error:
        checked(merge(compose("draft_stitch"), {"guard": {"judge": "preference", "images": 1, "patience": -1}}), "draft_stitch")
    for told in ("did you mean 'preference_b'", "at least 2 pictures", "'guard.patience' must not be negative"):
        assert told in str(error.value)
