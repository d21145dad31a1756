"""The chat in a terminal, functions of a user's file, rows of messages, and dialogs as a task."""

import io
import json
from types import SimpleNamespace
from typing import Literal, Optional

import pytest
from test_chat import TOOL, made
from test_sample import tiny, write_checkpoint

import sample
from plainllama.command import parse
from plainllama.evaluation import dialogs
from plainllama.files import read_json, sha256
from plainllama.generation import generate, prompt_files, talk, tools
from plainllama.parallel import World
from plainllama.settings import UserError
from plainllama.text.dialogs import Refused
from plainllama.tokens.chat import Chat
from plainllama.tokens.tokenizer import Tokenizer

FUNCTIONS = '''
import os, time
from typing import Literal, Optional

def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    More is not said."""
    print("on the screen")
    return a + b

def kinds(x: float, words: list[str], way: Literal["up", "down"], more: Optional[dict] = None):
    """Show kinds."""
    return {"x": x, "words": words, "way": way}

def hangs() -> str:
    time.sleep(60)

def dies() -> str:
    os._exit(3)

def raises() -> str:
    raise ValueError("no luck")

def prints():
    os.system("echo aloud")
    return "done"

def leaves():
    raise SystemExit(0)

def large():
    return "x" * 50_000

def _private(x): ...
'''


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return tools.Tools(str(tmp_path / "f.py"))


@pytest.fixture
def session(monkeypatch):
    """(a talk, answers to give, ids of the prompts it was given): a model that follows a script."""
    tokenizer = made("bytes")
    answers, prompts = [], []

    def scripted(model, given, most, sampling, seeds, stop_ids, vocab_size, watch):
        prompts.append(given[0])
        answer = answers.pop(0)
        ids = tokenizer.encode(answer)[:most] if isinstance(answer, str) else []
        for number, token in enumerate(ids):
            if watch(0, token):
                return [(ids[:number + 1], "stop")]
            if answer.startswith("STOP") and number == 6:
                raise KeyboardInterrupt
        return [(ids, "eos")]

    monkeypatch.setattr(generate, "generate", scripted)
    model = SimpleNamespace(config=SimpleNamespace(block_size=160))
    flags = SimpleNamespace(system="Be brief.", max_new_tokens=40, stop=[], seed=1, tools="")
    return SimpleNamespace(talk=talk.Talk(model, Chat(tokenizer), flags, None), answers=answers,
                           prompts=prompts, model=model, flags=flags, chat=Chat(tokenizer))


def run(session, monkeypatch, *lines: str, tools=None) -> None:
    """Talk through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert talk.talk(session.model, session.chat, session.flags, tools) == 0


def test_each_answer_is_generated_behind_the_whole_talk(session, monkeypatch, capsys):
    session.answers += ["One é.", "Two."]
    run(session, monkeypatch, "a", '"""b', '', 'c"""', "/exit", "never")
    assert capsys.readouterr().out == "One é.\nTwo.\n"
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "a"}]
    assert session.prompts[0] == session.chat.prompt(first)
    second = [*first, {"role": "assistant", "content": "One é."},
              {"role": "user", "content": "b\n\nc"}]
    assert session.prompts[1] == session.chat.prompt(second)


def test_old_turns_are_forgotten_whole_and_the_system_message_never(session, monkeypatch, capsys):
    session.answers += ["x" * 30] * 4
    run(session, monkeypatch, *["q" * 20] * 4)
    assert "the oldest turn is forgotten" in capsys.readouterr().out
    last = session.prompts[-1]
    assert len(last) <= 160 - 40
    turn = [{"role": "user", "content": "q" * 20}]
    answered = [*turn, {"role": "assistant", "content": "x" * 30}]
    assert last == session.chat.prompt([{"role": "system", "content": "Be brief."}, *answered,
                                        *turn])


def test_a_question_that_is_too_long_is_taken_back(session, monkeypatch, capsys):
    session.answers += ["Yes."]
    run(session, monkeypatch, "q" * 200, "short")
    assert "of a context of 160 tokens" in capsys.readouterr().out
    assert session.prompts == [session.chat.prompt(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "short"}])]


def test_commands(session, monkeypatch, capsys, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("{}\n")
    session.answers += ["One.", "Other.", "Two.", "Three.", "Four."]
    run(session, monkeypatch, "/undo", "a", "/retry", f"/save {file}", "/system", "b", "/undo", "c",
        "/reset", f"/load {file}", "d", "/tools", "/nonsense", "/save", "/load nowhere.jsonl",
        "/save nowhere/t.jsonl")
    out = capsys.readouterr().out
    for said in "nothing yet", "no command /nonsense", "/save needs a FILE.jsonl":
        assert said in out
    assert out.count("No such file") == 2
    kept, row = file.read_text().splitlines()  # what the file held stays
    assert kept == "{}"
    saved = json.loads(row)["messages"]
    assert [message["content"] for message in saved] == ["Be brief.", "a", "Other."]
    prompt = session.chat.prompt
    assert session.prompts[1] == session.prompts[0]  # /retry asks the same
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Other."}]
    assert session.prompts[2] == prompt([*plain, {"role": "user", "content": "b"}])
    assert session.prompts[3] == prompt([*plain, {"role": "user", "content": "c"}])
    assert session.prompts[4] == prompt([*saved, {"role": "user", "content": "d"}])


def test_a_talk_with_other_ends_of_lines_comes_back(session, tmp_path):
    said = "one\u2028two\x85three\r\nfour"  # which end lines for str.splitlines, not in a file
    session.talk.messages = talk_of((said, "Yes."))["messages"]
    session.talk.save(tmp_path / "t.jsonl")
    session.talk.messages = []
    session.talk.load(tmp_path / "t.jsonl")
    assert session.talk.messages[0]["content"] == said
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no talk"):
        session.talk.load(tmp_path / "empty.jsonl")


def test_a_talk_is_added_as_a_row_and_other_files_stay(session, monkeypatch, capsys, tmp_path):
    file, other = tmp_path / "t.jsonl", tmp_path / "t.txt"
    session.answers += ["One."]
    file.write_text('{"a": 1}')  # its last line does not end
    other.write_text("mine")
    run(session, monkeypatch, f"/save {file}", "a", f"/save {other}", f"/save {file}")
    out = capsys.readouterr().out
    assert "nothing yet" in out and "/save needs a FILE.jsonl" in out
    assert other.read_text() == "mine"
    row, saved = map(json.loads, file.read_text().splitlines())
    assert row == {"a": 1} and len(saved["messages"]) == 3


def test_what_was_saved_loads_as_it_was(session, monkeypatch, capsys, tmp_path, functions):
    session.model.config.block_size = 9000
    monkeypatch.setattr(session.flags, "max_new_tokens", 200)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    session.answers += ["STOP <tool_call>", "", "<think>\nSTOP", "<tool_call>\n{", "x\u2028y", call,
                        "It is 3.", "Fine.", "Good."]
    run(session, monkeypatch, "a", "b", "c", "d", "e", f"/save {tmp_path}/t.jsonl", "f",
        tools=functions)
    capsys.readouterr()
    run(session, monkeypatch, f"/load {tmp_path}/t.jsonl", "f")
    assert "(its functions add, kinds, hangs, dies, raises, prints, leaves, large are not there; " \
        "--tools=FILE)" in capsys.readouterr().out
    row = json.loads((tmp_path / "t.jsonl").read_text())
    asked = [*row["messages"], {"role": "user", "content": "f"}]
    assert session.prompts[-2:] == [session.chat.prompt(asked, functions.schemas),
                                    session.chat.prompt(asked)]


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize("content", [
    "", "\udcff", "{}\n[1]\n", "{\n}\n", "{}", '"a"', "1", "null", "[" * 99999, '{"text": "a"}\n',
    *(json.dumps({"messages": found}) for found in (
        None, "a", [1], [{"role": "x", "content": "a"}], [USER, {"role": "assistant"}],
        [USER | {"content": None}], [USER | {"content": [1]}], [USER | {"role": []}],
        [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}])),
    json.dumps({"messages": [USER], "tools": [1]}), json.dumps({"messages": [USER], "tools": 1})])
def test_files_without_a_talk_are_said_to_be_so(session, tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="holds no talk: the last row is none of `messages`"):
        session.talk.load(str(tmp_path / "t.jsonl"))
    assert len(session.talk.messages) == 1  # the talk stays


def test_a_row_of_another_spelling_loads(session, monkeypatch, tmp_path, capsys):
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n' + json.dumps({"conversations": said}))
    session.answers += ["Fine."]
    run(session, monkeypatch, f"/load {tmp_path}/t.jsonl", "c")
    assert session.prompts == [session.chat.prompt([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}])]
    assert "not there" not in capsys.readouterr().out


def test_commands_say_what_they_did(session, monkeypatch, capsys, functions):
    session.model.config.block_size = 9000
    session.answers += ["One."]
    run(session, monkeypatch, "/sytem x", "/xyz", "a", "/undo", "/undo", "/reset", "/system x",
        "/system", "/tools", "/help")
    assert capsys.readouterr().out.splitlines()[:10] == [
        "(no command /sytem, see /help; did you mean /system?)", "(no command /xyz, see /help)",
        "One.", "(done; the talk has 1 messages)", "(there is nothing yet)",
        *(f"(done; the talk has {n} messages)" for n in (1, 1, 0)), "(none)",
        talk.HELP.splitlines()[0]]
    run(session, monkeypatch, "/tools", tools=functions)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["add(a, b): Add two numbers.", "kinds(x, words, way, more): Show kinds.",
                         "hangs(): "]


def test_a_text_without_an_end_is_asked_as_it_is(session, monkeypatch):
    session.answers += ["One."]
    run(session, monkeypatch, '"""a', "b")
    assert session.prompts == [session.chat.prompt([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}])]


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_ends(monkeypatch, capsys):
    typed = ["a", KeyboardInterrupt, '"""b', KeyboardInterrupt, "c", KeyboardInterrupt,
             KeyboardInterrupt, "never"]

    def typing(sign):
        if typed[0] is KeyboardInterrupt:
            raise typed.pop(0)
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", typing)
    assert list(talk.questions(True)) == ["a", "c"] and typed == ["never"]
    assert capsys.readouterr().out == "\n(again to end)\n" * 3
    typed[:] = [KeyboardInterrupt, "never"]
    assert list(talk.questions(False)) == []  # from a pipe once is enough


def test_ctrl_c_stops_the_answer_and_not_the_talk(session, monkeypatch, capsys):
    session.answers += ["STOP here please", "Fine."]
    run(session, monkeypatch, "a", "b")
    assert "STOP he (stopped)\nFine.\n" in capsys.readouterr().out
    assert session.prompts[1] == session.chat.prompt([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "STOP he"}, {"role": "user", "content": "b"}])


def test_functions_are_called_and_their_results_fed_back(session, monkeypatch, capsys, functions):
    session.model.config.block_size = 4000
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    session.answers += [call, "It is 3.", "<tool_call>\n{", "Sorry."]
    monkeypatch.setattr(session.flags, "max_new_tokens", 200)
    run(session, monkeypatch, "add", "again", tools=functions)
    out = capsys.readouterr().out
    assert "[3]" in out and "[error: a call does not end with </tool_call>]" in out
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "add"},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"name": "add", "arguments": {"a": 2}}]}, {"role": "tool", "content": "3"}]
    assert session.prompts[1] == session.chat.prompt(messages, functions.schemas)


def test_calls_without_end_are_stopped(session, monkeypatch, capsys, functions):
    session.model.config.block_size = 9000
    monkeypatch.setattr(session.flags, "max_new_tokens", 200)
    monkeypatch.setattr(functions, "call", lambda *_: "again")
    session.answers += ['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'] * 9
    run(session, monkeypatch, "add", tools=functions)
    assert len(session.prompts) == 8 and "stopped after 8 rounds" in capsys.readouterr().out


def test_ctrl_c_in_a_function_ends_the_call_alone(session, monkeypatch, capsys, functions):
    def stopped(*_):
        raise KeyboardInterrupt

    session.model.config.block_size = 4000
    monkeypatch.setattr(session.flags, "max_new_tokens", 200)
    monkeypatch.setattr(functions, "call", stopped)
    session.answers += ['<tool_call>\n{"name": "hangs", "arguments": {}}\n</tool_call>', "Fine."]
    run(session, monkeypatch, "a", "b", tools=functions)
    assert capsys.readouterr().out.endswith("(stopped)\nFine.\n")
    assert session.prompts[1][:len(session.prompts[0])] == session.prompts[0]


def test_what_a_stop_text_cuts_off_is_no_part_of_the_talk(session, monkeypatch):
    session.answers += ["One. Two.", "Three."]
    session.flags.stop = ["Two"]
    run(session, monkeypatch, "a", "b")
    assert session.prompts[1] == session.chat.prompt([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "One. "}, {"role": "user", "content": "b"}])


def test_a_question_that_a_template_refuses_is_taken_back(session, monkeypatch, capsys):
    prompt = session.chat.prompt

    def refusing(messages, tools=None):
        if messages[-1]["content"] == "a":
            raise Refused("the template refuses it")
        return prompt(messages, tools)

    monkeypatch.setattr(session.chat, "prompt", refusing)
    session.answers += ["Fine."]
    run(session, monkeypatch, "a", "b")
    assert capsys.readouterr().out == "(the template refuses it)\nFine.\n"
    assert session.prompts == [prompt([{"role": "system", "content": "Be brief."},
                                       {"role": "user", "content": "b"}])]


# ---- functions

def test_schemas_come_from_signatures(functions):
    add, kinds, *_ = functions.schemas
    assert add == {"name": "add", "description": "Add two numbers.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a"]}}
    assert kinds["parameters"]["properties"] == {
        "x": {"type": "number"}, "words": {"type": "array", "items": {"type": "string"}},
        "way": {"enum": ["up", "down"]}, "more": {"anyOf": [{"type": "object"}, {"type": "null"}]}}
    assert kinds["parameters"]["required"] == ["x", "words", "way"]
    assert [schema["name"] for schema in functions.schemas] == [
        "add", "kinds", "hangs", "dies", "raises", "prints", "leaves", "large"]


def test_calls_are_checked_run_and_bounded(functions):
    good = {"x": 1, "words": ["a"], "way": "up"}
    assert functions.call("add", {"a": 2, "b": 3}) == "5"
    assert json.loads(functions.call("kinds", good)) == good
    for name, arguments, reason in (
            ("sub", {}, "no function sub; there are add, kinds"), ("add", {}, "a is missing"),
            ("add", {"a": "2"}, "a takes integer, not '2'"),
            ("add", {"a": True}, "a takes integer"),
            ("add", {"a": 1, "c": 2}, "has no parameter c; there are a, b"),
            ("add", {"a": 1.5}, "a takes integer"), ("kinds", good | {"way": "left"}, "way is one"),
            ("kinds", good | {"words": [1]}, "words takes string"),
            ("kinds", good | {"more": 3}, "more takes object"),
            ("raises", {}, "ValueError: no luck"), ("dies", {}, "ended its process")):
        assert functions.call(name, arguments).startswith("error: ")
        assert reason in functions.call(name, arguments), name
    assert "took longer than 1 s" in functions.call("hangs", {}, 1)


def test_a_result_is_what_a_function_returns_and_has_an_end(functions, capfd):
    assert functions.call("add", {"a": 2}) == "3"
    assert functions.call("prints", {}) == "done" and "aloud" in capfd.readouterr().err
    assert functions.call("leaves", {}) == "error: SystemExit: 0"
    assert functions.call("large", {}) == "x" * 10_000 + " ... (the first of 50,000 characters)"


@pytest.mark.parametrize(("text", "message"), [
    ("def f(x): ...", "x cannot be a parameter of a tool"),
    ("def f(*x: int): ...", r"\*x: int cannot"),
    ("def f(**k): ...", r"\*\*k cannot be a parameter of a tool"),
    ("def f(x: set): ...", "a type that JSON lacks"), ("def f(x: 'A'): ...", "'A' is not defined"),
    ("def f(x: int, /): ...", "x: int cannot be a parameter"), ("x = 1", "no public function"),
    ("import nothing_at_all", "f.py: ModuleNotFoundError: No module"),
    ("f(", r"SyntaxError: '\(' was never closed \(f.py, line 1\)"), ("\0", "null byte"),
    ("exit(0)", "SystemExit: 0$"),
    ("from json import dumps", "no public function")])
def test_files_without_functions_are_refused(tmp_path, text, message):
    (tmp_path / "f.py").write_text(text)
    with pytest.raises(UserError, match=message):
        tools.Tools(str(tmp_path / "f.py"))
    with pytest.raises(UserError, match="no file"):
        tools.Tools(str(tmp_path / "g.py"))


# ---- the pieces of a talk by direct calls

class Words:
    """A chat whose prompts are as long as what is said in them."""

    tokenizer = SimpleNamespace(stop_ids={9}, vocab_size=99, roles={0}, decode_behind=lambda ids:
                                "x" * len(ids), decode=lambda ids: "")

    def prompt(self, messages, tools=None):
        return [0] * sum(len(message["content"]) for message in messages)

    def parse(self, text):
        return {"role": "assistant", "content": text}


def worded(block=40, most=20, *lengths: int, system="") -> talk.Talk:
    """A talk of questions and answers in turn, of these lengths."""
    flags = SimpleNamespace(system=system, max_new_tokens=most, stop=[], seed=1)
    made = talk.Talk(SimpleNamespace(config=SimpleNamespace(block_size=block)), Words(), flags,
                     None)
    made.messages += [{"role": ("user", "assistant")[i % 2], "content": "c" * length}
                      for i, length in enumerate(lengths)]
    return made


@pytest.mark.parametrize(("block", "most", "lengths", "left"), [
    (40, 20, (30,), 1), (40, 20, (31,), 1), (40, 20, (39,), 1), (40, 5, (10, 10, 15), 3),
    (40, 5, (10, 10, 16), 1), (40, 20, (10, 10, 10), 3), (40, 20, (10, 10, 11), 1),
    (40, 20, (5, 5, 5, 20, 5), 3), (40, 20, (5, 5, 5, 5, 10), 5), (41, 20, (10, 10, 11), 3),
    (44, 20, (10, 10, 13), 3), (44, 20, (10, 10, 14), 1), (44, 20, (1, 1, 1, 1, 43), 1)])
def test_how_much_of_a_talk_is_kept(capsys, block, most, lengths, left):
    """A quarter of the context, or what an answer may have, is kept for it, unless the last
    question alone needs more."""
    one = worded(block, most, *lengths)
    assert len(one.fitting()) == sum(lengths[len(lengths) - left:])
    assert len(one.messages) == left
    assert capsys.readouterr().out == (
        "(the oldest turn is forgotten: the context is full)\n" * ((len(lengths) - left) // 2))
    spoken = worded(block + 3, most, *lengths, system="abc")
    spoken.fitting()
    assert spoken.messages[0] == {"role": "system", "content": "abc"}


def test_a_question_alone_may_be_too_long():
    for lengths in ((40,), (3, 3, 40)):
        one = worded(40, 20, *lengths)
        with pytest.raises(UserError) as caught:
            one.fitting()
        assert str(caught.value) == "that takes 40 of a context of 40 tokens; say it shorter"
        assert one.messages == []


def test_each_answer_has_draws_of_its_own(monkeypatch, capsys):
    asked, ended = [], "length"

    def generated(model, prompts, most, flags, seeds, stop_ids, vocab_size, watch):
        asked.append((len(prompts[0]), most, seeds, stop_ids, vocab_size))
        watch(0, 5)
        return [([5], ended)]

    monkeypatch.setattr(generate, "generate", generated)
    one = worded(40, 20, 25)
    assert one.generate() == ("x", True)
    assert capsys.readouterr().out == "x (ended after 15 tokens)\n"
    one, ended = worded(40, 7, 25), "eos"
    assert one.generate() == one.generate() == ("x", True)
    assert capsys.readouterr().out == "x\nx\n"
    assert asked == [(25, most, [generate.row_seed(1, number)], {9}, 99)
                     for most, number in ((15, 0), (7, 0), (7, 1))]


def test_a_call_without_functions_is_answered(session, monkeypatch, capsys):
    session.model.config.block_size = 900
    monkeypatch.setattr(session.flags, "max_new_tokens", 200)
    session.answers += ['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>', "No."]
    run(session, monkeypatch, "a")
    assert ("\n[error: there are no functions; say --tools=FILE.py]\nNo.\n"
            in capsys.readouterr().out)


def test_what_is_saved_and_loaded_is_said(tmp_path, capsys):
    one, file = worded(400, 20, 3, 4), tmp_path / "t.jsonl"
    for before in (None, b"", b"{}", b"{}\n", b"\n"):
        if before is not None:
            file.write_bytes(before)
        one.save(str(file))
        assert capsys.readouterr().out == f"(2 messages -> {file})\n"
        kept = (before or b"").removesuffix(b"\n")
        assert file.read_bytes() == (kept + b"\n" if before else b"") + prompt_files.as_line(
            {"messages": one.messages})
    one.schemas = [{"name": "f"}]
    one.save(str(file))
    row = json.loads(file.read_text().splitlines()[-1])
    assert row == {"messages": one.messages, "tools": [{"name": "f"}]}
    capsys.readouterr()
    (tmp_path / "u.jsonl").write_text(json.dumps({"messages": one.messages, "tools": [
        {"name": name, "parameters": {"type": "object", "properties": {}}} for name in "fgh"]}))
    one.load(str(tmp_path / "u.jsonl"))
    assert capsys.readouterr().out == (f"(2 messages from {tmp_path}/u.jsonl)\n(its functions g, h "
                                       "are not there; --tools=FILE)\n")
    for messages, says in (([], "there is nothing yet"), ([{"role": "system", "content": "a"}],
                                                          "there is nothing yet")):
        one.messages = messages
        for ask in (one.undo, lambda: one.save(str(file))):
            with pytest.raises(UserError, match=says):
                ask()


def test_a_terminal_is_greeted(monkeypatch, capsys):
    typed = iter(["", " ", '"""a', "b", 'c"""', "/exit", "never"])
    signs = []
    monkeypatch.setattr("builtins.input", lambda sign: signs.append(sign) or next(typed))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    asked = []
    monkeypatch.setattr(talk.Talk, "ask", lambda self, text: asked.append(text))
    flags = SimpleNamespace(system="", tools="f.py")
    assert talk.talk(None, Words(), flags, SimpleNamespace(sha256="abc", schemas=[])) == 0
    assert capsys.readouterr().out == f"{talk.HELP}\ntools: f.py, sha256 abc\n\n"
    assert asked == ["a\nb\nc"] and signs == ["> ", "> ", "> ", ". ", ". ", "> "]
    typed = iter(["/exit"])
    assert talk.talk(None, Words(), flags, None) == 0
    assert capsys.readouterr().out == f"{talk.HELP}\n\n"


def test_questions_of_several_lines(monkeypatch):
    def asked(*lines: str, terminal=False) -> list[str]:
        rest = iter(lines)

        def typing(sign):
            try:
                return next(rest)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", typing)
        return list(talk.questions(terminal))

    for lines, questions in (
            (['"""a"""', "b"], ["a", "b"]), ([' """a ', " b", '"""'], ["a\n b"]),
            (['"""', "", "a", "", '"""', "b"], ["a", "b"]), (['"""a', "b"], ["a\nb"]),
            (["a", "", " b "], ["a", "", " b "]), ([], [])):
        assert asked(*lines) == asked(*lines, terminal=True) == questions


# ---- the pieces of tools by direct calls

@pytest.mark.parametrize(("hint", "schema", "good", "bad"), [
    (str, {"type": "string"}, ["", "a"], [1, None]), (int, {"type": "integer"}, [0, -5],
                                                      [True, 1.0, "1"]),
    (float, {"type": "number"}, [1, 1.5], [True, "1"]), (bool, {"type": "boolean"}, [True, False],
                                                         [0, 1, "x"]),
    (list, {"type": "array"}, [[], [1, "a"]], [{}, "a"]), (dict, {"type": "object"},
                                                           [{}, {"a": 1}], [[], "a"]),
    (dict[str, int], {"type": "object"}, [{}, {"a": "b"}], [[]]),
    (list[int], {"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [3]),
    (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], []),
    (Optional[str], {"anyOf": [{"type": "string"}, {"type": "null"}]},  # noqa: UP045  the old way
     ["a", None], []),
    (Literal["a", 1], {"enum": ["a", 1]}, ["a", 1], []), (type(None), {"type": "null"}, [None],
                                                          [0, False])])
def test_types_and_what_fits_them(hint, schema, good, bad):
    assert tools.type_of(hint, "f(x)") == schema
    for value in good:
        assert tools.misfit(value, schema, "x") == tools.misfit(value, schema) == ""
    for value in bad:
        says = f"takes {schema['type']}, not {value!r}"
        assert (tools.misfit(value, schema, "x"), tools.misfit(value, schema)) == (f"x {says}",
                                                                                   says)


def test_what_does_not_fit_is_said_whole():
    schema = {"type": "object", "required": ["a", "b"], "properties": {
        "a": {"type": "integer"}, "b": {"enum": [1, 2]}, "c": {"type": "array", "items": {
            "anyOf": [{"type": "string"}, {"type": "null"}]}}}}
    for value, says in (
            ({"a": 1, "b": 2}, ""), ({"a": 1, "b": 2, "c": ["x", None]}, ""),
            ({"b": 2}, "a is missing"), ({}, "a is missing"), ({"a": 1}, "b is missing"),
            ({"a": 1, "b": 2, "d": 1, "e": 2}, "has no parameter d; there are a, b, c"),
            ({"a": "x", "b": 9}, "a takes integer, not 'x'"),
            ({"a": 1, "b": 9}, "b is one of [1, 2], not 9"),
            ({"a": 1, "b": 2, "c": ["x", 5, 6]}, "c takes string, not 5"),
            ([], "takes object, not []")):
        assert tools.misfit(value, schema) == says
    assert tools.misfit("y" * 99, {"type": "integer"}) == f"takes integer, not {'y' * 99!r:.80}"
    for hint in (set, bytes, dict | set):
        with pytest.raises(UserError, match=r"^--tools: f\(x\) has a type that JSON lacks: "):
            tools.type_of(hint, "f(x)")


def test_a_call_has_its_time_and_a_session_of_its_own(functions, monkeypatch):
    asked = []

    def process(words, **how):
        asked.append(how)
        if len(asked) == 1:
            raise tools.subprocess.TimeoutExpired(words, how["timeout"])
        return SimpleNamespace(returncode=len(asked) - 2, stdout="said")

    monkeypatch.setattr(tools.subprocess, "run", process)
    assert functions.call("hangs", {}) == "error: hangs took longer than 10 s"
    assert functions.call("add", {"a": 1}) == "said"
    assert functions.call("add", {"a": 1}) == "error: add ended its process"
    assert {(how["timeout"], how["start_new_session"]) for how in asked} == {(10, True)}
    assert json.loads(asked[1]["input"]) == [functions.file, "add", {"a": 1}]
    assert functions.call("b", {}).startswith("error: no function b; there are add, kinds, hangs")
    assert len(asked) == 3


def test_a_result_of_the_largest_size_is_whole(tmp_path):
    (tmp_path / "f.py").write_text(
        'def full():\n    """Give it all.\n\n    Or not."""\n    return "x" * 10_000\n'
        'def more(*, n: int = 1):\n    return ["é"] * n\n')
    functions = tools.Tools(str(tmp_path / "f.py"))
    assert functions.schemas == [
        {"name": "full", "description": "Give it all.", "parameters": {
            "type": "object", "properties": {}, "required": []}},
        {"name": "more", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}},
                                        "required": []}}]
    assert functions.sha256 == sha256(tmp_path / "f.py")
    assert functions.call("full", {}) == "x" * 10_000
    assert functions.call("more", {"n": 2}) == '["é", "é"]'


# ---- sample.py

@pytest.mark.parametrize(("words", "message"), [
    (["--chat", "--prompt=x"], "--prompt has no effect on --chat"),
    (["--chat", "--embed=mean"], "--embed has no effect"), (["--system=x"], "for --chat; rows"),
    (["--tools=x.py"], "are for --chat"), (["--chat", "--tools=nowhere.py"], "no file nowhere.py"),
    (["--chat", "--out=x.jsonl"], "--out has no effect")])
def test_options_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        sample.main(parse(words, "", sample.Flags, "files"))


def test_messages_of_unlike_calls_fit_into_a_parquet(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in "abc"]
    made = [{"message": {"role": "assistant", "content": "", "tool_calls": [
        {"name": "f", "arguments": arguments}]}} for arguments in ({}, {"a": 1}, {"a": "é"})]
    with open(tmp_path / "G.parquet", "wb") as file:
        prompt_files.Prompts(rows).write_to(file, ".parquet", made)
    found = pq.read_table(tmp_path / "G.parquet").to_pylist()
    assert [json.loads(row["message"]) for row in found] == [row["message"] for row in made]
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]


def test_rows_that_a_parquet_cannot_hold_are_refused_at_once(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    row = {"messages": [{"role": "user", "content": "a"}], "tools": [{"parameters": {}}]}
    (tmp_path / "F.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="do not fit into"):
        sample.main(parse([f"--prompts={tmp_path}/F.jsonl", f"--out={tmp_path}/G.parquet"], "",
                          sample.Flags, "files"))


def test_columns_of_unlike_objects_are_text_in_a_parquet(tmp_path):
    """pyarrow gives every object the keys of all: columns would come back as others."""
    pq = pytest.importorskip("pyarrow.parquet")
    tool = {"name": "g", "parameters": {"type": "object", "properties": {"b": {"type": "string"}}}}
    rows = [{"id": 1, "tools": [TOOL], "n": {"x": [1, None]}}, {"id": 2, "tools": [tool]}]
    with open(tmp_path / "G.parquet", "wb") as file:
        prompt_files.Prompts(rows).write_to(file, ".parquet", [{}] * 2)
    found = pq.read_table(tmp_path / "G.parquet").to_pylist()
    assert [json.loads(row["tools"]) for row in found] == [[TOOL], [tool]]
    assert [row["n"] for row in found] == [{"x": [1, None]}, None]


@pytest.fixture
def tuned(tmp_path):
    """A model that knows dialogs."""
    folder = write_checkpoint(tmp_path / "model", tiny(block_size=400))
    made("bytes").save(folder)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_messages_alone_get_a_message(tmp_path, tuned, kind):
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "a", "messages": None},
            {"prompt": None, "messages": [{"role": "user", "content": "a"}]}]
    given, out = tmp_path / f"F.{kind}", tmp_path / f"G.{kind}"
    with open(given, "wb") as file:
        prompt_files.Prompts(rows).write_to(file, f".{kind}", [{}, {}])
    assert sample.main(parse([f"--ckpt={tuned}", f"--prompts={given}", f"--out={out}",
                              "--max_new_tokens=4", "--device=cpu"], "", sample.Flags,
                             "files")) == 0
    if kind == "parquet":
        found = pq.read_table(out).to_pylist()
        assert found[0]["message"] is None
    else:
        found = prompt_files.read_file(out, "")[0]
        assert "message" not in found[0]
    assert found[1]["message"] and all(row["stop"] for row in found)


def batch(tuned, source, out, *words: str) -> list[dict]:
    """The rows that sample.py makes of a file."""
    assert sample.main(parse([f"--ckpt={tuned}", f"--prompts={source}", f"--out={out}",
                              "--max_new_tokens=3", "--device=cpu", *words], "", sample.Flags,
                             "files")) == 0
    return prompt_files.read_file(out, "")[0]


def test_rows_of_messages_take_a_system_message_and_tools(tmp_path, tuned, monkeypatch):
    """Where they have none of their own; the functions are offered, and never called."""
    given, complete = [], generate.complete
    monkeypatch.setattr(generate, "complete", lambda *args: given.extend(args[2]) or complete(
        *args))
    (tmp_path / "f.py").write_text("def add(a: int) -> int:\n    1 / 0\n")
    ask, own = {"role": "user", "content": "a"}, {"role": "system", "content": "Own."}
    rows = [{"messages": [ask]}, {"messages": [own, ask]}, {"messages": [ask], "tools": [TOOL]},
            {"messages": json.dumps([ask]), "system": "Own."}, {"prompt": "plain text"}]
    source, out = tmp_path / "F.jsonl", tmp_path / "G.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    words = ["--system=Be brief.", f"--tools={tmp_path / 'f.py'}", "--batch=1"]
    found = batch(tuned, source, out, *words)
    assert [row | {"completion": "", "stop": "", "message": ""} for row in rows] == [
        row | {"completion": "", "stop": "", "message": ""} for row in found]
    chat, brief = Chat(Tokenizer.load(tuned)), {"role": "system", "content": "Be brief."}
    schemas = tools.Tools(str(tmp_path / "f.py")).schemas
    wanted = [chat.prompt([brief, ask], schemas), chat.prompt([own, ask], schemas),
              chat.prompt([brief, ask], [TOOL]), chat.prompt([own, ask], schemas),
              [chat.tokenizer.bos_id, *b"plain text"]]
    assert sorted(given) == sorted(wanted)
    recipe = read_json(tmp_path / "G.jsonl.made.json")["recipe"]
    assert recipe["system"] == "Be brief." and recipe["sha256 of --tools"] == sha256(
        tmp_path / "f.py")[:16]
    for other, says in ((["--system=Own."], "system=Be brief., now it is Own."),
                        (["--tools="], "sha256 of --tools=.*, now it is ;"),
                        ([], "sha256 of --tools=.*, now it is [0-9a-f]{16};")):
        if not other:
            (tmp_path / "f.py").write_text("def add(a: int, b: int) -> int:\n    1 / 0\n")
        with pytest.raises(UserError, match=f"not made from this: {says}"):
            batch(tuned, source, out, *words, *other)
    source.write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match="are for --chat; rows of messages take them too"):
        batch(tuned, source, tmp_path / "H.jsonl", "--system=x")


def test_talks_of_a_parquet_are_those_of_a_jsonl(tmp_path, tuned):
    """Without the keys that other rows have, and from JSON text, as prepare.py reads them."""
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = {"name": "g", "parameters": {"type": "object", "properties": {"b": {
        "type": "string"}}}}
    rows = [{"messages": [{"role": "user", "content": f"a{i}"}], "tools": [[TOOL, other][i % 2]]}
            for i in range(4)]
    (tmp_path / "F.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(arrow.Table.from_pylist(rows), tmp_path / "F.parquet")
    text = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    pq.write_table(arrow.Table.from_pylist(text), tmp_path / "T.parquet")
    texts = [[row["completion"] for row in batch(tuned, tmp_path / source, tmp_path / out)]
             for source, out in (("F.jsonl", "A.jsonl"), ("F.parquet", "B.parquet"),
                                 ("T.parquet", "C.jsonl"), ("F.jsonl", "D.parquet"))]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_a_prompt_to_a_model_of_dialogs_is_remarked_on(tuned, capsys):
    assert sample.main(parse([f"--ckpt={tuned}", "--prompt=a", "--max_new_tokens=2",
                              "--device=cpu"], "", sample.Flags, "files")) == 0
    assert "--chat wraps what is said as" in capsys.readouterr().out


@pytest.mark.parametrize(("row", "says"), [
    ({"messages": [{"role": "narrator", "content": "a"}]}, "F.jsonl:1: unknown role 'narrator'$"),
    ({"messages": []}, "F.jsonl:1: the last message is an answer, or there is none$"),
    ({"conversations": []}, "its columns are: conversations .*or `messages`")])
def test_rows_that_are_no_talk_are_named(tmp_path, tuned, row, says):
    (tmp_path / "F.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=says):
        sample.main(parse([f"--ckpt={tuned}", f"--prompts={tmp_path}/F.jsonl", "--device=cpu",
                           f"--out={tmp_path}/G.jsonl"], "", sample.Flags, "files"))


# ---- dialogs as a task

@pytest.fixture
def scorer(session, monkeypatch):
    """A scorer whose model knows the answer to all questions but `c`."""
    answers = {"a": "One.", "b": "Two.", "c": "no"}
    scorer = dialogs.Scorer(session.model, session.chat.tokenizer, 160, World())

    def scripted(model, prompts, *_):
        asked = [session.chat.tokenizer.decode(ids[-3:]).strip() for ids in prompts]
        return [(session.chat.tokenizer.encode(answers[text[0]]), "eos") for text in asked]

    monkeypatch.setattr(generate, "generate", scripted)
    return scorer


def talk_of(*turns: tuple[str, str]) -> dict:
    """A dialog of questions and answers."""
    return {"messages": [{"role": role, "content": content} for turn in turns
                         for role, content in zip(("user", "assistant"), turn, strict=True)]}


def test_dialogs_are_right_if_all_their_answers_are(scorer):
    found = [talk_of(("a", "One."), ("b", "Two.")), talk_of(("a", "One."), ("c", "Three.")),
             talk_of(("a", "One.")), talk_of(("x" * 200, "long")),
             talk_of(("a", "One."), ("x" * 200, "long"))]
    scores = dialogs.score_dialogs("t", found, scorer)["t"]
    assert (scores["acc"], scores["n"], scores["cut"]) == (2 / 5, 5, 2)  # no room is not right
    assert (scores["answers"], scores["ended"]) == (5 / 6, 1)


def test_the_answers_of_all_ranks_are_kept(scorer, monkeypatch):
    found = [talk_of(("a", "One.")), talk_of(("b", "Two.")), talk_of(("c", "Three."))]
    kept = []
    for rank in (0, 1):
        scorer.world = World()
        scorer.world.rank, scorer.world.size = rank, 2
        monkeypatch.setattr(scorer.world, "sum", lambda values: values)
        monkeypatch.setattr(scorer.world, "gather", lambda part: kept.append(part) or kept)
        dialogs.score_dialogs("t", found, scorer)
    assert [sample["dialog"] for sample in scorer.samples["t"]] == [0, 1, 2]


def test_a_dialog_that_a_template_refuses_is_named(scorer, session, monkeypatch):
    def refusing(*_):
        raise Refused("the template refuses it")

    monkeypatch.setattr(session.chat, "prompt", refusing)
    with pytest.raises(UserError, match="dialog 1: the template refuses it"):
        dialogs.turns_of(session.chat, [talk_of(("a", "One."))], 160)
