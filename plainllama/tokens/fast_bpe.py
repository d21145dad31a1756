"""A tokenizer.json's ids by tiktoken, which is several times faster, where it can give them.

tiktoken cuts text by a pattern, begins with single bytes and joins neighbours, of all pairs the one
whose bytes have the lowest rank. A BPE begins with units and makes its merges in their order. So
the ranks are the model's units, then what its merges make, all as utf-8.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from plainllama.tokens.tokenizer_json import list_steps
from plainllama.tokens.vocabulary import (
    BYTE_LEVEL,
    BYTES,
    OLD_SPLIT,
    SPACES,
    SPLIT,
    cut_like,
    replace,
)

# The pattern by which tiktoken cuts words as BYTE_LEVEL does.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# How tiktoken may cut text for sentencepiece's BPE, if no piece reaches over the borders: shorter
# words are faster. (Mistral's pieces keep letters and digits from all else, but for one with a
# superscript two.)
WORDS = [r" *[^\W_²]+| *(?:[^\w ]|[_²])+| +", r" *[^ ]+| +"]
# Sentencepiece writes spaces as ▁, one more of them in front of a text.
SENTENCEPIECE = [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]
UNUSED = -1  # in a table of ids: this rank has no more of them
Encoder = Callable[[str, bool], np.ndarray]  # (text, does it begin a document) -> ids (n,)


class Units(NamedTuple):
    """What a BPE begins with, and how its pieces are written."""

    ids_of: dict[bytes, list[int]]  # by rank, utf-8 of each unit: the ids that it is written with
    utf8: dict[str, bytes]  # of each piece
    cuts: list[str]  # patterns to cut words by, the fastest first
    cuts_alike: bool  # the tokenizer cuts words just so; else no piece may reach over a cut


def make_fast_encoder(spec: dict, merger, kind: np.dtype) -> Encoder | None:
    """Make an encoder by tiktoken, whose ids are of dtype `kind`; None where they would be others
    than those of `spec`, a parsed tokenizer.json, and `merger`, its model in `tokenizers`."""
    model, added = spec["model"], {entry["content"] for entry in spec["added_tokens"]}
    ordinary = [entry for entry in spec["added_tokens"] if not entry["special"]]
    if model["type"] != "BPE" or model.get("ignore_merges") or ordinary:
        return None
    pieces = {piece: i for piece, i in model["vocab"].items() if piece not in added}
    units = sentencepiece_units(spec, pieces) or byte_level_units(spec, pieces)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    # Pairs in a row that make the same piece (as a sentencepiece model has them) count once.
    made = [piece for piece, _ in itertools.groupby("".join(pair) for pair in pairs)]
    if (not units or set(made) - units.utf8.keys() or len(set(made)) < len(made)
            or any(len(merger.tokenize(piece)) > 1 for piece in made)):
        return None  # no order of pieces gives the order of merges, or one is not reached by them
    import tiktoken

    ids_of = units.ids_of | {units.utf8[piece]: [pieces[piece]] for piece in made}
    ranks = {text: rank for rank, text in enumerate(ids_of)}
    for cut in units.cuts:
        engine = tiktoken.Encoding("", pat_str=cut, mergeable_ranks=ranks,
                                   special_tokens={"<s>": len(ranks)})  # with none it is slow
        if units.cuts_alike or all(
                len(engine.encode_ordinary(units.utf8[piece].decode())) == 1 for piece in made):
            return make_encoder(engine, ids_of, kind, spaces=not units.cuts_alike)
    return None


def byte_level_units(spec: dict, pieces: dict[str, int]) -> Units | None:
    """List the units of a byte-level BPE: the 256 bytes. None if `spec` is of another kind or cuts
    words in a way that has no pattern here."""
    patterns = ((BYTE_LEVEL, GPT2_SPLIT), *((cut_like(cut), cut) for cut in (SPLIT, OLD_SPLIT)))
    cuts = [cut for words, cut in patterns if spec.get("pre_tokenizer") == words]
    characters = set("".join(pieces))
    if not cuts or spec.get("normalizer") or not characters <= BYTES.keys() <= pieces.keys():
        return None
    utf8 = {piece: bytes(BYTES[character] for character in piece) for piece in pieces}
    return Units({utf8[piece]: [pieces[piece]] for piece in BYTES}, utf8, cuts, cuts_alike=True)


def sentencepiece_units(spec: dict, pieces: dict[str, int]) -> Units | None:
    """List the units of a sentencepiece BPE with byte fallback; None if `spec` is of another kind.

    They are characters, and the bytes of those that have no piece. tiktoken joins the bytes of a
    character on the way to it: what they join to is a rank too, written with the ids of its bytes,
    for characters that begin alike but have no piece.
    """
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if (list_steps(spec.get("normalizer")) != SENTENCEPIECE
            or spec.get("pre_tokenizer") not in (None, SPACES) or set(names) - pieces.keys()):
        return None
    id_of_byte = [pieces[name] for name in names]
    utf8 = {piece: piece.replace("▁", " ").encode() for piece in pieces.keys() - set(names)}
    characters = [piece for piece in pieces if len(piece) == 1]
    ids_of = {bytes([byte]): [i] for byte, i in enumerate(id_of_byte)}
    for text in (utf8[piece] for piece in characters):
        ids_of |= {text[:n]: [id_of_byte[byte] for byte in text[:n]] for n in range(2, len(text))}
    ids_of |= {utf8[piece]: [pieces[piece]] for piece in characters}
    return Units(ids_of, utf8, WORDS, cuts_alike=False)


def make_encoder(engine, ids_of: dict[bytes, list[int]], kind: np.dtype, spaces: bool) -> Encoder:
    """Make the encoder by a tiktoken engine whose ranks are written with `ids_of`: one id or, of
    characters without a piece, up to three. With `spaces` it reads text as sentencepiece does."""
    table = np.array(list(itertools.zip_longest(*ids_of.values(), fillvalue=UNUSED))).T  # (R, 3)
    has_more = (table[:, 1:] != UNUSED).any(1)

    def encode(text: str, begins: bool) -> np.ndarray:
        if spaces:
            text = (" " + text if begins and text else text).replace("▁", " ")
        ranks = engine.encode_to_numpy(text, disallowed_special=())
        if not has_more[ranks].any():
            return table[ranks, 0].astype(kind)
        ids = table[ranks]
        return ids[ids != UNUSED].astype(kind)

    return encode
