"""Published rewards by hub id against published scores: DiffSynth-Studio's card of its image metrics gives two pictures of one prompt, and what each reward makes of them.

They run where the hub cache has a reward's files and RLSTITCH_GOLDEN names a folder with the card's two pictures, in their order (and, for HPSv3, hpsv3_instruction.txt):
RLSTITCH_GOLDEN=golden pytest -m hub
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlstitch import config as cfg
from rlstitch.part_checks import reward_faults
from rlstitch.pictures import SUFFIXES
from rlstitch.types import Batch

PROMPT = "A cat is sitting on a stone."
CLIP = {"_target_": "rlstitch.rewards.clip.ClipReward", "path": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "scale": 100.0}
GOLDEN = {  # what is laid over a recipe's reward, the two scores, and within which share they are to be met
    "pickscore": ({"dtype": "float32"}, (22.958, 23.321), 0.005),
    "imagereward": ({}, (1.419, 1.786), 0.02),
    "hpsv2": ({"scale": "logit", "dtype": "float32"}, (30.169, 30.528), 0.01),
    "hpsv3": ({}, (12.287, 12.969), 0.03),  # in bfloat16, as it is published
    "clip": (CLIP, (40.271, 39.065), 0.01),
    "aesthetic_v2": ({"dtype": "float32"}, (5.096, 5.848), 0.01),
}


def node_of(name):
    recipe = {} if name == "clip" else next(iter(cfg.compose(f"reward/{name}")["rewards"].values()))
    return recipe | GOLDEN[name][0]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_reward_lacks_nothing_but_files(name):
    assert all("is not in the hub cache" in f or "is not there" in f for f in reward_faults(name, node_of(name)))


@pytest.mark.hub
@pytest.mark.parametrize("name", GOLDEN)
def test_published_scores_are_met(name):
    if not (given := os.environ.get("RLSTITCH_GOLDEN")):
        pytest.skip("RLSTITCH_GOLDEN names no folder with the card's two pictures")
    pictures = sorted(p for p in Path(given).iterdir() if p.suffix.lower() in SUFFIXES)
    assert len(pictures) == 2, f"{given} holds {len(pictures)} pictures, and the card has two"
    node, (_, expected, share) = node_of(name), GOLDEN[name]
    node |= {"instruction": f"{given}/hpsv3_instruction.txt"} if "instruction" in node else {}
    if faults := reward_faults(name, node):
        pytest.skip("; ".join(faults))
    reward = cfg.build(node, kind="reward")
    for file, wanted in zip(pictures, expected, strict=True):
        picture = torch.tensor(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            found = reward.score(picture, Batch([PROMPT], torch.zeros(1), torch.zeros(1)))
        assert float(found) == pytest.approx(wanted, rel=share)
