"""Run folders -> one page with curves, samples and scores, and the same in Markdown.

  report.py                      the newest run under out/
  report.py out/RUN              writes out/RUN/report.html, and report.md with report_*.svg
  report.py out/A out/B out/C    one page for several, in the first one's folder; runs that differ
                                 only in their seed are drawn as their mean and a band around it,
                                 from the lowest to the highest

The page needs nothing but itself: no scripts, no network. Its figures are embedded as data too:
<script type="application/json" id="data"> holds {"runs": [{"name", "summary", "metrics", ...}],
"groups": [...]}; `metrics` are the rows of metrics.jsonl, `groups` the means and bands over seeds.
"""

import json
import math
import re
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import settings
from settings import UserError, key

# metrics drawn together (for several runs: one by one), the rest of the title, factor, log axis?
PANELS = (
    ({"loss": "training", "val_loss": "validation"}, " loss, nats per token", 1, True),
    ({"val_bpb": "validation"}, ", bits per byte", 1, True),
    ({"lr": "learning rate"}, "", 1, False),
    ({"grad_norm": "gradient norm"}, "", 1, True),
    ({"tokens_per_second": "tokens per second"}, "", 1, False),
    ({"peak_memory_bytes": "peak memory"}, ", GiB", 2**-30, False),
    ({"mfu": "model FLOPs utilisation"}, ", %", 100, False),
)
NOT_THE_EXPERIMENT = ("seed", "out_dir", "resume")  # what may differ between the seeds of a group

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{style}{layout}</style></head><body><main>
{body}
</main><script type="application/json" id="data">{data}</script></body></html>
"""
STYLE = """
:root { color-scheme: light dark;
  --paper: #fcfcfb; --ink: #1c1e21; --soft: #666b73; --rule: #e2e3e6 }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --ink: #e6e7e9; --soft: #9aa0a8; --rule: #2f3338 } }
svg { overflow: visible; fill: none; stroke-linejoin: round; stroke-linecap: round }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft) } svg .x { text-anchor: middle }
svg .y, svg .axis { text-anchor: end } svg .grid { stroke: var(--rule) }
.lines * { vector-effect: non-scaling-stroke; stroke: currentColor; stroke-width: 1.6 }
.lines polygon { fill: currentColor; opacity: .22; stroke: none } .lines .dots { stroke-width: 6 }
.lines .restart { color: var(--soft); stroke-width: 1; stroke-dasharray: 2 5; opacity: .8 }
"""
LAYOUT = """
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
main { max-width: 76rem; margin: auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 } main > p { max-width: 48rem }
h2 { font-size: 1.15rem; margin: 2.4rem 0 0; padding: .7rem 0 .4rem;
  border-top: 1px solid var(--rule) }
.charts { display: grid; gap: 1.6rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
figure { margin: 0; min-width: 0 } figure:not(.wide) span { display: none }
figcaption span { display: inline-block; margin-left: 1rem; font-size: .85rem }
.plot { display: block; margin: .7rem 14px 3rem 46px; width: calc(100% - 60px); height: 170px }
.wide { grid-column: 1 / -1 } .wide .plot { height: 300px }
.table { overflow-x: auto; margin: .8rem 0 } summary { cursor: pointer; color: var(--soft) }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; min-width: 4.5rem;
  border-bottom: 1px solid var(--rule) } td:first-child { color: var(--soft); white-space: nowrap }
pre { white-space: pre-wrap; font: .84rem/1.5 ui-monospace, monospace; padding: .7rem .9rem;
  border: 1px solid var(--rule); border-radius: 6px } pre b { color: #3b7dd8 }
"""
COLORS = ("#3b7dd8", "#e07020", "#1f9d6b", "#b355c0", "#a58300", "#e0455f")  # on white and on black


@dataclass
class Flags:
    """What report.py takes besides run folders."""

    out: str = key("", "the page to write (default: report.html in the first run's folder)")
    x: str = key("auto", "horizontal axis; auto: tokens if the batch sizes differ, else step",
                 ("auto", "step", "tokens"))


@dataclass
class Run:
    """A run folder as it was read. Everything but `info` and `metrics` may be empty."""

    name: str
    info: dict  # run.json
    metrics: list  # the rows of metrics.jsonl
    status: dict
    samples: list
    evals: list  # eval/step_N.json, oldest first
    baselines: dict
    notes: list  # what was damaged, for the reader of the page

    def __post_init__(self):
        last = {name: value for row in self.metrics for name, value in row.items()}
        spans = intervals(self.metrics)
        self.summary = {
            "parameters": (self.info.get("parameters") or {}).get("total"),
            **{k: last.get(k) for k in ("step", "tokens", "loss", "val_loss", "val_bpb")},
            "seconds": sum(seconds for _, seconds, _ in spans),
            "restarts": [row["step"] for row, _, restart in spans if restart],
            "device": self.info.get("device"), "state": self.status.get("state")}
        if isinstance(device := self.info.get("device"), dict):
            self.summary["device"] = f"{device.get('count')} x {device.get('name')}"
        if is_number(self.info.get("started")):
            moment = datetime.fromtimestamp(self.info["started"], UTC)
            self.info = self.info | {"started": f"{moment:%Y-%m-%d %H:%M} UTC"}


# ---- reading

def find(name: str) -> Path:
    """The run folder meant by `name`: itself, or the newest run in it."""
    folder = Path(name)
    if (folder / "run.json").is_file():
        return folder
    inside = [p for p in folder.glob("*/metrics.jsonl") if (p.parent / "run.json").is_file()]
    if not inside:
        near = ", ".join(sorted(str(p.parent) for p in folder.parent.glob("*/run.json"))[:12])
        what = "is not a run: it has no run.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{name} {what}; {f'there are {near}' if near else 'train.py makes one'}")
    newest = max(inside, key=lambda path: path.stat().st_mtime).parent
    print(f"{name}: taking its newest run, {newest}", flush=True)
    return newest


def read_json(path: Path, notes: list) -> dict:
    """A JSON object, {} if there is none; a damaged one is noted."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path} is damaged and left out")
    return value if isinstance(value, dict) else {}


def read_rows(path: Path, notes: list) -> list:
    """The rows of a .jsonl file. A half-written last line is a run at work; others are noted."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "{}")
        except ValueError:
            row = None
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
        elif line and number < len(lines):  # a whole last line ends in a newline
            damaged.append(number)
    if damaged:
        notes.append(f"{path}: {len(damaged)} damaged line(s) left out, the first is {damaged[0]}")
    return rows


def load(folder: Path) -> Run:
    """Read a run folder. run.json and metrics.jsonl must be there, the rest may be."""
    notes: list[str] = []
    info = read_json(folder / "run.json", notes)
    metrics = read_rows(folder / "metrics.jsonl", notes)
    if not isinstance(info.get("config"), dict):
        raise UserError(f"{folder}/run.json is damaged: it holds no config")
    if not metrics:
        raise UserError(f"{folder}/metrics.jsonl holds no rows yet; come back after a few steps")
    evals = [read_json(path, notes) for path in (folder / "eval").glob("step_*.json")]
    return Run(folder.resolve().name, info, metrics, read_json(folder / "status.json", notes),
               read_rows(folder / "samples.jsonl", notes),
               sorted((e for e in evals if is_number(e.get("step"))), key=lambda e: e["step"]),
               read_json(folder / "eval" / "baselines.json", notes), notes)


def is_number(value) -> bool:
    """True for a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def intervals(metrics: list) -> list:
    """(row, seconds of work up to it, is it the first after a restart) for every training row.

    It is the first after a restart if it came a minute later than five times the usual; an
    evaluation takes less. Time in which nothing ran is left out of the seconds.
    """
    rows = [row for row in metrics if is_number(row.get("time")) and is_number(row.get("loss"))]
    gaps = [row["time"] - before["time"] for before, row in pairwise(rows)]
    usual, found = statistics.median(gaps) if gaps else 0, []
    for before, row, gap in zip([{}, *rows], rows, [0, *gaps], strict=False):
        restart = gap > 5 * usual + 60
        if restart or not before:  # nobody saw this row's work begin: reckon it from the speed
            tokens = (row.get("tokens") or 0) - (before.get("tokens") or 0)
            gap = tokens / row["tokens_per_second"] if row.get("tokens_per_second") else 0
        found.append((row, gap, restart))
    return found


def parent_of(run: Run) -> tuple[str, dict]:
    """Name and values of the config that this run is a difference from, as that file is now."""
    values, base = vars(settings.Settings()).copy(), str(run.info.get("base") or "")
    for path in (Path(base), Path(__file__).parent / base):
        with suppress(UserError):  # it may have gone, or have changed since
            for _, layer in settings.read_config(str(path)):
                values |= layer
            return base, values
    return f"the defaults ({base} cannot be read)" if base else "the defaults", values


# ---- curves

def grouped(runs: list) -> list:
    """The runs in groups whose members differ only in their seed."""
    groups: dict[str, list] = {}
    for run in runs:
        config = {k: v for k, v in run.info["config"].items() if k not in NOT_THE_EXPERIMENT}
        data = (run.info.get("data") or {}).get("manifest_sha256")
        groups.setdefault(json.dumps([config, data], sort_keys=True), []).append(run)
    return list(groups.values())


def called(group: list) -> str:
    """What a group is called in legends."""
    names = [run.name for run in group]
    return names[0] if len(names) == 1 else "mean of " + (
        ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} other seeds")


def mean_and_band(group: list, name: str, x: str) -> tuple[list, list, list, list]:
    """x, mean, lowest and highest over a group's runs, at every x that all of them have."""
    curves = [{row[x]: row[name] for row in run.metrics
               if is_number(row.get(name)) and is_number(row.get(x))} for run in group]
    curves = [curve for curve in curves if curve]
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    columns = [[curve[at] for curve in curves] for at in common]
    mean, low, high = ([of(column) for column in columns] for of in (statistics.fmean, min, max))
    return common, mean, low, high


def charts(groups: list, x: str) -> list:
    """A chart for everything that was measured, with a curve for every group of runs: blocks."""
    found, runs = [], [run for group in groups for run in group]
    # restarts are marked for one group only: of several it could not be told whose they are
    stops = [row[x] for run in groups[0] for row, _, restart in intervals(run.metrics)
             if restart and x in row and len(groups) == 1]
    for keys, unit, factor, log in PANELS:
        for names in [list(keys)] if len(groups) == 1 else [[name] for name in keys]:
            lines, labels = [], []
            for name, group in ((name, group) for name in names for group in groups):
                xs, *ys = mean_and_band(group, name, x)
                lines.append((xs, *([y * factor for y in values] for values in ys)))
                labels.append(", ".join([keys[name]] * (len(names) > 1)
                                        + [called(group)] * (len(runs) > 1)))
            if any(line[0] for line in lines):
                title = " and ".join(keys[name] for name in names) + unit
                found.append(("chart", names[0], title, labels, draw(lines, log, x, stops)))
    return found


def ticks(low: float, high: float, log: bool = False) -> list:
    """About five round numbers from `low` to `high`."""
    if log and high / low > 4:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 3, 5, 7) if len(powers) < 3 else (1, 3) if len(powers) < 5 else (1,)
        marks = [digit * 10.0**power for power in powers for digit in digits]
        return [mark for mark in marks if low <= mark <= high]
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (unit * m) <= 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw(lines: list, log: bool, x_label: str, stops: list) -> str:
    """Curves (x, mean, lowest, highest) as SVG: text keeps its size, only the curves stretch."""
    xs, lows, highs = ([v for line in lines for v in line[i]] for i in (0, 2, 3))
    first, final, low, high = min(xs), max(max(xs), min(xs) + 1), min(lows), max(highs)
    log = log and low > 0
    low, high = (low / 1.02, high * 1.02) if log else (min(low, 0), high * 1.05 if high > 0 else 1)

    def across(x: float) -> float:
        return 1000 * (x - first) / (final - first)

    def down(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return 1000 * (1 - share)

    out = []
    for y in ticks(low, high, log):
        at, text = f"{down(y) / 10:.2f}%", short(y)
        out.append(f'<line class="grid" x2="100%" y1="{at}" y2="{at}"/>'
                   f'<text class="y" x="-7" y="{at}" dy=".35em">{text}</text>')
    for x in ticks(first, final):
        at, text = f"{across(x) / 10:.2f}%", short(x)
        out.append(f'<text class="x" x="{at}" y="100%" dy="1.4em">{text}</text>')
    out.append(f'<text class="axis" x="100%" y="100%" dy="2.8em">{x_label}</text>'
               '<svg class="lines" viewBox="0 0 1000 1000" preserveAspectRatio="none">')
    for x in stops:
        out.append(f'<path class="restart" d="M{across(x):.1f} 0V1000"/>')
    for number, (at_x, *ys) in enumerate(lines):
        mean, lowest, highest = ([f"{across(x):.1f},{down(y):.1f}"
                                  for x, y in zip(at_x, of, strict=True)] for of in ys)
        out.append(f'<g style="color: {COLORS[number % 6]}">')
        if lowest != highest:
            out.append(f'<polygon points="{" ".join(highest + lowest[::-1])}"/>')
        out.append(f'<polyline points="{" ".join(mean)}"/>')
        if len(mean) < 60:  # marks that are round, however the plot is stretched
            out.append(f'<path class="dots" d="{"".join(f"M{at}h0" for at in mean)}"/>')
        out.append("</g>")
    return "".join(out) + "</svg>"


# ---- the page as blocks of text, tables and charts

def short(value: float) -> str:
    """A number for people: 0.0006 -> 6e-4, 124085760 -> 124.1M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4) * 0.99995:
            return f"{value / size:.4g}{unit}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def shown(value) -> str:
    """A value in a sentence or a table's cell."""
    if value is None or isinstance(value, str):
        return value or "–"
    if isinstance(value, float):
        long = 0.1 < abs(value) < 1000 and len(repr(value)) > 6  # a result, not a setting
        return f"{value:.4f}" if long else f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def outcome(run: Run) -> dict:
    """What came of a run, in words."""
    s, minutes = run.summary, round(run.summary["seconds"] / 60, 1)
    hours = f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
    return {"parameters": short(s["parameters"]) if is_number(s["parameters"]) else "–",
            "tokens": short(s["tokens"]) if is_number(s["tokens"]) else "–",
            "step": f"{s['step']} of {shown(run.info['config'].get('max_steps'))}",
            "validation loss": shown(s["val_loss"]), "bits per byte": shown(s["val_bpb"]),
            "time": hours if minutes > 90 else f"{minutes:.1f} minutes",
            "restarts": str(len(s["restarts"])), "device": shown(s["device"]),
            "state": shown(s["state"])}


def side_by_side(runs: list, values: list) -> tuple:
    """A table with a row for every key of the dicts in `values` (or in these), a column per run."""
    values = [{name: value for key, part in one.items() for name, value in (
        {f"{key} {inner}": v for inner, v in part.items()} if isinstance(part, dict) else
        {key: part}).items()} for one in values]
    names = dict.fromkeys(name for one in values for name in one)
    rows = [[name, *(shown(one.get(name)) for one in values)] for name in names]
    return "table", ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "value"], rows


def differences(runs: list) -> list:
    """What each run changed of its parent config: blocks."""
    configs = [run.info["config"] for run in runs]
    bases, parents = zip(*map(parent_of, runs), strict=True)
    origin: dict[str, str] = {}
    for run, config, parent in zip(runs, configs, parents, strict=True):
        for name in (name for name in config if config[name] != parent.get(name)):
            sources = {"command line": "overrides", "config file": "changed"}
            by = [who for who, part in sources.items() if name in (run.info.get(part) or {})]
            if by or name != "out_dir":  # a run's folder is named after its config file
                origin.setdefault(name, (by or ["at start"])[0])
    rows = [[name, " / ".join(dict.fromkeys(shown(parent.get(name)) for parent in parents)),
             *(shown(config.get(name)) for config in configs), origin[name]] for name in origin]
    heads = [run.name for run in runs] if len(runs) > 1 else ["this run"]
    return [("text", f"{len(rows)} differences from {' and '.join(dict.fromkeys(bases))}."),
            *([("table", ["key", "parent", *heads, "set by"], rows)] if rows else []),
            ("fold", "the whole config", [side_by_side(runs, configs)], False)]


def scores(runs: list) -> list:
    """Scores with 95 % intervals, of the last steps of one run or the newest of several: blocks."""
    picked = [(run, one) for run in runs for one in run.evals[-1 if len(runs) > 1 else -5:]]
    table: dict[str, dict] = {"validation loss": {}, "bits per byte": {}}
    for number, (_, one) in enumerate(picked):
        table["validation loss"][number] = shown(one.get("val_loss"))
        table["bits per byte"][number] = shown(one.get("val_bpb"))
        for task, metrics in (one.get("tasks") or {}).items():
            for name, value in metrics.items():
                metric, comma, filtered = name.partition(",")  # lm-eval: acc,strict-match
                error = metrics.get(f"{metric}_stderr{comma}{filtered}")
                if is_number(value) and metric != "chance" and not metric.endswith("_stderr"):
                    row = table.setdefault(f"{task}, {name}", {})
                    row[number] = shown(value) if isinstance(value, int) else f"{value:.4f}"
                    row[number] += f" ± {1.96 * error:.4f}" if is_number(error) else ""
                    row["chance"] = shown(metrics.get("chance") if metric[:3] == "acc" else None)
    if not picked:
        return [("text", "No scores yet: eval.py --ckpt RUN writes them.")]
    heads = [f"{run.name}, " * (len(runs) > 1) + f"step {one['step']}" for run, one in picked]
    rows = [[name, *(row.get(number, "–") for number in [*range(len(picked)), "chance"])]
            for name, row in table.items()]
    return [("text", "± is a 95 % interval (1.96 standard errors)."),
            ("table", ["", *heads, "chance"], rows)]


def baselines(runs: list) -> list:
    """The models beside those that only count, whoever wins: blocks."""
    counted = {name.removesuffix("_bpb"): value for run in runs
               for name, value in run.baselines.items() if name.endswith("_bpb")}
    mine = {run.name: run.summary["val_bpb"] for run in runs}
    told = []
    for run, bpb in mine.items():
        beside = [f"{abs(1 - bpb / of):.1%} {'below' if bpb < of else 'above'} {name}"
                  for name, of in counted.items() if is_number(bpb) and is_number(of)]
        told += [f"{run} is {' and '.join(beside)}"] * bool(beside)
    bars = sorted((of, name) for name, of in (mine | counted).items() if is_number(of))
    return [("text", f"Bits per byte of the validation text: {'; '.join(told)}."),
            ("table", ["", "bits per byte", ""],
             [[name, f"{of:.4f}", "━" * round(16 * of / bars[-1][0])] for of, name in bars]),
            ] if told else []


def samples(run: Run) -> list:
    """Samples at up to six steps, evenly spread, the last one open: blocks."""
    steps = sorted({row["step"] for row in run.samples})
    some = sorted({steps[round(i * (len(steps) - 1) / 5)] for i in range(6)}) if steps else []
    return [("fold", f"{run.name}, step {step:,}",
             [("sample", str(row.get("prompt", "")), str(row.get("completion", "")))
              for row in run.samples if row["step"] == step], step == some[-1]) for step in some]


def spread(group: list) -> list:
    """Mean and standard deviation over the seeds of a group: blocks."""
    told = []
    for name, words in (("val_loss", "validation loss"), ("val_bpb", "bits per byte")):
        of = [run.summary[name] for run in group if is_number(run.summary[name])]
        if len(of) > 1:
            told.append(f"{words} {statistics.fmean(of):.4f} ± {statistics.stdev(of):.4f}")
    return [("text", f"{called(group)} (± standard deviation): {', '.join(told)}.")] * bool(told)


def page(runs: list, groups: list, x: str) -> list:
    """Everything the page says, as blocks."""
    around = [{name: run.info.get(name) for name in (
        "started", "config_file", "device", "git", "versions")} for run in runs]
    outcomes = [outcome(run) for run in runs]
    sentence = ("A LLaMA of {parameters} parameters, trained on {tokens} tokens in {time} on "
                "{device}: validation loss {validation loss} nats per token, {bits per byte} bits "
                "per byte. Step {step}, {state}, restarts: {restarts}.").format_map(outcomes[0])
    return [("title", ", ".join(run.name for run in runs)),
            ("text", sentence) if len(runs) == 1 else side_by_side(runs, outcomes),
            *(block for group in groups for block in spread(group)),
            *(("text", f"Note: {note}.") for run in runs for note in run.notes),
            ("heading", "What was run"), *differences(runs),
            ("heading", "Curves"), *charts(groups, x),
            ("heading", "Scores"), *baselines(runs), *scores(runs),
            ("heading", "Samples"), *(block for run in runs for block in samples(run)),
            ("heading", "Data and tokenizer"),
            side_by_side(runs, [run.info.get("data") or {} for run in runs]),
            ("heading", "Environment"), side_by_side(runs, around)]


# ---- blocks written out

def to_html(blocks: list) -> str:
    """Blocks as the inside of a page; every text is escaped."""
    out = []
    for kind, *parts in blocks:
        if kind in ("title", "heading", "text"):
            tag = {"title": "h1", "heading": "h2", "text": "p"}[kind]
            out.append(f"<{tag}>{escape(parts[0])}</{tag}>")
        elif kind == "table":
            head, *rows = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
                           for tag, row in [("th", parts[0]), *(("td", row) for row in parts[1])])
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            out.append(f'<div class="table"><table><tr>{head}</tr>{body}</table></div>')
        elif kind == "chart":
            name, title, labels, svg = parts
            keys = [f'<span style="color: {color}">●&nbsp;{escape(label)}</span>'
                    for color, label in zip(cycle(COLORS), labels, strict=False) if label]
            out.append(f'<figure class="{"wide" if name.endswith("loss") else ""}"><figcaption>'
                       f"<b>{title}</b>{''.join(keys)}</figcaption>"
                       f'<svg class="plot" role="img" aria-label="{title}">{svg}</svg></figure>')
        elif kind == "fold":
            summary, inside, is_open = parts
            out.append(f"<details{' open' * is_open}><summary>{escape(summary)}</summary>"
                       f"{to_html(inside)}</details>")
        else:
            out.append(f"<pre><b>{escape(parts[0])}</b>{escape(parts[1])}</pre>")
    text = "\n".join(out)
    return re.sub(r"(<figure.*</figure>)", r'<div class="charts">\1</div>', text, flags=re.DOTALL)


def to_markdown(blocks: list, beside: Path) -> str:
    """Blocks as Markdown, with the charts as SVG files whose names begin with `beside`."""
    out = []
    for kind, *parts in blocks:
        if kind in ("title", "heading", "text"):
            out.append({"title": "# ", "heading": "## ", "text": ""}[kind] + plain(parts[0]))
        elif kind == "table":
            rows = [parts[0], ["---"] * len(parts[0]), *parts[1]]
            out.append("\n".join(f"| {' | '.join(map(plain, row))} |" for row in rows))
        elif kind == "chart":
            name, title, labels, svg = parts
            picture, top = Path(f"{beside}_{name}.svg"), 34 + 18 * len(labels)
            keys = [f'<text x="56" y="{44 + 18 * number}" style="fill: {COLORS[number % 6]}">'
                    f"{escape(label)}</text>" for number, label in enumerate(labels)]
            picture.write_text(f"""<svg xmlns="http://www.w3.org/2000/svg"
width="760" height="{top + 300}"><style>{STYLE}</style>
<rect width="100%" height="100%" style="fill: var(--paper)"/>
<text x="56" y="24" style="font-weight: bold">{title}</text>{"".join(keys)}
<svg x="56" y="{top}" width="684" height="240">{svg}</svg></svg>""", "utf-8", "replace")
            out.append(f"![{title}]({picture.name})")
        elif kind == "fold":
            out.append(f"<details><summary>{escape(parts[0])}</summary>\n\n"
                       f"{to_markdown(parts[1], beside)}\n</details>")
        else:
            text = "".join(parts)
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            out.append(f"{fence}\n{text}\n{fence}")
    return "\n\n".join(out) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, also in a table's cell."""
    return re.sub(r"([\\`*\[\]<>|~#]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def main(argv: list) -> int:
    """Read the runs, write the page and its Markdown twin."""
    command = settings.parse(argv, __doc__ or "", Flags, takes="files")
    flags: Any = command.flags
    folders = list(dict.fromkeys(map(find, command.files or ["out"])))
    runs = [load(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        run.name = run.name if names.count(run.name) == 1 else str(folder)
    batches = {run.info["config"].get("global_batch_tokens") for run in runs}
    x = flags.x if flags.x != "auto" else "tokens" if len(batches) > 1 else "step"
    groups = grouped(runs)
    out = Path(flags.out or folders[0] / "report.html")
    blocks = page(runs, groups, x)
    bands = [{"runs": [run.name for run in group], "x": x, "curves": {
        name: dict(zip(("x", "mean", "low", "high"), mean_and_band(group, name, x), strict=True))
        for keys, *_ in PANELS for name in keys}} for group in groups if len(group) > 1]
    data = json.dumps({"runs": [vars(run) for run in runs], "groups": bands})
    text = PAGE.format(title=escape(blocks[0][1]), style=STYLE, layout=LAYOUT, body=to_html(blocks),
                       data=data.replace("<", "\\u003c"))  # nothing in it can end the element
    markdown = out.with_suffix(".md")
    out.write_text(text, encoding="utf-8", errors="replace")
    markdown.write_text(to_markdown(blocks, out.with_suffix("")), "utf-8", "replace")
    print(f"{len(runs)} run(s) -> {out} and {markdown}")
    return 0


if __name__ == "__main__":  # only the standard library is loaded: --help needs no head start
    settings.run(main, sys.argv[1:])
