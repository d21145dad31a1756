"""What a client is told of a text as it comes: whole characters, no half of a stop string, no half
of a call; joined, the parts of a stream are the answer that comes at once.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from plainllama.generation.batching import Score
from plainllama.generation.generate import TextStream, begun_marks
from plainllama.settings import UserError
from plainllama.tokens.chat import CALL, Chat
from plainllama.tokens.fast_bpe import BYTES
from plainllama.tokens.tokenizer import Tokenizer

MARKS = (CALL, "\n" + CALL)  # a line break before a call belongs to it


class Part(NamedTuple):
    """What is new of an answer."""

    text: str
    scores: list[Score]
    calls: list[dict]  # {name, arguments}, with the end
    ended: str  # '' as long as it goes on, else stop | length | tool_calls, or error: ...


class Answer:
    """A text as a client hears of it: `tell` is called with each Part, in the batch's thread.

    `forced`: what the answer begins with, whatever the model would say. With `chat` calls are taken
    out of the text."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str],
                 tell: Callable[[Part], None], chat: Chat | None = None,
                 forced: list[int] | None = None):
        self.stream, self.tell, self.chat = TextStream(tokenizer, prompt, stops, False), tell, chat
        self.told, self.scores = 0, []  # type: ignore[var-annotated]
        if forced:
            self.stream.push(*forced)

    def heard(self, token: int, score: Score | None) -> bool:
        """Take the next token; True once a stop string came."""
        if score:
            self.scores.append(score)
        stopped = self.stream.push(token)
        self.send(self.stream.text[:self.sure()], [], "")
        return stopped

    def ended(self, reason: str) -> None:
        """Tell the rest, and why it ended."""
        if reason.startswith("error"):
            self.tell(Part("", [], [], reason))
            return
        if self.stream.push():
            reason = "stop"
        text, calls = self.stream.text, []
        if self.chat and CALL in text:
            try:
                calls = self.chat.parse(text).get("tool_calls", [])
            except ValueError:
                pass  # it was cut, or has another form: it stays text
            else:
                text = text[:text.index(CALL)].removesuffix("\n")
        ended = {"eos": "stop"}.get(reason, reason)
        if calls and ended == "stop":
            ended = "tool_calls"
        self.send(text, calls, ended)

    def sure(self) -> int:
        """Count the characters that will stay as they are, whatever comes."""
        text, stops = self.stream.text, self.stream.stops
        end = len(text) - begun_marks(text, stops)
        if self.chat:
            call = text.find(CALL)
            if call >= 0:
                end = min(end, call - int(text[:call].endswith("\n")))
            end = min(end, len(text) - begun_marks(text, MARKS))
        return end

    def send(self, text: str, calls: list[dict], ended: str) -> None:
        """Tell what is new of the text up to here; scores go with the text that they are of."""
        new = text[self.told:]
        if new or ended:
            self.told = len(text)
            scores, self.scores = self.scores, []
            self.tell(Part(new, scores, calls, ended))


class Spelling:
    """What single tokens are in bytes."""

    def __init__(self, tokenizer: Tokenizer, spec: dict):
        self.names = {i: name for name, i in tokenizer.special_ids.items()}
        self.engine = tokenizer._tokenizers
        self.byte_level = "ByteLevel" in str(spec.get("decoder"))

    def bytes_of(self, token: int) -> bytes:
        """Give the bytes that a token stands for."""
        piece = self.engine.id_to_token(token) or ""
        if token in self.names:
            return piece.encode()
        if self.byte_level and BYTES.keys() >= set(piece):
            return bytes(BYTES[character] for character in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """Spell a token; one that is no text by itself as OpenAI does, bytes:\\xe2."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def forced_call(name: str | None) -> str:
    """What an answer that must call begins with: any function, or the one of a name."""
    if name is None:
        return CALL
    if '"' in name or "\\" in name:
        raise UserError(f"a function cannot be named {name!r}")
    return f'{CALL}{{"name": "{name}", "arguments": '
