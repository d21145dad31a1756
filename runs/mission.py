"""The mission: python runs/mission.py --minutes=N --text=F.jsonl.xz,G.jsonl.xz [--eval=FOLDER]

What this project is for, in N minutes of one machine. A LLaMA learns at a short context, which is
then made four times as long in two ways with the same tokens: by position interpolation
(https://arxiv.org/abs/2306.15595), and plainly. All three are scored by position, at the short
context, on tinyMMLU and the other local sets of FOLDER; report.py makes a page of each.

The stages are prepare, trial, base, interpolated, plain, scores, report. The trial (30 steps with a
schedule of their own) measures speeds and starts; from them and the minutes that are left OUT's
plan.json is made, before the long run: its steps, its minutes and its loss. Where the minutes are
too few for three runs the long contexts are left out. A stage that fails or is cut by the end of
the minutes says why in OUT/commands.log and stops only those that need it.

  --detach           goes on in the background, with OUT/mission.log; returns at once
  --status           where it is (exit 0: running or done, 1: neither)
  --set="--micro_batch=128 --compile=false"   further words for every train.py
  --tar=FILE.tar.gz  OUT as one file, renewed with every stage

OUT keeps what is small: result.json, summary.md, of every run metrics, samples, scores and report.
Data set and checkpoints are in data/ and in a folder of OUT's name under out/. The same command
goes on after a kill or with more minutes, on the plan as it was made. On another machine: OUT's
plan.json and out/NAME/base, copied there, are enough; the text must have the same names. Exit
codes: 0 done, 1 a stage failed, 2 the input, 75 the minutes are over, go on.

The loss is foretold as E + (trial - E) (tokens of the trial / tokens)^b with the constants that
https://arxiv.org/abs/2404.10102 fits to Chinchilla's runs: b = 0.366, E = 1.817 + 482 / N^0.348 for
N parameters. Of the CPU's recorded run (143 thousand tokens of a short run: 6.944; 16 times as
many: 5.200) it says 4.75, so it was 0.45 nats too low; with b = 0.255 it would have been right,
which is given as the upper end. A rehearsal of 103 steps of 1,024 tokens ended above even that
(6.83; said 6.29, at most 6.62). Nothing of it was checked on a GPU.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, complain, parse, parse_arguments, run_command
from plainllama.files import hold, read_json, read_status, steps_of, write_json, write_text
from plainllama.settings import UserError, key
from runs import mission_plan as plans
from runs.mission_plan import ARMS, TIMES, last_step


@dataclass
class Flags:
    """What runs/mission.py takes."""

    minutes: float = key(22.0, "of everything, from here to the report", low=0.05)
    text: str = key("", "files of text, with commas between them (none: the config's)")
    tokenizer: str = key("", "as in a config, such as FILE.model (none: the config's)")
    eval: str = key("", "folder with tinyMMLU.jsonl, mmlu_dev.jsonl and other local sets")
    config: str = key("config/mission.py", "the run at the short context")
    set: str = key("", "words for every train.py")
    out: str = key("runs/results/mission", "the folder for what is kept")
    tar: str = key("", "a .tar.gz of that folder")
    detach: bool = key(False, "go on in the background")
    status: bool = key(False, "only say where it is")


SOFTER = 6  # the long runs' rates are so much lower, as in config/llama100m_pi1024.py
NEEDS = {"prepare": "", "trial": "prepare", "base": "trial", "interpolated": "base",
         "plain": "base", "scores": "", "report": ""}  # stage -> the one that must be complete
KEPT = ("*.json", "*.jsonl", "report*", "eval/*")
LEAST_MINUTES = 5  # on a GPU, where compiling alone takes one


class Cut(Exception):
    """The minutes are over."""


class Failed(Exception):
    """A script of ours failed: why."""


# ---- the stages

class Mission:
    """One call: what it was asked, and until when."""

    def __init__(self, flags: Flags):
        self.flags, self.out = flags, Path(flags.out)
        self.home = Path("out") / self.out.absolute().name
        self.began = time.time()
        self.until = self.began + 60 * flags.minutes
        config = flags.config if Path(flags.config).exists() else str(ROOT / flags.config)
        self.words = [config, *shlex.split(flags.set)]
        self.keys = parse(self.words, "").config
        self.sets = plans.sets_of(flags.eval)
        self.unfinished: dict[str, str] = {}  # stage -> why
        self.seconds: dict[str, float] = {}  # stage -> how long it took, over all calls
        self.stage_began = self.began
        self.asked = {name: getattr(flags, name) for name in ("config", "text", "tokenizer", "set")}
        self.plan = read_json(self.out / "plan.json")

    def check(self) -> None:
        """Refuse, before anything slow, what cannot work."""
        flags, plan = self.flags, self.out / "plan.json"
        for path in filter(None, flags.text.split(",")):
            if not Path(path).is_file():
                raise UserError(f"--text: no file {path}")
        if flags.eval and not self.sets:
            raise UserError(f"--eval: no folder {flags.eval} with .jsonl files")
        if "tinyMMLU" in self.sets and "mmlu_dev" not in self.sets:
            raise UserError(f"--eval: {flags.eval} has tinyMMLU but no mmlu_dev.jsonl for its "
                            "examples")
        if flags.tokenizer.endswith((".model", ".json")) and not Path(flags.tokenizer).is_file():
            raise UserError(f"--tokenizer: no file {flags.tokenizer}")
        if flags.tar and not Path(flags.tar).absolute().parent.is_dir():
            raise UserError(f"--tar: no folder {Path(flags.tar).parent}")
        if self.plan and self.plan["asked"] != self.asked:
            raise UserError(f"{plan} was made for {self.plan['asked']}, not for {self.asked}; take "
                            "another --out")
        if not self.plan and self.keys.device != "cpu" and flags.minutes < LEAST_MINUTES:
            raise UserError(f"--minutes={flags.minutes:g} are too few for the mission, which takes "
                            f"{LEAST_MINUTES} at least")

    def left(self) -> float:
        """Seconds until the end of this call."""
        return self.until - time.time()

    def script(self, name: str, *words: str, seconds: float = 0.0) -> None:
        """Run a script of ours for at most so many seconds (0: to the end of this call), and keep
        what is small while it runs. What it says is added to OUT/commands.log. Cut or Failed where
        it does not get to its end."""
        end = time.time() + (seconds or self.left())
        with open(self.out / "commands.log", "ab") as file:
            file.write(f"$ {shlex.join([name, *words])}\n".encode())
            file.flush()
            child = subprocess.Popen([sys.executable, str(ROOT / name), *words], stdout=file,
                                     stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                     preexec_fn=die_with_parent)
            code = None
            while code is None:
                try:
                    code = child.wait(max(0.01, min(20, end - time.time())))
                except subprocess.TimeoutExpired:
                    self.keep()
                    if time.time() >= end:
                        child.kill()
                        child.wait()
                        code = 75
        if code == 75:
            raise Cut(f"the minutes were over in {name}")
        if code:
            said = (self.out / "commands.log").read_text("utf-8", "replace").rstrip()
            raise Failed(f"{name} ended with {code}: {said.rsplit(chr(10), 1)[-1]}")

    def train(self, run: Path, *words: str, after: float = 0.0, finish: float = 0.0) -> None:
        """A run to its end, of which `after` seconds of this call must be left."""
        left = self.left() - after
        if left <= finish:
            raise Cut("no time was left")
        self.script("train.py", *self.words, f"--out_dir={run}",
                    f"--max_minutes={max(0.001, (left - finish) / 60):.3f}", *words,
                    seconds=left + finish)

    def prepare(self) -> None:
        """The data set, or what is missing of it. One that the plan was made with is not compared
        with its text again."""
        data, flags = Path("data") / self.keys.dataset, self.flags
        if not (self.plan and (data / "manifest.json").exists()):
            sources = [path for path in flags.text.split(",") if path]
            self.script("prepare.py", self.words[0], f"--dataset={self.keys.dataset}",
                        *([f"--sources={sources}"] if sources else []),
                        *([f"--tokenizer={flags.tokenizer}"] if flags.tokenizer else []))
        if self.plan and self.plan["data"] != (data / "manifest.sha256").read_text().strip():
            raise UserError(f"{data} is not the data set of {self.out / 'plan.json'}: name the "
                            "same files by the same names, or take another --out")

    def trial(self) -> None:
        """A short run, scored and reported as the long ones will be: the plan, made once."""
        if self.plan:
            return
        trial = read_json(self.home / "trial.json", tolerant=True)  # of minutes that were too few
        if trial.get("asked") != self.asked:
            trial = self.measure()
        gone = sum(self.seconds.values()) + time.time() - self.stage_began
        scores = {name: plans.scoring_seconds(name, self.sets, self.keys.block_size, trial)
                  for name in ARMS}
        plan = plans.planned(gone, self.left(), trial, self.keys.max_steps, scores)
        data = (Path("data") / self.keys.dataset / "manifest.sha256").read_text().strip()
        self.plan = {"asked": self.asked, "data": data, **plan, "trial": trial}
        write_json(self.out / "plan.json", self.plan)

    def measure(self) -> dict:
        """Make the trial, from its beginning: half of one measures nothing."""
        run = self.home / "trial"
        shutil.rmtree(run, ignore_errors=True)
        began = time.time()
        self.train(run, *plans.schedule(plans.TRIAL, 2), "--log_interval=5")
        trial = plans.measured(run, began, time.time()) | {"asked": self.asked}
        for name, words in (("score", ("eval.py", f"--ckpt={run}", "--tasks=", "--by_position",
                                       f"--device={self.keys.device}")),
                            ("report", ("report.py", str(run)))):
            began = time.time()
            with contextlib.suppress(Failed):  # the long run is worth it all the same
                self.script(*words)
            trial[name] = time.time() - began
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        write_json(self.home / "trial.json", trial)
        return trial

    def long_run(self, name: str) -> None:
        """Train base or, from its weights, a run at the long context."""
        plan, run = self.plan, self.home / name
        steps = plan["base" if name == "base" else "tune"]
        if not steps or (read_status(run) == "done" and last_step(run) == steps):
            return
        words = plans.schedule(steps, plan["looks"] if name == "base" else 2)
        if name != "base":
            words += [*ARMS[name], f"--init_from={self.home / 'base'}",
                      f"--block_size={TIMES * self.keys.block_size}",
                      f"--learning_rate={self.keys.learning_rate / SOFTER}",
                      f"--min_lr={self.keys.min_lr / SOFTER}"]
        # a plan kept on a bare machine may be older than this call's minutes
        self.train(run, *words, after=min(plan["after"], self.left() / 2),
                   finish=plan["trial"]["finish"])

    def scores(self) -> None:
        """Score the runs that have a checkpoint, the most important first, while time is left."""
        after = self.plan["trial"]["report"] * len(ARMS) if self.plan else 0
        runs = [name for name in ARMS if steps_of(self.home / name)]
        work = [(rank, name, *item) for name in runs
                for rank, item in enumerate(plans.scoring(name, self.sets, self.keys.block_size))]
        work.sort(key=lambda item: item[0])  # stable: base first
        why = []
        for _, name, words, wanted in work:
            if not plans.lacking(self.home / name, wanted):
                continue
            if self.left() - after < 1:
                break
            try:
                self.script("eval.py", f"--ckpt={self.home / name}", *words,
                            f"--device={self.keys.device}", seconds=self.left() - after)
            except Cut:
                break  # said below, as everything that is missing
            except Failed as error:
                why.append(str(error))
        if why:
            raise Failed("; ".join(why))

    def missing(self) -> list[str]:
        """The scores that are not there, and the runs that have no checkpoint."""
        found = []
        for name in ARMS:
            if not steps_of(self.home / name):
                found.append(f"{name}: the run")
                continue
            for _, wanted in plans.scoring(name, self.sets, self.keys.block_size):
                found += plans.lacking(self.home / name, wanted)
        return found

    def report(self) -> None:
        """A page of every run, then result.json and summary.md."""
        why = []
        for name in ARMS:
            if last_step(self.home / name):
                try:  # also when the minutes are over: it takes seconds and is what is left
                    self.script("report.py", str(self.home / name), seconds=max(self.left(), 60))
                except (Cut, Failed) as error:
                    why.append(str(error))
        self.seconds["report"] = self.seconds.get("report", 0) + time.time() - self.stage_began
        self.stage_began = time.time()
        write_json(self.out / "result.json", result := self.result())
        write_text(self.out / "summary.md", plans.summary(result))
        if why:
            raise Failed("; ".join(why))

    def result(self) -> dict:
        """What was found of every run, what was foretold, and the difference."""
        runs = {name: plans.outcome(self.home / name, self.sets.get("tinyMMLU"))
                for name in ARMS if last_step(self.home / name)}
        predicted = self.plan.get("predicted", {})
        found = {"minutes": sum(self.seconds.values()) / 60}
        if "base" in runs and runs["base"]["step"] == self.plan.get("base"):
            found |= {"val_loss": runs["base"]["val_loss"],
                      "base_minutes": runs["base"]["minutes"]}
        return {"runs": runs, "predicted": predicted, "found": found,
                "difference": {name: found[name] - predicted[name]
                               for name in found if name in predicted},
                "missing": self.missing(), "unfinished": self.unfinished,
                "seconds": self.seconds}

    # ---- the chain

    def run(self) -> int:
        """Every stage that can be done; the exit code."""
        self.seconds = read_json(self.out / "status.json", tolerant=True).get("seconds", {})
        cut = False
        for stage, need in NEEDS.items():
            self.stage_began = time.time()
            self.tell("running", stage)
            if need in self.unfinished:
                self.note(stage, f"needs {need}")
                continue
            try:
                (self.long_run(stage) if stage in ARMS else getattr(self, stage)())
            except Cut as error:
                cut = True
                self.note(stage, str(error))
            except (Failed, OSError, ValueError, KeyError, IndexError) as error:
                self.note(stage, f"{error}" if isinstance(error, Failed) else repr(error))
            except BaseException as error:
                self.note(stage, str(error) or repr(error))
                self.tell("failed", stage)
                raise
            took = time.time() - self.stage_began
            self.seconds[stage] = self.seconds.get(stage, 0) + took
            self.keep()
            print(f"{stage}: {self.unfinished.get(stage, 'done')}, {took:.0f} s", flush=True)
            if stage == "trial" and self.plan:
                print(plans.sentence(self.plan), flush=True)
        code = 0 if not self.unfinished else 75 if cut else 1
        self.tell({0: "done", 1: "failed", 75: "stopped"}[code], "report")
        self.keep()
        return code

    def note(self, stage: str, why: str) -> None:
        """Remember, and write down, why a stage is not complete."""
        self.unfinished[stage] = why
        with open(self.out / "commands.log", "a", encoding="utf-8") as file:
            file.write(f"stage {stage}: {why}\n")

    def tell(self, state: str, stage: str) -> None:
        """Write status.json."""
        write_json(self.out / "status.json", {
            "state": state, "stage": stage, "pid": os.getpid(), "began": self.began,
            "until": self.until, "home": str(self.home.absolute()), "seconds": self.seconds,
            "unfinished": self.unfinished})

    def keep(self) -> None:
        """Copy to OUT what is small, and pack it if that is wished."""
        for run in ("trial", *ARMS):
            for pattern in KEPT:
                for path in (self.home / run).glob(pattern):
                    target = self.out / run / path.relative_to(self.home / run)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):  # renamed by its writer
                        shutil.copy(path, target)
        if self.flags.tar:
            part = f"{self.flags.tar}.tmp"
            with tarfile.open(part, "w:gz") as packed:
                packed.add(self.out, self.out.absolute().name)
            os.replace(part, self.flags.tar)


def die_with_parent() -> None:
    """Have a child killed when this process is, so that the next call finds nobody at work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def main(command: CommandLine) -> int:
    """Go on where the call before ended."""
    flags = command.flags
    if command.files:
        raise UserError(f"unexpected argument {command.files[0]}; text is named with --text=")
    if flags.status:
        return plans.show_status(Path(flags.out))
    mission = Mission(flags)
    mission.check()
    mission.home.mkdir(parents=True, exist_ok=True)
    with open(mission.home / ".lock", "w") as lock:
        hold(lock, f"a mission is at work in {mission.home}; --status says where it is")
        mission.out.mkdir(parents=True, exist_ok=True)
        if flags.detach:
            if pid := os.fork():  # the lock goes to the child with it
                print(f"process {pid}; poll it: python runs/mission.py --status --out={flags.out}")
                return 0
            into_background(mission.out / "mission.log")
        code = mission.run()
    print((mission.out / "summary.md").read_text(), end="", flush=True)
    if code == 75:
        print(f"{flags.minutes:g} minutes are over; the same command goes on")
    for stage, why in mission.unfinished.items():
        complain(f"{stage}: {why}", 1)
    return code


def into_background(path: Path) -> None:
    """Leave the terminal and its process group; what is said goes to a file."""
    os.setsid()
    with open(path, "a") as file, open(os.devnull) as nothing:
        for stream, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), target)


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
