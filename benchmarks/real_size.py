"""At real size, random weights: SD3.5-Medium's architecture, its autoencoder and a ViT-H/14@378 reward; pixel path against stitched path, side by side in one run.

    python -m benchmarks.real_size [size=sd35_medium|tiny] [pixels=512,1024] [blocks=4] [repeats=5] [flops=only] [parts=QUERY,DPS,...]

Value query (forward, gradient), a DPS step and an FK step under guidance, a DRaFT-1 update, an NFT update of two pictures: time, peak memory, ratio, and the
TFLOP counted beside each. parts: cases by what their names hold, e.g. parts=query,DPS. Every case is saved as it comes, its time before its memory.
flops=only counts on the meta device and needs no GPU. The reward's text tower is cut short: it never runs while anything is timed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from benchmarks.common import arguments, interleaved, peak_megabytes, save
from rlstitch import sampling, schedule, steering
from rlstitch.algorithms.nft import NFT
from rlstitch.backbones import Diffusers, cut, sd3
from rlstitch.files import write_json
from rlstitch.oracles import Stitched, Terminal, Tweedie
from rlstitch.policy import Policy
from rlstitch.rewards.clip import ClipReward
from rlstitch.shapes import tokenizer as shapes_tokenizer
from rlstitch.steering.model import Steered
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Batch, Conditioning, Latent

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


def count(run: Callable[[], object]) -> float:
    """TFLOP of one call."""
    with FlopCounterMode(display=False) as counter:
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


def build(size: str, pixels: int, blocks: int, device: str, dtype: torch.dtype) -> tuple[Diffusers, ClipReward, StitchedValueModel]:
    """Random parts through the same files and classes as real ones."""
    spec, name = SIZES[size], str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        SD3Transformer2DModel(**spec["transformer"]).to(dtype).save_pretrained(path / "transformer")
        build_vae(spec["vae"]).to(dtype).save_pretrained(path / "vae")
        tokenizer = shapes_tokenizer.build(path / "clip")
        text = _text_config(spec) | dict(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, vocab_size=len(tokenizer)
        )
        CLIPModel(CLIPConfig(vision_config=spec["vision"], text_config=text, projection_dim=64)).to(dtype).save_pretrained(path / "clip")
        (path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.3] * 3}))
        write_json(path / "model_index.json", {"_class_name": "StableDiffusion3Pipeline"})
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


def _measured(
    cases: dict[tuple[str, str], Callable[[], object]], repeats: int, parts: str, rows: dict[str, dict], keep: Callable[[], None]
) -> None:
    """Median seconds, then peak megabytes, of each case's two ways side by side, put into `rows` and kept one by one."""
    for what in dict.fromkeys(kind for _, kind in cases):
        if not any(part.lower() in what.lower() for part in parts.split(",")):
            continue
        pair = {way: cases[way, what] for way in ("tweedie", "stitched")}
        seconds = interleaved(pair, repeats)
        a, b = seconds["tweedie"], seconds["stitched"]
        rows[what] = {"pixel_seconds": round(a, 5), "stitched_seconds": round(b, 5), "times_faster": round(a / b, 3)}
        keep()
        a, b = (peak_megabytes(run) for run in pair.values())
        rows[what] |= {"pixel_megabytes": round(a, 1), "stitched_megabytes": round(b, 1), "memory_ratio": round(b / a, 3)}
        keep()


def measure(
    size: str,
    pixels: int,
    blocks: int,
    repeats: int,
    parts: str = "",
    rows: dict[str, dict] | None = None,
    keep: Callable[[], None] = lambda: None,
) -> dict:
    """{case: figures}, those of `rows` filled as they come, `keep` called after each."""
    rows = {} if rows is None else rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backbone, reward, value = build(size, pixels, blocks, device, dtype)
    text = backbone.null.map(torch.randn_like)
    batch = Batch(["a red circle"], torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), [{}], text)
    z, sigma = torch.randn(1, *backbone.latent_shape, device=device), torch.full((1,), 0.5, device=device)
    oracles = {"tweedie": Tweedie(backbone, {"r": reward}, {"r": 1.0}), "stitched": Stitched({"r": value}, {"r": 1.0})}
    step, ten = torch.tensor([0.5, 0.45]), schedule.sigmas(10, 3.0, "plain")
    cases: dict[tuple[str, str], Callable[[], object]] = {}
    for name, oracle in oracles.items():

        def forward(oracle=oracle):
            with torch.no_grad():
                return oracle(Latent(z, sigma), batch)

        def gradient(oracle=oracle):
            leaf = z.clone().requires_grad_(True)
            return torch.autograd.grad(oracle(Latent(leaf, sigma), batch).sum(), leaf)

        def dps(oracle=oracle):
            steered = Steered(backbone, oracle, batch, guidance=4.5)
            return steering.dps(steered.velocity, steered.value, z, step)

        def fk(oracle=oracle, name=name):
            """Value of four particles and their step; the stitched ones also draw two proposals each."""
            steered, m = Steered(backbone, oracle, batch, guidance=4.5), 2 if name == "stitched" else 1
            four = z.repeat(4, 1, 1, 1) + 0.01 * torch.randn(4, *z.shape[1:], device=device)
            return steering.fk(
                steered.velocity, steered.value, four, torch.tensor([0.5, 0.45, 0.4]), num_particles=4, num_proposals=m, proposal_steps=(0, 1), resample_steps=(0, 1), lam=1.0,
            )  # fmt: skip

        cases |= {
            (name, "query forward"): forward,
            (name, "query gradient"): gradient,
            (name, "DPS step"): dps,
            (name, "FK, two steps"): fk,
        }
        assert name != "stitched" or Steered(backbone, oracle, batch, guidance=4.5)._depths, "the stitched case does not share its prefix"
    _measured(cases, repeats, parts, rows, keep)  # before there is a LoRA: it would end the sharing, and slow the pixel queries
    cases = {}
    policy = Policy(backbone.transformer, rank=8, alpha=16.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9, old=True)
    pair = replace(batch.interleave(2), seeds=torch.arange(2))  # NFT compares pictures of one prompt
    backbone.checkpoint_activations()
    ends = {"tweedie": (Terminal(backbone, {"r": reward}, {"r": 1.0}), 10), "stitched": (oracles["stitched"], 5)}
    for name, (oracle, stop) in ends.items():

        def draft(oracle=oracle, stop=stop):
            done = sampling.sample(backbone.bind(text), torch.randn_like(z), ten, stop=stop, num_grad_steps=1)
            (-oracle(done, batch).mean()).backward()
            for p in policy.parameters():
                p.grad = None

        def nft(oracle=oracle, stop=stop):
            """Rollout of the old policy, scores, one training time."""
            method = NFT(backbone, policy, oracle, ten, times=1)
            done = method.rollout(pair, stop)
            weight, _ = method.compare([done], method.score(done), pair.group.to(z.device))
            for loss, _ in method.losses(done, weight, 1):
                loss.backward()
            for p in policy.parameters():
                p.grad = None

        cases |= {(name, "DRaFT-1 update"): draft, (name, "NFT update"): nft}
    _measured(cases, repeats, parts, rows, keep)
    return rows


WANTED = {"query forward": "6x faster", "DPS step": "3.2x faster at 0.45 of the memory", "FK, two steps": "2x faster"}


def main() -> None:
    options = arguments({"size": "sd35_medium", "pixels": "512,1024", "blocks": "4", "repeats": "5", "flops": "", "parts": ""})
    size, blocks, result = options["size"], int(options["blocks"]), {}
    only = options["flops"] == "only"

    def keep() -> None:
        told = {"size": size, "blocks": blocks, "by_pixels": result, "wanted_on_an_H200_at_1024": WANTED}
        save(f"real_size_{size}{'_flops' if only else ''}", told)

    for pixels in map(int, options["pixels"].split(",")):
        result[pixels] = {"tflop": {k: round(v, 6) for k, v in floors(size, pixels, blocks).items()}}
        keep()
        if not only:
            rows = result[pixels]["measured"] = {}
            measure(size, pixels, blocks, int(options["repeats"]), options["parts"], rows, keep)


if __name__ == "__main__":
    main()
