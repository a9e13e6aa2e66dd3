"""Update streams and the geometry of a global batch."""

import threading
from pathlib import Path

import pytest
import torch

from rlstitch.advantages import group_normalise
from rlstitch.data import UpdateStream, encode_pictures, prompt_seeds, resolve_geometry
from rlstitch.prompts import PromptSet
from rlstitch.types import UserError, noise_like
from tests import pictures


@pytest.mark.parametrize("world", [1, 2, 4, 16])
def test_geometry_gives_the_same_samples_on_any_number_of_ranks(world):
    prompts = PromptSet([f"p{i}" for i in range(50)], [{} for _ in range(50)])
    whole = UpdateStream(prompts, resolve_geometry(16, 2, 32, 1), seed=3)
    stream = UpdateStream(prompts, g := resolve_geometry(16, 2, 6, world), seed=3)
    assert g.samples == 32 and g.micro_batch <= 6 and g.micro_batch * g.accumulation * world == 32
    for update in (0, 1, 7):
        expected = next(whole.batches(update, 0))
        wide, rows = expected[2:4].interleave(2), torch.tensor([2, 2, 3, 3])
        assert wide.prompts == [expected.prompts[k] for k in rows] and len(wide.facts) == 4
        assert torch.equal(wide.seeds, expected.seeds[rows]) and torch.equal(wide.group, expected.group[rows])
        got = [b for rank in range(world) for b in stream.batches(update, rank)]
        assert [p for b in got for p in b.prompts] == expected.prompts
        assert torch.equal(torch.cat([b.seeds for b in got]), expected.seeds)


def test_impossible_geometry_names_the_nearest():
    with pytest.raises(UserError, match="prompts_per_update=8 or 12"):
        resolve_geometry(10, 1, 4, 4)


def test_stream_visits_every_prompt_once_an_epoch_and_never_repeats_noise():
    prompts = PromptSet([str(i) for i in range(10)], [{}] * 10)
    stream = UpdateStream(prompts, resolve_geometry(4, 3, 99, 1), seed=0)
    seen = [g % 10 for u in range(5) for g in stream.groups(u)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    seeds = torch.cat([next(stream.batches(u, 0)).seeds for u in range(5)])
    assert len(seeds.unique()) == len(seeds)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_fewer_prompts_than_an_update_takes_go_round_again_with_groups_and_noise_of_their_own(world):
    """3 prompts, 8 draws of 2 images: two whole epochs and two of the third, in groups of 2 that no cut divides."""
    prompts = PromptSet([str(i) for i in range(3)], [{"n": i} for i in range(3)])
    geometry = resolve_geometry(8, 2, 4, world, len(prompts), whole_groups=True)
    assert "16 samples an update (2.67 times through the 3 that there are), on" in str(geometry)
    assert "times" not in str(resolve_geometry(3, 2, 4, 1, 3))
    stream = UpdateStream(prompts, geometry, seed=1)
    for update in (0, 1):
        batches = [b for rank in range(world) for b in stream.batches(update, rank)]
        group, seeds = torch.cat([b.group for b in batches]), torch.cat([b.seeds for b in batches])
        assert [int(g) % 3 for g in group] == [int(p) for b in batches for p in b.prompts] == [r["n"] for b in batches for r in b.facts]
        assert group.unique(return_counts=True)[1].tolist() == [2] * 8 and group[::2].equal(group[1::2])
        assert len(seeds.unique()) == 16 and len(prompt_seeds(seeds, group.unique()).unique()) == 8
        assert sorted((group % 3).tolist()).count(0) in (4, 6) and all(len(b.group.unique()) == 2 for b in batches)
    advantage = group_normalise(torch.arange(16.0)[:, None], group, spread="group")
    assert advantage.flatten().tolist() == pytest.approx(
        [-1, 1] * 8, abs=1e-3
    )  # within a draw alone, though the prompt is drawn three times


def test_noise_depends_on_the_seed_alone():
    one, many = noise_like((2, 3), torch.tensor([5])), noise_like((2, 3), torch.tensor([4, 5]))
    assert torch.equal(one[0], many[1]) and not torch.equal(many[0], many[1])
    assert not torch.equal(noise_like((2, 3), torch.tensor([5]), stream=1), one)


def test_any_seed_gives_noise_seeds_that_torch_takes():
    from rlstitch.data import first_seed, update_number

    for seed in (0, 2330, 20_250_101, 2**40):
        first = first_seed(seed, 7)
        seeds = torch.arange(64) + first
        assert int(seeds[0]) >= 0 and int(seeds[-1]) < 2**63 and update_number(seeds) == update_number(seeds[-1:])
        assert update_number(torch.tensor([first_seed(seed, 8)])) != update_number(seeds)


def test_a_disk_that_is_full_says_so_and_leaves_the_old_file(tmp_path, monkeypatch):
    from rlstitch import files

    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"x": torch.ones(2)})

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:4])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(path, {"x": torch.zeros(2)})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and files.read_tensors(path)["x"].tolist() == [1, 1]


class Rank:
    """One of several ranks in a thread of its own; `gather` waits for the others as the job's does."""

    def __init__(self, rank, world, table, barrier):
        self.rank, self.world, self.table, self.barrier = rank, world, table, barrier

    def gather(self, tensor):
        self.table[self.rank] = tensor
        self.barrier.wait(30)
        every = torch.cat(self.table)
        self.barrier.wait(30)
        return every


def test_ranks_share_the_pictures_and_a_cache_keeps_them(backbone, sd3_dir, tmp_path, monkeypatch):
    """The same bits on one rank and on two, each of which encodes its half; a second start encodes nothing, and other weights do not take what it kept."""
    shown, _ = pictures.tiny_pairs(9)  # batches of 4 4 4 4 2
    seen, plain = [], type(backbone).encode
    monkeypatch.setattr(
        type(backbone), "encode", lambda self, x: (seen.append((threading.current_thread().name, len(x))), plain(self, x))[1]
    )
    alone = encode_pictures(backbone, shown)
    assert alone.shape == (9, 2, *backbone.latent_shape) and [n for _, n in seen] == [4, 4, 4, 4, 2]

    def on(world, cache=None):
        seen.clear()
        backbone.cache, table, barrier, out = cache, [None] * world, threading.Barrier(world), [None] * world

        def work(rank):
            out[rank] = encode_pictures(backbone, shown, engine=Rank(rank, world, table, barrier))

        threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(world)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert all(torch.equal(z, alone) for z in out)
        return [sum(n for name, n in seen if name == str(rank)) for rank in range(world)]

    assert on(2) == [10, 8] and on(3) == [8, 6, 4]
    assert on(2, tmp_path) == [10, 8] and on(1, tmp_path) == [0]
    (kept,) = tmp_path.iterdir()
    assert len(list(kept.iterdir())) == 5
    monkeypatch.setattr(backbone, "picture_fingerprint", lambda: "other")
    assert on(1, tmp_path) == [18]
