"""What eval.py --probe is given: vectors and labels by id, .csv and .parquet, joined and checked.

The vectors of a file are its lists `embedding`, which sample.py --embed writes; else its columns
emb_0001, emb_0002, ...; else all its columns of numbers but the id and the label. Several files are
joined by id. The ids are sorted, so that the order of the rows in a file changes nothing. Of a .csv
is missing what pyarrow and pandas take for it (an empty cell, NA, None, null, ...), unless it
stands in quotes: "NA" is a country.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plainllama.files import sha256_bytes
from plainllama.settings import UserError, install
from plainllama.text.records import naming_damage
from plainllama.text.tables import delimiter

FOLDS = 5  # of which each needs ids of every class
LEAST = 100  # ids: a tree sees half of four fifths of them, and puts 20 at least into a leaf
NEEDS = {"lightgbm": "lightgbm", "sklearn": "scikit-learn", "scipy": "scipy", "pyarrow": "pyarrow"}
LISTS, NUMBERED = "embedding", r"emb_\d+"
PANDAS = ["None", "<NA>"]  # which it takes for missing, beside what pyarrow does


class Vectors(NamedTuple):
    """The vectors of a file, or of several."""

    name: str
    rows: dict[str, int]  # of each id
    values: np.ndarray  # (rows, d)

    def of(self, ids: list[str]) -> np.ndarray:
        """Give the vectors of ids, in their order."""
        return self.values[[self.rows[one] for one in ids]]


class Joined(NamedTuple):
    """The ids that have a vector in every file and a label, sorted, and what is known of each."""

    vectors: dict[str, np.ndarray]  # name -> (n, d); first what is probed, then its rivals
    labels: np.ndarray  # (n,): the number of the class
    classes: list  # what the labels are
    test: np.ndarray  # (n,): whether it is one of --test_ids
    ids: list[str]

    def made_of(self, names: list[str]) -> dict:
        """Hash the vectors of these names, and whose they are with which labels."""
        known = (self.ids, self.classes, self.labels.tolist(), self.test.tolist())
        return {"vectors": [sha256_bytes(self.vectors[name].tobytes()) for name in names],
                "labels": sha256_bytes(repr(known).encode())}


# ---- what is asked

def ask(flags: Any, say: Callable) -> tuple[Joined, list[int]]:
    """Read and look through everything that is probed, and the seeds. UserError, before anything
    slow begins, for what does not fit."""
    for name in ("embeddings", "labels"):
        if not getattr(flags, name):
            raise UserError(f"--probe needs --{name}=FILE, a .csv or .parquet with ids")
    if flags.id == flags.label:
        raise UserError(f"--id and --label both name the column `{flags.id}`")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--probe is for one process; start it without torchrun")
    if lacking := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"--probe needs {NEEDS[lacking[0]]}: {install('probe')}")
    out = Path(flags.out)
    if flags.out and (out.suffix != ".json" or out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out={out} is no .json file in a folder that exists")
    seeds = [one.strip() for one in flags.seeds.split(",")]
    if not all(one.isdecimal() and int(one) < 2**31 for one in seeds):
        raise UserError(f"--seeds={flags.seeds}: say whole numbers from 0, with commas between")
    if len(set(map(int, seeds))) < len(seeds):
        raise UserError(f"--seeds={flags.seeds}: a seed stands there twice, with the same folds")
    data = joined(flags, say)
    check_classes(data, flags)
    return data, [*map(int, seeds)]


# ---- files

def read_table(name: str, id_name: str) -> tuple[dict[str, int], Any]:
    """Read a file: {id: row} and its pyarrow.Table. UserError for one without such ids."""
    from pyarrow import csv, parquet, string, types

    path = Path(name)
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet"):
        raise UserError(f"{name or 'a file without a name'} is not a .csv or .parquet")
    if not path.is_file():
        raise UserError(f"no file {name}; name a .csv or .parquet with a column `{id_name}`")
    with naming_damage(name):
        if kind == ".parquet":
            table = parquet.read_table(path)
        else:  # an id 007 is no 7
            how = csv.ConvertOptions(
                column_types={id_name: string()}, strings_can_be_null=True,
                null_values=[*csv.ConvertOptions().null_values, *PANDAS],
                quoted_strings_can_be_null=False)
            with open(path, encoding="utf-8-sig") as file:
                between = csv.ParseOptions(delimiter=delimiter(file.readline()))
            table = csv.read_csv(path, parse_options=between, convert_options=how)
        names = table.column_names
    if twice := [one for one in names if names.count(one) > 1]:
        raise UserError(f"{name}: several columns are called {twice[0]!r}; rename all but one")
    if "" in names:
        raise UserError(f"{name}: column {names.index('') + 1} has no name (the index of pandas, "
                        "which index=False leaves out?); name it or take it away")
    if id_name not in names:
        raise UserError(f"{name} has no column `{id_name}`; its columns are: {shortened(names)} "
                        "(--id names another)")
    if not table.num_rows:
        raise UserError(f"{name} has no rows")
    column = table[id_name]
    try:
        whole = column.cast("int64") if types.is_floating(column.type) else column
        ids = whole.cast("string").to_pylist()
    except (ValueError, NotImplementedError):
        raise UserError(f"{name}: `{id_name}` holds {column.type}, and ids are texts or whole "
                        "numbers (--id names another column)") from None
    rows: dict[str, int] = {}
    for row, one in enumerate(ids):
        if one is None or not one.strip():
            raise UserError(f"{name}: row {row + 1} has no `{id_name}`")
        if one in rows:
            raise UserError(f"{name}: {id_name} {one} stands in rows {rows[one] + 1} and "
                            f"{row + 1}; an id has one row")
        rows[one] = row
    return rows, table


def shortened(names: list[str]) -> str:
    """List the first names, and say how many there are."""
    return ", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "") or "none"


def read_vectors(name: str, id_name: str, label: str, say: Callable) -> Vectors:
    """Read the vectors of a file. UserError if it has none, or some that are not vectors."""
    from pyarrow import compute, types

    rows, table = read_table(name, id_name)
    if LISTS in table.column_names:
        column = table[LISTS]
        if not hasattr(column.type, "value_type") or types.is_dictionary(column.type):
            raise UserError(f"{name}: `{LISTS}` holds {column.type}, not lists of numbers; those "
                            "need a .parquet")
        lengths = compute.list_value_length(column).fill_null(0).to_numpy()
        if len(odd := np.flatnonzero(lengths != lengths[:1])):
            raise UserError(f"{name}: vectors of different lengths: row 1 has {lengths[0]} "
                            f"numbers, row {odd[0] + 1} has {lengths[odd[0]]}")
        values = compute.list_flatten(column).to_numpy().reshape(len(rows), -1)
    else:
        others = [one for one in table.column_names if one not in (id_name, label)]
        numbered = [one for one in others if re.fullmatch(NUMBERED, one)]
        numbers = [one for one in numbered or others if is_number(table.schema.field(one).type)]
        idle = [one for one in numbered or others if one not in numbers]
        if numbered and idle:
            raise UserError(f"{name}: `{idle[0]}` holds {table.schema.field(idle[0]).type}, and a "
                            "vector numbers; fill or drop its rows")
        if idle:
            say(f"note: no numbers, and left out of the vectors of {name}: {shortened(idle)}")
        if numbers and not numbered:
            say(f"note: the vectors of {name} are its columns {shortened(numbers)}")
        columns = [table[one].cast("float64" if types.is_boolean(table[one].type) else
                                   table[one].type).to_numpy() for one in numbers]
        values = np.column_stack(columns) if columns else np.empty((len(rows), 0))
    if not values.size or values.dtype.kind not in "iuf":
        raise UserError(f"{name} has no vectors: lists of numbers in `{LISTS}`, or columns of "
                        f"numbers; its columns are: {shortened(table.column_names)}")
    values = values if values.dtype == np.float32 else values.astype(np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
        raise UserError(f"{name}: row {bad[0] + 1} has a number that is not finite or missing, as "
                        f"have {len(bad)} of {len(rows)} rows; fill or drop them")
    return Vectors(name, rows, values)


def is_number(kind: Any) -> bool:
    """Whether a type of pyarrow is one of numbers."""
    from pyarrow import types

    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def read_labels(name: str, id_name: str, label: str, say: Callable) -> dict[str, Any]:
    """Read {id: label}, and say how many have none. UserError if all have, or if the file has no
    such column."""
    rows, table = read_table(name, id_name)
    if label not in table.column_names:
        raise UserError(f"{name} has no column `{label}`; its columns are: "
                        f"{shortened(table.column_names)} (--label names another)")
    if hasattr(table[label].type, "num_fields") and table[label].type.num_fields:
        raise UserError(f"{name}: `{label}` holds {table[label].type}, and a label is one value")
    values = table[label].to_pylist()
    found = {one: values[row] for one, row in rows.items()
             if values[row] not in (None, "") and values[row] == values[row]}  # nan is not itself
    if not found:
        raise UserError(f"{name}: none of its {len(rows)} rows has a `{label}`")
    how = ": empty, NA, None, null, ... without quotes" if name.lower().endswith(".csv") else ""
    counted(say, len(rows) - len(found), f"labels of {name} are missing{how}")
    return found


# ---- joined

def joined(flags: Any, say: Callable) -> Joined:
    """Read and join what --embeddings, --against, --labels and --test_ids name, and say what is
    left out. UserError for what cannot be probed."""
    def read(name: str) -> Vectors:
        return read_vectors(name, flags.id, flags.label, say)

    parts = parts_of(flags.embeddings)
    if len(set(parts)) < len(parts):
        raise UserError(f"--embeddings={flags.embeddings} names a file twice")
    probed = appended(",".join(parts), [*map(read, parts)], say)
    rivals = [read(name) for name in parts_of(flags.against)]
    if len({one.name for one in (probed, *rivals)}) <= len(rivals):
        raise UserError(f"--against={flags.against} names vectors twice, or those of --embeddings")
    labels = read_labels(flags.labels, flags.id, flags.label, say)
    known = [one for one in labels if one in probed.rows]
    if 2 * len(known) <= len(labels):
        first = next(one for one in labels if one not in probed.rows)
        raise UserError(f"{len(labels) - len(known)} of {len(labels)} labels in {flags.labels} are "
                        f"of ids that {probed.name} lacks (labels: {first}, vectors: "
                        f"{next(iter(probed.rows))}); name files of the same ids")
    counted(say, len(labels) - len(known), f"labels are of ids that {probed.name} lacks")
    counted(say, len(probed.rows) - len(known), f"vectors of {probed.name} have no label")
    for rival in rivals:
        before, known = known, [one for one in known if one in rival.rows]
        if 2 * len(known) <= len(before):
            raise UserError(f"{rival.name} lacks {len(before) - len(known)} of {len(before)} ids "
                            f"that {probed.name} and {flags.labels} have")
        counted(say, len(before) - len(known), f"ids are not in {rival.name}, for none probed")
    whole = all(re.fullmatch(r"-?\d{1,600}", one) for one in known)  # Python reads no longer ones
    ids = sorted(known, key=lambda one: (int(one) if whole else 0, one))
    classes = sorted({labels[one] for one in ids})
    places = {one: number for number, one in enumerate(classes)}
    numbers = np.array([places[labels[one]] for one in ids])
    test = np.zeros(len(ids), bool)
    if flags.test_ids:
        wanted, _ = read_table(flags.test_ids, flags.id)
        test[:] = [one in wanted for one in ids]
        if not test.any():
            raise UserError(f"no id of {flags.test_ids} has a vector and a label (the first: "
                            f"{next(iter(wanted), 'none')}, others: {ids[0]})")
        counted(say, len(wanted) - int(test.sum()), f"ids of {flags.test_ids} are not known here")
    found = {one.name: one.of(ids) for one in (probed, *rivals)}
    return Joined(found, numbers, classes, test, ids)


def check_classes(data: Joined, flags: Any) -> None:
    """Raise UserError where the labels cannot be told apart, in folds and among the test ids."""
    counts = np.bincount(data.labels[~data.test], minlength=len(data.classes))
    apart = f" besides {int(data.test.sum())} test ids" if flags.test_ids else ""
    if len(data.classes) < 2:
        raise UserError(f"all {len(data.ids)} ids have one class, {flags.label} = "
                        f"{data.classes[0]}: there is nothing to tell apart")
    if len(small := np.flatnonzero(counts < FOLDS)):
        raise UserError(f"{flags.label} = {data.classes[small[0]]} has {counts[small[0]]} ids"
                        f"{apart}, and {FOLDS} folds need one each; leave the class out or join it "
                        f"with another (there are {len(data.classes)})")
    if counts.sum() < LEAST:
        raise UserError(f"{counts.sum()} ids with vector and label{apart} are too few: of less "
                        f"than {LEAST} LightGBM makes trees without a branch")
    if len(data.classes) == 2 and len(set(data.labels[data.test].tolist())) == 1:
        raise UserError(f"{flags.test_ids}: its known ids are of one class, which has no AUROC")


def parts_of(names: str) -> list[str]:
    """Split names of files at commas, unless a comma is part of a name; ~ is the home."""
    whole = os.path.expanduser(names)
    if Path(whole).is_file():
        return [whole]
    return [os.path.expanduser(name.strip()) for name in names.split(",")] if names else []


def appended(name: str, parts: list[Vectors], say: Callable) -> Vectors:
    """Append vectors of the same id; ids that are not in all files are left out, which is said."""
    ids = [one for one in parts[0].rows if all(one in part.rows for part in parts)]
    if not ids:
        raise UserError(f"no id is in all of {name}")
    for part in parts:
        counted(say, len(part.rows) - len(ids), f"ids of {part.name} are not in all of {name}")
    values = np.hstack([part.of(ids) for part in parts])
    return Vectors(name, {one: row for row, one in enumerate(ids)}, values)


def counted(say: Callable, n: int, what: str) -> None:
    """Say how many are left out, if any are."""
    if n:
        say(f"note: left out: {n:,} {what}")
