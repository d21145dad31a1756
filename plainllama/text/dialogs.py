"""Records -> dialogs: what they say in one form, and the rules that they keep.

A dialog goes through the program as one JSON text: {"messages": [...], "tools": [...]}. A message
has a role (system, user, assistant, tool) and a content; an answer may have `reasoning`,
`tool_calls` [{"name", "arguments"}] and "learn": false. What breaks a rule is dropped and counted
by the rule that Refused names.
"""

import json
from dataclasses import dataclass
from typing import Any

from plainllama.settings import nearest
from plainllama.text.forms import (
    Form,
    Refused,
    first,
    form_of,
    json_of,
    listed,
    misspelt,
    refuse,
    text,
)

ROLES = {name: role for role, names in {
    "system": "system developer", "user": "user human prompter", "assistant":
    "assistant gpt bot model chatgpt", "tool": "tool observation function_response function "
    "tool_response tool_result ipython", "call": "function_call tool_call"}.items()
    for name in names.split()}
ROWS = "rows"  # in place of a converter: a record stays as it is, but for its fields' names
THINK, THOUGHT, CALL, CALLED = "<think>", "</think>", "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class How:
    """How the records of a source become dialogs."""

    converter: str = "auto"  # a key of CONVERTERS, or FILE.py:function
    fields: tuple[tuple[str, str], ...] = ()  # (our name, the one in the data)
    system: str = ""  # put in front where a dialog has none
    train_on: str = "assistant"  # assistant | last | all
    pairs: bool = False  # they are pairs of answers (text/pairs.py)


def converted(record: dict, how: How) -> tuple[str, int]:
    """Give a record's dialog as JSON, and how many messages behind its last answer were left out.
    Refused if it is none."""
    if how.converter == ROWS:
        record, lost = renamed(record, how)
        return json_text(record) if not lost else refuse("a field that is named", lost), 0
    form, record = recognised(record, how)
    messages = messages_of(record, form.messages(record), how.system)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    cut = len(messages) - answers[-1] - 1 if answers else 0
    messages = messages[:len(messages) - cut]
    check(messages)
    if how.train_on == "last":
        for i in answers[:-1]:
            messages[i]["learn"] = False
    if how.train_on != "all" and not any(messages[i]["learn"] for i in answers):
        raise Refused("nothing of it is learned")
    dialog: dict[str, Any] = {"messages": [canonical(message) for message in messages]}
    if tools := tools_of(record):
        dialog["tools"] = tools
    if how.train_on == "all":
        dialog["learn_all"] = True
    return json_text(dialog), cut


def recognised(record: dict, how: How) -> tuple[Form, dict]:
    """Give the form of a record, and the record with our names. Refused if it has none."""
    record, lost = renamed(record, how)
    form, record = form_of(record, how.converter, lost)
    if isinstance(record.get("label"), bool):
        raise Refused("rows with a label true or false (KTO) are neither dialogs nor pairs")
    return form, record


def renamed(record: dict, how: How) -> tuple[dict, str]:
    """Give a record with our names for its fields, and which that is named is not there."""
    found = {name: record[theirs] for name, theirs in how.fields if theirs in record}
    taken = {theirs for _, theirs in how.fields}
    lost = next((f"no {theirs}{nearest(theirs, record.keys() - taken)}"
                 for _, theirs in how.fields if theirs not in record), "")
    return {name: record[name] for name in record if name not in taken} | found, lost


# ---- messages

def messages_of(record: dict, raw: list, system: str) -> list[dict]:
    """Bring a record's messages to ours, with its system message in front or, where it has none,
    `system`. Refused if that cannot be done."""
    if record.get("system"):
        raw = [{"role": "system", "content": record["system"]}, *raw]
    messages = merged([message_of(message) for message in raw])
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    if system and messages and messages[0]["role"] != "system":
        messages = [plain("system", system), *messages]
    return messages


def plain(role: str, content: str) -> dict:
    """Make a message with all keys."""
    return {"role": role, "content": content, "reasoning": "", "tool_calls": [], "learn": True}


def canonical(message: dict) -> dict:
    """Leave out the keys that say nothing."""
    return {key: value for key, value in message.items()
            if key in ("role", "content") or (not value if key == "learn" else value)}


def message_of(raw: Any) -> dict:
    """Bring a message of any spelling to ours; Refused if that cannot be done."""
    if not isinstance(raw, dict):
        raise Refused("a message is not an object", raw)
    name = first(raw, "role", "from")
    role = ROLES.get(name.lower() if isinstance(name, str) else "")
    if not role:
        raise Refused("unknown role", repr(name))
    content = first(raw, "content", "value", "text")
    reasoning = first(raw, "reasoning", "reasoning_content", "thinking")
    calls = [call_of(call) for call in as_list(raw.get("tool_calls"), "calls are not a list")]
    if raw.get("function_call"):
        calls.append(call_of(raw["function_call"]))
    if isinstance(content, list):
        content, thought, more = parts_of(content)
        reasoning, calls = reasoning or thought, calls + more
    if role == "call":
        role, content, calls = "assistant", "", calls + calls_of(content)
    if role == "tool" and isinstance(content, dict):
        content = json_text(content)
    if content == "" and (hint := misspelt(raw, ("content",))):
        raise Refused("a message without content", hint)
    message = plain(role, text(content))
    message["reasoning"], message["tool_calls"] = text(reasoning), calls
    if role == "assistant":
        return answer_of(message, raw)
    if calls or reasoning:
        raise Refused("a call or reasoning of another role than assistant", role)
    return message


def parts_of(parts: list) -> tuple[str, str, list[dict]]:
    """Take text, reasoning and calls out of a content's parts."""
    said = {"text": "", "reasoning": ""}
    calls: list[dict] = []
    for part in parts:
        if not isinstance(part, dict):
            raise Refused("a part of a content is not an object", part)
        kind, value = part.get("type"), first(part, "value", "text")
        if kind == "tool_call":
            calls += calls_of(value)
        elif kind not in ("text", "reasoning"):
            raise Refused("a part that is no text", repr(kind))
        elif kind == "text" and calls and value:
            raise Refused("text behind a call", value)
        else:
            said[kind] += text(value)
    return said["text"], said["reasoning"], calls


def answer_of(message: dict, raw: dict) -> dict:
    """Take calls and reasoning that are written into an answer's text out of it, and see whether it
    is learned."""
    content = message["content"]
    begin = content.lstrip()
    if begin.startswith(THINK) and THOUGHT in begin and not message["reasoning"]:
        thought, _, content = begin.removeprefix(THINK).partition(THOUGHT)
        message["reasoning"], content = thought.strip(), content.lstrip()
    content, *calls = content.split(CALL)
    for call in calls:
        written, end, behind = call.partition(CALLED)
        if not end:
            raise Refused("unbalanced marks of a call or of reasoning", CALL + call)
        if behind.strip():
            raise Refused("text behind a call", behind)
        message["tool_calls"] += calls_of(written)
    message["content"] = content.rstrip() if calls else content
    for said, marks in ((content, (CALLED, THINK, THOUGHT)),
                        (message["reasoning"], (THINK, THOUGHT))):
        for mark in marks:
            if mark in said:
                raise Refused("unbalanced marks of a call or of reasoning",
                              said[max(0, said.index(mark) - 30):])
    weight = first(raw, "loss_weight", "weight")
    if weight not in ("", 0, 1):
        raise Refused("a weight that is not 0 or 1", weight)
    message["learn"] = raw.get("learn") is not False and weight != 0
    return message


def calls_of(raw: Any) -> list[dict]:
    """Read a call, or a list of them, that may be JSON text."""
    calls = json_of(raw, "a call is not JSON")
    return [call_of(call) for call in (calls if isinstance(calls, list) else [calls])]


def call_of(raw: Any) -> dict:
    """Read the call of a function: {name, arguments}, also inside `function`, also as JSON text."""
    call = json_of(raw, "a call is not JSON")
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Refused("a call without a name", call)
    arguments = json_of(first(call, "arguments", "parameters") or {},
                        "a call's arguments are not JSON")
    if not isinstance(arguments, dict):
        raise Refused("a call's arguments are not an object", arguments)
    return {"name": call["name"], "arguments": arguments}


def tools_of(record: dict) -> list[dict]:
    """Read a record's schemas of functions, {name, ...}, also each inside `function`, also as JSON
    text."""
    reason = "tools are not a list of schemas"
    given = as_list(record.get("tools") or record.get("functions"), reason)
    tools = [json_of(tool, reason) for tool in given]
    tools = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    for tool in tools:
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise Refused(reason, tool)
    return tools


def as_list(value: Any, reason: str) -> list:
    """Give a list that may be missing, or be JSON text."""
    found = json_of(value or [], reason) or []
    return found if isinstance(found, list) else refuse(reason, found)


def json_text(value: Any) -> str:
    """Write JSON. Refused if a value has no place in it, such as NaN, or half of a surrogate
    pair."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
    except UnicodeError:
        raise Refused("invalid utf-8") from None
    except (TypeError, ValueError, RecursionError):
        raise Refused("a value that JSON does not have") from None
    return written


# ---- rules

def merged(messages: list[dict]) -> list[dict]:
    """Join a call to the answer before it: some data sets have a message for each."""
    joined: list[dict] = []
    for message in messages:
        last = joined[-1] if joined else {}
        if (message["role"] == last.get("role") == "assistant" and message["tool_calls"]
                and not message["content"] and not message["reasoning"]
                and message["learn"] == last["learn"]):
            last["tool_calls"] += message["tool_calls"]
        else:
            joined.append(message)
    return joined


def asked(record: dict, system: str = "",
          tools: list[dict] | None = None) -> tuple[list[dict], list[dict]]:
    """Give the messages of a talk that is to be answered, and its tools; `system` and `tools` are
    for one without its own. Refused if it is none."""
    given = listed(record.get("messages") or [], "messages are not a list")
    messages = messages_of(record, given, system)
    if not messages or messages[-1]["role"] == "assistant":
        raise Refused("the last message is an answer, or there is none")
    return messages, tools_of(record) or tools or []


def check(messages: list[dict]) -> None:
    """Refuse messages that are no dialog, by the first rule that they break."""
    before = ""
    asked = called = False
    for message in messages:
        role, empty = message["role"], not message["content"].strip()
        calls = bool(message["tool_calls"])
        rules = {"system": [("system message not first", before != "")],
                 "user": [("two questions in a row", before == "user"),
                          ("empty question", empty)],
                 "tool": [("tool result without a call", not called)],
                 "assistant": [("answer before any question", not asked),
                               ("two answers in a row", before == "assistant"),
                               ("empty answer", empty and not calls)]}
        for reason, broken in rules[role]:
            if broken:
                raise Refused(reason, message["content"])
        asked = asked or role == "user"
        called = calls if role == "assistant" else called and role == "tool"
        before = role
    if before != "assistant":
        raise Refused("no answer")


# ---- what is said

def spoken(dialog: str, system: bool = True) -> str:
    """Give all that is said in a dialog, a canonical JSON text: what a tokenizer learns, and
    without the `system` message, which many dialogs share, what near duplicates have in common."""
    said, whole = [], json.loads(dialog)
    for message in (*whole["messages"], *whole.get("rejected", ())):
        if system or message["role"] != "system":
            calls = message.get("tool_calls", ())
            said += [message.get("reasoning", ""), message["content"],
                     *(json.dumps(call, ensure_ascii=False) for call in calls)]
    return "\n".join(filter(None, said))
