"""A user's pictures: captions, pairs, and what is wrong with a folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rlstitch.data import read_data
from rlstitch.pictures import images_from_folder, pairs_from_file
from rlstitch.schema import DataConfig
from rlstitch.types import UserError


@pytest.fixture
def folder(tmp_path):
    """Three plain pictures 20 x 12: red, green, blue; the last in a folder of its own."""
    (tmp_path / "more").mkdir()
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 255, 0)), ("more/c.png", (0, 0, 255))):
        Image.new("RGB", (20, 12), colour).save(tmp_path / name)
    return tmp_path


def test_pictures_without_captions(folder):
    images, prompts = images_from_folder(str(folder), 8)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8 and prompts == ["", "", ""]
    assert images.flatten(2).float().mean(2).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_captions_beside_pictures_and_in_a_listing(folder):
    for name, text in (("a", "red"), ("b", "green\n"), ("more/c", "blue")):
        (folder / f"{name}.txt").write_text(text)
    assert images_from_folder(str(folder), 8)[1] == ["red", "green", "blue"]
    assert images_from_folder(str(folder), 8, captions=False)[1] == ["", "", ""]
    silent = DataConfig(images={"_target_": "rlstitch.pictures.images_from_folder", "path": str(folder), "size": 8, "captions": False})
    with pytest.raises(UserError, match="3 pictures without a prompt"):
        read_data(silent, "images")
    rows = [{"file_name": "more/c.png", "text": "sky"}, {"file_name": "a.png", "prompt": "fire"}, {"file_name": "b.png", "text": "grass"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    assert images_from_folder(str(folder), 8)[1] == ["fire", "grass", "sky"]


def test_missing_captions_are_named(folder):
    with pytest.raises(UserError, match="3 of 3 pictures .* have no prompt"):
        images_from_folder(str(folder), 8, captions=True)
    (folder / "a.txt").write_text("red")
    with pytest.raises(UserError, match=r"2 of 3 pictures .* have no prompt: b.png, more/c.png"):
        images_from_folder(str(folder), 8)
    (folder / "b.txt").write_bytes(b"gr\xffn")
    with pytest.raises(UserError, match="b.txt is not UTF-8 text: byte 0xff at 2"):
        images_from_folder(str(folder), 8)


def test_unreadable_pictures_are_counted_and_named(folder, capsys):
    (folder / "b.png").write_bytes(b"no picture")
    (folder / "zz.jpg").write_bytes(b"")
    for name in ("a", "b", "zz", "more/c"):
        (folder / f"{name}.txt").write_text(f"prompt of {name}")
    with pytest.raises(UserError, match=r"2 of 4 pictures .* b.png .*zz.jpg"):
        images_from_folder(str(folder), 8)
    images, prompts = images_from_folder(str(folder), 8, skip_unreadable=True)
    assert len(images) == 2 and prompts == ["prompt of a", "prompt of more/c"] and "left out 2" in capsys.readouterr().out
    (folder / "none").mkdir()
    with pytest.raises(UserError, match="no picture under"):
        images_from_folder(str(folder / "none"), 8)


def test_pairs(folder):
    rows = [
        {"prompt": "warm", "chosen": "a.png", "rejected": "more/c.png"},
        {"prompt": "cold", "chosen": "more/c.png", "rejected": "b.png"},
    ]
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    pairs, prompts = pairs_from_file(str(file), 8)
    assert pairs.shape == (2, 2, 3, 8, 8) and prompts == ["warm", "cold"]
    np.testing.assert_array_equal(pairs.float().mean((3, 4)).argmax(2).tolist(), [[0, 2], [2, 1]])
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 pictures .* b.png"):
        pairs_from_file(str(file), 8)
    assert pairs_from_file(str(file), 8, skip_unreadable=True)[1] == ["warm"]
    file.write_text('{"prompt": "warm", "chosen": "a.png"}\n')
    with pytest.raises(UserError, match="pairs.jsonl, line 1: needs a non-empty string under 'rejected'"):
        pairs_from_file(str(file), 8)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no pair"):
        pairs_from_file(str(file), 8)
