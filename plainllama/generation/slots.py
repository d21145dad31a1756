"""Keys and values of many texts at once, and one step of the model for several of them.

A text has the same bits alone and in any company. Attention is computed for each text by itself, in
shapes that its own length decides; a prompt goes through the model in pieces that its own ids
decide; and the matrices meet the newest tokens of several texts in widths (rows side by side) of
which each was seen to give a row the same bits, at any place in it.
"""

import contextlib
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from model import ANY_SHAPE, Linear, LLaMA
from plainllama.settings import ceil_div

BLOCK = 256  # tokens by which a slot grows
VECTOR = 16  # numbers that a CPU's kernels take at once
PIECES = {"cpu": 64, "cuda": 512}  # tokens of a prompt that are fed at once, by device


class Slot:
    """A place for one text: the keys and values of its tokens so far."""

    def __init__(self, model: LLaMA):
        c = model.config
        shape = (2, c.blocks, c.kv_heads, 0, c.head_dim)
        self.kv = torch.zeros(shape, dtype=model.compute_dtype, device=model.rope_cos.device)
        self.length = 0
        self.kept: list[int] = []  # ids of whole pieces of a prompt, with which it begins
        self.busy, self.since = False, 0

    def make_room(self, length: int) -> None:
        """Grow to hold so many tokens."""
        if length > self.kv.shape[3]:
            missing = ceil_div(length, BLOCK) * BLOCK - self.kv.shape[3]
            self.kv = F.pad(self.kv, (0, 0, 0, missing))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add keys and values (1, K, T, D) of the next tokens, and let their queries (1, H, T, D)
        look at all tokens up to their own."""
        end, T = self.length + q.shape[2], q.shape[2]
        self.kv[0, layer, :, self.length:end] = k[0]
        self.kv[1, layer, :, self.length:end] = v[0]
        k, v = self.kv[:, layer, :, :end].unsqueeze(1)
        mask = None
        if T > 1 and self.length:
            mask = torch.ones(T, end, dtype=torch.bool, device=q.device).tril(self.length)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and mask is None,
                                              enable_gqa=q.shape[1] != k.shape[1])


class Side:
    """What the model takes as its cache: row i of the ids goes on with slots[i]; the rows beyond
    are nobody's."""

    def __init__(self, slots: list[Slot], ids: Tensor):
        B, T = ids.shape
        self.slots, self.used = slots, 0  # 0: the model makes no mask
        lengths = [slot.length for slot in slots] + [0] * (B - len(slots))
        self.lengths = torch.tensor(lengths, device=ids.device)
        for slot in slots:
            slot.make_room(slot.length + T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
        """As KVCache.attend()."""
        y = torch.zeros_like(q)
        for i, slot in enumerate(self.slots):
            row = slice(i, i + 1)
            y[row] = slot.attend(layer, q[row], k[row], v[row])
        return y


class Slots:
    """Places for `number` texts at once. The model is taken over: see pack()."""

    def __init__(self, model: LLaMA, number: int):
        self.model, self.device = model, model.rope_cos.device
        self.piece = PIECES.get(self.device.type, PIECES["cpu"])
        self.all = [Slot(model) for _ in range(number)]
        self.turns = count(1)
        pack(model)
        self.widths = self.equal_widths(number)

    # ---- places

    def free(self) -> bool:
        """Whether there is a place for one more text."""
        return any(not slot.busy for slot in self.all)

    def take(self, ids: list[int], reuse: bool = True) -> Slot:
        """Give a place for a text, which holds as much of its prompt as any slot has of it in whole
        pieces, but for its last token. There must be a free one."""
        best = max(self.all, key=lambda slot: self.shared(slot, ids))
        shared = self.shared(best, ids) if reuse else 0
        free = sorted((slot for slot in self.all if not slot.busy), key=lambda slot: slot.since)
        if shared and not best.busy and (shared == len(best.kept) or len(free) == 1):
            slot = best
        else:  # what the other one holds beyond may be asked for again
            slot = next((each for each in free if each is not best), free[0])
            if shared:
                slot.make_room(shared)
                slot.kv[:, :, :, :shared] = best.kv[:, :, :, :shared]
        slot.length, slot.kept, slot.busy = shared, ids[:shared], True
        return slot

    def shared(self, slot: Slot, ids: list[int]) -> int:
        """Count the tokens, in whole pieces, with which both what a slot keeps and a prompt begin;
        the last token of a prompt is always computed."""
        same = 0
        most = min(len(slot.kept), len(ids) - 1)
        while same + self.piece <= most and (
                slot.kept[same:same + self.piece] == ids[same:same + self.piece]):
            same += self.piece
        return same

    def release(self, slot: Slot) -> None:
        """Give a place back; what it keeps may serve another text."""
        slot.busy, slot.since = False, next(self.turns)

    # ---- steps

    def feed(self, slot: Slot, ids: list[int]) -> Tensor:
        """Feed the next piece of a prompt; its states (T, C)."""
        x = torch.tensor([ids], device=self.device)
        states = self.hidden([slot], x)[0]
        slot.length += len(ids)
        if len(ids) == self.piece and slot.length == len(slot.kept) + self.piece:
            slot.kept = slot.kept + ids
        return states

    def step(self, slots: list[Slot], ids: list[int]) -> Tensor:
        """Feed each text its newest token; the logits (B, V) of the next ones."""
        logits, at, widest = [], 0, self.widths[-1]
        while at < len(ids):
            some, new = slots[at:at + widest], ids[at:at + widest]
            width = next(width for width in self.widths if width >= len(some))
            x = torch.tensor(new + [0] * (width - len(new)), device=self.device)[:, None]
            states = self.hidden(some, x)[:, 0]
            logits.append(self.model.lm_head(states)[:len(some)])
            at += len(some)
        for slot in slots:
            slot.length += 1
        return torch.cat(logits)

    def hidden(self, slots: list[Slot], ids: Tensor) -> Tensor:
        """States (B, T, C) of ids (B, T) that go on with the slots."""
        side: Any = Side(slots, ids)
        with torch.no_grad(), sdpa_kernel(ANY_SHAPE):
            return self.model.hidden(ids, side)

    def equal_widths(self, number: int) -> list[int]:
        """List the widths up to `number` that give rows the same bits, at any place in them: tried
        on random tokens, each the first of its text. In the worst case that is width 1 alone, as it
        is where rows do not fill a CPU's vectors: what is left at an end is computed otherwise."""
        c = self.model.config
        if self.device.type == "cpu" and (c.d_model % VECTOR or c.d_ff % VECTOR):
            return [1]
        candidates = sorted({n for k in range(number.bit_length()) for n in (2**k, 3 * 2**k)
                             if n < number} | {number})
        rounds = min(8, ceil_div(100_000, number * c.d_ff * c.blocks))  # few numbers say little
        source = torch.Generator().manual_seed(0)
        trials = torch.randint(c.vocab_size, (rounds, number), generator=source).tolist()
        slots = [Slot(self.model) for _ in range(number)]

        def rows(width: int, ids: list[int]) -> Tensor:
            self.widths = [width]
            for slot in slots:
                slot.length = 0
            return self.step(slots, ids)

        for widest in reversed(candidates):
            equal = [width for width in candidates if width <= widest]
            for ids in trials:
                wanted, shifted = rows(widest, ids), ids[1:] + ids[:1]
                equal = [width for width in equal if torch.equal(rows(width, ids), wanted)
                         and torch.equal(rows(width, shifted).roll(1, 0), wanted)]
            if widest in equal:
                return equal
        return [1]


def pack(model: LLaMA) -> None:
    """On a CPU, lay the matrices out as oneDNN reads them fastest: a few rows then take little
    longer than one, and have its bits. The model can then do nothing but compute; where torch
    lacks this it stays as it is."""
    if model.rope_cos.device.type != "cpu" or model.compute_dtype != torch.float32:
        return
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        shared = model.model.embed_tokens.weight if model.config.tie_embeddings else None
        for module in model.modules():
            if type(module) is Linear and module.weight is not None:
                weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 8)
                module.forward = partial(packed_linear, weight)  # type: ignore[method-assign]
                if module.weight is not shared:
                    module.weight = None  # type: ignore[assignment]


def packed_linear(weight: Tensor, x: Tensor) -> Tensor:
    """(..., d_in) -> (..., d_out) by a matrix that pack() has laid out."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
