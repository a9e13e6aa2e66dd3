"""One-line mutations of the rooms that carry maths, each to be caught by the tests of its room.

    python -m tests.mutations [ROOM ...] [check] [workers=2] [timeout=300] [longest=60] [only=TEXT] [out=FILE.jsonl]

tests/mutations.txt holds them: `= ROOM: pytest arguments` begins a room, `@ FILE` names the file, and each `- old` with its `+ new` is one mutation, `old` a part
of one line that stands once in the file (`\\n` for the line's beginning, where that tells it from others). The rooms' tests are run on the code as it is first,
which tells what each takes and which lines it runs. Then each mutation is put into a copy of the tree, and those of its room's tests that run its line, and take at
most `longest` seconds, are run until one fails, the quick ones first. A mutation is caught where one does, or where all take longer than `timeout` together, and
than five times what they took before.
`out` gets a row a mutation as they come; what it says was caught is not tried again. `check` only asks whether every `old` stands where it should.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import queue
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass
class Test:
    """What the code as it is showed of a test: seconds with its set-up, and the lines `FILE:NUMBER` that it runs."""

    seconds: float
    lines: set[str]


class Seen:
    """A plugin of pytest: keeps of every test what `Test` holds, of the mutated files alone, in a file."""

    def __init__(self, tree: str, files: Sequence[str], path: str):
        self.files, self.path, self.tests = {f"{tree}/{f}": f for f in files}, path, {}

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        self.now: set[str] = set()
        self.began = time.perf_counter()
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        threading.settrace(None)
        self.tests[nodeid] = [time.perf_counter() - self.began, sorted(self.now)]

    def pytest_sessionfinish(self) -> None:
        Path(self.path).write_text(json.dumps(self.tests))

    def _trace(self, frame: Any, event: str, argument: Any) -> Callable[..., Any] | None:
        if (file := self.files.get(frame.f_code.co_filename)) is None:
            return None

        def line(frame: Any, event: str, argument: Any) -> Callable[..., Any]:
            self.now.add(f"{file}:{frame.f_lineno}")
            return line

        return line(frame, event, argument)


class Only:
    """A plugin of pytest: these tests, in this order."""

    def __init__(self, wanted: Sequence[str]):
        self.place = {name: k for k, name in enumerate(wanted)}

    def pytest_collection_finish(self, session: Any) -> None:
        items = session.items
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])


def chosen(mutation: Mutation, text: str, tests: Mapping[str, Test], longest: float) -> list[str]:
    """The tests that run a line of a mutation of `text`, those of the quickest file first; all where it is of none, as what is run on import is."""
    first = text[: text.index(mutation.old)].count("\n") + 1
    lines = {f"{mutation.file}:{first + k}" for k in range(mutation.old.count("\n") + 1)}
    known = {name: test for name, test in tests.items() if test.seconds <= longest}
    known = {name: test for name, test in known.items() if test.lines & lines} or known
    of_file: dict[str, float] = {}
    for name, test in known.items():
        of_file[name.split("::")[0]] = of_file.get(name.split("::")[0], 0.0) + test.seconds
    return sorted(known, key=lambda name: (of_file[name.split("::")[0]], name.split("::")[0], known[name].seconds))


def run(tree: Path, arguments: Sequence[str], timeout: float, plugin: Sequence[Any] = ()) -> tuple[int | None, str]:
    """(pytest's exit status, None after too long; the end of what it said) of tests in a tree; plugin: a class of here and what it is made with."""
    scratch, said = tree.with_name(f"{tree.name}-tmp"), tree.with_name(f"{tree.name}.log")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_tests, args=(str(tree), [f"--basetemp={scratch}", *arguments], str(said), plugin))
    process.start()
    process.join(timeout)
    late = process.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that a test may have started
    process.join()
    shutil.rmtree(scratch, ignore_errors=True)
    return None if late else process.exitcode, said.read_text()[-3000:] if said.exists() else ""


def _tests(tree: str, arguments: list[str], said: str, plugin: Sequence[Any]) -> None:
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

    plain = ["-x", "-q", "-o", "addopts=", "-m", "not slow and not gpu and not hub", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = int(pytest.main([*plain, *arguments], plugins=[plugin[0](*plugin[1:])] if plugin else []))
    sys.stdout.flush()
    os._exit(code)


def judged(status: int | None) -> str:
    """caught (a test failed, or the process died), slow (caught by the clock), broken (nothing could be imported, which says little of the tests) or survived."""
    return "caught" if status is not None and status < 0 else {0: "survived", 1: "caught", None: "slow", 2: "broken"}.get(status, "error")


def surveyed(trees: queue.Queue[Path], pool: ThreadPoolExecutor, rooms: dict[str, list[str]], out: str) -> dict[str, dict[str, Test]]:
    """By room, its tests; each is run once, whatever rooms it is of, and not again where `out` tells of the same file of tests.

    Raises ValueError where one does not pass on the code as it is.
    """
    mutated, kept = sorted({m.file for m in read()[1]}), Path(f"{out}.tests")
    before = json.loads(kept.read_text()) if out and kept.exists() else {}

    def tried(arguments: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        key = shlex.join([hashlib.sha256((ROOT / arguments[0]).read_bytes()).hexdigest(), *arguments])
        if key in before:
            return key, before[key]
        tree = trees.get()
        seen = tree.with_name(f"{tree.name}.json")
        status, said = run(tree, arguments, 1800, (Seen, str(tree), mutated, str(seen)))
        trees.put(tree)
        if judged(status) != "survived":
            raise ValueError(f"{' '.join(arguments)} does not pass on the code as it is:\n{said}")
        print(f"{time.perf_counter() - began:6.0f} s: {' '.join(arguments)}", flush=True)
        return key, json.loads(seen.read_text())

    began = time.perf_counter()
    jobs = {
        room: [(a, *(b for b in arguments if not b.endswith(".py"))) for a in arguments if a.endswith(".py")]
        for room, arguments in rooms.items()
    }
    different = list(dict.fromkeys(job for js in jobs.values() for job in js))
    found = dict(zip(different, pool.map(tried, different)))
    if out:
        kept.write_text(json.dumps(before | dict(found.values())))
    return {
        room: {name: Test(spent, set(lines)) for job in js for name, (spent, lines) in found[job][1].items()} for room, js in jobs.items()
    }


def campaign(
    rooms: dict[str, list[str]], mutations: Sequence[Mutation], *, workers: int, timeout: float, longest: float = 60.0, out: str = ""
) -> list[dict[str, Any]]:
    """Every mutation against its room's tests; raises ValueError where a room's tests do not pass without one."""
    if wrong := faults(mutations, ROOT):
        raise ValueError("\n".join(wrong))
    before = [json.loads(line) for line in Path(out).read_text().splitlines()] if out and Path(out).exists() else []
    done = {(row["file"], row["old"], row["new"]): row for row in before if row["verdict"] != "survived"}
    rows = [done[key] for m in mutations if (key := (m.file, m.old, m.new)) in done]
    mutations = [m for m in mutations if (m.file, m.old, m.new) not in done]
    used = {m.room: rooms[m.room] for m in mutations}
    with copies(workers) as trees, ThreadPoolExecutor(workers) as pool:
        tests = surveyed(trees, pool, used, out)
        for room, known in tests.items():
            spent, short = sum(t.seconds for t in known.values()), sum(t.seconds <= longest for t in known.values())
            print(f"{room}: {len(known)} tests of {spent:.0f} s, {short} of them short enough", flush=True)

        def tried(mutation: Mutation) -> dict[str, Any]:
            tree, began = trees.get(), time.perf_counter()
            text = mutation.apply(tree)
            try:
                names = chosen(mutation, text, tests[mutation.room], longest)
                limit = max(timeout, 5 * sum(tests[mutation.room][n].seconds for n in names))
                status, said = run(tree, list(dict.fromkeys(n.split("::")[0] for n in names)), limit, (Only, names))
            finally:
                (tree / mutation.file).write_text(text)
                trees.put(tree)
            verdict, seconds = judged(status), round(time.perf_counter() - began, 1)
            print(f"{verdict:9}{seconds:6.0f} s of {len(names)} tests  {mutation}", flush=True)
            if verdict == "error":
                raise ValueError(said)
            by = next((line.split()[1] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
            row = {
                "room": mutation.room,
                "file": mutation.file,
                "old": mutation.old,
                "new": mutation.new,
                "verdict": verdict,
                "by": by,
                "seconds": seconds,
            }
            if out:
                with open(out, "a") as file:
                    file.write(json.dumps(row) + "\n")
            return row

        return rows + list(pool.map(tried, mutations))


def main(arguments: Sequence[str]) -> int:
    options = {"workers": "2", "timeout": "300", "longest": "60", "only": "", "out": ""} | dict(
        a.split("=", 1) for a in arguments if "=" in a
    )
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
        timeout, longest = float(options["timeout"]), float(options["longest"])
        rows = campaign(rooms, mutations, workers=int(options["workers"]), timeout=timeout, longest=longest, out=options["out"])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    alive = [row for row in rows if row["verdict"] == "survived"]
    print(f"\n{len(rows) - len(alive)} of {len(rows)} caught; survived:" if alive else f"\nall {len(rows)} caught")
    for row in alive:
        print(f"  {row['room']}: {row['file']}: {str(row['old']).strip()} -> {str(row['new']).strip()}")
    return 0 if len(alive) <= (1 - GOAL) * len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
