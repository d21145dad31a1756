"""Preferences beside TRL, on the CPU: python bench/preferences.py [--curve | --memory]

One model of 7 M parameters, one set of pairs (lengths as in preference data, random ids), fp32,
AdamW without decay, eager. Pairs a second of ours (whole pairs packed, none sees another) and of
DPOTrainer (padded), the reference computed once on both sides and counted for one epoch; the arms
take turns, medians of all steps, data loading included. --curve: instead the losses of 20 steps on
the same pairs in the same order, of all weights and of LoRA, which must agree; of ORPO beside TRL's
own functions on transformers' model. --memory: the peak of a step of DPO beside one of next tokens
on the same rows. Needs `pip install trl`.
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
    """What bench/preferences.py takes."""

    curve: bool = key(False, "compare the losses of 20 steps, not the speed")
    memory: bool = key(False, "compare the memory of a step with one of next tokens")
    turns: int = key(3, "turns of each arm", low=1)
    steps: int = key(4, "steps of a turn", low=2)


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import logging
import os
import tempfile
import time
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import torch
from sft import BOS, RATE, ROWS, VOCAB, T, dialog, seconds_of_steps

from model import trained
from plainllama.parallel import World
from plainllama.tokens import shards
from plainllama.tokens.rows import FitRows, to_batch
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.training import reference
from plainllama.training.engine import Engine, read_outcome
from plainllama.training.memory import Allocator
from plainllama.weights.huggingface import load_weights, write_folder
from plainllama.weights.peft import write_adapter

BETA, STEPS = 0.1, 20
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def main(command: CommandLine) -> int:
    """Measure and print."""
    flags = command.flags
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pairs = ones() if flags.curve else many()
        write_set(folder / "data", pairs)
        rows = FitRows(shards.open_split(folder / "data", "train"), T, seed=1)
        make_tokenizer("bytes").save(folder)
        (folder / "model").mkdir()
        engine = our_engine("dpo")
        weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        write_folder(folder / "model", engine.model.config, weights, folder / "tokenizer.json")
        if flags.curve:
            return max([compare_curves(rows, folder, pairs, lora) for lora in (False, True)]
                       + [compare_orpo(rows, folder, pairs)])
        return compare_memory(rows) if flags.memory else compare_speeds(rows, folder, pairs, flags)


def pair(draw, size: int) -> Pair:
    """A pair of `size` tokens in all: a third of each side is the prompt; the chosen answer says
    the prompt again, the rejected one anything."""
    chosen, _ = dialog(draw, size // 2)
    prompt = len(chosen) // 3
    rejected = draw.integers(2, 66, size - size // 2 - prompt)
    return chosen[:prompt].tolist(), chosen[prompt:].tolist(), rejected.tolist()


def many() -> list[Pair]:
    """Pairs of 60 tokens to a row, 200 in the mean, in no order."""
    draw = np.random.default_rng(0)
    return [pair(draw, int(size)) for size in
            np.clip(60 + draw.exponential(140, 1200), 60, T)]


def ones() -> list[Pair]:
    """Pairs that fill a row each, nearly, so that both loaders have the same batches."""
    draw = np.random.default_rng(0)
    return [pair(draw, int(size)) for size in draw.integers(T * 2 // 3, T, STEPS * ROWS)]


def write_set(folder: Path, pairs: list[Pair]) -> None:
    """Write a set of pairs as prepare.py does."""
    folder.mkdir()
    writer = shards.ShardWriter(folder, "train-00000", np.dtype("<u2"))
    for prompt, *answers in pairs:
        for answer in answers:
            ids = np.array(prompt + answer)
            writer.add(ids, np.arange(len(ids)) >= len(prompt))
    shards.write_manifest(folder, {
        "recipe": {"documents": "preference", "sources": [{}]}, "block_size": T,
        "files": writer.close(), "splits": {"train": {"tokens": writer.tokens}},
        "tokenizer": {"vocab_size": VOCAB}})


def our_engine(objective: str, **keys: Any) -> Engine:
    """The model and its optimizer."""
    config = Settings(n_layer=6, n_head=4, d_model=256, d_ff=688, vocab_size=VOCAB, block_size=T,
                      global_batch_tokens=ROWS * T, micro_batch=ROWS, device="cpu", doc_mask=True,
                      compile="false", weight_decay=0.0, objective=objective, preference_beta=BETA)
    return Engine(replace(config, **keys), World(), BOS)


def our_reference(engine: Engine, rows: FitRows) -> np.ndarray:
    """What the model thinks of every document now."""
    values = np.zeros(rows.split.documents, np.float32)
    numbers, logps = reference.think(engine, rows, range(rows.windows), rows.windows)
    values[numbers.astype(np.int64)] = logps
    return values


def our_step(engine: Engine, rows: FitRows, known: np.ndarray | None,
             number: int) -> tuple[float, int, float]:
    """(loss, pairs, seconds) of an update, its rows read from the disk."""
    begin, first = time.perf_counter(), number * ROWS
    windows, pairs = rows.window_of(first, ROWS), rows.pairs(first, ROWS)
    batch = to_batch(rows.read_windows(windows), 0, BOS, reference.known(known, rows, windows))
    loss = read_outcome(engine.update(batch, RATE, pairs)).loss
    return loss / pairs, pairs, time.perf_counter() - begin


def trainer(folder: Path, pairs: list[Pair], batch: int, steps: int, model: Any = None) -> Any:
    """DPOTrainer on ids as they are, in their order, with our recipe."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, LlamaForCausalLM, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class Ordered(DPOTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def _prepare_dataset(self, dataset, *_):
            return dataset

    data = Dataset.from_list([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), each,
                                       strict=True)) for each in pairs])
    config = DPOConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=batch,
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0, logging_steps=1,
        optim="adamw_torch_fused", max_length=T + 1, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, beta=BETA,
        precompute_ref_log_probs=True, dataloader_num_workers=0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    model = model or LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    made = Ordered(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    return made


def in_order(rows: FitRows, pairs: list[Pair], count: int) -> list[Pair]:
    """The pairs of the first `count` rows of a run, row by row."""
    return [pairs[number // 2] for number in rows.documents_of(rows.window_of(0, count))[::2]]


def compare_curves(rows: FitRows, folder: Path, pairs: list[Pair], lora: bool) -> int:
    """Print both losses of 20 steps of DPO and their largest distance."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    name, keys, model = "all weights", {}, None
    if lora:
        name, keys = "LoRA", {"lora_r": 8, "lora_alpha": 16.0, "init_from": str(folder / "model")}
    engine = our_engine("dpo", **keys)
    if lora:
        assert engine.adapter
        load_weights(folder / "model", engine.model, engine.world)
        where = folder / "adapter"
        where.mkdir()
        write_adapter(where, {n: p.data for n, p in trained(engine.model)}, engine.adapter,
                      engine.model.config)
        base = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, where, is_trainable=True)
    theirs = trainer(folder, in_order(rows, pairs, STEPS * ROWS), ROWS, STEPS, model)
    theirs.train()
    logged = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    known = our_reference(engine, rows)
    ours = [our_step(engine, rows, known, number)[0] for number in range(STEPS)]
    return tell(f"DPO, {name}", ours, logged)


def compare_orpo(rows: FitRows, folder: Path, pairs: list[Pair]) -> int:
    """Print the losses of 20 steps of ORPO, ours and of TRL's functions on transformers' model."""
    from transformers import LlamaForCausalLM
    from trl.experimental.orpo import ORPOTrainer

    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.0)
    theirs: Any = ORPOTrainer
    self = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    logged = []
    for step in range(STEPS):
        means = []
        for prompt, *answers in in_order(rows, pairs, STEPS * ROWS)[step * ROWS:][:ROWS]:
            for answer in answers:
                ids = torch.tensor([prompt + answer])
                labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
                means.append(theirs.get_batch_logps(model(ids).logits, labels, True))
        chosen, rejected = torch.cat(means[::2]), torch.cat(means[1::2])
        losses, *_ = theirs.odds_ratio_loss(self, chosen, rejected)
        loss = -chosen.mean() - losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logged.append(loss.item())
    engine = our_engine("orpo")
    return tell("ORPO", [our_step(engine, rows, None, number)[0] for number in range(STEPS)],
                logged)


def tell(name: str, ours: list[float], theirs: list[float]) -> int:
    """Print both curves and how far they are apart; 1 if that is over 1e-4."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        print(f"{name}, step {number + 1:2}: ours {a:.6f}, TRL {b:.6f}")
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: largest distance {apart:.1e}")
    return int(apart > 1e-4)


def compare_memory(rows: FitRows) -> int:
    """Print the most bytes that forward and backward of a step hold beside the weights, of DPO and
    of next tokens on the same rows."""
    peaks = {}
    for objective in ("next", "dpo"):
        engine = our_engine(objective)
        ids = rows.rows(0, ROWS)
        batch = to_batch(ids, 0, BOS, np.zeros(len(rows.documents_of(rows.window_of(0, ROWS)))))
        with Allocator([*engine.model.parameters(), *engine.model.buffers()]) as seen:
            engine.gradients(batch, rows.pairs(0, ROWS))
        peaks[objective] = seen.peak
    print(f"peak of a step beside the weights: dpo {peaks['dpo'] / 1e6:.1f} MB, next token "
          f"{peaks['next'] / 1e6:.1f} MB, ratio {peaks['dpo'] / peaks['next']:.2f}")
    return 0


def compare_speeds(rows: FitRows, folder: Path, pairs: list[Pair], flags: Any) -> int:
    """Print pairs a second of both arms, the reference counted for an epoch, and their ratio."""
    each = round(ROWS * T / np.mean([sum(map(len, (p, p, c, r))) for p, c, r in pairs]))
    engine = our_engine("dpo")
    begin = time.perf_counter()
    known = our_reference(engine, rows)
    per_pair = {"ours": (time.perf_counter() - begin) / len(pairs)}
    found: dict[str, list[float]] = {"ours": [], "DPOTrainer": []}  # seconds a pair
    model, step = None, 0
    for turn in range(flags.turns):
        for _ in range(flags.steps):
            _, count, seconds = our_step(engine, rows, known, step)
            found["ours"].append(seconds / count)
            step += 1
        subset = pairs[:each * flags.steps]
        begin = time.perf_counter()
        made = trainer(folder, subset, each, flags.steps, model)  # which computes the reference
        if turn:  # the first one also loads the libraries
            per_pair["DPOTrainer"] = min(per_pair.get("DPOTrainer", 1e9),
                                         (time.perf_counter() - begin) / len(subset))
        model, watch = made.model, seconds_of_steps()
        made.add_callback(watch)
        made.train()
        found["DPOTrainer"] += [seconds / each for seconds in watch.seconds][1:]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, about {ROWS * T} "
          f"tokens a step")
    whole = {name: median(times[1:]) + per_pair[name] for name, times in found.items()}
    for name, seconds in whole.items():
        step_only = 1 / median(found[name][1:])
        print(f"| {name} | {1 / seconds:,.1f} pairs/s with the reference, {step_only:,.1f} a step "
              f"alone | {seconds / whole['ours']:.2f} |")
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
