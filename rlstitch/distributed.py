"""Accelerate and DeepSpeed behind one small engine: backward, step, gather. Started by plain `torchrun`, or by nothing at all.

zero_stage 0 trains without DeepSpeed; stages 1 to 3 are DeepSpeed's partitions of optimiser, gradients and weights. At every stage gradients add up on each rank,
and are averaged over ranks, looked at and clipped once an update, here: LoRA's are megabytes, so that this costs next to nothing and is the same everywhere.
"""

from __future__ import annotations

import atexit
import math
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlstitch import protocols, watch, zero
from rlstitch.asking import PartError, inside
from rlstitch.types import UserError

T = typing.TypeVar("T")


class AgreedError(PartError):
    """A part failed on some rank, and all ranks have left what they were doing at the same place."""


def native_bf16(device_type: str) -> bool:
    """Does the hardware multiply bf16 itself? Where a CPU only emulates it, bf16 is ten and more times slower than fp32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(device_type: str, precision: str) -> str:
    """`auto` is bf16 where the hardware multiplies it itself, else fp32."""
    return precision if precision != "auto" else "bf16" if native_bf16(device_type) else "fp32"


def autocast(device_type: str, precision: str) -> torch.autocast:
    """A context in which forward passes run in fp32, bf16, fp16 or `auto`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(device_type, precision))
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def world_size() -> int:
    """Ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mean_over_ranks(tensors: Sequence[Tensor], world: int) -> list[Tensor]:
    """The mean of each tensor over the ranks, in one all-reduce; the same bits on every rank."""
    if world == 1:
        return list(tensors)
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world
    return [part.view_as(t) for t, part in zip(tensors, flat.split([t.numel() for t in tensors]))]


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Mean of every gradient over the ranks; a parameter without gradient counts as zero."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    for p, mean in zip(parameters, mean_over_ranks(gradients, world)):
        p.grad = mean


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of a plain optimiser as `INDEX.NAME` -> tensor."""
    state = optimiser.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items() if torch.is_tensor(value)}


def load_optimiser_tensors(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state = optimiser.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state["state"].setdefault(int(index), {})[key] = value
    optimiser.load_state_dict(state)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whole parameters on every rank, also under ZeRO-3, where it is a collective and what is written into them is rank 0's."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def without_shared_memory_kernel() -> None:
    """Keep DeepSpeed from compiling, at the first start on a machine without a GPU and for a minute or more, a collective that inference alone uses; ours go through gloo."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """One rank's view of the run. Loss is averaged over ranks and micro-batches; a step with NaN or Inf leaves the weights untouched.

    timeout: minutes that a rank is waited for. `where`: what this rank is at, as the others are told where it is lost.
    """

    def __init__(self, *, zero_stage: int, precision: str, accumulation: int, micro_batch: int, clip_norm: float, timeout: float = 30.0):
        cuda = torch.cuda.is_available()
        precision = resolve_precision("cuda" if cuda else "cpu", precision)
        self.zero_stage, self.precision, self.accumulation, self.clip_norm = zero_stage, precision, accumulation, clip_norm
        world = world_size()
        launched = "WORLD_SIZE" in os.environ or bool(zero_stage)
        limit = timedelta(minutes=timeout)
        handlers = [InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=limit)] if launched else []
        plugin = None
        if zero_stage:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            if not cuda:
                os.environ["DS_ACCELERATOR"] = "cpu"
                without_shared_memory_kernel()
            if "WORLD_SIZE" not in os.environ:  # a group of one, with no port that another job may have
                os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
                dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
            plugin = DeepSpeedPlugin(
                hf_ds_config={
                    "zero_optimization": {
                        "stage": zero_stage,
                        "overlap_comm": False,
                        "contiguous_gradients": False,
                        "reduce_bucket_size": 50_000_000,
                        "stage3_param_persistence_threshold": 0,
                    },
                    "gradient_accumulation_steps": 1,
                    "train_micro_batch_size_per_gpu": micro_batch,
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                    "steps_per_print": 10**9,
                }
            )
        self.accelerator = Accelerator(
            mixed_precision="fp16" if precision == "fp16" and not zero_stage else "no",  # for its loss scaling alone: `autocast` is ours
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
            cpu=not cuda and not zero_stage,
        )
        if zero_stage == 3:  # else transformers would load the reward models in parts, too
            unset_hf_deepspeed_config()
        expected = DistributedType.DEEPSPEED if zero_stage else None
        if expected and self.accelerator.distributed_type is not expected:
            raise RuntimeError(f"DeepSpeed was asked for but accelerate runs {self.accelerator.distributed_type}")
        if self.accelerator.num_processes != world:
            raise RuntimeError(
                f"torchrun started {world} ranks but accelerate sees {self.accelerator.num_processes}: the process group did not form"
            )
        self.rank, self.world, self.device = self.accelerator.process_index, world, self.accelerator.device
        self.is_main = self.rank == 0
        self.where: Callable[[], str] = lambda: "starting"
        if world > 1:
            watch.start(self.rank, world, limit.total_seconds(), lambda: self.where())
        self._spoiled = torch.zeros(1, device=self.device)
        self._adding = ExitStack()

    def prepare(self, module: nn.Module, optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.module = parameters, module
        self.optimiser = optimiser
        if self.zero_stage:
            self.deepspeed, _ = self.accelerator.prepare(module, optimiser)
            self.optimiser = self.deepspeed.optimizer
            atexit.register(self.forget)  # else an update that a fault cut short is handed over at exit, to ranks that are gone
        elif self.precision == "fp16":
            self.optimiser = self.accelerator.prepare(optimiser)

    def autocast(self) -> torch.autocast:
        """The recipe's precision for forward passes; weights that train stay float32."""
        return autocast(self.device.type, self.precision)

    def set_lr(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr

    # ------------------------------------------------------------------------------------------------ training

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch's mean loss; gradients add up on this rank until `step`. A loss that is not finite spoils the whole update."""
        self._spoiled += ~torch.isfinite(loss.detach())  # looked at once, in `step`
        loss = loss / self.accumulation
        others = protocols.theirs()  # what fails in the gradient of a user's part fails in torch, which names nobody
        with inside(f"the gradient of a loss through {', '.join(others)}") if others and self.world == 1 else nullcontext():
            if not self.zero_stage:
                self.accelerator.backward(loss)
                return
            # DeepSpeed's own accumulation counts calls of its forward, which nobody makes: the denoiser is called by itself
            if not self.deepspeed.inside_no_sync_ctxt:
                self._adding.enter_context(self.deepspeed.coalesce_grad_reduction())
            self.deepspeed.backward(loss)

    def step(self) -> float | None:
        """One optimiser step along the mean over micro-batches and ranks; -> the gradient's norm before clipping, or None where the update was skipped for what is
        not finite, with weights and moments as they were."""
        gradients = self._gradients()
        *means, spoiled = mean_over_ranks([*gradients, self._spoiled], self.world)
        for gradient, mean in zip(gradients, means):
            gradient.copy_(mean)
        norm = math.nan
        if not bool(spoiled):
            if self.precision == "fp16":
                self.accelerator.unscale_gradients(self.optimiser)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm))
            if math.isfinite(norm) and self.zero_stage:
                self._adding.close()  # hands the gradients over
                self.deepspeed.step()
            elif math.isfinite(norm) or self.precision == "fp16":  # whose scaler leaves the step out itself, and lowers its scale
                self.optimiser.step()
        self.forget()
        return norm if math.isfinite(norm) else None

    def forget(self) -> None:
        """Drop the gradients of an update that is not finished."""
        self._spoiled = torch.zeros_like(self._spoiled)
        for p in self.parameters:
            p.grad = None

    def _gradients(self) -> list[Tensor]:
        """What has added up for each parameter; zeros where nothing has. PartError where no loss of the update has reached any: an optimiser would move them all the same."""
        missing = [p for p in self.parameters if p.grad is None]
        if len(missing) == len(self.parameters):
            raise PartError(
                "no loss of this update has a gradient with respect to the policy's weights: the algorithm, or its oracle, has cut it off"
            )
        with gathered(missing):
            for p in missing:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters]

    # ------------------------------------------------------------------------------------------------ collectives

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] of every rank, the same n, -> [world n, ...] in rank order."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def share(self, count: int) -> list[int]:
        """This rank's part of `count` places: every world-th, as many on every rank; the last place again where they do not come out even."""
        return [min(self.rank + k * self.world, count - 1) for k in range(-(-count // self.world))]

    def in_order(self, own: Tensor, count: int) -> Tensor:
        """[n, ...] of every rank's first n places of its `share` -> [at most count, ...] in their order."""
        mixed = self.gather(own.to(self.device))
        return mixed.view(self.world, len(own), *own.shape[1:]).transpose(0, 1).flatten(0, 1)[:count]

    def divided(self, count: int, action: Callable[[int], Tensor]) -> Tensor:
        """`action(k)` of every k below `count`, each asked on one rank alone -> [count, ...] on every rank. It has no collective in it, and gives tensors of one shape."""
        own = [self.together(lambda k=k: action(k)) for k in self.share(count)]
        return self.in_order(torch.stack(own), count)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        if self.world == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor)

    def by_main(self, action: Callable[[], str]) -> str:
        """What `action` gives on the main rank, which alone runs it, on every rank. Its UserError is everyone's."""
        told = b""
        if self.is_main:
            try:
                told = b"+" + action().encode()
            except UserError as error:
                told = b"!" + str(error).encode()
        if self.world > 1:
            size = torch.tensor([len(told)], device=self.device)
            dist.broadcast(size, 0)
            letters = torch.tensor(list(told), dtype=torch.uint8) if self.is_main else torch.empty(int(size), dtype=torch.uint8)
            letters = letters.to(self.device)
            dist.broadcast(letters, 0)
            told = bytes(letters.tolist())
        if told.startswith(b"!"):
            raise UserError(told[1:].decode())
        return told[1:].decode()

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives, which has no collective in it and may fail on some ranks alone: then all raise the PartError of the first that failed, in step."""
        if self.world == 1:
            return action()
        result, error = None, None
        try:
            result = action()
        except UserError as caught:
            error = caught
        if self.any(error is not None):
            told: list[str | None] = [None] * self.world
            dist.all_gather_object(told, None if error is None else str(error))
            raise AgreedError(next(text for text in told if text)) from error
        return typing.cast(T, result)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    # ------------------------------------------------------------------------------------------------ state

    def optimiser_state(self) -> dict[str, Tensor]:
        """This rank's optimiser state: all of it at zero_stage 0, its part above."""
        if self.zero_stage:
            return zero.state(self.optimiser, self.zero_stage)
        return optimiser_tensors(self.optimiser)

    def scaler_state(self) -> dict[str, float]:
        """Of fp16's loss scaling; empty where there is none."""
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def load_optimiser_state(self, tensors: dict[str, Tensor]) -> None:
        if self.zero_stage:
            return zero.load_state(self.optimiser, self.zero_stage, tensors)
        load_optimiser_tensors(self.optimiser, tensors)
