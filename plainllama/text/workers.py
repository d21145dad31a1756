"""Who makes the parts: processes of this machine, or the nodes of a cluster; each makes one part at
a time. How they start, end, and show how far they are."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from plainllama.cluster import Cluster
from plainllama.machine import cores
from plainllama.progress import Progress

NOTES = "work.tmp"  # state.json, part-*.json and half-made shards, until the manifest is written
COUNTS = ("documents", "tokens", "bytes")


@dataclass
class Worker:
    """What a process has that makes parts."""

    tools: Any  # what was loaded first
    report: Callable[..., None]  # (part, documents, tokens, bytes): so many more are done


POOL: list[Worker] = []  # in a process of the pool: its own


def nothing() -> None:
    """Do nothing: for a process that needs no tools, and one that shows nothing."""


def own_folder(folder: Path, prefix: str = "") -> tempfile.TemporaryDirectory:
    """Make a folder among the notes for one process: what outlives a killed run cannot write into
    the next one's."""
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder / NOTES)


@dataclass(frozen=True)
class Processes:
    """Processes of this machine: `most` of them, 0 for one on each core."""

    most: int

    def count(self, jobs: int) -> int:
        """Choose how many share so many jobs."""
        return min(self.most or cores(), jobs)

    def run(self, folder: Path, make: Callable, parts: dict[int, Any],
            load: Callable[[], Any] = nothing, loaded: Any = None) -> None:
        """Call make(worker, number, part) for each part, in processes of their own, or in this one
        if one is enough, and show how far they are.

        `load` gives a process its tools; `loaded` are those of this process.
        """
        context = multiprocessing.get_context("spawn")
        counters = context.Array("q", len(COUNTS) + max(parts) + 1)
        overview = Overview(folder, parts, counters)
        count = self.count(len(parts))
        if count == 1:
            ours = Worker(loaded, partial(count_up, counters, overview.update))
            for number, part in parts.items():
                make(ours, number, part)
                overview.waiting.remove(number)
                overview.update()
            return
        with ProcessPoolExecutor(count, context, start_worker, (load, counters)) as pool:
            # Ctrl-C waits while workers start, who inherit that; then it kills them, as errors do
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            futures = {pool.submit(work, make, number, part): number
                       for number, part in parts.items()}
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


@dataclass(frozen=True)
class Nodes:
    """The nodes of a cluster, which share the folder."""

    cluster: Cluster

    def count(self, jobs: int) -> int:
        """Count how many of so many jobs run side by side."""
        return self.cluster.places(jobs)

    def run(self, folder: Path, make: Callable, parts: dict[int, Any],
            load: Callable[[], Any] = nothing, loaded: Any = None) -> None:
        """Do as Processes.run() does."""
        counters = [0] * (len(COUNTS) + max(parts) + 1)
        overview = Overview(folder, parts, counters)
        made: dict[int, list[int]] = {}

        def show(reports: dict[int, list[int]]) -> None:
            found = reports | made
            counters[:len(COUNTS)] = map(sum, zip(*found.values(), strict=True)) if found else (
                0,) * len(COUNTS)
            for number, counts in found.items():
                counters[len(COUNTS) + number] = counts[-1]
            overview.update()

        for number, counts in self.cluster.each(partial(make_there, make), parts, load, show):
            overview.waiting.remove(number)
            made[number] = counts  # and each() shows them


@dataclass
class There:
    """A worker in a process of a node: it counts, and reports all that it has of its part."""

    tools: Any
    tell: Callable[[list[int]], None]
    counts: list[int] = field(default_factory=lambda: [0] * len(COUNTS))

    def report(self, number: int, *counts: int) -> None:
        """Add documents, tokens and bytes."""
        self.counts = [old + new for old, new in zip(self.counts, counts, strict=True)]
        self.tell(self.counts)


def make_there(make: Callable, tools: Any, number: int, part: Any,
               tell: Callable[[list[int]], None]) -> list[int]:
    """Make a part in a process of a node; its documents, tokens and bytes."""
    worker = There(tools, tell)
    make(worker, number, part)
    return worker.counts


# ---- in a process of the pool

def count_up(counters: Any, show: Callable[[], None], number: int, *counts: int) -> None:
    """Add documents, tokens and bytes of part `number` to what all share: COUNTS, then the bytes
    of each part."""
    with counters.get_lock():
        for i, count in enumerate(counts):
            counters[i] += count
        counters[len(COUNTS) + number] += counts[-1]
    show()


def start_worker(load: Callable[[], Any], counters: Any) -> None:
    """Prepare this process for its parts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=die_with, args=[multiprocessing.parent_process()], daemon=True).start()
    POOL.append(Worker(load(), partial(count_up, counters, nothing)))


def die_with(parent) -> None:
    """End this process when the one that started it has gone, killed or not."""
    parent.join()
    os._exit(1)


def work(make: Callable, number: int, part: Any) -> None:
    """Make a part."""
    make(POOL[0], number, part)


# ---- the progress line

class Overview(Progress):
    """How far all the parts are."""

    def __init__(self, folder: Path, parts: dict[int, Any], counters: Any):
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
