"""Tuning on dialogs beside TRL's SFTTrainer, on the CPU: python bench/sft.py [--curve]

One model of 7 M parameters, one set of dialogs (lengths as in instruction data, random ids, and
learned as an answer the same again), fp32, AdamW without decay, eager. Learned tokens a second of
ours (whole dialogs packed, none sees another) and of SFTTrainer, packed by its best fit and padded;
the arms take turns, medians of all steps, data loading included on both sides. --curve: instead the
losses of 20 steps on the same dialogs in the same order, which must agree. Needs `pip install trl`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.settings import Settings, key


@dataclass
class Flags:
    """What bench/sft.py takes."""

    curve: bool = key(False, "compare the losses of 20 steps, not the speed")
    turns: int = key(3, "turns of each arm", low=1)
    steps: int = key(4, "steps of a turn", low=2)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import logging
import tempfile
import time
from statistics import median
from typing import Any

import numpy as np
import torch

from plainllama.parallel import World
from plainllama.tokens import shards
from plainllama.tokens.rows import BEGINS, CONTEXT, PAD, FitRows, to_batch
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.training.engine import Engine
from plainllama.weights.huggingface import write_folder

VOCAB, T, ROWS, RATE = 4096, 512, 4, 1e-3
BOS = 1
Dialog = tuple[np.ndarray, np.ndarray]  # ids, which are learned


def main(command: CommandLine) -> int:
    """Measure and print."""
    flags = command.flags
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dialogs = twins() if flags.curve else many()
        write_set(folder / "data", dialogs)
        rows = FitRows(shards.open_split(folder / "data", "train"), T, seed=1)
        engine = our_engine(rows)
        make_tokenizer("bytes").save(folder)
        (folder / "model").mkdir()
        weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        write_folder(folder / "model", engine.model.config, weights, folder / "tokenizer.json")
        if flags.curve:
            return compare_curves(engine, rows, folder)
        return compare_speeds(engine, rows, folder, dialogs, flags)


def many() -> list[Dialog]:
    """Dialogs of 30 tokens to a row, 130 in the mean, in no order."""
    draw = np.random.default_rng(0)
    return [dialog(draw, int(size)) for size in
            np.clip(30 + draw.exponential(100, 3000), 30, T + 1)]


def twins() -> list[Dialog]:
    """Dialogs of which two and two fill a row, so that both loaders have the same batches."""
    draw = np.random.default_rng(0)
    sizes = draw.permutation(np.arange(100, 100 + 20 * ROWS))
    return [dialog(draw, int(size)) for first in sizes for size in (first, T + 1 - first)]


def dialog(draw, size: int) -> Dialog:
    """Random ids and, learned, their first half again."""
    half = draw.integers(2, 66, size - size // 2)
    half[0] = BOS
    return np.concatenate([half, half])[:size], np.arange(size) >= len(half)


def write_set(folder: Path, dialogs: list[Dialog]) -> None:
    """Write a data set of dialogs as prepare.py does."""
    folder.mkdir()
    writer = shards.ShardWriter(folder, "train-00000", np.dtype("<u2"))
    for ids, learned in dialogs:
        writer.add(ids, learned)
    shards.write_manifest(folder, {
        "recipe": {"documents": "chat", "sources": [{}]}, "block_size": T, "files": writer.close(),
        "splits": {"train": {"tokens": writer.tokens}}, "tokenizer": {"vocab_size": VOCAB}})


def our_engine(rows: FitRows) -> Engine:
    """The model and its optimizer."""
    config = Settings(n_layer=6, n_head=4, d_model=256, d_ff=688, vocab_size=VOCAB, block_size=T,
                      global_batch_tokens=ROWS * T, micro_batch=ROWS, device="cpu", doc_mask=True,
                      compile="false", weight_decay=0.0)
    return Engine(config, World(), BOS)


def our_step(engine: Engine, rows: FitRows, number: int) -> tuple[float, int, float]:
    """(loss, learned tokens, seconds) of an update, its rows read from the disk."""
    begin, first = time.perf_counter(), number * ROWS
    batch, targets = to_batch(rows.rows(first, ROWS), 0, BOS), rows.targets(first, ROWS)
    nll = engine.update(batch, RATE, targets)[0].item()
    return nll / targets, targets, time.perf_counter() - begin


def trainer(folder: Path, examples: list[Dialog], batch: int, steps: int, model: Any = None,
            **how) -> Any:
    """SFTTrainer on ids and labels as they are, in their order, with our recipe."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, LlamaForCausalLM, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    class Ordered(SFTTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    rows = [{"input_ids": ids.tolist(), "labels": np.where(learned, ids, -100).tolist()}
            for ids, learned in examples]
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=batch,
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0, logging_steps=1,
        optim="adamw_torch_fused", max_length=T + 1, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        dataloader_num_workers=0, **how)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    model = model or LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    made = Ordered(model=model, args=config, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    return made


def in_order(rows: FitRows, count: int) -> list[Dialog]:
    """The dialogs of the first `count` rows of a run, row by row."""
    found = []
    for row in rows.rows(0, count):
        row = row[row != PAD]
        for part in np.split(row, np.flatnonzero(row >= BEGINS)[1:]):
            found.append((part & (CONTEXT - 1), part < CONTEXT))
    return found


def compare_curves(engine: Engine, rows: FitRows, folder: Path) -> int:
    """Print both losses of 20 steps and their largest distance."""
    dialogs = in_order(rows, 20 * ROWS)
    theirs = trainer(folder, dialogs, 2 * ROWS, 20)
    theirs.train()
    logged = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    ours = [our_step(engine, rows, number)[0] for number in range(20)]
    for number, (a, b) in enumerate(zip(ours, logged, strict=True)):
        print(f"step {number + 1:2}: ours {a:.6f}, SFTTrainer {b:.6f}")
    apart = max(abs(a - b) for a, b in zip(ours, logged, strict=True))
    print(f"largest distance {apart:.1e} nats")
    return int(apart > 1e-4)


def seconds_of_steps() -> Any:
    """A callback of a trainer that keeps the `seconds` of every step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Seconds of every step."""

        def __init__(self):
            self.seconds: list[float] = []
            self.since = 0.0

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            self.seconds.append(now - self.since)
            self.since = now

        def on_train_begin(self, *_, **__):
            self.since = time.perf_counter()

    return Watch()


def compare_speeds(engine: Engine, rows: FitRows, folder: Path, dialogs: list[Dialog],
                   flags: Any) -> int:
    """Print learned tokens a second of all arms, and their ratios."""
    share = np.mean([learned.mean() for _, learned in dialogs])
    each = round(ROWS * T / np.mean([len(ids) for ids, _ in dialogs]))  # dialogs of as many tokens
    arms = {"SFTTrainer, packed": (ROWS, {"packing": True, "packing_strategy": "bfd"}),
            "SFTTrainer, padded": (each, {})}
    speeds: dict[str, list[float]] = {"ours": [], **{name: [] for name in arms}}
    models: dict[str, Any] = {}
    step = 0
    for _ in range(flags.turns):
        for _ in range(flags.steps):
            _, targets, seconds = our_step(engine, rows, step)
            speeds["ours"].append(targets / seconds)
            step += 1
        for name, (batch, how) in arms.items():
            made = trainer(folder, dialogs, batch, flags.steps, models.get(name), **how)
            models[name], watch = made.model, seconds_of_steps()
            learned: list[int] = []
            collate = made.data_collator

            def counted(examples, collate=collate, learned=learned):
                made_of = collate(examples)
                learned.append(int((made_of["labels"] != -100).sum()))
                return made_of

            made.data_collator = counted
            made.add_callback(watch)
            made.train()
            speeds[name] += [n / s for n, s in zip(learned, watch.seconds, strict=False)][1:]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, about {ROWS * T} "
          f"tokens a step, {share:.0%} of them learned")
    ours = median(speeds["ours"][1:])
    for name, found in speeds.items():
        print(f"| {name} | {median(found):,.0f} learned tokens/s | {ours / median(found):.2f} |")
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
