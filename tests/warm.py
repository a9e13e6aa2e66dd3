"""Scripts in processes of their own that are forked from one in which what every job imports is imported already: a start costs a tenth of a second, not ten.

    code, output = run(ROOT / "launch" / "train.py", "recipe=...", ranks=2)

Runs may be killed: from outside after a time, or by themselves at a place that is aimed at. What a start itself does and costs, torchrun and its signals are tested with
true starts."""

from __future__ import annotations

import atexit
import gc
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ("trainer", "stitch.recipe", "steer", "evaluation", "checks", "report", "backbones.sd3", "rewards.clip")
_server: list[subprocess.Popen] = []


def server() -> subprocess.Popen:
    """The process that forks, started at the first need; one a process of the suite."""
    if not _server or _server[0].poll() is not None:
        command, environment = [sys.executable, __file__], {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _server[:] = [subprocess.Popen(command, env=environment, start_new_session=True, **pipes)]
        atexit.register(end, _server[0])
    return _server[0]


def end(process: subprocess.Popen) -> None:
    """The process that forks, with all that came of it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def outcome(script, *arguments, ranks=1, cwd=None, limit=300.0, after=None, target=None) -> tuple[list[int], str, float]:
    """Run a Python file on as many ranks, to the end, or killed `after` seconds, or at `target` on rank 0 (see `aim`); -> the status of each rank in the order in which they
    ended (-9: killed), all that was printed, seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
    environment = {k: str(v) for k, v in {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, **group}.items()}
    ranked = [environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}) for r in range(ranks)]
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        told = {"argv": [str(script), *map(str, arguments)], "ranks": ranked, "cwd": str(cwd or Path.cwd()), "log": log.name}
        process = server()
        print(json.dumps(told | {"after": after, "target": target}), file=process.stdin, flush=True)
        timer = threading.Timer(limit, end, [process])
        timer.start()
        answer = process.stdout.readline()
        timer.cancel()
        output = Path(log.name).read_text()
    assert answer, f"the process that forks has ended, or {script} took over {limit:.0f} s:\n{output}"
    codes, seconds = json.loads(answer)
    return codes, output, seconds


def run(script, *arguments, ranks=1, cwd=None, limit=300.0) -> tuple[int, str]:
    """-> (the first status that is not 0, all that was printed)."""
    codes, output, _ = outcome(script, *arguments, ranks=ranks, cwd=cwd, limit=limit)
    return next(filter(None, codes), 0), output


# ---------------------------------------------------------------------------------------------------- in the process that forks


def aim(place: str, count: int) -> None:
    """Have this process kill itself before the `count`-th call of the function at a dotted place."""
    within, _, name = place.rpartition(".")
    thing = pkgutil.resolve_name(within)
    true, left = getattr(thing, name), [count]

    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*arguments, **options)

    setattr(thing, name, counted)


def become(told: dict, rank: int) -> None:
    """In a child: the script, as `python script arguments` runs it."""
    log = os.open(told["log"], os.O_WRONLY | os.O_APPEND)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(told["ranks"][rank])
    os.chdir(told["cwd"])
    sys.argv, sys.path[0] = told["argv"], str(Path(told["argv"][0]).parent)
    if told["target"] and rank == 0:
        aim(*told["target"])
    runpy.run_path(told["argv"][0], run_name="__main__")


def ended(alive: set[int], after: float | None) -> tuple[list[int], float]:
    """Wait for all. Where one is killed the others are, too, as torchrun does; where one leaves, they have a while."""
    begun, codes = time.monotonic(), []
    last = begun + (after or float("inf"))
    while alive:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            alive.discard(child)
            codes.append(os.waitstatus_to_exitcode(status))
            last = min(last, time.monotonic() + (0 if codes[-1] < 0 else 30))
        if time.monotonic() >= last:
            for other in alive:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.005)
    return codes, time.monotonic() - begun


def serve() -> None:
    for name in IMPORTED:
        import_module(f"rlstitch.{name}")
    answers = os.fdopen(os.dup(1), "w")
    gc.collect()
    gc.freeze()  # what is imported is looked through no more
    for line in sys.stdin:
        told, children = json.loads(line), set()
        for rank in range(len(told["ranks"])):
            if not (child := os.fork()):
                return become(told, rank)
            children.add(child)
        print(json.dumps(ended(children, told["after"])), file=answers, flush=True)


if __name__ == "__main__":
    serve()
