"""Turn text into a data set that can be trusted: sources -> documents -> tokens -> data/NAME/.

  prepare.py [CONFIG] [--key=value ...]   the sources of CONFIG, or of config/llama100m.py; other
                                          --sources are another data set: give --dataset=NAME
  prepare.py CONFIG --ray[=HOST:PORT]     the same by all nodes of a Ray cluster, which share this
                                          folder; without an address the cluster of $RAY_ADDRESS,
                                          or this machine as one
  prepare.py --verify data/NAME           check every byte: exit 0 good, 1 damaged, 2 not a data set
  prepare.py --inspect data/NAME          what it holds, and how its documents begin

A source (--sources=A,B or `sources` in the config) is
  PATH        a file, a folder or a glob of .txt (the file is one document), .jsonl (a line is
              one), .json (an object of its array is one) and .parquet (a row is one); all but the
              last also as .gz, .xz or .zst; .md, where it is named, is read as .txt
  -           standard input: JSON lines if it begins with {, else one document
  URL         the same in a store that fsspec knows, read by ranges: s3://bucket/dir, gs://...,
              https://host/a.jsonl.gz (its package is named if it is missing); no tables
  hf:NAME[@REVISION][:SPLIT]   a data set of the Hugging Face hub; split train unless it is named
  embedded    the Python files of the installed sympy, networkx and mpmath; embedded:chat: dialogs
  a dict      {'path': one of these, 'column': 'text', 'slice': '100:200', 'max_documents': 50};
              slice and max_documents count lines, rows or files in their order

With --documents=chat a record is a dialog: messages, conversations of from and value, instruction
and output, prompt and response, with tools where there are any; one that breaks a rule is dropped
and counted, and more than --max_dropped of a source is an error. A dict may then say 'converter' (a
form by its name, or FILE.py:function of your own, which is run: it takes a record and gives one in
such a form, or its messages, or None), 'fields' ({'prompt': 'question'}), 'system', 'train_on',
'max_tokens', 'name' and 'count' of dialogs an epoch or 'weight' by learned tokens.

With --documents=table a document is a client with its transactions; a source is then a dict
{'path': .csv or .parquet, 'id': COLUMN, 'time': COLUMN, 'columns': [COLUMN or {'column': COLUMN,
'name': NAME or several, 'unit': 'EUR', 'decimals': 2, 'words': {code: word} or a file}], 'format':
'plain', 'yaml', 'json', 'html', 'markdown', 'sql', 'grouped' or several}, also with 'group',
'shuffle', 'seed', 'time_format' and 'decimal' (',' before decimals).

A document is held out for validation by the hash of its text. If none is, the one with the smallest
hash is; a single document, or each of a few long ones, gives its end. A document over 16 MB becomes
several, cut before a space. Off unless asked: --min_chars and --max_chars; --dedup=exact keeps the
first of equal documents, near also the first of those that share most runs of three words; --strict
stops at a record that cannot be read, which else is only counted. After an interruption the same
command goes on with what is missing. The bytes are the same for any number of workers and nodes.
"""

import sys
from dataclasses import dataclass, replace

from plainllama.cluster import HERE, Cluster
from plainllama.command import CommandLine, complain, parse_arguments, run_command
from plainllama.settings import (
    Incomplete,
    Settings,
    UserError,
    ceil_div,
    deciding,
    key,
    settle_documents,
)


@dataclass
class Flags:
    """What prepare.py takes beside a config."""

    ray: str = key("", "the address of a Ray cluster whose nodes do the work", bare=HERE)
    verify: str = key("", "check every byte of the data set in this folder")
    inspect: str = key("", "show what the data set in this folder holds")
    show: int = key(0, "print so many dialogs or clients of the set, what is learned marked", low=0)


# what of a config is read here; of other keys it only says that they are train.py's
READS = (*deciding("recipe", "prepare"), "dataset", "block_size", "init_from")


if __name__ == "__main__":  # --help and a misspelt key are answered before anything slow is loaded
    LOOKS = any(word.startswith(("--verify", "--inspect")) for word in sys.argv[1:])
    COMMAND = parse_arguments(__doc__, Flags, "files" if LOOKS else "config", reads=READS)

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np

from plainllama.files import read_json, state_of, write_json
from plainllama.text import selection
from plainllama.text.documents import Part, Rules, grouped
from plainllama.text.sources import check_sources, described, survey
from plainllama.text.stores import look_at
from plainllama.text.workers import NOTES, Nodes, Processes
from plainllama.tokens import advice, shards
from plainllama.tokens.newest import refuse_divided
from plainllama.tokens.parts import (
    choose_tokenizer,
    for_documents,
    make_shards,
    merged,
    note_beginning,
    print_sources,
    refuse_many_dropped,
    what_is_lacking,
)
from plainllama.tokens.rows import takes
from plainllama.tokens.shards import SEEN, files_in
from plainllama.tokens.templates import chat_of
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer

RECIPE = deciding("recipe")
LOOKED_AT = 500  # files that each node of a cluster shall see


def main(command: CommandLine) -> int:
    """Prepare, verify or inspect."""
    look: Flags = command.flags  # type: ignore[assignment]
    if look.verify or look.inspect:
        return verify(Path(look.verify)) if look.verify else inspect(Path(look.inspect))
    config = command.config
    settle_documents(config)
    if not re.fullmatch(r"\w[\w.+-]*", config.dataset):
        raise UserError(f"dataset {config.dataset!r} is not the name of a folder under data/")
    given = command.overrides
    named = command.given if command.files else given
    if "sources" in named and "dataset" not in named:
        raise UserError(f"sources without a dataset would be {config.dataset}, with the tokenizer "
                        f"{config.tokenizer}; add --dataset=NAME, best also config/quickstart.py")
    if look.ray and "workers" in given:
        raise UserError("--workers counts processes of this machine, and --ray takes all places of "
                        "a cluster; leave one out")
    if not command.files and "sources" not in given:
        print(f"its text is {config.sources}; for your own: python prepare.py config/quickstart.py "
              "--dataset=mine --sources=my.txt", flush=True)
    for_train = {key: given[key] for key in given if key not in deciding("recipe", "prepare")}
    idle = for_train.keys() - set(READS)
    if idle:
        print(f"no effect here, but on train.py: {', '.join(sorted(idle))}")
    if look.show and config.documents == "text":
        raise UserError("--show is for dialogs and tables: --documents=chat; text is shown by "
                        "--inspect")
    if config.init_from and config.documents != "text":
        from plainllama.training.resume import inherit  # here, since it loads torch

        model, remarks = inherit(command, ("block_size",))
        lacking = f"note: init_from={config.init_from} holds no model yet"
        for remark in remarks if model else [lacking]:
            print(remark)
    new = not (Path("data") / config.dataset / "manifest.json").exists()
    with held(Path("data") / config.dataset) as folder, contextlib.ExitStack() as stack:
        crew: Processes | Nodes = Processes(config.workers)
        if look.ray:
            crew = Nodes(stack.enter_context(Cluster(look.ray)))
        try:
            prepare(config, folder, crew)
        except BrokenProcessPool:
            return complain("a worker process was killed (out of memory? take fewer --workers); "
                            "the same command goes on from the finished parts", 1)
    manifest = shards.read_manifest(folder)
    if look.show:
        show(folder, manifest, look.show)
    if "dataset" in given:
        for_train = {"out_dir": f"out/{config.dataset}"} | for_train
    if remark := advice.small(config, manifest["splits"]):
        print(remark)
    file, better = advice.suited(config, command.config_file, given, manifest["splits"])
    if new or file:  # to see a set again takes no time
        for line in advice.outlook(config, command.config_file, given, file, better,
                                   manifest["splits"], manifest["tokenizer"]["vocab_size"]):
            print(line)
    if file and file != command.config_file:  # which names another set
        for_train = {"dataset": config.dataset, "out_dir": f"out/{config.dataset}"} | for_train
    words = [f"--{key}={value}" for key, value in [*sorted(for_train.items()), *better.items()]]
    files = [file] if file else command.files
    held_out = manifest["splits"]["val"]["tokens"]  # too little to train on was refused before
    if config.packing == "concat" and held_out <= config.block_size:
        print(f"no run yet: its val split is shorter than a row of block_size {config.block_size} "
              "+ 1 tokens; give more text, a larger --val_fraction or a smaller --block_size")
    else:
        print("next:", shlex.join(["python", "train.py", *files, *words]))
    return 0


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Make the folder and lock it."""
    for path in (folder.parent, folder):
        shards.refuse_a_file(path)
    new = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_NB | fcntl.LOCK_EX)  # on the folder: it dies with its owner
        yield folder
    except BlockingIOError:
        new = []
        raise UserError(f"{folder}: another prepare.py is at work in it; wait for it, or take "
                        "another --dataset name") from None
    finally:
        os.close(handle)
        for path in new:  # nothing was begun: leave nothing behind
            with contextlib.suppress(OSError):
                path.rmdir()


# ---- the steps

def prepare(config: Settings, folder: Path, crew: Processes | Nodes) -> None:
    """Make the data set, or what is missing of it."""
    recipe = {key: getattr(config, key) for key in RECIPE}
    recipe["sources"] = described(config.sources)
    check_sources(recipe["sources"], config.documents)
    if config.documents != "text":
        recipe["block_size"] = config.block_size  # to which they are cut
    complete = (folder / "manifest.json").exists()
    state = shards.read_manifest(folder) if complete else unfinished(folder)
    selection.check_dedup(config.dedup)
    refuse_another_recipe(folder, recipe, state)
    seen = read_json(folder / SEEN, tolerant=True)
    records, parts = what_is_there(folder, recipe, state, complete, seen)
    if complete:
        with contextlib.suppress(OSError):  # of a folder that may only be read
            write_json(folder / SEEN, seen)
    else:
        begun = {"recipe": recipe, "source": records}
        state = begun | make_parts(config, folder, crew, begun, parts, seen)
    refuse_many_dropped(state, config.max_dropped)
    if lacking := what_is_lacking(config, state["splits"]):
        if not complete:  # nothing of it stays: else more text would be another source
            shutil.rmtree(folder / NOTES)
            for path in files_in(folder):
                path.unlink()
        raise UserError(f"{folder}: {lacking}")
    if "by_source" in state:
        takes(shards.Split(folder, "train", state))  # refuses a source of which nothing is left
    if config.documents == "table" and len(recipe["sources"]) > 1:
        refuse_divided(folder, state)
    if not complete:
        shards.write_manifest(folder, state)
    shutil.rmtree(folder / NOTES, ignore_errors=True)
    print(f"{folder}: {'already prepared' if complete else 'complete'}")
    advice.print_counts(state)
    if "by_source" in state:
        print_sources(folder, state)


def unfinished(folder: Path) -> dict:
    """Read what an interrupted run noted, {} if there was none; refuse a folder of others."""
    ours = (rf"{NOTES}|{SEEN}|tokenizer\.json|manifest\.(sha256|.*\.tmp)"
            r"|chat_template\.jinja|(train|val)-\d{5}\.(bin|idx|mask|num|ids)")
    begun = read_json(folder / NOTES / "state.json")
    foreign = [path.name for path in files_in(folder)
               if not re.fullmatch(ours if begun else NOTES, path.name)]
    if foreign:
        raise UserError(f"{folder} holds files of somebody else ({', '.join(foreign[:3])}); take "
                        "another --dataset name or move them away")
    return begun


def refuse_another_recipe(folder: Path, recipe: dict, state: dict) -> None:
    """Refuse to go on with what was prepared otherwise."""
    # block_size is part of the recipe of dialogs alone
    old = {key: getattr(Settings, key, None) for key in recipe} | {"train_on": "assistant"}
    old |= state.get("recipe", recipe)
    differs = [f"{key} was {old[key]!r}, is now {recipe[key]!r}"
               for key in recipe if old[key] != recipe[key]]
    begun = (folder / "tokenizer.json").exists() and Path(recipe["tokenizer"]).exists()
    if not differs and begun:
        was = Tokenizer.load(folder)
        now = for_documents(recipe, make_tokenizer(recipe["tokenizer"]))
        if (was.sha256, was.template) != (now.sha256, now.template):
            differs = ["the tokenizer's file has changed"]
    if differs:
        raise UserError(f"{folder} was prepared with another recipe: {'; '.join(differs)}; take "
                        "another --dataset=NAME or remove it")


def what_is_there(folder: Path, recipe: dict, state: dict, complete: bool,
                  seen: dict) -> tuple[list[dict], list[Part]]:
    """Survey the sources; refuse those that held something else when `state` was noted."""
    known, sources = state.get("source", []), recipe["sources"]
    if complete and all(source["path"].startswith("hf:") for source in sources):
        return known, []
    try:
        records, parts = survey(sources, known, seen, recipe["documents"], recipe["train_on"])
    except (UserError, Incomplete):
        if complete:  # the source has gone, and what was made of it still stands
            return known, []
        raise
    for was, now in zip(known, records, strict=False):
        if was != now:
            other = sorted({name for name, _ in was["files"].items() ^ now["files"].items()})
            raise UserError(f"{folder} was prepared when {now['path']} held something else "
                            f"({', '.join(other[:3]) or 'its converter'}); take another "
                            "--dataset=NAME or remove it")
    return records, parts


def make_parts(config: Settings, folder: Path, crew: Processes | Nodes, begun: dict,
               parts: list[Part], seen: dict) -> dict:
    """Make the parts that are missing; return the rest of the manifest."""
    rules = Rules(config.strict, config.min_chars, config.max_chars)
    parts = [replace(part, rules=rules) for part in parts]
    if config.documents == "table":
        (folder / NOTES).mkdir(exist_ok=True)
        parts = grouped(parts, folder / NOTES, config.strict, config.max_dropped)
    choose = partial(selection.choose_hold_out, fraction=config.val_fraction,
                     whole=config.documents != "text")
    hold_out = choose(parts)
    tokenizer = choose_tokenizer(config, folder, parts)
    noted = read_json(folder / NOTES / "state.json", tolerant=True)
    tokenizer.base = tokenizer.base or noted.get("base", "")
    note_beginning(folder, begun | ({"base": tokenizer.base} if tokenizer.base else {}), seen,
                   tokenizer)
    files = {path for part in parts for piece in part.pieces for path in (
        [path for _, path in piece.table.files] if piece.table else [piece.path])}
    if isinstance(crew, Nodes):
        read = {piece.path for part in parts for piece in part.pieces}
        crew.cluster.check(folder, sorted(read)[::ceil_div(len(read), LOOKED_AT)], look_at)
    if config.dedup != "none":
        selection.mark_parts(folder, parts, config.dedup, crew)
        parts = selection.without_repeats(folder, parts, config.dedup, crew)
        hold_out = choose(parts)
    make_shards(config, folder, parts, crew, hold_out, tokenizer)
    changed = sorted(path for path in files & seen.keys() if state_of(path) != seen[path][:3])
    if changed:
        raise UserError(f"{', '.join(changed[:3])} changed while it was read; remove {folder} and "
                        "start again")
    return merged(folder, parts, config, tokenizer)


# ---- what there is

def show(folder: Path, manifest: dict, count: int) -> None:
    """Print some dialogs of a set, of its sources in turn, from all over each, as tokens, what is
    learned of them coloured; or some clients as text."""
    split, tokenizer = shards.Split(folder, "train", manifest), Tokenizer.load(folder)
    if not split.masked:
        names, ends = split.clients(), split.bounds().tolist()
        for i in np.random.default_rng(0).permutation(split.documents)[:count].tolist():
            print(f"--- {names[i]}, {ends[i + 1] - ends[i]:,} tokens")
            print(tokenizer.decode(split.read(ends[i], ends[i + 1])))
        return
    chat = chat_of(tokenizer)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    draw, bounds, together = np.random.default_rng(0), split.bounds(), split.together
    source_of = split.sources()[::together]
    own = [draw.permutation(np.flatnonzero(source_of == number))[:count]
           for number in range(source_of.max() + 1)]
    for i in [i for turn in zip_longest(*own) for i in turn if i is not None][:count]:
        source = manifest["recipe"]["sources"][source_of[i]]
        print("---", source.get("name", source["path"]))
        sides = pairwise(bounds[i * together:(i + 1) * together + 1].tolist())
        for side, (first, last) in zip(("chosen: ", "rejected: "), sides, strict=False):
            print(side if together == 2 else "", end="")
            print(chat.show(split.read(first, last), split.read_mask(first, last), colour))


def verify(folder: Path) -> int:
    """Check every byte of a data set; the exit code."""
    code, problems = shards.verify(folder)
    for problem in problems:
        complain(problem, code)
    if not code:
        manifest = shards.read_manifest(folder)
        counts = [f"{split} {n['tokens']:,} tokens" for split, n in manifest["splits"].items()]
        print(f"{folder}: ok, {len(manifest['files'])} files, {', '.join(counts)}")
    return code


def inspect(folder: Path) -> int:
    """Show what a data set holds and how a few documents begin."""
    manifest, tokenizer = shards.read_manifest(folder), Tokenizer.load(folder)
    for name in ("recipe", "source", "tokenizer"):
        print(f"{name}: {json.dumps(manifest[name])[:1000]}")
    advice.print_counts(manifest)
    for split in (shards.Split(folder, name, manifest) for name in ("train", "val")):
        for start, end in pairwise(split.bounds()[:4].tolist()):
            ids = split.read(start, min(end, start + 64))
            text = tokenizer.decode(ids).strip()
            if split.masked:
                text = chat_of(tokenizer).show(ids, split.read_mask(start, start + len(ids)), False)
            print(f"{split.split}, {end - start:,} tokens: {text.partition(chr(10))[0]}")
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
