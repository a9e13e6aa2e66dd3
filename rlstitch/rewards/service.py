"""Services that score pictures, asked over HTTP: JSON with a deadline, retries and bounds. What is not answered is NaN and counted, never 0.

Nothing of an answer is ever run or looked up by name: it is numbers, or text in which a number is looked for.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, TypeVar
from urllib.parse import urljoin, urlsplit

import torch
from torch import Tensor

from rlstitch.metrics import to_image
from rlstitch.ranges import Range
from rlstitch.telling import duration, say
from rlstitch.types import UserError

T = TypeVar("T")
Seconds = Annotated[float, Range(0, 3600, open="low")]
Retries = Annotated[int, Range(0, 100)]
AtOnce = Annotated[int, Range(1, 1024)]

LARGEST = 4 << 20  # bytes of an answer
PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds: before the first retry, twice as long before the next; and at most, whatever a service asks for
REDIRECTS = 3
HANDLING = ("url", "key_env", "timeout", "retries", "concurrency")  # a service that has moved is taken to be the same


class Unanswered(Exception):
    """A question without an answer, or with one that breaks the contract. again: asking once more may help; after: seconds that the service asks to wait before."""

    def __init__(self, why: str, *, again: bool = False, after: float | None = None, status: int = 0):
        super().__init__(why)
        self.again, self.after, self.status = again, after, status


class Unread(Exception):
    """An answer as it should be, in which no score stands."""


class Service:
    """One address, `url` without its last part. key_env: the environment variable that holds the key, which is sent as a bearer token and shown nowhere. timeout: seconds
    until an answer must be there whole. retries: after a timeout, a broken connection, status 429 or 5xx, with growing pauses, or those that Retry-After asks for.

    Asked directly, through no proxy. `asked`, `failed`: pictures so far, and those without a score; `calls`: requests, retries among them; `failure`: the last reason.
    """

    def __init__(self, url: str, *, key_env: str = "", timeout: float = 60.0, retries: int = 5, concurrency: int = 16):
        parts = urlsplit(url)
        self.url, self.secure, self.host, self.base = url, parts.scheme == "https", str(parts.hostname), parts.path.rstrip("/")
        self.port = parts.port or (443 if self.secure else 80)
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.trust = ssl.create_default_context() if self.secure else None
        self._key = os.environ.get(key_env, "") if key_env else ""
        self.asked = self.failed = self.calls = 0
        self.answered, self.failure, self._tell_at = False, "", 1

    # ------------------------------------------------------------------------------------------------ one question

    def ask(self, path: str, body: Any = None, *, retries: int | None = None) -> dict[str, Any]:
        """The JSON object that POST of `body` (GET without one) gives. Raises Unanswered."""
        turns = self.retries if retries is None else retries
        for turn in range(turns + 1):
            try:
                return self._once(path, body)
            except Unanswered as error:
                if not error.again or turn == turns:
                    raise
                pause = PAUSE * 2**turn * random.SystemRandom().uniform(0.5, 1.0) if error.after is None else error.after
                time.sleep(min(pause, LONGEST_PAUSE))
        raise AssertionError

    def _once(self, path: str, body: Any) -> dict[str, Any]:
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        target = self.base + path
        for _ in range(REDIRECTS + 1):
            status, headers, raw = self._exchange(target, content)
            if status not in (301, 302, 303, 307, 308):
                break
            target = self._redirected(target, headers, status, content)
        else:
            raise Unanswered("it redirects in a circle")
        if status != 200:
            late = status in (408, 429) or status >= 500
            raise Unanswered(f"status {status}{self._words(raw)}", again=late, after=_wait(headers) if late else None, status=status)
        if raw.lstrip()[:1] == b"<":
            raise Unanswered("it answers with a web page, not with JSON: is this the address of the service?")
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise Unanswered(f"its answer is no JSON{self._words(raw)}") from None
        if not isinstance(answer, dict):
            raise Unanswered(f"its answer is a JSON {type(answer).__name__}, not an object of names and values")
        return answer

    def _exchange(self, target: str, content: bytes | None) -> tuple[int, Any, bytes]:
        """Status, headers and body of one request. A thread shuts the line down at the deadline, since a timeout of the socket begins anew with every byte."""
        options: dict[str, Any] = {"timeout": self.timeout} | ({"context": self.trust} if self.trust else {})
        line = (http.client.HTTPSConnection if self.secure else http.client.HTTPConnection)(self.host, self.port, **options)
        late = threading.Event()

        def shut(line_: socket.socket) -> None:
            late.set()
            with suppress(OSError):
                socket.socket.shutdown(line_, socket.SHUT_RDWR)

        timer = None
        self.calls += 1
        try:
            line.connect()
            timer = threading.Timer(self.timeout, shut, [line.sock])
            timer.daemon = True
            timer.start()
            headers = {"Accept": "application/json", "Connection": "close", "User-Agent": "rlstitch"}
            headers |= {"Content-Type": "application/json"} if content is not None else {}
            headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
            line.request("GET" if content is None else "POST", target, content, headers)
            answer = line.getresponse()
            raw = answer.read(LARGEST + 1)
            if len(raw) > LARGEST:
                raise Unanswered(f"its answer has more than {LARGEST >> 20} MiB")
            if late.is_set() or answer.length:
                raise http.client.IncompleteRead(raw)
            return answer.status, answer.headers, raw
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise Unanswered(
                    f"no answer within {duration(self.timeout) if self.timeout >= 1 else f'{self.timeout:g} s'}", again=True
                ) from None
            if isinstance(error, ssl.SSLCertVerificationError):
                raise Unanswered(f"its certificate is not trusted ({error.verify_message})") from None
            if isinstance(error, http.client.IncompleteRead):
                raise Unanswered("the connection broke off in the middle of the answer", again=True) from None
            told = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
            raise Unanswered(f"{'' if isinstance(error, OSError) else 'no HTTP: '}{self._clean(told)}", again=True) from None
        finally:
            if timer is not None:
                timer.cancel()
            line.close()

    def _redirected(self, target: str, headers: Any, status: int, content: bytes | None) -> str:
        """Where a redirect leads, if that is another path of the same service."""
        here = f"{'https' if self.secure else 'http'}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"
        try:
            to = urlsplit(urljoin(here + target, headers.get("Location", "")))
            other = (to.scheme, to.hostname, to.port or (443 if to.scheme == "https" else 80)) != (
                urlsplit(here).scheme,
                self.host,
                self.port,
            )
        except ValueError:
            raise Unanswered(f"it redirects to no address (status {status})") from None
        where = f"{to.scheme}://{to.netloc.rsplit('@', 1)[-1]}{to.path}"[:200]
        if other:
            raise Unanswered(
                f"it redirects to another host, which pictures are not sent to: {self._clean(where)}. Where you trust that one, name it as url"
            )
        if content is not None and status not in (307, 308):
            raise Unanswered(f"it redirects to {self._clean(where)} (status {status}): name that as url")
        return (to.path or "/") + f"?{to.query}" * bool(to.query)

    def _clean(self, text: str) -> str:
        """One short line without the key."""
        text = " ".join(text.split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= 200 else text[:197] + "..."

    def _words(self, raw: bytes) -> str:
        """': ' and what an answer that is none says of itself."""
        text = raw[:20_000].decode("utf-8", "replace")
        with suppress(ValueError, RecursionError, TypeError, AttributeError):
            said = json.loads(text)
            said = said.get("error") or said.get("detail") or said.get("message")
            text = str(said["message"] if isinstance(said, dict) else said)
        if text.lstrip()[:1] == "<":
            return ": a web page"
        return f": {self._clean(text)}" if text.strip() else ""

    # ------------------------------------------------------------------------------------------------ many

    def each(self, questions: Sequence[Callable[[], T]]) -> list[T | Unanswered | Unread]:
        """What every question gives or raises, `concurrency` of them at once, in order."""

        def one(question: Callable[[], T]) -> T | Unanswered | Unread:
            try:
                return question()
            except (Unanswered, Unread) as error:
                return error

        with ThreadPoolExecutor(max(1, min(self.concurrency, len(questions))), "service") as pool:
            return list(pool.map(one, questions))

    def settle(self, found: Sequence[float | Unanswered | Unread]) -> Tensor:
        """Scores [B], float32, of B pictures; NaN for those without one, which are counted and told of, more and more seldom. Raises UserError where not one has been answered
        since the job began: then it is not the service that has gone away, but the recipe or the service that is wrong."""
        lost = [one for one in found if not isinstance(one, float)]
        self.asked, self.failed = self.asked + len(found), self.failed + len(lost)
        if lost:
            self.failure = f"{self.url}: {lost[-1]}"
        if not self.answered and found and all(isinstance(one, Unanswered) for one in found):
            raise UserError(self.failure)
        self.answered = True
        if lost and self.failed >= self._tell_at:
            self._tell_at = 2 * self.failed
            say(f"{self.failed} of {self.asked} pictures without a score so far, which take no part. The last: {self.failure}")
        return torch.tensor([one if isinstance(one, float) else math.nan for one in found])


def _wait(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    said = headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, seconds) if math.isfinite(seconds := float(said)) else None
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    return None


def png(picture: Tensor) -> str:
    """A picture [3, H, W] in [0, 1] as PNG of eight bits a channel, in base64."""
    buffer = io.BytesIO()
    to_image(picture.detach().float()).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def faults(options: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, why) of what is wrong with a recipe's `url` and `key_env`. Neither value is repeated where it may hold a secret."""
    out = []
    try:
        parts = urlsplit(options["url"])
        port = parts.port
        if parts.username is not None or parts.query or parts.fragment:
            out.append(
                (
                    "url",
                    "holds a name, a password or a query, and a recipe is saved and shown: give the address alone, and a key by key_env",
                )
            )
        elif parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            out.append(("url", f"must be an address such as http://127.0.0.1:8765, not {options['url'][:80]!r}"))
        elif not re.fullmatch(r"[!-~]+", parts.path or "/") or not re.fullmatch(r"[\w.:%-]+", parts.hostname):
            out.append(("url", f"must be plain letters and signs, not {options['url'][:80]!r}"))
    except ValueError:
        out.append(("url", "is no address; one is http://127.0.0.1:8765"))
    name = options.get("key_env", "")
    if name and not os.environ.get(name, "").strip():
        out.append(
            ("key_env", "names no environment variable that is set: give the variable's name, e.g. OPENAI_API_KEY, never the key itself")
        )
    elif name and not re.fullmatch(r"[!-~]+", os.environ[name]):
        out.append(("key_env", "names an environment variable that holds more than a key: it has blanks, line breaks or other letters"))
    return out
