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
from rlstitch.shapes.prompts import draw_prompt, full_captions
from rlstitch.shapes.scenes import sample_scenes
from rlstitch.types import Backbone, Conditioning

DOUBLE, SINGLE, HEADS, HEAD_DIM, AXES = 2, 4, 3, 40, (8, 16, 16)
TEXT_WIDTH, POOLED_WIDTH = 96, 32
HINT = 3  # the block behind which the student's image stream is taught by the teacher's
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


@dataclass
class Words:
    """What the teacher makes of P prompts, on the CPU in half precision: its conditioning, and `states` [P, L, 128] and `pooled` [P, 128] of it, brought to variance 1."""

    ids: Tensor
    text: Conditioning
    states: Tensor
    pooled: Tensor


def words_of(teacher: Backbone, tokenizer, ids: Tensor) -> Words:
    with torch.no_grad():
        text = Conditioning.cat([
            teacher.encode_prompts([tokenizer.decode(row, skip_special_tokens=True) for row in ids[part]]).map(lambda t: t.half().cpu())
            for part in batches(len(ids), 512)
        ])  # fmt: skip

    def even(x: Tensor, over: tuple[int, ...]) -> Tensor:
        return ((x.float() - x.float().mean(over)) / x.float().std(over).clamp_min(1e-3)).half()

    return Words(ids, text, even(text.tokens, (0, 1)), even(text.pooled, (0,)))


def said(model: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The student's token states [B, L, 96] and pooled vector [B, 32]."""
    return model["text_encoder_2"](ids)[0], model["text_encoder"](ids).pooler_output


def text_error(model: nn.ModuleDict, found: tuple[Tensor, Tensor], words: Words, index: Tensor) -> Tensor:
    """How badly two linear probes read the teacher's states and pooled vector from the student's."""
    wanted = (words.states, words.pooled)
    probes = (model["states_probe"], model["pooled_probe"])
    return sum((probe(x.float()) - y[index].to(device()).float()).square().mean() for probe, x, y in zip(probes, found, wanted))


def learn_words(
    model: nn.ModuleDict, teacher: Backbone, tokenizer, work: Path, *, seed: int, steps: int, minutes: float, batch: int = 256
) -> None:
    """Teach the student's text encoders what the teacher's say, on prompts alone: some minutes here spare the denoiser an hour of learning words from pictures."""
    rank, world = ranks()
    rng = random.Random(seed + rank)
    texts = [draw_prompt(rng).text for _ in range(20_000)]
    texts += [p.text for p in full_captions(sample_scenes(10_000, torch.Generator().manual_seed(seed + rank)), rng)]
    ids = tokenizer(["", *sorted(set(texts))], padding="max_length", truncation=True, return_tensors="pt").input_ids
    words = words_of(teacher, tokenizer, ids)
    names = ("text_encoder", "text_encoder_2", "states_probe", "pooled_probe")

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(ids), (batch // world,), generator=generator)
        with autocast():
            found = said(model, ids[index].to(device()))
        error = text_error(model, found, words, index)
        return error, {"text": error.detach()}

    part = nn.ModuleDict({name: model[name] for name in names})
    fit("shapes-flux-words", part, loss_of, steps=steps, lr=2e-3, seed=seed, work=work, minutes=minutes, weight_decay=0.01, log_every=100)


def velocity(model: nn.ModuleDict, z: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
    """As FluxPipeline has it: tokens are patches of 2 x 2, text stands at the origin. text: the token states and the pooled vector."""
    h, width = z.shape[-2] // 2, z.shape[-1] // 2
    places = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(width)).to(z)
    with autocast():
        out = model["transformer"](
            hidden_states=F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2), encoder_hidden_states=text[0], pooled_projections=text[1],
            timestep=sigma, guidance=w, img_ids=places, txt_ids=places.new_zeros(text[0].shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
    return F.pixel_shuffle(out.float().transpose(1, 2).unflatten(2, (h, width)), 2)


def objective(
    model: nn.ModuleDict, teacher: Backbone, store: Store, words: Words, which: Tensor, *, batch: int
) -> Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
    """The distillation loss of a step, for `fit`: mean squared error to the teacher's guided velocity; by a linear probe, of the image stream behind block 3 to the teacher's
    there, which tells the student early what stands where (arXiv:2410.06940 does so with another teacher); and of the texts. which [N]: the row of `words` of each latent."""

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(store.z), (batch,), generator=generator)
        w = guidances(batch, generator)
        z, v, v_null = (x[index].float().to(device()) for x in (store.z, store.v, store.v_null))
        row, sigma, w = which[index], store.sigma[index].to(device()), w.to(device())
        with torch.no_grad(), autocast():
            there = teacher.prefix(z, sigma, HINT, words.text[row].map(lambda t: t.float().to(device()))).grid.float()
            there = ((there - there.mean((0, 2, 3), True)) / there.std((0, 2, 3), keepdim=True)).flatten(2).transpose(1, 2)
        seen: list[Tensor] = []
        hook = (
            model["transformer"].single_transformer_blocks[HINT - DOUBLE - 1].register_forward_hook(lambda _, __, out: seen.append(out[1]))
        )
        with autocast():
            text = said(model, words.ids[row].to(device()))
        found = velocity(model, z, sigma, text, w)
        hook.remove()
        error = (found - torch.lerp(v_null, v, w.view(-1, 1, 1, 1))).square().mean()
        hint = (model["hint_probe"](seen[0].float()) - there).square().mean()
        words_error = text_error(model, text, words, row)
        return error + 0.2 * hint + 0.1 * words_error, {"loss": error.detach(), "hint": hint.detach(), "text": words_error.detach()}

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
    words_steps: int = 6_000,
    words_minutes: float = 8,
) -> None:
    """Distil `out`/shapes; writes `out`/shapes-flux, whose autoencoder is the teacher's own folder. init: a pipeline whose denoiser it goes on from; words are learnt anew."""
    torch.manual_seed(seed)
    rank, world = ranks()
    folder = out / "shapes-flux"
    told = {"_target_": "rlstitch.backbones.Diffusers", "path": str(out / "shapes"), "max_sequence_length": 0}
    teacher = build(told, device=device().type)
    tokenizer = shapes_tokenizer.build(folder / "tokenizer")
    parts = {"transformer": build_transformer(), **text_encoders(tokenizer)}
    if init:
        begun = require(init, "the pipeline to go on from") / "transformer"
        parts["transformer"].load_state_dict(FluxTransformer2DModel.from_pretrained(begun, dtype=torch.float32).state_dict())
    states, pooled = teacher.null.tokens.shape[-1], teacher.null.pooled.shape[-1]
    probes = {
        "states_probe": nn.Linear(TEXT_WIDTH, states),
        "pooled_probe": nn.Linear(POOLED_WIDTH, pooled),
        "hint_probe": nn.Linear(HEADS * HEAD_DIM, teacher.transformer.inner_dim),
    }
    model = nn.ModuleDict(parts | probes).to(device())
    learn_words(model, teacher, tokenizer, work, seed=seed, steps=words_steps, minutes=words_minutes)
    store = stored(teacher, tokenizer, work, seed=seed, count=prompts)
    known, which = store.ids.unique(dim=0, return_inverse=True)
    loss_of = objective(model, teacher, store, words_of(teacher, tokenizer, known), which, batch=batch // world)
    model.train()
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
