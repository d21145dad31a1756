"""Parameter groups, AdamW, and lr(step), a pure function."""

import math

import torch
from torch import Tensor, nn

from settings import Settings

DECAY_SHARE = 0.2  # wsd: the last fifth of the run decays (https://arxiv.org/abs/2405.18392)


def lr(step: int, config: Settings) -> float:
    """Learning rate of update `step` (the first is 0): linear warm-up, then the schedule.

    cosine, linear: from the peak to min_lr at max_steps. wsd: constant, then linear to min_lr.
    """
    c = config
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    start = c.warmup_steps
    if c.schedule == "wsd":
        start = max(start, c.max_steps - round(DECAY_SHARE * c.max_steps))
    if step < start:
        return c.learning_rate
    done = min((step - start) / max(c.max_steps - start, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done)) if c.schedule == "cosine" else 1 - done
    return c.min_lr + (c.learning_rate - c.min_lr) * share


def make(model: nn.Module, config: Settings) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) whose state is allocated at once, so that a
    checkpoint can be copied into it. Matrices are decayed, gains are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2],
               "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-8, fused=True,
                                  betas=(config.beta1, config.beta2))
    for p in parameters:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def step(optimizer: torch.optim.Optimizer, rate: float, norm: Tensor, clip: float) -> Tensor:
    """One update with gradients clipped to norm `clip` (0: not clipped).

    `norm` is the gradient norm over all ranks, (). If it is not finite nothing changes, neither
    weights nor moments. Both happen inside the fused kernel (it divides gradients by `grad_scale`
    and does nothing where `found_inf` is 1), so the host never waits for the device. Returns
    whether the update was skipped, 0. or 1., ().
    """
    skipped = (~norm.isfinite()).float()
    scale = (norm / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
    optimizer.grad_scale = torch.where(skipped.bool(), torch.ones_like(scale), scale)  # type: ignore
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return skipped
