"""Records -> messages of any spelling: the forms that data sets have.

To add one: a function of the record that gives its messages, an entry in CONVERTERS with the fields
by which `auto` knows it, and a case in tests/test_dialogs.py.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from plainllama.settings import UserError, nearest

LEFT_OUT = "left out by its converter"
ANSWERS = ("response", "completion", "answer", "output")


class Refused(ValueError):
    """Why a record is no dialog: one of a few rules, and what broke it."""

    def __init__(self, rule: str, found: object = ""):
        super().__init__(rule)
        shown = " ".join(f"{found!s:.200}".split())[:60]  # on a screen and in a manifest
        self.found = "".join(char if char.isprintable() else "?" for char in shown)


def refuse(rule: str, found: object = "") -> NoReturn:
    """Raise Refused, where an expression is wanted."""
    raise Refused(rule, found)


def first(record: dict, *names: str) -> Any:
    """Give the first of some fields that is there, else ''."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    return ""


def text(value: Any) -> str:
    """Give what shall be a text. Refused if it is none."""
    return value if isinstance(value, str) else refuse("a content is not text", value)


def json_of(value: Any, reason: str) -> Any:
    """Read JSON text; what is no text is as it was."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Refused(reason, value) from None


class Form(NamedTuple):
    """How data sets write a dialog."""

    fields: tuple[str, ...]  # those by which it is known; "a|b": either
    messages: Callable[[dict], list]  # a record -> its messages, of any spelling

    def lacks(self, record: dict) -> str:
        """Name the first field that a record lacks, '' if it has this form."""
        for field in self.fields:
            if all(record.get(name) is None for name in field.split("|")):
                return field
        return ""


def misspelt(names: Iterable, known: tuple[str, ...]) -> str:
    """Name the first of some names that is nearly a known one, and that one; '' if none is."""
    hints = ((name, nearest(str(name), known, 0.8)) for name in names if name not in known)
    return next((f"{name}{hint}" for name, hint in hints if hint), "")


def form_of(record: dict, converter: str, lost: str = "") -> tuple[Form, dict]:
    """Choose the form of a record, which the user's own function may have made. Refused, for what
    is `lost` or misspelt, if it has none."""
    if converter in CONVERTERS:
        form = CONVERTERS[converter]
        if lacking := form.lacks(record):
            raise Refused(f"no field {lacking.replace('|', ' or ')}", ", ".join(record))
        return form, record
    if converter != "auto":
        function = own_function(converter)
        try:
            record = function(record)
        except Exception as error:
            raise Refused(f"its converter raises {type(error).__name__}", error) from None
        if record is None:
            raise Refused(LEFT_OUT)
        if isinstance(record, list):
            record = {"messages": record}
        if not isinstance(record, dict):
            raise Refused("its converter gives no object", record)
    for form in CONVERTERS.values():
        if not form.lacks(record):
            return form, record
    found = lost or misspelt(record, FIELDS) or ", ".join(map(str, record))
    raise Refused("no known fields", found)


@cache
def own_function(name: str) -> Callable[[dict], Any]:
    """Load the user's own converter, FILE.py:function. UserError if that cannot be done."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        known = ("auto", *CONVERTERS)
        raise UserError(f"converter {name!r} is none of {', '.join(known)}, and no FILE.py:function"
                        f"{nearest(name, known)}")
    if not Path(path).is_file():
        raise UserError(f"converter {name}: {path} is not there")
    spec = importlib.util.spec_from_file_location(f"converter in {path}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(f"converter {path}: {type(error).__name__}: {said}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"converter {name}: {path} has no function {function!r}")
    return found


def listed(value: Any, reason: str) -> list:
    """Give messages as a list: they may be JSON text, or lists of roles and contents side by
    side."""
    value = json_of(value, reason)
    if isinstance(value, dict):
        sizes = {len(column) if isinstance(column, list) else -1 for column in value.values()}
        if len(sizes) != 1 or -1 in sizes:
            raise Refused(reason, value)
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else refuse(reason, value)


def instruction_of(record: dict) -> list:
    """Take an instruction, what it is about, its answer, and the turns before it."""
    about = record.get("input") or record.get("context")
    asked = [text(part) for part in (record["instruction"], about) if part]
    answer = first(record, "output", "response")
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
            isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise Refused("history is not a list of pairs", history)
    return [{"role": role, "content": content} for turn in [*history, ("\n\n".join(asked), answer)]
            for role, content in zip(("user", "assistant"), turn, strict=True)]


def instances_of(record: dict) -> list:
    """Take an instruction and the first of its `instances`, {input, output}."""
    given = record["instances"]
    if not (isinstance(given, list) and given and isinstance(given[0], dict)):
        raise Refused("instances are not a list of objects", given)
    return instruction_of({"instruction": record["instruction"], "input": given[0].get("input"),
                           "output": given[0].get("output")})


def prompt_of(record: dict) -> list:
    """Take a prompt and its answer: either may be messages."""
    sides = zip(("user", "assistant"), (record["prompt"], first(record, *ANSWERS)), strict=True)
    return [message for role, side in sides
            for message in (side if isinstance(side, list) else [{"role": role, "content": side}])]


CONVERTERS = {  # `auto` takes the first that fits
    "pairs": Form(("chosen", "rejected"), lambda record: refuse(
        "pairs of chosen and rejected are for documents=preference")),
    "messages": Form(("messages",), lambda record: listed(
        record["messages"], "messages are not a list")),
    "conversations": Form(("conversations",), lambda record: listed(
        record["conversations"], "conversations are not a list")),
    "columns": Form(("role", "content"), lambda record: listed(
        {name: record[name] for name in ("role", "content")},
        "role and content are not lists of one length")),
    "instances": Form(("instruction", "instances"), instances_of),
    "instruction": Form(("instruction", "output|response"), instruction_of),
    "prompt": Form(("prompt", "|".join(ANSWERS)), prompt_of),
}
FIELDS = tuple(dict.fromkeys([  # those by which forms are known, and what else a record may have
    *(name for form in CONVERTERS.values() for name in "|".join(form.fields).split("|")),
    "input", "context", "history", "system", "tools", "functions", "label"]))
