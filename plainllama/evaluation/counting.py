"""What counting alone reaches on the same text: a unigram and an interpolated Kneser-Ney model.

A language model that does not beat them has learned nothing that a table does not hold. Both give
every token of the vocabulary a probability above 0, and are scored on the windows and in the unit
(bits per utf-8 byte) of the model that they stand beside.

Counting also tells which questions of a task the training data holds: contaminated().
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from plainllama.parallel import World
from plainllama.progress import Progress
from plainllama.settings import UserError
from plainllama.tokens.rows import Rows
from plainllama.tokens.shards import Split, open_split
from plainllama.tokens.tokenizer import Tokenizer

RUN = 13  # words in a row that are no coincidence (https://arxiv.org/abs/2005.14165, appendix C)


def unigram(split: Split, vocab_size: int) -> np.ndarray:
    """Probability of each token (V,): its share of a whole split, one added to every count."""
    counts = np.ones(vocab_size, np.int64)
    for i in range(len(split.names)):
        shard = split.shard(i)
        for first in range(0, len(shard), 1 << 24):
            counts += np.bincount(shard[first:first + (1 << 24)], minlength=vocab_size)
    return counts / counts.sum()


class KneserNey:
    """Interpolated Kneser-Ney of a given order (Chen and Goodman 1998, section 2.7), with one
    discount n1 / (n1 + 2 n2) per order, counted in rows of token ids.

    P_n(w | h) = (max(c_n(hw) - D_n, 0) + D_n types_n(h) P_{n-1}(w | h')) / total_n(h), where h' is
    h without its first token; P_0 is uniform. c_n counts occurrences at the highest order, below it
    the different tokens that stand before the n-gram.
    """

    def __init__(self, rows: np.ndarray, order: int, vocab_size: int):
        """`rows` (m, L): no n-gram reaches from one row into the next."""
        self.V, self.keys, self.tables = vocab_size, [], []
        ids, uniques = np.zeros(rows.shape, np.int64), []
        # an n-gram's id is the place of (id of its first n - 1 tokens, its last token) among all
        for n in range(1, order + 1):
            before = ids[:, :rows.shape[1] - n + 1] if n == 1 else ids[:, :-1]
            keys = before * vocab_size + rows[:, n - 1:]
            unique, first, inverse, counts = np.unique(
                keys, return_index=True, return_inverse=True, return_counts=True)
            suffixes = ids[:, 1:].reshape(-1)[first] if n > 1 else first
            ids = inverse.reshape(keys.shape)
            self.keys.append(unique)
            uniques.append((unique, suffixes, counts))
        for n, (unique, _, counts) in enumerate(uniques, 1):
            if n < order:
                counts = np.bincount(uniques[n][1], minlength=len(unique))
            contexts = unique // vocab_size  # 0 for n = 1
            size = len(self.keys[n - 2]) if n > 1 else 1
            ones, twos = (int((counts == times).sum()) for times in (1, 2))
            discount = ones / (ones + 2 * twos) if ones else 0.5
            self.tables.append((np.maximum(counts - discount, 0),
                                discount * np.bincount(contexts[counts > 0], minlength=size),
                                np.bincount(contexts, counts, size)))

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """P(row[i] | the tokens before it in its row) for i = 1 .. L-1, (m, L-1)."""
        found = np.full(rows.shape[1:], 1 / self.V)[None].repeat(len(rows), 0)
        ids = np.zeros(rows.shape, np.int64)
        for n, (keys, (counts, spared, totals)) in enumerate(
                zip(self.keys, self.tables, strict=True), 1):
            before = ids if n == 1 else ids[:, :-1]  # context of the n-gram that ends at n-1, n ..
            wanted = before * self.V + rows[:, n - 1:]
            ids = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            ids[(keys[ids] != wanted) | (before < 0)] = -1
            context = before.clip(min=0)
            total = np.where(before < 0, 0, totals[context])
            lower = found[:, n - 1:]
            mixed = (np.where(ids < 0, 0, counts[ids]) + spared[context] * lower) / total.clip(1)
            found[:, n - 1:] = np.where(total > 0, mixed, lower)
        return found[:, 1:]


def baselines(train: Rows, shown: int, scored: np.ndarray, n_bytes: int, vocab_size: int,
              order: int = 5, most: int = 1 << 23) -> dict:
    """{unigram_bpb, 5-gram_bpb, tokens}: bits per byte on the windows `scored` (m, T + 1).

    The unigram model knows the whole training split, the other what a run saw: its first `shown`
    rows, without repetitions, or as many as hold `most` tokens, because the table is in memory.
    """
    alone = unigram(train.split, vocab_size)[scored[:, 1:]]
    count = min(shown, train.windows, max(1, most // train.block_size))
    rows = train.rows(0, count).astype(np.int64)
    chained = KneserNey(rows, order, vocab_size).probabilities(scored)
    bits = [-float(np.log2(p).sum()) / n_bytes for p in (alone, chained)]
    return {"unigram_bpb": bits[0], f"{order}-gram_bpb": bits[1], "tokens": rows.size}


def compare(rows: Rows, shown: int, found: dict, config: dict, say) -> dict:
    """What counting reaches beside the model's result `found`, {unigram_bpb, 5-gram_bpb, tokens}.

    `rows`: the validation windows; `shown`: rows of the training split that the run, whose config
    this is, has consumed.
    """
    split = rows.split
    if config.get("mixture") or config.get("packing", "concat") != "concat":
        raise UserError("--baselines counts in the rows of one data set with packing=concat")
    train = Rows(Split(split.folder, "train", split.manifest), rows.block_size,
                        config["seed"], config.get("overfit_rows", 0))
    scored = rows.read_windows(range(found["tokens"] // rows.block_size)).astype(np.int64)
    table = baselines(train, shown, scored, found["bytes"],
                            split.manifest["tokenizer"]["vocab_size"])
    least = table["unigram_bpb"]
    for name, bpb in {"unigram": least, "5-gram": table["5-gram_bpb"],
                      "this model": found["val_bpb"]}.items():
        say(f"  {name:<14}{bpb:9.4f} bits per byte, {1 - bpb / least:6.1%} below unigram")
    return table


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    return re.findall(r"\w+", text.lower())


def tells(question: str) -> bool:
    """Whether a question is long enough to be found."""
    return len(words_of(question)) >= RUN


def contaminated(questions: list[str], documents: Iterable[list[str]]) -> np.ndarray:
    """Of each question (n,) whether it has RUN words in a row in common with one of the texts,
    which come in lists."""
    numbers: dict[str, int] = {}  # of the words of the questions; 0: of other words
    asked = [[numbers.setdefault(word, len(numbers) + 1) for word in words_of(question)]
             for question in questions]
    owner = np.repeat(np.arange(len(asked)), [max(0, len(ids) - RUN + 1) for ids in asked])
    hashes = np.concatenate([run_hashes(np.array(ids, np.uint64)) for ids in [[], *asked]])
    wanted, found = np.unique(hashes), np.zeros(len(asked), bool)
    for texts in documents:
        ids = np.array([number for text in texts for number in
                        (*(numbers.get(word, 0) for word in words_of(text)), 0)], np.uint64)
        others = np.cumsum(np.concatenate([[0], ids == 0]))
        met = np.unique(run_hashes(ids)[others[RUN:] == others[:-RUN]])
        found[owner[np.isin(hashes, met[np.isin(met, wanted)])]] = True
    return found


def run_hashes(ids: np.ndarray) -> np.ndarray:
    """A hash of every RUN numbers in a row: a polynomial in an odd number, modulo 2^64."""
    count, total = max(0, len(ids) - RUN + 1), np.zeros(1, np.uint64)
    for i in range(RUN):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[i:i + count]
    return total if count else np.zeros(0, np.uint64)


def contamination(asked: dict[str, list[str]], folders: list[Path], tokenizer: Tokenizer,
                  world: World) -> dict[str, dict]:
    """{task: {contaminated, long_enough}} of each task's questions: the share that the training
    splits have RUN words in a row in common with, and how many have as many words. Collective."""
    splits = [open_split(folder, "train") for folder in folders]
    progress = Progress("looking for questions", sum(split.tokens for split in splits), "tokens",
                        world.rank == 0)

    def documents() -> Iterator[list[str]]:
        pieces = ((split.shard(i), split.index(i)) for split in splits
                  for i in range(len(split.names)))
        for tokens, starts in itertools.islice(pieces, world.rank, None, world.size):
            for first in range(0, len(starts), 256):
                ends = [*starts[first + 1:first + 257].tolist(), len(tokens)]
                yield [tokenizer.decode(tokens[int(start):end]) for start, end in
                       zip(starts[first:first + 256], ends, strict=False)]
                progress.add(world.size * int(ends[:256][-1] - int(starts[first])))

    every = [question for questions in asked.values() for question in questions]
    met = torch.from_numpy(contaminated(every, documents()))
    progress.close()
    hits = iter((world.sum(met.double()) > 0).tolist())
    return {name: {"contaminated": sum(next(hits) for _ in questions) / len(questions),
                   "long_enough": sum(map(tells, questions))}
            for name, questions in asked.items() if questions}
