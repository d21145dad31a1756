"""What a user gets for bad input: one line that names what was found and what to do, exit code 2,
and a work tree that is as it was. Also a full disk, no permission, and Ctrl-C at any moment.

The rooms' own tests have more of the same on their own files; this is every command in one table.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TOY, documents, run_script, write_data_set

from plainllama.command import parse_arguments, run_command
from plainllama.files import file_entry
from plainllama.tokens import shards, tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two data sets, a run, and things that look like them and are not."""
    home = tmp_path_factory.mktemp("errors")
    write_data_set(home / "data/toy", {"train": documents(30), "val": documents(9)[5:]})
    write_data_set(home / "data/half", {"train": documents(9), "val": documents(9)})
    (home / "data/half/manifest.json").unlink()
    (home / "data/pictures").mkdir()
    (home / "data/pictures/cat.png").write_bytes(b"\x89PNG")
    write_data_set(home / "data/cut", {"train": documents(9), "val": documents(9)})
    with open(home / "data/cut/train-00000.bin", "ab") as file:
        file.write(b"\0\0")
    (home / "toy.py").write_text(TOY)
    (home / "my.txt").write_text("\n".join(documents(400)))
    (home / "evil.py").write_text("import os\nos.system('touch harmed')\n")
    (home / "typo.py").write_text(TOY + "n_layerz = 3\n")
    (home / "latin.py").write_bytes(b"dataset = 'caf\xe9'\n")
    (home / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    (home / "rows.jsonl").write_text('{"question": "1+1?", "choices": ["1", "2"], "answer": "C"}\n')
    done = run_script("train.py", "toy.py", "--max_steps=2", cwd=home)
    assert done.returncode == 0, done.stderr
    shutil.copytree(home / "out/toy/checkpoints/step_2", home / "newer")
    sums = (home / "newer/checksums.json").read_text()
    (home / "newer/checksums.json").write_text(sums.replace('"format": 1', '"format": 2'))
    (home / "weights").mkdir()
    shutil.copy(home / "newer/model.safetensors", home / "weights")
    # the same data under another tokenizer
    write_data_set(home / "data/other", {"train": documents(9), "val": documents(9)})
    words = tokenizer.make_tokenizer("bpe:300", lambda: documents(9))
    words.save(home / "data/other")
    manifest = json.loads((home / "data/other/manifest.json").read_text())
    manifest["tokenizer"] |= {"sha256": words.sha256, "vocab_size": 300}
    manifest["files"]["tokenizer.json"] = file_entry(home / "data/other/tokenizer.json")
    shards.write_manifest(home / "data/other", manifest)
    return home


TABLE = [
    # what was misspelt or has the wrong type or value
    ("train", ["toy.py", "--learning_rat=1"], "unknown option --learning_rat; did you mean learn"),
    ("train", ["toy.py", "--learning_rate=-1e-3"], "learning_rate is -0.001, must be at least 0"),
    ("train", ["toy.py", "--learning_rate=fast"], "'fast' is not a number"),
    ("train", ["toy.py", "--block_size=0"], "block_size is 0, must be at least 1"),
    ("train", ["toy.py", "--d_model=192", "--n_head=5"], "d_model 192 does not divide into n_head"),
    ("train", ["toy.py", "--d_model=36", "--n_head=4"], "head width .* must be even"),
    ("train", ["toy.py", "--n_kv_head=3"], "n_head 4 is not a multiple of n_kv_head 3"),
    ("train", ["toy.py", "--optimizer=adam"], r"is one of adamw \| muon, not 'adam'"),
    ("train", ["toy.py", "--max_steps=2.5"], "'2.5' is not a whole number"),
    ("train", ["toy.py", "--tie_embeddings=maybe"], "'maybe' is not true or false"),
    ("train", ["toy.py", "more.py"], "expected one config file, found 2"),
    ("train", ["toy.py", "--min_lr=1"], "min_lr 1.0 is above learning_rate"),
    ("train", ["typo.py"], "typo.py:20: unknown key n_layerz; did you mean n_layer"),
    ("train", ["evil.py"], "evil.py:1: only `key = value` lines are allowed; configs are not run"),
    ("train", ["latin.py"], "latin.py is not a config file"),
    ("sample", ["--ckpt=out/toy/checkpoints/step_7"], "no checkpoint .*step_7; its run has step_2"),
    ("eval", ["--ckpt=out/toy", "--tasks=rows.jsonl"], "is a file: say --tasks=local:rows.jsonl"),
    ("train", ["toi.py"], "no config file toi.py; .*did you mean toy.py"),
    ("train", ["gone.py"], "no config file gone.py; there are: .*toy.py"),
    ("train", ["my.txt"], "my.txt is not a config file, .* --sources=my.txt"),
    ("prepare", ["toy.py", "--tokenizer=mistrel"], "tokenizer .*mistrel"),
    ("prepare", ["toy.py", "--val_fraction=2"], "val_fraction is 2.0, must be at least"),
    ("prepare", ["toy.py", "--dataset=../up"], "'../up' is not the name of a folder"),
    ("sample", ["--temprature=1"], "unknown option --temprature; did you mean temperature"),
    ("sample", ["--top_p=2"], "top_p is 2.0, must be at least 0 and at most 1"),
    ("sample", ["--num_samples=0"], "num_samples is 0, must be at least 1"),
    ("eval", ["--task=x"], "unknown option --task; did you mean tasks"),
    ("export", ["--ckpt=out/toy"], "name the folder to write with --to=DIR"),
    ("report", ["--outt=x.html"], "unknown option --outt; did you mean out"),
    # data that is not there or is something else
    ("train", ["toy.py", "--dataset=gone"],
     "no data set data/gone; make it with: python prepare.py toy.py --dataset=gone "),
    ("train", ["toy.py", "--dataset=half"], "data/half is unfinished .no manifest.json.; run prep"),
    ("train", ["toy.py", "--dataset=pictures"], "data/pictures is not a data set"),
    ("train", ["toy.py", "--dataset=cut"], "train-00000.bin has .* bytes where the manifest says"),
    ("train", ["toy.py", "--vocab_size=9"], "vocab_size 9 is smaller than the 258 entries"),
    ("train", ["toy.py", "--block_size=65536", "--global_batch_tokens=65536"],
     "fewer than one row of block_size 65536"),
    ("train", ["toy.py", "--dataset=other", "--vocab_size=300", "--init_from=out/toy",
               "--out_dir=out/new"], "out/toy.* is another model than .* say --vocab_size=258$"),
    ("train", ["toy.py", "--dataset=other"], "trained with dataset=toy, now it is other"),
    ("prepare", ["toy.py", "--dataset=mine", "--sources=gone.txt"], "gone.txt is no file"),
    ("prepare", ["toy.py", "--dataset=mine", "--sources=latin.txt", "--tokenizer=bytes"],
     "invalid utf-8 .first latin.txt"),
    ("prepare", ["toy.py", "--dataset=pictures", "--sources=my.txt"], "holds files of somebody"),
    ("prepare", ["--verify=data/gone"], "no data set data/gone"),
    ("eval", ["--ckpt=out/toy", "--tasks=", "--data=other"], "another tokenizer than out/toy"),
    ("eval", ["--ckpt=out/toy", "--tasks=local:gone.jsonl"], "no file gone.jsonl"),
    ("eval", ["--ckpt=out/toy", "--tasks=dialogs:gone.jsonl"], "no file gone.jsonl; say dialogs:F"),
    ("eval", ["--ckpt=out/toy", "--tasks=dialogs:my.txt"], "my.txt: dialogs are rows of .jsonl"),
    ("eval", ["--ckpt=out/toy", "--tasks=dialogs:rows.jsonl"],
     "rows.jsonl:1 .question, choices, answer.: no known fields; .* `messages`"),
    ("eval", ["--ckpt=out/toy", "--tasks=dialog:rows.jsonl"], "no task dialog:.*mean dialogs:"),
    ("train", ["toy.py", "--init_from=out/nope", "--out_dir=out/new"],
     "no folder out/nope; name a checkpoint or a run, or train"),
    ("eval", ["--ckpt=out/toy", "--tasks=local:rows.jsonl"], "rows.jsonl:1: 'answer' is 'C'"),
    # a model that is not there or is something else
    *((name, [*words, f"--ckpt={ckpt}"], says)
      for name, words in (("sample", []), ("eval", ["--tasks="]), ("export", ["--to=new"]))
      for ckpt, says in (("gone", "no folder gone"), ("data/toy", "holds no complete checkpoint"),
                         ("data", "holds no complete checkpoint"), ("toy.py", "toy.py is a file"))),
    ("train", ["toy.py", "--init_from=data/toy", "--out_dir=out/new"], "no complete checkpoint"),
    ("train", ["toy.py", "--out_dir=my.txt"],
     "out_dir my.txt is a file or a link to nowhere; name a folder"),
    ("train", ["toy.py", "--out_dir=data/toy"], "out_dir data/toy holds a data set; name another"),
    ("train", ["toy.py", "--out_dir=out"], "out_dir out holds runs; name another"),
    *(("export", ["--ckpt=out/toy", f"--to=out/toy/checkpoints/{place}"],
       "lies among a run's checkpoints; name another") for place in ("step_9", "step_2/hub")),
    ("export", ["--ckpt=out/toy", "--to=new", "--license=a: [b"], "--license takes a name such as"),
    ("sample", ["--ckpt=out/toy", "--prompt=\udcff"], "prompt is not UTF-8"),
    ("train", ["toy.py", "--sample_prompt=a\udcff"], "sample_prompt is not UTF-8"),
    ("sample", ["--ckpt=out/toy", "--prompt=" + "x" * 40], "prompt has 41 tokens, .* of 32"),
    ("export", ["--ckpt=out/toy", "--to=data/toy"], "--to data/toy exists and is not empty"),
    ("sample", ["--ckpt=weights"], "weights holds weights but no config.json; copy the folder aga"),
    ("eval", ["--ckpt=newer"], "newer cannot be used: its format is 2, not 1; use the plainllama"),
    ("report", ["data/toy"], "data/toy is not a run and holds none"),
    ("report", ["gone"], "gone is not a run"),
]


def tree(folder: Path) -> dict:
    """Every path under a folder with its time of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(("name", "words", "says"), TABLE)
def test_one_line_that_says_what_to_do(place, monkeypatch, capfd, name, words, says):
    """In this process, by the road that the command itself takes."""
    monkeypatch.chdir(place)
    module, before = importlib.import_module(name), tree(place)
    looks = any(word.startswith("--verify") for word in words)
    takes = "config" if name in ("train", "prepare") and not looks else "files"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as left:
        run_command(module.main, parse_arguments(module.__doc__, module.Flags, takes))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored is so for children
    error = capfd.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(says, error), error
    assert tree(place) == before and not (place / "harmed").exists()
    assert not (place / "out/new").exists() and not (place / "data/mine").exists()


def start(place: Path, *words: str, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=place,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


# no file may grow past 8 kB: the nearest thing to a full disk that needs no disk
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"


def test_a_full_disk_loses_nothing(place):
    for words in (["train.py", "toy.py", "--out_dir=out/full", "--max_steps=20"],
                  ["prepare.py", "toy.py", "--dataset=full", "--sources=my.txt",
                   "--tokenizer=bpe:900", "--workers=1"]):
        full = run_script(*words, cwd=place, code=FULL_DISK)
        out, error = full.stdout, full.stderr
        assert full.returncode == 1 and error.count("\n") == 1, (out, error)
        assert re.search("File too large|no checkpoint could be written", error)
        assert "Traceback" not in out
        done = run_script(*words, cwd=place)
        assert done.returncode == 0, done.stderr
        assert not list(place.glob("data/full/*.tmp")) and not list(place.glob("data/full/work*"))
    assert (place / "out/full/checkpoints/step_20").is_dir()


def test_no_permission_to_write(tmp_path):
    powerless = []  # root may write everywhere unless it gives that up
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root, and no setpriv to give up its powers with")
        powerless = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    tmp_path.chmod(0o555)
    done = subprocess.run([*powerless, sys.executable, str(ROOT / "prepare.py"),
                           str(ROOT / "config/sanity.py")], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    tmp_path.chmod(0o755)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    assert "Permission denied: data" in done.stderr


CTRL_C = [("train.py", "toy.py", "--max_steps=100000", "--out_dir=out/ctrl-c"),
          ("prepare.py", "toy.py", "--dataset=ctrl-c", "--sources=embedded", "--tokenizer=bytes"),
          ("sample.py", "--ckpt=out/toy", "--num_samples=9999"),
          ("eval.py", "--ckpt=out/toy", "--tasks="),
          ("export.py", "--ckpt=out/toy", "--to=ctrl-c"),
          ("report.py", "out/toy")]
CASES = [(i, delay, *(() if (i, delay) in ((0, 0.4), (0, 3.5), (1, 0.8), (2, 1.1)) else
                      (pytest.mark.slow,)))
         for i in range(len(CTRL_C)) for delay in (0.4, 0.8, 1.1, 1.6, 2.2, 3.5)]


@pytest.mark.parametrize(("command", "delay"), [
    pytest.param(i, delay, marks=marks) for i, delay, *marks in CASES])
def test_ctrl_c_is_one_line_at_any_moment(place, command, delay):
    process = start(place, *CTRL_C[command], start_new_session=True)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all that run in front
    out, error = process.communicate(timeout=600)
    assert process.returncode in (0, 1, 75), (process.returncode, error)
    assert "Traceback" not in out + error and error.count("\n") <= 1, error
    if process.returncode == 1:
        assert error.startswith("error: interrupted"), error
