"""Run folders as they are read for a report."""

import json
import math
import os
import shlex
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from plainllama.command import read_config
from plainllama.files import newest_run, read_json, read_rows, run_of
from plainllama.results import are_of, unplaced
from plainllama.settings import Settings, UserError

SILENCE = 600  # seconds without a row after which a run may be taken to be gone


@dataclass
class RunFolder:
    """A run folder as it was read. Everything but `info` and `metrics` may be empty."""

    name: str
    info: dict  # run.json
    metrics: list[dict]  # the rows of metrics.jsonl
    status: dict
    samples: list[dict]
    evals: list[dict]  # eval/step_N.json, oldest first

    def last(self, metric: str):
        """Return the newest value of a metric, None if there is none."""
        values = (row.get(metric) for row in reversed(self.metrics))
        return next(filter(is_number, values), None)

    def ends_broken(self, metric: str) -> bool:
        """Whether the newest value of a metric is no finite number."""
        values = [row[metric] for row in self.metrics if metric in row]
        return bool(values) and not is_number(values[-1])


def find_runs(names: list[str]) -> list[Path]:
    """Find the run folders that are meant, each once. UserError for a name that is none; of several
    what holds no run is left out, and said."""
    found = {name: find_run(name) for name in names}
    lacking = [name for name in names if found[name] is None]
    if len(lacking) == len(found) or not all(map(os.path.exists, lacking)):
        raise UserError(f"{', '.join(lacking)} is not a run and holds none (no run.json); "
                        "train.py makes one")
    if lacking:
        print(f"left out, since they hold no run: {', '.join(lacking)}", flush=True)
    return list(dict.fromkeys(run for run in found.values() if run))


def find_run(name: str) -> Path | None:
    """Find the run folder meant by `name`: itself, that of a checkpoint, or the newest run in it,
    which is said; None if it holds none."""
    folder = Path(name)
    if (folder / "run.json").is_file():
        return folder
    run = run_of(folder) or newest_run(folder)
    if run:
        runs = len({path.parent for path in folder.glob("*/run.json")})
        others = f"; all {runs} of them: python report.py {shlex.quote(name.rstrip('/'))}/*"
        print(f"{name}: taking {run}{', its newest run' if run.parent == folder else ''}"
              f"{others if runs > 1 else ''}", flush=True)
    return run


def load(folder: Path) -> RunFolder:
    """Read a run folder. run.json and metrics.jsonl must be there, the rest may be."""
    info, metrics = read_json(folder / "run.json"), read_rows(folder / "metrics.jsonl")
    parts = ("config", "data", "device", "parameters")
    if lacking := [name for name in parts if not isinstance(info.get(name), dict)]:
        raise UserError(f"{folder}/run.json is damaged: it lacks {', '.join(lacking)}")
    if not metrics:
        raise UserError(f"{folder}/metrics.jsonl holds no rows yet; come back after a few steps")
    if not all(is_number(row.get("step")) for row in metrics):
        raise UserError(f"{folder}/metrics.jsonl is damaged: a row does not say its step")
    evals = []
    for path in (folder / "eval").glob("step_*.json"):
        evals.append(unplaced(read_json(path), folder))
        if not are_of(evals[-1], folder / "checkpoints" / path.stem):
            print(f"{path} is left out: it scores other weights than its checkpoint has now")
            evals.pop()
    evals.sort(key=lambda evaluation: evaluation.get("step", 0))
    return RunFolder("/".join(folder.resolve().parts[-2:]), info, metrics,
                     read_json(folder / "status.json"), read_rows(folder / "samples.jsonl"), evals)


def parent_of(info: dict) -> tuple[dict, str]:
    """Give the config that a run's config file is based on, and its name."""
    base, parent = info.get("base"), vars(Settings())
    try:
        for _, layer in read_config(base) if base else ():
            parent |= layer
    except UserError:
        return parent, f"the defaults ({base} cannot be read)"
    return parent, base or "the defaults"


def changes(info: dict) -> dict[str, tuple]:
    """Give what the command changed of the config file that it named, as that was then: key ->
    (there, in the run). The run's folder is no such key."""
    config = info["config"]
    return {name: (was, config.get(name)) for name, was in info.get("instead", {}).items()
            if config.get(name) != was}


def started(folder: Path) -> bool:
    """Whether a run has rows to be shown."""
    return bool(read_rows(folder / "metrics.jsonl"))


def silent(folder: Path) -> bool:
    """Whether a run has written no row for SILENCE seconds, or for five times its longest pause
    until now, if that is longer."""
    times = [row["time"] for row in read_rows(folder / "metrics.jsonl")
             if is_number(row.get("time"))]
    longest = max((after - before for before, after in pairwise(times)), default=0)
    age = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    return age > max(SILENCE, 5 * longest)


def grouped(runs: list[RunFolder]) -> list[list[RunFolder]]:
    """Put the runs that differ only in their seed into one group."""
    groups: dict[str, list] = {}
    for run in runs:
        config = run.info["config"] | {"seed": 0, "out_dir": "", "resume": ""}
        same = json.dumps([config, run.info["data"]], sort_keys=True)
        groups.setdefault(same, []).append(run)
    return list(groups.values())


def is_number(value) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
