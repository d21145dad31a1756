"""Dialogs as a task: does the model give the answers that are there?

Each answer is generated greedily behind the true talk before it, and compared: calls of functions
as JSON values, text to the letter. A dialog is right if all its answers are.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plainllama.evaluation.likelihood import Scorer, mean
from plainllama.generation import generate
from plainllama.progress import Progress
from plainllama.settings import Sampling, UserError
from plainllama.text import embedded_chat
from plainllama.text.dialogs import How, Refused, converted
from plainllama.text.documents import Tally, documents
from plainllama.text.sources import survey
from plainllama.tokens.chat import Chat
from plainllama.tokens.templates import chat_of

COUNT = 300  # dialogs of dialogs:embedded
SPARE = 16  # tokens that an answer may be longer than the right one


class Turn(NamedTuple):
    """An answer that is asked for."""

    dialog: int
    prompt: list[int]
    size: int  # tokens of the right answer
    wanted: dict  # the message


def read_dialogs(name: str, limit: int) -> list[dict]:
    """Read the dialogs that a task's name asks for, dialogs:embedded (those held out) or
    dialogs:FILE. UserError for a file without any, or with a row that is none."""
    file = os.path.expanduser(name.removeprefix("dialogs:"))
    if file == "embedded":
        made = embedded_chat.dialogs("held_out", min(limit or COUNT, COUNT))
        return [json.loads(converted(dialog, How())[0]) for dialog in made]
    if not Path(file).is_file():
        raise UserError(f"no file {file}; say dialogs:FILE.jsonl or dialogs:embedded")
    _, parts = survey({"path": file}, documents="chat", train_on="assistant")
    dropped = Tally()
    found = [json.loads(text) for text in documents(parts, dropped)]
    for rule, entry in dropped.items():
        unknown = rule.startswith("no known")
        forms = "; rows have `messages`, or fields as prepare.py takes them" if unknown else ""
        raise UserError(f"{entry['first']}: {rule}{forms}")
    return found[:limit or None]


def turns_of(chat: Chat, dialogs: list[dict], block_size: int) -> tuple[list[Turn], list[int]]:
    """List the answers of dialogs that are learned, and the dialogs of which some have no room in
    the context. UserError if no answer has, or a model's own template does not take one."""
    turns, cut = [], []
    for number, dialog in enumerate(dialogs):
        messages = dialog["messages"]
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("learn", True):
                try:
                    prompt, upto = (chat.prompt(messages[:end], dialog.get("tools"))
                                    for end in (i, i + 1))
                except Refused as error:
                    raise UserError(f"dialog {number + 1}: {error}") from None
                size = len(upto) - len(prompt) - 1
                if len(prompt) + size > block_size:
                    cut.append(number)
                    break
                wanted = {key: message[key] for key in message if key != "learn"}
                turns.append(Turn(number, prompt, size, wanted))
    if not turns:
        raise UserError(f"no answer has room in a context of {block_size} tokens")
    return turns, cut


def score_dialogs(name: str, dialogs: list[dict], scorer: Scorer) -> dict:
    """Score dialogs, {name: metrics}: acc, the share of those that are right throughout, for which
    all their answers must have room; answers and calls, the shares of right ones; ended, of those
    that end by themselves. Collective."""
    chat, world, model = chat_of(scorer.tokenizer), scorer.world, scorer.model
    turns, cut = turns_of(chat, dialogs, model.config.block_size)
    order = sorted(range(len(turns)), key=lambda i: len(turns[i].prompt))
    size = max(1, scorer.batch_tokens // model.config.block_size)
    batches = [order[first:first + size] for first in range(0, len(order), size)]
    found = torch.zeros(len(turns), 2, dtype=torch.float64)  # is it right, did it end
    progress = Progress("answering", len(turns), "answers", world.rank == 0, world.device.type)
    samples = {}
    for batch in batches[world.rank::world.size]:
        most = max(turns[i].size for i in batch) + SPARE
        made = generate.generate(
            model, [turns[i].prompt for i in batch], most, Sampling(temperature=0),
            [0] * len(batch), scorer.tokenizer.stop_ids, scorer.tokenizer.vocab_size)
        for i, (ids, ended) in zip(batch, made, strict=True):
            try:
                answer: object = chat.parse(scorer.tokenizer.decode_behind(ids))
            except ValueError as error:
                answer = str(error)
            right = answer == turns[i].wanted and ended == "eos"
            found[i] = torch.tensor([right, ended == "eos"])
            samples[i] = {"doc_id": i, "dialog": turns[i].dialog, "target": turns[i].wanted,
                          "resps": [[answer]], "acc": float(right)}
        progress.add(min(len(batch) * world.size, len(turns) - progress.done))
    progress.close()
    everyone = {i: row for part in world.gather(samples) for i, row in part.items()}
    scorer.samples[name] = [everyone[i] for i in sorted(everyone)]
    right, ended = world.sum(found).numpy().T > 0
    calls = np.array(["tool_calls" in turn.wanted for turn in turns])
    whole = ~np.isin(np.arange(len(dialogs)), cut)
    np.logical_and.at(whole, [turn.dialog for turn in turns], right)
    metrics = mean("acc", whole) | mean("answers", right) | mean("ended", ended)
    if calls.any():
        metrics |= mean("calls", right[calls])
    return {name: metrics | {"n": len(dialogs), "cut": len(cut)}}
