"""The stitch job: search, distil, measure by sigma, save with a card. `launch/stitch.py` runs it from a recipe."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlstitch import config as cfg
from rlstitch import lock, resume, scheduler
from rlstitch.data import build_pictures, read_rows
from rlstitch.distributed import resolve_precision, world_size
from rlstitch.fingerprints import vae_names
from rlstitch.part_checks import model_faults, reward_faults
from rlstitch.parts import Parts, at_hand, pinned
from rlstitch.paths import ready
from rlstitch.prompts import PromptSet, read_prompts
from rlstitch.ranges import Count, CountOrNone, Name, NotNegative, Range, Seed, Share, Text, Threads, misfit
from rlstitch.schema import CheckpointConfig, LoggingConfig
from rlstitch.stitch import measure
from rlstitch.stitch.baselines import noisy_clip, vae_stitch
from rlstitch.stitch.distill import Distillation, DistillConfig, latents_of, outputs_of
from rlstitch.stitch.generate import GenerateConfig, Generated
from rlstitch.stitch.generate import faults as generate_faults
from rlstitch.stitch.loop import Loop, inputs_of
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.stitch.search import SearchResult, search
from rlstitch.stitch.store import Pictures, Store
from rlstitch.telling import say, table
from rlstitch.types import Conditioning, UserError

TextOf = Callable[[Tensor], Conditioning]  # rows [B] -> the text of their prompts
SEARCHED = ("blocks", "reward_block", "search", "search_seconds")  # of a card, what a search has found
TURNS = 4  # prompts that a picture is scored under, its own first


@dataclass
class StitchRecipe:
    """model, reward: parts to stitch; rewards: several, by name, in place of the one, stitched on the same draws in one job that runs what they share once: NAME/REWARD each.
    images, held_out: parts that give pictures ({_target_: ...}(n, seed) -> (uint8 [N, 3, H, W], prompts)); files and plain shards are read a part at a time. Their latents and
    what the rewards make of them lie in the cache; keep_tokens: the rewards' output tokens, too, which are most of it, or they are computed again at every step. generate: pictures of the model itself to distil on beside `images` (half of the paper's data, HPDv2, are generated ones, too).

    kind: `stitch` for StitchVM, or a baseline on the latent itself: `vae` (closed-form stitch, no denoiser) or `noisy_clip` (random projection).
    blocks: the denoiser block to cut after ("best", "cheapest" within `margin` among the first `max_fraction` of the blocks, or a number);
    reward_block: 0 takes the search's. ridge: penalty of the closed-form fit. normalise: unit-norm student as in the paper; else its norm is free and
    falls with its uncertainty, on latents unlike the training data's, too. text: what the denoiser's blocks are run under, the empty prompt, or the pictures' own
    (`prompt`), which a model without an unconditional branch has computed anyway. resume: auto, never or a checkpoint folder; checkpoints are kept until the value model is
    saved. measure_every: steps between two measurements on `held_out`, in metrics.jsonl and W&B; 0 for none on the way.
    """

    name: Name = ""
    kind: Literal["stitch", "vae", "noisy_clip"] = "stitch"
    out: Text = "values"
    model: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    keep_tokens: bool = True
    images: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    search_images: Count = 200
    max_reward_block: Count = 4
    blocks: Text = "cheapest"
    reward_block: CountOrNone = 0
    ridge: NotNegative = 0.0
    margin: NotNegative = 0.05
    max_fraction: Annotated[float, Range(0, 1, open="low")] = 0.5
    normalise: bool = True
    text: Literal["empty", "prompt"] = "empty"
    sigma_low: Share = 0.0
    sigma_high: Share = 1.0
    threads: Threads = 0
    check: bool = False
    resume: Text = "auto"
    seed: Seed = 0
    distill: DistillConfig = field(default_factory=DistillConfig)
    measure_every: CountOrNone = 250
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=250, keep=1))
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """The rewards' nodes by name; of a single one it is ''."""
        return self.rewards or {"": self.reward}


def checked(given: dict[str, Any], name: str) -> StitchRecipe:
    """The typed recipe, or one UserError that lists every fault."""
    cfg.for_launcher(given, "stitch.py", name)
    recipe, faults = cfg.fill(StitchRecipe, given)
    for part in ("model", "images", "held_out"):
        faults += cfg.check_part(part, getattr(recipe, part), kind="model" if part == "model" else "images")
    faults += model_faults(recipe.model)
    if recipe.reward and recipe.rewards:
        faults.append(f"'reward' and 'rewards' are both given: leave one out (rewards has {', '.join(recipe.rewards)})")
    for key, node in recipe.nodes.items():
        where = f"rewards.{key}" if key else "reward"
        if key and (why := misfit(key, Name) or ("must hold no ." if "." in key else "")):
            faults.append(f"'{where}': the name {why}")
        wrong = reward_faults(where, node)
        faults += wrong
        if not wrong and not hasattr(cfg.load_class(node["_target_"]), "tail"):
            faults.append(
                f"'{where}' {node['_target_']} cannot be entered at a block (see rlstitch.types.StitchableReward): distil it into one that can with launch/surrogate.py, and stitch that"
            )
    if recipe.distill.batch_size % world_size():
        faults.append(
            f"'distill.batch_size' is {recipe.distill.batch_size}, which {world_size()} ranks cannot share evenly: take a multiple"
        )
    if recipe.blocks not in ("best", "cheapest") and not (recipe.blocks.isascii() and recipe.blocks.isdigit() and int(recipe.blocks)):
        faults.append(f"'blocks' must be best, cheapest or a number, not {recipe.blocks!r}")
    faults += generate_faults("generate", recipe.generate, recipe.model)
    if recipe.generate.count:
        scheduler.of_recipe("generate.shift", recipe.generate.shift, recipe.model, faults)
    if recipe.kind != "stitch":
        plain = StitchRecipe()
        own = ("blocks", "reward_block", "ridge", "sigma_low", "sigma_high", "text")
        faults += [
            f"'{k}' is {getattr(recipe, k)!r}, but kind={recipe.kind} has no such choice: leave it out"
            for k in own
            if getattr(recipe, k) != getattr(plain, k)
        ]
    if not recipe.sigma_low < recipe.sigma_high:
        faults.append(f"'sigma_low' and 'sigma_high' must satisfy 0 <= low < high <= 1, not {recipe.sigma_low} and {recipe.sigma_high}")
    cfg.named(recipe, name, faults)
    if faults:
        raise cfg.report(faults, name)
    return checked(given, name) if at_hand(recipe) else recipe


def choose(result: SearchResult, recipe: StitchRecipe):
    """The pair that the recipe asks for."""
    if recipe.blocks == "best":
        pairs = result.table
    elif recipe.blocks == "cheapest":
        pairs = [p for p in result.table if p.i == result.cheapest(margin=recipe.margin, max_fraction=recipe.max_fraction).i]
    else:
        pairs = [p for p in result.table if p.i == int(recipe.blocks)]
    pairs = [p for p in pairs if not recipe.reward_block or p.j == recipe.reward_block]
    if not pairs:
        raise UserError(
            f"no pair with blocks={recipe.blocks}, reward_block={recipe.reward_block}: the denoiser has {result.num_blocks} blocks, the search went to reward block {max(p.j for p in result.table)}"
        )
    return min(pairs, key=lambda p: p.normalised)


@torch.no_grad()
def quality(
    model: StitchedValueModel, latents: Tensor, prompts: list[str], clean_outputs: Tensor, text_of: TextOf | None = None
) -> dict[str, dict[str, float]]:
    """By sigma: Recall@1 both ways over the N prompts (where the reward embeds text), and the correlation of V with the clean reward over matched and mismatched prompts.

    clean_outputs: of the clean pictures, by `distill.outputs_of`. text_of: of rows, for a value model that is run under the prompts' text. It then knows a picture's prompt whatever the picture shows, and its recall says little.
    """
    subject, reward, out = measure.stitched("", model), model.reward, {}
    clean = scores_under(reward, [clean_outputs] * TURNS, prompts)
    for level in measure.SIGMAS:
        noised, outputs = measure.noised(latents, level), []
        for k in range(TURNS if text_of else 1):
            text = text_of((torch.arange(len(prompts)) + k) % len(prompts)) if text_of else None
            outputs.append(measure.in_parts(subject.output, noised, measure.batch_of(prompts, text)))
        row = {"correlation": measure.correlation(scores_under(reward, outputs if text_of else outputs * TURNS, prompts), clean)}
        if measure.embeds_text(reward):
            texts = reward.embed_texts(prompts)
            row |= {"recall_at_1": measure.recall(outputs[0], texts), "recall_at_1_text_to_image": measure.recall(texts, outputs[0])}
        out[f"{level:g}"] = {k: round(v, 4) for k, v in row.items()}
    return out


def scores_under(reward: Any, outputs: Sequence[Tensor], prompts: list[str]) -> Tensor:
    """Scores of N pictures under their own prompt, by the first `outputs`, and under that of the next row, by the second, and so on, so that matches and
    mismatches both count: [N len(outputs)]."""
    return torch.cat([measure.scored(reward, output, prompts[k:] + prompts[:k]) for k, output in enumerate(outputs)])


def assemble(
    recipe: StitchRecipe,
    backbone: Any,
    reward: Any,
    store: Store,
    norm: float,
    card: dict[str, Any],
    text_of: TextOf | None = None,
    found: dict[str, Any] | None = None,
    ranks: tuple[int, int] = (0, 1),
) -> StitchedValueModel:
    """The untrained value model of the recipe's kind. found: what a search before gave for its card, where the weights are loaded after this. ranks: this one, and how many."""
    first = torch.arange(min(len(store), 1000 if recipe.kind == "vae" else recipe.search_images))
    if recipe.kind == "vae":
        return vae_stitch(
            backbone,
            reward,
            store.pictures(first).float() / 255,
            store.latents(first).to(backbone.device),
            norm=norm,
            normalise=recipe.normalise,
            seed=recipe.seed,
            card=card,
        )
    if recipe.kind == "noisy_clip":
        return noisy_clip(backbone, reward, norm=norm, normalise=recipe.normalise, seed=recipe.seed, card=card)
    told = dict(norm=norm, normalise=recipe.normalise, sigma_range=(recipe.sigma_low, recipe.sigma_high))
    if found:
        blank = torch.zeros(reward.width, backbone.width, device=backbone.device)
        cut = found["blocks"], found["reward_block"]
        return StitchedValueModel.from_search(backbone, reward, *cut, blank, blank[:, 0], cls_state=None, card=card | found, **told)
    started = time.perf_counter()
    pictures = store.pictures(first).float() / 255
    how = dict(
        max_reward_block=recipe.max_reward_block, seed=recipe.seed, ridge=recipe.ridge, text_of=text_of, rank=ranks[0], world=ranks[1]
    )
    result = search(backbone, reward, pictures, **how)
    pair, seconds = choose(result, recipe), time.perf_counter() - started
    say(
        f"{card['name']}: search over {len(result.table)} pairs took {seconds:.1f} s; best {result.best.i, result.best.j} ({result.best.normalised:.4f} of the variance), taken {pair.i, pair.j} ({pair.normalised:.4f})"
    )
    return StitchedValueModel.from_search(
        backbone,
        reward,
        pair.i,
        pair.j,
        pair.weight,
        pair.bias,
        cls_state=result.cls[pair.j],
        **told,
        card=card | {"blocks": pair.i, "reward_block": pair.j, "search": result.rows(), "search_seconds": round(seconds, 1)},
    )


def encoded(parts: Parts, prompts: PromptSet, recipe: StitchRecipe) -> PromptSet:
    return parts.encoded(prompts, truncate=recipe.generate.truncate, allow="generate.truncate")[0]


def texts(recipe: StitchRecipe, parts: Parts, prompts: list[str]) -> TextOf | None:
    """What gives the text of rows of pictures, where the recipe runs the denoiser under their prompts."""
    if recipe.text == "empty":
        return None
    known = encoded(parts, PromptSet(prompts, [{}] * len(prompts)), recipe)
    return lambda rows: known.batch(rows.tolist(), rows).text


def run(recipe: StitchRecipe) -> dict[str, StitchedValueModel]:
    """Search, distil, measure, save to <out>/<name> (of several rewards to <out>/<name>/<reward>); or go on where that was stopped. -> The value models by the names of
    their rewards, '' of a single one. Raises Interrupted after a signal, and UserError where another process works there."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    folder, inputs = ready(Path(recipe.out) / recipe.name), inputs_of(recipe)
    resume.may_go_on(recipe, lambda: inputs)
    loop = Loop(folder, recipe, inputs)
    try:
        with lock.held(folder, loop.engine.by_main):
            loop.begin()
            models = stitched(recipe, loop)
            for name, model in models.items() if loop.engine.is_main else ():
                model.save_pretrained(ready(folder / name))
            loop.engine.barrier()
            loop.end()
    finally:
        loop.engine.close()
    for name, model in models.items() if loop.engine.is_main else ():
        rows = [[sigma, *(f"{v:.3f}" for v in figures.values())] for sigma, figures in model.card["quality"].items()]
        hours = f"{model.card['device_hours']:.3g}"
        say(table(["sigma", *next(iter(model.card["quality"].values()))], rows), f"device-hours {hours}; saved to {folder / name}")
    return models


def stitched(recipe: StitchRecipe, loop: Loop) -> dict[str, StitchedValueModel]:
    """The value models of a recipe, with their cards."""
    torch.manual_seed(recipe.seed)
    engine = loop.engine
    parts = Parts.of(recipe.model, recipe.nodes, engine=engine)
    backbone = parts.backbone
    for name, reward in parts.rewards.items() if recipe.kind == "stitch" else ():
        if recipe.max_reward_block > reward.num_blocks:
            which = f"the reward '{name}'" if name else "the reward"
            raise UserError(f"'max_reward_block' is {recipe.max_reward_block}, but {which} has {reward.num_blocks} blocks")
    source = engine.together(lambda: Pictures(read_rows("images", recipe.images)))
    held, prompts = engine.together(lambda: build_pictures("held_out", recipe.held_out))
    if recipe.text == "prompt" and (
        bare := [where for where, what in (("images", source.prompts), ("held_out", prompts)) if not any(what)]
    ):
        raise UserError(
            f"'text' is prompt, and the pictures of '{bare[0]}' have no prompts: give captions (metadata.jsonl, or a .txt beside each picture), or leave 'text' out"
        )
    parts.probe(list(parts.rewards), measure.batch_of(["", ""]))
    sets, made = [source], {}
    if recipe.generate.count:
        asked_for = encoded(parts, read_prompts(recipe.generate.prompts, recipe.generate.column), recipe)
        sets.append(Generated(backbone, asked_for, recipe.generate, f"{recipe.name}: pictures"))
        made = {"generate": dataclasses.asdict(recipe.generate) | {"precision": resolve_precision(parts.device, recipe.generate.precision)}}
    store = Store(backbone, parts.rewards, recipe.nodes, sets, engine, keep_tokens=recipe.keep_tokens, label=recipe.name)
    store.fill()
    if loop.source is None:
        loop.add(store.saved)  # what lies in the cache costs what it cost when it was made
    made |= {"generate_seconds": round(store.generating, 3)} if made else {}
    store.text_of, held_text_of = (texts(recipe, parts, what) for what in (store.prompts, prompts))
    store.prompts_of = (lambda rows: [store.prompts[k] for k in rows.tolist()]) if any(store.prompts) else None
    models = {}
    for name, reward in parts.rewards.items():
        card = {
            "name": f"{recipe.name}/{name}" if name else recipe.name,
            "backbone": pinned(recipe.model),
            "reward": pinned(recipe.nodes[name]),
            **vae_names(recipe.model["path"]),
            "distill": dataclasses.asdict(recipe.distill),
            "size": list(backbone.size),
            **({"text": recipe.text} if recipe.text == "prompt" else {}),
            **made,
        }
        torch.manual_seed(recipe.seed)  # of what a stitch begins with: the same beside others as alone
        found = loop.found.get(name)
        models[name] = assemble(recipe, backbone, reward, store, store.norms[name], card, store.text_of, found, (engine.rank, engine.world))
    found = {name: {k: model.card[k] for k in SEARCHED if k in model.card} for name, model in models.items()}
    with torch.no_grad():
        held_latents = latents_of(backbone, held)
        held_outputs = {name: outputs_of(reward, held) for name, reward in parts.rewards.items()}
    training = Distillation(models, store, recipe.distill, extend=backbone.extend, rank=engine.rank, world=engine.world)

    def measured() -> dict[str, Any]:
        figures = {name: quality(m, held_latents, prompts, held_outputs[name], held_text_of) for name, m in models.items()}
        return figures if recipe.rewards else figures[""]

    figures = loop.train(training, found, measured)
    for name, model in models.items() if engine.is_main else ():
        model.card |= {
            "quality": figures[name] if recipe.rewards else figures,
            "distill_seconds": round((loop.hours - loop.begun) * 3600, 1),
            "device_hours": round(loop.hours, 5),
            "hardware": cfg.hardware(),
        }
        if measure.embeds_text(model.reward):
            model.card["clean_recall_at_1"] = round(measure.recall(held_outputs[name], model.reward.embed_texts(prompts)), 4)
    return models
