"""The token format and the batch stream."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from conftest import documents, write_data_set

from plainllama.settings import Settings, UserError
from plainllama.tokens import shards, tokenizer
from plainllama.tokens.rows import (
    PAD,
    DocumentRows,
    FitRows,
    Rows,
    hash_of_data,
    ids_of,
    permute,
    spread,
    training_rows,
    val_rows,
)


@pytest.fixture
def folder(tmp_path):
    write_data_set(tmp_path / "toy", {"train": documents(40), "val": documents(3)}, 3)
    return tmp_path / "toy"


def all_tokens(folder) -> np.ndarray:
    """Every training token, read with struct and numpy alone."""
    parts = []
    for path in sorted(folder.glob("train-*.bin")):
        raw = path.read_bytes()
        assert raw[:8] == b"plnllama" and raw[8:16] == b"\x01\0\0\0\x02\0\0\0"
        parts.append(np.frombuffer(raw, "<u2", int.from_bytes(raw[16:24], "little"), 64))
    return np.concatenate(parts)


def test_documents_come_back_with_their_boundaries(folder):
    words = tokenizer.Tokenizer.load(folder)
    split = shards.open_split(folder, "train")
    tokens = all_tokens(folder)
    assert np.array_equal(split.read(0, split.tokens), tokens)
    texts = [words.decode(ids) for ids in np.split(tokens, np.where(tokens == words.bos_id)[0][1:])]
    expected = [d for i in range(3) for d in documents(40)[i::3]]
    assert texts == expected
    starts = np.fromfile(folder / "train-00001.idx", "<u8")
    assert all(split.shard(1)[int(s)] == words.bos_id for s in starts)
    assert len(starts) == len(documents(40)[1::3])


@pytest.mark.parametrize("T", [7, 64, 1000])
def test_each_window_once_an_epoch_for_any_number_of_ranks(folder, T):
    split = shards.open_split(folder, "train")
    rows = Rows(split, T, seed=5)
    tokens = all_tokens(folder)
    assert rows.windows == (len(tokens) - 1) // T
    assert rows.tail == len(tokens) - 1 - rows.windows * T
    for epoch in (0, 1):
        order = rows.window_of(epoch * rows.windows, rows.windows)
        assert sorted(order) == list(range(rows.windows))
    assert not np.array_equal(rows.window_of(0, rows.windows),
                              rows.window_of(rows.windows, rows.windows)) or rows.windows < 4
    some = rows.rows(3, 10)
    for window, row in zip(rows.window_of(3, 10), some, strict=True):
        assert np.array_equal(row, tokens[window * T:window * T + T + 1])
    for size in (1, 2, 3, 8):
        together = np.empty_like(some)
        for rank in range(size):
            together[rank::size] = rows.rows(3, 10)[rank::size]
        assert np.array_equal(together, some)


def test_rows_are_a_function_of_seed_and_position(folder):
    split = shards.open_split(folder, "train")
    a, b = (Rows(split, 16, seed) for seed in (1, 2))
    assert np.array_equal(a.window_of(5, 9)[3:], a.window_of(8, 6))
    assert not np.array_equal(a.window_of(0, 50), b.window_of(0, 50))
    assert set(Rows(split, 16, 1, limit=2).window_of(0, 9)) == {0, 1}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permutation_is_one(size):
    order = permute(np.arange(size), size, ("key", 1))
    assert sorted(order) == list(range(size))


def feistel(value: int, size: int, key: tuple) -> int:
    """permute() of one position, written once more with Python's numbers."""
    half = 0
    while 4 ** half < size:
        half += 1
    digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
    while True:
        left, right = divmod(value, 2 ** half)
        for place in range(0, 32, 8):
            mixed = right + int.from_bytes(digest[place:place + 8], "little")
            mixed = mixed * 0x9E3779B97F4A7C15 % 2 ** 64
            mixed = (mixed ^ mixed // 2 ** 29) * 0xBF58476D1CE4E5B9 % 2 ** 64
            left, right = right, left ^ mixed // 2 ** 32 % 2 ** half
        value = left * 2 ** half + right
        if value < size:
            return value


@pytest.mark.parametrize("size", [1, 2, 4, 5, 16, 17, 1000, 10 ** 12])
def test_the_permutation_is_the_same_on_every_machine(size):
    positions = np.arange(min(size, 40)) * (size // min(size, 40))
    for key in ((7, 0), ((7, "set"), 3)):
        order = permute(positions, size, key)
        assert order.dtype == np.int64
        assert order.tolist() == [feistel(at, size, key) for at in positions.tolist()]


def test_permutation_shuffles_evenly():
    """Over many keys, each position goes everywhere about equally often."""
    hits = np.zeros((20, 20))
    for key in range(2000):
        hits[np.arange(20), permute(np.arange(20), 20, (key, 0))] += 1
    chi_square = ((hits - 100) ** 2 / 100).sum()
    assert chi_square < 361 + 6 * (2 * 361) ** 0.5  # 19 x 19 degrees of freedom


def test_no_row_can_be_made(folder, tmp_path):
    split = shards.open_split(folder, "val")
    with pytest.raises(UserError, match="fewer than one row"):
        Rows(split, 10_000, 0)
    with pytest.raises(UserError) as error:
        Rows(split, split.tokens, 0)
    assert str(error.value) == (
        f"data set {folder}: its val split has {split.tokens} tokens, fewer than one row of "
        f"block_size {split.tokens} + 1; prepare more text or lower block_size")
    rows = Rows(split, split.tokens - 1, 0)
    assert (rows.windows, rows.tail) == (1, 0)
    assert Rows(split, (split.tokens - 2) // 2, 0).tail == 1 + split.tokens % 2
    assert Rows(split, 7, 0, limit=10 ** 6).windows == (split.tokens - 1) // 7
    write_data_set(tmp_path / "none", {"train": [], "val": [""]}, 0)
    write_data_set(tmp_path / "one", {"train": [""], "val": [""]}, 1)
    for kind, message in ((Rows, "has 0 tokens"), (DocumentRows, "no document of two tokens")):
        with pytest.raises(UserError, match=message):
            kind(shards.open_split(tmp_path / "none", "train"), 8, 0)
    rows = DocumentRows(shards.open_split(tmp_path / "one", "val"), 8, 0)  # begin and end
    assert rows.windows == 1 and rows.rows(0, 2)[:, :3].tolist() == [[256, 257, PAD]] * 2
    assert DocumentRows(shards.open_split(folder, "train"), 16, 0, limit=3).windows == 3


def test_what_a_run_sees_of_its_rows_is_said_and_counted(tmp_path):
    for name, texts in (("a", ["x" * 41, "y" * 8]), ("b", ["z" * 30])):  # 53 and 32 tokens
        write_data_set(tmp_path / name, {"train": texts, "val": texts}, 1)
    split = shards.open_split(tmp_path / "a", "train")
    rows = Rows(split, 10, 0)
    assert rows.summary(12) == "5 rows of 10 tokens in a, 2 tokens left out; 2.40 epochs"
    assert rows.targets(3, 7) == rows.tokens(3, 7) == 70
    cut = DocumentRows(split, 10, 0)  # 43 and 10 tokens, in 5 and 1 windows
    assert cut.summary(3) == "6 rows of 10 tokens in a, 0 tokens left out; 0.50 epochs"
    assert cut.targets(0, 12) == 2 * (42 + 9) == cut.tokens(0, 12)
    fit = FitRows(split, 10, 0)  # windows of 11, 11, 11, 11, 3 and 10
    assert fit.summary(3) == ("6 rows of 10 tokens in a: 6 documents, 89.5% of the tokens learned, "
                              "13.6% of the rows empty; 0.50 epochs")
    assert (fit.targets(0, 6), fit.tokens(0, 6)) == (51, 57)
    manifest = shards.read_manifest(tmp_path / "a")
    for packing in ("concat", "fit"):
        config = Settings(mixture={"a": 3, "b": 1}, block_size=10, seed=1, packing=packing)
        mixed = training_rows(tmp_path / "a", manifest, config)
        a, b = mixed.sets
        assert mixed.rows_of(0, 0, 400) == (0, 300) and mixed.rows_of(1, 400, 800) == (100, 200)
        assert mixed.tokens(0, 400) == a.tokens(0, 300) + b.tokens(0, 100)
        assert mixed.targets(1200, 40) == a.targets(900, 30) + b.targets(300, 10)
        assert mixed.summary(401) == (f"a mixture of 75.0% {a.summary(300)}, and 25.0% "
                                      f"{b.summary(100)}")


@pytest.mark.parametrize(("weights", "slots", "expected"), [
    ([1, 1], 4, [0, 1, 0, 1]), ([1, 3], 4, [1, 0, 1, 1]), ([2, 1], 4, [0, 0, 1, 0]),
    ([1, 1, 1], 4, [0, 1, 2, 0]), ([5], 3, [0, 0, 0])])
def test_a_table_is_spread_evenly(weights, slots, expected):
    assert spread(weights, slots).tolist() == expected


def test_a_mixture_takes_a_thousandth_or_says_so(tmp_path):
    assert np.bincount(spread([1, 999])).tolist() == [1, 999]
    with pytest.raises(UserError) as error:
        spread([1, 2999, 0.5])
    assert str(error.value) == ("mixture: a weight of 0.5 beside 3000.5 in all is less than one in "
                                "1000; leave it out or give it more")


def test_rows_are_opened_as_the_config_says(folder, tmp_path):
    manifest = shards.read_manifest(folder)
    config = Settings(block_size=16, seed=3, packing="doc", overfit_rows=2)
    rows = training_rows(folder, manifest, config)
    assert type(rows) is DocumentRows and rows.windows == 2
    assert (rows.split.split, rows.block_size, rows.seed) == ("train", 16, 3)
    rows = val_rows(folder, manifest, 16)
    assert type(rows) is Rows and (rows.split.split, rows.block_size, rows.seed) == ("val", 16, 0)
    assert hash_of_data(folder, config) == (folder / "manifest.sha256").read_text().strip()
    write_data_set(tmp_path / "b", {"train": ["b" * 40], "val": ["b"]}, 1)
    config = Settings(mixture={"b": 1, "toy": 1}, packing="concat")
    both = [(tmp_path / name / "manifest.sha256").read_text()[:64] for name in ("toy", "b", "toy")]
    assert hash_of_data(folder, config) == hashlib.sha256("".join(both).encode()).hexdigest()
    manifest["tokenizer"]["sha256"] = "another"
    with pytest.raises(UserError, match=r"b has another tokenizer than .*toy; prepare it with"):
        training_rows(folder, manifest, config)


def test_ids_come_without_flags():
    from plainllama.tokens.rows import BEGINS, CONTEXT

    row = np.array([256 | CONTEXT | BEGINS, 7 | CONTEXT, 8, CONTEXT - 1, PAD, PAD])
    assert ids_of(row).tolist() == [256, 7, 8, CONTEXT - 1] and ids_of(row).dtype == np.int64
    assert ids_of(np.array([3, 65535], np.uint16)).tolist() == [3, 65535]


def test_every_byte_is_verified(folder, tmp_path):
    assert shards.verify(folder) == (0, [])
    rng = np.random.default_rng(0)
    names = sorted(p.name for p in folder.iterdir())
    for trial in range(200):
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(folder, copy)
        name = names[trial % len(names)]
        content = bytearray((copy / name).read_bytes())
        place = int(rng.integers(len(content) if trial % 2 else min(40, len(content))))
        content[place] ^= 1 << int(rng.integers(8))
        (copy / name).write_bytes(content)
        code, problems = shards.verify(copy)
        assert code == 1 and problems, (name, place)
        shutil.rmtree(copy)
    (folder / "train-00099.bin").write_bytes(b"foreign")
    assert shards.verify(folder)[0] == 1
    assert shards.verify(tmp_path)[0] == 2


def manifest_with(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    shards.write_manifest(folder, {k: v for k, v in manifest.items() if k != "format"})


def test_training_refuses_what_is_not_whole(folder):
    cases = [(lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}), "leaves"),
             (lambda m: m["files"].update({"absent": {"size": 1, "sha256": ""}}), "missing"),
             (lambda m: m.pop("splits"), "not a plainllama manifest")]
    original = (folder / "manifest.json").read_bytes()
    for change, message in cases:
        manifest_with(folder, change)
        with pytest.raises(UserError, match=message):
            shards.read_manifest(folder)
        (folder / "manifest.json").write_bytes(original)
    manifest_with(folder, lambda m: m["files"]["train-00000.bin"].update(largest_id=300))
    with pytest.raises(UserError, match="holds id 300"):
        shards.open_split(folder, "train")
    (folder / "manifest.json").write_bytes(original)
    with pytest.raises(UserError, match=r"manifest\.sha256"):
        shards.read_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        shards.read_manifest(folder)
    with pytest.raises(UserError, match="no data set"):
        shards.read_manifest(folder / "nothing")


def test_document_starts_are_those_of_the_index(folder):
    split = shards.open_split(folder, "train")
    tokens, bos = all_tokens(folder), tokenizer.Tokenizer.load(folder).bos_id
    starts = np.concatenate([split.index(i).astype(np.int64) + split.starts[i] for i in range(3)])
    assert np.array_equal(starts, np.flatnonzero(tokens == bos))
    for T in (7, 64, 1000):
        rows = Rows(split, T, seed=5)
        for window, row in enumerate(rows.read_windows(range(rows.windows))):
            expected = starts[(starts >= window * T) & (starts < window * T + T)] - window * T
            assert np.array_equal(np.flatnonzero(row[:-1] == bos), expected)


@pytest.mark.parametrize("T", [7, 64, 5000])
def test_rows_of_one_document_lose_nothing_and_share_nothing(folder, T):
    rows = DocumentRows(shards.open_split(folder, "train"), T, seed=5)
    expected = []
    for i in range(3):
        for text in documents(40)[i::3]:
            ids = np.array([256, *text.encode(), 257])
            for k in range(0, len(ids) - 1, T):
                row = np.full(T + 1, -1)
                row[:len(ids[k:k + T + 1])] = ids[k:k + T + 1]
                expected.append(row)
    assert np.array_equal(rows.read_windows(range(rows.windows)), expected)
    seen = rows.rows(rows.windows, rows.windows)  # a whole epoch
    assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))
    assert rows.targets(3, 11) == int((rows.rows(3, 11)[:, 1:] >= 0).sum())
    for window, row in enumerate(expected):  # one may begin at a row's first token only
        starts = np.flatnonzero(rows.read_windows([window])[0] == 256)
        assert list(starts) == [0] * int(row[0] == 256)
    begun = sum(len(rows.split.index(i)) for i in range(3))
    assert begun == sum(row[0] == 256 for row in rows.read_windows(range(rows.windows)))


@pytest.mark.parametrize("packing", ["concat", "doc"])
def test_mixture_is_exact_by_its_table(tmp_path, packing):
    for name, n in (("a", 40), ("b", 15), ("c", 7)):
        write_data_set(tmp_path / name, {"train": [name + d for d in documents(n)],
                                         "val": documents(3)}, 3)
    weights = {"b": 3, "a": 1.0, "c": 0.5}
    config = Settings(mixture=weights, block_size=16, seed=3, packing=packing)
    mixed = training_rows(tmp_path / "a", shards.read_manifest(tmp_path / "a"), config)
    counts = {"a": 222, "b": 667, "c": 111}  # thousandths
    alone = {name: type(mixed.sets[0])(shards.open_split(tmp_path / name, "train"), 16, (3, name))
             for name in counts}
    used = dict.fromkeys(counts, 0)
    assert mixed.read_windows(np.array([], int)).shape == (0, 17)  # of a rank without a row
    rows = mixed.rows(0, 2500)
    for r, row in enumerate(rows):
        name = "abc"[mixed.table[r % 1000]]
        assert np.array_equal(row, alone[name].rows(used[name], 1)[0])
        used[name] += 1
        assert all(abs(used[k] - counts[k] * (r + 1) / 1000) < 1.5 for k in used)
    assert {k: v for k, v in zip("abc", np.bincount(mixed.table), strict=True)} == counts
    assert np.array_equal(mixed.rows(1700, 50), rows[1700:1750])
    assert mixed.targets(1700, 700) == int((rows[1700:2400, 1:] != PAD).sum())
    window = int(mixed.window_of(1, 1)[0])
    starts = np.flatnonzero(mixed.read_windows([window])[0][:-1] == 256)
    assert np.array_equal(starts, np.flatnonzero(rows[1][:-1] == 256))
    config.mixture = {"a": 1, "c": 1e-9}
    with pytest.raises(UserError, match="less than one in 1000"):
        training_rows(tmp_path / "a", shards.read_manifest(tmp_path / "a"), config)


def test_the_hash_file_is_verified_to_its_last_byte(folder):
    for change in (b"", b" ", b"\r\n", b"\x0b"):
        path = folder / "manifest.sha256"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + change)
        assert shards.verify(folder)[0] == 1, change
        path.write_bytes(content)
    assert shards.verify(folder)[0] == 0
