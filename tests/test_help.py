"""What --help shows, what foreign names lead to, how a model and runs are named."""

import dataclasses
import importlib
import os
import re
import subprocess

import pytest
from conftest import ROOT, run_script

import export
import prepare
import report
import sample
import train
from plainllama.command import from_text, parse
from plainllama.foreign import NAMES, TABLE
from plainllama.help import FIRST, KEYS, help_text, option, unknown
from plainllama.settings import Settings, UserError, key

COMMANDS = {"prepare.py": prepare, "train.py": train, "sample.py": sample,
            "eval.py": importlib.import_module("eval"), "export.py": export, "report.py": report}
FLAGS = {name: {item.name for item in dataclasses.fields(module.Flags)}
         for name, module in COMMANDS.items()}


# ---- foreign names

def test_foreign_names_lead_to_what_there_is():
    for name, (ours, remark) in NAMES.items():
        assert ours or remark, name
        for place in ours.split(" | ") if ours else ():
            command, _, option = place.rpartition(" --")
            assert option in (FLAGS[command] if command else KEYS), (name, place)
        assert remark.count(" | ") in (0, ours.count(" | ")), name
        for option in re.findall(r"--(\w+)", remark):
            known = set(KEYS).union(*FLAGS.values(), {"nproc_per_node", "nnodes"})
            assert option in known, (name, option)
        for option, value in re.findall(r"--(\w+)=([\w:]+)", remark):  # which that key takes
            for item in dataclasses.fields(Settings):
                if item.name == option:
                    from_text(item, value)


def test_no_foreign_name_is_one_of_ours():
    assert not NAMES.keys() & set(KEYS).union(*FLAGS.values())
    assert len(NAMES) == sum(len(names.split()) for names in TABLE) >= 150


@pytest.mark.parametrize(("word", "says"), [
    ("--lr=1e-3", "unknown option --lr; here it is learning_rate"),
    ("--optim=sgd", r"here it is optimizer \(adamw \| muon"),
    ("--batch-size=4", "--batch_size; here it is micro_batch \\(rows per"),
    ("--bf16", "here it is dtype \\(--dtype=bf16"), ("--dropout=0.1", "there is none here: a m"),
    ("--temp=1", "here it is --temperature of sample.py"), ("--n_layr=2", "did you mean n_layer"),
    ("--max_length=9", "here it is block_size \\(in tokens\\)$"),
    ("--optimizer.lr=1", "--optimizer.lr; here it is learning_rate$"),
    ("--train.max_steps=9", "; here it is max_steps$"), ("--path=my.txt", "here it is sources"),
    ("--max_tokens=9", "here it is max_steps"), ("--qqq", "option --qqq; --help lists wh"),
    ("--early_stopping=3", "none here: a run ends"), ("--vocab=9", "here it is vocab_size"),
    ("--grad_accumulation_steps=4", "here it is global_batch_tokens"),  # of others, nearly so
    ("--limit=3", "--help lists what there is$"), ("--val=1", "did you mean val_fraction"),
    ("--tokens=1", "did you mean eval_tokens")])
def test_foreign_options(word, says):
    with pytest.raises(UserError, match=says):
        parse([word], "", train.Flags)


def test_foreign_names_elsewhere(tmp_path):
    (tmp_path / "c.py").write_text("n_layer = 2\nlr = 1e-3\n")
    with pytest.raises(UserError, match=r"c.py:2: unknown key lr; here it is learning_rate$"):
        parse([str(tmp_path / "c.py")], "")
    for word, says in (("--temp=1", "here it is temperature$"), ("--block_size=8", "of train.py"),
                       ("--max_length=9", "here it is max_new_tokens"),
                       ("--lr=1", "here it is --learning_rate of train.py")):
        with pytest.raises(UserError, match=says):
            parse([word], "", sample.Flags, "model")
    for command, said in (("sample.py", "batch (texts"), ("eval.py", "batch_tokens (tokens")):
        assert unknown("batch_size", FLAGS[command]).startswith(f"; here it is {said}")
    assert unknown("max_length", FLAGS["sample.py"]).endswith("max_new_tokens (without the prompt)")


# ---- help

def shown(capsys, *words: str, module=train, **how) -> list[str]:
    """The lines of a command's help."""
    with pytest.raises(SystemExit) as end:
        parse(list(words), "Doc.", module.Flags, **how)
    assert end.value.code == 0
    return capsys.readouterr().out.splitlines()


def names_in(lines: list[str]) -> list[str]:
    """The options of a help, in their order."""
    return [found[1] for line in lines if (found := re.match(r"  --(\w+)=", line))]


def test_help_shows_each_key_once_and_what_is_changed_first(capsys):
    names = names_in(shown(capsys, "--help"))
    assert sorted(names) == sorted([*FLAGS["train.py"], *KEYS])
    assert names[len(FLAGS["train.py"]):][:len(FIRST)] == list(FIRST)


def test_help_of_a_config_shows_its_values_where_they_differ(capsys):
    path = str(ROOT / "config/bench_muon.py")
    for words in ((path, "--help"), ("--help", path), ("--n_layer=3", path, "-h"),
                  ("-h", "--init_from=other.py", path)):
        lines = shown(capsys, *words)
        lines = re.sub(r"\n {41}", " ", "\n".join(lines)).split("\n")  # of several lines one
        by_name = dict(zip(names_in(lines), [line for line in lines if "  --" in line],
                           strict=True))
        assert f"--learning_rate=0.0006 {'':14}" in by_name["learning_rate"]
        assert f"[{path}: 0.003]" in by_name["learning_rate"]  # of its base's base
        assert f"[{path}: muon]" in by_name["optimizer"]
        assert path not in by_name["grad_clip"] and path not in by_name["weight_decay"]
    assert not any("[" + path in line for line in shown(capsys, "--help"))
    with pytest.raises(UserError, match=r"no config file config/nothing\.py"):
        parse(["config/nothing.py", "--help"], "", train.Flags)


def test_help_of_prepare_shows_what_it_reads(capsys):
    names = names_in(shown(capsys, "--help", module=prepare, reads=prepare.READS))
    assert set(names) == FLAGS["prepare.py"] | set(prepare.READS)
    lines = shown(capsys, str(ROOT / "config/laptop.py"), "-h", module=prepare, reads=prepare.READS)
    assert re.search(r"--tokenizer=mistral +\[.*/config/laptop.py: bpe:8192\]",
                     re.sub(r"\n {41}", " ", "\n".join(lines)))
    assert "learning_rate" not in names and "val_fraction" in names and "block_size" in names


def test_help_says_what_to_choose():
    why = {item.name: item.metadata["why"] for item in dataclasses.fields(Settings)}
    assert "muon" in why["learning_rate"] and "adamw" in why["learning_rate"]
    assert "wsd" in why["schedule"] and "--extend" in why["schedule"]
    assert "0.02" in why["val_fraction"] or "0.05" in why["val_fraction"]


# ---- names of models and runs

@pytest.mark.parametrize("name", ["sample.py", "eval.py", "export.py"])
def test_a_model_may_stand_without_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/mine").mkdir(parents=True)
    (tmp_path / "out/other").mkdir()
    flags = COMMANDS[name].Flags
    found = parse(["out/mine", "--base=x"], "", flags, "model")
    assert (found.flags.ckpt, found.overrides["ckpt"], found.files) == ("out/mine", "out/mine", [])
    assert parse(["out/mine,out/other"], "", flags, "model").flags.ckpt == "out/mine,out/other"
    for words, says in ((["out/mine", "out/other"], "expected one model, found out/mine out/other"),
                        (["out/mine", "--ckpt=out/mine"], "beside --ckpt"),
                        (["The sea"], "cannot use 'The sea': no run")):
        with pytest.raises(UserError, match=says):
            parse(words, "", flags, "model")
    with pytest.raises(UserError) as found:
        parse(["a b"], "", flags, "model")
    assert ("--prompt=TEXT" in str(found.value)) == (name == "sample.py")


def test_bare_make_shows_every_target():
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for target in targets:
        assert target == "help" or re.search(rf"make {target}\b", done.stdout), target
    assert done.stdout.startswith("make         these lines\nmake demo ")


def test_prepare_without_a_config_says_which_it_takes_before_it_asks_the_network(tmp_path):
    done = run_script("prepare.py", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "hf:ashaba1in/small_openwebtext: " in done.stderr
    assert done.stdout.splitlines()[:2] == [
        "no config named: taking config/llama100m.py",
        "its text is hf:ashaba1in/small_openwebtext; for your own: python prepare.py "
        "config/quickstart.py --dataset=mine --sources=my.txt"]


# ---- to the letter

def field_of(name: str, default, why: str = "why", choices: tuple = ()):
    """A field of flags."""
    made = dataclasses.make_dataclass("Flags", [(name, type(default), key(default, why, choices))])
    return dataclasses.fields(made)[0]


def test_lines_of_a_help():
    assert option(field_of("n", 3)) == f"  --n=3{' ' * 34}why"
    assert option(field_of("kind", "a", "how", ("a", "b"))) == (
        f"  --kind=a{' ' * 31}how: a | b")
    assert option(field_of("n", 3), "c.py", {"n": 4}) == f"  --n=3{' ' * 34}[c.py: 4] why"
    for values in (None, {}, {"n": 3}, {"m": 4}):
        assert option(field_of("n", 3), "c.py", values) == option(field_of("n", 3))
    long = option(field_of("n", "x"), "c.py", {"n": "y" * 70})
    assert f"[c.py: {'y' * 60}]" in re.sub(r"\s+", " ", long)
    lines = option(field_of("n", 3, "word " * 30)).split("\n")
    assert len(lines) == 3 and max(map(len, lines)) <= 100
    assert all(line.startswith(" " * 41 + "word") for line in lines[1:])
    assert lines[0].rstrip().endswith("word") and len(lines[0]) > 90
    hyphen = option(field_of("n", 3, "a " * 28 + "ab-cd"))
    assert hyphen.split("\n")[1].strip() == "ab-cd"  # which is not broken
    web = option(field_of("n", 3, "x" * 99)).split("\n")
    assert web[-1].strip() == "x" * 99


def test_a_whole_help_of_a_few_keys():
    known = {name: item for name, item in
             {item.name: item for item in dataclasses.fields(Settings)}.items()
             if name in ("dataset", "n_layer", "n_kv_head", "rope_theta", "log_interval", "beta1",
                         "val_fraction")} | {"own": field_of("own", 1)}
    text = help_text(" Doc.\n", known, "c.py", {"n_layer": 5, "beta1": 0.5})
    heads = [line for line in text.split("\n") if not line.startswith(" " * 20)]
    names = [line.split("=")[0].strip() for line in heads]
    assert names == ["Doc.", "", "options:", "--own", "", "what is changed first (config file or "
                     "command line)", "--dataset", "--n_layer", "--val_fraction", "", "model",
                     "--n_kv_head", "--rope_theta", "", "training", "--beta1", "", "cadence",
                     "--log_interval"]
    assert text.count("[c.py: ") == 2 and "[c.py: 5]" in text and "[c.py: 0.5]" in text
    assert help_text(None, {"own": field_of("own", 1)}) == (
        f"\n\noptions:\n  --own=1{' ' * 32}why")


def test_what_is_said_of_a_name():
    for name, known, says in (
            ("a.b.seed", ("seed",), "; here it is seed"),
            ("x.seed", (), "; it is a key of train.py"), ("seed", (), "; it is a key of train.py"),
            ("temprature", ("temperature",), "; did you mean temperature?"),
            ("qqq", ("seed",), "; --help lists what there is"),
            ("lr", ("learning_rate",), "; here it is learning_rate"),
            ("lr", (), "; here it is --learning_rate of train.py"),
            ("temp", (), "; here it is --temperature of sample.py"),
            ("optim", ("optimizer",), "; here it is optimizer (adamw | muon)")):
        assert unknown(name, known) == says, name
