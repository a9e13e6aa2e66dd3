"""ZeRO 0 to 3, accumulation and ranks are the same maths: one process (or a pair) trains every case in turn, in this file's `__main__`."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlstitch.distributed import Engine, mean_over_ranks
from tests import pictures, warm
from tests.test_guard import OneOf
from tests.test_marble import DARK
from tests.test_train import ROOT, world  # noqa: F401  (a fixture)

PIXEL = ("oracle._target_=rlstitch.oracles.Terminal", "stop._target_=rlstitch.stops.End")
WINDOW = ("algorithm.window=2", "algorithm.kl=0.01")
METHODS = {  # each with its prompts an update, and pictures a prompt
    "draft": (12, 1, "draft.Draft", ("algorithm.grad_steps=2",)),
    "nft": (3, 4, "nft.NFT", ("algorithm.beta=0.5", "algorithm.times=2")),
    "flow_grpo_fast": (3, 4, "flow_grpo.FlowGRPO", (*WINDOW, *PIXEL)),
    "marble": (3, 4, "marble.MARBLE", ("algorithm.beta=0.5", "algorithm.times=2", "algorithm.every=2", *PIXEL, *DARK)),
    "dpo_online": (12, 2, "dpo.OnlineDPO", PIXEL),
    "soar": (12, 1, "soar.SOAR", ("algorithm.points=2", "data.images={_target_: tests.pictures.tiny, n: 12}")),
}


def overrides(world, method, stage, accumulation, ranks):  # noqa: F811
    prompts, images, target, options = METHODS[method]
    return [
        f"recipe={world / ('free.yaml' if method == 'soar' else 'recipe.yaml')}",
        f"out={world / 'zero'}",
        f"name={method}-{stage}-{accumulation}-{ranks}",
        "resume=never",
        f"algorithm={{_target_: rlstitch.algorithms.{target}}}",
        *options,
        f"data.prompts={world / 'twelve.txt'}",
        f"batch.prompts_per_update={prompts}",
        f"batch.images_per_prompt={images}",
        f"batch.micro_batch={prompts * images // ranks // accumulation}",
        f"distributed.zero_stage={stage}",
        f"sampler.activation_checkpointing={str(stage in (1, 3)).lower()}",
        "optimiser.lr=0.001",
        "optimiser.clip_norm=0.005",
    ]


def train(arguments, accumulation, spoil):
    """Three updates of a trainer; -> norms, and weights of all sets after each. `spoil`: the last loss of the second update is NaN, on the last rank alone."""
    from accelerate.state import AcceleratorState, PartialState

    from rlstitch import cli
    from rlstitch.checks import checked
    from rlstitch.trainer import Trainer

    recipe, given = cli.recipe_and_overrides(arguments)
    trainer = Trainer(checked(given, recipe))
    engine = trainer.engine
    assert trainer.geometry.accumulation == accumulation, trainer.geometry
    trainer._start()
    backward, norms, sets = engine.backward, [], []
    for update in range(3):
        calls = iter(range(1, 1 + accumulation * trainer.slots))

        def one(loss):
            last = next(calls) == accumulation * trainer.slots and engine.rank == engine.world - 1
            backward(loss * float("nan") if spoil and update == 1 and last else loss)

        engine.backward = one
        norms.append(trainer._update()["grad_norm"])
        sets.append({k: v.clone() for k, v in trainer.policy.state_dict().items()})
    trainer._checkpoint()
    AcceleratorState._reset_state(reset_partial_state=False)
    assert PartialState._shared_state
    return norms, sets


def main(folder, cases, spoil):
    """Train every case; the first rank writes norms and weights."""
    found = {}
    for case in cases:
        norms, sets = train(case["arguments"], case["accumulation"], spoil)
        found[case["name"]] = norms
        if os.environ.get("RANK", "0") == "0":
            save_file({f"{u}.{k}": v for u, kept in enumerate(sets) for k, v in kept.items()}, folder / f"{case['name']}.safetensors")
    if os.environ.get("RANK", "0") == "0":
        (folder / "norms.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():  # as every job leaves
        torch.distributed.destroy_process_group()


def run(world, folder, methods, stages, accumulations, ranks, spoil=False):  # noqa: F811
    """All cases in one process, or one pair of them; -> (norms, weights by update) of each."""
    pictures.without_reward(world)
    (world / "twelve.txt").write_text("\n".join(pictures.PROMPTS + ["a star", "a circle", "a red", "two star"]))
    cases = [
        {"name": f"{m}-{s}-{a}", "arguments": overrides(world, m, s, a, ranks), "accumulation": a}
        for s in stages
        for m in methods
        for a in accumulations
        if m != "marble" or s < 3
    ]
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([cases, spoil]))
    code, output = warm.run(__file__, folder, ranks=ranks, cwd=world, limit=1800)
    assert code == 0, output[-4000:]
    norms = json.loads((folder / "norms.json").read_text())
    return {c["name"]: (norms[c["name"]], load_file(folder / f"{c['name']}.safetensors")) for c in cases}


def test_an_update_by_hand():
    """The mean over micro-batches, clipped as a whole; one loss that is no number, though its gradient is, spoils its own update and no other."""
    engine = Engine(zero_stage=0, precision="fp32", accumulation=2, micro_batch=1, clip_norm=2.5)
    w = torch.nn.Parameter(torch.zeros(2))
    engine.prepare(torch.nn.Module(), torch.optim.SGD([w], lr=1.0), [w])
    for more, norm, after in ((0.0, 5.0, [-1.5, -2.0]), (float("nan"), None, [-1.5, -2.0]), (0.0, 5.0, [-3.0, -4.0])):
        engine.backward(w[0] * 6 + more)
        engine.backward(w[1] * 8)
        assert engine.step() == pytest.approx(norm) and w.tolist() == pytest.approx(after) and w.grad is None


def test_ranks_share_places_and_put_them_together(monkeypatch):
    for count, shares in ((1, [[0], [0]]), (5, [[0, 2, 4], [1, 3, 4]]), (6, [[0, 2, 4], [1, 3, 5]])):
        assert [OneOf(2, rank).share(count) for rank in (0, 1)] == shares
        parts = [torch.tensor(places)[:, None] * 10 for places in shares]
        assert OneOf(2, 0, parts).in_order(parts[0], count)[:, 0].tolist() == [10 * k for k in range(count)]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.add_(torch.arange(5.0)))  # what the other rank gives
    one, two = mean_over_ranks([torch.ones(2, 1), torch.full((3,), 4.0)], 2)
    assert one.tolist() == [[0.5], [1.0]] and two.tolist() == [3.0, 3.5, 4.0]


def same(ours, theirs):
    (norms, sets), (other, others) = ours, theirs
    assert norms == pytest.approx(other, rel=1e-4)
    assert sets.keys() == others.keys()
    for k in sets:
        torch.testing.assert_close(sets[k], others[k], atol=1e-5, rtol=0, msg=lambda m: f"{k}: {m}")


def test_every_zero_stage_learns_the_same_and_skips_a_spoiled_update_whole(world, tmp_path):  # noqa: F811
    """Two ranks, two micro-batches, several backwards a micro-batch; the second update is spoiled on one rank by its last loss: weights of all sets stay, and so do
    the moments, or the third update would be another."""
    found = run(world, tmp_path / "zero", ["nft"], range(4), [2], 2, spoil=True)
    first, first_sets = found["nft-0-2"]
    for name, (norms, sets) in found.items():
        assert norms[1] is None and norms[0] > 0.005 and norms[2] > 0.005, name  # both were clipped
        for key, value in sets.items():
            update, _, kept = key.partition(".")
            if update == "1":
                assert torch.equal(value, sets[f"0.{kept}"]), (name, key)
        same(([norms[0], norms[2]], sets), ([first[0], first[2]], first_sets))


@pytest.mark.slow
def test_zero_accumulation_and_ranks_do_not_change_the_maths(world, tmp_path):  # noqa: F811
    found = {ranks: run(world, tmp_path / f"{ranks}", METHODS, range(4), [1, 2, 6], ranks) for ranks in (1, 2)}
    for cases in found.values():
        for name, case in cases.items():
            same(case, found[1][f"{name.split('-')[0]}-0-1"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *json.loads((Path(sys.argv[1]) / "cases.json").read_text()))
