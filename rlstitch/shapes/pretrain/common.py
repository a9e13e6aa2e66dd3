"""What every part of the pretraining shares: seeds, the resumable training loop, cards."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rlstitch.config import hardware
from rlstitch.distributed import autocast as autocast_in
from rlstitch.distributed import average_gradients, load_optimiser_tensors, optimiser_tensors, world_size
from rlstitch.files import read_json, read_tensors, write_json, write_tensors


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """bf16 where the hardware multiplies it; on other CPUs it is emulated, ten times slower than fp32."""
    return autocast_in(device().type, "auto")


@contextmanager
def plain_attention() -> Iterator[None]:
    """On a CPU, attention by two matrix products: for short sequences its backward is several times faster than the fused kernel's."""
    fused = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        logits = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
        if is_causal:
            logits = logits.masked_fill(
                torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1), float("-inf")
            )
        elif attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else logits + attn_mask
        return logits.softmax(-1).to(value.dtype) @ value

    if torch.cuda.is_available():
        yield
        return
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def warmup_cosine(step: int, total: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def ranks() -> tuple[int, int]:
    """(rank, world) under torchrun, with the process group formed; (0, 1) without."""
    world = world_size()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), world) if world > 1 else (0, 1)


class Ema:
    """Exponential moving average of the trainable parameters; the decay ramps up as min(decay, (1 + s) / (10 + s))."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.step = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        names = [name for name, _ in model.named_parameters()]
        torch._foreach_lerp_([self.shadow[n] for n in names], [p.detach() for _, p in model.named_parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    lr: float,
    seed: int,
    work: Path,
    weight_decay: float = 0.0,
    ema_decay: float | None = 0.999,
    minutes: float | None = None,
    log_every: int = 50,
) -> dict[str, float]:
    """Train `model` (all its parameters with requires_grad) and leave its EMA in it. Resumes from `work/<name>.safetensors`.

    The learning rate follows a cosine over `steps`, or over `minutes` of training time where that is given and ends first.
    Under torchrun every rank draws its own batches and gradients are averaged: on small models two ranks of one thread beat one of two.
    """
    rank, world = ranks()
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    ema = Ema(model, ema_decay) if ema_decay else None
    step, spent, last = 0, 0.0, {}
    state_file = work / f"{name}.safetensors"
    if state_file.exists():
        state = read_tensors(state_file)
        step, spent = int(state.pop("step")), float(state.pop("spent"))
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimiser": {}, "ema": {}}
        for key, value in state.items():
            part, _, own = key.partition(".")
            parts[part][own] = value
        model.load_state_dict(parts["model"])
        load_optimiser_tensors(optimiser, parts["optimiser"])
        if ema:
            ema.shadow, ema.step = parts["ema"], step
        print(f"{name}: resumed at step {step}", flush=True)
    if world > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    started = time.monotonic()

    def elapsed() -> float:
        return spent + time.monotonic() - started

    def save() -> None:
        if rank:
            return
        parts = {"model": model.state_dict(), "optimiser": optimiser_tensors(optimiser), "ema": ema.shadow if ema else {}}
        state = {f"{part}.{key}": value.clone() for part, own in parts.items() for key, value in own.items()}
        write_tensors(state_file, state | {"step": torch.tensor(step), "spent": torch.tensor(elapsed(), dtype=torch.float64)})

    model.train()
    while step < steps and _agreed(minutes is None or elapsed() < 60 * minutes, world):
        progress = step if minutes is None else max(step, int(steps * elapsed() / (60 * minutes)))
        for group in optimiser.param_groups:
            group["lr"] = lr * warmup_cosine(progress if step >= 100 else step, steps)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)
        with plain_attention():
            loss, metrics = loss_of(step, generator)
            loss.backward()
        if world > 1:
            average_gradients(params, world)
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"{name}: gradient norm is {norm.item()} at step {step}")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if ema:
            ema.update(model)
        if rank == 0 and (step % log_every == 0 or step == steps):
            last = {key: float(value) for key, value in metrics.items()}
            shown = "  ".join(f"{key} {value:.4f}" for key, value in last.items())
            print(f"{name} {step}/{steps}  {elapsed():.0f} s  {shown}", flush=True)
        if step % (10 * log_every) == 0:
            save()
    save()
    if ema:
        ema.copy_to(model)
    model.eval()
    return {"steps": step, "minutes": round(elapsed() / 60, 1), **{f"last_{k}": v for k, v in last.items()}}


def _agreed(go_on: bool, world: int) -> bool:
    """Rank 0's word, so that all ranks stop at the same step."""
    if world == 1:
        return go_on
    flag = torch.tensor(float(go_on))
    dist.broadcast(flag, 0)
    return bool(flag)


def batches(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def run_in_float32(folder: Path) -> None:
    """Text encoders of a pipeline are stored in half precision and run in float32 like the rest: transformers loads in what their configurations say."""
    for config in sorted(folder.glob("text_encoder*/config.json")):
        write_json(config, read_json(config, "the text encoder's config") | {"dtype": "float32"})


def write_card(folder: Path, facts: dict) -> None:
    """`card.json` beside the weights: what made them."""
    told = [a for a in sys.argv[1:] if not a.startswith(("out=", "threads=", "parts="))]
    command = " ".join(["python launch/pretrain_shapes.py", f"parts={facts['part']}", *told])
    facts = {"command": command, "hardware": hardware(), **facts}
    write_json(folder / "card.json", facts)
