"""The page: everything that is said of runs, as blocks."""

import itertools
import json
import shlex
import time
from datetime import timedelta
from html import escape
from itertools import pairwise
from pathlib import Path

from plainllama import settings
from plainllama.command import read_config
from plainllama.report.blocks import short, side_by_side, table, text
from plainllama.report.charts import COLORS, charts, drawn
from plainllama.report.runs import RunFolder, grouped, is_number
from plainllama.settings import UserError

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


def outcome(run: RunFolder) -> str:
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


def differences(runs: list) -> list:
    """Every key in which a run differs from the first one's parent config: blocks."""
    base, parent = runs[0].info.get("base"), vars(settings.Settings())
    try:
        for _, layer in read_config(base) if base else ():
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


def again(run: RunFolder) -> str:
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
