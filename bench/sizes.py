"""Parameters, memory and hours of the larger configs: python bench/sizes.py [CONFIG ...]

Nothing is measured on a device: a step's forward and backward pass is traced on tensors without
storage, and what an allocator would hold at its peak is counted (plainllama/training/memory.py, as
`train.py --check` does). This is eager code with a CPU's kernels: for config/llama100m.py and 64
rows it counts 35.1 GiB, where an H100 took 36.1 eager and 31.9 compiled. Over ranks it is reckoned
on: weights, gradients and moments in parts, beside them the gathered ends and two gathered blocks.
Hours are those of 20 tokens for each parameter at --mfu of an H100.
"""

import sys
from dataclasses import dataclass
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

from model import ModelConfig, flops_per_token
from plainllama.training import memory
from plainllama.training.engine import architecture, outline
from plainllama.training.log import PEAKS
from plainllama.weights.adapters import parameter_counts

SIZES = ["llama100m", "llama_350m", "llama_1b", "llama_3b", "llama_8b", "lora_8b", "qlora_8b"]
GIB = 2**30


def traced(settings, flags: Flags) -> tuple[int, dict[str, int]]:
    """(parameters, bytes by kind, with the peak of one forward and backward pass)."""
    parameters = parameter_counts(outline(settings)[0])[0]
    dtype = torch.bfloat16 if flags.dtype == "bf16" else torch.float32
    parts = memory.reckon(settings, flags.rows, dtype)
    return parameters, parts | {"held": parts["weights"] + parts["moments"],
                                "peak": sum(parts.values())}


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
        adapted = settings.lora_r > 0
        entries = 128256 if adapted else flags.entries  # a Llama 3's
        settings.vocab_size = settings.vocab_size or entries
        config, cells = architecture(settings), []
        for twice in (False, True):
            settings.activation_checkpointing = twice
            parameters, seen = traced(settings, flags)
            one = max(seen["peak"], seen["held"] + seen["gradients"])
            cells.append((one / GIB, per_rank(config, parameters, seen, 8) / GIB))
        (alone, eighth), (alone_twice, eighth_twice) = cells
        tokens = 20 * parameters
        hours = tokens * flops_per_token(config, config.block_size) / speed / 3600
        print(f"| `{Path(path).name}` | {parameters / 1e6:,.0f} M | {config.block_size} "
              f"| {(seen['held'] + seen['gradients']) / GIB:.1f} | {alone:.1f}, {alone_twice:.1f} "
              + ("| | | | |" if adapted else
                 f"| {eighth:.1f}, {eighth_twice:.1f} | {tokens / 1e9:.1f} B "
                 f"| {hours:,.1f} h | {hours / 8:,.1f} h |"), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(COMMAND))
