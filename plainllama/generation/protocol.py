"""OpenAI's requests and answers as JSON: https://platform.openai.com/docs/api-reference

A field that is not read is refused by its name, unless it says what is done anyway.
"""

import base64
import json
import math
import secrets
import struct
import time
from dataclasses import dataclass, field, fields
from typing import Any

from plainllama.command import checked
from plainllama.generation.answers import Spelling, forced_call
from plainllama.generation.batching import Score
from plainllama.settings import Sampling, UserError, nearest
from plainllama.text.dialogs import Refused, message_of, plain, tools_of
from plainllama.tokens.chat import CALL, Chat
from plainllama.tokens.tokenizer import Tokenizer

BOTH = ("model", "n", "stream", "stream_options", "stop", "stop_token_ids", "seed", "max_tokens",
        "logprobs", *(item.name for item in fields(Sampling)))
FIELDS = {"completions": (*BOTH, "prompt", "echo"),
          "chat": (*BOTH, "messages", "tools", "tool_choice", "max_completion_tokens",
                   "top_logprobs"),
          "embeddings": ("model", "input", "encoding_format")}
# what clients send although it changes nothing: as long as it does
NEUTRAL: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0, "best_of": 1,
                           "logit_bias": {}, "suffix": "", "store": False,
                           "parallel_tool_calls": True, "response_format": {"type": "text"},
                           "service_tier": "auto"}
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # of no effect
MOST_TOP, MOST_TEXTS, MOST_STOPS, LONGEST_STOP = 20, 128, 64, 256


class Wrong(Exception):
    """What a client asks for and does not get: a status of HTTP, and OpenAI's words for it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.param, self.status, self.code, self.headers = param, status, code, headers

    def body(self) -> dict:
        """OpenAI's form of an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param,
                          "code": self.code}}


@dataclass
class Asked:
    """A request, read and checked."""

    prompts: list[list[int]]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 0
    n: int = 1
    seed: int | None = None
    stops: list[str] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    top: int | None = None  # log-probabilities are asked for, with so many others
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    tools: bool = False  # calls are looked for
    forced: str = ""
    base64: bool = False


class Model:
    """What requests are read for: a model's name, context, tokenizer and, if it was tuned on
    dialogs, its template."""

    def __init__(self, name: str, block_size: int, tokenizer: Tokenizer, chat: Chat | None):
        self.name, self.block_size, self.tokenizer, self.chat = name, block_size, tokenizer, chat
        self.calls = not tokenizer.template or CALL.strip() in tokenizer.template  # as we read them
        self.spelling = Spelling(tokenizer)
        self.created = int(time.time())
        self.longest = self.spelling.longest()  # characters of a token

    def card(self) -> dict:
        """What /v1/models says."""
        return {"id": self.name, "object": "model", "created": self.created,
                "owned_by": "plainllama", "context_length": self.block_size,
                "chat": self.chat is not None}

    # ---- reading

    def read(self, kind: str, raw: bytes) -> Asked:
        """Read the body of a request of this kind: completions | chat | embeddings. Wrong if it
        cannot be done."""
        body = parsed(raw)
        check_fields(kind, body)
        name = body.get("model", self.name)
        if name != self.name:
            raise Wrong(f"there is no model {str(name)[:80]!r}; there is {self.name!r}", "model",
                        404, "model_not_found")
        if kind == "embeddings":
            form = body.get("encoding_format", "float")
            if form not in ("float", "base64"):
                raise Wrong("encoding_format is float or base64", "encoding_format")
            return Asked(self.prompts(body, "input"), base64=form == "base64")
        asked = Asked([], read_sampling(body))
        self.read_options(body, asked)
        if kind == "chat":
            self.read_talk(body, asked)
        else:
            asked.prompts = self.prompts(body, "prompt")
            asked.echo = flag(body, "echo")
            asked.top = number(body, "logprobs", None, 0, MOST_TOP)
        asked.max_tokens = self.length_of(kind, body, asked)
        if len(asked.prompts) * asked.n > MOST_TEXTS:
            raise Wrong(f"a request takes at most {MOST_TEXTS} texts, prompts times n", "n")
        return asked

    def read_options(self, body: dict, asked: Asked) -> None:
        """Read what both kinds of texts have."""
        asked.n = number(body, "n", 1, 1, MOST_TEXTS)
        asked.seed = number(body, "seed", None, -2**63, 2**63 - 1)
        asked.stream = flag(body, "stream")
        options = body.get("stream_options")
        if options is not None:
            if not asked.stream:
                raise Wrong("stream_options is for stream=true", "stream_options")
            if not isinstance(options, dict) or options.keys() - {"include_usage"}:
                raise Wrong('stream_options is {"include_usage": true}', "stream_options")
            asked.include_usage = flag(options, "include_usage")
        stops = body.get("stop") or []
        asked.stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(asked.stops, list) or len(asked.stops) > MOST_STOPS or not all(
                isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in asked.stops):
            raise Wrong(f"stop is a text of 1 to {LONGEST_STOP} characters, or a list of at most "
                        f"{MOST_STOPS}", "stop")
        ids = body.get("stop_token_ids") or []
        if not isinstance(ids, list) or len(ids) > MOST_STOPS:
            raise Wrong(f"stop_token_ids is a list of at most {MOST_STOPS} ids", "stop_token_ids")
        self.check_ids(ids, "stop_token_ids")
        asked.stop_ids = self.tokenizer.stop_ids | frozenset(ids)

    def read_talk(self, body: dict, asked: Asked) -> None:
        """Read messages and tools, and write the prompt that they make."""
        if self.chat is None:
            raise Wrong("this model was not tuned on dialogs: use /v1/completions", "messages")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Wrong("messages is a list of messages, at least one", "messages")
        if len(messages) > self.block_size:  # each takes a token at least
            raise Wrong(f"messages: {len(messages)} do not fit into a context of "
                        f"{self.block_size} tokens", "messages", code="context_length_exceeded")
        if flag(body, "logprobs"):
            asked.top = number(body, "top_logprobs", 0, 0, MOST_TOP)
        elif body.get("top_logprobs") is not None:
            raise Wrong("top_logprobs is for logprobs=true", "top_logprobs")
        tools = self.read_tools(body, asked)
        try:
            talk = [history(message) for message in messages]
            if talk[-1]["role"] == "assistant":
                raise Refused("the last message is an answer")
            if talk[0]["role"] == "system" and not talk[0]["content"].strip():
                talk = talk[1:]
            said = sum(len(message["content"]) for message in talk)
            self.check_characters(said, "messages")
            prompt = self.chat.prompt(talk, tools)
        except (Refused, UserError) as why:
            found = getattr(why, "found", "")
            raise Wrong(f"messages: {why} {found}".rstrip(), "messages") from None
        asked.prompts = [prompt + self.forced_ids(asked)]
        self.check_length(asked.prompts[0], "messages")

    def forced_ids(self, asked: Asked) -> list[int]:
        """Give the ids of what an answer begins with, whatever the model would say."""
        return [int(token) for token in self.tokenizer.encode_behind(asked.forced)]

    def read_tools(self, body: dict, asked: Asked) -> list[dict]:
        """Read the functions that may be called, and whether one must be."""
        choice = body.get("tool_choice")
        given = body.get("tools")
        if given is not None and not isinstance(given, list):
            raise Wrong("tools is a list of functions", "tools")
        if not given:
            if choice not in (None, "none", "auto"):
                raise Wrong("tool_choice needs tools", "tool_choice")
            return []
        try:
            tools = tools_of({"tools": given})
        except Refused as why:
            raise Wrong(f"tools: {why} {why.found}".rstrip(), "tools") from None
        if not all(isinstance(tool.get("parameters", {}), dict) for tool in tools):
            raise Wrong("the parameters of a function are an object", "tools")
        names = [tool["name"] for tool in tools]
        if choice == "none":
            return []
        if not self.calls:
            raise Wrong(f"tools: the template of this model writes calls otherwise than in "
                        f"{CALL.strip()}, so that they would not be found", "tools")
        asked.tools = True
        if choice == "required":
            asked.forced = forced_call(names[0] if len(names) == 1 else None)
        elif choice not in (None, "auto"):
            function = choice.get("function") if isinstance(choice, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if name not in names:
                raise Wrong('tool_choice is "none", "auto", "required" or {"type": "function", '
                            '"function": {"name": ONE OF THE TOOLS}}', "tool_choice")
            asked.forced = forced_call(name)
        return tools

    def length_of(self, kind: str, body: dict, asked: Asked) -> int:
        """Say how many tokens an answer may have: what is asked for, else for a talk what the
        context has room for, and for a text 16."""
        names = ["max_tokens"] + ["max_completion_tokens"] * (kind == "chat")
        given = [name for name in names if body.get(name) is not None]
        if len(given) == 2:
            raise Wrong("max_tokens and max_completion_tokens are one thing: say one", given[1])
        if not given:
            return self.block_size if kind == "chat" else 16
        low = 0 if asked.echo else 1
        return number(body, given[0], None, low, self.block_size,
                      f"; the model's context has {self.block_size} tokens")

    def prompts(self, body: dict, name: str) -> list[list[int]]:
        """Read one or several texts, or lists of ids, as prompts."""
        given = body.get(name)
        listed = given if isinstance(given, list) else [given]
        if listed and all(type(item) is int for item in listed):
            listed = [listed]
        if not 1 <= len(listed) <= MOST_TEXTS:
            raise Wrong(f"{name} is a text, a list of ids, or 1 to {MOST_TEXTS} of them", name)
        prompts = []
        for item in listed:
            if isinstance(item, str):
                self.check_characters(len(item), name)
                ids = [self.tokenizer.bos_id, *self.tokenizer.encode(item)]
            elif isinstance(item, list) and item:
                self.check_ids(item, name)
                ids = item
            else:
                raise Wrong(f"{name} is a text, a list of ids, or a list of these", name)
            self.check_length(ids, name, name == "prompt")
            prompts.append(ids)
        return prompts

    def check_ids(self, ids: list, name: str) -> None:
        """Refuse what is no id of the vocabulary."""
        for token in ids:
            if type(token) is not int or not 0 <= token < self.tokenizer.vocab_size:
                raise Wrong(f"{name}: {str(token)[:40]} is no id from 0 to "
                            f"{self.tokenizer.vocab_size - 1}", name)

    def check_characters(self, characters: int, name: str) -> None:
        """Refuse, before it is encoded, a text that cannot fit."""
        if characters > self.block_size * self.longest:
            raise Wrong(f"{name}: {characters:,} characters do not fit into a context of "
                        f"{self.block_size} tokens", name, code="context_length_exceeded")

    def check_length(self, ids: list[int], name: str, answered: bool = True) -> None:
        """Refuse a prompt that leaves no room for an answer."""
        room = self.block_size - int(answered)
        if len(ids) > room:
            raise Wrong(f"{name}: {len(ids)} tokens, room is for {room} in a context of "
                        f"{self.block_size}", name, code="context_length_exceeded")

    # ---- writing

    def logprobs_of_chat(self, scores: list[Score]) -> dict:
        """Write scores as chat completions have them."""
        return {"content": [self.entry(score.token, score.logprob) | {
            "top_logprobs": [self.entry(*each) for each in score.top]} for score in scores],
            "refusal": None}

    def entry(self, token: int, logprob: float) -> dict:
        """Write one token's."""
        return {"token": self.spelling.text_of(token), "logprob": finite(logprob),
                "bytes": list(self.spelling.bytes_of(token))}

    def logprobs_of_text(self, scores: list[Score | None], ids: list[int], offset: int) -> dict:
        """Write scores as completions have them; None: a prompt's first token. `offset`: of the
        first one's text."""
        spelled = [self.spelling.text_of(token) for token in ids]
        offsets = []
        for text in spelled:
            offsets.append(offset)
            offset += len(text)
        return {"tokens": spelled, "text_offset": offsets,
                "token_logprobs": [score and finite(score.logprob) for score in scores],
                "top_logprobs": [score and {self.spelling.text_of(token): finite(logprob)
                                            for token, logprob in score.top}
                                 for score in scores]}


# ---- small pieces

def parsed(raw: bytes) -> dict:
    """Read a body as a JSON object; Wrong if it is none."""
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        body = json.loads(raw.decode(), parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # no half of a surrogate pair
    except UnicodeError:
        raise Wrong("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Wrong(f"the body is not JSON: {error!s:.100}") from None
    if not isinstance(body, dict):
        raise Wrong("the body is not a JSON object")
    return body


def check_fields(kind: str, body: dict) -> None:
    """Refuse a field that has no effect, by its name. What is null counts as not there."""
    for name in [name for name in body if body[name] is None]:
        del body[name]
    for name, value in body.items():
        same = name in NEUTRAL and value == NEUTRAL[name]
        if name not in (*FIELDS[kind], *LABELS) and not same:
            close = nearest(name, FIELDS[kind], 0.8)
            raise Wrong(f"the field {name[:80]!r} is not supported{close}", name[:80])


def number(body: dict, name: str, default: Any, low: int, high: int, why: str = "") -> Any:
    """Read a whole number."""
    value = body.get(name, default)
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise Wrong(f"{name} is a whole number from {low} to {high}, not {str(value)[:40]}{why}",
                    name)
    return value


def flag(body: dict, name: str) -> bool:
    """Read what is true or false."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Wrong(f"{name} is true or false, not {str(value)[:40]}", name)
    return value


def read_sampling(body: dict) -> Sampling:
    """Read how tokens are drawn, by the ranges of the command line."""
    found = Sampling()
    for item in fields(Sampling):
        if item.name in body:
            value = body[item.name]
            try:
                setattr(found, item.name, checked(item, value, "request"))
            except (UserError, OverflowError):
                low, high = item.metadata["low"], item.metadata["high"]
                up = "" if high is None else f" and at most {high}"
                raise Wrong(f"{item.name} is {str(value)[:40]}, must be a number, at least {low}"
                            f"{up}", item.name) from None
    return found


def history(raw: Any) -> dict:
    """Bring a message to ours. An answer that is no well-formed one is taken as the text that it
    was: a client sends back what the model said."""
    if isinstance(raw, dict) and raw.get("content") is None and raw.get("role") != "assistant":
        raise Refused("a message has no content")
    try:
        return message_of(raw)
    except Refused:
        if isinstance(raw, dict) and raw.get("role") == "assistant" and isinstance(
                raw.get("content"), str) and not raw.get("tool_calls"):
            return plain("assistant", raw["content"])
        raise


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return logprob if math.isfinite(logprob) else -9999.0


def calls_of(calls: list[dict], stream: bool) -> list[dict]:
    """Write calls of functions as OpenAI does."""
    return [({"index": i} if stream else {}) | {
        "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {
            "name": call["name"],
            "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
        for i, call in enumerate(calls)]


def vector(values: list[float], as_base64: bool) -> Any:
    """Write a vector as numbers, or as little-endian fp32 in base64."""
    if not as_base64:
        return values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
