"""train.py --check: what must hold before a long run, and what that run will take.

The network is written down here a second time, in float64 and one formula a line, and shares with
model.py nothing but the weights.
"""

import gc
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from model import ModelConfig, flops_per_token, trained
from plainllama import watch
from plainllama.parallel import World
from plainllama.progress import duration
from plainllama.settings import Settings, ceil_div
from plainllama.tokens import shards, tokenizer
from plainllama.tokens.rows import CONTEXT, PAD, FitRows, Rows, to_batch
from plainllama.training import log, resume
from plainllama.training.engine import Engine, read_outcome
from plainllama.weights import adapters, checkpoint, peft
from plainllama.weights.huggingface import load_weights

TOKENS = 128  # of a row that is checked


class Failed(Exception):
    """What was found in place of what must hold."""


def must(holds: object, seen: str) -> str:
    """Give back what was seen, or raise Failed with it unless it `holds`."""
    if not holds:
        raise Failed(seen)
    return seen


def run_checks(config: Settings, manifest: dict, world: World, price: float) -> int:
    """Try what a long run relies on and say what it will take; 0, or 1 if something failed.
    Collective. Nothing is left behind."""
    say: Callable[[str], None] = print if world.rank == 0 else lambda _: None
    if config.init_from:
        resume.source_of(config, manifest, world)
    failures = try_out(Trial(config, manifest, world), say)
    gc.collect()  # the trial's model; the forecast measures memory
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    forecast(config, manifest, world, price, say)
    say(f"{failures} checks failed: do not train yet" if failures else "all of it holds")
    return min(failures, 1)


def try_out(trial: "Trial", say: Callable[[str], None]) -> int:
    """Make every check and say what it saw; how many failed on some rank."""
    failures = 0
    for check in (trial.collectives, trial.tokens, trial.first_loss, trial.future, trial.network,
                  trial.gradients, trial.overfits, trial.saving):
        began, failed = time.perf_counter(), False
        try:
            seen = check()
        except Exception as error:  # a check that breaks has found something too
            seen, failed = str(error) if isinstance(error, Failed) else repr(error), True
        failed = trial.world.any(failed)  # on some rank
        failures += failed
        took, what = time.perf_counter() - began, (check.__doc__ or "").split(".")[0]
        say(f"{'FAIL' if failed else 'ok  '}  {what}: {seen} ({took:.1f} s)")
    return failures


class Trial:
    """The checks: each returns what it saw or raises; its docstring's first sentence names it."""

    def __init__(self, config: Settings, manifest: dict, world: World):
        self.config, self.world, self.manifest = config, world, manifest
        self.data, self.length = Path("data") / config.dataset, min(TOKENS, config.block_size)
        self.partly = config.lora_r or config.train_only or config.expand_blocks
        self.rate = 3e-3 * min(1.0, 256 / config.d_model)  # learns a row by heart at this width
        T = self.length
        self.split = shards.Split(self.data, "train", manifest)
        self.rows = first_rows(self.split, config)[:, :T + 1]
        self.x = to_batch(self.rows).ids
        # one row a rank and first weights, whatever the run will start from
        small = replace(config, block_size=T, global_batch_tokens=T * world.size, micro_batch=1,
                        compile="false", objective="next")
        self.engine = Engine(small, world, manifest["tokenizer"]["bos"])
        self.engine.ready()
        self.one, self.targets = to_batch(self.rows[:1], 0, self.engine.bos_id), T * world.size
        self.model, self.vocab = self.engine.model, self.engine.model.config.vocab_size

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) on the host, without regard to documents."""
        out = self.model(ids.to(self.world.device)).float().cpu()
        self.world.reshard(self.model)
        return out

    def collectives(self) -> str:
        """Ranks answer each other."""
        size, device = self.world.size, self.world.device
        with watch.deadline(60, f"no answer within 60 s; {watch.NETWORK}"):
            ones = self.world.sum(torch.ones(1 << 20, device=device)).cpu()
        must((ones == size).all(), f"a sum of ones over {size} ranks is {ones[0].item()}")
        return f"4 MB added up over {size} x {device.type}"

    def tokens(self) -> str:
        """Data set and tokenizer agree."""
        words, named = tokenizer.Tokenizer.load(self.data), self.manifest["tokenizer"]
        must((words.sha256, words.vocab_size) == (named["sha256"], named["vocab_size"]),
             "tokenizer.json is not the one that the manifest names")
        there = list(stored_documents(self.split))
        found = [ids for ids in there if len(ids) <= 1 << 14] or there[:1]
        must(found, "the first token file holds no document")
        special = {words.bos_id, words.eos_id}
        texts = [words.decode([i for i in ids.tolist() if i not in special]) for ids in found]
        again = ([spelled_again(words, ids) for ids in found] if self.split.masked else
                 words.encode_documents(texts))
        other = [text for text, a, b in zip(texts, found, again, strict=True)
                 if not np.array_equal(a, b)]
        first = f", the first: {other[0][:60]!r}" if other else ""
        return must(len(other) <= 0.1 * len(found), f"{len(other)} of {len(found)} documents, "
                    f"decoded and encoded again, have other ids{first}")

    @torch.no_grad()
    def first_loss(self) -> str:
        """First weights have a loss of ln V."""
        batch, right = to_batch(self.rows), math.log(self.vocab)
        loss = self.model(*batch.to(self.world.device)).item() / batch.targets.numel()
        self.world.reshard(self.model)
        return must(abs(loss - right) < 0.2, f"{loss:.3f} nats, ln {self.vocab} = {right:.3f}")

    def future(self) -> str:
        """No token sees its future."""
        must(self.length > 1, "in a context of one token there is none to look at")
        before = self.logits(self.x[:1])
        noise = 1e-5 * before.abs().max()
        for place in sorted({1, self.length // 2, self.length - 1}):
            changed = self.x[:1].clone()
            changed[:, place:] = (changed[:, place:] + 1) % self.vocab
            moved = (self.logits(changed) - before).abs().amax(-1)[0]
            wrong = torch.cat([moved[:place] > noise, ~(moved[place:] > 0)]).nonzero().flatten()
            for first in wrong.tolist():
                what = "what is predicted" if first < place else "nothing"
                raise Failed(f"another token at {place} changes {what} at {first}")
        return f"no prediction before a changed token moved, all {self.length - 1} after it did"

    @torch.no_grad()
    def network(self) -> str:
        """RoPE, attention and the rest equal the formulas in float64."""
        # sharper attention, so that positions matter more than they do at first; and back, exactly
        sharp = [p.data for n, p in self.model.named_parameters() if n.endswith("q_proj.weight")]
        for matrix in sharp:
            matrix *= 8
        ours = self.logits(self.x[:1])[0].double()
        theirs = reference(self.whole, self.model.config, self.x[0])
        for matrix in sharp:
            matrix /= 8
        error = ((ours - theirs).norm() / theirs.norm()).item()
        limit = 1e-4 if self.engine.dtype == torch.float32 else 0.05
        return must(error < limit, f"logits are off by {error:.1g} of their size (at most {limit})")

    def whole(self, name: str) -> Tensor:
        """A parameter in float64 on the host; collective."""
        place = adapters.base_weights(self.model)[name]
        matrix = place.matrix() if isinstance(place, adapters.AdaptedLinear) else place.data
        return self.world.whole(matrix).cpu().double()

    def gradients(self) -> str:
        """Every parameter has a gradient and moves."""
        piece, learns = self.world.piece, dict(self.model.named_parameters())
        if self.partly:
            learns = dict(trained(self.model))
            self.engine.update(self.one, self.rate, self.targets)  # LoRA's A waits for its B
        before = {name: piece(p.data)[0].clone() for name, p in learns.items()}
        self.engine.gradients(self.one, self.targets)
        still = [name for name, p in learns.items()
                 if p.grad is None or not self.world.any(bool(piece(p.grad)[0].any()))]
        self.engine.optimizer.zero_grad()
        must(not still, f"none reaches {len(still)} of {len(before)}: {' '.join(still):.80}")
        self.engine.update(self.one, self.rate, self.targets)
        still = [name for name, p in learns.items()
                 if not self.world.any(not torch.equal(piece(p.data)[0], before[name]))]
        must(not still, f"an update leaves {len(still)} as they were: {' '.join(still):.80}")
        return f"{len(before)} of {len(before)}"

    def overfits(self) -> str:
        """One row is learned by heart."""
        goal = 0.5 * math.log(self.vocab)
        for updates in range(1, 101):
            stats = self.engine.update(self.one, self.rate, self.targets)
            loss = read_outcome(stats).loss / self.targets
            if self.partly and updates == 1:  # beside first weights little may be learned at all
                goal = loss - 1e-3
            seen = f"{loss:.2f} nats after {updates} updates, below {goal:.2f} asked"
            if loss < goal:
                break
        return must(loss < goal, seen)

    def saving(self) -> str:
        """A checkpoint fits on the disk and comes back equal."""
        place = next(p for p in Path(self.config.out_dir).absolute().parents if p.is_dir())
        folder = Path(self.world.agree(tempfile.mkdtemp(prefix="plainllama-check-", dir=place)
                                       if self.world.rank == 0 else None))
        try:
            before = self.fingerprint()
            state = {"step": 1, "loss_scale": self.engine.optimizer.scale_state()}
            saved = checkpoint.save(folder, 1, self.model, self.engine.optimizer.state, state,
                                    self.data / "tokenizer.json", self.world,
                                    self.engine.adapter)
            size = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())
            must(not (problem := checkpoint.damage(saved)), problem)
            with torch.no_grad():
                torch._foreach_zero_(list(self.tensors()))
            load = peft.load_adapter if self.engine.adapter else load_weights
            load(saved, self.model, self.world)
            checkpoint.load_moments(saved, self.model, self.engine.optimizer.state, self.world)
            must(self.fingerprint() == before, "what was read is not what was written")
        finally:
            self.world.any(False)  # all have read
            if self.world.rank == 0:
                shutil.rmtree(folder)
        kept = self.config.keep_last + 2  # with the best, and while the next is written
        need, free = size * kept, shutil.disk_usage(place).free
        return must(need <= free, f"{kept} of {size / 1e9:.2f} GB need {need / 1e9:.1f} GB, "
                                  f"{free / 1e9:.1f} GB are free in {place}")

    def tensors(self) -> Iterator[Tensor]:
        """Every weight that a checkpoint holds, and every moment of those that learn."""
        adapter, model = self.engine.adapter, self.model
        for _, p in trained(model) if adapter else model.named_parameters():
            yield p.data
            yield from self.engine.optimizer.state.get(p, {}).values()

    def fingerprint(self) -> str:
        """Hash this rank's part of weights and moments, to the bit."""
        digest = hashlib.sha256()
        for tensor in self.tensors():
            local = torch.atleast_1d(self.world.piece(tensor)[0]).contiguous()
            digest.update(local.view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()


def first_rows(split: shards.Split, config: Settings) -> np.ndarray:
    """Read the first eight rows of a run, as if all of their tokens were learned."""
    if not split.masked:
        return Rows(split, min(TOKENS, config.block_size), config.seed).rows(0, 8)
    rows = FitRows(split, config.block_size, config.seed).rows(0, 8)
    return np.where(rows == PAD, 0, rows & (CONTEXT - 1))


def stored_documents(split: shards.Split) -> Iterator[np.ndarray]:
    """Give the ids of the first documents of a split's first token file, boundaries included."""
    ids = split.shard(0)
    for start, end in pairwise([*split.index(0)[:33].tolist(), len(ids)][:33]):
        yield ids[start:end]


def spelled_again(words: tokenizer.Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Decode and encode again each text that stands behind a special token of a dialog."""
    special = np.isin(ids, list(words.special_ids.values()))
    before, *parts = np.split(ids, np.flatnonzero(special))
    for part in parts:
        text = words.encode_behind(words.decode_behind(part[1:]))
        before = np.concatenate([before, part[:1], text], dtype=ids.dtype, casting="unsafe")
    return before


def reference(weight: Callable[[str], Tensor], c: ModelConfig, ids: Tensor) -> Tensor:
    """The network in float64, from the papers alone: ids (T,) -> logits (T, V).

    RoPE as a complex number that is turned: channels i and i + D/2 of a head are its parts
    (https://arxiv.org/abs/2104.09864, equation 14, in Hugging Face's order of channels).
    """
    T, D, H, K = len(ids), c.head_dim, c.n_head, c.kv_heads
    angles = []
    for i in range(D // 2):
        turn = c.rope_theta ** (-2 * i / D)
        if c.rope_scaling == "linear":
            turn /= c.rope_factor
        elif c.rope_scaling == "llama3":  # by wavelength, as Meta's code has it
            length = 2 * math.pi / turn
            if length > c.rope_original / c.rope_low:
                turn /= c.rope_factor
            elif length > c.rope_original / c.rope_high:
                smooth = (c.rope_original / length - c.rope_low) / (c.rope_high - c.rope_low)
                turn = (1 - smooth) * turn / c.rope_factor + smooth * turn
        angles.append([position * turn for position in range(T)])
    turns = torch.polar(torch.ones(T, D // 2, dtype=torch.float64),
                        torch.tensor(angles, dtype=torch.float64).T)

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turns[:, None]
        return torch.cat((z.real, z.imag), -1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight(name)

    x = weight("model.embed_tokens.weight")[ids]
    hidden_future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for n in range(c.n_layer):
        at = f"model.layers.{n}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (h @ weight(f"{at}self_attn.{name}_proj.weight").T).view(T, -1, D) for name in "qkv")
        k, v = (t.repeat_interleave(H // K, 1) for t in (turned(k), v))  # a head serves several
        scores = torch.einsum("qhd,khd->hqk", turned(q), k) / math.sqrt(D)
        seen = scores.masked_fill(hidden_future, -math.inf).softmax(-1)
        heads = torch.einsum("hqk,khd->qhd", seen, v).flatten(1)
        x = x + heads @ weight(at + "self_attn.o_proj.weight").T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = h @ weight(at + "mlp.gate_proj.weight").T
        up = h @ weight(at + "mlp.up_proj.weight").T
        x = x + (gate * gate.sigmoid() * up) @ weight(at + "mlp.down_proj.weight").T
    head = "model.embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weight(head).T


def forecast(config: Settings, manifest: dict, world: World, price: float,
             say: Callable[[str], None]) -> None:
    """Measure the real step and say what the run will take. `price`: of a device for an hour."""
    engine = Engine(config, world, manifest["tokenizer"]["bos"], say=say)
    engine.ready()
    block, targets = config.block_size, engine.batch_rows * config.block_size

    def seconds(rows: int, update: bool) -> float:
        ids = np.random.default_rng(0).integers(config.vocab_size, size=(rows, block + 1))
        batch = engine.stand_in(ids)
        began = time.perf_counter()
        if update:
            engine.update(batch, 0.0, targets)[0].item()
        else:
            engine.gradients(batch, targets)[0].item()
            engine.optimizer.zero_grad()
        return time.perf_counter() - began

    rows = engine.micro
    if config.deterministic:
        rows *= engine.accumulate  # its parts are those of a whole step
    elif world.device.type == "cpu" and world.least(int(1e3 * seconds(1, False))) * rows > 5000:
        rows = 1  # a micro-batch would take too long to look at
    seconds(rows, True)
    rounds = 1 if world.least(int(seconds(rows, False))) > 2 else 5
    forward_backward = median(seconds(rows, False) for _ in range(rounds))
    update = max(0.0, median(seconds(rows, True) for _ in range(rounds)) - forward_backward)
    step = forward_backward * ceil_div(engine.batch_rows, world.size) / rows + update
    speed, tokens = targets / step, config.max_steps * targets
    flops, mfu = flops_per_token(engine.model.config, block), log.mfu(engine, speed)
    total, inner, _ = adapters.parameter_counts(engine.model)
    evaluations = (config.max_steps // config.eval_interval + 1) * config.eval_tokens / speed / 3
    total_time = config.max_steps * step + evaluations
    cost = f"{total_time / 3600 * world.size * price:,.2f} at {price:g} an hour and device"
    say(f"""\
parameters   {total:,}, {inner:,} without embeddings
memory       {log.peak_memory(world.device) / 2**30:.2f} GiB at most on {world.device.type}
speed        {speed:,.0f} tok/s, MFU {log.percent(mfu)}, {step:.2f} s a step, {engine.summary}
measured     with {rows} rows of {block}; a step has {engine.accumulate} times {engine.micro}
run          {config.max_steps:,} steps, {tokens:,} tokens, {flops * tokens:.2g} FLOP
time         {duration(total_time)}, of it evaluations about {duration(evaluations)}; saves on top
cost         {cost if price else 'n/a: name the price of a device for an hour with --price='}""")
