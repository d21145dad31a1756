"""Pieces of files -> records -> documents, in bounded memory."""

import contextlib
import gzip
import io
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from plainllama.settings import UserError

# The memory is bounded: what is longer is cut before a space, inside a word only if it has none ...
DOCUMENT = 16 << 20  # utf-8 bytes
LINE = 64 << 20  # ... and a line of .jsonl that is longer is dropped


@dataclass(frozen=True)
class Piece:
    """Consecutive records of one file."""

    path: str  # on this machine
    label: str  # in messages and in the manifest: the same on every machine
    kind: str  # txt, jsonl or parquet
    column: str
    size: int  # bytes of text, roughly
    start: int = 0  # first byte (jsonl) or the row group (parquet)
    stop: int = sys.maxsize
    skip: int = 0  # records left out at its start
    take: int = sys.maxsize


@dataclass(frozen=True)
class Rules:
    """Which records are kept."""

    strict: bool = False  # a record that cannot be read is an error
    min_chars: int = 0
    max_chars: int = 0  # 0: no bound


class Tally(dict):
    """{rule: {count, first}}: what was dropped or cut, by which rule, and where first."""

    records = 0  # of which a text was kept

    def note(self, rule: str, where: Callable[[], str], count: int = 1) -> None:
        """Count a record; `where` is asked for the first one of a rule only."""
        if rule not in self:
            self[rule] = {"count": 0, "first": where()}
        self[rule]["count"] += count

    def add(self, other: dict) -> None:
        """Count what a later part has noted."""
        for rule, entry in other.items():
            self.note(rule, lambda entry=entry: entry["first"], entry["count"])  # type: ignore


# ---- parts -> documents

def records_of(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """The raw records of a piece, each with the row or byte at which it begins."""
    try:
        with contextlib.ExitStack() as stack:
            if piece.kind == "parquet":
                records = rows_of(piece)
            else:
                file = stack.enter_context(opened(piece.path))
                if piece.kind == "txt":  # a record in chunks that bound the memory
                    yield from ((0, chunk) for chunk in chunks_of(file))
                    return
                records = lines_of(file, piece)
            yield from itertools.islice(records, piece.skip, piece.take)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{piece.path} is damaged or cut short: {error}") from None


def rows_of(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """The rows of a row group; as bytes, so that invalid utf-8 costs no other row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(piece.path, pre_buffer=False, buffer_size=1 << 20)
    first = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    group = file.metadata.row_group(piece.start)
    size = piece.size // max(group.num_rows, 1)
    batches = file.iter_batches(max(1, min(128, LINE // 8 // max(size, 1))), [piece.start],
                                [piece.column])
    values = (batch.column(0).cast(pa.large_binary()).to_pylist() for batch in batches)
    return enumerate(itertools.chain.from_iterable(values), first)


def lines_of(file, piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """The lines whose first byte lies in the piece, None for one over LINE; blank ones are no
    records."""
    if piece.start:
        file.seek(piece.start - 1)
        skip_line(file)
    at = file.tell() if piece.start else 0
    while at < piece.stop and (line := file.readline(LINE)):
        if len(line) == LINE and not line.endswith(b"\n"):
            yield at, None
            at += len(line) + skip_line(file)
            continue
        if not line.isspace():
            yield at, line
        at += len(line)


def skip_line(file) -> int:
    """Pass over the rest of a line; its bytes."""
    size = 0
    while line := file.readline(LINE):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def chunks_of(file) -> Iterator[bytes]:
    """A file's bytes by at most DOCUMENT, cut before a space or else before a character."""
    rest = b""
    while True:
        data = rest + file.read(DOCUMENT + 1 - len(rest))
        if len(data) <= DOCUMENT:
            yield data
            return
        end = data.rfind(b" ", DOCUMENT // 2, DOCUMENT)
        if end < 0:
            end = DOCUMENT
            while end > DOCUMENT - 4 and data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[:end]
        rest = data[end:]


def opened(path: str):
    """A file's bytes, unpacked."""
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    if path.endswith(".xz"):
        return lzma.open(path)
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def text_of(piece: Piece, raw: bytes | None, first: bool) -> tuple[str, str]:
    """(text, ''), or ('', the rule by which the record is dropped); `first`: its file begins so."""
    if raw is None:
        return "", f"line over {LINE >> 20} MB" if piece.kind == "jsonl" else "text is not a string"
    try:
        text = raw.decode("utf-8-sig" if first and piece.kind != "parquet" else "utf-8")
        if piece.kind == "jsonl":
            record = json.loads(text)
            if not isinstance(record, dict):
                return "", "broken line"
            if piece.column not in record:
                return "", f"no column {piece.column!r}, only {', '.join(record)[:200]}"
            text = record[piece.column]
        if not isinstance(text, str):
            return "", "text is not a string"
        if b"\\u" in raw:
            text.encode()  # half a surrogate pair, escaped in JSON, has no utf-8
    except UnicodeError:
        return "", "invalid utf-8"
    except (ValueError, RecursionError):
        return "", "broken line"
    return text, "" if text else "empty"


def documents(pieces: Iterable[Piece], dropped: Tally, rules: Rules = Rules(),
              cut: Tally | None = None, repeated: Mapping[int, str] | None = None) -> Iterator[str]:
    """The texts of the pieces, those over DOCUMENT in several.

    What is dropped by a rule, or cut, is counted, and the first of each named. `repeated` names the
    rule that drops text i of those that would come out without it.
    """
    number = 0
    for piece in pieces:
        chunks = 0  # of a .txt
        for at, raw in records_of(piece):
            text, rule = text_of(piece, raw, not at and not chunks)

            def where(piece=piece, at=at) -> str:
                form = {"txt": "", "jsonl": ":{}", "parquet": " row {}"}[piece.kind]
                line = 1 + (line_of(piece, at) if piece.kind == "jsonl" else at)
                return piece.label + form.format(line)

            if rule and rule != "empty" and rules.strict:
                raise UserError(f"{where()}: {rule}; mend it, or leave out --strict: it is then "
                                "skipped and counted")
            if not rule and len(text) < rules.min_chars:
                rule = f"under {rules.min_chars} characters"
            elif not rule and 0 < rules.max_chars < len(text):
                rule = f"over {rules.max_chars} characters"
            if rule:
                dropped.note(rule, where)
                continue
            long = piece.kind != "txt" and 4 * len(text) > DOCUMENT
            texts = [c.decode() for c in chunks_of(io.BytesIO(text.encode()))] if long else [text]
            chunks += piece.kind == "txt"
            if cut is not None and (len(texts) > 1 or chunks == 2):
                cut.note(f"document over {DOCUMENT >> 20} MB", where)
            dropped.records += chunks < 2
            for text in texts:
                if repeated and number in repeated:
                    dropped.note(repeated[number], where)
                else:
                    yield text
                number += 1


def line_of(piece: Piece, at: int) -> int:
    """Lines before byte `at` of the piece's file."""
    with opened(piece.path) as file:
        return sum(file.read(min(1 << 20, at - i)).count(b"\n") for i in range(0, at, 1 << 20))


@dataclass(frozen=True)
class Part:
    """What a worker must know of a part."""

    pieces: list[Piece]
    rules: Rules
    repeated: dict[int, str]  # texts that an earlier one repeats, and by which rule
    below: int = 0
    fraction: float = 0.0

    def texts(self, dropped: Tally, cut: Tally | None = None) -> Iterator[str]:
        """The part's documents."""
        return documents(self.pieces, dropped, self.rules, cut, self.repeated)
