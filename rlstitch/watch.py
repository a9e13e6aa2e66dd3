"""Ranks keep an eye on each other: each says through torchrun's store that it lives and what it is at, so that a rank that is lost is named, in one line."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from rlstitch.telling import last_word

BEAT = 1.0  # seconds between two signs of life
SILENT = 10.0  # seconds without one after which a rank is not waited for when a signal asks this one to stop
_current: Watch | None = None


def start(rank: int, world: int, timeout: float, where: Callable[[], str]) -> None:
    """Watch the other ranks from now on. timeout: seconds that a rank may be silent; where: what this one is at."""
    global _current
    if _current is not None:  # another job in the same processes
        _current.timeout, _current.where = timeout, where
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False, wait_for_workers=False)
    _current = Watch(store, rank, world, timeout, where)
    _current.start()
    atexit.register(_current.end)


def leave(fault: str = "", *, said: bool = False) -> None:
    """Tell the other ranks that this one ends, of what fault if of any, and whether it has said so to the user itself."""
    if _current is not None:
        _current.say("left", json.dumps([fault, said]))


def end_if_lost(error: Exception) -> None:
    """End this rank in one line, with status 1, where `error` comes of another one's loss. Takes a few seconds to find out."""
    if _current is None or not isinstance(error, RuntimeError):
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, who ends the others at once, and would end this one without its word
    if line := _current.explain(error):
        _current.tell(line)
        os._exit(1)  # what is left of the group would wait for the lost one


class Watch(threading.Thread):
    """A thread beside a rank's work. It ends the process where another rank has been silent for `timeout` seconds, or where one is lost when a signal asks this one to
    stop: the rank itself waits in a collective then, where Python sees no signal."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float, where: Callable[[], str]):
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.world, self.timeout, self.where = store, rank, world, timeout, where
        self.seen = {r: ("", "starting", time.monotonic()) for r in range(world) if r != rank}  # last beat, phase, since when
        self.faults: dict[int, str] = {}
        self.said = self.ending = False
        self.ears, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)  # written to at once, whatever the rank is at

    def run(self) -> None:
        beat = asked = 0
        while True:
            if select.select([self.ears], [], [], BEAT)[0]:
                asked = self.ears.recv(1)[0]
            if self.ending:
                return
            beat += 1
            try:
                self.say("beat", json.dumps([beat, self.where()]))
                self._listen()
            except RuntimeError:  # the store is gone: torchrun is, and ends every rank
                return
            silent = self._silent(SILENT if asked else self.timeout)
            if silent or (asked and self.faults):
                self.tell(f"{self._named(silent)}; {'stopped on a signal' if asked else 'given up (distributed.timeout)'}")
                os._exit(128 + asked if asked else 1)

    def end(self) -> None:
        """Before the interpreter ends: it takes its threads away, and one that is within the store then takes the process with it (`terminate called`)."""
        self.ending = True
        with contextlib.suppress(BlockingIOError):  # full: it wakes anyway
            self.mouth.send(b"\0")
        self.join(5 * BEAT)

    def explain(self, error: Exception) -> str:
        until = time.monotonic() + 5 * BEAT
        while not self.faults and time.monotonic() < until:
            time.sleep(BEAT / 4)
        silent = self._silent(3 * BEAT)
        if self.faults or silent:
            return self._named(silent)
        if "imed out" in str(error):
            others = ", ".join(f"rank {r} in {phase}" for r, (_, phase, _) in list(self.seen.items()))
            return f"no answer within {self.timeout / 60:g} min (distributed.timeout): rank {self.rank} waits in {self.where()}, {others}"
        return ""

    def tell(self, line: str) -> None:
        """One line, from the first rank that is left, unless the one at fault has said it."""
        gone = self.faults.keys() | set(self._silent(3 * BEAT))
        if self.rank == min(set(range(self.world)) - gone) and not self.said:
            last_word(f"rlstitch: {line}")

    def say(self, key: str, text: str) -> None:
        self.store.set(f"rlstitch/{key}/{self.rank}", text)

    def _listen(self) -> None:
        for rank, (before, _, _) in list(self.seen.items()):
            if self.store.check([f"rlstitch/left/{rank}"]):
                del self.seen[rank]
                fault, said = json.loads(self.store.get(f"rlstitch/left/{rank}"))
                self.said |= said
                if fault:
                    self.faults[rank] = fault
            elif self.store.check([f"rlstitch/beat/{rank}"]):
                beat, phase = json.loads(self.store.get(f"rlstitch/beat/{rank}"))
                if beat != before:
                    self.seen[rank] = (beat, phase, time.monotonic())

    def _silent(self, seconds: float) -> list[int]:
        return [r for r, (_, _, since) in list(self.seen.items()) if time.monotonic() - since > seconds]

    def _named(self, silent: list[int]) -> str:
        told = [f"rank {r} ended: {why}" for r, why in self.faults.items()]
        now = time.monotonic()
        return "; ".join(
            [*told, *(f"rank {r} has not answered for {now - self.seen[r][2]:.0f} s (last seen in {self.seen[r][1]})" for r in silent)]
        )
