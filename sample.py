"""Prompts -> text.

  sample.py                        the newest run under out/, from the begin token alone
  sample.py out/RUN --prompt="The sea" --num_samples=3 --temperature=0.8 --top_p=0.95
  sample.py --prompts=F.jsonl --out=G.jsonl
                                   rows {"prompt": ...} -> the same rows in the same order, with
                                   `completion` and `stop` added; rows {"messages": ...}, also with
                                   "tools", get the `message` that answers too (as JSON text in
                                   a .parquet); --system and --tools are for those without their own
  sample.py --prompts=F.jsonl --template=T.txt --out=G.jsonl
                                   rows of any fields, rewritten: each fills the {FIELD}s of T.txt,
                                   which a model of dialogs is asked and another goes on from; also
                                   `lost`, the row's numbers that the completion lacks, `added`,
                                   those that it alone has, and `copied`; {{ and }} are braces
  sample.py --prompts=data/SET --out=G.parquet --embed=mean --layers=1:
                                   of each client of a set of tables its id and emb_0001, ...
  sample.py --prompts=F.jsonl --out=G.parquet --embed=mean
                                   the same rows with `embedding`, the model's states, added; with
                                   --id=COLUMN that column and emb_0001, emb_0002, ... alone

  sample.py --chat --system="Be brief." --tools=FILE.py
                                   a talk; /help lists its commands; the functions of FILE.py, which
                                   is run, may be called by the model

  sample.py --serve --port=8000    OpenAI's endpoints under http://127.0.0.1:8000/v1, until a
                                   signal; they want the key in PLAINLLAMA_API_KEY, if it is set

--prompts also takes .txt (a line is a prompt) and .parquet, --out .parquet. Started again after a
kill, the same command goes on; torchrun shares the rows among its processes. --num_samples=N makes
N rows of each in succession, with `sample`, 0 to N - 1. `stop` says why a text
ended: eos (the model ended it), stop (a --stop text came; it is cut off) or length (max_new_tokens,
or the end of the model's context). --stop is a text or several with commas between, in which \\n,
\\t, \\r and \\\\ are a line break, tab, return and backslash, or a list in Python's form:
--stop='[",", "."]'. Text i of a seed is the same alone and in a batch. The options of sampling work
in the order in which they stand here, which is that of transformers.
"""

from dataclasses import dataclass

from plainllama.cluster import HERE, Cluster
from plainllama.command import parse_arguments, run_command
from plainllama.files import read_rows, run_of, step_of
from plainllama.settings import Sampling, UserError, install, key


@dataclass
class Flags(Sampling):
    """What sample.py takes."""

    ckpt: str = key("out", "a checkpoint, a run (its newest step) or a folder of runs (the newest)")
    base: str = key("", "the folder of an adapter's base, where that has moved")
    prompt: str = key("", "the text to go on from (empty: the begin token alone)")
    prompts: str = key("", "a .jsonl, .txt or .parquet file with a prompt per row, for --out; or "
                       "a prepared set of tables, for --embed or --template (id, split, text)")
    template: str = key("", "a text with {FIELD} in it, the prompt of each row of --prompts; what "
                        "became of the row's numbers is checked")
    column: str = key("prompt", "where in a row of --prompts the text stands")
    out: str = key("", "the .jsonl or .parquet file to write for --prompts")
    max_new_tokens: int = key(256, "tokens per text, fewer where the context ends", low=1)
    num_samples: int = key(1, "texts per prompt (with --out: as many rows, with `sample`)", low=1)
    stop: str = key("", "end where this text comes")
    seed: int = key(1337, "seeds the draws, with the number of the text", low=0)
    batch: int = key(16, "texts that are generated side by side", low=1)
    embed: str = key("none", "states of the prompt's tokens, not text", ("none", "mean", "last"))
    id: str = key("", "of --embed: keep of the rows this column alone, and write emb_0001, ...")
    layers: str = key("-1", "states N or FROM:TO, averaged (0: embeddings, -1: last, normalised)")
    save: bool = key(False, "add the texts to the run's samples.jsonl, which report.py shows")
    device: str = key("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    dtype: str = key("auto", "matmuls (auto: bf16 where it is native)", ("auto", "fp32", "bf16"))
    chat: bool = key(False, "talk with a model that was tuned on dialogs")
    system: str = key("", "the system message of --chat, of rows of messages and of --template")
    tools: str = key("", "a Python file, which is run: functions for --chat, schemas for rows")
    compile: str = key("auto", "torch.compile (auto: --out on CUDA)", ("auto", "true", "false"))
    ray: str = key("", "for --prompts: the address of a Ray cluster whose nodes share the rows",
                   bare=HERE)
    serve: bool = key(False, "answer OpenAI's requests over HTTP; --batch texts side by side")
    host: str = key("127.0.0.1", "of --serve: the address to listen on (0.0.0.0: all)")
    port: int = key(8000, "of --serve: the port to listen on (0: any)", (), 0, 65535)
    queue: int = key(256, "of --serve: how many texts may wait", low=1)
    cors: str = key("", "of --serve: the origin whose pages may ask, as http://localhost:3000")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags, takes="model")

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model import LLaMA
from plainllama import parallel
from plainllama.generation import generate, prompt_files
from plainllama.generation.decoding import Decoder, Made, Row, decoded_on
from plainllama.generation.talk import talk
from plainllama.generation.tools import Tools
from plainllama.progress import Progress
from plainllama.text.dialogs import Refused, asked
from plainllama.tokens.chat import END, Chat
from plainllama.tokens.templates import chat_of
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.weights import checkpoint, peft

FOR_SERVER = ("host", "port", "queue", "cors")
FOR_TEXTS = {*vars(Sampling()), "max_new_tokens", "stop", "seed", "compile"}  # not for states


def main(command) -> int:
    """Check what was asked, and do this rank's share of it."""
    f = command.flags
    f.stop = generate.stops_of(f.stop)
    if f.serve:
        return start_server(command)
    if idle := set(FOR_SERVER) & set(command.overrides):
        raise UserError(f"--{min(idle)} is for --serve")
    if f.chat:
        return start_talk(command)
    if f.template and (not f.prompts or f.embed != "none"):
        raise UserError("--template is for texts that are made of --prompts F.jsonl")
    if bool(f.prompts) != bool(f.out) or (f.prompts and f.prompt):
        raise UserError("--prompts F.jsonl and --out G.jsonl go together, without --prompt")
    if f.ray and (not f.prompts or f.compile == "true"):
        raise UserError("--ray shares the rows of --prompts among nodes, without --compile=true")
    if f.embed != "none" and (not f.out.endswith(".parquet") or f.save):
        raise UserError("--embed writes states, and those to a .parquet (--out), without --save")
    prompts = prompt_files.read_prompts(f)
    if (f.system or f.tools) and not any(prompts.talks(f.column)):
        raise UserError("--system and --tools are for --chat; rows of messages take them too")
    schemas = Tools(f.tools).schemas if f.tools else []
    with (contextlib.closing(parallel.start("cpu" if f.ray else f.device, "auto")) as world,
          contextlib.ExitStack() as stack):
        if world.size > 1 and (f.ray or not f.out):
            raise UserError("several processes share a file: --prompts F.jsonl --out G.jsonl, and "
                            "without --ray, whose nodes share it by themselves")
        world.set_timeout(timedelta(days=7))  # ranks do not end together
        idle = {"layers", "id"} if f.embed == "none" else FOR_TEXTS
        lines = f.prompts.lower().endswith(".txt")  # the one file whose fields a column names
        columns = f.prompts and not prompts.ids and (lines or not f.template)
        idle = set(command.overrides) & (idle if columns else idle | {"column"})
        if idle and world.rank == 0:
            print(f"without effect here: {', '.join(sorted(idle))}", flush=True)
        return checkpoint.with_checkpoint(f.ckpt, world,
                                          partial(work, f, prompts, schemas, world, stack))


def start_talk(command) -> int:
    """Talk with a model; the exit code."""
    f = command.flags
    if idle := {"prompt", "prompts", "template", "column", "out", "num_samples", "batch",
                "embed", "layers", "id", "save", "compile", "ray"} & set(command.overrides):
        raise UserError(f"--{min(idle)} has no effect on --chat")
    tools = Tools(f.tools) if f.tools else None
    with contextlib.closing(parallel.start(f.device, "auto")) as world:
        if world.size > 1:
            raise UserError("--chat is for one process")
        folder = checkpoint.find_checkpoint(f.ckpt)
        chat = chat_of(Tokenizer.load(peft.tokenizer_folder(folder, f.base)))
        dtype = parallel.pick_dtype(f.dtype, world.device)
        model = peft.load_model(folder, world.device, dtype, f.base)
        return talk(model, chat, f, tools)


def start_server(command) -> int:
    """Answer requests until a signal; the exit code."""
    f = command.flags
    used = {"serve", "ckpt", "base", "batch", "device", "dtype", *FOR_SERVER}
    if idle := set(command.overrides) - used:
        raise UserError(f"--{min(idle)} has no effect on --serve; requests say how they are drawn")
    try:
        from plainllama.generation import protocol, serving
    except ImportError as error:
        raise UserError(f"--serve needs {error.name}: {install('serve')}") from None
    from plainllama.generation.batching import Batch

    with contextlib.closing(serving.bind(f.host, f.port)) as place, \
            contextlib.closing(parallel.start(f.device, "auto")) as world:
        if world.size > 1:
            raise UserError("--serve is for one process")
        folder = checkpoint.find_checkpoint(f.ckpt)
        tokenizer = Tokenizer.load(peft.tokenizer_folder(folder, f.base))
        tuned = bool(tokenizer.template) or END in tokenizer.special_ids
        chat = chat_of(tokenizer) if tuned else None
        dtype = parallel.pick_dtype(f.dtype, world.device)
        model = peft.load_model(folder, world.device, dtype, f.base)
        about = protocol.Model((run_of(folder) or folder).resolve().name, model.config.block_size,
                               tokenizer, chat)
        batch = Batch(model, tokenizer.vocab_size, f.batch, f.queue)
        key = os.environ.get(serving.KEY, "")
        return serving.serve(serving.Service(about, batch, f.host, f.cors, key), place)


def work(f: Any, prompts: prompt_files.Prompts, schemas: list[dict], world: parallel.World,
         stack: contextlib.ExitStack, folder: Path) -> int:
    """Decode this rank's share of the rows; rank 0 then writes or shows what was made of all."""
    run, rows = run_of(folder), prompts.rows
    if f.save and run is None:
        raise UserError(f"--save adds to a run's samples.jsonl, and {folder} lies in no run")
    tokenizer = Tokenizer.load(peft.tokenizer_folder(folder, f.base))
    tuned = bool(tokenizer.template) or END in tokenizer.special_ids
    config, talks = peft.whole_config(folder, f.base), prompts.talks(f.column, tuned)
    if f.template and not tuned and (f.system or f.tools):
        raise UserError("--system and --tools are for a model that was tuned on dialogs")
    if prompts.ids:
        prompt_files.refuse_other_set(prompts, tokenizer.sha256, run, config.block_size)
    elif not all(talks) and tuned:
        print("(tuned on dialogs, and given bare text: " + (
            "write rows of `messages`)" if f.prompts else
            "--chat wraps what is said as training did)"))
    generate.layers_of(f.layers, config.n_layer + 1)  # a UserError without them
    chat = chat_of(tokenizer) if any(talks) else None
    ids = [*prompts.ids] or prompt_ids(f, prompts, talks, chat, schemas, tokenizer,
                                       config.block_size)
    if (longest := max(map(len, ids))) > config.block_size:
        raise UserError(f"{f.prompts} has a client of {longest} tokens, the model's context "
                        f"{config.block_size}; prepare it with that block_size")
    stream = not f.out and len(ids) == 1
    cluster = stack.enter_context(Cluster(f.ray)) if f.ray else None
    if cluster:
        cluster.choose_device(f)
    dtype = parallel.pick_dtype(f.dtype, world.device)
    journal = prompt_files.Journal(f, folder, dtype) if f.out else None
    done = world.decide(lambda: list(journal.read()) if journal else [])
    if journal and prompts.complete:
        if world.rank == 0:
            journal.remove()  # there if a kill came just before this line
            print(f"{f.out} is complete, with {len(rows)} rows; move it away to make it anew")
        return 0
    if journal:
        journal.begin(world.rank)
    if done and world.rank == 0:
        print(f"{len(done)} of {len(rows)} rows were done before", flush=True)
    todo = sorted(set(range(len(rows))).difference(done), key=lambda i: (-len(ids[i]), i))
    batches = [todo[first:first + f.batch] for first in range(0, len(todo), f.batch)]
    jobs = [[Row(i, ids[i], bool(talks[i])) for i in batch] for batch in batches]
    if cluster:
        files = [str(path) for path in folder.iterdir() if path.is_file()]
        cluster.check(Path(f.out).absolute().parent, files)
        results: Any = decoded_on(cluster, f, folder, jobs)
    else:
        model = peft.load_model(folder, world.device, dtype, f.base)
        jobs = jobs[world.rank::world.size]
        results = decoded_here(f, model, tokenizer, jobs, world, stream)
    made, line = gather(f, results, sum(map(len, jobs)), journal, world, config.block_size, stream)
    if world.rank > 0:
        return 0
    if journal:
        made = journal.finish(prompts)
    texts = [{"prompt": prompts.text(row, f.column), **made[i]} for i, row in enumerate(rows)]
    if not f.out and len(texts) > 1:
        for n, text in enumerate(texts, 1):
            print(f"--- {n} of {len(texts)} ({text['stop']})\n{text['prompt']}{text['completion']}")
    if f.save and run:  # those that are not there yet
        there = read_rows(run / "samples.jsonl", tolerant=True)
        rows = [{"step": step_of(folder)} | text for text in texts]
        with open(run / "samples.jsonl", "ab") as kept:
            kept.writelines(prompt_files.as_line(row) for row in rows if row not in there)
    print(line)
    return 0


def prompt_ids(f: Any, prompts: prompt_files.Prompts, talks: list[dict | None],
               chat: Chat | None, schemas: list[dict], tokenizer: Tokenizer,
               block_size: int) -> list[list[int]]:
    """Give the ids of each row's prompt or, by `chat`, of its talk, where the model may call
    `schemas` if there are no tools of its own. UserError if it is no talk, or for what does not fit
    into the context, beside a new token if one is drawn."""
    room, ids = block_size if f.embed != "none" else block_size - 1, []
    for i, dialog in [*enumerate(talks)][::f.num_samples]:
        where = f"{f.prompts}:{i // f.num_samples + 1}: " if f.prompts else ""
        try:
            if chat and dialog:
                prompt = chat.prompt(*asked(dialog, f.system, schemas))
            else:
                text = prompts.text(prompts.rows[i], f.column)
                prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
        except Refused as why:
            raise UserError(f"{where}{why} {why.found}".rstrip()) from None
        if len(prompt) > room:
            raise UserError(f"{where}the prompt has {len(prompt)} tokens, room is for {room} in a "
                            f"context of {block_size}")
        ids += [prompt] * f.num_samples
    return ids


def decoded_here(f: Any, model: LLaMA, tokenizer: Tokenizer, jobs: list[list[Row]],
                 world: parallel.World, stream: bool) -> Iterator[Made]:
    """Give what this process makes of its batches, the longest of which comes first."""
    compiled = None
    pays = f.compile == "auto" and f.out and world.device.type == "cuda"
    if jobs and f.embed == "none" and (f.compile == "true" or pays):
        capacity = min(model.config.block_size, len(jobs[0][0].ids) + f.max_new_tokens)
        compiled = generate.compile_step(model, f.batch, capacity, f.compile == "true")
    if stream:
        print(f.prompt, end="", flush=True)
    yield from map(Decoder(f, model, tokenizer, compiled, stream), jobs)
    if stream:
        print()


def gather(f: Any, results: Iterator[Made], count: int, journal: prompt_files.Journal | None,
           world: parallel.World, block_size: int, quiet: bool) -> tuple[dict, str]:
    """Keep what is made of `count` rows, as it comes. Return {row: what was made of it}, empty if
    the journal keeps it, and a line about what all ranks did."""
    embed = f.embed != "none"
    progress = Progress("embedding" if embed else "sampling", count, "rows",
                        not quiet and world.rank == 0)
    made: dict[int, dict] = {}
    keep = journal.add if journal else made.update
    start, tokens, cut = time.perf_counter(), 0, 0
    for batch in results:
        keep(batch.rows)
        tokens, cut = tokens + batch.tokens, cut + batch.cut
        progress.add(len(batch.rows))
    progress.close()
    if journal:
        journal.file.close()
    tokens, cut = world.sum(torch.tensor([tokens, cut], device=world.device)).tolist()
    seconds = time.perf_counter() - start
    kind, where = "tokens" if embed else "new tokens", f" -> {f.out}" if f.out else ""
    full = f"; {cut} ended where the context ends, at {block_size} tokens" if cut else ""
    return made, f"{tokens} {kind} in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s{full}{where}"


if __name__ == "__main__":
    run_command(main, COMMAND)
