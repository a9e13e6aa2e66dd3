"""The typed schema of a training recipe: its groups with their defaults, choices and ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rlstitch.ranges import (
    AutoShift,
    Count,
    CountOrNone,
    Decay,
    GridSteps,
    Guidance,
    Name,
    Positive,
    Range,
    Rate,
    Seed,
    Share,
    Spacing,
    Text,
    Threads,
)  # fmt: skip


@dataclass
class SamplerConfig:
    """shift: of the noise levels, `auto` for what the scheduler of the model's directory says at the run's picture size, or a number. spacing: of the grid before it is
    shifted, `plain` 1 - k/N as most pipelines have it, `diffusers` as SD3's, `auto` the model's own. guidance_gradient: `both` is the gradient of the guided velocity;
    `conditional` leaves out that of its unconditional branch, as the released Flow-GRPO does, which also saves that half of the backward pass."""

    num_steps: GridSteps = 10
    shift: AutoShift = "auto"
    spacing: Spacing = "plain"
    guidance: Guidance = 1.0
    guidance_gradient: Literal["both", "conditional"] = "both"
    activation_checkpointing: bool = False


@dataclass
class DataConfig:
    """What is trained on. `images`: a part that gives pictures with their prompts, for algorithms that learn from them; `prompts` is ignored then.

    column: where the prompts of a file (also a stage's) stand, by default under prompt, text or caption.
    """

    prompts: Text = "shapes:train.jsonl"
    column: str = ""
    images: dict[str, Any] = field(default_factory=dict)
    truncate: bool = False


@dataclass
class BatchConfig:
    """micro_batch: the most samples that are trained on at once; rollout_batch: that are sampled and scored at once where no gradient runs through the rollout
    (0: micro_batch). Neither changes the maths."""

    prompts_per_update: Count = 64
    images_per_prompt: Count = 1
    micro_batch: Count = 32
    rollout_batch: CountOrNone = 0


@dataclass
class LoraSettings:
    """init: a LoRA of any trainer and rank to start from, a file, folder or run. It stays as it is, active beside the trained one: the reference of every method and the
    evaluation called base are the model with it, what is exported is the sum. Value models stay the base's, without it. targets: ends of the names of the linears to train
    on, or whole names with *, by default the architecture's; every block must have one."""

    init: str = ""
    targets: list[Text] = field(default_factory=list)
    rank: Annotated[int, Range(1, 4096)] = 32
    alpha: Positive = 64.0


@dataclass
class OptimiserConfig:
    """AdamW. eps: where gradients lie below it, as Flow-GRPO's do at 1e-8, steps are shorter than lr."""

    lr: Rate = 5e-5
    weight_decay: Decay = 0.0
    beta1: Annotated[float, Range(0, 1, "high")] = 0.9
    beta2: Annotated[float, Range(0, 1, "high")] = 0.999
    eps: Positive = 1e-8
    clip_norm: Positive = 1.0
    warmup: CountOrNone = 0


@dataclass
class DistributedConfig:
    """timeout: minutes that the ranks wait for one of them before they give up."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    timeout: Annotated[float, Range(0, 100_000, open="low")] = 30.0


@dataclass
class EvaluationConfig:
    """final: which weights are scored on `max_prompts` prompts (0: all) when a run ends: base, raw, ema. On the way, every `every` updates, it is the raw ones on
    `every_prompts`."""

    prompts: Text = "shapes:held_out.jsonl"
    column: str = ""
    max_prompts: CountOrNone = 0
    every: CountOrNone = 0
    every_prompts: CountOrNone = 64
    num_steps: GridSteps = 40
    shift: AutoShift = "auto"
    spacing: Spacing = "auto"
    guidance: Guidance = 1.0
    batch_size: Count = 64
    seed: Seed = 1234
    rewards: list[Text] = field(default_factory=list)
    final: list[Literal["base", "raw", "ema"]] = field(default_factory=lambda: ["base", "raw", "ema"])
    grid: Annotated[int, Range(0, 1024)] = 16


@dataclass
class LoggingConfig:
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    project: Text = "rlstitch"
    progress: bool = True


@dataclass
class CheckpointConfig:
    every: Count = 20
    keep: Count = 2


@dataclass
class RefreshConfig:
    """Value models against the true reward while training. fraction: of an update's groups, whose samples are finished and scored; 0 is off. Once `pairs` of value and
    reward are known, a correlation below `agreement` starts `steps` of distillation on the last `buffer` finished latents."""

    fraction: Share = 0.0
    agreement: Annotated[float, Range(-1, 1)] = 0.5
    pairs: Annotated[int, Range(4, 1_000_000)] = 64
    steps: Count = 30
    lr: Rate = 1e-4
    batch_size: Count = 64
    buffer: Count = 512


@dataclass
class GuardConfig:
    """Against over-optimisation, at every evaluation on the way. judge: a held-out reward, by default the last of evaluation.rewards that is not trained on.

    patience: evaluations in a row with the judge fallen and the trained reward up that end the run; 0 never does. prompts x images: pictures to measure
    diversity and the value models' gap on; prompts 0 measures neither.
    """

    judge: str = ""
    patience: CountOrNone = 3
    prompts: CountOrNone = 8
    images: Annotated[int, Range(1, 1024)] = 4


@dataclass
class StageConfig:
    """A part of a run with an oracle, stop or prompts of its own; what it leaves out is the run's. Weights, optimiser and followers go on."""

    name: str = ""
    updates: CountOrNone = 0
    oracle: dict[str, Any] = field(default_factory=dict)
    stop: dict[str, Any] = field(default_factory=dict)
    prompts: str = ""


@dataclass
class RunConfig:
    """A whole run. `use` lists pieces merged before the recipe itself; `resume` is auto, never or a checkpoint folder; with `stages`, `updates` is their sum."""

    name: Name = ""
    seed: Seed = 0
    updates: Count = 50
    out: Text = "runs"
    resume: Text = "auto"
    check: bool = False
    ema_decay: Annotated[float, Range(0, 1, "high")] = 0.9
    max_bad_steps: Count = 5
    threads: Threads = 0
    model: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Text] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    stop: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    stages: list[StageConfig] = field(default_factory=list)
