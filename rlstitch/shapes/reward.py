"""The `shapes` detector and pixel looks as rewards: black boxes that read pictures, the world's held-out judges."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlstitch.shapes import detector
from rlstitch.shapes.prompts import Prompt
from rlstitch.types import Batch, UserError


def _prompts(rows: list[dict[str, Any]]) -> list[Prompt]:
    try:
        return [Prompt.from_json(row) for row in rows]
    except KeyError as error:
        raise UserError(
            f"the detector needs prompts with facts (a .jsonl of the shapes world); a row lacks {error}: leave the detector out for free text"
        ) from error


class DetectorReward:
    """1 where the picture shows what the prompt asks for, else 0 (GenEval's rule); `soft`: the share of requirements met. No gradient."""

    differentiable = False

    def __init__(self, *, soft: bool = False):
        self.soft = soft

    @staticmethod
    def unreadable(rows: list[dict[str, Any]]) -> str:
        """Why these prompts cannot be judged, if so."""
        without = [row["prompt"] for row in rows if "objects" not in row]
        return f"needs prompts that say what is to be seen (a .jsonl of the shapes world), unlike '{without[0]}'" if without else ""

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        judge = detector.soft_scores if self.soft else detector.correct
        return judge(images, _prompts(batch.facts)).float().to(images.device)

    def breakdown(self, scores: Tensor, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Accuracy of each class and their mean as `overall`."""
        return detector.summary(scores, _prompts(rows))
