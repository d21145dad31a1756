"""What training makes small: functions of a model and a batch.

To add one: a function, an entry in OBJECTIVES, a choice in settings, and tests in
tests/test_engine.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from plainllama.tokens.rows import Rows


@dataclass(frozen=True)
class Objective:
    """A loss that is summed over micro-batches and ranks, and what the sum is divided by."""

    # (model, *what Batch.to gives) -> the summed loss in nats, fp32 ()
    loss: Callable[..., Tensor]
    # (rows, first, n) -> how many terms rows first..first+n-1 have: known before the step
    count: Callable[[Rows, int, int], int]


def next_token(model: nn.Module, ids: Tensor, targets: Tensor, documents: Tensor | None,
               places: Tensor | None) -> Tensor:
    """Sum -log p(target) over all targets."""
    return model(ids, targets, documents, places)


OBJECTIVES = {"next": Objective(next_token, lambda rows, first, n: rows.targets(first, n))}
