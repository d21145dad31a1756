"""A run beside the reference curves of its recipe: reference/NAME.json, kept with the code.

A reference holds the validation losses of one or several seeds, the config they shared, and the
hash of their data set. A run is compared only where config and data are the same, so that what is
left to differ is the code, the machine and the draw of the seed.
"""

import math
import statistics
from pathlib import Path

from plainllama import settings
from plainllama.files import read_json, write_json
from plainllama.report.runs import RunFolder
from plainllama.settings import UserError

FORMAT = 1
# keys that change neither what is learned nor how, but for rounding, or that the data's hash covers
ELSEWHERE = ("dataset", "tokenizer", "val_fraction", "min_chars", "max_chars", "dedup", "sources",
             "strict", "workers", "out_dir", "resume", "seed", "micro_batch", "device", "dtype",
             "compile", "parallel", "attention", "activation_checkpointing", "max_minutes",
             "deterministic", "log_interval", "logger", "eval_interval", "sample_tokens",
             "sample_prompt", "save_interval", "keep_last", "keep_every")
# Student's t, two-sided 95 %, by degrees of freedom
T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def recipe(config: dict) -> dict:
    """Return what of a config makes a run's curve; keys that it is older than have their
    defaults."""
    known = vars(settings.Settings())
    return {name: config.get(name, known[name]) for name in sorted(known) if name not in ELSEWHERE}


def evaluations(run: RunFolder) -> list[tuple[int, float]]:
    """Return [(tokens, validation loss in nats per token)] of a run, oldest first."""
    pairs = [(row["tokens"], row["val_loss"]) for row in run.metrics if "val_loss" in row]
    if any(loss is None for _, loss in pairs):
        raise UserError(f"{run.name} has a validation loss that is not finite")
    return pairs


def data_hash(run: RunFolder) -> str:
    """Return the hash of the manifest of a run's data set."""
    return run.info["data"].get("manifest_sha256", "unknown")


def differing(ours: dict, theirs: dict) -> str:
    """Return 'learning_rate=0.001 (0.003), …' of keys that are not equal; '' if all are."""
    return ", ".join(f"{name}={ours.get(name)} ({theirs.get(name)})"
                     for name in sorted(ours.keys() | theirs.keys())
                     if ours.get(name) != theirs.get(name))


def save(runs: list[RunFolder], path: Path) -> str:
    """Write the curves of finished runs that differ in their seed alone; say what was done."""
    first = runs[0]
    seeds = [run.info["config"].get("seed") for run in runs]
    if path.exists():
        raise UserError(f"{path} is there; remove it to make it anew (--compare only reads it)")
    for run in runs:
        if run.status.get("state") != "done":
            raise UserError(f"{run.name} is {run.status.get('state', 'not done')}; a reference is "
                            "made of finished runs")
        if keys := differing(recipe(run.info["config"]), recipe(first.info["config"])):
            raise UserError(f"{run.name} is of another recipe than {first.name}: {keys}")
        if data_hash(run) != data_hash(first):
            raise UserError(f"{run.name} was trained on another data set than {first.name}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs have the seeds {seeds}; each needs one of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "format": FORMAT, "recipe": recipe(first.info["config"]), "data": first.info["data"],
        "runs": [{"seed": seed, "evaluations": evaluations(run),
                  **{name: run.info.get(name) for name in ("git", "device", "versions")}}
                 for run, seed in zip(runs, seeds, strict=True)]})
    return f"{len(runs)} run(s) -> {path}"


def read(path: Path) -> dict:
    """Read a reference file: its recipe, its data's hash and its curves, which are a dict of tokens
    -> validation loss for every seed. UserError if it is none."""
    if not path.exists():
        raise UserError(f"no file {path}; reference/ holds the curves that are kept")
    stored = read_json(path, tolerant=True)
    try:
        if stored["format"] > FORMAT:
            raise UserError(f"{path} has format {stored['format']}, newer than this program's "
                            f"{FORMAT}; update it")
        curves = [dict(run["evaluations"]) for run in stored["runs"]]
        if not curves:
            raise ValueError
        return {"curves": curves, "hash": stored["data"]["manifest_sha256"],
                "recipe": recipe(stored["recipe"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a file of reference curves") from None


def compare(run: RunFolder, path: Path) -> list[str]:
    """Return lines that say how far a run's validation losses are from the reference's, in standard
    deviations between its seeds. UserError where data set or recipe are not the same."""
    reference = read(path)
    curves = reference["curves"]
    if data_hash(run) != reference["hash"]:
        raise UserError(f"{run.name} was trained on another data set than {path}: its manifest has "
                        f"the hash {data_hash(run)[:12]}, the reference's {reference['hash'][:12]}")
    if keys := differing(recipe(run.info["config"]), reference["recipe"]):
        raise UserError(f"{run.name} is of another recipe than {path}: {keys}")
    lines, verdict = [], ""
    for tokens, loss in evaluations(run):
        losses = [curve[tokens] for curve in curves if tokens in curve]
        if len(losses) < len(curves):
            continue
        mean = statistics.fmean(losses)
        line = f"{tokens:>15,} tokens: {loss:.4f} nats, reference {mean:.4f}"
        verdict = f"off by {loss - mean:+.4f} nats"
        spread = statistics.stdev(losses) if len(losses) > 1 else 0
        if spread > 0:
            sigmas = (loss - mean) / spread
            line += f" ± {spread:.4f}, {sigmas:+.1f} sigma"
            verdict += f", {sigmas:+.1f} sigma, {where(sigmas, len(losses))}"
        lines.append(line)
    if not lines:
        raise UserError(f"{run.name} has no evaluation at the tokens of one in {path}")
    return [*lines, f"{run.name} and {path}: at the last of these {verdict}"]


def where(sigmas: float, seeds: int) -> str:
    """Say whether a run lies where 95 % of the reference's kind do. The bound is that of one more
    draw, from a mean and a deviation that are themselves estimates."""
    bound = T_95[min(seeds, len(T_95)) - 1] * math.sqrt(1 + 1 / seeds)
    side = "within" if abs(sigmas) <= bound else "OUTSIDE"
    return (f"{side} the {bound:.1f} sigma around the mean of {seeds} seeds in which 95 % of such "
            "runs lie")
