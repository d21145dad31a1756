"""Turn text into a data set that can be trusted: sources -> documents -> tokens -> data/NAME/.

  prepare.py [CONFIG] [--key=value ...]   the sources of CONFIG, or of config/llama100m.py
  prepare.py --verify data/NAME           check every byte: exit 0 good, 1 damaged, 2 not a data set
  prepare.py --inspect data/NAME          what it holds, and how its documents begin

A source (--sources=A,B or `sources` in the config) is
  PATH        a file, a folder or a glob of .txt (the file is one document), .jsonl (a line is one)
              and .parquet (a row is one); the first two also as .gz, .xz or .zst
  -           standard input: JSON lines if it begins with {, else one document
  hf:NAME[@REVISION][:SPLIT]   a data set of the Hugging Face hub; split train unless it is named
  embedded    the Python files of the installed sympy, networkx and mpmath
  a dict      {'path': one of these, 'column': 'text', 'slice': '100:200', 'max_documents': 50};
              slice and max_documents count lines, rows or files in their order

A document is held out for validation by the hash of its text. If none is, the one with the smallest
hash is; a corpus of a single document gives its end. After an interruption the same command goes on
with what is missing. The bytes are the same for any number of workers.
"""
# ruff: noqa: E402

import sys
from dataclasses import dataclass

import settings


@dataclass
class Flags:
    """What prepare.py takes beside a config."""

    verify: str = settings.key("", "check every byte of the data set in this folder")
    inspect: str = settings.key("", "show what the data set in this folder holds")


if __name__ == "__main__":  # --help and a misspelt key are answered before anything slow is loaded
    LOOKS = any(word.startswith(("--verify", "--inspect")) for word in sys.argv[1:])
    COMMAND = settings.command(__doc__, Flags, "files" if LOOKS else "config")

import contextlib
import fcntl
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from settings import Settings, UserError
from shards import ShardWriter, Split, file_entry, read_manifest, token_dtype, write_manifest
from shards import verify as check_bytes
from tokenizer import Tokenizer, make

KINDS = r".*\.(txt|jsonl|parquet|(txt|jsonl)\.(gz|xz|zst))"
PACKED = {".gz": 3, ".xz": 4, ".zst": 3}  # bytes of text in a packed byte: a guess, for the plan
PART = 64 << 20  # bytes of text that a worker takes at a time
BATCH = 4 << 20  # characters encoded at a time: bounds the memory
SCAN = 16 << 20  # characters read before any work: bad input is met before anything is written
SAMPLE = 32 << 20  # characters that bpe:N is trained on
COUNTS = ("documents", "tokens", "bytes")
NOTES = "work.tmp"  # state.json, part-*.json and half-made shards, until the manifest is written
WORKER: dict = {}  # a worker's tokenizer and the counters of its progress


@dataclass(frozen=True)
class Piece:
    """Consecutive records of one file."""

    path: str  # on this machine
    label: str  # in messages and in the manifest: the same on every machine
    kind: str  # txt, jsonl or parquet
    column: str
    size: int  # bytes of text, roughly
    start: int = 0  # first byte (jsonl) or the row group (parquet)
    stop: int = sys.maxsize
    skip: int = 0  # records left out at its start
    take: int = sys.maxsize


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
        WORKER[spool.name] = spool  # which keeps the file until we end
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
            revision = hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha
            splits = datasets.load_dataset_builder(name, revision=revision).config.data_files or {}
            if split not in splits:
                raise UserError(f"{path}: no split {split!r}; there are {', '.join(splits)}")
            known = {"files": [str(url).partition(f"@{revision}/")[2] for url in splits[split]]}
        found: list = []
        for file in sorted(known["files"]):
            print(f"{path}: file {len(found) + 1} of {len(known['files'])}, {file}", flush=True)
            found.append((file, Path(hub.hf_hub_download(
                name, file, repo_type="dataset", revision=revision, etag_timeout=20))))
        return {"revision": revision}, found
    except ImportError as error:
        raise UserError(f"{path}: {error}; pip install 'plainllama[data]'") from None
    except UserError:
        raise
    except Exception as error:  # whatever the two libraries and the network raise
        raise UserError(f"{path} is not to be had from the hub ({type(error).__name__}: "
                        f"{str(error)[:300]}); a local copy of its .parquet, .jsonl or .txt files "
                        "will do: --sources=PATH") from None


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
        cut = (p for label, path in files for p in pieces_of(label, path, source))
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


def pieces_of(label: str, path: Path, source: dict) -> Iterator[Piece]:
    """A file in the smallest pieces worth a worker's while."""
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
        # a packed file has few pieces, because each is reached by unpacking what is before it
        packed = path.suffix in PACKED
        step = max(64 << 10, piece.size // 4 if packed else min(PART, piece.size // 12))
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
        raise UserError(f"{path}: {error}; pip install 'plainllama[data]'") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from None
    if column not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {column!r}; it has "
                        f"{', '.join(file.schema_arrow.names)}: {{'path': ..., 'column': ...}}")
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
            n = sum(1 for _ in itertools.islice(records_of(piece), max(0, stop - seen)))
            piece = replace(piece, skip=min(n, max(0, first - seen)), take=n)
            seen += n
        if piece.skip < piece.take:
            yield piece


# ---- parts -> documents

def records_of(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """The raw records of a piece, each with the row or byte at which it begins."""
    try:
        with contextlib.ExitStack() as stack:
            if piece.kind == "parquet":
                records = rows_of(piece)
            else:
                file = stack.enter_context(opened(piece.path))
                records = iter([(0, file.read())]) if piece.kind == "txt" else lines_of(file, piece)
            yield from itertools.islice(records, piece.skip, piece.take)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{piece.path} is damaged or cut short: {error}") from None


def rows_of(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """The rows of a row group; as bytes, so that invalid utf-8 costs no other row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(piece.path, pre_buffer=False, buffer_size=1 << 20)
    first = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    batches = file.iter_batches(128, [piece.start], [piece.column])
    values = (batch.column(0).cast(pa.large_binary()).to_pylist() for batch in batches)
    return enumerate(itertools.chain.from_iterable(values), first)


def lines_of(file, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines whose first byte lies in the piece; blank ones are no records."""
    if piece.start:
        file.seek(piece.start - 1)
        file.readline()
    at = file.tell() if piece.start else 0
    while at < piece.stop and (line := file.readline()):
        if not line.isspace():
            yield at, line
        at += len(line)


def opened(path: str):
    """A file's bytes, unpacked."""
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    if path.endswith(".xz"):
        return lzma.open(path)
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def text_of(piece: Piece, raw: bytes | None) -> tuple[str, str]:
    """(text, ''), or ('', the rule by which the record is dropped)."""
    try:
        text = (raw or b"").decode("utf-8" if piece.kind == "parquet" else "utf-8-sig")
        if piece.kind == "jsonl":
            record = json.loads(text)
            if not isinstance(record, dict):
                return "", "broken line"
            if piece.column not in record:
                return "", f"no column {piece.column!r}, only {', '.join(record)[:200]}"
            text = record[piece.column]
        if raw is None or not isinstance(text, str):
            return "", "text is not a string"
        text.encode()  # half a surrogate pair, escaped in JSON, has no utf-8
    except UnicodeError:
        return "", "invalid utf-8"
    except (ValueError, RecursionError):
        return "", "broken line"
    return text, "" if text else "empty"


def documents(pieces: Iterable[Piece], dropped: dict) -> Iterator[str]:
    """The texts of the pieces; what is dropped is counted by rule, and the first of each named."""
    for piece in pieces:
        for at, raw in records_of(piece):
            text, rule = text_of(piece, raw)
            if not rule:
                yield text
                continue
            if rule not in dropped:
                where = {"txt": "", "jsonl": ":{}", "parquet": " row {}"}[piece.kind]
                number = 1 + (line_of(piece, at) if piece.kind == "jsonl" else at)
                dropped[rule] = {"count": 0, "first": piece.label + where.format(number)}
            dropped[rule]["count"] += 1


def line_of(piece: Piece, at: int) -> int:
    """Lines before byte `at` of the piece's file."""
    with opened(piece.path) as file:
        return sum(file.read(min(1 << 20, at - i)).count(b"\n") for i in range(0, at, 1 << 20))


def text_hash(text: str) -> int:
    """64 bits that choose a document's split, wherever it stands."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hash_below(parts: list[list[Piece]], fraction: float) -> int:
    """Documents with a hash below this are validation; -1: there is one document, its end is.

    Reads SCAN characters, all of a smaller corpus, and goes on until both splits have a document.
    """
    below, smallest, largest, size = int(fraction * 2**64), 2**64, -1, 0
    dropped: dict = {}
    for text in documents(itertools.chain.from_iterable(parts), dropped):
        smallest, largest = min(smallest, text_hash(text)), max(largest, text_hash(text))
        size += len(text)
        if size > SCAN and (not below or smallest < below <= largest):
            break
    if largest < 0:
        raise UserError("sources: no document is left; dropped: " + "; ".join(
            f"{entry['count']} {rule} (first {entry['first']})" for rule, entry in dropped.items()))
    if not below or smallest < below <= largest:
        return below
    if smallest == largest:
        return -1
    return largest if largest < below else smallest + 1


def placed(texts: Iterable[str], below: int, fraction: float) -> Iterator[tuple[str, str]]:
    """(split, text) of every document."""
    for text in texts:
        if below >= 0:
            yield "val" if text_hash(text) < below else "train", text
        else:  # cut at the end of a line, if there is one
            end = int(len(text) * (1 - fraction))
            end = text.rfind("\n", 0, end) + 1 or end
            yield from (pair for pair in (("train", text[:end]), ("val", text[end:])) if pair[1])


# ---- documents -> tokens -> shards

def start_worker(folder: Path, counters) -> None:
    """What a worker process does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    threading.Thread(target=die_with_parent, daemon=True).start()
    WORKER.update(tokenizer=Tokenizer.load(folder), counters=counters)


def die_with_parent() -> None:
    """Ends this worker when the process that started it has gone, killed or not."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def make_part(folder: Path, number: int, stream_of: tuple[list[Piece], int, float]) -> None:
    """Write the shards of one part, and then its json, which says that the part is done."""
    pieces, below, fraction = stream_of
    tokenizer, counters = WORKER["tokenizer"], WORKER["counters"]
    dropped: dict = {}
    files: dict = {}
    splits = {split: dict.fromkeys((*COUNTS, "longest"), 0) for split in ("train", "val")}
    # in a folder of its own: a worker that outlives a killed run cannot write into the next one's
    with tempfile.TemporaryDirectory(prefix=f"part-{number:05}-", dir=folder / NOTES) as own:
        writers: dict[str, ShardWriter] = {}
        for batch in batches(placed(documents(pieces, dropped), below, fraction)):
            encoded = tokenizer.encode_documents([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                if split not in writers:
                    writers[split] = ShardWriter(Path(own), f"{split}-{number:05}",
                                                 token_dtype(tokenizer.vocab_size))
                writers[split].add(ids)
                for i, count in enumerate((1, len(ids), len(text.encode()))):
                    splits[split][COUNTS[i]] += count
                    with counters.get_lock():
                        counters[i] += count
                splits[split]["longest"] = max(splits[split]["longest"], len(ids))
        for _, writer in sorted(writers.items()):
            files |= writer.close()
        for name in files:
            os.replace(Path(own) / name, folder / name)
    settings.to_json(folder / NOTES / f"part-{number:05}.json",
                     {"splits": splits, "dropped": dropped, "files": files})


def batches(stream: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents by the few megabytes."""
    batch, size = [], 0
    for item in stream:
        batch.append(item)
        size += len(item[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def run_workers(folder: Path, jobs: dict[int, tuple], workers: int) -> None:
    """Make the parts `jobs` in processes of their own, and show how far they are."""
    context = multiprocessing.get_context("spawn")
    counters, began, shown = context.Array("q", 3), time.monotonic(), 0.0
    sizes = [size_of(job[0]) for job in jobs.values()]
    with ProcessPoolExecutor(workers, context, start_worker, (folder, counters)) as pool:
        waiting = {pool.submit(make_part, folder, i, job) for i, job in jobs.items()}
        try:
            while waiting:
                done, waiting = wait(waiting, 0.25, FIRST_COMPLETED)
                for future in done:
                    future.result()
                seconds = time.monotonic() - began
                if waiting and seconds - shown < (0.2 if sys.stdout.isatty() else 5):
                    continue
                shown, (count, tokens, size) = seconds, counters[:]
                # packed files are guessed at, so finished parts say what the rest may hold
                finished = len(jobs) - len(waiting)
                left = seconds * max(sum(sizes) / max(size, 1) - 1, len(waiting) / len(jobs) / 10)
                line = (f"{count:,} documents  {size / 1e6 / seconds:.1f} MB/s  "
                        f"{tokens / seconds:,.0f} tokens/s  parts {finished}/{len(jobs)}  "
                        + (f"ETA {left:.0f} s" if waiting else f"{seconds:.0f} s"))
                print(f"\r{line}\033[K" if sys.stdout.isatty() else line,
                      end="" if waiting and sys.stdout.isatty() else "\n", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- the command

def main(command: settings.CommandLine) -> int:
    """Prepare, verify or inspect."""
    look: Flags = command.flags  # type: ignore[assignment]
    if look.verify or look.inspect:
        return verify(Path(look.verify)) if look.verify else inspect(Path(look.inspect))
    config = command.config
    if not re.fullmatch(r"\w[\w.+-]*", config.dataset):
        raise UserError(f"dataset {config.dataset!r} is not the name of a folder under data/")
    folder = Path("data") / config.dataset
    new = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # on the folder: it dies with its owner
        prepare(config, folder)
    except BlockingIOError:
        raise UserError(f"{folder}: another prepare.py is at work in it; wait for it, or take "
                        "another --dataset name") from None
    except BrokenProcessPool:
        return settings.complain("a worker process was killed (out of memory? take fewer --workers)"
                                 "; the same command goes on from the finished parts", 1)
    finally:
        os.close(handle)
        for path in new:  # nothing was begun: leave nothing behind
            with contextlib.suppress(OSError):
                path.rmdir()
    named = [f"--dataset={config.dataset}"] if "dataset" in command.overrides else []
    print(" ".join(["next: python train.py", *command.files, *named]))
    return 0


def prepare(config: Settings, folder: Path) -> None:
    """Make the data set, or what is missing of it."""
    sources, notes = described(config.sources), folder / NOTES
    recipe = {"sources": sources, "tokenizer": config.tokenizer,
              "val_fraction": config.val_fraction}
    complete = (folder / "manifest.json").exists()
    state = read_manifest(folder) if complete else unfinished(folder)
    old = state.get("recipe", recipe)
    if differs := [f"{key} was {old.get(key)!r}, is now {recipe[key]!r}" for key in recipe
                   if old.get(key) != recipe[key]] or (
            ["the tokenizer's file has changed"] if complete and Path(config.tokenizer).exists()
            and make(config.tokenizer).sha256 != state["tokenizer"]["sha256"] else []):
        raise UserError(f"{folder} was prepared with another recipe: {'; '.join(differs)}. Take "
                        f"another name (--dataset=NAME) or remove {folder}")
    found = state.get("source", [])
    parts: list[list[Piece]] = []
    try:
        if not (complete and all(source["path"].startswith("hf:") for source in sources)):
            found, parts = survey(sources, found)
    except UserError:
        if not complete:  # else the source has gone, and what was made of it still stands
            raise
    for was, now in zip(state.get("source", []), found, strict=False):
        if was != now:
            raise UserError(f"{folder} was prepared when {now['path']} held something else. Take "
                            f"another name (--dataset=NAME) or remove {folder}")
    if not complete:
        below = hash_below(parts, config.val_fraction)
        tokenizer = (Tokenizer.load(folder) if (folder / "tokenizer.json").exists()
                     else make(config.tokenizer, lambda: bpe_sample(parts), [folder]))
        notes.mkdir(exist_ok=True)
        settings.to_json(notes / "state.json", {"recipe": recipe, "source": found})
        tokenizer.save(notes)
        os.replace(notes / "tokenizer.json", folder / "tokenizer.json")
        jobs = {i: (part, below, config.val_fraction) for i, part in enumerate(parts)
                if not finished_part(folder, i)}
        workers = min(config.workers or os.cpu_count() or 1, len(jobs))
        print(f"{folder}: {len(parts)} parts, {len(parts) - len(jobs)} of them done; {workers} "
              f"workers; tokenizer {config.tokenizer} ({tokenizer.engine})", flush=True)
        if jobs:
            run_workers(folder, jobs, workers)
        state = merged(folder, len(parts), config, tokenizer, {"recipe": recipe, "source": found})
        write_manifest(folder, state)
    shutil.rmtree(notes, ignore_errors=True)
    print(f"{folder}: " + ("already prepared" if complete else "complete"))
    table(state)


def unfinished(folder: Path) -> dict:
    """What an interrupted run noted, {} if there was none; refuses a folder with others' files."""
    ours = rf"{NOTES}|tokenizer\.json|manifest\.(sha256|.*\.tmp)|(train|val)-\d{{5}}\.(bin|idx)"
    begun = (folder / NOTES / "state.json").exists()
    foreign = sorted(path.name for path in folder.iterdir()
                     if not re.fullmatch(ours if begun else NOTES, path.name))
    if foreign:
        raise UserError(f"{folder} holds files of somebody else ({', '.join(foreign[:3])}); take "
                        "another --dataset name or move them away")
    return json.loads((folder / NOTES / "state.json").read_bytes()) if begun else {}


def finished_part(folder: Path, number: int) -> dict | None:
    """The json of a part whose files are all there."""
    try:
        part = json.loads((folder / NOTES / f"part-{number:05}.json").read_bytes())
        whole = all((folder / n).stat().st_size == e["size"] for n, e in part["files"].items())
        return part if whole else None
    except (OSError, ValueError):
        return None


def bpe_sample(parts: list[list[Piece]]) -> Iterator[str]:
    """The beginning of every part, SAMPLE characters in all: spread evenly, always the same."""
    share = SAMPLE / max(sum(map(size_of, parts)), 1)
    for part in parts:
        budget = size_of(part) * share
        for text in documents(part, {}):
            yield text
            budget -= len(text)
            if share < 1 and budget <= 0:
                break


def merged(folder: Path, count: int, config: Settings, tokenizer: Tokenizer, start: dict) -> dict:
    """The manifest: the jsons of all parts as one."""
    splits = {split: dict.fromkeys((*COUNTS, "longest"), 0) for split in ("train", "val")}
    dropped: dict = {}
    files = {"tokenizer.json": file_entry(folder / "tokenizer.json")}
    for part in (finished_part(folder, i) for i in range(count)):
        assert part, "a part has gone while we worked"
        files |= part["files"]
        for split, counts in part["splits"].items():
            for key, n in counts.items():
                so_far = splits[split][key]
                splits[split][key] = max(so_far, n) if key == "longest" else so_far + n
        for rule, entry in part["dropped"].items():
            entry["count"] += dropped.get(rule, {"count": 0})["count"]
            dropped[rule] = entry | {"first": dropped.get(rule, entry)["first"]}
    for counts in splits.values():  # T + 1 tokens make a row, and rows share their last one
        rows = max(counts["tokens"] - 1, 0) // config.block_size
        counts["tail"] = counts["tokens"] - (rows * config.block_size + 1 if rows else 0)
    about = {"spec": config.tokenizer, **{key: getattr(tokenizer, key) for key in (
        "sha256", "vocab_size", "bos", "eos", "engine")}}
    return {**start, "tokenizer": about, "splits": splits, "block_size": config.block_size,
            "dropped": dropped, "files": files}


def table(manifest: dict) -> None:
    """Print what came in, what was dropped by which rule, and what there is."""
    dropped, splits = manifest["dropped"], manifest["splits"]
    total = sum(x.get("documents", x.get("count")) for x in (*splits.values(), *dropped.values()))
    print(f"{total:>14,} documents in")
    for rule, entry in dropped.items():
        print(f"{entry['count']:>14,} dropped: {rule} (first: {entry['first']})")
    print(f"{'':8}{'documents':>12}{'tokens':>16}{'MB':>10}{'bytes/token':>13}{'longest':>11}")
    for split, n in splits.items():
        print(f"{split:8}{n['documents']:>12,}{n['tokens']:>16,}{n['bytes'] / 1e6:>10,.1f}"
              f"{n['bytes'] / max(n['tokens'], 1):>13.3f}{n['longest']:>11,}")


def verify(folder: Path) -> int:
    """Check every byte of a data set; the exit code."""
    code, problems = check_bytes(folder)
    for problem in problems:
        settings.complain(problem, code)
    if not code:
        manifest = read_manifest(folder)
        counts = [f"{split} {n['tokens']:,} tokens" for split, n in manifest["splits"].items()]
        print(f"{folder}: ok, {len(manifest['files'])} files, {', '.join(counts)}")
    return code


def inspect(folder: Path) -> int:
    """Show what a data set holds and how a few documents begin."""
    manifest, tokenizer = read_manifest(folder), Tokenizer.load(folder)
    for key in ("recipe", "source", "tokenizer"):
        print(f"{key}: {json.dumps(manifest[key])[:1000]}")
    table(manifest)
    for split in (Split(folder, name, manifest) for name in ("train", "val")):
        if split.names:
            index = memoryview((folder / split.names[0]).with_suffix(".idx").read_bytes()).cast("Q")
            for start, end in list(itertools.pairwise([*index, len(split.shard(0))]))[:3]:
                text = tokenizer.decode(split.shard(0)[start:min(end, start + 64)]).strip()
                print(f"{split.split}, {end - start:,} tokens: {text.partition(chr(10))[0]}")
    return 0


if __name__ == "__main__":
    settings.run(main, COMMAND)
