"""What ends a run from outside: signals, ranks that do not come, that die or fall silent.

The ranks of a run meet in join(), which tries the network once and briefly. From then on a Watch
exchanges signs of life, apart from training: a rank that is stopped, hangs or is cut off ends the
others within a minute, with its name. StopFlag turns signals into "finish the step and save".
"""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from plainllama.command import complain
from plainllama.settings import UserError

ARRIVE = 600  # seconds that the ranks have to come together: imports from a cold disk take minutes
FIRST_SUM = 180  # seconds for the first sum over all ranks: NCCL looks at every link first
PATIENT = timedelta(minutes=30)  # for a collective during which a rank may compile or write
BRISK = timedelta(seconds=100)  # for one of the steps after the first
BEAT, SILENCE = 2.0, 40.0  # seconds between signs of life; without them for so long, a rank is lost
COPIES = 0.5  # seconds: launchers, terminals and schedulers send the same signal more than once
NETWORK = ("usual cures: NCCL_DEBUG=INFO shows where it stands; NCCL_P2P_DISABLE=1 between cards "
           "of one machine; NCCL_IB_DISABLE=1 without InfiniBand; NCCL_SOCKET_IFNAME=eth0 and "
           "GLOO_SOCKET_IFNAME=eth0 name the network card between machines (ip addr)")
GO_ON = "the last checkpoint stands, the same command goes on from there"


def leave(message: str, torchrun: bool = False) -> None:
    """End this process at once, whatever its threads wait for; also the `torchrun` that started it.
    Two ranks of a machine say why, as one of them may be the lost one."""
    if os.environ.get("LOCAL_RANK", "0") in "01":
        complain(message, 1)
    if torchrun and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(2 * BEAT)  # the other ranks of this machine leave now too
        os.kill(os.getppid(), signal.SIGKILL)
    os._exit(1)


@contextlib.contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """Leave with `message` if what is inside takes longer: not every back end obeys a timeout."""
    timer = threading.Timer(seconds, leave, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join(backend: str, device: str) -> dist.Store:
    """Form the process group of the ranks that torchrun started, and try it; their store."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=ARRIVE)))
    store = meet(store, rank, size)
    what = f"the first sum over {size} ranks"
    with deadline(FIRST_SUM, f"{what} did not come within {FIRST_SUM} s; {NETWORK}"):
        try:
            dist.init_process_group(backend, None, PATIENT, size, rank, store)
            parts = torch.full((1 << 20,), rank + 1.0, device=device)
            dist.all_reduce(parts)
            wrong = int((parts != size * (size + 1) / 2).sum())
        except RuntimeError as error:
            leave(f"the ranks cannot reach each other ({error}); {NETWORK}")
    if wrong:
        leave(f"{what} is wrong in {wrong} places; {NETWORK}")
    return store


def meet(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the store that no earlier attempt has written to. torchrun --max-restarts keeps
    its store, and ranks would read the addresses of dead ones there. torchrun counts restarts for
    each machine apart, so rank 0 names the attempt: its answer goes to names that are new."""
    me = attempt = uuid.uuid4().hex
    store.set(f"rank {rank}", me)
    if rank:
        try:
            attempt = store.get(f"answer to {me}").decode()
        except RuntimeError:
            leave(f"rank 0 did not come within {ARRIVE} s; {NETWORK}")
        store.set(f"{me} is in {attempt}", "")
    missing, end = list(range(1, size)) if rank == 0 else [], time.monotonic() + ARRIVE
    while missing:
        for other in filter(lambda other: store.check([f"rank {other}"]), missing[:]):
            name = store.get(f"rank {other}").decode()
            store.set(f"answer to {name}", me)
            if store.check([f"{name} is in {me}"]):
                missing.remove(other)
        if time.monotonic() > end:
            leave(f"of {size} ranks {len(missing)} did not come within {ARRIVE} s, the first is "
                  f"rank {missing[0]}; was torchrun started on every machine?")
        time.sleep(0.02)
    return dist.PrefixStore(attempt, store)


class Watch:
    """Signs of life between ranks, in threads of their own, by a connection of its own to the
    store. Seconds are counted, not read from a clock: a machine that sleeps loses nobody."""

    def __init__(self, store: dist.Store | None, rank: int, size: int):
        self.rank, self.size = rank, size
        self.name = f"{socket.gethostname()}, process {os.getpid()}"
        self.heard: dict[int, tuple[bytes, float]] = {}  # rank -> its last sign, seconds since then
        self.over, self.cut_off = threading.Event(), 0.0  # seconds without an answer of the store
        self.farewell: Callable[[], None] = lambda: None
        self.broken = ""  # why this rank leaves early, which close() tells the others
        self.threads: list[threading.Thread] = []
        if store is None:  # nobody else
            return
        self.store = store.clone()  # type: ignore[attr-defined]
        for job in (self.talk, self.count):
            self.threads.append(threading.Thread(target=job, daemon=True))
            self.threads[-1].start()

    def talk(self) -> None:
        """Give a sign and read those of others: all ranks that of rank 0, rank 0 those of all."""
        signs = itertools.count()
        with contextlib.suppress(RuntimeError):  # the store is lost: see count()
            while not self.over.wait(BEAT):
                self.store.set(f"sign {self.rank}", f"{next(signs)} {self.name}")
                self.cut_off = 0
                for rank in [0] if self.rank else range(1, self.size):
                    self.hear(rank)
                if self.store.check(["end"]):
                    self.end(self.store.get("end").decode())

    def hear(self, rank: int) -> None:
        """Look for a new sign of a rank; that it is silent ends the run."""
        key = f"sign {rank}"
        sign = self.store.get(key) if self.store.check([key]) else b""
        last, silent = self.heard.get(rank, (b"", 0.0))
        silent = 0 if sign != last or sign == b"done" else silent + BEAT
        self.heard[rank] = sign, silent
        if silent >= SILENCE:
            name = sign.decode().partition(" ")[2] or "it never gave one"
            reason = (f"rank {rank} ({name}) has given no sign of life for {SILENCE:.0f} s: it "
                      f"hangs or is cut off; {GO_ON}")
            if self.rank == 0:
                self.store.set("end", reason)
                time.sleep(2 * BEAT)
            self.end(reason)

    def count(self) -> None:
        """Seconds without the store, which lives with torchrun on the first machine."""
        while not self.over.wait(BEAT):
            self.cut_off += BEAT
            if self.cut_off >= SILENCE + BEAT:  # torchrun would ask the lost store for minutes more
                self.end(f"rank {self.rank} ({self.name}) cannot reach the first machine for "
                         f"{SILENCE:.0f} s; {GO_ON}", torchrun=True)

    def end(self, reason: str, torchrun: bool = False) -> None:
        """Leave with the reason."""
        if not self.over.is_set():
            with deadline(5, reason), contextlib.suppress(OSError):  # a disk may be gone too
                self.farewell()
            leave(reason, torchrun)

    def close(self) -> None:
        """This rank leaves, in good order or `broken`. A thread inside the store when Python ends
        would abort the process."""
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=5)
        if self.threads and not any(thread.is_alive() for thread in self.threads):
            last_words = ("end", self.broken) if self.broken else (f"sign {self.rank}", "done")
            with contextlib.suppress(RuntimeError):
                self.store.set(*last_words)


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1 or the time limit; a second signal ends the process.

    Python runs a signal's handler between two steps of the main thread, which may wait in a
    collective for long. So a thread reads the numbers that Python's wakeup descriptor gets at once.
    """

    def __init__(self, minutes: float):
        self.signalled = 0.0  # when
        self.deadline = time.monotonic() + (minutes * 60 or float("inf"))
        self.inbox, self.outbox = socket.socketpair()
        self.outbox.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.outbox.fileno(), warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, lambda *_: None)
                       for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        """First: finish the step and save. Second: leave at once; the last commit stands."""
        while number := self.inbox.recv(1):
            if number[0] not in self.before:
                continue
            if self.signalled and time.monotonic() - self.signalled > COPIES:
                os._exit(143)
            first, self.signalled = not self.signalled, self.signalled or time.monotonic()
            if first and os.environ.get("RANK", "0") == "0":
                print(f"{signal.Signals(number[0]).name}: asked to finish the step and save; a "
                      "second signal leaves at once\n", end="", flush=True)  # by one write

    def asked(self) -> bool:
        """Whether this rank wants to stop."""
        return self.signalled > 0 or time.monotonic() > self.deadline

    def close(self, leaving: bool) -> None:
        """Signals do again what they did before; nothing if the process is `leaving`, since
        torchrun sends one when another rank has left, and would spoil the exit code."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler or signal.SIG_DFL)
        if self.before:
            self.before = {}
            signal.set_wakeup_fd(self.wakeup)
            self.outbox.close()
            self.thread.join()
            self.inbox.close()


@contextlib.contextmanager
def guard(store: dist.Store | None, rank: int, size: int, minutes: float,
          leaving: bool) -> Iterator[tuple[StopFlag, Watch]]:
    """Around a run: signals ask it to stop, and ranks hear of each other's end.

    `minutes`: the run's time limit, 0 for none. `leaving`: the process ends with the run.
    """
    stop, signs = StopFlag(minutes), Watch(store, rank, size)
    try:
        yield stop, signs
    except (RuntimeError, UserError) as error:
        signs.broken = f"rank {rank}: {error!s:.160}"
        if isinstance(error, RuntimeError):
            signs.broken += f"; {GO_ON}"
            if size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                time.sleep(1)  # torchrun names the first to die as the cause
                signs.end(f"rank {rank}: another rank has gone or hangs ({error!s:.160}); {GO_ON}")
        raise
    finally:
        signs.close()
        signs.farewell = lambda: None  # it may hold the run, and so its folder's lock
        stop.close(leaving)
