"""What worker processes do with a part: documents -> their split -> tokens -> shards,
and, for --dedup, documents -> marks that tell repeated ones.

A part's files are a function of the part alone, so any number of workers writes the same bytes.
"""

import hashlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import settings
from shards import ShardWriter, token_dtype
from sources import Piece, Rules, Tally, documents, size_of
from tokenizer import CUT, Tokenizer

BATCH = 1 << 20  # characters encoded at a time: bounds the memory
COUNTS = ("documents", "tokens", "bytes")
NOTES = "work.tmp"  # state.json, part-*.json and half-made shards, until the manifest is written
# Near duplicates: signatures of 32 bands of 4 hashes; two texts whose runs of three words have the
# Jaccard similarity J meet in some band with probability 1 - (1 - J^4)^32, 0.97 for J = 0.57.
BANDS, NEAR = 32, 0.5
WORKER: dict = {}  # a worker's tokenizer and the counters of its progress


@dataclass(frozen=True)
class Job:
    """What a worker must know of a part."""

    pieces: list[Piece]
    rules: Rules
    repeated: dict[int, str]  # texts that an earlier one repeats, and by which rule
    below: int = 0
    fraction: float = 0.0

    def texts(self, dropped: Tally, cut: Tally | None = None) -> Iterator[str]:
        """The part's documents."""
        return documents(self.pieces, dropped, self.rules, cut, self.repeated)


# ---- documents -> their split

def text_hash(text: str) -> int:
    """64 bits that choose a document's split, wherever it stands."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def placed(texts: Iterable[str], below: int, fraction: float) -> Iterator[tuple[str, str]]:
    """(split, text) of every document."""
    start = 0
    for text in texts:
        if below >= 0:
            yield "val" if text_hash(text) < below else "train", text
            continue
        end = int(len(text) * (1 - fraction)) if below == -1 else -below - start
        end, start = min(max(end, 0), len(text)), start + len(text)
        if end < len(text):  # cut at the end of a line, if there is one
            end = text.rfind("\n", 0, end) + 1 or end
        yield from (pair for pair in (("train", text[:end]), ("val", text[end:])) if pair[1])


# ---- documents -> tokens -> shards

def start_worker(folder: Path, engine: str, counters) -> None:
    """What a worker process does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, ...
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=die_with_parent, daemon=True).start()
    tokenizer = Tokenizer.load(folder)
    if engine == "tokenizers":
        tokenizer.give_up()
    WORKER.update(tokenizer=tokenizer, counters=counters, show=lambda: None)


def die_with_parent() -> None:
    """Ends this worker when the process that started it has gone, killed or not."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def progress(number: int, *counts: int) -> None:
    """Add documents, tokens and bytes of a part to what is shown."""
    counters = WORKER["counters"]
    with counters.get_lock():
        for i, count in enumerate(counts):
            counters[i] += count
        counters[len(COUNTS) + number] += counts[-1]
    WORKER["show"]()


def make_part(folder: Path, number: int, job: Job) -> None:
    """Write the shards of one part, and then its json, which says that the part is done."""
    tokenizer: Tokenizer = WORKER["tokenizer"]
    dropped, cut = Tally(), Tally()
    files: dict = {}
    splits = {split: dict.fromkeys((*COUNTS, "longest"), 0) for split in ("train", "val")}
    tokenizer.cut_words = 0
    # in a folder of its own: a worker that outlives a killed run cannot write into the next one's
    with tempfile.TemporaryDirectory(prefix=f"part-{number:05}-", dir=folder / NOTES) as own:
        writers: dict[str, ShardWriter] = {}
        for batch in batches(placed(job.texts(dropped, cut), job.below, job.fraction)):
            before = [sum(n[key] for n in splits.values()) for key in COUNTS]
            encoded = tokenizer.encode_documents([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                if split not in writers:
                    writers[split] = ShardWriter(Path(own), f"{split}-{number:05}",
                                                 token_dtype(tokenizer.vocab_size))
                writers[split].add(ids)
                size = len(text) if text.isascii() else len(text.encode())
                for key, count in zip(COUNTS, (1, len(ids), size), strict=True):
                    splits[split][key] += count
                splits[split]["longest"] = max(splits[split]["longest"], len(ids))
            progress(number, *(sum(n[key] for n in splits.values()) - was
                               for key, was in zip(COUNTS, before, strict=True)))
        if tokenizer.cut_words:
            cut.note(f"word over {CUT >> 20} MB", lambda: f"after {job.pieces[0].label}",
                     tokenizer.cut_words)
        for _, writer in sorted(writers.items()):
            files |= writer.close()
        for name in files:
            os.replace(Path(own) / name, folder / name)
    settings.to_json(folder / NOTES / f"part-{number:05}.json",
                     {"splits": splits, "dropped": dropped, "cut": cut, "files": files})


def batches(stream: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents by the megabyte."""
    batch, size = [], 0
    for item in stream:
        batch.append(item)
        size += len(item[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def run_workers(folder: Path, tokenizer: Tokenizer, workers: int, make: Callable,
                jobs: dict[int, Job], *args) -> None:
    """make(folder, number, job, *args) in processes of their own, or in this one if one is enough,
    and show how far they are."""
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", len(COUNTS) + max(jobs, default=0) + 1)
    workers, waiting = min(workers or os.cpu_count() or 1, len(jobs)), set(jobs)
    show = shown(counters, {i: size_of(job.pieces) for i, job in jobs.items()}, waiting)
    if workers < 2:
        WORKER.update(tokenizer=tokenizer, counters=counters, show=show)
        for i, job in jobs.items():
            make(folder, i, job, *args)
            waiting.remove(i)
        return show()
    initial = (folder, tokenizer.engine, counters)
    with ProcessPoolExecutor(workers, context, start_worker, initial) as pool:
        # ... also when it comes while workers start, who inherit that it waits
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = {pool.submit(make, folder, i, job, *args): i for i, job in jobs.items()}
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while futures:
                for future in wait(futures, 0.25, FIRST_COMPLETED).done:
                    future.result()
                    waiting.remove(futures.pop(future))
                show()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # at once: what they hold is made again
            raise


def shown(counters, sizes: dict[int, int], waiting: set[int]) -> Callable[[], None]:
    """What prints how far the parts are, of which `waiting` are not done; seldom, however often it
    is called. `sizes` are bytes of text, roughly."""
    terminal, began, last = sys.stdout.isatty(), time.monotonic(), 0.0

    def show() -> None:
        nonlocal last
        seconds = time.monotonic() - began
        if waiting and seconds - last < (0.2 if terminal else 5):
            return
        last, (count, tokens, size, *of) = seconds, counters[:]
        # sizes are guesses for packed files: the parts that wait are worth a tenth at least
        rest = max(sum(sizes.values()) / max(size, 1) - 1, len(waiting) / len(sizes) / 10)
        eta = "" if not size else f"  ETA {seconds * rest:.0f} s" if waiting else "  done"
        running = [(of[i] / max(sizes[i], 1), i) for i in waiting if of[i]]
        slowest = "".join(f"  slowest: part {i}, {share:.0%}" for share, i in sorted(running)[:1])
        line = (f"{count:,} documents  {size / 1e6 / seconds:.1f} MB/s  "
                f"{tokens / seconds:,.0f} tokens/s  parts {len(sizes) - len(waiting)}/"
                f"{len(sizes)}  {seconds:.0f} s{eta}{slowest}")
        print(f"\r{line}\033[K" if terminal else line,
              end="" if waiting and terminal else "\n", flush=True)

    return show


# ---- documents that others repeat

def make_marks(folder: Path, number: int, job: Job, dedup: str) -> None:
    """Write what tells repeated documents of a part: an array with a row for each."""
    marks = []
    for text in job.texts(Tally()):
        marks.append(signature(text) if dedup == "near" else np.array([text_hash(text)], "<u8"))
        progress(number, 1, 0, len(text.encode()))
    kind, width = ("<u4", 4 * BANDS) if dedup == "near" else ("<u8", 1)
    with tempfile.TemporaryDirectory(dir=folder / NOTES) as own:
        np.save(Path(own) / "marks.npy", np.array(marks, kind).reshape(-1, width))
        os.replace(Path(own) / "marks.npy", marks_of(folder, number))


def marks_of(folder: Path, number: int) -> Path:
    """The file of a part's marks."""
    return folder / NOTES / f"marks-{number:05}.npy"


def signature(text: str) -> np.ndarray:
    """MinHash (4 BANDS,) of a text's runs of three words: equal in as many places as the sets of
    runs overlap (Broder, "On the resemblance and containment of documents", 1997)."""
    import rensa

    words = re.findall(r"\w+", text.lower())
    made = rensa.RMinHash(num_perm=4 * BANDS, seed=1)
    made.update(list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) or [text])
    return np.array(made.digest(), "<u4")


def repeats(marks: np.ndarray, dedup: str) -> np.ndarray:
    """Which rows (n,) repeat an earlier one."""
    found = np.zeros(len(marks), bool)
    for band in range(BANDS if dedup == "near" else 1):
        width = 4 if dedup == "near" else 1
        words = np.ascontiguousarray(marks[:, width * band:width * (band + 1)]).view("<u8")
        keys = (words[:, 0] * np.uint64(0x9E3779B97F4A7C15)) ^ words[:, -1]
        order = np.argsort(keys, kind="stable")  # rows with one key in the order of the corpus
        for back in (1, 2, 3) if dedup == "near" else (1,):  # by chance others may stand between
            first, second = order[:-back], order[back:]
            pairs = np.flatnonzero(keys[first] == keys[second])
            for some in np.split(pairs, range(1 << 14, len(pairs), 1 << 14)):
                a, b = first[some], second[some]
                found[b[(marks[a] == marks[b]).mean(1) >= NEAR]] = True
    return found


def without_repeats(folder: Path, jobs: list[Job], dedup: str) -> list[Job]:
    """The jobs of all parts, each told which of its documents an earlier one repeats."""
    sizes = [len(np.load(marks_of(folder, i), mmap_mode="r")) for i in range(len(jobs))]
    path = folder / NOTES / f"marks-{os.getpid()}.bin"  # all as one, on disk: the memory is bounded
    with open(path, "wb") as file:
        for i in range(len(jobs)):
            one = np.load(marks_of(folder, i))
            one.tofile(file)
    if not sum(sizes):
        return jobs
    found = repeats(np.memmap(path, one.dtype, "r").reshape(-1, one.shape[1]), dedup)
    path.unlink()
    rule = "near duplicate" if dedup == "near" else "duplicate"
    return [replace(job, repeated=dict.fromkeys(np.flatnonzero(part).tolist(), rule))
            for job, part in zip(jobs, np.split(found, np.cumsum(sizes)[:-1]), strict=True)]
