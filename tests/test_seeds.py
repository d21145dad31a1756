"""runs/seeds.py: what is done once, what is done again, and what a failed seed leaves."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from statistics import mean, stdev

import pytest
from conftest import ROOT, TUNED, documents, run_script, write_data_set

from plainllama.files import hold, read_json

ARGUMENTS = "c.py", "--seeds=3,1,2", "--recipe=recipe.txt"
run_script = partial(run_script, code="import forks; forks.fork_scripts()")


def test_seeds_are_trained_scored_and_told(tmp_path):
    """One seed fails, the others go on; its remedy makes it alone; a third start does nothing."""
    write_data_set(tmp_path / "data/toy", {"train": documents(60), "val": documents(6)})
    (tmp_path / "c.py").write_text(TUNED)
    (tmp_path / "once.py").write_text("print(1, file=open('once.txt', 'a'))\n")
    (tmp_path / "fussy.py").write_text(
        "import os, sys\n"
        "sys.exit('no luck' if sys.argv[1] == '1' and os.path.exists('bad') else 0)")
    (tmp_path / "bad").touch()
    (tmp_path / "recipe.txt").write_text(
        "python once.py\n# trains\ntrain.py {config} --seed={seed} --out_dir={run}\n\n"
        "fussy.py {seed}\neval.py --ckpt={run} --tasks=\n")
    done = run_script("runs/seeds.py", *ARGUMENTS, cwd=tmp_path)
    assert done.returncode == 1 and "1 of 3 seeds failed" in done.stderr
    assert "seed 1 failed: fussy.py 1 ended with 1: no luck" in done.stdout
    out = tmp_path / "out/c_seeds"
    assert read_json(out / "results.json")["seeds"] == [3, 2]
    (tmp_path / "bad").unlink()
    done = run_script("runs/seeds.py", *ARGUMENTS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "seed 1: fussy.py 1" in done.stdout and "seed 1: train.py" not in done.stdout
    values = [*read_json(out / "results.json")["scores"]["validation bits per byte"].values()]
    assert len(values) == 3 and len(set(values)) == 3
    told = f"{mean(values):.4f} ± {4.303 * stdev(values) / math.sqrt(3):.4f}"
    assert told in done.stdout and told in (out / "table.md").read_text()
    assert "2 other seeds" in (out / "report.html").read_text()
    again = run_script("runs/seeds.py", *ARGUMENTS, cwd=tmp_path)
    assert again.returncode == 0 and "seed 3: " not in again.stdout
    assert (tmp_path / "once.txt").read_text() == "1\n" and "newer" not in again.stdout
    os.utime(tmp_path / "once.py", (time.time() + 9,) * 2)
    again = run_script("runs/seeds.py", *ARGUMENTS, cwd=tmp_path)
    assert "note: once.py is newer than what seed 3 made of it; to do it again" in again.stdout
    (tmp_path / "c.py").write_text(TUNED + "\nweight_decay = 0.2\n")
    changed = run_script("runs/seeds.py", *ARGUMENTS, cwd=tmp_path)
    assert changed.returncode == 2 and "c.py has changed since" in changed.stderr


@pytest.mark.parametrize(("words", "says"), [
    ((), "name one config file"), (("no.py",), "name one config file"),
    (("c.py", "--seeds=1,1"), "each once"), (("c.py", "--seeds=x"), "whole numbers"),
    (("c.py", "--recipe=none.txt"), "no file none.txt"),
    (("c.py", "--recipe=odd.txt"), "is no command with"),
    (("c.py", "--recipe=shell.txt"), "does not begin with")])
def test_what_is_wrong_is_said(tmp_path, words, says):
    (tmp_path / "c.py").write_text(TUNED)
    (tmp_path / "odd.txt").write_text("train.py {conf}\n")
    (tmp_path / "shell.txt").write_text("rm -rf {run}\n")
    done = run_script("runs/seeds.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


# ---- without training: a script that makes what a run is known by, and says what it was told

MAKE = """
import json, sys
from pathlib import Path
seed, run, *tasks = sys.argv[1:]
run = Path(run)
print("made", seed, tasks, file=open("told.txt", "a"))
(run / "eval").mkdir(parents=True, exist_ok=True)
info = dict.fromkeys(("config", "data", "device", "parameters"), {})
(run / "run.json").write_text(json.dumps(info))
(run / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 9, "val_loss": 2.0}) + "\\n")
scores = {name.replace("@", str(run)): {
    "auroc": int(seed) / 10, f"auroc minus {run}/b.parquet": 0.1, "n": 9,
    "margins": {f"auroc minus {run}/b.parquet": 0.02},
    "folds": {f"auroc minus {run}/b.parquet": [0.1]}} for name in tasks}
(run / "eval/step_1.json").write_text(json.dumps({"step": 1, "tokens": 9, "tasks": scores}))
"""
TELL = "import sys; print(*sys.argv[1:], file=open('told.txt', 'a'))\n"
TRAINS = "make.py {seed} {run}\n"


@pytest.fixture
def place(tmp_path):
    """A folder with a config and scripts for a recipe."""
    (tmp_path / "c.py").write_text(TUNED)
    (tmp_path / "make.py").write_text(MAKE)
    (tmp_path / "tell.py").write_text(TELL)
    return tmp_path


def start(place, recipe: str, *words: str):
    """Start the recipe; what came of it, and what its scripts were told."""
    (place / "recipe.txt").write_text(recipe)
    (place / "told.txt").unlink(missing_ok=True)
    words = words or ("--seeds=3,1,2",)
    done = run_script("runs/seeds.py", "c.py", "--recipe=recipe.txt", *words, cwd=place)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    told = place / "told.txt"
    return done, told.read_text().splitlines() if told.exists() else []


def test_a_file_of_the_runs_own_is_one_score_of_all_seeds(place):
    recipe = ("make.py {seed} {run} probe:@/c.parquet probe:d.parquet,@/e.parquet probe:./@/f "
              "probe:far@/g\n")
    done, _ = start(place, recipe, "--seeds=3,1,2")
    assert done.returncode == 0, done.stdout
    scores = read_json(place / "out/c_seeds/results.json")["scores"]
    for name in ("probe:c.parquet", "probe:d.parquet,e.parquet", "probe:f"):
        assert scores[f"{name} auroc"] == {"3": 0.3, "1": 0.1, "2": 0.2}
        assert set(scores[f"{name} auroc minus b.parquet"]) == set("312")
    assert len([name for name in scores if "far" in name]) == 6  # not of the run: a score each
    assert "| probe:c.parquet auroc | 0.2000 ± 0.2484 |" in done.stdout
    page = (place / "out/c_seeds/report.md").read_text()
    assert page.count("probe:c.parquet auroc |") == 3  # one name for the three


def test_a_beginning_that_was_done_is_not_done_again_and_all_behind_a_change_is(place):
    one, two, three = "tell.py one {seed}\n", "tell.py two {seed}\n", "tell.py three {seed}\n"
    made = [f"made {seed} []" for seed in (3, 1)]

    def told(recipe):
        done, lines = start(place, recipe, "--seeds=3,1")
        assert done.returncode == 0, done.stdout
        return lines

    assert told(TRAINS + one) == [made[0], "one 3", made[1], "one 1"]
    assert told(TRAINS + one) == []
    assert told(TRAINS + one + two) == ["two 3", "two 1"]  # trains nothing again
    assert told(TRAINS + one + two + two) == ["two 3", "two 1"]  # twice, since it stands there so
    assert told(TRAINS + three + two) == ["three 3", "two 3", "three 1", "two 1"]
    assert told(TRAINS + one) == ["one 3", "one 1"]  # not what an earlier recipe did
    assert told("# why\n" + TRAINS + "  tell.py   one '{seed}' # as before\n") == []
    assert told(one + TRAINS) == ["one 3", made[0], "one 1", made[1]]
    assert told(one + TRAINS + two + three) == ["two 3", "three 3", "two 1", "three 1"]
    assert told(one + TRAINS + three) == ["three 3", "three 1"]
    assert told(one + TRAINS) == []  # a line less: nothing comes after it


def test_what_failed_in_the_middle_is_begun_there(place):
    recipe = TRAINS + "tell.py a {seed}\nfail.py {seed}\ntell.py b {seed}\n"
    fail = "import sys, os; sys.exit(os.path.exists('bad') and sys.argv[1] == '1' and 'no luck')"
    (place / "fail.py").write_text(fail)
    (place / "bad").touch()
    done, told = start(place, recipe, "--seeds=1,2")
    assert done.returncode == 1 and told == ["made 1 []", "a 1", "made 2 []", "a 2", "b 2"]
    changed = recipe.replace(" a ", " c ")  # while it is broken: what is behind the change is not
    done, told = start(place, changed, "--seeds=1,2")  # taken for done by a change back
    assert done.returncode == 1 and told == ["c 1", "c 2", "b 2"]
    (place / "bad").unlink()
    done, told = start(place, recipe, "--seeds=1,2")
    assert done.returncode == 0 and told == ["a 1", "b 1", "a 2", "b 2"]


@pytest.mark.parametrize("own", ["", " {seed}"])
def test_what_a_failed_line_may_have_spoilt_is_done_again(place, own):
    (place / "half.py").write_text("import sys; sys.exit('no luck')")
    sound = TRAINS + f"tell.py labels{own}\ntell.py probe {{seed}}\n"
    assert start(place, sound, "--seeds=1")[0].returncode == 0
    done, _ = start(place, sound.replace("tell.py labels", "half.py labels"), "--seeds=1")
    assert done.returncode == 1 and "no luck" in done.stdout
    labels = "labels 1" if own else "labels"
    assert start(place, sound, "--seeds=1")[1] == [labels, "probe 1"]


def test_what_is_done_once_is_followed_by_all_seeds_if_it_changes(place):
    def told(recipe, seeds="--seeds=1,2"):
        done, lines = start(place, recipe, seeds)
        assert done.returncode == 0, done.stdout
        return lines

    first = "tell.py labels\n" + TRAINS + "tell.py probe {seed}\n"
    assert told(first) == ["labels", "made 1 []", "probe 1", "made 2 []", "probe 2"]
    assert told(first, "--seeds=1,2,3") == ["made 3 []", "probe 3"]
    late = TRAINS + "tell.py labels\ntell.py probe {seed}\n"
    told(late)
    changed = late.replace("labels", "labels --new")
    assert told(changed, "--seeds=1") == ["labels --new", "probe 1"]
    assert told(changed) == ["probe 2"]  # which was not asked for when the line was done
    assert told(late, "--seeds=2") == ["labels", "probe 2"]
    assert told(late) == ["probe 1"]
    other = changed + "tell.py other {seed}\n"
    assert told(other, "--seeds=1") == ["labels --new", "probe 1", "other 1"]
    # seed 2 has seen the old labels alone, and those are not there any more
    assert told(late + "tell.py other {seed}\n", "--seeds=2") == ["labels", "probe 2", "other 2"]
    assert told(TRAINS + "tell.py new {seed}\ntell.py labels\n") == [
        "new 1", "labels", "new 2"]  # it may use what was done before it


def test_a_run_that_was_deleted_is_made_again_and_so_is_what_nothing_is_known_of(place):
    recipe = "tell.py first {seed}\n" + TRAINS + "tell.py last {seed}\n"
    start(place, recipe, "--seeds=1,2")
    shutil.rmtree(place / "out/c_seeds/seed_2")
    done, told = start(place, recipe, "--seeds=1,2")
    assert done.returncode == 0 and told == ["made 2 []", "last 2"], done.stdout
    for damaged in ("{", '{"lines": 5}', "[]"):
        (place / "out/c_seeds/seed_1.done.json").write_text(damaged)
        done, told = start(place, recipe, "--seeds=1,2")
        assert done.returncode == 0 and told == ["first 1", "made 1 []", "last 1"], done.stdout


def test_of_a_config_what_it_says_counts_and_what_its_bases_say(place):
    (place / "base.py").write_text(TUNED)
    (place / "c.py").write_text("base = 'base.py'\nmax_steps = 8\n")
    assert start(place, TRAINS, "--seeds=1")[0].returncode == 0
    (place / "c.py").write_text("# of a moment\nbase = 'base.py'\nmax_steps = 2 * 4\n")
    assert start(place, TRAINS, "--seeds=1")[1] == []
    (place / "base.py").write_text(TUNED + "weight_decay = 0.3\n")
    done, told = start(place, TRAINS, "--seeds=1")
    assert done.returncode == 2 and told == [] and "c.py has changed since" in done.stderr
    assert "name another --out" in done.stderr
    (place / "base.py").write_text("weight_decai = 0.3\n")
    done, _ = start(place, TRAINS, "--seeds=1")
    assert done.returncode == 2 and "unknown key weight_decai" in done.stderr


def test_words_are_those_of_a_shell_and_paths_may_hold_anything(place):
    (place / "d e").mkdir()
    for name in ("d e/c {x} 'y.py", "d e/tell #1.py"):
        (place / name).write_text((place / ("c.py" if "c {" in name else "tell.py")).read_text())
    (place / "recipe.txt").write_text(
        "\ufeffmake.py {seed} {run}  # trains {it}, isn't it\n   # nothing\n"
        "python 'd e/tell #1.py' python {config} '{run}/x y' a#b \"{{'a': 1}}\" '#' \"\" # {seed}\n"
        "\"d e/tell #1.py\" {{seed}}\n", encoding="utf-8")
    done = run_script("runs/seeds.py", "d e/c {x} 'y.py", "--seeds=1,2", "--recipe=recipe.txt",
                      "--out=o u/t {run}", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = [f"python d e/c {{x}} 'y.py o u/t {{run}}/seed_{seed}/x y a#b {{'a': 1}} # "
                for seed in (1, 2)]
    assert (place / "told.txt").read_text().splitlines() == [
        "made 1 []", one, "{seed}", "made 2 []", two]
    assert (place / "o u/t {run}/table.md").exists()


@pytest.mark.parametrize("line", [
    "tell.py {seed.real}", "tell.py {seed[0]}", "tell.py {0}", "tell.py {}", "tell.py {",
    "tell.py }", "tell.py {seed!r}", "tell.py {seed:>9}", "tell.py {run:{seed}}",
    "tell.py {config.__class__}", "tell.py {sede}", "tell.py {x} {x!r}", "tell.py 'open",
    "tell.py \\", "tell.py \0", "python", "''", "python tell.txt", "nothing.py {run}",
    "{run}/tell.py", "python -m tell", "torchrun train.py", "TRAIN.py {run}"])
def test_a_line_that_is_no_command_is_said_before_anything_is_done(place, line):
    done, told = start(place, TRAINS + line + "\n", "--seeds=1")
    assert done.returncode == 2 and told == [] and not (place / "out").exists()
    assert done.stderr.startswith("error: recipe: ") and done.stderr.count("\n") == 1
    assert "is no command with" in done.stderr or "does not begin with" in done.stderr


@pytest.mark.parametrize(("recipe", "says"), [
    ("train.py {config} --seed={seed}\n", "recipe: no line says {run}"),
    ("train.py {config} --out_dir={run}\n", "recipe: no line says {seed}"),
    ("# nothing\n\n", "recipe: no line says {seed} or {run}"), ("", "recipe: no line says"),
    (b"tell.py \xff {seed} {run}\n", "recipe.txt is not UTF-8")])
def test_a_recipe_that_makes_no_run_of_a_seed_is_refused(place, recipe, says):
    (place / "recipe.txt").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    done = run_script("runs/seeds.py", "c.py", "--recipe=recipe.txt", cwd=place)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (place / "out").exists()


def test_a_seed_without_a_run_or_with_a_broken_one_stops_no_other(place):
    (place / "some.py").write_text(
        "import sys; from pathlib import Path; seed, run = sys.argv[1:]; run = Path(run)\n"
        "if seed == '2': Path(run, 'metrics.jsonl').write_text('')\n"
        "if seed == '3': Path(run, 'run.json').unlink()\n")
    done, _ = start(place, TRAINS + "some.py {seed} {run}\n", "--seeds=1,2,3")
    assert done.returncode == 1 and "2 of 3 seeds failed" in done.stderr
    assert "seed 2 failed: out/c_seeds/seed_2/metrics.jsonl holds no rows yet" in done.stdout
    assert "seed 3 failed: the recipe has made no run at out/c_seeds/seed_3" in done.stdout
    assert read_json(place / "out/c_seeds/results.json")["scores"] == {"val_loss": {"1": 2.0}}
    done, _ = start(place, "tell.py {seed} {run}\n", "--seeds=7")
    assert done.returncode == 1 and "the recipe has made no run at" in done.stdout
    assert not (place / "out/c_seeds/table.md").exists()  # of what was before


def test_why_a_line_failed_is_not_what_another_said(place):
    (place / "silent.py").write_text("import sys; sys.exit(3)")
    (place / "loud.py").write_text("print('all is well')")
    done, _ = start(place, TRAINS + "loud.py\nsilent.py {seed}\n", "--seeds=1")
    assert "seed 1 failed: silent.py 1 ended with 3\n" in done.stdout
    assert "all is well" in (place / "out/c_seeds/seed_1.log").read_text()


def test_a_metric_of_some_seeds_and_none_at_all(place):
    (place / "less.py").write_text(
        "import sys; from pathlib import Path; seed, run = sys.argv[1:]\n"
        "Path(run, 'metrics.jsonl').write_text('{\"step\": 1}\\n')\n"
        "Path(run, 'eval/step_1.json').unlink()\n")
    done, _ = start(place, TRAINS + "less.py {seed} {run}\n", "--seeds=1,2")
    assert done.returncode == 1, done.stdout
    assert "seed 1 failed: out/c_seeds/seed_1 has no score and no validation loss" in done.stdout


def test_two_do_not_work_in_one_place(place):
    (place / "out/c_seeds").mkdir(parents=True)
    with open(place / "out/c_seeds/.lock", "w") as lock:
        hold(lock, "")
        done, told = start(place, TRAINS, "--seeds=1")
    assert done.returncode == 2 and told == []
    assert "another process is at work in out/c_seeds" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_once_and_what_is_at_work_may_end_well(place, number):
    (place / "slow.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "def stop(*_):\n    Path('heard').open('a').write('1')\n    time.sleep(1)\n"
        "    Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\nsignal.signal(signal.SIGINT, stop)\n"
        "Path('begun').touch()\ntime.sleep(60 if not Path('saved').exists() else 0)\n")
    (place / "recipe.txt").write_text(TRAINS + "slow.py {seed}\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "runs/seeds.py"), "c.py", "--seeds=1", "--recipe=recipe.txt"],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    while not (place / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on" in error, error
    assert (place / "saved").exists() and (place / "heard").read_text() == "1"
    done, told = start(place, TRAINS + "slow.py {seed}\n", "--seeds=1")
    assert done.returncode == 0 and told == []


def test_a_changed_line_in_front_of_training_scores_no_old_run_as_new(tmp_path):
    write_data_set(tmp_path / "data/toy", {"train": documents(60), "val": documents(6)})
    (tmp_path / "c.py").write_text(TUNED)
    train = "train.py {config} --seed={seed} --out_dir={run}"
    done, _ = start(tmp_path, f"{train}\n", "--seeds=1")
    assert done.returncode == 0, done.stdout
    done, _ = start(tmp_path, f"{train} --learning_rate=2e-2\n", "--seeds=1")
    assert done.returncode == 1 and "learning_rate" in done.stdout.split("failed: ")[1]
    assert not (tmp_path / "out/c_seeds/table.md").exists()
    done, _ = start(tmp_path, f"{train}\n", "--seeds=1")
    assert done.returncode == 0 and (tmp_path / "out/c_seeds/table.md").exists(), done.stdout
