"""A stitch of many pictures: on several ranks, of several rewards at once, from a store on disk that is made once and mended where it is damaged."""

import io
import json
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlstitch.files import cache_folder
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch import store as storing
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import UserError
from tests import warm
from tests.conftest import write_clip
from tests.test_stitch_job import LAUNCHER, given

COUNT = 20
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twenty pictures with prompts, in two WebDataset shards."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(3)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for k in range(COUNT // 2):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(picture, "png")
                for name, content in ((f"{k}.png", picture.getvalue()), (f"{k}.txt", f"{k} red circles".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("other_clip"), seed=5)


@pytest.fixture
def told(tmp_path, shards, sd3_dir, clip_dir, monkeypatch):
    """A recipe on the shards in small parts, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storing, "SHARD", 6)
    pictures = {"_target_": "rlstitch.picture_sets.images_from_shards", "path": str(shards / "*.tar"), "size": 16}
    recipe = given(tmp_path, sd3_dir, clip_dir, images=pictures, held_out=pictures, search_images=30)
    recipe["distill"] |= {"steps": 4, "batch_size": 8, "lr": 1e-3, "warmup": 1}
    return recipe


def run(told, **more):
    return stitch.run(stitch.checked(told | more, "tiny"))


def weights(model):
    return {k: v for k, v in model.state_dict().items() if k.startswith(("stitch.", "tail."))}


def same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], **(tolerance or {"atol": 0, "rtol": 0}), msg=lambda text, name=name: f"{name}: {text}"
        )


def files():
    return sorted((cache_folder() / "stitching").glob("*"))


def test_several_rewards_at_once_are_each_as_stitched_alone(told, other_clip, clip_dir, monkeypatch):
    """Cut at one block and at several: the same draws, one run of what they share, the same weights bit for bit."""
    both = {"a": told["reward"], "b": {**told["reward"], "path": str(other_clip)}}
    for blocks in ({"blocks": "2"}, {"blocks": "best"}):
        together = run({k: v for k, v in told.items() if k != "reward"}, rewards=both, name="both", **blocks)
        for name, node in both.items():
            alone = run(told, reward=node, name=f"alone-{name}", **blocks)[""]
            same(weights(together[name]), weights(alone))
            loaded = StitchedValueModel.from_pretrained(f"{told['out']}/both/{name}")
            assert loaded.card["name"] == f"both/{name}" and loaded.card["quality"].keys() == alone.card["quality"].keys()
    seen, own = [], stitch.Distillation.grids
    monkeypatch.setattr(stitch.Distillation, "grids", lambda self, *a: seen.append(own(self, *a)) or seen[-1])
    count, activations = [], StitchedValueModel.activations
    monkeypatch.setattr(StitchedValueModel, "activations", lambda self, *a: count.append(1) or activations(self, *a))
    run({k: v for k, v in told.items() if k != "reward"}, rewards=both, name="counted", blocks="2", measure_every=0, resume="never")
    assert len(seen) == 4 and all(g["a"] is g["b"] or torch.equal(g["a"], g["b"]) for g in seen)
    assert len(count) == 4 + 2 * len(stitch.measure.SIGMAS)  # a step, and the last measurement of each


def test_cuts_at_several_depths_are_each_their_own(told, other_clip, backbone):
    """One prefix that goes on gives what each prefix of its own gives."""
    model = run(told, blocks="1", name="one")[""], run(told, blocks="3", name="three")[""]
    z, sigma = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
    config = stitch.DistillConfig(**told["distill"])
    training = stitch.Distillation({"three": model[1], "one": model[0]}, [], config, extend=backbone.extend)
    found = training.grids(z, sigma, None)
    for name, one in zip(("one", "three"), model):
        assert torch.equal(found[name], one.activations(z, sigma).grid), name


def test_two_ranks_stitch_what_one_does(told, tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps(told | {"checkpoint": {"every": 2}}))
    found = {}
    for ranks in (1, 2):
        command = [LAUNCHER, f"recipe={tmp_path / 'mine.yaml'}", f"name=on{ranks}", "distill.micro_batch=3"]
        if ranks == 2:
            codes, output, _ = warm.outcome(*command, ranks=2, target=("rlstitch.stitch.distill.Distillation.step", 4))
            assert codes[0] == -9, output
        code, output = warm.run(*command, ranks=ranks)
        assert code == 0 and output.count("saved to") == 1, output
        found[ranks] = StitchedValueModel.from_pretrained(f"{told['out']}/on{ranks}"), output
    assert "resumed from step-000002" in found[2][1]
    (one, _), (two, _) = found[1], found[2]
    same(weights(one), weights(two), atol=1e-3, rtol=0)  # kept in half precision
    assert one.card["blocks"] == two.card["blocks"]
    for a, b in zip(one.card["search"], two.card["search"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    rows = [[json.loads(line) for line in Path(f"{told['out']}/on{n}/metrics.jsonl").read_text().splitlines()] for n in (1, 2)]
    losses = [[row["loss"] for row in listed if "loss" in row] for listed in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4
    code, output = warm.run(LAUNCHER, f"recipe={tmp_path / 'mine.yaml'}", "name=odd", "distill.batch_size=7", ranks=2)
    assert code == 2 and output.count("'distill.batch_size' is 7, which 2 ranks cannot share evenly") == 1, output


def test_the_store_is_made_once_and_mended(told, monkeypatch, capsys):
    first = weights(run(told)[""])
    there = {f: f.stat().st_mtime_ns for f in files()}
    assert (
        len(there) == 2 * 4 and "of latents and targets of 20 pictures go to" in capsys.readouterr().out
    )  # 4 parts of 6, latents and targets
    with monkeypatch.context() as patch:
        patch.setattr(storing.Pictures, "read", lambda *_: pytest.fail("read again"))
        patch.setattr(storing.Store, "pictures", lambda self, index: torch.randint(255, (len(index), 3, 16, 16)).byte())  # the search's
        run(told, name="again")
    assert {f: f.stat().st_mtime_ns for f in files()} == there and "go to" not in capsys.readouterr().out
    content = files()[1].read_bytes()
    files()[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    files()[2].write_bytes(content[:40])
    same(weights(run(told, name="mended")[""]), first)
    assert len([f for f, t in there.items() if f.stat().st_mtime_ns != t]) == 2
    same(weights(run(told, name="anew", keep_tokens=False)[""]), first, atol=1e-3, rtol=1e-3)  # tokens are kept in half precision
    assert len(files()) == 3 * 4  # latents are shared


def test_a_disk_without_room_is_told_before_anything_is_written(told, monkeypatch):
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 1000))
    with pytest.raises(
        UserError, match=r"latents and targets of 20 pictures need .* KB in .*, which has 1 KB left: take fewer pictures, keep_tokens=false"
    ):
        run(told)
    assert not files()


def test_a_picture_that_cannot_be_read_is_named_or_left_out(told, shards, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    with tarfile.open(copy / "1.tar") as archive:
        offset = archive.getmember("7.png").offset_data
    with (copy / "1.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"no picture")
    images = {**told["images"], "path": str(copy / "*.tar")}
    with pytest.raises(
        UserError,
        match=r"1 of 6 pictures under .* cannot be read: 1.tar:7 \(no picture\). Mend or remove them, or set skip_unreadable: true",
    ):
        run(told, images=images)
    run(told, images={**images, "skip_unreadable": True})
    said = capsys.readouterr().out
    assert (
        "1 of 20 pictures cannot be read and are left out" in said and "left out 1 unreadable pictures of 8: 1.tar:7 (no picture)" in said
    )


def test_both_reward_and_rewards_are_refused(told):
    with pytest.raises(UserError, match="'reward' and 'rewards' are both given"):
        stitch.checked(told | {"rewards": {"a": told["reward"]}}, "tiny")
