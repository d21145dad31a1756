"""How fast rows come: python bench/rows.py

1. The first row of a set of ten billion tokens (sparse files): seconds and memory of a new process.
2. Rows from the page cache on one core, beside random windows of one np.memmap as int64, the usual
   way; and the cost of the other packings.
3. The shares of a step for which the loop waits for data, and is not in Engine.update (the data,
   the log and what else the loop does), of the smallest model that is of any use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.files import file_entry
from plainllama.settings import ceil_div
from plainllama.tokens import shards, tokenizer
from plainllama.tokens.rows import DocumentRows, Mixture, Rows

FIRST = """
import resource, sys, time
began = time.perf_counter()
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from plainllama.tokens import shards
from plainllama.tokens.rows import Rows
rows = Rows(shards.open_split(Path(sys.argv[2]), "train"), 1024, 1337)
row = rows.rows(7_654_321, 1)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
      row.shape[1], rows.windows)
"""


LOOP = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
from plainllama.command import parse_arguments
from plainllama.training import engine
times, update = [], engine.Engine.update
def timed(self, *words):
    times.append(time.perf_counter())
    stats = update(self, *words)
    times.append(time.perf_counter())
    return stats
engine.Engine.update = timed
code = train.main(parse_arguments(train.__doc__, train.Flags))
inside = sum(b - a for a, b in zip(times[2::2], times[3::2]))
print(1 - inside / (times[-1] - times[2]), (times[-1] - times[2]) / (len(times) // 2 - 1))
raise SystemExit(code)
"""


def make_set(folder: Path, tokens: int, of_file: int, document: int, fill: bool) -> Path:
    """A set with files of `of_file` tokens and documents of `document`; sparse unless filled."""
    folder.mkdir(parents=True)
    words = tokenizer.make_tokenizer("bytes")
    words.save(folder)
    files = {"tokenizer.json": file_entry(folder / "tokenizer.json")}
    rng = np.random.default_rng(0)
    documents = ceil_div(of_file, document)
    for i in range(tokens // of_file):
        for name in ("train",) if i else ("train", "val"):
            path = folder / f"{name}-{i:05}.bin"
            with open(path, "wb") as file:
                file.write(shards.HEADER.pack(shards.MAGIC, shards.FORMAT, 2, of_file))
                if fill:
                    file.write(rng.integers(0, 258, of_file, np.uint16).tobytes())
                file.truncate(shards.HEADER.size + 2 * of_file)
            index = path.with_suffix(".idx")
            with open(index, "wb") as file:
                if fill:
                    file.write(np.arange(0, of_file, document, np.uint64).tobytes())
                file.truncate(documents * 8)
            files[path.name] = {"size": path.stat().st_size, "sha256": "", "tokens": of_file,
                                "documents": documents, "largest_id": 257}
            files[index.name] = {"size": index.stat().st_size, "sha256": ""}
    split = {"documents": 1, "tokens": tokens, "bytes": tokens, "longest": document, "tail": 0}
    shards.write_manifest(folder, {
        "recipe": {}, "source": [], "splits": {"train": split, "val": split}, "files": files,
        "tokenizer": {"spec": "bytes", "sha256": words.sha256, "vocab_size": 258,
                      "bos": words.bos_id, "eos": words.eos_id}})
    return folder


def first_row(home: Path) -> None:
    """Time and memory of a process that asks a large set for one row."""
    folder = make_set(home / "sparse", 10_000_000_000, 16_000_000, 1000, False)
    found = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", FIRST, str(ROOT), str(folder)], check=True,
                              capture_output=True, text=True)
        found.append([float(word) for word in done.stdout.split()])
    seconds, megabytes = (statistics.median(run[i] for run in found) for i in (0, 1))
    print(f"| first row of 10 billion tokens, new process | {seconds:.2f} s, {megabytes:.0f} MB "
          "| | |", flush=True)


def speed(home: Path) -> None:
    """Tokens a second of rows, interleaved with random windows of one memory map."""
    folder, T, n = make_set(home / "filled", 64_000_000, 8_000_000, 1500, True), 1024, 480
    split = shards.open_split(folder, "train")
    flat = home / "flat.bin"
    flat.write_bytes(b"".join(split.shard(i).tobytes() for i in range(len(split.names))))
    rng = np.random.default_rng(1)
    rows, documents = Rows(split, T, 1), DocumentRows(split, T, 1)
    mixed = Mixture([rows, Rows(split, T, 2)], [0.7, 0.3])

    def usual(first: int) -> None:
        data = np.memmap(flat, np.uint16, "r")
        starts = rng.integers(0, len(data) - T - 1, n)
        np.stack([data[i:i + T].astype(np.int64) for i in starts])
        np.stack([data[i + 1:i + 1 + T].astype(np.int64) for i in starts])

    ways = {"rows": lambda first: rows.rows(first, n), "usual": usual,
            "doc": lambda first: documents.rows(first, n),
            "mixture": lambda first: mixed.rows(first, n)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(60):
        for name, way in ways.items():
            began = time.perf_counter()
            way(trial * n)
            seconds[name].append(time.perf_counter() - began)
    rate = {name: n * T / statistics.median(times[10:]) / 1e6 for name, times in seconds.items()}
    print(f"| rows of 1,024 from the page cache, M tokens/s on one core | {rate['rows']:.0f} | "
          f"one memmap, random windows {rate['usual']:.0f} | {rate['rows'] / rate['usual']:.1f} |")
    for name in ("doc", "mixture"):
        print(f"| the same, {name} | {rate[name]:.0f} | plain rows {rate['rows']:.0f} "
              f"| {rate[name] / rate['rows']:.2f} |", flush=True)


def waiting(home: Path) -> None:
    """The shares of training time for which the loop waits for its batch, and is not in an
    update."""
    (home / "data").mkdir()
    (home / "data/filled").symlink_to(home / "filled")
    words = ["--dataset=filled", "--n_layer=2", "--n_head=2", "--d_model=64", "--d_ff=128",
             "--block_size=256", "--global_batch_tokens=8192", "--max_steps=41",
             "--log_interval=10", "--eval_interval=1000", "--eval_tokens=8192", "--device=cpu",
             "--sample_tokens=0", "--out_dir=out/wait", "--warmup_steps=1", "--vocab_size=4096"]
    done = subprocess.run([sys.executable, "-c", LOOP, str(ROOT),
                           str(ROOT / "config/bench_tiny.py"), *words],
                          cwd=home, check=True, stdout=subprocess.PIPE, text=True)
    outside, step = map(float, done.stdout.splitlines()[-1].split())
    lines = (home / "out/wait/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row and 1 < row["step"] <= 40]
    wait = sum(row["data_seconds"] for row in rows) / 39
    print(f"| the loop waits for data, share of a step of {step * 1e3:.0f} ms | {wait / step:.2%} "
          "| | |")
    print(f"| all of the loop but Engine.update, share of that step | {outside:.2%} | | |",
          flush=True)


def main() -> None:
    """All three."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as home:
        first_row(Path(home))
        speed(Path(home))
        waiting(Path(home))


if __name__ == "__main__":
    main()
