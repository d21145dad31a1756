"""Tables -> ids: of each client its newest transactions, as many as have room; each client once."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plainllama.settings import UserError
from plainllama.text.documents import Part, Tally
from plainllama.text.tables import Table
from plainllama.tokens.shards import Split
from plainllama.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TableEncoder:
    """Encodes tables, of each client its newest transactions that have room: [(ids, None)]."""

    room: int  # tokens; one more than block_size, since the last one is a target alone

    def __call__(self, tokenizer: Tokenizer, texts: list[Table], part: Part, dropped: Tally,
                 cut: Tally) -> list[list[tuple]]:
        """Encode the tables of a part; [] for a client none of whose transactions has room."""
        return [self.fitted(tokenizer, text, ids, dropped, cut) for text, ids in zip(
            texts, tokenizer.encode_documents([*texts]), strict=True)]

    def fitted(self, tokenizer: Tokenizer, text: Table, ids: np.ndarray, dropped: Tally,
               cut: Tally) -> list[tuple]:
        """Leave out the oldest transactions of a table, whose ids are `ids`, until it has room."""
        total = high = len(next(iter(text.client.columns.values())))  # transactions: too many
        low, least, most, best = 0, 0, len(ids), ids  # so many of them have room, in tokens
        if most <= self.room:
            return [(ids, None)]
        while high - low > 1:  # where a straight line through both leads
            guess = low + (high - low) * (self.room - least) // (most - least)
            guess = min(max(guess, low + 1), high - 1)
            table = text.renderer.text(text.client, guess)
            found = tokenizer.encode_documents([table])[0]
            if len(found) <= self.room:
                low, least, best, text.kept = guess, len(found), found, table
            else:
                high, most = guess, len(found)
        if not low:
            dropped.note(f"a transaction alone longer than block_size {self.room - 1}", text.where)
            return []
        cut.note(f"clients to block_size {self.room - 1}", text.where)
        cut.note("transactions before that", text.where, total - low)
        return [(best, None)]


def refuse_divided(folder: Path, state: dict) -> None:
    """Refuse a client that is in two sources, as two documents."""
    seen: set[str] = set()
    for client in itertools.chain.from_iterable(
            Split(folder, split, state).clients() for split in ("train", "val")):
        if client in seen:
            raise UserError(f"{folder}: client {client} is in two sources, and would be two; name "
                            "its files in one source, by a folder or a glob")
        seen.add(client)
