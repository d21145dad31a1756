"""Records -> pairs: a prompt, the answer that was chosen and the one that was rejected.

A pair goes through the program as a dialog does, as one JSON text: the dialog with the chosen
answer, and in "rejected" the messages that answer in its place. The prompt is given as a text, as
messages or as an instruction, or both sides are whole transcripts that begin alike.
"""

import contextlib
import json
import re

from plainllama.text.dialogs import ROLES, How, converted, json_text, recognised
from plainllama.text.forms import CONVERTERS, Refused, first, instruction_of, listed

SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # in transcripts of one text, as hh-rlhf has them


def paired(record: dict, how: How) -> tuple[str, int]:
    """Give a record's pair as JSON, and how many messages behind its last answers were left out.
    Refused if it is none."""
    form, record = recognised(record, how)
    if form is not CONVERTERS["pairs"]:
        raise Refused("no fields chosen and rejected", ", ".join(map(str, record)))
    prompt = prompt_of(record)
    about = {key: record[key] for key in ("system", "tools", "functions") if record.get(key)}
    plain = How("messages", (), how.system, how.train_on)
    sides, cuts = [], 0
    for name in ("chosen", "rejected"):
        said = said_in(record[name])
        whole = any(ROLES.get(first(message, "role", "from")) == "user" for message in said)
        text, cut = converted({"messages": said if whole else prompt + said} | about, plain)
        sides.append(json.loads(text))
        cuts += cut
    return joined(*sides), cuts


def joined(chosen: dict, rejected: dict) -> str:
    """Join two dialogs that begin alike, up to their last question. Refused if they do not, or
    answer alike."""
    a, b = chosen["messages"], rejected["messages"]
    ends = [max(i for i, message in enumerate(side) if message["role"] == "user") + 1
            for side in (a, b)]
    (a_said, a_answer), (b_said, b_answer) = (
        ([message | {"learn": True} for message in side[:end]], side[end:])
        for side, end in zip((a, b), ends, strict=True))
    if a_said != b_said:
        raise Refused("different prompts in a pair")
    if a_answer == b_answer:
        raise Refused("chosen equals rejected")
    return json_text(chosen | {"rejected": b_answer})


def prompt_of(record: dict) -> list:
    """Give the messages before the answers, [] where both sides hold them."""
    if record.get("instruction"):
        return instruction_of(record | {"output": ""})[:-1]
    prompt = first(record, "prompt", "question", "conversations", "messages")
    return said_in(prompt, "user") if prompt else []


def said_in(side: object, role: str = "assistant") -> list:
    """Give the messages of one side: a text of `role`, a transcript, a message or a list of them.
    Refused if it is none of these."""
    if isinstance(side, dict) and ("role" in side or "from" in side):
        return [side]
    messages = []
    with contextlib.suppress(Refused):  # a text that begins with a bracket
        messages = listed(side, "a side is not a text, a message or a list of messages")
    if messages and all(isinstance(message, dict) for message in messages):
        return messages
    if isinstance(side, str):
        parts = SPEAKER.split(side)
        if len(parts) == 1 or parts[0].strip():
            return [{"role": role, "content": side}]
        turns = [{"role": {"Human": "user"}.get(who, "assistant"), "content": text.strip()}
                 for who, text in zip(parts[1::2], parts[2::2], strict=True)]
        open_ended = role == "user" and not turns[-1]["content"]  # a prompt that ends "Assistant:"
        return turns[:-1] if open_ended else turns
    raise Refused("a side is not a text, a message or a list of messages", side)
