"""What adapters cost and give: python runs/adapters.py [--steps=100] [--out=out/adapters]

A small model reads text (the embedded set, a byte a token), and then learns the dialogs of
embedded:chat, a domain that it has not seen and five tokens that it does not have: all of its
weights, the last half of its blocks, LoRA of rank 2, 8 and 32, and LoRA of rank 8 beside matrices
held in 4 bits. Each arm is tried at every rate below with one seed; the rate with the lowest
validation loss makes three runs with seeds of their own. The table has the loss on held-out answers
beside what learns and what a checkpoint of it takes. About an hour on two cores; a second use
goes on where the first was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.files import read_json, read_rows, write_json
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What runs/adapters.py takes."""

    steps: int = key(100, "updates of every arm", low=10)
    base_steps: int = key(400, "updates of the base", low=10)
    out: str = key("out/adapters", "folder for the runs")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import subprocess
from statistics import mean, stdev

CONFIG = str(ROOT / "config/chat.py")
ARMS = {"all weights": [], "last half of the blocks": ["--train_only=last:2,lm_head,embed_tokens"],
        **{f"LoRA, r {r}": [f"--lora_r={r}", "--lora_alpha=16"] for r in (2, 8, 32)},
        "LoRA, r 8, base in nf4": ["--lora_r=8", "--lora_alpha=16", "--frozen_dtype=nf4"]}
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (1, 2, 3)


def main(command: CommandLine) -> int:
    """Run what is missing, then print."""
    flags, base = command.flags, f"{command.flags.out}/base"
    call("prepare.py", "--dataset=adapters_text", "--documents=text", "--sources=embedded")
    call("prepare.py", "--dataset=adapters_chat")
    call("train.py", "--dataset=adapters_text", f"--max_steps={flags.base_steps}",
         "--eval_interval=1000000", f"--out_dir={base}")
    rows = []
    for arm, options in ARMS.items():
        tuned = {rate: train(flags, base, arm, options, rate, 0) for rate in RATES}
        best = min(RATES, key=lambda rate: tuned[rate]["loss"])
        runs = [train(flags, base, arm, options, best, seed) for seed in SEEDS]
        losses = [run["loss"] for run in runs]
        rows.append({"arm": arm, "rate": best, "losses": losses, "learns": runs[0]["learns"],
                     "bytes": runs[0]["bytes"],
                     "tried": {str(rate): run["loss"] for rate, run in tuned.items()}})
        print(f"| {arm} | {rows[-1]['learns']:,} | {rows[-1]['bytes'] / 1e6:.2f} MB | {best:g} | "
              f"{mean(losses):.3f} ± {stdev(losses):.3f} |", flush=True)
    write_json(Path(flags.out) / "results.json", {"flags": vars(flags), "rows": rows})
    return 0


def train(flags: Flags, base: str, arm: str, options: list[str], rate: float, seed: int) -> dict:
    """The last loss on held-out answers, the weights that learned, and the bytes of weights and
    moments in a checkpoint."""
    name = "".join(c if c.isalnum() else "_" for c in arm)
    run = Path(flags.out) / f"{name}_{rate:g}_{seed}"
    call("train.py", "--dataset=adapters_chat", f"--init_from={base}", "--optimizer=adamw",
         f"--learning_rate={rate}", f"--seed={seed}", f"--max_steps={flags.steps}",
         "--warmup_steps=10", "--eval_interval=1000000", "--eval_tokens=65536", "--sample_tokens=0",
         f"--out_dir={run}", *options)
    losses = [row["val_loss"] for row in read_rows(run / "metrics.jsonl") if "val_loss" in row]
    counts = read_json(run / "run.json")["parameters"]
    folder = run / f"checkpoints/step_{flags.steps}"
    return {"loss": losses[-1], "learns": counts.get("trained", counts["total"]),
            "bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors"))}


def call(script: str, *words: str) -> None:
    """Run a command of the checkout with config/chat.py."""
    done = subprocess.run([sys.executable, str(ROOT / script), CONFIG, *words],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{script} {' '.join(words)}: {done.stderr.strip()}")


if __name__ == "__main__":
    run_command(main, COMMAND)
