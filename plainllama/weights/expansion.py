"""Models that grew: some blocks have a copy that learns, and all that was there before is frozen.

Control LLM (https://arxiv.org/abs/2501.10979) sets the copy beside its block: both read the same
states, and what they make of them is interpolated. LLaMA Pro (https://arxiv.org/abs/2401.02415)
sets it behind its block. Either begins as the model that it grew from.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Block, LLaMA, ModelConfig
from plainllama.files import read_json
from plainllama.settings import Settings, UserError
from plainllama.tokens.rows import Batch, Rows, to_batch
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.tokens.tokenizer_json import byte_info
from plainllama.weights import adapters
from plainllama.weights.huggingface import read_config

WATCHED = 512  # tokens by which a run looks at its expanded blocks


def mse(base: Tensor, copy: Tensor) -> Tensor:
    """The mean squared difference of states (..., C), fp32 (...)."""
    return (base.float() - copy.float()).square().mean(-1)


def cosine(base: Tensor, copy: Tensor) -> Tensor:
    """Smooth L1 of relu(1 - cos) between states (..., C), fp32 (...)."""
    apart = (1 - F.cosine_similarity(base.float(), copy.float(), dim=-1)).relu()
    return F.smooth_l1_loss(apart, torch.zeros_like(apart), reduction="none")


# how far a copy's states are from its block's; to add one: a function, this entry, a choice in
# settings, a case in tests/test_expansion.py
DIVERGENCES = {"mse": mse, "cosine": cosine}


class Copy(Block):
    """A copy of a block and, where it stands beside that, how much it counts."""

    def __init__(self, config: ModelConfig, layer: int, beside: bool):
        super().__init__(config, layer)
        if beside:  # vectors, which are not decayed
            self.mix_bias = nn.Parameter(torch.zeros(1))
        if beside and config.expand_merge == "dlerp":
            self.mix_weight = nn.Parameter(torch.zeros(2 * config.d_model))

    def share(self, base: Tensor, copy: Tensor) -> Tensor:
        """How much of states (..., C) the copy's are: sigmoid(f), (1,), or a number for each token,
        sigmoid(W [base; copy] + b), (..., 1)."""
        score = self.mix_bias.to(base.dtype)
        if hasattr(self, "mix_weight"):
            both = torch.cat((base, copy), -1)
            score = F.linear(both, self.mix_weight.to(base.dtype)[None]) + score
        return score.sigmoid()


class ExpandedBlock(Block):
    """A frozen block, which keeps its names, and its copy, `expansion`.

    `measure`: the divergence that forward leaves in `divergence` (B, T), for the loss to take; ''
    for none. The merge is outside of what activation checkpointing computes twice.
    """

    divergence: Tensor | None = None
    measure = ""

    def __init__(self, config: ModelConfig, layer: int, number: int, beside: bool):
        super().__init__(config, layer)
        self.beside = beside
        self.expansion = Copy(config, config.n_layer + number, beside)

    def both(self, x: Tensor, *context) -> tuple[Tensor, Tensor]:
        """What block and copy make of the same states, (B, T, C) each."""
        return super().forward(x, *context), self.expansion(x, *context)

    def forward(self, x: Tensor, *context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if not self.beside:
            return self.expansion(super().forward(x, *context), *context)
        base, copy = self.both(x, *context)
        if self.measure and torch.is_grad_enabled():
            self.divergence = DIVERGENCES[self.measure](base, copy)
        return base + self.expansion.share(base, copy) * (copy - base)


# ---- made

def outline(config: ModelConfig) -> LLaMA:
    """Make a model; every n_layer // expand_blocks-th block is an expanded one, if the config says
    so."""
    model = LLaMA(config)
    for number in range(config.expand_blocks):
        layer = config.n_layer // config.expand_blocks * (number + 1) - 1
        beside = config.expand == "concat" or (config.expand == "hybrid" and number % 2 == 1)
        model.model.layers[layer] = ExpandedBlock(config, layer, number, beside)
    return model


def expanded(model: LLaMA) -> dict[int, ExpandedBlock]:
    """The expanded blocks by their number."""
    return {layer: block for layer, block in enumerate(model.model.layers)
            if isinstance(block, ExpandedBlock)}


def merging(model: LLaMA) -> dict[int, ExpandedBlock]:
    """The expanded blocks whose copies stand beside them."""
    return {layer: block for layer, block in expanded(model).items() if block.beside}


def first_new(folder: Path, entries: int, config: Settings) -> int:
    """Say from which entry on a run's vocabulary is new to a model of so many `entries`, whose
    tokenizer lies in a folder; 0: none is. An embedding may be larger than its tokenizer."""
    named = read_json(Path("data", config.dataset, "manifest.json"), tolerant=True).get("tokenizer")
    if named and named.get("base"):  # it was made of another, by adding to it
        known = entries_of(folder)
        if not known and entries >= named["vocab_size"]:
            raise UserError(f"{folder} has no tokenizer, which would say what of the data set's "
                            "tokens is new to it; copy its tokenizer.json there")
        if known and known < named["vocab_size"]:
            return min(known, entries)
    return entries if entries < config.vocab_size else 0


def entries_of(folder: Path) -> int:
    """Count the entries of the tokenizer in a model's folder; 0 if it has none."""
    if (folder / "tokenizer.json").is_file():
        return len(byte_info(folder).lengths)
    model = folder / "tokenizer.model"
    return make_tokenizer(str(model)).vocab_size if model.is_file() else 0


def new_rows(config: Settings, source: Path | None) -> int:
    """Say from which entry on a vocabulary is new to the model in `source`, and learns beside the
    frozen rest; 0: none is. UserError if a part of it is new for the second time."""
    if not source:
        return 0
    theirs = read_config(source)
    first = first_new(source, theirs.vocab_size, config)
    if first and theirs.first_row:
        raise UserError(f"{source} grew its vocabulary to {first} entries beside a frozen one, and "
                        "cannot grow it again; make a plain model of it first: export.py")
    return first or theirs.first_row


def freeze(model: LLaMA, config: Settings) -> None:
    """Freeze all but the copies, how they count, and the rows of new tokens."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapters.COPIES in name)
    for block in merging(model).values():
        block.measure = config.divergence
    if model.config.first_row:
        adapters.grow(model, model.config.first_row)
    adapters.shrink(model, config.frozen_dtype)


@torch.no_grad()
def begin(model: LLaMA) -> None:
    """Make every copy what its block is; one that stands behind adds nothing at first."""
    for block in expanded(model).values():
        for name, parameter in block.expansion.named_parameters():
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            if name.startswith("mix_") or (adds and not block.beside):
                parameter.zero_()
            else:
                parameter.copy_(block.get_parameter(name))


# ---- trained

def with_divergence(losses: Tensor, model: LLaMA, batch: Batch, config: Settings) -> Tensor:
    """Put divergence_weight times the divergence into the slope of losses (1 + L,), whose first is
    made small, and the divergence behind them, (1 + L + 1,); the loss keeps its value.

    The divergence is a mean over the expanded blocks that merge, and over the terms that the loss
    is a sum of: tokens that are learned or, of pairs, the means of both answers.
    """
    blocks = merging(model).values()
    apart = torch.stack([block.divergence for block in blocks  # type: ignore[misc]
                         ]).mean(0).flatten()
    for block in blocks:
        block.divergence = None
    found, counts = batch.found(), torch.zeros(batch.targets.numel())
    counts[found] = 1.0
    if config.objective != "next" and batch.starts is not None:
        owners = batch.starts.flatten().cumsum(0)[found] - 1
        counts[found] = 0.5 / torch.bincount(owners)[owners]
    counts = counts.pin_memory() if batch.ids.is_pinned() else counts
    total = (apart * counts.to(apart.device, non_blocking=True)).sum()
    slope = config.divergence_weight * (total - total.detach())  # 0, and not its gradient
    return torch.cat([losses[:1] + slope, losses[1:], total.detach()[None]])


class Probe:
    """What a run writes down at each evaluation of its expanded blocks that merge: how much their
    copies count, and how alike they are, by the first tokens of the validation split."""

    name = "look at the expanded blocks"

    def __init__(self, rows: Rows, bos_id: int | None):
        self.batch = first_tokens(rows, bos_id)

    @torch.no_grad()
    def add(self, model: LLaMA, step: int, log: Any) -> None:
        """Look and write a row."""
        found = look(model, self.batch)
        log.row({"step": step} | {f"{what}/{layer}": value for layer, seen in found.items()
                                  for what, value in seen.items()})
        said = ", ".join(f"{layer}: {seen['expansion_share']:.2f}" for layer, seen in found.items())
        log.say(f"step {step}: share of the copies, by block: {said}")


def first_tokens(rows: Rows, bos_id: int | None) -> Batch:
    """Read the first WATCHED tokens of a split, or its first row."""
    count = max(1, min(WATCHED // rows.block_size, rows.windows))
    return to_batch(rows.read_windows(range(count)), 0, bos_id)


@torch.no_grad()
def look(model: LLaMA, batch: Batch) -> dict[int, dict[str, float]]:
    """By the number of an expanded block that merges, means over the tokens of a batch: how much
    its copy counts (expansion_share), and the cosine of both states (expansion_cosine)."""
    ids, _, documents, _ = batch.to(model.rope_cos.device)
    states: list[Tensor] = []
    model.hidden(ids, documents=documents, watch=states.append)
    rope = model.rope_cos[:ids.shape[1]], model.rope_sin[:ids.shape[1]]
    found = {}
    for layer, block in merging(model).items():
        base, copy = block.both(states[layer], rope, None, None, None, documents)
        shares = block.expansion.share(base, copy).float().mean()
        alike = F.cosine_similarity(base.float(), copy.float(), dim=-1).mean()
        found[layer] = {"expansion_share": shares.item(), "expansion_cosine": alike.item()}
    return found


# ---- undone

@torch.no_grad()
def plain(model: LLaMA, shares: dict[int, float]) -> LLaMA:
    """Make a plain LLaMA of an expanded one. Copies behind their blocks become blocks: the same
    function, deeper. Of those beside, weights are interpolated, the copy's counting `shares` of its
    block: W + share (W_copy - W), another function."""
    weights: dict[str, Tensor] = {name: p for name, p in model.named_parameters()
                                  if not name.startswith("model.layers.")}
    layers = 0
    for layer, block in enumerate(model.model.layers):
        parts: list[dict[str, Tensor]] = [dict(block.named_parameters())]
        if isinstance(block, ExpandedBlock):
            copy: dict[str, Tensor] = {name: p for name, p in block.expansion.named_parameters()
                                       if not name.startswith("mix_")}
            first = {name: parts[0][name] for name in copy}
            parts = [first, copy]
            if block.beside:
                share = shares[layer]
                parts = [{name: p + share * (copy[name] - p) for name, p in first.items()}]
        for part in parts:
            weights |= {f"model.layers.{layers}.{name}": p for name, p in part.items()}
            layers += 1
    config = replace(model.config, n_layer=layers, expand="none", expand_blocks=0,
                     expand_merge="lerp", first_row=0)
    with torch.device("meta"):
        made = LLaMA(config)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # if it is tied
    made.load_state_dict(weights, assign=True)
    made.reset_derived(model.rope_cos.device)
    made.compute_dtype = model.compute_dtype
    return made.eval()
