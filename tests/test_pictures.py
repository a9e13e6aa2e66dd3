"""A user's pictures: captions, pairs, and what is wrong with a folder."""

import io
import json
import os

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
    with pytest.raises(UserError, match="1 captions .*.*b.txt is not UTF-8 text: byte 0xff in line 1"):
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


def seen(folder, image, name="x.png", **how):
    """The middle of a picture as it is read."""
    (folder / "own").mkdir(exist_ok=True, parents=True)
    image.save(folder / "own" / name, **how)
    return images_from_folder(str(folder / "own"), 8)[0][0, :, 4, 4].tolist()


def test_every_kind_of_number_is_read_on_its_scale(tmp_path, capsys):
    for dtype, value, name, expected in (
        (np.uint16, 65535 // 4, "x.png", 64),  # I;16
        (np.uint16, 257 * 200, "x.tif", 200),
        (np.int32, 257 * 100, "x.tif", 100),  # I
        (np.float32, 0.5, "x.tif", 128),  # F
        (np.uint8, 77, "x.png", 77),  # L
    ):
        assert seen(tmp_path / name, Image.fromarray(np.full((12, 20), value, dtype)), name) == [expected] * 3, dtype
    for dtype, value in ((np.int32, -1), (np.int32, 70_000), (np.float32, 255.0), (np.float32, np.nan)):
        with pytest.raises(UserError, match=r"1 of 1 pictures .* x.tif \(ValueError: .* where 0 to"):
            seen(tmp_path / "x.tif", Image.fromarray(np.full((12, 20), value, dtype)), "x.tif")
    red = Image.new("RGB", (20, 12), (255, 0, 0))
    for image, name in ((red.convert("P"), "p.png"), (red.convert("CMYK"), "c.tif"), (Image.new("1", (20, 12), 1), "b.png")):
        got = seen(tmp_path / name, image, name)
        assert got == ([255] * 3 if name == "b.png" else [255, 0, 0]), (name, got)
    assert "transparency" not in capsys.readouterr().out


def test_hidden_colours_do_not_come_through_and_frames_and_turns_are_told(tmp_path, capsys):
    clear = Image.new("RGBA", (20, 12), (255, 0, 0, 0))
    assert seen(tmp_path, clear) == [255] * 3
    half = Image.new("LA", (20, 12), (0, 128))
    assert seen(tmp_path, half)[0] == pytest.approx(127, abs=1)
    palette = Image.new("P", (20, 12), 3)
    palette.putpalette([9] * 768)
    assert seen(tmp_path, palette, transparency=3) == [255] * 3
    assert capsys.readouterr().out.count("1 of 1 pictures under") == 3
    assert seen(tmp_path / "opaque", Image.new("RGBA", (20, 12), (255, 0, 0, 255))) == [255, 0, 0]
    assert capsys.readouterr().out == ""
    frames = [Image.new("RGB", (20, 12), c) for c in ("red", "blue")]
    for name in ("x.gif", "x.webp"):
        assert seen(tmp_path / name, frames[0], name, save_all=True, append_images=frames[1:], lossless=True) == [255, 0, 0]
        assert f"animated, its first frame: {name}" in capsys.readouterr().out
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half_red = Image.new("RGB", (8, 8))
    half_red.paste((255, 0, 0), (0, 0, 8, 4))
    (tmp_path / "turn").mkdir()
    half_red.save(tmp_path / "turn" / "x.png", exif=exif)
    assert images_from_folder(str(tmp_path / "turn"), 8)[0][0, 0, :, 4].tolist() == [0] * 4 + [255] * 4
    assert "turned as its EXIF says: x.png" in capsys.readouterr().out


def spoilt_exif(picture):
    """A picture as a JPEG whose EXIF is no EXIF."""
    made = io.BytesIO()
    Image.open(picture).convert("RGB").save(made, "JPEG")
    return made.getvalue()[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff" + made.getvalue()[2:]


def test_nothing_in_a_folder_blocks_or_ends_the_reading(folder, monkeypatch, capsys):
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (20, 12)).save(folder / "text.png", pnginfo=text)
    Image.effect_noise((64, 64), 99).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:600])
    Image.new("1", (200, 100)).save(folder / "vast.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>")
    (folder / "turned.jpg").write_bytes(spoilt_exif(folder / "a.png"))
    (folder / "elsewhere").symlink_to(folder.parent)
    (folder / "._a.png").write_bytes(b"of another system")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    with pytest.raises(UserError, match="8 of 12 pictures") as error:
        images_from_folder(str(folder), 8)
    for told in (
        "cut.png (OSError: image file is truncated",
        "vast.png (DecompressionBombError",
        "pipe.png (a pipe)",
        "loop.png (a link that",
        "empty.png (empty)",
        "page.jpg (no picture)",
    ):
        assert told in str(error.value)
    assert len(images_from_folder(str(folder), 8, skip_unreadable=True)[0]) == 4
    said = capsys.readouterr().out
    for told in (
        "left out 8 unreadable pictures of 12",
        "1 folders under",
        "links, which are not followed: elsewhere",
        "(Corrupt EXIF data): turned.jpg",
    ):
        assert told in said
    with pytest.raises(UserError, match="is no folder"):
        images_from_folder(str(folder / "a.png"), 8)


def test_listings_as_the_imagefolder_convention_has_them(folder):
    (folder / "metadata.csv").write_text("file_name,Caption,n\na.png,fire,1\n./b.png,,2\n")
    (folder / "b.txt").write_text("grass")
    (folder / "more" / "metadata.jsonl").write_text('{"file_name": "c.png", "prompt": "sky"}')
    assert images_from_folder(str(folder), 8)[1] == ["fire", "grass", "sky"]
    (folder / "more" / "metadata.jsonl").write_text('{"file_name": "c.png", "alt": "sea", "prompt": "sky"}')
    with pytest.raises(UserError, match="no column 'alt'"):
        images_from_folder(str(folder), 8, column="alt")
    (folder / "metadata.csv").write_text("file_name,alt\na.png,fire\nb.png,grass")
    assert images_from_folder(str(folder), 8, column="alt")[1] == ["fire", "grass", "sea"]
    (folder / "metadata.csv").unlink()
    rows = [{"file_name": name, "text": text} for name, text in (
        ("a.png", 5), ("b.png", "x"), ("b.png", "y"), ("more/c.png", "twice"), ("gone.png", "x"), ("../x.png", "x"), (str(folder / "a.png"), "x"),
        ("b.txt", "x"),
    )]  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (folder / "a.txt").mkdir()
    with pytest.raises(UserError, match="captions under .* cannot be used") as error:
        images_from_folder(str(folder), 8)
    said = str(error.value)
    for told in (
        "8 captions",
        "line 1: a.png has 5 (int) for a caption",
        "line 3: b.png is named twice",
        "line 5: gone.png is not there",
        "line 6: ../x.png lies outside",
    ):
        assert told in said, said
    (folder / "metadata.csv").write_text("")
    with pytest.raises(UserError, match="metadata.jsonl and metadata.csv: keep the one"):
        images_from_folder(str(folder), 8)


def test_listings_of_another_layout_say_which_columns_they_have(folder, capsys):
    (folder / "d.heic").write_bytes(b"x")
    (folder / "metadata.jsonl").write_text('{"image": "a.png", "text": "fire"}\n')
    with pytest.raises(UserError, match="metadata.jsonl has no column file_name; it has image, text"):
        images_from_folder(str(folder), 8)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}\n')
    assert not any(images_from_folder(str(folder), 8)[1])
    said = capsys.readouterr().out
    assert "and so no prompts; it has file_name, label" in said and "1 pictures under" in said and "are not read: d.heic" in said
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["fire", "flame"]}\n')
    with pytest.raises(UserError, match="have no prompt: b.png, more/c.png"):  # and a.png has its first
        images_from_folder(str(folder), 8)


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
    with pytest.raises(UserError, match="pairs.jsonl, line 1: needs a path under 'rejected'"):
        pairs_from_file(str(file), 8)
    (folder / "pairs.csv").write_text("Prompt,chosen,rejected\nwarm,a.png,more/c.png\n")
    assert pairs_from_file(str(folder / "pairs.csv"), 8)[1] == ["warm"]
    (folder / "same.csv").write_text("prompt,chosen,rejected\nwarm,a.png,a.png\n")
    with pytest.raises(UserError, match="line 2: chosen and rejected are one picture"):
        pairs_from_file(str(folder / "same.csv"), 8)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no pair"):
        pairs_from_file(str(file), 8)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ((torch.zeros(8, 3, 4, 4, dtype=torch.uint8), ["x"] * 7), "images", "8 images and 7 prompts"),
        ((torch.zeros(0, 3, 4, 4, dtype=torch.uint8), []), "images", "0 images and 0 prompts"),
        ((torch.rand(2, 3, 4, 4), ["x"] * 2), "images", "float32, not uint8 from 0 to 255: of floats"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.long), ["x"] * 2), "images", "int64, not uint8"),
        ((torch.zeros(2, 4, 4, 3, dtype=torch.uint8), ["x"] * 2), "images", r"\[2, 4, 4, 3\], but images \[N, 3, H, W\]"),
        ((torch.zeros(2, 3, 4, dtype=torch.uint8), ["x"] * 2), "images", r"\[2, 3, 4\], but images"),
        ((torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8), ["x"] * 2), "pairs", r"\[2, 3, 3, 4, 4\], but pairs"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["x", 5]), "images", "1 prompts that are no text, e.g. number 1: 5"),
        ((np.zeros((2, 3, 4, 4), np.uint8), ["x"] * 2), "images", "gives tuple, not pictures"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "xy"), "images", "gives tuple, not pictures"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8),), "images", "gives Tensor, not pictures"),
    ],
)
def test_pictures_of_a_part_are_looked_at_before_they_are_learned_from(monkeypatch, what, kind, message):
    monkeypatch.setattr("rlstitch.data.cfg.build", lambda node: what if len(what) > 1 else what[0])
    with pytest.raises(UserError, match=f"'data.images': mine.pictures .*{message}"):
        read_data(DataConfig(images={"_target_": "mine.pictures"}), kind)
