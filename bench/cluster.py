"""prepare.py on a Ray cluster beside one machine: python bench/cluster.py [CORPUS] [--memory]

Starts a cluster of two places on this machine and prepares the same text in turn with --workers=2
and on the cluster: whole commands, with the start-up, which a set of ten documents measures, apart.
Then the peak memory of all processes that work, added up (what they share once, pages of files
not), for so much text and for ten times as much.
"""

import contextlib
import json
import os
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.prepare import gather
from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.settings import UserError, key

LETTERS = string.ascii_lowercase


@dataclass
class Flags:
    """What bench/cluster.py takes."""

    megabytes: float = key(300.0, "of text", low=0.1)
    rounds: int = key(3, "turns of each side", low=1)
    tokenizer: str = key("bytes", "as prepare.py takes it")
    dedup: str = key("none", "as prepare.py takes it", choices=("none", "exact", "near"))
    memory: bool = key(False, "also measure the peak memory, for ten times as much text too")


def share_of(ids: list[str]) -> float:
    """Megabytes of processes; what several have in common counts once."""
    total = 0
    for number in ids:
        try:
            lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
        except (OSError, StopIteration):
            pass  # it has ended
    return total / 1024


def working(sessions: list[int]) -> list[str]:
    """Find the processes that prepare: a command's own, and the places of the cluster."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            seat = b"ray::Seat" in (path / "cmdline").read_bytes()
            if int(fields[3]) == sessions[0] or (seat and int(fields[3]) == sessions[1]):
                found.append(path.name)
    return found


def run(home: Path, name: str, f: Flags, side: list[str], text: str,
        head: int) -> tuple[float, float]:
    """Prepare a set; its seconds and the peak megabytes. It is removed afterwards."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            peak[0] = max(peak[0], share_of(working([process.pid, head])))

    # named by a file: for a text of the command line a run's speed would be measured at the end
    (home / f"{name}.py").write_text(f"sources = {text!r}\n")
    words = [sys.executable, str(ROOT / "prepare.py"), f"{name}.py", f"--dataset={name}",
             f"--tokenizer={f.tokenizer}", f"--dedup={f.dedup}", *side]
    begin = time.perf_counter()
    process = subprocess.Popen(words, cwd=home, stdout=subprocess.DEVNULL, start_new_session=True)
    if f.memory:
        threading.Thread(target=watch, daemon=True).start()
    if process.wait():
        raise UserError(f"prepare.py ends with {process.returncode}")
    seconds = time.perf_counter() - begin
    done.set()
    subprocess.run(["rm", "-r", str(home / "data" / name)], check=True)
    return seconds, peak[0]


def main(command: CommandLine) -> int:
    """Measure and print."""
    f = command.flags
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        size = gather((command.files or ["embedded"])[0], f.megabytes, home / "text.jsonl")
        (home / "few.jsonl").write_text("".join(
            f'{{"text": "{str(row) * 9999}"}}\n' for row in range(10)))
        ray = str(Path(sys.executable).with_name("ray"))
        head = subprocess.Popen(
            [ray, "start", "--head", f"--port={port}", "--num-cpus=2",
             "--include-dashboard=false", "--disable-usage-stats"], start_new_session=True,
            env=os.environ | {"RAY_raylet_start_wait_time_s": "180"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if head.wait():
                raise UserError("ray start fails")
            sides = {"--workers=2": ["--workers=2"], "--ray": [f"--ray=127.0.0.1:{port}"]}
            found: dict = {name: [] for name in sides}
            for turn in range(f.rounds):
                for name, words in sides.items():
                    start, _ = run(home, f"s{turn}", f, words, "few.jsonl", head.pid)
                    seconds, peak = run(home, f"t{turn}", f, words, "text.jsonl",
                                        head.pid)
                    found[name].append((seconds, start, seconds - start, peak))
            table = {name: [median(column) for column in zip(*rows, strict=True)]
                     for name, rows in found.items()}
            for name, (seconds, start, work, _) in table.items():
                print(f"| prepare {size:.0f} MB, {f.tokenizer}, dedup {f.dedup}, {name} | "
                      f"{seconds:.1f} s, of them {start:.1f} s start-up | without it {work:.1f} s, "
                      f"{work / table['--workers=2'][2]:.2f} of one machine |", flush=True)
            if f.memory:
                with open(home / "ten.jsonl", "w") as ten, open(home / "text.jsonl") as text:
                    for copy in range(10):  # other letters, so that no copy repeats another one
                        turned = str.maketrans(LETTERS, LETTERS[copy:] + LETTERS[:copy])
                        text.seek(0)
                        for line in text:
                            row = {"text": json.loads(line)["text"].translate(turned)}
                            ten.write(json.dumps(row, ensure_ascii=False) + "\n")
                for name, words in sides.items():
                    _, peak = run(home, "ten", f, words, "ten.jsonl", head.pid)
                    print(f"| peak memory, {name} | {table[name][3]:.0f} MB for {size:.0f} MB of "
                          f"text | {peak:.0f} MB for ten times as much | "
                          f"{peak / table[name][3]:.2f} |", flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)  # what it left running
    return 0


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
