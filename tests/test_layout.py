"""The rules of the house (docs/design.md): what lies at the top, who imports whom, sizes."""

import ast
import io
import subprocess
import sys
import tokenize
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

import model
from plainllama import settings
from plainllama.tokens.rows import PACKINGS
from plainllama.training.log import LOGGERS
from plainllama.training.objectives import OBJECTIVES
from plainllama.training.optim import OPTIMIZERS, SCHEDULES

COMMANDS = ("prepare", "train", "sample", "eval", "export", "report")
TOP = {*(f"{name}.py" for name in (*COMMANDS, "model")), "plainllama", "config", "data", "tests",
       "docs", "launch", "reference", "runs", "bench"}
# each wing imports from those before it, and from the rooms that lie in the package itself
WINGS = ("text", "tokens", "weights", "training", "generation", "evaluation")
LIGHT = ("settings", "command", "files", "progress", "results")  # and report: no torch, no numpy
ROOM, HOUSE = 300, 16306  # code lines


@cache
def rooms() -> dict[str, Path]:
    """Dotted name -> file of every room: the commands, model.py and the package."""
    found = [*ROOT.glob("*.py"), *(ROOT / "plainllama").rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in found}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def code_lines(path: Path) -> int:
    """Lines of a file with code on them: no blanks, no comments, no docstrings."""
    text, lines = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                              tokenize.DEDENT, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@cache
def imports() -> dict[str, set[str]]:
    """Room -> the rooms that it imports, also inside functions."""
    graph = {}
    for name, path in rooms().items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                graph[name] |= {str(node.module)}
                graph[name] |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] &= rooms().keys() - {name}
    return graph


def wing(room: str) -> str:
    """The wing of a room, '' for what lies at the top or in the package itself."""
    parts = room.split(".")
    return parts[1] if len(parts) == 3 else ""


def test_what_lies_at_the_top():
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in kept.stdout.splitlines()}
    scripts = {name for name in names if name.endswith(".py") or (ROOT / name).is_dir()}
    assert {name for name in scripts if not name.startswith(".")} <= TOP
    assert {name for name in TOP if name.endswith(".py")} <= scripts


def test_rooms_are_small_and_so_is_the_house():
    sizes = {name: code_lines(path) for name, path in rooms().items()}
    assert {name: size for name, size in sizes.items() if size > ROOM} == {}
    assert sum(sizes.values()) <= HOUSE


def test_code_lines_are_counted(tmp_path):
    path = tmp_path / "room.py"
    path.write_text('"""Doc."""\n\nx = """a\nb"""  # why\n\n\ndef f():\n    """Doc\n    it."""\n'
                    "    # why\n    return (1,\n            2)\n")
    assert code_lines(path) == 2 + 1 + 2


def test_wings_import_in_one_direction():
    assert imports()["plainllama.tokens.rows"] >= {"plainllama.tokens.shards"}  # they are seen
    for room, others in imports().items():
        for other in others:
            where, there = wing(room), wing(other)
            assert other not in COMMANDS, f"{room} imports the command {other}"
            assert room != "model", f"model.py imports {other}"
            if where == "report":
                assert there in ("report", ""), f"{room} imports {other}"
            elif where in WINGS and there in WINGS:
                assert WINGS.index(there) <= WINGS.index(where), f"{room} imports {other}"
            elif room.startswith("plainllama"):
                assert there == where or not there, f"{room} imports {other}"


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(room: str, path: tuple) -> None:
        assert room not in path, " > ".join([*path, room])
        if room not in done:
            for other in imports()[room]:
                visit(other, (*path, room))
            done.add(room)

    for room in rooms():
        visit(room, ())


def test_light_rooms_load_neither_torch_nor_numpy():
    names = [f"plainllama.{name}" for name in LIGHT]
    names += [room for room in rooms() if room.startswith("plainllama.report")] + ["report"]
    code = f"import {', '.join(names)}, sys; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "set()\n"


def test_the_design_names_every_room():
    text = (ROOT / "docs/design.md").read_text()
    for name, path in rooms().items():
        if path.name != "__init__.py":
            assert f"`{path.name}`" in text, f"docs/design.md does not name {name}"


@pytest.mark.parametrize(("key", "table"), [
    ("attention", model.ATTENTION), ("rope_scaling", model.ROPE_SCALINGS),
    ("packing", {"auto", *PACKINGS}), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS),
    ("logger", {"none", *LOGGERS}), ("objective", OBJECTIVES)])
def test_the_choices_of_a_key_are_its_table(key, table):
    choices = {item.name: item.metadata["choices"] for item in fields(settings.Settings)}
    assert set(choices[key]) == set(table)
