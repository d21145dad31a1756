"""Train a LLaMA: python train.py [config/x.py] [--key=value ...]

On several GPUs or nodes: torchrun --nproc_per_node=8 train.py config/x.py. A run goes on from its
newest whole checkpoint when it is started again. Exit codes: 0 done, 2 the input, 75 stopped early
with a whole checkpoint (start me again), 143 on a second signal.
"""

from dataclasses import asdict, dataclass

import settings
from settings import Settings, UserError


@dataclass
class Flags:
    """Options that are not part of a run's config."""

    extend: bool = settings.key(False, "on resume, accept another batch size, length or schedule")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = settings.command(__doc__, Flags)

import gc
import math
import os
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import attention
import checkpoint
import huggingface
import log
import optim
import parallel
import sample
import shards
import tokenizer
from eval import evaluate
from model import IGNORE, LLaMA, ModelConfig, flops_per_token
from parallel import World

STOPPED = 75  # EX_TEMPFAIL: start me again
PATIENCE = 10  # updates in a row with non-finite gradients after which a run gives up
# On resume these must be as they were, or the run would be another one ...
FIXED = ("dataset", "seed", "block_size", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff",
         "rope_theta", "rope_scaling", "rope_factor", "rope_original", "norm_eps",
         "tie_embeddings", "overfit_rows", "optimizer")
# ... and these change the course of the optimisation, so they need --extend.
COURSE = ("global_batch_tokens", "max_steps", "learning_rate", "min_lr", "schedule",
          "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip")


def main(command: settings.CommandLine) -> int:
    """Join the other ranks and train; the exit code."""
    config = command.config
    if problem := attention.refusal(config.attention, parallel.pick_device(config.device)):
        raise UserError(problem)
    if Path(config.out_dir).exists() and not Path(config.out_dir).is_dir():
        raise UserError(f"out_dir {config.out_dir} is a file; name a folder")
    manifest = shards.read_manifest(Path("data") / config.dataset)
    world = parallel.start(config.device, config.parallel)
    try:
        run = Run(command, manifest, world)
        if run.step >= config.max_steps:
            if world.rank == 0:
                print(f"{run.folder} is already complete: step {run.step} of {config.max_steps}")
                log.write_status(run.folder, "done", run.step)
            return 0
        try:
            return run.loop()
        except BaseException:
            run.log.status("failed", run.step)
            raise
    finally:
        world.close()


class Run:
    """One training run: set up by the constructor, trained by loop()."""

    def __init__(self, command: settings.CommandLine, manifest: dict, world: World):
        config = self.config = command.config
        self.world, self.folder = world, Path(config.out_dir)
        self.data, block = Path("data") / config.dataset, config.block_size
        self.data_hash = (self.data / "manifest.sha256").read_text().strip()
        self.rows = shards.Rows(shards.Split(self.data, "train", manifest), block, config.seed,
                                config.overfit_rows)
        self.validation = shards.Rows(shards.Split(self.data, "val", manifest), block, config.seed)
        self.byte_info = tokenizer.byte_info(self.data)
        self.tokenizer, self.prompt = prompt(config, self.data)
        config.vocab_size = vocabulary(config, manifest)

        # where to start, decided by rank 0 for all
        if world.rank == 0 and self.folder.is_dir():
            self.lock = log.lock(self.folder)  # held until the process ends
        source = world.agree(starting_point(self.folder, config) if world.rank == 0 else None)
        state = checkpoint.read_state(source) if source else {}
        if state:
            check_resume(state, config, self.data_hash, command.flags.extend, source)
        self.step = self.first_step = state.get("step", 0)
        self.first_row = state.get("rows", 0)
        if not source and config.init_from:
            source = world.agree(checkpoint.find(config.init_from) if world.rank == 0 else None)
            check_source(source, model_config(config), manifest)
        if self.step >= config.max_steps:
            return  # complete: main says so
        if world.rank == 0 and not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            self.lock = log.lock(self.folder)
        if world.rank == 0 and state:
            checkpoint.set_aside(self.folder, self.step)

        # model and optimizer
        self.dtype = parallel.pick_dtype(config.dtype, world.device)
        with torch.device("meta"):
            self.model = LLaMA(model_config(config))
        world.place(self.model, self.dtype)
        if source:
            checkpoint.load_weights(source, self.model, world)
        else:
            world.initialise(self.model, config.seed)
        self.optimizer = optim.make(self.model, config, world)
        if state:
            checkpoint.load_optimizer(source, self.model, self.optimizer, world)
        on_gpu = world.device.type == "cuda"
        self.compiled = config.compile == "true" or (config.compile == "auto" and on_gpu)
        if self.compiled:
            self.model.compile()  # in place: names in the state dict stay as they are
        self.module = world.wrap(self.model)

        # the batch: `batch_rows` per step, cut into equal micro-batches on every rank
        self.batch_rows = config.global_batch_tokens // block
        share = -(-self.batch_rows // world.size)
        same_split = state.get("world_size") == world.size  # another split gives other bits
        self.micro = min(share, config.micro_batch or (
            state["micro_batch"] if same_split else pick_micro_batch(share, block, world.device)))
        self.accumulate = -(-share // self.micro)
        if world.mode == "ddp":
            # DDP regroups gradients after its first backward, and so adds them in another order:
            # that happens here, at every start, so that a resumed run has the same bits
            ids = torch.zeros(self.micro, block, dtype=torch.long, device=world.device)
            self.module(ids, ids).backward()
            self.optimizer.zero_grad()

        counts = self.model.parameter_counts()
        self.flops = flops_per_token(self.model.config, block)
        self.peak = log.peak_flops(world.device)
        self.log = log.Log(self.folder, self.step, active=world.rank == 0)
        if world.rank == 0:
            data = {"name": config.dataset, "tokenizer": manifest["tokenizer"],
                    "vocab_size": config.vocab_size, "manifest_sha256": self.data_hash,
                    "sources": manifest["recipe"].get("sources"),
                    **{f"{split}_{of}": manifest["splits"][split].get(of)
                       for split in ("train", "val") for of in ("tokens", "bytes")}}
            settings.to_json(self.folder / "run.json", log.describe(
                self.folder, command, world.device, world.size, data, counts))
        epochs = config.max_steps * self.batch_rows / self.rows.windows
        self.log.say(f"model: {counts[0] / 1e6:.1f} M parameters, {counts[1] / 1e6:.1f} M without "
                     f"embeddings; {world.device.type}, {str(self.dtype)[6:]}, "
                     f"{'compiled' if self.compiled else 'eager'}, {world.mode}")
        self.log.say(f"batch: global {self.batch_rows * block:,} tok = {world.size} "
                     f"{world.device.type} x {self.micro} x {block} x {self.accumulate} "
                     "(ranks x micro-batch x context x accumulation)")
        self.log.say(f"data: {self.rows.windows:,} rows of {block} tokens in {config.dataset}, "
                     f"{self.rows.tail} tokens left out; {epochs:.2f} epochs in "
                     f"{config.max_steps} steps")
        if config.sample_tokens and (world.mode == "fsdp" or not self.tokenizer):
            self.log.say("no samples along the run: " + (
                "the model is sharded" if self.tokenizer else "there is no `tokenizers` package"))
        if state:
            self.log.say(f"resuming from {source}")
        self.stop = StopFlag(config.max_minutes)
        self.clock = log.Clock()
        self.skipped = 0  # updates in a row that were not made

    def loop(self) -> int:
        """Train from the first or resumed step to the last; the exit code."""
        config = self.config
        self.log.status("running", self.step)
        self.model.train()
        gc.collect()
        gc.freeze()  # the collector need not walk the model again and again
        if self.step == 0:
            self.measure()
        self.clock.start(self.step)
        stopping, saved = False, self.step if self.first_step else -1
        # the numbers of an update are read while a GPU works on the next one; a CPU does not wait
        unread: deque[tuple[int, Tensor, float]] = deque()
        lag = 0 if self.world.device.type == "cpu" else 1
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self.batch, self.step)
            while self.step < config.max_steps and not stopping:
                with self.clock.apart("data_seconds", training=True):
                    batch = upcoming.result()
                upcoming = reader.submit(self.batch, self.step + 1)
                rate = optim.lr(self.step, config)
                stats = self.update(batch, rate)
                self.step += 1
                unread.append((self.step, stats, rate))
                last = self.step == config.max_steps
                evaluating = last or self.step % config.eval_interval == 0
                saving = last or self.step % config.save_interval == 0
                while len(unread) > (0 if evaluating or saving or stopping else lag):
                    stopping = self.settle(*unread.popleft()) or stopping
                if evaluating:
                    self.measure()
                if (saving or stopping) and self.save():
                    saved = self.step
        if saved != self.step:
            self.log.status("failed", self.step)
            return settings.complain(f"no checkpoint could be written at step {self.step}", 1)
        state = "done" if self.step == config.max_steps else "stopped"
        self.log.status(state, self.step)
        self.log.say(f"{state} at step {self.step}; {self.folder}/checkpoints/step_{self.step}")
        return 0 if state == "done" else STOPPED

    def update(self, batch: list[tuple[Tensor, Tensor]], rate: float) -> Tensor:
        """One optimizer update; [summed loss in nats, squared gradient norm, ranks that want to
        stop], on the device, the same on all ranks."""
        world, targets = self.world, self.batch_rows * self.config.block_size
        nll = torch.zeros((), device=world.device)
        for i, (x, y) in enumerate(batch):
            x, y = (t.to(world.device, non_blocking=True) for t in (x, y))
            with world.accumulating(self.module, last=i == len(batch) - 1):
                loss = self.module(x, y)
                # gradients are averaged over ranks: times their number this is the gradient of the
                # mean over all targets of the step
                (loss * (world.size / targets)).backward()
            nll += loss.detach()
        wish = torch.full_like(nll, float(self.stop.asked()))
        stats = world.sum(torch.stack([nll, world.square_norm(self.model), wish]))
        norm = stats[1].sqrt() + 0 * stats[0]  # not finite if the loss is not
        optim.step(self.optimizer, rate, norm, self.config.grad_clip)
        self.optimizer.zero_grad()
        return stats

    def rows_at(self, step: int) -> int:
        """Rows that the run has consumed when `step` updates are done."""
        return self.first_row + (step - self.first_step) * self.batch_rows

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's micro-batches (ids, targets), (micro, T) each: a function of the step."""
        windows = self.rows.window_of(self.rows_at(step), self.batch_rows)
        windows = windows[self.world.rank::self.world.size]
        ids = np.zeros((self.accumulate * self.micro, self.config.block_size + 1), np.int64)
        if len(windows):
            ids[:len(windows)] = self.rows.read_windows(windows)
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        y[len(windows):] = IGNORE  # fills up the last micro-batch and counts nothing
        if self.world.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return list(zip(x.split(self.micro), y.split(self.micro), strict=True))

    def settle(self, step: int, stats: Tensor, rate: float) -> bool:
        """Read, count and log the numbers of the update that made `step`; whether to stop."""
        nll, square_norm, wishes = stats.tolist()
        targets = self.batch_rows * self.config.block_size
        loss, norm = nll / targets, math.sqrt(square_norm) if square_norm >= 0 else math.nan
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
        else:
            self.skipped += 1
            self.log.say(f"step {step}: loss or gradient is not finite, no update; rows "
                         f"{self.rows_at(step - 1)} to {self.rows_at(step) - 1}")
            if self.skipped == PATIENCE:
                raise UserError(f"{PATIENCE} updates in a row were not finite; the last checkpoint "
                                "is good: lower learning_rate and start again")
        if step % self.config.log_interval == 0 or step in (self.first_step + 1,
                                                            self.config.max_steps):
            speed, spent = self.clock.read(step, targets)
            mfu = speed * self.flops / (self.peak * self.world.size) if self.peak else None
            row = {"step": step, "tokens": self.rows_at(step) * self.config.block_size,
                   "loss": loss, "lr": rate, "grad_norm": norm,
                   "tokens_per_second": speed, "mfu": mfu,
                   "peak_memory_bytes": log.peak_memory(self.world.device), "time": time.time()}
            self.log.row(row | spent)
            left = log.duration((self.config.max_steps - step) * targets / speed)
            self.log.say(f"step {step}/{self.config.max_steps}: loss {loss:.4f}, lr {rate:.2e}, "
                         f"grad norm {norm:.2f}, {speed:,.0f} tok/s, "
                         f"MFU {f'{mfu:.1%}' if mfu else 'n/a'}, {left} left")
        return wishes > 0

    def measure(self) -> None:
        """Evaluate on the first eval_tokens of the validation split and write the row."""
        with self.clock.apart("eval_seconds"):
            self.model.eval()
            scores = evaluate(self.module, self.validation, self.byte_info,
                              self.config.eval_tokens, self.micro, self.world)
            self.model.train()
            self.world.reshard(self.model)
        tokens = self.rows_at(self.step) * self.config.block_size
        self.log.row({"step": self.step, "tokens": tokens, "val_loss": scores["val_loss"],
                      "val_bpb": scores["val_bpb"], "time": time.time()})
        self.log.say(f"step {self.step}: validation loss {scores['val_loss']:.4f} nats/token, "
                     f"{scores['val_bpb']:.4f} bits/byte")
        if self.tokenizer and self.world.rank == 0 and self.world.mode != "fsdp":
            with self.clock.apart("sample_seconds"):
                self.sample(self.tokenizer)

    def sample(self, words: tokenizer.Tokenizer) -> None:
        """Add a text to samples.jsonl. On rank 0 alone, so not where the model is sharded."""
        self.model.eval()
        ended, text, _ = sample.complete(
            self.model, words, [self.prompt], self.config.sample_tokens, sample.Flags(),
            [sample.row_seed(self.config.seed, 0)], [])[0]
        self.model.train()
        self.log.line("samples.jsonl", {"step": self.step, "prompt": self.config.sample_prompt,
                                        "completion": text, "stop": ended})
        self.log.say(f"step {self.step}: sample {self.config.sample_prompt + text!r:.100}")

    def save(self) -> bool:
        """Write a checkpoint; False if that failed, which is said, and training goes on."""
        state = {"step": self.step, "rows": self.rows_at(self.step), "seed": self.config.seed,
                 "data_hash": self.data_hash, "micro_batch": self.micro,
                 "dtype": str(self.dtype)[6:], "compile": self.compiled,
                 "attention": self.config.attention, "threads": torch.get_num_threads(),
                 "world_size": self.world.size, "versions": {"torch": torch.__version__},
                 "config": asdict(self.config)}
        with self.clock.apart("save_seconds"):
            try:
                checkpoint.save(self.folder, self.step, self.model, self.optimizer, state,
                                self.data / "tokenizer.json", self.world)
            except OSError as error:
                self.log.say(f"WARNING: no checkpoint at step {self.step}: {error}; going on")
                return False
            if self.world.rank == 0:
                checkpoint.prune(self.folder, self.config.keep_last, self.config.keep_every)
        return True


def vocabulary(config: Settings, manifest: dict) -> int:
    """Entries of the embedding: the config's if it says, else the tokenizer's."""
    entries = manifest["tokenizer"]["vocab_size"]
    if config.vocab_size and config.vocab_size < entries:
        raise UserError(f"vocab_size {config.vocab_size} is smaller than the {entries} entries of "
                        f"the tokenizer of data set {config.dataset}; leave it 0")
    return config.vocab_size or entries


def prompt(config: Settings, data: Path) -> tuple[tokenizer.Tokenizer | None, list[int]]:
    """What evaluations sample with: the tokenizer and the ids to go on from; (None, []) if they do
    not."""
    if not config.sample_tokens or config.block_size == 1:
        return None, []
    try:
        words = tokenizer.Tokenizer.load(data)
    except ImportError:  # training itself does not need the library
        return None, []
    ids = [words.bos, *words.encode(config.sample_prompt)]
    if len(ids) >= config.block_size:
        raise UserError(f"sample_prompt has {len(ids)} tokens, and the context of "
                        f"{config.block_size} must hold it and at least one more; shorten it")
    return words, ids


def model_config(config: Settings) -> ModelConfig:
    """The architecture that a config asks for."""
    names = set(ModelConfig.__dataclass_fields__) & set(Settings.__dataclass_fields__)
    return ModelConfig(**{name: getattr(config, name) for name in names})


def starting_point(run: Path, config: Settings) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start."""
    there = checkpoint.steps_of(run)
    if config.resume == "never" and there:
        raise UserError(f"resume=never, but {run} holds a run at {there[0].name}; choose another "
                        "out_dir or remove the folder")
    good = checkpoint.newest_good(run) if there else None
    if config.resume == "must" and good is None:
        raise UserError(f"resume=must, but {run} holds no whole checkpoint")
    if there and good is None:
        raise UserError(f"every checkpoint in {run} is damaged; choose another out_dir")
    return good


def check_resume(state: dict, config: Settings, data_hash: str, extend: bool, source: Path) -> None:
    """Refuse to go on from `source` with a config that is not that run's."""
    old, new = asdict(Settings()) | state["config"], asdict(config)  # keys are added over time
    for keys, remedy in ((FIXED, "choose another out_dir"), (COURSE, "say --extend to accept it")):
        for name in keys:
            if old.get(name) != new[name] and not (keys is COURSE and extend):
                raise UserError(f"{source} was trained with {name}={old.get(name)}, now it is "
                                f"{new[name]}; {remedy}")
    if state["data_hash"] != data_hash:
        raise UserError(f"{source} was trained on another data/{config.dataset} (its manifest has "
                        "another hash); choose another out_dir")


def check_source(source: Path, config: ModelConfig, manifest: dict) -> None:
    """Refuse to start from a model that computes something else, or whose token ids mean something
    else than the data set's. Context and RoPE scaling may differ: that is how context grows."""
    if keys := huggingface.other_keys(checkpoint.model_config(source), config):
        raise UserError(f"init_from: {source} is another model than the config's; to go on from it "
                        f"say {keys}")
    for path in (source / "tokenizer.json", source / "tokenizer.model"):
        if path.is_file():  # the second is converted first, as prepare.py does
            theirs = (tokenizer.sha256_of(path) if path.suffix == ".json" else
                      tokenizer.make(str(path)).sha256)
            if theirs != manifest["tokenizer"]["sha256"]:
                raise UserError(f"{path} is not the tokenizer of the data set; prepare one with "
                                f"--tokenizer={path}")
            return


def pick_micro_batch(share: int, block: int, device: torch.device) -> int:
    """Rows per forward pass: enough tokens to keep the device busy, at most a rank's share."""
    most = max(1, (16384 if device.type == "cuda" else 4096) // block)
    return -(-share // -(-share // most))  # equal micro-batches, as few as can be


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1 or the time limit; a second signal ends the process."""

    def __init__(self, minutes: float):
        self.signalled = 0.0  # when
        self.deadline = time.monotonic() + minutes * 60 if minutes else math.inf
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        """First: finish the step and save. Second: leave at once; the last commit stands. Copies
        of the first, as schedulers and launchers send them, come within a second."""
        if self.signalled and time.monotonic() - self.signalled > 1:
            os._exit(143)
        self.signalled = self.signalled or time.monotonic()

    def asked(self) -> bool:
        """Whether this rank wants to stop."""
        return self.signalled > 0 or time.monotonic() > self.deadline


if __name__ == "__main__":
    settings.run(main, COMMAND)
