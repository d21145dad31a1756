"""Which documents are held out for validation, and which repeat an earlier one."""

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from plainllama.settings import UserError
from plainllama.text.documents import Part, Tally

SCAN = 16 << 20  # characters read before any work: bad input is met before anything is written
NOTES = "work.tmp"  # state.json, part-*.json and half-made shards, until the manifest is written
# Near duplicates: signatures of 32 bands of 4 hashes; two texts whose runs of three words have the
# Jaccard similarity J meet in some band with probability 1 - (1 - J^4)^32, 0.97 for J = 0.57.
BANDS, NEAR = 32, 0.5


# ---- documents -> their split

def hash_below(jobs: list[Part], fraction: float) -> int:
    """Documents with a hash below this are validation. If negative, the end of a text is: of each
    text (-1), or what follows this many characters of the one document (that was cut).

    Reads SCAN characters, all of a smaller corpus, and goes on until both splits have a document.
    """
    below, smallest, largest, size, count = int(fraction * 2**64), 2**64, -1, 0, 0
    dropped = Tally()
    for text in itertools.chain.from_iterable(job.texts(dropped) for job in jobs):
        smallest, largest = min(smallest, text_hash(text)), max(largest, text_hash(text))
        size, count = size + len(text), count + 1
        if size > SCAN and dropped.records > 1 and (not below or smallest < below <= largest):
            break
    if largest < 0:
        raise UserError("sources: no document is left; dropped: " + "; ".join(
            f"{entry['count']} {rule} (first {entry['first']})" for rule, entry in dropped.items())
            + "; another column is named like this: --sources=\"{'path': 'my.jsonl', 'column': "
            "'content'}\"" * any(rule.startswith("no column") for rule in dropped))
    if below and dropped.records == 1 < count:
        return -int(size * (1 - fraction))
    if not below or smallest < below <= largest:
        return below
    if smallest == largest:
        return -1
    return largest if largest < below else smallest + 1


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


def without_repeats(folder: Path, jobs: list[Part], dedup: str) -> list[Part]:
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
