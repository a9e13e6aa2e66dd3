"""Ranks that are stopped, killed or at fault are named by those that are left, in one line. Pairs of processes that do nothing but meet, forked by this file's
`__main__`, which has the libraries loaded."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

from tests import warm

AT_FAULT = {"fault": "the reward said no", "bug": "ValueError: 3"}
KINDS = ("term", "stopped", "timeout", "killed", *AT_FAULT)


def meet(kind, rank):
    """A rank that meets the other one in all-reduces; after ten of them rank 1 does what the case says."""
    import torch
    import torch.distributed as dist

    from rlstitch import cli, watch
    from rlstitch.interrupt import Interrupted, noted
    from rlstitch.types import UserError

    watch.BEAT, watch.SILENT, limit = 0.1, 1.0, 6.0 if kind == "timeout" else 600.0

    def run(_):
        dist.init_process_group("gloo", timeout=timedelta(seconds=limit))
        watch.start(rank, 2, limit, lambda: "rollout of update 3")
        with noted(caught := []):
            for k in range(10**9):
                if k == 10 and rank == 1:
                    print("ready", flush=True)
                    if kind in AT_FAULT:
                        raise UserError("the reward said no") if kind == "fault" else ValueError(3)
                stop = torch.tensor(float(bool(caught)))
                dist.all_reduce(stop)
                if stop:
                    raise Interrupted(caught)
                time.sleep(0.01)

    cli.main(run, default="none")


def fork(kind, rank, port, folder):
    """A rank as a process of its own; -> its id."""
    streams = [os.open(folder / f"{kind}-{rank}.{name}", os.O_CREAT | os.O_WRONLY) for name in ("out", "err")]
    if pid := os.fork():
        return pid
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for fd, stream in enumerate(streams, 1):
        os.dup2(stream, fd)
    try:
        meet(kind, rank)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def main(folder):
    """All cases at once; -> for each, what rank 0 said and its status."""
    import rlstitch.cli
    import rlstitch.protocols
    import rlstitch.watch  # noqa: F401

    pairs, found = {}, {}
    for kind in KINDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pairs[kind] = [fork(kind, rank, port, folder) for rank in range(2)]
    try:
        for kind, (first, second) in pairs.items():
            while "ready" not in (folder / f"{kind}-1.out").read_text():
                time.sleep(0.05)
            time.sleep(0.5)
            if kind in ("stopped", "timeout", "killed"):
                os.kill(second, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
            if kind in ("term", "stopped"):
                for rank in (first, second):
                    os.kill(rank, signal.SIGTERM)
        for kind, (first, _) in pairs.items():
            code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
            said = (folder / f"{kind}-0.err").read_text().splitlines()
            found[kind] = (code, [line for line in said if "c10d" not in line and "socket" not in line])
    finally:
        for _, second in pairs.values():
            os.kill(second, signal.SIGKILL)
            os.waitpid(second, 0)
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Of each case: rank 0's status and what it said."""
    folder = tmp_path_factory.mktemp("pairs")
    code, output = warm.run(__file__, folder, limit=200)
    assert code == 0, output
    return json.loads((folder / "found.json").read_text())


def test_a_rank_that_does_not_answer_is_named_and_does_not_keep_the_others(ended):
    code, said = ended["stopped"]
    assert code == 143 and len(said) == 1, said
    assert said[0].startswith("rlstitch: rank 1 has not answered for ") and said[0].endswith(
        "(last seen in rollout of update 3); stopped on a signal"
    )
    code, said = ended["timeout"]
    assert code == 1 and len(said) == 1 and "rank 1 has not answered for " in said[0], said


def test_a_rank_that_is_killed_or_at_fault_is_named_in_place_of_a_traceback(ended):
    code, said = ended["killed"]
    assert code == 1 and len(said) == 1 and "rank 1 has not answered" in said[0] and "rollout of update 3" in said[0], said
    for kind, why in AT_FAULT.items():
        code, said = ended[kind]
        assert code == 1 and said == [f"rlstitch: rank 1 ended: {why}"], said


def test_ranks_that_all_answer_stop_together(ended):
    code, said = ended["term"]
    assert code == 143 and len(said) == 1 and "a checkpoint was written" in said[0]


ENDS = """
import os, sys, time
from rlstitch import watch

class Last:  # taken away when the interpreter is half gone, and in no haste
    def __del__(self, sleep=time.sleep):
        sleep(0.3)

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
watch.select.select = lambda *_: ([], [], [])  # always within the store
for _ in range(5):
    if not (child := os.fork()):
        last = Last()
        watch.start(0, 2, 60, lambda: "the end")
        time.sleep(0.2)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_rank_that_watches_to_its_last_moment_ends_well():
    """The interpreter takes its threads away as it ends: one that is within the store's C++ then would end the process by an abort."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    ends = subprocess.run([sys.executable, "-c", ENDS, str(store.port)], capture_output=True, text=True, cwd=warm.ROOT, timeout=120)
    assert ends.stdout.split() == ["0"] * 5, ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
