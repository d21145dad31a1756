"""What a run writes about itself: run.json, status.json, metrics.jsonl, TensorBoard, the screen."""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from plainllama.command import CommandLine
from plainllama.files import CHECKOUT, cut_rows, write_status

# dense bf16 peaks in FLOP/s by the device's whole name; any other device has no MFU
PEAKS = {
    "NVIDIA B200": 2250e12, "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12, "NVIDIA A10G": 70e12, "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: on the GPU by this process's tensors, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(run: Path, command: CommandLine, device: torch.device, size: int, data: dict,
             parameters: tuple[int, int]) -> dict:
    """run.json: everything that is needed to say what this run is, as of its last start."""
    try:
        started = json.loads((run / "run.json").read_text(encoding="utf-8"))["started"]
    except (OSError, ValueError, KeyError):
        started = time.time()
    packages = ("torch", "numpy", "safetensors", "tokenizers")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"format": 1, "config": asdict(command.config), "config_file": command.config_file,
            "base": command.base, "changed": command.changed, "overrides": command.overrides,
            "versions": versions, "git": git_state(),
            "device": {"type": device.type, "name": name, "count": size,
                       "threads": torch.get_num_threads()},
            "data": data, "started": started,
            "parameters": {"total": parameters[0], "non_embedding": parameters[1]}}


def cpu_name() -> str:
    """The processor's name as Linux tells it, elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def git_state() -> dict:
    """The commit that the scripts are at and whether they were edited since; {} outside git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True,
                              text=True, timeout=10, check=True).stdout.strip()
    try:
        return {"commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


class Log:
    """The metrics of a run, on rank 0; on other ranks every call does nothing.

    A disk that is full costs rows of metrics and a warning, not the run.
    """

    def __init__(self, run: Path, step: int, active: bool):
        self.run, self.active, self.board = run, active, None
        self.warned: set[str] = set()  # files of which rows were lost
        self.service: Callable | None = None  # of the logger that the user asked for
        if not active:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_rows(run / name, step or -1)  # killed before its first checkpoint, it begins anew
        try:
            self.board = Board(run, step)
        except ImportError:
            self.say("tensorboard is not installed: metrics go to metrics.jsonl only")
        except OSError as error:
            self.say(f"WARNING: no TensorBoard events: {error}")

    def connect(self, config) -> None:
        """Send rows to Weights & Biases too; if that fails, now or later, it is one warning."""
        try:
            import wandb

            run = wandb.init(project="plainllama", name=self.run.name, dir=str(self.run),
                             id=hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:16],
                             resume="allow", config=asdict(config))
            self.service = run.log
        except Exception as error:  # not installed, no network, no login
            self.say(f"WARNING: logger=wandb does not work: {error!r:.200}; metrics go to the "
                     "run's folder only")

    def row(self, row: dict) -> None:
        """Write one row of metrics.jsonl and the same numbers to TensorBoard; a number that is not
        finite becomes null."""
        row = {name: value if value is None or math.isfinite(value) else None
               for name, value in row.items()}
        self.line("metrics.jsonl", row)
        if self.board:
            try:
                self.board.add(row)
            except OSError as error:
                self.board = None
                self.say(f"WARNING: no more TensorBoard events: {error}; metrics.jsonl goes on")
        if self.service:
            try:
                self.service(row, step=row["step"])
            except Exception as error:
                self.service = None
                self.say(f"WARNING: no more rows to the logger: {error!r:.200}; metrics.jsonl "
                         "goes on")

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

    def status(self, state: str, step: int) -> None:
        """Write status.json, once for all ranks."""
        if self.active:
            try:
                write_status(self.run, state, step)
            except OSError as error:
                self.say(f"WARNING: status.json is not up to date: {error}")


class Board:
    """TensorBoard's event file, in step with metrics.jsonl. (SummaryWriter writes in a thread,
    which a full disk ends with a traceback.)"""

    def __init__(self, run: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        self.event, self.summary = Event, Summary
        self.file = open(run / name, "wb")  # noqa: SIM115
        self.records = RecordWriter(self.file)
        self.write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # events of an earlier start from this step on are void
        self.write(Event(wall_time=time.time(), step=step + 1 if step else 0,
                         session_log=SessionLog(status=SessionLog.START)))

    def add(self, row: dict) -> None:
        """The numbers of a row of metrics.jsonl."""
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in row.items()
                  if name not in ("step", "time") and isinstance(value, int | float)]
        self.write(self.event(wall_time=time.time(), step=row["step"],
                              summary=self.summary(value=values)))

    def write(self, event) -> None:
        """One record, on its way to the disk at once."""
        self.records.write(event.SerializeToString())
        self.records.flush()


class Clock:
    """Time since the last row of metrics, with evaluation and saving set apart."""

    def __init__(self):
        self.start(0)

    def start(self, step: int) -> None:
        """Begin to count at `step`."""
        self.step, self.since = step, time.perf_counter()
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

    def read(self, step: int, tokens_per_step: int) -> tuple[float, dict]:
        """(tokens per second of training since the last call, seconds apart by name)."""
        seconds = time.perf_counter() - self.since - self.outside
        rate, spent = (step - self.step) * tokens_per_step / max(seconds, 1e-9), self.spent
        spent["row_seconds"] = time.perf_counter() - self.since
        self.start(step)
        return rate, spent


def shares(spent: dict[str, float]) -> str:
    """'data 2%, eval 10%, ': what part of the time since the last row went there, if it shows."""
    parts = {name.removesuffix("_seconds"): seconds / max(spent["row_seconds"], 1e-9)
             for name, seconds in spent.items() if name != "row_seconds"}
    return "".join(f"{name} {share:.0%}, " for name, share in parts.items() if share >= 0.005)


class Profiler:
    """--profile: a trace of steps 4 to 6 after a start, for chrome://tracing or Perfetto."""

    def __init__(self, run: Path, wanted: bool):
        self.run, self.steps = run, 0 if wanted else 7
        self.trace: Any = None

    def step(self) -> None:
        """After each step."""
        self.steps += 1
        if self.steps == 3:
            import torch

            self.trace = torch.profiler.profile()
            self.trace.start()
        elif self.steps == 6 and self.trace:
            self.trace.stop()
            path = self.run / "trace.json"
            self.trace.export_chrome_trace(str(path))
            print(f"trace of three steps in {path}; open it in https://ui.perfetto.dev",
                  flush=True)
