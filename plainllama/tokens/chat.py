"""Dialogs <-> ids: five tokens for roles and ends, a mask of what is learned, calls of functions.

A dialog is <s> and then of each message a role token, the ids of its content encoded by itself, and
<|end|>. Text is never read as a control token: what a user types as <|end|> stays text. What is
learned is known by construction: an answer with its <|end|>. TEMPLATE says the same in Jinja, for
transformers and all that reads its folders; there a typed <|end|> does become a control token.
"""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plainllama.settings import UserError
from plainllama.tokens import tokenizer_json
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.vocabulary import special

END = "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
TEMPLATE = Path(__file__).with_name(tokenizer_json.TEMPLATE_FILE).read_text(encoding="utf-8")
THINK, THOUGHT = "<think>\n", "\n</think>\n\n"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters but \t, \n
CALL, CALLED = "<tool_call>\n", "\n</tool_call>"


class Rendered(NamedTuple):
    """A dialog as tokens."""

    ids: np.ndarray  # (n,) of the tokenizer's dtype
    learned: np.ndarray  # (n,) bool
    ends: list[int]  # how many tokens there are when each answer has ended
    rewritten: bool = False  # what comes changes what was before: its last answer alone is learned


def with_roles(spec: dict, where: str, data: bytes = b"") -> tuple[dict, bytes]:
    """Add to a parsed tokenizer.json the tokens of roles and ends, behind its last id; return it
    and its bytes. What has them all stays as it is, and so does `data`, the bytes that it was read
    from; UserError, which names `where`, if it has some, or one as a piece of text."""
    entries = tokenizer_json.list_entries(spec)
    names = [*ROLES.values(), END]
    there = {piece: is_special for piece, is_special in entries.values() if piece in names}
    if there and not (len(there) == len(names) and all(there.values())):
        raise UserError(f"{where} has {', '.join(sorted(there))} of its own, where the tokens of "
                        "roles shall be; take another tokenizer or chat_template=model")
    if not there:
        added = [special(name, max(entries) + 1 + i) for i, name in enumerate(names)]
        spec = spec | {"added_tokens": [*spec["added_tokens"], *added]}
    return tokenizer_json.complete(spec, where, data if there else b"")


class Chat:
    """The own template, with a tokenizer that has its tokens; UserError if it lacks them."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        ids = tokenizer.special_ids
        if not ids.keys() >= {*ROLES.values(), END}:
            raise UserError("this model knows no dialogs: its tokenizer lacks "
                            f"{', '.join(sorted({*ROLES.values(), END} - ids.keys()))}; tune it on "
                            "a data set of documents=chat first")
        self.roles, self.end = {role: ids[name] for role, name in ROLES.items()}, ids[END]

    def render(self, dialog: dict) -> tuple[np.ndarray, np.ndarray]:
        """Give the ids (n,) of a canonical dialog and which of them are learned, bool (n,)."""
        whole = self.rendered(dialog)
        return whole.ids, whole.learned

    def rendered(self, dialog: dict) -> Rendered:
        """Render a dialog, and say where its answers end: the ids up to there are those of the
        dialog up to there."""
        parts: list = [[self.tokenizer.bos_id]]
        runs, learned, ends, size = [1], [False], [], 1  # learned or not, in runs of tokens
        everything = bool(dialog.get("learn_all"))
        for message in with_tools(dialog.get("messages", ()), dialog.get("tools")):
            inner = self.tokenizer.encode_behind(written(message))
            answers = message["role"] == "assistant"
            learn = message.get("learn", True) if answers else everything
            parts += [[self.roles[message["role"]]], inner, [self.end]]
            runs += [1, len(inner) + 1]
            learned += [everything, learn]
            size += len(inner) + 2
            if answers:
                ends.append(size)
        ids = np.concatenate(parts, dtype=self.tokenizer.kind, casting="unsafe")
        return Rendered(ids, np.repeat(learned, runs), ends)

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Give the ids that an answer is generated behind: <|assistant|> is the last."""
        ids, _ = self.render({"messages": messages, "tools": tools})
        return [*ids.tolist(), self.roles["assistant"]]

    def fitted(self, whole: Rendered, room: int) -> tuple[Rendered | None, int]:
        """Leave out the last turns for which `room` tokens are too few, so that a dialog ends with
        an answer; also how many learned tokens that costs. None if nothing that is learned has
        room."""
        if len(whole.ids) <= room:
            return whole, 0
        end = max((end for end in whole.ends if end <= room), default=0)
        if not whole.learned[:end].any():
            return None, int(whole.learned.sum())
        kept = Rendered(whole.ids[:end], whole.learned[:end],
                        [other for other in whole.ends if other <= end])
        return kept, int(whole.learned[end:].sum())

    def parse(self, text: str) -> dict:
        """Read an answer, as it is decoded, as a message; ValueError as parsed() has."""
        return parsed(text)

    def show(self, ids: np.ndarray, learned: np.ndarray, colour: bool) -> str:
        """Spell a dialog token by token: the learned ones coloured or, without `colour`, in
        [[...]]; control tokens by name, and what would steer the terminal as \\x1b."""
        begin, end = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
        return "".join(begin + text + end if is_learned else text for text, is_learned in (
            (STEERING.sub(lambda found: ascii(found[0])[1:-1], text), is_learned)
            for text, is_learned in pieces(self.tokenizer, ids, learned)))


def pieces(tokenizer: Tokenizer, ids: np.ndarray,
           learned: np.ndarray) -> list[tuple[str, bool]]:
    """Cut a dialog where learned tokens begin and end: [(text, whether it is learned)], with
    control tokens by name."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    made = []
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    for first, last in pairwise(edges):
        text = ""
        run: list[int] = []
        for i in [*ids[first:last].tolist(), None]:
            if i is not None and i not in names:
                run.append(i)
                continue
            text += tokenizer.decode_behind(run) + ("" if i is None else names[i])
            run = []
        made.append((text, bool(learned[first])))
    return made


def with_tools(messages: Iterable[dict], tools: list[dict] | None) -> list[dict]:
    """Put the schemas of tools into the system message, at its end; it is made if there is none."""
    messages = list(messages)
    if not tools:
        return messages
    lines = "".join(as_json(tool) + "\n" for tool in tools)
    listed = f"<tools>\n{lines}</tools>"
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": listed}, *messages]
    content = messages[0]["content"]
    content = f"{content}\n\n{listed}" if content else listed
    return [messages[0] | {"content": content}, *messages[1:]]


def written(message: dict) -> str:
    """Write what a message says as one text, reasoning and calls too."""
    text = message["content"]
    if message["role"] != "assistant":
        return text
    calls = [f'{CALL}{{"name": {as_json(call["name"])}, "arguments": {as_json(call["arguments"])}}}'
             f"{CALLED}" for call in message.get("tool_calls", ())]
    text = "\n".join([text, *calls] if text else calls)
    return f"{THINK}{message['reasoning']}{THOUGHT}{text}" if message.get("reasoning") else text


def parsed(text: str) -> dict:
    """Read an answer as a message, the inverse of written(); ValueError with the reason if it calls
    a function in another form."""
    message: dict = {"role": "assistant", "content": text}
    if text.startswith(THINK) and THOUGHT in text:
        message["reasoning"], _, text = text.removeprefix(THINK).partition(THOUGHT)
    content, *calls = text.split(CALL)
    if calls:
        content = content[:-1] if content.endswith("\n") else content
        message["tool_calls"] = [parsed_call(call) for call in calls]
    ordered = {"role": "assistant", "content": content}
    return ordered | {key: message[key] for key in ("reasoning", "tool_calls") if key in message}


def parsed_call(text: str) -> dict:
    """Read what stands behind <tool_call>."""
    body, closed, rest = text.partition(CALLED)
    if not closed or rest.strip():
        raise ValueError("a call does not end with </tool_call>")
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError(f"a call is not JSON: {body[:200]}") from None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)
            and isinstance(call.get("arguments"), dict) and len(call) == 2):
        raise ValueError(f'a call is not {{"name": ..., "arguments": {{...}}}}: {body[:200]}')
    return call


def as_json(value: object) -> str:
    """Write JSON as the template's `tojson` does."""
    return json.dumps(value, ensure_ascii=False)
