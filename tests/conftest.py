"""Tiny checkpoints that the tests write themselves; no network, no GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/torch_extensions"))  # what DeepSpeed compiles takes minutes

import gc  # noqa: E402
import json  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

FIRST = (  # what matters most
    "zero", "train", "jobs", "schedule", "sampling", "losses", "advantages", "policy", "draft", "nft", "flow_grpo", "marble",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The job and the maths come first, in this order; the rest as it stands."""
    place = {f"test_{name}": k for k, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish(session):
    """What is imported by now is not looked through at every gc.collect of a job, which would cost half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is kept from run to run is not read by tests, nor written."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def kl(**changes):
    """A tiny random autoencoder of SD3's and FLUX.1's kind."""
    from diffusers import AutoencoderKL

    settings = dict(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.7,
    )  # fmt: skip
    return AutoencoderKL(**(settings | changes))


def write_sd3(folder, *, qk_norm="rms_norm", dual=(), patch=2, layers=3, sample=8, t5=False, seed=0):
    """A random SD3 pipeline directory of a few thousand weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from rlstitch.shapes import tokenizer as shapes_tokenizer

    torch.manual_seed(seed)
    tokenizer = shapes_tokenizer.build(folder / "tokenizer")

    def text(width):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=24,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                projection_dim=width,
            )
        )

    transformer = SD3Transformer2DModel(
        sample_size=sample,
        patch_size=patch,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=sample * 2,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
    )
    vae = kl(scaling_factor=1.3)
    extra = {"text_encoder_3": None, "tokenizer_3": None}
    if t5:
        extra = {
            "text_encoder_3": T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
            "tokenizer_3": tokenizer,
        }
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=text(16),
        text_encoder_2=text(16),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **extra,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_clip(folder, *, size=16, patch=4, width=16, layers=3, seed=0):
    """A random CLIPModel directory with tokenizer and preprocessing."""
    from transformers import CLIPConfig, CLIPModel

    from rlstitch.shapes import tokenizer as shapes_tokenizer

    torch.manual_seed(seed)
    tokenizer = shapes_tokenizer.build(folder)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2, image_size=size, patch_size=patch
    )
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.3] * 3}))
    return folder


@pytest.fixture(scope="session")
def sd3_dir(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def backbone(sd3_dir):
    from rlstitch.backbones.sd3 import SD3Backbone

    return SD3Backbone(str(sd3_dir), max_sequence_length=0)


@pytest.fixture
def reward(clip_dir):
    from rlstitch.rewards.clip import ClipReward

    return ClipReward(str(clip_dir))
