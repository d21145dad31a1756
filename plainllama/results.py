"""The scores of a checkpoint, RUN/eval/step_N.json: written, read and shown here alone."""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from plainllama.files import read_json, sha256_bytes, write_json, write_text

HEADING = {"long_enough": "{} long enough to be told", "shots": "{} shots", "begin": "{} in front",
           "cut": "{} cut where the context ends",
           "truncated": "{} too long for the context and cut at the left",
           "too_long": "{} too long for the context and not answered",
           "tested": "{} others fixed as a test set", "empty": "{} answers empty",
           "unfinished": "{} answers ended by --max_new_tokens"}
DESCRIBES = {*HEADING, "n", "chance", "correct"}  # numbers that are no scores
GROUPS = {"tasks", "contexts", "texts"}  # of sections; all else in the file is of validation

# ---- what is shown


class Score(NamedTuple):
    """A score among the metrics of a task, with what tells how far to trust it."""

    name: str
    value: float
    error: float | None  # standard error
    interval: list[float] | None  # holds 95 % of the values from resampled questions
    chance: float | None  # what choosing blindly gives, of accuracies
    guess: dict | None  # what guessing models reach: mean, deviation, reaches_0.30
    half: float | None = None  # half the width of a 95 % interval that is known as such

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval, which the standard error may give; 0 without one."""
        return 1.96 * (self.error or 0) if self.half is None else self.half


def measured(metrics: dict) -> list[Score]:
    """List the scores among a task's metrics, in their order, also those that are not finite."""
    scores = []
    for name, value in metrics.items():
        metric, comma, filtered = name.partition(",")  # lm-eval: acc,strict-match
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and metric not in DESCRIBES and "_stderr" not in metric:
            chance = metrics.get("chance") if metric.startswith("acc") else None
            scores.append(Score(name, value, metrics.get(f"{metric}_stderr{comma}{filtered}"),
                                metrics.get("intervals", {}).get(name),
                                metrics.get("chances", {}).get(name, chance),
                                metrics.get("guessing", {}).get(name),
                                metrics.get("margins", {}).get(name)))
    return scores


def score_table(title: str, metrics: dict) -> str:
    """Render a title and a line for each score: its value, its interval of 95 %, what chance or
    guessing would give."""
    heading = [text.format(metrics[name]) for name, text in HEADING.items() if metrics.get(name)]
    lines = [", ".join([title, *heading])]
    wide = max(14, *(len(score.name) + 1 for score in measured(metrics)), 0)
    if "correct" in metrics:
        lines.append(f"  {'correct':<{wide}}{metrics['correct']} of {metrics['n']}")
    for score in measured(metrics):
        line = f"  {score.name:<{wide}}{score.value:9.4f}"
        if score.error or score.half is not None:
            line += f" ± {score.margin:.4f}"
        if score.guess and score.interval:
            (low, high), guess = score.interval, score.guess
            line += (f"   95 % {low:.3f} to {high:.3f}; guessing {guess['mean']:.3f} ± "
                     f"{1.96 * guess['deviation']:.3f}, reaches 0.30 in "
                     f"{guess['reaches_0.30']:.0%} of tries")
        elif score.interval:
            line += "   95 % {:.4f} to {:.4f}".format(*score.interval)
        elif score.chance:
            line += f"   chance {score.chance:.4f}"
        lines.append(line)
    lines += [f"  {name:<{wide}}{text}" for name, text in metrics.get("signatures", {}).items()]
    lines += [f"  {name}, by fold: {told_folds(values)}"
              for name, values in metrics.get("folds", {}).items()]
    if "letters" in metrics:
        counts = ", ".join(f"{letter} {n}" for letter, n in metrics["letters"].items())
        lines.append(f"  {'predicted':<{wide}}{counts}")
    if "unavailable" in metrics:
        lines.append(f"  not available: {metrics['unavailable']}")
    return "\n".join(lines)


def told_folds(values: list[float]) -> str:
    """Write the values of folds."""
    return " ".join(f"{value:.4f}" for value in values)


# ---- what is kept

def read_scores(run: Path, step: int) -> dict:
    """Read what RUN/eval holds of a step; {} if that is nothing, damaged, or of other weights."""
    scores = read_json(run / "eval" / f"step_{step}.json", tolerant=True)
    return scores if are_of(scores, run / "checkpoints" / f"step_{step}") else {}


def unplaced(scores: Any, run: Path) -> Any:
    """Call the files of a run's own folder, in the names of its scores, as they are called there:
    by these the scores of several runs are compared. Names that would become one stay."""
    if not isinstance(scores, dict):
        return scores
    places = {str(run), os.path.relpath(run), str(run.absolute()), str(run.resolve())}
    place = rf"(?<![^\s,:])(?:\./)?(?:{'|'.join(map(re.escape, places))})/+"
    names = [re.sub(place, "", name) for name in scores]
    return {short if names.count(short) == 1 else name: unplaced(part, run)
            for short, (name, part) in zip(names, scores.items(), strict=True)}


def section(result: dict, place: tuple[str, ...]) -> dict:
    """Find a section of the scores, () the scores of validation; made if it is not there."""
    for name in place:
        result = result.setdefault(name, {})
    return result


def weights_hash(checkpoint: Path) -> str:
    """Hash what a checkpoint's model and tokenizer are, by checksums.json; '' without one."""
    entries = read_json(checkpoint / "checksums.json", tolerant=True).get("files", {})
    sums = {name: entry for name, entry in entries.items() if not name.startswith("training/")}
    return sha256_bytes(json.dumps(sums, sort_keys=True).encode()) if sums else ""


def are_of(scores: dict, checkpoint: Path) -> bool:
    """Whether scores are of the weights that a checkpoint has now, as far as both are known."""
    now = weights_hash(checkpoint)
    groups = [scores.get(name, {}) for name in GROUPS]
    sound = all(isinstance(group, dict) and all(isinstance(part, dict) for part in group.values())
                for group in groups)
    return sound and (not now or scores.get("weights", now) == now)


def joined(kept: dict, new: dict) -> dict:
    """Add to a section's new scores those that were kept, unless they differ in an input."""
    before, now = kept.get("made_of", {}), new.get("made_of", {})
    if before | now != now | before:
        return new
    parts = {name: kept[name] | new[name] for name in ("made_of", "intervals", "signatures")
             if name in kept and name in new}
    return kept | new | parts


def record(run: Path | None, result: dict) -> None:
    """Write RUN/eval/step_N.json, if there is a run; scores of the same step that were not computed
    now are kept, if the weights are the same."""
    if run:
        kept = read_scores(run, result["step"])
        merged = {**joined(kept, result)}
        for name in GROUPS & (kept.keys() | result.keys()):
            old, new = kept.get(name, {}), result.get(name, {})
            merged[name] = old | {title: joined(old.get(title, {}), new[title]) for title in new}
        write_json(run / "eval" / f"step_{result['step']}.json", merged)


def write_samples(run: Path | None, step: int | None, task: str, samples: list[dict]) -> None:
    """Write the questions and answers of a task, a row each, beside the scores (without a run:
    here)."""
    name = re.sub(r"[^\w.-]+", "_", task.removeprefix("local:"))
    path = (run / "eval" if run else Path()) / f"samples_{name}_step_{step or 0}.jsonl"
    write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))
    print(f"samples {path}", flush=True)
