"""The `shapes` detector and pixel looks as rewards: black boxes that read pictures, the world's held-out judges."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlstitch.figures import exact
from rlstitch.shapes import detector
from rlstitch.shapes.prompts import Prompt
from rlstitch.types import Batch, UserError


class DetectorReward:
    """1 where the picture shows what the prompt asks for, else 0 (GenEval's rule); `soft`: the share of requirements met. No gradient."""

    differentiable = False

    def __init__(self, *, soft: bool = False):
        self.soft = soft

    @staticmethod
    def unreadable(rows: list[dict[str, Any]]) -> str:
        """Why these prompts cannot be judged, if so."""
        try:
            for row in rows:
                Prompt.from_json(row)
        except UserError as error:
            return f"needs prompts that say what is to be seen (a .jsonl of the shapes world): {error}"
        return ""

    @exact
    def score(self, images: Tensor, batch: Batch) -> Tensor:
        judge = detector.soft_scores if self.soft else detector.correct
        return judge(images, [Prompt.from_json(row) for row in batch.facts]).float().to(images.device)

    def breakdown(self, scores: Tensor, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Accuracy of each class and their mean as `overall`."""
        return detector.summary(scores, [Prompt.from_json(row) for row in rows])
