"""What stitching costs on real configurations: FLOPs of the search and of the finetuning, counted on the meta device by the code that runs them, no weight allocated.

    python -m benchmarks.stitch_cost [pixels=512,1024] [models=SD3.5-M,FLUX.1-dev,...]

Search: 200 pictures at one noise level each, as the paper has it: encoder, every block of the denoiser under the null text, the reward's first four; then
least squares in float64. Finetuning: of each picture seen, the frozen prefix, the tail with its backward pass; of each picture once, encoder and frozen reward. The recipe
(recipes/common/stitch_sd35.yaml) sees 1000 batches of 128, five epochs of 25,600 pictures; hours for other data scale with what is seen. Cuts: after the first block, the cheapest there can be;
after a sixth of the blocks, where the paper's search lands on SD3.5-Medium (4 of 24); after half of them. Rewards are entered at their first block, so that the tail is the whole tower.
Hours are those of an H100 at 40 % of its 989 TFLOP/s in bf16 (float64: of 67).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from benchmarks import hunyuan_image
from benchmarks.common import arguments, save, table
from benchmarks.real_parts import SIZES, build_vae, count
from rlstitch.backbones import Diffusers, cut, flux, qwen, sd3
from rlstitch.rewards.clip import ClipReward, VisionTail
from rlstitch.rewards.preprocessing import Preprocessing
from rlstitch.stitch.distill import DistillConfig, distillation_loss
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.stitch.search import drawn, features
from rlstitch.types import Conditioning

KL = SIZES["sd35_medium"]["vae"]
HUNYUAN_VAE = dict(
    in_channels=3, out_channels=3, latent_channels=64, block_out_channels=(128, 256, 512, 512, 1024, 1024), layers_per_block=2,
    spatial_compression_ratio=32, sample_size=384, scaling_factor=0.75289,
)  # fmt: skip
LARGE = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=38, attention_head_dim=64, num_attention_heads=38,
    joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048, pos_embed_max_size=192, qk_norm="rms_norm",
)  # fmt: skip
MODELS: dict[
    str, tuple[Any, dict, dict | None, int]
] = {  # its module, configuration where the class has another by default, autoencoder's (None: KL), tokens of null text
    "SD3.5-M": (sd3, SIZES["sd35_medium"]["transformer"], None, 333),
    "SD3.5-L": (sd3, LARGE, None, 333),
    "FLUX.1-dev": (flux, dict(guidance_embeds=True), None, 512),
    "Qwen-Image": (qwen, {}, {}, 6),
    "HunyuanImage-2.1": (hunyuan_image, {}, HUNYUAN_VAE, 1128),
}
REWARDS = {
    "CLIP ViT-L/14": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=768),
    "HPSv2 ViT-H/14": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, projection_dim=1024),
}
PICTURES, LAST = 200, 4  # of the search: pictures, and the last reward block that is tried
SEEN, EPOCHS = 128_000, 5
SPEED, DOUBLE = 0.4 * 989, 0.4 * 67  # TFLOP/s


def denoiser(arch: ModuleType | Any, config: dict, vae: dict | None, tokens: int, pixels: int) -> Diffusers:
    """A backbone of a configuration, on the meta device."""
    out = Diffusers.__new__(Diffusers)
    out.arch, out.device, out.dtype, out.compiled, out.size = arch, torch.device("meta"), torch.float32, False, (pixels, pixels)
    out.transformer = arch.TRANSFORMER(**config).requires_grad_(False).eval()
    out.vae = (build_vae(KL) if vae is None else arch.VAE(**vae)).requires_grad_(False).eval()
    c = out.transformer.config
    channels, factor, *_ = arch.latent(c, out.vae.config)
    out.latent_shape, out.embedded = (channels, pixels // factor, pixels // factor), 3.5 if c.get("guidance_embeds") else None
    out.num_blocks, out.width = len(cut.blocks_of(out.transformer, arch.LISTS)), c.num_attention_heads * c.attention_head_dim
    text = {"tokens": torch.empty(1, tokens, c.get("joint_attention_dim") or c.text_embed_dim)}
    text |= {"pooled": torch.empty(1, c.pooled_projection_dim)} if "pooled_projection_dim" in c else {}
    out._null = Conditioning(**text)
    return out


def reward_of(vision: dict) -> ClipReward:
    """A CLIP reward of a configuration, on the meta device; its text tower is cut short, it never runs."""
    out, width = ClipReward.__new__(ClipReward), vision["projection_dim"]
    text = dict(vocab_size=600, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = vision | dict(image_size=224, patch_size=14)
    out.model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)).requires_grad_(False).eval()
    out.device, out.dtype, out.head = torch.device("meta"), torch.float32, None
    out.num_blocks, out.width, out.grid = vision["num_hidden_layers"], vision["hidden_size"], 16
    out.preprocessing, out._whole = Preprocessing(224, ("exact", 224, 224), None), VisionTail(out.model, 1)
    return out


def least_squares(width: int, reward: ClipReward, blocks: int) -> float:
    """TFLOP of `stitch.search` beside its forward passes: Gram matrices of every block with itself and with all rewards' blocks, one factorisation a block."""
    rows, targets = PICTURES * reward.grid**2, LAST * reward.width
    return blocks * (2 * rows * width * (width + targets) + width**3 / 3 + 2 * width**2 * targets + 2 * width**2 * targets) / 1e12


def finetuning(backbone: Diffusers, reward: ClipReward, blocks: int) -> dict[str, float]:
    """TFLOP of one picture that is seen: the frozen prefix, and the tail with its backward pass."""
    with torch.device("meta"):
        z, sigma, target = torch.empty(1, *backbone.latent_shape), torch.empty(1), torch.empty(1, reward.model.config.projection_dim)
        tokens = torch.empty(1, reward.grid**2 + 1, reward.width)
    weight = torch.zeros(reward.width, backbone.width)
    model = (
        StitchedValueModel.from_search(
            backbone,
            reward,
            blocks,
            1,
            weight,
            weight[:, 0],
            cls_state=weight[0],
            norm=1.0,
            normalise=True,
            sigma_range=(0.0, 1.0),
            card={},
        )
        .to("meta")
        .thaw()
    )
    with torch.no_grad():
        prefix = count(lambda: model.activations(z, sigma))
        grid = model.activations(z, sigma).grid
    tail = count(lambda: distillation_loss(model, grid, sigma, target, tokens, DistillConfig())[0].backward())
    return {"prefix": prefix, "tail": tail}


def hours(tflop: float, speed: float = SPEED) -> float:
    return tflop / speed / 3600


def cost(model: str, pixels: int) -> dict[str, Any]:
    """All figures of one model at one size, by reward."""
    out: dict[str, Any] = {}
    with torch.device("meta"):
        backbone, image = denoiser(*MODELS[model], pixels), torch.empty(1, 3, pixels, pixels)
    with torch.no_grad():
        encoder = count(lambda: backbone.encode(image))
    n = backbone.num_blocks
    cuts = {"first": 1, "sixth": max(1, round(n / 6)), "half": n // 2}
    for name, vision in REWARDS.items():
        with torch.device("meta"):
            reward = reward_of(vision)
        once = count(lambda: features(backbone, reward, image, LAST, *drawn(backbone, 1, torch.Generator())))
        with torch.no_grad():
            target = count(lambda: reward.encode(image))
        fits = least_squares(backbone.width, reward, n)
        row: dict[str, Any] = {
            "search_tflop": PICTURES * once, "fits_tflop_float64": fits, "search_hours": hours(PICTURES * once) + hours(fits, DOUBLE),
            "once_a_picture_tflop": encoder + target,
        }  # fmt: skip
        for cut_name, k in cuts.items():
            seen = finetuning(backbone, reward, k)
            total = SEEN * sum(seen.values()) + SEEN / EPOCHS * (encoder + target)
            row[cut_name] = {"blocks": k, **seen, "finetune_tflop": total, "finetune_hours": hours(total)}
        out[name] = row
    parameters = sum(p.numel() for p in backbone.transformer.parameters())
    return {"parameters": parameters, "blocks": n, "encoder_tflop": encoder, "rewards": out}


def short(value: Any) -> Any:
    """Six digits of every number."""
    return (
        {k: short(v) for k, v in value.items()} if isinstance(value, dict) else float(f"{value:.6g}") if isinstance(value, float) else value
    )


def told(found: dict[str, dict[str, Any]]) -> None:
    """The figures of `cost`, by model and size, as a table."""
    rows = []
    for key, made in found.items():
        for name, row in made["rewards"].items():
            cells = [
                *key.split(),
                f"{made['parameters'] / 1e9:.1f}",
                name,
                f"{row['search_tflop'] / 1000:.2f}",
                f"{60 * row['search_hours']:.2f}",
            ]
            for cut_name in ("first", "sixth", "half"):
                c = row[cut_name]
                cells += [f"{c['blocks']} of {made['blocks']}", f"{c['prefix']:.2f} + {c['tail']:.2f}", f"{c['finetune_hours']:.2f}"]
            rows.append(cells)
    head = ["model", "px", "billion", "reward", "search, PFLOP", "minutes"]
    for cut_name in ("first block", "a sixth", "half"):
        head += [f"{cut_name}: cut after", "TFLOP a picture seen", "finetune, hours"]
    note = f"Prefix + tail with its backward pass; hours of an H100 at 40 % of 989 TFLOP/s for {SEEN} pictures seen ({EPOCHS} epochs)."
    table("stitch_cost", head, rows, note)


def main() -> None:
    options = arguments({"pixels": "512,1024", "models": ",".join(MODELS)})
    found = {f"{m} {p}": short(cost(m, int(p))) for m in options["models"].split(",") for p in options["pixels"].split(",")}
    told(found)
    save(
        "stitch_cost",
        {"counted": "on the meta device; hours at 40 % of 989 TFLOP/s", "seen": SEEN, "search_pictures": PICTURES, "by_model": found},
    )


if __name__ == "__main__":
    main()
