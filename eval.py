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

from plainllama import settings
from plainllama.command import parse_arguments, run_command
from plainllama.files import run_of, steps_of
from plainllama.settings import UserError


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
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import json
from functools import partial
from pathlib import Path

from plainllama import parallel
from plainllama.evaluation.likelihood import TextRows, by_position, evaluate
from plainllama.parallel import World
from plainllama.tokens import shards
from plainllama.tokens.rows import Rows
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import byte_info
from plainllama.weights import checkpoint
from plainllama.weights.huggingface import load_model, read_config


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
    from plainllama.evaluation import tasks

    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    folders = world.decide(lambda: walk(flags.all) if flags.all else [
        checkpoint.find_checkpoint(flags.ckpt)])
    run, tokenizer = run_of(folders[0]), Tokenizer.load(folders[0])
    block_size = read_config(folders[0]).block_size
    if flags.context > block_size:
        raise UserError(f"--context={flags.context} is more than the {block_size} tokens of the "
                        "model's context")
    length = flags.context or block_size
    # every input is looked at before anything slow begins; rank 0 downloads, then the others read
    rows = (TextRows(flags.text, tokenizer, length) if flags.text
            else validation(flags, folders[0], run, length, say))
    jobs, missing = {}, []  # type: ignore[var-annotated]

    def look() -> list[str]:
        nonlocal jobs, missing
        jobs, missing = tasks.find_tasks(flags, first=True)
        return list(jobs)

    names = world.decide(look)
    if names and world.rank > 0:
        found = tasks.find_tasks(flags, first=False)[0]
        jobs = {name: found[name] for name in names}
    for line in missing:
        say(line)
    if flags.baselines and (flags.data or length < block_size or not (run and rows) or flags.text):
        raise UserError("--baselines counts in the rows that a run has seen: name a run whose data "
                        "set is here, without --data, --context and --text")
    unfit: dict = {}
    if flags.contamination:
        from plainllama.evaluation import counting

        unfit = counting.contamination({name: job.questions() for name, job in jobs.items()},
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
    from plainllama.evaluation import tasks
    from plainllama.results import record, score_table, write_samples

    model = load_model(folder, world.device, parallel.pick_dtype(
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
        bos_id = tokenizer.bos_id if config_of(run).get("doc_mask") else None
        found = evaluate(model, rows, byte_info(folder), tokens, micro_batch, world, bos_id)
        shown = {name: found[name] for name in ("val_loss", "val_bpb", "ppl")}
        kept = {**shown, "val_tokens": found["tokens"], "val_bytes": found["bytes"]}
        windows = f" in windows of {length}" * (length < block_size)
        say(score_table(f"{flags.text or 'validation'}{windows}, {found['tokens']:,} tokens, "
                  f"{found['bytes']:,} bytes", shown))
        if flags.by_position:
            kept["by_position"] = by_position(model, rows, tokens, micro_batch, world, bos_id)
            say(score_table(f"loss by position{windows}, nats per token", kept["by_position"]))
        result |= ({"texts": {flags.text + windows: kept}} if flags.text else
                   kept if length == block_size else {"contexts": {str(length): kept}})
        if flags.baselines and run and world.rank == 0:
            from plainllama.evaluation import counting

            result["baselines"] = counting.compare(rows, state["rows"], found, config_of(run), say)
    result["tasks"] = {}
    record(keep, result, world)
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
            metrics |= {"begin": tokenizer.bos_token} | unfit.get(name, {})
            say(score_table(f"{task}, {metrics['n']} prompts", metrics))
        result["tasks"] |= scores
        record(keep, result, world)  # after each task: what is finished is kept
        if flags.log_samples and world.rank == 0:
            for task, samples in scorer.samples.items():
                write_samples(keep, result.get("step"), task, samples)
    if flags.json:
        say(json.dumps(result))
    return failed


def walk(run: str) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = steps_of(Path(run))[::-1]
    if not found:
        raise UserError(f"--all={run} is not a run with checkpoints; name one, such as out/NAME")
    return found


def complete(run: Path, folder: Path, rows: bool, flags: Flags, jobs: dict) -> bool:
    """Whether RUN/eval has what is asked for of a checkpoint."""
    from plainllama.results import read_scores

    old = read_scores(run, int(folder.name.removeprefix("step_")))
    where = old.get("contexts", {}).get(str(flags.context), {}) if flags.context else old
    if flags.text:
        windows = f" in windows of {flags.context}" * bool(flags.context)
        where = old.get("texts", {}).get(flags.text + windows, {})
    wanted = ["val_loss"] * rows + ["by_position"] * flags.by_position
    return (all(name in where for name in wanted) and (not flags.baselines or "baselines" in old)
            and all(task in old.get("tasks", {}) for job in jobs.values() for task in job.names))


def from_samples(flags: Flags) -> int:
    """tinyMMLU's scores from the answers that another program has kept."""
    from plainllama.evaluation import irt
    from plainllama.results import score_table

    right, told = irt.read_samples(flags.irt)
    known = irt.load(flags.irt_file)
    if known[0] and len(right) != len(known[0].anchors):
        raise UserError(f"{flags.irt} holds {len(right)} answers, tinyMMLU has "
                        f"{len(known[0].anchors)} questions; run it without --limit")
    metrics = {"acc": float(right.mean()), "chance": 1 / 4, "n": len(right), **told}
    metrics |= irt.scores(right, known)
    print(score_table(f"{flags.irt}, {len(right)} prompts", metrics))
    if flags.json:
        print(json.dumps(metrics))
    return 0


# ---- bits per byte


def validation(flags: Flags, folder: Path, run: Path | None, block_size: int,
               say) -> Rows | None:
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
    rows = Rows(shards.open_split(data, "val"), block_size, seed=0)
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
    run_command(main, COMMAND)
