"""bench/gpu.py and runs/mission.py rehearsed on the CPU: rows, tables, the run's folder; a bad
stage stops no other."""

import json
import lzma
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, documents, run_script

from plainllama.command import parse
from plainllama.settings import UserError

sys.path.insert(0, str(ROOT / "bench"))
sys.path.insert(0, str(ROOT / "runs"))
import gpu
import mission


def rows(out: Path) -> dict[str, list[dict]]:
    """The rows of results.jsonl by table."""
    tables: dict = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        tables.setdefault(row["table"], []).append(row)
    return tables


def check_steps(found: dict) -> None:
    """The rows of the stage `step`."""
    arms = {row["arm"]: row for row in found["step"]}
    assert list(arms) == ["ours eager", "ours compiled", "transformers eager",
                          "transformers compiled"]
    for row in arms.values():
        assert row["tokens_per_second"] == statistics.median(row["rounds_tokens_per_second"]) > 0
        assert len(row["rounds_tokens_per_second"]) == 5 and row["first_step_seconds"] > 0
        assert row["mfu"] is None and row["peak_bytes"] is None  # a CPU has neither
        assert abs(row["last_loss"] - 5.553) < 0.1  # ln 258: both train the same thing
    a, b = (arms[name]["rounds_tokens_per_second"]
            for name in ("ours compiled", "transformers compiled"))
    ratio = found["ratios of tokens per second"][0]
    assert ratio["ratio"] == "ours compiled / transformers compiled"
    assert ratio["median"] == pytest.approx(
        statistics.median(x / y for x, y in zip(a, b, strict=True)))
    tried = [(row["arm"], row["micro_batch"]) for row in found["micro-batches, eager"]]
    assert tried == [(arm, n) for arm in ("ours", "transformers") for n in (8, 16, 32, 64)]


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    texts = [json.dumps({"text": text}) for text in documents(60)]
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.write("\n".join(texts))
    (tmp_path / "b.txt").write_text("A text of its own. " * 99)
    done = run_script("bench/gpu.py", "--rehearse", "--out=results", "--text", "a.jsonl.xz",
                      "b.txt", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path / "results")
    assert [(row["stage"], row["state"]) for row in found["stages"]] == [
        (stage, "done") for stage in gpu.STAGES]
    check_steps(found)
    page = (tmp_path / "results/results.md").read_text()
    assert all(f"## {table}\n" in page and f"## {table}\n" in done.stdout for table in found)
    assert found["environment"][0]["device"] == "CPU, a rehearsal"
    assert "skipped" in found["tests"][0]["summary"] and len(found["tests"][0]["notes"]) == 1
    assert [row["micro_batch"] for row in found["memory, eager"]] == [2**n for n in range(9)]
    assert [(row["arm"], row["batch"]) for row in found["decode"]] == [
        ("ours", 1), ("transformers", 1), ("ours", 16), ("transformers", 16)]
    trained = found["train"][0]
    assert trained["state"] == "done" and trained["step"] == trained["planned_steps"] == 20
    assert trained["text"] == ["a.jsonl.xz", "b.txt"] and trained["tokenizer"] == "bytes"
    assert trained["tokens"] == 20 * 512 and 0 < trained["val_loss"] < 5.6 and trained["epochs"] > 0
    run = tmp_path / "results" / trained["folder"]
    for name in ("metrics.jsonl", "run.json", "samples.jsonl", "report.html", "report.md",
                 "report_loss.svg", "eval/step_20.json"):
        assert (run / name).stat().st_size > 0, name
    texts = [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n")[:-1]]
    assert tuple(text["prompt"] for text in texts[-len(gpu.PROMPTS):]) == gpu.PROMPTS
    assert (run / "checkpoints").is_symlink()  # they do not travel with the results
    kept = [path for folder, _, names in os.walk(tmp_path / "results")
            for path in (Path(folder, name) for name in names)]
    assert sum(path.stat().st_size for path in kept) < 3e6
    assert not [path for path in kept if path.suffix == ".safetensors"]


def test_a_stage_that_fails_dies_or_hangs_stops_no_other(tmp_path, monkeypatch, capfd):
    def fails(bench):
        raise ValueError("no luck")

    def dies(bench):
        os._exit(9)

    def hangs(bench):
        bench.record("before", value=1)
        time.sleep(60)

    def works(bench):
        bench.record("works", value=12345.6, many=[0.5, None], some_bytes=2**31, name="a|b\nc")

    monkeypatch.setattr(gpu, "STAGES", {
        "environment": (gpu.environment, 1, 0), "fails": (fails, 1, 0), "dies": (dies, 1, 0),
        "hangs": (hangs, 0.05, 0), "late": (works, 1, 1e6), "works": (works, 1, 0)})
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    words = ["--rehearse", "--minutes=0.5", f"--out={tmp_path}"]
    try:
        assert gpu.main(parse(words, "", gpu.Flags, "files")) == 1
    finally:
        torch.set_num_threads(2)
    found = rows(tmp_path)
    assert {row["stage"]: (row["state"], row["why"]) for row in found["stages"]} | {"late": 0} == {
        "environment": ("done", ""), "fails": ("failed", "ValueError: no luck"), "late": 0,
        "dies": ("stopped", "its process ended with 9"),
        "hangs": ("stopped", "its 2 s were over"), "works": ("done", "")}
    assert [row["state"] for row in found["stages"] if row["stage"] == "late"] == ["skipped"]
    assert found["before"] and "Traceback" in capfd.readouterr().err
    page = (tmp_path / "results.md").read_text()
    assert "| 12,346 | 0.5, n/a | 2.000 GiB | a/b c |" in page
    assert gpu.main(parse([*words, "--only=works"], "", gpu.Flags, "files")) == 0
    assert len(rows(tmp_path)["works"]) == 2  # an earlier use's rows stay
    torch.set_num_threads(2)


@pytest.mark.parametrize(("words", "message"), [
    (["--only=foo"], "no stage foo"), (["nothing.txt"], "no file"), (["--minute=3"], "minutes")])
def test_bad_input_is_one_line(tmp_path, words, message):
    done = run_script("bench/gpu.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_ladder_is_continued_as_a_power_law():
    losses = [2 + 30 * tokens**-0.3 for tokens in (1e6, 2e6, 4e6, 16e6)]
    assert mission.extrapolated(losses[:3]) == pytest.approx(losses[3])
    with pytest.raises(UserError, match="do not fall"):
        mission.extrapolated([5, 5.1, 4.9])
    with pytest.raises(UserError, match="too short"):
        mission.extrapolated([5, 4.9, 4.7])


@pytest.mark.slow
def test_the_mission_goes_on_where_a_call_ended(tmp_path):
    (tmp_path / "sets").mkdir()
    for name in ("tinyMMLU", "mmlu_dev", "other"):
        (tmp_path / f"sets/{name}.jsonl").write_text("\n".join(json.dumps(
            {"question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": "B"})
            for i in range(6)))
    words = ("runs/mission.py", "--rehearse", "--total=0.1", "--eval=sets", "--out=kept")
    codes, plans = [], []
    for more in ("--minutes=0.05", "--predict", "--minutes=0.15", "--minutes=5"):
        done = run_script(*words, more, cwd=tmp_path, timeout=500)
        codes.append(done.returncode)
        if (tmp_path / "kept/prediction.json").exists():
            plans.append([(tmp_path / f"kept/{name}.json").read_text()
                          for name in ("plan", "prediction")])
    assert codes == [75, 0, 75, 0], done.stdout + done.stderr
    assert len(plans) == 3 and plans[0] == plans[1] == plans[2]
    foreseen, result = (json.loads((tmp_path / f"kept/{name}.json").read_text())
                        for name in ("prediction", "result"))
    last = result["base"]["val_loss"]
    assert result["base"]["off_by_nats"] == pytest.approx(last - foreseen["val_loss"])
    assert f"{last - foreseen['val_loss']:+.3f} nats" in done.stdout
    done = run_script(*words, "--total=0.2", cwd=tmp_path)
    assert done.returncode == 2 and "take another --out" in done.stderr
    plan = json.loads((tmp_path / "kept/plan.json").read_text())
    for name, steps in (("base", plan["base"]), ("interpolated", plan["tune"]),
                        ("plain", plan["tune"])):
        run = tmp_path / "kept" / name
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == steps and (run / "report.html").stat().st_size
        scores = json.loads((run / f"eval/step_{steps}.json").read_text())
        assert {"local:sets/tinyMMLU.jsonl", "local:sets/other.jsonl"} <= set(scores["tasks"])
        assert not list(run.rglob("*.safetensors"))
    assert json.loads((tmp_path / "kept/interpolated/run.json").read_text())["config"][
        "rope_scaling"] == "linear"


def test_the_optimizers_differ_in_nothing_else():
    adamw, muon = (vars(parse([str(ROOT / f"config/bench_{arm}.py")], "").config)
                   for arm in ("adamw", "muon"))
    differing = {key: (adamw[key], muon[key]) for key in adamw if adamw[key] != muon[key]}
    differing.pop("out_dir")
    assert differing == {"optimizer": ("adamw", "muon")}
