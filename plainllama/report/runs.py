"""Run folders as they are read for a report."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from plainllama.settings import UserError


@dataclass
class RunFolder:
    """A run folder as it was read. Everything but `info` and `metrics` may be empty."""

    name: str
    info: dict  # run.json
    metrics: list  # the rows of metrics.jsonl
    status: dict
    samples: list
    evals: list  # eval/step_N.json, oldest first

    def last(self, name: str):
        """The newest value of a metric, None if there is none."""
        return next((row[name] for row in reversed(self.metrics) if is_number(row.get(name))), None)


# ---- reading

def find_run(name: str) -> Path:
    """The run folder meant by `name`: itself, or the newest run in it."""
    folder = Path(name)
    if (folder / "run.json").is_file():
        return folder
    rows = max(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    if rows is None:
        raise UserError(f"{name} is not a run and holds none (no run.json); train.py makes one")
    print(f"{name}: taking its newest run, {rows.parent}", flush=True)
    return rows.parent


def read_json(path: Path) -> dict:
    """A JSON object, {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: it is not a JSON object") from None


def read_rows(path: Path) -> list:
    """The rows of a .jsonl file, without a last one that is only half written: a run at work."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number} is damaged: it is not JSON") from None
    return rows


def load(folder: Path) -> RunFolder:
    """Read a run folder. run.json and metrics.jsonl must be there, the rest may be."""
    info, metrics = read_json(folder / "run.json"), read_rows(folder / "metrics.jsonl")
    if lacking := {"config", "parameters", "device", "data"} - info.keys():
        raise UserError(f"{folder}/run.json is damaged: it lacks {', '.join(sorted(lacking))}")
    if not metrics:
        raise UserError(f"{folder}/metrics.jsonl holds no rows yet; come back after a few steps")
    evals = [read_json(path) for path in (folder / "eval").glob("step_*.json")]
    return RunFolder("/".join(folder.resolve().parts[-2:]), info, metrics,
               read_json(folder / "status.json"), read_rows(folder / "samples.jsonl"),
               sorted(evals, key=lambda one: one.get("step", 0)))


def is_number(value) -> bool:
    """True for a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


# ---- curves

def grouped(runs: list) -> list:
    """The runs in groups whose members differ only in their seed."""
    groups: dict[str, list] = {}
    for run in runs:
        config = run.info["config"] | {"seed": 0, "out_dir": "", "resume": ""}
        same = json.dumps([config, run.info["data"]], sort_keys=True)
        groups.setdefault(same, []).append(run)
    return list(groups.values())
