"""What a stitch distils on, on disk: clean latents and reward targets of pictures, made once, in shards by what they were made of, and read back row by row, so that memory
does not grow with the pictures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlstitch.cache import is_kept, keep, kept
from rlstitch.data import pictures_key
from rlstitch.distributed import Engine
from rlstitch.files import cache_folder
from rlstitch.picture_rows import PictureRows
from rlstitch.stitch.distill import batches_of, latents_of
from rlstitch.stitch.generate import Generated, pictures_of
from rlstitch.telling import progress, say
from rlstitch.types import Conditioning, UserError

SHARD = 128  # pictures of a shard
OPEN = 256  # shards that are held open
KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class Pictures:
    """A set of pictures in parts, read a part ahead: rows of files (`PictureRows`), or a tensor uint8 [N, 3, H, W] with its prompts."""

    def __init__(self, source: PictureRows | tuple[Tensor, list[str]]):
        self.listed = source if isinstance(source, PictureRows) else None
        self.held, self.prompts = (None, source.prompts) if isinstance(source, PictureRows) else source

    def __len__(self) -> int:
        return len(self.prompts)

    def parts(self, size: int) -> list[range]:
        return [range(k, min(k + size, len(self))) for k in range(0, len(self), size)]

    def digest(self, rows: range) -> str:
        """Of what the pictures of a part are."""
        if self.listed is not None:
            return self.listed.digest(rows)
        part = self.held[rows.start : rows.stop].contiguous()
        return hashlib.sha256(f"{list(part.shape)}".encode() + part.numpy().tobytes()).hexdigest()

    def read(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, list[int]]]:
        """Of each part the pictures uint8 [n, 3, H, W] that can be read, and their places in it; the next part is decoded meanwhile. Raises UserError where one cannot be
        read and that is not allowed."""
        if self.listed is None:
            yield from ((self.held[list(part)], list(range(len(part)))) for part in parts)
            return
        with self.listed.reader() as reader:
            begun = self.listed.begin(reader, parts[0]) if parts else []
            for part, after in zip(parts, [*parts[1:], ()]):
                now, begun = begun, self.listed.begin(reader, after)
                found = self.listed.end(reader, now, part)
                good = [k for k, picture in enumerate(found) if picture is not None]
                width, height = self.listed.size
                blank = torch.empty(0, 3, height, width, dtype=torch.uint8)
                yield torch.stack([found[k] for k in good]) if good else blank, good
            reader.tell()


class Shard:
    """A file of tensors whose rows are read one by one, without a place in memory for the others."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        length = int.from_bytes(self.file.read(8), "little")
        told = json.loads(self.file.read(length))
        self.entries = {
            k: (KINDS[v["dtype"]], v["shape"], 8 + length + v["data_offsets"][0])
            for k, v in told.items()
            if k in ("latents", "targets", "tokens")
        }

    def row(self, name: str, k: int) -> Tensor:
        dtype, (_, *shape), start = self.entries[name]
        size = dtype.itemsize * torch.Size(shape).numel()
        content = os.pread(self.file.fileno(), size, start + k * size)
        if len(content) != size:
            raise UserError(f"{self.file.name} has been cut short while it was read: start again, and it is made anew")
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


class Store:
    """Latents and targets of pictures and of generated ones, in their order, as `distill.Held` has them in memory. `fill` makes what is missing, each shard by one rank.

    pictures: sets that are read, and `Generated` ones. rewards: by name; nodes: what builds them. keep_tokens: a reward's output tokens are most of a shard (1.9 MB a picture for a
    ViT-H/14 at 378 px); without them a batch's are computed again from its pictures. engine: whose ranks share the work. label: of what is said and shown.
    """

    def __init__(
        self,
        backbone: Any,
        rewards: Mapping[str, Any],
        nodes: Mapping[str, dict[str, Any]],
        pictures: Sequence[Pictures | Generated],
        engine: Engine,
        *,
        keep_tokens: bool = True,
        label: str = "pictures",
    ):
        self.backbone, self.rewards, self.engine, self.keep_tokens, self.label = backbone, rewards, engine, keep_tokens, label
        self.parts = [(source, rows) for source in pictures for rows in source.parts(SHARD)]
        self.text_of: Callable[[Tensor], Conditioning] | None = None
        self.prompts_of: Callable[[Tensor], list[str]] | None = None
        self._by_reward = {name: f"{reward.fingerprint()}:{_settings(nodes[name])}:{keep_tokens}" for name, reward in rewards.items()}
        self._open: OrderedDict[Path, Shard] = OrderedDict()
        self.saved = 0.0  # seconds that were spent before, on shards that were there
        self.generating = 0.0  # seconds that the generated pictures took

    # ------------------------------------------------------------------------------------------------ making

    def fill(self) -> None:
        """Make what is missing. Raises UserError where the disk has no room for it, before anything is written, or where a picture cannot be read."""
        self._names()
        if missing := self._missing():
            self._room(missing)
        bar = progress(sum(len(rows) for _, rows in self.parts), f"{self.label}: latents and targets", "picture")
        self.saved += self._seconds(self.engine.together(lambda: self._made(self.engine.share(len(self.parts)), bar)))
        bar.close()
        self.engine.barrier()
        if absent := [
            k for k in range(len(self.parts)) if not all(map(is_kept, self.files[k].values()))
        ]:  # another machine has a cache of its own
            self._made(absent, progress(0, self.label, "picture", shown=False))
        self._index()

    def _names(self) -> None:
        """The files of every part, by what they are made of."""
        own = self.engine.share(len(self.parts))
        digests = torch.tensor([list(bytes.fromhex(self.parts[k][0].digest(self.parts[k][1]))) for k in own], dtype=torch.uint8)
        key, folder = pictures_key(self.backbone), cache_folder() / "stitching"
        self.files: list[dict[str, Path]] = []
        for row in self.engine.in_order(digests, len(self.parts)).cpu():
            what = bytes(row.tolist()).hex()
            by = {"": f"latents:{key}", **{f"targets {name}": f"targets:{told}" for name, told in self._by_reward.items()}}
            self.files.append(
                {k: folder / f"{hashlib.sha256(f'{what}:{how}'.encode()).hexdigest()[:40]}.safetensors" for k, how in by.items()}
            )

    def _missing(self) -> list[tuple[int, str]]:
        return [(k, what) for k, files in enumerate(self.files) for what, file in files.items() if not is_kept(file)]

    def _room(self, missing: list[tuple[int, str]]) -> None:
        """Say how much will be written, and refuse where that does not fit."""
        size = {"": 4 * torch.Size(self.backbone.latent_shape).numel()}
        for name, reward in self.rewards.items():
            raw, tokens = reward.encode(torch.zeros(1, 3, *self.backbone.size, device=reward.device))
            size[f"targets {name}"] = 4 * raw.numel() + 2 * tokens.numel() * self.keep_tokens
        needed = sum(size[what] * len(self.parts[k][1]) for k, what in missing)
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        free, count = shutil.disk_usage(folder).free, sum(len(rows) for _, rows in self.parts)

        def refuse() -> None:
            if needed > free:
                tokens = ", keep_tokens=false to compute the tokens anew at every step" * self.keep_tokens
                raise UserError(
                    f"latents and targets of {count} pictures need {_bytes(needed)} in {folder}, which has {_bytes(free)} left: take fewer pictures{tokens}, or set XDG_CACHE_HOME to a folder with room"
                )

        self.engine.together(refuse)
        say(f"{self.label}: {_bytes(needed)} of latents and targets of {count} pictures go to {folder / 'stitching'} ({_bytes(free)} free)")

    def _made(self, places: Iterable[int], bar: Any) -> float:
        """Make the parts at these places, where they are not there whole; -> the seconds that those took, when they were made, that are."""
        saved, wanted, others = 0.0, [], []
        for place in dict.fromkeys(places):
            there = {what: _seconds_of(file) for what, file in self.files[place].items()}
            saved += sum(s for s in there.values() if s is not None)
            if any(s is None for s in there.values()):
                (wanted if isinstance(self.parts[place][0], Pictures) else others).append((place, there))
            else:
                bar.update(len(self.parts[place][1]))
        by_set: dict[int, tuple[Pictures, list[Any]]] = {}
        for place, there in wanted:
            by_set.setdefault(id(self.parts[place][0]), (self.parts[place][0], []))[1].append((place, there))
        for source, listed in by_set.values():
            began = time.perf_counter()
            for (pictures, good), (place, there) in zip(source.read([self.parts[p][1] for p, _ in listed]), listed):
                self._keep(place, there, pictures, good, began)
                bar.update(len(self.parts[place][1]))
                began = time.perf_counter()
        for place, there in others:
            source, rows = self.parts[place]
            began = time.perf_counter()
            latents, seconds = source.latents(rows, bar.update)
            saved += max(0.0, seconds - (time.perf_counter() - began)) if there[""] is None else 0.0
            began = time.perf_counter()
            self._keep(place, there, pictures_of(self.backbone, latents), list(range(len(rows))), began, (latents, seconds))
        return saved

    @torch.no_grad()
    def _keep(
        self, place: int, there: dict[str, Any], pictures: Tensor, good: list[int], began: float, made: tuple[Tensor, float] | None = None
    ) -> None:
        """Write a part's files that are not there. began: when the work for the first of them began; made: latents of generated pictures, and the seconds that these took."""
        rows = torch.tensor(good, dtype=torch.int64)
        for what, file in self.files[place].items():
            if there[what] is not None:
                continue
            if what:
                reward, found = self.rewards[what.removeprefix("targets ")], {}
                pairs = [reward.encode(part.to(reward.device)) for part in batches_of(pictures)]
                raw = torch.cat([r for r, _ in pairs]).float() if pairs else torch.zeros(0, 1)
                found = {"targets": F.normalize(raw, dim=-1), "norms": raw.norm(dim=-1)}
                if self.keep_tokens:
                    found["tokens"] = torch.cat([t.half() for _, t in pairs]) if pairs else torch.zeros(0, 1, 1).half()
            else:
                blank = torch.zeros(0, *self.backbone.latent_shape)
                found = {"latents": made[0] if made else latents_of(self.backbone, pictures) if len(pictures) else blank}
            seconds = torch.tensor(made[1] if made and not what else time.perf_counter() - began, dtype=torch.float64)
            try:
                keep(file, {**found, "rows": rows, "seconds": seconds})
            except OSError as error:
                raise UserError(
                    f"{file} could not be written ({error}): free some space, or set XDG_CACHE_HOME to a folder with room, and start again: what is there is kept"
                ) from error
            began = time.perf_counter()

    def _seconds(self, own: float) -> float:
        return float(self.engine.gather(torch.tensor([own], device=self.engine.device)).sum())

    def _index(self) -> None:
        """Which row lies where, and the mean norm of each reward's embeddings."""
        counts, self.prompts, norms = [], [], {name: [] for name in self.rewards}
        for (source, rows), files in zip(self.parts, self.files):
            good = _read(files[""], "rows").tolist()
            listed = source.prompts
            self.prompts += [listed[rows.start + k] for k in good]
            counts.append(len(good))
            self.generating += float(_read(files[""], "seconds")) if isinstance(source, Generated) else 0.0
            for name in self.rewards:
                norms[name].append(_read(files[f"targets {name}"], "norms").double())
        self.ends = list(accumulate(counts))
        if not (self.ends and self.ends[-1]):
            raise UserError(f"{self.label}: there is no picture that can be read")
        if left := sum(len(rows) for _, rows in self.parts) - self.ends[-1]:
            say(f"{self.label}: {left} of {left + self.ends[-1]} pictures cannot be read and are left out")
        self.norms = {name: float(torch.cat(found).mean()) for name, found in norms.items()}

    # ------------------------------------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return self.ends[-1]

    def _at(self, k: int) -> tuple[int, int]:
        """The part of a row, and its place there."""
        part = bisect_right(self.ends, k)
        return part, k - (self.ends[part - 1] if part else 0)

    def _rows(self, what: str, name: str, index: Tensor) -> Tensor:
        out = []
        for part, k in map(self._at, index.tolist()):
            file = self.files[part][what]
            if file not in self._open:
                self._open[file] = Shard(file)
                while len(self._open) > OPEN:
                    self._open.popitem(last=False)[1].file.close()
            self._open.move_to_end(file)
            out.append(self._open[file].row(name, k))
        return torch.stack(out)

    def latents(self, index: Tensor) -> Tensor:
        """Clean latents [B, C, H, W] of rows [B], float32 on the CPU."""
        return self._rows("", "latents", index)

    @torch.no_grad()
    def targets(self, name: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """A reward's unit embeddings [B, D] and tokens [B, T, W] of rows [B]."""
        targets = self._rows(f"targets {name}", "targets", index)
        if self.keep_tokens:
            return targets, self._rows(f"targets {name}", "tokens", index)
        reward = self.rewards[name]
        return targets, torch.cat([reward.encode(part.to(reward.device))[1] for part in batches_of(self.pictures(index))])

    @torch.no_grad()
    def pictures(self, index: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of rows [B], read or decoded anew."""
        out: list[Tensor | None] = [None] * len(index)
        by_set: dict[int, tuple[Pictures, list[tuple[int, int]]]] = {}
        for place, (part, k) in enumerate(map(self._at, index.tolist())):
            source, rows = self.parts[part]
            if isinstance(source, Pictures):
                row = rows.start + int(_read(self.files[part][""], "rows")[k])
                by_set.setdefault(id(source), (source, []))[1].append((place, row))
            else:
                out[place] = pictures_of(self.backbone, self.latents(index[place : place + 1]).to(self.backbone.device))[0]
        for source, wanted in by_set.values():
            ((found, _),) = source.read([[row for _, row in wanted]])
            for (place, _), picture in zip(wanted, found):
                out[place] = picture
        return torch.stack(out)


def _settings(node: dict[str, Any]) -> str:
    """How a reward is built, apart from where its files lie, which its fingerprint says better."""
    return json.dumps({k: v for k, v in sorted(node.items()) if k not in ("path", "device", "attention", "compile")}, default=str)


def _seconds_of(file: Path) -> float | None:
    """What a shard took; None where it is not there whole."""
    found = kept(file)
    return None if found is None else float(found["seconds"])


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _bytes(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, {"bytes": "KB", "KB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{count:.3g} {unit}"
