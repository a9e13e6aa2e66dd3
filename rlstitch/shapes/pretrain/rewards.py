"""The miniature's reward models: `clip` (contrastive), `hps` and `preference_b` (preferences), `aesthetic` (a head on clip's embedding)."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from rlstitch.shapes import tokenizer as shapes_tokenizer
from rlstitch.shapes.looks import looks
from rlstitch.shapes.pretrain.common import autocast, batches, device, fit, write_card
from rlstitch.shapes.pretrain.pool import Pool, degrade, labels_of, make_pool, mutate, reconstruct, to_bytes
from rlstitch.shapes.prompts import FactTable, PromptTable, fractions, met, scenes_for
from rlstitch.shapes.scenes import COLOURS, RELATIONS, SHAPES, render

MEAN, STD = (0.5, 0.5, 0.5), (0.35, 0.35, 0.35)
# What each preference model calls better: weight of prompt fidelity, of looks, and the mix of looks.
UTILITY = {"hps": (2.0, 1.5, (0.5, 0.3, 0.2)), "preference_b": (2.5, 1.0, (0.3, 0.5, 0.2))}


def clip_config(tokenizer, width: int, vision_layers: int, text_layers: int, projection: int) -> CLIPConfig:
    heads = width // 32
    return CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=text_layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=projection,
        ),
        vision_config=dict(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=vision_layers,
            num_attention_heads=heads,
            image_size=64,
            patch_size=8,
            projection_dim=projection,
        ),
        projection_dim=projection,
    )


def start_vision(model: CLIPModel) -> None:
    """Give the vision tower a start it can learn shapes from: patches and positions of equal size, positions as two-dimensional sinusoids.

    transformers' default draws positions fifty times smaller than our patches; attention then cannot tell neighbours for a thousand steps.
    """
    embeddings = model.vision_model.embeddings
    nn.init.trunc_normal_(embeddings.patch_embedding.weight, std=0.05)
    side, width = embeddings.image_size // embeddings.patch_size, embeddings.embed_dim
    frequency = 1 / 30 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    grid = torch.cat([waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)], -1).reshape(side * side, width)
    with torch.no_grad():
        embeddings.position_embedding.weight[1:] = 0.7 * grid


def normalise(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Embedder:
    """Unit-norm image and text embeddings of a CLIPModel under autocast."""

    def __init__(self, model: CLIPModel, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def images(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> (unit embedding [B, D], pooled feature before the projection [B, W], normalised patch tokens [B, N, W])."""
        vision = self.model.vision_model
        with autocast():
            output = vision(pixel_values=normalise(images).to(device()))
            embedding = self.model.visual_projection(output.pooler_output)
        return (
            F.normalize(embedding.float(), dim=-1),
            output.pooler_output.float(),
            vision.post_layernorm(output.last_hidden_state[:, 1:].float()),
        )

    def texts(self, texts: list[str]) -> Tensor:
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device())
        with autocast():
            embedding = self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)
        return F.normalize(embedding.float(), dim=-1)


class SceneProbe(nn.Module):
    """Auxiliary heads. From the pooled feature: which (shape, colour) pairs, how many objects, which relations. From every patch token: the
    shape and colour of the object there, which teaches the tower to see within a hundred steps instead of a thousand."""

    def __init__(self, width: int):
        super().__init__()
        self.pairs = nn.Linear(width, len(SHAPES) * len(COLOURS))
        self.counts = nn.Linear(width, 5)
        self.shapes = nn.Linear(width, len(SHAPES) * 5)
        self.relations = nn.Linear(width, len(RELATIONS) * len(SHAPES) ** 2)
        self.patch_shape, self.patch_colour = nn.Linear(width, len(SHAPES) + 1), nn.Linear(width, len(COLOURS) + 1)

    def patches(self, tokens: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of shape and colour at every patch token [B, N, W]."""
        heads = zip((self.patch_shape, self.patch_colour), labels)
        return sum(F.cross_entropy(head(tokens).flatten(0, 1), label.flatten().to(tokens.device)) for head, label in heads)

    def forward(self, feature: Tensor, facts: FactTable) -> Tensor:
        pairs = (facts.counts[:, :-1, :-1] > 0).float().flatten(1).to(feature.device)
        total = facts.counts[:, -1, -1].to(feature.device)
        per_shape = facts.counts[:, :-1, -1].clamp(max=4).to(feature.device)
        relations = facts.relations.float().flatten(1).to(feature.device)
        return (
            8 * F.binary_cross_entropy_with_logits(self.pairs(feature), pairs)
            + F.cross_entropy(self.counts(feature), total)
            + F.cross_entropy(self.shapes(feature).view(len(feature), len(SHAPES), 5).transpose(1, 2), per_shape)
            + 8 * F.binary_cross_entropy_with_logits(self.relations(feature), relations)
        )


def contrastive(image: Tensor, text: Tensor, scale: Tensor, facts: FactTable, table: PromptTable) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE in which a caption that is true of another picture is no negative for it; -> (loss, in-batch accuracy)."""
    logits = scale.exp().clamp(max=100) * image @ text.T
    true = met(facts, table, paired=False).to(logits.device) & ~torch.eye(len(image), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(true, -1e4)
    target = torch.arange(len(image), device=logits.device)
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return loss, (logits.argmax(1) == target).float().mean()


def with_reconstructions(pool: Pool, vae: AutoencoderKL) -> Pool:
    """Replace every second picture by what the autoencoder makes of it, the look of anything that the generator will decode."""
    odd = torch.arange(1, len(pool.images), 2)
    pool.images[odd] = reconstruct(vae, pool.images[odd])
    return pool


def save_reward(model: CLIPModel, tokenizer, folder: Path) -> None:
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()
    size = model.config.vision_config.image_size
    processor = dict(
        image_processor_type="CLIPImageProcessor",
        do_resize=True,
        do_center_crop=True,
        do_normalize=True,
        do_rescale=True,
        do_convert_rgb=True,
        resample=3,
        rescale_factor=1 / 255,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=MEAN,
        image_std=STD,
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")


def distinct_captions(n: int, seed: int) -> Pool:
    """A held-out pool of n scenes with pairwise distinct full captions."""
    pool = make_pool(4 * n, seed, drawn_for_prompt=0.0)
    first: dict[frozenset, int] = {}
    for i, c in enumerate(pool.captions):
        first.setdefault(frozenset((c.needs, c.dark) if len(c.needs) == 1 else (*c.needs, c.dark)), i)
    keep = torch.tensor(sorted(first.values())[:n])
    captions = [pool.captions[i] for i in keep]
    return Pool(pool.images[keep], pool.scenes[keep], captions, captions, pool.facts[keep])


@torch.no_grad()
def recall_at_1(embedder: Embedder, images: Tensor, captions: list[str]) -> tuple[float, float]:
    """Image-to-text and text-to-image Recall@1 over pictures [N, 3, 64, 64] in [0, 1] and their N captions."""
    image = torch.cat([embedder.images(images[p])[0] for p in batches(len(images), 128)])
    text = torch.cat([embedder.texts(captions[p]) for p in batches(len(captions), 128)])
    target = torch.arange(len(image), device=image.device)
    similarity = image @ text.T
    return float((similarity.argmax(1) == target).float().mean()), float((similarity.argmax(0) == target).float().mean())


def train_clip(out: Path, work: Path, vae: AutoencoderKL, *, seed: int, steps: int, minutes: float | None, batch: int = 96) -> None:
    torch.manual_seed(seed)
    tokenizer = shapes_tokenizer.build(out / "clip")
    model = CLIPModel(clip_config(tokenizer, 96, 4, 3, 96)).to(device())
    model.logit_scale.data.fill_(2.6)
    start_vision(model)
    probe = SceneProbe(96).to(device())
    embedder = Embedder(model, tokenizer)
    pool = with_reconstructions(make_pool(20_000, seed + 1), vae)
    shapes, colours = labels_of(pool)

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(pool.images), (batch,), generator=generator)
        full = torch.rand(batch, generator=generator) < 0.7
        prompts = [pool.captions[i] if f else pool.prompts[i] for i, f in zip(index.tolist(), full.tolist())]
        images = pool.pixels(index)
        dull = torch.rand(batch, generator=generator) < 0.2
        images[dull] = degrade(images[dull], generator)
        image, pooled, tokens = embedder.images(images)
        facts = pool.facts[index]
        loss, accuracy = contrastive(
            image, embedder.texts([p.text for p in prompts]), model.logit_scale, facts, PromptTable.from_prompts(prompts)
        )
        aux, dense = probe(pooled, facts), probe.patches(tokens, (shapes[index], colours[index]))
        return loss + aux + 4 * dense, {"loss": loss.detach(), "aux": aux.detach(), "dense": dense.detach(), "accuracy": accuracy}

    both = nn.ModuleDict({"clip": model, "probe": probe})
    facts = fit("clip", both, loss_of, steps=steps, lr=2e-3, seed=seed, work=work, minutes=minutes, weight_decay=0.02)
    held = distinct_captions(500, seed + 77)
    captions = [c.text for c in held.captions]
    clean = recall_at_1(embedder, held.images.float() / 255, captions)
    decoded = recall_at_1(embedder, reconstruct(vae, held.images).float() / 255, captions)
    save_reward(model, tokenizer, out / "clip")
    facts |= {
        "part": "clip",
        "seed": seed,
        "recall_at_1": clean[0],
        "recall_at_1_text_to_image": clean[1],
        "recall_at_1_decoded": decoded[0],
    }
    write_card(out / "clip", facts)
    print(facts, flush=True)


class Pairs:
    """Preference pairs under one prompt, labelled by the stated utility (fidelity to the prompt and looks)."""

    def __init__(self, n: int, seed: int, name: str, vae: AutoencoderKL):
        rng = random.Random(seed)
        pool = make_pool(n, seed, drawn_for_prompt=0.8)
        wrong = [mutate(p, rng) if p.kind != "full" else pool.prompts[rng.randrange(n)] for p in pool.prompts]
        wrong = [w if sum(k.count for k in w.needs) <= 4 else p for w, p in zip(wrong, pool.prompts)]
        other = scenes_for(wrong, seed + 5)
        self.prompts, self.facts = pool.prompts, (pool.facts, FactTable.from_scenes(other))
        self.table = PromptTable.from_prompts(self.prompts)
        generator = torch.Generator().manual_seed(seed + 6)
        twin = to_bytes(torch.cat([render(other[p]) for p in batches(n, 256)]))
        # A third of the second pictures show the first scene again, so that looks alone decide.
        same = torch.rand(n, generator=generator) < 1 / 3
        twin[same] = pool.images[same]
        odd = torch.arange(1, n, 2)
        pool.images[odd], twin[odd] = reconstruct(vae, pool.images[odd]), reconstruct(vae, twin[odd])
        second = FactTable(
            *(
                torch.where(same.view(-1, *[1] * (a.ndim - 1)), a, b)
                for a, b in zip(vars(self.facts[0]).values(), vars(self.facts[1]).values())
            )
        )
        worsen = [torch.rand(n, generator=generator) < 0.5 for _ in range(2)]
        worsen[1] |= same
        self.images, self.utility = [], []
        fidelity_weight, looks_weight, mix = UTILITY[name]
        for images, facts, bad in ((pool.images, self.facts[0], worsen[0]), (twin, second, worsen[1])):
            for part in batches(n, 256):
                rows = torch.arange(n)[part][bad[part]]
                images[rows] = to_bytes(degrade(images[rows].float() / 255, generator))
            pretty = torch.cat([looks(images[p].float() / 255, mix) for p in batches(n, 256)])
            self.images.append(images)
            self.utility.append(fidelity_weight * fractions(facts, self.table) + looks_weight * pretty)
        self.first_wins = self.utility[0] > self.utility[1]
        self.captions, self.scene_facts, self.labels = pool.captions, self.facts[0], labels_of(pool)

    def __len__(self) -> int:
        return len(self.prompts)


@torch.no_grad()
def pair_accuracy(embedder: Embedder, pairs: Pairs) -> float:
    """Share of pairs whose better picture (by the utility) gets the higher cosine with the prompt."""
    hits = []
    for part in batches(len(pairs), 128):
        text = embedder.texts([p.text for p in pairs.prompts[part]])
        a, b = ((embedder.images(images[part].float() / 255)[0] * text).sum(1) for images in pairs.images)
        hits.append((a > b).cpu() == pairs.first_wins[part])
    return float(torch.cat(hits).float().mean())


def train_preference(
    name: str,
    out: Path,
    work: Path,
    vae: AutoencoderKL,
    *,
    seed: int,
    steps: int,
    minutes: float | None,
    batch: int = 64,
    start_from: Path | None = None,
) -> None:
    """A CLIPModel trained on preference pairs (Bradley-Terry on scaled cosines) with a contrastive term; from `start_from` or from scratch."""
    torch.manual_seed(seed)
    tokenizer = shapes_tokenizer.build(out / name)
    if start_from is not None:
        model = CLIPModel.from_pretrained(start_from, dtype=torch.float32).to(device())
    else:
        model = CLIPModel(clip_config(tokenizer, 96, 3, 2, 64)).to(device())
        model.logit_scale.data.fill_(2.6)
        start_vision(model)
    embedder = Embedder(model, tokenizer)
    probe = SceneProbe(96).to(device())
    pairs = Pairs(12_000, seed + 1, name, vae)

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(pairs), (batch,), generator=generator)
        rows = index.tolist()
        image, pooled, tokens = embedder.images(torch.cat([images[index] for images in pairs.images]).float() / 255)
        text = embedder.texts([pairs.prompts[i].text for i in rows])
        first, second = image.chunk(2)
        margin = 30 * ((first - second) * text).sum(1)
        sign = (2 * pairs.first_wins[index].float() - 1).to(margin.device)
        preference = F.softplus(-sign * margin).mean()
        facts = pairs.scene_facts[index]
        captions = [pairs.captions[i] for i in rows]
        nce, _ = contrastive(
            first, embedder.texts([c.text for c in captions]), model.logit_scale, facts, PromptTable.from_prompts(captions)
        )
        aux = probe(pooled[:batch], facts) + 4 * probe.patches(tokens[:batch], tuple(label[index] for label in pairs.labels))
        accuracy = (sign * margin > 0).float().mean()
        return preference + 0.2 * nce + 0.2 * aux, {"preference": preference.detach(), "nce": nce.detach(), "accuracy": accuracy}

    both = nn.ModuleDict({"clip": model, "probe": probe})
    facts = fit(
        name,
        both,
        loss_of,
        steps=steps,
        lr=1.0e-3 if start_from is None else 5e-4,
        seed=seed,
        work=work,
        minutes=minutes,
        weight_decay=0.02,
    )
    facts |= {
        "part": name,
        "seed": seed,
        "utility": UTILITY[name],
        "pair_accuracy": pair_accuracy(embedder, Pairs(2000, seed + 999, name, vae)),
    }
    save_reward(model, tokenizer, out / name)
    write_card(out / name, facts)
    print(facts, flush=True)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors without ties."""
    ra, rb = a.argsort().argsort().double(), b.argsort().argsort().double()
    return float(torch.corrcoef(torch.stack([ra, rb]))[0, 1])


AESTHETIC_NOISE = 0.05


def train_aesthetic(out: Path, work: Path, vae: AutoencoderKL, *, seed: int, steps: int, minutes: float | None, batch: int = 256) -> None:
    """An MLP head on clip's unit image embedding, regressed on 10 x (looks + noise), like the LAION predictor on CLIP."""
    torch.manual_seed(seed)
    model = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32).to(device()).eval()
    embedder = Embedder(model, None)

    @torch.no_grad()
    def dataset(n: int, data_seed: int) -> tuple[Tensor, Tensor]:
        pool = with_reconstructions(make_pool(n, data_seed), vae)
        generator = torch.Generator().manual_seed(data_seed)
        images = pool.images.float() / 255
        bad = torch.rand(n, generator=generator) < 0.5
        images[bad] = degrade(images[bad], generator)
        noise = AESTHETIC_NOISE * torch.randn(n, generator=generator)
        return torch.cat([embedder.images(images[p])[0] for p in batches(n, 256)]), 10 * (looks(images) + noise).to(device())

    x, y = dataset(12_000, seed + 1)
    width = x.shape[1]
    head = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 1)).to(device())
    nn.init.constant_(head[-1].bias, float(y.mean()))

    def loss_of(step: int, generator: torch.Generator):
        index = torch.randint(len(x), (batch,), generator=generator)
        loss = F.smooth_l1_loss(head(x[index])[:, 0], y[index])
        return loss, {"loss": loss.detach()}

    facts = fit("aesthetic", head, loss_of, steps=steps, lr=3e-3, seed=seed, work=work, minutes=minutes, weight_decay=0.01, log_every=500)
    xt, yt = dataset(2000, seed + 999)
    with torch.no_grad():
        facts |= {"part": "aesthetic", "seed": seed, "label_noise": AESTHETIC_NOISE, "srcc": rank_correlation(head(xt)[:, 0], yt)}
    folder = out / "aesthetic"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in head.state_dict().items()}, folder / "head.safetensors.tmp")
    os.replace(folder / "head.safetensors.tmp", folder / "head.safetensors")
    write_card(folder, facts)
    print(facts, flush=True)
