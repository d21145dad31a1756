"""How likely a model finds a text: the loss of a split, by position, and of continuations."""

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, KVCache, LLaMA, document_bounds
from plainllama.parallel import World
from plainllama.progress import Progress
from plainllama.settings import UserError
from plainllama.tokens.rows import PAD, Rows
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import ByteInfo, decoded_bytes

WORTH = 16  # tokens that rows must share before they are computed once for all of them
Ids = tuple[int, ...]
Group = tuple[int, list[Ids]]  # rows, and how many tokens all of them begin with


# ---- bits per byte

class TextRows:
    """The windows of a text, the last one filled up with shards.PAD; as evaluate() reads rows."""

    def __init__(self, file: str, tokenizer: Tokenizer, block_size: int):
        from plainllama.text import sources
        from plainllama.text.documents import Piece, Tally, documents

        path, dropped = Path(file), Tally()
        if path.is_file() and not re.fullmatch(sources.KINDS, path.name):
            parts = [[Piece(file, file, "txt", "text", path.stat().st_size)]]
        else:
            _, parts = sources.survey(sources.described(file), [])
        texts = list(documents(itertools.chain(*parts), dropped))
        for rule, found in dropped.items():
            if rule != "empty":
                raise UserError(f"--text: {found['first']}: {rule}")
        ids = np.concatenate([np.zeros(0, np.int64), *tokenizer.encode_documents(texts)])
        self.block_size, self.windows = block_size, -(-(len(ids) - 1) // block_size)
        if self.windows < 1:
            raise UserError(f"--text={file} holds no text")
        filled = np.full(self.windows * block_size + 1, PAD, np.int64)
        filled[:len(ids)] = ids
        self.all = np.lib.stride_tricks.sliding_window_view(filled, block_size + 1)[::block_size]

    def read_windows(self, windows) -> np.ndarray:
        """The given windows, int64 (m, T + 1)."""
        return self.all[list(windows)]


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows, token_byte_info: ByteInfo, tokens: int,
             micro_batch: int, world: World, begin: int | None = None) -> dict:
    """{val_loss, val_bpb, tokens, bytes, ppl} of the first `tokens` // T windows, in their order.

    val_loss is nats per target; val_bpb is nats / ln 2 / utf-8 bytes of the decoded targets, so
    boundary tokens count above the line only. Independent of micro_batch (rows per pass) and of the
    number of ranks: rank r takes every W-th window, and rows whose targets are ignored fill up the
    last passes, so that all passes have one shape and all ranks do as many. `begin`: the id that
    begins a document, if tokens see their own document only (doc_mask). Calls only
    model(ids, targets), the summed loss. Collective.
    """
    count = max(1, min(tokens // rows.block_size, rows.windows))
    losses, n_bytes, targets = [], 0, 0
    progress = Progress("validation", count, "rows", world.rank == 0,
                        world.device.type)
    for first in range(0, count, micro_batch * world.size):
        mine = range(first + world.rank, min(first + micro_batch * world.size, count), world.size)
        ids = np.zeros((micro_batch, rows.block_size + 1), np.int64)
        if mine:
            ids[:len(mine)] = rows.read_windows(mine)
        nothing = torch.from_numpy(ids[:, 1:] == PAD)
        nothing[len(mine):] = True
        ids[ids == PAD] = token_byte_info.bos_id  # which has no bytes
        n_bytes += decoded_bytes(ids[:len(mine)], token_byte_info)
        targets += nothing.numel() - int(nothing.sum())
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        y[nothing] = IGNORE
        own = [] if begin is None else [None, document_bounds(x, begin).to(world.device)]
        losses.append(model(x.to(world.device), y.to(world.device), *own))
        progress.add(min(micro_batch * world.size, count - first))
    progress.close()
    nll = torch.stack(losses).cpu().double().sum()  # read once: passes are not held up
    sums = world.sum(torch.cat([nll[None], torch.tensor([n_bytes, targets]).double()])).tolist()
    loss = sums[0] / sums[2]
    return {"val_loss": loss, "val_bpb": sums[0] / math.log(2) / max(sums[1], 1),
            "tokens": int(sums[2]), "bytes": int(sums[1]), "ppl": math.exp(min(loss, 700))}


@torch.no_grad()
def by_position(model: nn.Module, rows: Rows, tokens: int, micro_batch: int,
                world: World, begin: int | None = None) -> dict:
    """{'0-255': nats per target that follows one of these positions, '0-255_stderr': ..., n}: the
    windows of evaluate(), in quarters; the standard errors are over the n windows. `begin`: as
    there. Collective."""
    count, T = max(1, min(tokens // rows.block_size, rows.windows)), rows.block_size
    losses = torch.zeros(2, count, T, dtype=torch.float64)  # nats, and whether there is a target
    progress = Progress("by position", count, "rows", world.rank == 0, world.device.type)
    for first in range(0, count, micro_batch * world.size):
        mine = range(first + world.rank, min(first + micro_batch * world.size, count), world.size)
        if mine:
            ids = torch.from_numpy(rows.read_windows(mine).astype(np.int64))
            there = ids[:, 1:] != PAD
            ids.clamp_(min=0)
            own = [] if begin is None else [
                None, None, document_bounds(ids[:, :-1], begin).to(world.device)]
            logits = model(ids[:, :-1].to(world.device), *own).float().flatten(0, 1)
            nats = F.cross_entropy(logits, ids[:, 1:].flatten().to(world.device), reduction="none")
            losses[0, list(mine)] = nats.view(-1, T).cpu().double() * there
            losses[1, list(mine)] = there.double()
        progress.add(min(micro_batch * world.size, count - first))
    progress.close()
    found: dict = {}
    quarters = world.sum(losses).split(-(-T // 4), dim=2)
    for first, (nats, there) in zip(range(0, T, -(-T // 4)), quarters, strict=True):
        if there.any():
            held, name = there.sum(1) > 0, f"{first}-{first + nats.shape[1] - 1}"
            means = nats.sum(1)[held] / there.sum(1)[held]
            found[name] = (nats.sum() / there.sum()).item()
            found[f"{name}_stderr"] = (means.std(correction=0).item()
                                       / math.sqrt(max(1, len(means) - 1)))
    return found | {"n": count}


# ---- the model as a scorer of texts

class Scorer:
    """Log-likelihoods of continuations, computed as lm-eval's `hf` model does: context and
    continuation encoded together, begin token in front as in training, too long ones cut at the
    left, right padding, fp32 log-softmax. What several rows begin with is computed once, and the
    output matrix is read at the scored positions only. Ranks share the passes and all get all the
    results."""

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, batch_tokens: int, world: World):
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.batch_tokens = batch_tokens
        self.block_size = model.config.block_size
        self.begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        self.truncated: set = set()  # hashes of the contexts that were cut
        self.samples: dict[str, list[dict]] = {}  # by task, in lm-eval's form

    def encode(self, text: str) -> list[int]:
        """Ids of a text at the start of a document."""
        return self.begin + self.tokenizer.encode(text)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context ids, continuation ids), the harness's way: spaces at the end of the context
        belong to the continuation, and the border is where the context's own ids end."""
        bare = context.rstrip()
        if not bare:
            return self.begin, self.tokenizer.encode(context + continuation)
        before, whole = self.encode(bare), self.encode(context + continuation)
        return before, whole[len(before):]

    @torch.no_grad()
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation.

        Pairs that differ in their last token only share one row. Collective.
        """
        serves: dict[Ids, list[int]] = {}  # ids that the model reads -> pairs
        for i, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise UserError("the tokenizer merges a continuation into its context, so nothing "
                                "is left to score; begin the continuation with a space")
            ids = (context + continuation)[-(self.block_size + 1):]
            serves.setdefault(tuple(ids[:-1]), []).append(i)
            if len(context) + len(continuation) > self.block_size + 1:
                self.truncated.add(hash(tuple(context)))
        # how many of a row's positions are scored: as many as the longest continuation has
        wanted = {row: min(max(len(pairs[i][1]) for i in serves[row]), len(row)) for row in serves}
        results = torch.zeros(len(pairs), 2, dtype=torch.float64)
        progress = Progress("scoring", len(serves), "prompts", self.world.rank == 0,
                            self.world.device.type)
        batches = self.batches(self.groups(wanted))
        for batch in batches[self.world.rank::self.world.size]:
            rows = [row for _, members in batch for row in members]
            counts = [wanted[row] for row in rows]
            log_p = self.model.lm_head(self.states(batch, counts)).float().log_softmax(-1)
            for row, scored in zip(rows, log_p.split(counts), strict=True):
                for i in serves[row]:
                    target = torch.tensor(pairs[i][1][-len(row):], device=scored.device)
                    last = scored[-len(target):]
                    results[i, 0] = last.gather(1, target[:, None]).sum().item()
                    results[i, 1] = float((last.argmax(-1) == target).all())
            progress.add(min(len(rows) * self.world.size, len(serves) - progress.done))
        progress.close()
        return [(value, greedy > 0) for value, greedy in self.world.sum(results).tolist()]

    def groups(self, wanted: dict[Ids, int]) -> list[Group]:
        """Rows in groups whose beginning is computed once; `wanted`: positions scored of each,
        which lie behind it. In order of their ids neighbours have most in common: a row joins the
        one before as long as that saves more tokens than it costs the others."""
        groups: list[Group] = []
        for row in sorted(wanted):
            free = len(row) - wanted[row]
            common, rows = groups[-1] if groups else (0, [])
            both = min(common, free, common_length(rows[-1], row) if rows else 0)
            longest = max(len(row), *map(len, rows), 0)
            if (both >= WORTH and len(rows) * both >= (len(rows) - 1) * common
                    and (len(rows) + 1) * longest <= self.batch_tokens):
                groups[-1] = (both, [*rows, row])
            else:
                groups.append((free, [row]))
        return groups

    def batches(self, groups: list[Group]) -> list[list[Group]]:
        """Groups that go through the model together: batch_tokens in the rectangle that the rows
        fill, unless padding costs more than going apart; those that share a beginning apart from
        those that are alone."""
        def alone(group: Group) -> bool:
            return len(group[1]) == 1

        def sizes(batch: list[Group]) -> tuple[int, int, int]:
            """Rows, the longest beginning, the longest rest."""
            begin = 0 if alone(batch[0]) else max(common for common, _ in batch)
            rest = max(len(row) - (0 if alone(batch[0]) else common)
                       for common, rows in batch for row in rows)
            return sum(len(rows) for _, rows in batch), begin, rest

        def cost(batch: list[Group]) -> int:
            rows, begin, rest = sizes(batch)
            return len(batch) * begin + rows * rest

        batches: list[list[Group]] = []
        for group in sorted(groups, key=lambda one: (
                alone(one), 0 if alone(one) else one[0], max(map(len, one[1]))), reverse=True):
            last = batches[-1] if batches else []
            rows, begin, rest = sizes([*last, group])
            if (last and alone(last[0]) == alone(group) and begin + rest <= self.block_size
                    and rows * (begin + rest) <= self.batch_tokens
                    and cost([*last, group]) <= 1.1 * (cost(last) + cost([group]))):
                last.append(group)
            else:
                batches.append([group])
        return batches

    def states(self, batch: list[Group], counts: list[int]) -> Tensor:
        """The last `counts` states of every row, end to end (sum of counts, C)."""
        rows = [row for _, members in batch for row in members]
        if len(rows) == len(batch):
            ends, states = [len(row) for row in rows], self.model.hidden(self.padded(rows))
        else:
            model, device = self.model, self.world.device
            begins = [members[0][:common] for common, members in batch]
            owner = torch.tensor([i for i, (_, members) in enumerate(batch) for _ in members],
                                 device=device)
            rests = [row[common:] for common, members in batch for row in members]
            begin, longest = max(map(len, begins)), max(map(len, rests))
            once = KVCache(model.config, len(begins), begin, device, model.compute_dtype)
            model.hidden(self.padded(begins), once)
            once.lengths = torch.tensor([len(ids) for ids in begins], device=device)
            cache = KVCache(model.config, len(rows), begin + longest, device, model.compute_dtype)
            cache.k[:, :, :, :begin] = once.k[:, owner]
            cache.v[:, :, :, :begin] = once.v[:, owner]
            cache.lengths, cache.used = once.lengths[owner], begin
            ends, states = [len(rest) for rest in rests], model.hidden(self.padded(rests), cache)
        return torch.cat([one[end - count:end] for one, end, count in
                          zip(states, ends, counts, strict=True)])

    def padded(self, rows: list) -> Tensor:
        """Rows of ids as a rectangle (B, T), filled up at the right with an id that no earlier
        position sees."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for one, row in zip(ids, rows, strict=True):
            one[:len(row)] = torch.tensor(row)
        return ids.to(self.world.device)

    def keep(self, name: str, items: Iterable, values: list[list[tuple]], right) -> None:
        """Remember what was asked and answered in `samples`."""
        self.samples[name] = [
            {"doc_id": i, "target": str(item.right), "arguments": item.pairs,
             "resps": [[value] for value in row], "acc": float(hit)}
            for i, (item, row, hit) in enumerate(zip(items, values, right, strict=True))]


def common_length(one: Ids, other: Ids) -> int:
    """How many tokens both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
