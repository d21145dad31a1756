"""A recipe with several seeds: python runs/seeds.py CONFIG --seeds=12,21,42 [--recipe=FILE]

Every seed has a run of its own, OUT/seed_N, and goes through the lines of a recipe, each a command
of this program, or a script FILE.py, in which {config}, {seed} and {run} are filled in. Words are
told apart as a shell does it, # begins a comment, {{ and }} are braces. Without --recipe these are

    train.py {config} --seed={seed} --out_dir={run}
    eval.py --ckpt={run} --tasks=

A line with neither {seed} nor {run} is done once, before the first seed that needs it. A line that
fails ends its seed alone, and is told.

The same command goes on where it ended. Of the recipe's lines those at its beginning that were done
before, in the same words and order, are passed over; from the first that is new or changed on all
are done again, since each may read what those before it wrote: in this seed or, where that line is
one that is done once, in every seed. So a line added or changed behind train.py trains nothing
again. If one in front of it or its own is changed, train.py is called again, and says itself that
the run is complete, goes on with it, or refuses: then it is another run, for another --out. Words
are compared, and what CONFIG says, its bases too, but no other files: where one has changed, delete
OUT/seed_N.done.json or OUT/once.done.json. Scores of lines that are gone stay with their run.

At the end every score of the newest step that has some is a mean ± the 95 % interval of Student's t
over the seeds (OUT/table.md, OUT/results.json), and OUT/report.html shows their curves as one, with
its range. A file in {run} has the same name in every seed: what is scored of it is one score. The
exit code is 1 if a seed failed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, complain, parse_arguments, run_command
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What runs/seeds.py takes."""

    seeds: str = key("1337,1338,1339", "seeds, with commas between")
    recipe: str = key("", "a file with the commands of a seed, one a line")
    out: str = key("", "folder for runs and results (default: out/CONFIG_seeds)")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import io
import os
import shlex
import signal
import string
import subprocess

from plainllama.command import read_config
from plainllama.files import hold, read_json, sha256_bytes, write_json, write_text
from plainllama.report.blocks import table_block
from plainllama.report.compare import spread
from plainllama.report.runs import load
from plainllama.report.scores import finite_scores, metrics_by_title
from plainllama.results import Score

RECIPE = "train.py {config} --seed={seed} --out_dir={run}\neval.py --ckpt={run} --tasks=\n"
SCRIPTS = ("prepare.py", "train.py", "sample.py", "eval.py", "export.py", "report.py")
FIELDS = ("config", "seed", "run")
RESULTS = ("table.md", "results.json", "report.html", "report.md")


def main(command: CommandLine) -> int:
    """Do the recipe for every seed and tell what came of it; the exit code."""
    flags = command.flags
    config, seeds, lines = asked(command.files, flags)
    out = Path(flags.out or f"out/{Path(config).stem}_seeds")
    said = {name: value for _, layer in read_config(config) for name, value in layer.items()}
    made_of = {"config": sha256_bytes(repr(sorted(said.items())).encode())}
    if read_json(out / "made_of.json") not in ({}, made_of):
        raise UserError(f"{config} has changed since {out} was begun; name another --out")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, unless nohup is in front
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        hold(lock, f"another process is at work in {out}; name another --out")
        write_json(out / "made_of.json", made_of)
        for name in RESULTS:  # they are of other lines, perhaps
            (out / name).unlink(missing_ok=True)
        failed = all_seeds(config, seeds, lines, out)
    return complain(f"{len(failed)} of {len(seeds)} seeds failed; the same command tries these "
                    "again", 1) if failed else 0


# ---- the recipe

def asked(names: list[str], flags: Flags) -> tuple[str, list[int], list[list[str]]]:
    """Read the config, the seeds and the recipe, the words of its lines. UserError for what is
    none."""
    if len(names) != 1 or not Path(names[0]).is_file():
        raise UserError(f"name one config file, not {' '.join(names) or 'none'}")
    seeds = [word.strip() for word in flags.seeds.split(",")]
    if not all(word.isdecimal() for word in seeds) or len({*map(int, seeds)}) < len(seeds):
        raise UserError(f"--seeds={flags.seeds}: say whole numbers, each once")
    recipe = Path(flags.recipe).expanduser()
    if flags.recipe and not recipe.is_file():
        raise UserError(f"no file {flags.recipe}; a recipe has a command a line")
    try:
        text = recipe.read_text("utf-8-sig") if flags.recipe else RECIPE
    except UnicodeError as error:
        raise UserError(f"{flags.recipe} is not UTF-8: {error}") from None
    lines = [words for words in map(words_of, text.split("\n")) if words]
    there = {name for words in lines for name in fields_in(words)}
    if lacking := [f"{{{name}}}" for name in ("seed", "run") if name not in there]:
        raise UserError(f"recipe: no line says {' or '.join(lacking)}: a seed needs a run of its "
                        "own, as by train.py {config} --seed={seed} --out_dir={run}")
    return names[0], [*map(int, seeds)], lines


def words_of(line: str) -> list[str]:
    """Split a line of a recipe as a shell does; [] if it is empty or a comment. UserError if it is
    no command."""
    try:
        if "\0" in line:
            raise ValueError("a zero byte")
        words = split(line)
        fields_in(words)
        if words[:1] == ["python"] and len(words) > 1:
            del words[0]
    except ValueError as error:
        raise UserError(f"recipe: {line.strip()!r} is no command with {{config}}, {{seed}} and "
                        f"{{run}} ({error}); {{{{ and }}}} are braces") from None
    if words and words[0] not in SCRIPTS and not (
            words[0].endswith(".py") and Path(words[0]).is_file()):
        raise UserError(f"recipe: {line.strip()!r} does not begin with {', '.join(SCRIPTS)} or a "
                        "file FILE.py")
    return words


def split(line: str) -> list[str]:
    """Split a line into words up to a comment, which a # begins between words alone (for
    shlex.split it does so in them, too). ValueError for an open quote."""
    stream = io.StringIO(line)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = []
    while line[stream.tell():].lstrip()[:1] not in ("", "#"):
        words.append(str(lexer.get_token()))
    return words


def fields_in(words: list[str]) -> set[str]:
    """Name what is filled in, of FIELDS. ValueError for any other use of braces."""
    found: set[str] = set()
    for word in words:
        for _, name, form, conversion in string.Formatter().parse(word):
            if name is None:  # the end of a word
                continue
            if name not in FIELDS or form or conversion:
                raise ValueError(f"{{{name}}} is none of these, or has something to it")
            found.add(name)
    return found


# ---- what is done

def all_seeds(config: str, seeds: list[int], lines: list[list[str]], out: Path) -> dict[int, str]:
    """Do the recipe for every seed and tell what came of it; what went wrong, by seed."""
    done, failed = {}, {}
    for seed in seeds:
        run = out / f"seed_{seed}"
        try:
            one_seed(lines, {"config": config, "seed": seed, "run": run})
            done[seed] = scores_of(run)
        except UserError as problem:
            failed[seed] = str(problem)
            print(f"seed {seed} failed: {problem}", flush=True)
    if done:
        tell(done, failed, out)
        runs = [str(out / f"seed_{seed}") for seed in done]
        code, last = called(["report.py", *runs, f"--out={out}/report.html"], out / "report.log")
        print(f"no report: {last}" if code else f"{out}/report.html shows the curves", flush=True)
    return failed


def one_seed(lines: list[list[str]], values: dict) -> None:
    """Do what is left of the recipe for a seed, with these values of FIELDS. UserError if a line
    fails."""
    seed, run = values["seed"], values["run"]
    note, once = run.parent / f"seed_{seed}.done.json", run.parent / "once.done.json"
    filled = [[word.format(**values) for word in line] for line in lines]
    first = alike(done_in(note), filled)
    if not run.is_dir():  # not yet, or deleted
        first = min(first, next(i for i, line in enumerate(lines) if "run" in fields_in(line)))
    for name in read_since(note, filled[:first], run.parent):
        print(f"note: {name} is newer than what seed {seed} made of it; to do it again, delete "
              f"{note}", flush=True)
    for number in range(first, len(lines)):
        words, own = filled[number], {"seed", "run"} & fields_in(lines[number])
        if own or alike(done_in(once), lines) <= number:
            # what follows is stale from now on: behind a line that is done once, in every seed
            for stale in [note] if own else [once, *run.parent.glob("seed_*.done.json")]:
                write_json(stale, {"lines": done_in(stale)[:number]})
            print(f"seed {seed}: {shlex.join(words)}", flush=True)
            code, last = called(words, run.parent / f"seed_{seed}.log")
            if code:
                why = f": {last}" if last else ""
                raise UserError(f"{shlex.join(words)} ended with {code}{why}")
            if not own:
                write_json(once, {"lines": lines[:number + 1]})
        write_json(note, {"lines": filled[:number + 1]})


def read_since(note: Path, done: list[list[str]], out: Path) -> list[str]:
    """Name the files outside of `out` which lines that are done name, and which are newer."""
    names = {name for words in done for word in words
             for name in word.rpartition("=")[2].split(",")} - {*SCRIPTS}
    files = [name for name in sorted(names) if os.path.isfile(name)
             and not Path(name).absolute().is_relative_to(out.absolute())]
    return [name for name in files if os.path.getmtime(name) > os.path.getmtime(note)]


def done_in(note: Path) -> list:
    """Read the lines that are done; none of what cannot be read, so that they are done again."""
    lines = read_json(note, tolerant=True).get("lines")
    return lines if isinstance(lines, list) else []


def alike(done: list, lines: list) -> int:
    """Count the lines at the beginning that are done."""
    pairs = zip(done, lines, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other),
                min(len(done), len(lines)))


def called(words: list[str], log: Path) -> tuple[int, str]:
    """Run a command of the program or another script, its lines in a log; the exit code and the
    last line. A signal is handed on, and the command may end well."""
    script, *others = words
    path = str(ROOT / script) if script in SCRIPTS else script
    with open(log, "a+b") as file:
        began = file.seek(0, io.SEEK_END)
        # in a session of its own, a terminal's signal does not come twice
        child = subprocess.Popen([sys.executable, path, *others], stdin=subprocess.DEVNULL,
                                 stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            print(f"interrupted: {script} is asked to end", flush=True)
            child.terminate()
            child.wait()
            raise
        file.seek(began)
        lines = file.read().decode("utf-8", "replace").splitlines()
    return code, next((line for line in reversed(lines) if line.strip()), "")


# ---- what came of it

def scores_of(run: Path) -> dict[str, Score]:
    """Read the scores of a run's newest step that has some, else its validation loss. UserError if
    there is no run, or none of these."""
    if not (run / "run.json").is_file():
        raise UserError(f"the recipe has made no run at {run}, as train.py does by "
                        "--out_dir={run}: there is no run.json")
    found = load(run)
    scores = {f"{title} {score.name}": score for evaluation in found.evals[-1:]
              for title, metrics in metrics_by_title(evaluation).items()
              for score in finite_scores(metrics)}
    loss = found.last("val_loss")
    if not scores and loss is None:
        raise UserError(f"{run} has no score and no validation loss")
    return scores or {"val_loss": Score("val_loss", loss, None, None, None, None)}


def tell(done: dict[int, dict[str, Score]], failed: dict[int, str], out: Path) -> None:
    """Write and print what the seeds that are done have scored."""
    found: dict[str, dict[int, Score]] = {}
    for seed, scores in done.items():
        for name, score in scores.items():
            found.setdefault(name, {})[seed] = score
    rows = []
    for name, by_seed in found.items():
        values, chances = zip(*((one.value, one.chance) for one in by_seed.values()), strict=True)
        rows.append([name, spread([*values]), "" if chances[0] is None else f"{chances[0]:.4f}",
                     " ".join(f"{value:.4f}" for value in values), str(len(values))])
    title = f"Seeds {', '.join(map(str, done))}" + "".join(
        f"; seed {seed} failed" for seed in failed)
    table = table_block(["score", "mean ± 95 % interval", "chance", "by seed", "seeds"], rows)
    print(f"{title}\n\n{table.markdown}", flush=True)
    write_text(out / "table.md", f"{title}\n\n{table.markdown}\n")
    write_json(out / "results.json", {
        "seeds": [*done], "failed": failed, "scores": {
            name: {seed: score.value for seed, score in by_seed.items()}
            for name, by_seed in found.items()}})


if __name__ == "__main__":
    run_command(main, COMMAND)
