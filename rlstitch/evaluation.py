"""The evaluation job: a model, with or without a LoRA, judged on a prompt set by any rewards, on any number of ranks. `launch/evaluate.py` runs it."""

from __future__ import annotations

import json
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import adapters, drift, lengths, report, results, resume, schedule, scheduler, telling
from rlstitch import config as cfg
from rlstitch.checks import lora_faults
from rlstitch.distributed import Engine
from rlstitch.evaluate import Evaluation, evaluate, unscored
from rlstitch.figures import sendable
from rlstitch.files import write_json, write_text
from rlstitch.metrics import grid as draw_grid
from rlstitch.metrics import to_image
from rlstitch.part_checks import attempt, class_of, judge_faults, part_faults, unknown_rewards
from rlstitch.parts import Parts, at_hand
from rlstitch.prompts import PromptSet, read_prompts
from rlstitch.prompts import fingerprint as prompts_fingerprint
from rlstitch.ranges import Count, CountOrNone, Name, Range, Seed, Text, Threads
from rlstitch.schema import RunConfig, SamplerConfig
from rlstitch.trainer import Trainer
from rlstitch.types import UserError


@dataclass
class EvaluateConfig:
    """judges: the rewards of `rewards` that score. max_prompts: the first so many, 0 for all. lora: of any trainer, a file, folder, run or hub id.

    layout: of the pictures, `flat` as images/00000.png, `geneval` as that suite's own scripts read them (images/00000/metadata.jsonl, images/00000/samples/00000.png),
    `none` keeps none but the grid's. features: the reward whose image embeddings tell the diversity within a prompt (of images_per_prompt >= 2), and, where `against` names
    another evaluation's folder, the distance of all pictures from its own (KID). Picture k of a prompt starts from noise of (seed, prompt, k), whatever the ranks and batch_size.
    """

    name: Name = ""
    out: Text = "evaluations"
    seed: Seed = 1234
    prompts: Text = "shapes:held_out.jsonl"
    column: str = ""
    max_prompts: CountOrNone = 0
    images_per_prompt: Count = 1
    batch_size: Count = 64
    truncate: bool = False
    threads: Threads = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    progress: bool = True
    check: bool = False
    grid: Annotated[int, Range(1, 1024)] = 16
    layout: Literal["flat", "geneval", "none"] = "flat"
    features: str = ""
    against: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    lora: str = ""
    rewards: dict[str, Any] = field(default_factory=dict)
    judges: list[Text] = field(default_factory=list)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(num_steps=40, spacing="auto"))


WRITTEN = (
    r"images|images/[0-9]{5,}(\.png|/samples|/samples/[0-9]{5,}\.png|/metadata\.jsonl)?|grid\.png|evaluation\.json|index\.html|recipe\.yaml",
    "evaluation.json",
)
NO_SETTING = ("hardware", "versions")  # what a file tells beside the settings, and two that are compared may differ in


def laid(given: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`rewards=[NAME, ...]` of the command line: names of pieces below recipes/reward, paths to pieces of one's own, or names of rewards that the recipe has. They replace
    what the recipe has. Of two pieces that call their reward alike the second's is called as the piece is."""
    if isinstance(names := overrides.get("rewards"), list | str):
        names = [names] if isinstance(names, str) else names
        del overrides["rewards"]
        known = dict(given.get("rewards", {}))
        chosen: dict[str, Any] = {}
        for name in names:
            if name in known:
                chosen[name] = known[name]
                continue
            stem = str(name).removeprefix("reward/").removesuffix(".yaml")
            pieces = [cfg.RECIPES / "reward" / f"{stem}.yaml", *[Path(str(name)).expanduser()] * str(name).endswith(".yaml")]
            if (piece := next((p for p in pieces if p.is_file()), None)) is None:
                there = sorted([*known, *(p.stem for p in pieces[0].parent.glob("*.yaml"))])
                raise UserError(
                    f"'rewards' names {name!r}, which is neither in recipes/reward nor in the recipe{cfg.nearest(stem.lower(), there)}"
                )
            own = cfg.compose(str(piece)).get("rewards", {})
            chosen |= {piece.stem if n in chosen and len(own) == 1 else n: node for n, node in own.items()}
        given = given | {"rewards": known | chosen, "judges": list(chosen)}
    return given


def checked(given: dict[str, Any], name: str) -> EvaluateConfig:
    """The typed recipe, or one UserError that lists every fault."""
    cfg.for_launcher(given, "evaluate.py", name)
    given = {
        key: node for key, node in given.items() if key != "values"
    }  # which the pieces of rewards bring, and finished pictures do not need
    config, faults = cfg.fill(EvaluateConfig, given)
    cfg.named(config, name, faults)
    if not faults and (fault := results.fault(config.out, config.name, *WRITTEN)):
        faults.append(fault)
    faults += ["'judges' names no reward: give some, e.g. 'rewards=[pickscore, hpsv21]'"] * (not config.judges)
    if config.lora:
        faults += lora_faults("lora", config.lora, config.model)
    prompts = lengths.fitting(faults, "prompts", config.prompts, config.column, config.model, "truncate", config.truncate)
    faults += judge_faults("judges", config.judges, config.rewards, prompts)
    faults += _drift_faults(config)
    config.rewards = {n: node for n, node in config.rewards.items() if n in (*config.judges, config.features)}
    faults += part_faults(config)
    scheduler.of_recipe("sampler.shift", config.sampler.shift, config.model, faults)
    if faults:
        raise cfg.report(list(dict.fromkeys(faults)), name)
    return checked(given | {"model": config.model, "rewards": config.rewards, "lora": config.lora}, name) if at_hand(config) else config


def _drift_faults(config: EvaluateConfig) -> list[str]:
    """Of `features` and `against`."""
    faults: list[str] = []
    if config.features:
        faults += unknown_rewards("features", [config.features], config.rewards)
        cls = class_of(config.rewards.get(config.features), "reward")
        faults += [f"'features' is '{config.features}', which gives no image embeddings: take one of the CLIP family"] * (
            cls is not None and not hasattr(cls, "encode")
        )
        if config.images_per_prompt < 2 and not config.against:
            faults.append(
                "'features' tells the diversity of a prompt's pictures: set images_per_prompt to 2 or more, or name another evaluation as `against`"
            )
    if config.against:
        attempt(faults, "against", drift.pictures_of, config.against)
        faults += ["'against' needs `features`, the reward by whose embeddings pictures are compared"] * (not config.features)
    return faults


class Job:
    """A checked recipe with its parts built."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.engine = Engine(zero_stage=0, precision=config.precision, accumulation=1, micro_batch=1, clip_norm=1.0)
        self.engine.where = lambda: "evaluation"
        if config.threads:
            torch.set_num_threads(config.threads)  # of which accelerate has an opinion, too
        parts = Parts.of(config.model, config.rewards, engine=self.engine)
        self.backbone, self.rewards = parts.backbone, {n: parts.rewards[n] for n in config.judges}
        self.eye = parts.rewards.get(config.features)
        prompts = read_prompts(config.prompts, config.column)
        telling.say(*lengths.unread({n: config.rewards[n] for n in config.judges}, prompts.prompts[: config.max_prompts or None]))
        if (different := len(set(prompts.prompts))) < len(prompts):
            telling.say(
                f"{config.prompts}: {len(prompts)} rows hold {different} different prompts, and each counts as often as it stands there"
            )
        parts.probe(config.judges, prompts.two())
        if config.lora:
            self.backbone.load_lora(config.lora)
        count = min(config.max_prompts or len(prompts), len(prompts))
        rows = [i for i in range(count) for _ in range(config.images_per_prompt)]
        asked = PromptSet([prompts.prompts[i] for i in rows], [prompts.rows[i] for i in rows])
        [self.prompts] = parts.encoded(asked, truncate=config.truncate, allow="truncate")
        self.shift = scheduler.resolve("sampler.shift", config.sampler.shift, self.backbone)

    def settings(self) -> dict[str, Any]:
        """All that a score depends on."""
        config, s = self.config, self.config.sampler
        height, width = self.backbone.size
        rewards = {n: config.rewards[n] for n in config.judges}
        hashed = resume.hashes_of({"model": config.model} | {f"rewards.{n}": node for n, node in rewards.items()})
        loras = {f"lora = {path}": adapters.fingerprint(path) for path in adapters.listed(config.lora) if path}
        return {
            "model": config.model,
            "lora": config.lora,
            "rewards": rewards,
            "files": hashed | loras,
            "prompts": {"path": config.prompts, "column": config.column, "sha256": prompts_fingerprint(config.prompts), "count": len(self.prompts) // config.images_per_prompt},
            "sampling": {
                "height": height, "width": width, "num_steps": s.num_steps, "guidance": s.guidance, "spacing": s.spacing,
                "sigmas": [round(v, 6) for v in schedule.sigmas(s.num_steps, self.shift, s.spacing).tolist()],
                "images_per_prompt": config.images_per_prompt, "seed": config.seed, "truncate": config.truncate, "precision": self.engine.precision,
            },
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"python": platform.python_version()},
            "hardware": f"{self.engine.world} x {cfg.hardware()}",
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Sample and judge every prompt; write scores, settings, pictures and a page to <out>/<name>, all at once at the end."""
        config, s = self.config, self.config.sampler
        settings, started, seen = self.settings(), time.perf_counter(), []
        with results.replaced(Path(config.out) / config.name, *WRITTEN, engine=self.engine) as work:
            found = evaluate(
                self.backbone, nullcontext(), self.prompts, self.rewards, schedule.sigmas(s.num_steps, self.shift, s.spacing), self.engine,
                guidance=s.guidance, batch_size=config.batch_size, seed=config.seed, keep=config.grid, label=config.name, progress=config.progress,
                see=lambda index, images: self._see(work, index, images, seen),
            )  # fmt: skip
            if self.eye is not None:
                found.means |= self._drift(self.engine.in_order(torch.cat(seen), len(self.prompts)).cpu())
            telling.say(*unscored(config.name, found.scores))
            errors = standard_errors(found.scores, config.images_per_prompt)
            result = {
                "means": found.means,
                "standard_errors": errors,
                "seconds_per_image": round((time.perf_counter() - started) * self.engine.world / len(self.prompts), 4),
                "settings": settings,
                "scores": {name: [round(v, 6) for v in column.tolist()] for name, column in found.scores.items()},
            }
            if self.engine.is_main:
                self._write(work, found, result)
        return result

    def _drift(self, found: Tensor) -> dict[str, float]:
        """Diversity and the distance from another evaluation of the pictures' embeddings [N, D]."""
        out, per = {}, self.config.images_per_prompt
        if per > 1:
            out["diversity"] = drift.diversity(found, per)
        if self.config.against:
            out["distance"] = drift.kernel_distance(
                found, drift.read(self.eye, drift.pictures_of(self.config.against), self.config.batch_size)
            )
        return out

    def _see(self, work: Path, index: list[int], images: Tensor, seen: list[Tensor]) -> None:
        per = self.config.images_per_prompt
        if self.eye is not None:
            seen.append(drift.embeddings(self.eye, images))
        for row, image in zip(index, images) if self.config.layout != "none" else ():
            file = work / "images" / f"{row:05d}.png"
            if self.config.layout == "geneval":
                file = work / "images" / f"{row // per:05d}" / "samples" / f"{row % per:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            to_image(image).save(file)

    def _write(self, work: Path, found: Evaluation, result: dict[str, Any]) -> None:
        config, per = self.config, self.config.images_per_prompt
        for k, row in enumerate(self.prompts.rows[::per]) if config.layout == "geneval" else ():
            write_text(work / "images" / f"{k:05d}" / "metadata.jsonl", json.dumps(sendable(row), ensure_ascii=False))
        draw_grid(found.images, found.captions(self.prompts.prompts[: len(found.images)]), work / "grid.png")
        write_json(work / "evaluation.json", result)
        write_text(work / "recipe.yaml", cfg.to_yaml(config))
        write_text(work / "index.html", report.evaluation_page(config.name, result, work / "grid.png"))


def standard_errors(scores: dict[str, Tensor], per: int) -> dict[str, float]:
    """Of each mean, over prompts: the pictures of a prompt are not independent. NaN where fewer than two prompts have a score."""
    out = {}
    for name, column in scores.items():
        means = column.double().view(-1, per).nanmean(1)
        means = means[torch.isfinite(means)]
        out[name] = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    return out


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Which settings of two results differ, each with both values; none where their scores may be compared for what model or LoRA did."""

    def flat(node: Any, where: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {where: node}
        return {key: value for k, v in node.items() for key, value in flat(v, f"{where}.{k}" if where else str(k)).items()}

    a, b = (flat({k: v for k, v in result["settings"].items() if k not in NO_SETTING}) for result in (one, other))
    apart = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    if "prompts.sha256" not in apart:  # the same file, by another name
        apart = [key for key in apart if key != "prompts.path"]
    return [f"{key}: {a.get(key)} and {b.get(key)}" for key in apart]


def table(result: dict[str, Any], config: EvaluateConfig) -> str:
    """What is shown at the end: a row of means with their standard errors below."""
    rows = {config.name: result["means"], "standard error": result["standard_errors"]}
    more = [("seconds a picture", f"{result['seconds_per_image']:.3g}"), ("written to", str(Path(config.out) / config.name))]
    return telling.means_table(rows, *more)


def run(config: EvaluateConfig) -> dict[str, Any]:
    job = Job(config)
    try:
        return job.run()
    finally:
        job.engine.close()


def again(folder: Path, config: RunConfig, lora: str) -> str:
    """Evaluate a training run's last checkpoint, or its model with a LoRA; -> the table. evaluation.json in the run's folder is written anew."""
    trainer = Trainer(config)
    try:
        found = trainer.evaluate_start() if lora else trainer.evaluate_checkpoint(folder)
        if trainer.engine.is_main:
            write_json(folder / "evaluation.json", found)
        return telling.means_table(found, ("written to", str(folder / "evaluation.json")))
    finally:
        trainer.engine.close()
