"""Run folders -> one page with curves, samples and scores, and the same in Markdown.

  report.py                      the newest run under out/
  report.py out/RUN              writes out/RUN/report.html, and report.md with report_*.svg
  report.py out/A out/B out/C    one page for several, in the first one's folder; runs that differ
                                 only in their seed are drawn as their mean and a band around it,
                                 from the lowest to the highest
  report.py out/RUN --compare=reference/quickstart.json
                                 how many sigmas its losses are from those of the same recipe
                                 (made by report.py out/A out/B out/C --save_reference=FILE)

The page needs nothing but itself: no scripts, no network. Its figures are embedded as data too:
<script type="application/json" id="data"> holds {"runs": [{"name", "info", "metrics", ...}]}, of
which `metrics` are the rows of metrics.jsonl and `info` is run.json.
"""

import itertools
import json
import math
import re
import shlex
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from itertools import pairwise
from pathlib import Path

import compare
import settings
from settings import UserError, key

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
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{style}
body {{ margin: auto; max-width: 85rem; padding: 1rem; overflow-wrap: break-word;
  font: 16px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink) }}
h2 {{ margin-top: 2.5rem; padding-top: .6rem; border-top: 1px solid var(--rule) }}
p, pre {{ max-width: 50rem }} pre {{ white-space: pre-wrap }} div {{ overflow-x: auto }}
svg {{ width: min(100%, 27rem); margin: .3rem 0 }} tr:first-child {{ font-weight: bold }}
table {{ border-collapse: collapse; font-size: .9rem; margin: 1rem 0 }}
td {{ vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--rule) }}
@media (max-width: 40rem) {{ td {{ padding-right: .5rem; overflow-wrap: anywhere }} }}
</style></head><body>
{body}
<script type="application/json" id="data">{data}</script></body></html>
"""


@dataclass
class Flags:
    """What report.py takes besides run folders."""

    out: str = key("", "the page to write (default: report.html in the first run's folder)")
    compare: str = key("", "no page: how far a run is from this file of reference curves")
    save_reference: str = key("", "no page: make this file of the curves of runs, a seed each")


@dataclass
class Run:
    """A run folder as it was read. Everything but `info` and `metrics` may be empty."""

    name: str
    info: dict  # run.json
    metrics: list  # the rows of metrics.jsonl
    status: dict
    samples: list
    evals: list  # eval/step_N.json, oldest first

    def last(self, name: str):
        """The newest value of a metric, None if there is none."""
        return next((row[name] for row in reversed(self.metrics) if is_number(row.get(name))), None)


# ---- reading

def find(name: str) -> Path:
    """The run folder meant by `name`: itself, or the newest run in it."""
    folder = Path(name)
    if (folder / "run.json").is_file():
        return folder
    rows = max(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    if rows is None:
        raise UserError(f"{name} is not a run and holds none (no run.json); train.py makes one")
    print(f"{name}: taking its newest run, {rows.parent}", flush=True)
    return rows.parent


def read_json(path: Path) -> dict:
    """A JSON object, {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: it is not a JSON object") from None


def read_rows(path: Path) -> list:
    """The rows of a .jsonl file, without a last one that is only half written: a run at work."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number} is damaged: it is not JSON") from None
    return rows


def load(folder: Path) -> Run:
    """Read a run folder. run.json and metrics.jsonl must be there, the rest may be."""
    info, metrics = read_json(folder / "run.json"), read_rows(folder / "metrics.jsonl")
    if lacking := {"config", "parameters", "device", "data"} - info.keys():
        raise UserError(f"{folder}/run.json is damaged: it lacks {', '.join(sorted(lacking))}")
    if not metrics:
        raise UserError(f"{folder}/metrics.jsonl holds no rows yet; come back after a few steps")
    evals = [read_json(path) for path in (folder / "eval").glob("step_*.json")]
    return Run("/".join(folder.resolve().parts[-2:]), info, metrics,
               read_json(folder / "status.json"), read_rows(folder / "samples.jsonl"),
               sorted(evals, key=lambda one: one.get("step", 0)))


def is_number(value) -> bool:
    """True for a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


# ---- curves

def grouped(runs: list) -> list:
    """The runs in groups whose members differ only in their seed."""
    groups: dict[str, list] = {}
    for run in runs:
        config = run.info["config"] | {"seed": 0, "out_dir": "", "resume": ""}
        same = json.dumps([config, run.info["data"]], sort_keys=True)
        groups.setdefault(same, []).append(run)
    return list(groups.values())


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


# ---- the page as blocks, each of them (HTML, Markdown)

def text(words: str, mark: str = "") -> tuple[str, str]:
    """A paragraph or, with `mark` '#' or '##', a heading."""
    tag = f"h{len(mark)}" if mark else "p"
    return f"<{tag}>{escape(words)}</{tag}>", f"{mark} {plain(words)}".strip()


def table(heads: list, rows: list) -> tuple[str, str]:
    """A table of texts."""
    html = [f"<td>{'</td><td>'.join(map(escape, row))}</td>" for row in [heads, *rows]]
    lines = [f"| {' | '.join(map(plain, row))} |" for row in [heads, ["---"] * len(heads), *rows]]
    return f"<div><table><tr>{'</tr><tr>'.join(html)}</tr></table></div>", "\n".join(lines)


def plain(words: str) -> str:
    """Text that Markdown shows as it is, also in a table's cell."""
    return re.sub(r"([\\`*\[\]<>|~#&]|\b_|_\b)", r"\\\1", " ".join(words.split()))


def short(value: float | None) -> str:
    """A number for people: 0.25, 124085760 -> 124.1M."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def outcome(run: Run) -> str:
    """What came of a run, in a sentence."""
    timed = [row for row in run.metrics if row.get("tokens_per_second")]
    seconds = sum((row["tokens"] - before["tokens"]) / row["tokens_per_second"]
                  for before, row in pairwise([{"tokens": 0}, *timed]))
    counts, device = run.info["parameters"], run.info["device"]
    return (f"{run.name}: a LLaMA of {short(counts['total'])} parameters, "
            f"{run.status.get('state', 'begun')} at step {run.last('step')} of "
            f"{run.info['config']['max_steps']}, after {short(run.last('tokens'))} tokens and "
            f"{timedelta(seconds=round(seconds))} of training on {device['count']} x "
            f"{device['name']}: validation loss {short(run.last('val_loss'))} nats per token, "
            f"{short(run.last('val_bpb'))} bits per byte.")


def flat(value: dict, before: str = "") -> dict:
    """{'git': {'dirty': True}} -> {'git dirty': 'true'}."""
    found: dict[str, str] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            found |= flat(part, f"{before}{name} ")
        else:
            found[before + name] = part if isinstance(part, str) else json.dumps(part)
    return found


def side_by_side(heads: list, values: list) -> tuple:
    """A table with a row for every key of the dicts in `values`, a column for every dict."""
    columns = [flat(one) for one in values]
    names = dict.fromkeys(name for one in columns for name in one)
    return table(["", *heads], [[name, *(one.get(name, "–") for one in columns)] for name in names])


def differences(runs: list) -> list:
    """Every key in which a run differs from the first one's parent config: blocks."""
    base, parent = runs[0].info.get("base"), vars(settings.Settings())
    try:
        for _, layer in settings.read_config(base) if base else ():
            parent = parent | layer
    except UserError:
        base = f"the defaults ({base} cannot be read)"
    configs = [parent, *(run.info["config"] for run in runs)]
    names = [name for name in runs[0].info["config"] if name != "out_dir"
             and any(config.get(name) != parent.get(name) for config in configs)]
    return [*(text(again(run)) for run in runs),
            text(f"{len(names)} keys differ from the parent config, {base or 'the defaults'}."),
            side_by_side(["parent", *(run.name for run in runs)],
                         [{name: config.get(name) for name in names} for config in configs])]


def again(run: Run) -> str:
    """The command that made a run."""
    given = {"out_dir": run.info["config"]["out_dir"], **run.info.get("overrides", {})}
    if given["out_dir"] == f"out/{Path(run.info['config_file']).stem}":
        del given["out_dir"]
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
             for name, value in given.items()]
    ranks, config_file = run.info["device"]["count"], run.info["config_file"]
    return (f"{run.name} was last started by: train.py {shlex.join([config_file, *words])}"
            + (f" on {ranks} ranks of torchrun" if ranks > 1 else ""))


def scores(runs: list) -> list:
    """Scores with 95 % intervals and what chance would score: blocks."""
    rows = []
    for who, one in ((run.name, one) for run in runs for one in run.evals):
        parts = {}
        for context, at in {"": one, **one.get("contexts", {})}.items():  # shorter windows
            windows = f" in windows of {context}" * bool(context)
            parts["validation" + windows] = {"loss, nats per token": at.get("val_loss"),
                                             "bits per byte": at.get("val_bpb")}
            parts[f"loss by position{windows}, at"] = at.get("by_position", {})
        for file, at in one.get("texts", {}).items():
            parts[file] = {"loss, nats per token": at.get("val_loss"),
                           "bits per byte": at.get("val_bpb")}
        for task, metrics in (parts | one.get("tasks", {})).items():
            for name, value, error in measured(metrics):
                interval = f" ± {1.96 * error:.4f}" if error else ""
                if name in metrics.get("intervals", {}):
                    interval = " ({:.3f} to {:.3f})".format(*metrics["intervals"][name])
                rows.append([f"{who}, step {one.get('step')}", f"{task} {name}",
                             f"{value:.4f}{interval}",
                             short(metrics.get("chance") if name.startswith("acc") else None)])
    if not rows:
        return [text("No scores yet: eval.py --ckpt RUN writes them.")]
    return [table(["", "score", "value ± 95 % interval", "chance"], rows)]


def measured(metrics: dict) -> list:
    """[(name, value, standard error or None), ...] of a task's metrics, without what describes it
    only."""
    about = ("chance", "n", "truncated", "shots", "correct", "long_enough")
    found = []
    for name, value in metrics.items():
        metric, comma, filtered = name.partition(",")  # lm-eval: acc,strict-match
        if is_number(value) and metric not in about and "_stderr" not in metric:
            error = metrics.get(f"{metric}_stderr{comma}{filtered}")
            found.append((name, value, error if is_number(error) else None))
    return found


def growth(runs: list, out: Path) -> list:
    """The scores of tasks against the tokens trained on, where a run has several: blocks."""
    blocks = []
    tasks = dict.fromkeys(task for run in runs for one in run.evals
                          for task in one.get("tasks", {}))
    for number, task in enumerate(tasks):
        lines, labels = [], []
        for color, run in zip(itertools.cycle(COLORS), runs, strict=False):
            points = []
            for one in run.evals:
                metrics = one.get("tasks", {}).get(task, {})
                for name, value, error in measured(metrics)[:1]:  # the first is the main one
                    within = 1.96 * (error or 0)
                    points.append((one.get("tokens", 0), value, value - within, value + within))
                    title = f"{task} {name} against tokens (with 95 % interval)"
            lines += [(color, "score", points)] if len(points) > 1 else []
            labels.append(run.name)
        if lines:
            picture = out.with_name(f"{out.stem}_score_{number}.svg")
            blocks.append(drawn(title, labels, lines, False, picture, "tokens"))
    return blocks


def baselines(runs: list) -> list:
    """The models beside those that only count, on the same windows, whoever wins: blocks."""
    blocks = []
    for run in runs:
        for one in [one for one in run.evals if one.get("baselines")][-1:]:
            every = {name.removesuffix("_bpb"): of for name, of in one["baselines"].items()
                     if name.endswith("_bpb")} | {run.name: one.get("val_bpb")}
            order = sorted((of, name) for name, of in every.items() if is_number(of))
            blocks.append(table([f"step {one['step']}", "bits per byte", "below unigram"],
                                [[name, f"{of:.4f}", f"{1 - of / every['unigram']:.1%}"]
                                 for of, name in order]))
    return blocks


def samples(runs: list) -> list:
    """Samples at the first, the middle and the last step that has some: blocks."""
    blocks = []
    for run in runs:
        steps = sorted({row["step"] for row in run.samples})
        for step in sorted({steps[i] for i in (0, len(steps) // 2, -1) if steps}):
            blocks.append(text(f"{run.name}, step {step}", "###"))
            for row in (row for row in run.samples if row["step"] == step):
                words = f"{row.get('prompt', '')}{row.get('completion', '')}"
                blocks.append((f"<pre>{escape(words)}</pre>",) * 2)
    return blocks or [text("No samples yet: sample.py --ckpt RUN --save adds some.")]


def page(runs: list, out: Path) -> list:
    """Everything the page says, as blocks."""
    around = [{name: run.info.get(name) for name in (
        "config_file", "started", "data", "device", "git", "versions")} for run in runs]
    for one in around:
        one["started"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(one["started"] or 0))
    names = [run.name for run in runs]
    return [text(", ".join(names), "#"), *(text(outcome(run)) for run in runs),
            text("What was run", "##"), *differences(runs),
            text("Curves", "##"), *charts(grouped(runs), out),
            text("Scores", "##"), *growth(runs, out), *baselines(runs), *scores(runs),
            text("Samples", "##"), *samples(runs),
            text("Data, tokenizer and environment", "##"), side_by_side(names, around)]


def main(command) -> int:
    """Read the runs, write the page and its Markdown twin; or compare with reference curves."""
    folders = list(dict.fromkeys(map(find, command.files or ["out"])))
    flags = command.flags
    if flags.compare or flags.save_reference:
        if sum(map(bool, (flags.compare, flags.save_reference, flags.out))) > 1:
            raise UserError("--compare, --save_reference and --out exclude each other")
        runs = [load(folder) for folder in folders]
        print(compare.save(runs, Path(flags.save_reference)) if flags.save_reference else
              "\n".join(itertools.chain.from_iterable(
                  compare.compare(run, Path(flags.compare)) for run in runs)))
        return 0
    out = Path(flags.out or folders[0] / "report.html")
    if out.suffix != ".html":
        raise UserError(f"--out={out} must end in .html; the Markdown goes beside it")
    runs = [load(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    html, markdown = zip(*page(runs, out), strict=True)
    # without a < nothing in the data can end the element that holds it
    data = json.dumps({"runs": [vars(run) for run in runs]}).replace("<", "\\u003c")
    title = escape(", ".join(run.name for run in runs))
    out.write_text(PAGE.format(title=title, style=STYLE, body="\n".join(html), data=data),
                   "utf-8", "replace")
    beside = out.with_suffix(".md")
    beside.write_text("\n\n".join(markdown) + "\n", "utf-8", "replace")
    print(f"{len(runs)} run(s) -> {out} and {beside}")
    return 0


if __name__ == "__main__":
    settings.run(main, settings.command(__doc__, Flags, takes="files"))
