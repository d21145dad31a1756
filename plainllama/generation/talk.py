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
from plainllama.generation.tools import Tools
from plainllama.settings import UserError
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
/exit         end (so does Ctrl-D; Ctrl-C stops an answer)
\"\"\"           begins and ends a text of several lines"""


class Talk:
    """A talk with a model. `say` shows a line that is no part of it."""

    def __init__(self, model: LLaMA, chat: Chat, f: Any, tools: Tools | None):
        self.model, self.chat, self.f, self.tools = model, chat, f, tools
        self.messages: list[dict] = []
        self.drawn = 0  # answers so far: each has draws of its own
        self.set_system(f.system)

    @property
    def schemas(self) -> list[dict]:
        """The schemas of the functions that can be called."""
        return self.tools.schemas if self.tools else []

    def set_system(self, text: str) -> None:
        """Give the talk a system message, '' for none."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def turns(self) -> list[int]:
        """List where the questions stand among the messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def ask(self, question: str) -> None:
        """Ask, and show the answer; calls of functions are made and shown, and answered in turn."""
        self.messages.append({"role": "user", "content": question})
        self.respond()

    def respond(self) -> None:
        """Answer the last question, in at most ROUNDS rounds of calls."""
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

    def undo(self) -> str | None:
        """Take the last question and what followed it back; give the question, None if there is
        none."""
        if not (turns := self.turns()):
            print("(there is nothing yet)")
            return None
        question = self.messages[turns[-1]]["content"]
        del self.messages[turns[-1]:]
        return question

    def save(self, file: str) -> None:
        """Add the talk to a file as a row of dialogs."""
        talk = {"messages": self.messages} | ({"tools": self.schemas} if self.schemas else {})
        with open(file, "a", encoding="utf-8") as rows:
            rows.write(json.dumps(talk, ensure_ascii=False) + "\n")
        print(f"({len(self.messages)} messages -> {file})")

    def load(self, file: str) -> None:
        """Go on with the talk in a file's last row. UserError if that is none."""
        try:
            rows = Path(file).read_text(encoding="utf-8").rstrip("\n").split("\n")
            text, _ = converted(json.loads(rows[-1]), How())
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file} holds no talk: {error}") from None
        self.messages = json.loads(text)["messages"]
        print(f"({len(self.messages)} messages from {file})")

    def obey(self, line: str) -> bool:
        """Do a command, a line that begins with /; whether the talk ends."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "system":
            self.set_system(rest)
        elif name == "reset":
            self.messages = [message for message in self.messages if message["role"] == "system"]
        elif name == "retry":
            if question := self.undo():
                self.ask(question)
        elif name == "undo":
            self.undo()
        elif name in ("save", "load"):
            if not rest:
                raise UserError(f"/{name} needs a file")
            (self.save if name == "save" else self.load)(rest)
        elif name == "tools":
            for schema in self.schemas:
                print(f"{schema['name']}: {schema.get('description', '')}")
        elif name != "exit":
            print(HELP)
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
        except (UserError, OSError) as error:
            print(f"({error})", flush=True)
        except Refused as error:  # by a template of others
            session.undo()
            print(f"({error})", flush=True)
        except KeyboardInterrupt:  # while a function is called
            print("(stopped)", flush=True)
    return 0


def questions(terminal: bool) -> Iterator[str]:
    """Read what is said, a line at a time, or several between two lines of three quotes."""
    def read(sign: str) -> str | None:
        try:
            return input(sign if terminal else "")
        except EOFError:
            return None
        except KeyboardInterrupt:  # at the prompt it ends the talk
            return None

    while (line := read("> ")) is not None:
        if line.strip().startswith('"""'):
            lines = [line.strip()[3:]]
            while not lines[-1].endswith('"""'):
                if (more := read(". ")) is None:
                    return
                lines.append(more)
            line = "\n".join(lines)[:-3].strip("\n")
        yield line
