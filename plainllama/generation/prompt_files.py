"""Files of prompts: read, kept safe while they are worked on, and written with what was found.

A row is an object of JSON, a line of text or a row of parquet. OUT appears whole; until then what
is done stands in OUT.part-RANK, so that a kill loses no row and no row is done twice.
"""

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from plainllama.files import hold
from plainllama.settings import UserError

# a batch is what it is by these, by its file of prompts and by the model
RECIPE = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "column",
          "max_new_tokens", "num_samples", "stop", "seed", "embed", "layers")


def read_rows(path: Path, column: str) -> list[dict]:
    """The rows of a file, row i from line i + 1; UserError names the line that is wrong."""
    if not path.is_file():
        raise UserError(f"no file {path}; --prompts takes a .jsonl, .txt or .parquet file with a "
                        "prompt per row")
    if path.suffix == ".parquet":
        return parquet(path).to_pylist()
    plain, rows = path.suffix == ".txt", []
    data = path.read_bytes() if plain else path.read_bytes().rstrip()
    if not data:
        return []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            text = line.decode("utf-8-sig")
            rows.append({column: text.removesuffix("\r")} if plain else json.loads(text))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"found {rows[-1]!r:.40}")
        except (ValueError, RecursionError) as error:  # also invalid UTF-8
            raise UserError(f"{path}:{number} is not " + ("a line of text" if plain else
                            'a JSON object such as {"prompt": "text"}') + f": {error}") from None
    return rows


def parquet(path: Path) -> Any:
    """The pyarrow.Table of a file."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, ValueError) as error:  # ValueError: pyarrow's own
        raise UserError(f"{path} is damaged or cut short: {error}") from None


def read_prompts(path: Path, out: Path, copies: int, column: str,
                 added: set[str]) -> tuple[list[dict], Any, bool]:
    """(the rows of `path`, each `copies` times; the same as a table if `out` is .parquet; whether
    `out` holds them already). UserError if `out` cannot take them, or holds something else."""
    rows = read_rows(path, column)
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
    rows, table = [row for row in rows for _ in range(copies)], None
    try:
        if out.suffix != ".parquet":
            for row in rows:
                as_line(row)
        elif path.suffix == ".parquet":  # with its types
            table = parquet(path).take([i // copies for i in range(len(rows))])
        else:
            import pyarrow as pa

            names = dict.fromkeys(name for row in rows for name in row)
            table = pa.table({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: its rows do not fit into {out.name}: {error}; name an --out of "
                        "the same kind") from None
    if out.exists():
        there = read_rows(out, column)
        if [row.get(column) for row in there] != [row[column] for row in rows] or not all(
                added <= set(row) for row in there):
            raise UserError(f"--out {out} exists and was not made from {path}; name another file "
                            "or move that one away")
    return rows, table, out.exists()


def as_line(row: dict) -> bytes:
    """A line of JSON; half a surrogate pair, which UTF-8 lacks, stays the \\udXXX of JSON."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_out(out: Path, rows: list[dict], table: Any, found: list[dict]) -> None:
    """The rows with what was found for each, as one file that appears whole."""
    with open(f"{out}.tmp", "wb") as file:
        if table is None:
            file.writelines(as_line(row | one) for row, one in zip(rows, found, strict=True))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            for name in found[0]:
                column: Any = [one[name] for one in found]
                if name == "embedding":
                    numbers = np.stack([np.frombuffer(base64.b64decode(one), "<f4")
                                        for one in column])
                    column = pa.FixedSizeListArray.from_arrays(numbers.ravel(), numbers.shape[1])
                table = table.append_column(name, pa.array(column))
            pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{out}.tmp", out)


class Journal:
    """OUT.part-RANK: what this batch is made with, then a line for every row as it is done. All
    parts together, of however many ranks and starts, are what need not be done again."""

    def __init__(self, out: Path, made: dict):
        self.out, self.made = out, made

    def parts(self) -> list[Path]:
        """The files there are."""
        return sorted(path for path in self.out.absolute().parent.iterdir()
                      if path.name.startswith(f"{self.out.name}.part-"))

    def read(self) -> dict[int, dict]:
        """{row: what was found}. A line that a kill left half written is cut off."""
        found: dict[int, dict] = {}
        for part in self.parts():
            with open(part, "r+b") as file:
                hold(file, f"another process is writing {self.out}")
                data = file.read()
                file.truncate(data.rfind(b"\n") + 1)
            try:
                lines = [json.loads(line) for line in data.split(b"\n")[:-1]]
                for name, value in self.made.items() if lines else ():
                    if lines[0][name] != value:
                        raise UserError(
                            f"--out {self.out} was begun with {name}={lines[0][name]}, now it is "
                            f"{value}; give that again, name another file, or delete {part}")
                found |= {line.pop("row"): line for line in lines[1:]}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{part} is damaged ({error!r}); delete it, and its rows are made "
                                "anew") from None
        return found

    def begin(self, rank: int) -> None:
        """Add to this rank's part from now on."""
        self.file = open(f"{self.out}.part-{rank}", "ab")  # noqa: SIM115
        hold(self.file, f"another process is writing {self.out}")

    def add(self, rows: list[dict]) -> None:
        """These rows are done: they are on the disk when this returns."""
        self.file.write(b"".join(map(as_line, [self.made] * (not self.file.tell()) + rows)))
        self.file.flush()
        os.fsync(self.file.fileno())

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        for part in self.parts():
            part.unlink()


def made_with(f: Any, folder: Path) -> dict:
    """What decides the texts of a batch: its file, the model and the recipe."""
    sums = folder / "checksums.json"
    named = sums if sums.is_file() else folder / "config.json"
    return {"checkpoint": str(folder.absolute()),
            "weights": hashlib.sha256(named.read_bytes()).hexdigest()[:16],
            "sha256 of --prompts": hashlib.sha256(Path(f.prompts).read_bytes()).hexdigest()[:16],
            **{name: getattr(f, name) for name in RECIPE}}
