"""The line that shows how far work is: what it says, how often, and on which screens."""

import io
import os
import sys

import pytest
import torch

from plainllama import progress
from plainllama.progress import Progress, Screen, duration


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_time_is_written_as_people_do():
    assert [duration(s) for s in (0, 59.4, 59.6, 125, 3599, 3600, 12000)] == [
        "0:00", "0:59", "1:00", "2:05", "59:59", "1:00:00", "3:20:00"]


def test_elsewhere_a_line_every_ten_seconds_and_the_last(clock, capsys):
    line = Progress("reading", 1000, "rows")
    for seconds, count, says in ((9.9, 10, ""), (10.0, 10, "20 of 1,000 rows, 2.0 a second, 8:10"),
                                 (19.9, 20, ""), (20.0, 60, "100 of 1,000 rows, 5.0 a second")):
        clock[0] = 100 + seconds
        line.add(count)
        out = capsys.readouterr().out
        assert (says in out and out.startswith("reading: ")) if says else out == ""
        assert out.endswith(" left\n") or not says
    clock[0] += 1
    line.add(0, last=True)
    assert capsys.readouterr().out == "reading: 100 of 1,000 rows, 4.8 a second, 3:09 left\n"
    line.close()
    assert capsys.readouterr().out == ""


def test_nothing_done_has_no_end(clock, capsys):
    Progress("x", 10, "rows").add(0, last=True)
    assert capsys.readouterr().out == "x: 0 of 10 rows, 0.0 a second, ? left\n"


def test_on_a_terminal_one_line_is_rewritten(clock, monkeypatch):
    screen = Tty()
    monkeypatch.setattr(sys, "stdout", screen)
    line = Progress("x", 10, "rows")
    clock[0] += 0.15
    line.add(1)
    assert screen.getvalue() == ""
    clock[0] += 0.15
    line.add(1)
    assert screen.getvalue() == "\rx: 2 of 10 rows, 6.7 a second, 0:01 left\033[K"
    line.close()
    assert screen.getvalue().endswith("\r\033[K")
    line.add(8, last=True)
    assert screen.getvalue().endswith("10 of 10 rows, 33.3 a second, 0:00 left\033[K\n")


@pytest.mark.parametrize("kind", [Tty, io.StringIO])
def test_one_that_is_not_active_is_silent(clock, monkeypatch, kind):
    screen = kind()
    monkeypatch.setattr(sys, "stdout", screen)
    line = Progress("x", 10, "rows", active=False)
    line.add(10, last=True)
    line.close()
    assert screen.getvalue() == "" and line.done == 10


def test_a_screen_that_breaks_is_said_once_and_leads_nowhere(tmp_path, monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with open(os.devnull, "w") as file:
        screen = Screen(file, "the rest is not shown")
        assert screen.write("abc") == 3

        def full(text):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(screen, "stream", type("Full", (), {
            "write": staticmethod(full), "flush": lambda self: None, "mark": 7,
            "fileno": staticmethod(file.fileno)})())
        assert screen.write("abc") == 0 and screen.write("abc") == 0 and screen.mark == 7
    assert errors.getvalue() == "WARNING: No space left on device: the rest is not shown\n"


def test_when_a_line_is_due(clock, monkeypatch):
    """After 0.2 seconds on a terminal, elsewhere after ten; a GPU is waited for first."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    for kind, least in ((Tty, 0.25), (io.StringIO, 10.0)):
        for device in ("cpu", "cuda", "mps"):
            screen = kind()
            monkeypatch.setattr(sys, "stdout", screen)
            line = Progress("x", 10, "rows", device=device)
            monkeypatch.setattr(line, "details", lambda seconds: f", after {seconds:.2f}")
            for later, shown in ((least - 0.125, False), (0.125, True), (least / 2, False)):
                clock[0] += later
                before = len(screen.getvalue())
                line.add(1)
                assert (len(screen.getvalue()) > before) == shown and len(waited) == (
                    shown and device == "cuda")
                assert not shown or f" left, after {least:.2f}" in screen.getvalue()
                waited.clear()
    line = Progress("x", 5, "rows")
    line.add(5, last=True)  # at once: no time has passed
    assert "5 of 5 rows, 5,000,000,000.0 a second, 0:00 left" in screen.getvalue()
    assert [duration(s) for s in (60, 61, 3659, 3661)] == ["1:00", "1:01", "1:00:59", "1:01:01"]


def test_a_screen_without_a_warning_breaks_in_silence(monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with open(os.devnull, "w") as file:
        broken = type("Broken", (), {"fileno": file.fileno})()

        def gone(*_):
            raise OSError(32, "Broken pipe")

        broken.write = broken.flush = gone
        silent = Screen(broken, "")
        assert silent.write("x") == 0 and silent.flush() is None
        assert errors.getvalue() == ""
        said = Screen(broken, "no more")
        said.flush()
        said.write("x")
    assert errors.getvalue() == "WARNING: Broken pipe: no more\n"
