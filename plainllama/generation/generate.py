"""The decode loop: ids -> ids, ids -> text as it comes, ids -> states.

Text i of a seed is the same alone and in a batch: every row has its own generator, and a row of a
batch computes what it would compute alone (to rounding).
"""

import contextlib
import hashlib
import math
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from model import ANY_SHAPE, KVCache, Linear, LLaMA
from plainllama import parallel
from plainllama.settings import Sampling, Settings, UserError
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.weights.huggingface import load_model

TINY = torch.finfo(torch.float32).tiny  # a smaller temperature would be 0 there
HALF = "\ufffd"  # what the bytes of an unfinished character decode to
NOT_FINITE = ("what the model computes is not finite: its weights are not or, in half precision, "
              "its states; take an earlier checkpoint or --dtype=fp32")
Watch = Callable[[int, int], bool]  # called with (row, new token); True ends the row


# ---- one token

def allowed(logits: Tensor, s: Sampling) -> Tensor:
    """Divide logits (B, V) by the temperature, and put those of tokens that must not be drawn at
    -inf."""
    temperature = max(s.temperature, TINY)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # <= 0: cannot overflow
    if s.top_k:
        least = logits.topk(min(s.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if s.top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= s.top_p  # those before it are enough
        drop[:, 0] = False
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
    device = logits.device
    if torch.are_deterministic_algorithms_enabled():
        logits, draw = logits.cpu(), draw.cpu()  # a GPU's cumsum refuses
    total = allowed(logits, s).softmax(-1).cumsum(-1)
    # The factor keeps the sought value below the last one in spite of rounding; of logits that are
    # not finite the last token comes.
    sought = draw[:, None] * (1 - 1e-6) * total[:, -1:]
    token = torch.searchsorted(total, sought, right=True)[:, 0].clamp(max=total.shape[-1] - 1)
    return token.to(device)


def row_seed(seed: int, number: int) -> int:
    """Derive the seed of text `number` of a command."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


# ---- ids -> ids

def step(model: LLaMA, ids: Tensor, cache: KVCache) -> Tensor:
    """Compute logits (B, V) of the token after ids (B, 1), which go on from the cache's."""
    return model.lm_head(model.hidden(ids, cache)[:, 0])


class Compiled:
    """step() compiled for a cache of one size, on CUDA as one graph of kernels: `rows` texts of up
    to `capacity` tokens. Every step looks at the whole cache, so that no size ever changes."""

    def __init__(self, model: LLaMA, rows: int, capacity: int):
        self.cache = KVCache(model.config, rows, capacity, model.rope_cos.device,
                             model.compute_dtype)
        for tensor in (self.cache.k, self.cache.v, self.cache.lengths):
            torch._dynamo.mark_static_address(tensor)  # graphs may write to them
        self.step = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)


def compile_step(model: LLaMA, rows: int, capacity: int, must: bool) -> Compiled | None:
    """Compile step() and try it once. If that fails: UserError if it `must` work, else a line on
    the screen and None."""
    try:
        compiled = Compiled(model, rows, max(capacity, 3))
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

    def take(self, token: int, stop_ids: Collection[int], watch: Watch | None) -> None:
        """Add the next token and see whether the text ends; one that has ended takes none."""
        if not self.ended and token in stop_ids:
            self.ended = "eos"
        if self.ended:
            return
        self.new.append(token)
        if len(self.new) == self.room:
            self.ended = "length"
        if watch and watch(self.number, token):
            self.ended = "stop"


class Batch:
    """Rows that are decoded side by side. Row i of the cache and of these tensors is rows[i]'s:
    `seen` (B, V), the tokens that it holds; `draws` (B, block_size), a uniform number for each
    token of a text; `logits` (B, V) of the next token; `tokens` (B,), the newest ones.

    A GPU works while the host looks at tokens: they are read `lag` steps late, and nothing else
    goes from device to host or back."""

    def __init__(self, model: LLaMA, rows: list[Row], vocab_size: int, compiled: Compiled | None):
        """Feed the prompts to the model, padded on the right."""
        config, device = model.config, model.rope_cos.device
        self.model, self.rows, self.compiled = model, rows, compiled
        self.lag = 1 if device.type == "cuda" else 0
        # (rows, their tokens and largest logits, when these have arrived)
        self.unread: deque[tuple[list[Row], list[Tensor], torch.cuda.Event | None]] = deque()
        self.fed = 0  # tokens of each text that went through the model
        capacity = max(len(row.prompt) + row.room for row in rows)
        self.cache = compiled.cache if compiled else KVCache(config, len(rows), capacity, device,
                                                             model.compute_dtype)
        self.cache.used = 0
        self.cache.lengths.zero_()
        seen = torch.zeros(len(rows), vocab_size or config.vocab_size, dtype=torch.bool)
        # As many draws as the context is long, however many are used: a longer text begins the same
        draws = torch.zeros(len(rows), config.block_size)
        for i, row in enumerate(rows):
            seen[i, row.prompt] = True
            draws[i].uniform_(generator=torch.Generator().manual_seed(row.seed))
        self.seen, self.draws = seen.to(device), draws.to(device)
        ids = pad_sequence([torch.tensor(row.prompt) for row in rows], batch_first=True)
        last = torch.tensor([len(row.prompt) - 1 for row in rows], device=device)
        states = model.hidden(ids.to(device), self.cache)
        self.logits = model.lm_head(states[torch.arange(len(rows), device=device), last])
        self.cache.lengths.copy_(last + 1)

    def draw(self, sampling: Sampling, number: int) -> None:
        """Choose the next token of every row, by draw `number`, and send them to the host."""
        logits = self.logits.float()[:, :self.seen.shape[1]]
        self.tokens = choose(logits, sampling, self.seen, self.draws[:, number])
        self.seen.scatter_(1, self.tokens[:, None], True)
        there = [values.to("cpu", non_blocking=True) for values in (self.tokens, logits.amax(-1))]
        arrived = None
        if self.tokens.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self.unread.append((self.rows, there, arrived))

    def read(self, lag: int, stop_ids: Collection[int], watch: Watch | None) -> None:
        """Give the rows all tokens but those of the newest `lag` draws. UserError if one that has
        not ended was drawn from logits that are not finite."""
        while len(self.unread) > lag:
            rows, there, arrived = self.unread.popleft()
            if arrived:
                arrived.synchronize()
            for row, token, highest in zip(rows, *(t.tolist() for t in there), strict=True):
                if not (row.ended or math.isfinite(highest)):
                    raise UserError(NOT_FINITE)
                row.take(token, stop_ids, watch)

    def advance(self) -> None:
        """Feed the newest tokens to the model, for the logits of the next. The rows that have ended
        are left behind once they are half of all, not before: it copies the cache."""
        going = [i for i, row in enumerate(self.rows) if not row.ended]
        if not self.compiled and 2 * len(going) <= len(self.rows):
            kept = torch.tensor(going, device=self.seen.device)
            self.cache.keep(kept)
            self.rows, self.tokens = [self.rows[i] for i in going], self.tokens[kept]
            self.seen, self.draws = self.seen[kept], self.draws[kept]
        # A row that has ended goes on, at most to the end of the cache; nobody reads its tokens.
        end = self.cache.k.shape[3] - 1
        longest = max(len(row.prompt) for row in self.rows if not row.ended)
        self.cache.used = end if self.compiled else min(longest + self.fed, end)
        advance = self.compiled.step if self.compiled else step
        self.logits = advance(self.model, self.tokens[:, None], self.cache)
        self.cache.lengths.add_(1).clamp_(max=end)
        self.fed += 1


@torch.no_grad()
@sdpa_kernel(ANY_SHAPE)
def generate(model: LLaMA, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
             seeds: list[int], stop_ids: Collection[int] = frozenset(), vocab_size: int = 0,
             watch: Watch | None = None,
             compiled: Compiled | None = None) -> list[tuple[list[int], str]]:
    """Return (new ids, why they ended: eos | stop | length) for every prompt; none is empty.

    Ids from `vocab_size` on (padding of the embedding) are never drawn; 0: there are none. `watch`
    is called with (row, new id) and ends the row by returning True. A stop id is not in the result.
    UserError if there is nothing to draw from, as with weights that are not finite.
    """
    rows = [Row(number, prompt, min(max_new_tokens, model.config.block_size - len(prompt)), seed)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    idle = compiled.cache.k.shape[1] - len(rows) if compiled else 0  # rows that are nobody's
    batch = Batch(model, rows + [Row(-1, [0], 0, 0)] * idle, vocab_size, compiled)
    most = max(row.room for row in rows)
    for number in range(most):
        batch.draw(sampling, number)
        batch.read(batch.lag if number + 1 < most else 0, stop_ids, watch)
        if all(row.ended for row in rows):
            break
        batch.advance()
    return [(row.new, row.ended) for row in rows]


# ---- ids -> text

class TextStream:
    """The text of one row as its tokens come: no half characters, cut at a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str], stream: bool):
        self.tokenizer, self.ids, self.stops, self.stream = tokenizer, list(prompt), stops, stream
        self.start, self.read, self.shown = 0, len(prompt), 0
        self.text, self.stopped = "", False

    def push(self, *tokens: int) -> bool:
        """Add what the next token spells, and print it if streaming; True once a stop string came.

        What may be half a character, or on the screen half a stop string, waits for more; without
        a token, nothing waits. Tokens are decoded behind those before them: a tokenizer may drop
        the space of the first.
        """
        self.ids += tokens
        before = self.tokenizer.decode(self.ids[self.start:self.read])
        now = self.tokenizer.decode(self.ids[self.start:])
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
            # on the screen, what may begin a stop string waits
            begun = [n for stop in self.stops for n in range(len(stop))
                     if tokens and self.text.endswith(stop[:n])]
            end = len(self.text) - max(begun, default=0)
            print(self.text[self.shown:end], end="", flush=True)
            self.shown = max(self.shown, end)
        return self.stopped


class Completion(NamedTuple):
    """What follows a prompt."""

    ended: str  # eos | stop | length
    text: str
    tokens: int  # how many were drawn for it


def complete(model: LLaMA, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
             sampling: Sampling, seeds: list[int], stops: list[str], stream: bool = False,
             compiled: Compiled | None = None) -> list[Completion]:
    """Complete every prompt, up to one of the texts `stops`; `stream` prints as tokens come."""
    texts = [TextStream(tokenizer, prompt, stops, stream) for prompt in prompts]
    made = generate(model, prompts, max_new_tokens, sampling, seeds, tokenizer.stop_ids,
                    tokenizer.vocab_size, lambda row, token: texts[row].push(token), compiled)
    return [Completion("stop" if text.push() else ended, text.text, len(new))
            for text, (new, ended) in zip(texts, made, strict=True)]


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
    raise UserError(f"--layers={text} names no states of this model, which has {count}, 0 to "
                    f"{count - 1}; say N or FROM:TO")


# ---- from a checkpoint

def load(folder: Path, device: str | torch.device, dtype: str) -> LLaMA:
    """Load a checkpoint's model with all its matrices, trained or frozen, cast once instead of at
    every token: the same numbers."""
    kind = parallel.pick_dtype(dtype, torch.device(device))
    model = load_model(folder, device, kind)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.to(kind)
    return model


# ---- from a model in training

class RunSamples:
    """The text that a run draws at each evaluation: one prompt, the same draws every time."""

    def __init__(self, config: Settings, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.prompt = [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt)]
        if len(self.prompt) >= config.block_size:
            raise UserError(f"sample_prompt has {len(self.prompt)} tokens, and the context of "
                            f"{config.block_size} must hold it and at least one more; shorten it")

    def draw(self, model: LLaMA) -> dict:
        """Draw a text: {prompt, completion, stop}. A model that gives nothing to draw from does not
        end its run: that is for the guard of the updates."""
        stop, text = "not finite", ""
        with contextlib.suppress(UserError):
            [(stop, text, _)] = complete(model, self.tokenizer, [self.prompt],
                                         self.config.sample_tokens, Sampling(),
                                         [row_seed(self.config.seed, 0)], [])
        return {"prompt": self.config.sample_prompt, "completion": text, "stop": stop}
