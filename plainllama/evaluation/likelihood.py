"""How likely a model finds a text: the loss of a split, by position, and of continuations."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from model import ANY_SHAPE, IGNORE, KVCache, LLaMA
from plainllama.files import sha256_bytes
from plainllama.parallel import World
from plainllama.progress import Progress
from plainllama.results import score_table
from plainllama.settings import UserError, ceil_div
from plainllama.tokens.rows import CONTEXT, PAD, Rows, to_batch, val_rows
from plainllama.tokens.shards import read_manifest
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import ByteInfo, decoded_bytes, sha256_of

PASSES = 16  # of an evaluation at least, where there are as many windows
WORTH = 16  # tokens that rows must share before they are computed once for all of them
MARGIN = 64  # tokens before a cut in a text, which without the cut may be others
NOT_FINITE = "the model's losses are not finite: its weights are broken, and it has no score"
Ids = tuple[int, ...]


# ---- bits per byte

class TextRows:
    """The windows of a text as Rows has those of a split, the last one filled up with PAD."""

    def __init__(self, file: str, tokenizer: Tokenizer, block_size: int, tokens: int = 0):
        """Encode a file's documents, or no more than the first `tokens` take; UserError if it
        cannot be read or holds none."""
        from plainllama.text import documents as text
        from plainllama.text import records
        from plainllama.text.sources import survey

        path, dropped = Path(file), text.Tally()
        if path.is_file():  # of any name, and not read before it is needed
            kind = records.kind_of(path.name) or ".txt"
            whole = records.Piece(file, file, kind, "text", path.stat().st_size)
            with records.naming_damage(file):
                parts = [text.Part(list(records.KINDS[kind].pieces(whole, 1)))]
        else:
            _, parts = survey(file)
        left = max(1, tokens // block_size) * block_size + 1 if tokens else sys.maxsize
        encoded = [np.zeros(0, tokenizer.kind)]
        for document in text.documents(parts, dropped):
            encoded.append(first_ids(document, tokenizer, left))
            left -= len(encoded[-1])
            if not left:
                break
        for rule, found in dropped.items():
            if rule != "empty":
                raise UserError(f"--text: {found['first']}: {rule}")
        ids = np.concatenate(encoded).astype(np.int32)
        self.block_size, self.windows = block_size, ceil_div(len(ids) - 1, block_size)
        if self.windows < 1:
            raise UserError(f"--text={file} holds no text")
        filled = np.full(self.windows * block_size + 1, PAD, np.int32)
        filled[:len(ids)] = ids
        self.hash = sha256_bytes(filled.tobytes())
        self.all = np.lib.stride_tricks.sliding_window_view(filled, block_size + 1)[::block_size]

    def read_windows(self, windows: Iterable[int]) -> np.ndarray:
        """Read the given windows, int32 (m, T + 1)."""
        return self.all[list(windows)]


def first_ids(text: str, tokenizer: Tokenizer, most: int) -> np.ndarray:
    """Encode a document, or as much of its beginning as gives its first `most` ids."""
    size = 8 * most + 1024  # characters
    while size < len(text):
        ids = tokenizer.encode_documents([text[:size]])[0]
        if len(ids) >= most + MARGIN:
            return ids[:most]
        size *= 2
    return tokenizer.encode_documents([text])[0][:most]


Windows = Rows | TextRows  # what evaluate() and by_position() read


def validation_rows(data: Path, folder: Path, block_size: int) -> Rows:
    """Open the windows of a data set's validation split; UserError if the model in `folder` has
    another tokenizer."""
    rows = val_rows(data, read_manifest(data), block_size)
    if sha256_of(data) != sha256_of(folder):
        raise UserError(f"{data} has another tokenizer than {folder}, by its sha256; name another")
    return rows


@torch.no_grad()
def evaluate(model: nn.Module, rows: Windows, token_byte_info: ByteInfo, tokens: int,
             micro_batch: int, world: World, bos_id: int | None = None) -> dict:
    """{val_loss, val_bpb, tokens, bytes, ppl} of the first `tokens` // T windows, in their order.

    val_loss is nats per target; val_bpb is nats / ln 2 / utf-8 bytes of the decoded targets, so
    boundary tokens count above the line only. Independent of micro_batch (rows per pass) and of the
    number of ranks: rank r takes every W-th window, and rows without a target fill up the last
    passes, so that all passes have one shape and all ranks do as many. `bos_id`: the id that begins
    a document, if tokens see their own document only (doc_mask). Calls only
    model(ids, targets, documents), the summed loss. Collective.
    """
    return evaluate_passes(model, rows, token_byte_info, tokens, micro_batch, world, bos_id)[0]


@torch.no_grad()
def evaluate_passes(model: nn.Module, rows: Windows, token_byte_info: ByteInfo, tokens: int,
                    micro_batch: int, world: World,
                    bos_id: int | None = None) -> tuple[dict, float | None]:
    """Give what evaluate() does, and the loss's standard error by the spread of its passes, None of
    a single one. Collective."""
    losses, counts, n_bytes = [], [], 0
    for _, ids in passes("validation", rows, tokens, micro_batch, world):
        batch = to_batch(ids, micro_batch, bos_id)
        known = np.where((ids == PAD) | (ids >= CONTEXT), token_byte_info.bos_id, ids)
        n_bytes += decoded_bytes(known, token_byte_info)  # what is only read counts as a boundary
        counts.append(int((batch.targets != IGNORE).sum()))
        losses.append(model(*batch.to(world.device)))
    # nats and targets of each pass of each rank
    table = torch.zeros(world.size, 2, len(counts), dtype=torch.float64)
    table[world.rank, 0] = torch.stack(losses).cpu()  # read once: passes are not held up
    table[world.rank, 1] = torch.tensor(counts)
    nats, targets = world.sum(table).transpose(0, 1).flatten(1)
    nll, total = nats.sum().item(), targets.sum().item()
    n_bytes = int(world.sum(torch.tensor([n_bytes], dtype=torch.float64)).item())
    loss, k = nll / total, int((targets > 0).sum())
    scores = {"val_loss": loss, "val_bpb": nll / math.log(2) / max(n_bytes, 1),
              "tokens": int(total), "bytes": n_bytes, "ppl": math.exp(min(loss, 700))}
    if k < 2:
        return scores, None
    # of a ratio, its passes being k draws
    return scores, math.sqrt(k / (k - 1) * (nats - loss * targets).square().sum().item()) / total


def rows_of_a_pass(rows: Windows, tokens: int, batch_tokens: int) -> int:
    """Say how many windows go through the model together: few enough for PASSES passes, where there
    are as many windows, since their spread gives the interval."""
    return max(1, min(batch_tokens // rows.block_size, window_count(rows, tokens) // PASSES))


def measured(model: nn.Module, rows: Windows, *how) -> dict:
    """Give what eval.py records of windows: evaluate() and val_loss_stderr; `how`: as there.
    UserError if the loss is not finite. Collective."""
    found, error = evaluate_passes(model, rows, *how)
    if not math.isfinite(found["val_loss"]):
        raise UserError(NOT_FINITE)
    scores = {"val_loss": found["val_loss"]} | ({} if error is None else {"val_loss_stderr": error})
    return scores | {"val_bpb": found["val_bpb"], "ppl": found["ppl"],
                     "val_tokens": found["tokens"], "val_bytes": found["bytes"]}


def told(scores: dict, what: str, text: bool) -> str:
    """Show what measured() gave of `what`; the scores of a `text` are not called validation."""
    shown = {name.removeprefix("val_") if text else name: scores[name] for name in scores
             if name not in ("val_tokens", "val_bytes")}
    return score_table(f"{what}, {scores['val_tokens']:,} tokens, {scores['val_bytes']:,} bytes",
                       shown)


@torch.no_grad()
def by_position(model: nn.Module, rows: Windows, tokens: int, micro_batch: int,
                world: World, bos_id: int | None = None) -> dict:
    """{'0-255': nats per target that follows one of these positions, '0-255_stderr': ..., n}: the
    windows of evaluate(), in quarters; the standard errors are over the n windows. `bos_id`: as
    there. Collective."""
    count, T = window_count(rows, tokens), rows.block_size
    losses = torch.zeros(2, count, T, dtype=torch.float64)  # nats, and whether there is a target
    for windows, ids in passes("by position", rows, tokens, micro_batch, world):
        if windows:
            batch = to_batch(ids, bos_id=bos_id)
            x, _, documents, _ = batch.to(world.device)
            y = batch.targets.to(x.device)
            logits = model(x, documents=documents).float().flatten(0, 1)
            nats = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE, reduction="none")
            losses[:, windows] = torch.stack((nats.view(-1, T), y != IGNORE)).cpu().double()
    quarter, scores = ceil_div(T, 4), {}
    parts = world.sum(losses).split(quarter, dim=2)
    for first, (nats, counted) in zip(range(0, T, quarter), parts, strict=True):
        if counted.any():
            name = f"{first}-{first + nats.shape[1] - 1}"
            scores[name] = (nats.sum() / counted.sum()).item()
            means = (nats.sum(1) / counted.sum(1))[counted.any(1)]
            spread = means.std(correction=0).item()
            scores[f"{name}_stderr"] = spread / math.sqrt(max(1, len(means) - 1))
    return scores | {"n": count}


def window_count(rows: Windows, tokens: int) -> int:
    """How many windows hold about `tokens` tokens: at least one, at most all."""
    return max(1, min(tokens // rows.block_size, rows.windows))


def passes(name: str, rows: Windows, tokens: int, micro_batch: int,
           world: World) -> Iterator[tuple[list[int], np.ndarray]]:
    """This rank's windows of each pass, and their ids (m, T + 1), m at most `micro_batch`; as many
    passes on every rank, so the last may have none. Shows how far they are as `name`."""
    count, stride = window_count(rows, tokens), micro_batch * world.size
    progress = Progress(name, count, "rows", world.rank == 0, world.device.type)
    for first in range(0, count, stride):
        windows = list(range(first + world.rank, min(first + stride, count), world.size))
        yield windows, rows.read_windows(windows)
        progress.add(min(stride, count - first))
    progress.close()


# ---- the model as a scorer of texts

class Likelihood(NamedTuple):
    """How likely a continuation is."""

    nats: float  # its log-likelihood
    greedy: bool  # whether greedy decoding gives it


def mean(name: str, right: np.ndarray) -> dict[str, float]:
    """Give a share and its standard error."""
    return {name: float(right.mean()),
            f"{name}_stderr": float(right.std() / math.sqrt(max(len(right) - 1, 1)))}


def common_length(one: Sequence, other: Sequence) -> int:
    """Count the first items that two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class Group:
    """Rows whose common beginning is computed once."""

    def __init__(self, common: int, rows: list[Ids]):
        self.common = common  # tokens that all begin with; of a row alone, those before the scored
        self.rows = rows
        self.shared = common if len(rows) > 1 else 0  # tokens computed once for several rows
        self.longest = max(map(len, rows))


class Batch:
    """Groups that go through the model together: either all share a beginning, or none."""

    def __init__(self, groups: list[Group]):
        self.groups = groups
        self.rows = [row for group in groups for row in group.rows]
        self.begin = max(group.shared for group in groups)  # tokens of the longest beginning
        self.rest = max(group.longest - group.shared for group in groups)  # ... and rest behind it
        # tokens that the model computes, padding included
        self.cost = len(groups) * self.begin + len(self.rows) * self.rest


class Scorer:
    """Log-likelihoods of continuations, computed as lm-eval's `hf` model does: context and
    continuation encoded together, begin token in front as in training, too long ones cut at the
    left, right padding, fp32 log-softmax. What several rows begin with is computed once, and the
    output matrix is read at the scored positions only. Ranks share the passes and all get all the
    results. `folder`: the checkpoint, of a model that lies in one."""

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, batch_tokens: int, world: World,
                 folder: Path | None = None):
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.batch_tokens, self.folder = batch_tokens, folder
        self.block_size = model.config.block_size
        self.truncated: set = set()  # hashes of the contexts that were cut
        self.samples: dict[str, list[dict]] = {}  # by task, as lm-eval keeps them

    def encode(self, text: str) -> list[int]:
        """Encode a text at the start of a document."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode (context, continuation) the harness's way: spaces at the end of the context belong
        to the continuation, and the border is where the context's own ids end."""
        bare, whole = context.rstrip(), self.encode(context + continuation)
        before = self.encode(bare) if bare else whole[:1]
        return before, whole[len(before):]

    @torch.no_grad()
    @sdpa_kernel(ANY_SHAPE)
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """Score the continuation of each (context ids, continuation ids).

        Pairs that differ in their last token only share one row. Collective.
        """
        serves: dict[Ids, list[int]] = {}  # ids that the model reads -> numbers of the pairs
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
            counts = [wanted[row] for row in batch.rows]
            log_p = self.model.lm_head(self.states(batch, counts)).float().log_softmax(-1)
            numbers, found = [], []  # read once, so that the device does not wait for each pair
            for row, scored in zip(batch.rows, log_p.split(counts), strict=True):
                for i in serves[row]:
                    target = torch.tensor(pairs[i][1][-len(row):]).to(scored.device)
                    last = scored[-len(target):]
                    greedy = (last.argmax(-1) == target).all().float()
                    numbers.append(i)
                    found.append(torch.stack((last.gather(1, target[:, None]).sum(), greedy)))
            results[numbers] = torch.stack(found).cpu().double()
            progress.add(min(len(counts) * self.world.size, len(serves) - progress.done))
        progress.close()
        results = self.world.sum(results)
        if not results.isfinite().all():  # an argmax of them would look like an answer
            raise UserError(NOT_FINITE)
        return [Likelihood(nats, greedy > 0) for nats, greedy in results.tolist()]

    def groups(self, wanted: dict[Ids, int]) -> list[Group]:
        """Gather rows in groups; `wanted`: how many positions of each are scored, which lie behind
        what it shares. In order of their ids neighbours have most in common: a row joins the one
        before as long as that saves more tokens than it costs the others."""
        groups: list[Group] = []
        for row in sorted(wanted):
            alone = Group(len(row) - wanted[row], [row])
            last = groups[-1] if groups else Group(0, [()])
            shared = common_length(last.rows[-1], row)
            common = min(last.common, alone.common, shared)
            joined, members = Group(common, [*last.rows, row]), len(last.rows)
            if (common >= WORTH and members * common >= (members - 1) * last.common
                    and len(joined.rows) * joined.longest <= self.batch_tokens):
                groups[-1] = joined
            else:
                groups.append(alone)
        return groups

    def batches(self, groups: list[Group]) -> list[Batch]:
        """Gather groups of like shape in batches: batch_tokens in the rectangle that the rows fill,
        unless padding costs more than going apart. Rows alone come first, then the longest."""
        batches: list[Batch] = []
        for group in sorted(groups, reverse=True, key=lambda group: (
                group.shared == 0, group.shared, group.longest)):
            alone = Batch([group])
            last = batches[-1] if batches else alone
            joined = Batch([*last.groups, group])
            length = joined.begin + joined.rest
            if (batches and (last.begin == 0) == (alone.begin == 0) and length <= self.block_size
                    and len(joined.rows) * length <= self.batch_tokens
                    and joined.cost <= 1.1 * (last.cost + alone.cost)):
                batches[-1] = joined
            else:
                batches.append(alone)
        return batches

    def states(self, batch: Batch, counts: list[int]) -> Tensor:
        """Compute the last `counts` states of every row, end to end (sum of counts, C)."""
        rests = [row[group.shared:] for group in batch.groups for row in group.rows]
        cache = self.beginnings(batch) if batch.begin else None
        states = self.model.hidden(self.padded(rests), cache)
        return torch.cat([row[len(rest) - count:len(rest)] for row, rest, count in
                          zip(states, rests, counts, strict=True)])

    def beginnings(self, batch: Batch) -> KVCache:
        """Compute what each group of a batch begins with, once, and fill a cache of all rows."""
        model, device = self.model, self.world.device
        begins = [group.rows[0][:group.shared] for group in batch.groups]
        room = batch.begin + batch.rest
        cache = KVCache(model.config, len(begins), room, device, model.compute_dtype)
        model.hidden(self.padded(begins), cache)
        owner = [i for i, group in enumerate(batch.groups) for _ in group.rows]
        cache.keep(torch.tensor(owner, device=device))
        cache.lengths = torch.tensor([len(begins[i]) for i in owner], device=device)
        return cache

    def padded(self, rows: list[Ids]) -> Tensor:
        """Make rows of ids a rectangle (B, T), filled up at the right with an id that no earlier
        position sees."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return ids.to(self.world.device)
