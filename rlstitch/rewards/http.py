"""A reward that lives elsewhere, in an environment or on a machine of its own: pictures as PNG and JSON out, one number a picture back (contract below).

    GET  url/health -> {"contract": 1, "reward": NAME}
    POST url/score     {"contract": 1, "pictures": [{"png": base64, "prompt": TEXT, "facts": the prompt file's row}, ...]}
                    -> {"contract": 1, "scores": [a number, or null where a picture has none, ...]}

rlstitch/rewards/server.py is the other side, for any reward, and needs nothing of rlstitch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from torch import Tensor

from rlstitch.figures import sendable
from rlstitch.ranges import Range, Text
from rlstitch.rewards import service
from rlstitch.rewards.service import AtOnce, Retries, Seconds, Service, Unanswered, Unread
from rlstitch.types import Batch, UserError

CONTRACT = 1


class HttpReward:
    """Scores by a service at `url`, e.g. launch/serve_reward.py's. No gradient; pictures are rounded to eight bits a channel. at_once: pictures of one request.

    key_env, timeout, retries: rewards.service.Service. A picture that is not scored is NaN, takes no part, and is counted. Where the service is not there, or keeps to another
    contract, when a job begins, the job does not begin.
    """

    differentiable = False
    device = "service"  # elsewhere: asked while the next rollout is made
    handling = ("at_once", *service.HANDLING)

    def __init__(
        self,
        url: Text,
        *,
        at_once: Annotated[int, Range(1, 256)] = 8,
        key_env: str = "",
        timeout: Seconds = 60.0,
        retries: Retries = 5,
        concurrency: AtOnce = 4,
    ):
        self.at_once = at_once
        self.service = Service(url, key_env=key_env, timeout=timeout, retries=retries, concurrency=concurrency)
        try:
            health = self.service.ask("/health", retries=min(2, retries))
        except Unanswered as error:
            raise UserError(f"{url} does not answer: {error}. Start it first, e.g. with launch/serve_reward.py") from None
        if health.get("contract") != CONTRACT:
            raise UserError(
                f"{url} keeps contract {str(health.get('contract'))[:20]}, and this is version {CONTRACT}: use the server of this version"
            )

    @staticmethod
    def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
        """(key, why) of what is wrong with a recipe's address or key, without asking anybody."""
        return service.faults(options)

    @property
    def failure(self) -> str:
        """Why the last picture without a score has none."""
        return self.service.failure

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B], NaN for what the service gives no score of."""
        facts = batch.facts or [{}] * len(images)

        def question(rows: range) -> Callable[[], list[float | Unanswered | Unread]]:
            return lambda: self._score(
                [{"png": service.png(images[i]), "prompt": batch.prompts[i], "facts": sendable(facts[i])} for i in rows]
            )

        rows = [range(k, min(k + self.at_once, len(images))) for k in range(0, len(images), self.at_once)]
        answers = self.service.each([question(part) for part in rows])
        found = [one for part, a in zip(rows, answers) for one in (a if isinstance(a, list) else [a] * len(part))]
        return self.service.settle(found).to(images.device)

    def _score(self, pictures: list[dict[str, Any]]) -> list[float | Unanswered | Unread]:
        answer = self.service.ask("/score", {"contract": CONTRACT, "pictures": pictures})
        scores = answer.get("scores")
        if answer.get("contract") != CONTRACT or not isinstance(scores, list):
            raise Unanswered(
                f"its answer is no {{'contract': {CONTRACT}, 'scores': [...]}}: it holds {', '.join(map(repr, list(answer)[:5]))[:100] or 'nothing'}"
            )
        if len(scores) != len(pictures):
            raise Unanswered(f"it gives {len(scores)} scores of {len(pictures)} pictures")
        return [number(score) for score in scores]


def number(score: Any) -> float | Unread:
    """A score as it stands in JSON."""
    try:
        value = math.nan if isinstance(score, bool | str) else float(score)
    except (TypeError, OverflowError):
        value = math.nan
    if math.isfinite(value):
        return value
    return Unread(
        "it has no score of a picture" if score is None else f"the score of a picture is {str(score)[:40]!r}, not a finite number"
    )
