"""Values on a denoiser with double and single blocks and no unconditional branch, the FLUX miniature: where to cut it, and under which text.

    python -m benchmarks.flux_miniature [parts=streams,texts,train] [seeds=0,1,2] [steps=100] [images=4000] [updates=100] [prompts=32] [threads=0] [out=values/flux]

streams: every block of both streams, under the empty prompt and under the picture's own, the best early block of the reward for each: closed-form loss, and after
         `steps` of distillation recall and correlation at each noise level.
texts:   whole values of `clip` under either text: correlation with Monte Carlo on the policy's own latents, Recall@1 of V over the prompts (each picture asked under
         every prompt, so that a value that knows the prompt gains nothing by it), FK steering, and DRaFT-1, by seed.
train:   draft_stitch_flux as it is shipped, by seed: base and EMA on the held-out judges.
Everything is kept under `out`, and the rows of texts in results/, so that the script goes on where it stopped, and seeds can be run apart.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, row, save, spread, table, train
from benchmarks.material import Material
from rlstitch import config as cfg
from rlstitch import steer
from rlstitch.data import encode
from rlstitch.files import write_json
from rlstitch.parts import Parts
from rlstitch.prompts import read_prompts
from rlstitch.stitch import measure
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.distill import distill, latents_of
from rlstitch.stitch.model import CARD, StitchedValueModel
from rlstitch.stitch.search import search
from rlstitch.types import Latent

TEXTS = ("empty", "prompt")
JUDGES = ("clip", "hps", "preference_b", "aesthetic", "detector")
LEVELS = tuple(f"{s:g}" for s in measure.SIGMAS)


def known(file: Path, make: Any) -> Any:
    """What a JSON file holds, made first where it is not there."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text())


class Streams(Material):
    """Closed-form stitches of every block under both texts; `cell` distils the best one of a block."""

    def __init__(self, options: dict[str, str]):
        super().__init__("clip_flux", int(options["images"]))
        self.steps, self.out = int(options["steps"]), Path(options["out"])
        captions = cfg.build(self.recipe.images | {"n": int(options["images"])})[1]
        self.text = {"empty": (None, None), "prompt": (self.text_of(captions), self.text_of(self.prompts))}

    def text_of(self, prompts: list[str]) -> stitch.TextOf:
        known = self.backbone.encode_prompts(prompts)
        return lambda rows: known[rows]

    def cells(self, text: str) -> list[dict[str, Any]]:
        own, held = self.text[text]
        pictures = self.images[: self.recipe.search_images].float() / 255
        found = search(self.backbone, self.reward, pictures, seed=self.recipe.seed, text_of=own)
        best = [min((p for p in found.table if p.i == i), key=lambda p: p.normalised) for i in range(1, found.num_blocks + 1)]
        return [known(self.out / f"cell-{text}-{p.i}-{self.steps}.json", lambda p=p: self.cell(found, p, text, own, held)) for p in best]

    def cell(self, found: Any, pair: Any, text: str, own: Any, held: Any) -> dict[str, Any]:
        targets, tokens, norm = self.targets
        model = StitchedValueModel.from_search(
            self.backbone, self.reward, pair.i, pair.j, pair.weight, pair.bias, cls_state=found.cls[pair.j], norm=norm,
            normalise=self.recipe.normalise, sigma_range=(0.0, 1.0), card={"text": text},
        )  # fmt: skip
        distill(model, self.latents, targets, tokens, dataclasses.replace(self.recipe.distill, steps=self.steps), text_of=own)
        quality = stitch.quality(model, self.held[0], self.prompts, self.held[1], held)
        return {"text": text, "i": pair.i, "j": pair.j, "normalised": round(pair.normalised, 4), "quality": quality}


@torch.no_grad()
def recall_of_values(model: StitchedValueModel, latents: Tensor, prompts: list[str], text: Any, size: int = 512) -> dict[str, float]:
    """By sigma: share of N pictures whose V is highest under their own of N prompts."""
    n, out = len(prompts), {}
    batch = measure.batch_of(prompts, text)
    picture, prompt = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    for level in measure.SIGMAS:
        noised, scores = measure.noised(latents, level), []
        for rows in torch.arange(n * n).split(size):
            z, asked = Latent(noised.z[picture[rows]], noised.sigma[picture[rows]]), prompt[rows]
            part = measure.batch_of([prompts[k] for k in asked.tolist()], batch.text[asked])
            scores.append(model.value(z, part))
        out[f"{level:g}"] = round(float((torch.cat(scores).view(n, n).argmax(1) == torch.arange(n)).float().mean()), 4)
    return out


class Texts:
    """Whole values under either text, and what is made of them."""

    def __init__(self, options: dict[str, str]):
        self.options, self.out, self.found = options, Path(options["out"]), None
        self.given = cfg.compose("draft_stitch_flux")
        self.parts = Parts.of(self.given["model"], {"clip": self.given["rewards"]["clip"]})

    def value(self, text: str, seed: int) -> str:
        folder = self.out / f"clip-{text}-{seed}"
        if not (folder / CARD).exists():
            more = {"name": folder.name, "out": str(self.out), "text": text, "seed": seed, "threads": int(self.options["threads"])}
            given = cfg.merge(cfg.compose("stitch_clip_flux"), more | {"distill": {"seed": seed}})
            stitch.run(stitch.checked(given, folder.name))
        return str(folder)

    def quality(self, references: Any, text: str, seed: int, pictures: int = 150) -> dict[str, Any]:
        """Correlation with Monte Carlo and recall, by sigma."""
        backbone, reward = self.parts.backbone, self.parts.rewards["clip"]
        model = StitchedValueModel.from_pretrained(self.value(text, seed), backbone=backbone, reward=reward)
        rows = measure.calibrations(measure.stitched(text, model), references, "clip", 16)
        held, prompts = cfg.build({"_target_": "rlstitch.shapes.images.distinct", "n": pictures, "seed": 502})
        recall = recall_of_values(model, latents_of(backbone, held), prompts, backbone.encode_prompts(prompts))
        return {
            "blocks": model.card["blocks"], "reward_block": model.card["reward_block"], "recall": recall,
            "correlation": {level: round(row["correlation"], 4) for level, row in rows.items()},
        }  # fmt: skip

    def row(self, text: str, seed: int) -> dict[str, Any]:
        """All figures of one value."""
        file = self.out / f"quality-{text}-{seed}.json"
        if not file.exists() and self.found is None:
            self.found = self.references()
        found = known(file, lambda: self.quality(self.found, text, seed))
        return found | {"draft": self.draft(text, seed), "fk": self.steered(text, seed)}

    def references(self, count: int = 48) -> Any:
        prompts = read_prompts("shapes:held_out.jsonl", "")
        index = list(range(0, len(prompts), max(1, len(prompts) // count)))[:count]
        batch = encode(self.parts.backbone, prompts).batch(index, torch.tensor(index))
        return measure.references(self.parts.backbone, self.parts.rewards, batch, rollouts=16)

    def draft(self, text: str, seed: int) -> dict[str, float]:
        more = [f"values.clip={self.value(text, seed)}", "oracle.weights={clip: 1.0}", f"seed={seed}", f"updates={self.options['updates']}"]
        told = ["evaluation.final=[ema]", "evaluation.every=0", f"threads={self.options['threads']}"]
        return train("draft_stitch_flux", f"draft-{text}-{seed}", self.out, *more, *told)["eval"]["ema"]

    def steered(self, text: str, seed: int) -> dict[str, Any]:
        """FK + StitchVM of the fk_stitch recipe under embedded guidance 3, without a second branch; unsteered from the same noise beside it."""
        more = {
            "name": f"fk-{text}-{seed}", "out": str(self.out), "seed": seed, "values": {"clip": self.value(text, seed)}, "baseline": True,
            "model": self.given["model"] | {"embedded_guidance": 3.0}, "sampler": {"guidance": 1.0}, "progress": False,
            "max_prompts": int(self.options["prompts"]), "threads": int(self.options["threads"]), "judges": list(JUDGES),
        }  # fmt: skip
        given = cfg.merge(cfg.compose("fk_stitch"), more)
        given["oracle"]["weights"] = {"clip": 1.0}
        file = self.out / more["name"] / "scores.json"
        if not file.exists():
            steer.Job(steer.checked(given, "fk_stitch")).run()
        return json.loads(file.read_text())["means"]


def over(rows: list[dict[str, float]], name: str) -> str:
    return spread([row[name] for row in rows])


def main() -> None:
    options = arguments(
        dict(
            parts="streams,texts,train",
            seeds="0,1,2",
            steps="100",
            images="4000",
            updates="100",
            prompts="32",
            threads="0",
            out="values/flux",
        )
    )
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    parts, seeds = options["parts"].split(","), [int(s) for s in options["seeds"].split(",")]
    if "streams" in parts:
        study = Streams(options)
        cells = [cell for text in TEXTS for cell in study.cells(text)]
        doubles = len(study.backbone.transformer.transformer_blocks)
        save("flux_streams", {"steps": study.steps, "double_blocks": doubles, "cells": cells})
        rows = [
            [c["text"], f"{c['i']} ({'double' if c['i'] <= doubles else 'single'})", f"{c['normalised']:.3f}"] + [f"{c['quality'][s]['correlation']:.3f}" for s in LEVELS]
            for c in cells
        ]  # fmt: skip
        note = f"Correlation with the clean reward by sigma after {study.steps} steps, over matched and mismatched prompts; the best early block of the reward for each."
        table("flux_streams", ["text", "cut after block", "closed-form loss", *LEVELS], rows, note)
    if "texts" in parts:
        job = Texts(options)
        own = {
            text: [row("flux_texts", f"{text} seed {seed}", lambda text=text, seed=seed: job.row(text, seed)) for seed in seeds]
            for text in TEXTS
        }
        rows = []
        for text in TEXTS:
            for figure in ("correlation", "recall"):
                rows.append([text, figure, *(over([one[figure] for one in own[text]], s) for s in LEVELS)])
        table(
            "flux_texts",
            ["text", "by sigma", *LEVELS],
            rows,
            "Correlation with Monte Carlo of 16 rollouts on the policy's own latents; Recall@1 of V over prompts.",
        )
        rows = [[text, what, *(over([one[key][side] if side else one[key] for one in own[text]], judge) for judge in JUDGES)] for text in TEXTS for what, key, side in (("DRaFT-1", "draft", ""), ("unsteered", "fk", "baseline"), ("FK", "fk", "steered"))]  # fmt: skip
        table("flux_texts_use", ["text", "", *JUDGES], rows, "Trained on or steered by `clip` alone.")
    if "train" in parts:
        once = ["evaluation.final=[base, ema]", f"threads={options['threads']}"]
        found = [train("draft_stitch_flux", f"stitch-{seed}", Path(options["out"]), f"seed={seed}", *once)["eval"] for seed in seeds]
        save("flux_train", {"seeds": seeds, "runs": found})
        rows = [
            [name, *(over([run[kind] for run in found], judge) for judge in JUDGES)]
            for name, kind in (("base", "base"), ("DRaFT-1 + StitchVM", "ema"))
        ]
        table("flux_train", ["", *JUDGES], rows, f"Held-out prompts, {len(seeds)} seeds; trained on clip + hps.")


if __name__ == "__main__":
    main()
