"""Parts that are not what they say: what a reward may give, and what is told where it gives something else."""

import json

import numpy as np
import pytest
import torch

from rlstitch.asking import PartError, ask, inside, probe
from rlstitch.files import read_json
from rlstitch.types import Batch, UserError

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
    "truth values": (lambda i: means(i) > 0.5, "torch.bool, not real numbers"),
    "complex numbers": (lambda i: means(i) * 1j, "complex64, not real numbers"),
    "an exit": (leave, "failed: SystemExit: 0"),
    "a service that is down": (service, "failed: ConnectionError: 503 Service Unavailable"),
    "a writer": (blacken, "wrote into the pictures"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_score_is_told_in_one_line_with_the_reward_s_name(case):
    score, said = WRONG[case]
    for act in (ask, lambda *a: probe(a[0], a[1], a[3], 4, "cpu")):
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
        probe("mine", Saying(score, **said), BATCH, 4, "cpu")
    weight = torch.ones((), requires_grad=True)  # a graph there is, but not to the pictures
    for score in (lambda i: means(i.detach()), lambda i: means(i.detach()) * weight, torch.no_grad()(means)):
        with pytest.raises(PartError, match="'mine' says `differentiable`, but no gradient reaches the pictures"):
            probe("mine", Saying(score, differentiable=True), BATCH, 4, "cpu")
        probe("mine", Saying(score), BATCH, 4, "cpu")
    with pytest.raises(PartError, match="wrote into the pictures"):
        probe("mine", Saying(blacken_by_numpy), BATCH, 4, "cpu")


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
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path, "the card")
