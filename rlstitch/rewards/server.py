"""The other side of rewards.http: a small HTTP server around one reward. It needs Python 3.8, torch, numpy and Pillow, and nothing of rlstitch, so that a reward that wants an
old environment is served from there, with this one file copied beside it:

    python server.py my_module.MyReward '{"path": "weights"}' 8765

A reward is any object with `score(images [B, 3, H, W] in [0, 1], batch) -> [B]`; batch.prompts are texts, batch.facts rows. launch/serve_reward.py serves those of a recipe.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy
import torch
from PIL import Image

CONTRACT = 1
LARGEST = 512 << 20  # bytes of a request
PIXELS = 64 << 20  # of a picture


class Refused(Exception):
    """A request that is not as the contract has it."""


def pictures_of(request):
    """(images [B, 3, H, W], prompts, rows) of a request. Raises Refused."""
    if not isinstance(request, dict) or request.get("contract") != CONTRACT or not isinstance(request.get("pictures"), list):
        raise Refused(f"a request is {{'contract': {CONTRACT}, 'pictures': [...]}}")
    images = []
    for one in request["pictures"]:
        try:
            image = Image.open(io.BytesIO(base64.b64decode(one["png"], validate=True)), formats=["PNG"])
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            images.append(torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255)
            prompt, facts = one["prompt"], one.get("facts", {})
        except Exception as error:  # Pillow raises many kinds for a damaged picture
            raise Refused(f"picture {len(images)}: {type(error).__name__}: {error}") from error
        if not isinstance(prompt, str) or not isinstance(facts, dict):
            raise Refused(f"picture {len(images)}: needs a text 'prompt', and 'facts' that are an object")
    if not images or len({image.shape for image in images}) > 1:
        raise Refused("the pictures of a request must be of one size, and at least one")
    rows = request["pictures"]
    return torch.stack(images), [one["prompt"] for one in rows], [one.get("facts", {}) for one in rows]


def server_of(reward, name, host="127.0.0.1", port=8765):
    """A server, not yet serving, that answers for `reward`, one request after the other; port 0 takes a free one (server.server_port)."""
    alone = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 120  # seconds without a byte

        def do_GET(self):
            self.reply(
                *(
                    (200, {"contract": CONTRACT, "reward": name})
                    if self.path.endswith("/health")
                    else (404, {"error": "there are /health and /score"})
                )
            )

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not self.path.endswith("/score") or not length.isdigit() or int(length) > LARGEST:
                self.close_connection = True
                return self.reply(
                    413 if length.isdigit() and int(length) > LARGEST else 404,
                    {"error": "POST /score takes a JSON body, and up to 512 MiB"},
                )
            try:
                images, prompts, facts = pictures_of(json.loads(self.rfile.read(int(length))))
                index = torch.arange(len(images))
                batch = SimpleNamespace(prompts=prompts, facts=facts, group=index, seeds=index.clone(), text=None, clean=None)
                with alone, torch.no_grad():
                    scores = [float(score) for score in reward.score(images, batch)]
                if len(scores) != len(images):
                    raise TypeError(f"{len(scores)} scores of {len(images)} pictures")
            except (
                Refused,
                ValueError,
                RecursionError,
            ) as error:  # of the request, or of what a reward says of its prompts: no use in asking again
                return self.reply(422, {"error": f"{error}"[:400]})
            except Exception as error:
                print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                return self.reply(500, {"error": f"{name} failed: {type(error).__name__}: {error}"[:400]})
            self.reply(200, {"contract": CONTRACT, "scores": [score if math.isfinite(score) else None for score in scores]})

        def reply(self, status, answer):
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *told):
            """Nothing is said of every request."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone away is no fault
                super().handle_error(request, client_address)

    server = Server((host, port), Handler)
    server.daemon_threads = True
    return server


if __name__ == "__main__":
    target, options, port = ([*sys.argv[1:], "{}", "8765"] if len(sys.argv) == 2 else [*sys.argv[1:], "8765"])[:3]
    module, _, attribute = target.rpartition(".")
    sys.path.insert(0, ".")
    serving = server_of(getattr(importlib.import_module(module), attribute)(**json.loads(options)), target, port=int(port))
    print(f"{target} at http://127.0.0.1:{serving.server_port}", flush=True)
    serving.serve_forever()
