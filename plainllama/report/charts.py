"""The charts of a page: which there are, and what of runs is drawn in them."""

from html import escape
from pathlib import Path

from plainllama.files import write_text
from plainllama.report.blocks import Block, as_markdown, plain, short
from plainllama.report.curves import (
    Chart,
    Line,
    Point,
    along,
    curve,
    label_of,
    of_prefix,
    smoothed,
    thinned,
)
from plainllama.report.drawing import COLORS, alone, cut_off, draw
from plainllama.report.runs import RunFolder

LOSS = (Chart("Loss, nats per token", ("loss", "val_loss"), smooth=True, fit=True,
              wide=True, left=0, names=("training", "validation")),)
LEARNED = (
    Chart("Validation, bits per byte", ("val_bpb",), fit=True),
    Chart("Pairs: reward of chosen less rejected", ("rewards/margins", "val_rewards/margins"),
          smooth=True, names=("training", "validation")),
    Chart("Pairs: share in which chosen is preferred",
          ("rewards/accuracies", "val_rewards/accuracies"), smooth=True,
          names=("training", "validation")),
    Chart("Pairs: rewards, validation", ("val_rewards/chosen", "val_rewards/rejected"),
          names=("chosen", "rejected")),
    Chart("Pairs: log-probability, validation", ("val_logps/chosen", "val_logps/rejected"),
          names=("chosen", "rejected")),
    Chart("Validation by set, nats per token", ("val_loss/",)),
    Chart("Expansion: share of the copies, by block", ("expansion_share/",)),
    Chart("Expansion: cosine of block and copy, by block", ("expansion_cosine/",)),
    Chart("Expansion: divergence of block and copy, by measure", ("divergence/",)),
    Chart("BLEU of answers along the run", ("bleu_gen",), zero=True),
    Chart("chrF of answers along the run", ("chrf_gen",), zero=True),
    Chart("Answers whose calls are right, along the run", ("calls_gen",), zero=True),
)
MACHINE = (
    Chart("Learning rate", ("lr",), zero=True),
    Chart("Gradient norm, before clipping", ("grad_norm",), log=True, smooth=True),
    Chart("Tokens per second", ("tokens_per_second",), zero=True),
    Chart("MFU, share of the devices' peak", ("mfu",), zero=True),
    Chart("Peak memory, GiB", ("peak_memory_bytes",), factor=2**-30, zero=True),
    Chart("Updates left out, not finite", ("skipped",), zero=True),
)


def charts(groups: list[list[RunFolder]], out: Path, which: tuple[Chart, ...]) -> list[Block]:
    """Draw a chart of everything in `which` that was measured, with a curve for every group of
    runs. Pictures go beside `out`."""
    blocks = []
    for chart in which:
        lines, labels = lines_of(chart, groups)
        if any(line.points for line in lines) and not idle(chart, lines):
            blocks.append(chart_block(chart, labels, lines, out))
    return blocks


def idle(chart: Chart, lines: list[Line]) -> bool:
    """Whether a chart of what should not happen would show that it did not."""
    return chart.metrics == ("skipped",) and not any(p.mean for line in lines for p in line.points)


def lines_of(chart: Chart, groups: list[list[RunFolder]]) -> tuple[list[Line], list[str]]:
    """Return a chart's curves, and the labels that their numbers mean: a colour for each of several
    groups of runs where that tells all apart, else one for each metric of each group."""
    prefix = chart.metrics[0] if chart.metrics[0].endswith("/") else ""
    several = len(groups) > 1
    by_group = several and not prefix and (chart.smooth or len(chart.metrics) == 1)
    labels = [label_of(group) for group in groups] if by_group else []
    lines = []
    for place, group in enumerate(groups):
        for metric in of_prefix(group, prefix) if prefix else chart.metrics:
            points = thinned(curve(group, metric, chart.factor))
            if not points:
                continue
            if not by_group:
                name = metric.removeprefix(prefix) if prefix else chart.name_of(metric)
                whose = label_of(group) if several or len(group) > 1 else ""
                labels.append(", ".join(filter(None, (name, whose))) or chart.title)
            number = place if by_group else len(labels) - 1
            lines += looks(chart, metric, number, points, along(group[0], points))
    return lines, labels


def looks(chart: Chart, metric: str, number: int, points: list[Point], axes: dict) -> list[Line]:
    """Give the lines of one metric: a noisy one behind its running mean, a rare one as dots."""
    if chart.smooth and metric == chart.metrics[0] and len(points) > 2:
        return [Line(number, "pale", points, axes), Line(number, "strong", smoothed(points), axes)]
    rare = metric.startswith(("val_", "expansion")) or metric.endswith("_gen")
    return [Line(number, "dots" if rare and len(points) <= 60 else "strong", points, axes)]


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
        chart = Chart(f"Trade-off: loss on {first} against loss on {second}, nats per token",
                      (f"trade_off_{number}",), log=True, left=None,
                      axis=f"loss on {second} (a run begins at the right)")
        blocks.append(chart_block(chart, [label_of(group) for group in groups], lines, out))
    return blocks


def chart_block(chart: Chart, labels: list[str], lines: list[Line], out: Path) -> Block:
    """Draw a chart; it is also written as a picture beside `out`, with its style. page.js finds
    its numbers in the block's `chart`."""
    lines = [line for line in lines if line.points]
    name = chart.metrics[0].strip("/").replace("/", "_")
    picture = out.with_name(f"{out.stem}_{name}.svg")
    write_text(picture, plain(alone(draw(chart, labels, lines))))
    drawn = sorted({line.number for line in lines})
    chance = {line.number for line in lines if line.look == "chance"}
    colors = {n: "chance" if n in chance else f"k{n % COLORS}" for n in drawn}
    keys = "".join(f'<span class="{colors[n]}">{escape(labels[n])}</span>' for n in drawn)
    if len(drawn) == 1 and labels[drawn[0]] == chart.title:
        keys = ""
    remarks = []
    if any(line.look == "pale" for line in lines):
        remarks.append("line: running mean, pale: as logged")
    if chart.smooth and len(chart.metrics) > 1 and any(line.look == "dots" for line in lines):
        remarks.append("dots: validation")
    elif any(point.low != point.high for line in lines if line.look == "dots"
             for point in line.points):
        remarks.append("bars: 95 % interval")
    small = [f"<small>{escape(remark)}</small>" for remark in remarks]
    step = cut_off(chart, lines)
    if step is not None:
        small.append(f'<small class="cut">cut off above: values until step {short(step)}</small>')
    html = (f'<figure class="chart{" wide" if chart.wide else ""}"><figcaption><b>'
            f'{escape(chart.title)}</b><span class="keys">{keys}</span></figcaption>'
            f"{draw(chart, labels, lines, bare=True)}{''.join(small)}</figure>")
    told = {"title": chart.title, "log": chart.log, "axis": chart.axis, "left": chart.left,
            "zero": chart.zero, "fit": chart.fit, "wide": chart.wide,
            "lines": [numbers(line, labels) for line in lines
                      if not (chart.smooth and line.look == "strong" and behind(line, lines))],
            "smooth": chart.smooth}
    return Block(html, f"![{as_markdown(chart.title)}]({picture.name})", told)


def behind(line: Line, lines: list[Line]) -> bool:
    """Whether the curve of which this is the running mean is drawn, too: page.js smooths that."""
    return any(other.number == line.number and other.look == "pale" for other in lines)


def numbers(line: Line, labels: list[str]) -> dict:
    """Give a curve's numbers to page.js, in six digits."""
    def digits(values) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    found = {"number": line.number, "look": line.look, "label": labels[line.number],
             "x": {"step": digits(p.step for p in line.points)} | {
                 name: digits(values) for name, values in line.along.items()},
             "y": digits(p.mean for p in line.points)}
    if any(p.low != p.high for p in line.points):
        found |= {"low": digits(p.low for p in line.points),
                  "high": digits(p.high for p in line.points)}
    return found
