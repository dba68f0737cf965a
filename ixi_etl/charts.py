"""Charts as inline SVG, drawn in the colours of the page around them, so that they suit light, dark and print.

All are 380 units wide: on a phone a unit is a pixel. What they show is said in words in their `aria-label`, and stands
in a table of the page. Series and rows have the classes s0, s1, ... of `templates/base.html`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles

from markupsafe import Markup, escape

WIDTH = 380
LEFT, RIGHT = 116, 44  # of charts with a name at each row; numbers stand on the right
MOST_LEFT = 190  # with long names; what is longer is shortened, and whole in its tooltip
ROW = 24
POINTS = 400  # of a line; longer ones are drawn through means

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]


def bars(rows: Mapping[str, Mapping[str, int]], label: str, marked: str | None = None) -> Markup:
    """A stacked bar for each row, of counts by series, with its sum; the row named `marked` is set off."""
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
    """A row of ticks, one for each value, with the quartiles as a box and the median as a line."""
    rows = {name: [v for v in values if math.isfinite(v)] for name, values in rows.items()}
    rows = {name: values for name, values in rows.items() if values}
    every = [v for values in rows.values() for v in values]
    if not every:
        return Markup()
    ticks = _ticks(min(every), max(every))
    left = _left(rows)
    x_of = _scale((ticks[0], ticks[-1]), (left, WIDTH - 16))
    height, drawn, said = len(rows) * ROW, [], []
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
        places = sorted({round(2 * x_of(v)) / 2 for v in values})
        drawn.append(f'<path class="s{index} line" d="{"".join(f"M{x:g} {top + 7}v{ROW - 14}" for x in places)}"/>')
        drawn.append(f'<path class="middle" d="M{x_of(middle):.1f} {top + 3}v{ROW - 6}"/>')
        said.append(f"{name} {min(values):.4g} to {max(values):.4g}, median {middle:.4g}")
    return _svg(height + 20, f"{label}: {'; '.join(said)}", drawn)


def lines(series: Mapping[str, Points], label: str) -> Markup:
    """A line for each series of (x, y) in order of x; a few points are drawn as dots too. NaN is left out."""
    series = {n: [p for p in points if math.isfinite(p[1])] for n, points in series.items()}
    said = [f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items() if points]
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
        places = [(x_of(x), y_of(y)) for x, y in points]
        drawn.append(f'<polyline class="s{index} line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if len(points) <= 30:
            drawn += [f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    return _svg(height, f"{label}: {'; '.join(said)}", drawn)


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
    """Replace the characters that XML cannot hold, such as a NUL in the name of a site."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _name(left: float, y: float, name: str, attributes: str = "") -> str:
    """The name of a row, which ends left of `left`."""
    shown = name = _readable(name)
    while len(shown) > 1 and _width(shown) > left - 8:
        shown = f"{shown.rstrip('…')[:-1]}…"
    whole = f"<title>{escape(name)}</title>" if shown != name else ""
    return f'<text x="{left - 6:.1f}" y="{y:.1f}" text-anchor="end"{attributes}>{whole}{escape(shown)}</text>'


def _tick(x: float, y: float, text: str) -> str:
    """A number centred under `x`, or as near to it as it fits in."""
    half = _width(text) / 2
    return _text(min(max(x, half), WIDTH - half), y, text, 'text-anchor="middle" class="soft"')


def _left(rows: Mapping[str, object]) -> float:
    """Where bars begin, so that the names have room."""
    return min(max([LEFT, *(_width(name) + 8 for name in rows)]), MOST_LEFT)


def _width(text: str) -> float:
    """At least the width of a text in the charts' font of 12 units, whichever font a browser takes for it."""
    return sum(_ADVANCE.get(letter, 8.0 if letter.isascii() and not letter.isupper() else 12.0) for letter in text)


_ADVANCE = dict.fromkeys("ijlI.,:;'|! ()", 5.0) | dict.fromkeys("mwMW@%", 12.0)


def _scale(values: tuple[float, float], places: tuple[float, float]) -> Scale:
    (low, high), (start, stop) = values, places
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers, the first at or under `low` and the last at or over `high`."""
    span = max(high - low, 1e-6 * max(abs(low), abs(high)))  # values that hardly differ are drawn as equal
    rough = (span if span > sys.float_info.min else 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{k * step:.10g}") for k in range(first, max(last, first + 1) + 1)]


def _thinned(points: Points) -> Points:
    """At most `POINTS` of them: means of equal runs."""
    run = math.ceil(len(points) / POINTS)
    if run == 1:
        return points
    runs = [points[k : k + run] for k in range(0, len(points), run)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]
