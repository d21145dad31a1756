"""Files of prompts: read, kept safe while they are worked on, and written with what was made.

A row is an object of JSON, a line of text or a row of parquet. OUT appears whole; until then what
is done stands in OUT.part-RANK, so that a kill loses no row and no row is done twice.
"""

import base64
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plainllama.files import hold, sha256, sync
from plainllama.settings import UserError, install
from plainllama.text.kinds import naming_damage

# a batch is what it is by these, by its file of prompts and by the model
RECIPE = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "column",
          "max_new_tokens", "num_samples", "stop", "seed", "embed", "layers")


# ---- read

def read_lines(path: Path, data: bytes, parse: Callable[[str], dict], what: str) -> list[dict]:
    """Parse the lines of a file to rows, row i from line i + 1. UserError for the first that is not
    `what` it should be, in UTF-8."""
    rows = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        try:
            rows.append(parse(line.decode("utf-8-sig")))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"found {rows[-1]!r:.40}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not {what}: {error}") from None
    return rows


def read_jsonl(path: Path, column: str) -> list[dict]:
    """Read objects of JSON, one a line; the file may end in empty lines."""
    return read_lines(path, path.read_bytes().rstrip(), json.loads,
                      'a JSON object such as {"prompt": "text"}')


def read_text(path: Path, column: str) -> list[dict]:
    """Read lines of text, each the `column` of a row; an empty line is a text too."""
    return read_lines(path, path.read_bytes(), lambda text: {column: text.removesuffix("\r")},
                      "a line of text")


def read_table(path: Path) -> Any:
    """Read the pyarrow.Table of a .parquet file."""
    import pyarrow.parquet as pq

    with naming_damage(str(path)):
        return pq.read_table(path)


def read_parquet(path: Path, column: str) -> list[dict]:
    """Read the rows of a table."""
    return read_table(path).to_pylist()


READERS = {".jsonl": read_jsonl, ".txt": read_text, ".parquet": read_parquet}


# ---- write

def as_line(row: dict) -> bytes:
    """Write a row as a line of JSON; half a surrogate pair, which UTF-8 lacks, stays the \\udXXX of
    JSON."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_jsonl(file, prompts: "Prompts", made: list[dict]) -> None:
    """Write the rows, each with what was made of it, as lines of JSON."""
    file.writelines(as_line(row | new) for row, new in zip(prompts.rows, made, strict=True))


def write_parquet(file, prompts: "Prompts", made: list[dict]) -> None:
    """Write the rows and what was made of them as a table, embeddings as lists of fp32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, table = prompts.rows, prompts.table
    if table is None:
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    for name in made[0]:
        column: Any = [new[name] for new in made]
        if name == "embedding":
            states = np.stack([unpack(text) for text in column])
            column = pa.FixedSizeListArray.from_arrays(states.ravel(), states.shape[1])
        table = table.append_column(name, pa.array(column))
    pq.write_table(table, file)


WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet}


def by_kind(path: Path, kinds: dict) -> Callable:
    """Look up READERS or WRITERS for a file; one of any other kind holds lines of JSON."""
    return kinds.get(path.suffix, kinds[".jsonl"])


@dataclass
class Prompts:
    """The rows to work on; from .parquet to .parquet also as a table, which has their types. And
    whether --out holds them already."""

    rows: list[dict]
    table: Any = None
    complete: bool = False

    def write(self, out: Path, made: list[dict]) -> None:
        """Write the rows with what was made of each, as one file that appears whole."""
        temporary = Path(f"{out}.tmp")
        with open(temporary, "wb") as file:
            by_kind(out, WRITERS)(file, self, made)
        sync(temporary)
        temporary.replace(out)


def read_prompts(path: Path, out: Path, copies: int, column: str, added: set[str]) -> Prompts:
    """Read the rows of `path`, each `copies` times. UserError if `out` cannot take them with what
    is `added`, or holds something else."""
    if ".parquet" in (path.suffix, out.suffix) and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"a .parquet needs pyarrow: {install('data')}")
    if not path.is_file():
        raise UserError(f"no file {path}; --prompts takes a .jsonl, .txt or .parquet file with a "
                        "prompt per row")
    rows = by_kind(path, READERS)(path, column)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str):
            raise UserError(f"{path}:{number} has no text in a column `{column}`; its columns are: "
                            f"{', '.join(row) or 'none'} (--column names another)")
        if taken := added & set(row):
            raise UserError(f"{path}:{number}: its column `{min(taken)}` would be overwritten; "
                            "rename it")
    if not rows:
        raise UserError(f"{path} has no rows")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} is not a file in a folder that exists")
    prompts = Prompts([row for row in rows for _ in range(copies)], complete=out.exists())
    try:  # what would fail after hours fails now
        if path.suffix == out.suffix == ".parquet":
            prompts.table = read_table(path).take([i // copies for i in range(len(prompts.rows))])
        by_kind(out, WRITERS)(io.BytesIO(), prompts, [{}] * len(prompts.rows))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: its rows do not fit into {out.name}: {error}; name an --out of "
                        "the same kind") from None
    if prompts.complete:
        there = by_kind(out, READERS)(out, column)
        same = [row.get(column) for row in there] == [row[column] for row in prompts.rows]
        if not same or not all(added <= set(row) for row in there):
            raise UserError(f"--out {out} exists and was not made from {path}; name another file "
                            "or move that one away")
    return prompts


# ---- what is done

def pack(state: np.ndarray) -> str:
    """Write a state, fp32 (C,), as a text that JSON can hold, to the bit."""
    return base64.b64encode(state.astype("<f4").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """Read what pack() wrote."""
    return np.frombuffer(base64.b64decode(text), "<f4")


class Journal:
    """OUT.part-RANK: what this batch is made with, then a line for every row as it is done. All
    parts together, of however many ranks and starts, are what need not be done again."""

    def __init__(self, out: Path, recipe: dict):
        self.out, self.recipe = out, recipe

    def parts(self) -> list[Path]:
        """List the files there are."""
        return sorted(path for path in self.out.absolute().parent.iterdir()
                      if path.name.startswith(f"{self.out.name}.part-"))

    def read(self) -> dict[int, dict]:
        """Return {row: what was made of it}, of all parts."""
        made: dict[int, dict] = {}
        for part in self.parts():
            try:
                made |= {row.pop("row"): row for row in self.read_part(part)}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{part} is damaged ({error!r}); delete it, and its rows are made "
                                "anew") from None
        return made

    def read_part(self, part: Path) -> list[dict]:
        """Read the rows of a part, and cut off a line that a kill left half written. UserError if
        the part was made in another way."""
        with open(part, "r+b") as file:
            hold(file, f"another process is writing {self.out}")
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)
        lines = [json.loads(line) for line in data.split(b"\n")[:-1]]
        if not lines:
            return []
        recipe, *rows = lines
        for name, value in self.recipe.items():
            if recipe[name] != value:
                raise UserError(f"--out {self.out} was begun with {name}={recipe[name]}, now it is "
                                f"{value}; give that again, name another file, or delete {part}")
        return rows

    def begin(self, rank: int) -> None:
        """Add to this rank's part from now on."""
        self.file = open(f"{self.out}.part-{rank}", "ab")  # noqa: SIM115
        hold(self.file, f"another process is writing {self.out}")

    def add(self, made: dict[int, dict]) -> None:
        """Write down {row: what was made of it}: on the disk when this returns."""
        lines = [{"row": i} | new for i, new in made.items()]
        if self.file.tell() == 0:
            lines.insert(0, self.recipe)
        self.file.write(b"".join(map(as_line, lines)))
        self.file.flush()
        sync(Path(self.file.name))

    def remove(self) -> None:
        """Delete all parts: nothing of them is needed any more."""
        for part in self.parts():
            part.unlink()


def made_with(f: Any, folder: Path) -> dict:
    """Say what decides the texts of a batch: its file, the model and the recipe."""
    sums = folder / "checksums.json"
    named = sums if sums.is_file() else folder / "config.json"
    return {"checkpoint": str(folder.absolute()), "weights": sha256(named)[:16],
            "sha256 of --prompts": sha256(Path(f.prompts))[:16],
            **{name: getattr(f, name) for name in RECIPE}}
