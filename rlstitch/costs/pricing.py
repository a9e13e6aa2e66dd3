"""What one call of a part costs at its real size: FLOPs counted and saved tensors weighed on the meta device, where nothing is loaded and nothing is computed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rlstitch import config as cfg
from rlstitch import protocols
from rlstitch.costs.counting import Call
from rlstitch.policy import CURRENT, REFERENCE, Policy
from rlstitch.schema import RunConfig
from rlstitch.stitch.model import CARD, StitchedValueModel, read_card
from rlstitch.types import UserError

META = torch.device("meta")
CUT = 6  # a value that is not there yet is cut after this share of the blocks, where the paper's search lands on SD3.5-Medium (4 of 24)


@dataclass
class Price:
    """Of one sample: TFLOP forward and backward, bytes that the graph holds."""

    forward: float
    backward: float = 0.0
    held: float = 0.0


class Prices:
    """The parts of a recipe on the meta device, as they run on a `device`. `unknown`: what has no price, and why; `assumed`: what was taken for granted."""

    def __init__(self, config: RunConfig, device: str = "cuda"):
        self.config, self.unknown, self.assumed = config, {}, []
        self._made: dict[Call, Price | None] = {}
        with tempfile.TemporaryDirectory() as folder:
            self.backbone = self._built("model", config.model, "model", Path(folder) / "model")
            self.rewards = {
                name: self._built(f"reward {name}", node, "reward", Path(folder) / name) for name, node in config.rewards.items()
            }
            self.values: dict[str, Any] = {}
            for name in config.values:
                if self.backbone is not None and self.rewards.get(name) is not None:
                    self.values[name] = self._value(name)
        self.policy = None
        if self.backbone is not None:
            targets = self.backbone.targets(config.lora.targets)
            with META:
                self.policy = Policy(
                    self.backbone.transformer, rank=config.lora.rank, alpha=config.lora.alpha, targets=targets, seed=0, ema_decay=0.9
                )
            self.backbone.arch.prepare(self.backbone.transformer, device, None)
            self.backbone.checkpoint_activations(config.sampler.activation_checkpointing)

        modules = [m for part in (self.backbone, *self.rewards.values(), *self.values.values()) for m in _modules(part)]
        self.weights = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}

    def _built(self, what: str, node: dict[str, Any], kind: str, folder: Path) -> Any:
        cls, options = cfg.load_class(node["_target_"]), {k: v for k, v in node.items() if k != "_target_"}
        if not hasattr(cls, "weightless"):
            self.unknown[what] = f"{node['_target_']} does not say how it is built without weights"
            return None
        try:
            return cls(**protocols.asked(kind, cls, "weightless", options, folder), device="meta")
        except UserError as error:
            self.unknown[what] = str(error)
            return None

    def _value(self, name: str) -> StitchedValueModel:
        """As its card says, or, before it is stitched, as it may be."""
        backbone, reward, path = self.backbone, self.rewards[name], self.config.values[name]
        blocks, entered = max(1, round(backbone.num_blocks / CUT)), 1
        try:
            card = read_card(path)
            blocks, entered = card["blocks"], card["reward_block"]
        except UserError:
            self.assumed.append(
                f"value {name} is not there yet ({Path(path) / CARD}): cut after block {blocks} of {backbone.num_blocks}, the reward entered at its first"
            )
        with META:
            weight = torch.zeros(reward.width, backbone.width)
            told = {"cls_state": weight[:, 0], "norm": 1.0, "normalise": True, "sigma_range": (0.0, 1.0), "card": {}}
            return StitchedValueModel.from_search(backbone, reward, blocks, entered, weight, weight[:, 0], **told).to(META).freeze()

    def of(self, call: Call) -> Price | None:
        """None where the part has no price."""
        key = Call(call.part, "", REFERENCE if call.weights == REFERENCE else "", call.graph, call.into)
        if key not in self._made:
            self._made[key] = self._price(key)
        return self._made[key]

    def _price(self, call: Call) -> Price | None:
        kind, _, name = call.part.partition(" ")
        whole, parts = self.backbone, {"reward": self.rewards, "prefix": self.values, "tail": self.values}
        if whole is None or (kind in parts and parts[kind].get(name) is None):
            return None
        z, sigma = torch.empty(1, *whole.latent_shape, device=META), torch.empty(1, device=META)
        image = torch.empty(1, 3, *whole.size, device=META)
        if kind == "denoiser":
            z.requires_grad_(call.into)
            with self.policy.use(call.weights or CURRENT):
                entered = blocks_of(whole) if whole.checkpointing else []
                return measured(lambda: whole.velocity(z, sigma, whole.null), call, self.weights, entered)
        given = (image if kind in ("encoder", "reward") else z).requires_grad_(call.into)
        if kind in ("decoder", "encoder"):
            return measured(lambda: getattr(whole, kind[:-1])(given), call, self.weights)
        if kind == "reward":
            return measured(lambda: self.rewards[name].encode(given)[0], call, self.weights)
        value = self.values[name]
        if kind == "prefix":
            return measured(lambda: value.activations(given, sigma, whole.null).grid, call, self.weights)
        with torch.no_grad():
            tokens = value.stitch(value.activations(z, sigma, whole.null).grid.to(value.stitch.linear.weight.dtype))
        tokens.requires_grad_(call.into)
        return measured(lambda: value.tail(tokens)[0], call, self.weights)


def _modules(part: Any) -> list[nn.Module]:
    return (
        [part] if isinstance(part, nn.Module) else [m for m in vars(part).values() if isinstance(m, nn.Module)] if part is not None else []
    )


def blocks_of(backbone: Any) -> list[nn.Module]:
    return [block for name in backbone.arch.LISTS for block in getattr(backbone.transformer, name)]


def measured(run: Callable[[], Tensor], call: Call, weights: Collection[int], recomputed: Sequence[nn.Module] = ()) -> Price:
    """One call. weights: storages that are there anyhow; recomputed: blocks that keep no more than what enters them."""
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        for t in [*args, *kwargs.values()]:
            if isinstance(t, Tensor):
                pack(t)

    hooks = [block.register_forward_pre_hook(entered, with_kwargs=True) for block in recomputed]
    with torch.set_grad_enabled(call.graph), fused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with FlopCounterMode(display=False) as counter:
            out = run()
        forward = counter.get_total_flops() / 1e12
    for hook in hooks:
        hook.remove()
    held = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    if not (call.graph and out.requires_grad):
        return Price(forward, 0.0, held if call.graph else 0.0)
    with fused(), FlopCounterMode(display=False) as counter:
        out.sum().backward()
    return Price(forward, counter.get_total_flops() / 1e12, held)


class _Attention(torch.autograd.Function):
    """Fused attention as it is on a GPU: it keeps what it was given, its result and a number a row, and multiplies the scores again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.transpose(-1, -2)) @ v
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        scores = q @ k.transpose(-1, -2)
        inner = slope @ v.transpose(-1, -2)
        return inner @ k, inner.transpose(-1, -2) @ q, scores.transpose(-1, -2) @ slope


@contextmanager
def fused() -> Iterator[None]:
    """torch's attention is `_Attention`, grouped keys and values repeated, masks and causality left out: they cost nothing that counts."""
    true = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        if (times := query.shape[-3] // key.shape[-3]) > 1:
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        return _Attention.apply(query, key, value)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = true
