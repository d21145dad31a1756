"""Config files and command lines: parsed, never run; --help, exit codes, Ctrl-C.

A config file holds assignments of literals, of arithmetic on literals and on names assigned above,
and may begin with `base = 'other.py'`: it is then a difference from that file. Precedence: default,
base, file, command line.
"""

import ast
import difflib
import errno
import importlib.util
import math
import operator
import os
import re
import signal
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from plainllama.files import CHECKOUT
from plainllama.help import help_text, unknown
from plainllama.machine import share_the_machine, work
from plainllama.progress import Screen
from plainllama.settings import PATHS, Incomplete, Settings, UserError, check_keys, install, nearest

DEFAULT_CONFIG = "config/llama100m.py"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # it is full or broken
INTERRUPTED = "interrupted; the same command goes on from what is complete"
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


@dataclass
class CommandLine:
    """What a command was given, and where each value of the config came from."""

    config: Settings
    flags: Any
    files: list
    config_file: str
    base: str  # the config file's parent, '' if it has none
    changed: dict  # keys set by the config file itself
    overrides: dict  # keys set on the command line
    given: frozenset = frozenset()  # all keys that somebody set, its bases too
    began: tuple = ()  # work() when the process began
    # what the config file has of `overrides` that are otherwise there
    instead: dict = field(default_factory=dict)


def parse(argv: list, doc: str | None, flags: type | None = None,
          takes: str = "config", reads: tuple = ()) -> CommandLine:
    """Read a command line. `takes`: 'config' (a file and all its keys), 'files' (flags and names)
    or 'model' (flags; a name that stands alone is that of --ckpt). `reads`: the keys that --help
    shows, if the command has no use for the others.

    Answers --help and exits. Raises UserError for anything it does not understand.
    """
    own = {item.name: item for item in (fields(flags) if flags else ())}
    keys = {item.name: item for item in fields(Settings)} if takes == "config" else {}
    files, given = read_words(argv, doc, own | keys, [*own, *(reads or keys)])
    if takes == "model":
        files, given = [], name_model(files, given, own)
    chosen = flags(**{k: v for k, v in given.items() if k not in keys}) if flags else None
    if takes != "config":
        return CommandLine(Settings(), chosen, files, "", "", {}, given)
    if len(files) > 1:
        raise UserError(f"expected one config file, found {len(files)}: {' '.join(files)}")
    config_file = files[0] if files else str(CHECKOUT / DEFAULT_CONFIG)
    layers = read_config(config_file)
    overrides = {k: v for k, v in given.items() if k in keys}
    config = Settings()
    for _, layer in layers:
        vars(config).update(layer)
    instead = {name: getattr(config, name) for name, value in overrides.items()
               if name != "out_dir" and value != getattr(config, name)}
    vars(config).update(overrides)
    config.out_dir = config.out_dir or f"out/{Path(config_file).stem}"
    check_keys(config, shape=not config.init_from)  # which train.py may still take over
    base = layers[-2][0] if len(layers) > 1 else ""
    keys_given = frozenset().union(overrides, *(values for _, values in layers))
    return CommandLine(config, chosen, files, config_file, base, layers[-1][1], overrides,
                       keys_given, instead=instead)


def name_model(files: list[str], given: dict, own: dict) -> dict:
    """Take what stands without a name for that of --ckpt; the options that are given then."""
    if not files:
        return given
    for name in files:
        parts = [name] if os.path.exists(os.path.expanduser(name)) else name.split(",")
        if not all(os.path.exists(os.path.expanduser(part)) for part in parts):
            text = "; a text to go on from is --prompt=TEXT" if "prompt" in own else ""
            raise UserError(f"cannot use {name!r}: no run or checkpoint is called so{text}")
    if "ckpt" in given or len(files) > 1:
        raise UserError(f"expected one model, found {' '.join(files)}"
                        f"{' beside --ckpt' if 'ckpt' in given else ''}; name it once")
    return given | {"ckpt": checked(own["ckpt"], files[0], "--ckpt")}


def show_help(doc: str | None, known: dict, names: list[str]) -> None:
    """Print the help; of a config file among `names` also its values."""
    configs = [name for name in names if re.fullmatch(r"[^-].*\.py", name) and "dataset" in known]
    path = configs[0] if configs else ""
    values: dict = {}
    for _, layer in read_config(path) if path else ():
        values |= layer
    print(help_text(doc, known, path, values), flush=True)


def read_words(argv: list, doc: str | None, known: dict,
               shown: list[str]) -> tuple[list[str], dict]:
    """Split a command line into (positional arguments, {option: value}); `known`: name -> field;
    `shown`: of these in the help."""
    files: list[str] = []
    given: dict = {}
    words = iter(argv)
    for word in words:
        if word in ("--help", "-h"):
            show_help(doc, {name: known[name] for name in shown}, [*files, *words])
            raise SystemExit(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise UserError(f"unknown option --{name}{unknown(name, known)}")
        if not equals:
            bare = "true" if known[name].type is bool else known[name].metadata["bare"]
            text = bare or next(words, None)
        if text is None:
            raise UserError(f"--{name} needs a value: --{name}=VALUE")
        if name in given:
            print(f"--{name} is given twice: {text} counts", flush=True)
        given[name] = from_text(known[name], text)
    return files, given


def parse_arguments(doc: str | None, flags: type | None = None, takes: str = "config",
                    outlives: str = "", reads: tuple = ()) -> CommandLine:
    """parse() of this process's arguments; what the user can mend is one line and exit code 2.
    `outlives`: what to say when the screen has gone, of a command that then goes on.

    Commands call it before their heavy imports, so that --help and a misspelt key answer at once,
    and so that Ctrl-C during those imports is one line too (run() takes over from there).
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (>&-): else the next file would take its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    found = ended(parse, sys.argv[1:], doc, flags, takes, reads)
    if outlives:
        sys.stdout = Screen(sys.stdout, outlives)  # type: ignore[assignment]
    if takes == "config" and not found.files:
        ended(partial(print, flush=True), f"no config named: taking {DEFAULT_CONFIG}")
    share_the_machine()
    found.began = work()
    for package in ("numpy", "torch"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(complain(
                f"{package} is not installed for {sys.executable}; first: . .venv/bin/activate "
                f"(or, once: {install('')})", 2))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else: started with &
        signal.signal(signal.SIGINT, lambda *_: os._exit(complain(INTERRUPTED, 1)))
    return found


def read_config(path: str, seen: tuple = ()) -> list:
    """[(file name, {key: value}), ...] from the outermost base to `path` itself. Nothing is run."""
    if not path.endswith(".py"):
        if Path("config", f"{path}.py").is_file():
            raise UserError(f"{path} is not a config file; did you mean config/{path}.py?")
        if Path(path, "run.json").is_file():
            raise UserError(f"{path} is a run; it goes on when the command that began it is given "
                            f"again (report.py {path} shows it)")
        raise UserError(f"{path} is not a config file, which ends in .py; options begin with --, "
                        f"text to prepare is named with --sources={path}")
    if not Path(path).is_file():
        raise UserError(f"no config file {path}; {configs_beside(path)}")
    if os.path.realpath(path) in seen:
        raise UserError(f"{path}: its chain of base files comes back to itself")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"), path)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # NUL bytes, not UTF-8
        raise UserError(f"{path} is not a config file: {error}") from None
    known, bases = {f.name: f for f in fields(Settings)}, []
    names: dict = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}: only `key = value` lines are allowed; configs are not run")
        name, value = node.targets[0].id, literal(node.value, names, where)
        names[name] = checked(known[name], value, where) if name in known else value
        if name == "base":
            beside = str(Path(path).parent / os.path.expanduser(str(value)))
            bases = read_config(beside, (*seen, os.path.realpath(path)))
        elif name not in known and not name.startswith("_"):  # _name: for the arithmetic below it
            raise UserError(f"{where}: unknown key {name}{unknown(name, known)}")
    return [*bases, (path, {name: value for name, value in names.items() if name in known})]


def literal(node: ast.expr, names: dict, where: str):
    """The value of a literal, of arithmetic on numbers, or of a name assigned above."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [literal(item, names, where) for item in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {key.value: literal(value, names, where)  # type: ignore[union-attr]
                for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = ast.BinOp(ast.Constant(-1), ast.Mult(), node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = literal(node.left, names, where), literal(node.right, names, where)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        huge = numbers and (abs(right) > 64 or abs(left) > 2**63)
        if numbers and not (isinstance(node.op, ast.Pow) and huge):
            try:
                return OPERATORS[type(node.op)](left, right)
            except (ZeroDivisionError, OverflowError) as error:
                raise UserError(f"{where}: {error}") from None
    raise UserError(f"{where}: {ast.unparse(node)!r} is not a literal, arithmetic, or a name "
                    "assigned above; configs are parsed, not run")


def from_text(item, text: str):
    """A value of the command line, read by the type of its key."""
    kind, name = item.type, f"--{item.name}"
    if kind is bool:
        if text.lower() not in TRUTH:
            raise UserError(f"{name}: {text!r} is not true or false")
        return TRUTH[text.lower()]
    if kind in (int, float):
        return checked(item, number(name, kind, text), name)
    if kind is object and text[:1] in "[{":
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            raise UserError(f"{name}: {text!r} is not a Python literal") from None
    if kind is not object or "," not in text or os.path.exists(os.path.expanduser(text)):
        return checked(item, text, name)
    if "" in text.split(","):
        raise UserError(f"{name}: nothing stands before or after a comma of {text!r}")
    return text.split(",")


def number(name: str, kind: type, text: str) -> int | float:
    """A number as it is written on the command line, 1e3 and 65_536 too."""
    try:
        if kind is float or text.replace("_", "").isdigit():
            return kind(text)
        if float(text) == int(float(text)):
            return int(float(text))
    except (ValueError, OverflowError):
        pass  # said below
    raise UserError(f"{name}: {text!r} is not a {'whole ' if kind is int else ''}number")


def checked(item, value, where: str):
    """`value` if it has the type and lies in the range of its key, else UserError."""
    kind, choices = item.type, item.metadata["choices"]
    low, high = item.metadata["low"], item.metadata["high"]
    whole = type(value) is float and value.is_integer()
    if (kind is float and type(value) is int and abs(value) < 2**63) or (kind is int and whole):
        value = kind(value)
    if choices == ("auto", "true", "false"):
        value = {"1": "true", "0": "false"}.get(str(value), str(value).lower())
    if kind is not object and type(value) is not kind:
        raise UserError(f"{where}: {item.name} takes {kind.__name__}, not {value!r}")
    if choices and value not in choices:
        raise UserError(f"{where}: {item.name} is one of {' | '.join(choices)}, not {value!r}"
                        f"{nearest(str(value), choices)}")
    if item.name not in (*PATHS, "sources") and re.search("[\ud800-\udfff]", str(value)):
        raise UserError(f"{where}: {item.name} is not UTF-8")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}: {item.name} is {value!r}, must be a finite number")
    if kind is int and not -2**63 <= value < 2**63:
        raise UserError(f"{where}: {item.name} is {value!r}, must fit in 64 bits")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" + (f" and at most {high}" if high is not None else "")
        raise UserError(f"{where}: {item.name} is {value!r}, must be {bounds}")
    return os.path.expanduser(value) if item.name in PATHS else value


def configs_beside(path: str) -> str:
    """The config files that could have been meant by `path`, for a message."""
    folder = Path(path).parent
    if not folder.name and Path("config").is_dir():
        folder = Path("config")
    names = sorted(p.name for p in folder.glob("*.py"))
    if close := difflib.get_close_matches(Path(path).name, names, 1, 0.7):
        return f"did you mean {folder / close[0]}?"
    listed = ", ".join(str(folder / name) for name in names[:12])
    return f"there are: {listed}{', …' if len(names) > 12 else ''}" if names else (
        f"there is none here; {CHECKOUT}/config has some")


def run_command(main, *args) -> None:
    """Run a command and leave with its exit code; what the user can mend is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):  # a screen without UTF-8 shows ? for what it lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def whole():
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main(*args)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is done: nothing is left to interrupt
        sys.stdout.flush()
        return code

    raise SystemExit(ended(whole) or 0)


def ended(call, *args):
    """Give what `call` gives; where it meets what the user can mend, leave with one line."""
    try:
        return call(*args)
    except UserError as error:
        code = complain(str(error), 2)
    except Incomplete as error:
        code = complain(str(error), 1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # we are leaving: no more of it
        code = complain(INTERRUPTED, 1)
    except MemoryError as error:
        code = complain(f"out of memory ({error}); take a smaller model or batch", 2)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        code = 1
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in DISK
        where = error.filename or ("while writing" if full else type(error).__name__)
        code = complain(f"{error.strerror}: {where}; nothing that was complete is lost",
                        1 if full else 2)
    Screen(sys.stdout, "").flush()  # Python's own at its end would be a second line
    raise SystemExit(code)


def complain(message: str, code: int) -> int:
    """Print one line on stderr and hand back the exit code."""
    screen = Screen(sys.stderr, "")
    screen.write(f"error: {' '.join(message.split())}\n")
    screen.flush()
    return code
