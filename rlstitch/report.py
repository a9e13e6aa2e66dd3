"""report.html: one self-contained page on a run: reward against device-hours, held-out judges, before/after pictures."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

from rlstitch import metrics
from rlstitch.files import write_text

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568", "#d69e2e", "#319795", "#e53e3e")
_STYLE = "body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#1a202c}table{border-collapse:collapse}td,th{padding:.25em .9em;text-align:right;border-bottom:1px solid #e2e8f0}td:first-child,th:first-child{text-align:left}img{max-width:100%;border:1px solid #e2e8f0}figure{margin:1em 0}h2{margin-top:1.6em}svg text{font:12px system-ui,sans-serif}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1em}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def running_mean(line: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each y replaced by the mean of the `window` points around it, of as many on either side: fewer towards the ends, so that a straight line stays one."""
    halves = [min(window // 2, k, len(line) - 1 - k) for k in range(len(line))]
    near = [line[k - half : k + half + 1] for k, half in enumerate(halves)]
    return [(x, sum(y for _, y in part) / len(part)) for (x, _), part in zip(line, near)]


def line_plot(
    series: dict[str, list[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    offset: float = 0.0,
    width: int = 460,
    height: int = 260,
    standalone: bool = False,
) -> str:
    """An SVG of lines under their title, with a legend where there are several; lines of many points are pale, with their running mean over them.
    Where there are more lines than colours, the further ones are dashed.

    `offset` marks where a one-off cost ends on the x axis; `standalone`: a file of its own, with its font and a white ground.
    """
    points = [p for line in series.values() for p in line]
    if not points:
        return f"<p>{html.escape(y_label)}: no data.</p>"
    many = len(series) > 1
    left, top, right = 58, 30, 22
    columns = min(3, max(1, (width - left) // (7 * max(map(len, series)) + 20)))  # of the legend, as its longest name allows
    bottom = 40 + (18 * (-(-len(series) // columns)) if many else 0)
    x0, x1 = 0.0, max(p[0] for p in points) or 1.0
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    pad = 0.06 * (y1 - y0) or 0.5
    y0, y1 = y0 - pad, y1 + pad

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (width - left - right), height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)

    def drawn(line: list[tuple[float, float]], colour: str, dashes: str, opacity: float) -> str:
        path = " ".join(f"{'M' if k == 0 else 'L'}{x:.1f},{y:.1f}" for k, (x, y) in enumerate(place(*p) for p in line))
        return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-opacity="{opacity}"{dashes}/>'

    styles = [
        (COLOURS[k % len(COLOURS)], f' stroke-dasharray="{6 * (k // len(COLOURS))} 3"' * (k >= len(COLOURS))) for k in range(len(series))
    ]

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{html.escape(y_label)}">'
    ]
    if standalone:
        out.append(f'<style>text{{font:12px sans-serif}}</style><rect width="{width}" height="{height}" fill="white"/>')
    if offset > 0:
        px, _ = place(min(offset, x1), y0)
        out.append(
            f'<rect x="{left}" y="{top}" width="{px - left:.1f}" height="{height - bottom - top}" fill="#faf5ff"/><text x="{left + 4}" y="{top + 14}" fill="#6b46c1">stitching</text>'
        )
    out.append(f'<text x="{left}" y="18" font-weight="bold">{html.escape(y_label)}</text>')
    for y in ticks(y0, y1):
        _, py = place(x0, y)
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}" stroke="#e2e8f0"/><text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        )
    for x in ticks(x0, x1):
        px, _ = place(x, y0)
        out.append(f'<text x="{px:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:.4g}</text>')
    for (colour, dashes), line in zip(styles, series.values()):
        if len(line) < 40:
            out.append(drawn(line, colour, dashes, 1.0))
            out += [f'<circle cx="{place(*p)[0]:.1f}" cy="{place(*p)[1]:.1f}" r="2.4" fill="{colour}"/>' for p in line]
        else:
            out += [drawn(line, colour, dashes, 0.25), drawn(running_mean(line, max(5, len(line) // 15)), colour, dashes, 1.0)]
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - bottom + 34}" text-anchor="middle">{html.escape(x_label)}</text>')
    for k, ((colour, dashes), name) in enumerate(zip(styles, series) if many else ()):
        x, y = left + k % columns * (width - left) / columns, height - bottom + 54 + k // columns * 18
        out.append(
            f'<line x1="{x:.0f}" x2="{x + 12:.0f}" y1="{y - 4:.0f}" y2="{y - 4:.0f}" stroke="{colour}" stroke-width="{4 if dashes else 10}"{dashes}/>'
        )
        out.append(f'<text x="{x + 17:.0f}" y="{y:.0f}">{html.escape(name)}</text>')
    return "".join(out) + "</svg>"


def heat_map(table: list[list[float]], *, title: str, x_label: str, y_label: str, x: list[Any], y: list[Any], cell: int = 62) -> str:
    """A standalone SVG of numbers in shaded cells: table[row][column], dark is large."""
    low, high = min(map(min, table)), max(map(max, table))
    left, top = 64, 40
    width, height = left + cell * len(x) + 12, top + cell * len(y) + 48
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">',
        f'<style>text{{font:12px sans-serif}}</style><rect width="{width}" height="{height}" fill="white"/><text x="10" y="20">{html.escape(title)}</text>',
    ]
    for r, row in enumerate(table):
        for c, value in enumerate(row):
            share = (value - low) / (high - low) if high > low else 0.5
            px, py = left + c * cell, top + r * cell
            shade = f"rgb({round(235 - 195 * share)},{round(243 - 140 * share)},{round(250 - 80 * share)})"
            out.append(f'<rect x="{px}" y="{py}" width="{cell - 2}" height="{cell - 2}" fill="{shade}"/>')
            ink = "white" if share > 0.55 else "black"
            out.append(f'<text x="{px + cell / 2 - 1}" y="{py + cell / 2 + 3}" text-anchor="middle" fill="{ink}">{value:.3f}</text>')
    out += [
        f'<text x="{left + c * cell + cell / 2}" y="{top + cell * len(y) + 14}" text-anchor="middle">{html.escape(str(v))}</text>'
        for c, v in enumerate(x)
    ]
    out += [
        f'<text x="{left - 10}" y="{top + r * cell + cell / 2 + 3}" text-anchor="end">{html.escape(str(v))}</text>' for r, v in enumerate(y)
    ]
    out.append(f'<text x="{left + cell * len(x) / 2}" y="{height - 12}" text-anchor="middle">{html.escape(x_label)}</text>')
    out.append(
        f'<text x="14" y="{top + cell * len(y) / 2}" text-anchor="middle" transform="rotate(-90 14 {top + cell * len(y) / 2})">{html.escape(y_label)}</text>'
    )
    return "".join(out) + "</svg>"


def _image(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _figure(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _table(results: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(n for result in results.values() for n in result))
    head = "".join(f"<th>{html.escape(who)}</th>" for who in results)
    rows = "".join(
        f"<tr><td>{html.escape(n)}</td>" + "".join(f"<td>{_figure(result.get(n))}</td>" for result in results.values()) + "</tr>"
        for n in names
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _group(row: dict[str, Any], key: str) -> dict[str, Any]:
    """The figures under a key of a row; none where there are none, as in a row that somebody else wrote."""
    return value if isinstance(value := row.get(key), dict) else {}


def _lines(rows: list[tuple[float, dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
    """(hours, figures by name) as a line a name, of what is known of it."""
    names = dict.fromkeys(name for _, figures in rows for name in figures)
    return {name: [(hours, figures[name]) for hours, figures in rows if _is_number(figures.get(name))] for name in names}


def evaluation_page(name: str, result: dict[str, Any], grid: Path) -> str:
    """A page on the result of an evaluation: means, classes, pictures, settings."""
    means = {"mean": result["means"], "standard error": result["standard_errors"]}
    sampling = result["settings"]["sampling"]
    body = [
        f"<h1>{html.escape(name)}</h1><p>{result['settings']['prompts']['count']} prompts, {sampling['images_per_prompt']} pictures each, {sampling['num_steps']} steps, guidance {sampling['guidance']:g}, {sampling['height']} x {sampling['width']} px.</p>",
        _table(means),
        _image(grid, "the first prompts, with their scores"),
        f"<h2>Settings</h2><pre>{html.escape(json.dumps(result['settings'], indent=1, ensure_ascii=False))}</pre>",
    ]
    return page(name, body)


def page(title: str, body: list[str]) -> str:
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>"


def write(run: Path) -> Path:
    """Write <run>/report.html from metrics.jsonl, summary.json and samples/."""
    # a run may move to another machine
    units = [(next((key for key in row if key.endswith("_hours")), "hours"), row) for row in metrics.read(run)]
    rows = [(hours, row) for unit, row in units if _is_number(hours := _group(row, unit).get("total"))]  # others are no rows of ours
    unit = units[-1][0] if units else "hours"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    offset = summary["device_hours"]["stitching"]
    train = [(hours, row) for hours, row in rows if "rewards" in row and not row.get("skipped")]
    trained = _lines([(hours, _group(row, "rewards")) for hours, row in train])
    told = "The oracle's scores" if trained else "The loss"
    trained = trained or _lines([(hours, {"loss": row.get("loss")}) for hours, row in train])
    judges = {n: line for n, line in _lines([(hours, _group(row, "eval")) for hours, row in rows]).items() if "/" not in n}
    plots = [line_plot({name: line}, x_label=unit.replace("_", "-"), y_label=name, offset=offset) for name, line in trained.items()]
    held = [line_plot({name: line}, x_label=unit.replace("_", "-"), y_label=name, offset=offset) for name, line in judges.items()]
    hours = ", ".join(f"{k} {v:.4f}" for k, v in summary["device_hours"].items())
    body = [
        f"<h1>{html.escape(run.name)}</h1><p>{summary['steps']} updates, {summary['samples']} samples, seed {summary['seed']}, peak memory {summary['peak_memory_mb']:.0f} MB. Device-hours: {hours}.</p>",
        "<h2>Final evaluation</h2>" + _table(summary["eval"]),
        f"<h2>{told} while training</h2><div class=pair>" + "".join(plots) + "</div>",
        "<h2>Clean rewards and held-out judges</h2><div class=pair>" + "".join(held) + "</div>" if held else "",
        "<h2>Before and after, same prompts and noise</h2><div class=pair>"
        + _image(run / "samples" / "base.png", "base model")
        + _image(run / "samples" / "ema.png", "finetuned (EMA)")
        + "</div>",
        f"<h2>Recipe</h2><pre>{html.escape((run / 'recipe.yaml').read_text(encoding='utf-8'))}</pre>",
    ]
    write_text(run / "report.html", page(run.name, body))
    return run / "report.html"
