"""The figures that runs log and decide by: exact in autocast, the same however an update is cut, about the weights they name, and of what is known."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from launch import evaluate as launcher
from rlstitch import cli, sampling, schedule
from rlstitch.checks import checked, geometry
from rlstitch.data import PromptSet
from rlstitch.evaluate import evaluate
from rlstitch.figures import correlation, known_sum
from rlstitch.figures import exact as precise
from rlstitch.guard import square_distance
from rlstitch.metrics import peak_megabytes
from rlstitch.oracles import Terminal, Weighted
from rlstitch.trainer import Trainer
from rlstitch.types import noise_like
from tests.test_dpo import ONLINE
from tests.test_guard import OneOf
from tests.test_jobs import DARK, GUARDED, train
from tests.test_nft import NFT, PIXEL
from tests.test_train import rows, world  # noqa: F401  (a fixture)

PARTIAL = "rewards.partial={_target_: tests.test_jobs.Partial, lost: %s}"


def trainer(world, *overrides):  # noqa: F811
    """A trainer whose updates are made by hand; nothing is written."""
    recipe, given = cli.recipe_and_overrides([f"recipe={world / 'recipe.yaml'}", "name=by-hand", *overrides])
    made = Trainer(checked(given, recipe))
    made.log = SimpleNamespace(write=lambda row: None)
    return made


@torch.no_grad()
def scatter(policy):
    """All of a policy's weights at random, each set its own."""
    generator = torch.Generator().manual_seed(0)
    for p in (p for weights in policy._sets.values() for p in weights):
        p.normal_(std=0.3, generator=generator)


def on_bf16s_grid(x):
    return x == float(torch.tensor(x).bfloat16())


def test_totals_and_statistics_are_exact_inside_autocast(generator):
    """Of scores as close to each other as a prompt's are, where bf16 has steps of 1/128."""
    scores = 0.74 + 0.03 * torch.rand(64, 2, generator=generator)
    two = Weighted([Terminal(None, {"a": None}, {"a": 2.0}), Terminal(None, {"b": None}, {"b": 1.0})], [0.35, 0.45])
    oracle, wide = Terminal(None, {"a": None, "b": None}, {"a": 0.7, "b": 0.45}), scores.double()
    by_hand = 0.7 * wide[:, 0] + 0.45 * wide[:, 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mixed in (oracle, two):
            total, exact, half = mixed.total(scores), mixed.total(wide), mixed.total(scores.bfloat16())
            assert (total.dtype, exact.dtype, half.dtype) == (torch.float32, torch.float64, torch.float32)
            assert (total - by_hand).abs().max() < 1e-6 and (exact - by_hand).abs().max() < 1e-15
            assert len(total.unique()) == len(by_hand.float().unique())
        a, b = scores.unbind(1)
        assert correlation(a, b) == pytest.approx(float(torch.corrcoef(wide.T)[0, 1]), abs=1e-6)
        assert float(known_sum(a)[0]) == pytest.approx(float(wide[:, 0].sum()), abs=1e-6)
        holed = torch.where(torch.arange(64) == 9, torch.nan, a)
        assert known_sum(holed).tolist() == pytest.approx([float(wide[:, 0].sum() - wide[9, 0]), 63], abs=1e-5)
        product = precise(lambda x, y: x @ y)  # what autocast would round
        torch.testing.assert_close(product(scores.T, scores), (wide.T @ wide).float())
        apart = torch.stack([(x - y).square().mean() for x in wide for y in wide]).sum() / (64 * 63)
        assert float(square_distance(scores)) == pytest.approx(float(apart), rel=1e-5)


@pytest.mark.parametrize("oracle", ["stitched", "terminal"])
def test_what_a_bf16_run_logs_is_on_no_bf16_grid(world, oracle):  # noqa: F811
    """The total is the weighted sum of the rewards; neither they nor what is made of them are rounded. Brightness is a mean of bf16 pixels, so that it alone is."""
    stitched = ("oracle={_target_: rlstitch.oracles.Stitched, weights: {clip: .7, again: .45}}", f"values.again={world / 'value'}")
    stitched += (
        f"rewards.again={{_target_: rlstitch.rewards.clip.ClipReward, path: {world / 'clip'}}}",
        "refresh={fraction: 1, pairs: 4, agreement: -1}",
    )
    terminal = ("oracle={_target_: rlstitch.oracles.Terminal, weights: {clip: .7, dark: .45}}", PIXEL[1])
    train(world, f"bf16-{oracle}", *GUARDED, "distributed.precision=bf16", "updates=2", *(stitched if oracle == "stitched" else terminal))
    updates, evaluations = [], []
    for row in rows(world, f"bf16-{oracle}"):
        (evaluations if "eval" in row else updates).append(row)
    assert len(updates) == 2 and len(evaluations) == 3 and not any(row["skipped"] for row in updates)
    figures = {}
    for row in updates:
        assert row["reward"] == pytest.approx(sum(w * x for w, x in zip((0.7, 0.45), row["rewards"].values())), abs=1e-6)
        figures |= {
            f"{row['step']} {k}": v
            for k, v in {**row, **row["rewards"], **row.get("drift", {})}.items()
            if k not in ("sigma", "masked", "refreshed", "dark")
        }
    for row in evaluations:
        figures |= {f"at {row['step']} {k}": v for k, v in row["eval"].items() if k != "dark"}
    floats = {k: v for k, v in figures.items() if isinstance(v, float)}
    wanted = {"reward", "clip", "loss", "diversity"} | (
        {"gap/clip", "correlation/clip", "correlation/again"} if oracle == "stitched" else set()
    )
    assert wanted <= {k.split()[-1] for k in floats}
    assert not (rounded := {k: v for k, v in floats.items() if v and on_bf16s_grid(v)}), rounded


@pytest.mark.parametrize(
    "method", [("batch.images_per_prompt=2", "algorithm.grad_steps=1"), NFT, ONLINE], ids=["draft", "nft", "dpo_online"]
)
def test_logged_means_do_not_depend_on_how_an_update_is_cut(world, method):  # noqa: F811
    """They are means over samples, of which a third has no score, and those lie unevenly."""
    size = ("batch.prompts_per_update=4", "batch.images_per_prompt=2", "evaluation.rewards=[clip]")
    weigh = "oracle={_target_: rlstitch.oracles.Terminal, weights: {clip: 0.5, partial: 1.0}}"
    run, found = trainer(world, *method, *size, weigh, PIXEL[1], PARTIAL % "[0, 3, 5]", "batch.micro_batch=8"), {}
    scatter(run.policy)
    weights = run.policy.state_dict()
    for micro in (8, 4, 2, 1)[: 3 if method is ONLINE else 4]:
        run.policy.load_state_dict(weights)
        run.config.batch.micro_batch, run.step = micro, 0
        run.geometry = run.stages[0].stream.geometry = geometry(run.config, 8)
        run.engine.accumulation = run.geometry.accumulation * run.slots
        assert run.geometry.micro_batch == micro
        row = run._update()
        found[micro] = {k: v for k, v in {**row, **row["rewards"]}.items() if isinstance(v, float)}
    first = found.pop(8)
    assert 0 < first["masked"] < 1 and {"reward", "loss", "clip", "partial", "grad_norm"} <= set(first)
    for row in found.values():
        assert row == pytest.approx(first, rel=2e-3, abs=2e-6)


@pytest.fixture
def moved(world):  # noqa: F811
    """A trainer whose base, raw, EMA and old weights are all others."""
    run = trainer(world, *NFT, "algorithm.old_decay=slow", *DARK)
    scatter(run.policy)
    return run


def test_an_evaluation_is_of_the_weights_that_it_names(moved):
    """Each equal to pictures sampled by hand with that adapter, in the table's rows as in the evaluations on the way; no two sets draw the same."""
    means, e, backbone = {}, moved.config.evaluation, moved.backbone
    batch = moved.held_out.batch(list(range(5)), torch.arange(5) + e.seed * 1_000_003)
    noise, grid = noise_like(backbone.latent_shape, batch.seeds), schedule.sigmas(e.num_steps, 3.0, e.spacing)
    for name, adapter in (("base", "reference"), ("raw", "default"), ("ema", "ema")):
        with torch.no_grad(), moved.policy.use(adapter):
            images = backbone.decode(sampling.sample(backbone.bind(batch.text), noise, grid).z)
            means[name] = {n: float(moved.rewards[n].score(images, batch).mean()) for n in e.rewards}
    found = {name: result.means for name, result in moved.evaluate_all().items()}
    assert list(found) == list(means) and all(found[n] == pytest.approx(means[n], abs=1e-5) for n in means)
    for one, two in (("base", "raw"), ("base", "ema"), ("raw", "ema")):
        assert abs(means[one]["clip"] - means[two]["clip"]) > 1e-3
    written, moved._draw, e.every_prompts = [], lambda result, name: None, 5
    moved.log.write = written.append
    moved._evaluate_now()
    assert written[0]["eval"]["clip"] == pytest.approx(means["raw"]["clip"], abs=1e-5)


def test_what_follows_the_policy_stays_after_a_skipped_update(moved):
    state = lambda: {**moved.policy.state_dict(), **moved.engine.optimiser_state(), "updates": torch.tensor(moved.policy.updates)}  # noqa: E731
    moved._update()
    before, losses = state(), moved.algorithm.losses
    moved.algorithm.losses = lambda *a: ((loss * math.nan, told) for loss, told in losses(*a))
    row = moved._update()
    after = state()
    assert row["skipped"] and before.keys() == after.keys() and all(torch.equal(after[k], before[k]) for k in before)
    moved.algorithm.losses = losses
    assert not moved._update()["skipped"]
    assert {"raw", "ema", "old", "updates"} <= {k.split(".")[0] for k, v in state().items() if not torch.equal(v, before[k])}


class Places:
    """A judge that does not know the first picture, and says of which rows the pictures are that it knows."""

    def score(self, images, batch):
        return torch.where(batch.seeds == 0, torch.nan, batch.seeds.float())

    def breakdown(self, scores, rows):
        return {"overall": 7.0, "apart": float(sum(abs(row["place"] - s) for row, s in zip(rows, scores.tolist(), strict=True)))}


def test_memory_of_an_evaluation_does_not_grow_with_its_prompts():
    """Pictures are as large as all else is small; those of the grid are kept, and one batch's. A judge has each picture's own row."""
    backbone = SimpleNamespace(latent_shape=(1, 2, 2), device="cpu", bind=lambda text, guidance: lambda z, sigma: z)
    backbone.decode = lambda z: z.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 3, 64, 64).clone()
    reward = SimpleNamespace(score=lambda images, batch: images.mean((1, 2, 3)))
    picture, peaks, found = 3 * 64 * 64 * 4 / 2**20, [], {}

    def run(n):
        prompts = PromptSet(["a star"] * n, [{"place": k} for k in range(n)])
        found[n] = evaluate(
            backbone, nullcontext(), prompts, {"r": reward, "j": Places()}, schedule.sigmas(2), OneOf(1, 0), guidance=1.0, batch_size=4, seed=0, keep=6, progress=False
        )  # fmt: skip

    for n in (16, 64):
        peaks.append(peak_megabytes(lambda n=n: run(n)))
    assert found[64].means["j"] == 7 and found[64].means["unscored/j"] == 1 and found[64].means["j/apart"] == 0
    assert len(found[64].images) == 6 and len(found[64].scores["r"]) == 64 and torch.equal(found[64].images, found[16].images)
    assert peaks[1] < peaks[0] + 0.5 * picture and peaks[1] < 20 * picture, (peaks, picture)


def strict(text):
    """Strict JSON alone."""
    return json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))


def test_an_evaluation_is_of_what_is_known_and_says_what_is_not(world, capsys):  # noqa: F811
    """Means over the pictures with a score and the number of those without; null where there is none; from the log to what is printed."""
    silent = "rewards.silent={_target_: tests.test_jobs.Partial, lost: [0, 1, 2, 3, 4, 5, 6, 7], instead: .inf}"
    judged = (PARTIAL % "[1, 3]", silent, "evaluation.rewards=[clip, partial, silent]", "evaluation.final=[raw]")
    train(world, "holes", *judged, "updates=1", "evaluation.every=1", "evaluation.every_prompts=4", "guard.prompts=0")
    folder = world / "runs" / "holes"
    told = capsys.readouterr().out
    assert "'partial' gave no score for 2 of 5 pictures" in told and "'silent' gave no score for 5 of 5 pictures" in told
    launcher.run([f"run={folder}"])
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("raw ")]
    assert row[-1] == "-" and float(row[-2]) == pytest.approx(0.5, abs=0.5)
    kept = [strict((folder / name).read_text()) for name in ("summary.json", "evaluation.json")]
    means = [
        kept[0]["eval"]["raw"],
        kept[1]["raw"],
        *(r["eval"] for r in map(strict, (folder / "metrics.jsonl").read_text().splitlines()) if "eval" in r),
    ]
    assert len(means) == 4
    for found in means:
        assert (
            found["silent"] is None
            and found["unscored/partial"] == 2
            and found["unscored/silent"] in (4, 5)
            and "unscored/clip" not in found
        )
    run = trainer(world, *judged)
    result = run.evaluate("reference", 5, "again")
    assert result.means["partial"] == pytest.approx(float(result.scores["partial"][[0, 2, 4]].mean())) and 0 < result.means["partial"] < 1
    assert result.scores["partial"][[1, 3]].isnan().all() and result.scores["silent"].isnan().all()
