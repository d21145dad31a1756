"""What vectors know of a label: eval.py --probe.

Gradient boosting is fitted to the vectors in stratified folds and scored on the rest of each, and
on ids that are fixed as a test set: AUROC of two classes, accuracy of more, as a mean with the 95 %
interval of Student's t over the folds. Beside it always stands what chance gives and what the same
vectors reach for shuffled labels; with --against, what other vectors of the same ids reach in the
same folds, and the difference fold by fold. Where those come from, be it an untrained encoder or
sums over a client's rows, is not known here: they are files too.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plainllama import results
from plainllama.evaluation.vectors import FOLDS, Joined, ask, parts_of
from plainllama.files import file_entry, read_json, run_of, write_json
from plainllama.machine import cores
from plainllama.progress import Progress
from plainllama.results import score_table
from plainllama.settings import UserError
from plainllama.weights import checkpoint, peft

SHUFFLED = ""  # in place of the name of a file
OPTIONS = ("embeddings", "labels", "id", "label", "against", "test_ids", "seeds", "out")
# Without subsample_freq LightGBM ignores subsample. One thread a fit, since sums may depend on
# their number: the fits share the cores.
PARAMETERS: dict[str, Any] = {
    "n_estimators": 500, "learning_rate": 0.02, "max_depth": 6, "num_leaves": 63, "subsample": 0.5,
    "subsample_freq": 1, "colsample_bytree": 0.75, "reg_alpha": 1, "reg_lambda": 1,
    "deterministic": True, "force_row_wise": True, "n_jobs": 1, "verbosity": -1}


class Fit(NamedTuple):
    """A model to be fitted: to which rows, and on which it is scored."""

    name: str  # of the vectors, or SHUFFLED: the first ones with shuffled labels
    vectors: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    scored: list[np.ndarray]  # the rest of the fold; the fixed test ids, if there are any
    seed: int


# ---- what is asked

def run(flags: Any, given: dict) -> int:
    """Probe what the flags name, say so, and write it where it belongs; the exit code. UserError,
    before anything slow begins, for what does not fit."""
    if not flags.probe:
        raise UserError(f"--{min(given.keys() & set(OPTIONS))} is for --probe, which is not said")
    of_run = {"ckpt", "base"} if "ckpt" in given else {"ckpt"}
    if idle := sorted(given.keys() - {"probe", "json", *OPTIONS, *of_run}):
        raise UserError(f"--probe scores vectors without a model; leave out --{idle[0]}")
    say = partial(print, flush=True)
    data, seeds = ask(flags, say)
    sizes = zip(data.classes[:20], np.bincount(data.labels).tolist(), strict=False)
    say(f"{flags.label}: {', '.join(f'{one} {count:,} times' for one, count in sizes)}")
    result: dict = {"tasks": {}}
    home = None
    if "ckpt" in given:
        home, known = checkpoint_of(flags, say)
        result |= known
    for name, metrics in scores(data, seeds, flags.label).items():
        say(score_table(f"{name} of {len(data.classes)} classes, {metrics['n']} ids", metrics))
        result["tasks"][name] = metrics
    results.record(home, result)
    if flags.out:
        write_json(flags.out, result)
    if flags.json:
        say(json.dumps(result))
    return 0


def checkpoint_of(flags: Any, say: Callable) -> tuple[Path, dict]:
    """Find the run that --ckpt means, and what eval/step_N.json says of its checkpoint. UserError
    if that is in no run, or if another model made the vectors, as far as a note beside them, which
    must be theirs, says which."""
    folder = checkpoint.find_checkpoint(flags.ckpt)
    home, model = run_of(folder), peft.model_sha256(folder, flags.base)
    if home is None:
        raise UserError(f"{folder} lies in no run, which could keep scores; --out=FILE.json does")
    for name in parts_of(flags.embeddings):
        place = Path(f"{name}.made.json")
        note = read_json(place, tolerant=True)
        if place.is_file() and note.get("file") != file_entry(Path(name)):
            say(f"note: {place} is of another {name} than there is now: nothing says which model "
                "made it")
            continue
        made_by = note.get("recipe", {}).get("sha256 of the model", "")
        if made_by and not model.startswith(made_by):
            raise UserError(f"{name} was made by another model than {folder}; name that, or leave "
                            "out --ckpt")
    (home / "eval").mkdir(exist_ok=True)
    state, size = checkpoint.read_state(folder), peft.whole_config(folder, flags.base).block_size
    tokens = state.get("tokens", state["rows"] * size)  # older ones say only rows
    return home, {"step": state["step"], "tokens": tokens,
                  "weights": results.weights_hash(folder)}


# ---- fits

def fits_of(data: Joined, seed: int) -> list[Fit]:
    """List the fits of a seed: of every file's vectors in the same folds, then of the first file's
    with shuffled labels."""
    from sklearn.model_selection import StratifiedKFold

    rows, test = np.flatnonzero(~data.test), np.flatnonzero(data.test)
    tests = [test] if len(test) else []
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    fits = [Fit(name, vectors, data.labels, rows[train], [rows[valid], *tests], seed)
            for name, vectors in data.vectors.items()
            for train, valid in folds.split(rows, data.labels[rows])]
    probed = next(iter(data.vectors.values()))
    for fold in range(FOLDS):  # shuffled anew for each: of one draw, all share its luck
        labels = data.labels.copy()
        labels[rows] = np.random.default_rng([seed, fold]).permutation(labels[rows])
        train, valid = [*folds.split(rows, labels[rows])][fold]
        fits.append(Fit(SHUFFLED, probed, labels, rows[train], [rows[valid], *tests], seed))
    return fits


def fit(job: Fit) -> list[float]:
    """Fit a model and score it."""
    from lightgbm import LGBMClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import MaxAbsScaler

    scaler = MaxAbsScaler().fit(job.vectors[job.train])
    model = LGBMClassifier(**PARAMETERS, random_state=job.seed)
    model.fit(scaler.transform(job.vectors[job.train]), job.labels[job.train])
    scores = []
    for rows in job.scored:
        likely = np.asarray(model.predict_proba(scaler.transform(job.vectors[rows])))
        truth, two = job.labels[rows], likely.shape[1] == 2
        scores.append(float(roc_auc_score(truth, likely[:, 1]) if two
                            else np.mean(likely.argmax(1) == truth)))
    return scores


# ---- scores

def scores(data: Joined, seeds: list[int], label: str) -> dict[str, dict]:
    """Probe: {'probe:FILE LABEL': metrics}, as eval/step_N.json has them, for each file."""
    import lightgbm

    jobs = [job for seed in seeds for job in fits_of(data, seed)]
    progress = Progress("probing", len(jobs), "fits")
    values: dict[str, list] = {name: [] for name in (*data.vectors, SHUFFLED)}
    with ThreadPoolExecutor(cores()) as pool:
        for job, found in zip(jobs, pool.map(fit, jobs), strict=True):
            values[job.name].append(found)
            progress.add(1)
    progress.close()
    metric = "auroc" if len(data.classes) == 2 else "accuracy"
    blind = {metric: chance(data, ~data.test), f"{metric}_test": chance(data, data.test),
             f"{metric}_shuffled": chance(data, ~data.test)}
    probed, *rivals = data.vectors
    folds = {name: by_name(metric, "", values[name]) for name in data.vectors}
    folds[probed][f"{metric}_shuffled"] = [found[0] for found in values[SHUFFLED]]
    for rival in rivals:
        less = np.array(values[probed]) - np.array(values[rival])
        folds[probed] |= by_name(metric, f" minus {rival}", less)
    return {f"probe:{name} {label}": {
        **{one: float(np.mean(each)) for one, each in found.items()},
        "margins": {one: margin(each) for one, each in found.items()}, "folds": found,
        "chances": {one: blind[one] for one in found if one in blind},
        "n": int((~data.test).sum()), "tested": int(data.test.sum()), "label": label,
        "made_of": data.made_of([*data.vectors] if name == probed else [name]) | {
            "label": label, "seeds": seeds, "lightgbm": lightgbm.__version__}}
        for name, found in folds.items()}


def by_name(metric: str, suffix: str, values: Any) -> dict[str, list[float]]:
    """Name what fit() gave for each fold: (folds, 1) or, with fixed test ids, (folds, 2)."""
    columns = np.array(values).T.tolist()
    return dict(zip((metric + suffix, f"{metric}_test{suffix}"), columns, strict=False))


def chance(data: Joined, rows: np.ndarray) -> float:
    """Give what is reached blindly: AUROC 0.5, or the largest class's share of the rows."""
    counts = np.bincount(data.labels[rows], minlength=1)
    return 0.5 if len(data.classes) == 2 else float(counts.max() / max(1, counts.sum()))


def margin(values: list[float]) -> float:
    """Give half the width of the 95 % interval of Student's t for the mean of values."""
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
