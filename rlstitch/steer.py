"""The steering job: prompts in, steered pictures with their scores out. `launch/steer.py` runs it from a recipe."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor

from rlstitch import config as cfg
from rlstitch import lengths, protocols, results, sampling, schedule, scheduler
from rlstitch.asking import PartError, ask, inside, told, unlike
from rlstitch.checks import lora_faults
from rlstitch.distributed import Engine
from rlstitch.evaluate import means_of, unscored
from rlstitch.files import write_json, write_text
from rlstitch.metrics import grid as draw_grid
from rlstitch.metrics import peak_memory_mb, to_image
from rlstitch.oracles import Terminal
from rlstitch.part_checks import answered, judge_faults, part_faults, unknown_rewards, unread, value_cards, without_gradient
from rlstitch.parts import Parts, at_hand
from rlstitch.prompts import PromptSet, read_prompts
from rlstitch.ranges import Count, CountOrNone, Name, Range, Seed, Text, Threads
from rlstitch.schema import SamplerConfig
from rlstitch.steering import value_spread
from rlstitch.steering.model import Steered
from rlstitch.steering.particles import Trace
from rlstitch.telling import progress, say
from rlstitch.types import Batch, Latent, noise_like


@dataclass
class SteerConfig:
    """method: a function of rlstitch.steering. kernel: ode or sde (diffusion norm sigma^2). judges: rewards that score the finished pictures.

    lora: of any trainer, a file, a folder or a run, to steer the model with; by default none. guided_tweedie: Tweedie's guess from the guided velocity. baseline: sample the same noise unsteered, too, and put both side by side.
    Picture k of a prompt is walked by noise of (seed, prompt, k) alone, and ranks share out whole batches: on any number of them pictures are the same bit for bit where
    the hardware computes a batch alike, and to its rounding with another prompts_per_batch. (A method of one's own that draws from its generator itself draws for the batch.)
    """

    name: Name = ""
    out: Text = "steered"
    seed: Seed = 0
    prompts: Text = "shapes:held_out.jsonl"
    column: str = ""
    max_prompts: CountOrNone = 0
    images_per_prompt: Count = 1
    prompts_per_batch: Count = 16
    truncate: bool = False
    threads: Threads = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    progress: bool = True
    check: bool = False
    baseline: bool = False
    grid: Annotated[int, Range(0, 1024)] = 16
    kernel: Literal["ode", "sde"] = "sde"
    diffusion: Annotated[float, Range(0, 1000, open="low")] = 3.0
    guided_tweedie: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    lora: str = ""
    rewards: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Text] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(num_steps=40, spacing="diffusers", guidance=3.0))
    judges: list[Text] = field(default_factory=list)


WRITTEN = (r"images|images/[0-9]{5,}\.png|grid\.png|scores\.json|recipe\.yaml", "scores.json")
MEASURED = 8  # prompts that the spread of the value is measured on


def kernel_of(config: SteerConfig) -> sampling.Kernel:
    if config.kernel == "ode":
        return sampling.euler
    return sampling.stochastic(sampling.linear_sde, g=lambda sigma: sampling.square_diffusion(sigma, config.diffusion))


def particles_of(config: SteerConfig) -> int:
    """Latents that a prompt starts with."""
    return int(config.method.get("num_particles", 1))


def call(
    config: SteerConfig, grid: Tensor, velocity, value, z: Tensor, generator: torch.Generator, trace: Trace, *, ask: Callable | None = None
) -> Any:
    """The recipe's method with everything bound in; `ask`: another function of its arguments."""
    method = cfg.load_class(config.method["_target_"])
    given = {
        "velocity": velocity,
        "value": value,
        "z": z,
        "sigmas": grid,
        "kernel": kernel_of(config),
        "generator": generator,
        "trace": trace,
    }
    takes = protocols.takes(method)
    options = {k: v for k, v in config.method.items() if k != "_target_"}
    arguments = {k: v for k, v in given.items() if k in takes} | options
    if ask is not None or protocols.ours(config.method["_target_"]):
        return (ask or method)(**arguments)
    with inside(part := config.method["_target_"]):
        found = method(**arguments)
        prompts, rows = len(z) // particles_of(config), len(found) if isinstance(found, Tensor) and found.ndim else 0
        if not rows or rows % prompts or unlike(found, (rows, *z.shape[1:]), floating=True):
            raise PartError(
                f"{part} gave {told(found)} for {prompts} prompts, not finished latents [{prompts}, {', '.join(map(str, z.shape[1:]))}] or a multiple of so many"
            )
    return found


def in_spreads(config: SteerConfig) -> bool:
    """Whether lambda counts standard deviations of the value within a prompt, and there are any."""
    return config.method.get("lam_unit") == "spread" and bool(config.method.get("lam")) and particles_of(config) > 1


def _rehearsal(config: SteerConfig, grid: Tensor, sigma_range: tuple[float, float], differentiable: bool) -> list[str]:
    """Faults of method and oracle together, found by running the method on a toy latent and watching what it asks."""
    asked: dict[float, bool] = {}

    def value(z: Tensor, sigma: Tensor) -> Tensor:
        asked[float(sigma[0])] = asked.get(float(sigma[0]), False) or torch.is_grad_enabled()
        return z.flatten(1).sum(1)

    try:
        z = torch.randn(max(1, particles_of(config)), 1, 2, 2, generator=torch.Generator().manual_seed(0))
        trace = Trace(spread=1.0 if in_spreads(config) else None)
        call(config, grid, lambda z, sigma: 0.5 * z, value, z, torch.Generator().manual_seed(0), trace)
    except (ValueError, TypeError) as error:
        return [f"'method': {error}"]
    low, high = sigma_range
    faults = []
    if outside := sorted(s for s in asked if not low - 1e-6 <= s <= high + 1e-6):
        faults.append(
            f"'method' asks the value at sigma {outside[0]:.3g}..{outside[-1]:.3g}, but {config.oracle['_target_']} answers only in [{low:g}, {high:g}]: "
            + ("use a Stitched or a Tweedie oracle" if high == 0 else "leave those steps out or distil the value over a wider range")
        )
    if any(asked.values()) and not differentiable:
        faults.append(
            f"'method' needs the value's gradient, and {config.oracle['_target_']} of these rewards has none: use a StitchVM, or fk, svdd or best_of_n"
        )
    return faults


def checked(given: dict[str, Any], name: str) -> SteerConfig:
    """The typed recipe, or one UserError that lists every fault."""
    cfg.for_launcher(given, "steer.py", name)
    config, faults = cfg.fill(SteerConfig, given)
    cfg.named(config, name, faults)
    if not faults and (fault := results.fault(config.out, config.name, *WRITTEN)):
        faults.append(fault)
    if config.lora:
        faults += lora_faults("lora", config.lora, config.model)
    faults += part_faults(config)
    prompts = lengths.fitting(faults, "prompts", config.prompts, config.column, config.model, "truncate", config.truncate)
    faults += judge_faults("judges", config.judges, config.rewards, prompts)
    shift, sampler = scheduler.of_recipe("sampler.shift", config.sampler.shift, config.model, faults), config.sampler
    parts = cfg.check_part("oracle", config.oracle, kind="oracle") + cfg.check_part("method", config.method, kind="method")
    if not parts:
        weights = config.oracle.get("weights") or {}
        cards = value_cards(config, faults)
        oracle = cfg.load_class(config.oracle["_target_"])
        faults += [] if cards else unknown_rewards("oracle.weights", list(weights), config.rewards)
        blind = not cards and bool(without_gradient(weights, config.rewards))
        if not faults:
            grid = schedule.sigmas(sampler.num_steps, shift, sampler.spacing)
            faults += _rehearsal(
                config, grid, answered(oracle, cards), not blind and protocols.said(oracle, "differentiable", True) is not False
            )
        if prompts is not None:
            faults += unread("oracle.weights", weights, config.rewards, prompts, "take prompts that it reads, or another reward")
    if faults := faults + parts:
        raise cfg.report(list(dict.fromkeys(faults)), name)
    return checked(given, name) if at_hand(config) else config


def _row_seeds(seed: int, rows: list[int], particles: int) -> Tensor:
    """Noise seeds by (seed, picture, particle)."""
    return torch.tensor([((seed * 1_000_003 + row) * 10_007 + p) % 2**62 for row in rows for p in range(particles)])


class Job:
    """A checked recipe with its parts built."""

    def __init__(self, config: SteerConfig):
        self.config = config
        names = dict.fromkeys([*config.oracle["weights"], *config.judges])
        self.engine = Engine(zero_stage=0, precision=config.precision, accumulation=1, micro_batch=1, clip_norm=1.0)
        self.engine.where, self.autocast = (lambda: "steering"), self.engine.autocast
        if config.threads:
            torch.set_num_threads(config.threads)  # of which accelerate has an opinion, too
        parts = Parts.of(config.model, {name: config.rewards[name] for name in names}, engine=self.engine)
        self.backbone, self.rewards = parts.backbone, parts.rewards
        prompts = read_prompts(config.prompts, config.column)
        say(*lengths.unread({name: config.rewards[name] for name in names}, prompts.prompts[: config.max_prompts or None]))
        parts.probe(names, prompts.two())
        count = min(config.max_prompts or len(prompts), len(prompts))
        rows = [i for i in range(count) for _ in range(config.images_per_prompt)]
        asked = PromptSet([prompts.prompts[i] for i in rows], [prompts.rows[i] for i in rows])
        [self.prompts] = parts.encoded(asked, truncate=config.truncate, allow="truncate")
        parts.load_values(config.oracle, config.values)
        if config.lora:
            self.backbone.load_lora(config.lora)  # after the values, whose prefixes are the base's
        self.oracle = parts.oracle(config.oracle)
        self.terminal = Terminal(self.backbone, self.rewards, config.oracle["weights"])
        shift = scheduler.resolve("sampler.shift", config.sampler.shift, self.backbone)
        self.grid = schedule.sigmas(config.sampler.num_steps, shift, config.sampler.spacing)

    def _begin(self, rows: list[int], particles: int) -> tuple[Batch, Steered, Tensor, torch.Generator]:
        """Some pictures' prompts, their denoiser and value, the noise that they start from, and the kernel's."""
        config, batch = self.config, self.prompts.batch(rows, torch.tensor(rows))
        model = Steered(self.backbone, self.oracle, batch, guidance=config.sampler.guidance, guided_tweedie=config.guided_tweedie)
        z = noise_like(self.backbone.latent_shape, _row_seeds(config.seed, rows, particles), device=self.backbone.device)
        return batch, model, z, sampling.Streams([config.seed * 1_000_003 + row for row in rows])

    @cached_property
    def spread(self) -> float | None:
        """What lambda counts in: the value's standard deviation within a prompt, the mean over the job's first prompts, each walked by itself.

        It is measured once a job, so that lambda depends on the recipe and its prompts, and not on who shares a batch. None where lambda is absolute.
        """
        config, n = self.config, particles_of(self.config)
        if not in_spreads(config):
            return None
        rows = range(0, len(self.prompts), config.images_per_prompt)[:MEASURED]

        def measure(k: int) -> Tensor:
            _, model, z, generator = self._begin([rows[k]], n)
            with self.autocast():
                return torch.tensor(call(config, self.grid, model.velocity, model.value, z, generator, Trace(), ask=value_spread))

        return float(self.engine.divided(len(rows), measure).nanmean())

    def latents(self, rows: list[int], *, steered: bool = True, trace: Trace | None = None) -> Tensor:
        """Finished latents of some pictures; of several particles the one whose picture the guiding pixel rewards like best."""
        config = self.config
        trace = Trace() if trace is None else trace
        if steered:
            trace.spread = self.spread
        batch, model, z, generator = self._begin(rows, particles_of(config) if steered else 1)
        with self.autocast():
            if not steered:
                with torch.no_grad():
                    return sampling.sample(model.velocity, z, self.grid, kernel=kernel_of(config), generator=generator).z
            z = call(config, self.grid, model.velocity, model.value, z, generator, trace)
            if (kept := len(z) // len(rows)) > 1:
                final, wide = Latent(z, torch.zeros(len(z), device=z.device)), batch.interleave(kept)
                with torch.no_grad():
                    values = self.terminal.total(self.terminal(final, wide)).view(-1, kept)
                z = z[torch.arange(len(rows), device=z.device) * kept + torch.where(torch.isnan(values), -torch.inf, values).argmax(1)]
        return z

    @torch.no_grad()
    def judge(self, latents: Tensor, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures [B, 3, H, W] and every judge's scores [B]."""
        batch = self.prompts.batch(rows, torch.tensor(rows))
        with self.autocast():
            images = self.backbone.decode(latents)
            return images, {name: ask(name, self.rewards[name], images, batch).cpu() for name in self.config.judges}

    def run(self) -> dict[str, Any]:
        """Steer every prompt; write pictures, grid, scores.json and the recipe to <out>/<name>, all at once at the end."""
        with results.replaced(Path(self.config.out) / self.config.name, *WRITTEN, engine=self.engine) as work:
            return self._steer(work)

    def _steer(self, work: Path) -> dict[str, Any]:
        """Every rank takes every world-th batch of the recipe's: what a picture is walked with does not depend on the ranks."""
        config, engine, count = self.config, self.engine, len(self.prompts)
        size = min(config.prompts_per_batch, count)
        kinds = ["steered", "baseline"] if config.baseline else ["steered"]
        batches, keep = -(-count // size), min(config.grid, count)
        if (idle := engine.world - batches) > 0:
            say(
                f"{count} pictures make {batches} batch{'es' * (batches > 1)} of prompts_per_batch={config.prompts_per_batch}, and {idle} of {engine.world} ranks have nothing to do: "
                + f"prompts_per_batch={-(-count // engine.world)} shares them out"
            )
        engine.by_main(lambda: (work / "images").mkdir() or "")
        turns, drawn = (len(engine.share(k)) for k in (batches, -(-keep // size)))
        table = {kind: {n: torch.full((turns, size), torch.nan) for n in config.judges} for kind in kinds}
        # for the grid; every other picture is on disk only
        shown = {kind: torch.zeros(drawn, min(size, keep), 3, *self.backbone.size) for kind in kinds}
        seconds = {kind: torch.zeros(turns, dtype=torch.float64) for kind in kinds}
        spread = self.spread  # which all ranks measure together, before any goes its own way
        traces = [Trace(spread=spread) for _ in range(turns)]
        bar = progress(count, config.name, "image", shown=config.progress)
        for turn, trace in enumerate(traces):
            first = (turn * engine.world + engine.rank) * size
            rows = list(range(first, min(first + size, count)))

            def walk(rows=rows, turn=turn, trace=trace) -> None:
                for kind in kinds if rows else ():
                    started = time.perf_counter()
                    latents = self.latents(rows, steered=kind == "steered", trace=trace)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    seconds[kind][turn] = time.perf_counter() - started
                    pictures, judged = self.judge(latents, rows)
                    if turn < drawn:
                        shown[kind][turn, : len(rows)] = pictures[: min(size, keep)].cpu()
                    if kind == "steered":
                        for row, picture in zip(rows, pictures):
                            to_image(picture).save(work / "images" / f"{row:05d}.png")
                    for name, column in judged.items():
                        table[kind][name][turn, : len(rows)] = column

            engine.together(walk)
            bar.update(len(rows) * engine.world)
            bar.set_postfix_str(", ".join(f"{n} {c[: turn + 1].nanmean():.3f}" for n, c in table["steered"].items()))
        bar.close()
        everyones = lambda own: engine.in_order(own, batches).cpu()  # noqa: E731
        told = {kind: {n: everyones(c).flatten()[:count] for n, c in columns.items()} for kind, columns in table.items()}
        pictures = {kind: engine.in_order(own, -(-keep // size)).cpu().flatten(0, 1)[:keep] for kind, own in shown.items()} if keep else {}
        asked = torch.tensor([[sum(t.ess), len(t.ess), t.fallbacks, t.queries] for t in traces], dtype=torch.float64)
        ess, resamplings, fallbacks, queries = everyones(asked).sum(0).tolist()
        result = {
            "method": config.method,
            "means": {kind: means_of(columns, self.rewards, self.prompts.rows) for kind, columns in told.items()},
            "seconds_per_image": {kind: round(float(everyones(own).sum()) / count, 4) for kind, own in seconds.items()},
            "peak_memory_mb": round(float(engine.gather(torch.tensor([peak_memory_mb()], device=engine.device)).max()), 1),
            "lambda": traces[0].lam,
            "value_spread": spread,
            "mean_effective_particles": round(ess / resamplings, 3) if resamplings else None,
            "uniform_fallbacks": int(fallbacks),
            "value_queries_per_image": queries / count,
            "hardware": f"{engine.world} x {cfg.hardware()}",
            "images": [
                {"file": f"images/{k:05d}.png", "prompt": prompt, **{n: round(float(c[k]), 5) for n, c in told["steered"].items()}}
                for k, prompt in enumerate(self.prompts.prompts)
            ],
        }
        say(*(line for kind, columns in told.items() for line in unscored(kind, columns)))
        if engine.is_main:
            self._write(work, result, pictures, told)
        return result

    def _write(self, work: Path, result: dict[str, Any], pictures: dict[str, Tensor], table: dict[str, dict[str, Tensor]]) -> None:
        if pictures:
            kinds, prompts = list(reversed(pictures)), self.prompts.prompts  # baseline first
            captions = []
            for k in range(len(pictures["steered"])):
                for kind in kinds:
                    scores = " ".join(f"{n} {float(c[k]):.2f}" for n, c in table[kind].items())
                    captions.append(f"{'unsteered: ' if kind == 'baseline' else ''}{prompts[k]} | {scores}")
            draw_grid(torch.stack([pictures[kind] for kind in kinds], 1).flatten(0, 1), captions, work / "grid.png")
        write_json(work / "scores.json", result)
        write_text(work / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.structured(dataclasses.asdict(self.config))))


def run(config: SteerConfig) -> dict[str, Any]:
    job = Job(config)
    try:
        return job.run()
    finally:
        job.engine.close()
