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


# ---- by the clock, which the test moves

class Table:
    """A store of one process."""

    def __init__(self, **values: bytes):
        self.values = {name.replace("_", " "): value for name, value in values.items()}
        self.lost = False

    def set(self, name: str, value: str) -> None:
        if self.lost:
            raise RuntimeError("the store is gone")
        self.values[name] = value if isinstance(value, bytes) else value.encode()

    def get(self, name: str) -> bytes:
        return self.values[name]

    def check(self, names: list[str]) -> bool:
        return all(name in self.values for name in names)


class Beats:
    """An event that is set after so many waits."""

    def __init__(self, count: int):
        self.left, self.waited = count, []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        self.left -= 1
        return self.left < 0

    def is_set(self) -> bool:
        return self.left < 0


@pytest.fixture
def ended(monkeypatch) -> list:
    """What end() of a Watch was told, and how long was slept."""
    said: list = []
    monkeypatch.setattr(watch.Watch, "end", lambda self, *words, **how: said.append(
        (*words, *how.items())))
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: said.append(seconds))
    return said


def watching(rank: int, size: int, store: Table | None = None) -> watch.Watch:
    """A Watch whose threads the test is."""
    found = watch.Watch(None, rank, size)
    found.store = store or Table()
    return found


def test_a_rank_is_lost_after_twenty_beats_without_a_new_sign(ended):
    for rank in (0, 1):
        ended.clear()
        signs = watching(rank, 3, Table(sign_2=b"7 there, process 5"))
        for _ in range(20):
            signs.hear(2)  # the first of them is new
        assert ended == []
        signs.store.set("sign 2", "8 there, process 5")
        for _ in range(20):
            signs.hear(2)
        assert ended == [] and signs.heard == {2: (b"8 there, process 5", 38.0)}
        signs.hear(2)
        reason = ("rank 2 (there, process 5) has given no sign of life for 40 s: it hangs or is "
                  "cut off; the last checkpoint stands, the same command goes on from there")
        assert ended == ([4.0, (reason,)] if rank == 0 else [(reason,)])
        assert signs.store.check(["end"]) == (rank == 0)  # rank 0 tells the others
    signs = watching(0, 2, Table(sign_1=b"done"))
    ended.clear()
    for _ in range(50):
        signs.hear(1)
    assert ended == []
    never = watching(1, 2)
    for _ in range(20):
        never.hear(0)
    assert ended[0][0].startswith("rank 0 (it never gave one) has given no sign of life for 40 s")


def test_ranks_give_signs_and_listen(ended):
    for rank, heard in ((0, [1, 2]), (1, [0]), (2, [0])):
        signs = watching(rank, 3)
        signs.over, listened = Beats(3), []
        signs.hear = listened.append
        signs.cut_off = 30.0
        signs.talk()
        assert signs.over.waited == [2.0] * 4 and listened == heard * 3
        assert signs.store.values == {f"sign {rank}": f"2 {signs.name}".encode()}
        assert signs.cut_off == 0
    signs.store.set("end", "rank 1 is lost")
    signs.over = Beats(1)
    signs.talk()
    assert ended == [("rank 1 is lost",)]
    signs.over, signs.store.lost = Beats(5), True
    signs.talk()  # the store is lost: nothing is raised, and nothing more tried
    assert len(signs.over.waited) == 1


def test_a_rank_that_cannot_reach_the_first_machine_leaves(ended):
    signs = watching(1, 2)
    signs.over = Beats(20)
    signs.count()
    assert signs.cut_off == 40.0 and ended == []
    signs.over = Beats(1)
    signs.count()
    assert ended == [(f"rank 1 ({signs.name}) cannot reach the first machine for 40 s; the last "
                      "checkpoint stands, the same command goes on from there",
                      ("torchrun", True))]
    assert (watch.ARRIVE, watch.FIRST_SUM, watch.BEAT, watch.SILENCE, watch.COPIES) == (
        600, 180, 2, 40, 0.5)
    assert (timedelta(minutes=30), timedelta(seconds=100)) == (watch.PATIENT, watch.BRISK)


def test_a_rank_ends_once_with_a_farewell(monkeypatch):
    said: list = []
    monkeypatch.setattr(watch, "leave", lambda *words: said.append(words))
    signs = watching(0, 2)

    def farewell() -> None:
        said.append("farewell")
        raise OSError("the disk is gone too")

    signs.farewell = farewell
    signs.end("why")
    signs.end("why", torchrun=True)
    assert said == ["farewell", ("why", False), "farewell", ("why", True)]
    signs.over.set()
    signs.end("why")
    assert len(said) == 4


def test_the_last_words_of_a_rank():
    class Thread:
        """One that has ended, or hangs."""

        def __init__(self, alive: bool):
            self.alive, self.joined = alive, []

        def join(self, timeout: float) -> None:
            self.joined.append(timeout)

        def is_alive(self) -> bool:
            return self.alive

    for alive, broken, words in (((False, False), "", {"sign 1": b"done"}),
                                 ((False, False), "why", {"end": b"why"}),
                                 ((True, False), "", {}), ((False, True), "why", {}), ((), "", {})):
        signs = watching(1, 2)
        signs.threads, signs.broken = [Thread(one) for one in alive], broken
        signs.close()
        assert signs.store.values == words and signs.over.is_set()
        assert all(thread.joined == [5] for thread in signs.threads)
        signs.store.lost = True
        signs.close()  # nobody is left to be told


def test_two_ranks_of_a_machine_say_why_they_leave(monkeypatch, capsys):
    left: list = []
    monkeypatch.setattr(watch.os, "_exit", lambda code: left.append(code))
    monkeypatch.setattr(watch.os, "kill", lambda *what: left.append(what))
    monkeypatch.setattr(watch.time, "sleep", left.append)
    for rank, says in ((None, True), ("0", True), ("1", True), ("2", False), ("10", False)):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        watch.leave("why")
        assert capsys.readouterr().err == ("error: why\n" if says else "")
    assert left == [1] * 5
    left.clear()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    watch.leave("why", torchrun=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    watch.leave("why", torchrun=False)
    assert left == [1, 1]
    watch.leave("why", torchrun=True)
    assert left[2:] == [4.0, (os.getppid(), signal.SIGKILL), 1]


def test_the_first_sum_is_that_of_all_ranks(monkeypatch):
    said, asked, timers = [], [], []
    monkeypatch.setattr(watch, "leave", said.append)
    monkeypatch.setattr(watch, "meet", lambda store, rank, size: (store, rank, size))
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: asked.append((url, timeout)) or
                        iter([("s", 2, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *how: asked.append(how))

    class Timer(threading.Timer):
        """Kept."""

        def __init__(self, *how):
            super().__init__(*how)
            timers.append((self, how))

    monkeypatch.setattr(watch.threading, "Timer", Timer)
    for result, wrong in ((10.0, 0), (9.0, 1 << 20)):
        monkeypatch.setattr(dist, "all_reduce", lambda parts, result=result: asked.append(
            parts.unique().tolist()) or parts.fill_(result))
        assert watch.join("gloo", "cpu") == ("s", 2, 4)
        assert len(said) == bool(wrong)
    assert said[0].startswith(f"the first sum over 4 ranks is wrong in {1 << 20} places; usual")
    assert asked[:3] == [("env://", timedelta(seconds=600)),
                         ("gloo", None, watch.PATIENT, 4, 2, ("s", 2, 4)), [3.0]]
    timer, (seconds, call, [message]) = timers[0]
    assert seconds == 180 and call == watch.leave
    assert timer.daemon and timer.finished.is_set()  # and so it does not strike any more
    assert message.startswith("the first sum over 4 ranks did not come within 180 s; usual cures")


def test_the_time_limit_is_in_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    for minutes, at, asks in ((2, 1120, False), (2, 1120.1, True), (0, 1e18, False)):
        now[0] = 1000.0
        stop = watch.StopFlag(minutes)
        now[0] = at
        assert stop.asked() == asks
        stop.close(False)
        stop.close(False)  # a second time does nothing


def test_signals_after_a_run_do_nothing_if_the_process_leaves():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        watch.StopFlag(0).close(True)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_first_signal_is_said_by_the_first_rank_and_a_copy_changes_nothing(monkeypatch, capfd,
                                                                             rank):
    now, left = [10.0], []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.os, "_exit", left.append)
    stop = watch.StopFlag(0)
    stop.outbox.send(bytes([signal.SIGUSR2]))  # somebody else's
    stop.outbox.send(bytes([signal.SIGTERM]))
    wait = threading.Event()
    for _ in range(500):
        if stop.asked():
            break
        wait.wait(0.01)
    assert stop.signalled == 10.0
    now[0] = 10.5
    stop.outbox.send(bytes([signal.SIGTERM]))  # half a second later: a copy
    stop.outbox.send(bytes([signal.SIGUSR2]))
    wait.wait(0.1)
    assert left == [] and stop.signalled == 10.0
    now[0] = 10.6
    stop.outbox.send(bytes([signal.SIGINT]))
    for _ in range(500):
        if left:
            break
        wait.wait(0.01)
    stop.close(False)
    assert left == [143]
    assert capfd.readouterr().out == ("SIGTERM: asked to finish the step and save; a second signal "
                                      "leaves at once\n" if rank == "0" else "")


@pytest.mark.parametrize(("error", "size", "ends"), [
    (RuntimeError("Gloo connection closed"), 2, True), (RuntimeError("gloo"), 1, False),
    (dist.DistError("x"), 2, True), (dist.DistError("x"), 1, False),
    (RuntimeError("other"), 2, False), (settings.UserError("gloo"), 2, False)])
def test_who_leaves_because_of_another(monkeypatch, ended, error, size, ends):
    closed = []
    monkeypatch.setattr(watch.Watch, "close", lambda self: closed.append(self.broken))
    with pytest.raises(type(error)), watch.guard(None, 1, size, 0, False) as (_, signs):
        signs.farewell = None
        raise error
    go_on = "; the last checkpoint stands, the same command goes on from there"
    assert closed == [f"rank 1: {error}" + go_on * isinstance(error, RuntimeError)]
    assert ended == ([1, (f"rank 1: another rank has gone or hangs ({error}){go_on}",)]
                     if ends else [])
    assert signs.farewell() is None
    long = RuntimeError("x" * 161)
    with pytest.raises(RuntimeError), watch.guard(None, 1, 1, 0, False):
        raise long
    assert closed[-1] == f"rank 1: {'x' * 160}{go_on}"


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
