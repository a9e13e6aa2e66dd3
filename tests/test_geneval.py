"""GenEval's rules by hand-made objects, the detector's pictures of instances by plain loops, and the whole reward on a small random Mask2Former."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from rlstitch.prompts import read_prompts
from rlstitch.rewards.geneval import COLOURS, Found, GenEval, Mask2Former, relations, unmet
from rlstitch.types import Batch


def at(x, y, side=10, confidence=0.9):
    return Found((x, y, x + side, y + side), confidence)


def test_relations_are_the_suites():
    assert relations(at(0, 0), at(50, 0)) == {"left of"} and relations(at(50, 0), at(0, 0)) == {"right of"}
    assert relations(at(0, 0), at(0, 50)) == {"above"} and relations(at(0, 50), at(0, 0)) == {"below"}
    assert relations(at(0, 0), at(50, 50)) == {"left of", "above"}
    assert relations(at(0, 0), at(2, 0)) == set()  # closer than a tenth of both sides
    # offset (-10, -40), less .1 of 10 + 10 in each: (-8, -38) over a distance of 41.2
    assert relations(at(0, 0), at(10, 40)) == {"above"}


@pytest.mark.parametrize(
    ("row", "objects", "correct"),
    [
        ({"include": [{"class": "bench", "count": 1}]}, {"bench": [at(0, 0)]}, True),
        ({"include": [{"class": "bench", "count": 1}]}, {}, False),
        ({"include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}]}, {"cow": [at(0, 0)] * 2}, True),
        ({"include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}]}, {"cow": [at(0, 0)] * 3}, False),
        ({"include": [{"class": "cow", "count": 1, "color": "red"}]}, {"cow": [at(0, 0)]}, True),
        ({"include": [{"class": "cow", "count": 1, "color": "blue"}]}, {"cow": [at(0, 0)]}, False),
        ({"include": [{"class": "cow", "count": 1, "color": "blue"}]}, {"cow": [at(0, 0), at(9, 9)]}, False),  # the most confident one alone
        ({"include": [{"class": "dog", "count": 1}, {"class": "cow", "count": 1, "position": ["left of", 0]}]}, {"dog": [at(50, 0)], "cow": [at(0, 0)]}, True),
        ({"include": [{"class": "dog", "count": 1}, {"class": "cow", "count": 1, "position": ["above", 0]}]}, {"dog": [at(50, 0)], "cow": [at(0, 0)]}, False),
        ({"include": [{"class": "dog", "count": 2}, {"class": "cow", "count": 1, "position": ["left of", 0]}]}, {"dog": [at(50, 0)], "cow": [at(0, 0)]}, False),
    ],
)  # fmt: skip
def test_a_picture_is_correct_where_all_that_its_row_asks_for_is_there(row, objects, correct):
    assert (not unmet(objects, row, lambda found, name: ["red"] * len(found))) == correct


def test_instances_are_put_together_as_for_the_suite():
    generator = torch.Generator().manual_seed(0)
    classes, masks = 3 * torch.randn(6, 4, generator=generator), 4 * torch.randn(6, 9, 7, generator=generator)
    masks[3] = -1.0  # shows nothing
    found = Mask2Former.put_together(None, classes, masks, {"cat": 0, "dog": 2}, best=10)
    share = classes.softmax(-1)
    pairs = sorted(((float(share[q, c]), q, c) for q in range(6) for c in range(3)), reverse=True)[:10]
    for name, place in (("cat", 0), ("dog", 2)):
        wanted = []
        for score, q, c in pairs:
            inside = [(y, x) for y in range(9) for x in range(7) if masks[q, y, x] > 0]
            if c == place and inside:
                sure = sum(float(masks[q, y, x].sigmoid()) for y, x in inside) / len(inside)
                ys, xs = [y for y, _ in inside], [x for _, x in inside]
                wanted.append((score * sure, (min(xs), min(ys), max(xs) + 1, max(ys) + 1)))
        wanted.sort(reverse=True)
        assert [f.box for f in found[name]] == [box for _, box in wanted]
        assert [f.confidence for f in found[name]] == pytest.approx([c for c, _ in wanted], abs=1e-5)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=2, dim_feedforward=16, num_attention_heads=2, num_queries=5, id2label={0: "cat", 1: "dog", 2: "mouse"},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 64}).save_pretrained(folder)
    return str(folder)


def test_the_reward_on_pictures_that_are_no_squares(detector, clip_dir):
    reward = GenEval(detector, clip=str(clip_dir), threshold=0.0, counting_threshold=1.0)
    images = torch.rand(3, 3, 48, 24, generator=torch.Generator().manual_seed(0))
    rows = [
        {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]},
        {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 1}]},  # none is as sure as that
        {"prompt": "a red mouse", "tag": "colors", "include": [{"class": "computer mouse", "count": 1, "color": "red"}]},
    ]
    batch = Batch([r["prompt"] for r in rows], torch.arange(3), torch.arange(3), rows)
    scores = reward.score(images, batch)
    assert scores.tolist()[:2] == [1.0, 0.0]
    one_by_one = [
        float(reward.score(images[k : k + 1], Batch([rows[k]["prompt"]], torch.zeros(1), torch.zeros(1), [rows[k]]))) for k in range(3)
    ]
    assert scores.tolist() == one_by_one
    seen = reward.detector(Image.new("RGB", (24, 48)), ["cat"])["cat"]
    assert all(0 <= f.box[0] < f.box[2] <= 24 and 0 <= f.box[1] < f.box[3] <= 48 and f.mask.shape == (48, 24) for f in seen) and seen
    assert reward.breakdown(torch.tensor([1.0, 0.0, 0.0, 1.0]), [*rows, rows[0]]) == pytest.approx(
        {"overall": 1 / 3, "single_object": 1.0, "counting": 0.0, "colors": 0.0}
    )


def test_colours_are_asked_of_the_object_alone(detector, clip_dir):
    """CLIP is shown the object on grey, cut to its box."""
    reward, shown = GenEval(detector, clip=str(clip_dir)), []
    told = {colour: k for k, colour in enumerate(COLOURS)}
    reward.clip.embed_texts = lambda prompts: torch.eye(10)[[told[next(c for c in COLOURS if c in prompts[0])]] * len(prompts)]
    reward.clip.encode = lambda pixels: (shown.append(pixels), (torch.eye(10)[:1],))[1]
    picture = Image.new("RGB", (20, 20), "blue")
    ImageDraw.Draw(picture).rectangle((4, 6, 9, 13), fill="red")
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[6:14, 4:8] = True
    assert reward.colours(picture, [Found((4.0, 6.0, 10.0, 14.0), 1.0, mask)], "cat") == ["red"]
    assert shown[0].shape == (1, 3, 8, 6) and torch.equal((shown[0][0, :, 0, 0] * 255).round(), torch.tensor([255.0, 0, 0]))
    assert torch.equal((shown[0][0, :, 0, 5] * 255).round(), torch.tensor([153.0, 153, 153]))


def test_rows_as_tables_have_them(detector, clip_dir):
    """A parquet file gives every object every key, and every row every column."""
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    rows = [
        {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]},
        {"prompt": "red", "tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "exclude": [{"class": "mouse", "count": 9}]},
    ]  # fmt: skip
    folder = Path(detector)
    parquet.write_table(Table.from_pylist(rows, Table.from_pylist(rows[::-1]).schema), folder / "rows.parquet")
    found = read_prompts(str(folder / "rows.parquet"))
    assert found.rows[0]["include"][0]["color"] is None and found.rows[0]["exclude"] is None and not GenEval.unreadable(found.rows)
    reward, images = GenEval(detector, clip=str(clip_dir), threshold=0.0), torch.rand(2, 3, 32, 32)
    scores = [reward.score(images, Batch(found.prompts, torch.zeros(2), torch.zeros(2), own)) for own in (found.rows, rows)]
    assert torch.equal(*scores)
    assert GenEval.lacking({"path": detector}, rows) == ""
    rows[1]["exclude"][0]["class"] = "dragon"
    assert "is asked for dragon, and its detector knows" in GenEval.lacking({"path": detector}, rows)
    assert not GenEval.lacking({"path": detector, "detector": "grounding_dino"}, rows)


def test_rows_that_say_nothing_are_told():
    sound = json.loads(
        '{"prompt": "p", "tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}'
    )
    assert GenEval.unreadable([sound]) == ""
    assert "evaluation_metadata.jsonl" in GenEval.unreadable([sound, {"prompt": "a cat"}])
    sound["include"][1]["position"] = ["left of", 1]
    assert "cannot read the position ['left of', 1]" in GenEval.unreadable([sound])
    assert "asks for 'mauve'" in GenEval.unreadable([{"prompt": "p", "include": [{"class": "cat", "count": 1, "color": "mauve"}]}])
    assert "include: [{class" in GenEval.unreadable(
        [{"prompt": "p", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat"}]}]
    )
    assert "asks for none under include" in GenEval.unreadable([{"prompt": "p", "include": []}])
