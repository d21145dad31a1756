"""Score a checkpoint: python eval.py [--ckpt X] [--tasks a,b] [--json]

Bits per byte and perplexity of the validation split, then tasks: tinyMMLU (the default), any task
that lm-eval knows by name, or local:FILE.jsonl. A local file holds rows of one kind: `question,
choices, answer` (answer an index or a letter, prompt as MMLU's, five worked examples of the same
`subject` in front with --shots=FILE.jsonl), or `context, continuation`. The scores also go to
RUN/eval/step_N.json. Exit codes: 0 done; 2 the input, or a named task whose data cannot be had.
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
    device: str = settings.key("auto", "where to score", ("auto", "cpu", "cuda", "mps"))
    dtype: str = settings.key("auto", "precision of the matmuls", ("auto", "fp32", "bf16"))
    json: bool = settings.key(False, "the result as JSON in the last line")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = settings.command(__doc__, Flags, takes="files")

import difflib
import json
import math
import os
import urllib.request
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import checkpoint
import parallel
import shards
from model import IGNORE, LLaMA
from parallel import World
from tokenizer import ByteInfo, Tokenizer, byte_info, decoded_bytes

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOTS = 5  # worked examples before a question, as MMLU has them (https://arxiv.org/abs/2009.03300)
# The 100 questions of https://arxiv.org/abs/2402.14992. `input_formatted` is a whole prompt, five
# worked examples included. lm-eval's task of this name needs a package that is not on PyPI and
# shows an IRT estimate under the name acc_norm; this one gives the raw accuracy.
TINY_MMLU: dict = {
    "task": "tinyMMLU", "dataset_path": "tinyBenchmarks/tinyMMLU", "dataset_name": "all",
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{input_formatted}}",
    "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer", "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


class Unavailable(Exception):
    """A task whose library or data cannot be had here; the other scores still come."""


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
    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    folder = checkpoint.find(flags.ckpt, quiet=world.rank > 0)
    run, tokenizer = checkpoint.run_of(folder), Tokenizer.load(folder)
    block_size = checkpoint.model_config(folder).block_size
    # every input is looked at before anything slow begins; rank 0 downloads, then the others read
    rows = validation(flags, folder, run, block_size, say)
    jobs, missing = find_tasks(flags) if world.rank == 0 else ({}, [])
    if world.agree(bool(jobs)) and world.rank > 0:
        jobs, _ = find_tasks(flags)
    for line in missing:
        say(line)

    model = checkpoint.load_model(folder, world.device, pick_dtype(flags.dtype, world.device))
    batch_tokens = flags.batch_tokens or (32768 if world.device.type == "cuda" else 4096)
    result: dict = {}
    if run:  # tokens: targets trained on, as in metrics.jsonl
        state = checkpoint.read_state(folder)
        result = {"step": state["step"], "tokens": state["rows"] * block_size}
    if rows:
        tokens = flags.eval_tokens or config_of(run).get("eval_tokens") or 1 << 20
        micro_batch = max(1, batch_tokens // block_size)
        found = evaluate(model, rows, byte_info(folder), tokens, micro_batch, world)
        shown = {name: found[name] for name in ("val_loss", "val_bpb", "ppl")}
        result |= {**shown, "val_tokens": found["tokens"], "val_bytes": found["bytes"]}
        say(table(f"validation, {found['tokens']:,} tokens, {found['bytes']:,} bytes", shown))
    result["tasks"] = {}
    record(run, result, world)
    scorer = Scorer(model, tokenizer, batch_tokens, world)
    for job in jobs.values():
        scorer.truncated.clear()
        scores = job(scorer)
        result["tasks"] |= scores
        record(run, result, world)  # after each task: what is finished is kept
        for task, metrics in scores.items():
            say(table(f"{task}, {metrics['n']} prompts", metrics))
    if flags.json:
        say(json.dumps(result))
    return 2 if named and missing else 0


# ---- bits per byte

@torch.no_grad()
def evaluate(model: nn.Module, rows: shards.Rows, token_byte_info: ByteInfo, tokens: int,
             micro_batch: int, world: World) -> dict:
    """{val_loss, val_bpb, tokens, bytes, ppl} of the first `tokens` // T windows, in their order.

    val_loss is nats per target; val_bpb is nats / ln 2 / utf-8 bytes of the decoded targets, so
    boundary tokens count above the line only. Independent of micro_batch (rows per pass) and of the
    number of ranks: rank r takes every W-th window, and rows whose targets are ignored fill up the
    last passes, so that all passes have one shape and all ranks do as many. Calls only
    model(ids, targets), the summed loss. Collective.
    """
    count = max(1, min(tokens // rows.block_size, rows.windows))
    losses, n_bytes = [], 0
    for first in range(0, count, micro_batch * world.size):
        mine = range(first + world.rank, min(first + micro_batch * world.size, count), world.size)
        ids = np.zeros((micro_batch, rows.block_size + 1), np.int64)
        if mine:
            ids[:len(mine)] = rows.read_windows(mine)
            n_bytes += decoded_bytes(ids[:len(mine)], token_byte_info)
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        y[len(mine):] = IGNORE
        losses.append(model(x.to(world.device), y.to(world.device)))
    nll = torch.stack(losses).to("cpu", torch.float64).sum()  # read once: passes are not held up
    sums = world.sum(torch.stack([nll, torch.tensor(n_bytes, dtype=torch.float64)])).tolist()
    targets = count * rows.block_size
    loss = sums[0] / targets
    return {"val_loss": loss, "val_bpb": sums[0] / math.log(2) / max(sums[1], 1),
            "tokens": targets, "bytes": int(sums[1]), "ppl": math.exp(min(loss, 700))}


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


# ---- the model as a scorer of texts

class Scorer:
    """Log-likelihoods of continuations, computed as lm-eval's `hf` model does: context and
    continuation encoded together, begin token in front as in training, too long ones cut at the
    left, right padding, fp32 log-softmax. Ranks share the passes and all get all the results."""

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, batch_tokens: int, world: World):
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.batch_tokens = batch_tokens
        self.block_size = model.config.block_size
        self.begin = [tokenizer.bos] if tokenizer.bos is not None else []
        self.truncated: set = set()  # hashes of the contexts that were cut

    def encode(self, text: str) -> list[int]:
        """Ids of a text at the start of a document."""
        return self.begin + self.tokenizer.encode(text)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context ids, continuation ids), the harness's way: spaces at the end of the context
        belong to the continuation, and the border is where the context's own ids end."""
        bare = context.rstrip()
        if not bare:
            return self.begin, self.tokenizer.encode(context + continuation)
        before, whole = self.encode(bare), self.encode(context + continuation)
        return before, whole[len(before):]

    @torch.no_grad()
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation.

        Pairs that differ in their last token only share one row. Collective.
        """
        groups: dict[tuple, list[int]] = {}  # ids that the model reads -> pairs they serve
        for i, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise UserError("the tokenizer merges a continuation into its context, so nothing "
                                "is left to score; begin the continuation with a space")
            ids = (context + continuation)[-(self.block_size + 1):]
            groups.setdefault(tuple(ids[:-1]), []).append(i)
            if len(context) + len(continuation) > self.block_size + 1:
                self.truncated.add(hash(tuple(context)))
        batches, order = [], sorted(groups, key=len, reverse=True)
        while order:
            size = max(1, self.batch_tokens // len(order[0]))
            batches.append(order[:size])
            order = order[size:]
        results = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for batch in batches[self.world.rank::self.world.size]:
            batch_ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)  # 0 is never seen
            for row, read in zip(batch_ids, batch, strict=True):
                row[:len(read)] = torch.tensor(read)
            states = self.model.hidden(batch_ids.to(self.world.device))
            # the head is wanted at the last positions only: as many as the longest continuation has
            wanted = [min(max(len(pairs[i][1]) for i in groups[read]), len(read)) for read in batch]
            states = torch.cat([row[len(read) - n:len(read)] for row, read, n in
                                zip(states, batch, wanted, strict=True)])
            log_p = self.model.lm_head(states).float().log_softmax(-1)  # (scored positions, V)
            for read, scored in zip(batch, log_p.split(wanted), strict=True):
                for i in groups[read]:
                    target = torch.tensor(pairs[i][1][-len(read):], device=scored.device)
                    last = scored[-len(target):]
                    results[i, 0] = last.gather(1, target[:, None]).sum().item()
                    results[i, 1] = float((last.argmax(-1) == target).all())
        return [(value, greedy > 0) for value, greedy in self.world.sum(results).tolist()]


def harness(scorer: Scorer):
    """lm-eval's view of a Scorer, with which it runs any of its tasks. Every rank runs the whole
    harness and sees all the results in document order: its own way of sharing mixes the order."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Harness(TemplateLM):
        """The methods that lm-eval calls."""

        @property
        def eot_token_id(self) -> int:
            """What an empty context is replaced by: the begin token, as in training."""
            return scorer.begin[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            """Ids, with the begin token unless it is declined."""
            return (scorer.tokenizer.encode(string) if add_special_tokens is False
                    else scorer.encode(string))

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            return scorer.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts, in windows as the `hf` model cuts them."""
            texts = [[utils.make_disjoint_window(window) for window in
                      utils.get_rolling_token_windows(
                          token_list=scorer.encode(request.args[0]), context_len=1,
                          prefix_token=self.eot_token_id, max_seq_len=scorer.block_size)]
                     for request in requests]
            values = iter(scorer.score([window for windows in texts for window in windows]))
            return [sum(next(values)[0] for _ in windows) for windows in texts]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            """Greedy continuations; half of the context at least is left to the prompt."""
            import sample

            answers = []
            for text, options in (request.args for request in requests):
                ids, until = scorer.encode(text), options.get("until") or []
                until = [until] if isinstance(until, str) else list(until)
                room = min(options.get("max_gen_toks", 256), scorer.block_size // 2)
                if len(ids) + room > scorer.block_size:
                    scorer.truncated.add(hash(tuple(ids)))
                [(_, answer, _)] = sample.complete(
                    scorer.model, scorer.tokenizer, [ids[room - scorer.block_size:]], room,
                    sample.Flags(temperature=0.0), [0], until)
                answers.append(answer)
            return answers

    return Harness()


# ---- tasks

def find_tasks(flags: Flags) -> tuple[dict, list[str]]:
    """({name: function of a Scorer that gives {task: metrics}}, [what cannot be had here])."""
    jobs, missing = {}, []
    names = dict.fromkeys(name.strip() for name in flags.tasks.split(",") if name.strip())
    for name in names:
        try:
            if name.startswith("local:"):
                shots = read_local(flags.shots, None) if flags.shots else []
                items = read_local(name.removeprefix("local:"), shots)[:flags.limit or None]
                jobs[name] = partial(score_local, name, items)
            else:
                jobs[name] = partial(score_harness, name, load_task(name), flags.limit)
        except Unavailable as error:
            missing.append(f"no {name}: {error}; or score a file: --tasks=local:FILE.jsonl")
    return jobs, missing


class Item(NamedTuple):
    """What to continue, the possible continuations, the number of the right one."""

    context: str
    choices: list[str]
    right: int
    subject: str = ""


def read_local(file: str, shots: list[Item] | None) -> list[Item]:
    """The rows of a JSON-lines file; one that is wrong is named by its line."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}")
    items = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        if line.strip():
            try:
                items.append(local_item(json.loads(line), shots))
            except (ValueError, TypeError, AttributeError):
                raise UserError(f"{file}:{number}: not a JSON object") from None
            except UserError as error:
                raise UserError(f"{file}:{number}: {error}") from None
    if not items:
        raise UserError(f"{file} holds no rows")
    return items


def local_item(row: dict, shots: list[Item] | None) -> Item:
    """A row; a question as MMLU asks it, behind a line on its subject and examples of it (None:
    it is to be such an example itself)."""
    kind = ("context", "continuation") if "context" in row else ("question", "choices", "answer")
    for name in kind:
        if not isinstance(row.get(name), {"choices": list, "answer": str | int}.get(name, str)):
            raise UserError(f"field '{name}' is missing or of the wrong type; a row has question, "
                            "choices, answer or context, continuation")
    if "context" in row:
        context, continuation = row["context"], row["continuation"]
        glued = not context or context[-1].isspace() or continuation[:1].isspace()
        return Item(context, [continuation if glued else f" {continuation}"], 0)
    subject, choices, right = str(row.get("subject") or ""), row["choices"], row["answer"]
    letters = LETTERS[:len(choices)]
    if isinstance(right, str):
        right = LETTERS.find(right.strip().upper()) if len(right.strip()) == 1 else -1
    if not 0 <= right < len(letters):
        raise UserError(f"'answer' is {row['answer']!r}, not a letter or an index (from 0) of one "
                        f"of the {len(choices)} choices")
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False)]
    prompt = "\n".join([row["question"].strip(), *lines, "Answer:"])
    if shots or (subject and shots is not None):
        fitting = [shot for shot in shots if not subject or shot.subject in (subject, "")]
        if shots and not fitting:
            raise UserError(f"--shots has no example of the subject {subject}")
        about = f" about {subject.replace('_', ' ')}" if subject else ""
        worked = [f"{shot.context}{shot.choices[shot.right]}\n\n" for shot in fitting[:SHOTS]]
        prompt = "".join([f"The following are multiple choice questions (with answers){about}.",
                          "\n\n", *worked, prompt])
    return Item(prompt, [f" {letter}" for letter in letters], right, subject)


def score_local(name: str, items: list[Item], scorer: Scorer) -> dict:
    """{name: metrics}. Several continuations: acc is the share of rows whose right one is the most
    likely. One: acc is the share that greedy decoding gives; loglikelihood is nats per row."""
    pairs = [scorer.pair(item.context, choice) for item in items for choice in item.choices]
    values = iter(scorer.score(pairs))
    rows = [[next(values) for _ in item.choices] for item in items]
    right = np.array([row.index(max(row)) == item.right if len(row) > 1 else row[0][1]
                      for item, row in zip(items, rows, strict=True)])
    likely = [row[item.right][0] for item, row in zip(items, rows, strict=True)]
    chance = {"chance": float(np.mean([1 / len(row) for row in rows]))}
    return {name: {"acc": float(right.mean()), **(chance if len(rows[0]) > 1 else {}),
                   "acc_stderr": float(right.std() / math.sqrt(max(len(right) - 1, 1))),
                   "loglikelihood": float(np.mean(likely)), "n": len(items),
                   "truncated": len(scorer.truncated)}}


@cache
def task_manager(defaults: bool):
    """lm-eval's finder of tasks; `defaults`: with its own thousands, which takes a while."""
    # Without a network the hub's client retries for long; told so, it takes its cache at once. It
    # reads the variables when it is imported.
    if "HF_HUB_OFFLINE" not in os.environ:
        try:
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=5).close()
        except (OSError, ValueError) as error:
            if not hasattr(error, "code"):  # an HTTP error is an answer
                os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ |= {"TQDM_DISABLE": "1", "LMEVAL_LOG_LEVEL": "ERROR"}
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def load_task(name: str) -> list:
    """The task objects of a name, their data downloaded."""
    tiny = name == TINY_MMLU["task"]
    try:
        manager = task_manager(defaults=not tiny)
        if tiny or name in manager.all_tasks:
            loaded = manager.load([TINY_MMLU if tiny else name])
            return [*loaded["groups"].values()] or [*loaded["tasks"].values()]
    except ImportError as error:
        raise Unavailable(f"{error}; pip install lm-eval datasets") from None
    except Exception as error:  # whatever the library, its plug-ins or the network raise
        source = f"data set {TINY_MMLU['dataset_path']}" if tiny else "its data"
        raise Unavailable(f"{source} cannot be had from huggingface.co or its cache, run it once "
                          f"with a network ({' '.join(str(error).split())[:160]})") from None
    near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 4, 0.5))
    raise UserError(f"no task {name}; {f'near it: {near}; ' if near else ''}`lm-eval ls tasks` "
                    "lists all, a file of your own is local:FILE.jsonl")


def score_harness(name: str, tasks: list, limit: int, scorer: Scorer) -> dict:
    """{task: metrics} of lm-eval's tasks; `name` also stands for the members of a group."""
    from lm_eval import simple_evaluate

    output = simple_evaluate(harness(scorer), tasks=tasks, limit=limit or None,
                             task_manager=task_manager(name != "tinyMMLU"), bootstrap_iters=1000)
    scores: dict = {}
    for task, values in output["results"].items() if output else ():  # None: not the first rank
        # 'acc,none' is the metric acc through the filter none
        scores[task] = {key.removesuffix(",none"): value for key, value in values.items()
                        if isinstance(value, float)}
        samples = output["samples"].get(task, [])
        if output["configs"].get(task, {}).get("output_type") == "multiple_choice" and samples:
            scores[task]["chance"] = sum(1 / len(s["resps"]) for s in samples) / len(samples)
        scores[task]["n"] = len(samples) or values.get("sample_len")
    if name in scores or len(scores) == 1:  # prompts are counted over the members of a group
        scores[name if name in scores else next(iter(scores))]["truncated"] = len(scorer.truncated)
    return scores


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
        settings.to_json(path, old | result | {"tasks": old.get("tasks", {}) | result["tasks"]})


def config_of(run: Path | None) -> dict:
    """The config in run.json; {} without a run."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["config"] if run else {}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is what train.py takes: bf16 where the hardware has it, else fp32."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and native) else torch.float32


if __name__ == "__main__":
    settings.run(main, COMMAND)
