"""Shared by the tests: everything runs offline, on the CPU, in temporary folders."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", ""))

import forks
import torch

from plainllama.files import file_entry
from plainllama.tokens import advice, shards, tokenizer

ROOT = Path(__file__).parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS",
             "PLAINLLAMA_API_KEY"):  # of the shell, or of a job that runs the tests
    os.environ.pop(name, None)
advice.SECONDS = 0.01  # every prepare.py would measure so long
torch.set_num_threads(1)  # tiny matrices lose time on more, most of all beside another test


def write_data_set(folder: Path, texts: dict[str, list[str]], files_per_split: int = 2) -> None:
    """A complete byte-level data set without prepare.py."""
    folder.mkdir(parents=True)
    words = tokenizer.make_tokenizer("bytes")
    words.save(folder)
    files, splits = {}, {}
    for split, documents in texts.items():
        for i in range(files_per_split):
            writer = shards.ShardWriter(folder, f"{split}-{i:05d}", shards.token_dtype(258))
            for ids in words.encode_documents(documents[i::files_per_split]):
                writer.add(ids)
            files |= writer.close()
        tokens = sum(e.get("tokens", 0) for n, e in files.items() if n.startswith(split))
        splits[split] = {"documents": len(documents), "tokens": tokens, "tail": 0,
                         "bytes": sum(len(d.encode()) for d in documents)}
    files["tokenizer.json"] = file_entry(folder / "tokenizer.json")
    shards.write_manifest(folder, {
        "recipe": {}, "source": [], "splits": splits, "files": files,
        "tokenizer": {"spec": "bytes", "sha256": words.sha256, "vocab_size": 258,
                      "bos": words.bos_id, "eos": words.eos_id}})


def documents(n: int = 60) -> list[str]:
    """Texts with structure that a tiny model can begin to learn."""
    return [f"def add_{i}(a, b):\n    return a + b + {i * 7 % 13}\n\n" * (2 + i % 5)
            for i in range(n)]


# planted before train.py: offload, which needs a GPU, on a CPU; its numbers are the same
OFFLOAD = """
from plainllama import parallel
real = parallel.start
def start(device, mode, offload):
    world = real(device, mode)
    world.offload = offload
    return world
parallel.start = start
"""


@pytest.fixture(scope="session")
def data_home(tmp_path_factory) -> Path:
    """A folder with data/toy (258 byte-level entries) and a tiny config."""
    home = tmp_path_factory.mktemp("home")
    write_data_set(home / "data" / "toy", {"train": documents(60), "val": documents(9)[5:]})
    (home / "toy.py").write_text(TOY)
    return home


TOY = """
dataset = 'toy'
n_layer = 2
n_head = 4
n_kv_head = 2
d_model = 32
d_ff = 64
block_size = 32
global_batch_tokens = 8 * 32
micro_batch = 4
max_steps = 40
learning_rate = 1e-2
min_lr = 1e-3
warmup_steps = 5
log_interval = 1
eval_interval = 20
eval_tokens = 320
save_interval = 10
keep_last = 10
"""

# a base of a moment, and what goes on from it
TUNED = """
dataset = 'toy'
n_layer = 2
n_head = 4
n_kv_head = 2
d_model = 32
d_ff = 48
block_size = 32
max_steps = 8
global_batch_tokens = 256
micro_batch = 4
learning_rate = 1e-2
min_lr = 1e-3
warmup_steps = 2
device = 'cpu'
log_interval = 1
eval_interval = 8
save_interval = 4
sample_tokens = 0
"""


@pytest.fixture
def home(data_home, tmp_path, monkeypatch) -> Path:
    """An own working folder whose data/ is the shared one."""
    (tmp_path / "data").symlink_to(data_home / "data")
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def little_to_collect():
    """What is there is left out of collections: a run makes three, and among all that transformers
    defines each takes longer than the run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """torch with one thread for the tests of a module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_script(*words: str, cwd: Path, processes: int = 0, code: str = "", timeout: int = 600,
               env: dict | None = None, fresh: bool = False,
               **streams) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would; `processes` > 0 goes through torchrun; `code`
    is run in each process before the script (to plant a fault). The processes are forks of one
    that has imported torch, unless they shall be `fresh`. `streams`: stdout, stderr."""
    launcher = ["--standalone", "--nproc_per_node", str(processes)] if processes else []
    script = [str(ROOT / words[0]), *words[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if not fresh and sys.platform == "linux":
        command = [forks.TORCHRUN, *launcher, *script] if processes else script
        process = start_fork(command, cwd=cwd, env=env, code=code, **streams)
        out, error = process.communicate(timeout)
        return subprocess.CompletedProcess(command, process.returncode, out, error)
    if code:
        stub = cwd / "stub.py"
        stub.write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
                        "sys.argv = sys.argv[1:]\n"
                        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
        script.insert(0, str(stub))
    command = [sys.executable, *(["-m", forks.TORCHRUN] if processes else []), *launcher, *script]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(command, cwd=cwd, text=True, timeout=timeout, env=env, **streams)


@pytest.fixture
def checked_here(monkeypatch):
    """export.py's check with transformers runs in this process, which may have it already."""
    import export

    def run(words: list, cwd: str, env: dict, **_) -> subprocess.CompletedProcess:
        assert words[1] == "-c"
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["-c", *map(str, words[3:])])
            try:
                exec(words[2], {"__name__": "check"})
            except Exception as error:
                return subprocess.CompletedProcess(words, 1, "", repr(error))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(export, "subprocess", SimpleNamespace(run=run))


SERVERS: list[forks.Server] = []  # none or one


def start_fork(argv: list, **how) -> forks.Forked:
    """A forks.Forked, and the server that it needs."""
    if not SERVERS:
        SERVERS.append(forks.Server())
    return forks.Forked(argv, **how)


def end_all_below(folder: Path) -> None:
    """Kill what works in a folder: what a failed test has started, and what that has started."""
    for place in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            words = (place / "cmdline").read_bytes()
            helper = b"resource_tracker" in words or b"compile_worker" in words  # of this process
            there = Path(os.readlink(place / "cwd").removesuffix(" (deleted)"))
            if there.is_relative_to(folder) and int(place.name) != os.getpid() and not helper:
                os.kill(int(place.name), signal.SIGKILL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.excinfo and not call.excinfo.errisinstance(pytest.skip.Exception):
        end_all_below(item.config._tmp_path_factory.getbasetemp())
    return (yield)


def pytest_sessionfinish(session) -> None:
    """Also after Ctrl-C; under xdist in each worker, and in the end in the process above them."""
    while SERVERS:
        SERVERS.pop().close()
    end_all_below(session.config._tmp_path_factory.getbasetemp())


def metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
