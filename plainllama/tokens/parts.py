"""What worker processes do with a part: documents -> their split -> tokens -> shards,
and, for --dedup, documents -> marks that tell repeated ones.

A part's files are a function of the part alone, so any number of workers writes the same bytes.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np

from plainllama.files import write_json
from plainllama.text.documents import Part, Tally
from plainllama.text.selection import BANDS, NOTES, marks_of, placed, signature, text_hash
from plainllama.text.sources import size_of
from plainllama.tokens.shards import ShardWriter, token_dtype
from plainllama.tokens.tokenizer import CUT, Tokenizer

BATCH = 1 << 20  # characters encoded at a time: bounds the memory
COUNTS = ("documents", "tokens", "bytes")
WORKER: dict = {}  # a worker's tokenizer and the counters of its progress


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


def make_part(folder: Path, number: int, job: Part) -> None:
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
    write_json(folder / NOTES / f"part-{number:05}.json",
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
                jobs: dict[int, Part], *args) -> None:
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

def make_marks(folder: Path, number: int, job: Part, dedup: str) -> None:
    """Write what tells repeated documents of a part: an array with a row for each."""
    marks = []
    for text in job.texts(Tally()):
        marks.append(signature(text) if dedup == "near" else np.array([text_hash(text)], "<u8"))
        progress(number, 1, 0, len(text.encode()))
    kind, width = ("<u4", 4 * BANDS) if dedup == "near" else ("<u8", 1)
    with tempfile.TemporaryDirectory(dir=folder / NOTES) as own:
        np.save(Path(own) / "marks.npy", np.array(marks, kind).reshape(-1, width))
        os.replace(Path(own) / "marks.npy", marks_of(folder, number))
