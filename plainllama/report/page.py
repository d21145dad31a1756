"""The page: everything that is said of runs, panel by panel."""

import json
import re
import shlex
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

from plainllama.command import read_config
from plainllama.report.blocks import Block, heading, paragraph, short, side_by_side, table_block
from plainllama.report.charts import STYLE, Chart, Line, Point, chart_block, charts, trade_offs
from plainllama.report.runs import RunFolder, grouped, is_number
from plainllama.results import Score, measured, told_folds
from plainllama.settings import DIALOGS, Settings, UserError


def write_page(runs: list[RunFolder], out: Path) -> Path:
    """Write the page, its pictures and its Markdown twin, whose path is returned. UserError if
    something else than an older page of these runs is in its place."""
    twin, there = out.with_suffix(".md"), runs_of(out)
    if there != [run.name for run in runs] and (out.exists() or twin.exists()):
        what = f"is the page of {', '.join(there)}" if there else f"or {twin} is there already"
        raise UserError(f"{out} {what}; name another with --out=FILE.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    title = ", ".join(run.name for run in runs)
    blocks = [heading(title, 1), *(paragraph(outcome(run)) for run in runs)]
    for name, panel in PANELS.items():
        blocks += [heading(name, 2), *panel(runs, out)]
    # without a < nothing in the data can end the element that holds it
    data = json.dumps({"runs": [vars(run) for run in runs]}).replace("<", "\\u003c")
    template = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    html = template.substitute(title=escape(title), style=STYLE, data=data,
                               body="\n".join(block.html for block in blocks))
    out.write_text(html, "utf-8", "replace")
    twin.write_text("\n\n".join(block.markdown for block in blocks) + "\n", "utf-8", "replace")
    return twin


def runs_of(page: Path) -> list[str]:
    """Read the names of its runs off a page; [] if it is no page of ours."""
    text = page.read_text("utf-8", "replace") if page.exists() else ""
    data = re.search('id="data">(.*)</script>', text)
    return [run["name"] for run in json.loads(data[1])["runs"]] if data else []


def outcome(run: RunFolder) -> str:
    """Say in sentences what came of a run."""
    timed = [row for row in run.metrics if row.get("tokens_per_second") and "tokens" in row]
    speed = "learned_tokens_per_second"  # where it is not that of all that is read
    seconds = sum((row["tokens"] - before["tokens"]) / row.get(speed, row["tokens_per_second"])
                  for before, row in pairwise([{"tokens": 0}, *timed]))
    state, device = run.status.get("state", "begun"), run.info["device"]
    tokens, loss, bits = (short(run.last(name)) for name in ("tokens", "val_loss", "val_bpb"))
    size, steps = run.info["parameters"].get("total"), run.info["config"].get("max_steps")
    kind = run.info["config"].get("documents", "text")
    unit = "learned tokens" if kind in DIALOGS else "tokens"
    broken = " and ".join(name for name in ("loss", "val_loss") if run.ends_broken(name))
    said = (f"{run.name}: a LLaMA of {short(size)} parameters, {state} at step {run.last('step')} "
            f"of {steps}, after {tokens} {unit} and {timedelta(seconds=round(seconds))} of "
            f"training on {device.get('count')} x {device.get('name')}: validation loss {loss} ")
    preferred = run.last("val_rewards/accuracies")
    said += (f"nats per pair, chosen preferred in {preferred or 0:.1%}." if kind == "preference"
             else f"nats per token, {bits} bits per byte.")
    older = f" Its newest {broken} is not finite; what is said here is older."
    return said + older if broken else said


# ---- what was run

def differences(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show every key in which a run differs from the first one's parent config."""
    base, parent = runs[0].info.get("base"), vars(Settings())
    try:
        for _, layer in read_config(base) if base else ():
            parent |= layer
    except UserError:
        base = f"the defaults ({base} cannot be read)"
    configs = [parent, *(run.info["config"] for run in runs)]
    names = [name for name in runs[0].info["config"] if name != "out_dir"
             and any(config.get(name) != parent.get(name) for config in configs)]
    return [*(paragraph(command_line(run)) for run in runs),
            paragraph(f"{len(names)} keys differ from the parent, {base or 'the defaults'}."),
            side_by_side(["parent", *(run.name for run in runs)],
                         [{name: config.get(name) for name in names} for config in configs])]


def command_line(run: RunFolder) -> str:
    """Say by which command a run was last started."""
    config_file, ranks = run.info.get("config_file", ""), run.info["device"].get("count", 1)
    keys = {"out_dir": run.info["config"].get("out_dir"), **run.info.get("overrides", {})}
    if keys["out_dir"] in (None, f"out/{Path(config_file).stem}"):
        del keys["out_dir"]
    options = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
               for name, value in keys.items()]
    said = f"{run.name} was last started by: train.py {shlex.join([config_file, *options])}"
    return f"{said} on {ranks} ranks of torchrun" if ranks > 1 else said


# ---- scores

def growth(runs: list[RunFolder], out: Path) -> list[Block]:
    """Draw the tasks' main scores against the tokens trained on, where a run has several."""
    blocks = []
    tasks = dict.fromkeys(task for run in runs for evaluation in run.evals
                          for task in evaluation.get("tasks", {}))
    for number, task in enumerate(tasks):
        found = [[(evaluation.get("tokens", 0), score) for evaluation in run.evals
                  for score in finite_scores(evaluation.get("tasks", {}).get(task, {}))[:1]]
                 for run in runs]  # of each run the task's first score, which is the main one
        lines = [Line(place, "strong", [Point(tokens, one.value, one.value - one.margin,
                                             one.value + one.margin) for tokens, one in pairs])
                 for place, pairs in enumerate(found) if len(pairs) > 1]
        if lines:
            name = next(score.name for pairs in found for _, score in pairs)
            chart = Chart(f"{task} {name} against tokens (with 95 % interval)",
                          (f"score_{number}",), axis="tokens")
            blocks.append(chart_block(chart, [run.name for run in runs], lines, out))
    return blocks


def baselines(runs: list[RunFolder]) -> list[Block]:
    """Rank the models beside those that only count, on the same windows, whoever wins."""
    blocks = []
    for run in runs:
        for newest in [evaluation for evaluation in run.evals
                       if "unigram_bpb" in evaluation.get("baselines", {})][-1:]:
            bits = newest["baselines"] | {f"{run.name}_bpb": newest.get("val_bpb")}
            ranking = sorted((value, name.removesuffix("_bpb")) for name, value in bits.items()
                             if name.endswith("_bpb") and is_number(value))
            blocks.append(table_block(
                [f"step {newest.get('step')}", "bits per byte", "below unigram"],
                [[name, f"{value:.4f}", f"{1 - value / bits['unigram_bpb']:.1%}"]
                 for value, name in ranking]))
    return blocks


def scores(runs: list[RunFolder]) -> list[Block]:
    """Show every score with its 95 % interval and what chance would score."""
    rows = [[f"{run.name}, step {evaluation.get('step')}", f"{title} {score.name}",
             f"{score.value:.4f}{interval(score)}", short(score.chance)]
            for run in runs for evaluation in run.evals
            for title, metrics in metrics_by_title(evaluation).items()
            for score in finite_scores(metrics)]
    if not rows:
        return [paragraph("No scores yet: eval.py --ckpt RUN --tasks= writes them.")]
    return [table_block(["", "score", "value ± 95 % interval", "chance"], rows)]


def metrics_by_title(evaluation: dict) -> dict[str, dict]:
    """Collect the metrics of an evaluation: of the validation split, of texts, of tasks."""
    contexts, tables = evaluation.get("contexts", {}), {}
    shorter = {f"validation in windows of {n}": result for n, result in contexts.items()}
    sections = {"validation": evaluation} | shorter | evaluation.get("texts", {})
    for title, result in sections.items():
        preferred = {name: result[f"{kind}/accuracies{end}"] for kind in ("rewards", "logps")
                     for name, end in (("chosen preferred", ""), ("chosen preferred_stderr",
                                                                 "_stderr"))
                     if f"{kind}/accuracies{end}" in result}
        unit = "pair" if preferred else "token"
        tables[title] = {f"loss, nats per {unit}": result.get("val_loss"),
                         "bits per byte": result.get("val_bpb"), **preferred}
        whose = f" of {title}".removeprefix(" of validation")
        tables[f"loss by position{whose}, at"] = result.get("by_position", {})
    return tables | evaluation.get("tasks", {})


def finite_scores(metrics: dict) -> list[Score]:
    """List the scores that are numbers; an error that is none is left out."""
    return [score._replace(error=score.error if is_number(score.error) else None)
            for score in measured(metrics) if is_number(score.value)]


def interval(score: Score) -> str:
    """Write the 95 % interval of a score, '' if it has none."""
    if score.interval:
        return " ({:.3f} to {:.3f})".format(*score.interval)
    return f" ± {score.margin:.4f}" if score.error or score.half is not None else ""


def folds(runs: list[RunFolder]) -> list[Block]:
    """Show, of scores that were taken in folds, the value of each fold."""
    rows = [[f"{run.name}, step {evaluation.get('step')}", f"{title} {score.name}",
             f"{score.value:.4f}{interval(score)}", told_folds(metrics["folds"][score.name]),
             short(score.chance)]
            for run in runs for evaluation in run.evals
            for title, metrics in evaluation.get("tasks", {}).items()
            for score in finite_scores(metrics) if score.name in metrics.get("folds", {})]
    head = ["", "score", "mean ± 95 % t-interval", "by fold", "chance"]
    return [table_block(head, rows)] if rows else []


# ---- answers, samples, environment

def answers(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show, of each run's newest scores of a file, the worst answers and the best beside prompt and
    reference, and what the libraries say of how they counted."""
    blocks = []
    for run in runs:
        newest = {title: (evaluation.get("step"), metrics) for evaluation in run.evals
                  for title, metrics in evaluation.get("tasks", {}).items()}
        for title, (step, metrics) in newest.items():
            if "examples" not in metrics:
                continue
            blocks += [heading(f"{run.name}, step {step}, {title}", 3), table_block(
                ["row", "score", "prompt", "answer", "reference"],
                [[str(each["row"]), short(each["score"]), each["prompt"], each["answer"],
                  each["reference"]] for each in metrics["examples"]])]
            blocks += [paragraph(f"{name}: {signature}")
                       for name, signature in metrics.get("signatures", {}).items()]
    return blocks or [paragraph("No answers yet: eval.py --ckpt RUN --generate=FILE scores some.")]


def samples(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show the samples of the first, the middle and the last step that has some."""
    blocks = []
    for run in runs:
        steps = sorted({row["step"] for row in run.samples if is_number(row.get("step"))})
        for step in sorted({steps[i] for i in (0, len(steps) // 2, -1) if steps}):
            blocks.append(heading(f"{run.name}, step {step}", 3))
            for row in [row for row in run.samples if row.get("step") == step]:
                text = escape(f"{row.get('prompt', '')}{row.get('completion', '')}")
                blocks.append(Block(f"<pre>{text}</pre>", f"<pre>{text}</pre>"))
    return blocks or [paragraph("No samples yet: sample.py --ckpt RUN --save adds some.")]


def environment(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show on what data, by which program and on which device the runs were made."""
    names = ("config_file", "started", "data", "device", "git", "versions")
    columns = []
    for run in runs:
        columns.append({name: run.info[name] for name in names if name in run.info})
        if is_number(run.info.get("started")):
            started = datetime.fromtimestamp(run.info["started"], UTC)
            columns[-1]["started"] = f"{started:%Y-%m-%d %H:%M UTC}"
        if mixture := run.info["config"].get("mixture"):  # data is then what validates
            columns[-1]["mixture"] = mixture
    return [side_by_side([run.name for run in runs], columns)]


# what the page shows, in order: title -> function of the runs and the page's path, in whose folder
# pictures are written. To add a panel: an entry here, its function, a test.
PANELS = {
    "What was run": differences,
    "Curves": lambda runs, out: [*charts(grouped(runs), out), *trade_offs(grouped(runs), out)],
    "Scores": lambda runs, out: [*growth(runs, out), *baselines(runs), *scores(runs),
                                 *folds(runs)],
    "Answers": answers,
    "Samples": samples,
    "Data, tokenizer and environment": environment,
}
