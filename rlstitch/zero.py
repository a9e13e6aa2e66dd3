"""ZeRO's optimiser state as plain tensors: what DeepSpeed 0.19 keeps of a rank's part, read and put back in place. Its own checkpoints are pickles, which can run code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlstitch.types import UserError


def _masters(optimiser: Any, stage: int) -> list[Tensor]:
    """The flat float32 weights [n] that this rank updates, one a parameter group; what the optimiser within is keyed by."""
    return list(optimiser.fp32_partitioned_groups_flat if stage == 3 else optimiser.single_partition_of_fp32_groups)


def state(optimiser: Any, stage: int) -> dict[str, Tensor]:
    """This rank's part: `K.weights`, and `K.step`, `K.exp_avg`, ... of the optimiser within, for every group K."""
    out = {}
    for k, master in enumerate(_masters(optimiser, stage)):
        out[f"{k}.weights"] = master.detach()
        out |= {f"{k}.{name}": torch.as_tensor(value) for name, value in optimiser.optimizer.state.get(master, {}).items()}
    return out


@torch.no_grad()
def load_state(optimiser: Any, stage: int, tensors: dict[str, Tensor]) -> None:
    """Put `state` back, in place. Raises UserError where the parts are cut otherwise."""
    masters = _masters(optimiser, stage)
    sizes = {f"{k}.weights": list(master.shape) for k, master in enumerate(masters)}
    saved = {name: list(value.shape) for name, value in tensors.items() if name.endswith(".weights")}
    if sizes != saved:
        raise UserError(
            f"the saved optimiser state does not fit: ZeRO's parts are {saved} there and {sizes} here. Start over with resume=never"
        )
    for k, master in enumerate(masters):
        own = {name.removeprefix(f"{k}."): value for name, value in tensors.items() if name.startswith(f"{k}.")}
        master.data.copy_(own.pop("weights"))
        # a count of steps stays where the optimiser has it: on the CPU, unless it is made for the device
        before = optimiser.optimizer.state[master]
        for name, value in own.items():
            before[name] = value.to(before[name].device if name in before else "cpu" if value.ndim == 0 else master.device)
