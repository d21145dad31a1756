"""What training makes small: functions of a model and a batch.

To add one: a function, an entry in OBJECTIVES, a choice in settings, and tests in
tests/test_engine.py or tests/test_preferences.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainllama.settings import Settings
from plainllama.tokens.rows import Batch, Rows

# What is logged of preferences beside the loss, means over pairs; a tie is half an accuracy. logps
# are sums over an answer.
LOGGED = ("preference_loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
          "rewards/accuracies", "logps/chosen", "logps/rejected", "logps/accuracies")
CLOSEST = -1e-7  # a log-probability for log1mexp: nearer to 0, its slope is no number in fp32


@dataclass(frozen=True)
class Objective:
    """A loss that is summed over micro-batches and ranks, and what the sum is divided by."""

    # (model, batch, device, config) -> (1 + L,) fp32: the summed loss in nats, and the sums of what
    # is `logged`, without gradients
    loss: Callable[[nn.Module, Batch, torch.device, Settings], Tensor]
    # (rows, first, n) -> how many terms rows first..first+n-1 have: known before the step
    count: Callable[[Rows, int, int], int]
    logged: tuple[str, ...] = ()
    reference: bool = False  # the batch brings what the model of step 0 thinks of each document
    first: float | None = None  # the preference_loss of a model that is its own reference, if fixed


def next_token(model: nn.Module, batch: Batch, device: torch.device, config: Settings) -> Tensor:
    """Sum -log p(target) over all targets."""
    return model(*batch.to(device))[None]


def log_probabilities(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """Sum log p over what is learned of each document, and count that; and what is known of it
    beside, all (documents,)."""
    assert batch.starts is not None
    losses, count = model(*batch.to(device), each=True), int(batch.starts.sum())
    owners = batch.starts.flatten().cumsum(0)[batch.found()] - 1
    where = torch.full((len(losses),), count)  # what fills up belongs to none
    where[:len(owners)] = owners
    sizes = torch.bincount(owners, minlength=count).to(device)
    exact = torch.float32 if device.type == "mps" else torch.float64  # a sum of many tokens
    sums = torch.zeros(count + 1, device=device, dtype=exact).index_add(
        0, where.to(device), -losses.to(exact))[:count]
    known = torch.zeros(count) if batch.beside is None else batch.beside[batch.starts]
    return sums, sizes, known.to(device, exact)


def dpo(model: nn.Module, batch: Batch, device: torch.device, config: Settings) -> Tensor:
    """Sum -logsigmoid(beta ((log p - log ref)(chosen) - (log p - log ref)(rejected))) over pairs
    (https://arxiv.org/abs/2305.18290, equation 7), plus nll_weight times the chosen answer's loss a
    token (https://arxiv.org/abs/2404.19733, equation 1)."""
    logps, sizes, reference = log_probabilities(model, batch, device)
    rewards = config.preference_beta * (logps - reference)
    loss = -F.logsigmoid(rewards[::2] - rewards[1::2])
    nll = -logps[::2] / sizes[::2]
    return sums_of(loss + config.nll_weight * nll, loss, rewards, logps)


def orpo(model: nn.Module, batch: Batch, device: torch.device, config: Settings) -> Tensor:
    """Sum -p(chosen) - beta logsigmoid(log odds(chosen) - log odds(rejected)) over pairs, p being
    the mean log-probability of a token (https://arxiv.org/abs/2403.07691, equations 4 to 7)."""
    logps, sizes, _ = log_probabilities(model, batch, device)
    means = logps / sizes
    log_odds = means - log1mexp(means)
    loss = -config.preference_beta * F.logsigmoid(log_odds[::2] - log_odds[1::2])
    return sums_of(loss - means[::2], loss, config.preference_beta * means, logps)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, with a gradient that is a number everywhere: what is nearer to 0
    than CLOSEST counts as that."""
    x = torch.where(x > CLOSEST, CLOSEST, x)
    near = x > -0.693  # the one form is exact near 0, the other far from it (Maechler, 2012)
    return torch.where(near, torch.where(near, x, -1.0).expm1().neg().log(),
                       torch.where(near, -1.0, x).exp().neg().log1p())


def sums_of(losses: Tensor, preference: Tensor, rewards: Tensor, logps: Tensor) -> Tensor:
    """Sum over pairs: losses (P,), and what LOGGED names, of rewards and logps (2 P,)."""
    with torch.no_grad():
        margins = rewards[::2] - rewards[1::2]
        logged = torch.stack([preference, rewards[::2], rewards[1::2], margins,
                              (margins.sign() + 1) / 2, logps[::2], logps[1::2],
                              ((logps[::2] - logps[1::2]).sign() + 1) / 2]).sum(1)
    return torch.cat([losses.sum()[None], logged.detach()])


def count_pairs(rows: Rows, first: int, n: int) -> int:
    """Count the pairs of rows first..first+n-1."""
    return rows.pairs(first, n)  # type: ignore[attr-defined]


OBJECTIVES = {"next": Objective(next_token, lambda rows, first, n: rows.targets(first, n)),
              "dpo": Objective(dpo, count_pairs, LOGGED, reference=True, first=math.log(2)),
              "orpo": Objective(orpo, count_pairs, LOGGED)}
