"""Schedule, groups and the masked, clipped update."""

import math

import pytest
import torch

from model import LLaMA, ModelConfig
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
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


# ---- the parts of it, exactly

def test_where_the_peak_ends():
    for steps, warmup, ends in ((100, 10, (9, 79)), (100, 0, (0, 79)), (100, 1, (0, 79)),
                                (100, 95, (94, 94)), (1, 0, (0, 0)), (2, 0, (0, 0)), (3, 0, (0, 1)),
                                (10, 0, (0, 7)), (7, 0, (0, 5)), (13, 2, (1, 9))):
        c = config(max_steps=steps, warmup_steps=warmup)
        assert (optim.warmed_up(c), optim.last_fifth(c)) == ends
    shares = {name: [share(done) for done in (0.0, 0.25, 0.5, 1.0)]
              for name, (_, share) in optim.SCHEDULES.items()}
    cosine = [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0]
    assert shares == {"cosine": pytest.approx(cosine), "linear": [1.0, 0.75, 0.5, 0.0],
                      "wsd": [1.0, 0.75, 0.5, 0.0]}
    c = config(schedule="linear", max_steps=11, warmup_steps=0, learning_rate=1.0, min_lr=0.0)
    assert [optim.lr(step, c) for step in (0, 1, 5, 10, 11, 50)] == pytest.approx(
        [1.0, 0.9, 0.5, 0.0, 0.0, 0.0])
    c = config(schedule="wsd", max_steps=20, warmup_steps=4, learning_rate=1.0, min_lr=0.2)
    assert [optim.lr(step, c) for step in (0, 2, 3, 4, 15, 16, 17, 19)] == pytest.approx(
        [0.25, 0.75, 1.0, 1.0, 1.0, 0.8, 0.6, 0.2])


def test_what_a_shortened_warm_up_says():
    c = config(max_steps=29, warmup_steps=29)
    assert optim.fit_warmup(c) == ("warmup_steps 29 does not fit into max_steps 29: the warm-up "
                                   "takes 2 of them")
    c = config(max_steps=29, warmup_steps=28)
    assert optim.fit_warmup(c) == "" and c.warmup_steps == 28


def test_how_an_optimizer_is_made():
    model = tiny()
    made = optim.make(model, config(beta1=0.5, beta2=0.75, weight_decay=0.3)).adamw
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]
    for group in made.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.5, 0.75), 1e-8, True)
    for p, state in made.state.items():
        assert {name: (value.shape, bool(value.any())) for name, value in state.items()} == {
            "step": ((), False), "exp_avg": (p.shape, False), "exp_avg_sq": (p.shape, False)}
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(UserError, match=r"^no parameter learns: all of them are frozen$"):
        optim.make(model, config())
    block = model.model.layers[1].mlp.up_proj.weight
    block.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)
    world = World()
    made = optim.make(model, config(optimizer="muon", weight_decay=0.3), world)
    assert list(made.muon.state) == [block] and made.muon.world is world
    assert made.muon.weight_decay == 0.3 and list(made.adamw.state) == [model.model.norm.weight]
    assert made.state.keys() == {block, model.model.norm.weight} and made.loss_scale is None
    assert (optim.MOMENTUM, optim.STACK) == (0.95, 8)


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """The iteration as Jordan writes it, in double precision."""
    x = x.double() / (x.double().norm() * 1.01 + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_orthogonal_is_the_iteration():
    torch.manual_seed(0)
    for shape in ((3, 4, 7), (1, 5, 5)):
        matrices = torch.randn(shape)
        for x, y in zip(matrices, optim.orthogonal(matrices), strict=True):
            assert (y - newton_schulz(x)).abs().max() < 1e-5
    assert not optim.orthogonal(torch.zeros(1, 2, 3)).any()
    small = torch.randn(1, 3, 5)
    assert (optim.orthogonal(small * 1e-6)[0] - newton_schulz(small[0] * 1e-6)).abs().max() < 1e-4


class Cut(World):
    """A rank that has rows 1.. of every matrix, as of a sharded one."""

    def piece(self, tensor):
        return tensor[1:], 1


@pytest.mark.parametrize("world", [World(), Cut()])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_an_update_of_muon_by_hand(world, shape):
    """Momentum, its Nesterov step, the directions, and decay."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    muon = optim.Muon([parameter], 0.3, world)
    first = 1 if isinstance(world, Cut) else 0
    weight, momentum = parameter.detach().double().clone(), torch.zeros(shape).double()
    for rate, scale in ((0.1, 1.0), (0.2, 4.0), (0.05, 0.5)):
        parameter.grad = torch.randn(shape)
        grad = parameter.grad.double() / scale
        grad[:first] = 0
        momentum = 0.95 * momentum + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * momentum
        turned = ahead if shape[0] <= shape[1] else ahead.T
        direction = newton_schulz(turned)
        direction = (direction if shape[0] <= shape[1] else direction.T) * 0.2 * max(shape)**0.5
        weight[first:] -= rate * direction[first:] + rate * 0.3 * weight[first:]
        before = parameter.detach().clone(), muon.state[parameter]["momentum"].clone()
        muon.step(rate, torch.tensor(scale), torch.tensor(True))  # skipped
        assert torch.equal(parameter, before[0])
        assert torch.equal(muon.state[parameter]["momentum"], before[1])
        muon.step(rate, torch.tensor(scale), torch.tensor(False))
        assert (parameter - weight).abs().max() < 1e-4
        assert (muon.state[parameter]["momentum"] - momentum).abs().max() < 1e-6


def test_who_makes_which_directions(monkeypatch):
    """Eight matrices of a shape are a stack, tall ones turned; each rank makes every size-th."""
    matrices = [torch.nn.Parameter(torch.zeros(shape)) for shape in
                [(2, 3)] * 9 + [(3, 2)] * 2 + [(4, 4)]]
    made = optim.Muon(matrices, 0.0, World())
    assert made.stacks == [matrices[:8], matrices[8:11], matrices[11:]]
    for p in matrices:
        p.grad = torch.ones_like(p)
    for rank, own in ((0, [(8, 2, 3), (1, 4, 4)]), (1, [(3, 2, 3)])):
        stacked, asked = [], []
        world = World(rank, 2)
        monkeypatch.setattr(world, "from_rank", lambda owner, mine, shape, asked=asked: (
            asked.append((owner, mine is not None, shape)) or torch.zeros(shape)))
        monkeypatch.setattr(optim, "orthogonal", lambda x, stacked=stacked: (
            stacked.append(tuple(x.shape)) or x))
        optim.Muon(matrices, 0.0, world).step(0.1, torch.tensor(1.0), torch.tensor(False))
        assert stacked == own
        assert asked == [(0, True, (8, 2, 3)), (1, True, (3, 2, 3)), (0, rank == 0, (1, 4, 4))]


def test_the_scale_of_a_loss_by_hand():
    scale = optim.LossScale(torch.device("cpu"))
    assert (scale.value, scale.good) == (65536, 0)
    for good, skipped, value, after in ((0, False, 65536, 1), (5, True, 32768, 0),
                                        (1998, False, 32768, 1999), (1999, False, 65536, 0),
                                        (2500, False, 131072, 0), (1999, True, 65536, 0)):
        scale.good.fill_(good)
        scale.adjust(torch.tensor(skipped))
        assert (scale.value, scale.good) == (value, after)


def test_what_a_step_hands_to_adamw(monkeypatch):
    """Gradients are divided by norm / clip where that is above 1, times the scale of the loss."""
    model = tiny()
    made = optim.make(model, config())
    monkeypatch.setattr(made.adamw, "step", lambda: None)
    assert made.scale_state() is None
    nan, inf = math.nan, math.inf
    for norm, clip, by, skipped in ((3.0, 1.0, 3.0, 0), (3.0, 2.0, 1.5, 0), (0.5, 1.0, 1.0, 0),
                                    (3.0, 3.0, 1.0, 0), (3.0, 0.0, 1.0, 0), (3.0, 0.5, 6.0, 0),
                                    (nan, 1.0, 1.0, 1), (inf, 0.0, 1.0, 1), (inf, 2.0, 1.0, 1)):
        for scale in (None, 4.0):
            made.loss_scale = optim.LossScale(torch.device("cpu")) if scale else None
            if scale:
                made.loss_scale.value.fill_(scale)
            assert optim.step(made, 0.25, torch.tensor(norm), clip) == skipped
            assert made.adamw.grad_scale == by * (scale or 1)
            assert made.adamw.found_inf == skipped
            assert {group["lr"] for group in made.adamw.param_groups} == {0.25}
            assert made.scale_state() == (scale and [scale / 2 if skipped else scale,
                                                     float(not skipped)])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made.zero_grad()
    assert all(p.grad is None for p in model.parameters())
