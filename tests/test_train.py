"""The loop: exact resume, equality over ranks and accumulation, honest numbers, stopping."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OFFLOAD, ROOT, metrics, run_script
from safetensors.torch import load_file

import train
from model import LLaMA, ModelConfig, flops_per_token
from plainllama import settings
from plainllama.command import CommandLine, parse
from plainllama.files import as_json, write_json
from plainllama.machine import work
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.tokens.rows import CONTEXT, PAD
from plainllama.training import log, optim, resume


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


# ---- where a run stands, decision by decision

def command(overrides: dict | None = None, **keys) -> CommandLine:
    """A command line of config c.py with these keys, of which `overrides` are its options."""
    config = Settings(**keys | (overrides or {}))
    return CommandLine(config, None, [], "c.py", "", keys, overrides or {},
                       frozenset({**keys, **(overrides or {})}))


def test_a_mixture_is_validated_on_its_first_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/here").mkdir(parents=True)
    Path("data/here/manifest.json").write_text("{}")
    mixture = {"a": 1, "here": 2}
    for given, name, says in ((command(dataset="gone", mixture=mixture), "a", True),
                              (command(dataset="here", mixture=mixture), "here", False),
                              (command({"dataset": "gone"}, mixture=mixture), "gone", False),
                              (command(dataset="gone"), "gone", False)):
        assert resume.name_data_set(given) == (
            "validated on data/a, the first set of the mixture; --dataset=NAME names another"
            if says else "")
        assert given.config.dataset == name


def test_what_a_command_changes_is_said():
    given = command({"seed": 3, "max_steps": 9})
    assert resume.changed(given) == ""
    given.instead = {"seed": 1, "max_steps": "x" * 99}
    assert resume.changed(given) == (
        f"changed of c.py: seed 3 (there: 1), max_steps 9 (there: {'x' * 80})")


@pytest.mark.parametrize(("given", "recipe", "says"), [
    (command(), {}, ""), (command(min_chars=0), {"min_chars": 5}, ""),
    (command(min_chars=7), {"min_chars": 7}, ""), (command({"min_chars": 7}), {"min_chars": 7}, ""),
    (command(min_chars=7, dedup="near"), {"min_chars": 5},
     "data/openwebtext was prepared with min_chars=5, dedup='none': what c.py says of that has no "
     "effect"),
    (command(sources=["a"]), {"sources": [{"path": "a"}]}, ""),
    (command(sources="a"), {"sources": ["b"]},
     "data/openwebtext was prepared with sources=['b']: what c.py says of that has no effect"),
    (command({"sources": "a"}), {"sources": [{"path": "a"}]}, ""),
    (command({"workers": 2, "min_chars": 7}), {"min_chars": 5}, None),
    (command({"max_dropped": 0.2}), {}, None), (command({"strict": True}), {}, None)])
def test_the_recipe_is_the_data_sets(given, recipe, says):
    asked = [name for name in ("workers", "max_dropped", "strict", "min_chars")
             if name in given.overrides]
    if says is None:
        with pytest.raises(UserError) as seen:
            resume.keep_recipe(given, {"recipe": recipe})
        assert str(seen.value) == (
            f"{', '.join(asked)}: data/openwebtext is prepared, and otherwise; give these options "
            "to prepare.py, with a new --dataset")
        return
    assert resume.keep_recipe(given, {"recipe": recipe}) == says
    for name in ("min_chars", "sources", "dedup"):
        assert getattr(given.config, name) == recipe.get(name, getattr(Settings, name))


@pytest.fixture
def unsettled(monkeypatch, tmp_path):
    """settle() beside stand-ins of what it asks: `there` is the model of init_from, `found` what is
    called."""
    at = types.SimpleNamespace(there=None, steps=[], found=[], windows=100)
    monkeypatch.setattr(resume, "keep_recipe", lambda *_: "recipe")
    monkeypatch.setattr(resume, "model_folder", lambda config: at.there)
    monkeypatch.setattr(resume, "inherit", lambda _: (at.there, ["inherited"] * bool(at.there)))
    monkeypatch.setattr(resume, "vocabulary", lambda *_: (77, "grows" if at.there else ""))
    monkeypatch.setattr(resume, "steps_of", lambda _: at.steps)
    monkeypatch.setattr(resume.checkpoint, "find_checkpoint", lambda _: at.found.append("looked"))
    monkeypatch.setattr(resume, "refuse_other_model", lambda *_: at.found.append("compared"))
    monkeypatch.setattr(resume, "training_rows", lambda folder, *_: types.SimpleNamespace(
        windows=at.windows, folder=folder))
    return at


@pytest.mark.parametrize(("keys", "there", "steps", "found"), [
    ({}, None, [], []), ({"init_from": "x"}, None, [], ["looked"]),
    ({"init_from": "x"}, "model", [], ["compared"]), ({"init_from": "x"}, "model", ["step_1"], []),
    ({"init_from": "x", "lora_r": 2}, "model", [], ["compared"]),
    ({"init_from": "x", "expand": "stack", "expand_blocks": 2}, "model", [], ["compared"]),
    ({"init_from": "x", "documents": "preference", "objective": "dpo"}, "model", [], ["compared"]),
    ({"documents": "preference", "objective": "orpo"}, None, [], [])])
def test_a_config_is_settled(unsettled, keys, there, steps, found):
    unsettled.there, unsettled.steps = there, steps
    given = command(**keys)
    said = ["recipe", "inherited", "grows"] if there else ["recipe"]
    assert resume.settle(given, {}) == said and unsettled.found == found
    assert given.config.vocab_size == 77
    assert given.config.packing == ("fit" if "documents" in keys else "concat")


@pytest.mark.parametrize(("keys", "says"), [
    ({"documents": "preference"}, "objective=next is not for documents=preference; say "
                                  "--objective=dpo or orpo"),
    ({"objective": "dpo"}, "objective=dpo is not for documents=text; dpo and orpo want a set of "
                           "documents=preference"),
    ({"objective": "dpo", "documents": "preference"},
     "objective=dpo compares with the model that it begins with; say --init_from=MODEL"),
    ({"lora_r": 2}, "lora_r trains beside a model that is there; say --init_from=MODEL"),
    ({"expand": "stack", "expand_blocks": 2},
     "expand trains beside a model that is there; say --init_from=MODEL"),
    ({"min_lr": 1.0}, "min_lr 1.0 is above learning_rate")])
def test_a_config_that_cannot_be_settled(unsettled, keys, says):
    with pytest.raises(UserError) as seen:
        resume.settle(command(**keys), {})
    assert str(seen.value) == says


def test_epochs_are_steps(unsettled):
    """Rounded up, a rounding error aside; said where max_steps was given."""
    base = {"global_batch_tokens": 40, "block_size": 4, "warmup_steps": 0}
    for epochs, windows, steps in ((1.0, 100, 10), (0.5, 100, 5), (1.0, 101, 11), (3.0, 10, 3),
                                   (0.1, 1, 1), (0.3, 100, 3), (1.1, 100, 11)):
        unsettled.windows = windows
        given = command(epochs=epochs, **base)
        assert resume.settle(given, {}) == ["recipe",
                                            f"epochs {epochs:g}: {steps} steps of 10 rows"]
        assert given.config.max_steps == steps
    given = command(epochs=2.0, max_steps=99, **base | {"warmup_steps": 300})
    unsettled.windows = 100
    assert resume.settle(given, {}) == [
        "recipe", "epochs 2: 20 steps of 10 rows, in place of max_steps 99",
        "warmup_steps 300 does not fit into max_steps 20: the warm-up takes 2 of them"]
    with pytest.raises(UserError, match=r"^max_steps has no effect beside epochs; say one of them"):
        resume.settle(command({"max_steps": 5}, epochs=2.0, **base), {})


def test_which_model_a_run_goes_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in ("a/checkpoints/step_1", "a/checkpoints/step_2", "out/b/checkpoints/step_7",
                 "own/checkpoints/step_3", "own/checkpoints/step_4", "bad/checkpoints/step_1",
                 "hub", "lora", "none"):
        Path(step).mkdir(parents=True)
        if step != "none" and "step_2" not in step:
            (Path(step) / "config.json").write_text("{}")
    for run in ("a", "out/b", "own"):
        (Path(run) / "run.json").write_text("{}")
    (Path("lora") / "config.json").rename("lora/adapter_config.json")

    def whole(folder):
        if "bad" in str(folder) or folder.name == "step_4":
            raise UserError("damaged")

    monkeypatch.setattr(resume.peft, "whole_config", whole)
    for source, out, found in (("", "own", None), ("hub", "own", "own/checkpoints/step_3"),
                               ("hub", "bad", "hub"), ("hub", "new", "hub"),
                               ("lora", "new", "lora"),
                               ("a", "new", "a/checkpoints/step_1"), ("none", "new", None),
                               ("out", "new", "out/b/checkpoints/step_7"), ("gone", "new", None)):
        there = resume.model_folder(Settings(init_from=source, out_dir=out))
        assert there == (Path(found) if found else None), (source, out)


def test_what_is_inherited(monkeypatch):
    theirs = ModelConfig(3, 4, 64, 96, 300, 128, n_kv_head=4, rope_theta=5e5, tie_embeddings=True)
    monkeypatch.setattr(resume, "model_folder", lambda config: config.init_from and Path("m"))
    monkeypatch.setattr(resume.peft, "whole_config", lambda _: theirs)
    assert resume.inherit(command()) == (None, [])
    given = command({"d_ff": 7, "d_model": 64}, init_from="m", n_layer=2)
    model, said = resume.inherit(given)
    assert model is theirs and said == [
        "n_layer = 2 (as you say; m has 3)", "n_head = 4 (inherited from m)",
        "d_ff = 7 (as you say; m has 96)", "block_size = 128 (inherited from m)",
        "rope_theta = 500000.0 (inherited from m)", "tie_embeddings = True (inherited from m)"]
    c = given.config
    assert (c.n_layer, c.n_head, c.n_kv_head, c.d_model, c.d_ff, c.block_size, c.rope_theta,
            c.tie_embeddings, c.expand_blocks) == (2, 4, 0, 64, 7, 128, 5e5, True, 0)
    theirs = ModelConfig(16, 12, 768, 2048, 300, 1024, n_kv_head=6, expand="stack", expand_blocks=2)
    given = command(init_from="m")
    assert resume.inherit(given)[1] == [
        f"{name} = {value} (inherited from m)"
        for name, value in (("n_kv_head", 6), ("expand", "stack"), ("expand_blocks", 2))]
    given = command(init_from="m", expand="concat", expand_blocks=2)
    assert resume.inherit(given, ("expand", "n_kv_head"))[1] == [
        "expand = concat (as you say; m has stack)", "n_kv_head = 6 (inherited from m)"]
    theirs = ModelConfig(16, 12, 768, 2048, 300, 1024)  # it may grow now
    given = command(init_from="m", expand="concat", expand_blocks=2)
    assert resume.inherit(given)[1] == [] and given.config.expand_blocks == 2


@pytest.mark.parametrize(("asked", "entries", "there", "wanted", "grown"), [
    (0, 258, None, 258, False), (300, 258, None, 300, False), (258, 258, None, 258, False),
    (1, 1, None, 1, False), (257, 258, None, None, False), (1, 258, None, None, False),
    (0, 258, 300, 300, False), (0, 258, 258, 258, False), (0, 263, 258, 263, True),
    (300, 263, 258, 300, True), (260, 258, 300, 260, False)])
def test_how_many_entries_a_vocabulary_has(asked, entries, there, wanted, grown):
    config, manifest = Settings(vocab_size=asked), {"tokenizer": {"vocab_size": entries}}
    theirs = ModelConfig(1, 1, 2, 1, there, 1) if there else None
    if wanted is None:
        with pytest.raises(UserError) as seen:
            resume.vocabulary(config, manifest, theirs)
        assert str(seen.value) == (f"vocab_size {asked} is smaller than the 258 entries of the "
                                   "tokenizer; leave it 0")
        return
    assert resume.vocabulary(config, manifest, theirs) == (
        wanted, f"the vocabulary grows from {there} to {wanted} entries" if grown else "")


def test_how_a_run_begins(tmp_path, monkeypatch):
    """Whole runs are left as they are; a folder is locked before it is looked at, or made."""
    run, done = tmp_path / "out/r", []
    monkeypatch.setattr(resume, "starting_point", lambda run, *_: (
        done.append(f"looked, {run.is_dir() and (run / '.lock').exists()}"), point)[1])
    monkeypatch.setattr(resume, "source_of", lambda *_: Path("base"))
    monkeypatch.setattr(resume.checkpoint, "set_aside", lambda run, step: done.append(step))
    point = (None, {})
    for init, source in (("", None), ("x", Path("base"))):
        start = resume.begin(run, Settings(max_steps=5, init_from=init), {}, "", False, World())
        assert (start.source, start.state, start.step) == (source, {}, 0) and start.lock
        assert json.loads((run / "status.json").read_text()) == {"state": "running", "step": 0}
        assert (run / "checkpoints").is_dir()
        start.lock.close()
    assert done == ["looked, False", "looked, True"]
    point = (Path("own"), {"step": 4})
    for most, state in ((5, "running"), (4, "before"), (3, "before")):
        write_json(run / "status.json", {"state": "before"})
        done.clear()
        start = resume.begin(run, Settings(max_steps=most, init_from="x"), {}, "", False, World())
        assert (start.source, start.step) == (Path("own"), 4) and start.lock
        assert json.loads((run / "status.json").read_text())["state"] == state
        assert done[1:] == [4] * (state == "running")
        start.lock.close()
    # nobody was here when this process looked, and now there is a checkpoint
    point, other = (None, {}), tmp_path / "other"
    monkeypatch.setattr(resume, "steps_of", lambda _: [1])
    with pytest.raises(UserError) as seen:
        resume.begin(other, Settings(), {}, "", False, World())
    assert str(seen.value) == f"another process has begun to train in {other}; start again"


def test_where_a_run_goes_on(tmp_path, monkeypatch):
    compared: list = []
    monkeypatch.setattr(resume, "steps_of", lambda _: [tmp_path / name for name in there])
    monkeypatch.setattr(resume.checkpoint, "newest_good", lambda _: good)
    monkeypatch.setattr(resume.checkpoint, "damage", lambda folder: f"torn {folder.name}")
    monkeypatch.setattr(resume.checkpoint, "read_state", lambda folder: {"of": folder})
    monkeypatch.setattr(resume, "refuse_other_run", lambda *given: compared.append(given))
    for how, there, good, expected in (  # noqa: B007, what stands in asks for them
            ("auto", [], None, (None, {})), ("never", [], None, (None, {})),
            ("must", [], None, f"resume=must, but {tmp_path} holds no whole checkpoint"),
            ("auto", ["step_2"], "a", ("a", {"of": "a"})),
            ("must", ["step_2"], "a", ("a", {"of": "a"})),
            ("never", ["step_2"], "a",
             f"resume=never, but {tmp_path} is at step_2; choose another out_dir"),
            ("must", ["step_2"], None, f"resume=must, but {tmp_path} holds no whole checkpoint"),
            ("auto", ["step_2", "step_1"], None,
             f"no checkpoint in {tmp_path} can be used (step_2: torn step_2); choose another "
             "out_dir")):
        config = Settings(resume=how)
        compared.clear()
        if isinstance(expected, str):
            with pytest.raises(UserError) as seen:
                resume.starting_point(tmp_path, config, "hash", True)
            assert str(seen.value) == expected
        else:
            assert resume.starting_point(tmp_path, config, "hash", True) == expected
            assert compared == ([({"of": "a"}, config, "hash", True, "a")] if good else [])


@pytest.mark.parametrize(("was", "now", "extend", "says"), [
    ({}, {}, False, None), ({}, {"out_dir": "b", "device": "cpu"}, False, None),
    ({"vocab_size": 258}, {"vocab_size": 0}, False, None),
    ({"vocab_size": 258}, {"vocab_size": 300}, False,
     "vocab_size=258, now it is 300; say --vocab_size=258, or choose another out_dir"),
    ({"n_layer": 2}, {"n_layer": 3}, True,
     "n_layer=2, now it is 3; say --n_layer=2, or choose another out_dir"),
    ({"max_steps": 2}, {"max_steps": 3}, False,
     "max_steps=2, now it is 3; say --max_steps=2, or say --extend to accept it"),
    ({"max_steps": 2}, {"max_steps": 3}, True, None),
    ({"init_from": "a"}, {"init_from": "b"}, True,
     "init_from=a, now it is b; say --init_from=a, or choose another out_dir"),
    ({"init_from": "a"}, {"init_from": "moved"}, True, None),
    ({"init_from": "a", "n_layer": 2}, {"init_from": "moved"}, True,
     "n_layer=2, now it is 16; say --n_layer=2, or choose another out_dir"),
    ({"packing": "doc"}, {"packing": "concat"}, True,
     "packing=doc, now it is concat; say --packing=doc, or choose another out_dir")])
def test_a_run_that_is_another(monkeypatch, was, now, extend, says):
    config = Settings(**{"packing": "concat", **now})
    monkeypatch.setattr(resume.peft, "lost_its_base", lambda _: config.init_from == "moved")
    state = {"config": asdict(Settings(packing="concat", **was) if "packing" not in was else
                              Settings(**was)), "data_hash": "h"}
    if says:
        with pytest.raises(UserError) as seen:
            resume.refuse_other_run(state, config, "h", extend, Path("s"))
        assert str(seen.value) == f"s was trained with {says}"
        return
    resume.refuse_other_run(state, config, "h", extend, Path("s"))
    resume.refuse_other_run(state | {"config": was}, config, "h", extend, Path("s"))
    with pytest.raises(UserError) as seen:
        resume.refuse_other_run(state, config, "other", extend, Path("s"))
    assert str(seen.value) == ("s was trained on another data/openwebtext; choose another out_dir")


def test_a_model_that_is_another(tmp_path):
    """More entries are none where the data set's tokenizer was made of the model's."""
    one = ModelConfig(1, 2, 8, 9, 258, 16)
    for base, entries, says in (("", 258, ""), ("b", 258, ""), ("b", 263, ""), ("", 263, "vocab"),
                                ("b", 257, "vocab"), ("", 257, "vocab")):
        ours, manifest = ModelConfig(1, 2, 8, 9, entries, 16), {"tokenizer": {"base": base}}
        if says:
            with pytest.raises(UserError, match=r"^init_from: x is another model than the config's"
                               "; to go on from it say --vocab_size=258$"):
                resume.refuse_other_model(Path("x"), one, ours, manifest)
        else:
            resume.refuse_other_model(Path("x"), one, ours, manifest)
    with pytest.raises(UserError, match="d_ff=9"):
        resume.refuse_other_model(Path("x"), one, ModelConfig(1, 2, 8, 10, 263, 16),
                                  {"tokenizer": {"base": "b"}})


def test_a_tokenizer_that_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "sha256_of", lambda path: path.read_text())
    monkeypatch.setattr(resume.tokenizer, "make_tokenizer", lambda spec: types.SimpleNamespace(
        sha256="made of " + Path(spec).read_text()))
    for name, text, known, fits in (
            ("tokenizer.json", "a", {"sha256": "a"}, True),
            ("tokenizer.json", "b", {"sha256": "a", "base": "b"}, True),
            ("tokenizer.json", "c", {"sha256": "a", "base": "b"}, False),
            ("tokenizer.model", "c", {"sha256": "made of c"}, True),
            ("tokenizer.model", "c", {"sha256": "c"}, False), (None, "", {"sha256": "a"}, True)):
        for old in tmp_path.iterdir():
            old.unlink()
        if name:
            (tmp_path / name).write_text(text)
        if fits:
            resume.refuse_other_tokenizer(tmp_path, {"tokenizer": known})
            continue
        with pytest.raises(UserError) as seen:
            resume.refuse_other_tokenizer(tmp_path, {"tokenizer": known})
        path = tmp_path / name
        assert str(seen.value) == (f"{path} is not the tokenizer of the data set; prepare one with "
                                   f"--tokenizer={path}")
    (tmp_path / "tokenizer.json").write_text("made of a")  # the first of two is the one that counts
    resume.refuse_other_tokenizer(tmp_path, {"tokenizer": {"sha256": "made of a"}})


def test_whose_template_is_kept(monkeypatch):
    def find(folder):
        if folder.name == "none":
            raise UserError("no template")
        return "a template"

    monkeypatch.setattr(resume, "find_template", find)
    for source, documents, kept in ((None, "text", ""), (Path("x"), "text", "a template"),
                                    (Path("none"), "text", ""), (Path("x"), "table", "a template"),
                                    (Path("x"), "chat", ""), (Path("x"), "preference", "")):
        assert resume.kept_template(source, Settings(documents=documents)) == kept


def test_an_adapter_or_a_model_that_does_not_fit(monkeypatch):
    """What is asked of the checkpoint that init_from means, by what is trained."""
    asked = []
    monkeypatch.setattr(resume.peft, "is_adapter", lambda folder: folder.name == "adapter")
    monkeypatch.setattr(resume.peft, "whole_config", lambda _: types.SimpleNamespace(vocab_size=5))
    monkeypatch.setattr(resume.peft, "tokenizer_folder", lambda folder: folder)
    monkeypatch.setattr(resume, "read_config", lambda folder: types.SimpleNamespace(
        expand_blocks=2 if folder.name == "grown" else 0))
    monkeypatch.setattr(resume.expansion, "first_new", lambda *_: new)
    monkeypatch.setattr(resume, "fitting", lambda *given: asked.append(given[2:]))
    monkeypatch.setattr(resume, "refuse_rounding", lambda *_: asked.append("rounding"))

    def outline(config, source):
        asked.append(source)
        return types.SimpleNamespace(
            model=types.SimpleNamespace(embed_tokens=types.SimpleNamespace(weight=ends[0])),
            lm_head=types.SimpleNamespace(weight=ends[1])), None

    monkeypatch.setattr(resume, "outline", outline)
    learns, frozen = (types.SimpleNamespace(requires_grad=flag) for flag in (True, False))
    for name, keys, new, ends, expected in (  # noqa: B007, what stands in asks for them
            ("plain", {}, 0, (learns, learns), [None, (False, True)]),
            ("plain", {}, 4, (frozen, frozen), [None, (True, True)]),
            ("grown", {}, 0, (learns, learns), [None, (False, False)]),
            ("plain", {"expand_blocks": 2}, 0, (learns, learns), [Path("plain"), (False, True)]),
            ("adapter", {"lora_r": 2}, 0, (learns, learns), [Path("adapter")]),
            ("plain", {"frozen_dtype": "bf16"}, 0, (learns, learns),
             [None, (False, True), "rounding"]),
            ("adapter", {"frozen_dtype": "bf16", "lora_r": 2}, 0, (learns, learns),
             [Path("adapter")]),
            ("plain", {"train_only": "x"}, 0, (frozen, frozen), [None, (False, True)]),
            ("plain", {"train_only": "x"}, 4, (learns, learns), [None, (True, True)]),
            ("plain", {"train_only": "x"}, 4, (learns, frozen), "embed_tokens,lm_head"),
            ("plain", {"train_only": "x"}, 4, (frozen, frozen), "embed_tokens,lm_head"),
            ("plain", {"train_only": "x", "tie_embeddings": True}, 4, (frozen, frozen),
             "embed_tokens")):
        asked.clear()
        if isinstance(expected, str):
            with pytest.raises(UserError) as seen:
                resume.refuse_other_part(Path(name), Settings(**keys))
            assert str(seen.value) == (f"train_only freezes the rows of new tokens; add {expected} "
                                       "to it, or train an adapter (lora_r)")
        else:
            resume.refuse_other_part(Path(name), Settings(**keys))
            assert asked == expected


class Numbers:
    """Rows of four tokens, of which row n has n + 1 learned; windows are by hundreds."""

    def window_of(self, first, n):
        return np.arange(first, first + n) + 100

    def read_windows(self, windows):
        rows = np.tile(np.arange(4), (len(windows), 1)) + 10 * np.array(windows)[:, None]
        rows[:, 0] |= CONTEXT
        rows[:, 3] = PAD
        return rows

    def targets(self, first, n):
        assert n >= 0
        return sum(range(first + 1, first + n + 1))

    def tokens(self, first, n):
        return 4 * n

    def pairs(self, first, n):
        return n


@pytest.mark.parametrize(("step", "first", "batch"), [
    (1, 0, 8), (2, 8, 8), (5, 32, 8), (6, 40, 2), (8, 44, 2), (9, 46, 3), (12, 55, 3)])
def test_the_rows_of_any_step_are_shown(tmp_path, monkeypatch, capsys, step, first, batch):
    """By what the run has written down, and behind that by the config's batch."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    rows = [{"step": 0, "val_loss": 1.0}, {"step": 3, "rows": 24}, {"step": 5, "rows": 40},
            {"step": 8, "rows": 46}]
    Path("out/metrics.jsonl").write_text("{]\n" + "".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(resume, "training_rows", lambda *_: Numbers())
    words = types.SimpleNamespace(decode=lambda ids: f"text {list(map(int, ids))}")
    monkeypatch.setattr(resume.tokenizer.Tokenizer, "load", lambda _: words)
    monkeypatch.setattr(resume, "chat_of", lambda _: types.SimpleNamespace(
        show=lambda ids, learned, colour: f"{list(map(int, ids))} {learned.tolist()} {colour}"))
    for documents in ("text", "chat"):
        config = Settings(out_dir="out", global_batch_tokens=3 * 8 + 7, block_size=8, max_steps=12,
                          documents=documents)
        assert resume.replay(config, {}, step) == 0
        expected = [f"step {step}: rows {first} to {first + batch - 1}"]
        for row in range(first, first + batch):
            start = 10 * (row + 100)
            expected += [f"--- row {row}: window {row + 100} of the train split",
                         f"text {[start, start + 1, start + 2]}" if documents == "text" else
                         f"{[start, start + 1, start + 2]} [False, True, True] False"]
        assert capsys.readouterr().out.splitlines() == expected
    with pytest.raises(UserError, match=r"^--replay=13: the run ends at step 12$"):
        resume.replay(config, {}, 13)
    config.max_steps = 3
    assert resume.replay(config, {}, 8) == 0
    with pytest.raises(UserError, match=r"^--replay=9: the run ends at step 8$"):
        resume.replay(config, {}, 9)
    monkeypatch.setattr(resume, "steps_of", lambda _: ["newest", "older"])
    monkeypatch.setattr(resume, "hash_of_data", lambda *_: "hash")
    monkeypatch.setattr(resume.checkpoint, "read_state", lambda folder: folder)
    monkeypatch.setattr(resume, "refuse_other_run", lambda *given: compared.append(given))
    compared: list = []
    resume.replay(config, {}, 1)
    assert compared == [("newest", config, "hash", True, "newest")]


@pytest.mark.parametrize("state", [{}, {"step": 5, "rows": 37}])
def test_a_course_is_a_function_of_the_step(state):
    """However it is asked, forwards or backwards."""
    course = resume.Course(Numbers(), 3, resume.OBJECTIVES["next"], state)
    begin, rows = state.get("step", 0), state.get("rows", 0)
    assert (course.first_step, course.first_row) == (begin, rows)
    for step in (begin, begin + 2, begin + 2, begin + 1, begin + 4, begin):
        at = rows + 3 * (step - begin)
        assert course.rows_at(step) == at
        assert course.windows(step).tolist() == [at + 100, at + 101, at + 102]
        assert course.targets_of(step) == 3 * at + 6 and course.read_in(step) == 12
        assert course.tokens_at(step) == at * (at + 1) // 2 and course.read_at(step) == 4 * at
    asked, count = [], Numbers.targets
    course.rows.targets = lambda first, n: asked.append((first, n)) or count(course.rows, first, n)
    course.tokens_at(begin + 1)
    course.tokens_at(begin + 1)
    course.tokens_at(begin + 2)
    assert asked == [(rows, 3), (rows + 3, 0), (rows + 3, 3)]  # what is counted stays so
    assert resume.Course(Numbers(), 3, resume.OBJECTIVES["orpo"], state).targets_of(begin) == 3


# ---- what a run writes about itself

PEAKS = {  # TFLOP/s
    "NVIDIA B300": 2250, "NVIDIA B200": 2250, "NVIDIA GH200 480GB": 990, "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 NVL": 835, "NVIDIA H100 PCIe": 756,
    "NVIDIA H20": 148, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA L40S": 362,
    "NVIDIA L4": 121, "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA RTX A6000": 155,
    "NVIDIA RTX 6000 Ada Generation": 364, "NVIDIA GeForce RTX 5090": 210,
    "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 3090": 71, "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-SXM2-16GB": 125, "Tesla T4": 65}


def engine(**parts) -> types.SimpleNamespace:
    """As much of an engine as is described: four layers' worth of 8 wide."""
    made = types.SimpleNamespace(
        model=LLaMA(ModelConfig(1, 2, 8, 12, 20, 4)), world=World(), adapter=None, micro=2,
        accumulate=3, batch_rows=6, summary="float32, eager",
        config=Settings(block_size=4, max_steps=100))
    vars(made).update(parts)
    return made


def test_the_share_of_a_devices_peak(monkeypatch):
    assert {name: peak / 1e12 for name, peak in log.PEAKS.items()} == PEAKS
    one, world = engine(), types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), size=3)
    flops = flops_per_token(one.model.config, 4)
    assert log.mfu(one, 1000.0) is None  # a CPU
    one.world = world
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H2000", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert log.mfu(one, 1000.0) == (peak and pytest.approx(1000 * flops / (3 * peak)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    next(one.model.parameters()).requires_grad_(False)
    assert log.mfu(one, 1000.0) is None
    assert [log.percent(share) for share in (None, 0.0, 0.1234, 1.0)] == [
        "n/a", "n/a", "12.3%", "100.0%"]


def test_the_most_memory_so_far(monkeypatch):
    import resource

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 77)
    monkeypatch.setattr(resource, "getrusage", lambda _: types.SimpleNamespace(ru_maxrss=5))
    for kind, system, most in (("cuda", "linux", 77), ("cpu", "linux", 5120), ("mps", "darwin", 5)):
        monkeypatch.setattr(sys, "platform", system)
        assert log.peak_memory(types.SimpleNamespace(type=kind)) == most


def test_a_run_is_described(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "versions", lambda: "versions")
    monkeypatch.setattr(log, "git_state", lambda: "git")
    monkeypatch.setattr(log, "cpu_name", lambda: "a CPU")
    monkeypatch.setattr(log, "example", lambda *_: {"example": "a dialog"})
    monkeypatch.setattr(log.time, "time", lambda: 1234.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    given = command({"seed": 3}, n_layer=2, dataset="toy", vocab_size=20)
    given.instead = {"seed": 1}
    splits = {"train": {"tokens": 9, "bytes": 8, "learned": 7}, "val": {"tokens": 6}}
    manifest = {"recipe": {"sources": "s"}, "splits": splits, "tokenizer": "words"}
    one = engine()
    expected = {
        "format": 1, "config": asdict(given.config), "config_file": "c.py", "base": "",
        "changed": {"n_layer": 2, "dataset": "toy", "vocab_size": 20}, "overrides": {"seed": 3},
        "instead": {"seed": 1}, "versions": "versions", "git": "git",
        "device": {"type": "cpu", "name": "a CPU", "count": 1, "threads": torch.get_num_threads()},
        "data": {"name": "toy", "tokenizer": "words", "vocab_size": 20, "manifest_sha256": "hash",
                 "sources": "s", "renderers": [], "train_tokens": 9, "train_bytes": 8,
                 "val_tokens": 6, "val_bytes": None, "train_learned": 7},
        "started": 1234.5, "parameters": {"total": 888, "non_embedding": 568},
        "example": "a dialog"}
    assert log.describe(tmp_path, given, manifest, "hash", one, tmp_path) == expected
    write_json(tmp_path / "run.json", {"started": 99.0})
    one.model.lm_head.weight.requires_grad_(False)
    one.world = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), size=2)
    manifest["source"] = [{"renderer": "r"}, {}]
    expected["device"] |= {"type": "cuda", "name": "a GPU", "count": 2}
    expected["data"] |= {"renderers": ["r"]}
    expected |= {"started": 99.0, "parameters": {"total": 888, "non_embedding": 568,
                                                 "trained": 728}}
    assert log.describe(tmp_path, given, manifest, "hash", one, tmp_path) == expected
    (tmp_path / "run.json").write_text("{")
    assert log.describe(tmp_path, given, manifest, "hash", one, tmp_path)["started"] == 1234.5


def test_the_dialog_that_is_an_example(monkeypatch):
    monkeypatch.setattr(log.Tokenizer, "load", lambda _: "words")
    monkeypatch.setattr(log, "pieces", lambda words, ids, mask: (words, ids, mask))
    for masked, documents, bounds, read in (
            (True, 2, [7, 90, 200], (7, 90)), (True, 1, [7, 2007], (7, 2007)),
            (True, 1, [7, 2008], (7, 2007)), (False, 2, [7, 9], None), (True, 0, [], None)):
        split = types.SimpleNamespace(
            masked=masked, documents=documents, bounds=lambda bounds=bounds: np.array(bounds),
            read=lambda a, b: ("ids", a, b), read_mask=lambda a, b: ("mask", a, b))
        monkeypatch.setattr(log, "Split", lambda *_, split=split: split)
        assert log.example(Path(), {}) == ({"example": (
            "words", ("ids", *read), ("mask", *read))} if read else {})


def test_names_of_versions_processor_and_commit(monkeypatch):
    def version(package):
        if package == "numpy":
            raise log.importlib.metadata.PackageNotFoundError
        return f"{package} 1"

    monkeypatch.setattr(log.importlib.metadata, "version", version)
    assert log.versions() == {
        "python": log.platform.python_version(), "torch": "torch 1", "numpy": "not installed",
        "safetensors": "safetensors 1", "tokenizers": "tokenizers 1"}
    for text, processor, name in (("x\nmodel name\t: A  B \nmodel name : C\n", "p", "A  B"),
                                  ("model name\t: \n", "p", "p"), ("", "p", "p"), (None, "", "m")):
        def read(encoding, errors, text=text):
            if text is None:
                raise OSError
            return text

        monkeypatch.setattr(log, "Path", lambda name, read=read: types.SimpleNamespace(
            read_text=read))
        monkeypatch.setattr(log.platform, "processor", lambda processor=processor: processor)
        monkeypatch.setattr(log.platform, "machine", lambda: "m")
        assert log.cpu_name() == name
    asked = []

    def git(words, **keys):
        asked.append((words[1:], keys))
        silent = words[1] == "status" and not state
        return types.SimpleNamespace(stdout="" if silent else f" {words[1]}\n")

    monkeypatch.setattr(log.subprocess, "run", git)
    for state in (True, False):
        assert log.git_state() == {"commit": "rev-parse", "dirty": state}
    assert asked[:2] == [(words, {"cwd": log.CHECKOUT, "capture_output": True, "text": True,
                                  "timeout": 10, "check": True}) for words in (
        ["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]
    for error in (FileNotFoundError(), subprocess.TimeoutExpired("git", 1)):
        monkeypatch.setattr(log.subprocess, "run", lambda *_, error=error, **__: (
            _ for _ in ()).throw(error))
        assert log.git_state() == {}


def test_rows_on_their_way_to_boards(tmp_path, monkeypatch):
    import torch.utils.tensorboard

    made, ended = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, *given):
            made.append(given)

        def flush(self):
            made.append("flushed")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", Writer)
    monkeypatch.setattr(threading, "excepthook", None)
    monkeypatch.setattr(threading, "__excepthook__", ended.append)
    for step, purged in ((0, 0), (1, 2), (40, 41)):
        made.clear()
        write = log.tensorboard(tmp_path, step)
        assert made == [(str(tmp_path), purged)]
    write({"step": 7, "time": 1.0, "loss": 2.5, "mfu": None, "lr": 0})
    assert made[1:] == [("loss", 2.5, 7), ("lr", 0, 7), "flushed"]
    silent = type("_AsyncWriterThread", (), {})()
    for thread in (silent, "another"):
        threading.excepthook(types.SimpleNamespace(thread=thread))
    assert [args.thread for args in ended] == ["another"]
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **keys: begun.append(keys) or types.SimpleNamespace(
            log=lambda row, step: begun.append((row, step)))))
    log.wandb(tmp_path / "r", Settings())({"step": 3, "loss": 1.0})
    key = hashlib.sha256(str((tmp_path / "r").resolve()).encode()).hexdigest()
    assert begun == [{"project": "plainllama", "name": "r", "dir": str(tmp_path / "r"),
                      "resume": "allow", "id": key[:16], "config": asdict(Settings())},
                     ({"step": 3, "loss": 1.0}, 3)]


@pytest.fixture
def plain_log(monkeypatch):
    """log.Log with a board that keeps its rows."""
    rows: list = []
    monkeypatch.setattr(log, "tensorboard", lambda run, step: rows.append(step) or rows.append)
    return rows


def test_a_log_begins_where_the_run_does(tmp_path, plain_log, capsys):
    """Rows after the step are written again; a run without a checkpoint begins anew."""
    rows = "".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2))
    for step, kept in ((0, ()), (1, (0, 1)), (2, (0, 1, 2))):
        for name in ("metrics.jsonl", "samples.jsonl", "other.jsonl"):
            (tmp_path / name).write_text(rows)
        one = log.Log(tmp_path, step, active=True)
        assert plain_log.pop() == step and one.sinks.keys() == {"TensorBoard"}
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert [row["step"] for row in map(json.loads, (
                tmp_path / name).read_text().splitlines())] == list(kept)
        assert (tmp_path / "other.jsonl").read_text() == rows
    (tmp_path / "metrics.jsonl").write_text(rows)
    other = log.Log(tmp_path, 0, active=False)
    other.row({"step": 9})
    other.say("x")
    other.status("running", 3)
    assert (tmp_path / "metrics.jsonl").read_text() == rows and not plain_log
    assert not (tmp_path / "status.json").exists() and capsys.readouterr().out == ""
    one.say("x")
    one.status("running", 3)
    assert capsys.readouterr().out == "x\n"
    assert (tmp_path / "status.json").read_text() == as_json({"state": "running", "step": 3})


def test_rows_that_are_lost_are_said_once(tmp_path, plain_log, monkeypatch, capsys):
    one, whole, full = log.Log(tmp_path, 0, active=True), open, [True]

    class Half:
        """A file on a disk that takes half of what is written."""

        def __init__(self, *given, buffering):
            self.file = whole(*given, buffering=buffering)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            return self.file.write(data[:len(data) // 2 if full[0] else None])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(log, "open", Half, raising=False)
    full[0] = False
    one.row({"step": 1, "loss": math.nan, "norm": math.inf, "mfu": None, "lr": 0.5})
    full[0] = True
    for step in (2, 3):
        one.row({"step": step})
        one.line("samples.jsonl", {"step": step})
    full[0] = False
    one.row({"step": 4})
    text = '{"step": 1, "loss": null, "norm": null, "mfu": null, "lr": 0.5}\n{"step": 4}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert (tmp_path / "samples.jsonl").read_text() == ""
    assert [row["step"] for row in plain_log[1:]] == [1, 2, 3, 4] and plain_log[1]["loss"] is None
    assert capsys.readouterr().out.splitlines() == [
        f"WARNING: rows of {name} are lost: [Errno 28] No space left on device: '{name}'; training "
        "goes on" for name in ("metrics.jsonl", "samples.jsonl")]
    monkeypatch.setattr(log, "write_status", lambda *_: (_ for _ in ()).throw(OSError("full")))
    one.status("running", 3)
    assert capsys.readouterr().out == "WARNING: status.json is not up to date: full\n"
    one.sinks["x"] = lambda row: 1 / 0
    one.row({"step": 5})
    one.row({"step": 6})
    assert capsys.readouterr().out == ("WARNING: x does not work: ZeroDivisionError('division by "
                                       "zero'); metrics.jsonl goes on\n")
    assert one.sinks.keys() == {"TensorBoard"}
    one.connect("none", lambda: None)
    assert one.sinks.keys() == {"TensorBoard"}


@pytest.mark.parametrize(("size", "rows", "windows", "overfit", "more"), [
    (1, 6, 12, 0, []), (2, 6, 11, 0, ["note: each row is read 55 times; say epochs=3, or fewer "
                                      "max_steps"]),
    (1, 304, 600, 0, ["note: each row is read 51 times; say epochs=3, or fewer max_steps"]),
    (6, 6, 11, 3, []), (7, 6, 99, 0, ["WARNING: 6 rows a step for 7 ranks: some wait"])])
def test_what_is_trained_is_announced(tmp_path, plain_log, monkeypatch, capsys, size, rows, windows,
                                      overfit, more):
    monkeypatch.setattr(log.adapters, "summary", lambda *_: "learns: x" if size == 2 else "")
    one = engine(world=World(), batch_rows=rows, summary="float32, eager",
                 config=Settings(block_size=2048, max_steps=100, overfit_rows=overfit))
    one.world.size, one.world.mode = size, "one" if size == 1 else "ddp"
    one.world.why = "auto takes it" if size == 2 else ""
    read = types.SimpleNamespace(windows=windows, summary=lambda n: f"{n} of {windows} rows")
    log.Log(tmp_path, 0, active=True).announce(one, read, "changed of" if size == 2 else "")
    said = [f"model: 0.0 M parameters, 0.0 M without embeddings; cpu, float32, eager, "
            f"{'one process' if size == 1 else 'ddp'}",
            *["learns: x", "auto takes it", "changed of"] * (size == 2),
            f"batch: global {rows * 2048:,} tok = {size} cpu x 2048 x 2 x 3 (micro-batch x "
            "accumulation)"]
    warning = [line for line in more if "WARNING" in line]
    note = [line for line in more if "note" in line]
    assert capsys.readouterr().out.splitlines() == [
        *said, *warning, f"data: {100 * rows} of {windows} rows in 100 steps", *note]


def test_an_update_is_one_line(tmp_path, plain_log, capsys):
    one = log.Log(tmp_path, 0, active=True)
    row = {"step": 3, "loss": 2.0, "lr": 0.001, "grad_norm": 0.5, "tokens_per_second": 12345.6,
           "mfu": None}
    one.update(row, {"data_seconds": 1.0, "row_seconds": 10.0}, "1:00", 9)
    one.update(row | {"learned_tokens_per_second": 1234.5, "mfu": 0.5}, {"row_seconds": 1.0},
               "0:01", 9)
    assert capsys.readouterr().out.splitlines() == [
        "step 3/9: loss 2.0000, lr 1.00e-03, grad norm 0.50, 12,346 tok/s, MFU n/a, data 10%, 1:00 "
        "left",
        "step 3/9: loss 2.0000, lr 1.00e-03, grad norm 0.50, 12,346 tok/s, 1,234 learned, MFU "
        "50.0%, 0:01 left"]
    assert plain_log[1] == row | {"data_seconds": 1.0, "row_seconds": 10.0}


def test_a_clock_sets_apart_what_is_no_training(monkeypatch):
    now = [64.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    clock = log.Clock()
    clock.start(100, 10)
    passes(2)
    for name, training, seconds in (("data", True, 1), ("eval", False, 4), ("data", True, 2),
                                    ("eval", False, 1)):
        with clock.apart(name, training) if training else clock.apart(name):
            passes(seconds)
    assert clock.read(150, 35) == ([10.0, 5.0], {"data": 3.0, "eval": 5.0, "row_seconds": 10.0})
    passes(4)
    assert clock.read(158, 37) == ([2.0, 0.5], {"row_seconds": 4.0})
    assert clock.read(158, 38) == ([0.0, pytest.approx(1e9)], {"row_seconds": 0.0})
    with pytest.raises(ValueError, match="argument"):
        clock.read(1)
    assert log.shares({"data_seconds": 1.0, "eval_seconds": 0.05, "save_seconds": 0.0499,
                       "row_seconds": 10.0}) == "data 10%, eval 0%, "
    assert log.shares({"data_seconds": 0.0, "row_seconds": 0.0}) == ""
    assert log.shares({"data_seconds": 0.02, "row_seconds": 0.1}) == "data 20%, "


def test_a_trace_of_three_steps(tmp_path, monkeypatch, capsys):
    begun = []
    profile = types.SimpleNamespace(start=lambda: begun.append("started"), step="a step")
    monkeypatch.setattr(torch.profiler, "schedule", lambda **keys: keys)
    monkeypatch.setattr(torch.profiler, "profile", lambda **keys: begun.append(keys) or profile)
    assert log.profiler(tmp_path) == "a step" and begun[1] == "started"
    assert begun[0]["schedule"] == {"wait": 2, "warmup": 1, "active": 3, "repeat": 1}
    kept, place = [], tmp_path / "trace.json"
    for error in (None, OSError("full"), RuntimeError("twice")):
        def export(path, error=error):
            kept.append(path)
            if error:
                raise error

        begun[0]["on_trace_ready"](types.SimpleNamespace(export_chrome_trace=export))
    assert kept == [str(place)] * 3
    assert capsys.readouterr().out.splitlines() == [
        f"trace of three steps in {place}; open it in https://ui.perfetto.dev",
        f"WARNING: no trace in {place}: full; training goes on",
        f"WARNING: no trace in {place}: twice; training goes on"]


# ---- the loop, on stand-ins for what it drives

def test_the_options_of_a_run():
    assert (train.STOPPED, train.FIRST_SAVE, train.PATIENCE) == (75, 300, 10)
    assert vars(train.Flags()) == {"extend": False, "check": False, "price": 0.0, "replay": 0,
                                   "profile": False}
    for word, says in (("--price=-1", "at least 0"), ("--replay=-1", "at least 0")):
        with pytest.raises(UserError, match=says):
            parse([word], "", train.Flags)
    assert parse(["--price=0", "--replay=0"], "", train.Flags).flags == train.Flags()


@pytest.mark.parametrize(("keys", "says"), [
    ({}, ""), ({"check": True, "price": 3.0}, ""), ({"extend": True, "profile": True}, ""),
    ({"replay": 3}, ""), ({"check": True}, ""),
    ({"price": 3.0}, "--price is for --check, which says what a run will cost"),
    ({"price": 3.0, "replay": 1}, "--price is for --check, which says what a run will cost"),
    ({"check": True, "extend": True},
     "--extend and --check are not done together; say one of them"),
    ({"check": True, "price": 1.0, "profile": True},
     "--check and --profile are not done together; say one of them"),
    ({"replay": 3, "profile": True, "extend": True},
     "--extend and --replay and --profile are not done together; say one of them")])
def test_options_that_would_do_nothing(keys, says):
    if not says:
        train.refuse_idle(train.Flags(**keys))
        return
    with pytest.raises(UserError) as seen:
        train.refuse_idle(train.Flags(**keys))
    assert str(seen.value) == says


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """main() beside stand-ins, which write down that they were called; `at` says what they give."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    at = types.SimpleNamespace(done=[], named="", settled=[], refusal="", there=None)

    def note(name, value=None):
        return lambda *_: at.done.append(name) or value

    world = types.SimpleNamespace(close=note("closed"))
    for place, name, value in (
            (train.parallel, "pick_device", "cpu"), (train.parallel, "pick_dtype", None),
            (train.parallel, "start", world), (train.memory, "foresee", None),
            (train.resume, "replay", 11), (train.resume, "refuse_other_part", None),
            (train.preflight, "run_checks", 12), (train, "refuse_too_large", None),
            (train, "outline", None), (train, "open_sets", None), (train, "train", 13)):
        monkeypatch.setattr(place, name, note(name, value))
    monkeypatch.setattr(train.shards, "read_manifest", lambda folder, config: folder)
    monkeypatch.setattr(train.resume, "name_data_set", lambda _: at.named)
    monkeypatch.setattr(train.resume, "settle", lambda _, manifest: at.settled if (
        manifest == Path("data/toy")) else None)
    monkeypatch.setattr(train.resume, "model_folder", lambda _: at.there)
    monkeypatch.setattr(train.parallel, "attention_refusal", lambda *_: at.refusal)

    def go(**flags):
        at.done.clear()
        given = command(dataset="toy", out_dir="out/r")
        given.flags = train.Flags(**flags)
        return train.main(given)

    at.go = go
    return at


def test_what_main_does_in_turn(stubbed, monkeypatch, capsys):
    before = ["pick_device", "pick_dtype"]
    assert stubbed.go() == 13
    assert stubbed.done == [*before, "start", "refuse_too_large", "outline", "train", "closed"]
    assert stubbed.go(replay=2) == 11 and stubbed.done == [*before, "replay"]
    checked = ["refuse_too_large", "outline", "open_sets", "run_checks", "closed"]
    assert stubbed.go(check=True) == 12
    assert stubbed.done == [*before, "start", "foresee", *checked]
    stubbed.there = Path("base")
    assert stubbed.go(check=True) == 12
    assert stubbed.done == [*before, "start", "refuse_other_part", "foresee", *checked]
    Path("out/r/checkpoints/step_1").mkdir(parents=True)
    assert stubbed.go(check=True) == 12
    assert stubbed.done == [*before, "start", "foresee", *checked]
    assert capsys.readouterr().out == ""
    stubbed.named, stubbed.settled = "named", ["one", "two"]
    stubbed.go()
    assert capsys.readouterr().out == "named\none\ntwo\n"
    for rank, said in (("1", ""), ("0", "named\none\ntwo\n")):
        monkeypatch.setenv("RANK", rank)
        stubbed.go()
        assert capsys.readouterr().out == said
    stubbed.refusal = "attention cannot"
    with pytest.raises(UserError, match=r"^attention cannot$"):
        stubbed.go()
    assert stubbed.done == before
    stubbed.refusal = ""
    monkeypatch.setattr(train, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stubbed.go()
    assert stubbed.done[-1] == "closed"


def test_a_restart_of_torchrun_is_no_start(stubbed, monkeypatch):
    """75 would be a failure to it; one that failed goes on."""
    write_json_in(Path("out/r"), "status.json", {"state": "stopped"})
    for count, state, code in ((None, "stopped", 13), ("0", "stopped", 13), ("1", "stopped", 75),
                               ("1", "failed", 13), ("0", "failed", 13)):
        if count is not None:
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        write_json_in(Path("out/r"), "status.json", {"state": state})
        assert stubbed.go() == code and ("start" in stubbed.done) == (code == 13)


def write_json_in(folder: Path, name: str, value: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, value)


def test_what_lies_where_a_run_shall_be(stubbed):
    run = Path("out/r")
    run.parent.mkdir()
    for make, says in ((lambda: run.write_text("x"),
                        "is a file or a link to nowhere; name a folder"),
                       (lambda: run.symlink_to("gone"),
                        "is a file or a link to nowhere; name a folder"),
                       (lambda: write_json_in(run / "other", "run.json", {}),
                        "holds runs; name another"),
                       (lambda: write_json_in(run, "manifest.json", {}),
                        "holds a data set; name another"),
                       (run.mkdir, ""), (lambda: write_json_in(run, "run.json", {}), "")):
        make()
        if says:
            with pytest.raises(UserError) as seen:
                stubbed.go()
            assert str(seen.value) == f"out_dir out/r {says}"
        else:
            assert stubbed.go() == 13
        if "folder" in says:
            run.unlink()
        else:
            shutil.rmtree(run)
    write_json_in(run / "other", "run.json", {})  # a run may have runs below it
    write_json_in(run, "run.json", {})
    assert stubbed.go() == 13
    write_json_in(run, "manifest.json", {})
    with pytest.raises(UserError, match=r"^out_dir out/r holds a data set; name another$"):
        stubbed.go()


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_how_training_ends(tmp_path, monkeypatch, capsys, size, rank):
    done, world = [], World()
    world.rank, world.size = rank, size
    monkeypatch.setattr(world, "any", lambda flag: done.append(("any", flag)))
    monkeypatch.setattr(world, "set_timeout", lambda _: None)
    stop = types.SimpleNamespace(close=lambda leaving: done.append(("closed", leaving)))
    signs = types.SimpleNamespace(farewell=None)

    class Guard:
        def __init__(self, *given):
            done.append(given)

        def __enter__(self):
            return stop, signs

        def __exit__(self, *_):
            pass

    class Made:
        folder, step, fault = tmp_path, 0, None
        saver = types.SimpleNamespace(saved=-1, wait=lambda seconds: done.append(seconds))

        def __init__(self, *_):
            pass

        def build(self):
            if self.fault:
                raise self.fault

        def loop(self):
            return 75

    monkeypatch.setattr(train.watch, "guard", Guard)
    monkeypatch.setattr(train, "Run", Made)
    given = command(max_steps=5, max_minutes=2.5)
    assert train.train(given, {}, world) == 75
    assert done == [(world.store, rank, size, 2.5, False), ("closed", False), ("any", False)]
    for saved, step in ((-1, 0), (0, 0), (3, 3)):
        for fault in (RuntimeError("x"), KeyboardInterrupt()):
            done.clear()
            Made.fault, Made.saver.saved = fault, saved
            (tmp_path / "status.json").unlink(missing_ok=True)
            with pytest.raises(type(fault)):
                train.train(given, {}, world)
            assert done[1:] == [20 if size == 2 else None]
            assert (tmp_path / "status.json").exists() == (rank == 0)
            if rank == 0:
                assert json.loads((tmp_path / "status.json").read_text()) == {
                    "state": "failed", "step": step}
                (tmp_path / "status.json").unlink()
                signs.farewell()
                assert (tmp_path / "status.json").exists()
    Made.fault = None
    for step, code in ((4, 75), (5, 0), (6, 0)):
        Made.step = step
        (tmp_path / "status.json").unlink(missing_ok=True)
        assert train.train(given, {}, world) == code
        said = capsys.readouterr().out
        if code == 0 and rank == 0:
            assert said == f"{tmp_path} is already complete: step {step} of {step}\n"
            assert json.loads((tmp_path / "status.json").read_text()) == {
                "state": "done", "step": step}
        else:
            assert said == "" and not (tmp_path / "status.json").exists()


def part_of_run(**parts) -> train.Run:
    """As much of a Run as a method looks at; `log` keeps what is said and written."""
    made = train.Run.__new__(train.Run)
    said: list = []
    vars(made).update({
        "config": Settings(), "step": 0, "world": World(), "folder": Path("out/r"), "skipped": 0,
        "skipped_ever": 0, "references": {}, "drawn": [], "said": said,
        "course": resume.Course(Numbers(), 2, resume.OBJECTIVES["next"], {}),
        "log": types.SimpleNamespace(
            say=said.append, row=said.append, status=lambda *at: said.append(at),
            update=lambda *at: said.append(at)),
        "clock": log.Clock(), "saver": types.SimpleNamespace(saved=-1, thread=None)} | parts)
    return made


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("case", ["plain", "stop", "save", "save at work", "resumed"])
def test_the_loop_in_turn(monkeypatch, kind, case):
    """Updates, evaluations and checkpoints; a GPU's numbers are read an update later."""
    done: list = []
    world = World()
    world.device = types.SimpleNamespace(type=kind)
    monkeypatch.setattr(world, "set_timeout", lambda after: done.append(("timeout", after)))
    engine = types.SimpleNamespace(
        seed_dropout=lambda step: done.append(("seeded", step)),
        update=lambda batch, rate, targets, stop, save: (
            done.append(("update", batch, rate, targets, stop, save)) or batch))
    config = Settings(max_steps=7, eval_interval=3, save_interval=4, warmup_steps=0)
    begin = 2 if case == "resumed" else 0
    one = part_of_run(config=config, world=world, engine=engine, step=begin,
                      model=torch.nn.Module(), profile=lambda: done.append("profiled"),
                      stop=types.SimpleNamespace(asked=lambda: "asked"))
    one.course.first_step = begin
    if case == "save at work":
        one.saver.thread = "at work"
    for name in ("measure", "save"):
        monkeypatch.setattr(one, name, lambda name=name: done.append((name, one.step)))
    monkeypatch.setattr(one, "finish", lambda: 5)
    monkeypatch.setattr(one, "batch", lambda step: step)
    monkeypatch.setattr(one, "wants_first_save", lambda: "wanted")

    def settle(step, rate, stats):
        assert stats == step - 1 and rate == optim.lr(step - 1, config)
        done.append(("settled", step))
        return train.Outcome(0, 0, float(case == "stop" and step == 2),
                             float(case in ("save", "save at work") and step == 2))

    monkeypatch.setattr(one, "settle", settle)
    monkeypatch.setattr(train.gc, "disable", lambda: done.append("no gc"))
    took = 40.0 if kind == "cuda" else 5.0
    ticks = iter([0.0, 1.0, *[4.0 + took] * 99])
    monkeypatch.setattr(one.clock, "start", lambda *at: (
        done.append(("clock", *at)), setattr(one.clock, "since", 4.0)))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks))
    one.clock.spent, one.clock.outside = {}, 0.0
    assert one.loop() == 5 and one.model.training
    events = [event for event in done if event[0] in ("update", "settled", "measure", "save")]
    expected, pending = [("measure", 0)] * (begin == 0), []
    stopped = False
    for step in range(begin + 1, 8):
        if stopped:
            break
        targets = one.course.targets_of(step - 1)
        expected.append(("update", step - 1, optim.lr(step - 1, config), targets, "asked",
                         "wanted"))
        pending.append(step)
        evaluating, saving = step in (3, 6, 7), step in (4, 7)
        while pending and (kind == "cpu" or evaluating or saving or stopped or len(pending) > 1):
            expected.append(("settled", pending[0]))
            stopped = stopped or (case == "stop" and pending[0] == 2)
            saving = saving or (case == "save" and pending[0] == 2)
            pending.pop(0)
        expected += [("measure", step)] * evaluating + [("save", step)] * (saving or stopped)
    assert events == expected
    assert done.count("no gc") == 1 and done.count("profiled") == one.step - begin
    assert [event[1] for event in done if event[0] == "seeded"] == list(range(begin, one.step))
    reads = one.course.read_at(begin), one.course.tokens_at(begin)
    assert ("clock", *reads) in done
    waits = [event[1] for event in done if event[0] == "timeout"]
    assert waits == [max(train.watch.BRISK, 10 * timedelta(seconds=took))]


def test_a_first_checkpoint_is_wanted_after_some_minutes(monkeypatch):
    """By rank 0 of a run that has none and writes none."""
    monkeypatch.setattr(train.time, "monotonic", lambda: 1000.0)
    for rank, saved, thread, begun, wanted in (
            (0, -1, None, 699.9, True), (0, -1, None, 700.0, False), (0, -1, None, 800.0, False),
            (1, -1, None, 0.0, False), (0, 0, None, 0.0, False), (0, 5, None, 0.0, False),
            (0, -1, "at work", 0.0, False), (0, 1, "at work", 0.0, False)):
        one = part_of_run(saver=types.SimpleNamespace(saved=saved, thread=thread), begun=begun)
        one.world.rank = rank
        assert one.wants_first_save() is wanted


def test_the_numbers_of_an_update_are_logged(monkeypatch):
    """At the interval, at the first and the last step; of documents also what is learned."""
    monkeypatch.setattr(train.time, "time", lambda: 55.0)
    monkeypatch.setattr(log, "mfu", lambda engine, speed: speed / 1000)
    monkeypatch.setattr(log, "peak_memory", lambda _: 7)
    checked = []
    monkeypatch.setattr(train.reference, "refuse_other_start", lambda *given: checked.append(given))
    engine = types.SimpleNamespace(logged=("a", "b"), dtype="fp32")
    for packing, step, square, first in (
            ("concat", 1, 16.0, 0), ("concat", 2, 16.0, 0), ("fit", 3, 0.0, 0),
            ("concat", 4, -1.0, 0), ("concat", 8, 4.0, 0), ("concat", 5, 4.0, 4),
            ("concat", 6, math.nan, 0), ("concat", 7, math.inf, 0)):
        one = part_of_run(engine=engine, references={"x": 1} if step < 3 else {}, config=Settings(
            max_steps=8, log_interval=3, packing=packing))
        one.course.first_step, one.course.first_row = first, 2 * first
        monkeypatch.setattr(one.clock, "read", lambda *at, one=one: (
            one.said.append(at), ([10.0, 5.0], {"row_seconds": 1.0}))[1])
        targets = one.course.targets_of(step - 1)
        stats = torch.tensor([2.0 * targets, square, 0.0, 1.0, 3.0 * targets, targets])
        outcome = one.settle(step, 0.125, stats)
        assert outcome.save == 1 and outcome.stop == 0
        assert checked == ([({"a": 3.0, "b": 1.0}, one.config, "fp32")] if step == 1 else [])
        checked.clear()
        finite = math.isfinite(square) and square >= 0
        assert one.skipped == one.skipped_ever == (not finite)
        written = [said for said in one.said if isinstance(said, tuple)]
        if step not in (1, 3, 6, 8, 5):
            assert not written
            continue
        at, (row, spent, left, most) = written
        assert at == (8 * step, step * (2 * step + 1)) and (spent, most) == (
            {"row_seconds": 1.0}, 8)
        norm = row.pop("grad_norm")
        assert norm == square**0.5 if finite else math.isnan(norm)
        assert row == {
            "step": step, "tokens": at[1], "rows": 2 * step, "loss": 2.0, "lr": 0.125,
            "tokens_per_second": 10.0, **({"learned_tokens_per_second": 5.0} if packing == "fit"
                                          else {}),
            "mfu": 0.01, "skipped": int(not finite), "a": 3.0, "b": 1.0, "peak_memory_bytes": 7,
            "time": 55.0}
        assert left == train.duration((8 - step) * 8 / 10)


def test_updates_that_are_not_made(monkeypatch):
    one = part_of_run()
    for step in range(1, 10):
        one.count_skipped(step, False)
    assert (one.skipped, one.skipped_ever) == (9, 9) and one.said[2] == (
        "step 3: loss or gradient is not finite, no update; rows 4 to 5 (shown by --replay=3)")
    one.count_skipped(10, True)
    assert (one.skipped, one.skipped_ever, len(one.said)) == (0, 9, 9)
    for step in range(11, 20):
        one.count_skipped(step, False)
    with pytest.raises(UserError, match=r"^10 updates in a row were not finite; the last"):
        one.count_skipped(20, False)
    assert one.skipped_ever == 19
    monkeypatch.setattr(log, "mfu", lambda *_: None)
    monkeypatch.setattr(train.time, "time", lambda: 0)
    one.engine, one.skipped = types.SimpleNamespace(logged=()), 0
    one.settle(99, 0.1, torch.tensor([math.nan, 1.0, 0, 0]))  # a loss that is no number
    assert one.skipped == 1


def test_an_evaluation_is_written_and_said(monkeypatch, tmp_path):
    done: list = []
    monkeypatch.setattr(train.time, "time", lambda: 55.0)
    monkeypatch.setattr(train, "validate", lambda *given: done.append(given) or {"val_loss": 1.5})
    monkeypatch.setattr(train, "told", lambda scores: f"told {scores['val_loss']}")
    drawn = [types.SimpleNamespace(add=lambda *given: done.append(given))]
    for remark, each in (("", []), ("a remark", drawn)):
        monkeypatch.setattr(train, "remark_on_chosen", lambda *_, remark=remark: remark)
        one = part_of_run(step=4, model=torch.nn.Module(), engine="engine", validation="val",
                          byte_info="info", sets="sets", drawn=each, references={"val": "there"},
                          val_loss=0.0, evaluated_at=-1)
        done.clear()
        one.measure()
        assert done[0] == ("engine", "val", "info", "there", "sets")
        assert done[1:] == [(one.model, 4, one.log)] * len(each) and one.model.training
        assert one.said == [{"step": 4, "tokens": 36, "val_loss": 1.5, "time": 55.0},
                            "step 4: told 1.5", *[remark] * bool(remark)]
        assert (one.evaluated_at, one.val_loss) == (4, 1.5)
        assert one.clock.spent.keys() == {"eval_seconds", *["sample_seconds"] * len(each)}
        assert one.clock.outside > 0


def test_what_a_checkpoint_says_of_its_run():
    saved: list = []
    engine = types.SimpleNamespace(
        micro=3, dtype=torch.bfloat16, compiled=True, adapter="adapter", optimizer=(
            types.SimpleNamespace(scale_state=lambda: [4.0, 1.0], state="moments")))
    for at, loss, kept in ((4, 1.5, 1.5), (3, 1.5, None), (4, math.nan, None), (3, math.inf, None)):
        one = part_of_run(step=4, model="model", engine=engine, data_hash="h", evaluated_at=at,
                          val_loss=loss, skipped_ever=6, saver=types.SimpleNamespace(
                              start=lambda *given: saved.append(given)))
        one.save()
        step, model, moments, state, adapter = saved.pop()
        assert (step, model, moments, adapter) == (4, "model", "moments", "adapter")
        assert state == {
            "step": 4, "rows": 8, "tokens": 36, "seed": 1337, "data_hash": "h", "micro_batch": 3,
            "dtype": "bfloat16", "compile": True, "skipped": 6, "loss_scale": [4.0, 1.0],
            "val_loss": kept, "attention": "sdpa", "threads": torch.get_num_threads(),
            "world_size": 1, "versions": {"torch": torch.__version__}, "config": asdict(Settings())}
        assert one.clock.spent.keys() == {"save_seconds"} and one.clock.outside > 0


@pytest.mark.parametrize(("step", "saved", "documents", "code", "status"), [
    (5, 5, "text", 0, ("done", 5)), (5, 5, "chat", 0, ("done", 5)),
    (5, 5, "table", 0, ("done", 5)), (3, 3, "text", 75, ("stopped", 3)),
    (5, 3, "text", 1, ("failed", 3)), (3, -1, "text", 1, ("failed", 0))])
def test_what_a_run_says_last(capsys, step, saved, documents, code, status):
    one = part_of_run(step=step, config=Settings(max_steps=5, documents=documents),
                      folder=Path("out/a b"), saver=types.SimpleNamespace(
                          saved=saved, wait=lambda: None))
    assert one.finish() == code
    chat = " --chat" if documents == "chat" else ""
    assert one.said == [status, *{
        1: [], 75: ["stopped at step 3; out/a b/checkpoints/step_3",
                    "the same command goes on from there"],
        0: ["done at step 5; out/a b/checkpoints/step_5",
            "curves: python report.py 'out/a b'; or tensorboard --logdir out",
            f"next: python sample.py --ckpt 'out/a b'{chat}"]}[code]]
    assert capsys.readouterr().err == (
        f"error: no checkpoint could be written at step {step}\n" if code == 1 else "")


def test_the_rows_of_a_rank(monkeypatch):
    """Every size-th, filled up to whole micro-batches; pinned where a GPU will read them."""
    made: list = []
    batch = types.SimpleNamespace(pinned=lambda: "pinned")
    monkeypatch.setattr(train, "to_batch", lambda *given: made.append(given) or batch)
    monkeypatch.setattr(train.reference, "known", lambda stored, rows, windows: (
        stored, windows.tolist()))
    engine = types.SimpleNamespace(accumulate=3, micro=2, bos_id=1)
    for kind, rank, windows in (("cpu", 0, [106, 108]), ("cuda", 1, [107])):
        one = part_of_run(engine=engine, references={"train": "there"}, rows=Numbers())
        one.course.batch_rows = 3
        one.world.rank, one.world.size = rank, 2
        one.world.device = types.SimpleNamespace(type=kind)
        assert one.batch(2) == ("pinned" if kind == "cuda" else batch)
        rows, size, bos, known = made.pop()
        assert np.array_equal(rows, Numbers().read_windows(windows))
        assert (size, bos, known) == (6, 1, ("there", windows))
