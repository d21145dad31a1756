"""Files of prompts: read, kept safe while they are worked on, and written with what was made.

A row is an object of JSON, a line of text or a row of parquet. OUT appears whole; until then what
is done stands in OUT.part-RANK, so that a kill loses no row and no row is done twice. What made it
stands in OUT.made.json.
"""

import base64
import glob
import importlib.util
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from plainllama import files
from plainllama.generation import rewriting
from plainllama.settings import UserError, install
from plainllama.text.records import naming_damage, without_nulls
from plainllama.tokens import shards
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.training.log import git_state, versions
from plainllama.weights import peft

# flags without a say in what is made; the content of the model and of the files has one
NO_MATTER = {"ckpt", "base", "prompt", "prompts", "out", "batch", "save", "device", "compile",
             "chat", "tools", "template", "serve", "host", "port", "queue", "cors",
             "ray"}


# ---- read

def read_file(path: Path, column: str) -> tuple[list[dict], Any]:
    """Read the rows of a file and, of a .parquet, the pyarrow.Table. In a .txt, each line is the
    `column` of a row, an empty one too; of any other kind, each is an object of JSON. UserError for
    the first line that is not."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet as pq

        with naming_damage(str(path)):
            table = pq.read_table(path)
        return table.to_pylist(), table
    is_text = kind == ".txt"
    data = path.read_bytes() if is_text else path.read_bytes().rstrip()
    rows = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        try:
            text = line.decode("utf-8-sig")
            row = {column: text.removesuffix("\r")} if is_text else json.loads(text)
            rows.append({**row})  # a TypeError if it is no object
        except (ValueError, TypeError, RecursionError) as error:
            what = "text" if is_text else "a JSON object"
            raise UserError(f"{path}:{number} is not {what}: {error}") from None
    return rows, None


# ---- write

def as_line(row: dict) -> bytes:
    """Write a row as a line of JSON; half a surrogate pair, which UTF-8 lacks, stays the \\udXXX of
    JSON."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


class Prompts(NamedTuple):
    """The rows to work on; of a .parquet also as a table, which has their types. And whether there
    is an --out already."""

    rows: list[dict]
    table: Any = None
    complete: bool = False
    id: str = ""  # the column that is kept alone beside the states' own
    ids: tuple = ()  # of a prepared set: the ids of each client's text, as they are stored
    manifest: dict | None = None  # of that set
    template: list[str] | None = None  # what each row makes its prompt of

    def text(self, row: dict, column: str) -> str:
        """Give the prompt of a row as text, '' of a talk that has none."""
        return rewriting.fill(self.template, row) if self.template else row.get(column) or ""

    def talks(self, column: str, tuned: bool = True) -> list[dict | None]:
        """Give the rows that are messages to be answered, without the keys that a table adds, and
        None for those with a text in `column`. A model that is `tuned` on dialogs is asked what a
        row makes of a template."""
        if self.ids or (self.template and not tuned):
            return [None] * len(self.rows)
        if self.template:
            return [{"messages": [{"role": "user", "content": self.text(row, column)}]}
                    for row in self.rows]
        known = dict if self.table is None else without_nulls
        return [None if isinstance(row.get(column), str) else known(row) for row in self.rows]

    def write_to(self, file: Any, kind: str, made: list[dict]) -> None:
        """Write the rows with what was made of each: as a table, embeddings as lists of fp32 and
        messages, whose calls have fields of their own, as JSON; or as lines of JSON."""
        if kind.lower() != ".parquet":
            file.writelines(as_line(row | new) for row, new in zip(self.rows, made, strict=True))
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = self.table
        if self.id:
            ids = [row[self.id] for row in self.rows]
            pq.write_table(with_ids(self.id, ids, [new["embedding"] for new in made if new]), file)
            return
        if table is None:
            names = dict.fromkeys(name for row in self.rows for name in row)
            table = pa.table({name: column_of([row.get(name) for row in self.rows])
                              for name in names})
        for name in dict.fromkeys(name for new in made for name in new):
            column: Any = [new.get(name) for new in made]
            if name == "embedding":
                states = unpacked(column)
                column = pa.FixedSizeListArray.from_arrays(states.ravel(), states.shape[1])
            elif name == "message":
                column = [each and json.dumps(each, ensure_ascii=False) for each in column]
            elif name in ("lost", "added"):  # all of them may be empty
                column = pa.array(column, pa.list_(pa.string()))
            table = table.append_column(name, pa.array(column))
        pq.write_table(table, file)


def with_ids(name: str, ids: list, states: list[str]) -> Any:
    """Make a table of ids and the numbers of their packed states, emb_0001, emb_0002, ..."""
    import pyarrow as pa

    numbers = unpacked(states).T if states else ()
    columns = {f"emb_{i:04d}": np.ascontiguousarray(one) for i, one in enumerate(numbers, 1)}
    return pa.table({name: ids, **columns})


def column_of(values: list) -> Any:
    """Make a column of a table; one of objects that would get each other's keys is JSON text."""
    import pyarrow as pa

    column = pa.array(values)
    if pa.types.is_nested(column.type) and column.to_pylist() != values:
        return [None if value is None else json.dumps(value) for value in values]
    return column


def read_prompts(f: Any) -> Prompts:
    """Read the rows of --prompts, or make one of --prompt, each --num_samples times. UserError if
    --out cannot take them with what is added to them."""
    if not f.prompts:
        return Prompts([{f.column: f.prompt}] * f.num_samples)
    path, out, column, copies = Path(f.prompts), Path(f.out), f.column, f.num_samples
    if path.is_dir() and not f.template:
        return read_set(f)
    if f.id and copies > 1:
        raise UserError("--num_samples makes several rows of an id; leave one of them out")
    added = {"completion", "stop", "message"} if f.embed == "none" else {"embedding"}
    added |= {"sample"} if copies > 1 else set()
    added |= rewriting.ADDED if f.template else set()
    kinds = path.suffix.lower(), out.suffix.lower()
    if kinds[1] not in (".jsonl", ".parquet", ""):
        raise UserError(f"--out takes a .jsonl or .parquet, not a {kinds[1]}")
    if ".parquet" in kinds and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"a .parquet needs pyarrow: {install('data')}")
    template = rewriting.read_template(f.template) if f.template else None
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"no file {path}; --prompts takes a .jsonl, .txt or .parquet file, or a "
                        "set of tables, data/NAME")
    rows, table = (read_clients(path), None) if path.is_dir() else read_file(path, column)
    for number, row in enumerate(rows, 1):
        if template:
            rewriting.check_fields(template, row, f"{path}:{number}")
        elif not isinstance(row.get(column), str) and row.get("messages") is None:
            raise UserError(f"{path}:{number} has no text in a column `{column}`; its columns are: "
                            f"{', '.join(row) or 'none'} (--column names another; or `messages`)")
        if taken := added & set(row):
            raise UserError(f"{path}:{number}: `{min(taken)}` would be overwritten; rename it")
    if not rows:
        raise UserError(f"{path} has no rows")
    if f.id and f.embed != "none":
        check_ids(path, [row.get(f.id) for row in rows], f.id)
    other = os.path.lexists(out) and not out.is_file()  # it would be replaced by a file
    if other or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} is not a file in a folder that exists")
    try:  # what would fail after hours fails now
        if table is not None:
            table = table.take([i // copies for i in range(len(rows) * copies)])
        prompts = Prompts([row for row in rows for _ in range(copies)], table, out.exists(),
                          f.id if f.embed != "none" else "", template=template)
        with open(os.devnull, "wb") as nowhere:
            prompts.write_to(nowhere, out.suffix, [{}] * len(prompts.rows))
    except (ValueError, TypeError, ArithmeticError, NotImplementedError) as error:
        raise UserError(f"{path}: its rows do not fit into {out}: {error}; change --out") from None
    return prompts


def read_set(f: Any) -> Prompts:
    """Read the clients of a prepared set of tables, as training reads them but for the end token.
    UserError for another set, or where not their states are asked for."""
    folder = Path(f.prompts)
    manifest = manifest_of(folder, f.embed != "none" and f.num_samples == 1)
    if Path(f.out).is_dir() or not Path(f.out).absolute().parent.is_dir():
        raise UserError(f"--out {f.out} is not a file in a folder that exists")
    name, eos = manifest["recipe"]["sources"][0]["id"], manifest["tokenizer"]["eos"]
    if f.id not in ("", name):
        raise UserError(f"--id={f.id}: the clients of {folder} go by {name}; leave --id out")
    rows, ids = [], []
    for _, client, stored in clients_of(folder, manifest):
        rows.append({name: client})
        ids.append(stored[:-1] if stored[-1] == eos else stored)
    check_ids(folder, [row[name] for row in rows], name)
    return Prompts(rows, None, Path(f.out).exists(), name, tuple(ids), manifest)


def read_clients(folder: Path) -> list[dict]:
    """Read the clients of a prepared set of tables as rows of text, for --template."""
    manifest, tokenizer = manifest_of(folder, True), Tokenizer.load(folder)
    return [{"id": client, "split": split, "text": tokenizer.decode(ids)}
            for split, client, ids in clients_of(folder, manifest)]


def manifest_of(folder: Path, sound: bool) -> dict:
    """Read the manifest of a set of tables. UserError for another, or if what is asked of it is not
    `sound`."""
    manifest = shards.read_manifest(folder)
    if manifest["recipe"].get("documents") != "table" or not sound:
        raise UserError(f"--prompts={folder} is a data set; what can be made of one is --embed, "
                        "once for each client, or --template, of a set of tables (documents=table)")
    return manifest


def clients_of(folder: Path, manifest: dict) -> Iterator[tuple[str, str, list[int]]]:
    """Give of each client its split, its id and its text as ids."""
    for split in (shards.Split(folder, part, manifest) for part in ("train", "val")):
        for client, (start, end) in zip(split.clients(), pairwise(split.bounds().tolist()),
                                        strict=True):
            yield split.split, client, split.read(start, end).tolist()


def refuse_other_set(prompts: Prompts, sha256: str, run: Path | None, block_size: int) -> None:
    """Refuse a prepared set that is not written as the model of `run` has learned to read: by
    another tokenizer than that of this hash, or by another renderer. Say where clients were cut to
    less than its `block_size`."""
    manifest = prompts.manifest or {}
    room = manifest["recipe"]["block_size"]
    if room < block_size and f"clients to block_size {room}" in manifest["cut"]:
        print(f"note: the set's clients are cut to {room} tokens, and the model reads "
              f"{block_size}; prepare it with that block_size to keep more of them")
    if manifest["tokenizer"]["sha256"] != sha256:
        raise UserError("--prompts is a set of another tokenizer than the model's; prepare it with "
                        "--tokenizer=data/SET/tokenizer.json of the set that the model learned")
    info = files.read_json(run / "run.json", tolerant=True) if run else {}
    known = set(info.get("data", {}).get("renderers", ()))
    if not known:
        print("note: the model's run names no renderer of tables, so that nothing says whether it "
              "has learned to read this set")
    elif not {source["renderer"] for source in manifest["source"]} <= known:
        raise UserError("--prompts is a set whose tables are written otherwise than those that the "
                        "model learned (columns, names, words, formats, ...); prepare it with the "
                        "same sources but for the path")


def check_ids(path: Path, ids: list, name: str) -> None:
    """Raise UserError for the first row without an id of its own."""
    seen: dict[Any, int] = {}
    for number, one in enumerate(ids, 1):
        if not isinstance(one, str | int) or isinstance(one, bool) or one == "":
            raise UserError(f"{path}:{number} has no id in a column `{name}`: a text or a whole "
                            "number (--id names another)")
        if one in seen:
            raise UserError(f"{path}:{number}: {name} {one} is that of row {seen[one]} too; an id "
                            "has one row")
        seen[one] = number


# ---- what is done

def pack(state: torch.Tensor) -> str:
    """Write a state, fp32 (C,), as a text that JSON can hold, to the bit."""
    return base64.b64encode(state.numpy().astype("<f4").tobytes()).decode()


def unpacked(column: list[str]) -> np.ndarray:
    """Read what pack() wrote, fp32 (rows, C)."""
    states = np.frombuffer(b"".join(map(base64.b64decode, column)), "<f4")
    return states.reshape(len(column), -1)


class Journal:
    """OUT.part-RANK: what this batch is made with, then a line for every row as it is done. All
    parts together, of however many ranks and starts, are what need not be done again."""

    def __init__(self, f: Any, folder: Path, dtype: torch.dtype = torch.float32):
        """`recipe`: what decides the texts of a batch. `f`: the flags, `folder`: the model, `dtype`
        that of its matmuls."""
        self.out, self.note = Path(f.out), Path(f"{f.out}.made.json")
        self.recipe = {"sha256 of the model": peft.model_sha256(folder, f.base)[:16],
                       "sha256 of --prompts": files.sha256(
                           Path(f.prompts, "manifest.json") if Path(f.prompts).is_dir()
                           else Path(f.prompts))[:16],
                       "sha256 of --tools": files.sha256(Path(f.tools))[:16] if f.tools else "",
                       **({"sha256 of --template": files.sha256(Path(f.template))[:16]}
                          if f.template else {}),
                       **{key: value for key, value in vars(f).items() if key not in NO_MATTER},
                       "dtype": str(dtype).removeprefix("torch.")}

    def other(self, recipe: dict) -> str:
        """Say in what another recipe differs from this one, '' if it does not."""
        return next((f"{name}={recipe.get(name, '')}, now it is {self.recipe.get(name, '')}"
                     for name in self.recipe | recipe
                     if recipe.get(name, "") != self.recipe.get(name, "")), "")

    def parts(self) -> list[Path]:
        """List the files there are."""
        return sorted(self.out.parent.glob(glob.escape(self.out.name) + ".part-*"))

    def read(self) -> dict[int, dict]:
        """Return {row: what was made of it}, of all parts, and cut off a line that a kill left half
        written. UserError if a part, or an --out that is there, was made in another way."""
        if self.out.exists():
            note = {"recipe": {}} | files.read_json(self.note, tolerant=True)
            known = note.get("file") == files.file_entry(self.out)
            how = self.other(note["recipe"]) if known else "it is other work, or changed since"
            if how:
                raise UserError(f"{self.out} exists and was not made from this: {how}; rename it")
        made: dict[int, dict] = {}
        for part in self.parts():
            with open(part, "r+b") as file:
                files.hold(file, f"another process is writing {self.out}")
                file.truncate(file.read().rfind(b"\n") + 1)
            recipe, *rows = files.read_rows(part) or [self.recipe]
            if how := self.other(recipe):
                raise UserError(f"{self.out} was begun with {how}; say that again or delete {part}")
            if not all("row" in row for row in rows):
                raise UserError(f"{part} is damaged; delete it, and its rows are made anew")
            made |= {row.pop("row"): row for row in rows}
        return made

    def begin(self, rank: int) -> None:
        """Add to this rank's part from now on."""
        self.file = open(f"{self.out}.part-{rank}", "ab")  # noqa: SIM115
        files.hold(self.file, f"another process is writing {self.out}")

    def add(self, made: dict[int, dict]) -> None:
        """Write down {row: what was made of it}: on the disk when this returns."""
        lines = [{"row": i} | new for i, new in made.items()]
        if self.file.tell() == 0:
            lines.insert(0, self.recipe)
        self.file.write(b"".join(map(as_line, lines)))
        self.file.flush()
        files.sync(Path(self.file.name))

    def finish(self, prompts: Prompts) -> dict[int, dict]:
        """Write --out, which appears whole, and what made it; {row: what was made of it}. What
        rewriting did to the rows is written beside it, and said."""
        made, temporary = self.read(), Path(f"{self.out}{files.UNFINISHED}")
        found = {}
        if prompts.template:
            found["rewriting"] = rewriting.judge(prompts.template, prompts.rows, made)
        if (copies := self.recipe["num_samples"]) > 1:
            made = {i: {"sample": i % copies} | new for i, new in made.items()}
        with open(temporary, "wb") as file:
            prompts.write_to(file, self.out.suffix, [made[i] for i in range(len(prompts.rows))])
        files.sync(temporary)
        files.write_json(self.note, {"file": files.file_entry(temporary), "recipe": self.recipe,
                                     **found, "versions": versions(), "git": git_state()})
        temporary.replace(self.out)
        self.remove()
        if found:
            print(rewriting.sentence(found["rewriting"]))
        return made

    def remove(self) -> None:
        """Delete all parts: nothing of them is needed any more."""
        for part in self.parts():
            part.unlink()
