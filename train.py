"""Train a LLaMA: python train.py [config/x.py] [--check | --replay=K] [--key=value ...]

On several GPUs or nodes: torchrun --nproc_per_node=8 train.py config/x.py. A run goes on from its
newest whole checkpoint when it is started again. --check tries, without a trace, what a long run
relies on, and says how long it will take. Exit codes: 0 done, 1 a check failed, 2 the input, 75
stopped early with a whole checkpoint (start me again), 143 on a second signal.
"""

from dataclasses import asdict, dataclass

from plainllama import settings
from plainllama.command import CommandLine, complain, parse_arguments, run_command
from plainllama.files import newest_run, read_status, steps_of, write_json, write_status
from plainllama.machine import crowded
from plainllama.settings import DIALOGS, UserError


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
    COMMAND = parse_arguments(__doc__, Flags, outlives="no more lines here; training goes on")

import contextlib
import gc
import math
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from plainllama import parallel, watch
from plainllama.evaluation.validation import along, open_sets, remark_on_chosen, told, validate
from plainllama.parallel import World
from plainllama.progress import duration
from plainllama.tokens import shards
from plainllama.tokens.rows import Batch, hash_of_data, to_batch, training_rows, val_rows
from plainllama.tokens.tokenizer_json import byte_info
from plainllama.training import log, memory, optim, preflight, reference, resume
from plainllama.training.engine import Engine, Outcome, outline, read_outcome, refuse_too_large
from plainllama.weights import checkpoint

STOPPED = 75  # EX_TEMPFAIL: start me again
FIRST_SAVE = 300  # seconds after which a new run has its first checkpoint, whatever its interval
PATIENCE = 10  # updates in a row with non-finite gradients after which a run gives up


def main(command: CommandLine) -> int:
    """Join the other ranks and train; the exit code."""
    config, flags, run = command.config, command.flags, Path(command.config.out_dir)
    refuse_idle(flags)
    device = parallel.pick_device(config.device)
    dtype = parallel.pick_dtype(config.dtype, torch.device(device))
    if os.path.lexists(run) and not run.is_dir():
        raise UserError(f"out_dir {run} is a file or a link to nowhere; name a folder")
    runs = not (run / "run.json").exists() and newest_run(run)
    if runs or (run / "manifest.json").exists():
        raise UserError(f"out_dir {run} holds {'runs' if runs else 'a data set'}; name another")
    named = resume.name_data_set(command)
    manifest = shards.read_manifest(Path("data") / config.dataset, " ".join(command.files))
    for remark in filter(None, (named, *resume.settle(command, manifest))):
        if os.environ.get("RANK", "0") == "0":
            print(remark, flush=True)
    if problem := parallel.attention_refusal(config.attention, device, dtype, config.doc_mask):
        raise UserError(problem)
    if flags.replay:
        return resume.replay(config, manifest, flags.replay)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and read_status(run) == "stopped":
        return STOPPED  # --max-restarts took the first 75 for a failure
    world = parallel.start(config.device, config.parallel, config.offload)
    try:
        if flags.check:
            there = resume.model_folder(config)
            if there and not steps_of(Path(config.out_dir)):
                resume.refuse_other_part(there, config)
            memory.foresee(config, world, there)
        refuse_too_large(config, world)
        outline(config)  # which refuses names that are none, before a folder is made
        if flags.check:
            open_sets(config, manifest)
            return preflight.run_checks(config, manifest, world, flags.price)
        return train(command, manifest, world)
    finally:
        gc.enable()
        world.close()


def refuse_idle(flags: Flags) -> None:
    """Refuse options that would do nothing beside the others."""
    if flags.price and not flags.check:
        raise UserError("--price is for --check, which says what a run will cost")
    given = [f"--{name}" for name, value in vars(flags).items() if value and name != "price"]
    if len(given) > 1 and (flags.check or flags.replay):
        raise UserError(f"{' and '.join(given)} are not done together; say one of them")


def train(command: CommandLine, manifest: dict, world: World) -> int:
    """Train, heedful of signals and of the other ranks; the exit code."""
    leaving, minutes = __name__ == "__main__", command.config.max_minutes
    with watch.guard(world.store, world.rank, world.size, minutes, leaving) as (stop, signs):
        run = Run(command, manifest, world, stop)
        if run.step >= command.config.max_steps:
            if world.rank == 0:
                print(f"{run.folder} is already complete: step {run.step} of {run.step}")
                write_status(run.folder, "done", run.step)
            return 0
        def failed() -> None:
            with contextlib.suppress(OSError):  # a full disk's: why the run ends says more
                if world.rank == 0:
                    write_status(run.folder, "failed", max(run.saver.saved, 0))

        signs.farewell = failed
        try:
            run.build()
            code = run.loop()
        except BaseException:
            run.saver.wait(20 if world.size > 1 else None)  # torchrun gives 30 seconds
            failed()
            raise
        stop.close(leaving)
        with world.patient():
            world.any(False)  # leave together: torchrun ends the others when one has gone
        return code


class Run:
    """One training run: opened by the constructor, built by build(), trained by loop()."""

    def __init__(self, command: CommandLine, manifest: dict, world: World, stop: watch.StopFlag):
        config = self.config = command.config
        self.command, self.manifest, self.world, self.stop = command, manifest, world, stop
        self.folder, self.data = Path(config.out_dir), Path("data") / config.dataset
        self.rows = training_rows(self.data, manifest, config)
        self.data_hash = hash_of_data(self.data, config)
        self.validation = val_rows(self.data, manifest, config.block_size)
        self.sets = open_sets(config, manifest)
        self.byte_info = byte_info(self.data)
        say = partial(print, flush=True) if world.rank == 0 else lambda _: None
        self.drawn = along(config, self.data, self.validation, world, say)
        self.saver = checkpoint.Saver(self.folder, self.data / "tokenizer.json", world, say,
                                      config.keep_last, config.keep_every)
        # last of all, since it makes the run's folder and says there that the run is at work
        self.start = resume.begin(self.folder, config, manifest, self.data_hash,
                                  command.flags.extend, world)
        self.saver.template = resume.kept_template(self.start.source, config)
        self.step = self.start.step
        if command.flags.extend and not self.start.state:
            say(f"--extend has no effect: {self.folder} holds nothing to go on from")
        self.saver.saved = self.step if self.start.state else -1

    def build(self) -> None:
        """Make the model and its optimizer, and announce what is trained."""
        config, world, start = self.config, self.world, self.start
        first = world.rank == 0
        self.log = log.Log(self.folder, self.step, active=first)
        if first and config.logger != "none":
            self.log.connect(f"logger={config.logger}", log.LOGGERS[config.logger], self.folder,
                             config)

        def engine(source: Path | None) -> Engine:
            return Engine(config, world, self.manifest["tokenizer"]["bos"], source, start.state,
                          self.log.say)

        others = "" if start.state else config.init_from  # which its own run may delete meanwhile
        self.engine = checkpoint.with_checkpoint(others, world, engine, start.source)
        self.engine.ready()
        self.model, objective = self.engine.model, self.engine.objective
        self.references = reference.of_run(self.folder, self.engine, self.rows, self.validation,
                                           self.data_hash, start) if objective.reference else {}
        self.course = resume.Course(self.rows, self.engine.batch_rows, objective, start.state)
        if first:
            write_json(self.folder / "run.json", log.describe(
                self.folder, self.command, self.manifest, self.data_hash, self.engine, self.data))
        self.log.announce(self.engine, self.rows, resume.changed(self.command))
        self.saver.tell = partial(self.log.status, "running")
        alone = world.size == 1 and world.device.type == "cpu"
        if alone and (remark := crowded(self.command.began, torch.get_num_threads())):
            self.log.say(remark)
        if self.drawn and world.sharded:
            what = " and no ".join(each.name for each in self.drawn)
            self.drawn = []
            self.log.say(f"no {what} along the run: the model is sharded")
        if start.state:
            self.log.say(f"resuming from {start.source}")
        self.begun = time.monotonic()
        self.evaluated_at, self.val_loss = -1, 0.0  # the newest evaluation
        self.clock = log.Clock()
        profiling = self.command.flags.profile and first
        self.profile = log.profiler(self.folder) if profiling else lambda: None
        # updates that were not made: in a row, and since the run began
        self.skipped, self.skipped_ever = 0, start.state.get("skipped", 0)

    def loop(self) -> int:
        """Train from the first or resumed step to the last; the exit code."""
        config = self.config
        self.log.status("running", self.step)
        self.model.train()
        if self.step == 0:
            self.measure()
        gc.collect()
        gc.disable()  # it would stop one rank, and so all, at any moment; evaluations call it
        self.clock.start(self.course.read_at(self.step), self.course.tokens_at(self.step))
        # the numbers of an update are read while a GPU works on the next one; a CPU does not wait
        unread: deque[tuple[int, float, Tensor]] = deque()
        stopping, lag = False, int(self.world.device.type != "cpu")
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self.batch, self.step)
            while self.step < config.max_steps and not stopping:
                with self.clock.apart("data_seconds", training=True):
                    batch = upcoming.result()
                upcoming = reader.submit(self.batch, self.step + 1)
                rate, targets = optim.lr(self.step, config), self.course.targets_of(self.step)
                self.engine.seed_dropout(self.step)
                stats = self.engine.update(batch, rate, targets, self.stop.asked(),
                                           self.wants_first_save())
                self.profile()
                if self.step == self.course.first_step:  # no rank compiles from here on
                    took = timedelta(seconds=time.perf_counter() - self.clock.since)
                    self.world.set_timeout(max(watch.BRISK, 10 * took))
                self.step += 1
                unread.append((self.step, rate, stats))
                last = self.step == config.max_steps
                evaluating = last or self.step % config.eval_interval == 0
                saving = last or self.step % config.save_interval == 0
                while len(unread) > (0 if evaluating or saving or stopping else lag):
                    outcome = self.settle(*unread.popleft())
                    stopping = stopping or outcome.stop > 0
                    saving = saving or (outcome.save > 0 and not self.saver.thread)
                if evaluating:
                    self.measure()
                if saving or stopping:
                    self.save()
        return self.finish()

    def finish(self) -> int:
        """Wait for the last checkpoint and say how the run ended; the exit code."""
        with self.clock.apart("save_seconds"), self.world.patient():
            self.saver.wait()
        if self.saver.saved != self.step:
            self.log.status("failed", max(self.saver.saved, 0))
            return complain(f"no checkpoint could be written at step {self.step}", 1)
        state, code, after = "stopped", STOPPED, "the same command goes on from there"
        if self.step == self.config.max_steps:
            state, code = "done", 0
            after = f"next: python sample.py --ckpt {quote(str(self.folder))}"
            after += " --chat" if self.config.documents in DIALOGS else ""
        self.log.status(state, self.step)
        self.log.say(f"{state} at step {self.step}; {self.folder}/checkpoints/step_{self.step}")
        if not code:
            self.log.say(f"curves: python report.py {quote(str(self.folder))}; or tensorboard "
                         f"--logdir {quote(str(self.folder.parent))}")
        self.log.say(after)
        return code

    def batch(self, step: int) -> Batch:
        """This rank's rows, filled up to whole micro-batches: a function of the step."""
        windows = self.course.windows(step)[self.world.rank::self.world.size]
        batch = to_batch(self.rows.read_windows(windows),
                         self.engine.accumulate * self.engine.micro, self.engine.bos_id,
                         reference.known(self.references.get("train"), self.rows, windows))
        return batch.pinned() if self.world.device.type == "cuda" else batch

    def wants_first_save(self) -> bool:
        """Whether this is rank 0 of a new run that has no checkpoint after some minutes."""
        unsaved = self.saver.saved < 0 and not self.saver.thread
        return self.world.rank == 0 and unsaved and time.monotonic() > self.begun + FIRST_SAVE

    def settle(self, step: int, rate: float, stats: Tensor) -> Outcome:
        """Read, count and log the numbers of the update that made `step`."""
        outcome, targets = read_outcome(stats), self.course.targets_of(step - 1)
        loss, config = outcome.loss / targets, self.config
        logged = {name: value / targets for name, value in zip(
            self.engine.logged, outcome.logged, strict=True)}
        if step == 1 and self.references:
            reference.refuse_other_start(logged, config, self.engine.dtype)
        norm = math.sqrt(outcome.square_norm) if outcome.square_norm >= 0 else math.nan
        self.count_skipped(step, math.isfinite(loss) and math.isfinite(norm))
        ends = self.course.first_step + 1, config.max_steps
        if step % config.log_interval == 0 or step in ends:
            tokens = self.course.tokens_at(step)
            (speed, learned), spent = self.clock.read(self.course.read_at(step), tokens)
            beside = {"learned_tokens_per_second": learned} if config.packing == "fit" else {}
            row = {"step": step, "tokens": tokens, "rows": self.course.rows_at(step), "loss": loss,
                   "lr": rate, "grad_norm": norm, "tokens_per_second": speed, **beside,
                   "mfu": log.mfu(self.engine, speed), "skipped": self.skipped_ever, **logged,
                   "peak_memory_bytes": log.peak_memory(self.world.device), "time": time.time()}
            left = duration((config.max_steps - step) * self.course.read_in(step - 1) / speed)
            self.log.update(row, spent, left, config.max_steps)
        return outcome

    def count_skipped(self, step: int, finite: bool) -> None:
        """Count an update that was not made, because its numbers were not finite, and name its
        rows; UserError after PATIENCE of them in a row."""
        if finite:
            self.skipped = 0
            return
        self.skipped, self.skipped_ever = self.skipped + 1, self.skipped_ever + 1
        self.log.say(f"step {step}: loss or gradient is not finite, no update; rows "
                     f"{self.course.rows_at(step - 1)} to {self.course.rows_at(step) - 1} (shown "
                     f"by --replay={step})")
        if self.skipped == PATIENCE:
            raise UserError(f"{PATIENCE} updates in a row were not finite; the last checkpoint is "
                            "good: lower learning_rate and start again")

    def measure(self) -> None:
        """Evaluate on the first eval_tokens of the validation split and write the row."""
        self.model.eval()
        with self.clock.apart("eval_seconds"), self.world.patient():
            scores = validate(self.engine, self.validation, self.byte_info,
                              self.references.get("val"), self.sets)
            self.world.reshard(self.model)
            gc.collect()
        self.evaluated_at, self.val_loss = self.step, scores["val_loss"]
        self.log.row({"step": self.step, "tokens": self.course.tokens_at(self.step), **scores,
                      "time": time.time()})
        self.log.say(f"step {self.step}: {told(scores)}")
        if remark := remark_on_chosen(self.folder, scores):
            self.log.say(remark)
        for each in self.drawn:
            with self.clock.apart("sample_seconds"), self.world.patient():
                each.add(self.model, self.step, self.log)
        self.model.train()

    def save(self) -> None:
        """Begin to write a checkpoint; a failure is said when it comes, and training goes on."""
        engine, world = self.engine, self.world
        fresh = self.evaluated_at == self.step and math.isfinite(self.val_loss)
        state = {"step": self.step, "rows": self.course.rows_at(self.step),
                 "tokens": self.course.tokens_at(self.step), "seed": self.config.seed,
                 "data_hash": self.data_hash, "micro_batch": engine.micro,
                 "dtype": str(engine.dtype)[6:], "compile": engine.compiled,
                 "skipped": self.skipped_ever, "loss_scale": engine.optimizer.scale_state(),
                 "val_loss": self.val_loss if fresh else None,
                 "attention": self.config.attention, "threads": torch.get_num_threads(),
                 "world_size": world.size, "versions": {"torch": torch.__version__},
                 "config": asdict(self.config)}
        with self.clock.apart("save_seconds"), world.patient():
            self.saver.start(self.step, self.model, engine.optimizer.state, state, engine.adapter)


if __name__ == "__main__":
    run_command(main, COMMAND)
