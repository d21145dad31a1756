"""report.py against its own inputs, numpy and the standard library's parsers."""

import json
import math
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest

import report
import settings

NASTY = '</script><script>alert("x")</script> <b>&amp; ``` | \ud800'


def make_run(folder: Path, steps: int = 100, gap_at: int = 60, **keys) -> Path:
    """A run folder as train.py and eval.py leave it."""
    (folder / "eval").mkdir(parents=True)
    parent = folder.parent / "parent.py"
    parent.write_text("n_layer = 4\nlearning_rate = 1e-3\nwarmup_steps = 10\n")
    config = vars(settings.Settings()) | {
        "n_layer": 4, "learning_rate": 2e-3, "warmup_steps": 10, "max_steps": steps,
        "out_dir": str(folder), "vocab_size": 259, "device": "cpu"} | keys
    write(folder / "run.json", {
        "config": config, "config_file": "child.py", "base": str(parent),
        "changed": {"learning_rate": 2e-3, "warmup_steps": 10}, "overrides": {"max_steps": steps},
        "versions": {"torch": "2.11.0"}, "git": {"commit": "abc123", "dirty": True},
        "device": {"type": "cpu", "name": "<fast> CPU", "count": 2, "threads": 4},
        "data": {"name": "tiny", "tokenizer": {"kind": "bytes"}, "manifest_sha256": "f" * 64},
        "parameters": {"total": 1_234_567, "non_embedding": 1_000_000}, "started": 1767225600.5})
    draw = np.random.default_rng(config["seed"])
    rows, clock = [{"step": 0, "tokens": 0, "val_loss": 5.5, "val_bpb": 8.0}], 1e9
    for step in range(10, steps + 1, 10):
        clock += 10 + 5000 * (step == gap_at)
        rows.append({"step": step, "tokens": step * 512, "lr": 1e-3,
                     "loss": 5 / step**0.3 + draw.normal(0, 0.1), "grad_norm": 1.5,
                     "tokens_per_second": 512.0, "mfu": None,
                     "peak_memory_bytes": 2**30, "time": clock})
        if step % 50 == 0:
            loss = 5 / step**0.3 + draw.normal(0, 0.1)
            rows.append({"step": step, "tokens": step * 512, "val_loss": loss,
                         "val_bpb": loss / math.log(2) / 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def build(*folders: Path, **flags: str) -> tuple[str, dict, str]:
    """The page, the data embedded in it, and the Markdown."""
    assert report.main([*map(str, folders), *(f"--{k}={v}" for k, v in flags.items())]) == 0
    page = Path(flags.get("out", folders[0] / "report.html"))
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return text, json.loads(found[0]), page.with_suffix(".md").read_text(encoding="utf-8")


def cells(text: str) -> list[list[str]]:
    """The rows of every table of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [[unescape(c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fails(*words) -> str:
    """Run report.py as a command that must fail with exit code 2; what it said on stderr."""
    done = subprocess.run([sys.executable, report.__file__, *map(str, words)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    return done.stderr


def test_embedded_data_is_metrics_jsonl(tmp_path):
    run = make_run(tmp_path / "run")
    _, data, _ = build(run)
    assert data["runs"][0]["metrics"] == metrics_of(run)
    assert data["runs"][0]["name"] == "run" and data["groups"] == []


def test_summary_recomputed(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "status.json", {"state": "done", "step": 100})
    page, data, markdown = build(run)
    last = [row for row in metrics_of(run) if "val_loss" in row][-1]
    # 10 s per row: nine gaps of which one is a restart, whose row and the first count by speed
    seconds = 10 * 512 / 512.0 * 2 + 8 * 10
    summary = data["runs"][0]["summary"]
    assert summary["seconds"] == pytest.approx(seconds) and summary["restarts"] == [60]
    assert summary["val_loss"] == last["val_loss"] and summary["tokens"] == 51200
    said = (f"1.235M parameters, trained on 51.2k tokens in {seconds / 60:.1f} minutes on 2 x "
            f"<fast> CPU: validation loss {last['val_loss']:.4f} nats per token, "
            f"{last['val_bpb']:.4f} bits per byte")
    assert said in unescape(page) and "done, restarts: 1." in page
    assert said.replace("<fast>", r"\<fast\>") in markdown


def test_differences_from_the_parent(tmp_path):
    page, _, markdown = build(make_run(tmp_path / "run"))
    rows = [row for row in cells(page) if row[-1] in ("config file", "command line", "at start")]
    assert rows == [["vocab_size", "0", "259", "at start"],
                    ["max_steps", "4768", "100", "command line"],
                    ["learning_rate", "0.001", "0.002", "config file"],
                    ["device", "auto", "cpu", "at start"]]
    assert "| learning_rate | 0.001 | 0.002 | config file |" in markdown


def test_data_and_environment(tmp_path):
    rows = cells(build(make_run(tmp_path / "run"))[0])
    for row in (["manifest_sha256", "f" * 64], ["tokenizer kind", "bytes"],
                ["git commit", "abc123"], ["git dirty", "true"],
                ["versions torch", "2.11.0"], ["device threads", "4"],
                ["started", "2026-01-01 00:00 UTC"]):
        assert row in rows


def test_parent_that_is_gone(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "parent.py").unlink()
    page, _, _ = build(run)
    assert "parent.py cannot be read" in page and ["n_layer", "16", "4", "at start"] in cells(page)


def test_text_of_the_model_is_escaped(tmp_path):
    run = make_run(tmp_path / "a <b> run", init_from=NASTY)
    write(run / "samples.jsonl", {"step": 100, "prompt": NASTY, "completion": NASTY * 3})
    page, data, markdown = build(run)
    assert page.count("<script") == 1 and page.count("</script") == 1 and "alert" in page
    assert "<title>a &lt;b&gt; run</title>" in page
    assert data["runs"][0]["samples"][0]["prompt"] == NASTY
    assert "````\n</script>" in markdown  # a fence longer than any in the text
    assert not re.search(r"(src|href)=|url\(|@import", page)


def test_scores_baselines_and_chance(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "eval" / "step_100.json", {
        "step": 100, "tokens": 51200, "val_loss": 1.5, "val_bpb": 1.25,
        "tasks": {"arc": {"acc": 0.5, "acc_stderr": 0.01, "chance": 0.25, "n": 99,
                          "exact,strict": 0.1, "exact_stderr,strict": 0.01}}})
    write(run / "eval" / "baselines.json", {"unigram_bpb": 4.0, "fivegram_bpb": 0.5})
    page, _, markdown = build(run)
    assert ["arc, acc", "0.5000 ± 0.0196", "0.25"] in cells(page)
    assert ["arc, exact,strict", "0.1000 ± 0.0196", "–"] in cells(page)
    assert ["arc, n", "99", "–"] in cells(page)
    mine = metrics_of(run)[-1]["val_bpb"]
    assert (f"run is {1 - mine / 4:.1%} below unigram and "
            f"{mine / 0.5 - 1:.1%} above fivegram") in page
    order = [row[0] for row in cells(page) if row[-1].startswith("━")]
    assert order == ["fivegram", "run", "unigram"] and "0.5000 ± 0.0196" in markdown


def test_seeds_are_a_mean_and_a_band(tmp_path):
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2, 3)]
    page, data, _ = build(*runs)
    assert [group["runs"] for group in data["groups"]] == [["seed1", "seed2", "seed3"]]
    drawn = data["groups"][0]["curves"]["loss"]
    table = np.array([[row["loss"] for row in metrics_of(run) if "loss" in row] for run in runs])
    assert drawn["x"] == list(range(10, 101, 10))
    np.testing.assert_allclose(drawn["mean"], table.mean(0), rtol=1e-15)
    np.testing.assert_array_equal(drawn["low"], table.min(0))
    np.testing.assert_array_equal(drawn["high"], table.max(0))
    final = [metrics_of(run)[-1]["val_loss"] for run in runs]
    assert f"validation loss {np.mean(final):.4f} ± {np.std(final, ddof=1):.4f}" in page
    assert page.count("<polygon") == 3  # training and validation loss, bits per byte


def test_a_group_ends_where_its_shortest_run_ends(tmp_path):
    runs = [make_run(tmp_path / "long", seed=1), make_run(tmp_path / "short", seed=2)]
    rows = metrics_of(runs[1])
    (runs[1] / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:5]))
    assert build(*runs)[1]["groups"][0]["curves"]["loss"]["x"] == [10, 20, 30, 40]


def test_runs_that_differ_are_drawn_apart(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", global_batch_tokens=1024)
    page, data, _ = build(one, two, out=str(tmp_path / "both.html"))
    assert [run["name"] for run in data["runs"]] == ["one", "two"] and data["groups"] == []
    assert page.count("●&nbsp;two") == page.count("●&nbsp;one") > 1 and "<polygon" not in page
    assert ">tokens</text>" in page  # the batches differ: equal steps are not equal work
    assert ">step</text>" in build(one, two, x="step")[0]
    assert (tmp_path / "both_loss.svg").exists()


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    one, two = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", n_layer=5)
    assert [run["name"] for run in build(one, two)[1]["runs"]] == [str(one), str(two)]


def test_a_curve_is_drawn_where_the_numbers_are():
    svg = report.draw([([0, 50, 100], [0.0, 5.0, 10.0], [0.0, 5.0, 10.0], [0.0, 5.0, 10.0])],
                      False, "step", [])
    points = re.search(r'<polyline points="([^"]*)"', svg)
    assert points
    at = np.array([[float(v) for v in point.split(",")] for point in points[1].split()])
    np.testing.assert_allclose(at[:, 0], [0, 500, 1000], atol=0.1)
    np.testing.assert_allclose(at[:, 1], 1000 * (1 - np.array([0, 5, 10]) / 10.5), atol=0.1)


@pytest.mark.parametrize(("low", "high", "log"), [
    (0, 1e-9, False), (2.9, 3.1, True), (1, 9, True), (1e-4, 1e5, True), (0, 7e5, False),
    (100, 101, False), (1, 8.9, True)])
def test_ticks_are_few_and_inside(low, high, log):
    marks = report.ticks(low, high, log)
    assert 2 <= len(marks) <= 10 and marks == sorted(marks)
    assert low * (1 - 1e-9) <= marks[0] and marks[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (6e-4, "6e-4"), (1e-10, "1e-10"), (0.25, "0.25"), (9999, "9999"), (20000, "20k"),
    (124_085_760, "124.1M"), (999_999_999, "1B"), (1.5e12, "1.5T"), (-3e6, "-3M")])
def test_short_numbers(value, text):
    assert report.short(value) == text


def test_a_truncated_last_line_is_a_run_at_work(tmp_path):
    run = make_run(tmp_path / "run")
    whole = metrics_of(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "lo')
    page, data, _ = build(run)
    assert data["runs"][0]["metrics"] == whole and "Note:" not in page


def test_damage_is_noted(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().split("\n")
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], "\0\0{", *lines[3:]]))
    (run / "status.json").write_text("{")
    (run / "eval" / "step_5.json").write_text("[]")
    page, data, _ = build(run)
    assert len(data["runs"][0]["metrics"]) == len(lines) - 1
    for name in ("metrics.jsonl: 1 damaged line(s) left out, the first is 4",
                 "status.json is damaged", "step_5.json is damaged"):
        assert name in page


def test_values_that_are_not_numbers_are_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "tokens": 1, "loss": NaN, "grad_norm": Infinity, "lr": null}\n')
    assert "nan" not in build(run)[0].split("<figure", 1)[1].split("</div>")[0].lower()


def test_barely_begun(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    write(run / "metrics.jsonl", {"step": 0, "tokens": 0, "val_loss": 5.0, "val_bpb": 1.0})
    write(run / "run.json", {"config": {}})
    assert "validation loss 5 nats" in build(run)[0]


def test_bad_input_is_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    assert "nowhere" in fails(tmp_path / "nowhere") and "run" in fails(tmp_path / "nowhere")
    assert "--ouut; did you mean" in fails(run, "--ouut=x")
    assert "eval is not a run" in fails(run / "eval")
    (run / "metrics.jsonl").write_text("")
    assert "no rows yet" in fails(run)
    (run / "run.json").write_text('{"config"')
    assert "run.json is damaged" in fails(run)


def test_newest_run_is_the_default(tmp_path, monkeypatch, capsys):
    for age, name in enumerate(("new", "old")):
        run = make_run(tmp_path / "out" / name)
        os.utime(run / "metrics.jsonl", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 0
    assert "newest run, out/new" in capsys.readouterr().out
    assert (tmp_path / "out" / "new" / "report.html").exists()


def test_help_is_quick_and_torch_is_not_loaded():
    code = ("import sys, report; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parent)
    done = subprocess.run([sys.executable, report.__file__, "--help"], capture_output=True,
                          text=True, check=True, timeout=10)
    assert "--x=" in done.stdout and "--out=" in done.stdout
