"""eval.py: bits per byte and log-likelihoods against transformers and lm-eval's own `hf` model."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import documents, run_script, write_data_set
from safetensors.torch import load_file, save_file

import eval
from model import LLaMA, ModelConfig
from plainllama import results, settings
from plainllama.command import parse
from plainllama.evaluation import counting, irt, likelihood, lm_eval_tasks, tasks, validation
from plainllama.evaluation.likelihood import by_position, evaluate
from plainllama.evaluation.tasks import Item, Scorer, local_item, read_local, score_local
from plainllama.files import file_entry, write_json
from plainllama.parallel import World
from plainllama.settings import UserError
from plainllama.tokens import shards
from plainllama.tokens.rows import CONTEXT, PAD, FitRows, Rows, hash_of_data
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer
from plainllama.tokens.tokenizer_json import ByteInfo, byte_info
from plainllama.training import optim
from plainllama.weights import checkpoint
from plainllama.weights.adapters import initial_weight
from plainllama.weights.peft import load_model

BLOCK = 592
SUBJECTS = ("high_school_sums", "colours", "animals")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with data/toy and a run out/toy that has one checkpoint."""
    home = tmp_path_factory.mktemp("home")
    texts = [text + "Ünïcödé ✓ \n" for text in documents(80)]
    write_data_set(home / "data" / "toy", {"train": texts[60:], "val": texts[:60]})
    model = LLaMA(ModelConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64,
                              vocab_size=258, block_size=BLOCK))
    with torch.no_grad():
        for name, p in model.named_parameters():  # large enough that attention matters
            value = initial_weight(name, p.shape, model.config, 0)
            p.copy_(value if p.dim() == 1 else value * 6)
    run = home / "out" / "toy"
    run.mkdir(parents=True)
    write_json(run / "run.json", {"config": {
        "dataset": "toy", "eval_tokens": 5 * BLOCK, "seed": 3}})
    digest = (home / "data" / "toy" / "manifest.sha256").read_text().strip()
    checkpoint.save(run, 30, model, optim.make(model, settings.Settings()).state,
                    {"step": 30, "rows": 120, "data_hash": digest},
                    home / "data" / "toy" / "tokenizer.json", World())
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch) -> Path:
    """An own copy of that folder, as the working folder."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def folder(home) -> Path:
    return home / "out" / "toy" / "checkpoints" / "step_30"


@pytest.fixture(scope="module")
def rows(home) -> Rows:
    return Rows(shards.open_split(home / "data" / "toy", "val"), BLOCK, 0)


@pytest.fixture(scope="module")
def scorer(folder) -> Scorer:
    return Scorer(load_model(folder), Tokenizer.load(folder), 4096, World())


def test_scoring_does_without_a_plan_for_each_length(scorer, monkeypatch):
    """cuDNN, which makes one, is off where lengths change from call to call."""
    seen, real = [], scorer.model.hidden
    monkeypatch.setattr(scorer.model, "hidden", lambda *words: seen.append(
        torch.backends.cuda.cudnn_sdp_enabled()) or real(*words))
    scorer.score([([1, 2, 3], [4]), ([5], [6, 7])])
    assert seen and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> tuple[Path, Path]:
    """(questions, worked examples): tinyMMLU in shape. Some prompts are longer than the context."""
    chance = random.Random(7)
    folder = tmp_path_factory.mktemp("tasks")

    def row(i: int) -> dict:
        choices = [" ".join(chance.choices(("red", "42", "cat", "blé"), k=2)) for _ in range(4)]
        answer = chance.randrange(4)
        return {"question": f" What is {i}? " + "well, " * chance.randrange(9), "choices": choices,
                "answer": answer if i % 2 else "ABCD"[answer], "subject": SUBJECTS[i % 3]}

    for name, count in (("test", 100), ("dev", 21)):
        text = "\n".join(json.dumps(row(i)) for i in range(count))
        (folder / f"{name}.jsonl").write_text(text + "\n\n")
    return folder / "test.jsonl", folder / "dev.jsonl"


@pytest.fixture(scope="module")
def items(questions) -> list[Item]:
    return read_local(str(questions[0]), read_local(str(questions[1]), None))


@pytest.fixture(scope="module")
def hf(folder):
    """lm-eval's `--model hf` on the checkpoint's folder."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu", batch_size=16)


def main(*words: str) -> int:
    """eval.py in this process."""
    return eval.main(parse(list(words), "", eval.Flags, "model"))


# ---- bits per byte

def test_bits_per_byte_equal_those_of_transformers(folder, rows):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats = 0.0
    for window in rows.read_windows(range(5)).astype(np.int64):
        ids = torch.from_numpy(window)[None]
        with torch.no_grad():
            nats += theirs(input_ids=ids, labels=ids).loss.double().item() * BLOCK
    ids = rows.split.read(1, 5 * BLOCK + 1)
    pieces = np.split(ids, np.flatnonzero(ids >= 256))  # documents: decoded each for itself
    text = [Tokenizer.load(folder).decode(piece) for piece in pieces]
    assert not any("\ufffd" in piece for piece in text)
    n_bytes = sum(len(piece.encode()) for piece in text)
    assert n_bytes < 5 * BLOCK  # the boundaries are targets and no bytes

    scores = evaluate(load_model(folder), rows, byte_info(folder), 5 * BLOCK + 9, 2,
                      World())
    assert scores["tokens"] == 5 * BLOCK and scores["bytes"] == n_bytes
    assert scores["val_loss"] == pytest.approx(nats / (5 * BLOCK), abs=1e-5)
    assert scores["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-5)
    assert scores["ppl"] == pytest.approx(math.exp(scores["val_loss"]))


@pytest.mark.parametrize("begin", [None, 256])  # the begin token: every document by itself
def test_loss_by_position_averages_to_the_loss(folder, rows, begin):
    model = load_model(folder)
    whole = evaluate(model, rows, byte_info(folder), 3 * BLOCK, 2, World(), begin)["val_loss"]
    found = by_position(model, rows, 3 * BLOCK, 2, World(), begin)
    quarters = [value for name, value in found.items() if name[-1].isdigit()]
    assert len(quarters) == 4 and np.mean(quarters) == pytest.approx(whole, rel=1e-5)


def test_bits_per_byte_do_not_depend_on_the_batch(folder, rows):
    model, info = load_model(folder), byte_info(folder)
    shapes = set()
    model.register_forward_pre_hook(lambda _, given: shapes.add(tuple(given[0].shape)))
    found = {}
    for batch in (1, 3, 8):
        shapes.clear()
        found[batch] = evaluate(model, rows, info, 7 * BLOCK, batch, World())
        assert shapes == {(batch, BLOCK)}  # one shape: nothing is compiled again
    for batch in (3, 8):
        assert found[batch] == pytest.approx(found[1], rel=1e-6)


def test_loss_by_position_equals_that_of_transformers(here, folder, rows):
    """Also in shorter windows, and shared by ranks; RUN/eval keeps them apart."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def plainly(T: int, count: int) -> np.ndarray:  # (count, T) nats
        ids = torch.from_numpy(np.stack([rows.split.read(i * T, i * T + T + 1).astype(np.int64)
                                         for i in range(count)]))
        with torch.no_grad():
            log_p = theirs(ids[:, :-1]).logits.log_softmax(-1)
        return -log_p.gather(2, ids[:, 1:, None])[..., 0].double().numpy()

    assert main("--tasks=", "--by_position") == 0
    assert main("--tasks=", "--by_position", "--context=50") == 0
    kept = json.loads((here / "out/toy/eval/step_30.json").read_text())
    found, nats = kept["by_position"], plainly(BLOCK, 5)
    assert list(found)[::2] == ["0-147", "148-295", "296-443", "444-591", "n"] and found["n"] == 5
    for first in range(0, BLOCK, 148):
        quarter, name = nats[:, first:first + 148].mean(1), f"{first}-{first + 147}"
        assert found[name] == pytest.approx(quarter.mean(), abs=1e-5)
        assert found[f"{name}_stderr"] == pytest.approx(quarter.std(ddof=1) / 5**0.5, rel=1e-3)
    assert kept["val_loss"] == pytest.approx(nats.mean(), abs=1e-5)  # not that of --context
    short, nats = kept["contexts"]["50"], plainly(50, 5 * BLOCK // 50)
    assert short["val_loss"] == pytest.approx(nats.mean(), abs=1e-5)
    assert list(short["by_position"])[::2] == ["0-12", "13-25", "26-38", "39-49", "n"]
    assert short["by_position"]["39-49"] == pytest.approx(nats[:, 39:].mean(), abs=1e-5)
    assert short["val_tokens"] == 5 * BLOCK // 50 * 50

    model = load_model(folder)
    parts = [by_position(model, rows, 5 * BLOCK, 2, Part(rank, 3)) for rank in range(3)]
    for name in ("0-147", "444-591"):
        assert np.average([part[name] for part in parts], weights=[2, 2, 1]) == pytest.approx(
            found[name], rel=1e-6)
    with pytest.raises(UserError, match="--context=600 is more than the 592 tokens"):
        main("--context=600")
    with pytest.raises(UserError, match="without --data, --context and --text"):
        main("--tasks=", "--baselines", "--context=50")


class Part(World):
    """A rank whose sums are its own part."""

    def sum(self, values):
        return values


def test_ranks_share_the_windows_and_the_prompts(folder, rows, scorer, items):
    model, info = load_model(folder), byte_info(folder)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    whole = evaluate(model, rows, info, 7 * BLOCK, 2, World())
    parts, counts = [], []
    for rank in range(3):
        passes.clear()
        parts.append(evaluate(model, rows, info, 7 * BLOCK, 2, Part(rank, 3)))
        counts.append(len(passes))
    assert counts == [2, 2, 2]  # collective calls in the model would wait for each other
    assert sum(p["val_loss"] * p["tokens"] for p in parts) == pytest.approx(
        whole["val_loss"] * whole["tokens"], rel=1e-6)
    assert sum(p["bytes"] for p in parts) == whole["bytes"]

    pairs = [scorer.pair(*pair) for item in items[:20] for pair in item.pairs]
    shares = [Scorer(scorer.model, scorer.tokenizer, 800, Part(rank, 2)).score(pairs)
              for rank in range(2)]
    for one, two, both in zip(*shares, scorer.score(pairs), strict=True):
        assert one[0] + two[0] == pytest.approx(both[0], abs=1e-4)
        assert 0.0 in (one[0], two[0]) and both[1] == (one[1] or two[1])


def test_any_text_down_to_its_last_token(here, folder, capsys):
    """Against transformers, window by window; also by position, and in windows of its own."""
    from transformers import AutoModelForCausalLM

    texts = ["Ünïcödé ✓ and more. " * 30, "short", "def f(x):\n    return x\n" * 21]
    (here / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, ""]))
    (here / "t.xyz").write_text(texts[0])
    ids = np.concatenate(Tokenizer.load(folder).encode_documents(texts)).astype(np.int64)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats = []
    for start in range(0, len(ids) - 1, BLOCK):
        window = torch.from_numpy(ids[start:start + BLOCK + 1])
        with torch.no_grad():
            log_p = theirs(window[None, :-1]).logits[0].log_softmax(-1)
        nats += (-log_p.gather(1, window[1:, None])[:, 0]).tolist()
    for batch in (BLOCK, 5 * BLOCK):
        assert main("--tasks=", "--text=t.jsonl", "--by_position", f"--batch_tokens={batch}") == 0
        kept = json.loads((here / "out/toy/eval/step_30.json").read_text())["texts"]["t.jsonl"]
        n_bytes = sum(len(text.encode()) for text in texts)
        assert kept["val_tokens"] == len(ids) - 1 and kept["val_bytes"] == n_bytes
        assert kept["val_bpb"] == pytest.approx(sum(nats) / math.log(2) / n_bytes, rel=1e-5)
        late = [value for i, value in enumerate(nats) if i % BLOCK >= 444]
        assert kept["by_position"]["444-591"] == pytest.approx(np.mean(late), rel=1e-5)
    assert "t.jsonl, 1," in capsys.readouterr().out
    assert main("--tasks=", "--text=t.xyz", "--context=100") == 0
    found = json.loads((here / "out/toy/eval/step_30.json").read_text())["texts"]
    assert found["t.xyz in windows of 100"]["val_bytes"] == len(texts[0].encode())
    for bad, said in (("gone.txt", "gone.txt is no file"), ("bad.jsonl", "bad.jsonl:1: broken")):
        (here / "bad.jsonl").write_text("{")
        with pytest.raises(UserError, match=said):
            main("--tasks=", f"--text={bad}")


def test_all_checkpoints_are_scored_once(here, folder, capsys):
    for step in (4, 20):  # the same weights three times
        other = folder.parents[3] / f"out/toy/checkpoints/step_{step}"
        shutil.copytree(folder, here / other.relative_to(folder.parents[3]))
    run = here / "out/toy"
    for step in (4, 20):
        one = run / f"checkpoints/step_{step}"
        state = json.loads((one / "training/state.json").read_text()) | {"step": step, "rows": step}
        (one / "training/state.json").write_text(json.dumps(state))
    (run / "checkpoints/step_20/config.json").write_text(
        (folder / "config.json").read_text() + " ")
    (here / "words.jsonl").write_text('{"context": "def", "continuation": "add"}')
    assert main("--all=out/toy", "--tasks=local:words.jsonl") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"step_(\d+)", shown.replace("data", "")) == ["4", "20", "30"]
    assert "step_20 is damaged (config.json" in shown
    assert [json.loads((run / f"eval/step_{step}.json").read_text())["tokens"]
            for step in (4, 30)] == [4 * BLOCK, 120 * BLOCK]
    (run / "eval/step_30.json").unlink()
    assert main("--all=out/toy", "--tasks=local:words.jsonl") == 0
    shown = capsys.readouterr().out
    assert "step_4 has these scores" in shown and shown.count("val_bpb") == 1
    assert main("--all=out/toy", "--tasks=local:words.jsonl", f"--context={BLOCK}") == 0
    assert capsys.readouterr().out.count("has these scores") == 2  # the whole context is no other
    assert main("--all=out/toy", "--tasks=local:words.jsonl", "--by_position") == 0
    assert "has these scores" not in capsys.readouterr().out
    with pytest.raises(UserError, match="not a run with checkpoints"):
        main("--all=out")


def test_questions_in_the_training_data_are_found(here, capsys):
    text = documents(80)[63]  # of the training split
    words = re.findall(r"\w+", text)
    rows = [" ".join(words[3:16]).upper() + "! ", " ".join(words[3:15]),  # 13 words, 12 words
            " ".join([*words[3:9], "not", *words[10:17]]), " ".join([*words[3:16], "else"])]
    (here / "q.jsonl").write_text("\n".join(
        json.dumps({"context": row, "continuation": "x"}) for row in rows))
    assert main("--tasks=local:q.jsonl", "--contamination") == 0
    kept = json.loads((here / "out/toy/eval/step_30.json").read_text())["tasks"]["local:q.jsonl"]
    assert (kept["contaminated"], kept["long_enough"]) == (0.5, 3)
    assert "4 prompts, 3 long enough to be told" in capsys.readouterr().out
    (here / "data").rename(here / "away")
    with pytest.raises(UserError, match="data set toy is not here"):
        main("--tasks=local:q.jsonl", "--contamination")
    (here / "other").mkdir()
    shutil.copy(here / "away/toy/manifest.json", here / "other")
    make_tokenizer("bpe:300", lambda: documents(9)).save(here / "other")
    (here / "t.txt").write_text("text")
    with pytest.raises(UserError, match="or of another tokenizer"):
        main("--tasks=local:q.jsonl", "--contamination", "--data=other", "--text=t.txt")


# ---- log-likelihoods

def requests(items: list[Item]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, n)
            for item in items for n, pair in enumerate(item.pairs)]


def test_local_task_equals_lm_eval_on_the_checkpoint(scorer, items, hf):
    assert len(items) == 100 and len({len(item.pairs[0][0]) for item in items}) > 20
    theirs = hf.loglikelihood(requests(items), disable_tqdm=True)
    scorer.truncated.clear()
    ours = scorer.score([scorer.pair(*pair) for item in items for pair in item.pairs])
    assert max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)) < 1e-3
    assert len({round(value, 3) for value, _ in ours}) > 300  # the prompts do matter
    assert [a[1] for a in ours] == [b[1] for b in theirs]
    too_long = sum(len(item.pairs[0][0].encode()) + 3 > BLOCK + 1 for item in items)  # <s>, ' A'
    assert 0 < too_long < 100 and len(scorer.truncated) == too_long

    scorer.truncated.clear()
    scores = score_local("x", items, None, scorer)["x"]
    chosen = [max(range(4), key=lambda c, i=i: theirs[4 * i + c][0]) for i in range(100)]
    right = [c == item.right for c, item in zip(chosen, items, strict=True)]
    assert scores["acc"] == np.mean(right)
    assert scores["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / 10)
    assert scores["chance"] == 0.25 and scores["n"] == 100 and scores["truncated"] == too_long


def test_pairs_of_many_shapes_equal_lm_eval(scorer, hf):
    pairs = [("", "abc"), ("one ", "two three"), ("one", " two three"), ("one", " two threX"),
             ("x" * 700, " a long continuation"), ("é", "ö"), ("a\n", "b"), ("q", "y" * BLOCK)]
    items = [Item([pair], 0) for pair in pairs]
    theirs = hf.loglikelihood(requests(items), disable_tqdm=True)
    for batch_tokens in (1, 700, 10**6):
        one = Scorer(scorer.model, scorer.tokenizer, batch_tokens, World())
        ours = one.score([one.pair(*pair) for pair in pairs])
        assert len(one.truncated) == 2
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, abs=1e-3)


def test_what_prompts_begin_with_is_computed_once(scorer, monkeypatch):
    chance = random.Random(3)
    shots = ["".join(chance.choices("abcdef ", k=300)) for _ in range(3)]
    pairs = [(f"{shots[i % 3]} {i} is{' so' * (i % 5)}", f" {answer}")
             for i in range(12) for answer in ("yes", "yes, it is", "no", "n")]
    pairs.append((shots[0] + "x" * 400, " alone, and too long"))
    # one that is scored where its neighbour is only read
    pairs += [(f"{shots[0]} so: yes, it", " is"), (f"{shots[0]} so:", " yes, it isn't")]
    encoded = [scorer.pair(*pair) for pair in pairs]
    read, hidden = [], scorer.model.hidden

    def counted(ids, *rest):
        read.append(ids.numel())
        return hidden(ids, *rest)

    monkeypatch.setattr(scorer.model, "hidden", counted)
    found = scorer.score(encoded)
    shared, read[:] = sum(read), []
    monkeypatch.setattr(likelihood, "WORTH", 10**6)
    alone = scorer.score(encoded)
    assert shared < sum(read) / 4
    for one, other in zip(found, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_tiny_mmlu_from_a_local_file(here, questions, capsys, monkeypatch, tmp_path):
    shutil.copy(questions[0], here / "tinyMMLU.jsonl")
    words = [f"--shots={questions[1]}", "--tasks=local:tinyMMLU.jsonl"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(*words, "--log_samples") == 0
    shown = capsys.readouterr().out
    assert "not available: irt, pirt, gpirt: HF_HUB_OFFLINE is set; fetch https://raw" in shown
    assert "5 shots, <s> in front" in shown and "too long" in shown and "predicted" in shown
    samples = here / "out/toy/eval/samples_tinyMMLU.jsonl_step_30.jsonl"
    right, told = irt.read_samples(str(samples))
    kept = json.loads((here / "out/toy/eval/step_30.json").read_text())
    kept = kept["tasks"]["local:tinyMMLU.jsonl"]
    assert kept["correct"] == right.sum() and kept["letters"] == told["letters"]
    assert sum(kept["letters"].values()) == 100 and kept["begin"] == "<s>" and kept["shots"] == 5

    chance = np.random.default_rng(0)
    np.savez(here / "p.npz", anchors=chance.permutation(300)[:100], balance=np.ones(300),
             weights=np.full(100, 0.01), blend=0.5, a=chance.normal(0.5, 0.2, (2, 300)),
             b=chance.normal(0, 0.2, (2, 300)))
    monkeypatch.setattr(irt, "DRAWS", 4)
    assert main(*words, "--irt-file=p.npz", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = result["tasks"]["local:tinyMMLU.jsonl"]
    assert found["irt"] == pytest.approx(found["acc"]) and 0 < found["gpirt"] < 1
    assert main(*words, "--irt-file=p.npz", "--limit=50") == 0
    assert "they need the answers to all 100" in capsys.readouterr().out
    with pytest.raises(UserError, match="--irt_file is for tinyMMLU"):
        main("--tasks=", "--irt-file=p.npz")


def test_a_task_that_fails_leaves_the_others(here, capsys, monkeypatch):
    (here / "words.jsonl").write_text('{"context": "def", "continuation": "add"}')
    monkeypatch.setattr(tasks, "passkey_prompts", lambda *_: [])
    assert main("--tasks=passkey,local:words.jsonl") == 2
    assert "no passkey: passkey: a context of 592" in capsys.readouterr().out
    kept = json.loads((here / "out/toy/eval/step_30.json").read_text())["tasks"]
    assert set(kept) == {"local:words.jsonl"}


def test_own_tasks_of_lm_eval_equal_its_own_model(here, scorer, hf, items, monkeypatch):
    from lm_eval import simple_evaluate

    monkeypatch.setenv("HF_HOME", str(here / "cache"))
    rows = [{"p": item.pairs[0][0][-200:], "c": ["yes", "no, never", "it is"], "a": i % 3}
            for i, item in enumerate(items[:9])]
    (here / "own").mkdir()
    (here / "own/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (here / "own/mine.yaml").write_text(f"""
task: mine_tinyMMLU
dataset_path: json
dataset_kwargs: {{data_files: {{test: {here}/own/rows.jsonl}}, cache_dir: {here}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{p}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}},
              {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
""")
    assert main("--tasks=mine_tinyMMLU", "--include_path=own", "--log_samples") == 0
    found = json.loads((here / "out/toy/eval/step_30.json").read_text())["tasks"]["mine_tinyMMLU"]
    loaded = lm_eval_tasks.load_task("mine_tinyMMLU", "own")
    theirs = simple_evaluate(hf, tasks=[*loaded["tasks"].values()], bootstrap_iters=1,
                             task_manager=lm_eval_tasks.task_manager(False), log_samples=True)
    assert found["acc"] == theirs["results"]["mine_tinyMMLU"]["acc,none"]
    assert found["acc_norm"] == theirs["results"]["mine_tinyMMLU"]["acc_norm,none"]
    kept = (here / "out/toy/eval/samples_mine_tinyMMLU_step_30.jsonl").read_text().splitlines()
    for line, other in zip(kept, theirs["samples"]["mine_tinyMMLU"], strict=True):
        ours = [one[0][0] for one in json.loads(line)["resps"]]
        assert ours == pytest.approx([one[0][0] for one in other["resps"]], abs=1e-3)
    choices = [(f"{row['p']}", row["c"]) for row in rows]
    (here / "same.jsonl").write_text("\n".join(json.dumps(
        {"context": p, "choices": c, "answer": i % 3}) for i, (p, c) in enumerate(choices)))
    local = tasks.score_local("x", read_local("same.jsonl", []), None, scorer)["x"]
    assert (local["acc"], local["acc_norm"]) == (found["acc"], found["acc_norm"])
    assert lm_eval_tasks.questions(loaded, 2) == [row["p"] for row in rows[:2]]
    (here / "own/group.yaml").write_text("group: all_mine\ntask: [mine_tinyMMLU]\n"
                                         "aggregate_metric_list: [{metric: acc}]\n")
    lm_eval_tasks.task_manager.cache_clear()
    group = lm_eval_tasks.load_task("all_mine", "own")
    both = lm_eval_tasks.score("all_mine", group, 0, None, scorer)
    assert both["all_mine"]["acc"] == both["mine_tinyMMLU"]["acc"] == found["acc"]


@pytest.mark.slow
def test_real_ranks_give_the_same_in_the_same_order(here, questions):
    shutil.copy(questions[0], here / "tinyMMLU.jsonl")
    kept = []
    for ranks in (0, 2, 3):
        done = run_script("eval.py", f"--shots={questions[1]}", "--tasks=local:tinyMMLU.jsonl",
                          "--log_samples", "--batch_tokens=1800", cwd=here, processes=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        path = here / "out/toy/eval/samples_tinyMMLU.jsonl_step_30.jsonl"
        rows = list(map(json.loads, path.read_text().splitlines()))
        kept.append(([row["doc_id"] for row in rows], [row["acc"] for row in rows],
                     np.array([[one[0][0] for one in row["resps"]] for row in rows])))
    for ids, right, values in kept[1:]:
        assert ids == kept[0][0] == list(range(100)) and right == kept[0][1]
        np.testing.assert_allclose(values, kept[0][2], atol=1e-4)


def test_greedy_match(scorer):
    ids = scorer.encode("def add_")
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(scorer.model(torch.tensor([ids]))[0, -1].argmax()))
    likely = ids[9:]
    values = scorer.score([(ids[:9], likely), (ids[:9], [*likely[:-1], (likely[-1] + 1) % 256])])
    assert [greedy for _, greedy in values] == [True, False]


def test_every_kind_of_request_equals_lm_eval(scorer, hf, tmp_path):
    from lm_eval.api.instance import Instance

    text = "def add_1(a, b):\n    return a + b\n" * 40
    rolling = [Instance("loglikelihood_rolling", {}, (t,), 0) for t in (text, "short")]
    ours = lm_eval_tasks.lm_eval_model(scorer)
    theirs = hf.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs, abs=2e-3)
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    generate = [Instance("generate_until", {}, (t, options), 0)
                for t in ("def add", text, "x = ")]
    assert ours.generate_until(generate) == hf.generate_until(generate, disable_tqdm=True)


def test_tiny_mmlu_through_lm_eval(scorer, items, hf, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate

    rows = [{"input_formatted": item.pairs[0][0], "answer": item.right} for item in items[:12]]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(lm_eval_tasks, "TINY_MMLU", lm_eval_tasks.TINY_MMLU | {
        "dataset_path": "json", "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "t.jsonl")}, "cache_dir": str(tmp_path)}})
    loaded = lm_eval_tasks.load_task("tinyMMLU")
    scorer.truncated.clear()
    ours = lm_eval_tasks.score("tinyMMLU", loaded, 0, None, scorer)["tinyMMLU"]
    local = score_local("x", items[:12], None, scorer)["x"]
    theirs = simple_evaluate(hf, tasks=[*loaded["tasks"].values()], bootstrap_iters=1,
                             task_manager=lm_eval_tasks.task_manager(False))["results"]["tinyMMLU"]
    assert ours == pytest.approx({key: value for key, value in local.items()
                                  if key not in ("loglikelihood", "shots", "letters")})
    assert ours["acc"] == theirs["acc,none"]
    assert ours["acc_stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert lm_eval_tasks.score("tinyMMLU", loaded, 7, None, scorer)["tinyMMLU"]["n"] == 7


class Reader(Scorer):
    """Answers as told by a function of the prompt: the likelihood of each digit."""

    def __init__(self, like: Scorer, answer):
        super().__init__(like.model, like.tokenizer, 10**6, World())
        self.answer, self.seen = answer, []

    def score(self, pairs):
        self.seen = [(self.tokenizer.decode(context), len(context)) for context, _ in pairs]
        digits = [int(self.tokenizer.decode(continuation)) for _, continuation in pairs]
        return [(float(self.answer(text) == digit), False)
                for (text, _), digit in zip(self.seen, digits, strict=True)]


def test_passkey_asks_what_it_says(scorer):
    def read(text: str) -> int:
        return int(re.search(r"The pass key is (\d)", text)[1])

    knows = Reader(scorer, read)
    found = tasks.score_passkey(0, knows)["passkey"]
    assert found["acc"] == 1 and found["truncated"] == 0 and found["n"] == 50
    # the whole context alone: in half of it, 296 bytes, is no room for five depths
    assert {name for name in found if name.startswith("acc") and "stderr" not in name} == {
        "acc", "acc_592", "acc_depth_0%", "acc_depth_25%", "acc_depth_50%",
        "acc_depth_75%", "acc_depth_100%"}
    lengths = [length for _, length in knows.seen]
    assert 592 - 90 < max(lengths) <= 592 and min(lengths) > 592 - 100
    for length in range(500, 592, 9):  # as many lines as fit, and not one more
        longest = max(len(scorer.encode(prompt)) + 1  # " 7" is two bytes, the last is not read
                      for prompt, *_ in tasks.passkey_prompts(scorer, length))
        assert length - len(tasks.FILLER) < longest <= length
    places = [text.index("The pass key is") for text, _ in knows.seen[::100]]
    assert places == sorted(set(places)) and places[0] < 5  # five depths, each once
    assert tasks.score_passkey(0, Reader(scorer, lambda _: 7))["passkey"]["acc"] == 0.1
    early = Reader(scorer, lambda text: read(text) if text.find("pass key") < 20 else -1)
    found = tasks.score_passkey(0, early)["passkey"]
    assert found["acc_depth_0%"] == 1 and found["acc_depth_25%"] == 0.1 and found["acc"] == 0.28
    with pytest.raises(UserError, match="a context of 100 tokens is too short"):
        knows.block_size = 100
        tasks.score_passkey(0, knows)


def test_passkey_equals_lm_eval_on_the_checkpoint(here, scorer, hf, capsys):
    assert main("--tasks=passkey", "--limit=20", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["passkey"]
    cases = tasks.passkey_prompts(scorer, BLOCK)[:20]
    items = [Item([(case.prompt, f" {digit}") for digit in range(10)], case.key)
             for case in cases]
    values = [value for value, _ in hf.loglikelihood(requests(items), disable_tqdm=True)]
    right = np.array([np.argmax(values[10 * i:10 * i + 10]) == item.right
                      for i, item in enumerate(items)])
    assert found["acc"] == right.mean() and 0 < right.mean() < 1
    assert found["acc_depth_25%"] == right[10:].mean() and found["chance"] == 0.1
    assert found["acc_depth_25%_stderr"] == pytest.approx(right[10:].std(ddof=1) / 10**0.5)


# ---- prompts and files

def test_prompts_have_the_form_of_mmlu(items, questions):
    row = {"question": "2 + 2?\n", "choices": ["3", "4"], "answer": "b"}
    bare = local_item(row, [], "letters")
    prompt = "2 + 2?\nA. 3\nB. 4\nAnswer:"
    assert bare.pairs == [(prompt, " A"), (prompt, " B")] and bare.right == 1
    shots = [local_item({**row, "subject": subject}, None) for subject in "xyx"]
    asked = local_item({**row, "question": "1 + 1?", "subject": "x"}, shots)
    assert asked.pairs[0][0] == (
        "The following are multiple choice questions (with answers) about x.\n\n"
        + "2 + 2?\nA. 3\nB. 4\nAnswer: B\n\n" * 2 + "1 + 1?\nA. 3\nB. 4\nAnswer:")
    assert all(item.pairs[0][0].count("Answer:") == 6 for item in items)
    assert " about high school sums.\n\n" in items[0].pairs[0][0]
    with pytest.raises(UserError, match="no example of the subject z"):
        local_item({**row, "subject": "z"}, shots)
    assert local_item({"context": "a b", "continuation": "c"}, []).pairs == [("a b", " c")]


def test_whole_answers_are_asked_for_where_rows_have_no_subject():
    row = {"question": "Why?", "choices": ["so", "or so"], "answer": "or so"}
    why = "Question: Why?\nAnswer:"
    assert local_item(row, []).pairs == [(why, " so"), (why, " or so")]
    assert local_item(row, []).right == local_item({**row, "answer": "B"}, []).right == 1
    goes_on = {**row, "question": "It was "}
    assert local_item(goes_on, []).pairs == [("It was ", "so"), ("It was ", "or so")]
    blank = {**row, "question": "Ann and _ ran, a_b too."}
    assert local_item(blank, []).pairs == [("Ann and so", " ran, a_b too."),
                                           ("Ann and or so", " ran, a_b too.")]
    bare = {"context": "Why?", "choices": ["so", "no"], "answer": 0}
    assert local_item(bare, []).pairs == [("Why?", " so"), ("Why?", " no")]
    shots = [local_item(row, None), local_item({**row, "subject": "x"}, None)]
    assert local_item(row, shots).pairs[0] == (f"{why} or so\n\n{why}", " so")


@pytest.mark.parametrize("line, said", [
    ('{"question": "q", "choices": ["a", "b"]}', "'answer'"),
    ('{"question": "q", "choices": "ab", "answer": 0}', "'choices'"),
    ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "2"),
    ('{"question": "q", "choices": ["a", "b"], "answer": "C"}', "'C'"),
    ('{"question": "q", "choices": ["a", "b"], "answer": "AB"}', "'AB'"),
    ('{"context": "q"}', "'continuation'"),
    ('{"context": "q", "continuation": ""}', "without any text"),
    ('{"question": "q", "choices": ["a", ""], "answer": 0}', "without any text"),
    ('{"question": "q", "choices": ["a"], "answer": 0}', "at least two"),
    ('["q"]', "not a JSON object"), ("{", "not a JSON object"), ("[" * 9999, "not a JSON object")])
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, line, said):
    path = tmp_path / "f.jsonl"
    path.write_text('{"question": "q", "choices": ["a", "b"], "answer": 1}\n\n' + line)
    with pytest.raises(UserError, match=f"f.jsonl:3: .*{said}"):
        read_local(str(path), [])


def test_a_file_holds_rows_of_one_kind(tmp_path):
    rows = ['{"question": "q", "choices": ["a", "b"], "answer": 1}',
            '{"question": "q", "choices": ["a", "b"], "answer": 1, "subject": "x"}',
            '{"context": "q", "continuation": "a"}']
    for i in range(3):
        (tmp_path / "f.jsonl").write_text(rows[i] + "\n" + rows[i - 1])
        with pytest.raises(UserError, match="rows of several kinds"):
            read_local(str(tmp_path / "f.jsonl"), [])
    (tmp_path / "f.jsonl.gz").write_text(rows[0])
    with pytest.raises(UserError, match="is damaged or cut short"):
        read_local(str(tmp_path / "f.jsonl.gz"), [])


# ---- without a model of ours: losses and groups by hand

class Bigram(torch.nn.Module):
    """Says what follows by the last token alone, from a table of logits (V, V)."""

    def __init__(self, size: int = 258):
        super().__init__()
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(3))
        self.calls: list[torch.Tensor] = []

    def forward(self, ids, targets=None, documents=None, places=None):
        self.calls.append(ids)
        logits = self.table[ids]
        if targets is None:
            return logits
        logits = logits.flatten(0, 1) if places is None else logits.flatten(0, 1)[places]
        return torch.nn.functional.cross_entropy(
            logits, targets.flatten(), ignore_index=-100, reduction="sum")


class Few:
    """Windows (m, T + 1) that are given."""

    def __init__(self, *rows: list[int]):
        self.rows = np.array(rows, np.int64)
        self.windows, self.block_size = len(rows), self.rows.shape[1] - 1

    def read_windows(self, windows):
        return self.rows[list(windows)]


BYTES = ByteInfo(np.array([1] * 256 + [0, 0]), np.zeros(258, np.int64), 256)


def nats_of(model: Bigram, row: list[int]) -> list[float]:
    """The losses of a window's targets, without those behind its end."""
    log_p = model.table.double().log_softmax(-1)
    return [-log_p[a, b].item() for a, b in itertools.pairwise(row) if b != PAD]


def test_the_loss_its_error_and_its_bytes_to_the_last_digit():
    """Two full windows, one that ends after its second target, one that is not asked for."""
    rows = [[256, 65, 66, 67, 68], [69, 256, 70, 71, 72], [73, 74, 75, PAD, PAD], [1, 2, 3, 4, 5]]
    model = Bigram()
    each = [nats_of(model, row) for row in rows]
    found, error = likelihood.evaluate_passes(model, Few(*rows), BYTES, 12, 1, World())
    total = sum(map(sum, each[:3]))
    assert found == {"val_loss": pytest.approx(total / 10), "tokens": 10, "bytes": 9,
                     "val_bpb": pytest.approx(total / math.log(2) / 9),
                     "ppl": pytest.approx(math.exp(total / 10))}
    spread = sum((sum(nats) - total / 10 * len(nats))**2 for nats in each[:3])
    assert error == pytest.approx(math.sqrt(3 / 2 * spread) / 10)
    two, error = likelihood.evaluate_passes(model, Few(*rows), BYTES, 12, 2, World())
    assert two == pytest.approx(found)
    spread = sum((sum(map(sum, part)) - total / 10 * sum(map(len, part)))**2
                 for part in (each[:2], each[2:3]))
    assert error == pytest.approx(math.sqrt(2 / 1 * spread) / 10)
    assert [tuple(ids.shape) for ids in model.calls] == [(1, 4)] * 3 + [(2, 4)] * 2
    one, error = likelihood.evaluate_passes(model, Few(*rows), BYTES, 4, 1, World())
    assert error is None and one["tokens"] == 4
    loud = Bigram()
    loud.table[:] = -1e9
    loud.table[:, 0] = 0  # a perplexity of more than a double holds
    found, _ = likelihood.evaluate_passes(loud, Few(*rows), BYTES, 4, 1, World())
    assert found["ppl"] == math.exp(700) and found["val_loss"] == 1e9
    read = [256, CONTEXT, CONTEXT + 7, 66, 67]  # what is only read is no target and no byte
    found, _ = likelihood.evaluate_passes(model, Few(read), BYTES, 4, 1, World())
    assert (found["tokens"], found["bytes"]) == (2, 2)
    assert found["val_loss"] == pytest.approx(np.mean(nats_of(model, [7, 66, 67])))
    empty = likelihood.evaluate_passes(model, Few([1, 256, 256]), BYTES, 2, 1, World())[0]
    assert empty["bytes"] == 0 and empty["val_bpb"] == empty["val_loss"] * 2 / math.log(2)


def test_by_position_to_the_last_digit():
    rows = [[256, 65, 66, 67, 68, 69], [70, 71, 72, 73, 74, 75], [76, 77, 78, PAD, PAD, PAD]]
    model = Bigram()
    each = [nats_of(model, row) for row in rows]
    found = by_position(model, Few(*rows), 15, 2, World())
    assert list(found) == ["0-1", "0-1_stderr", "2-3", "2-3_stderr", "4-4", "4-4_stderr", "n"]
    for name, first, last in (("0-1", 0, 2), ("2-3", 2, 4), ("4-4", 4, 5)):
        parts = [nats[first:last] for nats in each if nats[first:last]]
        assert found[name] == pytest.approx(sum(map(sum, parts)) / sum(map(len, parts)))
        means = [np.mean(part) for part in parts]
        error = np.std(means) / math.sqrt(max(1, len(means) - 1))
        assert found[f"{name}_stderr"] == pytest.approx(error, rel=1e-4)
    assert found["n"] == 3
    short = by_position(model, Few(rows[2]), 5, 1, World())
    assert list(short) == ["0-1", "0-1_stderr", "n"] and short["0-1_stderr"] == 0


def test_windows_and_passes():
    rows = type("Many", (), {"block_size": 10, "windows": 7,
                             "read_windows": lambda self, which: list(which)})()
    assert [likelihood.window_count(rows, tokens) for tokens in (0, 9, 19, 20, 70, 79, 80)] == [
        1, 1, 1, 2, 7, 7, 7]
    many = type("Many", (), {"block_size": 10, "windows": 99})
    assert [likelihood.rows_of_a_pass(many, tokens, 35) for tokens in (
        10, 310, 320, 470, 480, 9999)] == [1, 1, 2, 2, 3, 3]
    assert likelihood.rows_of_a_pass(many, 9999, 9) == 1

    def shares(count: int, batch: int, rank: int = 0, size: int = 1) -> list:
        world = World()
        world.rank, world.size = rank, size
        found = [*likelihood.passes("t", rows, count * 10, batch, world)]
        assert all(numbers == ids for numbers, ids in found)
        return [numbers for numbers, _ in found]

    assert shares(7, 3) == [[0, 1, 2], [3, 4, 5], [6]] and shares(6, 3) == [[0, 1, 2], [3, 4, 5]]
    assert shares(7, 2, 0, 3) == [[0, 3], [6]] and shares(7, 2, 2, 3) == [[2, 5], []]


def test_what_is_recorded_and_what_is_said_of_windows():
    model, rows = Bigram(), Few([256, 65, 66], [256, 67, 68])
    found = likelihood.measured(model, rows, BYTES, 4, 1, World())
    assert list(found) == ["val_loss", "val_loss_stderr", "val_bpb", "ppl", "val_tokens",
                           "val_bytes"]
    assert (found["val_tokens"], found["val_bytes"]) == (4, 4)
    scores = {"val_loss": 2.0, "val_loss_stderr": 0.5, "val_bpb": 1.5, "ppl": 7.0,
              "val_tokens": 12345, "val_bytes": 6789}
    table = ["  loss               2.0000 ± 0.9800", "  bpb                1.5000",
             "  ppl                7.0000"]
    said = likelihood.told(scores, "the text t", True).splitlines()
    assert said[0] == "the text t, 12,345 tokens, 6,789 bytes"
    assert [line.split() for line in said[1:]] == [line.split() for line in table]
    plain = likelihood.told(scores, "data", False).splitlines()
    assert [line.split()[0] for line in plain[1:]] == ["val_loss", "val_bpb", "ppl"]
    model.table[65, 66] = math.nan
    with pytest.raises(UserError, match=r"^the model's losses are not finite"):
        likelihood.measured(model, rows, BYTES, 4, 1, World())


def test_the_windows_of_a_text(tmp_path):
    tokenizer = make_tokenizer("bytes", None)

    def made(*lines: str, size: int = 4, tokens: int = 0) -> list:
        file = tmp_path / "t.jsonl"
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        rows = likelihood.TextRows(str(file), tokenizer, size, tokens)
        assert rows.windows == len(rows.all) and rows.block_size == size
        return rows.read_windows(range(rows.windows)).tolist()

    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert made("abc") == [[bos, 97, 98, 99, eos]]  # nothing behind the last target
    assert made("abcd") == [[bos, 97, 98, 99, 100], [100, eos, PAD, PAD, PAD]]
    assert made("abc", "d") == [[bos, 97, 98, 99, eos], [eos, bos, 100, eos, PAD]]
    assert made("a") == [[bos, 97, eos, PAD, PAD]]
    assert made("abcdefghi", "x", tokens=8) == [[bos, 97, 98, 99, 100], [100, 101, 102, 103, 104]]
    assert made("ab", "cdefgh", tokens=11) == [[bos, 97, 98, eos, bos], [bos, 99, 100, 101, 102]]
    assert made("ab", "cdefgh", tokens=7) == [[bos, 97, 98, eos, bos]]
    assert made("abcdefgh", tokens=3) == [[bos, 97, 98, 99, 100]]  # a window at least
    with pytest.raises(UserError, match=r"^--text=.*t\.jsonl holds no text$"):
        made("")
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a\xff"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl:1"):
        likelihood.TextRows(str(tmp_path / "t.jsonl"), tokenizer, 4)


def test_as_much_of_a_text_is_encoded_as_is_needed():
    seen = []

    class Pairs:
        """Two characters a token."""

        def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
            seen.append(len(texts[0]))
            return [np.arange(len(texts[0]) // 2)]

    class Sparse(Pairs):
        """Twelve characters a token."""

        def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
            seen.append(len(texts[0]))
            return [np.arange(len(texts[0]) // 12)]

    for length, tokenizer, most, sizes in (
            (1104, Pairs(), 10, [1104]), (1105, Pairs(), 10, [1104]), (9000, Pairs(), 10, [1104]),
            (9000, Sparse(), 200, [2624, 5248]), (5000, Sparse(), 200, [2624, 5000]),
            (5000, Sparse(), 64, [1536]), (5000, Sparse(), 65, [1544, 3088])):
        seen.clear()
        found = likelihood.first_ids("x" * length, tokenizer, most)
        assert seen == sizes and found.tolist() == list(range(most)), (length, most, seen)


def test_shares_and_common_beginnings():
    assert likelihood.mean("acc", np.array([1, 0, 1, 1])) == {
        "acc": 0.75, "acc_stderr": pytest.approx(math.sqrt(0.75 * 0.25 / 3))}
    assert likelihood.mean("acc", np.array([True])) == {"acc": 1.0, "acc_stderr": 0.0}
    for one, other, count in (("", "a", 0), ("ab", "ab", 2), ("abc", "abd", 2), ("abc", "ab", 2),
                              ("x", "y", 0)):
        assert likelihood.common_length(one, other) == count


def test_rows_are_grouped_where_that_saves_tokens(scorer, monkeypatch):
    monkeypatch.setattr(likelihood, "WORTH", 3)

    def grouped(rows: dict[str, int], batch_tokens: int = 999) -> list[tuple]:
        """[(what they share, rows)]; rows: text -> how many positions are scored."""
        one = Scorer(scorer.model, scorer.tokenizer, batch_tokens, World())
        found = one.groups({tuple(map(ord, text)): n for text, n in rows.items()})
        return [(group.shared, ["".join(map(chr, row)) for row in group.rows]) for group in found]

    assert grouped({"abcdx": 1, "abcdy": 1}) == [(4, ["abcdx", "abcdy"])]
    assert grouped({"abx": 1, "aby": 1}) == [(0, ["abx"]), (0, ["aby"])]  # two are not worth it
    assert grouped({"abcx": 1, "abcy": 1}) == [(3, ["abcx", "abcy"])]
    assert grouped({"abcdx": 3, "abcdy": 1}) == [(0, ["abcdx"]), (0, ["abcdy"])]  # c is scored
    assert grouped({"abcdx": 2, "abcdy": 1}) == [(3, ["abcdx", "abcdy"])]
    # a third row joins where it saves as much: twice 4 tokens instead of once 8, or of 10
    long = {"abcdefghx": 1, "abcdefghy": 1, "abcdz": 1}
    assert grouped(long) == [(4, ["abcdefghx", "abcdefghy", "abcdz"])]
    longer = {"abcdefghijx": 1, "abcdefghijy": 1, "abcdz": 1}
    assert grouped(longer) == [(10, ["abcdefghijx", "abcdefghijy"]), (0, ["abcdz"])]
    ten = {"abcdx": 1, "abcdy": 1}
    assert len(grouped(ten, 10)) == 1 and len(grouped(ten, 9)) == 2  # two rows of five tokens
    def filled(batch_tokens: int, *groups: tuple, block_size: int = BLOCK) -> list[list[int]]:
        """The places of the groups, each (what it shares, length of its rows, how many)."""
        one = Scorer(scorer.model, scorer.tokenizer, batch_tokens, World())
        one.block_size = block_size
        made = [likelihood.Group(shared, [(i,) * length] * count)
                for i, (shared, length, count) in enumerate(groups)]
        return [[group.rows[0][0] for group in batch.groups] for batch in one.batches(made)]

    assert filled(10, (0, 5, 1), (0, 5, 1)) == [[0, 1]] and filled(9, (0, 5, 1), (0, 5, 1)) == [
        [0], [1]]
    assert filled(99, (3, 5, 2), (0, 5, 1)) == [[1], [0]]  # rows alone come first
    assert filled(99, (3, 5, 2), (4, 6, 2)) == [[1, 0]]  # 2 x 4 + 4 x 2 are less than 1.1 of 15
    assert filled(99, (2, 9, 2), (8, 10, 2)) == [[1], [0]]  # 2 x 8 + 4 x 7 are more than of 28
    assert filled(99, (0, 10, 1), (0, 9, 1), (0, 6, 1)) == [[0, 1], [2]]
    assert filled(99, (4, 6, 2), (4, 6, 2), block_size=6) == [[0, 1]]
    assert filled(99, (4, 6, 2), (4, 6, 2), block_size=5) == [[0], [1]]
    row = (1, 2, 3, 4, 5)
    group = likelihood.Group(2, [row, row[:4]])
    assert (group.shared, group.longest) == (2, 5) and likelihood.Group(2, [row]).shared == 0
    batch = likelihood.Batch([group, likelihood.Group(4, [row, row, row])])
    assert (batch.begin, batch.rest, len(batch.rows), batch.cost) == (4, 3, 5, 2 * 4 + 5 * 3)


def test_the_border_of_context_and_continuation(scorer):
    def texts(context: str, continuation: str) -> tuple[list[int], list[int]]:
        return scorer.pair(context, continuation)

    bos = scorer.tokenizer.bos_id
    assert texts("ab", " c") == ([bos, 97, 98], [32, 99])
    assert texts("ab ", "c") == ([bos, 97, 98], [32, 99])  # blanks go behind the border
    assert texts("", "c") == ([bos], [99]) and texts("  ", "c") == ([bos], [32, 32, 99])


def test_contexts_that_are_cut_are_counted(scorer):
    one = Scorer(scorer.model, scorer.tokenizer, 4096, World())
    fits = [7] * (BLOCK - 1)
    for count, cut in ((2, 0), (3, 1)):  # the last id is not read
        one.truncated.clear()
        one.score([(fits, [8] * count)])
        assert len(one.truncated) == cut
    with pytest.raises(UserError, match=r"^the tokenizer merges a continuation into its context"):
        one.score([([1], [])])
    assert one.score([]) == []


# ---- tasks, tables and records to the letter

def test_what_the_flags_are_where_nothing_is_said():
    assert {item.name: item.default for item in dataclasses.fields(eval.Flags)
            if item.default != ""} == {
        "ckpt": "out", "tasks": "tinyMMLU", "answers": "auto", "limit": 0, "fields": None,
        "chat": "auto", "max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": 1337,
        "bleu_tokenizer": "auto", "probe": False, "id": "id", "label": "label", "seeds": "42",
        "log_samples": False, "contamination": False, "eval_tokens": 0, "batch_tokens": 0,
        "by_position": False, "context": 0, "baselines": False, "device": "auto", "dtype": "auto",
        "json": False}
    for name, low, high in (("limit", 0, None), ("max_new_tokens", 1, None), ("top_p", 0, 1),
                            ("temperature", 0, None), ("seed", 0, None), ("eval_tokens", 0, None),
                            ("batch_tokens", 0, None), ("context", 0, None)):
        for value, good in ((low, True), (low - 1, False), (9e9 if high is None else high, True),
                            (9e9 if high is None else high + 1, high is None)):
            words = [f"--{name}={value}"]
            if good:
                assert getattr(parse(words, "", eval.Flags, "model").flags, name) == value
            else:
                with pytest.raises(UserError, match=f"{name} is"):
                    parse(words, "", eval.Flags, "model")


class Told(Scorer):
    """Likelihoods by a table: continuation -> (nats, greedy)."""

    def __init__(self, table: dict, block_size: int = 592):
        self.table, self.samples, self.truncated = table, {}, {1, 2}
        self.block_size = block_size

    def pair(self, context, continuation):
        return context, continuation

    def score(self, pairs):
        self.asked = pairs
        return [likelihood.Likelihood(*self.table[text]) for _, text in pairs]


def test_local_rows_are_scored_by_these_formulas():
    told = Told({" a": (-1.0, 1), " bbbb": (-3.0, 0), " c": (-2.0, 1), " x": (-8.0, 0)})
    items = [Item([("q", " a"), ("q", " bbbb")], 0), Item([("q", " a"), ("q", " bbbb")], 1),
             Item([("r", " c"), ("r", " x"), ("r", " a")], 2)]
    found = score_local("t", items, None, told)["t"]
    assert found == {  # -1 and -3 / 4; -2, -8 and -1
        "acc": pytest.approx(2 / 3), "acc_stderr": pytest.approx(math.sqrt(2 / 9 / 2)),
        "acc_norm": pytest.approx(2 / 3), "acc_norm_stderr": pytest.approx(math.sqrt(2 / 9 / 2)),
        "chance": pytest.approx((0.5 + 0.5 + 1 / 3) / 3), "loglikelihood": pytest.approx(-5 / 3),
        "n": 3, "truncated": 2}
    assert told.samples["t"] == [
        {"doc_id": i, "target": str(item.right), "arguments": item.pairs, "acc": acc,
         "resps": [[told.table[text]] for _, text in item.pairs]}
        for i, (item, acc) in enumerate(zip(items, (1.0, 0.0, 1.0), strict=True))]
    alike = score_local("t", [Item([("q", " a"), ("q", " c")], 0)], None, told)["t"]
    assert "acc_norm" not in alike and alike["acc_stderr"] == 0  # as long as each other
    greedy = [Item([("q", text)], 0) for text in (" a", " c", " x", " bbbb")]
    found = score_local("t", greedy, None, told)["t"]
    assert found == {"acc": 0.5, "acc_stderr": pytest.approx(0.5 / math.sqrt(3)),
                     "loglikelihood": -3.5, "n": 4, "truncated": 2}
    letters = Told({" A": (-1.0, 0), " B": (-2.0, 0)})
    pairs = [("q\nAnswer: x\n\nq\nAnswer:", f" {letter}") for letter in "AB"]
    more = [("\nAnswer:" * 3, " A"), ("", " B")]
    asked = [Item(more, 0, "s", "q", True), Item(pairs, 1, "s", "q", True)]
    found = score_local("t", asked, None, letters)["t"]
    assert (found["letters"], found["shots"], found["acc"]) == ({"A": 2, "B": 0}, 1, 0.5)
    assert "acc_norm" not in found
    known = irt.Known(None, "no network")
    assert score_local("t", asked, known, letters)["t"]["unavailable"].endswith(": no network")


def test_worked_examples_are_five_and_of_the_subject():
    row = {"question": "Q?", "choices": ["x", "y"], "answer": 1}
    shots = [local_item({**row, "question": f"{i}?"}, None) for i in range(7)]
    [(text, _), _] = local_item(row, shots).pairs
    assert text == "".join(f"Question: {i}?\nAnswer: y\n\n" for i in range(5)) + (
        "Question: Q?\nAnswer:")
    item = local_item({**row, "subject": ""}, [])  # letters, without a subject
    assert item.pairs[0] == ("Q?\nA. x\nB. y\nAnswer:", " A") and item.letters
    assert local_item({**row, "subject": "a_b"}, []).pairs[0][0] == (
        "The following are multiple choice questions (with answers) about a b.\n\n"
        "Q?\nA. x\nB. y\nAnswer:")
    letters = [local_item(row, None, "letters")]
    assert letters[0].pairs[0][0] == "Q?\nA. x\nB. y\nAnswer:"
    assert local_item(row, letters, "letters").pairs[0][0].startswith(
        "The following are multiple choice questions (with answers).\n\nQ?\n")
    full = local_item({**row, "subject": "s"}, [], "full")
    assert (full.letters, full.subject, full.question, full.pairs[0]) == (
        False, "s", "Q?", ("Question: Q?\nAnswer:", " x"))
    for question, pair in (("Question: Q", ("Question: Q\nAnswer:", " x")), ("Q ", ("Q ", "x")),
                           ("Is _", ("Is _", " x")), ("a_b c", ("a_b c", " x")),
                           ("_ is", ("x", " is")), ("Q? ", ("Question: Q?\nAnswer:", " x"))):
        assert local_item({**row, "question": question}, []).pairs[0] == pair
    assert tasks.continued("", ["a", " b", 3]) == [("", "a"), ("", " b"), ("", "3")]
    assert tasks.continued("q", ["a", " b"]) == [("q", " a"), ("q", " b")]
    assert tasks.continued("q\n", ["a", " b"]) == [("q\n", "a"), ("q\n", " b")]
    many = {"question": "q", "choices": [f"c{i}" for i in range(27)], "answer": 26}
    with pytest.raises(UserError, match="'answer' is 26"):
        local_item(many, [])
    assert local_item({**many, "answer": 25}, []).right == 25


def test_which_tasks_are_asked_for(monkeypatch):
    for name, tiny in (("tinyMMLU", True), ("local:a/tiny_mmlu-2.jsonl", True), ("mmlu", False),
                       ("local:tinyMMLU/x.jsonl", False), ("my_TinyMMLU", True)):
        assert tasks.is_tiny(name) == tiny
    flags = eval.Flags(tasks="a,b")
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: name)
    assert tasks.default_names(flags, {}) == ("a,b", "")
    assert tasks.default_names(eval.Flags(tasks="a", generate="f"), {}) == ("", "")
    assert tasks.default_names(eval.Flags(tasks="a", generate="f"), {"tasks": "a"}) == ("a", "")
    assert tasks.default_names(eval.Flags(tasks="a", generate="f", irt_file="p"), {}) == ("a", "")


def test_what_ranks_load_and_why_a_task_is_not_there(here, monkeypatch):
    (here / "tinyMMLU.jsonl").write_text(
        '{"question": "q", "choices": ["a", "b"], "answer": 0, "subject": "s"}\n')
    known, loads = irt.Known(None, "no network"), []
    monkeypatch.setattr(tasks.irt, "load", lambda file: loads.append(file) or known)

    def unavailable(name, include_path):
        raise lm_eval_tasks.Unavailable("not here")

    def found(*names: str, rank: int = 0, others: list | None = None, **flags) -> tuple:
        world = World()
        world.rank = rank
        world.decide = lambda call: call() if others is None else others
        return tasks.find_tasks([*names], eval.Flags(**flags), world)

    monkeypatch.setattr(lm_eval_tasks, "load_task", unavailable)
    made, lacking = found("local:tinyMMLU.jsonl", "tinyMMLU", "passkey", "other", irt_file="p")
    assert loads == ["p"] and [*made] == ["local:tinyMMLU.jsonl", "passkey"]
    assert made["local:tinyMMLU.jsonl"].score.args[2] is known
    end = "; or score a file: --tasks=local:FILE.jsonl"
    assert lacking == [f"no tinyMMLU: not here{end}; irt, pirt, gpirt: no network",
                       f"no other: not here{end}"]
    assert made["passkey"].questions() == [] and made["passkey"].names == ["passkey"]
    (here / "q.jsonl").write_text(
        '{"question": "q", "choices": ["a", "b"], "answer": 0, "subject": "s"}\n' * 3)
    made, lacking = found("local:q.jsonl", limit=2, shots="q.jsonl")
    assert loads == ["p"] and lacking == []  # estimates are of tinyMMLU alone
    assert made["local:q.jsonl"].score.args[2] is None
    assert made["local:q.jsonl"].questions() == ["q", "q"]
    assert len(made["local:q.jsonl"].score.args[1]) == 2
    assert "(with answers) about s." in made["local:q.jsonl"].score.args[1][0].pairs[0][0]
    made, _ = found("local:tinyMMLU.jsonl", rank=1, others=["local:tinyMMLU.jsonl"])
    assert loads == ["p"] and made["local:tinyMMLU.jsonl"].score.args[2] is None
    with pytest.raises(UserError, match=r"^rank 1 cannot have what rank 0 has: no other: not here"):
        found("other", rank=1, others=["other"])
    for name, says in (("q.jsonl", "--tasks=q.jsonl is a file: say --tasks=local:q.jsonl"),
                       ("loca:x", "no task loca:x; did you mean local:?")):
        with pytest.raises(UserError) as error:
            found(name)
        assert str(error.value) == says
    with pytest.raises(UserError, match="--irt_file is for tinyMMLU; name it, or a local:FILE"):
        found("passkey", irt_file="p")


def test_a_passkey_stands_at_five_depths():
    for lines, above in ((4, [0, 1, 2, 3, 4]), (10, [0, 2, 5, 8, 10]), (0, [0] * 5)):
        found = tasks.passkeys(lines, 77)
        assert [(one.depth, one.key, one.length) for one in found] == [
            (depth, key, 77) for depth in (0, 0.25, 0.5, 0.75, 1) for key in range(10)]
        for one, before in zip(found[3::10], above, strict=True):
            assert one.prompt == (tasks.FILLER * before + tasks.PASSKEY.format(key=3)
                                  + tasks.FILLER * (lines - before) + tasks.QUESTION)


def test_passkeys_of_two_lengths_and_of_a_few_prompts(scorer):
    class Knows(Reader):
        """Reads the key, of a token a byte."""

        def encode(self, text: str) -> list[int]:
            return [256, *text.encode()]

    knows = Knows(scorer, lambda text: int(re.search(r"The pass key is (\d)", text)[1]))
    for block, lengths in ((592, [592]), (1184, [592, 1184])):
        knows.block_size = block
        found = tasks.score_passkey(0, knows)["passkey"]
        names = [f"acc_{length}" for length in lengths]
        assert [name for name in found if re.fullmatch(r"acc_\d+", name)] == names
        assert (found["acc"], found["acc_stderr"], found["n"]) == (1, 0, 50 * len(lengths))
        assert found["chance"] == 0.1
    few = tasks.score_passkey(13, knows)["passkey"]
    assert few["n"] == 13 and few["acc_depth_25%"] == 1 and "acc_depth_50%" not in few


TABLE = {"acc": 0.5, "acc_stderr": 0.01, "chance": 0.25, "irt": 0.3, "n": 9, "correct": 4,
         "intervals": {"irt": [0.2, 0.4], "bleu": [1, 2]}, "bleu": 1.5, "flag": True, "word": "x",
         "guessing": {"irt": {"mean": 0.25, "deviation": 0.05, "reaches_0.30": 0.125}},
         "auroc": 0.7, "margins": {"auroc": 0.02}, "chances": {"auroc": 0.5}, "shots": 5,
         "exact,strict": 0.125, "exact_stderr,strict": 0.5, "begin": "<s>", "cut": 0,
         "folds": {"auroc": [0.6, 0.8]}, "letters": {"A": 3, "B": 6}, "unavailable": "why",
         "signatures": {"bleu": "nrefs:1"}}


def test_a_table_of_scores():
    assert results.score_table("title", TABLE).splitlines() == [
        "title, 5 shots, <s> in front",
        "  correct       4 of 9",
        "  acc              0.5000 ± 0.0196   chance 0.2500",
        "  irt              0.3000   95 % 0.200 to 0.400; guessing 0.250 ± 0.098, reaches 0.30 in "
        "12% of tries",
        "  bleu             1.5000   95 % 1.0000 to 2.0000",
        "  auroc            0.7000 ± 0.0200   chance 0.5000",
        "  exact,strict     0.1250 ± 0.9800",
        "  bleu          nrefs:1",
        "  auroc, by fold: 0.6000 0.8000",
        "  predicted     A 3, B 6",
        "  not available: why"]
    assert results.score_table("t", {}) == "t"
    long = results.score_table("t", {"a" * 20: 1.0, "b": 2.0, "margins": {"b": 0.0}})
    assert long == f"t\n  {'a' * 20} {1:9.4f}\n  {'b':<21}{2:9.4f} ± 0.0000"
    found = {score.name: score for score in results.measured(TABLE)}
    assert found["acc"].margin == pytest.approx(1.96 * 0.01) and found["bleu"].margin == 0
    assert (found["auroc"].margin, found["auroc"].chance, found["irt"].chance) == (0.02, 0.5, None)
    assert found["exact,strict"].error == 0.5 and list(found) == ["acc", "irt", "bleu", "auroc",
                                                                 "exact,strict"]


def test_scores_of_a_step_are_joined_where_their_inputs_are_the_same(tmp_path):
    run = tmp_path / "out/r"
    (run / "eval").mkdir(parents=True)
    kept = {"acc": 1, "old": 2, "made_of": {"a": 1, "b": 2}, "intervals": {"x": 1}}
    new = {"acc": 3, "made_of": {"a": 1, "c": 3}, "intervals": {"y": 2}}
    both = {"acc": 3, "old": 2, "made_of": {"a": 1, "b": 2, "c": 3}, "intervals": {"x": 1, "y": 2}}
    assert results.joined(kept, new) == both
    other = {"acc": 3, "made_of": {"a": 2}}
    assert results.joined(kept, other) == other and results.joined({}, new) == new
    assert results.joined(kept, {"acc": 3, "signatures": {}}) == kept | {"acc": 3, "signatures": {}}
    results.record(None, {"step": 3})
    results.record(run, {"step": 3, "val_loss": 1.0, "tasks": {"t": kept, "u": {"n": 1}}})
    results.record(run, {"step": 3, "val_bpb": 2.0, "tasks": {"t": new},
                         "texts": {"x": {"val_loss": 5.0}}})
    assert results.read_scores(run, 3) == {
        "step": 3, "val_loss": 1.0, "val_bpb": 2.0, "tasks": {"t": both, "u": {"n": 1}},
        "texts": {"x": {"val_loss": 5.0}}}
    assert results.read_scores(run, 4) == {}
    place: dict = {}
    results.section(place, ("texts", "x"))["a"] = 1
    assert place == {"texts": {"x": {"a": 1}}} and results.section(place, ()) is place
    checkpoint_folder = tmp_path / "c"
    checkpoint_folder.mkdir()
    assert results.weights_hash(checkpoint_folder) == ""
    hashes = []
    for files in ({"a": 1, "training/x": 2}, {"a": 1, "training/x": 3}, {"a": 2}):
        write_json(checkpoint_folder / "checksums.json", {"files": files})
        hashes.append(results.weights_hash(checkpoint_folder))
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 64
    assert results.are_of({"weights": hashes[2]}, checkpoint_folder)
    assert results.are_of({}, checkpoint_folder)
    assert not results.are_of({"weights": hashes[0]}, checkpoint_folder)


def test_samples_have_a_file_for_each_task_and_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r/eval").mkdir(parents=True)
    for run, step, task, name in ((Path("r"), 7, "local:a/b c.jsonl", "r/eval/samples_a_b_c.jsonl_"
                                   "step_7"), (None, None, "x", "samples_x_step_0"),
                                  (None, 3, "g:é-1.x", "samples_g_é-1.x_step_3")):
        results.write_samples(run, step, task, [{"a": 1}, {"b": 2}])
        assert Path(f"{name}.jsonl").read_text() == '{"a": 1}\n{"b": 2}\n'
        assert capsys.readouterr().out == f"samples {name}.jsonl\n"


def lm_output(*samples: dict, kind: str = "multiple_choice", **metrics) -> dict:
    """What simple_evaluate gives of a task t."""
    return {"results": {"t": metrics}, "samples": {"t": [*samples]},
            "configs": {"t": {"output_type": kind}}}


def test_what_is_taken_of_the_harness(scorer):
    one = {"doc_id": 1, "filter": "none", "resps": [1, 2], "acc": 1, "target": 0, "more": 5,
           "arguments": [["q\nAnswer: A\n\nr\nAnswer:"]]}
    two = one | {"doc_id": 0, "resps": [1, 2, 3, 4]}
    output = lm_output(one, two, one | {"filter": "strict"}, **{
        "acc,none": 0.5, "acc,strict": 0.25, "alias": "t", "n": 3, "sample_len": 9})
    found = lm_eval_tasks.metrics_of("t", output, None, scorer)
    assert found == {"acc": 0.5, "acc,strict": 0.25, "chance": (1 / 2 + 1 / 4) / 2, "n": 2}
    assert scorer.samples["t"] == [
        {name: sample[name] for name in ("doc_id", "target", "arguments", "resps", "acc")}
        for sample in (two, one)]
    other = lm_eval_tasks.metrics_of("t", lm_output(one, kind="loglikelihood", x=1.0), None, scorer)
    assert other == {"x": 1.0, "n": 1}
    group = {"results": {"g": {"acc,none": 0.5, "sample_len": 9}}, "samples": {}, "configs": {}}
    assert lm_eval_tasks.metrics_of("g", group, None, scorer) == {"acc": 0.5, "n": 9}
    tiny = [one | {"doc_id": i, "resps": [[["-1", "x"]], [["-2", "x"]]]} for i in range(2)]
    found = lm_eval_tasks.metrics_of("t", lm_output(*tiny, **{"acc,none": 1.0}),
                                     irt.Known(None, "no network"), scorer)
    assert (found["shots"], found["loglikelihood"], found["letters"], found["correct"]) == (
        1, -1.0, {"A": 2, "B": 0}, 2)
    docs = {"tasks": {"a": type("T", (), {"eval_docs": [{"question": "q"}, {"question": 3}, {}],
                                         "doc_to_text": lambda self, doc: f"text {len(doc)}",
                                         "dump_config": lambda self: {"f": print}})()}}
    assert lm_eval_tasks.questions(docs, 0) == ["q", "text 1", "text 0"]
    assert lm_eval_tasks.questions(docs, 2) == ["q", "text 1"]
    assert len(lm_eval_tasks.hash_of(docs)) == 64
    before = lm_eval_tasks.hash_of(docs)
    docs["tasks"]["a"].eval_docs.append({"question": "r"})
    assert lm_eval_tasks.hash_of(docs) != before


def test_how_much_of_a_prompt_is_left_where_answers_are_generated(scorer, monkeypatch):
    from plainllama.generation import generate

    asked = []

    def complete(model, tokenizer, prompts, most, sampling, seeds, stops):
        asked.append((len(prompts[0]), most, sampling.temperature, seeds, stops))
        return [generate.Completion("eos", "x", [])]

    monkeypatch.setattr(generate, "complete", complete)
    one = Scorer(scorer.model, scorer.tokenizer, 4096, World())
    model = lm_eval_tasks.lm_eval_model(one)
    assert model.eot_token_id == 256 and model.tok_encode("a") == [256, 97]
    assert model.tok_encode("a", add_special_tokens=False) == [97]

    def request(length: int, **options):
        return SimpleNamespace(args=("x" * (length - 1), options))

    assert model.generate_until([request(BLOCK - 256), request(BLOCK - 255)]) == ["x", "x"]
    assert asked == [(BLOCK - 256, 256, 0.0, [0], [])] * 2 and len(one.truncated) == 1
    model.generate_until([request(9, max_gen_toks=BLOCK, until="a"),
                          request(9, max_gen_toks=7, until=("a", "b"))])
    assert asked[2:] == [(9, BLOCK // 2, 0.0, [0], ["a"]), (9, 7, 0.0, [0], ["a", "b"])]


def test_the_hub_is_asked_once_whether_it_is_there(monkeypatch):
    class Answered(OSError):
        """An HTTP error, which is an answer."""

        code = 404

    manager = type("Manager", (), {})
    import lm_eval.tasks
    made = []
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **how: made.append(how) or manager)
    for endpoint, error, offline in (("http://h", None, None), ("", OSError("no"), "1"),
                                     (None, Answered(), None), (None, ValueError("no url"), "1")):
        asked = []

        def opened(request, timeout, error=error, asked=asked):
            asked.append((request.full_url, request.method, timeout))
            if error:
                raise error
            return type("Open", (), {"close": lambda self: None})()

        monkeypatch.setattr(lm_eval_tasks.urllib.request, "urlopen", opened)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
        if endpoint:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
        lm_eval_tasks.task_manager.cache_clear()
        lm_eval_tasks.task_manager(False, "own")
        lm_eval_tasks.task_manager(False, "own")
        assert asked == [(endpoint or "https://huggingface.co", "HEAD", 5)]
        assert os.environ.get("HF_HUB_OFFLINE") == offline
        assert os.environ["TQDM_DISABLE"] == "1"
    assert made[-1] == {"include_defaults": False, "include_path": "own"}
    lm_eval_tasks.task_manager(True)
    assert made[-1] == {"include_defaults": True, "include_path": None} and len(asked) == 1
    lm_eval_tasks.task_manager.cache_clear()
    with pytest.raises(UserError, match=r"^no folder gone; --include_path holds lm-eval's \.yaml"):
        lm_eval_tasks.load_task("x", "gone")


# ---- what is asked of every checkpoint

STEP_30 = Path("out/toy/checkpoints/step_30")


def asked(*words: str, rank: int = 0, kept: dict | None = None,
          first: Path = STEP_30) -> eval.Evaluation:
    """What eval.py makes of its flags, on a rank."""
    given = parse(list(words), "", eval.Flags, "model")
    world = World()
    world.rank = rank
    world.decide = lambda call: call()
    return eval.Evaluation(given.flags, given.overrides, world, kept, first)


def test_what_is_recorded_and_by_whom(here, capsys):
    plain = asked("--tasks=")
    assert plain.keep == plain.run and (here / "out/toy/eval").is_dir() and plain.kept is None
    assert (plain.batch_tokens, plain.tokens, plain.section, plain.shorter) == (
        4096, 5 * BLOCK, (), "")
    assert plain.windows_made_of == {
        "dtype": "torch.float32", "tokens": 5 * BLOCK,
        "data": (here / "data/toy/manifest.sha256").read_text().strip()}
    assert capsys.readouterr().out == ""
    assert asked("--tasks=", "--batch_tokens=7").batch_tokens == 7
    for word in ("--data=toy", "--limit=3", "--eval_tokens=5", "--dtype=fp32"):
        assert asked("--tasks=", word).keep is None
        assert f"not recorded in {here}/out/toy/eval, because of {word.split('=')[0]}\n" in (
            capsys.readouterr().out)
    assert asked("--tasks=", "--by_position", "--baselines").windows_made_of.items() >= {
        "by_position": True, "baselines": True}.items()
    assert capsys.readouterr().out == ""
    second = asked("--tasks=", "--limit=3", rank=1, kept={})
    assert second.keep is None and capsys.readouterr().out == ""  # rank 0 speaks and writes
    assert asked("--tasks=", rank=1).keep is None
    asked("--tasks=", kept={})
    assert capsys.readouterr().out == f"\nscores of {STEP_30}\n"
    asked("--tasks=", "--all=out/toy", kept={})
    assert capsys.readouterr().out == ""


def test_in_which_windows_the_loss_is_measured(here, capsys, monkeypatch):
    (here / "t.txt").write_text("some text " * 99)
    for words, tokens, section, on in (
            ((), 5 * BLOCK, (), "validation split of data/toy"),
            ((f"--context={BLOCK}",), 5 * BLOCK, (), "validation split of data/toy"),
            ((f"--context={BLOCK - 1}",), 5 * BLOCK, ("contexts", f"{BLOCK - 1}"),
             "validation split of data/toy"),
            (("--data=toy", "--eval_tokens=9"), 9, (), "validation split of data/toy"),
            (("--text=t.txt",), 2 * BLOCK, ("texts", "t.txt"), "the text t.txt"),
            (("--text=t.txt", "--context=100"), 1000, ("texts", "t.txt in windows of 100"),
             "the text t.txt"),
            (("--text=t.txt", "--eval_tokens=600"), 600, ("texts", "t.txt"), "the text t.txt")):
        found = asked("--tasks=", *words)
        assert (found.tokens, found.section, found.measured_on) == (tokens, section, on), words
    (here / "data").rename(here / "away")
    capsys.readouterr()
    assert asked("--tasks=").windows is None
    assert capsys.readouterr().out == ("no bits per byte: no data set data/toy; name a data set "
                                       "with --data=FOLDER\n")
    found = asked("--tasks=", "--data=away/toy")  # a path
    assert found.measured_on == "validation split of away/toy"
    (here / "away").rename(here / "data")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")  # the data set lies beside the run
    found = asked("--tasks=", first=here / STEP_30)
    assert found.measured_on == f"validation split of {here}/data/toy"


def test_flags_without_effect_are_named(here, capsys):
    (here / "q.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    (here / "own").mkdir()
    every = ["--shots=q.jsonl", "--answers=full", "--chat=auto", "--stop=x", "--metrics=exact",
             "--log_samples", "--include_path=own", "--eval_tokens=9", "--by_position"]

    def named(*words: str) -> list[str]:
        capsys.readouterr()
        asked(*words)
        return re.findall(r"note: --(\w+) has no effect here", capsys.readouterr().out)

    assert named("--tasks=", *every) == [
        "shots", "answers", "chat", "stop", "metrics", "log_samples", "include_path"]
    assert named("--tasks=local:q.jsonl", *every) == ["chat", "stop", "metrics", "include_path"]
    assert named("--tasks=passkey", *every) == [
        "shots", "answers", "chat", "stop", "metrics", "include_path"]
    assert named("--tasks= passkey, ,passkey") == []
    (here / "data").rename(here / "away")
    assert named("--tasks=", "--eval_tokens=9", "--by_position") == ["eval_tokens", "by_position"]
    assert asked("--tasks= passkey, ,passkey").tasks.keys() == {"passkey"}


def test_what_of_a_step_is_there_already(here):
    (here / "w.jsonl").write_text('{"context": "def", "continuation": "add"}')
    found = asked("--tasks=local:w.jsonl")
    made = {"dtype": "torch.float32"} | found.tasks["local:w.jsonl"].made_of
    assert found.task_made_of("local:w.jsonl") == made
    kept = {"made_of": dict(found.windows_made_of), "tasks": {"local:w.jsonl": {"made_of": made}}}
    assert found.complete(kept)
    assert found.complete(kept | {"made_of": found.windows_made_of | {"by_position": True}})
    assert not found.complete(kept | {"made_of": {}}) and not found.complete(kept | {"tasks": {}})
    logged = asked("--tasks=local:w.jsonl", "--log_samples")
    assert logged.task_made_of("local:w.jsonl") == made | {"log_samples": True}
    assert not logged.complete(kept) and asked("--tasks=").complete(kept)


def test_several_models_are_scored_one_after_another(here, folder, capsys):
    for name in ("one", "two"):
        shutil.copytree(folder, here / name)
    (here / "one,two").mkdir()
    with pytest.raises(UserError, match=r"^one,two holds no complete checkpoint"):
        main("--ckpt=one,two", "--tasks=")
    (here / "one,two").rmdir()
    assert main("--ckpt=one, two", "--tasks=", "--data=toy", "--eval_tokens=1") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^scores of (\w+)$", shown, re.MULTILINE) == ["one", "two"]
    assert shown.count("val_loss") == 2
    break_weights(here / "two")
    assert main("--ckpt=one,two", "--tasks=", "--data=toy", "--eval_tokens=1") == 2
    shown = capsys.readouterr().out
    assert shown.count("val_loss") == 1 and "no bits per byte: the model's losses are not" in shown


def test_the_exit_code_is_2_only_for_what_was_named(here, capsys, monkeypatch):
    def fails(*_):
        raise UserError("cannot be")

    (here / "w.jsonl").write_text('{"context": "def", "continuation": "add"}')
    monkeypatch.setattr(eval.tasks, "default_names", lambda *_: ("passkey", ""))
    monkeypatch.setattr(tasks, "passkey_prompts", lambda *_: [])
    assert main() == 0 and main("--tasks=passkey") == 2
    assert capsys.readouterr().out.count("no passkey: passkey: a context of 592") == 2
    monkeypatch.setattr(eval.likelihood, "measured", fails)
    assert main() == 2  # the bits per byte, which were not named
    assert "no bits per byte: cannot be" in capsys.readouterr().out


def test_windows_of_pairs_have_other_scores(here, capsys, monkeypatch):
    given = []

    def score_pairs(model, windows, *how):
        given.append(how)
        return {"val_loss": 0.5, "logps/accuracies": 0.75, "logps/accuracies_stderr": 0.25, "n": 8}

    monkeypatch.setattr(eval, "score_pairs", score_pairs)
    monkeypatch.setattr(eval.Evaluation, "of_pairs", lambda self: True)
    assert main("--tasks=", "--by_position") == 0
    shown = capsys.readouterr().out
    assert "note: --by_position has no effect here" in shown
    assert "validation, 8 pairs (rewards: against step 0; logps: by likelihood; sh" in shown
    kept = json.loads((here / "out/toy/eval/step_30.json").read_text())
    assert kept["logps/accuracies"] == 0.75 and "by_position" not in kept
    assert kept["made_of"]["reference"] == {}
    [(tokens, rows, _, bos, config, run)] = given
    assert (tokens, rows, bos, config.seed, run) == (5 * BLOCK, 1, None, 3, here / "out/toy")


def test_documents_by_themselves_are_scored_so(here, monkeypatch):
    info = json.loads((here / "out/toy/run.json").read_text())
    given = []
    monkeypatch.setattr(eval.likelihood, "measured", lambda model, windows, *how: given.append(
        how) or {"val_loss": 1.0, "val_bpb": 1.0, "val_tokens": 1, "val_bytes": 1})
    for mask, bos in ((False, None), (True, 256)):
        info["config"]["doc_mask"] = mask
        write_json(here / "out/toy/run.json", info)
        assert main("--tasks=") == 0
        assert given[-1][1:3] == (5 * BLOCK, 1) and given[-1][4] == bos
    with pytest.raises(UserError, match="no file gone; lm_eval --log_samples"):
        main("--irt=gone", "--json")
    with pytest.raises(UserError, match="--id is for --probe, which is not said"):
        main("--id=x")


def test_windows_hold_pairs_where_two_documents_belong_together():
    for together in (1, 2, 3):
        rows = FitRows.__new__(FitRows)
        rows.split = SimpleNamespace(together=together)
        assert eval.Evaluation.of_pairs(SimpleNamespace(windows=rows)) == (together == 2)
    assert not eval.Evaluation.of_pairs(SimpleNamespace(windows=None))


class Bar(likelihood.Progress):
    """How far things are, kept."""

    made: list = []  # noqa: RUF012

    def __init__(self, *given):
        super().__init__(*given)
        self.given = given
        Bar.made.append(self)


def test_how_far_scoring_is_ends_at_its_total(scorer, monkeypatch):
    monkeypatch.setattr(likelihood, "Progress", Bar)
    pairs = [([1, 2, 3, 4, 5, 6], [i]) for i in range(4)] + [([7], [8]), ([9, 9], [1])]
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        world = World()
        world.rank, world.size = rank, size
        world.sum = lambda values: values
        Bar.made.clear()
        Scorer(scorer.model, scorer.tokenizer, 6, world).score(pairs)
        assert Bar.made[0].given == ("scoring", 3, "prompts", rank == 0, "cpu")
        assert Bar.made[0].done == (2 if (rank, size) == (1, 2) else 3)
        Bar.made.clear()
        rows = Few(*[[1, 2, 3]] * 7)
        assert len([*likelihood.passes("t", rows, 14, 2, world)]) == (4 if size == 1 else 2)
        assert Bar.made[0].given == ("t", 7, "rows", rank == 0, "cpu") and Bar.made[0].done == 7


# ---- validation along a run

def test_a_line_of_validation_and_a_remark_on_chosen_answers(tmp_path):
    scores = {"val_loss": 2.0, "val_bpb": 1.25, "val_loss/old": 3.0, "val_bpb/old": 9.0}
    assert validation.told(scores) == (
        "validation loss 2.0000 nats/token, 1.2500 bits/byte; old 3.0000")
    pairs = {"val_loss": 0.5, "val_rewards/accuracies": 0.875, "val_pairs": 8,
             "val_rewards/margins": 0.25, "val_loss/a": 1.0}
    assert validation.told(pairs) == ("validation loss 0.5000 nats/pair, chosen preferred in 87.5% "
                                      "of 8, margin 0.2500; a 1.0000")
    rows = [{"step": 0, "val_pairs": 4, "val_logps/chosen": -1.0}, {"step": 0, "val_pairs": 8},
            {"step": 1, "val_pairs": 8, "val_logps/chosen": -100.0},
            {"step": 2, "val_pairs": 8, "val_logps/chosen": -50.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def remark(chosen) -> str:
        return validation.remark_on_chosen(tmp_path, {"val_logps/chosen": chosen, "val_pairs": 8})

    assert remark(-119.9) == remark(-120.0) == remark(math.nan) == ""
    assert remark(-130.0) == (
        "WARNING: the log-probability of chosen answers has fallen by 30% (from -100.0 to -130.0): "
        "the margin grows while both answers become unlikely; a lower learning_rate or fewer steps "
        "help, with dpo nll_weight too")
    assert validation.remark_on_chosen(tmp_path, {}) == ""
    assert validation.remark_on_chosen(tmp_path, {"val_logps/chosen": -9.0, "val_pairs": 5}) == ""


def test_which_sets_are_validated_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "more"):
        write_data_set(tmp_path / "data" / name, {"train": documents(9), "val": documents(6)})
    manifest = json.loads((tmp_path / "data/toy/manifest.json").read_text())
    monkeypatch.setattr(validation, "val_rows", lambda folder, theirs, size: SimpleNamespace(
        folder=folder, block_size=size))

    def opened(folder: str = "data/more", recipe: dict | None = None, theirs: dict | None = None,
               ours: dict | None = None, **config):
        changed = json.loads((tmp_path / "data/toy/manifest.json").read_text())
        changed["recipe"] |= recipe or {}
        changed["tokenizer"] |= theirs or {}
        shards.write_manifest(tmp_path / "data/more", changed)
        settled = settings.Settings(dataset="toy", block_size=16, eval_sets={"x": folder}, **config)
        used = manifest | {"tokenizer": manifest["tokenizer"] | (ours or {})}
        return validation.open_sets(settled, used)

    found = opened()["x"]
    assert (found.bos_id, found.rows.block_size) == (None, 16)
    assert opened(recipe={"documents": "chat"})["x"].bos_id == 256
    assert opened(doc_mask=True)["x"].bos_id == 256
    assert opened(doc_mask=True, packing="fit")["x"].bos_id is None
    sha = manifest["tokenizer"]["sha256"]
    assert "x" in opened(ours={"sha256": "roles", "base": sha})  # texts beside dialogs
    assert validation.open_sets(settings.Settings(dataset="toy"), manifest) == {}
    for how, says in (
            ({"folder": "more"}, "x names 'more', no data set; name the folder of one, such as "
                                 "data/more"),
            ({"folder": "gone"}, "x names 'gone', no data set; .* such as data/toy"),
            ({"recipe": {"documents": "preference"}}, "x, data/more, holds pairs"),
            ({"theirs": {"sha256": "a", "base": sha}}, "x, data/more, holds dialogs, whose rol"),
            ({"theirs": {"sha256": "a"}}, "x, data/more, has another tokenizer than data/toy")):
        with pytest.raises(UserError, match=says):
            opened(**how)


def test_the_own_split_among_the_sets_is_measured_once(rows, folder, monkeypatch):
    calls = []

    def evaluate_once(model, of, info, *how):
        calls.append((of, *how))
        return {"val_loss": float(len(calls)), "val_bpb": 9.0, "more": 0}

    monkeypatch.setattr(validation, "evaluate", evaluate_once)
    engine = SimpleNamespace(micro=2, world=World(), bos_id=7, module="m", objective=None,
                             config=settings.Settings(eval_tokens=99))
    other = SimpleNamespace(split=SimpleNamespace(folder=Path("other")))
    sets = {"same": validation.ValSet(rows, None, None), "other": validation.ValSet(other, None, 5)}
    found = validation.validate(engine, rows, None, None, sets)
    assert found == {"val_loss": 1.0, "val_bpb": 9.0, "val_loss/same": 1.0, "val_bpb/same": 9.0,
                     "val_loss/other": 2.0, "val_bpb/other": 9.0}
    assert [(call[1], call[2], call[4]) for call in calls] == [(99, 2, 7), (99, 2, 5)]


# ---- the command

def test_without_a_network_the_default_gives_the_other_scores(here):
    done = run_script("eval.py", "--json", cwd=here,
                      env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "empty")})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "tinyMMLU" in line]
    assert len(lines) == 1 and lines[0].startswith("no tinyMMLU: ")
    assert "local:FILE.jsonl" in lines[0]
    result = json.loads(done.stdout.splitlines()[-1])
    kept = json.loads((here / "out" / "toy" / "eval" / "step_30.json").read_text())
    assert kept == result and result["tasks"] == {}
    assert (result["step"], result["tokens"], result["val_tokens"]) == (30, 120 * BLOCK, 5 * BLOCK)
    assert result["val_bpb"] > 0 and "val_bpb" in done.stdout


def test_the_loss_has_its_interval_and_says_what_it_was_measured_on(here, capsys):
    """The interval is that of the windows' own losses, each of which goes alone, as they are few;
    a text is no validation."""
    (here / "t.txt").write_text("def add(a, b):\n" * 60)
    half = BLOCK // 2
    for words, title, name in (
            ((), "validation split of data/toy, ", "val_loss"),
            ((f"--context={half}",), f"validation split of data/toy in windows of {half}",
             "val_loss"), (("--text=t.txt",), "the text t.txt, ", "loss")):
        assert main("--tasks=", "--json", *words) == 0
        lines = capsys.readouterr().out.splitlines()
        result = json.loads(lines[-1])
        scores = result["contexts"][str(half)] if "--context" in str(words) else (
            result["texts"]["t.txt"] if words else result)
        at = next(i for i, line in enumerate(lines) if line.startswith(title))
        assert lines[at + 1].split() == [name, f"{scores['val_loss']:.4f}", "±",
                                         f"{1.96 * scores['val_loss_stderr']:.4f}"]
        assert scores["val_loss_stderr"] > 0
        assert lines[at + 2].split()[0] == name.replace("loss", "bpb")


def test_the_standard_error_is_that_of_the_windows(rows, folder):
    """Beside the formula of a mean, which it is where all windows have as many targets."""
    info, model = byte_info(folder), load_model(folder)
    ids = torch.from_numpy(rows.read_windows(range(5)).astype(np.int64))
    with torch.no_grad():
        each = [model(row[None, :-1], row[None, 1:]).item() / BLOCK for row in ids]
    found = likelihood.measured(model, rows, info, 5 * BLOCK, 1, World())
    assert found["val_loss_stderr"] == pytest.approx(np.std(each, ddof=1) / math.sqrt(5), rel=1e-5)
    assert "val_loss_stderr" not in likelihood.measured(model, rows, info, BLOCK, 1, World())
    assert [likelihood.rows_of_a_pass(rows, n * BLOCK, 4 * BLOCK) for n in (1, 5)] == [1, 1]
    many = type("Many", (), {"block_size": 8, "windows": 999})
    assert [likelihood.rows_of_a_pass(many, 8 * n, 64) for n in (16, 40, 900)] == [1, 2, 8]


def test_the_default_task_is_not_asked_of_a_machine_without_lm_eval(here, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(tasks.importlib.util, "find_spec",
                        lambda name, *more: None if name == "lm_eval" else find(name, *more))
    monkeypatch.setattr(tasks.irt, "load", lambda *_: pytest.fail("asked for estimates"))
    assert main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tinyMMLU" in line]
    assert lines == ["no tinyMMLU: lm-eval is not installed (python -m pip install -c "
                     "constraints.txt -e '.[eval]'); or score a file: --tasks=local:FILE.jsonl"]


def test_a_named_task_without_data_is_an_error_and_the_others_are_kept(here, questions, capsys):
    task = f"local:{questions[0]}"
    path = here / "out" / "toy" / "eval" / "step_30.json"
    assert main("--tasks=", "--limit=9") == 0  # not what runs are compared by: not kept
    assert "not recorded" in capsys.readouterr().out and not path.exists()
    assert main(f"--tasks=tinyMMLU,{task}", f"--shots={questions[1]}", "--json") == 2
    shown = capsys.readouterr().out
    assert shown.count("no tinyMMLU: ") == 1 and "chance 0.2500" in shown and " ± " in shown
    first = json.loads(path.read_text())
    assert first["tasks"][task]["n"] == 100 and first == json.loads(shown.splitlines()[-1])

    (here / "words.jsonl").write_text('{"context": "def", "continuation": "add"}')
    (here / "data").rename(here / "elsewhere")  # no data set: said, and the tasks go on
    assert main("--tasks=local:words.jsonl") == 0
    assert "no bits per byte: no data set data/toy" in capsys.readouterr().out
    both = json.loads(path.read_text())
    assert set(both["tasks"]) == {task, "local:words.jsonl"} and both["val_bpb"] == first["val_bpb"]
    assert "chance" not in both["tasks"]["local:words.jsonl"]


def test_baselines_stand_beside_the_model(here, rows, folder, capsys):
    assert main("--tasks=", "--baselines") == 0
    kept = json.loads((here / "out/toy/eval/step_30.json").read_text())
    found = kept["baselines"]
    train = Rows(shards.open_split(here / "data/toy", "train"), BLOCK, 3)
    scored = rows.read_windows(range(5)).astype(np.int64)
    assert found == pytest.approx(counting.baselines(train, 120, scored, kept["val_bytes"], 258))
    assert "5-gram" in capsys.readouterr().out
    shutil.copytree(folder, here / "model")
    for words in (["--ckpt=model"], ["--data=toy"]):
        with pytest.raises(settings.UserError, match="--baselines counts in the rows"):
            main(*words, "--tasks=", "--baselines")


def test_a_model_folder_without_a_run(here, folder, capsys):
    shutil.copytree(folder, here / "model")
    assert main("--ckpt=model", "--tasks=") == 0
    assert "no bits per byte" in capsys.readouterr().out
    assert main("--ckpt=model", "--tasks=", "--data=toy", "--eval_tokens=1200", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["val_tokens"] == 2 * BLOCK and "step" not in result
    assert not list(here.glob("model/eval*"))


def test_what_the_user_can_mend_is_said(here):
    words = [("--ckpt=nowhere", "no folder nowhere"), ("--data=nothing", "no data set nothing"),
             ("--tasks=local:no.jsonl", "no file no.jsonl"),
             ("nowhere", "cannot use 'nowhere': no run")]
    for word, said in words:
        with pytest.raises(UserError, match=said):
            main(word)
    words = here / "data" / "toy" / "tokenizer.json"  # two ids change places
    text = words.read_text(encoding="utf-8")
    assert '"à":224,"á":225' in text
    words.write_text(text.replace('"à":224,"á":225', '"à":225,"á":224'), encoding="utf-8")
    with pytest.raises(UserError, match="sha256"):
        main("--tasks=")


# ---- nothing silently wrong

@pytest.mark.parametrize("choices, answer, right", [
    (["an", "a"], "a", 1), (["a", "an"], "a", 0), (["A", "B"], "b", 1), (["x", "a", "c"], "c", 2),
    (["C", "B", "A"], "A", None), (["A", "B"], "A", 0), ([3, 4], 4, 1), ([1, 2], 1, None),
    (["1", "2", "3"], 1, 1), (["1", "2", "3"], "2", 1), ([3, 4], "4", 1), (["o", "o"], "o", None),
    (["no", "yes"], True, None), ([" a ", "b"], "a", 0), (["yes", "no"], "B", 1)])
def test_the_text_of_a_choice_goes_before_its_letter(choices, answer, right):
    row = {"question": "q", "choices": choices, "answer": answer}
    if right is None:
        with pytest.raises(UserError, match="'answer' is "):
            local_item(row, [])
    else:
        assert local_item(row, []).right == right


def break_weights(folder: Path) -> None:
    """Make a checkpoint's weights not finite, and whole again by its checksums."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    sums = json.loads((folder / "checksums.json").read_text())
    sums["files"]["model.safetensors"] = file_entry(folder / "model.safetensors")
    write_json(folder / "checksums.json", sums)


def test_weights_that_are_not_finite_have_no_score(here, capsys):
    break_weights(here / "out/toy/checkpoints/step_30")
    (here / "words.jsonl").write_text('{"context": "def", "continuation": "add"}')
    (here / "q.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}')
    assert main("--tasks=local:words.jsonl,local:q.jsonl,passkey", "--by_position") == 2
    shown = capsys.readouterr().out
    assert shown.count("are not finite") == 4 and "acc" not in shown and "nan" not in shown
    assert main("--tasks=") == 2
    kept = json.loads((here / "out/toy/eval/step_30.json").read_text())
    assert kept["tasks"] == {} and "val_loss" not in kept
    likely = [{"doc_id": 0, "acc": 1, "target": 0, "resps": [[["nan", "False"]]]}]
    with pytest.raises(UserError, match="not finite"):
        irt.answers(likely, "samples")


def test_what_changes_a_score_makes_it_anew(here, capsys):
    """Each change alone; then the same again, which is known."""
    def row(i):
        return json.dumps({"question": f"What is {i}" + ", well" * 11 + "?",
                           "choices": ["so", "no"], "answer": i % 2})

    for name, count in (("q", 3), ("one", 5), ("two", 6)):
        (here / f"{name}.jsonl").write_text("\n".join(map(row, range(count)[::-1])))
    (here / "t.txt").write_text("some text. " * 99)
    words = ["--tasks=local:q.jsonl", "--shots=one.jsonl", "--text=t.txt"]

    def scored(*more: str) -> bool:
        assert main("--all=out/toy", *words, *more) == 0
        return "has these scores" not in capsys.readouterr().out

    assert scored() and not scored()
    words[1] = "--shots=two.jsonl"
    assert not scored("--shots=one.jsonl") and scored()
    (here / "two.jsonl").write_text(row(3) + "\n" + row(2))
    assert scored() and not scored()
    assert scored("--answers=letters") and scored("--answers=full") and not scored("--answers=full")
    (here / "q.jsonl").write_text("\n".join(map(row, (2, 0, 1))))
    assert scored("--answers=full") and not scored("--answers=full")
    (here / "t.txt").write_text("some text, " * 99)  # of the same size
    assert scored("--answers=full") and not scored("--answers=full")
    assert scored("--answers=full", "--log_samples")
    assert not scored("--answers=full", "--log_samples") and not scored("--answers=full")
    assert scored("--answers=full", "--by_position") and not scored("--answers=full")
    assert scored("--answers=full", "--contamination")
    assert not scored("--answers=full", "--contamination")
    shutil.rmtree(here / "data/toy")
    write_data_set(here / "data/toy", {"train": documents(9), "val": documents(40)})
    words[2] = ""
    words.remove("")
    assert scored("--answers=full") and not scored("--answers=full")
    kept = here / "out/toy/eval/step_30.json"
    before = json.loads(kept.read_text())
    assert before["texts"]["t.txt"]["made_of"]["text"] and before["tasks"]["local:q.jsonl"]["acc"]


def test_scores_of_other_weights_are_not_kept(here, folder, capsys):
    """Of a run that was trained anew in the same folder."""
    assert main("--all=out/toy", "--tasks=", "--by_position") == 0
    other = here / "out/toy/checkpoints/step_30"
    weights = {name: value * 0.5 for name, value in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    sums = json.loads((other / "checksums.json").read_text())
    sums["files"]["model.safetensors"] = file_entry(other / "model.safetensors")
    write_json(other / "checksums.json", sums)
    assert results.read_scores(here / "out/toy", 30) == {}
    for damaged in ({"tasks": 3}, {"texts": {"a": []}}, {"contexts": None}):
        assert not results.are_of(damaged, other) and not results.are_of(damaged, here)
    before = json.loads((here / "out/toy/eval/step_30.json").read_text())
    assert main("--all=out/toy", "--tasks=") == 0
    assert "has these scores" not in capsys.readouterr().out
    after = json.loads((here / "out/toy/eval/step_30.json").read_text())
    assert before["val_loss"] != after["val_loss"] and "by_position" not in after


def test_a_mixture_is_as_it_was_until_it_is_not(here, capsys):
    write_data_set(here / "data/more", {"train": documents(9), "val": documents(3)})
    run, names = here / "out/toy", {"toy": 0.7, "more": 0.3}
    info = json.loads((run / "run.json").read_text())
    info["config"]["mixture"] = names
    write_json(run / "run.json", info)
    state = run / "checkpoints/step_30/training/state.json"
    digest = hash_of_data(here / "data/toy", settings.Settings(mixture=names))
    write_json(state, json.loads(state.read_text()) | {"data_hash": digest})
    sums = json.loads((state.parents[1] / "checksums.json").read_text())
    sums["files"]["training/state.json"] = file_entry(state)
    write_json(state.parents[1] / "checksums.json", sums)
    assert main("--tasks=") == 0
    assert "as it was" not in capsys.readouterr().out
    shutil.rmtree(here / "data/more")
    assert main("--tasks=") == 0
    assert "of the mixture more is not here" in capsys.readouterr().out
    write_data_set(here / "data/more", {"train": documents(8), "val": documents(3)})
    assert main("--tasks=") == 0
    assert "data/more is not as it was" in capsys.readouterr().out
    with pytest.raises(UserError, match="of one data set"):
        main("--tasks=", "--baselines")


def test_a_validation_split_that_repeats_the_training_text_is_said(here, capsys):
    assert main("--tasks=") == 0
    assert "lie in the training data" not in capsys.readouterr().out
    shutil.rmtree(here / "data/toy")
    texts = [" ".join(f"w{i}x{j}" for j in range(120)) for i in range(8)]
    write_data_set(here / "data/toy", {"train": texts[2:], "val": texts[:4]}, 1)
    assert main("--tasks=", "--json") == 0
    shown = capsys.readouterr().out
    share = json.loads(shown.splitlines()[-1])["repeated"]
    tokenizer = Tokenizer.load(here / "data/toy")
    val = Rows(shards.open_split(here / "data/toy", "val"), BLOCK, 0)
    runs, known = [], " ".join(texts[2:])
    for window in val.read_windows(range(val.windows)):
        words = re.findall(r"\w+", tokenizer.decode(window))
        runs += [" ".join(words[i:i + 13]) in known for i in range(len(words) - 12)]
    assert share == pytest.approx(np.mean(runs)) and 0.3 < share < 0.7
    assert f"{share:.2%} of the runs of 13 words" in shown


def test_a_few_tokens_of_a_long_text_are_read_alone(here, folder, capsys, monkeypatch):
    tokenizer = Tokenizer.load(folder)
    long = "".join(f"line {i} of the text.\n" for i in range(30000))
    (here / "t.txt").write_text(long)
    read, real = [], Tokenizer.encode_documents
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda self, texts: read.append(
        sum(map(len, texts))) or real(self, texts))
    for name in ("t.txt", "t.jsonl"):
        (here / "t.jsonl").write_text("\n".join([json.dumps({"text": long})] * 3) + "\n{")
        read.clear()
        assert main("--tasks=", f"--text={name}", "--eval_tokens=64", "--context=64", "--json") == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["texts"][
            f"{name} in windows of 64"]
        assert found["val_tokens"] == 64 and found["val_bytes"] == 64 and sum(read) < 5000
    first = likelihood.first_ids(long, tokenizer, 100)
    assert first.tolist() == real(tokenizer, [long])[0][:100].tolist()


def test_what_has_no_effect_is_said_or_refused(here, capsys):
    (here / "one.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}')
    assert main("--tasks=", "--shots=one.jsonl", "--log_samples", "--answers=full") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"note: (\S+) has no effect here", shown) == [
        "--shots", "--answers", "--log_samples"]
    for words, said in ((["--all=out/toy", "--ckpt=out/toy"], "--all and --ckpt"),
                        (["--irt=x.jsonl", "--limit=3"], "leave out --limit")):
        with pytest.raises(UserError, match=said):
            main(*words)
    (here / "out/toy/checkpoints/step_30/config.json").write_text("{}")
    with pytest.raises(UserError, match="not a run with checkpoints that are whole"):
        main("--all=out/toy", "--tasks=")


def test_what_lies_in_the_place_of_the_scores_is_said_before_anything_is_scored(here, monkeypatch):
    monkeypatch.setattr(eval.peft, "load_model", None)
    (here / "out/toy/eval").symlink_to("gone")
    with pytest.raises(FileExistsError, match="out/toy/eval"):  # one line, by run_command
        main("--tasks=")
    (here / "out/toy/run.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="is damaged: it holds no config"):
        main("--tasks=")
