"""The miniature's autoencoder: `AutoencoderKL`, f4, 8 latent channels."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from rlstitch.shapes.pretrain.common import autocast, batches, device, fit, write_card
from rlstitch.shapes.scenes import render, sample_scenes

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    sample_size=64,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of decode(mean of encode(x)) over images [N, 3, H, W] in [0, 1]."""
    errors = []
    with torch.no_grad():
        for part in batches(len(images), 64):
            x = images[part].to(device())
            y = vae.decode(vae.encode(2 * x - 1).latent_dist.mode()).sample
            errors.append((((y.clamp(-1, 1) + 1) / 2 - x) ** 2).flatten(1).mean(1))
    return float(-10 * torch.log10(torch.cat(errors).mean()))


def train(out: Path, work: Path, *, seed: int, steps: int, minutes: float | None, batch: int = 16, threads: int | None = None) -> None:
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG).to(device())

    def loss_of(step: int, generator: torch.Generator):
        x = (2 * render(sample_scenes(batch, generator)) - 1).to(device())
        with autocast():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = y - x
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        mse = (error**2).mean()
        loss = F.smooth_l1_loss(y, x, beta=0.05) + 2 * mse + 2e-4 * kl
        return loss, {"psnr": -10 * torch.log10(mse.detach() / 4), "kl": kl.detach()}

    facts = fit("vae", vae, loss_of, steps=steps, lr=2e-3, seed=seed, work=work, minutes=minutes, ema_decay=0.998)
    held_out = render(sample_scenes(512, torch.Generator().manual_seed(10_000 + seed)))
    with torch.no_grad():
        latents = torch.cat([vae.encode(2 * held_out[p].to(device()) - 1).latent_dist.mode() for p in batches(512, 64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    vae.half().save_pretrained(out / "vae")
    facts |= {
        "part": "vae",
        "seed": seed,
        "psnr_db": round(psnr(vae.float(), held_out), 2),
        "channel_std": [round(s, 3) for s in latents.std((0, 2, 3)).tolist()],
    }
    write_card(out / "vae", facts)
    print(facts, flush=True)
