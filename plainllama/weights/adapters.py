"""What of a model learns: all of it, some parameters (train_only), or low-rank adapters (LoRA).

LoRA (https://arxiv.org/abs/2106.09685) leaves a matrix W (out, in) as it is and learns A (r, in)
and B (out, r): W x + alpha / r B A x. B begins as zero, so that the first step has the base's
logits to the bit. What is frozen may be held in fewer bits. Of a vocabulary that grew, the new rows
learn beside the adapters, and those alone.
"""

import fnmatch
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Linear, LLaMA, ModelConfig, trained
from plainllama.settings import Settings, UserError, nearest
from plainllama.weights.quantised import QUANTISED, Product

# parameters that a plain LLaMA has not: how their names end, and a part of those of copied blocks
ADDED, COPIES = ("lora_A", "lora_B", "rows"), ".expansion."
SHORT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
         "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Adapter:
    """What an adapter is made of, beside its weights."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # the modules it stands beside, by name
    frozen_dtype: str = "fp32"  # how the base was held when the adapter learned
    first_row: int = 0  # of the embedding's new rows, which learn too (0: there are none)
    base: str = ""  # the model folder that it belongs to
    sha256: str = ""  # of that folder's weights


class AdaptedLinear(Linear):
    """A frozen linear map, held as it is or in few bits, and an adapter beside it if r > 0."""

    def __init__(self, linear: nn.Linear, frozen_dtype: str, r: int = 0, alpha: float = 0.0,
                 dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = frozen_dtype if frozen_dtype in QUANTISED else ""
        self.r, self.factor, self.dropout = r, alpha / r if r else 0.0, dropout
        self.register_parameter("bias", None)
        self.weight = linear.weight
        if self.kind:
            self.hold(linear.weight)
        if r:
            device = linear.weight.device
            self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
            self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device))

    def hold(self, matrix: Tensor) -> None:
        """Hold a matrix (out, in) in few bits, in place of what was held."""
        self.weight = None  # type: ignore[assignment]
        parts = QUANTISED[self.kind][0](matrix.detach())
        self.names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The frozen matrix (out, in)."""
        if not self.kind:
            return self.weight.to(dtype)
        parts = {name: getattr(self, name) for name in self.names}
        return QUANTISED[self.kind][1](parts, (self.out_features, self.in_features), dtype)

    def merged(self) -> Tensor:
        """The matrix (out, in) that does the same alone, fp32; added up in fp64."""
        matrix = self.matrix().double()
        if self.r:
            matrix += self.factor * (self.lora_B.double() @ self.lora_A.double())
        return matrix.float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.r and not self.kind and not (self.dropout and self.training):
            a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
            return Adapted.apply(x, self.weight, a, b, self.factor)
        if self.kind:
            parts = (getattr(self, name) for name in self.names)
            y = Product.apply(x, self.kind, (self.out_features, self.in_features), self.names,
                              *parts)
        else:
            y = F.linear(x, self.weight.to(x.dtype))
        if not self.r:
            return y
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), inner, self.lora_B.T.to(x.dtype),
                           alpha=self.factor).view_as(y)


class Adapted(torch.autograd.Function):
    """x W^T + factor (x A^T) B^T with W frozen: sums and factors are part of the products, which
    saves passes over memory, and of W no copy in another dtype is kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
        """x (..., in), W (out, in), A (r, in), B (out, r) -> (..., out)."""
        flat = x.flatten(0, -2)
        inner = flat @ a.T
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.factor = factor
        y = (flat @ weight.to(x.dtype).T).addmm_(inner, b.T, alpha=factor)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, slope: Tensor):  # type: ignore[override]
        """Of x, A and B."""
        flat, weight, a, b, inner = ctx.saved_tensors
        shape, slope = slope.shape, slope.flatten(0, -2)
        d_inner = slope @ b
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (slope @ weight.to(slope.dtype)).addmm_(d_inner, a, alpha=ctx.factor)
            d_x = d_x.view(*shape[:-1], -1)
        return (d_x, None, d_inner.T @ flat * ctx.factor, slope.T @ inner * ctx.factor, None)


class GrownEmbedding(nn.Embedding):
    """A frozen embedding whose last entries learn, as `rows`."""

    first: int
    rows: nn.Parameter

    def grow(self, first: int) -> None:
        """Take the entries from `first` on from rows (V - first, C)."""
        self.first = first
        self.rows = nn.Parameter(torch.empty(len(self.weight) - first, self.weight.shape[1],
                                             device=self.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        new = F.embedding((ids - self.first).clamp(min=0), self.rows)
        old = F.embedding(ids, self.weight).to(new.dtype)
        return torch.where((ids >= self.first)[..., None], new, old)


class GrownLinear(Linear):
    """A frozen output matrix whose last rows learn, as `rows`."""

    first: int
    rows: nn.Parameter

    grow = GrownEmbedding.grow

    def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The matrix for a product in `dtype`, with the rows in their place, and these."""
        if self.weight.dtype not in (self.rows.dtype, dtype):  # which would round them
            return torch.cat([self.weight[:self.first].to(dtype), self.rows.detach()]), self.rows
        self.weight.data[self.first:] = self.rows.detach()
        return self.weight, self.rows

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        pieces = self.weight[:self.first], self.rows
        return torch.cat([F.linear(x, piece.to(x.dtype)) for piece in pieces], -1)


# ---- what learns

def freeze(model: LLaMA, config: Settings) -> None:
    """Freeze what train_only does not name, and hold it as frozen_dtype says."""
    if config.train_only:
        patterns = [item.strip() for item in config.train_only.split(",")]
        learns = set().union(*(named(model, pattern) for pattern in patterns))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learns)
        shrink(model, config.frozen_dtype)


def named(model: LLaMA, pattern: str) -> set[str]:
    """Name the parameters that an item of train_only means. UserError if it is none."""
    names, blocks = [name for name, _ in model.named_parameters()], model.config.n_layer
    kind, colon, count = pattern.partition(":")
    if not colon:
        found = parts_of(names, pattern)
        if not found:
            raise UserError(f"train_only: {pattern!r} means no parameter; there are first:N, "
                            "last:N, every:N, and parts of names, of two letters or more: "
                            f"{', '.join(sorted(plain(names)))}")
        return found
    number = int(count) if count.isdecimal() else 0
    chosen = {"first": range(number), "last": range(max(blocks - number, 0), blocks),
              "every": range(number - 1, blocks, max(number, 1))}.get(kind)
    if chosen is None or not 0 < number <= blocks:
        raise UserError(f"train_only: {pattern!r} is not first:N, last:N or every:N with N from 1 "
                        f"to {blocks} blocks")
    starts = tuple(f"model.layers.{block}." for block in chosen)
    return {name for name in names if name.startswith(starts)}


def parts_of(names: list[str], pattern: str) -> set[str]:
    """Those of `names` that a pattern is a part of: of two signs or more, numbers as a whole."""
    before = ("", "*[!0-9]") if re.match(r"[\d?[]", pattern) else ("*",)
    behind = ("", "[!0-9]*") if re.search(r"[\d?\]]$", pattern) else ("*",)
    wholes = [f"{a}{pattern}{b}" for a in before for b in behind if len(pattern) > 1]
    return {name for name in names if any(fnmatch.fnmatchcase(name, each) for each in wholes)}


def plain(names: list[str]) -> set[str]:
    """The last words of parameters' names: q_proj, input_layernorm, ..."""
    return {name.removesuffix(".weight").rpartition(".")[2] for name in names}


def targets_of(model: LLaMA, wanted: str) -> tuple[str, ...]:
    """Name the matrices inside the blocks that lora_targets means: 'all', short names such as
    'q,v', or patterns of names. UserError where an item means none."""
    there = [name for name, module in model.named_modules()
             if isinstance(module, Linear) and name.startswith("model.layers.")]
    chosen: set[str] = set()
    for item in (part.strip() for part in wanted.split(",")):
        found = {*there} if item == "all" else parts_of(there, SHORT.get(item, item))
        if not found:
            hint = nearest(item, [*SHORT, *SHORT.values()])
            raise UserError(f"lora_targets: {item!r} means no matrix of a block{hint}; there are "
                            f"all, {', '.join(SHORT)}, or a part of a name such as 'layers.0.'")
        chosen |= found
    return tuple(name for name in there if name in chosen)


def attach(model: LLaMA, adapter: Adapter) -> None:
    """Put an adapter beside its targets; all else of the model is frozen, and held as the adapter's
    frozen_dtype says."""
    if other := sorted({*adapter.targets} - {*targets_of(model, "all")}):
        raise UserError(f"the adapter stands beside {other[0]}, which is no matrix of a block of "
                        "this base")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in adapter.targets:
        replace(model, name, AdaptedLinear(model.get_submodule(name),  # type: ignore[arg-type]
                                           adapter.frozen_dtype, adapter.r, adapter.alpha,
                                           adapter.dropout))
    if adapter.dropout:
        for block in model.model.layers:
            block.random = True  # type: ignore[assignment]
    if adapter.first_row:
        grow(model, adapter.first_row)
    shrink(model, adapter.frozen_dtype)


def grow(model: LLaMA, first_row: int) -> None:
    """Let the entries of the vocabulary from `first_row` on learn beside the frozen others."""
    ends: tuple[tuple[nn.Module, type], ...] = ((model.model.embed_tokens, GrownEmbedding),
                                                (model.lm_head, GrownLinear))
    for end, grown in ends:
        end.__class__ = grown  # the same weights, another forward
        end.grow(first_row)  # type: ignore[operator]
    model.tie()


def shrink(model: LLaMA, frozen_dtype: str) -> None:
    """Hold frozen matrices in fewer bits: those of the blocks as said, embedding and output matrix
    in at least 16; gains stay."""
    if frozen_dtype == "fp32":
        return
    for name, module in list(model.named_modules()):
        plainly = isinstance(module, Linear) and not isinstance(module, AdaptedLinear)
        if frozen_dtype in QUANTISED and plainly and name.startswith("model.layers."):
            replace(model, name, AdaptedLinear(module, frozen_dtype))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.dim() >= 2 and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def replace(model: LLaMA, name: str, module: nn.Module) -> None:
    """Put another module in the place of one."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def merge(model: LLaMA, dtype: torch.dtype = torch.float32) -> LLaMA:
    """Make a plain LLaMA, in place, of one with adapters: the same function of its input, its
    matrices in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            with torch.device("meta"):
                whole = Linear(module.in_features, module.out_features, bias=False)
            whole.weight = nn.Parameter(module.merged().detach().to(dtype))
            replace(model, name, whole)
        elif isinstance(module, GrownEmbedding | GrownLinear):
            weight = module.weight.detach().float()
            weight[module.first:] = module.rows.detach()
            module.weight = nn.Parameter(weight)
            del module.rows
            plain_one: type = nn.Embedding if isinstance(module, GrownEmbedding) else Linear
            module.__class__ = plain_one
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.float()
    model.tie()
    return model


# ---- its weights

def base_weights(model: LLaMA, copies: bool = False) -> dict[str, nn.Parameter | AdaptedLinear]:
    """What a plain LLaMA of this architecture has, by its names: parameters, and the maps that hold
    a matrix in few bits. `copies`: also those of blocks."""
    found: dict = {name: p for name, p in model.named_parameters()
                   if not name.endswith(ADDED) and (copies or COPIES not in name)}
    return found | {f"{name}.weight": module for name, module in quantised(model)}


def quantised(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The maps whose matrix is held in few bits, by name."""
    return ((name, module) for name, module in model.named_modules()
            if isinstance(module, AdaptedLinear) and module.kind)


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The first value of parameter `name`, fp32 on the CPU: a function of seed, name and config.

    Each parameter has its own generator, so that one process, meta-device shards and a deeper model
    begin with the same weights. Matrices are normal with deviation 0.02; those that write to the
    residual stream are divided by sqrt(2 (layer + 1)), so that it grows slowly with depth; the
    output matrix is narrow enough that the first loss is ln V. Of an adapter A is uniform in
    +-1/sqrt(in), as peft draws it, B is zero, and new rows are those of the whole matrix.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if COPIES in name:
        return torch.zeros(shape)  # until it is made what its block is
    if name.endswith("lora_A"):
        drawn = torch.empty(shape).uniform_(-1, 1, generator=generator_of(name, seed))
        return drawn / math.sqrt(shape[1])
    if name.endswith("lora_B"):
        return torch.zeros(shape)
    if name.endswith("rows"):
        whole = torch.Size((config.vocab_size, config.d_model))
        return initial_weight(name.replace("rows", "weight"), whole, config, seed)[-shape[0]:]
    std = 0.02
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * (int(name.split(".")[2]) + 1))
    elif name == "lm_head.weight":
        std = min(std, 0.4 / math.sqrt(config.d_model))
    elif name == "model.embed_tokens.weight" and config.tie_embeddings:
        std = min(std, 2 / config.d_model)  # a token's own logit is about std * d_model
    elif not name.endswith(("embed_tokens.weight", "_proj.weight")):
        raise ValueError(f"no rule initialises {name}")
    return torch.empty(shape).normal_(0.0, std, generator=generator_of(name, seed))


def generator_of(name: str, seed: int) -> torch.Generator:
    """The generator that a parameter's first value is drawn from."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


@torch.no_grad()
def initialise(model: LLaMA, seed: int, piece: Callable[[Tensor], tuple[Tensor, int]],
               only: tuple[str, ...] = ("",)) -> None:
    """Give every parameter, or those whose names end with one of `only`, its first value: the same
    however they are sharded. `piece` gives of a parameter (this rank's rows, the number of the
    first of them)."""
    for name, parameter in model.named_parameters():
        if name.endswith(only):
            local, first = piece(parameter.data)
            value = initial_weight(name, parameter.shape, model.config, seed)
            local.copy_(value[first:first + local.shape[0]])


def hold_first_weights(model: LLaMA, seed: int) -> None:
    """Give every matrix that is held in few bits its first value."""
    for name, module in quantised(model):
        shape = torch.Size((module.out_features, module.in_features))
        device = getattr(module, module.names[0]).device
        module.hold(initial_weight(f"{name}.weight", shape, model.config, seed).to(device))


def parameter_counts(model: LLaMA) -> tuple[int, int, int]:
    """(all parameters, those without embedding and output matrix, those that learn), however they
    are held; a tied matrix counts once."""
    total = sum(p.numel() for p in model.parameters()) + sum(
        module.in_features * module.out_features for _, module in quantised(model))
    ends = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    return total, total - sum(ends.values()), sum(p.numel() for _, p in trained(model))


def summary(model: LLaMA, adapter: Adapter | None, frozen_dtype: str) -> str:
    """Say what of a model learns, '' if all of it does."""
    total, _, learning = parameter_counts(model)
    if learning == total:
        return ""
    if adapter:
        last = sorted({name.rpartition(".")[2] for name in adapter.targets})
        count = model.config.vocab_size - adapter.first_row
        new = f" and {count} new entries" if adapter.first_row else ""
        what = f"adapters beside {len(adapter.targets)} matrices ({', '.join(last)}){new}"
    elif model.config.expand_blocks:
        layers = dict.fromkeys(name.split(".")[2] for name, _ in trained(model) if COPIES in name)
        what = f"copies of the blocks {', '.join(layers)} ({model.config.expand})"
        if model.config.first_row:
            what += f" and {model.config.vocab_size - model.config.first_row} new entries"
    else:
        names = [name for name, _ in trained(model)]
        what = f"{len(names)} parameters, from {names[0]} to {names[-1]}"
    return (f"learns: {learning:,} of {total:,} weights ({learning / total:.2%}), {what}; the rest "
            f"is frozen, {frozen_dtype}")
