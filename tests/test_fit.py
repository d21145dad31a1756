"""Dialogs in rows: best fit, masks, weights of sources, and the loss of what is packed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_data_set

from model import IGNORE, LLaMA, ModelConfig
from plainllama.files import file_entry
from plainllama.settings import UserError
from plainllama.tokens import shards
from plainllama.tokens.fit import best_fit
from plainllama.tokens.rows import (
    BEGINS,
    CONTEXT,
    FEW,
    PAD,
    FitRows,
    Rows,
    takes,
    to_batch,
    val_rows,
)
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.weights.adapters import initialise

BOS, T = 256, 32


def write_dialogs(folder, sources: list[dict], dialogs: list[list[tuple[list, list]]],
                  kind: str = "chat") -> None:
    """A data set of dialogs as prepare.py writes it: of each source a part, ids and masks given."""
    folder.mkdir(parents=True)
    words = make_tokenizer("bytes")
    words.save(folder)
    files: dict = {"tokenizer.json": file_entry(folder / "tokenizer.json")}
    splits = {}
    for split in ("train", "val"):
        for part, own in enumerate(dialogs):
            writer = shards.ShardWriter(folder, f"{split}-{part:05}", words.kind)
            for ids, learned in own:
                writer.add(np.array(ids), np.array(learned, bool))
            files |= writer.close()
        splits[split] = {"tokens": sum(len(ids) for own in dialogs for ids, _ in own)}
    shards.write_manifest(folder, {
        "recipe": {"documents": kind, "sources": sources}, "block_size": T, "splits": splits,
        "source_of": {name: int(name[-9:-4]) for name in files if name.endswith(".bin")},
        "tokenizer": {"vocab_size": words.vocab_size, "sha256": words.sha256, "bos": words.bos_id},
        "files": files})


def some_dialogs(count: int, seed: int, longest: int = T + 1) -> list[tuple[list, list]]:
    """Dialogs of random ids, of which about a third is learned, the first never."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(draw.integers(3, longest + 1))
        learned = draw.random(size) < 0.3
        learned[0], learned[-1] = False, True
        made.append(([BOS, *draw.integers(0, 250, size - 1).tolist()], learned.tolist()))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "talk"
    write_dialogs(folder, [{"path": "a"}, {"path": "b"}],
                  [some_dialogs(50, 1), some_dialogs(30, 2)])
    return folder


# ---- best fit

@pytest.mark.parametrize(("sizes", "room"), [
    ([7, 5, 4, 3, 1], 10), ([10] * 4, 10), ([1] * 25, 10), ([6, 6, 5, 5, 4], 10), ([3], 3)])
def test_every_unit_has_a_place_and_no_row_is_too_full(sizes, room):
    order, begins = best_fit(np.array(sizes), room)
    assert sorted(order) == list(range(len(sizes)))
    rows = np.split(order, begins[1:])
    assert all(0 < sum(sizes[i] for i in row) <= room for row in rows)
    assert len(rows) <= 11 / 9 * np.ceil(sum(sizes) / room) + 1  # Johnson's bound


def test_each_unit_goes_where_it_fits_best():
    order, begins = best_fit(np.array([6, 5, 4, 5, 3]), 10)  # 6+4, 5+5, 3
    assert [sorted(row) for row in np.split(order, begins[1:])] == [[0, 2], [1, 3], [4]]


def best_by_search(sizes: list[int], room: int) -> list[int]:
    """How full the rows of best_fit() are, by a search through all of them."""
    filled: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [row for row in range(len(filled)) if filled[row] + size <= room]
        if not fits:
            filled.append(0)
        filled[max(fits, key=lambda row: filled[row]) if fits else -1] += size
    return sorted(filled)


def test_rows_are_as_full_as_by_a_search_through_all():
    draw = np.random.default_rng(4)
    for room in (1, 2, 9, 40):
        for count in (1, 5, 60):
            sizes = draw.integers(1, room + 1, count)
            order, begins = best_fit(sizes, room)
            filled = np.add.reduceat(sizes[order], begins)
            assert sorted(filled.tolist()) == best_by_search(sizes.tolist(), room), (room, sizes)
    order, begins = best_fit(np.array([2, 3, 2, 3, 2]), 5)  # equal sizes keep their order
    assert order.tolist() == [1, 2, 3, 0, 4] and begins.tolist() == [0, 2, 4]


def test_a_million_lengths_leave_little_empty_and_take_seconds():
    sizes = np.minimum(np.random.default_rng(0).geometric(1 / 180, 100_000), 1025)
    order, begins = best_fit(sizes, 1025)
    filled = np.add.reduceat(sizes[order], begins)
    assert filled.max() <= 1025 and filled.mean() > 0.99 * 1025


# ---- what is written is what is read

def test_masks_and_counts_come_back(folder):
    split = shards.open_split(folder, "train")
    dialogs = [*some_dialogs(50, 1), *some_dialogs(30, 2)]
    assert shards.verify(folder) == (0, [])
    assert split.masked and split.documents == 80
    assert split.learned_counts().tolist() == [sum(learned) for _, learned in dialogs]
    start = 0
    for ids, learned in dialogs:
        assert split.read(start, start + len(ids)).tolist() == ids
        assert split.read_mask(start, start + len(ids)).tolist() == learned
        start += len(ids)


def test_a_flipped_mask_is_damage(folder, tmp_path):
    import shutil

    shutil.copytree(folder, copy := tmp_path / "copy")
    raw = bytearray((copy / "train-00000.mask").read_bytes())
    raw[3] ^= 4
    (copy / "train-00000.mask").write_bytes(raw)
    code, problems = shards.verify(copy)
    assert code == 1 and "train-00000.mask" in problems[0]


def test_rows_hold_each_dialog_once_an_epoch_with_what_is_learned_of_it(folder):
    split = shards.open_split(folder, "train")
    rows = FitRows(split, T, seed=3)
    found, learned = [], 0
    for row in rows.rows(0, rows.windows):
        batch = to_batch(row[None], bos_id=BOS)
        learned += int((batch.targets != IGNORE).sum())
        for document in np.split(row[row != PAD], np.flatnonzero(row[row != PAD] >= BEGINS)[1:]):
            ids = document & (CONTEXT - 1)
            found.append((ids.tolist(), (document < CONTEXT).tolist()))
            assert ids[0] == BOS
    wanted = [*some_dialogs(50, 1), *some_dialogs(30, 2)]
    assert sorted(map(repr, found)) == sorted(map(repr, wanted))
    assert learned == sum(sum(mask) for _, mask in wanted) == rows.targets(0, rows.windows)
    assert rows.tokens(0, rows.windows) == sum(len(ids) for ids, _ in wanted)
    for first, n in ((0, 1), (2, 3), (rows.windows - 1, 4)):
        targets = to_batch(rows.rows(first, n)).targets
        assert rows.targets(first, n) == int((targets != IGNORE).sum())


def test_sets_of_dialogs_are_read_as_such_or_refused(folder):
    split = shards.open_split(folder, "train")
    with pytest.raises(UserError, match="packing=fit"):
        Rows(split, T, seed=1)
    with pytest.raises(UserError, match="block_size 8 has room"):
        FitRows(split, 8, seed=1)
    assert set(FitRows(split, T, 1, limit=2).window_of(0, 9)) == {0, 1}


def dialog(size: int, learned: int = 1) -> tuple[list, list]:
    """A dialog of so many tokens, of which the last `learned` ones are learned."""
    return [BOS, *range(1, size)], [False] * (size - learned) + [True] * learned


def test_a_shorter_block_size_is_taken_if_all_have_room(tmp_path):
    for kind, together in (("chat", 1), ("preference", 2)):
        write_dialogs(tmp_path / kind, [{"path": "a"}], [[dialog(6), dialog(3)] * 2], kind)
        split = shards.open_split(tmp_path / kind, "train")
        room = 6 if together == 1 else 9  # tokens: the last one is a target alone
        assert FitRows(split, room - 1, seed=1).windows == 4 - together
        with pytest.raises(UserError) as error:
            FitRows(split, room - 2, seed=1)
        assert str(error.value) == (
            f"data set {tmp_path / kind}: its dialogs were cut to {T} tokens, more than block_size "
            f"{room - 2} has room for; prepare it with that block_size")


def test_pairs_stay_together_and_are_counted(tmp_path):
    pairs = [dialog(5, 2), dialog(4), dialog(9, 3), dialog(8), dialog(3), dialog(4, 2)]
    write_dialogs(tmp_path / "p", [{"path": "a"}], [pairs], "preference")
    rows = FitRows(shards.open_split(tmp_path / "p", "train"), 23, seed=1)  # 9 + 17 + 7, of 24
    assert [rows.documents_of([i]).tolist() for i in range(2)] == [[2, 3, 4, 5], [0, 1]]
    assert rows.documents_of([1, 0]).tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.documents_of([]).tolist() == []
    at = [int(np.flatnonzero(rows.window_of(0, 2) == i)[0]) for i in range(2)]
    assert [rows.pairs(row, 1) for row in at] == [2, 1] and rows.pairs(0, 4) == 6
    assert [rows.targets(row, 1) for row in at] == [7, 3]
    assert [rows.tokens(row, 1) for row in at] == [24, 9]
    assert rows.summary(3) == ("2 rows of 23 tokens in p: 3 pairs, 30.3% of the tokens learned, "
                               "31.2% of the rows empty; 1.50 epochs")
    first = FitRows(shards.open_split(tmp_path / "p", "train"), 23, seed=1, limit=1)
    assert first.windows == 1 and first.pairs(0, 2) == 4 and "2 pairs, 29.2%" in first.summary(1)
    assert takes(rows.split).tolist() == [1, 1, 1]
    rows = val_rows(tmp_path / "p", rows.split.manifest, 23)
    assert type(rows) is FitRows and rows.split.split == "val" and rows.seed == 0


def test_what_is_before_the_first_answer_opens_a_dialog(tmp_path):
    ids, learned = dialog(9, 2)
    write_dialogs(tmp_path / "o", [{"path": "a"}], [[(ids, learned), dialog(5)]])
    assert FitRows(shards.open_split(tmp_path / "o", "train"), T, 1).opening() == ids[:7]


# ---- rows -> batches

def test_what_a_batch_is_made_of():
    row = [BOS | CONTEXT | BEGINS, 5 | CONTEXT, 6, BOS | CONTEXT | BEGINS, 7, PAD]
    batch = to_batch(np.array([row]), fill=2, bos_id=BOS)
    assert batch.ids.tolist() == [[BOS, 5, 6, BOS, 7], [0] * 5]
    assert batch.targets.tolist() == [[IGNORE, 6, IGNORE, 7, IGNORE], [IGNORE] * 5]
    assert batch.starts.tolist() == [[True, False, False, True, False], [False] * 5]
    assert batch.sparse and batch.beside is None and batch.found().tolist() == [1, 3]
    ids, targets, bounds, places = batch.to("cpu")
    assert ids.tolist() == batch.ids.tolist() and bounds is not None
    assert places.tolist() == [1, 3] + [0] * (FEW - 2)
    assert targets.tolist() == [6, 7] + [IGNORE] * (FEW - 2)
    beside = to_batch(np.array([row]), fill=2, bos_id=BOS, beside=np.array([0.5, -2])).beside
    assert beside.dtype == torch.float64
    assert beside.tolist() == [[0.5, 0, 0, -2, 0], [0] * 5]
    assert to_batch(np.array([row]), beside=np.array([0.5, -2])).beside is None

    text = to_batch(np.array([[BOS, 5, 6, 7], [BOS, 8, PAD, PAD], [5, BOS, 0, 1]], np.int64),
                    bos_id=BOS)
    assert not text.sparse
    assert text.ids.tolist() == [[BOS, 5, 6], [BOS, 8, 0], [5, BOS, 0]]
    assert text.targets.tolist() == [[5, 6, 7], [8, IGNORE, IGNORE], [BOS, 0, 1]]
    assert text.starts.tolist() == [[True, False, False]] * 2 + [[False, True, False]]
    ids, targets, bounds, places = text.to("cpu")
    assert places is None and targets is text.targets and bounds is not None
    across = to_batch(np.array([[BOS, 5, 6, 7]], np.uint16))
    assert across.starts is None and across.to("cpu")[2] is None
    assert across.targets.tolist() == [[5, 6, 7]]
    assert to_batch(np.zeros((0, 4), np.uint16)).ids.shape == (0, 3)  # of a rank without a row


@pytest.mark.parametrize(("count", "places"), [(0, 1), (FEW - 1, 1), (FEW, 1), (FEW + 1, 2)])
def test_targets_are_filled_up_to_few_sizes(count, places):
    row = np.array([[5 | CONTEXT] * (600 - count) + [6] * count])
    _, targets, _, found = to_batch(row).to("cpu")
    assert len(targets) == len(found) == places * FEW == places * 256
    assert int((targets == 6).sum()) == count


def test_micro_batches_are_slices_of_a_batch():
    rows = np.arange(35).reshape(5, 7)
    whole = to_batch(rows, bos_id=0, beside=np.array([3.0]))
    parts = [*whole.split(2)]
    assert [part.ids.tolist() for part in parts] == [
        rows[:2, :-1].tolist(), rows[2:4, :-1].tolist(), rows[4:, :-1].tolist()]
    assert [part.targets.tolist() for part in parts][2] == rows[4:, 1:].tolist()
    assert parts[0].starts[0, 0] and not parts[1].starts.any()
    assert parts[0].beside[0, 0] == 3 and not parts[1].beside.any()
    assert [part.sparse for part in parts] == [False] * 3
    bare = to_batch(rows).take([4, 0])
    assert bare.ids[:, 0].tolist() == [28, 0] and bare.starts is None and bare.beside is None


def test_an_epoch_begins_as_it_ends(tmp_path):
    write_dialogs(tmp_path / "many", [{"path": "a"}], [some_dialogs(3000, 5)])
    rows = FitRows(shards.open_split(tmp_path / "many", "train"), T, seed=1)
    tenth = rows.windows // 10
    sizes = [[len(part) for row in rows.rows(first, tenth)
              for part in np.split(row, np.flatnonzero(row >= BEGINS)[1:])]
             for first in (0, rows.windows - tenth)]
    assert abs(np.mean(sizes[0]) - np.mean(sizes[1])) < 0.05 * np.mean(sizes[0])
    assert rows.filled.mean() > 0.95 * (T + 1)


# ---- count and weight

@pytest.mark.parametrize("weights", [(2, 1), (1, 3), (1, 1)])
def test_weights_are_shares_of_the_learned_tokens(tmp_path, weights):
    sources = [{"path": "a", "weight": weights[0]}, {"path": "b", "weight": weights[1]}]
    write_dialogs(tmp_path / "w", sources, [some_dialogs(900, 1), some_dialogs(300, 2, 12)])
    split = shards.open_split(tmp_path / "w", "train")
    often, learned = takes(split), split.learned_counts()
    taken = [(often[part] * learned[part]).sum() for part in (slice(0, 900), slice(900, None))]
    assert taken[0] / taken[1] == pytest.approx(weights[0] / weights[1], rel=0.01)
    assert sum(taken) == pytest.approx(learned.sum(), rel=0.01)
    assert all(np.ptp(often[part]) <= 1 for part in (slice(0, 900), slice(900, None)))
    rows = FitRows(split, T, seed=1)
    assert rows.targets(0, rows.windows) == sum(taken)
    assert takes(shards.open_split(tmp_path / "w", "val")).tolist() == [1] * 1200


def test_counts_are_dialogs(tmp_path):
    write_dialogs(tmp_path / "c", [{"path": "a", "count": 120}, {"path": "b"}],
                  [some_dialogs(50, 1), some_dialogs(30, 2)])
    often = takes(shards.open_split(tmp_path / "c", "train"))
    assert often[:50].sum() == 120 and set(often[:50]) == {2, 3} and (often[50:] == 1).all()


@pytest.mark.parametrize(("sources", "expected"), [
    ([{"count": 1}, {}], [0, 1, 0, 1, 1]), ([{"count": 3}, {"count": 2}], [1, 1, 1, 1, 1]),
    ([{"count": 7}, {"count": 1}], [2, 3, 2, 1, 0]), ([{}, {}], [1, 1, 1, 1, 1]),
    ([{"weight": 1}, {"weight": 1}], [1, 1, 1, 1, 1]),
    ([{"weight": 3}, {"weight": 1}], [1, 2, 1, 1, 0]),
    ([{"weight": 1.0}, {"weight": 9.0}], [0, 0, 0, 2, 2])])
def test_an_epoch_takes_dialogs_as_their_sources_ask(tmp_path, sources, expected):
    sources = [{"path": name} | source for name, source in zip("ab", sources, strict=True)]
    write_dialogs(tmp_path / "d", sources, [[dialog(6, 4)] * 3, [dialog(8, 6)] * 2])
    assert takes(shards.open_split(tmp_path / "d", "train")).tolist() == expected
    assert takes(shards.open_split(tmp_path / "d", "val")).tolist() == [1] * 5


def test_a_source_of_which_nothing_is_left_is_named(tmp_path):
    write_dialogs(tmp_path / "d", [{"path": "a", "count": 2}, {"path": "b"}], [[dialog(6)], []])
    (tmp_path / "d" / "train-00001.num").touch()
    split = shards.open_split(tmp_path / "d", "train")
    split.learned_counts = lambda: np.array([1])
    with pytest.raises(UserError, match="no dialog of b is left to train on"):
        takes(split)


# ---- the loss

@pytest.fixture(scope="module")
def model():
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64, vocab_size=260,
                         block_size=T)
    made = LLaMA(config)
    initialise(made, 1, lambda p: (p, 0))
    return made


def single_loss(model, ids: list, learned: list):
    """The summed loss of one dialog, by the plainest means."""
    logits = model(torch.tensor([ids[:-1]]))[0]
    nats = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return nats[torch.tensor(learned[1:])].sum()


@pytest.mark.parametrize("micro", [1, 3])
def test_packed_loss_and_gradients_are_the_sum_of_the_dialogs(folder, model, micro):
    rows = FitRows(shards.open_split(folder, "train"), T, seed=3)
    model.zero_grad()
    packed = 0.0
    batch = to_batch(rows.rows(0, rows.windows), fill=rows.windows + 2, bos_id=BOS)
    for part in batch.split(micro):  # the last ones are rows without any target
        ids, targets, documents, places = part.to("cpu")
        assert places is not None and len(places) % 256 == 0
        loss = model(ids, targets, documents, places)
        loss.backward()
        packed += loss.item()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = 0.0
    for ids, learned in [*some_dialogs(50, 1), *some_dialogs(30, 2)]:
        loss = single_loss(model, ids, learned)
        loss.backward()
        alone += loss.item()
    assert packed == pytest.approx(alone, rel=1e-5)
    for ours, (name, p) in zip(grads, model.named_parameters(), strict=True):
        assert torch.allclose(ours, p.grad, atol=1e-5 * p.grad.abs().max().item()), name


def test_text_fits_too(tmp_path, model):
    texts = ["a" * 20, "b" * 100, "cc", "d" * 31]  # the second takes four windows
    write_data_set(tmp_path / "text", {"train": texts, "val": texts}, 1)
    rows = FitRows(shards.open_split(tmp_path / "text", "train"), T, seed=1)
    batch = to_batch(rows.rows(0, rows.windows), bos_id=BOS)
    assert rows.targets(0, rows.windows) == sum(len(text) + 1 for text in texts)
    assert int((batch.targets != IGNORE).sum()) == rows.targets(0, rows.windows)
    assert int(batch.starts.sum()) == 1 + 4 + 1 + 1


def test_a_begin_token_inside_a_dialog_begins_none(tmp_path):
    """Bounds come from where dialogs lie, not from what their ids look like."""
    ids = [BOS, 5, 6, BOS, 7, 8]
    write_dialogs(tmp_path / "two", [{"path": "a"}], [[(ids, [False] * 3 + [True] * 3)] * 2])
    rows = FitRows(shards.open_split(tmp_path / "two", "train"), T, seed=1)
    batch = to_batch(rows.rows(0, 1), bos_id=BOS)
    assert batch.starts[0].nonzero().flatten().tolist() == [0, 6]
