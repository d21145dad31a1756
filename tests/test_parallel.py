"""ddp, fsdp and hsdp on two to four processes are one process, to rounding; their checkpoints too.
The deterministic mode is, to the bit."""

import itertools
import json

import pytest
import ranks
import torch
from conftest import run_script
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy

from model import LLaMA, ModelConfig
from model import trained as trained_in
from plainllama import parallel
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
