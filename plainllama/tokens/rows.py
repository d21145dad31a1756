"""Rows of a run: which tokens row r holds, a pure function; rows -> ids, targets and documents."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from plainllama.settings import Settings, UserError
from plainllama.tokens.shards import Split, read_manifest

PAD = -1  # in a row of `packing=doc`: its document has ended; no id, no target


def permute(positions: np.ndarray, size: int, key: tuple) -> np.ndarray:
    """The place of each position 0..size-1 in a permutation of 0..size-1 chosen by `key`.

    A four-round Feistel network over the next power of four, walked until the value is below
    `size` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory, no
    start-up, each window exactly once an epoch.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
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
    window). The incomplete tail is left out. There is no state: any row can be asked for.
    """

    def __init__(self, split: Split, block_size: int, seed, limit: int = 0):
        self.split, self.block_size, self.seed = split, block_size, seed
        self.windows = (split.tokens - 1) // block_size if split.tokens else 0
        self.tail = split.tokens - self.windows * block_size - 1
        if self.windows < 1:
            raise UserError(f"data set {split.folder}: its {split.split} split has {split.tokens} "
                            f"tokens, fewer than one row of block_size {block_size} + 1; prepare "
                            "more text or lower block_size")
        if limit:  # overfit on a few rows
            self.windows = min(self.windows, limit)

    def window_of(self, first: int, n: int) -> np.ndarray:
        """The windows (n,) that rows first..first+n-1 show."""
        return self.windows_at(np.arange(first, first + n, dtype=np.int64))

    def windows_at(self, rows: np.ndarray) -> np.ndarray:
        """The windows that the given rows show."""
        out, epochs = np.empty(len(rows), np.int64), rows // self.windows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(rows[here] % self.windows, self.windows, (self.seed, int(epoch)))
        return out

    def rows(self, first: int, n: int, step: int = 1) -> np.ndarray:
        """Rows first, first + step, ... below first + n, as read_windows gives them."""
        return self.read_windows(self.window_of(first, n)[::step])

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """The given windows, (m, T + 1) in the stored dtype."""
        T, windows = self.block_size, np.asarray(list(windows), np.int64)
        out = np.empty((len(windows), T + 1), self.split.shard(0).dtype)
        for i, start in enumerate((windows * T).tolist()):
            out[i] = self.split.read(start, start + T + 1)
        return out

    def targets(self, first: int, n: int) -> int:
        """How many targets rows first..first+n-1 have."""
        return n * self.block_size

    def document_starts(self, window: int) -> np.ndarray:
        """The positions, of 0..T-1, at which a document begins in a window."""
        start = window * self.block_size
        return self.split.document_starts(start, start + self.block_size) - start

    def summary(self, rows: int) -> str:
        """What there is and what a run of `rows` rows sees of it, in words."""
        return (f"{self.windows:,} rows of {self.block_size} tokens in {self.split.folder.name}, "
                f"{self.tail} tokens left out; {rows / self.windows:.2f} epochs")


class DocumentRows(Rows):
    """A row holds tokens of one document: window by window of T + 1, the last one filled with PAD.

    Nothing is left out. Start-up reads the index files: 16 bytes of memory a document.
    """

    def __init__(self, split: Split, block_size: int, seed, limit: int = 0):
        indices = [split.index(i).astype(np.int64) + split.starts[i]
                   for i in range(len(split.names))]
        self.first = np.concatenate([*indices, [split.tokens]])  # of each document, and the end
        in_each = -(-(np.diff(self.first) - 1) // block_size)  # windows
        self.ends = np.cumsum(in_each)
        self.split, self.block_size, self.seed, self.tail = split, block_size, seed, 0
        self.windows = int(self.ends[-1]) if len(self.ends) else 0
        if not self.windows:
            raise UserError(f"data set {split.folder}: its {split.split} split has no document of "
                            "two tokens; prepare more text")
        self.windows = min(self.windows, limit or self.windows)

    def spans(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and number of tokens, T + 1 at most, of each window."""
        documents = np.searchsorted(self.ends, windows, "right")
        last = self.ends[documents] - 1  # the document's last window
        count = -(-(self.first[documents + 1] - self.first[documents] - 1) // self.block_size)
        starts = self.first[documents] + (windows - last + count - 1) * self.block_size
        return starts, np.minimum(self.block_size + 1, self.first[documents + 1] - starts)

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """The given windows, int64 (m, T + 1); PAD where the document has ended."""
        starts, sizes = self.spans(np.asarray(list(windows), np.int64))
        out = np.full((len(starts), self.block_size + 1), PAD, np.int64)
        for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            out[i, :size] = self.split.read(start, start + size)
        return out

    def targets(self, first: int, n: int) -> int:
        """How many targets rows first..first+n-1 have; not PAD."""
        blocks = range(first, first + n, 1 << 20)  # the memory is bounded
        return sum(int((self.spans(self.window_of(at, min(1 << 20, first + n - at)))[1] - 1).sum())
                   for at in blocks)

    def document_starts(self, window: int) -> np.ndarray:
        """[0] if the document of a window begins there, else []."""
        start = int(self.spans(np.array([window]))[0][0])
        return np.flatnonzero([start == self.first[np.searchsorted(self.first, start)]])


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
        """The windows that the given rows show."""
        slots, out = rows % len(self.table), np.empty(len(rows), np.int64)
        which = self.table[slots]
        own = rows // len(self.table) * self.counts[which] + self.place[slots]
        for i in np.unique(which):
            out[which == i] = self.sets[i].windows_at(own[which == i]) + self.offsets[i]
        return out

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """The given windows, (m, T + 1), as the sets give them."""
        windows = np.asarray(list(windows), np.int64)
        which = np.searchsorted(self.offsets, windows, "right") - 1
        found = [(which == i, self.sets[i].read_windows(windows[which == i] - self.offsets[i]))
                 for i in np.unique(which)]
        out = np.empty((len(windows), self.block_size + 1), np.result_type(*(r for _, r in found)))
        for here, rows in found:
            out[here] = rows
        return out

    def targets(self, first: int, n: int) -> int:
        """How many targets rows first..first+n-1 have."""
        cycle, total = len(self.table), 0
        for i, rows in enumerate(self.sets):
            low, high = (at // cycle * int(self.counts[i])
                         + int((self.table[:at % cycle] == i).sum()) for at in (first, first + n))
            total += rows.targets(low, high - low)
        return total

    def document_starts(self, window: int) -> np.ndarray:
        """The positions, of 0..T-1, at which a document begins in a window."""
        i = int(np.searchsorted(self.offsets, window, "right")) - 1
        return self.sets[i].document_starts(window - int(self.offsets[i]))

    def summary(self, rows: int) -> str:
        """What there is and what a run of `rows` rows sees of it, in words."""
        return "a mixture of " + ", and ".join(
            f"{n / len(self.table):.1%} {one.summary(rows * int(n) // len(self.table))}"
            for one, n in zip(self.sets, self.counts, strict=True))


def spread(weights: list[float], slots: int = 1000) -> np.ndarray:
    """A table (slots,) that holds i in proportion to weights[i], as evenly spread as can be.

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


def training_rows(data: Path, manifest: dict, config: Settings) -> Rows:
    """The rows of a run: of the set in the folder `data`, or of the sets beside it in `mixture`."""
    kind = DocumentRows if config.packing == "doc" else Rows
    if not config.mixture:
        return kind(Split(data, "train", manifest), config.block_size, config.seed,
                    config.overfit_rows)
    sets, weights = [], dict(sorted(config.mixture.items()))  # type: ignore[attr-defined]
    for name in weights:
        folder = data.parent / name
        other = read_manifest(folder)
        if other["tokenizer"]["sha256"] != manifest["tokenizer"]["sha256"]:
            raise UserError(f"mixture: {folder} has another tokenizer than {data}; prepare it with "
                            f"--tokenizer={data}")
        sets.append(kind(Split(folder, "train", other), config.block_size, (config.seed, name)))
    return Mixture(sets, list(weights.values()))


def hash_of_data(data: Path, config: Settings) -> str:
    """Hash of the manifests of a run's data."""
    names = [data, *(data.parent / name for name in config.mixture or ())]  # type: ignore
    hashes = [(folder / "manifest.sha256").read_text().strip() for folder in names]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
