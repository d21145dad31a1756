"""What a run writes about itself: run.json, status.json, metrics.jsonl, TensorBoard, the screen."""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from model import flops_per_token
from plainllama.command import CommandLine
from plainllama.files import CHECKOUT, cut_rows, read_json, write_status
from plainllama.settings import Settings
from plainllama.tokens.chat import pieces
from plainllama.tokens.rows import Rows
from plainllama.tokens.shards import Split
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.training.engine import Engine
from plainllama.weights import adapters

# dense bf16 peaks in FLOP/s (of cards before Ampere: fp16) by the device's whole name; any other
# device has no MFU
PEAKS = {f"NVIDIA {card}": tera * 1e12 for card, tera in {
    "B300": 2250, "B200": 2250, "GH200 480GB": 990, "H200": 989, "H100 80GB HBM3": 989,
    "H100 NVL": 835, "H100 PCIe": 756, "H20": 148, "A100-SXM4-80GB": 312, "A100-SXM4-40GB": 312,
    "A100 80GB PCIe": 312, "A100-PCIE-40GB": 312, "L40S": 362, "L4": 121, "A10": 125, "A10G": 70,
    "RTX A6000": 155, "RTX 6000 Ada Generation": 364, "GeForce RTX 5090": 210,
    "GeForce RTX 4090": 165, "GeForce RTX 3090": 71}.items()}
PEAKS |= {"Tesla V100-SXM2-32GB": 125e12, "Tesla V100-SXM2-16GB": 125e12, "Tesla T4": 65e12}

EXAMPLE = 2000  # tokens at most, of the dialog that run.json keeps to show what is learned


def mfu(engine: Engine, speed: float) -> float | None:
    """The share of the devices' dense bf16 FLOP/s that `speed` tokens a second take; None if the
    device is not in the table, or a part of the model is frozen."""
    device = engine.world.device
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if not all(p.requires_grad for p in engine.model.parameters()):
        return None  # fewer operations, and nobody's formula counts them
    flops = flops_per_token(engine.model.config, engine.config.block_size)
    return speed * flops / (peak * engine.world.size) if peak else None


def percent(share: float | None) -> str:
    """Write a share, n/a where it is not known."""
    return f"{share:.1%}" if share else "n/a"


def peak_memory(device: torch.device) -> int:
    """Give the most bytes used so far: of a GPU by this process's tensors, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(run: Path, command: CommandLine, manifest: dict, data_hash: str, engine: Engine,
             data: Path) -> dict:
    """Give run.json: everything that is needed to say what this run is, as of its last start.
    `data`: the folder of the data set."""
    config, device = command.config, engine.world.device
    recipe, splits = manifest["recipe"], manifest["splits"]
    sizes = {f"{split}_{unit}": splits[split].get(unit)
             for split in ("train", "val") for unit in ("tokens", "bytes")}
    sizes |= {f"{split}_learned": splits[split]["learned"] for split in ("train", "val")
              if "learned" in splits[split]}
    total, inner, learning = adapters.parameter_counts(engine.model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    started = read_json(run / "run.json", tolerant=True).get("started", time.time())
    return {"format": 1, "config": asdict(config), "config_file": command.config_file,
            "base": command.base, "changed": command.changed, "overrides": command.overrides,
            "instead": command.instead, "versions": versions(), "git": git_state(),
            "device": {"type": device.type, "name": name, "count": engine.world.size,
                       "threads": torch.get_num_threads()},
            "data": {"name": config.dataset, "tokenizer": manifest["tokenizer"],
                     "vocab_size": config.vocab_size, "manifest_sha256": data_hash,
                     "sources": recipe.get("sources"), "renderers": [
                         source["renderer"] for source in manifest.get("source", ())
                         if "renderer" in source], **sizes},
            "started": started, "parameters": {"total": total, "non_embedding": inner} | (
                {"trained": learning} if learning < total else {})} | example(data, manifest)


def example(data: Path, manifest: dict) -> dict:
    """Give {"example": [[text, whether it is learned], ...]} of the first dialog of the validation
    split, or of the first EXAMPLE tokens of it; {} of a set of which all is learned."""
    split = Split(data, "val", manifest)
    if not split.masked or not split.documents:
        return {}
    first, last = split.bounds()[:2].tolist()
    last = min(last, first + EXAMPLE)
    return {"example": pieces(Tokenizer.load(data), split.read(first, last),
                              split.read_mask(first, last))}


def versions() -> dict[str, str]:
    """Name the versions of Python and of what training needs."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "tokenizers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_name() -> str:
    """Give the processor's name as Linux tells it, elsewhere what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*: *(\S.*)", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def git_state() -> dict:
    """Give the commit of the scripts and whether they were edited since; {} outside git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True,
                              text=True, timeout=10, check=True).stdout.strip()
    try:
        return {"commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def tensorboard(run: Path, step: int) -> Callable[[dict], None]:
    """Open TensorBoard's events; those of an earlier start after `step` are void."""
    from torch.utils.tensorboard import SummaryWriter

    def without_traceback(args) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":  # flush() raises what ended that
            threading.__excepthook__(args)

    def write(row: dict) -> None:
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                board.add_scalar(name, value, row["step"])
        board.flush()

    threading.excepthook = without_traceback
    board = SummaryWriter(str(run), purge_step=step + 1 if step else 0)
    return write


def wandb(run: Path, config: Settings) -> Callable[[dict], None]:
    """Open a run of Weights & Biases, the same one after a resume."""
    import wandb

    service = wandb.init(project="plainllama", name=run.name, dir=str(run), resume="allow",
                         id=hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16],
                         config=asdict(config))
    return lambda row: service.log(row, step=row["step"])


# to add one: this entry, a choice in settings, a case in tests/test_engine.py
LOGGERS = {"wandb": wandb}


class Log:
    """The metrics of a run, on rank 0; on other ranks every call does nothing.

    A disk that is full costs rows of metrics and a warning, not the run.
    """

    def __init__(self, run: Path, step: int, active: bool):
        self.run, self.active = run, active
        self.warned: set[str] = set()  # files of which rows were lost
        self.sinks: dict[str, Callable[[dict], None]] = {}  # where rows go beside metrics.jsonl
        if not active:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_rows(run / name, step or -1)  # killed before its first checkpoint, it begins anew
        self.connect("TensorBoard", tensorboard, run, step)

    def connect(self, name: str, open_sink: Callable[..., Callable[[dict], None]], *args) -> None:
        """Send rows there too; if that fails, now or later, it is one warning."""
        if sink := self.tried(name, open_sink, *args):
            self.sinks[name] = sink

    def tried(self, name: str, call: Callable, *args):
        """Give what `call` of a sink gives; one that fails gets no more rows."""
        try:
            return call(*args)
        except Exception as error:  # not installed, no disk, no network, no login
            self.sinks.pop(name, None)
            self.say(f"WARNING: {name} does not work: {error!r:.200}; metrics.jsonl goes on")

    def row(self, row: dict) -> None:
        """Write one row of metrics.jsonl, and send it to the sinks; a number that is not finite
        becomes null."""
        row = {name: value if value is None or math.isfinite(value) else None
               for name, value in row.items()}
        self.line("metrics.jsonl", row)
        for name, write in list(self.sinks.items()):
            self.tried(name, write, row)

    def line(self, name: str, row: dict) -> None:
        """Append a row to a .jsonl file of the run: all of it or, with one warning, nothing."""
        if not self.active:
            return
        data = (json.dumps(row) + "\n").encode()
        try:
            with open(self.run / name, "ab", buffering=0) as file:
                if (written := file.write(data)) != len(data):
                    file.truncate(file.tell() - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        except OSError as error:
            if name not in self.warned:
                self.say(f"WARNING: rows of {name} are lost: {error}; training goes on")
            self.warned.add(name)

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.active:
            print(text, flush=True)

    def announce(self, engine: Engine, rows: Rows, changed: str) -> None:
        """Say what is about to be trained, and on what, and what was `changed` of the config."""
        config, world = engine.config, engine.world
        device, block = world.device.type, config.block_size
        total, inner, _ = adapters.parameter_counts(engine.model)
        self.say(f"model: {total / 1e6:.1f} M parameters, {inner / 1e6:.1f} M without embeddings; "
                 f"{device}, {engine.summary}, {world.mode.replace('one', 'one process')}")
        learns = adapters.summary(engine.model, engine.adapter, config.frozen_dtype)
        for line in (learns, world.why, changed):
            if line:
                self.say(line)
        self.say(f"batch: global {engine.batch_rows * block:,} tok = {world.size} {device} x "
                 f"{block} x {engine.micro} x {engine.accumulate} (micro-batch x accumulation)")
        if engine.batch_rows < world.size:
            self.say(f"WARNING: {engine.batch_rows} rows a step for {world.size} ranks: some wait")
        self.say(f"data: {rows.summary(config.max_steps * engine.batch_rows)} in "
                 f"{config.max_steps} steps")
        passes = config.max_steps * engine.batch_rows / rows.windows
        if passes > 50 and not config.overfit_rows:
            self.say(f"note: each row is read {passes:.0f} times; say epochs=3, or fewer max_steps")

    def update(self, row: dict, spent: dict[str, float], left: str, max_steps: int) -> None:
        """Write the row of an update, with the seconds that were `spent` apart, and say it."""
        self.row(row | spent)
        learned = row.get("learned_tokens_per_second")
        speed = f"{row['tokens_per_second']:,.0f} tok/s"
        speed += f", {learned:,.0f} learned" if learned else ""
        self.say(f"step {row['step']}/{max_steps}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
                 f"grad norm {row['grad_norm']:.2f}, {speed}, "
                 f"MFU {percent(row['mfu'])}, {shares(spent)}{left} left")

    def status(self, state: str, step: int) -> None:
        """Write status.json, once for all ranks."""
        if self.active:
            try:
                write_status(self.run, state, step)
            except OSError as error:
                self.say(f"WARNING: status.json is not up to date: {error}")


class Clock:
    """Time since the last row of metrics, with evaluation and saving set apart."""

    def __init__(self):
        self.start()

    def start(self, *tokens: int) -> None:
        """Begin to count, when the run has read, and has learned, so many tokens."""
        self.tokens, self.since = tokens, time.perf_counter()
        self.spent: dict[str, float] = {}  # seconds by name
        self.outside = 0.0  # seconds that are not training

    @contextlib.contextmanager
    def apart(self, name: str, training: bool = False):
        """Report the time inside as `name`; it does not slow tokens/s unless it is `training`."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        self.outside += 0.0 if training else seconds

    def read(self, *tokens: int) -> tuple[list[float], dict]:
        """Give (tokens per second of training since the last call, of each count that is given;
        seconds apart by name)."""
        seconds, spent = time.perf_counter() - self.since, self.spent
        training = max(seconds - self.outside, 1e-9)
        rates = [(now - then) / training for now, then in zip(tokens, self.tokens, strict=True)]
        self.start(*tokens)
        return rates, {**spent, "row_seconds": seconds}


def shares(spent: dict[str, float]) -> str:
    """Say which parts of the time since the last row went elsewhere: 'data 2%, eval 10%, '."""
    whole = max(spent["row_seconds"], 1e-9)
    return "".join(f"{name.removesuffix('_seconds')} {seconds / whole:.0%}, " for name, seconds in
                   spent.items() if name != "row_seconds" and seconds / whole >= 0.005)


def profiler(run: Path) -> Callable[[], None]:
    """--profile: trace steps 4 to 6 after a start, for chrome://tracing or Perfetto. Gives what to
    call after each step."""
    def keep(trace: torch.profiler.profile) -> None:
        said = f"trace of three steps in {run / 'trace.json'}; open it in https://ui.perfetto.dev"
        try:
            trace.export_chrome_trace(str(run / "trace.json"))
        except (OSError, RuntimeError) as error:
            said = f"WARNING: no trace in {run / 'trace.json'}: {error}; training goes on"
        print(said, flush=True)

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    profile = torch.profiler.profile(schedule=schedule, on_trace_ready=keep)
    profile.start()
    return profile.step
