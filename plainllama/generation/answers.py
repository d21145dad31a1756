"""What a client is told of a text as it comes: whole characters, no half of a stop string, no half
of a call; joined, the parts of a stream are the answer that comes at once.
"""

import contextlib
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from plainllama.generation.batching import Score
from plainllama.generation.generate import TextStream, begun_marks
from plainllama.tokens.chat import CALL, THINK, THOUGHT, Chat, as_json
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import list_entries, list_steps
from plainllama.tokens.vocabulary import BYTES

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
        self.told = 0  # characters
        self.scores: list[Score] = []
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
        text = self.stream.text
        calls: list[dict] = []
        if self.chat and CALL in text:
            with contextlib.suppress(ValueError):  # it was cut, or has another form: it stays text
                calls = self.chat.parse(text).get("tool_calls", [])
            if calls:
                behind = max(text.find(THOUGHT), 0) if text.startswith(THINK) else 0
                text = text[:text.index(CALL, behind)].removesuffix("\n")
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

    def __init__(self, tokenizer: Tokenizer):
        spec = json.loads(tokenizer.json_bytes)
        self.pieces = {i: piece for i, (piece, _) in list_entries(spec).items()}
        self.special = set(tokenizer.special_ids.values())
        self.byte_level = any(step["type"] == "ByteLevel" for step in list_steps(spec["decoder"]))

    def longest(self) -> int:
        """Count the characters of the longest token."""
        return max(map(len, self.pieces.values()))

    def bytes_of(self, token: int) -> bytes:
        """Give the bytes that a token stands for."""
        piece = self.pieces.get(token, "")
        if token in self.special:
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
    return CALL if name is None else f'{CALL}{{"name": {as_json(name)}, "arguments": '
