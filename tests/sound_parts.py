"""A sound part of each kind, as a user would write it."""

import torch

from rlstitch.backbones.core import Cut
from rlstitch.types import Conditioning, Latent, Rollout


class Stop:
    def steps(self, num_steps):
        return range(2, num_steps + 1)

    def draw(self, num_steps, seed):
        return 2


class Oracle:
    differentiable, sigma_range = True, (0.0, 1.0)

    def __init__(self, backbone=None, rewards=None, weights=None):
        self.names, self.weights = ["a", "b", "c"], [1.0, 1.0, 0.5]

    def __call__(self, latent, batch):
        return latent.z.flatten(1)[:, :3]

    def total(self, scores):
        return scores.sum(-1)


class Algorithm:
    needs_gradient, collects, keeps_old = False, True, False
    learns_from, needs_oracle, whole_groups, balances = "prompts", True, False, False

    def __init__(self, oracle=None):
        self.oracle, self.weight = oracle or Oracle(), torch.ones(2, requires_grad=True)

    @staticmethod
    def faults(options, stops):
        return []

    @staticmethod
    def backwards(options, stops):
        return 1

    def rollout(self, batch, stop):
        return Rollout(batch, Latent(torch.ones(len(batch), 4, 2, 2), torch.zeros(len(batch))))

    def score(self, rollout):
        return self.oracle(rollout.latent, rollout.batch)

    def compare(self, rollouts, scores, groups):
        return scores.sum(1), {"masked": 0.0}

    def losses(self, rollout, *compared):
        yield self.weight.sum(), {"loss": self.weight.sum()}

    def end_step(self, step):
        pass

    def state(self):
        return {"count": torch.tensor(1)}

    def load_state(self, tensors):
        pass


class Backbone:
    parts, lora_targets = (), ("to_q",)
    latent_shape, size, device = (4, 2, 2), (4, 4), torch.device("cpu")

    def encode_prompts(self, prompts):
        return Conditioning(tokens=torch.zeros(len(prompts), 3, 2), pooled=torch.zeros(len(prompts), 2))

    def too_long(self, prompts):
        return []

    def velocity(self, z, sigma, text=None, *, guidance=1.0):
        return z.clone()

    def bind(self, text, guidance=1.0):
        return lambda z, sigma: self.velocity(z, sigma, text, guidance=guidance)

    def encode(self, images):
        return torch.zeros(len(images), 4, 2, 2)

    width = 5

    def prefix(self, z, sigma, blocks, text=None):
        return Cut(torch.zeros(len(z), 4, 5), blocks, z, sigma, text, lambda returned, z: returned.transpose(1, 2).unflatten(2, (2, 2)))

    def extend(self, state, blocks):
        return self.prefix(state.z, state.sigma, blocks, state.text)

    def resume(self, state):
        return state.z

    def decode(self, z):
        return torch.zeros(len(z), 3, 4, 4)


class Mine:
    """A reward that is also a judge."""

    differentiable = True

    def score(self, images, batch):
        return images.mean((1, 2, 3))

    def breakdown(self, scores, rows):
        return {"overall": float(scores.mean()), "red": 1}


KINDS = {"stop": Stop, "oracle": Oracle, "algorithm": Algorithm, "model": Backbone, "reward": Mine}
