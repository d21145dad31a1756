"""One thread that owns the model: texts join and leave the batch that it decodes.

Each turn feeds some pieces of prompts, those of the text that has waited longest first, and then
one token of every text that goes on; so no stream waits for longer than a turn.
"""

import math
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model import LLaMA
from plainllama.generation.generate import NOT_FINITE, choose
from plainllama.generation.slots import Slot, Slots
from plainllama.settings import Sampling


class Full(Exception):
    """So many texts wait already."""


class Score(NamedTuple):
    """How likely a token was, by the model alone: log-probabilities in nats."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens, in order


class Listener(Protocol):
    """Who hears of a text, in the thread of the batch."""

    def heard(self, token: int, score: Score | None) -> bool:
        """Take the next token; True ends the text."""

    def ended(self, reason: str) -> None:
        """Hear why it ended: eos | stop | length, or an error: what went wrong."""


@dataclass(eq=False)
class Text:
    """One text that is asked for."""

    ids: list[int]  # of its prompt
    room: int  # how many tokens may be drawn
    listener: Listener
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    top: int | None = None  # also score each token, beside so many others
    score_prompt: bool = False
    pool: bool = False  # its mean state is asked for, and no token
    # as it goes on
    gone: bool = False  # nobody wants it any more
    cached: int = 0  # tokens of the prompt that were there
    new: list[int] = field(default_factory=list)
    prompt_scores: list[Score] = field(default_factory=list)  # from its second token on
    state: Tensor | None = None  # (C,) the sum over its tokens so far, then their mean
    slot: Slot | None = None
    draws: Tensor | None = None
    seen: Tensor | None = None
    asked_at: float = field(default_factory=time.monotonic)


class Batch:
    """The texts of a server, decoded side by side in up to `places` places, while at most `queue`
    of them wait."""

    def __init__(self, model: LLaMA, vocab_size: int, places: int, queue: int):
        self.slots, self.vocab_size, self.queue = Slots(model, places), vocab_size, queue
        self.model, self.block_size = model, model.config.block_size
        self.waiting: deque[deque[Text]] = deque()  # requests, whose turn goes round
        self.begun: Text | None = None  # whose prompt is being fed
        self.running: list[Text] = []
        self.changed = threading.Condition()
        self.closed = False
        self.counts: dict[str, float] = defaultdict(float)  # for /metrics
        threads = torch.get_num_threads()  # which a new thread does not take over
        self.thread = threading.Thread(target=self.work, args=(threads,), daemon=True)
        self.thread.start()

    # ---- called by other threads

    def add(self, texts: list[Text]) -> None:
        """Ask for texts; Full if the queue has no room for all of them."""
        with self.changed:
            if self.load()[1] + len(texts) > self.queue:
                raise Full
            self.waiting.append(deque(texts))
            self.changed.notify()

    def cancel(self, texts: list[Text]) -> None:
        """Give texts up: their places are free within a turn, and nobody hears of them."""
        with self.changed:
            for text in texts:
                text.gone = True
            self.changed.notify()

    def load(self) -> tuple[int, int]:
        """Count the texts in the batch, and those that wait."""
        return sum(slot.busy for slot in self.slots.all), sum(map(len, list(self.waiting)))

    def close(self) -> None:
        """End the thread; texts that go on hear nothing more."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    # ---- the thread

    def work(self, threads: int) -> None:
        """Go on until closed."""
        torch.set_num_threads(threads)
        while True:
            with self.changed:
                while not (self.waiting or self.begun or self.running or self.closed):
                    self.changed.wait()
                if self.closed:
                    return
                self.leave_gone()
            with torch.no_grad():
                self.feed()
                self.decode()

    def leave_gone(self) -> None:
        """Free what nobody wants any more."""
        there = [text for texts in self.waiting for text in texts] + self.running
        there += [self.begun] if self.begun else []
        self.counts["cancelled"] += sum(text.gone for text in there)
        for text in there:
            if text.gone:
                self.free(text)
        kept = [deque(text for text in texts if not text.gone) for texts in self.waiting]
        self.waiting = deque(texts for texts in kept if texts)
        self.running = [text for text in self.running if not text.gone]
        if self.begun and self.begun.gone:
            self.begun = None

    def free(self, text: Text) -> None:
        """Give a text's place back, if it has one."""
        if text.slot:
            self.slots.release(text.slot)
        text.slot = None

    def end(self, text: Text, reason: str) -> None:
        """End a text, and tell its listener."""
        self.free(text)
        self.counts["prompt_tokens"] += len(text.ids)
        self.counts["cached_tokens"] += text.cached
        self.counts["new_tokens"] += len(text.new)
        try:
            text.listener.ended(reason)
        except Exception as error:  # a listener to an error has nothing to read
            text.listener.ended(problem(error))

    def next(self) -> Text:
        """Take the next text of the request whose turn it is, so that one which asks for many
        does not keep the others waiting for all of them."""
        texts = self.waiting.popleft()
        text = texts.popleft()
        if texts:
            self.waiting.append(texts)
        return text

    def feed(self) -> None:
        """Feed as many tokens of prompts as a piece has."""
        fed = 0
        while fed < self.slots.piece:
            with self.changed:
                if not self.begun and self.waiting and self.slots.free():
                    self.begun = self.next()
            if (text := self.begun) is None or text.gone:
                return
            try:
                fed += self.feed_piece(text)
            except Exception as error:  # of one text; the others go on
                self.begun = None
                self.end(text, problem(error))

    def feed_piece(self, text: Text) -> int:
        """Feed the next piece of a text's prompt and, if it is the last, draw the first token.
        The number of its tokens."""
        if text.slot is None:
            text.slot = self.slots.take(text.ids, reuse=not (text.score_prompt or text.pool))
            text.cached = text.slot.length
        at = text.slot.length
        piece = text.ids[at:at + self.slots.piece]
        states = self.slots.feed(text.slot, piece)
        if text.pool:
            summed = states.float().sum(0)
            text.state = summed if text.state is None else text.state + summed
        if text.score_prompt:
            following = text.ids[at + 1:at + 1 + len(piece)]
            logits = self.model.lm_head(states[:len(following)])[:, :self.vocab_size].float()
            text.prompt_scores += [scored(row, token, text.top or 0)
                                   for row, token in zip(logits, following, strict=True)]
        if text.slot.length == len(text.ids):
            self.begun = None
            if text.state is not None:
                text.state = (text.state / len(text.ids)).cpu()
            if text.room == 0:
                self.end(text, "length")
            else:
                self.draw([text], self.model.lm_head(states[-1:]))
                self.counts["first_tokens"] += 1
                self.counts["seconds_to_first_tokens"] += time.monotonic() - text.asked_at
        return len(piece)

    def decode(self) -> None:
        """Draw the next token of every text that goes on."""
        texts, self.running = self.running, []
        if not texts:
            return
        try:
            slots = [text.slot for text in texts if text.slot]
            self.draw(texts, self.slots.step(slots, [text.new[-1] for text in texts]))
        except Exception as error:
            self.running = []
            for text in texts:
                if text.slot:  # else it has ended
                    self.end(text, problem(error))

    def draw(self, texts: list[Text], logits: Tensor) -> None:
        """Draw a token of each text by its logits (B, V); the texts that then go on are running."""
        logits = logits[:, :self.vocab_size].float()
        tokens = torch.cat([self.choice(text, row[None])
                            for text, row in zip(texts, logits, strict=True)]).tolist()
        highest = logits.amax(-1).tolist()
        for text, token, high, row in zip(texts, tokens, highest, logits, strict=True):
            if not math.isfinite(high):
                self.end(text, f"error: {NOT_FINITE}")
                continue
            if token in text.stop_ids:
                self.end(text, "eos")
                continue
            text.new.append(token)
            score = None if text.top is None else scored(row, token, text.top)
            try:
                stop = text.listener.heard(token, score)
            except Exception as error:
                self.end(text, problem(error))
                continue
            if stop:
                self.end(text, "stop")
            elif len(text.new) == text.room:
                self.end(text, "length")
            else:
                self.running.append(text)

    def choice(self, text: Text, logits: Tensor) -> Tensor:
        """Choose the next token (1,) of a text by its logits (1, V), as generate() does."""
        number = len(text.new)
        if text.draws is None:
            source = torch.Generator().manual_seed(text.seed)
            text.draws = torch.zeros(self.block_size).uniform_(generator=source).to(logits.device)
            text.seen = torch.zeros_like(logits, dtype=torch.bool)
            text.seen[0, text.ids] = True
        assert text.seen is not None
        token = choose(logits, text.sampling, text.seen, text.draws[number:number + 1])
        text.seen[0, token] = True
        return token


def scored(logits: Tensor, token: int, top: int) -> Score:
    """Score a token by logits (V,), which are finite, beside the `top` likeliest."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    return Score(token, logprobs[token].item(),
                 list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def problem(error: Exception) -> str:
    """Say what went wrong within the server."""
    if isinstance(error, torch.OutOfMemoryError):
        return "error: the device has no memory for this text now; ask again later"
    return f"error: {type(error).__name__}: {error}"
