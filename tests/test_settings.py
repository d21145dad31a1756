"""Config files are parsed and checked, never run."""

import dataclasses
import importlib
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

import export
import prepare
import report
import sample
import train
from plainllama import machine, settings
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
