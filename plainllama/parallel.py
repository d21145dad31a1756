"""One process, DDP, FSDP2 or HSDP behind one small interface; reductions and agreed decisions.

torchrun starts W processes (ranks). ddp keeps the whole model on each and adds up gradients; fsdp
(FSDP2) shards parameters, gradients and optimizer state by rows over the ranks, block by block;
hsdp shards over the ranks of a machine and keeps a copy on each machine. With `offload` shards lie
in host memory, where they are updated, and pass through the GPU block by block.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import LLaMA, trained
from plainllama import watch
from plainllama.settings import UserError, ceil_div

DDP_SHARE = 0.6  # share of a device's memory that weights and optimizer may take with parallel=auto


class World:
    """This process among the ranks of the run. Without arguments: one process on the CPU.

    `group`: the ranks, None for all that torchrun started. `hosts`: a second group of the same
    ranks, in host memory, for a thread beside training. `offload`: shards lie in host memory.
    """

    why = ""  # the reason for what parallel=auto took

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu", mode: str = "one",
                 group=None, hosts=None, offload: bool = False):
        self.rank, self.size, self.group, self.hosts = rank, size, group, hosts
        self.device, self.timeout = torch.device(device), watch.PATIENT
        self.offload = offload
        self.home = torch.device("cpu" if offload else device)  # of weights, gradients, moments
        self.store: dist.Store | None = None  # of this attempt, if there are other ranks
        self.share(mode)

    def share(self, mode: str) -> None:
        """Fix how ranks share the work: `shards` neighbouring ranks hold a whole model between
        them, and there are `replicas` of it."""
        self.mode, self.sharded = mode, mode in ("fsdp", "hsdp")
        local = local_size(self.size)
        if mode == "hsdp" and (local in (1, self.size) or self.size % local):
            raise UserError(f"parallel=hsdp cannot cut {self.size} ranks, {local} of them on this "
                            "machine, into a copy on each machine; say parallel=fsdp")
        self.shards = {"fsdp": self.size, "hsdp": local}.get(mode, 1)
        self.replicas, self.shard = self.size // self.shards, self.rank % self.shards

    def choose(self, model: LLaMA) -> None:
        """parallel=auto: ddp, which sends least, while the model fits on each device beside its
        activations; else shards, within the machine if that is enough."""
        need = held_bytes(model)
        room, local = DDP_SHARE * self.room, local_size(self.size)
        several = 1 < local < self.size and self.size % local == 0  # machines of several ranks
        in_few_bits = any(not part.is_floating_point() for part in model.buffers())
        if need <= room or in_few_bits:  # which is not sharded
            self.share("ddp")
        else:
            self.share("hsdp" if several and need <= room * local else "fsdp")
        self.why = (f"parallel=auto takes {self.mode}: weights, gradients and moments need "
                    f"{need / 1e9:.2f} GB, and {room / 1e9:.2f} GB are for them on each rank")

    @functools.cached_property
    def mesh(self):
        """The ranks as FSDP2 wants to know them: (shards,) or, with hsdp, (replicas, shards)."""
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        if self.mode == "hsdp":
            return init_device_mesh(self.device.type, (self.replicas, self.shards),
                                    mesh_dim_names=("replicas", "shards"))
        return DeviceMesh.from_group(
            self.group or dist.group.WORLD, self.device.type)  # type: ignore[arg-type]

    @property
    def room(self) -> int:
        """Bytes of memory that this rank has in all for weights and optimizer, used or not."""
        if self.home.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_size(self.size)

    @property
    def holds_a_piece(self) -> bool:
        """Whether this rank has optimizer state that no rank before it has."""
        return self.rank < self.shards

    def place(self, model: LLaMA, dtype: torch.dtype) -> None:
        """Shard a model built on the meta device, if this mode shards, and allocate it where
        weights live; what is no weight is on this rank's device."""
        if self.mode == "auto":
            self.choose(model)
        if self.sharded:
            from torch.distributed import fsdp

            # inputs are not cast: the rotary tables stay fp32
            policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            # pinned memory is copied while the GPU works; without a GPU there is none
            away = fsdp.CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            where = away if self.offload else fsdp.OffloadPolicy()
            for module in (*model.model.layers, model):
                fsdp.fully_shard(module, mesh=self.mesh, mp_policy=policy, offload_policy=where)
        model.to_empty(device=self.home)
        model.reset_derived(self.device)
        model.compute_dtype = dtype

    def wrap(self, model: LLaMA) -> nn.Module:
        """The module to call in training: gradients are averaged over ranks in its backward."""
        if self.mode == "ddp":
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*")  # renamed in torch 2.13
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False,
                process_group=self.group)
        return model

    def compile(self, model: LLaMA, dynamic: bool | None) -> None:
        """Compile what training calls, in place: names in the state dict stay as they are. The
        whole model, which DDP cuts at its buckets; where FSDP2's hooks stand around the blocks,
        each block and the loss, since compiled code has to leave at a hook."""
        if self.sharded:
            for block in model.model.layers:
                block.compile(dynamic=dynamic)
            model.loss = torch.compile(model.loss, dynamic=dynamic)  # type: ignore[method-assign]
        else:
            model.compile(dynamic=dynamic)

    def decompile(self, model: LLaMA) -> None:
        """Undo compile()."""
        for module in (model, *model.model.layers):
            module._compiled_call_impl = None
        vars(model).pop("loss", None)

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool):
        """Around forward and backward of a micro-batch: gradients are exchanged in the last. With
        offload in each, or the GPU would hold the whole model's until then."""
        if self.sharded:
            module.set_requires_gradient_sync(last or self.offload)  # type: ignore[operator]
        ddp = hasattr(module, "no_sync")
        with module.no_sync() if ddp and not last else contextlib.nullcontext():  # type: ignore
            yield

    def reshard(self, model: LLaMA) -> None:
        """After a forward pass without a backward: FSDP2 leaves the root's parameters gathered."""
        if self.sharded:
            model.reshard()  # type: ignore[operator]

    def piece(self, tensor: Tensor) -> tuple[Tensor, int]:
        """(this rank's rows of a tensor, the number of its first row)."""
        if not hasattr(tensor, "to_local"):
            return tensor, 0
        rows = ceil_div(tensor.shape[0], self.shards)  # fully_shard cuts like torch.chunk
        return tensor.to_local(), min(self.shard * rows, tensor.shape[0])

    def whole(self, tensor: Tensor) -> Tensor:
        """All rows of a tensor; collective if it is sharded, and then on this rank's device, whose
        network is the fast one."""
        if not hasattr(tensor, "full_tensor"):
            return tensor
        return tensor.to(self.device).full_tensor()  # type: ignore[attr-defined]

    def square_norm(self, model: nn.Module) -> Tensor:
        """This rank's share of the squared gradient norm, fp32 (): the shares add up to the norm
        of the whole model, squared."""
        grads = [self.piece(p.grad)[0] for _, p in trained(model) if p.grad is not None]
        norms = torch._foreach_norm([g for g in grads if g.numel()])
        return (torch.stack(norms).square().sum() / self.replicas).to(self.device)

    def add_in_tree(self, part: list[Tensor]) -> list[Tensor]:
        """Tensors added up over the ranks, a power of two of them, in an order that more ranks
        only lengthen at its end: with the rank half of all away first, with the neighbour last.
        a + b = b + a to the bit, so all get the same."""
        if self.size == 1:
            return part
        flat, distance = torch.cat([tensor.reshape(-1) for tensor in part]), self.size // 2
        while distance:
            theirs = torch.empty_like(flat)
            for request in dist.batch_isend_irecv([
                    dist.P2POp(call, tensor, group=self.group, group_peer=self.rank ^ distance)
                    for call, tensor in ((dist.isend, flat), (dist.irecv, theirs))]):
                request.wait()
            flat += theirs
            distance //= 2
        pieces = flat.split([tensor.numel() for tensor in part])
        return [piece.view_as(tensor) for piece, tensor in zip(pieces, part, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def from_rank(self, owner: int, tensor: Tensor | None, shape: tuple) -> Tensor:
        """The owner's fp32 tensor of this shape, on every rank; others give nothing."""
        if tensor is None or owner != self.rank:
            tensor = torch.empty(shape, device=self.device)
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=owner)
        return tensor

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        if self.size == 1:
            return value
        box = torch.tensor([value], device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self.group)
        return int(box.item())

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all get the same answer."""
        return self.least(-int(flag)) < 0

    def agree(self, value):
        """Rank 0's value (anything that pickles), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]

    def decide(self, call: Callable):
        """What `call` gives on rank 0, on every rank. A UserError there ends all of them, with one
        message."""
        try:
            value = call() if self.rank == 0 else None
        except UserError as error:
            value = error
        value = self.agree(value)
        if isinstance(value, UserError):
            try:
                raise value if self.rank == 0 else SystemExit(2)
            finally:
                del value  # its traceback leads here, and such a circle would keep the run's lock
        return value

    def gather(self, value) -> list:
        """Every rank's value (anything that pickles), on every rank, by the hosts' own group: a
        thread may ask while training goes on."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def set_timeout(self, timeout: timedelta) -> None:
        """How long collectives that begin from now on may take."""
        self.timeout = timeout
        for group in list(dist.distributed_c10d._world.pg_map) if self.size > 1 else []:
            if group is not self.hosts:  # a save may take as long as the disk wants
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Around work in which ranks may wait long for each other, after the first step."""
        before = self.timeout
        self.set_timeout(watch.PATIENT)
        try:
            yield
        finally:
            self.set_timeout(before)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def held_bytes(model: nn.Module) -> int:
    """Bytes of weights, and of gradients and two fp32 moments of those that learn."""
    return (sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
            + 12 * sum(p.numel() for _, p in trained(model)))


def start(device: str, mode: str, offload: bool = False) -> World:
    """Join the ranks that torchrun started, or be alone. `device`, `mode`, `offload` as in the
    config."""
    device = pick_device(device)
    if offload and device != "cuda":
        raise UserError(f"offload has no effect on device={device}: its weights lie in host memory")
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0",
                "LOCAL_WORLD_SIZE": os.environ.get("WORLD_SIZE", "1")}
    given = {name: os.environ.get(name, default) for name, default in defaults.items()}
    rank, size, local, port, here = (
        int(text) if text.isdecimal() else -1 for text in given.values())
    met = size == 1 or ("MASTER_ADDR" in os.environ and port > 0)
    if not (met and 0 <= rank < size and 0 <= local < here <= size):
        raise UserError(f"the environment names no rank of a run: {given} (and MASTER_ADDR); start "
                        "with torchrun, or unset these")
    if size == 1 and mode == "auto":
        return World(0, 1, device, "one")
    if "RANK" not in os.environ:
        raise UserError(f"parallel={mode} needs torchrun --nproc_per_node=N train.py ...")
    backend = "gloo"
    if device == "cuda":
        if local >= (there := torch.cuda.device_count()):
            raise UserError(f"process {local} of this machine has no GPU, torch sees {there}; "
                            "lower --nproc_per_node")
        backend, device = "cpu:gloo,cuda:nccl", f"cuda:{local}"
        torch.cuda.set_device(device)
    store = watch.join(backend, device)
    hosts = dist.new_group(backend="gloo", timeout=timedelta(hours=2))  # a slow disk is no error
    world = World(rank, size, device, mode, hosts=hosts, offload=offload)
    world.store = store
    return world


def local_size(size: int) -> int:
    """How many of `size` ranks run on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size))


def pick_device(device: str) -> str:
    """'auto' is cuda, then mps, then cpu; a device that is not there is a UserError."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
               "cpu": True}
    if device == "auto":
        return next(name for name, there in present.items() if there)
    if not present[device]:
        raise UserError(f"device={device} is not available to this torch ({torch.__version__})")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 where the GPU has it (emulation does not count), fp16 on an older one, fp32
    elsewhere. UserError if an older GPU is asked for bf16."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "fp16" if old else "bf16"
    if name == "bf16" and old:
        raise UserError(f"dtype=bf16: {torch.cuda.get_device_name(device)} only emulates it; use "
                        "dtype=fp16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def why_not(error: Exception) -> str:
    """Say in one line, of at most 200 characters, why torch.compile failed."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def attention_refusal(backend: str, device: str, dtype: torch.dtype = torch.bfloat16,
                      doc_mask: bool = False) -> str:
    """Why `backend` cannot run on `device` ('cpu', 'cuda', 'mps') in `dtype` here, or ''."""
    if backend in ("varlen", "xformers") and device != "cuda":
        return f"attention={backend} needs a CUDA device, found {device}; use attention=sdpa"
    if backend == "varlen" and dtype == torch.float32:
        return "attention=varlen computes in bf16 or fp16 only; use attention=sdpa or another dtype"
    if doc_mask and backend == "xformers":
        return "attention=xformers sees no documents; with doc_mask use attention=sdpa"
    if doc_mask and device == "cuda" and dtype == torch.float32 and backend == "sdpa":
        return "doc_mask on CUDA computes in bf16 or fp16 only; use another dtype"
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            return f"attention=xformers: {error}; pip install xformers, or use attention=sdpa"
    return ""
