"""Turn text into a data set that can be trusted: sources -> documents -> tokens -> data/NAME/.

  prepare.py [CONFIG] [--key=value ...]   the sources of CONFIG, or of config/llama100m.py
  prepare.py CONFIG --part=3/8            the third of eight shares, for a job array; the same
                                          command without --part then makes one data set of them
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
hash is; a corpus of a single document gives its end. A document over 16 MB becomes several, cut
before a space. Off unless asked: --min_chars and --max_chars; --dedup=exact keeps the first of
equal documents, near also the first of those that share most runs of three words; --strict stops at
a record that cannot be read, which else is only counted. After an interruption the same command
goes on with what is missing. The bytes are the same for any number of workers and of shares.
"""

import sys
from dataclasses import dataclass, replace

from plainllama import settings
from plainllama.command import CommandLine, complain, parse_arguments, run_command
from plainllama.files import write_json
from plainllama.settings import Settings, UserError


@dataclass
class Flags:
    """What prepare.py takes beside a config."""

    part: str = settings.key("", "i/n: only the i-th of n shares of the work, i from 1 to n")
    verify: str = settings.key("", "check every byte of the data set in this folder")
    inspect: str = settings.key("", "show what the data set in this folder holds")


if __name__ == "__main__":  # --help and a misspelt key are answered before anything slow is loaded
    LOOKS = any(word.startswith(("--verify", "--inspect")) for word in sys.argv[1:])
    COMMAND = parse_arguments(__doc__, Flags, "files" if LOOKS else "config")

import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from plainllama.text.documents import Part, Piece, Rules, Tally
from plainllama.text.selection import NOTES, hash_below, marks_of, without_repeats
from plainllama.text.sources import described, size_of, survey
from plainllama.tokens.parts import COUNTS, make_marks, make_part, run_workers
from plainllama.tokens.shards import Split, file_entry, read_manifest, write_manifest
from plainllama.tokens.shards import verify as check_bytes
from plainllama.tokens.tokenizer import Tokenizer, compared, make_tokenizer

SAMPLE = 32 << 20  # characters that bpe:N is trained on
CHECKED = 1 << 16  # characters from each of some files on which the tokenizer's engine is verified
MADE = ("sources", "tokenizer", "val_fraction", "min_chars", "max_chars", "dedup")  # the recipe


# ---- documents -> their split


# ---- the command

def main(command: CommandLine) -> int:
    """Prepare, verify or inspect."""
    look: Flags = command.flags  # type: ignore[assignment]
    if look.verify or look.inspect:
        return verify(Path(look.verify)) if look.verify else inspect(Path(look.inspect))
    config = command.config
    if not re.fullmatch(r"\w[\w.+-]*", config.dataset):
        raise UserError(f"dataset {config.dataset!r} is not the name of a folder under data/")
    share = re.fullmatch(r"(\d+)/(\d+)", look.part or "1/1")
    if not share or not 1 <= int(share[1]) <= int(share[2]):
        raise UserError(f"--part={look.part} is not i/n with i from 1 to n, such as 3/8")
    folder = Path("data") / config.dataset
    new = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_SH if look.part else fcntl.LOCK_EX  # parts work side by side
        fcntl.flock(handle, kind | fcntl.LOCK_NB)  # on the folder: it dies with its owner
        if not prepare(config, folder, int(share[1]) - 1, int(share[2]) if look.part else 0):
            return 0
    except BlockingIOError:
        raise UserError(f"{folder}: another prepare.py is at work in it; wait for it, or take "
                        "another --dataset name") from None
    except BrokenProcessPool:
        return complain("a worker process was killed (out of memory? take fewer --workers)"
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


def prepare(config: Settings, folder: Path, part: int, of: int) -> bool:
    """Make the data set, or what is missing of it, or (of > 0) one share; whether it is whole."""
    sources, notes = described(config.sources), folder / NOTES
    recipe = {key: getattr(config, key) for key in MADE} | {"sources": sources}
    complete = (folder / "manifest.json").exists()
    state = read_manifest(folder) if complete else unfinished(folder)
    if config.dedup == "near" and not importlib.util.find_spec("rensa"):
        raise UserError("dedup=near needs the package rensa: " + settings.install("data"))
    old = {key: getattr(Settings, key, None) for key in MADE} | state.get("recipe", recipe)
    if differs := [f"{key} was {old.get(key)!r}, is now {recipe[key]!r}" for key in recipe
                   if old.get(key) != recipe[key]] or (
            ["the tokenizer's file has changed"] if complete and Path(config.tokenizer).exists()
            and make_tokenizer(config.tokenizer).sha256 != state["tokenizer"]["sha256"] else []):
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
        rules = Rules(config.strict, config.min_chars, config.max_chars)
        jobs = [Part(pieces, rules, {}) for pieces in parts]
        begun = {"recipe": recipe, "source": found}
        below = hash_below(jobs, config.val_fraction)
        tokenizer = start(config, folder, jobs, begun)
        mine = [i for i in range(len(jobs)) if not of or i % of == part]
        if config.dedup != "none":
            unmarked = {i: jobs[i] for i in mine if not marks_of(folder, i).exists()}
            if unmarked:
                print(f"{folder}: looking for repeated documents", flush=True)
                run_workers(folder, tokenizer, config.workers, make_marks, unmarked,
                            config.dedup)
            if rest := [i for i in range(len(jobs)) if not marks_of(folder, i).exists()]:
                print(f"{folder}: {len(rest)} parts are not yet searched for repeated documents; "
                      "when the other shares have ended, start all of them once more")
                return False
            jobs = without_repeats(folder, jobs, config.dedup)
            below = hash_below(jobs, config.val_fraction)
        todo = {i: replace(jobs[i], below=below, fraction=config.val_fraction)
                for i in mine if not finished_part(folder, i)}
        print(f"{folder}: {len(mine)} parts, {len(mine) - len(todo)} of them done; "
              f"{min(config.workers or os.cpu_count() or 1, len(todo))} workers; tokenizer "
              f"{config.tokenizer}, {tokenizer.vocab_size:,} entries ({tokenizer.engine})",
              flush=True)
        if todo:
            run_workers(folder, tokenizer, config.workers, make_part, todo)
        if of:
            print(f"{folder}: share {part + 1} of {of} is done; when all are, the same command "
                  "without --part makes the data set")
            return False
        state = merged(folder, len(parts), config, tokenizer, begun)
        write_manifest(folder, state)
    shutil.rmtree(notes, ignore_errors=True)
    print(f"{folder}: " + ("already prepared" if complete else "complete"))
    print_counts(state)
    return True


def start(config: Settings, folder: Path, jobs: list[Part], begun: dict) -> Tokenizer:
    """Note what is begun and give the tokenizer, its engine verified on the beginnings of files."""
    path, notes = folder / "tokenizer.json", folder / NOTES
    new = config.tokenizer.startswith("bpe:") and not path.exists()
    if new:
        print(f"{folder}: training the tokenizer {config.tokenizer}", flush=True)
    tokenizer = (Tokenizer.load(folder) if path.exists()
                 else make_tokenizer(config.tokenizer, lambda: beginnings(jobs, SAMPLE), [folder]))
    firsts = list({piece.path: replace(job, pieces=[piece])  # of each file
                   for job in reversed(jobs) for piece in reversed(job.pieces)}.values())
    texts = [text[:CHECKED] for job in firsts[::len(firsts) // 8 + 1]
             for text in beginnings([job], CHECKED)]
    if not tokenizer.check(texts):
        print(f"{folder}: the faster engine differs on this text; `tokenizers` is used", flush=True)
    if new:
        print(f"{folder}: bytes per token " + ", ".join(
            f"{name} {size:.3f}" for name, size in compared(tokenizer, texts).items()), flush=True)
    notes.mkdir(exist_ok=True)
    # in a folder of its own: other shares may do the same now
    with tempfile.TemporaryDirectory(dir=notes) as own:
        write_json(Path(own) / "state.json", begun)
        tokenizer.save(own)
        os.replace(Path(own) / "state.json", notes / "state.json")
        os.replace(Path(own) / "tokenizer.json", path)
    return tokenizer


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


def beginnings(jobs: list[Part], size: int) -> Iterator[str]:
    """The beginning of every part, `size` characters in all: spread evenly, always the same."""
    share = size / max(sum(size_of(job.pieces) for job in jobs), 1)
    for job in jobs:
        budget = size_of(job.pieces) * share
        for text in job.texts(Tally()):
            yield text
            budget -= len(text)
            if share < 1 and budget <= 0:
                break


def merged(folder: Path, count: int, config: Settings, tokenizer: Tokenizer, start: dict) -> dict:
    """The manifest: the jsons of all parts as one."""
    splits = {split: dict.fromkeys((*COUNTS, "longest"), 0) for split in ("train", "val")}
    dropped, cut = Tally(), Tally()
    files = {"tokenizer.json": file_entry(folder / "tokenizer.json")}
    for part in (finished_part(folder, i) for i in range(count)):
        assert part, "a part has gone while we worked"
        files |= part["files"]
        for split, counts in part["splits"].items():
            for key, n in counts.items():
                so_far = splits[split][key]
                splits[split][key] = max(so_far, n) if key == "longest" else so_far + n
        dropped.add(part["dropped"])
        cut.add(part["cut"])
    for counts in splits.values():  # T + 1 tokens make a row, and rows share their last one
        rows = max(counts["tokens"] - 1, 0) // config.block_size
        counts["tail"] = counts["tokens"] - (rows * config.block_size + 1 if rows else 0)
    about = {"spec": config.tokenizer, "sha256": tokenizer.sha256,
             "vocab_size": tokenizer.vocab_size, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id,
             "engine": tokenizer.engine}
    return {**start, "tokenizer": about, "splits": splits, "block_size": config.block_size,
            "dropped": dropped, "cut": cut, "files": files}


def print_counts(manifest: dict) -> None:
    """Print what came in, what was dropped by which rule, and what there is."""
    dropped, splits = manifest["dropped"], manifest["splits"]
    total = sum(x.get("documents", x.get("count")) for x in (*splits.values(), *dropped.values()))
    print(f"{total:>14,} documents in")
    for rule, entry in dropped.items():
        print(f"{entry['count']:>14,} dropped: {rule} (first: {entry['first']})")
    for rule, entry in manifest.get("cut", {}).items():
        print(f"{entry['count']:>14,} cut: {rule} (first: {entry['first']})")
    print(f"{'':8}{'documents':>12}{'tokens':>16}{'MB':>10}{'bytes/token':>13}{'longest':>11}")
    for split, n in splits.items():
        print(f"{split:8}{n['documents']:>12,}{n['tokens']:>16,}{n['bytes'] / 1e6:>10,.1f}"
              f"{n['bytes'] / max(n['tokens'], 1):>13.3f}{n['longest']:>11,}")


def verify(folder: Path) -> int:
    """Check every byte of a data set; the exit code."""
    code, problems = check_bytes(folder)
    for problem in problems:
        complain(problem, code)
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
    print_counts(manifest)
    for split in (Split(folder, name, manifest) for name in ("train", "val")):
        if split.names:
            index = memoryview((folder / split.names[0]).with_suffix(".idx").read_bytes()).cast("Q")
            for start, end in list(itertools.pairwise([*index, len(split.shard(0))]))[:3]:
                text = tokenizer.decode(split.shard(0)[start:min(end, start + 64)]).strip()
                print(f"{split.split}, {end - start:,} tokens: {text.partition(chr(10))[0]}")
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
