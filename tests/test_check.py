"""train.py --check catches a sabotaged program; --replay shows what a step was trained on."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OFFLOAD, documents, metrics, run_script, write_data_set

import model
import prepare
import train
from model import causal
from plainllama import settings
from plainllama.command import parse
from plainllama.files import file_entry
from plainllama.tokens import shards, tokenizer
from plainllama.tokens.rows import Rows
from plainllama.tokens.tokenizer_json import sha256_of
from plainllama.training import optim, preflight
from plainllama.weights import adapters


def check(*words: str) -> int:
    return train.main(parse(["toy.py", "--check", *words], "", train.Flags))


def leaky_mask(monkeypatch):
    """Each token sees the next one too."""
    def leaky(q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    monkeypatch.setattr(model, "causal", leaky)


def no_mask(monkeypatch):
    monkeypatch.setattr(model, "causal", lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, enable_gqa=True))


def frozen_layer(monkeypatch):
    real = model.LLaMA.__init__

    def init(self, config):
        real(self, config)
        self.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    monkeypatch.setattr(model.LLaMA, "__init__", init)


def forgotten_layer(monkeypatch):
    """It has gradients, and the optimizer does nothing with them."""
    real = optim.step

    def step(optimizer, *rest):
        adamw = optimizer.adamw
        adamw.param_groups[0]["params"][3].grad = None
        return real(optimizer, *rest)
    monkeypatch.setattr(optim, "step", step)


def rope_by_neighbours(monkeypatch):
    """Pairs of channels 2i, 2i+1, as in Meta's code, where Hugging Face's are i, i + D/2."""
    def rotate(x, cos, sin):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
        return x * cos + turned * sin
    monkeypatch.setattr(model, "rotate", rotate)


def rope_with_another_base(monkeypatch):
    real = model.rope_frequencies
    monkeypatch.setattr(model, "rope_frequencies", lambda c: real(c) * 1.05)


def no_rope(monkeypatch):
    monkeypatch.setattr(model, "rotate", lambda x, *_: x)


def wrong_heads(monkeypatch):
    """Query head h uses key head h mod K."""
    real = causal
    monkeypatch.setattr(model, "causal", lambda q, k, v: real(
        q, *(x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))))


def zero_head(monkeypatch):
    first = adapters.initial_weight
    monkeypatch.setattr(adapters, "initial_weight", lambda name, *rest: first(name, *rest) * (
        name != "lm_head.weight"))


def wide_head(monkeypatch):
    first = adapters.initial_weight
    monkeypatch.setattr(adapters, "initial_weight", lambda name, *rest: first(name, *rest) * (
        40 if name == "lm_head.weight" else 1))


def no_learning(monkeypatch):
    monkeypatch.setattr(optim, "step", lambda optimizer, rate, *rest: torch.zeros(()))


def lossy_checkpoint(monkeypatch):
    from plainllama.weights import checkpoint

    real = checkpoint.gather_weights
    monkeypatch.setattr(checkpoint, "gather_weights", lambda m, w: {
        name: value.bfloat16().float() for name, value in real(m, w).items()})


def full_disk(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))


@pytest.mark.parametrize(("sabotage", "caught"), [
    (leaky_mask, "No token sees its future: another token at 1 changes what is predicted at 0"),
    (no_mask, "No token sees its future"),
    (frozen_layer, "Every parameter has a gradient .* none reaches 1 of 21: "
                   "model.layers.1.mlp.up_proj.weight"),
    (forgotten_layer, "Every parameter has a gradient and moves: an update leaves 1 "),
    (rope_by_neighbours, "RoPE, attention and the rest equal the formulas in float64: logits are"),
    (rope_with_another_base, "RoPE, attention"),
    (no_rope, "RoPE, attention"),
    (wrong_heads, "RoPE, attention"),
    (zero_head, "Every parameter has a gradient and moves: none reaches 20 of 21"),
    (wide_head, "First weights have a loss of ln V"),
    (no_learning, "One row is learned by heart"),
    (lossy_checkpoint, "comes back equal: what was read is not what was written"),
    (full_disk, "A checkpoint fits on the disk"),
])
def test_sabotage_is_caught(home, monkeypatch, capsys, sabotage, caught):
    sabotage(monkeypatch)
    monkeypatch.setattr(preflight, "forecast", lambda *_: None)  # not what is tested
    assert check() == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any(re.search(caught, line) for line in failures), failures
    assert not (home / "out").exists()


def test_a_wrong_tokenizer_is_caught(home, monkeypatch, capsys):
    """Manifest, hash and number of entries fit; the ids were made by another one."""
    (home / "data").unlink()
    data, texts = home / "data/toy", documents(60)
    one, other = (tokenizer.make_tokenizer("bpe:270", lambda t=t: t) for t in (texts, [
        text[::-1] for text in texts]))
    monkeypatch.setattr(tokenizer, "make_tokenizer", lambda _: one)
    write_data_set(data, {"train": texts, "val": documents(9)[5:]})
    other.save(data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"] |= {"vocab_size": one.vocab_size, "sha256": one.sha256}
    assert one.vocab_size == other.vocab_size
    manifest["files"]["tokenizer.json"] = file_entry(data / "tokenizer.json")
    for right_hash, found in ((False, "tokenizer.json is not the one that the manifest names"),
                              (True, "30 of 30 documents, decoded and encoded again, have other")):
        if right_hash:
            manifest["tokenizer"]["sha256"] = sha256_of(data / "tokenizer.json")
        shards.write_manifest(data, manifest)
        assert check() == 1
        out = capsys.readouterr().out
        assert f"FAIL  Data set and tokenizer agree: {found}" in out
        assert ("have other ids, the first: '" in out) == right_hash


def test_no_check_is_ok_that_looked_at_nothing(home, monkeypatch, capsys):
    """A data set of one long document, one without any, a context of one token, weights that do not
    fit: each was looked at, or is no ok."""
    monkeypatch.setattr(preflight, "forecast", lambda *_: None)
    (home / "data").unlink()
    write_data_set(home / "data/toy", {"train": ["a long one. " * 2000], "val": ["b " * 50]}, 1)
    assert check() == 0 and "agree: 0 of 1 documents" in capsys.readouterr().out
    assert check("--block_size=1") == 1
    assert "FAIL  No token sees its future: in a context of one" in capsys.readouterr().out
    with pytest.raises(settings.UserError, match="no folder gone"):
        check("--init_from=gone")
    monkeypatch.setattr(preflight, "stored_documents", lambda _: iter(()))
    assert check() == 1 and "agree: the first token file holds no doc" in capsys.readouterr().out


def test_a_deterministic_run_is_forecast_by_whole_steps(home, one_thread, capsys):
    assert check("--deterministic") == 0
    assert "all of it holds" in capsys.readouterr().out


def test_what_is_sound_passes_and_is_forecast(home, capsys):
    assert check("--price=3", "--max_steps=1000000", "--rope_scaling=llama3", "--rope_factor=4",
                 "--rope_original=16", "--tie_embeddings", "--doc_mask", "--optimizer=muon") == 0
    out = capsys.readouterr().out
    assert out.count("ok    ") == 8 and "FAIL" not in out and "all of it holds" in out
    assert "MFU n/a" in out and "run          1,000,000 steps, 256,000,000 tokens" in out
    assert float(out.split("cost")[1].split()[0].replace(",", "")) > 0
    assert not (home / "out").exists() and not list(home.glob("plainllama-check*"))


def test_check_on_two_ranks_that_share_the_model(home):
    done = run_script("train.py", "toy.py", "--check", "--parallel=fsdp", cwd=home, processes=2)
    assert done.returncode == 0 and done.stdout.count("ok    ") == 8, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout


def test_check_with_offload(home):
    done = run_script("train.py", "toy.py", "--check", "--parallel=fsdp", "--offload", cwd=home,
                      processes=2, code=OFFLOAD)
    assert done.returncode == 0 and done.stdout.count("ok    ") == 8, done.stdout + done.stderr
    assert "all but activations in host memory" in done.stdout


def test_replay_shows_the_rows_of_any_step(home, capsys):
    assert train.main(parse(["toy.py", "--max_steps=4"], "", train.Flags)) == 0
    assert train.main(parse(["toy.py", "--max_steps=7", "--global_batch_tokens=64",
                                      "--extend"], "", train.Flags)) == 0
    capsys.readouterr()
    manifest = shards.read_manifest(home / "data/toy")
    rows = Rows(shards.Split(home / "data/toy", "train", manifest), 32, 1337)
    words = tokenizer.Tokenizer.load(home / "data/toy")
    for step, first, n in ((1, 0, 8), (4, 24, 8), (5, 32, 2), (7, 36, 2)):
        assert train.main(parse(["toy.py", f"--replay={step}",
                                          "--global_batch_tokens=64"], "", train.Flags)) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"step {step}: rows {first} to {first + n - 1}\n")
        for row, ids in enumerate(rows.rows(first, n), first):
            assert f"--- row {row}: " in out and words.decode(ids) in out
    assert metrics(home / "out/toy")[-1]["step"] == 7
    assert np.array_equal(rows.rows(36, 2), rows.read_windows(rows.window_of(36, 2)))
    with pytest.raises(settings.UserError, match="seed=1337, now it is 1"):
        train.main(parse(["toy.py", "--replay=1", "--seed=1"], "", train.Flags))


def test_a_sound_set_of_dialogs_passes(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f" {i} {'is it? ' * (i % 9)}", "response": f"yes <|end|> {i}"}
            for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.py").write_text(
        "dataset = 'd'\ndocuments = 'chat'\nsources = 'rows.jsonl'\ntokenizer = 'bytes'\n"
        "n_layer = 2\nn_head = 2\nd_model = 32\nd_ff = 64\nblock_size = 64\ndevice = 'cpu'\n"
        "global_batch_tokens = 256\nmicro_batch = 2\n")
    monkeypatch.chdir(tmp_path)
    assert prepare.main(parse(["toy.py"], "", prepare.Flags)) == 0
    assert check() == 0
    out = capsys.readouterr().out
    assert "agree: 0 of 32 documents" in out and "all of it holds" in out
    assert train.main(parse(["toy.py", "--replay=2", "--overfit_rows=1"], "", train.Flags)) == 0
    assert "<|end|><|assistant|>[[yes <|end|> " in capsys.readouterr().out
    words = tokenizer.Tokenizer.load(tmp_path / "data/d")
    monkeypatch.setattr(tokenizer.Tokenizer, "load", lambda _: words)
    monkeypatch.setattr(words, "encode_behind", lambda text: words.encode(text.upper()))
    assert check() == 1 and "agree: 32 of 32 documents" in capsys.readouterr().out


@pytest.mark.parametrize("kind", model.ROPE_SCALINGS)
def test_the_formulas_know_every_stretch_of_rope(kind):
    """What preflight.reference does not know is no stretch there, and equals no other."""
    stretch = {} if kind == "none" else {"rope_factor": 4.0, "rope_original": 16}
    net = model.LLaMA(model.ModelConfig(1, 2, 32, 48, 40, 64, rope_scaling=kind, **stretch))
    torch.manual_seed(0)
    weights = {name: p.data.normal_() for name, p in net.named_parameters()}
    ids = torch.randint(40, (64,))
    theirs = preflight.reference(lambda name: weights[name].double(), net.config, ids)
    with torch.no_grad():
        ours = net(ids[None])[0]
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
