"""A process that has imported torch and the package once, and forks for each command that a test
starts: the same argv, folder, environment, exit code, stdout and stderr, without the seconds that
an import takes. torchrun's ranks are such forks too.

    server = Server()
    process = Forked([ROOT / "train.py", "toy.py"], cwd=folder, env=dict(os.environ))
    out, error = process.communicate(timeout=600)
    server.close()

Not for a test of what happens before or while torch is imported (--help, Ctrl-C at any moment), of
closed streams, or of another OMP_NUM_THREADS: these start Python.
"""

import atexit
import contextlib
import io
import json
import multiprocessing.process
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = "PLAINLLAMA_TEST_FORKS"  # the environment's name for the server's socket
TORCHRUN = "torch.distributed.run"  # as argv[0]


class Forked:
    """As much of subprocess.Popen as tests need. `code` is run before the script, and `argv[0]` is
    a path or TORCHRUN. The process leads a session of its own."""

    def __init__(self, argv: list, cwd: Path | str, env: dict, code: str = "",
                 input: bytes | None = None, stdout: int | None = subprocess.PIPE,
                 stderr: int | None = subprocess.PIPE):
        self.args, self.returncode = argv, None
        ends = [self.source(input), *(self.sink(given, i + 1) for i, given in
                                      enumerate((stdout, stderr)))]
        self.readers, self.found = [], {}
        with socket.socket(socket.AF_UNIX) as call:
            call.connect(os.environ[PLACE])
            request = json.dumps({"argv": [str(word) for word in argv], "cwd": str(cwd),
                                  "env": {name: os.fspath(value) for name, value in
                                          {**env, PLACE: os.environ[PLACE]}.items()},
                                  "code": code}).encode()
            socket.send_fds(call, [len(request).to_bytes(8, "little")],
                            [theirs for theirs, _ in ends])
            call.sendall(request)
            self.line = call.makefile("r")
        for i, (theirs, ours) in enumerate(ends):
            os.close(theirs)
            if ours is not None:
                self.readers.append(threading.Thread(target=self.read, args=(i, ours)))
                self.readers[-1].start()
        self.pid = int(self.line.readline())
        self.waiter = threading.Thread(target=self.reap, daemon=True)
        self.waiter.start()

    def source(self, content: bytes | None) -> tuple[int, None]:
        with tempfile.TemporaryFile() as file:
            file.write(content or b"")
            file.seek(0)
            return os.dup(file.fileno()), None

    def sink(self, given: int | None, own: int) -> tuple[int, int | None]:
        """(the process's end, ours or None)."""
        if given == subprocess.PIPE:
            return os.pipe()[::-1]
        if given == subprocess.DEVNULL:
            return os.open(os.devnull, os.O_RDWR), None
        return os.dup(own if given is None else given), None

    def read(self, i: int, end: int) -> None:
        with open(end, "rb") as file:
            self.found[i] = file.read()

    def reap(self) -> None:
        status = self.line.readline()  # empty if the server has gone
        self.returncode = os.waitstatus_to_exitcode(int(status)) if status else -signal.SIGKILL
        self.line.close()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.waiter.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for reader in self.readers:
            reader.join(timeout)
        return tuple(self.found.get(i, b"").decode() for i in (1, 2))  # type: ignore

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """Starts the process and ends it."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()  # a socket's path must be short
        self.place = f"{self.folder.name}/socket"
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.place], cwd=ROOT, start_new_session=True,
            env={**os.environ, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == b"ready\n"  # type: ignore[union-attr]
        os.environ[PLACE] = self.place

    def close(self) -> None:
        os.environ.pop(PLACE, None)
        self.process.communicate()  # its stdin ends: it leaves
        self.folder.cleanup()


# ---- in the server

def serve(place: str) -> dict:
    """Fork for each request, until stdin ends; gives, in a fork, what to run."""
    import gc
    import select

    import_all()
    assert len(os.listdir("/proc/self/task")) == 1 if os.path.isdir("/proc/self/task") else True
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(99)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the nannies
    print("ready", flush=True)
    gc.collect()
    gc.freeze()  # the pages stay shared
    while True:
        if sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
            raise SystemExit(0)
        call, _ = listener.accept()
        if os.fork():
            call.close()
            continue
        listener.close()
        head, streams, *_ = socket.recv_fds(call, 8, 3)
        with call.makefile("rb") as file:
            request = json.loads(file.read(int.from_bytes(head, "little")))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if not child:
            call.close()
            return dress(request, streams)
        for stream in (*streams, 0, 1):
            os.close(stream)  # else nobody would see their ends
        with contextlib.suppress(OSError):  # the test has gone
            call.sendall(b"%d\n" % child)
            call.sendall(b"%d\n" % os.waitpid(child, 0)[1])
        os._exit(0)


def import_all() -> None:
    """What commands import, and what they import later."""
    import importlib

    sys.path[:0] = [str(ROOT)]
    for path in sorted((ROOT / "plainllama").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith(("modeling_plainllama", "lm_eval_tasks")):  # their libraries are slow
            importlib.import_module(name)
    for name in ("torch.distributed.run", "torch.distributed.fsdp", "torch.utils.tensorboard",
                 "torch.distributed.elastic.multiprocessing.subprocess_handler"):
        importlib.import_module(name)
    del sys.modules[TORCHRUN]  # to be run, not imported
    sys.modules["plainllama.tokens.advice"].SECONDS = 0.01  # every prepare.py would measure so long


def dress(request: dict, streams: list[int]) -> dict:
    """Make this fork look like a new process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    raw = bool(request["env"].get("PYTHONUNBUFFERED"))
    sys.stdin = os.fdopen(0, closefd=False)  # the server's think of its own files
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), write_through=raw)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    multiprocessing.process.ORIGINAL_DIR = request["cwd"]
    tempfile.tempdir = None  # asked again, of the new environment
    os.environ.clear()
    os.environ.update(request["env"])
    return request


def fork_ranks(code: str) -> None:
    """torchrun in this process starts its ranks by the server."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
        SubprocessHandler,
    )

    def popen(self, args: tuple, env: dict) -> Forked:
        words = [word for word in args[1:] if word != "-u"]  # args[0] is Python
        return Forked(words, os.getcwd(), env, code, None, self._stdout, self._stderr)

    SubprocessHandler._popen = popen  # type: ignore[assignment]


def fork_scripts() -> None:
    """This process starts Python's scripts by the server."""
    class Popen(subprocess.Popen):
        def __new__(cls, words, *others, **how):
            if words[0] != sys.executable or not str(words[1]).endswith(".py"):
                return super().__new__(cls)
            streams = {name: how[name] for name in ("stdout", "stderr") if name in how}
            own = {name: end if isinstance(end, int) else end.fileno()
                   for name, end in streams.items()}
            if own.get("stderr") == subprocess.STDOUT:
                own["stderr"] = own["stdout"]
            env = how.get("env") or dict(os.environ)
            return Forked(words[1:], how.get("cwd") or os.getcwd(), env, **own)

    subprocess.Popen = Popen  # type: ignore[misc]


def run(argv: list[str], code: str) -> None:
    """Run a script as Python does and leave as Python does, but for taking its modules apart, which
    would copy every page that is shared."""
    try:
        if argv[0] == TORCHRUN:
            fork_ranks(code)
            runpy.run_module(TORCHRUN, run_name="__main__", alter_sys=True)
        else:
            exec(code, {"__name__": "fault"})
            sys.path[0] = str(Path(argv[0]).parent)
            runpy.run_path(argv[0], run_name="__main__")
        status: object = 0
    except SystemExit as left:
        status = left.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored: {error!r}", file=sys.stderr)
        status = 120
    sys.stderr.flush()
    os._exit(status)  # type: ignore[arg-type]


if __name__ == "__main__":
    REQUEST = serve(sys.argv[1])
    sys.argv = REQUEST["argv"]
    run(sys.argv, REQUEST["code"])
