"""The value-model evaluation: every value model and its rivals, by reward and noise level; JSON, a table laid out like the paper's Table 5, plots like Figure 2. On any
number of ranks, which share out what is asked: the figures are the same.

`launch/evaluate_value.py` runs it from a recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import config as cfg
from rlstitch import lengths, scheduler
from rlstitch.data import build_captioned, build_measured, read_prompts
from rlstitch.distributed import Engine
from rlstitch.files import write_json, write_text
from rlstitch.metrics import interleaved, peak_megabytes
from rlstitch.part_checks import attempt, class_of, part_faults, unknown_rewards, unread
from rlstitch.parts import Parts, at_hand
from rlstitch.paths import ready
from rlstitch.prompts import PromptSet
from rlstitch.ranges import AutoShift, GridSteps, Name, NotEmpty, Range, Text, Threads
from rlstitch.report import line_plot
from rlstitch.stitch import measure
from rlstitch.stitch.distill import latents_of, outputs_of
from rlstitch.stitch.measure import Reference, Subject
from rlstitch.stitch.model import StitchedValueModel, read_card
from rlstitch.telling import say
from rlstitch.types import Conditioning, Latent

RIVALS = ("tweedie_prompt", "tweedie_null", "monte_carlo")


@dataclass
class CalibrationConfig:
    """Latents of the policy itself: `count` prompts walked to every level, each finished `rollouts` times (and `extra` more for Monte Carlo's own row)."""

    prompts: Text = "shapes:held_out.jsonl"
    column: str = ""
    count: Annotated[int, Range(2, 100_000, why="correlations need several")] = 48
    rollouts: Annotated[int, Range(1, 10_000)] = 16
    extra: Annotated[int, Range(1, 10_000)] = 4
    num_steps: GridSteps = 20
    shift: AutoShift = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


@dataclass
class CompareConfig:
    """compare: reward -> {row name: value model}. rivals: which of tweedie_prompt, tweedie_null, monte_carlo stand beside them.

    held_out: pictures with distinct captions, or several each, for Recall@1; pairs, graded: reward -> part that gives preference pairs, or pictures with a truth to rank by.
    """

    name: Name = ""
    out: Text = "values"
    threads: Threads = 0
    check: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Text] = field(default_factory=dict)
    compare: dict[str, Any] = field(default_factory=dict)
    rivals: list[Literal["tweedie_prompt", "tweedie_null", "monte_carlo"]] = field(default_factory=lambda: list(RIVALS))
    held_out: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    graded: dict[str, Any] = field(default_factory=dict)
    sigmas: Annotated[list[Annotated[float, Range(0, 1, open="both")]], NotEmpty()] = field(default_factory=lambda: list(measure.SIGMAS))
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    timing_batch: Annotated[int, Range(1, 10_000)] = 32
    timing_repeats: Annotated[int, Range(1, 10_000)] = 5


def checked(given: dict[str, Any], name: str) -> CompareConfig:
    """The typed recipe, or one UserError that lists every fault."""
    cfg.for_launcher(given, "evaluate_value.py", name)
    config, faults = cfg.fill(CompareConfig, given)
    faults += part_faults(config) + unknown_rewards("compare", list(config.compare), config.rewards)
    scheduler.of_recipe("calibration.shift", config.calibration.shift, config.model, faults)
    prompts = lengths.fitting(faults, "calibration.prompts", config.calibration.prompts, config.calibration.column, config.model)
    if prompts is not None:
        faults += unread(
            "compare", config.compare, config.rewards, prompts, "take prompts that it reads (calibration.prompts), or leave it out"
        )
    for where, nodes in (("held_out", {"": config.held_out}), ("pairs", config.pairs), ("graded", config.graded)):
        for key, node in nodes.items():
            kind = ("images" if class_of(node, "captioned") is None else "captioned") if where == "held_out" else where
            faults += cfg.check_part(f"{where}.{key}".rstrip("."), node, kind=kind)
    for reward, rows in config.compare.items():
        if not isinstance(rows, dict) or not rows:
            faults.append(f"'compare.{reward}' must give rows and their value models, e.g. {{StitchVM: shapes:value_clip}}")
            continue
        for row, path in rows.items():
            attempt(faults, f"compare.{reward}.{row}", read_card, path)
    cfg.named(config, name, faults)
    if faults:
        raise cfg.report(faults, name)
    return checked(given, name) if at_hand(config) else config


def _merge(rows: dict[str, dict], more: dict[str, dict]) -> None:
    for level, figures in more.items():
        rows.setdefault(level, {}).update({k: round(v, 4) for k, v in figures.items()})


class Comparison:
    """Builds denoiser and held-out data once; `measure_reward` fills one reward's rows."""

    def __init__(self, config: CompareConfig):
        self.config, c = config, config.calibration
        self.engine = Engine(zero_stage=0, precision=c.precision, accumulation=1, micro_batch=1, clip_norm=1.0)
        self.engine.where = lambda: "measuring"
        if config.threads:
            torch.set_num_threads(config.threads)  # of which accelerate has an opinion, too
        self.parts = Parts.of(config.model, {name: config.rewards[name] for name in config.compare}, engine=self.engine)
        self.backbone, self.rewards, self.device = self.parts.backbone, self.parts.rewards, self.parts.device
        self.held, self.told = build_captioned("held_out", config.held_out, any(map(measure.embeds_text, self.rewards.values())))
        self.captions = [own[0] for own in self.told]
        self._tell_cut("held_out", self.captions)
        self.latents = self._latents(self.held)
        self.text = self._text(self.captions)
        prompts = read_prompts(c.prompts, c.column)
        step = max(1, len(prompts) // c.count)  # spread over the file, whose classes stand together
        index = list(range(0, len(prompts), step))[: c.count]
        [known] = self.parts.encoded(prompts, allow="")
        self.prompts = known.batch(index, torch.tensor(index))
        self.parts.probe(self.rewards, self.prompts[:1].interleave(2))

    def _latents(self, images: Tensor) -> Tensor:
        """Clean latents [N, C, H, W] of pictures."""
        return measure.shared(lambda _, rows: latents_of(self.backbone, images[rows]), len(images), engine=self.engine)[0]

    def _outputs(self, reward: Any, images: Tensor) -> Tensor:
        """What the reward reads its score of clean pictures from [N, ...]."""
        return measure.shared(lambda _, rows: outputs_of(reward, images[rows]), len(images), engine=self.engine)[0]

    def _text(self, prompts: list[str]) -> Conditioning:
        """Text of all prompts, cut where they are too long."""
        [encoded] = self.parts.encoded(PromptSet(prompts, [{}] * len(prompts)), truncate=True)
        return encoded.batch(list(range(len(prompts))), torch.arange(len(prompts))).text

    def _tell_cut(self, where: str, prompts: list[str]) -> None:
        """Say how many prompts of a set go beyond what the denoiser's encoders and the rewards read."""
        cut = self.backbone.too_long(prompts)
        told = (
            [
                f"the model reads the first {cut[0][2]} tokens of a prompt: {len(cut)} of {len(prompts)} are longer, and it does not see their ends"
            ]
            if cut
            else []
        )
        say(*(f"'{where}': {line}" for line in told + lengths.unread({n: self.config.rewards[n] for n in self.rewards}, prompts)))

    def subjects(self, reward: str, built: Any) -> list[Subject]:
        out = [
            measure.stitched(row, StitchedValueModel.from_pretrained(path, backbone=self.backbone, reward=built))
            for row, path in self.config.compare[reward].items()
        ]
        if "tweedie_null" in self.config.rivals:
            out.append(measure.tweedie("Tweedie (null text)", self.backbone, built, prompt=False))
        if "tweedie_prompt" in self.config.rivals:
            out.append(measure.tweedie("Tweedie (true prompt)", self.backbone, built, prompt=True))
        return out

    @cached_property
    def references(self) -> dict[str, Reference]:
        """The policy's own latents, finished once and scored by every reward that is compared."""
        c = self.config.calibration
        return measure.references(
            self.backbone,
            self.rewards,
            self.prompts,
            rollouts=c.rollouts + c.extra,
            sigmas=self.config.sigmas,
            num_steps=c.num_steps,
            shift=c.shift,
            precision=c.precision,
            engine=self.engine,
        )

    def measure_reward(
        self, name: str, extra: Callable[[Any], list[Subject]] | None = None, say: Callable[[str], None] = say
    ) -> dict[str, Any]:
        """{rows: {subject: {sigma: figures}}, clean: figures, cost: {subject: seconds and megabytes a query}} of one reward."""
        config, reward, references, engine = self.config, self.rewards[name], self.references, self.engine
        subjects = self.subjects(name, reward) + (extra(reward) if extra else [])
        rows: dict[str, dict[str, dict[str, float]]] = {s.name: {} for s in subjects}
        clean, by_text = {}, measure.embeds_text(reward)
        if by_text:
            told, text_of = measure.flattened(self.told)
            clean |= measure.recalls(self._outputs(reward, self.held), reward.embed_texts(told), text_of)
        pairs = build_measured(f"pairs.{name}", config.pairs[name], "pairs") if name in config.pairs else None
        graded = build_measured(f"graded.{name}", config.graded[name], "graded") if name in config.graded else None
        if pairs:
            both, pair_prompts, first_wins = pairs
            self._tell_cut(f"pairs.{name}", pair_prompts)
            sides = tuple(self._latents(side) for side in both)
            pair_text = self._text(pair_prompts)
            a, b = (measure.scored(reward, self._outputs(reward, side), pair_prompts) for side in both)
            clean["pair_accuracy"] = float(((a > b).cpu() == first_wins).float().mean())
        if graded:
            (looks,), look_prompts, truth = graded
            graded_latents, graded_text = self._latents(looks), self._text(look_prompts)
            found = measure.scored(reward, self._outputs(reward, looks), look_prompts)
            clean["srcc"] = measure.srcc(found.cpu(), truth)
        c = config.calibration
        for subject in subjects:
            say(f"{name}: {subject.name}")
            if by_text and subject.output is not None:
                asked = reward, self.latents, self.captions, self.text, config.sigmas, self.told
                _merge(rows[subject.name], measure.retrieval(subject, *asked, engine))
            if pairs:
                _merge(
                    rows[subject.name], measure.pair_accuracy(subject, sides, pair_prompts, first_wins, pair_text, config.sigmas, engine)
                )
            if graded:
                _merge(
                    rows[subject.name],
                    measure.rank_agreement(subject, graded_latents, truth, look_prompts, graded_text, config.sigmas, engine),
                )
            _merge(rows[subject.name], measure.calibrations(subject, references, name, c.rollouts, engine))
        if "monte_carlo" in config.rivals:
            for n in (1, c.extra):
                rows[f"Monte Carlo, {n} rollout{'s' * (n > 1)}"] = {}
                _merge(rows[f"Monte Carlo, {n} rollout{'s' * (n > 1)}"], measure.monte_carlo_calibrations(n, references, name, c.rollouts))
        cost = json.loads(engine.by_main(lambda: json.dumps(self.cost(subjects))))  # while nobody else is at work
        return {"rows": rows, "clean": {k: round(v, 4) for k, v in clean.items()}, "cost": cost}

    def cost(self, subjects: list[Subject]) -> dict[str, dict[str, float]]:
        """Seconds and peak megabytes of one query of a batch, with and without gradient, all in one run."""
        n = self.config.timing_batch
        batch = self.prompts[: min(n, len(self.prompts))]
        batch = batch.interleave(-(-n // len(batch)))[:n]
        z = torch.randn(n, *self.backbone.latent_shape, generator=torch.Generator().manual_seed(0)).to(self.backbone.device)
        sigma = torch.full((n,), 0.5, device=z.device)

        def forward(subject: Subject) -> None:
            with torch.no_grad():
                subject.value(Latent(z, sigma), batch)

        def gradient(subject: Subject) -> None:
            leaf = z.clone().requires_grad_(True)
            torch.autograd.grad(subject.value(Latent(leaf, sigma), batch).sum(), leaf)

        kinds = {"forward": forward, "gradient": gradient}
        cases = {(s.name, kind): (lambda s=s, f=f: f(s)) for s in subjects for kind, f in kinds.items()}
        seconds = interleaved(cases, self.config.timing_repeats)
        return {
            s.name: {f"{kind}_seconds": round(seconds[s.name, kind], 5) for kind in kinds}
            | {f"{kind}_megabytes": round(peak_megabytes(cases[s.name, kind]), 2) for kind in kinds}
            for s in subjects
        }


FIGURES = {
    "recall_at_1": "Recall@1, image to text",
    "recall_at_1_text_to_image": "Recall@1, text to image",
    "pair_accuracy": "preference-pair accuracy",
    "srcc": "SRCC with stated looks",
    "correlation": "correlation with Monte Carlo on the policy's own latents",
    "mean_error": "mean error against Monte Carlo",
    "slope": "slope of Monte Carlo on V (1 is calibrated)",
    "rmse": "root mean square error against Monte Carlo",
}


def table(results: dict[str, dict[str, Any]], sigmas: list[float]) -> str:
    """Markdown, one block a reward and figure: a row a method, a column a noise level."""
    out = []
    for reward, result in results.items():
        for figure, title in FIGURES.items():
            rows = {n: r for n, r in result["rows"].items() if any(figure in f for f in r.values())}
            if not rows:
                continue
            clean = f"; clean reward {result['clean'][figure]:.3f}" if figure in result["clean"] else ""
            out += [
                f"**{reward}**: {title}{clean}",
                "",
                "| sigma | " + " | ".join(f"{s:g}" for s in sigmas) + " |",
                "|---|" + "---|" * len(sigmas),
            ]
            for name, by_sigma in rows.items():
                cells = [by_sigma.get(f"{s:g}", {}).get(figure) for s in sigmas]
                out.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.3f}" for c in cells) + " |")
            out.append("")
        out += [f"**{reward}**: a query (forward / with gradient)", "", "| | ms | MB |", "|---|---|---|"]
        for name, c in result["cost"].items():
            out.append(
                f"| {name} | {1e3 * c['forward_seconds']:.1f} / {1e3 * c['gradient_seconds']:.1f} | {c['forward_megabytes']:.1f} / {c['gradient_megabytes']:.1f} |"
            )
        out.append("")
    return "\n".join(out)


def plots(results: dict[str, dict[str, Any]], sigmas: list[float], folder: Path) -> list[Path]:
    """One SVG a reward and figure: the figure against sigma, a line a method."""
    written = []
    for reward, result in results.items():
        for figure, title in FIGURES.items():
            lines = {
                name: [(s, r[f"{s:g}"][figure]) for s in sigmas if figure in r.get(f"{s:g}", {})] for name, r in result["rows"].items()
            }
            lines = {name: line for name, line in lines.items() if line}
            if lines:
                path = folder / f"{re.sub(r'[^a-z0-9]+', '_', f'{reward} {figure}'.lower())}.svg"
                svg = line_plot(lines, x_label="sigma", y_label=f"{reward}: {title}", width=620, height=380, standalone=True)
                write_text(path, svg)
                written.append(path)
    return written


def run(config: CompareConfig, extra: dict[str, Callable[[Any], list[Subject]]] | None = None) -> dict[str, Any]:
    """Measure every reward under `compare`; write evaluation.json, table.md and plots to <out>/<name>."""
    comparison = Comparison(config)
    engine = comparison.engine
    try:
        folder = Path(engine.by_main(lambda: str(ready(Path(config.out) / config.name))))
        results = {name: comparison.measure_reward(name, (extra or {}).get(name)) for name in config.compare}
        told = {
            "hardware": f"{engine.world} x {cfg.hardware()}",
            "rollouts": engine.precision,
            "sigmas": config.sigmas,
            "rewards": results,
        }
        if engine.is_main:
            write_json(folder / "evaluation.json", told)
            write_text(folder / "table.md", table(results, config.sigmas))
            plots(results, config.sigmas, folder)
        engine.barrier()  # nobody says that it is written before it is
        return told
    finally:
        engine.close()
