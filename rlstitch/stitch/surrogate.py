"""Surrogates: a reward that is no feed-forward network (a detector, a remote service, any black box) distilled into one, so that it can be stitched.

The paper's stated limit. The surrogate is a CLIP model finetuned so that scale <image, text> + offset predicts the black box on the generator's own
pictures; being linear in the image embedding it stays E[r | z] when stitched with `normalise=false`. `launch/surrogate.py` runs it from a recipe.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch import config as cfg
from rlstitch import scheduler
from rlstitch.asking import ask
from rlstitch.data import PromptSet, read_prompts
from rlstitch.distributed import autocast
from rlstitch.figures import known
from rlstitch.files import write_json
from rlstitch.hub import model_folder
from rlstitch.lengths import fitting
from rlstitch.part_checks import part_faults, unread
from rlstitch.parts import Parts, at_hand
from rlstitch.paths import ready
from rlstitch.ranges import Count, Name, Range, Rate, Seed, Text, Threads
from rlstitch.stitch import measure
from rlstitch.stitch.generate import GenerateConfig, generate, pictures_of
from rlstitch.stitch.generate import faults as generate_faults
from rlstitch.telling import progress, say
from rlstitch.types import Batch, Reward, UserError

START = "the reward to start from"  # among the parts, beside the black box
UNKNOWN = 0.1  # share of pictures that may be without a score, as a service's are now and then


@dataclass
class SurrogateConfig:
    """rewards: the black box alone. start: the part of a CLIP-family reward to finetune. generate: the model's own pictures to learn from; `held_generations` more
    on the prompts of `held_out` measure it.

    A prompt's picture is scored under its own prompt and under `others` prompts of other pictures, so that both high and low scores are seen.
    """

    name: Name = ""
    out: Text = "values"
    seed: Seed = 0
    threads: Threads = 0
    check: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    generate: GenerateConfig = field(default_factory=lambda: GenerateConfig(count=2048))
    held_out: Text = "shapes:held_out.jsonl"
    held_generations: Count = 344
    others: Annotated[int, Range(0, 1000)] = 1
    steps: Count = 800
    batch_size: Count = 64
    lr: Rate = 3e-4
    surrogate: bool = True


def checked(given: dict[str, Any], name: str) -> SurrogateConfig:
    """The typed recipe, or one UserError that lists every fault."""
    cfg.for_launcher(given, "surrogate.py", name)
    config, faults = cfg.fill(SurrogateConfig, given)
    faults += part_faults(config)
    if len(config.rewards) != 1:
        faults.append(f"'rewards' must hold the one reward to distil, not {len(config.rewards)}")
    faults += cfg.check_part("start", config.start, kind="reward") + generate_faults("generate", config.generate, config.model)
    scheduler.of_recipe("generate.shift", config.generate.shift, config.model, faults)
    if config.generate.count < 1:
        faults.append(
            f"'generate.count' must be positive, not {config.generate.count}: the surrogate learns from the model's pictures alone"
        )
    held = fitting(faults, "held_out", config.held_out, "", config.model, "generate.truncate", config.generate.truncate)
    with suppress(UserError):  # told by generate_faults
        for where, prompts in (("held_out", held), ("generate.prompts", read_prompts(config.generate.prompts, config.generate.column))):
            remedy = f"take prompts that it reads ({where})"
            faults += [] if prompts is None else unread("rewards", config.rewards, config.rewards, prompts, remedy)
    cfg.named(config, name, faults)
    if faults:
        raise cfg.report(faults, name)
    return checked(given, name) if at_hand(config) else config


def scored(name: str, black_box: Reward, images: Tensor, asked: PromptSet, rows: list[int], batch_size: int = 64) -> Tensor:
    """The black box's scores [N] of pictures under the given prompt rows, NaN where it gives none: those are never learned as numbers, and more than a tenth of them is an error."""
    out = []
    for start in range(0, len(images), batch_size):
        part = rows[start : start + batch_size]
        batch = Batch([asked.prompts[i] for i in part], torch.tensor(part), torch.tensor(part), [asked.rows[i] for i in part])
        out.append(ask(name, black_box, images[start : start + batch_size].float() / 255, batch).cpu())
    scores = known(torch.cat(out))
    lost = int(scores.isnan().sum())
    if lost > UNKNOWN * len(scores):
        raise UserError(f"reward '{name}' gave {lost} scores of {len(scores)} that are not finite: mend it before distilling it")
    if lost:
        say(f"reward '{name}' gave no score for {lost} of {len(scores)} pictures, which are left out")
    return scores


class Student(torch.nn.Module):
    """A trainable CLIP with a line on its cosine."""

    def __init__(self, reward: Any):
        super().__init__()
        self.clip = reward.model.float().requires_grad_(True)
        self.line = torch.nn.Parameter(torch.tensor([2.0, 0.0]))  # scale and offset
        self.reward = [reward]

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Predicted scores [B] of pictures [B, 3, H, W] in [0, 1] under tokenised prompts [B, L]."""
        image = F.normalize(self.reward[0].encode(images)[0], dim=-1)
        text = F.normalize(self.reward[0].read_text(ids), dim=-1)
        return self.line[0] * (image * text).sum(-1) + self.line[1]


def fit(student: Student, images: Tensor, prompts: list[str], truth: Tensor, config: SurrogateConfig) -> float:
    """Least squares on the black box's scores; returns the mean loss of the last tenth of the steps."""
    reward, generator = student.reward[0], torch.Generator().manual_seed(config.seed)
    ids = reward.tokens(prompts)
    optimiser, losses = torch.optim.AdamW(student.parameters(), lr=config.lr, weight_decay=0.02), []
    seen = torch.isfinite(truth).nonzero()[:, 0]
    student.train()
    bar = progress(config.steps, config.name, "step")
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
        index = seen[torch.randint(len(seen), (config.batch_size,), generator=generator)]
        with autocast(reward.device.type, "auto"):
            predicted = student(images[index % len(images)].float().to(reward.device) / 255, ids[index].to(reward.device)).float()
        loss = (predicted - truth[index].to(predicted.device)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {sum(losses[-20:]) / len(losses[-20:]):.4f}")
        bar.update()
    bar.close()
    student.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def pairs_of(name: str, black_box: Reward, images: Tensor, prompts: PromptSet, rows: list[int], others: int) -> tuple[list[str], Tensor]:
    """(prompt, score) of every picture under its own prompt, then of all again under those of other pictures, `others` times."""
    asked, scores = [], []
    for roll in range(1 + others):
        shifted = rows[37 * roll % len(rows) :] + rows[: 37 * roll % len(rows)]
        asked += [prompts.prompts[i] for i in shifted]
        scores.append(scored(name, black_box, images, prompts, shifted))
    return asked, torch.cat(scores)


def run(config: SurrogateConfig) -> dict[str, Any]:
    """Generate, score, finetune, measure on held-out prompts; a CLIPModel directory with `surrogate.json` in <out>/<name>."""
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = ready(Path(config.out) / config.name)
    torch.manual_seed(config.seed)
    name, node = next(iter(config.rewards.items()))
    parts = Parts.of(config.model, {name: node, START: config.start})
    backbone, black_box, start, device = parts.backbone, parts.rewards[name], parts.rewards[START], parts.device
    sets = [read_prompts(path, column) for path, column in ((config.generate.prompts, config.generate.column), (config.held_out, ""))]
    seen, held_out = parts.encoded(*sets, truncate=config.generate.truncate, allow="generate.truncate")
    for rows in (seen, held_out):
        parts.probe([name], rows.two())
    latents, rows, seconds = generate(backbone, seen, config.generate, "pictures")
    images = pictures_of(backbone, latents)
    asked, truth = pairs_of(name, black_box, images, seen, rows, config.others)
    latents, held_rows, _ = generate(
        backbone, held_out, dataclasses.replace(config.generate, count=config.held_generations), "held-out pictures"
    )
    held = pictures_of(backbone, latents)
    held_asked, held_truth = pairs_of(name, black_box, held, held_out, held_rows, config.others)
    student = Student(start)
    last = fit(student, images, asked, truth, config)
    folder.mkdir(parents=True, exist_ok=True)
    student.clip.half().save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    for said in ("processor_config.json", "preprocessor_config.json"):
        if (file := model_folder(config.start["path"], "the reward to start from") / said).is_file():
            shutil.copy(file, folder / said)
    scale, offset = student.line.detach().tolist()
    card: dict[str, Any] = {"scale": scale, "offset": offset, "of": node, "start": config.start, "train_loss": last}
    write_json(folder / "surrogate.json", card)
    built = cfg.build(config.start | {"path": str(folder), "scale": "surrogate"}, kind="reward", device=device)
    with torch.no_grad():
        predicted = torch.cat(
            [
                ask(
                    "surrogate", built, held[k % len(held) : k % len(held) + 1].float().to(device) / 255, measure.batch_of([held_asked[k]])
                ).cpu()
                for k in range(len(held_truth))
            ]
        )
    own = slice(0, len(held))
    card |= {
        "held_out_correlation": round(measure.correlation(predicted, held_truth), 4),
        "held_out_correlation_own_prompt": round(measure.correlation(predicted[own], held_truth[own]), 4),
        "held_out_rmse": round(float((predicted - held_truth).square().nanmean().sqrt()), 4),
        "mean_score": {
            "truth": round(float(held_truth[own].nanmean()), 4),
            "surrogate": round(float(predicted[own][torch.isfinite(held_truth[own])].mean()), 4),
        },
        "pictures": len(images),
        "generate_seconds": round(seconds, 1),
        "hardware": cfg.hardware(),
    }
    write_json(folder / "surrogate.json", card)
    say(
        f"{config.name}: surrogate of '{name}' saved to {folder}; correlation with the truth on held-out prompts {card['held_out_correlation']:.3f}"
    )
    return card
