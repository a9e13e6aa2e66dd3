"""Plots of the report: round ticks inside the range, and long noisy lines drawn with their running mean."""

import json

import pytest

from rlstitch.report import COLOURS, line_plot, running_mean, ticks, write


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.41, 0.73, [0.5, 0.6, 0.7]),
        (-3.0, 9.0, [-2.5, 0, 2.5, 5, 7.5]),
        (6.52, 7.55, [6.75, 7.0, 7.25, 7.5]),
        (0.0, 4e-4, [0, 1e-4, 2e-4, 3e-4, 4e-4]),
    ],
)
def test_ticks_are_round_and_inside(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_running_mean_by_hand():
    line = [(0.0, 0.0), (1.0, 3.0), (2.0, 0.0), (3.0, 9.0)]
    assert running_mean(line, 3) == [(0.0, 0.0), (1.0, 1.0), (2.0, 4.0), (3.0, 9.0)]
    straight = [(float(k), 2.0 * k) for k in range(9)]
    assert running_mean(straight, 5) == straight and not running_mean([], 5)


def test_only_long_lines_are_smoothed_and_only_several_have_a_legend():
    short, long = [(float(k), float(k % 3)) for k in range(10)], [(float(k), float(k % 3)) for k in range(50)]
    assert line_plot({"a": short}, x_label="x", y_label="y").count("<path") == 1
    plot = line_plot({"a": short, "b": long}, x_label="x", y_label="a < b", offset=4.0)
    assert plot.count("<path") == 3 and 'stroke-opacity="0.25"' in plot
    assert "stitching" in plot and ">b</text>" in plot and "a &lt; b" in plot
    assert line_plot({"a": []}, x_label="x", y_label="y") == "<p>y: no data.</p>"


HOURS = {"cpu_hours": {"total": 0.1}}
ROWS = {  # of metrics.jsonl, beside two that are whole
    "a whole one": {"step": 1, "rewards": {"clip": 0.5}, "skipped": False, **HOURS},
    "nothing known": {"step": 1, "rewards": {"clip": None}, "skipped": False, **HOURS},
    "skipped": {"step": 1, "rewards": {"clip": None}, "skipped": True, **HOURS},
    "no hours": {"step": 1, "rewards": {"clip": 0.5}},
    "hours of another machine": {"step": 1, "rewards": {"clip": 0.5}, "gpu_hours": {"total": 0.1}},
    "hours that are none": {"step": 1, "rewards": {"clip": 0.5}, "cpu_hours": {"total": float("nan")}},
    "hours of no group": {"step": 1, "rewards": {"clip": 0.5}, "cpu_hours": 3},
    "figures of no group": {"step": 1, "rewards": "x", "eval": [], **HOURS},
    "figures that are none": {"step": 1, "rewards": {"clip": "x"}, "eval": {"clip": True}, **HOURS},
    "a later judge": {"step": 1, "eval": {"later": 0.5}, **HOURS},
    "keys of somebody else": {"step": 1, "foo": 2},
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("alone", [True, False])
def test_a_log_with_odd_rows_still_makes_a_report(tmp_path, case, alone):
    whole = [
        {"step": 0, "eval": {"clip": 0.4}, "cpu_hours": {"total": 0.0}},
        {"step": 2, "rewards": {"clip": 0.6}, "cpu_hours": {"total": 0.2}},
    ]
    rows = [ROWS[case]] if alone else [whole[0], ROWS[case], whole[1]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    summary = {
        "steps": 2,
        "samples": 2,
        "seed": 0,
        "peak_memory_mb": 1.0,
        "device_hours": {"eval": 0.1, "stitching": 0.05},
        "eval": {"ema": {"clip": None}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "recipe.yaml").write_text("name: \u00e9\n", encoding="utf-8")
    page = write(tmp_path).read_text(encoding="utf-8").split("<h2>Recipe")[0]
    assert "nan" not in page.lower() and (alone or page.count("<svg") >= 2)
    assert ('aria-label="later"' in page) == (case == "a later judge")


def test_no_line_is_left_out_where_colours_run_out():
    lines = {f"line {k}": [(0.0, 0.0), (1.0, float(k))] for k in range(len(COLOURS) + 2)}
    plot = line_plot(lines, x_label="x", y_label="y")
    drawn = [part.split("/>")[0] for part in plot.split("<path")[1:]]
    assert len(set(p.partition("stroke=")[2] for p in drawn)) == len(lines)  # each by a colour and dashes of its own
    assert all(f">{name}</text>" in plot for name in lines) and sum("dasharray" in p for p in drawn) == 2


def test_captions_show_the_prompt_cut_and_every_score():
    from rlstitch.metrics import _caption

    assert _caption("two stars | clip 0.5 hps 0.25", 26) == ["two stars", "clip 0.5 hps 0.25"]
    assert _caption("two stars | clip 0.5 aesthetic 6.25 preference_b 0.3", 20) == [
        "two stars",
        "clip 0.5",
        "aesthetic 6.25",
        "preference_b 0.3",
    ]
    long = _caption(" ".join(["circle"] * 20) + " | clip 0.5", 14)
    assert len(long) == 4 and long[2] == "circle circ..." and long[3] == "clip 0.5"
    assert _caption("no scores", 26) == ["no scores"]
