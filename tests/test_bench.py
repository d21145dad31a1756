"""bench/gpu.py rehearsed on the CPU: rows, tables, the minutes; a bad stage stops no other."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script

from model import LLaMA
from plainllama.command import parse
from plainllama.files import read_rows
from plainllama.training.engine import architecture

sys.path.insert(0, str(ROOT / "bench"))
import gpu

TINY = ROOT / "config/bench_gpu_tiny.py"


def rows(out: Path) -> dict[str, list[dict]]:
    """The rows of results.jsonl by table."""
    tables: dict = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        tables.setdefault(row["table"], []).append(row)
    return tables


def run(*words: str) -> int:
    """main() of bench/gpu.py in this process, on the CPU."""
    threads = torch.get_num_threads()
    try:
        return gpu.main(parse([f"--config={TINY}", *words], "", gpu.Flags, "files"))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def parts(monkeypatch):
    """Give bench/gpu.py other parts; what main() sets in the environment is put back."""
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    return lambda **given: monkeypatch.setattr(gpu, "PARTS", given)


def check_steps(found: dict) -> None:
    """The rows of the stage `step`."""
    arms = {(row["arm"], row["context"]): row for row in found["step"]}
    order = list(gpu.COMPILED)
    assert list(arms) == [*((arm, 64) for arm in (*order, "ours, eager", "transformers, eager")),
                          *((arm, 16) for arm in (order[0], gpu.MUON, *order[1:], "ours, eager"))]
    for (arm, context), row in arms.items():
        turns = [one["tokens_per_second"] for one in found["step, rounds"]
                 if (one["arm"], one["context"]) == (arm, context)]
        assert turns == row["rounds_tokens_per_second"] and len(turns) == 5
        assert row["tokens_per_second"] == statistics.median(turns) > 0
        assert row["update_tokens"] == 512 and row["micro_batch"] == 512 // context
        assert row["mfu"] is None and row["peak_bytes"] is None  # a CPU has neither
        assert abs(row["last_loss"] - 5.553) < 0.1  # ln 258: all train the same thing
        assert row["first_step_seconds"] > 0 and row["build_seconds"] > 0
    turns = found["step, rounds"][:6]
    assert [row["arm"] for row in turns] == order * 2  # A B C A B C
    a, b = (arms[name, 64]["rounds_tokens_per_second"] for name in order[:2])
    ratio = found["ratios of tokens per second"][0]
    assert ratio["ratio"] == "ours, compiled / transformers, compiled" and ratio["context"] == 64
    assert ratio["median"] == pytest.approx(
        statistics.median(x / y for x, y in zip(a, b, strict=True)))
    named = {row["ratio"] for row in found["ratios of tokens per second"]}
    assert len(named) == len(gpu.PAIRS)


NANO = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 1
    vocab_size: int = 1
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    dropout: float = 0.5
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.dropout == 0 and not config.bias
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        torch.nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, ids, targets):
        logits = self.lm_head(self.wte(ids))
        return logits, torch.nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)
"""


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    (tmp_path / "model.py").write_text(NANO)
    done = run_script("bench/gpu.py", "--config=config/bench_gpu_tiny.py", "--out=results",
                      "--nanogpt=model.py", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path / "results")
    assert [(row["stage"], row["state"]) for row in found["stages"]] == [
        (stage, "done") for stage in gpu.PARTS]
    check_steps(found)
    page = (tmp_path / "results/results.md").read_text()
    assert all(f"## {table}\n" in page and f"## {table}\n" in done.stdout for table in found)
    assert found["environment"][0]["device"] == "CPU, a rehearsal"
    assert len(found["ceilings"]) == 4 and all(row["rate"] > 0 for row in found["ceilings"])
    tried = [(row["arm"], row["micro_batch"]) for row in found["memory"]]
    assert tried == [("ours, eager", n) for n in (1, 2, 4, 8)] + [
        ("ours, compiled", n) for n in (8, 4, 2, 1)]
    assert [(row["arm"], row["batch"]) for row in found["decode"]] == [
        ("ours", 1), ("transformers", 1), ("ours", 16), ("transformers", 16)]
    assert all(0 < row["share_of_reading_speed"] < 1 for row in found["decode"]
               if row["arm"] == "ours")
    weights = sum(row["written_bytes"] for row in found["save"]) / 3
    assert weights > 3 * 4 * (2 * 258 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64))
    assert all(0 < row["training_waits_seconds"] < row["committed_after_seconds"]
               for row in found["save"])
    tests = found["tests"][0]
    assert tests["ended"] == "ended with 0" and len(tests["skipped"]) >= 27
    assert not tests["passed"] + tests["failed"] + tests["error"]
    kept = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["results.jsonl", "results.md", "tests.log"]


@pytest.mark.slow
def test_arms_are_compiled_by_their_own_ways(tmp_path, parts):
    (tmp_path / "compiled.py").write_text(f"base = {str(TINY)!r}\ncompile = 'true'\n"
                                          "global_batch_tokens = 128\n")
    parts(**{"step": (partial(gpu.step, divisor=1, names=gpu.COMPILED[:2]), 2),
             "memory": (partial(gpu.memory, compiled=True), 1),
             "decode": (partial(gpu.decode, batch=1), 1)})
    assert run(f"--config={tmp_path}/compiled.py", f"--out={tmp_path}", "--minutes=8") == 0
    found = rows(tmp_path)
    assert all(row["compiled"] for row in [*found["step"], *found["memory"]])
    assert len(found["step"]) == 2 and len(found["memory"]) == 2
    assert [row["arm"] for row in found["decode"]] == ["ours", "transformers", "ours, compiled"]


def test_a_stage_that_fails_dies_or_hangs_stops_no_other(tmp_path, parts, capfd):
    def fails(bench):
        raise ValueError("no luck")

    def dies(bench):
        os._exit(9)

    def hangs(bench):
        bench.record("before", value=1, child=subprocess.Popen(["sleep", "77"]).pid)
        time.sleep(60)

    def works(bench):
        bench.record("works", value=12345.6, many=[0.5, None], some_bytes=2**31, name="a|b\nc",
                     yes=True)

    parts(environment=(gpu.environment, 1), fails=(fails, 1), dies=(dies, 1),
          hangs=(hangs, 0.015), works=(works, 1))
    words = ["--minutes=5", f"--out={tmp_path}"]
    assert run(*words) == 1
    found = rows(tmp_path)
    states = {row["stage"]: (row["state"], row["why"]) for row in found["stages"]}
    assert states["hangs"][0] == "stopped" and "s were over" in states.pop("hangs")[1]
    assert states == {
        "environment": ("done", ""), "fails": ("failed", "ValueError: no luck"),
        "dies": ("stopped", "its process ended with 9"), "works": ("done", "")}
    assert "Traceback" in capfd.readouterr().err
    assert gone(found["before"][0]["child"])  # it went with its process group
    page = (tmp_path / "results.md").read_text()
    assert "| 12,346 | 0.5, n/a | 2.000 GiB | a/b c | True |" in page
    assert run(*words, "--only=works") == 0
    assert len(rows(tmp_path)["works"]) == 2  # an earlier use's rows stay


def gone(pid: int) -> bool:
    """Whether a process ends at all (one that nobody has waited for has ended)."""
    for _ in range(3000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_step_killed_after_two_rounds_keeps_them_and_gets_its_medians(
        tmp_path, parts, monkeypatch):
    record = gpu.Bench.record

    def until_two_rounds(self, table, **fields):
        record(self, table, **fields)
        if (table, fields.get("arm"), fields.get("round")) == ("step, rounds", "ours, eager", 2):
            os.killpg(0, signal.SIGKILL)

    monkeypatch.setattr(gpu.Bench, "record", until_two_rounds)
    parts(**{"step, eager": (partial(gpu.step, divisor=1,
                                     names=("ours, compiled", "ours, eager")), 1)})
    assert run("--minutes=2", f"--out={tmp_path}") == 1
    found = rows(tmp_path)
    assert found["stages"][0]["why"] == "its process ended with -9"
    assert [(row["arm"], row["round"]) for row in found["step, rounds"]] == [
        (arm, turn) for turn in (1, 2) for arm in ("ours, compiled", "ours, eager")]
    assert [len(row["rounds_tokens_per_second"]) for row in found["step"]] == [2, 2]
    assert found["ratios of tokens per second"][0]["ratio"] == "ours, compiled / ours, eager"
    page = (tmp_path / "results.md").read_text()
    assert all(f"## {table}\n" in page for table in found)
    assert f"{found['step, rounds'][3]['tokens_per_second']:,.0f}" in page


def test_an_arm_that_fails_or_hangs_is_a_row_and_the_next_is_measured(
        tmp_path, parts, monkeypatch):
    real = gpu.Arm.update

    def update(self, batch):
        if self.kind == "transformers":
            raise ValueError("no such kernel")
        if self.config.optimizer == "muon":
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 1  # which ends soon instead
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            time.sleep(600)
        return real(self, batch)

    monkeypatch.setattr(gpu.Arm, "update", update)
    monkeypatch.setattr(gpu, "their_model", gpu.our_model)
    names = ("transformers, compiled", "ours, Muon, eager", "ours, eager")
    parts(step=(partial(gpu.step, divisor=1, names=names), 1))
    assert run("--minutes=5", f"--out={tmp_path}") == 1
    found = rows(tmp_path)
    assert [row["arm"] for row in found["step, first"]] == list(names)
    notes = [row["note"] for row in found["step, first"]]
    assert notes[0] == "not measured: ValueError: no such kernel" and notes[2] == ""
    assert notes[1].startswith("not measured: TimeoutError: ") and "s were over" in notes[1]
    assert [row["arm"] for row in found["step"]] == ["ours, eager"]
    assert found["stages"][0]["state"] == "done"


def test_turns_end_before_the_time_does_and_an_arm_that_fails_is_out(
        tmp_path, parts, monkeypatch):
    now, left = [1e9], [1.0, 2.0]

    def slow() -> float:
        now[0] += 37
        return 4.0

    monkeypatch.setattr(gpu, "time", SimpleNamespace(
        time=lambda: now[0], perf_counter=lambda: now[0], strftime=time.strftime,
        sleep=time.sleep))
    parts(turns=(lambda bench: gpu.take_turns(
        bench, "turns", {"a": lambda: 3.0, "b": left.pop, "c": slow}, 50), 1))
    assert run("--minutes=5", f"--out={tmp_path}") == 1
    found = rows(tmp_path)
    assert found["stages"][0]["state"] == "done"  # not stopped
    arms = [row["arm"] for row in found["turns"]]
    assert arms[:8] == ["a", "b", "c", "a", "b", "c", "a", "b"] and set(arms[8:]) == {"a", "c"}
    failed = found["turns"][7]
    assert failed["note"] == "not measured: IndexError: pop from empty list"
    assert arms[-1] == "c" and arms.count("c") == 7  # the 8th would begin after 259 of 299 s


def test_memory_that_ends_is_a_row_and_others_take_smaller_micro_batches(
        tmp_path, parts, monkeypatch):
    real, theirs = gpu.Arm.update, gpu.Arm.mean_loss

    def update(self, batch):
        if self.kind == "ours" and len(batch.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    def mean_loss(self, part):
        if len(part.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return theirs(self, part)

    monkeypatch.setattr(gpu.Arm, "update", update)
    monkeypatch.setattr(gpu.Arm, "mean_loss", mean_loss)
    (tmp_path / "model.py").write_text(NANO)
    parts(memory=(partial(gpu.memory, compiled=False), 1),
          step=(partial(gpu.step, divisor=1, names=("nanoGPT, compiled",)), 1))
    assert run("--minutes=2", f"--out={tmp_path}", f"--nanogpt={tmp_path}/model.py") == 1
    found = rows(tmp_path)
    assert [(row["micro_batch"], row["note"]) for row in found["memory"]] == [
        (1, ""), (2, ""), (4, "not measured: out of memory")]
    row = found["step"][0]
    assert (row["micro_batch"], row["update_tokens"]) == (2, 512)
    assert abs(row["last_loss"] - 5.553) < 0.1  # the mean over its four parts


PRINTED = """
created: 4/4 workers
[gw1] [ 10%] PASSED tests/test_cuda.py::test_a[8]
tests/test_cuda.py::test_b
[gw0] [ 20%] FAILED tests/test_cuda.py::test_c
tests/test_cuda.py::test_d SKIPPED (no reason) [ 30%]
"""


def test_tests_that_are_killed_half_way_are_a_row(tmp_path, parts, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ncat <<'END'\n{PRINTED}END\nsleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    parts(tests=(gpu.tests, 1))
    assert run("--minutes=0.1", f"--out={tmp_path}") == 1
    found = rows(tmp_path)
    row = found["tests"][0]
    assert row["ended"] == "killed when its time was over"
    assert [row[kind] for kind in ("passed", "failed", "error", "skipped")] == [
        ["test_a[8]"], ["test_c"], [], ["test_d"]]
    assert found["stages"][0]["state"] == "failed"


def test_what_a_killed_script_measured_is_readable_and_the_next_call_adds_to_it(tmp_path):
    words = [sys.executable, str(ROOT / "bench/gpu.py"), f"--config={TINY}", "--out=kept",
             "--only=environment,ceilings,step"]
    script = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    file, wanted = tmp_path / "kept/results.jsonl", random.randint(2, 9)
    for _ in range(600):
        children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
                    if parent_of(path) == script.pid]  # none for a moment between two parts
        if children and file.exists() and file.read_text().count("\n") >= wanted:
            break
        time.sleep(0.1)
    script.kill()
    script.wait()
    assert children and all(map(gone, children))  # nothing goes on without it
    found = read_rows(file, tolerant=True)
    assert len(found) >= wanted and all(row["table"] for row in found)
    with open(file, "a") as half:
        half.write('{"table": "wo')
    done = run_script("bench/gpu.py", f"--config={TINY}", "--out=kept", "--only=environment",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = read_rows(file, tolerant=True)
    assert again[:len(found)] == found and len(again) == len(found) + 2
    assert again[-1]["stage"] == "environment"


def parent_of(path: Path) -> int:
    """The parent in a process's /proc/PID/stat, 0 if it is gone."""
    try:
        return int(path.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_the_plan_keeps_the_minutes(tmp_path, parts, monkeypatch):
    now, limits, takes = [1e9], {}, 1.0

    def conduct(bench, name, function, limit):
        limits[name] = limit
        now[0] += takes * limit

    parts(**gpu.PARTS)
    monkeypatch.setattr(gpu, "conduct", conduct)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(time=lambda: now[0], strftime=time.strftime))
    assert run("--minutes=9", f"--out={tmp_path}/a") == 0
    whole = dict(limits)
    assert list(whole) == list(gpu.PARTS) and 530 < sum(whole.values()) <= 540
    assert min(whole.values()) > 8
    assert sum(limit for name, limit in whole.items()
               if name.startswith(("step", "short"))) > 0.45 * 540
    takes = 0.5
    limits.clear()
    run("--minutes=9", f"--out={tmp_path}/b")
    assert limits["tests"] > 2 * whole["tests"]  # what others left
    limits.clear()
    run("--minutes=9", "--only=decode", f"--out={tmp_path}/c")
    assert list(limits) == ["decode, batch 1", "decode, batch 16"] and sum(limits.values()) > 500


def test_hanging_parts_end_in_time(tmp_path, parts):
    parts(**{f"hangs {i}": (lambda bench: time.sleep(60), 1) for i in range(3)})
    begin = time.perf_counter()
    assert run("--minutes=0.1", f"--out={tmp_path}") == 1
    assert time.perf_counter() - begin < 120  # not 180
    assert [row["state"] for row in rows(tmp_path)["stages"]] == ["stopped"] * 3


REFUSE = """
import os, torch
PARENT = os.getpid()
def asked(*words):
    assert os.getpid() != PARENT, "CUDA was asked in the parent"
    return 0
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = asked
"""


def test_only_children_ask_for_cuda(tmp_path):
    """A process that is forked after its parent asked cannot use CUDA."""
    done = run_script("bench/gpu.py", "--out=out", f"--config={TINY}", "--only=environment,save",
                      cwd=tmp_path, code=REFUSE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["--only=step,foo"], "no stage foo; there are environment, ceilings, step, short, memory"),
    (["nothing.py"], "--config=FILE"), (["--minute=3"], "minutes"),
    (["--nanogpt=no.py"], "no file no.py"), (["--config=no.py"], "no config file no.py"),
    ([], "device=cuda is not available")])
def test_bad_input_is_one_line(tmp_path, words, message):
    done = run_script("bench/gpu.py", *words, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_optimizers_differ_in_nothing_else():
    adamw, muon = (vars(parse([str(ROOT / f"config/bench_{arm}.py")], "").config)
                   for arm in ("adamw", "muon"))
    differing = {key: (adamw[key], muon[key]) for key in adamw if adamw[key] != muon[key]}
    differing.pop("out_dir")
    assert differing == {"optimizer": ("adamw", "muon")}


def test_the_memory_of_a_config_is_counted_without_having_it():
    import sizes

    config = parse([str(ROOT / "config/laptop.py")], "").config
    seen = {}
    for twice in (False, True):
        config.vocab_size, config.activation_checkpointing = 512, twice
        parameters, seen[twice] = sizes.traced(config, sizes.Flags(rows=4))
    model = architecture(config)
    assert parameters == sum(p.numel() for p in LLaMA(model).parameters())
    muon = parameters - 2 * 512 * 384 - 17 * 384  # one moment for the blocks' matrices, else two
    tables = 2 * model.block_size * model.head_dim  # of RoPE
    held = 4 * (2 * parameters - muon + parameters + tables)
    assert held <= seen[True]["held"] < held + 1000  # and AdamW's counts of steps
    passing = {twice: counts["peak"] - counts["held"] for twice, counts in seen.items()}
    rows = 4 * 512 * 384 * 2  # bytes of one state in bf16
    assert 8 * rows < passing[True] < 0.5 * passing[False]
    one, eight = (sizes.per_rank(model, parameters, seen[True], ranks) for ranks in (1, 8))
    assert one - eight == pytest.approx(7 / 8 * (held + 4 * parameters), rel=1e-3)
