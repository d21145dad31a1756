"""Frozen matrices in few bits: int8 with a scale for each row, nf4 with one for each 64 weights.

nf4 is QLoRA's NormalFloat (https://arxiv.org/abs/2305.14314): 16 levels at quantiles of the normal
distribution, so that each is used equally often by normal weights. The largest of each block of 64
is itself held in 8 bits, in groups of 256 blocks: 4.127 bits a weight. The levels, the codes and
their order in a byte are those of bitsandbytes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
          -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
          0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
BLOCK, GROUP = 64, 256  # weights that share a largest one; blocks whose largest share a scale
AT_ONCE = 1 << 20  # weights that are compared with the levels at a time
Parts = dict[str, Tensor]


def to_int8(matrix: Tensor) -> Parts:
    """(out, in) -> codes int8 (out, in) and scale fp32 (out, 1): the largest of a row is 127."""
    scale = matrix.float().abs().amax(1, keepdim=True) / 127
    codes = (matrix / torch.where(scale > 0, scale, 1.0)).round()
    return {"codes": codes.to(torch.int8), "scale": scale}


def from_int8(parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that to_int8 made `parts` of, rounded."""
    return (parts["codes"] * parts["scale"]).to(dtype)


def to_nf4(matrix: Tensor) -> Parts:
    """(out, in) -> codes uint8 (two weights each, the first in the high bits), and of the blocks
    what their largest weight is: int8 `largest` times fp32 `scale`, a group each, and `mean` ()."""
    flat = matrix.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    inverse = 1 / torch.where(largest > 0, largest, 1.0)
    levels = torch.tensor(LEVELS, device=matrix.device)
    some = len(blocks) if matrix.is_meta else AT_ONCE // BLOCK
    codes = torch.cat([((rows * by[:, None])[..., None] - levels).abs().argmin(-1).byte()
                       for rows, by in zip(blocks.split(some), inverse.split(some), strict=True)])
    pairs = codes.view(-1, 2)
    mean = largest.mean()
    groups = F.pad(largest - mean, (0, -len(largest) % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True) / 127
    held = (groups / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
    return {"codes": pairs[:, 0] << 4 | pairs[:, 1], "largest": held, "scale": scale, "mean": mean}


def from_nf4(parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that to_nf4 made `parts` of, rounded."""
    codes, count = parts["codes"], shape[0] * shape[1]
    levels = torch.tensor(LEVELS, device=codes.device)
    both = torch.cartesian_prod(levels, levels)  # of each byte
    blocks = both.index_select(0, codes.int()).view(-1, BLOCK)
    largest = (parts["largest"] * parts["scale"] + parts["mean"]).flatten()
    blocks.mul_(largest[:len(blocks), None])
    return blocks.flatten()[:count].view(shape).to(dtype)


# frozen_dtype -> (a matrix to its parts, parts to the matrix); to add one: this entry, a choice in
# settings, a case in tests/test_quantised.py
QUANTISED: dict[str, tuple[Callable[[Tensor], Parts], Callable[..., Tensor]]] = {
    "int8": (to_int8, from_int8), "nf4": (to_nf4, from_nf4)}


class Product(torch.autograd.Function):
    """x (..., in) times a quantised matrix: backward makes the matrix once more, so that nothing
    dense is kept in between. The matrix itself has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: str, shape: tuple, names: tuple, *parts: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.save_for_backward(*parts)
        ctx.kind, ctx.shape, ctx.names = kind, shape, names
        return F.linear(x, QUANTISED[kind][1](dict(zip(names, parts, strict=True)), shape, x.dtype))

    @staticmethod
    def backward(ctx, slope: Tensor):  # type: ignore[override]
        """Of x."""
        parts = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        matrix = QUANTISED[ctx.kind][1](parts, ctx.shape, slope.dtype)
        return slope @ matrix, *(None for _ in range(3 + len(parts)))
