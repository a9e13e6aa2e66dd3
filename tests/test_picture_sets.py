"""Published sets in the formats they come in: prompts, pictures, pairs and grades, each read as its own paper's files have it."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from rlstitch import hub, picture_sets, pictures
from rlstitch.prompts import fingerprint, read_prompts
from rlstitch.types import UserError


def png(shade, side=8):
    out = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(out, format="PNG")
    return out.getvalue()


def shades(images):
    return images.float().mean((-3, -2, -1)).round().int().tolist()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return str(path)


KARPATHY = {
    "dataset": "flickr30k",
    "images": [
        {"filename": "1.png", "split": "test", "imgid": 0, "sentences": [{"raw": "A cat. "}, {"raw": "Two cats."}]},
        {"filename": "2.png", "split": "train", "imgid": 1, "sentences": [{"raw": "A dog."}]},
    ],
}
COCO = {
    "info": {}, "licenses": [],
    "images": [{"id": 7, "file_name": "1.png"}, {"id": 9, "file_name": "2.png"}, {"id": 11, "file_name": "3.png"}],
    "annotations": [{"image_id": 9, "id": 1, "caption": "A dog."}, {"image_id": 7, "id": 2, "caption": "A cat."}, {"image_id": 7, "id": 3, "caption": "Two cats."}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "prompts", "facts"),
    [
        ("drawbench.csv", "Prompts,Category\nA red car.,Colors\n", ["A red car."], {"Category": "Colors"}),
        ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n", ["bond"], {"Challenge": "Basic"}),
        ("evaluation_metadata.jsonl", '{"tag": "two_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n', ["a photo of a bench"], {"tag": "two_object"}),
        ("anime.json", ["a girl", "a boy"], ["a girl", "a boy"], {}),
        ("color_val.txt", "a green bench and a blue bowl\n", ["a green bench and a blue bowl"], {}),
        ("geneval2_data.jsonl", '{"prompt": "six cows", "atom_count": 2, "vqa_list": [["How many cows?", "six"]], "skills": ["count"]}\n', ["six cows"], {"vqa_list": [["How many cows?", "six"]]}),
        ("captions_val2014.json", COCO, ["A cat.", "A dog."], {"captions": ["A cat.", "Two cats."], "file_name": "1.png"}),
        ("dataset_flickr30k.json", KARPATHY, ["A cat.", "A dog."], {"split": "test"}),
    ],
)  # fmt: skip
def test_prompt_sets_are_read_as_they_come(tmp_path, name, content, prompts, facts):
    found = read_prompts(write(tmp_path / name, content))
    assert found.prompts == prompts and facts.items() <= found.rows[0].items()


def test_a_folder_of_texts_is_a_set(tmp_path):
    for name, text in (("10.txt", "a long prompt\n"), ("2.txt", "a cat")):
        write(tmp_path / "dpg" / name, text)
    found = read_prompts(str(tmp_path / "dpg"))
    assert found.prompts == ["a long prompt", "a cat"] and found.rows[1]["file"] == "2.txt"
    before = fingerprint(str(tmp_path / "dpg"))
    write(tmp_path / "dpg" / "2.txt", "a dog")
    assert fingerprint(str(tmp_path / "dpg")) != before
    write(tmp_path / "dpg" / "3.txt", "a list\nof prompts")
    with pytest.raises(UserError, match=r"1 have several lines \(3.txt\): name one file"):
        read_prompts(str(tmp_path / "dpg"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(str(tmp_path / "none"))


def test_pictures_of_caption_files(tmp_path):
    for k in (1, 2, 3):
        write(tmp_path / "val2014" / f"{k}.png", png(40 * k))
    for name, content in (("coco.json", COCO), ("karpathy.json", KARPATHY)):
        images, prompts = picture_sets.images_with_captions(write(tmp_path / name, content), str(tmp_path / "val2014"), 4)
        assert shades(images) == [40, 80] and prompts == ["A cat.", "A dog."]
    images, prompts = picture_sets.images_with_captions(str(tmp_path / "karpathy.json"), str(tmp_path / "val2014"), 4, split="test")
    assert prompts == ["A cat."]
    with pytest.raises(UserError, match="no picture of split 'val'; it has test, train"):
        picture_sets.images_with_captions(str(tmp_path / "karpathy.json"), str(tmp_path / "val2014"), 4, split="val")
    out = json.loads(json.dumps(KARPATHY).replace("1.png", "../../1.png"))
    with pytest.raises(UserError, match="lies outside"):
        picture_sets.images_with_captions(write(tmp_path / "out.json", out), str(tmp_path / "val2014"), 4)
    with pytest.raises(UserError, match="9.png .not there."):
        picture_sets.images_with_captions(
            write(tmp_path / "lacks.json", json.dumps(KARPATHY).replace("1.png", "9.png")), str(tmp_path / "val2014"), 4
        )


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_pictures_of_shards(tmp_path):
    tar(tmp_path / "b-1.tar", [("x/3.png", png(120)), ("x/3.json", b'{"caption": "three", "id": 3}')])
    tar(
        tmp_path / "b-0.tar",
        [("1.PNG", png(40)), ("1.txt", b"one\n"), ("2.txt", b"nothing"), ("2.cls", b"0"), ("4.jpg.meta", b""), ("5.webp", png(120))],
    )
    images, prompts = picture_sets.images_from_shards(str(tmp_path / "b-*.tar"), 4)
    assert shades(images) == [40, 120, 120] and prompts == ["one", "", "three"]  # two of them are the same picture
    images, prompts = picture_sets.images_from_shards(str(tmp_path / "b-*.tar"), 4, width=8, n=1)
    assert images.shape == (1, 3, 4, 8) and prompts == ["one"]
    (tmp_path / "c.tar").write_bytes((tmp_path / "b-0.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"c.tar cannot be read as a .tar .*: fetch it again"):
        picture_sets.images_from_shards(str(tmp_path / "c.tar"), 4)
    tar(tmp_path / "d.tar", [("1.png", png(40)), ("1.json", b"{")])
    with pytest.raises(UserError, match="d.tar, 1: its prompt cannot be read"):
        picture_sets.images_from_shards(str(tmp_path / "d.tar"), 4)
    with pytest.raises(UserError, match="no shard at"):
        picture_sets.images_from_shards(str(tmp_path / "e.tar"), 4)


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_pictures_of_parquet_files(tmp_path):
    rows = [
        {"image": {"bytes": png(40), "path": "a.png"}, "caption": ["one", "uno"], "k": 1},
        {"image": {"bytes": png(80), "path": None}, "caption": ["two"], "k": 2},
    ]
    images, prompts = picture_sets.images_from_parquet(parquet(tmp_path / "a.parquet", rows), 4)
    assert shades(images) == [40, 80] and prompts == ["one", "two"]
    with pytest.raises(UserError, match="has 0 columns that hold pictures' bytes; it has k"):
        picture_sets.images_from_parquet(parquet(tmp_path / "b.parquet", [{"k": 1}]), 4)
    with pytest.raises(UserError, match="2 columns that hold pictures' bytes: a, b"):
        picture_sets.images_from_parquet(parquet(tmp_path / "c.parquet", [{"a": png(1), "b": png(2)}]), 4)


def test_pairs_of_pick_a_pic_and_hpd(tmp_path):
    rows = [
        {"caption": "one", "jpg_0": png(10), "jpg_1": png(20), "label_0": 1.0},
        {"caption": "two", "jpg_0": png(30), "jpg_1": png(40), "label_0": 0.0},
        {"caption": "tie", "jpg_0": png(50), "jpg_1": png(60), "label_0": 0.5},
    ]
    path = parquet(tmp_path / "pick.parquet", rows)
    images, prompts = pictures.pairs_from_file(path, 4)
    assert shades(images[:, 0]) == [10, 40] and shades(images[:, 1]) == [20, 30] and prompts == ["one", "two"]
    first, second, prompts, wins = pictures.judged_pairs(path, 4)
    assert shades(first) == [10, 30] and shades(second) == [20, 40] and wins.tolist() == [True, False]

    for k in (1, 2, 3):
        write(tmp_path / f"{k}.png", png(40 * k))
    train = [{"prompt": "p", "image_path": ["1.png", "2.png"], "human_preference": [0, 1]}]
    images, _ = pictures.pairs_from_file(write(tmp_path / "train.json", train), 4)
    assert shades(images[0]) == [80, 40]
    test = [{"prompt": "p", "image_path": ["1.png", "2.png", "3.png"], "rank": [2, 1, 3]}]
    first, second, prompts, wins = pictures.judged_pairs(write(tmp_path / "test.json", test), 4)
    assert (
        list(zip(shades(first), shades(second), wins.tolist())) == [(40, 80, False), (40, 120, True), (80, 120, True)]
        and prompts == ["p"] * 3
    )
    with pytest.raises(UserError, match="item 1: needs a list under image_path and one as long"):
        pictures.pairs_from_file(write(tmp_path / "odd.json", [{"prompt": "p", "image_path": ["1.png"], "rank": [1]}]), 4)
    ours = "".join(json.dumps({"prompt": "p", "chosen": f"{k}.png", "rejected": "3.png"}) + "\n" for k in (1, 2))
    first, second, _, wins = pictures.judged_pairs(write(tmp_path / "ours.jsonl", ours), 4)
    assert wins.tolist() == [True, False] and shades(first) == [40, 120] and shades(second) == [120, 80]


def test_grades_of_ava(tmp_path):
    for name in ("11", "12"):
        write(tmp_path / "images" / f"{name}.jpg", png(int(name)))
    lines = "1 11 0 0 0 0 0 0 0 0 0 4 1 2 3\n2 12 1 0 0 0 0 0 0 0 0 1 0 0 3\n3 13 1 1 1 1 1 1 1 1 1 1 0 0 3\n"
    images, prompts, grades = picture_sets.graded_by_ava(write(tmp_path / "AVA.txt", lines), str(tmp_path / "images"), 4)
    assert dict(zip(shades(images), grades.tolist())) == {11: 10.0, 12: 5.5} and prompts == ["", ""] and grades.dtype == torch.float32
    with pytest.raises(UserError, match="line 1: needs a number, an id and ten counts"):
        picture_sets.graded_by_ava(write(tmp_path / "odd.txt", "1 11 2\n"), str(tmp_path / "images"), 4)


def test_a_file_of_a_data_set_at_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(name, *, revision=None, repo_type=None, allow_patterns=None, local_files_only=False, tqdm_class=None):
        asked.append((name, revision, repo_type, allow_patterns, local_files_only))
        if local_files_only and not (tmp_path / "hub" / "sets" / "a.txt").exists():
            raise LocalEntryNotFoundError("not there")
        write(tmp_path / "hub" / "sets" / "a.txt", "a cat\n")
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "_libraries_alone", True)
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    path = "hub:datasets/someone/set-of.mine/sets/a.txt@v1"
    assert read_prompts(path).prompts == ["a cat"] and ("someone/set-of.mine", "v1", "dataset", ["sets/a.txt"], False) in asked
    count = len(asked)
    assert read_prompts(path).prompts == ["a cat"] and all(local for *_, local in asked[count:])
    with pytest.raises(UserError, match="is named hub:datasets/OWNER/NAME/FILE"):
        read_prompts("hub:someone/set")
    with pytest.raises(UserError, match="the data set someone/set-of.mine has no file other.txt"):
        read_prompts("hub:datasets/someone/set-of.mine/other.txt")
    monkeypatch.setattr(hub, "_libraries_alone", False)
    monkeypatch.setattr(hub, "offline", lambda: True)
    with pytest.raises(UserError, match="run hf download --repo-type dataset someone/set 'x.txt' --revision v2"):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(LocalEntryNotFoundError("no")))
        read_prompts("hub:datasets/someone/set/x.txt@v2")
