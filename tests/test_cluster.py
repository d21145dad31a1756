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

import pytest
from conftest import ROOT
from test_sample import tiny, write_checkpoint

import eval
import sample
from plainllama import cluster
from plainllama.command import parse
from plainllama.settings import UserError

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
