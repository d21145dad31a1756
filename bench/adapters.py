"""Adapters, in time and memory: python bench/adapters.py [--rounds=5] [--device=cuda]

On a CPU: an update of all weights (AdamW) and of LoRA of rank 8 beside a frozen base, ours, and of
transformers' model with peft's LoRA, fp32, 30 M parameters: the arms take turns, the first turn
warms up; medians and ratios. Then the memory of a process that trains 113 M parameters, all of them
and LoRA: what is resident at most, less what is once torch is loaded, beside what `train.py
--check` reckons. On a GPU: speed and memory of the shapes of ARMS, first weights, bf16, each beside
what is reckoned, also what offload keeps in host memory; --out keeps the rows.
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
    """What bench/adapters.py takes."""

    rounds: int = key(5, "turns of each arm", low=1)
    device: str = key("cpu", "where to measure", ("cpu", "cuda"))
    only: str = key("", "of a GPU's arms, those whose name holds this")
    out: str = key("", "a .jsonl file for the rows of a GPU")
    memory_of: str = key("", "one measured process: the arm's number")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import gc
import importlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from plainllama import parallel
from plainllama.parallel import World
from plainllama.tokens.rows import to_batch
from plainllama.training import log, memory
from plainllama.training.engine import Engine
from plainllama.weights import adapters
from plainllama.weights.huggingface import config_json

Keys = dict[str, Any]
SMALL: Keys = {"n_layer": 8, "n_head": 8, "d_model": 512, "d_ff": 1376, "vocab_size": 8192,
               "block_size": 256, "global_batch_tokens": 2048, "micro_batch": 8, "compile": "false"}
M113: Keys = {"vocab_size": 32000, "block_size": 256, "micro_batch": 1, "global_batch_tokens": 256,
              "compile": "false"}
LORA: Keys = {"lora_r": 8}
WHOLE: Keys = {"vocab_size": 32000, "micro_batch": 16}
LARGE: Keys = {"n_layer": 32, "n_head": 32, "n_kv_head": 8, "d_model": 4096, "d_ff": 14336,
               "vocab_size": 128256, "rope_theta": 500000.0, "activation_checkpointing": True,
               "lora_r": 16}
ARMS: dict[str, Keys] = {f"113 M, {name}{', compiled' if compiled == 'true' else ''}":
        WHOLE | keys | {"compile": compiled}
        for compiled in ("false", "true") for name, keys in (
            ("all weights", {}), ("last 4 blocks", {"train_only": "last:4"}), ("LoRA r 8", LORA),
            ("LoRA r 8, bf16", LORA | {"frozen_dtype": "bf16"}),
            ("LoRA r 8, nf4", LORA | {"frozen_dtype": "nf4"}))}
ARMS |= {f"8 B, LoRA r 16, {kind}, {rows} rows":
         LARGE | {"frozen_dtype": kind, "micro_batch": rows, "compile": "false"}
         for rows in (1, 8) for kind in ("nf4", "int8", "bf16")}
LARGER: Keys = {"n_layer": 16, "n_head": 32, "n_kv_head": 8, "d_model": 2048, "d_ff": 8192,
                "vocab_size": 32000, "micro_batch": 8, "compile": "false"}  # config/llama_1b.py
ARMS |= {"1.1 B, all weights": LARGER,
         "1.1 B, all weights, offload": LARGER | {"parallel": "fsdp", "offload": True}}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


def main(command: CommandLine) -> int:
    """Measure and print."""
    flags = command.flags
    if flags.memory_of:
        print(resident(M113 | (LORA if flags.memory_of == "1" else {})))
    elif flags.device == "cuda":
        on_gpu(flags)
    else:
        speed(flags.rounds)
        for number, name in enumerate(("all weights", "LoRA r 8")):
            done = subprocess.run([sys.executable, __file__, f"--memory_of={number}"],
                                  capture_output=True, text=True, check=True)
            seen = int(done.stdout.split()[-1])
            parts = memory.reckon(Settings(**(M113 | (LORA if number else {}))), 1,
                                  torch.float32)
            print(f"| memory of 113 M, a row of 256, {name} | {seen / 1e9:.2f} GB | reckoned "
                  f"{sum(parts.values()) / 1e9:.2f} GB | {sum(parts.values()) / seen:.2f} |")
    return 0


def speed(rounds: int) -> None:
    """Let the arms take turns; print medians and ratios."""
    arms = {"all weights": ours(SMALL), "LoRA r 8": ours(SMALL | LORA),
            "LoRA r 8, base in bf16": ours(SMALL | LORA | {"frozen_dtype": "bf16"}),
            "LoRA r 8, base in nf4": ours(SMALL | LORA | {"frozen_dtype": "nf4"}), "peft": peft()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, step in arms.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    tokens = SMALL["global_batch_tokens"]
    speeds = {name: tokens / median(seen[1:]) for name, seen in times.items()}
    print(f"{log.cpu_name()}, {torch.get_num_threads()} threads, fp32, 30 M parameters, "
          f"medians of {rounds} turns")
    for name, found in speeds.items():
        print(f"  {name}: {found:,.0f} tokens a second")
    for name, other in (("LoRA r 8", "peft"), ("LoRA r 8", "all weights"),
                        ("LoRA r 8, base in bf16", "all weights"),
                        ("LoRA r 8, base in nf4", "peft")):
        print(f"| {name} beside {other}, 30 M, tok/s | {speeds[name]:,.0f} | {speeds[other]:,.0f} "
              f"| {speeds[name] / speeds[other]:.2f} |")


def some_rows(keys: dict) -> np.ndarray:
    """A batch of random ids."""
    shape = keys["micro_batch"], keys["block_size"] + 1
    return np.random.default_rng(0).integers(keys["vocab_size"], size=shape)


def ours(keys: dict) -> Callable[[], object]:
    """An update as train.py makes it."""
    engine = Engine(Settings(**keys), World(), 0)
    batch = to_batch(some_rows(keys), 0, None)
    targets = batch.targets.numel()
    return lambda: engine.update(batch, 1e-4, targets)[0].item()


def peft() -> Callable[[], object]:
    """The loop that users of transformers and peft write, the same targets."""
    library, transformers = (importlib.import_module(name) for name in ("peft", "transformers"))
    shape = Engine(Settings(**SMALL), World(), 0).model.config
    model = library.get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_json(shape, 0, 1))),
        library.LoraConfig(r=8, lora_alpha=16, target_modules=list(adapters.SHORT.values()),
                           task_type="CAUSAL_LM"))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = torch.from_numpy(some_rows(SMALL))

    def step() -> None:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def resident(keys: dict) -> int:
    """Bytes that three updates of a model made resident, at most (Linux)."""
    def told(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = told("VmRSS")
    step = ours(keys)
    for _ in range(3):
        step()
    return told("VmHWM") - before


def on_gpu(flags: Flags) -> None:
    """Speed and memory of every arm, one after the other."""
    def drawn(name: str, shape: torch.Size, *_) -> torch.Tensor:
        """First weights made on the device: a host would take minutes for 8 billion."""
        gains = name.endswith("norm.weight")
        return torch.ones(shape) if gains else torch.randn(shape, device="cuda") * 0.02

    adapters.initial_weight = drawn  # type: ignore[assignment]
    for name, keys in ARMS.items():
        if flags.only not in name:
            continue
        config, world = Settings(**keys), World(0, 1, "cuda")
        rows, block = config.micro_batch, config.block_size
        config.global_batch_tokens, config.dtype = rows * block, "bf16"
        if config.offload:
            os.environ |= ALONE  # as torchrun --nproc_per_node=1 says it
            world = parallel.start("cuda", config.parallel, config.offload)
        engine = Engine(config, world, 0)
        engine.ready()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        batch = to_batch(some_rows(keys | {"block_size": block}), 0, None)
        times = []
        for _ in range(flags.rounds + 2):
            began = time.perf_counter()
            loss = engine.update(batch, 1e-4, rows * block)[0].item() / (rows * block)
            times.append(time.perf_counter() - began)
        parts = memory.reckon(config, rows, torch.bfloat16)
        row: Keys = {"name": name, "tokens_per_second": rows * block / median(times[2:]),
                     "loss": loss, "peak_bytes": torch.cuda.max_memory_allocated(),
                     "reckoned": parts, "device": torch.cuda.get_device_name(),
                     "torch": torch.__version__, "keys": keys}
        total = sum(parts.values())
        print(f"| {name} | {row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 1e9:.2f} GB | "
              f"{total / 1e9:.2f} GB | {total / row['peak_bytes']:.2f} |", flush=True)
        if flags.out:
            with open(flags.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        del engine
        gc.collect()
        world.close()


if __name__ == "__main__":
    run_command(main, COMMAND)
