"""Text <-> ids: what reads and applies a tokenizer.json.

tokenizer.json is the tokenizer of a data set, a run and a checkpoint. Its ids are the truth;
tiktoken is a faster engine for them, used once it was seen to agree. What
train.py needs (boundaries, byte counts, Hugging Face files) is read from the JSON alone: the
tokenizer libraries are imported only where text is encoded or decoded. vocabulary.py makes the JSON
of tokenizers that have none.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from plainllama.settings import UserError, nearest
from plainllama.tokens import vocabulary
from plainllama.tokens.fast_bpe import _tiktoken
from plainllama.tokens.tokenizer_json import _complete, _dump, _entries, _read, _steps, boundaries
from plainllama.tokens.vocabulary import BYTE_LEVEL, BYTES, valid

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
        ids = {piece: i for i, (piece, _) in _entries(spec).items()}
        bos, eos = boundaries(spec)
        self.json_bytes = json_bytes
        self.sha256 = hashlib.sha256(json_bytes).hexdigest()
        self.vocab_size = max(ids.values()) + 1
        self.bos_token = str(bos)
        self.bos_id: int = ids[self.bos_token]
        self.eos_id: int | None = ids[eos] if eos else None
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
        last = [] if self.eos_id is None else [self.eos_id]
        out = []
        for ids in self._batch(texts):
            out.append(np.empty(1 + len(ids) + len(last), self.kind))
            out[-1][0], out[-1][1:1 + len(ids)], out[-1][1 + len(ids):] = self.bos_id, ids, last
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


def make_tokenizer(spec: str, texts: Callable[[], Iterable[str]] | None = None,
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
        return make_tokenizer(str(Path(spec) / "tokenizer.model"), texts, search)
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
            found[name] = make_tokenizer(name, network=False)
    return {name: size / max(1, sum(map(len, one._batch(texts)))) for name, one in found.items()}
