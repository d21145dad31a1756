"""The decode loop: ids -> ids, ids -> text as it comes, ids -> states.

Text i of a seed is the same alone and in a batch: every row has its own generator, and a row of a
batch computes what it would compute alone (to rounding).
"""

import ast
import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from model import ANY_SHAPE, KVCache, LLaMA
from plainllama import parallel
from plainllama.settings import Sampling, Settings, UserError
from plainllama.tokens.chat import Chat
from plainllama.tokens.rows import FitRows, Rows
from plainllama.tokens.templates import chat_of
from plainllama.tokens.tokenizer import Tokenizer

TINY = torch.finfo(torch.float32).tiny  # a smaller number would be 0 there
HALF = "\ufffd"  # what the bytes of an unfinished character decode to
NOT_FINITE = "what the model computes is not finite; take an earlier checkpoint or --dtype=fp32"
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}  # of --stop
# step() compiled, and the one cache that it is for
Compiled = tuple[KVCache, Callable[[LLaMA, Tensor, KVCache], Tensor]]


# ---- one token

def allowed(logits: Tensor, s: Sampling) -> Tensor:
    """Divide logits (B, V) by the temperature, and put those of tokens that must not be drawn at
    -inf."""
    logits = logits - logits.amax(-1, keepdim=True)  # <= 0: dividing them cannot overflow
    logits = logits / max(s.temperature, TINY)
    if s.top_k:
        least = logits.topk(min(s.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if s.top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= max(s.top_p, TINY)  # those before it, if any, are enough
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    p = logits.softmax(-1)
    return logits.masked_fill(p < s.min_p * p.amax(-1, keepdim=True), -torch.inf)


def choose(logits: Tensor, s: Sampling, seen: Tensor, draw: Tensor) -> Tensor:
    """Choose the next token (B,) of every row by its logits (B, V) and its uniform number in `draw`
    (B,).

    `seen` (B, V) marks the tokens of a row so far; their penalty is CTRL's
    (https://arxiv.org/abs/1909.05858).
    """
    if s.repetition_penalty != 1:
        less = torch.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
        logits = torch.where(seen, less, logits)
    if s.temperature == 0:
        return logits.argmax(-1)
    if torch.are_deterministic_algorithms_enabled():
        logits, draw = logits.cpu(), draw.cpu()  # a GPU's cumsum refuses
    total = allowed(logits, s).softmax(-1).cumsum(-1)
    # The factor keeps the sought value below the last one in spite of rounding; of logits that are
    # not finite the last token comes.
    sought = draw[:, None] * (1 - 1e-6) * total[:, -1:]
    token = torch.searchsorted(total, sought, right=True)[:, 0].clamp(max=total.shape[-1] - 1)
    return token.to(seen.device)


def row_seed(seed: int, number: int) -> int:
    """Derive the seed of text `number` of a command."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


# ---- ids -> ids

def step(model: LLaMA, ids: Tensor, cache: KVCache) -> Tensor:
    """Compute logits (B, V) of the token after ids (B, 1), which go on from the cache's."""
    return model.lm_head(model.hidden(ids, cache)[:, 0])


def make_cache(model: LLaMA, rows: int, capacity: int) -> KVCache:
    """Make an empty cache for `rows` texts of up to `capacity` tokens."""
    return KVCache(model.config, rows, capacity, model.rope_cos.device, model.compute_dtype)


def compile_step(model: LLaMA, rows: int, capacity: int, must: bool) -> Compiled | None:
    """Compile step() for a cache of one size, on CUDA as one graph of kernels, and try it once.
    Every step looks at the whole cache, so that no size ever changes. If it fails: UserError if it
    `must` work, else a line on the screen and None."""
    try:
        cache = make_cache(model, rows, max(capacity, 3))
        for tensor in (cache.k, cache.v, cache.lengths):
            torch._dynamo.mark_static_address(tensor)  # graphs may write to them
        compiled = cache, torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        generate(model, [[0]], 3, Sampling(temperature=0), [0], compiled=compiled)
        return compiled
    except UserError:  # of the model, not of its compilation
        raise
    except torch.OutOfMemoryError:
        raise UserError(f"no memory for {rows} rows of {capacity} tokens; lower --batch") from None
    except Exception as error:  # no compiler, an old one, a broken cache: anything
        problem = f"torch.compile fails here ({parallel.why_not(error)})"
        if must:
            raise UserError(f"--compile=true, but {problem}") from None
        print(f"{problem}; going on without it, slower", flush=True)
        return None


class Row:
    """One text as it grows, by at most `room` tokens. `ended` says why it did (eos | stop | length)
    and is empty as long as it goes on."""

    def __init__(self, number: int, prompt: list[int], room: int, seed: int):
        self.number, self.prompt, self.room, self.seed = number, prompt, room, seed
        self.new: list[int] = []
        self.ended = "" if room > 0 else "length"


class Batch:
    """Rows that are decoded side by side. Row i of the cache and of these tensors is rows[i]'s:
    `seen` (B, V), the tokens that it holds; `draws` (B, block_size), a uniform number for each
    token of a text; `logits` (B, V) of the next token; `tokens` (B,), the newest ones.

    A GPU works while the host looks at tokens: they are read `lag` steps late, and nothing else
    goes from device to host or back."""

    def __init__(self, model: LLaMA, rows: list[Row], vocab_size: int, compiled: Compiled | None,
                 begin: KVCache | None = None):
        """Feed the prompts to the model, padded on the right, but for what `begin` holds."""
        config, device = model.config, model.rope_cos.device
        self.model, self.rows, self.fixed = model, rows, bool(compiled)
        self.lag = 1 if device.type == "cuda" else 0
        self.unread: list[tuple] = []  # (rows, their tokens and largest logits, when these arrive)
        self.fed = 0  # tokens of each text that went through the model
        capacity = max(len(row.prompt) + row.room for row in rows)
        self.cache, self.step = compiled or (make_cache(model, len(rows), capacity), step)
        shared = self.cache.used = begin.used if begin else 0
        if begin:
            self.cache.k[:, :, :, :shared], self.cache.v[:, :, :, :shared] = begin.k, begin.v
        self.cache.lengths.fill_(shared)
        seen = torch.zeros(len(rows), vocab_size or config.vocab_size, dtype=torch.bool)
        # As many draws as the context is long, however many are used: a longer text begins the same
        draws = torch.zeros(len(rows), config.block_size)
        for i, row in enumerate(rows):
            seen[i, row.prompt] = True
            draws[i].uniform_(generator=torch.Generator().manual_seed(row.seed))
        self.seen, self.draws = seen.to(device), draws.to(device)
        ids = pad_sequence([torch.tensor(row.prompt[shared:]) for row in rows], batch_first=True)
        last = torch.tensor([len(row.prompt) - shared - 1 for row in rows], device=device)
        states = model.hidden(ids.to(device), self.cache)
        self.logits = model.lm_head(states[torch.arange(len(rows), device=device), last])
        self.cache.lengths.copy_(last + 1 + shared)

    def draw(self, sampling: Sampling, number: int) -> None:
        """Choose the next token of every row, by draw `number`, and send them to the host."""
        logits = self.logits.float()[:, :self.seen.shape[1]]
        self.tokens = choose(logits, sampling, self.seen, self.draws[:, number])
        self.seen.scatter_(1, self.tokens[:, None], True)
        there = [values.to("cpu", non_blocking=True) for values in (self.tokens, logits.amax(-1))]
        arrived = torch.cuda.current_stream().record_event() if self.tokens.is_cuda else None
        self.unread.append((self.rows, there, arrived))

    def read(self, lag: int) -> Iterator[tuple[Row, int]]:
        """Yield (row, token) of all but the newest `lag` draws, for rows that have not ended.
        UserError if a token was drawn from logits that are not finite."""
        while len(self.unread) > lag:
            rows, there, arrived = self.unread.pop(0)
            if arrived:
                arrived.synchronize()
            for row, token, highest in zip(rows, *(t.tolist() for t in there), strict=True):
                if not (row.ended or math.isfinite(highest)):
                    raise UserError(NOT_FINITE)
                if not row.ended:
                    yield row, token

    def advance(self) -> None:
        """Feed the newest tokens to the model, for the logits of the next. The rows that have ended
        are left behind once they are half of all, not before: it copies the cache."""
        going = [i for i, row in enumerate(self.rows) if not row.ended]
        if not self.fixed and 2 * len(going) <= len(self.rows):
            kept = torch.tensor(going, device=self.seen.device)
            self.cache.keep(kept)
            self.rows, self.tokens = [self.rows[i] for i in going], self.tokens[kept]
            self.seen, self.draws = self.seen[kept], self.draws[kept]
        # A row that has ended goes on, at most to the end of the cache; nobody reads its tokens.
        end = self.cache.k.shape[3] - 1
        longest = max(len(row.prompt) for row in self.rows if not row.ended)
        self.cache.used = end if self.fixed else min(longest + self.fed, end)
        self.logits = self.step(self.model, self.tokens[:, None], self.cache)
        self.cache.lengths.add_(1).clamp_(max=end)
        self.fed += 1


@torch.no_grad()
@sdpa_kernel(ANY_SHAPE)
def generate(model: LLaMA, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
             seeds: list[int], stop_ids: Collection[int] = (), vocab_size: int = 0,
             watch: Callable[[int, int], bool] = lambda row, token: False,
             compiled: Compiled | None = None,
             begin: KVCache | None = None) -> list[tuple[list[int], str]]:
    """Return (new ids, why they ended: eos | stop | length) for every prompt; none is empty.
    `begin`: what begun() gave for the ids that all prompts begin with, and go on from.

    Ids from `vocab_size` on (padding of the embedding) are never drawn; 0: there are none. `watch`
    is called with (row, new id) and ends the row by returning True. A stop id is not in the result.
    UserError if there is nothing to draw from, as with weights that are not finite.
    """
    rows = [Row(number, prompt, min(max_new_tokens, model.config.block_size - len(prompt)), seed)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    idle = compiled[0].k.shape[1] - len(rows) if compiled else 0  # rows that are nobody's
    batch = Batch(model, rows + [Row(-1, [0], 0, 0)] * idle, vocab_size, compiled, begin)
    most = max(row.room for row in rows)
    for number in range(most):
        batch.draw(sampling, number)
        for row, token in batch.read(batch.lag if number + 1 < most else 0):
            if token in stop_ids:
                row.ended = "eos"
                continue
            row.new.append(token)
            if watch(row.number, token):
                row.ended = "stop"
            elif len(row.new) == row.room:
                row.ended = "length"
        if all(row.ended for row in rows):
            break
        batch.advance()
    return [(row.new, row.ended) for row in rows]


@torch.no_grad()
@sdpa_kernel(ANY_SHAPE)
def begun(model: LLaMA, ids: list[int]) -> KVCache:
    """Feed the ids that several prompts begin with to the model, once for all of them."""
    cache = make_cache(model, 1, len(ids))
    model.hidden(torch.tensor([ids], device=model.rope_cos.device), cache)
    return cache


# ---- ids -> text

class TextStream:
    """The text of one row as its tokens come: no half characters, cut at a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str], stream: bool):
        self.ids, self.decode = list(prompt), tokenizer.decode
        if prompt and prompt[-1] in tokenizer.roles:  # an answer is decoded by itself
            self.ids, self.decode = [], tokenizer.decode_behind
        self.stops, self.stream = stops, stream
        self.start, self.read, self.shown = 0, len(self.ids), 0
        self.text, self.stopped = "", False

    def push(self, *tokens: int) -> bool:
        """Add what the next token spells, and print it if streaming; True once a stop string came.

        What may be half a character, or on the screen half a stop string, waits for more; without
        a token, nothing waits. Tokens are decoded behind those before them: a tokenizer may drop
        the space of the first.
        """
        self.ids += tokens
        before = self.decode(self.ids[self.start:self.read])
        now = self.decode(self.ids[self.start:])
        if tokens and now.endswith(HALF) and len(self.ids) - self.read < 16:  # longer: no character
            return False
        self.text += now[len(before):]
        if len(now) > len(before):
            self.start = self.read
        self.read = len(self.ids)
        cuts = [at for at in map(self.text.find, self.stops) if at >= 0]
        if cuts:
            self.text, self.stopped = self.text[:min(cuts)], True
        if self.stream:
            print(self.fresh(not tokens), end="", flush=True)
        return self.stopped

    def fresh(self, last: bool) -> str:
        """Give the text that was not shown yet. Unless it is the `last` of it, what may begin a
        stop string waits."""
        end = len(self.text) - (0 if last else begun_marks(self.text, self.stops))
        new, self.shown = self.text[self.shown:end], max(self.shown, end)
        return new


def begun_marks(text: str, marks: Iterable[str]) -> int:
    """Count the characters at the end of a text that may begin one of `marks`."""
    return max((n for mark in marks for n in range(min(len(mark), len(text) + 1))
                if text.endswith(mark[:n])), default=0)


class Completion(NamedTuple):
    """What follows a prompt."""

    ended: str  # eos | stop | length
    text: str
    ids: list[int]  # that were drawn for it


def complete(model: LLaMA, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
             sampling: Sampling, seeds: list[int], stops: list[str], stream: bool = False,
             compiled: Compiled | None = None, begin: KVCache | None = None) -> list[Completion]:
    """Complete every prompt, up to one of the texts `stops`; `stream` prints as tokens come;
    `begin` as for generate()."""
    texts = [TextStream(tokenizer, prompt, stops, stream) for prompt in prompts]
    made = generate(model, prompts, max_new_tokens, sampling, seeds, tokenizer.stop_ids,
                    tokenizer.vocab_size, lambda row, token: texts[row].push(token), compiled,
                    begin)
    return [Completion("stop" if text.push() else ended, text.text, new)
            for text, (new, ended) in zip(texts, made, strict=True)]


def message_of(chat: Chat, text: str) -> dict:
    """Read an answer as a message; one that calls a function in another form is text."""
    with contextlib.suppress(ValueError):
        return chat.parse(text)
    return {"role": "assistant", "content": text}


def stops_of(text: str) -> list[str]:
    """Parse --stop: texts with commas between and with ESCAPES, or a Python list of texts.
    UserError for anything else."""
    with contextlib.suppress(SyntaxError, ValueError, KeyError):
        if text.startswith("["):
            stops = ast.literal_eval(text)
        else:
            parts = text.split(",") if text else []
            stops = [re.sub(r"\\(.?)", lambda found: ESCAPES[found[1]], part) for part in parts]
        if all(isinstance(stop, str) and stop for stop in stops):
            return stops
    raise UserError(rf"cannot use --stop={text}: say A,B (with no \ but \n \t \r \\) or ['A', 'B']")


# ---- ids -> states

@torch.no_grad()
@sdpa_kernel(ANY_SHAPE)
def embed(model: LLaMA, prompts: list[list[int]], pool: str, layers: str) -> Tensor:
    """Compute the prompts' states, fp32 (B, C) on the host: of the last token or the mean over all
    tokens (`pool`: last | mean), padding never counted, and the mean over `layers`, --layers of
    the n_layer + 1 states that model.hidden names. UserError if they are not finite."""
    device = model.rope_cos.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    places = torch.arange(ids.shape[1], device=device)
    weight = (places < lengths) / lengths if pool == "mean" else (places == lengths - 1).float()
    pooled: list[Tensor] = []  # (B, C) each; the whole states are not kept
    model.hidden(ids.to(device), watch=lambda x: pooled.append(
        torch.einsum("btc,bt->bc", x.float(), weight)))
    states = torch.stack(pooled[layers_of(layers, len(pooled))]).mean(0).cpu()
    if not states.isfinite().all():
        raise UserError(NOT_FINITE)
    return states


def layers_of(text: str, count: int) -> slice:
    """Parse --layers, N or FROM:TO as Python counts, to a slice of `count` states. UserError if it
    names none of them."""
    first, colon, last = text.partition(":")
    with contextlib.suppress(ValueError, IndexError):
        begin = int(first or 0) if colon else range(count)[int(first)]
        end = int(last or count) if colon else begin + 1
        if range(count)[begin:end]:
            return slice(begin, end)
    raise UserError(f"--layers={text} names no states: the model has {count}, 0 to {count - 1}")


# ---- from a model in training

def samples_of(config: Settings, data: Path, rows: Rows,
               say: Callable[[str], None]) -> list:
    """Prepare the sample along a run on the set `data`, whose validation `rows` are; [] where there
    is none, which is said."""
    if config.sample_tokens == 0:
        return []
    why = "a context of one token has no room for them"
    if config.block_size > 1:
        try:
            masked = isinstance(rows, FitRows) and rows.split.masked
            opening = rows.opening() if masked else None  # type: ignore[attr-defined]
            return [RunSamples(config, Tokenizer.load(data), opening)]
        except ImportError as error:  # training itself does not need the libraries
            why = str(error)
    say(f"no samples along the run: {why}")
    return []


class RunSamples:
    """The text that a run draws at each evaluation: one prompt, the same draws every time; of
    dialogs the answer to sample_prompt or, without it, what follows `opening`, ids."""

    name = "samples"

    def __init__(self, config: Settings, tokenizer: Tokenizer, opening: list[int] | None = None):
        self.config, self.tokenizer, self.shown = config, tokenizer, config.sample_prompt
        self.prompt = [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt)]
        if opening:
            chat = chat_of(tokenizer)
            self.prompt = opening
            if config.sample_prompt:
                self.prompt = chat.prompt([{"role": "user", "content": config.sample_prompt}])
            self.shown = chat.show(np.array(self.prompt), np.zeros(len(self.prompt), bool), False)
        if len(self.prompt) >= config.block_size:
            raise UserError(f"sample_prompt has {len(self.prompt)} tokens, and the context of "
                            f"{config.block_size} must hold it and at least one more; shorten it")

    def add(self, model: LLaMA, step: int, log: Any) -> None:
        """Draw a text on rank 0, write it down and say it."""
        if log.active:
            text = self.draw(model)
            log.line("samples.jsonl", {"step": step, **text})
            log.say(f"step {step}: sample {text['prompt'] + text['completion']!r:.100}")

    def draw(self, model: LLaMA) -> dict:
        """Draw a text: {prompt, completion, stop}. A model that gives nothing to draw from does not
        end its run: that is for the guard of the updates."""
        stop, text = "not finite", ""
        with contextlib.suppress(UserError):
            [(stop, text, _)] = complete(model, self.tokenizer, [self.prompt],
                                         self.config.sample_tokens, Sampling(),
                                         [row_seed(self.config.seed, 0)], [])
        return {"prompt": self.shown, "completion": text, "stop": stop}
