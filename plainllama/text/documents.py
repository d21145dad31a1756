"""Records -> documents, in bounded memory: what is kept of them, what is dropped and cut."""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from plainllama.settings import UserError
from plainllama.text.clients import clients_in, group, name_of
from plainllama.text.dialogs import spoken
from plainllama.text.records import (
    DOCUMENT,
    KINDS,
    Dialog,
    Dropped,
    Piece,
    chunks_of,
    naming_damage,
    records_of,
)
from plainllama.text.tables import Renderer, Table


@dataclass(frozen=True)
class Rules:
    """Which records are kept."""

    strict: bool = False  # a record that cannot be read is an error
    min_chars: int = 0
    max_chars: int = 0  # 0: no bound

    def broken_by(self, text: str) -> str:
        """Name the rule that drops a text, '' if it is kept."""
        if isinstance(text, Dropped):
            return text
        if not text:
            return "empty"
        if len(text) < self.min_chars:
            return f"under {self.min_chars} characters"
        if 0 < self.max_chars < len(text):
            return f"over {self.max_chars} characters"
        return ""


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
            self.note(rule, partial(entry.get, "first"), entry["count"])


@dataclass(frozen=True)
class Part:
    """What a worker must know of a part."""

    pieces: list[Piece]
    rules: Rules = Rules()
    source: int = 0  # the number of its source, if it holds dialogs: parts of several hold text
    repeated: dict[int, str] = field(default_factory=dict)  # text i -> the rule that drops it

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""
        return sum(piece.size for piece in self.pieces)


def documents(parts: Iterable[Part], dropped: Tally, cut: Tally | None = None) -> Iterator[str]:
    """Read the texts of the parts, those over DOCUMENT in several.

    What is dropped by a rule, or cut, is counted, and the first of each named.
    """
    for part in parts:
        pieces = (tables_of(piece, dropped, cut) if piece.table else
                  texts_of(piece, part.rules, dropped, cut) for piece in part.pieces)
        for number, (text, where) in enumerate(itertools.chain.from_iterable(pieces)):
            if number in part.repeated:
                dropped.note(part.repeated[number], where)
            else:
                yield text


def texts_of(piece: Piece, rules: Rules, dropped: Tally,
             cut: Tally | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """Read the texts of a piece that the rules keep, each with what names its place."""
    with naming_damage(piece.path):
        for at, chunks in records_of(piece):
            kept = 0  # texts of this record
            for chunk in chunks:
                rule = rules.broken_by(chunk)
                where = partial(place_of, piece, at, getattr(chunk, "found", ""))
                if rules.strict and isinstance(chunk, Dropped):
                    raise UserError(f"{where()}: {rule}; mend it, or skip it without --strict")
                if rule:
                    dropped.note(rule, where)
                    continue
                if isinstance(chunk, Dialog):
                    chunk.where = where
                    if chunk.left_out and cut is not None:
                        cut.note("messages behind the last answer", where, chunk.left_out)
                for text in cut_up(chunk):
                    kept += 1
                    if kept == 1:
                        dropped.records += 1
                    if kept == 2 and cut is not None:
                        cut.note(f"document over {DOCUMENT >> 20} MB", where)
                    yield text, where


def tables_of(piece: Piece, dropped: Tally,
              cut: Tally | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """Render the clients of a piece, each with what names it."""
    renderer, cut = Renderer(piece.table.settings), Tally() if cut is None else cut
    for client in clients_in(piece.table, piece.path, cut.note):
        text = Table(renderer.text(client))
        text.client, text.renderer, text.kept = client, renderer, text
        text.where = partial("{}: client {}".format, piece.label, client.id)
        for rule, count in renderer.unknown(client).items():
            cut.note(rule, text.where, count)
        dropped.records += 1
        yield text, text.where


def grouped(parts: list[Part], folder: Path, strict: bool = False,
            most: float = 1.0) -> list[Part]:
    """Sort the transactions of parts by client into pieces below `folder`, and tell the parts
    where these are; `most`: the share of rows that may be dropped."""
    return [replace(part, pieces=[
        replace(piece, path=str(group(piece.table, folder, strict, most) / name_of(piece.start)))
        for piece in part.pieces]) for part in parts]


def place_of(piece: Piece, at: int, found: str) -> str:
    """Name the file and the place in it of the record that begins at `at`, and what is there."""
    return piece.label + KINDS[piece.kind].place(piece, at) + (f" ({found})" if found else "")


def cut_up(text: str) -> list[str]:
    """Cut a text over DOCUMENT into several."""
    if 4 * len(text) <= DOCUMENT or isinstance(text, Dialog):
        return [text]
    return [chunk.decode() for chunk in chunks_of(io.BytesIO(text.encode()))]


def beginnings(parts: list[Part], size: int) -> Iterator[str]:
    """Read the beginning of every part, `size` characters in all: spread evenly, always alike."""
    share = size / max(sum(part.size for part in parts), 1)
    for part in parts:
        budget = part.size * share
        for text in documents([part], Tally()):
            yield spoken(text) if isinstance(text, Dialog) else text
            budget -= len(text)
            if share < 1 and budget <= 0:
                break
