"""A training step on the CPU beside its ceiling and its peers: python bench/step.py [--full]

fp32, context 256, 2,048 tokens a step. The ceiling is what this machine does with the same shapes
when nothing is in between: each matrix product of forward and backward, attention, cross-entropy
and AdamW, timed alone in the same run. Peers are transformers' LlamaForCausalLM and litgpt's GPT
with the same sizes, in the loop that their users write: loss, backward, clipping, fused AdamW. The
arms take turns; medians of the rounds. --full: also 30 M parameters, and everything compiled.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import flops_per_token
from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.parallel import World
from plainllama.settings import Settings, key
from plainllama.tokens.rows import to_batch
from plainllama.training.engine import Engine
from plainllama.weights.huggingface import config_json


@dataclass
class Flags:
    """What bench/step.py takes."""

    full: bool = key(False, "also 30 M parameters, and compiled")
    rounds: int = key(5, "turns of each arm", low=1)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import importlib
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

CONTEXT, ROWS, VOCAB = 256, 8, 4096
SIZES: dict[str, dict] = {"7 M": dict(n_layer=6, n_head=4, d_model=256, d_ff=688),
                          "30 M": dict(n_layer=8, n_head=8, d_model=512, d_ff=1376)}
Arm = Callable[[], float]  # seconds of one step


def main(command: CommandLine) -> int:
    """Measure and print."""
    flags = command.flags
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {ROWS} x {CONTEXT} "
          f"tokens a step, medians of {flags.rounds} turns")
    for size in SIZES if flags.full else ["7 M"]:
        measure(size, flags)
    return 0


def measure(size: str, flags: Flags) -> None:
    """All arms of one size, in turns."""
    config = Settings(**SIZES[size], vocab_size=VOCAB, block_size=CONTEXT, micro_batch=ROWS,
                      global_batch_tokens=ROWS * CONTEXT, device="cpu", compile="false")
    arms: dict[str, Arm] = {"ceiling": ceiling(config), "square": square}
    for compiled in (False, True) if flags.full else (False,):
        for name, make in (("ours", ours), ("transformers", transformers), ("litgpt", litgpt)):
            arm = f"{name} {'compiled' if compiled else 'eager'}"
            try:
                step = make(config, compiled)
                step()  # compiles
            except Exception as error:
                print(f"{arm}, {size}: not measured: {error!r:.150}")
                continue
            arms[arm] = step
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(flags.rounds + 1):
        for name, step in arms.items():
            took = step()
            seconds[name] += [took] if turn else []  # the first turn warms up
    tokens = ROWS * CONTEXT
    for name, each in seconds.items():
        if name != "square":
            print(f"{size} {name}: {tokens / median(each):,.0f} tok/s; turns, ms: "
                  + " ".join(f"{1e3 * s:.0f}" for s in each))
    flops = flops_per_token(Engine(config, World(), 0).model.config, CONTEXT) * tokens
    rate = 2 * 1024**3 / median(seconds["square"])
    row(f"{size}: share of the square matmul rate {rate / 1e9:.0f} GFLOP/s, ours eager / ceiling",
        flops / median(seconds["ours eager"]) / rate, flops / median(seconds["ceiling"]) / rate, "")
    for mine in [name for name in seconds if name.startswith("ours")]:
        for other in seconds:
            if other != "square" and other != mine and (
                    other == "ceiling" or other.split()[1] == mine.split()[1]):
                row(f"{size}, tok/s: {mine} beside {other}", tokens / median(seconds[mine]),
                    tokens / median(seconds[other]), f"{ratio(seconds[mine], seconds[other]):.2f}")


def ratio(mine: list[float], other: list[float]) -> float:
    """How many times as fast as the other: the median of the turns."""
    return median(b / a for a, b in zip(mine, other, strict=True))


def row(what: str, ours: float, other: float, ratio: str) -> None:
    """A line that bench/all.py gathers."""
    a, b = (f"{x:,.0f}" if x >= 100 else f"{x:.2f}" for x in (ours, other))
    print(f"| {what} | {a} | {b} | {ratio} |", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def square() -> float:
    """One product of 1024 x 1024 matrices, the best of a few: a turn must not be an outlier."""
    a = torch.randn(1024, 1024)
    return min(timed(lambda: a @ a) for _ in range(5))


def ceiling(c: Settings) -> Arm:
    """The sum of the step's parts, each timed alone."""
    n, width = ROWS * CONTEXT, c.d_model // c.n_head
    shapes = [(c.d_model, c.d_model)] * 4 + [(c.d_model, c.d_ff)] * 2 + [(c.d_ff, c.d_model)]
    products = [(torch.randn(n, i), torch.randn(o, i), torch.randn(n, o))
                for i, o in [*shapes, (c.d_model, VOCAB)]]
    q, k, v = [torch.randn(ROWS, c.n_head, CONTEXT, width, requires_grad=True) for _ in range(3)]
    logits = torch.randn(n, VOCAB, requires_grad=True)
    targets = torch.randint(VOCAB, (n,))
    weights = [torch.nn.Parameter(torch.randn(o, i)) for i, o in [*shapes * c.n_layer,
                                                               *[(c.d_model, VOCAB)] * 2]]
    for w in weights:
        w.grad = torch.randn_like(w)
    adamw = torch.optim.AdamW(weights, fused=True)

    def product(x, w, dy):
        x @ w.T, dy @ w, dy.T @ x

    def attention():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), q)

    def loss():
        torch.autograd.grad(F.cross_entropy(logits, targets), logits)

    def step() -> float:
        times = [timed(partial(product, *p)) for p in products]
        blocks = sum(times[:-1]) + timed(attention)
        ends = times[-1] + timed(loss) + timed(adamw.step)
        return c.n_layer * blocks + ends
    return step


def ours(config: Settings, compiled: bool) -> Arm:
    """The update that train.py makes."""
    engine = Engine(config, World(), 0)
    if compiled:
        engine.compile()
        if not engine.compiled:
            raise RuntimeError("torch.compile does not work here")
    batch = to_batch(rows().numpy())
    targets = batch.targets.numel()
    return lambda: timed(lambda: engine.update(batch, 1e-4, targets)[0].item())


def peer(model: torch.nn.Module, compiled: bool, loss: Callable) -> Arm:
    """The loop that users of other models write."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    run, ids = (torch.compile(model) if compiled else model), rows()

    def step() -> None:
        loss(run, ids[:, :-1], ids[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return lambda: timed(step)


def transformers(config: Settings, compiled: bool) -> Arm:
    """LlamaForCausalLM."""
    library = importlib.import_module("transformers")
    shape = Engine(config, World(), 0).model.config
    model = library.LlamaForCausalLM(library.LlamaConfig(**config_json(shape, 0, 1)))
    return peer(model, compiled, lambda run, x, y: F.cross_entropy(
        run(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten()))


def litgpt(config: Settings, compiled: bool) -> Arm:
    """GPT with a LLaMA's parts."""
    library = importlib.import_module("litgpt.model")
    shape = importlib.import_module("litgpt.config").Config(
        block_size=CONTEXT, vocab_size=VOCAB, padded_vocab_size=VOCAB, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.d_model, intermediate_size=config.d_ff, bias=False,
        rotary_percentage=1.0, parallel_residual=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP")
    return peer(library.GPT(shape), compiled, lambda run, x, y: F.cross_entropy(
        run(x).flatten(0, 1), y.flatten()))


def rows() -> torch.Tensor:
    """Ids of a batch and its targets."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (ROWS, CONTEXT + 1), generator=generator)


if __name__ == "__main__":
    run_command(main, COMMAND)
