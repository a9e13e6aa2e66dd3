"""Scores made beside the next rollout are those made one after the other; errors of a reward are not lost in its thread."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rlstitch.asking import PartError
from rlstitch.metrics import Clock
from rlstitch.oracles import Terminal
from rlstitch.scoring import Scorer, has_own_device
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


def test_an_error_in_the_thread_is_raised(backbone, scorer):
    service = Service()
    service.score = lambda images, batch: 1 / 0
    algorithm, rollouts = parts(backbone, service)
    scorer.ask(algorithm, rollouts[0])
    with pytest.raises(PartError, match="reward .light. failed: ZeroDivisionError"):
        scorer.finish()
    assert not scorer.pending
