"""Tokens to a loss, Muon against AdamW: python runs/optimizers.py [--dataset=quickstart]

Each arm gets the same number of trials, one run at each learning rate below, with one seed; the
rate with the lowest last validation loss then makes three runs with seeds of their own. The goal is
the worst last loss of AdamW's three, which all of them reach; the ratio is AdamW's tokens (or
seconds of training) to it over Muon's, by seed, with a 95 % interval (Student's t of the
logarithms). About an hour on two cores; a second use goes on where the first was stopped.
The data set first: python prepare.py config/bench_adamw.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.files import read_rows
from plainllama.report.compare import T_95
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What runs/optimizers.py takes."""

    dataset: str = key("quickstart", "folder under data/, best with 4,096 entries")
    steps: int = key(800, "updates of every run", low=50)
    out: str = key("out/optimizers", "folder for the runs")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import math
import subprocess
from itertools import pairwise
from statistics import mean, stdev

ARMS = ("adamw", "muon")
# Muon's steps are scaled to AdamW's size, so that the range is shared
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
SEEDS = (1, 2, 3)

Curve = list[tuple[int, float, float]]  # tokens, seconds of training, validation loss


def main(command: CommandLine) -> int:
    """Run what is missing, then print."""
    flags = command.flags
    tuned = {(arm, rate): train(flags, arm, rate, 0) for rate in RATES for arm in ARMS}
    best = {}
    for arm in ARMS:
        for rate in RATES:
            print(f"{arm}, {rate:g}: last loss {tuned[arm, rate][-1][2]:.4f}")
        best[arm] = min(RATES, key=lambda rate: tuned[arm, rate][-1][2])
        if best[arm] in (RATES[0], RATES[-1]):
            print(f"note: {arm}'s best rate {best[arm]:g} is at the end of the range")
    runs = {(seed, arm): train(flags, arm, best[arm], seed) for seed in SEEDS for arm in ARMS}
    for arm in ARMS:
        last = [runs[seed, arm][-1][2] for seed in SEEDS]
        print(f"{arm}, {best[arm]:g}: last losses {', '.join(f'{x:.4f}' for x in last)}, "
              f"mean {mean(last):.4f}")
    goal = max(runs[seed, "adamw"][-1][2] for seed in SEEDS)
    for what, column in (("tokens", 0), ("seconds", 1)):
        reached = {arm: [first(runs[seed, arm], goal, column) for seed in SEEDS] for arm in ARMS}
        if any(math.isnan(x) for x in reached["muon"]):
            print(f"{what}: Muon did not reach {goal:.4f} with every seed: AdamW is ahead")
            continue
        logs = [math.log(a / b) for a, b in zip(reached["adamw"], reached["muon"], strict=True)]
        half = T_95[len(logs) - 1] * stdev(logs) / math.sqrt(len(logs))
        low, middle, high = (math.exp(mean(logs) + x) for x in (-half, 0, half))
        print(f"| {what} to {goal:.4f} nats: Muon beside AdamW | {mean(reached['muon']):,.0f} | "
              f"{mean(reached['adamw']):,.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return 0


def train(flags: Flags, arm: str, rate: float, seed: int) -> Curve:
    """Its curve; trained, or trained to its end, if it was not yet."""
    run = Path(flags.out) / f"{arm}_{rate:g}_{seed}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(ROOT / f"config/bench_{arm}.py"),
         f"--dataset={flags.dataset}", f"--learning_rate={rate}", f"--min_lr={rate / 10}",
         f"--seed={seed}", f"--max_steps={flags.steps}", f"--out_dir={run}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{run}: {done.stderr.strip()}")
    return curve(read_rows(run / "metrics.jsonl", tolerant=True))


def curve(rows: list[dict]) -> Curve:
    """The evaluations of a run, each with the seconds of training before it."""
    found: Curve = []
    tokens, seconds = 0, 0.0
    for row in rows:
        if "tokens_per_second" in row:
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
        elif "val_loss" in row:
            found.append((row["tokens"], seconds, row["val_loss"]))
    return found


def first(curve: Curve, goal: float, column: int) -> float:
    """Tokens (0) or seconds (1) at which the straight lines between evaluations first reach the
    goal; not a number if they never do."""
    for before, after in pairwise(curve):
        if after[2] <= goal:
            share = (before[2] - goal) / (before[2] - after[2])
            return before[column] + share * (after[column] - before[column])
    return math.nan


if __name__ == "__main__":
    run_command(main, COMMAND)
