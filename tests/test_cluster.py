"""Work on the nodes of a Ray cluster: the same bytes as on one machine, whatever dies."""

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

from plainllama import cluster
from plainllama.settings import UserError

COMMON = ("--tokenizer=bytes", "--block_size=64", "--val_fraction=0.05")


def prepare(folder, *words, wait=True):
    process = subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), *COMMON, *words],
                               cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    if not wait:
        return process
    out, _ = process.communicate(timeout=500)
    return process.returncode, out


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name != "sources.json"}


def write_text(path: Path, rows: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(3000)]
    lines = [" ".join(draw.choices(words, k=draw.randint(20, 120))) for _ in range(rows)]
    lines += [f"{line} end" for line in lines[::10]]  # near duplicates
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


# ---- what is refused

def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ray.*\[ray\]"):
        cluster.Cluster("here")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:port", ":6379x"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(UserError, match="host:port"):
        cluster.answers(address)


def test_where_nothing_listens_the_answer_comes_at_once(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    code, out = prepare(tmp_path, f"--ray=127.0.0.1:{port}", "--dataset=x", "--sources=a.jsonl")
    assert code == 2 and "start the cluster first" in out.splitlines()[-1]
    assert not (tmp_path / "data").exists()
    code, out = prepare(tmp_path, "--ray", "--workers=2", "--dataset=x", "--sources=a.jsonl")
    assert code == 2 and "leave one out" in out


def test_a_node_proves_what_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("probe").write_text("here")
    Path("text").write_text("1234")

    def ask(**changes):
        given = {"cwd": str(tmp_path), "probe": str(tmp_path / "probe"), "answer": "answer",
                 "wanted": {"text": 4}, "there": cluster.here(), "look": os.path.getsize} | changes
        return cluster.prove(**given)

    assert ask() == "" and Path("answer").read_text() == "there"
    assert "numpy" in ask(there=cluster.here() | {"numpy": "0.1"})
    assert "python" in ask(there=cluster.here() | {"python": "2.7"})
    assert "text is another file" in ask(wanted={"text": 5})
    assert "must be shared" in ask(wanted={"gone": 5})
    assert "must be shared" in ask(cwd=str(tmp_path / "nowhere"))
    Path("probe").write_text("of another")
    assert "another file" in ask()


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
@pytest.mark.parametrize("dedup", ["none", "near"])
def test_three_nodes_write_the_bytes_of_one_machine(dedup, tmp_path):
    write_text(tmp_path / "a.jsonl", 6000)
    words = ("--sources=a.jsonl", f"--dedup={dedup}")
    code, out = prepare(tmp_path, *words, "--dataset=one", "--workers=1")
    assert code == 0, out
    with nodes(3) as there:
        code, out = prepare(tmp_path, *words, "--dataset=three", f"--ray={there.address}")
    assert code == 0 and "3 nodes" in out and "3 places" in out, out
    assert contents(tmp_path / "data/three") == contents(tmp_path / "data/one")


def worker_ids(address: str) -> list[int]:
    """Find the processes in which seats of a cluster work."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::Seat" in (path / "cmdline").read_bytes():
                parent = re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1]
                node = Path(f"/proc/{parent}/cmdline").read_text()
                found += [int(path.name)] if f"--gcs-address={address}" in node else []
        except OSError:
            pass
    return found


@pytest.mark.slow
def test_killed_processes_and_nodes_cost_no_byte(tmp_path):
    write_text(tmp_path / "a.jsonl", 100_000)
    words = ("--sources=a.jsonl", "--dedup=near")
    code, out = prepare(tmp_path, *words, "--dataset=one", "--workers=2")
    assert code == 0, out
    draw, killed, gone = random.Random(1), 0, 0
    with nodes(3) as there:
        run = prepare(tmp_path, *words, "--dataset=three", f"--ray={there.address}", wait=False)
        while run.poll() is None and (killed < 20 or gone < 5):
            time.sleep(draw.uniform(0.5, 2))
            if killed < 20 and (seats := worker_ids(there.address)):
                os.kill(draw.choice(seats), signal.SIGKILL)
                killed += 1
            if gone < 5 and killed > 4 * gone:
                there.remove_node(draw.choice(sorted(there.worker_nodes, key=str)),
                                  allow_graceful=False)
                there.add_node(num_cpus=1)
                gone += 1
        out, _ = run.communicate(timeout=500)
    print(f"{killed} processes and {gone} nodes were killed\n{out}")
    assert run.returncode == 0 and killed > 10 and gone > 2 and "starts again" in out
    assert contents(tmp_path / "data/three") == contents(tmp_path / "data/one")


@pytest.mark.slow
def test_a_head_that_goes_is_said_and_the_rest_is_kept(tmp_path):
    write_text(tmp_path / "a.jsonl", 60_000)
    words = ("--sources=a.jsonl", "--dataset=x")
    with nodes(1) as there:
        run = prepare(tmp_path, *words, f"--ray={there.address}", wait=False)
        while run.poll() is None and not [*(tmp_path / "data").glob("x/work.tmp/part-*.json")]:
            time.sleep(0.1)
    out, _ = run.communicate(timeout=100)
    assert run.returncode == 1 and "the same command goes on" in out.splitlines()[-1], out
    code, out = prepare(tmp_path, *words, "--workers=1")
    assert code == 0 and ", 0 of them done" not in out
