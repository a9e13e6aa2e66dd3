"""The stitch search over all (i, j <= 4) with 200 pictures, beside a naive float64 least squares for every pair: seconds and the largest difference of losses.

python -m benchmarks.search_speed [images=200]
"""

import time

import torch

from benchmarks.common import arguments, save
from rlstitch.backbones import Diffusers
from rlstitch.rewards.clip import ClipReward
from rlstitch.shapes.images import scenes
from rlstitch.stitch.search import drawn, features, search


def main() -> None:
    options = arguments({"images": "200"})
    backbone, reward = Diffusers("shapes:shapes", max_sequence_length=0), ClipReward("shapes:clip")
    images = scenes(int(options["images"]), 9)[0].float() / 255
    started = time.perf_counter()
    result = search(backbone, reward, images, batch_size=25, seed=3)
    ours = time.perf_counter() - started
    generator, worst, naive = torch.Generator().manual_seed(3), 0.0, 0.0
    parts = [features(backbone, reward, part, 4, *drawn(backbone, len(part), generator)) for part in images.split(25)]
    for pair in result.table:
        started = time.perf_counter()
        f, g = torch.cat([p[0][pair.i - 1] for p in parts]), torch.cat([p[1][pair.j - 1] for p in parts])
        design = torch.cat([f, torch.ones(len(f), 1, dtype=f.dtype)], 1)
        residual = design @ torch.linalg.lstsq(design, g).solution - g
        naive += time.perf_counter() - started
        worst = max(worst, abs(residual.square().sum(1).mean().item() - pair.loss))
    save(
        "search_speed",
        {
            "images": len(images),
            "pairs": len(result.table),
            "seconds": round(ours, 2),
            "naive_lstsq_seconds_without_features": round(naive, 2),
            "largest_difference_of_losses": worst,
            "table": result.rows(),
        },
    )


if __name__ == "__main__":
    main()
