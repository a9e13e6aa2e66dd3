"""Parts that are not what they say: what a reward may give, and what is told where it gives something else."""

import json
import os

import numpy as np
import pytest
import torch

from rlstitch.asking import PartError, ask, inside, probe
from rlstitch.files import read_json
from rlstitch.types import Batch, UserError
from tests.test_jobs import train
from tests.test_train import rows, truly, weights, world  # noqa: F401  (a fixture)

BATCH = Batch(["a", "b"], torch.arange(2), torch.arange(2), [{}, {}])
PICTURES = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def means(images):
    return images.mean((1, 2, 3))


class Saying:
    """A reward that is a function; `differentiable` where it is said."""

    def __init__(self, score, **said):
        self.score = lambda images, batch: score(images)
        self.__dict__ |= said


def leave(images):
    raise SystemExit(0)


def service(images):
    raise ConnectionError("503 Service\nUnavailable")


def blacken(images):
    images.zero_()
    return means(images)


def blacken_by_numpy(images):
    images.detach().numpy()[:] = 0
    return means(images)


WRONG = {
    "a column": (lambda i: means(i)[:, None], r"a tensor \[2, 1\] for 2 pictures, not \[2\]"),
    "a scalar": (lambda i: i.mean(), r"a tensor \[\] for 2 pictures"),
    "too few": (lambda i: means(i)[:1], r"a tensor \[1\] for 2 pictures"),
    "a list": (lambda i: means(i).tolist(), "a list of 2 for 2 pictures, not a tensor"),
    "numpy": (lambda i: np.zeros(2), r"a numpy.ndarray \[2\] for"),
    "nothing": (lambda i: None, "gave None"),
    "a number": (lambda i: 0.5, "gave 0.5"),
    "truth values": (lambda i: means(i) > 0.5, "torch.bool for 2 pictures, not real numbers"),
    "complex numbers": (lambda i: means(i) * 1j, "complex64 for 2 pictures, not real numbers"),
    "an exit": (leave, "failed: SystemExit: 0"),
    "a service that is down": (service, "failed: ConnectionError: 503 Service Unavailable"),
    "a writer": (blacken, "wrote into the pictures"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_score_is_told_in_one_line_with_the_reward_s_name(case):
    score, said = WRONG[case]
    for act in (ask, lambda *a: probe(a[0], a[1], a[3], (4, 4), "cpu")):
        with pytest.raises(PartError, match=f"(?s)^reward 'mine' .*{said}") as error:
            act("mine", Saying(score), PICTURES.clone(), BATCH)
        assert "\n" not in str(error.value)
    if case in ("an exit", "a service that is down"):
        assert error.value.__cause__ is not None  # what RLSTITCH_TRACEBACK=1 shows


def test_scores_are_float32_wherever_the_reward_has_them_and_may_be_unknown():
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        given = torch.tensor([0, 1], dtype=dtype)
        told = ask("mine", Saying(lambda i, given=given: given), PICTURES, BATCH)
        assert told.dtype == torch.float32 and told.tolist() == [0, 1]
    with torch.inference_mode():
        assert ask("mine", Saying(lambda i: means(i) * torch.nan), PICTURES + 0, BATCH).isnan().all()
    leaf = PICTURES.clone().requires_grad_(True)
    ask("mine", Saying(means), leaf, BATCH).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 1 / 48))


def test_the_probe_believes_no_gradient_and_no_pictures_unseen():
    for score, said in ((means, {}), (means, {"differentiable": True}), (lambda i: means(i.detach()), {"differentiable": False})):
        probe("mine", Saying(score, **said), BATCH, (4, 4), "cpu")
    weight = torch.ones((), requires_grad=True)  # a graph there is, but not to the pictures
    for score in (lambda i: means(i.detach()), lambda i: means(i.detach()) * weight, torch.no_grad()(means)):
        with pytest.raises(PartError, match="'mine' says `differentiable`, but no gradient reaches the pictures"):
            probe("mine", Saying(score, differentiable=True), BATCH, (4, 4), "cpu")
        probe("mine", Saying(score), BATCH, (4, 4), "cpu")
    with pytest.raises(PartError, match="wrote into the pictures"):
        probe("mine", Saying(blacken_by_numpy), BATCH, (4, 4), "cpu")


def test_faults_of_people_keep_their_words_and_memory_is_no_part_s_affair():
    with pytest.raises(PartError, match="^stop: too late$"):
        with inside("stop"):
            raise UserError("too late")
    for passes in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(passes)):
            with inside("stop"):
                raise passes


def test_any_json_that_is_not_what_it_should_be_is_told_with_file_and_remedy(tmp_path):
    fields = {"name": str, "norm": float, "steps": int, "on": bool, "mean": [float] * 3, "part": dict}
    good = {"name": "a", "norm": 1, "steps": 2, "on": True, "mean": [0.5, 0, 1], "part": {}}
    file = tmp_path / "card.json"
    cases = [(b"", "is not JSON"), (b"{", "is not JSON"), (b"[1]", "holds list"), (b"[" * 100000, "is not JSON"), (b"\xff{}", "is not UTF-8"), (b"{}", "has no 'name' and no 'norm'")]  # fmt: skip
    for key, wrong in {"name": 1, "norm": float("nan"), "steps": 1.5, "on": 1, "mean": [0.5, 0], "part": "x"}.items():
        cases.append((json.dumps(good | {key: wrong}).encode(), f"'{key}' must be"))
    cases.append((json.dumps(good | {"steps": True}).encode(), "'steps' must be int, not 'True'"))
    for content, said in cases:
        file.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            read_json(file, "the card", "make it anew", **fields)
        assert str(file) in str(error.value) and str(error.value).endswith("make it anew")
    file.write_text("\ufeff" + json.dumps(good))
    assert read_json(file, "the card", **fields) == good
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_json(tmp_path, "the card")


class Breaking:
    """A reward that fails in the call after so many, on one rank alone where `rank` says which."""

    differentiable = True

    def __init__(self, calls: int, rank: int = -1, device: str = "cpu"):
        self.calls, self.here = calls, rank in (-1, int(os.environ.get("RANK", "0")))

    def score(self, images, batch):
        self.calls -= 1
        if self.calls < 0 and self.here:
            raise ConnectionError("503 Service Unavailable")
        return images.mean((1, 2, 3))


class Lying:
    """It says that it has a gradient."""

    differentiable = True

    def score(self, images, batch):
        return images.detach().mean((1, 2, 3))


PIXELS = ("oracle={_target_: rlstitch.oracles.Terminal, weights: {mine: 1.0}}", "stop={_target_: rlstitch.stops.End}")
BREAKING = "rewards.mine={_target_: tests.test_asking.Breaking, calls: %d, rank: %d}"


def test_a_reward_that_fails_in_training_is_named_and_what_was_learned_is_kept(world):  # noqa: F811
    said = r"^reward 'mine' failed: ConnectionError: 503 Service Unavailable \(.*\). Update 2 is kept: the same command goes on"
    with pytest.raises(PartError, match=said):  # a call is the probe's, two are an update's
        train(world, "broken", *PIXELS, BREAKING % (6, -1), "checkpoint.every=100")
    assert (
        train(world, "broken", *PIXELS, BREAKING % (100, -1), "resume=" + str(world / "runs/broken/checkpoints/step-000002"))["steps"] == 4
    )
    train(world, "unbroken", *PIXELS, BREAKING % (100, -1), "checkpoint.every=100")
    assert rows(world, "broken") == rows(world, "unbroken")
    assert all(torch.equal(v, weights(world, "unbroken")[k]) for k, v in weights(world, "broken").items())


@pytest.mark.parametrize("reward,said", [(BREAKING % (0, -1), "'mine' failed: ConnectionError"), ("rewards.mine={_target_: tests.test_asking.Lying}", "'mine' says `differentiable`")])  # fmt: skip
def test_every_reward_is_asked_before_anything_is_written(world, reward, said):  # noqa: F811
    with pytest.raises(PartError, match=said):
        train(world, "probed", *PIXELS, reward)
    assert not (world / "runs" / "probed").exists()


def test_under_torchrun_the_rank_that_failed_has_the_last_word_and_all_ranks_write_the_checkpoint(world):  # noqa: F811
    code, output = truly(world, "name=two", *PIXELS, BREAKING % (3, 1), "checkpoint.every=100", "distributed.zero_stage=2", ranks=2)
    lines = output.strip().splitlines()
    assert code == 1 and lines[-1].startswith("rlstitch: reward 'mine' failed: ConnectionError: 503"), output  # 1 is torchrun's own
    assert sum(line.startswith("rlstitch: ") for line in lines) == 2 and "Update 2 is kept" in lines[-1]  # at once, and at the end
    assert [f.name for f in (world / "runs" / "two" / "checkpoints").iterdir()] == ["step-000002"]
    assert output.count("Traceback (most recent call last)") == 1  # torchrun's
