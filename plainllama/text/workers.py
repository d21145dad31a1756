"""Processes that each make one part at a time: how they start, end, and show how far they are."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plainllama.command import cores
from plainllama.progress import Progress
from plainllama.text.documents import Part

NOTES = "work.tmp"  # state.json, part-*.json and half-made shards, until the manifest is written
COUNTS = ("documents", "tokens", "bytes")


@dataclass
class Worker:
    """What a process has that makes parts: one of the pool, or ours if one is enough."""

    tools: Any  # what was loaded first
    counters: Any  # shared by all: COUNTS, then the bytes of each part
    show: Callable[[], None]

    def report(self, number: int, *counts: int) -> None:
        """Add documents, tokens and bytes of part `number` to what is shown."""
        with self.counters.get_lock():
            for i, count in enumerate(counts):
                self.counters[i] += count
            self.counters[len(COUNTS) + number] += counts[-1]
        self.show()


POOL: list[Worker] = []  # in a process of the pool: its own


def own_folder(folder: Path, prefix: str = "") -> tempfile.TemporaryDirectory:
    """Make a folder among the notes for one process: what outlives a killed run cannot write into
    the next one's."""
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder / NOTES)


def worker_count(asked: int, jobs: int) -> int:
    """Choose the number of processes; `asked`: the config's `workers`."""
    return min(asked or cores(), jobs)


def run_workers(folder: Path, make: Callable, parts: dict[int, Part], workers: int,
                load: Callable[[], Any] | None = None, loaded: Any = None) -> None:
    """Call make(worker, number, part) for each part, in processes of their own, or in this one if
    one is enough, and show how far they are.

    `load` gives a process its tools; `loaded` are those of this process.
    """
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", len(COUNTS) + max(parts) + 1)
    overview = Overview(folder, parts, counters)
    count = worker_count(workers, len(parts))
    if count == 1:
        ours = Worker(loaded, counters, overview.update)
        for number, part in parts.items():
            make(ours, number, part)
            overview.waiting.remove(number)
            overview.update()
        return
    with ProcessPoolExecutor(count, context, start_worker, (load, counters)) as pool:
        # Ctrl-C waits while workers start, who inherit that; then it kills them, as any error does
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = {pool.submit(work, make, number, part): number for number, part in parts.items()}
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while futures:
                for future in wait(futures, 0.25, FIRST_COMPLETED).done:
                    future.result()
                    overview.waiting.remove(futures.pop(future))
                overview.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # at once: what they hold is made again
            raise


# ---- in a process of the pool

def start_worker(load: Callable[[], Any] | None, counters) -> None:
    """Prepare this process for its parts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=die_with, args=[multiprocessing.parent_process()], daemon=True).start()
    POOL.append(Worker(load() if load else None, counters, lambda: None))


def die_with(parent) -> None:
    """End this process when the one that started it has gone, killed or not."""
    parent.join()
    os._exit(1)


def work(make: Callable, number: int, part: Part) -> None:
    """Make a part."""
    make(POOL[0], number, part)


# ---- the progress line

class Overview(Progress):
    """How far all the parts are."""

    def __init__(self, folder: Path, parts: dict[int, Part], counters):
        super().__init__(str(folder), 0, "kB")
        self.sizes = {number: part.size for number, part in parts.items()}  # bytes, roughly
        self.waiting = set(parts)  # those that are not made
        self.counters = counters

    def update(self) -> None:
        """Take what the workers have counted, and show the line if that is due or the last time."""
        size = self.counters[COUNTS.index("bytes")]
        # sizes are guesses for packed files: the parts that wait are worth a tenth at least
        least = size + size * len(self.waiting) // len(self.sizes) // 10
        total = max(sum(self.sizes.values()), least) if self.waiting else size
        self.total = total // 1000
        self.add(size // 1000 - self.done, last=not self.waiting)

    def details(self, seconds: float) -> str:
        """Say what the line says beside bytes and time."""
        documents, tokens, _ = self.counters[:len(COUNTS)]
        made = len(self.sizes) - len(self.waiting)
        line = (f", {documents:,} documents, {tokens / seconds:,.0f} tokens/s, "
                f"{made} of {len(self.sizes)} parts, {seconds:.0f} s")
        bytes_read = {i: self.counters[len(COUNTS) + i] for i in self.waiting}
        shares = [(n / max(self.sizes[i], 1), i) for i, n in bytes_read.items() if n]
        if shares:
            share, slowest = min(shares)
            line += f", slowest: part {slowest}, {share:.0%}"
        return line
