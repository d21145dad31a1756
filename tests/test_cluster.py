"""Work on the nodes of a Ray cluster: the same bytes as on one machine, whatever dies."""

import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_sample import tiny, write_checkpoint

import eval
import sample
from plainllama import cluster
from plainllama.command import parse
from plainllama.settings import Incomplete, UserError

COMMON = ("--tokenizer=bytes", "--block_size=64", "--val_fraction=0.05")


def start(folder: Path, *words: str) -> subprocess.Popen:
    """Start a command that writes into a file: of dying nodes Ray says more than a pipe holds."""
    with open(folder / "said", "w") as said:
        return subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder,
                                stdout=said, stderr=subprocess.STDOUT)


def ended(folder: Path, process: subprocess.Popen) -> str:
    """Wait for a command, and for its guard; what it said."""
    process.wait(timeout=500)
    time.sleep(1)
    return (folder / "said").read_text()


def prepare(folder, *words, wait=True):
    process = start(folder, "prepare.py", *COMMON, *words)
    if not wait:
        return process
    said = ended(folder, process)
    return process.returncode, said


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name != "sources.json"}


def write_text(path: Path, rows: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(3000)]
    lines = [" ".join(draw.choices(words, k=draw.randint(20, 120))) for _ in range(rows)]
    lines += [f"{line} end" for line in lines[::10]]  # near duplicates
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


# ---- what goes wrong, and the line that says so

LINES = {
    "Ray is not installed": r"--ray needs the package ray: .*\[ray\]",
    "an address that is none": "is not host:port, such as 10.0.0.1:6379",
    "nothing listens there": "start the cluster first: ray start --head",
    "another version of Ray": "Version mismatch: The cluster was started with: Ray: 2.1.0",
    "another Python": "it has python 3.*, and the others 2.7",
    "another version of a package": "it has numpy .*, and the others 0.1",
    "a folder that is not shared": "the folder must be shared by all nodes",
    "a folder of the same name": "another file lies at",
    "a source of another size": "text is another file there",
    "standard input on another machine": "No such file.*must be shared by all nodes",
    "--ray with --workers": "leave one out",
    "sample.py without --prompts": "--ray shares the rows of --prompts",
    "eval.py without --generate": "note: --ray has no effect here",
    "a folder that another run holds": "another prepare.py is at work in it",
    "no place is free": "no process has begun for 3 s: others hold the places of the cluster",
    "a job that fails by itself": r"1 of 3 jobs failed .*\(1: ValueError: by itself\); the others",
    "a disk without room": r"1 of 3 jobs .*No space left on device.*the same command goes on",
    "a process that dies always": r"1 of 3 jobs failed again and again \(1: .*Actor.*the others",
    "bad input met on a node": "error: a.jsonl: mend it$",
    "a process or node is killed": "job .* starts again: .*Actor",
    "Ctrl-C": "interrupted",
    "the head goes": "the head of the Ray cluster at .* has gone; .*the same command goes on",
    "Ray goes from this machine": "Ray has gone from this machine, .*the same command goes on",
}


def says(kind: str, text: object) -> None:
    """Hold that the last line of a text is the one of a kind."""
    line = str(text).strip().splitlines()[-1]
    assert re.search(LINES[kind], line), line


def refused(kind: str, call, *args, **options) -> None:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    says(kind, caught.value)


def test_what_the_driver_refuses(monkeypatch):
    for address in ("nonsense", "127.0.0.1", "127.0.0.1:port", ":6379x"):
        refused("an address that is none", cluster.answers, address)
    ray = pytest.importorskip("ray")

    def other(**_):
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n"
                           "    Python: 3.9.1\nThis process was started with:\n    Ray: 2.60.0\n")

    monkeypatch.setattr(ray, "init", other)
    monkeypatch.setattr(cluster, "asks_for_token", lambda place: False)
    refused("another version of Ray", cluster.Cluster("auto").__enter__)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    refused("Ray is not installed", cluster.Cluster, "here")


def test_what_the_commands_refuse(tmp_path, monkeypatch, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    words = ("--dataset=x", "--sources=a.jsonl")
    code, out = prepare(tmp_path, f"--ray=127.0.0.1:{port}", *words)
    says("nothing listens there", out)
    assert code == 2 and not (tmp_path / "data").exists()
    code, out = prepare(tmp_path, "--ray", "--workers=2", *words)
    says("--ray with --workers", out)
    (tmp_path / "data/x").mkdir(parents=True)
    handle = os.open(tmp_path / "data/x", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    code, out = prepare(tmp_path, f"--ray=127.0.0.1:{port}", *words)
    os.close(handle)
    says("a folder that another run holds", out)
    assert code == 2
    monkeypatch.chdir(tmp_path)
    refused("sample.py without --prompts", sample.main,
            parse(["--prompt=a", "--ray"], "", sample.Flags, "files"))
    write_checkpoint(tmp_path / "model", tiny())
    capsys.readouterr()
    assert eval.main(parse(["--ckpt=model", "--tasks=", "--text=a.jsonl", "--ray", "--device=cpu"],
                           "", eval.Flags, "files")) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    says("eval.py without --generate", "\n".join(notes))


def test_a_token_is_shown_where_there_is_one(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not cluster.tokens()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("x")
    assert cluster.tokens()
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert cluster.tokens()


def test_a_node_proves_what_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("probe").write_text("here")
    Path("text").write_text("1234")

    def ask(**changes):
        given = {"cwd": str(tmp_path), "probe": str(tmp_path / "probe"), "answer": "answer",
                 "wanted": {"text": 4}, "there": cluster.here(), "look": os.path.getsize} | changes
        return cluster.prove(**given)

    assert ask() == "" and Path("answer").read_text() == "there"
    says("another version of a package", ask(there=cluster.here() | {"numpy": "0.1"}))
    says("another Python", ask(there=cluster.here() | {"python": "2.7"}))
    says("a source of another size", ask(wanted={"text": 5}))
    says("standard input on another machine", ask(wanted={"gone.csv": 5}))
    says("a folder that is not shared", ask(cwd=str(tmp_path / "nowhere")))
    says("a folder that is not shared", ask(probe=str(tmp_path / "gone")))
    Path("probe").write_text("of another")
    says("a folder of the same name", ask())


def test_a_quiet_job_is_named(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])
    seen: dict = {}
    for second, reports in ((0, {3: ("n1", [1])}), (100, {3: ("n1", [2])}), (150, {3: ("n1", [2])}),
                            (230, {3: ("n1", [2])}), (240, {3: ("n1", [2])})):
        now[0] = second
        cluster.name_quiet(reports, [3, None], seen)
    assert capsys.readouterr().out == "job 3 on n1: no sign for 130 s\n"


# ---- a cluster that is played, whose jobs run here

class Dies(Exception):
    """Ends the process that meets it."""


class RayError(Exception):
    """What Ray raises of a process that has gone."""


class RayTaskError(RayError):
    """What Ray raises of a job that failed by itself."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    """A process that Ray holds: its methods are called when their result is asked for."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name: str):
        method = getattr(self.real, name)
        if name == "write":  # for whose result nobody asks
            return SimpleNamespace(remote=method)
        return SimpleNamespace(remote=lambda *given: lambda: method(*given))


class Played:
    """What each() and check() need of Ray. `waits`: of so many calls nothing has ended."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, *resources: dict, name: str = "n"):
        self.there = [{"NodeID": f"{i}" * 20, "NodeManagerHostname": f"{name}{i}", "Alive": True,
                       "Resources": one} for i, one in enumerate(resources)]
        self.made: list[tuple] = []  # (class, how) of each process
        self.waits, self.clock, self.tick = 0, 0.0, 2
        self.asked: list[tuple] = []  # how many were waited for, how many to end, for how long

    def nodes(self) -> list[dict]:
        return self.there

    def remote(self, **how):
        def make(what, *given):
            if not isinstance(what, type):
                return lambda: what(*given)
            self.made.append((what.__name__, how))
            return Actor(what())
        return lambda what: SimpleNamespace(remote=lambda *given: make(what, *given))

    def put(self, value):
        return value

    def get(self, ref, timeout: float = 0):
        try:
            return ref()
        except Dies as error:
            raise RayError(f"Actor died\n{error}") from None
        except Exception as error:
            raise RayTaskError(error) from None

    def wait(self, refs: list, num_returns: int = 1, timeout: float = 0) -> tuple[list, list]:
        self.clock += self.tick
        self.asked.append((len(refs), num_returns, timeout))
        if self.waits:
            self.waits -= 1
            return [], refs
        return refs[:num_returns], refs[num_returns:]

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "own", gcs_address="10.0.0.1:6379")


@pytest.fixture
def played(monkeypatch):
    """Make a Cluster of a played Ray, connected."""
    def make(*resources: dict, **how) -> cluster.Cluster:
        ray = Played(*resources, **how)
        place = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
        for name, module in (("ray", ray), ("ray.util", SimpleNamespace()),
                             ("ray.util.scheduling_strategies", place)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(cluster.time, "monotonic", lambda: ray.clock)
        monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
        there = cluster.Cluster("10.0.0.1:6379")
        there.ray = ray
        return there
    return make


def do(tools, number: int, job: str, report):
    """Do what a job says."""
    report([number, "a"])
    report([number, "b"])  # in the same second
    if job == "dies":
        raise Dies("at work")
    if job == "fails":
        raise ValueError("by itself\nand more")
    if job == "bad":
        raise UserError("a.jsonl: mend it")
    return f"{tools} {job}"


def all_done(there: cluster.Cluster, *jobs: str, load=lambda: "tools") -> tuple[dict, list]:
    heard: list = []
    return dict(there.each(do, dict(enumerate(jobs)), load, heard.append)), heard


def test_jobs_are_done_side_by_side_and_the_processes_stay(played, capsys):
    there = played({"CPU": 1.0}, {"CPU": 2.0}, {"GPU": 1.0})
    done, heard = all_done(there, *"abcde")
    assert done == {i: f"tools {job}" for i, job in enumerate("abcde")}
    assert there.ray.made == [
        ("Board", {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": ("own", True)}),
        *[("Seat", {"max_restarts": 0, "scheduling_strategy": "SPREAD", "num_cpus": 1})] * 3]
    assert heard[-1] == {i: [i, "a"] for i in range(5)}
    assert {asked[1:] for asked in there.ray.asked} == {(1, 1)}  # a second at most
    assert all_done(there, *"xy")[0] == {0: "tools x", 1: "tools y"}
    assert [name for name, _ in there.ray.made[4:]] == ["Board"]  # the same processes
    there = played({"CPU": 9.0})
    all_done(there, "a", "b")
    assert [name for name, _ in there.ray.made] == ["Board", "Seat", "Seat"]  # no more than jobs
    there = played({"GPU": 1.0})
    there.gpus = True
    all_done(there, "a")
    assert there.ray.made[1][1]["num_gpus"] == 1 and "num_cpus" not in there.ray.made[1][1]
    assert all_done(there)[0] == {} and capsys.readouterr().out == ""


@pytest.mark.parametrize(("job", "what", "again"), [
    ("fails", "ValueError: by itself", 2), ("dies", "RayError: Actor died", 19)])
def test_what_fails_again_and_again_is_left_out(played, capsys, job, what, again):
    there = played({"CPU": 2.0})
    with pytest.raises(Incomplete) as error:
        all_done(there, "a", job, "c")
    assert str(error.value) == (
        f"1 of 3 jobs failed again and again (1: {what}); the others are done, and the same "
        "command goes on from these")
    assert capsys.readouterr().out == f"job 1 starts again: {what}\n" * again
    with pytest.raises(Incomplete) as error:
        all_done(there, *[job] * 5)
    assert str(error.value).startswith("5 of 5 jobs failed again and again (")
    assert str(error.value).count(what) == 3  # the first three are named
    seats = [name for name, _ in there.ray.made].count("Seat")
    assert (seats == 2) == (job == "fails")  # one that fails by itself leaves its process


def test_a_mistake_of_the_user_ends_all(played):
    with pytest.raises(UserError, match=r"^a.jsonl: mend it$"):
        all_done(played({"CPU": 1.0}), "a", "bad", "c")


def test_processes_that_never_live_are_given_up(played, capsys):
    def load():
        raise Dies("while it loads")

    there = played({"CPU": 1.0})
    with pytest.raises(Incomplete, match=r"^no process of the cluster lives: RayError: Ac"):
        all_done(there, "a", load=load)
    assert capsys.readouterr().out == "a process starts again: RayError: Actor died\n" * 19
    left = [19]

    def sometimes():
        left[0] -= 1
        if left[0] >= 0:
            raise Dies("while it loads")
        return "tools"

    assert all_done(there, "a", load=sometimes)[0] == {0: "tools a"}
    starts = iter([*[True] * 19, False] * 2)  # it is counted anew after one that lived

    def again():
        if next(starts):
            raise Dies("while it loads")
        return "tools"

    died: list = []

    def once(tools, number: int, job: str, report):
        if not died:
            died.append(number)
            raise Dies("at work")
        return job

    there.seats = []
    assert [*there.each(once, {0: "a"}, again, lambda reports: None)] == [(0, "a")]
    assert next(starts, None) is None


def test_a_cluster_without_a_free_place_is_said(played, capsys):
    there = played({"CPU": 1.0})
    there.ray.tick, there.ray.waits = 50, 6  # before a process is ready
    all_done(there, "a")
    line = "no process has begun for 120 s: others hold the places of the cluster\n"
    assert capsys.readouterr().out == line * 2
    for tick, says in ((40, ""), (41, line)):  # three rounds
        there = played({"CPU": 1.0})
        there.ray.tick, there.ray.waits = tick, 1
        all_done(there, "a")
        assert capsys.readouterr().out == says


def test_what_a_cluster_has(played):
    there = played({"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {})
    assert str(there) == "3 nodes (n0, n1, n2), 6 places"
    for node in there.ray.there:
        node["NodeManagerHostname"] = "same"
    there.ray.there[2]["Alive"] = False
    assert str(there) == "2 nodes (same (2)), 6 places"
    assert [there.places(jobs) for jobs in (0, 1, 5, 6, 7)] == [1, 1, 5, 6, 6]
    for device, dtype, found in (("auto", "auto", ("cuda", "bf16", True, 1)),
                                 ("cpu", "auto", ("cpu", "fp32", False, 6)),
                                 ("cuda", "fp32", ("cuda", "fp32", True, 1))):
        flags = SimpleNamespace(device=device, dtype=dtype)
        there.choose_device(flags)
        assert (flags.device, flags.dtype, there.gpus, there.places(99)) == found
    there = played({"CPU": 1.0}, name="only")
    assert str(there) == "1 node (only0), 1 places"
    flags = SimpleNamespace(device="auto", dtype="auto")
    there.choose_device(flags)
    assert (flags.device, flags.dtype, there.gpus) == ("cpu", "fp32", False)
    with pytest.raises(UserError, match=r"^--device=cuda: no node of the cluster has a GPU$"):
        there.choose_device(SimpleNamespace(device="cuda", dtype="auto"))
    many = played(*[{"CPU": 0.5}] * 9)
    assert str(many) == f"9 nodes ({', '.join(f'n{i}' for i in range(8))}), 1 places"


def test_every_node_is_asked_for_its_proof(played, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("12")
    there = played({}, {})
    there.check(tmp_path, ["a.txt"])
    assert there.ray.asked == [(2, 2, 120)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]  # nothing is left behind
    monkeypatch.setattr(cluster, "appears", lambda path: False)
    with pytest.raises(UserError, match=f"^--ray: node n0: what it writes to {tmp_path} does not"):
        there.check(tmp_path, ["a.txt"])
    sizes = iter([2, 3])
    with pytest.raises(UserError, match=r"^--ray: node n0: a.txt is another file there$"):
        there.check(tmp_path, ["a.txt"], lambda path: next(sizes))

    def broken(path: str) -> int:
        if not sizes:
            raise ValueError("by itself")
        return sizes.pop()

    sizes = [2]
    with pytest.raises(UserError, match=r"^--ray: node n0: ValueError: by itself$"):
        there.check(tmp_path, ["a.txt"], broken)
    there.ray.waits = 1
    with pytest.raises(UserError, match=r"^--ray: node n0 does not answer$"):
        there.check(tmp_path, ["a.txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_how_a_cluster_is_reached(played, monkeypatch, capsys):
    there = played({"CPU": 1.0})
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_raylet_start_wait_time_s"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    given, ends, watched, started = [], [], [], []
    there.ray.init = lambda **how: given.append(how)
    there.ray.shutdown = lambda: ends.append("shut down")
    guard = SimpleNamespace(communicate=ends.append)
    monkeypatch.setattr(cluster.subprocess, "Popen", lambda words, **how: started.append(
        (words, how)) or guard)
    monkeypatch.setattr(cluster.threading, "Thread", lambda **how: SimpleNamespace(
        start=lambda: watched.append(how)))
    monkeypatch.setattr(cluster, "answers", lambda place: watched.append(place))
    monkeypatch.setattr(cluster, "tokens", lambda: True)
    monkeypatch.setattr(cluster, "asks_for_token", lambda place: place.startswith("10."))
    with there as same:
        assert same is there
    assert capsys.readouterr().out == "Ray at 10.0.0.1:6379: 1 node (n0), 1 places\n"
    assert ends == [b"done", "shut down"]
    assert started == [([sys.executable, "-I", "-c", cluster.GUARD],
                        {"stdin": subprocess.PIPE, "start_new_session": True})]  # not by Ctrl-C
    assert watched == ["10.0.0.1:6379", {"target": cluster.watch_head, "daemon": True,
                                         "args": ["10.0.0.1:6379", guard]}]
    assert given[0]["address"] == "10.0.0.1:6379" and "include_dashboard" not in given[0]
    assert given[0]["log_to_driver"] is False
    assert given[0]["runtime_env"]["env_vars"] == {"TOKENIZERS_PARALLELISM": "false",
                                                   "OMP_WAIT_POLICY": "PASSIVE"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_raylet_start_wait_time_s"] == "180"  # noqa: SIM112
    # a bare --ray: the cluster of the variable, else one of this machine
    for variable, address, mode in (("", "local", None), ("11.0.0.1:1", "11.0.0.1:1", None),
                                    ("10.0.0.2:1", "10.0.0.2:1", "token")):
        monkeypatch.setenv("RAY_ADDRESS", variable)
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        watched.clear()
        with cluster.Cluster("here"):
            pass
        assert given[-1]["address"] == address and len(watched) == 1  # nobody is asked first
        assert given[-1].get("include_dashboard") is (False if address == "local" else None)
        assert os.environ.get("RAY_AUTH_MODE") == mode
    monkeypatch.setenv("RAY_AUTH_MODE", "mine")
    there.__enter__()
    assert os.environ["RAY_AUTH_MODE"] == "mine"
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setattr(cluster, "tokens", lambda: False)
    there.__enter__()
    assert "RAY_AUTH_MODE" not in os.environ


def test_the_line_of_an_error_that_says_most():
    assert cluster.reason(ValueError("\n  one \n two")) == "ValueError: one"
    assert cluster.reason(ValueError("")) == "ValueError: "
    assert cluster.reason(RayTaskError(UserError("mend it"))) == "mend it"
    assert cluster.reason(RayTaskError(Incomplete("go on"))) == "go on"
    assert cluster.reason(RayTaskError(OSError("full"))) == "OSError: full"
    assert len(cluster.reason(UserError("x" * 301))) == 300


def test_tokens_are_asked_for_by_ray_itself(monkeypatch):
    for out, error, asks in (("ok", "", False), ("InvalidAuthToken", "", True),
                             ("", "x InvalidAuthToken y", True)):
        seen = []

        def run(words, out=out, error=error, seen=seen, **how):
            seen.append((words, how))
            return SimpleNamespace(stdout=out, stderr=error)

        monkeypatch.setattr(cluster.subprocess, "run", run)
        assert cluster.asks_for_token("a:1") is asks
        assert seen == [([sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address",
                          "a:1"], {"capture_output": True, "text": True, "timeout": 60})]

    def late(words, **_):
        raise subprocess.TimeoutExpired(words, 60)

    monkeypatch.setattr(cluster.subprocess, "run", late)
    assert cluster.asks_for_token("a:1") is False
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "x")
    assert cluster.tokens() is True


def test_addresses_at_which_something_listens():
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto"):
            assert cluster.answers(address) is None
    with pytest.raises(UserError) as error:
        cluster.answers(f"127.0.0.1:{port}")
    assert str(error.value) == (f"--ray=127.0.0.1:{port}: Connection refused; start the cluster "
                                "first: ray start --head, and on other nodes ray start --address=…")


def test_a_head_is_given_up_after_fifteen_seconds(monkeypatch, capsys):
    clock, asked, said = [0.0], [], []

    def connect(place, timeout):
        asked.append((place, timeout))
        if clock[0] >= 3:
            raise OSError("refused")
        return SimpleNamespace(close=lambda: None)

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(cluster.socket, "create_connection", connect)
    monkeypatch.setattr(cluster.os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        cluster.watch_head("[::1]:6379", SimpleNamespace(communicate=said.append))
    assert left.value.code == 1 and said == [b"done"] and clock[0] == 2 + 15
    assert asked == [(("::1", 6379), 2)] * 17
    assert capsys.readouterr().err == (
        "error: the head of the Ray cluster at [::1]:6379 has gone; when it is back, the same "
        "command goes on from what is complete\n")


def test_a_file_of_another_node_is_waited_for(tmp_path, monkeypatch):
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            (tmp_path / "f").write_text("")

    monkeypatch.setattr(cluster.time, "sleep", sleep)
    assert cluster.appears(tmp_path / "f") and waited == [0.25] * 3
    assert cluster.appears(tmp_path / "f") and len(waited) == 3
    assert not cluster.appears(tmp_path / "gone/f") and len(waited) == 23


# ---- a cluster of three nodes

@contextmanager
def nodes(count: int):
    """Start a cluster on this machine; it is one for Ray."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_raylet_start_wait_time_s": "180", "RAY_USAGE_STATS_ENABLED": "0",
                   "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 1,
                                                          "include_dashboard": False})
    try:
        for _ in range(count - 1):
            there.add_node(num_cpus=1)
        yield there
    finally:
        there.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("dedup", "store"), [("none", ""), ("near", ""), ("none", "file://")])
def test_three_nodes_write_the_bytes_of_one_machine(dedup, store, tmp_path):
    write_text(tmp_path / "a.jsonl", 6000)
    code, out = prepare(tmp_path, "--sources=a.jsonl", f"--dedup={dedup}", "--dataset=one",
                        "--workers=1")
    assert code == 0, out
    source = f"{store}{tmp_path}/a.jsonl" if store else "a.jsonl"
    with nodes(3) as there:
        code, out = prepare(tmp_path, f"--sources={source}", f"--dedup={dedup}", "--dataset=three",
                            f"--ray={there.address}")
    assert code == 0 and "3 nodes" in out and "3 places" in out, out
    one, three = contents(tmp_path / "data/one"), contents(tmp_path / "data/three")
    if store:  # which the manifest names
        assert one.keys() == three.keys()
        for name in ("manifest.json", "manifest.sha256"):
            del one[name], three[name]
    assert one == three


def worker_ids(address: str) -> list[int]:
    """Find the processes of a cluster that do a job."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::Seat.do" in (path / "cmdline").read_bytes():
                parent = re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1]
                node = Path(f"/proc/{parent}/cmdline").read_text()
                found += [int(path.name)] if f"--gcs-address={address}" in node else []
        except OSError:
            pass
    return found


@pytest.mark.slow
def test_killed_processes_and_nodes_cost_no_byte(tmp_path):
    write_text(tmp_path / "a.jsonl", 250_000)
    words = ("--sources=a.jsonl", "--dedup=near")
    code, out = prepare(tmp_path, *words, "--dataset=one", "--workers=2")
    assert code == 0, out
    draw, killed, gone = random.Random(1), 0, 0
    with nodes(3) as there:
        run = prepare(tmp_path, *words, "--dataset=three", f"--ray={there.address}", wait=False)
        while run.poll() is None and (killed < 20 or gone < 5):
            time.sleep(draw.uniform(0.1, 0.5))
            if killed < 20 and (seats := worker_ids(there.address)):
                os.kill(draw.choice(seats), signal.SIGKILL)
                killed += 1
            if gone < 5 and killed > 4 * gone:
                there.remove_node(draw.choice(sorted(there.worker_nodes, key=str)),
                                  allow_graceful=False)
                there.add_node(num_cpus=1)
                gone += 1
        out = ended(tmp_path, run)
    print(f"{killed} processes and {gone} nodes were killed\n{out}")
    says("a process or node is killed", [x for x in out.splitlines() if "starts again" in x][-1])
    assert run.returncode == 0 and killed >= 15 and gone >= 4 and "starts again" in out
    assert out.count("13 of 13 parts") == 2  # marks and tokens
    assert contents(tmp_path / "data/three") == contents(tmp_path / "data/one")


BEGUN = ("--sources=a.jsonl", "--dataset=x")


def begun(folder: Path, address: str) -> subprocess.Popen:
    """Start to prepare a set by a cluster; back when a part is done."""
    write_text(folder / "a.jsonl", 60_000)
    run = prepare(folder, *BEGUN, f"--ray={address}", wait=False)
    while run.poll() is None and not [*(folder / "data").glob("x/work.tmp/part-*.json")]:
        time.sleep(0.1)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["the head goes", "Ray goes from this machine"])
def test_a_head_that_goes_is_said_and_the_rest_is_kept(kind, tmp_path):
    with nodes(1) as there:
        run = begun(tmp_path, there.address)
        if kind == "the head goes":  # as for a driver on another machine, whose node lives
            there.head_node.kill_gcs_server(check_alive=False)
            run.wait(timeout=100)
    out = ended(tmp_path, run)
    says(kind, out)
    assert run.returncode == 1
    code, out = prepare(tmp_path, *BEGUN, "--workers=1")
    assert code == 0 and ", 0 of them done" not in out


JOBS = """
import os, signal, sys, threading
from plainllama import cluster
from plainllama.command import run_command
from plainllama.settings import UserError

def make(tools, number, job, report):
    if job == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "fails":
        raise ValueError("by itself")
    if job == "full":
        raise OSError(28, "No space left on device", "data/x")
    if job == "bad":
        raise UserError("a.jsonl: mend it")
    return job

class Holder:
    def ready(self):
        return 1

def main(address, *jobs):
    with cluster.Cluster(address) as there:
        if "held" in jobs:
            cluster.QUIET = 3
            holder = there.ray.remote(num_cpus=1)(Holder).remote()
            there.ray.get(holder.ready.remote())
            threading.Timer(12, there.ray.kill, [holder]).start()
        for number, result in there.each(make, dict(enumerate(jobs)), dict, lambda reports: None):
            print("done", number, result, flush=True)
    return 0

run_command(main, *sys.argv[1:])
"""


@pytest.mark.slow
def test_jobs_that_fail_are_named_and_the_others_are_done(tmp_path):
    (tmp_path / "jobs.py").write_text(JOBS)
    with nodes(1) as there:
        for kind, job, code in (("a job that fails by itself", "fails", 1),
                                ("a disk without room", "full", 1),
                                ("bad input met on a node", "bad", 2),
                                ("a process that dies always", "dies", 1),
                                ("no place is free", "held", 0)):
            run = subprocess.run(
                [sys.executable, "jobs.py", there.address, "a", job, "c"], cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500, check=False,
                env={**os.environ, "PYTHONPATH": str(ROOT)})
            print(kind, run.stdout)
            assert run.returncode == code
            done = [line for line in run.stdout.splitlines() if line.startswith("done")]
            if job == "held":
                says(kind, run.stdout.partition("\ndone")[0])
            else:
                says(kind, run.stdout)
            if job != "bad":
                assert {"done 0 a", "done 2 c"} <= {*done}
            assert run.stdout.count("starts again") == {"fails": 2, "full": 2, "bad": 0,
                                                          "dies": 19, "held": 0}[job]


@pytest.mark.slow
def test_what_is_interrupted_goes_on(tmp_path):
    with nodes(2) as there:
        run = begun(tmp_path, there.address)
        run.send_signal(signal.SIGINT)
        out = ended(tmp_path, run)
        says("Ctrl-C", out)
        assert run.returncode == 1
        code, out = prepare(tmp_path, *BEGUN, f"--ray={there.address}")
    assert code == 0 and ", 0 of them done" not in out


# ---- answers

def ran(script: str, folder: Path, *words: str) -> str:
    process = start(folder, script, *words)
    said = ended(folder, process)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_rows_of_prompts_come_each_once_whatever_dies(tmp_path):
    write_checkpoint(tmp_path / "model", tiny())
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices("abcd ", k=draw.randint(1, 20))), "row": i}
            for i in range(2000)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--ckpt=model", "--prompts=p.jsonl", "--temperature=0", "--max_new_tokens=24",
             "--device=cpu", "--dtype=fp32", "--batch=2")
    ran("sample.py", tmp_path, *words, "--out=one.jsonl")
    killed = 0
    with nodes(3) as there:
        run = start(tmp_path, "sample.py", *words, "--out=g.jsonl", f"--ray={there.address}")
        while run.poll() is None:
            time.sleep(draw.uniform(0.2, 2))
            if killed < 12 and (seats := worker_ids(there.address)):
                os.kill(draw.choice(seats), signal.SIGKILL)
                killed += 1
        out = ended(tmp_path, run)
    print(f"{killed} killed\n{out}")
    assert run.returncode == 0 and killed > 3 and "starts again" in out
    made = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert [row["row"] for row in made] == [*range(2000)]
    assert (tmp_path / "g.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_answers_that_are_scored_are_those_of_one_process(tmp_path):
    for name in ("one", "three"):
        run = tmp_path / f"out/{name}"
        step = write_checkpoint(run / "checkpoints/step_5", tiny())
        (run / "run.json").write_text(json.dumps({"config": {}}))
        (step / "training").mkdir()
        (step / "training/state.json").write_text(json.dumps(
            {"format": 1, "step": 5, "rows": 1, "tokens": 9}))
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices("abcd ", k=draw.randint(1, 20))),
             "reference": "".join(draw.choices("abcd ", k=20))} for _ in range(200)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--generate=f.jsonl", "--device=cpu", "--max_new_tokens=16", "--log_samples",
             "--batch_tokens=512")
    ran("eval.py", tmp_path, "--ckpt=out/one/checkpoints/step_5", *words)
    with nodes(3) as there:
        out = ran("eval.py", tmp_path, "--ckpt=out/three/checkpoints/step_5", *words,
                  f"--ray={there.address}")
    assert "3 nodes" in out
    found = {name: {path.name: path.read_text() for path in tmp_path.glob(f"out/{name}/eval/**/*")
                    if path.is_file()} for name in ("one", "three")}
    assert len(found["one"]) > 1 and found["one"].keys() == found["three"].keys()
    for name, text in found["one"].items():
        ours = text.replace("out/one", "out/three").splitlines()  # of a journal, as they came
        assert sorted(ours) == sorted(found["three"][name].splitlines()), name
