"""The engine: precision, chunks, documents, memory, compilation; and what a run does about them."""

import itertools
import json
import os
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics
from torch import nn

import model
import train
from model import (
    IGNORE,
    LLaMA,
    ModelConfig,
    by_document,
    document_bounds,
    flops_per_token,
)
from plainllama import settings
from plainllama.command import parse
from plainllama.parallel import World, attention_refusal
from plainllama.tokens.rows import BEGINS, CONTEXT, Batch, to_batch
from plainllama.training import engine as room
from plainllama.training import optim
from plainllama.training.engine import Engine

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64, vocab_size=300, block_size=32)


def engine(**keys) -> Engine:
    """Of a tiny config, matrices enlarged so that attention matters."""
    base = dict(**TINY, global_batch_tokens=6 * 32, micro_batch=2, device="cpu", compile="false")
    made = Engine(settings.Settings(**(base | keys)), World(), bos_id=1)
    with torch.no_grad():
        for p in made.model.parameters():
            p.mul_(4.0 if p.dim() > 1 else 1.0)
    made.ready()
    return made


TARGETS = 6 * 32


def batch(rows: int = 6, bos_id: int | None = None) -> Batch:
    ids = torch.randint(2, 300, (rows, 33), generator=torch.Generator().manual_seed(0))
    ids[ids % 11 == 0] = 1  # documents of all lengths begin
    return to_batch(ids.numpy(), bos_id=bos_id)


def gradients(made: Engine) -> tuple[float, list[torch.Tensor]]:
    loss = made.gradients(batch(), TARGETS).item()
    return loss, [p.grad.clone() for p in made.model.parameters()]


def assert_close(a, b, limit: float) -> None:
    assert a[0] == pytest.approx(b[0], rel=limit)
    for x, y in zip(a[1], b[1], strict=True):
        assert (x - y).norm() <= limit * y.norm()


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_stays_close_to_fp32(dtype, limit):
    low, exact = engine(dtype=dtype), engine(dtype="fp32")
    loss, grads = gradients(low)
    scale = 2.0**16 if dtype == "fp16" else 1.0
    assert all(g.dtype == torch.float32 for g in grads)
    assert low.model(batch()[0]).dtype == low.dtype != torch.float32
    assert_close((loss, [g / scale for g in grads]), gradients(exact), limit)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_scale_is_divided_out_and_follows_overflows(optimizer):
    a, b = (engine(dtype=dtype, optimizer=optimizer) for dtype in ("fp16", "fp32"))
    first, second = (made.update(batch(), 1e-2, TARGETS) for made in (a, b))
    assert torch.allclose(first, second, rtol=0.02)  # loss and norm, not multiplied
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert (p - q).norm() <= 0.02 * q.norm()
        for kind, moment in b.optimizer.state[q].items():
            assert (a.optimizer.state[p][kind] - moment).norm() <= 0.03 * moment.norm(), kind
    scale = a.optimizer.loss_scale
    scale.value.fill_(2.0**40)  # gradients overflow fp16
    before = [p.detach().clone() for p in a.model.parameters()]
    assert not a.update(batch(), 1e-2, TARGETS)[1].isfinite()
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), before, strict=True))
    assert a.optimizer.scale_state() == [2.0**39, 0.0]
    scale.value.fill_(2.0**10)
    scale.good.fill_(1998)
    a.update(batch(), 1e-2, TARGETS)
    assert a.optimizer.scale_state() == [2.0**10, 1999.0]
    a.update(batch(), 1e-2, TARGETS)
    assert a.optimizer.scale_state() == [2.0**11, 0.0]


def test_fp16_resumes_with_its_scale(home):
    words = ["toy.py", "--dtype=fp16", "--max_steps=6", "--save_interval=3"]
    assert train.main(parse(words, "", train.Flags)) == 0
    there = home / "out/toy/checkpoints/step_6"
    state = json.loads((there / "training/state.json").read_text())
    assert state["loss_scale"] == [2.0**16, 6.0] and state["dtype"] == "float16"
    rows = [r["loss"] for r in metrics(home / "out/toy") if "loss" in r]
    shutil.rmtree(there)
    assert train.main(parse(words, "", train.Flags)) == 0
    again = json.loads((there / "training/state.json").read_text())
    assert again["loss_scale"] == state["loss_scale"]
    assert [r["loss"] for r in metrics(home / "out/toy") if "loss" in r] == rows


# ---- documents

@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_documents_compute_what_each_computes_alone(backend):
    made = engine(attention=backend, doc_mask=True)
    x, y, starts = batch(bos_id=1)[:3]
    bounds = document_bounds(starts)
    count = len(bounds) - 1
    assert count & (count - 1) == 0 and bounds[-1] == x.numel() and bounds.dtype == torch.int32
    expected = torch.zeros(())
    edges = sorted({*bounds.tolist()})
    for a, b in itertools.pairwise(edges):
        row, start, stop = a // 32, a % 32, (b - 1) % 32 + 1
        assert start == 0 or x[row, start] == 1
        assert not (x[row, start + 1:stop] == 1).any()
        expected = expected + made.model(x[row:row + 1, start:stop], y[row:row + 1, start:stop])
    loss = made.model(x, y, bounds)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(made.model(x, y).item() - loss.item()) > 1e-3 * loss.item()
    grads = [torch.autograd.grad(v, list(made.model.parameters())) for v in (loss, expected)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert made.gradients(batch(bos_id=1), TARGETS).item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_run_with_documents_trains_and_evaluates_with_them(home, monkeypatch):
    seen, real = [], by_document
    monkeypatch.setattr(model, "by_document", lambda *a: seen.append(
        torch.is_grad_enabled()) or real(*a))
    assert train.main(parse(["toy.py", "--doc_mask", "--max_steps=2"], "",
                                     train.Flags)) == 0
    assert True in seen and False in seen


@pytest.mark.parametrize(("words", "says"), [
    (("varlen", "cpu"), "attention=varlen needs a CUDA device, found cpu"),
    (("varlen", "cuda", torch.float32), "bf16 or fp16 only"),
    (("xformers", "cuda", torch.bfloat16, True), "attention=xformers sees no documents"),
    (("sdpa", "cuda", torch.float32, True), "doc_mask on CUDA computes in bf16 or fp16 only"),
])
def test_back_ends_that_cannot_run_say_so(words, says):
    assert says in attention_refusal(*words)


# ---- memory

def test_the_loss_in_chunks_equals_the_loss_at_once(monkeypatch):
    for keys in ({}, {"tie_embeddings": True}):
        made, (x, y) = engine(**keys), batch()[:2]
        y[2, 5:] = IGNORE
        losses = []
        for size in (1 << 30, 4 * 300 * 40):  # 192 tokens: five chunks
            monkeypatch.setattr(model, "LOGITS_BYTES", size)
            losses.append((made.model(x, y).item(), gradients_of(made, x, y)))
            with torch.no_grad():
                assert made.model(x, y).item() == pytest.approx(losses[0][0], rel=1e-6)
        assert_close(losses[1], losses[0], 1e-5)


def gradients_of(made, x, y):
    made.optimizer.zero_grad()
    (made.model(x, y) * 0.01).backward()
    return [p.grad.clone() for p in made.model.parameters()]


def test_the_loss_in_chunks_never_has_all_logits(monkeypatch):
    monkeypatch.setattr(model, "LOGITS_BYTES", 4 * 300 * 40)
    made, largest = engine(), [0]  # 192 tokens, at most 40 at a time

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, call, kinds, args=(), kwargs=None):
            out = call(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (300,):
                largest[0] = max(largest[0], out.numel())
            return out

    with Watch():
        made.model(*batch()[:2]).backward()
    assert 0 < largest[0] <= 40 * 300


def test_activation_checkpointing_keeps_less_and_computes_the_same():
    kept, results = [], []
    for on in (False, True):
        made, total = engine(activation_checkpointing=on), [0]

        def pack(tensor, total=total):
            total[0] += tensor.numel()
            return tensor

        x, y = batch()[:2]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = made.model(x, y)
            kept.append(total[0])
        loss.backward()
        results.append((loss.item(), [p.grad for p in made.model.parameters()]))
    assert kept[1] < 0.5 * kept[0]
    assert_close(results[0], results[1], 1e-6)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(home, monkeypatch, capsys):
    real = LLaMA.forward

    def forward(self, ids, *rest):
        if len(ids) > 2 and self.training and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return real(self, ids, *rest)

    words = ["toy.py", "--max_steps=6", "--save_interval=6"]
    assert train.main(parse([*words, "--micro_batch=2", "--out_dir=out/small"], "",
                                     train.Flags)) == 0
    monkeypatch.setattr(LLaMA, "forward", forward)
    assert train.main(parse([*words, "--micro_batch=7", "--out_dir=out/large"], "",
                                     train.Flags)) == 0
    out = capsys.readouterr().out
    assert "out of memory with micro-batches of 7 rows: taking 4" in out
    assert "out of memory with micro-batches of 4 rows: taking 2" in out
    small, large = ([r["loss"] for r in metrics(home / "out" / name) if "loss" in r]
                    for name in ("small", "large"))
    assert small == pytest.approx(large, rel=1e-5)
    state = (home / "out/large/checkpoints/step_6/training/state.json").read_text()
    assert json.loads(state)["micro_batch"] == 2  # a resume begins with what fits
    monkeypatch.setattr(LLaMA, "forward", lambda *_: (_ for _ in ()).throw(
        torch.OutOfMemoryError("no room")))
    made = engine(micro_batch=1)
    with pytest.raises(settings.UserError, match=r"^out of memory with micro_batch=1"):
        made.update(batch(), 1e-3, TARGETS)
    made.world.rank, made.world.size = 3, 8
    with pytest.raises(settings.UserError, match=r"^rank 3: out of memory with micro_batch=1"):
        made.gradients(batch(), TARGETS)


def test_the_largest_micro_batch_that_fits_is_found(monkeypatch):
    """With a stand-in for a GPU of 1,000 bytes on which a model takes 100 and a row 37."""
    made = engine()
    used = [0]
    monkeypatch.setattr(made, "rehearse", lambda last, rows: used.append(100 + 37 * rows))
    for name, value in (("mem_get_info", lambda _: (1000, 1000)), ("memory_reserved", lambda _: 0),
                        ("reset_peak_memory_stats", lambda _: None), ("empty_cache", lambda: None),
                        ("max_memory_allocated", lambda _: used[-1])):
        monkeypatch.setattr(torch.cuda, name, value)
    assert made.largest_that_fits(1000) == 21  # 100 + 37 * 21 = 877 of 900
    assert made.largest_that_fits(5) == 5 and used[-1] == 100 + 37 * 5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (120, 1000))
    with pytest.raises(settings.UserError, match="not even one row"):
        made.largest_that_fits(8)


# ---- compilation

@pytest.mark.parametrize("chunk", [
    1 << 30, pytest.param(4 * 300 * 15, marks=pytest.mark.slow)])
def test_compiled_equals_eager_in_fp32(monkeypatch, chunk):
    """By inductor, where there is a C++ compiler."""
    monkeypatch.setattr(model, "LOGITS_BYTES", chunk)
    eager, compiled = engine(), engine(compile="auto")
    compiled.compile()
    if not compiled.compiled:
        pytest.skip("torch.compile does not work on this machine")
    assert_close(gradients(compiled), gradients(eager), 1e-5)
    with torch.no_grad():
        assert compiled.module(*batch(2)[:2]).item() == pytest.approx(
            eager.module(*batch(2)[:2]).item(), rel=1e-5)


def test_training_evaluating_and_sampling_compile_at_most_twice(home, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(LLaMA, "compile", lambda self, **keys: nn.Module.compile(
        self, backend=counter, **keys))
    assert train.main(parse(["toy.py", "--compile=true", "--sample_tokens=8"], "",
                                     train.Flags)) == 0
    assert 1 <= counter.frame_count <= 2
    torch._dynamo.reset()


def test_auto_compiles_on_a_cpu_where_the_run_wins_the_minute_back(capsys):
    made = engine(compile="auto", max_steps=1000)
    assert not made.compiled and not made.pays()  # ready() asked
    made.say = print
    made.config.max_steps = 10**9
    assert made.pays()
    flops = flops_per_token(made.model.config, 32) * made.config.global_batch_tokens * 10**9
    assert f"the run's {flops:.1e} floating-point operations" in capsys.readouterr().out
    made.config.max_minutes = 5.0
    assert not made.pays()


def test_a_compiler_that_fails_costs_a_line_not_the_run(home, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(LLaMA, "compile", lambda self, **keys: nn.Module.compile(
        self, backend=broken, **keys))
    with pytest.raises(settings.UserError, match="compile=true"):
        engine(compile="true")
    made = engine()
    made.config.compile = "auto"
    made.compile()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no C++ compiler found" in out and "going on without" in out
    assert not made.compiled
    assert_close(gradients(made), gradients(engine()), 1e-7)


# ---- what a run says about itself

def test_skipped_updates_are_counted_and_their_rows_named(home, monkeypatch, capsys):
    real, count = optim.step, [0]

    def step(optimizer, rate, norm, clip):
        count[0] += 1
        return real(optimizer, rate, norm, clip)

    def poison(grad):
        return grad * float("nan") if count[0] in (3, 4) else grad  # updates 4 and 5, one gradient

    init = Engine.__init__

    def hooked(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.model.get_parameter("model.layers.1.mlp.up_proj.weight").register_hook(poison)

    monkeypatch.setattr(optim, "step", step)
    monkeypatch.setattr(Engine, "__init__", hooked)
    assert train.main(parse(["toy.py", "--max_steps=10"], "", train.Flags)) == 0
    out = capsys.readouterr().out
    assert "step 4: loss or gradient is not finite, no update; rows 24 to 31 (shown by --replay=4" \
        in out
    rows = {r["step"]: r for r in metrics(home / "out/toy") if "loss" in r}
    assert [rows[n]["skipped"] for n in (3, 4, 5, 6, 10)] == [0, 1, 2, 2, 2]
    assert rows[4]["loss"] > 0 and rows[4]["grad_norm"] is None and rows[6]["grad_norm"] > 0
    monkeypatch.setattr(Engine, "__init__", init)
    assert train.main(parse(["toy.py", "--max_steps=12", "--extend"], "",
                                     train.Flags)) == 0
    assert metrics(home / "out/toy")[-2]["skipped"] == 2  # also after a resume


def test_a_logger_gets_the_rows_and_its_failure_is_one_warning(home, monkeypatch, capsys):
    sent = []

    def log(row, step):
        sent.append((step, row))
        if len(sent) == 5:
            raise ConnectionError("the network is gone")

    stub = types.SimpleNamespace(init=lambda **keys: types.SimpleNamespace(log=log))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    words = ["toy.py", "--logger=wandb", "--max_steps=20"]
    assert train.main(parse(words, "", train.Flags)) == 0
    assert [step for step, _ in sent] == [0, 1, 2, 3, 4]
    assert [row for _, row in sent] == metrics(home / "out/toy")[:5]
    assert capsys.readouterr().out.count("WARNING: logger=wandb does not work") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert train.main(parse([*words, "--out_dir=out/b"], "", train.Flags)) == 0
    assert capsys.readouterr().out.count("WARNING: logger=wandb does not work") == 1


def test_profile_writes_a_trace(home):
    assert train.main(parse(["toy.py", "--profile", "--max_steps=8"], "",
                                     train.Flags)) == 0
    events = json.loads((home / "out/toy/trace.json").read_text())["traceEvents"]
    assert sum(e.get("name", "").startswith("Optimizer.step") for e in events) == 3


def test_flops_equal_what_torch_counts_on_meta():
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(3, 4, 64, 160, 300, 64, n_kv_head=2)
    with torch.device("meta"):
        net = LLaMA(config)
        net.reset_derived("meta")
        ids = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids).backward()
    assert model.flops_per_token(config, 64) * 128 == pytest.approx(
        counter.get_total_flops(), rel=0.02)


# ---- the parts of an engine, one by one

def made_with(world: World | None = None, **keys) -> Engine:
    """An engine as it is made, not made ready."""
    base = dict(**TINY, global_batch_tokens=6 * 32, micro_batch=2, device="cpu", compile="false")
    return Engine(settings.Settings(**(base | keys)), world or World(), 1)


def gpu(*_) -> types.SimpleNamespace:
    """What stands for a GPU where only its kind is asked for."""
    return types.SimpleNamespace(type="cuda")


def test_what_an_engine_is_made_of(monkeypatch):
    plain = made_with()
    assert (plain.bos_id, plain.logged, plain.diverges, plain.compiled) == (None, (), False, False)
    assert plain.summary == "float32, eager" and plain.optimizer.loss_scale is None
    plain.compiled = True
    assert plain.summary == "float32, compiled"
    assert made_with(doc_mask=True, dtype="bf16").bos_id == 1
    assert made_with(dtype="bf16").summary == "bfloat16, eager"
    monkeypatch.setattr(World, "wrap", lambda world, model: ("wrapped", model))
    assert made_with().module[0] == "wrapped"
    threads = torch.get_num_threads()
    even = made_with(deterministic=True)
    torch.set_num_threads(threads)
    assert even.module is even.model
    grown = made_with(expand="concat", expand_blocks=2, divergence="cosine")
    assert grown.diverges and grown.logged == ("divergence/cosine",)
    assert len(grown.no_loss()) == 2 and not grown.no_loss().any() and len(plain.no_loss()) == 1
    assert room.read_outcome(torch.arange(6.0)) == (0, 1, 2, 3, (4, 5))


def test_moments_and_scale_come_back_where_a_run_goes_on(monkeypatch):
    loaded: list = []
    monkeypatch.setattr(room.checkpoint, "load_moments", lambda source, *_: loaded.append(source))
    monkeypatch.setattr(room.peft, "load_start", lambda *_: None)
    monkeypatch.setattr(room.peft, "adapter_for", lambda *_: None)
    for dtype, source, state, scale in (
            ("fp16", None, {}, [2.0**16, 0.0]), ("fp16", "x", {}, [2.0**16, 0.0]),
            ("fp16", None, {"loss_scale": [8.0, 5.0]}, [2.0**16, 0.0]),
            ("fp16", "x", {"step": 3}, [2.0**16, 0.0]),
            ("fp16", "x", {"loss_scale": [8.0, 5.0]}, [8.0, 5.0]),
            ("fp32", "x", {"loss_scale": [8.0, 5.0]}, None)):
        loaded.clear()
        config = settings.Settings(**TINY, global_batch_tokens=192, micro_batch=2, device="cpu",
                                   dtype=dtype)
        one = Engine(config, World(), 1, Path(source) if source else None, state)
        assert one.optimizer.scale_state() == scale
        assert loaded == ([Path("x")] if source and state else [])


def test_how_rows_are_cut(monkeypatch):
    """(rows of a step, ranks, micro_batch, state) -> (rows of a micro-batch, how many)."""
    made = made_with()
    monkeypatch.setattr(made, "pick_micro_batch", lambda share: 3)
    there = {"world_size": 2, "micro_batch": 4}
    for rows, size, micro, state, cut in (
            (6, 1, 2, {}, (2, 3)), (7, 1, 2, {}, (2, 4)), (7, 2, 2, {}, (2, 2)),
            (7, 1, 99, {}, (7, 1)), (7, 1, 0, {}, (3, 3)), (2, 1, 0, {}, (2, 1)),
            (8, 2, 0, there, (4, 1)), (8, 1, 0, there, (3, 3)), (8, 2, 2, there, (2, 2))):
        made.config = replace(made.config, global_batch_tokens=rows * 32 + 5, micro_batch=micro)
        made.world.size = size
        made.split_batch(state)
        assert made.batch_rows == rows and (made.micro, made.accumulate) == cut


def test_rows_that_keep_a_processor_busy(monkeypatch):
    """4,096 tokens on a CPU, at most 65,536 of what fits on a GPU; micro-batches are equal."""
    made, asked = made_with(), []
    for block, share, rows in ((32, 128, 128), (32, 129, 65), (32, 1000, 125), (17, 240, 240),
                               (17, 241, 121), (4096, 5, 1), (9999, 5, 1), (2048, 5, 2)):
        made.config = replace(made.config, block_size=block)
        assert made.pick_micro_batch(share) == rows
    monkeypatch.setattr(made, "largest_that_fits", lambda most: asked.append(most) or 5)
    monkeypatch.setattr(made.world, "device", gpu())
    for block, share, most in ((1, 70000, 65536), (32, 7, 7), (32, 3000, 2048), (99999, 8, 1)):
        made.config = replace(made.config, block_size=block)
        rows = made.pick_micro_batch(share)
        assert asked[-1] == most and rows == -(-share // -(-share // 5))


def test_how_rows_are_cut_for_any_number_of_ranks(monkeypatch):
    """(rows, micro_batch, block_size, ranks) -> (micro-batches of a rank, their rows)."""
    made, threads = made_with(), []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", threads.append)
    for rows, micro, block, size, cut in (
            (6, 2, 32, 1, (4, 2)), (8, 2, 32, 1, (4, 2)), (9, 2, 32, 1, (8, 2)),
            (9, 2, 32, 4, (2, 2)), (8, 8, 32, 1, (1, 8)), (17, 0, 32, 2, (4, 3)),
            (4096, 0, 32, 2, (16, 128)), (4097, 0, 32, 1, (64, 65)), (8, 0, 9999, 8, (1, 1)),
            (9, 0, 9999, 1, (16, 1)), (241 * 8, 0, 17, 1, (16, 121))):
        made.config = replace(made.config, global_batch_tokens=rows * block, micro_batch=micro,
                              block_size=block, deterministic=True)
        made.world.size = size
        made.split_batch({"world_size": size, "micro_batch": 5})
        assert (made.accumulate, made.micro) == cut and threads.pop() == 1
    made.config, made.world.size = replace(made.config, micro_batch=2), 1
    made.world.sharded = True
    with pytest.raises(settings.UserError, match=r"at most 1024 \(micro-batches\), not 1 with one"):
        made.split_for_any_ranks()
    made.world.sharded = False
    monkeypatch.setattr(made.world, "device", gpu())
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    made.split_for_any_ranks()
    assert threads == [True] and os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def test_an_engine_is_made_ready(monkeypatch):
    made, done = made_with(), []
    monkeypatch.setattr(made, "compile", lambda: done.append("compiled"))
    monkeypatch.setattr(made, "rehearse", lambda last, rows=0: done.append(last))
    for kind, pays, mode, even, expected in (
            ("true", False, "one", False, ["compiled"]), ("auto", True, "one", False, ["compiled"]),
            ("auto", False, "one", False, []), ("false", True, "one", False, []),
            ("true", True, "ddp", False, ["compiled", True]), ("false", True, "ddp", False, [True]),
            ("false", True, "ddp", True, []), ("false", True, "fsdp", False, [])):
        monkeypatch.setattr(made, "pays", lambda pays=pays: pays)
        made.config = replace(made.config, compile=kind, deterministic=even)
        made.world.mode = mode
        done.clear()
        made.ready()
        assert done == expected


def test_where_the_compiler_pays(monkeypatch, capsys):
    made, said = made_with(), []
    made.say = said.append
    made.config = replace(made.config, max_steps=10, global_batch_tokens=64)
    flops = flops_per_token(made.model.config, 32) * 640
    assert room.CPU_FLOPS == 3e14
    for least, minutes, pays in ((flops, 0, True), (flops + 1, 0, False), (flops, 0.5, False),
                                 (flops, 1, False), (flops, 19.9, False), (flops, 20, True),
                                 (flops + 1, 30, False), (flops + 1, 5, False)):
        monkeypatch.setattr(room, "CPU_FLOPS", least)
        made.config.max_minutes = minutes
        said.clear()
        assert made.pays() is pays and len(said) == pays
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(made.world, "device", types.SimpleNamespace(type=kind))
        assert made.pays() is (kind == "cuda")


def test_what_is_compiled_and_what_a_failure_means(monkeypatch):
    made, seen, said = made_with(), [], []
    made.say = said.append
    monkeypatch.setattr(made.world, "compile", lambda model, dynamic: seen.append(dynamic))
    monkeypatch.setattr(made.world, "decompile", lambda model: seen.append("undone"))
    for mask, sharded, error, elsewhere, kind in (
            (False, False, None, False, "auto"), (True, True, None, False, "true"),
            (False, False, torch.OutOfMemoryError("full"), False, "true"),
            (False, False, ValueError("old"), False, "auto"),
            (False, False, ValueError("old"), False, "true"),
            (False, False, None, True, "auto"), (False, False, None, True, "true")):
        def rehearse(last, rows=0, error=error):
            seen.append(last)
            if error:
                raise error

        monkeypatch.setattr(made, "rehearse", rehearse)
        monkeypatch.setattr(made.world, "any", lambda flag, other=elsewhere: flag or other)
        made.config = replace(made.config, doc_mask=mask, compile=kind)
        made.world.sharded = sharded
        seen.clear()
        said.clear()
        why = "ValueError: old" if isinstance(error, ValueError) else "it failed on another rank"
        fails = elsewhere or isinstance(error, ValueError)
        if fails and kind == "true":
            with pytest.raises(settings.UserError, match=rf"^compile=true, but .* \({why}\); use"):
                made.compile()
            continue
        made.compile()
        assert seen == [None if mask else False, sharded, *["undone"] * fails]
        assert said == [f"torch.compile fails here ({why}); going on without it, slower"] * fails
        assert made.compiled is not fails


def test_a_rehearsal_leaves_no_gradient(monkeypatch):
    made, shapes, lasts = made_with(), [], []
    real, accumulating = room.OBJECTIVES["next"].loss, made.world.accumulating

    def loss(module, some, *rest):
        shapes.append((module is made.model, tuple(some.ids.shape)))
        assert not some.ids.any() and not some.targets.any()
        return real(made.model, some, *rest)

    made.objective = replace(made.objective, loss=loss)
    made.module = nn.Identity()
    monkeypatch.setattr(made.world, "accumulating", lambda module, last: (
        lasts.append((module is made.model, last)) or accumulating(made.model, last)))
    made.rehearse(last=False)
    made.rehearse(last=True, rows=5)
    assert shapes == [(False, (2, 32)), (True, (5, 32))] and lasts == [(False, False), (True, True)]
    assert all(p.grad is None for p in made.model.parameters())


def test_what_stands_in_for_rows(monkeypatch):
    """Where pairs are compared each row is one: an answer begins at 0 and in the middle."""
    made, seen = made_with(doc_mask=True), []
    monkeypatch.setattr(room, "to_batch", lambda *given: seen.append(given))
    made.stand_in(np.full((2, 9), 7))
    made.config.objective = "orpo"
    made.stand_in(np.full((2, 9), 7))
    begins = 7 | CONTEXT | BEGINS
    assert [(ids.tolist(), *rest) for ids, *rest in seen] == [
        ([[7] * 9] * 2, 0, 1), ([[begins, 7, 7, 7, begins, 7, 7, 7, 7]] * 2, 0, 1)]


@pytest.mark.parametrize(("size", "bytes_of", "share", "tried", "found"), [
    ((1000, 0), lambda rows: 100 + 37 * rows, 1000, [1, 2, 21], 21),
    ((600, 400), lambda rows: 100 + 37 * rows, 1000, [1, 2, 21], 21),
    ((1000, 0), lambda rows: 100 + 37 * rows, 5, [1, 2, 5], 5),
    ((1000, 0), lambda rows: 100 + 37 * rows, 2, [1, 2], 2),
    ((1000, 0), lambda rows: 100 + 37 * rows, 1, [1], 1),
    ((1000, 0), lambda rows: 100 + 800 * rows, 9, [1, 2], 1),  # just what there is
    ((1000, 0), lambda rows: 101 + 800 * rows, 9, [1], None),
    ((1000, 0), lambda rows: 999 if rows > 1 else 9, 9, [1, 2], 1),
    ((1000, 0), lambda rows: 5, 3, [1, 2, 3], 3),
    ((10000, 0), lambda rows: 100 + 100 * rows - min(rows, 50), 999, [1, 2, 89], 89),
    # less by row than it seemed: it goes on while a sixteenth can be won, and four times at most
    ((1000, 0), lambda rows: 300 * rows - 200, 9, [1, 2, 3], 3),
    ((3560, 0), lambda rows: 100 * rows if rows < 3 else 93 * rows + 14, 99, [1, 2, 32, 34], 34),
    ((3560, 0), lambda rows: 100 * rows if rows < 3 else 96 * rows + 8, 99, [1, 2, 32], 32),
    ((10000, 0), lambda rows: 10 * rows + min(990 * rows, 1980) + min(90 * (rows - 2), 720), 9999,
     [1, 2, 8, 72], 72),
    ((10000, 0), lambda rows: 2000 * (rows > 2) + 20 * rows, 9999, [1, 2, 450], 2),
    ((10000, 0), lambda rows: min(200 * rows, 400) + 10 * rows, 9999, [1, 2, 42, 860], 860),
    ((10000, 0), lambda rows: min(200 * rows, 400 + 10 * (rows - 2)), 9999, [1, 2, 45, 862], 862),
])
def test_the_rows_that_are_tried(monkeypatch, size, bytes_of, share, tried, found):
    made, used = made_with(), []

    def rehearse(last, rows):
        assert last is True
        used.append(rows)
        if bytes_of(rows) > sum(size):
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(made, "rehearse", rehearse)
    for name, value in (("mem_get_info", lambda _: (size[0], 10**6)), ("empty_cache", lambda: None),
                        ("memory_reserved", lambda _: size[1]),
                        ("reset_peak_memory_stats", lambda _: None),
                        ("max_memory_allocated", lambda _: bytes_of(used[-1]))):
        monkeypatch.setattr(torch.cuda, name, value)
    if found is None:
        with pytest.raises(settings.UserError, match=r"^not even one row of 32 tokens fits"):
            made.largest_that_fits(share)
    else:
        assert made.largest_that_fits(share) == found
    assert used == tried


def test_the_numbers_of_an_update(monkeypatch):
    """(loss, square norm, ranks that stop, ranks that save, what is logged), and the norm by which
    is clipped."""
    made, norms = engine(objective="orpo", doc_mask=True, micro_batch=6, grad_clip=0.25), []
    monkeypatch.setattr(optim, "step", lambda *given: norms.append(given))
    pairs = made.stand_in(np.random.default_rng(0).integers(2, 300, size=(6, 33)))
    losses = made.gradients(pairs, 6)
    square = sum(p.grad.square().sum() for p in made.model.parameters())
    made.optimizer.zero_grad()
    for stop, save in ((False, False), (True, False), (False, True)):
        stats = made.update(pairs, 0.5, 6, stop, save)
        assert torch.allclose(stats, torch.cat([
            losses[:1], torch.stack([square, torch.tensor(float(stop)), torch.tensor(float(save))]),
            losses[1:]]), rtol=1e-5)
        optimizer, rate, norm, clip = norms.pop()
        assert optimizer is made.optimizer and (rate, clip) == (0.5, 0.25)
        assert norm == pytest.approx(square.sqrt().item(), rel=1e-5)
    assert made.update(pairs, 0.5, 6).tolist()[2:4] == [0, 0]
    assert all(p.grad is None for p in made.model.parameters())
    monkeypatch.setattr(made, "gradients", lambda *_: torch.tensor([float("inf"), 1.0]))
    monkeypatch.setattr(made.world, "square_norm", lambda _: torch.tensor(4.0))
    made.update(pairs, 0.5, 6)
    assert norms[-1][2].isnan()  # a loss that is no number is no update
    # deterministic: all ranks have the whole sums, and rank 0's are counted
    monkeypatch.setattr(made, "gradients", lambda *_: torch.tensor([3.0, 5.0]))
    made.config = replace(made.config, deterministic=True)
    for rank, replicas, numbers in ((0, 1, [3, 4, 1, 0, 5]), (0, 3, [3, 12, 1, 0, 5]),
                                    (1, 3, [0, 0, 1, 0, 0])):
        made.world.rank, made.world.replicas = rank, replicas
        assert made.update(pairs, 0.5, 6, True).tolist() == numbers
    made.config = replace(made.config, deterministic=False)
    made.optimizer.loss_scale = optim.LossScale(torch.device("cpu"))
    made.optimizer.loss_scale.value.fill_(4.0)
    assert made.update(pairs, 0.5, 6).tolist() == [3, 0.25, 0, 0, 5]


def test_what_is_dropped_is_a_function_of_seed_step_and_rank():
    made, drawn = made_with(lora_dropout=0.1), []
    for seed, step, rank in ((1, 2, 0), (1, 2, 0), (1, 3, 0), (1, 2, 1), (2, 2, 0)):
        made.config.seed, made.world.rank = seed, rank
        made.seed_dropout(step)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4
    made.config.lora_dropout = 0.0
    before = torch.get_rng_state()
    made.seed_dropout(9)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_that_ends(monkeypatch):
    """Smaller micro-batches on one GPU; where that would be another split than the others', or
    other bits, or nothing smaller is left, one line."""
    made, said, emptied = made_with(), [], []
    made.say, made.micro, made.accumulate = said.append, 5, 2
    real, device = made.accumulated, made.world.device

    def full(some, targets):
        if made.micro > 2:
            raise torch.OutOfMemoryError("full")
        made.world.device = device
        return real(some, targets)

    monkeypatch.setattr(made, "accumulated", full)
    monkeypatch.setattr(made, "added_in_tree", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    for there, times in ((device, 0), (gpu(), 2)):
        made.world.device, made.micro = there, 5
        assert made.gradients(batch(), TARGETS) > 0
        assert (made.micro, made.accumulate) == (2, 3) and len(emptied) == times
    assert said == ["out of memory with micro-batches of 5 rows: taking 3",
                    "out of memory with micro-batches of 3 rows: taking 2"] * 2
    for size, even, who in ((1, True, ""), (2, False, "rank 0: "), (2, True, "rank 0: ")):
        made.micro, made.world.size = 5, size
        made.config = replace(made.config, deterministic=even)
        with pytest.raises(settings.UserError, match=rf"^{who}out of memory with micro_batch=5; "
                           "start again with --micro_batch=3, --activ"):
            made.gradients(batch(), TARGETS)


def test_gradients_of_micro_batches_are_those_of_all(monkeypatch):
    """Times the ranks, over which they are averaged; exchanged with the last one."""
    whole, parts, flags = engine(micro_batch=6), engine(micro_batch=2), []
    expected, real = gradients(whole), World.accumulating
    monkeypatch.setattr(World, "accumulating", lambda world, module, last: (
        flags.append(last) or real(world, module, last)))
    assert_close(gradients(parts), expected, 1e-5)
    assert flags == [False, False, True]
    parts.optimizer.zero_grad()
    parts.world.size = 4
    loss, grads = gradients(parts)
    assert_close((loss, [grad / 4 for grad in grads]), expected, 1e-5)


def test_the_tree_in_which_parts_are_added_up(monkeypatch, one_thread):
    made = engine(micro_batch=2, deterministic=True, global_batch_tokens=16 * 32)
    assert (made.accumulate, made.micro) == (8, 2)
    taken, real, cleared = [], Batch.take, []
    monkeypatch.setattr(Batch, "take", lambda some, rows: taken.append(rows) or real(some, rows))
    zero = made.optimizer.zero_grad
    monkeypatch.setattr(made.optimizer, "zero_grad", lambda: cleared.append(1) or zero())
    some = batch(16)
    loss = made.gradients(some, 512)
    assert taken == [[part, part + 8] for part in (0, 4, 2, 6, 1, 5, 3, 7)] and len(cleared) == 4
    plain = engine(micro_batch=16, global_batch_tokens=16 * 32)
    assert plain.gradients(some, 512).item() == pytest.approx(loss.item(), rel=1e-6)
    for one, two in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert (one.grad - two.grad).norm() <= 1e-5 * two.grad.norm()


def test_which_model_is_outlined(monkeypatch):
    """Frozen as the config says, with copies or an adapter; copies want no adapter below them."""
    config, done = settings.Settings(**TINY), []
    monkeypatch.setattr(room.peft, "is_adapter", lambda folder: folder.name == "adapter")
    monkeypatch.setattr(room.peft, "adapter_for", lambda *_: "one" if lora else None)
    monkeypatch.setattr(room.expansion, "new_rows", lambda config, source: 250)
    monkeypatch.setattr(room.adapters, "attach", lambda model, adapter: done.append(adapter))
    for each in ("expansion", "adapters"):
        monkeypatch.setattr(getattr(room, each), "freeze",
                            lambda *_, each=each: done.append(each))
    for lora, blocks, source, expected in (
            (0, 0, None, "adapters"), (0, 0, "adapter", "adapters"), (4, 0, "model", "one"),
            (0, 2, None, "expansion"), (0, 2, "model", "expansion"), (0, 2, "adapter", None)):
        config = replace(config, expand_blocks=blocks, expand="stack" if blocks else "none")
        place = Path(source) if source else None
        if expected is None:
            with pytest.raises(settings.UserError, match=r"^adapter is an adapter, and expand"):
                room.outline(config, place)
            continue
        made, adapter = room.outline(config, place)
        assert adapter == ("one" if lora else None) and done.pop() == expected
        assert made.config.first_row == (250 if blocks else 0) and made.config.blocks == 2 + blocks


@pytest.mark.parametrize(("keys", "each", "what"), [
    ({}, 16, "weights, gradients and moments"), ({"lora_r": 2}, 4, "weights"),
    ({"train_only": "last:1"}, 4, "weights"),
    ({"expand_blocks": 2, "expand": "stack"}, 4, "weights"),
    ({"lora_r": 2, "frozen_dtype": "bf16"}, 2, "weights"),
    ({"lora_r": 2, "frozen_dtype": "int8"}, 1, "weights"),
    ({"lora_r": 2, "frozen_dtype": "nf4"}, 0.5, "weights"),
    ({"frozen_dtype": "bf16"}, 16, "weights, gradients and moments")])
def test_a_model_that_has_no_room_is_refused_before_it_is_made(keys, each, what):
    config = settings.Settings(**TINY, **keys)
    with torch.device("meta"):
        net = LLaMA(ModelConfig(**TINY))
    blocks = 2 + config.expand_blocks
    need = int(each * (blocks * sum(p.numel() for p in net.model.layers[0].parameters()
                                    if p.dim() > 1) + 300 * 32))
    for size, offload in ((1, False), (2, True), (4, False)):
        world = types.SimpleNamespace(size=size, offload=offload, room=need / size)
        room.refuse_too_large(config, world)
        world.room = (need - 1) / size
        where = "in host memory" if offload else "there"
        with pytest.raises(settings.UserError) as seen:
            room.refuse_too_large(config, world)
        assert str(seen.value) == (
            f"{what} need {need / 1e9:.4g} GB, {size} x {world.room / 1e9:.4g} are {where}: take a "
            "smaller model or more ranks")
