"""torch.compile under DDP and FSDP2, on two processes: the losses of one, compiled once."""

import json
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch._dynamo.utils import counters

import model
from plainllama.parallel import World
from plainllama.settings import Settings
from plainllama.training.engine import Engine

# two micro-batches a rank and step; `chunk`: of LOGITS_BYTES, 20 rows of 48 at a time
CASES = {"plain": (1 << 30, {}),
         "all": (4 * 258 * 20, {"activation_checkpointing": True, "optimizer": "muon"})}
STEPS = 5


def train(world: World, case: str, compiled: str) -> list[list[float]]:
    """Loss and gradient norm of some updates; the graphs that were compiled by step 2 must do."""
    model.LOGITS_BYTES, keys = CASES[case]
    config = Settings(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=9, vocab_size=258,
                      block_size=ranks.LENGTH, global_batch_tokens=ranks.ROWS * ranks.LENGTH,
                      device="cpu", compile=compiled, micro_batch=2, **keys)
    made = Engine(config, world, 1)
    made.ready()
    seen = ranks.train(made, range(2))
    graphs = counters["stats"]["unique_graphs"]
    seen += ranks.train(made, range(2, STEPS))
    assert counters["stats"]["unique_graphs"] == graphs, "compiled again"
    assert not counters["graph_break"], counters["graph_break"]
    assert made.compiled == (compiled == "true")
    assert graphs == {"false": 0}.get(compiled, 2 if world.sharded else 1)
    return seen


def rank_main(rank: int, folder: Path, mode: str, backend: str, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, "cpu", mode, *(dist.new_group([0, 1]) for _ in range(2)))
    torch.compile = partial(torch.compile, backend=backend)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 10000  # several buckets, also of so small a model
    nn.parallel.DistributedDataParallel = partial(nn.parallel.DistributedDataParallel,
                                                  bucket_cap_mb=0.02)
    found = train(world, case, "true")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_compiled_ranks_are_one_eager_process(tmp_path, monkeypatch, mode, backend, case):
    torch.multiprocessing.spawn(rank_main, (tmp_path, mode, backend, case), nprocs=2)
    monkeypatch.setattr(model, "LOGITS_BYTES", 0)  # restored afterwards
    alone = train(World(), case, "false")
    for rank in range(2):
        both = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert both == [pytest.approx(numbers, rel=1e-5) for numbers in alone]
