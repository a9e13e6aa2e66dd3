"""Every shipped value model by sigma against its clean reward, null-text Tweedie and the VAE-stitched baseline (identity prefix, three times the epochs).

    python -m benchmarks.value_quality [values=clip,hps,aesthetic] [images=8000] [held_out=500]

Recall@1 over scenes with distinct captions where the reward reads text; correlation with the clean reward over matched and mismatched prompts for all.
"""

import dataclasses

import torch
from torch.nn import functional as F

from benchmarks.common import arguments, save
from rlstitch import config as cfg
from rlstitch import schedule
from rlstitch.stitch.baselines import vae_stitch
from rlstitch.stitch.distill import DistillConfig, distill, latents_of, targets_of
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.stitch.recipe import SIGMAS, quality, recall, scores_under


@torch.no_grad()
def tweedie(backbone, reward, latents, prompts, targets) -> dict:
    """The same figures for r(D(z - sigma v)) under the null text."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    clean, out = scores_under(reward, targets, prompts), {}
    for level in SIGMAS:
        parts = []
        for k in range(0, len(latents), 64):
            z0, e = latents[k : k + 64], noise[k : k + 64]
            sigma = torch.full((len(z0),), level)
            z = schedule.interpolate(z0, e, sigma)
            v = backbone.velocity(z, sigma, backbone.null.expand(len(z)))
            parts.append(F.normalize(reward.encode(backbone.decode(schedule.posterior_mean(z, v, sigma)))[0], dim=-1))
        embedding = torch.cat(parts)
        row = {"correlation": float(torch.corrcoef(torch.stack([scores_under(reward, embedding, prompts), clean]))[0, 1])}
        if reward.head is None:
            row["recall_at_1"] = recall(embedding, reward.embed_texts(prompts))
        out[f"{level:g}"] = {k: round(v, 4) for k, v in row.items()}
    return out


def main() -> None:
    options = arguments({"values": "clip,hps,aesthetic", "images": "8000", "held_out": "500"})
    recipe = cfg.compose("draft_stitch")
    backbone = cfg.build(recipe["model"])
    result = {}
    for name in options["values"].split(","):
        reward = cfg.build(recipe["rewards"][name])
        model = StitchedValueModel.from_pretrained(recipe["values"][name], backbone=backbone, reward=reward)
        stitching = cfg.compose(f"stitch_{name}")
        images, _ = cfg.build(stitching["images"] | {"n": int(options["images"])})
        held, prompts = cfg.build(stitching["held_out"] | {"n": int(options["held_out"])})
        held_latents, held_targets = latents_of(backbone, held), targets_of(reward, held)[0]
        latents, (targets, tokens, norm) = latents_of(backbone, images), targets_of(reward, images)
        settings = DistillConfig(**stitching["distill"])
        baseline = vae_stitch(backbone, reward, images[:1000].float() / 255, latents[:1000], norm=norm)
        distill(baseline, latents, targets, tokens, dataclasses.replace(settings, steps=3 * settings.steps))
        result[name] = {
            "clean_recall_at_1": None if reward.head is not None else recall(held_targets, reward.embed_texts(prompts)),
            "stitched": quality(model, held_latents, prompts, held_targets),
            "tweedie_null_text": tweedie(backbone, reward, held_latents, prompts, held_targets),
            "vae_stitched": quality(baseline, held_latents, prompts, held_targets),
        }
        print(name, result[name], flush=True)
    save("value_quality", result)


if __name__ == "__main__":
    main()
