"""Sources -> files -> parts: what prepare.py reads, cut so that workers can share it.

Everything here is a function of the sources alone, so that the same bytes come out for any number
of workers and after any interruption.
"""

import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from plainllama.files import content_hash, fingerprint, sha256
from plainllama.settings import UserError, install, nearest
from plainllama.text import embedded_chat, embedded_preference, embedded_table, forms, tables
from plainllama.text import records as kinds
from plainllama.text.clients import FILES, clients_in, clients_pieces
from plainllama.text.cures import for_left
from plainllama.text.dialogs import How
from plainllama.text.documents import Part, grouped
from plainllama.text.records import KINDS, Piece, kind_of, naming_damage, records_of
from plainllama.text.stores import Url, again, is_url, listed, surveyed

KEYS = {"path": str, "column": str, "slice": str, "max_documents": int}  # of a source,
DIALOGS = {"name": str, "converter": str, "fields": dict, "system": str, "count": int,
           "weight": float, "max_tokens": int, "train_on": str}  # of one of dialogs; tables.KEYS
Files = Sequence[tuple[str, Any]]  # a file's label, and its Path or Url
TAKES = {str: "a text", dict: "a dict", int: "a whole number above 0", float: "a number above 0",
         list: "a list", bool: "True or False"}
SPOOLED: list = []  # what comes as no file, as files: kept until the program ends
SPOOLS: dict[str, Callable[[IO[bytes]], None]] = {
    "-": lambda file: shutil.copyfileobj(sys.stdin.buffer, file),
    "embedded:chat": embedded_chat.write_rows,
    "embedded:preference": embedded_preference.write_rows,
    "embedded:table": embedded_table.write_rows}


# ---- sources -> files -> parts

def described(sources: object) -> list[dict]:
    """Read the config key `sources` as a list of dicts. UserError for an item that is none."""
    items: list = list(sources) if isinstance(sources, list | tuple) else [sources]
    items = [{"path": item} if isinstance(item, str) else item for item in items]
    items = [{**item} if isinstance(item, dict) else item for item in items]
    known = KEYS | DIALOGS | tables.KEYS
    for item in items:
        for key in item if isinstance(item, dict) else ():
            if key not in known:
                raise UserError(f"sources: {item!r} has an unknown key {key!r}"
                                f"{nearest(str(key), known)}")
        if not (isinstance(item, dict) and item.get("path")):
            raise UserError(f"sources: {item!r} is not a path, glob, -, hf:NAME, embedded or "
                            "{'path': ..., 'column': ..., 'slice': '10:20', 'max_documents': 5}")
        if not re.fullmatch(r"\d*:\d*", str(item.get("slice", ":"))):
            raise UserError(f"sources: slice of {item['path']} is FROM:TO, not {item['slice']!r}")
        for key, value in item.items():
            kind = known[key]
            number = float(value) if type(value) in (int, float) else math.nan
            fits = kind is object or type(value) is kind or (kind is float and type(value) is int)
            if not fits or (kind in (int, float) and not 0 < number < math.inf):
                raise UserError(f"sources: {key} of {item['path']} takes {TAKES[kind]}, not "
                                f"{value!r}")
        if "columns" in item:  # as JSON gives it back: the codes of words may be numbers
            item["columns"] = json.loads(json.dumps(item["columns"], default=str))
    return items


def check_sources(sources: list[dict], documents: str) -> None:
    """Refuse keys of sources that have no effect on this kind of documents, or none together."""
    idle = {"text": {*DIALOGS, *tables.KEYS}, "table": {*KEYS, *DIALOGS} - {"path"}}.get(
        documents, {"column", *tables.KEYS})
    for source in sources:
        if found := sorted(source.keys() & idle):
            home = "'table'" if found[0] in tables.KEYS else "'chat' and 'preference'"
            raise UserError(f"sources: {found[0]} of {source['path']} " + (
                f"is for documents={home}" if documents == "text" else
                f"has no effect on documents={documents}"))
        if documents == "table":
            tables.settings_of(source)
        how = how_of(source, "assistant", documents)
        if how.train_on not in ("assistant", "last", "all"):
            raise UserError(f"sources: train_on of {source['path']} is assistant, last or all, not "
                            f"{how.train_on!r}")
        own = how.converter not in ("auto", *forms.CONVERTERS)
        if own:
            forms.own_function(how.converter)
            print(f"sources: {source['path']}: its rows go through {how.converter}", flush=True)
        for ours, theirs in how.fields:
            if not (own or ours in forms.FIELDS) or not isinstance(theirs, str):
                raise UserError(f"sources: fields of {source['path']} takes {{our name: yours}}, "
                                f"not {ours!r}: {theirs!r}; ours are {', '.join(forms.FIELDS)}")
        if {"count", "weight"} <= source.keys():
            raise UserError(f"sources: {source['path']} has a count and a weight; give one")
    weighted = sum("weight" in source for source in sources)
    if 0 < weighted < len(sources):
        raise UserError("sources: give all of them a weight, or none; a count is for sources "
                        "without weights")


def how_of(source: dict, train_on: str, documents: str) -> How:
    """Say how the records of a source become `documents`, dialogs or pairs; `train_on`: of those
    that do not say."""
    return How(source.get("converter", "auto"), tuple(source.get("fields", {}).items()),
               source.get("system", ""), source.get("train_on", train_on),
               documents == "preference")


def survey(sources: object, known: Sequence[dict] = (), seen: dict | None = None,
           documents: str = "text", train_on: str = "") -> tuple[list[dict], list[Part]]:
    """Give what the manifest says of the sources, and all their records cut into parts.

    Both are functions of the sources alone; `known` is what an earlier run gave, `seen` what
    content_hash() has found, `train_on` what is learned of dialogs. Raises
    UserError for what cannot be read.
    """
    seen = {} if seen is None else seen
    records: list[dict] = []
    pieces: list[list[Piece]] = []  # by source
    earlier: set[str] = set()  # files
    items = described(sources)
    for i, source in enumerate(items):
        path = source["path"]
        try:
            record, files = files_of(path, known[i] if known else {}, documents)
        except UserError as error:
            given = ",".join(item["path"] for item in items)  # as the command line had it
            one = f"; if {given!r} is one name, write in a config file: sources = [{given!r}]"
            several = len(items) > 1 and path[:3] != "hf:"
            raise UserError(f"{error}{one if several else ''}") from None
        before = known[i]["files"] if known else {}
        ends = path == "embedded" or path.startswith("hf:")  # what the installer has checked
        ends |= any(len(old) == 16 for old in before.values())  # or of an older data set
        noted = {} if path in SPOOLS else seen  # whose file is a new one every time
        prints = {label: file.stamp if isinstance(file, Url) else fingerprint(file) if ends else
                  content_hash(file, noted) for label, file in files}
        real = {os.path.realpath(file) for _, file in files}
        if twice := len(real & earlier):
            print(f"sources: {path}: {twice} of its files belong to an earlier source too")
        earlier |= real
        if path == "embedded":  # a thousand names, as one
            digest = hashlib.blake2b(json.dumps(prints).encode(), digest_size=8).hexdigest()
            prints = {f"{len(files)} files": digest}
        if documents == "table":
            settings = tables.settings_of(source)
            records.append({"path": path, **record, "renderer": tables.hash_of(settings),
                            "files": prints})
            pieces.append(clients_pieces(source, records[-1], [*files], settings))
            continue
        how = None if documents == "text" else how_of(source, train_on, documents)
        own = how.converter.rpartition(":")[0] if how else ""
        code = {"converter": sha256(Path(own))} if own else {}
        records.append({"path": path, **record, "files": prints, **code})
        whole = [whole_file(source, label, file, how) for label, file in files]
        blank = [file.label for file in whole if kinds.is_blank(file.path)]
        if len(blank) == len(files):
            raise UserError(f"sources: {path} is empty")
        if blank and path != "embedded":
            print(f"sources: {path}: {len(blank)} of its files are blank: {', '.join(blank[:5])}")
        taken = [*pieces_of(source, whole)]
        if not taken:
            raise UserError(f"sources: {path} has no record, or its slice and max_documents leave "
                            "none")
        pieces.append(taken)
    if documents == "text":
        return records, parts_of([*itertools.chain.from_iterable(pieces)])
    return records, [replace(part, source=number) for number, own in enumerate(pieces)
                     for part in parts_of(own)]  # of one source each: they are counted by it


def clients(source: dict) -> Iterator[tables.Client]:
    """Read the clients of a source of tables, sorted by client in a folder that goes afterwards."""
    parts = survey(source, documents="table")[1]
    with tempfile.TemporaryDirectory(prefix="plainllama-") as folder:
        for piece in (piece for part in grouped(parts, Path(folder)) for piece in part.pieces):
            yield from clients_in(piece.table, piece.path, lambda *_: None)


def files_of(path: str, known: dict, documents: str) -> tuple[dict, Files]:
    """List a source's files (label, path) in order, and what else the manifest says of it."""
    if path.startswith("hf:"):
        return hub_files(path, known)
    if path in SPOOLS:
        SPOOLED.append(tempfile.NamedTemporaryFile(suffix=".csv"))  # noqa: SIM115
        SPOOLS[path](SPOOLED[-1])
        SPOOLED[-1].flush()
        return {}, [(path, Path(SPOOLED[-1].name))]
    if path == "embedded":
        return {}, embedded_files()
    if is_url(path) and documents == "table":
        raise UserError(f"sources: {path}: tables are sorted from files of this machine; copy it")
    if is_url(path):
        return {}, stored_files(path)
    return {}, local_files(os.path.expanduser(path), FILES if documents == "table" else [*KINDS])


def local_files(path: str, known: Sequence[str]) -> list[tuple[str, Path]]:
    """List (label, path) of a file, or of those of known kinds below a folder, or that a glob
    meets: each real file once. What is not read is printed; UserError if that is all."""
    folder = os.path.isdir(path)
    found = files_below(path) if folder else glob.glob(path, recursive=True)
    found = [path] if os.path.lexists(path) and not folder else found  # whatever its name means
    read: dict[str, str] = {}
    left: Counter = Counter()
    for name in sorted(found, key=os.path.islink):  # a file before the links to it
        if not os.path.exists(name):
            left["links to nothing"] += 1
        elif os.path.isdir(name):  # ** has been in it
            left["links to folders that are read" if folder else "folders"] += "**" not in path
        elif not os.path.isfile(name):
            left["pipes or devices"] += 1
        elif folder and not kind_of(name, known):
            left[Path(name).suffix.lower() or "without an ending"] += 1
        elif read.setdefault(os.path.realpath(name), name) != name:
            left["links to files that are read"] += 1
    say_what_is_left(path, known, read, left)
    root = path if folder else os.path.commonpath(map(os.path.dirname, read.values()))
    return sorted((os.path.relpath(name, root or "."), Path(name)) for name in read.values())


def stored_files(url: str) -> list[tuple[str, Url]]:
    """List (label, address) of an object, or of those of known kinds below a folder of a store, or
    that a glob meets."""
    store, found, folder = listed(url)
    read = {label: name for label, name in found.items() if kind_of(label) or not folder}
    say_what_is_left(url, [*KINDS], read, Counter(
        Path(label).suffix.lower() or "without an ending" for label in found.keys() - read.keys()))
    return [(label, surveyed(store, name)) for label, name in sorted(read.items())]


def say_what_is_left(path: str, known: Sequence[str], read: dict, left: Counter) -> None:
    """Print what of a source is not read; UserError if that is all."""
    said = for_left(path, left)
    if not read:
        raise UserError(f"sources: {path} is no file, and no glob or folder with a file of a known "
                        f"kind ({', '.join(known)}){f'; it has {said}' if said else ''}")
    if said:
        print(f"sources: {path}: not read: {said}", flush=True)


def files_below(folder: str) -> list[str]:
    """List what is no folder below one, hidden files left out; linked folders are gone into, and
    listed where they were seen before. OSError for a folder that cannot be read."""
    seen, found = set(), []
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(place) in seen:
            folders[:], names = [], [""]  # the place itself, for what is said of it
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [os.path.join(place, name) for name in sorted(names) if name[:1] != "."]
    return found


def fail(error: OSError) -> None:
    """Raise what os.walk() would pass over."""
    raise error


def embedded_files() -> list[tuple[str, Path]]:
    """List the Python files of the installed packages, without their tests."""
    specs = (importlib.util.find_spec(name) for name in ("mpmath", "networkx", "sympy"))
    roots = [Path(str(spec.origin)).parent for spec in specs if spec]
    files = [(path.relative_to(root.parent).as_posix(), path)
             for root in roots for path in root.rglob("*.py")]
    return sorted((label, path) for label, path in files
                  if not {"tests", "benchmarks"} & set(label.split("/")))


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
            revision = again(path, hub.HfApi().dataset_info, name, revision=revision,
                             timeout=20).sha
            splits = datasets.load_dataset_builder(name, revision=revision).config.data_files or {}
            if split not in splits:
                raise UserError(f"{path}: no split {split!r}; there are {', '.join(splits)}")
            known = {"files": [str(url).partition(f"@{revision}/")[2] for url in splits[split]]}
        files = []
        for number, label in enumerate(sorted(known["files"]), 1):
            print(f"{path}: file {number} of {len(known['files'])}, {label}", flush=True)
            file = again(path, hub.hf_hub_download, name, label, repo_type="dataset",
                         revision=revision, etag_timeout=20)
            files.append((label, Path(file)))
        return {"revision": revision}, files
    except ImportError as error:
        raise UserError(f"{path}: {error}; {install('data')}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the two libraries and the network raise
        listed = "; its files: " + ", ".join(known["files"])[:200] if known else ""
        raise UserError(f"{path}: {type(error).__name__}: {str(error)[:300]}. Try again: what is "
                        f"downloaded stays. Offline: copy the files of datasets/{name} into a "
                        f"folder and say --sources=PATH{listed}") from None


def whole_file(source: dict, label: str, path: Any, how: How | None) -> Piece:
    """Describe a file of a source. UserError if its kind is unknown, or holds no dialogs and shall
    (`how`)."""
    kind = ".txt" if source["path"] == "embedded" else kinds.kind_named(label)
    if source["path"] in SPOOLS:
        begin = path.open("rb").read(1 << 16).lstrip()[:1]
        kind = {b"{": ".jsonl", b"[": ".json" if how else ".txt"}.get(begin, ".txt")
    if not kind:
        raise kinds.unknown(str(path))
    if how and kind == ".txt":
        raise UserError(f"{path}: dialogs are rows of {', '.join(kinds.OF_ROWS)}, not plain text")
    size = path.size if isinstance(path, Url) else path.stat().st_size
    path = path if isinstance(path, Url) else str(path)
    size *= kinds.packing_of(path).growth
    return Piece(path, label, kind, source.get("column", "text"), size, how=how)


def pieces_of(source: dict, files: list[Piece]) -> Iterator[Piece]:
    """Cut files into the smallest pieces worth a worker's while, of the records that are taken."""
    first, stop = source.get("slice", ":").split(":")
    first, stop = int(first or 0), int(stop or sys.maxsize)
    stop = min(stop, first + source.get("max_documents", sys.maxsize))
    # a packed file has few pieces, because each is reached by unpacking what is before it
    few = min(4, max(1, 8 // len(files)))
    seen = 0  # records before a piece
    for file in files:
        with naming_damage(file.path):
            for piece in KINDS[file.kind].pieces(file, few):
                if stop < sys.maxsize or first > seen:
                    records = itertools.islice(records_of(piece), max(0, stop - seen))
                    count = sum(1 for _ in records)
                    skip = min(count, max(0, first - seen))
                    piece = replace(piece, skip=skip, take=count)
                    seen += count
                if piece.skip < piece.take:
                    yield piece


def parts_of(pieces: list[Piece]) -> list[Part]:
    """Join pieces to parts of about PART bytes of text; small corpora have several too."""
    target = min(kinds.PART, max(64 << 10, sum(piece.size for piece in pieces) // 12))
    parts, size = [Part([])], 0
    for piece in pieces:
        size += piece.size
        if size > target and parts[-1].pieces:
            parts.append(Part([]))
            size = piece.size
        parts[-1].pieces.append(piece)
    return parts
