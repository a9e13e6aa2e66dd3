"""What an update asks of its models. The real trainer runs a recipe's updates on the embedded miniature, and every call is noted: no formula of a method is written down here, so
that any algorithm and oracle can be counted, also a user's own."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from rlstitch.part_checks import without_gradient
from rlstitch.parts import values_used
from rlstitch.schema import RunConfig
from rlstitch.stages import expand, names
from rlstitch.stops import Fixed
from rlstitch.trainer import Trainer

MODEL = {"_target_": "rlstitch.backbones.Diffusers", "path": "shapes:shapes", "max_sequence_length": 0}
REWARD = {"_target_": "rlstitch.rewards.clip.ClipReward", "path": "shapes:clip"}
BLIND = {"_target_": "rlstitch.rewards.simple.JpegSize"}  # a reward without gradient
PICTURES = {"_target_": "rlstitch.shapes.images.distinct", "n": 8, "seed": 1}
PAIRS = {"_target_": "rlstitch.shapes.images.ranked_pairs", "n": 8, "seed": 1, "utility": "hps"}
GROUPS, TOGETHER, STOPS = 2, 2, 4  # prompts of a counted update, the most pictures of one, the most stops that are tried


@dataclass(frozen=True)
class Call:
    """One kind of call: of which part, in which phase of the clock, under which weights of the policy; `graph`: for a backward pass, `into`: that also goes on into what it was given."""

    part: str
    phase: str
    weights: str = ""
    graph: bool = False
    into: bool = False


@dataclass
class Ledger:
    """Samples of every kind of call, forward and backward, and what stood in graphs at the same time: the most of any backward pass."""

    forward: Counter[Call] = field(default_factory=Counter)
    backward: Counter[Call] = field(default_factory=Counter)
    held: list[Counter[Call]] = field(default_factory=lambda: [Counter()])

    def note(self, call: Call, samples: int) -> None:
        self.forward[call] += samples
        if call.graph:
            self.held[-1][call] += samples

    def learned(self) -> None:
        """A loss has been taken backward: its graphs are gone."""
        if self.held[-1]:
            self.held.append(Counter())


@dataclass
class Counted:
    """Of a stage: its updates, and the calls of one sample of one update in the mean; `held`: of one sample of a micro-batch, by backward pass."""

    name: str
    updates: int
    samples: int
    forward: dict[Call, float]
    backward: dict[Call, float]
    held: list[dict[Call, float]]


def twin(config: RunConfig, out: str) -> RunConfig:
    """The recipe with its method, oracle, stop, steps and guidance as they are, on the miniature, with few samples."""
    blind = without_gradient(list(config.rewards), config.rewards)
    used = {name for part in expand(config) if part.oracle for name in part.oracle.get("weights", {})}
    rewards = {name: BLIND if name in blind else REWARD for name in config.rewards if name in used}
    valued = {name for part in expand(config) if part.oracle for name in values_used(part.oracle)}
    images = config.batch.images_per_prompt
    pictures = PAIRS if str(config.data.images.get("_target_", "")).endswith("pairs") or "judged" in str(config.data.images) else PICTURES
    few = GROUPS * min(images, TOGETHER)
    return replace(
        config,
        name="counted", out=out, resume="never", check=False, threads=0, model=MODEL, rewards=rewards | dict.fromkeys(valued, REWARD),
        values=dict.fromkeys(valued, "shapes:value_clip"),
        sampler=replace(config.sampler, shift=3.0 if config.sampler.shift == "auto" else config.sampler.shift, spacing="plain", activation_checkpointing=False),
        data=replace(config.data, prompts="shapes:train.jsonl", column="", images=pictures if config.data.images else {}),
        stages=[replace(stage, prompts="") for stage in config.stages],
        batch=replace(config.batch, prompts_per_update=GROUPS, images_per_prompt=min(images, TOGETHER), micro_batch=few, rollout_batch=0),
        lora=replace(config.lora, init="", targets=[], rank=4),
        distributed=replace(config.distributed, zero_stage=0, precision="fp32"),
        evaluation=replace(config.evaluation, prompts="shapes:held_out.jsonl", column="", rewards=[], every=0),
        guard=replace(config.guard, patience=0), refresh=replace(config.refresh, fraction=0.0), logging=replace(config.logging, wandb="off", progress=False),
    )  # fmt: skip


def count(config: RunConfig) -> list[Counted]:
    """The calls of every stage of a recipe."""
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()):  # what it says is of the miniature
        trainer = Trainer(twin(config, out))
        trainer._start()
        try:
            with watched(trainer) as fresh:
                return [_stage(trainer, part, name, k, fresh) for k, (name, part) in enumerate(zip(names(config), expand(config)))]
        finally:
            trainer.log.close()


def _stage(trainer: Trainer, part: RunConfig, name: str, number: int, fresh: Callable[[], Ledger]) -> Counted:
    stage, every = trainer.stages[number], int(part.algorithm.get("every", 1))  # updates between those that cost more
    reach = list(stage.stop.steps(part.sampler.num_steps)) or [part.sampler.num_steps]
    stops = sorted({reach[round(k * (len(reach) - 1) / max(1, min(STOPS, len(reach)) - 1))] for k in range(min(STOPS, len(reach)))})
    whole, few = (
        Counted(name, part.updates, part.batch.prompts_per_update * part.batch.images_per_prompt, {}, {}, []),
        trainer.geometry.samples,
    )
    for stop in stops:
        stage.stop = Fixed(after=stop)
        for step, share in ((0, 1 / every), (1, 1 - 1 / every)) if every > 1 else ((0, 1.0),):
            trainer.step, ledger = step + (stage.end - part.updates), fresh()
            trainer._update()
            for kind in ("forward", "backward"):
                sums = getattr(whole, kind)
                for call, samples in getattr(ledger, kind).items():
                    sums[call] = sums.get(call, 0.0) + samples / few * share / len(stops)
            whole.held += [{call: samples / few for call, samples in one.items()} for one in ledger.held if one]
    return whole


@contextmanager
def watched(trainer: Trainer) -> Iterator[Callable[[], Ledger]]:
    """Calls of a trainer's parts are noted in the ledger that the function given began last."""
    now = [Ledger()]

    def fresh() -> Ledger:
        now[:] = [Ledger()]
        return now[0]

    def noted(part: str, given: Tensor, out: Any, weights: str = "") -> None:
        streams = [t for t in _tensors(getattr(out, "returned", out)) if t.requires_grad]
        result = streams[-1 if hasattr(out, "returned") else 0] if streams else None  # of a cut the picture's, behind the text's
        graph = result is not None
        call = Call(part, trainer.clock.now, weights, graph, graph and given.requires_grad)
        now[0].note(call, samples := len(given))
        if graph:
            result.register_hook(lambda slope: now[0].backward.update({call: samples}))

    def of_module(part: str, weights: Callable[[], str]) -> Callable[..., None]:
        return lambda module, args, kwargs, out: noted(part, next(_tensors([*args, kwargs])), out, weights())

    with ExitStack() as stack:
        hooks: list[tuple[nn.Module, str, Callable[[], str]]] = [(trainer.backbone.transformer, "denoiser", lambda: trainer.policy.active)]
        for name, value in trainer.values.items():
            value.sigma_range = (0.0, 1.0)
            hooks += [(value.prefix, f"prefix {name}", str), (value.tail, f"tail {name}", str)]
        for module, part, weights in hooks:
            stack.callback(module.register_forward_hook(of_module(part, weights), with_kwargs=True).remove)
        for thing, method, part in [(trainer.backbone, "decode", "decoder"), (trainer.backbone, "encode", "encoder")] + [
            (reward, "score", f"reward {name}") for name, reward in trainer.rewards.items()
        ]:
            true = getattr(thing, method)

            def asked(given: Tensor, *more: Any, true: Any = true, part: str = part) -> Any:
                noted(part, given, out := true(given, *more))
                return out

            setattr(thing, method, asked)
        backward = trainer.engine.backward

        def learned(loss: Tensor) -> None:
            backward(loss)
            now[0].learned()

        trainer.engine.backward = learned
        yield fresh


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for entry in tree.values():
            yield from _tensors(entry)
    elif isinstance(tree, list | tuple):
        for entry in tree:
            yield from _tensors(entry)
    elif hasattr(tree, "__dict__") and not callable(tree):
        yield from _tensors(vars(tree))
