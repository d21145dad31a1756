"""Config files are parsed and checked, never run."""

import dataclasses
import errno
import importlib
import os
import resource
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

import export
import prepare
import report
import sample
import train
from plainllama import command, machine, settings
from plainllama.command import parse
from plainllama.evaluation import tasks
from plainllama.report import compare
from plainllama.settings import UserError
from plainllama.training import resume

eval_command = importlib.import_module("eval")
COMMANDS = ("train.py", "prepare.py", "sample.py", "eval.py", "export.py", "report.py")


def write(tmp_path, text, name="c.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_precedence_and_provenance(tmp_path):
    write(tmp_path, "n_layer = 3\nlearning_rate = 1e-3\nseed = 7\n", "parent.py")
    child = write(tmp_path, '"""Doc."""\nbase = "parent.py"\n_k = 4\nmax_steps = _k * 10 - 2**3\n'
                            "learning_rate = 1\nmin_lr = learning_rate / 4\n")
    found = parse([child, "--seed", "9", "--tie_embeddings", "--sources=a.txt,b.jsonl"], "")
    c = found.config
    assert (c.n_layer, c.learning_rate, c.min_lr, c.seed) == (3, 1.0, 0.25, 9)
    assert (c.max_steps, c.tie_embeddings, c.sources) == (32, True, ["a.txt", "b.jsonl"])
    assert c.out_dir == "out/c" and found.base.endswith("parent.py")
    assert found.changed == {"max_steps": 32, "learning_rate": 1.0, "min_lr": 0.25}
    assert found.overrides == {"seed": 9, "tie_embeddings": True, "sources": ["a.txt", "b.jsonl"]}


BAD_FILES = [
    ("import os\nos.system('touch harmed')", "configs are not run"),
    ("n_layer = __import__('os').system('touch harmed')", "parsed, not run"),
    ("n_layer = open('harmed', 'w').write('x')", "parsed, not run"),
    ("n_layer = [x for x in (1, 2)][0]", "parsed, not run"),
    ("n_layer = 10 ** 10 ** 10", "parsed, not run"),
    ("n_layer = 1 / 0", "division by zero"),
    ("n_layerz = 3", "did you mean n_layer"),
    ("n_layer = 2.5", "takes int"),
    ("n_layer = '2'", "takes int"),
    ("n_layer = True", "takes int"),
    ("learning_rate = -1.0", "at least 0"),
    ("block_size = 0", "at least 1"),
    ("schedule = 'cosin'", "did you mean cosine"),
    ("n_layer = 2 +", "not a config file"),
    ("base = 'nothing.py'", "no config file"),
    ("mixture = {[1]: 2}", "is not a literal"), ("n_layer = (9**60) ** 60", "is not a literal"),
    ("n_layer = " + "1 + " * 20000 + "1", "not a config file"),
    ("learning_rate = 1e999", "finite"), ("max_steps = 2**63", "64 bits"),
    ("base = 'c.py'", "comes back to itself"),
    ("n_layer, n_head = 1, 2", "key = value"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_config_files(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace("(", "\\(")) as error:
        parse([write(tmp_path, text)], "")
    assert "c.py" in str(error.value) or "nothing.py" in str(error.value)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(("word", "message"), [
    ("--n_layer=x", "not a whole number"), ("--n_layer=1.5", "not a whole number"),
    ("--learning_rate=fast", "not a number"), ("--tie_embeddings=maybe", "not true or false"),
    ("--compile=yes", "is one of"), ("--n_layer", "needs a value"), ("--beta1=1.5", "at most 1"),
    ("--sources=[1", "not a Python literal"), ("--nlayer=3", "did you mean n_layer"),
    ("--learning_rate=nan", "must be"), ("--max_steps=inf", "not a whole number")])
def test_bad_command_lines(tmp_path, word, message):
    with pytest.raises(UserError, match=message):
        parse([write(tmp_path, "n_layer = 1"), word], "")


def test_numbers_of_the_command_line():
    config = parse(["--max_steps=1e4", "--global_batch_tokens=65_536", "--compile=true"], "").config
    assert config.max_steps == 10000 and type(config.max_steps) is int
    assert config.global_batch_tokens == 65536 and config.compile == "true"


def test_every_key_says_what_it_decides():
    """What it decides puts a key on the lists of resume, of comparisons and of prepare.py; these
    are they, so that a new key can be left out of none of them unseen."""
    kinds = {item.name: item.metadata["decides"] for item in dataclasses.fields(settings.Settings)}
    assert set(kinds.values()) == {"recipe", "prepare", "identity", "fixed", "course", "measure",
                                   "free"}
    assert set(prepare.RECIPE) == {"sources", "tokenizer", "val_fraction", "min_chars", "max_chars",
                                   "dedup", "strict", "documents", "train_on", "too_long",
                                   "chat_template"}
    assert set(resume.FIXED) == {
        "dataset", "seed", "block_size", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff",
        "vocab_size", "rope_theta", "rope_scaling", "rope_factor", "rope_original", "norm_eps",
        "tie_embeddings", "overfit_rows", "optimizer", "doc_mask", "packing", "mixture",
        "init_from", "train_only", "lora_r", "lora_alpha", "lora_dropout", "lora_targets",
        "frozen_dtype", "objective", "preference_beta", "nll_weight", "expand", "expand_blocks",
        "expand_merge", "divergence", "divergence_weight"}
    assert set(resume.COURSE) == {
        "global_batch_tokens", "max_steps", "learning_rate", "min_lr", "schedule", "warmup_steps",
        "weight_decay", "beta1", "beta2", "grad_clip", "epochs"}
    assert kinds.keys() - compare.ELSEWHERE == {
        *resume.FIXED, *resume.COURSE, "eval_tokens", "eval_sets"} - {"dataset", "seed"}
    assert set(compare.ELSEWHERE) - {"dataset", "seed", "workers", "max_dropped",
                                   *prepare.RECIPE} == {
        "out_dir", "resume", "micro_batch", "device", "dtype", "compile", "parallel", "offload",
        "attention",
        "activation_checkpointing", "max_minutes", "deterministic", "log_interval", "logger",
        "eval_interval", "eval_generate", "sample_tokens", "sample_prompt", "save_interval",
        "keep_last", "keep_every"}


def test_what_is_written_otherwise_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bom = write(tmp_path, "\ufeffmax_steps = 1e3\ncompile = False\nwarmup_steps = 4 / 2\n")
    config = parse([bom], "").config
    assert (config.max_steps, config.warmup_steps, config.compile) == (1000, 2, "false")
    assert type(config.max_steps) is int
    for text in ("True", "TRUE", "true", "1"):
        assert parse([bom, f"--compile={text}"], "").config.compile == "true"
        assert parse([bom, f"--strict={text}"], "").config.strict is True
    assert parse([bom, "--sources=a,b.txt"], "").config.sources == ["a", "b.txt"]
    (tmp_path / "a,b.txt").write_text("text")
    assert parse([bom, "--sources=a,b.txt"], "").config.sources == "a,b.txt"
    for word, message in (("--sources=a,,b", "nothing stands"), ("--sources=a,", "nothing stands"),
                          ("--mixture={[]: 1}", "not a Python literal"),
                          (f"--max_steps={2**63}", "64 bits"), ("--seed=1e30", "64 bits")):
        with pytest.raises(UserError, match=message):
            parse([bom, word], "")


def test_a_screen_that_is_full_closed_or_gone_is_one_line(tmp_path):
    for name in COMMANDS:
        for redirect, code, lines in ((">/dev/full", 1, 1), (">&- <&-", 0, 0), ("| true", 0, 0),
                                      (">/dev/full 2>/dev/full", 1, 0), ("2>&-", 0, 0)):
            line = f"{sys.executable} {ROOT / name} --help {redirect}"
            done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True,
                                  text=True, check=False)
            assert done.returncode == code, (line, done.stderr)
            assert done.stderr.count("\n") == lines and "Traceback" not in done.stderr, line


def test_prepare_says_which_keys_are_of_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "words of a text\n" * 300, "my.txt")
    config = write(tmp_path, "dataset = 'x'\nn_layer = 2\n")  # of a file train.py reads the rest
    assert prepare.main(parse([config, "--sources=my.txt", "--tokenizer=bytes", "--block_size=32",
                               "--global_batch_tokens=128", "--seed=3"], "", prepare.Flags)) == 0
    out = capsys.readouterr().out
    assert out.startswith("no effect here, but on train.py: global_batch_tokens, seed\n")
    assert prepare.main(parse([config, "--sources=my.txt", "--tokenizer=bytes"], "",
                              prepare.Flags)) == 0
    assert "no effect" not in capsys.readouterr().out
    with pytest.raises(UserError, match="strict was False, is now True"):
        prepare.main(parse([config, "--sources=my.txt", "--tokenizer=bytes", "--strict"], "",
                           prepare.Flags))


def test_home_is_expanded_in_every_key_that_names_a_path(tmp_path, monkeypatch):
    """Every key of text is a choice, a path, or listed here as neither: none is forgotten."""
    monkeypatch.setenv("HOME", str(tmp_path))
    neither = {"dataset", "sample_prompt", "prompt", "column", "stop", "layers", "tasks", "license",
               "push", "ray", "system", "host", "cors", "train_only", "lora_targets", "metrics",
               "id", "label",
               "seeds", "embeddings", "against"}  # the last two are several, expanded where read
    kinds = [None, *(module.Flags for module in (
        prepare, train, sample, eval_command, export, report))]
    for flags in kinds:
        for item in dataclasses.fields(flags or settings.Settings):
            if item.type is not str or item.metadata["choices"]:
                continue
            more = ["--lora_r=1"] if item.name == "lora_targets" else []
            given = parse([f"--{item.name}=~/x", *more], "", flags, "files" if flags else "config")
            found = getattr(given.flags if flags else given.config, item.name)
            assert found == ("~/x" if item.name in neither else f"{tmp_path}/x"), item.name
    (tmp_path / "base.py").write_text("n_layer = 3\n")
    config = parse([write(tmp_path, "base = '~/base.py'\nout_dir = '~/o'\ntokenizer = '~/t.json'"
                          "\n")], "").config
    assert (config.n_layer, config.out_dir, config.tokenizer) == (
        3, f"{tmp_path}/o", f"{tmp_path}/t.json")
    rows = '{"question": "1+1?", "choices": ["1", "2"], "answer": "2"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    assert tasks.local_task("local:~/rows.jsonl", eval_command.Flags(), [], None)


def test_no_number_is_infinite():
    for flags in (None, eval_command.Flags, sample.Flags, train.Flags):
        for item in dataclasses.fields(flags or settings.Settings):
            for text in ("inf", "-inf", "nan", "1e999") if item.type is float else ():
                with pytest.raises(UserError, match="must be"):
                    parse([f"--{item.name}={text}"], "", flags)


def test_cores_are_those_of_a_container(tmp_path):
    (own := tmp_path / "own").write_text("0::/a/b\n")
    inner = tmp_path / "two/a/b"
    inner.mkdir(parents=True)
    assert machine.cores(str(own), str(tmp_path / "two")) == machine.affinity()
    (inner / "cpu.max").write_text("max 100000\n")
    assert machine.cores(str(own), str(tmp_path / "two")) == machine.affinity()
    (tmp_path / "two/a/cpu.max").write_text("150000 100000\n")
    assert machine.cores(str(own), str(tmp_path / "two")) == 1
    own.write_text("4:memory:/x\n3:cpu,cpuacct:/docker/abc\n")
    (home := tmp_path / "one/cpu").mkdir(parents=True)
    for quota, found in ((-1, machine.affinity()), (50000, 1)):
        (home / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (home / "cpu.cfs_period_us").write_text("100000\n")
        assert machine.cores(str(own), str(tmp_path / "one")) == found
    assert machine.cores(str(tmp_path / "gone")) == machine.affinity()


def test_threads_that_wait_do_not_spin(monkeypatch):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "affinity", lambda: 64)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    machine.share_the_machine()
    assert [os.environ.get(name) for name in names] == ["PASSIVE", None, None, "2"]
    for name, value in (("OMP_NUM_THREADS", "1"), ("GOMP_SPINCOUNT", "9")):  # torchrun, the user
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    machine.share_the_machine()
    assert [os.environ.get(name) for name in names] == [None, "9", None, "1"]


def test_a_machine_that_is_not_quiet_is_said(monkeypatch):
    before, after = machine.work(), machine.work()
    assert not before or all(then <= now for then, now in zip(before, after, strict=True))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    for busy, own, threads, says in (
            (30, 10, 4, "2.0 of 4 cores"), (10, 10, 4, ""), (30, 10, 2, ""), (13, 10, 4, ""),
            (30, 10, 3, "OMP_NUM_THREADS=2"), (60, 10, 4, "faster when they end")):
        monkeypatch.setattr(machine, "work", lambda b=busy, o=own: (110.0, 100.0 + b, 5.0 + o))
        said = machine.crowded((100.0, 100.0, 5.0), threads)
        assert says in said and bool(said) == bool(says), (busy, own, threads, said)
        assert ("OMP_NUM_THREADS" in said) == (busy == 30 and threads > 2)
    assert machine.crowded((), 4) == ""


def test_an_option_given_twice_is_said(capsys):
    assert parse(["--seed=1", "--seed=2"], "").config.seed == 2
    assert capsys.readouterr().out == "--seed is given twice: 2 counts\n"
    parse(["--seed=1", "--n_layer=2"], "")
    assert capsys.readouterr().out == ""


def test_every_shipped_config_is_sound():
    for path in sorted((ROOT / "config").glob("*.py")):
        parse([str(path)], "")
    base = parse([str(ROOT / "config/llama100m.py")], "").config
    assert (base.n_layer, base.d_model, base.d_ff, base.block_size) == (16, 768, 2048, 1024)
    assert base.global_batch_tokens == 524288 and base.tokenizer == "mistral"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_in_under_a_second_without_torch(command, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / command), "--help"],
                          capture_output=True, text=True, cwd=tmp_path)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # of work, not of wait
    assert done.returncode == 0 and done.stdout.splitlines()[0]
    assert "| torch" not in done.stderr and seconds < 1
    reads = {"train.py": vars(settings.Settings()), "prepare.py": prepare.READS}.get(command, ())
    for item in dataclasses.fields(settings.Settings) if reads else ():
        assert (f"--{item.name}=" in done.stdout) == (item.name in reads), item.name
    assert list(tmp_path.iterdir()) == []


def test_the_arms_of_a_longer_context_differ_in_the_positions_alone():
    arms = [vars(parse([str(ROOT / f"config/llama100m_{arm}1024.py")], "").config)
            for arm in ("pi", "plain")]
    assert {key for key in arms[0] if arms[0][key] != arms[1][key]} == {
        "rope_scaling", "rope_factor", "out_dir"}
    before = vars(parse([str(ROOT / "config/llama100m_ctx256.py")], "").config)
    assert arms[0]["init_from"] == before["out_dir"]
    assert before["block_size"] * arms[0]["rope_factor"] == arms[0]["block_size"] == 1024


# key -> (default, least, most)
NUMBERS = {
    "val_fraction": (0.005, 1e-09, 0.5), "min_chars": (0, 0, None), "max_chars": (0, 0, None),
    "workers": (0, 0, None), "max_dropped": (0.2, 0, 1), "n_layer": (16, 1, None),
    "n_head": (12, 1, None), "n_kv_head": (0, 0, None), "d_model": (768, 2, None),
    "d_ff": (2048, 1, None), "vocab_size": (0, 0, None), "block_size": (1024, 1, None),
    "rope_theta": (10000.0, 1, None), "rope_factor": (1.0, 1, None), "rope_original": (0, 0, None),
    "norm_eps": (1e-05, 0, None), "lora_r": (0, 0, None), "lora_alpha": (16.0, 0.001, None),
    "lora_dropout": (0.0, 0, 0.99), "expand_blocks": (0, 0, None),
    "divergence_weight": (0.0, 0, None), "preference_beta": (0.1, 1e-06, 100),
    "nll_weight": (0.0, 0, None), "seed": (1337, 0, None), "max_steps": (2300, 1, None),
    "epochs": (0.0, 0, None), "global_batch_tokens": (524288, 1, None),
    "micro_batch": (0, 0, None), "learning_rate": (0.0006, 0, None), "min_lr": (6e-05, 0, None),
    "warmup_steps": (200, 0, None), "weight_decay": (0.1, 0, None), "beta1": (0.9, 0, 1),
    "beta2": (0.95, 0, 1), "grad_clip": (1.0, 0, None), "overfit_rows": (0, 0, None),
    "max_minutes": (0.0, 0, None), "log_interval": (10, 1, None), "eval_interval": (100, 1, None),
    "eval_tokens": (1048576, 1, None), "sample_tokens": (64, 0, None),
    "save_interval": (100, 1, None), "keep_last": (2, 1, None), "keep_every": (0, 0, None),
    "repetition_penalty": (1.0, 0.001, 1000.0), "temperature": (1.0, 0, None),
    "top_k": (0, 0, None), "top_p": (1.0, 0, 1), "min_p": (0.0, 0, 1)}
OTHERS = {  # key -> default
    "dataset": "openwebtext", "sources": "hf:ashaba1in/small_openwebtext", "documents": "text",
    "tokenizer": "mistral", "dedup": "none", "strict": False, "train_on": "auto",
    "too_long": "cut", "chat_template": "own", "packing": "auto", "mixture": None,
    "rope_scaling": "none", "tie_embeddings": False, "attention": "sdpa", "doc_mask": False,
    "train_only": "", "lora_targets": "all", "frozen_dtype": "fp32", "expand": "none",
    "expand_merge": "lerp", "divergence": "mse", "objective": "next", "out_dir": "",
    "init_from": "", "resume": "auto", "optimizer": "adamw", "schedule": "cosine",
    "device": "auto", "dtype": "auto", "compile": "auto", "parallel": "auto", "offload": False,
    "activation_checkpointing": False, "deterministic": False, "logger": "none", "eval_sets": None,
    "eval_generate": "", "sample_prompt": ""}


def test_every_default_and_range():
    """A changed default is another run for everybody who named none: it is changed here too."""
    items = (*dataclasses.fields(settings.Settings), *dataclasses.fields(settings.Sampling))
    found = {item.name: (item.default, item.metadata["low"], item.metadata["high"])
             for item in items}
    assert found == NUMBERS | {name: (value, None, None) for name, value in OTHERS.items()}
    for item in items:
        assert type(item.default) in (item.type, type(None)) or item.type is object, item.name


@pytest.mark.parametrize(("given", "settled"), [
    # (documents, train_on, packing, doc_mask) -> the last three
    (("text", "auto", "auto", False), ("assistant", "concat", False)),
    (("text", "auto", "auto", True), ("assistant", "concat", True)),
    (("text", "all", "doc", False), ("all", "doc", False)),
    (("text", "auto", "fit", False), ("assistant", "fit", True)),
    (("chat", "auto", "auto", False), ("assistant", "fit", True)),
    (("chat", "last", "fit", False), ("last", "fit", True)),
    (("preference", "auto", "auto", False), ("last", "fit", True)),
    (("preference", "all", "auto", True), ("all", "fit", True)),
    (("table", "auto", "fit", False), ("assistant", "fit", True)),
    (("chat", "auto", "concat", False), None), (("table", "auto", "doc", False), None)])
def test_what_the_kind_of_documents_settles(given, settled):
    config = settings.Settings(**dict(zip(("documents", "train_on", "packing", "doc_mask"), given,
                                          strict=True)))
    if settled:
        settings.settle_documents(config)
        assert (config.train_on, config.packing, config.doc_mask) == settled
    else:
        with pytest.raises(UserError) as error:
            settings.settle_documents(config)
        assert str(error.value) == (f"packing={given[2]} is for text; documents={given[0]} are "
                                    "packed with fit")


LORA, GROWN = {"lora_r": 2}, {"expand": "concat", "expand_blocks": 2}
SOUND = [
    {}, {"n_kv_head": 4}, {"n_kv_head": 12}, {"n_head": 384}, {"global_batch_tokens": 1024},
    {"min_lr": 6e-4}, {"beta1": 0.999, "beta2": 0.0},
    {"rope_scaling": "linear", "rope_factor": 1.5}, {"rope_scaling": "linear", "rope_factor": 2.0},
    {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_original": 1},
    LORA, {**LORA, "lora_alpha": 1.0, "lora_dropout": 0.1, "lora_targets": "q"},
    {"train_only": "last:1"}, {"optimizer": "muon"}, {**LORA, "optimizer": "adamw"},
    {**LORA, "frozen_dtype": "bf16"}, {"train_only": "last:1", "frozen_dtype": "bf16"},
    {**GROWN, "frozen_dtype": "bf16"}, {**LORA, "frozen_dtype": "int8"},
    {**LORA, "frozen_dtype": "nf4", "parallel": "ddp"}, {"parallel": "fsdp"}, {"parallel": "hsdp"},
    {**LORA, "frozen_dtype": "bf16", "parallel": "hsdp"},
    GROWN, {"expand": "stack", "expand_blocks": 1}, {"expand": "hybrid", "expand_blocks": 2},
    {"expand": "hybrid", "expand_blocks": 3}, {"expand": "stack", "expand_blocks": 16},
    {**GROWN, "expand_merge": "dlerp"}, {**GROWN, "divergence": "cosine"},
    {**GROWN, "divergence_weight": 1.0, "expand": "hybrid"},
    {"parallel": "fsdp", "offload": True}, {"parallel": "hsdp", "offload": True},
    {"parallel": "fsdp", "optimizer": "muon"}, {"deterministic": True},
    {"sample_prompt": "x"}, {"sample_tokens": 0}, {"sample_tokens": 1, "sample_prompt": "x"},
    {"mixture": {"a": 0.5}}, {"mixture": {"a": 1, "b": 1e-9}}, {"eval_sets": {"a": "data/a"}},
    {"eval_sets": {"a-b_9": "", "B": "x"}}, {"objective": "dpo", "preference_beta": 0.2},
    {"objective": "orpo", "preference_beta": 0.2}, {"objective": "dpo", "nll_weight": 1.0},
    {"objective": "orpo"}, {"objective": "dpo", **LORA}, {"overfit_rows": 1}, {"epochs": 2.0},
    {"objective": "orpo", **LORA, "lora_dropout": 0.1},
    {"min_chars": 1, "max_chars": 9, "dedup": "exact"}, {"train_on": "assistant"},
    {"documents": "chat", "train_on": "last", "too_long": "drop", "max_dropped": 0.5},
    {"documents": "chat", "chat_template": "model", "dedup": "near"},
    {"documents": "preference", "train_on": "all"}, {"documents": "table", "max_dropped": 0.1},
    {"documents": "table", "train_on": "assistant"}]
# settled by the shape of the model that a run begins with, where there is one
SHAPES = [
    ({"d_model": 770}, "d_model 770 does not divide into n_head 12 heads"),
    ({"d_model": 780}, "the head width d_model / n_head = 65 must be even (RoPE)"),
    ({"n_kv_head": 5}, "n_head 12 is not a multiple of n_kv_head 5"),
    ({"n_kv_head": 24}, "n_head 12 is not a multiple of n_kv_head 24"),
    ({"global_batch_tokens": 1025},
     "global_batch_tokens 1025 is not a multiple of block_size 1024; try 1024"),
    ({"global_batch_tokens": 3071},
     "global_batch_tokens 3071 is not a multiple of block_size 1024; try 2048"),
    ({"global_batch_tokens": 7},
     "global_batch_tokens 7 is not a multiple of block_size 1024; try 1024"),
    ({"frozen_dtype": "bf16"}, "frozen_dtype=bf16 has no effect where nothing is frozen; say "
                               "lora_r, train_only or expand"),
    ({"expand": "concat"}, "expand=concat with expand_blocks=0: say both, or neither"),
    ({"expand_blocks": 1}, "expand=none with expand_blocks=1: say both, or neither"),
    ({"expand": "hybrid", "expand_blocks": 1},
     "expand=hybrid takes turns between stack and concat; say --expand_blocks=2 or more, or one of "
     "them"),
    ({"expand": "stack", "expand_blocks": 17},
     "expand_blocks 17 is above the 16 blocks of the model"),
    ({"divergence": "cosine", "expand_merge": "dlerp"},
     "expand_merge, divergence: no effect without expand=concat or hybrid"),
    ({"divergence_weight": 1.0, "expand": "stack", "expand_blocks": 2},
     "divergence_weight: no effect without expand=concat or hybrid")]
MIXED = "mixture {} is not {{'NAME': weight above 0, ...}} of data sets"
SETS = "eval_sets {} is not {{'NAME': 'data/SET', ...}}, names of letters, digits, - and _"
UNSOUND = [
    ({"min_lr": 6.1e-4}, "min_lr 0.00061 is above learning_rate"),
    *(({name: value}, "beta1 and beta2 must both be below 1")
      for name in ("beta1", "beta2") for value in (1.0, 1.5)),
    ({"rope_scaling": "linear"}, "linear needs rope_factor above 1"),
    ({"rope_scaling": "llama3", "rope_original": 9}, "llama3 needs rope_factor above 1"),
    ({"rope_factor": 1.5}, "rope_factor 1.5 has no effect without rope_scaling"),
    ({"rope_scaling": "llama3", "rope_factor": 2.0}, "rope_scaling=llama3 needs rope_original"),
    *(({"rope_original": 9, **keys}, "rope_original 9 has no effect without rope_scaling=llama3")
      for keys in ({}, {"rope_scaling": "linear", "rope_factor": 2.0})),
    ({"lora_alpha": 8.0, "lora_targets": "q"},
     "lora_alpha, lora_targets: no effect without lora_r"),
    ({"lora_dropout": 0.5}, "lora_dropout: no effect without lora_r"),
    ({**LORA, "train_only": "x"}, "lora_r trains adapters alone; train_only has no place"),
    ({**LORA, "optimizer": "muon"}, "muon makes whole matrices orthogonal, which adapters' thin "
                                    "ones are not for; with lora_r say --optimizer=adamw"),
    *(({"train_only": "x", "frozen_dtype": kind},
       f"frozen_dtype={kind} is for lora_r: any other checkpoint is a whole model, whose frozen "
       "matrices must come back as they were") for kind in ("int8", "nf4")),
    *(({**LORA, "frozen_dtype": kind, "parallel": mode},
       f"frozen_dtype={kind} is not sharded; say --parallel=ddp, or bf16")
      for kind in ("int8", "nf4") for mode in ("fsdp", "hsdp")),
    *(({**GROWN, name: value},
       f"expand=concat learns copies of blocks alone; {name} has no place (of a model that has "
       "copies make a plain one first: export.py, --merge_back)")
      for name, value in (("lora_r", 2), ("train_only", "x"))),
    *(({"offload": True, "parallel": mode}, f"offload has no effect on parallel={mode}; say "
       "--parallel=fsdp, which one GPU can do too: torchrun --nproc_per_node=1")
      for mode in ("auto", "ddp")),
    ({"offload": True, "parallel": "fsdp", "optimizer": "muon"},
     "muon would make matrices orthogonal on the CPU; with offload say --optimizer=adamw"),
    ({**LORA, "lora_dropout": 0.1, "deterministic": True},
     "lora_dropout draws other numbers on other ranks; it does not go with deterministic"),
    ({"sample_prompt": "x", "sample_tokens": 0}, "sample_prompt has no effect without "
                                                 "sample_tokens"),
    *(({"mixture": value}, MIXED.format(repr(value))) for value in (
        {}, [], 3, {"a": 0}, {"a": -1}, {"a": "1"}, {1: 1}, {"a": True}, {"a": float("inf")},
        {"a": 1, "b": 0})),
    *(({"eval_sets": value}, SETS.format(repr(value))) for value in (
        {}, [], 3, {"a": 1}, {1: "a"}, {"a/b": "x"}, {"": "x"}, {"é": "x"}, {"a": "x", "b": 2})),
    ({"preference_beta": 0.2}, "preference_beta=0.2 has no effect on objective=next"),
    *(({"nll_weight": 0.5, "objective": kind}, "nll_weight=0.5 is for objective=dpo")
      for kind in ("next", "orpo")),
    ({**LORA, "lora_dropout": 0.1, "objective": "dpo"},
     "lora_dropout would make model and reference of dpo two draws; say 0"),
    ({"mixture": {"a": 1}, "objective": "dpo"}, "a mixture is for objective=next; give several "
                                                "sources to one set of pairs"),
    ({"mixture": {"a": 1}, "overfit_rows": 1},
     "overfit_rows takes the rows of one data set, no mixture"),
    ({"mixture": {"a": 1}, "epochs": 1.0}, "epochs are of one data set; with a mixture say "
                                           "max_steps"),
    *(({"documents": kind, name: value}, f"{name}={value} has no effect on documents={kind}")
      for kind, name, value in (
          ("text", "train_on", "last"), ("text", "too_long", "drop"),
          ("text", "chat_template", "model"), ("text", "max_dropped", 0.5),
          ("chat", "min_chars", 1), ("chat", "max_chars", 1), ("preference", "min_chars", 1),
          ("preference", "max_chars", 1), ("table", "train_on", "all"),
          ("table", "too_long", "drop"), ("table", "chat_template", "model"),
          ("table", "min_chars", 1), ("table", "max_chars", 1), ("table", "dedup", "exact")))]


def test_keys_that_fit_together():
    for keys in SOUND:
        settings.check_keys(settings.Settings(**keys))
        settings.check_keys(settings.Settings(**keys), shape=False)
    for keys, _ in SHAPES:  # what a model that is there may settle
        settings.check_keys(settings.Settings(**keys), shape=False)
    assert settings.IDLE.keys() == {"text", "chat", "preference", "table"}


@pytest.mark.parametrize(("keys", "says"), [*SHAPES, *UNSOUND])
def test_keys_that_do_not_fit_together(keys, says):
    for shape in (True,) if (keys, says) in SHAPES else (True, False):
        with pytest.raises(UserError) as error:
            settings.check_keys(settings.Settings(**keys), shape)
        assert str(error.value) == says


def test_names_near_and_far():
    known = ("learning_rate", "min_lr", "preference_beta", "beta1")
    for name, least, found in (("learning_rat", 0.5, "learning_rate"), ("xyz", 0.5, ""),
                               ("beta", 0.5, "preference_beta"), ("lr", 0.5, "min_lr"),
                               ("min_rl", 0.9, ""), ("min_rl", 0.5, "min_lr"),
                               ("leaning", 0.75, ""), ("leaning", 0.6, "learning_rate")):
        assert settings.nearest(name, iter(known), least) == (
            f"; did you mean {found}?" if found else "")
    assert settings.nearest("abcd", ["abxy"]) == "; did you mean abxy?"  # half alike
    assert settings.nearest("abcd", ["axyz"]) == ""
    assert settings.install("") == "python -m pip install -c constraints.txt -e ."
    assert settings.install("hub") == "python -m pip install -c constraints.txt -e '.[hub]'"
    assert [settings.ceil_div(a, 4) for a in (0, 1, 4, 5, -1)] == [0, 1, 1, 2, 0]
    assert settings.deciding("identity") == ("dataset", "seed")
    assert settings.deciding("prepare", "identity") == ("dataset", "workers", "max_dropped", "seed")


# ---- command lines to the letter

@dataclasses.dataclass
class Own:
    """Flags of a command for tests."""

    ckpt: str = settings.key("out", "a model")
    ray: str = settings.key("", "a cluster", bare="here")
    share: float = settings.key(0.5, "a share", (), 0.25, 0.75)
    count: int = settings.key(3, "a count", low=2)
    free: int = settings.key(3, "without bounds")
    kind: str = settings.key("auto", "a kind", ("auto", "true", "false"))
    open: bool = settings.key(False, "a switch")
    sets: object = settings.key(None, "anything")


def own(*words: str, takes: str = "files"):
    return parse(list(words), "Doc.", Own, takes)


def own_fails(*words: str, takes: str = "files") -> str:
    with pytest.raises(UserError) as error:
        own(*words, takes=takes)
    return str(error.value)


@pytest.mark.parametrize(("word", "value"), [
    ("--share=0.25", 0.25), ("--share=0.75", 0.75), ("--share=0.5", 0.5), ("--count=2", 2),
    ("--count=1e2", 100), ("--count=1_000", 1000), ("--count=2.0", 2), ("--free=-5", -5),
    (f"--free={2**63 - 1}", 2**63 - 1), (f"--free={-2**63}", -2**63), ("--kind=1", "true"),
    ("--kind=0", "false"), ("--kind=TRUE", "true"), ("--kind=auto", "auto"), ("--open", True),
    ("--open=no", False), ("--open=YES", True), ("--open=0", False), ("--ray", "here"),
    ("--ray=a:1", "a:1"), ("--sets=[1, 'a']", [1, "a"]), ("--sets={'a': 0.5}", {"a": 0.5}),
    ("--sets=a", "a"), ("--sets=a,b", ["a", "b"]), ("--sets=(1, 2)", ["(1", " 2)"])])
def test_a_value_of_each_kind_is_read(word, value):
    found = own(word).flags
    name = word[2:].partition("=")[0]
    assert getattr(found, name) == value and type(getattr(found, name)) is type(value)
    assert own(word).overrides == {name: value}


@pytest.mark.parametrize(("word", "says"), [
    ("--share=0.2499", "--share: share is 0.2499, must be at least 0.25 and at most 0.75"),
    ("--share=0.7501", "--share: share is 0.7501, must be at least 0.25 and at most 0.75"),
    ("--count=1", "--count: count is 1, must be at least 2"),
    ("--count=x", "--count: 'x' is not a whole number"),
    ("--count=", "--count: '' is not a whole number"),
    ("--share=x", "--share: 'x' is not a number"),
    (f"--free={2**63}", f"--free: free is {2**63}, must fit in 64 bits"),
    ("--kind=yes", "--kind: kind is one of auto | true | false, not 'yes'"),
    ("--kind=fals", "--kind: kind is one of auto | true | false, not 'fals'; did you mean false?"),
    ("--open=2", "--open: '2' is not true or false"), ("--ckpt", "--ckpt needs a value: "
                                                       "--ckpt=VALUE"),
    ("--sets=[1", "--sets: '[1' is not a Python literal"),
    ("--sets={[]}", "--sets: '{[]}' is not a Python literal"),
    ("--sets=,a", "--sets: nothing stands before or after a comma of ',a'"),
    ("--shar=1", "unknown option --shar; did you mean share?"),
    ("--seed=1", "unknown option --seed; it is a key of train.py")])
def test_a_value_that_cannot_be_read_is_said(word, says):
    assert own_fails(word) == says


def test_words_of_a_command_line():
    found = own("a", "--count", "7", "b", "--open", "c", "--ray", "--share", "0.3")
    assert (found.files, found.overrides) == (["a", "b", "c"], {
        "count": 7, "open": True, "ray": "here", "share": 0.3})
    assert vars(found.flags) == {"ckpt": "out", "ray": "here", "share": 0.3, "count": 7, "free": 3,
                                 "kind": "auto", "open": True, "sets": None}
    assert (found.config_file, found.base, found.changed, found.given) == ("", "", {}, frozenset())
    assert own("--ckpt=a=b").flags.ckpt == "a=b" and own("-x").files == ["-x"]
    assert parse([], None, None, "files").flags is None


def test_a_name_that_stands_alone_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "c,d").mkdir()
    for word, ckpt in (("a", "a"), ("a,b", "a,b"), ("c,d", "c,d"), ("~/a", f"{tmp_path}/a")):
        found = own(word, takes="model")
        assert (found.flags.ckpt, found.files, found.overrides) == (ckpt, [], {"ckpt": ckpt})
    assert own(takes="model").overrides == {}
    for words, says in ((["a,x"], "cannot use 'a,x': no run or checkpoint is called so"),
                        (["x", "a"], "cannot use 'x': no run or checkpoint is called so"),
                        (["a", "b"], "expected one model, found a b; name it once"),
                        (["a", "--ckpt=b"],
                         "expected one model, found a beside --ckpt; name it once")):
        assert own_fails(*words, takes="model") == says


def test_where_each_value_of_a_config_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "n_layer = 3\nseed = 7\nwarmup_steps = 5\n", "first.py")
    write(tmp_path, "base = 'first.py'\nseed = 8\nn_head = 4\n", "second.py")
    write(tmp_path, "base = 'second.py'\nd_model = 64\nout_dir = 'out/mine'\n", "third.py")
    found = parse(["third.py", "--seed=8", "--n_layer=5", "--d_ff=96", "--out_dir=out/o"], "", Own)
    assert (found.base, found.config_file, found.files) == ("second.py", "third.py", ["third.py"])
    assert found.changed == {"d_model": 64, "out_dir": "out/mine"}
    assert found.overrides == {"seed": 8, "n_layer": 5, "d_ff": 96, "out_dir": "out/o"}
    assert found.instead == {"n_layer": 3, "d_ff": 2048}  # not the folder, and not what is so there
    assert found.given == {"n_layer", "seed", "warmup_steps", "n_head", "d_model", "out_dir",
                           "d_ff"}
    c = found.config
    assert (c.n_layer, c.seed, c.warmup_steps, c.n_head, c.d_model, c.d_ff, c.out_dir) == (
        5, 8, 5, 4, 64, 96, "out/o")
    alone = parse(["first.py"], "")
    assert (alone.base, alone.config.out_dir, alone.flags) == ("", "out/first", None)
    with pytest.raises(UserError, match=r"^expected one config file, found 2: first\.py sec"):
        parse(["first.py", "second.py"], "")
    default = parse([], "")
    assert default.files == [] and default.config_file.endswith("config/llama100m.py")
    with pytest.raises(UserError, match="does not divide into n_head"):
        parse(["first.py", "--n_head=7"], "")
    parse(["first.py", "--n_head=7", "--init_from=x"], "")  # the shape is that model's


VALUES = [
    ("1 + 2 * 3", 7), ("7 // 2", 3), ("-3", -3), ("2 ** 10", 1024), ("2**64 // 2**60", 16),
    ("2**64 // 2**62 + 2**-1 * 2", 5), ("(2**63) ** 2 // (2**63) ** 2", 1), ("10 / 5", 2),
    ("- (1 - 4)", 3), ("True + 1", 2)]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_arithmetic_of_config_files(tmp_path, text, value):
    path = write(tmp_path, f"_n = {text}\nmax_steps = _n + 10\n")
    assert parse([path], "").config.max_steps == value + 10


@pytest.mark.parametrize("text", ["2 ** 65", "(2**63 + 1) ** 2", "2 ** -65", "'a' * 3", "1 % 2",
                                  "not 1", "+1", "[1][0]", "{**{}}", "f'x'", "other", "'a' + 'b'"])
def test_what_is_no_arithmetic_of_config_files(tmp_path, text):
    path = write(tmp_path, f"\n_n = {text}\n")
    with pytest.raises(UserError) as error:
        parse([path], "")
    assert str(error.value).startswith(f"{path}:2: ") and str(error.value).endswith(
        " is not a literal, arithmetic, or a name assigned above; configs are parsed, not run")


def test_literals_of_config_files(tmp_path):
    path = write(tmp_path, "'''Doc.'''\n_a = 0.5\nsources = [1, ('x', _a), {'k': [_a]}]\n"
                           "eval_sets = None\ntie_embeddings = True\n")
    config = parse([path], "").config
    assert config.sources == [1, ["x", 0.5], {"k": [0.5]}] and config.tie_embeddings is True
    for text, says in (("max_steps = 1\nfoo = 2\n", ":2: unknown key foo"),
                       ("max_steps += 1\n", ":1: only `key = value` lines are allowed; configs"),
                       ("a.b = 1\n", ":1: only `key"), ("max_steps = warmup_steps = 1\n", ":1: o"),
                       ("max_steps: int = 1\n", ":1: only"), ("1 + 1\n", ":1: only"),
                       ("max_steps = 2\n\nlearning_rate = 'x'\n", ":3: learning_rate takes float"),
                       ("_x = 1 / 0\n", ":1: division by zero"),
                       (f"min_lr = {2**63}\n", f":1: min_lr takes float, not {2**63}"),
                       (f"seed = -{2**63 + 1}\n", f":1: seed is {-2**63 - 1}, must fit in 64"),
                       (f"seed = -{2**63}\n", f":1: seed is {-2**63}, must be at least 0"),
                       ("_x = 10.0 ** 64 ** 2\n", ":1: '"), ("_x = 1e300 * 1e300\nmin_lr = _x",
                                                             ":2: min_lr is inf, must be a fin")):
        path = write(tmp_path, text)
        with pytest.raises(UserError) as error:
            parse([path], "")
        assert str(error.value).startswith(f"{path}{says}"), str(error.value)


def test_the_configs_that_could_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(word: str) -> str:
        with pytest.raises(UserError) as error:
            parse([word], "")
        return str(error.value)

    assert said("x.py") == f"no config file x.py; there is none here; {ROOT}/config has some"
    for number in range(14):
        write(tmp_path, "", f"c{number:02}.py")
    assert said("x.py") == "no config file x.py; there are: " + ", ".join(
        f"c{number:02}.py" for number in range(12)) + ", …"
    (tmp_path / "config").mkdir()
    write(tmp_path / "config", "", "toy.py")
    assert said("toy.py") == said("toi.py").replace("toi", "toy") == (
        "no config file toy.py; did you mean config/toy.py?")
    assert said("toy") == "toy is not a config file; did you mean config/toy.py?"
    (tmp_path / "out/one").mkdir(parents=True)
    write(tmp_path / "out/one", "", "run.json")
    assert said("out/one").startswith("out/one is a run; it goes on when the command that began it")
    assert said("config/zzzzzzzzzz.py").endswith("there are: config/toy.py")
    assert said(f"{tmp_path}/toi.py").startswith(
        f"no config file {tmp_path}/toi.py; there are: {tmp_path}/c00.py, ")
    assert said("a.txt") == ("a.txt is not a config file, which ends in .py; options begin with --,"
                             " text to prepare is named with --sources=a.txt")


def test_help_of_flags_and_of_a_config(tmp_path, monkeypatch, capsys):
    def shown(*words: str, **how) -> str:
        with pytest.raises(SystemExit) as left:
            parse(list(words), "Doc.", Own, **how)
        assert left.value.code == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    write(tmp_path, "n_layer = 99\n", "c.py")
    assert shown("-h", takes="files") == shown("--help", takes="files") == shown(
        "c.py", "-h", takes="files")  # which is no config there
    text = shown("-h", takes="files")
    assert text.startswith("Doc.\n\noptions:\n") and text.count("\n  --") == 8
    assert "n_layer" not in text
    for words in (("c.py", "--help"), ("--help", "c.py"), ("--help", "--x.py", "c.py")):
        assert "[c.py: 99]" in shown(*words)
    assert "[c.py" not in shown("--help") and "--count=3" in shown("--help")
    only = shown("--help", reads=("seed",))
    assert "--seed=" in only and "n_layer" not in only and "--count=3" in only


# ---- how commands end

def left_with(call, *args) -> object:
    with pytest.raises(SystemExit) as left:
        command.run_command(call, *args)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return left.value.code


@pytest.mark.parametrize(("error", "code", "said"), [
    (UserError("mend\n  it"), 2, "error: mend it\n"),
    (settings.Incomplete("go on"), 1, "error: go on\n"),
    (KeyboardInterrupt(), 1,
     "error: interrupted; the same command goes on from what is complete\n"),
    (MemoryError("no room"), 2,
     "error: out of memory (no room); take a smaller model or batch\n"),
    (BrokenPipeError(), 1, ""),
    *((OSError(number, "Full", *where), 1,
       f"error: Full: {(*where, 'while writing')[0]}; nothing that was complete is lost\n")
      for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
      for where in ((), ("data/x",))),
    (PermissionError(errno.EACCES, "Permission denied", "data"), 2,
     "error: Permission denied: data; nothing that was complete is lost\n"),
    (OSError(errno.ENXIO, "No such device"), 2,
     "error: No such device: OSError; nothing that was complete is lost\n")])
def test_each_end_has_its_code_and_its_line(capsys, error, code, said):
    def main(word: str) -> int:
        assert word == "word" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        raise error

    assert left_with(main, "word") == code
    assert capsys.readouterr().err == said


def test_ends_without_a_message(capsys):
    assert left_with(lambda: 75) == 75 and left_with(lambda: None) == 0 and left_with(int) == 0
    seen = []
    with pytest.raises(SystemExit):
        command.run_command(lambda: seen.append(signal.getsignal(signal.SIGINT)))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # it is done
    with pytest.raises(SystemExit):  # one that was started with & stays so
        command.run_command(lambda: seen.append(signal.getsignal(signal.SIGINT)))
    assert seen == [signal.default_int_handler, signal.SIG_IGN]
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def broken() -> None:
        raise OSError("without a number")

    with pytest.raises(OSError, match="without a number"):
        command.run_command(broken)
    assert capsys.readouterr().err == ""


@pytest.fixture
def begins(monkeypatch):
    """parse_arguments() of these words; nothing that it sets outlives the test."""
    def call(*words: str, **how):
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        return command.parse_arguments("Doc.", Own, **how)

    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield call
    signal.signal(signal.SIGINT, before)


def test_how_a_command_begins(begins, monkeypatch, capsys, tmp_path):
    calm = signal.signal(signal.SIGINT, signal.SIG_IGN)
    found = begins("--count=5", takes="files")
    assert found.flags.count == 5 and capsys.readouterr().out == ""
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # started with &
    signal.signal(signal.SIGINT, calm)
    assert (len(found.began), command.CommandLine(None, None, [], "", "", {}, {}).began) == (3, ())
    begins()
    assert capsys.readouterr().out == "no config named: taking config/llama100m.py\n"
    begins(write(tmp_path, "n_layer = 1"))
    assert capsys.readouterr().out == ""
    ended = []
    monkeypatch.setattr(command.os, "_exit", ended.append)
    signal.getsignal(signal.SIGINT)(2, None)  # Ctrl-C while torch is loaded
    assert ended == [1]
    assert capsys.readouterr().err == f"error: {command.INTERRUPTED}\n"
    with pytest.raises(SystemExit) as left:
        begins("--count=1", takes="files")
    assert left.value.code == 2 and capsys.readouterr().err.endswith("must be at least 2\n")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        begins(takes="files")
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"error: numpy is not installed for {sys.executable}; first: . .venv/bin/activate (or, "
        "once: python -m pip install -c constraints.txt -e .)\n")


def test_streams_that_are_closed_lead_nowhere(begins, monkeypatch):
    screen = sys.stdout
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    begins(takes="files")
    assert sys.stdin.read() == "" and not sys.stdin.writable()
    assert sys.stdout.writable() and sys.stderr.writable()
    monkeypatch.setattr(sys, "stdout", screen)
    begins(takes="files", outlives="it goes on")
    assert sys.stdout.warning == "it goes on" and sys.stdout.stream is screen


# ---- cores and quotas

def test_quotas_to_the_core(tmp_path, monkeypatch):
    assert machine.quota(tmp_path) == float("inf")
    for text, found in (("max 100000", float("inf")), ("250000 100000", 2.5),
                        ("0 100", float("inf")), ("1 100000", 1e-5), ("broken", float("inf"))):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert machine.quota(tmp_path) == found, text
    monkeypatch.setattr(machine, "affinity", lambda: 8)
    (own := tmp_path / "own").write_text("0::/\n")
    for quota, found in ((250_000, 2), (299_999, 2), (50_000, 1), (900_000, 8)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert machine.cores(str(own), str(tmp_path)) == found
    own.write_text("3:cpuset:/\n4:cpu:/a:b\n")
    (tmp_path / "cpu/a:b").mkdir(parents=True)
    (tmp_path / "cpu/a:b/cpu.max").write_text("300000 100000\n")
    assert machine.cores(str(own), str(tmp_path)) == 3
    own.write_text("3:cpuset,memory:/a:b\n")
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b/cpu.max").write_text("100000 100000\n")
    assert machine.cores(str(own), str(tmp_path)) == 8
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", {0: {1, 5, 6}}.get)  # of this process
    assert machine.affinity() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 7)
    assert machine.affinity() == 7
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    assert machine.affinity() == 1


def test_work_counts_busy_ticks(monkeypatch):
    ticks = "cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda path: ticks)
    monkeypatch.setattr(machine.time, "monotonic", lambda: 12.5)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: {"SC_CLK_TCK": 50}[name])
    monkeypatch.setattr(machine.os, "times", lambda: (1.0, 2.0, 4.0, 8.0, 99.0))
    assert machine.work() == (12.5, (100 + 20 + 30 + 6 + 7 + 8) / 50, 15.0)
    monkeypatch.setattr(machine.os.path, "exists", lambda path: False)
    assert machine.work() == ()


@pytest.mark.parametrize(("others", "threads", "says"), [
    (2.0, 2, ""), (2.4, 2, ""), (2.5, 2, "OMP_NUM_THREADS=2"), (2.6, 2, "OMP_NUM_THREADS=1"),
    (3.2, 2, "OMP_NUM_THREADS=1"), (3.25, 2, ""), (3.3, 2, "")])
def test_how_many_cores_others_leave(monkeypatch, others, threads, says):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "work", lambda: (110.0, 100.0 + 10 * others + 3.0, 5.0 + 3.0))
    said = machine.crowded((100.0, 100.0, 5.0), threads)
    if others <= 2.4:
        assert said == ""
    else:
        fewer = f", or start again with {says}" if says else ""
        assert said == (f"other processes keep {others:.1f} of 4 cores busy, and this run's "
                        f"{threads} threads share them: it gets faster when they end{fewer}")


@pytest.mark.parametrize(("cores", "given", "threads"), [(4, None, None), (3, None, "3"),
                                                         (3, "9", "9"), (4, "9", "9")])
def test_threads_are_as_many_as_a_quota_allows(monkeypatch, cores, given, threads):
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(machine, "affinity", lambda: 4)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    machine.share_the_machine()
    assert os.environ.get("OMP_NUM_THREADS") == threads
