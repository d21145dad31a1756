"""The token format and the batch stream."""

import json
import shutil

import numpy as np
import pytest
from conftest import documents, write_data_set

from plainllama.settings import UserError
from plainllama.tokens import shards, tokenizer
from plainllama.tokens.rows import PAD, DocumentRows, Rows, permute, training_rows


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


def test_permutation_shuffles_evenly():
    """Over many keys, each position goes everywhere about equally often."""
    hits = np.zeros((20, 20))
    for key in range(2000):
        hits[np.arange(20), permute(np.arange(20), 20, (key, 0))] += 1
    chi_square = ((hits - 100) ** 2 / 100).sum()
    assert chi_square < 361 + 6 * (2 * 361) ** 0.5  # 19 x 19 degrees of freedom


def test_no_row_can_be_made(folder):
    with pytest.raises(UserError, match="fewer than one row"):
        Rows(shards.open_split(folder, "val"), 10_000, 0)


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
    from plainllama.settings import Settings

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
