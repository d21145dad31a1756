"""train.py --check catches a sabotaged program; --replay shows what a step was trained on."""

import contextlib
import json
import re
import shutil
import types

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
from plainllama.parallel import World
from plainllama.progress import duration
from plainllama.tokens import shards, tokenizer
from plainllama.tokens.rows import Rows
from plainllama.tokens.tokenizer_json import sha256_of
from plainllama.training import memory, optim, preflight
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


def by_the_formulas(net) -> None:
    """Random weights: the model computes what preflight.reference does."""
    torch.manual_seed(0)
    weights = {name: p.data.normal_() for name, p in net.named_parameters()}
    ids = torch.randint(40, (64,))
    theirs = preflight.reference(lambda name: weights[name].double(), net.config, ids)
    with torch.no_grad():
        ours = net(ids[None])[0]
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("kind", model.ROPE_SCALINGS)
def test_the_formulas_know_every_stretch_of_rope(kind):
    """What preflight.reference does not know is no stretch there, and equals no other."""
    stretch = {} if kind == "none" else {"rope_factor": 4.0, "rope_original": 16}
    net = model.LLaMA(model.ModelConfig(1, 2, 32, 48, 40, 64, rope_scaling=kind, **stretch))
    by_the_formulas(net)


# ---- the checks one by one, on stand-ins for what they look at

def trial(**parts) -> preflight.Trial:
    """As much of a Trial as a check looks at."""
    made = preflight.Trial.__new__(preflight.Trial)
    vars(made).update({"world": World(), "partly": False, "rate": 0.25, "targets": 2} | parts)
    return made


def test_a_trial_has_a_row_of_each_rank_and_first_weights(home):
    words = {"dataset": "toy", "n_layer": 1, "n_head": 2, "d_ff": 16, "vocab_size": 258,
             "global_batch_tokens": 1024, "device": "cpu", "compile": "true"}
    manifest = shards.read_manifest(home / "data/toy")
    for block, width, length, rate in ((256, 512, 128, 1.5e-3), (32, 256, 32, 3e-3),
                                       (32, 32, 32, 3e-3), (32, 260, 32, 3e-3 * 256 / 260)):
        made = preflight.Trial(settings.Settings(**words, block_size=block, d_model=width),
                               manifest, World())
        assert (made.length, made.targets, made.vocab) == (length, length, 258)
        assert made.rate == pytest.approx(rate, rel=1e-9) and not made.partly
        small = made.engine.config
        assert (small.block_size, small.global_batch_tokens, small.micro_batch, small.compile) == (
            length, length, 1, "false")
        whole = Rows(made.split, length, 1337).rows(0, 8)
        assert np.array_equal(made.rows, whole) and whole.shape == (8, length + 1)
        assert np.array_equal(made.x, whole[:, :-1]) and len(made.one.ids) == 1
        assert np.array_equal(made.one.targets, whole[:1, 1:])
    assert made.gradients() == "12 of 12"
    world = World()
    world.size = 2
    made = preflight.Trial(settings.Settings(**words, block_size=32, d_model=32), manifest, world)
    assert made.targets == made.engine.config.global_batch_tokens == 64
    for key, count in (({"lora_r": 2}, 14), ({"train_only": "last:1"}, 9),
                       ({"expand": "stack", "expand_blocks": 1}, 9)):
        made = preflight.Trial(settings.Settings(**words, block_size=32, d_model=32, **key),
                               manifest, World())
        assert made.partly and made.gradients() == f"{count} of {count}"


def test_each_check_is_said_and_counted(monkeypatch, capsys):
    clock = iter(range(100, 200))
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: next(clock) ** 2)
    names = ("collectives", "tokens", "first_loss", "future", "network", "gradients", "overfits",
             "saving")
    fails = {"tokens": preflight.Failed("two of them"), "network": ValueError("x"), "saving": None}

    def check(name):
        def tried():
            if fails.get(name):
                raise fails[name]
            return f"saw {name}"
        tried.__doc__ = None if name == "future" else f"Of {name}. And more."
        return tried

    asked = []
    world = types.SimpleNamespace(any=lambda flag: asked.append(flag) or flag or len(asked) == 8)
    some = types.SimpleNamespace(world=world, **{name: check(name) for name in names})
    assert preflight.try_out(some, print) == 3  # the last one on another rank
    assert asked == [False, True, False, False, True, False, False, False]
    took = [f"({2 * n + 1}.0 s)" for n in range(100, 116, 2)]
    assert capsys.readouterr().out.splitlines() == [
        f"ok    Of collectives: saw collectives {took[0]}",
        f"FAIL  Of tokens: two of them {took[1]}",
        f"ok    Of first_loss: saw first_loss {took[2]}", f"ok    : saw future {took[3]}",
        f"FAIL  Of network: ValueError('x') {took[4]}",
        f"ok    Of gradients: saw gradients {took[5]}",
        f"ok    Of overfits: saw overfits {took[6]}",
        f"FAIL  Of saving: saw saving {took[7]}"]
    assert preflight.must(1, "seen") == "seen"
    with pytest.raises(preflight.Failed, match="seen"):
        preflight.must(0, "seen")


def test_what_the_checks_end_with(monkeypatch, capsys):
    done = []
    monkeypatch.setattr(preflight, "Trial", lambda *_: "a trial")
    monkeypatch.setattr(preflight, "forecast", lambda *given: done.append(given[3]))
    monkeypatch.setattr(preflight.resume, "source_of", lambda *_: done.append("source"))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: done.append(name))
    for failures, code, says in ((0, 0, "all of it holds\n"),
                                 (1, 1, "1 checks failed: do not train yet\n"),
                                 (3, 1, "3 checks failed: do not train yet\n")):
        for rank, source, kind in ((0, "", "cpu"), (1, "x", "cuda")):
            world = World()
            world.rank, world.device = rank, types.SimpleNamespace(type=kind)
            monkeypatch.setattr(preflight, "try_out", lambda *_, failures=failures: failures)
            done.clear()
            assert preflight.run_checks(settings.Settings(init_from=source), {}, world, 2.5) == code
            assert done == (["source", "empty_cache", "reset_peak_memory_stats"] * rank + [2.5])
            assert capsys.readouterr().out == (says if rank == 0 else "")


def test_ranks_add_up_ones(monkeypatch):
    waits, sizes = [], []
    monkeypatch.setattr(preflight.watch, "deadline", lambda seconds, _: waits.append(seconds)
                        or contextlib.nullcontext())
    for size, factor in ((1, 1), (4, 4), (4, 3)):
        world = types.SimpleNamespace(size=size, device=torch.device("cpu"), sum=lambda ones,
                                      factor=factor: sizes.append(ones.numel()) or factor * ones)
        one = trial(world=world)
        if size == factor:
            assert one.collectives() == f"4 MB added up over {size} x cpu"
        else:
            with pytest.raises(preflight.Failed, match=r"^a sum of ones over 4 ranks is 3\.0$"):
                one.collectives()
    assert waits == [60] * 3 and sizes == [1 << 20] * 3


def test_documents_that_come_back_otherwise(monkeypatch):
    """At most one of ten; those of more than 16,384 tokens are looked at only where there are no
    others."""
    class Words:
        sha256, vocab_size, bos_id, eos_id = "h", 9, 0, 1

        def decode(self, ids):
            assert not {0, 1} & set(ids)
            return "-".join(map(str, ids))

        def encode_documents(self, texts):
            return [np.array([0, *map(int, text.split("-")), 1]) + (text[0] == "7")
                    for text in texts]

    named, split = {"sha256": "h", "vocab_size": 9}, types.SimpleNamespace(masked=False)
    monkeypatch.setattr(preflight.tokenizer.Tokenizer, "load", lambda _: Words())
    one = trial(data=None, manifest={"tokenizer": named}, split=split)
    good, bad = [0, 3, 4, 1], [0, 7, *[5] * 60, 1]
    for there, wrong, seen in (([good], 0, 1), ([good] * 9 + [bad], 1, 10),
                                   ([bad] + [good] * 18, 1, 19), ([good] * 9 + [bad] * 2, 2, 11),
                                   ([good] * 8 + [bad], 1, 9), ([good] * 18 + [bad] * 2, 2, 20),
                                   ([[0, *[3] * 16382, 1], bad], 1, 2),
                                   ([[0, *[3] * 16383, 1], good], 0, 1),
                                   ([[0, *[3] * 16383, 1], [0, *[3] * 20000, 1]], 0, 1)):
        monkeypatch.setattr(preflight, "stored_documents", lambda _, there=there: iter(
            map(np.array, there)))
        first = f", the first: {('7-' + '5-' * 60)[:60]!r}" if wrong else ""
        text = (f"{wrong} of {seen} documents, decoded and encoded again, have other ids{first}")
        if 10 * wrong <= seen:
            assert one.tokens() == text
        else:
            with pytest.raises(preflight.Failed) as failed:
                one.tokens()
            assert str(failed.value) == text
    for other in ({"sha256": "i"}, {"vocab_size": 8}):
        one.manifest = {"tokenizer": named | other}
        with pytest.raises(preflight.Failed, match="not the one that the manifest names"):
            one.tokens()


@pytest.mark.parametrize(("loss", "holds"), [
    (0.0, True), (0.19, True), (-0.19, True), (0.2, False), (-0.2, False), (0.21, False)])
def test_first_weights_are_off_ln_v_by_less_than_a_fifth(loss, holds):
    one = trial(rows=np.array([[3, 4, 5]]), vocab=1, model=lambda *_: types.SimpleNamespace(
        item=lambda: 2 * loss))
    if holds:
        assert one.first_loss() == f"{loss:.3f} nats, ln 1 = 0.000"
    else:
        with pytest.raises(preflight.Failed, match=r"nats, ln 1 = 0\.000$"):
            one.first_loss()


def test_a_future_that_is_seen_and_a_past_that_is_not(monkeypatch):
    """Each place that is tried, each prediction before it and behind it; noise of 1e-5 is none."""
    for length in (2, 3, 8, 9):
        tried = sorted({1, length // 2, length - 1})
        cases = [(None, 0, 0.0)] + [(place, at, size) for place in tried for at in range(length)
                                    for size in (0.0, 1e-5, 2e-5)]
        for wrong, at, size in cases:
            one, places = trial(length=length, x=torch.arange(4 * length).view(4, -1), vocab=9), []

            def logits(ids, one=one, places=places, wrong=wrong, at=at, size=size):
                assert len(ids) == 1
                same = ids[0] == one.x[0]
                place = int(same.sum())  # what stands before it is as it was
                assert same[:place].all()
                assert torch.equal(ids[0, place:], (one.x[0, place:] + 1) % 9)
                places.append(place)
                moved = (~same).double()
                if place == wrong:
                    moved[at] = size
                return torch.stack([torch.ones(len(same)).double(), moved], -1)[None]

            monkeypatch.setattr(one, "logits", logits)
            what = ("what is predicted" if wrong and at < wrong and size > 1e-5 else
                    "nothing" if wrong and at >= wrong and size == 0 else "")
            if what:
                with pytest.raises(preflight.Failed) as failed:
                    one.future()
                assert str(failed.value) == f"another token at {wrong} changes {what} at {at}"
            else:
                assert one.future() == ("no prediction before a changed token moved, all "
                                        f"{length - 1} after it did")
                assert places == [length, *tried]
    with pytest.raises(preflight.Failed, match="in a context of one token"):
        trial(length=1).future()


@pytest.mark.parametrize(("dtype", "size", "limit"), [
    (torch.float32, 10000, "0.0001"), (torch.bfloat16, 20, "0.05")])
def test_how_far_logits_may_be_off(monkeypatch, dtype, size, limit):
    net = model.LLaMA(model.ModelConfig(2, 1, 4, 3, 7, 2))
    before, times = {n: p.detach().clone() for n, p in net.named_parameters()}, []
    one = trial(model=net, x=torch.zeros(8, 2), engine=types.SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(preflight, "reference", lambda weight, config, ids: (
        torch.tensor([[size, 0.0]]).double()))
    for more, holds in ((0.9, True), (1.0, False), (-1.0, False), (1.1, False), (0, True)):
        def logits(ids, more=more):
            times.append({n: (p / before[n]).mean().item() for n, p in net.named_parameters()})
            assert ids.shape == (1, 2)
            return torch.tensor([[[size + more, 0.0]]])

        monkeypatch.setattr(one, "logits", logits)
        said = f"logits are off by {abs(more) / size:.1g} of their size (at most {limit})"
        if holds:
            assert one.network() == said
        else:
            with pytest.raises(preflight.Failed) as failed:
                one.network()
            assert str(failed.value) == said
        for name, p in net.named_parameters():
            assert torch.equal(p, before[name])
            assert times[-1][name] == pytest.approx(8 if "q_proj" in name else 1, rel=1e-5)


@pytest.mark.parametrize(("losses", "partly", "updates", "goal"), [
    ([1.0, 0.5, 0.49], False, 3, 0.5), ([0.49], False, 1, 0.5), ([0.5] * 200, False, 100, 0.5),
    ([0.6] * 99 + [0.4], False, 100, 0.5), ([0.6] * 100 + [0.4], False, 100, 0.5),
    ([5.0, 4.9995, 4.998], True, 3, 4.999), ([0.1, 0.05], True, 2, 0.099),
    ([5.0] * 200, True, 100, 4.999)])
def test_one_row_by_heart(monkeypatch, losses, partly, updates, goal):
    """Half of ln V in a hundred updates; where little learns, a thousandth less than at first."""
    made, given = iter(losses), []
    monkeypatch.setattr(preflight.math, "log", lambda vocab: float(vocab))
    monkeypatch.setattr(preflight, "read_outcome", lambda loss: types.SimpleNamespace(
        loss=2 * loss))
    engine = types.SimpleNamespace(update=lambda *words: given.append(words) or next(made))
    one = trial(engine=engine, vocab=1, partly=partly, one="row")
    said = f"{losses[updates - 1]:.2f} nats after {updates} updates, below {goal:.2f} asked"
    if losses[updates - 1] < goal:
        assert one.overfits() == said
    else:
        with pytest.raises(preflight.Failed) as failed:
            one.overfits()
        assert str(failed.value) == said
    assert given == [("row", 0.25, 2)] * updates


def test_a_checkpoint_has_room_for_those_kept_the_best_and_the_next(tmp_path, monkeypatch):
    saved, loaded, net = [], [], torch.nn.Linear(2, 2)

    def save(folder, step, *rest):
        saved.append((folder, step, *rest))
        (folder / "a/b").mkdir(parents=True)
        (folder / "a/b/file").write_bytes(b"x" * 1000)
        (folder / "a/file").write_bytes(b"x" * 24)
        return folder / "a"

    monkeypatch.setattr(preflight.checkpoint, "save", save)
    monkeypatch.setattr(preflight.checkpoint, "load_moments", lambda *_: None)
    monkeypatch.setattr(preflight, "load_weights", lambda *_: loaded.append("weights"))
    monkeypatch.setattr(preflight.peft, "load_adapter", lambda *_: loaded.append("adapter"))
    optimizer = types.SimpleNamespace(state={}, scale_state=lambda: [4.0, 2.0])
    for adapter, problem, free, print_of, says in (
            (None, "", 5120, "a", ""), ("lora", "", 5120, "a", ""),
            (None, "", 5119, "a", "5 of 0.00 GB need 0.0 GB, 0.0 GB are free"),
            (None, "", 9999, "ab", "what was read is not what was written"),
            (None, "torn", 9999, "a", "torn")):
        prints = iter(print_of * 2)
        monkeypatch.setattr(preflight.checkpoint, "damage", lambda _, problem=problem: problem)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _, free=free: (
            types.SimpleNamespace(free=free)))
        engine = types.SimpleNamespace(optimizer=optimizer, adapter=adapter)
        one = trial(config=settings.Settings(out_dir=str(tmp_path / "x/y"), keep_last=3), model=net,
                    data=tmp_path, engine=engine)
        monkeypatch.setattr(one, "fingerprint", lambda prints=prints: next(prints))
        loaded.clear()
        if says:
            with pytest.raises(preflight.Failed, match=says):
                one.saving()
        else:
            assert one.saving() == f"5 of 0.00 GB need 0.0 GB, 0.0 GB are free in {tmp_path}"
            assert loaded == ["adapter" if adapter else "weights"]
            assert not net.weight.any() if not adapter else True
        folder, step, _, _, state, words, _, what = saved[-1]
        assert folder.name.startswith("plainllama-check-") and not folder.exists()
        assert (step, state, words, what) == (
            1, {"step": 1, "loss_scale": [4.0, 2.0]}, tmp_path / "tokenizer.json", adapter)
    one.world.rank = 1
    monkeypatch.setattr(one.world, "agree", lambda value: str(tmp_path / "theirs") if value is None
                        else "")
    monkeypatch.setattr(one, "fingerprint", lambda: "a")
    with pytest.raises(preflight.Failed, match="torn"):
        one.saving()
    assert (tmp_path / "theirs").is_dir()  # rank 0 removes it


def test_what_a_fingerprint_covers():
    """Weights and moments; of a model with an adapter, what learns of it."""
    net = torch.nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    moment = torch.ones(1, 2)
    engine = types.SimpleNamespace(adapter=None, optimizer=types.SimpleNamespace(
        state={net.weight: {"exp_avg": moment, "step": torch.tensor(3.0)}}))
    one = trial(model=net, engine=engine)
    assert [t.data_ptr() for t in one.tensors()][:2] == [net.weight.data_ptr(), moment.data_ptr()]
    assert len(list(one.tensors())) == 4
    seen = {one.fingerprint()}
    for tensor in (net.weight.data, moment, net.bias.data):
        tensor += 1
        seen.add(one.fingerprint())
    assert len(seen) == 4
    engine.adapter = "lora"
    assert len(list(one.tensors())) == 3


def test_the_first_rows_and_documents(monkeypatch):
    seen = []
    for name in ("Rows", "FitRows"):
        monkeypatch.setattr(preflight, name, lambda *given, name=name: types.SimpleNamespace(
            rows=lambda *which: seen.append((name, *given[1:], *which)) or np.array([
                [7, preflight.PAD, 9 | preflight.CONTEXT]])))
    for masked, block, expected in ((False, 300, ("Rows", 128, 5, 0, 8)),
                                    (False, 100, ("Rows", 100, 5, 0, 8)),
                                    (True, 300, ("FitRows", 300, 5, 0, 8))):
        split = types.SimpleNamespace(masked=masked)
        found = preflight.first_rows(split, settings.Settings(block_size=block, seed=5))
        assert seen.pop() == expected
        assert not masked or found.tolist() == [[7, 0, 9]]
    ids = np.arange(100)
    for starts in ([0, 3, 50], list(range(33)), list(range(34)), list(range(0, 62, 2))):
        split = types.SimpleNamespace(
            shard=lambda number: ids[number:],
            index=lambda number, starts=starts: np.array(starts[number:]))
        found = [part.tolist() for part in preflight.stored_documents(split)]
        ends = [*starts[1:], 100]
        assert found == [ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)][:32]


class Pace:
    """An engine that takes `gradients` + `updating` seconds a row, by a clock of its own."""

    def __init__(self, rows: int, micro: int, accumulate: int, gradients: float, updating: float):
        self.batch_rows, self.micro, self.accumulate = rows, micro, accumulate
        self.model = model.LLaMA(model.ModelConfig(1, 2, 8, 12, 20, 4))
        self.summary, self.optimizer = "float32, eager", self
        self.pace, self.update_takes, self.now, self.seen = gradients, updating, 64.0, []

    def stand_in(self, ids):
        assert ids.shape[1] == 5 and ids.min() >= 0 and ids.max() < 20
        return ids

    def gradients(self, ids, targets):
        self.seen.append(len(ids))
        self.now += len(ids) * self.pace
        return torch.ones(1)

    def update(self, ids, rate, targets):
        assert rate == 0.0 and targets == self.batch_rows * 4
        self.gradients(ids, targets)
        self.seen[-1] *= -1
        self.now += self.update_takes
        return torch.ones(1)

    def ready(self):
        pass

    def zero_grad(self):
        pass


FORECASTS = [  # pace, keys, price -> rows tried (updates negative), rows, seconds a step
    (Pace(8, 4, 2, 0.25, 0.5), {}, 0, [1, -4] + [4] * 6 + [-4] * 5, 4, 8 * 0.25 + 0.5),
    (Pace(9, 4, 3, 0.25, 0.5), {}, 2, [1, -4] + [4] * 6 + [-4] * 5, 4, 9 * 0.25 + 0.5),
    (Pace(8, 4, 2, 0.25, -0.5), {}, 0, [1, -4] + [4] * 6 + [-4] * 5, 4, 8 * 0.25),
    (Pace(8, 4, 2, 0.25, 0.5), {"deterministic": True}, 0, [-8, 8, *[8] * 5, *[-8] * 5], 8, 2.5),
    (Pace(8, 2, 4, 1.25, 0.5), {}, 0, [1, -2, 2, *[2] * 5, *[-2] * 5], 2, 10.5),
    (Pace(8, 2, 4, 1.5, 0.5), {}, 0, [1, -2, 2, 2, -2], 2, 12.5),
    (Pace(8, 2, 4, 2.5, 0.5), {}, 0, [1, -2, 2, 2, -2], 2, 20.5),
    (Pace(8, 2, 4, 2.75, 0.5), {}, 0, [1, -1, 1, *[1] * 5, *[-1] * 5], 1, 22.5),
    (Pace(8, 2, 4, 3.0, 0.5), {}, 0, [1, -1, 1, 1, -1], 1, 24.5),
    (Pace(5000, 5000, 1, 1 / 512, 0.5), {}, 0, [1, -5000, 5000, 5000, -5000], 5000,
     5000 / 512 + 0.5),
    (Pace(5001, 5001, 1, 1 / 512, 0.5), {}, 0, [1, -1, 1, *[1] * 5, *[-1] * 5], 1,
     5001 / 512 + 0.5),
]


@pytest.mark.parametrize(("pace", "keys", "price", "tried", "rows", "step"), FORECASTS)
def test_a_forecast_to_the_letter(monkeypatch, capsys, pace, keys, price, tried, rows, step):
    monkeypatch.setattr(preflight, "Engine", lambda *_, say: pace)
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: pace.now)
    monkeypatch.setattr(preflight.log, "mfu", lambda engine, speed: 0.25)
    monkeypatch.setattr(preflight.log, "peak_memory", lambda _: 3 << 29)
    config = settings.Settings(block_size=4, vocab_size=20, max_steps=1000, eval_interval=300,
                               eval_tokens=9000, **keys)
    preflight.forecast(config, {"tokenizer": {"bos": 1}}, World(), price, print)
    speed = pace.batch_rows * 4 / step
    evaluations = 4 * 9000 / speed / 3  # at step 0, 300, 600 and 900; forward alone is a third
    total = 1000 * step + evaluations
    flops, read = 6 * (8 * (2 * 8 + 16 + 36) + 160) + 12 * 8 * 4, 4000 * pace.batch_rows
    cost = f"{total / 3600 * price:,.2f} at 2 an hour and device" if price else (
        "n/a: name the price of a device for an hour with --price=")
    assert pace.seen == tried
    assert capsys.readouterr().out == f"""\
parameters   888, 568 without embeddings
memory       1.50 GiB at most on cpu
speed        {speed:,.0f} tok/s, MFU 25.0%, {step:.2f} s a step, float32, eager
measured     with {rows} rows of 4; a step has {pace.accumulate} times {pace.micro}
run          1,000 steps, {read:,} tokens, {flops * read:.2g} FLOP
time         {duration(total)}, of it evaluations about {duration(evaluations)}; saves on top
cost         {cost}
"""


def test_a_forecast_of_several_gpus(monkeypatch, capsys):
    """Each has its share of the rows, and all cost; no row is tried alone."""
    pace, world = Pace(9, 2, 3, 0.25, 0.5), World()
    world.size, world.device = 2, types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(world, "least", lambda value: value)
    monkeypatch.setattr(preflight, "Engine", lambda *_, say: pace)
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: pace.now)
    monkeypatch.setattr(preflight.log, "mfu", lambda engine, speed: None)
    monkeypatch.setattr(preflight.log, "peak_memory", lambda _: 0)
    config = settings.Settings(block_size=4, vocab_size=20, max_steps=3600, eval_interval=9999,
                               eval_tokens=1)
    preflight.forecast(config, {"tokenizer": {"bos": 1}}, world, 10.0, print)
    said = capsys.readouterr().out
    assert pace.seen == [-2, *[2] * 6, *[-2] * 5]
    assert "MFU n/a, 1.75 s a step" in said  # five rows and the update
    assert "cost         35.00 at 10 an hour and device" in said


@pytest.mark.parametrize("low", [1.0, 2.0])
def test_the_formulas_are_the_models(low):
    """Few key heads, one matrix at both ends, a large epsilon, other bounds of llama3."""
    net = model.LLaMA(model.ModelConfig(
        2, 4, 64, 48, 40, 64, n_kv_head=2, rope_scaling="llama3", rope_factor=4.0,
        rope_theta=1000.0, rope_original=64, rope_low=low, rope_high=8.0,
        norm_eps=0.1, tie_embeddings=True))
    by_the_formulas(net)


# ---- memory, reckoned

def test_what_an_allocator_would_hold():
    """What operations make, until it is dropped; memory that is shared counts once."""
    there = torch.ones(100)
    seen = memory.Allocator([there])
    with seen:
        first = there + 1  # 400 bytes
        view, same = first.view(10, 10), there[:50]
        second = torch.cat([first, first])  # 800
        assert (seen.held, seen.peak) == (1200, 1200)
        del first, view
        assert (seen.held, seen.peak) == (800, 1200)
        third = second.double()  # 1600
        assert (seen.held, seen.peak) == (2400, 2400)
        del second, third, same
        some = torch.full((2,), 1.0, dtype=torch.float64)
        assert (seen.held, seen.peak) == (16, 2400) and some.sum() == 2
    one = torch.zeros(3, dtype=torch.float64)
    assert memory.size_of([one, one, torch.zeros(2, dtype=torch.int8)]) == 26
    assert memory.size_of([]) == 0


KEYS = {"n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 64, "vocab_size": 99, "block_size": 16}


def test_what_is_reckoned_beside_activations():
    for more in ({}, {"train_only": "last:1"}, {"lora_r": 2, "attention": "varlen"},
                 {"optimizer": "muon", "tie_embeddings": True}):
        config = settings.Settings(**KEYS, **more)
        net, _ = memory.outline(config)
        parts = memory.reckon(config, 3, torch.float32)
        learned = sum(p.numel() for p in net.parameters() if p.requires_grad)
        count = sum(1 for p in net.parameters() if p.requires_grad)
        tables = 2 * 16 * 16 * 4  # of RoPE
        assert parts["weights"] == 4 * sum(p.numel() for p in net.parameters()) + tables
        assert parts["gradients"] == 4 * learned
        muon = [p for n, p in net.named_parameters() if ".layers." in n and p.dim() > 1] * (
            more.get("optimizer") == "muon")
        assert parts["moments"] == 8 * learned + 4 * count - sum(4 * p.numel() + 4 for p in muon)
        assert parts["activations"] > 4 * 48 * 2 * 99  # the logits and their gradient
        if not more:
            twice = memory.reckon(config, 6, torch.float32)["activations"]
            assert 2 * parts["activations"] <= twice < 3 * parts["activations"]  # without gradients
            half = memory.reckon(config, 3, torch.bfloat16)["activations"]
            assert half < parts["activations"]


@pytest.mark.parametrize(("keys", "said"), [
    ({}, ["learns: all weights"]), ({"micro_batch": 3}, ["learns: all weights"]),
    ({"lora_r": 2, "lora_targets": "q,v"},
     ["  q_proj of all blocks", "  v_proj of all blocks", "learns: a"]),
    ({"lora_r": 2, "lora_targets": "layers.1.self_attn.q_proj"},
     ["  q_proj of blocks 1", "learns: a"])])
def test_what_a_run_takes_is_foreseen(monkeypatch, capsys, keys, said):
    asked, parts = [], {}
    monkeypatch.setattr(memory, "reckon", lambda *given: asked.append(given) or parts)
    monkeypatch.setattr(memory.adapters, "summary", lambda model, adapter, _: (
        "learns: a" if adapter else ""))
    config, world = settings.Settings(**KEYS, **keys), World()
    rows = keys.get("micro_batch", 1)
    for parts, offload, size in (  # noqa: B007, what stands in asks for them
            ({"weights": 2_500_000, "moments": 500_000}, False,
             "3.00 MB (weights 2.50, moments 0.50)"),
            ({"weights": 999_999_999}, False, "1000.00 MB (weights 1000.00)"),
            ({"weights": 1_000_000_000}, False, "1.00 GB (weights 1.00)"),
            ({"weights": 2_000_000_000}, True, "2.00 GB (weights 2.00)")):
        world.offload = offload
        memory.foresee(config, world)
        away = ", of which all but activations in host memory" if offload else ""
        assert capsys.readouterr().out.splitlines() == [
            *said, f"memory reckoned for {rows} rows of 16 in float32: {size}, the whole model on "
                   f"one device{away}"]
        assert asked.pop() == (config, rows, torch.float32, None)
    for rank, layers, says in ((1, 2, False), (0, 1000, True), (0, 1001, False)):
        monkeypatch.setattr(memory, "outline", lambda *_: (None, None))
        world.rank, config.n_layer = rank, layers
        memory.foresee(config, world)
        assert bool(capsys.readouterr().out) == says
