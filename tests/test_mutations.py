"""The tests' own test: one-line mutations of the rooms that carry maths, of which at least 95 % are caught."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import mutations
from tests.mutations import Mutation, Only, Seen


def test_the_list_is_read_and_a_mutation_is_undone(tmp_path):
    path, code = tmp_path / "list.txt", tmp_path / "room.py"
    path.write_text(
        "# what\n= sums: tests/test_a.py -k 'not slow'\n\n@ room.py\n- return a + b\n+ return a - b\n-     c = 1\n+     c = 2\n"
    )
    code.write_text("def add(a, b):\n    return a + b\n")
    rooms, (first, second) = mutations.read(path)
    assert rooms == {"sums": ["tests/test_a.py", "-k", "not slow"]} and (first.old, first.new) == ("return a + b", "return a - b")
    assert mutations.faults([first], tmp_path) == [] and "holds 0 times: c = 1" in mutations.faults([second], tmp_path)[0]
    assert first.apply(tmp_path) == "def add(a, b):\n    return a + b\n" and "a - b" in code.read_text()
    with pytest.raises(ValueError, match="line 5: room.py holds 0 times"):
        first.apply(tmp_path)
    path.write_text("= sums: a\n@ room.py\n- x\n- y\n")
    with pytest.raises(ValueError, match="line 4"):
        mutations.read(path)


def test_a_tests_lines_are_seen_in_every_thread_and_of_the_mutated_files_alone(tmp_path):
    seen, room, other = Seen("/tree", ["room.py"], str(tmp_path / "seen.json")), {}, {}
    exec(compile("def add(a):\n    b = a\n    return b\n\n\ndef never():\n    pass\n", "/tree/room.py", "exec"), room)
    exec(compile("def more(a):\n    return a\n", "/tree/other.py", "exec"), other)
    for name, work in (("t::here", lambda: room["add"](other["more"](1))), ("t::there", lambda: other["more"](1))):
        seen.pytest_runtest_protocol(None, None)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        seen.pytest_runtest_logfinish(name)
    seen.pytest_runtest_protocol(None, None)
    room["add"](1)
    seen.pytest_runtest_logfinish("t::again")
    seen.pytest_sessionfinish()
    lines = {name: lines for name, (seconds, lines) in json.loads((tmp_path / "seen.json").read_text()).items() if seconds >= 0}
    every = ["room.py:1", "room.py:2", "room.py:3"]
    assert lines == {"t::here": every, "t::there": [], "t::again": every}


def test_the_tests_that_run_the_line_are_chosen_the_quickest_file_first():
    text = "import a\nx = 1\ny = (\n    2)\n"
    known = {
        "b.py::short": mutations.Test(1.0, {"f.py:2", "f.py:3"}),
        "b.py::long": mutations.Test(9.0, {"f.py:2"}),
        "b.py::never": mutations.Test(30.0, {"f.py:2"}),
        "a.py::slow": mutations.Test(12.0, {"f.py:2", "f.py:4"}),
        "c.py::other": mutations.Test(0.1, {"g.py:2"}),
    }

    def chosen(old, longest=20.0):
        return mutations.chosen(Mutation("room", "f.py", old, "", 0), text, known, longest)

    assert chosen("x = 1") == ["b.py::short", "b.py::long", "a.py::slow"]
    assert chosen("x = 1", longest=5.0) == ["b.py::short"] and chosen("(\n    2)") == ["b.py::short", "a.py::slow"]
    assert chosen("\ny") == ["b.py::short", "b.py::long", "a.py::slow"]  # its first line is the one before
    assert chosen("import a") == ["c.py::other", "b.py::short", "b.py::long", "a.py::slow"]  # run on import: any test may see it
    session = SimpleNamespace(items=[SimpleNamespace(nodeid=name) for name in known])
    Only(["a.py::slow", "b.py::short"]).pytest_collection_finish(session)
    assert [item.nodeid for item in session.items] == ["a.py::slow", "b.py::short"]


def test_a_campaign_says_of_each_mutation_what_became_of_it(tmp_path, monkeypatch, capsys):
    verdicts = {0: "survived", 1: "caught", 2: "broken", 3: "error", 5: "error", -9: "caught", None: "slow"}
    assert {status: mutations.judged(status) for status in verdicts} == verdicts
    (tmp_path / "room.py").write_text("def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return a * 2\n")
    (tmp_path / "test_room.py").write_text(
        "from room import add, twice\n\n\ndef test_add():\n    assert add(1, 2) == 3\n\n\ndef test_twice():\n    twice(1)\n"
    )
    lines = (("return a + b", "return a - b"), ("return a * 2", "return a * 3"), ("def twice", "def thrice"))
    rooms, listed = {"toy": ["test_room.py"]}, [Mutation("toy", "room.py", old, new, k) for k, (old, new) in enumerate(lines)]
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    monkeypatch.setattr(mutations, "PARTS", ("room.py", "test_room.py", "absent.md"))
    monkeypatch.setattr(mutations, "PRELOADED", ["pytest"])
    monkeypatch.setattr(mutations, "read", lambda: (rooms, listed))
    out = str(tmp_path / "rows.jsonl")
    rows = mutations.campaign(rooms, listed, workers=1, timeout=60, out=out)
    assert [row["verdict"] for row in rows] == ["caught", "survived", "broken"] and rows[0]["by"] == "test_room.py::test_add"
    assert rows == [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert "of 1 tests  toy: room.py: return a * 2 -> return a * 3" in capsys.readouterr().out
    assert "a + b" in (tmp_path / "room.py").read_text()  # the tree itself is left alone
    tests = (tmp_path / "test_room.py").read_text()
    (tmp_path / "test_room.py").write_text(tests.replace("    twice(1)", "    assert twice(1) == 2"))
    again = mutations.campaign(rooms, listed, workers=1, timeout=60, out=out)  # with the test that was missing
    assert {row["old"]: row["verdict"] for row in again} == {"return a + b": "caught", "return a * 2": "caught", "def twice": "broken"}
    assert len(Path(out).read_text().splitlines()) == 4  # what was caught before is not tried again
    (tmp_path / "test_room.py").write_text(tests.replace("== 3", "== 4"))
    with pytest.raises(ValueError, match="test_room.py does not pass on the code as it is"):
        mutations.campaign(rooms, listed, workers=1, timeout=60)


@pytest.mark.slow
def test_at_least_95_percent_of_the_mutations_are_caught():
    rooms, listed = mutations.read()
    assert len(listed) >= 120
    rows = mutations.campaign(rooms, listed, workers=2, timeout=300)
    alive = [row for row in rows if row["verdict"] == "survived"]
    assert len(alive) <= (1 - mutations.GOAL) * len(rows), alive
