"""What one GPU does with this code: python bench/gpu.py [--minutes=9] [--only=step,decode]

Stages, each part in a process of its own: the environment; the ceilings of copies and of matrix
products; training steps of config/llama100m.py's model beside transformers' LlamaForCausalLM (and
nanoGPT's GPT with --nanogpt=PATH/model.py), and `short`, at a quarter of its context; peak memory
by micro-batch; decoding; saving; the CUDA tests. The time that is left is shared out among what is
still to come. Rows are added to
OUT/results.jsonl as soon as they are measured and shown in OUT/results.md: a kill loses nothing,
and another call adds to them. What fails or has no time left says so, and the next begins.

--config=config/bench_gpu_tiny.py rehearses all of it on the CPU. Exit codes: 0; 1 a stage or an arm
failed; 2 the input.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse, parse_arguments, run_command
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What bench/gpu.py takes."""

    config: str = key("config/bench_gpu.py", "the model and its device")
    minutes: float = key(9.0, "end within this time", low=0.1)
    only: str = key("", "some of environment,ceilings,step,short,memory,decode,save,tests (all)")
    out: str = key("", "the folder for the results (default: bench/results/gpu-NAME)")
    nanogpt: str = key("", "nanoGPT's model.py, to measure it too")


if __name__ == "__main__":  # --help and a misspelt option are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any

import torch

from model import IGNORE, Linear, LLaMA, flops_per_token
from plainllama import files, parallel, settings
from plainllama.generation import generate
from plainllama.parallel import World
from plainllama.tokens.rows import Batch
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.training import log, optim
from plainllama.training.engine import Engine, architecture
from plainllama.weights import checkpoint
from plainllama.weights.adapters import initialise
from plainllama.weights.huggingface import config_json

MICRO_TOKENS = 65536  # at most in a forward pass; more gain nothing
PACKAGES = ("torch", "triton", "transformers", "numpy", "nvidia-cudnn-cu13", "pytest")
NVIDIA_SMI = ("nvidia-smi --format=csv,noheader --query-gpu="
              "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu")


class Bench:
    """What the stages share: sizes, time and the file of results."""

    def __init__(self, flags: Any, device: str, card: str):
        self.flags, self.card, self.tiny = flags, card, device == "cpu"
        self.name = time.strftime("%Y%m%d-%H%M%S")  # of this use of the script
        self.deadline = self.part_ends = time.time() + 60 * flags.minutes
        self.reserve = 3.0  # seconds before its end in which a part begins nothing new
        slug = "rehearsal" if self.tiny else re.sub("[^a-z0-9]+", "-", card.lower()).strip("-")
        self.out = Path(flags.out or ROOT / f"bench/results/gpu-{slug}").absolute()
        self.config = parse([flags.config], "").config
        self.config.vocab_size = self.config.vocab_size or 32000  # Mistral's
        self.shape, self.world = architecture(self.config), World(0, 1, device)
        self.tokens = self.config.global_batch_tokens  # of an arm's update

    def left(self) -> float:
        """Seconds in which the part that runs now may still begin something."""
        return self.part_ends - self.reserve - time.time()

    def record(self, table: str, **fields) -> None:
        """Add a row to results.jsonl, print it, and write results.md anew."""
        path = self.out / "results.jsonl"
        row = (json.dumps({"table": table, "run": self.name, **fields}) + "\n").encode()
        with open(path, "a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END):  # a writer that was killed may have left half a line
                file.seek(-1, os.SEEK_END)
                row = row if file.read(1) == b"\n" else b"\n" + row
            file.write(row)
        print(f"{table}: " + ", ".join(f"{k} {shown(k, v)}" for k, v in fields.items()), flush=True)
        files.write_text(self.out / "results.md", markdown(self.rows(everyone=True)))

    def rows(self, table: str = "", everyone: bool = False) -> list[dict]:
        """The rows of a table or of all, of this use of the script or of every one."""
        return [row for row in files.read_rows(self.out / "results.jsonl", tolerant=True)
                if table in ("", row["table"]) and (everyone or row["run"] == self.name)]


def shown(name: str, value: Any) -> str:
    """A value as the tables show it."""
    if isinstance(value, list):
        return ", ".join(shown(name, one) for one in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "n/a" if value is None else " ".join(str(value).split()).replace("|", "/")
    if name.endswith("_bytes"):
        return f"{value / 2**30:.3f} GiB"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.4g}"


def markdown(rows: list[dict]) -> str:
    """Rows as one table for each kind of row."""
    text = ""
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == table]
        heads = [k for k in dict.fromkeys(k for row in mine for k in row) if k != "table"]
        cells = [[shown(k, row[k]) if k in row else "" for k in heads] for row in mine]
        lines = [f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *cells]]
        text += "\n".join([f"## {table}\n", *lines]) + "\n\n"
    return text


# ---- arms: set up one after the other, then measured in turns

@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds: a compiler that hangs costs one arm."""
    def ring(*_) -> None:
        raise TimeoutError(f"{seconds:.0f} s were over")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def free() -> None:
    """Give the device the memory back that nothing holds any more but circles and caches."""
    with contextlib.suppress(Exception):  # a device in error, of which a row tells already
        gc.collect()
        torch.cuda.empty_cache()


def attempt(bench: Bench, table: str, call: Callable[[], Any], share: float = 1.0, **about) -> Any:
    """What `call` gives within a share of the time that is left. If it fails, or none is left, a
    row says why, the device's memory is free again, and the answer is None."""
    why = "no time is left"
    if bench.left() > 0:
        try:
            with patience(share * bench.left()):
                return call()
        except torch.OutOfMemoryError:
            why = "out of memory"
        except Exception as error:
            why = parallel.why_not(error)
            traceback.print_exc()
    free()
    bench.record(table, **about, note=f"not measured: {why}")
    return None


def take_turns(bench: Bench, table: str, arms: dict[str, Callable[[], float]], rounds: int,
               **about) -> dict[str, list[float]]:
    """Measure A B C A B C ...: what drifts, drifts for all. A row a turn; an arm that fails is out,
    and no round begins without time for one like the last."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    seconds = 0.0
    for number in range(1, rounds + 1):
        begin = time.perf_counter()
        if bench.left() < 1.2 * seconds:
            break
        for name in list(arms):
            speed = attempt(bench, table, arms[name], arm=name, **about)
            if speed is None:
                del arms[name]
                free()
                continue
            speeds[name].append(speed)
            bench.record(table, arm=name, **about, round=number, tokens_per_second=speed)
        seconds = time.perf_counter() - begin
    return speeds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the machine

def environment(bench: Bench) -> None:
    """The machine and the versions."""
    found = {one.name.lower(): one.version for one in distributions()}
    card = None if bench.tiny else torch.cuda.get_device_properties(0)
    bench.record("environment", device=bench.card, python=sys.version.split()[0],
                 memory_bytes=card.total_memory if card else None, cores=os.cpu_count(),
                 multiprocessors=card.multi_processor_count if card else None,
                 capability=f"{card.major}.{card.minor}" if card else None,
                 versions=[f"{name} {found.get(name, '(none)')}" for name in PACKAGES],
                 cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version() if card else None,
                 matmuls=str(parallel.pick_dtype("auto", bench.world.device))[6:],
                 git=log.git_state().get("commit"), config=bench.flags.config,
                 nvidia_smi=subprocess.getoutput(NVIDIA_SMI) if card else None)


def seconds_of(device: torch.device, call: Callable[[], Any]) -> float:
    """The median seconds of a call; ten are asked for at a time, so that waiting costs little."""
    times = []
    for _ in range(12):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(10):
            call()
        synchronize(device)
        times.append((time.perf_counter() - begin) / 10)
    return median(times[2:])  # the first two warm up


def ceilings(bench: Bench) -> None:
    """What the device can do at best: copies within its memory, products of random matrices."""
    device, width, inner = bench.world.device, bench.shape.d_model, bench.shape.d_ff
    dtype = parallel.pick_dtype("auto", device)

    def measure(what: str, amount: float, call: Callable, *shapes: tuple[int, ...]) -> None:
        tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        rate = amount / seconds_of(device, partial(call, *tensors))
        bench.record("ceilings", what=what, rate=rate)

    square, rows, copied = (128, 256, 1 << 16) if bench.tiny else (8192, MICRO_TOKENS, 1 << 29)
    tries: list[tuple] = [("GB/s of copies, read and written", 2 * copied * dtype.itemsize / 1e9,
                           torch.Tensor.copy_, (copied,), (copied,))]
    for n, k, m in ((square, square, square), (rows, width, inner), (rows, inner, width)):
        tries.append((f"TFLOP/s of {str(dtype)[6:]} matmul {n} x {k} x {m}", 2 * n * k * m / 1e12,
                      torch.matmul, (n, k), (k, m)))
    for one in tries:
        attempt(bench, "ceilings", partial(measure, *one), what=one[0])


# ---- training steps

def our_model(bench: Bench) -> LLaMA:
    """The model with its first weights, as train.py makes it."""
    with torch.device("meta"):
        model = LLaMA(bench.shape)
    bench.world.place(model, parallel.pick_dtype("auto", bench.world.device))
    initialise(model, bench.config.seed, bench.world.piece)
    return model


def their_model(bench: Bench) -> Any:
    """transformers' LlamaForCausalLM with the same weights, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**config_json(bench.shape, None, None)))
    model.load_state_dict(our_model(bench).state_dict())
    return model.to(bench.world.device, torch.float32)


def nano_model(bench: Bench, context: int) -> Any:
    """nanoGPT's GPT of the same size, from the file that --nanogpt names."""
    spec: Any = importlib.util.spec_from_file_location("nanogpt_model", bench.flags.nanogpt)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {name: getattr(bench.shape, name) for name in ("n_layer", "n_head", "vocab_size")}
    return module.GPT(module.GPTConfig(
        n_embd=bench.shape.d_model, block_size=context, dropout=0.0, bias=False, **sizes,
    )).to(bench.world.device)


class Arm:
    """One implementation in training: fp32 weights, bf16 matmuls where native. Ours is the engine
    that train.py drives; the others get the same optimizer, clipping and guard. An update is
    `tokens` tokens, in micro-batches of at most MICRO_TOKENS, or of what fits."""

    def __init__(self, bench: Bench, name: str, context: int, compiled: bool, tokens: int):
        free()  # or what goes away later would be counted as this one's
        begin, before = time.perf_counter(), torch.cuda.memory_allocated()
        self.bench, self.kind, self.said = bench, name.split(",")[0], list[str]()
        rows, device = tokens // context, bench.world.device
        micro = min(rows, MICRO_TOKENS // context)
        self.config = replace(
            bench.config, block_size=context, micro_batch=micro, global_batch_tokens=rows * context,
            optimizer="muon" if "Muon" in name else "adamw",
            compile=bench.config.compile if compiled else "false")
        if self.kind == "ours":
            self.engine = Engine(self.config, bench.world, 0, say=self.said.append)
            self.model: Any = self.engine.model
        else:
            self.model = (their_model(bench) if self.kind == "transformers"
                          else nano_model(bench, context))
            self.optimizer = optim.make(self.model, self.config)
            wanted = self.config.compile != "false"
            self.run = torch.compile(self.model, dynamic=False) if wanted else self.model
        free()
        self.own = torch.cuda.memory_allocated() - before  # bytes of weights and moments
        self.micro, self.compiled = micro, self.config.compile != "false"
        self.peak: int | None = None
        self.at_first = 0.0
        self.batches = []
        for _ in range(4):
            x = torch.randint(bench.config.vocab_size, (rows, context), device=device)
            y = torch.cat((x[:, 1:], torch.full_like(x[:, :1], IGNORE)), 1)
            self.batches.append(Batch(x, y, None, False, None))
        synchronize(device)
        self.build_seconds = time.perf_counter() - begin

    def first(self) -> None:
        """Compile, and make the first update: for the others, in micro-batches that fit."""
        begin = time.perf_counter()
        if self.kind == "ours":
            self.engine.ready()
            self.compiled = self.engine.compiled
        while True:
            try:
                self.loss = self.update(self.batches[0]).item()
                break
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise
            self.micro //= 2
            self.model.zero_grad()
            torch.cuda.empty_cache()
        self.first_step_seconds = time.perf_counter() - begin

    def update(self, batch: Batch) -> torch.Tensor:
        """Make one update with T - 1 targets a row; the mean loss."""
        if self.kind == "ours":
            targets = batch.targets.numel() - len(batch.ids)
            loss = self.engine.update(batch, self.config.min_lr, targets)[0] / targets
            self.micro = self.engine.micro  # it halves them itself
            return loss
        total = torch.zeros((), device=batch.ids.device)
        dtype = parallel.pick_dtype("auto", batch.ids.device)
        for part in batch.split(self.micro):
            with torch.autocast(part.ids.device.type, dtype, enabled=dtype != torch.float32):
                loss = self.mean_loss(part) * (len(part.ids) / len(batch.ids))
            loss.backward()
            total += loss.detach()
        norm = self.bench.world.square_norm(self.model).sqrt()
        optim.step(self.optimizer, self.config.min_lr, norm, self.config.grad_clip)
        self.optimizer.zero_grad()
        return total

    def mean_loss(self, part: Batch) -> torch.Tensor:
        """The loss as the others compute it."""
        if self.kind == "transformers":
            return self.run(input_ids=part.ids, labels=part.ids, use_cache=False).loss
        return self.run(part.ids, part.targets.masked_fill(part.targets == IGNORE, -1))[1]

    def speed(self, steps: int) -> float:
        """Tokens per second of `steps` updates. Keeps the last loss and the most bytes of tensors,
        as if this arm were alone on the device."""
        others = torch.cuda.memory_allocated() - self.own
        if self.bench.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(steps):
            loss = self.update(self.batches[i % 4])
        self.loss = loss.item()  # comes when all that was asked of the device is done
        seconds = time.perf_counter() - begin
        self.peak = torch.cuda.max_memory_allocated() - others or None
        return steps * self.batches[0].ids.numel() / seconds

    def turn(self, steps: int) -> float:
        """Give speed() after an update that is not timed: it lays the memory out anew, in which the
        arm before had blocks of other sizes."""
        free()
        self.update(self.batches[0])
        return self.speed(steps)

    def about(self) -> dict:
        """What a row says beside the speed."""
        return {"update_tokens": self.batches[0].ids.numel(), "micro_batch": self.micro,
                "compiled": self.compiled, "peak_bytes": self.peak,
                "weights_and_moments_bytes": self.own or None,
                "build_seconds": self.build_seconds, "first_step_seconds": self.first_step_seconds,
                "last_loss": self.loss, "note": "; ".join(self.said)}


def warm_arm(bench: Bench, name: str, context: int) -> Arm:
    """Build an arm and make its first steps; `at_first` is its speed after them."""
    arm = Arm(bench, name, context, "compiled" in name, bench.tokens)
    arm.first()
    arm.at_first = arm.speed(2)
    return arm


def step(bench: Bench, divisor: int, names: tuple[str, ...]) -> None:
    """Training throughput of the arms `names` in turns, at the config's context divided by
    `divisor`; summarise() makes medians and ratios of it."""
    context = bench.config.block_size // divisor
    turns: dict[str, Callable[[], float]] = {}
    for name in names:
        if name.startswith("nanoGPT") and not bench.flags.nanogpt:
            continue
        arm = attempt(bench, "step, first", partial(warm_arm, bench, name, context), 0.75,
                      arm=name, context=context)
        if arm:
            bench.record("step, first", arm=name, context=context, tokens_per_second=arm.at_first,
                         mfu=mfu(bench, context, arm.at_first), **arm.about())
            steps = (0.05 if bench.tiny else 1.5) * arm.at_first / bench.tokens
            turns[name] = partial(arm.turn, max(1, round(steps)))
    take_turns(bench, "step, rounds", turns, 5, context=context)


def mfu(bench: Bench, context: int, speed: float) -> float | None:
    """Model FLOPs utilisation at so many tokens per second; None for a device without a peak."""
    peak = log.PEAKS.get(bench.card)
    return speed * flops_per_token(bench.shape, context) / peak if peak else None


PAIRS = (("ours, compiled", "transformers, compiled"), ("ours, compiled", "nanoGPT, compiled"),
         ("ours, compiled", "ours, Muon, compiled"), ("ours, compiled", "ours, eager"),
         ("ours, eager", "transformers, eager"))


def summarise(bench: Bench) -> None:
    """Record medians and ratios of the rounds since the last call, also of a part that was
    killed: it left the rounds in the file."""
    old = {(row["context"], row["arm"]) for row in bench.rows("step")}
    first = {(row["context"], row["arm"]): row for row in bench.rows("step, first")}
    rounds: dict[tuple, list[float]] = {}
    for row in bench.rows("step, rounds"):
        if "round" in row:
            rounds.setdefault((row["context"], row["arm"]), []).append(row["tokens_per_second"])
    for (context, arm), speeds in rounds.items():
        if (context, arm) not in old:
            about = first[context, arm] | {
                "tokens_per_second": median(speeds), "mfu": mfu(bench, context, median(speeds)),
                "rounds_tokens_per_second": speeds}
            bench.record(**about | {"table": "step"})
    for context, (a, b) in product(dict.fromkeys(context for context, _ in rounds), PAIRS):
        ours, other = (context, a), (context, b)
        if ours in rounds and other in rounds and not {ours, other} <= old:
            each = sorted(x / y for x, y in zip(rounds[ours], rounds[other], strict=False))
            bench.record("ratios of tokens per second", context=context, ratio=f"{a} / {b}",
                         median=median(each), lowest=each[0], highest=each[-1])


# ---- memory, decoding, saving

def memory(bench: Bench, compiled: bool) -> None:
    """Peak memory of a training step of ours by micro-batch, up to what does not fit."""
    context = bench.config.block_size
    most = min(bench.tokens, MICRO_TOKENS) // context
    sizes = [1 << power for power in range(most.bit_length())]
    name = f"ours, {'compiled' if compiled else 'eager'}"

    def measure(rows: int) -> dict:
        torch._dynamo.reset()  # or the second size is compiled for any size
        arm = Arm(bench, name, context, compiled, rows * context)
        arm.first()
        speed = arm.speed(1 if bench.tiny else 3)
        if arm.micro != rows:
            raise torch.OutOfMemoryError
        return arm.about() | {"tokens_per_second": speed}

    # compiled, each takes long, and the largest lies in the compiler's cache since the steps
    for rows in reversed(sizes) if compiled else sizes:
        about: dict[str, Any] = {"arm": name, "context": context, "micro_batch": rows}
        found = attempt(bench, "memory", partial(measure, rows), 1.0, **about)
        if found:
            bench.record("memory", **about | found)
        elif not compiled:
            break


def reading_speed(device: torch.device) -> float:
    """Measure the bytes per second at which the device adds up a large tensor: what decoding could
    reach."""
    numbers = torch.ones(1 << (26 if device.type == "cpu" else 30), device=device)
    least = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        numbers.sum().item()
        least = min(least, time.perf_counter() - begin)
    return numbers.nbytes / least


def bytes_read(model: LLaMA, batch: int, prompt: int, new: int, compiled: bool) -> int:
    """Count what the steps after the first token read: the weights, and the cache as far as it is
    in use (if compiled: all of it)."""
    config = model.config
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes
    token = (2 * config.n_layer * batch * config.kv_heads * config.head_dim *
             model.compute_dtype.itemsize)
    used = [prompt + new] * (new - 1) if compiled else range(prompt + 1, prompt + new)
    return (new - 1) * weights + token * sum(used)


class Decoder:
    """One implementation of greedy decoding, from 32 tokens a text on; `share` is how near its last
    turn came to the device's reading speed."""

    def __init__(self, bench: Bench, name: str, batch: int, best: float):
        self.name, self.best, self.first = name, best, 0.0
        self.new, device = 16 if bench.tiny else 128, bench.world.device
        self.model: Any = (their_model if name == "transformers" else our_model)(bench).eval()
        linears = [m for m in self.model.modules() if isinstance(m, Linear)]
        parts: list = linears or [self.model]
        for part in parts:  # ours: as sample.py loads a checkpoint
            part.to(parallel.pick_dtype("auto", device))
        self.ids = torch.randint(bench.config.vocab_size, (batch, 32), device=device)
        self.compiled, self.share = None, 0.0
        if "compiled" in name:
            self.compiled = generate.compile_step(self.model, batch, 32 + self.new, must=True)
        self.speed()  # the first one warms up

    def note(self, row: int, token: int) -> bool:
        """Watch generate(): when did the first token come? End no text."""
        self.first = self.first or time.perf_counter()
        return False

    def speed(self) -> float:
        """New tokens per second, of all texts together."""
        begin, self.first, batch = time.perf_counter(), 0.0, len(self.ids)
        if self.name == "transformers":
            made = self.model.generate(
                self.ids, attention_mask=torch.ones_like(self.ids), pad_token_id=0,
                do_sample=False, min_new_tokens=self.new, max_new_tokens=self.new)
            count = sum(len(text) - 32 for text in made.tolist())
        else:
            texts = generate.generate(
                self.model, self.ids.tolist(), self.new, settings.Sampling(temperature=0),
                [0] * batch, watch=self.note, compiled=self.compiled)
            count = sum(len(text) for text, _ in texts)
            read = bytes_read(self.model, batch, 32, self.new, bool(self.compiled))
            self.share = read / (time.perf_counter() - self.first) / self.best
        return count / (time.perf_counter() - begin)


def decode(bench: Bench, batch: int) -> None:
    """Greedy decoding: generate.generate, eager and compiled, beside transformers' generate."""
    best, arms = reading_speed(bench.world.device), {}
    speeds: dict[str, list[float]] = {}
    compiled = ["ours, compiled"] * (bench.config.compile != "false")
    for names in (["ours", "transformers"], compiled):  # to compile may take all that is left
        for name in names:
            arm = attempt(bench, "decode", partial(Decoder, bench, name, batch, best), 0.7,
                          arm=name, batch=batch)
            if arm:
                arms[name] = arm
        turns = take_turns(bench, "decode, rounds", {name: arm.speed for name, arm in arms.items()},
                           2, batch=batch)
        for name, rounds in turns.items():
            speeds.setdefault(name, []).extend(rounds)
    for name, rounds in speeds.items():
        if rounds:
            bench.record("decode", arm=name, batch=batch, prompt_tokens=32,
                         new_tokens=arms[name].new, tokens_per_second=median(rounds),
                         rounds_tokens_per_second=rounds,
                         share_of_reading_speed=arms[name].share or None)


def save(bench: Bench) -> None:
    """Seconds that training waits for a checkpoint, and until it is committed."""
    arm = Arm(bench, "ours, eager", bench.config.block_size, False, bench.config.block_size)
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as name:
        run = Path(name)
        make_tokenizer("bytes").save(run)
        saver = checkpoint.Saver(run, run / "tokenizer.json", bench.world, keep_last=1)
        for number in range(1, 4):
            arm.speed(1)  # leaves nothing that the device is still to do
            begin = time.perf_counter()
            saver.start(number, arm.model, arm.engine.optimizer.state, {})
            waits = time.perf_counter() - begin
            saver.wait()
            if saver.problem:
                raise OSError(saver.problem)
            written = sum(path.stat().st_size for path in run.rglob("step_*/**/*")
                          if path.is_file())
            bench.record("save", round=number, training_waits_seconds=waits,
                         committed_after_seconds=time.perf_counter() - begin, written_bytes=written)


def tests(bench: Bench) -> None:
    """The tests that only a GPU can run; what they showed until they were ended, if they were."""
    words = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-rA",
             "-p", "no:cacheprovider", "tests/test_cuda.py"]
    words += ["-n", "1" if bench.tiny else "4"] if find_spec("xdist") else []
    words += ["--timeout=120"] if find_spec("pytest_timeout") else []
    visible = "" if bench.tiny else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    with open(bench.out / "tests.log", "w+b") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   env={**os.environ, "CUDA_VISIBLE_DEVICES": visible})
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, bench.left()))
        code = process.poll()  # None: its time is over; its workers end with this process's group
        process.kill()
        file.seek(0)
        said = file.read().decode(errors="replace")
    outcomes = outcomes_of(said)
    named = {kind.lower(): [name for name, outcome in outcomes.items() if outcome == kind]
             for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    ended = "killed when its time was over" if code is None else f"ended with {code}"
    last = (said.splitlines() or [""])[-1]
    bench.record("tests", ended=ended, summary=last,
                 counts=[f"{len(names)} {kind}" for kind, names in named.items()],
                 why=re.findall(r"^(?:FAILED|ERROR) .*", said, re.M), **named)
    if code != 0:
        raise RuntimeError(f"pytest {ended}: {last}; see tests.log")


def outcomes_of(said: str) -> dict[str, str]:
    """Test -> its last outcome in what pytest -v -rA printed, with xdist's workers or without."""
    kinds, found = "(PASSED|FAILED|ERROR|SKIPPED)", {}
    for line in said.splitlines():
        before = re.search(rf"\b{kinds} (?:tests/)?test_cuda\.py::(\S+)", line)
        after = re.match(rf"(?:tests/)?test_cuda\.py::(\S+) {kinds}\b", line)
        if before:
            found[before[2]] = before[1]
        elif after:
            found[after[1]] = after[2]
    return found


# ---- the run

COMPILED = ("ours, compiled", "transformers, compiled", "nanoGPT, compiled")
MUON = "ours, Muon, compiled"
# what a part, of the stage before the comma, may take of the time; the important ones come first
PARTS: dict[str, tuple[Callable, float]] = {
    "environment": (environment, 0.02),
    "ceilings": (ceilings, 0.03),
    "step, compiled": (partial(step, divisor=1, names=COMPILED), 0.26),
    "step, eager": (partial(step, divisor=1, names=("ours, eager", "transformers, eager")), 0.06),
    "short, compiled": (partial(step, divisor=4, names=(COMPILED[0], MUON, *COMPILED[1:])), 0.19),
    "short, eager": (partial(step, divisor=4, names=("ours, eager",)), 0.03),
    "memory, eager": (partial(memory, compiled=False), 0.06),
    "memory, compiled": (partial(memory, compiled=True), 0.06),
    "decode, batch 1": (partial(decode, batch=1), 0.07),
    "decode, batch 16": (partial(decode, batch=16), 0.07),
    "save": (save, 0.05),
    "tests": (tests, 0.1)}


def inside(bench: Bench, name: str, function: Callable) -> None:
    """A part in a process and a process group of its own; it records how it ended."""
    parent = os.getppid()
    os.setsid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.killpg(0, signal.SIGKILL)  # the script was killed: nothing goes on without it

    threading.Thread(target=follow, daemon=True).start()
    begin, state, why = time.perf_counter(), "done", ""
    try:
        function(bench)
    except Exception as error:
        state, why = "failed", parallel.why_not(error)
        traceback.print_exc()
    bench.record("stages", stage=name, state=state, seconds=time.perf_counter() - begin, why=why)


def conduct(bench: Bench, name: str, function: Callable, limit: float) -> None:
    """Run a part for at most `limit` seconds. torch is loaded once, and CUDA never used here: a
    process forked after that could not use it."""
    bench.part_ends, bench.reserve = time.time() + limit, min(3.0, 0.1 * limit)
    process = multiprocessing.get_context("fork").Process(
        target=inside, args=(bench, name, function))
    process.start()
    try:
        process.join(limit)
        code = process.exitcode
    finally:  # also what it had started, and if Ctrl-C ends the script
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join(5)
    if code != 0:
        why = f"its {limit:.0f} s were over" if code is None else f"its process ended with {code}"
        bench.record("stages", stage=name, state="stopped", why=why)


def find_device(wanted: str) -> tuple[str, str]:
    """(device, its name) of what a config asks for. UserError if it is not there."""
    device = parallel.pick_device(wanted)
    if device == "cpu":
        return device, "CPU, a rehearsal"
    return device, torch.cuda.get_device_name()


def ask_for_device(wanted: str) -> tuple[str, str]:
    """find_device() in a process of its own, since CUDA must not be used in this one."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(find_device, (wanted,)).get(120)
        except multiprocessing.TimeoutError:
            raise UserError("the device does not answer within 120 s") from None


def main(command: CommandLine) -> int:
    """Run the parts in order; the exit code."""
    flags: Any = command.flags
    stages = dict.fromkeys(name.split(",")[0] for name in PARTS)
    only = [name for name in flags.only.split(",") if name] or list(stages)
    if command.files:
        raise UserError(f"found {command.files[0]}; a config file is named with --config=FILE")
    if unknown := [name for name in only if name not in stages]:
        raise UserError(f"--only: no stage {unknown[0]}; there are {', '.join(stages)}")
    if flags.nanogpt and not os.path.isfile(flags.nanogpt):
        raise UserError(f"--nanogpt: no file {flags.nanogpt}")
    if not os.path.isfile(flags.config) and (ROOT / flags.config).is_file():
        flags.config = str(ROOT / flags.config)
    bench = Bench(flags, *ask_for_device(parse([flags.config], "").config.device))
    bench.out.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if bench.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    to_come = {name: part for name, part in PARTS.items() if name.split(",")[0] in only}
    while to_come:
        whole = sum(share for _, share in to_come.values())
        name = next(iter(to_come))
        function, share = to_come.pop(name)
        left = bench.deadline - time.time() - 1
        if left > 1:
            conduct(bench, name, function, left * share / whole)
        else:
            bench.record("stages", stage=name, state="skipped", why="no time is left")
        if name.startswith(("step", "short")):
            summarise(bench)
    print("\n" + markdown(bench.rows()) + f"-> {bench.out}/results.md", flush=True)
    return int(any(row.get("state", "done") != "done" or "not measured" in row.get("note", "")
                   for row in bench.rows()))


if __name__ == "__main__":
    run_command(main, COMMAND)
