"""Everything that can be measured on this machine, as one table: python bench/all.py

Runs the scripts beside it one after the other, with nothing else at the same time, and gathers the
rows that they print: lines that begin with |.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plainllama.training import log

SCRIPTS = ["quickstart.py", "rows.py", "step.py"]


def main() -> int:
    """Run them all; 1 if one failed, which the table says."""
    print(f"{log.cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    rows, failed = [], 0
    for script in SCRIPTS:
        print(f"--- {script}", flush=True)
        process = subprocess.Popen([sys.executable, str(ROOT / "bench" / script)], cwd=ROOT,
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout or ():
            print(line, end="", flush=True)
            rows += [line.rstrip()] if line.startswith("|") else []
        if process.wait():
            rows.append(f"| {script} | failed | | |")
            failed = 1
    print("\n| what | ours | beside it | ratio |\n| --- | --- | --- | --- |")
    print("\n".join(rows))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
