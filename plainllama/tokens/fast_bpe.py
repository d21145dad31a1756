"""A tokenizer.json's ids by tiktoken, which is several times faster, where it can give them."""

import itertools
import json
from collections.abc import Callable

import numpy as np

from plainllama.tokens import vocabulary
from plainllama.tokens.tokenizer_json import _steps
from plainllama.tokens.vocabulary import BYTE_LEVEL, BYTES

# The pattern by which tiktoken cuts words, for each pre-tokenizer that it can stand for.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# How tiktoken may cut text for sentencepiece's BPE, if no piece reaches over the borders: shorter
# words are faster. (Mistral's pieces keep letters and digits from all else, but for one with a
# superscript two.)
WORDS = [r" *[^\W_²]+| *(?:[^\w ]|[_²])+| +", r" *[^ ]+| +"]


def _tiktoken(spec: dict, model, kind: np.dtype) -> Callable[[str, bool], np.ndarray] | None:
    """(text, does it begin a document) -> ids, by tiktoken; None where it would give other ids than
    `spec`, a parsed tokenizer.json, and `model`, its merge engine of `tokenizers`.

    tiktoken joins utf-8 bytes in the order of its ranks: of the units that a model begins with,
    then of its merges. Sentencepiece's units are characters. What their bytes join to on the way to
    one is a rank with several ids, for characters that begin like one but have no piece.
    """
    vocab, merges = spec["model"]["vocab"], spec["model"].get("merges")
    added = {entry["content"] for entry in spec["added_tokens"]}
    if (spec["model"]["type"] != "BPE" or merges is None or spec["model"].get("ignore_merges")
            or not all(entry["special"] for entry in spec["added_tokens"])):
        return None
    joined = ["".join(m.split(" ") if isinstance(m, str) else m) for m in merges]
    made = [piece for piece, _ in itertools.groupby(joined)]
    pieces = {piece: i for piece, i in vocab.items() if piece not in added}
    ids: dict[bytes, list[int]] = {}  # in the order of the ranks
    cuts = {json.dumps(words): [cut] for words, cut in (
        (BYTE_LEVEL, GPT2_SPLIT), (vocabulary.CUT_LIKE, vocabulary.SPLIT))}.get(
            json.dumps(spec["pre_tokenizer"]), [])
    if spaced := _steps(spec["normalizer"]) == [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
        known = [f"<0x{byte:02X}>" for byte in range(256)]
        if spec["pre_tokenizer"] not in (None, vocabulary.SPACES) or set(known) - set(pieces):
            return None
        of_byte, cuts = [pieces.pop(piece) for piece in known], WORDS
        utf8 = {piece: piece.replace("▁", " ").encode() for piece in pieces}
        characters = [piece for piece in pieces if len(piece) == 1]
        for byte in range(256):
            ids[bytes([byte])] = [of_byte[byte]]
        for text in (utf8[piece] for piece in characters):
            ids |= {text[:n]: [of_byte[byte] for byte in text[:n]] for n in range(2, len(text))}
        ids |= {utf8[piece]: [pieces[piece]] for piece in characters}
    elif cuts and not spec["normalizer"] and BYTES.keys() >= set("".join(pieces)):
        table = {ord(c): byte for c, byte in BYTES.items()}
        utf8 = {piece: piece.translate(table).encode("latin-1") for piece in pieces}
        ids |= {utf8[piece]: [pieces[piece]] for piece in BYTES}
    if not ids or set(made) - utf8.keys() or len(set(made)) < len(made) or any(
            len(model.tokenize(piece)) > 1 for piece in made):
        return None  # no order of pieces gives the order of merges, or one is not reached by them
    ids |= {utf8[piece]: [pieces[piece]] for piece in made}
    try:
        import tiktoken
    except ImportError:
        return None
    ranks = {text: rank for rank, text in enumerate(ids)}
    flat = np.array([i for some in ids.values() for i in some], kind)
    count = np.array([len(some) for some in ids.values()])  # of ids of a rank, and where they are
    start = np.cumsum(count) - count
    first, many = flat[start], count > 1
    for cut in cuts:
        engine = tiktoken.Encoding("", pat_str=cut, mergeable_ranks=ranks,
                                   special_tokens={"<s>": len(ranks)})  # with none it is slow

        def encode(text: str, begins: bool, engine=engine) -> np.ndarray:
            if spaced:
                text = (" " if begins and text else "") + text.replace("▁", " ")
            found = engine.encode_to_numpy(text, disallowed_special=())
            if spaced and many[found].any():
                n = count[found]
                return flat[np.repeat(start[found] - np.cumsum(n) + n, n) + np.arange(n.sum())]
            return first[found]

        if not spaced or all(len(engine.encode_ordinary(utf8[piece].decode())) == 1
                             for piece in made):
            return encode
    return None
