"""Curves as SVG."""

import math
import statistics
from html import escape
from pathlib import Path

from plainllama.report.blocks import plain, short
from plainllama.report.runs import is_number

# what is drawn: a title, one metric or a pale and a strong one, factor, log axis?
CHARTS = (
    ("loss, nats per token (pale: training, strong: validation)", ("loss", "val_loss"), 1, True),
    ("validation, bits per byte", ("val_bpb",), 1, True),
    ("learning rate", ("lr",), 1, False),
    ("gradient norm", ("grad_norm",), 1, True),
    ("tokens per second", ("tokens_per_second",), 1, False),
    ("peak memory, GiB", ("peak_memory_bytes",), 2**-30, False),
)
COLORS = ("#3b7dd8", "#e07020", "#1f9d6b", "#b355c0", "#a58300", "#e0455f")  # on white and on black
LEFT, RIGHT, HEIGHT = 70, 458, 200  # of the box in a chart in which the curves lie
STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c1e21; --soft: #666b73; --rule: #ddd }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e6e7e9; --soft: #9aa0a8; --rule: #34383d } }
svg { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
text { font: 14px system-ui, sans-serif; fill: var(--soft) } rect { fill: var(--paper) }
.x { text-anchor: middle } .y { text-anchor: end } .rule { stroke: var(--rule); stroke-width: 1 }
.curve path { stroke: currentColor } .curve polygon { fill: currentColor; opacity: .25 }
.loss { opacity: .5 }
"""


def curve(group: list, name: str, factor: float = 1) -> list:
    """(step, mean, lowest, highest) over a group's runs, at every step that all of them have."""
    tables = [{row["step"]: row[name] * factor for row in run.metrics if is_number(row.get(name))}
              for run in group]
    rows = []
    for step in sorted(set.intersection(*map(set, tables))):
        values = [table[step] for table in tables]
        rows.append((step, statistics.fmean(values), min(values), max(values)))
    return rows


def charts(groups: list, out: Path, which: tuple = CHARTS) -> list:
    """A chart for everything that was measured (and is in `which`), with a curve for every group of
    runs: blocks. Its picture is also written beside `out`."""
    blocks = []
    labels = [group[0].name if len(group) == 1 else
              f"{group[0].name} and {len(group) - 1} other seeds (mean, range)" for group in groups]
    for title, names, factor, log in which:
        lines = [(COLORS[number % 6], name, curve(group, name, factor))
                 for name in names for number, group in enumerate(groups)]
        lines = [line for line in lines if line[2]]
        if lines:
            picture = out.with_name(f"{out.stem}_{names[0]}.svg")
            blocks.append(drawn(title, labels, lines, log, picture))
    return blocks


def drawn(title: str, labels: list, lines: list, log: bool, picture: Path,
          axis: str = "step") -> tuple[str, str]:
    """A chart as a block; also written as `picture`."""
    svg = draw(title, labels, lines, log, axis)
    picture.write_text(svg.replace(">", f"><style>{STYLE}</style>", 1), "utf-8", "replace")
    return svg, f"![{plain(title)}]({picture.name})"


def ticks(low: float, high: float, log: bool = False) -> list:
    """A few round numbers from `low` to `high`."""
    if log and high / low > 4:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 3, 5, 7) if high / low < 30 else (1, 3)
        marks = [digit * 10.0**power for power in powers for digit in digits]
        marks = [mark for mark in marks if low <= mark <= high]
        return marks[::1 + len(marks) // 10]
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (unit * m) <= 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw(title: str, labels: list, lines: list, log: bool, axis: str = "step") -> str:
    """A chart as SVG. `lines`: (color, metric, [(step, mean, lowest, highest), ...]); `axis`: what
    stands for the step."""
    points = [point for line in lines for point in line[2]]
    low, high = min(point[2] for point in points), max(point[3] for point in points)
    final, top = max(1, *(point[0] for point in points)), 36 + 20 * len(labels)
    log = log and low > 0
    low, high = (low / 1.02, high * 1.02) if log else (min(low, 0), high * 1.05 if high > 0 else 1)

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * x / final

    def down(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return top + HEIGHT * (1 - share)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 {top + HEIGHT + 46}" '
           f'role="img" aria-label="{escape(title)}"><rect width="100%" height="100%"/>'
           f'<text y="16">{escape(title)}</text>']
    for number, label in enumerate(labels):
        out.append(f'<text y="{36 + 20 * number}"><tspan style="fill: {COLORS[number % 6]}">●'
                   f"</tspan> {escape(label[-60:])}</text>")
    for y in ticks(low, high, log):
        out.append(f'<path class="rule" d="M{LEFT} {down(y):.1f}H{RIGHT}"/>'
                   f'<text class="y" x="{LEFT - 6}" y="{down(y) + 5:.1f}">{short(y)}</text>')
    for x in ticks(0, final):
        out.append(f'<text class="x" x="{across(x):.1f}" y="{top + HEIGHT + 20}">{short(x)}</text>')
    out.append(f'<text class="y" x="{RIGHT}" y="{top + HEIGHT + 38}">{axis}</text>')
    for color, name, some in lines:
        mean, lowest, highest = ([f"{across(point[0]):.1f},{down(point[i]):.1f}" for point in some]
                                 for i in (1, 2, 3))
        out.append(f'<g class="curve {name}" style="color: {color}">'
                   f'<path d="M{" ".join(mean)}h0"/>')
        if lowest != highest:
            out.append(f'<polygon points="{" ".join(highest + lowest[::-1])}"/>')
        out.append("</g>")
    return "".join(out) + "</svg>"
