"""The token format and the batch stream."""

import hashlib
import json
import shutil
import struct

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


# ---- the format, byte by byte

@pytest.mark.parametrize(("vocab", "width"), [
    (1, 2), (65535, 2), (65536, 2), (65537, 4), (1 << 20, 4)])
def test_tokens_have_two_bytes_while_every_id_fits(vocab, width):
    assert shards.token_dtype(vocab) == np.dtype(f"<u{width}")


def test_files_are_what_the_format_says(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train-00000", np.dtype("<u4"))
    for ids, learned in (([7, 1, 2], [0, 1, 1]), ([70000, 5], [0, 1]),
                         ([3] * 5, [0, 0, 0, 0, 1])):
        writer.add(np.array(ids), np.array(learned, bool))
    assert {path.name for path in tmp_path.iterdir()} == {"train-00000.bin.tmp",
                                                          "train-00000.idx.tmp"}
    entries = writer.close()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ids = [7, 1, 2, 70000, 5, 3, 3, 3, 3, 3]
    assert found == {
        "train-00000.bin": b"plnllama" + struct.pack("<IIQ", 1, 4, 10) + bytes(40)
        + struct.pack("<10I", *ids),
        "train-00000.idx": struct.pack("<3Q", 0, 3, 5),
        "train-00000.mask": bytes([0b00010110, 0b10]),
        "train-00000.num": struct.pack("<3I", 2, 1, 1)}
    assert entries == {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                       | ({"tokens": 10, "documents": 3, "largest_id": 70000}
                          if name.endswith(".bin") else {}) for name, content in found.items()}


def test_the_largest_id_is_that_of_all_documents(tmp_path):
    for documents_of, largest in (([[0, 0]], 0), ([[]], 0), ([[1], [9, 3], [4]], 9)):
        writer = shards.ShardWriter(tmp_path, "val-00001", np.dtype("<u2"))
        for ids in documents_of:
            writer.add(np.array(ids, int))
        assert writer.close()["val-00001.bin"]["largest_id"] == largest


def of_clients(folder, files=(("a", "b"), ("c",))):
    """A data set of tables, of which each client's text is [its letter] * 3."""
    write_data_set(folder, {"train": ["x"], "val": ["y"]}, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    for i, names in enumerate(files):
        writer = shards.ShardWriter(folder, f"train-{i:05}", np.dtype("<u2"))
        for name in names:
            writer.add(np.array([ord(name)] * 3), client=name)
        manifest["files"] |= writer.close()
    manifest["recipe"]["documents"] = "table"
    shards.write_manifest(folder, {k: v for k, v in manifest.items() if k != "format"})
    return folder


def test_clients_are_told_by_the_files_beside_their_tokens(tmp_path):
    folder = of_clients(tmp_path / "t")
    assert json.loads((folder / "train-00000.ids").read_text()) == ["a", "b"]
    assert not (folder / "train-00000.mask").exists() and not (folder / "val-00000.ids").exists()
    split = shards.open_split(folder, "train")
    assert split.clients() == ["a", "b", "c"]
    assert (split.whole, split.masked, split.together, split.documents) == (True, False, 1, 3)
    assert split.bounds().tolist() == [0, 3, 6, 9] and split.tokens == 9
    assert split.read(0, 9).tolist() == [97] * 3 + [98] * 3 + [99] * 3
    assert split.read(2, 4).tolist() == [97, 98] and split.read(5, 7).tolist() == [98, 99]
    assert [split.file_of(token) for token in (0, 5, 6, 8)] == [0, 0, 1, 1]
    assert shards.verify(folder) == (0, [])


@pytest.mark.parametrize(("kind", "version", "about"), [
    (None, 1, (False, False, 1)), ("text", 1, (False, False, 1)), ("chat", 2, (True, True, 1)),
    ("preference", 2, (True, True, 2)), ("table", 3, (True, False, 1))])
def test_the_format_of_a_manifest_is_that_of_its_documents(folder, kind, version, about):
    manifest_with(folder, lambda m: m["recipe"].update({"documents": kind} if kind else {}))
    manifest = shards.read_manifest(folder)
    split = shards.Split(folder, "train", manifest)
    assert manifest["format"] == version
    assert (split.whole, split.masked, split.together) == about
    assert shards.verify(folder) == (0, [])


def test_masks_and_sources_are_those_of_each_file(tmp_path):
    write_data_set(tmp_path / "m", {"train": ["x"], "val": ["y"]}, 1)
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    masks = ([[0, 1, 1], [0, 0, 1] * 70, [0] * 7 + [1], [0, 0, 1, 0, 1, 1, 0, 1, 1]],
             [[0, 1] * 8, [0, 1]])
    for i, own in enumerate(masks):
        writer = shards.ShardWriter(tmp_path / "m", f"train-{i:05}", np.dtype("<u2"))
        for mask in own:
            writer.add(np.arange(len(mask)), np.array(mask, bool))
        manifest["files"] |= writer.close()
    manifest["recipe"]["documents"] = "chat"
    manifest["source_of"] = {"train-00000.bin": 1, "train-00001.bin": 0}
    shards.write_manifest(tmp_path / "m", {k: v for k, v in manifest.items() if k != "format"})
    split = shards.open_split(tmp_path / "m", "train")
    start = 0
    for mask in [*masks[0], *masks[1]]:
        assert split.read_mask(start, start + len(mask)).tolist() == list(map(bool, mask))
        assert split.read_mask(start + 1, start + len(mask)).tolist() == list(map(bool, mask[1:]))
        start += len(mask)
    assert split.sources().tolist() == [1, 1, 1, 1, 0, 0]
    assert split.learned_counts().tolist() == [2, 70, 1, 5, 8, 1]


# ---- what is refused

def test_each_way_in_which_a_folder_is_no_data_set_has_its_message(folder, tmp_path):
    def message(of=folder):
        with pytest.raises(UserError) as error:
            shards.read_manifest(of)
        return str(error.value)

    path, original = folder / "manifest.json", (folder / "manifest.json").read_bytes()
    assert message(tmp_path / "my set") == (
        f"no data set {tmp_path / 'my set'}; make it with: python prepare.py CONFIG "
        "--dataset='my set' (--sources=YOUR.txt for text of your own)")
    for name in ("manifest.json", "manifest.sha256"):  # a link to nowhere, and a file
        of = tmp_path / f"no-{name}"
        of.symlink_to("nowhere") if name == "manifest.json" else of.touch()
        assert message(of) == (f"{of} is a file or a link to nowhere, where a folder shall be; "
                               "remove it or name another")
    (tmp_path / "other").mkdir()
    assert message(tmp_path / "other") == (
        f"{tmp_path / 'other'} is not a data set: it has no manifest.json")
    for name in ("x.bin", "y.tmp"):
        (tmp_path / "other" / name).touch()
        assert message(tmp_path / "other") == (
            f"data set {tmp_path / 'other'} is unfinished (no manifest.json); run prepare.py again")
        (tmp_path / "other" / name).unlink()
    manifest = json.loads(original)
    for version in (0, 4, None):
        path.write_text(json.dumps(manifest | {"format": version}))
        assert message() == (f"{path} has format {version}, this program reads 1 and 2 and 3; use "
                             "the plainllama that wrote it, or prepare the data set again")
    path.write_bytes(original + b" ")
    assert message() == f"{path} does not match manifest.sha256: one of them is damaged"
    path.write_bytes(original)
    shutil.move(folder / "manifest.sha256", folder / "away")
    assert message() == f"{path} does not match manifest.sha256: one of them is damaged"
    shutil.move(folder / "away", folder / "manifest.sha256")
    for change in (lambda m: m.update(files=[]), lambda m: m["splits"].pop("train"),
                   lambda m: m["tokenizer"].pop("vocab_size"),
                   lambda m: m["files"].update(x={"sha256": ""})):
        manifest_with(folder, change)
        assert "is not a plainllama manifest (" in message()
        path.write_bytes(original)
        manifest_with(folder, lambda m: None)
    token_file = folder / "train-00001.bin"
    size = token_file.stat().st_size
    with open(token_file, "ab") as file:
        file.write(b"x")
    assert message() == (f"data set {folder}: train-00001.bin has {size + 1} bytes where the "
                         f"manifest says {size}; prepare it again")
    assert shards.verify(folder) == (1, [message()])
    shutil.move(token_file, tmp_path / "away")
    assert message() == f"data set {folder}: train-00001.bin is missing; prepare it again"
    token_file.symlink_to(tmp_path / "away")
    assert message() == f"{path} names 'train-00001.bin', which leaves the data set's folder"


def test_verify_names_what_is_damaged_and_what_is_foreign(folder, tmp_path):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "sources.json"):
        (folder / name).touch()  # what a system puts there, and what prepare.py notes
    assert shards.verify(folder) == (0, [])
    assert [path.name for path in shards.files_in(folder)] == sorted(
        [*json.loads((folder / "manifest.json").read_text())["files"], "manifest.json",
         "manifest.sha256", "sources.json"])
    (folder / "more.txt").touch()
    content = bytearray((folder / "val-00001.idx").read_bytes())
    content[-1] ^= 1
    (folder / "val-00001.idx").write_bytes(content)
    assert shards.verify(folder) == (1, [
        f"{folder / 'val-00001.idx'}: its sha256 is not the manifest's",
        f"{folder / 'more.txt'}: not named by the manifest"])
    assert shards.verify(tmp_path / "none")[0] == 2


@pytest.mark.parametrize(("place", "value"), [(0, b"P"), (8, b"\2"), (12, b"\3"), (16, b"\0\0")])
def test_a_header_that_is_another_is_refused(folder, place, value):
    split = shards.open_split(folder, "train")
    content = bytearray((folder / "train-00000.bin").read_bytes())
    content[place:place + len(value)] = value
    (folder / "train-00000.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        split.read(0, 1)
    assert str(error.value) == (f"{folder / 'train-00000.bin'}: its header does not match the "
                                "manifest; prepare it again")


def test_an_id_beyond_the_tokenizer_is_refused(folder):
    for largest, fits in ((257, True), (258, False)):
        manifest_with(folder, lambda m, largest=largest: m["files"]["val-00001.bin"].update(
            largest_id=largest))
        if fits:
            shards.open_split(folder, "val")
            continue
        with pytest.raises(UserError) as error:
            shards.open_split(folder, "val")
    assert str(error.value) == (f"{folder / 'val-00001.bin'} holds id 258 but the tokenizer has "
                                "258 entries; prepare it again")
