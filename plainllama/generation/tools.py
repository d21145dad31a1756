"""The functions of a user's file as tools of a talk: schemas from signatures, calls that are
checked and run with a time limit.

The file is run, in a process of its own for each call: it is the one that the user names with
--tools, and its hash is said.
"""

import inspect
import json
import os
import runpy
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plainllama.files import CHECKOUT, sha256
from plainllama.settings import UserError

SECONDS = 10.0  # that a call may take
LONGEST = 10_000  # characters of a result that a talk is given
CHILD = "from plainllama.generation.tools import run; run()"
TYPES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean",
                         list: "array", dict: "object", type(None): "null"}
KINDS: dict[str, tuple[type, ...]] = {
    name: (kind,) for kind, name in TYPES.items()} | {"number": (int, float)}


class Tools:
    """The public functions of a file. UserError if it has none, or one that has no schema."""

    def __init__(self, file: str):
        self.file, self.sha256 = file, sha256(Path(file)) if Path(file).is_file() else ""
        if not self.sha256:
            raise UserError(f"--tools: no file {file}")
        self.schemas = [schema_of(function) for function in functions_of(file).values()]
        if not self.schemas:
            raise UserError(f"--tools: {file} has no public function")

    def call(self, name: str, arguments: dict[str, Any], seconds: float = SECONDS) -> str:
        """Give what a function returns, as text; what is wrong with the call begins with `error:`,
        so that the model can read it."""
        known = {schema["name"]: schema["parameters"] for schema in self.schemas}
        if name not in known:
            return f"error: no function {name}; there are {', '.join(known)}"
        if wrong := misfit(arguments, known[name]):
            return f"error: {name}: {wrong}"
        asked = json.dumps([self.file, name, arguments])
        try:  # in a session of its own: Ctrl-C is for the talk, which then ends the call
            done = subprocess.run([sys.executable, "-c", CHILD], input=asked, encoding="utf-8",
                                  stdout=subprocess.PIPE, timeout=seconds, start_new_session=True,
                                  env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
        except subprocess.TimeoutExpired:
            return f"error: {name} took longer than {seconds:g} s"
        return done.stdout if done.returncode == 0 else f"error: {name} ended its process"


def run() -> None:
    """Make the call that stands on standard input, in a process of its own; write what it gives."""
    file, name, arguments = json.load(sys.stdin)
    result = os.dup(1)
    os.dup2(2, 1)  # what the function prints, or a program that it starts, goes to the screen
    try:
        value = functions_of(file)[name](**arguments)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        text = f"error: {type(error).__name__}: {error}"
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ... (the first of {len(text):,} characters)"
    with open(result, "w", encoding="utf-8", errors="replace") as pipe:
        pipe.write(text)


def functions_of(file: str) -> dict[str, Callable]:
    """Run a file and list the public functions that it defines. UserError if it fails."""
    try:
        found = runpy.run_path(file, run_name=file)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(f"--tools: {file}: {type(error).__name__}: {error}") from None
    return {name: value for name, value in found.items() if inspect.isfunction(value)
            and value.__module__ == file and name[0] != "_"}


def schema_of(function: Callable) -> dict:
    """Describe a function as JSON schemas do: its name, the first paragraph of its docstring, and
    the types of its parameters; those without a default are required."""
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # it may name what is not there
        raise UserError(f"--tools: the types of {function.__name__}(): {error}") from None
    properties: dict[str, dict] = {}
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if name not in hints or not named:
            raise UserError(f"--tools: {function.__name__}(): {parameter} cannot be a parameter of "
                            "a tool, which are given by name and say their type")
        properties[name] = type_of(hints[name], f"{function.__name__}({name})")
    required = [name for name, each in parameters.items() if each.default is each.empty]
    about = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
    return {"name": function.__name__, **({"description": about} if about else {}),
            "parameters": {"type": "object", "properties": properties, "required": required}}


def type_of(hint: Any, where: str) -> dict:
    """Describe a type: str, int, float, bool, list, dict, Literal, and what may be None."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [type_of(each, where) for each in inner]}
    if origin is list and inner:
        return {"type": "array", "items": type_of(inner[0], where)}
    if (origin or hint) not in TYPES:
        raise UserError(f"--tools: {where} has a type that JSON lacks: {hint}")
    return {"type": TYPES[origin or hint]}


def misfit(value: Any, schema: dict[str, Any], where: str = "") -> str:
    """Say how a value does not fit a schema, '' if it does."""
    at = f"{where} " if where else ""
    if "enum" in schema:
        return "" if value in schema["enum"] else f"{at}is one of {schema['enum']}, not {value!r}"
    if "anyOf" in schema:
        wrong = [misfit(value, each, where) for each in schema["anyOf"]]
        return "" if "" in wrong else wrong[0]
    kinds = KINDS[schema["type"]]
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits:
        return f"{at}takes {schema['type']}, not {value!r:.80}"
    if schema["type"] == "array" and "items" in schema:
        return next(filter(None, (misfit(each, schema["items"], where) for each in value)), "")
    if "properties" in schema:
        known = schema["properties"]
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{missing[0]} is missing"
        if unknown := [name for name in value if name not in known]:
            return f"has no parameter {unknown[0]}; there are {', '.join(known)}"
        return next(filter(None, (misfit(value[name], known[name], name) for name in value)), "")
    return ""
