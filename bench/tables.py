"""How fast clients become text and states: python bench/tables.py [--rows=1000000]

1. Transactions of a .csv in no order -> a document a client: prepare.py's own reader, sorter and
   renderer in two processes, beside pandas (a stable sort by client and time, then one to_csv() a
   client), which holds the whole table in memory.
2. States of clients: sample.py --embed, after its start, beside the bare forward of the same
   batches.
"""

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.text import documents, sources

SOURCE = {"id": "client", "time": "date", "columns": ["date", "mcc", "type", "amount"]}
PANDAS = """
import resource, sys, time
import pandas as pd
began = time.perf_counter()
table = pd.read_csv(sys.argv[1]).sort_values(["client", "date"], kind="stable")
size = sum(len(own.to_csv(index=False)) for _, own in table.groupby("client"))
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
EMBED = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import sample
from plainllama.command import parse_arguments
from plainllama.generation import generate
from plainllama.parallel import World
inside, hidden, decode = [0.0], generate.LLaMA.hidden, sample.decode
def timed(self, *words, **keys):
    began = time.perf_counter()
    states = hidden(self, *words, **keys)
    inside[0] += time.perf_counter() - began
    return states
def whole(*words, **keys):
    began = time.perf_counter()
    made = decode(*words, **keys)
    print("seconds", time.perf_counter() - began, inside[0])
    return made
generate.LLaMA.hidden, sample.decode = timed, whole
raise SystemExit(sample.main(parse_arguments(sample.__doc__, sample.Flags, "none")))
"""


def write_rows(path: Path, rows: int) -> None:
    """Write transactions of clients with about a hundred each."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        file.write("client,date,mcc,type,amount\n")
        for _ in range(rows):
            file.write(f"{draw.randrange(rows // 100 or 1)},2023-{draw.randrange(1, 13):02}-"
                       f"{draw.randrange(1, 29):02},{draw.choice([5411, 5462, 5541, 7542])},"
                       f"{draw.randrange(20)},{draw.lognormvariate(3, 1):.2f}\n")


def characters(part: documents.Part) -> int:
    """Render the clients of a part; how long their texts are."""
    return sum(map(len, documents.documents([part], documents.Tally())))


def ours(path: Path, home: Path) -> float:
    """Seconds of sorting and rendering."""
    began = time.perf_counter()
    _, parts = sources.survey([{"path": str(path), **SOURCE}], documents="table")
    with tempfile.TemporaryDirectory(dir=home) as folder:
        parts = documents.grouped(parts, Path(folder))
        with ProcessPoolExecutor(2) as pool:
            sum(pool.map(characters, parts))
    return time.perf_counter() - began


def text(home: Path, rows: int, rounds: int) -> None:
    """Print seconds and memory of both."""
    path = home / "rows.csv"
    write_rows(path, rows)
    seconds: dict[str, list[float]] = {"ours": [], "pandas": []}
    for _ in range(rounds):
        seconds["ours"].append(ours(path, home))
        done = subprocess.run([sys.executable, "-c", PANDAS, str(path)], check=True,
                              capture_output=True, text=True)
        spent, peak = map(float, done.stdout.split())
        seconds["pandas"].append(spent)
    mine, theirs = (statistics.median(seconds[name]) for name in ("ours", "pandas"))
    alone = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {rows:,} transactions to text | {mine:.1f} s, {alone:.0f} MB | pandas {theirs:.1f} "
          f"s, {peak:.0f} MB | {theirs / mine:.2f} |", flush=True)


def states(home: Path, clients: int, rounds: int) -> None:
    """Print the share of --embed that is the model's forward."""
    write_rows(home / "rows.csv", clients * 30)
    (home / "t.py").write_text(
        f"dataset = 't'\ndocuments = 'table'\nsources = { {'path': 'rows.csv', **SOURCE}!r}\n"
        "tokenizer = 'bpe:512'\nn_layer = 4\nn_head = 4\nd_model = 128\nd_ff = 344\n"
        "block_size = 1024\nglobal_batch_tokens = 1024\nmax_steps = 1\nwarmup_steps = 0\n"
        "eval_tokens = 1024\nsample_tokens = 0\ndevice = 'cpu'\n")
    for words in (["prepare.py", "t.py"], ["train.py", "t.py"]):
        subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=home, check=True,
                       stdout=subprocess.DEVNULL)
    shares = []
    for trial in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", EMBED, str(ROOT), "--ckpt=out/t", "--embed=mean", "--layers=1:",
             "--prompts=data/t", f"--out=states_{trial}.parquet"], cwd=home, check=True,
            capture_output=True, text=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("seconds"))
        whole, inside = map(float, line.split()[1:])
        shares.append((inside / whole, whole))
    share, seconds = sorted(shares)[rounds // 2]
    print(f"| states of {clients:,} clients | {seconds:.1f} s | the forward alone "
          f"{share * seconds:.1f} s | {share:.2f} |", flush=True)


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as home:
        text(Path(home), words.rows, words.rounds)
        states(Path(home), words.clients, words.rounds)


if __name__ == "__main__":
    main()
