"""The nodes of a Ray cluster: how they are reached and checked, and jobs that outlive them.

A job writes its own files into a folder that all nodes share, or gives a small result back. It may
run twice, when the node that had it is believed dead: then it makes the same bytes again.
"""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plainllama.command import complain
from plainllama.files import CHECKOUT
from plainllama.settings import Incomplete, UserError, install

HERE = "here"  # the address of a bare --ray: the cluster of $RAY_ADDRESS, or one of this machine
TRIES = 3  # of a job that fails by itself
DEATHS = 20  # of the processes and nodes that had a job
ALIKE = ("torch", "numpy", "tokenizers", "tiktoken")  # packages that decide bytes
QUIET = 120  # seconds without a sign of a job, after which its node is named
GONE = 15  # seconds without the cluster's head, after which it is given up
# a process that speaks for us when our node of the cluster dies, with which Ray ends us at once
GUARD = ("import sys; sys.stdin.buffer.read() or sys.stderr.write('error: Ray has gone from this "
         "machine, or this command was killed; the same command goes on from what is complete\\n')")
PROBE = ".plainllama-probe-"  # files by which nodes prove that they share a folder


class Cluster:
    """A cluster that has been reached, whose nodes are like this machine and share its folder.

    Use it as a context. `address`: HERE, host:port, or ray://host:port.
    """

    def __init__(self, address: str):
        if not importlib.util.find_spec("ray"):
            raise UserError(f"--ray needs the package ray: {install('ray')}")
        self.address, self.gpus = address, False
        self.seats: list = []  # processes that wait for jobs

    def __enter__(self) -> "Cluster":
        """Connect. UserError where there is no such cluster."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for a report home
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # 30 are few where all is busy
        place = "" if self.address == HERE else self.address
        if place in ("", "auto"):
            place = os.environ.get("RAY_ADDRESS", place)
        else:
            answers(place)
        if place and "RAY_AUTH_MODE" not in os.environ and tokens() and asks_for_token(place):
            os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is loaded
        import ray

        modules = [str(CHECKOUT / "plainllama"), str(CHECKOUT / "model.py")]
        settings: dict = {"runtime_env": {"py_modules": modules, "env_vars": {
            "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}}}
        settings |= {"address": place} if place else {"address": "local",
                                                      "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
        except Exception as error:  # whatever it raises, bare ones too
            said = " ".join(str(error).split())  # of another version, by lines
            raise UserError(f"--ray={self.address}: {type(error).__name__}: {said[:300]}") from None
        self.ray: Any = ray
        self.head = ray.get_runtime_context().gcs_address
        self.guard = subprocess.Popen([sys.executable, "-I", "-c", GUARD],
                                      stdin=subprocess.PIPE, start_new_session=True)
        threading.Thread(target=watch_head, args=[self.head, self.guard], daemon=True).start()
        print(f"Ray at {self.head}: {self}", flush=True)
        return self

    def __exit__(self, *_: Any) -> None:
        """Disconnect; a cluster that was started here ends."""
        self.guard.communicate(b"done")
        with contextlib.suppress(Exception):
            self.ray.shutdown()

    def __str__(self) -> str:
        names = Counter(node["NodeManagerHostname"] for node in self.nodes())
        listed = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in names.most_common(8))
        count = names.total()
        return f"{count} node{'s' * (count > 1)} ({listed}), {self.places(1 << 30)} places"

    def nodes(self) -> list[dict]:
        """List the nodes that live."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    def places(self, jobs: int) -> int:
        """Count how many of some jobs run side by side: one on a core, or on a GPU."""
        kind = "GPU" if self.gpus else "CPU"
        there = sum(int(node["Resources"].get(kind, 0)) for node in self.nodes())
        return max(1, min(there, jobs))

    def choose_device(self, f: Any) -> None:
        """Settle device and dtype of flags for all nodes: their GPUs, where there are any.
        UserError if GPUs are asked for and there are none."""
        there = any(node["Resources"].get("GPU") for node in self.nodes())
        if f.device == "cuda" and not there:
            raise UserError("--device=cuda: no node of the cluster has a GPU")
        if f.device == "auto":
            f.device = "cuda" if there else "cpu"
        self.gpus = f.device == "cuda"
        if f.dtype == "auto":
            f.dtype = "bf16" if self.gpus else "fp32"

    def check(self, folder: Path, files: list[str], look: Callable = os.path.getsize) -> None:
        """Let each node prove that it is like this machine, writes where we read, in `folder`, and
        sees the `files` that are read: look(file) says the same there. UserError that names the
        node and what it lacks."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = folder / f"{PROBE}{os.getpid()}"
        probe.write_text("here")
        wanted = {path: look(path) for path in files}
        tests, made = {}, [probe]
        for node in self.nodes():
            only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            run = self.ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=only_there)(prove)
            made.append(Path(f"{probe}-{node['NodeID'][:12]}"))
            tests[run.remote(os.getcwd(), str(probe.absolute()), made[-1].name, wanted,
                             here(), look)] = node["NodeManagerHostname"], made[-1]
        try:
            done, late = self.ray.wait([*tests], num_returns=len(tests), timeout=120)
            for test in done:
                name, answer = tests[test]
                try:
                    problem = self.ray.get(test)
                except Exception as error:
                    problem = reason(error)
                if not problem and not appears(answer):
                    problem = f"what it writes to {folder} does not come here"
                if problem:
                    raise UserError(f"--ray: node {name}: {problem}")
            if late:
                raise UserError(f"--ray: node {tests[late[0]][0]} does not answer")
        finally:
            for path in made:
                path.unlink(missing_ok=True)

    # ---- jobs

    def each(self, make: Callable, jobs: dict[int, Any], load: Callable[[], Any],
             heard: Callable[[dict], None]) -> Iterator[tuple[int, Any]]:
        """Run make(tools, number, job, report) for each job, in a process for each place, and give
        (number, result) as they end; `load` gives a process its tools, once. What jobs report()
        goes to heard({number: what came last}), every second.

        A job whose process or node dies runs again. One that fails by itself TRIES times, or whose
        process dies DEATHS times, is left out; when all others are done, Incomplete names it.
        A UserError ends all.
        """
        ray = self.ray
        board = ray.remote(num_cpus=0, max_restarts=-1,
                           scheduling_strategy=self.beside_us())(Board).remote()
        reports: dict = {}
        amount: dict = {"num_gpus": 1} if self.gpus else {"num_cpus": 1}
        new_seat = ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **amount)(Seat).remote
        common = ray.put((make, load, os.getcwd(), board))
        waiting, lost = deque(jobs), {}
        trouble: Counter = Counter()
        # what is awaited: seat, job (None: it loads)
        busy: dict[Any, tuple[Any, int | None]] = {
            seat.ready.remote(common): (seat, None) for seat in self.seats}
        free = self.seats = []
        seen: dict[int, tuple[Any, float]] = {}
        at_work = time.monotonic()  # when a job ran last
        while waiting or any(number is not None for _, number in busy.values()):
            while waiting and free:
                seat, job = free.pop(), waiting.popleft()
                busy[seat.do.remote(job, ray.put(jobs[job]))] = seat, job
            for _ in range(min(len(waiting), self.places(len(jobs)) - len(busy))):
                seat = new_seat()
                busy[seat.ready.remote(common)] = seat, None
            for done in ray.wait([*busy], timeout=1)[0]:
                seat, number = busy.pop(done)
                try:
                    result = ray.get(done)
                    free.append(seat)
                    if number is not None:
                        yield number, result
                    trouble[None] = 0  # processes live
                    continue
                except ray.exceptions.RayTaskError as error:  # its own; the seat lives
                    if isinstance(error.cause, UserError):
                        raise UserError(str(error.cause)) from None
                    what, weight = reason(error), DEATHS // TRIES + 1
                    free.extend([] if number is None else [seat])
                except ray.exceptions.RayError as error:
                    what, weight = reason(error), 1
                trouble[number] += weight
                if trouble[number] < DEATHS:
                    print(f"{'a process' if number is None else f'job {number}'} starts again: "
                          f"{what}", flush=True)
                    waiting.extend([] if number is None else [number])
                elif number is None:
                    raise Incomplete(f"no process of the cluster lives: {what}")
                else:
                    lost[number] = what
            if any(number is not None for _, number in busy.values()):
                at_work = time.monotonic()
            elif time.monotonic() - at_work > QUIET:
                print(f"no process has begun for {QUIET} s: others hold the places of the cluster",
                      flush=True)
                at_work = time.monotonic()
            with contextlib.suppress(ray.exceptions.RayError):
                reports = ray.get(board.read.remote(), timeout=10)
            name_quiet(reports, [number for _, number in busy.values()], seen)
            heard({number: report for number, (_, report) in reports.items()})
        if lost:
            listed = "; ".join(f"{number}: {what}" for number, what in [*lost.items()][:3])
            raise Incomplete(f"{len(lost)} of {len(jobs)} jobs failed again and again ({listed})"
                               "; the others are done, and the same command goes on from these")

    def beside_us(self) -> Any:
        """Say that something must stay on this machine's node, as long as we live."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own = self.ray.get_runtime_context().get_node_id()
        return NodeAffinitySchedulingStrategy(own, soft=True)


def name_quiet(reports: dict, running: Any, seen: dict[int, tuple[Any, float]]) -> None:
    """Say which running jobs have given no sign for long, once each time; `seen`: {number: (its
    last report, when it was new)}."""
    now = time.monotonic()
    for number in running:
        report = reports.get(number)
        last, since = seen.get(number, (None, now))
        if report and report != last:
            seen[number] = report, now
        elif report and now - since > QUIET:
            print(f"job {number} on {report[0]}: no sign for {now - since:.0f} s", flush=True)
            seen[number] = report, now


def reason(error: BaseException) -> str:
    """Give the line of an error that says most."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    kind = "" if isinstance(cause, UserError | Incomplete) else f"{type(cause).__name__}: "
    return f"{kind}{lines[0] if lines else ''}"[:300]


def tokens() -> bool:
    """Whether this user has a token by which clusters know him, as the first bare --ray makes one:
    https://docs.ray.io/en/latest/ray-security/token-auth.html"""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray/auth_token").is_file()


def asks_for_token(address: str) -> bool:
    """Whether a cluster refuses who shows no token; one that does not would lose its processes."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    with contextlib.suppress(subprocess.TimeoutExpired):
        seconds = 20 if address == "auto" else 60  # Ray looks long for one that is not there
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
        return "InvalidAuthToken" in done.stderr + done.stdout
    return False


def answers(address: str) -> None:
    """Raise UserError at once if nothing listens at an address, for which Ray would wait long."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdigit():
        raise UserError(f"--ray={address} is not host:port, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"--ray={address}: {error.strerror or error}; start the cluster first: "
                        "ray start --head, and on other nodes ray start --address=…") from None


def watch_head(address: str, guard: subprocess.Popen) -> None:
    """End this process with a line when the head of its cluster has gone: Ray would wait, and then
    leave with pages of its own."""
    host, _, port = address.rpartition(":")
    last = time.monotonic()
    while time.monotonic() - last < GONE:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            last = time.monotonic()
        time.sleep(1)
    guard.communicate(b"done")
    os._exit(complain(f"the head of the Ray cluster at {address} has gone; when it is back, the "
                      "same command goes on from what is complete", 1))


def appears(path: Path) -> bool:
    """Wait a little for a file that another node has written."""
    for _ in range(20):
        if path.exists():
            return True
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # NFS looks again
        time.sleep(0.25)
    return False


def here() -> dict[str, str]:
    """Give what decides bytes on this machine."""
    found = {name: importlib.metadata.version(name) for name in ALIKE}
    return found | {"python": ".".join(platform.python_version_tuple()[:2])}


# ---- on a node

def prove(cwd: str, probe: str, answer: str, wanted: dict, there: dict, look: Callable) -> str:
    """Say what this node lacks, '' if nothing; write the file `answer` beside the `probe`."""
    for name, version in here().items():
        if version != there[name]:
            return f"it has {name} {version}, and the others {there[name]}"
    try:
        os.chdir(cwd)
        if Path(probe).read_text() != "here":
            return f"another file lies at {probe}"
        for path, what in wanted.items():
            if look(path) != what:
                return f"{path} is another file there"
        Path(probe).with_name(answer).write_text("there")
    except OSError as error:
        return f"{error.strerror}: {error.filename}; the folder must be shared by all nodes"
    return ""


class Board:
    """Holds what jobs last reported: {number: (host, report)}."""

    def __init__(self):
        self.reports: dict = {}

    def write(self, number: int, report: Any) -> None:
        """Take a report."""
        self.reports[number] = report

    def read(self) -> dict:
        """Give all reports."""
        return self.reports


class Seat:
    """A process of a node that does jobs, one after another."""

    def __init__(self):
        self.said = 0.0
        self.make: Any
        self.tools: Any
        self.board: Any

    def ready(self, common: tuple) -> None:
        """Get ready for jobs of one kind: load their tools."""
        self.make, load, cwd, self.board = common
        os.chdir(cwd)
        self.tools = load()

    def do(self, number: int, job: Any) -> Any:
        """Do a job; what it reports goes to the board, at most once a second."""
        def report(what: Any) -> None:
            if time.monotonic() - self.said > 1:
                self.said = time.monotonic()
                self.board.write.remote(number, (platform.node(), what))

        return self.make(self.tools, number, job, report)
