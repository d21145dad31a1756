"""The loop on dialogs: rows of several, masks, epochs, a vocabulary that grows, exact resume."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import metrics, run_script
from safetensors.torch import load_file
from test_fit import BOS, T, some_dialogs, write_dialogs

import train
from model import ModelConfig
from plainllama.command import parse
from plainllama.files import file_entry, read_json, sha256
from plainllama.settings import UserError
from plainllama.tokens import shards
from plainllama.tokens.rows import BEGINS, FitRows, to_batch
from plainllama.weights.adapters import initial_weight
from plainllama.weights.peft import load_model

CONFIG = """
dataset = 'talk'
n_layer = 2
n_head = 2
d_model = 32
d_ff = 64
block_size = 32
max_steps = 12
global_batch_tokens = 256
micro_batch = 4
learning_rate = 1e-2
min_lr = 1e-3
warmup_steps = 2
device = 'cpu'
log_interval = 1
eval_interval = 6
save_interval = 6
sample_tokens = 0
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with data/talk, 80 dialogs of random ids, and a tiny config."""
    write_dialogs(tmp_path / "data/talk", [{"path": "a"}, {"path": "b"}],
                  [some_dialogs(50, 1), some_dialogs(30, 2)])
    (tmp_path / "talk.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    """train.py in this process."""
    return train.main(parse(["talk.py", *words], "", train.Flags))


def losses(folder) -> list[float]:
    """What each step logged."""
    return [row["loss"] for row in metrics(folder) if "loss" in row]


def weights(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step}" / "model.safetensors")


def test_a_run_learns_and_says_what_it_read_and_learned(home, capsys):
    assert run() == 0
    rows = [row for row in metrics(home / "out/talk") if "loss" in row]
    fit = FitRows(shards.open_split(home / "data/talk", "train"), T, 1337)
    assert [row["tokens"] for row in rows] == [fit.targets(0, 8 * n) for n in range(1, 13)]
    for row in rows:
        share = row["learned_tokens_per_second"] / row["tokens_per_second"]
        read, learned = (count(8 * (row["step"] - 1), 8) for count in (fit.tokens, fit.targets))
        assert share == pytest.approx(learned / read, rel=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(258), abs=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    said = capsys.readouterr().out
    assert "of the tokens learned" in said and "tok/s, " in said and " learned" in said
    told = read_json(home / "out/talk/run.json")
    settled = told["config"]
    # what the report shows of masks: a dialog, cut where learned tokens begin and end
    data = home / "data/talk"
    split = shards.Split(data, "val", shards.read_manifest(data))
    mask = split.read_mask(*split.bounds()[:2].tolist())
    flips = np.flatnonzero(np.diff(mask)) + 1
    assert [learned for _, learned in told["example"]] == mask[[0, *flips]].tolist()
    assert settled["packing"] == "fit" and settled["doc_mask"] and settled["documents"] == "chat"


def test_the_loss_is_that_of_what_is_learned(home):
    """Of the first evaluation, on the answers of the validation split alone."""
    assert run("--max_steps=2", "--out_dir=out/b", "--learning_rate=0", "--min_lr=0") == 0
    rows = FitRows(shards.open_split(home / "data/talk", "val"), T, 0)
    model = load_model(home / "out/b/checkpoints/step_2")
    with torch.no_grad():
        batch = to_batch(rows.read_windows(range(rows.windows)), bos_id=BOS)
        expected = model(*batch.to("cpu")).item() / rows.targets(0, rows.windows)
    found = [row["val_loss"] for row in metrics(home / "out/b") if "val_loss" in row]
    assert found[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_have_the_same_curve(home, mode):
    assert run("--out_dir=out/a", "--max_steps=6") == 0
    done = run_script("train.py", "talk.py", "--out_dir=out/b", "--max_steps=6", "--micro_batch=2",
                      f"--parallel={mode}", cwd=home, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.allclose(losses(home / "out/a"), losses(home / "out/b"), rtol=1e-5)


def test_a_rank_whose_rows_learn_nothing_waits_for_no_one(home):
    """One row a step for two ranks: the second has none."""
    words = ("--global_batch_tokens=32", "--micro_batch=1", "--max_steps=4")
    assert run("--out_dir=out/a", *words) == 0
    done = run_script("train.py", "talk.py", "--out_dir=out/b", *words, cwd=home, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.allclose(losses(home / "out/a"), losses(home / "out/b"), rtol=1e-5)


def test_resumed_is_uninterrupted_to_the_bit(home):
    assert run("--out_dir=out/a") == 0
    assert run("--out_dir=out/b") == 0
    shutil.rmtree(home / "out/b/checkpoints/step_12")
    (home / "out/b/status.json").unlink()
    assert run("--out_dir=out/b") == 0
    assert losses(home / "out/a") == losses(home / "out/b")
    a, b = (weights(home / "out" / name, 12) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_epochs_are_passes_over_the_rows(home, capsys):
    windows = FitRows(shards.open_split(home / "data/talk", "train"), T, 1).windows
    assert run("--epochs=1.5") == 0
    steps = math.ceil(1.5 * windows / 8)
    assert f"epochs 1.5: {steps} steps of 8 rows" in capsys.readouterr().out
    assert (home / f"out/talk/checkpoints/step_{steps}").is_dir()
    with pytest.raises(UserError, match="max_steps has no effect beside epochs"):
        run("--epochs=1.5", "--max_steps=3", "--out_dir=out/other")


def test_epochs_that_take_the_place_of_max_steps_or_are_many_are_said(home, capsys):
    assert run("--epochs=0.2", "--out_dir=out/a") == 0
    out = capsys.readouterr().out
    assert "rows, in place of max_steps 12" in out and "times; say" not in out
    with (home / "talk.py").open("a") as file:
        file.write("max_steps = 1\nglobal_batch_tokens = 32 * 4000\n")
    assert run("--out_dir=out/b", "--learning_rate=0", "--min_lr=0", "--block_size=32") == 0
    assert "times; say epochs=3" in capsys.readouterr().out


def test_a_few_rows_are_learned_by_heart(home, capsys):
    assert run("--overfit_rows=2", "--max_steps=150", "--eval_interval=1000",
               "--save_interval=1000") == 0
    assert losses(home / "out/talk")[-1] < 0.5
    split = shards.Split(home / "data/talk", "train", shards.read_manifest(home / "data/talk"))
    rows = FitRows(split, T, 1337).read_windows(range(2))
    assert f"{T} tokens in talk: {(rows >= BEGINS).sum()} documents" in capsys.readouterr().out


def test_options_that_dialogs_do_not_have_are_refused(home):
    for words, message in ((["--packing=concat"], "packing=concat is for text"),
                           (["--packing=doc"], "packing=doc is for text"),
                           (["--block_size=16"], "cut to 32 tokens, more than block_size 16"),
                           (["--documents=chat", "--train_on=all"], "train_on: data/talk is")):
        with pytest.raises(UserError, match=message):
            run(*words)


# ---- from a model

def grown(home, base: str) -> None:
    """data/more: the same dialogs and five more entries, as prepare.py adds to data/talk's."""
    write_dialogs(home / "data/more", [{"path": "a"}], [some_dialogs(40, 3)])
    folder = home / "data/more"
    manifest = json.loads((folder / "manifest.json").read_text())
    spec = json.loads((folder / "tokenizer.json").read_text())
    for i, name in enumerate(("system", "user", "assistant", "tool", "end")):
        spec["added_tokens"].append(spec["added_tokens"][-1] | {"id": 258 + i,
                                                                "content": f"<|{name}|>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    manifest["tokenizer"] |= {"vocab_size": 263, "base": base,
                              "sha256": sha256(folder / "tokenizer.json")}
    manifest["files"]["tokenizer.json"] = file_entry(folder / "tokenizer.json")
    shards.write_manifest(folder, manifest)


def test_a_run_goes_on_from_a_model_whose_shape_it_takes_over(home, capsys):
    assert run("--out_dir=out/base", "--max_steps=2", "--n_layer=3", "--tie_embeddings") == 0
    config = (home / "talk.py").read_text()
    (home / "talk.py").write_text("\n".join(
        line for line in config.splitlines() if line[:2] not in ("n_", "d_")) + "\nblock_size = 32")
    capsys.readouterr()
    assert run("--init_from=out/base", "--max_steps=3") == 0
    said = capsys.readouterr().out
    for line in ("n_layer = 3 (inherited from out/base/checkpoints/step_2)", "d_model = 32",
                 "tie_embeddings = True (inherited"):
        assert line in said
    assert run("--init_from=out/base", "--max_steps=3") == 0  # nothing left to do
    shutil.rmtree(home / "out/base")  # a run knows its own shape
    assert run("--init_from=out/base", "--max_steps=4", "--extend") == 0
    with pytest.raises(UserError, match="n_layer=3"):
        run("--init_from=out/talk", "--out_dir=out/c", "--n_layer=2")


@pytest.mark.parametrize("tied", [(), ("--tie_embeddings",)])
def test_a_vocabulary_grows_by_rows_of_its_own(home, capsys, tied):
    assert run("--out_dir=out/base", "--max_steps=2", *tied) == 0
    base = home / "out/base/checkpoints/step_2"
    before = weights(home / "out/base", 2)
    grown(home, sha256(base / "tokenizer.json"))
    assert run("--dataset=more", "--init_from=out/base", "--out_dir=out/more", "--max_steps=1",
               "--learning_rate=0", "--min_lr=0", *tied) == 0
    assert "the vocabulary grows from 258 to 263 entries" in capsys.readouterr().out
    after = weights(home / "out/more", 1)
    config = ModelConfig(2, 2, 32, 64, 263, 32, tie_embeddings=bool(tied))
    for name, value in before.items():
        assert torch.equal(after[name][:len(value)], value), name
        if len(after[name]) > len(value):
            new = initial_weight(name, after[name].shape, config, 1337)[258:]
            assert torch.equal(after[name][258:], new), name
    with pytest.raises(UserError, match="not the tokenizer of the data set"):
        grown_elsewhere(home)
        run("--dataset=more", "--init_from=out/base", "--out_dir=out/other", *tied)


def grown_elsewhere(home) -> None:
    """The same set, grown from another tokenizer."""
    shutil.rmtree(home / "data/more")
    grown(home, "0" * 64)
