"""The OCR reward on text drawn with Pillow, read for real; what is asked for, and what is told before anything loads."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rlstitch import describe
from rlstitch.checks import checked
from rlstitch.config import compose
from rlstitch.contract import broken, contract
from rlstitch.data import read_prompts
from rlstitch.part_checks import judge_faults, reward_faults
from rlstitch.rewards import ocr
from rlstitch.types import Batch, UserError


def drawn(text, size=(160, 160)):
    image = Image.new("RGB", size, (250, 245, 230))
    ImageDraw.Draw(image).text((8, 60), text, fill=(20, 20, 60), font=ImageFont.load_default(32))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_text_that_is_drawn_is_read_and_scored(capfd):
    """rapidocr itself: the text, another one, one letter off, none, several, a blank picture; none of it is said on the screen."""
    for name in ocr.NEEDS:
        pytest.importorskip(name, reason=f"{name} is not installed: {ocr.INSTALL}")
    reward, known = ocr.OcrReward(threads=1), {}
    read = reward.read
    reward.read = lambda image: (
        known[float(image.sum())] if float(image.sum()) in known else known.setdefault(float(image.sum()), read(image))
    )  # once each
    images = torch.stack([drawn("Open late")] * 6 + [drawn("")])
    prompts = [
        'a sign "open LATE"',
        'a sign "Open lane"',
        'a sign "12345"',
        "a sign",
        "‘open’ and ‘closed’",
        "it's a sign, 'open'",
        '"OPEN"',
    ]
    before = images.clone()
    found = reward.score(images, Batch(prompts, torch.arange(7), torch.arange(7)))
    expected = torch.tensor([1.0, 1 - 1 / 8, 0.0, math.nan, 0.5, 1.0, 0.0])
    closed = (1 + max(0.0, 1 - reward.distance("openlate", "closed") / 6)) / 2  # a text beside one that is there
    expected[4] = closed
    torch.testing.assert_close(found, expected, equal_nan=True)
    clauses = contract("ocr", reward, images[-2:], ['a sign "Open"', 'a "wall"'])
    assert not broken(clauses), clauses
    assert torch.equal(images, before) and reward.failure == "the prompt has no text between quotes" and capfd.readouterr() == ("", "")


def test_what_is_to_be_read():
    for prompt, texts in {
        'a sign "Open" and a board "Menu 1"': ["Open", "Menu 1"], "the dogs' bone and the cats' toy": [], "a shirt that says 'it's fine'": ["it's fine"], "say “Grüß Gott”": ["Grüß Gott"],
        "„Halt“": ["Halt"], "«Stop»": ["Stop"], "「営業中」": ["営業中"], 'an empty "  " sign': [], "no 'single' beside \"double\"": ["double"], "": [],
    }.items():  # fmt: skip
        assert ocr.wanted({"prompt": prompt}, "") == texts, prompt
    assert (
        ocr.wanted({"prompt": '"no"', "text": ["a", 3, " ", "b"]}, "text") == ["a", "b"]
        and ocr.wanted({"prompt": '"no"', "text": None}, "text") == []
    )
    assert ocr.plain(" ＯＰＥＮ ﬁne\nStraße ") == "openfinestrasse"


def test_a_run_is_told_what_its_prompts_lack_and_that_nothing_else_is_trained_on(monkeypatch, tmp_path):
    prompts = read_prompts("shapes:held_out.jsonl")
    node = compose("reward/ocr")["rewards"]["ocr"]
    (fault,) = judge_faults("judges", ["ocr"], {"ocr": node}, prompts)
    assert fault.startswith("'judges' names 'ocr', which needs text between quotes, as in: a sign") and "none of 344 prompts" in fault
    (fault,) = judge_faults("judges", ["ocr"], {"ocr": node | {"column": "txt"}}, prompts)
    assert "needs a text under 'txt', and none of 344 rows has one; they have prompt, kind, objects, relation" in fault
    assert not judge_faults("judges", ["ocr"], {"ocr": node | {"column": "kind"}}, prompts)
    judge = compose("reward/geneval2")["rewards"]["geneval2"]
    judge |= {"question": "{question} {colour} {kind}"}
    for names, remedy in (
        (["g"], "take a file of prompts that it reads, or another reward"),
        (["g", "clip"], "leave it out, e.g. judges=[clip]"),
    ):
        (fault,) = judge_faults("judges", names, {"g": judge, "clip": compose("draft_stitch")["rewards"]["clip"]}, prompts)
        assert (
            f"which asks for 'colour' and 'vqa_list', and the prompt file has the columns 'prompt', 'kind', 'objects', 'relation': {remedy}"
            in fault
        )
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None if name != "onnxruntime" else 1)
    assert reward_faults("rewards.ocr", node) == [
        f"'rewards.ocr._target_': needs rapidocr and rapidfuzz, which are not installed: {ocr.INSTALL}"
    ]
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz.distance", None)
    with pytest.raises(UserError, match=r"the OCR reward cannot be loaded .*: pip install \"rlstitch\[ocr\]\""):
        ocr.OcrReward()
    darkness = compose("nft")
    darkness["rewards"] |= compose("reward/darkness")["rewards"]
    for weights, warned in (({"darkness": 1.0, "clip": 0.0}, True), ({"darkness": 1.0, "clip": 1.0}, False)):
        given = darkness | {"oracle": {"_target_": "rlstitch.oracles.Terminal", "weights": weights}}
        lines = [
            line
            for line in describe.goals(checked(given, "nft"))
            if "nothing but darkness is trained on" in line and "black pictures" in line
        ]
        assert len(lines) == warned
