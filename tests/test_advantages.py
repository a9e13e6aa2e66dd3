"""Advantages per reward and combined: by hand, with unknown scores, over ranks; groups of one are refused."""

import pytest
import torch

from rlstitch import advantages
from rlstitch.advantages import combine, group_normalise
from tests.test_flow_grpo import GRPO
from tests.test_nft import NFT
from tests.test_train import rows, start, world  # noqa: F401  (a fixture)

NAN = float("nan")


class Oracle:
    """Weights and their total, as oracles have them."""

    weights = [1.0, 3.0]

    def total(self, scores):
        return scores @ torch.tensor(self.weights)


def test_combination_by_hand():
    a = torch.tensor([[1.0, -1.0], [2.0, NAN], [NAN, 4.0], [NAN, NAN]])
    mixed = combine(a, [1.0, 3.0])
    torch.testing.assert_close(mixed[:3], torch.tensor([(1 - 3) / 4, 2.0, 4.0]))
    assert mixed[3].isnan()
    torch.testing.assert_close(combine(a, [1.0, -3.0])[:3], torch.tensor([(1 + 3) / 4, 2.0, -4.0]))
    assert combine(a, [1.0, 0.0]).isnan().tolist() == [False, False, True, True]  # its only known reward has no weight


def test_a_reward_counts_by_its_weight_and_not_by_its_scale(generator):
    scores, groups = torch.randn(24, 2, generator=generator), torch.arange(6).repeat_interleave(4)
    for per_reward, same in ((True, True), (False, False)):
        plain, figures = advantages.of_samples(Oracle(), scores, groups, per_reward=per_reward)
        scaled, _ = advantages.of_samples(Oracle(), scores * torch.tensor([100.0, 1.0]), groups, per_reward=per_reward)
        assert torch.allclose(plain, scaled, atol=2e-3) is same
        assert figures["reward"] == pytest.approx(float(Oracle().total(scores).mean()), abs=1e-5)
        assert figures["masked"] == figures["dead_groups"] == 0
    scores[groups == 2] *= 3.0
    for spread in ("global", "group"):
        by_hand = group_normalise(scores, groups, spread=spread) @ torch.tensor([0.25, 0.75])
        torch.testing.assert_close(advantages.of_samples(Oracle(), scores, groups, spread=spread, per_reward=True)[0], by_hand)
        total = group_normalise(Oracle().total(scores)[:, None], groups, spread=spread)[:, 0]
        torch.testing.assert_close(advantages.of_samples(Oracle(), scores, groups, spread=spread)[0], total)


def test_a_failed_reward_masks_the_total_but_only_itself_per_reward():
    scores, groups = (
        torch.tensor([[1.0, NAN], [3.0, NAN], [5.0, 1.0], [5.0, 2.0], [NAN, NAN], [1.0, 1.0]]),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    total, figures = advantages.of_samples(Oracle(), scores, groups)
    assert total.isnan().tolist() == [True, True, False, False, True, False] and figures["masked"] == pytest.approx(0.5)
    assert figures["dead_groups"] == pytest.approx(2 / 3)  # none known, two that differ, one alone
    each, figures = advantages.of_samples(Oracle(), scores, groups, per_reward=True)
    assert each.isnan().tolist() == [False, False, False, False, True, False] and figures["masked"] == pytest.approx(1 / 6)
    assert each[0] == -each[1] < 0 and each[5] == 0
    torch.testing.assert_close(each[2], 0.75 * group_normalise(scores, groups)[2, 1])  # equal in the first reward, worse in the second
    assert figures["reward"] == pytest.approx(3.0 + 3 * 4 / 3) and figures["dead_groups"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("spread", ["global", "group"])
def test_groups_split_over_ranks_give_the_same_combination(generator, spread):
    """Rank by rank the scores are gathered in another order; every sample keeps its advantage."""
    scores, groups = torch.randn(24, 2, generator=generator), torch.arange(6).repeat_interleave(4)
    scores[torch.rand(24, 2, generator=generator) < 0.3] = NAN
    whole, figures = advantages.of_samples(Oracle(), scores, groups, spread=spread, per_reward=True)
    assert 0 < figures["masked"] < 0.5
    for ranks in (2, 3):
        order = torch.arange(24).view(-1, ranks).T.flatten()  # dealt out, so that every group lies on several ranks
        split, again = advantages.of_samples(Oracle(), scores[order], groups[order], spread=spread, per_reward=True)
        torch.testing.assert_close(split, whole[order], equal_nan=True)
        assert again == pytest.approx(figures)


@pytest.mark.slow
@pytest.mark.parametrize("method", [NFT, GRPO], ids=["nft", "flow_grpo"])
def test_the_option_runs_and_with_one_reward_changes_nothing_but_rounding(world, method, request):  # noqa: F811
    runs = {f"{request.node.callspec.id}-{per_reward}": per_reward for per_reward in ("false", "true")}
    for name, per_reward in runs.items():
        code, output = start(world, f"name={name}", *method, "updates=2", f"algorithm.per_reward={per_reward}")
        assert code == 0, output
    for a, b in zip(*(rows(world, name) for name in runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["reward"] == pytest.approx(b["reward"], abs=1e-6)


def test_a_group_of_one_is_refused(world):  # noqa: F811
    code, output = start(world, "name=bad", *NFT, "batch.images_per_prompt=1")
    assert code == 2 and "'batch.images_per_prompt' is 1" in output and "set it to 2 or more" in output, output
