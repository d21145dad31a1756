"""ddp, fsdp and hsdp on two to four processes are one process, to rounding; their checkpoints too.
The deterministic mode is, to the bit."""

import contextlib
import itertools
import json
import sys
import types
from datetime import timedelta

import pytest
import ranks
import torch
from conftest import run_script
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy

from model import LLaMA, ModelConfig
from model import trained as trained_in
from plainllama import parallel, watch
from plainllama.parallel import World
from plainllama.settings import Settings, UserError, ceil_div
from plainllama.tokens import tokenizer
from plainllama.training import engine, memory, optim
from plainllama.weights import checkpoint, peft
from plainllama.weights.huggingface import write_folder

SHAPES = [(mode, size) for size in (2, 3, 4) for mode in ("ddp", "fsdp")] + [("hsdp", 4)]
ALL = [(mode, size, tied, many) for mode, size in SHAPES for tied in (False, True)
       for many in (False, True)]


def pairwise() -> list[tuple]:
    """A dozen or so of ALL in which every two values that can meet do: greedy."""
    def pairs(case):
        return {((i, a), (j, b)) for (i, a), (j, b) in itertools.combinations(enumerate(case), 2)}

    left, chosen = set().union(*map(pairs, ALL)), []
    while left:
        chosen.append(max(ALL, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return [*chosen, *[case for case in ALL if case not in chosen][:12 - len(chosen)]]


# keys of runs with adapters, or with copies of blocks, known once there is a base
adapted: list[dict] = []


@pytest.fixture(scope="module", params=[
    "pairwise", pytest.param("all", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """(the folder, the cases, what each has seen) of one launch of four processes."""
    home = tmp_path_factory.mktemp("ranks")
    cases = [{"name": "{}{}{}{}".format(mode, size, "-tied" * tied, "-accumulated" * many),
              "mode": mode, "size": size, "accumulate": many, "keys": {"tie_embeddings": tied}}
             for mode, size, tied, many in (ALL if request.param == "all" else pairwise())]
    cases += [{"name": f"{mode}{size}-muon", "mode": mode, "size": size, "accumulate": True,
               "keys": {"optimizer": "muon"}} for mode, size in (
                   ("ddp", 3), ("fsdp", 3), ("hsdp", 4))]
    cases += [{"name": f"{mode}{size}-half", "mode": mode, "size": size, "accumulate": many,
               "keys": {"half": True, "optimizer": optimizer}}
              for mode, size, many, optimizer in (
                  ("ddp", 2, False, "adamw"), ("fsdp", 3, True, "adamw"),
                  ("fsdp", 4, False, "muon"), ("hsdp", 4, True, "muon"))]
    base = ranks.build(World(), micro_batch=ranks.ROWS).model
    (home / "base").mkdir()
    tokenizer.make_tokenizer("bytes").save(home)
    write_folder(home / "base", base.config, dict(base.named_parameters()), home / "tokenizer.json")
    adapted.clear()
    adapted.extend({"init_from": str(home / "base"), "lora_r": 2, **keys} for keys in (
        {}, {"frozen_dtype": "nf4"}, {"frozen_dtype": "bf16", "activation_checkpointing": True}))
    adapted.extend({"init_from": str(home / "base"), "divergence_weight": 0.5, "expand_blocks": 2,
                    "learning_rate": 0.01, "min_lr": 0.01, **keys} for keys in (
        {"expand": "concat", "expand_merge": "dlerp", "activation_checkpointing": True},
        {"expand": "hybrid", "optimizer": "muon"}))
    cases += [{"name": f"{mode}{size}-lora{number}", "mode": mode, "size": size, "accumulate": many,
               "keys": adapted[number]}
              for number, mode, size, many in (
                  (0, "ddp", 2, False), (0, "fsdp", 3, True), (0, "hsdp", 4, False),
                  (1, "ddp", 2, True), (1, "ddp", 4, False),
                  (2, "fsdp", 2, False), (2, "ddp", 3, True), (3, "ddp", 3, True),
                  (3, "fsdp", 2, False), (3, "hsdp", 4, True), (4, "fsdp", 3, True))]
    cases += [{"name": f"{mode}{size}-offload{number}", "mode": mode, "size": size,
               "accumulate": many, "keys": keys, "offload": True}
              for number, (mode, size, many, keys) in enumerate((
                  ("fsdp", 2, True, {"tie_embeddings": False}),
                  ("fsdp", 4, False, {"tie_embeddings": True}),
                  ("hsdp", 4, True, {"tie_embeddings": False}),
                  ("fsdp", 3, True, adapted[0]), ("fsdp", 2, True, adapted[2])))]
    (home / "cases.json").write_text(json.dumps(cases))
    done = run_script("tests/ranks.py", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return home, cases, json.loads((home / "found.json").read_text())


def test_every_mode_and_size_is_one_process(trained):
    home, cases, found = trained
    assert len(cases) >= 12
    for keys in ({"tie_embeddings": False}, {"tie_embeddings": True}, {"optimizer": "muon"},
                 {"half": True, "optimizer": "adamw"}, {"half": True, "optimizer": "muon"},
                 *adapted):
        one = ranks.build(World(), micro_batch=ranks.ROWS, **keys)
        kept = dict(trained_in(one.model) if one.adapter else one.model.named_parameters())
        first = {name: p.detach().clone() for name, p in kept.items()}
        seen = ranks.train(one, range(2))
        assert keys in adapted or min(norm for _, norm in seen) > 0.5  # clipped
        mine = [case["name"] for case in cases if case["keys"] == keys]
        for name in mine:
            assert found[name] == [pytest.approx(pair, rel=1e-5) for pair in seen], name
            folder = home / name / "checkpoints" / "step_2"
            if one.adapter:
                stored = load_file(folder / "adapter_model.safetensors")
                weights = {peft.our_name(key): value for key, value in stored.items()}
            else:
                weights = load_file(folder / "model.safetensors")
            assert weights.keys() == first.keys()
            optimizer = optim.make(one.model, one.config)
            checkpoint.load_moments(folder, one.model, optimizer.state, World())
            for key, p in kept.items():
                change = (p - first[key]).norm()
                assert (weights[key] - p).norm() <= 1e-3 * change, (name, key)
                if not p.requires_grad:  # not a bit of it moves
                    assert p not in optimizer.state and torch.equal(weights[key], first[key])
                    continue
                for kind, value in one.optimizer.state[p].items():
                    near = 1e-3 if "expand" in keys else 1e-5  # differences of what is alike
                    assert (optimizer.state[p][kind] - value).norm() <= near * value.norm(), (
                        name, key, kind)
        third = ranks.train(one, range(2, 3))
        for name in mine[1:]:
            assert found[name + " resumed"][0] == pytest.approx(third[0], rel=2e-5), name
    assert checkpoint.damage(home / cases[0]["name"] / "checkpoints" / "step_2") == ""


def test_gradients_are_exchanged_once_a_step(trained):
    """ddp: one bucket; fsdp: two blocks (one, where one is frozen) and the rest; hsdp: these, and
    again between copies; with offload once a micro-batch. And loss and norm of the step."""
    for case in trained[1]:
        count = trained[2].get(case["name"] + " reductions")
        parts = 2 if {"half", "lora_r", "expand"} & case["keys"].keys() else 3
        if case.get("offload") and case["accumulate"]:
            parts *= ceil_div(ranks.ROWS, case["size"])
        expected = {"ddp": 1 + 1, "fsdp": parts + 1, "hsdp": 2 * parts + 1}
        assert count in (None, expected[case["mode"]]), case["name"]


def test_resume_is_exact_on_three_ranks(trained):
    for mode in ("ddp", "fsdp"):
        whole, resumed = trained[2][f"exact {mode}"]
        assert whole == resumed, mode


def test_offload_has_the_same_bits(trained):
    """Where a step is one micro-batch: more are added up in another order."""
    assert trained[2]["offload True"] == trained[2]["offload False"]


def test_with_offload_weights_lie_on_the_host_and_all_else_on_the_device(monkeypatch, capsys):
    """Here meta stands for a GPU."""
    policies = []
    monkeypatch.setattr(World, "mesh", None)
    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard",
                        lambda module, **keys: policies.append(keys["offload_policy"]))
    for device, offload in (("cpu", False), ("cpu", True), ("meta", True)):
        world, model = World(0, 1, device, "fsdp", offload=offload), meta()
        world.place(model, torch.float32)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert {p.device.type for p in model.buffers()} == {device}
        assert {isinstance(p, CPUOffloadPolicy) for p in policies} == {offload}
        assert not any(getattr(p, "pin_memory", False) for p in policies)
        optimizer = optim.make(model, Settings(), world)
        for p, state in optimizer.state.items():
            assert {t.device.type for t in state.values()} == {"cpu"}
            p.grad = torch.ones_like(p)
        assert world.square_norm(model).device.type == device
        policies.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):  # where numbers leave meta
        model = torch.nn.Linear(2, 3)
        optimizer = optim.make(model, Settings())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optim.step(optimizer, 1e-3, torch.ones((), device="meta"), 1.0)
        assert optimizer.adamw.grad_scale.device.type == "cpu"
        assert optimizer.adamw.found_inf.device.type == "cpu"
    config = Settings(n_layer=2, n_head=2, d_model=32, d_ff=64, vocab_size=99, block_size=16)
    memory.foresee(config, world)
    assert "on one device, of which all but activations in host memory" in capsys.readouterr().out
    monkeypatch.setattr(parallel.os, "sysconf", lambda name: 300)
    with pytest.raises(UserError, match="1 x 9e-05 are in host memory"):
        engine.refuse_too_large(config, World(0, 1, "cuda", "fsdp", offload=True))


def test_deterministic_has_the_same_bits_on_any_number_of_ranks(trained):
    _, _, found = trained
    ways = [name for name in found if name.startswith("way") and name.count(" ") == 1]
    assert len(ways) == 3 and len({found[name] for name in ways}) == 1
    for step in range(4):
        assert len({str(found[f"{name} {step}"]) for name in ways}) == 1
    # and it is the same training: the batch cut otherwise, summed otherwise
    plain = ranks.train(ranks.build(World(), micro_batch=ranks.ROWS, optimizer="muon"), range(4))
    for step, seen in enumerate(plain):
        assert found[f"{ways[0]} {step}"][0] == pytest.approx(seen, rel=1e-5)


def test_rank_0_decides_and_its_refusal_ends_all(trained):
    found = trained[2]
    assert found["decided"] == [7] * 4
    assert found["refused"] == ["UserError('not so')"] + ["SystemExit(2)"] * 3


def meta(**keys) -> LLaMA:
    with torch.device("meta"):
        return LLaMA(ModelConfig(**{"n_layer": 2, "n_head": 4, "d_model": 64, "d_ff": 64,
                                    "vocab_size": 1000, "block_size": 8} | keys))


def test_auto_takes_ddp_while_the_model_fits_and_says_why(monkeypatch):
    room = 16 * sum(p.numel() for p in meta().parameters()) / parallel.DDP_SHARE
    monkeypatch.setattr(parallel.os, "sysconf", lambda name: int(room) if "PHYS" in name else 1)
    for local, size, factor, mode in ((1, 8, 1.01, "ddp"), (1, 8, 0.99, "fsdp"),
                                      (2, 8, 2.02, "ddp"), (2, 8, 1.9, "hsdp"),
                                      (2, 8, 0.9, "fsdp"), (8, 8, 7.9, "fsdp")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        monkeypatch.setattr(parallel.os, "sysconf", lambda name, factor=factor: (
            int(room * factor) if "PHYS" in name else 1))
        world = World(5, size, mode="auto")
        world.choose(meta())
        assert world.mode == mode and f"auto takes {mode}" in world.why, (local, size, factor)
        assert (world.sharded, world.shards) == {
            "ddp": (False, 1), "fsdp": (True, 8), "hsdp": (True, 2)}[mode]


def test_what_cannot_be_cut_is_refused(monkeypatch):
    for size, local in ((2, 2), (3, 2), (5, 1), (8, 8)):  # one machine; uneven; one rank each
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        with pytest.raises(UserError, match=f"hsdp cannot cut {size} ranks"):
            World(0, size, mode="hsdp")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    world = World(5, 8, mode="hsdp")  # two machines
    assert (world.replicas, world.shards, world.shard, world.holds_a_piece) == (2, 4, 1, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    world = World(5, 8, mode="hsdp")  # four machines
    assert (world.replicas, world.shards, world.shard, world.holds_a_piece) == (4, 2, 1, False)
    for size, mode, micro in ((3, "ddp", 0), (2, "fsdp", 0), (4, "ddp", 5)):
        with pytest.raises(UserError, match="deterministic=true is for"):
            made = World(0, size)
            made.share(mode)
            ranks.Engine.split_for_any_ranks(_Parts(made, micro))


def test_an_environment_that_names_no_rank_is_one_line(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for given in ({"RANK": "abc"}, {"RANK": "5", "WORLD_SIZE": "2"}, {"RANK": "5"}, {"RANK": ""},
                  {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"},
                  {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, {"WORLD_SIZE": "1.5"},
                  {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "none"},
                  {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, {"WORLD_SIZE": "2"},
                  {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
                  {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "port"}):
        for name in names:
            monkeypatch.setenv(name, given.get(name, ""))
            if name not in given:
                monkeypatch.delenv(name)
        with pytest.raises(UserError, match="|".join(given)) as error:
            parallel.start("cpu", "auto")
        assert "torchrun" in str(error.value) and len(str(error.value)) < 250, given
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert parallel.start("cpu", "auto").size == 1


def test_an_old_gpu_is_named_where_it_refuses_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert parallel.pick_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="dtype=bf16: Tesla T4 only emulates it; use dtype=fp16"):
        parallel.pick_dtype("bf16", torch.device("cuda"))


class _Parts:
    """As much of an engine as split_for_any_ranks() looks at."""

    def __init__(self, world: World, micro: int):
        self.world, self.batch_rows = world, ranks.ROWS
        self.config = Settings(block_size=ranks.LENGTH, micro_batch=micro)


# ---- a world by itself, without other ranks

class NoRanks:
    """torch.distributed where nobody may ask for it; `asked` is what was."""

    def __init__(self, **parts):
        self.asked: list = []
        vars(self).update(parts)

    def __getattr__(self, name):
        def call(*given, **keys):
            self.asked.append((name, *given, keys))
            for one in given:
                if isinstance(one, torch.Tensor):
                    one.sub_(5)
        return call


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(parallel, "dist", NoRanks())
    world, values = World(), torch.tensor([3.0])
    assert (world.rank, world.size, world.mode, world.device.type, world.home.type, world.offload,
            world.sharded, world.shards, world.replicas, world.shard, world.holds_a_piece,
            world.why, world.store) == (
        0, 1, "one", "cpu", "cpu", False, False, 1, 1, 0, True, "", None)
    part = [values]
    assert world.add_in_tree(part) is part and world.sum(values) is values and values == 3
    assert world.from_rank(0, values, (9,)) is values
    assert world.from_rank(1, values, (9,)).shape == world.from_rank(0, None, (9,)).shape == (9,)
    assert world.least(7) == 7 and world.any(True) and not world.any(False)
    assert world.agree(part) is part and world.gather(4) == [4] and world.decide(lambda: 5) == 5
    world.set_timeout(timedelta(seconds=3))
    assert world.timeout.seconds == 3 and not parallel.dist.asked
    with world.patient():
        assert world.timeout == watch.PATIENT
    assert world.timeout.seconds == 3
    with pytest.raises(ValueError), world.patient():
        raise ValueError
    assert world.timeout.seconds == 3


def test_what_ranks_ask_each_other(monkeypatch):
    found = NoRanks(ReduceOp=types.SimpleNamespace(MIN="least"))
    monkeypatch.setattr(parallel, "dist", found)
    world = World(1, 2, group="all", hosts="hosts")
    values, theirs = torch.tensor([9.0]), torch.tensor([1.0])
    assert world.sum(values) is values and values == 4  # as the stand-in has it
    assert world.from_rank(1, theirs, (1,)) is theirs
    assert world.from_rank(0, theirs, (3,)).shape == (3,)
    assert world.least(7) == 2 and world.any(True) and world.any(False)  # -5 is below 0
    assert [call[:1] + call[2:] for call in found.asked] == [
        ("all_reduce", {"group": "all"}), ("broadcast", {"group": "all", "group_src": 1}),
        ("broadcast", {"group": "all", "group_src": 0}),
        *[("all_reduce", "least", {"group": "all"})] * 3]
    monkeypatch.setattr(world, "least", lambda value: 0)
    assert not world.any(False)
    found.asked.clear()
    assert world.agree("x") == "x" and world.gather("x") == [None, None]
    assert [(call[0], call[-1]) for call in found.asked] == [
        ("broadcast_object_list", {"src": 0, "group": "all", "device": world.device}),
        ("all_gather_object", {"group": "hosts"})]
    found.distributed_c10d = found
    found._world = types.SimpleNamespace(pg_map={"all": 1, "hosts": 2, "more": 3})
    found.asked.clear()
    world.set_timeout(timedelta(seconds=9))
    assert found.asked == [("_set_pg_timeout", timedelta(seconds=9), name, {})
                           for name in ("all", "more")]
    for there in (True, False):
        found.asked.clear()
        found.is_initialized = lambda there=there: there
        world.close()
        assert found.asked == [("destroy_process_group", {})] * there


def test_what_rank_0_decides(monkeypatch):
    """Others do not call; a refusal is said by rank 0 alone."""
    said, told = UserError("no"), []
    for rank in (0, 1):
        world = World(rank, 2)
        monkeypatch.setattr(world, "agree", lambda value, rank=rank: (
            told.append(value) if rank == 0 else None) or told[0])

        def refuse(rank=rank):
            assert rank == 0
            raise said

        with pytest.raises(UserError if rank == 0 else SystemExit) as seen:
            world.decide(refuse)
        assert rank == 0 or seen.value.code == 2


@pytest.mark.parametrize(("mode", "size", "local", "rank", "parts"), [
    ("one", 1, 1, 0, (False, 1, 1, 0, True)), ("ddp", 4, 4, 3, (False, 1, 4, 0, False)),
    ("ddp", 4, 4, 0, (False, 1, 4, 0, True)), ("fsdp", 4, 2, 3, (True, 4, 1, 3, True)),
    ("fsdp", 1, 1, 0, (True, 1, 1, 0, True)), ("hsdp", 4, 2, 1, (True, 2, 2, 1, True)),
    ("hsdp", 4, 2, 2, (True, 2, 2, 0, False)), ("hsdp", 6, 3, 5, (True, 3, 2, 2, False)),
    ("hsdp", 4, 1, 0, None), ("hsdp", 4, 4, 0, None), ("hsdp", 4, 3, 0, None),
    ("auto", 4, 2, 1, (False, 1, 4, 0, False))])
def test_how_ranks_share_a_model(monkeypatch, mode, size, local, rank, parts):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    if parts is None:
        with pytest.raises(UserError) as seen:
            World(rank, size, mode=mode)
        assert str(seen.value) == (
            f"parallel=hsdp cannot cut {size} ranks, {local} of them on this machine, into a copy "
            "on each machine; say parallel=fsdp")
        return
    world = World(rank, size, mode=mode)
    assert (world.sharded, world.shards, world.replicas, world.shard, world.holds_a_piece) == parts
    made = []
    mesh = torch.distributed.device_mesh
    monkeypatch.setattr(mesh, "init_device_mesh", lambda *at, **keys: made.append((at, keys)))
    monkeypatch.setattr(mesh, "DeviceMesh", types.SimpleNamespace(from_group=lambda *at: (
        made.append(at))))
    monkeypatch.setattr(parallel, "dist", types.SimpleNamespace(
        group=types.SimpleNamespace(WORLD="world")))
    assert world.mesh is None and made == [
        (("cpu", (size // local, local)), {"mesh_dim_names": ("replicas", "shards")})
        if mode == "hsdp" else ("world", "cpu")]
    if mode == "fsdp":
        other = World(rank, size, mode=mode, group="mine")
        assert other.mesh is None and made[-1] == ("mine", "cpu")


def test_what_a_model_takes_and_what_room_there_is(monkeypatch):
    one = torch.nn.Linear(4, 3)
    one.register_buffer("codes", torch.zeros(5, dtype=torch.int8))
    assert parallel.held_bytes(one) == 15 * 4 + 5 + 12 * 15
    one.bias.requires_grad_(False)
    one.weight.data = one.weight.data.bfloat16()
    assert parallel.held_bytes(one) == 12 * 2 + 3 * 4 + 5 + 12 * 12
    monkeypatch.setattr(parallel.os, "sysconf", lambda name: {
        "SC_PAGE_SIZE": 40, "SC_PHYS_PAGES": 7}[name])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (World().room, World(0, 3).room) == (280, 93) and parallel.local_size(3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert World(0, 3).room == 140 and parallel.local_size(3) == 2
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(
        total_memory=77))
    assert World(0, 3, "cuda").room == 77
    away = World(0, 3, "cuda", "fsdp", offload=True)
    assert away.room == 140 and away.home.type == "cpu" and away.device.type == "cuda"


def test_auto_at_the_very_bound(monkeypatch):
    """A model that just fits is not sharded; nor one in few bits, whatever it takes."""
    monkeypatch.setattr(parallel, "DDP_SHARE", 0.5)
    monkeypatch.setattr(parallel, "held_bytes", lambda _: need)
    monkeypatch.setattr(World, "room", 8 * 10**9)
    for need, size, local, few, mode in (
            (4e9, 4, 2, False, "ddp"), (4e9 + 1, 4, 2, False, "hsdp"), (8e9, 4, 2, False, "hsdp"),
            (8e9 + 1, 4, 2, False, "fsdp"), (5e9, 4, 1, False, "fsdp"), (5e9, 4, 4, False, "fsdp"),
            (5e9, 5, 2, False, "fsdp"), (5e9, 9, 3, False, "hsdp"), (5e9, 4, 2, True, "ddp")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        world, part = World(0, size, mode="auto"), torch.nn.Module()
        part.register_buffer("codes", torch.zeros(2, dtype=torch.uint8 if few else torch.float32))
        world.choose(part)
        assert world.mode == mode and world.why == (
            f"parallel=auto takes {mode}: weights, gradients and moments need {need / 1e9:.2f} GB, "
            "and 4.00 GB are for them on each rank")
    monkeypatch.undo()
    assert parallel.DDP_SHARE == 0.6


def test_how_a_model_is_placed_and_wrapped(monkeypatch):
    seen, chosen = [], []
    monkeypatch.setattr(World, "mesh", "mesh")
    monkeypatch.setattr(World, "choose", lambda world, model: chosen.append(world))
    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard",
                        lambda module, **keys: seen.append((module, keys)))
    for kind, device, offload in (("fsdp", "cpu", False), ("fsdp", "meta", True),
                                  ("ddp", "cpu", False), ("auto", "cpu", False)):
        world, net = World(0, 1, device, kind, offload=offload), meta()
        seen.clear()
        chosen.clear()
        world.place(net, torch.bfloat16)
        assert net.compute_dtype == torch.bfloat16 and bool(chosen) == (kind == "auto")
        assert [module for module, _ in seen] == [*net.model.layers, net] * (kind == "fsdp")
        for _, keys in seen:
            policy = keys["mp_policy"]
            assert keys["mesh"] == "mesh" and policy.param_dtype == torch.bfloat16
            assert policy.reduce_dtype == torch.float32 and not policy.cast_forward_inputs
    pinned = []
    monkeypatch.setattr(torch.distributed.fsdp, "CPUOffloadPolicy",
                        lambda pin_memory: pinned.append(pin_memory))
    world = World(0, 1, "meta", "fsdp", offload=True)
    for device in (torch.device("cpu"), types.SimpleNamespace(type="cuda")):
        world.device, net = device, meta()
        monkeypatch.setattr(net, "reset_derived", lambda _: None)
        world.place(net, torch.float32)
    assert pinned == [False, True]
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel",
                        lambda *given, **keys: (given, keys))
    model = torch.nn.Linear(1, 1)
    for kind, device in (("ddp", "cpu"), ("ddp", "cuda:3"), ("fsdp", "cpu"), ("one", "cpu")):
        found = World(0, 1, device, kind, group="mine").wrap(model)
        if kind != "ddp":
            assert found is model
            continue
        assert found == ((model,), {
            "device_ids": None if device == "cpu" else [3], "gradient_as_bucket_view": True,
            "broadcast_buffers": False, "process_group": "mine"})


def test_what_is_compiled_and_undone(monkeypatch):
    """The whole model or, where hooks stand around the blocks, each of them and the loss."""
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: ("compiled", dynamic))
    for mode in ("ddp", "fsdp"):
        net, done, world = meta(), [], World(0, 1, "cpu", mode)
        for part in (net, *net.model.layers):
            monkeypatch.setattr(part, "compile", lambda dynamic, part=part, done=done: (
                done.append((part, dynamic)), setattr(part, "_compiled_call_impl", 1)))
        loss = net.loss
        world.compile(net, None)
        assert done == ([(net, None)] if mode == "ddp" else [
            (block, None) for block in net.model.layers])
        assert net.loss == (loss if mode == "ddp" else ("compiled", None))
        world.decompile(net)
        assert net.loss == loss and not any(
            part._compiled_call_impl for part in (net, *net.model.layers))


@pytest.mark.parametrize("last", [False, True])
def test_when_gradients_are_exchanged(last):
    for mode, offload, ddp in (("fsdp", False, False), ("fsdp", True, False), ("ddp", False, True),
                               ("one", False, False)):
        done = []

        @contextlib.contextmanager
        def no_sync(done=done):
            done.append("no sync")
            yield

        parts = {"set_requires_gradient_sync": done.append,
                 "reshard": lambda done=done: done.append("r")}
        module = types.SimpleNamespace(**parts, **({"no_sync": no_sync} if ddp else {}))
        world = World(0, 1, "cpu", mode, offload=offload)
        with world.accumulating(module, last):
            pass
        assert done == ([last or offload] if mode == "fsdp" else ["no sync"] * (ddp and not last))
        done.clear()
        world.reshard(module)
        assert done == ["r"] * (mode == "fsdp")


def test_pieces_of_a_tensor_and_their_norm(monkeypatch):
    """Rows as torch.chunk cuts them: of 5 over 4 ranks 2, 2, 1 and none."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    plain = torch.ones(5, 2)
    cut = types.SimpleNamespace(shape=(5, 2), to_local=lambda: "mine", full_tensor=lambda: "all",
                                to=lambda device: cut if device.type == "cpu" else None)
    for rank, first in enumerate((0, 2, 4, 5)):
        world = World(rank, 4, mode="fsdp")
        assert world.piece(plain) == (plain, 0) and world.whole(plain) is plain
        assert world.piece(cut) == ("mine", first) and world.whole(cut) == "all"
    net = torch.nn.Linear(2, 2)
    net.extra = torch.nn.Parameter(torch.ones(0, 2))
    net.idle = torch.nn.Parameter(torch.ones(3))
    net.weight.grad, net.bias.grad = torch.full((2, 2), 3.0), torch.tensor([1.0, 2.0])
    net.extra.grad = torch.ones(0, 2)
    assert World().square_norm(net).item() == pytest.approx(41)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert World(0, 4, mode="hsdp").square_norm(net).item() == pytest.approx(41 / 2)
    net.bias.requires_grad_(False)
    assert World().square_norm(net).item() == pytest.approx(36)


def test_what_torchrun_says_is_heard(monkeypatch):
    """(environment, device, mode) -> rank, size, device, back end."""
    joined = []
    monkeypatch.setattr(parallel.watch, "join", lambda *given: joined.append(given) or "store")
    monkeypatch.setattr(parallel.dist, "new_group", lambda **keys: keys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    run = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
           "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    names = (*run, "LOCAL_WORLD_SIZE")
    for given, device, mode, seen in (
            (run, "cpu", "ddp", (3, 4, "cpu", "gloo")),
            (run, "cuda", "auto", (3, 4, "cuda:1", "cpu:gloo,cuda:nccl")),
            (run | {"RANK": "0", "LOCAL_RANK": "0"}, "cpu", "hsdp", (0, 4, "cpu", "gloo")),
            (run | {"LOCAL_WORLD_SIZE": "4"}, "cpu", "fsdp", (3, 4, "cpu", "gloo")),
            ({"RANK": "0", "WORLD_SIZE": "1"}, "cpu", "ddp", (0, 1, "cpu", "gloo")),
            ({"RANK": "0", "WORLD_SIZE": "1"}, "cuda", "auto", (0, 1, "cuda", None)),
            ({}, "cpu", "auto", (0, 1, "cpu", None)),
            ({}, "cpu", "ddp", r"^parallel=ddp needs torchrun --nproc_per_node=N"),
            (run | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, "cuda", "ddp",
             "^process 2 of this machine has no GPU, torch sees 2; lower --nproc_per_node"),
            (run | {"MASTER_PORT": "0"}, "cpu", "ddp", "^the environment names no rank of a run"),
            (run | {"LOCAL_RANK": "2"}, "cpu", "ddp", "names no rank"),
            (run | {"LOCAL_WORLD_SIZE": "5"}, "cpu", "ddp", "names no rank"),
            (run | {"RANK": "4"}, "cpu", "ddp", "names no rank"),
            (run | {"RANK": "x"}, "cpu", "ddp", "names no rank")):
        for name in names:
            monkeypatch.setenv(name, given.get(name, ""))
            if name not in given:
                monkeypatch.delenv(name)
        joined.clear()
        if isinstance(seen, str):
            with pytest.raises(UserError, match=seen):
                parallel.start(device, mode)
            continue
        world = parallel.start(device, mode)
        rank, size, where, backend = seen
        assert (world.rank, world.size, str(world.device)) == (rank, size, where)
        assert world.offload is False and world.mode == ("one" if backend is None else mode)
        if backend is None:
            assert not joined and world.store is None and world.hosts is None
            continue
        assert joined == [*["cuda:1"] * (device == "cuda"), (backend, where)]
        assert world.store == "store" and world.hosts == {
            "backend": "gloo", "timeout": timedelta(hours=2)}
    for name, value in run.items():
        monkeypatch.setenv(name, value)
    assert parallel.start("cuda", "fsdp", True).offload
    with pytest.raises(UserError, match=r"^offload has no effect on device=cpu: its weights"):
        parallel.start("cpu", "fsdp", True)


def test_devices_and_dtypes(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert parallel.pick_device("auto") == best and parallel.pick_device("cpu") == "cpu"
    with pytest.raises(UserError) as seen:
        parallel.pick_device("mps")
    assert str(seen.value) == f"device=mps is not available to this torch ({torch.__version__})"
    bits = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for device, able, auto in (("cpu", (9, 0), "fp32"), ("mps", (7, 0), "fp32"),
                               ("cuda", (7, 9), "fp16"), ("cuda", (8, 0), "bf16"),
                               ("cuda", (9, 0), "bf16"), ("cuda", (8, 6), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, able=able: able)
        where = types.SimpleNamespace(type=device)
        assert parallel.pick_dtype("auto", where) == bits[auto]
        for name in ("fp32", "fp16", *["bf16"] * (auto != "fp16")):
            assert parallel.pick_dtype(name, where) == bits[name]


@pytest.mark.parametrize(("given", "says"), [
    (("sdpa", "cpu"), ""), (("sdpa", "cpu", torch.float32, True), ""), (("reference", "mps"), ""),
    (("reference", "cuda", torch.float32, True), ""), (("sdpa", "cuda", torch.float32, False), ""),
    (("sdpa", "cuda", torch.float16, True), ""), (("varlen", "cuda", torch.float16, True), ""),
    (("varlen", "cuda"), ""), (("xformers", "cuda", torch.float32), ""),
    *(((kind, where, dtype), f"attention={kind} needs a CUDA device, found {where}; use "
       "attention=sdpa") for kind in ("varlen", "xformers") for where in ("cpu", "mps")
      for dtype in (torch.float32, torch.bfloat16)),
    (("varlen", "cuda", torch.float32), "attention=varlen computes in bf16 or fp16 only; use "
                                        "attention=sdpa or another dtype"),
    (("xformers", "cuda", torch.float16, True),
     "attention=xformers sees no documents; with doc_mask use attention=sdpa"),
    (("sdpa", "cuda", torch.float32, True),
     "doc_mask on CUDA computes in bf16 or fp16 only; use another dtype")])
def test_why_a_back_end_cannot_run(monkeypatch, given, says):
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.ModuleType("xformers.ops"))
    assert parallel.attention_refusal(*given) == says
    if given == ("xformers", "cuda", torch.float32):
        monkeypatch.setitem(sys.modules, "xformers.ops", None)
        said = parallel.attention_refusal(*given)
        assert said.startswith("attention=xformers: ")
        assert said.endswith("; pip install xformers, or use attention=sdpa")


def test_why_torch_compile_failed_is_one_line():
    assert parallel.why_not(ValueError("no\n  C++\tcompiler ")) == "ValueError: no C++ compiler"
    assert parallel.why_not(ValueError("x" * 300)) == "ValueError: " + "x" * 188
