"""The engine: precision, chunks, documents, memory, compilation; and what a run does about them."""

import itertools
import json
import shutil
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import metrics
from torch import nn

import model
import train
from model import (
    IGNORE,
    LLaMA,
    ModelConfig,
    attend,
    by_document,
    document_bounds,
    flops_per_token,
)
from plainllama import settings
from plainllama.command import parse
from plainllama.parallel import World, attention_refusal
from plainllama.tokens.rows import Batch, to_batch
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


def test_documents_on_a_gpu_are_one_call(monkeypatch):
    """Without --attention=varlen too, in training and in evaluation."""
    assert not attention_refusal("sdpa", "cuda", torch.bfloat16, True)
    monkeypatch.setattr(model, "varlen", lambda *inputs: "varlen")
    monkeypatch.setattr(model, "by_document", lambda *inputs: "by document")
    q = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert model.sdpa(q, q, q, None, torch.zeros(2)) == "varlen"
    q.is_cuda = False
    assert model.sdpa(q, q, q, None, torch.zeros(2)) == "by document"


def test_varlen_is_called_as_the_kernel_wants_it(monkeypatch):
    """On the CPU with a stand-in for the kernel that computes what torch documents."""
    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False):
        assert window_size == (-1, 0) and torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32
        assert q.dim() == 3 and max_q == max_k == 32
        assert enable_gqa == (q.shape[1] != k.shape[1])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = [F.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
            for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True) if b > a]
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    q, k, v = torch.randn(3, 4, 32, 8), torch.randn(3, 2, 32, 8), torch.randn(3, 2, 32, 8)
    for documents in (None, document_bounds(batch(3, bos_id=1).starts)):
        expected = attend(q, k, v, "reference", documents=documents)
        for groups in (True, False):  # torch 2.11 has no grouped heads
            monkeypatch.setattr(model, "VARLEN_GROUPS", groups)
            found = attend(q, k, v, "varlen", documents=documents)
            assert (found - expected).abs().max() < 1e-5


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


def test_chunks_have_about_4096_rows_a_multiple_of_256():
    assert model.chunk_rows(32000, model.LOGITS_BYTES) == 4096
    for entries in (50304, 65536, 100000, 128256, 256000):
        rows = model.chunk_rows(entries, model.LOGITS_BYTES)
        assert rows % 256 == 0 and rows * entries * 4 <= model.LOGITS_BYTES


def test_the_one_hot_by_comparison_is_that_by_place(monkeypatch):
    p, place = torch.rand(5, 40), torch.tensor([[0], [39], [7], [7], [12]])
    eager = model.without_one(p.clone(), place)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(model.without_one(p, place), eager)
    assert torch.equal(eager, p - F.one_hot(place[:, 0], 40))


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
