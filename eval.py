"""Score a checkpoint: python eval.py [X | --ckpt X] [--tasks a,b] [--by_position] [--json]

Bits per byte and perplexity of the validation split (or, with --text=FILE, of any text), of a set
of pairs how often the chosen answer is preferred, then tasks: tinyMMLU (the default, with its IRT
estimates), passkey (a digit told far above: is it found again?), any task that lm-eval knows by
name, local:FILE.jsonl or dialogs:FILE.jsonl. The scores also go to RUN/eval/step_N.json. Exit
codes: 0 done; 2 the input, or a named task that could not be scored.

A local file (also packed: .xz, .gz) holds rows of one kind:
  question, choices, answer   answer: a letter, an index from 0, or the choice itself. Letters are
                              scored if rows name a subject (the prompt is MMLU's), else whole
                              answers; a blank _ is filled in. --answers=letters or full decides
  context, choices, answer    the same without any words added
  context, continuation       is the continuation what the model says first?
Of a file of dialogs (rows with `messages`, or dialogs:embedded, those that embedded:chat holds out)
each answer is generated behind the true talk before it, and compared with the one that is there:
acc is the share of dialogs in which all are right, answers of right answers, calls of right ones
among those that call functions, ended of those that end by themselves.
--shots=FILE puts five rows of that file in front, solved, of the same subject where rows have one.

--generate=FILE (.jsonl, .json, .parquet, also packed) generates an answer to each row, greedily,
and compares it with the row's references. A row has `prompt`, or `messages` (also with `tools`),
and `reference`: a text, a message (also with tool_calls) or a list of these; without it, the last
of its messages. --metrics are bleu, chrf (sacrebleu, 0 to 100), rouge (rouge-score, 0 to 1), exact
and calls (shares of rows), of themselves those that the rows are fit for; and bleu_tf, BLEU of the
tokens that are likeliest behind the true reference. Answers are kept: after a kill, or with other
metrics, they are not generated again.

--probe fits gradient boosting to --embeddings (lists `embedding`, as sample.py --embed writes them,
columns emb_0001, ..., or any columns of numbers, of a .csv or .parquet; of several with commas
between, joined by --id) in five stratified folds of each of --seeds, and scores how it tells the
values of --label: AUROC of two classes, accuracy of more, on the rest of each fold and on
--test_ids, as a mean ± the 95 % interval of Student's t. Beside it: chance, shuffled labels, and
--against. With --ckpt the scores go to its run.

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

from plainllama.cluster import HERE
from plainllama.command import parse_arguments, run_command
from plainllama.files import read_json, run_of, step_of, steps_of
from plainllama.settings import Settings, UserError, key


@dataclass
class Flags:
    """Options of eval.py."""

    ckpt: str = key("out", "a checkpoint, a run (its newest step) or a folder of runs; or several "
                    "with commas between")
    base: str = key("", "the folder of an adapter's base, where that has moved")
    all: str = key("", "a run: score its checkpoints, the oldest first")
    tasks: str = key("tinyMMLU", "names, with commas between them (empty: none)")
    shots: str = key("", "a .jsonl file of worked examples for local questions")
    answers: str = key("auto", "what is scored of local choices", ("auto", "letters", "full"))
    limit: int = key(0, "only the first N questions of each task (0: all)", low=0)
    include_path: str = key("", "a folder with .yaml files of lm-eval tasks")
    irt_file: str = key("", "tinyMMLU's parameters: a copy of tinyBenchmarks.pkl")
    irt: str = key("", "a samples_tinyMMLU_*.jsonl to take the answers from")
    generate: str = key("", "a file of prompts and references: generate answers and score them")
    metrics: str = key("", "of --generate: names with commas between (empty: by the rows)")
    fields: object = key(None, "what its rows call ours: {'prompt': 'en', 'reference': 'de'}")
    chat: str = key("auto", "ask prompts as questions of a dialog (auto: a model that knows them)",
                    ("auto", "true", "false"))
    max_new_tokens: int = key(256, "tokens per answer, fewer where the context ends", low=1)
    stop: str = key("", "end an answer where this text comes, as for sample.py")
    temperature: float = key(0.0, "draw answers; 0: always the likeliest token", low=0)
    top_p: float = key(1.0, "draw from the likeliest tokens of this joint probability", (), 0, 1)
    seed: int = key(1337, "seeds the draws", low=0)
    ray: str = key("", "of --generate: the address of a Ray cluster whose nodes answer", bare=HERE)
    bleu_tokenizer: str = key("auto", "sacrebleu's (auto: by the script of the references)",
                              ("auto", "13a", "intl", "zh", "char"))
    probe: bool = key(False, "what do vectors know of a label? without a model")
    embeddings: str = key("", "of --probe: a file of vectors; or several, joined, with commas")
    labels: str = key("", "the file of its labels")
    id: str = key("id", "the column of ids in its files")
    label: str = key("label", "the column of the label")
    against: str = key("", "files of other vectors, each probed alone in the same folds")
    test_ids: str = key("", "a file of ids that are only tested on")
    seeds: str = key("42", "of the folds, with commas between")
    out: str = key("", "a .json file to write, also without a run")
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
    COMMAND = parse_arguments(__doc__, Flags, takes="model")

import json
import os
from contextlib import closing
from functools import partial
from pathlib import Path

from model import LLaMA
from plainllama import parallel, results
from plainllama.evaluation import counting, generated, irt, likelihood, probe, tasks
from plainllama.evaluation.validation import score_pairs
from plainllama.results import score_table
from plainllama.tokens.rows import FitRows, hash_of_data
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import byte_info, sha256_of
from plainllama.weights import checkpoint, peft

BITS = "bits per byte"


def main(command) -> int:
    """Score, the ranks of torchrun together; the exit code."""
    flags, given = command.flags, command.overrides
    if flags.all and "ckpt" in given:
        raise UserError("--all and --ckpt both name what is scored; leave one out")
    if flags.probe or given.keys() & set(probe.OPTIONS):
        return probe.run(flags, given)
    if flags.irt:
        if idle := sorted(given.keys() - {"irt", "irt_file", "json"}):
            raise UserError(f"--irt scores a file without a model; leave out --{idle[0]}")
        return irt.score_samples(flags.irt, flags.irt_file, flags.json)
    with closing(parallel.start(flags.device, "auto")) as world:
        one = os.path.exists(flags.ckpt) or "," not in flags.ckpt
        paths = [flags.ckpt] if one else [*map(str.strip, flags.ckpt.split(","))]
        kept: dict | None = {} if flags.all or len(paths) > 1 else None
        evaluation = partial(Evaluation, flags, given, world, kept)
        if not flags.all:
            found = [world.decide(partial(checkpoint.find_checkpoint, path)) for path in paths]
            return max(checkpoint.with_checkpoint(
                path, world, lambda folder: evaluation(folder).score([folder]), folder)
                for path, folder in zip(paths, found, strict=True))
        folders = steps_of(Path(flags.all))[::-1]
        whole = world.decide(lambda: next(
            (folder for folder in folders if not checkpoint.damage(folder, training=False)), None))
        if not whole:
            raise UserError(f"--all={flags.all} is not a run with checkpoints that are whole")
        return evaluation(whole).score(folders)


class Evaluation:
    """What is asked of every checkpoint, and how it is scored. The methods are collective."""

    # ---- what is asked

    def __init__(self, flags: Flags, given: dict, world: parallel.World, kept: dict | None,
                 first: Path):
        """Look at every input before anything slow begins; UserError for what does not fit.
        `given`: the flags that were said; `kept`: the base that several adapters share, None for a
        single model; `first`: a checkpoint, of whose run the others are."""
        self.kept = kept
        self.first, self.flags, self.given, self.world = first, flags, given, world
        self.say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
        if kept is not None and not flags.all:
            self.say(f"\nscores of {first}")
        self.batch_tokens = flags.batch_tokens or (32768 if world.device.type == "cuda" else 4096)
        self.dtype = parallel.pick_dtype(flags.dtype, world.device)
        self.home = peft.tokenizer_folder(first, flags.base)
        self.run, self.tokenizer = run_of(first), Tokenizer.load(self.home)
        self.config = Settings(dataset="")
        if self.run:
            config = read_json(self.run / "run.json").get("config")
            if not isinstance(config, dict):
                raise UserError(f"{self.run}/run.json is damaged: it holds no config")
            vars(self.config).update(config)
        special = [f"--{name}" for name in ("data", "limit", "eval_tokens", "dtype")
                   if getattr(flags, name) != getattr(Flags, name)]
        if self.run and special:
            self.say(f"not recorded in {self.run}/eval, because of {' '.join(special)}")
        # RUN/eval holds what all runs can be compared by; rank 0 writes it
        self.keep = None if special or world.rank > 0 else self.run
        whole = peft.whole_config(first, flags.base).block_size
        self.open_windows(whole)
        names, lacking = tasks.default_names(flags, given)
        if lacking:
            self.say(lacking)
        asked = list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))
        self.name_idle(asked)
        self.tasks, self.unavailable = tasks.find_tasks(asked, flags, world)
        if flags.generate:
            self.tasks |= generated.make_task(flags, self.tokenizer, whole, self.dtype, world)
        for reason in self.unavailable:
            self.say(reason)
        self.look_through_training_data()
        if self.keep:
            (self.keep / "eval").mkdir(exist_ok=True)  # OSError before anything is scored

    def open_windows(self, whole: int) -> None:
        """Open the text, or the validation split; neither, which is said, if no data set was named
        and the run's is not here. `whole`: tokens of the model's context."""
        flags, config = self.flags, self.config
        name, length = flags.data or config.dataset, flags.context or whole
        if length > whole:
            raise UserError(f"--context={length} is more than the {whole} tokens of the model")
        self.shorter = f" in windows of {length}" if length < whole else ""
        self.section = ("contexts", str(length)) if self.shorter else ()  # of the result
        self.tokens = flags.eval_tokens or config.eval_tokens
        self.windows: likelihood.Windows | None = None
        self.windows_made_of: dict = {"dtype": str(self.dtype)} | {
            name: True for name in ("by_position", "baselines") if getattr(flags, name)}
        data = self.data_folder(name)
        if flags.text:
            text = likelihood.TextRows(flags.text, self.tokenizer, length, flags.eval_tokens)
            self.tokens = flags.eval_tokens or text.windows * length
            self.windows, self.section = text, ("texts", flags.text + self.shorter)
            self.measured_on = f"the text {flags.text}"
            self.windows_made_of |= {"text": text.hash}
        elif data:
            self.windows = likelihood.validation_rows(data, self.home, length)
            self.measured_on = f"validation split of {data}"
            digest = (data / "manifest.sha256").read_text().strip()
            self.windows_made_of |= {"data": digest, "tokens": self.tokens}
            if self.of_pairs() and self.run:
                note = read_json(self.run / "reference/made_of.json", tolerant=True)
                self.windows_made_of["reference"] = note.get("files", {}).get("val.npy", {})
            if self.run and not flags.data:
                self.compare_data(data)
        elif flags.data:
            raise UserError(f"no data set {name}; name a folder that prepare.py wrote")
        else:
            lacking = f"no data set data/{name}" if name else "the model has no run"
            self.say(f"no bits per byte: {lacking}; name a data set with --data=FOLDER")
        of_run = self.run and data and not (flags.data or flags.text or self.shorter)
        whole = config.packing in ("auto", "concat") and not config.mixture
        if flags.baselines and not (of_run and whole):
            raise UserError("--baselines counts in the rows of a run of one data set that is here, "
                            "with packing=concat; name one, without --data, --context and --text")

    def of_pairs(self) -> bool:
        """Whether the windows hold pairs of answers."""
        return isinstance(self.windows, FitRows) and self.windows.split.together == 2

    def compare_data(self, data: Path) -> None:
        """Say so if the run's data sets are not what it was trained on."""
        others = [data.parent / name for name in self.config.mixture or ()]  # type: ignore
        lacking = [folder.name for folder in others if not (folder / "manifest.sha256").is_file()]
        known = checkpoint.read_state(self.first).get("data_hash")
        if lacking:
            self.say(f"note: of the mixture {', '.join(lacking)} is not here to be compared")
        elif known != hash_of_data(data, self.config):
            self.say(f"note: {' or '.join(map(str, [data, *others]))} is not as it was in training")

    def name_idle(self, asked: list[str]) -> None:
        """Say which flags have no effect beside the others; `asked`: names of tasks."""
        local = [name for name in asked if name.startswith("local:")]
        generate = self.flags.generate
        useful = {("shots", "answers"): local,
                  (*generated.DECIDES, "metrics", "bleu_tokenizer", "ray"): generate,
                  ("limit", "log_samples", "contamination"): asked or generate,
                  ("include_path",): set(asked) - {*local, "passkey"},
                  ("context", "eval_tokens"): self.windows,
                  ("by_position",): self.windows and not self.of_pairs()}
        for name in [name for names, use in useful.items() if not use for name in names]:
            if name in self.given:
                self.say(f"note: --{name} has no effect here")

    def look_through_training_data(self) -> None:
        """Find which questions it holds, if that is asked, and say how much of the windows: where
        it is much, bits per byte measure memory."""
        names = list(self.config.mixture or [self.config.dataset])  # type: ignore
        names = [self.flags.data] if self.flags.data else names
        folders = [folder for folder in map(self.data_folder, names)
                   if folder and (folder / "manifest.json").is_file()
                   and sha256_of(folder) == sha256_of(self.home)]
        here = len(folders) == len(names)
        if self.flags.contamination and not here:
            raise UserError(f"--contamination: data set {' '.join(names) or 'of this model'} is"
                            " not here, or of another tokenizer; name one with --data=")
        asked = self.tasks if self.flags.contamination else None
        self.contaminated, self.repeated = counting.look_through(
            asked, self.windows if here else None, self.tokens, folders, self.tokenizer,
            self.world, self.say)

    def data_folder(self, name: str) -> Path | None:
        """Find a data set here or beside the run, None if it is nowhere; --data may be a path."""
        beside = [self.run.parent.parent / "data" / name] if self.run else []
        named = [Path(name)] if self.flags.data else []
        places = [*named, Path("data") / name, *beside]
        return next((place for place in places if name and place.is_dir()), None)

    # ---- checkpoints

    def score(self, folders: list[Path]) -> int:
        """Score the checkpoints, of those of --all the ones that need it; the exit code."""
        good = not (self.unavailable and "tasks" in self.given)
        for folder in folders:
            if not self.flags.all or self.world.decide(partial(self.wants, folder)):
                good = self.score_checkpoint(folder) and good
        return 0 if good else 2

    def wants(self, folder: Path) -> bool:
        """Whether a checkpoint of --all is to be scored, which is said."""
        why_not = ""
        if self.keep and self.complete(results.read_scores(self.keep, step_of(folder))):
            why_not = " has these scores"
        elif problem := checkpoint.damage(folder, training=False):
            why_not = f" is damaged ({problem}): left out"
        self.say(f"checkpoint {folder}{why_not}")
        return not why_not

    def complete(self, kept: dict) -> bool:
        """Whether RUN/eval holds all that is asked for, made of what it would be made of now."""
        wanted = [(self.section, self.windows_made_of)] if self.windows else []
        wanted += [(("tasks", member), self.task_made_of(name))
                   for name, task in self.tasks.items() for member in task.names]
        return all(inputs.items() <= results.section(kept, place).get("made_of", {}).items()
                   for place, inputs in wanted)

    def task_made_of(self, name: str) -> dict:
        """Say what a task's scores are made of, beside the weights."""
        samples = {"log_samples": True} if self.flags.log_samples else {}
        return ({"dtype": str(self.dtype)} | self.tasks[name].made_of | samples
                | self.contaminated.get(name, {}))

    def score_checkpoint(self, folder: Path) -> bool:
        """Score one checkpoint: its windows, then every task; each score is recorded as soon as it
        is there. Whether all could be scored that was named."""
        model = peft.load_model(folder, self.world.device, self.dtype, self.flags.base,
                                kept=self.kept)
        state = checkpoint.read_state(folder) if self.run else {}
        result: dict = {"tasks": {}}
        if state:  # tokens: targets trained on, as in metrics.jsonl
            seen = state["rows"] * model.config.block_size
            result |= {"step": state["step"], "tokens": state.get("tokens", seen),
                       "weights": results.weights_hash(folder)}
        parts: dict = {name: partial(self.score_task, name, folder) for name in self.tasks}
        if self.windows:
            parts = {BITS: partial(self.score_windows, self.windows, state)} | parts
        failed = []
        for name, score in parts.items():
            try:
                score(model, result)
            except UserError as error:  # the same on every rank
                self.say(f"no {name}: {error}")
                failed.append(name)
            results.record(self.keep, result)  # after each: what is finished is kept
        if self.flags.json:
            self.say(json.dumps(result))
        named = {"tasks", "generate"} & self.given.keys()
        return not failed or not (named or BITS in failed)

    def score_windows(self, windows: likelihood.Windows, state: dict, model: LLaMA,
                      result: dict) -> None:
        """Score the validation split or a text, say so, and add to `result` {val_loss, val_bpb,
        ppl, val_tokens, val_bytes, by_position, baselines, made_of}."""
        rows = likelihood.rows_of_a_pass(windows, self.tokens, self.batch_tokens)
        packed = self.config.doc_mask or isinstance(windows, FitRows)
        bos_id = self.tokenizer.bos_id if packed else None
        how = self.tokens, rows, self.world, bos_id
        if self.of_pairs():
            pairs = score_pairs(model, windows, *how, self.config, self.run)  # type: ignore
            self.say(score_table(f"validation, {pairs['n']} pairs (rewards: against step 0; logps: "
                                 "by likelihood; shorter: if the shorter one is taken)", pairs))
            results.section(result, self.section).update(
                pairs | self.repeated | {"made_of": self.windows_made_of})
            return
        scores = likelihood.measured(model, windows, byte_info(self.home), *how)
        self.say(likelihood.told(scores, self.measured_on + self.shorter, bool(self.flags.text)))
        scores |= {**self.repeated, "made_of": self.windows_made_of}
        if self.flags.by_position:
            losses = scores["by_position"] = likelihood.by_position(model, windows, *how)
            self.say(score_table(f"loss by position{self.shorter}, nats per token", losses))
        if self.flags.baselines and self.world.rank == 0:
            scores["baselines"] = counting.compare(
                windows, state["rows"], scores, self.config, self.say)  # type: ignore
        results.section(result, self.section).update(scores)

    def score_task(self, name: str, folder: Path, model: LLaMA, result: dict) -> None:
        """Score a task, say so, and add the metrics to `result`."""
        scorer = tasks.Scorer(model, self.tokenizer, self.batch_tokens, self.world, folder)
        for member, metrics in self.tasks[name].score(scorer).items():
            metrics |= {"begin": self.tokenizer.bos_token, "made_of": self.task_made_of(name),
                        **self.contaminated.get(name, {})}
            self.say(score_table(f"{member}, {metrics['n']} prompts", metrics))
            result["tasks"][member] = metrics
        if self.flags.log_samples and self.world.rank == 0:
            for member, samples in scorer.samples.items():
                results.write_samples(self.keep, result.get("step"), member, samples)


if __name__ == "__main__":
    run_command(main, COMMAND)
