"""`shapes-flux`: a genuine `FluxPipeline` on the miniature's autoencoder and prompts, distilled from `shapes` with its guidance as an input, as FLUX.1-dev is.

The student's velocity at an embedded guidance w is trained to be the teacher's guided velocity there, v_null + w (v - v_null), so that it runs no unconditional branch
(On Distillation of Guided Diffusion Models, arXiv:2210.03142, eq. 3). The teacher's two velocities are taken once for a store of noisy latents, half of them on its own
guided paths and half noised scenes, and serve under a new w each time that they are drawn.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from rlstitch.config import build
from rlstitch.files import read_tensors, require, write_tensors
from rlstitch.schedule import shift_sigma
from rlstitch.shapes import tokenizer as shapes_tokenizer
from rlstitch.shapes.pretrain.common import autocast, batches, device, fit, ranks, run_in_float32, write_card
from rlstitch.shapes.pretrain.generator import EMPTY_PROMPT_RATE, encode_latents
from rlstitch.shapes.pretrain.pool import make_pool
from rlstitch.types import Backbone

DOUBLE, SINGLE, HEADS, HEAD_DIM, AXES = 2, 4, 3, 40, (8, 16, 16)
TEXT_WIDTH, POOLED_WIDTH = 96, 32
GUIDANCE = (1.0, 5.0)  # what the student is told is drawn from between these
# 64 tokens are shifted by 3, as the teacher's pictures are; 16 by 1.5
SCHEDULER = dict(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.4054651, max_shift=1.0986123, base_image_seq_len=16, max_image_seq_len=64
)  # fmt: skip


def build_transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=32,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=AXES,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")) or name == "proj_out":
                nn.init.zeros_(module.weight)
    return model


def text_encoders(tokenizer) -> dict[str, nn.Module]:
    """CLIP for the pooled vector, T5 for the tokens, both from scratch."""
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=POOLED_WIDTH, intermediate_size=4 * POOLED_WIDTH, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=tokenizer.model_max_length, **ids,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=32, d_ff=2 * TEXT_WIDTH, num_layers=2, num_heads=3, dropout_rate=0.0, **ids
    )  # fmt: skip
    return {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}


@dataclass
class Store:
    """The teacher's word: noisy latents and its two velocities there [N, 8, 16, 16], half precision; sigma [N]; the prompt's token ids [N, L]."""

    z: Tensor
    v: Tensor
    v_null: Tensor
    sigma: Tensor
    ids: Tensor


def guidances(n: int, generator: torch.Generator) -> Tensor:
    low, high = GUIDANCE
    return low + (high - low) * torch.rand(n, generator=generator)


@torch.no_grad()
def ask(teacher: Backbone, z0: Tensor, prompts: list[str], ids: Tensor, *, seed: int, chunk: int = 128, steps: int = 10) -> Store:
    """`steps` latents a prompt: of every second chunk those of a guided path from noise, of the others the scenes z0 [N, ...] at random noise levels."""
    generator, kept = torch.Generator().manual_seed(seed), []

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.device)

    for number, part in enumerate(batches(len(prompts), chunk)):
        clean, text = z0[part].float().to(device()), teacher.encode_prompts(prompts[part])
        b = len(clean)
        w = guidances(b, generator).to(clean.device).view(-1, 1, 1, 1)
        places = (torch.arange(1, steps) + torch.rand(steps - 1, generator=generator) - 0.5) / steps  # every path steps at its own levels
        levels = shift_sigma(torch.cat([torch.ones(1), 1 - places, torch.zeros(1)]), 3.0)
        z = normal(clean)
        for k in range(steps):
            sigma = levels[k].expand(b)
            if number % 2:
                sigma = shift_sigma(torch.rand(b, generator=generator), 2.0)
                z = torch.lerp(clean, normal(clean), sigma.to(clean.device).view(-1, 1, 1, 1))
            with autocast():
                v, v_null = (teacher.velocity(z, sigma.to(clean.device), c) for c in (text, teacher.null.expand(b)))
            kept.append([x.half().cpu() for x in (z, v, v_null)] + [sigma, ids[part]])
            z = z + (levels[k + 1] - levels[k]) * teacher.guided(v, v_null, w)
        if number % 10 == 0:
            print(f"shapes-flux: the teacher was asked of {part.stop} of {len(prompts)} prompts", flush=True)
    return Store(*(torch.cat(parts) for parts in zip(*kept)))


def stored(teacher: Backbone, tokenizer, work: Path, *, seed: int, count: int) -> Store:
    """This rank's share of what the teacher says of `count` prompts; kept in `work`."""
    rank, world = ranks()
    file = work / f"shapes-flux-teacher-{rank}-of-{world}.safetensors"
    if not file.exists():
        pool, rng = make_pool(count // world, seed + 1 + rank), random.Random(seed + rank)
        texts = [c.text if rng.random() < 0.25 else p.text for p, c in zip(pool.prompts, pool.captions)]
        texts = ["" if rng.random() < EMPTY_PROMPT_RATE / 2 else t for t in texts]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        write_tensors(file, vars(ask(teacher, encode_latents(teacher.vae, pool.images), texts, ids, seed=seed + rank)))
    return Store(**read_tensors(file))


@torch.no_grad()
def words_of(teacher: Backbone, tokenizer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's states of every word [P, L, 128] of the P prompts that there are, brought to variance 1, and which of them each row of ids [N, L] is."""
    known, index = ids.unique(dim=0, return_inverse=True)
    states = teacher.encode_prompts([tokenizer.decode(row, skip_special_tokens=True) for row in known]).tokens.float()
    return ((states - states.mean((0, 1))) / states.std((0, 1)).clamp_min(1e-3)).half(), index


def velocity(model: nn.ModuleDict, z: Tensor, sigma: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """As FluxPipeline has it: tokens are patches of 2 x 2, text stands at the origin. And the tokens' states."""
    h, width = z.shape[-2] // 2, z.shape[-1] // 2
    places = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(width)).to(z)
    with autocast():
        words, pooled = model["text_encoder_2"](ids)[0], model["text_encoder"](ids).pooler_output
        out = model["transformer"](
            hidden_states=F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2), encoder_hidden_states=words, pooled_projections=pooled,
            timestep=sigma, guidance=w, img_ids=places, txt_ids=places.new_zeros(words.shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
    return F.pixel_shuffle(out.float().transpose(1, 2).unflatten(2, (h, width)), 2), words


def objective(
    model: nn.ModuleDict, store: Store, words: tuple[Tensor, Tensor], *, batch: int
) -> Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
    """The distillation loss of a step, for `fit`: mean squared error to the teacher's guided velocity, and of the tokens' states, by a linear probe, to the teacher's, which
    tells T5 early what the words mean."""

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(store.z), (batch,), generator=generator)
        w = guidances(batch, generator)
        z, v, v_null = (x[index].float().to(device()) for x in (store.z, store.v, store.v_null))
        ids, sigma, w = store.ids[index].to(device()), store.sigma[index].to(device()), w.to(device())
        found, said = velocity(model, z, sigma, ids, w)
        error = (found - torch.lerp(v_null, v, w.view(-1, 1, 1, 1))).square().mean()
        text = (model["probe"](said.float()) - words[0][words[1][index]].to(device()).float()).square().mean()
        return error + 0.1 * text, {"loss": error.detach(), "text": text.detach()}

    return loss_of


def train(
    out: Path,
    work: Path,
    *,
    seed: int,
    steps: int,
    minutes: float | None,
    init: str = "",
    lr: float = 1.5e-3,
    batch: int = 64,
    prompts: int = 15_000,
) -> None:
    """Distil `out`/shapes; writes `out`/shapes-flux, whose autoencoder is the teacher's own folder. init: a pipeline whose weights it goes on from."""
    torch.manual_seed(seed)
    rank, world = ranks()
    folder = out / "shapes-flux"
    told = {"_target_": "rlstitch.backbones.Diffusers", "path": str(out / "shapes"), "max_sequence_length": 0}
    teacher = build(told, device=device().type)
    tokenizer = shapes_tokenizer.build(folder / "tokenizer")
    parts = {"transformer": build_transformer(), **text_encoders(tokenizer)}
    for name, part in parts.items() if init else ():
        part.load_state_dict(
            type(part).from_pretrained(require(init, "the pipeline to go on from") / name, dtype=torch.float32).state_dict()
        )
    model = nn.ModuleDict(parts | {"probe": nn.Linear(TEXT_WIDTH, teacher.null.tokens.shape[-1])}).to(device())
    store = stored(teacher, tokenizer, work, seed=seed, count=prompts)
    loss_of = objective(model, store, words_of(teacher, tokenizer, store.ids), batch=batch // world)
    facts = fit("shapes-flux", model, loss_of, steps=steps, lr=lr, seed=seed, work=work, minutes=minutes, weight_decay=0.01, log_every=100)
    if rank:
        return
    FluxPipeline(
        **{name: model[name].half() for name in parts},
        vae=teacher.vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    ).save_pretrained(folder)
    shutil.rmtree(folder / "vae")
    run_in_float32(folder)
    (folder / "vae").symlink_to(Path("..") / "shapes" / "vae")
    write_card(
        folder, facts | {"part": "shapes-flux", "seed": seed, "parameters": sum(p.numel() for p in model["transformer"].parameters())}
    )
    print(facts, flush=True)
