"""runs/seeds.py: what is done once, what is done again, and what a failed seed leaves."""

import math
from statistics import mean, stdev

import pytest
from conftest import TUNED, documents, run_script, write_data_set

from plainllama.files import read_json

ARGUMENTS = "c.py", "--seeds=3,1,2", "--recipe=recipe.txt"


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
    assert (tmp_path / "once.txt").read_text() == "1\n"
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
