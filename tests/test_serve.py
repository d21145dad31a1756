"""sample.py --serve: the openai client, raw sockets, hostile input, alone and in company."""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import os
import queue
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_chat import made
from test_sample import tiny
from test_templates import template_of, words

import sample
from plainllama.command import parse
from plainllama.files import write_json
from plainllama.generation import generate, slots
from plainllama.generation.batching import Batch, Full, Score, Text, problem, scored
from plainllama.settings import Sampling, UserError
from plainllama.tokens.chat import TEMPLATE, Chat
from plainllama.tokens.templates import ModelChat
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.weights.adapters import Adapter
from plainllama.weights.huggingface import config_json
from plainllama.weights.peft import write_adapter

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
serving = pytest.importorskip("plainllama.generation.serving")

import h11  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import Request  # noqa: E402

from plainllama.generation import connections, protocol  # noqa: E402
from plainllama.generation.answers import Answer, Part, Spelling  # noqa: E402
from plainllama.generation.protocol import Model  # noqa: E402
from plainllama.generation.replies import Reply  # noqa: E402

CONTEXT = 512
PIECE_SIZES = dict(slots.PIECES)
SCRIPT = re.compile(r"SAY\[(.*?)\]YAS", re.DOTALL)  # what the scripted batch then answers
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "é": [2]}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}


class Scripted(Batch):
    """A batch whose model says what a prompt tells it to say; without that, what it would."""

    slow = 0.0  # seconds a step

    def choice(self, text, logits):
        if not hasattr(text, "script"):
            found = SCRIPT.findall(bytes(i for i in text.ids if i < 256).decode(errors="ignore"))
            text.script = [*list(found[-1].encode()), TOKENIZER.eos_id] if found else None
        time.sleep(self.slow)
        token = super().choice(text, logits)
        number = len(text.new)
        return token if text.script is None else torch.tensor([text.script[number]])


TOKENIZER = made("bytes")


@pytest.fixture(scope="module")
def model():
    return tiny(block_size=CONTEXT)


def service_of(model, batch, key="", cors="", chat=True):
    about = Model("tiny", CONTEXT, TOKENIZER, Chat(TOKENIZER) if chat else None)
    return serving.Service(about, batch, "127.0.0.1", cors, key)


def begin(service):
    """A server in a thread of this process."""
    place = serving.bind("127.0.0.1", 0)
    server = serving.Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    port = place.getsockname()[1]
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)

    def close():
        server.should_exit = True
        thread.join(20)

    return SimpleNamespace(port=port, close=close, service=service, batch=service.batch,
                           server=server, thread=thread, url=f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(slots.PIECES, "cpu", 16)
        batch = Scripted(tiny(block_size=CONTEXT), TOKENIZER.vocab_size, 4, 40)
        found = begin(service_of(None, batch))
        yield found
        found.close()
        batch.close()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=30)


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": f"SAY[{text}]YAS"}]


def joined(stream) -> SimpleNamespace:
    """What the chunks of a stream say together."""
    found = SimpleNamespace(text="", calls=[], ended=[], usage=None, logprobs=[], pieces=[])
    for chunk in stream:
        if chunk.usage:
            found.usage = chunk.usage
        for choice in chunk.choices:
            if choice.delta.content:
                found.text += choice.delta.content
                found.pieces.append(choice.delta.content)
            found.calls += choice.delta.tool_calls or []
            found.ended += [choice.finish_reason] if choice.finish_reason else []
            if choice.logprobs:
                found.logprobs += choice.logprobs.content
    return found


# ---- the batch

def drawn(batch: Batch, asked: list[dict], together: bool) -> list[tuple]:
    """(ids, scores, reason) of texts that are asked for all at once, or one after the other."""
    class Listener:
        def __init__(self):
            self.done, self.scores = threading.Event(), []

        def heard(self, token, score):
            self.scores.append(score)
            return False

        def ended(self, reason):
            self.reason = reason
            self.done.set()

    texts = [Text(listener=Listener(), **each) for each in asked]
    for text in texts:
        batch.add([text])
        if not together:  # else all are asked for before one has ended
            assert text.listener.done.wait(30)
    for text in texts:
        assert text.listener.done.wait(30)
    return [(text.new, text.listener.scores, text.listener.reason) for text in texts]


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1, "tie_embeddings": True},
                                     {"n_layer": 3, "d_model": 24, "n_head": 2, "d_ff": 37}])
def test_a_text_has_the_same_bits_alone_and_in_company(monkeypatch, changes):
    monkeypatch.setitem(slots.PIECES, "cpu", 16)
    common = [256, *list(range(40))]
    asked = [{"ids": [*common[:n], n], "room": 8 + n % 7, "seed": n, "top": 3,
              "sampling": Sampling(temperature=n % 3, top_p=0.9, repetition_penalty=1 + n % 2)}
             for n in range(1, 41, 5)]
    alone, company = (Batch(tiny(block_size=CONTEXT, **changes), 258, 6, 99) for _ in range(2))
    wanted = drawn(alone, asked, False)
    found = drawn(company, asked, True)
    again = drawn(company, asked, True)  # now prompts begin with what is kept
    assert company.counts["cached_tokens"] > 0
    alone.close(), company.close()
    assert found == wanted == again  # log-probabilities too, to the bit
    reference = tiny(block_size=CONTEXT, **changes)
    for each, (ids, _, reason) in zip(asked, wanted, strict=True):
        assert reason == "length" and len(ids) == each["room"]
        [(ours, _)] = generate.generate(reference, [each["ids"]], each["room"], each["sampling"],
                                        [each["seed"]], vocab_size=258)
        assert ids == ours  # the decode loop of sample.py


def test_prompts_longer_than_a_piece_score_and_pool(model, monkeypatch):
    monkeypatch.setitem(slots.PIECES, "cpu", 16)
    batch = Batch(tiny(block_size=CONTEXT), 258, 2, 9)
    ids = [256] + [n % 251 for n in range(50)]
    text = Text(ids, 1, SimpleNamespace(heard=lambda *_: False, ended=lambda reason: done.set()),
                top=2, score_prompt=True)
    pooled = Text(ids, 0, text.listener, pool=True)
    for each in (text, pooled):
        done = threading.Event()
        batch.add([each])
        assert done.wait(30)
    batch.close()
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0, :, :258].log_softmax(-1)
    assert [score.token for score in text.prompt_scores] == ids[1:]
    for at, score in enumerate(text.prompt_scores):
        assert score.logprob == pytest.approx(float(wanted[at, ids[at + 1]]), abs=1e-4)
        assert score.top[0][1] == pytest.approx(float(wanted[at].max()), abs=1e-4)
    states = generate.embed(model, [ids], "mean", "-1")[0]
    assert torch.allclose(pooled.state, states, atol=1e-5)


def test_one_that_fails_harms_no_other(monkeypatch):
    batch = Batch(tiny(block_size=CONTEXT), 258, 4, 9)
    real = batch.slots.feed

    def feed(slot, ids):
        if 77 in ids:
            raise RuntimeError("planted")
        return real(slot, ids)

    monkeypatch.setattr(batch.slots, "feed", feed)
    found = drawn(batch, [{"ids": [256, n], "room": 5} for n in (1, 77, 2)], True)
    assert [reason for *_, reason in found] == ["length", "error: RuntimeError: planted", "length"]
    assert not any(slot.busy for slot in batch.slots.all)
    batch.close()


def test_a_listener_or_a_draw_that_fails_harms_no_other_text(monkeypatch):
    batch = Batch(tiny(block_size=CONTEXT), 258, 4, 9)
    real = batch.choice

    def ended(reason):
        if reason == "length":
            raise ValueError("planted")
        reasons.put(reason)

    def choice(text, logits):
        if text.seed == 77 and text.new:
            raise RuntimeError("planted too")
        return real(text, logits)

    reasons = queue.Queue()
    batch.add([Text([256], 3, SimpleNamespace(heard=lambda *_: False, ended=ended))])
    assert reasons.get(timeout=30) == "error: ValueError: planted"
    monkeypatch.setattr(batch, "choice", choice)
    [(new, _, reason)] = drawn(batch, [{"ids": [256], "room": 5, "seed": 77}], True)
    assert (len(new), reason) == (1, "error: RuntimeError: planted too")
    monkeypatch.undo()
    assert drawn(batch, [{"ids": [256], "room": 5}], True)[0][2] == "length"
    assert batch.load() == (0, 0)
    batch.close()


def test_a_prompt_that_nobody_wants_is_left_within_a_step(monkeypatch):
    monkeypatch.setitem(slots.PIECES, "cpu", 16)
    batch = Batch(tiny(block_size=CONTEXT), 258, 2, 9)
    real, fed = batch.slots.feed, []

    def feed(slot, ids):
        fed.append(ids)
        if len(fed) == 3:
            batch.cancel([text])
        return real(slot, ids)

    monkeypatch.setattr(batch.slots, "feed", feed)
    text = Text([256] * 500, 5, SimpleNamespace())
    batch.add([text])
    assert until(lambda: batch.counts["cancelled"] == 1) and batch.load() == (0, 0)
    assert len(fed) == 3 and not text.new
    batch.close()


def test_requests_take_turns():
    batch = Batch(tiny(block_size=CONTEXT), 258, 1, 99)
    order, started = [], threading.Event()

    def text(name):
        def heard(*_):
            return not started.wait(30)
        return Text([256], 1, SimpleNamespace(heard=heard, ended=lambda _: order.append(name)))

    for name, number in (("a", 6), ("b", 1), ("c", 3)):
        batch.add([text(name) for _ in range(number)])
    started.set()
    assert until(lambda: len(order) == 10)
    # b need not wait for all of a; of a one or two are begun before b is there
    assert order.index("b") <= 2 and order.index("c") <= 3 and order[-3:] == ["a", "a", "a"]
    batch.close()


# ---- the client

def test_models(client, server):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "plainllama")
    assert model.context_length == CONTEXT and model.chat is True
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_a_talk_at_once_and_as_a_stream(client):
    text = "Grüße — 你好 👩‍👧 and so on"
    whole = client.chat.completions.create(model="tiny", messages=say(text), seed=3)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens == len(Chat(TOKENIZER).prompt(say(text)))
    assert whole.usage.completion_tokens == len(text.encode())
    found = joined(client.chat.completions.create(
        model="tiny", messages=say(text), stream=True, stream_options={"include_usage": True}))
    assert found.text == text and found.ended == ["stop"] and len(found.pieces) > 9
    assert not any("\ufffd" in piece for piece in found.pieces)
    assert found.usage.completion_tokens == whole.usage.completion_tokens
    assert found.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize(("text", "stop", "kept"), [
    ("one END two", "END", "one "), ("one EN two END", ["END", "zzz"], "one EN two "),
    ("aaab", "aab", "a"), ("a\nb", "\n", "a"), ("é€", "€", "é"), ("never", "x", "never"),
    ("abcabd", ["abd", "bd"], "abc")])
def test_a_stop_string_is_never_shown_in_part(client, text, stop, kept):
    whole = client.chat.completions.create(model="tiny", messages=say(text), stop=stop)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (kept, "stop")
    found = joined(client.chat.completions.create(model="tiny", messages=say(text), stop=stop,
                                                  stream=True))
    assert found.text == kept and found.ended == ["stop"]


def test_streams_joined_are_the_plain_answers(client):
    """Random text of the model, invalid UTF-8 included."""
    def both(seed):
        asked = {"model": "tiny", "prompt": [256, seed, 7], "max_tokens": 30, "seed": seed,
                 "stop": ["a", "\ufffdb"], "logprobs": 1, "temperature": 1.5}
        whole = client.completions.create(**asked).choices[0]
        parts = [c.choices[0] for c in client.completions.create(**asked, stream=True)]
        assert "".join(part.text for part in parts) == whole.text
        tokens = [t for part in parts if part.logprobs for t in part.logprobs.tokens]
        assert tokens == whole.logprobs.tokens
        assert parts[-1].finish_reason == whole.finish_reason in ("stop", "length")
        return whole.text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(both, range(12)))
    assert len(set(texts)) > 6


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_functions(client, stream):
    for said, content, ended in ((f"Let me see.\n{CALL}", "Let me see.", "tool_calls"),
                                 (f"{CALL}\n{CALL}", "", "tool_calls"),
                                 ("no <tool_call> at all", "no <tool_call> at all", "stop"),
                                 ("<tool_call>\nno", "<tool_call>\nno", "stop")):
        made = client.chat.completions.create(model="tiny", messages=say(said), tools=[TOOL],
                                              stream=stream)
        if stream:
            found = joined(made)
            text, calls, [reason] = found.text, found.calls, found.ended
        else:
            message, reason = made.choices[0].message, made.choices[0].finish_reason
            text, calls = message.content or "", message.tool_calls or []
        assert (text, reason, len(calls)) == (content, ended, said.count("</tool_call>"))
        for call in calls:
            assert call.function.name == "add" and call.id
            assert json.loads(call.function.arguments) == {"a": 1, "é": [2]}
    cut = client.chat.completions.create(model="tiny", messages=say(CALL), tools=[TOOL],
                                         max_tokens=20)
    assert cut.choices[0].finish_reason == "length" and not cut.choices[0].message.tool_calls
    assert cut.choices[0].message.content == CALL[:20]


def test_a_call_may_be_required_or_not_wanted(client):
    chosen = {"type": "function", "function": {"name": "add"}}
    rest = '{"a": 5}}\n</tool_call>'
    for choice in ("required", chosen):
        made = client.chat.completions.create(model="tiny", messages=say(rest), tools=[TOOL],
                                              tool_choice=choice)
        [call] = made.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"a": 5}
    made = client.chat.completions.create(model="tiny", messages=say(CALL), tools=[TOOL],
                                          tool_choice="none")
    assert made.choices[0].message.content == CALL and not made.choices[0].message.tool_calls


def test_a_talk_with_calls_and_half_calls_goes_on(client):
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [{"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x", "content": "2"},
            {"role": "assistant", "content": "<tool_call>\nhalf"}, *say("yes")]
    made = client.chat.completions.create(model="tiny", messages=talk, tools=[TOOL])
    assert made.choices[0].message.content == "yes"


def test_n_and_seeds(client):
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "n": 3, "seed": 5, "logprobs": 2}
    first = client.completions.create(**asked)
    again = client.completions.create(**asked, stream=True)
    texts = ["", "", ""]
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in first.choices] == texts and len(set(texts)) == 3
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("ab")]
    wanted = generate.generate(tiny(block_size=CONTEXT), [ids] * 3, 12, Sampling(),
                               [generate.row_seed(5, i) for i in range(3)], TOKENIZER.stop_ids,
                               TOKENIZER.vocab_size)
    assert [len(choice.logprobs.tokens) for choice in first.choices] == [
        len(new) for new, _ in wanted]
    assert first.usage.completion_tokens == sum(len(new) for new, _ in wanted)
    assert first.usage.prompt_tokens == len(ids)


def test_logprobs(client):
    made = client.chat.completions.create(
        model="tiny", messages=say("aé"), logprobs=True, top_logprobs=2, temperature=0,
        extra_body={"top_k": 1})
    content = made.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert bytes(b for entry in content for b in entry.bytes).decode() == "aé"
    assert all(len(entry.top_logprobs) == 2 and -99 < entry.logprob <= 0 for entry in content)
    found = joined(client.chat.completions.create(
        model="tiny", messages=say("aé"), logprobs=True, top_logprobs=2, stream=True))
    assert [entry.token for entry in found.logprobs] == [entry.token for entry in content]


def test_echo_scores_a_prompt_of_ids(client):
    ids = [256, *list(b"Hello, this is long enough for two pieces.")]
    made = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=0)
    choice = made.choices[0]
    assert choice.text == "Hello, this is long enough for two pieces."
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(ids) == len(choice.logprobs.text_offset)
    with torch.no_grad():
        wanted = tiny(block_size=CONTEXT)(torch.tensor([ids]))[0, :, :263].log_softmax(-1)
    for at, value in enumerate(choice.logprobs.token_logprobs[1:]):
        assert value == pytest.approx(float(wanted[at, ids[at + 1]]), abs=1e-4)


def test_several_prompts_and_max_tokens(client):
    made = client.completions.create(model="tiny", prompt=["SAY[abc]YAS", "SAY[de]YAS"],
                                     max_tokens=2)
    assert [(c.index, c.text, c.finish_reason) for c in made.choices] == [
        (0, "ab", "length"), (1, "de", "length")]
    made = client.chat.completions.create(model="tiny", messages=say("abc"),
                                          max_completion_tokens=1)
    assert made.choices[0].message.content == "a" and made.choices[0].finish_reason == "length"
    made = client.completions.create(model="tiny", prompt="SAY[abc]YAS",
                                     extra_body={"stop_token_ids": [ord("b")]})
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("a", "stop")


def test_embeddings(client, model):
    made = client.embeddings.create(model="tiny", input=["ab", "c" * 70])  # base64, then unpacked
    plain = client.embeddings.create(model="tiny", input=["ab", "c" * 70], encoding_format="float")
    ids = [[256, *TOKENIZER.encode(text)] for text in ("ab", "c" * 70)]
    for i, each in enumerate(ids):
        wanted = generate.embed(model, [each], "mean", "-1")[0].tolist()
        assert plain.data[i].embedding == pytest.approx(wanted, abs=1e-5)
        assert made.data[i].embedding == pytest.approx(plain.data[i].embedding, abs=1e-7)
    assert plain.usage.prompt_tokens == sum(map(len, ids))
    raw = client.embeddings.with_raw_response.create(model="tiny", input="ab",
                                                     encoding_format="base64")
    assert len(base64.b64decode(json.loads(raw.content)["data"][0]["embedding"])) == 4 * 32


def test_requests_have_the_same_answer_in_company(client, server):
    asked = [{"model": "tiny", "prompt": [256, *range(n, n + 40)], "max_tokens": 10, "seed": n,
              "temperature": n % 2, "logprobs": 3} for n in range(10)]
    alone = [client.completions.create(**each).choices[0] for each in asked]
    with ThreadPoolExecutor(10) as pool:
        going = pool.map(lambda each: client.completions.create(**each).choices[0], asked)
        for n in range(8):  # others come and go meanwhile
            with raw_post(server, {"prompt": [256, *range(n, n + 90)], "stream": n % 2 == 0}):
                time.sleep(0.02)
        company = list(going)
    assert company == alone


# ---- hostile input

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "a", "max_tokens": 2}
BAD: list[tuple] = [
    ("chat/completions", CHAT | {"frequency_penalty": 1}, "frequency_penalty"),
    ("chat/completions", CHAT | {"temprature": 1}, "temprature"),
    ("chat/completions", CHAT | {"prompt": "a"}, "prompt"),
    ("chat/completions", CHAT | {"temperature": -1}, "temperature"),
    ("chat/completions", CHAT | {"temperature": "hot"}, "temperature"),
    ("chat/completions", CHAT | {"temperature": True}, "temperature"),
    ("chat/completions", CHAT | {"top_p": 2}, "top_p"),
    ("chat/completions", CHAT | {"top_k": 1.5}, "top_k"),
    ("chat/completions", CHAT | {"min_p": [0]}, "min_p"),
    ("chat/completions", CHAT | {"max_tokens": -1}, "max_tokens"),
    ("chat/completions", CHAT | {"max_tokens": 10**30}, "max_tokens"),
    ("chat/completions", CHAT | {"max_completion_tokens": 3}, "max_completion_tokens"),
    ("chat/completions", CHAT | {"n": 0}, "n"), ("chat/completions", CHAT | {"n": 10**6}, "n"),
    ("chat/completions", CHAT | {"seed": "x"}, "seed"),
    ("chat/completions", CHAT | {"seed": 2**70}, "seed"),
    ("chat/completions", CHAT | {"stop": [""]}, "stop"),
    ("chat/completions", CHAT | {"stop": ["a"] * 999}, "stop"),
    ("chat/completions", CHAT | {"stop": {"a": 1}}, "stop"),
    ("chat/completions", CHAT | {"stop": "x" * 999_999}, "stop"),
    ("chat/completions", CHAT | {"messages": CHAT["messages"] * 9999}, "messages"),
    ("chat/completions", CHAT | {"stream": "yes"}, "stream"),
    ("chat/completions", CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
    ("chat/completions", CHAT | {"top_logprobs": 3}, "top_logprobs"),
    ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ("chat/completions", CHAT | {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("chat/completions", CHAT | {"tools": "x"}, "tools"),
    ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice"),
    ("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": {"function": 1}}, "tool_choice"),
    ("chat/completions", CHAT | {"messages": []}, "messages"),
    ("chat/completions", CHAT | {"messages": "hello"}, "messages"),
    ("chat/completions", CHAT | {"messages": ["hello"]}, "messages"),
    ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "a"}]}, "messages"),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": 5}]}, "messages"),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "contents": "a"}]}, "messages"),
    ("chat/completions", CHAT | {"messages": [{"role": ["user"], "content": "a"}]}, "messages"),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "messages"),
    ("chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "a" * 600}]},
     "messages"),
    ("completions", TEXT | {"prompt": "a" * CONTEXT}, "prompt"),
    ("completions", TEXT | {"prompt": "a" * 10**6}, "prompt"),
    ("completions", TEXT | {"prompt": []}, "prompt"),
    ("completions", TEXT | {"prompt": [[]]}, "prompt"),
    ("completions", TEXT | {"prompt": [10**9]}, "prompt"),
    ("completions", TEXT | {"prompt": [True]}, "prompt"),
    ("completions", TEXT | {"prompt": {"a": 1}}, "prompt"),
    ("completions", {"model": "tiny"}, "prompt"),
    ("completions", TEXT | {"messages": []}, "messages"),
    ("completions", TEXT | {"max_tokens": 0}, "max_tokens"),
    ("completions", TEXT | {"logprobs": True}, "logprobs"),
    ("embeddings", {"model": "tiny", "input": "a", "dimensions": 3}, "dimensions"),
    ("embeddings", {"model": "tiny", "input": "a", "encoding_format": "hex"}, "encoding_format"),
    ("embeddings", {"model": "tiny"}, "input")]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_a_wrong_field_is_named(server, path, body, param):
    answer = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and param in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(("raw", "status"), [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"prompt": "\xe9"}', 400),
    (b'{"prompt": "\\ud800"}', 400), (b"[" * 100_000, 400), (b'{"temperature": NaN}', 400),
    (b'{"temperature": 1e999, "prompt": "a"}', 400), (b'{"n": ' + b"9" * 9999 + b"}", 400),
    (b'{"model": "other", "prompt": "a"}', 404), (b'{"model": 5, "prompt": "a"}', 404),
    (b'{"prompt": "' + b"a" * 9_000_000 + b'"}', 413)])
def test_a_wrong_body_is_refused(server, raw, status):
    answer = httpx.post(f"{server.url}/v1/completions", content=raw, timeout=30,
                        headers={"Content-Type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_other_doors(server):
    for method, path, status, headers in (
            ("GET", "/nothing", 404, {}), ("GET", "/v1/models/%22%0Aevil%201", 404, {}),
            ("GET", "/v1/completions", 405, {}),
            ("POST", "/v1/models", 405, {}), ("GET", "/v1/models/other", 404, {}),
            ("POST", "/v1/completions", 415, {"Content-Type": "text/plain"}),
            ("GET", "/health", 403, {"Host": "evil.example"}),
            ("GET", "/health", 403, {"Host": "127.0.0.1.evil.example:80"}),
            ("GET", "/health", 200, {"Host": "LOCALHOST:99"})):
        answer = httpx.request(method, server.url + path, headers=headers)
        assert answer.status_code == status, path
        assert "access-control-allow-origin" not in answer.headers
        assert status == 200 or answer.json()["error"]["message"]


def test_the_page_and_what_guards_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "PAGE", tmp_path / "page.html")
    answer = httpx.get(server.url + "/")
    assert answer.status_code == 404 and answer.json()["error"]
    (tmp_path / "page.html").write_text("<style>a{}</style><script>let é = 1</script>")
    answer = httpx.get(server.url + "/")
    policy = answer.headers["content-security-policy"]
    for name, text in (("style", "a{}"), ("script", "let é = 1")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_metrics(server, client):
    client.completions.create(model="tiny", prompt="SAY[abc]YAS")
    text = httpx.get(server.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["plainllama_new_tokens_total"]) >= 3
    assert float(values["plainllama_running"]) == 0
    assert float(values['plainllama_requests_total{path="/v1/completions",status="200"}']) >= 1
    client.models.retrieve("tiny")
    assert "/v1/models/" not in httpx.get(server.url + "/metrics").text  # others choose that name


def test_what_clients_write_into_their_own_books_is_taken(client):
    made = client.chat.completions.create(model="tiny", messages=say("abc"), user="me",
                                          metadata={"a": "b"}, service_tier="auto")
    assert made.choices[0].message.content == "abc"


# ---- requests as they are read, without a server

ABOUT = Model("tiny", CONTEXT, TOKENIZER, Chat(TOKENIZER))
ASKED = {"sampling": vars(Sampling()), "max_tokens": 16, "n": 1, "seed": None, "stops": [],
         "stop_ids": TOKENIZER.stop_ids, "top": None, "echo": False, "stream": False,
         "include_usage": False, "tools": False, "forced": "", "base64": False}
A, OTHER = {"role": "user", "content": "a"}, {"type": "function", "function": {"name": "sub"}}


def read(kind: str, about: Model = ABOUT, **body) -> protocol.Asked:
    needed = {"chat": {"messages": [A]}, "completions": {"prompt": "a"}, "embeddings": {
        "input": "a"}}[kind]
    return about.read(kind, json.dumps({**needed, **body}).encode())


def refusal(kind: str, about: Model = ABOUT, **body) -> tuple:
    with pytest.raises(protocol.Wrong) as caught:
        read(kind, about, **body)
    found = caught.value
    assert found.body()["error"] == {"message": str(found), "type": "invalid_request_error",
                                     "param": found.param, "code": found.code}
    return str(found), found.param, found.status, found.code


@pytest.mark.parametrize(("kind", "body", "changes"), [
    ("completions", {}, {}), ("chat", {}, {"max_tokens": CONTEXT}),
    ("embeddings", {}, {"max_tokens": 0, "stop_ids": frozenset()}),
    ("embeddings", {"encoding_format": "float", "model": "tiny"},
     {"max_tokens": 0, "stop_ids": frozenset()}),
    ("embeddings", {"encoding_format": "base64"},
     {"max_tokens": 0, "stop_ids": frozenset(), "base64": True}),
    ("completions", {"n": 3, "seed": 0, "stream": True, "stop": "x", "max_tokens": 1, "echo": True,
                     "stream_options": {"include_usage": True}, "logprobs": 0, "top_k": 3,
                     "stop_token_ids": [5]},
     {"n": 3, "seed": 0, "stream": True, "stops": ["x"], "max_tokens": 1, "echo": True,
      "include_usage": True, "top": 0, "sampling": vars(Sampling(top_k=3)),
      "stop_ids": TOKENIZER.stop_ids | {5}}),
    ("completions", {"stream": True, "stream_options": {}, "n": None, "stop": ["a", "b"]},
     {"stream": True, "stops": ["a", "b"]}),
    ("chat", {"logprobs": True}, {"max_tokens": CONTEXT, "top": 0}),
    ("chat", {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 7},
     {"max_tokens": 7, "top": 2}),
    ("chat", {"tools": [], "tool_choice": "none"}, {"max_tokens": CONTEXT}),
    ("chat", {"tools": [], "tool_choice": "auto"}, {"max_tokens": CONTEXT}),
    ("chat", {"tools": [TOOL], "tool_choice": "none"}, {"max_tokens": CONTEXT}),
    ("chat", {**protocol.NEUTRAL, "user": "me", "metadata": {}, "safety_identifier": "x",
              "prompt_cache_key": "y"}, {"max_tokens": CONTEXT})])
def test_a_request_is_read_whole(kind, body, changes):
    found = read(kind, **body)
    found.sampling = vars(found.sampling)
    prompt = [256, 259, 97, 262, 260] if kind == "chat" else [256, 97]
    assert vars(found) == {"prompts": [prompt], **ASKED, **changes}


@pytest.mark.parametrize(("kind", "body"), [
    ("completions", {"n": 128}), ("completions", {"prompt": ["a"] * 64, "n": 2}),
    ("completions", {"seed": -2**63}), ("completions", {"seed": 2**63 - 1}),
    ("completions", {"logprobs": 20}), ("chat", {"logprobs": True, "top_logprobs": 20}),
    ("completions", {"stop": "x" * 256}), ("completions", {"stop": ["a"] * 64}),
    ("completions", {"stop_token_ids": [0]}), ("completions", {"stop_token_ids": [262] * 64}),
    ("completions", {"max_tokens": CONTEXT}), ("completions", {"max_tokens": 0, "echo": True}),
    ("chat", {"max_completion_tokens": CONTEXT}), ("completions", {"prompt": "a" * 510}),
    ("embeddings", {"input": "a" * 511}), ("completions", {"prompt": ["a"] * 128}),
    ("completions", {"prompt": [0]}), ("completions", {"prompt": [[262], "a"]}),
    ("chat", {"tools": [{"name": "f", "parameters": {}}, {"name": "g"}]})])
def test_what_stands_at_a_bound_is_taken(kind, body):
    found = read(kind, **body)
    for name, value in body.items():
        if name in ("n", "seed"):
            assert getattr(found, name) == value
        if name.startswith("max_"):
            assert found.max_tokens == value
    prompt = body.get("prompt", "a")
    assert len(found.prompts) == (1 if isinstance(prompt, str) else len(prompt))


TOP = "top_logprobs is a whole number from 0 to 20, not 21"
STOP = "stop is a text of 1 to 256 characters, or a list of at most 64"
IDS = "stop_token_ids is a list of at most 64 ids"
PROMPT = "prompt is a text, a list of ids, or 1 to 128 of them"
CHOICE = ('tool_choice is "none", "auto", "required" or {"type": "function", "function": '
          '{"name": ONE OF THE TOOLS}}')
LONG = "context_length_exceeded"


@pytest.mark.parametrize(("kind", "body", "message", "param", "code"), [
    ("completions", {"n": 0}, "n is a whole number from 1 to 128, not 0", "n", None),
    ("completions", {"n": 129}, "n is a whole number from 1 to 128, not 129", "n", None),
    ("completions", {"n": True}, "n is a whole number from 1 to 128, not True", "n", None),
    ("completions", {"prompt": ["a"] * 43, "n": 3},
     "a request takes at most 128 texts, prompts times n", "n", None),
    ("completions", {"seed": -2**63 - 1}, f"seed is a whole number from {-2**63} to {2**63 - 1}, "
     f"not {-2**63 - 1}", "seed", None),
    ("completions", {"seed": 2**63}, f"seed is a whole number from {-2**63} to {2**63 - 1}, "
     f"not {2**63}", "seed", None),
    ("completions", {"logprobs": 21}, TOP.removeprefix("top_"), "logprobs", None),
    ("completions", {"logprobs": -1}, TOP[4:].replace("21", "-1"), "logprobs", None),
    ("chat", {"logprobs": True, "top_logprobs": 21}, TOP, "top_logprobs", None),
    ("chat", {"logprobs": True, "top_logprobs": -1}, TOP.replace("21", "-1"), "top_logprobs", None),
    ("chat", {"logprobs": 1}, "logprobs is true or false, not 1", "logprobs", None),
    ("chat", {"top_logprobs": 0}, "top_logprobs is for logprobs=true", "top_logprobs", None),
    *(("completions", {"stop": stop}, STOP, "stop", None) for stop in (
        "x" * 257, ["a"] * 65, [""], [1], {"a": 1}, ["a", "x" * 257])),
    *(("completions", {"stop_token_ids": ids}, IDS, "stop_token_ids", None) for ids in (
        [0] * 65, {"a": 1}, 5, "a")),
    *(("completions", {"stop_token_ids": [i]}, f"stop_token_ids: {i} is no id from 0 to 262",
       "stop_token_ids", None) for i in (-1, 263, True, "a")),
    ("completions", {"prompt": [263]}, "prompt: 263 is no id from 0 to 262", "prompt", None),
    *(("completions", {"max_tokens": value}, "max_tokens is a whole number from 1 to 512, not "
       f"{value}; the model's context has 512 tokens", "max_tokens", None) for value in (0, 513)),
    ("completions", {"max_tokens": -1, "echo": True}, "max_tokens is a whole number from 0 to 512, "
     "not -1; the model's context has 512 tokens", "max_tokens", None),
    ("chat", {"max_tokens": 1, "max_completion_tokens": 1},
     "max_tokens and max_completion_tokens are one thing: say one", "max_completion_tokens", None),
    ("completions", {"max_completion_tokens": 1}, "the field 'max_completion_tokens' is not "
     "supported", "max_completion_tokens", None),
    ("completions", {"prompt": "a" * 511}, "prompt: 512 tokens, room is for 511 in a context of "
     "512", "prompt", LONG),
    ("embeddings", {"input": "a" * 512}, "input: 513 tokens, room is for 512 in a context of 512",
     "input", LONG),
    *(("completions", {"prompt": prompt}, PROMPT, "prompt", None) for prompt in ([], ["a"] * 129)),
    *(("completions", {"prompt": prompt}, "prompt is a text, a list of ids, or a list of these",
       "prompt", None) for prompt in ([[]], [1, "a"], {"a": 1}, ["a", 1.5])),
    ("completions", {"prompt": "a" * 512 * 13}, "prompt: 6657 tokens, room is for 511 in a context "
     "of 512", "prompt", LONG),
    ("completions", {"prompt": "a" * (512 * 13 + 1)}, "prompt: 6,657 characters do not fit into a "
     "context of 512 tokens", "prompt", LONG),
    ("chat", {"messages": [A] * 513}, "messages: 513 do not fit into a context of 512 tokens",
     "messages", LONG),
    ("chat", {"messages": [A] * 512}, "messages: 1538 tokens, room is for 511 in a context of 512",
     "messages", LONG),
    ("chat", {"messages": [{"role": "user", "content": "a" * 6657}]}, "messages: 6,657 characters "
     "do not fit into a context of 512 tokens", "messages", LONG),
    *(("chat", {"messages": messages}, "messages is a list of messages, at least one", "messages",
       None) for messages in ([], "a", {"role": "user"}, 1)),
    *(("chat", {"messages": [A, each]}, f"messages: {says}", "messages", None) for each, says in (
        ({"role": "assistant", "content": "b"}, "the last message is an answer"),
        ({"role": "user"}, "a message has no content"), (5, "a message is not an object 5"),
        ({"role": "king", "content": "b"}, "unknown role 'king'"),
        ({"role": "assistant", "tool_calls": [{"x": 1}]}, "a call without a name {'x': 1}"),
        ({"role": "assistant", "content": "b", "tool_calls": [{"x": 1}]},
         "a call without a name {'x': 1}"))),
    ("chat", {"tools": {"a": 1}}, "tools is a list of functions", "tools", None),
    ("chat", {"tools": [], "tool_choice": "required"}, "tool_choice needs tools", "tool_choice",
     None),
    ("chat", {"tools": [{"name": "f", "parameters": 3}]},
     "the parameters of a function are an object", "tools", None),
    *(("chat", {"tools": [TOOL], "tool_choice": choice}, CHOICE, "tool_choice", None)
      for choice in ("add", 1, {"function": 1}, {"function": {"name": "sub"}}, {})),
    ("chat", {"stream": 1}, "stream is true or false, not 1", "stream", None),
    ("chat", {"stream_options": {}}, "stream_options is for stream=true", "stream_options", None),
    *(("chat", {"stream": True, "stream_options": options},
       'stream_options is {"include_usage": true}', "stream_options", None)
      for options in ({"include_usage": True, "a": 1}, [], 1)),
    ("chat", {"stream": True, "stream_options": {"include_usage": 1}},
     "include_usage is true or false, not 1", "include_usage", None),
    ("chat", {"temprature": 1}, "the field 'temprature' is not supported; did you mean "
     "temperature?", "temprature", None),
    ("chat", {"y" * 90: 1}, f"the field {'y' * 80!r} is not supported", "y" * 80, None),
    *(("chat", {name: value}, f"the field {name!r} is not supported", name, None)
      for name, value in (("frequency_penalty", 1), ("presence_penalty", 1), ("best_of", 2),
                          ("store", True), ("parallel_tool_calls", False),
                          ("service_tier", "flex"), ("suffix", "x"), ("logit_bias", {"5": 1}))),
    ("chat", {"top_p": 2}, "top_p is 2, must be a number, at least 0 and at most 1", "top_p", None),
    ("chat", {"top_k": -1}, "top_k is -1, must be a number, at least 0", "top_k", None),
    ("embeddings", {"encoding_format": "hex"}, "encoding_format is float or base64",
     "encoding_format", None)])
def test_what_stands_behind_a_bound_is_refused(kind, body, message, param, code):
    assert refusal(kind, **body) == (message, param, 400, code)


def test_another_model_and_one_without_dialogs_are_refused(tmp_path):
    assert refusal("chat", model="m" * 90) == (f"there is no model {'m' * 80!r}; there is 'tiny'",
                                               "model", 404, "model_not_found")
    plain = Model("plain", 9, TOKENIZER, None)
    assert refusal("chat", plain) == (
        "this model was not tuned on dialogs: use /v1/completions", "messages", 400, None)
    cards = [about.card() for about in (plain, ABOUT)]
    assert abs(cards[0].pop("created") - time.time()) < 600 and cards[1].pop("created")
    assert cards == [{"id": name, "object": "model", "owned_by": "plainllama", "chat": chat,
                      "context_length": size} for name, size, chat in (("plain", 9, False),
                                                                       ("tiny", CONTEXT, True))]
    other = words("bytes", "inst", tmp_path)
    other.template = template_of("inst")
    theirs = Model("tiny", CONTEXT, other, ModelChat(other, other.template))
    assert (theirs.calls, ABOUT.calls) == (False, True)
    assert read("chat", theirs, tools=[TOOL], tool_choice="none").tools is False
    assert refusal("chat", theirs, tools=[TOOL]) == (
        "tools: the template of this model writes calls otherwise than in <tool_call>, so that "
        "they would not be found", "tools", 400, None)
    other.template += "<tool_call>"
    assert Model("tiny", CONTEXT, other, None).calls is True
    for status, kind in ((499, "invalid_request_error"), (500, "server_error"),
                         (501, "server_error")):
        assert protocol.Wrong("x", status=status).body()["error"]["type"] == kind


def test_a_talk_is_read_as_its_messages():
    chat, brief = Chat(TOKENIZER), {"role": "system", "content": "Be brief."}
    empty, blank = {"role": "system", "content": " "}, {"role": "user", "content": " "}
    half = {"role": "assistant", "content": "<tool_call>\nhalf"}
    for messages, wanted in (([brief, A], [brief, A]), ([empty, A], [A]), ([blank, A], [blank, A]),
                             ([brief, blank], [brief, blank]), ([half, A], None)):
        [found] = read("chat", messages=messages).prompts
        assert found == (chat.prompt(wanted) if wanted else [
            256, 260, *half["content"].encode(), 262, 259, 97, 262, 260])
    plain = chat.prompt([A])
    both = [TOOL, OTHER]
    for tools, choice, forced in (
            ([TOOL], None, ""), ([TOOL], "auto", ""), (both, "required", "<tool_call>\n"),
            ([TOOL], "required", '<tool_call>\n{"name": "add", "arguments": '),
            (both, OTHER, '<tool_call>\n{"name": "sub", "arguments": ')):
        found = read("chat", tools=tools, tool_choice=choice)
        assert (found.tools, found.forced) == (True, forced)
        offered = chat.prompt([A], [tool["function"] for tool in tools])
        assert found.prompts == [offered + list(forced.encode())] != [plain]
    assert read("chat", tools=[TOOL], tool_choice="none").prompts == [plain]


@pytest.mark.parametrize(("raw", "message"), [
    (b"\xff", "the body is not UTF-8"), (b'{"prompt": "\\ud800"}', "the body is not UTF-8"),
    (b"[]", "the body is not a JSON object"), (b"{", "the body is not JSON: Expecting property name"
     " enclosed in double quotes: line 1 column 2 (char 1)"),
    (b'{"a": NaN}', "the body is not JSON: NaN is no JSON")])
def test_what_is_no_json_is_said(raw, message):
    with pytest.raises(protocol.Wrong) as caught:
        protocol.parsed(raw)
    assert (str(caught.value), caught.value.status) == (message, 400)
    assert protocol.parsed('{"a": "é"}'.encode()) == {"a": "é"}


def test_scores_calls_and_vectors_are_written_as_openai_does():
    scores = [Score(97, -0.5, [(98, -0.25), (195, -math.inf)]), Score(257, -math.inf, [])]
    low = {"token": "</s>", "logprob": -9999.0, "bytes": list(b"</s>")}
    assert ABOUT.logprobs_of_chat(scores) == {"refusal": None, "content": [
        {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
            {"token": "b", "logprob": -0.25, "bytes": [98]},
            {"token": "bytes:\\xc3", "logprob": -9999.0, "bytes": [195]}]},
        low | {"top_logprobs": []}]}
    assert ABOUT.logprobs_of_text([None, *scores], [256, 97, 257], 5) == {
        "tokens": ["<s>", "a", "</s>"], "text_offset": [5, 8, 9],
        "token_logprobs": [None, -0.5, -9999.0],
        "top_logprobs": [None, {"b": -0.25, "bytes:\\xc3": -9999.0}, {}]}
    calls = [{"name": "f", "arguments": {"a": "é"}}, {"name": "g", "arguments": {}}]
    whole, stream = (protocol.calls_of(calls, stream) for stream in (False, True))
    ids = [call.pop("id") for call in (*whole, *stream)]
    assert len(set(ids)) == 4 and all(re.fullmatch("call_[0-9a-f]{24}", each) for each in ids)
    assert whole == [{"type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}},
                     {"type": "function", "function": {"name": "g", "arguments": "{}"}}]
    assert stream == [{"index": i} | call for i, call in enumerate(whole)]
    assert protocol.vector([1.0, -2.5], False) == [1.0, -2.5]
    assert protocol.vector([1.0, -2.5], True) == base64.b64encode(
        b"\0\0\x80\x3f\0\0\x20\xc0").decode()


# ---- answers as they come

def answered(text: str, *, stops=(), chat=True, forced="", reason="eos", tokenizer=TOKENIZER
             ) -> list[tuple]:
    """(text, numbers of scores, calls, reason) of the parts that are told of a text."""
    parts: list = []
    answer = Answer(tokenizer, [256, 260], list(stops), parts.append,
                    Chat(tokenizer) if chat else None, list(forced.encode()))
    for i, token in enumerate(text.encode()):
        if answer.heard(token, Score(token, -float(i), [])):
            reason = "stop"
            break
    answer.ended(reason)
    return [(part.text, len(part.scores), part.calls, part.ended) for part in parts]


ADD = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
ADDED = [{"name": "add", "arguments": {}}]


@pytest.mark.parametrize(("text", "options", "parts"), [
    ("ab", {}, [("a", 1, [], ""), ("b", 1, [], ""), ("", 0, [], "stop")]),
    ("é", {}, [("é", 2, [], ""), ("", 0, [], "stop")]),
    ("a", {"reason": "length"}, [("a", 1, [], ""), ("", 0, [], "length")]),
    ("a", {"reason": "error: x"}, [("a", 1, [], ""), ("", 0, [], "error: x")]),
    ("aEN", {"stops": ["END"]}, [("a", 1, [], ""), ("EN", 2, [], "stop")]),
    ("aENDb", {"stops": ["END"], "reason": "length"}, [("a", 1, [], ""), ("", 3, [], "stop")]),
    ("a\n" + ADD, {}, [("a", 1, [], ""), ("", 1 + len(ADD), ADDED, "tool_calls")]),
    (ADD, {}, [("", len(ADD), ADDED, "tool_calls")]),
    (ADD, {"reason": "length"}, [("", len(ADD), ADDED, "length")]),
    (ADD + "x", {}, [(ADD + "x", len(ADD) + 1, [], "stop")]),
    ("<tool_call>\nno", {}, [("<tool_call>\nno", 14, [], "stop")]),
    ("<x", {}, [("<x", 2, [], ""), ("", 0, [], "stop")]),
    ("<x", {"chat": False}, [("<", 1, [], ""), ("x", 1, [], ""), ("", 0, [], "stop")]),
    (ADD[44:], {"forced": ADD[:44]}, [("", len(ADD) - 44, ADDED, "tool_calls")]),
    ("a", {"forced": "b"}, [("ba", 1, [], ""), ("", 0, [], "stop")]),
])
def test_the_parts_of_an_answer(text, options, parts):
    assert answered(text, **options) == parts


def test_a_call_within_a_thought_is_none():
    thought = f"<think>\n{ADD}\n</think>\n\nYes.\n"
    found = answered(thought + ADD)
    assert "".join(part[0] for part in found) == thought.removesuffix("\n")
    assert found[-1][2:] == (ADDED, "tool_calls")


def test_how_tokens_are_spelled(tmp_path):
    spelling = Spelling(TOKENIZER)
    assert [spelling.text_of(i) for i in (97, 257, 195, 999)] == ["a", "</s>", "bytes:\\xc3", ""]
    assert spelling.longest() == len("<|assistant|>")
    metaspace = Spelling(made("first"))
    ids = {piece: i for i, piece in metaspace.pieces.items()}
    assert {piece: metaspace.bytes_of(ids[piece]) for piece in (
        "<0xE2>", "<0x0A>", "▁the", "th", "</s>", "a")} == {
        "<0xE2>": b"\xe2", "<0x0A>": b"\n", "▁the": b" the", "th": b"th", "</s>": b"</s>",
        "a": b"a"}
    level = Spelling(make_tokenizer("bpe:300", lambda: ["the quick brown fox " * 9] * 9))
    assert level.byte_level and not metaspace.byte_level
    ids = {piece: i for i, piece in level.pieces.items()}
    assert (level.bytes_of(ids["Ġ"]), level.bytes_of(ids["Ã"])) == (b" ", b"\xc3")
    every = "".join(level.pieces[i] for i in range(len(level.pieces)) if i not in level.special)
    level.pieces[999], level.pieces[998] = every, "Ġ▁"  # every byte; one that is none
    assert set(level.bytes_of(999)) == set(range(256)) and level.bytes_of(998) == "Ġ ".encode()


# ---- replies as JSON

class Few:
    """What a Reply needs of the batch: parts that come when it is asked for them."""

    def __init__(self, kind: str, parts: list[tuple[int, Part]], about: Model = ABOUT, **body):
        self.kind, self.parts, self.about, self.body = kind, parts, about, body

    def tried(self, way) -> Any:
        async def work():
            reply = Reply(self.about, self.kind, read(self.kind, self.about, **self.body))
            for number, part in self.parts:
                if part.text:
                    reply.texts[number].new += part.text.encode()
                reply.queue.put_nowait((number, part))
            return await way(reply)
        return asyncio.run(work())

    def whole(self) -> dict:
        async def way(reply):
            await reply.gathered()
            body = reply.body()
            assert re.fullmatch("(cmpl|chatcmpl)-[0-9a-f]{24}", body.pop("id"))
            assert abs(body.pop("created") - time.time()) < 600
            return body
        return self.tried(way)

    def chunks(self) -> list[dict]:
        async def way(reply):
            found = [chunk async for chunk in reply.chunks()]
            assert len({(chunk.pop("id", ""), chunk.pop("created", "")) for chunk in found
                        if "error" not in chunk}) < 2
            return found
        return self.tried(way)


END = Part("", [], [], "stop")
B = Score(98, -0.5, [])
HEAD = {"object": "text_completion", "model": "tiny"}
TALK = {"object": "chat.completion", "model": "tiny"}
PIECE = {"object": "chat.completion.chunk", "model": "tiny"}


def used(prompt: int, new: int, cached: int = 0) -> dict:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens":
                      prompt + new, "prompt_tokens_details": {"cached_tokens": cached}}}


def test_a_whole_completion():
    parts = [(1, Part("x", [], [], "")), (0, Part("b", [B], [], "")), (1, END), (0, END)]
    assert Few("completions", parts, n=2).whole() == HEAD | used(2, 2) | {"choices": [
        {"index": i, "text": text, "finish_reason": "stop", "logprobs": None}
        for i, text in enumerate("bx")]}
    found = Few("completions", parts[1::2], echo=True, logprobs=0)

    async def way(reply):
        reply.texts[0].prompt_scores, reply.texts[0].cached = [Score(97, -1.0, [])], 3
        await reply.gathered()
        return reply.body()

    body = found.tried(way)
    assert body["usage"] == used(2, 1, 3)["usage"]
    assert body["choices"] == [{"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": {
        "tokens": ["<s>", "a", "b"], "text_offset": [0, 3, 4],
        "token_logprobs": [None, -1.0, -0.5], "top_logprobs": [None, {}, {}]}}]
    found.body["echo"] = False
    assert found.whole()["choices"][0]["logprobs"]["tokens"] == ["b"]


def test_a_whole_talk():
    call = [{"name": "add", "arguments": {}}]
    parts = [(0, Part("b", [B], [], "")), (0, END), (1, Part("", [], call, "tool_calls")),
             (2, Part("see", [], call, "tool_calls"))]
    found = Few("chat", parts, n=3, logprobs=True).whole()
    calls = [each["message"].pop("tool_calls", None) for each in found["choices"]]
    for each in calls[1:]:
        each[0].pop("id")
        assert each == [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    assert calls[0] is None
    scored = {"refusal": None, "content": [{"token": "b", "logprob": -0.5, "bytes": [98],
                                            "top_logprobs": []}]}
    assert found == TALK | used(5, 4) | {"choices": [
        {"index": i, "message": {"role": "assistant", "content": text, "refusal": None},
         "finish_reason": why, "logprobs": scored if i == 0 else {"refusal": None, "content": []}}
        for i, (text, why) in enumerate([("b", "stop"), (None, "tool_calls"),
                                         ("see", "tool_calls")])]}


def test_chunks_of_a_completion():
    parts = [(0, Part("b", [B], [], "")), (1, Part("c", [], [], "")), (0, Part("d", [B], [], "")),
             (0, END), (1, END)]
    found = Few("completions", parts, n=2, stream=True, echo=True, logprobs=0, stream_options={
        "include_usage": True}).chunks()
    choices = [chunk["choices"][0] for chunk in found[:-1]]
    assert [(each["index"], each["text"], each["finish_reason"]) for each in choices] == [
        (0, "ab", None), (1, "ac", None), (0, "d", None), (0, "", "stop"), (1, "", "stop")]
    assert [each["logprobs"]["tokens"] for each in choices] == [
        ["<s>", "a", "b"], ["<s>", "a"], ["b"], [], []]
    assert [each["logprobs"]["text_offset"] for each in choices] == [[0, 3, 4], [0, 3], [2], [], []]
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion"
               for chunk in found[:-1])
    assert found[-1] == HEAD | {"choices": []} | used(2, 3)
    assert Few("completions", parts[:1] + parts[3:4], stream=True).chunks() == [
        HEAD | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": why}]}
        for text, why in (("b", None), ("", "stop"))]


def test_chunks_of_a_talk():
    call = [{"name": "add", "arguments": {}}]
    parts = [(0, Part("b", [], [], "")), (0, Part("", [B], [], "")),
             (0, Part("", [], call, "tool_calls"))]
    found = Few("chat", parts, stream=True, logprobs=True).chunks()
    assert all({name: chunk[name] for name in PIECE} == PIECE and "usage" not in chunk
               for chunk in found)
    [choices] = [[chunk["choices"][0] for chunk in found]]
    choices[3]["delta"]["tool_calls"][0].pop("id")
    scored = {"refusal": None, "content": [{"token": "b", "logprob": -0.5, "bytes": [98],
                                            "top_logprobs": []}]}
    assert choices == [{"index": 0, "delta": delta, "finish_reason": why, "logprobs": scores}
                       for delta, why, scores in (
        ({"role": "assistant", "content": ""}, None, None), ({"content": "b"}, None, None),
        ({"content": ""}, None, scored), ({"tool_calls": [{
            "index": 0, "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
            None, None), ({}, "tool_calls", None))]


def test_a_problem_within_ends_a_stream():
    parts = [(0, Part("b", [], [], "")), (1, Part("", [], [], "error: no memory")), (0, END)]
    found = Few("completions", parts, n=2, stream=True, stream_options={
        "include_usage": True}).chunks()
    assert len(found) == 2 and found[-1] == {"error": {
        "message": "no memory", "type": "server_error", "param": None, "code": None}}


def test_what_a_reply_asks_of_the_batch():
    def texts(kind, **body):
        async def way(reply):
            return reply
        return Few(kind, [], **body).tried(way).texts

    first, second = texts("completions", n=2, seed=5, max_tokens=9, temperature=0.5, logprobs=1,
                          stop_token_ids=[7])
    assert (first.seed, second.seed) == (generate.row_seed(5, 0), generate.row_seed(5, 1))
    for text in (first, second):
        assert (text.ids, text.room, text.top, text.score_prompt, text.pool) == (
            [256, 97], 9, 1, False, False)
        assert text.sampling.temperature == 0.5 and text.stop_ids == TOKENIZER.stop_ids | {7}
        assert text.listener.chat is None
    for body, scores in (({"echo": True}, False), ({"echo": True, "logprobs": 0}, True)):
        assert texts("completions", **body)[0].score_prompt is scores
    [text] = texts("completions", prompt="a" * 500, max_tokens=100)
    assert text.room == CONTEXT - 501
    [text] = texts("chat", tools=[TOOL], tool_choice="required")
    assert text.listener.chat is ABOUT.chat and text.listener.stream.text.startswith(
        '<tool_call>\n{"name": "add"')
    [text] = texts("embeddings")
    assert (text.room, text.pool, text.top) == (0, True, None)
    assert text.listener.heard(5, None) is True  # nothing is drawn for it
    seeds = {texts("completions")[0].seed for _ in range(3)}
    assert len(seeds) == 3


# ---- the service, the batch and its slots by direct calls

def request_of(path="/v1/models", method="GET", pieces=(), **headers) -> Request:
    async def receive():
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        return {"type": "http.disconnect"}

    left = list(pieces)
    return Request({"type": "http", "path": path, "method": method, "query_string": b"",
                    "headers": [(name.replace("_", "-").encode(), value.encode())
                                for name, value in headers.items()]}, receive)


def idle_service(host="127.0.0.1", key="", running=0, waiting=0, chat=True) -> serving.Service:
    """A service over a batch that has counted and does nothing."""
    counts = {"prompt_tokens": 1, "cached_tokens": 2, "new_tokens": 3, "cancelled": 4,
              "seconds_to_first_tokens": 0.5, "first_tokens": 6}
    batch = SimpleNamespace(load=lambda: (running, waiting), counts=counts, queue=7, close=list,
                            slots=SimpleNamespace(all=[1, 2]))
    about = Model("tiny", CONTEXT, TOKENIZER, Chat(TOKENIZER) if chat else None)
    return serving.Service(about, batch, host, "", key)


@pytest.mark.parametrize(("host", "key", "asked", "status"), [
    ("127.0.0.1", "", {"host": "localhost:80"}, 200), ("localhost", "", {"host": "[::1]:80"}, 200),
    ("127.0.0.1", "", {"host": "127.0.0.1"}, 200), ("127.0.0.1", "", {"host": "a"}, 403),
    ("127.0.0.1", "", {}, 403), ("0.0.0.0", "", {"host": "a"}, 200), ("0.0.0.0", "", {}, 200),
    ("a", "", {"host": "b"}, 200), ("a", "k", {}, 401), ("a", "k", {"authorization": "k"}, 401),
    ("a", "k", {"authorization": "Bearer k"}, 200), ("a", "k", {"path": "/"}, 200),
    ("a", "k", {"path": "/health"}, 200), ("a", "k", {"path": "/metrics"}, 401),
    ("a", "k", {"method": "OPTIONS"}, 200),
    ("127.0.0.1", "k", {"host": "a", "authorization": "Bearer k"}, 403)])
def test_who_is_admitted(host, key, asked, status):
    service = idle_service(host, key)
    if status == 200:
        assert service.admit(request_of(**asked)) is None
        return
    with pytest.raises(protocol.Wrong) as caught:
        service.admit(request_of(**asked))
    found = caught.value
    said = {403: (f"this server is not {asked.get('host', '')!r}: ask for 127.0.0.1, or start it "
                  "with --host", None, None),
            401: ("Authorization: Bearer with the key in the server's PLAINLLAMA_API_KEY is needed",
                  "invalid_api_key", {"WWW-Authenticate": "Bearer"})}
    assert (str(found), found.code, found.headers) == said[status] and found.status == status


def test_what_is_only_looked_at(tmp_path, monkeypatch):
    def said(work) -> tuple[int, Any]:
        answer = asyncio.run(work)
        return answer.status_code, json.loads(answer.body)

    service = idle_service(running=8, waiting=9)
    request = request_of()
    assert said(service.health(request)) == (200, {"status": "ok"})
    assert said(service.models(request)) == (200, {"object": "list",
                                                   "data": [service.model.card()]})
    request.scope["path_params"] = {"name": "tiny"}
    assert said(service.models(request)) == (200, service.model.card())
    request.scope["path_params"] = {"name": "n" * 90}
    with pytest.raises(HTTPException, match=f"^404: there is no model '{'n' * 80}'$"):
        asyncio.run(service.models(request))
    service.statuses.update({("/health", 200): 2, ("other", 404): 1})
    answer = asyncio.run(service.metrics(request))
    assert answer.body.decode() == "".join(
        f"# TYPE plainllama_{name} {kind}\nplainllama_{name} {value}\n" for name, kind, value in (
            ("running", "gauge", 8), ("waiting", "gauge", 9), ("prompt_tokens_total", "counter", 1),
            ("prompt_tokens_cached_total", "counter", 2), ("new_tokens_total", "counter", 3),
            ("cancelled_total", "counter", 4), ("time_to_first_token_seconds_sum", "counter", 0.5),
            ("time_to_first_token_seconds_count", "counter", 6))
    ) + ("# TYPE plainllama_requests_total counter\n"
         'plainllama_requests_total{path="/health",status="200"} 2\n'
         'plainllama_requests_total{path="other",status="404"} 1\n')
    assert answer.media_type == "text/plain; version=0.0.4; charset=utf-8"
    service.draining = True
    assert said(service.health(request)) == (503, {"status": "ending"})
    monkeypatch.setattr(serving, "PAGE", tmp_path / "page.html")
    with pytest.raises(HTTPException, match=r"^404: there is no page; the endpoints"):
        asyncio.run(service.page(request))
    assert "script-src 'none'; style-src 'none';" in serving.guards("<p>")[
        "Content-Security-Policy"]
    for error, says, status in (
            (HTTPException(404), "there is no /v1/models; the endpoints are under /v1", 404),
            (HTTPException(404, "no such"), "no such", 404),
            (HTTPException(405, headers={"Allow": "GET"}), "/v1/models does not take GET", 405),
            (HTTPException(406), "Not Acceptable", 406)):
        answer = asyncio.run(serving.not_there(request, error))
        assert (answer.status_code, answer.headers.get("allow")) == (
            status, "GET" if status == 405 else None)
        assert json.loads(answer.body)["error"]["message"] == says
    found = said(serving.broken(request, ValueError("secret")))
    assert (found[0], found[1]["error"]["message"]) == (500, "ValueError in the server")


def test_a_body_has_a_largest_size(monkeypatch):
    def taken(size: int, **headers) -> int:
        pieces = [b"a" * (size // 2), b"a" * (size - size // 2)]
        return len(asyncio.run(serving.read_body(request_of(pieces=pieces, **headers))))

    for size in (0, 2 * 1024**2):
        assert taken(size) == taken(size, content_length=str(size)) == size
    assert taken(5, content_length="x") == 5
    for size, headers in ((2 * 1024**2 + 1, {}), (5, {"content_length": str(2 * 1024**2 + 1)})):
        with pytest.raises(protocol.Wrong, match=r"^the body has more than 2,097,152 bytes") as it:
            taken(size, **headers)
        assert (it.value.status, it.value.headers) == (413, {"Connection": "close"})


@pytest.mark.parametrize(("where", "options", "said"), [
    (("127.0.0.1", 80), {}, "serving tiny on http://127.0.0.1:80/v1: chat and completions, a "
     "context of 512 tokens, 2 texts side by side\nin a browser: http://127.0.0.1:80\n"),
    (("::1", 80, 0, 0), {"key": "k", "chat": False}, "serving tiny on http://[::1]:80/v1: "
     "completions, no chat, a context of 512 tokens, 2 texts side by side, with the key of "
     "PLAINLLAMA_API_KEY\nin a browser: http://[::1]:80\n"),
    (("0.0.0.0", 9), {"host": "0.0.0.0"}, "serving tiny on http://0.0.0.0:9/v1: chat and "
     "completions, a context of 512 tokens, 2 texts side by side\nwhoever reaches this machine may "
     "ask: PLAINLLAMA_API_KEY in the environment is a key to ask for\nin a browser: "
     "http://0.0.0.0:9\n"),
    (("0.0.0.0", 9), {"host": "0.0.0.0", "key": "k"}, "serving tiny on http://0.0.0.0:9/v1: chat "
     "and completions, a context of 512 tokens, 2 texts side by side, with the key of "
     "PLAINLLAMA_API_KEY\nin a browser: http://0.0.0.0:9\n")])
def test_what_a_server_says_of_itself(monkeypatch, capsys, where, options, said):
    monkeypatch.setattr(serving.Server, "run", lambda self, sockets: None)
    assert serving.serve(idle_service(**options), SimpleNamespace(getsockname=lambda: where)) == 0
    assert capsys.readouterr().out == said


def test_a_server_ends_once_nothing_is_answered(monkeypatch, capsys):
    monkeypatch.setattr(serving.uvicorn.Server, "on_tick", lambda *_: asyncio.sleep(0, False))
    service = idle_service()
    server = serving.Server(service)
    assert not asyncio.run(server.on_tick(1))
    server.handle_exit(signal.SIGTERM, None)
    assert capsys.readouterr().out == "SIGTERM: the server ends, nothing was running\n"
    assert asyncio.run(server.on_tick(1))
    service.answering = 1
    assert not asyncio.run(server.on_tick(1))
    monkeypatch.setattr(serving.uvicorn.Server, "on_tick", lambda *_: asyncio.sleep(0, True))
    assert asyncio.run(server.on_tick(1))
    assert (server.config.timeout_keep_alive, server.config.h11_max_incomplete_event_size,
            server.config.backlog, server.config.server_header) == (30, 65536, 64, False)
    assert (connections.HEAD_SECONDS, connections.TAKEN_SECONDS) == (30, 60)
    assert (serving.BODY_SECONDS, serving.END_SECONDS, serving.ALIVE_SECONDS) == (30, 10, 5)


def test_connections_leave_half_of_the_files_to_others(monkeypatch):
    for files, most in ((resource.RLIM_INFINITY, 1000), (10**6, 1000), (2002, 1000), (1999, 999),
                        (100, 50)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, 10**9))
        assert runpy.run_path(connections.__file__)["MOST"] == most


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_no_http_is_refused_unless_an_answer_has_begun(begun):
    said: list = []
    conn = h11.Connection(h11.SERVER)
    if begun:
        conn.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        conn.next_event()
        conn.send(h11.Response(status_code=200, headers=[("Content-Length", "5")]))
    transport = SimpleNamespace(write=said.append, close=lambda: said.append(b"closed"))
    connections.Connection.send_400_response(SimpleNamespace(conn=conn, transport=transport), "Bad")
    head, _, body = b"".join(said).partition(b"\r\n\r\n")
    if begun:
        assert said == [b"closed"]
        return
    body, _, end = body.rpartition(b"closed")
    error = {"message": "Bad", "type": "invalid_request_error", "param": None, "code": None}
    assert json.loads(body) == {"error": error} and end == b""
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 400 Bad Request", b"Content-Type: application/json",
        f"Content-Length: {len(body)}".encode(), b"Connection: close"]


@pytest.fixture
def still():
    """A batch of 3 places and a queue of 4 whose thread has ended: nothing happens by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(slots.PIECES, "cpu", 16)
        batch = Batch(tiny(block_size=CONTEXT), 258, 3, 4)
        batch.close()
        yield batch


def told(*, stop=False) -> SimpleNamespace:
    listener = SimpleNamespace(reasons=[], tokens=[], ended=lambda why: listener.reasons.append(
        why), heard=lambda token, score: listener.tokens.append((token, score)) or stop)
    return listener


def ask(ids=(256, 1), room=5, stop=False, **how) -> Text:
    return Text(list(ids), room, told(stop=stop), **how)


def test_what_a_text_is_unless_it_says_so():
    found = vars(Text([1], 2, None))
    assert time.monotonic() - found.pop("asked_at") < 600
    assert found == {
        "ids": [1], "room": 2, "listener": None, "sampling": Sampling(), "seed": 0,
        "stop_ids": frozenset(), "top": None, "score_prompt": False, "pool": False, "gone": False,
        "cached": 0, "new": [], "prompt_scores": [], "state": None, "slot": None, "draws": None,
        "seen": None}


def test_the_queue_takes_as_many_as_it_has_room_for(still):
    first, second, third = [ask(), ask()], [ask()], [ask()]
    still.add(first), still.add(second), still.add(third)
    assert still.load() == (0, 4)
    with pytest.raises(Full):
        still.add([ask()])
    assert [still.next() for _ in range(4)] == [first[0], second[0], third[0], first[1]]
    with pytest.raises(Full):
        still.add([ask()] * 5)
    assert still.load() == (0, 0)
    still.add([ask()] * 4)


def test_who_has_gone_leaves_the_others(still):
    waiting, running = [ask(), ask(), ask()], [ask(), ask()]
    still.add(waiting[:2]), still.add(waiting[2:])
    for text in running:
        text.slot = still.slots.take(text.ids)
    still.begun, still.running = ask(), list(running)
    still.begun.slot = still.slots.take([256])
    still.leave_gone()
    assert still.load() == (3, 3) and still.counts["cancelled"] == 0 and still.begun
    still.cancel([waiting[0], waiting[2], running[0]])
    still.leave_gone()
    assert [list(texts) for texts in still.waiting] == [[waiting[1]]] and still.begun
    assert still.running == running[1:] and running[0].slot is None and running[1].slot
    assert still.load() == (2, 1) and still.counts["cancelled"] == 3
    still.cancel([still.begun])
    still.leave_gone()
    assert still.begun is None and still.load() == (1, 1) and still.counts["cancelled"] == 4


@pytest.mark.parametrize(("lengths", "fed"), [([15, 1, 4], 2), ([8, 7, 1], 3), ([16, 1], 1),
                                              ([40], 0), ([5, 5, 5], 3)])
def test_a_turn_feeds_as_many_tokens_as_a_piece_has(still, lengths, fed):
    texts = [ask([256, *range(n, n + length - 1)]) for n, length in enumerate(lengths)]
    still.add(texts)
    with torch.no_grad():
        still.feed()
    assert [len(text.new) for text in texts] == [1] * fed + [0] * (len(texts) - fed)
    assert still.running == texts[:fed] and still.counts["first_tokens"] == fed
    assert 0 <= still.counts["seconds_to_first_tokens"] < 600
    if fed == 0:
        assert still.begun is texts[0] and texts[0].slot.length == 16
        texts[0].gone = True
        still.feed()
        assert texts[0].slot.length == 16


def test_how_a_text_ends_and_what_is_counted(still):
    some = [ask(room=1), ask(room=2, stop=True), ask(room=3, stop_ids=frozenset(range(300))),
            ask(room=0), ask(room=2)]
    with torch.no_grad():
        for text in some:
            still.begun = text
            assert still.feed_piece(text) == 2 and still.begun is None
    assert [text.listener.reasons for text in some] == [["length"], ["stop"], ["eos"], ["length"],
                                                       []]
    assert [len(text.new) for text in some] == [1, 1, 0, 0, 1] and still.running == some[4:]
    assert still.load() == (1, 0)
    assert {name: still.counts[name] for name in ("prompt_tokens", "new_tokens", "first_tokens",
                                                  "cached_tokens")} == {
        "prompt_tokens": 8, "new_tokens": 2, "first_tokens": 4, "cached_tokens": 0}
    with torch.no_grad():
        still.decode()
        still.decode()
    assert some[4].listener.reasons == ["length"] and still.load() == (0, 0)
    assert [token for token, _ in some[4].listener.tokens] == some[4].new and len(some[4].new) == 2
    assert still.counts["new_tokens"] == 4


def test_a_prompt_that_is_scored_or_pooled_is_computed_whole(still):
    ids = [256, *range(40)]
    found = []
    with torch.no_grad():
        for how in ({}, {}, {"score_prompt": True}, {"score_prompt": True, "top": 2},
                    {"pool": True}, {"pool": True}):
            still.begun = text = ask(ids, room=0, **how)
            while still.begun:
                still.feed_piece(text)
            found.append(text)
    assert [text.cached for text in found] == [0, 32, 0, 0, 0, 0]
    assert still.counts["cached_tokens"] == 32
    scores = [text.prompt_scores for text in found]
    assert [len(each) for each in scores] == [0, 0, 40, 40, 0, 0]
    assert [score.logprob for score in scores[2]] == [score.logprob for score in scores[3]]
    assert {len(score.top) for score in scores[2]} == {0}
    assert {len(score.top) for score in scores[3]} == {2}
    assert [text.state is None for text in found] == [True] * 4 + [False] * 2
    assert found[4].state.equal(found[5].state)


def test_a_score_is_a_log_probability():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + 3
    found = scored(logits, 2, 2)
    assert found.token == 2 and found.logprob == pytest.approx(math.log(0.125))
    assert [token for token, _ in found.top] == [0, 1]
    assert [value for _, value in found.top] == pytest.approx([math.log(0.5), math.log(0.25)])
    assert len(scored(logits, 0, 9).top) == 4 and scored(logits, 0, 0).top == []


def test_what_goes_wrong_within_is_said_of_the_text_alone(still):
    assert problem(torch.OutOfMemoryError("x")) == (
        "error: the device has no memory for this text now; ask again later")
    assert problem(ValueError("x")) == "error: ValueError: x"

    def fails(*_):
        raise ValueError("planted")

    good, bad, lost = ask(), ask(), ask()
    bad.listener.heard = fails
    row = torch.zeros(1, 264)
    still.draw([good, bad, lost], torch.cat([row, row, row + torch.nan]))
    assert still.running == [good] and not good.listener.reasons
    assert bad.listener.reasons == ["error: ValueError: planted"]
    assert lost.listener.reasons == [f"error: {generate.NOT_FINITE}"] and lost.new == []
    good.listener.ended = bad.listener.ended = None
    still.slots.step = fails
    for text in (good, lost):
        text.slot, text.new = still.slots.take([256, 1]), [5]
    good.listener = told()
    still.running = [good, lost]
    still.decode()
    assert good.listener.reasons == ["error: ValueError: planted"] and still.running == []
    assert still.load() == (0, 0)


# ---- places

def test_a_place_grows_by_blocks():
    slot = slots.Slot(tiny(block_size=CONTEXT))
    assert (slot.kv.shape, slot.busy, slot.length, slot.kept) == ((2, 2, 2, 0, 8), False, 0, [])
    for length, size in ((1, 256), (256, 256), (257, 512), (512, 512), (300, 512)):
        slot.make_room(length)
        assert slot.kv.shape == (2, 2, 2, size, 8)


def test_what_a_place_shares_with_a_prompt_is_whole_pieces(monkeypatch):
    assert PIECE_SIZES == {"cpu": 64, "cuda": 512}  # by which answers count what was cached
    monkeypatch.setitem(slots.PIECES, "cpu", 4)
    some = slots.Slots(tiny(), 1)
    [slot] = some.all
    slot.kept = list(range(8))
    for ids, shared in ((range(9), 8), (range(8), 4), (range(5), 4), (range(4), 0), ([], 0),
                        (range(20), 8), ([0, 1, 2, 3, 4, 5, 6, 9, 9, 9], 4),
                        ([9, 1, 2, 3, 4, 5, 6, 7, 8], 0)):
        assert some.shared(slot, list(ids)) == shared, ids


def test_which_place_a_text_gets(monkeypatch):
    monkeypatch.setitem(slots.PIECES, "cpu", 4)
    some = slots.Slots(tiny(block_size=CONTEXT), 3)
    first, second, third = some.all

    def take(ids, **how) -> tuple:
        slot = some.take(list(ids), **how)
        assert slot.busy and slot.kept == list(ids)[:slot.length]
        return some.all.index(slot), slot.length

    assert take(range(9)) == (1, 0)
    some.feed(second, [0, 1, 2, 3]), some.feed(second, [4, 5, 6, 7]), some.feed(second, [8])
    assert second.kept == list(range(8)) and second.length == 9
    kept = second.kv[:, :, :, :8].clone()
    assert take([7]) == (2, 0) and take([7]) == (0, 0) and not some.free()
    some.release(first), some.release(third), some.release(second)
    assert some.free()
    assert take(range(9), reuse=False) == (0, 0)  # the first that was given back
    some.release(first)
    assert take(range(9)) == (1, 8)  # all that it keeps: it goes on itself
    assert take(range(9)) == (2, 8) and third.kv[:, :, :, :8].equal(kept)  # of a busy one a copy
    some.release(second), some.release(third)
    second.kept, third.kept, first.kept = list(range(8)), [9] * 4, [9] * 4
    assert take(range(6)) == (0, 4) and second.kept == list(range(8))  # it may be asked for again
    assert first.kv[:, :, :, :4].equal(kept[:, :, :, :4])
    third.busy = True
    assert take(range(6)) == (1, 4)  # the only one that is free
    some.release(second)
    assert take([77]) == (1, 0)


def test_a_piece_is_kept_if_it_is_whole_and_follows(monkeypatch):
    monkeypatch.setitem(slots.PIECES, "cpu", 4)
    some = slots.Slots(tiny(), 1)
    slot = some.take([1])
    for ids, kept in (([1, 2, 3, 4], 4), ([5, 6, 7], 4), ([8, 9, 10, 11], 4)):
        some.feed(slot, ids)
        assert slot.kept == [1, 2, 3, 4][:kept]
    assert slot.length == 11


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1}, {"n_kv_head": 4},
                                     {"tie_embeddings": True}])
def test_slots_compute_what_the_model_does(changes):
    """Pieces of every small size, growth within a prompt and within a step, unlike lengths."""
    reference = tiny(block_size=CONTEXT, **changes)
    ids = torch.randint(258, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    some = slots.Slots(tiny(block_size=CONTEXT, **changes), 3)
    packed = [name for name, module in some.model.named_modules() if "forward" in vars(module)]
    assert len(packed) == 15 and (some.model.lm_head.weight is not None) == (
        "tie_embeddings" in changes)
    texts = [(ids, [1, 2, 3, 4, 244]), (ids[100:], [2, 2, 5]), (ids[50:], [1])]
    with torch.no_grad():
        for slot, (text, pieces) in zip(some.all, texts, strict=True):
            wanted, at = reference.hidden(torch.tensor([text[:sum(pieces)]]))[0], 0
            for size in pieces:
                found = some.feed(slot, text[at:at + size])
                assert torch.allclose(found, wanted[at:at + size], atol=1e-4)
                at += size
        for step in range(4):
            new = [text[slot.length] for slot, (text, _) in zip(some.all, texts, strict=True)]
            found = some.step(some.all, new)
            for row, slot, (text, pieces) in zip(found, some.all, texts, strict=True):
                assert slot.length == sum(pieces) + step + 1
                wanted = reference(torch.tensor([text[:slot.length]]))[0, -1]
                assert torch.allclose(row, wanted, atol=1e-3)


def test_texts_go_side_by_side_in_the_widths_that_are_equal():
    some, shapes = slots.Slots(tiny(), 5), []
    some.widths, hidden = [1, 2, 4], some.hidden
    some.hidden = lambda places, ids: shapes.append((len(places), *ids.shape)) or hidden(places,
                                                                                         ids)
    for number, wanted in ((1, [(1, 1, 1)]), (2, [(2, 2, 1)]), (3, [(3, 4, 1)]), (4, [(4, 4, 1)]),
                           (5, [(4, 4, 1), (1, 1, 1)])):
        shapes.clear()
        assert some.step(some.all[:number], [256] * number).shape == (number, 264)
        assert shapes == wanted
    assert [slot.length for slot in some.all] == [5, 4, 3, 2, 1]


def test_a_model_in_bf16_is_not_packed():
    model = tiny()
    model.compute_dtype = torch.bfloat16
    slots.pack(model)
    assert model.lm_head.weight is not None and "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(("number", "bad", "widths"), [
    (6, [], [1, 2, 3, 4, 6]), (8, [], [1, 2, 3, 4, 6, 8]), (1, [], [1]), (5, [3], [1, 2, 4, 5]),
    (6, [6], [1, 2, 3, 4]), (6, [6, 4, 3, 2], [1]), (6, [1], [2, 3, 4, 6])])
def test_widths_are_those_whose_rows_are_equal_at_any_place(monkeypatch, number, bad, widths):
    """A kernel of a `bad` width gives the row at its end other bits."""
    class Planted(slots.Slots):
        def step(self, places, ids):
            assert all(slot.length == 0 for slot in places)
            rows = torch.tensor(ids, dtype=torch.float32)[:, None]
            if self.widths[0] in bad:
                rows[-1] += 0.5
            return rows

    assert Planted(tiny(), number).widths == widths


def test_rows_that_do_not_fill_vectors_go_alone():
    for changes, some in (({"d_model": 24, "n_head": 2, "n_kv_head": 2}, False), ({"d_ff": 37},
                          False), ({}, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slots.Slots, "step", lambda *_: torch.zeros(3))
            assert slots.Slots(tiny(**changes), 3).widths == ([1, 2, 3] if some else [1])


# ---- clients that go, and the end

def until(condition, seconds=10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def raw_post(server, body: dict, headers: str = "") -> socket.socket:
    data = json.dumps(body).encode()
    made = socket.create_connection(("127.0.0.1", server.port))
    made.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{headers}"
                 "Content-Type: application/json\r\n"
                 f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return made


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(server, monkeypatch, stream):
    monkeypatch.setattr(Scripted, "slow", 0.05)
    before = server.batch.counts["cancelled"]
    body = {"prompt": f"SAY[{'a' * 150}]YAS", "max_tokens": 150, "stream": stream, "n": 3}
    sockets = [raw_post(server, body) for _ in range(2)]  # of 6 texts 4 run
    assert until(lambda: server.batch.load()[0] == 4)
    for each in sockets:
        each.close()
    assert until(lambda: server.batch.load() == (0, 0), 3)
    assert server.batch.counts["cancelled"] == before + 6
    assert until(lambda: server.service.answering == 0)
    assert stream or server.service.statuses["/v1/completions", 499] >= 2


def test_the_queue_has_an_end(server, monkeypatch):
    monkeypatch.setattr(Scripted, "slow", 0.02)
    body = {"prompt": f"SAY[{'a' * 100}]YAS", "max_tokens": 100, "n": 36}
    first = raw_post(server, body)
    assert until(lambda: sum(server.batch.load()) == 36)
    answer = httpx.post(server.url + "/v1/completions", json=body)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    first.close()
    assert until(lambda: server.batch.load() == (0, 0))


def test_a_body_that_does_not_come_and_a_stream_without_news(server, monkeypatch):
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    monkeypatch.setattr(serving, "ALIVE_SECONDS", 0.02)
    monkeypatch.setattr(Scripted, "slow", 0.1)
    with httpx.stream("POST", server.url + "/v1/completions", json={
            "prompt": "SAY[ab]YAS", "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert ": waiting" in lines and lines[-1] == "data: [DONE]"


def test_a_head_that_does_not_come(server, monkeypatch):
    """Byte by byte, or in part, behind nothing or behind another request."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        assert until(lambda: len(server.server.server_state.connections) > 0)

        def gone() -> bool:
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"X: y\r\n")
                return False
            return True

        slow.sendall(head)
        assert until(gone, 5)
    monkeypatch.setattr(server.server.config, "timeout_keep_alive", 0.3)
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(head + b"\r\n")
        slow.sendall(head)
        slow.settimeout(5)
        said = b"".join(iter(lambda: slow.recv(4096), b""))
        assert said.startswith(b"HTTP/1.1 200") and said.count(b"HTTP/1.1") == 1


def test_more_connections_than_there_is_room_for(server, client, monkeypatch):
    there = server.server.server_state.connections
    before = len(there)
    monkeypatch.setattr(connections, "MOST", before + 5)
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                for _ in range(9)]
        assert until(lambda: len(there) <= before + 5)
        many[-1].settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert many[-1].recv(9) == b""
    assert until(lambda: len(there) <= before)
    assert client.completions.create(model="tiny", prompt="SAY[abc]YAS").choices[0].text == "abc"


def test_an_answer_has_all_the_time_that_it_needs(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(Scripted, "slow", 0.1)
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "SAY[abcde]YAS"})
    assert answer.json()["choices"][0]["text"] == "abcde"


def test_an_answer_that_is_not_taken(server, monkeypatch):
    monkeypatch.setattr(connections, "TAKEN_SECONDS", 0.2)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", server.port))
        port = lazy.getsockname()[1]

        def there() -> bool:
            return port in [each.client[1] for each in [*server.server.server_state.connections]]

        lazy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)  # some 12 MB to take
        assert until(there) and until(lambda: not there())


def test_garbage_on_the_wire_harms_nobody(server, client):
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for data in (b"\x00\xff garbage\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST", b"",
                 b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
                 post + b"Content-Length: -5\r\n\r\n",
                 post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
                 b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                 b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\n"
                 b"Upgrade: websocket\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as made:
            made.sendall(data)
            made.shutdown(socket.SHUT_WR)
            made.settimeout(5)
            said = b""
            with contextlib.suppress(ConnectionError):
                while piece := made.recv(4096):
                    said += piece
            assert not said.startswith(b"HTTP/1.1 2")
            assert not said or json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert client.completions.create(model="tiny", prompt="SAY[abc]YAS").choices[0].text == "abc"


def test_who_closes_one_half_has_gone(server, monkeypatch):
    monkeypatch.setattr(Scripted, "slow", 0.05)
    with raw_post(server, {"prompt": f"SAY[{'a' * 150}]YAS", "max_tokens": 150}) as half:
        assert until(lambda: server.batch.load() == (1, 0))
        half.shutdown(socket.SHUT_WR)
        assert until(lambda: server.batch.load() == (0, 0), 3)
        half.settimeout(5)
        assert half.recv(100) == b""


def test_a_key_cors_and_a_model_without_dialogs(model):
    batch = Batch(tiny(block_size=CONTEXT), TOKENIZER.vocab_size, 2, 9)
    server = begin(service_of(model, batch, "secret", "http://there:1", chat=False))
    good = {"Authorization": "Bearer secret"}
    for headers, status in (({}, 401), ({"Authorization": "Bearer secre"}, 401),
                            ({"Authorization": "Bearer sécret".encode()}, 401), (good, 200)):
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == status
    assert httpx.get(server.url + "/metrics").status_code == 401
    assert httpx.get(server.url + "/health").status_code == 200
    answer = httpx.post(server.url + "/v1/chat/completions", json=CHAT, headers=good)
    assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]
    for origin, allowed in (("http://there:1", "http://there:1"), ("http://other", None)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = httpx.options(server.url + "/v1/completions", headers=asked)
        assert answer.headers.get("access-control-allow-origin") == allowed
        answer = httpx.get(server.url + "/v1/models", headers={"Origin": origin})
        assert answer.status_code == 401  # and its page may read that
        assert answer.headers.get("access-control-allow-origin") == allowed
    server.close()
    batch.close()


def save_model(folder: Path, tokenizer, template: str) -> Path:
    """Write a model that was tuned on dialogs."""
    from safetensors.torch import save_file

    folder.mkdir()
    model = tiny(block_size=512)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template)
    write_json(folder / "config.json", config_json(model.config, tokenizer.bos_id,
                                                   tokenizer.eos_id))
    save_file(dict(model.named_parameters()), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("run") / "talker", TOKENIZER, TEMPLATE)


def test_a_signal_lets_answers_end(capsys, monkeypatch):
    monkeypatch.setattr(Scripted, "slow", 0.02)
    batch = Scripted(tiny(block_size=CONTEXT), TOKENIZER.vocab_size, 2, 9)
    server = begin(service_of(None, batch))
    body = {"prompt": f"SAY[{'a' * 40}]YAS", "max_tokens": 40}
    late = socket.create_connection(("127.0.0.1", server.port))  # its body comes after the signal
    late.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                 b"Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{")
    url = server.url + "/v1/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        late.sendall(b'"prompt":"a"}')
        assert late.recv(4096).startswith(b"HTTP/1.1 503")
        assert httpx.post(url, json=body).status_code == 503
        assert httpx.get(server.url + "/health").status_code == 503
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and sum('"text": "a"' in line for line in rest) == 39
    assert until(lambda: not server.server.server_state.connections)
    late.close(), server.close(), batch.close()
    assert "SIGTERM: 1 running answers come to their end" in capsys.readouterr().out


def test_the_end_does_not_wait_for_who_takes_nothing(monkeypatch):
    monkeypatch.setattr(serving, "END_SECONDS", 1)
    batch = Batch(tiny(block_size=CONTEXT), TOKENIZER.vocab_size, 2, 9)
    server = begin(service_of(None, batch))
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", server.port))
        lazy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)
        assert until(lambda: server.server.server_state.tasks)
        server.server.handle_exit(signal.SIGINT, None)
        server.thread.join(20)
        assert not server.thread.is_alive()
    batch.close()


def test_a_second_signal_ends_at_once(folder):
    process = subprocess.Popen(
        [sys.executable, str(Path(sample.__file__)), f"--ckpt={folder}", "--serve", "--port=0",
         "--device=cpu", "--dtype=fp32", "--batch=1"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        said = []
        while not said or not said[-1].startswith("serving"):
            said.append(process.stdout.readline())
            assert said[-1], process.stderr.read()
        url = re.search("http://127.0.0.1:[0-9]+/v1", said[-1]).group()
        body = {"prompt": "x", "max_tokens": 500, "n": 128, "stream": True}
        with httpx.stream("POST", url + "/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()  # which closes the stream where nobody holds it
            next(lines)
            assert process.stdout.readline() == f"in a browser: {url.removesuffix('/v1')}\n"
            process.send_signal(signal.SIGTERM)
            assert "SIGTERM: 1 running answers come to their end" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143 and out == ""
    assert error == "SIGINT: ended at once; answers cut short: 1\n"
    assert "serving talker on" in said[-1]


@contextlib.contextmanager
def command_on(folder, monkeypatch, *words):
    """sample.py --serve in a thread of this process, and a client to it."""
    servers = queue.Queue()

    class Told(serving.Server):
        def run(self, sockets=None):
            servers.put((self, sockets[0].getsockname()[1]))
            super().run(sockets)

    monkeypatch.setattr(serving, "Server", Told)
    asked = parse([f"--ckpt={folder}", "--serve", "--port=0", "--device=cpu", "--dtype=fp32",
                   "--batch=2", *words], "", sample.Flags, "files")
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(sample.main, asked)
        try:
            server, port = servers.get(timeout=60)
            assert until(lambda: server.started, 20)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none",
                                max_retries=0, timeout=30)
        finally:
            server.should_exit = True
    assert ended.result() == 0


def test_an_adapter_is_served_on_its_base(folder, tmp_path, monkeypatch):
    adapted, source = tmp_path / "adapted", torch.Generator().manual_seed(3)
    adapted.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (adapted / name).write_bytes((folder / name).read_bytes())
    model = tiny(block_size=512)
    target, width = "model.layers.0.mlp.down_proj", model.config.d_ff
    weights = {f"{target}.lora_A": torch.randn(4, width, generator=source),
               f"{target}.lora_B": torch.randn(32, 4, generator=source)}
    write_adapter(adapted, weights, Adapter(4, 8.0, 0.0, (target,), "fp32",
                                            model.config.vocab_size, str(folder), ""), model.config)
    texts = {}
    for name in (folder, adapted):
        with command_on(name, monkeypatch) as client:
            made = client.completions.create(model=name.name, prompt=[256, 5, 6], max_tokens=9,
                                             temperature=0, logprobs=0)
            texts[name] = made.choices[0].logprobs.token_logprobs
    with torch.no_grad():  # W + B A alpha / r
        merged = model.get_parameter(f"{target}.weight")
        merged += 2 * weights[f"{target}.lora_B"] @ weights[f"{target}.lora_A"]
        wanted = float(model(torch.tensor([[256, 5, 6]]))[0, -1, :263].log_softmax(-1).max())
    assert texts[adapted][0] == pytest.approx(wanted, abs=1e-4)
    assert texts[folder] != texts[adapted]


@pytest.mark.parametrize("shape", ["im", "inst"])
def test_a_template_of_others_is_served(tmp_path, monkeypatch, shape, capsys):
    """What ends an answer, and what a prompt is, are the template's; calls that it writes in its
    own way would not be found, so that tools are then refused."""
    folder = tmp_path / "theirs"
    save_model(folder, words("bytes", shape, tmp_path), template_of(shape))
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    chat = ModelChat(words("bytes", shape, tmp_path), template_of(shape))
    with command_on(folder, monkeypatch, "--host=0.0.0.0") as client:
        assert "whoever reaches this machine may ask" in capsys.readouterr().out
        made = client.chat.completions.create(model="theirs", messages=messages, max_tokens=5)
        assert made.usage.prompt_tokens == len(chat.prompt(messages))
        if shape == "inst":
            with pytest.raises(openai.BadRequestError, match="writes calls otherwise"):
                client.chat.completions.create(model="theirs", messages=messages, tools=[TOOL])


@pytest.mark.parametrize(("words", "message"), [
    (["--serve", "--prompt=x"], "--prompt has no effect on --serve"),
    (["--serve", "--temperature=0"], "--temperature has no effect"),
    (["--serve", "--chat"], "--chat has no effect"), (["--port=1"], "--port is for --serve"),
    (["--serve", "--host=no.such.host.invalid"], "cannot listen on --host=no"),
    (["--serve", "--port=0", "--ckpt=nowhere"], "nowhere")])
def test_options_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        sample.main(parse(words, "", sample.Flags, "files"))


def test_a_port_that_is_taken_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot listen"):
            serving.bind("127.0.0.1", taken.getsockname()[1])
