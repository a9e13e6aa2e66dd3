"""What an update costs against its floor: the forward and backward passes it needs, each timed alone in the same run. And its peak memory, with and without checkpointing.

    python -m benchmarks.step_floor [recipes=all but the staged one] [samples=32] [repeats=5] [memory=true]

The first update is recorded: every call of the denoiser (rows, whether gradients reach the weights or the latent, which adapter) and of the oracle. Each kind of
call is then timed alone, interleaved with whole updates, so that a busy moment hits them alike. The further backward passes of MARBLE's full solve, which its first
update and every tenth takes, are not counted: its floor is low by them.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, interleaved, peak_megabytes, save, table
from rlstitch import config as cfg
from rlstitch.checks import checked
from rlstitch.rewards.clip import ClipReward
from rlstitch.trainer import Trainer
from rlstitch.types import Latent

RECIPES = (
    "draft,draft_stitch,align_prop,refl,nft,nft_stitch,flow_grpo,flow_grpo_fast,flow_grpo_fast_stitch,marble,marble_stitch,"
    "dpo_online,dpo_online_stitch,soar,sft,dpo"
)


class Recorder:
    """Counts the calls of a trainer's denoiser and oracle by kind, and can repeat any of them alone."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.calls = trainer, Counter()
        self.examples: dict[Any, tuple] = {}
        self.velocity, self.score = trainer.backbone.velocity, trainer.algorithm.score
        self.inside = False  # the oracle's own velocities are part of the oracle's time

    def __enter__(self):
        trainer = self.trainer

        def velocity(z, sigma, text, *, guidance=1.0):
            if not self.inside:
                grad = torch.is_grad_enabled()
                key = ("velocity", len(z), trainer.policy.active, grad, grad and z.requires_grad)
                self.calls[key] += 1
                self.examples.setdefault(key, (z.detach(), sigma, text, guidance))
            return self.velocity(z, sigma, text, guidance=guidance)

        def score(rollout):
            self.inside = True
            try:
                scores = self.score(rollout)
            finally:
                self.inside = False
            key = (
                "oracle",
                len(rollout.latent.z),
                scores.requires_grad,
            )  # ReFL's Tweedie estimate has a gradient though its latent has none
            if trainer.algorithm.needs_oracle:
                self.calls[key] += 1
                self.examples.setdefault(key, (rollout,))
            return scores

        trainer.backbone.velocity, trainer.algorithm.score = velocity, score
        return self

    def __exit__(self, *_):
        del self.trainer.backbone.velocity
        del self.trainer.algorithm.score

    def alone(self, key: Any) -> Any:
        """A function that runs one call of this kind, with its backward where gradients flow."""
        parameters = self.trainer.policy.parameters()
        if key[0] == "velocity":
            _, _, adapter, grad, through = key
            z, sigma, text, guidance = self.examples[key]

            def run() -> None:
                with self.trainer.policy.use(adapter), torch.set_grad_enabled(grad), self.trainer.engine.autocast():
                    leaf = z.clone().requires_grad_(through)
                    v = self.velocity(leaf, sigma, text, guidance=guidance)
                    if grad:
                        torch.autograd.grad(v.sum(), [*parameters, *([leaf] if through else [])], allow_unused=True)

            return run
        ((rollout,), through) = self.examples[key], key[2]

        def query() -> None:
            with torch.set_grad_enabled(through), self.trainer.engine.autocast():
                leaf = rollout.latent.z.detach().clone().requires_grad_(through and rollout.latent.z.requires_grad)
                scores = self.trainer.algorithm.oracle(Latent(leaf, rollout.latent.sigma), rollout.batch)
                if through:
                    torch.autograd.grad(scores.sum(), [*parameters, *([leaf] if leaf.requires_grad else [])], allow_unused=True)

        return query


def trainer_of(recipe: str, samples: int, out: Path, **changes: Any) -> Trainer:
    """A trainer of the shipped recipe at `samples` an update, started but not yet run; its stop and its depth are fixed, since updates are to be alike."""
    given = cfg.compose(recipe)
    images = given.get("batch", {}).get("images_per_prompt", 1)
    given = cfg.merge(
        given,
        {
            "name": recipe, "out": str(out), "resume": "never", "evaluation": {"every": 0}, "logging": {"wandb": "off", "progress": False},
            "batch": {"prompts_per_update": samples // images, "images_per_prompt": images, "micro_batch": samples}, **changes,
        },
    )  # fmt: skip
    if "low" in given.get("stop", {}):
        given["stop"] = {"_target_": "rlstitch.stops.Fixed", "after": (given["stop"]["low"] + given["stop"]["high"]) // 2}
    if "truncation" in given["algorithm"]:
        given["algorithm"]["truncation"] = "fixed"
    trainer = Trainer(checked(given, recipe))
    trainer._start()
    return trainer


def measure(recipe: str, samples: int, repeats: int, out: Path) -> dict[str, Any]:
    trainer = trainer_of(recipe, samples, out)
    for reward in trainer.rewards.values():  # as in any update but a run's first few: a reward encodes each prompt once a run
        if isinstance(reward, ClipReward) and reward.head is None:
            reward.embed_texts(trainer.stages[0].stream.prompts.prompts)
    with Recorder(trainer) as recorder:
        trainer._update()
    cases = {"update": trainer._update} | {key: recorder.alone(key) for key in recorder.calls}
    seconds = interleaved(cases, repeats)
    floor = sum(count * seconds[key] for key, count in recorder.calls.items())
    return {
        "update_seconds": round(seconds["update"], 4),
        "floor_seconds": round(floor, 4),
        "ratio": round(seconds["update"] / floor, 3),
        "passes": [
            {"call": " ".join(map(str, key)), "count": count, "seconds": round(seconds[key], 4)} for key, count in recorder.calls.items()
        ],
    }


def memory(recipe: str, samples: int, out: Path) -> dict[str, float]:
    """Peak megabytes of one update beyond what lies in memory anyway, by K and activation checkpointing."""
    depths = (1, 3) if recipe.startswith("draft") else (None,)
    found = {}
    for k in depths:
        for recompute in (False, True):
            changes: dict[str, Any] = {"sampler": {"activation_checkpointing": recompute}}
            if k:
                changes["algorithm"] = {"grad_steps": k}
            trainer = trainer_of(recipe, samples, out, **changes)
            found[(f"K = {k}, " if k else "") + ("checkpointed" if recompute else "plain")] = round(peak_megabytes(trainer._update), 1)
    return found


def main() -> None:
    options = arguments({"recipes": RECIPES, "samples": "32", "repeats": "5", "memory": "true"})
    samples, results = int(options["samples"]), {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options["recipes"].split(","):
            results[recipe] = measure(recipe, samples, int(options["repeats"]), Path(folder))
            print(recipe, {k: v for k, v in results[recipe].items() if k != "passes"}, flush=True)
            if options["memory"] == "true":
                results[recipe]["peak_megabytes"] = memory(recipe, samples, Path(folder))
                print(recipe, results[recipe]["peak_megabytes"], flush=True)
    lines = []
    for recipe, row in results.items():
        peaks = "; ".join(f"{k}: {v:.0f}" for k, v in row.get("peak_megabytes", {}).items())
        lines.append([recipe, *(f"{row[k]:.3f}" for k in ("update_seconds", "floor_seconds", "ratio")), peaks])
    table(
        "step_floor", ["recipe", "update, s", "floor, s", "ratio", "peak memory of an update, MB"], lines, f"{samples} samples an update."
    )
    save("step_floor", {"samples": samples, "recipes": results})


if __name__ == "__main__":
    main()
