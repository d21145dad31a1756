"""The LLaMA and nothing else: RMSNorm, RoPE, grouped-query attention, SwiGLU, KV cache, the loss.

https://arxiv.org/abs/2302.13971

Modules carry the names of Hugging Face's LlamaForCausalLM and RoPE rotates halves as it does, so a
state dict of this model is a Hugging Face checkpoint. Shapes: B rows, T tokens, C = d_model,
H query heads, K key/value heads, D = C / H, V = vocab_size, S cached tokens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

VARLEN_GROUPS = torch.__version__ >= "2.13"  # 2.11 has varlen_attn without grouped heads
IGNORE = -100  # a target that does not count
LOGITS_BYTES = 512 * 2**20  # fp32 logits beyond this are made, and used up, in chunks
# Kernels for shapes that change from call to call: cuDNN builds a plan for every new shape, 0.1 to
# 0.4 s each. Training has one shape, and cuDNN may be the fastest there.
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Names as in settings.py."""

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    vocab_size: int
    block_size: int
    n_kv_head: int = 0  # 0: as many as n_head
    rope_theta: float = 10000.0
    rope_scaling: str = "none"  # none | linear | llama3
    rope_factor: float = 1.0
    rope_original: int = 0  # context before scaling; llama3 only
    rope_low: float = 1.0  # llama3: below this many turns a frequency is fully stretched,
    rope_high: float = 4.0  # above this many it is left alone
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention: str = "sdpa"
    activation_checkpointing: bool = False  # keep the input of each block, compute the rest twice
    # a model that grew (weights/expansion.py): some of its blocks have a second one
    expand: str = "none"
    expand_blocks: int = 0
    expand_merge: str = "lerp"
    first_row: int = 0  # entries of the vocabulary from here on learn, those before are frozen

    @property
    def blocks(self) -> int:
        """All blocks, second ones too: each has a place of its own in a cache."""
        return self.n_layer + self.expand_blocks

    @property
    def kv_heads(self) -> int:
        """Key and value heads K."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        """Width D of a head."""
        return self.d_model // self.n_head


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of channels, (D/2,) fp32, after scaling: theta^(-2i/D)
    (https://arxiv.org/abs/2104.09864), stretched by one of ROPE_SCALINGS."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    return ROPE_SCALINGS[config.rope_scaling](frequencies, config)


def llama3_scaling(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Only frequencies that turn fewer than rope_high times in the original context are stretched,
    smoothly (Llama 3.1, https://arxiv.org/abs/2407.21783)."""
    turns = config.rope_original * frequencies / (2 * math.pi)
    keep = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / config.rope_factor


# linear is position interpolation, https://arxiv.org/abs/2306.15595
ROPE_SCALINGS = {"none": lambda frequencies, config: frequencies, "llama3": llama3_scaling,
                 "linear": lambda frequencies, config: frequencies / config.rope_factor}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, heads, T, D) by tables (T, D) or (B, 1, T, D), computed in fp32."""
    half = x.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    return (x.float() * cos + x.float().roll(half, -1) * sin).to(x.dtype)


class Linear(nn.Linear):
    """A linear map whose fp32 weight is cast to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return F.linear(x, self.weight.to(x.dtype))

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weight for a product in `dtype`, and the last of its rows that learn: all or none."""
        return self.weight, self.weight if self.weight.requires_grad else self.weight[:0]


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain, statistics in fp32 (https://arxiv.org/abs/1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gain = self.weight.float()
        if x.is_cuda:  # there torch has one kernel for it
            return F.rms_norm(x.float(), gain.shape, gain, self.eps).to(x.dtype)
        return Normalise.apply(x.float(), gain, self.eps).to(x.dtype)


class Normalise(torch.autograd.Function):
    """RMSNorm with a backward of few passes over memory; plain operations take twice the time."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """x (..., C), gain (C,) -> (..., C)."""
        inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, gain, inverse)
        return x * inverse * gain

    @staticmethod
    def backward(ctx, slope: Tensor):  # type: ignore[override]
        """Of x and gain."""
        x, gain, inverse = ctx.saved_tensors
        unit = x * inverse
        d_gain = slope * unit
        along = (d_gain @ gain / len(gain))[..., None]
        return (slope * gain - unit * along) * inverse, d_gain.flatten(0, -2).sum(0), None


class KVCache:
    """Keys and values of the tokens so far, preallocated: (blocks, B, K, capacity, D) each.

    `lengths` (B,) counts each row's tokens. A row's tokens beyond its length (right padding of a
    batch of prompts) are never seen: the next tokens are written over them.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device, dtype):
        shape = (config.blocks, batch, config.kv_heads, capacity, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.used = 0  # the longest row, as a Python number: how much of the cache to look at

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.k, self.v, self.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions, mask, backend):
        """Put k, v (B, K, T, D) at positions (B, T), and let q (B, H, T, D) look at all that is in
        use, by mask (B, 1, T, S) or None."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer].transpose(1, 2)[rows, positions] = k.transpose(1, 2)
        self.v[layer].transpose(1, 2)[rows, positions] = v.transpose(1, 2)
        k, v = self.k[layer][:, :, :self.used], self.v[layer][:, :, :self.used]
        return attend(q, k, v, backend, mask)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None = None,
           documents: Tensor | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D), by one of ATTENTION's back ends.

    Causal (then T == S) unless `mask` is given, as decoding with a cache does: boolean, broadcast
    to (B, H, T, S), True where a query may look. With `documents`, the document_bounds() of the
    rows, a query looks inside its own document only. Query head h uses key head h // (H / K), as in
    grouped-query attention (https://arxiv.org/abs/2305.13245).
    """
    if mask is not None and backend != "reference":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                              enable_gqa=q.shape[1] != k.shape[1])
    return ATTENTION[backend](q, k, v, mask, documents)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: None, documents: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention, flash kernels where the device has them."""
    if documents is None:
        return causal(q, k, v)
    # on a GPU not a host wait and a new plan for each document
    packed = varlen if q.is_cuda and q.dtype != torch.float32 else by_document
    return packed(q, k, v, mask, documents)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's choice of kernel, shapes as in attend()."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                          enable_gqa=q.shape[1] != k.shape[1])


@torch.compiler.disable  # the number and lengths of documents differ from batch to batch
def by_document(q: Tensor, k: Tensor, v: Tensor, mask: None, documents: Tensor) -> Tensor:
    """attend() by one causal call for each document: on a CPU faster than any mask."""
    B, _, T, _ = q.shape
    lengths = [n for n in documents.diff().tolist() if n]
    pieces = zip(*(x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(lengths, 2)
                   for x in (q, k, v)), strict=True)
    y = torch.cat([causal(*piece) for piece in pieces], 2)[0]  # (H, B T, D)
    return y.unflatten(1, (B, T)).transpose(0, 1)


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: None, documents: Tensor | None) -> Tensor:
    """torch's flash attention for packed documents, CUDA in bf16 or fp16 only: it takes all rows
    as one line of tokens with their bounds."""
    from torch.nn.attention.varlen import varlen_attn  # more than a second of imports

    B, _, T, _ = q.shape
    if documents is None:
        documents = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    options: dict = {"enable_gqa": q.shape[1] != k.shape[1]} if VARLEN_GROUPS else {}
    k, v = (k, v) if VARLEN_GROUPS else (repeated(q, k), repeated(q, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, heads, D)
    y = varlen_attn(q, k, v, documents, documents, T, T, window_size=(-1, 0), **options)
    return y.unflatten(0, (B, T)).transpose(1, 2)  # type: ignore[union-attr]


def xformers(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    """memory_efficient_attention of the optional package, CUDA only."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    # xformers has the heads after the tokens
    q, k, v = (x.transpose(1, 2) for x in (q, repeated(q, k), repeated(q, v)))
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask()).transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
              documents: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, spelled out: what the tests compare the others with."""
    k, v = repeated(q, k), repeated(q, v)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if documents is not None:
        places = torch.arange(q.shape[0] * q.shape[2], device=q.device)
        owner = torch.searchsorted(documents, places, right=True).view(q.shape[0], 1, -1)
        mask = mask & (owner[..., None] == owner[..., None, :])
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v


def repeated(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values (B, K, S, D), each head repeated for its group of query heads."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


# (q, k, v, mask, documents) -> (B, H, T, D); to add one: a function, this entry, a choice in
# settings, and a case in tests/test_model.py
ATTENTION = {"sdpa": sdpa, "varlen": varlen, "xformers": xformers, "reference": reference}


def document_bounds(starts: Tensor) -> Tensor:
    """Where a document starts in rows, (B, T) bool on the host -> (N + 1,) int32 on the host: the
    places of these starts in the rows laid end to end, and last B T. Every row starts one. N is a
    power of two, filled up with empty documents, so that compiled code sees few sizes."""
    places = F.pad(starts[:, 1:], (1, 0), value=True).flatten().nonzero()[:, 0].int()
    room = 1 << max(len(places) - 1, 0).bit_length()
    return F.pad(places, (0, room + 1 - len(places)), value=starts.numel())


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.q_proj = Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = Linear(config.d_model, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = Linear(config.d_model, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None,
                positions: Tensor | None, mask: Tensor | None, documents: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (project(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, H or K, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, positions, mask, self.config.attention)
        else:
            y = attend(q, k, v, self.config.attention, mask, documents)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.twice = config.activation_checkpointing
        self.random = False  # whether what is computed twice must draw the same numbers twice

    def forward(self, x: Tensor, *context) -> Tensor:
        """(B, T, C) -> (B, T, C); `context` is what Attention.forward takes after x."""
        if self.twice and torch.is_grad_enabled():
            return checkpoint(self.compute, x, *context, use_reentrant=False,
                              preserve_rng_state=self.random)
        return self.compute(x, *context)

    def compute(self, x: Tensor, *context) -> Tensor:
        """The block itself."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face names `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class LLaMA(nn.Module):
    """The decoder and its output matrix."""

    rope_cos: Tensor  # (block_size, D) fp32
    rope_sin: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32  # of activations and matmuls; weights stay fp32
        self.model = Decoder(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_derived("cpu")

    def reset_derived(self, device) -> None:
        """(Re)compute what moving off `meta` loses: the rotary tables, which are not saved, and
        the tie of the embeddings."""
        self.tie()
        positions = torch.arange(self.config.block_size, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, rope_frequencies(self.config)).repeat(1, 2)
        self.register_buffer("rope_cos", angles.cos().to(device), persistent=False)
        self.register_buffer("rope_sin", angles.sin().to(device), persistent=False)

    def tie(self) -> None:
        """Share embedding and output matrix, if the config says so."""
        if self.config.tie_embeddings:
            for name, parameter in self.model.embed_tokens.named_parameters():
                setattr(self.lm_head, name, parameter)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, documents: Tensor | None = None,
               watch: Callable = lambda states: None) -> Tensor:
        """Token ids (B, T) -> normalised states (B, T, C) that the output matrix reads.

        With a cache, the ids continue what is in it, each row from its own length on; the caller
        advances `cache.lengths` afterwards (by less than T for rows that were padded). `documents`:
        document_bounds() of the ids, for tokens that look at their own document only. `watch` is
        called with the n_layer + 1 states (B, T, C) that transformers names hidden_states: the
        embeddings, the output of each block but the last, and the result.
        """
        T = ids.shape[1]
        positions = mask = None
        rope = self.rope_cos[:T], self.rope_sin[:T]
        if cache is not None:
            positions = cache.lengths[:, None] + torch.arange(T, device=ids.device)  # (B, T)
            rope = self.rope_cos[positions][:, None], self.rope_sin[positions][:, None]
            cache.used += T
            if cache.used > T:  # (B, 1, T, S)
                mask = torch.arange(cache.used, device=ids.device) <= positions[:, None, :, None]
        x = self.model.embed_tokens(ids).to(self.compute_dtype)
        for block in self.model.layers:
            watch(x)
            x = block(x, rope, cache, positions, mask, documents)
        x = self.model.norm(x)
        watch(x)
        return x

    def forward(self, ids: Tensor, targets: Tensor | None = None, documents: Tensor | None = None,
                places: Tensor | None = None, cache: KVCache | None = None,
                each: bool = False) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V).

        With targets (B, T): the sum of -log p(target) in nats, fp32 (); targets of IGNORE count 0.
        Where few tokens are learned, `places` (n,) says at which positions of the rows laid end to
        end the targets (n,) are: the output matrix is read there alone. `each`: not the sum, but
        what is summed, (B T,) or (n,).
        """
        x = self.hidden(ids, cache, documents)
        if targets is None:
            return self.lm_head(x)
        x = x.flatten(0, 1)
        x = x if places is None else x.index_select(0, places)
        return self.loss(x, targets.flatten(), each)

    def loss(self, x: Tensor, targets: Tensor, each: bool = False) -> Tensor:
        """Sum -log p(target) of states (N, C) over targets (N,), fp32 (); `each`: (N,)."""
        weight, learned = self.lm_head.parts(x.dtype)
        # the gradient of the matrix wants large chunks; without it they only take memory
        room = LOGITS_BYTES if len(learned) == len(weight) and not each else LOGITS_BYTES // 4
        size = chunk_rows(len(weight), room)
        if 4 * len(targets) * len(weight) <= room:
            return self.losses(x, targets, "none" if each else "sum")
        if not each:
            # detached: where all rows learn, compiled code wants no tensor twice
            return ChunkedLoss.apply(x, weight.detach(), learned, targets, size,
                                     torch.is_grad_enabled())
        return torch.cat([checkpoint(self.losses, *rows, "none", use_reentrant=False)
                          for rows in zip(x.split(size), targets.split(size), strict=True)])

    def losses(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """-log p(target) of states, whose logits are all made at once."""
        return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=IGNORE,
                               reduction=reduction)


class ChunkedLoss(torch.autograd.Function):
    """The loss of states (N, C) under an output matrix (V, C): a chunk's logits become loss and
    gradients at once and are dropped, so that N x V numbers are never in memory. Few and even
    chunks: compiled code has each of them once.

    d loss / d logits = softmax - one-hot. torch 2.13 has F.linear_cross_entropy for this, which
    compiled code has to leave; this one is compiled with the rest and runs on 2.11.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, learned: Tensor, targets: Tensor, size: int,
                training: bool) -> Tensor:
        """The summed loss, fp32 (), in chunks of `size` rows. `training`: keep the gradients for
        backward, of x and of the matrix's last rows, which are `learned`."""
        matrix, first = weight.to(x.dtype), len(weight) - len(learned)
        loss = torch.zeros((), device=x.device)
        d_weight = torch.zeros_like(learned, dtype=torch.float32) if training else None
        d_x = []
        for states, wanted in zip(x.split(size), targets.split(size), strict=True):
            logits = F.linear(states, matrix).float()
            counts = (wanted != IGNORE)[:, None]
            place = wanted[:, None].clamp(min=0)
            norm = logits.logsumexp(1, keepdim=True)
            loss = loss + ((norm - logits.gather(1, place)) * counts).sum()
            if d_weight is not None:
                slope = without_one(logits.sub_(norm).exp_(), place).mul_(counts).to(x.dtype)
                d_x.append(slope @ matrix)
                d_weight += slope[:, first:].T @ states
        if d_weight is not None:
            ctx.save_for_backward(torch.cat(d_x), d_weight.to(learned.dtype))
        return loss

    @staticmethod
    def backward(ctx, slope: Tensor):  # type: ignore[override]
        """Of states and learned rows."""
        d_x, d_weight = ctx.saved_tensors
        return d_x * slope, None, d_weight * slope, None, None, None


def chunk_rows(entries: int, room: int) -> int:
    """Rows of a chunk whose fp32 logits for so many entries take `room` bytes: 4,096 of 32,000
    entries in LOGITS_BYTES. A multiple of 256, as the tiles of a GPU's matrix kernels want it."""
    rows = room // (4 * entries)
    return max(1, rows // 256 * 256 or rows)


def without_one(p: Tensor, place: Tensor) -> Tensor:
    """p (n, V) less one at place (n, 1) of each row. Compiled, a comparison is part of the kernel
    that makes p; eager on a CPU, only n numbers are touched."""
    if p.is_cuda or torch.compiler.is_compiling():
        return torch.where(place == torch.arange(p.shape[1], device=p.device), p - 1, p)
    return p.scatter_add_(1, place, torch.full_like(place, -1, dtype=p.dtype))


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name; all others are frozen: no gradient, no moments, no decay.
    The one place that says so: optimizer, checkpoint, preflight and sums over ranks ask here."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6 per parameter that is multiplied with the token (the embedding is a look-up, the output matrix
    is not), and 12 d_model context a block for attention, without halving it for causality:
    PaLM's count (https://arxiv.org/abs/2204.02311, appendix B).
    """
    c = config
    block = c.d_model * (2 * c.d_model + 2 * c.kv_heads * c.head_dim + 3 * c.d_ff)
    matmul = c.blocks * block + c.d_model * c.vocab_size
    return 6 * matmul + 12 * c.blocks * c.d_model * context
