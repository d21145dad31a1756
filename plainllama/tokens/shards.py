"""The on-disk token format and its checks.

A data set is a folder: per split `train` and `val` numbered token files NAME.bin with an index
NAME.idx of document starts, the tokenizer, and a manifest that is written last: a folder without
one is unfinished. Dialogs (format 2) have in NAME.mask a bit for each token, whether it is learned,
and in NAME.num how many are of each document; a pair is two documents, the chosen one first.
Tables (format 3) have in NAME.ids whose they are.
docs/format.md describes every byte.
"""

import json
import os
import shlex
import struct
from pathlib import Path

import numpy as np

from plainllama.files import as_json, file_entry, read_json, sha256, sha256_bytes, sync, write_text
from plainllama.settings import DIALOGS, UserError, ceil_div

FORMAT = 1  # of token files
# the format of a manifest by its documents
MANIFESTS = {"text": 1, "chat": 2, "preference": 2, "table": 3}
SEEN = "sources.json"  # how the sources lay on this machine: no part of the data set
HEADER = struct.Struct("<8sIIQ40x")  # magic, format, bytes per token, tokens; 64 bytes in all
MAGIC = b"plnllama"
DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def token_dtype(vocab_size: int) -> np.dtype:
    """Choose the dtype of tokens: uint16 while every id fits, else uint32."""
    return DTYPES[2 if vocab_size <= 1 << 16 else 4]


class ShardWriter:
    """Writes FOLDER/NAME.bin and NAME.idx, and of dialogs NAME.mask and NAME.num, as *.tmp; close()
    makes them appear, complete."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.folder, self.name = folder, name
        self.masks: list[np.ndarray] = []  # which tokens are learned, by document
        self.clients: list[str] = []  # whose the documents are
        self.token_file = open(folder / f"{name}.bin.tmp", "wb")  # noqa: SIM115
        self.index_file = open(folder / f"{name}.idx.tmp", "wb")  # noqa: SIM115
        self.token_file.write(bytes(HEADER.size))
        self.dtype, self.tokens, self.documents, self.largest = dtype, 0, 0, 0

    def add(self, ids: np.ndarray, learned: np.ndarray | None = None, client: str = "") -> None:
        """Append one document's token ids, boundaries included; `learned`: which of them are, of a
        dialog; `client`: whose table it is."""
        self.index_file.write(struct.pack("<Q", self.tokens))
        self.token_file.write(ids.astype(self.dtype, copy=False).data)
        self.tokens += len(ids)
        self.documents += 1
        self.largest = max(self.largest, int(ids.max(initial=0)))
        if learned is not None:
            self.masks.append(learned)
        if client:
            self.clients.append(client)

    def close(self) -> dict:
        """Finish the files; returns {file name: {size, sha256, tokens, ...}} for the manifest."""
        self.token_file.seek(0)
        self.token_file.write(HEADER.pack(MAGIC, FORMAT, self.dtype.itemsize, self.tokens))
        self.token_file.close()
        self.index_file.close()
        names = [f"{self.name}.bin", f"{self.name}.idx"]
        if self.masks:
            names += [f"{self.name}.mask", f"{self.name}.num"]
            bits = np.packbits(np.concatenate(self.masks), bitorder="little")
            bits.tofile(self.folder / f"{names[2]}.tmp")
            counts = np.array([mask.sum() for mask in self.masks], "<u4")
            counts.tofile(self.folder / f"{names[3]}.tmp")
        if self.clients:
            names.append(f"{self.name}.ids")
            write_text(self.folder / f"{names[2]}.tmp", as_json(self.clients))
        entries = {}
        for name in names:
            temporary = self.folder / f"{name}.tmp"
            sync(temporary)
            entries[name] = file_entry(temporary)
            os.replace(temporary, self.folder / name)
        entries[names[0]] |= {"tokens": self.tokens, "documents": self.documents,
                              "largest_id": self.largest}
        return entries


# ---- the manifest

def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json and its hash: from here on the data set is complete."""
    kind = manifest["recipe"].get("documents", "text")
    text = as_json({"format": MANIFESTS[kind], **manifest})
    write_text(folder / "manifest.sha256", sha256_bytes(text.encode()) + "\n", durable=True)
    write_text(folder / "manifest.json", text, durable=True)


def read_manifest(folder: Path, config: str = "CONFIG") -> dict:
    """Read the manifest of a complete data set whose files have the sizes it names; UserError if
    there is none, with the line that makes it by a `config` file."""
    refuse_a_file(folder)
    if not folder.is_dir():
        beside = Path("data") / folder.name
        if (beside / "manifest.json").is_file():
            raise UserError(f"no data set {folder}; there is {beside}, whose name is {folder.name}")
        words = " ".join(filter(None, ("python prepare.py", config)))
        raise UserError(f"no data set {folder}; make it with: {words} "
                        f"--dataset={shlex.quote(folder.name)} "
                        "(--sources=YOUR.txt for text of your own)")
    path, digest = folder / "manifest.json", folder / "manifest.sha256"
    if not path.is_file():
        begun = any(folder.glob("*.bin")) or any(folder.glob("*.tmp"))
        raise UserError(f"data set {folder} is unfinished (no manifest.json); run prepare.py again"
                        if begun else f"{folder} is not a data set: it has no manifest.json")
    manifest = read_json(path)
    if manifest.get("format") not in MANIFESTS.values():
        raise UserError(f"{path} has format {manifest.get('format')}, this program reads "
                        f"{' and '.join(map(str, sorted({*MANIFESTS.values()})))}; "
                        "use the plainllama that wrote it, or prepare the data set again")
    if not digest.is_file() or digest.read_bytes() != f"{sha256(path)}\n".encode():
        raise UserError(f"{path} does not match manifest.sha256: one of them is damaged")
    try:  # what readers ask for is there
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
        _ = manifest["splits"]["train"]["tokens"], manifest["tokenizer"]["vocab_size"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a plainllama manifest ({error!r}); prepare again") from None
    for name, size in sizes.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink():
            raise UserError(f"{path} names {name!r}, which leaves the data set's folder")
        if not file.is_file():
            raise UserError(f"data set {folder}: {name} is missing; prepare it again")
        if file.stat().st_size != size:
            raise UserError(f"data set {folder}: {name} has {file.stat().st_size} bytes where the "
                            f"manifest says {size}; prepare it again")
    return manifest


def refuse_a_file(folder: Path) -> None:
    """Raise UserError if what shall be a folder is something else."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is a file or a link to nowhere, where a folder shall be; remove "
                        "it or name another")


def files_in(folder: Path) -> list[Path]:
    """List what lies in a folder, without what a system puts there: .DS_Store and the like."""
    return sorted(path for path in folder.iterdir()
                  if path.name[0] != "." and path.name not in ("Thumbs.db", "desktop.ini"))


def verify(folder: Path) -> tuple[int, list[str]]:
    """Check every byte; returns (0, []) if good, (1, problems) if damaged, (2, [why]) if there is
    no manifest: it is not a data set, or an unfinished one."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return (1 if (folder / "manifest.json").is_file() else 2), [str(error)]
    problems = [f"{folder / name}: its sha256 is not the manifest's"
                for name, entry in manifest["files"].items()
                if sha256(folder / name) != entry["sha256"]]
    known = {*manifest["files"], "manifest.json", "manifest.sha256", SEEN}
    problems += [f"{path}: not named by the manifest"
                 for path in files_in(folder) if path.name not in known]
    return (1 if problems else 0), problems


# ---- reading

class Split:
    """The token files of one split, joined in order; mapped into memory when first asked for.

    A map is kept as a plain array: slices of np.memmap itself are slow.
    """

    def __init__(self, folder: Path, split: str, manifest: dict):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.entries = {name: entry for name, entry in manifest["files"].items()
                        if name.startswith(f"{split}-") and name.endswith(".bin")}
        self.names = list(self.entries)
        counts = [entry["tokens"] for entry in self.entries.values()]
        self.starts = np.cumsum([0, *counts], dtype=np.int64)
        self.tokens = int(self.starts[-1])
        self.documents = sum(entry["documents"] for entry in self.entries.values())
        kind = manifest["recipe"].get("documents", "text")
        self.whole, self.masked = kind != "text", kind in DIALOGS  # not cut; not all is learned
        self.together = 2 if kind == "preference" else 1
        self.maps: dict[str, np.ndarray] = {}
        vocab = manifest["tokenizer"]["vocab_size"]
        for name, entry in self.entries.items():
            if entry["largest_id"] >= vocab:
                raise UserError(f"{folder / name} holds id {entry['largest_id']} but the tokenizer "
                                f"has {vocab} entries; prepare it again")

    def shard(self, i: int) -> np.ndarray:
        """Map token file i, its header checked against the manifest."""
        name = self.names[i]
        if name not in self.maps:
            path, tokens = self.folder / name, self.entries[name]["tokens"]
            with open(path, "rb") as file:
                magic, version, width, count = HEADER.unpack(file.read(HEADER.size))
            if (magic, version, count) != (MAGIC, FORMAT, tokens) or width not in DTYPES:
                raise UserError(f"{path}: its header does not match the manifest; prepare it again")
            self.maps[name] = np.asarray(np.memmap(path, DTYPES[width], "r", HEADER.size))
        return self.maps[name]

    def beside(self, i: int, ending: str, dtype: str) -> np.ndarray:
        """Map a file that lies beside token file i."""
        name = self.names[i].removesuffix(".bin") + ending
        if name not in self.maps:
            self.maps[name] = np.asarray(np.memmap(self.folder / name, dtype, "r"))
        return self.maps[name]

    def index(self, i: int) -> np.ndarray:
        """Map the index of token file i: where documents start in it."""
        return self.beside(i, ".idx", "<u8")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens start..stop-1 of the joined files, in their stored dtype."""
        i = self.file_of(start)
        pieces = []
        while start < stop:
            pieces.append(self.shard(i)[start - self.starts[i]:stop - self.starts[i]])
            start += len(pieces[-1])
            i += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)  # nearly always one

    def file_of(self, token: int) -> int:
        """Give the number of the token file that holds a token."""
        return int(np.searchsorted(self.starts, token, "right")) - 1

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """Tell which of the tokens start..stop-1 of one document are learned, bool (n,)."""
        i = self.file_of(start)
        first, last = start - int(self.starts[i]), stop - int(self.starts[i])
        bits = self.beside(i, ".mask", "u1")[first // 8:ceil_div(last, 8)]
        return np.unpackbits(bits, bitorder="little")[first % 8:][:stop - start].astype(bool)

    def bounds(self) -> np.ndarray:
        """Say where each document begins, and where the last one ends (documents + 1,)."""
        indices = [self.index(i).astype(np.int64) + self.starts[i] for i in range(len(self.names))]
        return np.concatenate([*indices, [self.tokens]])

    def sources(self) -> np.ndarray:
        """Give the number of the source that each document is of (documents,)."""
        sizes = [entry["documents"] for entry in self.entries.values()]
        return np.repeat([self.manifest["source_of"][name] for name in self.names], sizes)

    def clients(self) -> list[str]:
        """Give the id of the client whose table each document is (documents,)."""
        return [client for name in self.names
                for client in json.loads((self.folder / f"{name[:-4]}.ids").read_text("utf-8"))]

    def learned_counts(self) -> np.ndarray:
        """Count the learned tokens of each document (documents,)."""
        return np.concatenate([self.beside(i, ".num", "<u4").astype(np.int64)
                               for i in range(len(self.names))])


def open_split(folder: Path, split: str) -> Split:
    """Open a split of a complete data set."""
    return Split(folder, split, read_manifest(folder))
