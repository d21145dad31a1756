"""Train a LLaMA: python train.py [config/x.py] [--check | --replay=K] [--key=value ...]

On several GPUs or nodes: torchrun --nproc_per_node=8 train.py config/x.py. A run goes on from its
newest whole checkpoint when it is started again. --check tries, without a trace, what a long run
relies on, and says how long it will take. Exit codes: 0 done, 1 a check failed, 2 the input, 75
stopped early with a whole checkpoint (start me again), 143 on a second signal.
"""

from dataclasses import asdict, dataclass

from plainllama import settings
from plainllama.command import CommandLine, complain, parse_arguments, run_command
from plainllama.files import lock_run, read_status, steps_of, write_json, write_status
from plainllama.settings import Settings, UserError


@dataclass
class Flags:
    """Options that are not part of a run's config."""

    extend: bool = settings.key(False, "on resume, accept another batch size, length or schedule")
    check: bool = settings.key(False, "do not train: check model, data, disk, speed, and the cost")
    price: float = settings.key(0.0, "of an hour of one device, for the cost (--check)", low=0)
    replay: int = settings.key(0, "do not train: print the text that made step K of metrics.jsonl",
                               low=0)
    profile: bool = settings.key(False, "write a trace of three steps to the run's folder")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags)

import gc
import math
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import IGNORE, attention_refusal, flops_per_token
from plainllama import parallel, watch
from plainllama.evaluation.likelihood import evaluate
from plainllama.generation import generate
from plainllama.parallel import World
from plainllama.progress import duration
from plainllama.tokens import shards, tokenizer
from plainllama.tokens.rows import PAD, Rows, hash_of_data, training_rows
from plainllama.tokens.tokenizer_json import byte_info
from plainllama.training import log, optim, preflight, resume
from plainllama.training.engine import Batch, Engine, architecture
from plainllama.weights import checkpoint

STOPPED = 75  # EX_TEMPFAIL: start me again
FIRST_SAVE = 300  # seconds after which a new run has its first checkpoint, whatever its interval
PATIENCE = 10  # updates in a row with non-finite gradients after which a run gives up


def main(command: CommandLine) -> int:
    """Join the other ranks and train; the exit code."""
    config = command.config
    device = parallel.pick_device(config.device)
    dtype = parallel.pick_dtype(config.dtype, torch.device(device))
    if problem := attention_refusal(config.attention, device, dtype, config.doc_mask):
        raise UserError(problem)
    if Path(config.out_dir).exists() and not Path(config.out_dir).is_dir():
        raise UserError(f"out_dir {config.out_dir} is a file; name a folder")
    manifest = shards.read_manifest(Path("data") / config.dataset)
    if command.flags.replay:
        return resume.replay(config, manifest, command.flags.replay)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (
            read_status(Path(config.out_dir)) == "stopped"):
        return STOPPED  # --max-restarts took the first 75 for a failure
    world = parallel.start(config.device, config.parallel)
    try:
        if command.flags.check:
            config.vocab_size = vocabulary(config, manifest)
            return preflight.run_checks(config, manifest, world, command.flags.price)
        return train(command, manifest, world)
    finally:
        gc.enable()
        world.close()


def train(command: CommandLine, manifest: dict, world: World) -> int:
    """Train, heedful of signals and of the other ranks; the exit code."""
    stop = watch.StopFlag(command.config.max_minutes)
    signs = watch.Watch(world.store, world.rank, world.size)
    try:
        run = Run(command, manifest, world, stop)
        if run.step >= command.config.max_steps:
            if world.rank == 0:
                print(f"{run.folder} is already complete: step {run.step} of "
                      f"{command.config.max_steps}")
                write_status(run.folder, "done", run.step)
            return 0
        if world.rank == 0:
            signs.farewell = lambda: write_status(run.folder, "failed", run.step)
        try:
            code = run.loop()
        except BaseException:
            run.saver.wait(20 if world.size > 1 else None)  # torchrun gives 30 seconds
            run.log.status("failed", run.step)
            raise
        stop.close(leaving=__name__ == "__main__")
        with world.patient():
            world.any(False)  # leave together: torchrun ends the others when one has gone
        return code
    except RuntimeError as error:
        if world.size > 1 and watch.lost(error):
            time.sleep(1)  # torchrun names the first to die as the cause
            signs.end(f"rank {world.rank}: another rank has gone or hangs ({error!s:.160}); "
                      f"{watch.GO_ON}")
        signs.broken = f"rank {world.rank}: {error!s:.160}; {watch.GO_ON}"
        raise
    except UserError as error:
        signs.broken = f"rank {world.rank}: {error!s:.160}"
        raise
    finally:
        signs.close()
        stop.close(leaving=__name__ == "__main__")


class Run:
    """One training run: set up by the constructor, trained by loop()."""

    def __init__(self, command: CommandLine, manifest: dict, world: World,
                 stop: watch.StopFlag):
        config = self.config = command.config
        self.world, self.folder, self.stop = world, Path(config.out_dir), stop
        self.data, block = Path("data") / config.dataset, config.block_size
        self.rows = training_rows(self.data, manifest, config)
        self.data_hash = hash_of_data(self.data, config)
        self.counted = (0, 0)  # rows, and their targets
        self.validation = Rows(shards.Split(self.data, "val", manifest), block, config.seed)
        self.byte_info = byte_info(self.data)
        self.tokenizer, self.prompt = prompt(config, self.data)
        config.vocab_size = vocabulary(config, manifest)
        for name in ("sources", "tokenizer", "val_fraction"):  # run.json says what is in the data
            setattr(config, name, manifest["recipe"].get(name, getattr(config, name)))

        # where to start, decided by rank 0 for all
        self.lock = None  # of the run's folder: held by rank 0 until its process ends
        source, state = world.decide(lambda: self.starting_point(command.flags.extend))
        self.step = self.first_step = state.get("step", 0)
        self.first_row = state.get("rows", 0)
        if not source and config.init_from:
            source = world.decide(lambda: checkpoint.find_checkpoint(config.init_from))
            world.decide(lambda: resume.refuse_other_model(source, architecture(config), manifest))
        if self.step >= config.max_steps:
            return  # complete: main says so
        world.decide(self.claim)
        if world.rank == 0 and state:
            checkpoint.set_aside(self.folder, self.step)

        self.log = log.Log(self.folder, self.step, active=world.rank == 0)
        if world.rank == 0 and config.logger != "none":
            self.log.connect(config)
        engine = self.engine = Engine(config, world, manifest["tokenizer"]["bos"], source, state,
                                      self.log.say)
        engine.ready()
        self.model, self.batch_rows = engine.model, engine.batch_rows
        counts = self.model.parameter_counts()
        self.flops = flops_per_token(self.model.config, block)
        self.peak = log.peak_flops(world.device)
        if world.rank == 0:
            data = {"name": config.dataset, "tokenizer": manifest["tokenizer"],
                    "vocab_size": config.vocab_size, "manifest_sha256": self.data_hash,
                    "sources": manifest["recipe"].get("sources"),
                    **{f"{split}_{of}": manifest["splits"][split].get(of)
                       for split in ("train", "val") for of in ("tokens", "bytes")}}
            write_json(self.folder / "run.json", log.describe(
                self.folder, command, world.device, world.size, data, counts))
        self.log.say(f"model: {counts[0] / 1e6:.1f} M parameters, {counts[1] / 1e6:.1f} M without "
                     f"embeddings; {world.device.type}, {str(engine.dtype)[6:]}, "
                     f"{'compiled' if engine.compiled else 'eager'}, "
                     f"{world.mode if world.mode != 'one' else 'one process'}")
        if world.why:
            self.log.say(world.why)
        self.log.say(f"batch: global {self.batch_rows * block:,} tok = {world.size} "
                     f"{world.device.type} x {engine.micro} x {block} x {engine.accumulate} "
                     "(ranks x micro-batch x context x accumulation)")
        if self.batch_rows < world.size:
            self.log.say(f"WARNING: {self.batch_rows} rows a step for {world.size} ranks: some "
                         "only wait; raise global_batch_tokens or take fewer ranks")
        self.log.say(f"data: {self.rows.summary(config.max_steps * self.batch_rows)} in "
                     f"{config.max_steps} steps")
        if config.sample_tokens and (world.sharded or not self.tokenizer):
            self.log.say("no samples along the run: " + (
                "the model is sharded" if self.tokenizer else "there is no `tokenizers` package"))
        if state:
            self.log.say(f"resuming from {source}")
        self.saver = checkpoint.Saver(self.folder, self.data / "tokenizer.json", world,
                                      self.log.say, config.keep_last, config.keep_every)
        self.saver.saved = self.step if state else -1
        self.begun, self.val_loss = time.monotonic(), (-1, 0.0)  # the last one, and its step
        self.clock = log.Clock()
        self.profiler = log.Profiler(self.folder, command.flags.profile and world.rank == 0)
        # updates that were not made: in a row, and since the run began
        self.skipped, self.skipped_ever = 0, state.get("skipped", 0)

    def starting_point(self, extend: bool) -> tuple[Path | None, dict]:
        """The checkpoint to go on from and its state; nobody else may train in the run's folder
        then."""
        if self.folder.is_dir():
            self.lock = lock_run(self.folder)
        return resume.starting_point(self.folder, self.config, self.data_hash, extend)

    def claim(self) -> None:
        """Make the folder of a new run, unless another process has just done so."""
        if not self.lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_run(self.folder)
            if steps_of(self.folder):
                raise UserError(f"another process has begun to train in {self.folder}; start again "
                                "to go on from there")
        write_status(self.folder, "running", self.step)  # not `stopped` any more

    def loop(self) -> int:
        """Train from the first or resumed step to the last; the exit code."""
        config = self.config
        self.log.status("running", self.step)
        self.model.train()
        if self.step == 0:
            self.measure()
        gc.collect()
        gc.disable()  # it would stop one rank, and so all, at any moment; evaluations call it
        self.clock.start(self.step)
        stopping = False
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
                stats = self.engine.update(batch, rate, self.wish(), self.targets_of(self.step))
                self.profiler.step()
                self.step += 1
                if self.step == self.first_step + 1:
                    took = timedelta(seconds=time.perf_counter() - self.clock.since)
                    self.world.set_timeout(max(watch.BRISK, 10 * took))
                unread.append((self.step, stats, rate))
                last = self.step == config.max_steps
                evaluating = last or self.step % config.eval_interval == 0
                saving = last or self.step % config.save_interval == 0
                while len(unread) > (0 if evaluating or saving or stopping else lag):
                    wish = self.settle(*unread.popleft())
                    stopping = stopping or wish >= 1
                    saving = saving or (wish > 0 and not self.saver.thread)
                if evaluating:
                    self.measure()
                if saving or stopping:
                    self.save()
        with self.clock.apart("save_seconds"), self.world.patient():
            self.saver.wait()
        if self.saver.saved != self.step:
            self.log.status("failed", self.step)
            return complain(f"no checkpoint could be written at step {self.step}", 1)
        state = "done" if self.step == config.max_steps else "stopped"
        self.log.status(state, self.step)
        self.log.say(f"{state} at step {self.step}; {self.folder}/checkpoints/step_{self.step}")
        self.log.say(f"next: python sample.py --ckpt {self.folder}" if state == "done" else
                     "the same command goes on from there")
        return 0 if state == "done" else STOPPED

    def rows_at(self, step: int) -> int:
        """Rows that the run has consumed when `step` updates are done."""
        return self.first_row + (step - self.first_step) * self.batch_rows

    def targets_of(self, step: int) -> int:
        """Targets of the update that follows `step`, over all ranks."""
        return self.rows.targets(self.rows_at(step), self.batch_rows)

    def tokens_at(self, step: int) -> int:
        """Targets that the run has trained on when `step` updates are done."""
        rows, targets = self.counted if self.counted[0] <= self.rows_at(step) else (0, 0)
        targets += self.rows.targets(rows, self.rows_at(step) - rows)
        self.counted = self.rows_at(step), targets
        return targets

    def batch(self, step: int) -> Batch:
        """This rank's rows, filled up to whole micro-batches: a function of the step."""
        windows = self.rows.window_of(self.rows_at(step), self.batch_rows)
        windows = windows[self.world.rank::self.world.size]
        ids = np.zeros((self.engine.accumulate * self.engine.micro, self.config.block_size + 1),
                       np.int64)
        if len(windows):
            ids[:len(windows)] = self.rows.read_windows(windows)
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        y[len(windows):] = IGNORE  # fills up the last micro-batch and counts nothing
        y[y == PAD] = IGNORE
        x[x == PAD] = 0
        if self.world.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y

    def wish(self) -> float:
        """Of this rank: 1 to stop; a little, of rank 0 alone, for a checkpoint now, because a new
        run has none and some minutes have passed."""
        first = self.world.rank == 0 and self.saver.saved < 0 and not self.saver.thread and \
            time.monotonic() > self.begun + FIRST_SAVE
        return float(self.stop.asked()) or 0.5 * first

    def settle(self, step: int, stats: Tensor, rate: float) -> float:
        """Read, count and log the numbers of the update that made `step`; the ranks' wishes."""
        nll, square_norm, wishes = stats.tolist()
        targets = self.targets_of(step - 1)
        loss, norm = nll / targets, math.sqrt(square_norm) if square_norm >= 0 else math.nan
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
        else:
            self.skipped += 1
            self.skipped_ever += 1
            self.log.say(f"step {step}: loss or gradient is not finite, no update; rows "
                         f"{self.rows_at(step - 1)} to {self.rows_at(step) - 1} (shown by "
                         f"--replay={step})")
            if self.skipped == PATIENCE:
                raise UserError(f"{PATIENCE} updates in a row were not finite; the last checkpoint "
                                "is good: lower learning_rate and start again")
        if step % self.config.log_interval == 0 or step in (self.first_step + 1,
                                                            self.config.max_steps):
            speed, spent = self.clock.read(step, targets)
            mfu = speed * self.flops / (self.peak * self.world.size) if self.peak else None
            row = {"step": step, "tokens": self.tokens_at(step),
                   "rows": self.rows_at(step), "loss": loss, "lr": rate, "grad_norm": norm,
                   "tokens_per_second": speed, "mfu": mfu, "skipped": self.skipped_ever,
                   "peak_memory_bytes": log.peak_memory(self.world.device), "time": time.time()}
            self.log.row(row | spent)
            left = duration((self.config.max_steps - step) * targets / speed)
            self.log.say(f"step {step}/{self.config.max_steps}: loss {loss:.4f}, lr {rate:.2e}, "
                         f"grad norm {norm:.2f}, {speed:,.0f} tok/s, "
                         f"MFU {f'{mfu:.1%}' if mfu else 'n/a'}, {log.shares(spent)}{left} left")
        return wishes

    def measure(self) -> None:
        """Evaluate on the first eval_tokens of the validation split and write the row."""
        with self.clock.apart("eval_seconds"), self.world.patient():
            self.model.eval()
            scores = evaluate(self.engine.module, self.validation, self.byte_info,
                              self.config.eval_tokens, self.engine.micro, self.world,
                              self.engine.bos_id)
            self.model.train()
            self.world.reshard(self.model)
            gc.collect()
        tokens = self.tokens_at(self.step)
        self.val_loss = self.step, scores["val_loss"]
        self.log.row({"step": self.step, "tokens": tokens, "val_loss": scores["val_loss"],
                      "val_bpb": scores["val_bpb"], "time": time.time()})
        self.log.say(f"step {self.step}: validation loss {scores['val_loss']:.4f} nats/token, "
                     f"{scores['val_bpb']:.4f} bits/byte")
        if self.tokenizer and self.world.rank == 0 and not self.world.sharded:
            with self.clock.apart("sample_seconds"):
                self.sample(self.tokenizer)

    def sample(self, words: tokenizer.Tokenizer) -> None:
        """Add a text to samples.jsonl. On rank 0 alone, so not where the model is sharded."""
        self.model.eval()
        ended, text, _ = generate.complete(
            self.model, words, [self.prompt], self.config.sample_tokens, settings.Sampling(),
            [generate.row_seed(self.config.seed, 0)], [])[0]
        self.model.train()
        self.log.line("samples.jsonl", {"step": self.step, "prompt": self.config.sample_prompt,
                                        "completion": text, "stop": ended})
        self.log.say(f"step {self.step}: sample {self.config.sample_prompt + text!r:.100}")

    def save(self) -> None:
        """Begin to write a checkpoint; a failure is said when it comes, and training goes on."""
        evaluated, loss = self.val_loss
        state = {"step": self.step, "rows": self.rows_at(self.step),
                 "tokens": self.tokens_at(self.step), "seed": self.config.seed,
                 "data_hash": self.data_hash, "micro_batch": self.engine.micro,
                 "dtype": str(self.engine.dtype)[6:], "compile": self.engine.compiled,
                 "skipped": self.skipped_ever, "loss_scale": self.engine.optimizer.scale_state(),
                 "val_loss": loss if evaluated == self.step and math.isfinite(loss) else None,
                 "attention": self.config.attention, "threads": torch.get_num_threads(),
                 "world_size": self.world.size, "versions": {"torch": torch.__version__},
                 "config": asdict(self.config)}
        with self.clock.apart("save_seconds"), self.world.patient():
            self.saver.start(self.step, self.model, self.engine.optimizer, state)


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
    ids = [words.bos_id, *words.encode(config.sample_prompt)]
    if len(ids) >= config.block_size:
        raise UserError(f"sample_prompt has {len(ids)} tokens, and the context of "
                        f"{config.block_size} must hold it and at least one more; shorten it")
    return words, ids


if __name__ == "__main__":
    run_command(main, COMMAND)
