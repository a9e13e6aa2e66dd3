"""What a job says while it works and when it ends: once, whatever the number of ranks, and readable in a log file as on a screen."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines of progress in a log file


def is_main() -> bool:
    """Whether this process is the one of its job that speaks."""
    return os.environ.get("RANK", "0") == "0"


def legible(text: str) -> str:
    """A text with nothing in it but lines of printable letters: others, such as control characters and what a file's name has that is no UTF-8, are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def of_machine(error: OSError) -> str:
    """One line on what the operating system would not do, with the file that it was about."""
    where, why = f"{error.filename}: " if error.filename else "", error.strerror or str(error).split("\n")[0] or type(error).__name__
    remedy = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space"}.get(
        error.errno, "see that it is there and may be read and written"
    )
    return f"{where}{why}. {remedy[0].upper()}{remedy[1:]}, then start again; RLSTITCH_TRACEBACK=1 shows where this happened"


def say(*lines: str) -> None:
    """Lines on stdout from one rank; a bar that is being drawn stays whole."""
    if is_main() and lines:
        tqdm.write(legible("\n".join(lines)))
        sys.stdout.flush()


class Lines:
    """Progress in a pipe or a log file: a line every ten seconds with how far it is and how long it will take."""

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0):
        self.total, self.desc, self.unit, self.n, self.initial, self.shown = total, desc, unit, initial, initial, ""
        self.started = self.told = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n = min(self.n + n, self.total)
        now = time.monotonic()
        if now - self.told >= EVERY:
            self.told = now
            spent = now - self.started
            left = spent / max(1, self.n - self.initial) * (self.total - self.n)
            shown = f"; {self.shown}" if self.shown else ""
            print(f"{self.desc}: {self.n} of {self.total} {self.unit}s, {duration(spent)}, about {duration(left)} left{shown}", flush=True)

    def set_postfix_str(self, text: str) -> None:
        self.shown = text

    def close(self) -> None:
        """Nothing more is said."""


def progress(total: int, desc: str, unit: str, *, shown: bool = True, initial: int = 0) -> Any:
    """A bar of the main rank with `update`, `set_postfix_str` and `close`: drawn on a screen, told in lines in a pipe."""
    if shown and is_main() and not sys.stderr.isatty():
        return Lines(total, desc, unit, initial)
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not (shown and is_main()), leave=False)


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 8 s, 3 min, 2.4 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left, the others to the right; cells of a row that has but two go on to the end of the line."""
    wide = [row for row in (head, *rows) if len(row) > 2 or row is head]
    widths = [max((len(row[k]) for row in wide if k < len(row)), default=0) for k in range(max(map(len, wide)))]
    widths[0] = max(len(row[0]) for row in (head, *rows))
    lines = []
    for row in (head, *rows):
        if len(row) == 2 and row is not head:
            lines.append(f"{row[0]:<{widths[0]}}  {row[1]}")
        else:
            lines.append("  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))]).rstrip())
    return "\n".join(lines)


def means_table(evaluations: Mapping[str, Mapping[str, float]], *more: tuple[str, str]) -> str:
    """Means of each set of weights, a column a reward (its classes are in the report), "-" where none is known, and further rows of a name and a text."""
    rewards = [n for n in dict.fromkeys(n for means in evaluations.values() for n in means) if "/" not in n]
    rows = [
        [name, *(f"{means[r]:.4g}" if math.isfinite(means.get(r, math.nan)) else "-" for r in rewards)]
        for name, means in evaluations.items()
    ]
    return table(["", *rewards], [*rows, *map(list, more)])


# ---------------------------------------------------------------------------------------------------- last words


def first_to_say(text: str) -> bool:
    """Whether no other rank of this machine has said the same: they often find one fault together, and one message will do."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun makes a folder a rank, beside each other
    if not file:
        return is_main()
    try:
        (Path(file).parents[1] / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}").open("x").close()
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


AFTER = "import os, select, sys\nwatch = select.poll()\nwatch.register(int(sys.argv[1]), select.POLLIN)\nwatch.poll(60000)\nsys.stderr.write(sys.argv[2])"


def last_word(text: str) -> None:
    """Say on stderr why the job ends, once a machine; under torchrun once more when torchrun itself has ended, whose own report of a failed rank comes after
    ours and has no switch. The message stands in that report, too."""
    file, text = os.environ.get("TORCHELASTIC_ERROR_FILE"), legible(text)
    if file:
        told = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": told}))
    if not first_to_say(text):
        return
    print(text, file=sys.stderr, flush=True)
    if not file or not hasattr(os, "pidfd_open"):
        return
    with suppress(OSError):  # torchrun is gone already
        watched = os.pidfd_open(os.getppid())
        command = [sys.executable, "-S", "-E", "-c", AFTER, str(watched), text + "\n"]
        subprocess.Popen(command, pass_fds=[watched], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
