"""Prompts of the `shapes` world: GenEval's six classes, full captions, and the one language of facts that both scenes and detections are judged in.

`FactTable` says what a picture holds, `PromptTable` what a prompt asks for; `met(facts, prompts)` compares them, whether the facts come from
the renderer (the truth) or from the detector (what a generated picture shows).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rlstitch.shapes.scenes import COLOURS, MAX_OBJECTS, RELATIONS, SHAPES, Scenes, dress, relation_holds
from rlstitch.types import UserError

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an image of {}")
BACKGROUNDS = ("", " on a dark background", " on a light background")
ANY_SHAPE, ANY_COLOUR = len(SHAPES), len(COLOURS)
# What an object of a prompt file may say; a detector finds no more than eight.
FACTS = {"shape": (None, *SHAPES), "colour": (None, *COLOURS), "count": range(1, 9), "exact": (False, True)}


@dataclass(frozen=True)
class Need:
    """At least `count` objects of this shape and colour (None: any); exactly `count` where `exact`."""

    shape: str | None
    colour: str | None = None
    count: int = 1
    exact: bool = False


@dataclass(frozen=True)
class Prompt:
    text: str
    kind: str
    needs: tuple[Need, ...]
    relation: str | None = None  # between the shapes of needs 0 and 1
    total: int | None = None  # all objects in the picture; full captions only
    dark: bool | None = None  # the background; full captions only

    def to_json(self) -> dict:
        objects = [{"shape": n.shape, "colour": n.colour, "count": n.count, "exact": n.exact} for n in self.needs]
        return {"prompt": self.text, "kind": self.kind, "objects": objects, "relation": self.relation}

    @classmethod
    def from_json(cls, row: dict) -> Prompt:
        """A row of a prompt file. Raises UserError where a fact is missing or says nothing about this world."""
        objects, relation, known = row.get("objects"), row.get("relation"), {"kind": KINDS, "relation": (None, *RELATIONS)}
        if not isinstance(objects, list) or not 0 < len(objects) <= MAX_OBJECTS or not all(isinstance(o, dict) for o in objects):
            raise UserError(f"'objects' of '{row['prompt']}' must list 1 to {MAX_OBJECTS} objects, not {objects!r:.80}")
        asked = [(key, known[key], row.get(key)) for key in known]
        for o in objects:
            asked += [(key, values, o.get(key, "nothing")) for key, values in FACTS.items()]
        for key, values, value in asked:
            if value not in values:
                raise UserError(f"'{key}' of '{row['prompt']}' must be one of {', '.join(map(str, values))}, not {value!r:.80}")
        needs = tuple(Need(o["shape"], o["colour"], int(o["count"]), bool(o["exact"])) for o in objects)
        if relation and (len(needs) < 2 or None in (needs[0].shape, needs[1].shape)):
            raise UserError(f"'relation' of '{row['prompt']}' is {relation}, which takes two objects with a shape")
        return cls(row["prompt"], row["kind"], needs, relation)


def noun(shape: str, colour: str | None, count: int) -> str:
    words = shape if colour is None else f"{colour} {shape}"
    if count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{NUMBERS[count]} {words}{'es' if shape == 'cross' else 's'}"


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def core(kind: str, needs: tuple[Need, ...], relation: str | None) -> str:
    parts = [noun(n.shape, n.colour, n.count) for n in needs]
    return f"{parts[0]} {relation} {parts[1]}" if kind == "position" else join(parts)


def draw_prompt(rng: random.Random, kind: str | None = None) -> Prompt:
    """A prompt of one of GenEval's classes (drawn at random unless named) with a template and, at times, a background."""
    kind = kind or rng.choice(KINDS)
    a, b = rng.sample(SHAPES, 2)
    relation = None
    if kind == "single_object":
        needs = (Need(a),)
    elif kind == "two_object":
        needs = (Need(a), Need(b))
    elif kind == "counting":
        needs = (Need(a, None, rng.choice((2, 3, 4)), exact=True),)
    elif kind == "colors":
        needs = (Need(a, rng.choice(COLOURS)),)
    elif kind == "position":
        needs, relation = (Need(a), Need(b)), rng.choice(RELATIONS)
    else:
        first, second = rng.sample(COLOURS, 2)
        needs = (Need(a, first), Need(b, second))
    text = rng.choice(TEMPLATES).format(core(kind, needs, relation)) + rng.choice(BACKGROUNDS)
    return Prompt(text, kind, needs, relation)


def scenes_for(prompts: list[Prompt], seed: int) -> Scenes:
    """One scene a prompt that meets it: the required objects and no other, the rest of their looks drawn at random."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = torch.full((len(prompts), MAX_OBJECTS), -1)
    colour, dark = shape.clone(), torch.zeros(len(prompts), dtype=torch.bool)
    relation = torch.full((len(prompts),), -1)
    for row, prompt in enumerate(prompts):
        shared = rng.choice(COLOURS) if rng.random() < 0.5 else None
        objects = [
            (n.shape, n.colour or (shared if n.count > 1 and shared else rng.choice(COLOURS))) for n in prompt.needs for _ in range(n.count)
        ]
        for k, (s, c) in enumerate(objects):
            shape[row, k], colour[row, k] = SHAPES.index(s), COLOURS.index(c)
        if prompt.relation is not None:
            relation[row] = RELATIONS.index(prompt.relation)
        dark[row] = " dark " in prompt.text or (" light " not in prompt.text and rng.random() < 0.5)
    return dress(shape, colour, dark, generator, relation=relation)


def full_captions(scenes: Scenes, rng: random.Random) -> list[Prompt]:
    """Captions that specify shape, colour and number of all objects and the background; groups in random order."""
    out = []
    for shapes, colours, dark in zip(scenes.shape.tolist(), scenes.colour.tolist(), scenes.dark.tolist()):
        groups: dict[tuple[int, int], int] = {}
        for s, c in zip(shapes, colours):
            if s >= 0:
                groups[s, c] = groups.get((s, c), 0) + 1
        items = list(groups.items())
        rng.shuffle(items)
        needs = tuple(Need(SHAPES[s], COLOURS[c], n, exact=True) for (s, c), n in items)
        text = join([noun(n.shape, n.colour, n.count) for n in needs]) + BACKGROUNDS[1 if dark else 2]
        out.append(Prompt(text, "full", needs, total=sum(groups.values()), dark=dark))
    return out


# ---------------------------------------------------------------------------------------------------------------- facts


@dataclass
class FactTable:
    """What N pictures hold. `counts` [N, S+1, C+1], last index = any; `relations` [N, 4, S, S] bool; `dark` [N] bool."""

    counts: Tensor
    relations: Tensor
    dark: Tensor

    @classmethod
    def from_objects(cls, shape: Tensor, colour: Tensor, centre: Tensor, dark: Tensor) -> FactTable:
        """shape, colour [N, K] (-1: none, or an unknown shape or colour), centre [N, K, 2]."""
        n, k = shape.shape
        s_known, c_known = shape >= 0, colour >= 0
        exists = s_known | c_known
        counts = torch.zeros(n, ANY_SHAPE + 1, ANY_COLOUR + 1, dtype=torch.long)
        rows = torch.arange(n)[:, None].expand(n, k)
        s, c = shape.clamp(min=0), colour.clamp(min=0)
        for si, ci, ok in (
            (s, c, s_known & c_known),
            (s, torch.full_like(c, ANY_COLOUR), s_known),
            (torch.full_like(s, ANY_SHAPE), c, c_known),
            (torch.full_like(s, ANY_SHAPE), torch.full_like(c, ANY_COLOUR), exists),
        ):
            counts.index_put_((rows[ok], si[ok], ci[ok]), torch.ones(int(ok.sum()), dtype=torch.long), accumulate=True)
        relations = torch.zeros(n, len(RELATIONS), len(SHAPES), len(SHAPES), dtype=torch.bool)
        holds = relation_holds(centre[:, :, None], centre[:, None, :])  # [N, K, K, 4]
        pairs = s_known[:, :, None] & s_known[:, None, :] & ~torch.eye(k, dtype=torch.bool)
        i, a, b, r = torch.nonzero(holds & pairs[..., None], as_tuple=True)
        relations[i, r, shape[i, a], shape[i, b]] = True
        return cls(counts, relations, dark)

    @classmethod
    def from_scenes(cls, scenes: Scenes) -> FactTable:
        return cls.from_objects(scenes.shape, scenes.colour, scenes.centre, scenes.dark)

    def __getitem__(self, index) -> FactTable:
        return FactTable(self.counts[index], self.relations[index], self.dark[index])


@dataclass
class PromptTable:
    """What M prompts ask for, as tensors: `needs` [M, 4, 4] of (shape, colour, count, exact), `relation` [M, 3], `total` and `dark` [M] (-1: not asked)."""

    needs: Tensor
    relation: Tensor
    total: Tensor
    dark: Tensor
    kinds: list[str] = field(default_factory=list)

    @classmethod
    def from_prompts(cls, prompts: list[Prompt]) -> PromptTable:
        needs = torch.zeros(len(prompts), MAX_OBJECTS, 4, dtype=torch.long)
        relation = torch.full((len(prompts), 3), -1)
        total, dark = torch.full((len(prompts),), -1), torch.full((len(prompts),), -1)
        for row, p in enumerate(prompts):
            for k, n in enumerate(p.needs):
                s = ANY_SHAPE if n.shape is None else SHAPES.index(n.shape)
                c = ANY_COLOUR if n.colour is None else COLOURS.index(n.colour)
                needs[row, k] = torch.tensor([s, c, n.count, int(n.exact)])
            if p.relation is not None:
                relation[row] = torch.tensor([RELATIONS.index(p.relation), SHAPES.index(p.needs[0].shape), SHAPES.index(p.needs[1].shape)])
            total[row] = -1 if p.total is None else p.total
            dark[row] = -1 if p.dark is None else int(p.dark)
        return cls(needs, relation, total, dark, [p.kind for p in prompts])


def fractions(facts: FactTable, prompts: PromptTable, *, paired: bool = True) -> Tensor:
    """Share of each prompt's requirements that hold, in [0, 1]: [N] for picture i against prompt i, or [N, M] for all pairs."""
    counts, relations, is_dark = facts.counts, facts.relations, facts.dark.long()
    n = len(counts)
    rows = torch.arange(n) if paired else torch.arange(n)[:, None]

    def align(x: Tensor) -> Tensor:
        return x if paired else x[None]

    held, asked = torch.zeros(()), torch.zeros(())
    for k in range(MAX_OBJECTS):
        s, c, count, exact = (align(x) for x in prompts.needs[:, k].unbind(-1))
        seen = counts[rows, s, c]
        ok = torch.where(exact.bool(), seen == count, seen >= count)
        held, asked = held + (ok & (count > 0)).float(), asked + (count > 0).float()
    r, a, b = (align(x) for x in prompts.relation.unbind(-1))
    wanted = r >= 0
    held = held + (relations[rows, r.clamp(min=0), a.clamp(min=0), b.clamp(min=0)] & wanted).float()
    asked = asked + wanted.float()
    for want, have in ((align(prompts.total), counts[:, ANY_SHAPE, ANY_COLOUR]), (align(prompts.dark), is_dark)):
        have = have if paired else have[:, None]
        held, asked = held + ((want == have) & (want >= 0)).float(), asked + (want >= 0).float()
    return held / asked


def met(facts: FactTable, prompts: PromptTable, *, paired: bool = True) -> Tensor:
    """Whether every requirement holds (GenEval's rule; counting is exact): bool [N] or [N, M]."""
    return fractions(facts, prompts, paired=paired) == 1


# ---------------------------------------------------------------------------------------------------------------- splits

SPLIT_SIZES = {"train": 768, "held_out": 384}


def make_splits(seed: int = 0) -> dict[str, list[Prompt]]:
    """Disjoint prompt sets, equally many of each class. Where a class has enough facts, the facts are disjoint too, not only the wording."""
    rng = random.Random(seed)
    splits: dict[str, list[Prompt]] = {name: [] for name in SPLIT_SIZES}
    for kind in KINDS:
        owner: dict[tuple, str] = {}
        seen: set[str] = set()
        sizes = {name: size // len(KINDS) for name, size in SPLIT_SIZES.items()}
        by_facts = kind in ("two_object", "colors", "position", "color_attr")
        if kind == "single_object":  # 72 different prompts exist: two thirds for training
            sizes = {"train": 48, "held_out": 24}
        got = {name: 0 for name in splits}
        while any(got[name] < sizes[name] for name in splits):
            prompt = draw_prompt(rng, kind)
            if prompt.text in seen:
                continue
            pick = "held_out" if rng.random() < 1 / 3 else "train"
            name = owner.setdefault((prompt.needs, prompt.relation), pick) if by_facts else pick
            if got[name] < sizes[name]:
                got[name] += 1
                seen.add(prompt.text)
                splits[name].append(prompt)
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def read_prompts(path: Path) -> list[Prompt]:
    return [Prompt.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    path.write_text("".join(json.dumps(p.to_json()) + "\n" for p in prompts), encoding="utf-8")
