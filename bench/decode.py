"""Greedy decoding on the CPU beside transformers: python bench/decode.py [--rounds=3]

config/llama100m.py's model with Mistral's 32,000 entries, fp32, first weights, the same in both.
Milliseconds a step, that is for the next token of every text: the time for 33 new tokens less that
for one, so that the prompts do not count. The arms take turns, the first turn warms up; medians.
The floor is one pass over the weights alone, every matrix times one vector (batch 1) or 16.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import LLaMA
from plainllama import settings
from plainllama.command import CommandLine, parse, parse_arguments, run_command
from plainllama.generation import generate
from plainllama.parallel import World
from plainllama.settings import key
from plainllama.training.engine import architecture
from plainllama.weights.adapters import initialise
from plainllama.weights.huggingface import config_json


@dataclass
class Flags:
    """What bench/decode.py takes."""

    rounds: int = key(3, "turns of each arm", low=1)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

NEW = 33
CASES = [(1, 32), (16, 32), (16, 256)]  # texts, tokens of each prompt


def main(command: CommandLine) -> int:
    """Measure and print."""
    config = parse([str(ROOT / "config/llama100m.py")], "").config
    config.vocab_size = 32000
    ours = LLaMA(architecture(config)).eval()
    initialise(ours, 0, World().piece)
    theirs = LlamaForCausalLM(LlamaConfig(**config_json(ours.config, None, None))).eval()
    theirs.load_state_dict(ours.state_dict())
    matrices = [p for name, p in ours.named_parameters() if p.dim() > 1 and "embed" not in name]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, medians of "
          f"{command.flags.rounds} turns")

    def made(name: str, ids: torch.Tensor, new: int) -> list:
        if name == "ours":
            found = generate.generate(ours, ids.tolist(), new, settings.Sampling(temperature=0),
                                      [0] * len(ids))
            return [new for new, _ in found]
        if name == "floor":
            with torch.no_grad():
                return [F.linear(torch.ones(len(ids), p.shape[1]), p) for _ in range(new)
                        for p in matrices]
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        return found[:, ids.shape[1]:].tolist()

    for batch, prompt in CASES:
        ids = torch.randint(32000, (batch, prompt), generator=torch.Generator().manual_seed(0))
        times: dict = {"ours": [], "transformers": [], "floor": []}
        found = {}
        for turn in range(command.flags.rounds + 1):
            for name, each in times.items():
                begin = time.perf_counter()
                made(name, ids, 1)
                first = time.perf_counter()
                found[name] = made(name, ids, NEW)
                seconds = time.perf_counter() - first - (first - begin)
                if turn > 0:  # the first one warms up
                    each.append(1e3 * seconds / (NEW - 1))
        what = f"batch {batch}, {prompt} tokens of prompt"
        for name, each in times.items():
            print(f"{what}, {name}, ms a step: " + " ".join(f"{ms:.1f}" for ms in each))
        same = sum(a == b for a, b in zip(found["ours"], found["transformers"], strict=True))
        ratio = median(b / a for a, b in zip(times["ours"], times["transformers"], strict=True))
        a, b = (median(times[name]) for name in ("ours", "transformers"))
        print(f"{what}: {same} of {batch} texts are the same")
        print(f"| decoding 113 M, {what}, ms a step: ours beside transformers | {a:.1f} | {b:.1f} "
              f"| {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
