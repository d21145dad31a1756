"""Matrices in few bits: the codes of bitsandbytes, the error of the papers, exact gradients."""

import pytest
import torch
import torch.nn.functional as F

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
