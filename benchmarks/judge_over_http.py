"""A judge behind HTTP that has no gradient: the rule-based detector (soft) plays a vision-language model. Through the client it trains NFT and Flow-GRPO-Fast; its surrogate,
distilled and stitched, gives DRaFT the gradient that it has not (the paper's stated limit).

    python -m benchmarks.judge_over_http [methods=nft,flow_grpo_fast,draft_stitch] [seeds=0,1,2] [updates=0: SETTINGS', else the recipe's] [steps=0: the surrogate recipe's]
                                         [max_prompts=172] [threads=1] [port=8901] [out=runs/judge_over_http]

The judge is asked whether the picture shows the prompt, and answers yes with the share of the prompt's requirements that the picture meets, in OpenAI's protocol with logprobs. The
table: detector and preference_b on held-out prompts (EMA weights), device-hours of training (of a core for itself: with threads=1 a run may share it), questions to the judge; of draft_stitch, both also with what its surrogate and value
model took, once a seed. Finished runs are kept under `out` and their rows in results/, so that the script goes on where it stopped; of a run
that was killed and gone on with, only the questions since are counted. The table has the seeds that are there.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import RESULTS, arguments, row, save, spread, table, train, training_hours
from benchmarks.surrogate import made
from rlstitch.files import write_json
from rlstitch.prompts import read_prompts
from rlstitch.shapes import detector
from rlstitch.shapes.prompts import Prompt

QUESTION = 'Does the picture show "{prompt}"? Answer yes or no.'
NAME, JUDGES = "judge_over_http", ("detector", "preference_b")
SETTINGS: dict[str, dict[str, str]] = {  # what differs from the recipes, and why
    "nft": {"updates": "40"},  # half of its 80: NFT has raised the detector by then, and every picture is a question
    "draft_stitch": {"algorithm.regulariser": "1.0"},  # with .1 the policy learns the surrogate's errors: detector .331 +- .052
    "flow_grpo_fast": {"batch.images_per_prompt": "16", "optimiser.lr": "8e-4"},  # with 8 and 4e-4 the detector has not risen: .344 +- .026
}


class Judge:
    """The service: `calls` questions so far."""

    def __init__(self, port: int = 0):
        rows = [row for name in ("train", "held_out") for row in read_prompts(f"shapes:{name}.jsonl").rows]
        self.prompts, self.calls, self.alone, judge = {row["prompt"]: Prompt.from_json(row) for row in rows}, 0, threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"object": "list", "data": [{"id": "detector", "object": "model"}]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(judge.answer(*(part.get("text") or part["image_url"]["url"] for part in request["messages"][0]["content"])))

            def reply(self, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *told: Any) -> None:
                """Nothing is said of every question."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True

    def answer(self, picture: str, question: str) -> dict[str, Any]:
        """A chat completion: yes and no with their probabilities."""
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).convert("RGB"))
        asked = re.search('"(.*)"', question)
        with self.alone:
            self.calls += 1
            share = float(detector.soft_scores(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, [self.prompts[asked[1]]]))
        listed = [{"token": word, "logprob": math.log(max(p, 1e-9)), "bytes": None} for word, p in (("Yes", share), ("No", 1 - share))]
        first = max(listed, key=lambda one: one["logprob"])
        return {
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length",
                    "message": {"role": "assistant", "content": first["token"]},
                    "logprobs": {"content": [first | {"top_logprobs": listed}]},
                }
            ],
        }


def node(url: str) -> dict[str, Any]:
    """The client, as a recipe names it."""
    return {
        "_target_": "rlstitch.rewards.vlm.VlmJudge",
        "url": url,
        "model": "detector",
        "question": QUESTION,
        "answer": "yes",
        "concurrency": 4,
    }


def processor_seconds() -> float:
    """Of this process and of those that it has run and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def counted(file: Path, judge: Judge, action) -> dict[str, Any]:
    """What `action` gives, with the questions and hours that it took, kept in a file beside it; `share` of the time it had its core, by which hours are made those of a whole core."""
    calls, began, worked = judge.calls, time.perf_counter(), processor_seconds()
    found = action()
    if not file.exists():
        hours, share = (time.perf_counter() - began) / 3600, (processor_seconds() - worked) / (time.perf_counter() - began)
        write_json(file, {"calls": judge.calls - calls, "hours": hours * share, "share": share})
    return {"summary": found, **json.loads(file.read_text())}


def one(method: str, seed: int, options: dict[str, str], judge: Judge) -> dict[str, float]:
    """Figures of one run."""
    out, client = Path(options["out"]), node(f"http://127.0.0.1:{judge.server.server_port}/v1")
    told = [
        f"seed={seed}",
        f"threads={options['threads']}",
        f"evaluation.max_prompts={options['max_prompts']}",
        "evaluation.final=[base, ema]",
        "guard.patience=0",
    ]
    changed = SETTINGS.get(method, {}) | ({"updates": options["updates"]} if options["updates"] != "0" else {})
    told += [f"{key}={value}" for key, value in changed.items()]
    once = {"hours": 0.0, "calls": 0}
    if method == "draft_stitch":
        held: list[Any] = []
        once = counted(out / f"once-seed{seed}.json", judge, lambda: held.extend(made(seed, int(options["steps"]), out, {"judge": client})))
        config, value = held
        reward = {**config.start, "path": str(out / config.name), "scale": "surrogate"}
        told += [f"rewards.judge={json.dumps(reward)}", f"values={json.dumps({'judge': str(value)})}"]
    else:
        told.append(f"rewards.judge={json.dumps(client)}")
    name = f"{method}-seed{seed}"
    run = counted(out / f"{name}.json", judge, lambda: train(method, name, out, *told, 'oracle.weights={"judge": 1.0}'))
    eval_ = run["summary"]["eval"]
    return {
        **{f"base {j}": eval_["base"][j] for j in JUDGES}, **{j: eval_["ema"][j] for j in JUDGES},
        "hours": training_hours(run["summary"]["device_hours"]) * run["share"], "calls": run["calls"], "once hours": once["hours"], "once calls": once["calls"],
    }  # fmt: skip


def main() -> None:
    defaults = {
        "methods": "nft,flow_grpo_fast,draft_stitch",
        "seeds": "0,1,2",
        "updates": "0",
        "steps": "0",
        "max_prompts": "172",
        "threads": "1",
    }
    options = arguments(defaults | {"port": "8901", "out": "runs/judge_over_http"})
    torch.set_num_threads(int(options["threads"]) or torch.get_num_threads())
    judge = Judge(int(options["port"]))
    threading.Thread(target=judge.server.serve_forever, daemon=True).start()
    seeds = [int(seed) for seed in options["seeds"].split(",")]
    other = "".join(f" {key} {options[key]}" for key in ("updates", "steps") if options[key] != "0")
    for method in options["methods"].split(","):
        for seed in seeds:
            row(NAME, f"{method} seed {seed}{other}", lambda method=method, seed=seed: one(method, seed, options, judge))
    judge.server.shutdown()
    kept = json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]
    known = [key.removesuffix(other).split(" seed ") for key in kept if key.endswith(other) and key.count(" ") == 2 + other.count(" ")]
    found = {method: [kept[f"{m} seed {s}{other}"] for m, s in known if m == method] for method in dict.fromkeys(m for m, _ in known)}

    def line(label: str, rows: list[dict[str, float]], prefix: str = "") -> list[str]:
        scores = [spread([one[prefix + j] for one in rows]) for j in JUDGES]
        if prefix:
            return [label, *scores, "", ""]
        cells = []
        for key, digits in (("hours", 3), ("calls", 0)):
            once = [one[f"once {key}"] for one in rows if one[f"once {key}"]]
            cells.append(spread([one[key] for one in rows], digits) + (f" + {spread(once, digits)} once" if once else ""))
        return [f"{label}, {len(rows)} seed{'s' * (len(rows) > 1)}", *scores, *cells]

    rows = [line("base", found[next(iter(found))][:1], "base "), *(line(method, rows) for method, rows in found.items())]
    note = f"{options['max_prompts']} held-out prompts, EMA weights; the detector, soft, is the judge behind HTTP."
    table(NAME, ["", *JUDGES, "device-hours", "questions to the judge"], rows, note)
    save(NAME, {"rows": kept})


if __name__ == "__main__":
    main()
