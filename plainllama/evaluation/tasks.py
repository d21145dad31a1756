"""Benchmark tasks: the passkey probe, local files, tinyMMLU and whatever lm-eval knows."""

import importlib.util
import json
import os
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plainllama.evaluation import dialogs, irt, lm_eval_tasks
from plainllama.evaluation.irt import LETTERS, Known
from plainllama.evaluation.likelihood import Scorer, mean
from plainllama.files import sha256_bytes
from plainllama.parallel import World
from plainllama.settings import UserError, install, nearest
from plainllama.text.records import naming_damage, opened

SHOTS = 5  # worked examples before a question, as MMLU has them (https://arxiv.org/abs/2009.03300)
BLANK = re.compile(r"(?<!\w)_(?!\w)")  # what a choice is to be put in for
# The passkey probe (https://arxiv.org/abs/2305.16300): one of these lines among many of the other
PASSKEY = "The pass key is {key}. Keep it in mind: {key} is the pass key.\n"
FILLER = "Rain falls on the hills and runs down to the sea. The wind turns and the leaves move.\n"
QUESTION = "What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the line stands: 0 at the top, 1 above the question

class Item(NamedTuple):
    """What is scored: pairs of context and continuation, the number of the right one."""

    pairs: list[tuple[str, str]]
    right: int
    subject: str = ""
    question: str = ""
    letters: bool = False


class Task(NamedTuple):
    """A task that can be scored."""

    score: Callable[[Scorer], dict]  # -> {task: metrics}; collective
    questions: Callable[[], list[str]]  # the texts that are asked, without worked examples
    names: list[str]  # of the tasks that score() gives
    made_of: dict[str, str]  # hashes of what changes the scores, beside the model


# ---- names -> tasks

def find_tasks(asked: list[str], flags: Any, world: World) -> tuple[dict[str, Task], list[str]]:
    """Make the tasks that are asked for: ({name: Task}, [why others are unavailable here]). Rank 0
    uses the network and estimates, then the others read what it fetched. Collective."""
    tasks: dict[str, Task] = {}
    unavailable: list[str] = []
    tiny = any(map(is_tiny, asked))
    if flags.irt_file and not tiny:
        raise UserError("--irt_file is for tinyMMLU; name it, or a local:FILE of that name")

    def make(names: list[str]) -> list[str]:
        known = irt.load(flags.irt_file) if tiny and world.rank == 0 else None
        shots = read_local(flags.shots, None, flags.answers) if flags.shots else []
        for name in names:
            estimates = known if is_tiny(name) else None
            prefix, colon, _ = name.partition(":")
            try:
                make_one = MAKERS.get(prefix + colon, lm_eval_task)
                tasks[name] = make_one(name, flags, shots, estimates)
            except lm_eval_tasks.Unavailable as error:
                reason = f"no {name}: {error}; or score a file: --tasks=local:FILE.jsonl"
                if estimates and estimates.unavailable:
                    reason += f"; irt, pirt, gpirt: {estimates.unavailable}"
                unavailable.append(reason)
        return list(tasks)  # those that could be made

    names = world.decide(lambda: make(asked))
    if world.rank > 0 and make(names) != names:
        raise UserError(f"rank {world.rank} cannot have what rank 0 has: {unavailable[0]}")
    return tasks, unavailable


def default_names(flags: Any, given: dict) -> tuple[str, str]:
    """Give the names of the tasks that are asked for, and why the default ones are not: beside
    --generate, and of a machine without lm-eval, which is said."""
    if "tasks" in given or flags.irt_file:
        return flags.tasks, ""
    if flags.generate:
        return "", ""
    if importlib.util.find_spec("lm_eval") is None:
        return "", (f"no {flags.tasks}: lm-eval is not installed ({install('eval')}); or score a "
                    "file: --tasks=local:FILE.jsonl")
    return flags.tasks, ""


def is_tiny(name: str) -> bool:
    """Whether a task's or file's name says that it is tinyMMLU."""
    return "tinymmlu" in re.sub("[^a-z]", "", Path(name).name.lower())


def local_task(name: str, flags: Any, shots: list[Item], known: Known | None) -> Task:
    """Make a task of a local file's rows."""
    file = os.path.expanduser(name.removeprefix("local:"))
    items = read_local(file, shots, flags.answers)[:flags.limit or None]
    return Task(partial(score_local, name, items, known),
                lambda: [item.question for item in items], [name],
                {"questions": sha256_bytes(json.dumps(items).encode())} | irt.made_of(known))


def dialog_task(name: str, flags: Any, *_) -> Task:
    """Make a task of a file of dialogs, or of those that are embedded."""
    found = dialogs.read_dialogs(name, flags.limit)
    asked = [message["content"] for dialog in found for message in dialog["messages"]
             if message["role"] == "user"]
    return Task(partial(dialogs.score_dialogs, name, found), lambda: asked, [name],
                {"questions": sha256_bytes(json.dumps(found).encode())})


def lm_eval_task(name: str, flags: Any, _shots: list[Item], known: Known | None) -> Task:
    """Load a task or a group of tasks that lm-eval knows by name."""
    if Path(name).is_file():
        raise UserError(f"--tasks={name} is a file: say {shlex.quote(f'--tasks=local:{name}')}")
    if close := ":" in name and nearest(f"{name.partition(':')[0]}:", MAKERS):
        raise UserError(f"no task {name}{close}")
    loaded = lm_eval_tasks.load_task(name, flags.include_path)
    return Task(partial(lm_eval_tasks.score, name, loaded, flags.limit, known),
                partial(lm_eval_tasks.questions, loaded, flags.limit),
                list(loaded["tasks"]),
                {"questions": lm_eval_tasks.hash_of(loaded)} | irt.made_of(known))


# a name, or what it begins with -> its maker; every other name is lm-eval's. To add one: a
# function, this entry, tests/test_eval.py
MAKERS: dict[str, Callable[..., Task]] = {
    "passkey": lambda name, flags, *_: Task(partial(score_passkey, flags.limit), list, [name], {}),
    "local:": local_task,
    "dialogs:": dialog_task,
}


# ---- local files

def read_local(file: str, shots: list[Item] | None, answers: str = "auto") -> list[Item]:
    """Read the rows of a JSON-lines file (also .gz, .xz, .zst); one that is wrong is named by its
    line. `shots`, `answers`: as for local_item."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}")
    items = []
    with naming_damage(file), opened(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    items.append(local_item(json.loads(line), shots, answers))
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{file}:{number}: not a JSON object") from None
            except UserError as error:
                raise UserError(f"{file}:{number}: {error}") from None
    kinds = {(len(item.pairs) > 1, item.letters) for item in items}
    if len(kinds) != 1:
        raise UserError(f"{file} holds rows of several kinds, or none: a score is the mean of rows "
                        "of choices, with or without a subject, or of continuations")
    return items


def local_item(row: dict, shots: list[Item] | None, answers: str = "auto") -> Item:
    """Turn a row into an Item, with worked examples in front (None: it is to be such an example
    itself).

    `answers`: letters, the choices are listed and their letters scored, as MMLU asks it; full, the
    choices themselves are scored, in the blank of the text or after it; auto, letters where a row
    names its `subject`.
    """
    text = prompt = field(row, "context" if "context" in row else "question")
    if "context" in row and "choices" not in row:
        return Item(continued(text, [field(row, "continuation")]), 0, question=text)
    if "context" not in row and (text.rstrip().endswith("?") or text.startswith("Question:")):
        prompt = f"Question: {text.removeprefix('Question:').strip()}\nAnswer:"
    choices, answer = field(row, "choices", list), field(row, "answer", str | int)
    if len(choices) < 2:
        raise UserError("a row with 'choices' has at least two of them")
    right, subject = right_choice(answer, choices), str(row.get("subject") or "")
    letters = answers == "letters" or (answers == "auto" and "subject" in row)
    blank = BLANK.search(text)
    if letters:  # as MMLU asks for them
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        listed = "\n".join([text.strip(), *lines, "Answer:"])
        pairs = [(listed, f" {letter}") for letter in LETTERS[:len(choices)]]
    elif blank and text[blank.end():].strip():
        pairs = [(f"{text[:blank.start()]}{choice}", text[blank.end():]) for choice in choices]
    else:
        pairs = continued(prompt, choices)
    fitting = [shot for shot in shots or [] if shot.subject in ("", subject)]
    if shots and subject and not fitting:
        raise UserError(f"--shots has no example of the subject {subject}")
    front = "".join("".join(shot.pairs[shot.right]) + "\n\n" for shot in fitting[:SHOTS])
    if letters and shots is not None and (subject or shots):
        about = f" about {subject.replace('_', ' ')}" if subject else ""
        front = f"The following are multiple choice questions (with answers){about}.\n\n{front}"
    pairs = [(front + context, continuation) for context, continuation in pairs]
    return Item(pairs, right, subject, text, letters)


def field(row: dict, name: str, kind: Any = str) -> Any:
    """Read a field of a row; UserError if it is missing or of another type."""
    if not isinstance(row.get(name), kind):
        raise UserError(f"field '{name}' is missing or of the wrong type; see eval.py --help")
    return row[name]


def right_choice(answer: str | int, choices: list) -> int:
    """Number the right choice, told by its text, its letter or its index; UserError for others, and
    for an answer that says more than one."""
    told = str(answer).strip()
    as_text = isinstance(answer, str)  # a number is the text of numbers only
    meant = {i for i, choice in enumerate(choices)
             if str(choice).strip() == told and (as_text or not isinstance(choice, str))}
    if isinstance(answer, int):
        meant.add(answer)
    elif len(told) == 1 and (told.isupper() or not meant):  # a small letter is first of all a text
        meant.add(LETTERS.find(told.upper()))
    meant &= set(range(min(len(choices), len(LETTERS))))
    if len(meant) != 1 or isinstance(answer, bool):
        raise UserError(f"'answer' is {answer!r}, which says none or several of the {len(choices)} "
                        "choices; give the index of one (from 0), its letter or its text")
    return meant.pop()


def continued(context: str, texts: list) -> list[tuple[str, str]]:
    """Pair a context with continuations, with a space in front where none would be between them."""
    if "" in texts:
        raise UserError("a continuation or choice without any text cannot be scored")
    spaced = not context or context[-1].isspace()
    return [(context, text if spaced or text[:1].isspace() else f" {text}")
            for text in map(str, texts)]


# ---- scores

def score_local(name: str, items: list[Item], known: Known | None, scorer: Scorer) -> dict:
    """Score a local file, {name: metrics}. Several continuations: acc is the share of rows whose
    right one is the most likely, acc_norm the same per character. One: acc is the share that greedy
    decoding gives. loglikelihood is the mean of the right ones, in nats."""
    scored = iter(scorer.score([scorer.pair(*pair) for item in items for pair in item.pairs]))
    rows = [[next(scored) for _ in item.pairs] for item in items]
    nats = [np.array([likelihood.nats for likelihood in row]) for row in rows]
    answers, several = np.array([item.right for item in items]), len(rows[0]) > 1
    right = (np.array([row.argmax() for row in nats]) == answers if several
             else np.array([row[0].greedy for row in rows]))
    scorer.samples[name] = [
        {"doc_id": i, "target": str(item.right), "arguments": item.pairs,
         "resps": [[likelihood] for likelihood in row], "acc": float(hit)}
        for i, (item, row, hit) in enumerate(zip(items, rows, right, strict=True))]
    metrics: dict = mean("acc", right)
    if several:
        sizes = [np.array([max(1, len(text.strip())) for _, text in item.pairs]) for item in items]
        if not items[0].letters and any(np.ptp(size) for size in sizes):
            chosen = [(row / size).argmax() for row, size in zip(nats, sizes, strict=True)]
            metrics |= mean("acc_norm", np.array(chosen) == answers)
        metrics["chance"] = float(np.mean([1 / len(row) for row in rows]))
    of_right = [row[answer] for row, answer in zip(nats, answers, strict=True)]
    metrics["loglikelihood"] = float(np.mean(of_right))
    if items[0].letters:
        metrics["shots"] = min(item.pairs[0][0].count("\nAnswer:") for item in items) - 1
        metrics["letters"] = irt.letters(nats)
    if known:
        metrics |= irt.scores(right, known)
    return {name: metrics | {"n": len(items), "truncated": len(scorer.truncated)}}


# ---- the passkey probe

class Passkey(NamedTuple):
    """A prompt that tells a digit and asks for it."""

    prompt: str
    length: int  # tokens of the context that it was written for
    depth: float
    key: int


def passkeys(lines: int, length: int) -> list[Passkey]:
    """Write a prompt for every depth and digit, with so many lines of filler."""
    places = [(depth, round(depth * lines)) for depth in DEPTHS]
    return [Passkey(FILLER * above + PASSKEY.format(key=key) + FILLER * (lines - above) + QUESTION,
                    length, depth, key)
            for depth, above in places for key in range(10)]


def passkey_prompts(scorer: Scorer, length: int) -> list[Passkey]:
    """Write the prompts for a context of `length` tokens: as many lines of filler as let the
    longest prompt and its answer fit; [] if that makes no five depths.

    A digit is as good a key as a long number and cheaper: the ten answers share a forward pass.
    Each is right equally often, so that a model that always says the same scores 0.1 exactly.
    """
    def longest(lines: int) -> int:  # the key is not read
        return max(len(scorer.encode(f"{case.prompt} {case.key}")) - 1
                   for case in passkeys(lines, length))

    bare, eight = longest(0), longest(8)
    lines = int((length - bare) / (eight - bare) * 8) + 1  # nearly: pieces may merge between lines
    while lines >= len(DEPTHS) - 1 and longest(lines) > length:
        lines -= 1
    return passkeys(lines, length) if lines >= len(DEPTHS) - 1 else []


def score_passkey(limit: int, scorer: Scorer) -> dict:
    """Score the probe, {passkey: metrics}: the share of prompts after which the digit that was told
    is the likeliest of the ten: acc, and acc by length of the prompt and by depth."""
    contexts = dict.fromkeys(scorer.block_size // parts for parts in (4, 2, 1))
    cases = [case for length in contexts for case in passkey_prompts(scorer, length)]
    cases = cases[:limit or None]
    if not cases:
        raise UserError(f"passkey: a context of {scorer.block_size} tokens is too short")
    scored = scorer.score([scorer.pair(case.prompt, f" {digit}") for case in cases
                           for digit in range(10)])
    likeliest = np.array([nats for nats, _ in scored]).reshape(-1, 10).argmax(1)
    _, lengths, depths, keys = map(np.array, zip(*cases, strict=True))
    right = likeliest == keys
    metrics: dict = mean("acc", right)
    for label, values in (("acc_{}", lengths), ("acc_depth_{:.0%}", depths)):
        for value in np.unique(values):
            metrics |= mean(label.format(value), right[values == value])
    return {"passkey": metrics | {"chance": 0.1, "n": len(cases),
                                  "truncated": len(scorer.truncated)}}
