"""The same bits on any number of ranks, and what that costs: python bench/deterministic.py

Trains the quickstart's data set (python prepare.py config/quickstart.py) with --deterministic on 1,
2, 4 and 8 processes, and once more on a number of them that changes, and compares the hashes of
weights and optimizer state. Then two processes take turns with and without it: tokens a second.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments
from plainllama.files import read_rows
from plainllama.settings import key


@dataclass
class Flags:
    """What bench/deterministic.py takes."""

    steps: int = key(200, "updates whose bits are compared", low=4)
    timed: int = key(40, "updates of each turn that is timed (0: none)", low=0)
    ranks: str = key("1,2,4,8", "numbers of processes")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import hashlib
import os
import subprocess
import tempfile
from statistics import median

# for the bits; a rate that does not depend on max_steps, which is where a run is broken off
SMALL = ["--n_layer=2", "--d_model=96", "--n_head=4", "--d_ff=256", "--warmup_steps=0",
         "--learning_rate=1e-3", "--min_lr=1e-3"]
LARGE = ["--n_layer=6", "--d_model=256", "--n_head=4", "--d_ff=688", "--micro_batch=1",
         "--log_interval=5"]  # for the time: 7 M parameters


def train(out: str, ranks: int, *words: str) -> Path:
    """Run train.py on some processes; the run's folder."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    subprocess.run([sys.executable, *(launch if ranks > 1 else []), "train.py",
                    "config/quickstart.py", f"--out_dir={out}", "--sample_tokens=0",
                    "--optimizer=adamw", "--eval_tokens=256", "--eval_interval=1000000", *words],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Path(out)


def bits(run: Path, step: int) -> str:
    """Hash of a checkpoint's weights and optimizer state."""
    folder = run / "checkpoints" / f"step_{step}"
    files = [folder / "model.safetensors", *sorted(folder.glob("training/optimizer-*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main(command: CommandLine) -> int:
    """Measure and print; 1 if bits differ."""
    flags, hashes = command.flags, set()
    numbers = [int(n) for n in flags.ranks.split(",")]
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as folder:
        words = [*SMALL, "--deterministic"]
        for ranks in numbers:
            run = train(f"{folder}/{ranks}", ranks, *words, f"--max_steps={flags.steps}")
            hashes.add(bits(run, flags.steps))
            print(f"{flags.steps} steps on {ranks}: {bits(run, flags.steps)}", flush=True)
        for turn, ranks in enumerate([*numbers, 1], 1):  # each goes on where the one before ended
            last = flags.steps * turn // (len(numbers) + 1)
            run = train(f"{folder}/changing", ranks, *words, f"--max_steps={last}", "--extend")
        hashes.add(bits(run, flags.steps))
        print(f"{flags.steps} steps on changing numbers: {bits(run, flags.steps)}", flush=True)
        speeds: dict[str, list[float]] = {"--deterministic": [], "--deterministic=false": []}
        for turn in range(2 if flags.timed else 0):
            for arm in list(speeds)[::1 - 2 * turn]:
                run = train(f"{folder}/{arm}{turn}", 2, *LARGE, arm, f"--max_steps={flags.timed}",
                            "--save_interval=1000000")
                rows = read_rows(run / "metrics.jsonl", tolerant=True)
                speeds[arm] += [row["tokens_per_second"] for row in rows if row["step"] > 5
                                and "loss" in row]
    if flags.timed:
        ours, plain = (median(speeds[arm]) for arm in speeds)
        print(f"| deterministic, 2 processes on gloo, 7 M parameters | {ours:,.0f} tok/s | "
              f"{plain:,.0f} tok/s | {ours / plain:.3f} |")
    return 1 if len(hashes) > 1 else 0


if __name__ == "__main__":
    raise SystemExit(main(COMMAND))
