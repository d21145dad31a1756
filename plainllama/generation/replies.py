"""What a client gets for one request: its texts in the batch, and OpenAI's JSON of them, at once or
in chunks."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from plainllama.generation.answers import Answer, Part
from plainllama.generation.batching import Score, Text
from plainllama.generation.generate import row_seed
from plainllama.generation.protocol import Asked, Model, calls_of

OBJECTS = {"chat": ("chatcmpl-", "chat.completion"), "completions": ("cmpl-", "text_completion"),
           "embeddings": ("embd-", "list")}


class Pooled:
    """A listener to a text of which the state alone is asked for."""

    def __init__(self, tell):
        self.tell = tell

    def heard(self, token: int, score: Score | None) -> bool:
        """There is no token."""
        return True

    def ended(self, reason: str) -> None:
        """Tell that it is done."""
        self.tell(Part("", [], [], reason))


class Reply:
    """The answer to a request. It is made in the event loop; choice i is texts[i]."""

    def __init__(self, model: Model, kind: str, asked: Asked):
        self.model, self.kind, self.asked = model, kind, asked
        self.queue: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        prefix, self.object = OBJECTS[kind]
        self.id, self.created = prefix + secrets.token_hex(12), int(time.time())
        self.problem = ""  # what went wrong within
        self.parts: list[list[Part]] = []
        self.texts: list[Text] = []
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        for prompt in asked.prompts:
            for _ in range(asked.n):
                self.texts.append(self.text(prompt, seed))
                self.parts.append([])

    def text(self, prompt: list[int], seed: int) -> Text:
        """Make the next text."""
        asked, model, number = self.asked, self.model, len(self.texts)

        def tell(part: Part) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (number, part))

        if self.kind == "embeddings":
            return Text(prompt, 0, Pooled(tell), pool=True)
        forced = model.forced_ids(asked)
        before = prompt[:len(prompt) - len(forced)]
        answer = Answer(model.tokenizer, before, asked.stops, tell,
                        model.chat if asked.tools else None, forced)
        room = min(asked.max_tokens, model.block_size - len(prompt))
        return Text(prompt, room, answer, asked.sampling, row_seed(seed, number), asked.stop_ids,
                    asked.top, score_prompt=asked.echo and asked.top is not None)

    async def each(self) -> AsyncIterator[tuple[int, Part]]:
        """Give the parts of all choices, until all have ended, or one with a problem."""
        going = len(self.texts)
        while going and not self.problem:
            number, part = await self.queue.get()
            if part.ended.startswith("error"):
                self.problem = part.ended.removeprefix("error: ")
            else:
                yield number, part
            going -= int(part.ended != "")

    # ---- at once

    async def gathered(self) -> None:
        """Wait for all of it."""
        async for number, part in self.each():
            self.parts[number].append(part)

    def body(self) -> dict:
        """Write the whole answer."""
        choices = [self.choice(number, parts) for number, parts in enumerate(self.parts)]
        return {"id": self.id, "object": self.object, "created": self.created,
                "model": self.model.name, "choices": choices, "usage": self.usage()}

    def choice(self, number: int, parts: list[Part]) -> dict:
        """Write a choice."""
        text = "".join(part.text for part in parts)
        scores = [score for part in parts for score in part.scores]
        if self.kind == "completions":
            echo = self.echo(number)
            return {"index": number, "text": echo + text, "finish_reason": parts[-1].ended,
                    "logprobs": self.logprobs(number, scores, 0)}
        calls = calls_of(parts[-1].calls, False)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {"index": number, "message": message, "finish_reason": parts[-1].ended,
                "logprobs": self.logprobs(number, scores, 0)}

    def echo(self, number: int) -> str:
        """Give the prompt as text, if it is asked for."""
        ids = self.texts[number].ids
        return self.model.tokenizer.decode(ids) if self.asked.echo else ""

    def logprobs(self, number: int, scores: list[Score], offset: int) -> dict | None:
        """Write scores, those of an echoed prompt in front; None if nobody asked."""
        if self.asked.top is None:
            return None
        if self.kind == "chat":
            return self.model.logprobs_of_chat(scores)
        text, ids = self.texts[number], [score.token for score in scores]
        before: list[Score | None] = []
        if self.asked.echo and offset == 0:
            before, ids = [None, *text.prompt_scores], text.ids + ids
        return self.model.logprobs_of_text([*before, *scores], ids, offset)

    def usage(self) -> dict:
        """Count what went in, each prompt once, and what came out."""
        prompt, new = sum(map(len, self.asked.prompts)), sum(len(text.new) for text in self.texts)
        cached = sum(text.cached for text in self.texts[::self.asked.n])
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": cached}}

    # ---- in chunks

    async def chunks(self) -> AsyncIterator[dict]:
        """Write the answer as it comes."""
        offsets: dict[int, int] = {}
        if self.kind == "chat":
            for number in range(len(self.texts)):
                yield self.chunk({"index": number, "delta": {"role": "assistant", "content": ""},
                                  "finish_reason": None, "logprobs": None})
        async for number, part in self.each():
            if self.kind == "completions":
                offset = offsets.get(number, 0)
                text = (self.echo(number) if number not in offsets else "") + part.text
                logprobs = self.logprobs(number, part.scores, offset)
                offsets[number] = offset + len(text)
                yield self.chunk({"index": number, "text": text, "logprobs": logprobs,
                                  "finish_reason": part.ended or None})
                continue
            logprobs = self.logprobs(number, part.scores, 0) if part.scores else None
            if part.text or part.scores:
                yield self.chunk({"index": number, "delta": {"content": part.text},
                                  "finish_reason": None, "logprobs": logprobs})
            if part.calls:
                calls = calls_of(part.calls, True)
                yield self.chunk({"index": number, "delta": {"tool_calls": calls},
                                  "finish_reason": None, "logprobs": None})
            if part.ended:
                yield self.chunk({"index": number, "delta": {}, "finish_reason": part.ended,
                                  "logprobs": None})
        if self.problem:
            yield {"error": {"message": self.problem, "type": "server_error", "param": None,
                             "code": None}}
        elif self.asked.include_usage:
            yield self.chunk(None) | {"usage": self.usage()}

    def chunk(self, choice: dict | None) -> dict:
        """Write one chunk."""
        kind = "chat.completion.chunk" if self.kind == "chat" else self.object
        usage = {"usage": None} if self.asked.include_usage else {}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name,
                "choices": [choice] if choice else []} | usage
