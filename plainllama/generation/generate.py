"""The decode loop: ids -> ids, ids -> text as it comes, ids -> states.

Text i of a seed is the same alone and in a batch: every row has its own generator, and a row of a
batch computes what it would compute alone (to rounding).
"""

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import KVCache, Linear, LLaMA
from plainllama import parallel
from plainllama.settings import Sampling, UserError
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.weights import checkpoint
from plainllama.weights.huggingface import load_model

HALF = "\ufffd"  # what the bytes of an unfinished character decode to


# ---- one token

def allowed(logits: Tensor, s: Sampling) -> Tensor:
    """Logits (B, V) after temperature, those of tokens that must not be drawn at -inf."""
    logits = (logits - logits.amax(-1, keepdim=True)) / s.temperature  # <= 0: cannot overflow
    never = float("-inf")
    if s.top_k:
        least = logits.topk(min(s.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, never)
    if s.top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= s.top_p  # those before it are enough
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), never)
    p = logits.softmax(-1)
    return logits.masked_fill(p < s.min_p * p.amax(-1, keepdim=True), never)


def choose(logits: Tensor, s: Sampling, seen: Tensor, draw: Tensor) -> Tensor:
    """The next token (B,) of every row from logits (B, V) and a uniform number each (B,).

    `seen` (B, V) marks the tokens of a row so far; their penalty is CTRL's
    (https://arxiv.org/abs/1909.05858).
    """
    if s.repetition_penalty != 1:
        less = torch.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
        logits = torch.where(seen, less, logits)
    if s.temperature == 0:
        return logits.argmax(-1)
    total = allowed(logits, s).softmax(-1).cumsum(-1)
    # The factor keeps the sought value below the last one in spite of rounding.
    return torch.searchsorted(total, draw[:, None] * (1 - 1e-6) * total[:, -1:], right=True)[:, 0]


def row_seed(seed: int, number: int) -> int:
    """The seed of text `number` of a command."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


# ---- ids -> ids

def step(model: LLaMA, ids: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) of the token after ids (B, 1), which go on from what is in the cache."""
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
    """Compiled, tried once. If that fails: UserError if it `must` work, else None and a line."""
    try:
        compiled = Compiled(model, rows, max(capacity, 3))
        generate(model, [[0]], 3, Sampling(temperature=0), [0], compiled=compiled)
        return compiled
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory with {rows} rows of {capacity} tokens; take a smaller "
                        "--batch") from None
    except Exception as error:  # no compiler, an old one, a broken cache: anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if must:
            raise UserError(f"--compile=true, but torch.compile fails here ({problem})") from None
        print(f"torch.compile fails here ({problem}); going on without it, slower", flush=True)
        return None


@dataclass
class Speed:
    """What decoding took: the first token of the first batch, and all later steps together."""

    first: float = 0.0  # seconds
    seconds: float = 0.0
    bytes: int = 0  # read by those steps: the weights, and the cache as far as it is in use

    def told(self, device: torch.device) -> str:
        """In words, beside the device's reading_speed()."""
        words = f"; first token after {self.first:.3f} s" * bool(self.first)
        if not self.bytes:
            return words
        rate = self.bytes / self.seconds
        return words + (f"; its steps read {rate / 1e9:.1f} GB/s, "
                        f"{rate / reading_speed(device):.0%} of what plain reading reaches here")


def reading_speed(device: torch.device) -> float:
    """Bytes per second at which the device adds up a large tensor: what decoding could reach."""
    numbers, least = torch.ones(1 << 26, device=device), float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        numbers.sum().item()
        least = min(least, time.perf_counter() - begin)
    return numbers.nbytes / least


@torch.no_grad()
def generate(model: LLaMA, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
             seeds: list[int], stop_ids: Collection[int] = (), vocab_size: int = 0,
             watch: Callable[[int, int], bool] | None = None, compiled: Compiled | None = None,
             speed: Speed | None = None) -> list[tuple[list[int], str]]:
    """(new ids, why they ended: eos | stop | length) for every one of B prompts; none is empty.

    Ids from `vocab_size` on (padding of the embedding) are never drawn; 0: there are none. `watch`
    is called with (row, new id) and ends the row by returning True. A stop id is not in the result.
    Rows of different lengths are padded on the right; each draws from its own generator.
    """
    begin = time.perf_counter()
    config, device = model.config, model.rope_cos.device
    lengths = [len(prompt) for prompt in prompts]
    room = [min(max_new_tokens, config.block_size - length) for length in lengths]
    B = compiled.cache.k.shape[1] if compiled else len(prompts)  # what is more: rows of one token 0
    ids = torch.zeros(B, max(lengths), dtype=torch.long)
    seen = torch.zeros(B, vocab_size or config.vocab_size, dtype=torch.bool)
    draws, last = torch.zeros(B, config.block_size), torch.zeros(B, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt)
        seen[row, prompt] = True
        # As many draws as the context is long, however many are used: a longer text begins the same
        draws[row] = torch.rand(config.block_size,
                                generator=torch.Generator().manual_seed(seeds[row]))
        last[row] = len(prompt) - 1
    seen, draws, rows = seen.to(device), draws.to(device), torch.arange(B, device=device)
    if compiled:
        cache, advance = compiled.cache, compiled.step
        cache.used = 0
        cache.lengths.zero_()
    else:
        capacity = max(length + new for length, new in zip(lengths, room, strict=True))
        cache, advance = KVCache(config, B, capacity, device, model.compute_dtype), step
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= 0 if config.tie_embeddings else model.model.embed_tokens.weight.nbytes
    logits = model.lm_head(model.hidden(ids.to(device), cache)[rows, last.to(device)])
    new: list[list[int]] = [[] for _ in prompts]
    ended = ["" if n > 0 else "length" for n in room]
    live = list(range(len(prompts)))  # whose the rows are; those beyond are nobody's
    for n in range(max(room)):
        chosen = choose(logits.float()[:, :seen.shape[1]], sampling, seen, draws[:, n])
        seen[rows, chosen] = True
        for row, token in zip(live, chosen.tolist(), strict=False):
            if not ended[row] and token in stop_ids:
                ended[row] = "eos"
            elif not ended[row]:
                new[row].append(token)
                ended[row] = "length" if len(new[row]) >= room[row] else ""
                if watch and watch(row, token):
                    ended[row] = "stop"
        if speed and n == 0:
            speed.first = speed.first or time.perf_counter() - begin
            begin = time.perf_counter()
        going = [i for i, row in enumerate(live) if not ended[row]]
        if not going:
            break
        if not compiled and 2 * len(going) <= len(live):  # the others are dropped
            pick = torch.tensor(going, device=device)
            cache.keep(pick)
            seen, draws, chosen, rows = seen[pick], draws[pick], chosen[pick], rows[:len(going)]
            live = [live[i] for i in going]
        # A finished row goes on with length 0: it writes where nobody looks any more.
        now = [0 if ended[row] else lengths[row] + n for row in live]
        cache.lengths.copy_(torch.tensor(now + [0] * (len(rows) - len(now))))
        cache.used = cache.k.shape[3] - 1 if compiled else max(now)
        logits = advance(model, chosen[:, None], cache)
        if speed:
            speed.bytes += weights + 2 * cache.k[:, :, :, :cache.used].nbytes
    if speed:
        speed.seconds += time.perf_counter() - begin
    return list(zip(new, ended, strict=True))


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
        self.text += now[len(before):] if not self.stopped else ""
        self.start, self.read = self.read if len(now) > len(before) else self.start, len(self.ids)
        cuts = [at for at in map(self.text.find, self.stops) if at >= 0]
        if cuts:
            self.text, self.stopped = self.text[:min(cuts)], True
        if self.stream:
            waits = max((n for stop in self.stops for n in range(len(stop))
                         if tokens and self.text.endswith(stop[:n])), default=0)
            print(self.text[self.shown:len(self.text) - waits], end="", flush=True)
            self.shown = max(self.shown, len(self.text) - waits)
        return self.stopped


def complete(model: LLaMA, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
             sampling: Sampling, seeds: list[int], stops: list[str], stream: bool = False,
             compiled: Compiled | None = None,
             speed: Speed | None = None) -> list[tuple[str, str, int]]:
    """(why it ended, completion, new tokens) of every prompt; `stream` prints them as they come."""
    texts = [TextStream(tokenizer, prompt, stops, stream) for prompt in prompts]
    found = generate(model, prompts, max_new_tokens, sampling, seeds, tokenizer.stop_ids,
                     tokenizer.vocab_size, lambda row, token: texts[row].push(token), compiled,
                     speed)
    return [("stop" if text.push() else ended, text.text, len(new))
            for text, (new, ended) in zip(texts, found, strict=True)]


# ---- ids -> states

@torch.no_grad()
def embed(model: LLaMA, prompts: list[list[int]], pool: str, layers: slice) -> Tensor:
    """The prompts' states, fp32 (B, C) on the host: of the last token or the mean over all tokens
    (`pool`: last | mean), padding never counted, and the mean over `layers` of the n_layer + 1
    states that model.hidden names."""
    device = model.rope_cos.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], True)
    places = torch.arange(ids.shape[1], device=device)
    weight = (places < lengths) / lengths if pool == "mean" else (places == lengths - 1).float()
    pooled: list[Tensor] = []  # (B, C) each; the whole states are not kept
    model.hidden(ids.to(device), watch=lambda x: pooled.append(
        torch.einsum("btc,bt->bc", x.float(), weight)))
    return torch.stack(pooled[layers]).mean(0).cpu()


def layers_of(text: str, count: int) -> slice:
    """What --layers names, as a slice of `count` states."""
    first, colon, last = text.partition(":")
    try:
        begin = int(first) if first or not colon else 0
        end = (int(last) if last else count) if colon else begin + 1 or count
    except ValueError:
        begin = end = 0
    if not range(count)[begin:end] or (not colon and not -count <= begin < count):
        raise UserError(f"--layers={text} names no states of this model, which has {count}, 0 to "
                        f"{count - 1}; say N or FROM:TO")
    return slice(begin, end)


def load(ckpt: str, device: str, dtype: str) -> tuple[LLaMA, Tokenizer, Path]:
    """The model of --ckpt, ready to decode, its tokenizer, and the checkpoint's folder."""
    folder = checkpoint.find_checkpoint(ckpt)
    return ready(folder, parallel.pick_device(device), dtype), Tokenizer.load(folder), folder


def ready(folder: Path, device: str | torch.device, dtype: str) -> LLaMA:
    """A checkpoint's model with its matrices cast once, not at every token: the same numbers."""
    kind = parallel.pick_dtype(dtype, torch.device(device))
    model = load_model(folder, device, kind)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.to(kind)
    return model
