"""Preferences of people: python runs/harmless.py --pairs=hh_harmless.jsonl.gz [--out=out/harmless]

Rows of `chosen` and `rejected`, two transcripts each, as hh-rlhf has them. A model of ten million
parameters reads the chosen talks (a BPE of 4,096 entries), is tuned on their last answers, and then
learns the preferences by DPO, with several seeds. A fifth of the pairs is held out of all that. The
table has the share of held-out pairs in which the chosen answer is preferred, beside what the model
before DPO prefers by its own log-probabilities and what preferring the shorter answer gives. A
second use goes on where the first was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.files import write_text
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What runs/harmless.py takes."""

    pairs: str = key("", "a .jsonl of chosen and rejected transcripts")
    steps: int = key(150, "updates of the model that is tuned", low=10)
    dpo_steps: int = key(60, "updates of DPO", low=5)
    seeds: int = key(3, "runs of DPO", low=1)
    rate: float = key(3e-4, "highest learning rate of DPO", low=1e-9)
    out: str = key("out/harmless", "folder for the runs")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import json
import math
import subprocess
from statistics import mean

from plainllama.text.documents import Tally, documents
from plainllama.text.selection import choose_hold_out, placed
from plainllama.text.sources import survey

SHAPE = ["--n_layer=6", "--n_head=8", "--d_model=320", "--d_ff=864", "--log_interval=10",
         "--sample_tokens=0", "--block_size=1024", "--global_batch_tokens=8192"]
HELD_OUT = 0.2


def main(command: CommandLine) -> int:
    """Run what is missing, then print."""
    flags = command.flags
    if not flags.pairs:
        raise UserError("say which pairs: --pairs=FILE.jsonl")
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    chosen_talks(flags.pairs, out / "chosen.jsonl")
    call("prepare.py", "--documents=chat", "--dataset=harmless_chat", "--val_fraction=0.05",
         f"--sources={out}/chosen.jsonl", "--tokenizer=bpe:4096")
    call("train.py", "--dataset=harmless_chat", f"--out_dir={out}/sft", *rate(2e-3, flags.steps),
         "--optimizer=muon")
    call("prepare.py", "--documents=preference", "--dataset=harmless", f"--sources={flags.pairs}",
         "--tokenizer=data/harmless_chat", f"--val_fraction={HELD_OUT}")
    for seed in range(1, flags.seeds + 1):
        call("train.py", "--dataset=harmless", f"--init_from={out}/sft", "--objective=dpo",
             f"--out_dir={out}/dpo_{seed}", f"--seed={seed}", "--optimizer=adamw",
             *rate(flags.rate, flags.dpo_steps))
    return tell(score(f"{out}/sft"), [score(f"{out}/dpo_{seed}")
                                        for seed in range(1, flags.seeds + 1)])


def chosen_talks(path: str, file: Path) -> None:
    """Write the chosen talks of the pairs that prepare.py does not hold out."""
    if file.exists():
        return
    _, parts = survey({"path": path}, documents="preference", train_on="last")
    hold_out = choose_hold_out(parts, HELD_OUT, whole=True)
    talks = [json.loads(text)["messages"] for split, text in
             placed(documents(parts, Tally()), hold_out) if split == "train"]
    write_text(file, "".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def rate(peak: float, steps: int) -> list[str]:
    """Say how a run learns."""
    return [f"--max_steps={steps}", f"--learning_rate={peak}", f"--min_lr={peak / 10}",
            f"--warmup_steps={steps // 10}", f"--eval_interval={steps}", f"--save_interval={steps}"]


def call(script: str, *words: str) -> None:
    """Run prepare.py or train.py on the model's shape; an error ends this one."""
    shape = SHAPE if script == "train.py" else SHAPE[-2:-1]
    subprocess.run([sys.executable, str(ROOT / script), str(ROOT / "config/chat.py"), *words,
                    *shape], check=True)


def score(run: str) -> dict:
    """Score a run on all held-out pairs."""
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), f"--ckpt={run}", "--tasks=",
                           "--data=harmless", "--eval_tokens=100000000", "--json"],
                          check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tell(before: dict, rows: list[dict]) -> int:
    """Print the table."""
    n = before["n"]
    print(f"| {n} held-out pairs | chosen preferred, 95 % interval |\n|---|---|")
    for name, right in (("the shorter answer", before["shorter"]),
                        ("the model before DPO, by log-probability", before["logps/accuracies"])):
        print(f"| {name} | {interval(right, n)} |")
    for seed, row in enumerate(rows, 1):
        print(f"| DPO, seed {seed}, by reward | {interval(row['rewards/accuracies'], n)} |")
    print(f"| DPO, mean | {mean(row['rewards/accuracies'] for row in rows):.3f} |")
    return 0


def interval(right: float, n: int) -> str:
    """Write a share with its interval."""
    return f"{right:.3f} ± {1.96 * math.sqrt(right * (1 - right) / n):.3f}"


if __name__ == "__main__":
    run_command(main, COMMAND)
