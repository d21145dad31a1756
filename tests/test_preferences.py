"""Pairs of answers from their records to the loss: what is kept, what is learned, and what DPO and
ORPO make of it, beside formulas that share nothing with the program."""

import hashlib
import io
import json
import math
import shutil
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, run_script
from safetensors.torch import load_file
from test_prepare import inside
from test_prepare_chat import BOS, END, ROLES, jsonl, rendered, stored

import eval as evaluation
import train
from model import LLaMA, ModelConfig
from plainllama.command import parse
from plainllama.evaluation.validation import remark_on_chosen
from plainllama.files import file_entry, read_json, write_json
from plainllama.parallel import World
from plainllama.settings import Settings, UserError, check_keys
from plainllama.text import embedded_preference
from plainllama.text.dialogs import How
from plainllama.text.forms import Refused
from plainllama.text.pairs import paired
from plainllama.tokens import shards
from plainllama.tokens.rows import FitRows, to_batch
from plainllama.training import objectives, reference, resume
from plainllama.training.objectives import (
    LOGGED,
    OBJECTIVES,
    log1mexp,
    log_probabilities,
    sums_of,
)
from plainllama.weights.adapters import initialise
from plainllama.weights.peft import load_model

PAIRS = How(train_on="last", pairs=True)


def said(*texts):
    """Messages of a user and an assistant in turn."""
    return [{"role": role, "content": text}
            for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)]


# ---- records -> pairs

FORMS = {
    "texts": {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    "messages behind a prompt": {"prompt": said("Why?"), "chosen": said("", "So.")[1:],
                                 "rejected": said("", "No.")[1:]},
    "whole talks": {"chosen": said("Why?", "So."), "rejected": said("Why?", "No.")},
    "whole talks and the prompt": {"prompt": "Why?", "chosen": said("Why?", "So."),
                                   "rejected": said("Why?", "No.")},
    "conversations": {"conversations": [{"from": "human", "value": "Why?"}],
                      "chosen": {"from": "gpt", "value": "So."},
                      "rejected": {"from": "gpt", "value": "No."}},
    "transcripts": {"chosen": "\n\nHuman: Why?\n\nAssistant: So.",
                    "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    "a transcript as prompt": {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " So.".strip(),
                               "rejected": "No."},
    "instruction": {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."},
    "JSON text": {"chosen": json.dumps(said("Why?", "So.")),
                  "rejected": json.dumps(said("Why?", "No."))},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_of_a_pair(form):
    made, cut = paired(FORMS[form], PAIRS)
    assert json.loads(made) == {"messages": said("Why?", "So."),
                                "rejected": said("", "No.")[1:]} and cut == 0


def test_earlier_turns_are_the_prompt_and_not_learned():
    talk = said("a", "b", "c", "So.")
    made = json.loads(paired({"chosen": talk, "rejected": [*talk[:3], said("", "No.")[1]],
                              "system": "Be brief."}, PAIRS)[0])
    assert [m["role"] for m in made["messages"]] == ["system", "user", "assistant", "user",
                                                     "assistant"]
    assert made["messages"][2]["learn"] is False and "learn" not in made["messages"][4]


BROKEN = [
    ({"messages": said("a", "b")}, "no fields chosen and rejected"),
    ({"messages": said("a", "b"), "label": True}, "KTO"),
    ({"prompt": "a", "completion": "b", "label": False}, "KTO"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
    ({"chosen": said("a", "b"), "rejected": said("c", "d")}, "different prompts"),
    ({"chosen": said("a", "b", "c", "d"), "rejected": said("a", "x", "c", "e")}, "different pro"),
    ({"chosen": said("a", "b", "c", "d"), "rejected": said("a", "b")}, "different prompts"),
    ({"chosen": "b", "rejected": "c"}, "answer before any question"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty answer"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty answer"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "answer before any question"),
    ({"prompt": "a", "chosen": None, "rejected": "c"}, "no known fields"),
    ({"prompt": "a", "chosen": 3, "rejected": 4}, "a side is not a text"),
    ({"prompt": 7, "chosen": "b", "rejected": "c"}, "a side is not a text"),
    ({"prompt": "a", "chosen": {"text": "b"}, "rejected": "c"}, "a side is not a text"),
    ({"prompt": said("a", "b"), "chosen": "c", "rejected": "d"}, "two answers in a row"),
    ({"prompt": "a", "chosen": [{"role": "judge", "content": "b"}], "rejected": "c"},
     "unknown role"),
    ({"prompt": "a", "chosen": said("x"), "rejected": "c"}, "two questions in a row|no answer"),
    ({"prompt": "a", "chosen": "b <tool_call>", "rejected": "c"}, "unbalanced marks"),
]


@pytest.mark.parametrize(("record", "says"), BROKEN)
def test_what_is_no_pair_is_refused_by_name(record, says):
    with pytest.raises(Refused, match=says):
        paired(record, PAIRS)


def test_transcripts_and_sides_are_read_as_they_stand():
    from plainllama.text import pairs

    assert pairs.said_in("\n\nHuman: a \n\nAssistant: b\n\nHuman: c\n\nAssistant:") == [
        *said("a", "b", "c"), {"role": "assistant", "content": ""}]
    assert pairs.said_in("\n\nHuman: a\n\nAssistant:", "user") == said("a")
    assert pairs.said_in("\n\nHuman: a\n\nAssistant: b", "user") == said("a", "b")
    for text in ("x\n\nHuman: a", "plain", ""):  # something stands before the first speaker
        assert pairs.said_in(text) == [{"role": "assistant", "content": text}]
        assert pairs.said_in(text, "user") == [{"role": "user", "content": text}]
    assert pairs.said_in(" \n\nHuman: a") == said("a")
    assert pairs.said_in({"from": "x"}) == [{"from": "x"}]
    assert pairs.prompt_of({"instruction": "Add.", "input": "2"}) == said("Add.\n\n2")
    assert pairs.prompt_of({}) == [] == pairs.prompt_of({"prompt": "", "instruction": ""})
    for bad in (3, None, [], [3], ["a"], {"x": 1}):
        with pytest.raises(Refused, match="a side is not a text, a message or a list of messages"):
            pairs.said_in(bad)


def test_what_is_cut_of_both_sides_is_added_up():
    late = {"role": "user", "content": "Thanks."}
    record = {"chosen": [*said("Why?", "So."), late], "rejected": [*said("Why?", "No."), late,
                                                                  late]}
    made, cut = paired(record, PAIRS)
    assert cut == 3 and json.loads(made)["rejected"] == said("", "No.")[1:]
    tools = [{"name": "f", "description": "", "parameters": {}}]
    made, _ = paired({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "tools": tools,
                      "system": "Be."}, PAIRS)
    assert json.loads(made)["messages"][0] == {"role": "system", "content": "Be."}
    assert json.loads(made)["tools"][0]["name"] == "f"
    turns = said("a", "b", "c")  # what was said before is learned of neither side
    made, _ = paired({"chosen": [*turns, *said("", "d")[1:]],
                      "rejected": [*turns, *said("", "e")[1:]]}, PAIRS)
    whole = said("a", "b", "c", "d")
    whole[1]["learn"] = False
    assert json.loads(made)["messages"] == whole


def pair_of(rng, words, size=6):
    """A pair of short random texts with a prompt of one or two turns."""
    prompt = said(*(" ".join(rng.choice(words, 3)) for _ in range(rng.choice([1, 3]))))
    chosen, rejected = (" ".join([*rng.choice(words, rng.integers(1, size)), end])
                        for end in ("yes", "no"))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def many(count, seed=0):
    rng = np.random.default_rng(seed)
    return [pair_of(rng, ["ab", "c", "def", "Grüße", "你好", "x"]) for _ in range(count)]


def test_prepare_writes_two_documents_a_pair_side_by_side(tmp_path, monkeypatch, capsys):
    rows = many(60)
    bad = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "x" * 400,
                                                             "rejected": "b"}]
    (tmp_path / "p.jsonl").write_bytes(jsonl([*rows[:30], *bad, *rows[30:]]))
    folder = inside(tmp_path, monkeypatch, documents="preference", block_size=256,
                    sources="p.jsonl", train_on="last", packing="fit")
    want = []
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt = [message | {"learn": False} for message in row["prompt"]]
            want.append(rendered([*prompt, {"role": "assistant", "content": row[side]}]))
    found = stored(folder)
    as_pairs = lambda flat: sorted(zip(flat[::2], flat[1::2], strict=True))  # noqa: E731
    assert as_pairs(found) == as_pairs(want)
    manifest = shards.read_manifest(folder)
    assert {rule: entry["count"] for rule, entry in manifest["dropped"].items()} == {
        "chosen equals rejected": 1, "longer than block_size 256": 1}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 60
    assert "62 pairs in" in capsys.readouterr().out


def test_a_long_prompt_loses_its_first_turns_for_both_sides(tmp_path, monkeypatch):
    talk = said("first " * 20, "old " * 10, "second", "b", "third")
    row = {"system": "S", "prompt": talk, "chosen": "yes", "rejected": "no"}
    (tmp_path / "p.jsonl").write_bytes(jsonl([row, *many(20)]))
    keys = {"documents": "preference", "block_size": 128, "sources": "p.jsonl",
            "train_on": "last", "packing": "fit"}
    folder = inside(tmp_path, monkeypatch, **keys)
    kept = [{"role": "system", "content": "S"}, *(m | {"learn": False} for m in talk[2:])]
    for answer in ("yes", "no"):
        assert rendered([*kept, {"role": "assistant", "content": answer}]) in stored(folder)
    note = shards.read_manifest(folder)["cut"]["prompts at their beginning, to block_size 128"]
    assert note["count"] >= 1 and "p.jsonl:1" in note["first"]
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy("p.jsonl", other)
    monkeypatch.chdir(other)
    folder = inside(other, monkeypatch, too_long="drop", max_dropped=0.5, **keys)
    assert "longer than block_size 128" in shards.read_manifest(folder)["dropped"]


def test_the_embedded_pairs_are_pairs_and_held_out_ones_are_others():
    made = {split: list(embedded_preference.pairs(split, 300)) for split in ("train", "held_out")}
    for rows in made.values():
        assert all(paired(row, PAIRS) for row in rows)
        longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in rows])
        assert 0.1 < longer < 0.9  # length alone does not tell them apart
    assert not {r["prompt"] for r in made["train"]} & {r["prompt"] for r in made["held_out"]}


def test_the_embedded_pairs_are_the_same_everywhere():
    embedded_preference.write_rows(file := io.BytesIO())
    made = file.getvalue()
    assert made.count(b"\n") == 2000
    assert hashlib.sha256(made).hexdigest()[:16] == "69a22dd00dd37050"
    for split, digest in (("train", "a54275c5c3543da5"), ("held_out", "fbc1f18205b2283c")):
        drawn = json.dumps([*embedded_preference.pairs(split, 300, seed=7)])
        assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == digest


# ---- a batch -> the loss

CONFIG = ModelConfig(n_layer=2, n_head=2, d_model=32, d_ff=64, vocab_size=263, block_size=128)


def model_of(seed=0, scale=4.0):
    model = LLaMA(CONFIG)
    initialise(model, seed, World().piece)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= scale
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """data/pairs, a chat model of the same tokenizer in `base`, and a tiny config."""
    home = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        (home / "p.jsonl").write_bytes(jsonl(many(90)))
        patch.chdir(home)
        folder = inside(home, patch, documents="preference", block_size=128, sources="p.jsonl",
                        train_on="last", packing="fit", val_fraction=0.2)
    folder.rename(home / "data/pairs") if folder.name != "pairs" else None
    from plainllama.weights.huggingface import write_folder

    (home / "base").mkdir()
    write_folder(home / "base", CONFIG, {n: p.data for n, p in model_of().named_parameters()},
                 home / "data/pairs/tokenizer.json")
    (home / "pairs.py").write_text("""
dataset = 'pairs'
init_from = 'base'
block_size = 128
objective = 'dpo'
max_steps = 12
global_batch_tokens = 512
micro_batch = 2
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 2
weight_decay = 0.0
device = 'cpu'
log_interval = 1
eval_interval = 6
save_interval = 6
sample_tokens = 0
""")
    return home


@pytest.fixture
def inside_home(home, monkeypatch, tmp_path):
    """In the folder, with an `out` of its own."""
    shutil.rmtree(home / "out", ignore_errors=True)
    monkeypatch.chdir(home)
    return home


def by_hand(model, documents):
    """Sum of log p over what is learned, and how much that is, of each document alone, in float64
    and by transformers' LLaMA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.block_size, tie_word_embeddings=False)).double()
    theirs.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    out = []
    for ids, mask in documents:
        ids = torch.tensor(ids)
        logp = theirs(ids[None]).logits[0, :-1].log_softmax(-1)
        taken = logp.gather(1, ids[1:, None])[:, 0] * torch.tensor(mask[1:])
        out.append((taken.sum(), sum(mask)))
    return theirs, torch.stack([s for s, _ in out]), torch.tensor([n for _, n in out])


def formula(name, sums, sizes, reference, beta, nll_weight):
    """The papers' formulas, a pair at a time."""
    losses = []
    for i in range(0, len(sums), 2):
        c, r = sums[i], sums[i + 1]
        if name == "dpo":
            ratio = (c - reference[i]) - (r - reference[i + 1])
            losses.append(-torch.log(1 / (1 + torch.exp(-beta * ratio)))
                          - nll_weight * c / sizes[i])
        else:
            pc, pr = torch.exp(c / sizes[i]), torch.exp(r / sizes[i + 1])
            odds = (pc / (1 - pc)) / (pr / (1 - pr))
            losses.append(-torch.log(pc) - beta * torch.log(1 / (1 + 1 / odds)))
    return torch.stack(losses).sum()


@pytest.mark.parametrize(("name", "keys"), [
    ("dpo", {}), ("dpo", {"preference_beta": 0.5, "nll_weight": 0.3}),
    ("orpo", {"preference_beta": 0.4})])
def test_loss_and_gradients_are_the_papers_pair_by_pair(home, name, keys, monkeypatch):
    rows = FitRows(shards.open_split(home / "data/pairs", "train"), 128, 1)
    config = Settings(objective=name, **keys)
    model, draw = model_of(), np.random.default_rng(0)
    windows = range(4)
    reference = draw.normal(-20, 5, rows.split.documents).astype(np.float32)
    numbers = rows.documents_of(windows)
    batch = to_batch(rows.read_windows(windows), 6, BOS, reference[numbers])
    found = OBJECTIVES[name].loss(model, batch, torch.device("cpu"), config)
    found[0].backward()
    bounds = rows.first
    documents = [(rows.split.read(a, b).tolist(), rows.split.read_mask(a, b).astype(int).tolist())
                 for a, b in zip(bounds[numbers], bounds[numbers + 1], strict=True)]
    theirs, sums, sizes = by_hand(model, documents)
    right = formula(name, sums, sizes, torch.tensor(reference[numbers]).double(),
                    config.preference_beta, config.nll_weight)
    right.backward()
    assert found[0].item() == pytest.approx(right.item(), rel=1e-5)
    others = dict(theirs.named_parameters())
    for pname, parameter in model.named_parameters():
        other = others.pop(pname)
        size = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() <= 1e-5 * max(size, 1), pname
    assert not others
    logged = dict(zip(LOGGED, (found[1:] / (len(numbers) // 2)).tolist(), strict=True))
    assert logged["logps/chosen"] == pytest.approx(sums[::2].mean().item(), rel=1e-5)
    assert logged["logps/rejected"] == pytest.approx(sums[1::2].mean().item(), rel=1e-5)
    assert logged["rewards/margins"] == pytest.approx(
        logged["rewards/chosen"] - logged["rewards/rejected"], abs=1e-5)
    # in chunks, as where there are many logits, it is the same
    monkeypatch.setattr("model.LOGITS_BYTES", 4 * 263 * 40)
    again = model_of()
    chunked = OBJECTIVES[name].loss(again, batch, torch.device("cpu"), config)
    chunked[0].backward()
    assert torch.allclose(chunked, found, rtol=1e-5)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-5 * max(1, one.grad.abs().max()))


@pytest.mark.parametrize("x", [0.0, -1e-8, -1e-3, -0.6931, -0.7, -50.0])
def test_log1mexp_and_its_slope_are_finite_and_right(x):
    there = torch.tensor(x, requires_grad=True)
    made = log1mexp(there)
    made.backward()
    assert math.isfinite(made.item()) and math.isfinite(there.grad.item())
    if x < -1e-7:
        right = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
        slope = -1 / math.expm1(-x)
        assert made.item() == pytest.approx(right, rel=1e-5, abs=1e-30)
        assert there.grad.item() == pytest.approx(slope, rel=2e-3, abs=1e-30)


def test_orpo_of_equal_answers_and_of_certain_ones_is_finite():
    """Of identical pairs, and where an answer's probability is 1 to fp32."""
    class Certain(torch.nn.Module):
        def __init__(self, losses):
            super().__init__()
            self.losses = torch.nn.Parameter(losses)

        def forward(self, *_, each):
            return self.losses

    rows = np.full((1, 9), 5) | (1 << 40)
    rows[0, [0, 4]] |= 1 << 41
    rows[0, [2, 3, 6, 7]] &= (1 << 40) - 1
    batch = to_batch(rows, 0, BOS)
    for losses in (torch.zeros(256), torch.full((256,), 1e-9), torch.full((256,), 3.0)):
        model = Certain(losses.clone())
        found = OBJECTIVES["orpo"].loss(model, batch, torch.device("cpu"), Settings())
        found[0].backward()
        assert found.isfinite().all() and model.losses.grad.isfinite().all()


def test_a_batch_without_pairs_counts_nothing():
    batch = to_batch(np.zeros((0, 129), np.int64), 2, BOS)
    for name in ("dpo", "orpo"):
        found = OBJECTIVES[name].loss(model_of(), batch, torch.device("cpu"), Settings())
        found[0].backward()
        assert not found.any()


# ---- the loop

def run(*words):
    return train.main(parse(["pairs.py", *words], "", train.Flags))


def column(folder, name):
    return [row[name] for row in metrics(folder) if name in row]


def test_dpo_begins_at_ln_2_and_learns_what_is_preferred(inside_home, capsys):
    assert run("--max_steps=40", "--out_dir=out/a") == 0
    folder = inside_home / "out/a"
    losses = column(folder, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5
    assert column(folder, "rewards/accuracies")[-1] > 0.8
    assert column(folder, "rewards/margins")[-1] > 0.3
    first = next(row for row in metrics(folder) if "val_loss" in row)
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["val_rewards/accuracies"] == pytest.approx(0.5)
    rows = FitRows(shards.open_split(inside_home / "data/pairs", "train"), 128, 1337)
    out = capsys.readouterr().out
    assert f"{rows.pairs(0, rows.windows)} pairs" in out and "chosen preferred in" in out
    made = read_json(folder / "reference/made_of.json")
    assert set(made["files"]) == {"train.npy", "val.npy"}
    reference = np.load(folder / "reference/train.npy")
    documents = rows.documents_of(range(2))
    stored_ids = [(rows.split.read(a, b).tolist(),
                   rows.split.read_mask(a, b).astype(int).tolist())
                  for a, b in zip(rows.first[documents], rows.first[documents + 1], strict=True)]
    _, sums, _ = by_hand(load_model(inside_home / "base"), stored_ids)
    assert np.allclose(reference[documents], sums.detach().numpy(), rtol=1e-5)


def test_dpo_killed_and_resumed_is_equal_to_the_bit(inside_home):
    assert run("--out_dir=out/whole") == 0
    assert run("--out_dir=out/half", "--max_minutes=0", "--max_steps=12") == 0
    shutil.rmtree(inside_home / "out/half/checkpoints/step_12")
    assert run("--out_dir=out/half") == 0
    one, two = (load_file(inside_home / f"out/{name}/checkpoints/step_12/model.safetensors")
                for name in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    # the reference is of step 0 and cannot be made later
    shutil.rmtree(inside_home / "out/half/checkpoints/step_12")
    (inside_home / "out/half/reference/val.npy").unlink()
    with pytest.raises(UserError, match="what the model of step 0 thought"):
        run("--out_dir=out/half")


def test_an_interrupted_reference_goes_on_with_what_is_missing(inside_home, monkeypatch):
    from plainllama.training import reference

    monkeypatch.setattr(reference, "CHUNK", 4)
    real, calls = reference.think, []

    def counted(*words):
        calls.append(words[2])
        if len(calls) == 4:
            raise OSError("a full disk")
        return real(*words)

    monkeypatch.setattr(reference, "think", counted)
    with pytest.raises(OSError):
        run("--out_dir=out/r")
    parts = {path.name for path in (inside_home / "out/r/reference/parts").glob("*.npy")}
    assert len(parts) == 3
    assert run("--out_dir=out/r") == 0
    windows = FitRows(shards.open_split(inside_home / "data/pairs", "train"), 128, 1).windows
    val = FitRows(shards.open_split(inside_home / "data/pairs", "val"), 128, 1).windows
    assert len(calls) == math.ceil(windows / 4) + math.ceil(val / 4) + 1
    assert column(inside_home / "out/r", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_two_ranks_are_one(inside_home):
    for objective in ("dpo", "orpo"):
        words = ["train.py", "pairs.py", f"--objective={objective}"]
        words.append("--max_steps=6")
        assert run(*words[2:], f"--out_dir=out/{objective}1") == 0
        for mode in ("ddp", "fsdp"):
            folder = inside_home / f"out/{objective}-{mode}"
            done = run_script(*words, f"--out_dir={folder}", f"--parallel={mode}",
                              cwd=inside_home, processes=2)
            assert done.returncode == 0, done.stderr
            for name in ("loss", "rewards/margins", "val_loss"):
                assert np.allclose(column(folder, name), column(
                    inside_home / f"out/{objective}1", name), rtol=2e-4, atol=1e-6), (mode, name)


def test_eval_scores_pairs_by_the_run_and_by_the_model_alone(inside_home, capsys):
    assert run("--out_dir=out/a", "--objective=dpo") == 0
    capsys.readouterr()
    words = ["--tasks=", "--device=cpu", "--json"]
    scores = {}
    for ckpt in ("out/a", "base"):
        data = [] if ckpt == "out/a" else ["--data=pairs"]
        assert evaluation.main(parse([f"--ckpt={ckpt}", *data, *words], "", evaluation.Flags,
                                     "files")) == 0
        scores[ckpt] = json.loads(capsys.readouterr().out.splitlines()[-1])
    tuned, alone = scores["out/a"], scores["base"]
    val = shards.open_split(inside_home / "data/pairs", "val")
    bounds = val.bounds()
    documents = [(val.read(a, b).tolist(), val.read_mask(a, b).astype(int).tolist())
                 for a, b in pairwise(bounds)]
    sizes = val.learned_counts()
    _, base, _ = by_hand(load_model(inside_home / "base"), documents)
    _, now, _ = by_hand(load_model(inside_home / "out/a/checkpoints/step_12"), documents)
    rewards = 0.1 * (now - base)
    assert tuned["rewards/accuracies"] == pytest.approx(
        (rewards[::2] > rewards[1::2]).double().mean().item())
    assert tuned["rewards/margins"] == pytest.approx(
        (rewards[::2] - rewards[1::2]).mean().item(), rel=1e-4)
    assert alone["logps/accuracies"] == pytest.approx(
        (base[::2] > base[1::2]).double().mean().item())
    shorter = np.mean((np.sign(sizes[1::2] - sizes[::2]) + 1) / 2)
    assert tuned["shorter"] == alone["shorter"] == pytest.approx(shorter)
    kept = read_json(inside_home / "out/a/eval/step_12.json")
    assert kept["rewards/accuracies"] == tuned["rewards/accuracies"]
    assert column(inside_home / "out/a", "val_loss")[-1] == pytest.approx(kept["val_loss"])


def test_a_tuned_adapter_is_its_own_reference(inside_home):
    """Adapters off would be the base, which is not what is tuned (step 0 must be ln 2)."""
    assert run("--lora_r=4", "--out_dir=out/first", "--learning_rate=1e-2") == 0
    assert run("--lora_r=4", "--init_from=out/first", "--out_dir=out/second") == 0
    assert column(inside_home / "out/second", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    first, second = (np.load(inside_home / f"out/{name}/reference/train.npy")
                     for name in ("first", "second"))
    assert np.nanmax(abs(first - second)) > 0.1


def test_a_start_off_ln_2_ends_the_run(inside_home, monkeypatch):
    from plainllama.training import reference

    real = reference.known
    monkeypatch.setattr(reference, "known", lambda *words: real(*words) * 1.001)
    with pytest.raises(UserError, match=r"of dpo is 0.\d+, not 0.6931472: the model"):
        run("--out_dir=out/off")


def test_an_objective_is_its_entry(inside_home, monkeypatch, capsys):
    """One that compares with a reference is trained and scored by what its entry says: it wants a
    model to begin with, has a reference computed and no other first loss asked of it."""
    def squared(model, batch, device, config):  # https://arxiv.org/abs/2310.12036, equation 17
        logps, _, before = log_probabilities(model, batch, device)
        gained = logps - before
        loss = (gained[::2] - gained[1::2] - 1 / (2 * config.preference_beta)) ** 2
        return sums_of(loss, loss, config.preference_beta * gained, logps)

    monkeypatch.setitem(OBJECTIVES, "orpo", replace(OBJECTIVES["dpo"], loss=squared, first=None))
    with pytest.raises(UserError, match="objective=orpo compares with the model that it begins"):
        run("--objective=orpo", "--init_from=")
    assert run("--objective=orpo", "--max_steps=2", "--out_dir=out/o") == 0
    assert column(inside_home / "out/o", "loss")[0] == pytest.approx(25)  # (1 / 0.2)^2
    flags = parse(["--ckpt=out/o", "--tasks="], "", evaluation.Flags, "model")
    assert evaluation.main(flags) == 0
    assert "rewards/accuracies" in capsys.readouterr().out


def test_falling_chosen_answers_are_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(jsonl([{"step": 0, "val_logps/chosen": -50.0}]))
    assert remark_on_chosen(tmp_path, {"val_logps/chosen": -59.0}) == ""
    assert "has fallen by 22% (from -50.0 to -61.0)" in remark_on_chosen(
        tmp_path, {"val_logps/chosen": -61.0})
    assert remark_on_chosen(tmp_path, {"val_bpb": 1.0}) == ""


@pytest.mark.parametrize(("words", "says"), [
    (["--objective=next", "--init_from=base"], "say --objective=dpo or orpo"),
    (["--init_from="], "say\n?.*--init_from=MODEL"),
    (["--lora_r=4", "--lora_dropout=0.1"], "two draws"),
    (["--objective=orpo", "--nll_weight=1"], "nll_weight=1.0 is for objective=dpo"),
    (["--preference_beta=0"], "preference_beta"),
    (["--packing=concat"], "packing=concat is for text"),
    (["--block_size=64"], "block_size"),
    (["--objective=kto"], "objective"),
])
def test_bad_input_of_training(inside_home, words, says):
    with pytest.raises(UserError, match=says):
        run("--out_dir=out/bad", *words)
    assert not (inside_home / "out/bad").exists()


@pytest.mark.parametrize(("keys", "says"), [
    ({"preference_beta": 0.2}, "no effect on objective=next"),
    ({"objective": "dpo", "mixture": {"a": 1.0, "b": 1.0}}, "a mixture is for objective=next"),
    ({"documents": "preference", "min_chars": 5}, "no effect on documents=preference"),
])
def test_keys_that_do_not_fit(keys, says):
    with pytest.raises(UserError, match=says):
        check_keys(Settings(**keys))


def test_dialogs_and_text_are_not_for_dpo(home, monkeypatch, tmp_path):
    from conftest import write_data_set

    write_data_set(tmp_path / "data/plain", {"train": ["word " * 200], "val": ["word " * 100]})
    (tmp_path / "x.py").write_text("dataset = 'plain'\nobjective = 'dpo'\nblock_size = 32\n"
                                   "global_batch_tokens = 64\ndevice = 'cpu'\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="dpo and orpo want a set of documents=preference"):
        train.main(parse(["x.py"], "", train.Flags))


assert END == 262 and ROLES  # as rendered() has them


# ---- what a review found

def test_all_pairs_of_a_prompt_are_held_out_together(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    rows = [{"prompt": f"question {i}?", "chosen": f"{rng.integers(1e9)} yes",
             "rejected": f"{rng.integers(1e9)} no"} for i in range(40) for _ in range(4)]
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    folder = inside(tmp_path, monkeypatch, documents="preference", block_size=256,
                    sources="p.jsonl", train_on="last", packing="fit", val_fraction=0.2)
    prompts = {}
    for split in ("train", "val"):
        there = shards.open_split(folder, split)
        bounds = there.bounds()
        prompts[split] = {bytes(i for i in there.read(a, b).tolist() if i < 256).split(b"?")[0]
                          for a, b in pairwise(bounds)}
    assert prompts["val"] and not prompts["train"] & prompts["val"]


def test_a_pair_that_is_longer_than_a_row_is_refused(inside_home):
    with pytest.raises(UserError, match="more than block_size 64 has room for"):
        FitRows(shards.open_split(inside_home / "data/pairs", "train"), 64, 1)


def test_another_reference_is_not_taken(inside_home):
    """A run that was stopped before its first checkpoint may begin again with other settings."""
    assert run("--out_dir=out/o", "--overfit_rows=2", "--max_steps=1") == 0
    shutil.rmtree(inside_home / "out/o/checkpoints")
    assert run("--out_dir=out/o", "--max_steps=3") == 0
    assert all(map(math.isfinite, column(inside_home / "out/o", "loss")))


def test_a_model_that_is_broken_is_no_reference(inside_home, monkeypatch):
    from plainllama.training import reference

    real = reference.think
    monkeypatch.setattr(reference, "think", lambda *words: real(*words) * [[1], [math.nan]])
    with pytest.raises(UserError, match="not finite; take another"):
        run("--out_dir=out/n")


@pytest.mark.parametrize("text", ["[1, 2, 3]", '["a"]', "[]", "[x]"])
def test_an_answer_may_begin_with_a_bracket(text):
    made = json.loads(paired({"prompt": "List.", "chosen": text, "rejected": "no"}, PAIRS)[0])
    assert made["messages"][1]["content"] == text


def test_prompts_and_sides_in_unlike_spellings():
    asked = [{"from": "system", "value": "S"}, {"from": "human", "value": "Why? "}]
    whole = [{"role": "system", "content": "S"}, {"role": "user", "content": "Why? ", "id": 3}]
    record = {"prompt": json.dumps(asked),
              **{name: [*whole, {"role": "assistant", "content": text}]
                 for name, text in (("chosen", "So."), ("rejected", "No."))}}
    made = json.loads(paired(record, PAIRS)[0])
    assert [message["content"] for message in made["messages"]] == ["S", "Why? ", "So."]


# ---- the parts, one by one

def test_what_an_objective_is():
    entry = OBJECTIVES["next"]
    assert (entry.logged, entry.reference, entry.first) == ((), False, None)
    assert (OBJECTIVES["dpo"].reference, OBJECTIVES["dpo"].first) == (True, math.log(2))
    assert (OBJECTIVES["orpo"].reference, OBJECTIVES["orpo"].first) == (False, None)
    assert OBJECTIVES["dpo"].logged == OBJECTIVES["orpo"].logged == LOGGED
    with pytest.raises(AttributeError):
        entry.reference = True
    rows = types.SimpleNamespace(targets=lambda first, n: ("targets", first, n),
                                 pairs=lambda first, n: ("pairs", first, n))
    assert [OBJECTIVES[name].count(rows, 3, 4) for name in ("next", "dpo", "orpo")] == [
        ("targets", 3, 4), ("pairs", 3, 4), ("pairs", 3, 4)]
    assert objectives.CLOSEST == -1e-7
    summed = OBJECTIVES["next"].loss(lambda *given: torch.tensor(float(len(given))),
                                     to_batch(np.zeros((1, 5), np.int64)), torch.device("cpu"),
                                     Settings())
    assert summed.shape == (1,) and summed.item() == len(to_batch(
        np.zeros((1, 5), np.int64)).to(torch.device("cpu")))


def test_log_probabilities_of_documents_by_hand():
    """Of two rows of which the first has three documents; one learns nothing, and what fills up
    belongs to none."""
    flags, begins = 1 << 40, 1 << 41
    rows = np.full((2, 9), 5)
    rows[:, 0] |= flags | begins
    rows[0, 3] |= flags | begins
    rows[0, 6] |= flags | begins
    rows[0, 7:] |= flags  # the third document learns nothing
    losses = torch.arange(1.0, 257.0)
    beside = np.array([10.0, 20.0, 30.0, 40.0])
    for known in (None, beside):
        batch = to_batch(rows, 0, BOS, known)
        asked = []
        found = log_probabilities(lambda *given, each, asked=asked: asked.append(each) or losses,
                                  batch, torch.device("cpu"))
        assert asked == [True] and found[0].dtype == found[2].dtype == torch.float64
        learned = [2, 2, 0, 8]
        ends = np.cumsum(learned)
        sums = [-sum(range(end - n + 1, end + 1)) for n, end in zip(learned, ends, strict=True)]
        assert found[1].tolist() == learned and found[0].tolist() == sums
        assert found[2].tolist() == ([0.0] * 4 if known is None else beside.tolist())


def test_sums_over_pairs_by_hand():
    """A tie is half an accuracy."""
    losses, preference = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 1.0])
    rewards = torch.tensor([3.0, 1.0, 2.0, 2.0, -1.0, 4.0], requires_grad=True)
    logps = torch.tensor([-5.0, -1.0, -2.0, -3.0, -4.0, -4.0])
    found = sums_of(losses, preference, rewards, logps)
    assert found.tolist() == [7.0, 1.75, 4.0, 7.0, -3.0, 1.5, -11.0, -8.0, 1.5]
    assert not found.requires_grad and len(found) == 1 + len(LOGGED)


@pytest.mark.parametrize(("name", "weight"), [("dpo", 0.0), ("dpo", 0.5), ("orpo", 0.0)])
def test_losses_of_two_pairs_by_hand(monkeypatch, name, weight):
    logps = torch.tensor([-4.0, -6.0, -1.0, -9.0]).double()
    sizes, known = torch.tensor([2, 3, 4, 5]), torch.tensor([-5.0, -5.0, -2.0, -6.0]).double()
    monkeypatch.setattr(objectives, "log_probabilities", lambda *_: (logps, sizes, known))
    config = Settings(preference_beta=0.25, nll_weight=weight)
    found = OBJECTIVES[name].loss(None, None, None, config).tolist()
    assert found[0] == pytest.approx(formula(name, logps, sizes, known, 0.25, weight).item())
    plain = formula(name, logps, sizes, known, 0.25, 0.0).item()
    if name == "dpo":
        rewards = (0.25 * (logps - known)).tolist()
    else:
        means = (logps / sizes).tolist()
        rewards = [0.25 * mean for mean in means]
        plain += means[0] + means[2]
    assert found[1] == pytest.approx(plain)
    assert found[2:5] == pytest.approx([
        rewards[0] + rewards[2], rewards[1] + rewards[3],
        rewards[0] + rewards[2] - rewards[1] - rewards[3]])
    right = 2.0 if name == "dpo" else 1.5  # by the mean of a token the first pair is a tie
    assert found[5:] == pytest.approx([right, -5.0, -15.0, 2.0])


def test_log1mexp_is_exact_on_both_sides():
    for x in (-1e-6, -0.01, -0.5, -0.692, -0.693, -0.694, -1.0, -1.5, -1.69, -5.0, -30.0):
        right = math.log(-math.expm1(x)) if x > -0.5 else math.log1p(-math.exp(x))
        assert log1mexp(torch.tensor(x)).item() == pytest.approx(right, rel=2e-6)
    assert log1mexp(torch.tensor(0.0)) == log1mexp(torch.tensor(-1e-7)) < -16


class Told:
    """FitRows of a split: window n holds the documents 2n and 2n + 1."""

    def __init__(self, windows: int):
        self.windows, self.split = windows, types.SimpleNamespace(documents=2 * windows + 1)

    def documents_of(self, windows):
        return np.array([d for n in windows for d in (2 * n, 2 * n + 1)], np.int64)

    def read_windows(self, windows):
        return list(windows)


@pytest.fixture
def thinker(monkeypatch):
    """An engine of which `thought` says what it computed; a document's log-probability is -number -
    1."""
    config = Settings(init_from="base", objective="dpo", block_size=128)
    at = types.SimpleNamespace(config=config, world=World(), dtype=torch.float32, micro=2, bos_id=1,
                               module="module", thought=[], model=torch.nn.Module(), sha="sha")
    monkeypatch.setattr(reference.peft, "model_sha256", lambda source: f"{at.sha} of {source}")

    def think(module, batch, device):
        windows, n, _ = batch
        assert n == 2 and not at.model.training
        at.thought.append(list(windows))
        return torch.tensor([-float(d) - 1 for w in windows for d in (2 * w, 2 * w + 1)]), None

    monkeypatch.setattr(reference, "to_batch", lambda rows, n, bos: (rows, n, bos))
    monkeypatch.setattr(reference, "log_probabilities", think)
    monkeypatch.setattr(reference, "CHUNK", 4)
    return at


def start_at(step: int, source=None):
    return resume.Start(source, {"step": step} if step else {})


def test_a_reference_is_computed_once_and_kept(thinker, tmp_path):
    splits = Told(9), Told(2)

    def asked(step=0, data="data", source=None):
        thinker.thought.clear()
        return reference.of_run(tmp_path, thinker, *splits, data, start_at(step, source))

    found = asked()
    assert thinker.thought == [[0, 1], [2, 3], [4, 5], [6, 7], [8], [0, 1]]
    for name, windows in (("train", 9), ("val", 2)):
        assert found[name].tolist()[:-1] == [-d - 1.0 for d in range(2 * windows)]
        assert math.isnan(found[name][-1]) and found[name].dtype == np.float64
    folder = tmp_path / "reference"
    made = read_json(folder / "made_of.json")
    assert made == {"format": 1, "files": {
        f"{name}.npy": file_entry(folder / f"{name}.npy") for name in ("train", "val")},
        "made_of": made["made_of"]}
    assert made["made_of"] | {"data": "data", "block_size": 128, "model": "sha of base",
                              "dtype": "float32", "seed": 1337} == made["made_of"]
    assert {"objective", "n_layer", "init_from"} < made["made_of"].keys()
    assert not (folder / "parts").exists()
    for step in (0, 5):  # at rest, at a new start of the same, and when it goes on
        again = asked(step)
        assert not thinker.thought and np.array_equal(again["val"], found["val"], equal_nan=True)
    asked(source=Path("other"))
    assert len(thinker.thought) >= 6  # another model
    asked(source=Path("other"))
    assert not thinker.thought
    thinker.sha = "new"
    asked()
    assert len(thinker.thought) >= 6
    (folder / "val.npy").write_bytes(b"torn")
    asked()
    assert len(thinker.thought) >= 6
    (folder / "made_of.json").unlink()
    asked()
    assert len(thinker.thought) >= 6
    says = (f"{folder} is missing, damaged or of another set: it holds what the model of step 0 "
            "thought, which is gone; copy it too, or take another out_dir")
    with pytest.raises(UserError) as seen:
        asked(5, data="other")
    assert str(seen.value) == says
    (folder / "train.npy").unlink()
    with pytest.raises(UserError) as seen:
        asked(5)
    assert str(seen.value) == says


def test_parts_of_a_reference_are_of_one_model(thinker, tmp_path):
    """What another start has left is taken if it was of the same, else thrown away."""
    splits, parts = (Told(9), Told(2)), tmp_path / "reference/parts"
    real = thinker.world.decide

    def broken(call):
        if "finish" in getattr(call, "__code__", call).co_names:
            raise OSError("full")
        return real(call)

    thinker.world.decide = broken
    for sha, thoughts in (("a", 6), ("a", 0), ("b", 6)):
        thinker.sha = sha
        thinker.thought.clear()
        with pytest.raises(OSError, match="full"):
            reference.of_run(tmp_path, thinker, *splits, "data", start_at(0))
        assert len([one for one in thinker.thought if one]) == thoughts
        assert sorted(path.name for path in parts.glob("*.npy")) == [
            "train-00000.npy", "train-00001.npy", "train-00002.npy", "val-00000.npy"]
        assert read_json(parts / "made_of.json")["model"] == f"{sha} of base"
    numbers, logps = np.load(parts / "train-00002.npy")
    assert numbers.tolist() == [16, 17] and logps.tolist() == [-17, -18]


def test_each_rank_thinks_of_its_windows(thinker, tmp_path, capsys):
    """As many passes as the others: some of them of nothing."""
    for most, windows, passes in ((4, range(10, 14), 2), (5, range(10, 14), 3), (1, range(0), 1)):
        thinker.thought.clear()
        found = reference.think(thinker, Told(20), windows, most)
        assert len(thinker.thought) == passes and thinker.model.training
        assert found.shape == (2, 2 * len(windows)) and found.dtype == np.float64
        assert found[0].tolist() == Told(20).documents_of(windows).tolist()
    gathered = []
    (tmp_path / "parts").mkdir()
    for rank in (0, 1):
        thinker.world = World(rank, 2)
        thinker.world.gather = lambda made: gathered.append(made[0].tolist()) or [made]
        thinker.world.decide = lambda call: call()
        reference.compute(tmp_path, f"s{rank}", thinker, Told(5))
    assert gathered == [[0, 1, 4, 5], [8, 9], [2, 3, 6, 7], []]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "s0-00000.npy", "s0-00001.npy"]


def test_what_is_known_and_stored(tmp_path, monkeypatch):
    stored = np.arange(10.0)
    rows = FitRows.__new__(FitRows)
    monkeypatch.setattr(FitRows, "documents_of", lambda rows, windows: np.array(windows) * 2)
    assert reference.known(stored, rows, [1, 3]).tolist() == [2.0, 6.0]
    assert reference.known(None, rows, [1]) is None
    assert reference.known(stored, object(), [1]) is None
    folder = tmp_path / "reference"
    assert reference.stored(tmp_path, "val", "data", torch.float32) is None
    folder.mkdir()
    np.save(folder / "val.npy", stored)
    write_json(folder / "made_of.json", {"made_of": {"data": "data", "dtype": "float32"}})
    for split, data, dtype, there in (
            ("val", "data", torch.float32, True), ("train", "data", torch.float32, False),
            ("val", "other", torch.float32, False), ("val", "data", torch.bfloat16, False)):
        found = reference.stored(tmp_path, split, data, dtype)
        assert np.array_equal(found, stored) if there else found is None
    (folder / "made_of.json").write_text("{")
    assert reference.stored(tmp_path, "val", "data", torch.float32) is None
    assert reference.CHUNK == 64


def test_how_far_a_first_loss_may_be_off():
    """1e-6, and as much more as log-probabilities of that size are rounded; in few bits 0.02."""
    ln2 = math.log(2)
    for dtype, beta, size, off, fits in (
            (torch.float32, 0.1, 0.0, 9e-7, True), (torch.float32, 0.1, 0.0, 1.1e-6, False),
            (torch.float32, 0.5, 100.0, 5.9e-6, True), (torch.float32, 0.5, 100.0, 6.1e-6, False),
            (torch.float32, 2.0, 100.0, 2.09e-5, True), (torch.float32, 2.0, 100.0, 2.2e-5, False),
            (torch.bfloat16, 0.1, 0.0, 0.0199, True), (torch.bfloat16, 0.1, 0.0, 0.0201, False),
            (torch.float16, 0.1, 9e9, 0.0201, False), (torch.float32, 0.1, 0.0, math.nan, False)):
        for sign in (1, -1):
            logged = {"preference_loss": ln2 + sign * off, "logps/chosen": -0.75 * size,
                      "logps/rejected": -0.25 * size}
            config = Settings(objective="dpo", preference_beta=beta)
            if fits:
                reference.refuse_other_start(logged, config, dtype)
                continue
            with pytest.raises(UserError) as seen:
                reference.refuse_other_start(logged, config, dtype)
            assert str(seen.value) == (
                f"the first loss of dpo is {ln2 + sign * off:.7f}, not 0.6931472: the model is not "
                "its own reference; remove the run's reference/ and start again")
            reference.refuse_other_start(logged, replace(config, objective="orpo"), dtype)


def test_parts_are_joined_when_they_are_whole(tmp_path):
    """A document that no row shows has none; one that lacks is no reference."""
    (tmp_path / "parts").mkdir()
    rows = Told(2)
    np.save(tmp_path / "parts/val-00000.npy", np.array([[0.0, 1.0], [-1.0, -2.0]]))
    np.save(tmp_path / "parts/valid-00000.npy", np.array([[0.0], [-99.0]]))
    with pytest.raises(UserError, match=r"^the model of init_from gives log-probabilities"):
        reference.finish(tmp_path, {"val": rows}, {"of": 1})
    np.save(tmp_path / "parts/val-00001.npy", np.array([[2.0, 3.0], [-3.0, -4.0]]))
    reference.finish(tmp_path, {"val": rows}, {"of": 1})
    values = np.load(tmp_path / "val.npy")
    assert values[:4].tolist() == [-1, -2, -3, -4] and math.isnan(values[4])
    assert read_json(tmp_path / "made_of.json") == {
        "format": 1, "made_of": {"of": 1}, "files": {"val.npy": file_entry(tmp_path / "val.npy")}}
    assert not (tmp_path / "parts").exists()
