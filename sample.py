"""Prompts -> text.

  sample.py                        the newest run under out/, from the begin token alone
  sample.py --ckpt=out/RUN --prompt="The sea" --num_samples=3 --temperature=0.8 --top_p=0.95
  sample.py --prompts=F.jsonl --out=G.jsonl
                                   rows {"prompt": ...} -> the same rows in the same order, with
                                   `completion` and `stop` added

`stop` says why a text ended: eos (the model ended it), stop (a --stop text came; it is cut off) or
length (max_new_tokens, or the end of the model's context). --stop is a text, several with commas
between, or a list: --stop='[",", "."]'. Text i of a seed is the same alone and in a batch. The
options of sampling work in the order in which they stand here, which is that of transformers.
"""

from dataclasses import dataclass

import settings
from settings import UserError, key


@dataclass
class Flags:
    """What sample.py takes; `generate` needs the first five."""

    repetition_penalty: float = key(1.0, "above 1: what was said is less likely again", low=1e-3)
    temperature: float = key(1.0, "divides the logits; 0: always the likeliest token", low=0)
    top_k: int = key(0, "draw from the k likeliest tokens (0: from all)", low=0)
    top_p: float = key(1.0, "draw from the likeliest tokens of this joint probability", (), 0, 1)
    min_p: float = key(0.0, "drop tokens below this share of the likeliest's probability", (), 0, 1)
    ckpt: str = key("out", "a checkpoint, a run (its newest step) or a folder of runs (the newest)")
    prompt: str = key("", "the text to go on from (empty: the begin token alone)")
    prompts: str = key("", "a .jsonl file with a prompt per row, for --out")
    out: str = key("", "the .jsonl file to write for --prompts")
    max_new_tokens: int = key(256, "tokens per text, fewer where the context ends", low=1)
    num_samples: int = key(1, "texts per prompt (with --out: as many rows in succession)", low=1)
    stop: object = key("", "end where this text comes")
    seed: int = key(1337, "seeds the draws, with the number of the text", low=0)
    batch: int = key(16, "texts that are generated side by side", low=1)
    save: bool = key(False, "add the texts to the run's samples.jsonl, which report.py shows")
    device: str = key("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    dtype: str = key("auto", "matmuls (auto: bf16 where it is native)", ("auto", "fp32", "bf16"))


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = settings.command(__doc__, Flags, takes="files")

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import log
import parallel
from model import KVCache, Linear, LLaMA
from tokenizer import Tokenizer

HALF = "\ufffd"  # what the bytes of an unfinished character decode to
ADDED = {"completion", "stop"}  # the columns that --out adds


# ---- one token

def allowed(logits: Tensor, s: Flags) -> Tensor:
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


def choose(logits: Tensor, s: Flags, seen: Tensor, draw: Tensor) -> Tensor:
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

@torch.inference_mode()
def generate(model: LLaMA, prompts: list[list[int]], max_new_tokens: int, sampling: Flags,
             seeds: list[int], stop_ids: Collection[int] = (), vocab_size: int = 0,
             watch: Callable[[int, int], bool] | None = None) -> list[tuple[list[int], str]]:
    """(new ids, why they ended: eos | stop | length) for every one of B prompts; none is empty.

    Ids from `vocab_size` on (padding of the embedding) are never drawn; 0: there are none. `watch`
    is called with (row, new id) and ends the row by returning True. A stop id is not in the result.
    Rows of different lengths are padded on the right; each draws from its own generator.
    """
    config, device, rows = model.config, model.rope_cos.device, torch.arange(len(prompts))
    lengths = [len(prompt) for prompt in prompts]
    room = [min(max_new_tokens, config.block_size - length) for length in lengths]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    seen = torch.zeros(len(prompts), vocab_size or config.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt)
        seen[row, prompt] = True
    # As many draws as the context is long, however many are used: a longer text begins the same.
    draws = torch.stack([torch.rand(config.block_size, generator=torch.Generator().manual_seed(one))
                         for one in seeds])  # (B, block_size)
    last, seen, draws = torch.tensor(lengths, device=device), seen.to(device), draws.to(device)
    capacity = max(length + new for length, new in zip(lengths, room, strict=True))
    cache = KVCache(config, len(prompts), capacity, device, model.compute_dtype)
    states = model.hidden(ids.to(device), cache)[rows, last - 1]  # (B, C)
    new: list[list[int]] = [[] for _ in prompts]
    ended = [""] * len(prompts)
    while True:
        logits = model.lm_head(states).float()[:, :seen.shape[1]]
        chosen = choose(logits, sampling, seen, draws[:, max(map(len, new))])
        seen[rows, chosen] = True
        for row, token in enumerate(chosen.tolist()):
            if not ended[row] and token in stop_ids:
                ended[row] = "eos"
            elif not ended[row]:
                new[row].append(token)
                ended[row] = "length" if len(new[row]) >= room[row] else ""
                if watch and watch(row, token):
                    ended[row] = "stop"
        if all(ended):
            return list(zip(new, ended, strict=True))
        # A finished row goes on with length 0: it writes where nobody looks any more.
        now = [0 if ended[row] else lengths[row] + len(new[row]) - 1 for row in range(len(prompts))]
        cache.lengths.copy_(torch.tensor(now))
        cache.used = max(now)
        states = model.hidden(chosen[:, None], cache)[:, 0]


# ---- ids -> text

class Text:
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
             sampling: Flags, seeds: list[int], stops: list[str],
             stream: bool = False) -> list[tuple[str, str, int]]:
    """(why it ended, completion, new tokens) of every prompt; `stream` prints them as they come."""
    texts = [Text(tokenizer, prompt, stops, stream) for prompt in prompts]
    found = generate(model, prompts, max_new_tokens, sampling, seeds, tokenizer.stop_ids,
                     tokenizer.vocab_size, lambda row, token: texts[row].push(token))
    return [("stop" if text.push() else ended, text.text, len(new))
            for text, (new, ended) in zip(texts, found, strict=True)]


def load(ckpt: str, device: str, dtype: str) -> tuple[LLaMA, Tokenizer, Path]:
    """The model and tokenizer of --ckpt, and the checkpoint's folder."""
    folder, device = checkpoint.find(ckpt), parallel.pick_device(device)
    tokenizer = Tokenizer.load(folder)
    kind = parallel.pick_dtype(dtype, torch.device(device))
    model = checkpoint.load_model(folder, device, kind)
    for module in model.modules():
        if isinstance(module, Linear):  # cast once, not at every token: the same numbers
            module.weight.data = module.weight.data.to(kind)
    return model, tokenizer, folder


# ---- files of prompts

def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, row i from line i + 1; UserError names the line that is wrong."""
    if not path.is_file():
        raise UserError(f"no file {path}; --prompts takes a .jsonl file with a prompt per row")
    rows = []
    for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
        try:
            rows.append(json.loads(line.decode("utf-8-sig")))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"found {rows[-1]!r:.40}")
        except ValueError as error:  # also invalid UTF-8
            raise UserError(f"{path}:{number} is not a JSON object such as "
                            f"{{\"prompt\": \"text\"}}: {error}") from None
    return rows


def read_prompts(path: Path, out: Path, copies: int) -> list[dict]:
    """The rows of `path`, each `copies` times, if `out` can take them with nothing lost."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("prompt"), str):
            raise UserError(f"{path}:{number} has no text in a column `prompt`; its columns are: "
                            f"{', '.join(row) or 'none'}")
        if taken := ADDED & set(row):
            raise UserError(f"{path}:{number}: its column `{min(taken)}` would be overwritten; "
                            "rename it")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} is not a file in a folder that exists")
    rows = [row for row in rows for _ in range(copies)]
    if out.exists():
        there = read_rows(out)
        kept = [{name: row[name] for name in row if name not in ADDED} for row in there]
        if kept != rows or not all(set(row) >= ADDED for row in there):
            raise UserError(f"--out {out} exists and was not made from {path}; name another file "
                            "or move that one away")
    return rows


def write_rows(path: Path, mode: str, rows: list[dict]) -> None:
    """Write or append lines of JSON; they are on the disk when this returns."""
    with open(path, mode) as file:
        for row in rows:  # half a surrogate pair, which UTF-8 lacks, stays the \udXXX of JSON
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line.encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


# ---- the command

def main(command) -> int:
    """Read the prompts, generate in batches of similar length, write in the order of the input."""
    f, out, partial = command.flags, Path(command.flags.out), Path(command.flags.out + ".tmp")
    stops = [f.stop] * bool(f.stop) if isinstance(f.stop, str) else list(f.stop)
    if command.files or not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError(f"cannot use {(command.files or stops)[0]!r}: --ckpt names the model, "
                        "--prompt the text to go on from, --stop one or more texts")
    if bool(f.prompts) != bool(f.out) or (f.prompts and f.prompt):
        raise UserError("--prompts F.jsonl and --out G.jsonl go together, without --prompt")
    rows = (read_prompts(Path(f.prompts), out, f.num_samples) if f.prompts else
            [{"prompt": f.prompt}] * f.num_samples)
    model, tokenizer, folder = load(f.ckpt, f.device, f.dtype)
    run, block = checkpoint.run_of(folder), model.config.block_size
    if f.save and run is None:
        raise UserError(f"--save adds to a run's samples.jsonl, and {folder} lies in no run")
    prompts = [[tokenizer.bos, *tokenizer.encode(row["prompt"])] for row in rows]
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < block:
            where = f"{f.prompts}:{i // f.num_samples + 1}: " if f.prompts else ""
            raise UserError(f"{where}the prompt has {len(prompt)} tokens, and the model's context "
                            f"of {block} must hold it and at least one more; shorten it")
    stream = not f.out and f.num_samples == 1
    if f.out:
        partial.touch()  # a folder that may not be written is found out before the work
    print(f.prompt * stream, end="", flush=True)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    start, tokens, cut = time.perf_counter(), 0, 0
    progress = log.Progress("sampling", len(rows), "texts", active=not stream)
    for first in range(0, len(order), f.batch):
        batch = order[first:first + f.batch]
        texts = complete(model, tokenizer, [prompts[i] for i in batch], f.max_new_tokens, f,
                         [row_seed(f.seed, i) for i in batch], stops, stream)
        for i, (ended, text, new) in zip(batch, texts, strict=True):
            rows[i] = rows[i] | {"completion": text, "stop": ended}
            tokens += new
            cut += ended == "length" and len(prompts[i]) + new == block
        progress.add(len(batch))
    progress.close()
    seconds = time.perf_counter() - start
    if f.out:
        write_rows(partial, "wb", rows)
        os.replace(partial, out)
    for number, row in enumerate(rows if not f.out and not stream else (), 1):
        print(f"--- {number} of {len(rows)} ({row['stop']})\n{row['prompt']}{row['completion']}")
    if f.save and run:  # a text that is there is not added again
        file, step = run / "samples.jsonl", int(folder.name.removeprefix("step_"))
        there = log.whole_rows(file)
        new_rows = [{"step": step, **row} for row in rows]
        write_rows(file, "ab", [row for row in new_rows if row not in there])
    print("\n" * stream + f"{tokens} new tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"
          + f"; {cut} of {len(rows)} ended where the context ends, at {block} tokens" * bool(cut)
          + f" -> {out}" * bool(f.out))
    return 0


if __name__ == "__main__":
    settings.run(main, COMMAND)
