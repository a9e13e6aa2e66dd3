"""Parts that are not of this project, held to what rlstitch.types says of their kind: what a method of theirs gives is looked at before anybody uses it.

Whoever asks a part asks it as if it were one of ours; the looking is in a subclass of the user's class, which is what is built.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from rlstitch.asking import PartError, inside, strange, told, unlike
from rlstitch.protocols import CUT, ours
from rlstitch.ranges import Count, misfit
from rlstitch.types import Batch, Conditioning, Latent, Rollout

OWN_KEYS = (  # of a row of metrics.jsonl
    "step", "samples", "stage", "stop", "sigma", "rewards", "grad_norm", "skipped", "drift", "eval", "cpu_hours", "gpu_hours",
)  # fmt: skip


class Unfit(Exception):
    """What a method gave is not what its protocol says; the message is what that says."""


def built(kind: str, cls: Any, **arguments: Any) -> Any:
    """A part of this kind (a key of protocols.METHODS; '' for none): cls(**arguments) where that is of this project, or a function; of a user's class an instance
    that is held. Raises PartError where it does not say of itself what its kind must."""
    if kind not in RULES or not isinstance(cls, type) or ours(cls.__module__):
        return cls(**arguments)
    target = f"{cls.__module__}.{cls.__qualname__}"
    part = (made := _held(target, cls, RULES[kind]))(**arguments)
    if not isinstance(part, made):
        raise PartError(f"{target} made {told(part)}, not one of itself")
    for name, (hint, needed) in ATTRIBUTES.get(kind, {}).items():
        value = getattr(part, name, _NONE)
        if value is _NONE and needed:
            raise PartError(f"{target} has no {name}, which {kind}s say of themselves once they are built")
        if value is not _NONE and (wrong := misfit(value, hint)):
            raise PartError(f"{target}: its {name} {wrong}")
    if kind == "oracle" and len(part.names) != len(part.weights):
        raise PartError(f"{target} has {len(part.names)} names and {len(part.weights)} weights: one of each for a reward")
    return part


def _held(target: str, cls: type, rules: Mapping[str, Callable[..., Any]]) -> type:
    """A subclass by the same name whose methods are asked inside `asking.inside`, and give what their rules make of it."""

    def method(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
        part = target if name == "__call__" else f"{target}.{name}"

        @wraps(getattr(cls, name))
        def ask(self: Any, *arguments: Any, **options: Any) -> Any:
            with inside(part):
                given = getattr(super(made, self), name)(*arguments, **options)
                return _fitting(part, given, lambda: rule(self, given, *arguments, **options))

        @wraps(getattr(cls, name))
        def each(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
            with inside(part):
                given = getattr(super(made, self), name)(*arguments, **options)
                one = iter(given)
            while True:
                with inside(part):
                    if (entry := next(one, _NONE)) is _NONE:
                        return
                    entry = _fitting(part, entry, lambda entry=entry: rule(self, entry, *arguments, **options))
                yield entry

        return each if rule is _loss else ask

    methods = {name: method(name, rule) for name, rule in rules.items() if hasattr(cls, name)}
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "__slots__": ()} | methods
    made = types.new_class(cls.__name__, (cls,), {}, lambda space: space.update(own))
    return made


def _fitting(part: str, given: Any, rule: Callable[[], Any]) -> Any:
    try:
        return rule()
    except Unfit as wrong:
        raise PartError(f"{part} gave {wrong}") from wrong


_NONE = object()


def _tensor(value: Any, *shape: int | None, where: str = "") -> Tensor:
    if wrong := unlike(value, shape, floating=True):
        raise Unfit(f"{where}{wrong}")
    return value


def _of(kind: type, value: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise Unfit(f"{told(value)}, not {what}")
    return value


# ---------------------------------------------------------------------------------------------------- stops


def _steps(stop: Any, given: Any, num_steps: int) -> range:
    """Rising and ending at its last step, however it was given."""
    if not isinstance(given, range) or not given:
        raise Unfit(f"{told(given)} on a grid of {num_steps} steps, not a range of step counts")
    rising = given if given.step > 0 else given[::-1]
    if not 1 <= rising[0] <= rising[-1] <= num_steps:
        raise Unfit(f"{given}, but the grid has {num_steps} steps: keep it within 1..{num_steps}")
    return range(rising[0], rising[-1] + 1, rising.step)


def _draw(stop: Any, given: Any, num_steps: int, seed: int) -> int:
    steps = stop.steps(num_steps)
    if not isinstance(given, Integral) or isinstance(given, bool) or int(given) not in steps:
        raise Unfit(
            f"{told(given)}, which is none of the steps that it says it can stop after ({', '.join(map(str, steps[:8]))}{', ...' * (len(steps) > 8)})"
        )
    return int(given)


# ---------------------------------------------------------------------------------------------------- oracles


def _scores(oracle: Any, given: Any, latent: Latent, batch: Batch, *more: Any, **options: Any) -> Tensor:
    _tensor(given, len(latent.z), len(oracle.names))
    if torch.is_grad_enabled() and latent.z.requires_grad and getattr(oracle, "differentiable", False) and not given.requires_grad:
        raise Unfit(
            "scores without a gradient, though it says `differentiable`: leave out detach, no_grad and numpy, or set differentiable = False"
        )
    return given.to(latent.z.device)


def _total(oracle: Any, given: Any, scores: Tensor) -> Tensor:
    _tensor(given, *scores.shape[:-1])
    if torch.is_grad_enabled() and scores.requires_grad and not given.requires_grad:
        raise Unfit("a total without the gradient that the scores have: leave out detach, no_grad and numpy")
    return given


# ---------------------------------------------------------------------------------------------------- algorithms


def _rollout(algorithm: Any, given: Any, batch: Batch, stop: int) -> Rollout:
    _of(Rollout, given, "an rlstitch.types.Rollout")
    if not isinstance(given.batch, Batch) or len(given.batch) != len(batch):
        raise Unfit(f"a rollout whose batch is not the {len(batch)} samples that it was asked for")
    z, sigma = _of(Latent, given.latent, "a rollout with an rlstitch.types.Latent").z, given.latent.sigma
    if not isinstance(z, Tensor) or z.ndim < 2 or len(z) % len(batch):
        raise Unfit(f"latents z that are {told(z)}, not [{len(batch)}, C, H, W] (or a multiple of so many rows)")
    _tensor(z, *z.shape, where="latents z that are ")
    _tensor(sigma, len(z), where="noise levels sigma that are ")
    return given


def _scored(algorithm: Any, given: Any, rollout: Rollout) -> Tensor:
    oracle = getattr(algorithm, "oracle", None) if algorithm.needs_oracle else None
    return _tensor(given, len(rollout.batch), len(oracle.names) if oracle is not None else None if algorithm.needs_oracle else 0)


def _compared(algorithm: Any, given: Any, rollouts: Any, scores: Tensor, groups: Tensor) -> tuple[Tensor, dict[str, Any]]:
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[1], Mapping):
        raise Unfit(f"{told(given)}, not weights and a dict of figures")
    weights, figures = given
    if not isinstance(weights, Tensor) or weights.ndim < 1:
        raise Unfit(f"weights that are {told(weights)}, not a tensor [{len(scores)}, ...]")
    _tensor(weights, len(scores), *weights.shape[1:], where="weights that are ")
    return weights, {key: float(_figure(key, value)) for key, value in figures.items()}


def _loss(algorithm: Any, given: Any, rollout: Rollout, *compared: Any) -> tuple[Tensor, dict[str, Tensor]]:
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[1], Mapping):
        raise Unfit(f"{told(given)}, not a loss and a dict of figures")
    loss = _tensor(given[0], where="a loss that is ")
    if not loss.requires_grad:
        raise Unfit("a loss without a gradient: leave out detach, no_grad and numpy")
    return loss, {"loss": loss.detach()} | {k: torch.as_tensor(_figure(k, v), device=loss.device).detach() for k, v in given[1].items()}


def _figure(key: Any, value: Any) -> Any:
    if not isinstance(key, str) or key in OWN_KEYS:
        raise Unfit(
            f"a figure by the name {told(key)}: names are text, and none of {', '.join(OWN_KEYS)}, which a row of metrics.jsonl has already"
        )
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Tensor):
        raise Unfit(f"the figure '{key}' that is {told(value)}, not a number or a tensor of numbers")
    return _tensor(value, *value.shape, where=f"the figure '{key}' that is ")


def _state(algorithm: Any, given: Any) -> dict[str, Tensor]:
    for key, value in _of(dict, given, "a dict of tensors by name").items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or strange(value):
            raise Unfit(f"{told(key)}: {told(value)}, not a plain tensor by name")
    return given


# ---------------------------------------------------------------------------------------------------- backbones


def _velocity(backbone: Any, given: Any, z: Tensor, sigma: Tensor, *more: Any, **options: Any) -> Tensor:
    _tensor(given, *z.shape)
    if given.element_size() > max(4, z.element_size()) or given.device != z.device:
        raise Unfit(f"{given.dtype} on {given.device} for latents in {z.dtype} on {z.device}: return .to(z)")
    return given


def _bound(backbone: Any, given: Any, *arguments: Any, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if not callable(given):
        raise Unfit(f"{told(given)}, not a function velocity(z, sigma)")
    part = f"{type(backbone).__module__}.{type(backbone).__qualname__}.bind"

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        with inside(part):
            found = given(z, sigma)
            return _fitting(f"the velocity of {part}", found, lambda: _velocity(backbone, found, z, sigma))

    return velocity


def _text(backbone: Any, given: Any, prompts: Any) -> Conditioning:
    fields = _of(Conditioning, given, "an rlstitch.types.Conditioning").fields
    if "tokens" not in fields:
        raise Unfit("text without tokens")
    for tensor in fields.values():
        if not isinstance(tensor, Tensor) or len(tensor) != len(prompts):
            raise Unfit(f"text that is {told(tensor)}, not one row for each of {len(prompts)} prompts")
    return given


def _too_long(backbone: Any, given: Any, prompts: Any) -> Any:
    if wrong := misfit(given, CUT):
        raise Unfit(f"something that {wrong}")
    return given


def _cut(backbone: Any, given: Any, given_z: Any, *more: Any, **options: Any) -> Any:
    """What stitching asks of a denoiser that stopped after some blocks (backbones.core.Cut)."""
    if lacking := [name for name in ("block", "grid", "detach", "rows") if not hasattr(given, name)]:
        raise Unfit(f"{told(given)}, a cut without {' and '.join(lacking)} (see rlstitch.backbones.core.Cut)")
    rows = len(given_z) if isinstance(given_z, Tensor) else None
    _tensor(given.grid, rows, getattr(backbone, "width", None), None, None, where="a cut whose grid is ")
    return given


def _encoded(backbone: Any, given: Any, images: Tensor) -> Tensor:
    return _tensor(given, len(images), *backbone.latent_shape)


def _decoded(backbone: Any, given: Any, z: Tensor) -> Tensor:
    return _tensor(given, len(z), 3, *backbone.size)


# ---------------------------------------------------------------------------------------------------- rewards that can be stitched


def _embedded(reward: Any, given: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise Unfit(f"{told(given)}, not an embedding and output tokens")
    return _tensor(given[0], len(images), None, where="an embedding that is "), _tensor(
        given[1], len(images), None, None, where="tokens that are "
    )


def _inputs(reward: Any, given: Any, images: Tensor, last: int) -> Any:
    if not isinstance(given, tuple | list) or len(given) != last:
        raise Unfit(f"{told(given)}, not the inputs of {last} blocks")
    return [_tensor(tokens, len(images), None, None, where="tokens that are ") for tokens in given]


def _anything(part: Any, given: Any, *arguments: Any, **options: Any) -> Any:
    return given


RULES: dict[str, dict[str, Callable[..., Any]]] = {
    "stop": {"steps": _steps, "draw": _draw},
    "oracle": {"__call__": _scores, "total": _total},
    "algorithm": {
        "rollout": _rollout,
        "score": _scored,
        "compare": _compared,
        "losses": _loss,
        "end_step": _anything,
        "state": _state,
        "load_state": _anything,
    },
    "model": {
        "velocity": _velocity,
        "bind": _bound,
        "encode_prompts": _text,
        "too_long": _too_long,
        "prefix": _cut,
        "extend": _cut,
        "resume": lambda backbone, given, state: _tensor(given, None, *backbone.latent_shape),
        "encode": _encoded,
        "decode": _decoded,
    },
    "reward": {
        "patches": lambda reward, given, images: _tensor(given, len(images), None, None),
        "inputs_of_block": _inputs,
        "encode": _embedded,
        "tail": lambda reward, given, j: _of(torch.nn.Module, given, "a module (tokens, cls) -> (embedding, tokens)"),
        "embed_texts": lambda reward, given, prompts: _tensor(given, len(prompts), None),
        "score_tokens": lambda reward, given, tokens, batch: _tensor(given, len(tokens)),
        "score_embedding": lambda reward, given, embedding, batch: _tensor(given, len(embedding)),
        "head_of": lambda reward, given, embedding: _tensor(given, len(embedding)),
        "fingerprint": lambda reward, given: _of(str, given, "text"),
    },
}
ATTRIBUTES = {  # of each kind: what a part says of itself once it is built, and whether it must
    "oracle": {"names": (list[str], True), "weights": (list[float], True), "differentiable": (bool, False)},
    "model": {"latent_shape": (tuple[Count, Count, Count], True), "size": (tuple[Count, Count], True), "lora_targets": (list[str], True)},
    "reward": {"differentiable": (bool, False)},
}
