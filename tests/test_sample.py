"""sample.py: the cache, batches, the distributions against their definition, the command."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import end_all_below, run_script, start_fork
from forks import TORCHRUN

import sample
from model import KVCache, LLaMA, ModelConfig
from plainllama import parallel
from plainllama.command import parse
from plainllama.files import sha256, write_json
from plainllama.generation import decoding, generate, prompt_files
from plainllama.settings import Sampling, Settings, UserError
from plainllama.tokens.chat import with_roles
from plainllama.tokens.templates import chat_of
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer
from plainllama.weights import checkpoint
from plainllama.weights.adapters import initial_weight
from plainllama.weights.huggingface import config_json
from plainllama.weights.peft import load_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")  # tiny matrices lose time on more
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64, vocab_size=264, block_size=48)
GREEDY = Sampling(temperature=0.0)


def tiny(seed=0, scale=6.0, **changes) -> LLaMA:
    """A model whose matrices are so large that attention matters; it uses 258 of 264 entries."""
    model = LLaMA(ModelConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = initial_weight(name, p.shape, model.config, seed)
            p.copy_(value if p.dim() == 1 else value * scale)
    return model.eval()


def write_checkpoint(folder: Path, model: LLaMA) -> Path:
    from safetensors.torch import save_file

    tokenizer = make_tokenizer("bytes", None)
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    write_json(folder / "config.json",
                          config_json(model.config, tokenizer.bos_id, tokenizer.eos_id))
    save_file(dict(model.named_parameters()), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "model", tiny())


def uncached(model: LLaMA, prompt: list, steps: int) -> list:
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


PROMPTS = [[256, 1, 2, 3], [256], [256, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 77, 78], [256, 200, 100]]


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_head": 1, "tie_embeddings": True}, {"n_kv_head": 0, "attention": "reference"},
    {"rope_scaling": "linear", "rope_factor": 4.0}])
def test_cached_logits_equal_uncached(changes):
    model = tiny(**changes)
    ids = torch.randint(264, (3, 40), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5, 11, 17])
    with torch.no_grad():
        whole = model(ids)
        padded = torch.where(torch.arange(17) < lengths[:, None], ids[:, :17], 0)
        cache = KVCache(model.config, 3, 40, "cpu", torch.float32)
        first = model(padded, cache=cache)
        cache.lengths += lengths
        for row, length in enumerate(lengths):
            torch.testing.assert_close(first[row, :length], whole[row, :length],
                                       rtol=0, atol=1e-5 * whole.abs().max().item())
        for step in range(20):
            cache.used = int(cache.lengths.max())
            now = cache.lengths[:, None]
            got = model(ids.gather(1, now), cache=cache)[:, 0]
            want = whole[torch.arange(3), cache.lengths]
            assert (got - want).abs().max() <= 1e-5 * whole.abs().max(), step
            cache.lengths += 1


def test_greedy_equals_uncached_and_transformers(ckpt):
    model = tiny()
    want = [uncached(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in want}) == len(PROMPTS)  # attention matters
    for prompt, ids in zip(PROMPTS, want, strict=True):
        assert generate.generate(model, [prompt], 20, GREEDY, [0]) == [(ids, "length")]
    together = generate.generate(model, PROMPTS, 20, GREEDY, [0] * 4)
    assert together == [(ids, "length") for ids in want]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ckpt)
    for prompt, ids in zip(PROMPTS, want, strict=True):
        ids_in = torch.tensor([prompt])
        got = theirs.generate(ids_in, attention_mask=torch.ones_like(ids_in), max_new_tokens=20,
                              do_sample=False, eos_token_id=None, pad_token_id=0)
        assert got[0, len(prompt):].tolist() == ids


def test_rows_that_end_early_leave_the_others_alone():
    model = tiny()
    alone = [generate.generate(model, [prompt], 40, GREEDY, [0])[0][0] for prompt in PROMPTS]
    stop = alone[2][3]  # ends the longest row at once, the others later or never
    want = [(ids[:ids.index(stop)], "eos") if stop in ids else (ids, "length") for ids in alone]
    assert {why for _, why in want} == {"eos", "length"}
    assert generate.generate(model, PROMPTS, 40, GREEDY, [0] * 4, {stop}) == want


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_tokens_that_are_read_late_are_the_same(monkeypatch, prompts):
    """As on a GPU, whose next step begins before the host looks at a token, and which waits for
    nothing: no number is read back, none is sent but where rows are left behind."""
    model, real, events = tiny(), generate.Batch, []
    alone = generate.generate(model, prompts, 40, GREEDY, [0] * len(prompts))
    stops = {alone[0][0][9], alone[-1][0][5]}
    want = generate.generate(model, prompts, 40, GREEDY, [0] * len(prompts), stops)

    class Traffic(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, call, kinds, args=(), kwargs=None):
            if call.__name__.startswith(("_local_scalar_dense", "lift_fresh")):
                events.append(call.__name__)
            return call(*args, **(kwargs or {}))

    class Late(real):
        def __init__(self, *words):
            super().__init__(*words)
            self.lag = 1

        def draw(self, sampling, number):
            with Traffic():
                super().draw(sampling, number)
            events.append(f"draw {number}")

        def advance(self):
            rows = len(self.rows)
            with contextlib.nullcontext() if 2 * sum(
                    not row.ended for row in self.rows) <= rows else Traffic():
                super().advance()

    monkeypatch.setattr(generate, "Batch", Late)
    watch = lambda row, token: row == 0 and events.append("read")  # noqa: E731
    assert generate.generate(model, prompts, 40, GREEDY, [0] * len(prompts), stops,
                             watch=watch) == want
    assert events[:6] == ["draw 0", "draw 1", "read", "draw 2", "read", "draw 3"]
    assert not [event for event in events if event[:4] not in ("draw", "read")]


def test_a_deterministic_run_draws_on_the_host(monkeypatch):
    """cumsum of a GPU has no deterministic kernel: there torch would refuse."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: asked.append(self.shape) or self)
    logits, seen = torch.randn(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    generate.choose(logits, Sampling(), seen, torch.tensor([0.2, 0.9]))
    assert asked == [(2, 9), (2,)]


def test_decoding_does_without_a_plan_for_each_length():
    model, seen = tiny(), []
    generate.generate(model, PROMPTS, 3, GREEDY, [0] * 4, watch=lambda *_: seen.append(
        torch.backends.cuda.cudnn_sdp_enabled()))
    assert seen and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # training may have it


def test_random_configurations():
    """Cached, batched and compiled (without a compiler: the same steps in a cache of fixed size)
    equal uncached, whatever the shape of the model, of the prompts and of the batch."""
    rng = random.Random(5)
    for seed in range(8):
        heads = rng.choice([2, 4])
        model = tiny(seed, n_layer=rng.randint(1, 3), n_head=heads, d_ff=rng.choice([48, 80]),
                     n_kv_head=rng.choice([0, 1, 2]), tie_embeddings=rng.random() < 0.5,
                     **rng.choice([{}, {"rope_scaling": "linear", "rope_factor": 2.0}]))
        asked = [[256, *(rng.randrange(256) for _ in range(rng.randint(0, 30)))]
                 for _ in range(rng.randint(1, 6))]
        n = rng.randint(8, 12)
        want = [(uncached(model, ids, n), "length") for ids in asked]
        assert generate.generate(model, asked, n, GREEDY, [0] * len(asked)) == want, seed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda function, **_: function)
            still = generate.compile_step(model, 7, 45, True)
        for few in (asked, asked[:1], asked[-2:]):  # the cache is used again
            found = generate.generate(model, few, n, GREEDY, [0] * len(few), compiled=still)
            assert found == [want[asked.index(ids)] for ids in few], seed


@pytest.mark.slow
def test_a_compiled_step_is_the_same(ckpt, tmp_path):
    rows = [{"prompt": "word " * (i % 7)} for i in range(21)]
    (tmp_path / "F.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("true", "false"):
        assert run("--ckpt", ckpt, f"--prompts={tmp_path}/F.jsonl", f"--out={tmp_path}/{name}",
                   f"--compile={name}", "--max_new_tokens=9", "--batch=6") == 0
    assert (tmp_path / "true").read_bytes() == (tmp_path / "false").read_bytes()


def test_end_of_context():
    model = tiny()
    found = generate.generate(model, PROMPTS, 1000, GREEDY, [0] * 4)
    assert [len(ids) for ids, _ in found] == [48 - len(prompt) for prompt in PROMPTS]
    assert found[1][0] == uncached(model, PROMPTS[1], 47)


def test_same_text_alone_and_in_a_batch():
    model, drawn = tiny(scale=3.0), Sampling(temperature=0.9, top_p=0.95)
    seeds = [generate.row_seed(7, i) for i in range(4)]
    together = generate.generate(model, PROMPTS, 30, drawn, seeds)
    alone = [generate.generate(model, [p], 30, drawn, [s])[0]
             for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    assert generate.generate(model, PROMPTS[:1], 12, drawn, seeds[:1])[0][0] == alone[0][0][:12]
    again = generate.generate(model, PROMPTS[:1], 30, drawn, [generate.row_seed(8, 0)])[0]
    assert again != alone[0]


def test_filters_by_hand():
    p = torch.tensor([[0.4, 0.05, 0.3, 0.15, 0.1], [0.05, 0.1, 0.15, 0.3, 0.4]])
    cases = [
        (dict(top_k=2), [[0, 2], [3, 4]]), (dict(top_k=99), [[0, 1, 2, 3, 4]] * 2),
        (dict(top_p=0.4), [[0], [4]]), (dict(top_p=0.41), [[0, 2], [3, 4]]),
        (dict(top_p=0.0), [[0], [4]]), (dict(top_p=0.84), [[0, 2, 3], [2, 3, 4]]),
        (dict(min_p=0.25), [[0, 2, 3, 4], [1, 2, 3, 4]]), (dict(min_p=1.0), [[0], [4]]),
        (dict(top_k=3, top_p=0.8), [[0, 2], [3, 4]]),  # of the three, 0.4 and 0.3 are 82 %
        (dict(temperature=0.5, min_p=0.25), [[0, 2], [3, 4]]),  # squares: 16, 9, 2.25
    ]
    for options, kept in cases:
        logits = generate.allowed(p.log() + 3, Sampling(**options))
        assert [row.isfinite().nonzero().flatten().tolist() for row in logits] == kept, options
    assert generate.allowed(torch.full((1, 4), 1e4), Sampling(temperature=1e-30)).eq(0).all()


def test_filters_equal_transformers():
    process = pytest.importorskip("transformers").generation.logits_process
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.randint(300, (8, 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(8, 300, dtype=torch.bool).scatter(1, ids, True)
    want = process.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits)
    greedy = Sampling(temperature=0.0, repetition_penalty=1.7)
    assert generate.choose(logits, greedy, seen, torch.zeros(8)).equal(want.argmax(-1))
    for name, value, theirs in (("top_k", 7, process.TopKLogitsWarper),
                                ("top_p", 0.7, process.TopPLogitsWarper),
                                ("min_p", 0.1, process.MinPLogitsWarper)):
        ours = generate.allowed(logits, Sampling(temperature=0.7, **{name: value}))
        assert ours.isfinite().equal(theirs(value)(ids, logits / 0.7).isfinite()), name


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2},
    {"repetition_penalty": 1.8, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}])
def test_frequencies_are_their_definition(options):
    """400,000 draws against probabilities worked out in Python's own numbers."""
    flags, n = Sampling(**options), 400_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    seen = torch.arange(12) % 3 == 0
    x = [(v / flags.repetition_penalty if v > 0 else v * flags.repetition_penalty) if s else v
         for v, s in zip(logits[0].tolist(), seen.tolist(), strict=True)]
    p = {i: math.exp(v / flags.temperature) for i, v in enumerate(x)}
    p = dict(sorted(p.items(), key=lambda pair: -pair[1])[:flags.top_k or None])
    total, before, kept = sum(p.values()), 0.0, {}
    for i, v in p.items():
        if before < flags.top_p * total:
            kept[i] = v
        before += v
    kept = {i: v for i, v in kept.items() if v >= flags.min_p * max(kept.values())}
    draws = torch.rand(n, generator=torch.Generator().manual_seed(4))
    got = generate.choose(logits.expand(n, -1), flags, seen.expand(n, -1), draws)
    counts = got.bincount(minlength=12).tolist()
    assert {i for i, count in enumerate(counts) if count} == set(kept)
    expected = {i: n * v / sum(kept.values()) for i, v in kept.items()}
    chi2 = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    assert chi2 < 40  # at most 11 degrees of freedom: p = 4e-5


def test_draws_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[float("-inf"), 2.0, 1.0, float("-inf")]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-24])
    seen = torch.zeros(2, 4, dtype=torch.bool)
    assert generate.choose(logits, Sampling(), seen, draws).tolist() == [1, 2]
    for kind in (Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.5, top_k=2)):
        lost = generate.choose(torch.full_like(logits, math.nan), kind, seen, draws)
        assert (lost >= 0).all() and (lost < logits.shape[1]).all()  # a run's guard has its say


def test_unused_entries_are_never_drawn():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[258:] = 50 * model.lm_head.weight[:6]
    flags = Sampling(temperature=5.0)
    free = generate.generate(model, PROMPTS, 30, flags, [1, 2, 3, 4])
    assert max(max(ids) for ids, _ in free) >= 258
    held = generate.generate(model, PROMPTS, 30, flags, [1, 2, 3, 4], vocab_size=258)
    assert max(max(ids) for ids, _ in held) < 258


def spelled(tokenizer, text, stops=(), prompt="", data=None) -> generate.TextStream:
    begun = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    one = generate.TextStream(tokenizer, begun, list(stops), True)
    for token in data if data is not None else tokenizer.encode(prompt + text)[len(begun) - 1:]:
        if one.push(token):
            break
    one.push()
    return one


@pytest.mark.parametrize("name", ["bytes", "mistral"])
def test_streamed_text_is_whole(name, capsys):
    if name == "mistral":
        pytest.importorskip("mistral_common")
    tokenizer = make_tokenizer(name, None)
    for prompt in ("", "Hello", "x "):
        text = " wörld  😀👩‍👩‍👧 北京\n\tend"
        assert spelled(tokenizer, text, prompt=prompt).text == text == capsys.readouterr().out


def test_bytes_that_are_no_text_come_out_in_the_end(capsys):
    tokenizer = make_tokenizer("bytes", None)
    one = spelled(tokenizer, "", data=[104, 0xF0, 0x9F, 0x98, 0x80, 0xC3])
    assert one.text == "h😀" + generate.HALF == capsys.readouterr().out
    one = spelled(tokenizer, "", data=[0x80] * 40 + [65])
    assert one.text == generate.HALF * 40 + "A"


def test_stop_strings(capsys):
    tokenizer = make_tokenizer("bytes", None)
    one = spelled(tokenizer, "one. two END three", ["END", "\n\n"])
    assert one.stopped and one.text == "one. two " == capsys.readouterr().out
    one = spelled(tokenizer, "EN. EN", ["END"])  # a beginning of it is shown in the end
    assert not one.stopped and one.text == "EN. EN" == capsys.readouterr().out
    one = spelled(tokenizer, "x", ["é"], data=[120, 0xC3, 0xA9, 121])
    assert one.stopped and one.text == "x"


def flags_of(*words) -> sample.Flags:
    flags = parse([str(word) for word in words], "", sample.Flags, "files").flags
    flags.stop = []
    return flags


def run(*words) -> int:
    return sample.main(parse([str(word) for word in words], "", sample.Flags, "model"))


@pytest.mark.parametrize("script", ["sample.py", "export.py"])
def test_help_and_a_misspelt_key_need_no_torch(script):
    for word, code, says in (("--help", 0, "--ckpt="), ("--ckpd=x", 2, "did you mean ckpt?")):
        done = subprocess.run([sys.executable, "-X", "importtime", ROOT / script, word],
                              capture_output=True, text=True)
        assert done.returncode == code and says in done.stdout + done.stderr
        assert "torch" not in done.stderr.replace("ckpd", "")


def test_prompts_to_file(ckpt, tmp_path):
    source, out = tmp_path / "F.jsonl", tmp_path / "G.jsonl"
    rows = [{"id": i, "prompt": "word " * (i * 5 % 7), "half": "\ud800é"} for i in range(9)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--ckpt", ckpt, "--prompts", source, "--out", out, "--batch=4", "--seed=3",
             "--max_new_tokens=12"]
    done = run_script("sample.py", *map(str, words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: row[k] for k in ("id", "prompt", "half")} for row in found] == rows
    assert {row["stop"] for row in found} <= {"eos", "length"}
    names = ["F.jsonl", "G.jsonl", "G.jsonl.made.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert "tokens/s" in done.stdout
    model, tokenizer = load_model(ckpt), make_tokenizer("bytes", None)
    for i, row in enumerate(found):  # the same texts one by one
        ids = [tokenizer.bos_id, *tokenizer.encode(row["prompt"])]
        why, text, _ = generate.complete(model, tokenizer, [ids], 12, Sampling(),
                                       [generate.row_seed(3, i)], [])[0]
        assert (why, text) == (row["stop"], row["completion"])
    # again into the same file: nothing to do; another input is refused and the file kept
    same = prompt_files.read_prompts(flags_of("--prompts", source, "--out", out))
    assert same == prompt_files.Prompts(rows, None, True)
    before = out.read_bytes()
    source.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="not made from"):
        run("--ckpt", ckpt, "--prompts", source, "--out", out)
    assert out.read_bytes() == before
    with pytest.raises(UserError, match="would be overwritten"):
        prompt_files.read_prompts(flags_of("--prompts", out, "--out", tmp_path / "H.jsonl"))


def test_a_kill_loses_and_repeats_nothing(ckpt, tmp_path, monkeypatch, capsys):
    """Killed after any batch, and in a line; then on two ranks; the file is that of one go."""
    rows = [{"prompt": "word " * (i * 5 % 8), "i": i} for i in range(30)]
    source, out = tmp_path / "F.jsonl", tmp_path / "G.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--ckpt", ckpt, "--prompts", source, "--max_new_tokens=6", "--batch=3"]
    assert run(*words, "--out", tmp_path / "whole.jsonl") == 0
    made, complete, add = [], generate.complete, prompt_files.Journal.add

    def counted(*args, **_):
        made.extend(args[5])  # the seeds of the rows
        return complete(*args)

    def dies(journal, rows):
        add(journal, rows)
        if len(made) % 9 == 0:
            journal.file.write(b'{"row": 29, "comple')
            journal.file.close()
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "complete", counted)
    monkeypatch.setattr(prompt_files.Journal, "add", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(*words, "--out", out)
        assert not out.exists()
    with pytest.raises(UserError, match=r"begun with temperature=1.0, now it is 0.5"):
        run(*words, "--out", out, "--temperature=0.5")
    monkeypatch.setattr(prompt_files.Journal, "add", add)
    folder = checkpoint.find_checkpoint(str(ckpt))
    done = list(prompt_files.Journal(flags_of(*words, "--out", out), folder).read())
    assert len(done) == len(made) == 18
    for rank in (1, 0):  # rank 0 gathers, so it comes last here
        two, answers = parallel.World(rank, 2), iter([folder, done])
        monkeypatch.setattr(two, "agree", lambda _, answers=answers: next(answers))
        monkeypatch.setattr(two, "sum", lambda values: values)
        monkeypatch.setattr(parallel, "start", lambda *_, two=two, **__: two)
        assert run(*words, "--out", out) == 0
        assert out.exists() == (rank == 0)
    assert sorted(made) == sorted(generate.row_seed(1337, i) for i in range(30))
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "F.jsonl", "G.jsonl", "G.jsonl.made.json", "whole.jsonl", "whole.jsonl.made.json"]


def test_a_file_is_complete_only_if_it_was_made_in_this_way(ckpt, tmp_path, monkeypatch, capsys):
    """By whatever decides the texts, a new flag too: all but those named here count."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "word"}, {"prompt": "a"}]
    Path("F.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = write_checkpoint(tmp_path / "other", tiny(1))
    same = [f"--ckpt={ckpt}", "--prompts=F.jsonl", "--out=G.jsonl", "--max_new_tokens=4",
            "--temperature=0.8"]
    assert run(*same) == 0
    before, checked = Path("G.jsonl").read_bytes(), {"ckpt", "prompts", "out"}
    ways = {"max_new_tokens": 5, "temperature": 0.7, "seed": 8, "stop": "x", "column": "text",
            "num_samples": 2, "top_k": 9, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2,
            "dtype": "bf16", "embed": "mean", "layers": "0", "id": "prompt"}
    assert {f.name for f in dataclasses.fields(sample.Flags)} == checked | set(ways) | {
        "prompt", "base", "batch", "save", "device", "compile", "chat", "system", "tools",
        "template", "serve", "host", "port", "queue", "cors", "ray"}
    Path("T.jsonl").write_text("".join(json.dumps({"text": "a"} | row) + "\n" for row in rows))
    for name, value in ways.items():
        words = [*same, f"--{name}={value}"]
        if name == "column":
            words.append("--prompts=T.jsonl")
        if name == "embed":
            assert run(*words, "--out=E.parquet") == 0
            words += ["--out=E.parquet", "--embed=last"]
        with pytest.raises(UserError, match="exists and was not made from this"):
            run(*words)
    with pytest.raises(UserError, match=r"sha256 of the model=.*, now it is"):
        run(*same, f"--ckpt={other}")
    with pytest.raises(UserError, match=r"sha256 of --prompts=.*, now it is"):
        run(*same, "--prompts=T.jsonl")
    shutil.copytree(ckpt, "copy")  # the same model in another place, the same prompts
    shutil.copy("F.jsonl", "F2.jsonl")
    capsys.readouterr()
    assert run(*same, "--ckpt=copy", "--prompts=F2.jsonl", "--batch=1") == 0
    assert "G.jsonl is complete, with 2 rows" in capsys.readouterr().out
    save_file = {name: w * 2 for name, w in tiny().named_parameters()}  # other weights, same config
    from safetensors.torch import save_file as write
    write(save_file, "copy/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="sha256 of the model"):
        run(*same, "--ckpt=copy")
    assert Path("G.jsonl").read_bytes() == before
    Path("G.jsonl").write_bytes(before + b"{}\n")
    with pytest.raises(UserError, match="changed since"):
        run(*same)
    Path("G.jsonl").unlink()  # what told of it is left, and is written anew
    assert run(*same, "--temperature=0.7") == run(*same, "--temperature=0.7") == 0
    Path("G.jsonl.made.json").unlink()
    with pytest.raises(UserError, match="it is other work"):
        run(*same, "--temperature=0.7")


def test_samples_of_a_row_are_side_by_side(ckpt, tmp_path):
    """Each with its number and with draws of its own."""
    source, out = tmp_path / "F.jsonl", tmp_path / "G.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": "a"}) + "\n" for i in range(3)))
    words = ["--ckpt", ckpt, "--prompts", source, "--out", out, "--max_new_tokens=12"]
    assert run(*words, "--num_samples=4", "--temperature=3", "--batch=5") == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in found] == [(i, n) for i in range(3)
                                                             for n in range(4)]
    assert len({row["completion"] for row in found}) == 12
    recipe = json.loads((tmp_path / "G.jsonl.made.json").read_text())["recipe"]
    assert recipe["num_samples"] == 4 and recipe["dtype"] == "float32"
    shutil.copy(out, source)
    column = ["--column=completion", "--out", tmp_path / "H.jsonl"]
    with pytest.raises(UserError, match=r"F\.jsonl:1: `completion` would be overwritten"):
        run(*words, *column)
    rows = [{"prompt": "a", "sample": "mine"}]
    source.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match=r"F\.jsonl:1: `sample` would be overwritten"):
        run(*words, "--num_samples=2")
    assert run(*words, "--out", tmp_path / "H.jsonl") == 0  # of one text the column is the user's
    assert json.loads((tmp_path / "H.jsonl").read_text())["sample"] == "mine"


def test_a_template_decides_texts_too(ckpt, tmp_path):
    """Of a model folder of others, which has no checksums.json that names it."""
    (tmp_path / "F.jsonl").write_text('{"prompt": "a"}')
    folder = Path(shutil.copytree(ckpt, tmp_path / "model"))
    words = ["--ckpt", folder, "--prompts", tmp_path / "F.jsonl", "--out", tmp_path / "G.jsonl"]
    assert run(*words, "--max_new_tokens=1") == 0
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="sha256 of the model"):
        run(*words, "--max_new_tokens=1")


@pytest.mark.parametrize("text, stops", [
    (r"\n", ["\n"]), (r"\n\n,\tEND", ["\n\n", "\tEND"]), (r"\r\\n", ["\r\\n"]), ("", []),
    ('["a,b", "\\\\d", "\\n"]', ["a,b", "\\d", "\n"]), ("one. two", ["one. two"]),
    ("\n", ["\n"])])
def test_escapes_of_stop(text, stops):
    assert generate.stops_of(text) == stops


@pytest.mark.parametrize("text", [r"\d", "a\\", "a,,b", ",", "[1]", "['a'", "['']", "[INST]"])
def test_what_stop_does_not_understand_is_refused(text):
    with pytest.raises(UserError, match="cannot use --stop"):
        generate.stops_of(text)


def test_stop_at_a_line_break(ckpt, monkeypatch):
    given = []
    monkeypatch.setattr(generate, "complete", lambda *args: given.append(args[6]) or [
        generate.Completion("stop", "", [1])])
    assert run("--ckpt", ckpt, r"--stop=\n") == 0 and given == [["\n"]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_said(tmp_path, capsys, value):
    """No token is drawn from it, greedy or not, alone or in a batch; a run's sample goes on."""
    pytest.importorskip("pyarrow")
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    folder = write_checkpoint(tmp_path / "model", model)
    (tmp_path / "F.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    batch = [f"--prompts={tmp_path}/F.jsonl", "--out"]
    for words in (["--temperature=0"], ["--top_k=5"], ["--num_samples=2"],
                  [*batch, tmp_path / "G.jsonl"], [*batch, tmp_path / "G.parquet", "--embed=mean"]):
        with pytest.raises(UserError, match="is not finite"):
            run("--ckpt", folder, *words)
    assert not (tmp_path / "G.jsonl").exists() and not (tmp_path / "G.parquet").exists()
    config = Settings(sample_prompt="ab", block_size=48)
    samples = generate.RunSamples(config, make_tokenizer("bytes", None))
    assert samples.draw(model) == {"prompt": "ab", "completion": "", "stop": "not finite"}
    with pytest.raises(UserError, match=r"^what the model"):  # and not: it cannot be compiled
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda function, **_: function)
            generate.compile_step(model, 2, 9, True)


def test_what_has_no_effect_is_said(ckpt, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    (tmp_path / "F.jsonl").write_text('{"prompt": "a"}\n')
    states = [f"--prompts={tmp_path}/F.jsonl", f"--out={tmp_path}/G.parquet", "--embed=mean"]
    for words, said in ((["--layers=0"], "layers"), (["--column=text", "--prompt=a"], "column"),
                        ([*states, "--seed=1", "--temperature=0"], "seed, temperature")):
        assert run("--ckpt", ckpt, *words) == 0
        assert f"without effect here: {said}\n" in capsys.readouterr().out
    assert run("--ckpt", ckpt, "--max_new_tokens=1", "--temperature=0") == 0
    assert "without effect" not in capsys.readouterr().out


def test_flags_at_their_bounds(ckpt):
    """Whatever is in its range gives texts or one line."""
    for words in (["--temperature=1e-30"], ["--temperature=1e-45"], ["--temperature=1e-320"],
                  ["--temperature=0"]):
        found = generate.generate(tiny(), PROMPTS, 20, flags_of(*words), [0] * 4)
        assert found == generate.generate(tiny(), PROMPTS, 20, GREEDY, [0] * 4), words
    for word in ("temperature=1e30", "temperature=1e300", "top_k=1000000000000", "top_p=0",
                 "min_p=1", "min_p=0", "repetition_penalty=1e3", "repetition_penalty=1e-3",
                 "max_new_tokens=1000000000000", f"seed={2 ** 63 - 1}", "batch=1000000000000"):
        assert run("--ckpt", ckpt, f"--{word}", "--num_samples=3", "--prompt=word") == 0, word


def test_kinds_of_files_go_by_their_names(ckpt, tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    Path("F.TXT").write_text("a\nb\n")
    words = ["--ckpt", ckpt, "--max_new_tokens=3"]
    assert run(*words, "--prompts=F.TXT", "--out=G.PARQUET") == 0
    assert pq.read_table("G.PARQUET")["prompt"].to_pylist() == ["a", "b"]
    assert run(*words, "--prompts=G.PARQUET", "--out=H.parquet", "--embed=mean") == 0
    for place, says in (("G.csv", "--out takes a .jsonl or .parquet, not a .csv"),
                        ("G.txt", "not a .txt"), ("G.json", "not a .json")):
        with pytest.raises(UserError, match=says):
            run(*words, "--prompts=F.TXT", f"--out={place}")
    shutil.copy("F.TXT", "F.csv")
    with pytest.raises(UserError, match=r"F.csv:1 is not a JSON object"):
        run(*words, "--prompts=F.csv", "--out=G.jsonl")
    Path("link.jsonl").symlink_to("nowhere/G.jsonl")
    Path("folder.jsonl").mkdir()
    for place in ("link.jsonl", "folder.jsonl", "F.TXT/G.jsonl"):
        with pytest.raises(UserError, match="is not a file in a folder that exists"):
            run(*words, "--prompts=F.TXT", f"--out={place}")
    assert Path("link.jsonl").is_symlink() and not list(Path().glob("*.part-*"))


def test_txt_and_parquet(ckpt, tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    Path("F.txt").write_bytes("a\r\n\nü \n".encode())
    words = ["--ckpt", ckpt, "--max_new_tokens=3", "--temperature=0"]
    assert run(*words, "--prompts=F.txt", "--out=G.jsonl") == 0
    found = [json.loads(line) for line in Path("G.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["a", "", "ü "]
    day = datetime.date(2026, 11, 1)
    table = pa.table({"n": pa.array([3, None], pa.int16()), "text": ["a", "ü "], "day": [day, day]})
    pq.write_table(table, "F.parquet")
    assert run(*words, "--prompts=F.parquet", "--out=G.parquet", "--column=text",
               "--num_samples=2") == 0
    made = pq.read_table("G.parquet")
    assert made["sample"].to_pylist() == [0, 1, 0, 1]
    assert made.drop_columns(["sample", "completion", "stop"]).equals(table.take([0, 0, 1, 1]))
    assert made["completion"].to_pylist() == [found[i]["completion"] for i in (0, 0, 2, 2)]
    before = Path("G.parquet").read_bytes()
    assert run(*words, "--prompts=F.parquet", "--out=G.parquet", "--column=text",
               "--num_samples=2") == 0  # nothing to do
    with pytest.raises(UserError, match="not made from"):
        run(*words, "--prompts=F.txt", "--out=G.parquet")
    assert Path("G.parquet").read_bytes() == before
    with pytest.raises(UserError, match=r"do not fit into G2\.jsonl.*date"):
        run(*words, "--prompts=F.parquet", "--out=G2.jsonl", "--column=text")
    with pytest.raises(UserError, match="no text in a column `prompt`; its columns are: n, text"):
        run(*words, "--prompts=F.parquet", "--out=G2.parquet")
    Path("F.parquet").write_bytes(Path("F.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged or cut short"):
        run(*words, "--prompts=F.parquet", "--out=G2.parquet")
    Path("F.jsonl").write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "y": "z"}\n')
    assert run(*words, "--prompts=F.jsonl", "--out=H.parquet") == 0
    rows = pq.read_table("H.parquet").to_pylist()
    assert [(row["prompt"], row["x"], row["y"]) for row in rows] == [("a", 1, None),
                                                                     ("b", None, "z")]
    Path("F.jsonl").write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "z"}\n')
    with pytest.raises(UserError, match="do not fit into"):
        run(*words, "--prompts=F.jsonl", "--out=H2.parquet")
    assert not list(Path().glob("*2.*"))


@pytest.mark.parametrize("pool, layers, which", [
    ("mean", "-1", [2]), ("mean", "-2:", [1, 2]), ("last", ":", [0, 1, 2]), ("last", "1:2", [1]),
    ("mean", "0", [0])])
def test_embeddings_are_those_of_transformers(ckpt, tmp_path, pool, layers, which):
    pq = pytest.importorskip("pyarrow.parquet")
    theirs = pytest.importorskip("transformers").AutoModel.from_pretrained(ckpt)
    texts = ["a" * 47, "", "seven"]
    (tmp_path / "F.jsonl").write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n"
                                              for i, text in enumerate(texts)))
    assert run("--ckpt", ckpt, f"--prompts={tmp_path}/F.jsonl", f"--out={tmp_path}/G.parquet",
               f"--embed={pool}", f"--layers={layers}", f"--batch={len(which) + 1}") == 0
    rows = pq.read_table(tmp_path / "G.parquet").to_pylist()
    assert [(row["id"], row["prompt"]) for row in rows] == list(enumerate(texts))
    for row in rows:
        ids = torch.tensor([[256, *row["prompt"].encode()]])
        with torch.no_grad():
            states = torch.stack(theirs(ids, output_hidden_states=True).hidden_states)[which, 0]
        want = (states.mean(1) if pool == "mean" else states[:, -1]).mean(0)
        got = torch.tensor(row["embedding"])
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("source", ["F.jsonl", "F.parquet"])
def test_states_by_id_are_the_embeddings_in_columns_and_alone_as_in_a_batch(ckpt, tmp_path, source):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"client": f"c{i}", "prompt": "ab" * i, "n": i} for i in range(7)]
    (tmp_path / "F.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "F.parquet")
    words = ["--ckpt", ckpt, f"--prompts={tmp_path}/{source}", "--embed=mean", "--device=cpu"]
    assert run(*words, f"--out={tmp_path}/G.parquet", "--batch=1") == 0
    assert run(*words, f"--out={tmp_path}/H.parquet", "--id=client", "--batch=4") == 0
    lists, table = pq.read_table(tmp_path / "G.parquet"), pq.read_table(tmp_path / "H.parquet")
    alone = torch.tensor(lists["embedding"].to_pylist())
    assert table.column_names == ["client", *(f"emb_{i + 1:04d}" for i in range(alone.shape[1]))]
    assert table["client"].to_pylist() == [row["client"] for row in rows]
    columns = torch.tensor([table[name].to_pylist() for name in table.column_names[1:]])
    assert str(table.schema.field("emb_0001").type) == "float"
    assert (columns.T - alone).abs().max() <= 1e-5
    assert run(*words, f"--out={tmp_path}/H.parquet", "--id=client", "--batch=4") == 0  # complete
    with pytest.raises(UserError, match="was not made from this: id=client, now it is n"):
        run(*words, f"--out={tmp_path}/H.parquet", "--id=n")


@pytest.mark.parametrize(("rows", "words", "message"), [
    ([{"prompt": "a"}], (), "F.jsonl:1 has no id in a column `id`"),
    ([{"prompt": "a", "id": 1}, {"prompt": "a", "id": 1.5}], (), "F.jsonl:2 has no id in a column"),
    ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], (), "F.jsonl:2: id 1 is that of row 1"),
    ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "x"}], (), "do not fit into"),
    ([{"prompt": "a", "id": 1}], ("--num_samples=2",), "several rows of an id")])
def test_ids_that_are_none(ckpt, tmp_path, rows, words, message):
    pytest.importorskip("pyarrow")
    (tmp_path / "F.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        run("--ckpt", ckpt, f"--prompts={tmp_path}/F.jsonl", f"--out={tmp_path}/G.parquet",
            "--embed=mean", "--id=id", *words)
    assert message in str(caught.value)


def talk_rows(count: int) -> list[dict]:
    """Questions and results of calls, whose functions have unlike parameters."""
    rows = []
    for i in range(count):
        name, key = ("f", "a") if i % 2 else ("g", "b")
        tool = {"name": name, "parameters": {"type": "object", "properties": {
            key: {"type": "integer"}}}}
        call = {"role": "assistant", "content": "", "tool_calls": [
            {"name": name, "arguments": {key: i}}]}
        asked = [{"role": "user", "content": f"what {i}"}, call, {"role": "tool", "content": "5"}]
        rows.append({"id": i, "messages": asked[:1 + i % 2 * 2], "tools": [tool]})
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".txt":
        path.write_text("".join(row["prompt"] + "\n" for row in rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("source", "out", "count", "kills"), [
    ("F.jsonl", "G.jsonl", 120, 3),
    *(pytest.param(source, out, 500, 6, marks=pytest.mark.slow) for source, out in (
        ("F.jsonl", "G.jsonl"), ("F.parquet", "G.parquet"), ("F.txt", "G.jsonl"),
        ("M.jsonl", "G.jsonl"), ("M.parquet", "G.parquet"), ("M.jsonl", "G.parquet")))])
def test_kills_at_random_moments(tmp_path, source, out, count, kills):
    """Every process is killed, at any moment, and as many others or one go on: the file is that of
    one go, and no row was made twice."""
    rng = random.Random(f"{source} {out} {count}")
    words = with_roles(json.loads(make_tokenizer("bytes").json_bytes), "x")[1]
    folder = write_checkpoint(tmp_path / "model", tiny(block_size=400))
    (folder / "tokenizer.json").write_bytes(words)
    rows = [{"id": i, "prompt": "word " * rng.randrange(8)} for i in range(count)]
    write_rows(tmp_path / source, talk_rows(count) if source[0] == "M" else rows)
    words = ["--ckpt=model", f"--prompts={source}", "--batch=4", "--max_new_tokens=12"]
    done = run_script("sample.py", *words, f"--out=whole{out[1:]}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made, starts = 0, 0
    while not (tmp_path / out).exists():
        several = [TORCHRUN, "--standalone", "--nproc_per_node=2"] if starts % 3 else []
        process = start_fork([*several, ROOT / "sample.py", *words, f"--out={out}"], cwd=tmp_path,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        starts += 1
        if starts <= kills:
            begun = time.time()
            while (starts > 1 and len(rows_of_parts(tmp_path)) <= made and process.poll() is None
                   and time.time() - begun < 600):
                time.sleep(0.005)
            time.sleep(rng.random() * 0.1)
            end_all_below(tmp_path)
        _, error = process.communicate(timeout=600)
        assert starts <= kills or process.returncode == 0, error
        there = rows_of_parts(tmp_path)
        assert len(there) == len(set(there)) >= (0 if (tmp_path / out).exists() else made)
        made = len(there)
    assert starts > 2
    assert (tmp_path / out).read_bytes() == (tmp_path / f"whole{out[1:]}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [source, out, f"{out}.made.json", "model", f"whole{out[1:]}", f"whole{out[1:]}.made.json"])


def rows_of_parts(folder: Path) -> list[int]:
    """The numbers of the rows that stand, whole, in the parts."""
    lines = [line for part in folder.glob("*.part-*")
             for line in part.read_bytes().split(b"\n")[1:-1]]
    return [json.loads(line)["row"] for line in lines]


def test_one_text_and_the_end_of_the_context(ckpt, capsys):
    assert run("--ckpt", ckpt, "--prompt=Hé", "--max_new_tokens=999", "--temperature=0") == 0
    ids = uncached(tiny(), [256, *make_tokenizer("bytes", None).encode("Hé")], 44)
    assert 257 not in ids and max(ids) < 258  # if the weights ever change: choose others here
    text, last, _ = capsys.readouterr().out.rsplit("\n", 2)
    assert text.endswith("\nHé" + make_tokenizer("bytes", None).decode(ids))
    assert last.startswith("44 new tokens in") and "ended where the context ends, at 48" in last


def test_several_texts_are_saved_with_the_run(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoints" / "step_12", tiny())
    (tmp_path / "run.json").write_text("{}")
    for _ in range(2):
        assert run("--ckpt", tmp_path / "checkpoints/step_12", "--num_samples=3", "--save",
                   "--prompt=ab", "--max_new_tokens=5") == 0
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[0]["step"] == 12  # the second time nothing was new
    assert len({row["completion"] for row in rows}) == 3
    assert f"ab{rows[1]['completion']}" in capsys.readouterr().out


@pytest.mark.parametrize("content, words, says", [
    ('{"prompt": "a"}\n{"text": "b", "n": 1}\n', (), "F.jsonl:2 has no text in a column"),
    ('{"prompt": "a"}\n{"prompt": "b', (), "F.jsonl:2 is not a JSON object"),
    (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', (), "F.jsonl:2 is not a JSON object"),
    ("[1]\n", (), "F.jsonl:1 is not a JSON object"),
    ("", (), "has no rows"),
    ('{"prompt": "ok"}\n{"prompt": "' + "x" * 47 + '"}\n', (), "F.jsonl:2: the prompt has 48"),
    (None, (), "no file"),
    ('{"prompt": "a"}\n', ("--prompt=b",), "without --prompt"),
    ('{"prompt": "a"}\n', ("--ckpt=nowhere",), "no folder nowhere"),
    ('{"prompt": "a"}\n', ("--out=nowhere/G.jsonl",), "folder that exists"),
    ('{"prompt": "a"}\n', ("--stop=[1]",), "cannot use"),
    ('{"prompt": "a"}\n', ("extra",), "cannot use 'extra'"),
    ('{"prompt": "a"}\n', ("--column=text",), "in a column `text`; its columns are: prompt"),
    ('{"prompt": "a"}\n', ("--embed=mean",), "writes states, and those to a .parquet"),
    ('{"prompt": "a"}\n', ("--embed=mean", "--out=G.parquet", "--layers=3"), "has 3, 0 to 2"),
    ('{"prompt": "a"}\n', ("--layers=2:1",), "names no states"),
    ("[" * 99999, (), "F.jsonl:1 is not a JSON object"),
    ("\n", (), "has no rows"),
])
def test_bad_input(ckpt, tmp_path, monkeypatch, content, words, says):
    source = tmp_path / "F.jsonl"
    if content is not None:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as problem:
        run(f"--ckpt={ckpt}", f"--prompts={source}", f"--out={tmp_path / 'G.jsonl'}", *words)
    assert says in str(problem.value)
    assert [p.name for p in tmp_path.iterdir()] == ["F.jsonl"] * (content is not None)


# ---- the pieces of decoding by direct calls

def metaspace():
    """A tokenizer that drops the space of a first word, with the tokens of dialogs."""
    from test_chat import made

    return made("strip")


def test_the_seed_of_a_text_is_that_of_its_number():
    """So that a command gives its texts again, also with a later version."""
    assert generate.row_seed(1337, 0) == 3643028952745237382
    assert generate.row_seed(1337, 1) == 6566851171690161626


def test_top_p_of_one_drops_nothing():
    """The sum of many small numbers is more or less than one."""
    logits = torch.randn(2, 60_000, generator=torch.Generator().manual_seed(0))
    assert generate.allowed(logits, Sampling()).isfinite().all()


def test_a_prompt_that_fills_the_context_has_no_answer():
    model, texts = tiny(), [[256] * 48, [256] * 47, [256] * 46]
    found = generate.generate(model, texts, 9, GREEDY, [0] * 3)
    assert [(len(ids), why) for ids, why in found] == [(0, "length"), (1, "length"), (2, "length")]
    assert found[1][0] == uncached(model, texts[1], 1)
    assert found[2][0] == uncached(model, texts[2], 2)


def test_rows_are_left_behind_once_half_have_ended(monkeypatch):
    """And on a CPU a token is looked at before the next is computed."""
    events, step = [], generate.step

    def counted(model, ids, cache):
        events.append(len(ids))
        return step(model, ids, cache)

    def watch(row, token):
        events.append("abcd"[row])
        return events.count("abcd"[row]) == row + 1

    monkeypatch.setattr(generate, "step", counted)
    found = generate.generate(tiny(), PROMPTS, 9, GREEDY, [0] * 4, watch=watch)
    assert [len(ids) for ids, _ in found] == [1, 2, 3, 4]
    assert events == [*"abcd", 4, *"bcd", 2, *"cd", 1, "d"]


def test_a_step_is_compiled_for_a_cache_of_one_size(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    cache, step = generate.compile_step(tiny(), 2, 1, True)
    assert (cache.k.shape[1], cache.k.shape[3], step) == (2, 3, generate.step)  # 3 are tried
    assert asked == [{"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}]

    def fails(*_, **__):
        raise kind("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fails)
    kind = ValueError
    with pytest.raises(UserError, match=r"^--compile=true, but torch.compile fails here \("):
        generate.compile_step(tiny(), 2, 9, True)
    assert capsys.readouterr().out == ""
    assert generate.compile_step(tiny(), 2, 9, False) is None
    said = capsys.readouterr().out
    assert said.startswith("torch.compile fails here (") and said.endswith(
        "); going on without it, slower\n") and "no compiler" in said
    kind = torch.OutOfMemoryError
    with pytest.raises(UserError, match=r"^no memory for 2 rows of 9 tokens; lower --batch$"):
        generate.compile_step(tiny(), 2, 9, False)


@pytest.mark.parametrize(("text", "marks", "count"), [
    ("a", ["ab"], 1), ("ab", ["ab"], 0), ("aab", ["abc"], 2), ("aa", ["aab", "ab"], 2),
    ("ax", ["ab"], 0), ("", ["ab"], 0), ("a", [], 0), ("xaba", ["abab", "z"], 3)])
def test_the_end_of_a_text_that_may_begin_a_mark(text, marks, count):
    assert generate.begun_marks(text, marks) == count


def test_bytes_wait_for_at_most_sixteen_of_a_character(capsys):
    tokenizer = make_tokenizer("bytes", None)
    one = generate.TextStream(tokenizer, [256], [], False)
    for count in range(1, 18):
        assert one.push(0x80) is False
        assert one.text == ("" if count < 16 else generate.HALF * 16), count
    assert one.push() is False and one.text == generate.HALF * 17
    assert one.fresh(True) == one.text and one.fresh(True) == ""
    at_once = generate.TextStream(tokenizer, [], ["ab"], True)
    assert [at_once.push(token) for token in b"ab"] == [False, True] and at_once.text == ""
    assert capsys.readouterr().out == ""


def test_an_answer_is_spelled_by_itself_and_a_text_behind_its_prompt():
    tokenizer = metaspace()
    the, end = tokenizer.encode("the")[-1], tokenizer.encode("a")[-1]
    role = tokenizer.special_ids["<|assistant|>"]
    for prompt, said in (([tokenizer.bos_id, the], " the"), ([tokenizer.bos_id, role], " the"),
                         ([role, the], " the"), ([tokenizer.bos_id], "the"), ([], "the")):
        one = generate.TextStream(tokenizer, prompt, [], False)
        one.push(the), one.push()
        assert one.text == said, prompt
    one = generate.TextStream(tokenizer, [tokenizer.bos_id], [], False)
    for token in (the, tokenizer.eos_id, end):  # one that spells nothing is no beginning
        one.push(token)
    assert one.text == "the a"


@pytest.mark.parametrize(("text", "first", "last"), [
    ("-1", 2, 3), ("0", 0, 1), ("2", 2, 3), ("1:", 1, 3), (":2", 0, 2), (":", 0, 3),
    ("-2:", -2, 3), ("0:1", 0, 1), ("-3", 0, 1), ("1:-1", 1, -1)])
def test_layers_are_counted_as_python_does(text, first, last):
    assert generate.layers_of(text, 3) == slice(first, last)


@pytest.mark.parametrize("text", ["3", "-4", "2:1", "1:1", "x", "", "3:", "1.0", ":x"])
def test_layers_that_are_none(text):
    with pytest.raises(UserError, match=rf"^--layers={text} names no states: the model has 3, 0"):
        generate.layers_of(text, 3)


def test_the_sample_along_a_run(tmp_path, monkeypatch):
    tokenizer, said, rows = make_tokenizer("bytes", None), [], object()
    tokenizer.save(tmp_path)

    def prepared(**changes):
        config = Settings(**{"block_size": 48, "sample_tokens": 5, "sample_prompt": "ab",
                             **changes})
        return generate.samples_of(config, tmp_path, rows, said.append)

    assert prepared(sample_tokens=0) == [] == said
    assert prepared(block_size=1) == []
    assert said == ["no samples along the run: a context of one token has no room for them"]
    for size in (2, 3):
        with pytest.raises(UserError, match=rf"^sample_prompt has 3 tokens, and the context of "
                           rf"{size} must hold it and at least one more; shorten it$"):
            prepared(block_size=size)
    assert len(prepared(block_size=4)) == len(prepared(sample_tokens=1)) == 1
    assert len(prepared(block_size=2, sample_prompt="")) == 1
    [sample] = prepared()
    assert (sample.prompt, sample.shown) == ([256, 97, 98], "ab")
    model, lines = tiny(), []
    log = SimpleNamespace(active=False, say=lines.append,
                          line=lambda *words: lines.append(words))
    sample.add(model, 7, log)
    assert lines == []
    log.active = True
    sample.add(model, 7, log)
    [(stop, text, ids)] = generate.complete(model, tokenizer, [[256, 97, 98]], 5, Sampling(),
                                            [generate.row_seed(Settings().seed, 0)], [])
    row = {"prompt": "ab", "completion": text, "stop": stop}
    assert sample.draw(model) == row and len(ids) <= 5
    assert lines == [("samples.jsonl", {"step": 7} | row),
                     f"step 7: sample {'ab' + text!r:.100}"]
    monkeypatch.setattr(generate.Tokenizer, "load", lambda _: (_ for _ in ()).throw(
        ImportError("tokenizers is not there")))
    assert prepared() == [] and said[-1] == "no samples along the run: tokenizers is not there"


def test_the_sample_along_a_run_on_dialogs(tmp_path, monkeypatch):
    tokenizer = metaspace()
    tokenizer.save(tmp_path)
    opening = [tokenizer.bos_id, tokenizer.special_ids["<|user|>"], *tokenizer.encode("the"),
               tokenizer.special_ids["<|end|>"], tokenizer.special_ids["<|assistant|>"]]

    class Fit(generate.FitRows):
        def __init__(self, masked):
            self.split = SimpleNamespace(masked=masked)

        def opening(self):
            return opening

    def prompt(rows, said):
        config = Settings(block_size=48, sample_tokens=5, sample_prompt=said)
        [found] = generate.samples_of(config, tmp_path, rows, print)
        return found.prompt, found.shown

    chat = chat_of(tokenizer)
    asked = chat.prompt([{"role": "user", "content": "a"}])
    assert prompt(Fit(True), "")[0] == opening
    assert prompt(Fit(True), "")[1].startswith("<s><|user|>")
    assert prompt(Fit(True), "a")[0] == asked
    for rows in (Fit(False), SimpleNamespace(split=SimpleNamespace(masked=True))):
        assert prompt(rows, "a") == ([tokenizer.bos_id, *tokenizer.encode("a")], "a")


def test_a_batch_is_decoded_row_by_row(monkeypatch, capsys):
    model, tokenizer = tiny(), metaspace()
    texts = [generate.Completion("eos", "a", [1, 2]), generate.Completion("length", "b", [1] * 47),
             generate.Completion("length", "c", [1]), generate.Completion("stop", "d", [1] * 47)]
    asked = []
    monkeypatch.setattr(generate, "complete", lambda *words: asked.append(words) or texts)
    flags = flags_of("--max_new_tokens=50", "--seed=3")
    rows = [decoding.Row(i, [256], i == 0) for i in (0, 5, 6, 7)]
    made = decoding.Decoder(flags, model, tokenizer)(rows)
    assert made == ({0: {"completion": "a", "stop": "eos", "message": {
        "role": "assistant", "content": "a"}}, 5: {"completion": "b", "stop": "length"},
        6: {"completion": "c", "stop": "length"}, 7: {"completion": "d", "stop": "stop"}}, 97, 1)
    assert asked == [(model, tokenizer, [[256]] * 4, 50, flags, [
        generate.row_seed(3, i) for i in (0, 5, 6, 7)], [], False, None)]
    flags = flags_of("--embed=last", "--layers=-1")
    made = decoding.Decoder(flags, model, tokenizer)([decoding.Row(4, [256, 1]),
                                                      decoding.Row(2, [256])])
    assert (sorted(made.rows), made.tokens, made.cut) == ([2, 4], 3, 0)
    wanted = generate.embed(model, [[256, 1]], "last", "-1")[0]
    found = torch.tensor(prompt_files.unpacked([made.rows[4]["embedding"]])[0])
    assert torch.allclose(found, wanted, atol=1e-4)
    assert decoding.Row(1, []).is_talk is False
    monkeypatch.undo()
    generate.complete(model, make_tokenizer("bytes", None), [[256]], 3, GREEDY, [0], [])
    assert capsys.readouterr().out == ""  # nothing is shown unless it is asked for


def test_nodes_of_a_cluster_decode_what_this_process_would(ckpt):
    class Cluster:
        def each(self, work, jobs, load, settle):
            decoder = load()
            reports = []
            for number, job in jobs.items():
                yield number, work(decoder, number, job, reports.append)
                assert reports.pop() == 3 and settle([]) is None

    flags = flags_of("--device=cpu", "--dtype=fp32", "--max_new_tokens=3", "--temperature=0")
    jobs = [[decoding.Row(0, [256, 1])], [decoding.Row(1, [256, 2])]]
    found = list(decoding.decoded_on(Cluster(), flags, ckpt, jobs))
    here = decoding.Decoder(flags, load_model(ckpt), make_tokenizer("bytes", None))
    assert found == [here(job) for job in jobs]


# ---- the command by direct calls

FLAGS = {"ckpt": "out", "base": "", "prompt": "", "prompts": "", "template": "", "column": "prompt",
         "out": "", "max_new_tokens": 256, "num_samples": 1, "stop": "", "seed": 1337, "batch": 16,
         "embed": "none", "id": "", "layers": "-1", "save": False, "device": "auto",
         "dtype": "auto", "chat": False, "system": "", "tools": "", "compile": "auto", "ray": "",
         "serve": False, "host": "127.0.0.1", "port": 8000, "queue": 256, "cors": ""}


def test_flags_have_their_defaults_and_bounds():
    assert vars(sample.Flags()) == FLAGS | vars(Sampling())
    for name, low, high in (("max_new_tokens", 1, None), ("num_samples", 1, None),
                            ("seed", 0, None), ("batch", 1, None), ("port", 0, 65535),
                            ("queue", 1, None)):
        for value in (low, high or 10**9):
            assert getattr(flags_of(f"--{name}={value}"), name) == value
        for value in (low - 1, *([high + 1] if high else [])):
            with pytest.raises(UserError, match=name):
                flags_of(f"--{name}={value}")


ROWS = "--prompts F.jsonl and --out G.jsonl go together, without --prompt"
SHARED = "--ray shares the rows of --prompts among nodes, without --compile=true"
STATES = "--embed writes states, and those to a .parquet (--out), without --save"
FILLED = "--template is for texts that are made of --prompts F.jsonl"
OFFERED = "--system and --tools are for --chat; rows of messages take them too"


@pytest.mark.parametrize(("words", "message"), [
    (["--queue=5"], "--queue is for --serve"), (["--host=a", "--cors=b"], "--cors is for --serve"),
    (["--template=T"], FILLED), (["--template=T", "--prompts=F", "--embed=mean"], FILLED),
    (["--prompts=F"], ROWS), (["--out=G"], ROWS), (["--prompts=F", "--out=G", "--prompt=a"], ROWS),
    (["--ray"], SHARED), (["--ray=a:1", "--prompts=F", "--out=G", "--compile=true"], SHARED),
    (["--embed=mean"], STATES), (["--embed=mean", "--prompts=F", "--out=G.jsonl"], STATES),
    (["--embed=mean", "--prompts=F", "--out=G.parquet", "--save"], STATES),
    (["--embed=mean", "--out=G.parquet"], ROWS),
    (["--system=a"], OFFERED), (["--tools=nowhere.py"], OFFERED),
    (["--system=a", "--tools=nowhere.py"], OFFERED),
    *(([f"--{name}={value}", "--chat"], f"--{name} has no effect on --chat") for name, value in (
        ("prompt", "a"), ("prompts", "F"), ("template", "T"), ("column", "c"), ("out", "G"),
        ("num_samples", 2), ("batch", 2), ("embed", "last"), ("layers", "0"), ("id", "c"),
        ("save", "true"), ("compile", "true"), ("ray", "a:1"))),
    *(([f"--{name}={value}", "--serve"], f"--{name} has no effect on --serve; requests say how "
       "they are drawn") for name, value in (("seed", 5), ("top_k", 3), ("max_new_tokens", 4),
                                             ("system", "a"), ("tools", "f.py")))])
def test_what_does_not_go_together(words, message):
    with pytest.raises(UserError) as caught:
        run(*words)
    assert str(caught.value) == message


@pytest.fixture
def two_ranks(monkeypatch):
    """The first of two ranks, without the other."""
    world = parallel.World(0, 2)
    world.started = []
    monkeypatch.setattr(parallel, "start", lambda device, _: world.started.append(device) or world)
    monkeypatch.setattr(world, "agree", lambda value: world.answers.pop(0))
    monkeypatch.setattr(world, "sum", lambda values: values * 2)
    return world


def test_several_processes_share_a_file_alone(two_ranks, ckpt, tmp_path, capsys, monkeypatch):
    pytest.importorskip("uvicorn")
    two_ranks.answers = [ckpt, []] * 2
    for words, message in ((["--prompt=a"], "several processes share a file"),
                           (["--chat"], "--chat is for one process"),
                           (["--serve", "--port=0"], "--serve is for one process")):
        with pytest.raises(UserError, match=message):
            run("--ckpt", ckpt, *words)
    (tmp_path / "F.jsonl").write_text('{"prompt": "a"}\n' * 4)
    words = ["--ckpt", ckpt, "--prompts", tmp_path / "F.jsonl", "--out", tmp_path / "G.jsonl",
             "--batch=1", "--layers=0", "--temperature=0", "--max_new_tokens=2"]
    with pytest.raises(UserError, match="whose nodes share it by themselves"):
        run(*words, "--ray=a:1")
    assert two_ranks.started == ["auto", "auto", "auto", "cpu"]  # the nodes of a cluster have GPUs
    two_ranks.rank = 1
    assert run(*words) == 0
    assert not (tmp_path / "G.jsonl").exists() and capsys.readouterr().out == ""
    two_ranks.rank, two_ranks.answers = 0, [ckpt, [9]]
    assert run(*words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[::2] == ["without effect here: layers", "1 of 4 rows were done before"]
    assert said[3].startswith("8 new tokens in ")  # twice those of this rank
    assert len((tmp_path / "G.jsonl").read_text().splitlines()) == 4
    two_ranks.rank, two_ranks.answers = 1, [ckpt, []] * 2
    assert run(*words) == 0 and capsys.readouterr().out == ""
    two_ranks.rank = 0
    (tmp_path / "G.jsonl.part-0").write_text("")
    assert run(*words) == 0 and not (tmp_path / "G.jsonl.part-0").exists()


def test_a_talk_and_a_server_get_the_model_and_what_was_asked(tmp_path, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn")
    from plainllama.generation import serving

    plain = write_checkpoint(tmp_path / "out" / "r" / "checkpoints" / "step_3", tiny())
    tuned = write_checkpoint(tmp_path / "tuned", tiny())
    Tokenizer(*with_roles(json.loads((tuned / "tokenizer.json").read_text()), "x"), "x").save(tuned)
    (plain.parent.parent / "run.json").write_text("{}")
    (tmp_path / "f.py").write_text("def add(a: int) -> int:\n    return a\n")
    talks, served = [], []
    monkeypatch.setattr(sample, "talk", lambda *words: talks.append(words) or 3)
    monkeypatch.setattr(serving, "serve", lambda *words: served.append(words) or 4)
    here = ["--device=cpu", "--dtype=fp32"]
    assert run("--ckpt", tuned, "--chat", *here) == 3
    assert run("--ckpt", tuned, "--chat", f"--tools={tmp_path}/f.py", "--seed=2", *here) == 3
    for (model, chat, flags, tools), there in zip(talks, (False, True), strict=True):
        assert isinstance(model, LLaMA) and model.compute_dtype == torch.float32
        assert chat.tokenizer.vocab_size == 263
        assert (tools is not None) == there and flags.seed == (2 if there else 1337)
    monkeypatch.setenv(serving.KEY, "secret")
    for folder, name, chat in ((plain, "r", False), (tuned, "tuned", True)):
        assert run("--ckpt", folder, "--serve", "--port=0", "--batch=2", "--queue=5",
                   "--host=127.0.0.1", "--cors=http://a", *here) == 4
        service, place = served.pop()
        service.batch.close()
        assert (service.model.name, service.model.chat is not None) == (name, chat)
        assert (service.model.block_size, service.key, service.batch.queue) == (48, "secret", 5)
        assert len(service.batch.slots.all) == 2 and place.fileno() == -1  # closed behind it
        assert service.batch.vocab_size == service.model.tokenizer.vocab_size
    assert uvicorn


@pytest.mark.parametrize(("compile", "out", "device", "jobs", "must"), [
    ("auto", "G", "cuda", 1, False), ("true", "", "cpu", 1, True), ("true", "G", "cuda", 1, True),
    ("auto", "G", "cpu", 1, None), ("auto", "", "cuda", 1, None), ("false", "G", "cuda", 1, None),
    ("true", "G", "cuda", 0, None)])
def test_when_a_step_is_compiled(monkeypatch, capsys, compile, out, device, jobs, must):
    asked = []
    monkeypatch.setattr(generate, "compile_step", lambda *words: asked.append(words[1:]))
    monkeypatch.setattr(sample, "Decoder", lambda *words: lambda job: (words[3:], job))
    flags = flags_of(f"--compile={compile}", "--max_new_tokens=9", "--batch=3", "--prompt=hey")
    flags.out = out
    world = SimpleNamespace(device=SimpleNamespace(type=device))
    batches = [[decoding.Row(0, [256] * 5), decoding.Row(1, [256])], [decoding.Row(2, [256])]]
    made = list(sample.decoded_here(flags, tiny(), None, batches * jobs, world, True))
    assert asked == ([] if must is None else [(3, 14, must)])
    assert made == [((None, True), job) for job in batches * jobs]
    assert capsys.readouterr().out == "hey\n"
    flags.max_new_tokens, flags.compile = 99, "true"
    assert len(list(sample.decoded_here(flags, tiny(), None, batches, world, False))) == 2
    assert asked[-1] == (3, 48, True) and capsys.readouterr().out == ""
    flags.embed, asked[:] = "mean", []
    assert list(sample.decoded_here(flags, tiny(), None, batches, world, False)) and not asked


@pytest.mark.parametrize(("embed", "out", "cut", "line"), [
    ("none", "", 0, "6 new tokens in 4.00 s: 1.5 tokens/s"),
    ("none", "G", 2, "6 new tokens in 4.00 s: 1.5 tokens/s; 3 ended where the context ends, at 48 "
     "tokens -> G"), ("mean", "G", 0, "6 tokens in 4.00 s: 1.5 tokens/s -> G")])
def test_what_is_made_is_kept_and_counted(monkeypatch, embed, out, cut, line):
    ticks, shown = iter([10.0, 14.0]), []
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    class Progress:
        def __init__(self, *words):
            shown.append(words)

        def add(self, n):
            shown.append(n)

        def close(self):
            shown.append("closed")

    monkeypatch.setattr(sample, "Progress", Progress)
    flags = flags_of(f"--embed={embed}")
    flags.out = out
    results = [decoding.Made({0: {"a": 1}, 2: {"a": 2}}, 4, cut),
               decoding.Made({1: {"a": 3}}, 2, cut // 2)]
    made, said = sample.gather(flags, iter(results), 3, None, parallel.World(), 48, False)
    assert made == {0: {"a": 1}, 1: {"a": 3}, 2: {"a": 2}} and said == line
    assert shown == [("embedding" if embed == "mean" else "sampling", 3, "rows", True), 2, 1,
                     "closed"]
    for rank, quiet in ((1, False), (0, True)):
        ticks = iter([10.0, 14.0])
        world = parallel.World(rank, 2)
        world.sum = lambda values: values
        sample.gather(flags, iter([]), 3, None, world, 48, quiet)
        assert shown[-2][3] is False


def test_the_ids_of_prompts():
    tokenizer = metaspace()
    chat, ask = chat_of(tokenizer), [{"role": "user", "content": "a"}]
    rows = [{"prompt": "the"}, {"messages": ask}]
    prompts = prompt_files.Prompts([row for row in rows for _ in range(2)])
    flags = flags_of("--num_samples=2")

    def ids(size=48, chat=chat, schemas=(), **changes):
        for name, value in changes.items():
            setattr(flags, name, value)
        return sample.prompt_ids(flags, prompts, prompts.talks("prompt"), chat, list(schemas),
                                 tokenizer, size)

    text, talk = [tokenizer.bos_id, *tokenizer.encode("the")], chat.prompt(ask)
    assert ids() == [text, text, talk, talk]
    assert ids(system="a")[2] == chat.prompt([{"role": "system", "content": "a"}, *ask])
    most = len(talk)
    assert ids(most + 1, system="") == [text, text, talk, talk]
    for where in ("", "F.jsonl:2: "):
        flags.prompts = where[:7]
        with pytest.raises(UserError) as caught:
            ids(most)
        assert str(caught.value) == (f"{where}the prompt has {most} tokens, room is for "
                                     f"{most - 1} in a context of {most}")
    assert ids(most, embed="mean") == [text, text, talk, talk]
    with pytest.raises(UserError, match=f"room is for {most - 1} in a context of {most - 1}$"):
        ids(most - 1)
    assert ids(48, None)[2] == [tokenizer.bos_id, *tokenizer.encode("")]


# ---- files of prompts by direct calls

@pytest.mark.parametrize(("name", "data", "rows"), [
    ("F.jsonl", '{"a": 1}\n{"b": "é"}\n\n \n'.encode(), [{"a": 1}, {"b": "é"}]),
    ("F.JSONL", b'\xef\xbb\xbf{"a": 1}', [{"a": 1}]), ("F", b"", []), ("F.jsonl", b" \n", []),
    ("F.txt", b"", []), ("F.TXT", b"\n", [{"x": ""}]), ("F.txt", b"a", [{"x": "a"}]),
    ("F.txt", b"a\r\n\n b \n\n", [{"x": "a"}, {"x": ""}, {"x": " b "}, {"x": ""}])])
def test_rows_of_a_file(tmp_path, name, data, rows):
    (tmp_path / name).write_bytes(data)
    assert prompt_files.read_file(tmp_path / name, "x") == (rows, None)


@pytest.mark.parametrize(("name", "data", "says"), [
    ("F.txt", b"a\n\xff", ":2 is not text: "), ("F.jsonl", b'{"a": 1}\n[]', ":2 is not a JSON obj"),
    ("F.jsonl", b"\n{}", ":1 is not a JSON object: ")])
def test_rows_that_are_none(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        prompt_files.read_file(tmp_path / name, "x")
    assert str(caught.value).startswith(f"{tmp_path / name}{says}")


def test_which_rows_are_talks():
    talk, rows = {"messages": [], "x": None}, [{"p": "a"}, {"messages": [], "x": None}]
    prompts = prompt_files.Prompts(rows)
    assert prompts.talks("p") == prompts.talks("p", False) == [None, talk]
    assert [prompts.text(row, "p") for row in rows] == ["a", ""]
    assert prompts._replace(table=0).talks("p") == [None, {"messages": []}]
    assert prompts._replace(ids=(1, 2)).talks("p") == [None, None]
    filled = prompts._replace(template=["<", "x", ">"], rows=[{"x": 5, "p": "a"}])
    assert filled.text(filled.rows[0], "p") == "<5>"
    asked = [{"messages": [{"role": "user", "content": "<5>"}]}]
    assert (filled.talks("p"), filled.talks("p", False)) == (asked, [None])
    assert filled._replace(ids=(1,)).talks("p") == [None]
    empty = prompt_files.Prompts([])
    assert (empty.complete, empty.id, empty.ids, empty.manifest) == (False, "", (), None)


def test_what_was_made_is_written_beside_the_rows(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")

    def written(kind, prompts, made):
        with open(tmp_path / "G", "wb") as file:
            prompts.write_to(file, kind, made)
        if kind.lower() != ".parquet":
            return (tmp_path / "G").read_text()
        return pq.read_table(tmp_path / "G").to_pylist()

    rows = [{"a": 1, "é": "x"}, {"a": 2, "o": {"k": 1}}]
    states = [prompt_files.pack(torch.tensor(state)) for state in ([1.0, 2.0], [3.0, -4.5])]
    message = {"role": "assistant", "content": "é"}
    made = [{"embedding": states[0], "message": message, "lost": [], "n": 1},
            {"embedding": states[1], "message": None, "lost": [], "n": 2}]
    assert written("", prompt_files.Prompts(rows), [{"a": 9}, {"b": "é"}]) == (
        '{"a": 9, "é": "x"}\n{"a": 2, "o": {"k": 1}, "b": "é"}\n')
    assert written(".PARQUET", prompt_files.Prompts(rows), made) == [
        {"a": 1, "é": "x", "o": None, "embedding": [1.0, 2.0], "lost": [], "n": 1,
         "message": '{"role": "assistant", "content": "é"}'},
        {"a": 2, "é": None, "o": {"k": 1}, "embedding": [3.0, -4.5], "lost": [], "n": 2,
         "message": None}]
    by_id = prompt_files.Prompts(rows, id="a")
    assert written(".parquet", by_id, made) == [
        {"a": 1, "emb_0001": 1.0, "emb_0002": 2.0}, {"a": 2, "emb_0001": 3.0, "emb_0002": -4.5}]
    assert written(".parquet", by_id, [{}, {}]) == [{"a": 1}, {"a": 2}]
    column = prompt_files.column_of
    assert column([1, None]).to_pylist() == [1, None] and column([[1], []]).to_pylist() == [[1], []]
    assert column([{"a": 1}, None, {"b": 2}]) == ['{"a": 1}', None, '{"b": 2}']


def read(*words) -> prompt_files.Prompts:
    return prompt_files.read_prompts(flags_of(*words))


def test_prompts_of_a_command(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    assert read("--prompt=a", "--num_samples=2", "--column=c") == ([{"c": "a"}] * 2, None, False,
                                                                   "", (), None, None)
    Path("F.jsonl").write_text('{"prompt": "a", "n": 1}\n{"messages": [], "n": 2}\n')
    Path("T.txt").write_text("of {n}")
    Path("G").write_text("there")
    rows = [{"prompt": "a", "n": 1}, {"messages": [], "n": 2}]
    words = ["--prompts=F.jsonl", "--out=H"]
    assert read(*words) == (rows, None, False, "", (), None, None)
    assert read(*words, "--out=G", "--num_samples=2") == (
        [rows[0], rows[0], rows[1], rows[1]], None, True, "", (), None, None)
    assert read(*words, "--id=n").id == ""  # of states alone
    assert read(*words, "--out=H.parquet", "--id=n", "--embed=mean").id == "n"
    assert read(*words, "--template=T.txt").template == ["of ", "n", ""]
    Path("E.jsonl").write_text('{"prompt": "a", "completion": "b", "sample": 1, "lost": 2}')
    for more, taken in (([], "completion"), (["--num_samples=2", "--column=prompt"], "completion"),
                        (["--template=T.txt"], "")):
        with pytest.raises(UserError) as caught:
            read("--prompts=E.jsonl", "--out=H", *more)
        assert str(caught.value) == (
            f"E.jsonl:1: `{taken}` would be overwritten; rename it" if taken else
            "E.jsonl:1 has no 'n', which --template names; its fields are: prompt, completion, "
            "sample, lost ({{ is a brace)")
    Path("E.jsonl").write_text('{"prompt": "a", "n": 1, "lost": 2}')
    assert len(read("--prompts=E.jsonl", "--out=H").rows) == 1
    with pytest.raises(UserError, match="`lost` would be overwritten"):
        read("--prompts=E.jsonl", "--out=H", "--template=T.txt")
    Path("E.jsonl").write_text('{"prompt": "a", "embedding": 2, "stop": 1}')
    for more, taken in ((["--embed=mean", "--out=H.parquet"], "embedding"), (["--out=H"], "stop")):
        with pytest.raises(UserError, match=f"`{taken}` would be overwritten"):
            read("--prompts=E.jsonl", *more)
    monkeypatch.setattr(prompt_files.importlib.util, "find_spec", lambda name: None)
    for more in (["--prompts=F.jsonl", "--out=H.parquet"], ["--prompts=F.parquet", "--out=H"]):
        with pytest.raises(UserError, match=r"^a .parquet needs pyarrow: "):
            read(*more)
    assert len(read(*words).rows) == 2


@pytest.fixture
def table_set(tmp_path, monkeypatch):
    """A prepared set of tables: the texts of two clients, the first with its end."""
    monkeypatch.chdir(tmp_path)
    manifest = {"recipe": {"documents": "table", "sources": [{"id": "client"}], "block_size": 48},
                "tokenizer": {"eos": 257, "sha256": "aa"}, "cut": {"clients to block_size 48": 3},
                "source": [{"renderer": "r1"}]}

    class Split:
        def __init__(self, folder, split, manifest):
            self.split, self.folder = split, folder

        def clients(self):
            return ["c1", 7] if self.split == "train" else ["c3"]

        def bounds(self):
            return torch.tensor([0, 3, 5] if self.split == "train" else [0, 1])

        def read(self, start, end):
            return torch.tensor([256, 97, 257, 256, 98])[start:end]

    monkeypatch.setattr(prompt_files.shards, "Split", Split)
    monkeypatch.setattr(prompt_files.shards, "read_manifest", lambda folder: manifest)
    (tmp_path / "set").mkdir()
    make_tokenizer("bytes", None).save(tmp_path / "set")
    return manifest


def test_clients_of_a_prepared_set(table_set, tmp_path):
    pytest.importorskip("pyarrow")
    words = ["--prompts=set", "--embed=mean"]
    rows = [{"client": "c1"}, {"client": 7}, {"client": "c3"}]
    for more in ([], ["--id=client"]):
        assert read(*words, "--out=G.parquet", *more) == (
            rows, None, False, "client", ([256, 97], [256, 98], [256]), table_set, None)
    (tmp_path / "G.parquet").write_text("")
    assert read(*words, "--out=G.parquet").complete is True
    (tmp_path / "D").mkdir()
    none = (r"^--prompts=set is a data set; what can be made of one is --embed, once for each "
            r"client, or --template, of a set of tables \(documents=table\)$")
    for more, message in (
            (["--out=G.parquet", "--id=n"], "^--id=n: the clients of set go by client; leave --id "
             "out$"), (["--out=D"], "^--out D is not a file in a folder that exists$"),
            (["--out=no/G"], "^--out no/G is not a file in a folder that exists$"),
            (["--out=G.parquet", "--num_samples=2"], none), (["--out=G", "--embed=none"], none)):
        with pytest.raises(UserError, match=message):
            read(*words, *more)
    (tmp_path / "T.txt").write_text("{id} {split} {text}")
    found = read("--prompts=set", "--template=T.txt", "--out=G")
    assert found.rows == [{"id": "c1", "split": "train", "text": "a"},
                          {"id": 7, "split": "train", "text": "b"},
                          {"id": "c3", "split": "val", "text": ""}]
    table_set["recipe"]["documents"] = "chat"
    for more in (["--out=G.parquet", "--embed=mean"], ["--template=T.txt", "--out=G"]):
        with pytest.raises(UserError, match=none):
            read("--prompts=set", *more)


def test_a_set_that_the_model_did_not_learn_is_refused(table_set, tmp_path, capsys):
    def refuse(size=48, sha256="aa", run=tmp_path) -> str:
        prompt_files.refuse_other_set(prompt_files.Prompts([], manifest=table_set), sha256, run,
                                      size)
        return capsys.readouterr().out

    cut = ("note: the set's clients are cut to 48 tokens, and the model reads 49; prepare it with "
           "that block_size to keep more of them\n")
    nameless = ("note: the model's run names no renderer of tables, so that nothing says whether "
                "it has learned to read this set\n")
    assert (refuse(), refuse(49), refuse(run=None)) == (nameless, cut + nameless, nameless)
    write_json(tmp_path / "run.json", {"data": {"renderers": ["r1"]}})
    assert (refuse(), refuse(47), refuse(run=None)) == ("", "", nameless)
    write_json(tmp_path / "run.json", {"data": {"renderers": ["r1", "r2"]}})
    assert (refuse(), refuse(49)) == ("", cut)
    table_set["cut"] = {}
    assert refuse(49) == ""
    with pytest.raises(UserError, match=r"^--prompts is a set of another tokenizer than the model"):
        refuse(sha256="bb")
    table_set["source"] += [{"renderer": "r3"}]
    with pytest.raises(UserError, match="tables are written otherwise than those that the model"):
        refuse()


@pytest.mark.parametrize(("ids", "message"), [
    ([1, "1", "a", 0, -5], ""), ([1, True], "F:2 has no id in a column `c`: a text or a whole "
                                 "number (--id names another)"),
    ([""], "F:1 has no id in a column `c`: a text or a whole number (--id names another)"),
    ([1.0], "F:1 has no id in a column `c`: a text or a whole number (--id names another)"),
    ([3, "a", 3], "F:3: c 3 is that of row 1 too; an id has one row")])
def test_ids_are_texts_or_whole_numbers_and_differ(ids, message):
    with pytest.raises(UserError) if message else contextlib.nullcontext() as caught:
        prompt_files.check_ids(Path("F"), ids, "c")
    assert not message or str(caught.value) == message


def test_the_journal_of_a_batch(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("F.txt", "T.txt", "f.py", "set/manifest.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    flags = flags_of("--prompts=F.txt", "--out=G*.jsonl", "--seed=5")

    def short(name):
        return sha256(Path(name))[:16]

    def recipe(**changes):
        made = flags_of("--prompts=F.txt", "--out=G*.jsonl", "--seed=5")
        for name, value in changes.items():
            setattr(made, name, value)
        return prompt_files.Journal(made, ckpt, torch.bfloat16).recipe

    plain = {"sha256 of the model": recipe()["sha256 of the model"],
             "sha256 of --prompts": short("F.txt"), "sha256 of --tools": "", "column": "prompt",
             "max_new_tokens": 256, "num_samples": 1, "stop": [], "seed": 5, "embed": "none",
             "id": "", "layers": "-1", "system": "", "dtype": "bfloat16", **vars(Sampling())}
    assert recipe() == plain and len(plain["sha256 of the model"]) == 16
    assert recipe(tools="f.py", template="T.txt", prompts="set") == plain | {
        "sha256 of --tools": short("f.py"), "sha256 of --template": short("T.txt"),
        "sha256 of --prompts": short("set/manifest.json")}
    journal = prompt_files.Journal(flags, ckpt)
    assert journal.recipe == plain | {"dtype": "float32"}
    assert journal.other(journal.recipe) == ""
    assert journal.other(journal.recipe | {"seed": 6}) == "seed=6, now it is 5"
    assert journal.other(journal.recipe | {"x": 1}) == "x=1, now it is "
    assert journal.other({**journal.recipe, "top_k": ""}) == "top_k=, now it is 0"
    Path("Gx.jsonl.part-0").write_text("of another file")
    journal.begin(0)
    journal.add({2: {"completion": "é"}}), journal.add({0: {"completion": "b"}})
    journal.file.close()
    assert [path.name for path in journal.parts()] == ["G*.jsonl.part-0"]
    lines = Path("G*.jsonl.part-0").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        journal.recipe, {"row": 2, "completion": "é"}, {"row": 0, "completion": "b"}]
    with open("G*.jsonl.part-0", "a") as part:
        part.write('{"row": 1')
    assert journal.read() == {2: {"completion": "é"}, 0: {"completion": "b"}}
    assert Path("G*.jsonl.part-0").read_text().splitlines() == lines
    journal.begin(1)
    journal.add({1: {"completion": "c"}})
    journal.file.close()
    rows = [{"prompt": "p"}] * 3
    made = journal.finish(prompt_files.Prompts(rows))
    assert made == {2: {"completion": "é"}, 0: {"completion": "b"}, 1: {"completion": "c"}}
    assert Path("G*.jsonl").read_text() == "".join(
        f'{{"prompt": "p", "completion": "{text}"}}\n' for text in "bcé")
    assert journal.parts() == [] and Path("Gx.jsonl.part-0").exists()
    assert set(json.loads(Path("G*.jsonl.made.json").read_text())) == {"file", "recipe", "versions",
                                                                       "git"}
    assert journal.read() == {}
    journal.begin(0)
    journal.file.write(b'{}\n{"x": 1}\n'), journal.file.close()
    with pytest.raises(UserError, match=r"was begun with sha256 of the model=, now it is "):
        journal.read()
    Path("G*.jsonl.part-0").write_text(json.dumps(journal.recipe) + '\n{"x": 1}\n')
    with pytest.raises(UserError, match="is damaged; delete it, and its rows are made anew"):
        journal.read()


def test_a_template_is_judged_and_samples_are_numbered(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("F.jsonl").write_text('{"n": 12}')
    Path("T.txt").write_text("of {n}")
    assert run("--ckpt", ckpt, "--prompts=F.jsonl", "--template=T.txt", "--out=G.jsonl",
               "--num_samples=2", "--max_new_tokens=1", "--column=x") == 0
    said = capsys.readouterr().out
    assert said.startswith("without effect here: column\n")
    assert "\nrewritten: 2 rows; with lost numbers 2 (2 of 2 numbers" in said
    rows = [json.loads(line) for line in Path("G.jsonl").read_text().splitlines()]
    assert [(row["n"], row["sample"], row["lost"]) for row in rows] == [(12, 0, ["12"]),
                                                                        (12, 1, ["12"])]
    with pytest.raises(UserError, match="are for a model that was tuned on dialogs"):
        run("--ckpt", ckpt, "--prompts=F.jsonl", "--template=T.txt", "--out=H.jsonl", "--system=a")


def test_texts_on_the_screen_and_in_the_run(tmp_path, capsys, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", tiny())
    with pytest.raises(UserError, match=r"^--save adds to a run's samples.jsonl, and .* lies in"):
        run("--ckpt", folder, "--save")
    capsys.readouterr()
    texts = iter("abcd")
    monkeypatch.setattr(generate, "complete", lambda *words: [
        generate.Completion("stop", next(texts), [1]) for _ in words[2]])
    assert run("--ckpt", folder, "--prompt=p", "--num_samples=3") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:7] == [line for i, text in enumerate("abc", 1)
                        for line in (f"--- {i} of 3 (stop)", f"p{text}")]
    assert len(said) == 8 and said[7].startswith("3 new tokens in ")
    assert run("--ckpt", folder, "--prompt=p") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "p" and said[2].startswith("1 new tokens in ") and len(said) == 3
