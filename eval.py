"""Score a checkpoint: python eval.py [--ckpt X] [--tasks a,b] [--by_position] [--json]

Bits per byte and perplexity of the validation split, then tasks: tinyMMLU (the default), passkey (a
digit told far above: is it found again?), any task that lm-eval knows by name, or local:FILE.jsonl.
A local file holds rows of one kind: `question, choices, answer` (answer an index or a letter,
prompt as MMLU's, five worked examples of the same `subject` in front with --shots=FILE.jsonl), or
`context, continuation`. The scores also go to RUN/eval/step_N.json. --by_position tells the loss by
quarters of the context; --context=N cuts the validation split into shorter windows: what a model
whose context was lengthened still does with short texts. --baselines also scores, on the same
windows, what counting reaches: a unigram and a 5-gram model. Exit codes: 0 done; 2 the input, or a
named task whose data cannot be had.
"""

from dataclasses import dataclass

import settings
from settings import UserError


@dataclass
class Flags:
    """Options of eval.py."""

    ckpt: str = settings.key("out", "a checkpoint, a run (its newest step) or a folder of runs")
    tasks: str = settings.key("tinyMMLU", "names, with commas between them (empty: none)")
    shots: str = settings.key("", "a .jsonl file of worked examples for local questions")
    limit: int = settings.key(0, "only the first N questions of each task (0: all)", low=0)
    data: str = settings.key("", "data set for bits per byte (default: the run's)")
    eval_tokens: int = settings.key(0, "validation tokens (0: as in the run)", low=0)
    batch_tokens: int = settings.key(0, "tokens per forward pass (0: by the device)", low=0)
    by_position: bool = settings.key(False, "also the loss by position in the context")
    context: int = settings.key(0, "tokens per validation window (0: the model's context)", low=0)
    baselines: bool = settings.key(False, "also score a unigram and a 5-gram model")
    device: str = settings.key("auto", "where to score", ("auto", "cpu", "cuda", "mps"))
    dtype: str = settings.key("auto", "precision of the matmuls", ("auto", "fp32", "bf16"))
    json: bool = settings.key(False, "the result as JSON in the last line")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = settings.command(__doc__, Flags, takes="files")

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import parallel
import shards
from attention import bounds
from log import Progress
from model import IGNORE
from parallel import World
from tokenizer import ByteInfo, Tokenizer, byte_info, decoded_bytes


def main(command) -> int:
    """Score one checkpoint; under torchrun the ranks share the work."""
    if command.files:
        raise UserError(f"unexpected argument {command.files[0]}; name the model with --ckpt=")
    world = parallel.start(command.flags.device, "auto")
    try:
        return measure(command.flags, "tasks" in command.overrides, world)
    finally:
        world.close()


def measure(flags: Flags, named: bool, world: World) -> int:
    """The whole command; `named`: the user asked for these tasks. The exit code."""
    import tasks

    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    folder = checkpoint.find(flags.ckpt, quiet=world.rank > 0)
    run, tokenizer = checkpoint.run_of(folder), Tokenizer.load(folder)
    block_size = checkpoint.model_config(folder).block_size
    if flags.context > block_size:
        raise UserError(f"--context={flags.context} is more than the {block_size} tokens of the "
                        "model's context")
    length = flags.context or block_size
    # every input is looked at before anything slow begins; rank 0 downloads, then the others read
    rows = validation(flags, folder, run, length, say)
    jobs, missing = tasks.find(flags) if world.rank == 0 else ({}, [])
    if world.agree(bool(jobs)) and world.rank > 0:
        jobs, _ = tasks.find(flags)
    for line in missing:
        say(line)

    model = checkpoint.load_model(folder, world.device, parallel.pick_dtype(
        flags.dtype, world.device))
    batch_tokens = flags.batch_tokens or (32768 if world.device.type == "cuda" else 4096)
    result: dict = {}
    if flags.baselines and (flags.data or length < block_size or not (run and rows)):
        raise UserError("--baselines counts in the rows that a run has seen: name a run whose data "
                        "set is here, without --data and --context")
    special = [f"--{name}" for name in ("data", "limit", "eval_tokens", "dtype")
               if getattr(flags, name) != getattr(Flags, name)]
    keep = None if special else run  # RUN/eval holds what all runs can be compared by
    if run and special:
        say(f"not recorded in {run}/eval, because of {' '.join(special)}")
    if run:  # tokens: targets trained on, as in metrics.jsonl
        state = checkpoint.read_state(folder)
        result = {"step": state["step"], "tokens": state["rows"] * block_size}
    if rows:
        tokens = flags.eval_tokens or config_of(run).get("eval_tokens") or 1 << 20
        micro_batch = max(1, batch_tokens // length)
        begin = tokenizer.bos if config_of(run).get("doc_mask") else None
        found = evaluate(model, rows, byte_info(folder), tokens, micro_batch, world, begin)
        shown = {name: found[name] for name in ("val_loss", "val_bpb", "ppl")}
        kept = {**shown, "val_tokens": found["tokens"], "val_bytes": found["bytes"]}
        windows = f" in windows of {length}" * (length < block_size)
        say(table(f"validation{windows}, {found['tokens']:,} tokens, {found['bytes']:,} bytes",
                  shown))
        if flags.by_position:
            kept["by_position"] = by_position(model, rows, tokens, micro_batch, world, begin)
            say(table(f"loss by position{windows}, nats per token", kept["by_position"]))
        result |= kept if length == block_size else {"contexts": {str(length): kept}}
        if flags.baselines and run and world.rank == 0:
            result["baselines"] = compare(rows, state["rows"], found, config_of(run), say)
    result["tasks"] = {}
    record(keep, result, world)
    scorer = tasks.Scorer(model, tokenizer, batch_tokens, world)
    for job in jobs.values():
        scorer.truncated.clear()
        scores = job(scorer)
        result["tasks"] |= scores
        record(keep, result, world)  # after each task: what is finished is kept
        for task, metrics in scores.items():
            say(table(f"{task}, {metrics['n']} prompts", metrics))
    if flags.json:
        say(json.dumps(result))
    return 2 if named and missing else 0


# ---- bits per byte

@torch.no_grad()
def evaluate(model: nn.Module, rows: shards.Rows, token_byte_info: ByteInfo, tokens: int,
             micro_batch: int, world: World, begin: int | None = None) -> dict:
    """{val_loss, val_bpb, tokens, bytes, ppl} of the first `tokens` // T windows, in their order.

    val_loss is nats per target; val_bpb is nats / ln 2 / utf-8 bytes of the decoded targets, so
    boundary tokens count above the line only. Independent of micro_batch (rows per pass) and of the
    number of ranks: rank r takes every W-th window, and rows whose targets are ignored fill up the
    last passes, so that all passes have one shape and all ranks do as many. `begin`: the id that
    begins a document, if tokens see their own document only (doc_mask). Calls only
    model(ids, targets), the summed loss. Collective.
    """
    count = max(1, min(tokens // rows.block_size, rows.windows))
    losses, n_bytes = [], 0
    progress = Progress("validation", count, "rows", world.rank == 0,
                        world.device.type)
    for first in range(0, count, micro_batch * world.size):
        mine = range(first + world.rank, min(first + micro_batch * world.size, count), world.size)
        ids = np.zeros((micro_batch, rows.block_size + 1), np.int64)
        if mine:
            ids[:len(mine)] = rows.read_windows(mine)
            n_bytes += decoded_bytes(ids[:len(mine)], token_byte_info)
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        y[len(mine):] = IGNORE
        own = [] if begin is None else [None, bounds(x, begin).to(world.device)]
        losses.append(model(x.to(world.device), y.to(world.device), *own))
        progress.add(min(micro_batch * world.size, count - first))
    progress.close()
    nll = torch.stack(losses).cpu().double().sum()  # read once: passes are not held up
    sums = world.sum(torch.stack([nll, torch.tensor(n_bytes, dtype=torch.float64)])).tolist()
    targets = count * rows.block_size
    loss = sums[0] / targets
    return {"val_loss": loss, "val_bpb": sums[0] / math.log(2) / max(sums[1], 1),
            "tokens": targets, "bytes": int(sums[1]), "ppl": math.exp(min(loss, 700))}


@torch.no_grad()
def by_position(model: nn.Module, rows: shards.Rows, tokens: int, micro_batch: int,
                world: World, begin: int | None = None) -> dict:
    """{'0-255': nats per target that follows one of these positions, '0-255_stderr': ..., n}: the
    windows of evaluate(), in quarters; the standard errors are over the n windows. `begin`: as
    there. Collective."""
    count, T = max(1, min(tokens // rows.block_size, rows.windows)), rows.block_size
    losses = torch.zeros(count, T, dtype=torch.float64)
    progress = Progress("by position", count, "rows", world.rank == 0, world.device.type)
    for first in range(0, count, micro_batch * world.size):
        mine = range(first + world.rank, min(first + micro_batch * world.size, count), world.size)
        if mine:
            ids = torch.from_numpy(rows.read_windows(mine).astype(np.int64))
            own = [] if begin is None else [None, None, bounds(ids[:, :-1], begin).to(world.device)]
            logits = model(ids[:, :-1].to(world.device), *own).float().flatten(0, 1)
            nats = F.cross_entropy(logits, ids[:, 1:].flatten().to(world.device), reduction="none")
            losses[list(mine)] = nats.view(-1, T).cpu().double()
        progress.add(min(micro_batch * world.size, count - first))
    progress.close()
    found: dict = {}
    quarters = world.sum(losses).split(-(-T // 4), dim=1)
    for first, quarter in zip(range(0, T, -(-T // 4)), quarters, strict=True):
        means, name = quarter.mean(1), f"{first}-{first + quarter.shape[1] - 1}"
        found[name] = means.mean().item()
        found[f"{name}_stderr"] = means.std(correction=0).item() / math.sqrt(max(1, count - 1))
    return found | {"n": count}


def compare(rows: shards.Rows, shown: int, found: dict, config: dict, say) -> dict:
    """What counting reaches beside the model's result `found`, {unigram_bpb, 5-gram_bpb, tokens}.

    `rows`: the validation windows; `shown`: rows of the training split that the run, whose config
    this is, has consumed.
    """
    import ngram

    split = rows.split
    if config.get("mixture") or config.get("packing", "concat") != "concat":
        raise UserError("--baselines counts in the rows of one data set with packing=concat")
    train = shards.Rows(shards.Split(split.folder, "train", split.manifest), rows.block_size,
                        config["seed"], config.get("overfit_rows", 0))
    scored = rows.read_windows(range(found["tokens"] // rows.block_size)).astype(np.int64)
    table = ngram.baselines(train, shown, scored, found["bytes"],
                            split.manifest["tokenizer"]["vocab_size"])
    least = table["unigram_bpb"]
    for name, bpb in {"unigram": least, "5-gram": table["5-gram_bpb"],
                      "this model": found["val_bpb"]}.items():
        say(f"  {name:<14}{bpb:9.4f} bits per byte, {1 - bpb / least:6.1%} below unigram")
    return table


def validation(flags: Flags, folder: Path, run: Path | None, block_size: int,
               say) -> shards.Rows | None:
    """The windows of the validation split; None, which is said, if no data set was named and the
    run's is not here."""
    name = flags.data or config_of(run).get("dataset", "")
    places = [Path(name), Path("data") / name] if flags.data else [Path("data") / name]
    places += [run.parent.parent / "data" / name] if run else []
    data = next((place for place in places if name and place.is_dir()), None)
    if data is None and flags.data:
        raise UserError(f"no data set {name}; name a folder that prepare.py wrote")
    if data is None:
        say(f"no bits per byte: {f'no data set data/{name}' if name else 'the model has no run'}; "
            "name a data set with --data=FOLDER")
        return None
    rows = shards.Rows(shards.open_split(data, "val"), block_size, seed=0)
    if Tokenizer.load(data).sha256 != Tokenizer.load(folder).sha256:
        raise UserError(f"{data} was made with another tokenizer than {folder} (the sha256 of "
                        "tokenizer.json differs); name one that fits with --data=FOLDER")
    known = checkpoint.read_state(folder).get("data_hash") if run else None
    if not flags.data and known != (data / "manifest.sha256").read_text().strip():
        say(f"note: {data} is not as it was when this run was trained on it")
    return rows


# ---- what is shown and kept

def table(title: str, metrics: dict) -> str:
    """A title and lines of metric, value, 95 % interval (1.96 standard errors), chance level."""
    cut = metrics.get("truncated")
    lines = [title + (f", {cut} too long for the context and cut at the left" if cut else "")]
    for name, value in metrics.items():
        if name not in ("n", "truncated", "chance") and "_stderr" not in name:
            metric, comma, filtered = name.partition(",")
            error, chance = metrics.get(f"{metric}_stderr{comma}{filtered}"), metrics.get("chance")
            lines.append(f"  {name:<14}{value:9.4f}" + (f" ± {1.96 * error:.4f}" if error else "")
                         + (f"   chance {chance:.4f}" if chance and metric[:3] == "acc" else ""))
    return "\n".join(lines)


def record(run: Path | None, result: dict, world: World) -> None:
    """Write RUN/eval/step_N.json; scores of the same step that were not computed now are kept."""
    if run and world.rank == 0:
        path = run / "eval" / f"step_{result['step']}.json"
        path.parent.mkdir(exist_ok=True)
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged
            old = {}
        both = {name: old.get(name, {}) | result.get(name, {}) for name in ("tasks", "contexts")}
        settings.to_json(path, old | result | {k: v for k, v in both.items() if v or k == "tasks"})


def config_of(run: Path | None) -> dict:
    """The config in run.json; {} without a run."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["config"] if run else {}


if __name__ == "__main__":
    settings.run(main, COMMAND)
