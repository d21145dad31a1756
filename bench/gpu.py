"""What one GPU does with this code: python bench/gpu.py [--minutes=9] [--text F ...]

Stages, each in a process of its own: the environment; the CUDA tests; training throughput and MFU
of config/llama100m.py's model beside transformers' LlamaForCausalLM; peak memory by micro-batch;
decoding; and, for the minutes that are left, a training run on the given text with samples, scores
and a report. Rows are added to OUT/results.jsonl as soon as they are measured and shown in
OUT/results.md: a kill loses nothing. OUT/run_* is the run, a few MB; its checkpoints lie in
out/bench/. A stage that fails, or for which no time is left, says so and the next one begins.

--rehearse does all of it with tiny sizes on the CPU. Exit codes: 0; 1 a stage failed; 2 the input.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from model import IGNORE, Linear, LLaMA, flops_per_token, initialise
from plainllama import parallel, settings
from plainllama.command import CommandLine, parse, parse_arguments, run_command
from plainllama.generation import generate
from plainllama.parallel import World
from plainllama.settings import UserError, key
from plainllama.tokens.rows import Batch
from plainllama.training import log, optim
from plainllama.training.engine import Engine, architecture
from plainllama.weights.huggingface import config_json


@dataclass
class Flags:
    """What bench/gpu.py takes; further words are further files of --text."""

    minutes: float = key(9.0, "end within this time", low=0.1)
    out: str = key("bench/results", "the folder for the results")
    text: str = key("", "text for the run: .txt or .jsonl, also .gz or .xz (none: embedded)")
    tokenizer: str = key("auto", "of the run; auto: mistral, gpt2 or bpe:16384, as can be had")
    only: str = key("", "some of tests,step,memory,decode,train (empty: all)")
    rehearse: bool = key(False, "tiny sizes on the CPU")


if __name__ == "__main__":  # --help and a misspelt option are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import hashlib
import json
import multiprocessing
import os
import subprocess
import time
import traceback
from importlib.metadata import distributions
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

PROMPTS = ("", "The history of", "In the year 1905", "Water is", "def ")
PACKAGES = ("torch", "transformers", "triton", "xformers", "numpy", "tokenizers")
NVIDIA_SMI = ("nvidia-smi --format=csv,noheader --query-gpu="
              "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu")


class Bench:
    """What the stages share: sizes, time and the file of results."""

    def __init__(self, flags: Any, text: list[str]):
        self.flags, self.text, self.tiny = flags, text, flags.rehearse
        self.name = time.strftime("%Y%m%d-%H%M%S")  # of this use of the script
        self.deadline = self.stage_ends = time.time() + 60 * flags.minutes
        self.out = Path(flags.out).absolute()
        self.config_file = str(ROOT / f"config/bench_{'tiny' if self.tiny else 'gpu'}.py")
        self.config = parse([self.config_file], "").config
        self.config.vocab_size = self.config.vocab_size or 32000  # Mistral's
        self.shape = architecture(self.config)
        self.world = World(0, 1, "cpu" if self.tiny else "cuda")

    def record(self, table: str, **fields) -> None:
        """Add a row to results.jsonl, print it, and write results.md anew."""
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, "run": self.name, **fields}) + "\n")
        print(f"{table}: " + ", ".join(f"{k} {shown(k, v)}" for k, v in fields.items()), flush=True)
        (self.out / "results.md").write_text(markdown(self.rows(everyone=True)), encoding="utf-8")

    def rows(self, table: str = "", everyone: bool = False) -> list[dict]:
        """The rows of a table or of all, of this use of the script or of every one."""
        rows = map(json.loads, (self.out / "results.jsonl").read_text().splitlines())
        return [row for row in rows
                if table in ("", row["table"]) and (everyone or row["run"] == self.name)]

    def script(self, *words: str, ok: tuple = (0,), **env: str) -> str:
        """Run python with these words; what it prints is added to commands.log and given back."""
        with open(self.out / "commands.log", "a+b") as file:
            start = file.tell()
            done = subprocess.run([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT,
                                  timeout=self.stage_ends - time.time(), env={**os.environ, **env})
            file.seek(start)
            said = file.read().decode(errors="replace")
        if done.returncode not in ok:
            raise RuntimeError(f"{words[0]} ended with {done.returncode}: {said[-300:]}")
        return said


def shown(name: str, value: Any) -> str:
    """A value as the tables show it."""
    if isinstance(value, list):
        return ", ".join(shown(name, one) for one in value)
    if not isinstance(value, int | float):
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


# ---- the machine

def environment(bench: Bench) -> None:
    """The machine and the versions."""
    if not (bench.tiny or torch.cuda.is_available()):
        raise UserError("torch sees no CUDA device; --rehearse goes through it all on the CPU")
    found = {one.name.lower(): one.version for one in distributions()}
    card = None if bench.tiny else torch.cuda.get_device_properties(0)
    bench.record("environment", device=card.name if card else "CPU, a rehearsal",
                 memory_bytes=card.total_memory if card else None, cores=os.cpu_count(),
                 versions=[f"{name} {found.get(name, '(none)')}" for name in PACKAGES],
                 cuda=torch.version.cuda, git=log.git_state().get("commit"),
                 nvidia_smi=subprocess.getoutput(NVIDIA_SMI) if card else None)


def tests(bench: Bench) -> None:
    """The tests that only a GPU can run."""
    visible = "" if bench.tiny else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    said = bench.script("-m", "pytest", "-m", "", "-rfEs", "-p", "no:cacheprovider",
                        str(ROOT / "tests/test_cuda.py"), ok=(0, 1),
                        CUDA_VISIBLE_DEVICES=visible).splitlines()
    named = [line.split(": ", 1)[-1] if line.startswith("SKIPPED") else line for line in said
             if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    bench.record("tests", summary=said[-1], notes=list(dict.fromkeys(named)))
    if "failed" in said[-1] or "error" in said[-1]:
        raise RuntimeError(f"{said[-1]}; see commands.log")


# ---- the two implementations

def our_model(bench: Bench) -> LLaMA:
    """The model with its first weights, as train.py makes it."""
    with torch.device("meta"):
        model = LLaMA(bench.shape)
    bench.world.place(model, parallel.pick_dtype("auto", bench.world.device))
    initialise(model, bench.config.seed, bench.world.piece)
    return model


def their_model(bench: Bench) -> Any:
    """transformers' LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**config_json(bench.shape, None, None)))
    model.load_state_dict(our_model(bench).state_dict())
    return model.to(bench.world.device)


MODELS = {"ours": our_model, "transformers": their_model}


def present(bench: Bench, table: str) -> list[str]:
    """The implementations that can be measured here; of another the table says so."""
    if find_spec("transformers"):
        return list(MODELS)
    bench.record(table, arm="transformers", note="not measured: it is not installed")
    return ["ours"]


class Contender:
    """One implementation in training: fp32 weights, bf16 matmuls where native, fused AdamW. Ours is
    the engine that train.py drives; theirs gets the same optimizer, clipping and guard."""

    def __init__(self, bench: Bench, name: str):
        self.name, self.bench, before = name, bench, torch.cuda.memory_allocated()
        if name == "ours":
            self.engine = Engine(replace(bench.config, micro_batch=1), bench.world, 0)
            self.model, self.optimizer = self.engine.model, self.engine.optimizer
        else:
            self.model = MODELS[name](bench)
            self.optimizer = optim.make(self.model, bench.config)
        self.own = torch.cuda.memory_allocated() - before  # bytes of weights and moments
        self.forward: dict[bool, Any] = {False: self.model}  # compiled?: what to call

    def update(self, compiled: bool, x: torch.Tensor) -> torch.Tensor:
        """One training step on rows x (B, T), T - 1 targets each; the mean loss."""
        run, config = self.forward[compiled], self.bench.config
        if self.name == "ours":
            y = torch.cat((x[:, 1:], torch.full_like(x[:, :1], IGNORE)), 1)
            self.engine.module, self.engine.micro = run, len(x)
            targets = y.numel() - len(y)
            return self.engine.update(Batch(x, y, None), config.min_lr, targets)[0] / targets
        dtype = parallel.pick_dtype("auto", x.device)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = run(input_ids=x, labels=x, use_cache=False).loss  # autocast keeps fp32 weights
        loss.backward()
        norm = self.bench.world.square_norm(self.model).sqrt()
        optim.step(self.optimizer, config.min_lr, norm, config.grad_clip)
        self.optimizer.zero_grad()
        return loss.detach()

    def speed(self, compiled: bool, micro: int, steps: int) -> float:
        """Tokens per second of `steps` updates on ids that lie on the device. Keeps the last loss
        and the most bytes of tensors, as if this implementation were alone on the device."""
        config, device = self.bench.config, self.bench.world.device
        x = torch.randint(config.vocab_size, (4, micro, config.block_size), device=device)
        others = torch.cuda.memory_allocated() - self.own
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(steps):
            loss = self.update(compiled, x[i % 4])
        self.loss = loss.item()  # comes when all that was asked of the device is done
        seconds = time.perf_counter() - begin
        self.peak = torch.cuda.max_memory_allocated() - others or None
        return steps * x[0].numel() / seconds


# ---- training steps and decoding

def sweep(one: Contender, table: str, powers: range) -> int:
    """Record speed and peak memory, eager, by micro-batch while memory lasts; the fastest one."""
    best = (0.0, 0)
    for micro in (2**power for power in powers):
        try:
            one.speed(False, micro, 1)
            best = max(best, (speed := one.speed(False, micro, 4), micro))
        except torch.OutOfMemoryError:
            one.bench.record(table, arm=one.name, micro_batch=micro, note="out of memory")
            break
        one.bench.record(table, arm=one.name, micro_batch=micro, tokens_per_second=speed,
                         peak_bytes=one.peak, weights_and_moments_bytes=one.own or None)
    return best[1]


def step(bench: Bench, names: tuple = ()) -> None:
    """Training throughput, MFU and memory, eager and compiled, at each one's best micro-batch."""
    arms: dict = {}
    dtype = str(parallel.pick_dtype("auto", bench.world.device))[6:]
    for name in names or present(bench, "step"):
        one = Contender(bench, name)
        matmuls = dtype if name == "ours" or dtype == "float32" else f"{dtype} by autocast"
        micro = sweep(one, "micro-batches, eager", range(3, 7))
        backend = "eager" if bench.tiny else "inductor"  # inductor takes longer than a rehearsal
        one.forward[True] = torch.compile(one.model, backend=backend)
        for compiled in (False, True):
            arm, begin = f"{name} {'compiled' if compiled else 'eager'}", time.perf_counter()
            try:
                one.speed(compiled, micro, 1)
                first, speed = time.perf_counter() - begin, one.speed(compiled, micro, 3)
            except Exception as error:  # no compiler, no memory: the others are measured
                bench.record("step", arm=arm, note=f"not measured: {error!r:.300}")
                continue
            turn = (0.05 if bench.tiny else 1.5) * speed / micro / bench.config.block_size
            arms[arm] = (one, (compiled, micro, max(2, round(turn))), [], {
                "micro_batch": micro, "peak_bytes": one.peak, "first_step_seconds": first,
                "matmuls": matmuls,
                "compiler": f"dynamo, {backend}" if compiled else None})
    for _ in range(5):  # A B C D A B C D ...: what drifts, drifts for all
        for one, arguments, speeds, _ in arms.values():
            speeds.append(one.speed(*arguments))
    peak = log.peak_flops(bench.world.device)
    flops = flops_per_token(bench.shape, bench.config.block_size)
    for arm, (one, _, speeds, about) in arms.items():
        mfu = median(speeds) * flops / peak if peak else None
        bench.record("step", arm=arm, tokens_per_second=median(speeds), mfu=mfu, **about,
                     rounds_tokens_per_second=speeds, last_loss=one.loss)
    for a, b in (("ours compiled", "transformers compiled"), ("ours eager", "transformers eager"),
                 ("ours compiled", "ours eager")):
        if a in arms and b in arms:
            each = sorted(x / y for x, y in zip(arms[a][2], arms[b][2], strict=True))
            bench.record("ratios of tokens per second", ratio=f"{a} / {b}", median=median(each),
                         lowest=each[0], highest=each[-1])


def memory(bench: Bench) -> None:
    """Peak memory of a training step of ours by micro-batch, up to what does not fit."""
    sweep(Contender(bench, "ours"), "memory, eager", range(9))


def reading_speed(device: torch.device) -> float:
    """Measure the bytes per second at which the device adds up a large tensor: what decoding could
    reach."""
    numbers, least = torch.ones(1 << 26, device=device), float("inf")
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


class Times:
    """Notes when the first token came."""

    first = 0.0

    def note(self, row: int, token: int) -> bool:
        """Watch generate(), and end no text."""
        self.first = self.first or time.perf_counter()
        return False


def decode(bench: Bench) -> None:
    """Greedy decoding: generate.generate beside transformers' generate."""
    new, device = 16 if bench.tiny else 128, bench.world.device
    greedy = settings.Sampling(temperature=0)
    models: dict = {name: MODELS[name](bench).eval() for name in present(bench, "decode")}
    for model in models.values():  # ours: the matrices alone, as sample.py loads a checkpoint
        for part in [m for m in model.modules() if isinstance(m, Linear)] or [model]:
            part.to(parallel.pick_dtype("auto", device))
    best = reading_speed(device)
    for batch in (1, 16):
        ids = torch.randint(bench.config.vocab_size, (batch, 32), device=device)
        share: dict = {}
        arms: dict = {name: (model, None) for name, model in models.items()}
        if device.type == "cuda" and (compiled := generate.compile_step(
                models["ours"], batch, 32 + new, must=False)):
            arms["ours compiled"] = models["ours"], compiled
        speeds: dict = {name: [] for name in arms}
        for name, (model, compiled) in [*arms.items()] * 4:
            begin, times = time.perf_counter(), Times()
            if name != "transformers":
                made = generate.generate(model, ids.tolist(), new, greedy, [0] * batch,
                                         watch=times.note, compiled=compiled)
                count = sum(len(text) for text, _ in made)
                read = bytes_read(model, batch, 32, new, bool(compiled))
                share[name] = read / (time.perf_counter() - times.first) / best
            else:
                made = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0,
                                      do_sample=False, min_new_tokens=new, max_new_tokens=new)
                count = sum(len(text) - 32 for text in made.tolist())
            speeds[name].append(count / (time.perf_counter() - begin))
        for name, (_, *rounds) in speeds.items():  # the first one warms up
            bench.record("decode", arm=name, batch=batch, prompt_tokens=32, new_tokens=new,
                         tokens_per_second=median(rounds), rounds_tokens_per_second=rounds,
                         share_of_reading_speed=share.get(name))


# ---- the run

def prepared(bench: Bench) -> tuple[str, str]:
    """(name, tokenizer) of a data set of the text, with the first tokenizer that can be had."""
    sources, kinds = bench.text or bench.config.sources, [bench.flags.tokenizer]
    sources = [sources] if isinstance(sources, str) else sources
    if kinds == ["auto"]:
        kinds = ["bytes"] if bench.tiny else ["mistral", "gpt2", "bpe:16384"]
    for kind in kinds:
        name = f"bench_{hashlib.sha256(repr((sources, kind)).encode()).hexdigest()[:8]}"
        said = bench.script(str(ROOT / "prepare.py"), bench.config_file, f"--dataset={name}",
                            f"--sources={sources!r}", f"--tokenizer={kind}", ok=(0, 2))
        if "error: " not in said:
            return name, kind
    raise RuntimeError(f"prepare.py: {said[-300:]}")


def training(bench: Bench) -> None:
    """As many steps as fit, so that the cosine of the learning rate ends with the time."""
    folder, keep = bench.out / f"run_{bench.name}", Path("out/bench", bench.name).absolute()
    folder.mkdir()
    (keep / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints").symlink_to(keep / "checkpoints")  # OUT stays small, also when killed
    dataset, kind = prepared(bench)
    if not any("mfu" in row for row in bench.rows("step")):
        step(bench, ("ours",))  # how fast will it be?
        torch.cuda.empty_cache()
    speed, micro, arm = max((row["tokens_per_second"], row["micro_batch"], row["arm"]) for row in
                            bench.rows("step") if "mfu" in row and row["arm"].startswith("ours"))
    reserve = 15 if bench.tiny else 60  # before the first step, and again after the last
    seconds = bench.deadline - time.time() - 2 * reserve
    steps = int(0.95 * seconds * speed / bench.config.global_batch_tokens)
    steps = min(steps, 20) if bench.tiny else steps
    if steps < 10:
        raise TimeoutError(f"{seconds:.0f} s are left for training: too few")
    begin = time.perf_counter()
    bench.script(str(ROOT / "train.py"), bench.config_file, f"--dataset={dataset}",
                 f"--out_dir={folder}", f"--max_steps={steps}", f"--warmup_steps={steps // 20}",
                 f"--max_minutes={(seconds + reserve) / 60}", f"--micro_batch={micro}",
                 f"--log_interval={1 + steps // 100}", f"--eval_interval={1 + steps // 8}",
                 f"--save_interval={steps}", *(["--compile=false"] if "eager" in arm else []),
                 ok=(0, train.STOPPED))
    minutes = (time.perf_counter() - begin) / 60
    (keep / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    where = [f"--ckpt={folder}", f"--device={bench.world.device.type}"]
    bench.script(str(ROOT / "sample.py"), *where, f"--prompts={keep}/prompts.jsonl", "--save",
                 f"--out={keep}/samples.jsonl", f"--max_new_tokens={16 if bench.tiny else 200}")
    bench.script(str(ROOT / "eval.py"), *where, "--tasks=")
    bench.script(str(ROOT / "report.py"), str(folder))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    run, status, score = (json.loads(next(folder.glob(name)).read_text())
                          for name in ("run.json", "status.json", "eval/step_*.json"))
    last = {name: value for row in [*metrics, score, status] for name, value in row.items()}
    wanted = ("state", "step", "tokens", "val_loss", "val_bpb", "mfu", "peak_memory_bytes")
    bench.record("train", **{name: last[name] for name in wanted}, planned_steps=steps,
                 tokens_per_second=median(row["tokens_per_second"] for row in metrics[1:]
                                          if "loss" in row), minutes=minutes, tokenizer=kind,
                 epochs=last["tokens"] / run["data"]["train_tokens"], folder=folder.name,
                 text=[os.path.basename(path) for path in bench.text] or "embedded")


# ---- the command

# name: (function, share of the time that it may take, seconds under which it does not begin)
STAGES = {"environment": (environment, 0.1, 0), "tests": (tests, 0.25, 30),
          "step": (step, 0.35, 60), "memory": (memory, 0.1, 20), "decode": (decode, 0.15, 30),
          "train": (training, 1.0, 200)}


def inside(bench: Bench, name: str, function) -> None:
    """A stage in its own process, which records how it ended."""
    begin, state, why = time.perf_counter(), "done", ""
    try:
        function(bench)
    except (UserError, TimeoutError) as error:
        state, why = "failed", str(error)
    except Exception as error:
        state, why = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    bench.record("stages", stage=name, state=state, seconds=time.perf_counter() - begin, why=why)


def conduct(bench: Bench, name: str, function, limit: float) -> None:
    """Run a stage for at most `limit` seconds. torch is loaded once; the parent avoids CUDA."""
    bench.stage_ends = time.time() + limit
    process = multiprocessing.get_context("fork").Process(
        target=inside, args=(bench, name, function))
    process.start()
    process.join(limit + 2)  # its scripts were ended by then
    if process.exitcode != 0:
        over = f"its {limit:.0f} s were over" if process.exitcode is None else ""
        process.kill()
        bench.record("stages", stage=name, state="stopped",
                     why=over or f"its process ended with {process.exitcode}")


def main(command: CommandLine) -> int:
    """Run the stages in order; the exit code."""
    flags: Any = command.flags
    text = [os.path.abspath(path) for path in (flags.text, *command.files) if path]
    names = ["environment", *(flags.only.split(",") if flags.only else STAGES)]
    if missing := [path for path in text if not os.path.isfile(path)]:
        raise UserError(f"--text: no file {missing[0]}")
    if unknown := set(names) - set(STAGES):
        raise UserError(f"--only: no stage {unknown.pop()}; there are {', '.join(STAGES)}")
    bench = Bench(flags, text)
    bench.out.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if bench.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    for name, (function, share, least) in STAGES.items():
        left = bench.deadline - time.time() - 3
        if name in names and left < least * (0.1 if bench.tiny else 1):
            why = f"{left:.0f} s are left, it needs {least}"
            bench.record("stages", stage=name, state="skipped", why=why)
        elif name in names:
            conduct(bench, name, function, min(share * 60 * flags.minutes, left))
        if bench.rows("stages")[0]["state"] != "done":
            raise UserError(bench.rows("stages")[0]["why"])
    print("\n" + markdown(bench.rows()) + f"-> {bench.out}/results.md", flush=True)
    return int(any(row["state"] in ("failed", "stopped") for row in bench.rows("stages")))


if __name__ == "__main__":
    run_command(main, COMMAND)
