"""What the demo's model is worth: python bench/quickstart.py [--ckpt out/quickstart] [--seed N]

Prints its bits per byte beside those of a unigram and a 5-gram model (of eval.py --baselines), how
many of 20 samples are Python as far as Python's own tokenizer goes, and how many hold a
run of 50 tokens that stands in the training text.
"""

import io
import json
import statistics
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from plainllama import settings
from plainllama.command import parse_arguments, run_command
from plainllama.files import run_of
from plainllama.generation import generate
from plainllama.tokens import shards
from plainllama.tokens.tokenizer import Tokenizer
from plainllama.weights import checkpoint, peft

SAMPLES, COPY = 20, 50
# as in the Makefile
PROMPT, STOP, HOW = "    def _eval_", ["\n\n"], settings.Sampling(temperature=0.5)


@dataclass
class Flags:
    """Options of bench/quickstart.py."""

    ckpt: str = settings.key("out/quickstart", "a run of config/quickstart.py")
    seed: int = settings.key(1, "seeds the samples", low=0)


def tokenizes(text: str) -> bool:
    """Whether Python's tokenizer takes `text` without its last line, which may be half a line (a
    text of one line alone passes)."""
    whole = text.rpartition("\n")[0]
    try:
        return all(token.type != tokenize.ERRORTOKEN
                   for token in tokenize.generate_tokens(io.StringIO(whole + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False


def hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every run of `length` ids."""
    factors = np.random.default_rng(0).integers(1, 2**63, length, np.uint64) * 2 + 1
    ends = max(0, len(ids) - length + 1)
    total = np.zeros(ends, np.uint64)
    for i, factor in enumerate(factors):
        total += (ids[i:i + ends].astype(np.uint64) + np.uint64(7)) * factor
    return total


def copied(texts: list[str], words: Tokenizer, split: shards.Split, length: int) -> int:
    """How many of the texts hold a run of `length` tokens of the split."""
    mine = [hashes(np.array(words.encode(text)), length) for text in texts]
    wanted = np.unique(np.concatenate(mine))
    known = [wanted[np.isin(wanted, hashes(split.shard(i), length))]
             for i in range(len(split.names))]
    return sum(bool(np.isin(one, np.concatenate(known)).any()) for one in mine)


def main(command) -> int:
    """Print the table."""
    flags = command.flags
    folder = checkpoint.find_checkpoint(flags.ckpt)
    model, words = peft.load_model(folder), Tokenizer.load(folder)
    run = run_of(folder)
    file = run / "eval" / f"{folder.name}.json" if run else folder
    scores = json.loads(file.read_text()) if file.is_file() else {}
    if run is None or "baselines" not in scores:
        raise settings.UserError(f"{folder}: no baselines beside it; first: python eval.py "
                                 f"--ckpt {flags.ckpt} --tasks= --baselines")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = generate.complete(model, words, [[words.bos_id, *words.encode(PROMPT)]] * SAMPLES, 256,
                              HOW, [generate.row_seed(flags.seed, i) for i in range(SAMPLES)], STOP)
    texts = [PROMPT + completion for _, completion, _ in found]
    data = Path("data") / json.loads((run / "run.json").read_text())["config"]["dataset"]
    clones = copied(texts, words, shards.open_split(data, "train"), COPY)
    for text in texts:
        print(f"--- {'Python' if tokenizes(text) else 'NOT Python'}\n{text}")
    print("---")
    timed = [row["tokens_per_second"] for row in rows if "loss" in row]
    python = sum(map(tokenizes, texts))
    ours = scores["val_bpb"]
    for name in ("unigram", "5-gram"):
        bpb = scores["baselines"][f"{name}_bpb"]
        print(f"| bits per byte, beside a {name} model | {ours:.4f} | {bpb:.4f} | "
              f"{ours / bpb:.3f} |")
    print(f"| samples that are Python to its tokenizer | {python} | {SAMPLES} | "
          f"{python / SAMPLES:.2f} |")
    print(f"| samples with {COPY} tokens in a row of the training text | {clones} | {SAMPLES} | "
          f"{clones / SAMPLES:.2f} |")
    print(f"| training, tokens per second (median) | {statistics.median(timed):,.0f} | | |")
    return 0


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
