"""Curves as SVG."""

import math
import statistics
from html import escape
from pathlib import Path
from typing import NamedTuple

from plainllama.report.blocks import Block, as_markdown, short
from plainllama.report.runs import RunFolder, is_number


class Chart(NamedTuple):
    """What is drawn in one chart. Its picture is named after the first metric."""

    title: str
    metrics: tuple[str, ...]  # one, or a pale and a strong one, or NAME/: all that begin so
    factor: float = 1
    log: bool = False
    axis: str = "step"  # what lies from left to right
    left: float = 0  # where that begins


class Point(NamedTuple):
    """A point of a curve, and the ends of the band around it."""

    step: float
    mean: float
    low: float
    high: float


class Line(NamedTuple):
    """A curve as it is drawn; `look` is its class in style.css."""

    number: int  # which label is its own, and which color
    look: str  # pale | strong
    points: list[Point]


CHARTS = (
    Chart("loss, nats per token or pair (pale: training, strong: validation)", ("loss", "val_loss"),
          log=True),
    Chart("validation, bits per byte", ("val_bpb",), log=True),
    Chart("pairs: reward of chosen less rejected (pale: training)",
          ("rewards/margins", "val_rewards/margins")),
    Chart("pairs: share in which chosen is preferred (pale: training)",
          ("rewards/accuracies", "val_rewards/accuracies")),
    Chart("pairs: log-probability of chosen (strong) and rejected, validation",
          ("val_logps/rejected", "val_logps/chosen")),
    Chart("validation by set, nats per token", ("val_loss/",), log=True),
    Chart("expansion: share of the copies, by block", ("expansion_share/",)),
    Chart("expansion: cosine of block and copy, by block", ("expansion_cosine/",)),
    Chart("expansion: divergence of block and copy, by measure", ("divergence/",)),
    Chart("BLEU of answers along the run", ("bleu_gen",)),
    Chart("chrF of answers along the run", ("chrf_gen",)),
    Chart("answers whose calls are right, along the run", ("calls_gen",)),
    Chart("learning rate", ("lr",)),
    Chart("gradient norm", ("grad_norm",), log=True),
    Chart("tokens per second", ("tokens_per_second",)),
    Chart("peak memory, GiB", ("peak_memory_bytes",), factor=2**-30),
)
COLORS = ("#3b7dd8", "#e07020", "#1f9d6b", "#b355c0", "#a58300", "#e0455f",  # on white and on black
          "#6f7f8f", "#00a5b5", "#c06a8f", "#7a6ff0", "#6f9a2a", "#a5673f")
LEFT, RIGHT, HEIGHT = 70, 458, 200  # of the box in a chart in which the curves lie
# of charts, here and in the page; the rest of the page's style is in page.html
STYLE = Path(__file__).with_name("style.css").read_text("utf-8")


def charts(groups: list[list[RunFolder]], out: Path,
           which: tuple[Chart, ...] = CHARTS) -> list[Block]:
    """Draw a chart of everything in `which` that was measured, with a curve for every group of
    runs. Pictures go beside `out`."""
    labels, blocks = [label_of(group) for group in groups], []
    for chart in which:
        if chart.metrics[0].endswith("/"):
            blocks += several(chart, groups, labels, out)
            continue
        looks = {metric: "pale" for metric in chart.metrics[:-1]}
        lines = [Line(number, looks.get(metric, "strong"), curve(group, metric, chart.factor))
                 for metric in chart.metrics for number, group in enumerate(groups)]
        lines = [line for line in lines if line.points]
        if lines:
            blocks.append(chart_block(chart, labels, lines, out))
    return blocks


def several(chart: Chart, groups: list[list[RunFolder]], labels: list[str],
            out: Path) -> list[Block]:
    """Draw all metrics that begin with the chart's in one chart, each with a label of its own."""
    prefix = chart.metrics[0]
    names: list[str] = []
    lines: list[Line] = []
    for group, label in zip(groups, labels, strict=True):
        for metric in of_prefix(group, prefix):
            if points := curve(group, metric, chart.factor):
                lines.append(Line(len(names), "strong", points))
                names.append(f"{metric.removeprefix(prefix)}: {label}")
    return [chart_block(chart, names, lines, out)] if lines else []


def of_prefix(group: list[RunFolder], prefix: str) -> list[str]:
    """Name the metrics of runs that begin so, in the order in which they were written."""
    return list(dict.fromkeys(name for run in group for row in run.metrics for name in row
                              if name.startswith(prefix) and is_number(row[name])))


def trade_offs(groups: list[list[RunFolder]], out: Path) -> list[Block]:
    """Draw, where runs have the same eval_sets, the loss on the first set against that on each
    other one: a curve goes from right to left as the other set is learned, and up as the first is
    forgotten."""
    sets = [of_prefix(group, "val_loss/") for group in groups]
    blocks = []
    for number, other in enumerate(sets[0][1:] if all(found == sets[0] for found in sets) else ()):
        lines = []
        for place, group in enumerate(groups):
            # a set may have come later than another, or once have had no finite loss
            up = {point.step: point.mean for point in curve(group, sets[0][0])}
            points = [Point(point.mean, up[point.step], up[point.step], up[point.step])
                      for point in curve(group, other) if point.step in up]
            if points:
                lines.append(Line(place, "strong", points))
        if not lines:
            continue
        first, second = (name.removeprefix("val_loss/") for name in (sets[0][0], other))
        ends = [point.step for line in lines for point in line.points]
        least = min(ends) - 0.05 * ((max(ends) - min(ends)) or max(ends))
        chart = Chart(f"trade-off: loss on {first} against loss on {second}, nats per token",
                      (f"trade_off_{number}",), log=True, left=least,
                      axis=f"loss on {second} (a run begins at the right)")
        blocks.append(chart_block(chart, [label_of(group) for group in groups], lines, out))
    return blocks


def label_of(group: list[RunFolder]) -> str:
    """Name a group of runs."""
    others = f" and {len(group) - 1} other seeds (mean, range)" if len(group) > 1 else ""
    return f"{group[0].name}{others}"


def curve(group: list[RunFolder], metric: str, factor: float = 1) -> list[Point]:
    """Return the mean and the range of a metric over a group's runs, at every step that all of them
    have."""
    tables = [{row["step"]: row[metric] * factor for row in run.metrics
               if is_number(row.get(metric))} for run in group]
    values = {step: [table[step] for table in tables]
              for step in sorted(set.intersection(*map(set, tables)))}
    return [Point(step, statistics.fmean(v), min(v), max(v)) for step, v in values.items()]


def chart_block(chart: Chart, labels: list[str], lines: list[Line], out: Path) -> Block:
    """Draw a chart; it is also written as a picture beside `out`, with its style."""
    svg = draw(chart, labels, lines)
    name = chart.metrics[0].strip("/").replace("/", "_")
    picture = out.with_name(f"{out.stem}_{name}.svg")
    picture.write_text(alone(svg), "utf-8", "replace")
    return Block(svg, f"![{as_markdown(chart.title)}]({picture.name})")


def alone(svg: str) -> str:
    """A chart as a picture of its own, with its style."""
    return svg.replace(">", f"><style>\n{STYLE}</style>", 1)


def draw(chart: Chart, labels: list[str], lines: list[Line]) -> str:
    """Return a chart as SVG, a label for every color that is in it."""
    points = [point for line in lines for point in line.points]
    low, high = min(point.low for point in points), max(point.high for point in points)
    final = max(*(point.step for point in points), chart.left + (chart.axis in ("step", "tokens")))
    drawn = sorted({line.number for line in lines})
    top = 36 + 20 * len(drawn)
    bottom = top + HEIGHT
    log = chart.log and low > 0
    low, high = (low / 1.02, high * 1.02) if log else (min(low, 0), max(high * 1.05, 0) or 1)

    def across(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - chart.left) / (final - chart.left)

    def down(value: float) -> float:
        share = math.log(value / low, high / low) if log else (value - low) / (high - low)
        return top + HEIGHT * (1 - share)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 {bottom + 46}" '
             f'role="img" aria-label="{escape(chart.title)}"><rect width="100%" height="100%"/>'
             f'<text y="16">{escape(chart.title)}</text>']
    for place, number in enumerate(drawn):
        color = COLORS[number % len(COLORS)]
        parts.append(f'<text y="{36 + 20 * place}"><tspan style="fill: {color}">●</tspan> '
                     f"{escape(labels[number][-60:])}</text>")
    for y in ticks(low, high, log):
        parts.append(f'<path class="rule" d="M{LEFT} {down(y):.1f}H{RIGHT}"/>'
                     f'<text class="y" x="{LEFT - 6}" y="{down(y) + 5:.1f}">{short(y)}</text>')
    for x in ticks(chart.left, final):
        parts.append(f'<text class="x" x="{across(x):.1f}" y="{bottom + 20}">{short(x)}</text>')
    parts.append(f'<text class="y" x="{RIGHT}" y="{bottom + 38}">{chart.axis}</text>')
    parts += [draw_line(line, across, down) for line in lines]
    return "".join(parts) + "</svg>"


def draw_line(line: Line, across, down) -> str:
    """Return a curve as SVG, with its band if it has one. `across` and `down` place its points."""
    def corners(height: str) -> list[str]:
        return [f"{across(point.step):.1f},{down(getattr(point, height)):.1f}"
                for point in line.points]

    mean, low, high = corners("mean"), corners("low"), corners("high")
    band = f'<polygon points="{" ".join(high + low[::-1])}"/>' if low != high else ""
    return (f'<g class="curve {line.look}" style="color: {COLORS[line.number % len(COLORS)]}">'
            f'<path d="M{" ".join(mean)}h0"/>{band}</g>')


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Choose a few round numbers from `low` to `high`."""
    if log and high / low > 4:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 3, 5, 7) if high / low < 30 else (1, 3)
        marks = [digit * 10.0**power for power in powers for digit in digits]
        marks = [mark for mark in marks if low <= mark <= high]
        return marks[::1 + len(marks) // 10]
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (unit * m) <= 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
