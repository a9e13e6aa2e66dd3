"""Scores made beside the next rollout are those made one after the other; errors of a reward are not lost in its thread."""

import math
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rlstitch.asking import PartError
from rlstitch.metrics import Clock
from rlstitch.oracles import Terminal
from rlstitch.scoring import NoScore, Scorer, has_own_device
from rlstitch.stitch.measure import batch_of
from rlstitch.types import Latent, Rollout


class Service:
    """Brightness, asked elsewhere; it may wait for `gate` first."""

    differentiable, device, gate = False, "service", None

    def score(self, images, batch):
        if self.gate is not None:
            assert self.gate.wait(10), "nothing went on while the reward was asked"
        return images.mean((1, 2, 3))


@pytest.fixture
def scorer():
    return Scorer(SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, together=lambda action: action()), Clock(1))


def parts(backbone, reward):
    oracle = Terminal(backbone, {"light": reward}, {"light": 1.0})
    algorithm = SimpleNamespace(collects=True, oracle=oracle, score=torch.no_grad()(lambda rollout: oracle(rollout.latent, rollout.batch)))
    latents = [torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    return algorithm, [Rollout(batch_of(["a red circle", "two blue stars"]), Latent(z, torch.zeros(2))) for z in latents]


def test_what_has_its_own_device(backbone, reward):
    cpu = torch.device("cpu")
    assert not has_own_device(Terminal(backbone, {"r": reward}, {"r": 1.0}), cpu)
    assert has_own_device(Terminal(backbone, {"r": reward, "s": Service()}, {"r": 1.0, "s": 1.0}), cpu)
    for name, rank, own in (("cuda", 0, False), ("cuda", 1, False), ("cuda:0", 1, True), ("cuda:1", 1, False), ("cpu", 0, True)):
        there = SimpleNamespace(device=name, differentiable=True)  # without a number it is where each rank's own GPU is
        assert has_own_device(Terminal(backbone, {"r": there}, {"r": 1.0}), torch.device("cuda", rank)) == own
    assert not has_own_device(None, cpu)


def test_a_reward_elsewhere_is_asked_while_the_next_rollout_is_made(backbone, scorer):
    service = Service()
    algorithm, rollouts = parts(backbone, service)
    service.gate = threading.Event()
    for rollout in rollouts:
        scorer.ask(algorithm, rollout)  # would wait for ever if it were asked here
        assert rollout.scores is None
    service.gate.set()
    scorer.finish()
    for rollout in rollouts:
        torch.testing.assert_close(rollout.scores, algorithm.score(rollout))
    assert not scorer.pending and scorer.clock.hours["oracle"] > 0


def test_a_method_that_learns_at_once_and_a_reward_beside_the_denoiser_are_scored_in_order(backbone, reward, scorer):
    for own, collects in ((Service(), False), (reward, True)):
        algorithm, rollouts = parts(backbone, own)
        algorithm.collects = collects
        scorer.ask(algorithm, rollouts[0])
        assert rollouts[0].scores is not None and not scorer.pending


def test_scores_are_made_in_autocast_and_are_finite_or_nan(scorer):
    """In a thread of its own, too, which inherits neither."""
    scorer.engine.autocast, seen = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)), []
    oracle = Terminal(None, {"light": Service()}, {"light": 1.0})
    for collects in (True, False):
        algorithm = SimpleNamespace(collects=collects, oracle=oracle)
        algorithm.score = lambda rollout: (seen.append(torch.is_autocast_enabled("cpu")), torch.tensor([[math.inf], [1.0]]))[1]
        scorer.ask(algorithm, rollout := Rollout(batch_of(["a star"] * 2), Latent(torch.zeros(2, 1), torch.zeros(2))))
        scorer.finish()
        torch.testing.assert_close(rollout.scores, torch.tensor([[math.nan], [1.0]]), equal_nan=True)
    assert seen == [True, True]


def test_an_update_without_a_score_ends_the_run_and_a_prompt_without_one_is_told_once(scorer, capsys):
    """A reward without weight may be silent; where each reward is compared by itself the total may be, too."""
    scorer.engine.is_main, nan = True, math.nan
    oracle, groups = Terminal(None, dict.fromkeys("abc"), {"a": 1.0, "b": 2.0, "c": 0.0}), torch.tensor([7, 7, 3, 3])
    scorer.check(torch.tensor([[1.0, 1.0, nan]] * 4), groups, oracle, 1)
    assert capsys.readouterr().out == ""
    with pytest.raises(NoScore, match="update 2: b gave no score for any of 4 pictures"):
        scorer.check(torch.tensor([[1.0, nan, 1.0]] * 4), groups, oracle, 2)
    apart = torch.tensor([[1.0, nan, 0.0]] * 2 + [[nan, 1.0, 0.0]] * 2)
    with pytest.raises(NoScore, match="update 3: none of 4 pictures has a score .* from all of a, b, so none has a total"):
        scorer.check(apart, groups, oracle, 3)
    for _ in range(2):
        scorer.check(apart, groups, oracle, 4, masked=0.0)
    told = capsys.readouterr().out
    assert told.count("no score for any picture of some prompts (a: 1 groups, e.g. number 3; b: 1 groups, e.g. number 7)") == 1


def test_an_error_in_the_thread_is_raised(backbone, scorer):
    service = Service()
    service.score = lambda images, batch: 1 / 0
    algorithm, rollouts = parts(backbone, service)
    scorer.ask(algorithm, rollouts[0])
    with pytest.raises(PartError, match="reward .light. failed: ZeroDivisionError"):
        scorer.finish()
    assert not scorer.pending
