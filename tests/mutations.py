"""One-line mutations of the rooms that carry maths, each to be caught by the tests of its room.

    python -m tests.mutations [ROOM ...] [check] [workers=2] [timeout=900] [only=TEXT] [out=FILE.json]

tests/mutations.txt holds them: `= ROOM: pytest arguments` begins a room, `@ FILE` names the file, and each `- old` with its `+ new` is one mutation, `old` a part
of one line that stands once in the file (`\\n` for the line's beginning, where that tells it from others). Every room's tests are run on the code as it is first;
then each mutation is put into a copy of the tree and they are run again. A mutation is caught where they fail, or take longer than the time that is allowed.
`check` only asks whether every `old` stands where it should.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT, LIST = Path(__file__).parent.parent, Path(__file__).with_suffix(".txt")
PARTS = ("rlstitch", "tests", "recipes", "launch", "benchmarks", "pyproject.toml", "setup.py", "README.md")  # of the tree, what tests read
PRELOADED = [  # what takes seconds to import, once for all mutations; nothing of ours
    "pytest", "torch", "peft", "accelerate", "safetensors.torch", "omegaconf", "tqdm",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "transformers.models.clip.modeling_clip",
]  # fmt: skip
GOAL = 0.95  # share that must be caught


@dataclass(frozen=True)
class Mutation:
    room: str
    file: str
    old: str
    new: str
    line: int  # of the list

    def __str__(self) -> str:
        return f"{self.room}: {self.file}: {self.old.strip()} -> {self.new.strip() or '(nothing)'}"

    def apply(self, root: Path) -> str:
        """Put it into a tree; -> the file's text before. Raises ValueError where `old` does not stand there exactly once."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"mutations.txt, line {self.line}: {self.file} holds {times} times: {self.old.strip()}")
        path.write_text(text.replace(self.old, self.new))
        return text


def read(path: Path = LIST) -> tuple[dict[str, list[str]], list[Mutation]]:
    """(pytest arguments by room, mutations in the list's order). Raises ValueError with the line at fault."""
    rooms: dict[str, list[str]] = {}
    mutations: list[Mutation] = []
    room = file = ""
    old: str | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        kind, rest = line[:2], line[2:].replace("\\n", "\n")
        if not line.strip() or line.startswith("#"):
            continue
        if (kind == "+ ") != (old is not None) or kind not in ("= ", "@ ", "- ", "+ "):
            raise ValueError(f"mutations.txt, line {number}: `- old` must be followed by `+ new`, and a line begins with =, @, -, + or #")
        if kind == "= ":
            room, _, arguments = (part.strip() for part in rest.partition(":"))
            rooms[room], file = shlex.split(arguments), ""
        elif kind == "@ ":
            file = rest.strip()
        elif kind == "- ":
            old = rest
        else:
            assert old is not None
            if not (room and file and old != rest):
                raise ValueError(f"mutations.txt, line {number}: a mutation needs a room, a file, and a line that differs")
            mutations.append(Mutation(room, file, old, rest, number - 1))
            old = None
    return rooms, mutations


def faults(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """Mutations whose line does not stand in its file exactly once, or that make it no Python."""
    out = []
    for m in mutations:
        path = root / m.file
        text = path.read_text() if path.is_file() else ""
        if (times := text.count(m.old)) != 1:
            out.append(f"mutations.txt, line {m.line}: {m.file} holds {times} times: {m.old.strip()}")
            continue
        try:
            compile(text.replace(m.old, m.new), m.file, "exec")
        except SyntaxError as error:
            out.append(f"mutations.txt, line {m.line}: {m.new.strip()} is no Python ({error.msg})")
    return out


@contextmanager
def copies(count: int) -> Iterator[queue.Queue[Path]]:
    """Trees to mutate, one a worker."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for k in range(count):
            tree = Path(folder) / f"tree-{k}"
            for part in PARTS:
                if (ROOT / part).is_dir():
                    shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
                elif (ROOT / part).exists():
                    tree.mkdir(exist_ok=True)
                    shutil.copy(ROOT / part, tree / part)
            trees.put(tree)
        yield trees


def run(tree: Path, arguments: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """(pytest's exit status, None after too long; the end of what it said) of a room's tests in a tree."""
    scratch, said = tree.with_name(f"{tree.name}-tmp"), tree.with_name(f"{tree.name}.log")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_tests, args=(str(tree), [f"--basetemp={scratch}", *arguments], str(said)))
    process.start()
    process.join(timeout)
    late = process.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that a test may have started
    process.join()
    shutil.rmtree(scratch, ignore_errors=True)
    return None if late else process.exitcode, said.read_text()[-3000:] if said.exists() else ""


def _tests(tree: str, arguments: list[str], said: str) -> None:
    """A process of its own, forked from one that has the libraries loaded: pytest on the code of `tree` and on no other."""
    os.setsid()
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [tree, *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, Path(tree)))]
    for name in [n for n in sys.modules if n.split(".")[0] in ("rlstitch", "tests", "benchmarks")]:
        del sys.modules[name]
    import pytest

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
    sys.stdout.flush()
    os._exit(code)


def judged(status: int | None) -> str:
    """caught (a test failed, or the process died), slow (caught by the clock), broken (nothing could be imported, which says little of the tests) or survived."""
    return "caught" if status is not None and status < 0 else {0: "survived", 1: "caught", None: "slow", 2: "broken"}.get(status, "error")


def campaign(rooms: dict[str, list[str]], mutations: Sequence[Mutation], *, workers: int, timeout: float) -> list[dict[str, object]]:
    """Every mutation against its room's tests; raises ValueError where a room's tests do not pass without one."""
    if wrong := faults(mutations):
        raise ValueError("\n".join(wrong))
    used = list(dict.fromkeys(m.room for m in mutations))
    with copies(workers) as trees, ThreadPoolExecutor(workers) as pool:

        def tested(job: str | Mutation) -> tuple[str, float, str]:
            tree, began = trees.get(), time.perf_counter()
            before = None
            try:
                before = job.apply(tree) if isinstance(job, Mutation) else None
                status, said = run(tree, rooms[job if isinstance(job, str) else job.room], timeout)
            finally:
                if before is not None:
                    (tree / job.file).write_text(before)
                trees.put(tree)
            return judged(status), time.perf_counter() - began, said

        for room, (verdict, seconds, said) in zip(used, pool.map(tested, used)):
            print(f"{room}: its tests take {seconds:.0f} s", flush=True)
            if verdict != "survived":
                raise ValueError(f"the tests of {room} do not pass on the code as it is:\n{said}")
        rows = []
        for mutation, (verdict, seconds, said) in zip(mutations, pool.map(tested, mutations)):
            print(f"{verdict:9}{seconds:6.0f} s  {mutation}", flush=True)
            if verdict == "error":
                raise ValueError(said)
            by = next((line.split()[1] for line in said.splitlines() if line.startswith("FAILED")), "")
            rows.append(
                {"room": mutation.room, "file": mutation.file, "old": mutation.old, "new": mutation.new, "verdict": verdict, "by": by}
            )
    return rows


def main(arguments: Sequence[str]) -> int:
    options = {"workers": "2", "timeout": "900", "only": "", "out": ""} | dict(a.split("=", 1) for a in arguments if "=" in a)
    rooms, mutations = read()
    asked = [a for a in arguments if "=" not in a and a != "check"]
    if unknown := set(asked) - set(rooms):
        print(f"no such room: {', '.join(sorted(unknown))}; there are {', '.join(rooms)}", file=sys.stderr)
        return 2
    mutations = [m for m in mutations if (not asked or m.room in asked) and options["only"] in str(m)]
    if "check" in arguments:
        print("\n".join(wrong := faults(mutations)) or f"{len(mutations)} mutations of {len(rooms)} rooms fit the code")
        return 1 if wrong else 0
    try:
        rows = campaign(rooms, mutations, workers=int(options["workers"]), timeout=float(options["timeout"]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    alive = [row for row in rows if row["verdict"] == "survived"]
    print(f"\n{len(rows) - len(alive)} of {len(rows)} caught; survived:" if alive else f"\nall {len(rows)} caught")
    for row in alive:
        print(f"  {row['room']}: {row['file']}: {str(row['old']).strip()} -> {str(row['new']).strip()}")
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if len(alive) <= (1 - GOAL) * len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
