"""Published sets in the formats they come in: prompts, pictures, pairs and grades, each read as its own paper's files have it."""

import json

import pytest
import torch

from rlstitch import hub, picture_sets, pictures
from rlstitch.data import build_captioned
from rlstitch.prompts import fingerprint, read_prompts
from rlstitch.types import UserError
from tests.sets import AVA, COCO, KARPATHY, PAIRS, lay_out, parquet, png, tar, write


def shades(images):
    return images.float().mean((-3, -2, -1)).round().int().tolist()


@pytest.mark.parametrize(
    ("name", "content", "prompts", "facts"),
    [
        ("drawbench.csv", "Prompts,Category\nA red car.,Colors\n", ["A red car."], {"Category": "Colors"}),
        ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n", ["bond"], {"Challenge": "Basic"}),
        ("quotes.tsv", 'Prompt\tNote\n"Open\tx\na sign\ty\nClosed"\tz\n', ['"Open', "a sign", 'Closed"'], {"Note": "x"}),
        ("evaluation_metadata.jsonl", '{"tag": "two_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n', ["a photo of a bench"], {"tag": "two_object"}),
        ("anime.json", ["a girl", "a boy"], ["a girl", "a boy"], {}),
        ("all.json", {"anime": ["a girl"], "concept-art": ["a ship"]}, ["a girl", "a ship"], {"style": "anime"}),
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
    images, captions = picture_sets.images_with_all_captions(str(tmp_path / "karpathy.json"), str(tmp_path / "val2014"), 4)
    assert shades(images) == [40, 80] and captions == [["A cat.", "Two cats."], ["A dog."]]
    table = 'raw,sentids,split,filename\n"[""A cat."", ""Two cats.""]",1,Test,1.png\n"[""A dog.""]",2,train,2.png\n'  # the hub's flickr_annotations_30k.csv
    path = write(tmp_path / "flickr.csv", table.replace("Test", "test"))
    assert picture_sets.images_with_captions(path, str(tmp_path / "val2014"), 4)[1] == ["A cat.", "A dog."]
    assert picture_sets.images_with_captions(path, str(tmp_path / "val2014"), 4, split="test", column="RAW")[1] == ["A cat."]
    lavis = [{"image": "val2014/1.png", "caption": ["A cat.", "Two cats."]}]
    assert picture_sets.images_with_all_captions(write(tmp_path / "lavis.json", lavis), str(tmp_path), 4)[1] == [["A cat.", "Two cats."]]
    with pytest.raises(UserError, match="line 2: needs a caption under 'raw', not ''"):
        picture_sets.images_with_captions(write(tmp_path / "bare.csv", "raw,filename\n,1.png\n"), str(tmp_path / "val2014"), 4)
    out = json.loads(json.dumps(KARPATHY).replace("1.png", "../../1.png"))
    with pytest.raises(UserError, match="lies outside"):
        picture_sets.images_with_captions(write(tmp_path / "out.json", out), str(tmp_path / "val2014"), 4)
    with pytest.raises(UserError, match="9.png .not there."):
        picture_sets.images_with_captions(
            write(tmp_path / "lacks.json", json.dumps(KARPATHY).replace("1.png", "9.png")), str(tmp_path / "val2014"), 4
        )


def test_pictures_of_shards(tmp_path, capsys):
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
    told = [("1.png", png(40)), ("1.json", b'{"Caption": ["one", "uno"]}'), ("2.png", png(80)), ("2.txt", b"\xef\xbb\xbftwo")]
    tar(tmp_path / "00.tar", told), tar(tmp_path / "01.tar", [("3.png", png(120))])
    assert picture_sets.images_from_shards(str(tmp_path / "{00..01}.tar"), 4)[1] == ["one", "two", ""]
    assert "1 of 3 pictures" in capsys.readouterr().out
    for pattern, options, message in (
        ("{00..02}.tar", {}, "no shard at '.*02.tar'"),
        ("00.tar", {"column": "text"}, "no KEY.json in .* has 'text'; they have Caption"),
    ):
        with pytest.raises(UserError, match=message):
            picture_sets.images_from_shards(str(tmp_path / pattern), 4, **options)
    with pytest.raises(UserError, match="no shard at"):
        picture_sets.images_from_shards(str(tmp_path / "e.tar"), 4)


def test_pictures_of_parquet_files(tmp_path):
    pytest.importorskip("pyarrow")
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
    pytest.importorskip("pyarrow")
    path = parquet(tmp_path / "pick.parquet", PAIRS)
    images, prompts = pictures.pairs_from_file(path, 4)
    assert shades(images[:, 0]) == [10, 40] and shades(images[:, 1]) == [20, 30] and prompts == ["one", "two"]
    first, second, prompts, wins = pictures.judged_pairs(path, 4)
    assert shades(first) == [10, 30] and shades(second) == [20, 40] and wins.tolist() == [True, False]

    again = [{"caption": "x", "jpg_0": {"bytes": png(70), "path": "a"}, "jpg_1": {"bytes": png(80), "path": "b"}, "label_0": 0.0}]
    parquet(tmp_path / "pick2.parquet", again)  # as a data set of the hub holds pictures
    assert shades(pictures.pairs_from_file(str(tmp_path / "pick*.parquet"), 4)[0][:, 0]) == [10, 40, 80]
    with pytest.raises(UserError, match="pick3.parquet, row 1: needs two pictures' bytes under jpg_0 and jpg_1 and a number"):
        pictures.pairs_from_file(parquet(tmp_path / "pick3.parquet", [again[0] | {"label_0": float("nan")}]), 4)

    for k in (1, 2, 3):
        write(tmp_path / f"{k}.png", png(40 * k)), write(tmp_path / "in" / f"{k + 3}.png", png(40 * k))
    inside = [{"Prompt": "p", "File_Path": ["4.png", "5.png"], "human_preference": [], "rank": [1, 2]}]
    assert shades(pictures.pairs_from_file(write(tmp_path / "in.json", inside), 4)[0][0]) == [40, 80]
    with pytest.raises(UserError, match="needs a path under 'chosen' and 'rejected', or .*; it has prompt, win, lose"):
        pictures.pairs_from_file(write(tmp_path / "other.json", [{"prompt": "p", "win": "1.png", "lose": "2.png"}]), 4)
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
    for name in ("11.jpg", "images/12.JPG"):
        write(tmp_path / "images" / name, png(int(name[-6:-4])))
    images, prompts, grades = picture_sets.graded_by_ava(write(tmp_path / "AVA.txt", AVA), str(tmp_path / "images"), 4)
    assert dict(zip(shades(images), grades.tolist())) == {11: 10.0, 12: 5.5} and prompts == ["", ""] and grades.dtype == torch.float32
    with pytest.raises(UserError, match="line 1: needs a number, an id and ten counts"):
        picture_sets.graded_by_ava(write(tmp_path / "odd.txt", "1 11 2\n"), str(tmp_path / "images"), 4)


def test_recall_is_taken_over_all_captions_of_pictures_that_have_some(tmp_path):
    lay_out(tmp_path)
    coco = {"path": str(tmp_path / "dataset_coco.json"), "images": str(tmp_path / "coco"), "size": 4}
    for name, told in (
        ("images_with_all_captions", [["A cat.", "Two cats."], ["A dog."]]),
        ("images_with_captions", [["A cat."], ["A dog."]]),
    ):
        assert build_captioned("held_out", {"_target_": f"rlstitch.picture_sets.{name}"} | coco, True)[1] == told
    bare = {"_target_": "rlstitch.pictures.images_from_folder", "path": str(tmp_path / "flickr30k"), "size": 4}
    assert build_captioned("held_out", bare, False)[1] == [[""]] * 3
    with pytest.raises(UserError, match="'held_out': .* gives 3 of 3 pictures without a caption, by which Recall@1"):
        build_captioned("held_out", bare, True)


def test_every_kind_of_set_may_be_a_file_at_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "dataset_file", lambda path, what: tmp_path / path.split("/", 3)[3])
    lay_out(tmp_path)
    there = "hub:datasets/someone/sets/"
    assert shades(pictures.pairs_from_file(there + "HPDv2/train.json", 4)[0][0]) == [80, 40]
    assert picture_sets.images_from_shards(there + "shards/00000.tar", 4)[1] == ["one"]
    assert picture_sets.images_with_captions(there + "dataset_flickr30k.json", str(tmp_path / "flickr30k"), 4)[1] == ["A cat.", "A dog."]
    assert len(picture_sets.graded_by_ava(there + "AVA.txt", str(tmp_path / "ava"), 4)[1]) == 2


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
