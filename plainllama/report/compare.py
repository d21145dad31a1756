"""A run beside the reference curves of its recipe: reference/NAME.json, kept with the code.

A reference holds the validation losses of one or several seeds, the config they shared, and the
hash of their data set. A run is compared only where config and data are the same, so that what is
left to differ is the code, the machine and the draw of the seed.
"""

import json
import math
import statistics
from pathlib import Path

from plainllama import settings
from plainllama.files import write_json
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
    """What of a config makes a run's curve; keys that it is older than have their defaults."""
    known = vars(settings.Settings())
    return {name: config.get(name, known[name]) for name in sorted(known) if name not in ELSEWHERE}


def evaluations(run) -> list:
    """[(tokens, validation loss in nats per token)] of a run, oldest first."""
    found = [(row["tokens"], row["val_loss"]) for row in run.metrics if "val_loss" in row]
    if any(loss is None for _, loss in found):
        raise UserError(f"{run.name} has a validation loss that is not finite")
    return found


def data_hash(run) -> str:
    """The hash of the manifest of a run's data set."""
    return run.info["data"].get("manifest_sha256", "unknown")


def differing(ours: dict, theirs: dict) -> str:
    """'learning_rate=0.001 (0.003), …' of keys that are not equal; '' if all are."""
    return ", ".join(f"{name}={ours.get(name)} ({theirs.get(name)})"
                     for name in sorted(ours.keys() | theirs.keys())
                     if ours.get(name) != theirs.get(name))


def save(runs: list, path: Path) -> str:
    """Write the curves of finished runs that differ in their seed alone; what was done."""
    first, seeds = runs[0].info, [run.info["config"].get("seed") for run in runs]
    if path.exists():
        raise UserError(f"{path} is there; remove it to make it anew (--compare only reads it)")
    for run in runs:
        if run.status.get("state") != "done":
            raise UserError(f"{run.name} is {run.status.get('state', 'not done')}; a reference is "
                            "made of finished runs")
        if keys := differing(recipe(run.info["config"]), recipe(first["config"])):
            raise UserError(f"{run.name} is of another recipe than {runs[0].name}: {keys}")
        if data_hash(run) != data_hash(runs[0]):
            raise UserError(f"{run.name} was trained on another data set than {runs[0].name}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs have the seeds {seeds}; each needs one of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "format": FORMAT, "recipe": recipe(first["config"]), "data": first["data"],
        "runs": [{"seed": seed, "evaluations": evaluations(run),
                  **{name: run.info.get(name) for name in ("git", "device", "versions")}}
                 for run, seed in zip(runs, seeds, strict=True)]})
    return f"{len(runs)} run(s) -> {path}"


def read(path: Path) -> dict:
    """A reference file. UserError if it is none."""
    try:
        reference = json.loads(path.read_text(encoding="utf-8"))
        curves = [dict(map(tuple, run["evaluations"])) for run in reference["runs"]]
        if reference["format"] > FORMAT:
            raise UserError(f"{path} has format {reference['format']}, newer than this program's "
                            f"{FORMAT}; update it")
        if not curves:
            raise ValueError
        return {"curves": curves, "hash": reference["data"]["manifest_sha256"],
                "recipe": recipe(reference["recipe"])}
    except FileNotFoundError:
        raise UserError(f"no file {path}; reference/ holds the curves that are kept") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a file of reference curves") from None


def compare(run, path: Path) -> list:
    """Lines that say how far a run's validation losses are from the reference's, in standard
    deviations between its seeds. UserError where data set or recipe are not the same."""
    reference = read(path)
    if data_hash(run) != reference["hash"]:
        raise UserError(f"{run.name} was trained on another data set than {path}: its manifest has "
                        f"the hash {data_hash(run)[:12]}, the reference's {reference['hash'][:12]}")
    if keys := differing(recipe(run.info["config"]), reference["recipe"]):
        raise UserError(f"{run.name} is of another recipe than {path}: {keys}")
    curves = reference["curves"]
    count, lines, verdict = len(curves), [], ""
    for tokens, loss in evaluations(run):
        there = [curve[tokens] for curve in curves if tokens in curve]
        if len(there) < count:
            continue
        mean = statistics.fmean(there)
        lines.append(f"{tokens:>15,} tokens: {loss:.4f} nats, reference {mean:.4f}")
        verdict = f"off by {loss - mean:+.4f} nats"
        if count > 1 and (spread := statistics.stdev(there)) > 0:
            sigmas = (loss - mean) / spread
            lines[-1] += f" ± {spread:.4f}, {sigmas:+.1f} sigma"
            # of one more draw, from a mean and a deviation that are themselves estimates
            bound = T_95[min(count, len(T_95)) - 1] * math.sqrt(1 + 1 / count)
            verdict += (f", {sigmas:+.1f} sigma, {'within' if abs(sigmas) <= bound else 'OUTSIDE'} "
                        f"the {bound:.1f} sigma around the mean of {count} seeds in which 95 % of "
                        "such runs lie")
    if not lines:
        raise UserError(f"{run.name} has no evaluation at the tokens of one in {path}")
    return [*lines, f"{run.name} and {path}: at the last of these {verdict}"]
