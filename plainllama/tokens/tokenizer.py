"""Text <-> ids: what reads and applies a tokenizer.json.

tokenizer.json is the tokenizer of a data set, a run and a checkpoint. Its ids are the truth;
tiktoken is a faster engine for them, used once it was seen to agree. What train.py needs
(boundaries, byte counts, Hugging Face files) is read from the JSON alone: the tokenizer libraries
are imported only where text is encoded or decoded. vocabulary.py makes the JSON of tokenizers that
have none.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from plainllama.files import sha256, sha256_bytes, steps_of
from plainllama.settings import UserError, nearest
from plainllama.tokens import tokenizer_json, vocabulary
from plainllama.tokens.fast_bpe import make_fast_encoder
from plainllama.tokens.shards import token_dtype

# sha256 of the tokenizer.json made of them: a data set or run that holds it needs nothing else.
CONVERTED = {
    "mistral": "16f61c723a2f78c7b6a6ed49165939baa603259f8b2d7eb00ba0bc6b8ca6bb70",
    "gpt2": "0a5a52ea3255d7d0767b24dfe7130cad0fdb572a60343f7e3b5b572b5572cdcf",
}
CUT = 1 << 20  # characters encoded at a time; a word that is longer is cut
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
        entries = tokenizer_json.list_entries(spec)
        ids = {piece: i for i, (piece, _) in entries.items()}
        self.special_ids = {piece: i for i, (piece, is_special) in entries.items() if is_special}
        bos, eos = tokenizer_json.boundaries(spec)
        self.json_bytes = json_bytes
        self.sha256 = sha256_bytes(json_bytes)
        self.vocab_size = max(ids.values()) + 1
        self.bos_token = str(bos)
        self.bos_id: int = ids[self.bos_token]
        self.eos_id: int | None = ids[eos] if eos else None
        # Without an end token a document ends where the next one begins.
        self.end_id: int = self.bos_id if self.eos_id is None else self.eos_id
        chat = {name: i for name, i in self.special_ids.items() if name in tokenizer_json.CHAT}
        chat = chat if len(chat) == len(tokenizer_json.CHAT) else {}
        # what ends a text, and an answer of a dialog
        self.stop_ids = frozenset({self.end_id, chat.pop("<|end|>", self.end_id)})
        self.roles = set(chat.values())  # what messages of dialogs begin with
        self.kind = token_dtype(self.vocab_size)
        self.base = ""  # sha256 of the tokenizer.json that this one was made of, for dialogs
        self.template = ""  # how dialogs are written, '' of text
        self.cut_words = 0  # how many were longer than CUT so far
        decoders = tokenizer_json.list_steps(spec["decoder"])
        self._pieces_join = {step["type"] for step in decoders} == {"ByteLevel"}
        self._fast = make_fast_encoder(spec, self._tokenizers.model, self.kind)
        # A text's first word begins with a space for some tokenizers (Metaspace "first"), and not
        # so behind a control token: there another engine, for which no text is the first
        self._behind = self._tokenizers
        if (later := tokenizer_json.never_first(spec)) is not spec:
            self._behind = Engine.from_str(json.dumps(later))
            self._behind.encode_special_tokens = True
        self.check([SAMPLE])

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, or the one that a folder holds, and the template beside it."""
        made = cls(*tokenizer_json.read_spec(path), str(path))
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        made.template = tokenizer_json.read_template(folder)
        return made

    @property
    def engine(self) -> str:
        """Name the library that encodes: tiktoken or tokenizers."""
        return "tiktoken" if self._fast else "tokenizers"

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json into `folder`."""
        (Path(folder) / "tokenizer.json").write_bytes(self.json_bytes)

    def check(self, texts: Iterable[str]) -> bool:
        """Compare the engine's ids with tokenizer.json's own; False, and given up, if other."""
        same = all(list(self._part(text, True)) == self._ids([text])[0] for text in texts)
        if not same:
            self.give_up()
        return same

    def give_up(self) -> None:
        """Use the `tokenizers` library from now on."""
        self._fast = None

    def encode(self, text: str) -> list[int]:
        """Encode `text` alone, without begin and end."""
        return [int(i) for i in self._batch([text])[0]]

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Encode whole documents, each (n,) of dtype `kind` with its begin and end token."""
        end = [] if self.eos_id is None else [self.eos_id]
        return [np.concatenate([[self.bos_id], ids, end], dtype=self.kind, casting="unsafe")
                for ids in self._batch(texts)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode `ids` as from the start of a document; special tokens are left out."""
        return self._tokenizers.decode([int(i) for i in ids], skip_special_tokens=True)

    def encode_behind(self, text: str) -> Sequence[int] | np.ndarray:
        """Encode a text that stands behind a control token, by itself."""
        if self._behind is self._tokenizers:
            return self._batch([text])[0]
        return self._behind.encode(vocabulary.valid(text), add_special_tokens=False).ids

    def decode_behind(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode what encode_behind() gave; special tokens are left out."""
        return self._behind.decode([int(i) for i in ids], skip_special_tokens=True)

    def _batch(self, texts: list[str]) -> list:
        """Encode each text alone; the ids as lists or arrays."""
        texts = [vocabulary.valid(text) for text in texts]
        if self._fast or any(len(text) > CUT for text in texts):
            return [self._long(text) for text in texts]
        return self._ids(texts)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Encode by tokenizer.json itself, many texts at once."""
        return [e.ids for e in self._tokenizers.encode_batch_fast(texts, add_special_tokens=False)]

    def _part(self, text: str, begins: bool) -> list[int] | np.ndarray:
        """Encode a text or, unless it `begins` one, a later part of a text."""
        return self._fast(text, begins) if self._fast else self._ids([text])[0]

    def _long(self, text: str) -> list[int] | np.ndarray:
        """Encode a text of any length, CUT characters at a time, which bounds the memory.

        It is cut before a space, where the ids are the same as without a cut, or inside a word that
        is longer than CUT, which is counted. Engines that begin a text in a way of their own take
        it whole.
        """
        if len(text) <= CUT or not (self._fast or self._pieces_join):
            return self._part(text, True)
        parts, start = [], 0
        while start < len(text):
            piece = text[start:start + CUT]
            if start + CUT < len(text):
                whole_words = re.match(r"(?s).+\S(?= )", piece)
                if whole_words:
                    piece = whole_words[0]
                else:
                    self.cut_words += 1
            parts.append(self._part(piece, start == 0))
            start += len(piece)
        return np.concatenate(parts, dtype=self.kind, casting="unsafe")


# ---- the config key `tokenizer`

def make_tokenizer(name: str, texts: Callable[[], Iterable[str]] | None = None,
                   search: Sequence[Path] = (), network: bool = True) -> Tokenizer:
    """Make the tokenizer that the config key `tokenizer` names.

    `texts` gives the text that bpe:N is trained on; `search` names folders (a data set, a run) that
    are looked into first for the files of mistral and gpt2, which else may be downloaded.
    """
    kind = "bpe:N" if name.partition(":")[0] == "bpe" else name
    if kind not in MAKERS:
        path = Path(name)
        if name and path.is_dir() and not (path / "tokenizer.json").exists():
            steps = steps_of(path)  # of a run
            inner = steps[0] if steps else path / "tokenizer.model"
            return make_tokenizer(str(inner), texts, search)
        if not name or not path.exists():
            raise UserError(f"tokenizer {name!r}: no such file, and not mistral, gpt2, bytes or "
                            f"bpe:N{nearest(name, ['mistral', 'gpt2', 'bytes', 'bpe:4096'])}")
        kind = "a .model" if path.suffix == ".model" and path.is_file() else "a tokenizer.json"
    return Tokenizer(*MAKERS[kind](name, texts, search, network), name)


def find_published(name: str, texts, search: Sequence[Path], network: bool) -> tuple[dict, bytes]:
    """Take mistral's or gpt2's tokenizer.json from a folder that has it, or convert their files."""
    for folder in search:
        file = Path(folder) / "tokenizer.json"
        if file.is_file() and sha256(file) == CONVERTED[name]:
            return tokenizer_json.read_spec(file)
    convert = {"mistral": vocabulary.mistral, "gpt2": vocabulary.gpt2}[name]
    return tokenizer_json.complete(convert(search, network), name)


def train_bpe(name: str, texts: Callable, *_) -> tuple[dict, bytes]:
    """Train the byte-level BPE that bpe:N asks for, on the text that `texts` gives."""
    size = name.partition(":")[2]
    if not size.isdecimal() or not 258 <= int(size) < 1 << 31:
        raise UserError(f"tokenizer {name}: bpe:N takes a whole number from 258 to 2^31 - 1, as "
                        "bpe:4096")
    return tokenizer_json.complete(vocabulary.train(int(size), texts()), name)


# (name, texts, search, network) of make_tokenizer -> a parsed tokenizer.json and its bytes. To add
# a kind: an entry here, how make_tokenizer knows it, its name in the key's help.
MAKERS: dict[str, Callable[..., tuple[dict, bytes]]] = {
    "mistral": find_published,
    "gpt2": find_published,
    "bytes": lambda name, *_: tokenizer_json.complete(vocabulary.single_bytes(), name),
    "bpe:N": train_bpe,
    "a .model": lambda name, *_: tokenizer_json.complete(
        vocabulary.convert_model(Path(name).read_bytes(), name), name),
    "a tokenizer.json": lambda name, *_: tokenizer_json.read_spec(name),
}


def compared(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Compare bytes per token on `texts`: a tokenizer's, and gpt2's and mistral's if they lie here.

    Returns name -> bytes per token.
    """
    tokenizers = {"this one": tokenizer}
    for name in CONVERTED:
        with contextlib.suppress(UserError):
            tokenizers[name] = make_tokenizer(name, network=False)
    size = sum(len(vocabulary.valid(text).encode()) for text in texts)
    return {name: size / max(1, sum(len(ids) for ids in each._batch(texts)))
            for name, each in tokenizers.items()}
