"""Do the tests bite? python bench/mutants.py SEED [--count=20] [--rooms=tokens/rows,train]

Draws places in the code by the seed, changes one comparison, operator, constant, flag or condition
at a time, in a copy of the checkout, and runs the room's own tests. A mutant is killed if one fails
or hangs; of each its place, its change and its end are printed. A survivor is either equal in
meaning, or the room lacks a test.
"""

import ast
import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.settings import UserError, key

OTHER: dict = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
               ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
               ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
               ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
               ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
               ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}
HOMES = {  # the tests of rooms whose name no file of tests has
    "train": "engine optim check train", "prepare": "prepare_chat prepare", "sample": "sample talk",
    "eval": "eval generated", "command": "settings errors", "files": "checkpoint errors",
    "foreign": "help settings", "machine": "settings errors",
    "resume": "train checkpoint chat_training preferences", "results": "eval report",
    "card": "export report",
    **dict.fromkeys(("sources", "records", "documents", "selection", "workers", "parts"),
                    "prepare prepare_chat"),
    **dict.fromkeys(("clients", "embedded_table", "newest"), "tables"), "forms": "dialogs",
    **dict.fromkeys(("pairs", "embedded_preference", "objectives", "reference"), "preferences"),
    "embedded_chat": "prepare_chat chat", "fast_bpe": "tokenizer", "tokenizer_json": "tokenizer",
    "vocabulary": "tokenizer", "rows": "shards fit", "peft": "adapters", "llama_cpp": "gguf",
    "llama_cpp_process": "gguf", "log": "train report",
    "memory": "check", "preflight": "check", "generate": "sample generated", "decoding": "sample",
    "prompt_files": "sample", "tools": "talk", "validation": "eval train preferences",
    "vectors": "probe",
    **dict.fromkeys(("slots", "batching", "answers", "protocol", "replies", "connections",
                     "serving"), "serve"),
    **dict.fromkeys(("likelihood", "tasks", "lm_eval_tasks"), "eval"), "metrics": "generated",
    **dict.fromkeys(("runs", "curves", "drawing", "charts", "verdict", "scores", "texts", "blocks",
                     "page", "compare"), "report"), "modeling_plainllama": "export"}


@dataclass
class Flags:
    """What bench/mutants.py takes."""

    count: int = key(20, "mutants", low=1)
    rooms: str = key("", "only these rooms, with commas between")
    jobs: int = key(2, "mutants at once", low=1)
    limit: int = key(300, "seconds of a mutant's tests, after which they hang", low=1)


@dataclass
class Mutant:
    """One change of one file."""

    path: str
    line: int
    before: str
    after: str
    source: str  # of the whole file, changed


def changes(node: Any) -> Iterator[Any]:
    """Make the changed copies of one node."""
    other = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        other.ops[0] = OTHER[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OTHER:
        other.op = OTHER[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        other = node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        value: Any = node.value
        other.value = not value if type(value) is bool else value + 1
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        node, other = node.test, ast.UnaryOp(ast.Not(), node.test)
    else:
        return
    yield node
    yield other


def idle(tree: ast.AST) -> set[int]:
    """Find the nodes whose change has no meaning, or no place of its own: annotations, what stands
    in f-strings, what is only said."""
    left: set[int] = set()
    for node in ast.walk(tree):
        out: list = [node] if isinstance(node, ast.JoinedStr) else []
        out += [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            out.append(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "UserError"):
            out.append(node)
        for found in filter(None, out):
            left |= {id(one) for one in ast.walk(found)}
    return left


def mutants_of(path: Path) -> list[Mutant]:
    """Make every mutant of a file."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    left, found = idle(tree), []
    for node in ast.walk(tree):
        if id(node) in left or len(pair := [*changes(node)]) < 2:
            continue
        old, new = pair
        begin = starts[old.lineno - 1] + old.col_offset
        end = starts[old.end_lineno - 1] + old.end_col_offset
        raw, text = source.encode(), f"({ast.unparse(new)})"
        changed = (raw[:begin] + text.encode() + raw[end:]).decode()
        found.append(Mutant(str(path.relative_to(ROOT)), old.lineno,
                            raw[begin:end].decode(), text, changed))
    return found


def tests_of(path: str) -> list[str]:
    """Name the test files of a room. UserError if it has none."""
    stem = Path(path).stem
    names = [f"tests/test_{name}.py" for name in HOMES.get(stem, stem).split()]
    if lost := [name for name in names if not (ROOT / name).exists()]:
        raise UserError(f"{path} has no tests: there is no {lost[0]}; HOMES names others")
    return names


# a process that has loaded what takes seconds, and forks for each mutant's tests
WARM = """
import os, sys
import numpy, pytest, safetensors, tokenizers, torch
try:
    import transformers.models.llama.modeling_llama
except ImportError:
    pass
for line in sys.stdin:
    seconds, out, *words = line.split()
    if not (child := os.fork()):
        os.setsid()
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *words])
        sys.stdout.flush()
        os._exit(code)
    if not (watch := os.fork()):
        import signal, time
        time.sleep(float(seconds))
        os.killpg(child, signal.SIGKILL)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.kill(watch, 9)
    os.waitpid(watch, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Place:
    """A copy of the checkout in `folder` with a process that runs its tests."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        for name in names:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WARM], cwd=folder, stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})

    def tried(self, mutant: Mutant, tests: list[str], limit: int) -> str:
        """Run the tests of a mutant, at most `limit` seconds; how it ended."""
        file, out = self.folder / mutant.path, self.folder / "out.txt"
        before = file.read_text(encoding="utf-8")
        file.write_text(mutant.source, encoding="utf-8")
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{limit} {out} {' '.join(tests)}\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
        finally:
            file.write_text(before, encoding="utf-8")
        said = out.read_text(errors="replace")
        if code == 0:
            return "SURVIVES"
        if code == -signal.SIGKILL:
            return "killed: hangs"
        if code not in (1, 2):  # a test fails, or a room cannot be imported
            raise RuntimeError(f"pytest ends with {code}: {said[-300:]}")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return f"killed by {failed[1] if failed else said.strip().splitlines()[-1][:80]}"

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main(command: CommandLine) -> int:
    """Draw, try, print; 1 if less than nine of ten are killed."""
    if len(command.files) != 1 or not command.files[0].isdecimal():
        raise UserError("give a seed: python bench/mutants.py 1")
    f, draw = command.flags, random.Random(int(command.files[0]))
    files = [*ROOT.glob("*.py"), *(ROOT / "plainllama").rglob("*.py")]
    wanted = [name for name in f.rooms.split(",") if name]
    files = sorted(path for path in files if path.name != "__init__.py" and (not wanted or any(
        str(path).endswith(f"{name}.py") for name in wanted)))
    every = [mutant for path in files for mutant in mutants_of(path)]
    for path in files:
        tests_of(str(path.relative_to(ROOT)))
    drawn = draw.sample(every, min(f.count, len(every)))
    print(f"{len(drawn)} of {len(every)} mutants of {len(files)} files", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        places: SimpleQueue[Place] = SimpleQueue()
        listed = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT,
                                capture_output=True, text=True, check=True).stdout.split("\0")
        made = [Place(Path(scratch) / str(job), listed) for job in range(f.jobs)]
        for place in made:
            places.put(place)

        def one(mutant: Mutant) -> bool:
            place, begin = places.get(), time.monotonic()
            try:
                end = place.tried(mutant, tests_of(mutant.path), f.limit)
            finally:
                places.put(place)
            print(f"{mutant.path}:{mutant.line}: {' '.join(mutant.before.split())[:70]} -> "
                  f"{mutant.after[:70]}: {end}, {time.monotonic() - begin:.0f} s", flush=True)
            return end != "SURVIVES"

        with ThreadPoolExecutor(f.jobs) as pool:
            killed = sum(pool.map(one, drawn))
        for place in made:
            place.close()
    print(f"{killed} of {len(drawn)} killed ({100 * killed / len(drawn):.0f} %)")
    return int(killed < 0.9 * len(drawn))


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
