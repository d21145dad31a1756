"""Score a checkpoint: python eval.py [--ckpt X] [--tasks a,b] [--by_position] [--json]

Bits per byte and perplexity of the validation split (or, with --text=FILE, of any text), then
tasks: tinyMMLU (the default, with its IRT estimates), passkey (a digit told far above: is it found
again?), any task that lm-eval knows by name, or local:FILE.jsonl. The scores also go to
RUN/eval/step_N.json. Exit codes: 0 done; 2 the input, or a named task that could not be scored.

A local file (also packed: .xz, .gz) holds rows of one kind:
  question, choices, answer   answer: a letter, an index from 0, or the choice itself. Letters are
                              scored if rows name a subject (the prompt is MMLU's), else whole
                              answers; a blank _ is filled in. --answers=letters or full decides
  context, choices, answer    the same without any words added
  context, continuation       is the continuation what the model says first?
--shots=FILE puts five rows of that file in front, solved, of the same subject where rows have one.

  --all=RUN            every checkpoint of a run, but those that have these scores already
  --irt=SAMPLES        no model: the estimates from samples_tinyMMLU_*.jsonl, as `lm_eval
                       --log_samples` writes it
  --by_position        also the loss by quarters of the context
  --context=N          validation in shorter windows: what a model whose context was lengthened
                       still does with short texts
  --baselines          on the same windows what counting reaches: a unigram and a 5-gram model
  --contamination      the share of each task's questions that have 13 words in a row in common
                       with the training data
"""

from dataclasses import dataclass

import settings
from settings import UserError


@dataclass
class Flags:
    """Options of eval.py."""

    ckpt: str = settings.key("out", "a checkpoint, a run (its newest step) or a folder of runs")
    all: str = settings.key("", "a run: score its checkpoints, the oldest first")
    tasks: str = settings.key("tinyMMLU", "names, with commas between them (empty: none)")
    shots: str = settings.key("", "a .jsonl file of worked examples for local questions")
    answers: str = settings.key("auto", "what is scored of local choices",
                                ("auto", "letters", "full"))
    limit: int = settings.key(0, "only the first N questions of each task (0: all)", low=0)
    include_path: str = settings.key("", "a folder with .yaml files of lm-eval tasks")
    irt_file: str = settings.key("", "tinyMMLU's parameters: a copy of tinyBenchmarks.pkl")
    irt: str = settings.key("", "a samples_tinyMMLU_*.jsonl to take the answers from")
    log_samples: bool = settings.key(False, "keep questions and answers beside the scores")
    contamination: bool = settings.key(False, "look for the questions in the training data")
    text: str = settings.key("", "a text (.txt, .jsonl, ...) for bits per byte, and no data set")
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

import itertools
import json
import math
import re
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
    """Score; under torchrun the ranks share the work."""
    flags = command.flags
    if command.files:
        raise UserError(f"unexpected argument {command.files[0]}; name the model with --ckpt=")
    if flags.irt:
        return from_samples(flags)
    world = parallel.start(flags.device, "auto")
    try:
        return measure(flags, "tasks" in command.overrides, world)
    finally:
        world.close()


def measure(flags: Flags, named: bool, world: World) -> int:
    """The whole command; `named`: the user asked for these tasks. The exit code."""
    import tasks

    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    folders = world.decide(lambda: walk(flags.all) if flags.all else [checkpoint.find(flags.ckpt)])
    run, tokenizer = checkpoint.run_of(folders[0]), Tokenizer.load(folders[0])
    block_size = checkpoint.model_config(folders[0]).block_size
    if flags.context > block_size:
        raise UserError(f"--context={flags.context} is more than the {block_size} tokens of the "
                        "model's context")
    length = flags.context or block_size
    # every input is looked at before anything slow begins; rank 0 downloads, then the others read
    rows = (Text(flags.text, tokenizer, length) if flags.text
            else validation(flags, folders[0], run, length, say))
    jobs, missing = {}, []  # type: ignore[var-annotated]

    def look() -> list[str]:
        nonlocal jobs, missing
        jobs, missing = tasks.find(flags, first=True)
        return list(jobs)

    names = world.decide(look)
    if names and world.rank > 0:
        found = tasks.find(flags, first=False)[0]
        jobs = {name: found[name] for name in names}
    for line in missing:
        say(line)
    if flags.baselines and (flags.data or length < block_size or not (run and rows) or flags.text):
        raise UserError("--baselines counts in the rows that a run has seen: name a run whose data "
                        "set is here, without --data, --context and --text")
    unfit: dict = {}
    if flags.contamination:
        import ngram

        unfit = ngram.contamination({name: job.questions() for name, job in jobs.items()},
                                    training_data(flags, run), tokenizer, world)
    special = [f"--{name}" for name in ("data", "limit", "eval_tokens", "dtype")
               if getattr(flags, name) != getattr(Flags, name)]
    keep = None if special else run  # RUN/eval holds what all runs can be compared by
    if run and special:
        say(f"not recorded in {run}/eval, because of {' '.join(special)}")
    failed = 0
    for folder in folders:
        if flags.all:
            done = keep and complete(keep, folder, bool(rows), flags, jobs)
            problem = "" if done else checkpoint.damage(folder, training=False)
            state = "has these scores" if done else problem and f"is damaged ({problem}): left out"
            state = world.agree(state)  # rank 0 writes the scores
            say(f"checkpoint {folder} {state}".rstrip())
            if state:
                continue
        failed += score(flags, folder, run, keep, rows, jobs, unfit, world, say)
    return 2 if named and (missing or failed) else 0


def score(flags: Flags, folder: Path, run: Path | None, keep: Path | None, rows, jobs: dict,
          unfit: dict, world: World, say) -> int:
    """One checkpoint: validation, then every task; each score is recorded as soon as it is there.
    How many tasks could not be scored."""
    import tasks

    model = checkpoint.load_model(folder, world.device, parallel.pick_dtype(
        flags.dtype, world.device))
    tokenizer, block_size = Tokenizer.load(folder), model.config.block_size
    batch_tokens = flags.batch_tokens or (32768 if world.device.type == "cuda" else 4096)
    state = checkpoint.read_state(folder) if run else {}
    # tokens: targets trained on, as in metrics.jsonl
    result: dict = {"step": state["step"], "tokens": state.get(
        "tokens", state["rows"] * block_size)} if run else {}
    if rows:
        length, micro_batch = rows.block_size, max(1, batch_tokens // rows.block_size)
        tokens = flags.eval_tokens or config_of(run).get("eval_tokens") or 1 << 20
        tokens = rows.windows * length if flags.text and not flags.eval_tokens else tokens
        begin = tokenizer.bos if config_of(run).get("doc_mask") else None
        found = evaluate(model, rows, byte_info(folder), tokens, micro_batch, world, begin)
        shown = {name: found[name] for name in ("val_loss", "val_bpb", "ppl")}
        kept = {**shown, "val_tokens": found["tokens"], "val_bytes": found["bytes"]}
        windows = f" in windows of {length}" * (length < block_size)
        say(tasks.table(f"{flags.text or 'validation'}{windows}, {found['tokens']:,} tokens, "
                  f"{found['bytes']:,} bytes", shown))
        if flags.by_position:
            kept["by_position"] = by_position(model, rows, tokens, micro_batch, world, begin)
            say(tasks.table(f"loss by position{windows}, nats per token", kept["by_position"]))
        result |= ({"texts": {flags.text + windows: kept}} if flags.text else
                   kept if length == block_size else {"contexts": {str(length): kept}})
        if flags.baselines and run and world.rank == 0:
            import ngram

            result["baselines"] = ngram.compare(rows, state["rows"], found, config_of(run), say)
    result["tasks"] = {}
    tasks.record(keep, result, world)
    scorer, failed = tasks.Scorer(model, tokenizer, batch_tokens, world), 0
    for name, job in jobs.items():
        scorer.truncated.clear()
        scorer.samples.clear()
        try:
            scores = job.score(scorer)
        except UserError as error:  # the same on every rank
            say(f"no {name}: {error}")
            failed += 1
            continue
        for task, metrics in scores.items():
            metrics |= {"begin": tokenizer.begin} | unfit.get(name, {})
            say(tasks.table(f"{task}, {metrics['n']} prompts", metrics))
        result["tasks"] |= scores
        tasks.record(keep, result, world)  # after each task: what is finished is kept
        if flags.log_samples and world.rank == 0:
            for task, samples in scorer.samples.items():
                tasks.write_samples(keep, result.get("step"), task, samples)
    if flags.json:
        say(json.dumps(result))
    return failed


def walk(run: str) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = checkpoint.steps_of(Path(run))[::-1]
    if not found:
        raise UserError(f"--all={run} is not a run with checkpoints; name one, such as out/NAME")
    return found


def complete(run: Path, folder: Path, rows: bool, flags: Flags, jobs: dict) -> bool:
    """Whether RUN/eval has what is asked for of a checkpoint."""
    import tasks

    old = tasks.read_scores(run, int(folder.name.removeprefix("step_")))
    where = old.get("contexts", {}).get(str(flags.context), {}) if flags.context else old
    if flags.text:
        windows = f" in windows of {flags.context}" * bool(flags.context)
        where = old.get("texts", {}).get(flags.text + windows, {})
    wanted = ["val_loss"] * rows + ["by_position"] * flags.by_position
    return (all(name in where for name in wanted) and (not flags.baselines or "baselines" in old)
            and all(task in old.get("tasks", {}) for job in jobs.values() for task in job.names))


def from_samples(flags: Flags) -> int:
    """tinyMMLU's scores from the answers that another program has kept."""
    import irt
    import tasks

    right, told = irt.read_samples(flags.irt)
    known = irt.load(flags.irt_file)
    if known[0] and len(right) != len(known[0].anchors):
        raise UserError(f"{flags.irt} holds {len(right)} answers, tinyMMLU has "
                        f"{len(known[0].anchors)} questions; run it without --limit")
    metrics = {"acc": float(right.mean()), "chance": 1 / 4, "n": len(right), **told}
    metrics |= irt.scores(right, known)
    print(tasks.table(f"{flags.irt}, {len(right)} prompts", metrics))
    if flags.json:
        print(json.dumps(metrics))
    return 0


# ---- bits per byte

class Text:
    """The windows of a text, the last one filled up with shards.PAD; as evaluate() reads rows."""

    def __init__(self, file: str, tokenizer: Tokenizer, block_size: int):
        import sources

        path, dropped = Path(file), sources.Tally()
        if path.is_file() and not re.fullmatch(sources.KINDS, path.name):
            parts = [[sources.Piece(file, file, "txt", "text", path.stat().st_size)]]
        else:
            _, parts = sources.survey(sources.described(file), [])
        texts = list(sources.documents(itertools.chain(*parts), dropped))
        for rule, found in dropped.items():
            if rule != "empty":
                raise UserError(f"--text: {found['first']}: {rule}")
        ids = np.concatenate([np.zeros(0, np.int64), *tokenizer.encode_documents(texts)])
        self.block_size, self.windows = block_size, -(-(len(ids) - 1) // block_size)
        if self.windows < 1:
            raise UserError(f"--text={file} holds no text")
        filled = np.full(self.windows * block_size + 1, shards.PAD, np.int64)
        filled[:len(ids)] = ids
        self.all = np.lib.stride_tricks.sliding_window_view(filled, block_size + 1)[::block_size]

    def read_windows(self, windows) -> np.ndarray:
        """The given windows, int64 (m, T + 1)."""
        return self.all[list(windows)]


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
    losses, n_bytes, targets = [], 0, 0
    progress = Progress("validation", count, "rows", world.rank == 0,
                        world.device.type)
    for first in range(0, count, micro_batch * world.size):
        mine = range(first + world.rank, min(first + micro_batch * world.size, count), world.size)
        ids = np.zeros((micro_batch, rows.block_size + 1), np.int64)
        if mine:
            ids[:len(mine)] = rows.read_windows(mine)
        nothing = torch.from_numpy(ids[:, 1:] == shards.PAD)
        nothing[len(mine):] = True
        ids[ids == shards.PAD] = token_byte_info.bos  # which has no bytes
        n_bytes += decoded_bytes(ids[:len(mine)], token_byte_info)
        targets += nothing.numel() - int(nothing.sum())
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        y[nothing] = IGNORE
        own = [] if begin is None else [None, bounds(x, begin).to(world.device)]
        losses.append(model(x.to(world.device), y.to(world.device), *own))
        progress.add(min(micro_batch * world.size, count - first))
    progress.close()
    nll = torch.stack(losses).cpu().double().sum()  # read once: passes are not held up
    sums = world.sum(torch.cat([nll[None], torch.tensor([n_bytes, targets]).double()])).tolist()
    loss = sums[0] / sums[2]
    return {"val_loss": loss, "val_bpb": sums[0] / math.log(2) / max(sums[1], 1),
            "tokens": int(sums[2]), "bytes": int(sums[1]), "ppl": math.exp(min(loss, 700))}


@torch.no_grad()
def by_position(model: nn.Module, rows: shards.Rows, tokens: int, micro_batch: int,
                world: World, begin: int | None = None) -> dict:
    """{'0-255': nats per target that follows one of these positions, '0-255_stderr': ..., n}: the
    windows of evaluate(), in quarters; the standard errors are over the n windows. `begin`: as
    there. Collective."""
    count, T = max(1, min(tokens // rows.block_size, rows.windows)), rows.block_size
    losses = torch.zeros(2, count, T, dtype=torch.float64)  # nats, and whether there is a target
    progress = Progress("by position", count, "rows", world.rank == 0, world.device.type)
    for first in range(0, count, micro_batch * world.size):
        mine = range(first + world.rank, min(first + micro_batch * world.size, count), world.size)
        if mine:
            ids = torch.from_numpy(rows.read_windows(mine).astype(np.int64))
            there = ids[:, 1:] != shards.PAD
            ids.clamp_(min=0)
            own = [] if begin is None else [None, None, bounds(ids[:, :-1], begin).to(world.device)]
            logits = model(ids[:, :-1].to(world.device), *own).float().flatten(0, 1)
            nats = F.cross_entropy(logits, ids[:, 1:].flatten().to(world.device), reduction="none")
            losses[0, list(mine)] = nats.view(-1, T).cpu().double() * there
            losses[1, list(mine)] = there.double()
        progress.add(min(micro_batch * world.size, count - first))
    progress.close()
    found: dict = {}
    quarters = world.sum(losses).split(-(-T // 4), dim=2)
    for first, (nats, there) in zip(range(0, T, -(-T // 4)), quarters, strict=True):
        if there.any():
            held, name = there.sum(1) > 0, f"{first}-{first + nats.shape[1] - 1}"
            means = nats.sum(1)[held] / there.sum(1)[held]
            found[name] = (nats.sum() / there.sum()).item()
            found[f"{name}_stderr"] = (means.std(correction=0).item()
                                       / math.sqrt(max(1, len(means) - 1)))
    return found | {"n": count}


def validation(flags: Flags, folder: Path, run: Path | None, block_size: int,
               say) -> shards.Rows | None:
    """The windows of the validation split; None, which is said, if no data set was named and the
    run's is not here."""
    name = flags.data or config_of(run).get("dataset", "")
    data = data_folder(name, run, bool(flags.data))
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


def data_folder(name: str, run: Path | None, named: bool = False) -> Path | None:
    """The data set of that name here or beside the run; `named`: it may also be a path."""
    places = [Path(name)] * named + [Path("data") / name]
    places += [run.parent.parent / "data" / name] if run else []
    return next((place for place in places if name and place.is_dir()), None)


def training_data(flags: Flags, run: Path | None) -> list[Path]:
    """The data sets that a run learns from, or the one that is named."""
    config = config_of(run)
    names = [flags.data or config.get("dataset", "")]
    names = names if flags.data else list(config.get("mixture") or names)
    found = [data_folder(name, run, bool(flags.data)) for name in names]
    if None in found:
        raise UserError("--contamination looks through the training data, and data set "
                        f"{' '.join(names) or 'of this model'} is not here; name one with --data=")
    return [folder for folder in found if folder]


def config_of(run: Path | None) -> dict:
    """The config in run.json; {} without a run."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["config"] if run else {}


if __name__ == "__main__":
    settings.run(main, COMMAND)
