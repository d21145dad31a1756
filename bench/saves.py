"""What saving costs, and how soon a run goes on: python bench/saves.py [--steps=200] [--every=20]

A model of 30 M parameters trains on the quickstart's data set (python prepare.py
config/quickstart.py) in steps of 8,192 tokens, once with a checkpoint every --every steps and once
with the last one only; wall time of the whole commands, hashing and syncing included. Then the
saved run is started again: time and memory until its first step, beside those of a fresh start.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments
from plainllama.files import read_rows
from plainllama.settings import ceil_div, key


@dataclass
class Flags:
    """What bench/saves.py takes."""

    steps: int = key(200, "updates of each arm", low=1)
    every: int = key(20, "steps between checkpoints", low=1)
    rounds: int = key(1, "turns of each arm", low=1)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import json
import os
import subprocess
import tempfile
import time
from statistics import median

TRAIN = ["config/quickstart.py", "--n_layer=8", "--n_head=8", "--d_model=512", "--d_ff=1376",
         "--global_batch_tokens=8192", "--optimizer=adamw", "--sample_tokens=0", "--warmup_steps=0",
         "--eval_tokens=256", "--eval_interval=1000000"]
# train.py, which notes when it has imported, when its first update begins, and until then the most
# memory of its own (files that are mapped left out)
CHILD = """
import json, sys, threading, time
began = time.perf_counter()
import train
from plainllama.command import parse
from plainllama.training.engine import Engine
imported, notes, most, real = time.perf_counter(), {}, [0], Engine.update
def watch():
    while not notes:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                most[0] = max(most[0], int(line.split()[1]) * 1024)
        time.sleep(0.005)
def update(self, *args):
    if not notes:
        notes.update(imports=imported - began, ready=time.perf_counter() - imported, bytes=most[0])
    return real(self, *args)
threading.Thread(target=watch, daemon=True).start()
Engine.update = update
code = train.main(parse(sys.argv[1:], "", train.Flags))
print(json.dumps(notes))
sys.exit(code)
"""


def train(*words: str) -> dict:
    """Run it; its notes and `wall`, seconds of the whole command."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *TRAIN, *words], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout.splitlines()[-1]) | {"wall": time.perf_counter() - began}


def main(command: CommandLine) -> int:
    """Measure and print."""
    flags = command.flags
    arms: dict[str, list[dict]] = {"saving": [], "not": []}
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as folder:
        for turn in range(flags.rounds):
            for arm in list(arms)[::1 if turn % 2 else -1]:
                every = flags.every if arm == "saving" else 10**6
                arms[arm].append(train(f"--out_dir={folder}/{arm}{turn}",
                                       f"--save_interval={every}", f"--max_steps={flags.steps}"))
        run = Path(folder) / "saving0"
        rows = read_rows(run / "metrics.jsonl", tolerant=True)
        again = train(f"--out_dir={run}", f"--max_steps={flags.steps + 1}", "--extend")
    saving, without = (median(one["wall"] for one in arms[arm]) for arm in arms)
    fresh, saves = arms["saving"][0], ceil_div(flags.steps, flags.every)
    copies = sum(row.get("save_seconds", 0) for row in rows) / max(1, saves - 1)  # not the last
    print(f"| {flags.steps} steps of 8,192 tokens, 30 M parameters, {saves} saves against 1 | "
          f"{saving:.1f} s | {without:.1f} s | {saving / without:.3f} |")
    print(f"| training waits for a save | {copies:.2f} s | | |")
    print(f"| from imports to the first step, resumed against fresh | {again['ready']:.1f} s | "
          f"{fresh['ready']:.1f} s | {again['ready'] / fresh['ready']:.2f} |")
    print(f"| own memory until then | {again['bytes'] / 1e6:.0f} MB | "
          f"{fresh['bytes'] / 1e6:.0f} MB | {again['bytes'] / fresh['bytes']:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(COMMAND))
