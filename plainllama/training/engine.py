"""The training engine: a model on its device, its optimizer, and one update of both.

train.py drives it through a run, preflight.py tries it before one, bench/ measures it. A step's
rows are cut into equal micro-batches on every rank; their number and size change speed and memory,
never the mathematics.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model import LLaMA, ModelConfig, flops_per_token, trained
from plainllama import parallel
from plainllama.parallel import World
from plainllama.settings import Settings, UserError, ceil_div
from plainllama.tokens.rows import BEGINS, CONTEXT, Batch, to_batch
from plainllama.training import optim
from plainllama.training.objectives import OBJECTIVES, Objective
from plainllama.weights import adapters, checkpoint, expansion, peft
from plainllama.weights.adapters import Adapter

GPU_SHARE = 0.9  # share of a GPU's memory that a micro-batch which was not asked for may take
CPU_TOKENS = 4096  # tokens of a forward pass that keep a CPU busy,
GPU_TOKENS = 65536  # and a GPU: more take memory and gain nothing
# Of a run on a CPU that compile=auto compiles: on two cores they take 25 minutes, and compiled code
# saves three or more; on eight the compiler's minute is still won back
CPU_FLOPS = 3e14


class Outcome(NamedTuple):
    """The numbers of an update, equal on all ranks: what update() gives, once it is read."""

    loss: float  # summed, in nats
    square_norm: float  # of the gradient, not clipped
    stop: float  # how many ranks wish to stop,
    save: float  # and how many for a checkpoint
    logged: tuple[float, ...] = ()  # sums of what the objective logs


def read_outcome(stats: Tensor) -> Outcome:
    """Read what update() gave, which waits for the device."""
    loss, square, stop, save, *logged = stats.tolist()
    return Outcome(loss, square, stop, save, tuple(logged))


class Engine:
    """Model, optimizer and split of the batch of a run, as its config says.

    `bos_id`: begins a document. `source`: the checkpoint whose weights to start from, None for
    first weights. `state`: that checkpoint's state.json if its run goes on, else {}.
    """

    def __init__(self, config: Settings, world: World, bos_id: int, source: Path | None = None,
                 state: dict | None = None, say: Callable[[str], None] = print):
        self.config, self.world, self.say = config, world, say
        self.objective: Objective = OBJECTIVES[config.objective]
        self.bos_id = bos_id if config.doc_mask else None
        self.dtype = parallel.pick_dtype(config.dtype, world.device)
        self.build_model(source)
        self.build_optimizer(source, state or {})
        self.diverges = bool(expansion.merging(self.model))
        apart = [f"divergence/{config.divergence}"] if self.diverges else []
        self.logged = (*self.objective.logged, *apart)  # beside the loss
        self.split_batch(state or {})
        self.module = self.model if config.deterministic else world.wrap(self.model)
        self.compiled = False

    @property
    def summary(self) -> str:
        """Name what the model computes in, and how, for a line on the screen."""
        return f"{str(self.dtype)[6:]}, {'compiled' if self.compiled else 'eager'}"

    def build_model(self, source: Path | None) -> None:
        """Make the model on its device, with the weights of `source` or first ones."""
        self.model, self.adapter = outline(self.config, source)
        self.world.place(self.model, self.dtype)
        peft.load_start(self.model, self.config, source, self.adapter, self.world)

    def build_optimizer(self, source: Path | None, state: dict) -> None:
        """Make the optimizer; a run that goes on has its moments and loss scale from `source`."""
        self.optimizer = optim.make(self.model, self.config, self.world)
        if self.dtype == torch.float16:
            self.optimizer.loss_scale = optim.LossScale(self.world.device)
        if source and state:
            checkpoint.load_moments(source, self.model, self.optimizer.state, self.world)
            scale, saved = self.optimizer.loss_scale, state.get("loss_scale")
            if scale and saved:
                scale.value.fill_(saved[0])
                scale.good.fill_(saved[1])

    def split_batch(self, state: dict) -> None:
        """Cut the rows of a step into equal micro-batches on every rank."""
        self.batch_rows = self.config.global_batch_tokens // self.config.block_size
        if self.config.deterministic:
            return self.split_for_any_ranks()
        share = ceil_div(self.batch_rows, self.world.size)
        micro = self.config.micro_batch
        if not micro and state.get("world_size") == self.world.size:
            micro = state["micro_batch"]  # another split gives other bits
        self.micro = min(share, micro or self.pick_micro_batch(share))
        self.accumulate = ceil_div(share, self.micro)

    def split_for_any_ranks(self) -> None:
        """deterministic: cut the rows of a step into a power of two of micro-batches, the same for
        any number of ranks: part j of n holds the rows j, j + n, j + 2n, ..."""
        config, world = self.config, self.world
        rows = config.micro_batch or max(1, CPU_TOKENS // config.block_size)
        parts = 1 << (ceil_div(self.batch_rows, rows) - 1).bit_length()
        if not config.micro_batch:
            parts = max(8, parts)  # so that eight ranks have one each
        if world.sharded or parts % world.size:
            raise UserError("deterministic=true is for one process or ddp on 2, 4, 8, ... ranks, at"
                            f" most {parts} (micro-batches), not {world.size} with {world.mode}")
        self.accumulate, self.micro = parts // world.size, ceil_div(self.batch_rows, parts)
        if world.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_num_threads(1)  # torchrun's ranks have one: a sum's order depends on it

    def ready(self) -> None:
        """Compile if the config says so, and make DDP's first backward, once before any update."""
        if self.config.compile == "true" or (self.config.compile == "auto" and self.pays()):
            self.compile()
        if self.world.mode == "ddp" and not self.config.deterministic:
            # DDP regroups gradients after its first backward, and so adds them in another order:
            # that happens here, at every start, so that a resumed run has the same bits
            self.rehearse(last=True)

    def pays(self) -> bool:
        """Whether a run wins back the compiler's minute: a function of the config alone, so that a
        resumed run decides alike."""
        if self.world.device.type != "cpu":
            return self.world.device.type == "cuda"
        c, model = self.config, self.model.config
        flops = flops_per_token(model, c.block_size) * c.global_batch_tokens * c.max_steps
        hurried = 0 < c.max_minutes < 20
        if flops >= CPU_FLOPS and not hurried:
            self.say(f"compile=auto: the run's {flops:.1e} floating-point operations win back the "
                     "minute of the compiler")
        return flops >= CPU_FLOPS and not hurried

    def compile(self) -> None:
        """Compile the model, tried on one micro-batch; with compile=auto a failure means eager."""
        # Every micro-batch has one shape, and a smaller one after an out-of-memory another. The
        # number of documents differs from batch to batch.
        self.world.compile(self.model, dynamic=None if self.config.doc_mask else False)
        problem = ""
        try:
            self.rehearse(last=self.world.sharded)  # which keeps gradients not exchanged
        except torch.OutOfMemoryError:
            pass  # not the compiler's fault: the first update will make do
        except Exception as error:  # no compiler, an old one, a broken cache: anything
            problem = parallel.why_not(error)
        self.optimizer.zero_grad()
        self.compiled = not self.world.any(bool(problem))
        if not self.compiled:
            seen = f"torch.compile fails here ({problem or 'it failed on another rank'})"
            if self.config.compile == "true":
                raise UserError(f"compile=true, but {seen}; use compile=auto or false")
            self.say(f"{seen}; going on without it, slower")
            self.world.decompile(self.model)
            torch._dynamo.reset()

    def rehearse(self, last: bool, rows: int = 0) -> None:
        """Make forward and backward of a micro-batch (of `rows`); its gradients are dropped."""
        zeros = np.zeros((rows or self.micro, self.config.block_size + 1), np.int64)
        module = self.model if rows else self.module
        with self.world.accumulating(module, last):
            self.loss(module, self.stand_in(zeros))[0].backward()
        self.optimizer.zero_grad()

    def stand_in(self, ids: np.ndarray) -> Batch:
        """Make a batch of any ids (m, T + 1): where pairs are compared, each row is one."""
        if self.config.objective != "next":
            ids[:, [0, ids.shape[1] // 2]] |= CONTEXT | BEGINS
        return to_batch(ids, 0, self.bos_id)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Compute the objective of a micro-batch, (1 + L,): its summed loss comes first, then what
        is `logged`."""
        losses = self.objective.loss(module, batch, self.world.device, self.config)
        if self.diverges:
            losses = expansion.with_divergence(losses, self.model, batch, self.config)
        return losses

    def pick_micro_batch(self, share: int) -> int:
        """Choose the rows of a forward pass: on a GPU as many as fit and pay, elsewhere enough to
        keep a CPU busy; at most a rank's share, and in equal micro-batches."""
        block = self.config.block_size
        most = max(1, CPU_TOKENS // block)
        if self.world.device.type == "cuda":
            most = self.largest_that_fits(min(share, max(1, GPU_TOKENS // block)))
        return ceil_div(share, ceil_div(share, most))

    def largest_that_fits(self, share: int) -> int:
        """Find the most rows, up to `share`, whose forward and backward leave a tenth of the GPU's
        free memory free: by measuring few rows and reckoning on in a straight line, four times at
        most. Collective: all ranks try the same sizes."""
        device, peaks, rows = self.world.device, [(0, 0)], 1
        room = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
        for _ in range(4):
            torch.cuda.reset_peak_memory_stats(device)
            try:
                self.rehearse(last=True, rows=rows)
                peak = torch.cuda.max_memory_allocated(device)
            except torch.OutOfMemoryError:
                peak = int(room) + 1
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            if self.world.least(int(room - peak)) < 0:
                break
            peaks.append((rows, peak))
            each = max(1, (peaks[-1][1] - peaks[-2][1]) // (peaks[-1][0] - peaks[-2][0]))
            more = 1 if rows == 1 else self.world.least(int(room - peak) // each)
            if rows == share or more < max(1, rows // 16):
                break
            rows = min(share, rows + more)
        if peaks[-1][0] == 0:
            raise UserError(f"not even one row of {self.config.block_size} tokens fits on the GPU; "
                            "say --activation_checkpointing or take a smaller model or block_size")
        return peaks[-1][0]

    def update(self, batch: Batch, rate: float, targets: int, stop: bool = False,
               save: bool = False) -> Tensor:
        """Make one optimizer update; give the numbers of an Outcome, (4 + L,) on the device.

        `targets`: what the summed loss is divided by, over all ranks. `stop`, `save`: what this
        rank wishes to come next, which all hear of. Nothing waits for the device.
        """
        world = self.world
        losses = self.gradients(batch, targets)
        square = world.square_norm(self.model)
        if self.config.deterministic:  # all ranks have the sums: only rank 0's are counted
            first = float(world.rank == 0)
            losses, square = losses * first, square * world.replicas * first
        if scale := self.optimizer.loss_scale:
            square = square / scale.value**2
        wishes = [torch.full_like(square, float(wish)) for wish in (stop, save)]
        stats = world.sum(torch.cat([losses[:1], torch.stack([square, *wishes]), losses[1:]]))
        norm = torch.where(stats[0].isfinite(), stats[1].sqrt(), float("nan"))
        optim.step(self.optimizer, rate, norm, self.config.grad_clip)
        self.optimizer.zero_grad()
        return stats

    def seed_dropout(self, step: int) -> None:
        """Make what is dropped in the update that follows `step` a function of seed, step and rank,
        so that a resumed run drops the same."""
        if self.config.lora_dropout:
            torch.manual_seed(hash((self.config.seed, step, self.world.rank)))

    def gradients(self, batch: Batch, targets: int) -> Tensor:
        """Add up the gradients of this rank's rows; their summed losses, (1 + L,). A GPU that runs
        out of memory gets smaller micro-batches from here on."""
        add_up = self.added_in_tree if self.config.deterministic else self.accumulated
        while True:
            try:
                return add_up(batch, targets)
            except torch.OutOfMemoryError as error:
                smaller = ceil_div(self.micro, 2)
                # the other ranks wait in a collective; another split has other bits
                if self.micro == 1 or self.world.size > 1 or self.config.deterministic:
                    which = f"rank {self.world.rank}: " if self.world.size > 1 else ""
                    raise UserError(f"{which}out of memory with micro_batch={self.micro}; start "
                                    f"again with --micro_batch={smaller}, "
                                    "--activation_checkpointing or a smaller model") from error
            self.optimizer.zero_grad()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            self.say(f"out of memory with micro-batches of {self.micro} rows: taking {smaller}")
            self.micro, self.accumulate = smaller, ceil_div(self.batch_rows, smaller)

    def backward(self, module: nn.Module, batch: Batch, factor: float | Tensor) -> Tensor:
        """Make forward and backward of a micro-batch, its gradients times `factor`; give its summed
        losses (1 + L,)."""
        losses = self.loss(module, batch)
        if self.optimizer.loss_scale:
            factor = self.optimizer.loss_scale.value * factor
        (losses[0] * factor).backward()
        return losses.detach()

    def no_loss(self) -> Tensor:
        """Make the sums (1 + L,) of no rows."""
        return torch.zeros(1 + len(self.logged), device=self.world.device)

    def accumulated(self, batch: Batch, targets: int) -> Tensor:
        """Make forward and backward of each micro-batch; give the summed losses."""
        losses = self.no_loss()
        parts = list(batch.split(self.micro))
        for part in parts:
            with self.world.accumulating(self.module, last=part is parts[-1]):
                # gradients are averaged over ranks: times their number this is the gradient of
                # the mean over all targets of the step
                losses += self.backward(self.module, part, self.world.size / targets)
        return losses

    def added_in_tree(self, batch: Batch, targets: int) -> Tensor:
        """deterministic: like accumulated(), over all ranks, added up in one binary tree however
        many ranks there are. W ranks have the parts j mod W, so only the last meetings are between
        ranks. Up to log2(parts) sums wait in memory."""
        losses, *grads = self.world.add_in_tree(self.subtree(batch, targets, 0, 1))
        for (_, parameter), grad in zip(trained(self.model), grads, strict=True):
            parameter.grad = grad
        return losses

    def subtree(self, batch: Batch, targets: int, part: int, stride: int) -> list[Tensor]:
        """Loss and gradients of the parts `part`, part + stride, part + 2 stride, ...: part j meets
        j + n/2 first, in backward itself, then what came of j + n/4, and so on."""
        if 2 * stride < self.accumulate:
            total = self.subtree(batch, targets, part, 2 * stride)
            torch._foreach_add_(total, self.subtree(batch, targets, part + stride, 2 * stride))
            return total
        losses = self.no_loss()
        for number in range(part, self.accumulate, stride):  # two, or the only one
            rows = [number + self.accumulate * i for i in range(self.micro)]
            losses += self.backward(self.model, batch.take(rows), 1 / targets)
        total = [losses, *(p.grad for _, p in trained(self.model) if p.grad is not None)]
        self.optimizer.zero_grad()
        return total


def outline(config: Settings, source: Path | None = None) -> tuple[LLaMA, Adapter | None]:
    """Make a run's model on the meta device, frozen where the config says so, with copies of blocks
    or an adapter, if it has these; that adapter belongs to `source`, or is that of `source`."""
    shape = architecture(config)
    if shape.expand_blocks and source and peft.is_adapter(source):
        raise UserError(f"{source} is an adapter, and expand wants a whole model; make one of it: "
                        f"python export.py --ckpt {source} --merge --to DIR")
    if shape.expand_blocks:
        shape = replace(shape, first_row=expansion.new_rows(config, source))
    with torch.device("meta"):
        model = expansion.outline(shape)
    adapter = peft.adapter_for(model, config, source)
    if adapter:
        adapters.attach(model, adapter)
    elif shape.expand_blocks:
        expansion.freeze(model, config)
    else:
        adapters.freeze(model, config)
    return model, adapter


def refuse_too_large(config: Settings, world: World) -> None:
    """UserError, before anything is made, where the ranks together lack the memory for weights,
    gradients and two moments; where most are frozen, for weights alone."""
    c = architecture(config)
    block = c.d_model * (2 * c.d_model + 2 * c.kv_heads * c.head_dim + 3 * c.d_ff)
    frozen = config.lora_r or config.train_only or config.expand_blocks
    each = {"fp32": 4, "bf16": 2, "int8": 1, "nf4": 0.5}[config.frozen_dtype] if frozen else 16
    need = each * (c.blocks * block + c.vocab_size * c.d_model)
    if need > world.room * world.size:
        what = "weights" if frozen else "weights, gradients and moments"
        where = "in host memory" if world.offload else "there"
        raise UserError(f"{what} need {need / 1e9:.4g} GB, {world.size} x {world.room / 1e9:.4g} "
                        f"are {where}: take a smaller model or more ranks")


def architecture(config: Settings) -> ModelConfig:
    """Give the architecture that a config asks for."""
    names = set(ModelConfig.__dataclass_fields__) & set(Settings.__dataclass_fields__)
    return ModelConfig(**{name: getattr(config, name) for name in names})
