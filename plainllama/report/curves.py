"""What a chart shows: which metrics, and their points; still without a picture."""

import statistics
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from plainllama.report.runs import RunFolder, is_number

MOST = 1500  # points that are drawn of a curve
SMOOTH = 0.02  # of a curve's points, on either side, over which it is smoothed


class Chart(NamedTuple):
    """What is drawn in one chart. Its picture is named after the first metric."""

    title: str
    metrics: tuple[str, ...]  # one, or that of training and of validation, or NAME/: all of these
    factor: float = 1
    log: bool = False
    axis: str = "step"  # what lies from left to right
    left: float | None = 0  # where that begins; None: where the curves do
    zero: bool = False  # the lowest height is 0
    smooth: bool = False  # the first metric is noisy: draw its running mean, and itself behind
    fit: bool = False  # heights are those after the first twentieth; what is higher is cut off
    wide: bool = False
    names: tuple[str, ...] = ()  # of the metrics, in the legend of a single run

    def name_of(self, metric: str) -> str:
        """Name one of the metrics as the legend does."""
        return dict(zip(self.metrics, self.names, strict=False)).get(metric, "")


class Point(NamedTuple):
    """A point of a curve, and the ends of the band around it."""

    step: float
    mean: float
    low: float
    high: float


class Line(NamedTuple):
    """A curve as it is drawn; `look` is its class in style.css."""

    number: int  # which label is its own, and which colour
    look: str  # strong | pale, behind its running mean | dots, with an interval each
    points: list[Point]
    along: dict[str, list[float]] = {}  # noqa: RUF012  other axes: each point's tokens, hours


def label_of(group: list[RunFolder]) -> str:
    """Name a group of runs."""
    others = f" and {len(group) - 1} other seeds (mean, range)" if len(group) > 1 else ""
    return f"{group[0].name}{others}"


def of_prefix(group: list[RunFolder], prefix: str) -> list[str]:
    """Name the metrics of runs that begin so, in the order in which they were written."""
    return list(dict.fromkeys(name for run in group for row in run.metrics for name in row
                              if name.startswith(prefix) and is_number(row[name])))


def curve(group: list[RunFolder], metric: str, factor: float = 1) -> list[Point]:
    """Return the mean and the range of a metric over a group's runs, at every step that all of them
    have."""
    tables = [{row["step"]: row[metric] * factor for row in run.metrics
               if is_number(row.get(metric))} for run in group]
    values = {step: [table[step] for table in tables]
              for step in sorted(set.intersection(*map(set, tables)))}
    return [Point(step, statistics.fmean(v), min(v), max(v)) for step, v in values.items()]


def thinned(points: list[Point]) -> list[Point]:
    """Leave at most MOST points of a curve: of each stretch the lowest and the highest."""
    if len(points) <= MOST:
        return points
    size = -(-len(points) // (MOST // 2 - 1))
    kept = [points[0]]
    for first in range(1, len(points) - 1, size):
        stretch = points[first:min(first + size, len(points) - 1)]
        ends = {min(stretch, key=lambda p: p.mean), max(stretch, key=lambda p: p.mean)}
        kept += sorted(ends)
    return [*kept, points[-1]]


def smoothed(points: list[Point]) -> list[Point]:
    """Return the running mean of a curve, with weights that fall on either side of a point. It
    reaches as far back as it does ahead, so that it does not lag; at the end there is less ahead.
    """
    most = round(len(points) * SMOOTH)
    made = []
    for i, point in enumerate(points):
        back = min(most, i)
        ahead = min(back, len(points) - 1 - i)
        weights = [1 - abs(d) / (back + 1) for d in range(-back, ahead + 1)]
        near = [p.mean for p in points[i - back:i + ahead + 1]]
        mean = sum(w * v for w, v in zip(weights, near, strict=True)) / sum(weights)
        made.append(Point(point.step, mean, mean, mean))
    return made


def hours_by_step(run: RunFolder) -> list[tuple[float, float]]:
    """Return [(step, hours of training until then)] of the rows that were timed; evaluation,
    saving and the time in which nothing ran do not count."""
    # the speed that belongs to `tokens` is that of the learned ones, where not all are learned
    timed = [row for row in run.metrics if row.get("tokens_per_second") and "tokens" in row]
    found, hours = [(0.0, 0.0)], 0.0
    for before, row in pairwise([{"tokens": 0}, *timed]):
        speed = row.get("learned_tokens_per_second") or row["tokens_per_second"]
        hours += (row["tokens"] - before["tokens"]) / speed / 3600
        found.append((row["step"], hours))
    return found


def tokens_by_step(run: RunFolder) -> list[tuple[float, float]]:
    """Return [(step, tokens trained on until then)] of the rows that say so."""
    return sorted({row["step"]: row["tokens"] for row in run.metrics
                   if is_number(row.get("tokens"))}.items())


def reader(known: list[tuple[float, float]]) -> Callable[[float], float]:
    """Make of a list of (step, value) a function of the step: in between, values lie on a line;
    behind the last pair on that of the last two."""
    steps = [step for step, _ in known]

    def read(step: float) -> float:
        right = min(max(bisect_left(steps, step), 1), len(known) - 1)
        (x0, y0), (x1, y1) = known[right - 1], known[right]
        return y0 + (y1 - y0) * (step - x0) / ((x1 - x0) or 1)

    return read


def along(run: RunFolder, points: list[Point]) -> dict[str, list[float]]:
    """Say for each point of a run's curve the tokens and the hours of training until then, as far
    as the run tells them."""
    known = {"tokens": tokens_by_step(run), "hours": hours_by_step(run)}
    return {name: [reader(pairs)(point.step) for point in points]
            for name, pairs in known.items() if len(pairs) > 1 and pairs[-1][1] > 0}
