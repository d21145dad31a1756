"""eval.py beside `lm_eval --model hf`: python bench/eval.py FOLDER [--questions=24] [--small]

tinyMMLU with five shots, on the same checkpoint, in the same process, with the same batch, fp32.
FOLDER holds tinyMMLU.jsonl and mmlu_dev.jsonl (rows of question, choices, answer, subject). The
model is config/llama100m.py's with random weights and Mistral's vocabulary; --small: 4 layers of
width 256. --questions=N takes the questions of every k-th subject, so that as many share their
shots as in the whole set. Timed is what lies between the texts and their log-likelihoods; what
comes before (imports, loading) is told apart. The largest difference between both is printed too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import LLaMA, ModelConfig
from plainllama.command import CommandLine, parse, parse_arguments, run_command
from plainllama.evaluation import tasks
from plainllama.files import write_json
from plainllama.parallel import World
from plainllama.settings import UserError, key
from plainllama.tokens import tokenizer
from plainllama.tokens.tokenizer_json import write_hf_files
from plainllama.weights.adapters import initial_weight, parameter_counts
from plainllama.weights.huggingface import config_json
from plainllama.weights.peft import load_model


@dataclass
class Flags:
    """What bench/eval.py takes."""

    questions: int = key(100, "about how many of the hundred", low=1)
    batch: int = key(4, "rows of the whole context in a pass", low=1)
    rounds: int = key(1, "turns of each", low=1)
    small: bool = key(False, "a model of 4 layers and width 256")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import os
import tempfile
import time
from statistics import median

import torch
from safetensors.torch import save_file


def main(command: CommandLine) -> int:
    """Measure and print."""
    flags = command.flags
    if len(command.files) != 1 or not (Path(command.files[0]) / "tinyMMLU.jsonl").is_file():
        raise UserError("name the folder that holds tinyMMLU.jsonl and mmlu_dev.jsonl")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    items = chosen(Path(command.files[0]), flags.questions)
    config = parse([str(ROOT / "config/llama100m.py")], "").config
    shape = dict(n_layer=4, n_head=4, d_model=256, d_ff=688) if flags.small else {
        name: getattr(config, name) for name in ("n_layer", "n_head", "n_kv_head", "d_model",
                                                 "d_ff", "tie_embeddings")}
    with tempfile.TemporaryDirectory() as home:
        folder = saved(Path(home), ModelConfig(**shape, vocab_size=32000,
                                               block_size=config.block_size))
        began = time.perf_counter()
        scorer = tasks.Scorer(load_model(folder), tokenizer.Tokenizer.load(folder),
                              flags.batch * config.block_size, World())
        loaded = time.perf_counter()
        theirs = harness(folder, flags.batch)
        print(f"start-up: ours {loaded - began:.1f} s, lm-eval {time.perf_counter() - loaded:.1f} "
              "s, its imports included")
        compare(flags, scorer, theirs, items)
    return 0


def compare(flags: Flags, scorer: tasks.Scorer, theirs, items: list[tasks.Item]) -> None:
    """Both on the same questions, in turns."""
    from lm_eval.api.instance import Instance

    def ours(some: list[tasks.Item]) -> list:
        return scorer.score([scorer.pair(*pair) for item in some for pair in item.pairs])

    def hf(some: list[tasks.Item]) -> list:
        return theirs.loglikelihood([Instance("loglikelihood", {}, pair, i) for item in some
                                     for i, pair in enumerate(item.pairs)], disable_tqdm=True)

    seconds: dict[str, list[float]] = {"ours": [], "hf": []}
    busy: dict[str, list[float]] = {"ours": [], "hf": []}
    found: dict[str, list] = {}
    for some in [items[:1]] + [items] * flags.rounds:
        for name, run in (("ours", ours), ("hf", hf)):
            began, worked = time.perf_counter(), time.process_time()
            found[name] = run(some)
            seconds[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - worked)
    apart = max(abs(a[0] - b[0]) for a, b in zip(found["ours"], found["hf"], strict=True))
    total, *_ = parameter_counts(scorer.model)
    mine, other, my_work, their_work = (median(each[name][1:]) for each in (seconds, busy)
                                        for name in ("ours", "hf"))
    print(f"{torch.get_num_threads()} threads, {len(items)} questions, batch {flags.batch}, "
          f"{total / 1e6:.0f} M parameters: largest difference {apart:.1e} nats; "
          f"processor time {my_work:.1f} and {their_work:.1f} s, ratio {their_work / my_work:.2f}")
    print(f"| tinyMMLU, 5 shots, {len(items)} questions, {total / 1e6:.0f} M parameters, s | "
          f"{mine:.1f} | lm_eval --model hf {other:.1f} | {other / mine:.2f} |")


def chosen(folder: Path, count: int) -> list[tasks.Item]:
    """About `count` of the questions: those of evenly spread subjects."""
    shots = tasks.read_local(str(folder / "mmlu_dev.jsonl"), None)
    items = tasks.read_local(str(folder / "tinyMMLU.jsonl"), shots)
    subjects = sorted({item.subject for item in items})
    wanted = {subjects[i] for i in range(len(subjects))
              if i * count // len(items) < (i + 1) * count // len(items)}
    return [item for item in items if item.subject in wanted]


def saved(folder: Path, config: ModelConfig) -> Path:
    """A model folder with random weights and Mistral's tokenizer."""
    model = LLaMA(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, config, 0))
    words = tokenizer.make_tokenizer("mistral")
    words.save(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config_json(config, words.bos_id, words.eos_id))
    write_hf_files(folder / "tokenizer.json", folder, config.block_size)
    return folder


def harness(folder: Path, batch: int):
    """What `lm_eval --model hf --model_args pretrained=FOLDER,dtype=float32` makes."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch)


if __name__ == "__main__":
    run_command(main, COMMAND)
