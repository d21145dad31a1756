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

from plainllama.command import parse_arguments, run_command
from plainllama.files import read_json, run_of, steps_of
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """Options of eval.py."""

    ckpt: str = key("out", "a checkpoint, a run (its newest step) or a folder of runs")
    all: str = key("", "a run: score its checkpoints, the oldest first")
    tasks: str = key("tinyMMLU", "names, with commas between them (empty: none)")
    shots: str = key("", "a .jsonl file of worked examples for local questions")
    answers: str = key("auto", "what is scored of local choices", ("auto", "letters", "full"))
    limit: int = key(0, "only the first N questions of each task (0: all)", low=0)
    include_path: str = key("", "a folder with .yaml files of lm-eval tasks")
    irt_file: str = key("", "tinyMMLU's parameters: a copy of tinyBenchmarks.pkl")
    irt: str = key("", "a samples_tinyMMLU_*.jsonl to take the answers from")
    log_samples: bool = key(False, "keep questions and answers beside the scores")
    contamination: bool = key(False, "look for the questions in the training data")
    text: str = key("", "a text (.txt, .jsonl, ...) for bits per byte, and no data set")
    data: str = key("", "data set for bits per byte (default: the run's)")
    eval_tokens: int = key(0, "validation tokens (0: as in the run)", low=0)
    batch_tokens: int = key(0, "tokens per forward pass (0: by the device)", low=0)
    by_position: bool = key(False, "also the loss by position in the context")
    context: int = key(0, "tokens per validation window (0: the model's context)", low=0)
    baselines: bool = key(False, "also score a unigram and a 5-gram model")
    device: str = key("auto", "where to score", ("auto", "cpu", "cuda", "mps"))
    dtype: str = key("auto", "precision of the matmuls", ("auto", "fp32", "bf16"))
    json: bool = key(False, "the result as JSON in the last line")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import json
from contextlib import closing
from functools import partial
from pathlib import Path

from model import LLaMA
from plainllama import parallel
from plainllama.evaluation import counting, irt, likelihood, tasks
from plainllama.results import read_scores, record, score_table, write_samples
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import byte_info
from plainllama.weights import checkpoint, huggingface


def main(command) -> int:
    """Score, the ranks of torchrun together; the exit code."""
    flags = command.flags
    if command.files:
        raise UserError(f"unexpected argument {command.files[0]}; name the model with --ckpt=")
    if flags.irt:
        metrics = irt.score_samples(flags.irt, flags.irt_file)
        print(score_table(f"{flags.irt}, {metrics['n']} prompts", metrics))
        if flags.json:
            print(json.dumps(metrics))
        return 0
    with closing(parallel.start(flags.device, "auto")) as world:
        failed = Evaluation(flags, world).score_all()
    return 2 if failed and "tasks" in command.overrides else 0


def checkpoints(flags: Flags) -> list[Path]:
    """Find the checkpoint, or with --all those of a run, the oldest first."""
    folders = steps_of(Path(flags.all)) if flags.all else [checkpoint.find_checkpoint(flags.ckpt)]
    if folders:
        return folders[::-1]
    raise UserError(f"--all={flags.all} is not a run with checkpoints; name one, such as out/NAME")


class Evaluation:
    """What is asked of every checkpoint, and how it is scored. The methods are collective."""

    # ---- what is asked

    def __init__(self, flags: Flags, world: parallel.World):
        """Look at every input before anything slow begins; UserError for what does not fit."""
        self.flags, self.world = flags, world
        self.say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
        self.batch_tokens = flags.batch_tokens or (32768 if world.device.type == "cuda" else 4096)
        self.folders = world.decide(lambda: checkpoints(flags))
        self.run, self.tokenizer = run_of(self.folders[0]), Tokenizer.load(self.folders[0])
        self.config = read_json(self.run / "run.json")["config"] if self.run else {}
        whole = huggingface.read_config(self.folders[0]).block_size
        length = flags.context or whole
        if length > whole:
            raise UserError(f"--context={length} is more than the {whole} tokens of the model")
        self.shorter = f" in windows of {length}" if length < whole else ""
        self.windows = self.open_windows(length)
        self.tasks, self.unavailable = tasks.find_tasks(flags, world)
        for reason in self.unavailable:
            self.say(reason)
        of_run = self.run and self.windows and not (flags.data or flags.text or self.shorter)
        if flags.baselines and not of_run:
            raise UserError("--baselines counts in the rows of a run whose data set is here; name "
                            "one, without --data, --context and --text")
        self.contaminated = counting.contamination(
            self.tasks, self.training_data(), self.tokenizer, world) if flags.contamination else {}
        special = [f"--{name}" for name in ("data", "limit", "eval_tokens", "dtype")
                   if getattr(flags, name) != getattr(Flags, name)]
        if self.run and special:
            self.say(f"not recorded in {self.run}/eval, because of {' '.join(special)}")
        # RUN/eval holds what all runs can be compared by; rank 0 writes it
        self.keep = None if special or world.rank > 0 else self.run

    def open_windows(self, block_size: int) -> likelihood.Windows | None:
        """Open the text, or the validation split; None, which is said, if no data set was named and
        the run's is not here."""
        if self.flags.text:
            return likelihood.TextRows(self.flags.text, self.tokenizer, block_size)
        name = self.flags.data or self.config.get("dataset", "")
        data = self.data_folder(name)
        if data is None and self.flags.data:
            raise UserError(f"no data set {name}; name a folder that prepare.py wrote")
        if data is None:
            lacking = f"no data set data/{name}" if name else "the model has no run"
            self.say(f"no bits per byte: {lacking}; name a data set with --data=FOLDER")
            return None
        rows = likelihood.validation_rows(data, self.folders[0], block_size)
        known = checkpoint.read_state(self.folders[0]).get("data_hash") if self.run else None
        if not self.flags.data and known != (data / "manifest.sha256").read_text().strip():
            self.say(f"note: {data} is not as it was when this run was trained on it")
        return rows

    def training_data(self) -> list[Path]:
        """Find the data sets that the run learns from, or the one that --data names."""
        names = list(self.config.get("mixture") or [self.config.get("dataset", "")])
        names = [self.flags.data] if self.flags.data else names
        folders = [folder for folder in map(self.data_folder, names) if folder]
        if len(folders) == len(names):
            return folders
        raise UserError("--contamination looks through the training data, and data set "
                        f"{' '.join(names) or 'of this model'} is not here; name one with --data=")

    def data_folder(self, name: str) -> Path | None:
        """Find a data set here or beside the run, None if it is nowhere; --data may be a path."""
        beside = [self.run.parent.parent / "data" / name] if self.run else []
        named = [Path(name)] if self.flags.data else []
        places = [*named, Path("data") / name, *beside]
        return next((place for place in places if name and place.is_dir()), None)

    # ---- checkpoints

    def score_all(self) -> int:
        """Score every checkpoint; how many tasks could not be scored."""
        wanted = (folder for folder in self.folders
                  if not self.flags.all or self.world.decide(partial(self.wants, folder)))
        return len(self.unavailable) + sum(map(self.score, wanted))

    def wants(self, folder: Path) -> bool:
        """Whether a checkpoint of --all is to be scored, which is said."""
        if self.keep and self.complete(read_scores(self.keep, int(folder.name[5:]))):
            why_not = " has these scores"
        else:
            problem = checkpoint.damage(folder, training=False)
            why_not = f" is damaged ({problem}): left out" if problem else ""
        self.say(f"checkpoint {folder}{why_not}")
        return not why_not

    def complete(self, kept: dict) -> bool:
        """Whether what RUN/eval holds of a checkpoint is all that is asked for."""
        of_windows = self.of_windows(kept)
        names = {name for task in self.tasks.values() for name in task.names}
        return (("val_loss" in of_windows or not self.windows)
                and ("by_position" in of_windows or not self.flags.by_position)
                and ("baselines" in kept or not self.flags.baselines)
                and names <= set(kept.get("tasks", ())))

    def of_windows(self, result: dict) -> dict:
        """Find the scores of the windows in a result: at its top, or in a section of it."""
        if self.flags.text:
            return result.setdefault("texts", {}).setdefault(self.flags.text + self.shorter, {})
        if self.shorter:
            return result.setdefault("contexts", {}).setdefault(str(self.flags.context), {})
        return result

    def score(self, folder: Path) -> int:
        """Score one checkpoint: its windows, then every task; each score is recorded as soon as it
        is there. How many tasks could not be scored."""
        device = self.world.device
        dtype = parallel.pick_dtype(self.flags.dtype, device)
        model = huggingface.load_model(folder, device, dtype)
        state = checkpoint.read_state(folder) if self.run else {}
        result: dict = {}
        if state:  # tokens: targets trained on, as in metrics.jsonl
            seen = state["rows"] * model.config.block_size
            result = {"step": state["step"], "tokens": state.get("tokens", seen)}
        if self.windows:
            scores = self.score_windows(model, self.windows)
            self.of_windows(result).update(scores)
            if self.flags.baselines and self.world.rank == 0:
                result["baselines"] = counting.compare(
                    self.windows, state["rows"], scores, self.config, self.say)  # type: ignore
        result["tasks"] = {}
        record(self.keep, result)
        failed = [name for name in self.tasks if not self.score_task(name, model, result)]
        if self.flags.json:
            self.say(json.dumps(result))
        return len(failed)

    def score_windows(self, model: LLaMA, windows: likelihood.Windows) -> dict:
        """Score the validation split or a text, and say so: {val_loss, val_bpb, ppl, val_tokens,
        val_bytes, by_position}."""
        flags = self.flags
        tokens = flags.eval_tokens or self.config.get("eval_tokens") or 1 << 20
        if flags.text and not flags.eval_tokens:
            tokens = windows.windows * windows.block_size
        bos_id = self.tokenizer.bos_id if self.config.get("doc_mask") else None
        how = tokens, max(1, self.batch_tokens // windows.block_size), self.world, bos_id
        found = likelihood.evaluate(model, windows, byte_info(self.folders[0]), *how)
        scores = {name: found[name] for name in ("val_loss", "val_bpb", "ppl")}
        title = f"{flags.text or 'validation'}{self.shorter}, {found['tokens']:,} tokens"
        self.say(score_table(f"{title}, {found['bytes']:,} bytes", scores))
        scores |= {"val_tokens": found["tokens"], "val_bytes": found["bytes"]}
        if flags.by_position:
            losses = scores["by_position"] = likelihood.by_position(model, windows, *how)
            self.say(score_table(f"loss by position{self.shorter}, nats per token", losses))
        return scores

    def score_task(self, name: str, model: LLaMA, result: dict) -> bool:
        """Score a task, say so, add the metrics to `result`, and record it; whether it could be."""
        scorer = tasks.Scorer(model, self.tokenizer, self.batch_tokens, self.world)
        try:
            scores = self.tasks[name].score(scorer)
        except UserError as error:  # the same on every rank
            self.say(f"no {name}: {error}")
            return False
        for member, metrics in scores.items():
            metrics |= {"begin": self.tokenizer.bos_token} | self.contaminated.get(name, {})
            self.say(score_table(f"{member}, {metrics['n']} prompts", metrics))
        result["tasks"] |= scores
        record(self.keep, result)  # after each task: what is finished is kept
        if self.flags.log_samples and self.world.rank == 0:
            for member, samples in scorer.samples.items():
                write_samples(self.keep, result.get("step"), member, samples)
        return True


if __name__ == "__main__":
    run_command(main, COMMAND)
