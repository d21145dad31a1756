"""A run beside the reference curves of its recipe: reference/NAME.json, kept with the code.

A reference holds the validation losses of one or several seeds, the config they shared, and the
hash of their data set. A run is compared only where config and data are the same, so that what is
left to differ is the code, the machine and the draw of the seed.
"""

import math
import statistics
from pathlib import Path

from plainllama.files import read_json, write_json
from plainllama.report.runs import RunFolder, is_number
from plainllama.settings import Settings, UserError, deciding

FORMAT = 1
# keys that change neither what is learned nor how, but for rounding, or that the data's hash covers
ELSEWHERE = deciding("recipe", "prepare", "identity", "free")
# Student's t, two-sided 95 %, by degrees of freedom
T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def spread(values: list[float]) -> str:
    """Write the mean of some seeds, with the 95 % interval of Student's t if there are several."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    t = T_95[min(len(values), len(T_95)) - 1]  # of more seeds the interval is a little too wide
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


def recipe(config: dict) -> dict:
    """Return what of a config makes a run's curve; keys that it is older than have their
    defaults."""
    known = vars(Settings())
    return {name: config.get(name, known[name]) for name in sorted(known) if name not in ELSEWHERE}


def evaluations(run: RunFolder) -> list[tuple[int, float]]:
    """Return [(tokens, validation loss in nats per token)] of a run, oldest first."""
    pairs = [(row["tokens"], row["val_loss"]) for row in run.metrics
             if "val_loss" in row and "tokens" in row]
    if not all(is_number(loss) for _, loss in pairs):
        raise UserError(f"{run.name} has a validation loss that is not finite")
    return pairs


def check_same(run: RunFolder, whose: str | Path, config: dict, data: dict) -> None:
    """UserError if a run has another data set or another recipe than `config` and `data` say."""
    ours, theirs = ({"the data's hash": d.get("manifest_sha256", ""), **recipe(c)}
                    for c, d in ((run.info["config"], run.info["data"]), (config, data)))
    differing = [f"{name}={value} ({theirs[name]})"
                 for name, value in ours.items() if value != theirs[name]]
    if differing:
        raise UserError(f"{run.name} has not the data or recipe of {whose}: {', '.join(differing)}")


def save(runs: list[RunFolder], path: Path) -> str:
    """Write the curves of finished runs that differ in their seed alone; say what was done."""
    first, seeds = runs[0], [run.info["config"].get("seed") for run in runs]
    if path.exists():
        raise UserError(f"{path} is there; remove it to make it anew (--compare only reads it)")
    for run in runs:
        if run.status.get("state") != "done":
            raise UserError(f"{run.name} is {run.status.get('state', 'begun')}; finish it first")
        check_same(run, first.name, first.info["config"], first.info["data"])
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs have the seeds {seeds}; each needs one of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "format": FORMAT, "recipe": recipe(first.info["config"]), "data": first.info["data"],
        "runs": [{"seed": seed, "evaluations": evaluations(run),
                  **{name: run.info.get(name) for name in ("git", "device", "versions")}}
                 for run, seed in zip(runs, seeds, strict=True)]})
    return f"{len(runs)} run(s) -> {path}"


def read(path: Path, run: RunFolder) -> list[dict[int, float]]:
    """Read a reference's curves, a dict of tokens -> validation loss for every seed. UserError if
    the file is none, or not of the run's data set and recipe."""
    stored = read_json(path, tolerant=True)
    try:
        if stored["format"] > FORMAT:
            raise UserError(f"{path} has a format newer than this program's {FORMAT}; update it")
        curves = [dict(seed["evaluations"]) for seed in stored["runs"]]
        config, data = dict(stored["recipe"]), dict(stored["data"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"no file of reference curves: {path}; reference/ holds some") from None
    check_same(run, path, config, data)
    return curves


def compare(run: RunFolder, path: Path) -> str:
    """Say how far a run's validation losses are from the reference's, in standard deviations
    between its seeds. UserError where data set or recipe are not the same."""
    curves, lines = read(path, run), []
    for tokens, loss in evaluations(run):
        losses = [curve[tokens] for curve in curves if tokens in curve]
        if not losses or len(losses) < len(curves):
            continue
        mean = statistics.fmean(losses)
        line = f"{tokens:>15,} tokens: {loss:.4f} nats, reference {mean:.4f}"
        verdict = f"off by {loss - mean:+.4f} nats"
        spread = statistics.stdev(losses) if len(losses) > 1 else 0
        if spread > 0:
            sigmas = (loss - mean) / spread
            line += f" ± {spread:.4f}, {sigmas:+.1f} sigma"
            # the bound is that of one more draw, from a mean and a deviation that are estimates
            bound = T_95[min(len(losses), len(T_95)) - 1] * math.sqrt(1 + 1 / len(losses))
            side = "within" if abs(sigmas) <= bound else "OUTSIDE"
            verdict += (f", {sigmas:+.1f} sigma, {side} the {bound:.1f} sigma around the mean of "
                        f"{len(losses)} seeds in which 95 % of such runs lie")
        lines.append(line)
    if not lines:
        raise UserError(f"{run.name} has no evaluation at the tokens of one in {path}")
    return "\n".join([*lines, f"{run.name} and {path}: at the last of these {verdict}"])
