"""What counting alone reaches on the same text: a unigram and an interpolated Kneser-Ney model.

A language model that does not beat them has learned nothing that a table does not hold. Both give
every token of the vocabulary a probability above 0, and are scored on the windows and in the unit
(bits per utf-8 byte) of the model that they stand beside.

Counting also tells which questions of a task, and how much of a text, the training data holds.
"""

import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plainllama.evaluation.likelihood import Windows, window_count
from plainllama.parallel import World
from plainllama.progress import Progress
from plainllama.settings import Settings
from plainllama.tokens.rows import Rows, ids_of
from plainllama.tokens.shards import Split, open_split
from plainllama.tokens.tokenizer import Tokenizer

RUN = 13  # words in a row that are no coincidence (https://arxiv.org/abs/2005.14165, appendix C)
AT_ONCE = 1 << 24  # tokens of a shard that are counted together: each is 8 bytes then
MOST = 1 << 23  # tokens that the 5-gram model counts: its table is in memory
LOOK = 1 << 22  # tokens of the training data in which a validation split is looked for unasked

# ---- language models that count

def unigram(split: Split, vocab_size: int) -> np.ndarray:
    """Give the probability of each token (V,): its share of a whole split, one added to every
    count."""
    counts = np.ones(vocab_size, np.int64)
    for i in range(len(split.names)):
        shard = split.shard(i)
        for first in range(0, len(shard), AT_ONCE):
            counts += np.bincount(shard[first:first + AT_ONCE], minlength=vocab_size)
    return counts / counts.sum()


class KneserNey:
    """Interpolated Kneser-Ney of a given order (Chen and Goodman 1998, section 2.7), with one
    discount n1 / (n1 + 2 n2) per order, counted in rows of token ids.

    P_n(w | h) = (max(c_n(hw) - D_n, 0) + D_n types_n(h) P_{n-1}(w | h')) / total_n(h), where h' is
    h without its first token; P_0 is uniform. c_n counts occurrences at the highest order, below it
    the different tokens that stand before the n-gram.
    """

    def __init__(self, rows: np.ndarray, order: int, vocab_size: int):
        """Count in `rows` (m, L): no n-gram reaches from one row into the next."""
        self.V = vocab_size
        # of each length n, sorted: (id of the first n - 1 tokens) V + the last token
        self.keys: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []  # c_n of each key
        ids = np.zeros((len(rows), rows.shape[1] + 1), np.int64)  # of the empty n-gram
        for n in range(1, order + 1):  # an n-gram's id is the place of its key among all keys
            keys = ids[:, :-1] * vocab_size + rows[:, n - 1:]
            unique, first, inverse, counts = np.unique(
                keys, return_index=True, return_inverse=True, return_counts=True)
            if n > 1:
                suffixes = ids[:, 1:].reshape(-1)[first]
                self.counts[-1] = np.bincount(suffixes, minlength=len(self.keys[-1]))
            self.keys.append(unique)
            self.counts.append(counts)
            ids = inverse.reshape(keys.shape)

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Give P(row[i] | the tokens before it in its row) for i = 1 .. L-1, (m, L-1)."""
        probabilities = np.full(rows.shape, 1 / self.V)
        contexts = 1  # how many n-grams are one token shorter
        ids = np.zeros((len(rows), rows.shape[1] + 1), np.int64)  # -1: an n-gram not counted
        for n, (keys, counts) in enumerate(zip(self.keys, self.counts, strict=True), 1):
            context, ones, twos = keys // self.V, (counts == 1).sum(), (counts == 2).sum()
            discount = ones / (ones + 2 * twos) if ones else 0.5
            types = np.bincount(context[counts > 0], minlength=contexts)
            totals = np.bincount(context, counts, contexts)
            before = ids[:, :-1]  # the contexts of the n-grams that end at n-1, n ..
            wanted = before * self.V + rows[:, n - 1:]
            ids = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            ids[(keys[ids] != wanted) | (before < 0)] = -1
            context = before.clip(min=0)
            total = np.where(before < 0, 0, totals[context])
            lower = probabilities[:, n - 1:]
            mixed = (np.where(ids < 0, 0, np.maximum(counts - discount, 0)[ids])
                     + (discount * types)[context] * lower) / total.clip(1)
            probabilities[:, n - 1:] = np.where(total > 0, mixed, lower)
            contexts = len(keys)
        return probabilities[:, 1:]


def baselines(train: Rows, shown: int, scored: np.ndarray, n_bytes: int, vocab_size: int) -> dict:
    """Score {unigram_bpb, 5-gram_bpb, tokens}: bits per byte on the windows `scored` (m, T + 1).

    The unigram model knows the whole training split, the other what a run saw: its first `shown`
    rows, without repetitions, or as many as hold MOST tokens.
    """
    alone = unigram(train.split, vocab_size)[scored[:, 1:]]
    count = min(shown, train.windows, max(1, MOST // train.block_size))
    rows = train.read_windows(train.window_of(0, count)).astype(np.int64)
    chained = KneserNey(rows, 5, vocab_size).probabilities(scored)
    bits = [-float(np.log2(p).sum()) / n_bytes for p in (alone, chained)]
    return {"unigram_bpb": bits[0], "5-gram_bpb": bits[1], "tokens": rows.size}


def compare(rows: Rows, shown: int, scores: dict, config: Settings, say: Callable) -> dict:
    """Say what counting reaches beside the model's `scores`; {unigram_bpb, 5-gram_bpb, tokens}.

    `rows`: the validation windows, of which the first val_tokens were scored; `shown`: rows of the
    training split that the run, whose config this is, has consumed.
    """
    split = rows.split
    train = Rows(Split(split.folder, "train", split.manifest), rows.block_size, config.seed,
                 config.overfit_rows)
    scored = rows.read_windows(range(scores["val_tokens"] // rows.block_size)).astype(np.int64)
    table = baselines(train, shown, scored, scores["val_bytes"],
                      split.manifest["tokenizer"]["vocab_size"])
    least = table["unigram_bpb"]
    for name, bpb in {"unigram": least, "5-gram": table["5-gram_bpb"],
                      "this model": scores["val_bpb"]}.items():
        say(f"  {name:<14}{bpb:9.4f} bits per byte, {1 - bpb / least:6.1%} below unigram")
    return table


# ---- questions in the training data

def run_hashes(text: str) -> Iterator[int]:
    """Hash every RUN words in a row of a text, in small letters and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return map(hash, zip(*(words[i:] for i in range(RUN)), strict=False))


def runs_met(texts: list[str], folders: list[Path], tokenizer: Tokenizer, world: World,
             most: int = sys.maxsize) -> tuple[np.ndarray, np.ndarray]:
    """Tell of every run of RUN words in texts (m,): the number of its text, and whether the first
    `most` tokens of training splits hold it. Collective."""
    asked = [np.fromiter(run_hashes(text), np.int64) for text in texts]
    hashes = np.concatenate([np.zeros(0, np.int64), *asked])
    wanted, met = set(hashes.tolist()), set()
    for document in documents([open_split(folder, "train") for folder in folders], tokenizer,
                              world, most):
        met |= wanted.intersection(run_hashes(document))
    found = torch.tensor([run in met for run in hashes.tolist()], dtype=torch.float64)
    return np.repeat(np.arange(len(asked)), list(map(len, asked))), (world.sum(found) > 0).numpy()


def documents(splits: list[Split], tokenizer: Tokenizer, world: World, most: int) -> Iterator[str]:
    """Decode this rank's share of the documents that begin in the first `most` tokens, and show how
    far it is."""
    total = min(most, sum(split.tokens for split in splits))
    progress = Progress("looking through the training data", total, "tokens", world.rank == 0)
    shards = [(split, i) for split in splits for i in range(len(split.names))]
    before = 0  # tokens of the shards before, of all ranks
    for number, (split, i) in enumerate(shards):
        tokens = split.shard(i)
        if number % world.size == world.rank and before < most:
            for start, end in pairwise([*split.index(i).tolist(), len(tokens)]):
                if before + start >= most:
                    break
                yield tokenizer.decode(tokens[start:end])
                progress.add(min(world.size * (end - start), total - progress.done))
        before += len(tokens)
    progress.close()


def contamination(tasks: dict[str, Any], folders: list[Path], tokenizer: Tokenizer,
                  world: World) -> dict[str, dict]:
    """Compare each task's questions with the training splits: {task: {contaminated: the share that
    has RUN words in a row in common with them, long_enough: how many have as many words}}; of a
    task without such questions nothing. Collective."""
    found = {}
    for name, task in tasks.items():
        questions = task.questions()
        owner, met = runs_met(questions, folders, tokenizer, world)
        if len(owner):
            found[name] = {"contaminated": len(set(owner[met])) / len(questions),
                           "long_enough": len(set(owner))}
    return found


def look_through(tasks: dict[str, Any] | None, windows: Windows | None, tokens: int,
                 folders: list[Path], tokenizer: Tokenizer, world: World,
                 say: Callable) -> tuple[dict, dict]:
    """Find what the training data holds of the questions of tasks, if these are asked for, and of
    the first `tokens` of a split or text: (contamination() of the tasks, {repeated: the share of
    the runs of words that are there, unless that is none}). Collective."""
    contaminated: dict = {}
    if tasks is not None:
        contaminated = contamination(tasks, folders, tokenizer, world)
        for name in tasks.keys() - contaminated.keys():
            say(f"no contamination of {name}: no question has {RUN} words")
    if windows is None:
        return contaminated, {}
    rows = windows.read_windows(range(window_count(windows, tokens)))
    texts = [tokenizer.decode(ids_of(row)) for row in rows]
    most = LOOK if tasks is None else sys.maxsize
    _, met = runs_met(texts, folders, tokenizer, world, most)
    if not met.any():
        return contaminated, {}
    say(f"note: at least {met.mean():.2%} of the runs of {RUN} words lie in the training data: of "
        "these, bits per byte tell what is remembered")
    return contaminated, {"repeated": float(met.mean())}
