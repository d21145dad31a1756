"""The mission: python runs/mission.py --text=F.jsonl.xz,G.jsonl.xz [--eval=FOLDER]

What this project is for, as one long run made of calls of some minutes. A LLaMA learns at a short
context, which is then made four times as long in two ways with the same tokens: by position
interpolation (https://arxiv.org/abs/2306.15595), and plainly. All three are scored by position, at
the short context, on tinyMMLU's questions and the other local sets of FOLDER, and report.py makes a
page of them. As many steps as fit in --total minutes; a call ends within --minutes, with exit code
75 if the same command has to go on.

--predict stops before the first of them: a ladder of three short runs, each with a schedule of its
own, says which loss the long one will reach. The next call goes on and compares at the end.

OUT keeps what is worth keeping, a few MB: plan.json, prediction.json, result.json, and of every run
metrics, samples, scores and report; the data set is data/mission, checkpoints are in a folder of
OUT's name under out/. --rehearse: tiny, on the CPU, with bytes as tokens.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse, parse_arguments, run_command
from plainllama.files import write_json
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What runs/mission.py takes."""

    text: str = key("", "files of text, with commas between them (none: the embedded text)")
    eval: str = key("", "folder with tinyMMLU.jsonl, mmlu_dev.jsonl and other local sets")
    tokenizer: str = key("mistral", "as in a config")
    config: str = key("config/mission.py", "the run at the short context")
    total: float = key(22.0, "minutes of training in the three runs; trial and ladder come on top",
                       low=0.01)
    minutes: float = key(9.5, "minutes of this call", low=0.05)
    tune_share: float = key(0.1, "of the training time, for each long run", (), 0.01, 0.4)
    out: str = key("runs/results/mission", "the folder for what is kept")
    predict: bool = key(False, "climb the ladder, write prediction.json, and stop")
    rehearse: bool = key(False, "tiny sizes on the CPU")


TIMES = 4  # the long context is so many times the short one
ARMS = {"base": [], "interpolated": ["--rope_scaling=linear", f"--rope_factor={TIMES}.0"],
        "plain": []}
SOFTER = 6  # the long runs' rates are so much lower, as in config/llama100m_pi1024.py
TINY = ["--n_layer=2", "--n_head=2", "--d_model=32", "--d_ff=64", "--block_size=64",
        "--global_batch_tokens=512", "--eval_tokens=1024", "--device=cpu", "--compile=false",
        "--optimizer=adamw"]
FEW = "[{'path': 'embedded', 'max_documents': 40}]"  # the rehearsal's text
LADDER = (16, 8, 4)  # the parts of the long run's steps that three short runs take
LEAST = 4  # steps of the shortest
KEPT = ("*.json", "*.jsonl", "report*", "eval/*")


class Mission:
    """One call: what it was asked, and until when."""

    def __init__(self, flags: Flags):
        self.flags, self.out = flags, Path(flags.out)
        self.home = Path("out") / self.out.absolute().name
        self.until = time.time() + 60 * flags.minutes
        self.config = flags.config if Path(flags.config).exists() else str(ROOT / flags.config)
        self.tiny = TINY if flags.rehearse else []
        self.keys = parse([self.config, *self.tiny], "").config
        self.tokenizer = "bytes" if flags.rehearse else flags.tokenizer

    def script(self, name: str, *words: str, ok: tuple[int, ...] = (0,)) -> int:
        """Run a script of ours; its exit code. What it says is added to OUT/commands.log."""
        left = self.until - time.time()
        with open(self.out / "commands.log", "ab") as file:
            try:
                done = subprocess.run([sys.executable, str(ROOT / name), *words], stdout=file,
                                      stderr=subprocess.STDOUT, timeout=max(left, 1))
            except subprocess.TimeoutExpired:
                raise SystemExit(75) from None
        if done.returncode not in ok:
            said = (self.out / "commands.log").read_text("utf-8", "replace").rstrip()
            line = f"{name} ended with {done.returncode}: {said.rsplit(chr(10), 1)[-1]}"
            raise UserError(line) if done.returncode == 2 else SystemExit(f"error: {line}")
        return done.returncode

    def train(self, run: Path, *words: str) -> None:
        """A run to its end, or SystemExit(75) where this call's time is over."""
        left = (self.until - time.time()) / 60 - (0.02 if self.tiny else 0.5)  # to save and leave
        if left <= 0 or self.script(
                "train.py", self.config, *self.tiny, f"--out_dir={run}", f"--max_minutes={left}",
                "--dataset=mission", *words, ok=(0, 75)):
            raise SystemExit(75)

    def plan(self) -> dict:
        """Steps of the runs, from the speed of a short trial: made once, then read."""
        path, asked = self.out / "plan.json", {name: getattr(self.flags, name) for name in (
            "config", "tokenizer", "total", "tune_share", "rehearse")}
        if not path.exists():
            trial, steps = self.home / "trial", 12 if self.tiny else 60
            self.train(trial, f"--max_steps={steps}", "--warmup_steps=5", "--eval_interval=1000000",
                       "--save_interval=1000000", "--sample_tokens=0", "--log_interval=10",
                       "--eval_tokens=1024")
            run = json.loads((trial / "run.json").read_text())
            speed = median(row["tokens_per_second"] for row in rows_of(trial)
                           if "tokens_per_second" in row and row["step"] > 1)  # it is compiled
            batch = run["config"]["global_batch_tokens"]
            every = 60 * self.flags.total * speed / batch
            tune = max(2, int(every * self.flags.tune_share))
            steps = max(4, int(every) - 2 * tune)
            write_json(path, {
                "asked": asked, "base": steps, "tune": tune, "tokens_per_second": speed,
                "batch_tokens": batch,
                "epochs": (steps + tune) * batch / run["data"]["train_tokens"]})
            shutil.rmtree(trial)
        plan = json.loads(path.read_text())
        if plan["asked"] != asked:
            raise UserError(f"{path} was made for {plan['asked']}, not for {asked}; take another "
                            "--out")
        return plan

    def predict(self, plan: dict) -> dict:
        """What the run at the short context will come to: made once, then read."""
        path = self.out / "prediction.json"
        if not path.exists():
            if plan["base"] < LADDER[0] * LEAST:
                raise UserError(f"{plan['base']} steps are too few for a ladder, which needs "
                                f"{LADDER[0] * LEAST}; take more minutes (--total)")
            rungs, seconds = [], 0.0
            for part in LADDER:
                run, steps = self.home / f"ladder_{part}", plan["base"] // part
                self.train(run, *schedule(steps), f"--eval_interval={steps}", "--sample_tokens=0")
                self.keep(run)
                tokens, loss, _ = last_of(run)
                seconds = training_seconds(run) / tokens  # of the longest
                rungs.append([tokens, loss])
            write_json(path, {
                "rungs": rungs, "tokens": plan["base"] * plan["batch_tokens"],
                "val_loss": extrapolated([loss for _, loss in rungs]),
                "minutes": seconds * plan["base"] * plan["batch_tokens"] / 60})
        return json.loads(path.read_text())

    def score(self, run: Path, name: str) -> None:
        """Loss by position, at the short context, and the local sets; what is done is not done
        again by the next call."""
        device = ["--device=cpu"] if self.tiny else []
        sets = sets_of(self.flags.eval)
        others = ",".join(f"local:{path}" for name, path in sets.items()
                          if name not in ("tinyMMLU", "mmlu_dev"))
        wanted = [["--by_position", f"--tasks={others}"]]
        if name != "base":
            wanted.append(["--tasks=", f"--context={self.keys.block_size}"])
        if "tinyMMLU" in sets:
            wanted.append([f"--tasks=local:{sets['tinyMMLU']}", f"--shots={sets['mmlu_dev']}"])
        for number, words in enumerate(wanted):
            mark = run / f"scored.{number}"
            if not mark.exists():
                self.script("eval.py", f"--ckpt={run}", *device, *words)
                mark.touch()
        self.script("report.py", str(run))

    def keep(self, run: Path) -> None:
        """Copy to OUT what is small."""
        for pattern in KEPT:
            for path in run.glob(pattern):
                target = self.out / run.name / path.relative_to(run)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def rows_of(run: Path) -> list[dict]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sets_of(folder: str) -> dict[str, Path]:
    """The local sets of a folder by name: tinyMMLU.jsonl or tinyMMLU.jsonl.xz is tinyMMLU."""
    if not folder:
        return {}
    return {path.name.split(".")[0]: path for path in sorted(Path(folder).glob("*.jsonl*"))}


def last_of(run: Path) -> tuple[int, float, float]:
    """Tokens, loss and bits per byte of a run's last evaluation."""
    row = [row for row in rows_of(run) if row.get("val_loss") is not None][-1]
    return row["tokens"], row["val_loss"], row["val_bpb"]


def training_seconds(run: Path) -> float:
    """Seconds of training alone, from the speeds that a run logged."""
    rows = [row for row in rows_of(run) if "tokens_per_second" in row]
    done = [0, *(row["tokens"] for row in rows)]
    return sum((row["tokens"] - before) / row["tokens_per_second"]
               for row, before in zip(rows, done, strict=False))


def extrapolated(losses: list) -> float:
    """Loss after two more doublings of the tokens, from losses at three numbers of tokens that
    double: the power law with an offset that goes through all three (E + A / D^b, as in
    https://arxiv.org/abs/2203.15556), of which each step down is a constant part of the last."""
    first, second = losses[0] - losses[1], losses[1] - losses[2]
    if not first > second > 0:
        raise UserError(f"the ladder's losses {losses} do not fall by less and less; its runs are "
                        "too short")
    part = second / first
    return losses[2] - second * part - second * part**2


def schedule(steps: int) -> list[str]:
    """The keys that a run's length sets."""
    return [f"--max_steps={steps}", f"--warmup_steps={max(1, steps // 20)}",
            f"--save_interval={1 + steps // 4}"]


def main(command: CommandLine) -> int:
    """Go on where the call before ended."""
    mission = Mission(command.flags)
    flags = mission.flags
    sources = [path for path in [*flags.text.split(","), *command.files] if path]
    if missing := [path for path in sources if not Path(path).is_file()]:
        raise UserError(f"--text: no file {missing[0]}")
    sets = sets_of(flags.eval)
    if flags.eval and not sets:
        raise UserError(f"--eval: no folder {flags.eval} with .jsonl files")
    if "tinyMMLU" in sets and "mmlu_dev" not in sets:
        raise UserError(f"--eval: {flags.eval} has tinyMMLU but no mmlu_dev.jsonl for its examples")
    mission.out.mkdir(parents=True, exist_ok=True)
    try:
        mission.script("prepare.py", mission.config, "--dataset=mission",
                       f"--sources={sources or (FEW if flags.rehearse else 'embedded')}",
                       f"--tokenizer={mission.tokenizer}")
        plan = mission.plan()
        print(f"{plan['base']} steps of {plan['batch_tokens']:,} tokens, then {plan['tune']} in "
              f"two ways: {plan['epochs']:.2f} epochs", flush=True)
        if flags.predict:
            foreseen = mission.predict(plan)
            print(f"prediction: {foreseen['val_loss']:.3f} nats/token after "
                  f"{foreseen['tokens']:,} tokens and {foreseen['minutes']:.1f} minutes of "
                  "training")
        else:
            train_all(mission, plan)
    except SystemExit as end:
        if end.code == 75:
            print(f"{flags.minutes:g} minutes are over; the same command goes on")
        raise
    return 0


def train_all(mission: Mission, plan: dict) -> None:
    """The three runs, their scores, and how good the prediction was."""
    result = {}
    for name, keys in ARMS.items():
        run, long = mission.home / name, name != "base"
        steps = plan["tune" if long else "base"]
        words = [*schedule(steps), f"--eval_interval={1 + steps // 8}", *keys]
        if long:
            words += [f"--init_from={mission.home / 'base'}",
                      f"--block_size={TIMES * mission.keys.block_size}",
                      f"--learning_rate={mission.keys.learning_rate / SOFTER}",
                      f"--min_lr={mission.keys.min_lr / SOFTER}"]
        try:
            mission.train(run, *words)
            if not (mission.out / name / "report.html").exists():
                mission.score(run, name)
        finally:
            if run.exists():
                mission.keep(run)
        tokens, loss, bpb = last_of(run)
        result[name] = {"tokens": tokens, "val_loss": loss, "val_bpb": bpb,
                        "minutes": training_seconds(run) / 60}
        print(f"{name}: {loss:.4f} nats/token, {bpb:.4f} bits/byte after {tokens:,} tokens",
              flush=True)
    if (mission.out / "prediction.json").exists():
        base, foreseen = result["base"], mission.predict(plan)
        base |= {"off_by_nats": base["val_loss"] - foreseen["val_loss"],
                 "off_by_share_of_time": base["minutes"] / foreseen["minutes"] - 1}
        print(f"off the prediction by {base['off_by_nats']:+.3f} nats and "
              f"{base['off_by_share_of_time']:+.1%} of the time")
    write_json(mission.out / "result.json", result)


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
