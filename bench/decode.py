"""Greedy decoding on the CPU beside transformers: python bench/decode.py [--rounds=5]

config/llama100m.py's model with Mistral's 32,000 entries, fp32, first weights, the same in both; 32
tokens of prompt, 64 new ones, one text and 16 side by side, prompts included in the time. The arms
take turns, and the first turn warms up; medians. The floor is one pass over the weights: every
matrix times one vector, alone.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import settings
from settings import key


@dataclass
class Flags:
    """What bench/decode.py takes."""

    rounds: int = key(5, "turns of each arm", low=1)


if __name__ == "__main__":
    COMMAND = settings.command(__doc__, Flags, takes="files")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import generate
import train
from checkpoint import hf_config
from model import LLaMA
from parallel import World

PROMPT, NEW = 32, 64


def main(command: settings.CommandLine) -> int:
    """Measure and print."""
    config = settings.parse([str(ROOT / "config/llama100m.py")], "").config
    config.vocab_size = 32000
    ours = LLaMA(train.model_config(config)).eval()
    World().initialise(ours, 0)
    theirs = LlamaForCausalLM(LlamaConfig(**hf_config(ours.config, None, None))).eval()
    theirs.load_state_dict(ours.state_dict())
    floor = [p for name, p in ours.named_parameters() if p.dim() > 1 and "embed" not in name]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {PROMPT} tokens of "
          f"prompt, {NEW} new, medians of {command.flags.rounds} turns")

    def arm(name: str, ids: torch.Tensor) -> list:
        if name == "ours":
            made = generate.generate(ours, ids.tolist(), NEW, settings.Sampling(temperature=0),
                                     [0] * len(ids))
            return [new for new, _ in made]
        if name == "floor":
            with torch.no_grad():
                return [p @ torch.ones(p.shape[1]) for _ in range(NEW) for p in floor]
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0)
        return made[:, PROMPT:].tolist()

    for batch in (1, 16):
        ids = torch.randint(32000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        times: dict = {"ours": [], "transformers": [], **({"floor": []} if batch == 1 else {})}
        found = {}
        for turn in range(command.flags.rounds + 1):
            for name in times:
                begin = time.perf_counter()
                found[name] = arm(name, ids)
                times[name] += [(time.perf_counter() - begin) / NEW * 1e3] * (turn > 0)
        for name, each in times.items():
            print(f"batch {batch}, {name}, ms a step: " + " ".join(f"{ms:.1f}" for ms in each))
        same = sum(a == b for a, b in zip(found["ours"], found["transformers"], strict=True))
        print(f"batch {batch}: {same} of {batch} texts are the same")
        ratio = median(b / a for a, b in zip(times["ours"], times["transformers"], strict=True))
        a, b = (median(times[name]) for name in ("ours", "transformers"))
        print(f"| decoding, 138 M weights read, batch {batch}, ms a step: ours beside transformers "
              f"| {a:.1f} | {b:.1f} | {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    settings.run(main, COMMAND)
