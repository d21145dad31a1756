"""Records -> dialogs: the forms that data sets have, and the rules that a dialog keeps.

A dialog goes through the program as one JSON text: {"messages": [...], "tools": [...]}. A message
has a role (system, user, assistant, tool) and a content; an answer may have `reasoning`,
`tool_calls` [{"name", "arguments"}] and "learn": false. What breaks a rule is dropped and counted
by the reason that Refused says.

To add a form: a function of the record that gives its messages, an entry in CONVERTERS with the
fields by which `auto` knows it, and a case in tests/test_dialogs.py.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from plainllama.settings import UserError

ROLES = {role: ours for ours, names in {
    "system": "system developer", "user": "user human prompter", "assistant":
    "assistant gpt bot model chatgpt", "tool": "tool observation function_response function "
    "tool_response tool_result ipython", "call": "function_call tool_call"}.items()
    for role in names.split()}
CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
THOUGHT = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*", re.DOTALL)
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


class Refused(ValueError):
    """Why a record is no dialog."""


@dataclass(frozen=True)
class How:
    """How the records of a source become dialogs."""

    converter: str = "auto"  # a key of CONVERTERS, or FILE.py:function
    fields: tuple[tuple[str, str], ...] = ()  # (our name, the one in the data)
    system: str = ""  # put in front where a dialog has none
    train_on: str = "assistant"  # assistant | last | all


def converted(record: dict, how: How) -> tuple[str, int]:
    """Give a record's dialog as JSON, and how many messages behind its last answer were left out.
    Refused if it is none."""
    renamed = {theirs: ours for ours, theirs in how.fields}
    record = {renamed.get(name, name): value for name, value in record.items()}
    if how.converter in CONVERTERS:
        form = CONVERTERS[how.converter]
        if missing := [name for name in form.fields if name not in record]:
            raise Refused(f"no field {missing[0]!r}, only {', '.join(record)[:200]}")
    elif how.converter == "auto":
        form = next((form for form in CONVERTERS.values() if record.keys() >= set(form.fields)),
                    None) or refuse(f"no known fields, only {', '.join(record)[:200]}")
    else:
        form = CONVERTERS["messages"]
        record = own_function(how.converter)(record)
    messages = merged([message_of(raw) for raw in form.messages(record)])
    if how.system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": how.system})
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    cut = len(messages) - answers[-1] - 1 if answers else 0
    messages = messages[:len(messages) - cut]
    check(messages)
    if how.train_on == "last":
        for i in answers[:-1]:
            messages[i]["learn"] = False
    dialog: dict[str, Any] = {"messages": messages}
    if tools := tools_of(record.get("tools")):
        dialog["tools"] = tools
    if how.train_on == "all":
        dialog["learn_all"] = True
    elif all(messages[i].get("learn") is False for i in answers):
        raise Refused("nothing of it is learned")
    text = json.dumps(dialog, ensure_ascii=False)
    if re.search("[\ud800-\udfff]", text):
        raise Refused("invalid utf-8")
    return text, cut


def refuse(reason: str):
    """Raise Refused, where an expression is wanted."""
    raise Refused(reason)


@cache
def own_function(name: str) -> Callable[[dict], dict]:
    """Load the user's own converter, FILE.py:function. UserError if it is not there."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"converter {name!r} is none of auto, {', '.join(CONVERTERS)}, and no "
                        "FILE.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"converter {name!r}: {path} has no function {function!r}")
    return found


# ---- forms

class Form(NamedTuple):
    """How data sets write a dialog."""

    fields: tuple[str, ...]  # those by which it is known
    messages: Callable[[dict], list[dict]]  # a record -> its messages, of any spelling


def messages_of(record: dict) -> list[dict]:
    """Take `messages`: a list, or lists of roles and contents side by side. Rows that say whether
    an answer is good (KTO) hold no dialog to learn."""
    if isinstance(record.get("label"), bool):
        raise Refused("rows with a label (KTO) are not dialogs to learn")
    messages = record.get("messages")
    if isinstance(messages, dict):
        roles, contents = messages.get("role"), messages.get("content")
        if not (isinstance(roles, list) and isinstance(contents, list)):
            raise Refused("messages are not a list")
        return [{"role": role, "content": content}
                for role, content in zip(roles, contents, strict=False)]
    if not isinstance(messages, list):
        raise Refused("messages are not a list")
    return messages


def conversations_of(record: dict) -> list[dict]:
    """Take `conversations`, of `from` and `value`."""
    if not isinstance(record["conversations"], list):
        raise Refused("conversations are not a list")
    if isinstance(record.get("system"), str) and record["system"]:
        return [{"role": "system", "content": record["system"]}, *record["conversations"]]
    return record["conversations"]


def instruction_of(record: dict) -> list[dict]:
    """Take `instruction`, `input` if there is any, and `output`; `history` and `system` where they
    are."""
    asked = record["instruction"]
    if record.get("input"):
        asked = f"{asked}\n\n{record['input']}"
    return framed(record, asked, record["output"])


def instances_of(record: dict) -> list[dict]:
    """Take `instruction` and the first of `instances`, {input, output}."""
    first = (record["instances"] or [{}])[0]
    return instruction_of({**record, "input": first.get("input"), "output": first.get("output")})


def prompt_of(record: dict) -> list[dict]:
    """Take `prompt`, and `response`, `completion` or `answer`."""
    answer = next((record[name] for name in ("response", "completion", "answer", "output")
                   if record.get(name)), None)
    prompt = record["prompt"]
    if isinstance(prompt, list):
        return [*prompt, *(answer if isinstance(answer, list) else
                           [{"role": "assistant", "content": answer}])]
    return framed(record, prompt, answer)


def framed(record: dict, asked, answer) -> list[dict]:
    """Put a question and its answer behind `system` and the turns of `history`."""
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    turns = [*(record.get("history") or ()), (asked, answer)]
    return system + [{"role": role, "content": content} for turn in turns
                     for role, content in zip(("user", "assistant"), turn, strict=False)]


def no_pairs(record: dict) -> list[dict]:
    """Refuse preferences: they are pairs of dialogs."""
    raise Refused("pairs of chosen and rejected are not dialogs to learn")


CONVERTERS = {
    "pairs": Form(("chosen", "rejected"), no_pairs),
    "messages": Form(("messages",), messages_of),
    "conversations": Form(("conversations",), conversations_of),
    "instances": Form(("instruction", "instances"), instances_of),
    "instruction": Form(("instruction", "output"), instruction_of),
    "prompt": Form(("prompt",), prompt_of),
}


# ---- messages

def message_of(raw: Any) -> dict:
    """Bring a message of any spelling to ours; Refused if that cannot be done."""
    if not isinstance(raw, dict):
        raise Refused("a message is not an object")
    name = raw.get("role", raw.get("from"))
    role = ROLES.get(name.lower() if isinstance(name, str) else "")
    if not role:
        raise Refused(f"unknown role {name!r:.40}")
    content = next((raw[key] for key in ("content", "value", "text") if raw.get(key) is not None),
                   "")
    reasoning = next((raw[key] for key in ("reasoning", "reasoning_content", "thinking")
                      if raw.get(key)), "")
    calls = [call_of(call) for call in as_list(raw.get("tool_calls"), "calls are not a list")]
    if isinstance(content, list):
        parts: dict[str, list] = {}
        for part in content:
            if not isinstance(part, dict):
                raise Refused("a part of a content is not an object")
            value = next((part[key] for key in ("value", "text") if part.get(key) is not None), "")
            parts.setdefault(str(part.get("type")), []).append(value)
        if unknown := parts.keys() - {"text", "reasoning", "tool_call"}:
            raise Refused(f"a part of kind {min(unknown)!r:.40}, which is no text")
        calls += [call_of(value) for value in parts.get("tool_call", ())]
        content, reasoning = "".join(parts.get("text", ())), reasoning or "".join(
            parts.get("reasoning", ()))
    if role == "call":
        role, content, calls = "assistant", "", [call_of(content)]
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise Refused("a content is not text")
    if role != "assistant":
        return {"role": role, "content": content}
    return answer_of(content, reasoning, calls, raw)


def answer_of(content: str, reasoning: str, calls: list[dict], raw: dict) -> dict:
    """Make an assistant's message; calls and reasoning written into its text are taken out."""
    if not reasoning and (thought := THOUGHT.match(content)):
        reasoning, content = thought[1], content[thought.end():]
    if "<tool_call>" in content:
        calls = [*calls, *(call_of(found[1]) for found in CALL.finditer(content))]
        content = CALL.sub("", content).rstrip()
    if any(mark in text for mark in MARKS for text in (content, reasoning)):
        raise Refused("unbalanced marks of a call or of reasoning")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if raw.get("learn") is False or 0 in (raw.get("loss_weight"), raw.get("weight")):
        message["learn"] = False
    return message


def call_of(raw: Any) -> dict:
    """Read the call of a function: {name, arguments}, also inside `function`, also as JSON text."""
    call = json_of(raw, "a call is not JSON")
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Refused("a call without a name")
    arguments = json_of(call.get("arguments", call.get("parameters")) or {},
                        "a call's arguments are not JSON")
    if not isinstance(arguments, dict):
        raise Refused("a call's arguments are not an object")
    return {"name": call["name"], "arguments": arguments}


def json_of(value: Any, reason: str) -> Any:
    """Read JSON text; what is no text is as it was."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Refused(reason) from None


def as_list(value: Any, reason: str) -> list:
    """Give a list that may be missing, or be JSON text."""
    value = json_of(value or [], reason)
    return value if isinstance(value, list) else refuse(reason)


def tools_of(raw: Any) -> list[dict]:
    """Read schemas of functions, {name, ...}, also each inside `function`, also as JSON text."""
    tools = [tool.get("function", tool) if isinstance(tool, dict) else tool
             for tool in as_list(raw, "tools are not a list of schemas")]
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools):
        raise Refused("tools are not a list of schemas")
    return tools


def merged(messages: list[dict]) -> list[dict]:
    """Join a call to the answer before it: some data sets have a message for each."""
    joined: list[dict] = []
    for message in messages:
        last = joined[-1] if joined else {}
        if (message["role"] == last.get("role") == "assistant" and message.get("tool_calls")
                and not message["content"]):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        else:
            joined.append(message)
    return joined


def check(messages: list[dict]) -> None:
    """Refuse messages that are no dialog, by the first rule that they break."""
    before = ""
    asked = called = False
    for message in messages:
        role, content = message["role"], message["content"]
        rules = {"system": [("system message not first", before != "")],
                 "user": [("two questions in a row", before == "user"),
                          ("empty question", not content.strip())],
                 "tool": [("tool result without a call", not called)],
                 "assistant": [("answer before any question", not asked),
                               ("two answers in a row", before == "assistant"),
                               ("empty answer", not (content.strip() or "tool_calls" in message))]}
        for reason, broken in rules[role]:
            if broken:
                raise Refused(reason)
        asked = asked or role == "user"
        called = "tool_calls" in message if role == "assistant" else called and role == "tool"
        before = role
    if before != "assistant":
        raise Refused("no answer")


# ---- what is said

def spoken(text: str) -> str:
    """Give all that is said in a dialog, a canonical JSON text: what near duplicates have in common
    and a tokenizer learns."""
    said = []
    for message in json.loads(text)["messages"]:
        said += [message.get("reasoning", ""), message["content"]]
        said += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, said))
