"""What a run's memory is made of, reckoned without a device: a step is traced on tensors that have
no storage, and what an allocator would hold at its peak is counted."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import trained
from plainllama.parallel import World, pick_dtype
from plainllama.settings import Settings
from plainllama.training import optim
from plainllama.training.engine import outline
from plainllama.weights import adapters


def foresee(config: Settings, world: World, source: Path | None = None) -> None:
    """Say what learns, and what memory that takes on a device that has the whole model. `source`:
    the model that the run begins with, if it is there."""
    if world.rank > 0 or config.n_layer > 1000:  # which would take long, and has no room anyway
        return
    model, adapter = outline(config, source)
    learns = adapters.summary(model, adapter, config.frozen_dtype)
    targets = [name.split(".") for name in adapter.targets] if adapter else []
    for last in dict.fromkeys(parts[-1] for parts in targets):
        blocks = [parts[2] for parts in targets if parts[-1] == last]
        all_of_them = len(blocks) == model.config.n_layer
        print(f"  {last} of {'all blocks' if all_of_them else 'blocks ' + ', '.join(blocks)}")
    print(learns or "learns: all weights")
    rows, dtype = config.micro_batch or 1, pick_dtype(config.dtype, world.device)
    parts = reckon(config, rows, dtype, source)
    total = sum(parts.values())
    away = ", of which all but activations in host memory" if world.offload else ""
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    said = ", ".join(f"{what} {size / unit:.2f}" for what, size in parts.items())
    print(f"memory reckoned for {rows} rows of {config.block_size} in {str(dtype)[6:]}: "
        f"{total / unit:.2f} {name} ({said}), the whole model on one device{away}")


class Allocator(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, from then until they are dropped. `there`:
    tensors that are there already."""

    def __init__(self, there: list[Tensor]):
        super().__init__()
        self.held = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in there)

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        """Do the operation and count what is new in what it gives."""
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.held += (size := storage.nbytes())
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self.drop, size)
        return made

    def drop(self, size: int) -> None:
        """A tensor's memory is free again."""
        self.held -= size


def reckon(config: Settings, rows: int, dtype: torch.dtype,
           source: Path | None = None) -> dict[str, int]:
    """Bytes on one device that has the whole model: of weights, gradients, moments and, at the
    peak of a forward and backward pass of `rows` rows, all else (activations). Eager code with a
    CPU's kernels; a GPU's attention keeps less."""
    model, _ = outline(replace(config, attention="sdpa"), source)  # other back ends are for a GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.reset_derived("cpu")
        model.compute_dtype = dtype
        optimizer = optim.make(model, config)
        ids = torch.zeros(rows, config.block_size, dtype=torch.long)
        weights = [*model.parameters(), *model.buffers()]
        with Allocator(weights) as seen:
            model(ids, ids).backward()
        gradients = sum(4 * p.numel() for _, p in trained(model))
        moments = [t for state in optimizer.state.values() for t in state.values()]
        return {"weights": size_of(weights), "gradients": gradients, "moments": size_of(moments),
                "activations": seen.peak - gradients}


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of tensors; those that share memory count once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
