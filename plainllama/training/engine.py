"""The training engine: a model on its device, its optimizer, and one update of both.

train.py drives it through a run, check.py tries it before one, bench/ measures it. A step's rows
are cut into equal micro-batches on every rank; their number and size change speed and memory, never
the mathematics.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import LLaMA, ModelConfig, document_bounds
from plainllama import parallel
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.training import optim
from plainllama.weights import checkpoint
from plainllama.weights.huggingface import load_weights

Batch = tuple[Tensor, Tensor]  # ids and targets of a rank's rows, (rows, T) each, on the host
GPU_SHARE = 0.9  # share of a GPU's memory that a micro-batch which was not asked for may take


class Engine:
    """Model, optimizer and split of the batch of a run, as its config says.

    `source`: the checkpoint whose weights to start from, None for first weights. `state`: that
    checkpoint's state.json if its run goes on, else {}. `bos_id`: begins a document.
    """

    def __init__(self, config: Settings, world: World, bos_id: int, source: Path | None = None,
                 state: dict | None = None, say: Callable[[str], None] = print):
        self.config, self.world, self.say = config, world, say
        self.bos_id = bos_id if config.doc_mask else None
        state = state or {}
        self.dtype = parallel.pick_dtype(config.dtype, world.device)
        with torch.device("meta"):
            self.model = LLaMA(architecture(config))
        world.place(self.model, self.dtype)
        if source:
            load_weights(source, self.model, world)
        else:
            world.initialise(self.model, config.seed)
        self.optimizer = optim.make(self.model, config, world)
        if self.dtype == torch.float16:
            self.optimizer.loss_scale = optim.LossScale(world.device)
        if source and state:
            checkpoint.load_optimizer(source, self.model, self.optimizer, world)
        if scale := self.optimizer.loss_scale:
            value, good = state.get("loss_scale") or (scale.value, scale.good)
            scale.value.fill_(value)
            scale.good.fill_(good)

        # the batch: `batch_rows` per step, cut into equal micro-batches on every rank
        block = config.block_size
        self.batch_rows = config.global_batch_tokens // block
        share = -(-self.batch_rows // world.size)
        if config.deterministic:
            self.fix_parts()
        else:
            same_split = state.get("world_size") == world.size  # another split gives other bits
            self.micro = min(share, config.micro_batch or (
                state["micro_batch"] if same_split else self.pick_micro_batch(share)))
            self.accumulate = -(-share // self.micro)
        self.module = self.model if config.deterministic else world.wrap(self.model)
        self.compiled = False

    def fix_parts(self) -> None:
        """deterministic: cut the rows of a step into a power of two of micro-batches, the same for
        any number of ranks: part j of n holds the rows j, j + n, j + 2n, ..."""
        config, world = self.config, self.world
        rows = config.micro_batch or max(1, 4096 // config.block_size)
        parts = 1 << (-(-self.batch_rows // rows) - 1).bit_length()
        if not config.micro_batch:
            parts = max(8, parts)  # so that eight ranks have one each
        if world.sharded or parts % world.size:
            raise UserError("deterministic=true is for one process or ddp on 2, 4, 8, ... ranks, "
                            f"at most one for each of the {parts} micro-batches of a step; here "
                            f"are {world.size} ranks, {world.mode}")
        self.accumulate, self.micro = parts // world.size, -(-self.batch_rows // parts)
        if world.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_num_threads(1)  # torchrun's ranks have one: a sum's order depends on it

    def ready(self) -> None:
        """Compile if the config says so, and make DDP's first backward, once before any update."""
        wanted = self.config.compile
        if wanted == "true" or (wanted == "auto" and self.world.device.type == "cuda"):
            self.compile()
        if self.world.mode == "ddp" and not self.config.deterministic:
            # DDP regroups gradients after its first backward, and so adds them in another order:
            # that happens here, at every start, so that a resumed run has the same bits
            self.rehearse(last=True)

    def compile(self) -> None:
        """torch.compile, tried on one micro-batch; with compile=auto a failure means eager."""
        self.model.compile()  # in place: names in the state dict stay as they are
        problem = ""
        try:
            self.rehearse(last=self.world.sharded)  # which keeps gradients not exchanged
        except torch.OutOfMemoryError:
            pass  # not the compiler's fault: the first update will make do
        except Exception as error:  # no compiler, an old one, a broken cache: anything
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.optimizer.zero_grad()
        self.compiled = not self.world.any(bool(problem))
        if not self.compiled:
            problem = problem or "it failed on another rank"
            if self.config.compile == "true":
                raise UserError(f"compile=true, but torch.compile fails here ({problem}); "
                                "use compile=auto or false")
            self.say(f"torch.compile fails here ({problem}); going on without it, slower")
            self.model._compiled_call_impl = None  # what nn.Module.compile set
            torch._dynamo.reset()

    def rehearse(self, last: bool, rows: int = 0) -> None:
        """Forward and backward of a micro-batch (of `rows`) whose gradients are dropped."""
        ids = torch.zeros(rows or self.micro, self.config.block_size, dtype=torch.long)
        module = self.model if rows else self.module
        for x, y, documents in self.micro_batches((ids, ids), len(ids)):
            with self.world.accumulating(module, last):
                self.call(module, x, y, documents).backward()
        self.optimizer.zero_grad()

    def pick_micro_batch(self, share: int) -> int:
        """Rows per forward pass: on a GPU as many as fit, elsewhere enough to keep a CPU busy; at
        most a rank's share, and in equal micro-batches."""
        most = max(1, 4096 // self.config.block_size)
        if self.world.device.type == "cuda":
            most = self.largest_that_fits(share)
        return -(-share // -(-share // most))

    def largest_that_fits(self, share: int) -> int:
        """The most rows, up to `share`, whose forward and backward leave a tenth of the GPU's
        memory free: by measuring few rows and reckoning on in a straight line, four times at
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
                            "say --activation_checkpointing, --attention=sdpa, or take a smaller "
                            "model or block_size")
        return peaks[-1][0]

    def micro_batches(self, batch: Batch, rows: int) -> Iterator[tuple]:
        """(ids, targets, bounds of the documents or None) on the device; nothing waits for the
        copies if the host's memory is pinned."""
        device = self.world.device
        for x, y in zip(*(t.split(rows) for t in batch), strict=True):
            documents = None
            if self.bos_id is not None:
                documents = document_bounds(x, self.bos_id)
                if device.type == "cuda":
                    documents = documents.pin_memory().to(device, non_blocking=True)
            yield (x.to(device, non_blocking=True), y.to(device, non_blocking=True), documents)

    @staticmethod
    def call(module: torch.nn.Module, x: Tensor, y: Tensor, documents: Tensor | None) -> Tensor:
        """The summed loss of a micro-batch."""
        return module(x, y) if documents is None else module(x, y, None, documents)

    def update(self, batch: Batch, rate: float, wish: float = 0, targets: int = 0) -> Tensor:
        """One optimizer update; [summed loss in nats, squared gradient norm, the ranks' wishes
        added up], on the device, the same on all ranks. `targets`: those of the step, over all
        ranks (0: every place of every row has one)."""
        world = self.world
        nll = self.gradients(batch, targets)
        square = world.square_norm(self.model)
        if self.config.deterministic:  # all ranks have the sums: only rank 0's are counted
            first = float(world.rank == 0)
            nll, square = nll * first, square * world.replicas * first
        if scale := self.optimizer.loss_scale:
            square = square / scale.value**2
        stats = world.sum(torch.stack([nll, square, torch.full_like(nll, float(wish))]))
        norm = stats[1].sqrt() + 0 * stats[0]  # not finite if the loss is not
        optim.step(self.optimizer, rate, norm, self.config.grad_clip)
        self.optimizer.zero_grad()
        return stats

    def gradients(self, batch: Batch, targets: int = 0) -> Tensor:
        """Add up the gradients of this rank's rows; their summed loss, (). A GPU that runs out of
        memory gets smaller micro-batches from here on."""
        while True:
            try:
                if self.config.deterministic:
                    return self.added_in_tree(batch, targets)
                return self.accumulated(batch, targets)
            except torch.OutOfMemoryError as error:
                smaller = -(-self.micro // 2)
                # the other ranks wait in a collective; another split has other bits
                if self.micro == 1 or self.world.size > 1 or self.config.deterministic:
                    raise UserError(f"out of memory with micro_batch={self.micro} on rank "
                                    f"{self.world.rank}; start again with --micro_batch={smaller}, "
                                    "--activation_checkpointing or a smaller model") from error
            self.optimizer.zero_grad()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            self.say(f"out of memory with micro-batches of {self.micro} rows: taking {smaller} "
                     "from here on; the batch stays as it is")
            self.accumulate = -(-self.batch_rows // smaller)
            self.micro = smaller

    def accumulated(self, batch: Batch, targets: int) -> Tensor:
        """Forward and backward of each micro-batch."""
        world, targets = self.world, targets or self.batch_rows * self.config.block_size
        # gradients are averaged over ranks: times their number this is the gradient of the mean
        # over all targets of the step
        factor: float | Tensor = world.size / targets
        if self.optimizer.loss_scale:
            factor = self.optimizer.loss_scale.value * factor
        nll = torch.zeros((), device=world.device)
        left = -(-len(batch[0]) // self.micro)
        for x, y, documents in self.micro_batches(batch, self.micro):
            left -= 1
            with world.accumulating(self.module, last=left == 0):
                loss = self.call(self.module, x, y, documents)
                (loss * factor).backward()
            nll += loss.detach()
        return nll

    def added_in_tree(self, batch: Batch, targets: int) -> Tensor:
        """deterministic: like accumulated(), over all ranks, added up in one binary tree however
        many ranks there are. Part j meets j + n/2 first, then what came of j + n/4 and so on; W
        ranks have the parts j mod W, so only the last meetings are between ranks. Up to
        log2(parts) sums wait in memory."""
        factor: float | Tensor = 1 / (targets or self.batch_rows * self.config.block_size)
        if self.optimizer.loss_scale:
            factor = self.optimizer.loss_scale.value * factor
        parts, order = self.accumulate, [0]
        while len(order) < parts:  # 0, n/2, n/4, 3n/4, ...: neighbours are those that meet
            order = [2 * place for place in order] + [2 * place + 1 for place in order]
        rows = [place + parts * i for place in order for i in range(self.micro)]
        waiting: list[list[Tensor]] = []
        for done, (x, y, documents) in enumerate(self.micro_batches(
                (batch[0][rows], batch[1][rows]), self.micro)):
            loss = self.call(self.model, x, y, documents)
            (loss * factor).backward()
            part = [loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
            self.optimizer.zero_grad()
            while done % 2:  # as often as a binary counter carries
                for total, summand in zip(part, waiting.pop(), strict=True):
                    total += summand
                done //= 2
            waiting.append(part)
        nll, *grads = self.world.add_in_tree(waiting.pop())
        for parameter, grad in zip(self.model.parameters(), grads, strict=True):
            parameter.grad = grad
        return nll


def architecture(config: Settings) -> ModelConfig:
    """The architecture that a config asks for."""
    names = set(ModelConfig.__dataclass_fields__) & set(Settings.__dataclass_fields__)
    return ModelConfig(**{name: getattr(config, name) for name in names})
