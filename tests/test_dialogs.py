"""Records -> dialogs: what comes out is written here by hand, or checked by other code."""

import contextlib
import json
import random
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from test_chat import made

from plainllama.evaluation import dialogs as scoring
from plainllama.evaluation.likelihood import Scorer
from plainllama.parallel import World
from plainllama.settings import UserError
from plainllama.text import embedded_chat
from plainllama.text.dialogs import How, asked, converted, spoken
from plainllama.text.forms import CONVERTERS, Refused, listed
from plainllama.tokens.chat import parsed, written

U, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
S = {"role": "system", "content": "Be brief."}
TOOL = {"name": "add", "description": "Adds «two».", "parameters": {"type": "object"}}
CALL = {"name": "add", "arguments": {"a": 2, "b": [2, {"c": "ü"}]}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"sum": 4}'}
OPENAI = {"id": "call_0", "type": "function", "function": {
    "name": "add", "arguments": json.dumps(CALL["arguments"])}}


def read(record, **how):
    """The dialog of a record."""
    return json.loads(converted(record, How(**how))[0])


def said(*turns, **keys):
    """A dialog of questions and answers."""
    return {"messages": [{"role": "assistant" if i % 2 else "user", "content": turn}
                         for i, turn in enumerate(turns)]} | keys


def refused(record, **how):
    """The reason for which a record is dropped, with what was found."""
    with pytest.raises(Refused) as error:
        converted(record, How(**how))
    return f"{error.value} ({error.value.found})"


FORMS = [
    # a record, the converter's name, its dialog
    ({"messages": [U, A], "id": 7}, "messages", said("2+2?", "4")),
    ({"messages": {"role": ["user", "assistant"], "content": ["2+2?", "4"]}}, "messages",
     said("2+2?", "4")),
    ({"messages": json.dumps([S, U, A])}, "messages", {"messages": [S, U, A]}),
    ({"messages": [U, A], "system": "Be brief."}, "messages", {"messages": [S, U, A]}),
    ({"messages": [U, A], "prompt": "2+2?", "prompt_id": "x"}, "messages", said("2+2?", "4")),
    ({"messages": None, "prompt": "2+2?", "response": "4"}, "prompt", said("2+2?", "4")),
    ({"role": ["user", "assistant"], "content": ["2+2?", "4"]}, "columns", said("2+2?", "4")),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
     "conversations", said("2+2?", "4")),
    ({"conversations": {"from": ["human", "gpt"], "value": ["2+2?", "4"]}, "system": ""},
     "conversations", said("2+2?", "4")),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
      "system": "Be brief."}, "conversations", {"messages": [S, U, A]}),
    ({"conversations": [{"from": "human", "value": "2+2?"},
                        {"from": "function_call", "value": json.dumps(CALL)},
                        {"from": "observation", "value": '{"sum": 4}'},
                        {"from": "gpt", "value": "4"}], "tools": json.dumps([TOOL])},
     "conversations", {"messages": [U, CALLED, RESULT, A], "tools": [TOOL]}),
    ({"instruction": "2+2?", "input": "", "output": "4"}, "instruction", said("2+2?", "4")),
    ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, "instruction",
     said("Add.\n\n2 and 2", "4")),
    ({"instruction": "", "input": "2+2?", "output": "4"}, "instruction", said("2+2?", "4")),
    ({"instruction": "Add.", "context": "2 and 2", "response": "4", "category": "x"},
     "instruction", said("Add.\n\n2 and 2", "4")),
    ({"instruction": "2+2?", "input": None, "output": "4", "history": [["hi", "hello"]],
      "system": "Be brief."}, "instruction",
     {"messages": [S, *said("hi", "hello", "2+2?", "4")["messages"]]}),
    ({"instruction": "Add.", "instances": [{"input": "2, 2", "output": "4"}]}, "instances",
     said("Add.\n\n2, 2", "4")),
    ({"prompt": "2+2?", "completion": "4"}, "prompt", said("2+2?", "4")),
    ({"prompt": "2+2?", "answer": "4"}, "prompt", said("2+2?", "4")),
    ({"prompt": [S, U], "completion": [A]}, "prompt", {"messages": [S, U, A]}),
    ({"prompt": [S, U], "response": "4"}, "prompt", {"messages": [S, U, A]}),
]

MESSAGES = [  # a message of any spelling, as ours
    ({"role": "Human", "content": "q"}, {"role": "user", "content": "q"}),
    ({"role": None, "from": "prompter", "value": "q"}, {"role": "user", "content": "q"}),
    ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]},
     {"role": "user", "content": "ab"}),
    ({"role": "user", "content": "{{name}} <think>?"}, {"role": "user",
                                                        "content": "{{name}} <think>?"}),
    ({"role": "model", "content": " a\n", "tool_calls": [], "reasoning_content": None},
     {"role": "assistant", "content": " a\n"}),
    ({"role": "assistant", "content": "a", "reasoning_content": "r <tool_call>"},
     {"role": "assistant", "content": "a", "reasoning": "r <tool_call>"}),
    ({"role": "assistant", "content": "<think>\nr\n</think>\n\na"},
     {"role": "assistant", "content": "a", "reasoning": "r"}),
    ({"role": "assistant", "content": "\n<think>r </think> a \n"},
     {"role": "assistant", "content": "a \n", "reasoning": "r"}),
    ({"role": "assistant", "content": "<think>\n\n</think>\n\na"},
     {"role": "assistant", "content": "a"}),
    ({"role": "assistant", "content": [{"type": "reasoning", "value": "r"},
                                       {"type": "text", "value": "a"},
                                       {"type": "tool_call", "value": json.dumps(CALL)}]},
     {"role": "assistant", "content": "a", "reasoning": "r", "tool_calls": [CALL]}),
    ({"role": "assistant", "content": None, "tool_calls": [OPENAI, OPENAI]},
     {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}),
    ({"role": "assistant", "content": None, "tool_calls": json.dumps([OPENAI])}, CALLED),
    ({"role": "assistant", "content": None, "function_call": OPENAI["function"]}, CALLED),
    ({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
     {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}),
    ({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": ""}]},
     {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}),
    ({"role": "assistant", "content": f"Wait.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>\n"
      f"<tool_call>{json.dumps(CALL)}</tool_call>"},
     {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]}),
    ({"from": "function_call", "value": json.dumps([CALL, CALL])},
     {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}),
    ({"role": "assistant", "content": "a", "loss_weight": 1.0, "learn": True},
     {"role": "assistant", "content": "a"}),
    ({"role": "developer", "content": "s"}, {"role": "system", "content": "s"}),
]


@pytest.mark.parametrize("record, name, dialog", FORMS)
def test_every_form_is_found_by_its_fields_and_read_by_its_name(record, name, dialog):
    before = json.dumps(record)
    assert read(record) == read(record, converter=name) == dialog
    assert json.dumps(record) == before
    for other in {"instruction", "conversations", "messages"} - {name}:
        if not {other, "instances"} & record.keys():
            assert refused(record, converter=other).startswith(f"no field {other} (")


@pytest.mark.parametrize("raw, ours", MESSAGES)
def test_every_spelling_of_a_message(raw, ours):
    around = {"user": [A], "system": [U, A], "assistant": []}
    before = [] if ours["role"] != "assistant" else [U]
    got = read({"messages": [*before, raw, *around[ours["role"]]]})["messages"]
    assert got[len(before)] == ours
    assert list(got[len(before)]) == list(ours)  # in this order


def test_a_canonical_dialog_stays_as_it_is():
    dialog = {"messages": [
        S, U, {"role": "assistant", "content": "Well.", "reasoning": "r", "tool_calls": [CALL],
               "learn": False}, RESULT, RESULT, A, U, CALLED, RESULT, A], "tools": [TOOL]}
    text, cut = converted(dialog, How())
    assert text == json.dumps(dialog, ensure_ascii=False) and not cut
    assert converted(json.loads(text), How()) == (text, 0)


def test_tools_of_any_spelling():
    for tools in ([TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL]),
                  [json.dumps(TOOL)]):
        assert read({"messages": [U, A], "tools": tools})["tools"] == [TOOL]
        assert read({"messages": [U, A], "functions": tools})["tools"] == [TOOL]
    for tools in (None, "", "[]", [], "null"):
        assert "tools" not in read({"messages": [U, A], "tools": tools})
    for tools in ("{", "[{]", "x", 7, json.dumps(TOOL), [{"description": "no name"}], [3], ["{"],
                  [{"name": 3}]):
        assert refused({"messages": [U, A], "tools": tools}).startswith(
            "tools are not a list of schemas")


def test_system_messages():
    assert read({"messages": [U, A]}, system="Be brief.")["messages"] == [S, U, A]
    for blank in ({"role": "system", "content": " \n"}, {"role": "system", "content": None}):
        assert read({"messages": [blank, U, A]}, system="Be brief.")["messages"] == [S, U, A]
        assert read({"messages": [blank, U, A]})["messages"] == [U, A]
    other = {"role": "system", "content": "Be long."}
    assert read({"messages": [other, U, A]}, system="Be brief.")["messages"] == [other, U, A]


def test_what_stands_behind_the_last_answer_is_left_out_and_counted():
    text, cut = converted({"messages": [U, A, U, CALLED, RESULT, RESULT]}, How())
    assert json.loads(text)["messages"] == [U, A, U, CALLED] and cut == 2
    text, cut = converted({"messages": [U, A, U]}, How())
    assert json.loads(text)["messages"] == [U, A] and cut == 1


def test_a_call_joins_the_answer_before_it_unless_something_would_be_lost():
    call = {"from": "function_call", "value": json.dumps(CALL)}
    joined = {"role": "assistant", "content": "4", "tool_calls": [CALL, CALL]}
    assert read({"messages": [U, A, call, call, RESULT, A]})["messages"] == [U, joined, RESULT, A]
    for last in (CALLED | {"reasoning": "r"}, CALLED | {"learn": False}):
        assert refused({"messages": [U, A, last, RESULT, A]}).startswith("two answers in a row")


def test_what_is_learned():
    twice = {"messages": [U, A, U, A]}
    assert read(twice) == twice
    assert read(twice, train_on="all") == twice | {"learn_all": True}
    not_learned = A | {"learn": False}
    assert read(twice, train_on="last")["messages"] == [U, not_learned, U, A]
    for off in ({"learn": False}, {"loss_weight": 0.0}, {"weight": 0}):
        assert read({"messages": [U, A | off, U, A]})["messages"] == [U, not_learned, U, A]
        assert refused({"messages": [U, A | off]}).startswith("nothing of it is learned")
        assert refused({"messages": [U, A, U, A | off]}, train_on="last").startswith("nothing of")
    assert refused({"messages": [U, A | {"weight": 0.5}]}) == "a weight that is not 0 or 1 (0.5)"


REASONS = [
    ([{"role": "narrator", "content": "q"}, A], "unknown role ('narrator')"),
    ([{"content": "q"}, A], "unknown role ('')"),
    ([U, S, A], "system message not first (Be brief.)"),
    ([S, S, U, A], "system message not first (Be brief.)"),
    ([U, U, A], "two questions in a row (2+2?)"),
    ([U, A, A], "two answers in a row (4)"),
    ([A, U, A], "answer before any question (4)"),
    ([S, A], "answer before any question (4)"),
    ([U, RESULT, A], 'tool result without a call ({"sum": 4})'),
    ([U, A, RESULT, A], 'tool result without a call ({"sum": 4})'),
    ([U, CALLED, RESULT, U, RESULT, A], 'tool result without a call ({"sum": 4})'),
    ([U, {"role": "assistant", "content": " \n"}], "empty answer ()"),
    ([U, {"role": "assistant", "reasoning": "r"}], "empty answer ()"),
    ([{"role": "user", "content": " "}, A], "empty question ()"),
    ([], "no answer ()"),
    ([S, U], "no answer ()"),
    ([U, {"role": "assistant", "content": "<tool_call>{"}],
     "unbalanced marks of a call or of reasoning (<tool_call>{)"),
    ([U, {"role": "assistant", "content": "a</think>b"}],
     "unbalanced marks of a call or of reasoning (a</think>b)"),
    ([U, {"role": "assistant", "content": "a", "reasoning": "</think>"}],
     "unbalanced marks of a call or of reasoning (</think>)"),
    ([U, {"role": "assistant", "content": "<tool_call>{}</tool_call>b"}],
     "text behind a call (b)"),
    ([U, {"role": "assistant", "content": [{"type": "tool_call", "value": CALL},
                                           {"type": "text", "text": "b"}]}],
     "text behind a call (b)"),
    ([U, {"role": "assistant", "content": "<tool_call>{\"name\": </tool_call>"}],
     'a call is not JSON ({"name":)'),
    ([U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}],
     "a call's arguments are not JSON ({x)"),
    ([U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
     "a call's arguments are not an object ([1])"),
    ([U, {"role": "assistant", "tool_calls": [{"arguments": {}}]}],
     "a call without a name ({'arguments': {}})"),
    ([U, {"role": "assistant", "tool_calls": [["f"]]}], "a call without a name (['f'])"),
    ([U, {"role": "assistant", "tool_calls": "f()"}], "calls are not a list (f())"),
    ([U, {"role": "assistant", "tool_calls": {"name": "f"}}],
     "calls are not a list ({'name': 'f'})"),
    ([{"role": "user", "content": "q", "tool_calls": [CALL]}, A],
     "a call or reasoning of another role than assistant (user)"),
    ([{"role": "user", "content": 3}, A], "a content is not text (3)"),
    ([{"role": "user", "content": {"a": 1}}, A], "a content is not text ({'a': 1})"),
    ([{"role": "user", "content": ["q"]}, A], "a part of a content is not an object (q)"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A],
     "a part that is no text ('image_url')"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}, A], "a content is not text (3)"),
    ([[U], [A]], "a message is not an object ([{'role': 'user', 'content': '2+2?'}])"),
    (["q", "a"], "a message is not an object (q)"),
    ([U, A | {"content": "\ud800"}], "invalid utf-8 ()"),
    ([U, {"role": "user", "content": "\ud800\n\x1b[2Jx"}], "two questions in a row (? ?[2Jx)"),
    ([U, CALLED | {"tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}],
     "a value that JSON does not have ()"),
    ([U, CALLED | {"tool_calls": [{"name": "f", "arguments": '{"x": 1e999}'}]}],
     "a value that JSON does not have ()"),
]


@pytest.mark.parametrize("messages, reason", REASONS, ids=range(len(REASONS)))
def test_each_rule_is_a_reason(messages, reason):
    assert refused({"messages": messages}) == reason


@pytest.mark.parametrize("record, reason", [
    ({"text": "x", "id": 1}, "no known fields (text, id)"),
    ({}, "no known fields ()"),
    ({"prompt": "q"}, "no known fields (prompt)"),
    ({"id": 1, "mesages": []}, "no known fields (mesages; did you mean messages?)"),
    ({"messages": [U | {"content": None, "contents": "x"}]},
     "a message without content (contents; did you mean content?)"),
    ({"messages": 3}, "messages are not a list (3)"),
    ({"messages": "[{"}, "messages are not a list ([{)"),
    ({"messages": {"role": ["user"], "content": []}}, "messages are not a list ("),
    ({"messages": {}}, "messages are not a list ({})"),
    ({"conversations": "x"}, "conversations are not a list (x)"),
    ({"role": "user", "content": "x"}, "role and content are not lists of one length ("),
    ({"instruction": None, "output": "4"}, "no known fields"),
    ({"instruction": 3, "input": "x", "output": "4"}, "a content is not text (3)"),
    ({"instruction": "x", "input": ["y"], "output": "4"}, "a content is not text (['y'])"),
    ({"instruction": "x", "output": 4}, "a content is not text (4)"),
    ({"instruction": "x", "output": ""}, "empty answer ()"),
    ({"prompt": "x", "response": ""}, "empty answer ()"),
    ({"instruction": "x", "output": "4", "history": ["hi", "ho"]}, "history is not a list of"),
    ({"instruction": "x", "output": "4", "history": "hi"}, "history is not a list of pairs (hi)"),
    ({"instruction": "x", "instances": []}, "instances are not a list of objects ([])"),
    ({"instruction": "x", "instances": ["y"]}, "instances are not a list of objects (['y'])"),
    ({"instruction": "x", "instances": [{"input": "y"}]}, "empty answer"),
    ({"prompt": [U], "response": [3]}, "a message is not an object (3)"),
    ({"messages": [S, U, A], "system": "Be long."}, "system message not first (Be brief.)"),
    ({"messages": [U, A], "system": ["x"]}, "a part of a content is not an object (x)"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs of chosen and rejected"),
    ({"chosen": [U, A], "rejected": [U, A]}, "pairs of chosen and rejected"),
    ({"conversations": [], "chosen": {}, "rejected": {}}, "pairs of chosen and rejected"),
    ({"messages": [U, A], "label": True}, "rows with a label true or false (KTO)"),
    ({"prompt": "q", "completion": "a", "label": False}, "rows with a label true or false (KTO)"),
])
def test_records_that_are_no_dialogs(record, reason):
    assert refused(record).startswith(reason)


def test_fields_are_renamed():
    how = {"fields": (("prompt", "question"), ("response", "solution"))}
    assert read({"question": "2+2?", "solution": "4"}, **how) == said("2+2?", "4")
    for record in ({"prompt": "no", "question": "2+2?", "solution": "4"},
                   {"question": "2+2?", "solution": "4", "prompt": "no"}):
        assert read(record, **how) == said("2+2?", "4")
    assert refused({"question": "2+2?"}, **how) == "no known fields (no solution)"
    assert refused({"questions": "2+2?", "solution": "4"}, **how) == (
        "no known fields (no question; did you mean questions?)")


OWN = """
def turns(record):
    if record["q"] is None:
        return None
    return {"prompt": record["q"], "response": record["a"][0]}


def dialog(record):
    return {"messages": [{"role": "user", "content": record["q"]},
                         {"role": "assistant", "content": record["a"]}]}


def wrong(record):
    return "x"


def listed(record):
    return dialog(record)["messages"] if "q" in record else [3]


value = 3
"""


def test_a_converter_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    for name, record in (("turns", {"q": "2+2?", "a": "4"}), ("dialog", {"q": "2+2?", "a": "4"})):
        assert read(record, converter=f"own.py:{name}") == said("2+2?", "4")
        assert read(record, converter=f"{tmp_path}/own.py:{name}") == said("2+2?", "4")
    assert read({"q": "2+2?", "a": "4"}, converter="own.py:listed") == said("2+2?", "4")
    assert refused({}, converter="own.py:listed") == "a message is not an object (3)"
    assert refused({"q": None}, converter="own.py:turns").startswith("left out by its converter")
    assert refused({}, converter="own.py:turns") == "its converter raises KeyError ('q')"
    assert refused({"q": "x", "a": ""}, converter="own.py:turns").startswith(
        "its converter raises IndexError")
    assert refused({}, converter="own.py:wrong") == "its converter gives no object (x)"
    assert refused({"q": "", "a": "4"}, converter="own.py:dialog").startswith("empty question")
    assert read({"query": "2+2?", "a": "4"}, converter="own.py:dialog",
                fields=(("q", "query"),)) == said("2+2?", "4")
    (tmp_path / "broken.py").write_text("def turns(:")
    (tmp_path / "raises.py").write_text("1 / 0")
    for name, says in (("own.py:none", "own.py has no function 'none'"),
                       ("own.py:value", "own.py has no function 'value'"),
                       ("away.py:f", "away.py is not there"),
                       ("broken.py:turns", "broken.py: SyntaxError: "),
                       ("raises.py:f", "raises.py: ZeroDivisionError: "),
                       ("own.py", "no FILE.py:function"),
                       ("mesages", "did you mean messages?")):
        with pytest.raises(UserError) as error:
            read({}, converter=name)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_rows_stay_as_they_are_but_for_the_names_of_their_fields():
    row = {"q": "é", "a": [1], "left": None}
    how = How("rows", (("prompt", "q"), ("answer", "a")))
    made, cut = converted(row, how)
    assert json.loads(made) == {"prompt": "é", "answer": [1], "left": None} and cut == 0
    with pytest.raises(Refused, match="a field that is named") as error:
        converted(row, How("rows", (("prompt", "gone"),)))
    assert "gone" in error.value.found


def test_what_was_found_is_shown_in_one_short_line():
    for found, shown in ((" a  b\nc ", "a b c"), ("x" * 60, "x" * 60), ("x" * 61, "x" * 60),
                         ("x" + " " * 198 + "yz", "x y"), ("a\0b", "a?b"), (5, "5")):
        error = Refused("rule", found)
        assert (str(error), error.found) == ("rule", shown)
    text = "y" * 100 + "<think>" + "z" * 100
    with pytest.raises(Refused) as error:
        read({"messages": [U, {"role": "assistant", "content": text}]})
    assert error.value.found == ("y" * 30 + "<think>" + "z" * 23)
    with pytest.raises(Refused) as error:
        read({"messages": [U, {"role": "assistant", "content": "yy</tool_call>"}]})
    assert error.value.found == "yy</tool_call>"


def test_columns_of_unlike_lengths_are_no_messages():
    for bad in ({"role": ["user"], "content": []}, {"role": ["user"], "content": "x"}, {}, "{}",
                {"role": "user"}, 3, '"x"', "["):
        with pytest.raises(Refused, match="bad"):
            listed(bad, "bad")
    assert listed({"role": ["user", "x"], "content": ["a", "b"]}, "bad") == [
        {"role": "user", "content": "a"}, {"role": "x", "content": "b"}]
    assert listed("[1]", "bad") == [1] == listed([1], "bad")


# ---- what nobody has thought of

def holds(dialog):
    """Whether a dialog keeps the rules: a grammar, checked letter by letter."""
    letters = ""
    for message in dialog["messages"]:
        keys = list(message)
        assert keys == [key for key in ("role", "content", "reasoning", "tool_calls", "learn")
                        if key in keys]
        assert isinstance(message["content"], str)
        if message["role"] == "assistant":
            assert not any(mark in message["content"] for mark in ("<think>", "</tool_call>"))
            calls = message.get("tool_calls", [])
            assert all(list(call) == ["name", "arguments"] and type(call["name"]) is str
                       and type(call["arguments"]) is dict for call in calls)
            assert message["content"].strip() or calls
        else:
            assert keys == ["role", "content"]
        letters += "c" if "tool_calls" in message else message["role"][0]
    return letters


def test_no_record_crashes_and_all_that_is_read_keeps_the_rules():
    rng = random.Random(5)
    roles = ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "x", None, 3]
    texts = ["", " ", "q", "<tool_call>", "</tool_call>", "<think>", "</think>\n", json.dumps(CALL),
             "{", "null", "[]", "\ud800", "<|end|>", None, 3, {}, [], [U], True]
    names = ["messages", "conversations", "instruction", "input", "output", "prompt", "response",
             "completion", "system", "history", "tools", "instances", "role", "content", "label",
             "chosen"]

    def value(depth):
        kind = rng.random()
        if depth and kind < 0.35:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        if depth and kind < 0.5:
            return {rng.choice([*names, "type", "text"]): value(depth - 1)
                    for _ in range(rng.randrange(3))}
        return "".join(rng.choices([text for text in texts if isinstance(text, str)], k=3)) \
            if kind < 0.6 else rng.choice(texts)

    def message(i):
        fair = rng.random() < 0.7
        made = {"role": roles[i % 2] if fair else rng.choice(roles),
                rng.choice(["content", "value"]): "q" if fair else value(2)}
        for key in ("tool_calls", "reasoning", "learn", "loss_weight", "function_call"):
            if rng.random() < 0.06:
                made[key] = value(2)
        return made

    kept = 0
    for _ in range(4000):
        record = {rng.choice(names): value(3) for _ in range(rng.randrange(5))}
        if rng.random() < 0.7:
            record = {rng.choice(["messages", "conversations"]): [
                message(i) for i in range(rng.randrange(6))]}
            if rng.random() < 0.1:
                record["tools"] = value(2)
        how = How(train_on=rng.choice(["assistant", "last", "all"]), system=rng.choice(["", "s"]))
        try:
            text, _ = converted(record, how)
        except Refused as error:
            assert len(str(error)) < 70 and error.found.isprintable()
            continue
        kept += 1
        text.encode()
        dialog = json.loads(text)
        letters = holds(dialog)
        assert re.fullmatch(r"s?u[utac]*[ac]", letters)
        assert not re.search(r"uu|[ac][ac]|[usa]t", letters), letters
        assert how.train_on == "all" or converted(dialog, How())[0] == text
        spoken(text).encode()
    assert kept > 300


def test_what_is_let_through_comes_back_from_its_written_form():
    rng = random.Random(1)
    bits = ["\n", " ", "a", "}", "<|end|>", '{"name": "f", "arguments": {}}',
            *(before + mark + behind for mark in ("<think>", "</think>", "<tool_call>",
                                                  "</tool_call>")
              for before, behind in (("", ""), ("", "\n"), ("\n", ""), ("\n", "\n\n")))]

    def draw(most):
        return "".join(rng.choices(bits, k=rng.randint(1, most)))

    kept = 0
    for _ in range(6000):
        message = {"role": "assistant", "content": draw(4)[rng.randrange(2):]}
        if rng.random() < 0.4:
            message["reasoning"] = draw(3)
        if rng.random() < 0.4:
            message["tool_calls"] = [{"name": draw(1), "arguments": {draw(2): draw(2)}}
                                     for _ in range(rng.randint(1, 2))]
        with contextlib.suppress(Refused):
            answer = read({"messages": [U, message]})["messages"][1]
            assert parsed(written(answer)) == answer
            kept += 1
    assert kept > 500


def test_long_contents_take_time_in_proportion():
    mega = 1 << 20
    for text in (" " * mega, "<tool_call>" + " " * mega, "<think>" + " " * mega + "<think>",
                 " " * mega + "<tool_call>", "<think></think>" * (mega // 16),
                 "<tool_call>{}</tool_call>" * (mega // 25), "[" * mega, "\n" * mega + "</think>"):
        begun = time.perf_counter()
        for raw in ({"role": "assistant", "content": text}, {"from": "tool_call", "value": text},
                    {"role": "assistant", "tool_calls": text}):
            with contextlib.suppress(Refused):
                converted({"messages": [U, raw]}, How())
        assert time.perf_counter() - begun < 2


def test_a_talk_that_is_to_be_answered():
    messages, tools = asked({"messages": [S, U, CALLED, RESULT], "tools": json.dumps([TOOL])})
    assert [message["content"] for message in messages] == ["Be brief.", "2+2?", "", '{"sum": 4}']
    assert messages[2]["tool_calls"] == [CALL] and tools == [TOOL]
    for record in ({}, {"messages": []}, {"messages": [U, A]}, {"messages": 3}, {"messages": "x"},
                   {"messages": ["x"]}, {"messages": [U], "tools": "{"}):
        with pytest.raises(Refused):
            asked(record)


def test_what_is_said():
    text = json.dumps({"messages": [S, U, CALLED | {"reasoning": "r"}, RESULT, A]})
    call = '{"name": "add", "arguments": {"a": 2, "b": [2, {"c": "ü"}]}}'
    assert spoken(text).split("\n") == ["Be brief.", "2+2?", "r", call, '{"sum": 4}', "4"]
    assert spoken(text, system=False).split("\n")[0] == "2+2?"


def test_the_room_loads_nothing_slow():
    code = "import sys, plainllama.text.dialogs; print([*sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "tokenizers", "pyarrow"} & set(eval(out.stdout))
    assert CONVERTERS.keys() >= {"messages", "conversations", "instruction", "prompt",
                                         "pairs"}


# ---- dialogs as a task of eval.py; test_talk.py has more

class Script:
    """A scorer whose model answers by what the last question is."""

    def __init__(self, monkeypatch, answers: dict[str, tuple[str, str]], batch_tokens: int = 400):
        tokenizer = made("bytes")
        self.batches: list[tuple] = []

        def generate(model, prompts, most, sampling, seeds, stop_ids, vocab_size):
            texts = [tokenizer.decode(prompt) for prompt in prompts]
            self.batches.append(([len(prompt) for prompt in prompts], most, sampling.temperature,
                                 seeds, stop_ids == tokenizer.stop_ids, vocab_size))
            found = [answers[text[text.rindex("?") - 1]] for text in texts]
            return [(tokenizer.encode(text), ended) for text, ended in found]

        monkeypatch.setattr(scoring.generate, "generate", generate)
        model = SimpleNamespace(config=SimpleNamespace(block_size=100))
        self.scorer = Scorer(model, tokenizer, batch_tokens, World())
        self.chat = scoring.chat_of(tokenizer)


def test_what_is_asked_of_dialogs_and_how_long_an_answer_may_be(monkeypatch):
    script = Script(monkeypatch, {})
    talk = said("a?", "one", "b?", "two")["messages"]
    turns, cut = scoring.turns_of(script.chat, [{"messages": talk}], 100)
    [first, second] = turns
    assert first.prompt == script.chat.prompt(talk[:1]) and second.prompt == script.chat.prompt(
        talk[:3])
    assert [(turn.dialog, turn.size, turn.wanted) for turn in turns] == [
        (0, 3 + 1, talk[1]), (0, 3 + 1, talk[3])] and cut == []  # the end token is one more
    learned = {"messages": [*talk[:1], talk[1] | {"learn": False}, *talk[2:3],
                            talk[3] | {"learn": True}]}
    [only] = scoring.turns_of(script.chat, [learned], 100)[0]
    assert only.prompt == second.prompt and only.wanted == talk[3]  # without the mark
    room = len(second.prompt) + second.size
    for size, count, cuts in ((room, 2, []), (room - 1, 1, [0]),
                              (len(first.prompt) + first.size, 1, [0])):
        turns, cut = scoring.turns_of(script.chat, [{"messages": talk}], size)
        assert (len(turns), cut) == (count, cuts)
    with pytest.raises(UserError, match=r"^no answer has room in a context of 9 tokens$"):
        scoring.turns_of(script.chat, [{"messages": talk}], 9)
    tools = scoring.turns_of(script.chat, [{"messages": talk, "tools": [TOOL]}], 999)[0]
    assert tools[0].prompt == script.chat.prompt(talk[:1], [TOOL]) != first.prompt


def test_shares_of_right_dialogs_answers_and_calls(monkeypatch):
    """Two of four dialogs are right; one ends by no end token, one is no call."""
    script = Script(monkeypatch, {"a": ("one", "eos"), "b": ("two", "length"), "c": ("no", "eos"),
                                  "d": (written(CALLED), "eos"), "e": ("<tool_call>\n{", "eos")},
                    batch_tokens=250)
    call = [{"role": "user", "content": "d?"}, CALLED]
    bad = [{"role": "user", "content": "e?"}, CALLED]
    talks = [said("a?", "one", "c?", "no"), said("a?", "one", "b?", "two"), {"messages": call},
             {"messages": bad}]
    found = scoring.score_dialogs("t", talks, script.scorer)["t"]
    right = np.array([1, 1, 1, 0, 1, 0])
    assert found == {
        "acc": 0.5, "acc_stderr": pytest.approx(0.5 / 3**0.5), "answers": pytest.approx(4 / 6),
        "answers_stderr": pytest.approx(right.std() / 5**0.5), "ended": pytest.approx(5 / 6),
        "ended_stderr": pytest.approx(np.sqrt(5 / 36 / 5)), "calls": 0.5,
        "calls_stderr": pytest.approx(0.5), "n": 4, "cut": 0}
    samples = script.scorer.samples["t"]
    assert [(one["doc_id"], one["dialog"], one["acc"]) for one in samples] == [
        (0, 0, 1.0), (1, 0, 1.0), (2, 1, 1.0), (3, 1, 0.0), (4, 2, 1.0), (5, 3, 0.0)]
    assert samples[4]["target"] == CALLED and samples[4]["resps"] == [[CALLED]]
    assert samples[5]["resps"] == [["a call does not end with </tool_call>"]]
    assert samples[0]["resps"] == [[{"role": "assistant", "content": "one"}]]
    # the shortest prompts first, two at a time, each with room for the longest of its batch
    lengths = [length for lengths, *_ in script.batches for length in lengths]
    assert lengths == sorted(lengths) and [len(one[0]) for one in script.batches] == [2, 2, 2]
    called = len(script.chat.tokenizer.encode(written(CALLED))) + 1
    assert sorted(most for _, most, *_ in script.batches) == [4 + 16, 4 + 16, called + 16]
    assert {tuple(one[2:3]) + tuple(one[3]) + one[4:] for one in script.batches} == {
        (0, 0, 0, True, script.chat.tokenizer.vocab_size)}
    assert "calls" not in scoring.score_dialogs("t", talks[:2], script.scorer)["t"]
    script.batches.clear()
    script.scorer.batch_tokens = 99  # less than a context: one at a time
    scoring.score_dialogs("t", talks[:1], script.scorer)
    assert [len(one[0]) for one in script.batches] == [1, 1]


def test_ranks_share_the_batches_of_dialogs(monkeypatch):
    script = Script(monkeypatch, {"a": ("one", "eos")}, 99)
    for rank, count in ((0, 2), (1, 1)):
        script.scorer.world = World(rank, 2)
        monkeypatch.setattr(script.scorer.world, "sum", lambda values: values)
        monkeypatch.setattr(script.scorer.world, "gather", lambda part: [part])
        script.batches.clear()
        found = scoring.score_dialogs("t", [said("a?", "one")] * 3, script.scorer)["t"]
        assert len(script.batches) == count and found["answers"] == pytest.approx(count / 3)


def test_which_dialogs_a_task_reads(tmp_path, monkeypatch):
    held = [json.loads(converted(dialog, How())[0])
            for dialog in embedded_chat.dialogs("held_out", 300)]
    assert scoring.read_dialogs("dialogs:embedded", 0) == held
    assert scoring.read_dialogs("dialogs:embedded", 2) == held[:2]
    assert scoring.read_dialogs("dialogs:embedded", 301) == held
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(said(f"{i}?", "x")) + "\n" for i in range(3)))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"dialogs:{file}", "dialogs:~/d.jsonl"):
        assert scoring.read_dialogs(name, 0) == [said(f"{i}?", "x") for i in range(3)]
        assert scoring.read_dialogs(name, 2) == [said("0?", "x"), said("1?", "x")]
    with pytest.raises(UserError, match=r"^no file gone; say dialogs:FILE\."):
        scoring.read_dialogs("dialogs:gone", 0)
    for row, says in (({"q": "a"}, r"l:1 \(q\): no known fields; rows have `messages`, or f"),
                      ({"messages": [S]}, r"l:1[^;]*$")):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=says):
            scoring.read_dialogs(f"dialogs:{file}", 0)


def test_what_a_source_does_not_say():
    assert How() == How("auto", (), "", "assistant", False)
