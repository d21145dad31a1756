"""What counting alone reaches on the same text: a unigram and an interpolated Kneser-Ney model.

A language model that does not beat them has learned nothing that a table does not hold. Both give
every token of the vocabulary a probability above 0, and are scored on the windows and in the unit
(bits per utf-8 byte) of the model that they stand beside.
"""

import numpy as np

from shards import Rows, Split


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
