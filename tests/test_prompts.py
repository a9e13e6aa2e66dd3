"""Prompt files as people have them: every format gives the same prompts, and a file of another kind than its name is refused with what to do."""

import csv
import json
import os

import pytest

from rlstitch.prompts import read_prompts
from rlstitch.types import UserError

# Two prompts that splitlines() would make twelve of, one with a quote and a comma, one that is a number in words.
PROMPTS = ["a red\u2028cat\u2029on\x85a\x0bmat\x0cat night", 'a sign, "Very Deep", in the rain', "42"]
SOME = PROMPTS[1:]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return str(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_format_gives_the_same_prompts(tmp_path, end):
    lines = [json.dumps({"n": k, "prompt": p}) for k, p in enumerate(PROMPTS)]
    raw = [json.dumps({"prompt": p}, ensure_ascii=False) for p in PROMPTS]

    def table(separator, header):
        with (tmp_path / "made").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=separator, lineterminator=end).writerows(
                [header, *((str(k), f" {p} ") for k, p in enumerate(PROMPTS))]
            )
        return (tmp_path / "made").read_text(encoding="utf-8") if end == "\n" else (tmp_path / "made").read_bytes()

    for name, content in {
        "a.txt": "\ufeff" + end.join(["", *(f"  {p}\ufeff" for p in PROMPTS), " ", ""]),
        "noending": end.join(PROMPTS),
        "a.jsonl": end.join([*lines[:1], "", *lines[1:]]),
        "A.NDJSON": end.join(raw) + end,
        "a.json": json.dumps(PROMPTS),
        "b.Json": json.dumps([{"Text": p} for p in PROMPTS], indent=1).replace("\n", end),
        "c.json": json.dumps({"version": 2, "prompts": [{"caption": p} for p in PROMPTS]}),
        "a.CSV": table(",", ("n", "Prompt")),
        "a.tsv": table("\t", ("Category", "Caption")),
    }.items():
        found = read_prompts(write(tmp_path / name, content))
        assert found.prompts == PROMPTS, name
        assert [row["prompt"] for row in found.rows] == PROMPTS
    assert read_prompts(str(tmp_path / "a.jsonl")).rows[1]["n"] == 1 and read_prompts(str(tmp_path / "a.CSV")).rows[2]["n"] == "2"


def test_quotes_of_a_tsv_and_lines_within_a_cell(tmp_path):
    parti = 'Prompt\tCategory\n"Hello" on a wall\tArt\na 5" pipe\tArt\n'
    assert read_prompts(write(tmp_path / "parti.tsv", parti)).prompts == ['"Hello" on a wall', 'a 5" pipe']
    assert read_prompts(write(tmp_path / "two.csv", 'id,prompt\n1,"a cat\nin a ""hat"""\n,\n')).prompts == ['a cat\nin a "hat"']


def test_a_column_of_ones_own(tmp_path):
    path = write(tmp_path / "a.csv", "Name,prompt\nfirst,one\nsecond,two\n")
    assert read_prompts(path).prompts == ["one", "two"] and read_prompts(path, "name").prompts == ["first", "second"]
    assert read_prompts(path, "Name").rows[0] == {"Name": "first", "prompt": "first"}
    with pytest.raises(UserError, match=r"no column 'title'; it has 'Name', 'prompt'. Name the one .* `column`"):
        read_prompts(path, "title")
    with pytest.raises(UserError, match="no column named prompt, text, caption or prompts; it has 'title', 'url'"):
        read_prompts(write(tmp_path / "b.jsonl", '{"title": "x"}\n{"url": "y"}'))


REFUSED = {
    "empty.txt": ("\n  \n", "holds no prompt"),
    "header.csv": ("prompt,n\n", "holds no prompt"),
    "empty.json": ("", "holds no prompt"),
    "latin.txt": (b"ok\n\xff\xfe bad", "not UTF-8.*0xff in line 2"),
    "nul.txt": (b"ok\nb\0ad", "not text: NUL in line 2"),
    "utf16.txt": ("a cat".encode("utf-16"), "UTF-16.*save it as UTF-8"),
    "mac.txt": ("one\rtwo", r"line 1: lines end with \\r alone"),
    "packed.jsonl": (b"\x1f\x8b\x08\0", "gzip: unpack"),
    "packed.jsonl.gz": (b"\x1f\x8b\x08\0", "gzip: unpack"),
    "sheet.csv": (b"PK\x03\x04\x14", "zip archive.*save the sheet as .csv"),
    "table.txt": (b"PAR1\x15", "parquet: name it .parquet"),
    "page.txt": ("<!DOCTYPE html><html>", "a web page: download"),
    "pointer.txt": ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "set.yaml": ("- a cat", "named .yaml is not read"),
    "portable.txt": ("\n%PDF-1.4\n1 0 obj", "a PDF"),
    "rich.txt": ("\ufeff{\\rtf1 a cat}", "RTF: save it as plain text"),
    "array.txt": ('["a cat",\n"a dog"]', "looks like .json"),
    "pretty.txt": ('[\n "a cat"\n]', "looks like .json"),
    "cut.txt": ('[\n "a cat",', "looks like .json"),
    "objects.txt": ('{"prompt": "x"}\n', "looks like .json or .jsonl"),
    "parti.txt": ("Prompt\tCategory\na cat\tArt", "looks like .tsv"),
    "tabs.txt": ("a cat\tArt\na dog\tArt", "looks like .tsv without a first line"),
    "cells.txt": ('"id","prompt"\n1,a cat', "looks like .csv"),
    "one.txt": ("prompt\na cat", "looks like .csv"),
    "array.jsonl": ('["a"]', "one array.*name it .json"),
    "lines.json": ('{"prompt": "x"}\n{"prompt": "y"}', "name it .jsonl"),
    "two.json": ('{"a": ["x"], "b": ["y"]}', r"2 lists \(a, b\)"),
    "map.json": ('{"a": "x"}', "no list"),
    "number.json": ("5", "holds 5: write an array"),
    "mixed.json": ('["a", 5]', "item 2: needs a string or an object, not 5"),
    "broken.jsonl": ('{"prompt": "x"}\n{oops', "line 2: not JSON"),
    "control.jsonl": ('{"prompt": "x\x0cy"}', "line 1: not JSON.*control character"),
    "surrogate.jsonl": ('{"prompt": "x \\ud83d"}', "line 1: not JSON.*surrogates not allowed"),
    "factsurrogate.jsonl": ('{"prompt": "x", "tag": ["\\udc00"]}', "line 1: not JSON.*surrogates not allowed"),
    "escaped.jsonl": ('{"prompt": "x\\u0000"}', "line 1: needs a non-empty string.*NUL"),
    "deep.jsonl": ('{"prompt": "x", "a": ' + "[" * 200_000 + "}", "line 1: not JSON.*recursion"),
    "deep.json": ("[" * 200_000, "not JSON.*recursion"),
    "huge.jsonl": ('{"prompt": "x", "n": ' + "9" * 5000 + "}", "line 1: not JSON.*4300"),
    "twice.jsonl": ('{"prompt": "x", "prompt": "y"}', "line 1: not JSON.*twice"),
    "case.jsonl": ('{"Prompt": "x", "PROMPT": "y"}', "2 columns named 'Prompt' and 'PROMPT'"),
    "int.jsonl": ('{"prompt": 5}', r"line 1: needs a non-empty string under 'prompt', not 5 \(int\)"),
    "bool.jsonl": ('{"prompt": "a"}\n{"prompt": true}\n{"text": "b"}', r"line 2: needs.*not True \(bool\) \(1 more rows"),
    "blank.jsonl": ('{"text": " \\u2028"}', "line 1: needs a non-empty string under 'text', not an empty one"),
    "ragged.csv": ("prompt,n\na cat, in a hat,1\n", "line 2: 3 cells, but the first line names 2"),
    "cell.csv": ("prompt,n\nx,1\n ,2\n", "line 3: needs a non-empty string"),
    "quote.csv": ('prompt,n\n"a cat,1\n', "not a table that can be read"),
    "names.csv": ("prompt,prompt\na,b\n", "names a column twice"),
    "semicolons.csv": ("prompt;n\na;1\n", "parted by semicolons, not by commas"),
    "tabs.csv": ("prompt\tn\na\t1\n", r"parted by tabs \(.tsv\)"),
    "commas.tsv": ("prompt,n\na,1\n", r"parted by commas \(.csv\)"),
    "json.csv": ('[{"prompt": "x"}]', "looks like .json"),
    "text.parquet": ("a cat", "parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_another_kind_is_refused_with_what_to_do(tmp_path, name):
    content, message = REFUSED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"(?s){message}") as error:
        read_prompts(path)
    assert path in str(error.value) and len(str(error.value)) < 600


def test_only_regular_files_are_read(tmp_path):
    write(tmp_path / "a.txt", "x")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for name, message in (
        ("", "a folder"),
        ("pipe.txt", "a pipe, not a file"),
        ("loop.txt", "symbolic links"),
        ("missing.txt", "Beside it: a.txt"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(str(tmp_path / name))


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.Parquet"
    parquet.write_table(pyarrow.table({"image": [b"\0", b"\1"], "Caption": SOME, "n": [1, 2], "empty": [None, None]}), path)
    found = read_prompts(str(path))
    assert found.prompts == SOME and found.rows[0] == {"Caption": SOME[0], "n": 1, "empty": None, "prompt": SOME[0]}
    with pytest.raises(UserError, match=r"row 1: needs a non-empty string under 'n', not 1 \(int\)"):
        read_prompts(str(path), "n")
    with pytest.raises(UserError, match="row 1: needs a non-empty string under 'empty', not nothing"):
        read_prompts(str(path), "empty")


def test_parquet_without_its_reader_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'rlstitch\[parquet\]'"):
        read_prompts(write(tmp_path / "a.parquet", b"PAR1"))
