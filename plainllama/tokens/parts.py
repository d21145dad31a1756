"""Parts -> token files: what a worker makes of a part, and all parts as one manifest.

A part's files are a function of the part alone, so any number of workers writes the same bytes.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from plainllama.files import file_entry, read_json, sha256, write_json, write_text
from plainllama.settings import DIALOGS, Settings, UserError
from plainllama.text.dialogs import Refused
from plainllama.text.documents import Part, Tally, beginnings, documents
from plainllama.text.forms import LEFT_OUT
from plainllama.text.records import Dialog
from plainllama.text.selection import HoldOut, placed
from plainllama.text.sources import described
from plainllama.text.tables import Table
from plainllama.text.workers import COUNTS, NOTES, Nodes, Processes, Worker, own_folder
from plainllama.tokens.chat import TEMPLATE, Rendered, with_roles
from plainllama.tokens.newest import TableEncoder
from plainllama.tokens.rows import added, takes
from plainllama.tokens.shards import SEEN, ShardWriter, Split
from plainllama.tokens.templates import chat_of, find_template
from plainllama.tokens.tokenizer import CUT, Tokenizer, compared, make_tokenizer
from plainllama.tokens.tokenizer_json import TEMPLATE_FILE

SAMPLE = 32 << 20  # characters that bpe:N is trained on
CHECKED = 1 << 16  # characters from each of some files on which the tokenizer's engine is verified
ASKED = ("duplicate", "near duplicate", LEFT_OUT)  # rules by which no row is bad
REWRITTEN = "dialogs learned on their last answer: the template rewrites the others"
BATCH = 1 << 20  # characters encoded at a time: bounds the memory


# ---- before the parts

def choose_tokenizer(config: Settings, folder: Path, parts: list[Part]) -> Tokenizer:
    """Load a data set's tokenizer, or make it, its engine verified on the beginnings of files."""
    spec = config.tokenizer
    made = (folder / "tokenizer.json").exists()
    train = spec.startswith("bpe:") and not made
    if train:
        print(f"{folder}: training the tokenizer {spec}", flush=True)
    tokenizer = Tokenizer.load(folder) if made else for_documents(vars(config), make_tokenizer(
        spec, lambda: beginnings(parts, SAMPLE), [folder]))
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


def for_documents(recipe: dict, base: Tokenizer) -> Tokenizer:
    """Give a tokenizer what a recipe's documents need: of dialogs a template, and its tokens."""
    if recipe["documents"] not in DIALOGS:
        return base
    path = Path(recipe["tokenizer"])
    if recipe["chat_template"] == "own":
        grown = Tokenizer(*with_roles(json.loads(base.json_bytes), "the tokenizer",
                                     base.json_bytes))
        grown.template = TEMPLATE
    elif not path.exists():
        raise UserError("chat_template=model takes the template of a model's folder, and tokenizer="
                        f"{path} is none")
    else:
        grown, base.template = base, find_template(path if path.is_dir() else path.parent)
        chat_of(grown)  # refuses what cannot be learned
    grown.base = base.sha256
    return grown


def note_beginning(folder: Path, begun: dict, seen: dict, tokenizer: Tokenizer) -> None:
    """Write down what is begun, of which files and with which tokenizer."""
    (folder / NOTES).mkdir(exist_ok=True)
    with own_folder(folder) as own:
        write_json(Path(own) / "state.json", begun)
        write_json(Path(own) / SEEN, seen)
        tokenizer.save(own)
        if tokenizer.template:
            write_text(Path(own) / TEMPLATE_FILE, tokenizer.template)
        # first what says that the folder is ours, and the template before the tokenizer
        os.replace(Path(own) / "state.json", folder / NOTES / "state.json")
        for path in sorted(Path(own).iterdir()):
            os.replace(path, folder / path.name)


# ---- a part -> its shards

def make_shards(config: Settings, folder: Path, parts: list[Part], crew: Processes | Nodes,
                hold_out: HoldOut, tokenizer: Tokenizer) -> None:
    """Make the shards that parts lack."""
    todo = {i: part for i, part in enumerate(parts) if not finished_part(folder, i)}
    print(f"{folder}: {len(parts)} parts, {len(parts) - len(todo)} of them done; "
          f"{crew.count(len(todo))} workers; tokenizer {config.tokenizer}, "
          f"{tokenizer.vocab_size:,} entries ({tokenizer.engine})", flush=True)
    if todo:
        crew.run(folder, partial(make_part, folder, hold_out, encoder_of(config)), todo,
                 partial(load_tokenizer, folder, tokenizer.engine), tokenizer)


def load_tokenizer(folder: Path, engine: str) -> Tokenizer:
    """Load a data set's tokenizer in a worker, with the engine that was chosen for its text."""
    tokenizer = Tokenizer.load(folder)
    if engine == "tokenizers":
        tokenizer.give_up()
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: list[str], *_) -> list[list[tuple]]:
    """Encode documents: [(ids, None)] of each."""
    return [[(ids, None)] for ids in tokenizer.encode_documents(texts)]


@dataclass(frozen=True)
class DialogEncoder:
    """Encodes dialogs that keep the rules of length: [(ids, which of them are learned)] of each, of
    a pair two of these."""

    sources: list[dict]
    room: int  # tokens; one more than block_size, since the last one is a target alone
    drops: bool  # what is longer, instead of cutting it

    def __call__(self, tokenizer: Tokenizer, texts: list[Dialog], part: Part, dropped: Tally,
                 cut: Tally) -> list[list[tuple]]:
        """Encode the dialogs of a part; [] for what is dropped, and counted."""
        chat = chat_of(tokenizer)
        found: list[list[tuple]] = []
        most = self.sources[part.source].get("max_tokens", sys.maxsize)
        for text in texts:
            dialog = json.loads(text)
            try:
                kept, size, notes = (self.fit_pair if "rejected" in dialog else self.fit)(
                    chat, dialog)
                if size > most or not kept:
                    raise Refused(f"over max_tokens {most}" if size > most else
                                  f"longer than block_size {self.room - 1}")
            except Refused as error:  # also by a template of others
                dropped.note(str(error), text.where)
                kept, notes = [], {}
            for rule, count in notes.items():
                cut.note(rule, text.where, count)
            found.append([side[:2] for side in kept])
        return found

    def fit(self, chat: Any, dialog: dict) -> tuple[list[Rendered], int, dict[str, int]]:
        """Render a dialog without the last turns that have no room, [] if none has; also the tokens
        of the whole, and what is to be noted of it."""
        whole = chat.rendered(dialog)
        kept, lost = chat.fitted(whole, self.room)
        notes = {REWRITTEN: 1} if whole.rewritten else {}
        if kept is None or (lost and self.drops):
            return [], len(whole.ids), notes
        if len(kept.ids) < len(whole.ids):
            notes |= {f"dialogs to block_size {self.room - 1}": 1,
                      "learned tokens behind that": lost}
        return [kept], len(whole.ids), notes

    def fit_pair(self, chat: Any, dialog: dict) -> tuple[list[Rendered], int, dict[str, int]]:
        """Render a pair, chosen and rejected, without the first turns of the prompt that have no
        room: both lose the same, and none of its answer; the rest as of fit()."""
        messages, size = dialog["messages"], 0
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        system = messages[:1] if messages[0]["role"] == "system" else []
        for at in asked[:1] if self.drops else asked:
            prompt = system + messages[at:asked[-1] + 1]
            sides = [chat.rendered(dialog | {"messages": prompt + answer})
                     for answer in (messages[asked[-1] + 1:], dialog["rejected"])]
            total = sum(len(side.ids) for side in sides)
            size = size or total
            if total <= self.room:
                notes = {REWRITTEN: 1} if sides[0].rewritten else {}
                if at > asked[0]:
                    notes[f"prompts at their beginning, to block_size {self.room - 1}"] = 1
                return sides, size, notes
        return [], size, {}


def encoder_of(config: Settings) -> Callable[..., list]:
    """Choose what encodes a config's documents."""
    if config.documents == "text":
        return encode_texts
    if config.documents == "table":
        return TableEncoder(config.block_size + 1)
    return DialogEncoder(described(config.sources), config.block_size + 1,
                         config.too_long == "drop")


def make_part(folder: Path, hold_out: HoldOut, encode: Callable[..., list], worker: Worker,
              number: int, part: Part) -> None:
    """Write the shards of one part, and then its json, which says that the part is done."""
    tokenizer: Tokenizer = worker.tools
    dropped, cut, splits = Tally(), Tally(), no_counts()
    tokenizer.cut_words = 0
    files: dict = {}
    with own_folder(folder, f"part-{number:05}-") as own:
        writers: dict[str, ShardWriter] = {}
        for batch in batches(placed(documents([part], dropped, cut), hold_out)):
            encoded = encode(tokenizer, [text for _, text in batch], part, dropped, cut)
            texts = [getattr(text, "kept", text) for _, text in batch]
            sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
            for (split, text), made, size in zip(batch, encoded, sizes, strict=True):
                client = text.client.id if isinstance(text, Table) else ""
                if made and split not in writers:
                    name = f"{split}-{number:05}"
                    writers[split] = ShardWriter(Path(own), name, tokenizer.kind)
                for i, (ids, learned) in enumerate(made):
                    writers[split].add(ids, learned, client)
                    counts = {"tokens": len(ids), "longest": len(ids)}
                    if i == 0:  # a pair counts once
                        counts |= {"documents": 1, "bytes": size}
                    if learned is not None:
                        counts["learned"] = int(learned.sum())
                    add_counts(splits[split], counts)
            tokens = sum(len(ids) for made in encoded for ids, _ in made)
            worker.report(number, len(batch), tokens, sum(sizes))
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
        before = so_far.get(key, 0)
        so_far[key] = max(before, n) if key == "longest" else before + n


def finished_part(folder: Path, number: int) -> dict:
    """Read the json of a part whose files are all there, {} if it is not finished."""
    part = read_json(folder / NOTES / f"part-{number:05}.json", tolerant=True)
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == entry["size"]
                for name, entry in part.get("files", {}).items())
    return part if whole else {}


def merged(folder: Path, parts: list[Part], config: Settings, tokenizer: Tokenizer) -> dict:
    """Join the jsons of all parts to what the manifest says beside the recipe."""
    dropped, cut, splits = Tally(), Tally(), no_counts()
    beside = [name for name in ("tokenizer.json", TEMPLATE_FILE) if (folder / name).exists()]
    files = {name: file_entry(folder / name) for name in beside}
    chat = config.documents in DIALOGS
    source_of: dict[str, int] = {}
    by_source: list[dict] = [{"dropped": Tally(), "cut": Tally(), "splits": no_counts()}
                             for _ in described(config.sources)]
    for number, part in enumerate(parts):
        made = finished_part(folder, number)
        files |= made["files"]
        source_of |= {name: part.source for name in made["files"] if name.endswith(".bin")}
        for tally, name in ((dropped, "dropped"), (cut, "cut")):
            tally.add(made[name])
            by_source[part.source][name].add(made[name])
        for split, counts in made["splits"].items():
            add_counts(splits[split], counts)
            add_counts(by_source[part.source]["splits"][split], counts)
    for counts in splits.values():  # T + 1 tokens make a row, and rows share their last one
        rows = max(counts["tokens"] - 1, 0) // config.block_size
        counts["tail"] = counts["tokens"] - (rows * config.block_size + 1 if rows else 0)
    about = {"spec": config.tokenizer, "sha256": tokenizer.sha256,
             "vocab_size": tokenizer.vocab_size, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id,
             "engine": tokenizer.engine}
    dialogs = {"by_source": by_source, "source_of": source_of} if chat else {}
    if chat:
        about |= {"base": tokenizer.base, "template": sha256(folder / TEMPLATE_FILE)}
    return {"tokenizer": about, "splits": splits, "block_size": config.block_size,
            "dropped": dropped, "cut": cut, **dialogs, "files": files}


def what_is_lacking(config: Settings, splits: dict) -> str:
    """Say why there is too little for a run, '' if there is enough."""
    tokens = splits["train"]["tokens"]
    if tokens <= config.block_size and config.packing == "concat":
        return (f"its train split has {tokens:,} tokens, fewer than one row of block_size "
                f"{config.block_size} + 1; give more text or lower block_size")
    empty = [split for split in splits if not splits[split]["documents"]]
    if empty and config.documents != "text":
        kind = "client" if config.documents == "table" else "dialog"
        return f"no {kind} is left in its {empty[0]} split; give more, or a greater block_size"
    return ""


def refuse_many_dropped(manifest: dict, most: float) -> None:
    """Raise UserError if rules drop more than `most` of a source's dialogs: then another converter
    is wanted, and not what is left."""
    sources = manifest["recipe"]["sources"]
    for source, made in zip(sources, manifest.get("by_source", ()), strict=False):
        broken = {rule: entry for rule, entry in made["dropped"].items() if rule not in ASKED
                  and not rule.startswith("over max_tokens")}
        lost = sum(entry["count"] for entry in broken.values())
        rows = rows_in(made)
        if lost > most * rows:
            why = "; ".join(f"{entry['count']} {rule} (first {entry['first']})"
                            for rule, entry in broken.items())
            raise UserError(f"sources: {lost} of {rows} rows of {source['path']} are dropped: "
                            f"{why}; mend it by its converter, fields or block_size, or allow "
                            f"it with --max_dropped={math.ceil(100 * lost / rows) / 100:g}")


def rows_in(made: dict) -> int:
    """Count the rows that a source had."""
    return (sum(counts["documents"] for counts in made["splits"].values())
            + sum(entry["count"] for entry in made["dropped"].values()))


def print_sources(folder: Path, manifest: dict) -> None:
    """Print of each source of dialogs what came of its rows, and its share of what is learned in
    an epoch."""
    split = Split(folder, "train", manifest)
    often, count = takes(split), len(manifest["by_source"])
    source_of = split.sources()[::split.together]
    shown = np.bincount(source_of, often * added(split.learned_counts(), split.together), count)
    dialogs = np.bincount(source_of, often, count).tolist()
    print(f"{'source':24}{'rows':>10}{'dropped':>10}{'left out':>10}{'kept':>10}{'tokens':>13}"
          f"{'learned':>12}{'an epoch':>10}{'share':>8}")
    for number, (source, made) in enumerate(zip(manifest["recipe"]["sources"],
                                                manifest["by_source"], strict=True)):
        left = sum(entry["count"] for rule, entry in made["dropped"].items() if rule in ASKED)
        dropped = sum(entry["count"] for entry in made["dropped"].values()) - left
        kept, tokens, targets = (sum(counts.get(key, 0) for counts in made["splits"].values())
                                 for key in ("documents", "tokens", "learned"))
        taken = dialogs[number] / max(1, made["splits"]["train"]["documents"])
        remark = f"  each {taken:.1f} times" if taken > 3 else ""
        remark = f"  {taken:.0%} of it" if taken < 0.5 else remark
        print(f"{source.get('name', source['path'])[-23:]:24}{rows_in(made):>10,}{dropped:>10,}"
              f"{left:>10,}{kept:>10,}{tokens:>13,}{targets:>12,}{int(dialogs[number]):>10,}"
              f"{shown[number] / shown.sum():>8.1%}{remark}")
    print("an epoch: dialogs or pairs that a pass takes; share: of the learned tokens in it")
