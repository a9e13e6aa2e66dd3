"""The one trainer: recipe in, run folder out. The loop reads like the paper; everything else here is putting the parts together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlstitch import checkpoint, lock, memory, protocols, report, resume, schedule, scheduler, stages, tracker
from rlstitch import config as cfg
from rlstitch.asking import PartError
from rlstitch.checks import geometry
from rlstitch.data import UpdateStream, read_data, read_prompts
from rlstitch.distributed import Engine, world_size
from rlstitch.endings import keep_alone, kept, run_table
from rlstitch.evaluate import Evaluation, evaluate, unscored
from rlstitch.figures import known_sum, means_over
from rlstitch.files import write_json, write_text
from rlstitch.guard import Guard, probe
from rlstitch.interrupt import Interrupted, noted
from rlstitch.metrics import Clock, Log, peak_memory_mb
from rlstitch.metrics import grid as draw_grid
from rlstitch.oracles import rewards_of
from rlstitch.parts import Parts
from rlstitch.policy import CURRENT, EMA, INIT, REFERENCE, SETS, Policy
from rlstitch.schema import RunConfig
from rlstitch.scoring import Scorer
from rlstitch.stitch.refresh import Refresher
from rlstitch.stops import End
from rlstitch.telling import progress, say
from rlstitch.types import Latent, Rollout, UserError


class Trainer:
    """Builds the parts of a checked config once: backbone, rewards, value models, policy, oracle, algorithm, engine."""

    def __init__(self, config: RunConfig):
        self.config, self.clock, self.step, self.bad, self.whole = config, Clock(world_size()), 0, 0, True
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.run = Path(config.out) / config.name
        parts = stages.expand(config)
        method = cfg.load_class(config.algorithm["_target_"])
        prompts = {p.data.prompts: read_data(p.data, method.learns_from) for p in parts}
        self.geometry = geometry(config, min(map(len, prompts.values())))
        stops = [cfg.build(p.stop, kind="stop") if p.stop else End() for p in parts]
        reach = [stop.steps(config.sampler.num_steps) for stop in stops]
        self.slots = protocols.asked(
            "algorithm", method, "backwards", config.algorithm, range(min(r.start for r in reach), max(r.stop for r in reach))
        )
        self.engine = Engine(
            zero_stage=config.distributed.zero_stage,
            precision=config.distributed.precision,
            accumulation=self.geometry.accumulation * self.slots,
            micro_batch=self.geometry.micro_batch,
            clip_norm=config.optimiser.clip_norm,
            timeout=config.distributed.timeout,
        )
        self.engine.where = lambda: f"{self.clock.now} of update {self.step + 1}"
        built = Parts.of(config.model, config.rewards, engine=self.engine)
        self.backbone, self.rewards, self.values = built.backbone, built.rewards, built.values
        held_out = read_prompts(config.evaluation.prompts, config.evaluation.column)
        asked = [(list(part.oracle.get("weights", ())), prompts[part.data.prompts]) for part in parts] + [
            (config.evaluation.rewards, held_out)
        ]
        for names, rows in asked:
            built.probe(names, rows.two())
        *_, self.held_out = built.encoded(*prompts.values(), held_out, truncate=config.data.truncate)
        for part in parts:
            built.load_values(part.oracle, config.values, share=config.distributed.zero_stage < 3)
        self.clock.stitching = sum(model.card.get("device_hours", 0.0) for model in self.values.values())
        lora = config.lora
        targets = self.backbone.targets(lora.targets) if lora.targets else self.backbone.lora_targets
        self.policy = Policy(
            self.backbone.transformer, rank=lora.rank, alpha=lora.alpha, targets=targets, seed=config.seed,
            ema_decay=config.ema_decay, old=method.keeps_old, init=self.backbone.load_lora(lora.init, INIT) if lora.init else None,
        )  # fmt: skip
        o = config.optimiser
        optimiser = torch.optim.AdamW(self.policy.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, eps=o.eps)
        self.engine.prepare(self.backbone.transformer, optimiser, self.policy.parameters())
        ends = [sum(p.updates for p in parts[: k + 1]) for k in range(len(parts))]
        self.stages = [
            stages.Stage(
                name,
                end,
                built.oracle(part.oracle) if part.oracle else None,
                stop,
                UpdateStream(prompts[part.data.prompts], self.geometry, config.seed),
            )
            for name, end, part, stop in zip(stages.names(config), ends, parts, stops)
        ]
        self.backbone.checkpoint_activations(config.sampler.activation_checkpointing)
        if config.sampler.guidance_gradient != "both":
            self.backbone.guidance_gradient = config.sampler.guidance_gradient
        shift = scheduler.resolve("sampler.shift", config.sampler.shift, self.backbone)
        self.grid = schedule.sigmas(config.sampler.num_steps, shift, config.sampler.spacing)
        self.algorithm = cfg.build(
            config.algorithm, kind="algorithm", backbone=self.backbone, policy=self.policy, oracle=self.stages[0].oracle, grid=self.grid,
            guidance=config.sampler.guidance, shift=shift, images_per_prompt=config.batch.images_per_prompt,
        )  # fmt: skip
        self.algorithm.state()  # of a wrong kind it is told now, not at the first checkpoint
        refresh, told = config.refresh, {"guidance": config.sampler.guidance, "prompts": list(prompts.values())}
        self.refresher = Refresher(refresh, self.values, self.backbone, self.rewards, self.engine, **told) if refresh.fraction else None
        blind = [s.oracle for s in self.stages if s.oracle and not getattr(s.oracle, "differentiable", False)]
        if method.needs_gradient and blind:
            raise UserError(
                f"'algorithm' {config.algorithm['_target_']} needs gradients, and {', '.join(blind[0].names)} together have none: use rewards that say `differentiable`, or a StitchVM of a surrogate"
            )
        trained = {name for stage in self.stages for name in rewards_of(stage.oracle)}
        self.guard = Guard(config.guard, [n for n in config.evaluation.rewards if n not in trained])
        self.scorer = Scorer(self.engine, self.clock)

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """Run to the end (or from the last checkpoint to it), evaluate, write summary, report and LoRA. Raises Interrupted after a signal, and UserError where
        another process trains in this run folder."""
        keep = lambda: keep_alone(self.engine, self.step * self.whole, lambda: self._checkpoint(False))  # noqa: E731
        with lock.held(self.run, self.engine.by_main), memory.told(lambda: memory.smaller(self.config, self.clock.broke), keep):
            return self._train()

    def _train(self) -> dict[str, Any]:
        self._start()
        caught: list[int] = []
        bar = progress(
            self.config.updates, self.config.name, "update", shown=self.config.logging.progress and self.engine.is_main, initial=self.step
        )
        with noted(caught), kept(self.engine, lambda: self.step, lambda: self._checkpoint(False)):
            every = self.config.evaluation.every
            if every and self.step == 0:
                with self.clock.phase("eval"):
                    self._evaluate_now()
            while self.step < self.config.updates and not self.guard.verdict():
                row = self._update()
                bar.update()
                shown = "reward" if "reward" in row else "loss"
                bar.set_postfix_str("skipped" if row["skipped"] else f"{shown} {row[shown]:.4f}")
                if every and (self.step % every == 0 or self.step == self.config.updates):
                    with self.clock.phase("eval"):
                        self._evaluate_now()
                stopping = self.engine.any(bool(caught))
                due = self.step % self.config.checkpoint.every == 0 or self.step in (self.config.updates, self.guard.best_step)
                if stopping or due or self.guard.verdict():
                    self._checkpoint(bool(due or self.guard.verdict()))
                if stopping:
                    bar.close()
                    self.log.close()
                    raise Interrupted(caught)
        bar.close()
        if why := self.guard.verdict():
            say(f"stopped after update {self.step}: {why}")
        with self.clock.phase("eval"):
            return self._finish()

    def _update(self) -> dict[str, Any]:
        """One optimiser step on one global batch, all of whose groups share one stop."""
        clock, engine, scores, groups, sums = self.clock, self.engine, [], [], {}
        stage = stages.at(self.stages, self.step)
        self.algorithm.oracle = stage.oracle
        stop = stage.stop.draw(self.config.sampler.num_steps, self.config.seed * 1_000_003 + self.step)
        o = self.config.optimiser
        engine.set_lr(o.lr * min(1.0, (self.step + 1) / max(1, o.warmup)))
        rollouts: list[Rollout] = []
        for batch in stage.stream.batches(self.step, engine.rank):
            with clock.phase("rollout"), engine.autocast():
                rollout = self.algorithm.rollout(batch, stop)
            self.scorer.ask(self.algorithm, rollout)
            if not self.algorithm.collects:
                self._learn(rollout, sums)
                scores.append(rollout.scores.detach())
                groups.append(batch.group)
            if self.algorithm.collects:
                rollouts.append(rollout)
            elif self.refresher is not None:
                rollouts.append(Rollout(batch, Latent(rollout.latent.z.detach(), rollout.latent.sigma), scores[-1]))
        if self.algorithm.collects:
            self.scorer.finish()
            rollouts = [part for rollout in rollouts for part in rollout.split(self.geometry.micro_batch)]
            scores, groups = [rollout.scores for rollout in rollouts], [rollout.batch.group for rollout in rollouts]
        own = torch.cat(scores).detach().float()
        every, all_groups = engine.gather(own), engine.gather(torch.cat(groups).to(own.device))
        if self.algorithm.collects:
            self._learn_together(rollouts, every, all_groups, sums)
        elif stage.oracle is not None:
            self.scorer.check(every, all_groups, stage.oracle, self.step + 1)
        self.whole = False  # until weights, moments, followers and count are those of one more update
        with clock.phase("update"):
            norm = engine.step()
            if norm is not None:
                self.policy.update_ema()
                self.algorithm.end_step(self.step)
        drift, failed = {}, None
        if self.refresher is not None:
            try:
                with clock.phase("refresh"):
                    drift = self.refresher.after(rollouts, rewards_of(stage.oracle), self.grid, stop, stage.stream.prompts)
            except PartError as error:  # the weights have moved: this update is whole
                failed = error
        self.step, self.whole = self.step + 1, True
        means = means_over(engine.gather, sums)
        self._guard(norm, means)
        names = stage.oracle.names if stage.oracle else ()
        row = {
            "step": self.step,
            "samples": self.step * self.geometry.samples,
            **({"stage": stage.name} if stage.name else {}),
            **({} if stage.oracle is None else {"stop": stop, "sigma": round(float(self.grid[stop]), 4)}),
            **{k: (v if norm is not None else None) for k, v in means.items()},
            "rewards": {n: (None if norm is None or v.isnan() else float(v)) for n, v in zip(names, every.nanmean(0))},
            "grad_norm": norm,
            "skipped": norm is None,
            **({"drift": drift} if drift else {}),
            **self.clock.row,
        }
        self.log.write(row)
        if failed is not None:
            raise failed
        return row

    def _learn(self, rollout: Rollout, sums: dict[str, Tensor], *compared: Any) -> None:
        """Every loss of one micro-batch, each with its backward before the next is made."""
        with self.clock.phase("update"):
            parts, made = self.algorithm.losses(rollout, *compared), 0
            while True:
                with self.engine.autocast():
                    part = next(parts, None)
                if part is None:
                    break
                self.engine.backward(part[0])
                for key, value in part[1].items():
                    sums[key] = sums.get(key, 0.0) + known_sum(value)
                made += 1
        if made != self.slots:  # which the gradient is divided by
            raise PartError(
                f"'algorithm' {self.config.algorithm['_target_']} made {made} losses of a micro-batch, but its backwards says {self.slots}"
            )

    def _learn_together(self, rollouts: list[Rollout], scores: Tensor, groups: Tensor, sums: dict[str, Tensor]) -> None:
        """Compare the samples of all ranks by their scores [B, K] and prompts [B], then learn from this rank's own."""
        weights, metrics = self.algorithm.compare(rollouts, scores, groups)
        self.scorer.check(scores, groups, self.algorithm.oracle, self.step + 1, metrics.get("masked"))
        sizes = [len(r.batch) for r in rollouts]
        mine = weights[self.engine.rank * sum(sizes) :][: sum(sizes)]
        for rollout, part in zip(rollouts, mine.split(sizes)):
            self._learn(rollout, sums, part, self.slots)
        for key, value in metrics.items():
            sums[key] = known_sum(torch.tensor(value, device=scores.device))

    def _guard(self, norm: float | None, means: dict[str, float]) -> None:
        """Count updates skipped for NaN or Inf; give up after too many in a row, with the weights as they were."""
        self.bad = self.bad + 1 if norm is None else 0
        if norm is None:
            say(
                f"update {self.step}: loss {means.get('loss')} or its gradient is not finite; skipped ({self.bad} in a row), weights untouched"
            )
        if self.bad >= self.config.max_bad_steps:
            good = checkpoint.folders(self.run)
            raise UserError(
                f"{self.bad} updates in a row had a NaN or Inf in loss or gradient (max_bad_steps); last good checkpoint: {good[-1] if good else 'none yet'}. Lower optimiser.lr, or try distributed.precision=fp32."
            )

    # ------------------------------------------------------------------------------------------------ around it

    def _start(self) -> None:
        """Resume, or begin a clean folder; open the logs."""
        config = self.config
        self.inputs = resume.hashes(config) if self.engine.is_main else {}
        chosen = self.engine.by_main(self._choose)
        source, hours = Path(chosen) if chosen else None, {}
        if source is not None:
            progress = checkpoint.load(source, self.engine, self.policy, self.refresher, self.algorithm)
            self.step, hours = progress["step"], progress["hours"]
            self.guard.load_state(progress["guard"])
        if self.engine.is_main:  # an abandoned future would be what `resume=auto` takes next
            for later in (f for f in checkpoint.folders(self.run) if source is None or checkpoint.number(f) > self.step):
                checkpoint.discard(later)
            checkpoint.prune(self.run, config.checkpoint.keep, self.guard.best_step)
            for stale in ("metrics.jsonl", "summary.json", "evaluation.json", tracker.ID) if source is None else ():
                (self.run / stale).unlink(missing_ok=True)
            write_text(self.run / "recipe.yaml", cfg.to_yaml(config))
            say(f"{self.run}: {self.geometry}{resume.gone_on(source, self.step, config.updates)}")
        self.log = Log(
            self.run,
            active=self.engine.is_main,
            start_step=self.step,
            wandb_mode=config.logging.wandb,
            project=config.logging.project,
            x_axis=f"{self.clock.unit}/total",
            config=dataclasses.asdict(config),
        )
        self.engine.barrier()
        self.clock.begin(hours)

    def _choose(self) -> str:
        """The checkpoint to go on from; empty where the run begins anew."""
        checkpoint.tidy(self.run)
        if self.config.resume == "never":
            return ""
        if self.config.resume == "auto":
            return str(checkpoint.newest(self.run, keep_aside=True) or "")
        return str(checkpoint.whole(Path(self.config.resume)))

    def _checkpoint(self, due: bool = True) -> None:
        progress = {"hours": self.clock.hours, "guard": self.guard.state(), "inputs": self.inputs}
        keep = self.config.checkpoint.keep
        also = {"refresher": self.refresher, "algorithm": self.algorithm, "spare": self.guard.best_step, "due": due}
        with self.clock.phase("checkpoint"):
            checkpoint.save(self.run, self.step, self.engine, self.policy, progress, keep=keep, **also)

    def evaluate(self, adapter: str, limit: int, label: str) -> Evaluation:
        e = self.config.evaluation
        with self.clock.phase("eval"):
            result = evaluate(
                self.backbone,
                self.policy.use(adapter),
                self.held_out,
                {n: self.rewards[n] for n in e.rewards},
                schedule.sigmas(e.num_steps, scheduler.resolve("evaluation.shift", e.shift, self.backbone), e.spacing),
                self.engine,
                guidance=e.guidance, batch_size=e.batch_size, seed=e.seed, limit=limit, keep=e.grid, label=label, progress=self.config.logging.progress,
            )  # fmt: skip
        say(*unscored(label, result.scores))
        return result

    def evaluate_all(self) -> dict[str, Evaluation]:
        """The weights of `evaluation.final` on the whole evaluation set."""
        e = self.config.evaluation
        return {name: self.evaluate(SETS[name], e.max_prompts, f"evaluation, {name}") for name in e.final}

    def evaluate_checkpoint(self, run: Path) -> dict[str, dict[str, float]]:
        """Means of each set of weights of a run's last checkpoint."""
        found = self.engine.by_main(lambda: str(checkpoint.newest(run, keep_aside=False) or ""))
        if not found:
            raise UserError(f"{run} has no complete checkpoint to evaluate")
        if changed := resume.started_elsewhere(Path(found), self.config):
            raise UserError(f"{found} was trained beside another LoRA ({'; '.join(changed)}): restore it")
        checkpoint.load_weights(Path(found), self.policy)
        return {name: result.means for name, result in self.evaluate_all().items()}

    def evaluate_start(self) -> dict[str, dict[str, float]]:
        """Means of the model with `lora.init` alone, under the name lora."""
        return {"lora": self.evaluate(REFERENCE, self.config.evaluation.max_prompts, "evaluation, lora").means}

    def _evaluate_now(self) -> None:
        """A small evaluation of the raw weights on the way, with a grid and the guard's measurements."""
        e, stage = self.config.evaluation, stages.at(self.stages, self.step)
        result = self.evaluate(CURRENT, e.every_prompts, f"evaluation at {self.step}")
        if self.config.guard.prompts:
            with self.policy.use(CURRENT):
                result.means |= probe(
                    self.backbone, stage.oracle, self.rewards, stage.stop, self.grid, self.held_out, self.engine, self.config.guard,
                    guidance=self.config.sampler.guidance, batch_size=e.batch_size, seed=e.seed,
                )  # fmt: skip
        goal = zip(rewards_of(stage.oracle), stage.oracle.weights) if stage.oracle else ()
        self.guard.see(
            result.scores, stage.name, sum(w * result.scores[n].double() for n, w in goal if w and n in result.scores), self.step
        )
        if self.engine.is_main:
            self.log.write({"step": self.step, "eval": result.means, **self.clock.row})
            self._draw(result, f"step-{self.step:06d}")

    def _draw(self, result: Evaluation, name: str) -> Path:
        path = self.run / "samples" / f"{name}.png"
        draw_grid(result.images, result.captions(self.held_out.prompts[: len(result.images)]), path)
        self.log.image("samples", path, self.clock.row[self.clock.unit]["total"])
        return path

    def _finish(self) -> dict[str, Any]:
        """Full evaluation; LoRA, summary and report."""
        evaluations = self.evaluate_all()
        results = {name: result.means for name, result in evaluations.items()}
        if self.engine.is_main:
            for name, result in evaluations.items():
                self._draw(result, name)
        if self.engine.is_main or self.engine.zero_stage == 3:  # gathering partitions is a collective
            self.policy.export(self.run / "lora", EMA)
        summary = {
            "steps": self.step,
            "samples": self.step * self.geometry.samples,
            "seed": self.config.seed,
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "device_hours": {k: round(v, 6) for k, v in self.clock.hours.items()} | {"stitching": self.clock.stitching},
            "eval": results,
            **({"stopped": why} if (why := self.guard.verdict()) else {}),
        }
        if self.engine.is_main:
            write_json(self.run / "summary.json", summary)
            report.write(self.run)
            say(run_table(summary, self.clock.unit, self.run / "report.html"))
        self.log.close()
        self.engine.barrier()
        return summary
