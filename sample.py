"""Prompts -> text.

  sample.py                        the newest run under out/, from the begin token alone
  sample.py --ckpt=out/RUN --prompt="The sea" --num_samples=3 --temperature=0.8 --top_p=0.95
  sample.py --prompts=F.jsonl --out=G.jsonl
                                   rows {"prompt": ...} -> the same rows in the same order, with
                                   `completion` and `stop` added
  sample.py --prompts=F.jsonl --out=G.parquet --embed=mean
                                   the same rows with `embedding`, the model's states, added

--prompts also takes .txt (a line is a prompt) and .parquet, --out .parquet. Started again after a
kill, the same command goes on; torchrun shares the rows among its processes. `stop` says why a text
ended: eos (the model ended it), stop (a --stop text came; it is cut off) or length (max_new_tokens,
or the end of the model's context). --stop is a text, several with commas between, or a list:
--stop='[",", "."]'. Text i of a seed is the same alone and in a batch. The options of sampling work
in the order in which they stand here, which is that of transformers.
"""

from dataclasses import dataclass

from plainllama import settings
from plainllama.command import parse_arguments, run_command
from plainllama.files import read_rows, run_of
from plainllama.settings import Sampling, UserError, key


@dataclass
class Flags(Sampling):
    """What sample.py takes."""

    ckpt: str = key("out", "a checkpoint, a run (its newest step) or a folder of runs (the newest)")
    prompt: str = key("", "the text to go on from (empty: the begin token alone)")
    prompts: str = key("", "a .jsonl, .txt or .parquet file with a prompt per row, for --out")
    column: str = key("prompt", "where in a row of --prompts the text stands")
    out: str = key("", "the .jsonl or .parquet file to write for --prompts")
    max_new_tokens: int = key(256, "tokens per text, fewer where the context ends", low=1)
    num_samples: int = key(1, "texts per prompt (with --out: as many rows in succession)", low=1)
    stop: object = key("", "end where this text comes")
    seed: int = key(1337, "seeds the draws, with the number of the text", low=0)
    batch: int = key(16, "texts that are generated side by side", low=1)
    embed: str = key("none", "instead of text, the states of the prompt's tokens: their mean, or "
                     "those of the last", ("none", "mean", "last"))
    layers: str = key("-1", "whose states (averaged): N or FROM:TO; 0 are the embeddings, -1 the "
                      "last, normalised")
    save: bool = key(False, "add the texts to the run's samples.jsonl, which report.py shows")
    device: str = key("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    dtype: str = key("auto", "matmuls (auto: bf16 where it is native)", ("auto", "fp32", "bf16"))
    compile: str = key("auto", "torch.compile (auto: for --prompts on CUDA)",
                       ("auto", "true", "false"))


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import base64
import importlib.util
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from model import LLaMA
from plainllama import parallel
from plainllama.generation import generate
from plainllama.generation.prompt_files import Journal, as_line, made_with, read_prompts, write_out
from plainllama.progress import Progress
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.weights import checkpoint
from plainllama.weights.huggingface import read_config


def main(command) -> int:
    """Check what was asked, and do this rank's share of it."""
    f = command.flags
    f.stop = [f.stop] * bool(f.stop) if isinstance(f.stop, str) else list(f.stop)
    if command.files or not all(isinstance(stop, str) and stop for stop in f.stop):
        raise UserError(f"cannot use {(command.files or f.stop)[0]!r}: --ckpt names the model, "
                        "--prompt the text to go on from, --stop one or more texts")
    if bool(f.prompts) != bool(f.out) or (f.prompts and f.prompt):
        raise UserError("--prompts F.jsonl and --out G.jsonl go together, without --prompt")
    if f.embed != "none" and (not f.out.endswith(".parquet") or f.save):
        raise UserError("--embed writes states, and those to a .parquet: --prompts F --out "
                        "G.parquet, without --save")
    if ".parquet" in (f.prompts[-8:], f.out[-8:]) and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"a .parquet needs pyarrow: {settings.install('data')}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not f.out:
        raise UserError("several processes share a file: --prompts F.jsonl --out G.jsonl")
    rows, table, complete = [{f.column: f.prompt}] * f.num_samples, None, False
    if f.prompts:
        added = {"completion", "stop"} if f.embed == "none" else {"embedding"}
        rows, table, complete = read_prompts(Path(f.prompts), Path(f.out), f.num_samples, f.column,
                                             added)
    world = parallel.start(f.device, "auto")
    world.set_timeout(timedelta(days=7))  # ranks do not end together
    try:
        return work(f, rows, table, complete, world)
    finally:
        world.close()


def work(f: Any, rows: list[dict], table: Any, complete: bool, world: parallel.World) -> int:
    """From rows to what is written or shown, the longest prompts first."""
    folder = world.decide(lambda: checkpoint.find_checkpoint(f.ckpt))
    owner, config = run_of(folder), read_config(folder)
    if f.save and owner is None:
        raise UserError(f"--save adds to a run's samples.jsonl, and {folder} lies in no run")
    tokenizer, room = Tokenizer.load(folder), config.block_size - (f.embed == "none")
    prompts = [[tokenizer.bos_id, *tokenizer.encode(row[f.column])] for row in rows]
    for i, prompt in enumerate(prompts):
        if len(prompt) > room:
            where = f"{f.prompts}:{i // f.num_samples + 1}: " if f.prompts else ""
            raise UserError(f"{where}the prompt has {len(prompt)} tokens, and the model's context "
                            f"of {config.block_size} must hold it"
                            + " and at least one more" * (f.embed == "none") + "; shorten it")
    generate.layers_of(f.layers, config.n_layer + 1)
    journal = Journal(Path(f.out), made_with(f, folder)) if f.out else None
    done = set(world.decide(lambda: list(journal.read()) if journal else []))
    if complete and journal:
        if world.rank == 0:
            journal.remove()  # there if a kill came just before this line
            print(f"{f.out} is complete, with all {len(rows)} rows, from an earlier start; "
                  "move it away to make it anew")
        return 0
    if journal:
        journal.begin(world.rank)
    if done and world.rank == 0:
        print(f"{len(done)} of {len(rows)} rows were done before", flush=True)
    todo = sorted(set(range(len(rows))) - done, key=lambda i: (-len(prompts[i]), i))
    batches = [todo[first:first + f.batch] for first in range(0, len(todo), f.batch)]
    model = generate.ready(folder, world.device, f.dtype)
    found, said = decode(f, model, tokenizer, prompts, batches, journal, world)
    if world.rank > 0:
        return 0
    if journal:
        found = journal.read()
        write_out(Path(f.out), rows, table, [found[i] for i in range(len(rows))])
        journal.remove()
    for i, row in enumerate(rows if not f.out and len(rows) > 1 else ()):
        print(f"--- {i + 1} of {len(rows)} ({found[i]['stop']})\n{row[f.column]}"
              f"{found[i]['completion']}")
    if f.save and owner:
        file, step = owner / "samples.jsonl", int(folder.name.removeprefix("step_"))
        there = read_rows(file, tolerant=True)  # a text that is there is not added again
        texts = [{"step": step, "prompt": row[f.column], **found[i]} for i, row in enumerate(rows)]
        with open(file, "ab") as kept:
            kept.writelines(as_line(text) for text in texts if text not in there)
    print(said)
    return 0


def decode(f: Any, model: LLaMA, tokenizer: Tokenizer, prompts: list[list[int]],
           batches: list[list[int]], journal: Journal | None,
           world: parallel.World) -> tuple[dict[int, dict], str]:
    """(what this rank found for its share of the batches, unless it is in the journal; a line about
    the time it took)."""
    config, embed, stream = model.config, f.embed != "none", not f.out and len(prompts) == 1
    mine, compiled = batches[world.rank::world.size], None
    if mine and not embed and (f.compile == "true" or (
            f.compile == "auto" and f.out and world.device.type == "cuda")):
        capacity = min(config.block_size, len(prompts[mine[0][0]]) + f.max_new_tokens)
        compiled = generate.compile_step(model, f.batch, capacity, f.compile == "true")
    print(f.prompt * stream, end="", flush=True)
    progress = Progress("embedding" if embed else "sampling", sum(map(len, mine)), "rows",
                            not stream and world.rank == 0)
    found: dict[int, dict] = {}
    start, speed, tokens, cut = time.perf_counter(), generate.Speed(), 0, 0
    for batch in mine:
        ids = [prompts[i] for i in batch]
        if embed:
            states = generate.embed(model, ids, f.embed,
                                    generate.layers_of(f.layers, config.n_layer + 1))
            new = [{"embedding": base64.b64encode(state.numpy().astype("<f4").tobytes()).decode()}
                   for state in states]
            tokens += sum(map(len, ids))
        else:
            texts = generate.complete(model, tokenizer, ids, f.max_new_tokens, f,
                                      [generate.row_seed(f.seed, i) for i in batch], f.stop, stream,
                                      compiled, speed)
            new = [{"completion": text, "stop": ended} for ended, text, _ in texts]
            tokens += sum(count for _, _, count in texts)
            cut += sum(ended == "length" and len(one) + count == config.block_size
                       for one, (ended, _, count) in zip(ids, texts, strict=True))
        if journal:
            journal.add([{"row": i} | one for i, one in zip(batch, new, strict=True)])
        else:
            found |= dict(zip(batch, new, strict=True))
        progress.add(len(batch))
    progress.close()
    if journal:
        journal.file.close()
    tokens, cut = map(int, world.sum(torch.tensor([tokens, cut], device=world.device)).tolist())
    seconds = time.perf_counter() - start
    return found, (
        "\n" * stream + f"{tokens} {'' if embed else 'new '}tokens in {seconds:.2f} s: "
        f"{tokens / seconds:.1f} tokens/s{speed.told(world.device) if world.rank == 0 else ''}"
        + f"; {cut} ended where the context ends, at {config.block_size} tokens" * bool(cut)
        + f" -> {f.out}" * bool(f.out))


if __name__ == "__main__":
    run_command(main, COMMAND)
