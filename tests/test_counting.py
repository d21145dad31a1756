"""counting.py against a Kneser-Ney written with dictionaries, straight from the formula."""

from collections import defaultdict

import numpy as np
import pytest
from conftest import documents, write_data_set

from plainllama.evaluation import counting
from plainllama.tokens.rows import Rows
from plainllama.tokens.shards import open_split


def by_hand(train: list, order: int, vocab: int):
    """P(word, context): interpolated Kneser-Ney with sets and dictionaries."""
    seen = [defaultdict(int) for _ in range(order + 1)]
    for row in train:
        for n in range(1, order + 1):
            for i in range(len(row) - n + 1):
                seen[n][tuple(row[i:i + n])] += 1
    counts, discounts, followers = {}, {}, {}
    for n in range(1, order + 1):
        table = dict(seen[n])
        if n < order:
            before = defaultdict(set)
            for gram in seen[n + 1]:
                before[gram[1:]].add(gram[0])
            table = {gram: len(words) for gram, words in before.items()}
        ones, twos = (list(table.values()).count(times) for times in (1, 2))
        counts[n], discounts[n] = table, ones / (ones + 2 * twos) if ones else 0.5
        followers[n] = defaultdict(dict)
        for gram, count in table.items():
            followers[n][gram[:-1]][gram[-1]] = count

    def p(word, context):
        lower = p(word, context[1:]) if context else 1 / vocab
        there = followers[len(context) + 1].get(tuple(context))
        if not there:
            return lower
        d, total = discounts[len(context) + 1], sum(there.values())
        return (max(there.get(word, 0) - d, 0) + d * len(there) * lower) / total

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_equals_the_formula(order):
    draw = np.random.default_rng(order)
    vocab = 7
    walk = lambda m: draw.choice(vocab, (m, 12), p=[.4, .2, .15, .1, .08, .07, 0])  # noqa: E731
    train, test = walk(9), walk(4)
    test[0] = train[0]  # contexts of every order that were seen
    test[1, 3] = 6  # a token that never was
    model, p = counting.KneserNey(train, order, vocab), by_hand(train.tolist(), order, vocab)
    expected = [[p(row[i], tuple(row[max(0, i - order + 1):i])) for i in range(1, 12)]
                for row in test.tolist()]
    np.testing.assert_allclose(model.probabilities(test), expected, rtol=1e-12)


def test_probabilities_sum_to_one():
    draw = np.random.default_rng(0)
    model = counting.KneserNey(draw.integers(0, 5, (6, 20)), 4, 6)
    start = draw.integers(0, 5, (1, 3)).repeat(6, 0)
    rows = np.concatenate([start, np.arange(6)[:, None]], 1)  # every word after one context
    assert model.probabilities(rows)[:, -1].sum() == pytest.approx(1)


def test_baselines_of_a_run(tmp_path):
    write_data_set(tmp_path / "d", {"train": documents(40), "val": documents(5)})
    train, val = (Rows(open_split(tmp_path / "d", s), 16, 3) for s in ("train", "val"))
    scored = val.read_windows(range(10)).astype(np.int64)
    found = counting.baselines(train, 20, scored, 160, 258)
    everything = np.concatenate([train.split.shard(i) for i in range(2)])
    p = (np.bincount(everything, minlength=258) + 1) / (len(everything) + 258)
    assert found["unigram_bpb"] == pytest.approx(-np.log2(p[scored[:, 1:]]).sum() / 160)
    p = by_hand(train.read_windows(train.window_of(0, 20)).tolist(), 5, 258)
    bits = sum(-np.log2(p(row[i], tuple(row[max(0, i - 4):i])))
               for row in scored.tolist() for i in range(1, 17))
    assert found["5-gram_bpb"] == pytest.approx(bits / 160)
    assert found["tokens"] == 20 * 17
    # a run longer than one epoch has seen no more than the windows there are
    assert counting.baselines(train, 10**6, scored, 160, 258)["tokens"] == train.windows * 17
