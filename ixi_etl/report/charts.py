"""Draw charts as inline SVG in the colours of the surrounding page, for light and dark screens and for print.

All charts are 380 units wide; on a phone, a unit is a pixel. Their `aria-label` describes the data, and a table on
the page contains the same data. Series and rows have the classes s0, s1, ... of `templates/page.css`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles

from markupsafe import Markup, escape

WIDTH = 380
LEFT, RIGHT = 116, 44  # margins of charts with a name at each row and numbers on the right
MAX_LEFT = 190  # with long names; longer ones are shortened, with the full name as tooltip
ROW = 24
MARGIN = 12  # around an SVG file
POINTS = 400  # of a line; longer lines are drawn through means

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]


def bars(rows: Mapping[str, Mapping[str, int]], label: str, marked: str | None = None) -> Markup:
    """A stacked bar for each row, of counts by series, with its sum; the row named `marked` is highlighted."""
    sums = {name: sum(parts.values()) for name, parts in rows.items()}
    left = _left(rows)
    scale = (WIDTH - left - RIGHT) / (max(sums.values(), default=0) or 1)
    drawn = []
    for index, (name, parts) in enumerate(rows.items()):
        top, x = index * ROW, float(left)
        kind = ' class="marked"' if name == marked else ""
        drawn.append(_name(left, top + 16, name, kind))
        for series, count in enumerate(parts.values()):
            wide = count * scale
            drawn.append(f'<rect class="s{series}" x="{x:.1f}" y="{top + 3}" width="{wide:.1f}" height="{ROW - 7}"/>')
            x += wide
        drawn.append(_text(x + 5, top + 16, str(sums[name]), kind))
    return _svg(len(rows) * ROW, label + ": " + ", ".join(f"{name} {n}" for name, n in sums.items()), drawn)


def strips(rows: Mapping[str, Sequence[float]], label: str) -> Markup:
    """For each row, one tick per value, a box of the quartiles, and a line at the median. NaN is left out."""
    rows = {name: [v for v in values if math.isfinite(v)] for name, values in rows.items()}
    rows = {name: values for name, values in rows.items() if values}
    all_values = [v for values in rows.values() for v in values]
    if not all_values:
        return Markup()
    ticks = _ticks(min(all_values), max(all_values))
    left = _left(rows)
    x_of = _scale((ticks[0], ticks[-1]), (left, WIDTH - 16))
    height, drawn, summaries = len(rows) * ROW, [], []
    for tick in ticks:
        drawn.append(f'<path class="grid" d="M{x_of(tick):.1f} 0V{height}"/>')
        drawn.append(_tick(x_of(tick), height + 14, f"{tick:g}"))
    for index, (name, values) in enumerate(rows.items()):
        top = index * ROW
        low, middle, high = quantiles(values if len(values) > 1 else [*values, *values], method="inclusive")
        drawn.append(_name(left, top + 16, name))
        drawn.append(
            f'<rect class="s{index} box" x="{x_of(low):.1f}" y="{top + 4}" '
            f'width="{x_of(high) - x_of(low):.1f}" height="{ROW - 8}"/>'
        )
        positions = sorted({round(2 * x_of(v)) / 2 for v in values})
        drawn.append(f'<path class="s{index} line" d="{"".join(f"M{x:g} {top + 7}v{ROW - 14}" for x in positions)}"/>')
        drawn.append(f'<path class="middle" d="M{x_of(middle):.1f} {top + 3}v{ROW - 6}"/>')
        summaries.append(f"{name} {min(values):.4g} to {max(values):.4g}, median {middle:.4g}")
    return _svg(height + 20, f"{label}: {'; '.join(summaries)}", drawn)


def lines(series: Mapping[str, Points], label: str) -> Markup:
    """A line for each series of (x, y), sorted by x; up to 30 points are also drawn as dots. NaN is left out."""
    series = {n: [p for p in points if math.isfinite(p[1])] for n, points in series.items()}
    summaries = [f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items() if points]
    series = {name: _thinned(points) for name, points in series.items() if points}
    xs, ys = ([p[axis] for points in series.values() for p in points] for axis in (0, 1))
    if not xs:
        return Markup()
    up, across = _ticks(min(ys), max(ys)), _ticks(min(0, *xs), max(xs))
    left, height = max(48.0, 10 + max(_width(f"{tick:g}") for tick in up)), 190
    x_of = _scale((across[0], across[-1]), (left, WIDTH - 18))
    y_of = _scale((up[0], up[-1]), (height - 22, 8))
    drawn = []
    for tick in up:
        drawn.append(f'<path class="grid" d="M{left} {y_of(tick):.1f}H{WIDTH - 18}"/>')
        drawn.append(_text(left - 6, y_of(tick) + 4, f"{tick:g}", 'text-anchor="end" class="soft"'))
    for tick in across:
        drawn.append(_tick(x_of(tick), height - 4, f"{tick:,g}"))
    for index, points in enumerate(series.values()):
        positions = [(x_of(x), y_of(y)) for x, y in points]
        drawn.append(f'<polyline class="s{index} line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in positions)}"/>')
        if len(points) <= 30:
            drawn += [f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in positions]
    return _svg(height, f"{label}: {'; '.join(summaries)}", drawn)


def svg_file(panels: Mapping[str, Markup], series: Sequence[str]) -> str:
    """A complete SVG file of bar charts (title -> chart) below each other, with a key of their series.

    It has its own colours, on white, because no page surrounds it.
    """
    drawn, x, y = [], 0.0, 16.0
    for index, name in enumerate(series):
        name = _shortened(_readable(name), WIDTH - 30)
        wide = 30 + _width(name)
        if x and x + wide > WIDTH:
            x, y = 0.0, y + 18
        drawn.append(f'<rect class="s{index}" x="{x:.1f}" y="{y - 10:.1f}" width="10" height="10"/>')
        drawn.append(_text(x + 16, y, name, ""))
        x += wide
    for title, chart in panels.items():
        y += 32
        drawn.append(_text(0, y, title, 'font-weight="700"'))
        height = float(str(chart).partition('viewBox="0 0 ')[2].split('"')[0].split()[1])
        opening_tag = f'<svg x="0" y="{y + 6:.1f}" width="{WIDTH}" height="{height:g}" '
        drawn.append(str(chart).replace("<svg ", opening_tag, 1))
        y += 6 + height
    content = f'<svg x="{MARGIN}" width="{WIDTH}" height="{y:g}">{"".join(drawn)}</svg>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 2 * MARGIN} {y + MARGIN:g}">'
        f'<style>{_FILE_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{content}</svg>\n'
    )


_COLOURS = ("#2f6fb3", "#c0661a", "#2e8b57", "#8a5bb5", "#a8324a", "#6b7280")  # as in page.css
_FILE_STYLE = "svg{font:12px system-ui,sans-serif;fill:#1b1f24}.marked{fill:#b4530a;font-weight:700}" + "".join(
    f".s{index}{{fill:{colour}}}" for index, colour in enumerate(_COLOURS)
)


def _svg(height: float, label: str, drawn: Sequence[str]) -> Markup:
    return Markup('<svg role="img" viewBox="0 0 {} {}" aria-label="{}">{}</svg>').format(
        WIDTH,
        height,
        _readable(label),
        Markup("".join(drawn)),  # noqa: S704 - numbers, and text that _text escaped  # nosec B704
    )


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(_readable(text))}</text>'


def _readable(text: str) -> str:
    """Replace characters that XML does not allow, such as a NUL in the name of a site."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _name(left: float, y: float, name: str, attributes: str = "") -> str:
    """The name of a row, right-aligned to the left of `left`."""
    name = _readable(name)
    shown = _shortened(name, left - 8)
    whole = f"<title>{escape(name)}</title>" if shown != name else ""
    return f'<text x="{left - 6:.1f}" y="{y:.1f}" text-anchor="end"{attributes}>{whole}{escape(shown)}</text>'


def _shortened(text: str, width: float) -> str:
    while len(text) > 1 and _width(text) > width:
        text = f"{text.rstrip('…')[:-1]}…"
    return text


def _tick(x: float, y: float, text: str) -> str:
    """A number centred under `x`, or as near to it as the chart's width allows."""
    half = _width(text) / 2
    return _text(min(max(x, half), WIDTH - half), y, text, 'text-anchor="middle" class="soft"')


def _left(rows: Mapping[str, object]) -> float:
    """The x coordinate where bars begin, leaving room for the names."""
    return min(max([LEFT, *(_width(name) + 8 for name in rows)]), MAX_LEFT)


def _width(text: str) -> float:
    """Upper bound of the width of a text at 12 units, for the fonts that browsers use."""
    return sum(_ADVANCE.get(letter, 8.0 if letter.isascii() and not letter.isupper() else 12.0) for letter in text)


_ADVANCE = dict.fromkeys("ijlI.,:;'|! ()", 5.0) | dict.fromkeys("mwMW@%", 12.0)


def _scale(values: tuple[float, float], positions: tuple[float, float]) -> Scale:
    (low, high), (start, stop) = values, positions
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers from at most `low` to at least `high`."""
    span = max(high - low, 1e-6 * max(abs(low), abs(high)))  # values that differ less are drawn as equal
    rough = (span if span > sys.float_info.min else 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{k * step:.10g}") for k in range(first, max(last, first + 1) + 1)]


def _thinned(points: Points) -> Points:
    """At most `POINTS` points, each the mean of an equal number of neighbours."""
    run = math.ceil(len(points) / POINTS)
    if run == 1:
        return points
    runs = [points[k : k + run] for k in range(0, len(points), run)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]
