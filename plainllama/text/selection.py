"""Which documents are held out for validation, and which repeat an earlier one."""

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plainllama.settings import UserError, ceil_div, install
from plainllama.text import cures
from plainllama.text.dialogs import spoken
from plainllama.text.documents import Part, Tally, documents
from plainllama.text.records import Dialog
from plainllama.text.tables import Table
from plainllama.text.workers import NOTES, Nodes, Processes, Worker, own_folder

SCAN = 16 << 20  # characters read before any work: bad input is met before anything is written
# Where fewer than FEW documents make up most of the text and their hashes miss the fraction by more
# than NEARLY of it, each of LONG characters gives its end, unless that is under TAIL characters.
FEW, NEARLY, LONG, TAIL = 64, 0.2, 4096, 100
# Near duplicates: signatures of 32 bands of 4 hashes; two texts whose runs of three words have the
# Jaccard similarity J meet in some band with probability 1 - (1 - J^4)^32, 0.97 for J = 0.57.
BANDS, NEAR = 32, 0.5
KEYS = 1 << 22  # documents a shard of the search for repeated ones: 32 bytes each, and their copies


# ---- documents -> their split

@dataclass(frozen=True)
class HoldOut:
    """What is held out for validation: documents by their hash, or the end of long ones."""

    bound: int = 0  # documents with a smaller hash
    fraction: float = 0.0  # the share of a long document, of its end
    long: int = sys.maxsize  # characters from which on a document is long
    start: int = sys.maxsize  # of the one document that was cut: characters before what is held out


def text_hash(text: str) -> int:
    """64 bits that choose a document's split, wherever it stands."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def deciding_part(text: str) -> str:
    """Give what decides a document's split: of a client its id; of a pair its prompt, so that no
    other pair tells what was preferred there."""
    if isinstance(text, Table):
        return text.client.id
    if isinstance(text, Dialog) and "rejected" in (pair := json.loads(text)):
        last = max(i for i, message in enumerate(pair["messages"]) if message["role"] == "user")
        return json.dumps([pair["messages"][:last + 1], pair.get("tools")])
    return text


def said(text: str) -> str:
    """Give what a document says of its own: of a dialog all turns, without the form of its JSON."""
    return spoken(text, system=False) if isinstance(text, Dialog) else text


def choose_hold_out(parts: list[Part], fraction: float, whole: bool = False) -> HoldOut:
    """Choose what is held out so that both splits have a document, and of a few long ones about the
    fraction asked; `whole`: documents are never cut. UserError if there is none, or a single one
    that is not to be cut.

    Reads SCAN characters, all of a smaller corpus, and goes on until it has met both splits.
    """
    bound, smallest, largest, size, count = int(fraction * 2**64), 2**64, -1, 0, 0
    held, squares, longest = 0, 0, 0  # characters below the bound; of sizes; characters
    dropped = Tally()
    for text in documents(parts, dropped):
        number = text_hash(deciding_part(text))
        smallest, largest = min(smallest, number), max(largest, number)
        size, count, held = size + len(text), count + 1, held + len(text) * (number < bound)
        squares, longest = squares + len(text) ** 2, max(longest, len(text))
        settled = not bound or smallest < bound <= largest  # both splits have a document
        if size > SCAN and dropped.records > 1 and settled:
            break
    reasons = [f"{entry['count']} {rule} (first {entry['first']})"
               for rule, entry in dropped.items()]
    if count == 0:
        reasons += cures.for_dropped(dropped, {
            piece.label: piece.path for part in parts for piece in part.pieces})
        why = f"; dropped: {'; '.join(reasons)}" if reasons else ": there is no record in them"
        raise UserError(f"sources: no document is left{why}")
    if whole and smallest == largest:
        lost = f"; dropped: {'; '.join(reasons)}" if reasons else ""
        raise UserError("sources: a single dialog, pair or client is left, and validation needs "
                        f"another; give more{lost}")
    if bound and dropped.records == 1 < count and not whole:
        return HoldOut(start=int(size * (1 - fraction)))
    if bound and smallest == largest:
        return HoldOut(fraction=fraction, long=0)
    few = not whole and size ** 2 < FEW * squares  # as many of equal size would be as uneven
    long, asked = max(LONG, int(TAIL / fraction)) if bound else sys.maxsize, size * fraction
    if few and longest >= long and abs(held - asked) > NEARLY * asked:
        return HoldOut(bound, fraction, long)
    if settled:
        return HoldOut(bound)
    return HoldOut(largest if largest < bound else smallest + 1)


def placed(texts: Iterable[str], hold_out: HoldOut) -> Iterator[tuple[str, str]]:
    """Give (split, text) of every document of a part."""
    start = 0  # characters before a text
    for text in texts:
        if hold_out.start < sys.maxsize:
            end = min(max(hold_out.start - start, 0), len(text))
        elif len(text) >= hold_out.long:
            end = int(len(text) * (1 - hold_out.fraction))
        else:
            held = text_hash(deciding_part(text)) < hold_out.bound
            yield "val" if held else "train", text
            continue
        start += len(text)
        if end < len(text):  # cut at the end of a line or word, if one is near
            near = end - int(NEARLY * (len(text) - end))
            end = text.rfind("\n", near, end) + 1 or text.rfind(" ", near, end) + 1 or end
        yield from (pair for pair in (("train", text[:end]), ("val", text[end:])) if pair[1])


# ---- documents that repeat an earlier one

def signature(text: str) -> np.ndarray:
    """MinHash (4 BANDS,) of a text's runs of three words: equal in as many places as the sets of
    runs overlap (Broder, "On the resemblance and containment of documents", 1997)."""
    import rensa

    words = re.findall(r"\w+", text.lower())
    made = rensa.RMinHash(num_perm=4 * BANDS, seed=1)
    made.update(list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) or [text])
    return np.array(made.digest(), "<u4")


class Marks(NamedTuple):
    """How repeated documents are told: by a row of marks for each."""

    rule: str  # that drops them
    mark: Callable[[str], np.ndarray]  # text -> (width,)
    dtype: str
    width: int
    bands: int  # rows that agree in one of as many bands are compared


DEDUP = {
    "exact": Marks("duplicate", lambda text: np.array([text_hash(text)]), "<u8", 1, 1),
    "near": Marks("near duplicate", lambda text: signature(said(text)), "<u4", 4 * BANDS, BANDS),
}


def check_dedup(dedup: str) -> None:
    """Raise UserError if the package is missing that `dedup` needs."""
    if dedup == "near" and not importlib.util.find_spec("rensa"):
        raise UserError(f"dedup=near needs the package rensa: {install('data')}")


def marks_of(folder: Path, number: int) -> Path:
    """Name the file of a part's marks."""
    return folder / NOTES / f"marks-{number:05}.npy"


def make_marks(folder: Path, dedup: str, worker: Worker, number: int, part: Part) -> None:
    """Write the marks (documents, width) of a part."""
    kind = DEDUP[dedup]
    marks = []
    for text in documents([part], Tally()):
        marks.append(kind.mark(text))
        worker.report(number, 1, 0, len(text.encode()))
    with own_folder(folder) as own:
        np.save(Path(own) / "marks.npy", np.array(marks, kind.dtype).reshape(-1, kind.width))
        os.replace(Path(own) / "marks.npy", marks_of(folder, number))


def mark_parts(folder: Path, parts: list[Part], dedup: str, crew: Processes | Nodes) -> None:
    """Make the marks that parts lack."""
    todo = {i: part for i, part in enumerate(parts) if not marks_of(folder, i).exists()}
    if todo:
        print(f"{folder}: looking for repeated documents", flush=True)
        crew.run(folder, partial(make_marks, folder, dedup), todo)


def gather_marks(folder: Path, count: int, kind: Marks) -> tuple[Path, list[int]]:
    """Write the marks of all parts as one file (bands, documents, width / bands), which is read
    band by band; give it, and the documents of each part."""
    sizes = [len(np.load(marks_of(folder, number), mmap_mode="r")) for number in range(count)]
    path = folder / NOTES / f"marks-{sum(sizes)}.bin"
    shape = kind.bands, sum(sizes), kind.width // kind.bands
    together = np.memmap(path, kind.dtype, "w+", shape=shape)
    for number, end in enumerate(np.cumsum(sizes).tolist()):
        marks = np.load(marks_of(folder, number))
        together[:, end - sizes[number]:end] = marks.reshape(len(marks), *shape[::2]).swapaxes(0, 1)
    together.flush()
    return path, sizes


@dataclass(frozen=True)
class Shard:
    """A share of all keys of all bands: those that are `number` modulo `of`."""

    number: int
    of: int
    size: int  # bytes of the marks that it reads, roughly


def repeats(marks: np.ndarray, shard: Shard) -> np.ndarray:
    """Tell which rows (n,) of marks (bands, n, width / bands) repeat an earlier one that has the
    same key in some band, and that key in the shard."""
    repeated = np.zeros(marks.shape[1], bool)
    for band in marks:
        bits = np.ascontiguousarray(band).view("<u8")
        keys = (bits[:, 0] * np.uint64(0x9E3779B97F4A7C15)) ^ bits[:, -1]
        rows = np.flatnonzero(keys % np.uint64(shard.of) == shard.number)
        keys = keys[rows]
        order = np.argsort(keys, kind="stable")  # rows with one key in the order of the corpus
        for back in (1, 2, 3):  # one that agrees in this band by chance may stand between
            first, second = order[:-back], order[back:]
            pairs = np.flatnonzero(keys[first] == keys[second])
            for chunk in np.split(pairs, range(1 << 14, len(pairs), 1 << 14)):
                a, b = rows[first[chunk]], rows[second[chunk]]
                repeated[b[(marks[:, a] == marks[:, b]).mean((0, 2)) >= NEAR]] = True
    return repeated


def write_repeats(folder: Path, path: Path, shape: tuple, dtype: str, worker: Worker, number: int,
                  shard: Shard) -> None:
    """Write which documents of all repeat an earlier one, by the keys of a shard."""
    found = np.flatnonzero(repeats(np.memmap(path, dtype, "r", shape=shape), shard))
    with own_folder(folder) as own:
        np.save(Path(own) / "repeats.npy", found)
        os.replace(Path(own) / "repeats.npy", folder / NOTES / f"repeats-{number:05}.npy")
    worker.report(number, len(found), 0, shard.size)


def without_repeats(folder: Path, parts: list[Part], dedup: str,
                    crew: Processes | Nodes) -> list[Part]:
    """Tell each part which of its documents an earlier one repeats; needs the marks of all."""
    kind = DEDUP[dedup]
    path, sizes = gather_marks(folder, len(parts), kind)
    shape = kind.bands, sum(sizes), kind.width // kind.bands
    shards = ceil_div(sum(sizes), KEYS)
    jobs = {i: Shard(i, shards, path.stat().st_size) for i in range(shards)}
    crew.run(folder, partial(write_repeats, folder, path, shape, kind.dtype), jobs)
    repeated = np.zeros(sum(sizes), bool)
    for number in jobs:
        repeated[np.load(folder / NOTES / f"repeats-{number:05}.npy")] = True
    path.unlink()
    by_part = np.split(repeated, np.cumsum(sizes)[:-1])
    return [replace(part, repeated=dict.fromkeys(np.flatnonzero(rows).tolist(), kind.rule))
            for part, rows in zip(parts, by_part, strict=True)]
