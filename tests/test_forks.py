"""What other tests rely on: a fork is as good as a new process, and no failed test leaves one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import end_all_below, run_script

LOOK = """
import atexit, multiprocessing, os, signal, sys, tempfile, threading

def say(*what):
    print(*what, flush=True)

def square(n):
    return n * n

if __name__ == "__main__":
    say(sys.argv[1:], os.getcwd(), os.environ.get("ASKED"), __file__, sys.path[0])
    say(sys.stdin.read(), sys.stdout.isatty(), tempfile.gettempdir(), threading.active_count())
    say(signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGTERM))
    atexit.register(say, "at exit")
    if sys.argv[1] == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        say(pool.map(square, [3]))
    threading.Thread(target=lambda: (threading.main_thread().join(), say("a thread"))).start()
    print("to stderr", file=sys.stderr)
    if sys.argv[1] == "error":
        raise KeyError("x")
    sys.stdout.write("not flushed")
    sys.exit({"text": "a reason", "code": 75, "none": None}[sys.argv[1]])
"""


@pytest.mark.parametrize("way", ["none", "text", "code", "error", "signal"])
def test_a_fork_is_as_good_as_a_new_process(tmp_path, way):
    script, env = tmp_path / "look.py", {"ASKED": "this", "TMPDIR": str(tmp_path)}
    script.write_text(LOOK)
    forked, fresh = (run_script(str(script), way, cwd=tmp_path, env=env, fresh=fresh)
                     for fresh in (False, True))
    assert forked.returncode == fresh.returncode == {
        "none": 0, "text": 1, "code": 75, "error": 1, "signal": -signal.SIGUSR1}[way]
    assert "True" in forked.stdout and forked.stdout == fresh.stdout
    errors = [done.stderr.splitlines() for done in (forked, fresh)]
    if way == "error":  # a traceback has more lines in a fork
        errors = [[said[0], said[1], said[-1]] for said in errors]
    assert errors[0] == errors[1]


def test_a_fault_and_streams_reach_a_fork(tmp_path):
    (tmp_path / "look.py").write_text("import os\nprint(os.planted)\nos.write(2, b'x')\n")
    with open("/dev/full", "w") as full:
        done = run_script(str(tmp_path / "look.py"), cwd=tmp_path, code="import os; os.planted = 7",
                          stdout=full.fileno())
    assert (done.returncode, done.stdout) == (120, "") and "No space left" in done.stderr
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(str(tmp_path / "look.py"), cwd=tmp_path, timeout=0,
                   code="import time; time.sleep(600)")


def test_all_that_works_in_a_folder_is_ended_with_what_it_started(tmp_path):
    (tmp_path / "inside").mkdir()
    code = ("import subprocess\nfor away in (False, True):\n    subprocess.Popen("
            "['sleep', '600'], start_new_session=away)\nprint('begun', flush=True)\n"
            "subprocess.run(['sleep', '600'])")
    other = subprocess.Popen(["sleep", "600"], cwd=Path.home())
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path / "inside",
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    mine = [int(path.name) for path in Path("/proc").glob("[1-9]*") if lies_in(path, tmp_path)]
    assert len(mine) >= 3 and process.pid in mine
    end_all_below(tmp_path)
    assert process.wait() == -signal.SIGKILL and other.poll() is None
    other.kill()
    other.wait()
    while any(lies_in(Path(f"/proc/{pid}"), tmp_path) for pid in mine):
        time.sleep(0.01)


def lies_in(process: Path, folder: Path) -> bool:
    """Whether a process of /proc is at work in a folder."""
    try:
        return Path(os.readlink(process / "cwd")).is_relative_to(folder)
    except OSError:
        return False
