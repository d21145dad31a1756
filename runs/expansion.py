"""A new domain without losing the old: python runs/expansion.py --new=FILE [--jobs=2]

A model reads one domain (--old, by default the embedded Python), and then another: with all of its
weights at three learning rates, the same with a tenth of the old text mixed in, the last half of
its blocks, LoRA, and copies of half of its blocks behind them (stack), beside them at three weights
of the divergence (concat), and in turns (hybrid). Every arm is tried at three learning rates with
one seed; the rate that has kept most of the old domain where LEVEL of the way to the new one is
made goes on with two other seeds. The learning rate is constant, and both domains are measured
along the run, so that arms are compared at equal loss on the new domain.

The table has the loss on the old domain at some shares of the way from the base's loss on the new
domain to the lowest that any run reached, with the 95 % interval of three seeds (Student's t), and
the picture has the curves. Both are in --out, with results.json. Under 90 minutes on two cores; a
second use goes on where the first was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What runs/expansion.py takes."""

    old: str = key("embedded", "text of the old domain, as prepare.py's sources")
    new: str = key("", "text of the new domain")
    column: str = key("text", "of the new domain's rows")
    size: str = key("small", "0.8 M parameters and bytes, or 113 M", ("small", "113m"))
    tokenizer: str = key("", "of both domains (default: by the size)")
    arms: str = key("", "only those arms that begin with one of these words: 'full; LoRA'")
    seeds: int = key(3, "seeds of the best learning rate", low=1)
    base_steps: int = key(0, "updates of the base (0: by the size)", low=0)
    steps: int = key(0, "updates of every arm (0: by the size)", low=0)
    jobs: int = key(1, "runs side by side", low=1)
    name: str = key("", "of the pair, in the names of data sets (default: the new file's)")
    out: str = key("", "folder for runs and results (default: out/expansion_NAME)")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import math
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import mean, stdev
from typing import NamedTuple

from plainllama.files import read_json, read_rows, read_status, write_json, write_text
from plainllama.report.compare import T_95
from plainllama.report.curves import Chart, Line, Point
from plainllama.report.drawing import alone, draw

LEVEL, LEVELS = 0.8, (0.5, 0.7, 0.8, 0.9, 0.95)
SIZES: dict[str, dict] = {
    "small": {"n_layer": 4, "n_head": 4, "d_model": 128, "d_ff": 344, "block_size": 256,
              "global_batch_tokens": 2048, "tokenizer": "bytes", "base_steps": 1500, "steps": 200,
              "eval_interval": 10, "eval_tokens": 8192},
    "113m": {"n_layer": 16, "n_head": 12, "d_model": 768, "d_ff": 2048, "block_size": 256,
             "global_batch_tokens": 32768, "tokenizer": "mistral", "base_steps": 1500, "steps": 100,
             "eval_interval": 10, "eval_tokens": 65536}}
FULL, SLOW, FAST = (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)


class Arm(NamedTuple):
    """A way to learn the new domain."""

    name: str
    options: tuple[str, ...]
    rates: tuple[float, ...]


def arms_of(flags: Flags, sets: tuple[str, str], layers: int) -> list[Arm]:
    """The arms that were asked for."""
    old, new = sets
    half = layers // 2
    copies = f"--expand_blocks={half}"
    there = [*(Arm(f"full, {rate:g}", (), (rate,)) for rate in FULL),
             Arm("full, 10 % old text", (f"--mixture={{'{new}': 0.9, '{old}': 0.1}}",), FULL),
             Arm("last half", (f"--train_only=last:{half}",), SLOW),
             Arm("LoRA, r 8", ("--lora_r=8",), FAST),
             Arm("stack", ("--expand=stack", copies), SLOW),
             *(Arm(f"concat, divergence {weight:g}", ("--expand=concat", copies,
                   *((f"--divergence_weight={weight}",) if weight else ())), SLOW)
               for weight in (0, 0.3, 3)),
             Arm("hybrid", ("--expand=hybrid", copies, "--divergence_weight=0.3"), SLOW)]
    words = [word.strip() for word in flags.arms.split(";") if word.strip()]
    chosen = [arm for arm in there if not words or arm.name.startswith(tuple(words))]
    if not chosen:
        raise UserError(f"--arms={flags.arms} begins no arm; there are "
                        + "; ".join(arm.name for arm in there))
    return chosen


class Trial:
    """A base, and runs that go on from it."""

    def __init__(self, flags: Flags):
        if not flags.new:
            raise UserError("name a text of another domain with --new=FILE")
        self.flags, self.size = flags, dict(SIZES[flags.size])
        name = flags.name or Path(flags.new).name.split(".")[0]
        old = Path(flags.old).name.split(".")[0]
        self.old, self.new = (re.sub(r"\W+", "_", f"expansion_{which}_{flags.size}")
                              for which in (f"old_{old}", name))
        self.out = Path(flags.out or f"out/{self.new}")
        for what in ("tokenizer", "base_steps", "steps"):
            self.size[what] = getattr(flags, what) or self.size[what]
        self.tokenizer = self.size.pop("tokenizer")
        self.base_steps, self.steps = self.size.pop("base_steps"), self.size.pop("steps")
        self.common = [f"--{what}={value}" for what, value in self.size.items()
                       if what != "eval_interval"]
        self.base = Path(f"out/{self.old}_base_{self.base_steps}")  # of several pairs
        self.arms = arms_of(flags, (self.old, self.new), self.size["n_layer"])

    def prepare(self) -> None:
        """Make both data sets and the base."""
        column = {} if self.flags.new == "embedded" else {"column": self.flags.column}
        for name, source in ((self.old, self.flags.old),
                             (self.new, {"path": self.flags.new, **column})):
            self.call("prepare.py", f"--dataset={name}", f"--sources={source}",
                      f"--tokenizer={self.tokenizer}", "--val_fraction=0.02")
        if read_status(self.base) != "done":
            warm = self.base_steps // 15
            self.call("train.py", *self.common, f"--dataset={self.old}", "--optimizer=muon",
                      "--learning_rate=2e-3", "--min_lr=2e-4", "--schedule=linear",
                      f"--warmup_steps={warm}", f"--max_steps={self.base_steps}",
                      "--eval_interval=1000000", "--save_interval=1000000", "--sample_tokens=0",
                      "--keep_last=1", f"--out_dir={self.base}")

    def folder(self, arm: Arm, rate: float, seed: int) -> Path:
        """Where a run lies."""
        name = re.sub(r"\W+", "_", arm.name)
        return self.out / f"{name}_{rate:g}_{seed}"

    def train(self, job: tuple[Arm, float, int]) -> None:
        """Make a run, unless it is there."""
        arm, rate, seed = job
        run = self.folder(*job)
        if read_status(run) == "done":
            return
        sets = {"old": f"data/{self.old}", "new": f"data/{self.new}"}
        self.call("train.py", *self.common, f"--dataset={self.new}", f"--init_from={self.base}",
                  f"--eval_sets={sets}", f"--learning_rate={rate}", f"--min_lr={rate}",
                  "--warmup_steps=10", f"--max_steps={self.steps}", f"--seed={seed}",
                  f"--eval_interval={self.size['eval_interval']}", "--save_interval=1000000",
                  "--sample_tokens=0", "--keep_last=1", "--compile=false", f"--out_dir={run}",
                  *arm.options)
        print(f"{arm.name}, rate {rate:g}, seed {seed}: old and new, from and to: "
              f"{say(curve(run)[0])} {say(curve(run)[-1])}", flush=True)

    def call(self, script: str, *words: str) -> None:
        """Run a command of the checkout."""
        threads = str(max(1, (os.cpu_count() or 1) // self.flags.jobs))
        done = subprocess.run([sys.executable, str(ROOT / script), *words],
                              env=os.environ | {"OMP_NUM_THREADS": threads},
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{script} {' '.join(words)}: {done.stderr.strip()}")

    def together(self, jobs: list[tuple[Arm, float, int]]) -> None:
        """Make runs, as many at a time as asked for."""
        with ThreadPoolExecutor(self.flags.jobs) as pool:
            list(pool.map(self.train, jobs))


Curve = list[tuple[float, float]]  # (loss on the new domain, loss on the old one), in time


def curve(run: Path) -> Curve:
    """Both losses along a run."""
    rows = read_rows(run / "metrics.jsonl")
    return [(row["val_loss/new"], row["val_loss/old"]) for row in rows if "val_loss/new" in row]


def say(point: tuple[float, float]) -> str:
    """A point in words."""
    return f"({point[1]:.3f}, {point[0]:.3f})"


def old_at(points: Curve, level: float) -> float:
    """The loss on the old domain where a curve first has the loss `level` on the new one, between
    its points in a straight line; inf if it does not come so far."""
    for (new, old), (newer, older) in pairwise(points):
        if newer <= level < new:
            return old + (older - old) * (new - level) / (new - newer)
    return math.inf


def main(command: CommandLine) -> int:
    """Run what is missing, then print and draw."""
    trial = Trial(command.flags)
    trial.prepare()
    trial.together([(arm, rate, 1) for arm in trial.arms for rate in arm.rates])
    tried = {(arm.name, rate): curve(trial.folder(arm, rate, 1))
             for arm in trial.arms for rate in arm.rates}
    base = next(iter(tried.values()))[0]
    best = min(new for points in tried.values() for new, _ in points)
    levels = [base[0] - share * (base[0] - best) for share in LEVELS]
    goal = base[0] - LEVEL * (base[0] - best)

    def cost(arm: Arm, rate: float) -> tuple[float, float, float]:
        points = tried[arm.name, rate]
        return old_at(points, goal), points[-1][0], rate

    rates = {arm.name: min(cost(arm, rate) for rate in arm.rates)[-1] for arm in trial.arms}
    seeds = range(1, command.flags.seeds + 1)
    trial.together([(arm, rates[arm.name], seed) for arm in trial.arms for seed in seeds])
    rows = []
    for arm in trial.arms:
        rate = rates[arm.name]
        curves = [curve(trial.folder(arm, rate, seed)) for seed in seeds]
        info = read_json(trial.folder(arm, rate, 1) / "run.json")["parameters"]
        rows.append({"arm": arm.name, "rate": rate, "learns": info.get("trained", info["total"]),
                     "old": [[old_at(points, level) for points in curves] for level in levels],
                     "final": [points[-1] for points in curves], "curves": curves,
                     "tried": {f"{rate:g}": tried[arm.name, rate] for rate in arm.rates}})
    text = table(command.flags, base, best, levels, rows)
    print(text)
    write_text(trial.out / "table.md", text + "\n")
    flags = {name: Path(value).name if name in ("old", "new", "out") else value
             for name, value in vars(command.flags).items()}
    write_json(trial.out / "results.json", {
        "flags": flags, "size": trial.size, "base": base, "best": best, "levels": levels,
        "rows": finite(rows)})
    write_text(trial.out / "curves.svg", drawing(rows))
    return 0


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval; (inf, 0) where a run did not come so far."""
    if not all(map(math.isfinite, values)):
        return math.inf, 0.0
    if len(values) == 1:
        return values[0], math.inf
    t = T_95[min(len(values), len(T_95)) - 1]
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def table(flags: Flags, base: tuple[float, float], best: float, levels: list[float],
          rows: list[dict]) -> str:
    """The table, and what follows from its intervals at LEVEL."""
    lines = [f"old: {flags.old}; new: {Path(flags.new).name}; {flags.size}. The base has "
             f"{base[1]:.3f} nats on the old domain and {base[0]:.3f} on the new; the lowest on the"
             f" new is {best:.3f}.", "",
             "| old-domain loss where of the way to the new | rate | learns | "
             + " | ".join(f"{share:.0%} ({level:.3f})" for share, level
                          in zip(LEVELS, levels, strict=True)) + " |",
             "|---" * (3 + len(levels)) + "|"]
    for row in rows:
        cells = [interval(values) for values in row["old"]]
        said = ["–" if math.isinf(centre) else f"{centre:.3f}"
                + ("" if math.isinf(half) else f" ± {half:.3f}") for centre, half in cells]
        lines.append(f"| {row['arm']} | {row['rate']:g} | {row['learns']:,} | "
                     f"{' | '.join(said)} |")
    full = [row for row in rows if row["arm"].startswith("full, ") and "%" not in row["arm"]]
    if not full:
        return "\n".join(lines)
    place = LEVELS.index(LEVEL)
    plain = min(full, key=lambda row: interval(row["old"][place]))
    centre, half = interval(plain["old"][place])
    verdicts: dict[str, list[str]] = {"forgets less": [], "forgets more": [],
                                      "forgets about as much": [], "does not come so far": []}
    for row in rows:
        other, width = interval(row["old"][place])
        if row is plain:
            continue
        apart = half + width if math.isfinite(half + width) else 0.0
        which = ("does not come so far" if math.isinf(other) else
                 "forgets less" if other + apart < centre else
                 "forgets more" if other - apart > centre else "forgets about as much")
        verdicts[which].append(row["arm"])
    lines += ["", f"At {LEVEL:.0%} of the way, beside the best plain full tuning ({plain['arm']}: "
              f"{centre:.3f}), by intervals that do not meet" + (
                  " (one seed: by the means)" if len(plain["final"]) == 1 else "") + ": "
              + ". ".join(f"{what[0].upper()}{what[1:]}: {'; '.join(names) or 'none'}"
                          for what, names in verdicts.items()) + "."]
    return "\n".join(lines)


def finite(rows: list[dict]) -> list[dict]:
    """Rows as JSON has them: null where a run did not come so far."""
    return [row | {"old": [[value if math.isfinite(value) else None for value in values]
                           for values in row["old"]]} for row in rows]


def drawing(rows: list[dict]) -> str:
    """The curves of the first seed, loss on the old domain against loss on the new, as SVG: to the
    left the new one is learned, and up the old one is forgotten."""
    lines = [Line(number, "strong", [Point(new, old, old, old) for new, old in row["curves"][0]])
             for number, row in enumerate(rows)]
    least = min(point.step for line in lines for point in line.points)
    chart = Chart("loss on the old domain against loss on the new, nats per token",
                  ("trade_off",), log=True, axis="loss on the new domain", left=0.98 * least)
    labels = [f"{row['arm']} (rate {row['rate']:g})" for row in rows]
    return alone(draw(chart, labels, lines))


if __name__ == "__main__":
    run_command(main, COMMAND)
