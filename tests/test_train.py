"""The loop: exact resume, equality over ranks and accumulation, honest numbers, stopping."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import OFFLOAD, ROOT, metrics, run_script
from safetensors.torch import load_file

import train
from plainllama import settings
from plainllama.command import parse
from plainllama.machine import work
from plainllama.training import resume


def run(*words: str) -> int:
    """train.py in this process."""
    return train.main(parse(list(words), "", train.Flags))


def weights(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "checkpoints" / f"step_{step}" / "model.safetensors")


def digest(run_folder: Path, step: int) -> str:
    folder = run_folder / "checkpoints" / f"step_{step}"
    files = [folder / "model.safetensors", *sorted(folder.glob("training/optimizer-*"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


DIE_TRAINING = """
import os, signal, threading
from plainllama.training import optim
real, count = optim.step, [0]
def step(*args):
    count[0] += 1
    if count[0] == 25:
        [thread.join() for thread in threading.enumerate() if thread.name == 'saver']
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
optim.step = step
"""
DIE_SAVING = """
import os, signal
from plainllama.weights import checkpoint
real = checkpoint.os.rename
def rename(a, b):
    if str(b).endswith('step_20'): os.kill(os.getpid(), signal.SIGKILL)
    return real(a, b)
checkpoint.os.rename = rename
"""


@pytest.mark.parametrize(("fault", "resumes_at"), [(DIE_TRAINING, 20), (DIE_SAVING, 10)])
def test_killed_and_resumed_equals_never_killed_to_the_bit(home, fault, resumes_at):
    whole = run_script("train.py", "toy.py", "--out_dir=out/whole", cwd=home)
    assert whole.returncode == 0, whole.stderr
    killed = run_script("train.py", "toy.py", "--out_dir=out/killed", cwd=home, code=fault)
    assert killed.returncode == -signal.SIGKILL
    again = run_script("train.py", "toy.py", "--out_dir=out/killed", cwd=home)
    assert again.returncode == 0, again.stderr
    assert f"resuming from out/killed/checkpoints/step_{resumes_at}" in again.stdout
    assert digest(home / "out/whole", 40) == digest(home / "out/killed", 40)
    a, b = metrics(home / "out/whole"), metrics(home / "out/killed")
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert [r.get("loss") for r in a] == [r.get("loss") for r in b]
    assert not list((home / "out/killed/checkpoints").glob("*.tmp"))


def test_a_new_run_has_a_checkpoint_soon(home, monkeypatch):
    monkeypatch.setattr(train, "FIRST_SAVE", 0)
    words = ("toy.py", "--max_steps=6", "--save_interval=1000")
    assert run(*words) == 0
    assert [p.name for p in sorted((home / "out/toy/checkpoints").iterdir())] == [
        "step_1", "step_6"]
    whole = digest(home / "out/toy", 6)
    shutil.rmtree(home / "out/toy/checkpoints/step_6")
    assert run(*words) == 0 and digest(home / "out/toy", 6) == whole
    assert len(list((home / "out/toy/checkpoints").iterdir())) == 2  # none more after a resume


def test_one_process_with_offload_trains_and_resumes_as_without(home):
    words = "toy.py", "--micro_batch=2", "--max_steps=12", "--eval_interval=6"
    assert run(*words, "--out_dir=out/one") == 0
    for minutes in ("1e-9", "0"):
        done = run_script("train.py", *words, "--out_dir=out/two", "--parallel=fsdp", "--offload",
                          f"--max_minutes={minutes}", cwd=home, processes=1, code=OFFLOAD)
        assert "no samples along the run: the model is sharded" in done.stdout, done.stderr
    assert "resuming from" in done.stdout and done.returncode == 0, done.stderr
    one, two = ([row for row in metrics(home / "out" / name) if "val_loss" in row]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-5), a["step"]
    for name, value in weights(home / "out/one", 12).items():
        assert (weights(home / "out/two", 12)[name] - value).abs().max() < 1e-4, name


@pytest.mark.slow  # test_parallel.py compares all modes within one launch
def test_same_course_on_two_ranks_ddp_and_fsdp(home):
    assert run("toy.py", "--out_dir=out/one", "--max_steps=20") == 0
    for mode in ("ddp", "fsdp"):
        done = run_script("train.py", "toy.py", f"--out_dir=out/{mode}", "--max_steps=20",
                          f"--parallel={mode}", "--micro_batch=2", cwd=home, processes=2)
        assert done.returncode == 0, done.stderr
    one = metrics(home / "out/one")
    for mode in ("ddp", "fsdp"):
        other = metrics(home / "out" / mode)
        assert [r["step"] for r in one] == [r["step"] for r in other]
        for a, b in zip(one, other, strict=True):
            for name in ("loss", "grad_norm", "val_loss", "val_bpb"):
                if name in a:
                    assert b[name] == pytest.approx(a[name], rel=1e-5), (mode, name, a["step"])
        for name, value in weights(home / "out/one", 20).items():
            assert (weights(home / "out" / mode, 20)[name] - value).abs().max() < 1e-4, name
    # a sharded checkpoint goes on in one process, with another batch too
    assert run("toy.py", "--out_dir=out/ddp", "--max_steps=22", "--extend",
               "--global_batch_tokens=128") == 0
    assert metrics(home / "out/ddp")[-1]["tokens"] == 20 * 256 + 2 * 128
    assert run("toy.py", "--out_dir=out/fsdp", "--max_steps=25", "--extend") == 0
    assert run("toy.py", "--out_dir=out/one", "--max_steps=25", "--extend") == 0
    for name, value in weights(home / "out/one", 25).items():
        assert (weights(home / "out/fsdp", 25)[name] - value).abs().max() < 1e-4, name


def test_muon_resumes_like_adamw(home):
    words = ["toy.py", "--optimizer=muon", "--save_interval=6", "--micro_batch=4"]
    assert run(*words, "--out_dir=out/one", "--max_steps=12") == 0
    whole = digest(home / "out/one", 12)
    shutil.rmtree(home / "out/one/checkpoints/step_12")
    assert run(*words, "--out_dir=out/one", "--max_steps=12") == 0
    assert digest(home / "out/one", 12) == whole
    with pytest.raises(settings.UserError, match="optimizer=muon, now it is adamw"):
        run("toy.py", "--out_dir=out/one")


def test_samples_along_the_run(home):
    words = ["toy.py", "--out_dir=out/a", "--sample_prompt=def ", "--sample_tokens=9"]
    assert run(*words) == 0
    file = home / "out/a/samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 20, 40]
    assert all(row["prompt"] == "def " and row["stop"] in ("length", "eos") for row in rows)
    assert rows[0]["completion"] != rows[2]["completion"]
    for step in (40, 30, 20):
        shutil.rmtree(home / f"out/a/checkpoints/step_{step}")
    assert run(*words) == 0  # from step 10: the later texts are cut, and come again
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    with pytest.raises(settings.UserError, match="sample_prompt has 41 tokens"):
        run("toy.py", "--out_dir=out/b", "--sample_prompt=" + "x" * 40)
    assert run("toy.py", "--out_dir=out/b", "--max_steps=2", "--sample_tokens=0") == 0
    assert not (home / "out/b/samples.jsonl").exists()


def test_metrics_are_the_contract(home):
    assert run("toy.py", "--out_dir=out/a", "--log_interval=3") == 0
    rows = metrics(home / "out/a")
    training, evaluations = ([r for r in rows if name in r] for name in ("loss", "val_loss"))
    assert [r["step"] for r in training] == [1, *range(3, 40, 3), 40]
    assert [r["step"] for r in evaluations] == [0, 20, 40]
    for row in training:
        assert row["tokens"] == row["step"] * 8 * 32
        assert row["mfu"] is None and row["tokens_per_second"] > 0 and row["grad_norm"] > 0
        config = parse(["toy.py"], "").config
        from plainllama.training import optim
        assert row["lr"] == optim.lr(row["step"] - 1, config)
    assert abs(evaluations[0]["val_loss"] - math.log(258)) < 0.1
    assert evaluations[-1]["val_loss"] < 3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(home / "out/a")).Reload()
    for name in ("loss", "grad_norm", "val_bpb"):
        assert [(e.step, e.value) for e in board.Scalars(name)] == [
            (r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows if name in r]
    status = json.loads((home / "out/a/status.json").read_text())
    assert status == {"state": "done", "step": 40}
    assert run("toy.py", "--out_dir=out/a") == 0  # already complete
    assert metrics(home / "out/a") == rows
    described = json.loads((home / "out/a/run.json").read_text())
    assert described["config"]["d_model"] == 32 and described["overrides"]["log_interval"] == 3
    assert described["instead"].keys() == described["overrides"].keys() - {"out_dir"}
    assert described["instead"]["log_interval"] == parse(["toy.py"], "").config.log_interval != 3


def test_non_finite_gradients_never_reach_the_weights(home, monkeypatch):
    from model import LLaMA

    assert run("toy.py", "--out_dir=out/a", "--max_steps=10") == 0
    calls, real = [0], LLaMA.forward

    def forward(self, ids, targets=None, *more):
        loss = real(self, ids, targets, *more)
        calls[0] += self.training
        return loss * float("nan") if self.training and calls[0] == 5 else loss

    monkeypatch.setattr(LLaMA, "forward", forward)
    assert run("toy.py", "--out_dir=out/b", "--max_steps=10") == 0  # 2 micro-batches a step: step 3
    rows = {r["step"]: r for r in metrics(home / "out/b") if "loss" in r}
    assert rows[3]["grad_norm"] is None and rows[4]["loss"] > 0
    for value in weights(home / "out/b", 10).values():
        assert value.isfinite().all()
    monkeypatch.setattr(LLaMA, "forward", lambda *a: real(*a) * float("nan"))
    with pytest.raises(settings.UserError, match="in a row"):
        run("toy.py", "--out_dir=out/c")


def test_time_limit_and_signal_stop_with_a_whole_checkpoint(home, monkeypatch):
    assert run("toy.py", "--out_dir=out/a", "--max_minutes=1e-9") == train.STOPPED
    status = json.loads((home / "out/a/status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["step"] < 5
    assert run("toy.py", "--out_dir=out/a") == 0
    assert run("toy.py", "--out_dir=out/b") == 0
    assert digest(home / "out/a", 40) == digest(home / "out/b", 40)
    code = """
import os, signal
from plainllama.training import optim
real, count = optim.step, [0]
def step(*args):
    count[0] += 1
    if count[0] == 7: os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
optim.step = step
"""
    stopped = run_script("train.py", "toy.py", "--out_dir=out/c", cwd=home, code=code)
    assert stopped.returncode == 75, stopped.stderr
    assert json.loads((home / "out/c/status.json").read_text())["state"] == "stopped"


BAD = [
    (["--d_model=36"], "head width"),
    (["--n_head=5"], "does not divide"),
    (["--global_batch_tokens=100"], "multiple of block_size"),
    (["--dataset=nothing"], "no data set data/nothing"),
    (["--block_size=100000", "--global_batch_tokens=100000"], "fewer than one row"),
    (["--vocab_size=100"], "smaller than the 258 entries"),
    (["--attention=xformers"], "xformers needs a CUDA device"),
    (["--resume=must"], "no whole checkpoint"),
    (["--init_from=nowhere"], "no folder nowhere"),
    (["--learning_rat=1"], "did you mean learning_rate"),
    (["--learning_rate=-1"], "must be at least 0"),
    (["--max_steps=many"], "not a whole number"),
    (["--parallel=fsdp"], "torchrun"),
    (["--offload"], "no effect on parallel=auto; say --parallel=fsdp"),
    (["--parallel=ddp", "--offload"], "no effect on parallel=ddp"),
    (["--parallel=hsdp", "--offload", "--optimizer=muon"], "say --optimizer=adamw"),
    (["--parallel=fsdp", "--offload"], "offload has no effect on device=cpu"),
    (["--beta1=1"], "must both be below 1"), (["--beta2=1.0"], "must both be below 1"),
    (["--learning_rate=inf"], "must be a finite number"), (["--d_ff=1e12"], "more ranks"),
    (["--n_layer=1e15"], "more ranks"), ([f"--vocab_size={2**63 - 1}"], "more ranks"),
    ([f"--d_model={2**40}"], "more ranks"), (["--min_chars=1e19"], "fit in 64 bits"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_clear_line(home, words, message):
    with pytest.raises(settings.UserError, match=message):
        run("toy.py", *words)
    assert not (home / "out").exists()


def test_bad_input_exits_with_2_before_torch_is_loaded(home):
    for words in (["toy.py", "--n_layers=2"], ["missing.py"], ["toy.py", "--n_head=5"]):
        done = run_script("train.py", *words, cwd=home)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (home / "out").exists()


def test_resume_refuses_what_would_make_it_another_run(home):
    assert run("toy.py", "--out_dir=out/a", "--max_steps=10") == 0
    state = home / "out/a/checkpoints/step_10/training/state.json"  # by an older plainllama, that
    old = json.loads(state.read_text())  # knew fewer keys: they have their defaults
    del old["config"]["optimizer"], old["config"]["sample_tokens"]
    resume.refuse_other_run(old, parse(["toy.py", "--max_steps=10", "--packing=concat"], "").config,
                            old["data_hash"], False, state)
    for words, message in ((["--seed=1"], "seed=1337, now it is 1"),
                           (["--n_layer=3"], "n_layer"),
                           (["--max_steps=20"], "--extend"),
                           (["--resume=never"], "another out_dir")):
        with pytest.raises(settings.UserError, match=message):
            run("toy.py", "--out_dir=out/a", *words)


def test_init_from_refuses_another_architecture(home):
    assert run("toy.py", "--out_dir=out/a", "--max_steps=2") == 0
    for word in ("--n_head=2", "--rope_theta=5e5", "--tie_embeddings", "--n_kv_head=4"):
        with pytest.raises(settings.UserError, match="init_from"):
            run("toy.py", "--out_dir=out/b", "--init_from=out/a", word)
    assert not (home / "out/b").exists()
    assert run("toy.py", "--out_dir=out/b", "--init_from=out/a", "--block_size=64",
               "--rope_scaling=linear", "--rope_factor=2", "--max_steps=2") == 0
    assert metrics(home / "out/b")[0]["val_loss"] < metrics(home / "out/a")[0]["val_loss"]


def test_a_mixture_needs_no_data_set_that_nobody_named(home, capsys):
    (home / "toy.py").write_text((home / "toy.py").read_text().replace("'toy'", "'nowhere'"))
    words = ("toy.py", "--mixture={'toy': 1}", "--max_steps=2", "--sample_tokens=0")
    assert run(*words, "--out_dir=out/m") == 0
    out = capsys.readouterr().out
    assert "validated on data/toy, the first set of the mixture; --dataset=NAME names" in out
    assert "curves: python report.py out/m; or tensorboard --logdir out\n" in out
    assert json.loads((home / "out/m/run.json").read_text())["config"]["dataset"] == "toy"
    assert run(*words, "--out_dir=out/m") == 0  # the same command goes on
    with pytest.raises(settings.UserError, match="nowhere"):
        run(*words, "--dataset=nowhere", "--out_dir=out/n")


def test_the_status_tells_what_is_saved_and_the_start_what_is_changed(home, monkeypatch, capsys):
    seen, settle = [], train.Run.settle

    def watched(run, step, *args):
        if step in (5, 8):
            run.saver.wait()
            seen.append(json.loads((home / "out/s/status.json").read_text()))
        if step == 8:
            raise RuntimeError("planted")
        return settle(run, step, *args)

    monkeypatch.setattr(train.Run, "settle", watched)
    with pytest.raises(RuntimeError, match="planted"):
        run("toy.py", "--out_dir=out/s", "--save_interval=6", "--seed=3", "--n_layer=2")
    assert seen == [{"state": "running", "step": 0}, {"state": "running", "step": 6}]
    assert json.loads((home / "out/s/status.json").read_text()) == {"state": "failed", "step": 6}
    lines = [line for line in capsys.readouterr().out.splitlines() if "changed of" in line]
    assert lines == ["changed of toy.py: save_interval 6 (there: 10), seed 3 (there: 1337)"]


def test_a_model_that_its_run_deletes_before_it_is_loaded_is_looked_for_again(home, monkeypatch):
    """keep_last=1 in the run that init_from names: the newer checkpoint is taken, whole."""
    assert run("toy.py", "--out_dir=out/a", "--max_steps=20", "--save_interval=10") == 0
    (home / "out/a/checkpoints/step_20").rename(home / "newer")
    begin = train.resume.begin

    def deleted(*args):
        start = begin(*args)
        assert start.source == Path("out/a/checkpoints/step_10")
        shutil.rmtree(start.source)
        (home / "newer").rename(home / "out/a/checkpoints/step_20")
        return start

    monkeypatch.setattr(train.resume, "begin", deleted)
    assert run("toy.py", "--out_dir=out/b", "--init_from=out/a", "--max_steps=1") == 0
    assert metrics(home / "out/b")[0]["val_loss"] == pytest.approx(
        [row for row in metrics(home / "out/a") if "val_loss" in row][-1]["val_loss"])


def test_a_run_beside_others_says_so(home, capsys):
    command = parse(["toy.py", "--max_steps=1"], "", train.Flags)
    now, busy, own = work() or pytest.skip("only Linux says what others do")
    command.began = now - 1, busy - 999, own
    assert train.main(command) == 0
    assert "other processes keep " in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(home, capsys):
    assert run("toy.py", "--out_dir=out/a", "--max_steps=20") == 0
    target = home / "out/a/checkpoints/step_20/model.safetensors"
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    before = digest(home / "out/a", 20)
    assert run("toy.py", "--out_dir=out/a", "--max_steps=20") == 0
    out = capsys.readouterr().out
    assert "step_20 is damaged (model.safetensors does not match" in out
    assert "resuming from out/a/checkpoints/step_10" in out
    assert digest(home / "out/a", 20) != before
    assert (home / "out/a/checkpoints/step_20.damaged").is_dir()  # and is not counted by keep_last


@pytest.mark.slow
def test_rows_of_documents_and_mixtures(home):
    """Loss and tokens count real targets only, over all ranks; a resumed run is the same run."""
    import numpy as np
    from conftest import documents, write_data_set

    from plainllama.settings import UserError
    from plainllama.tokens import shards
    from plainllama.tokens.rows import training_rows
    from plainllama.weights.peft import load_model

    shared = (home / "data").resolve()
    (home / "data").unlink()
    shutil.copytree(shared, home / "data")
    write_data_set(home / "data" / "more", {"train": documents(30)[::-1], "val": documents(2)})
    words = ("toy.py", "--packing=doc", "--mixture={'toy': 1, 'more': 2}", "--max_steps=8",
             "--save_interval=4", "--block_size=96", "--global_batch_tokens=768")
    frozen = ("--learning_rate=1e-30", "--min_lr=0", "--max_steps=1", "--out_dir=out/frozen")
    assert run(*words, *frozen) == 0
    assert run(*words, "--out_dir=out/whole") == 0
    run_script("train.py", *words, "--out_dir=out/killed", cwd=home,
               code=DIE_TRAINING.replace("25", "6"))
    assert run(*words, "--out_dir=out/killed") == 0
    assert digest(home / "out/whole", 8) == digest(home / "out/killed", 8)
    done = run_script("train.py", *words, "--out_dir=out/two", "--micro_batch=1", cwd=home,
                      processes=2)
    assert done.returncode == 0, done.stderr

    config = parse(list(words), "", train.Flags).config
    rows = training_rows(home / "data/toy", shards.read_manifest(home / "data/toy"), config)
    model = load_model(home / "out/frozen/checkpoints/step_1")
    ids = torch.from_numpy(rows.rows(0, 8))
    real = ids[:, 1:] >= 0
    assert 0 < real.sum() < real.numel()
    with torch.no_grad():
        logits = model(ids[:, :-1].clamp(min=0)).float()
    nll = torch.nn.functional.cross_entropy(logits[real], ids[:, 1:][real])
    for name in ("frozen", "whole", "killed", "two"):
        trained = [row for row in metrics(home / "out" / name) if "loss" in row]
        assert trained[0]["loss"] == pytest.approx(float(nll), abs=1e-5)
        assert [row["tokens"] for row in trained] == [
            int((rows.rows(0, 8 * k)[:, 1:] >= 0).sum()) for k in range(1, len(trained) + 1)]
    a, b = metrics(home / "out/whole"), metrics(home / "out/two")
    assert np.allclose([r.get("loss", 0) for r in a], [r.get("loss", 0) for r in b], atol=1e-5)
    for other, said in (("--mixture={'toy': 1, 'more': 1}", "mixture="),
                        ("--packing=concat", "packing=doc")):
        with pytest.raises(UserError, match=said):
            run(*words, other, "--out_dir=out/whole", "--max_steps=9", "--extend")


def test_a_run_that_fails_before_its_first_step_is_not_running(home, monkeypatch):
    def broken(self):
        raise settings.UserError("no compiler")

    monkeypatch.setattr("plainllama.training.engine.Engine.ready", broken)
    with pytest.raises(settings.UserError, match="no compiler"):
        run("toy.py", "--out_dir=out/broken")
    assert json.loads((home / "out/broken/status.json").read_text())["state"] == "failed"


def test_what_has_no_effect_is_refused_or_said(home, capsys):
    """The recipe is the data set's: run.json holds it, whatever config and command line say."""
    (home / "more.py").write_text("base = 'toy.py'\nmin_chars = 7\nsources = 'other.txt'\n")
    for word in ("--sources=x.txt", "--tokenizer=gpt2", "--min_chars=1000", "--dedup=exact",
                 "--strict", "--val_fraction=0.3", "--max_chars=9", "--workers=2"):
        name = word[2:].partition("=")[0]
        for check in ([], ["--check"]):
            with pytest.raises(settings.UserError, match=f"{name}: data/toy is prepared"):
                run("toy.py", word, *check)
    for words, message in ((["--price=3"], "--price is for --check"),
                           (["--check", "--replay=3"], "--check and --replay are not done"),
                           (["--check", "--profile"], "not done together"),
                           (["--replay=1", "--extend"], "not done together"),
                           (["--rope_original=64"], "rope_original 64 has no effect"),
                           (["--sample_tokens=0", "--sample_prompt=x"], "has no effect without")):
        with pytest.raises(settings.UserError, match=message):
            run("toy.py", *words)
    assert not (home / "out").exists()
    capsys.readouterr()
    words = ["more.py", "--min_chars=0", "--max_steps=5", "--warmup_steps=5", "--extend",
             "--out_dir=out/a"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert said.count("prepared with sources='hf:ashaba1in/small_openwebtext': what more.py") == 1
    assert "the warm-up takes 0 of them" in said and "--extend has no effect" in said
    config = json.loads((home / "out/a/run.json").read_text())["config"]
    assert config["min_chars"] == 0 and config["sources"].startswith("hf:")
    assert config["warmup_steps"] == 0
    assert [row["lr"] for row in metrics(home / "out/a") if "lr" in row] == [
        1e-2, *(row["lr"] for row in metrics(home / "out/a")[2:-2]), 1e-3]


FULL = """
import builtins, os, threading, sys
def full(*_):
    raise OSError(28, "No space left on device")
from plainllama.training import log
real = open
log.open = lambda path, *a, **k: full() if "jsonl" in str(path) else real(path, *a, **k)
log.write_status = full
"""


def test_a_run_outlives_its_screen_and_its_log(home):
    """A full disk behind stdout and behind the log, a reader that has gone, closed streams."""
    words = "toy.py --max_steps=6 --save_interval=3"
    gone, pipe = os.pipe()
    os.close(gone)
    for name in ("full", "gone", "both", "errors"):
        if name == "both":  # closed before Python starts
            line = f"{sys.executable} {ROOT / 'train.py'} {words} --out_dir=out/both >&- 2>&- <&-"
            done = subprocess.run(["bash", "-c", line], cwd=home, capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
        else:
            with open("/dev/full", "w") as full:
                done = run_script("train.py", *words.split(), f"--out_dir=out/{name}", cwd=home,
                                  stdout=pipe if name == "gone" else full.fileno(),
                                  stderr=full.fileno() if name == "errors" else subprocess.PIPE)
        assert done.returncode == 0, (name, done.stderr)
        assert len(done.stderr.splitlines()) == (name in ("full", "gone")), done.stderr
        assert (home / f"out/{name}/checkpoints/step_6").is_dir()
        assert json.loads((home / f"out/{name}/status.json").read_text())["state"] == "done"
    done = run_script("train.py", *words.split(), "--out_dir=out/log", cwd=home, code=FULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING: rows of metrics.jsonl are lost") == 1
    assert (home / "out/log/checkpoints/step_6").is_dir()


def test_whatever_fails_before_the_loop_leaves_no_run_at_work(home, monkeypatch):
    words = ("toy.py", "--out_dir=out/a", "--max_steps=2")
    assert run(*words) == 0
    (home / "out/c").mkdir()
    (home / "out/c/config.json").write_text("{")
    faults = (("training.log.Log.announce", OSError(5, "Input/output error")),
              ("training.log.describe", RuntimeError("no git")),
              ("weights.checkpoint.Saver.__init__", OSError(28, "full")),
              ("generation.generate.RunSamples.__init__", KeyError("x")),
              ("training.resume.write_status", OSError(28, "full")))
    for i, (place, error) in enumerate(faults):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            def fail(*_, error=error, **__):
                raise error
            patch.setattr(f"plainllama.{place}", fail)
            run("toy.py", f"--out_dir=out/b{i}", "--max_steps=2")
        status = home / f"out/b{i}/status.json"
        assert not status.exists() or json.loads(status.read_text())["state"] == "failed", place
    for source in ("out/c", "toy.py", "nowhere"):
        with pytest.raises(settings.UserError):
            run("toy.py", "--out_dir=out/d", f"--init_from={source}")
    assert not (home / "out/d").exists()


def test_what_lies_in_the_way_of_a_run_is_named(home):
    """A file, a folder or a link to nowhere in the place of something else: one line, at once."""
    (home / "nowhere").symlink_to("/no/such/folder")
    assert run("toy.py", "--out_dir=out/base", "--max_steps=2") == 0
    for i, name in enumerate(("metrics.jsonl", "run.json", "status.json", "checkpoints",
                              "checkpoints/step_2", ".lock")):
        copy = home / f"out/{i}"
        shutil.copytree(home / "out/base", copy)
        if (copy / name).is_dir():
            shutil.rmtree(copy / name)
            (copy / name).symlink_to("/no/such/folder") if i % 2 else (copy / name).write_text("x")
        else:
            (copy / name).unlink()
            (copy / name).mkdir()
        with pytest.raises((OSError, settings.UserError)) as found:  # either is one line
            run("toy.py", f"--out_dir={copy}", "--max_steps=3", "--extend")
        assert Path(name).name in str(found.value), name
    for place in ("nowhere", "nowhere/x", "toy.py/x", "x" * 300):
        with pytest.raises((OSError, settings.UserError)):
            run("toy.py", f"--out_dir={place}")
    with pytest.raises(settings.UserError, match="the run ends at step 40"):
        run("toy.py", "--replay=41")
