"""Schedule, groups and the masked, clipped update."""

import math

import pytest
import torch

from model import LLaMA, ModelConfig
from plainllama.settings import Settings
from plainllama.training import optim
from plainllama.weights.adapters import initial_weight


def config(**keys):
    base = dict(max_steps=100, warmup_steps=10, learning_rate=1e-2, min_lr=1e-3)
    return Settings(**(base | keys))


def test_learning_rate_is_the_formula():
    c = config()
    assert optim.lr(0, c) == pytest.approx(1e-3) and optim.lr(9, c) == pytest.approx(1e-2)
    assert optim.lr(10, c) < 1e-2 and optim.lr(54, c) == pytest.approx(5.5e-3)  # half of 9 to 99
    assert optim.lr(10, c) == pytest.approx(1e-3 + 0.5 * 9e-3 * (1 + math.cos(math.pi / 90)))
    assert optim.lr(1000, c) == pytest.approx(1e-3)
    linear = config(schedule="linear")
    assert optim.lr(54, linear) == pytest.approx(5.5e-3)
    wsd = config(schedule="wsd")  # the last 20 fall
    assert optim.lr(50, wsd) == 1e-2 and optim.lr(79, wsd) == pytest.approx(1e-2)
    assert optim.lr(80, wsd) == pytest.approx(1e-2 - 9e-3 / 20)
    assert optim.lr(89, wsd) == pytest.approx(5.5e-3)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_the_first_update_is_not_idle_and_the_last_has_the_least_rate(schedule):
    for steps in (2, 3, 5, 10, 100):
        for warmup in range(min(steps, 12)):
            c = config(schedule=schedule, max_steps=steps, warmup_steps=warmup)
            rates = [optim.lr(step, c) for step in range(steps)]
            assert rates[max(warmup - 1, 0)] == 1e-2 == max(rates)
            assert rates[0] == pytest.approx(1e-2 / max(warmup, 1))
            assert rates[-1] == 1e-3
            after = rates[max(warmup - 1, 0):]
            assert after == sorted(after, reverse=True)
    assert optim.lr(0, config(schedule=schedule, max_steps=1, warmup_steps=0)) == 1e-2


def test_a_warm_up_longer_than_the_run_is_shortened():
    for steps, asked, kept in ((100, 99, 99), (100, 100, 10), (50, 200, 5), (5, 10, 0)):
        c = config(max_steps=steps, warmup_steps=asked)
        said = optim.fit_warmup(c)
        assert c.warmup_steps == kept and bool(said) == (asked >= steps)
        assert optim.lr(steps - 1, c) == 1e-3


def tiny():
    c = ModelConfig(2, 2, 16, 32, 50, 8, tie_embeddings=True)
    model = LLaMA(c)
    for name, p in model.named_parameters():
        p.data = initial_weight(name, p.shape, c, 0)
    return model


def test_groups_partition_the_parameters_and_decay_matrices_only():
    model = tiny()
    optimizer = optim.make(model, config())
    decayed, plain = (group["params"] for group in optimizer.adamw.param_groups)
    assert {id(p) for p in decayed} | {id(p) for p in plain} == {id(p) for p in model.parameters()}
    assert len(decayed) + len(plain) == len(list(model.parameters()))
    assert all(p.dim() == 2 for p in decayed) and all(p.dim() == 1 for p in plain)
    assert [g["weight_decay"] for g in optimizer.adamw.param_groups] == [0.1, 0.0]


def reference_adamw(w, grads, rates, decay, clip, betas=(0.9, 0.95), eps=1e-8):
    """AdamW with decoupled decay as the paper writes it, in double precision."""
    m = v = torch.zeros_like(w)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        g = g * min(1.0, clip / g.norm().item())
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        w = w - rate * decay * w - rate * step
    return w


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_update_is_adamw_with_clipping(clip):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(6, 4))
    module = torch.nn.ParameterList([w])
    start = w.detach().double()
    optimizer = optim.make(module, config())
    grads = [torch.randn(6, 4) for _ in range(5)]
    rates = [1e-2, 2e-2, 5e-3, 1e-2, 3e-2]
    for g, rate in zip(grads, rates, strict=True):
        w.grad = g.clone()
        optim.step(optimizer, rate, w.grad.norm(), clip)
    expected = reference_adamw(start, [g.double() for g in grads], rates, 0.1, clip)
    assert (w - expected).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_norm_changes_nothing(bad):
    model = tiny()
    optimizer = optim.make(model, config())
    ids = torch.randint(0, 50, (2, 9))
    for norm in (torch.tensor(1.0), torch.tensor(bad)):
        model(ids[:, :-1], ids[:, 1:]).backward()
        before = [p.detach().clone() for p in model.parameters()]
        moments = [s.clone() for p in model.parameters() for s in optimizer.state[p].values()]
        if not norm.isfinite():
            next(model.parameters()).grad[0, 0] = bad
        skipped = optim.step(optimizer, 1e-2, norm, 1.0)
        assert bool(skipped) == (not norm.isfinite())
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        after = [s for p in model.parameters() for s in optimizer.state[p].values()]
        assert same == bool(skipped)
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True)) == same


# ---- Muon

def test_orthogonal_keeps_singular_vectors_and_levels_singular_values():
    torch.manual_seed(1)
    matrices = torch.randn(3, 8, 20) * torch.logspace(0, 1, 8)[:, None]
    found = optim.orthogonal(matrices)
    for x, y in zip(matrices.double(), found.double(), strict=True):
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        inside = u.T @ y @ vt.T  # diagonal, if the singular vectors are those of x
        assert (inside - inside.diag().diag()).abs().max() < 1e-4
        assert inside.diag().min() > 0.6 and inside.diag().max() < 1.3


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = tiny()
    optimizer = optim.make(model, config(optimizer="muon"))
    inside = {id(p) for n, p in model.named_parameters() if "proj" in n}
    assert {id(p) for p in optimizer.muon.state} == inside and len(inside) == 14
    everything = [id(p) for p in model.parameters()]
    adamw = [id(p) for g in optimizer.adamw.param_groups for p in g["params"]]
    assert sorted([*inside, *adamw]) == sorted(everything)
    assert {id(p) for p in optimizer.state} == set(everything)


@pytest.mark.parametrize("name", ["down_proj", "up_proj", "gate_proj"])  # wide, tall, tall
def test_update_is_muon(name):
    """Against torch.optim.Muon, which iterates in bf16: its directions are good to some percent."""
    torch.manual_seed(2)
    model = tiny()
    mine = getattr(model.model.layers[0].mlp, name).weight
    theirs = torch.nn.Parameter(mine.detach().clone())
    optimizer = optim.make(model, config(optimizer="muon"))
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, nesterov=True,
                                 adjust_lr_fn="match_rms_adamw")
    for clip in (1e9, 1e9, 0.5):
        model.zero_grad()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        theirs.grad = mine.grad * min(1, clip / 4)
        before, expected = mine.detach().clone(), theirs.detach().clone()
        optim.step(optimizer, 0.1, torch.tensor(4.0), clip)
        reference.step()
        change, wanted = mine - before, theirs - expected
        assert (change - wanted).norm() < 0.05 * wanted.norm()
        theirs.data.copy_(mine.data)


def test_a_non_finite_norm_leaves_muon_as_it_was():
    model = tiny()
    optimizer = optim.make(model, config(optimizer="muon"))
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    state = [s.clone() for p in model.parameters()
             for s in (p.detach(), *optimizer.state[p].values())]
    assert optim.step(optimizer, 0.1, torch.tensor(float("nan")), 1.0)
    after = [s for p in model.parameters() for s in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
