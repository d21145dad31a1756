"""What ends a run from outside: signals, ranks that die or fall silent, a second job, a cluster."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, metrics, run_script
from safetensors.torch import load_file

import train
from plainllama import settings, watch
from plainllama.command import parse
from plainllama.files import lock_run
from plainllama.parallel import World
from plainllama.training import resume

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def run(*words: str) -> int:
    """train.py in this process."""
    return train.main(parse(list(words), "", train.Flags))


# ---- signals

STUCK = """
import ctypes, os, sys, time
sys.path.insert(0, sys.argv[1])
from plainllama import watch
time.monotonic = lambda: os.path.getsize("clock")  # seconds as the test lets them pass
stop = watch.StopFlag(0)
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
while not stop.asked():
    pass
print("asked", flush=True)
for _ in range(2):  # a call that signals do not end, as a collective is
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_a_process_that_waits_in_c(tmp_path):
    (tmp_path / "clock").write_text("1")
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(ROOT)], stdout=subprocess.PIPE,
                               text=True, cwd=tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # a copy, as launchers send it
    said = {process.stdout.readline(), process.stdout.readline()}
    assert "asked\n" in said and any("finish the step and save" in line for line in said)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    (tmp_path / "clock").write_text("a second")
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 143


def test_main_leaves_signals_as_they_were(home):
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(name) for name in names]
    assert run("toy.py", "--max_steps=1") == 0
    assert [signal.getsignal(name) for name in names] == before
    with pytest.raises(settings.UserError):
        run("toy.py", "--max_steps=1", "--seed=1")
    assert [signal.getsignal(name) for name in names] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_torchrun_does_not_start_again_what_was_told_to_stop(home, monkeypatch):
    assert run("toy.py", "--max_minutes=1e-9") == 75
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run("toy.py") == 75
    assert json.loads((home / "out/toy/status.json").read_text())["state"] == "stopped"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert run("toy.py", "--max_steps=4", "--extend") == 0


# ---- ranks that die

FAULTS = """
import os, signal, time
import model
from plainllama import watch
from plainllama.training import optim
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
forward, step, calls = model.LLaMA.forward, optim.step, [0, 0]
def nan(self, *args):
    calls[0] += self.training
    loss = forward(self, *args)
    return loss * float("nan") if calls[0] == 4 and self.training else loss  # the 3rd update
def die(*args):
    calls[1] += 1
    if (attempt, calls[1]) == ("0", 13):
        while not os.path.isdir("out/a/checkpoints/step_10"): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if (attempt, calls[1]) == ("1", 5):
        os.kill(os.getpid(), signal.SIGTERM)
        while not flags[0].asked(): time.sleep(0.01)  # a thread hears it
    return step(*args)
flags, guard = [], watch.StopFlag.__init__
def init(self, minutes):
    guard(self, minutes)
    flags.append(self)
watch.StopFlag.__init__ = init
if rank == "1":
    model.LLaMA.forward, optim.step = nan if attempt == "0" else forward, die
"""


def test_ranks_agree_through_a_nan_a_death_and_a_signal_to_one_of_them(home):
    """Rank 1 alone has a NaN in update 3 and dies in update 13; torchrun starts both again, from
    step 10; rank 1 alone is told to stop in its fifth update, which all hear in the sixth."""
    done = run_script("train.py", "toy.py", "--out_dir=out/a", cwd=home, processes=2, code=FAULTS,
                      env={"PET_MAX_RESTARTS": "1"})
    assert done.returncode == 1, done.stderr
    assert "exitcode: -9" in done.stderr and done.stderr.count("exitcode  : 75") == 2, done.stderr
    assert "resuming from out/a/checkpoints/step_10" in done.stdout
    status = json.loads((home / "out/a/status.json").read_text())
    assert status == {"state": "stopped", "step": 16}
    rows = {row["step"]: row["loss"] for row in metrics(home / "out/a") if "loss" in row}
    assert [*rows] == [*range(1, 17)] and [s for s in rows if rows[s] is None] == [3]
    weights = load_file(home / "out/a/checkpoints/step_16/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=300))


@pytest.fixture
def left(monkeypatch) -> list[str]:
    """What processes would have said in leaving; in a hurry, and only the thread ends."""
    said: list[str] = []

    def leave(message: str, torchrun: bool = False) -> None:
        said.append(message)
        raise SystemExit(1)

    monkeypatch.setattr(watch, "leave", leave)
    for name, value in {"BEAT": 0.05, "SILENCE": 0.6}.items():
        monkeypatch.setattr(watch, name, value)
    return said


def until(condition) -> None:
    end = time.monotonic() + 300
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_a_silent_rank_ends_the_others_by_name(store, left):
    ranks = [watch.Watch(store, rank, 3) for rank in range(3)]
    time.sleep(0.8)
    ranks[2].close()  # in good order
    time.sleep(1)
    assert not left
    farewells: list[int] = []
    ranks[0].farewell = lambda: farewells.append(0)
    ranks[1].over.set()  # stopped: no signs, no good-bye
    until(lambda: left)
    assert farewells == [0] and left[0].startswith(f"rank 1 ({ranks[1].name}) has given no sign")
    assert "the same command goes on" in left[0]
    assert store.get("end").decode() == left[0]  # what all others read
    for rank in ranks:
        rank.close()


def test_others_notice_a_silent_rank_0_and_a_lost_store(store, left):
    other = watch.Watch(store, 1, 2)
    until(lambda: left)
    assert left[0].startswith("rank 0 (it never gave one) has given no sign of life")
    other.close()
    left.clear()
    cut_off = watch.Watch(None, 1, 2)  # which nothing answers
    with pytest.raises(SystemExit):
        cut_off.count()
    assert left[0].startswith(f"rank 1 ({cut_off.name}) cannot reach the first machine")


def test_attempts_meet_apart_from_those_before(store, left, monkeypatch):
    """On one store, in any order of arrival, though dead ranks' names are still there."""
    found: list[dict[int, dist.Store]] = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        met: dict[int, dist.Store] = {}
        found.append(met)

        def arrive(rank: int, met: dict = met) -> None:
            met[rank] = watch.meet(store.clone(), rank, 3)

        threads = [threading.Thread(target=arrive, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        met[0].set("address", str(order))
        assert met[1].get("address") == met[2].get("address") == str(order).encode()
    assert not left
    assert not found[0][0].check(["other"])
    for met in found:
        assert met[2].get("address") == met[0].get("address")
    assert len({met[0].get("address") for met in found}) == 3
    monkeypatch.setattr(watch, "ARRIVE", 1)
    with pytest.raises(SystemExit):
        watch.meet(dist.PrefixStore("new", store), 0, 2)
    assert len(left) == 1
    assert "of 2 ranks 1 did not come within 1 s, the first is rank 1" in left[0]


def test_the_first_sum_is_tried_and_names_the_usual_cures(store, left, monkeypatch):
    monkeypatch.setattr(dist, "rendezvous", lambda *a, **k: iter([(store, 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(dist, "all_reduce", lambda values: None)
    watch.join("gloo", "cpu")
    assert not left
    monkeypatch.setattr(dist, "all_reduce", lambda values: values[:7].add_(1))
    with pytest.raises(SystemExit):
        watch.join("gloo", "cpu")

    def refuse(values):
        raise RuntimeError("connection refused")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    with pytest.raises(SystemExit):
        watch.join("gloo", "cpu")
    monkeypatch.setattr(watch, "FIRST_SUM", 0.2)
    monkeypatch.setattr(dist, "all_reduce", lambda values: until(lambda: len(left) == 3))
    watch.join("gloo", "cpu")
    said = ["is wrong in 7 places", "cannot reach each other (connection refused)",
            "did not come within 0.2 s"]
    assert all(what in line for what, line in zip(said, left, strict=True)), left
    for name in ("NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME"):
        assert all(name in line for line in left)


def test_collectives_have_less_time_after_the_first_step_and_more_in_a_save():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD._get_backend(torch.device("cpu"))
        world = World(0, 2)
        world.set_timeout(watch.BRISK)
        with world.patient():
            assert group.options._timeout == watch.PATIENT
        assert group.options._timeout == watch.BRISK < timedelta(minutes=2)
    finally:
        dist.destroy_process_group()


# ---- two jobs

def test_a_second_job_on_a_run_is_refused(home, monkeypatch):
    assert run("toy.py", "--max_steps=1") == 0
    rows, held = metrics(home / "out/toy"), lock_run(home / "out/toy")
    with pytest.raises(settings.UserError, match="another process is training in out/toy"):
        run("toy.py", "--max_steps=2", "--extend")
    assert metrics(home / "out/toy") == rows
    held.close()  # as it does when its process dies
    assert run("toy.py", "--max_steps=2", "--extend") == 0

    real = resume.starting_point  # another job makes the folder between our look and our start
    for folder, said in (("a", "is training"), ("b", "has begun to train")):
        out, others = home / "out" / folder, []

        def look(*args, out=out, others=others):
            found = real(*args)
            (out / "checkpoints/step_1").mkdir(parents=True)
            others.append(lock_run(out))
            if out.name == "b":
                others.pop().close()
            return found

        monkeypatch.setattr(resume, "starting_point", look)
        with pytest.raises(settings.UserError, match=said):
            run("toy.py", f"--out_dir=out/{folder}")
        assert not (out / "metrics.jsonl").exists()


# ---- Slurm

STUBS = {
    "srun": 'shift; export SLURM_PROCID=0; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node-a; else echo "$@" >> asked; fi',
    # as torchrun: dies on USR1, exits 1 when a rank does not exit 0
    "torchrun": 'echo "$@" > launched; bash rank & wait $!; [ $? = 0 ] || exit 1',
}
RANKS = {
    "stopped": """trap 'echo "{\\"state\\": \\"stopped\\"}" > out/toy/status.json; exit 75' TERM
                  echo > ready; for i in {1..6000}; do sleep 0.05; done""",
    "failed": """echo '{"state": "failed"}' > out/toy/status.json; echo > ready; exit 1""",
    "dead": "echo > ready; exit 1",
    "done": """echo '{"state": "done"}' > out/toy/status.json; echo > ready; exit 0""",
}


@pytest.mark.parametrize("rank", RANKS)
def test_the_slurm_job_queues_itself_again_when_stopped(tmp_path, rank):
    bin = tmp_path / "bin"
    bin.mkdir()
    (tmp_path / "out/toy").mkdir(parents=True)
    (tmp_path / "out/toy/status.json").write_text('{"state": "stopped"}')  # of the start before
    os.utime(tmp_path / "out/toy/status.json", (1, 1))
    for name, body in STUBS.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    (tmp_path / "rank").write_text(RANKS[rank])
    (tmp_path / "config").mkdir()
    (tmp_path / "config/toy.py").write_text('"""A run."""\n')
    real = f'exec {sys.executable} "$@"'  # which takes seconds to say where the run lies
    (bin / "python").write_text(f"#!/bin/sh\n{real if rank == 'stopped' else 'echo out/toy'}\n")
    (bin / "python").chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(ROOT / "launch/slurm.sbatch"), "config/toy.py", "--seed=7"], cwd=tmp_path,
        start_new_session=True,
        env={"PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
             "SLURM_JOB_ID": "41", "SLURM_NNODES": "2",
             "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "4"})
    until(lambda: (tmp_path / "ready").exists() or job.poll() is not None)
    if rank == "stopped":
        job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == (1 if rank in ("failed", "dead") else 0)
    asked = tmp_path / "asked"
    assert (asked.read_text() == "requeue 41\n") if rank == "stopped" else not asked.exists()
    assert (tmp_path / "launched").read_text() == (
        "--nnodes=2 --nproc_per_node=4 --rdzv_id=41 --rdzv_backend=c10d "
        "--rdzv_endpoint=node-a:29500 train.py config/toy.py --seed=7\n")
    assert not list(tmp_path.glob("slurm-41*"))


# ---- the whole table, once

@pytest.mark.slow
def test_every_fault_once():
    done = subprocess.run([sys.executable, str(ROOT / "bench/faults.py"), "--n=2", "--seed=1"],
                          capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_two_nodes_and_a_cut_link():
    if subprocess.run(["unshare", "-rnmu", "ip", "netns"], capture_output=True,
                      check=False).returncode or not shutil.which("ip"):
        pytest.skip("no network namespaces here")
    done = subprocess.run([str(ROOT / "bench/two_nodes.sh")], capture_output=True, text=True,
                          timeout=600, check=False, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to the bit" in done.stdout
    assert Path(ROOT / "bench/two_nodes.sh").stat().st_mode & stat.S_IXUSR
