"""What the mission plans, foretells and finds: functions of what a trial and the runs have written.

runs/mission.py, which does it, says what for.
"""

import lzma
import math
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from plainllama.files import hold, read_json, read_rows, steps_of
from plainllama.results import read_scores
from plainllama.settings import UserError

TIMES = 4  # the long context is so many times the short one
ARMS = {"base": [], "interpolated": ["--rope_scaling=linear", f"--rope_factor={TIMES}.0"],
        "plain": []}
TRIAL = 30  # steps
FEWEST, FEWEST_LONG = 30, 24  # steps of base and of a long run
LONG = 0.08  # of the training time, for each long run
BASE = 0.2  # of the time that is left; base has less only without the long runs
SCORES = 0.25  # of the time that is left, at most, is kept for scores
SPARE = 0.05  # of the time that is left, for what nobody measured
SLOWER = 1.25  # a long context's step; attention is a larger part of it
SCORING = 2  # times as many tokens a second as training, which has a backward pass
FLOOR, PARAMETERS, POWER = 1.8172, 482.01, 0.3478  # E = FLOOR + PARAMETERS / N^POWER
FALL, SLOW_FALL = 0.3658, 0.2546  # b: as published; as on the CPU, where it was fitted


# ---- the plan

def foretold(trial: dict, tokens: int) -> tuple[float, float]:
    """Loss after so many tokens, and where it ends if it falls as slowly as on the CPU."""
    loss = trial["val_loss"]
    # a model too small for the law is not expected to stop above where it already is
    floor = min(FLOOR + PARAMETERS / trial["parameters"]**POWER, 0.6 * loss)
    low, high = (floor + (loss - floor) * (trial["tokens"] / tokens)**b for b in (FALL, SLOW_FALL))
    return low, high


def planned(gone: float, left: float, trial: dict, most: int, scores: dict) -> dict:
    """The plan for the seconds that are `left` after `gone`, from what the trial measured.

    `most`: steps of base. `scores`: seconds of scoring by run. UserError where nothing fits.
    """
    step, evaluation = trial["batch_tokens"] / trial["tokens_per_second"], trial["evaluation"]
    edges = trial["start"] + trial["finish"]
    for long_runs in (2, 0):
        names = list(ARMS)[:1 + long_runs]
        after = min(sum(scores[name] for name in names), SCORES * left)
        after += trial["report"] * len(names)
        training = left * (1 - SPARE) - edges * len(names) - after
        tune = max(FEWEST_LONG, int((LONG * training - 2 * evaluation) / (SLOWER * step)))
        rest = training - long_runs * (tune * SLOWER * step + 2 * evaluation)
        # at most a tenth of the time to look at the loss
        looks = max(1, min(8, int(0.1 * rest / evaluation)))
        base = min(most, int((rest - looks * evaluation) / step))
        if base >= FEWEST and (not long_runs or rest >= BASE * left):
            break
    else:
        need = (edges + after + evaluation + FEWEST * step) / (1 - SPARE)
        raise UserError(f"--minutes={(gone + left) / 60:.3g} are too few: {gone / 60:.1f} are gone "
                        f"after the trial, and {FEWEST} steps with their start and scores need "
                        f"{need / 60:.1f}; take --minutes={math.ceil((gone + need) / 6) / 10:g} "
                        "or more")
    tune = min(tune, max(FEWEST_LONG, base // 4)) if long_runs else 0
    long = tune * SLOWER * step + 2 * evaluation
    spent = edges * len(names) + base * step + looks * evaluation + long_runs * long + after
    low, high = foretold(trial, base * trial["batch_tokens"])
    return {"base": base, "tune": tune, "looks": looks, "after": after,
            "tokens": base * trial["batch_tokens"],
            "epochs": base * trial["batch_tokens"] / trial["train_tokens"],
            "predicted": {"val_loss": low, "val_loss_at_most": high,
                          "base_minutes": base * step / 60, "minutes": (gone + spent) / 60}}


def measured(run: Path, began: float, ended: float) -> dict:
    """What a trial's files say about speeds: seconds of a start (from `began` to the first step),
    of an evaluation with its sample, of the end of a process, and the rest that a plan needs."""
    info, rows = read_json(run / "run.json"), read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    last = [row for row in rows if row.get("val_loss") is not None][-1]
    return {"start": steps[0]["time"] - began, "finish": max(ended - last["time"], 0.0),
            "evaluation": max(row.get("eval_seconds", 0.0) + row.get("sample_seconds", 0.0)
                              for row in steps[1:]),  # the first holds what is compiled
            "tokens_per_second": speed_after(steps[1:]),
            "batch_tokens": info["config"]["global_batch_tokens"],
            "tokens": last["tokens"], "val_loss": last["val_loss"],
            "parameters": info["parameters"]["total"],
            "train_tokens": info["data"]["train_tokens"], "device": info["device"]["name"]}


def speed_after(steps: list[dict]) -> float:
    """Tokens a second over the rows after the first of these: a mean, as slow spells come again."""
    spans = [(row["tokens"] - before["tokens"], row["tokens_per_second"])
             for before, row in pairwise(steps)]
    return sum(tokens for tokens, _ in spans) / sum(tokens / speed for tokens, speed in spans)


def schedule(steps: int, looks: int) -> list[str]:
    """The keys that a run's length sets, with so many evaluations on the way."""
    return [f"--max_steps={steps}", f"--warmup_steps={max(1, steps // 20)}",
            f"--save_interval={1 + steps // 4}", f"--eval_interval={-(-steps // looks)}"]


# ---- what lies in a run's folder

def last_step(run: Path) -> int:
    """The last step that a run has written down, 0 without one."""
    checkpoints = steps_of(run)
    if checkpoints:
        return int(checkpoints[0].name[5:])
    return max((row["step"] for row in read_rows(run / "metrics.jsonl", tolerant=True)), default=0)


def outcome(run: Path, tiny: Path | None) -> dict:
    """A run's row of the summary."""
    rows = read_rows(run / "metrics.jsonl", tolerant=True)
    steps = [row for row in rows if "tokens_per_second" in row]
    speeds = [row["tokens_per_second"] for row in steps[1:]] or [0.0]
    mfus = [row["mfu"] for row in steps[1:] if row.get("mfu")]
    last = [row for row in rows if row.get("val_loss") is not None][-1]
    scores = read_scores(run, last_step(run))
    if scores.get("step", 0) > last["step"] and "val_loss" in scores:
        last = scores  # the run was cut between two evaluations
    done = [0, *(row["tokens"] for row in steps)]
    seconds = sum((row["tokens"] - before) / row["tokens_per_second"]
                  for row, before in zip(steps, done, strict=False))
    return {"step": last["step"], "tokens": last["tokens"], "val_loss": last["val_loss"],
            "val_bpb": last["val_bpb"], "tinyMMLU": scores.get("tasks", {}).get(f"local:{tiny}"),
            "tokens_per_second": median(speeds), "mfu": median(mfus) if mfus else None,
            "minutes": seconds / 60}


# ---- scores

def sets_of(folder: str) -> dict[str, Path]:
    """The local sets of a folder by name: tinyMMLU.jsonl or tinyMMLU.jsonl.xz is tinyMMLU."""
    if not folder:
        return {}
    return {path.name.split(".")[0]: path for path in sorted(Path(folder).glob("*.jsonl*"))}


def scoring(name: str, sets: dict[str, Path], context: int) -> list[tuple[list[str], list[tuple]]]:
    """What eval.py is asked of a run, the most important first: words, and the names under which
    the scores then lie in its file. `context`: the short one."""
    tiny = sets.get("tinyMMLU")
    others = [f"local:{path}" for kind, path in sets.items()
              if kind not in ("tinyMMLU", "mmlu_dev")]
    first = [f"--tasks={f'local:{tiny}' if tiny else ''}", "--by_position"]
    wanted: list[tuple] = [("by_position",)]
    if tiny:
        first.append(f"--shots={sets['mmlu_dev']}")
        wanted.append(("tasks", f"local:{tiny}"))
    second, more = [f"--tasks={','.join(others)}"], [("tasks", task) for task in others]
    if name != "base":
        second.append(f"--context={context}")
        more = [("contexts", str(context)), *more]
    return [(first, wanted)] + ([(second, more)] if more else [])


def scoring_seconds(name: str, sets: dict[str, Path], context: int, trial: dict) -> float:
    """How long the scores of a run take, by a trial's process and the sizes of the sets: a token
    for every byte of a set is plenty, although each choice repeats its question."""
    whole = context * (1 if name == "base" else TIMES)
    tokens = 0
    for kind, path in sets.items():
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        tokens += {"tinyMMLU": data.count(b"\n") * whole, "mmlu_dev": 0}.get(kind, len(data))
    speed = SCORING * trial["tokens_per_second"]
    return len(scoring(name, sets, context)) * trial["score"] + tokens / speed


def lacking(run: Path, wanted: list[tuple]) -> list[str]:
    """Which of these scores the newest checkpoint of a run does not have."""
    kept, names = read_scores(run, last_step(run)), []
    for path in wanted:
        found = kept
        for part in path:
            found = found.get(part, {})
        if not found:
            names.append(f"{run.name}: {' '.join(path)}")
    return names


# ---- what is said

def sentence(plan: dict) -> str:
    """The plan and the prediction in a line each."""
    foreseen = plan["predicted"]
    long = f"{plan['tune']} in two ways" if plan["tune"] else "no long runs, for lack of time"
    return (f"plan: {plan['base']} steps of {plan['trial']['batch_tokens']:,} tokens, "
            f"{plan['epochs']:.2f} epochs; then {long}\n"
            f"predicted: {foreseen['val_loss']:.3f} nats/token (at most "
            f"{foreseen['val_loss_at_most']:.3f}), {foreseen['base_minutes']:.1f} minutes of "
            f"training, {foreseen['minutes']:.1f} in all")


def summary(result: dict) -> str:
    """The three runs as a table, and the prediction beside what was found."""
    lines = ["| run | steps | tokens | val loss, nats | bits a byte | tinyMMLU (95 %) | tokens/s | "
             "MFU | minutes |", "|---|---|---|---|---|---|---|---|---|"]
    for name, run in result["runs"].items():
        tiny, score = run["tinyMMLU"], "missing"
        if tiny:
            low, high = tiny["intervals"]["acc"]
            score = f"{tiny['acc']:.2f} ({low:.2f} to {high:.2f})"
        mfu = f"{run['mfu']:.1%}" if run["mfu"] else "n/a"
        lines.append(f"| {name} | {run['step']:,} | {run['tokens']:,} | {run['val_loss']:.4f} | "
                     f"{run['val_bpb']:.4f} | {score} | {run['tokens_per_second']:,.0f} | {mfu} | "
                     f"{run['minutes']:.1f} |")
    lines += ["", "| | predicted | found | difference |", "|---|---|---|---|"]
    for name, what in (("val_loss", "base's loss, nats"), ("base_minutes", "base's minutes"),
                       ("minutes", "minutes in all")):
        if name in result["difference"]:
            lines.append(f"| {what} | {result['predicted'][name]:.3f} | "
                         f"{result['found'][name]:.3f} | {result['difference'][name]:+.3f} |")
    lines += ["", *(f"missing: {name}" for name in result["missing"]),
              *(f"not complete: {stage}: {why}" for stage, why in result["unfinished"].items())]
    return "\n".join(lines).rstrip() + "\n"


def show_status(out: Path) -> int:
    """Say where a mission is; 0 if it runs or is done."""
    status = read_json(out / "status.json", tolerant=True)
    if not status:
        print(f"no mission in {out}")
        return 1
    state, stage, home = status["state"], status["stage"], Path(status["home"])
    if state == "running":
        try:
            with open(home / ".lock", "w") as file:
                hold(file, "at work")
            state = "killed"
        except UserError:
            pass
    if state == "running":
        left, gone = status["until"] - time.time(), time.time() - status["began"]
        print(f"running: stage {stage}, {gone / 60:.1f} minutes gone, {left / 60:.1f} left")
    else:
        hint = {"done": "", "failed": "; see commands.log"}
        print(f"{state}{hint.get(state, '; the same command goes on')}: stage {stage}, after "
              f"{sum(status['seconds'].values()) / 60:.1f} minutes")
    rows = [row for row in read_rows(home / stage / "metrics.jsonl", tolerant=True)
            if "loss" in row]
    plan = read_json(out / "plan.json", tolerant=True)
    if rows:
        steps = TRIAL if stage == "trial" else plan.get("base" if stage == "base" else "tune", 0)
        print(f"step {rows[-1]['step']} of {steps}: loss {rows[-1]['loss']:.4f}, "
              f"{rows[-1]['tokens_per_second']:,.0f} tokens/s")
    if plan:
        print(sentence(plan))
    for name, why in status["unfinished"].items():
        print(f"not complete: {name}: {why}")
    return 0 if state in ("running", "done") else 1
