"""One attention function, its back ends behind it.

sdpa       torch's scaled_dot_product_attention, flash kernels where the device has them
xformers   memory_efficient_attention, CUDA only; an optional package
reference  softmax(q k^T / sqrt(D)) v, spelled out: what the tests compare the others with
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D); H is a multiple of H_kv.

    Causal (then T == S) unless `mask` is given: boolean, broadcast to (B, H, T, S), True where a
    query may look. Query head h uses key head h // (H / H_kv), as in grouped-query attention
    (https://arxiv.org/abs/2305.13245).
    """
    if backend == "sdpa" or (backend == "xformers" and mask is not None):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if backend == "xformers":
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # xformers has the heads after the tokens
        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask()).transpose(1, 2)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v


def refusal(backend: str, device: str) -> str:
    """Why `backend` cannot run on `device` ('cpu', 'cuda', 'mps') here, or ''."""
    if backend != "xformers":
        return ""
    if device != "cuda":
        return f"attention=xformers needs a CUDA device, found {device}; use attention=sdpa"
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        return (f"attention=xformers: {error}; install it with `pip install xformers` or use "
                "attention=sdpa")
    return ""
