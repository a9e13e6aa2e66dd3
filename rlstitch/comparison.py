"""Several runs or evaluations on one page: curves, a table of differences, pictures side by side, where the recipes differ. `launch/compare.py` writes it."""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlstitch import config as cfg
from rlstitch import metrics, report, telling
from rlstitch.evaluation import differing
from rlstitch.files import read_json, write_text
from rlstitch.paths import home, what_is
from rlstitch.types import UserError

APART = ("name", "seed", "out", "resume", "threads", "logging", "check", "progress")  # keys by which two runs of one recipe may differ

Line = list[tuple[float, float]]


@dataclass
class Side:
    """A run or an evaluation. means: by judge; scores: by judge, of every picture, where they are kept; curves: by name, against the device-hours of training;
    stitching: those that the value models took before, once."""

    folder: Path
    recipe: dict[str, Any]
    means: dict[str, float]
    base: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Line] = field(default_factory=dict)
    hours: float = math.nan
    stitching: float = 0.0
    unit: str = "hours"

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def scores(self) -> dict[str, list[float | None]]:
        return self.result.get("scores", {})


@dataclass
class Group:
    """The runs of one recipe, by seed; or a single evaluation."""

    label: str
    sides: list[Side]
    hue: str
    stitched: bool


def read(path: str) -> Side:
    """Raises UserError where a folder is neither a finished run nor an evaluation."""
    folder = home(path)
    if what_is(folder) != "a folder":
        raise UserError(f"{path} is {what_is(folder) or 'not there'}: name folders of runs or evaluations")
    if what_is(folder / "recipe.yaml") != "a file":
        raise UserError(f"{path} is neither a run nor an evaluation: it has no recipe.yaml")
    recipe = cfg.compose(str(folder / "recipe.yaml"))
    if what_is(folder / "summary.json"):
        return _run(folder, recipe)
    if what_is(folder / "evaluation.json") and isinstance(
        (found := read_json(folder / "evaluation.json", "the evaluation")).get("settings"), dict
    ):
        return Side(folder, recipe, _numbers(found.get("means")), result=found)
    raise UserError(
        f"{path} has no summary.json yet, which a run writes when it ends"
        if what_is(folder / "checkpoints")
        else f"{path} holds no results that can be compared"
    )


def _run(folder: Path, recipe: dict[str, Any]) -> Side:
    summary = read_json(folder / "summary.json", "the run's summary")
    evaluations = summary.get("eval") if isinstance(summary.get("eval"), dict) else {}
    last = next((evaluations[k] for k in ("ema", "raw") if k in evaluations), {})
    rows = metrics.read(folder)
    unit = next((key for row in reversed(rows) for key in row if key.endswith("_hours")), "hours")
    stitching = _numbers(summary.get("device_hours")).get("stitching", 0.0)
    timed = [
        (row[unit]["total"] - stitching, row)
        for row in rows
        if isinstance(row.get(unit), dict) and isinstance(row[unit].get("total"), int | float)
    ]
    curves: dict[str, Line] = {}
    for group in ("eval", "rewards"):
        for hours, row in timed:
            for name, value in _numbers(row.get(group)).items():
                if "/" not in name:
                    curves.setdefault(name if group == "eval" else f"{name}, while training", []).append((hours, value))
    return Side(
        folder, recipe, _numbers(last), _numbers(evaluations.get("base")), curves=curves, hours=timed[-1][0] if timed else math.nan,
        stitching=stitching, unit=unit.replace("_", "-"),
    )  # fmt: skip


def _numbers(found: Any) -> dict[str, float]:
    pairs = found.items() if isinstance(found, dict) else ()
    return {k: float(v) for k, v in pairs if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}


def grouped(sides: Sequence[Side]) -> list[Group]:
    """Runs that differ in nothing but their name and seed together, in the order given."""
    groups: dict[str, Group] = {}
    for side in sides:
        key = (
            side.folder.as_posix() if side.result else repr(sorted(flat({k: v for k, v in side.recipe.items() if k not in APART}).items()))
        )
        if key not in groups:
            algorithm = str((side.recipe.get("algorithm") or {}).get("_target_", "")).rsplit(".", 1)[-1]
            stitched = "Stitched" in str((side.recipe.get("oracle") or {}).get("_target_", ""))
            groups[key] = Group(side.name, [], algorithm or side.name, stitched)
        groups[key].sides.append(side)
    for group in groups.values():
        if len(group.sides) > 1:
            group.label = f"{_common([side.name for side in group.sides])} ({len(group.sides)} seeds)"
    return list(groups.values())


def _common(names: list[str]) -> str:
    """What names begin with, without a separator at its end; the first where they have nothing in common."""
    start = names[0]
    while start and not all(name.startswith(start) for name in names):
        start = start[:-1]
    return start.rstrip("-_. ") or names[0]


def flat(node: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {where: node}
    return {key: value for k, v in node.items() for key, value in flat(v, f"{where}.{k}" if where else str(k)).items()}


# ---------------------------------------------------------------------------------------------------- figures


def spread(values: Sequence[float]) -> str:
    """The mean, with the standard deviation over seeds."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def paired(first: Side, other: Side, judge: str) -> str:
    """The mean difference of two evaluations over their prompts, with its standard error: the noise of a prompt is the same in both."""
    a, b = first.scores.get(judge, []), other.scores.get(judge, [])
    per = other.result["settings"]["sampling"]["images_per_prompt"]
    found = [y - x for x, y in zip(a, b) if x is not None and y is not None]
    if len(a) != len(b) or len(found) < 2 or len(found) % per or len(found) != len(a):
        return "-"
    by_prompt = [statistics.fmean(found[k : k + per]) for k in range(0, len(found), per)]
    error = statistics.stdev(by_prompt) / len(by_prompt) ** 0.5 if len(by_prompt) > 1 else math.nan
    return f"{statistics.fmean(by_prompt):+.4g} ± {error:.2g}"


def results(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: judges side by side, the base of the runs first, then every group, and of evaluations their difference from the first."""
    judges = [j for j in dict.fromkeys(j for g in groups for s in g.sides for j in (*s.base, *s.means)) if "/" not in j]
    bases = {tuple(round(side.base.get(j, math.nan), 6) for j in judges): side.base for g in groups for side in g.sides if side.base}
    rows = [["base", *(f"{base[j]:.4g}" if j in base else "-" for j in judges), ""] for base in bases.values()]
    evaluations = [g.sides[0] for g in groups if g.sides[0].result]
    for group in groups:
        hours = [s.hours for s in group.sides if math.isfinite(s.hours)]
        rows.append([group.label, *(spread([s.means[j] for s in group.sides if j in s.means]) for j in judges), spread(hours)])
        if (side := group.sides[0]).result and side is not evaluations[0]:
            rows.append([f"  - {evaluations[0].name}", *(paired(evaluations[0], side, j) for j in judges), ""])
    return ["", *judges, "hours of training"], rows


def notes(groups: Sequence[Group]) -> list[str]:
    """What keeps figures from being compared: evaluations whose settings differ in more than the model and its LoRA."""
    evaluations = [g.sides[0] for g in groups if g.sides[0].result]
    said = []
    for side in evaluations[1:]:
        apart = [
            d for d in differing(evaluations[0].result, side.result) if not d.startswith(("model.", "lora", "files.model", "files.lora"))
        ]
        said += [
            f"{evaluations[0].name} and {side.name} differ in {'; '.join(apart[:6])}{'...' if len(apart) > 6 else ''}: their scores do not compare model with model"
        ] * bool(apart)
    settings = {
        group.label: {
            k: v
            for k, v in flat(group.sides[0].recipe.get("evaluation") or {}).items()
            if k in ("num_steps", "shift", "spacing", "guidance", "seed", "prompts", "max_prompts")
        }
        for group in groups
        if not group.sides[0].result
    }
    first = next(iter(settings), "")
    said += [
        f"{first} and {label} were evaluated otherwise ({', '.join(k for k in own if own[k] != settings[first].get(k))})"
        for label, own in settings.items()
        if own != settings[first]
    ]
    once = {round(s.stitching, 4): s.unit for g in groups for s in g.sides if s.stitching}
    said += [
        f"value models were stitched before, once: {hours:g} {unit}, which are not in the hours of training" for hours, unit in once.items()
    ]
    return said


# ---------------------------------------------------------------------------------------------------- the page


def averaged(lines: Sequence[Line]) -> tuple[Line, Line, Line]:
    """(mean, lowest, highest) of the lines of several seeds where all of them are known, straight between their points."""
    low, high = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    places = sorted({x for line in lines for x, _ in line if low <= x <= high})
    at = [[_between(line, x) for line in lines] for x in places]
    return tuple([(x, pick(values)) for x, values in zip(places, at)] for pick in (statistics.fmean, min, max))  # type: ignore[return-value]


def _between(line: Line, x: float) -> float:
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return line[-1][1]


def plot(name: str, groups: Sequence[Group], unit: str, width: int = 620, height: int = 300) -> str:
    """A curve a group against device-hours: hue by method, solid with a stitched value, dashed without; a band over the seeds; labels at the lines' ends."""
    drawn = []
    hues = list(dict.fromkeys(g.hue for g in groups))
    for group in groups:
        lines = [sorted(s.curves[name]) for s in group.sides if len(s.curves.get(name, ())) > 1]
        if lines:
            window = max(1, min(map(len, lines)) // 12)
            lines = [report.running_mean(line, window) for line in lines]
            drawn.append((group, *(averaged(lines) if len(lines) > 1 else (lines[0], [], []))))
    if not any(mean for _, mean, *_ in drawn):
        return ""
    points = [p for _, mean, low, high in drawn for p in (*mean, *low, *high)]
    left, top, right, bottom = 54, 30, 190, 40
    x1, y0, y1 = max(x for x, _ in points) or 1.0, min(y for _, y in points), max(y for _, y in points)
    pad = 0.06 * (y1 - y0) or 0.5
    y0, y1 = y0 - pad, y1 + pad

    def at(x: float, y: float) -> str:
        return f"{left + x / x1 * (width - left - right):.1f},{height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top):.1f}"

    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{html.escape(name)}">']
    out.append(f'<text x="{left}" y="18" font-weight="bold">{html.escape(name)}</text>')
    for y in report.ticks(y0, y1):
        x, py = at(0, y).split(",")
        out.append(
            f'<line x1="{x}" x2="{width - right}" y1="{py}" y2="{py}" stroke="#e2e8f0"/><text x="{left - 6}" y="{float(py) + 4}" text-anchor="end">{y:.4g}</text>'
        )
    for x in report.ticks(0, x1):
        out.append(f'<text x="{at(x, y0).split(",")[0]}" y="{height - bottom + 16}" text-anchor="middle">{x:.4g}</text>')
    ends: list[tuple[float, float, str, str]] = []
    for group, mean, low, high in drawn:
        colour = report.COLOURS[hues.index(group.hue) % len(report.COLOURS)]
        if low:
            out.append(f'<polygon points="{" ".join(at(*p) for p in (*low, *reversed(high)))}" fill="{colour}" fill-opacity="0.15"/>')
        dashes = "" if group.stitched or group.sides[0].result else ' stroke-dasharray="6 4"'
        out.append(f'<polyline points="{" ".join(at(*p) for p in mean)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        x, y = map(float, at(*mean[-1]).split(","))
        ends.append((y, x, colour, group.label))
    previous = -math.inf
    for y, x, colour, label in sorted(ends):
        previous = max(y, previous + 14)
        out.append(f'<text x="{x + 8}" y="{previous + 4:.1f}" fill="{colour}">{html.escape(label[:28])}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{html.escape(unit)}</text>')
    return "".join(out) + "</svg>"


def pictures(groups: Sequence[Group]) -> str:
    """Grids of the runs, and the first pictures of the evaluations, prompt by prompt."""
    shown = []
    for group in groups:
        side = group.sides[0]
        for title, file in (
            ((f"{side.name}: base", "base.png"), (f"{side.name}: finetuned", "ema.png")) if not side.result else ((side.name, None),)
        ):
            path = side.folder / "samples" / file if file else side.folder / "grid.png"
            if path.is_file():
                data = base64.b64encode(path.read_bytes()).decode()
                shown.append(
                    f'<figure><figcaption>{html.escape(title)}</figcaption><img src="data:image/png;base64,{data}" alt="{html.escape(title)}"></figure>'
                )
    return f'<div class="row">{"".join(shown)}</div>'


def recipes(groups: Sequence[Group]) -> str:
    """A table of the keys in which the groups' recipes differ."""
    told = {g.label: flat({k: v for k, v in g.sides[0].recipe.items() if k not in APART}) for g in groups}
    keys = [k for k in dict.fromkeys(k for own in told.values() for k in own) if len({repr(own.get(k)) for own in told.values()}) > 1]
    if not keys:
        return "<p>None: they differ in seed and name alone.</p>"
    head = "".join(f"<th>{html.escape(label)}</th>" for label in told)
    rows = "".join(
        f"<tr><td>{html.escape(k)}</td>" + "".join(f"<td>{html.escape(str(own.get(k, '')))[:120]}</td>" for own in told.values()) + "</tr>"
        for k in keys
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def page(groups: Sequence[Group]) -> str:
    head, rows = results(groups)
    body = ["<h1>Comparison</h1>", *(f"<p><b>{html.escape(note)}.</b></p>" for note in notes(groups))]
    cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"  # noqa: E731
    body.append(f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in rows)}</table>")
    if any(len(g.sides) > 1 for g in groups):
        body.append("<p>± is the standard deviation over seeds; of differences, the standard error over prompts.</p>")
    names = dict.fromkeys(name for g in groups for s in g.sides for name in s.curves)
    curves = [plot(name, groups, f"{next(s.unit for g in groups for s in g.sides if s.curves)} of training") for name in names]
    body += ["<h2>Curves</h2>", *filter(None, curves)] * any(curves)
    body += ["<h2>Pictures: the same prompts and noise</h2>", pictures(groups), "<h2>Where the recipes differ</h2>", recipes(groups)]
    style = "<style>.row{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(340px,1fr);gap:1em;overflow-x:auto}body{max-width:1400px}</style>"
    return report.page("Comparison", [style, *body])


def run(arguments: Sequence[str]) -> str:
    """Write the page; -> the table and where the page is. Arguments: folders, and out=FILE."""
    options = cfg.parse_overrides([a for a in arguments if "=" in a])
    out = home(str(options.pop("out", "comparison.html")))
    if options:
        raise UserError(f"unknown option {', '.join(options)}: give folders of runs or evaluations, and out=FILE")
    folders = [a for a in arguments if "=" not in a]
    if len(folders) < 2:
        raise UserError("name two or more folders of runs or evaluations")
    if out.suffix != ".html" or what_is(out) not in ("", "a file"):
        raise UserError(f"out is {out}: name an .html file")
    sides, faults = [], []
    for folder in folders:
        try:
            sides.append(read(folder))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    groups = grouped(sides)
    write_text(out, page(groups))
    head, rows = results(groups)
    return "\n".join([telling.table(head, rows), *notes(groups), f"written to {out}"])
