"""A .gguf file as llama.cpp reads it, beside the model that it was made of: token ids, dialogs,
greedy tokens, log-probs.

llama.cpp is asked by a process of its own (llama_cpp_process.py), which a file that it cannot read
may end.
"""

import random
import subprocess
import sys
import tempfile
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import LLaMA
from plainllama.files import CHECKOUT, read_json, write_json
from plainllama.settings import UserError, install
from plainllama.text.dialogs import Refused
from plainllama.tokens.chat import TEMPLATE
from plainllama.tokens.templates import chat_of
from plainllama.tokens.tokenizer import SAMPLE, Tokenizer

TEXTS = 2000  # whose ids are compared
NEW = 16  # greedy tokens behind each prompt
PLACES = 128  # at which all log-probs are compared
WINDOW = 33  # ids whose places follow each other
SEEN = -30.0  # log-probs below this are no part of any answer, and lose their digits
TOLERANCE = 1e-3  # of log-probs and of logits that are equal but for rounding, in nats
WORSE = 0.02  # what the log of perplexity may lose or gain by fewer bits
# Of hostile texts: what tokenizers cut, join or take for something else.
FRAGMENTS = [
    " ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\x85",
    "\u200b", "\ufeff", "\x00", "\x7f", "\x1f", "'s", "'S", "'ll", "'LL", "'ſ", "’re", "'", "''",
    "don't", "I'VE", "1", "12", "123", "1234567", "3.14", "½", "²", "Ⅷ", "٣", "१२", "x2y", "ab",
    "Word", "WORD", "naïve", "a\u0301", "\u0301", "e\u0302\u0323", "Straße", "ŒUVRE", "ﬁ",
    "Привет", "你好", "世界", "日本語", "한국어", "हिन्दी", "ไทย", "שלום", "العربية", "🎉",
    "👩\u200d👧🏽", "🇩🇪", "▁", "▁▁", "<s>", "</s>", "<|end|>", "<|user|>", "<|endoftext|>",
    "<0x41>", "<unk>", "[INST]", "<", ">", "|", "_", "__init__", "{}", "());", "!!", "...", "-",
    "--------", "#", "/*", "\\", "http://a.b/c?d=e", "    return", "def f(x):", "aaaaaaaaaaaa",
    "Ġ", "Ċ", "ÿ", "\U0001d54f"]
PROMPTS = ["The", "Once upon a time", "1, 2, 3,", "def add(a, b):\n", "She said", "In the year",
           "It is", " two", "A\n\nB", "import os", "For example", "The answer is", "What is", "We",
           "class Tree:", "北京", "Der Hund", "x = [", "So,", "(a)"]
TOOL = {"name": "weather", "description": "Tell the <weather> & more.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


class Answers(NamedTuple):
    """What llama.cpp said."""

    ids: list[list[int]]  # of each text
    dialogs: list[list[int]]  # the ids of each dialog's prompt
    greedy: list[dict]  # of each prompt: tokens, and whether an end token stopped them
    logprobs: Tensor  # (P, V)


# ---- compared

def is_installed() -> bool:
    """Tell whether llama.cpp is here."""
    return find_spec("xllamacpp") is not None


def check_installed() -> None:
    """Raise a UserError that names the extra if llama.cpp is not here."""
    if not is_installed():
        raise UserError("--verify needs the package xllamacpp: " + install("llamacpp"))


def verify(path: Path, model: LLaMA, tokenizer: Tokenizer, kind: str,
           text: np.ndarray | None = None, numbers: bool = True) -> str:
    """Compare a file of --type `kind` with the model and tokenizer that it was made of, and print
    what was measured; what is wrong, or ''.

    `text`: ids (n,) on which both predict, of text that the model did not learn; without them those
    of a few sentences. Without `numbers` only what the tokenizer does is compared; without
    llama.cpp nothing. Either is said.
    """
    if not is_installed():
        print("NOT checked with llama.cpp, which is not installed; to do so: "
              + install("llamacpp"))
        return ""
    texts = hostile_texts(TEXTS)
    dialogs, wanted = dialogs_of(tokenizer)
    prompts: list[list[int]] = []
    windows: list[list[int]] = []
    if numbers:
        room = max(1, model.config.block_size - NEW)
        prompts = wanted or [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
        prompts = [ids[:room] for ids in prompts]
        windows = windows_of(tokenizer, text, min(WINDOW, model.config.block_size))
    asked = {"model": str(path.resolve()), "texts": texts, "dialogs": dialogs, "prompts": prompts,
             "windows": windows, "entries": model.config.vocab_size, "new": NEW,
             "filler": tokenizer.encode("a")[-1], "threads": torch.get_num_threads(),
             "context": max(map(len, [*prompts, *windows]), default=1) + NEW}
    try:
        said = ask(asked)
    except RuntimeError as error:
        return f"llama.cpp cannot open it: {error}"
    problem = compare_ids(tokenizer, texts, said.ids) or compare_dialogs(
        tokenizer, wanted, said.dialogs)
    if problem:
        return problem
    print(f"checked with llama.cpp: ids of {len(texts):,} texts and {len(wanted)} dialogs are "
          "equal")
    if not numbers:
        print("tokens and log-probs are NOT checked with llama.cpp; --verify does that")
        return ""
    return (compare_greedy(model, tokenizer, prompts, said.greedy, kind)
            or compare_logprobs(model, windows, said.logprobs, kind))


def compare_ids(tokenizer: Tokenizer, texts: list[str], said: list[list[int]]) -> str:
    """Name the first text that llama.cpp reads as other ids, or ''."""
    for text, theirs in zip(texts, said, strict=True):
        ours = tokenizer.encode(text)
        if ours != theirs:
            return f"llama.cpp reads {text!r} as {theirs}, the model's tokenizer as {ours}"
    return ""


def compare_dialogs(tokenizer: Tokenizer, wanted: list[list[int]], said: list[list[int]]) -> str:
    """Name the first dialog that llama.cpp renders otherwise, or ''. Of a template of others that
    is only said: there is no other file to make."""
    for number, (ours, theirs) in enumerate(zip(wanted, said, strict=True), 1):
        if ours != theirs:
            names = {i: name for name, i in tokenizer.special_ids.items()}
            spelt = ["".join(names.get(i, tokenizer.decode_behind([i])) for i in ids)
                     for ids in (theirs, ours)]
            problem = (f"llama.cpp renders dialog {number} of {len(wanted)} as {spelt[0]!r}, "
                       f"the model reads {spelt[1]!r}")
            if tokenizer.template == TEMPLATE:
                return problem
            print(f"WARNING: {problem}")
    return ""


def compare_greedy(model: LLaMA, tokenizer: Tokenizer, prompts: list[list[int]], said: list[dict],
                   kind: str) -> str:
    """Print how many prompts llama.cpp goes on from as the model does; name the first token that
    differs if all should, or ''. Logits that are equal but for rounding may change places."""
    first, same = "", 0
    for prompt, answer in zip(prompts, said, strict=True):
        wrong = first_difference(model, tokenizer, prompt, answer)
        same += not wrong
        first = first or wrong
    print(f"greedy tokens: equal behind {same} of {len(prompts)} prompts")
    return first if kind == "f32" else ""


def first_difference(model: LLaMA, tokenizer: Tokenizer, prompt: list[int], answer: dict) -> str:
    """Name the first token of a greedy answer that is not the model's, or ''."""
    tokens = answer["tokens"]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1:]  # (n + 1, V)
    shown = repr(tokenizer.decode(prompt))
    for number, (token, row) in enumerate(zip(tokens, logits, strict=False)):
        best = int(row.argmax())
        if row[best] - row[token] > TOLERANCE:
            return (f"behind {shown} token {number + 1} is {token} in llama.cpp, {best} in the "
                    "model")
        if token in tokenizer.stop_ids and number < len(tokens) - 1:
            return f"behind {shown} llama.cpp does not stop at token {token}"
    ended = answer["ended"] and not (tokens and tokens[-1] in tokenizer.stop_ids)
    if ended and int(logits[-1].argmax()) not in tokenizer.stop_ids:
        return f"behind {shown} llama.cpp stops after {len(tokens)} tokens, the model goes on"
    return ""


def compare_logprobs(model: LLaMA, windows: list[list[int]], said: Tensor, kind: str) -> str:
    """Print how far log-probs and perplexities are apart; what is wrong with that, or ''."""
    ours, targets = [], []
    for window in windows:
        with torch.inference_mode():
            ours.append(model(torch.tensor([window[:-1]]))[0].log_softmax(-1))
        targets += window[1:]
    here, places = torch.cat(ours), torch.tensor(targets)[:, None]
    largest = (here - said)[here > SEEN].abs().max().item()
    losses = [-found.gather(1, places).clamp(min=SEEN).mean() for found in (here, said)]
    more = (losses[1] - losses[0]).item()
    print(f"log-probs at {len(places)} places: largest difference {largest:.1e}; perplexity "
          f"{losses[0].exp():.4f}, of the file {losses[1].exp():.4f} ({np.expm1(more):+.3%})")
    if kind == "f32" and not largest <= TOLERANCE:  # nan too
        return f"log-probs differ by {largest:.1e}, allowed are {TOLERANCE:.0e}"
    if not abs(more) <= WORSE:
        return f"{kind} changes perplexity by {np.expm1(more):+.1%}, allowed are {WORSE:.0%}"
    return ""


# ---- what is asked

def hostile_texts(number: int) -> list[str]:
    """Make texts of what tokenizers stumble over, and of any characters: the same ones always."""
    draw = random.Random(0)
    anything = [chr(code) for code in range(0x20000)
                if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    texts = [SAMPLE, "", *FRAGMENTS]
    while len(texts) < number:
        parts = [draw.choice(FRAGMENTS) for _ in range(draw.randint(1, 12))]
        if len(texts) % 2:
            parts += draw.choices(anything, k=draw.randint(1, 12))
            draw.shuffle(parts)
        texts.append("".join(parts))
    return texts[:number]


def dialogs_of(tokenizer: Tokenizer) -> tuple[list[dict], list[list[int]]]:
    """Make dialogs as OpenAI's clients send them, and the ids of their prompts by the model's
    template; none if it has none. Those that its template does not take are left out."""
    if not tokenizer.template:
        return [], []
    chat, dialogs, wanted = chat_of(tokenizer), [], []
    for number, text in enumerate(PROMPTS):
        messages = [{"role": "user", "content": text + "\n 😀" * (number % 2)}]
        if number % 3 == 1:
            messages[:0] = [{"role": "system", "content": "Be  brief.\n"}]
        if number % 4 == 2:
            messages += [{"role": "assistant", "content": f" yes, {number}\n\n"},
                         {"role": "user", "content": "  and\tthen?"}]
        tools = [TOOL] if number % 5 == 3 else None
        try:
            wanted.append(chat.prompt(messages, tools))
        except Refused:
            continue
        sent: dict = {"messages": messages}
        if tools:
            sent["tools"] = [{"type": "function", "function": tool} for tool in tools]
        dialogs.append(sent)
    return dialogs, wanted


def windows_of(tokenizer: Tokenizer, text: np.ndarray | None, length: int) -> list[list[int]]:
    """Cut ids into windows that have about PLACES places to predict in all."""
    if text is None:
        text = np.array([tokenizer.bos_id, *tokenizer.encode(" ".join(PROMPTS) + SAMPLE)])
    size = min(length, len(text))
    starts = range(0, len(text) - size + 1, size)
    return [text[start:start + size].tolist() for start in starts][:-(-PLACES // (size - 1))]


# ---- asked, in a process of its own

def ask(asked: dict) -> Answers:
    """Start a process that opens asked["model"] in llama.cpp, and read what it said. RuntimeError,
    with its last words, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "asked.json"), asked)
        words = [sys.executable, "-m", "plainllama.weights.llama_cpp_process", folder]
        done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True,
                              errors="replace")
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-1500:] or f"it ended with {done.returncode}")
        said = read_json(Path(folder, "said.json"))
        logprobs = torch.from_numpy(np.load(Path(folder, "logprobs.npy")))
    return Answers(said["ids"], said["dialogs"], said["greedy"], logprobs)
