"""The chat in a terminal: sample.py --chat.

Each answer is generated behind the ids of the whole talk, rendered as training renders it. A talk
that grows too long loses its oldest turns, whole, and never its system message.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model import LLaMA
from plainllama.generation import generate
from plainllama.generation.prompt_files import as_line
from plainllama.generation.tools import Tools
from plainllama.settings import UserError, nearest
from plainllama.text.dialogs import How, Refused, converted
from plainllama.tokens.chat import Chat

ROUNDS = 8  # of calls behind a question
HELP = """/system TEXT  give the talk another system message (empty: none)
/reset        forget the talk, but for its system message
/retry        draw the last answer anew
/undo         take the last question and its answer back
/save FILE    keep the talk, as a row of a data set of dialogs
/load FILE    go on with a talk
/tools        list the functions that can be called
/exit         end (so does Ctrl-D; Ctrl-C stops an answer, or clears what is typed)
\"\"\"           begins and ends a text of several lines"""


class Talk:
    """A talk with a model; what is shown beside its answers stands in brackets."""

    def __init__(self, model: LLaMA, chat: Chat, f: Any, tools: Tools | None):
        self.model, self.chat, self.f, self.tools = model, chat, f, tools
        self.schemas = tools.schemas if tools else []  # of the functions that can be called
        self.messages: list[dict] = []
        self.drawn = 0  # answers so far: each has draws of its own
        self.set_system(f.system)

    def set_system(self, text: str) -> None:
        """Give the talk a system message, '' for none."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def turns(self) -> list[int]:
        """List where the questions stand among the messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def ask(self, question: str) -> None:
        """Ask, and show the answer; calls of functions are made and shown, and answered in turn, in
        at most ROUNDS rounds."""
        self.messages.append({"role": "user", "content": question})
        for _ in range(ROUNDS):
            text, whole = self.generate()
            message: dict[str, Any] = {"role": "assistant", "content": text}
            wrong = []
            if whole:
                try:
                    message = self.chat.parse(text)
                except ValueError as error:  # the model may mend it
                    wrong = [f"error: {error}"]
            self.messages.append(message)
            for result in wrong or map(self.called, message.get("tool_calls", ())):
                print(f"[{result}]", flush=True)
                self.messages.append({"role": "tool", "content": result})
            if self.messages[-1] is message:
                return
        print(f"(stopped after {ROUNDS} rounds of calls)")

    def called(self, call: dict) -> str:
        """Call a function; its result, or what is wrong, as text."""
        if not self.tools:
            return "error: there are no functions; say --tools=FILE.py"
        return self.tools.call(call["name"], call["arguments"])

    def generate(self) -> tuple[str, bool]:
        """Draw an answer and show it as it comes; its text, and whether it is all of it: Ctrl-C may
        have stopped it."""
        prompt = self.fitting()
        most = min(self.f.max_new_tokens, self.model.config.block_size - len(prompt))
        stream = generate.TextStream(self.chat.tokenizer, prompt, self.f.stop, True)
        seed, whole = generate.row_seed(self.f.seed, self.drawn), True
        self.drawn += 1
        try:
            [(_, ended)] = generate.generate(
                self.model, [prompt], most, self.f, [seed], self.chat.tokenizer.stop_ids,
                self.chat.tokenizer.vocab_size, lambda row, token: stream.push(token))
            stream.push()
            if ended == "length":
                print(f" (ended after {most} tokens)", end="")
        except KeyboardInterrupt:
            stream.push()
            print(" (stopped)", end="")
            whole = False
        print(flush=True)
        return stream.text, whole

    def fitting(self) -> list[int]:
        """Give the ids to answer behind, without the oldest turns if the context is too short for
        all of them and for an answer. UserError if the last question alone is too long."""
        block = self.model.config.block_size
        reserve = min(self.f.max_new_tokens, block // 4)
        while len(prompt := self.chat.prompt(self.messages, self.schemas)) + reserve > block:
            turns = self.turns()
            if len(turns) < 2:
                if len(prompt) < block:
                    break
                self.messages = self.messages[:turns[0]]
                raise UserError(f"that takes {len(prompt)} of a context of {block} tokens; say it "
                                "shorter")
            del self.messages[turns[0]:turns[1]]
            print("(the oldest turn is forgotten: the context is full)", flush=True)
        return prompt

    # ---- commands

    def undo(self) -> str:
        """Take the last question and what followed it back; give the question. UserError if there
        is none."""
        if not (turns := self.turns()):
            raise UserError("there is nothing yet")
        question = self.messages[turns[-1]]["content"]
        del self.messages[turns[-1]:]
        return question

    def save(self, file: str) -> None:
        """Add the talk to a .jsonl as a row of dialogs. UserError if it has no question."""
        if not self.turns():
            raise UserError("there is nothing yet")
        talk = {"messages": self.messages} | ({"tools": self.schemas} if self.schemas else {})
        with open(file, "a+b") as rows:
            rows.seek(max(rows.tell() - 1, 0))  # a last line may lack its end
            ended = rows.read() in (b"", b"\n")
            rows.write((b"" if ended else b"\n") + as_line(talk))
        print(f"({len(self.messages)} messages -> {file})")

    def load(self, file: str) -> None:
        """Go on with the talk in a file's last row. UserError if that is none."""
        try:
            row = json.loads(Path(file).read_bytes().rstrip().rpartition(b"\n")[2])
            with contextlib.suppress(Refused):  # by rules for training, of which a talk breaks some
                row = json.loads(converted(row, How())[0])
            self.chat.prompt(row["messages"], row.get("tools"))  # what is no talk fails here
            there = [schema["name"] for schema in self.schemas]
            missing = [tool["name"] for tool in row.get("tools", ()) if tool["name"] not in there]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{file} holds no talk: the last row is none of `messages`") from None
        self.messages = row["messages"]
        print(f"({len(self.messages)} messages from {file})")
        if missing:
            print(f"(its functions {', '.join(missing)} are not there; --tools=FILE)")

    def obey(self, line: str) -> bool:
        """Do a command, a line that begins with /; whether the talk ends."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "system":
            self.set_system(rest)
        elif name == "reset":
            self.messages = [message for message in self.messages if message["role"] == "system"]
        elif name == "retry":
            self.ask(self.undo())
        elif name == "undo":
            self.undo()
        elif name in ("save", "load"):
            if not rest.endswith(".jsonl"):  # a line would damage what is another file
                raise UserError(f"/{name} needs a FILE.jsonl")
            (self.save if name == "save" else self.load)(rest)
        elif name == "tools":
            lines = [f"{schema['name']}({', '.join(schema['parameters']['properties'])}): "
                     f"{schema.get('description', '')}" for schema in self.schemas]
            print("\n".join(lines) or "(none)")
        elif name == "help":
            print(HELP)
        elif name != "exit":
            known = [word for word in HELP.split() if word[0] == "/"]
            raise UserError(f"no command /{name}, see /help{nearest('/' + name, known)}")
        if name in ("system", "reset", "undo"):
            print(f"(done; the talk has {len(self.messages)} messages)")
        return name == "exit"


def talk(model: LLaMA, chat: Chat, f: Any, tools: Tools | None) -> int:
    """Talk until the input ends; the exit code. From a terminal each question is asked for, from a
    pipe every line is one, and the answers alone are printed."""
    session = Talk(model, chat, f, tools)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() edits with it
        print(f"{HELP}\n" + (f"tools: {f.tools}, sha256 {tools.sha256}\n" if tools else ""))
    for line in questions(terminal):
        try:
            if line.startswith("/"):
                if session.obey(line):
                    break
            elif line.strip():
                session.ask(line)
        except (UserError, OSError, Refused) as error:
            if isinstance(error, Refused):  # by a template of others
                session.undo()
            print(f"({error})", flush=True)
        except KeyboardInterrupt:  # while a function is called
            print("(stopped)", flush=True)
    return 0


def questions(terminal: bool) -> Iterator[str]:
    """Read what is said, a line at a time, or several between two lines of three quotes. At a
    terminal Ctrl-C clears what is typed, and a second one ends."""
    cleared = False
    while True:
        try:
            line = input("> " if terminal else "")
            cleared = False
            if line.strip().startswith('"""'):
                lines = [line.strip()[3:]]
                with contextlib.suppress(EOFError):  # without an end it is asked as it is
                    while not lines[-1].endswith('"""'):
                        lines.append(input(". " if terminal else ""))
                line = "\n".join(lines).removesuffix('"""').strip("\n")
        except (EOFError, KeyboardInterrupt) as end:
            if cleared or not terminal or isinstance(end, EOFError):
                return
            print("\n(again to end)")
            cleared = True
        else:
            yield line
