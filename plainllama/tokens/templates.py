"""Dialogs by the Jinja template that a model of others brings (chat_template=model).

It is rendered as transformers renders it. What is learned is found by rendering growing beginnings
of a dialog: an answer is what stands behind its prompt, up to the token that ends it. Only what the
template writes becomes a control token: what a message says stays text.
"""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from plainllama.files import read_json
from plainllama.settings import UserError
from plainllama.text.dialogs import Refused
from plainllama.tokens.chat import END, TEMPLATE, Chat, Rendered, as_json, parsed
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import boundaries, named_tokens, read_spec, read_template
from plainllama.tokens.vocabulary import valid

PRIVATE = range(0xF0000, 0xFFFFE)  # characters that no standard gives a meaning
KEEP = "{{ '' }}"  # behind a block: a newline that follows stays


# ---- which template there is

def chat_of(tokenizer: Tokenizer) -> Chat:
    """Make what renders dialogs by a tokenizer's template, ours or that of others. UserError if it
    knows no dialogs."""
    if tokenizer.template in ("", TEMPLATE):
        return Chat(tokenizer)  # which says what is missing
    return ModelChat(tokenizer, tokenizer.template)


def find_template(folder: Path) -> str:
    """Read the template of a model's folder, where transformers looks for it. It begins with the
    names of special tokens that it uses, where they are not the ones that we would give it.
    UserError if there is none."""
    config = read_json(folder / "tokenizer_config.json", tolerant=True)
    found = read_template(folder) or config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {item.get("name"): str(item.get("template")) for item in found}
        found = named.get("default")
        if found and "tool_use" in named:
            found = f"{KEEP}{named['tool_use']}{{% else %}}{KEEP}{found}{{% endif %}}"
            found = "{% if tools %}" + found
    if not isinstance(found, str):
        raise UserError(f"{folder} brings no template of dialogs (chat_template.jinja, or "
                        "chat_template in tokenizer_config.json); use chat_template=own")
    ours, header = named_tokens(read_spec(folder)[0]), ""
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        theirs = config.get(name) or ""
        theirs = theirs.get("content", "") if isinstance(theirs, dict) else theirs
        if re.search(rf"\b{name}\b", found) and theirs != ours.get(name, ""):
            header += f"{{% set {name} = {as_json(theirs)} %}}"
    return header + KEEP + found if header else found


def answer_ends(template: str, spec: dict) -> set[str]:
    """Name the special tokens with which a template ends an answer, none if it is '' or, which is
    said, if that cannot be told; `spec` is the parsed tokenizer.json."""
    if template in ("", TEMPLATE):
        return {END} if template else set()
    try:
        return Template(template, spec).ends
    except UserError as error:
        print(f"transformers is not told what ends an answer: {error}", flush=True)
        return set()


# ---- text

class Template:
    """A Jinja template in the sandbox, with the special tokens that it writes."""

    def __init__(self, source: str, spec: dict, now: datetime | None = None):
        self.names = named_tokens(spec)
        special = [entry for entry in spec["added_tokens"] if entry["special"]]
        special.sort(key=lambda entry: -len(entry["content"]))  # the longest first
        never = "(?!)"  # of a tokenizer without special tokens
        self.typed = re.compile("|".join(re.escape(entry["content"]) for entry in special) or never)
        # some take the white space beside them
        self.written = re.compile("|".join(
            r"\s*" * entry.get("lstrip", False) + f"({re.escape(entry['content'])})"
            + r"\s*" * entry.get("rstrip", False) for entry in special) or never)
        try:
            self.jinja = compiled(source, now or datetime.now())
        except Exception as error:  # of its syntax
            raise UserError(f"the model's template of dialogs is no Jinja: {error}; use "
                            "chat_template=own") from None
        self.begin = ""  # what it writes between a prompt and an answer
        self.ends: set[str] = set()
        reasons = []
        call = {"name": "a", "arguments": {}}
        for answer in ({"content": "b"}, {"content": "", "tool_calls": [call]}):
            talk = for_template([{"role": "user", "content": "a"}, {"role": "assistant"} | answer])
            try:
                self.learn_end(talk)
            except Refused as error:
                reasons.append(str(error))
        if not self.ends:
            raise UserError(f"the model's template of dialogs cannot be learned: {reasons[0]}; use "
                            "chat_template=own")

    def learn_end(self, talk: list[dict]) -> None:
        """Find what begins and ends an answer, from a question and one. Refused if nothing does."""
        prompt, text = self.render(talk[:1], None, True), self.render(talk, None)
        if not text.startswith(prompt):
            raise Refused("it writes an answer otherwise than its prompt")
        found = list(self.written.finditer(text, len(prompt)))
        if not found:
            raise Refused("it ends an answer with no special token, so a model could never stop")
        self.ends.add(next(filter(None, found[-1].groups())))
        if talk[1]["content"]:
            self.begin = text[len(prompt):].partition(talk[1]["content"])[0]

    def render(self, messages: list[dict], tools: list[dict] | None, prompt: bool = False) -> str:
        """Write messages as one text, with a `prompt` up to where an answer begins. Refused if the
        template does not take them."""
        tools = [{"type": "function", "function": tool} for tool in tools or ()]
        try:
            return valid(self.jinja.render(
                messages=messages, tools=tools or None, documents=None,
                add_generation_prompt=prompt, **self.names))
        except Exception as error:  # what any code may raise
            raise Refused(f"the template refuses it: {error!s:.100}") from None

    def marked(self, value: Any, mark: str) -> Any:
        """Write `mark` into each text of `value` that spells a special token, so that it does not
        any more."""
        if isinstance(value, str):
            return self.typed.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, dict):
            return {self.marked(key, mark): self.marked(item, mark) for key, item in value.items()}
        return [self.marked(item, mark) for item in value] if isinstance(value, list) else value


def compiled(source: str, now: datetime):
    """Compile a template as transformers does, but that marks of what is learned are passed over:
    the sandbox, its filters and functions. `now` is the day that a template may ask for."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Marks(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            inner = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(inner).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=[Marks, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    return sandbox.from_string(source)


def for_template(messages: list[dict]) -> list[dict]:
    """Write canonical messages in the form that templates of others read: OpenAI's, reasoning by
    its three names, and each tool result with the call that it belongs to."""
    written, number = [], 0
    open_calls: list[dict] = []  # of which no result has come
    for message in messages:
        new = {"role": message["role"], "content": message["content"]}
        if message.get("reasoning"):
            new |= dict.fromkeys(("reasoning", "reasoning_content", "thinking"),
                                 message["reasoning"])
        if message.get("tool_calls"):
            open_calls = []
            for call in message["tool_calls"]:
                number += 1
                open_calls.append({"id": f"call{number:05}", "type": "function", "function": call})
            new["tool_calls"] = list(open_calls)
        if message["role"] == "tool" and open_calls:
            call = open_calls.pop(0)
            new |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        written.append(new)
    return written


def keeps(text: str, *parts: str) -> bool:
    """Tell if a text says all `parts`, as they are or within JSON, but for blanks at their ends."""
    return all(part.strip() in text or as_json(part.strip())[1:-1] in text for part in parts)


# ---- ids

class ModelChat(Chat):
    """A model's own template, with its tokenizer. render() and prompt() give the ids that
    transformers gives but for messages that spell a special token, which stays text. A dialog
    is Refused where the template does not take it, leaves out what it says, begins a text twice,
    ends an answer in no token of stop_ids, or joins its first token with the prompt's last.

    A template that writes earlier turns anew when more follow (without their reasoning, say) is
    learned on the last answer only, and its dialogs cannot be cut. The begin token is there once if
    the template writes it, and is not added if it does not.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, now: datetime | None = None):
        spec = json.loads(tokenizer.json_bytes)
        self.tokenizer, self.template = tokenizer, Template(template, spec, now)
        self.once = boundaries(spec)[1] is not None  # else what begins a text ends it, too
        self.encoded: dict[tuple[str, bool], Any] = {}  # parts of the dialog at hand
        tokenizer.stop_ids |= {tokenizer.special_ids[name] for name in self.template.ends}

    def rendered(self, dialog: dict) -> Rendered:
        """Render a dialog, and say where its answers end."""
        messages, tools, mark = self.prepared(dialog["messages"], dialog.get("tools"))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        texts = {i: self.template.render(messages[:i + 1], tools) for i in answers}
        ids = self.ids(texts[answers[-1]], mark)
        self.check(texts[answers[-1]], messages, tools, mark)
        upto = {i: self.ids(text, mark) for i, text in texts.items()}
        rewritten = not all(np.array_equal(ids[:len(part)], part) for part in upto.values())
        answers = answers[-1:] if rewritten else answers
        learned, ends = np.full(len(ids), bool(dialog.get("learn_all"))), []
        learned[0] = False
        for i in answers:
            prompt = self.template.render(messages[:i], tools, True)
            first, last = self.span(self.ids(prompt, mark), upto[i])
            said = [messages[i]["content"], messages[i].get("reasoning", ""),
                    *(call["function"]["name"] for call in messages[i].get("tool_calls", ()))]
            if not keeps(texts[i][len(prompt):], *said):
                raise Refused("the template leaves out what an answer says")
            learned[first:last] = dialog["messages"][i].get("learn", True)
            ends.append(len(upto[i]))
        return Rendered(ids, learned, ends, rewritten)

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Give the ids that an answer is generated behind."""
        messages, tools, mark = self.prepared(messages, tools)
        text = self.template.render(messages, tools, True)
        self.check(text, messages, tools, mark)
        return self.ids(text, mark).tolist()

    def parse(self, text: str) -> dict:
        """Read an answer, as it is decoded, as a message; ValueError as parsed() has."""
        return parsed(text.removeprefix(self.template.begin))

    def prepared(self, messages: list[dict], tools: list[dict] | None) -> tuple[list, list, str]:
        """Write messages and tools for the template; if they spell a special token, with a mark
        in it, a character that they do not have."""
        said, mark = as_json([messages, tools]), ""
        self.encoded = {}
        written = [for_template(messages), tools or []]
        if self.template.typed.search(said):
            mark = next(chr(code) for code in PRIVATE if chr(code) not in said)
            written = self.template.marked(written, mark)
        return written[0], written[1], mark

    def check(self, text: str, messages: list[dict], tools: list[dict], mark: str) -> None:
        """Refuse what the template does not write, or writes so that a mark is lost in it."""
        for tool in tools:
            if not keeps(text, tool["name"]):
                raise Refused("the template leaves out tools")
        for message in messages:
            if not keeps(text, message["content"]):
                raise Refused(f"the template leaves out what a message of role {message['role']} "
                              "says")
        if mark and ascii(mark)[1:-1].lower() in text.lower():
            raise Refused("a message spells a special token")

    def ids(self, text: str, mark: str) -> np.ndarray:
        """Encode what the template wrote: its special tokens as ids, all else as text. (n,)"""
        parts: list[Any] = []
        at = 0
        for found in self.template.written.finditer(text):
            parts += [self.part(text[at:found.start()], at == 0, mark),
                      [self.tokenizer.special_ids[next(filter(None, found.groups()))]]]
            at = found.end()
        parts.append(self.part(text[at:], at == 0, mark))
        ids = np.concatenate(parts, dtype=self.tokenizer.kind, casting="unsafe")
        if self.once and (ids[1:] == self.tokenizer.bos_id).any():
            raise Refused("the template begins a text inside of it")
        return ids

    def part(self, text: str, first: bool, mark: str):
        """Encode a text between special tokens, once for each dialog."""
        if (text, first) not in self.encoded:
            encode = self.tokenizer.encode if first else self.tokenizer.encode_behind
            self.encoded[text, first] = encode(text.replace(mark, "") if mark else text)
        return self.encoded[text, first]

    def span(self, prompt: np.ndarray, upto: np.ndarray) -> tuple[int, int]:
        """Find where an answer begins and ends in the ids that end with it."""
        first = len(prompt)
        if not np.array_equal(upto[:first], prompt):
            raise Refused("the template writes an answer otherwise than its prompt")
        special = np.flatnonzero(np.isin(upto[first:], list(self.tokenizer.special_ids.values())))
        if not len(special) or int(upto[first + special[-1]]) not in self.tokenizer.stop_ids:
            raise Refused("an answer ends in no token that stops it")
        return first, first + int(special[-1]) + 1
