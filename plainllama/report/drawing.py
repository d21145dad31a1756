"""Charts as SVG. page.js draws the same ones anew, as wide as the window is."""

import math
from html import escape
from pathlib import Path

from plainllama.report.blocks import short
from plainllama.report.curves import Chart, Line, Point

COLORS = 8  # in style.css; of more curves the next eight are broken lines
LEFT, NARROW, WIDE, HEIGHT = 56, 480, 960, 200  # a wide chart is also higher
EDGE = 14  # at the right of the curves
EARLY = 0.05  # of the way: what is higher there than ever after may be cut off
# of charts, here and in the page; the rest of the page's style is in page.css
STYLE = Path(__file__).with_name("style.css").read_text("utf-8")


def draw(chart: Chart, labels: list[str], lines: list[Line], bare: bool = False) -> str:
    """Return a chart as SVG, with its title and a label for every colour that is in it, which the
    page writes itself where the chart is `bare`."""
    drawn = sorted({line.number for line in lines})
    width = WIDE if chart.wide else NARROW
    height = HEIGHT * 3 // 2 if chart.wide else HEIGHT
    top = 10 if bare else 36 + 18 * len(drawn)
    bottom, right = top + height, width - EDGE
    steps = [point.step for line in lines for point in line.points]
    begin = min(steps) if chart.left is None else chart.left
    end = max(*steps, begin + (chart.axis == "step"))
    low, high, log = limits(chart, lines)

    def across(step: float) -> float:
        return LEFT + (right - LEFT) * (step - begin) / ((end - begin) or 1)

    def down(value: float) -> float:
        share = math.log(value / low, high / low) if log else (value - low) / (high - low)
        return top + height * (1 - share)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 40}" '
             f'role="img" aria-label="{escape(chart.title)}">']
    if not bare:
        parts.append('<rect class="paper" width="100%" height="100%"/>'
                     f'<text class="title" x="4" y="18">{escape(chart.title)}</text>')
        for place, number in enumerate(drawn):
            parts.append(f'<text x="4" y="{38 + 18 * place}"><tspan class="k{number % COLORS}">●'
                         f"</tspan> {escape(labels[number][-60:])}</text>")
    for y in ticks(low, high, log):
        parts.append(f'<path class="rule" d="M{LEFT} {down(y):.1f}H{right}"/>'
                     f'<text class="y" x="{LEFT - 8}" y="{down(y) + 4:.1f}">{short(y)}</text>')
    for x in ticks(begin, end):
        parts.append(f'<text class="x" x="{across(x):.1f}" y="{bottom + 18}">{short(x)}</text>')
    parts.append(f'<text class="y" x="{right}" y="{bottom + 36}">{escape(chart.axis)}</text>')
    # curves that leave it are cut off at the upper and the lower edge of this one
    parts.append(f'<svg y="{top}" width="{width}" height="{height}" '
                 f'viewBox="0 {top} {width} {height}">')
    parts += [draw_line(line, across, down) for line in lines]
    return "".join(parts) + "</svg></svg>"


def alone(svg: str) -> str:
    """A chart as a picture of its own, with its style."""
    return svg.replace(">", f"><style>\n{STYLE}</style>", 1)


def draw_line(line: Line, across, down) -> str:
    """Return a curve as SVG, with its band if it has one. `across` and `down` place its points."""
    def corners(height: str) -> list[str]:
        return [f"{across(point.step):.1f},{down(getattr(point, height)):.1f}"
                for point in line.points]

    mean, low, high = corners("mean"), corners("low"), corners("high")
    drawn = f'<path d="M{" ".join(mean[unjoined(line):])}h0"/>'
    if line.look == "dots":
        drawn += "".join(f'<path class="range" d="M{a} {b}"/>'
                         for a, b in zip(low, high, strict=True) if a != b)
        drawn += "".join('<circle r="3.5" cx="{}" cy="{}"/>'.format(*at.split(",")) for at in mean)
    elif low != high:
        drawn += f'<polygon points="{" ".join(high + low[::-1])}"/>'
    broken = " broken" if line.number >= COLORS else ""
    return f'<g class="curve {line.look}{broken} k{line.number % COLORS}">{drawn}</g>'


def unjoined(line: Line) -> int:
    """Count the points at the begin to which no line leads: a score of the first weights, from
    which a straight line to the next would tell of values that nobody saw."""
    first = line.look == "dots" and len(line.points) > 1 and line.points[0].step == 0
    return 1 if first else 0


def limits(chart: Chart, lines: list[Line]) -> tuple[float, float, bool]:
    """Choose the lowest and the highest value that a chart shows; also whether its scale is
    logarithmic, which it can't be with values that are not positive."""
    points = [point for line in lines for point in line.points]
    later = late(points) if chart.fit else points
    low, high = min(point.low for point in later), max(point.high for point in later)
    if chart.log and low > 0:
        room = max((high / low)**0.05, 1.001)
        return low / room, high * room, True
    low, high = (min(low, 0), max(high, 0)) if chart.zero else (low, high)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1
    return low - (room if low else 0), high + room, False


def late(points: list[Point]) -> list[Point]:
    """Leave out the points of the first EARLY of the way, unless these are all or nearly so."""
    begin, end = min(point.step for point in points), max(point.step for point in points)
    found = [point for point in points if point.step > begin + EARLY * (end - begin)]
    return found if len(found) > 2 else points


def cut_off(chart: Chart, lines: list[Line]) -> float | None:
    """Return the last step at which a curve lies above the chart, None if none does."""
    high = limits(chart, lines)[1]
    above = [point.step for line in lines for point in line.points if point.mean > high]
    return max(above, default=None)


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Choose a few round numbers from `low` to `high`."""
    if log and high / low > 4:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 3, 5, 7) if high / low < 30 else (1, 3)
        marks = [digit * 10.0**power for power in powers for digit in digits]
        marks = [mark for mark in marks if low <= mark <= high]
        return marks[::1 + len(marks) // 10]
    unit = 10.0 ** math.floor(math.log10(((high - low) or 1) / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (unit * m) <= 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
