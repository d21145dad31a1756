"""The scores of a checkpoint: how they are written, read and shown. RUN/eval/step_N.json."""

import json
import re
from pathlib import Path

from plainllama.files import write_json
from plainllama.parallel import World

# ---- what is shown and kept

def score_table(title: str, metrics: dict) -> str:
    """A title and lines of metric, value, interval of 95 %, what chance or guessing would give."""
    about = {"shots": "{} shots", "begin": "{} in front",
             "truncated": "{} too long for the context and cut at the left"}
    lines = [", ".join([title, *(words.format(metrics[name]) for name, words in about.items()
                                 if metrics.get(name))])]
    chance = metrics.get("chance")
    for name, value in metrics.items():
        if (isinstance(value, int | float) and "_stderr" not in name
                and name not in (*about, "n", "chance", "correct", "long_enough")):
            metric, comma, filtered = name.partition(",")  # lm-eval: acc,strict-match
            error = metrics.get(f"{metric}_stderr{comma}{filtered}")
            line = f"  {name:<14}{value:9.4f}" + (f" ± {1.96 * error:.4f}" if error else "")
            if name in metrics.get("guessing", {}):
                (low, high), guess = metrics["intervals"][name], metrics["guessing"][name]
                line += (f"   95 % {low:.3f} to {high:.3f}; guessing {guess['mean']:.3f} ± "
                         f"{1.96 * guess['deviation']:.3f}, reaches 0.30 in "
                         f"{guess['reaches_0.30']:.0%} of tries")
            elif chance and metric[:3] == "acc":
                line += f"   chance {chance:.4f}"
            if name == "contaminated":
                line += f"   of {metrics['n']} questions; {metrics['long_enough']} can be told"
            lines.append(line)
    if "correct" in metrics:
        lines.insert(1, f"  {'correct':<14}{metrics['correct']} of {metrics['n']}")
    if "letters" in metrics:
        lines.append(f"  {'predicted':<14}"
                     + ", ".join(f"{letter} {n}" for letter, n in metrics["letters"].items()))
    if "unavailable" in metrics:
        lines.append(f"  not available: {metrics['unavailable']}")
    return "\n".join(lines)


def read_scores(run: Path, step: int) -> dict:
    """What RUN/eval holds of a step; {} if that is nothing, or damaged."""
    try:
        found = json.loads((run / "eval" / f"step_{step}.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def record(run: Path | None, result: dict, world: World) -> None:
    """Write RUN/eval/step_N.json; scores of the same step that were not computed now are kept."""
    if run and world.rank == 0:
        old = read_scores(run, result["step"])
        both = {name: old.get(name, {}) | result.get(name, {})
                for name in ("tasks", "contexts", "texts")}
        (run / "eval").mkdir(exist_ok=True)
        write_json(run / "eval" / f"step_{result['step']}.json", old | result | {
            name: found for name, found in both.items() if found or name == "tasks"})


def write_samples(run: Path | None, step: int | None, task: str, samples: list[dict]) -> None:
    """The questions and answers of a task, a row each, beside the scores (without a run: here)."""
    name = re.sub(r"[^\w.-]+", "_", task.removeprefix("local:"))
    path = (run / "eval" if run else Path()) / f"samples_{name}_step_{step or 0}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in samples), encoding="utf-8")
    print(f"samples {path}", flush=True)
