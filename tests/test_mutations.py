"""The tests' own test: one-line mutations of the rooms that carry maths, of which at least 95 % are caught."""

import pytest

from tests import mutations


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


@pytest.mark.slow
def test_at_least_95_percent_of_the_mutations_are_caught():
    rooms, listed = mutations.read()
    assert len(listed) >= 120
    rows = mutations.campaign(rooms, listed, workers=2, timeout=900)
    alive = [row for row in rows if row["verdict"] == "survived"]
    assert len(alive) <= (1 - mutations.GOAL) * len(rows), alive
