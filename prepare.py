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
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from settings import Settings, UserError
from shards import ShardWriter, Split, file_entry, read_manifest, token_dtype, write_manifest
from shards import verify as check_bytes
from sources import Piece, described, documents, size_of, survey
from tokenizer import Tokenizer, make

BATCH = 1 << 20  # characters encoded at a time: bounds the memory
SCAN = 16 << 20  # characters read before any work: bad input is met before anything is written
SAMPLE = 32 << 20  # characters that bpe:N is trained on
COUNTS = ("documents", "tokens", "bytes")
NOTES = "work.tmp"  # state.json, part-*.json and half-made shards, until the manifest is written
WORKER: dict = {}  # a worker's tokenizer and the counters of its progress


# ---- documents -> their split

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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, ...
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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


def run_workers(folder: Path, jobs: dict[int, tuple], workers: int) -> None:
    """Make the parts `jobs` in processes of their own, and show how far they are."""
    context = multiprocessing.get_context("spawn")
    counters, began, shown = context.Array("q", 3), time.monotonic(), 0.0
    sizes = [size_of(job[0]) for job in jobs.values()]
    with ProcessPoolExecutor(workers, context, start_worker, (folder, counters)) as pool:
        # ... also when it comes while workers start, who inherit that it waits
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        waiting = {pool.submit(make_part, folder, i, job) for i, job in jobs.items()}
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while waiting:
                done, waiting = wait(waiting, 0.25, FIRST_COMPLETED)
                for future in done:
                    future.result()
                seconds = time.monotonic() - began
                if waiting and seconds - shown < (0.2 if sys.stdout.isatty() else 5):
                    continue
                shown, (count, tokens, size) = seconds, counters[:]
                # sizes are guesses for packed files: the parts that wait are worth a tenth at least
                rest = max(sum(sizes) / max(size, 1) - 1, len(waiting) / len(jobs) / 10)
                eta = "" if not size else f"  ETA {seconds * rest:.0f} s" if waiting else "  done"
                line = (f"{count:,} documents  {size / 1e6 / seconds:.1f} MB/s  "
                        f"{tokens / seconds:,.0f} tokens/s  parts {len(jobs) - len(waiting)}/"
                        f"{len(jobs)}  {seconds:.0f} s{eta}")
                print(f"\r{line}\033[K" if sys.stdout.isatty() else line,
                      end="" if waiting and sys.stdout.isatty() else "\n", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # at once: what they hold is made again
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
    named = [f"--dataset={config.dataset}", f"--out_dir=out/{config.dataset}"] if (
        "dataset" in command.overrides) else []
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
        if config.tokenizer.startswith("bpe:") and not (folder / "tokenizer.json").exists():
            print(f"{folder}: training the tokenizer {config.tokenizer}", flush=True)
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
              f"workers; tokenizer {config.tokenizer}, {tokenizer.vocab_size:,} entries "
              f"({tokenizer.engine})", flush=True)
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
