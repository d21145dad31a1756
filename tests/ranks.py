"""What test_parallel.py runs on four processes, in an empty folder with a cases.json.

torch is imported once and the processes are forked; cases.json says what to train, a case of n
ranks leaves the others waiting. The test compares what is left in the folder.
"""

import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.profiler

from model import IGNORE, LLaMA
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.tokens import tokenizer
from plainllama.tokens.rows import Batch
from plainllama.training.engine import Engine, read_outcome
from plainllama.weights import checkpoint

ROWS, LENGTH = 10, 24
TOKENIZER = Path("tokenizer.json")


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets of a step; the targets of a row are fewer the later it comes."""
    ids = torch.randint(2, 258, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for row in range(ROWS):
        y[row, LENGTH - 2 * row:] = IGNORE
    return x, y


def frozen(name: str) -> bool:
    """Half a model that does not learn: a whole block, and some of each group of the other."""
    some = ("q_proj.weight", "layernorm.weight")
    return name.startswith("model.layers.0.") or name.endswith(some)


class Half(Engine):
    """An engine whose model is frozen as frozen() says."""

    def build_model(self, source: Path | None) -> None:
        whole = LLaMA.__init__

        def init(model: LLaMA, config) -> None:
            whole(model, config)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not frozen(name))

        with mock.patch.object(LLaMA, "__init__", init):
            super().build_model(source)


def build(world: World, source: Path | None = None, half: bool = False, **keys) -> Engine:
    """An engine of a small model whose matrices do not divide evenly: nine rows of the MLP are cut
    into 3, 3, 3 and 0 for four ranks. `half`: half of it is frozen. `init_from`: its base."""
    config = Settings(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=9, vocab_size=258,
                      block_size=LENGTH, global_batch_tokens=ROWS * LENGTH, device="cpu",
                      compile="false", grad_clip=0.5, **keys)
    state = checkpoint.read_state(source) if source else {}
    source = source or (Path(config.init_from) if config.init_from else None)
    made = (Half if half else Engine)(config, world, 1, source, state)
    made.ready()
    return made


def train(made: Engine, steps: range) -> list[list[float]]:
    """Loss and gradient norm of the updates."""
    world, seen = made.world, []
    for step in steps:
        x, y = rows(step)
        targets = int((y != IGNORE).sum())
        x, y = x[world.rank::world.size], y[world.rank::world.size]
        fill = made.accumulate * made.micro - len(x)
        batch = Batch(torch.cat([x, torch.zeros(fill, LENGTH, dtype=torch.long)]),
                      torch.cat([y, torch.full((fill, LENGTH), IGNORE)]), None, False, None)
        outcome = read_outcome(made.update(batch, 1e-3, targets))
        seen.append([outcome.loss / targets, outcome.square_norm**0.5])
    return seen


def save(made: Engine, folder: Path, step: int) -> Path:
    state = {"step": step, "world_size": made.world.size, "micro_batch": made.micro}
    return checkpoint.save(folder, step, made.model, made.optimizer.state, state, TOKENIZER,
                           made.world, made.adapter)


def fingerprint(folder: Path) -> str:
    files = [folder / "model.safetensors", *sorted(folder.glob("training/optimizer-*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def rank_main(rank: int, folder: Path, cases: list[dict]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    groups = {n: [dist.new_group(list(range(n))) for _ in range(2)] for n in (1, 2, 3, 4)}
    found: dict[str, object] = {}

    worlds = {(mode, size): World(rank, size, "cpu", mode, *groups[size])
              for size in (1, 2, 3, 4) for mode in ("ddp", "fsdp", "hsdp")
              if rank < size and (mode != "hsdp" or size == 4)}
    assert worlds["hsdp", 4].mesh  # made by all ranks at once
    before: dict[str, Path] = {}  # model -> its last checkpoint, by another mode or size
    for case in cases:
        name, size, mode, keys = case["name"], case["size"], case["mode"], case["keys"]
        if rank < size:
            worlds[mode, size].offload = case.get("offload", False)
            micro = 1 if case["accumulate"] else ROWS
            made = build(worlds[mode, size], micro_batch=micro, **keys)
            found[name] = train(made, range(2))
            save(made, folder / name, 2)
            if str(keys) in before:
                made = build(worlds[mode, size], before[str(keys)], micro_batch=micro, **keys)
                with torch.profiler.profile() as profiler:
                    found[name + " resumed"] = train(made, range(2, 3))
                events = profiler.profiler.kineto_results.events()  # key_averages() takes a second
                found[name + " reductions"] = sum(
                    event.name() in ("c10d::allreduce_", "c10d::_reduce_scatter_base_")
                    for event in events)
        before[str(keys)] = folder / name / "checkpoints" / "step_2"
        dist.barrier()

    for mode in ("ddp", "fsdp"):  # three ranks: with three terms the order of a sum matters
        if rank < 3:
            name = f"exact {mode}"
            made = build(worlds[mode, 3], micro_batch=2)
            train(made, range(2))
            middle = save(made, folder / name, 2)
            train(made, range(2, 4))
            whole = fingerprint(save(made, folder / name, 4))
            made = build(worlds[mode, 3], middle)
            train(made, range(2, 4))
            found[name] = [whole, fingerprint(save(made, folder / name / "again", 4))]
        dist.barrier()

    for offload in (False, True):
        if rank < 3:
            worlds["fsdp", 3].offload = offload
            made = build(worlds["fsdp", 3], micro_batch=ROWS)
            train(made, range(3))
            name = f"offload {offload}"
            found[name] = fingerprint(save(made, folder / name, 3))
        dist.barrier()

    for way in ([1, 1, 1, 1], [2, 4, 1, 2], [4, 2, 4, 4]):  # ranks of one step after another
        name, source = "way " + "-".join(map(str, way)), None
        for step, size in enumerate(way):
            if rank < size:
                made = build(worlds["ddp", size], source, deterministic=True, optimizer="muon")
                found[f"{name} {step}"] = train(made, range(step, step + 1))
                save(made, folder / name, step + 1)
            source = folder / name / "checkpoints" / f"step_{step + 1}"
            dist.barrier()
        found[name] = fingerprint(source) if source else ""

    def refuse():
        raise UserError("not so")

    four = worlds["ddp", 4]
    try:
        four.decide(refuse)
    except (UserError, SystemExit) as error:
        found["refused"] = four.gather(repr(error))
    found["decided"] = four.gather(four.decide(lambda: rank + 7))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # for hsdp: as if on two machines
    home = Path.cwd()
    tokenizer.make_tokenizer("bytes").save(home)
    torch.multiprocessing.start_processes(
        rank_main, (home, json.loads((home / "cases.json").read_text())), 4, start_method="fork")
