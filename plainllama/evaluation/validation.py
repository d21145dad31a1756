"""The validation of a run by its objective: of text and dialogs loss and bits per byte, of pairs
how often the chosen answer is preferred."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from plainllama.evaluation.generated import RunAnswers
from plainllama.evaluation.likelihood import NOT_FINITE, evaluate, passes, window_count
from plainllama.files import read_rows
from plainllama.generation import generate
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.tokens.rows import FitRows, Rows, to_batch, val_rows
from plainllama.tokens.shards import read_manifest
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.tokens.tokenizer_json import ByteInfo, byte_info
from plainllama.training.engine import Engine
from plainllama.training.objectives import OBJECTIVES
from plainllama.training.reference import known, stored
from plainllama.weights import expansion

FALLEN = 1.2  # times the log-probability that chosen answers began with: a remark is due


class ValSet(NamedTuple):
    """A validation split, open."""

    rows: Rows
    info: ByteInfo
    bos_id: int | None  # begins a document, if tokens see their own document only


def validate(engine: Engine, rows: Rows, info: ByteInfo, reference: np.ndarray | None,
             sets: dict[str, ValSet]) -> dict:
    """Measure the first eval_tokens of a run's validation split: what is logged, val_loss first;
    and of each of `sets` val_loss/NAME and val_bpb/NAME. Collective."""
    scores = own_split(engine, rows, info, reference)
    own = {name: scores.get(name) for name in ("val_loss", "val_bpb")}
    for name, one in sets.items():
        same = one.rows.split.folder == rows.split.folder and own["val_bpb"]
        seen = own if same else evaluate(
            engine.module, one.rows, one.info, engine.config.eval_tokens, engine.micro,
            engine.world, one.bos_id)
        scores |= {f"{what}/{name}": seen[what] for what in ("val_loss", "val_bpb")}
    return scores


def own_split(engine: Engine, rows: Rows, info: ByteInfo, reference: np.ndarray | None) -> dict:
    """Measure a run's own validation split by its objective."""
    how = engine.micro, engine.world, engine.bos_id
    tokens = engine.config.eval_tokens
    if isinstance(rows, FitRows) and engine.objective.logged:
        scores = evaluate_pairs(engine.module, rows, tokens, *how, engine.config, reference)
        return {f"val_{name}": scores[name] for name in ("loss", *engine.objective.logged)} | {
            "val_pairs": scores["n"]}
    scores = evaluate(engine.module, rows, info, tokens, *how)
    return {name: scores[name] for name in ("val_loss", "val_bpb")}


@torch.no_grad()
def evaluate_pairs(model: nn.Module, rows: FitRows, tokens: int, micro_batch: int, world: World,
                   bos_id: int | None, config: Settings, reference: np.ndarray | None) -> dict:
    """{loss, what the objective of `config` logs, .../accuracies_stderr, shorter, n}: means
    over the pairs of the first `tokens` // T windows. `reference`: what the model of step 0 thinks
    of each document. `shorter`: the accuracy of preferring the shorter answer, which knows nothing
    else. Collective."""
    objective = OBJECTIVES[config.objective]
    total = torch.zeros(1 + len(objective.logged), dtype=torch.float64)
    for windows, ids in passes("validation", rows, tokens, micro_batch, world):
        batch = to_batch(ids, micro_batch, bos_id, known(reference, rows, windows))
        total += objective.loss(model, batch, world.device, config).double().cpu()
    documents = rows.documents_of(range(window_count(rows, tokens)))
    n = len(documents) // 2
    means = (world.sum(total) / n).tolist()
    scores = dict(zip(("loss", *objective.logged), means, strict=True))
    for kind in ("rewards", "logps"):
        right = scores[f"{kind}/accuracies"]
        scores[f"{kind}/accuracies_stderr"] = math.sqrt(right * (1 - right) / max(1, n - 1))
    lengths = rows.split.learned_counts()[documents]
    shorter = (np.sign(lengths[1::2] - lengths[::2]) + 1) / 2
    return scores | {"shorter": float(shorter.mean()), "n": n}


def score_pairs(model: nn.Module, rows: FitRows, tokens: int, micro_batch: int, world: World,
                bos_id: int | None, config: Settings, run: Path | None) -> dict:
    """What eval.py says of pairs: evaluate_pairs() by a run's own objective and reference; where it
    has none, nothing of rewards. logps/accuracies compares with any model: the share in which the
    chosen answer is likelier. Collective."""
    digest = (rows.split.folder / "manifest.sha256").read_text().strip()
    dtype = getattr(model, "compute_dtype", torch.float32)
    objective = OBJECTIVES[config.objective]
    there = stored(run, "val", digest, dtype) if run and objective.reference else None
    own = config.objective != "next" and (there is not None or not objective.reference)
    config = config if own else replace(config, objective="dpo", nll_weight=0.0,
                                        preference_beta=1.0)
    found = evaluate_pairs(model, rows, tokens, micro_batch, world, bos_id, config, there)
    if not math.isfinite(found["loss"]):
        raise UserError(NOT_FINITE)
    rewards = ["rewards/accuracies", "rewards/accuracies_stderr", "rewards/margins"] if own else []
    scores = {"val_loss": found["loss"]} if own else {}
    return scores | {name: found[name] for name in (
        *rewards, "logps/accuracies", "logps/accuracies_stderr", "logps/chosen", "logps/rejected",
        "shorter", "n")}


def along(config: Settings, data: Path, rows: Rows, world: World,
          say: Callable[[str], None]) -> list:
    """Choose what an evaluation does beside its scores: samples, answers, a look at the expanded
    blocks. Each has a `name` and add(model, step, log)."""
    found: list = generate.samples_of(config, data, rows, say)
    if config.eval_generate:
        found.append(RunAnswers(config, Tokenizer.load(data), world))
    if config.expand in ("concat", "hybrid"):
        bos = Tokenizer.load(data).bos_id if config.doc_mask else None
        found.append(expansion.Probe(rows, bos))
    return found


def open_sets(config: Settings, manifest: dict) -> dict[str, ValSet]:
    """Open the validation splits that eval_sets names, for a run on the data of `manifest`.
    UserError for one that is not there or has other tokens."""
    ours, found = manifest["tokenizer"], {}
    named = config.eval_sets if isinstance(config.eval_sets, dict) else {}
    for name, folder in named.items():
        if not Path(folder, "manifest.json").is_file():
            meant = folder if Path("data", folder, "manifest.json").is_file() else config.dataset
            raise UserError(f"eval_sets: {name} names {folder!r}, no data set; name the folder of "
                            f"one, such as data/{meant}")
        theirs = read_manifest(Path(folder))
        kind = theirs["recipe"].get("documents", "text")
        if kind == "preference":
            raise UserError(f"eval_sets: {name}, {folder}, holds pairs, of which a loss by token "
                            "says nothing; leave it out")
        if theirs["tokenizer"].get("base") == ours["sha256"]:
            raise UserError(f"eval_sets: {name}, {folder}, holds dialogs, whose roles are tokens "
                            f"that data/{config.dataset} has not; it is for runs on dialogs")
        if theirs["tokenizer"]["sha256"] not in (ours["sha256"], ours.get("base")):
            raise UserError(f"eval_sets: {name}, {folder}, has another tokenizer than "
                            f"data/{config.dataset}; prepare it with "
                            f"--tokenizer=data/{config.dataset}/tokenizer.json")
        masked = kind != "text" or (config.doc_mask and config.packing != "fit")
        found[name] = ValSet(val_rows(Path(folder), theirs, config.block_size),
                             byte_info(Path(folder)),
                             theirs["tokenizer"]["bos"] if masked else None)
    return found


def told(scores: dict) -> str:
    """Say in a line what was found."""
    sets = "".join(f"; {name.removeprefix('val_loss/')} {loss:.4f}" for name, loss in scores.items()
                   if name.startswith("val_loss/"))
    if "val_bpb" in scores:
        return (f"validation loss {scores['val_loss']:.4f} nats/token, {scores['val_bpb']:.4f} "
                f"bits/byte{sets}")
    return (f"validation loss {scores['val_loss']:.4f} nats/pair, chosen preferred in "
            f"{scores['val_rewards/accuracies']:.1%} of {scores['val_pairs']}, margin "
            f"{scores['val_rewards/margins']:.4f}{sets}")


def remark_on_chosen(run: Path, scores: dict) -> str:
    """Say so if chosen answers have become much less likely than they were at the run's first
    evaluation: a model may widen the margin by making both answers unlikely."""
    name, pairs = "val_logps/chosen", scores.get("val_pairs")
    if not math.isfinite(scores.get(name, math.nan)):
        return ""
    first = next((row[name] for row in read_rows(run / "metrics.jsonl", tolerant=True)
                  if row.get("val_pairs") == pairs and row.get(name) is not None), scores[name])
    if scores[name] >= FALLEN * first:
        return ""
    return (f"WARNING: the log-probability of chosen answers has fallen by "
            f"{scores[name] / first - 1:.0%} (from {first:.1f} to {scores[name]:.1f}): the margin "
            "grows while both answers become unlikely; a lower learning_rate or fewer steps help, "
            "with dpo nll_weight too")
