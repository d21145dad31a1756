"""Text <-> ids: what reads and applies a tokenizer.json.

tokenizer.json is the tokenizer of a data set, a run and a checkpoint. Its ids are the truth;
tiktoken is a faster engine for them, used once it was seen to agree. What
train.py needs (boundaries, byte counts, Hugging Face files) is read from the JSON alone: the
tokenizer libraries are imported only where text is encoded or decoded. vocabulary.py makes the JSON
of tokenizers that have none.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import vocabulary
from settings import UserError, nearest
from vocabulary import BYTE_LEVEL, BYTES, valid

# sha256 of the tokenizer.json made of them: a data set or run that holds it needs nothing else.
CONVERTED = {
    "mistral": "16f61c723a2f78c7b6a6ed49165939baa603259f8b2d7eb00ba0bc6b8ca6bb70",
    "gpt2": "0a5a52ea3255d7d0767b24dfe7130cad0fdb572a60343f7e3b5b572b5572cdcf",
}

# Begin and end of a document, by the names that LLaMA-family tokenizers give them.
PAIRS = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<bos>", "<eos>"),
         ("<|startoftext|>", "<|endoftext|>"), ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))
# The pattern by which tiktoken cuts words, for each pre-tokenizer that it can stand for.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CUT = 1 << 20  # characters encoded at a time; a word that is longer is cut
# How tiktoken may cut text for sentencepiece's BPE, if no piece reaches over the borders: shorter
# words are faster. (Mistral's pieces keep letters and digits from all else, but for one with a
# superscript two.)
WORDS = [r" *[^\W_²]+| *(?:[^\w ]|[_²])+| +", r" *[^ ]+| +"]
# Two engines must agree on this before the faster one is used.
SAMPLE = """def f(x):\n\tif x  >= 3.14159:\n        return {'a': [1, 22, 4444]}  # don't\r\n\n
I'll SAY: she'd've gone…   \u00a0 naïve ŒUVRE ﬁn a\u0301 Straße\t \t x \u3000x\u200b\ufeff\x00\x7f
Привет, мир! 你好,世界。 日本語 한국어 हिन्दी ไทย שלום ½ ² Ⅷ ٣ 12345678 🎉👩\u200d👧🏽 aaaaaaaaaaaa
 ▁▁a ▁ b▁ <s> </s> <|endoftext|> <0x41> http://a.b/c?d=e&f=%20 --------- ''''        end \n \n  """


class Tokenizer:
    """A tokenizer.json in use. Text never becomes a special token."""

    def __init__(self, spec: dict, json_bytes: bytes, where: str = "tokenizer.json"):
        from tokenizers import Tokenizer as Engine

        try:
            self._tokenizers = Engine.from_str(json_bytes.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where}: the tokenizers library cannot read it: {error}") from None
        self._tokenizers.encode_special_tokens = True
        ids = {piece: i for i, (piece, _) in _entries(spec).items()}
        bos, eos = boundaries(spec)
        self.json_bytes = json_bytes
        self.sha256 = hashlib.sha256(json_bytes).hexdigest()
        self.vocab_size = max(ids.values()) + 1
        self.begin = str(bos)
        self.bos: int = ids[self.begin]
        self.eos: int | None = ids[eos] if eos else None
        self.stop_ids: list[int] = [ids[str(eos or bos)]]
        self.kind = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.cut_words = 0  # how many were longer than CUT so far
        self._pieces_join = {step["type"] for step in _steps(spec["decoder"])} == {"ByteLevel"}
        self._fast: Callable[[str, bool], np.ndarray] | None = None
        self.engine = "tokenizers"
        if fast := _tiktoken(spec, self._tokenizers.model, self.kind):
            self.engine, self._fast = "tiktoken", fast
        self.check([SAMPLE])

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer in a tokenizer.json file or in a folder that holds one."""
        return cls(*_read(path), str(path))

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json into `folder`."""
        (Path(folder) / "tokenizer.json").write_bytes(self.json_bytes)

    def check(self, texts: Iterable[str]) -> bool:
        """Whether the faster engine gives the ids of tokenizer.json; if not, it is given up."""
        if self._fast and any(list(self._fast(text, True)) != self._ids([text])[0]
                              for text in texts):
            self.give_up()
            return False
        return True

    def give_up(self) -> None:
        """Use the `tokenizers` library from now on."""
        self._fast, self.engine = None, "tokenizers"

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without begin and end."""
        return [int(i) for i in self._batch([text])[0]]

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of whole documents, each with its begin and end token."""
        last = [] if self.eos is None else [self.eos]
        out = []
        for ids in self._batch(texts):
            out.append(np.empty(1 + len(ids) + len(last), self.kind))
            out[-1][0], out[-1][1:1 + len(ids)], out[-1][1 + len(ids):] = self.bos, ids, last
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` as from the start of a document; special tokens are left out."""
        return self._tokenizers.decode([int(i) for i in ids], skip_special_tokens=True)

    def _batch(self, texts: list[str]) -> list:
        """Ids of each text, as lists or arrays."""
        texts = [valid(text) for text in texts]
        if not self._fast and max(map(len, texts), default=0) <= CUT:
            return self._ids(texts)
        return [self._long(text) if len(text) > CUT else self._fast(text, True)  # type: ignore
                for text in texts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in
                self._tokenizers.encode_batch_fast(texts, add_special_tokens=False)]

    def _long(self, text: str) -> np.ndarray:
        """Ids of a long text, made CUT characters at a time, which bounds the memory.

        It is cut before a space, where the ids are the same as without a cut, or inside a word that
        is longer than CUT. Engines that begin a text in a way of their own take it whole.
        """
        out, start = [], 0
        if not self._fast and not self._pieces_join:
            return np.array(self._ids([text])[0], self.kind)
        while start < len(text):
            end = start + CUT
            if end < len(text):
                space = text.rfind(" ", start + 1, end)
                while space > start + 1 and text[space - 1].isspace():
                    space = text.rfind(" ", start + 1, space)
                self.cut_words += space <= start + 1
                end = space if space > start + 1 else end
            part = text[start:end]
            ids = self._fast(part, not start) if self._fast else self._ids([part])[0]
            out.append(np.array(ids, self.kind))
            start = end
        return np.concatenate(out)


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


def make(spec: str, texts: Callable[[], Iterable[str]] | None = None,
         search: Sequence[Path] = (), network: bool = True) -> Tokenizer:
    """The tokenizer named by the config key `tokenizer`.

    `texts` gives the text that bpe:N is trained on; `search` names folders (a data set, a run) that
    are looked into first for the files of mistral and gpt2, which else may be downloaded.
    """
    kind, _, size = spec.partition(":")
    if spec in CONVERTED:
        for file in (Path(folder) / "tokenizer.json" for folder in search):
            if file.is_file() and vocabulary.sha256(file.read_bytes()) == CONVERTED[spec]:
                return Tokenizer.load(file)
        find = vocabulary.gpt2 if spec == "gpt2" else vocabulary.mistral
        made = find(search, network)
    elif spec == "bytes":
        model = {"type": "BPE", "vocab": BYTES, "merges": []}
        made = vocabulary.layout(model, BYTE_LEVEL, BYTE_LEVEL)
    elif kind == "bpe":
        if not size.isdecimal() or int(size) < 258:
            raise UserError(f"tokenizer {spec}: bpe:N takes a whole number of entries from 258 up "
                            "(256 bytes and the two boundary tokens), such as bpe:4096")
        if texts is None:
            raise UserError(f"tokenizer {spec} is trained on text, and none was given")
        made = vocabulary.train(int(size), texts())
    elif Path(spec).is_dir() and not (Path(spec) / "tokenizer.json").exists():
        return make(str(Path(spec) / "tokenizer.model"), texts, search)
    elif Path(spec).suffix == ".model" and Path(spec).is_file():
        made = vocabulary.sentencepiece(Path(spec).read_bytes(), spec)
    elif Path(spec).exists():
        return Tokenizer.load(spec)
    else:
        raise UserError(f"tokenizer {spec}: no such file, and not mistral, gpt2, bytes or bpe:N"
                        f"{nearest(spec, ['mistral', 'gpt2', 'bytes', 'bpe:4096'])}")
    _complete(made, spec)
    return Tokenizer(made, _dump(made), spec)


def compared(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Bytes per token on `texts`: of a tokenizer, and of gpt2 and mistral if they lie here."""
    size, found = sum(len(valid(text).encode()) for text in texts), {"this one": tokenizer}
    for name in CONVERTED:
        with contextlib.suppress(UserError):
            found[name] = make(name, network=False)
    return {name: size / max(1, sum(map(len, one._batch(texts)))) for name, one in found.items()}


# ---- the JSON alone: boundaries, byte counts, Hugging Face files

class ByteInfo(NamedTuple):
    """Per id: utf-8 bytes it decodes to, and how many of them are lost at a document's start."""

    lengths: np.ndarray
    prefix: np.ndarray
    bos: int


def sha256_of(path: Path | str) -> str:
    """Hash of a tokenizer.json as we use it, completed with what a document needs."""
    return vocabulary.sha256(_read(path)[1])


def boundaries(spec_json: dict) -> tuple[str | None, str | None]:
    """(begin, end) token of a parsed tokenizer.json: two, one in front, or none."""
    special = [entry["content"] for entry in spec_json.get("added_tokens") or []
               if entry.get("special")]
    for pair in PAIRS:
        if set(pair) <= set(special):
            return pair
    if "<|endoftext|>" in special:
        return "<|endoftext|>", None
    named = [token for token in special if not re.search("unk|pad|mask", token.lower())]
    return (named[0], None) if len(named) == 1 else (None, None)


def byte_info(path: Path | str) -> ByteInfo:
    """What decoded_bytes needs of a tokenizer.json (a file or its folder)."""
    spec, _ = _read(path)
    entries, bos = _entries(spec), boundaries(spec)[0]
    decoders = {step["type"]: step for step in _steps(spec["decoder"])}
    first = decoders.get("Metaspace", {}).get("prepend_scheme", "always") != "never"
    lengths, prefix = np.zeros((2, max(entries) + 1), np.int32)
    for i, (piece, special) in entries.items():
        if special:
            continue
        if "ByteLevel" in decoders:
            lengths[i] = len(piece if BYTES.keys() >= set(piece) else piece.encode())
        elif "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            lengths[i] = 1
        else:
            lengths[i] = len(piece.replace("▁", " ").encode())
            if "Metaspace" in decoders:  # this decoder drops every space of the first token
                prefix[i] = piece.count("▁") * first
            elif "Strip" in decoders:
                prefix[i] = piece.startswith("▁")
    return ByteInfo(lengths, prefix, next(i for i, (piece, _) in entries.items() if piece == bos))


def decoded_bytes(ids: np.ndarray, info: ByteInfo) -> int:
    """Utf-8 bytes that the targets ids[..., 1:] decode to; ids[..., :1] is only context."""
    target = ids[..., 1:]
    found = info.lengths[target] - info.prefix[target] * (ids[..., :-1] == info.bos)
    return int(found.sum(dtype=np.int64))


def write_hf_files(tokenizer_json: Path | str, folder: Path | str, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer.

    PreTrainedTokenizerFast, since other classes rebuild the pipeline and ignore parts of the file.
    """
    spec, data = _read(tokenizer_json)
    bos, eos = boundaries(spec)
    special = [piece for piece, special in _entries(spec).values() if special]
    model = spec["model"]
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    padding = next((piece for piece in special if "pad" in piece.lower()), None)
    tokens = {"bos_token": bos, "eos_token": eos or bos, "unk_token": unknown, "pad_token": padding}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        **{name: token for name, token in tokens.items() if token is not None},
    }
    (Path(folder) / "tokenizer.json").write_bytes(data)
    (Path(folder) / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path | str) -> tuple[dict, bytes]:
    """(parsed, bytes) of a tokenizer.json, completed with what a document needs."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one")
    data = file.read_bytes()
    try:
        spec = json.loads(data)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); give a tokenizer.json") from None
    return (spec, _dump(spec)) if _complete(spec, str(file)) else (spec, data)


def _complete(spec: dict, where: str) -> bool:
    """Check a parsed tokenizer.json and add what is missing; True if anything was changed."""
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or not model.get("vocab"):
        raise UserError(f"{where} holds no tokenizer model; give the tokenizer.json of a BPE or "
                        "unigram tokenizer")
    model.setdefault("type", "BPE" if "merges" in model else "Unigram")
    known = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
    decoders = {step["type"] for step in _steps(spec.get("decoder"))}
    if model["type"] not in ("BPE", "Unigram") or not decoders or decoders - known:
        raise UserError(f"{where}: a {model['type']} tokenizer with decoder "
                        f"{' '.join(sorted(decoders)) or 'none'} is not supported; take a BPE or "
                        "unigram tokenizer of the LLaMA or GPT family")
    small = {"vocab": 0, "merges": 0}  # these stay as they are
    before = json.dumps({**spec, "model": model | small})
    spec |= {"truncation": None, "padding": None}
    if model["type"] == "BPE":
        model["dropout"] = None  # it would make encoding random
    if boundaries(spec)[0] is None:
        size = max(_entries(spec)) + 1
        spec["added_tokens"] = [*(spec.get("added_tokens") or []), vocabulary.special("<s>", size),
                                vocabulary.special("</s>", size + 1)]
    bos = boundaries(spec)[0]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "tokens": [bos], "ids": [
            i for i, (piece, _) in _entries(spec).items() if piece == bos]}}}
    if model["type"] == "Unigram":
        _guard(spec)
    return json.dumps({**spec, "model": model | small}) != before


def _guard(spec: dict) -> None:
    """Cut text that spells a special or byte piece: a unigram model would find it in its list."""
    names = [re.escape(piece[0]) + f"(?={re.escape(piece[1:])})"
             for piece, special in _entries(spec).values() if special]
    guard = {"type": "Split", "pattern": {"Regex": "|".join([*names, "<(?=0x[0-9A-F]{2}>)"])},
             "behavior": "MergedWithPrevious", "invert": False}
    steps = _steps(spec.get("pre_tokenizer"))
    if guard not in steps:
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, guard]}


def _steps(part: dict | None) -> list[dict]:
    """The steps of a decoder, pre-tokenizer or post-processor, its sequences opened."""
    if not part:
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = next(value for value in part.values() if isinstance(value, list))
    return [step for item in inner for step in _steps(item)]


def _entries(spec: dict) -> dict[int, tuple[str, bool]]:
    """id -> (piece, is it special) of every id; added tokens override the model's."""
    vocab = spec["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return {i: (piece, False) for piece, i in pieces.items()} | {
        e["id"]: (e["content"], bool(e.get("special"))) for e in spec.get("added_tokens") or []}


def _dump(spec: dict) -> bytes:
    return (json.dumps(spec, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
