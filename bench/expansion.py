"""What copies of blocks cost: python bench/expansion.py [--rounds=9]

30 M parameters, fp32, half of the blocks with a copy beside them (concat) or behind them (stack):
the forward pass beside the base's times 1 + the share of copied blocks, and a whole update beside
what the count of operations makes of the base's. The arms take turns, the first turn warms up;
medians and ratios.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.settings import Settings, key


@dataclass
class Flags:
    """What bench/expansion.py takes."""

    rounds: int = key(9, "turns of each arm", low=1)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import time
from statistics import median

import numpy as np
import torch

from model import ModelConfig
from plainllama.parallel import World
from plainllama.tokens.rows import to_batch
from plainllama.training import log
from plainllama.training.engine import Engine

SHAPE: dict = {"n_layer": 8, "n_head": 8, "d_model": 512, "d_ff": 1376, "vocab_size": 8192,
               "block_size": 256, "global_batch_tokens": 2048, "micro_batch": 8, "compile": "false"}
COPIES = 4
ARMS: dict[str, dict] = {
    "base": {}, "concat": {"expand": "concat"}, "stack": {"expand": "stack"},
    "concat, divergence": {"expand": "concat", "divergence_weight": 1.0},
    "concat, dlerp": {"expand": "concat", "expand_merge": "dlerp"}}


def count(config: ModelConfig, context: int) -> float:
    """Operations of a token's update, in multiply-adds: those of the pass forward, as many again
    for the slopes of what came in, from the first copy on (of attention twice as many), and for
    each matrix that learns."""
    c = config
    matrices = c.d_model * (2 * c.d_model + 2 * c.kv_heads * c.head_dim + 3 * c.d_ff)
    attention, head = 2 * context * c.d_model, c.d_model * c.vocab_size
    block = matrices + attention
    forward = c.blocks * block + head
    if not c.expand_blocks:
        return 3 * forward
    slopes = (c.blocks - c.n_layer // c.expand_blocks) * (block + attention) + head
    return forward + slopes + c.expand_blocks * matrices


def main(command: CommandLine) -> int:
    """Let the arms take turns; print medians and ratios."""
    engines = {}
    for name, keys in ARMS.items():
        copies = {"expand_blocks": COPIES} if keys else {}
        engines[name] = Engine(Settings(**(SHAPE | keys | copies)), World(), 0)
    ids = np.random.default_rng(0).integers(SHAPE["vocab_size"], size=(8, SHAPE["block_size"] + 1))
    batch, targets = to_batch(ids, 0, None), ids[:, 1:].size
    times: dict[tuple[str, str], list[float]] = {}

    def forward(engine: Engine) -> None:
        engine.loss(engine.module, batch)

    def update(engine: Engine) -> None:
        engine.update(batch, 1e-4, targets)[0].item()

    for _ in range(command.flags.rounds + 1):
        for name, engine in engines.items():
            for what, call in (("forward", forward), ("update", update)):
                began = time.perf_counter()
                call(engine)
                times.setdefault((name, what), []).append(time.perf_counter() - began)
    seen = {arm: median(found[1:]) for arm, found in times.items()}
    share = COPIES / SHAPE["n_layer"]
    print(f"{log.cpu_name()}, {torch.get_num_threads()} threads, fp32, 30 M parameters, copies of "
          f"{COPIES} of {SHAPE['n_layer']} blocks, medians of {command.flags.rounds} turns")
    print("| arm | forward, ms | of the base's x (1 + share) | update, ms | of the base's by the "
          "count of operations |\n|---|---|---|---|---|")
    whole = count(engines["base"].model.config, SHAPE["block_size"])
    for name, engine in engines.items():
        pass_, step = seen[name, "forward"], seen[name, "update"]
        expected = seen["base", "forward"] * (1 + (share if name != "base" else 0))
        operations = count(engine.model.config, SHAPE["block_size"])
        counted = seen["base", "update"] * operations / whole
        print(f"| {name} | {1e3 * pass_:.0f} | {pass_ / expected:.2f} | {1e3 * step:.0f} | "
              f"{step / counted:.2f} |")
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
