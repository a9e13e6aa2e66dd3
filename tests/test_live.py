"""What lies in memory at the peak of an update, to the byte: nothing beside a forward with its gradient that the maths does not ask for."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

from rlstitch.algorithms.flow_grpo import FlowGRPO
from rlstitch.algorithms.nft import NFT
from rlstitch.oracles import Terminal
from rlstitch.policy import Policy
from rlstitch.schedule import sigmas
from rlstitch.types import Batch, noise_like
from tests.live import peak

ROWS = 16
UPDATES = {
    "flow_grpo": (FlowGRPO, {"window": 4, "noise_level": 0.4, "sde_type": "sde", "kl": 0.01}),
    "nft": (NFT, {"beta": 0.3, "old_decay": "slow", "times": 2, "kl": 0.01}),
}


def test_the_count_is_right():
    x = torch.ones(1024, requires_grad=True)

    def case():
        y = (x * 2).exp()  # the product is gone, the exponential is kept for the backward pass
        y.view(32, 32).sum().backward()

    assert 2 * 4096 <= peak(case) <= 3 * 4096 + 64
    assert peak(lambda: x.view(2, -1).detach()) == 0


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_holds_one_forward_and_little_more(backbone, reward, name, guidance):
    """Rollout and losses, with KL, against one forward and backward by the stock attention on as many rows."""
    cls, options = UPDATES[name]
    policy = Policy(backbone.transformer, rank=4, alpha=8.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9, old=True)
    method = cls(backbone, policy, Terminal(backbone, {"r": reward}, {"r": 1.0}), sigmas(6, 3.0, "plain"), guidance=guidance, **options)
    prompts = ["a red circle"] * ROWS
    batch = Batch(prompts, torch.zeros(ROWS, dtype=torch.long), torch.arange(ROWS), [{}] * ROWS, backbone.encode_prompts(prompts))
    z, sigma = noise_like(backbone.latent_shape, batch.seeds), torch.full((ROWS,), 0.6)

    def update():
        rollout = method.rollout(batch, 6)
        given = torch.linspace(0.1, 0.9, ROWS)
        for loss, _ in method.losses(rollout, given, 2):
            loss.backward()

    def bare():
        (backbone.velocity(z, sigma, batch.text, guidance=guidance) - z).square().mean().backward()

    first, ours = peak(update), peak(update)
    own, kept = backbone.transformer.attn_processors, sum(p.grad.nbytes for p in policy.parameters())
    one = peak(bare)
    backbone.transformer.set_attn_processor(JointAttnProcessor2_0())
    stock = peak(bare)
    backbone.transformer.set_attn_processor(own)
    latents = 12 * z.nbytes  # of the window, or of a training time
    assert one <= stock
    assert ours <= stock + latents + 4096
    assert first <= stock + latents + kept + 4096
