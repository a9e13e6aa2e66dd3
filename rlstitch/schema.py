"""The typed schema of a training recipe: its groups, defaults, choices and ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SamplerConfig:
    """shift: of the noise levels, `auto` for what the scheduler of the model's directory says at the run's picture size, or a number."""

    num_steps: int = 10
    shift: Any = "auto"
    spacing: str = "plain"
    guidance: float = 1.0
    activation_checkpointing: bool = False


@dataclass
class DataConfig:
    """What is trained on. `images`: a part that gives pictures with their prompts, for algorithms that learn from them; `prompts` is ignored then.

    column: where the prompts of a file (also a stage's) stand, by default under prompt, text or caption.
    """

    prompts: str = "shapes:train.jsonl"
    column: str = ""
    images: dict[str, Any] = field(default_factory=dict)
    truncate: bool = False


@dataclass
class BatchConfig:
    """micro_batch: the most samples that are trained on at once; rollout_batch: that are sampled and scored at once where no gradient runs through the rollout
    (0: micro_batch). Neither changes the maths."""

    prompts_per_update: int = 64
    images_per_prompt: int = 1
    micro_batch: int = 32
    rollout_batch: int = 0


@dataclass
class LoraSettings:
    rank: int = 32
    alpha: float = 64.0


@dataclass
class OptimiserConfig:
    """AdamW. eps: where gradients lie below it, as Flow-GRPO's do at 1e-8, steps are shorter than lr."""

    lr: float = 5e-5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup: int = 0


@dataclass
class DistributedConfig:
    """timeout: minutes that the ranks wait for one of them before they give up."""

    zero_stage: int = 0
    precision: str = "fp32"
    timeout: float = 30.0


@dataclass
class EvaluationConfig:
    """final: which weights are scored on `max_prompts` prompts (0: all) when a run ends: base, raw, ema. On the way, every `every` updates, it is the raw ones on
    `every_prompts`."""

    prompts: str = "shapes:held_out.jsonl"
    column: str = ""
    max_prompts: int = 0
    every: int = 0
    every_prompts: int = 64
    num_steps: int = 40
    shift: Any = "auto"
    spacing: str = "diffusers"
    guidance: float = 1.0
    batch_size: int = 64
    seed: int = 1234
    rewards: list[str] = field(default_factory=list)
    final: list[str] = field(default_factory=lambda: ["base", "raw", "ema"])
    grid: int = 16


@dataclass
class LoggingConfig:
    wandb: str = "auto"
    project: str = "rlstitch"
    progress: bool = True


@dataclass
class CheckpointConfig:
    every: int = 20
    keep: int = 2


@dataclass
class RefreshConfig:
    """Value models against the true reward while training; fraction 0 is off. threshold counts spreads of the reward."""

    fraction: float = 0.0
    threshold: float = 0.5
    steps: int = 30
    lr: float = 1e-4
    batch_size: int = 64
    buffer: int = 512


@dataclass
class GuardConfig:
    """Against over-optimisation, at every evaluation on the way. judge: a held-out reward, by default the last of evaluation.rewards that is not trained on.

    patience: evaluations in a row with the judge fallen and the trained reward up that end the run; 0 never does. prompts x images: pictures to measure
    diversity and the value models' gap on; prompts 0 measures neither.
    """

    judge: str = ""
    patience: int = 3
    prompts: int = 8
    images: int = 4


@dataclass
class StageConfig:
    """A part of a run with an oracle, stop or prompts of its own; what it leaves out is the run's. Weights, optimiser and followers go on."""

    name: str = ""
    updates: int = 0
    oracle: dict[str, Any] = field(default_factory=dict)
    stop: dict[str, Any] = field(default_factory=dict)
    prompts: str = ""


@dataclass
class RunConfig:
    """A whole run. `use` lists pieces merged before the recipe itself; `resume` is auto, never or a checkpoint folder; with `stages`, `updates` is their sum."""

    name: str = ""
    seed: int = 0
    updates: int = 50
    out: str = "runs"
    resume: str = "auto"
    check: bool = False
    ema_decay: float = 0.9
    max_bad_steps: int = 5
    threads: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
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


CHOICES = {
    "sampler.spacing": ("plain", "diffusers"),
    "evaluation.spacing": ("plain", "diffusers"),
    "distributed.precision": ("auto", "fp32", "bf16", "fp16"),
    "distributed.zero_stage": (0, 1, 2, 3),
    "logging.wandb": ("auto", "offline", "online", "off"),
}
POSITIVE = (
    "updates",
    "sampler.num_steps",
    "batch.prompts_per_update",
    "batch.images_per_prompt",
    "batch.micro_batch",
    "lora.rank",
    "optimiser.lr",
    "optimiser.eps",
    "distributed.timeout",
    "optimiser.clip_norm",
    "max_bad_steps",
    "evaluation.num_steps",
    "evaluation.batch_size",
    "checkpoint.keep",
    "checkpoint.every",
    "refresh.threshold",
    "refresh.steps",
    "refresh.lr",
    "refresh.batch_size",
    "refresh.buffer",
)
