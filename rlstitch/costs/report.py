"""A recipe's costs in words: TFLOP of an update by part, memory of a rank by part, hours on a GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from rlstitch import config as cfg
from rlstitch.checks import method_faults
from rlstitch.costs.counting import Call, Counted, count
from rlstitch.costs.gpus import Gpu, gpu
from rlstitch.costs.pricing import Prices
from rlstitch.filling import fill
from rlstitch.policy import CURRENT, OLD, REFERENCE
from rlstitch.prompts import read_prompts
from rlstitch.ranges import NotNegative, Range
from rlstitch.schema import RunConfig
from rlstitch.types import UserError


@dataclass
class CostConfig:
    """gpu: its name; tflops and memory: dense bfloat16 TFLOP/s and GB of one that is not known here; utilisation: the share of its speed that is reached; ranks: how many
    of them train."""

    gpu: str = "h100"
    tflops: NotNegative = 0.0
    memory: NotNegative = 0.0
    utilisation: Annotated[float, Range(0, 1, "low")] = 0.4
    ranks: Annotated[int, Range(1, 100_000)] = 1


@dataclass
class Cost:
    """TFLOP of an update by row, forward and backward, in the mean over the run; gigabytes of a rank by row; device-hours."""

    gpu: Gpu
    utilisation: float
    updates: int
    tflop: dict[str, tuple[float, float]]
    gigabytes: dict[str, float]
    evaluation: float | None  # TFLOP of the final one; None where its prompts are not here
    notes: list[str] = field(default_factory=list)

    @property
    def update(self) -> float:
        return sum(map(sum, self.tflop.values()))

    def hours(self, tflop: float) -> float:
        return tflop / (self.gpu.tflops * self.utilisation) / 3600


def settings(given: dict[str, Any]) -> tuple[CostConfig, dict[str, Any]]:
    """The keys of this job, taken out of a recipe with its overrides. Raises UserError."""
    own = {f.name: given.pop(f.name) for f in dataclasses.fields(CostConfig) if f.name in given}
    config, faults = fill(CostConfig, own)
    if faults:
        raise cfg.report(faults, "cost")
    return config, given


def of(given: dict[str, Any], name: str) -> Cost:
    """What a training recipe costs, its files at hand or not. Raises UserError with every fault of its keys."""
    asked, given = settings(given)
    chosen = gpu(asked.gpu, asked.tflops, asked.memory)
    cfg.for_launcher(given, "train.py", name)
    config, faults = cfg.structure(given)
    if not faults:
        faults = cfg.check_part("model", config.model, kind="model") + method_faults(config)
    if faults:
        raise cfg.report(list(dict.fromkeys(faults)), name)
    if config.stages:
        config.updates = sum(stage.updates for stage in config.stages)
    found, prices = count(config), Prices(config)
    cost = Cost(
        chosen,
        asked.utilisation,
        config.updates,
        _tflop(found, prices),
        _gigabytes(config, found, prices, asked.ranks),
        _evaluation(config, prices),
    )
    cost.notes = [
        f"{part} has no price: {why}" for part, why in prices.unknown.items() if part == "model" or _asked(part, found)
    ] + prices.assumed
    if prices.backbone is None:
        raise UserError(f"what '{name}' costs cannot be told: {prices.unknown['model']}")
    return cost


def _asked(part: str, found: list[Counted]) -> bool:
    return any(call.part == part for stage in found for call in stage.forward)


def row_of(call: Call) -> str:
    """What a call is called in the table."""
    if call.part != "denoiser":
        return call.part
    own = {REFERENCE: "reference policy", OLD: "old policy" if call.phase != "rollout" else "rollout", CURRENT: "policy"}[
        call.weights or CURRENT
    ]
    return "rollout" + " with gradient" * call.graph if call.phase == "rollout" and own != "reference policy" else own


def _tflop(found: list[Counted], prices: Prices) -> dict[str, tuple[float, float]]:
    """In the mean over the run's updates."""
    updates, rows = sum(stage.updates for stage in found), {}
    for stage in found:
        share = stage.updates / updates * stage.samples
        for call, times in stage.forward.items():
            if (price := prices.of(call)) is not None:
                again = price.forward * (
                    prices.config.sampler.activation_checkpointing and call.part != "denoiser"
                )  # made again in the backward pass
                forward, backward = times * price.forward, stage.backward.get(call, 0.0) * (price.backward + again)
                before = rows.get(row_of(call), (0.0, 0.0))
                rows[row_of(call)] = (before[0] + share * forward, before[1] + share * backward)
    return rows


def _bytes(module: Any) -> int:
    return sum(t.numel() * t.element_size() for t in module.parameters())


def _gigabytes(config: RunConfig, found: list[Counted], prices: Prices, ranks: int) -> dict[str, float]:
    """Of a rank. Gathered parts of ZeRO 3 and what the allocator holds beside are left out."""
    if prices.backbone is None:
        return {}
    transformer, policy = prices.backbone.transformer, prices.policy
    trained = sum(p.numel() for p in policy.parameters())
    lora = sum(_bytes(p) for layer in policy.layers for p in (layer.lora_A, layer.lora_B))
    old = bool(getattr(cfg.load_class(config.algorithm["_target_"]), "keeps_old", False))
    packed = {"nf4": 0.25, "int8": 0.5}.get(config.model.get("quantise"), 1.0)
    stage, followers = config.distributed.zero_stage, 1 + old
    own, parts = ranks if stage else 1, ranks if stage == 3 else 1
    images = config.batch.prompts_per_update * config.batch.images_per_prompt
    micro = min(config.batch.micro_batch, max(1, images // ranks))
    graphs = [
        sum(times * price.held for call, times in one.items() if (price := prices.of(call))) for stage_ in found for one in stage_.held
    ]
    return {
        "denoiser": packed * (_bytes(transformer) - lora) / parts / 1e9,
        "autoencoder": _bytes(prices.backbone.vae) / 1e9,
        "rewards": sum(_bytes(reward.model) for reward in prices.rewards.values() if reward is not None) / 1e9,
        "value models": sum(_bytes(value.stitch) + _bytes(value.tail) for value in prices.values.values()) / 1e9,
        "LoRA, its followers and AdamW": (trained * (8 / own + 8) + 4 * trained * followers) / 1e9,
        f"graphs of {micro} samples": max(graphs, default=0.0) * micro / 1e9,
    }


def _evaluation(config: RunConfig, prices: Prices) -> float | None:
    e = config.evaluation
    try:
        held_out = len(read_prompts(e.prompts, e.column))
    except UserError:
        return None
    if prices.backbone is None:
        return None
    one = {kind: prices.of(Call(kind, "eval")) for kind in ("denoiser", "decoder", *(f"reward {name}" for name in e.rewards))}
    passes = e.num_steps * (1 if e.guidance == 1 else 2)
    picture = sum(price.forward * (passes if kind == "denoiser" else 1) for kind, price in one.items() if price is not None)
    return picture * min(e.max_prompts or held_out, held_out) * len(e.final)


def told(cost: Cost, name: str) -> str:
    """The whole as text."""
    wide = max(map(len, [*cost.tflop, *cost.gigabytes, "an update"])) + 2
    line = lambda label, *cells: f"{label:<{wide}}" + "".join(f"{cell:>14}" for cell in cells)  # noqa: E731
    number = lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}"  # noqa: E731
    out = [f"{name}: {cost.updates} updates", "", line("TFLOP", "forward", "backward", "share")]
    for label, (forward, backward) in cost.tflop.items():
        out.append(line(label, number(forward), number(backward) if backward else "", f"{(forward + backward) / cost.update:.0%}"))
    out += [line("an update", number(cost.update)), "", line("gigabytes a rank", "")]
    out += [line(label, f"{size:.2f}") for label, size in cost.gigabytes.items() if size >= 0.005]
    total = sum(cost.gigabytes.values())
    fits = (
        ""
        if total <= cost.gpu.memory
        else f": more than the {cost.gpu.memory:g} of a {cost.gpu.name}; lower batch.micro_batch, or set sampler.activation_checkpointing=true"
    )
    out += [line("together", f"{total:.2f}") + fits, ""]
    run = cost.hours(cost.update * cost.updates)
    out.append(
        f"{number(run)} device-hours of {cost.gpu.name} ({cost.gpu.tflops:g} TFLOP/s at {cost.utilisation:.0%}), {number(3600 * cost.hours(cost.update))} s an update"
    )
    out.append(
        f"{number(cost.hours(cost.evaluation))} more for the last evaluation"
        if cost.evaluation is not None
        else "its evaluation is not counted: the prompts are not here"
    )
    return "\n".join(out + [f"note: {note}" for note in cost.notes])
