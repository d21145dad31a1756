"""The model against transformers' LlamaForCausalLM and against hand formulas."""

import ast
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from model import (
    IGNORE,
    KVCache,
    LLaMA,
    ModelConfig,
    Normalise,
    RMSNorm,
    SwiGLU,
    attend,
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
