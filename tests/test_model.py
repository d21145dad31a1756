"""The model against transformers' LlamaForCausalLM and against hand formulas."""

import ast
import dataclasses
import inspect
import itertools
import math
import random
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import model as room
from model import (
    IGNORE,
    KVCache,
    LLaMA,
    ModelConfig,
    Normalise,
    RMSNorm,
    SwiGLU,
    attend,
    document_bounds,
    flops_per_token,
    rotate,
)
from plainllama.parallel import attention_refusal
from plainllama.weights.adapters import initial_weight, parameter_counts


def build(config: ModelConfig, seed: int = 0, factor: float = 1.0) -> LLaMA:
    """A model with its first weights, matrices multiplied by `factor` so that attention matters."""
    model = LLaMA(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(name, p.shape, config, seed))
            if p.dim() > 1:
                p.mul_(factor)
            else:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def random_config(seed: int) -> ModelConfig:
    pick = random.Random(seed)
    kv = pick.choice([1, 2, 4])
    scaling = ["none", "linear", "llama3"][seed % 3]
    return ModelConfig(
        n_layer=pick.choice([1, 2, 3]), n_head=4, n_kv_head=kv,
        d_model=4 * pick.choice([8, 16, 24]), d_ff=pick.choice([48, 160]),
        vocab_size=pick.choice([65, 300]), block_size=700,
        rope_theta=pick.choice([1e4, 5e5]), rope_scaling=scaling,
        rope_factor=1.0 if scaling == "none" else pick.choice([2.0, 4.0]),
        rope_original=256 if scaling == "llama3" else 0, norm_eps=pick.choice([1e-5, 1e-6]),
        tie_embeddings=bool(seed % 2))


def transformers_twin(model: LLaMA):
    transformers = pytest.importorskip("transformers")
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling != "none":
        rope |= {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": c.rope_original}
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, rms_norm_eps=c.norm_eps,
        num_key_value_heads=c.kv_heads, max_position_embeddings=c.block_size,
        tie_word_embeddings=c.tie_embeddings, rope_parameters=rope, bos_token_id=0, eos_token_id=1))
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


@pytest.mark.parametrize("seed", range(6))
def test_logits_loss_and_gradients_equal_transformers(seed):
    model = build(random_config(seed), seed, factor=6.0)
    twin = transformers_twin(model)
    torch.manual_seed(seed)
    length = [700, 33, 128, 1, 257, 64][seed]
    ids = torch.randint(0, model.config.vocab_size, (2, length))
    ours, theirs = model(ids), twin(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if length == 1:
        return
    loss = model(ids[:, :-1], ids[:, 1:]) / (2 * (length - 1))
    twin_loss = twin(ids, labels=ids).loss
    assert loss.item() == pytest.approx(twin_loss.item(), rel=1e-5)
    loss.backward()
    twin_loss.backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        grad = theirs[name].grad
        assert (p.grad - grad).abs().max() <= 1e-5 * grad.abs().max(), name


def test_no_token_sees_its_future():
    model = build(random_config(2), factor=6.0)
    ids = torch.randint(0, model.config.vocab_size, (1, 50))
    changed = ids.clone()
    changed[0, 30] = (changed[0, 30] + 1) % model.config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("d_model", "vocab"), [(96, 258), (256, 4096), (768, 32000)])
def test_first_loss_is_ln_v_and_every_parameter_has_a_gradient(tied, d_model, vocab):
    config = ModelConfig(n_layer=4, n_head=4, d_model=d_model, d_ff=2 * d_model, vocab_size=vocab,
                         block_size=64, tie_embeddings=tied)
    model = LLaMA(config)
    for name, p in model.named_parameters():
        p.data = initial_weight(name, p.shape, config, 3)
    ids = torch.randint(0, vocab, (8, 65), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:]) / (8 * 64)
    assert abs(loss.item() - math.log(vocab)) < 0.1
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_rope_depends_on_distance_alone_and_keeps_length():
    q, k = torch.randn(2, 1, 1, 1, 64).unbind(0)
    angles = torch.outer(torch.arange(100.0), 1e4 ** -(torch.arange(0, 64, 2) / 64)).repeat(1, 2)

    def at(x, m):
        return rotate(x, angles[m:m + 1].cos(), angles[m:m + 1].sin())

    near, far = (at(q, 5) * at(k, 2)).sum(), (at(q, 22) * at(k, 19)).sum()
    assert near.item() == pytest.approx(far.item(), rel=1e-4, abs=1e-4)
    assert at(q, 50).norm() == pytest.approx(q.norm().item(), rel=1e-5)


def test_parts_equal_their_formulas():
    x = torch.randn(3, 5, 16)
    norm = RMSNorm(16, 1e-5)
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-6)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.05)
    mlp = SwiGLU(ModelConfig(1, 1, 16, 40, 8, 8))
    g, u, d = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gate = x @ g.T
    assert torch.allclose(mlp(x), (gate * gate.sigmoid() * (x @ u.T)) @ d.T, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_sdpa_equals_the_reference(heads):
    q = torch.randn(2, heads[0], 37, 16, requires_grad=True)
    k, v = (torch.randn(2, heads[1], 37, 16, requires_grad=True) for _ in range(2))
    grads = []
    for backend in ("sdpa", "reference"):
        y = attend(q, k, v, backend)
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_xformers_is_refused_on_a_cpu():
    assert "needs a CUDA device" in attention_refusal("xformers", "cpu")


def test_cache_equals_no_cache_with_rows_of_different_lengths():
    config = random_config(1)
    model = build(config, factor=6.0)
    ids = torch.randint(0, config.vocab_size, (3, 40))
    full = model(ids)
    lengths = torch.tensor([5, 12, 9])
    cache = KVCache(config, 3, 60, "cpu", torch.float32)
    with torch.no_grad():
        first = model(ids[:, :12], cache=cache)  # rows 0 and 2 carry tokens beyond their length
        cache.lengths += lengths
        for row, length in enumerate(lengths):
            assert torch.allclose(first[row, :length], full[row, :length], rtol=0,
                                  atol=1e-5 * full.abs().max().item())
        for step in range(20):
            ahead = ids[torch.arange(3), lengths + step][:, None]
            logits = model(ahead, cache=cache)
            cache.lengths += 1
            for row, length in enumerate(lengths):
                assert torch.allclose(logits[row, 0], full[row, length + step], rtol=0,
                                      atol=1e-5 * full.abs().max().item())


def test_first_weights_do_not_depend_on_depth():
    shallow, deep = (build(ModelConfig(n, 2, 16, 32, 50, 8)) for n in (2, 5))
    deep_weights = dict(deep.named_parameters())
    for name, p in shallow.named_parameters():
        assert torch.equal(p, deep_weights[name]), name
    with pytest.raises(ValueError, match="no rule"):
        initial_weight("model.layers.0.extra", torch.Size([2]), shallow.config, 0)


def test_ignored_targets_do_not_count():
    model = build(random_config(0))
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    targets = ids.roll(-1, 1)
    masked = targets.clone()
    masked[1] = IGNORE
    assert torch.allclose(model(ids, masked), model(ids[:1], targets[:1]), rtol=1e-6)


def test_parameters_and_flops_of_the_mission():
    with torch.device("meta"):
        model = LLaMA(ModelConfig(16, 12, 768, 2048, 32000, 1024))
    total, without_ends, _ = parameter_counts(model)
    assert round(without_ends / 1e6, 1) == 113.3 and round(total / 1e6, 1) == 162.4
    matmul = without_ends - 33 * 768 + 768 * 32000  # without the gains, with the output matrix
    assert flops_per_token(model.config, 1024) == 6 * matmul + 12 * 16 * 768 * 1024


@pytest.mark.parametrize("kv", [1, 4])
def test_flops_equal_what_torch_counts(kv):
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(3, 4, 64, 160, 300, 64, n_kv_head=kv, attention="reference")
    model = build(config)
    ids = torch.randint(0, 300, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert flops_per_token(config, 64) * 128 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_model_imports_torch_alone():
    allowed = {"torch", "math", "dataclasses", "hashlib", "collections", "inspect", "xformers"}
    for node in ast.walk(ast.parse(Path(ROOT / "model.py").read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed


def test_rms_norm_and_its_gradients_are_torchs():
    torch.manual_seed(0)
    norm = RMSNorm(96, eps=1e-5)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    theirs = torch.nn.RMSNorm(96, eps=1e-5)
    theirs.load_state_dict(norm.state_dict())
    x, slope = torch.randn(3, 5, 96), torch.randn(3, 5, 96)
    found = []
    for module in (norm, theirs):
        states = x.clone().requires_grad_()
        y = module(states)
        y.backward(slope)
        found.append((y, states.grad, module.weight.grad))
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    double = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *at: Normalise.apply(*at, 1e-5), (double, gain))


def test_the_defaults_are_llamas():
    config = ModelConfig(1, 2, 8, 3, 4, 5)
    assert dataclasses.astuple(config) == (
        1, 2, 8, 3, 4, 5, 0, 1e4, "none", 1.0, 0, 1.0, 4.0, 1e-5, False, "sdpa", False,
        "none", 0, "lerp", 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 2
    assert (config.kv_heads, config.head_dim, config.blocks) == (2, 4, 1)
    grown = dataclasses.replace(config, n_kv_head=1, expand_blocks=2)
    assert (grown.kv_heads, grown.blocks) == (1, 3)
    assert (IGNORE, room.LOGITS_BYTES) == (-100, 1 << 29)
    assert LLaMA(config).model.layers[0].random is False


@pytest.mark.parametrize("low", [1.0, 2.0])
def test_stretched_frequencies_by_hand(low):
    config = ModelConfig(1, 1, 64, 1, 1, 1, rope_theta=1000.0, rope_factor=4.0, rope_original=100,
                         rope_low=low, rope_high=8.0)
    found = {kind: room.rope_frequencies(dataclasses.replace(config, rope_scaling=kind)).tolist()
             for kind in room.ROPE_SCALINGS}
    kept = set()
    for i, frequency in enumerate(1000.0 ** (-2 * i / 64) for i in range(32)):
        turns = 100 * frequency / (2 * math.pi)
        keep = min(max((turns - low) / (8 - low), 0), 1)
        kept.add(keep if keep in (0, 1) else "some")
        assert found["none"][i] == pytest.approx(frequency, rel=1e-5)
        assert found["linear"][i] == pytest.approx(frequency / 4, rel=1e-5)
        assert found["llama3"][i] == pytest.approx(
            keep * frequency + (1 - keep) * frequency / 4, rel=1e-4)
    assert kept == {0, 1, "some"} and len(found["none"]) == 32


def test_a_norm_with_a_large_epsilon_and_where_it_is_computed(monkeypatch):
    """On a CPU by our own few passes, on a GPU by torch's kernel."""
    x, norm = torch.randn(2, 3, 8), RMSNorm(8, 0.5)
    norm.weight.data.normal_()
    expected = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-6)
    there = types.SimpleNamespace(is_cuda=True, dtype=torch.float32, float=lambda: x)
    with monkeypatch.context() as patch:
        patch.setattr(F, "rms_norm", None)
        assert torch.allclose(norm(x), expected, atol=1e-6)
    monkeypatch.setattr(Normalise, "apply", None)
    assert torch.allclose(norm(there), expected, atol=1e-6)


# ---- attention

@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("shape", [(4, 2, 2, 4), (4, 2, 4, 4), (4, 4, 3, 5), (2, 1, 2, 2)])
def test_queries_look_where_a_mask_lets_them(backend, shape):
    """(H, K, T, S), among them numbers that are equal by chance."""
    H, K, T, S = shape
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, S, 8), torch.randn(2, K, S, 8)
    mask = torch.rand(2, 1, T, S) < 0.5
    mask[..., 0] = True
    masks = [mask, None] if T == S else [mask]
    for mask in masks:
        found = attend(q, k, v, backend, mask)
        seen = torch.ones(2, 1, T, S).tril().bool() if mask is None else mask
        for h in range(H):
            keys, values = k[:, h // (H // K)].double(), v[:, h // (H // K)].double()
            scores = torch.einsum("bqd,bkd->bqk", q[:, h].double(), keys) / 8**0.5
            chances = scores.masked_fill(~seen[:, 0], -math.inf).softmax(-1)
            assert torch.allclose(found[:, h].double(), chances @ values, atol=1e-5)


def test_bounds_of_documents():
    for rows, bounds in (
            ([[0, 0, 0]], [0, 3]), ([[1, 0, 0]], [0, 3]), ([[1, 1, 0]], [0, 1, 3]),
            ([[0, 0, 1], [0, 1, 0]], [0, 2, 3, 4, 6]),
            ([[0, 1, 1, 1, 1]], [0, 1, 2, 3, 4, 5, 5, 5, 5]),
            ([[0, 0], [0, 0], [0, 0]], [0, 2, 4, 6, 6])):
        found = document_bounds(torch.tensor(rows).bool())
        assert found.tolist() == bounds and found.dtype == torch.int32
    assert document_bounds(torch.zeros(0, 4, dtype=torch.bool)).tolist() == [0, 0]


@pytest.mark.parametrize(("rows", "heads"), [(1, (4, 2)), (3, (4, 4)), (2, (2, 1))])
def test_a_query_looks_inside_its_document_only(rows, heads):
    starts = torch.rand(rows, 9, generator=torch.Generator().manual_seed(3)) < 0.3
    q = torch.randn(rows, heads[0], 9, 6)
    k, v = torch.randn(rows, heads[1], 9, 6), torch.randn(rows, heads[1], 9, 6)
    bounds = document_bounds(starts)
    found = [attend(q, k, v, backend, documents=bounds) for backend in ("sdpa", "reference")]
    for row in range(rows):
        edges = [0, *(i for i in range(1, 9) if starts[row, i]), 9]
        assert rows == 1 or len(edges) > 3
        for a, b in itertools.pairwise(edges):
            alone = attend(*(x[row:row + 1, :, a:b] for x in (q, k, v)), "reference")[0]
            for each in found:
                assert torch.allclose(each[row, :, a:b], alone, atol=1e-5)


def test_documents_on_a_gpu_are_one_call(monkeypatch):
    """Without --attention=varlen too, in training and in evaluation; not in fp32, where the kernel
    does not go."""
    assert not attention_refusal("sdpa", "cuda", torch.bfloat16, True)
    for name in ("varlen", "by_document"):
        monkeypatch.setattr(room, name, lambda *inputs, name=name: name)
    for cuda, dtype, called in ((True, torch.bfloat16, "varlen"), (True, torch.float16, "varlen"),
                                (True, torch.float32, "by_document"),
                                (False, torch.bfloat16, "by_document"),
                                (False, torch.float32, "by_document")):
        q = types.SimpleNamespace(is_cuda=cuda, dtype=dtype)
        assert room.sdpa(q, q, q, None, torch.zeros(2)) == called


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_varlen_is_called_as_the_kernel_wants_it(monkeypatch, kv):
    """On the CPU with a stand-in for the kernel that computes what torch documents."""
    from torch.nn.attention.varlen import varlen_attn

    assert ("enable_gqa" in inspect.signature(varlen_attn).parameters) == room.VARLEN_GROUPS

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False):
        assert window_size == (-1, 0) and torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32
        assert q.dim() == 3 and max_q == max_k == T
        assert enable_gqa == (q.shape[1] != k.shape[1]) and q.shape[1] == 4
        assert k.shape[1] == (kv if room.VARLEN_GROUPS else 4)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = [F.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
            for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True) if b > a]
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    for B, T in ((3, 32), (2, 4), (1, 2)):
        q, k, v = torch.randn(B, 4, T, 8), torch.randn(B, kv, T, 8), torch.randn(B, kv, T, 8)
        for documents in (None, document_bounds(torch.rand(B, T) < 0.2)):
            expected = attend(q, k, v, "reference", documents=documents)
            for groups in (True, False):  # torch 2.11 has no grouped heads
                monkeypatch.setattr(room, "VARLEN_GROUPS", groups)
                found = attend(q, k, v, "varlen", documents=documents)
                assert found.shape == q.shape and (found - expected).abs().max() < 1e-5


def test_xformers_is_called_as_it_wants(monkeypatch):
    """Heads behind tokens, as many of keys as of queries."""
    class Lower:
        pass

    def efficient(q, k, v, attn_bias):
        assert isinstance(attn_bias, Lower) and q.shape == k.shape == v.shape == (2, 5, 4, 8)
        return room.causal(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.SimpleNamespace(
        LowerTriangularMask=Lower, memory_efficient_attention=efficient))
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    expected = attend(q, k, v, "reference")
    assert torch.allclose(attend(q, k, v, "xformers"), expected, atol=1e-5)


def test_what_a_pass_looks_at(monkeypatch):
    """The first one with a cache is causal, without a mask; states go to `watch` in order."""
    net, masks, real = build(random_config(1), factor=6.0), [], room.attend
    layers = net.config.n_layer
    monkeypatch.setattr(room, "attend", lambda q, k, v, backend, mask=None, documents=None: (
        masks.append((mask, q.shape[2], k.shape[2])) or real(q, k, v, backend, mask, documents)))
    ids = torch.randint(0, net.config.vocab_size, (2, 6))
    cache = KVCache(net.config, 2, 10, "cpu", torch.float32)
    assert cache.used == 0 and cache.k.shape == (
        net.config.blocks, 2, net.config.kv_heads, 10, net.config.head_dim) == cache.v.shape
    first = net(ids[:, :4], cache=cache)
    assert masks == [(None, 4, 4)] * layers and cache.used == 4
    cache.lengths += 4
    second = net(ids[:, 4:], cache=cache)
    assert [found[1:] for found in masks[layers:]] == [(2, 6)] * layers and cache.used == 6
    assert masks[-1][0].tolist() == [[[[True] * 5 + [False], [True] * 6]]] * 2
    assert torch.allclose(torch.cat([first, second], 1), net(ids), atol=1e-4)
    cache.keep(torch.tensor([1]))
    assert cache.k.shape[1] == cache.v.shape[1] == len(cache.lengths) == 1
    states: list = []
    last = net.hidden(ids, watch=states.append)
    assert len(states) == layers + 1 and torch.equal(states[-1], last)
    assert torch.equal(states[0], net.model.embed_tokens(ids))
    rope = net.rope_cos[:6], net.rope_sin[:6]
    assert torch.equal(net.model.norm(net.model.layers[-1](states[-2], rope, *[None] * 4)), last)


@pytest.mark.parametrize(("on", "passes", "without"), [(False, 1, 1), (True, 2, 1)])
def test_blocks_are_computed_twice_where_that_is_asked(monkeypatch, on, passes, without):
    config = ModelConfig(1, 2, 16, 24, 30, 8, activation_checkpointing=on)
    net, calls, how, real = build(config), [], [], room.Block.compute
    kept, checkpoint = [], room.checkpoint
    monkeypatch.setattr(room.Block, "compute", lambda *at: calls.append(1) or real(*at))
    monkeypatch.setattr(room, "checkpoint",
                        lambda *at, **keys: how.append(keys) or checkpoint(*at, **keys))
    ids = torch.randint(0, 30, (2, 8))
    loss = net(ids, ids)
    kept = torch.autograd.grad(loss, list(net.parameters()))
    assert len(calls) == passes and all(grad.isfinite().all() for grad in kept)
    assert how == [{"use_reentrant": False, "preserve_rng_state": False}] * on
    calls.clear()
    with torch.no_grad():
        net(ids, ids)
    assert len(calls) == without and len(how) == on


# ---- the loss

def small(tied: bool = False, frozen: int = 0) -> LLaMA:
    """V = 30, of an output matrix of which the first rows may be frozen: none or all."""
    torch.manual_seed(4)
    net = build(ModelConfig(1, 2, 16, 24, 30, 8, tie_embeddings=tied), factor=20.0)
    net.lm_head.weight.requires_grad_(not frozen)
    return net


@pytest.mark.parametrize("frozen", [0, 30])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_in_chunks_is_the_loss(monkeypatch, tied, frozen):
    """Of all tokens or of some places, summed or each: in chunks as at once, with gradients and
    without, to what cross_entropy says."""
    net, ids = small(tied, frozen), torch.randint(0, 30, (3, 8))
    targets = torch.randint(0, 30, (3, 8))
    targets[0, :4], targets[1, 2:5] = 0, IGNORE
    places = torch.tensor([1, 2, 7, 9, 13, 22])
    learned = [p for p in net.parameters() if p.requires_grad]
    for kind in ({}, {"places": places}, {"each": True}, {"places": places, "each": True}):
        wanted = targets.flatten()[kind.get("places", slice(None))]
        logits = net(ids).flatten(0, 1)[kind.get("places", slice(None))]
        expected = F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORE)
        factor = torch.arange(1, len(wanted) + 1) if "each" in kind else torch.tensor(0.5)
        expected = expected if "each" in kind else expected.sum()
        slopes = torch.autograd.grad((expected * factor).sum(), learned)
        for size in (1 << 20, 4 * 30 * 5, 4 * 30 * 20, 1):
            monkeypatch.setattr(room, "LOGITS_BYTES", size)
            given = targets.flatten()[places] if "places" in kind else targets
            found = net(ids, given, **kind)
            assert found.dtype == torch.float32 and found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
            grads = torch.autograd.grad((found * factor).sum(), learned)
            for grad, slope in zip(grads, slopes, strict=True):
                assert (grad - slope).abs().max() <= 1e-5 * slope.abs().max().clamp(min=1e-3)
            with torch.no_grad():
                assert torch.allclose(net(ids, given, **kind), expected, rtol=1e-5, atol=1e-5)


def test_how_a_loss_is_cut(monkeypatch):
    """All at once while the logits fit into LOGITS_BYTES, of which there is a quarter where the
    chunks' size helps nothing; else in chunks that end each other's logits."""
    def seen(net: LLaMA, room_for: int, **kind) -> tuple:
        monkeypatch.setattr(room, "LOGITS_BYTES", room_for)
        sizes.clear()
        ids = torch.zeros(2, 8, dtype=torch.long)
        net(ids, ids, **kind)
        return tuple(sizes)

    sizes, real, linear = [], LLaMA.losses, F.linear
    monkeypatch.setattr(LLaMA, "losses", lambda net, x, *rest: sizes.append(len(x)) or real(
        net, x, *rest))

    def watched(x, w):
        if len(w) == 30 and sizes[-1:] != [len(x)]:  # not within losses()
            sizes.append(-len(x))
        return linear(x, w)

    monkeypatch.setattr(room.F, "linear", watched)
    whole, logits = 16 * 30 * 4, 30 * 4
    for net, quarter in ((small(), False), (small(frozen=30), True)):
        for each in (False, True):
            times = 4 if quarter or each else 1
            assert seen(net, times * whole, each=each) == (16,)
            cut = seen(net, times * whole - times, each=each)
            assert cut == ((15, 1) if each else (-15, -1))
            assert seen(net, times * 3 * logits, each=each)[:2] == ((3, 3) if each else (-3, -3))
    grown = small()
    with torch.no_grad():
        calls, one = [], room.without_one
        monkeypatch.setattr(room, "without_one", lambda *at: calls.append(1) or one(*at))
        seen(grown, logits)
        assert not calls  # nobody asks for gradients
    seen(grown, logits)
    assert len(calls) == 16


def test_rows_of_a_chunk():
    """About 4,096, a multiple of 256 where they are that many."""
    assert room.chunk_rows(32000, room.LOGITS_BYTES) == 4096
    for entries in (50304, 65536, 100000, 128256, 256000):
        rows = room.chunk_rows(entries, room.LOGITS_BYTES)
        assert rows % 256 == 0 and rows * entries * 4 <= room.LOGITS_BYTES
    assert [room.chunk_rows(10, 40 * rows) for rows in (0, 1, 2, 255, 256, 511, 512, 513)] == [
        1, 1, 2, 255, 256, 256, 512, 512]
    assert room.chunk_rows(10, 40 * 256 - 1) == 255


def test_the_one_hot_by_comparison_is_that_by_place(monkeypatch):
    p, place = torch.rand(5, 40), torch.tensor([[0], [39], [7], [7], [12]])
    copy = p.clone()
    assert room.without_one(copy, place) is copy  # in place: only n numbers are touched
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(room.without_one(p, place), copy)
    assert torch.equal(copy, p - F.one_hot(place[:, 0], 40))


def test_what_is_computed_and_what_learns():
    net = small()
    assert not [name for name in net.state_dict() if "rope" in name]
    assert not [name for name, _ in net.named_parameters() if "bias" in name]
    assert len(list(room.trained(net))) == len(list(net.parameters())) == 12
    weight, learned = net.lm_head.parts(torch.float32)
    assert weight is learned is net.lm_head.weight
    net.lm_head.weight.requires_grad_(False)
    weight, learned = net.lm_head.parts(torch.float32)
    assert weight is net.lm_head.weight and learned.shape == (0, 16)
    assert "lm_head.weight" not in dict(room.trained(net)) and len(list(room.trained(net))) == 11
    net.compute_dtype = torch.bfloat16
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert net(ids).dtype == torch.bfloat16 and net(ids, ids).dtype == torch.float32
    assert flops_per_token(ModelConfig(2, 4, 64, 96, 300, 8, n_kv_head=2, expand_blocks=1), 10) == (
        6 * (3 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 300) + 12 * 3 * 64 * 10)
