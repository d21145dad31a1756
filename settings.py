"""The typed config: dataclasses, config files that are parsed and never run, --key=value, --help.

A config file holds assignments of literals, of arithmetic on literals and on names assigned above,
and may begin with `base = 'other.py'`: it is then a difference from that file. Precedence: default,
base, file, command line.
"""

import ast
import difflib
import errno
import importlib.util
import io
import json
import operator
import os
import signal
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

DEFAULT_CONFIG = "config/llama100m.py"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # it is full or broken
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
INTERRUPTED = "interrupted; the same command goes on from what is complete"


class UserError(Exception):
    """What the user can mend: one line that says what was found and what to do. Exit code 2."""


def key(default, why: str, choices: tuple = (), low=None, high=None):
    """A config key: its default, a line for --help, and what values it may take."""
    meta = {"why": why, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class Settings:
    """Every key of a run. The defaults are those of config/llama100m.py."""

    # data
    dataset: str = key("openwebtext", "folder under data/ that prepare.py writes")
    sources: object = key(
        "hf:ashaba1in/small_openwebtext",
        "text: a path, glob, -, hf:NAME[@REV][:split], embedded, a dict, or a list of these",
    )
    tokenizer: str = key("mistral", "mistral, gpt2, bytes, bpe:4096 (trained on the text), a path")
    val_fraction: float = key(0.005, "share of documents held out", low=1e-9, high=0.5)
    min_chars: int = key(0, "documents with fewer characters are dropped", low=0)
    max_chars: int = key(0, "documents with more characters are dropped (0: no bound)", low=0)
    dedup: str = key("none", "which repeated documents are dropped", ("none", "exact", "near"))
    strict: bool = key(False, "stop at a record that cannot be read, which else is only counted")
    workers: int = key(0, "processes of prepare.py (0: one per core)", low=0)
    packing: str = key("concat", "doc: a row holds tokens of one document", ("concat", "doc"))
    mixture: object = key(None, "train on several data sets: {'a': 0.7, 'b': 0.3}")
    # model
    n_layer: int = key(16, "transformer blocks", low=1)
    n_head: int = key(12, "query heads", low=1)
    n_kv_head: int = key(0, "key and value heads (0: as many as query heads)", low=0)
    d_model: int = key(768, "width of the residual stream", low=2)
    d_ff: int = key(2048, "hidden width of the SwiGLU", low=1)
    vocab_size: int = key(0, "entries of the embedding (0: from the data set)", low=0)
    block_size: int = key(1024, "context length in tokens", low=1)
    rope_theta: float = key(10000.0, "base of the rotary frequencies", low=1)
    rope_scaling: str = key("none", "stretch of the positions", ("none", "linear", "llama3"))
    rope_factor: float = key(1.0, "by how much the context is stretched", low=1)
    rope_original: int = key(0, "context length before the stretch (llama3)", low=0)
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", low=0)
    tie_embeddings: bool = key(False, "one matrix for embedding and output")
    attention: str = key("sdpa", "attention back end",
                         ("sdpa", "varlen", "xformers", "reference"))
    doc_mask: bool = key(False, "tokens see their own document only")
    # training
    out_dir: str = key("", "the run's folder (default: out/<config file's name>)")
    init_from: str = key("", "start from the weights of this checkpoint, run or model folder")
    resume: str = key("auto", "go on from out_dir's newest checkpoint", ("auto", "must", "never"))
    seed: int = key(1337, "seeds weights and data order", low=0)
    max_steps: int = key(2300, "optimizer updates", low=1)
    global_batch_tokens: int = key(524288, "tokens per optimizer update, over all devices", low=1)
    micro_batch: int = key(0, "rows per forward pass and device (0: as many as fit)", low=0)
    optimizer: str = key("adamw", "muon: for the blocks' matrices, AdamW for the rest",
                         ("adamw", "muon"))
    learning_rate: float = key(6e-4, "peak learning rate", low=0)
    min_lr: float = key(6e-5, "learning rate at the end", low=0)
    schedule: str = key("cosine", "shape of the learning rate", ("cosine", "wsd", "linear"))
    warmup_steps: int = key(200, "steps of linear warm-up", low=0)
    weight_decay: float = key(0.1, "decoupled decay, on matrices only", low=0)
    beta1: float = key(0.9, "AdamW first moment (Muon's momentum is 0.95)", low=0, high=1)
    beta2: float = key(0.95, "AdamW second moment", low=0, high=1)
    grad_clip: float = key(1.0, "largest gradient norm (0: no clipping)", low=0)
    device: str = key("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = key("auto", "matmul precision; weights stay fp32",
                     ("auto", "fp32", "bf16", "fp16"))
    compile: str = key("auto", "torch.compile", ("auto", "true", "false"))
    parallel: str = key("auto", "how ranks share the work",
                        ("auto", "ddp", "fsdp", "hsdp"))
    activation_checkpointing: bool = key(False, "compute blocks twice to save memory")
    overfit_rows: int = key(0, "train on this many rows again and again (a sanity check)", low=0)
    max_minutes: float = key(0.0, "stop with a checkpoint after this long (0: never)", low=0)
    deterministic: bool = key(False, "the same bits on 1, 2, 4, 8, ... ranks (one process, ddp)")
    # cadence
    log_interval: int = key(10, "steps between lines of metrics", low=1)
    logger: str = key("none", "also log to this service, over the network", ("none", "wandb"))
    eval_interval: int = key(100, "steps between evaluations", low=1)
    eval_tokens: int = key(1048576, "validation tokens per evaluation", low=1)
    sample_tokens: int = key(64, "tokens of the text that an evaluation samples (0: none)", low=0)
    sample_prompt: str = key("", "what that text begins with")
    save_interval: int = key(100, "steps between checkpoints", low=1)
    keep_last: int = key(2, "newest checkpoints that are kept, beside the best", low=1)
    keep_every: int = key(0, "also keep every checkpoint at a multiple of this step", low=0)


GROUPS = {"dataset": "data", "n_layer": "model", "out_dir": "training", "log_interval": "cadence"}


@dataclass
class Sampling:
    """How a token is drawn: in this order, which is that of transformers."""

    repetition_penalty: float = key(1.0, "above 1: what was said is less likely again", low=1e-3)
    temperature: float = key(1.0, "divides the logits; 0: always the likeliest token", low=0)
    top_k: int = key(0, "draw from the k likeliest tokens (0: from all)", low=0)
    top_p: float = key(1.0, "draw from the likeliest tokens of this joint probability", (), 0, 1)
    min_p: float = key(0.0, "drop tokens below this share of the likeliest's probability", (), 0, 1)


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


def parse(argv: list, doc: str | None, flags: type | None = None,
          takes: str = "config") -> CommandLine:
    """Read a command line. `takes`: 'config' (a file and all its keys) or 'files' (flags alone).

    Answers --help and exits. Raises UserError for anything it does not understand.
    """
    known = {f.name: f for f in (fields(flags) if flags else ())}
    if takes == "config":
        known |= {f.name: f for f in fields(Settings)}
    files, given = [], {}
    words = iter(argv)
    for word in words:
        if word in ("--help", "-h"):
            print(help_text(doc, known))
            raise SystemExit(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise UserError(f"unknown option --{name}{nearest(name, known)}")
        if not equals:
            text = "true" if known[name].type is bool else next(words, None)
            if text is None:
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
        given[name] = from_text(known[name], text)
    names = {f.name for f in fields(Settings)} if takes == "config" else set()
    own = flags(**{k: v for k, v in given.items() if k not in names}) if flags else None
    if takes != "config":
        return CommandLine(Settings(), own, files, "", "", {}, given)
    if len(files) > 1:
        raise UserError(f"expected one config file, found {len(files)}: {' '.join(files)}")
    if not files:
        print(f"no config named: taking {DEFAULT_CONFIG}", flush=True)
    config_file = files[0] if files else str(Path(__file__).parent / DEFAULT_CONFIG)
    layers = read_config(config_file)
    overrides = {k: v for k, v in given.items() if k in names}
    config = Settings()
    for name, value in (pair for _, layer in layers for pair in layer.items()):
        setattr(config, name, value)
    for name, value in overrides.items():
        setattr(config, name, value)
    config.out_dir = config.out_dir or f"out/{Path(config_file).stem}"
    check(config)
    base = layers[-2][0] if len(layers) > 1 else ""
    return CommandLine(config, own, files, config_file, base, layers[-1][1], overrides)


def command(doc: str | None, flags: type | None = None, takes: str = "config") -> CommandLine:
    """parse() of this process's arguments; what the user can mend is one line and exit code 2.

    Commands call it before their heavy imports, so that --help and a misspelt key answer at once,
    and so that Ctrl-C during those imports is one line too (run() takes over from there).
    """
    try:
        found = parse(sys.argv[1:], doc, flags, takes)
    except UserError as error:
        raise SystemExit(complain(str(error), 2)) from None
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
    if Path(path).is_file() and not path.endswith(".py"):
        raise UserError(f"{path} is not a config file, which ends in .py; text to prepare is named "
                        f"with --sources={path}")
    if not Path(path).is_file():
        hint = "" if path.endswith(".py") else " (a config file ends in .py; options begin with --)"
        raise UserError(f"no config file {path}{hint}; there are: {configs_beside(path)}")
    if os.path.realpath(path) in seen:
        raise UserError(f"{path}: its chain of base files comes back to itself")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except (SyntaxError, ValueError) as error:  # ValueError: NUL bytes, not UTF-8
        raise UserError(f"{path} is not a config file: {error}") from None
    known = {f.name: f for f in fields(Settings)}
    values: dict = {}
    names: dict = {}
    bases: list = []
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}: only `key = value` lines are allowed; configs are not run")
        name, value = node.targets[0].id, literal(node.value, names, where)
        names[name] = value
        if name == "base":
            bases = read_config(str(Path(path).parent / str(value)),
                                (*seen, os.path.realpath(path)))
        elif name in known:
            values[name] = checked(known[name], value, where)
        elif not name.startswith("_"):  # _name: a help value for the arithmetic below it
            raise UserError(f"{where}: unknown key {name}{nearest(name, known)}")
    return [*bases, (str(path), values)]


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def literal(node: ast.expr, names: dict, where: str):
    """The value of a literal, of arithmetic on numbers, or of a name assigned above."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [literal(item, names, where) for item in node.elts]
    if isinstance(node, ast.Dict) and all(node.keys):
        return {literal(k, names, where): literal(v, names, where)
                for k, v in zip(node.keys, node.values, strict=True) if k}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = literal(node.operand, names, where)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = literal(node.left, names, where), literal(node.right, names, where)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers and not (isinstance(node.op, ast.Pow) and abs(right) > 64):
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
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"{name}: {text!r} is not true or false")
        return text.lower() in ("true", "1", "yes")
    if kind is object:  # sources: a list with commas, or a literal
        if text[:1] in "[{":
            try:
                return ast.literal_eval(text)
            except (SyntaxError, ValueError):
                raise UserError(f"{name}: {text!r} is not a Python literal") from None
        return text.split(",") if "," in text else text
    if kind in (int, float):
        try:
            number = float(text.replace("_", ""))
            if kind is int and number != int(number):
                raise ValueError
            value = int(text.replace("_", "")) if kind is int and text.isdigit() else kind(number)
        except (ValueError, OverflowError):
            noun = "a whole number" if kind is int else "a number"
            raise UserError(f"{name}: {text!r} is not {noun}") from None
        return checked(item, value, name)
    return checked(item, text, name)


def checked(item, value, where: str):
    """`value` if it has the type and lies in the range of its key, else UserError."""
    kind, meta = item.type, item.metadata
    if kind is float and type(value) is int:
        value = float(value)
    if item.metadata["choices"] == ("auto", "true", "false") and isinstance(value, bool):
        value = str(value).lower()
    if kind is not object and type(value) is not kind:
        raise UserError(f"{where}: {item.name} takes {kind.__name__}, not {value!r}")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{where}: {item.name} is one of {' | '.join(meta['choices'])}, "
                        f"not {value!r}{nearest(str(value), meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" + (f" and at most {high}" if high is not None else "")
        raise UserError(f"{where}: {item.name} is {value!r}, must be {bounds}")
    return value


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml."""
    return "python -m pip install -c constraints.txt -e " + (f"'.[{extra}]'" if extra else ".")


def nearest(name: str, known) -> str:
    """'; did you mean X?' for a misspelt name, or ''."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def configs_beside(path: str) -> str:
    """The config files that could have been meant by `path`, for a message."""
    folder = Path(path).parent
    if not folder.name and Path("config").is_dir():
        folder = Path("config")
    found = sorted(str(p) for p in folder.glob("*.py"))
    near = difflib.get_close_matches(path, [*found, *(Path(p).name for p in found)], 1, 0.7)
    return ", ".join(found[:12]) + (
        f"; did you mean {folder / Path(near[0]).name}?" if near else "") or "none here"


def help_text(doc: str | None, known: dict) -> str:
    """The command's docstring and a line for every option."""
    lines = [(doc or "").strip(), "", "options:"]
    for name, item in known.items():
        if name in GROUPS and item.metadata["why"]:
            lines.append(f"\n  {GROUPS[name]} (config file or command line)")
        default = item.default if item.default is not MISSING else []
        shown = " | ".join(item.metadata["choices"]) or item.metadata["why"]
        if item.metadata["choices"]:
            shown = f"{item.metadata['why']}: {shown}"
        lines.append(f"  --{name + '=' + str(default):<36} {shown}")
    return "\n".join(lines)


def check(config: Settings) -> None:
    """Refuse, before anything slow starts, keys that do not fit together."""
    c = config
    kv = c.n_kv_head or c.n_head
    rules = [
        (c.d_model % c.n_head == 0,
         f"d_model {c.d_model} does not divide into n_head {c.n_head} heads"),
        (c.d_model // c.n_head % 2 == 0 or c.d_model % c.n_head,
         f"the head width d_model / n_head = {c.d_model / c.n_head:g} must be even (RoPE)"),
        (c.n_head % kv == 0, f"n_head {c.n_head} is not a multiple of n_kv_head {kv}"),
        (c.global_batch_tokens % c.block_size == 0,
         f"global_batch_tokens {c.global_batch_tokens} is not a multiple of block_size "
         f"{c.block_size}; try {max(1, c.global_batch_tokens // c.block_size) * c.block_size}"),
        (c.min_lr <= c.learning_rate,
         f"min_lr {c.min_lr} is above learning_rate {c.learning_rate}"),
        (c.rope_scaling == "none" or c.rope_factor > 1,
         f"rope_scaling={c.rope_scaling} needs rope_factor above 1, found {c.rope_factor}"),
        (c.rope_scaling != "none" or c.rope_factor == 1,
         f"rope_factor {c.rope_factor} has no effect without rope_scaling=linear or llama3"),
        (c.rope_scaling != "llama3" or c.rope_original > 0,
         "rope_scaling=llama3 needs rope_original, the context length before the stretch"),
    ]
    if c.mixture is not None:
        pairs = list(c.mixture.items()) if isinstance(c.mixture, dict) else []
        rules += [
            (bool(pairs) and all(isinstance(name, str) and type(weight) in (int, float)
                                 and 0 < weight < float("inf") for name, weight in pairs),
             f"mixture {c.mixture!r} is not {{'NAME': weight, ...}} with data sets under data/ and "
             "weights above 0"),
            (not c.overfit_rows, "overfit_rows takes the rows of one data set, not of a mixture")]
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def to_json(path, value) -> None:
    """Write `value` as JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1, default=asdict) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def run(main, *args) -> None:
    """Run a command and leave with its exit code; what the user can mend is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):  # a screen without UTF-8 shows ? for what it lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main(*args)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is done: nothing is left to interrupt
    except UserError as error:
        code = complain(str(error), 2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # we are leaving: no more of it
        code = complain(INTERRUPTED, 1)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in (*DISK, *REFUSED):
            raise
        code = complain(f"{error.strerror}: {error.filename or 'while writing'}; nothing that was "
                        "complete is lost", 1 if error.errno in DISK else 2)
    raise SystemExit(code or 0)


def complain(message: str, code: int) -> int:
    """Print one line on stderr and hand back the exit code."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code
