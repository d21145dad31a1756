"""The on-disk token format, its checks, and rows(first, n): the stateless batch stream.

A data set is a folder: per split `train` and `val` numbered token files NAME.bin with an index
NAME.idx of document starts, the tokenizer, and a manifest that is written last: a folder without
one is unfinished. docs/format.md describes every byte.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from settings import Settings, UserError

FORMAT = 1
HEADER = struct.Struct("<8sIIQ40x")  # magic, format, bytes per token, tokens; 64 bytes in all
MAGIC = b"plnllama"
PAD = -1  # in a row of `packing=doc`: its document has ended; no id, no target
DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits, else uint32."""
    return DTYPES[2 if vocab_size <= 1 << 16 else 4]


class ShardWriter:
    """Writes FOLDER/NAME.bin and NAME.idx as *.tmp; close() makes them appear, complete."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.paths = [folder / f"{name}.bin", folder / f"{name}.idx"]
        self.files = [open(f"{path}.tmp", "wb") for path in self.paths]  # noqa: SIM115
        self.files[0].write(bytes(HEADER.size))
        self.dtype, self.tokens, self.documents, self.largest = dtype, 0, 0, 0

    def add(self, ids: np.ndarray) -> None:
        """Append one document's token ids, boundaries included."""
        self.files[1].write(struct.pack("<Q", self.tokens))
        self.files[0].write(ids.astype(self.dtype, copy=False).data)
        self.tokens += len(ids)
        self.documents += 1
        self.largest = max(self.largest, int(ids.max(initial=0)))

    def close(self) -> dict:
        """Finish both files; {file name: {size, sha256, tokens, ...}} for the manifest."""
        self.files[0].seek(0)
        self.files[0].write(HEADER.pack(MAGIC, FORMAT, self.dtype.itemsize, self.tokens))
        entries = {}
        for path, file in zip(self.paths, self.files, strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            entries[path.name] = file_entry(Path(f"{path}.tmp"))
            os.replace(f"{path}.tmp", path)
        entries[self.paths[0].name] |= {"tokens": self.tokens, "documents": self.documents,
                                        "largest_id": self.largest}
        return entries


def file_entry(path: Path) -> dict:
    """{size, sha256} of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json and its hash: from here on the data set is complete."""
    text = json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    for name, content in (("manifest.sha256", digest + "\n"), ("manifest.json", text)):
        with open(folder / f"{name}.tmp", "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / f"{name}.tmp", folder / name)


def read_manifest(folder: Path) -> dict:
    """The manifest of a complete data set whose files have the sizes it names, or UserError."""
    if not folder.is_dir():
        raise UserError(f"no data set {folder}; make it with: python prepare.py CONFIG "
                        f"--dataset={folder.name} (--sources=YOUR.txt for text of your own)")
    path = folder / "manifest.json"
    if not path.is_file():
        unfinished = any(folder.glob("*.bin")) or any(folder.glob("*.tmp"))
        raise UserError(f"data set {folder} is unfinished (no manifest.json); run prepare.py again "
                        "to complete it" if unfinished else
                        f"{folder} is not a data set: it has no manifest.json")
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        version = manifest["format"]
        if version == FORMAT:
            sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
            manifest["splits"]["train"]["tokens"], manifest["tokenizer"]["vocab_size"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a plainllama manifest ({error!r}); prepare the data set "
                        "again in an empty folder") from None
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT}; use the "
                        "plainllama that wrote it, or prepare the data set again")
    digest, expected = folder / "manifest.sha256", hashlib.sha256(content).hexdigest() + "\n"
    if not digest.is_file() or digest.read_bytes() != expected.encode():
        raise UserError(f"{path} does not match manifest.sha256: one of them is damaged")
    for name, size in sizes.items():
        if Path(name).name != name or (folder / name).is_symlink():
            raise UserError(f"{path} names {name!r}, which leaves the data set's folder")
        if not (folder / name).is_file():
            raise UserError(f"data set {folder}: {name} is missing; prepare it again")
        if (folder / name).stat().st_size != size:
            raise UserError(f"data set {folder}: {name} has {(folder / name).stat().st_size} bytes "
                            f"where the manifest says {size}; it is damaged, prepare it again")
    return manifest


def verify(folder: Path) -> tuple[int, list[str]]:
    """Check every byte: (0, []) good, (1, problems) damaged, (2, [why]) not a data set."""
    if not (folder / "manifest.json").is_file():
        return 2, [f"{folder} is not a data set: it has no manifest.json"]
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return 1, [str(error)]
    problems = [f"{folder / name}: its sha256 is not the manifest's"
                for name, entry in manifest["files"].items()
                if file_entry(folder / name)["sha256"] != entry["sha256"]]
    known = {*manifest["files"], "manifest.json", "manifest.sha256"}
    problems += [f"{path}: not named by the manifest"
                 for path in sorted(folder.iterdir()) if path.name not in known]
    return (1 if problems else 0), problems


class Split:
    """The token files of one split, joined in order; opened when first read."""

    def __init__(self, folder: Path, split: str, manifest: dict):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.names = [name for name in manifest["files"]
                      if name.startswith(f"{split}-") and name.endswith(".bin")]
        counts = [manifest["files"][name]["tokens"] for name in self.names]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.tokens = int(self.starts[-1])
        self.maps: dict[str, np.ndarray] = {}
        vocab = manifest["tokenizer"]["vocab_size"]
        for name in self.names:
            if manifest["files"][name]["largest_id"] >= vocab:
                raise UserError(f"{folder / name} holds id {manifest['files'][name]['largest_id']} "
                                f"but the tokenizer has {vocab} entries; prepare it again")

    def shard(self, i: int) -> np.ndarray:
        """Token file i as a memory map, its header checked against the manifest."""
        name = self.names[i]
        if name not in self.maps:
            path = self.folder / name
            with open(path, "rb") as file:
                magic, version, width, count = HEADER.unpack(file.read(HEADER.size))
            if (magic != MAGIC or version != FORMAT or width not in DTYPES
                    or count != self.manifest["files"][name]["tokens"]):
                raise UserError(f"{path}: its header does not match the manifest; prepare it again")
            self.maps[name] = mapped(path, DTYPES[width], HEADER.size)
        return self.maps[name]

    def index(self, i: int) -> np.ndarray:
        """Where the documents of token file i start in it, as a memory map."""
        name = self.names[i].removesuffix(".bin") + ".idx"
        if name not in self.maps:
            self.maps[name] = mapped(self.folder / name, np.dtype("<u8"))
        return self.maps[name]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens start..stop-1 of the joined files begin a document."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        found = []
        for i in range(first, int(np.searchsorted(self.starts, stop))):
            index, offset = self.index(i), int(self.starts[i])
            low, high = (np.searchsorted(index, np.uint64(max(at - offset, 0)))
                         for at in (start, stop))
            found.append(index[low:high].astype(np.int64) + offset)
        return np.concatenate(found)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the joined files, in their stored dtype."""
        i = int(np.searchsorted(self.starts, start, "right")) - 1
        piece = self.shard(i)[start - self.starts[i]:stop - self.starts[i]]
        if len(piece) == stop - start:  # nearly always: the window lies in one file
            return piece
        pieces = [piece]
        while (start := start + len(pieces[-1])) < stop:
            i += 1
            pieces.append(self.shard(i)[:stop - self.starts[i]])
        return np.concatenate(pieces)


def mapped(path: Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """A file as an array that is read when touched. (Slices of np.memmap itself are slow.)"""
    return np.asarray(np.memmap(path, dtype, "r", offset))


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


def data_hash(data: Path, config: Settings) -> str:
    """Hash of the manifests of a run's data."""
    names = [data, *(data.parent / name for name in config.mixture or ())]  # type: ignore
    hashes = [(folder / "manifest.sha256").read_text().strip() for folder in names]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_split(folder: Path, split: str) -> Split:
    """A split of a complete data set."""
    return Split(folder, split, read_manifest(folder))
