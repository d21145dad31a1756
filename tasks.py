"""Benchmark tasks: local files, tinyMMLU, whatever lm-eval knows, and the passkey probe, scored by
one Scorer."""

import difflib
import json
import math
import os
import urllib.error
import urllib.request
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import settings
from log import Progress
from model import LLaMA
from parallel import World
from settings import UserError
from tokenizer import Tokenizer

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

# The passkey probe (https://arxiv.org/abs/2305.16300): one of these lines among many of the other
PASSKEY = "The pass key is {key}. Keep it in mind: {key} is the pass key.\n"
FILLER = "Rain falls on the hills and runs down to the sea. The wind turns and the leaves move.\n"
QUESTION = "What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the line stands: 0 at the top, 1 above the question


class Unavailable(Exception):
    """A task whose library or data cannot be had here; the other scores still come."""


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
        progress = Progress("scoring", len(groups), "prompts", self.world.rank == 0,
                            self.world.device.type)
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
            progress.add(min(len(batch) * self.world.size, len(groups) - progress.done))
        progress.close()
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
            import generate

            answers = []
            for text, options in (request.args for request in requests):
                ids, until = scorer.encode(text), options.get("until") or []
                until = [until] if isinstance(until, str) else list(until)
                room = min(options.get("max_gen_toks", 256), scorer.block_size // 2)
                if len(ids) + room > scorer.block_size:
                    scorer.truncated.add(hash(tuple(ids)))
                [(_, answer, _)] = generate.complete(
                    scorer.model, scorer.tokenizer, [ids[room - scorer.block_size:]], room,
                    settings.Sampling(temperature=0.0), [0], until)
                answers.append(answer)
            return answers

    return Harness()


# ---- tasks

def find(flags: Any) -> tuple[dict, list[str]]:
    """({name: function of a Scorer that gives {task: metrics}}, [what cannot be had here])."""
    jobs, missing = {}, []
    names = dict.fromkeys(name.strip() for name in flags.tasks.split(",") if name.strip())
    for name in names:
        try:
            if Path(name).is_file():
                raise UserError(f"--tasks={name} is a file: say --tasks=local:{name}")
            if name == "passkey":
                jobs[name] = partial(score_passkey, flags.limit)
            elif name.startswith("local:"):
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


def passkey_prompts(scorer: Scorer, length: int) -> list[tuple[str, float, int]]:
    """(prompt, depth, digit) for every depth and digit: as many lines of filler as let the longest
    prompt and its answer fit into a context of `length` tokens; [] if that makes no five depths.

    A digit is as good a key as a long number and cheaper: the ten answers share a forward pass.
    Each is right equally often, so that a model that always says the same scores 0.1 exactly.
    """
    def prompts(lines: int) -> list[tuple[str, float, int]]:
        return [(FILLER * round(depth * lines) + PASSKEY.format(key=key)
                 + FILLER * (lines - round(depth * lines)) + QUESTION, depth, key)
                for depth in DEPTHS for key in range(10)]

    def longest(lines: int) -> int:
        return max(sum(map(len, scorer.pair(prompt, f" {key}")))
                   for prompt, _, key in prompts(lines)) - 1  # the answer itself is not read

    bare, eight = longest(0), longest(8)
    lines = int((length - bare) / (eight - bare) * 8) + 1  # nearly: pieces may merge between lines
    while lines >= len(DEPTHS) - 1 and longest(lines) > length:
        lines -= 1
    return prompts(lines) if lines >= len(DEPTHS) - 1 else []


def score_passkey(limit: int, scorer: Scorer) -> dict:
    """{passkey: metrics}: the share of prompts after which the digit that was told is the likeliest
    of the ten: acc, and acc by length of the prompt and by depth."""
    cases = [(prompt, length, depth, key) for length in
             dict.fromkeys(scorer.block_size // parts for parts in (4, 2, 1))
             for prompt, depth, key in passkey_prompts(scorer, length)][:limit or None]
    if not cases:
        raise UserError(f"passkey: a context of {scorer.block_size} tokens is too short for its "
                        "text; leave it out of --tasks")
    values = scorer.score([scorer.pair(prompt, f" {digit}") for prompt, *_ in cases
                           for digit in range(10)])
    likely = np.array([value for value, _ in values]).reshape(-1, 10)
    right = likely.argmax(1) == [key for *_, key in cases]
    groups = {"acc": np.full(len(cases), True)}
    for name, column in (("acc_{}", 1), ("acc_depth_{:.0%}", 2)):
        for value in dict.fromkeys(case[column] for case in cases):
            groups[name.format(value)] = np.array([case[column] == value for case in cases])
    found: dict = {}
    for name, chosen in groups.items():
        some = right[chosen]
        found |= {name: float(some.mean()),
                  f"{name}_stderr": float(some.std() / math.sqrt(max(len(some) - 1, 1)))}
    return {"passkey": found | {"chance": 0.1, "n": len(cases),
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
        raise Unavailable(f"{error}; {settings.install('eval')}") from None
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
