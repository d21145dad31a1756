"""The rules of the house (docs/design.md): what lies at the top, who imports whom, sizes."""

import ast
import io
import re
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
from plainllama.evaluation.metrics import METRICS
from plainllama.evaluation.tasks import MAKERS
from plainllama.text.records import KINDS
from plainllama.text.selection import DEDUP
from plainllama.text.tables import FORMATS
from plainllama.tokens.rows import PACKINGS
from plainllama.training.log import LOGGERS
from plainllama.training.objectives import OBJECTIVES
from plainllama.training.optim import OPTIMIZERS, SCHEDULES
from plainllama.weights.expansion import DIVERGENCES
from plainllama.weights.quantised import QUANTISED

COMMANDS = ("prepare", "train", "sample", "eval", "export", "report")
TOP = {*(f"{name}.py" for name in (*COMMANDS, "model")), "plainllama", "config", "data", "tests",
       "docs", "launch", "reference", "runs", "bench"}
# each wing imports from those before it, and from the rooms that lie in the package itself
WINGS = ("text", "tokens", "weights", "training", "generation", "evaluation")
LIGHT = ("settings", "command", "files", "progress", "results")  # and report: no torch, no numpy
ROOM, HOUSE = 300, 16423  # code lines


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
    size = sum(sizes.values())
    assert size <= HOUSE, f"{size} lines of code: delete some, or raise HOUSE by what it is worth"


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


def members(path: Path) -> dict[str, set[str]]:
    """What a file holds: functions, tables and classes, and what is in a class."""
    def names(node) -> list[str]:
        if isinstance(node, ast.Assign):
            return [part.id for target in node.targets for part in ast.walk(target)
                    if isinstance(part, ast.Name)]
        if isinstance(node, ast.AnnAssign):
            return [node.target.id]
        return [node.name] if hasattr(node, "name") else []

    def inside(node) -> set[str]:
        own = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
               and isinstance(part.ctx, ast.Store)}
        return own | {name for part in getattr(node, "body", ()) for name in names(part)}

    return {name: inside(node)
            for node in ast.parse(path.read_text()).body for name in names(node)}


def test_the_design_names_no_place_that_is_not_there():
    """`records.KINDS`, `rows.Rows.window_of`, `Engine.gradients`, `test_layout.ROOM`."""
    held: dict[str, list] = {}  # a room or a class -> what is in it; rooms may have one name
    for path in (*rooms().values(), *(ROOT / "tests").glob("*.py")):
        found = members(path)
        held.setdefault(path.stem, []).append(found)
        for name, inner in found.items():
            held.setdefault(name, []).append({part: set() for part in inner})
    files = "py|md|js|css|html|json|jsonl|sbatch|npz|jinja|gotmpl|tmp"
    text = (ROOT / "docs/design.md").read_text()
    places = {place for place in re.findall(r"`(\w+(?:\.\w+)+)`", text)
              if not re.search(rf"\.(?:{files})$", place)} - {"run.json", "torch.where"}
    assert len(places) > 150
    missing = []
    for place in sorted(places):
        room, name, *inner = place.split(".")
        if not any(name in found and {*inner} <= found[name] for found in held.get(room, ())):
            missing.append(place)
    assert missing == []


@pytest.mark.parametrize(("page", "table"), [
    ("docs/text.md", KINDS), ("docs/text.md", DEDUP), ("docs/tables.md", FORMATS),
    ("docs/adapters.md", QUANTISED), ("docs/expansion.md", DIVERGENCES),
    ("docs/preferences.md", OBJECTIVES.keys() - {"next"}), ("eval.py", METRICS),
    ("eval.py", MAKERS)])
def test_the_pages_name_what_the_tables_hold(page, table):
    text = (ROOT / page).read_text()
    patterns = {name: rf"(?<!\w){re.escape(name)}(?![a-z])" for name in table}
    assert [name for name in table if not re.search(patterns[name], text)] == []


@pytest.mark.parametrize(("key", "table"), [
    ("attention", model.ATTENTION), ("rope_scaling", model.ROPE_SCALINGS),
    ("packing", {"auto", *PACKINGS}), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS),
    ("logger", {"none", *LOGGERS}), ("objective", OBJECTIVES), ("dedup", {"none", *DEDUP}),
    ("frozen_dtype", {"fp32", "bf16", *QUANTISED}), ("divergence", DIVERGENCES)])
def test_the_choices_of_a_key_are_its_table(key, table):
    choices = {item.name: item.metadata["choices"] for item in fields(settings.Settings)}
    assert set(choices[key]) == set(table)
