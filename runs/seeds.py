"""A recipe with several seeds: python runs/seeds.py CONFIG --seeds=12,21,42 [--recipe=FILE]

Every seed has a run of its own, OUT/seed_N, and goes through the lines of a recipe, each a command
of this program in which {config}, {seed} and {run} are filled in. Without --recipe these are

    train.py {config} --seed={seed} --out_dir={run}
    eval.py --ckpt={run} --tasks=

A line with neither {seed} nor {run} is done once, before the first seed that needs it. What was
done is not done again; a line that fails ends its seed alone, and is told. At the end every score
of the newest step that has some is a mean ± the 95 % interval of Student's t over the seeds
(OUT/table.md, OUT/results.json), and OUT/report.html shows their curves as one, with its range. The
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

import math
import shlex
import subprocess
from statistics import mean, stdev

from plainllama.files import read_json, sha256, write_json, write_text
from plainllama.report.compare import T_95
from plainllama.report.page import finite_scores, metrics_by_title
from plainllama.report.runs import load

RECIPE = "train.py {config} --seed={seed} --out_dir={run}\neval.py --ckpt={run} --tasks=\n"
SCRIPTS = ("prepare.py", "train.py", "sample.py", "eval.py", "export.py", "report.py")


def main(command: CommandLine) -> int:
    """Do the recipe for every seed and tell what came of it; the exit code."""
    flags = command.flags
    config, seeds, lines = asked(command.files, flags)
    out = Path(flags.out or f"out/{Path(config).stem}_seeds")
    made_of = {"config": sha256(Path(config))}
    if read_json(out / "made_of.json", tolerant=True) not in ({}, made_of):
        raise UserError(f"{config} has changed since {out} was begun; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "made_of.json", made_of)
    failed = {seed: problem for seed in seeds
              if (problem := one_seed(lines, config, seed, out / f"seed_{seed}"))}
    done = [seed for seed in seeds if seed not in failed]
    for seed, problem in failed.items():
        print(f"seed {seed} failed: {problem}", flush=True)
    if done:
        tell(done, failed, out)
        runs = [str(out / f"seed_{seed}") for seed in done]
        (out / "report.html").unlink(missing_ok=True)
        (out / "report.md").unlink(missing_ok=True)
        called(["report.py", *runs, f"--out={out}/report.html"], out / "report.log")
    return complain(f"{len(failed)} of {len(seeds)} seeds failed; the same command tries these "
                    "again", 1) if failed else 0


def asked(names: list[str], flags: Flags) -> tuple[str, list[int], list[str]]:
    """Read the config, the seeds and the lines of the recipe. UserError for what is none."""
    if len(names) != 1 or not Path(names[0]).is_file():
        raise UserError(f"name one config file, not {' '.join(names) or 'none'}")
    seeds = [word.strip() for word in flags.seeds.split(",")]
    if not all(word.isdecimal() for word in seeds) or len({*map(int, seeds)}) < len(seeds):
        raise UserError(f"--seeds={flags.seeds}: say whole numbers, each once")
    if flags.recipe and not Path(flags.recipe).is_file():
        raise UserError(f"no file {flags.recipe}; a recipe has a command a line")
    text = Path(flags.recipe).read_text("utf-8") if flags.recipe else RECIPE
    lines = [line.strip() for line in text.splitlines() if line.split("#")[0].strip()]
    for line in lines:
        try:
            words = shlex.split(line.format(config="c", seed=1, run="r"))
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"recipe: {line!r} is no command with {{config}}, {{seed}} and {{run}} "
                            f"({error})") from None
        script = words[0] if words[0] != "python" else "".join(words[1:2])
        if not (script in SCRIPTS or (script.endswith(".py") and Path(script).is_file())):
            raise UserError(f"recipe: {line!r} does not begin with {', '.join(SCRIPTS)} or a file "
                            "FILE.py")
    return names[0], [*map(int, seeds)], lines


def one_seed(lines: list[str], config: str, seed: int, run: Path) -> str:
    """Do what is left of the recipe for a seed; what went wrong, or ''."""
    for line in lines:
        own = "{seed}" in line or "{run}" in line
        note = run.parent / (f"seed_{seed}.done.json" if own else "once.done.json")
        done = read_json(note, tolerant=True).get("lines", [])
        words = shlex.split(line.format(config=config, seed=seed, run=run))
        if words in done:
            continue
        print(f"seed {seed}: {shlex.join(words)}", flush=True)
        code, last = called(words, run.parent / f"seed_{seed}.log")
        if code:
            return f"{shlex.join(words)} ended with {code}: {last}"
        write_json(note, {"lines": [*done, words]})
    return ""


def called(words: list[str], log: Path) -> tuple[int, str]:
    """Run a command of the program or another script, its lines in a log; the exit code and the
    last line."""
    script = [word for word in words if word != "python"] if words[0] == "python" else words
    path = str(ROOT / script[0]) if script[0] in SCRIPTS else script[0]
    with open(log, "ab") as file:
        code = subprocess.run([sys.executable, path, *script[1:]], stdout=file,
                              stderr=subprocess.STDOUT).returncode
    lines = log.read_text("utf-8", "replace").splitlines()
    return code, next((line for line in reversed(lines) if line.strip()), "")


def tell(done: list[int], failed: dict[int, str], out: Path) -> None:
    """Write and print what the seeds that are done have scored."""
    found: dict[str, dict[int, float]] = {}
    chances: dict[str, float | None] = {}
    for seed in done:
        run = load(out / f"seed_{seed}")
        scores = {f"{title} {score.name}": score for evaluation in run.evals[-1:]
                  for title, metrics in metrics_by_title(evaluation).items()
                  for score in finite_scores(metrics)}
        scored = {name: score.value for name, score in scores.items()}
        chances |= {name: score.chance for name, score in scores.items()}
        for name, value in (scored or {"val_loss": run.last("val_loss")}).items():
            found.setdefault(name, {})[seed] = value
    rows = []
    for name, values in found.items():
        chance = chances.get(name)
        rows.append([name, spread([*values.values()]), "" if chance is None else f"{chance:.4f}",
                     " ".join(f"{value:.4f}" for value in values.values()), str(len(values))])
    title = f"Seeds {', '.join(map(str, done))}" + "".join(
        f"; seed {seed} failed" for seed in failed)
    lines = [title, "", "| score | mean ± 95 % interval | chance | by seed | seeds |",
             "|---|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(lines))
    write_text(out / "table.md", "\n".join(lines) + "\n")
    write_json(out / "results.json", {"seeds": done, "failed": failed, "scores": found})


def spread(values: list[float]) -> str:
    """Write the mean of some seeds, with the 95 % interval of Student's t if there are several."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    t = T_95[min(len(values), len(T_95)) - 1]  # of more seeds the interval is a little too wide
    return f"{mean(values):.4f} ± {t * stdev(values) / math.sqrt(len(values)):.4f}"


if __name__ == "__main__":
    run_command(main, COMMAND)
