"""Text in pictures: what a reader (RapidOCR, whose models come in its wheel) reads, against the text that the prompt asks for. The score is that of Flow-GRPO (arXiv:2505.05470)."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from typing import Any

import torch
from torch import Tensor

from rlstitch.metrics import to_image
from rlstitch.ranges import Share, Threads
from rlstitch.types import Batch, UserError

NEEDS = ("rapidocr", "onnxruntime", "rapidfuzz")
INSTALL = 'pip install "rlstitch[ocr]" (or: pip install rapidocr onnxruntime rapidfuzz)'
QUOTES = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|‘([^’]+)’')
SINGLE = re.compile(r"(?<!\w)'(.+?)'(?!\w)")  # no apostrophe


class OcrReward:
    """1 where the picture holds the text, else 1 - distance / length, not below 0: Levenshtein's distance of all that is read, in reading order, to the text; case and blanks do not
    count. Several texts: their mean. No gradient.

    column: of the row, a text or a list of texts; by default what stands between quotes in the prompt. A row without one has no score (NaN). confidence: below which the
    reader's lines are left out. threads: of the reader, 0 for torch's number.
    """

    differentiable = False
    device = torch.device("cpu")  # asked while the next rollout is made, where that is on a GPU
    handling = ("threads",)
    alone = "pictures without a background, or text and nothing else"
    failure = ""

    def __init__(self, *, column: str = "", confidence: Share = 0.5, threads: Threads = 0):
        try:
            from rapidfuzz.distance import Levenshtein
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(f"the OCR reward cannot be loaded ({error}): {INSTALL}") from error
        count, engine = threads or torch.get_num_threads(), "EngineConfig.onnxruntime."
        settings = {"Global.log_level": "critical", "Global.text_score": confidence}
        self.reader = RapidOCR(params=settings | {f"{engine}intra_op_num_threads": count, f"{engine}inter_op_num_threads": 1})
        self.column, self.distance = column, Levenshtein.distance

    @staticmethod
    def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
        """(key, why) of the libraries that are not there."""
        lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        return (
            [("_target_", f"needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed: {INSTALL}")]
            if lacking
            else []
        )

    @staticmethod
    def lacking(options: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """Why none of these rows says what is to be read, if so."""
        column = options.get("column", "")
        if any(wanted(row, column) for row in rows):
            return ""
        if not column:
            return f'needs text between quotes, as in: a sign that says "OPEN", and none of {len(rows)} prompts has any (or name a column)'
        return f"needs a text under '{column}', and none of {len(rows)} rows has one; they have {', '.join(dict.fromkeys(key for row in rows for key in row))[:200]}"

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B] in [0, 1]; NaN where nothing is asked for."""
        rows = batch.facts or [{} for _ in batch.prompts]
        texts = [wanted({**row, "prompt": prompt}, self.column) for row, prompt in zip(rows, batch.prompts)]
        if not all(texts):
            self.failure = f"the row has no text under '{self.column}'" if self.column else "the prompt has no text between quotes"
        scores = [self._score(image, text) if text else torch.nan for image, text in zip(images, texts)]
        return torch.tensor(scores, device=images.device)

    def _score(self, image: Tensor, texts: list[str]) -> float:
        read = plain("".join(self.read(image)))
        found = [1.0 if plain(text) in read else max(0.0, 1 - self.distance(read, plain(text)) / len(plain(text))) for text in texts]
        return sum(found) / len(found)

    def read(self, image: Tensor) -> list[str]:
        """The lines of text in a picture [3, H, W] in [0, 1]."""
        return list(self.reader(to_image(image.detach().float())).txts or ())


def wanted(row: dict[str, Any], column: str) -> list[str]:
    """The texts that a row's picture is to show."""
    if column:
        said = row.get(column)
        return [text for text in (said if isinstance(said, list | tuple) else [said]) if isinstance(text, str) and plain(text)]
    found = QUOTES.findall(row["prompt"]) or [(text,) for text in SINGLE.findall(row["prompt"])]
    return [text for groups in found for text in groups if plain(text)]


def plain(text: str) -> str:
    """Without blanks, in small letters, wide and joined letters as plain ones."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
