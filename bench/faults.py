"""The faults that a run must survive, tried at random: python bench/faults.py [--n=2] [--seed=0]

Each row of the table plants one fault N times in runs of a tiny model, started as a user starts
them, and compares what comes out with runs that nothing disturbed: mostly weights and moments to
the bit. --rows=kill,nan takes some rows only; --full takes the counts in ROWS (hours). Uses a
temporary folder, which stays if something did not hold.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVES = 60, 6
CONFIG = f"""
dataset = 'toy'
n_layer = 2
n_head = 4
n_kv_head = 2
d_model = 64
d_ff = 128
block_size = 64
global_batch_tokens = 8 * 64
micro_batch = 2
max_steps = {STEPS}
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 5
log_interval = 1
eval_interval = 30
eval_tokens = 640
sample_tokens = 0
save_interval = {SAVES}
keep_last = 20
device = 'cpu'
dtype = 'fp32'
"""
NAN = """
import model
real, calls = model.LLaMA.forward, [0]
def forward(self, *args, **kwargs):
    loss = real(self, *args, **kwargs)
    calls[0] += self.training
    return loss * float("nan") if self.training and calls[0] == {call} else loss
if os.environ.get("RANK", "0") in {ranks}:
    model.LLaMA.forward = forward
"""
SLOW = """
import time
from plainllama.training import optim
step = optim.step
def slow(*args):
    time.sleep({seconds})
    return step(*args)
optim.step = slow
"""


class Failure(Exception):
    """What did not hold."""


def hold(condition: object, what: str) -> None:
    """Raise a Failure unless `condition`."""
    if not condition:
        raise Failure(what)


class Job:
    """train.py on a run's folder, in a session of its own; what it says goes to RUN.log."""

    def __init__(self, home: Path, run: str, ranks: int = 1, *words: str, code: str = "",
                 before: Callable | None = None, wrap: tuple = (), launcher: tuple = ()):
        self.home, self.run, self.ranks = home, home / "out" / run, ranks
        self.log = home / f"{run}.log"
        command = [*wrap, sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", *launcher,
                        f"--nproc_per_node={ranks}"]
        if code:
            stub = home / f"{run}.py"
            stub.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
                            "sys.argv = sys.argv[1:]\n"
                            "runpy.run_path(sys.argv[0], run_name='__main__')\n")
            command.append(str(stub))
        command += [str(ROOT / "train.py"), "toy.py", f"--out_dir=out/{run}", *words]
        self.began = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=home, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=before, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def said(self) -> str:
        """What this start of the run has said so far."""
        return self.log.read_bytes()[self.began:].decode(errors="replace")

    def pids(self) -> list[int]:
        """The processes of the ranks, in their order; [] while not all are there."""
        if self.ranks == 1:
            return [self.process.pid]
        found = {}
        me = self.process.pid
        try:
            for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split():
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        found[int(entry[5:])] = int(pid)
        except OSError:
            return []
        return [found[rank] for rank in sorted(found)] if len(found) == self.ranks else []

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        for pid in [*self.pids(), self.process.pid]:
            send(pid, signal.SIGKILL)
        with_group(self.process)

    def end(self, seconds: float = 240) -> int:
        """Wait for the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(f"{self.log} did not end within {seconds} s") from None

    def reach(self, step: int, seconds: float = 120) -> None:
        """Wait until metrics.jsonl has a row of `step` or later, written by this start."""
        end = time.monotonic() + seconds
        while not any(f"step {s}/" in self.said() for s in range(step, step + 12)):
            if self.process.poll() is not None or time.monotonic() > end:
                raise Failure(f"{self.log}: step {step} was not reached")
            time.sleep(0.02)

    def status(self) -> dict:
        """status.json."""
        return json.loads((self.run / "status.json").read_text())


def send(pid: int, number: int) -> None:
    """A signal to a process, which may have gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def with_group(process: subprocess.Popen) -> None:
    """Kill what is left of a job's session, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def state_of(run: Path, step: int = STEPS) -> str:
    """Hash of a checkpoint's weights and moments."""
    folder = run / "checkpoints" / f"step_{step}"
    files = [*sorted(folder.glob("*.safetensors")),
             *sorted(folder.glob("training/optimizer-*.safetensors"))]
    hold(len(files) > 1, f"{folder} is not there")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def losses(run: Path) -> dict[int, tuple]:
    """step -> (loss, tokens, rows) of metrics.jsonl."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["loss"], row["tokens"], row["rows"]) for row in rows
            if "loss" in row}


def steps(run: Path) -> list[int]:
    """The committed checkpoints' steps."""
    return sorted(int(p.name[5:]) for p in run.glob("checkpoints/step_*") if p.name[5:].isdigit())


class Faults:
    """A home with a data set, runs that nothing disturbs, and a row of the table per fault."""

    def __init__(self, home: Path, seed: int):
        self.home, self.random = home, random.Random(seed)
        self.references: dict[tuple, tuple[Path, float]] = {}
        (home / "toy.py").write_text(CONFIG)
        texts = [f"def add_{i}(a, b):\n    return a + b + {i * 7 % 13}\n\n" * (2 + i % 5)
                 for i in range(120)]
        (home / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        subprocess.run([sys.executable, str(ROOT / "prepare.py"), "toy.py", "--sources=text.jsonl",
                        "--tokenizer=bytes", "--val_fraction=0.1"], cwd=home, check=True,
                       capture_output=True)

    def reference(self, ranks: int = 1, *words: str, code: str = "") -> tuple[Path, float]:
        """(a run that nothing disturbed, its seconds), made once."""
        key = (ranks, words, code)
        if key not in self.references:
            name = f"whole{len(self.references)}"
            began = time.monotonic()
            hold(Job(self.home, name, ranks, *words, code=code).end() == 0, f"{name} failed")
            self.references[key] = self.home / "out" / name, time.monotonic() - began
        return self.references[key]

    def finish(self, run: str, ranks: int = 1, *words: str, same: str = "") -> Job:
        """Start a run again: it ends by itself, with the state `same` if that is given."""
        job = Job(self.home, run, ranks, *words)
        hold(job.end() == 0, f"{job.log}: exit code {job.process.returncode}")
        hold(not same or state_of(job.run) == same, f"{job.run}: other bits than undisturbed")
        return job

    def split(self, i: int) -> tuple[int, tuple]:
        """Ranks and words of the i-th trial."""
        return [(1, ()), (2, ("--parallel=ddp",)), (1, ()), (2, ("--parallel=fsdp",))][i % 4]

    # ---- the rows: each plants a fault, the i-th of a row, and says something about it

    def kill(self, i: int) -> str:
        """SIGKILL at a random moment, every second time inside a save; then on to the end."""
        run, (ranks, words) = f"kill{i}", self.split(i)
        whole, seconds = self.reference(ranks, *words)
        job = Job(self.home, run, ranks, *words)
        if i % 2 == 0:
            job.reach(self.random.randrange(1, STEPS - SAVES))
            while job.process.poll() is None and not list(job.run.glob("checkpoints/*.tmp")):
                pass
            time.sleep(self.random.uniform(0, 0.01))
        elif i % 4 == 1:
            time.sleep(self.random.uniform(0.1, seconds))
        else:
            job.reach(self.random.randrange(1, STEPS - SAVES))
            time.sleep(self.random.uniform(0, 0.1))
        job.kill()
        inside = list(job.run.glob("checkpoints/*.tmp"))
        self.finish(run, ranks, *words, same=state_of(whole))
        hold([*losses(whole)] == [*losses(job.run)], f"{run}: other rows in metrics.jsonl")
        hold(losses(whole) == losses(job.run), f"{run}: other losses")
        hold(not list(job.run.glob("checkpoints/*.tmp")), f"{run}: a .tmp folder stays")
        return "inside a save" if inside else "elsewhere"

    def sizes(self, i: int) -> str:
        """World size 1 -> 2 -> 4 -> 3 -> 1 between kills."""
        run, mode = f"sizes{i}", ("ddp", "fsdp")[i % 2]
        whole, _ = self.reference()
        for part, ranks in enumerate((1, 2, 4, 3)):
            words = (f"--parallel={mode}",) if ranks > 1 else ()
            job = Job(self.home, run, ranks, *words)
            job.reach(12 * part + self.random.randrange(7, 12))
            job.kill()
        self.finish(run)
        ours, theirs = losses(self.home / "out" / run), losses(whole)
        hold([*ours] == [*theirs], f"{run}: other rows in metrics.jsonl")
        for step, (loss, *counts) in ours.items():
            hold(counts == list(theirs[step][1:]), f"{run}: other data at step {step}")
            hold(abs(loss - theirs[step][0]) <= 1e-5, f"{run}: loss at step {step}")
        worst = max(abs(ours[s][0] - theirs[s][0]) for s in ours)
        return f"{mode}, largest difference of a loss {worst:.0e}"

    def damage(self, i: int) -> str:
        """The newest checkpoint damaged: named, skipped, and the one before is used."""
        run, (whole, _) = self.home / "out" / f"damage{i}", self.reference()
        shutil.copytree(whole, run)
        newest = run / "checkpoints" / f"step_{STEPS}"
        files = sorted(p for p in newest.rglob("*") if p.is_file())
        small = [p for p in files if p.suffix == ".json"]
        target = self.random.choice(small if i % 2 else files)
        kind = ("truncated", "flipped byte", "missing file", "empty folder")[i // 2 % 4]
        content = bytearray(target.read_bytes())
        if kind == "truncated":
            target.write_bytes(content[:self.random.randrange(len(content))])
        elif kind == "flipped byte":
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            target.write_bytes(content)
        elif kind == "missing file":
            target.unlink()
        else:
            shutil.rmtree(newest)
            newest.mkdir()
        said = self.finish(run.name, same=state_of(whole)).said()
        hold(f"step_{STEPS} is damaged" in said and f"step_{STEPS - SAVES}\n" in said,
             f"{run}: {kind} {target.name} was not named and skipped")
        return kind

    def disk(self, i: int) -> str:
        """A disk that is full or read-only in a save, or a limit on the size of files."""
        run, (whole, _) = f"disk{i}", self.reference()
        kind, place = ("file-size limit", "full", "read-only")[i % 3], self.home / "out" / run
        checkpoint = whole / "checkpoints" / f"step_{STEPS}"
        sizes = [p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()]
        words = [f"--save_interval={STEPS // 3}"]
        Job(self.home, run, 1, *words, "--max_minutes=1e-9").end()  # one good checkpoint
        if kind == "file-size limit":
            limit = self.random.randrange(2000, max(sizes))
            job = Job(self.home, run, 1, *words, before=lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, limit)))
            code = job.end()
        else:
            room = int(sum(sizes) * self.random.uniform(1.05, 2.9))
            rest = f"mount -t tmpfs -o size={room} none mount && cp -a out/{run}/. mount/ && " \
                   f"mount --bind mount out/{run} && "
            if kind == "read-only":
                rest = (f"mount --bind out/{run}/checkpoints out/{run}/checkpoints && "
                        f"(sleep {self.random.uniform(2, 5)}; until mount -o remount,ro,bind "
                        f"out/{run}/checkpoints; do sleep 0.01; done) & ")
            (self.home / "mount").mkdir(exist_ok=True)
            (self.home / "kept").mkdir(exist_ok=True)
            script = f'{rest} "$@"; code=$?; cp -a out/{run} kept/; exit $code'
            job = Job(self.home, run, 1, *words,
                      wrap=("unshare", "-rm", "bash", "-c", script, "bash"))
            code = job.end()
            shutil.rmtree(place)
            shutil.move(self.home / "kept" / run, place)
        said = job.said()
        hold("Traceback" not in said, f"{job.log}: a traceback")
        hold(code == 0 or (code == 1 and "no checkpoint could be written" in said),
             f"{job.log}: exit code {code}")
        hold(1 in steps(place), f"{place}: the checkpoint before is gone")
        again = self.finish(run, 1, *words, same=state_of(whole)).said()
        hold("is damaged" not in again, f"{place}: a damaged checkpoint was left")
        return f"{kind}, {'ended cleanly' if code else 'went on'}"

    def signals(self, i: int) -> str:
        """A signal to one rank or to all: all save the same step, and it goes on to the same bits;
        every third time a second signal, which leaves at once."""
        run, (ranks, words) = f"signal{i}", self.split(i + 1)
        whole, _ = self.reference(ranks, *words)
        number = self.random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        second = i % 3 == 2
        job = Job(self.home, run, ranks, *words, code=SLOW.format(seconds=5 if second else 0.02))
        job.reach(self.random.randrange(1, 2 if second else STEPS - 9))
        time.sleep(self.random.uniform(0, 0.1))
        targets = job.pids()[-1:] if self.random.random() < 0.5 else job.pids()
        for pid in targets:
            send(pid, number)
        if second:
            time.sleep(0.8)
            for pid in targets:
                send(pid, signal.SIGTERM)
            began = time.monotonic()
            while any(Path(f"/proc/{p}/stat").exists() and Path(f"/proc/{p}/stat").read_text()
                      .rpartition(")")[2].split()[0] != "Z" for p in targets):
                time.sleep(0.02)
                hold(time.monotonic() - began < 2, f"{job.log}: alive 2 s after a second signal")
            code = job.end()
            hold(code == 143 if ranks == 1 else "exitcode  : 143" in job.said(),
                 f"{job.log}: exit code {code}")
        else:
            code = job.end()
            hold(code == 75 if ranks == 1 else job.said().count("exitcode  : 75") == ranks,
                 f"{job.log}: exit code {code}")
            status = job.status()
            hold(status["state"] == "stopped" and steps(job.run)[-1] == status["step"],
                 f"{job.run}: {status}, checkpoints {steps(job.run)}")
        self.finish(run, ranks, *words, same=state_of(whole))
        return f"{'a second signal' if second else number.name}, " \
               f"{'all ranks' if len(targets) == ranks else 'one rank'}"

    def lost(self, i: int) -> str:
        """A rank killed or stopped: the job ends with the reason, or torchrun starts it again."""
        run, ranks, stopped = f"lost{i}", 2 + i // 2 % 2, i % 2
        restarts = self.random.random() < 0.5
        words = ("--parallel=ddp",) if ranks == 2 else ("--parallel=fsdp",)
        whole, _ = self.reference(ranks, *words)
        job = Job(self.home, run, ranks, *words,
                  launcher=("--max-restarts=2",) if restarts else ())
        job.reach(self.random.randrange(1, STEPS - 9))
        began = time.monotonic()
        send(self.random.choice(job.pids()), signal.SIGSTOP if stopped else signal.SIGKILL)
        code, took = job.end(), time.monotonic() - began
        said = job.said()
        reason = ("no sign of life for",) if stopped else ("exitcode: -9", "exitcode  : -9")
        hold(any(words in said for words in reason), f"{job.log}: no reason was given")
        hold(took < 120, f"{job.log}: it took {took:.0f} s")
        hold(code == (0 if restarts else 1), f"{job.log}: exit code {code}")
        if not restarts:
            self.finish(run, ranks, *words)
        hold(state_of(job.run) == state_of(whole), f"{run}: other bits than undisturbed")
        return f"{'stopped' if stopped else 'killed'}, " + (
            f"restarted and done after {took:.0f} s" if restarts else f"ended after {took:.0f} s")

    def nan(self, i: int) -> str:
        """NaN in the loss of one rank: no rank steps, as if all had had it."""
        run, step = f"nan{i}", self.random.randrange(1, STEPS - 9)
        ranks, words = self.split(2 * (i % 2) + 1)
        # micro-batches of 2 of 4 rows a rank; DDP makes one more before the first step
        call = 2 * step + self.random.randrange(1, 3) + (words[0] == "--parallel=ddp")
        one = f"('{self.random.randrange(ranks)}',)"
        job = Job(self.home, run, ranks, *words, code=NAN.format(call=call, ranks=one))
        hold(job.end() == 0, f"{job.log}: exit code {job.process.returncode}")
        whole, _ = self.reference(ranks, *words, code=NAN.format(call=call, ranks=("0", "1")))
        lost = [s for s, (loss, *_) in losses(job.run).items() if loss is None]
        hold(lost == [step + 1], f"{run}: steps {lost} were left out, not {step + 1}")
        hold(state_of(job.run) == state_of(whole), f"{run}: a rank stepped")
        return words[0][11:]

    def two(self, i: int) -> str:
        """Two jobs on one run: one of them is refused; every second time both start at once."""
        run, (whole, _) = f"two{i}", self.reference()
        jobs = [Job(self.home, run, code=SLOW.format(seconds=0.3))]
        if i % 2 == 0:
            jobs[0].reach(self.random.randrange(1, 8))
        jobs.append(Job(self.home, run, code=SLOW.format(seconds=0.3)))
        jobs[1].log = jobs[0].log
        codes = sorted(job.end() for job in jobs)
        hold(codes == [0, 2] and "another process" in jobs[0].said(),
             f"{jobs[0].log}: exit codes {codes}")
        hold(i % 2 or jobs[0].process.returncode == 0, f"{jobs[0].log}: the wrong one was refused")
        hold(state_of(jobs[0].run) == state_of(whole), f"{run}: other bits than undisturbed")
        return "at once" if i % 2 else "while it runs"


ROWS = {"kill": 100, "sizes": 20, "damage": 100, "disk": 10, "signals": 20, "lost": 10, "nan": 10,
        "two": 5}


def main() -> int:
    """Try the rows; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2, help="times that each fault is tried")
    parser.add_argument("--full", action="store_true", help=f"these counts: {ROWS}")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--rows", default=",".join(ROWS), help="which faults")
    flags = parser.parse_args()
    home, failures, table = Path(tempfile.mkdtemp(prefix="faults-")), [], []
    for name in flags.rows.split(","):
        (home / name).mkdir()
        faults = Faults(home / name, flags.seed)
        times, held = ROWS[name] if flags.full else flags.n, 0
        notes: dict[str, int] = {}
        for i in range(times):
            try:
                note = getattr(faults, name)(i)
                held, notes[note] = held + 1, notes.get(note, 0) + 1
                print(f"{name} {i}: held ({note})", flush=True)
            except Failure as failure:
                failures.append(failure)
                print(f"{name} {i}: DID NOT HOLD: {failure}", flush=True)
        kinds = "; ".join(f"{note} {count}" for note, count in sorted(notes.items()))
        what = " ".join((getattr(Faults, name).__doc__ or "").split()).partition(":")[0]
        table.append(f"| {what} | {times} | {held} | {kinds if len(notes) < 9 else ''} |")
        print(table[-1], flush=True)
    print("\n| fault | times | held | of these |\n| --- | --- | --- | --- |")
    print("\n".join(table))
    if failures:
        print(f"{len(failures)} did not hold; see {home}")
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
