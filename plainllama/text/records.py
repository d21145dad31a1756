"""Files -> records, in bounded memory: how each kind of file is read, and how it may be packed.

To add a kind: a reader, its entry in KINDS, and a file of it in KINDS of tests/test_prepare.py.
"""

import codecs
import collections
import contextlib
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from plainllama.settings import UserError, ceil_div, install
from plainllama.text import cures
from plainllama.text.dialogs import How, converted
from plainllama.text.forms import Refused
from plainllama.text.pairs import paired
from plainllama.text.stores import Stream, Url, name_of

# The memory is bounded: what is longer is cut before a space, inside a word only if it has none ...
DOCUMENT = 16 << 20  # utf-8 bytes
BETWEEN = re.compile(r"[\s,\[\]]*")  # the objects of a .json
LINE = 64 << 20  # ... and a line of .jsonl that is longer is dropped
PART = 64 << 20  # bytes of text that a worker takes at a time
READ = 8 << 10  # packed bytes unpacked at once: of them come 8 MB of .gz or 56 of .xz at the most


BLANK = codecs.BOM_UTF8 + b" \t\r\n"  # a text of these bytes holds nothing


@dataclass(frozen=True)
class Piece:
    """Consecutive records of one file."""

    path: str  # on this machine, or a Url
    label: str  # in messages and in the manifest: the same on every machine
    kind: str  # a key of KINDS
    column: str
    size: int  # bytes of text, roughly
    start: int = 0  # first byte (.jsonl) or the row group (.parquet)
    stop: int = sys.maxsize
    skip: int = 0  # records left out at its start
    take: int = sys.maxsize
    how: How | None = None  # its records are dialogs; None: text in `column`
    table: Any = None  # a clients.Origin; the piece is number `start` of its pieces


class Dropped(str):
    """Stands for the text of a record that has none; the rule that drops it."""

    found = ""  # what broke it


class Dialog(str):
    """A dialog as JSON: never cut."""

    left_out = 0  # messages behind its last answer
    where: Callable[[], str]  # names its place


# Where a record begins (a byte or a row), and its text in chunks, decoded when they are read.
Record = tuple[int, Iterable[str]]


# ---- packings

class Packing(NamedTuple):
    """How a file is unpacked."""

    open: Callable
    growth: int  # bytes of text in a packed byte: a guess, for the plan
    seekable: bool = True  # it can be read from the middle on


class Unpacked(io.RawIOBase):
    """The bytes of a file of packed streams, one after another, read from its start on."""

    def __init__(self, unpacker: Callable, path: str):
        self.chunks, self.left = filter(None, unpacked(unpacker, path)), memoryview(b"")

    def readable(self) -> bool:
        """Say that it is for reading."""
        return True

    def readinto(self, buffer) -> int:
        """Fill a buffer; return how many bytes are new, 0 at the end."""
        self.left = self.left or memoryview(next(self.chunks, b""))
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


def unpacked(unpacker: Callable, path: str) -> Iterator[bytes]:
    """Unpack a file's streams, each by an unpacker(). Zeros may pad them, as tapes do; what else is
    no stream is an error, since a damaged one looks like that: the libraries differ in both."""
    with raw(path) as file:
        data = b""
        while data := data or file.read(READ):
            if data := data.lstrip(b"\0"):
                stream = unpacker()
                while not stream.eof:
                    if not (data := data or file.read(READ)):
                        raise EOFError("its last packed stream does not end")
                    yield stream.decompress(data)
                    data = b""
                data = stream.unused_data


def open_zst(path: str):
    """Open a file that zstd packed; nothing may pad it."""
    import pyarrow

    return pyarrow.input_stream(for_arrow(path), compression="zstd")


def raw(path: str) -> io.RawIOBase:
    """Open a file, or an object of a store, for its bytes as they are."""
    return Stream(path) if isinstance(path, Url) else io.FileIO(path)


def for_arrow(path: str) -> Any:
    """Give pyarrow what it opens: a path, or an object of a store that is open."""
    return io.BufferedReader(raw(path)) if isinstance(path, Url) else path


PLAIN = Packing(raw, 1)
PACKINGS = {".gz": Packing(partial(Unpacked, partial(zlib.decompressobj, 31)), 3),
            ".xz": Packing(partial(Unpacked, lzma.LZMADecompressor), 4),
            ".zst": Packing(open_zst, 3, seekable=False)}


def packing_of(path: str) -> Packing:
    """Tell how a file is packed by its name."""
    return PACKINGS.get(Path(name_of(path)).suffix.lower(), PLAIN)


def opened(path: str):
    """Open a file for its bytes, unpacked."""
    return io.BufferedReader(packing_of(path).open(path))


# ---- .txt: a file is a record

def text_records(piece: Piece) -> Iterator[Record]:
    """Read a file as one record, in chunks that bound the memory."""
    with opened(piece.path) as file:
        yield 0, (decoded(chunk if chunk.strip(BLANK) else b"", i == 0)
                  for i, chunk in enumerate(chunks_of(file)))


def is_blank(path: str) -> bool:
    """Whether there is nothing but white space in a file of text."""
    with naming_damage(path), opened(path) as file:
        return not any(chunk.strip(BLANK) for chunk in iter(partial(file.read, READ), b""))


def decoded(chunk: bytes, begins_file: bool = False) -> str:
    """Decode a chunk of text; a byte order mark may begin a file."""
    try:
        return chunk.decode("utf-8-sig" if begins_file else "utf-8")
    except UnicodeError:
        return Dropped("invalid utf-8")


def chunks_of(file) -> Iterator[bytes]:
    """Read a file's bytes by at most DOCUMENT, cut before a space or else before a character."""
    data = file.read(DOCUMENT + 1)
    while len(data) > DOCUMENT:
        end = data.rfind(b" ", DOCUMENT // 2, DOCUMENT)
        if end < 0:
            end = DOCUMENT
            while end > DOCUMENT - 4 and data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[:end]
        data = data[end:] + file.read(DOCUMENT + 1 - len(data[end:]))
    yield data


# ---- .jsonl: a line is a record

def line_pieces(file: Piece, few: int) -> Iterator[Piece]:
    """Cut a file between lines; one that can only be read from its start stays whole."""
    packing = packing_of(file.path)
    packed = packing is not PLAIN
    share = ceil_div(file.size, few) if packed else min(PART, file.size // 12)
    step = max(64 << 10, share if packing.seekable else file.size)
    for start in range(0, file.size, step):
        stop = min(file.size, start + step)
        end = sys.maxsize if packed and stop == file.size else stop  # the size is a guess
        yield replace(file, size=stop - start, start=start, stop=end)


def line_records(piece: Piece) -> Iterator[Record]:
    """Read the lines whose first byte lies in the piece; blank ones are no records."""
    with opened(piece.path) as file:
        at = 0
        if piece.start:
            if file.seekable():
                file.seek(piece.start - 1)
            else:
                collections.deque(first_bytes(file, piece.start - 1), maxlen=0)
            at = piece.start - 1 + skip_line(file)
        while at < piece.stop and (line := file.readline(LINE)):
            size = len(line)
            if size == LINE and not line.endswith(b"\n"):
                size += skip_line(file)
                yield at, [Dropped(f"line over {LINE >> 20} MB")]
            elif not line.isspace():
                yield at, map(partial(text_in, piece, at == 0), [line])
            at += size


def text_in(piece: Piece, begins_file: bool, line: bytes) -> str:
    """Take the text out of a line of JSON."""
    text = decoded(line, begins_file)
    if isinstance(text, Dropped):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    return taken(piece, record) if isinstance(record, dict) else Dropped("broken line")


def taken(piece: Piece, record: dict) -> str:
    """Take the text out of a record, or make it a dialog."""
    if piece.how:
        try:
            text, left_out = (paired if piece.how.pairs else converted)(record, piece.how)
        except Refused as error:
            dropped = Dropped(error)
            dropped.found = error.found
            return dropped
        if len(text) > DOCUMENT:
            return Dropped(f"dialog over {DOCUMENT >> 20} MB")
        dialog = Dialog(text)
        dialog.left_out = left_out
        return dialog
    if piece.column not in record:
        return Dropped(f"no column {piece.column!r}, only {', '.join(record)[:200]}")
    text = record[piece.column]
    if not isinstance(text, str):
        return Dropped("text is not a string")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return Dropped("invalid utf-8")  # half a surrogate pair, escaped
    return text


def skip_line(file) -> int:
    """Pass over the rest of a line; return its bytes."""
    size = 0
    while line := file.readline(LINE):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def line_place(piece: Piece, at: int) -> str:
    """Number the line that begins at byte `at` of the piece's file."""
    with opened(piece.path) as file:
        return ":" + str(1 + sum(chunk.count(b"\n") for chunk in first_bytes(file, at)))


def first_bytes(file, size: int) -> Iterator[bytes]:
    """Read the first bytes of a file, in chunks."""
    return (file.read(min(1 << 20, size - done)) for done in range(0, size, 1 << 20))


# ---- .json: an object of an array is a record

def object_records(piece: Piece) -> Iterator[Record]:
    """Read the objects of an array, or objects one after another, as they come; ValueError where
    that is broken off."""
    decode, number, at, between = json.JSONDecoder().raw_decode, 0, 0, ""
    with opened(piece.path) as file:
        chunks = codecs.iterdecode(iter(partial(file.read, 1 << 20), b""), "utf-8-sig")
        text = next(chunks, "")
        array = text.lstrip()[:1] == "["
        while True:
            found = BETWEEN.match(text, at)
            assert found  # of no character, at least
            at, between = found.end(), found[0].strip() or between
            try:
                record, at = decode(text, at)
            except (ValueError, RecursionError) as error:
                more = "".join(itertools.islice(chunks, max(1, len(text) >> 20)))
                if not more and at == len(text):
                    if array and not between.endswith("]"):
                        raise ValueError("its array has no end") from None
                    return
                if not more or len(text) - at > LINE:
                    raise ValueError(f"what follows its object {number} is no JSON: "
                                     f"{error}") from None
                text, at = text[at:] + more, 0
                continue
            known = isinstance(record, dict)
            yield number, map(partial(taken, piece), [record]) if known else [
                Dropped("not an object")]
            number += 1


# ---- .parquet: a row is a record

def row_pieces(file: Piece, few: int) -> Iterator[Piece]:
    """Cut a file into its row groups."""
    path, column = file.path, file.column
    try:
        import pyarrow.parquet as pq

        table = pq.ParquetFile(for_arrow(path))
    except ImportError as error:
        raise UserError(f"{path}: {error}; {install('data')}") from None
    names = table.schema_arrow.names
    if file.how:
        for i in range(table.num_row_groups):
            yield replace(file, size=table.metadata.row_group(i).total_byte_size, start=i)
        return
    if column not in names:
        raise UserError(f"{path} has no column {column!r}; it has {', '.join(names)}; "
                        f"{cures.for_column(path, names)}")
    kind = str(table.schema_arrow.field(column).type)
    if not re.search("string|binary", kind) or "<" in kind.removeprefix("dictionary<values="):
        raise UserError(f"{path}: column {column!r} is {kind}, not text")
    for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema == column:
                yield replace(file, size=chunk.total_uncompressed_size, start=i)


def row_records(piece: Piece) -> Iterator[Record]:
    """Read the rows of a row group; as bytes, so that invalid utf-8 costs no other row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(for_arrow(piece.path), pre_buffer=False, buffer_size=1 << 20)
    row = sum(table.metadata.row_group(i).num_rows for i in range(piece.start))
    size = piece.size // max(table.metadata.row_group(piece.start).num_rows, 1)
    rows = max(1, min(128, LINE // 8 // max(size, 1)))
    if piece.how:
        for batch in table.iter_batches(rows, [piece.start]):
            for i in range(batch.num_rows):
                yield row, map(partial(row_taken, piece), [batch.slice(i, 1)])
                row += 1
        return
    for batch in table.iter_batches(rows, [piece.start], [piece.column]):
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
            yield row, [Dropped("text is not a string") if value is None else decoded(value)]
            row += 1


def row_taken(piece: Piece, row) -> str:
    """Make a row a dialog: a batch of itself alone, so that invalid utf-8 costs no other."""
    try:
        record = row.to_pylist()[0]
    except UnicodeError:
        return Dropped("invalid utf-8")
    return taken(piece, without_nulls(record))


def without_nulls(value):
    """Leave out what is null in a row: a column of objects gives each the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [*map(without_nulls, value)] if isinstance(value, list) else value


# ---- the table

class Kind(NamedTuple):
    """How files of a kind are read."""

    pieces: Callable[[Piece, int], Iterable[Piece]]  # a file, how many of a packed one -> its cuts
    records: Callable[[Piece], Iterator[Record]]
    place: Callable[[Piece, int], str]  # where a record lies in the file, for messages
    packable: bool = True


KINDS = {
    ".txt": Kind(lambda file, few: [file], text_records, lambda piece, at: ""),
    ".jsonl": Kind(line_pieces, line_records, line_place),
    ".json": Kind(lambda file, few: [file], object_records, lambda piece, at: f" object {1 + at}"),
    ".parquet": Kind(row_pieces, row_records, lambda piece, at: f" row {1 + at}", packable=False),
}
OF_ROWS = [kind for kind in KINDS if kind != ".txt"]  # whose records are objects


def kind_of(name: str, known: Iterable[str] = KINDS) -> str:
    """Tell a file's kind, one of `known`, by its name; '' if it is none of them."""
    for kind in known:
        packable = kind not in KINDS or KINDS[kind].packable
        packed = [kind + packing for packing in PACKINGS if packable]
        if name.lower().endswith((kind, *packed)):
            return kind
    return ""


def kind_named(name: str) -> str:
    """Tell the kind of a file that was named itself, as kind_of(); Markdown is then text."""
    return kind_of(re.sub(r"\.md(?=\.|$)", ".txt", name.lower()))


def unknown(path: str) -> UserError:
    """Say of a file of another kind which there are, and how it becomes one of them."""
    return UserError(f"{path}: unknown kind of file; known are {', '.join(KINDS)}, also packed: "
                     f"{', '.join(PACKINGS)}{cures.for_kind(path)}")


def records_of(piece: Piece) -> Iterator[Record]:
    """Read those records of a piece that its `skip` and `take` leave."""
    return itertools.islice(KINDS[piece.kind].records(piece), piece.skip, piece.take)


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Make a UserError that names the file of what is raised for one that is damaged."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}; iconv -f cp1251 -t utf-8 makes it one "
                        "of cp1251; or latin1, utf-16, whichever it is") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        if getattr(error, "errno", None):  # of the system, which names the file
            raise
        raise UserError(f"{path} is damaged or cut short: {error}; replace it") from None
