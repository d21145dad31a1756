"""Records -> documents: what is dropped, what is cut, in bounded memory."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from plainllama.settings import UserError
from plainllama.text import kinds
from plainllama.text.kinds import KINDS, Dropped, Piece, chunks_of, naming_damage, records_of


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


KEEP_ALL = Rules()


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
    rules: Rules = KEEP_ALL
    repeated: dict[int, str] = field(default_factory=dict)  # text i -> the rule that drops it

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""
        return sum(piece.size for piece in self.pieces)

    def texts(self, dropped: Tally, cut: Tally | None = None) -> Iterator[str]:
        """Read the part's documents."""
        return documents(self.pieces, dropped, self.rules, cut, self.repeated)


def documents(pieces: Iterable[Piece], dropped: Tally, rules: Rules = KEEP_ALL,
              cut: Tally | None = None, repeated: Mapping[int, str] | None = None) -> Iterator[str]:
    """Read the texts of the pieces, those over DOCUMENT in several.

    What is dropped by a rule, or cut, is counted, and the first of each named. `repeated` names the
    rule that drops text i of those that would come out without it.
    """
    number = 0
    for piece in pieces:
        for text, where in texts_of(piece, dropped, rules, cut):
            if repeated and number in repeated:
                dropped.note(repeated[number], where)
            else:
                yield text
            number += 1


def texts_of(piece: Piece, dropped: Tally, rules: Rules,
             cut: Tally | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """Read the texts of a piece that the rules keep, each with what names its place."""
    with naming_damage(piece.path):
        for at, chunks in records_of(piece):
            where = partial(place_of, piece, at)
            kept = 0  # texts of this record
            for chunk in chunks:
                rule = rules.broken_by(chunk)
                if rules.strict and isinstance(chunk, Dropped):
                    raise UserError(f"{where()}: {rule}; mend it, or leave out --strict: it is then"
                                    " skipped and counted")
                if rule:
                    dropped.note(rule, where)
                    continue
                texts = cut_up(chunk)
                if kept == 0:
                    dropped.records += 1
                if cut is not None and kept <= 1 < kept + len(texts):
                    cut.note(f"document over {kinds.DOCUMENT >> 20} MB", where)
                kept += len(texts)
                yield from ((text, where) for text in texts)


def place_of(piece: Piece, at: int) -> str:
    """Name the file and the place in it of the record that begins at `at`."""
    return piece.label + KINDS[piece.kind].place(piece, at)


def cut_up(text: str) -> list[str]:
    """Cut a text over DOCUMENT into several."""
    if 4 * len(text) <= kinds.DOCUMENT:
        return [text]
    return [chunk.decode() for chunk in chunks_of(io.BytesIO(text.encode()))]


def beginnings(parts: list[Part], size: int) -> Iterator[str]:
    """Read the beginning of every part, `size` characters in all: spread evenly, always alike."""
    share = size / max(sum(part.size for part in parts), 1)
    for part in parts:
        budget = part.size * share
        for text in part.texts(Tally()):
            yield text
            budget -= len(text)
            if share < 1 and budget <= 0:
                break
