"""Ranks that are stopped, killed or at fault are named by those that are left, in one line. Pairs of processes that do nothing but meet, this file's `__main__`."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from tests.test_train import ROOT

AT_FAULT = {"fault": "the reward said no", "bug": "ValueError: 3"}


def meet(kind):
    """A rank that meets the other one in all-reduces; after ten of them rank 1 does what the case says."""
    import torch
    import torch.distributed as dist

    from rlstitch import cli, watch
    from rlstitch.interrupt import Interrupted, noted
    from rlstitch.types import UserError

    watch.BEAT, watch.SILENT, rank, limit = 0.1, 1.0, int(os.environ["RANK"]), 4.0 if kind == "timeout" else 600.0

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

    cli.main(run)


@pytest.fixture(scope="module")
def ended():
    """What rank 0 of each case said, its status, and after how many seconds; all cases at once."""
    pairs = {}
    for kind in ("term", "stopped", "timeout", "killed", *AT_FAULT):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pairs[kind] = [
            subprocess.Popen([sys.executable, __file__, kind], env={**os.environ, **group, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for r in range(2)
        ]  # fmt: skip
    found = {}
    try:
        for kind, (first, second) in pairs.items():
            assert second.stdout.readline() == "ready\n"
            time.sleep(0.5)
            if kind in ("stopped", "timeout", "killed"):
                second.send_signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
            if kind in ("term", "stopped"):
                for rank in (first, second):
                    rank.send_signal(signal.SIGTERM)
            _, said = first.communicate(timeout=60)
            found[kind] = (first.returncode, [line for line in said.splitlines() if "W1" not in line and "socket" not in line])
    finally:
        for rank in (r for pair in pairs.values() for r in pair):
            rank.kill()
            rank.wait()
    return found


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


if __name__ == "__main__":
    meet(sys.argv[1])
