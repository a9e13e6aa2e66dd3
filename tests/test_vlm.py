"""A vision-language model as judge: what it is asked, how its answers are read by each rule, and what is no answer."""

import base64
import inspect
import io
import math

import pytest
import torch
from PIL import Image

from benchmarks import judge_over_http
from rlstitch.asking import PartError, ask
from rlstitch.config import RECIPES, build, compose
from rlstitch.contract import broken, contract
from rlstitch.part_checks import reward_faults, unread
from rlstitch.prompts import PromptSet, read_prompts
from rlstitch.protocols import load_class
from rlstitch.rewards import service, vlm
from rlstitch.rewards.vlm import VlmJudge
from rlstitch.shapes.prompts import Prompt, scenes_for
from rlstitch.shapes.reward import DetectorReward
from rlstitch.shapes.scenes import render
from rlstitch.types import Batch, UserError
from tests.services import running, serving
from tests.test_walk import VALUES

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255

PROMPTS = PromptSet(["a star"], [{"prompt": "a star", "kind": "one"}])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(service, "PAUSE", 0.005)


def said(text, **more):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | more]}


def first(**tokens):
    """An answer whose first token is one of these, by probability."""
    listed = [{"token": token.replace("_", " "), "logprob": math.log(p), "bytes": None} for token, p in tokens.items()]
    return said("...", logprobs={"content": [listed[0] | {"top_logprobs": listed}]})


def judge(asked, question="How well does it show {prompt}?", **more):
    return VlmJudge(f"{asked.url}/v1", "m", question, retries=1, timeout=2, **more)


def batch_of(facts=({}, {})):
    index = torch.arange(2)
    return Batch(["a {model} star", "two"], index, index, [{"prompt": "-", **row} for row in facts])


def one_by_one(asked, reader, answers):
    """Scores of the first picture by the answers, one after the other, and why those without one have none."""
    found = []
    for answer in answers:
        asked.reply = lambda path, body, turn: answer
        score = reader.score(IMAGES[:1], batch_of()[:1]).item()
        found.append(reader.failure.split(": ", 1)[-1] if math.isnan(score) else score)
    return found


def test_what_is_asked_is_the_question_of_the_row_and_the_picture_itself(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k-77")
    with serving(lambda path, body, turn: said("7")) as asked:
        reader = judge(
            asked,
            'Rate {prompt} of {kind}, {tags}, as {"score": 1} or {{kind}}',
            key_env="JUDGE_KEY",
            options={"seed": 3, "temperature": None},
            concurrency=1,
        )
        scores = ask("judge", reader, IMAGES, batch_of(({"kind": "one", "tags": ["a", "ä"]}, {"kind": 2, "tags": None})))
        assert scores.tolist() == [7.0, 7.0] and asked.paths() == ["/v1/models", "/v1/chat/completions", "/v1/chat/completions"]
        assert all(headers["Authorization"] == "Bearer k-77" for _, headers, _ in asked.requests)
        body = asked.requests[1][2]
    content = body.pop("messages")[0]["content"]
    assert body == {"model": "m", "max_tokens": 256, "seed": 3}
    assert content[1]["text"] == 'Rate a {model} star of one, ["a", "ä"], as {"score": 1} or {kind}'
    kind, data = content[0]["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    pixels = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(data))).tobytes())).reshape(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(pixels.float() / 255, IMAGES[0]) or torch.equal(pixels.float() / 255, IMAGES[1])


def test_numbers_are_read_by_the_stated_rule_or_not_at_all():
    with serving(lambda path, body, turn: {}) as asked:
        answers = [
            "4",
            " Score: 4.5.",
            "<think>1 or 2?</think>\n3",
            "-2",
            "I cannot say.",
            "8/10",
            "4,5",
            "11",
            "",
            None,
            [{"type": "text", "text": "5"}],
            "4 and 4",
            "１",
        ]
        found = one_by_one(asked, judge(asked, low=1, high=10), map(said, answers))
        assert found[:3] == [4.0, 4.5, 3.0] and found[10:] == [5.0, 4.0, 1.0]
        for answer, why in zip(
            found[3:10],
            ("-2, outside 1..10", "no number:", "holds 2 numbers", "holds 2 numbers", "11, outside", "no text", "no text"),
            strict=True,
        ):
            assert why in answer
        ended = [
            said("8\nIt shows", finish_reason="length"),
            said("I give 1", finish_reason="length"),
            said("<think>so 7", finish_reason="length"),
        ]
        found = one_by_one(asked, judge(asked), ended)
        assert (
            found[0] == 8.0 and "is cut off at its number: give more max_tokens" in found[1] and "ends while the model thinks" in found[2]
        )
        found = one_by_one(asked, judge(asked, pattern=r"(\d+)\s*/\s*10"), map(said, ("8 / 10, not 3/10", "8", "９/10")))
        assert found[0] == 8.0 and "does not match" in found[1] and found[2] == 9.0
        found = one_by_one(asked, judge(asked, pattern=r"is (\w+)"), map(said, ("it is nan", "it is bad", "it is inf")))
        assert all("outside" in why or "no number" in why for why in found)
        two = judge(asked, pattern=[r"A: *([\d.]+)", r"B: *([\d.]+)"], low=1, high=5, mean="geometric")
        found = one_by_one(asked, two, map(said, ("A: 1\nB: 4.", "A: 1", "A: 1 B: 9")))
        assert found[0] == pytest.approx(2.0) and "does not match" in found[1] and "outside" in found[2]


def test_yes_is_a_probability_over_case_and_space_and_neither_is_no_answer():
    with serving(lambda path, body, turn: {}) as asked:
        cases = [
            first(Yes=0.5, _yes=0.2, No=0.1, ĠYES=0.1, Yesterday=0.05), first(No=0.9, no=0.1), first(The=0.6, Sure=0.4), said("Yes"), first(Yes=0.7, yes=0.7),
            said("Yes", logprobs={"content": []}), said("Yes", logprobs={"content": [{"token": "Yes", "logprob": math.nan}]}), {"choices": []}, {"error": "busy"},
            said("yes", logprobs={"content": [{"token": "yes", "logprob": -0.5}]}), said("Yes", logprobs={"content": [{"token": "Yes", "logprob": "x"}]}),
            said("Yes", logprobs={"content": [{"token": "Yes", "logprob": 0.98}]}), said("No", logprobs={"content": [{"token": "No", "logprob": -0.6}]}),
        ]  # fmt: skip
        found = one_by_one(asked, judge(asked, answer="yes"), cases)
        assert asked.requests[-1][2] | {"messages": 0} == {
            "model": "m",
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            "messages": 0,
        }
        assert found[0] == pytest.approx(0.8) and found[1] == 0.0 and "the likeliest is 'The'" in found[2] and "no logprobs" in found[3]
        assert (
            found[4] == 1.0
            and "no logprobs" in found[5]
            and "logprobs are none" in found[6]
            and "no choices" in found[7] + found[8]
            and "no choices" in found[8]
        )
        assert found[9] == pytest.approx(math.exp(-0.5)) and "no logprobs" in found[10] and "logprobs are none" in found[11]
        assert "(no top_logprobs), which is another one" in found[12]  # yes may have .4, or nothing
        found = one_by_one(asked, judge(asked, answer="yes_text"), map(said, ("Yes, it does.", "**No**", "Maybe", "YES", "Nothing")))
        assert found[0] == found[3] == 1.0 and found[1] == 0.0 and "begins with neither" in found[2] and "begins with neither" in found[4]


def test_questions_of_a_row_are_averaged_and_one_without_an_answer_leaves_the_picture_without_a_score():
    listed = [["How many stars?", "four"], "Are they red?", {"question": "Is there a dog?", "answer": "No"}]
    answers = {
        "How many stars? One word.": first(**{"4": 0.5, "four": 0.3, "five": 0.1}),
        "Are they red? One word.": first(Yes=0.5, No=0.5),
        "Is there a dog? One word.": first(no=0.2, yes=0.8),
    }
    with serving(lambda path, body, turn: answers[body["messages"][0]["content"][1]["text"]] if body else {}) as asked:
        told = {"question": "{question} One word.", "answer": "yes", "questions": "list"}
        facts = ({"list": listed}, {"list": []})
        for mean, expected in (("arithmetic", 0.5), ("geometric", (0.8 * 0.5 * 0.2) ** (1 / 3))):
            reader = judge(asked, mean=mean, **told)
            scores = reader.score(IMAGES, batch_of(facts))
            assert (
                scores[0] == pytest.approx(expected)
                and math.isnan(scores[1])
                and "no list of questions under 'list'; it has 'prompt', 'list'" in reader.failure
            )
        answers["How many stars? One word."] = first(There=1.0)
        assert reader.score(IMAGES[:1], batch_of(facts)[:1]).isnan().all() and "none of the first tokens is 4 or four" in reader.failure
        answers["How many stars? One word."] = first(six=1.0)
        assert reader.score(IMAGES[:1], batch_of(facts)[:1]).item() == 0.0
        for odd in ([["a", "light blue"]], [3], [["a", "b", "c"]], "text"):
            assert reader.score(IMAGES[:1], batch_of(({"list": odd}, {}))[:1]).isnan().all() and (
                "the one word that is right" in reader.failure or "no list" in reader.failure
            )
        with pytest.raises(PartError, match="reward 'judge': .*no list of questions under 'vqa'; it has 'prompt', 'list'"):
            ask("judge", judge(asked, **told | {"questions": "vqa"}), IMAGES, batch_of(facts))
        with pytest.raises(UserError, match="the question asks for {colour}, and the row has 'prompt'; {{colour}} is"):
            judge(asked, "Is it {colour}?").score(IMAGES, batch_of())


def test_a_judge_that_is_busy_is_asked_again_and_one_that_is_none_is_told_at_the_start():
    def busy(path, body, turn):
        return (429, {"error": {"message": "rate limit"}}, {"Retry-After": "0"}) if turn % 2 else said("5")

    with serving(busy) as asked:
        assert judge(asked, concurrency=1).score(IMAGES, batch_of()).tolist() == [5.0, 5.0]
        asked.reply = lambda path, body, turn: (
            404,
            {"error": {"message": "The model `m` does not exist."}},
            {},
        )  # as for a service that has no /models
        with pytest.raises(UserError, match="/v1: status 404: The model `m` does not exist."):
            judge(asked).score(IMAGES, batch_of())
        asked.reply = lambda path, body, turn: (200, b"<html>", {})
        with pytest.raises(
            UserError, match="does not answer: it answers with a web page.*It must be an OpenAI-compatible address, up to /v1"
        ):
            judge(asked)
    for options, key, why in (
        ({"pattern": "("}, "pattern", "no regular expression"), ({"pattern": "x", "answer": "yes"}, "pattern", "alone"), ({"pattern": []}, "pattern", "must hold"),
        ({"low": 3, "high": 1}, "low", "above high: 3 > 1"), ({"questions": "list"}, "question", "must say by {question}"), ({"url": "vllm"}, "url", "must be an address"),
        ({"options": {"x": math.nan}}, "options", "JSON"), ({"options": {"day": object()}}, "options", "JSON"),
    ):  # fmt: skip
        ((found, told),) = VlmJudge.faults({"url": "http://127.0.0.1:1/v1", "question": "?", **options})
        assert found == key and why in told


def test_shipped_judges_are_sound_and_read_what_their_models_say():
    said_by = {
        "vlm_judge": (said("7"), 7.0), "vqascore": (first(Yes=0.25, No=0.75), 0.25), "geneval2": (first(Yes=0.25, No=0.75), 0.25),
        "unified_reward": (said("Alignment Score (1-5): 4.0\nCoherence Score (1-5): 3\nStyle Score (1-5): 2."), 3.0),
    }  # fmt: skip
    facts = ({"vqa_list": [["Are the bicycles white?", "Yes"]] * 2}, {})
    with serving(lambda path, body, turn: {}) as asked:
        for name, (answer, expected) in said_by.items():
            ((key, node),) = compose(f"reward/{name}")["rewards"].items()
            assert not reward_faults(f"rewards.{key}", node)
            asked.reply = lambda path, body, turn: answer
            reader = build(node | {"url": asked.url}, kind="reward")
            assert reader.score(IMAGES[:1], batch_of(facts)[:1]).item() == pytest.approx(expected), name
    assert not reward_faults("rewards.served", compose("reward/http")["rewards"]["served"])
    assert all("127.0.0.1" in (RECIPES / "reward" / f"{name}.yaml").read_text() for name in (*said_by, "http"))
    assert vlm.forms("Twelve") == {"twelve", "12"} and vlm.forms("3") == {"3", "three"} and vlm.forms("99") == {"99"}


@pytest.mark.parametrize("name", ["vlm_judge", "geneval2", "http", "ocr", "jpeg", "sharpness"])
def test_no_value_of_any_key_of_a_shipped_reward_ends_in_anything_but_its_name(name):
    ((key, node),) = compose(f"reward/{name}")["rewards"].items()
    for argument in inspect.signature(load_class(node["_target_"])).parameters:
        for value in VALUES:
            faults = reward_faults("r", node | {argument: value}) + unread(
                "judges", ["r"], {"r": node | {argument: value}}, PROMPTS, "choose others"
            )
            assert all(argument in fault or fault.startswith("'judges' names 'r', which ") for fault in faults), (argument, value, faults)


def test_the_detector_behind_http_is_the_detector_and_keeps_the_contract():
    """As benchmarks/judge_over_http.py has it: the share of a prompt's requirements, through the protocol and back."""
    rows = read_prompts("shapes:held_out.jsonl").rows[:3]
    images, prompts = (
        render(scenes_for([Prompt.from_json(row) for row in rows], seed=0), 64).mul(255).round() / 255,
        [row["prompt"] for row in rows],
    )
    judge = judge_over_http.Judge()
    with running(judge.server) as url:
        reader = build(judge_over_http.node(f"{url}/v1"), kind="reward")
        assert not broken(clauses := contract("judge", reader, images, prompts, rows)), clauses
        judge.calls, batch = 0, Batch(prompts, torch.arange(3), torch.arange(3), rows)
        torch.testing.assert_close(reader.score(images, batch), DetectorReward(soft=True).score(images, batch), atol=1e-6, rtol=0)
    assert judge.calls == 3
