"""MARBLE: the quadratic program against scipy and by hand, the amortised loss against K backwards, coefficients by hand; the job resumed, on ranks, compared."""

import pytest
import torch
from safetensors.torch import load_file

from rlstitch import config as cfg
from rlstitch.algorithms.marble import MARBLE, balance, cosines, gram_matrix, min_norm, mix
from rlstitch.oracles import Terminal
from rlstitch.policy import Policy
from rlstitch.rewards.simple import Darkness
from rlstitch.schedule import sigmas
from rlstitch.types import Batch, UserError
from tests.test_nft import PIXEL
from tests.test_train import rows, start, weights, world  # noqa: F401  (a fixture)

NAN = float("nan")


def scipy_min_norm(gram):
    import numpy as np
    from scipy.optimize import minimize

    g, k = gram.numpy(), len(gram)
    return minimize(
        lambda a: 0.5 * a @ g @ a,
        np.full(k, 1 / k),
        jac=lambda a: g @ a,
        bounds=[(0, 1)] * k,
        constraints=[{"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones(k)}],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    ).fun


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_min_norm_against_scipy(k):
    generator = torch.Generator().manual_seed(k)
    for trial in range(40):
        vectors = torch.randn(k, (1, 2, 3, 20)[trial % 4], generator=generator, dtype=torch.float64)  # of rank 1, 2, 3 or k
        if trial % 3 == 0:
            vectors[-1] = -vectors[0] * (1 + trial % 2)
        if trial % 5 == 0:
            vectors[1] = vectors[0] * (1 + 1e-8)
        gram = vectors @ vectors.T
        a = min_norm(gram)
        assert bool((a >= 0).all()) and float(a.sum()) == pytest.approx(1, abs=1e-12)
        assert float(0.5 * a @ gram @ a) <= scipy_min_norm(gram) + 1e-9
        assert float((gram @ a).min() - a @ gram @ a) >= -1e-8 * float(gram.diagonal().max())  # optimal: no vector points back


def test_min_norm_of_two_by_hand():
    """a_1 = clip((g_2 - g_1) . g_2 / |g_1 - g_2|^2, 0, 1)."""
    for one, two, expected in (
        ([1.0, 0.0], [0.0, 1.0], 0.5),
        ([1.0, 0.0], [0.0, 2.0], 0.8),
        ([1.0, 0.0], [3.0, 1.0], 1.0),  # the longer one only lengthens it
        ([1.0, 0.0], [-1.0, 0.0], 0.5),
        ([1.0, 0.0], [1.0, 0.0], 1.0),  # the same twice: any mixture will do
    ):
        g = torch.tensor([one, two], dtype=torch.float64)
        torch.testing.assert_close(min_norm(g @ g.T), torch.tensor([expected, 1 - expected], dtype=torch.float64))


def test_balance_takes_unit_gradients_and_leaves_out_what_has_no_direction():
    g = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    gram = g @ g.T
    a, c = balance(gram)
    torch.testing.assert_close(a, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(c, torch.tensor([0.5 * 2 / 3, 0.5 * 2 / 1, 0.0], dtype=torch.float64))  # mean length 2
    gram[1, :] = gram[:, 1] = NAN
    a, c = balance(gram)
    assert a.tolist() == [1, 0, 0] and c.tolist() == [1, 0, 0]
    assert cosines(gram, c)[0] == 1 and cosines(gram, c)[1:].isnan().all()
    assert balance(torch.full((2, 2), float("inf")))[0].tolist() == [0, 0]


def test_no_gradient_speaks_against_a_full_solve(generator):
    """Where the plain sum leaves one behind, also of gradients of very different lengths."""
    against = 0
    for _ in range(50):
        g = torch.randn(5, 8, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 3.0])[:, None]
        gram = gram_matrix([[row[:3].view(3, 1), row[3:]] for row in g])
        torch.testing.assert_close(gram, g.double() @ g.double().T)
        _, c = balance(gram)
        assert cosines(gram, c).min() >= -1e-6
        against += bool(cosines(gram, torch.ones(5).double()).min() < 0)
    assert against > 25


def test_the_mixture_by_hand():
    w, c = torch.tensor([[1.0, 0.2], [NAN, 0.4], [NAN, NAN]]), torch.tensor([0.25, 0.75])
    mixed, share = mix(w, c)
    torch.testing.assert_close(mixed, torch.tensor([0.25 + 0.15, 0.4, 0.5]))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.75, 0.0]))


class Picky(Darkness):
    """Unknown for every other sample."""

    def score(self, images, batch):
        return torch.where(torch.arange(len(images)) % 2 == 0, super().score(images, batch) ** 2, NAN)


@pytest.fixture
def made(backbone, reward):
    policy = Policy(backbone.transformer, rank=2, alpha=4.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9, old=True)
    for n, p in policy.named_parameters():  # away from the old policy, where the gradients are no longer parallel
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(n)))
    rewards = {"clip": reward, "dark": Darkness(), "picky": Picky()}
    prompts = ["a red circle"] * 4 + ["a blue star"] * 4
    batch = Batch(prompts, torch.tensor([0] * 4 + [1] * 4), torch.arange(8), [{}] * 8, backbone.encode_prompts(prompts))

    def make(**options):
        oracle = Terminal(backbone, rewards, {"clip": 1.0, "dark": 1.0, "picky": 1.0})
        method = MARBLE(backbone, policy, oracle, sigmas(4, 3.0, "plain"), **{"times": 2, "beta": 0.5, **options})
        rollout = method.rollout(batch, 4)
        rollout.scores = method.score(rollout)
        return method, rollout, method.compare([rollout], rollout.scores, batch.group)[0], policy.parameters()

    return make


def gradient(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)])


@pytest.mark.parametrize("clip", [5.0, 0.5], ids=["inside the clip", "beyond it"])
def test_one_amortised_backward_is_the_sum_of_one_a_reward(made, clip):
    method, rollout, w, parameters = made(clip=clip)
    assert w.shape == (8, 3) and w.isnan().sum() == 4 and (bool((w == 1).any()) is (clip < 1))
    for group in w.split(4) if clip > 1 else ():  # of a prompt's pictures, each reward by itself
        torch.testing.assert_close(group.nanmean(0), torch.full((3,), 0.5))
    a = torch.tensor([0.16, 1.6, 0.8])
    slot = next(method.nft.slots(rollout, 2))
    together = gradient(method.nft.policy_loss(slot, *mix(w, a)), parameters)
    apart = sum(
        x * gradient(method.nft.policy_loss(slot, torch.nan_to_num(column, 0.5), (~column.isnan()).float()), parameters)
        for x, column in zip(a, w.unbind(1))
    )
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    assert together.norm() > 1e-3


def test_a_full_solve_trains_along_its_solution_with_the_kl_beside_it(made):
    method, rollout, w, parameters = made(kl=0.5)
    loss, metrics = next(method.losses(rollout, w, 2))
    slot = next(method.nft.slots(rollout, 2))
    g = torch.stack([
        gradient(method.nft.policy_loss(slot, torch.nan_to_num(c, 0.5), (~c.isnan()).float()), parameters) for c in w.unbind(1)
    ]).double()  # fmt: skip
    size = g.norm(dim=1)
    a = min_norm((g / size[:, None]) @ (g / size[:, None]).T)
    assert (a > 0).sum() > 1
    direction = (a[:, None] * g / size[:, None]).sum(0) * size.mean()
    deviation = gradient(0.5 * (slot.v - slot.reference).square().flatten(1).mean(1).mean(), parameters)
    torch.testing.assert_close(gradient(loss, parameters), direction.float() + deviation, atol=1e-5, rtol=1e-4)
    each = [method.nft.policy_loss(slot, torch.nan_to_num(c, 0.5), (~c.isnan()).float()) for c in w.unbind(1)]
    value = sum(float(x) * loss for x, loss in zip(a / size * size.mean(), each))
    torch.testing.assert_close(metrics["policy_loss"], value.detach(), atol=1e-5, rtol=1e-3)
    cosine = torch.nn.functional.cosine_similarity(g, direction[None]).float()
    for k, name in enumerate(("clip", "dark", "picky")):
        torch.testing.assert_close(metrics[f"cosine/{name}"], cosine[k], atol=1e-5, rtol=0)
        assert float(metrics[f"coefficient/{name}"]) == pytest.approx(float(a[k]), abs=1e-6)
    assert metrics["worst_cosine"] == min(metrics[f"cosine/{n}"] for n in ("clip", "dark", "picky")) >= -1e-6
    w[0] = NAN  # a sample of which nothing is known takes no part in the KL either
    method.seen = 0
    _, metrics = next(method.losses(rollout, w, 2))
    torch.testing.assert_close(metrics["deviation"], (slot.v - slot.reference)[1:].square().mean((1, 2, 3)).sum().detach() / 8)


@pytest.mark.parametrize("first", [True, False], ids=["the first update", "a later one"])
def test_a_full_solve_is_the_same_however_the_update_is_cut(made, first):
    """Three micro-batches of unequal signs against one: the same coefficients, mean loss and mean gradient, the KL beside it."""
    found = []
    for size in (8, 2):
        method, rollout, w, parameters = made(kl=0.3, every=1)
        method.before, method.coefficients = None, {} if first else {"clip": 0.5, "dark": 0.3, "picky": 0.2}
        cut = rollout.split(size)
        method.compare(cut, rollout.scores, rollout.batch.group)
        steps = [part for r, rows in zip(cut, w.split(size)) for part in method.losses(r, rows, 2)]
        mean = sum(gradient(loss, parameters) for loss, _ in steps) / len(steps)
        told = [metrics for _, metrics in steps if "worst_cosine" in metrics]
        assert len(told) == (2 if first else 1) and all(("amortised_worst_cosine" in m) is not first for m in told)
        value = sum(metrics["policy_loss"] for _, metrics in steps) / len(steps)
        found.append((mean, value, torch.tensor(list(method.coefficients.values())), told[0]["worst_cosine"]))
    for whole, parts in zip(*found):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-3)
    assert found[0][0].norm() > 1e-3


def test_when_a_full_solve_is_due_and_how_the_coefficients_move(made, monkeypatch):
    solutions = iter([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    monkeypatch.setattr("rlstitch.algorithms.marble.balance", lambda _: (torch.tensor(next(solutions)).double(), torch.ones(3).double()))
    method, rollout, w, _ = made(every=2)
    solved, seen = [], []
    for step in range(5):
        method.compare([rollout], rollout.scores, rollout.batch.group)
        solved.append(["worst_cosine" in metrics for _, metrics in method.losses(rollout, w, 2)])
        method.end_step(step)
        seen.append([method.coefficients[n] for n in ("clip", "dark", "picky")])
    assert solved == [
        [True, True],
        [False, False],
        [True, False],
        [False, False],
        [True, False],
    ]  # all of the first update, then every second
    assert seen[0] == seen[1] == seen[2] == seen[3] == pytest.approx([0.7, 0.3, 0.0])  # the third had no gradient to go by
    assert seen[4] == pytest.approx([0.7 * 0.7 + 0.3 * 0.5, 0.7 * 0.3, 0.3 * 0.5])
    other, *_ = made(every=2)
    other.load_state(method.state())
    assert other.coefficients == method.coefficients and other.updates == 5
    method.oracle = Terminal(method.nft.backbone, {"dark": Darkness(), "clip": Picky()}, {"dark": 1.0, "clip": 1.0})
    method.compare([rollout], rollout.scores[:, :2], rollout.batch.group)
    assert method.first and not method.coefficients  # a stage with other rewards begins anew


def test_a_skipped_update_leaves_the_coefficients_as_they_were(made):
    """Neither what is saved nor the next update knows of a solve whose update was not taken."""
    method, rollout, w, _ = made(every=1)
    for k in range(2):
        before = method.state()
        for _ in ("skipped", "taken"):
            method.compare([rollout], rollout.scores, rollout.batch.group)
            assert method.state() == before and method.first is (k == 0)
            assert len(list(method.losses(rollout, w * torch.tensor([1.0, 1.0 + 2 * k, 1.0]), 2))) == 2
            assert method.state() == before
        method.end_step(k)
        assert method.state() != before


def test_between_full_solves_c_keeps_the_direction_that_a_loses(made):
    """g_1 = 10 u_1, g_2 = u_2 at 120 degrees to it, g_3 = u_3 at right angles to both: a = (.4, .4, .2), c = 4 a / |g| as the mean length is 4. The solution's
    cosine is .4 / 20^.5 / .2 = .447 with each; a's own mixture, 4 u_1 + .4 u_2 + .2 u_3, has -1.6 / 14.6^.5 with g_2."""
    g = torch.tensor([[10.0, 0.0, 0.0], [-0.5, 0.75**0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    gram, told = g @ g.T, {}
    for by in ("c", "a"):
        method, rollout, w, _ = made(mixture=by)
        solution = method._solve(gram)
        torch.testing.assert_close(solution, torch.tensor([0.16, 1.6, 0.8]).double(), rtol=1e-6, atol=1e-6)
        method.end_step(0)
        method.compare([rollout], rollout.scores, rollout.batch.group)
        torch.testing.assert_close(method.mixture, solution if by == "c" else torch.tensor([0.4, 0.4, 0.2]).double())
        told[by] = method._measured(gram, solution, {x: method._amortised(x) for x in "ac"})
        assert float(told[by][f"amortised_worst_cosine/{by}"]) == float(told[by]["amortised_worst_cosine"])
        assert float(told[by]["amortised_worst_cosine/a"]) == pytest.approx(-1.6 / 14.6**0.5)
        assert float(told[by]["amortised_worst_cosine/c"]) == pytest.approx(0.2**0.5) == pytest.approx(float(told[by]["worst_cosine"]))
    method, *_ = made()
    for _ in range(2):  # averaged as a is
        method._solve(gram)
        method._solve(torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()))
    first, second = torch.tensor([0.16, 1.6, 0.8]), torch.tensor([0.5, 0.5, 0.0])
    once = 0.7 * first + 0.3 * second
    torch.testing.assert_close(torch.tensor(list(method.scaled.values())), 0.7 * (0.7 * once + 0.3 * first) + 0.3 * second)
    method.end_step(0)
    old = {k: v for k, v in method.state().items() if not k.startswith("scaled")}
    with pytest.raises(UserError, match="set algorithm.mixture=a"):
        made()[0].load_state(old)
    for options, state in (({"mixture": "a"}, old), ({}, method.state())):
        other, *_ = made(**options)
        other.load_state(state)
        assert other.coefficients == method.coefficients and other.scaled == (method.scaled if not options else {})


MARBLES = (
    "algorithm._target_=rlstitch.algorithms.marble.MARBLE",
    "algorithm.beta=0.5",
    "algorithm.times=2",
    "algorithm.every=2",
    "batch.prompts_per_update=2",
    "batch.images_per_prompt=4",
    "batch.micro_batch=4",
)
DARK = ("rewards.dark._target_=rlstitch.rewards.simple.Darkness", "oracle.weights.dark=1.0")


@pytest.fixture(scope="module")
def two(world):  # noqa: F811
    """The world with a second value model: the same stitch, another reward's name and text."""
    return (f"rewards.other={{_target_: rlstitch.rewards.clip.ClipReward, path: {world / 'clip'}, scale: logit}}",
            f"values.other={world / 'value'}", "oracle.weights.other=1.0")  # fmt: skip


@pytest.mark.parametrize("kind", ["stitched", pytest.param("terminal", marks=pytest.mark.slow)])
def test_marble_resumes_bit_for_bit(world, two, kind):  # noqa: F811
    rewards = two if kind == "stitched" else (*PIXEL, *DARK)
    name = f"marble-{kind}"
    for run, updates in ((name, 4), (f"{name}-halves", 3), (f"{name}-halves", 4)):
        code, output = start(world, f"name={run}", f"updates={updates}", *MARBLES, *rewards)
        assert code == 0, output
    assert rows(world, name) == rows(world, f"{name}-halves")
    for file in ("policy.safetensors", "algorithm.safetensors"):
        whole, halves = (load_file(world / "runs" / n / "checkpoints" / "step-000004" / file) for n in (name, f"{name}-halves"))
        assert whole.keys() == halves.keys() and all(torch.equal(whole[k], halves[k]) for k in whole)
    assert int(whole["updates"]) == 4 and sum(float(v) for k, v in whole.items() if k.startswith("coefficient/")) == pytest.approx(1)
    assert {k.split("/")[0] for k in whole} == {"updates", "coefficient", "scaled"}
    measured = [row for row in rows(world, name) if "worst_cosine" in row]
    assert [row["step"] for row in measured] == [1, 3] and all(row["worst_cosine"] >= -1e-4 for row in measured)


@pytest.mark.slow
def test_the_sum_trains_as_nft_does_and_equal_measures_too(world):  # noqa: F811
    nft = [o for o in MARBLES if "every" not in o][1:]
    for name, options in (
        ("nft", (*nft, "algorithm._target_=rlstitch.algorithms.nft.NFT")),
        ("sum", (*MARBLES, "algorithm.solve=sum")),
        ("equal", (*MARBLES, "algorithm.solve=equal")),
    ):
        code, output = start(world, f"name=m-{name}", "updates=3", *options, *PIXEL, *DARK)
        assert code == 0, output
    one, two = weights(world, "m-nft", 3), weights(world, "m-sum", 3)
    assert all(torch.equal(one[k], two[k]) for k in one)
    for name in ("sum", "equal"):
        row = rows(world, f"m-{name}")[2]
        assert row["worst_cosine"] == row["amortised_worst_cosine"] == min(row["cosine/clip"], row["cosine/dark"])
        assert row["coefficient/clip"] == row["coefficient/dark"] == (1.0 if name == "sum" else 0.5)


@pytest.mark.slow
def test_two_ranks_do_what_one_does(world):  # noqa: F811
    """However it is cut: the full solve gathers every micro-batch of every rank; ZeRO 2 keeps whole parameters."""
    runs = {"marble-one": (1, 8, 0), "marble-two": (2, 2, 0), "marble-zero": (2, 4, 2)}
    for name, (ranks, micro, zero) in runs.items():
        geometry = (f"batch.micro_batch={micro}", f"distributed.zero_stage={zero}")
        code, output = start(world, f"name={name}", "updates=2", *MARBLES, "algorithm.every=1", *geometry, *PIXEL, *DARK, ranks=ranks)
        assert code == 0, output
    one = weights(world, "marble-one", 2)
    for name in ("marble-two", "marble-zero"):
        for ours, theirs in zip(rows(world, name), rows(world, "marble-one"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4) and ours["grad_norm"] == pytest.approx(
                theirs["grad_norm"], rel=2e-2
            )
        first, again = rows(world, name)[0], rows(world, "marble-one")[0]
        second, once_more = rows(world, name)[1]["amortised_worst_cosine"], rows(world, "marble-one")[1]["amortised_worst_cosine"]
        assert second == pytest.approx(once_more, abs=1e-2)
        for key in ("coefficient/clip", "cosine/clip", "worst_cosine"):
            assert first[key] == pytest.approx(again[key], abs=1e-3), key
        for k, value in weights(world, name, 2).items():
            torch.testing.assert_close(value, one[k], atol=2e-5, rtol=5e-3)


def test_faults_of_marble(world):  # noqa: F811
    code, output = start(
        world, "name=bad", *MARBLES, "algorithm.every=0", "algorithm.rho=1.0", "algorithm.beta=0", "distributed.zero_stage=3"
    )
    assert code == 2 and not (world / "runs" / "bad").exists(), output
    for part in (
        "has one reward, clip",
        "'algorithm.every' must be",
        "'algorithm.rho' must be",
        "'algorithm.beta'",
        "zero_stage to 2 or less",
    ):
        assert part in output, output


def test_the_two_recipes_differ_in_oracle_and_stop_only():
    a, b = cfg.compose("marble"), cfg.compose("marble_stitch")
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {"oracle", "stop"}
