"""A value model that has drifted from its reward is noticed and brought back on the policy's own latents."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rlstitch import sampling, schedule
from rlstitch.checks import checked
from rlstitch.config import compose, merge
from rlstitch.distributed import Engine
from rlstitch.oracles import Stitched
from rlstitch.prompts import PromptSet
from rlstitch.schema import RefreshConfig
from rlstitch.stitch.refresh import Refresher
from rlstitch.types import Batch, Conditioning, Latent, Rollout, UserError, noise_like
from tests.test_guard import OneOf
from tests.test_stitch import stitched

PROMPTS = ["a red circle", "two blue stars"] * 16


class Seen:
    """An engine of one rank that runs in float32."""

    together = staticmethod(lambda action: action())
    gather, world, rank, autocast = staticmethod(lambda tensor: tensor), 1, 0, nullcontext


class Told:
    """A reward whose scores are told beforehand."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def score(self, images, batch):
        return next(self.scores)[: len(images)]


def watched(backbone, updates, **options):
    """A watcher that has seen these updates, each (V [B], r [B], prompts [B]), cut into micro-batches of two, and what `after` said of each; nothing is distilled."""
    settings = RefreshConfig(**(dict(fraction=1.0, agreement=0.5, pairs=8, buffer=4) | options))
    told = Told([part for _, r, _ in updates for part in r.split(2)])
    watcher = Refresher(settings, {"r": SimpleNamespace()}, backbone, {"r": told}, Seen(), guidance=1.0)
    acted, figures = [], []
    watcher.refresh = lambda name: (acted.append(name), watcher.pairs.update({name: watcher.pairs[name][:0]}))
    for value, _, group in updates:
        z = torch.zeros(len(value), *backbone.latent_shape)
        batch = Batch(["a star"] * len(value), group, group, [{}] * len(value))
        figures.append(watcher.after(Rollout(batch, Latent(z, torch.zeros(len(z))), value[:, None]).split(2), ["r"], schedule.sigmas(2), 2))
    return watcher, figures


def test_what_is_acted_on_is_agreement_within_prompts(backbone, generator):
    """Right values: Pearson's, by hand. An error shared by all samples of a prompt does no harm, whatever its size; a value that tells prompts apart but not their
    samples does; scores that are not known are left out; too few pairs say nothing; one image a prompt is compared across prompts and updates."""
    r = torch.randn(3, 8, generator=generator)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    shift = torch.where(group == 0, 50.0, -50.0)
    _, figures = watched(backbone, [(r[k] + shift, r[k], group) for k in range(3)])
    assert [f["refreshed"] for f in figures] == [0, 0, 0] and figures[-1]["correlation/r"] == pytest.approx(1, abs=1e-6)
    values = 0.1 * torch.randn(3, 8, generator=generator)
    watcher, figures = watched(backbone, [(values[k] + shift, r[k] + shift, group) for k in range(3)], pairs=16)
    assert [f["refreshed"] for f in figures] == [0, 1, 0]
    gap = (values[0] - r[0]).mean().abs() / (r[0] + shift).std()
    assert figures[0]["gap/r"] == pytest.approx(float(gap), rel=1e-4)
    inside = [(x - x.view(-1, 4).mean(1).repeat_interleave(4)).double() for x in (values[:2].flatten(), r[:2].flatten())]
    assert figures[1]["correlation/r"] == pytest.approx(
        float((inside[0] * inside[1]).sum() / (inside[0].norm() * inside[1].norm())), abs=1e-4
    )
    lost = r.clone()
    lost[0, 0], lost[1, 2] = torch.nan, torch.inf
    watcher, figures = watched(backbone, [(r[k], lost[k], group) for k in range(3)], pairs=22)
    assert figures[-1]["refreshed"] == 0 and figures[-1]["correlation/r"] == pytest.approx(1) and len(watcher.pairs["r"]) == 22
    assert figures[0]["gap/r"] == pytest.approx(0)
    _, figures = watched(backbone, [(values[k], r[k], torch.arange(8)) for k in range(3)], pairs=24)
    flat = torch.corrcoef(torch.stack([values.flatten(), r.flatten()]))[0, 1]
    assert figures[-1]["correlation/r"] == pytest.approx(float(flat), abs=1e-5) and figures[-1]["refreshed"] == float(flat < 0.5)
    _, figures = watched(backbone, [(torch.ones(8), r[k], group) for k in range(1)])
    assert figures[-1]["correlation/r"] == 0 and figures[-1]["refreshed"] == 1  # says the same of everything
    watcher, _ = watched(backbone, [(r[k], r[k], group) for k in range(3)], fraction=0.3, agreement=-1.0)
    assert watcher.pairs["r"][:, 0].tolist() == r[1:, :4].flatten().tolist() and watcher.updates == 3  # the latest, one group an update
    sets = [PromptSet([f"{what} {k}" for k in range(n)], [{}] * n) for n, what in ((4, "red"), (2, "blue"))]
    for prompts in sets:
        prompts.lookup = lambda names: Conditioning(tokens=torch.tensor([[[float(len(n)), float(n[-1])]] for n in names]))
    watcher.prompts = sets
    for prompts, place in zip(sets, (3, 5)):  # the second prompt of the second set, drawn for the third time
        rollout = Rollout(Batch(["a"], torch.tensor([place]), group[:1]), Latent(torch.zeros(1, *backbone.latent_shape), torch.zeros(1)))
        rollout.scores, watcher.rewards = torch.zeros(1, 1), {}
        watcher.measure([rollout], [], schedule.sigmas(2), 2, prompts)
    assert watcher.text_of(torch.tensor([2, 3])).tokens[:, 0].tolist() == [[5, 3], [6, 1]]
    again = Refresher(watcher.config, {}, backbone, {}, Seen(), guidance=1.0)
    again.models = {"r": SimpleNamespace(load_state_dict=lambda *a, **o: None, state_dict=dict)}
    watcher.models = again.models
    again.restore(watcher.tensors(), watcher.progress())
    assert torch.equal(again.pairs["r"], watcher.pairs["r"]) and again.updates == 5 and torch.equal(again.places, watcher.places)


@pytest.mark.parametrize(
    "images, fraction, watched_groups", [(2, 0.1, [0]), (2, 0.4, [0, 2, 4]), (1, 0.5, [0, 2, 4, 6, 8, 10]), (3, 1.0, [0, 1, 2, 3])]
)
def test_the_same_samples_are_watched_on_any_number_of_ranks(backbone, images, fraction, watched_groups):
    """Whole groups of 12 samples, whatever ranks and micro-batches they lie in; each rank asks about as many, and the latents keep the update's order."""
    groups = torch.arange(12) // images
    value, truth = torch.arange(12.0), torch.arange(12.0) * 0.5
    z = value.view(-1, 1, 1, 1).expand(-1, *backbone.latent_shape)
    wanted = torch.isin(groups, torch.tensor(watched_groups))

    class Shown:
        def score(self, pictures, batch):
            asked.append(len(batch))
            return truth[batch.seeds]

    def rank_of(world, rank, parts):
        engine = OneOf(world, rank, parts)
        settings = RefreshConfig(fraction=fraction, agreement=0.5, pairs=12, buffer=12)
        watcher = Refresher(settings, {"r": SimpleNamespace()}, backbone, {"r": Shown()}, engine, guidance=1.0)
        engine.gather = lambda own: (
            (queue := parts.setdefault(len(engine.calls), {}), engine.calls.append(0), queue.update({rank: own}))[0]
            and torch.cat([queue.get(k, own) for k in range(world)])
        )
        engine.calls = []
        share = 12 // world
        mine = torch.arange(rank * share, (rank + 1) * share)
        batch = Batch(["a star"] * share, groups[mine], mine, [{}] * share)
        watcher.measure(Rollout(batch, Latent(z[mine], torch.zeros(share)), value[mine, None]).split(3), ["r"], schedule.sigmas(2), 2)
        return watcher

    for world in (1, 2, 4):
        parts, counts = {}, []
        for _ in range(3):  # what the others give is known by the last time
            for rank in range(world):
                asked = []
                watcher = rank_of(world, rank, parts)
                counts.append(sum(asked))
        assert len(set(counts[-world:])) == 1
        torch.testing.assert_close(watcher.pairs["r"][:, :2], torch.stack([value, truth], 1)[wanted].double())
        assert torch.equal(watcher.latents[:, 0, 0, 0], value[wanted])


def test_what_is_watched_is_finished_by_the_policy_and_each_model_has_its_own_pairs(backbone, reward, generator):
    """And a model that was refreshed is frozen again, its pairs forgotten, those of the others kept."""
    model, grid = stitched(backbone, reward)[0].requires_grad_(False).eval(), schedule.sigmas(3, 3.0, "plain")
    truths = {"r": torch.tensor([0.1, 0.2, 0.3]), "s": torch.tensor([5.0, 6.0, 7.0])}
    shown = {name: SimpleNamespace(score=lambda images, batch, name=name: truths[name]) for name in truths}
    settings = RefreshConfig(fraction=1.0, agreement=0.5, pairs=8, buffer=4, steps=1, batch_size=2)
    watcher = Refresher(settings, {"r": model, "s": model}, backbone, shown, Seen(), guidance=1.0)
    z, values = torch.randn(3, *backbone.latent_shape, generator=generator), torch.randn(3, 3, generator=generator)
    batch = Batch(PROMPTS[:3], torch.arange(3), torch.arange(3), [{}] * 3, backbone.encode_prompts(PROMPTS[:3]))
    for at in (z + 1, z):
        watcher.measure([Rollout(batch, Latent(at, torch.full((3,), float(grid[1]))), values)], ["r", "other", "s"], grid, 1)
    done = sampling.sample(backbone.bind(batch.text), z, grid[1:]).z.detach()
    assert len(watcher.latents) == 4  # the latest
    torch.testing.assert_close(watcher.latents[1:], done, atol=1e-5, rtol=1e-4)
    for k, name in ((0, "r"), (2, "s")):
        torch.testing.assert_close(watcher.pairs[name][3:, :2].float(), torch.stack([values[:, k], truths[name]], 1))
    watcher.rewards["r"] = reward
    watcher.refresh("r")
    assert not any(p.requires_grad for p in model.parameters()) and watcher.count == 1
    assert len(watcher.pairs["r"]) == 0 and len(watcher.pairs["s"]) == 6


def test_a_watch_that_could_never_act_is_refused():
    for options, told in (
        ({"fraction": 0.001}, "'refresh.fraction' is 0.001, which is no sample of the 32 "),
        ({"fraction": 0.04, "pairs": 10_000}, "'refresh.pairs' is 10000, but "),
    ):
        with pytest.raises(UserError, match=told):
            checked(merge(compose("draft_stitch"), {"refresh": options}), "draft_stitch")


def test_a_value_that_has_lost_its_reward_is_brought_back(backbone, reward):
    model = stitched(backbone, reward)[0].requires_grad_(False).eval()
    with torch.no_grad():  # a value model that says the opposite
        model.tail.projection.weight.mul_(-1.0)
    index = torch.arange(len(PROMPTS))
    batch = Batch(PROMPTS, index, index, [{}] * len(PROMPTS), backbone.encode_prompts(PROMPTS))
    grid, oracle = schedule.sigmas(6, 3.0, "plain"), Stitched({"r": model}, {"r": 1.0})
    engine = Engine(zero_stage=0, precision="fp32", accumulation=1, micro_batch=32, clip_norm=1.0)

    def rollout(seed):
        with torch.no_grad():
            latent = sampling.sample(backbone.bind(batch.text), noise_like(backbone.latent_shape, index + 1000 * seed), grid, stop=4)
            return Rollout(batch, latent, oracle(latent, batch))

    def refresher(**options):
        settings = dict(fraction=1.0, agreement=0.5, pairs=32, steps=120, lr=2e-3, batch_size=32, buffer=96) | options
        return Refresher(RefreshConfig(**settings), {"r": model}, backbone, {"r": reward}, engine, guidance=1.0)

    watcher = refresher(agreement=-1.0)
    for seed in range(2):
        before = watcher.after([rollout(seed)], ["r"], grid, 4)
    assert before["refreshed"] == 0 and before["correlation/r"] < 0.8
    other = watcher.after([Rollout(batch, rollout(0).latent, torch.zeros(len(PROMPTS), 1))], ["of another stage"], grid, 4)
    assert other == {"refreshed": 0.0}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    mender = refresher(agreement=0.99)
    acted = [mender.after([rollout(seed)], ["r"], grid, 4)["refreshed"] for seed in range(3)]
    assert acted[0] == 0 and 1 in acted  # never on a buffer too small to learn from
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert moved and all(k.startswith(("stitch.", "tail.")) for k in moved)
    after = refresher(agreement=-1.0).after([rollout(9)], ["r"], grid, 4)["correlation/r"]
    assert after > before["correlation/r"], (before, after)
