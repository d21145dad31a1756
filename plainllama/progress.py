"""The one line that shows how far a long piece of work is, and a screen that may break."""

import contextlib
import os
import sys
import time


class Progress:
    """How far a stage is: one line that is rewritten on a terminal, elsewhere a line at times."""

    def __init__(self, what: str, total: int, unit: str, active: bool = True, device: str = "cpu"):
        self.what, self.total, self.unit, self.active = what, total, unit, active
        self.device = device  # on which the work is: a GPU is waited for before a line is shown
        self.terminal, self.done = sys.stdout.isatty(), 0
        self.began = self.shown = time.monotonic()

    def add(self, n: int, last: bool = False) -> None:
        """Count `n` more as done, and show the line if that is due or the `last` time."""
        self.done += n
        due = last or time.monotonic() - self.shown >= (0.2 if self.terminal else 10)
        if not (due and self.active):
            return
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.shown = time.monotonic()
        seconds = max(self.shown - self.began, 1e-9)
        rate = self.done / seconds
        left = duration((self.total - self.done) / rate) if self.done else "?"
        line = (f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f} a second, "
                f"{left} left{self.details(seconds)}")
        print(f"\r{line}\033[K" if self.terminal else line,
              end="" if self.terminal and not last else "\n", flush=True)

    def details(self, seconds: float) -> str:
        """Say what the line ends with, after so many seconds; for a stage that knows more."""
        return ""

    def close(self) -> None:
        """Leave the line to what is printed next."""
        if self.active and self.terminal:
            print("\r\033[K", end="", flush=True)


def duration(seconds: float) -> str:
    """Write a time: '2:05' or '3:20:00'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Screen:
    """A stream that falls silent when its disk is full or its reader has gone, with one `warning`
    on stderr: for a command that outlives its screen."""

    def __init__(self, stream, warning: str):
        self.stream, self.warning = stream, warning

    def write(self, text: str) -> int:
        """Write, or fall silent."""
        return self.tried(self.stream.write, text) or 0

    def flush(self) -> None:
        """Flush, or fall silent."""
        self.tried(self.stream.flush)

    def tried(self, call, *args):
        """Give what `call` gives; from its first failure on the stream leads nowhere."""
        try:
            return call(*args)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.warning:
                Screen(sys.stderr, "").write(f"WARNING: {error.strerror}: {self.warning}\n")
                self.warning = ""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)
