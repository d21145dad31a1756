"""runs/mission.py: its plan's arithmetic, what it refuses, what a kill in each stage costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from plainllama.command import parse
from plainllama.settings import UserError

sys.path.insert(0, str(ROOT / "runs"))
import mission

from runs import mission_plan as plans

TRIAL = {"start": 45.0, "finish": 6.0, "evaluation": 3.0, "tokens_per_second": 400e3,
         "batch_tokens": 131072, "tokens": 30 * 131072, "val_loss": 6.5, "parameters": 162_423_168,
         "train_tokens": 56_000_000, "score": 15.0, "report": 3.0}
SCORES = {"base": 45.0, "interpolated": 50.0, "plain": 50.0}
TINY = ("runs/mission.py", "--config=config/mission_tiny.py", "--eval=sets", "--out=kept")


def write_sets(folder: Path) -> None:
    """Questions for tinyMMLU's place, their examples, and another set."""
    folder.mkdir()
    for name in ("tinyMMLU", "mmlu_dev", "other"):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(
            {"question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": "B"})
            for i in range(6)))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- the plan

@pytest.mark.parametrize("minutes", [5, 10, 22, 60])
def test_a_plan_fits_in_its_minutes_and_fills_them(minutes):
    gone = 95.0
    plan = plans.planned(gone, 60 * minutes - gone, TRIAL, 100_000, SCORES)
    step = TRIAL["batch_tokens"] / TRIAL["tokens_per_second"]
    runs = 3 if plan["tune"] else 1
    spent = (gone + runs * (TRIAL["start"] + TRIAL["finish"]) + plan["after"]
             + plan["base"] * step + plan["looks"] * TRIAL["evaluation"]
             + (runs - 1) * (plan["tune"] * plans.SLOWER * step + 2 * TRIAL["evaluation"]))
    assert plan["predicted"]["minutes"] == pytest.approx(spent / 60)
    assert 0.9 * minutes < spent / 60 <= minutes
    assert plan["tokens"] == plan["base"] * 131072
    assert plan["epochs"] == pytest.approx(plan["tokens"] / 56e6)
    assert plan["predicted"]["base_minutes"] == pytest.approx(plan["base"] * step / 60)
    assert plan["looks"] * TRIAL["evaluation"] <= max(3, 0.11 * plan["base"] * step)
    assert bool(plan["tune"]) == (minutes >= 10)  # five minutes are for the base alone
    if plan["tune"]:
        assert plan["tune"] >= plans.FEWEST_LONG
        share = plan["tune"] * plans.SLOWER * step / (plan["base"] * step)
        assert minutes == 10 or 0.07 < share < 0.11


def test_more_speed_and_more_minutes_are_more_steps_and_a_lower_loss():
    few, many = (plans.planned(60, 1000, TRIAL | {"tokens_per_second": speed}, 10**6, SCORES)
                 for speed in (2e5, 4e5))
    assert 1.8 < many["base"] / few["base"] < 2.2
    assert many["predicted"]["val_loss"] < few["predicted"]["val_loss"]
    capped = plans.planned(60, 1000, TRIAL, 100, SCORES)
    assert capped["base"] == 100 and capped["tune"] == 25


def test_too_few_minutes_are_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"--minutes=3 are too few: 1\.5 are gone") as error:
        plans.planned(90, 90, TRIAL, 10**6, SCORES)
    enough = 60 * float(str(error.value).split("--minutes=")[2].split()[0])
    assert plans.planned(90, enough - 90, TRIAL, 10**6, SCORES)["base"] >= plans.FEWEST
    with pytest.raises(UserError):
        plans.planned(90, 0.8 * enough - 90, TRIAL, 10**6, SCORES)


def test_the_prediction_is_what_its_docstring_says():
    """Of the CPU's recorded run: 4.75 from its shortest rung, 5.20 with its own exponent."""
    rungs = [[143360, 6.943656325340271]]
    trial = {"tokens": rungs[0][0], "val_loss": rungs[0][1], "parameters": 11_405_568}
    low, high = plans.foretold(trial, 2_318_336)
    assert (low, high) == pytest.approx((4.750, 5.200), abs=0.001)
    assert plans.foretold(trial, trial["tokens"]) == pytest.approx((6.9437, 6.9437), abs=1e-4)
    tiny = trial | {"parameters": 30_000, "val_loss": 5.5}  # too small for the law
    assert 3.3 < plans.foretold(tiny, 10**12)[0] < 3.4


def test_what_a_trial_measured(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({
        "config": {"global_batch_tokens": 100}, "parameters": {"total": 7},
        "data": {"train_tokens": 999}, "device": {"name": "x"}}))
    steps = [{"step": s, "tokens": 100 * s, "loss": 5, "tokens_per_second": v, "time": 139.0 + s,
              **more} for s, v, more in (
        (1, 1, {"eval_seconds": 99.0}), (5, 7, {}), (10, 100, {}),
        (20, 50, {"eval_seconds": 2.0, "sample_seconds": 1.5}), (30, 100, {}))]
    rows = [{"step": 0, "tokens": 0, "val_loss": 9.0, "time": 120.0}, *steps,
            {"step": 30, "tokens": 3000, "val_loss": 4.5, "time": 172.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plans.measured(tmp_path, 100.0, 180.0) == {
        "start": 40.0, "finish": 8.0, "evaluation": 3.5, "batch_tokens": 100,
        "tokens_per_second": pytest.approx(2500 / 35),
        "tokens": 3000, "val_loss": 4.5, "parameters": 7,
        "train_tokens": 999, "device": "x"}


def test_a_run_that_was_cut_is_shown_by_the_scores_of_its_checkpoint(tmp_path):
    rows = [{"step": 0, "tokens": 0, "val_loss": 9.0, "val_bpb": 3.0},
            {"step": 1, "tokens": 10, "tokens_per_second": 1.0},
            {"step": 20, "tokens": 200, "tokens_per_second": 10.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checkpoints/step_20").mkdir(parents=True)
    assert plans.outcome(tmp_path, None)["val_loss"] == 9.0
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/step_20.json").write_text(json.dumps(
        {"step": 20, "tokens": 200, "val_loss": 5.0, "val_bpb": 2.0}))
    found = plans.outcome(tmp_path, None)
    assert (found["step"], found["tokens"], found["val_loss"]) == (20, 200, 5.0)
    assert found["minutes"] == pytest.approx((10 + 19) / 60) and found["tinyMMLU"] is None


def test_the_config_is_muon_to_zero():
    for name in ("mission", "mission_cpu", "mission_tiny"):
        config = parse([str(ROOT / f"config/{name}.py")], "").config
        assert (config.optimizer, config.schedule, config.min_lr) == ("muon", "linear", 0)
    config = parse([str(ROOT / "config/mission.py")], "").config
    assert (config.learning_rate, config.global_batch_tokens) == (2e-3, 131072)


# ---- refusals and stages

@pytest.mark.parametrize(("words", "message"), [
    (["--minutes=4.9"], "takes 5 at least"), (["--text=no.jsonl"], "no file no.jsonl"),
    (["--eval=no"], "no folder no"), (["--eval=half"], "no mmlu_dev.jsonl"),
    (["--tokenizer=no.model"], "no file no.model"), (["--tar=no/a.tar.gz"], "no folder no"),
    (["--set=--micro_bach=4"], "did you mean micro_batch"), (["more.txt"], "unexpected argument"),
    (["--minute=5"], "did you mean minutes")])
def test_bad_input_is_one_line(tmp_path, words, message):
    (tmp_path / "half").mkdir()
    (tmp_path / "half/tinyMMLU.jsonl").write_text("{}")
    done = run_script("runs/mission.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
    done = run_script("runs/mission.py", "--status", cwd=tmp_path)
    assert done.returncode == 1 and "no mission in" in done.stdout


@pytest.mark.parametrize(("stage", "error", "code", "unfinished"), [
    ("interpolated", mission.Failed("no luck"), 1, ["interpolated"]),
    ("base", mission.Cut("over"), 75, ["base", "interpolated", "plain"]),
    ("trial", KeyError("time"), 1, ["trial", "base", "interpolated", "plain"])])
def test_a_stage_that_fails_stops_only_those_that_need_it(tmp_path, monkeypatch, stage, error,
                                                          code, unfinished):
    monkeypatch.chdir(tmp_path)
    words = ["--config=config/mission_tiny.py", "--out=kept", "--tar=kept.tar.gz"]
    one = mission.Mission(parse(words, "", mission.Flags, "files").flags)
    one.out.mkdir()
    ran = []

    def work(name):
        ran.append(name)
        if name == stage:
            raise error

    for name in ("prepare", "trial", "scores", "report"):
        monkeypatch.setattr(one, name, lambda name=name: work(name))
    monkeypatch.setattr(one, "long_run", work)
    assert one.run() == code
    assert ran == [name for name in mission.NEEDS if name == stage or name not in unfinished]
    assert list(one.unfinished) == unfinished
    said = (one.out / "commands.log").read_text()
    assert f"stage {stage}: " in said and str(error) in said
    status = read(one.out / "status.json")
    assert status["state"] == {1: "failed", 75: "stopped"}[code]
    with tarfile.open("kept.tar.gz") as packed:
        assert {"kept/status.json", "kept/commands.log"} <= set(packed.getnames())


def test_a_trial_that_cannot_be_scored_is_a_plan_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/mission").mkdir(parents=True)
    (tmp_path / "data/mission/manifest.sha256").write_text("abc\n")
    words = ["--config=config/mission_tiny.py", "--out=kept", "--minutes=2"]
    one = mission.Mission(parse(words, "", mission.Flags, "files").flags)
    one.out.mkdir()
    one.home.mkdir(parents=True)
    ran = []

    def script(name, *words, seconds=0):
        ran.append(name)
        if name == "eval.py":
            raise mission.Failed("no kernel")

    monkeypatch.setattr(one, "script", script)
    monkeypatch.setattr(plans, "measured", lambda *_: TRIAL | {"batch_tokens": 512})
    one.trial()
    assert ran == ["train.py", "eval.py", "report.py"] and one.unfinished == {}
    assert read(one.out / "plan.json")["data"] == "abc"
    (one.out / "plan.json").unlink()
    again = mission.Mission(parse(words, "", mission.Flags, "files").flags)
    monkeypatch.setattr(again, "script", script)
    again.trial()  # what was measured is kept where the minutes were too few for a plan
    assert len(ran) == 3 and read(one.out / "plan.json")["base"] > 0


# ---- the whole

def start(folder: Path, *words: str) -> subprocess.Popen:
    """A mission in the background."""
    return subprocess.Popen([sys.executable, str(ROOT / TINY[0]), *TINY[1:], *words], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(stage: str, folder: Path, process: subprocess.Popen) -> None:
    """Return when the mission is in a stage and its script at work."""
    log, end = folder / "kept/commands.log", time.monotonic() + 600
    before = log.read_text().count("\n$ ") if log.exists() else -1
    while time.monotonic() < end and process.poll() is None:
        status = folder / "kept/status.json"
        if (status.exists() and read(status)["stage"] == stage
                and read(status)["pid"] == process.pid and log.read_text().count("\n$ ") > before):
            time.sleep(0.05 if stage == "report" else 0.7)  # it is somewhere inside
            return
        time.sleep(0.02)
    pytest.fail(f"{stage} did not begin: {process.stderr.read()}")


@pytest.mark.slow
def test_killed_in_each_stage_it_goes_on(tmp_path):
    write_sets(tmp_path / "sets")
    text = ""
    for stage in mission.NEEDS:
        process = start(tmp_path, "--minutes=6")
        wait_for(stage, tmp_path, process)
        if stage == "base":
            text = (tmp_path / "kept/plan.json").read_text()
            running = run_script(TINY[0], "--status", "--out=kept", cwd=tmp_path)
            assert running.returncode == 0 and "running: stage base" in running.stdout
            assert "predicted: " in running.stdout
            again = run_script(*TINY, cwd=tmp_path)
            assert again.returncode == 2 and "is at work" in again.stderr
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        killed = run_script(TINY[0], "--status", "--out=kept", cwd=tmp_path)
        assert killed.returncode == 1 and f"killed; the same command goes on: stage {stage}" in (
            killed.stdout)
    whole = run_script(*TINY, "--minutes=6", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "| base's loss, nats | " in whole.stdout
    done = run_script(TINY[0], "--status", "--out=kept", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("done: stage report")
    assert (tmp_path / "kept/plan.json").read_text() == text
    check_whole(tmp_path)
    other = run_script(*TINY, "--set=--seed=5", cwd=tmp_path)
    assert other.returncode == 2 and "take another --out" in other.stderr
    check_carried(tmp_path, tmp_path / "bare")


def check_whole(folder: Path) -> None:
    """Every run to its last step, every score, and the prediction beside what was found."""
    plan, result = read(folder / "kept/plan.json"), read(folder / "kept/result.json")
    assert plan["base"] == 60 and plan["tune"] == 24
    assert result["missing"] == [] and result["unfinished"] == {}
    base, page = result["runs"]["base"], (folder / "kept/summary.md").read_text()
    assert result["found"]["val_loss"] == base["val_loss"]
    assert result["found"]["base_minutes"] == base["minutes"]
    assert result["predicted"] == plan["predicted"]
    assert result["difference"] == pytest.approx({
        name: result["found"][name] - plan["predicted"][name]
        for name in ("val_loss", "base_minutes", "minutes")})
    assert f"{result['difference']['val_loss']:+.3f}" in page
    for name, steps in (("base", 60), ("interpolated", 24), ("plain", 24)):
        run = folder / "kept" / name
        assert result["runs"][name]["step"] == steps and f"| {name} | {steps} |" in page
        assert (run / "report.html").stat().st_size
        scores = read(run / f"eval/step_{steps}.json")
        assert {"local:sets/tinyMMLU.jsonl", "local:sets/other.jsonl"} <= set(scores["tasks"])
        assert len(scores["by_position"]) > 4 and ("contexts" in scores) == (name != "base")
        assert result["runs"][name]["tinyMMLU"] == scores["tasks"]["local:sets/tinyMMLU.jsonl"]
        assert not list(run.rglob("*.safetensors"))
        config = read(run / "run.json")["config"]
        assert config["min_lr"] == 0 and config["max_steps"] == steps
        assert config["rope_scaling"] == ("linear" if name == "interpolated" else "none")


def check_carried(folder: Path, bare: Path) -> None:
    """plan.json and base's checkpoint are enough for another machine, which trains neither trial
    nor base again."""
    shutil.copytree(folder / "sets", bare / "sets")
    (bare / "kept").mkdir()
    shutil.copy(folder / "kept/plan.json", bare / "kept")
    shutil.copytree(folder / "out/kept/base", bare / "out/kept/base")
    detached = run_script(*TINY, "--minutes=6", "--detach", "--tar=kept.tar.gz", cwd=bare,
                          fresh=True)
    assert not (bare / "kept/result.json").exists()  # it did not wait for the end
    assert detached.returncode == 0 and "--status --out=kept" in detached.stdout
    end = time.monotonic() + 600
    while time.monotonic() < end:
        status = run_script(TINY[0], "--status", "--out=kept", cwd=bare)
        if not status.stdout.startswith(("running", "no mission")):
            break
        time.sleep(1)
    assert status.stdout.startswith("done"), status.stdout
    said = (bare / "kept/commands.log").read_text()
    assert [line.split()[1] for line in said.splitlines() if line.startswith("$ ")][:4] == [
        "prepare.py", "train.py", "train.py", "eval.py"]  # the two long runs; base has its scores
    check_whole(bare)
    assert "predicted" in (bare / "kept/mission.log").read_text()
    with tarfile.open(bare / "kept.tar.gz") as packed:
        assert "kept/result.json" in packed.getnames()
