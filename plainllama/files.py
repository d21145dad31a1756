"""The one place for small files: JSON, JSON lines, hashes, locks, what lies in a run's folder.

What is written here appears whole or not at all: a temporary name, then a rename.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from plainllama.settings import UserError

UNFINISHED = ".plainllama.tmp"  # after the name of what is being made: what is called so is ours
CHECKOUT = Path(__file__).resolve().parent.parent  # where the commands and config/ lie

# ---- JSON


def as_json(value) -> str:
    """The form in which we write JSON; dataclasses become objects."""
    return json.dumps(value, indent=1, default=asdict) + "\n"


def write_json(path: Path | str, value) -> None:
    """Write `value` as JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, as_json(value))


def write_text(path: Path | str, text: str, durable: bool = False) -> None:
    """Write `text` so that a reader sees the old file or the new one; `durable`: on the disk when
    this returns."""
    temporary = Path(f"{path}{UNFINISHED}")
    temporary.write_text(text, encoding="utf-8")
    if durable:
        sync(temporary)
    os.replace(temporary, path)


def read_json(path: Path, tolerant: bool = False) -> dict:
    """Read a JSON object, {} if there is no such file. UserError if it is damaged, or {} then too
    if the caller is `tolerant`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if tolerant or isinstance(error, FileNotFoundError):
            return {}
        if isinstance(error, OSError):
            raise
        raise UserError(f"{path} is damaged: it is not a JSON object") from None


def read_rows(path: Path, tolerant: bool = False) -> list[dict]:
    """Read the objects of a .jsonl file, [] if there is none, without a last one that is only half
    written: its writer may be at work or killed. Any other damaged line is a UserError that names
    it, or is passed over if the caller is `tolerant`."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines) and not tolerant:
                raise UserError(f"{path}:{number} is damaged: it is not JSON") from None
    return rows


def cut_rows(path: Path, step: int) -> None:
    """Drop the rows of a .jsonl file after `step`: the resumed run writes them again."""
    if path.exists():
        kept = [row for row in read_rows(path, tolerant=True) if row.get("step", step + 1) <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


# ---- bytes on the disk

def sha256(path: Path) -> str:
    """Hash a file; the hex digest."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Hash bytes; the hex digest."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(path: Path) -> str:
    """Hash of a file's size and ends, 16 hex digits."""
    size, end = path.stat().st_size, 64 << 10
    with open(path, "rb") as file:
        start = file.read(end)
        file.seek(max(0, size - end))
        return hashlib.blake2b(b"%d" % size + start + file.read(end), digest_size=8).hexdigest()


def content_hash(path: Path, seen: dict) -> str:
    """Hash of a whole file: at once if `seen`, {path: [size, both times of its change, hash]}, has
    it as it is; else it is read, and noted there."""
    state = state_of(path)
    if seen.get(str(path), [])[:3] != state:
        seen[str(path)] = [*state, sha256(path)]
    return seen[str(path)][3]


def state_of(path: Path | str) -> list[int]:
    """Give a file's size and the times at which its content and its entry were changed, in ns."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def file_entry(path: Path) -> dict:
    """Describe a file as manifests and checksums do: {size, sha256}."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder: Path, need: int) -> None:
    """Raise OSError before a byte is written if `need` bytes would not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(28, f"{need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free", str(folder))


def hold(file, problem: str) -> None:
    """Lock an open file until it is closed; UserError(problem) if another process holds it."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(problem) from None
    except OSError as error:  # some network file systems have no locks
        print(f"WARNING: no lock on {file.name} ({error}); start no second job on it", flush=True)


# ---- a run's folder

def lock_run(run: Path):
    """Hold a run's folder; UserError if another process does. The lock dies with its owner."""
    file = open(run / ".lock", "w")  # noqa: SIM115
    hold(file, f"another process is training in {run}; choose another out_dir")
    return file


def write_status(run: Path, state: str, step: int) -> None:
    """Write status.json; state: running, done, stopped (start me again) or failed."""
    write_json(run / "status.json", {"state": state, "step": step})


def read_status(run: Path) -> str:
    """Read the state in status.json, '' without one."""
    return str(read_json(run / "status.json", tolerant=True).get("state", ""))


def step_of(checkpoint: Path) -> int:
    """Read the step off the name of a checkpoint's folder, step_N."""
    return int(checkpoint.name.removeprefix("step_"))


def steps_of(run: Path) -> list[Path]:
    """List the committed checkpoints of a run, newest first, not yet verified."""
    found = [p for p in run.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_run(folder: Path) -> Path | None:
    """Choose the run in a folder of runs, None if it holds none: the one with the newest checkpoint
    or, where none has a checkpoint, the newest row of metrics. Every command uses this rule."""
    def changed(path: Path) -> float:
        with contextlib.suppress(FileNotFoundError):  # a run at work may just delete it
            return path.stat().st_mtime
        return 0.0

    def age(run: Path) -> tuple[float, float]:
        return max(map(changed, steps_of(run)), default=0.0), changed(run / "metrics.jsonl")

    runs = {path.parent for path in (*folder.glob("*/checkpoints"), *folder.glob("*/run.json"))}
    return max(sorted(runs), key=age, default=None)


def run_of(checkpoint: Path) -> Path | None:
    """Find the run that a checkpoint lies in, None for a model folder from elsewhere."""
    run = checkpoint.absolute().parent.parent
    in_run = checkpoint.absolute().parent.name == "checkpoints" and (run / "run.json").is_file()
    return run if in_run else None
