"""Parameters, memory and hours of the larger configs: python bench/sizes.py [CONFIG ...]

Nothing is measured on a device: a step's forward and backward pass is traced on tensors without
storage, and torch's MemTracker counts what an allocator would hold at its peak. This is
eager code with a CPU's kernels: for config/llama100m.py and 64 rows it counts 35.1 GiB, where an
H100 took 36.1 eager and 31.9 compiled. Over ranks it is reckoned on: weights, gradients and moments
in parts, beside them the gathered ends and two gathered blocks. Hours are those of 20 tokens for
each parameter at --mfu of an H100.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import parse, parse_arguments
from plainllama.settings import key


@dataclass
class Flags:
    """What bench/sizes.py takes."""

    mfu: float = key(0.4, "share of an H100's bf16 peak that training reaches", low=0.01, high=1)
    dtype: str = key("bf16", "precision of activations and products", ("bf16", "fp32"))
    rows: int = key(1, "rows of a micro-batch", low=1)
    entries: int = key(32000, "of the tokenizer", low=1)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from model import LLaMA, ModelConfig, flops_per_token
from plainllama.training import optim
from plainllama.training.engine import architecture
from plainllama.training.log import PEAKS

SIZES = ["llama100m", "llama_350m", "llama_1b", "llama_3b", "llama_8b"]
GIB = 2**30


def traced(config: ModelConfig, settings, flags: Flags) -> tuple[int, dict[str, int]]:
    """(parameters, bytes by kind at the peak of one forward and backward pass)."""
    with FakeTensorMode():
        model = LLaMA(config)
        model.compute_dtype = torch.bfloat16 if flags.dtype == "bf16" else torch.float32
        optimizer = optim.make(model, settings)
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        tracker = MemTracker()
        tracker.track_external(model, *moments)
        with tracker:
            ids = torch.zeros(flags.rows, config.block_size, dtype=torch.long)
            model(ids, ids).backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        weights = 4 * model.parameter_counts()[0]
        held = weights + sum(tensor.numel() * tensor.element_size() for tensor in moments)
    return weights // 4, {"held": held, "gradients": weights, "peak": peak["Total"]}


def per_rank(config: ModelConfig, parameters: int, seen: dict[str, int], ranks: int) -> float:
    """Bytes on each of `ranks` under FSDP2: its part of what is held, what passes through a
    rank's forward and backward, and the matrices that are gathered for it, in 2 bytes, with the
    fp32 gradients of the two blocks whose sums are on their way."""
    passing = max(seen["peak"] - seen["held"] - seen["gradients"], 0)
    ends = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    block = (parameters - ends) // config.n_layer
    gathered = 2 * ends + 4 * ends + 2 * (2 + 4) * block
    return (seen["held"] + seen["gradients"]) / ranks + passing + gathered


def main(command) -> int:
    """Print the table's rows."""
    flags = command.flags
    speed = flags.mfu * PEAKS["NVIDIA H100 80GB HBM3"]
    print("| config | parameters | context | held | one GPU | 8 GPUs, fsdp | tokens | 1 H100 "
          "| 8 H100 |\n|---|---|---|---|---|---|---|---|---|")
    for path in command.files or [str(ROOT / "config" / f"{name}.py") for name in SIZES]:
        settings = parse([path], "").config
        config = replace(architecture(settings), vocab_size=settings.vocab_size or flags.entries)
        cells = []
        for twice in (False, True):
            again = replace(config, activation_checkpointing=twice)
            parameters, seen = traced(again, settings, flags)
            one = max(seen["peak"], seen["held"] + seen["gradients"])
            cells.append((one / GIB, per_rank(again, parameters, seen, 8) / GIB))
        (alone, eighth), (alone_twice, eighth_twice) = cells
        tokens = 20 * parameters
        hours = tokens * flops_per_token(config, config.block_size) / speed / 3600
        print(f"| `{Path(path).name}` | {parameters / 1e6:,.0f} M | {config.block_size} "
              f"| {(seen['held'] + seen['gradients']) / GIB:.1f} | {alone:.1f}, {alone_twice:.1f} "
              f"| {eighth:.1f}, {eighth_twice:.1f} | {tokens / 1e9:.1f} B "
              f"| {hours:,.1f} h | {hours / 8:,.1f} h |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(COMMAND))
