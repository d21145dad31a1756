"""One attention function, its back ends behind it.

sdpa       torch's scaled_dot_product_attention, flash kernels where the device has them
varlen     torch's flash attention for packed documents, CUDA in bf16 or fp16 only
xformers   memory_efficient_attention, CUDA only; an optional package
reference  softmax(q k^T / sqrt(D)) v, spelled out: what the tests compare the others with
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 has varlen_attn without grouped heads
VARLEN_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None = None,
           documents: Tensor | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D); H is a multiple of H_kv.

    Causal (then T == S) unless `mask` is given: boolean, broadcast to (B, H, T, S), True where a
    query may look. With `documents`, the bounds() of the rows, a query looks inside its own
    document only. Query head h uses key head h // (H / H_kv), as in grouped-query attention
    (https://arxiv.org/abs/2305.13245).
    """
    if mask is not None and backend != "reference":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if backend == "varlen":
        return packed(q, k, v, documents)
    if backend == "sdpa":
        return causal(q, k, v) if documents is None else by_document(q, k, v, documents)
    k, v = repeated(q, k), repeated(q, v)
    if backend == "xformers":
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # xformers has the heads after the tokens
        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask()).transpose(1, 2)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if documents is not None:
        places = torch.arange(q.shape[0] * q.shape[2], device=q.device)
        owner = torch.searchsorted(documents, places, right=True).view(q.shape[0], 1, -1)
        mask = mask & (owner[..., None] == owner[..., None, :])
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's choice of kernel, shapes as in attend()."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                          enable_gqa=q.shape[1] != k.shape[1])


def repeated(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values (B, H_kv, S, D), each head repeated for its group of query heads."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def packed(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """attend() by the kernel that takes all rows as one line of tokens with their bounds."""
    B, _, T, _ = q.shape
    if documents is None:
        documents = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    if not VARLEN_GROUPS:
        k, v = repeated(q, k), repeated(q, v)
    groups: dict = {"enable_gqa": q.shape[1] != k.shape[1]} if VARLEN_GROUPS else {}
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, heads, D)
    y = varlen_attn(q, k, v, documents, documents, T, T, window_size=(-1, 0), **groups)
    return y.unflatten(0, (B, T)).transpose(1, 2)  # type: ignore[union-attr]


@torch.compiler.disable  # the number and lengths of documents differ from batch to batch
def by_document(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """attend() by one causal call for each document: on a CPU faster than any mask."""
    B, _, T, _ = q.shape
    lengths = [n for n in documents.diff().tolist() if n]
    pieces = zip(*(x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(lengths, 2)
                   for x in (q, k, v)), strict=True)
    y = torch.cat([causal(*piece) for piece in pieces], 2)[0]  # (H, B T, D)
    return y.unflatten(1, (B, T)).transpose(0, 1)


def bounds(ids: Tensor, begin: int) -> Tensor:
    """Token ids (B, T) on the host -> (N + 1,) int32 on the host: where documents begin in the rows
    laid end to end, and last B T. A row begins one, and so does every token `begin`. N is a power
    of two, filled up with empty documents, so that compiled code sees few sizes."""
    first = ids == begin
    first[:, 0] = True
    starts = first.flatten().nonzero()[:, 0].int()
    room = 1 << max(len(starts) - 1, 0).bit_length()
    return F.pad(starts, (0, room + 1 - len(starts)), value=ids.numel())


def refusal(backend: str, device: str, dtype: torch.dtype = torch.bfloat16,
            doc_mask: bool = False) -> str:
    """Why `backend` cannot run on `device` ('cpu', 'cuda', 'mps') in `dtype` here, or ''."""
    if backend in ("varlen", "xformers") and device != "cuda":
        return f"attention={backend} needs a CUDA device, found {device}; use attention=sdpa"
    if backend == "varlen" and dtype == torch.float32:
        return "attention=varlen computes in bf16 or fp16 only; use attention=sdpa or another dtype"
    if doc_mask and device == "cuda" and backend in ("sdpa", "xformers"):
        return f"doc_mask on CUDA needs attention=varlen, found {backend}"
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            return (f"attention=xformers: {error}; install it with `pip install xformers` or use "
                    "attention=sdpa")
    return ""
