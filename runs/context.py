"""Two roads to a longer context, at a size that a CPU trains: python runs/context.py [--text=PATH]

For each seed a model of config/quickstart.py's size is trained at 64 tokens, then lengthened to 256
in two ways with the same rows: positions divided by 4 (position interpolation,
https://arxiv.org/abs/2306.15595), and positions as they are. Prints, before and after, the loss by
position in windows of 256, the loss in windows of 64 as before, and the passkey probe: the mean
over the seeds, and from the lowest to the highest. About six minutes on two cores.
"""

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare
import train
from model import LLaMA
from plainllama import settings
from plainllama.command import parse, parse_arguments, run_command
from plainllama.evaluation import tasks
from plainllama.evaluation.likelihood import by_position
from plainllama.parallel import World
from plainllama.tokens import shards
from plainllama.tokens.rows import Rows
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.weights import checkpoint
from plainllama.weights.huggingface import load_weights, read_config

SHORT, LONG = 64, 256
FACTOR = LONG / SHORT
ARMS = {"interpolated": {"rope_scaling": "linear", "rope_factor": FACTOR}, "plain": {}}
TOKENS = 65536  # of the validation split


@dataclass
class Flags:
    """Options of runs/context.py."""

    text: str = settings.key("embedded", "what to train on, as `sources` takes it")
    tokenizer: str = settings.key("bpe:4096", "as in a config")
    steps: int = settings.key(300, "steps at the short context", low=1)
    tune_steps: int = settings.key(60, "steps at the long context", low=1)
    seeds: int = settings.key(3, "how many models", low=1)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import torch


def command(module, *words: str) -> None:
    """Run a command in this process; what it prints is shown only if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = module.main(parse([str(ROOT / "config/quickstart.py"), "--dataset=context",
                                           *words], "", module.Flags))
    if code:
        raise SystemExit(f"{said.getvalue()}\n{module.__name__} {' '.join(words)} failed")


def load(folder: Path, **changes) -> LLaMA:
    """A checkpoint's weights under its config with `changes`, as init_from would begin."""
    model = LLaMA(replace(read_config(folder), **changes))
    load_weights(folder, model, World())
    return model.eval()


def measure(model: LLaMA, words: Tokenizer) -> dict:
    """{column of the table: value} of a model whose context is SHORT or LONG."""
    found: dict = {}
    T = model.config.block_size
    for length in (SHORT, LONG) if T == LONG else (SHORT,):
        rows = Rows(shards.open_split(Path("data/context"), "val"), length, 0)
        by = by_position(model, rows, TOKENS, 4096 // length, World())
        by = {name: value for name, value in by.items() if name[0].isdigit() and "_" not in name}
        found |= by if length == LONG else {f"in {SHORT}": statistics.fmean(by.values())}
    if T == LONG:
        with contextlib.suppress(settings.UserError):  # a tokenizer that makes the text too long
            found["passkey"] = tasks.score_passkey(
                0, tasks.Scorer(model, words, 4096, World()))["passkey"]["acc"]
    return found


def one_seed(flags: Flags, seed: int) -> dict:
    """{row of the table: {column: value}} of one base model and what becomes of it."""
    def trained(name: str, *words: str) -> Path:
        command(train, f"--out_dir=out/{name}", f"--seed={seed}", "--sample_tokens=0",
                "--eval_interval=1000000", "--save_interval=1000000", "--eval_tokens=2560", *words)
        return checkpoint.find_checkpoint(f"out/{name}")

    words = Tokenizer.load("data/context")
    base = trained(f"base{seed}", f"--block_size={SHORT}", f"--max_steps={flags.steps}")
    table = {"before": measure(load(base), words)}
    for arm, keys in ARMS.items():
        table[f"{arm}, 0 steps"] = measure(load(base, block_size=LONG, **keys), words)
        # at the rate at which the base ended: at 1e-3 both arms lost what the base could do
        tuned = trained(f"{arm}{seed}", f"--init_from={base}", f"--block_size={LONG}",
                        f"--max_steps={flags.tune_steps}", "--learning_rate=3e-4", "--min_lr=3e-5",
                        "--warmup_steps=10", *(f"--{key}={value}" for key, value in keys.items()))
        table[f"{arm}, {flags.tune_steps} steps"] = measure(load(tuned), words)
    return table


def long_documents(flags: Flags) -> float:
    """The share of the targets at the long context that stand behind more than SHORT tokens of
    their own document."""
    rows = Rows(shards.open_split(Path("data/context"), "train"), LONG, 0)
    ids = torch.from_numpy(rows.rows(0, min(rows.windows, 1000)).astype("int64"))
    places = torch.arange(LONG + 1).expand_as(ids)
    begin = Tokenizer.load("data/context").bos_id
    since = places - places.where(ids == begin, torch.zeros(())).long().cummax(1).values
    return (since[:, 1:] > SHORT).float().mean().item()


def main(parsed) -> int:
    """Print the table."""
    flags, start = parsed.flags, time.perf_counter()
    source = flags.text if flags.text == "embedded" else os.path.abspath(flags.text)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        command(prepare, f"--sources={source}", f"--tokenizer={flags.tokenizer}")
        share = long_documents(flags)
        tables = []
        for seed in range(1, flags.seeds + 1):
            with contextlib.redirect_stdout(io.StringIO()):  # progress lines
                tables.append(one_seed(flags, seed))
            print(f"seed {seed} of {flags.seeds}: {time.perf_counter() - start:.0f} s", flush=True)
    tokens = parse([str(ROOT / "config/quickstart.py")], "").config.global_batch_tokens
    print(f"{flags.text}, {flags.steps * tokens:,} tokens in rows of {SHORT}, then "
          f"{flags.tune_steps * tokens:,} in rows of {LONG}; {share:.0%} of the targets there\n"
          f"stand behind more than {SHORT} tokens of their own document.\n"
          "Nats per token by position; passkey: share found of 1 in 10.\n")
    columns = list(tables[0]["plain, 0 steps"])
    print(f"{'':24}" + "".join(f"{name:>21}" for name in columns))
    means: dict = {}
    for row in tables[0]:
        cells = []
        for column in columns:
            values = [table[row][column] for table in tables if column in table[row]]
            means[row, column] = statistics.fmean(values) if values else float("nan")
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{means[row, column]:.3f}{spread}" if values else "")
        print(f"{row:24}" + "".join(f"{cell:>21}" for cell in cells))
    print()
    after = f", {flags.tune_steps} steps"
    for column in (columns[0], columns[-2] if "passkey" in columns else columns[-1]):
        ours, plain = means[f"interpolated{after}", column], means[f"plain{after}", column]
        print(f"| interpolation beside plain tuning, nats {column} | {ours:.4f} | {plain:.4f} | "
              f"{ours / plain:.3f} |")
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
