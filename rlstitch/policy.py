"""The policy: LoRA sets on one frozen base. `current` trains, `ema` follows it, `old` samples where a method wants that, the reference is the base with adapters off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlstitch.distributed import gathered
from rlstitch.files import write_weights
from rlstitch.types import UserError

CURRENT, EMA, OLD, REFERENCE = "default", "ema", "old", "reference"
SETS = {"base": REFERENCE, "raw": CURRENT, "ema": EMA}  # what an evaluation calls them


class Policy:
    """LoRA of `rank` on the joint attention projections of a transformer (A ~ N(0, 1/rank), B = 0: at start it is the base bit for bit).

    Only `use` switches adapters: PEFT's own set_adapter also flips requires_grad, which would silence training.
    """

    def __init__(
        self, transformer: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int, ema_decay: float, old: bool = False
    ):
        self.transformer, self.ema_decay = transformer, ema_decay
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer.add_adapter(config, CURRENT)
        self.followers = (EMA, OLD) if old else (EMA,)
        for name in self.followers:
            transformer.add_adapter(config, name)
        self.layers = [m for m in transformer.modules() if isinstance(m, LoraLayer)]
        self.active = REFERENCE
        for layer in self.layers:  # adapters in float32 whatever the base is in
            for part in (layer.lora_A, layer.lora_B):
                part.float()
        for name, p in transformer.named_parameters():
            p.requires_grad_(f".{CURRENT}." in name)
        self._switch(CURRENT)
        named = dict(transformer.named_parameters())
        self._sets = {"raw": self.parameters()} | {
            name: [named[n.replace(f".{CURRENT}.", f".{name}.")] for n, _ in self.named_parameters()] for name in self.followers
        }
        self.updates = 0
        with torch.no_grad():
            for name in self.followers:
                for current, other in zip(self._sets["raw"], self._sets[name]):
                    other.copy_(current)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters."""
        return [(n, p) for n, p in self.transformer.named_parameters() if f".{CURRENT}." in n]

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run the denoiser as `default` (current), `ema` or `reference` (the base, adapters off); gradients flags stay as they are."""
        before = self.active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str) -> None:
        if name == self.active:
            return
        flags = [(p, p.requires_grad) for layer in self.layers for p in layer.parameters()]
        for layer in self.layers:
            if name == REFERENCE:
                layer.enable_adapters(False)
            else:
                if self.active == REFERENCE:
                    layer.enable_adapters(True)
                layer.set_adapter(name)
        for p, flag in flags:
            p.requires_grad_(flag)
        self.active = name

    @torch.no_grad()
    def update_ema(self) -> None:
        """ema <- d ema + (1 - d) current with d = min(decay, (1 + s) / (10 + s)) after update s. Under ZeRO-3 it acts on each rank's own part."""
        self.updates += 1
        decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
        self._follow(EMA, decay)

    def update_old(self, decay: float) -> None:
        """old <- d old + (1 - d) current; d = 0 copies."""
        self._follow(OLD, decay)

    @torch.no_grad()
    def _follow(self, name: str, decay: float) -> None:
        for current, other in zip(self._sets["raw"], self._sets[name]):
            source, target = (getattr(p, "ds_tensor", p.data) for p in (current, other))
            target.lerp_(source.to(target.dtype), 1 - decay)

    # ------------------------------------------------------------------------------------------------ files

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole parameters on every rank, also under ZeRO-3."""
        with gathered([p for params in self._sets.values() for p in params]):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Raw, EMA and, where there is one, old weights, apart: `raw.<name>`, `ema.<name>`, `old.<name>`. A collective under ZeRO-3."""
        with self.gathered():
            return {
                f"{kind}.{n}": p.detach().float().cpu().clone()
                for kind, params in self._sets.items()
                for (n, _), p in zip(self.named_parameters(), params)
            }

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Raises UserError where the LoRA is for another architecture or rank."""
        names = [n for n, _ in self.named_parameters()]
        wanted = {f"{kind}.{n}" for n in names for kind in self._sets}
        if wanted != set(tensors):
            odd = sorted(wanted ^ set(tensors))
            raise UserError(
                f"the saved LoRA does not fit this model: {len(odd)} tensors differ, e.g. {odd[0]}. It was trained on another architecture or with other targets."
            )
        with self.gathered():
            for kind, params in self._sets.items():
                for n, p in zip(names, params):
                    value = tensors[f"{kind}.{n}"]
                    if value.shape != p.shape:
                        raise UserError(
                            f"the saved LoRA does not fit this model: {n} is {list(value.shape)} there and {list(p.shape)} here (another rank or width)"
                        )
                    p.copy_(value)

    def export(self, folder: Path, name: str = EMA) -> None:
        """Write `pytorch_lora_weights.safetensors`, which stock diffusers loads with pipe.load_lora_weights(folder).

        alpha / rank is folded into B, so that the file means the same to readers that know alpha from its header, from a state dict, or not at all (alpha = rank).
        """
        with self.gathered():
            layers = get_peft_model_state_dict(self.transformer, adapter_name=name)
            settings = self.transformer.peft_config[name]
            scale = settings.lora_alpha / settings.r
            tensors = {f"transformer.{k}": v.detach().float() * (scale if ".lora_B." in k else 1.0) for k, v in layers.items()}
        header = {"r": settings.r, "lora_alpha": settings.r, "target_modules": sorted(settings.target_modules)}
        told = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{k}": v for k, v in header.items()}, sort_keys=True)}
        write_weights(Path(folder) / LORA_WEIGHT_NAME_SAFE, tensors, metadata=told)
