"""The validation of a run by its objective: of text and dialogs loss and bits per byte, of pairs
how often the chosen answer is preferred."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from plainllama.evaluation.likelihood import evaluate, passes, window_count
from plainllama.files import read_rows
from plainllama.parallel import World
from plainllama.settings import Settings
from plainllama.tokens.rows import FitRows, Rows, to_batch
from plainllama.tokens.tokenizer_json import ByteInfo
from plainllama.training.engine import Engine
from plainllama.training.objectives import OBJECTIVES
from plainllama.training.reference import known, stored

FALLEN = 1.2  # times the log-probability that chosen answers began with: a remark is due


def validate(engine: Engine, rows: Rows, info: ByteInfo, reference: np.ndarray | None) -> dict:
    """Measure the first eval_tokens of a run's validation split: what is logged, val_loss first.
    Collective."""
    how = engine.micro, engine.world, engine.bos_id
    tokens = engine.config.eval_tokens
    if isinstance(rows, FitRows) and engine.objective.logged:
        scores = evaluate_pairs(engine.module, rows, tokens, *how, engine.config, reference)
        return {f"val_{name}": scores[name] for name in ("loss", *engine.objective.logged)}
    scores = evaluate(engine.module, rows, info, tokens, *how)
    return {name: scores[name] for name in ("val_loss", "val_bpb")}


@torch.no_grad()
def evaluate_pairs(model: nn.Module, rows: FitRows, tokens: int, micro_batch: int, world: World,
                   bos_id: int | None, config: Settings, reference: np.ndarray | None) -> dict:
    """{loss, what the objective of `config` logs, rewards/accuracies_stderr, shorter, n}: means
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
    right = scores["rewards/accuracies"]
    lengths = rows.split.learned_counts()[documents]
    shorter = (np.sign(lengths[1::2] - lengths[::2]) + 1) / 2
    return scores | {"rewards/accuracies_stderr": math.sqrt(right * (1 - right) / max(1, n - 1)),
                     "shorter": float(shorter.mean()), "n": n}


def score_pairs(model: nn.Module, rows: FitRows, tokens: int, micro_batch: int, world: World,
                bos_id: int | None, config: Settings, run: Path | None) -> dict:
    """What eval.py says of pairs: evaluate_pairs() by a run's own objective and reference or, where
    it has none, as if all answers had been equally likely: then their own log-probabilities decide,
    and the names say logps, not rewards. Collective."""
    digest = (rows.split.folder / "manifest.sha256").read_text().strip()
    there = stored(run, "val", digest) if run and config.objective == "dpo" else None
    own = config.objective == "orpo" or there is not None
    config = config if own else replace(config, objective="dpo", nll_weight=0.0,
                                        preference_beta=1.0)
    found = evaluate_pairs(model, rows, tokens, micro_batch, world, bos_id, config, there)
    kind = "rewards" if own else "logps"
    scores = {"val_loss": found["loss"]} if own else {}
    for name in ("accuracies", "accuracies_stderr", "margins"):
        scores[f"{kind}/{name}"] = found[f"rewards/{name}"]
    return scores | {name: found[name] for name in ("logps/chosen", "logps/rejected", "shorter",
                                                    "n")}


def told(scores: dict) -> str:
    """Say in a line what validate() found."""
    if "val_bpb" in scores:
        return (f"validation loss {scores['val_loss']:.4f} nats/token, {scores['val_bpb']:.4f} "
                "bits/byte")
    return (f"validation loss {scores['val_loss']:.4f} nats/pair, chosen preferred in "
            f"{scores['val_rewards/accuracies']:.1%}, margin {scores['val_rewards/margins']:.4f}")


def remark_on_chosen(run: Path, scores: dict) -> str:
    """Say so if chosen answers have become much less likely than they were at the run's first
    evaluation: a model may widen the margin by making both answers unlikely."""
    name = "val_logps/chosen"
    if name not in scores:
        return ""
    first = next((row[name] for row in read_rows(run / "metrics.jsonl", tolerant=True)
                  if name in row), scores[name])
    if scores[name] >= FALLEN * first:
        return ""
    return (f"WARNING: the log-probability of chosen answers has fallen by "
            f"{scores[name] / first - 1:.0%} (from {first:.1f} to {scores[name]:.1f}): the margin "
            "grows while both answers become unlikely; a lower learning_rate or fewer steps help, "
            "with dpo nll_weight too")
