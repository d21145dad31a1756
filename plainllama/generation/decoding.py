"""Rows of prompts -> what is made of them, batch by batch: here, or on the nodes of a cluster."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from model import LLaMA
from plainllama import parallel
from plainllama.cluster import Cluster
from plainllama.generation import generate, prompt_files
from plainllama.tokens.templates import chat_of
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.weights import peft


class Row(NamedTuple):
    """A prompt."""

    number: int  # which decides its draws
    ids: list[int]
    is_talk: bool = False  # its answer is read as a message


class Made(NamedTuple):
    """What was made of a batch."""

    rows: dict[int, dict]  # {number: {completion, stop, message} or {embedding}}
    tokens: int
    cut: int  # texts that ended where the context ends


class Decoder:
    """A model that makes what flags ask for; `f`: those of sample.py."""

    def __init__(self, f: Any, model: LLaMA, tokenizer: Tokenizer, compiled: Any = None,
                 stream: bool = False):
        self.f, self.model, self.tokenizer = f, model, tokenizer
        self.compiled, self.stream = compiled, stream

    def __call__(self, batch: list[Row]) -> Made:
        """Decode rows side by side."""
        f, model = self.f, self.model
        prompts = [row.ids for row in batch]
        if f.embed != "none":
            states = generate.embed(model, prompts, f.embed, f.layers)
            vectors = {row.number: {"embedding": prompt_files.pack(state)}
                       for row, state in zip(batch, states, strict=True)}
            return Made(vectors, sum(map(len, prompts)), 0)
        seeds = [generate.row_seed(f.seed, row.number) for row in batch]
        texts = generate.complete(model, self.tokenizer, prompts, f.max_new_tokens, f, seeds,
                                  f.stop, self.stream, self.compiled)
        rows, cut = {}, 0
        for row, text in zip(batch, texts, strict=True):
            made: dict = {"completion": text.text, "stop": text.ended}
            if row.is_talk:
                made["message"] = generate.message_of(chat_of(self.tokenizer), text.text)
            rows[row.number] = made
            full = len(row.ids) + len(text.ids) == model.config.block_size
            cut += int(text.ended == "length" and full)
        return Made(rows, sum(len(text.ids) for text in texts), cut)


def load_decoder(f: Any, folder: Path) -> Decoder:
    """Load a model in a process of a node, on its GPU if it was given one."""
    world = parallel.start(f.device, "auto")
    dtype = parallel.pick_dtype(f.dtype, world.device)
    model = peft.load_model(folder, world.device, dtype, f.base)
    return Decoder(f, model, Tokenizer.load(peft.tokenizer_folder(folder, f.base)))


def decode_there(decoder: Decoder, number: int, batch: list[Row], report: Any) -> Made:
    """Do a job of a cluster."""
    made = decoder(batch)
    report(made.tokens)
    return made


def decoded_on(cluster: Cluster, f: Any, folder: Path, batches: list[list[Row]]) -> Iterator[Made]:
    """Give what the nodes make of batches, as it comes."""
    plain = SimpleNamespace(**vars(f))
    jobs = dict(enumerate(batches))
    load = partial(load_decoder, plain, folder.absolute())
    for _, made in cluster.each(decode_there, jobs, load, lambda reports: None):
        yield made

