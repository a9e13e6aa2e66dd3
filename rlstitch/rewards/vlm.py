"""A vision-language model behind an OpenAI-compatible service (vLLM, SGLang, ...) as judge: a question about each picture, and a score by a stated rule from its answer.

VQAScore (arXiv:2404.01291) is `answer: yes`, GenEval 2's Soft-TIFA (arXiv:2512.16853) the same over the questions of a row, UnifiedReward (arXiv:2503.05236) three
patterns; recipes/reward/ has each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from rlstitch.ranges import Count, Text
from rlstitch.rewards import service
from rlstitch.rewards.service import AtOnce, Retries, Seconds, Service, Unanswered, Unread
from rlstitch.types import Batch, UserError

NUMBER = re.compile(r"[-+−]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
PLACE = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
TOP = 20  # of the most probable first tokens, as many as services give
LONGEST = 20_000  # characters of an answer that are read
NOT_SUPPORTED = (400, 404, 405, 501)  # what a service without /models says of it


class VlmJudge:
    """Asks `model` at `url` (up to /v1) `question`, in which {prompt} and {NAME} of any column of the row are put in; {{NAME}} stays as {NAME}. No gradient.

    answer: `number`: the first match of `pattern` (its group, if it has one; of several patterns the mean), by default the only number of the answer, within low..high.
    `yes`: the probability that the first token is yes in any case and spacing, from the logprobs; `yes_text`, for services without logprobs: 1 or 0 by how the text begins.
    questions: a column of the row with a list of questions, texts or [question, expected answer], each put into `question` at {question}; the score is their `mean`. An expected
    answer (one word; numbers in digits or words) stands in the place of yes. What stands before </think> is not read.
    options: further fields of the request, null takes one of ours out. temperature is 0, max_tokens by default 1 for `yes`, else 256. key_env, timeout, retries: rewards.service.Service.
    An answer that the rule does not read is NaN, never 0, and so is a picture one of whose questions has none.
    """

    differentiable = False
    device = "service"  # elsewhere: asked while the next rollout is made
    handling = service.HANDLING

    def __init__(
        self,
        url: Text,
        model: Text,
        question: Text,
        *,
        answer: Literal["number", "yes", "yes_text"] = "number",
        pattern: Text | list[Text] | None = None,
        low: float | None = None,
        high: float | None = None,
        questions: str = "",
        mean: Literal["arithmetic", "geometric"] = "arithmetic",
        max_tokens: Count | None = None,
        options: Mapping[str, Any] | None = None,
        key_env: str = "",
        timeout: Seconds = 60.0,
        retries: Retries = 5,
        concurrency: AtOnce = 16,
    ):
        self.question, self.answer, self.questions, self.mean = question, answer, questions, mean
        self.low, self.high = -math.inf if low is None else low, math.inf if high is None else high
        self.patterns = [re.compile(one) for one in ([pattern] if isinstance(pattern, str) else pattern or [])]
        asked = {"logprobs": True, "top_logprobs": TOP} if answer == "yes" else {}
        fields = (
            {"model": model, "temperature": 0, "max_tokens": max_tokens or (1 if answer == "yes" else 256)} | asked | dict(options or {})
        )
        self.fields = {k: v for k, v in fields.items() if v is not None}
        self.service = Service(url, key_env=key_env, timeout=timeout, retries=retries, concurrency=concurrency)
        try:
            self.service.ask("/models", retries=min(2, retries))
        except Unanswered as error:
            if error.status not in NOT_SUPPORTED:
                raise UserError(f"{url} does not answer: {error}. It must be an OpenAI-compatible address, up to /v1") from None

    @staticmethod
    def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
        """(key, why) of what is wrong with a recipe's judge, without asking anybody."""
        out, pattern = service.faults(options), options.get("pattern")
        for one in [pattern] if isinstance(pattern, str) else pattern or []:
            try:
                re.compile(one)
            except (re.error, RecursionError, OverflowError) as error:
                out.append(("pattern", f"is no regular expression: {error}"))
        if pattern is not None and options.get("answer", "number") != "number":
            out.append(("pattern", "is for answer: number alone"))
        if isinstance(pattern, list) and not pattern:
            out.append(("pattern", "must hold an expression, or be left out"))
        if None not in (low := options.get("low"), high := options.get("high")) and low > high:
            out.append(("low", f"is above high: {low:g} > {high:g}"))
        try:
            json.dumps(options.get("options"), allow_nan=False)
        except (TypeError, ValueError) as error:
            out.append(("options", f"must be what JSON can hold: {error}"))
        if options.get("questions") and "{question}" not in options["question"]:
            out.append(("question", "must say by {question} where those of `questions` are put in, e.g. '{question} Answer in one word.'"))
        return out

    @staticmethod
    def lacking(options: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """What the question asks for and none of these rows has, if so."""
        own = {"question", "answer"} if options.get("questions") else set()
        named = {match[2] for match in PLACE.finditer(options["question"]) if match[2]} - own | {options.get("questions") or "prompt"}
        there = dict.fromkeys(key for row in rows for key in row)
        if absent := sorted(named - {*there, "prompt"}):
            return f"asks for {' and '.join(map(repr, absent))}, and the prompt file has the columns {', '.join(map(repr, there))[:200]}"
        return ""

    @property
    def failure(self) -> str:
        """Why the last picture without a score has none."""
        return self.service.failure

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B], NaN where an answer failed or could not be read."""
        pictures = self.service.each([lambda i=i: service.png(images[i]) for i in range(len(images))])
        facts = batch.facts or [{}] * len(images)
        rows = [self._questions({**row, "prompt": prompt}) for row, prompt in zip(facts, batch.prompts)]
        calls: list[Callable[[], float]] = [
            lambda picture=picture, one=one: self._one(picture, *one)
            for picture, row in zip(pictures, rows)
            if not isinstance(row, Unanswered)
            for one in row
        ]
        answers, found = iter(self.service.each(calls)), []
        for row in rows:
            got = [row] if isinstance(row, Unanswered) else [next(answers) for _ in row]
            lost = [one for one in got if not isinstance(one, float)]
            found.append(lost[0] if lost else self._mean(got))
        return self.service.settle(found).to(images.device)

    def _questions(self, row: dict[str, Any]) -> list[tuple[str, str]] | Unanswered:
        """(question, expected answer) of a row; what it lacks is told as if nobody had answered."""
        try:
            if not self.questions:
                return [(filled(self.question, row), "yes")]
            listed = row.get(self.questions)
            if not isinstance(listed, list | tuple) or not listed:
                raise Unanswered(f"the row has no list of questions under '{self.questions}'; it has {', '.join(map(repr, row))[:200]}")
            return [(filled(self.question, {**row, "question": q, "answer": a}), a) for q, a in map(question_of, listed)]
        except Unanswered as error:
            return error

    def _one(self, picture: str, question: str, expected: str) -> float:
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}, {"type": "text", "text": question}]
        answer = self.service.ask("/chat/completions", self.fields | {"messages": [{"role": "user", "content": content}]})
        try:
            choice = answer["choices"][0]
            text, end = choice["message"].get("content"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Unanswered(f"its answer has no choices[0].message: {json.dumps(answer)[:100]}") from None
        if self.answer == "yes":
            return probability(choice, expected)
        if isinstance(text, list):  # in parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if not isinstance(text, str) or not text.strip():
            raise Unread(f"the answer holds no text (finish_reason {str(end)[:20]}): max_tokens may be too few")
        text = text[:LONGEST].rsplit("</think>", 1)[-1].strip()
        if text.startswith("<think>"):
            raise Unread("the answer ends while the model thinks: give more max_tokens, or have it not think (chat_template_kwargs)")
        return (
            begins(text, expected)
            if self.answer == "yes_text"
            else self._mean([self._number(text, one, cut=end == "length") for one in self.patterns or [None]])
        )

    def _number(self, text: str, pattern: re.Pattern[str] | None, cut: bool = False) -> float:
        """cut: the answer was ended by max_tokens, perhaps in the middle of a number."""
        if pattern is None:
            found = dict.fromkeys(NUMBER.findall(text))
            if len(found) != 1:
                raise Unread(
                    f"the answer {short(text)} holds {len(found) or 'no'} number{'s' * (len(found) > 1)}: say by `pattern` which is the score"
                )
            said = next(iter(found))
        else:
            match = pattern.search(text)
            if match is None:
                raise Unread(f"the answer {short(text)} does not match {short(pattern.pattern)}")
            said = match[1] if pattern.groups else match[0]
        if cut and said is not None and text.endswith(said):
            raise Unread(f"the answer {short(text)} is cut off at its number: give more max_tokens")
        try:
            value = float(str(said).replace("−", "-").strip().rstrip("."))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise Unread(f"{short(str(said))} is no number")
        if not self.low <= value <= self.high:
            raise Unread(f"the answer {short(text)} is {value:g}, outside {self.low:g}..{self.high:g}")
        return value

    def _mean(self, values: Sequence[float]) -> float:
        """Of finite numbers; the geometric one of what is not positive is 0."""
        if self.mean == "arithmetic":
            return math.fsum(values) / len(values)
        return math.exp(math.fsum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def filled(template: str, row: Mapping[str, Any]) -> str:
    """A template with {NAME} replaced by the row's value, once: what is put in is not looked at again. Raises Unanswered where the row has none."""

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return f"{{{match[1]}}}"
        if match[2] not in row:
            raise Unanswered(
                f"the question asks for {{{match[2]}}}, and the row has {', '.join(map(repr, row))[:200]}; {{{{{match[2]}}}}} is the word itself"
            )
        said = row[match[2]]
        return json.dumps(said, ensure_ascii=False) if isinstance(said, dict | list) else str(said)

    return PLACE.sub(value, template)


def question_of(entry: Any) -> tuple[str, str]:
    """(question, expected answer) of an entry of a row's list."""
    if isinstance(entry, dict):
        entry = [entry.get("question"), entry.get("answer", "yes")]
    question, answer = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (entry, "yes")
    if not isinstance(question, str) or not isinstance(answer, str | int) or len(str(answer).split()) != 1:
        raise Unanswered(f"a question is a text, or [text, the one word that is right], not {short(json.dumps(entry, default=str))}")
    return question, str(answer)


def forms(expected: str) -> set[str]:
    """A word in small letters; a number also in digits, or as a word."""
    word = expected.strip().lower()
    if word in WORDS:
        return {word, str(WORDS.index(word))}
    return {word, WORDS[int(word)]} if re.fullmatch(r"[0-9]{1,2}", word) and int(word) < len(WORDS) else {word}


def plain_token(token: str) -> str:
    """A token without the blanks before it, also as vocabularies write them, and in small letters."""
    return token.replace("Ġ", " ").replace("▁", " ").strip().lower()


def probability(choice: Any, expected: str) -> float:
    """That the first token is the expected word, summed over its forms among the most probable ones. Raises Unanswered without logprobs, and Unread where no token is of the word's
    kind: neither yes nor no, or no number where one is asked for."""
    try:
        first = choice["logprobs"]["content"][0]
        others = first.get("top_logprobs") or []
        listed = {str(one["token"]): float(one["logprob"]) for one in [first, *others]}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise Unanswered("it gives no logprobs of the first token: start it with them, or take answer: yes_text") from None
    if not all(logprob < 1e-3 for logprob in listed.values()):
        raise Unanswered(f"its logprobs are none: {short(str(listed))}")
    right = forms(expected)
    if not others and plain_token(str(first["token"])) not in right:
        raise Unread("it gives the probability of the first token alone (no top_logprobs), which is another one: take answer: yes_text")
    kind = {"yes", "no"} if right & {"yes", "no"} else {*WORDS, *map(str, range(len(WORDS)))} if right & {*WORDS} else right
    read = {token: logprob for token, logprob in listed.items() if plain_token(token) in kind}
    if not read:
        best = max(listed, key=lambda token: listed[token])
        raise Unread(
            f"none of the first tokens is {' or '.join(sorted(right))}, or another answer of its kind; the likeliest is {short(best)}"
        )
    return min(1.0, math.fsum(math.exp(min(0.0, logprob)) for token, logprob in read.items() if plain_token(token) in right))


def begins(text: str, expected: str) -> float:
    """1 where a text begins with the expected word, 0 where it begins with another one of its kind. Raises Unread where it begins otherwise."""
    word, right = (re.findall(r"\w+", text.lower()) or [""])[0], forms(expected)
    if word in right:
        return 1.0
    if word == "no" or word == "yes" or (right & {*WORDS} and (word in WORDS or word.isdigit())):
        return 0.0
    raise Unread(f"the answer {short(text)} begins with neither {' nor '.join(sorted(right))} nor another answer of its kind")


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
