"""Parts of a user's own that break their protocol: as classes, before anything is built, and in what their methods give. Every one is told in one line by its name."""

import os
import signal
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch

from rlstitch import config as cfg
from rlstitch import holding, protocols
from rlstitch.asking import PartError, ask, breakdown, inside
from rlstitch.interrupt import noted
from rlstitch.types import Batch, Conditioning, Latent, Reward, Rollout, UserError
from tests.sound_parts import KINDS, Backbone, Mine, Oracle, Stop

HERE = __name__
BATCH = Batch(["a", "b"], torch.arange(2), torch.arange(2), [{}, {}])


class Wild(BaseException):
    """Not even its message can be read."""

    def __str__(self):
        raise KeyError("no words")


def leaving(error):
    def leave(*arguments, **options):
        raise error

    return leave


EXITS = {"SystemExit: 0": SystemExit(0), "Wild": Wild(), "KeyboardInterrupt": KeyboardInterrupt(), "GeneratorExit": GeneratorExit()}


LATENT = Latent(torch.ones(2, 4, 2, 2), torch.full((2,), 0.5))
CUT = Backbone().prefix(LATENT.z, LATENT.sigma, 2)
CALLS = {  # of each method: how a job asks it
    "stop.steps": lambda part: part.steps(4),
    "stop.draw": lambda part: part.draw(4, 0),
    "oracle.__call__": lambda part: part(Latent(LATENT.z.clone().requires_grad_(True), LATENT.sigma), BATCH),
    "oracle.total": lambda part: part.total(torch.ones(2, 3, requires_grad=True)),
    "algorithm.rollout": lambda part: part.rollout(BATCH, 2),
    "algorithm.score": lambda part: part.score(Rollout(BATCH, LATENT)),
    "algorithm.compare": lambda part: part.compare([], torch.ones(2, 3), torch.arange(2)),
    "algorithm.losses": lambda part: list(part.losses(Rollout(BATCH, LATENT))),
    "algorithm.state": lambda part: part.state(),
    "algorithm.end_step": lambda part: part.end_step(1),
    "model.velocity": lambda part: part.velocity(LATENT.z, LATENT.sigma, None),
    "model.bind": lambda part: part.bind(None)(LATENT.z, LATENT.sigma),
    "model.encode_prompts": lambda part: part.encode_prompts(["a", "b"]),
    "model.too_long": lambda part: part.too_long(["a", "b"]),
    "model.prefix": lambda part: part.prefix(*vars(LATENT).values(), 2),
    "model.extend": lambda part: part.extend(CUT, 3),
    "model.resume": lambda part: part.resume(CUT),
    "model.encode": lambda part: part.encode(torch.zeros(2, 3, 4, 4)),
    "model.decode": lambda part: part.decode(LATENT.z),
    "reward.breakdown": lambda part: breakdown("mine", part, torch.ones(2), [{}, {}]),
    "reward.score": lambda part: ask("mine", part, torch.ones(2, 3, 4, 4), BATCH),
}  # fmt: skip
ones = torch.ones
tracked = lambda *shape: torch.ones(*shape, requires_grad=True)  # noqa: E731
NONSENSE = [
    None,
    3,
    "x",
    [],
    {},
    object(),
    ones(2, 9),
    ones(2, 3).bool(),
    ones(2, 3).to_sparse(),
    ones(2, 3, device="meta"),
    ones(2, 3) * 1j,
]
FITTING = {"algorithm.state": dict, "algorithm.losses": list | dict, "model.too_long": list, "stop.draw": int}  # of it
WRONG = {  # beyond nonsense, which fits nothing: what each method must not give
    "stop.steps": [range(0), range(0, 3), range(2, 9), [2, 3], range(4, -1, -1)],
    "stop.draw": [1, 5, 0, -1, 2.0, True, torch.tensor(2), float("nan")],
    "oracle.__call__": [ones(2), ones(1, 3), ones(2, 1), ones(2, 3).int(), ones(2, 3)],  # the last without the gradient that it promises
    "oracle.total": [tracked(2, 1), tracked(1), tracked(()), ones(2)],
    "algorithm.rollout": [Rollout(BATCH[:1], LATENT), Rollout(BATCH, Latent(ones(3, 4, 2, 2), ones(3))), Rollout(BATCH, Latent(LATENT.z, ones(1))), Rollout(None, None)],
    "algorithm.score": [ones(2), ones(2, 2), ones(1, 3)],
    "algorithm.compare": [ones(2), (ones(2),), (ones(3), {}), (ones(2), {"step": 1.0}), (ones(2), {"x": "y"}), (ones(2), None)],
    "algorithm.losses": [[None], [ones(2)], [(ones(()), {})], [(tracked(2), {})], [(tracked(()), {"x": "y"})], [(tracked(()), {"rewards": 1.0})], [(tracked(()), None)], [(1.0, {})]],
    "algorithm.state": [{"x": 1}, {1: ones(1)}, {"x": ones(1, device="meta")}, [ones(1)]],
    "model.velocity": [ones(1, 4, 2, 2), ones(2, 4, 2, 1), ones(2, 4, 2, 2).int(), ones(2, 4, 2, 2).double(), ones(2, 4, 2, 2).to_sparse()],
    "model.bind": [lambda z, sigma: ones(1, 4, 2, 2), lambda z, sigma: None, lambda z: z, leaving(SystemExit(0))],
    "model.encode_prompts": [Conditioning(tokens=ones(1, 3, 2), pooled=ones(1, 2)), Conditioning(tokens=None, pooled=None), Conditioning(pooled=ones(2, 2)), ones(2, 3)],
    "model.too_long": [[1], [("a", 1)], [("a", 30, 20.5)]],
    "model.prefix": [SimpleNamespace(block=2, grid=ones(2, 5, 2, 2)), replace(CUT, returned=ones(1, 4, 5)), replace(CUT, returned=ones(2, 4, 6))],
    "model.extend": [replace(CUT, returned=ones(2, 4, 6)), replace(CUT, picture=lambda returned, z: None)],
    "model.resume": [ones(2, 4, 2, 3), ones(2, 3, 2, 2)],
    "model.encode": [ones(1, 4, 2, 2), ones(2, 4, 4, 4)],
    "model.decode": [ones(1, 3, 4, 4), ones(2, 4, 4, 4), ones(2, 3, 8, 8), ones(2, 3, 4, 4, dtype=torch.uint8)],
    "reward.breakdown": [{"red": 1.0}, {"overall": None}, {"overall": "x"}, {"overall": True}, {"overall": ones(1)}, {1: 2.0, "overall": 1.0}],
    "reward.score": [ones(1), ones(2, 1), ones(2).to_sparse(), ones(2, device="meta")],
}  # fmt: skip
FINE = {  # what each may give, and what comes of it
    "stop.steps": [(range(4, 1, -1), range(2, 5)), (range(1, 5, 2), range(1, 4, 2)), (range(2, 3), range(2, 3))],
    "oracle.total": [(tracked(2), None)],
    "algorithm.losses": [([(tracked(()), {"x": 2, "y": ones(2)})], None), ([], [])],
    "algorithm.compare": [((ones(2, 3), {"x": ones(()), "y": 1}), None), ([ones(2), {}], None)],
    "model.velocity": [(ones(2, 4, 2, 2).bfloat16(), None)],
    "reward.breakdown": [({"overall": float("nan")}, None)],
    "reward.score": [(ones(2).double(), None)],
}


def giving(method, act):
    """A sound class of the method's kind but for this method."""
    kind, _, name = method.partition(".")
    return kind, type("Own", (KINDS[kind],), {name: act, "__module__": HERE})


@pytest.mark.parametrize("method", CALLS)
def test_what_a_method_must_not_give_is_told_by_its_name(method):
    kind, _, name = method.partition(".")
    CALLS[method](holding.built(kind, KINDS[kind]))  # the sound one passes
    said = "'mine'" if kind == "reward" else f"{HERE}.Own"
    nonsense = () if name in ("end_step", "load_state") else [n for n in NONSENSE if not isinstance(n, FITTING.get(method, ()))]
    for wrong in [*nonsense, *WRONG.get(method, [])]:
        kind, own = giving(method, lambda *a, wrong=wrong, **k: wrong)
        assert not protocols.unfit(kind, own)
        with pytest.raises(PartError) as error:
            CALLS[method](holding.built(kind, own))
        assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400, (wrong, error.value)
    for fine, becomes in FINE.get(method, []):
        kind, own = giving(method, lambda *a, fine=fine, **k: fine)
        found = CALLS[method](holding.built(kind, own))
        assert becomes is None or found == becomes
    for told, leave in EXITS.items():
        kind, own = giving(method, leaving(leave))
        with noted([]), pytest.raises(PartError) as error:
            CALLS[method](holding.built(kind, own))
        assert said in str(error.value) and told in str(error.value)


def test_a_part_keeps_its_class_and_ours_are_not_touched():
    stop = holding.built("stop", Stop)
    assert (
        isinstance(stop, Stop)
        and type(stop).__qualname__ == "Stop"
        and type(cfg.build({"_target_": "rlstitch.stops.End"}, kind="stop")).__mro__[1] is object
    )
    for wrong, said in (
        ({"names": ["a"]}, "1 names and 3 weights"),
        ({"weights": None}, "its weights must be a list"),
        ({"names": [1]}, "must be text"),
    ):

        def init(self, wrong=wrong):
            Oracle.__init__(self)
            self.__dict__ |= wrong

        with pytest.raises(PartError, match=f"{HERE}.Own.*{said}"):
            holding.built("oracle", type("Own", (Oracle,), {"__init__": init, "__module__": HERE}))
    nameless = type("Own", (Oracle,), {"__init__": lambda self: None, "__module__": HERE})
    with pytest.raises(PartError, match="has no names, which oracles say"):
        holding.built("oracle", nameless)


# ---------------------------------------------------------------------------------------------------- classes, before they are built


class Meta(type):
    def __getattribute__(cls, name):
        if name in ("learns_from", "differentiable", "parts", "sigma_range", "steps"):
            raise SystemExit(0)
        return super().__getattribute__(name)


SAYING = {  # what a class says of itself: fits or not
    "algorithm": {"learns_from": ["x", None, 3, property(lambda self: "prompts")], "needs_oracle": [None, 1, "x"], "collects": ["yes"], "backwards": [None, 1], "faults": [None, 3, lambda self, options, stops: []]},
    "reward": {"differentiable": [None, 1, "yes"], "unreadable": [3, lambda self, rows: "", "x"], "lacking": [3, lambda rows: ""], "alone": [True, 3], "handling": ["x", 1], "cut_prompts": [3, lambda self, options, prompts: []], "faults": [lambda self, options: [], 1]},
    "model": {"parts": [3, "transformer", (1, 2)], "cut_prompts": [3], "image_tokens_of": [3], "faults": [3]},
    "oracle": {"sigma_range": [None, 1.0, (1,), ("a", "b"), (0.0, float("nan"))], "differentiable": ["x"]},
    "stop": {"steps": [None, 3], "draw": [lambda self: 1]},
}  # fmt: skip
ANSWERS = {  # of what is asked of a class: what it must not give
    ("algorithm", "backwards"): [None, 0, -1, 1.5, True, "x"],
    ("algorithm", "faults"): [None, "x", [1]],
    ("reward", "unreadable"): [None, 1, []],
    ("reward", "lacking"): [None, []],
    ("reward", "cut_prompts"): [None, [1], [("a", 1)], [("a", "b", "c")]],
    ("reward", "faults"): [None, ["x"], [("a",)]],
    ("model", "image_tokens_of"): [None, 0, 2.5],
    ("model", "setting"): [None, (1, 2), (0, 1, 1.0), (1, 1, -1.0)],
    ("model", "parameter_counts"): [None, {"lora": "x"}, 3],
}


@pytest.mark.parametrize("kind", SAYING)
def test_what_a_class_says_of_itself_is_looked_at_before_it_is_used(kind, monkeypatch):
    def faults(own):
        monkeypatch.setitem(globals(), "Own", own)
        return cfg.check_part("here", {"_target_": f"{HERE}.Own"}, kind=kind)

    assert not faults(KINDS[kind])
    for name, values in SAYING[kind].items():
        for value in values:
            (fault,) = faults(type("Own", (KINDS[kind],), {name: value, "__module__": HERE}))
            assert fault.startswith(f"'here': {HERE}.Own is not") and name in fault and "\n" not in fault, (name, value, fault)
    if kind != "stop":  # which says nothing of itself
        (fault,) = faults(Meta("Own", (KINDS[kind],), {"__module__": HERE}))
        assert "cannot be looked at" in fault and "SystemExit: 0" in fault
    signed = type("Own", (KINDS[kind],), {"__signature__": 3, "__module__": HERE})
    assert "cannot be looked at" in faults(signed)[0]
    if kind != "algorithm":  # what may be known later is believed until then
        late = {
            name: descriptor
            for name in SAYING[kind]
            if name in protocols.SAID.get(kind, {})
            for descriptor in (property(lambda self: True), cached_property(lambda self: True))
        }
        assert not faults(type("Own", (KINDS[kind],), late | {"__module__": HERE}))


@pytest.mark.parametrize("kind,name", ANSWERS)
def test_what_is_asked_of_a_class_is_held_to_its_type(kind, name):
    count = protocols.STATIC[kind][name][0]
    for act, said in [
        *((lambda *a, v=v: v, "gave") for v in ANSWERS[kind, name]),
        (leaving(SystemExit(0)), "SystemExit: 0"),
        (leaving(UserError("so")), "so"),
    ]:
        own = type("Own", (KINDS[kind],), {name: staticmethod(act), "__module__": HERE})
        with pytest.raises(PartError, match=rf"{HERE}\.Own\.{name}.*{said}"):
            protocols.asked(kind, own, name, *[{}] * count)
    kept = {"a": [1]}
    own = type("Own", (KINDS[kind],), {name: staticmethod(lambda *a: a[0]["a"].clear()), "__module__": HERE})
    with pytest.raises(PartError):
        protocols.asked(kind, own, name, *[kept] * count)
    assert kept == {"a": [1]}  # it was given a copy


def test_protocols_and_abstract_classes_are_no_parts():
    for kind, target in (
        ("reward", "rlstitch.types.Reward"),
        ("oracle", "rlstitch.types.Oracle"),
        ("algorithm", "rlstitch.types.Algorithm"),
        ("stop", "rlstitch.stops.Stop"),
        ("model", "rlstitch.types.Backbone"),
    ):
        (fault,) = cfg.check_part("here", {"_target_": target}, kind=kind)
        assert "protocol" in fault
    unfinished = type("Own", (Reward,), {"__module__": HERE})
    assert "no score(2 arguments)" in protocols.unfit("reward", unfinished)


# ---------------------------------------------------------------------------------------------------- what all parts share


def test_what_all_parts_share_is_put_back_and_told(tmp_path):
    changes = {
        "default dtype": lambda: torch.set_default_dtype(torch.float64),
        "gradients": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
        "default device": lambda: torch.set_default_device("meta"),
        "autocast": lambda: torch.set_autocast_enabled("cpu", True),
        "working directory": lambda: os.chdir(tmp_path),
    }
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device(), os.getcwd()
    for said, change in changes.items():
        for more in (lambda: None, leaving(KeyError("x"))):
            with (
                pytest.raises(PartError, match=said if more() is None else "KeyError")
                if more.__name__ == "<lambda>"
                else pytest.raises(PartError, match="KeyError")
            ):
                with inside("reward 'mine'"):
                    change()
                    more()
            assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device(), os.getcwd()) == before
            assert not torch.is_autocast_enabled("cpu")
    kind, own = giving("algorithm.losses", leaking)
    with pytest.raises(PartError, match="Own.losses changed whether gradients are recorded"):
        next(holding.built(kind, own).losses(Rollout(BATCH, LATENT)))


def leaking(self, rollout, *compared):
    loss = self.weight.sum()
    with torch.no_grad():
        yield loss, {}


def test_ctrl_c_stays_what_it_is_where_it_can_only_be_that():
    for run in (inside("mine"), protocols.naming()):
        with pytest.raises(KeyboardInterrupt):
            with run:
                signal.raise_signal(signal.SIGINT)


def test_what_is_kept_of_a_part_is_kept_by_its_code(backbone):
    assert protocols.code_of(backbone) == ""
    own = holding.built("model", Backbone)
    assert protocols.code_of(own) == protocols.code_of(Backbone()) != protocols.code_of(Mine())
