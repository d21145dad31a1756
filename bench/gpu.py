"""What one GPU does with this code: python bench/gpu.py [--minutes=9] [--text F ...]

Six stages, each in a process of its own: the environment; the CUDA tests; training throughput and
MFU of config/llama100m.py's model beside transformers' LlamaForCausalLM; peak memory by
micro-batch; decoding; and, for the minutes that are left, a training run on the given text with
samples, scores and a report. Rows are added to OUT/results.jsonl as soon as they are measured and
shown in OUT/results.md, so that a kill loses nothing. OUT/run_* is the run, a few MB without its
checkpoints, which lie in out/bench/. A stage that fails, or for which no time is left, says so.

--rehearse does all of it with tiny sizes on the CPU. Exit codes: 0, 1 if a stage failed, 2 input.
"""
# ruff: noqa: E402

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import settings
from settings import Settings, UserError, key


@dataclass
class Flags:
    """What bench/gpu.py takes; further words are further files of --text."""

    minutes: float = key(9.0, "end within this time", low=0.1)
    out: str = key("bench/results", "the folder for the results")
    text: object = key("", "text for the run: .txt, .jsonl, also .gz or .xz (none: embedded)")
    tokenizer: str = key("auto", "of the run; auto: mistral, gpt2 or bpe:16384, as can be had")
    only: str = key("", "some of tests,step,memory,decode,train (empty: all)")
    rehearse: bool = key(False, "tiny sizes on the CPU")


if __name__ == "__main__":  # --help and a misspelt option are answered before torch is loaded
    COMMAND = settings.command(__doc__, Flags, takes="files")

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import time
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import checkpoint
import log
import optim
import sample
import tokenizer
import train
from model import IGNORE, Linear, LLaMA, flops_per_token
from parallel import World

CONFIG = str(ROOT / "config/llama100m.py")
TINY = ("--n_layer=2", "--n_head=2", "--d_model=32", "--d_ff=64", "--block_size=64",
        "--global_batch_tokens=512")
BATCH = "--global_batch_tokens=65536"  # of the run: minutes need many small steps, not few big ones
PROMPTS = ("", "The history of", "In the year 1905", "Water is", "def ")


@dataclass(frozen=True)
class Bench:
    """What all stages share: sizes, time and the file of results."""

    name: str  # of this run of the script: when it began
    out: Path
    deadline: float  # unix time
    rehearse: bool
    text: tuple
    tokenizer: str

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of the matmuls: what train.py takes on this device."""
        return train.pick_dtype("auto", self.device)

    @property
    def micro_batches(self) -> tuple:
        """Rows per pass that are tried."""
        return (1, 2) if self.rehearse else (4, 8, 16, 32, 64)

    def config(self) -> Settings:
        """The config of the model that is measured."""
        words = [*TINY, "--vocab_size=258"] if self.rehearse else ["--vocab_size=32000"]
        return settings.parse([CONFIG, *words], "").config

    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.time()

    def record(self, table: str, **fields) -> None:
        """Add a row to results.jsonl, show it, and write results.md anew."""
        row = {"run": self.name, "table": table, **fields}
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        cells = (f"{name} {shown(name, value)}" for name, value in fields.items())
        print(f"[{table}] {', '.join(cells)}", flush=True)
        names = dict.fromkeys(row["run"] for row in rows_of(self.out))
        text = "\n\n".join(markdown(self.out, name) for name in names)
        (self.out / "results.md").write_text(text + "\n", encoding="utf-8")

    def mine(self, table: str) -> list[dict]:
        """The rows that this run of the script has written to a table."""
        return [row for row in rows_of(self.out, self.name) if row["table"] == table]


# ---- results

def rows_of(out: Path, name: str = "") -> list[dict]:
    """The rows of results.jsonl, of one run of the script or of all."""
    if not (out / "results.jsonl").exists():
        return []
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if name in ("", row["run"])]


def shown(name: str, value: Any) -> str:
    """A value as the tables show it."""
    if isinstance(value, list):
        return ", ".join(shown(name, one) for one in value)
    if value is None or isinstance(value, str | bool):
        return "n/a" if value is None else " ".join(str(value).split()).replace("|", "\\|")
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    if name == "mfu":
        return f"{value:.1%}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def markdown(out: Path, name: str) -> str:
    """The tables of one run of the script."""
    rows = rows_of(out, name)
    parts = [f"## {name}"]
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [{k: v for k, v in row.items() if k not in ("run", "table")}
                for row in rows if row["table"] == table]
        heads = list(dict.fromkeys(k for row in mine for k in row))
        if len(mine) == 1 and len(heads) > 6:  # a single long row is easier to read upright
            mine, heads = [{table: k, "": shown(k, v)} for k, v in mine[0].items()], [table, ""]
        lines = [heads, ["---"] * len(heads),
                 *([shown(k, row[k]) if k in row else "" for k in heads] for row in mine)]
        parts.append(f"### {table}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


# ---- stages

def environment(bench: Bench) -> None:
    """The machine and the versions."""
    from importlib.metadata import PackageNotFoundError, version

    if not bench.rehearse and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no CUDA device; --rehearse runs tiny "
                        "sizes on the CPU")
    versions: dict = {}
    for package in ("transformers", "triton", "xformers", "numpy", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name, memory = platform.processor() or platform.machine(), None
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    smi = "not read"
    if not bench.rehearse:
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            smi = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], timeout=20,
                                 capture_output=True, text=True, check=True).stdout.strip()
    bench.record("environment", device=name, memory_bytes=memory, cores=os.cpu_count(),
                 torch=torch.__version__, cuda=torch.version.cuda, nvidia_smi=smi,
                 python=platform.python_version(), **versions,
                 code=log.git_state().get("commit", "not a git checkout"),
                 edited=log.git_state().get("dirty"), rehearsal=bench.rehearse)


def tests(bench: Bench) -> None:
    """The tests that only a GPU can run."""
    if not (ROOT / "tests/test_cuda.py").exists():
        raise FileNotFoundError("tests/test_cuda.py is not here")
    visible = "" if bench.rehearse else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "", "tests/test_cuda.py", "-q", "-rfEs", "-p",
         "no:cacheprovider"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": visible})
    (bench.out / "tests.log").write_text(done.stdout, encoding="utf-8")
    lines = done.stdout.strip().splitlines() or ["no output"]
    named = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    bench.record("tests", summary=lines[-1].strip("= "), exit_code=done.returncode, notes=named)
    if done.returncode:
        raise RuntimeError(f"tests/test_cuda.py: {lines[-1]}; see tests.log")


class Contender:
    """One implementation in training: fp32 weights, matmuls in bench.dtype, fused AdamW."""

    def __init__(self, bench: Bench, name: str):
        self.name, self.bench, self.world = name, bench, World(0, 1, bench.device.type)
        self.config = bench.config()
        before = allocated(bench)
        self.model: Any = (our_model if name == "ours" else their_model)(bench)
        self.optimizer = optim.make(self.model, self.config)  # the same for both
        self.own = allocated(bench) - before
        # a rehearsal has no time for inductor: dynamo traces the model and runs it as it is
        self.compiled = torch.compile(self.model, backend="eager" if bench.rehearse else "inductor")
        self.loss = math.nan

    def update(self, compiled: bool, x: Tensor) -> Tensor:
        """One training step on rows x (B, T), T - 1 targets each; the mean loss."""
        run = self.compiled if compiled else self.model
        if self.name == "ours":
            y = torch.cat((x[:, 1:], torch.full_like(x[:, :1], IGNORE)), 1)
            loss = run(x, y) / (y != IGNORE).sum()
        else:  # what its users get with fp32 weights: autocast
            with torch.autocast(x.device.type, self.bench.dtype,
                                enabled=self.bench.dtype != torch.float32):
                loss = run(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        norm = self.world.square_norm(self.model).sqrt()
        optim.step(self.optimizer, self.config.min_lr, norm, self.config.grad_clip)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def speed(self, compiled: bool, micro: int, steps: int) -> float:
        """Tokens per second of `steps` updates; data waits on the device."""
        generator = torch.Generator().manual_seed(steps)
        size = micro, self.config.block_size
        batches = [torch.randint(self.config.vocab_size, size, generator=generator)
                   .to(self.bench.device) for _ in range(min(steps, 4))]
        wait(self.bench)
        begin = time.perf_counter()
        for i in range(steps):
            loss = self.update(compiled, batches[i % len(batches)])
        wait(self.bench)
        self.loss = loss.item()
        return steps * micro * size[1] / (time.perf_counter() - begin)

    def peak(self, compiled: bool, micro: int) -> int | None:
        """Most bytes of tensors in two updates, as if this implementation were alone."""
        if self.bench.device.type != "cuda":
            return None
        others = allocated(self.bench) - self.own
        torch.cuda.reset_peak_memory_stats()
        self.speed(compiled, micro, 2)
        return log.peak_memory(self.bench.device) - others


def step(bench: Bench) -> None:
    """Training throughput, MFU and memory: ours and transformers', eager and compiled."""
    contenders, arms = [Contender(bench, "ours")], {}
    try:
        contenders.append(Contender(bench, "transformers"))
    except ImportError as error:
        bench.record("step", arm="transformers", note=f"not measured: {error}")
    for one in contenders:
        best = (0.0, 0)
        for micro in bench.micro_batches:
            try:
                one.speed(False, micro, 1)
                speed = one.speed(False, micro, 5)
                bench.record("micro-batches, eager", arm=one.name, micro_batch=micro,
                             tokens_per_second=speed, peak_bytes=one.peak(False, micro))
                best = max(best, (speed, micro))
            except torch.OutOfMemoryError:
                bench.record("micro-batches, eager", arm=one.name, micro_batch=micro,
                             note="out of memory")
                break
        for compiled in (False, True):
            name = f"{one.name} {'compiled' if compiled else 'eager'}"
            begin = time.perf_counter()
            try:
                one.speed(compiled, best[1], 1)
                first = time.perf_counter() - begin
                speed = one.speed(compiled, best[1], 3)
                about = {"micro_batch": best[1], "first_step_seconds": first,
                         "peak_bytes": one.peak(compiled, best[1])}
            except Exception as error:  # no compiler, no memory: the others are measured all the same
                bench.record("step", arm=name, note=f"not measured: {error!r:.300}")
                continue
            seconds = 0.1 if bench.rehearse else 1.5
            steps = max(2, round(seconds * speed / best[1] / one.config.block_size))
            arms[name] = (one, compiled, steps, about, [])
    for _ in range(5):  # A B C D A B C D ...: what drifts, drifts for all
        for one, compiled, steps, about, speeds in arms.values():
            speeds.append(one.speed(compiled, about["micro_batch"], steps))
    peak, config = log.peak_flops(bench.device), bench.config()
    flops = flops_per_token(train.model_config(config), config.block_size)
    medians = {name: statistics.median(speeds) for name, (*_, speeds) in arms.items()}
    for name, (one, _, _, about, speeds) in arms.items():
        bench.record("step", arm=name, tokens_per_second=medians[name],
                     mfu=medians[name] * flops / peak if peak else None, **about,
                     rounds_tokens_per_second=speeds, last_loss=one.loss)
    for a, b in (("ours compiled", "transformers compiled"), ("ours eager", "transformers eager"),
                 ("ours compiled", "ours eager")):
        if a in arms and b in arms:
            each = [x / y for x, y in zip(arms[a][-1], arms[b][-1], strict=True)]
            bench.record("ratios of tokens per second", ratio=f"{a} / {b}",
                         of_medians=medians[a] / medians[b], lowest=min(each), highest=max(each))


def memory(bench: Bench) -> None:
    """Peak memory of a training step of ours, eager, for every micro-batch that fits."""
    ours = Contender(bench, "ours")
    for power in range(2 if bench.rehearse else 9):
        try:
            ours.speed(False, 2 ** power, 1)
            bench.record("memory, eager", micro_batch=2 ** power, peak_bytes=ours.peak(
                False, 2 ** power), weights_and_moments_bytes=ours.own if ours.own else None)
        except torch.OutOfMemoryError:
            bench.record("memory, eager", micro_batch=2 ** power, note="out of memory")
            break


def decode(bench: Bench) -> None:
    """Greedy decoding, tokens per second: sample.generate beside transformers' generate."""
    config, dtype, new = bench.config(), bench.dtype, 16 if bench.rehearse else 128
    ours = our_model(bench).eval()
    for module in ours.modules():
        if isinstance(module, Linear):  # as sample.py loads a checkpoint
            module.weight.data = module.weight.data.to(dtype)
    greedy, theirs = sample.Flags(temperature=0.0), None
    try:
        theirs = their_model(bench).to(dtype).eval()
    except ImportError as error:
        bench.record("decode", arm="transformers", note=f"not measured: {error}")
    for batch in (1, 16):
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(config.vocab_size, (batch, config.block_size // 4), generator=generator)
        there, prompts = ids.to(bench.device), ids.tolist()

        def run(arm: str, there=there, prompts=prompts) -> float:
            wait(bench)
            begin = time.perf_counter()
            if arm == "ours":
                made = sum(len(ids) for ids, _ in sample.generate(
                    ours, prompts, new, greedy, list(range(len(prompts)))))
            else:
                made = theirs.generate(
                    there, attention_mask=torch.ones_like(there), max_new_tokens=new,
                    min_new_tokens=new, do_sample=False, pad_token_id=0)[:, there.shape[1]:].numel()
            wait(bench)
            return made / (time.perf_counter() - begin)

        arms = ["ours", "transformers"] if theirs else ["ours"]
        speeds: dict = {arm: [] for arm in arms}
        for turn in range(4):
            for arm in arms:
                speeds[arm] += [run(arm)] if turn else [run(arm)][:0]  # the first is a warm-up
        for arm in arms:
            bench.record("decode", arm=arm, batch=batch, prompt_tokens=ids.shape[1], new_tokens=new,
                         tokens_per_second=statistics.median(speeds[arm]), dtype=str(dtype)[6:],
                         rounds_tokens_per_second=speeds[arm])


def training(bench: Bench) -> None:
    """The run: as many steps as fit, so that the learning rate's cosine ends with the time."""
    folder, keep = bench.out / f"run_{bench.name}", Path(f"out/bench/{bench.name}").absolute()
    folder.mkdir()
    (keep / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints").symlink_to(keep / "checkpoints")  # OUT stays small, also when killed
    speed, micro, compiled = measured_speed(bench)
    sources: list = list(bench.text) or ["embedded"]
    if bench.rehearse and not bench.text:
        sources = [{"path": "embedded", "max_documents": 40}]
    words = offline_tokenizer() if bench.tokenizer == "auto" else bench.tokenizer
    words = "bytes" if bench.rehearse and bench.tokenizer == "auto" else words
    recipe = repr((sources, words)).encode()
    about = [CONFIG, *(TINY if bench.rehearse else [BATCH]),
             f"--dataset=bench_{hashlib.sha256(recipe).hexdigest()[:8]}"]
    script(folder, "prepare.py", *about, f"--sources={sources!r}", f"--tokenizer={words}")

    begin = 10 if bench.rehearse else 60  # seconds until the first step: imports, compilation
    after = 20 if bench.rehearse else 60  # for the last checkpoint, samples, scores and the report
    seconds = bench.left() - begin - after
    config = settings.parse(about, "").config
    steps = int(0.95 * seconds * speed / config.global_batch_tokens)
    steps = min(steps, 20) if bench.rehearse else steps
    if steps < 10:
        raise TimeoutError(f"{bench.left():.0f} s are left: too few for a run")
    start = time.perf_counter()
    script(folder, "train.py", *about, f"--out_dir={folder}", f"--max_steps={steps}",
           f"--warmup_steps={steps // 20}", f"--micro_batch={micro}", f"--compile={compiled}",
           f"--max_minutes={(seconds + begin) / 60}", f"--log_interval={max(1, steps // 100)}",
           f"--eval_interval={max(1, steps // 8)}", f"--save_interval={steps}",
           f"--eval_tokens={1024 if bench.rehearse else 1 << 19}", "--keep_last=1",
           f"--device={bench.device.type}", ok=(0, train.STOPPED))
    seconds = time.perf_counter() - start
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS)
    (keep / "prompts.jsonl").write_text(prompts)
    there = (f"--ckpt={folder}", f"--device={bench.device.type}")
    script(folder, "sample.py", *there, f"--prompts={keep}/prompts.jsonl", "--top_p=0.95", "--save",
           f"--out={keep}/samples.jsonl", f"--max_new_tokens={16 if bench.rehearse else 200}")
    script(folder, "eval.py", *there, "--tasks=")
    script(folder, "report.py", str(folder))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for row in metrics for name, value in row.items()}
    speeds = [row["tokens_per_second"] for row in metrics if "loss" in row][1:]  # without start-up
    score = json.loads(next((folder / "eval").glob("*.json")).read_text())
    run = json.loads((folder / "run.json").read_text())
    status = json.loads((folder / "status.json").read_text())
    bench.record("train", state=status["state"], step=last["step"], planned_steps=steps,
                 tokens=last["tokens"], epochs=last["tokens"] / run["data"]["train_tokens"],
                 train_minutes=seconds / 60, val_loss=score["val_loss"], val_bpb=score["val_bpb"],
                 last_loss=last["loss"], tokens_per_second=statistics.median(speeds),
                 mfu=last["mfu"], peak_bytes=last["peak_memory_bytes"],
                 parameters=run["parameters"]["total"], tokenizer=words,
                 text=[Path(str(s)).name for s in sources], folder=folder.name)


# ---- helpers of the stages

def wait(bench: Bench) -> None:
    """Until the device has done all that was asked of it."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def allocated(bench: Bench) -> int:
    """Bytes of tensors on the device now."""
    return torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0


def our_model(bench: Bench) -> LLaMA:
    """The model with its first weights, as train.py makes it."""
    world = World(0, 1, bench.device.type)
    with torch.device("meta"):
        model = LLaMA(train.model_config(bench.config()))
    world.place(model, bench.dtype)
    world.initialise(model, 1337)
    return model


def their_model(bench: Bench):
    """transformers' LlamaForCausalLM with the same architecture and weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = our_model(bench)
    config = LlamaConfig(**checkpoint.hf_config(ours.config, None, None))
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).to(bench.device)
    model.load_state_dict(ours.state_dict())
    return model


def measured_speed(bench: Bench) -> tuple[float, int, str]:
    """(tokens per second, micro-batch, --compile) of the run to come: the step stage's or new."""
    found = [row for row in bench.mine("step") if row["arm"][:4] == "ours" and "mfu" in row]
    if not found:
        ours, micro = Contender(bench, "ours"), 2 if bench.rehearse else 16
        ours.speed(not bench.rehearse, micro, 2)  # compiles
        return ours.speed(not bench.rehearse, micro, 10), micro, "auto"
    best = max(found, key=lambda row: row["tokens_per_second"])
    compiled = best["arm"] == "ours compiled" and not bench.rehearse
    return best["tokens_per_second"], best["micro_batch"], str(compiled).lower()


def offline_tokenizer() -> str:
    """The first of mistral and gpt2 that is on this machine, else one trained on the text."""
    for name in ("mistral", "gpt2"):
        with contextlib.suppress(UserError):
            tokenizer.make(name)
            return name
    return "bpe:16384"


def script(folder: Path, name: str, *words: str, ok: tuple = (0,)) -> None:
    """Run a command of the project; what it prints goes to the run's commands.log."""
    with open(folder / "commands.log", "ab") as file:
        done = subprocess.run([sys.executable, str(ROOT / name), *words], stdout=file,
                              stderr=subprocess.STDOUT)
    if done.returncode not in ok:
        lines = (folder / "commands.log").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{name} ended with {done.returncode}: {lines[-1]}")


# ---- the command

# name: (function, share of the time that it may take, seconds under which it does not begin)
STAGES = {"tests": (tests, 0.25, 30), "step": (step, 0.35, 60), "memory": (memory, 0.1, 20),
          "decode": (decode, 0.15, 30), "train": (training, 1.0, 150)}


def inside(function, bench: Bench, problems) -> None:
    """A stage in its own process: what goes wrong is put into the queue."""
    os.setsid()  # its scripts can then be ended with it
    try:
        function(bench)
    except Exception as error:
        problems.put(f"{type(error).__name__}: {error}")
        if not isinstance(error, UserError | TimeoutError):
            import traceback

            traceback.print_exc()
        os._exit(1)


def conduct(bench: Bench, name: str, function, limit: float) -> str:
    """Run a stage for at most `limit` seconds and record how it ended: done, failed or stopped."""
    context = multiprocessing.get_context("fork")  # torch is loaded once; no one has touched CUDA
    problems = context.SimpleQueue()
    process = context.Process(target=inside, args=(function, bench, problems))
    begin = time.perf_counter()
    process.start()
    try:
        process.join(limit)
        state = "stopped" if process.is_alive() else "failed" if process.exitcode else "done"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    why = (f"its {limit:.0f} s were over" if state == "stopped" else
           "" if state == "done" else problems.get() if not problems.empty() else
           f"the process ended with {process.exitcode}")
    bench.record("stages", stage=name, state=state, seconds=time.perf_counter() - begin, why=why)
    return state


def main(command: settings.CommandLine) -> int:
    """Run the stages in order; the exit code."""
    flags: Any = command.flags
    given = flags.text if isinstance(flags.text, list) else [flags.text]
    text = tuple(os.path.abspath(path) for path in [*given, *command.files] if path)
    names = flags.only.split(",") if flags.only else list(STAGES)
    if missing := [path for path in text if not os.path.isfile(path)]:
        raise UserError(f"--text: no file {missing[0]}")
    if unknown := [name for name in names if name not in STAGES]:
        raise UserError(f"--only: no stage {unknown[0]}; there are {','.join(STAGES)}")
    out = Path(flags.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    name, seconds = time.strftime("%Y%m%d-%H%M%S"), flags.minutes * 60
    bench = Bench(name, out, time.time() + seconds, flags.rehearse, text, flags.tokenizer)
    os.environ.update(HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage is ended with us
    states = [conduct(bench, "environment", environment, 60)]
    if states != ["done"]:
        return 2
    for name, (function, share, least) in STAGES.items():
        if name not in names:
            continue
        if bench.left() < (5 if bench.rehearse else least):
            bench.record("stages", stage=name, state="skipped",
                         why=f"{bench.left():.0f} s are left, it needs {least}")
            continue
        states.append(conduct(bench, name, function, min(share * seconds, bench.left() - 2)))
    print("\n" + markdown(out, bench.name) + f"\n\n-> {out}/results.md", flush=True)
    return 1 if {"failed", "stopped"} & set(states) else 0


if __name__ == "__main__":
    settings.run(main, COMMAND)
