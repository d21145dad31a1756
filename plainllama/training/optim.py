"""Parameter groups, AdamW and Muon, and lr(step), a pure function."""

import math

import torch
from torch import Tensor, nn

from model import trained
from plainllama.parallel import World
from plainllama.settings import Settings, UserError

MOMENTUM = 0.95  # of Muon
STACK = 8  # matrices that Muon works on at a time: bounds its memory, also where they are sharded


def warmed_up(config: Settings) -> int:
    """The first update at the peak: the last of the warm-up or, without one, the first of all."""
    return max(config.warmup_steps - 1, 0)


def last_fifth(config: Settings) -> int:
    """The update after which wsd falls (https://arxiv.org/abs/2405.18392)."""
    return max(warmed_up(config), config.max_steps - 1 - max(1, round(0.2 * config.max_steps)))


# the last update at the peak, and which share of the fall is left after a share of its updates;
# to add one: this entry, a choice in settings, a case in tests/test_optim.py
SCHEDULES = {"cosine": (warmed_up, lambda done: 0.5 * (1 + math.cos(math.pi * done))),
             "linear": (warmed_up, lambda done: 1 - done),
             "wsd": (last_fifth, lambda done: 1 - done)}


def lr(step: int, config: Settings) -> float:
    """Learning rate of update `step`; the first is 0, the last max_steps - 1.

    With a warm-up of w updates, update k < w has peak * (k + 1) / w. After update s the rate falls:
    update k has x * peak + (1 - x) * min_lr, x = share((k - s) / (max_steps - 1 - s)), so that s
    has the peak and the last update min_lr. cosine, linear: s ends the warm-up. wsd: the peak is
    kept until the last fifth. (A run of one update has the peak.)
    """
    c, (last_at_peak, share) = config, SCHEDULES[config.schedule]
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    start = last_at_peak(c)
    done = (step - start) / max(c.max_steps - 1 - start, 1)
    left = share(min(max(done, 0.0), 1.0))
    return left * c.learning_rate + (1 - left) * c.min_lr


def fit_warmup(config: Settings) -> str:
    """Shorten a warm-up that the run would not outlast to a tenth of it; what to say, or ''."""
    asked = config.warmup_steps
    if asked < config.max_steps:
        return ""
    config.warmup_steps = config.max_steps // 10
    return (f"warmup_steps {asked} does not fit into max_steps {config.max_steps}: the warm-up "
            f"takes {config.warmup_steps} of them")


def adamw(model: nn.Module, config: Settings, world: World) -> "Optimizer":
    """AdamW for all that learns (https://arxiv.org/abs/1711.05101)."""
    return Optimizer(make_adamw([p for _, p in trained(model)], config), None)


def adamw_and_muon(model: nn.Module, config: Settings, world: World) -> "Optimizer":
    """Muon for the matrices inside the blocks, AdamW for embedding, output matrix and gains."""
    hidden = {n: p for n, p in trained(model) if n.startswith("model.layers.") and p.dim() >= 2}
    rest = [p for name, p in trained(model) if name not in hidden]
    muon = Muon(list(hidden.values()), config.weight_decay, world)
    return Optimizer(make_adamw(rest, config), muon)


# to add one: this entry, a choice in settings, a case in tests/test_optim.py
OPTIMIZERS = {"adamw": adamw, "muon": adamw_and_muon}


def make(model: nn.Module, config: Settings, world: World | None = None) -> "Optimizer":
    """Make the optimizer that the config names, its state allocated at once, so that a checkpoint
    can be copied into it. UserError if nothing learns."""
    if not list(trained(model)):
        raise UserError("no parameter learns: all of them are frozen")
    return OPTIMIZERS[config.optimizer](model, config, world or World())


def make_adamw(parameters: list[nn.Parameter], config: Settings) -> torch.optim.AdamW:
    """AdamW with fused kernels; matrices are decayed, gains are not."""
    groups = [{"params": [p for p in parameters if p.dim() >= 2],
               "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    made = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-8, fused=True,
                             betas=(config.beta1, config.beta2))
    for p in parameters:
        made.state[p] = {"step": torch.zeros((), device=p.device),
                         "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return made


class Muon:
    """Momentum, orthogonalised, for matrices (https://kellerjordan.github.io/posts/muon).

    The direction is the nearest semi-orthogonal matrix to the Nesterov momentum, scaled by
    0.2 sqrt(max(rows, columns)) so that its entries are as large as AdamW's and learning rate and
    decay can be shared with it (https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float, world: World):
        self.weight_decay, self.world = weight_decay, world
        self.state: dict[Tensor, dict[str, Tensor]] = {
            p: {"momentum": torch.zeros_like(p)} for p in parameters}
        shapes: dict[tuple, list] = {}  # matrices of one shape, tall ones turned, work together
        for p in parameters:
            shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
        self.stacks = [alike[i:i + STACK] for alike in shapes.values()
                       for i in range(0, len(alike), STACK)]

    @torch.no_grad()
    def step(self, rate: float, scale: Tensor, skipped: Tensor) -> None:
        """One update with gradients divided by `scale` (); none where `skipped` () is true. Each
        rank makes the directions of every size-th stack, for all ranks."""
        world = self.world
        for first in range(0, len(self.stacks), world.size):
            turn, mine = self.stacks[first:first + world.size], None
            for owner, parameters in enumerate(turn):
                ahead = [self.ahead(p, scale, skipped) for p in parameters]
                if owner == world.rank:
                    mine = orthogonal(torch.stack(ahead))
            for owner, parameters in enumerate(turn):
                shape = len(parameters), *sorted(parameters[0].shape)
                turned = world.from_rank(owner, mine, shape)
                for p, direction in zip(parameters, turned, strict=True):
                    self.move(p, direction, rate, skipped)

    def ahead(self, p: nn.Parameter, scale: Tensor, skipped: Tensor) -> Tensor:
        """The Nesterov momentum of a matrix, whole and not taller than wide. Collective."""
        momentum = self.state[p]["momentum"]
        grad = self.world.piece(p.grad)[0] / scale  # type: ignore[arg-type]
        buffer = self.world.piece(momentum)[0]
        buffer.copy_(torch.where(skipped, buffer, buffer.lerp(grad, 1 - MOMENTUM)))
        ahead = torch.zeros_like(momentum)
        self.world.piece(ahead)[0].copy_(grad.lerp(buffer, MOMENTUM))
        whole = self.world.whole(ahead)
        return whole if whole.shape[0] <= whole.shape[1] else whole.T

    def move(self, p: nn.Parameter, direction: Tensor, rate: float, skipped: Tensor) -> None:
        """Move this rank's rows of a matrix."""
        direction *= 0.2 * math.sqrt(direction.shape[-1]) * rate
        local, offset = self.world.piece(p)
        whole = direction if p.shape[0] <= p.shape[1] else direction.T
        change = whole[offset:offset + local.shape[0]] + rate * self.weight_decay * local
        local.sub_(torch.where(skipped, 0.0, change))


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, r, c), r <= c -> matrices with the same singular vectors and singular values near 1, by
    five steps of a quintic Newton-Schulz iteration; in bf16 on a GPU, else in fp32."""
    a, b, c = 3.4445, -4.7750, 2.0315  # for singular values in 0..1
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class LossScale:
    """What fp16 losses are multiplied with, so that small gradients do not round to zero; on the
    device. Halved when an update was skipped, doubled after 2,000 that were not, and first 2^16:
    the rule of torch.amp.GradScaler (https://arxiv.org/abs/1710.03740, section 3.2)."""

    def __init__(self, device: torch.device):
        self.value = torch.tensor(2.0**16, device=device)
        self.good = torch.zeros((), device=device)  # updates since it last changed

    def adjust(self, skipped: Tensor) -> None:
        """After an update; `skipped` () says whether it was."""
        full = self.good >= 1999
        self.value.mul_(torch.where(skipped, 0.5, torch.where(full, 2.0, 1.0)))
        self.good.copy_(torch.where(skipped | full, 0.0, self.good + 1))


class Optimizer:
    """AdamW and, if there is one, the Muon of the matrices inside the blocks, as one."""

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon | None):
        self.adamw, self.muon = adamw, muon
        self.loss_scale: LossScale | None = None  # gradients are those of the loss times its value
        # parameter -> its state by name; the tensors are those that updates change in place
        self.state: dict[Tensor, dict[str, Tensor]] = {**adamw.state}
        self.state.update(muon.state if muon else {})

    def scale_state(self) -> list[float] | None:
        """Loss scale and updates since it changed, for a checkpoint; None without one."""
        scale = self.loss_scale
        return [scale.value.item(), scale.good.item()] if scale else None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.state:
            parameter.grad = None


def step(optimizer: Optimizer, rate: float, norm: Tensor, clip: float) -> Tensor:
    """One update with gradients clipped to norm `clip` (0: not clipped).

    `norm` is the gradient norm over all ranks, loss scale divided out, (). If it is
    not finite nothing changes, neither weights nor moments. AdamW does both inside its fused kernel
    (it divides gradients by `grad_scale` and does nothing where `found_inf` is 1), so the host
    never waits for the device, unless it makes the update itself (offload).
    Returns whether the update was skipped, 0. or 1., ().
    """
    skipped = ~norm.isfinite()
    scale = torch.where(skipped | (clip == 0), 1.0, (norm / (clip or 1)).clamp(min=1.0))
    if optimizer.loss_scale:
        scale = scale * optimizer.loss_scale.value
        optimizer.loss_scale.adjust(skipped)
    adamw, home = optimizer.adamw, next(iter(optimizer.state)).device
    # with offload the weights' home is the host, which waits here: torch's own copy would not
    adamw.grad_scale, adamw.found_inf = (  # type: ignore[attr-defined]
        scale.to(home), skipped.float().to(home))
    for group in adamw.param_groups:
        group["lr"] = rate
    adamw.step()
    if optimizer.muon:
        optimizer.muon.step(rate, scale, skipped)
    return skipped.float()
