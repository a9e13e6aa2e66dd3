"""Prompts, pictures, and how a global batch is cut for ranks and accumulation. Nothing here depends on the number of ranks but the cut."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlstitch import config as cfg
from rlstitch.asking import inside, strange, told, unlike
from rlstitch.cache import keep, kept
from rlstitch.lengths import message
from rlstitch.picture_rows import PictureRows, rows_of
from rlstitch.prompts import PromptSet, read_prompts
from rlstitch.protocols import code_of
from rlstitch.schema import DataConfig
from rlstitch.types import Batch, UserError

TOGETHER = 64  # prompts that are encoded in one batch
SEEDS_PER_UPDATE = 1_000_000  # an update's noise seeds lie within one such span


DIMENSIONS = {"images": (4, "[N, 3, H, W]", "scenes"), "pairs": (5, "[N, 2, 3, H, W], the better first", "ranked_pairs")}


def read_data(config: DataConfig, learns_from: str = "prompts") -> PromptSet:
    """What an algorithm learns from: the prompt file, or the pictures of `data.images` with their prompts. Raises UserError where the pictures are of another kind."""
    if learns_from == "prompts":
        return read_prompts(config.prompts, config.column)
    pictures, prompts = build_pictures("data.images", config.images, learns_from)
    if not any(p.strip() for p in prompts):
        raise UserError(
            f"'data.images': {config.images['_target_']} gives {len(prompts)} pictures without a prompt, and the model would unlearn its own: give captions (metadata.jsonl, or a .txt beside each picture)"
        )
    return PromptSet(prompts, [{"prompt": p} for p in prompts], pictures=pictures)


def build_pictures(where: str, node: dict[str, Any], kind: str = "images") -> tuple[Tensor, list[str]]:
    """Pictures uint8 in the shape that `kind` has in DIMENSIONS, and a prompt each ('' for none), of the part at `where`. Raises UserError where it gives anything else."""
    made, said = cfg.build(node), f"'{where}': {node['_target_']} gives"
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise UserError(f"{said} {type(made).__name__}, not pictures (a tensor, uint8 {DIMENSIONS[kind][1]}) and a list of prompts")
    return _as_said(said, made, *made, kind)


def read_rows(where: str, node: dict[str, Any]) -> PictureRows | tuple[Tensor, list[str]]:
    """The pictures of the part at `where` as rows that are read later, where it can list them, else as `build_pictures` gives them."""
    if (listing := rows_of(cfg.load_class(node["_target_"]))) is None:
        return build_pictures(where, node)
    with inside(node["_target_"]):
        found = listing(**{k: v for k, v in node.items() if k != "_target_"})
    found.tell_bare()
    return found


def build_captioned(where: str, node: dict[str, Any], needed: bool) -> tuple[Tensor, list[list[str]]]:
    """Pictures uint8 [N, 3, H, W] and the captions of each, one or several, of the part at `where`. Raises UserError where it gives anything else, or where captions are
    `needed` and a picture has none."""
    made, said = cfg.build(node), f"'{where}': {node['_target_']} gives"
    if not isinstance(made, tuple | list) or len(made) != 2 or not isinstance(made[1], tuple | list):
        raise UserError(f"{said} {type(made).__name__}, not pictures (a tensor, uint8 {DIMENSIONS['images'][1]}) and a list of prompts")
    listed = [list(own) or [""] if isinstance(own, tuple | list) else [own] for own in made[1]]
    pictures, _ = _as_said(said, made, made[0], [own[0] for own in listed], "images")
    if needed and (bare := sum(not all(isinstance(c, str) and c.strip() for c in own) for own in listed)):
        raise UserError(
            f"{said} {bare} of {len(listed)} pictures without a caption, by which Recall@1 looks for them: take a set with captions"
        )
    return pictures, listed


def build_measured(where: str, node: dict[str, Any], kind: str) -> tuple[list[Tensor], list[str], Tensor]:
    """What the part at `where` gives to measure by: pictures uint8 [N, 3, H, W], a prompt each and a truth [N], float, to rank them by (`graded`); or both pictures of
    pairs under one prompt, and whether the first is the better one, bool (`pairs`). Raises UserError where it gives anything else."""
    made, said, sides = cfg.build(node), f"'{where}': {node['_target_']} gives", 2 if kind == "pairs" else 1
    if not isinstance(made, tuple | list) or len(made) != sides + 2:
        raise UserError(f"{said} {told(made)}, not {sides} x pictures, a list of prompts and a truth")
    *pictures, prompts, truth = made
    sound = [_as_said(said, made, side, prompts, "images") for side in pictures]
    if (
        not isinstance(truth, Tensor)
        or truth.shape != (len(prompts),)
        or (truth.dtype != torch.bool if kind == "pairs" else unlike(truth, truth.shape))
    ):
        wanted = "which first pictures are the better ones, bool" if kind == "pairs" else "a truth, float"
        raise UserError(f"{said} {told(truth)} in the last place, not {wanted} [{len(prompts)}]")
    return [side for side, _ in sound], sound[0][1], truth


def _as_said(said: str, made: Any, pictures: Any, prompts: Any, kind: str) -> tuple[Tensor, list[str]]:
    dimensions, shape, example = DIMENSIONS[kind]
    if not isinstance(pictures, Tensor) or not isinstance(prompts, tuple | list):
        raise UserError(f"{said} {type(made).__name__}, not pictures (a tensor, uint8 {shape}) and a list of prompts")
    prompts = list(prompts)
    if pictures.ndim != dimensions or pictures.shape[-3] != 3 or (kind == "pairs" and pictures.shape[1] != 2):
        raise UserError(
            f"{said} {list(pictures.shape)}, but {kind} {shape} are wanted: use one that gives them, such as rlstitch.shapes.images.{example}"
        )
    if kind_of := strange(pictures):
        raise UserError(f"{said} a {kind_of} tensor, not plain pictures: return .to_dense() or what holds their pixels")
    if pictures.dtype != torch.uint8:
        raise UserError(
            f"{said} {str(pictures.dtype).removeprefix('torch.')}, not uint8 from 0 to 255: of floats in [0, 1], (255 * pictures).round().to(torch.uint8)"
        )
    if not len(pictures) or len(pictures) != len(prompts):
        raise UserError(f"{said} {len(pictures)} {kind} and {len(prompts)} prompts: as many of both, and at least one")
    if odd := [k for k, p in enumerate(prompts) if not isinstance(p, str)]:
        raise UserError(f"{said} {len(odd)} prompts that are no text, e.g. number {odd[0]}: {prompts[odd[0]]!r:.60}")
    return pictures, prompts


def encode(backbone: Any, *sets: PromptSet, truncate: bool = False, engine: Any = None, allow: str = "data.truncate") -> list[PromptSet]:
    """Encode prompt sets and their pictures once, the text of all of them by one loading of the encoders. Prompts that these would cut are refused by name unless
    `truncate`, the recipe's key `allow`, allows it.

    The ranks of `engine` share the pictures and, with a cache on disk, the text; a set then holds nothing but the prompts. How either is cut does not depend on them.
    """
    for prompts in () if truncate else sets:
        if cut := backbone.too_long(prompts.prompts):
            raise UserError(message(cut, len(prompts), allow))
    with getattr(backbone, "texts_together", nullcontext)():
        for prompts in sets:
            _encode_text(backbone, prompts, engine)
    for prompts in sets:
        if prompts.pictures is not None:
            prompts.clean, prompts.pictures = encode_pictures(backbone, prompts.pictures, engine=engine), None
    return list(sets)


def _encode_text(backbone: Any, prompts: PromptSet, engine: Any) -> None:
    if getattr(backbone, "cache", None) is None:
        prompts.text = backbone.encode_prompts(prompts.prompts)
    else:
        rank, world = (0, 1) if engine is None else (engine.rank, engine.world)
        different = list(dict.fromkeys(prompts.prompts))
        parts = [different[k : k + TOGETHER] for k in range(0, len(different), TOGETHER)]
        backbone.remember([prompt for part in parts[rank::world] for prompt in part])
        if engine is not None:
            engine.barrier()
        prompts.lookup = backbone.encode_prompts


@torch.no_grad()
def encode_pictures(backbone: Any, pictures: Tensor, *, batch_size: int = 4, engine: Any = None) -> Tensor:
    """Clean latents [N, (2,) C, H, W], on the CPU, of uint8 pictures [N, (2,) 3, H, W]. Raises UserError where they have another size than the model's.

    Each batch of the set is encoded by one rank of `engine`, which gives it to the others, and never again where the backbone has a cache on disk. How the set is
    cut depends on neither, so that the latents are the same bits on any number of ranks.
    """
    if tuple(pictures.shape[-2:]) != tuple(backbone.size):
        raise UserError(
            f"'data.images' gives pictures of {pictures.shape[-1]} x {pictures.shape[-2]}, the model takes {backbone.size[1]} x {backbone.size[0]}: resize them, or set model.image_size, or height and width"
        )
    rank, world = (0, 1) if engine is None else (engine.rank, engine.world)
    parts, folder, latents = pictures.flatten(0, -4).split(batch_size), _pictures_folder(backbone), []
    for first in range(0, len(parts), world):
        round = parts[first : first + world]
        own = torch.zeros(batch_size, *backbone.latent_shape, device=backbone.device)
        if rank < len(round):
            own[: len(round[rank])] = _encoded(backbone, round[rank], folder)
        every = own if engine is None else engine.gather(own)
        latents += [z[: len(part)].cpu() for z, part in zip(every.split(batch_size), round)]
    return torch.cat(latents).unflatten(0, pictures.shape[:-3])


def _pictures_folder(backbone: Any) -> Path | None:
    """Where latents of pictures are kept, by the weights, and by code that is not ours, that made them; None without a cache."""
    if getattr(backbone, "cache", None) is None:
        return None
    return backbone.cache / f"pictures-{pictures_key(backbone)}"


def pictures_key(backbone: Any) -> str:
    """What latents of pictures depend on beside the pictures: the autoencoder, and code that is not ours."""
    return "-".join(filter(None, (backbone.picture_fingerprint(), code_of(backbone))))


def _encoded(backbone: Any, pictures: Tensor, folder: Path | None) -> Tensor:
    """Latents of one batch of uint8 pictures, from the cache where they are there."""
    file = None if folder is None else folder / f"{hashlib.sha256(pictures.contiguous().numpy().tobytes()).hexdigest()[:32]}.safetensors"
    if file is not None and (found := kept(file)) is not None:
        return found["latents"].to(backbone.device)
    latents = backbone.encode(pictures.to(backbone.device).float() / 255)
    if file is not None:
        keep(file, {"latents": latents.cpu()})
    return latents


@dataclass
class Geometry:
    """How a global batch is done: samples = prompts x images; each rank runs `accumulation` micro-batches of `micro_batch`, sampled `rollout` at a time."""

    prompts: int
    images: int
    world: int
    micro_batch: int
    accumulation: int
    rollout: int
    known: int | None = None  # prompts, or pictures, that there are

    @property
    def samples(self) -> int:
        return self.prompts * self.images

    def __str__(self) -> str:
        again = (
            f" ({self.prompts / self.known:.3g} times through the {self.known} that there are)"
            if self.prompts > (self.known or self.prompts)
            else ""
        )
        return (
            f"{self.prompts} prompts x {self.images} image{'s' * (self.images > 1)} = {self.samples} samples an update{again}, on {self.world} rank{'s' * (self.world > 1)}: {self.accumulation} micro-batch{'es' * (self.accumulation > 1)} of {self.micro_batch} each"
            + (f", sampled {self.rollout} at a time" if self.rollout != self.micro_batch else "")
        )


def resolve_geometry(
    prompts: int, images: int, micro_batch: int, world: int, num_prompts: int | None = None, *, whole_groups: bool = False, rollout: int = 0
) -> Geometry:
    """The same global batch on any number of ranks, by accumulation; micro_batch and rollout are upper limits. Raises UserError with the nearest possible.

    With fewer prompts than an update takes, it goes through them again, see UpdateStream. whole_groups: every micro-batch holds all images of its prompts, so that they can be compared there.
    """
    if whole_groups and images < 2:
        raise UserError(f"batch.images_per_prompt is {images}, and this algorithm compares the images of a prompt: set it to 2 or more")
    if whole_groups and micro_batch < images:
        fewer = f", or batch.images_per_prompt={micro_batch} or fewer" if micro_batch > 1 else ""
        raise UserError(
            f"batch.micro_batch is {micro_batch}, but this algorithm needs all {images} images of a prompt in one micro-batch: set batch.micro_batch={images} or more{fewer}"
        )
    samples = prompts * images
    unit = images if whole_groups else 1  # what is never cut
    if samples % (world * unit):
        step = next(k for k in range(1, world + 1) if k * images % (world * unit) == 0)
        below, above = prompts // step * step, (prompts // step + 1) * step
        near = " or ".join(str(p) for p in (below, above) if p)
        raise UserError(
            f"{prompts} prompts x {images} images = {samples} samples cannot be shared by {world} ranks: set batch.prompts_per_update={near}"
        )
    share = samples // world
    micro = max(m for m in range(unit, min(micro_batch, share) + 1, unit) if share % m == 0)
    together = max(k for k in range(1, share // micro + 1) if k == 1 or (share // micro % k == 0 and k * micro <= rollout))
    return Geometry(prompts, images, world, micro, share // micro, together * micro, num_prompts)


def first_seed(seed: int, update: int) -> int:
    """Noise seed of an update's first sample; those of the others follow it, and `update_number` tells the update from any of them."""
    return (seed * 1_000_003 + update) % 2**42 * SEEDS_PER_UPDATE


def update_number(seeds: Tensor) -> int:
    """A number that belongs to the update that noise seeds [B] are of, the same on every rank and in every micro-batch."""
    return int(seeds[0]) // SEEDS_PER_UPDATE


def prompt_seeds(seeds: Tensor, group: Tensor) -> Tensor:
    """Noise seeds that belong to groups `group` [G] and to the update that noise seeds [B] are of, whatever micro-batch they are asked in."""
    return update_number(seeds) * SEEDS_PER_UPDATE + group % SEEDS_PER_UPDATE


class UpdateStream:
    """The prompts and noise seeds of update 0, 1, ...; a function of (seed, update) alone, so that resuming needs no state but the count.

    A group is one draw of a prompt: its images_per_prompt pictures. A prompt that an update takes again, as it does where there are fewer prompts than
    it needs or where an epoch ends in its midst, makes a group of its own, with noise of its own: groups are of one size, lie in one piece, and are the same
    however an update is cut. Its number is the prompt's place in the set, and that plus N, 2 N, ... when it is drawn again.
    """

    def __init__(self, prompts: PromptSet, geometry: Geometry, seed: int):
        self.prompts, self.geometry, self.seed = prompts, geometry, seed
        self._epoch, self._order = -1, list(range(len(prompts)))

    def order(self, epoch: int) -> list[int]:
        """Places of all prompts, shuffled; that of the last epoch asked for is kept."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.prompts)))
            random.Random(self.seed * 1_000_003 + epoch).shuffle(self._order)
        return self._order

    def groups(self, update: int) -> list[int]:
        """Numbers of an update's groups: epochs without replacement, one behind the other."""
        n, per = len(self.prompts), self.geometry.prompts
        drawn: Counter[int] = Counter()
        out = []
        for place in range(update * per, (update + 1) * per):
            prompt = self.order(place // n)[place % n]
            out.append(prompt + n * drawn[prompt])
            drawn[prompt] += 1
        return out

    def batches(self, update: int, rank: int) -> Iterator[Batch]:
        """This rank's share of an update, as much at a time as is sampled at once; images of a group side by side."""
        g = self.geometry
        group = torch.tensor(self.groups(update)).repeat_interleave(g.images)
        seeds = torch.arange(g.samples) + first_seed(self.seed, update)
        share = g.samples // g.world
        for start in range(rank * share, (rank + 1) * share, g.rollout):
            part = slice(start, start + g.rollout)
            batch = self.prompts.batch((group[part] % len(self.prompts)).tolist(), seeds[part])
            yield replace(batch, group=group[part])
