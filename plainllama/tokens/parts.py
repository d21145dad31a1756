"""Parts -> token files: what a worker makes of a part, and all parts as one manifest.

A part's files are a function of the part alone, so any number of workers writes the same bytes.
"""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from plainllama.files import file_entry, read_json, write_json
from plainllama.settings import Settings
from plainllama.text.documents import Part, Tally, beginnings, documents
from plainllama.text.selection import HoldOut, placed
from plainllama.text.workers import COUNTS, NOTES, Worker, own_folder, run_workers, worker_count
from plainllama.tokens.shards import SEEN, ShardWriter
from plainllama.tokens.tokenizer import CUT, Tokenizer, compared, make_tokenizer

SAMPLE = 32 << 20  # characters that bpe:N is trained on
CHECKED = 1 << 16  # characters from each of some files on which the tokenizer's engine is verified
BATCH = 1 << 20  # characters encoded at a time: bounds the memory


# ---- before the parts

def choose_tokenizer(spec: str, folder: Path, parts: list[Part]) -> Tokenizer:
    """Load a data set's tokenizer, or make it, its engine verified on the beginnings of files."""
    made = (folder / "tokenizer.json").exists()
    train = spec.startswith("bpe:") and not made
    if train:
        print(f"{folder}: training the tokenizer {spec}", flush=True)
    tokenizer = Tokenizer.load(folder) if made else make_tokenizer(
        spec, lambda: beginnings(parts, SAMPLE), [folder])
    files = {piece.path: Part([piece], part.rules)  # the first piece of each
             for part in reversed(parts) for piece in reversed(part.pieces)}
    sampled = list(files.values())[::len(files) // 8 + 1]
    texts = [text[:CHECKED] for part in sampled for text in beginnings([part], CHECKED)]
    if not tokenizer.check(texts):
        print(f"{folder}: the faster engine differs on this text; `tokenizers` is used", flush=True)
    if train:
        sizes = [f"{name} {size:.3f}" for name, size in compared(tokenizer, texts).items()]
        print(f"{folder}: bytes per token {', '.join(sizes)}", flush=True)
    return tokenizer


def note_beginning(folder: Path, begun: dict, seen: dict, tokenizer: Tokenizer) -> None:
    """Write down what is begun, of which files and with which tokenizer; other shares may do the
    same now."""
    (folder / NOTES).mkdir(exist_ok=True)
    with own_folder(folder) as own:
        write_json(Path(own) / "state.json", begun)
        write_json(Path(own) / SEEN, seen)
        tokenizer.save(own)
        for name, home in (("state.json", folder / NOTES), (SEEN, folder),
                           ("tokenizer.json", folder)):
            os.replace(Path(own) / name, home / name)


# ---- a part -> its shards

def make_shards(config: Settings, folder: Path, parts: list[Part], mine: range,
                hold_out: HoldOut, tokenizer: Tokenizer) -> None:
    """Make the shards that my parts lack."""
    todo = {i: parts[i] for i in mine if not finished_part(folder, i)}
    print(f"{folder}: {len(mine)} parts, {len(mine) - len(todo)} of them done; "
          f"{worker_count(config.workers, len(todo))} workers; tokenizer {config.tokenizer}, "
          f"{tokenizer.vocab_size:,} entries ({tokenizer.engine})", flush=True)
    if todo:
        run_workers(folder, partial(make_part, folder, hold_out), todo, config.workers,
                    partial(load_tokenizer, folder, tokenizer.engine), tokenizer)


def load_tokenizer(folder: Path, engine: str) -> Tokenizer:
    """Load a data set's tokenizer in a worker, with the engine that was chosen for its text."""
    tokenizer = Tokenizer.load(folder)
    if engine == "tokenizers":
        tokenizer.give_up()
    return tokenizer


def make_part(folder: Path, hold_out: HoldOut, worker: Worker, number: int, part: Part) -> None:
    """Write the shards of one part, and then its json, which says that the part is done."""
    tokenizer: Tokenizer = worker.tools
    dropped, cut, splits = Tally(), Tally(), no_counts()
    tokenizer.cut_words = 0
    files: dict = {}
    with own_folder(folder, f"part-{number:05}-") as own:
        writers: dict[str, ShardWriter] = {}
        for batch in batches(placed(documents([part], dropped, cut), hold_out)):
            encoded = tokenizer.encode_documents([text for _, text in batch])
            sizes = [len(text) if text.isascii() else len(text.encode()) for _, text in batch]
            for (split, _), ids, size in zip(batch, encoded, sizes, strict=True):
                if split not in writers:
                    name = f"{split}-{number:05}"
                    writers[split] = ShardWriter(Path(own), name, tokenizer.kind)
                writers[split].add(ids)
                add_counts(splits[split], {"documents": 1, "tokens": len(ids), "bytes": size,
                                           "longest": len(ids)})
            worker.report(number, len(batch), sum(map(len, encoded)), sum(sizes))
        if tokenizer.cut_words:
            cut.note(f"word over {CUT >> 20} MB", lambda: f"after {part.pieces[0].label}",
                     tokenizer.cut_words)
        for _, writer in sorted(writers.items()):
            files |= writer.close()
        for name in files:
            os.replace(Path(own) / name, folder / name)
    write_json(folder / NOTES / f"part-{number:05}.json",
               {"splits": splits, "dropped": dropped, "cut": cut, "files": files})


def batches(stream: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Collect documents by the megabyte; the last batch may be empty."""
    batch, size = [], 0
    for item in stream:
        batch.append(item)
        size += len(item[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


# ---- parts -> the manifest

def no_counts() -> dict[str, dict[str, int]]:
    """Make the counts of both splits, all 0."""
    return {split: dict.fromkeys((*COUNTS, "longest"), 0) for split in ("train", "val")}


def add_counts(so_far: dict[str, int], more: dict[str, int]) -> None:
    """Count more documents of a split; of `longest` the greater one stays."""
    for key, n in more.items():
        so_far[key] = max(so_far[key], n) if key == "longest" else so_far[key] + n


def finished_part(folder: Path, number: int) -> dict:
    """Read the json of a part whose files are all there, {} if it is not finished."""
    part = read_json(folder / NOTES / f"part-{number:05}.json", tolerant=True)
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == entry["size"]
                for name, entry in part.get("files", {}).items())
    return part if whole else {}


def merged(folder: Path, count: int, spec: str, block_size: int, tokenizer: Tokenizer) -> dict:
    """Join the jsons of all parts to what the manifest says beside the recipe."""
    dropped, cut, splits = Tally(), Tally(), no_counts()
    files = {"tokenizer.json": file_entry(folder / "tokenizer.json")}
    for number in range(count):
        part = finished_part(folder, number)
        files |= part["files"]
        for split, counts in part["splits"].items():
            add_counts(splits[split], counts)
        dropped.add(part["dropped"])
        cut.add(part["cut"])
    for counts in splits.values():  # T + 1 tokens make a row, and rows share their last one
        rows = max(counts["tokens"] - 1, 0) // block_size
        counts["tail"] = counts["tokens"] - (rows * block_size + 1 if rows else 0)
    about = {"spec": spec, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
             "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "engine": tokenizer.engine}
    return {"tokenizer": about, "splits": splits, "block_size": block_size,
            "dropped": dropped, "cut": cut, "files": files}
