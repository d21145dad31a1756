"""Files of transactions -> clients, in bounded memory: rows in any order are first sorted by client
into pieces on the disk, each of which is then read by itself.

A file is a .csv or a .parquet with a transaction in each row, or a .parquet with a client in each
row, whose columns are arrays.
"""

import contextlib
import csv
import datetime
import io
import itertools
import json
import math
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from plainllama.files import as_json, sha256_bytes
from plainllama.settings import UserError, install, nearest
from plainllama.text.records import Piece, kind_of, naming_damage, opened, packing_of
from plainllama.text.tables import Client, code_of, delimiter, typed

FILES = (".csv", ".parquet")
PIECE = 16 << 20  # bytes of a piece on the disk, roughly: the memory of a worker is ten times that
HELD = 1 << 16  # transactions that wait to be written
NEWEST = 1 << 16  # transactions of a client that are kept: more than a context has tokens
MISSING = {"", "NaN", "nan", "NULL", "null"}  # in a .csv, unless they stand in quotes
IN_QUOTES = re.compile(r'(?<![^,;\t|\n])"(NaN|nan|NULL|null)"(?=[,;\t|\r\n]|$)')
MARK = "\ufdd0"  # no character: before what stood in quotes
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
Row = tuple[int, list | str]  # its number, and its cells or the rule that drops it


@dataclass(frozen=True)
class Origin:
    """Where the clients of a source come from, and how they are written."""

    name: str  # another for other content
    path: str  # of the source
    files: tuple[tuple[str, str], ...]  # (label, path)
    id: str
    time: str  # '': rows are clients, whose transactions stand in their order
    time_format: str
    settings: dict  # of their renderer
    pieces: int

    @property
    def read(self) -> list[str]:
        """Name the columns that are read: id, time if there is one, and those that are shown."""
        shown = [column["column"] for column in self.settings["columns"]]
        return [self.id, *filter(None, [self.time]), *dict.fromkeys(shown)]


def clients_pieces(source: dict, record: dict, files: list[tuple[str, Path]],
                   settings: dict) -> list[Piece]:
    """Plan the pieces of a source, without the paths that group() gives them; `record`: what the
    manifest says of it. UserError for files that are no tables."""
    for _, path in files:
        if kind_of(path.name, FILES) not in FILES:
            raise UserError(f"{path}: a table is a .csv (also packed) or a .parquet")
    size = sum(path.stat().st_size * packing_of(str(path)).growth for _, path in files)
    pieces = math.ceil(size / min(PIECE, max(64 << 10, size // 12)))
    paths = tuple((label, str(path)) for label, path in files)
    name = sha256_bytes(as_json([source, record]).encode())[:16]
    origin = Origin(name, source["path"], paths, source["id"], source.get("time", ""),
                  source.get("time_format", ""), settings, max(1, pieces))
    return [Piece("", source["path"], "table", "", size // origin.pieces, number, table=origin)
            for number in range(origin.pieces)]


# ---- files -> transactions

def columns_in(origin: Origin, path: str, there: list[str]) -> list[int]:
    """Find the columns that are read among those of a file; UserError for one that is not there."""
    for name in origin.read:
        if there.count(name) != 1:
            shown = f"{', '.join(there)[:300]}{nearest(name, there)}"
            what = f"{there.count(name)} columns {name!r}" if name in there else f"no {name!r}"
            raise UserError(f"{path}: the table has {what}; its columns are {shown}")
    return [there.index(name) for name in origin.read]


def csv_rows(origin: Origin, path: str) -> Iterator[Row]:
    """Read the rows of a .csv; what stands between its cells is told by its first line."""
    cell = lru_cache(1 << 16)(cell_of)
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        head = text.readline()
        lines = (IN_QUOTES.sub(rf'"{MARK}\1"', line) if '"N' in line or '"n' in line else line
                 for line in itertools.chain([head], text))
        reader = csv.reader(lines, delimiter=delimiter(head))
        try:
            header = next(reader, [])
            who, *chosen = columns_in(origin, path, header)
            for cells in reader:
                if len(cells) == len(header):
                    client = None if cells[who] in MISSING else (
                        cells[who].removeprefix(MARK).removesuffix(".0"))
                    yield reader.line_num, [client, *(cell(cells[i]) for i in chosen)]
                elif cells:
                    yield reader.line_num, "a row with more or fewer cells than the first line"
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}; mend that line") from None


def cell_of(text: str) -> int | float | str | None:
    """Read a cell of a .csv."""
    return None if text in MISSING else typed(text.removeprefix(MARK))


def parquet_rows(origin: Origin, path: str) -> Iterator[Row]:
    """Read the rows of a .parquet, those of clients as several."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: {error}; {install('data')}") from None
    table = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    schema = table.schema_arrow
    columns_in(origin, path, schema.names)
    kinds = [schema.field(name).type for name in origin.read]
    lists = [name for name, kind in zip(origin.read, kinds, strict=True)
             if pa.types.is_list(kind) or pa.types.is_large_list(kind)]
    single = [name for name in origin.read[1:] if name not in lists]
    if lists and (single or origin.id in lists):
        found = f"one value in {single[0]!r}" if single else f"an array in {origin.id!r}"
        raise UserError(f"{path}: a row has an array in {lists[0]!r} and {found}; it is a client "
                        "with an id and arrays, or it is a transaction")
    if not lists:
        need_time(origin)
    number = 0
    for batch in table.iter_batches(256 if lists else 1 << 14, columns=origin.read):
        values = [batch.column(name).to_pylist() for name in origin.read]
        for cells in zip(*values, strict=True):
            number += 1
            if not lists:
                yield number, [plain(value) for value in cells]
            elif len({len(array or ()) for array in cells[1:]}) > 1:
                yield number, "a client whose arrays differ in length"
            else:
                for event in zip(*(array or () for array in cells[1:]), strict=True):
                    yield number, [plain(value) for value in (cells[0], *event)]


def plain(value: Any) -> int | float | str | None:
    """Give a value of a .parquet as None, a number or text."""
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 1 << 63 else str(value)
    if isinstance(value, bytes):
        return value.decode()
    text = str(value)
    return text.lower() if isinstance(value, bool) else typed(text)


def transactions(origin: Origin) -> Iterator[tuple[str, list]]:
    """Give the client and [time, values] of every row of the files, ("", [rule, place]) for one
    that has none."""
    when = lru_cache(1 << 16)(moment)
    first = 2 if origin.time else 1  # of the values
    for label, path in origin.files:
        packed = kind_of(path, FILES) == ".parquet"
        if not packed:
            need_time(origin)
        with naming_damage(path):
            for number, cells in (parquet_rows if packed else csv_rows)(origin, path):
                at = cells if isinstance(cells, str) or not origin.time else (
                    when(cells[1], origin.time_format))
                if isinstance(cells, str):
                    rule = cells
                elif cells[0] in (None, ""):
                    rule = f"a transaction without {origin.id}"
                elif at is None:
                    rule = (f"a transaction whose {origin.time} is no number or date such as "
                            "2024-12-31 (say time_format)")
                else:
                    yield code_of(cells[0]), [at if origin.time else 0, cells[first:]]
                    continue
                yield "", [rule, f"{label}{' row ' if packed else ':'}{number}"]


def need_time(origin: Origin) -> None:
    """Raise UserError if nothing orders rows that may come in any order."""
    if not origin.time:
        raise UserError(f"sources: {origin.path} has no 'time': say which column orders the "
                        "transactions of a client")


def moment(value: Any, form: str) -> float | None:
    """Give a time as a number that orders it, None if it is none; `form`: how dates are written."""
    if not form and isinstance(value, int | float):
        return value
    try:
        date = (datetime.datetime.strptime(str(value), form) if form else
                datetime.datetime.fromisoformat(value))
    except (ValueError, TypeError):
        return None
    return ((date if date.tzinfo else date.replace(tzinfo=datetime.UTC)) - EPOCH).total_seconds()


# ---- transactions -> pieces on the disk -> clients

def group(origin: Origin, folder: Path, strict: bool, most: float) -> Path:
    """Write the transactions of a source into pieces below `folder`, all those of a client into
    one; return the folder of these. UserError where more than the share `most` of the rows, or if
    `strict` one, has no client or time. What an earlier start has made is taken as it is."""
    done = folder / f"clients-{origin.name}{'-strict' if strict else ''}"
    if done.is_dir():
        return done
    print(f"sources: {origin.path}: sorting its transactions by {origin.id}", flush=True)
    bad, firsts, rows = Counter[str](), dict[str, str](), 0
    with tempfile.TemporaryDirectory(prefix="clients-", dir=folder) as own:
        made = Path(own, "made")
        made.mkdir()
        for piece in range(origin.pieces):
            (made / name_of(piece)).touch()
        stream = transactions(origin)
        while held := list(itertools.islice(stream, HELD)):
            waiting: dict[int, list[str]] = {}
            for client, row in held:
                if not client:
                    rule, place = row
                    bad[rule] += 1
                    firsts.setdefault(rule, place)
                    if strict:
                        raise UserError(f"{place}: {rule}; mend it, or skip it without --strict")
                piece = zlib.crc32(client.encode()) % origin.pieces
                waiting.setdefault(piece, []).append(
                    json.dumps([client, *row], ensure_ascii=False))
            rows += len(held)
            for piece, lines in waiting.items():
                with open(made / name_of(piece), "a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
        if rows == 0:
            raise UserError(f"sources: {origin.path} is empty")
        if sum(bad.values()) > most * rows:
            why = "; ".join(f"{n} {rule} (first {firsts[rule]})" for rule, n in bad.items())
            raise UserError(f"sources: {sum(bad.values())} of {rows} rows of {origin.path} are "
                            f"dropped: {why}; mend it, or allow it with a greater --max_dropped")
        with contextlib.suppress(OSError):  # another share of the work was faster
            os.rename(made, done)
    return done


def name_of(piece: int) -> str:
    """Name the file of a piece."""
    return f"{piece:05}.jsonl"


def clients_in(origin: Origin, path: str, note: Callable) -> Iterator[Client]:
    """Read the clients of a piece, in the order of their first rows; note(rule, what
    names its place, count) of what is left out."""
    rows_of: dict[str, list[tuple]] = {}
    lost: Counter[str] = Counter()
    with open(path, encoding="utf-8") as file:
        for client, at, values in map(json.loads, file):
            if not client:
                note(at, partial(str, values), 1)
                continue
            rows = rows_of.setdefault(client, [])
            rows.append((at, values))
            if len(rows) == 2 * NEWEST:
                lost[client] += keep_newest(rows)
    names = dict.fromkeys(origin.read[2 if origin.time else 1:])
    for client in list(rows_of):
        rows = rows_of.pop(client)
        lost[client] += keep_newest(rows)
        if lost[client]:
            note(f"transactions before a client's newest {NEWEST:,}",
                 partial("{}: client {}".format, origin.path, client), lost[client])
        columns = map(list, zip(*map(itemgetter(1), rows), strict=True))
        yield Client(client, dict(zip(names, columns, strict=True)))


def keep_newest(rows: list[tuple]) -> int:
    """Sort a client's rows by time, equal ones as they came, and take away all but the newest;
    return how many."""
    rows.sort(key=itemgetter(0))
    lost = max(0, len(rows) - NEWEST)
    del rows[:lost]
    return lost
