"""A value model that has drifted from its reward is noticed and brought back on the policy's own latents."""

import torch

from rlstitch import sampling, schedule
from rlstitch.distributed import Engine
from rlstitch.oracles import Stitched
from rlstitch.schema import RefreshConfig
from rlstitch.stitch.refresh import Refresher
from rlstitch.types import Batch, Rollout, noise_like
from tests.test_stitch import stitched

PROMPTS = ["a red circle", "two blue stars"] * 16


def test_the_gap_is_measured_and_closes(backbone, reward):
    model = stitched(backbone, reward)[0].requires_grad_(False).eval()
    with torch.no_grad():  # a value model that says too much, as one does when its policy has moved away
        model.tail.projection.weight.mul_(4.0)
    index = torch.arange(len(PROMPTS))
    batch = Batch(PROMPTS, index, index, [{}] * len(PROMPTS), backbone.encode_prompts(PROMPTS))
    grid, oracle = schedule.sigmas(6, 3.0, "plain"), Stitched({"r": model}, {"r": 1.0})
    engine = Engine(zero_stage=0, precision="fp32", accumulation=1, micro_batch=32, clip_norm=1.0)

    def rollout(seed):
        with torch.no_grad():
            latent = sampling.sample(backbone.bind(batch.text), noise_like(backbone.latent_shape, index + 1000 * seed), grid, stop=4)
            return Rollout(batch, latent, oracle(latent, batch))

    def refresher(**options):
        settings = dict(fraction=1.0, threshold=0.5, steps=120, lr=2e-3, batch_size=32, buffer=96) | options
        return Refresher(RefreshConfig(**settings), {"r": model}, backbone, {"r": reward}, engine, guidance=1.0)

    watcher = refresher(threshold=1e9)
    for seed in range(3):
        before = watcher.after(rollout(seed), ["r"], grid, 4)
    assert before["refreshed"] == 0 and before["gap/r"] > 0.5
    assert watcher.after(Rollout(batch, rollout(0).latent, torch.zeros(len(PROMPTS), 1)), ["of another stage"], grid, 4) == {
        "refreshed": 0.0
    }
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    mender = refresher()
    acted = [mender.after(rollout(seed), ["r"], grid, 4)["refreshed"] for seed in range(3)]
    assert acted[0] == 0 and 1 in acted  # never on a buffer too small to learn from
    assert not any(p.requires_grad for p in model.parameters())
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert moved and all(k.startswith(("stitch.", "tail.")) for k in moved)
    after = refresher(threshold=1e9).after(rollout(9), ["r"], grid, 4)["gap/r"]
    assert after < 0.4 * before["gap/r"], (before, after)
