"""Scores: along a run, the newest of each run beside chance, earlier ones, folds."""

from pathlib import Path

from plainllama.report.blocks import Block, fold, paragraph, short, table_block
from plainllama.report.charts import chart_block
from plainllama.report.curves import Chart, Line, Point, along
from plainllama.report.runs import RunFolder, is_number
from plainllama.results import Score, measured, told_folds


def growth(runs: list[RunFolder], out: Path) -> list[Block]:
    """Draw the main score of every task, text and split along the runs, where one was scored at
    several checkpoints (eval.py --all)."""
    blocks: list[Block] = []
    titles = dict.fromkeys(title for run in runs for evaluation in run.evals
                           for title in metrics_by_title(evaluation)
                           if not title.startswith("loss by position"))
    for title in titles:
        found = [scores_along(run, title) for run in runs]
        lines = []
        for place, (run, pairs) in enumerate(zip(runs, found, strict=True)):
            points = [Point(step, score.value, score.value - score.margin,
                            score.value + score.margin) for step, score in pairs]
            if len(points) > 1:
                lines.append(Line(place, "dots", points, along(run, points)))
        if lines:
            score = found[lines[0].number][0][1]
            chart = Chart(f"{title} {score.name}", (f"score_{len(blocks)}",))
            labels = [run.name for run in runs] if len(runs) > 1 else [chart.title]
            if score.chance is not None and is_number(score.chance):
                longest = max(lines, key=lambda line: line.points[-1].step)
                ends = [Point(longest.points[i].step, *[score.chance] * 3) for i in (0, -1)]
                lines.append(Line(len(labels), "chance", ends, along(runs[longest.number], ends)))
                labels.append("chance")
            blocks.append(chart_block(chart, labels, lines, out))
    return blocks


def scores_along(run: RunFolder, title: str) -> list[tuple[int, Score]]:
    """List [(step, score)] of the first score of a title, which is its main one."""
    return [(evaluation.get("step", 0), score) for evaluation in run.evals
            for score in finite_scores(metrics_by_title(evaluation).get(title, {}))[:1]]


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
    """Show every score with its 95 % interval and what chance would score: the newest of each run,
    and folded those of its earlier steps."""
    newest: list[list[str]] = []
    earlier: list[list[str]] = []
    for run in runs:
        whose = f"{run.name}, " if len(runs) > 1 else ""
        for evaluation in run.evals:
            rows = newest if evaluation is run.evals[-1] else earlier
            rows += [[f"{whose}step {evaluation.get('step')}", f"{title} {score.name}",
                      f"{score.value:.4f}{interval(score)}", short(score.chance)]
                     for title, metrics in metrics_by_title(evaluation).items()
                     for score in finite_scores(metrics)]
    heads = ["", "score", "value ± 95 % interval", "chance"]
    if not newest + earlier:
        return [paragraph("No scores yet: eval.py --ckpt RUN --tasks= writes them.")]
    if all(row[-1] == "–" for row in newest + earlier):  # nothing here has a chance level
        heads, newest, earlier = heads[:-1], [row[:-1] for row in newest], [
            row[:-1] for row in earlier]
    blocks = [table_block(heads, newest)] if newest else []
    if earlier:
        blocks += fold("Scores of earlier steps", [table_block(heads, earlier)])
    return blocks


def metrics_by_title(evaluation: dict) -> dict[str, dict]:
    """Collect the metrics of an evaluation: of the validation split, of texts, of tasks."""
    contexts, tables = evaluation.get("contexts", {}), {}
    shorter = {f"validation in windows of {n}": result for n, result in contexts.items()}
    sections = {"validation": evaluation} | shorter | evaluation.get("texts", {})
    for title, result in sections.items():
        preferred = {f"chosen preferred by {how}{end}": result[f"{kind}/accuracies{end}"]
                     for kind, how in (("rewards", "rewards"), ("logps", "likelihood"))
                     for end in ("", "_stderr") if f"{kind}/accuracies{end}" in result}
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
