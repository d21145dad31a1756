"""Sources -> files -> parts -> documents: what prepare.py reads, cut so that workers can share it.

Everything here is a function of the sources alone, so that the same bytes come out for any number
of workers and after any interruption.
"""

import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from plainllama.settings import UserError, install
from plainllama.text.documents import Piece, records_of

KINDS = r".*\.(txt|jsonl|parquet|(txt|jsonl)\.(gz|xz|zst))"
PACKED = {".gz": 3, ".xz": 4, ".zst": 3}  # bytes of text in a packed byte: a guess, for the plan
PART = 64 << 20  # bytes of text that a worker takes at a time
TRIES = 3  # of a download that fails for a reason that may pass
SPOOLED: list = []  # standard input as files, kept until the program ends


# ---- sources -> files -> parts

def described(sources: object) -> list[dict]:
    """The sources as dicts with a `path`."""
    items = sources if isinstance(sources, list | tuple) else [sources]
    found: list = [{"path": item} if isinstance(item, str) else item for item in items]
    for item in found:
        keys = {"path": str, "column": str, "slice": str, "max_documents": int}
        if not (isinstance(item, dict) and item.get("path")
                and all(type(value) is keys.get(key) for key, value in item.items())
                and re.fullmatch(r"\d*:\d*", item.get("slice", ":"))):
            raise UserError(f"sources: {item!r} is not a path, glob, -, hf:NAME, embedded or "
                            "{'path': ..., 'column': ..., 'slice': '10:20', 'max_documents': 5}")
    return found


def files_of(path: str, known: dict) -> tuple[dict, list[tuple[str, Path]]]:
    """What the manifest says of a source beside its files, and the files (label, path) in order."""
    if path.startswith("hf:"):
        return hub_files(path, known)
    if path == "-":
        spool = tempfile.NamedTemporaryFile(prefix="stdin-")  # noqa: SIM115
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.flush()
        SPOOLED.append(spool)
        return {}, [("-", Path(spool.name))]
    if path == "embedded":
        roots = [Path(str(spec.origin)).parent for name in ("mpmath", "networkx", "sympy")
                 if (spec := importlib.util.find_spec(name))]
        found = [(p.relative_to(root.parent).as_posix(), p) for root in roots
                 for p in root.rglob("*.py")]
        return {}, sorted((label, p) for label, p in found
                          if not {"tests", "benchmarks"} & set(label.split("/")))
    folder = os.path.isdir(path)
    pattern = os.path.join(glob.escape(path), "**") if folder else path
    matches = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    matches = [p for p in matches if os.path.isfile(p) and (not folder or re.fullmatch(KINDS, p))]
    root = path if folder else os.path.commonpath(map(os.path.dirname, matches or ["."]))
    found = [(os.path.relpath(p, root or "."), Path(p)) for p in matches]
    if not found:
        raise UserError(f"sources: {path} is no file, and no glob or folder that holds a .txt, "
                        ".jsonl or .parquet file")
    return {}, sorted(found)


def hub_files(path: str, known: dict) -> tuple[dict, list[tuple[str, Path]]]:
    """The files of hf:NAME[@REVISION][:SPLIT], downloaded into the hub's cache; no script is run.

    `known`, an earlier run's record, pins revision and files: a restart reads the same bytes, and
    needs no network for what is in the cache.
    """
    match = re.fullmatch(r"hf:([^@:]+)(?:@([^:]+))?(?::([^:]+))?", path)
    if not match:
        raise UserError(f"sources: {path!r} is not hf:NAME[@REVISION][:SPLIT]")
    name, revision, split = match[1], known.get("revision", match[2]), match[3] or "train"
    try:
        import huggingface_hub as hub

        if not known:
            import datasets

            # asked first because it fails at once, where `datasets` retries for half a minute
            revision = again(lambda: hub.HfApi().dataset_info(
                name, revision=revision, timeout=20)).sha
            splits = datasets.load_dataset_builder(name, revision=revision).config.data_files or {}
            if split not in splits:
                raise UserError(f"{path}: no split {split!r}; there are {', '.join(splits)}")
            known = {"files": [str(url).partition(f"@{revision}/")[2] for url in splits[split]]}
        found: list = []
        for file in sorted(known["files"]):
            print(f"{path}: file {len(found) + 1} of {len(known['files'])}, {file}", flush=True)
            found.append((file, Path(again(lambda file=file: hub.hf_hub_download(  # type: ignore
                name, file, repo_type="dataset", revision=revision, etag_timeout=20)))))
        return {"revision": revision}, found
    except ImportError as error:
        raise UserError(f"{path}: {error}; {install('data')}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the two libraries and the network raise
        files = "; its files: " + ", ".join(known["files"])[:200] if known else ""
        raise UserError(f"{path} is not to be had from the hub ({type(error).__name__}: "
                        f"{str(error)[:300]}). What is downloaded stays, the same command goes on. "
                        "Offline: copy the .parquet, .jsonl or .txt files of "
                        f"datasets/{name} into a folder and say --sources=PATH{files}") from None


def again(ask: Callable):
    """ask(), tried again after a second and after three if the network or the server failed."""
    for seconds in range(1, 2 * TRIES, 2):
        try:
            return ask()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if seconds == 2 * TRIES - 1 or (status < 500 and status != 429) or (
                    os.environ.get("HF_HUB_OFFLINE") == "1"):
                raise
            time.sleep(seconds)


def survey(sources: list[dict], known: list[dict]) -> tuple[list[dict], list[list[Piece]]]:
    """What the manifest says of the sources, and all their records cut into parts.

    Both are functions of the sources alone. Raises UserError for what cannot be read.
    """
    records: list[dict] = []
    pieces: list[Piece] = []
    for i, source in enumerate(sources):
        record, files = files_of(source["path"], known[i] if known else {})
        prints = {label: fingerprint(path) for label, path in files}
        if source["path"] == "embedded":  # a thousand names, as one
            digest = hashlib.blake2b(json.dumps(prints).encode(), digest_size=8).hexdigest()
            prints = {f"{len(files)} files": digest}
        records.append({"path": source["path"], **record, "files": prints})
        if not any(path.stat().st_size for _, path in files):
            raise UserError(f"sources: {source['path']} is empty")
        # a packed file has few pieces, because each is reached by unpacking what is before it
        few = min(4, max(1, 8 // len(files)))
        cut = (p for label, path in files for p in pieces_of(label, path, source, few))
        pieces += sliced(cut, source)
    target = min(PART, max(64 << 10, size_of(pieces) // 12))  # small corpora have several too
    parts: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        size += piece.size
        if size > target and parts[-1]:
            parts.append([])
            size = piece.size
        parts[-1].append(piece)
    return records, parts


def size_of(pieces: list[Piece]) -> int:
    """Bytes of text, roughly."""
    return sum(piece.size for piece in pieces)


def fingerprint(path: Path) -> str:
    """Hash of a file's size and ends: tells at once that a source is not what it was."""
    size, end = path.stat().st_size, 64 << 10
    with open(path, "rb") as file:
        ends = file.read(end)
        file.seek(max(0, size - end))
        ends += file.read(end)
    return hashlib.blake2b(b"%d" % size + ends, digest_size=8).hexdigest()


def pieces_of(label: str, path: Path, source: dict, few: int) -> Iterator[Piece]:
    """A file in the smallest pieces worth a worker's while; `few` of a packed one."""
    column, size = source.get("column", "text"), path.stat().st_size
    match = re.fullmatch(KINDS, path.name)
    if match:
        kind = match[2] or match[1]
    elif label == "-":
        kind = "jsonl" if path.open("rb").read(1 << 16).lstrip().startswith(b"{") else "txt"
    elif source["path"] == "embedded":
        kind = "txt"
    else:
        raise UserError(f"{path}: unknown kind of file; known are .txt, .jsonl, .parquet, and the "
                        "first two with .gz, .xz or .zst")
    piece = Piece(str(path), label, kind, column, size * PACKED.get(path.suffix, 1))
    if kind == "parquet":
        yield from (replace(piece, size=size, start=i)
                    for i, size in enumerate(row_groups(path, column)))
    elif kind == "jsonl" and path.suffix != ".zst":
        packed = path.suffix in PACKED
        step = max(64 << 10, -(-piece.size // few) if packed else min(PART, piece.size // 12))
        for start in range(0, piece.size, step):
            stop = min(piece.size, start + step)
            end = sys.maxsize if packed and stop == piece.size else stop  # the size is a guess
            yield replace(piece, size=stop - start, start=start, stop=end)
    else:
        yield piece


def row_groups(path: Path, column: str) -> list[int]:
    """Text bytes of each row group of a parquet file."""
    try:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
    except ImportError as error:
        raise UserError(f"{path}: {error}; {install('data')}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from None
    if column not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {column!r}; it has "
                        f"{', '.join(file.schema_arrow.names)}; say which is the text: --sources="
                        f"\"{{'path': '{path}', 'column': '{file.schema_arrow.names[0]}'}}\"")
    kind = str(file.schema_arrow.field(column).type)
    if not re.search("string|binary", kind) or "<" in kind.removeprefix("dictionary<values="):
        raise UserError(f"{path}: column {column!r} is {kind}, not text")
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column]


def sliced(pieces: Iterable[Piece], source: dict) -> Iterator[Piece]:
    """The pieces with only the records that `slice` and `max_documents` leave."""
    first, stop = (int(n) if n else None for n in source.get("slice", ":").split(":"))
    first, seen = first or 0, 0
    stop = min(stop or sys.maxsize, first + source.get("max_documents", sys.maxsize))
    for piece in pieces:
        if stop < sys.maxsize or first > seen:
            records = [0] if piece.kind == "txt" else records_of(piece)
            n = sum(1 for _ in itertools.islice(records, max(0, stop - seen)))
            piece = replace(piece, skip=min(n, max(0, first - seen)), take=n)
            seen += n
        if piece.skip < piece.take:
            yield piece
