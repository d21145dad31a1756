"""counting.py against a Kneser-Ney written with dictionaries, straight from the formula."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
from conftest import documents, write_data_set

from plainllama.evaluation import counting
from plainllama.parallel import World
from plainllama.settings import Settings
from plainllama.tokens.rows import Rows
from plainllama.tokens.shards import open_split
from plainllama.tokens.tokenizer import Tokenizer


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


def test_a_small_table_in_several_shards_and_the_least_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "AT_ONCE", 3)
    write_data_set(tmp_path / "d", {"train": ["ab", "b", "c"], "val": ["a"]}, 2)
    p = counting.unigram(open_split(tmp_path / "d", "train"), 258)
    counts = {ord("a"): 1, ord("b"): 2, ord("c"): 1, 256: 3}  # a begin in front of each document
    total = 1 / p.min()
    assert p.sum() == pytest.approx(1) and total == round(total)
    for token, count in counts.items():
        assert p[token] * total == pytest.approx(count + 1), token


def test_baselines_of_few_rows_and_of_a_small_memory(tmp_path, monkeypatch):
    write_data_set(tmp_path / "d", {"train": documents(40), "val": documents(5)})
    train = Rows(open_split(tmp_path / "d", "train"), 16, 3)
    scored = train.read_windows(range(2)).astype(np.int64)
    for most, rows in ((16 * 5 + 15, 5), (16 * 5, 5), (3, 1)):  # one row at least
        monkeypatch.setattr(counting, "MOST", most)
        found = counting.baselines(train, 20, scored, 100, 258)
        assert found["tokens"] == rows * 17
    p = by_hand(train.read_windows(train.window_of(0, 1)).tolist(), 5, 258)
    bits = sum(-np.log2(p(row[i], tuple(row[max(0, i - 4):i])))
               for row in scored.tolist() for i in range(1, 17))
    assert found["5-gram_bpb"] == pytest.approx(bits / 100)


def test_what_counting_reaches_is_said_beside_the_model(tmp_path):
    write_data_set(tmp_path / "d", {"train": documents(40), "val": documents(5)})
    val = Rows(open_split(tmp_path / "d", "val"), 16, 0)
    said: list[str] = []
    scores = {"val_tokens": 10 * 16 + 5, "val_bytes": 150, "val_bpb": 1.5}
    config = Settings(dataset="d", seed=3)
    found = counting.compare(val, 20, scores, config, said.append)
    train = Rows(open_split(tmp_path / "d", "train"), 16, 3)
    scored = val.read_windows(range(10)).astype(np.int64)
    assert found == counting.baselines(train, 20, scored, 150, 258)
    least = found["unigram_bpb"]
    assert said == [
        f"  {name:<14}{bits:9.4f} bits per byte, {1 - bits / least:6.1%} below unigram"
        for name, bits in (("unigram", least), ("5-gram", found["5-gram_bpb"]),
                           ("this model", 1.5))]
    assert said[0].endswith("   0.0% below unigram")


# ---- questions in the training data

def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_runs_of_thirteen_words():
    def count(text: str) -> int:
        return len(list(counting.run_hashes(text)))

    assert [count(words(*range(n))) for n in (0, 12, 13, 14, 20)] == [0, 0, 1, 2, 8]
    [one] = counting.run_hashes(words(*range(13)))
    [same] = counting.run_hashes(words(*range(13)).upper().replace(" ", ", ") + "!")
    assert one == same != next(iter(counting.run_hashes(words(*range(1, 14)))))


class Asked(NamedTuple):
    """A task that asks these questions."""

    asked: list[str]

    def questions(self) -> list[str]:
        return self.asked


@pytest.fixture
def held(tmp_path) -> tuple[list, object]:
    """Two data sets of byte tokens, the words 0 to 39 and 100 to 139, and their tokenizer."""
    for name, first in (("a", 0), ("b", 100)):
        write_data_set(tmp_path / name, {"train": [words(*range(first, first + 40)), "short"],
                                         "val": ["x"]})
    return [tmp_path / "a", tmp_path / "b"], Tokenizer.load(tmp_path / "a")


def test_which_runs_the_training_data_holds(held):
    folders, tokenizer = held
    texts = [words(*range(5, 19)), words(*range(12)), words(*range(130, 144)),
             words(*range(50, 64))]
    owner, met = counting.runs_met(texts, folders, tokenizer, World())
    assert owner.tolist() == [0, 0, 2, 2, 3, 3] and not met[2:].any()
    assert met.tolist() == [True, True, False, False, False, False]
    late = [words(*range(127, 141))]
    assert counting.runs_met(late, folders, tokenizer, World())[1].tolist() == [True, False]
    assert not counting.runs_met(late, folders[:1], tokenizer, World())[1].any()
    assert [one.tolist() for one in counting.runs_met([], folders, tokenizer, World())] == [[], []]
    # of the first few tokens alone: a document that begins among them is looked through whole
    for most, found in ((0, False), (1, True)):
        assert counting.runs_met(texts[:1], folders, tokenizer, World(), most)[1].any() == found
    tokens = sum(open_split(folders[0], "train").shard(i).size for i in range(2))
    for most, found in ((tokens, False), (tokens + 1, True)):
        _, met = counting.runs_met([words(*range(110, 123))], folders, tokenizer, World(), most)
        assert met.any() == found


def test_ranks_share_the_shards_and_every_document_comes_once(held):
    folders, tokenizer = held
    splits = [open_split(folder, "train") for folder in folders]
    every = [*counting.documents(splits, tokenizer, World(), 10**9)]
    assert [text.split("w")[1].split()[0] if "w" in text else text[-5:] for text in every] == [
        "0", "short", "100", "short"]
    shared = []
    for rank in range(3):
        world = World()
        world.rank, world.size = rank, 3
        shared += counting.documents(splits, tokenizer, world, 10**9)
    assert sorted(shared) == sorted(every)


def test_contaminated_questions_are_counted_of_all(held):
    folders, tokenizer = held
    tasks = {"q": Asked([words(*range(5, 18)), words(*range(5, 17)), words(*range(60, 73)),
                         words(*range(110, 130))]), "none": Asked(["short"]), "empty": Asked([])}
    found = counting.contamination(tasks, folders, tokenizer, World())
    assert found == {"q": {"contaminated": 0.5, "long_enough": 3}}
    said: list[str] = []
    contaminated, repeated = counting.look_through(
        tasks, None, 0, folders, tokenizer, World(), said.append)
    assert (contaminated, repeated) == (found, {})
    assert sorted(said) == [f"no contamination of {name}: no question has 13 words"
                            for name in ("empty", "none")]
    assert counting.look_through(None, None, 0, folders, tokenizer, World(), print) == ({}, {})


class Window:
    """Windows of texts, as Rows has them."""

    def __init__(self, texts: list[str], tokenizer, size: int = 64):
        ids = [[*tokenizer.encode(text)][:size + 1] for text in texts]
        self.rows = np.array([row + [32] * (size + 1 - len(row)) for row in ids], np.int32)
        self.block_size, self.windows = size, len(texts)

    def read_windows(self, windows):
        return self.rows[list(windows)]


def test_how_much_of_a_split_the_training_data_repeats(held, monkeypatch):
    folders, tokenizer = held
    windows = Window([words(*range(1, 15)), words(*range(60, 73)), words(*range(2, 15))], tokenizer)
    said: list[str] = []

    def share(tokens: int, tasks: dict | None = None) -> dict:
        said.clear()
        return counting.look_through(tasks, windows, tokens, folders, tokenizer, World(),
                                     said.append)[1]

    assert share(64) == {"repeated": 1.0} and share(128) == {"repeated": 2 / 3}
    assert share(192) == {"repeated": 3 / 4}
    assert said == ["note: at least 75.00% of the runs of 13 words lie in the training data: of "
                    "these, bits per byte tell what is remembered"]
    monkeypatch.setattr(counting, "LOOK", 0)  # so little is looked through unasked
    assert share(192) == {} and said == []
    assert share(192, {}) == {"repeated": 3 / 4}  # and all of it, if questions are asked for
