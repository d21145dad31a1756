"""Rows of a run: which tokens row r holds, a pure function of r; ids -> what a model is fed with.

There is no data-loader state: any row can be asked for, and a resumed run replays nothing.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from plainllama.settings import Settings, UserError, ceil_div
from plainllama.tokens.fit import best_fit
from plainllama.tokens.shards import Split, read_manifest

if TYPE_CHECKING:  # whoever asks for rows alone does without torch
    from torch import Tensor

PAD = -1  # in a row: its document has ended; no id, no target
# Flags of an id in a row: it is read but not learned; its document, or this window of it, begins
CONTEXT, BEGINS = 1 << 40, 1 << 41
FEW = 256  # targets are filled up to a multiple of this where most positions have none


# ---- which row holds what

def permute(positions: np.ndarray, size: int, key: tuple) -> np.ndarray:
    """The place of each position 0..size-1 in a permutation of 0..size-1 chosen by `key`.

    A four-round Feistel network over the next power of four, walked until the value is below
    `size` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory, no
    start-up, each window exactly once an epoch.
    """
    half = ((size - 1).bit_length() + 1) // 2
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
    round_keys = np.frombuffer(digest, "<u8")
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_key in round_keys:
            mixed = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= size
    return values.astype(np.int64)


class Rows:
    """The batch stream: row r of a run is window perm_e(r mod N) of epoch e = r div N.

    Window i is tokens[i T .. i T + T] of the split (T + 1 tokens, the last shared with the next
    window). The incomplete tail is left out.
    """

    def __init__(self, split: Split, block_size: int, seed, limit: int = 0):
        if split.masked:
            raise UserError(f"data set {split.folder} holds dialogs, which are for packing=fit")
        self.split, self.block_size, self.seed = split, block_size, seed
        self.windows = (split.tokens - 1) // block_size
        self.tail = split.tokens - self.windows * block_size - 1
        if self.windows < 1:
            raise UserError(f"data set {split.folder}: its {split.split} split has {split.tokens} "
                            f"tokens, fewer than one row of block_size {block_size} + 1; prepare "
                            "more text or lower block_size")
        if limit:  # overfit on a few rows
            self.windows = min(self.windows, limit)

    def rows(self, first: int, n: int) -> np.ndarray:
        """Read rows first..first+n-1, as read_windows gives them."""
        return self.read_windows(self.window_of(first, n))

    def window_of(self, first: int, n: int) -> np.ndarray:
        """Name the windows (n,) that rows first..first+n-1 show."""
        return self.windows_at(np.arange(first, first + n, dtype=np.int64))

    def windows_at(self, rows: np.ndarray) -> np.ndarray:
        """Name the windows that the given rows show."""
        windows, epochs = np.empty(len(rows), np.int64), rows // self.windows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(rows[here] % self.windows, self.windows,
                                    (self.seed, int(epoch)))
        return windows

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """Read the given windows, (m, T + 1) in the stored dtype."""
        T, windows = self.block_size, np.asarray(windows, np.int64)
        out = np.empty((len(windows), T + 1), self.split.shard(0).dtype)
        for i, start in enumerate((windows * T).tolist()):
            out[i] = self.split.read(start, start + T + 1)
        return out

    def targets(self, first: int, n: int) -> int:
        """Count the targets of rows first..first+n-1."""
        return n * self.block_size

    def tokens(self, first: int, n: int) -> int:
        """Count the tokens that a model reads in rows first..first+n-1."""
        return self.targets(first, n)

    def summary(self, rows: int) -> str:
        """Say what there is and what a run of `rows` rows sees of it."""
        return (f"{self.windows:,} rows of {self.block_size} tokens in {self.split.folder.name}, "
                f"{self.tail} tokens left out; {rows / self.windows:.2f} epochs")


class DocumentRows(Rows):
    """A row holds tokens of one document: window by window of T + 1, the last one filled with PAD.

    Nothing is left out. Start-up reads the index files: 16 bytes of memory a document.
    """

    def __init__(self, split: Split, block_size: int, seed, limit: int = 0):
        self.first = split.bounds()
        self.ends = np.cumsum(ceil_div(np.diff(self.first) - 1, block_size))  # in windows
        self.split, self.block_size, self.seed, self.tail = split, block_size, seed, 0
        self.windows = int(self.ends[-1]) if len(self.ends) else 0
        if not self.windows:
            raise UserError(f"data set {split.folder}: its {split.split} split has no document of "
                            "two tokens; prepare more text")
        self.windows = min(self.windows, limit or self.windows)

    def spans(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the first token and the number of tokens, T + 1 at most, of each window."""
        documents = np.searchsorted(self.ends, windows, "right")
        start, end = self.first[documents], self.first[documents + 1]
        before = self.ends[documents] - ceil_div(end - start - 1, self.block_size)
        starts = start + (windows - before) * self.block_size
        return starts, np.minimum(self.block_size + 1, end - starts)

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """Read the given windows, int64 (m, T + 1); PAD where the document has ended."""
        starts, sizes = self.spans(np.asarray(windows, np.int64))
        out = np.full((len(starts), self.block_size + 1), PAD, np.int64)
        for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            out[i, :size] = self.split.read(start, start + size)
        return out

    def targets(self, first: int, n: int) -> int:
        """Count the targets of rows first..first+n-1."""
        return self.added_up(lambda windows: self.spans(windows)[1] - 1, first, n)

    def added_up(self, count: Callable[[np.ndarray], np.ndarray], first: int, n: int) -> int:
        """Add up count(windows) of rows first..first+n-1, a million rows at a time."""
        ends = range(first, first + n, 1 << 20)
        return sum(int(count(self.window_of(at, min(1 << 20, first + n - at))).sum())
                   for at in ends)


class FitRows(DocumentRows):
    """A row holds several whole documents, or windows of those that are longer than a row, packed
    so that little is left empty; none sees another (doc_mask). Of dialogs the targets are what is
    learned of them, of text all tokens but a document's first.
    """

    def __init__(self, split: Split, block_size: int, seed, limit: int = 0):
        super().__init__(split, block_size, seed)
        starts, sizes = self.spans(np.arange(self.windows))
        units, learned = np.arange(self.windows), sizes - 1
        if split.whole and block_size < split.manifest["block_size"] and (
                self.windows > split.documents
                or added(sizes, split.together).max() > block_size + 1):
            kind = "dialogs" if split.masked else "tables"
            raise UserError(f"data set {split.folder}: its {kind} were cut to "
                            f"{split.manifest['block_size']} tokens, more than block_size "
                            f"{block_size} has room for; prepare it with that block_size")
        if split.masked:
            often, learned = takes(split), split.learned_counts()
            units = np.repeat(np.arange(len(often)), often)
        # documents that stay together, two of a pair, are one unit
        together = np.arange(split.together)
        order, begins = best_fit(added(sizes, split.together)[units], block_size + 1)
        places = (units[order][:, None] * split.together + together).ravel()
        begins *= split.together
        self.windows = min(len(begins), limit or len(begins))
        self.starts, self.sizes, self.numbers = starts[places], sizes[places], places
        # of each row: its begin among the places, and the last one's end; learned, and all tokens
        self.begins = np.append(begins, len(places))[:self.windows + 1]
        self.learned = np.add.reduceat(learned[places], begins)[:self.windows]
        self.filled = np.add.reduceat(self.sizes, begins)[:self.windows]

    def opening(self) -> list[int]:
        """Give the ids of the first dialog before its first answer."""
        end = int(self.first[1])
        return self.split.read(0, end)[:self.split.read_mask(0, end).argmax()].tolist()

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """Read the given windows, int64 (m, T + 1), with their flags; PAD at their ends."""
        windows = np.asarray(windows, np.int64)
        out = np.full((len(windows), self.block_size + 1), PAD, np.int64)
        for row, window in zip(out, windows, strict=True):
            at = 0
            for unit in range(self.begins[window], self.begins[window + 1]):
                start, size = int(self.starts[unit]), int(self.sizes[unit])
                ids = row[at:at + size]
                ids[:] = self.split.read(start, start + size)
                if self.split.masked:
                    ids[~self.split.read_mask(start, start + size)] |= CONTEXT
                ids[0] |= CONTEXT | BEGINS
                at += size
        return out

    def documents_of(self, windows: Iterable[int]) -> np.ndarray:
        """Number the documents of a split that the given windows hold, in their order."""
        return np.concatenate([self.numbers[:0], *(
            self.numbers[self.begins[window]:self.begins[window + 1]] for window in windows)])

    def targets(self, first: int, n: int) -> int:
        """Count the targets of rows first..first+n-1."""
        return self.added_up(lambda windows: self.learned[windows], first, n)

    def pairs(self, first: int, n: int) -> int:
        """Count the pairs of rows first..first+n-1."""
        return self.added_up(lambda windows: self.begins[windows + 1] - self.begins[windows],
                             first, n) // 2

    def tokens(self, first: int, n: int) -> int:
        """Count the tokens that a model reads in rows first..first+n-1."""
        return self.added_up(lambda windows: self.filled[windows], first, n)

    def summary(self, rows: int) -> str:
        """Say what there is and what a run of `rows` rows sees of it."""
        learned = self.learned.sum() / self.filled.sum()
        empty = 1 - self.filled.mean() / (self.block_size + 1)
        count, kind = self.begins[-1] // self.split.together, ["documents", "pairs"]
        return (f"{self.windows:,} rows of {self.block_size} tokens in {self.split.folder.name}: "
                f"{count:,} {kind[self.split.together - 1]}, {learned:.1%} of the tokens learned, "
                f"{empty:.1%} of the rows empty; {rows / self.windows:.2f} epochs")


def added(counts: np.ndarray, together: int) -> np.ndarray:
    """Add up what each document has (documents,) for those that stay together (units,)."""
    return counts.reshape(-1, together).sum(1)


def takes(split: Split) -> np.ndarray:
    """Say how often an epoch takes each dialog or pair (units,): once, or as its source's `count`
    or `weight` (a share of all learned tokens) asks, the whole set's times and of a shuffled order
    the first ones once more."""
    often = np.ones(split.documents // split.together, np.int64)
    sources = split.manifest["recipe"]["sources"]
    if split.split != "train" or not any({"count", "weight"} & source.keys() for source in sources):
        return often
    learned = added(split.learned_counts(), split.together)
    source_of = split.sources()[::split.together]
    share = learned.sum() / (sum(source.get("weight", 0) for source in sources) or 1)
    for number, source in enumerate(sources):
        own = np.flatnonzero(source_of == number)
        if not len(own):
            raise UserError(f"sources: no dialog of {source['path']} is left to train on")
        own = own[permute(np.arange(len(own)), len(own), ("takes", number))]
        whole, more = divmod(source.get("count", len(own)), len(own))
        if "weight" in source:
            ends = np.cumsum(learned[own])
            whole, rest = divmod(round(share * source["weight"]), int(ends[-1]))
            more = int(np.abs(np.append(0, ends) - rest).argmin())  # as near as dialogs allow
        often[own] = whole
        often[own[:more]] += 1
    return often


class Mixture(Rows):
    """Rows of several sets by their weights, each with its own permutation and its own epochs.

    Row r is the next row of set table[r mod 1000]. The table holds each set in proportion to its
    weight, rounded to thousandths, and spreads it evenly. Window numbers of all sets follow each
    other.
    """

    def __init__(self, sets: list[Rows], weights: list[float]):
        self.sets, self.block_size = sets, sets[0].block_size
        self.table = spread(weights)
        self.counts = np.bincount(self.table, minlength=len(sets))
        self.place = np.empty(len(self.table), np.int64)  # how many of its set come before
        for i in range(len(sets)):
            self.place[self.table == i] = np.arange(self.counts[i])
        self.offsets = np.concatenate([[0], np.cumsum([rows.windows for rows in sets])])
        self.windows = int(self.offsets[-1])

    def windows_at(self, rows: np.ndarray) -> np.ndarray:
        """Name the windows that the given rows show."""
        slots, windows = rows % len(self.table), np.empty(len(rows), np.int64)
        which = self.table[slots]
        own = rows // len(self.table) * self.counts[which] + self.place[slots]
        for i in np.unique(which):
            windows[which == i] = self.sets[i].windows_at(own[which == i]) + self.offsets[i]
        return windows

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """Read the given windows, (m, T + 1), as the sets give them."""
        windows = np.asarray(windows, np.int64)
        which = np.searchsorted(self.offsets, windows, "right") - 1
        parts = [(which == i, self.sets[i].read_windows(windows[which == i] - self.offsets[i]))
                 for i in np.unique(which)]
        dtype = np.result_type(np.uint16, *(rows for _, rows in parts))  # a rank may have none
        out = np.empty((len(windows), self.block_size + 1), dtype)
        for here, rows in parts:
            out[here] = rows
        return out

    def targets(self, first: int, n: int) -> int:
        """Count the targets of rows first..first+n-1."""
        return sum(rows.targets(*self.rows_of(i, first, n)) for i, rows in enumerate(self.sets))

    def tokens(self, first: int, n: int) -> int:
        """Count the tokens that a model reads in rows first..first+n-1."""
        return sum(rows.tokens(*self.rows_of(i, first, n)) for i, rows in enumerate(self.sets))

    def rows_of(self, i: int, first: int, n: int) -> tuple[int, int]:
        """Say which rows of set i, the first and how many, are among rows first..first+n-1."""
        def before(row: int) -> int:
            cycles, rest = divmod(row, len(self.table))
            return cycles * int(self.counts[i]) + int((self.table[:rest] == i).sum())

        return before(first), before(first + n) - before(first)

    def summary(self, rows: int) -> str:
        """Say what there is and what a run of `rows` rows sees of it."""
        slots = len(self.table)
        return "a mixture of " + ", and ".join(
            f"{n / slots:.1%} {part.summary(rows * int(n) // slots)}"
            for part, n in zip(self.sets, self.counts, strict=True))


def spread(weights: list[float], slots: int = 1000) -> np.ndarray:
    """Make a table (slots,) that holds i in proportion to weights[i], as evenly spread as can be.

    Shares are rounded to whole slots by the largest remainder. Each slot goes to the one that is
    furthest behind its share, so none is ever a whole row ahead of it.
    """
    shares = np.array(weights, float) / sum(weights) * slots
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[:slots - counts.sum()]] += 1
    if not counts.all():
        raise UserError(f"mixture: a weight of {min(weights):g} beside {sum(weights):g} in all is "
                        f"less than one in {slots}; leave it out or give it more")
    table, used = np.empty(slots, np.int64), np.zeros(len(weights), np.int64)
    for slot in range(slots):
        table[slot] = np.argmax(counts * (slot + 1) - used * slots)
        used[table[slot]] += 1
    return table


# packing -> its rows; to add one: a class, this entry, a choice in settings, tests/test_shards.py
PACKINGS: dict[str, type[Rows]] = {"concat": Rows, "doc": DocumentRows, "fit": FitRows}


def training_rows(data: Path, manifest: dict, config: Settings) -> Rows:
    """Open a run's rows: of the set in the folder `data`, or of those beside it in `mixture`."""
    packing = PACKINGS[config.packing]
    if not config.mixture:
        return packing(Split(data, "train", manifest), config.block_size, config.seed,
                       config.overfit_rows)
    sets, weights = [], dict(sorted(config.mixture.items()))  # type: ignore[attr-defined]
    for name in weights:
        folder = data.parent / name
        other = read_manifest(folder)
        if other["tokenizer"]["sha256"] != manifest["tokenizer"]["sha256"]:
            raise UserError(f"mixture: {folder} has another tokenizer than {data}; prepare it with "
                            f"--tokenizer={data}")
        sets.append(packing(Split(folder, "train", other), config.block_size, (config.seed, name)))
    return Mixture(sets, list(weights.values()))


def val_rows(data: Path, manifest: dict, block_size: int) -> Rows:
    """Open a set's validation split: one text of windows or, of dialogs, rows that hold several."""
    split = Split(data, "val", manifest)
    return (FitRows if split.whole else Rows)(split, block_size, seed=0)


def hash_of_data(data: Path, config: Settings) -> str:
    """Hash the manifests of a run's data sets."""
    names = [data, *(data.parent / name for name in config.mixture or ())]  # type: ignore
    hashes = [(folder / "manifest.sha256").read_text().strip() for folder in names]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def ids_of(row: np.ndarray) -> np.ndarray:
    """Give the ids (n,) of a row, without its flags and what fills it."""
    return row[row != PAD].astype(np.int64) & (CONTEXT - 1)


# ---- ids -> what a model is fed with

class Batch(NamedTuple):
    """Rows on the host, ready for a model."""

    ids: "Tensor"  # (R, T) int64
    targets: "Tensor"  # (R, T) int64: the id that follows, IGNORE where nothing is learned
    starts: "Tensor | None"  # (R, T) bool: a document begins; None if tokens look across documents
    sparse: bool  # there is much that is not learned: places() are worth it
    beside: "Tensor | None"  # (R, T) fp64: what is known of each document, where it starts

    def take(self, rows) -> "Batch":
        """Give some of the rows: a slice or a list of their numbers."""
        starts = None if self.starts is None else self.starts[rows]
        beside = None if self.beside is None else self.beside[rows]
        return Batch(self.ids[rows], self.targets[rows], starts, self.sparse, beside)

    def split(self, rows: int) -> "Iterator[Batch]":
        """Cut the batch into micro-batches of `rows` rows."""
        return (self.take(slice(at, at + rows)) for at in range(0, len(self.ids), rows))

    def found(self) -> "Tensor":
        """Say where targets are, in the rows laid end to end (n,)."""
        return (self.targets.flatten() >= 0).nonzero()[:, 0]

    def pinned(self) -> "Batch":
        """Copy the rows to memory from which a GPU reads without the host."""
        return self._replace(ids=self.ids.pin_memory(), targets=self.targets.pin_memory())

    def to(self, device) -> "tuple[Tensor, Tensor, Tensor | None, Tensor | None]":
        """Give what LLaMA.forward takes, on a device: ids, targets, the bounds of documents, and
        where targets are, if not everywhere. Nothing waits for the copies if the host's memory is
        pinned."""
        from model import IGNORE, document_bounds

        targets, places = self.targets, None
        bounds = None if self.starts is None else document_bounds(self.starts)
        if self.sparse:
            found = self.found()
            count = ceil_div(max(1, len(found)), FEW) * FEW  # compiled code sees few sizes
            places, targets = found.new_zeros(count), targets.new_full((count,), IGNORE)
            places[:len(found)], targets[:len(found)] = found, self.targets.flatten()[found]
        def sent(tensor):
            tensor = tensor.pin_memory() if self.ids.is_pinned() else tensor
            return tensor.to(device, non_blocking=True)

        return (sent(self.ids), sent(targets), None if bounds is None else sent(bounds),
                None if places is None else sent(places))


def to_batch(rows: np.ndarray, fill: int = 0, bos_id: int | None = None,
             beside: np.ndarray | None = None) -> Batch:
    """Turn rows (m, T + 1), ids with their flags and PAD where there is none, into a Batch:
    training, evaluation and preflight all feed a model by this function.

    `fill`: rows without any target are added up to so many. `bos_id`: the id that begins a
    document, if tokens see their own document only (doc_mask). `beside`: what is known of each
    document (documents,), in their order.
    """
    import torch

    from model import IGNORE

    ids = np.full((max(fill, len(rows)), rows.shape[1]), PAD, np.int64)
    ids[:len(rows)] = rows
    x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
    sparse = bool((ids >= CONTEXT).any())  # then each document that begins has a flag
    starts = None if bos_id is None else x >= BEGINS if sparse else x == bos_id
    y.masked_fill_((y == PAD) | (y >= CONTEXT), IGNORE)
    known = None
    if beside is not None and starts is not None:
        known = torch.zeros(starts.shape, dtype=torch.float64)
        known[starts] = torch.from_numpy(beside).double()
    return Batch(x.masked_fill_(x == PAD, 0) & (CONTEXT - 1), y, starts, sparse, known)
