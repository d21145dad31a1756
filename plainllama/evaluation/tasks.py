"""Benchmark tasks: local files, tinyMMLU, whatever lm-eval knows, and the passkey probe; how their
scores are shown and kept."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plainllama.evaluation import irt, lm_eval_tasks
from plainllama.evaluation.irt import LETTERS
from plainllama.evaluation.likelihood import Scorer
from plainllama.settings import UserError
from plainllama.text.documents import opened

SHOTS = 5  # worked examples before a question, as MMLU has them (https://arxiv.org/abs/2009.03300)
BLANK = re.compile(r"(?<!\w)_(?!\w)")  # what a choice is to be put in for
# The passkey probe (https://arxiv.org/abs/2305.16300): one of these lines among many of the other
PASSKEY = "The pass key is {key}. Keep it in mind: {key} is the pass key.\n"
FILLER = "Rain falls on the hills and runs down to the sea. The wind turns and the leaves move.\n"
QUESTION = "What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the line stands: 0 at the top, 1 above the question


# ---- tasks

class Task(NamedTuple):
    """A task that can be scored."""

    score: Callable[[Scorer], dict]  # -> {task: metrics}; collective
    questions: Callable[[], list[str]]  # the texts that are asked, without worked examples
    names: list[str]  # of the tasks that score() gives


def find_tasks(flags: Any, first: bool) -> tuple[dict[str, Task], list[str]]:
    """({name: Job}, [what cannot be had here]). `first`: this is the rank that uses the network
    and estimates."""
    jobs, missing = {}, []
    names = dict.fromkeys(name.strip() for name in flags.tasks.split(",") if name.strip())
    known: tuple = (None, "")
    if first and any(map(is_tiny, names)):
        known = irt.load(flags.irt_file)
    elif first and flags.irt_file:
        raise UserError("--irt_file is for tinyMMLU; name it, or a local:FILE of that name, in "
                        "--tasks")
    shots = read_local(flags.shots, None, flags.answers) if flags.shots else []
    for name in names:
        anchors = known if first and is_tiny(name) else None
        try:
            if name == "passkey":
                jobs[name] = Task(partial(score_passkey, flags.limit), list, [name])
            elif name.startswith("local:"):
                items = read_local(name.removeprefix("local:"), shots, flags.answers)
                items = items[:flags.limit or None]
                jobs[name] = Task(partial(score_local, name, items, anchors),
                                 partial(asked, items), [name])
            elif Path(name).is_file():
                raise UserError(f"--tasks={name} is a file: say --tasks=local:{name}")
            else:
                loaded = lm_eval_tasks.load_task(name, flags.include_path)
                jobs[name] = Task(partial(lm_eval_tasks.score, name, loaded, flags.limit, anchors),
                                 partial(lm_eval_tasks.questions, loaded, flags.limit),
                                 list(loaded["tasks"]))
        except lm_eval_tasks.Unavailable as error:
            estimates = f"; irt, pirt, gpirt: {known[1]}" * bool(is_tiny(name) and known[1])
            missing.append(f"no {name}: {error}; or score a file: --tasks=local:FILE.jsonl"
                           + estimates)
    return jobs, missing


def is_tiny(name: str) -> bool:
    """Whether a task's or file's name says that it is tinyMMLU."""
    return "tinymmlu" in re.sub("[^a-z]", "", Path(name).name.lower())


class Item(NamedTuple):
    """What is scored: pairs of context and continuation, the number of the right one."""

    pairs: list[tuple[str, str]]
    right: int
    subject: str = ""
    question: str = ""
    letters: bool = False

    @property
    def solved(self) -> str:
        """As a worked example."""
        context, continuation = self.pairs[self.right]
        return f"{context}{continuation}\n\n"


def asked(items: list[Item]) -> list[str]:
    """The questions alone."""
    return [item.question for item in items]


def read_local(file: str, shots: list[Item] | None, answers: str = "auto") -> list[Item]:
    """The rows of a JSON-lines file (also .gz, .xz, .zst); one that is wrong is named by its line.
    `shots`, `answers`: as for local_item."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}")
    items = []
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    items.append(local_item(json.loads(line), shots, answers))
            except (ValueError, TypeError, AttributeError):
                raise UserError(f"{file}:{number}: not a JSON object") from None
            except UserError as error:
                raise UserError(f"{file}:{number}: {error}") from None
    if not items:
        raise UserError(f"{file} holds no rows")
    return items


def local_item(row: dict, shots: list[Item] | None, answers: str = "auto") -> Item:
    """A row as an Item, with worked examples in front (None: it is to be such an example itself).

    `answers`: letters, the choices are listed and their letters scored, as MMLU asks it; full, the
    choices themselves are scored; auto, letters where a row names its `subject`.
    """
    goes_on = "context" in row and "choices" not in row
    kind = ("context", "continuation") if goes_on else (
        "context" if "context" in row else "question", "choices", "answer")
    for name in kind:
        if not isinstance(row.get(name), {"choices": list, "answer": str | int}.get(name, str)):
            raise UserError(f"field '{name}' is missing or of the wrong type; a row has question, "
                            "choices, answer or context, continuation")
    asks = row[kind[0]]
    if goes_on:
        return Item([(asks, spaced(asks, row["continuation"]))], 0, "", asks)
    subject, choices, right = str(row.get("subject") or ""), row["choices"], row["answer"]
    if isinstance(right, str):
        letter = LETTERS.find(right.strip().upper()) if len(right.strip()) == 1 else -1
        right = choices.index(right) if letter < 0 and right in choices else letter
    if not 0 <= right < min(len(choices), len(LETTERS)):
        raise UserError(f"'answer' is {row['answer']!r}, not a letter, an index (from 0) or the "
                        f"text of one of the {len(choices)} choices")
    letters = answers == "letters" or (answers == "auto" and "subject" in row)
    if letters:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        prompt = "\n".join([asks.strip(), *lines, "Answer:"])
        pairs = [(prompt, f" {letter}") for letter in LETTERS[:len(choices)]]
    elif (blank := BLANK.search(asks)) and asks[blank.end():].strip():
        pairs = [(f"{asks[:blank.start()]}{choice}", asks[blank.end():]) for choice in choices]
    else:
        if kind[0] == "question" and (asks.rstrip().endswith("?") or asks.startswith("Question:")):
            asks = f"Question: {asks.removeprefix('Question:').strip()}\nAnswer:"
        pairs = [(asks, spaced(asks, str(choice))) for choice in choices]
    if shots and (fitting := [shot for shot in shots if shot.subject in ("", subject)]):
        worked = "".join(shot.solved for shot in fitting[:SHOTS])
        pairs = [(worked + context, continuation) for context, continuation in pairs]
    elif shots and subject:
        raise UserError(f"--shots has no example of the subject {subject}")
    if letters and shots is not None and (subject or shots):
        about = f" about {subject.replace('_', ' ')}" if subject else ""
        head = f"The following are multiple choice questions (with answers){about}.\n\n"
        pairs = [(head + context, continuation) for context, continuation in pairs]
    return Item(pairs, right, subject, row[kind[0]], letters)


def spaced(context: str, continuation: str) -> str:
    """A continuation with a space in front, if there is none between it and the context."""
    glued = not context or context[-1].isspace() or continuation[:1].isspace()
    return continuation if glued else f" {continuation}"


def score_local(name: str, items: list[Item], anchors: tuple | None, scorer: Scorer) -> dict:
    """{name: metrics}. Several continuations: acc is the share of rows whose right one is the most
    likely, acc_norm the same per character. One: acc is the share that greedy decoding gives.
    loglikelihood is the mean of the right ones, in nats."""
    values = iter(scorer.score([scorer.pair(*pair) for item in items for pair in item.pairs]))
    rows = [[next(values) for _ in item.pairs] for item in items]
    likely = [[value for value, _ in row] for row in rows]
    right = np.array([row.index(max(row)) == item.right if len(row) > 1 else rows[i][0][1]
                      for i, (item, row) in enumerate(zip(items, likely, strict=True))])
    scorer.keep(name, items, rows, right)
    metrics: dict = mean("acc", right)
    if not items[0].letters and len(rows[0]) > 1:
        lengths = [[max(1, len(continuation.strip())) for _, continuation in item.pairs]
                   for item in items]
        if any(len(set(row)) > 1 for row in lengths):  # else the same
            metrics |= mean("acc_norm", np.array([
                np.argmax(np.array(row) / size) == item.right
                for item, row, size in zip(items, likely, lengths, strict=True)]))
    if len(rows[0]) > 1:
        metrics["chance"] = float(np.mean([1 / len(row) for row in rows]))
    metrics["loglikelihood"] = float(np.mean(
        [row[item.right] for item, row in zip(items, likely, strict=True)]))
    if items[0].letters:
        metrics["shots"] = min(item.pairs[0][0].count("\nAnswer:") for item in items) - 1
        metrics["letters"] = irt.letters(likely)
    if anchors:
        metrics |= irt.scores(right, anchors)
    return {name: metrics | {"n": len(items), "truncated": len(scorer.truncated)}}


def mean(name: str, right: np.ndarray) -> dict[str, float]:
    """A share and its standard error."""
    return {name: float(right.mean()),
            f"{name}_stderr": float(right.std() / math.sqrt(max(len(right) - 1, 1)))}


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
