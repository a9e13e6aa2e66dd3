"""Parts of real size with random weights, through the same files and classes as real ones: SD3.5-Medium's architecture, its autoencoder, a ViT-H/14@378 reward; `tiny` for tests.

The reward's text tower is cut short: it never runs while anything is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPConfig, CLIPModel

from rlstitch.backbones import Diffusers, cut, sd3
from rlstitch.files import write_json
from rlstitch.rewards.clip import ClipReward
from rlstitch.shapes import tokenizer as shapes_tokenizer
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Conditioning

SIZES = {
    "sd35_medium": {
        "transformer": dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ),
        "vae": dict(channels=(128, 256, 512, 512), layers=2, latent=16, groups=32),
        "vision": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=378, patch_size=14),
        "tokens": 333,
    },
    "tiny": {
        "transformer": dict(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=32,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        "vae": dict(channels=(8, 8), layers=1, latent=4, groups=4),
        "vision": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4),
        "tokens": 10,
    },
}  # fmt: skip


def build_vae(spec: dict) -> AutoencoderKL:
    n = len(spec["channels"])
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=spec["channels"], layers_per_block=spec["layers"], latent_channels=spec["latent"], norm_num_groups=spec["groups"],
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip


def _fused(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """A CPU's fused attention, which torch's counter does not know; it is given shapes."""
    return sdpa_flop_count(q, k, v)


def _fused_backward(slope: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(slope, q, k, v)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
}


def count(run: Callable[[], object]) -> float:
    """TFLOP of one call, of all that it runs, what checkpointing makes again included."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    return counter.get_total_flops() / 1e12


def floors(size: str, pixels: int, blocks: int) -> dict[str, float]:
    """TFLOP of the parts' forward passes, counted on the meta device: no memory, no time."""
    spec = SIZES[size]
    with torch.device("meta"):
        model = SD3Transformer2DModel(**spec["transformer"]).eval()
        vae = build_vae(spec["vae"]).eval()
        vision = CLIPModel(CLIPConfig(vision_config=spec["vision"], text_config=_text_config(spec), projection_dim=64)).vision_model.eval()
        side = pixels // 2 ** (len(spec["vae"]["channels"]) - 1)
        z = torch.empty(1, spec["vae"]["latent"], side, side)
        t = spec["transformer"]
        text = Conditioning(
            tokens=torch.empty(1, spec["tokens"], t["joint_attention_dim"]), pooled=torch.empty(1, t["pooled_projection_dim"])
        )
        sigma, image = torch.empty(1), torch.empty(1, 3, spec["vision"]["image_size"], spec["vision"]["image_size"])
        given = sd3.inputs(model, z, sigma, text, None)
        with torch.no_grad():
            return {
                "denoiser": count(lambda: model(**given)),
                "prefix": count(lambda: cut.run(model, given, sd3, stop=blocks)),
                "decode": count(lambda: vae.decode(z)),
                "reward": count(lambda: vision(image, interpolate_pos_encoding=False)),
            }


def _text_config(spec: dict) -> dict:
    return dict(
        vocab_size=600, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=24
    )


@contextmanager
def _made_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Weights are made where and as they will be used: 2.5 billion of them take 10 GB in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def write(path: Path, size: str, device: str, dtype: torch.dtype) -> Path:
    """A pipeline and a reward of random weights as files."""
    spec = SIZES[size]
    torch.manual_seed(0)
    tokenizer = shapes_tokenizer.build(path / "clip")
    text = _text_config(spec) | dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, vocab_size=len(tokenizer))
    for name, make in (
        ("transformer", lambda: SD3Transformer2DModel(**spec["transformer"])),
        ("vae", lambda: build_vae(spec["vae"])),
        ("clip", lambda: CLIPModel(CLIPConfig(vision_config=spec["vision"], text_config=text, projection_dim=64))),
    ):  # fmt: skip
        with _made_in(dtype, device):
            part = make()
        part.to(dtype).save_pretrained(path / name)
        del part
    (path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.3] * 3}))
    write_json(path / "model_index.json", {"_class_name": "StableDiffusion3Pipeline"})
    return path


def load(
    path: Path, size: str, pixels: int, blocks: int, device: str, dtype: torch.dtype
) -> tuple[Diffusers, ClipReward, StitchedValueModel]:
    """Backbone, reward and a value cut after `blocks` blocks that enters the reward at its first; the empty prompt is random."""
    spec, name = SIZES[size], str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    backbone = Diffusers(str(path), dtype=name, image_size=pixels, device=device)
    reward = ClipReward(str(path / "clip"), dtype=name, device=device)
    t = spec["transformer"]
    backbone._null = Conditioning(
        tokens=torch.randn(1, spec["tokens"], t["joint_attention_dim"]), pooled=torch.randn(1, t["pooled_projection_dim"])
    ).to(device, dtype)
    value = StitchedValueModel.from_search(
        backbone, reward, blocks, 1, 0.02 * torch.randn(reward.width, backbone.width, device=device), torch.zeros(reward.width, device=device),
        cls_state=torch.zeros(reward.width), norm=1.0, normalise=True, sigma_range=(0.0, 1.0), card={},
    ).to(device).freeze()  # fmt: skip
    return backbone, reward, value
