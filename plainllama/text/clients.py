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

from plainllama.files import as_json, read_json, sha256_bytes, write_json
from plainllama.settings import UserError, install, nearest
from plainllama.text.records import Piece, kind_of, naming_damage, opened, packing_of
from plainllama.text.tables import CACHED, Client, code_of, delimiter, typed

FILES = (".csv", ".parquet")
PIECE = 16 << 20  # bytes of a piece on the disk, roughly: the memory of a worker is ten times that
COUNTS = "counts.json"  # beside the pieces: how many rows were read, and what was bad
STRICT = "{}: {}; mend it, or skip it without --strict"
HELD = 1 << 16  # transactions that wait to be written
NEWEST = 1 << 16  # transactions of a client that are kept: more than a context has tokens
MISSING = {"", "NaN", "nan", "NULL", "null"}  # in a .csv, unless they stand in quotes
IN_QUOTES = r'(?<![^{0}\n])"(NaN|nan|NULL|null)"(?=[{0}\r\n]|$)'  # {0}: between cells
COMMA = re.compile(r"-?[0-9]+,[0-9]+")
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
    decimal: str  # ',' if it stands before decimals; else ''
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
    if "decimal" in source and all(kind_of(path.name, FILES) == ".parquet" for _, path in files):
        raise UserError(f"sources: decimal of {source['path']} has no effect on .parquet files")
    size = sum(path.stat().st_size * packing_of(str(path)).growth for _, path in files)
    pieces = math.ceil(size / min(PIECE, max(64 << 10, size // 12)))
    paths = tuple((label, str(path)) for label, path in files)
    name = sha256_bytes(as_json([source, record]).encode())[:16]
    origin = Origin(name, source["path"], paths, source["id"], source.get("time", ""),
                  source.get("time_format", ""), source.get("decimal", ""), settings,
                    max(1, pieces))
    return [Piece("", source["path"], "table", "", size // origin.pieces, number, table=origin)
            for number in range(origin.pieces)]


# ---- files -> transactions

def columns_in(origin: Origin, path: str, there: list[str]) -> list[int]:
    """Find the columns that are read among those of a file; UserError for one that is not there."""
    for name in origin.read:
        if there.count(name) != 1:
            shown = f"{', '.join(map(repr, there))[:300] or 'none'}{nearest(name, there)}"
            what = f"{there.count(name)} columns {name!r}" if name in there else f"no {name!r}"
            raise UserError(f"{path}: the table has {what}; its columns are {shown}")
    return [there.index(name) for name in origin.read]


def csv_rows(origin: Origin, path: str) -> Iterator[Row]:
    """Read the rows of a .csv; what stands between its cells is told by its first line."""
    cell = lru_cache(CACHED)(partial(cell_of, comma=origin.decimal == ","))
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        head = text.readline()
        between = delimiter(head)
        quoted = re.compile(IN_QUOTES.format(re.escape(between)))
        lines = (quoted.sub(rf'"{MARK}\1"', line) if '"N' in line or '"n' in line else line
                 for line in itertools.chain([head], text))
        reader = csv.reader(lines, delimiter=between, strict=True)
        begun = 1  # the first line of the row at hand
        try:
            header = next(reader, [])
            who, *chosen = columns_in(origin, path, header)
            # a date is read as it is written: 2024.10 is no number of a time_format with a point
            dates = [bool(origin.time_format) and header[i] == origin.time for i in chosen]
            begun = reader.line_num + 1
            for cells in reader:
                if reader.line_num > begun and len(cells) == len(header):
                    refuse_rows_inside(origin, f"{path}:{begun}", cells, between, chosen[0])
                begun = reader.line_num + 1
                if len(cells) == len(header):
                    yield reader.line_num, [text_of(cells[who]), *(
                        text_of(cells[i]) if date else cell(cells[i])
                        for i, date in zip(chosen, dates, strict=True))]
                elif cells:
                    yield reader.line_num, "a row with more or fewer cells than the first line"
        except csv.Error as error:
            raise UserError(f"{path}:{begun}: {error} (to line {reader.line_num}); mend the quotes "
                            "of that row") from None


def refuse_rows_inside(origin: Origin, place: str, cells: list[str], between: str,
                       time: int) -> None:
    """Raise UserError for a row whose cells, in quotes over several lines, hold rows with a time of
    their own: a quote was not closed."""
    for line in "\n".join(cells).splitlines():
        own = line.split(between)
        if len(own) == len(cells) and moment(cell_of(own[time]), origin.time_format) is not None:
            raise UserError(f"{place}: a cell in quotes holds whole rows, such as {line[:80]!r}; "
                            "close its quote, or double a quote that is text")


def text_of(cell: str) -> str | None:
    """Read a cell of a .csv as text."""
    return None if cell in MISSING else cell.removeprefix(MARK)


def cell_of(cell: str, comma: bool = False) -> int | float | str | None:
    """Read a cell of a .csv; `comma`: one may stand before decimals."""
    if cell in MISSING:
        return None
    text = cell.removeprefix(MARK)
    return typed(text.replace(",", ".") if comma and COMMA.fullmatch(text) else text)


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
    lists = []
    for name in origin.read:
        kind = schema.field(name).type
        if any(of(kind) for of in (pa.types.is_list, pa.types.is_large_list,
                                   pa.types.is_fixed_size_list)):
            lists.append(name)
            kind = kind.value_type
        if pa.types.is_nested(kind):
            raise UserError(f"{path}: {name!r} holds {kind}; a column of a table holds values, or "
                            "arrays of values where a row is a client")
    single = [name for name in origin.read[1:] if name not in [*lists, origin.id]]
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
            if lists:
                yield from ((number, row) for row in unfolded(
                    [itertools.repeat(cells[0]) if name == origin.id else array or ()
                     for name, array in zip(origin.read, cells, strict=True)]))
            else:
                yield number, [plain(value) for value in cells]


def unfolded(arrays: list) -> Iterator[list | str]:
    """Give the transactions of a client; for one whose arrays differ in length as many rules."""
    lengths = {len(array) for array in arrays if not isinstance(array, itertools.repeat)}
    if len(lengths) > 1:
        rule = "a transaction of a client whose arrays differ in length"
        yield from itertools.repeat(rule, max(lengths))
    elif lengths == {0}:
        yield "a client without a transaction"
    else:
        yield from ([plain(value) for value in event] for event in zip(*arrays, strict=False))


def plain(value: Any) -> int | float | str | None:
    """Give a value of a .parquet as None, a number or text."""
    if isinstance(value, float):  # -0.0 is 0.0, as they are equal
        return None if math.isnan(value) else value + 0.0 if math.isfinite(value) else str(value)
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
    when = lru_cache(CACHED)(moment)
    first = 2 if origin.time else 1  # of the values
    numeric = None  # whether times are numbers, as the first one is
    unread = (f"is not written as time_format={origin.time_format}" if origin.time_format else
              "is no number or date such as 2024-12-31 (say time_format)")
    for label, path in origin.files:
        packed = kind_of(path, FILES) == ".parquet"
        if not packed:
            need_time(origin)
        with naming_damage(path):
            for number, cells in (parquet_rows if packed else csv_rows)(origin, path):
                rule = ""
                at: float | None = 0.0
                if isinstance(cells, str):
                    rule = cells
                elif cells[0] in (None, ""):
                    rule = f"a transaction without {origin.id}"
                elif origin.time:
                    time = cells[1]
                    kind = isinstance(time, int | float) and not origin.time_format
                    at = when(time, origin.time_format)
                    if at is None:
                        rule = f"a transaction whose {origin.time} {unread}"
                    elif kind != (kind if numeric is None else numeric):
                        rule = (f"a transaction whose {origin.time} is no "
                                f"{'number' if numeric else 'date'}, as the first one's is")
                    else:
                        numeric = kind
                if rule:
                    yield "", [rule, f"{label}{' row ' if packed else ':'}{number}"]
                else:
                    yield code_of(cells[0]), [at, cells[first:]]


def need_time(origin: Origin) -> None:
    """Raise UserError if nothing orders rows that may come in any order."""
    if not origin.time:
        raise UserError(f"sources: {origin.path} has no 'time': say which column orders the "
                        "transactions of a client")


def moment(value: Any, form: str) -> float | None:
    """Give a time as a number that orders it, None if it is none; `form`: how dates are written."""
    if not form and isinstance(value, int | float):
        return value
    if isinstance(value, float) and not value.is_integer():
        return None  # 2024.1 may have been October
    try:
        date = (datetime.datetime.strptime(code_of(value), form) if form else
                datetime.datetime.fromisoformat(value))
    except (ValueError, TypeError):
        return None
    return ((date if date.tzinfo else date.replace(tzinfo=datetime.UTC)) - EPOCH).total_seconds()


# ---- transactions -> pieces on the disk -> clients

def group(origin: Origin, folder: Path, strict: bool, most: float) -> Path:
    """Write the transactions of a source into pieces below `folder`, all those of a client into
    one; return the folder of these. UserError where more than the share `most` of the rows, or if
    `strict` one, has no client or time. What an earlier start has made is taken as it is."""
    done = folder / f"clients-{origin.name}"
    if not done.is_dir():
        sort(origin, done, strict)
    counts = read_json(done / COUNTS)
    rows, bad = counts["rows"], counts["bad"]
    if strict and bad:
        raise UserError(STRICT.format(bad[0]["first"], bad[0]["rule"]))
    if (lost := sum(one["count"] for one in bad)) > most * rows:
        why = "; ".join("{count} {rule} (first {first})".format(**one) for one in bad)
        raise UserError(f"sources: {lost} of {rows} rows of {origin.path} are dropped: {why}; mend "
                        "it, or allow it with a greater --max_dropped")
    return done


def sort(origin: Origin, done: Path, strict: bool) -> None:
    """Write the transactions of a source into pieces, and how many rows of it are bad."""
    print(f"sources: {origin.path}: sorting its transactions by {origin.id}", flush=True)
    bad, rows = dict[str, dict](), 0
    with tempfile.TemporaryDirectory(prefix="clients-", dir=done.parent) as own:
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
                    if strict:
                        raise UserError(STRICT.format(place, rule))
                    found = bad.setdefault(rule, {"rule": rule, "count": 0, "first": place})
                    found["count"] += 1
                piece = zlib.crc32(client.encode()) % origin.pieces
                waiting.setdefault(piece, []).append(
                    json.dumps([client, *row], ensure_ascii=False))
            rows += len(held)
            if rows == HELD == sum(one["count"] for one in bad.values()):
                one = next(iter(bad.values()))
                raise UserError(f"sources: none of the first {HELD:,} rows of {origin.path} is "
                                f"sound: {one['rule']} (first {one['first']})")
            for piece, lines in waiting.items():
                with open(made / name_of(piece), "a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
        if rows == 0:
            raise UserError(f"sources: {origin.path} is empty")
        write_json(made / COUNTS, {"rows": rows, "bad": [*bad.values()]})
        with contextlib.suppress(OSError):  # another share of the work was faster
            os.rename(made, done)


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
