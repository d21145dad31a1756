"""Matrices in few bits: the codes of bitsandbytes, the error of the papers, exact gradients."""

import statistics

import pytest
import torch
import torch.nn.functional as F

from plainllama.weights import quantised
from plainllama.weights.quantised import QUANTISED, Product

SHAPES = [(64, 64), (96, 40), (7, 19), (1, 64), (256, 300)]


def normal(shape, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_has_the_codes_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = normal(shape, 3) * torch.linspace(0.1, 3, shape[1])
    theirs, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    parts = QUANTISED["nf4"][0](matrix)
    count = (matrix.numel() + 1) // 2
    assert torch.equal(parts["codes"].flatten()[:count], theirs.flatten())
    largest = F.pad(matrix.flatten(), (0, -matrix.numel() % 64)).view(-1, 64).abs().amax(1)
    assert torch.equal(largest, state.absmax)
    held = (parts["largest"] * parts["scale"] + parts["mean"]).flatten()[:len(largest)]
    assert (held - largest).abs().max() <= (largest - largest.mean()).abs().max() / 254 + 1e-6


@pytest.mark.parametrize(("kind", "error", "bits"), [("nf4", 0.0922, 4.128), ("int8", 0.008, 8.04)])
def test_error_and_size_are_those_of_the_papers(kind, error, bits):
    matrix = normal((1024, 1024))
    parts = QUANTISED[kind][0](matrix)
    again = QUANTISED[kind][1](parts, matrix.shape, torch.float32)
    assert 0.9 * error < ((again - matrix).norm() / matrix.norm()).item() < error
    held = sum(part.numel() * part.element_size() for part in parts.values())
    assert 8 * held / matrix.numel() <= bits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_has_the_gradient_of_the_dense_matrix(kind, shape):
    parts = QUANTISED[kind][0](normal(shape))
    dense = QUANTISED[kind][1](parts, shape, torch.float32)
    x = normal((5, shape[1]), 1).requires_grad_()
    slope = normal((5, shape[0]), 2)
    y = Product.apply(x, kind, shape, tuple(parts), *parts.values())
    (got,) = torch.autograd.grad(y, x, slope)
    (want,) = torch.autograd.grad(F.linear(x, dense), x, slope)
    assert torch.equal(y, F.linear(x, dense)) and torch.equal(got, want)


def test_zero_rows_and_constant_matrices_come_back():
    for kind, (to, back) in QUANTISED.items():
        for matrix in (torch.zeros(3, 64), torch.full((2, 128), 0.5)):
            again = back(to(matrix), matrix.shape, torch.float32)
            assert torch.allclose(again, matrix, atol=1e-6), kind


def test_int8_errs_as_torchao_does():
    """Weight-only int8 with a scale a row: the same relative error, within a hundredth."""
    quantization = pytest.importorskip(
        "torchao.quantization", reason="by hand, with torchao 0.18: where it is installed, every "
        "process that imports transformers waits three seconds more")
    torch.manual_seed(0)
    for weight in (torch.randn(96, 344) * 0.02,
                   torch.randn(64, 128) * torch.randn(64, 1).exp()):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        holder = torch.nn.Sequential(linear)
        quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
        theirs = holder[0].weight.dequantize()
        quantise, restore = QUANTISED["int8"]
        ours = restore(quantise(weight), weight.shape, torch.float32)
        errors = [((one - weight).norm() / weight.norm()).item() for one in (ours, theirs)]
        assert errors[0] <= 1.01 * errors[1]


def test_the_levels_are_qloras():
    """Appendix E of the paper: half of the levels are quantiles of one side, half of the other,
    with 0 shared, and the widest at 1. And the sizes of blocks and groups."""
    at = statistics.NormalDist().inv_cdf
    most = (1 / 2 - 1 / 32 + 1 / 2 - 1 / 30) / 2
    above = [at(0.5 + most * i / 8) for i in range(1, 9)]
    below = [-at(0.5 + most * i / 7) for i in range(7, 0, -1)]
    wanted = [level / max(above) for level in (*below, 0.0, *above)]
    assert all(abs(a - b) < 1e-6 for a, b in zip(quantised.LEVELS, wanted, strict=True))
    assert (quantised.BLOCK, quantised.GROUP, quantised.AT_ONCE) == (64, 256, 1 << 20)


def test_int8_by_hand():
    parts = QUANTISED["int8"][0](torch.tensor([[127.0, -63.5, 1.4, 0.6], [0.0, 0.0, 0.0, 0.0],
                                              [1.0, -2.0, 0.5, 0.0]]))
    assert parts["codes"].tolist() == [[127, -64, 1, 1], [0, 0, 0, 0], [64, -127, 32, 0]]
    assert parts["codes"].dtype == torch.int8 and parts["scale"].shape == (3, 1)
    assert torch.allclose(parts["scale"][:, 0], torch.tensor([1.0, 0.0, 2 / 127]))
    again = QUANTISED["int8"][1](parts, (3, 4), torch.bfloat16)
    assert again.dtype == torch.bfloat16 and again[0].tolist() == [127, -64, 1, 1]


@pytest.mark.parametrize("shape", [(3, 64), (5, 13), (300, 64), (257, 64)])
def test_nf4_by_hand(shape):
    """A weight at a time: the nearest level of its block's largest, which is held in 8 bits."""
    matrix = normal(shape, 7) * torch.linspace(0.1, 3, shape[0])[:, None]
    parts, levels = QUANTISED["nf4"][0](matrix), torch.tensor(quantised.LEVELS)
    flat = [*matrix.flatten().tolist(), *[0.0] * (-matrix.numel() % 64)]
    blocks = torch.tensor(flat).view(-1, 64)
    largest = blocks.abs().amax(1)
    nearest = (blocks / largest[:, None]).flatten()[:, None].sub(levels).abs().argmin(1)
    assert parts["codes"].tolist() == (16 * nearest[::2] + nearest[1::2]).tolist()
    assert parts["mean"].item() == pytest.approx(largest.mean().item(), rel=1e-6)
    centred = largest - largest.mean()
    groups = list(centred.split(256))
    assert parts["largest"].shape == (len(groups), 256) and parts["scale"].shape == (len(groups), 1)
    for group, held, scale in zip(groups, parts["largest"], parts["scale"], strict=True):
        assert scale.item() == pytest.approx(group.abs().max().item() / 127, rel=1e-5, abs=1e-12)
        right = (group / scale).round() if scale > 0 else 0 * group
        assert (held[:len(group)] - right).abs().max() <= 1 and not held[len(group):].any()
        if scale > 0:
            assert held.abs().max() == 127
    again = QUANTISED["nf4"][1](parts, shape, torch.float32)
    held = (parts["largest"] * parts["scale"]).flatten()[:len(largest)] + parts["mean"]
    wanted = (levels[nearest].view(-1, 64) * held[:, None]).flatten()[:matrix.numel()]
    assert torch.allclose(again.flatten(), wanted, atol=1e-6) and again.shape == shape


def test_weights_are_looked_at_some_at_a_time(monkeypatch):
    """The distances to all levels take 16 times a matrix's room; on meta there is none to take."""
    whole = QUANTISED["nf4"][0](normal((10, 64)))
    monkeypatch.setattr(quantised, "AT_ONCE", 3 * 64)
    seen, real = [], torch.Tensor.argmin
    monkeypatch.setattr(torch.Tensor, "argmin", lambda x, dim: seen.append(len(x)) or real(x, dim))
    again = QUANTISED["nf4"][0](normal((10, 64)))
    assert seen == [3, 3, 3, 1] and all(torch.equal(whole[name], again[name]) for name in whole)
    seen.clear()
    outline = QUANTISED["nf4"][0](torch.empty(10, 64, device="meta"))
    assert seen == [10] and {name: part.shape for name, part in outline.items()} == {
        name: part.shape for name, part in whole.items()}


def test_a_product_keeps_nothing_dense():
    kept = []
    parts = QUANTISED["nf4"][0](normal((64, 64)))
    x = normal((2, 3, 64), 1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.dtype) or tensor, lambda tensor: tensor):
        y = Product.apply(x.bfloat16(), "nf4", (64, 64), tuple(parts), *parts.values())
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 64)
    assert kept == [torch.uint8, torch.int8, torch.float32, torch.float32]
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_a_block_of_zeros_among_others_comes_back_as_zeros():
    """What its largest weight is held as may be off by a little: its codes say 0."""
    matrix = normal((4, 64)) * torch.tensor([[1.0], [0.0], [3.0], [0.5]])
    for kind, (to, back) in QUANTISED.items():
        parts = to(matrix)
        again = back(parts, matrix.shape, torch.float32)
        assert not again[1].any() and (again[::2] != 0).any(), kind
        assert kind == "int8" or (parts["codes"][32:64] == 0x77).all()
