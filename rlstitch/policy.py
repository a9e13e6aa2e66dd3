"""The policy: LoRA sets on one frozen base. `current` trains, `ema` follows it, `old` samples where a method wants that; the reference is the base without them. A LoRA to
start from stays active beside each of them, and is then the reference."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlstitch.adapters import Layers
from rlstitch.distributed import gathered
from rlstitch.files import write_weights
from rlstitch.types import UserError

CURRENT, EMA, OLD, REFERENCE, INIT = "default", "ema", "old", "reference", "init"
SETS = {"base": REFERENCE, "raw": CURRENT, "ema": EMA}  # what an evaluation calls them


class Policy:
    """LoRA of `rank` on the joint attention projections of a transformer (A ~ N(0, 1/rank), B = 0: at start it is the base bit for bit).

    init: layers of a LoRA that is on the transformer already, as its adapter `init` (backbone.load_lora): it is frozen, and part of every set and of the reference.
    Only `use` switches adapters: PEFT's own set_adapter also flips requires_grad, which would silence training.
    """

    def __init__(
        self, transformer: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int, ema_decay: float, old: bool = False,
        init: Layers | None = None,
    ):  # fmt: skip
        self.transformer, self.ema_decay, self.init = transformer, ema_decay, init or {}
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer.add_adapter(config, CURRENT)
        self.followers = (EMA, OLD) if old else (EMA,)
        for name in self.followers:
            transformer.add_adapter(config, name)
        self.layers = [m for m in transformer.modules() if isinstance(m, LoraLayer)]
        self.active = None
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
        """Run the denoiser as `default` (current), `ema` or `reference` (the base, with `init` alone where there is one); gradients flags stay as they are."""
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
            sets = [n for n in (INIT, name) if n in layer.lora_A]
            layer.enable_adapters(bool(sets))
            if sets:
                layer.set_adapter(sets)
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

        alpha / rank is folded into B, so that the file means the same to readers that know alpha from its header, from a state dict, or not at all (alpha = rank). The
        LoRA that was started from is in it: A over A and B beside B are the sum of the two, of a rank that is the sum of theirs.
        """
        with self.gathered():
            own = {k: v.detach().float().cpu() for k, v in get_peft_model_state_dict(self.transformer, adapter_name=name).items()}
        settings = self.transformer.peft_config[name]
        scale, names = settings.lora_alpha / settings.r, {k.partition(".lora_")[0] for k in own}
        parts = {
            n: [(own[f"{n}.lora_A.weight"], scale * own[f"{n}.lora_B.weight"])] if n in names else []
            for n in sorted(names | set(self.init))
        }
        for n, layer in self.init.items():
            parts[n].append(layer)
        layers = {n: (torch.cat([a for a, _ in both]), torch.cat([b for _, b in both], 1)) for n, both in parts.items()}
        ranks = {n: len(a) for n, (a, _) in layers.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{n}": rank for n, rank in ranks.items() if rank != usual}
        header = {"r": usual, "lora_alpha": usual, "target_modules": sorted(settings.target_modules)}
        header |= {"rank_pattern": others, "alpha_pattern": others} if others else {}
        header |= {"target_modules": "|".join(map(re.escape, sorted(ranks)))} if set(ranks) > names else {}
        tensors = {f"transformer.{n}.lora_{half}.weight": t for n, two in layers.items() for half, t in zip("AB", two)}
        told = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{k}": v for k, v in header.items()}, sort_keys=True)}
        write_weights(Path(folder) / LORA_WEIGHT_NAME_SAFE, tensors, metadata=told)
