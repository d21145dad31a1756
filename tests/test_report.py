"""report.py against its own inputs, numpy and the standard library's parsers."""

import json
import math
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import run_script

import report
import sample
from plainllama import settings
from plainllama.command import parse
from plainllama.files import file_entry, write_json
from plainllama.report import card, compare
from plainllama.report import runs as runs_room
from plainllama.report.blocks import (
    Block,
    as_markdown,
    cell,
    flatten,
    fold,
    heading,
    paragraph,
    short,
    side_by_side,
)
from plainllama.report.charts import (
    LEARNED,
    LOSS,
    MACHINE,
    chart_block,
    charts,
    lines_of,
    trade_offs,
)
from plainllama.report.curves import (
    MOST,
    Chart,
    Line,
    Point,
    along,
    curve,
    hours_by_step,
    reader,
    smoothed,
    thinned,
)
from plainllama.report.drawing import (
    HEIGHT,
    LEFT,
    STYLE,
    cut_off,
    draw,
    late,
    limits,
    ticks,
)
from plainllama.report.page import (
    PANELS,
    PARTS,
    as_data,
    between,
    command_line,
    curves,
    differences,
    environment,
    folded,
    head,
    runs_of,
    write_page,
)
from plainllama.report.runs import RunFolder, find_run, grouped, is_number, load, silent
from plainllama.report.scores import baselines, folds, growth, metrics_by_title, scores
from plainllama.report.texts import answers, masks, samples
from plainllama.report.texts import sample as sample_block
from plainllama.report.verdict import (
    beside_counting,
    figures,
    gap,
    outcome,
    seconds_of,
    trend,
    verdict,
)
from plainllama.weights import checkpoint

NASTY = '</script><script>alert("x")</script> <b>&amp; ``` | \ud800'


CHARTS = 6  # of the run that make_run makes


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
        "instead": {"max_steps": 2300},
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
    """The page without its script, the data embedded in it, and the Markdown."""
    assert run_main([*map(str, folders), *(f"--{k}={v}" for k, v in flags.items())]) == 0
    others = "_".join(folder.name for folder in folders[1:])
    name = f"report_with_{others}.html" if others else "report.html"
    page = Path(flags.get("out", folders[0] / name))
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    assert text.count(PARTS["page.js"]) == 1
    return (text.replace(f"<script>{PARTS['page.js']}</script>", ""), json.loads(found[0]),
            page.with_suffix(".md").read_text(encoding="utf-8"))


def run_main(argv: list[str]) -> int:
    return report.main(parse(argv, "", report.Flags, takes="files"))


def cells(text: str) -> list[list[str]]:
    """The rows of every table of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [[unescape(c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
            for row in rows]


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fails(*words) -> str:
    """Run report.py as a command that must fail with exit code 2; what it said on stderr."""
    done = run_script("report.py", *map(str, words), cwd=Path.cwd())
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    return done.stderr


def test_embedded_data_is_metrics_jsonl(tmp_path):
    run = make_run(tmp_path / "run")
    _, data, _ = build(run)
    assert data["runs"][0]["metrics"] == metrics_of(run)
    assert data["runs"][0]["info"] == json.loads((run / "run.json").read_text())
    assert data["runs"][0]["name"] == f"{tmp_path.name}/run"


def test_summary_recomputed(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "status.json", {"state": "done", "step": 100})
    page, _, markdown = build(run)
    last = [row for row in metrics_of(run) if "val_loss" in row][-1]
    # 100 steps of 512 tokens at 512 tokens per second; the hours in which nothing ran don't count
    said = (f"1.235M parameters, done at step 100 of 100, after 51.2k tokens and 0:01:40 of "
            f"training on 2 x <fast> CPU: validation loss {last['val_loss']:.4g} nats per token, "
            f"{last['val_bpb']:.4g} bits per byte.")
    assert said in unescape(page) and said.replace("<fast>", r"\<fast\>") in markdown


def test_of_dialogs_the_learned_tokens_are_named(tmp_path):
    """A quarter of what is read is learned, and the time is that of all that is read."""
    run = make_run(tmp_path / "run", documents="chat")
    rows = [row | {"learned_tokens_per_second": 128.0} if "tokens_per_second" in row else row
            for row in metrics_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "after 51.2k learned tokens and 0:06:40 of training" in build(run)[0]


def test_differences_from_the_parent(tmp_path):
    page, _, markdown = build(make_run(tmp_path / "run"))
    first, whole = page.split("What was run")[1].split("</table>")[:2]
    assert cells(first) == [["", "child.py", "this run"], ["max_steps", "2300", "100"]]
    assert cells(whole) == [["", "parent", f"{tmp_path.name}/run"], ["vocab_size", "0", "259"],
                            ["learning_rate", "0.001", "0.002"],
                            ["device", "auto", "cpu"]]
    assert "<details>" in whole  # what the file itself changes lies in a fold
    (tmp_path / "parent.py").write_text("max_steps = 7\n")  # as no file was when the run began
    assert cells(first) == cells(build(tmp_path / "run")[0].split("What was run")[1].split(
        "</table>")[0])
    assert "| learning_rate | 0.001 | 0.002 |" in markdown
    assert (f"run was last started by: train.py child.py --out_dir={tmp_path}/run --max_steps=100 "
            "on 2 ranks of torchrun") in page


def test_differences_of_several_runs(tmp_path):
    """First what differs between them alone; later what each command changed, and in a fold what
    else differs from the parent."""
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", n_layer=5)
    page = build(one, two)[0]
    rows, (differ, first) = cells(page), map(cells, page.split("</table>")[:2])
    assert page.index("<h2>What differs between these runs</h2>") < page.index("<table")
    for run, said in zip((one, two), page.split("What was run")[1].split("</table>"), strict=False):
        assert cells(said) == [["", "child.py", f"{tmp_path.name}/{run.name}"],
                               ["max_steps", "2300", "100"]]
    assert ["n_layer", "4", "4", "5"] in rows and ["device", "auto", "cpu", "cpu"] in rows
    assert ["n_layer", "4", "5"] in differ and not {"device", "max_steps"} & {r[0] for r in differ}
    losses = [[row["val_loss"] for row in metrics_of(run) if "val_loss" in row][-1]
              for run in (one, two)]
    assert ["validation loss, nats per token", *(f"{loss:.4f}" for loss in losses)] in first
    same = make_run(tmp_path / "same")
    assert "Nothing of their configs." in build(one, same)[0]


def test_a_status_behind_the_metrics_says_what_is_saved(tmp_path):
    run = make_run(tmp_path / "run")
    for step, says in ((0, "Nothing is saved yet."), (60, "Its newest checkpoint is of step 60."),
                       (100, "")):
        write(run / "status.json", {"state": "failed", "step": step})
        page = build(run)[0]
        assert says in page and ("checkpoint is of" in page) == (step == 60)
        assert "failed at step 100 of 100" in page


def test_runs_are_named_in_several_ways(tmp_path, monkeypatch, capsys):
    """By --ckpt as well, by a checkpoint; out/* is all runs of out, and what else lies there."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(tmp_path / "out" / name)
        (tmp_path / "out" / name / "checkpoints/step_5").mkdir(parents=True)
    (tmp_path / "out/labels.csv").write_text("x")
    (tmp_path / "out/empty").mkdir()
    for words in (["--ckpt=out/a"], ["out/a/checkpoints/step_5"], ["out/a", "--ckpt=out/a"]):
        (tmp_path / "out/a/report.html").unlink(missing_ok=True)
        (tmp_path / "out/a/report.md").unlink(missing_ok=True)
        assert run_main(words) == 0 and (tmp_path / "out/a/report.html").exists()
    capsys.readouterr()
    assert run_main(["out"]) == 0
    hint = capsys.readouterr().out.split("python report.py ")[1].splitlines()[0]
    assert hint == "out/*"
    own = (tmp_path / "out/a/report.html").read_text()
    assert run_main(sorted(map(str, Path().glob(hint)))) == 0
    assert "left out, since they hold no run: out/empty, out/labels.csv" in capsys.readouterr().out
    assert (tmp_path / "out/a/report_with_b.html").exists()
    assert (tmp_path / "out/a/report.html").read_text() == own
    (tmp_path / "out/a/report.html").unlink()  # nor takes it the place of one that is to come
    with pytest.raises(settings.UserError, match=r"name another .*--out=out/a/report_with_b.html"):
        run_main(["out/a", "out/b", "--out=out/a/report.html"])
    for words in (["out/empty"], ["out/a", "out/mispelt"]):
        with pytest.raises(settings.UserError, match=f"{words[-1]} is not a run and holds none"):
            run_main(words)


def test_panels_come_in_the_order_of_their_table(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(PANELS, "Extra", lambda runs, out: [paragraph(f"{runs[0].name} at {out}")])
    page, _, markdown = build(run)
    titles = [name for name in PANELS if name not in ("Answers", "What is learned of a dialog")]
    assert re.findall("<h2>(.*?)</h2>", page) == titles == re.findall("## (.*)", markdown)
    assert page.index("<svg") < page.index("<table")  # a picture first
    assert f"{tmp_path.name}/run at {run}/report.html</p>" in page


def test_data_and_environment(tmp_path):
    rows = cells(build(make_run(tmp_path / "run"))[0])
    for row in (["data manifest_sha256", "f" * 64], ["data tokenizer kind", "bytes"],
                ["git commit", "abc123"], ["git dirty", "true"],
                ["versions torch", "2.11.0"], ["device threads", "4"],
                ["started", "2026-01-01 00:00 UTC"]):
        assert row in rows


def test_parent_that_is_gone(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "parent.py").unlink()
    page, _, _ = build(run)
    assert "parent.py cannot be read" in page and ["n_layer", "16", "4"] in cells(page)


def test_text_of_the_model_is_escaped(tmp_path):
    run = make_run(tmp_path / "a <b> run", init_from=NASTY)
    write(run / "samples.jsonl", {"step": 100, "prompt": NASTY, "completion": NASTY * 3})
    page, data, markdown = build(run)
    assert page.count("<script") == 1 and page.count("</script") == 1 and "alert" in page
    assert "script-src 'sha256-" in page  # and no other script would run
    assert "/a &lt;b&gt; run</title>" in page
    assert data["runs"][0]["samples"][0]["prompt"] == NASTY
    assert not re.search(r"(?<!\\)</?script", markdown) and "alert" in markdown
    assert not re.search(r"(src|href)=|url\(|@import", page)


def test_scores_baselines_and_chance(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "eval" / "step_100.json", {
        "step": 100, "tokens": 51200, "val_loss": 1.5, "val_bpb": 1.25,
        "tasks": {"arc": {"acc": 0.5, "acc_stderr": 0.01, "chance": 0.25, "n": 99, "truncated": 3,
                          "exact,strict": 0.1, "exact_stderr,strict": 0.01}},
        "baselines": {"unigram_bpb": 4.0, "5-gram_bpb": 0.5, "tokens": 99}})
    page, _, markdown = build(run)
    who = f"{tmp_path.name}/run"
    assert ["step 100", "arc acc", "0.5000 ± 0.0196", "0.25"] in cells(page)
    assert ["step 100", "arc exact,strict", "0.1000 ± 0.0196", "–"] in cells(page)
    assert not {"arc n", "arc truncated", "arc chance"} & {row[1] for row in cells(page) if row[1:]}
    assert ["step 100", "validation bits per byte", "1.2500", "–"] in cells(page)
    assert "needs 150.0% more bits than a 5-gram model" in page
    at = cells(page).index(["step 100", "bits per byte", "below unigram"])
    assert cells(page)[at + 1:at + 4] == [["5-gram", "0.5000", "87.5%"], [who, "1.2500", "68.8%"],
                                          ["unigram", "4.0000", "0.0%"]]
    assert "0.5000 ± 0.0196" in markdown


def test_scores_by_position_and_of_shorter_windows(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "eval/step_100.json", {
        "step": 100, "val_loss": 3.0, "val_bpb": 1.0, "by_position": {
            "0-255": 3.25, "0-255_stderr": 0.01, "256-511": 2.75, "256-511_stderr": 0.02, "n": 9},
        "contexts": {"256": {"val_loss": 3.5, "val_bpb": 1.25, "by_position": {"0-63": 4.0}}},
        "tasks": {"passkey": {"acc": 0.5, "acc_stderr": 0.05, "acc_512": 0.25, "chance": 0.1}}})
    rows = {row[1]: row[2:] for row in cells(build(run)[0]) if len(row) == 4}
    assert rows["loss by position, at 0-255"] == ["3.2500 ± 0.0196", "–"]
    assert rows["loss by position, at 256-511"] == ["2.7500 ± 0.0392", "–"]
    assert rows["validation in windows of 256 bits per byte"] == ["1.2500", "–"]
    assert rows["loss by position in windows of 256, at 0-63"] == ["4.0000", "–"]
    assert rows["passkey acc"] == ["0.5000 ± 0.0980", "0.1"]
    assert rows["passkey acc_512"] == ["0.2500", "0.1"]


def test_two_measures_of_pairs_have_two_names():
    found = metrics_by_title({"val_loss": 0.1, "rewards/accuracies": 0.97, "logps/accuracies": 0.89,
                              "logps/accuracies_stderr": 0.02})["validation"]
    assert found == {"loss, nats per pair": 0.1, "bits per byte": None,
                     "chosen preferred by rewards": 0.97, "chosen preferred by likelihood": 0.89,
                     "chosen preferred by likelihood_stderr": 0.02}


def test_scores_are_drawn_along_the_run(tmp_path):
    """As dots with their intervals, beside chance; page.js knows steps, tokens and hours."""
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    for step, acc in ((50, 0.25), (100, 0.75)):
        write(run / f"eval/step_{step}.json", {
            "step": step, "tokens": step * 512, "tasks": {
                "local:a&b": {"acc": acc, "acc_stderr": 0.05, "n": 9, "correct": 3, "irt": 0.3,
                              "intervals": {"irt": [0.2, 0.4]}, "letters": {"A": 9},
                              "chance": 0.25}},
            "texts": {"x.txt": {"val_loss": 2.0, "val_bpb": 1.5}}})
    page, data, markdown = build(run, other)
    figure = next(one for one in page.split("<figure") if "a&amp;b acc</b>" in one)
    dots = np.array(re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', figure), float)
    bars = np.array(re.findall(r'class="range" d="M([\d.]+),([\d.]+) [\d.]+,([\d.]+)"', figure),
                    float)
    assert (dots[0, 0] - LEFT) * 2 == pytest.approx(dots[1, 0] - LEFT, abs=0.2)  # twice the steps
    np.testing.assert_allclose(bars[:, 1:].mean(1), dots[:, 1], atol=0.11)
    scale = (dots[0, 1] - dots[1, 1]) / 0.5
    np.testing.assert_allclose(bars[:, 1] - bars[:, 2], 2 * 1.96 * 0.05 * scale, atol=0.21)
    assert "chance</span>" in figure and "bars: 95 % interval" in figure
    chart = next(one for one in data["charts"] if one["title"] == "local:a&b acc")
    assert chart["lines"][0]["x"]["step"] == [50, 100] and chart["lines"][0]["y"] == [0.25, 0.75]
    assert chart["lines"][0]["x"]["tokens"] == [25600, 51200]
    assert chart["lines"][0]["low"] == [0.152, 0.652] and chart["lines"][1]["look"] == "chance"
    assert "_score_1.svg)" in markdown and (run / "report_with_other_score_1.svg").is_file()
    rows = {row[1]: row[2:] for row in cells(page) if len(row) == 4}
    assert rows["local:a&b irt"] == ["0.3000 (0.200 to 0.400)", "–"]
    assert rows["x.txt bits per byte"] == ["1.5000", "–"] and "local:a&b correct" not in rows
    earlier = page.index("Scores of earlier steps")
    assert page.index("0.7500 ± 0.0980") < earlier < page.index("0.2500 ± 0.0980")


@pytest.mark.parametrize("form", ["given", "dotted", "absolute", "real"])
def test_a_file_of_a_runs_own_folder_has_one_name_in_all_runs(tmp_path, monkeypatch, form):
    """By which its scores are drawn in one chart; a run's own path is in no name."""
    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    Path("out").symlink_to("real")
    runs = [make_run(Path(f"out/s{i}"), seed=i) for i in range(2)]
    for run in runs:
        place = {"given": f"{run}", "dotted": f"./{run}/", "absolute": f"{run.absolute()}",
                 "real": f"{run.resolve()}"}[form]
        for step in (50, 100):
            write(run / f"eval/step_{step}.json", {"step": step, "tokens": step, "tasks": {
                f"probe:{place}/c.parquet,e.csv y": {
                    "auroc": 0.7, f"auroc minus {place}/b.csv": 0.1,
                    "margins": {"auroc": 0.01, f"auroc minus {place}/b.csv": 0.02}, "n": 9},
                f"probe:x{run}/c.parquet y": {"auroc": 0.1, "n": 9},  # another place
                f"probe:{place}/d.csv y": {"auroc": 0.2, "n": 9},  # two that would become one
                "probe:d.csv y": {"auroc": 0.3, "n": 9}}})
    page, _, text = build(*runs)
    assert page.count("<b>probe:c.parquet,e.csv y auroc</b>") == 1
    assert text.count("| probe:c.parquet,e.csv y auroc minus b.csv | 0.1000 ± 0.0200 |") == 4
    for run in runs:
        assert f"probe:x{run}/c.parquet y auroc |" in text
    assert text.count("/d.csv y auroc |") == text.count("| probe:d.csv y auroc |") == 4


def test_seeds_are_a_mean_and_a_band(tmp_path):
    folders = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2, 3)]
    groups = grouped([load(folder) for folder in folders])
    assert len(groups) == 1
    table = np.array([[row["loss"] for row in metrics_of(run) if "loss" in row] for run in folders])
    steps, mean, low, high = np.array(curve(groups[0], "loss")).T
    assert list(steps) == list(range(10, 101, 10))
    np.testing.assert_allclose(mean, table.mean(0), rtol=1e-15)
    np.testing.assert_array_equal(low, table.min(0))
    np.testing.assert_array_equal(high, table.max(0))
    page, data, _ = build(*folders)
    # of the training loss; validation has a bar at each dot
    assert page.count("<polygon") == 1 and page.count('class="range"') == 4  # not of step 0
    svg = page.split("<svg")[2]  # along the highest from the left, back along the lowest
    corners = [float(p.split(",")[0]) for p in svg.split('points="')[1].split('"')[0].split()]
    assert len(corners) == 2 * len(steps) and corners == corners[::-1]
    assert page.count("seed1 and 2 other seeds (mean, range)</span>") == 7
    assert [run["metrics"] for run in data["runs"]] == [metrics_of(run) for run in folders]


def test_a_group_ends_where_its_shortest_run_ends(tmp_path):
    folders = [make_run(tmp_path / "long", seed=1), make_run(tmp_path / "short", seed=2)]
    rows = metrics_of(folders[1])
    (folders[1] / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:5]))
    runs = [load(folder) for folder in folders]
    assert [row[0] for row in curve(runs, "loss")] == [10, 20, 30, 40]


def test_validation_sets_that_were_not_measured_at_the_same_steps(tmp_path):
    """One came later, has once no finite loss, or was never measured at a step that all seeds
    have."""
    one, two = make_run(tmp_path / "one", seed=1), make_run(tmp_path / "two", seed=2)
    rows = [{"step": 0, "val_loss/old": 3.0}, {"step": 50, "val_loss/old": 3.1,
            "val_loss/new": 5.0}, {"step": 60, "val_loss/old": 3.2, "val_loss/new": None},
            {"step": 70, "val_loss/old": None, "val_loss/new": 4.0}]
    for folder, last in ((one, 80), (two, 90)):
        more = [*rows, {"step": last, "val_loss/late": 2.0}]
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in more)
    page, _, _ = build(one)
    assert page.count("Trade-off: loss on old against loss on new, nats per token</b>") == 1
    assert "against loss on late" not in page and ">late</span>" in page
    both, _, _ = build(one, two)
    assert "Trade-off: loss on old against loss on new" in both and ">late" not in both


def test_runs_that_differ_are_drawn_apart(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", global_batch_tokens=1024)
    page, data, _ = build(one, two, out=str(tmp_path / "new" / "both.html"))
    names = [run["name"] for run in data["runs"]]
    assert names == [f"{tmp_path.name}/one", f"{tmp_path.name}/two"] and "<polygon" not in page
    for name in names:
        assert page.count(f">{name}</span>") == CHARTS
    assert (tmp_path / "new" / "both_loss.svg").exists()


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    one, two = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", n_layer=5)
    assert [run["name"] for run in build(one, two)[1]["runs"]] == ["a/run", "b/run"]


def test_samples_along_the_run(tmp_path):
    """Of up to eight steps, the first and the last among them, the newest on top and open."""
    run = make_run(tmp_path / "run")
    rows = [{"step": step, "prompt": "def ", "completion": f"at{step}"} for step in range(29)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    page, _, markdown = build(run)
    steps = [28, 24, 20, 16, 12, 8, 4, 0]
    texts = [f"at{step}" for step in steps for _ in "ab"]
    assert re.findall("<pre><b>def </b>(.*?)</pre>", page) == texts
    assert re.findall("<pre>def (.*?)</pre>", markdown) == texts
    assert re.findall("<details open><summary>(.*?)<", page) == ["step 28"]


def test_a_dialog_is_laid_out_by_its_turns(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "samples.jsonl", {"step": 1, "prompt": "<s><|user|>Hi <b>\n<|end|><|assistant|>",
                                  "completion": "Ho<|end|>"})
    page, _, markdown = build(run)
    assert re.findall('<div class="turn (.*?)"><span>.*?</span><pre>(.*?)</pre>', page) == [
        ("user", "Hi &lt;b&gt;"), ("assistant", "Ho")]
    assert "&lt;|user|&gt;Hi" in markdown


def test_what_is_learned_of_a_dialog_is_marked(tmp_path):
    run = make_run(tmp_path / "run", documents="chat")
    info = json.loads((run / "run.json").read_text())
    info["data"] |= {"train_tokens": 4000, "train_learned": 1000}
    write(run / "run.json", info | {"example": [["<|user|><i>", False], ["Ho<|end|>", True]]})
    page, _, markdown = build(run)
    assert '<pre class="mask">&lt;|user|&gt;&lt;i&gt;<mark>Ho&lt;|end|&gt;</mark></pre>' in page
    assert "25.0% of the 4k training tokens are learned" in page
    assert "[[Ho&lt;|end|&gt;]]" in markdown


def test_text_of_any_script_is_shown_as_itself(tmp_path):
    run = make_run(tmp_path / "run", sources=[{"path": "книга.txt"}], sample_prompt="海は")
    info = json.loads((run / "run.json").read_text())
    info["overrides"] |= {"sample_prompt": "海は"}
    info["data"]["sources"] = [{"path": "книга.txt"}]
    write(run / "run.json", info)
    write(run / "samples.jsonl", {"step": 1, "prompt": "Η ", "completion": "θάλασσα"})
    for text in (build(run)[0], build(run)[2]):
        assert "\\u04" not in text and "\\u6d" not in text and "\\u03" not in text
        assert "книга.txt" in text and "海は" in text and "θάλασσα" in text


def test_pictures_stand_alone(tmp_path):
    """With title, legend and style; the page has the same curves without."""
    run = make_run(tmp_path / "run")
    page, data, markdown = build(run)
    pictures = re.findall(r"!\[([^]]*)\]\(([^)]*)\)", markdown)
    assert len(pictures) == page.count('<figure class="chart') == len(data["charts"]) == CHARTS
    figures = page.split("<figure")[1:]
    for figure, (title, name) in zip(figures, pictures, strict=True):
        svg = (run / name).read_text()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert STYLE in svg and f">{title}</text>" in svg and f"<b>{title}</b>" in figure
        assert svg.count("<circle") == figure.count("<circle")


def test_a_curve_is_drawn_where_the_numbers_are():
    points = [Point(step, value, value, value) for step, value in ((0, 0), (60, 5), (100, 10))]
    svg = draw(Chart("t", ("lr",), zero=True), ["x"], [Line(0, "strong", points)])
    path = re.search(r'<path d="M([0-9., ]*)h0"', svg)
    assert path
    at = np.array([[float(v) for v in point.split(",")] for point in path[1].split()])
    assert re.findall(r'x="([0-9.]*)" y="[0-9]*">(?:0|60|100)<', svg) == [
        f"{x:.1f}" for x in at[:, 0]]  # the labels below them
    assert at[0, 0] == LEFT and at[2, 0] == 480 - 14
    np.testing.assert_allclose(at[:, 1], 54 + HEIGHT * (1 - np.array([0, 5, 10]) / 10.6),
                               atol=0.05)


def test_the_first_steps_do_not_flatten_the_rest():
    """The scale is that of what comes after a twentieth of the way, what is cut off is said, and no
    line leads from the score of the first weights to the next."""
    points = [Point(step, value, value, value) for step, value in (
        (0, 9.0), (25, 5.0), (50, 4.0), (75, 3.5), (100, 3.0))]
    chart, lines = Chart("t", ("val_loss",), fit=True), [Line(0, "dots", points)]
    low, high, _ = limits(chart, lines)
    assert low == pytest.approx(3 - 0.12) and high == pytest.approx(5 + 0.12)
    assert cut_off(chart, lines) == 0 and cut_off(Chart("t", ("val_loss",)), lines) is None
    svg = draw(chart, ["x"], lines)
    path = re.search(r'<path d="M([-0-9., ]*)h0"', svg)
    assert path and len(path[1].split()) == 4 and svg.count("<circle") == 5
    assert limits(chart, [Line(0, "dots", points[:2])])[1] > 9  # too few to leave one out


def test_a_running_mean_lags_at_its_end_alone():
    line = [Point(step, 3.0 * step, 0, 0) for step in range(200)]
    assert [p.mean for p in smoothed(line)][:196] == pytest.approx([p.mean for p in line][:196])
    noise = np.random.default_rng(0).normal(size=400)
    made = smoothed([Point(i, value, value, value) for i, value in enumerate(noise)])
    weights = 1 - np.abs(np.arange(-8, 9)) / 9  # 2 % on either side
    assert made[200].mean == pytest.approx(np.sum(weights * noise[192:209]) / weights.sum())
    assert made[0].mean == noise[0]


def test_long_curves_are_thinned_and_keep_their_peaks():
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321], values[77_777] = 50, -50
    points = [Point(i, value, value, value) for i, value in enumerate(values.tolist())]
    kept = thinned(points)
    assert len(kept) <= MOST and kept == sorted(kept) and set(kept) <= set(points)
    assert {0, 54_321, 77_777, 99_999} <= {point.step for point in kept}
    assert thinned(points[:MOST]) == points[:MOST]


def test_other_axes_of_a_curve(tmp_path):
    """Hours are those of training: the pause before step 60 does not count."""
    run = load(make_run(tmp_path / "run"))
    axes = along(run, [Point(step, 0, 0, 0) for step in (0, 5, 60, 100)])
    assert axes["tokens"] == [0, 2560, 60 * 512, 51200]
    assert axes["hours"] == pytest.approx([0, 5 / 3600, 60 / 3600, 100 / 3600])


def test_a_logarithmic_curve_is_drawn_where_the_numbers_are():
    points = [Point(step, value, value, value) for step, value in ((0, 1.0), (1, 10.0), (2, 100.0))]
    svg = draw(Chart("t", ("loss",), log=True), ["x"], [Line(0, "strong", points)])
    heights = [float(y) for y in re.findall(r",([0-9.]+)", svg.split('<path d="M')[1])]
    grid = [float(y) for y in re.findall(rf'class="rule" d="M{LEFT} ([0-9.]+)H', svg)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert set(heights) <= set(grid)  # 1, 10 and 100 have a line each


WHOLE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 312"
 role="img" aria-label="a &lt; b">
<rect class="paper" width="100%" height="100%"/>
<text class="title" x="4" y="18">a &lt; b</text>
<text x="4" y="38"><tspan class="k0">●</tspan> one</text>
<text x="4" y="56"><tspan class="k1">●</tspan> {sixty}</text>
<path class="rule" d="M56 261.3H466"/><text class="y" x="48" y="265.3">1</text>
<path class="rule" d="M56 216.6H466"/><text class="y" x="48" y="220.6">2</text>
<path class="rule" d="M56 172.0H466"/><text class="y" x="48" y="176.0">3</text>
<path class="rule" d="M56 127.4H466"/><text class="y" x="48" y="131.4">4</text>
<path class="rule" d="M56 82.7H466"/><text class="y" x="48" y="86.7">5</text>
<text class="x" x="56.0" y="290">0</text><text class="x" x="138.0" y="290">20</text>
<text class="x" x="220.0" y="290">40</text><text class="x" x="302.0" y="290">60</text>
<text class="x" x="384.0" y="290">80</text><text class="x" x="466.0" y="290">100</text>
<text class="y" x="466" y="308">step</text>
<svg y="72" width="480" height="200" viewBox="0 72 480 200">
<g class="curve strong k0"><path d="M56.0,216.6 261.0,127.4 466.0,172.0h0"/>
<polygon points="56.0,172.0 261.0,82.7 466.0,127.4 466.0,216.6 261.0,172.0 56.0,261.3"/></g>
<g class="curve dots broken k1"><path d="M220.0,216.6 384.0,82.7h0"/>
<path class="range" d="M220.0,239.0 220.0,194.3"/>
<circle r="3.5" cx="56.0" cy="261.3"/><circle r="3.5" cx="220.0" cy="216.6"/>
<circle r="3.5" cx="384.0" cy="82.7"/></g></svg></svg>"""
BARE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 350" role="img" aria-label="t">
<path class="rule" d="M56 296.4H946"/><text class="y" x="48" y="300.4">10</text>
<path class="rule" d="M56 214.3H946"/><text class="y" x="48" y="218.3">20</text>
<path class="rule" d="M56 166.2H946"/><text class="y" x="48" y="170.2">30</text>
<path class="rule" d="M56 105.7H946"/><text class="y" x="48" y="109.7">50</text>
<path class="rule" d="M56 65.9H946"/><text class="y" x="48" y="69.9">70</text>
<path class="rule" d="M56 23.6H946"/><text class="y" x="48" y="27.6">100</text>
<text class="x" x="56.0" y="328">2</text><text class="x" x="278.5" y="328">2.5</text>
<text class="x" x="501.0" y="328">3</text><text class="x" x="723.5" y="328">3.5</text>
<text class="x" x="946.0" y="328">4</text><text class="y" x="946" y="346">hours</text>
<svg y="10" width="960" height="300" viewBox="0 10 960 300">
<g class="curve pale broken k0"><path d="M56.0,296.4 946.0,23.6h0"/></g></svg></svg>"""


def points(*rows: tuple) -> list[Point]:
    """Points of (step, value), or with the ends of a band behind."""
    return [Point(*row, *(row[1:] * 2 if len(row) == 2 else ())) for row in rows]


def test_whole_charts_are_drawn_as_they_are_here():
    """One as a picture, with a band, bars, a dot that no line leads from and a broken curve; one
    for the page, wide, of its own range and logarithmic."""
    lines = [Line(0, "strong", points((0, 2, 1, 3), (50, 4, 3, 5), (100, 3, 2, 4))),
             Line(9, "dots", points((0, 1), (40, 2, 1.5, 2.5), (80, 5)))]
    drawn = draw(Chart("a < b", ("val_loss",)), ["one", *"x" * 8, "y" * 70], lines)
    assert drawn == WHOLE.format(sixty="y" * 60).replace("\n", "")
    wide = Chart("t", ("loss",), log=True, axis="hours", left=None, wide=True)
    lines = [Line(8, "pale", points((2, 10), (4, 100)))]
    assert draw(wide, [*"x" * 9], lines, bare=True) == BARE.replace("\n", "")
    one = draw(Chart("t", ("loss",)), ["x"], [Line(0, "dots", points((0, 3)))])
    assert '<path d="M56.0,154.0h0"/><circle r="3.5" cx="56.0" cy="154.0"/>' in one
    assert ' y="272">0.2</text>' in one  # to the first step, if there is none
    two = draw(Chart("t", ("loss",)), ["x"], [Line(0, "dots", points((0, 3), (2, 4)))])
    assert '<path d="M466.0,' in two and two.count("<circle") == 2
    one = draw(Chart("t", ("loss",), left=None), ["x"] * 8,
               [Line(7, "dots", points((1, 3), (2, 4)))])
    assert 'class="curve dots k7"><path d="M56.0,' in one  # not at step 0: a line leads from it


@pytest.mark.parametrize(("row", "how", "found"), [
    ((1, 1, 1), {}, (0.94, 1.06, False)), ((0, 0, 0), {}, (0, 1, False)),
    ((-2, -2, -2), {}, (-2.12, -1.88, False)), ((2, 1, 3), {}, (0.88, 3.12, False)),
    ((2, 1, 3), {"zero": True}, (0, 3.18, False)),
    ((-2, -3, -1), {"zero": True}, (-3.18, 0.18, False)),
    ((2, 1, 3), {"log": True}, (3**-0.05, 3 * 3**0.05, True)),
    ((2, 2, 2), {"log": True}, (2 / 1.001, 2.002, True)),
    ((2, 0, 3), {"log": True}, (0, 3.18, False))])
def test_heights_have_some_room_around_the_values(row, how, found):
    chart = Chart("t", ("a",), **how)
    assert limits(chart, [Line(0, "strong", points((0, *row)))]) == pytest.approx(found)


def test_the_first_twentieth_of_the_way_is_early():
    for steps, kept in (((0, 5, 6, 50, 100), [6, 50, 100]), ((0, 5, 50, 100), [0, 5, 50, 100]),
                        ((100, 105, 106, 150, 200), [106, 150, 200])):
        assert [point.step for point in late(points(*((step, 1) for step in steps)))] == kept


@pytest.mark.parametrize(("asked", "marks"), [
    ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]), ((0, 10), [0, 2, 4, 6, 8, 10]), ((3, 3), [3]),
    ((0, 5), [0, 1, 2, 3, 4, 5]), ((0, 5.1), [0, 2, 4]), ((-7, 8), [-5, 0, 5]),
    ((0, 0.4), [0, 0.1, 0.2, 0.3, 0.4]), ((0, 12), [0, 2.5, 5, 7.5, 10]),
    ((0, 50), [0, 10, 20, 30, 40, 50]),
    ((0, 9), [0, 2, 4, 6, 8]), ((0, 20.1), [0, 5, 10, 15, 20]), ((2.5, 10, True), [4, 6, 8, 10]),
    ((2, 10, True), [2, 3, 5, 7, 10]), ((1, 29, True), [1, 2, 3, 5, 7, 10, 20]),
    ((1, 30, True), [1, 3, 10, 30]), ((0.5, 99, True), [1, 3, 10, 30]),
    ((0.1, 3e3, True), [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1e3, 3e3][::2]),
    ((0.1, 1e3, True), [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1e3]),
    ((1e-4, 1e5, True), [10.0**i for i in range(-4, 6)])])
def test_ticks_are_round(asked, marks):
    assert ticks(*asked) == pytest.approx(marks)


@pytest.mark.parametrize(("low", "high", "log"), [
    (0, 1e-9, False), (2.9, 3.1, True), (1, 9, True), (1e-4, 1e5, True), (0, 7e5, False),
    (100, 101, False), (1, 8.9, True), (2.1, 8.9, True), (4, 125, True)])
def test_ticks_are_few_and_inside(low, high, log):
    marks = ticks(low, high, log)
    assert 2 <= len(marks) <= 10 and marks == sorted(marks)
    assert low * (1 - 1e-9) <= marks[0] and marks[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (0, "0"), (6e-4, "0.0006"), (1e-10, "1e-10"), (0.25, "0.25"), (20000, "20k"),
    (124_085_760, "124.1M"), (999_999_999, "1B"), (1.5e12, "1.5T"), (-3e6, "-3M")])
def test_short_numbers(value, text):
    assert short(value) == text


def test_a_truncated_last_line_is_a_run_at_work(tmp_path):
    run = make_run(tmp_path / "run")
    whole = metrics_of(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "lo')
    page, data, _ = build(run)
    assert data["runs"][0]["metrics"] == whole and "step 100 of 100" in page


@pytest.mark.parametrize(("name", "text"), [
    ("metrics.jsonl", '{"step": 1}\n\0\0{\n{"step": 2}\n'), ("run.json", "{"), ("run.json", "[]"),
    ("status.json", "{"), ("eval/step_5.json", "5"), ("samples.jsonl", "oops\n")])
def test_damage_is_named(tmp_path, name, text):
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(settings.UserError, match=f"{name}.* is damaged"):
        build(run)


def test_values_that_are_not_numbers_are_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "tokens": 1, "loss": NaN, "grad_norm": Infinity, "lr": null}\n')
    drawn = re.findall("<figure.*?</figure>", build(run)[0], re.DOTALL)
    assert len(drawn) == CHARTS and not re.search(r"\bnan\b|\binf\b", "".join(drawn).lower())


def test_no_evaluation_yet(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "metrics.jsonl", {"step": 1, "tokens": 512, "loss": 5.0, "tokens_per_second": 512})
    page = build(run)[0]
    assert "validation loss – nats" in page and "No scores yet" in page
    assert page.count("<figure") == 2  # loss and tokens per second, a point each


def test_a_loss_that_is_not_finite_any_more_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "status.json", {"state": "failed", "step": 110})
    assert "not finite" not in build(run)[0]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "tokens": 56320, "loss": null}\n')
    assert "Its newest loss is not finite; what is said here is older." in build(run)[0]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "tokens": 56320, "val_loss": NaN, "val_bpb": NaN}\n')
    assert "Its newest loss and val_loss is not finite" in build(run)[2].replace("\\", "")


def test_a_page_takes_the_place_of_no_other(tmp_path):
    """Also not of a file of the user's, or of its Markdown twin."""
    one, two, three = (make_run(tmp_path / name, n_layer=layers)
                       for name, layers in (("one", 4), ("two", 5), ("three", 6)))
    own = build(one)[0]
    both = build(one, two)[0]
    kept = (one / "report.html").read_text()
    assert kept.startswith(own[:9000]) and "report_with_two" in str([*one.iterdir()])
    assert build(one)[0] == own and build(one, two)[0] == both  # the same again
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    for out, folders, said in (
            (one / "report.html", (one, two), "is the page of that run alone; name another"),
            (one / "report_with_two.html", (one, three), "is the page of .*/one, .*/two; name"),
            (tmp_path / "mine.html", (one,), "is there already; name another"),
            (tmp_path / "README.html", (one,), r"README\.md is there already; name another")):
        with pytest.raises(settings.UserError, match=said):
            build(*folders, out=str(out))
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "README.md").read_text() == "mine"
    one.rename(tmp_path / "four")
    assert "/four</title>" in build(tmp_path / "four")[0]  # its own page, moved


def test_scores_of_other_weights_are_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    write(run / "eval/step_100.json", {"step": 100, "val_bpb": 1.25, "weights": "0" * 64})
    assert "1.2500" in build(run)[0]  # the checkpoint is gone: nothing tells that it was another
    (run / "checkpoints/step_100").mkdir(parents=True)
    write(run / "checkpoints/step_100/checksums.json", {"files": {"config.json": {"size": 1}}})
    assert "1.2500" not in build(run)[0] and "scores other weights" in capsys.readouterr().out


def test_what_a_file_does_not_say_is_left_out(tmp_path):
    """Each key of run.json, of a row, of the scores: a page without it, or a line that names it."""
    run = make_run(tmp_path / "run")
    write(run / "eval/step_100.json", {
        "step": 100, "tokens": 51200, "val_bpb": 1.25, "tasks": {"arc": {"acc": 0.5}},
        "baselines": {"unigram_bpb": 4.0, "5-gram_bpb": 0.5}})
    write(run / "samples.jsonl", {"step": 100, "prompt": "def ", "completion": "at"})
    kept = {path: json.loads(path.read_text()) for path in (
        run / "run.json", run / "eval/step_100.json", run / "samples.jsonl")}
    kept[run / "metrics.jsonl"] = metrics_of(run)[1]
    tried = 0
    for path, value in kept.items():
        places = [(value, name) for name in value]
        places += [(part, name) for part in value.values() if isinstance(part, dict)
                   for name in part]
        for part, name in places:
            taken = part.pop(name)
            write(path, value)
            try:
                build(run)
            except settings.UserError as error:
                assert path.name in str(error) and name in str(error)
            part[name], tried = taken, tried + 1
        write(path, value)
    assert tried > 100


def test_memory_is_drawn_in_gib(tmp_path):
    chart = build(make_run(tmp_path / "run"))[0].split("<b>Peak memory, GiB")[-1].split("</svg>")[0]
    assert ">1</text>" in chart and "B</text>" not in chart  # 2**30 bytes in every row


def test_barely_begun(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    write(run / "metrics.jsonl", {"step": 0, "tokens": 0, "val_loss": 5.0, "val_bpb": 1.0})
    page = build(run)[0]
    assert "begun at step 0 of 10, after 0 tokens and 0:00:00" in page
    assert "validation loss 5 nats" in page and "No samples yet" in page


def test_bad_input_is_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    assert "nowhere" in fails(tmp_path / "nowhere") and "run" in fails(tmp_path / "nowhere")
    assert "--ouut; did you mean" in fails(run, "--ouut=x")
    assert "eval is not a run" in fails(run / "eval")
    assert "must end in .html" in fails(run, "--out=page.md")
    (run / "metrics.jsonl").write_text("")
    assert "no rows yet" in fails(run)
    (run / "run.json").write_text('{"config"')
    assert "run.json is damaged" in fails(run)


def test_newest_run_is_the_default(tmp_path, monkeypatch, capsys):
    for age, name in enumerate(("new", "old")):
        run = make_run(tmp_path / "out" / name)
        os.utime(run / "metrics.jsonl", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert run_main([]) == 0
    assert "taking out/new, its newest run" in capsys.readouterr().out
    assert (tmp_path / "out" / "new" / "report.html").exists()


def test_bare_report_and_bare_sample_take_the_same_run(tmp_path, monkeypatch):
    """The run with the newest checkpoint, although the other one has newer metrics."""
    for name, saved, logged in (("a", 3e8, 1e9), ("b", 2e8, 2e9)):
        run = make_run(tmp_path / "out" / name)
        step = run / "checkpoints" / "step_100"
        step.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (step / file).write_text(name)
        write_json(step / "checksums.json", {"format": checkpoint.FORMAT, "files": {
            path.name: file_entry(path) for path in step.iterdir()}})
        os.utime(step, (saved, saved))
        os.utime(run / "metrics.jsonl", (logged, logged))
    monkeypatch.chdir(tmp_path)
    taken = checkpoint.find_checkpoint(sample.Flags().ckpt)
    assert taken == Path("out/a/checkpoints/step_100") and find_run("out") == Path("out/a")
    assert run_main([]) == 0 and (tmp_path / "out" / "a" / "report.html").exists()


def test_help_is_quick_and_torch_is_not_loaded():
    code = ("import sys, report; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parent)
    done = subprocess.run([sys.executable, report.__file__, "--help"], capture_output=True,
                          text=True, check=True, timeout=600)
    assert "--out=" in done.stdout


def references(tmp_path, capsys, *seeds: int) -> list[Path]:
    runs = [make_run(tmp_path / f"seed{seed}", seed=seed) for seed in seeds]
    for run in runs:
        write(run / "status.json", {"state": "done", "step": 100})
    assert run_main([*map(str, runs), f"--save_reference={tmp_path}/curves/ours.json"]) == 0
    assert f"{len(seeds)} run(s)" in capsys.readouterr().out
    return runs


def test_how_far_a_run_is_from_the_reference(tmp_path, capsys):
    runs = references(tmp_path, capsys, 1, 2, 3)
    fourth = make_run(tmp_path / "fourth", seed=4, save_interval=7, micro_batch=2)
    assert run_main([str(fourth), f"--compare={tmp_path}/curves/ours.json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and not (fourth / "report.html").exists()
    for line, step in zip(lines, (0, 50, 100), strict=True):
        losses = [next(row["val_loss"] for row in metrics_of(run)
                       if row["step"] == step and "val_loss" in row)
                  for run in (*runs, fourth)]
        assert f"{step * 512:,} tokens: {losses[3]:.4f} nats" in line
        assert f"reference {np.mean(losses[:3]):.4f}" in line
        if step:
            sigmas = (losses[3] - np.mean(losses[:3])) / np.std(losses[:3], ddof=1)
            assert line.endswith(f"± {np.std(losses[:3], ddof=1):.4f}, {sigmas:+.1f} sigma")
    # Student's t of two degrees of freedom, 4.3027, times the root of 1 + 1/3
    assert f"{sigmas:+.1f} sigma, " in last and "5.0 sigma around" in last
    assert ("OUTSIDE" in last) == (abs(sigmas) > 4.3027 * (4 / 3)**0.5)


def test_one_run_has_no_sigma(tmp_path, capsys):
    references(tmp_path, capsys, 1)
    other = make_run(tmp_path / "other", seed=2)
    assert run_main([str(other), f"--compare={tmp_path}/curves/ours.json"]) == 0
    said = capsys.readouterr().out
    assert " sigma" not in said and "off by" in said


def test_what_a_run_is_not_compared_with(tmp_path, capsys):
    runs = references(tmp_path, capsys, 1, 2)
    curves = f"--compare={tmp_path}/curves/ours.json"
    assert "learning_rate=0.003 (0.002)" in fails(make_run(tmp_path / "a", learning_rate=3e-3),
                                                  curves)
    info = json.loads((runs[0] / "run.json").read_text())
    info["data"]["manifest_sha256"] = "0" * 64
    write(runs[0] / "run.json", info)
    assert f"the data's hash={'0' * 64} ({'f' * 64})" in fails(runs[0], curves)
    new = f"--save_reference={tmp_path}/new.json"
    assert f"the data's hash={'f' * 64} ({'0' * 64})" in fails(*runs, new)
    twin = make_run(tmp_path / "twin", seed=2)
    write(twin / "status.json", {"state": "done", "step": 100})
    assert "one of its own" in fails(runs[1], twin, new)
    assert "no file" in fails(runs[1], "--compare=none.json")
    (tmp_path / "bad.json").write_text("{}")
    assert "reference curves" in fails(runs[1], f"--compare={tmp_path}/bad.json")
    assert "is there" in fails(runs[1], f"--save_reference={tmp_path}/curves/ours.json")
    assert "exclude each other" in fails(runs[1], curves, new)
    later = make_run(tmp_path / "later")
    (later / "metrics.jsonl").write_text('{"step": 7, "tokens": 7, "val_loss": 5.5}\n')
    assert "no evaluation at the tokens" in fails(later, curves)
    (later / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "val_loss": null}\n')
    assert "not finite" in fails(later, curves)
    reference = json.loads((tmp_path / "curves/ours.json").read_text())
    write(tmp_path / "newer.json", reference | {"format": 99})
    assert "newer than" in fails(runs[1], f"--compare={tmp_path}/newer.json")
    del reference["recipe"]["doc_mask"]  # a key that the reference is older than: its default
    write(tmp_path / "older.json", reference)
    assert run_main([str(runs[1]), f"--compare={tmp_path}/older.json"]) == 0
    write(runs[1] / "status.json", {"state": "stopped", "step": 50})
    assert "is stopped" in fails(runs[1], new) and not (tmp_path / "new.json").exists()


# ---- a run that goes on

def test_a_page_is_written_as_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """It says that it loads itself anew until the run ends; the last page holds its last row."""
    run = make_run(tmp_path / "run")
    write(run / "status.json", {"state": "running", "step": 100})
    seen = []

    def sleep(seconds: int) -> None:
        page = (run / "report.html").read_text()
        meta = '<noscript><meta http-equiv="refresh" content="3"></noscript>'
        seen.append((seconds, '"every": 3' in page, meta in page))
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 100 + len(seen), "tokens": 60_000, "loss": 1.0}) + "\n")
        if len(seen) == 2:
            write(run / "status.json", {"state": "done", "step": 102})

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert run_main([str(run), "--watch", "--every=3"]) == 0
    assert seen == [(3, True, True)] * 2
    page = (run / "report.html").read_text()
    assert '"every": 0' in page and "refresh" not in page.split("<style>")[0]
    assert "done at step 102 of 100" in page and '"step": 102' in page
    assert "the last page, nothing goes on" in capsys.readouterr().out
    assert not list(run.glob("*.tmp"))  # pages appear whole


def test_a_run_that_was_killed_is_not_watched_for_ever(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    write(run / "status.json", {"state": "running", "step": 100})
    assert not silent(run)
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    assert silent(run) and run_main([str(run), "--watch"]) == 0
    assert "may have been killed" in capsys.readouterr().out


def test_a_run_without_rows_is_waited_for(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("")
    monkeypatch.setattr(report.time, "sleep", lambda _: (run / "metrics.jsonl").write_text(rows))
    assert run_main([str(run), "--watch"]) == 0 and (run / "report.html").is_file()


def test_watching_with_other_options(tmp_path):
    run = make_run(tmp_path / "run")
    assert "--watch writes pages" in fails(run, "--watch", "--compare=x.json")
    assert "--every has no effect without --watch" in fails(run, "--every=3")


def test_what_is_said_of_a_curve(tmp_path):
    """Still falling, risen since its lowest value, or flat."""
    run = make_run(tmp_path / "run")
    rows = metrics_of(run)[:1]
    for losses, said in (([5, 4, 3, 2, 1], "still fell at the end: by 0.8000 over the last 20%"),
                         ([5, 3, 2, 2.5, 3], "was lowest at step 40, 2.0000, and has risen by 1.0"),
                         ([5, 3, 2, 2, 2], "hardly changed over the last 20% of the steps")):
        with open(run / "metrics.jsonl", "w") as file:
            file.write(json.dumps(rows[0] | {"val_loss": 5}) + "\n")
            file.writelines(json.dumps({"step": 20 * i, "val_loss": loss, "skipped": 3}) + "\n"
                            for i, loss in enumerate(losses) if i)
        page = build(run)[0]
        assert said in page and "3 updates were not made" in page


# ---- figures to the last digit, of runs that are made by hand

def made(*rows: dict, name: str = "out/r", **parts) -> RunFolder:
    """A run with these rows of metrics.jsonl, of 10 steps on one CPU; `parts`: of its files."""
    info = {"config": {"max_steps": 10} | parts.pop("config", {}), "data": parts.pop("data", {}),
            "device": {"count": 1, "name": "CPU"}, "parameters": {"total": 5}}
    files = {"status": {}, "samples": [], "evals": []} | parts
    return RunFolder(name, info | files.pop("info", {}), [*rows], **files)


ROWS = ({"step": 0, "tokens": 0, "val_loss": 4.0, "loss": 5.0},
        {"step": 1, "tokens": 10, "loss": 3.0, "tokens_per_second": 2.0},
        {"step": 2, "tokens": 30, "loss": 2.0, "val_loss": 2.5, "tokens_per_second": 5.0})


def test_of_each_chart_how_it_is_drawn():
    every = [*LOSS, *LEARNED, *MACHINE]
    first = {name: [chart.metrics[0] for chart in every if getattr(chart, name)]
             for name in ("zero", "log", "smooth", "fit", "wide")}
    assert first == {
        "zero": ["bleu_gen", "chrf_gen", "calls_gen", "lr", "tokens_per_second", "mfu",
                 "peak_memory_bytes", "skipped"],
        "log": ["grad_norm"], "fit": ["loss", "val_bpb"], "wide": ["loss"],
        "smooth": ["loss", "rewards/margins", "rewards/accuracies", "grad_norm"]}
    assert {chart.left for chart in every} == {0} and {chart.axis for chart in every} == {"step"}
    assert [chart.factor for chart in every if chart.factor != 1] == [2**-30]


def test_which_lines_a_chart_has_and_what_they_are_called():
    def looks_of(chart: Chart, *groups: list[RunFolder]) -> tuple[list, list]:
        lines, labels = lines_of(chart, [*groups])
        return [(line.number, line.look) for line in lines], labels

    run, other = made(*ROWS), made(*ROWS, name="out/s")
    noisy = [(0, "pale"), (0, "strong"), (0, "dots")]
    assert looks_of(LOSS[0], [run]) == ([*noisy[:2], (1, "dots")], ["training", "validation"])
    assert looks_of(LOSS[0], [run], [other]) == (
        [*noisy, *((1, look) for _, look in noisy)], ["out/r", "out/s"])  # a colour for each run
    pairs = Chart("Pairs", ("a", "b"), names=("one", "two"))
    run, other = (made({"step": 1, "a": 1.0, "b": 2.0}, name=name) for name in ("r", "s"))
    assert looks_of(pairs, [run], [other]) == (
        [(i, "strong") for i in range(4)], ["one, r", "two, r", "one, s", "two, s"])
    assert looks_of(pairs, [run, other])[1] == [
        f"{name}, r and 1 other seeds (mean, range)" for name in ("one", "two")]
    assert looks_of(Chart("B", ("b",)), [run], [other])[1] == ["r", "s"]
    assert looks_of(Chart("B", ("b",)), [run]) == ([(0, "strong")], ["B"])
    assert looks_of(Chart("none", ("c",)), [run]) == ([], [])
    sets = made({"step": 1, "val_loss/x": 1.0, "val_loss/y": 2.0, "val_loss/z": None})
    assert looks_of(Chart("Sets", ("val_loss/",)), [sets]) == (
        [(0, "dots"), (1, "dots")], ["x", "y"])
    for name, count, look in (("val_bpb", 60, "dots"), ("val_bpb", 61, "strong"),
                              ("lr", 1, "strong"), ("bleu_gen", 9, "dots"),
                              ("expansion_share", 2, "dots")):
        rows = [{"step": i, name: 1.0} for i in range(count)]
        assert looks_of(Chart("t", (name,)), [made(*rows)])[0] == [(0, look)], (name, count)
    for count, looks in ((2, ["strong"]), (3, ["pale", "strong"])):  # of two no running mean
        rows = [{"step": i, "loss": 1.0} for i in range(count)]
        assert [look for _, look in looks_of(LOSS[0], [made(*rows)])[0]] == looks


def test_a_chart_for_the_page_and_its_script(tmp_path):
    lines, labels = lines_of(LOSS[0], [[made(*ROWS)]])
    block = chart_block(LOSS[0], labels, lines, tmp_path / "p.html")
    axes = {"step": [0, 1, 2], "tokens": [0, 10, 30], "hours": [0, 0.00138889, 0.0025]}
    assert block.chart == {
        "title": "Loss, nats per token", "log": False, "axis": "step", "left": 0, "zero": False,
        "fit": True, "wide": True, "smooth": True, "lines": [  # the script makes the running mean
            {"number": 0, "look": "pale", "label": "training", "x": axes, "y": [5, 3, 2]},
            {"number": 1, "look": "dots", "label": "validation", "y": [4, 2.5],
             "x": {name: values[::2] for name, values in axes.items()}}]}
    assert block.markdown == "![Loss, nats per token](p_loss.svg)"
    assert block.html.startswith(
        '<figure class="chart wide"><figcaption><b>Loss, nats per token</b><span class="keys">'
        '<span class="k0">training</span><span class="k1">validation</span></span></figcaption>'
        '<svg xmlns')
    assert block.html.endswith(
        '</svg><small>line: running mean, pale: as logged</small><small>dots: validation</small>'
        '<small class="cut">cut off above: values until step 0</small></figure>')
    assert (tmp_path / "p_loss.svg").read_text().count(STYLE) == 1
    bars = [Line(9, "dots", points((1, 2, 1, 3), (2, 3))),
            Line(1, "chance", points((1, 1), (2, 1)))]
    block = chart_block(Chart("t", ("score/a/b",)), [*"abcdefghij"], bars, tmp_path / "p.html")
    assert '<span class="keys"><span class="chance">b</span><span class="k1">j</span>' in block.html
    assert block.html.endswith("</svg><small>bars: 95 % interval</small></figure>")
    assert '<figure class="chart"><figcaption>' in block.html
    assert block.chart["lines"][0] | {"x": 0} == {
        "number": 9, "look": "dots", "label": "j", "x": 0, "y": [2, 3], "low": [1, 3],
        "high": [3, 3]}
    assert block.chart["lines"][1].keys() == {"number", "look", "label", "x", "y"}
    assert (tmp_path / "p_score_a_b.svg").is_file()
    block = chart_block(Chart("t", ("a",)), ["t"], [
        Line(0, "strong", points((1, 2, 1, 3), (2, 3)))], tmp_path / "p.html")
    assert '<span class="keys"></span>' in block.html and "<small>" not in block.html
    for labels, numbers, keys in ((["x"], [0], 1), (["t", "x"], [0, 1], 2)):
        block = chart_block(Chart("t", ("a",)), labels, [
            Line(number, "strong", points((1, 2), (2, 3))) for number in numbers],
            tmp_path / "p.html")
        assert block.html.count("<span class=\"k") == 1 + keys
    smooth = Chart("t", ("a", "b"), smooth=True)  # too short for a running mean: it is drawn
    block = chart_block(smooth, ["t"], [Line(0, "strong", points((1, 2), (2, 3)))],
                        tmp_path / "p.html")
    assert len(block.chart["lines"]) == 1 and "<small>" not in block.html
    alone_dots = chart_block(smooth._replace(metrics=("a",)), ["t"], [
        Line(0, "dots", points((1, 2, 1, 3)))], tmp_path / "p.html")
    assert alone_dots.html.endswith("<small>bars: 95 % interval</small></figure>")


def test_updates_that_were_left_out_are_drawn_if_there_were_any(tmp_path):
    for skipped, drawn in ((0, 0), (1, 1)):
        run = made({"step": 1, "skipped": 0}, {"step": 2, "skipped": skipped})
        assert len(charts([[run]], tmp_path / "p.html", MACHINE)) == drawn
    idle = made({"step": 1, "lr": 0.0}, {"step": 2, "lr": 0.0})  # of others nothing is news, too
    assert len(charts([[idle]], tmp_path / "p.html", MACHINE)) == 1


def test_trade_offs_are_of_runs_with_the_same_sets(tmp_path):
    rows = [{"step": i, "val_loss/a": 3.0 + i, "val_loss/b": 5.0 - i, "val_loss/c": 1.0}
            for i in range(3)]
    first, second = (made(*rows, name=name) for name in "rs")
    found = trade_offs([[first], [second]], tmp_path / "p.html")
    assert [(block.chart["title"], block.chart["axis"]) for block in found] == [
        (f"Trade-off: loss on a against loss on {other}, nats per token",
         f"loss on {other} (a run begins at the right)") for other in "bc"]
    assert all(block.chart["log"] and block.chart["left"] is None for block in found)
    assert [(line["number"], line["look"], line["label"], line["x"], line["y"])
            for line in found[0].chart["lines"]] == [
        (i, "strong", name, {"step": [5, 4, 3]}, [3, 4, 5]) for i, name in enumerate("rs")]
    assert (tmp_path / "p_trade_off_0.svg").is_file() and (tmp_path / "p_trade_off_1.svg").is_file()
    other = made({"step": 0, "val_loss/a": 3.0, "val_loss/c": 1.0}, name="t")
    assert trade_offs([[first], [other]], tmp_path / "p.html") == []
    assert trade_offs([[made({"step": 0, "val_loss/a": 3.0})]], tmp_path / "p.html") == []


def test_between_known_steps_values_lie_on_a_line():
    read = reader([(0, 1), (10, 20), (20, 60)])
    assert [read(step) for step in (-10, 0, 5, 10, 15, 20, 30)] == [-18, 1, 10.5, 20, 40, 60, 100]
    assert reader([(3, 1), (3, 5)])(4) == 5  # no step between: nothing to divide by
    speeds = made({"step": 1, "tokens": 30, "tokens_per_second": 2.0},
                  {"step": 2, "tokens": 60, "tokens_per_second": 9.0,
                   "learned_tokens_per_second": 3.0}, {"step": 3, "tokens_per_second": 2.0},
                  {"step": 4, "tokens": 90, "tokens_per_second": 0})
    assert hours_by_step(speeds) == [(0, 0), (1, 15 / 3600), (2, 25 / 3600)]
    axes = points((0, 0), (2, 0))
    assert along(speeds, axes) == {"tokens": pytest.approx([0, 60]),
                                   "hours": pytest.approx([0, 25 / 3600])}
    assert along(made({"step": 1, "tokens": 5}), axes) == {}  # of one alone is no line
    assert along(made({"step": 1, "tokens": 0}, {"step": 2, "tokens": 0}), axes) == {}
    assert along(made({"step": 1, "tokens": 0}, {"step": 2, "tokens": 1}), axes) == {
        "tokens": [-1, 1]}


def test_what_is_kept_of_a_long_curve():
    """The first and the last point, and of each stretch between them the lowest and the highest."""
    line = points(*((i, i % 7) for i in range(MOST + 1)))
    kept = [point.step for point in thinned(line)]
    stretches = [range(first, min(first + 3, MOST)) for first in range(1, MOST, 3)]
    ends = [sorted({pick(part, key=lambda i: i % 7) for pick in (min, max)}) for part in stretches]
    assert kept == [0, *(i for pair in ends for i in pair), MOST]
    made_mean = smoothed(points(*((i, 1.0 if i < 50 else 2.0) for i in range(100))))
    assert [point.mean for point in made_mean[47:53]] == pytest.approx(
        [1, 1 + 1 / 9, 1 + 1 / 3, 2 - 1 / 3, 2 - 1 / 9, 2])
    assert made_mean[49] == Point(49, *[made_mean[49].mean] * 3)


def test_a_run_in_a_sentence_and_its_figures():
    run = made(*ROWS)
    said = ("out/r: a LLaMA of 5 parameters, begun at step 2 of 10, after 30 tokens and 0:00:09 of "
            "training on 1 x CPU: validation loss 2.5 nats per token, – bits per byte.")
    assert outcome(run) == said and seconds_of(run) == pytest.approx(9)
    assert figures(run) == {"validation loss, nats per token": "2.5000", "step": "2 of 10",
                            "tokens": "30", "time of training": "0:00:09",
                            "tokens per second": "5"}
    for step, more in ((0, " Nothing is saved yet."), (1, " Its newest checkpoint is of step 1."),
                       (2, ""), (None, "")):
        assert outcome(made(*ROWS, status={"step": step})) == said + more
    last = {"step": 3, "val_loss": 0.7, "val_bpb": 0.25, "val_rewards/accuracies": 0.875,
            "val_rewards/margins": 1.25, "mfu": 0.5, "tokens": 0}
    pairs = made(*ROWS, last, config={"documents": "preference"})
    assert outcome(pairs) == (
        "out/r: a LLaMA of 5 parameters, begun at step 3 of 10, after 0 learned tokens and 0:00:09 "
        "of training on 1 x CPU: validation loss 0.7 nats per pair, chosen preferred in 87.5%.")
    assert figures(pairs) == {
        "validation loss, nats per pair": "0.7000", "validation, bits per byte": "0.2500",
        "chosen preferred, validation": "87.5%", "reward margin, validation": "1.250",
        "step": "3 of 10", "time of training": "0:00:09", "tokens per second": "5", "MFU": "50.0%"}
    nothing = made({"step": 0, "loss": 1.0}, config={"documents": "preference"})
    assert outcome(nothing).endswith("validation loss – nats per pair, chosen preferred in 0.0%.")
    assert figures(nothing) == {"step": "0 of 10"}
    assert "learned tokens" in figures(made(*ROWS, config={"documents": "chat"}))
    broken = made(*ROWS, {"step": 3, "loss": None}, {"step": 3, "val_loss": 1.0})
    assert outcome(broken).endswith(" Its newest loss is not finite; what is said here is older.")


def test_what_a_curve_tells_begins_at_half_a_percent():
    def said(*losses: float) -> str:
        return trend(made(*({"step": 10 * i, "val_loss": loss} for i, loss in enumerate(losses))))

    assert said(3, 2) == "" and said(3, 2, 1) == (
        "The validation loss still fell at the end: by 0.4000 over the last 20% of the steps.")
    assert said(3, 2, 1, 1.0051) == ("The validation loss was lowest at step 20, 1.0000, and has "
                                     "risen by 0.0051 since.")
    flat = "The validation loss hardly changed over the last 20% of the steps."
    assert said(3, 2, 1, 1.0049) == flat
    assert said(9, 1.0122, 1) == flat and "fell" in said(9, 1.0128, 1)  # two fifths of the last


def test_the_training_loss_beside_validation():
    def rows(count: int) -> list[dict]:
        return [{"step": i, "loss": float(i)} for i in range(count)] + [{"step": 99, "val_loss": 9}]

    assert gap(made(*rows(19))) == "" and gap(made(*rows(20)[:-1])) == ""
    assert gap(made(*rows(20))) == ("Over the last 5 logged steps the training loss lies 8.0000 "
                                    "above that.")
    assert gap(made(*rows(120))) == ("Over the last 6 logged steps the training loss lies 107.5000 "
                                     "above that.")
    low = [row | {"loss": 8.5} if "loss" in row else row for row in rows(40)]
    assert gap(made(*low)) == ("Over the last 5 logged steps the training loss lies 0.5000 below "
                               "that.")
    assert gap(made(*low, config={"documents": "preference"})) == ""
    text = verdict(made(*low))[-1].markdown
    assert text.endswith("below that.") and len(verdict(made(*low[:3]))) == 2


def test_counting_is_beside_the_newest_scores_that_have_it():
    def said(*bits: tuple) -> str:
        return beside_counting(made(evals=[
            {"step": i, "val_bpb": one, "baselines": {"5-gram_bpb": counted}}
            for i, (one, counted) in enumerate(bits)]))

    assert said() == said((None, 2)) == said((1, None)) == ""
    assert said((1, 2), (None, 3)) == (
        "At step 0 it needs 50.0% fewer bits than a 5-gram model that counted the same text.")
    assert said((1, 2), (3, 2)) == (
        "At step 1 it needs 50.0% more bits than a 5-gram model that counted the same text.")


def test_seeds_are_a_mean_with_students_interval():
    from scipy import stats

    assert compare.spread([1.23456]) == "1.2346"
    for n in range(2, 11):
        values = [float(i * i) for i in range(n)]
        half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
        mean, _, told = compare.spread(values).partition(" ± ")
        assert mean == f"{np.mean(values):.4f}" and float(told) == pytest.approx(half, rel=5e-4)
    more = [float(i) for i in range(20)]  # the interval of ten is a little too wide
    assert compare.spread(more).endswith(f" ± {2.262 * np.std(more, ddof=1) / 20**0.5:.4f}")


@pytest.mark.parametrize(("sigmas", "says"), [
    (13.9, "+13.9 sigma, within the 15.6 sigma around"), (15.7, "OUTSIDE the 15.6"),
    (-15.7, "-15.7 sigma, OUTSIDE the 15.6")])
def test_the_bound_is_that_of_one_more_draw(tmp_path, sigmas, says):
    """Of two seeds, with losses 1 and 3: Student's t 12.706, times the root of 1 + 1/2."""
    evaluations = [[[100, 1.0], [200, 5.0], [300, 5.0]], [[100, 3.0], [200, 5.0]]]
    config = vars(settings.Settings())
    write(tmp_path / "ref.json", {"format": 1, "recipe": compare.recipe(config), "data": {},
                                  "runs": [{"evaluations": one} for one in evaluations]})
    off = sigmas * 2**0.5
    rows = [{"step": 1, "tokens": 200, "val_loss": 6.0}, {"step": 2, "tokens": 300, "val_loss": 1},
            {"step": 2, "tokens": 100, "val_loss": 2 + off}, {"step": 3, "val_loss": 9.0}]
    lines = compare.compare(made(*rows, config=config), tmp_path / "ref.json").splitlines()
    assert lines[0] == f"{200:>15} tokens: 6.0000 nats, reference 5.0000"  # seeds do not differ
    assert lines[1] == (f"{100:>15} tokens: {2 + off:.4f} nats, reference 2.0000 ± 1.4142, "
                        f"{sigmas:+.1f} sigma")
    assert len(lines) == 3 and f"off by {off:+.4f} nats, " in lines[2] and says in lines[2]
    assert lines[2].endswith("the mean of 2 seeds in which 95 % of such runs lie")
    kept = json.loads((tmp_path / "ref.json").read_text())
    kept["runs"] = [{"evaluations": [[7, 1.0]]}]
    write(tmp_path / "ref.json", kept)
    run = made({"step": 1, "tokens": 7, "val_loss": 1.5}, config=config)
    assert compare.compare(run, tmp_path / "ref.json").splitlines() == [
        f"{7:>15} tokens: 1.5000 nats, reference 1.0000",
        f"out/r and {tmp_path}/ref.json: at the last of these off by +0.5000 nats"]


def test_what_is_a_number_in_a_cell_lies_to_the_right():
    for text in ("1", "-0.5", "+3", "–", "1,024", "0:01:40", "5 of 1,000", "1.5k", "50.0%",
                 "0.5 ± 0.1", "0.3 (0.2 to 0.4)"):
        assert cell(text) == f"<td class=n>{text}</td>", text
    for text in ("a", "1 a", "v1", "5 of x"):
        assert cell(text) == f"<td>{text}</td>"
    assert cell("<b>") == "<td>&lt;b&gt;</td>"
    assert [short(value) for value in (999.94, 999.96, 999_949, 999_951, 1e15)] == [
        "999.9", "1k", "999.9k", "1M", "1000T"]
    assert flatten({"a": {"b": {"c": True}, "d": "x"}, "e": None}) == {
        "a b c": "true", "a d": "x", "e": "null"}
    assert heading("a_b #", 3) == Block("<h3>a_b #</h3>", r"### a_b \#")
    assert as_markdown("_a_ |b|\n <c> a_b") == r"\_a\_ \|b\| \<c\> a_b"
    block = side_by_side(["one", "two"], [{"a": 1}, {"b": {"c": "x"}}])
    assert block.markdown == "\n".join(["|  | one | two |", "| --- | --- | --- |", "| a | 1 | – |",
                                        "| b c | – | x |"])
    texts = [paragraph("p")]
    assert [one.html for one in fold("<s>", texts)] == [
        "<details><summary>&lt;s&gt;</summary>", "<p>p</p>", "</details>"]
    assert fold("s", texts, True)[0] == Block("<details open><summary>s</summary>", "**s**")


def test_scores_of_two_steps_and_two_runs_are_in_two_tables():
    def table(blocks: list[Block]) -> list[str]:
        return "\n".join(block.markdown for block in blocks if block.markdown).splitlines()

    evals = [{"step": step, "tasks": {"t": {"acc": 0.25 * step, "acc_stderr": 0.1, "chance": 0.5,
                                            "irt": float("nan"), "mine": 0.5, "mine_stderr": None}}}
             for step in (1, 2)]
    head = ["|  | score | value ± 95 % interval | chance |", "| --- | --- | --- | --- |"]
    assert table(scores([made(evals=evals)])) == [
        *head, "| step 2 | t acc | 0.5000 ± 0.1960 | 0.5 |", "| step 2 | t mine | 0.5000 | – |",
        "**Scores of earlier steps**", *head, "| step 1 | t acc | 0.2500 ± 0.1960 | 0.5 |",
        "| step 1 | t mine | 0.5000 | – |"]
    runs = [made(evals=[{"step": 1, "val_bpb": bits}], name=name) for name, bits in
            (("r", 1.0), ("s", 2.0))]
    assert table(scores(runs)) == [
        "|  | score | value ± 95 % interval |", "| --- | --- | --- |",
        "| r, step 1 | validation bits per byte | 1.0000 |",
        "| s, step 1 | validation bits per byte | 2.0000 |"]
    assert table(scores([made()])) == ["No scores yet: eval.py --ckpt RUN --tasks= writes them."]
    in_folds = {"step": 3, "tasks": {"p": {"auroc": 0.75, "margins": {"auroc": 0.0}, "other": 1.0,
                                           "folds": {"auroc": [0.5, 1.0]}}, "q": {"acc": 1.0}}}
    assert table(folds([made(evals=[in_folds])])) == [
        "|  | score | mean ± 95 % t-interval | by fold | chance |",
        "| --- | --- | --- | --- | --- |",
        "| out/r, step 3 | p auroc | 0.7500 ± 0.0000 | 0.5000 1.0000 | – |"]
    assert folds([made(evals=evals)]) == []


def test_growth_is_drawn_of_what_was_scored_more_than_once(tmp_path):
    def run(*steps: int, name: str, **metrics) -> RunFolder:
        return made(name=name, evals=[
            {"step": step, "by_position": {"0-9": 1.0}, "tasks": {
                "t": {"acc": 0.1 * step, "acc_stderr": 0.1, "second": 1.0, **metrics}}}
            for step in steps])

    one, two = run(1, 2, name="r", chance=0.25), run(1, 3, name="s", chance=0.25)
    [block] = growth([one, two], tmp_path / "p.html")
    assert block.chart["title"] == "t acc" and (tmp_path / "p_score_0.svg").is_file()
    assert [(line["number"], line["look"], line["label"], line["x"], line["y"])
            for line in block.chart["lines"]] == [
        (0, "dots", "r", {"step": [1, 2]}, [0.1, 0.2]),
        (1, "dots", "s", {"step": [1, 3]}, [0.1, 0.3]),
        (2, "chance", "chance", {"step": [1, 3]}, [0.25, 0.25])]  # as long as the longest
    assert block.chart["lines"][0]["low"] == pytest.approx([-0.096, 0.004])
    assert block.chart["lines"][0]["high"] == pytest.approx([0.296, 0.396])
    [block] = growth([run(1, 2, name="r")], tmp_path / "p.html")
    assert [line["label"] for line in block.chart["lines"]] == ["t acc"]
    assert growth([run(1, name="r")], tmp_path / "p.html") == []


def test_samples_and_answers_block_by_block(tmp_path):
    def steps_shown(count: int) -> list[str]:
        rows = [{"step": i, "prompt": "p", "completion": "c"} for i in range(count)]
        blocks = samples([made(samples=[*rows, {"prompt": "without a step"}])], tmp_path)
        return [block.markdown for block in blocks if block.markdown.startswith("**")]

    assert steps_shown(8) == [f"**step {i}**" for i in range(8)][::-1]
    assert steps_shown(9) == [f"**step {i}**" for i in (8, 7, 6, 5, 3, 2, 1, 0)]
    two = samples([made(name=name, samples=[{"step": 1, "prompt": "", "completion": "<c>"}])
                   for name in "rs"], tmp_path)
    assert [block.html for block in two[:3]] == [
        "<h3>r</h3>", "<details open><summary>step 1</summary>", "<pre>&lt;c&gt;</pre>"]
    assert two[2].markdown == "<pre>&lt;c&gt;</pre>" and len(two) == 8
    [block] = samples([made(samples=[])], tmp_path)
    assert block.markdown.startswith("No samples yet")
    dialog = sample_block({"prompt": "<s>Be <brief>.\n<|system|>S<|end|>", "completion":
                           "<|assistant|> A \n<|end|>"})
    assert dialog.html == (
        '<div class="dialog"><pre>Be &lt;brief&gt;.</pre>'
        '<div class="turn system"><span>system</span><pre>S</pre></div>'
        '<div class="turn assistant"><span>assistant</span><pre>A</pre></div></div>')
    example = {"row": 3, "score": 0.5, "prompt": "p", "answer": "a", "reference": "r"}
    evals = [{"step": step, "tasks": {"g": {"examples": [example | {"row": step}],
                                            "signatures": {"bleu": "x"}}, "h": {"acc": 1}}}
             for step in (1, 2)]
    assert [block.markdown for block in answers([made(evals=evals)], tmp_path)] == [
        "### out/r, step 2, g", "| row | score | prompt | answer | reference |\n"
        "| --- | --- | --- | --- | --- |\n| 2 | 0.5 | p | a | r |", "bleu: x"]
    half = {"data": {"train_learned": 1000, "train_tokens": 2000}}
    [block] = masks([made(**half)], tmp_path)
    assert block.markdown == "50.0% of the 2k training tokens are learned."
    marked = masks([made(**half, name=name, info={"example": [["a", False], ["b", True]]})
                    for name in "rs"], tmp_path)
    assert marked[0].markdown == (
        "r: 50.0% of the 2k training tokens are learned, the others are read alone. Marked below: "
        "what is learned of the first document of validation.")
    assert marked[1] == Block('<pre class="mask">a<mark>b</mark></pre>', "<pre>a[[b]]</pre>")
    assert masks([made(data={"train_learned": 5, "train_tokens": 0})], tmp_path) == []
    assert masks([made(data={"train_learned": 5})], tmp_path) == []


def test_a_run_is_silent_after_ten_minutes_or_five_of_its_longest_pauses(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(runs_room.time, "time", lambda: 10_000.0)
    for pauses, most in (((), 600), ((10, 20), 600), ((120,), 600), ((10, 200, 20), 1000)):
        times = [0, *np.cumsum(pauses).tolist()]
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": i, "time": at}) + "\n" for i, at in enumerate(times)))
        for age, gone in ((most, False), (most + 1, True)):
            os.utime(run / "metrics.jsonl", (10_000 - age, 10_000 - age))
            assert silent(run) == gone, (pauses, age)


def test_numbers_are_finite_and_the_newest_counts():
    for value, number in ((1, True), (0.5, True), (True, False), (math.nan, False), ("1", False),
                          (math.inf, False), (None, False)):
        assert is_number(value) == number
    run = made({"a": 1.0, "b": 2.0}, {"a": None}, {"b": 3})
    assert (run.last("a"), run.last("b"), run.last("c")) == (1.0, 3, None)
    assert [run.ends_broken(name) for name in "abc"] == [True, False, False]


def test_the_command_of_a_run_and_what_differs():
    def said(out_dir: str | None, count: int = 1, **given) -> str:
        return command_line(made(config={"out_dir": out_dir}, info={
            "config_file": "config/c.py", "device": {"count": count},
            "overrides": given})).partition(" by: ")[2]

    assert said("out/c") == said(None) == "train.py config/c.py"
    assert said("out/x", seed=3, mixture={"a": 0.5}, dataset="b c") == (
        "train.py config/c.py --out_dir=out/x --seed=3 '--mixture={\"a\": 0.5}' '--dataset=b c'")
    assert said("out/c", 2) == "train.py config/c.py on 2 ranks of torchrun"
    runs = [made(config={"a": 1, "b": 1, "out_dir": "x", "resume": "r"}),
            made(config={"a": 1, "b": 2, "c": 3, "out_dir": "y", "resume": "s"})]
    assert between(runs) == [{"b": 1, "c": None}, {"b": 2, "c": 3}]


def test_the_unit_of_the_loss_is_that_of_the_runs(tmp_path):
    for kinds, unit in ((("text",), "token"), (("preference",), "pair"),
                        (("text", "preference"), "token or pair")):
        runs = [made(*ROWS, config={"documents": kind}) for kind in kinds]
        found = [block.chart["title"] for block in curves(runs, tmp_path / "p.html") if block.chart]
        assert found[0] == f"Loss, nats per {unit}"
    blocks = curves([made({"step": 1, "lr": 1.0})], tmp_path / "p.html")
    assert len(blocks) == 1  # no grid around nothing


# ---- the card of a model

def given(**changes) -> SimpleNamespace:
    """Flags of export.py."""
    return SimpleNamespace(**{"to": "out/Hub", "push": "", "license": "", "dtype": "fp32",
                              "code": False, "adapter": False} | changes)


def test_a_card_is_of_a_text_model_a_talking_one_or_an_adapter(tmp_path):
    def text(merged: str = "", **changes) -> str:
        return card.card(tmp_path / "none", tmp_path, given(**changes), {"layers": 2, "none": None},
                         (1234567, 89000), merged)

    plain = text()
    for part in ("---\nlibrary_name: transformers\n", "# Hub\n\nA LLaMA of 1,234,567 parameters "
                 "(89,000 without embeddings), trained from text by", "Licence: not stated.",
                 "\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
                 "AutoModelForCausalLM.from_pretrained(\"Hub\")", 'asked = tokenizer("The"',
                 "skip_special_tokens=True", "vllm serve Hub\n", "llama-completion -m Hub.gguf",
                 "--to=Hub.gguf", 'curl http://localhost:8000/v1/completions', '-p "The" -n 50',
                 "ollama create hub -f Hub.Modelfile", 'ollama run hub "The"',
                 '{"model": "Hub", "prompt": "The", "max_tokens": 50}', "--ckpt=CHECKPOINT --to"):
        assert part in plain, part
    assert plain.endswith("\n## Architecture\n\n| | |\n| --- | --- |\n| layers | 2 |\n")
    assert "Merged" not in plain and "trust_remote_code" not in plain
    assert "license: mit\nlibrary" in text(license="mit") and "Licence: mit." in text(license="mit")
    assert ("\nMerged after training; loss and scores below are from before: a, b.\n\n## Arch"
            in text("a, b"))
    code = text(code=True)
    assert 'from_pretrained("Hub", trust_remote_code=True)' in code and "vllm serve" not in code
    assert "exported without it, it is a plain LLaMA, which they open." in code
    assert "# me/Name\n" in text(push="me/Name") and "Name.gguf" in text(push="me/Name")
    for base, says in (("/home/me/base", "base"), ("", "BASE"), (None, "BASE")):
        write(tmp_path / "adapter_config.json", {"base_model_name_or_path": base})
        adapter = text(adapter=True)
        for part in ("library_name: peft\n", "An adapter beside a LLaMA of", "--merge --to=Hub",
                     "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTok",
                     "AutoPeftModelForCausalLM.from_pretrained",
                     f"vllm serve {says} --enable-lora --lora-modules Hub=Hub\n"):
            assert part in adapter, part
        assert "/home" not in adapter
    (tmp_path / "chat_template.jinja").write_text("x")
    talks = text()
    for part in ("trained from dialogs by", "skip_special_tokens=False", "llama-cli -m Hub.gguf\n",
                 "/v1/chat/completions", 'ollama run hub "Hello!"', "apply_chat_template",
                 '{"model": "Hub", "messages": [{"role": "user", "content": "Hello!"}], "max_'):
        assert part in talks, part


def test_how_a_model_was_trained_as_its_run_says():
    def facts(state: dict | None = None, **info) -> dict:
        return {name: value for name, value in card.training_facts(info, state or {}).items()
                if value is not None}

    assert facts() == {"objective": "the next token", "steps": 0, "tokens trained on": "0",
                       "command": "python train.py ''"}
    found = facts({"step": 7, "rows": 70}, config={
        "block_size": 100, "packing": "concat", "doc_mask": True, "dedup": "none", "min_chars": 0,
        "max_chars": None, "preference_beta": 0.1, "nll_weight": 0.0, "lora_r": 8, "seed": 4,
        "documents": "text", "train_on": "auto", "chat_template": "own", "init_from": "out/a"},
        config_file="c.py", overrides={"seed": 4, "out_dir": "a b"}, instead={"seed": 3},
        git={"commit": "abc", "dirty": True}, device={"count": 2, "name": "H100"},
        data={"name": "code", "sources": [{"path": "a"}, {"path": "b"}], "train_tokens": 4000,
              "train_learned": 1000, "manifest_sha256": "f",
              "tokenizer": {"spec": "bytes", "vocab_size": 1258, "sha256": "e"}})
    assert found == {
        "data set": "code", "sources": "a, b", "documents": "text",
        "data recipe": "packing=concat, doc_mask=True, block_size=100",
        "training split": "4,000 tokens", "started from": "out/a",
        "tokenizer": "bytes, 1,258 entries, sha256 e", "data's sha256": "f",
        "objective": "the next token, lora_r 8", "steps": 7, "tokens trained on": "7,000",
        "device": "2 x H100", "commit": "abc (edited)", "changed of c.py": "seed 4 (there: 3)",
        "command": "python train.py c.py --seed=4 '--out_dir=a b'"}
    talks = facts({"tokens": 9}, config={
        "documents": "preference", "objective": "dpo", "preference_beta": 0.5, "nll_weight": 1.0,
        "train_on": "last", "chat_template": "model", "mixture": {"a": 3, "b": 1}},
        git={"commit": "abc"}, data={"name": "a", "sources": [{"path": "x"}], "train_tokens": 8,
                                     "train_learned": 2, "tokenizer": "old"})
    assert talks == {
        "data set": "a (75.0%), b (25.0%)", "validated on": "a", "documents": "preference",
        "learned": "last, 25.0% of the tokens", "tokenizer": "old",
        "chat template": "the first model's own, chat_template.jinja",
        "objective": "dpo, preference_beta 0.5, nll_weight 1.0", "steps": 0, "learned tokens": "9",
        "commit": "abc", "command": "python train.py ''"}
    assert facts(config={"documents": "chat", "train_on": "all"})["learned"] == "all"
    assert card.tokenizer_of({"tokenizer": {"spec": "s"}}) == "s, sha256 None"
    assert card.tokenizer_of({}) is None


def test_a_card_has_the_curve_up_to_its_step(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for step in (50, 100):
        write(run / f"eval/step_{step}.json", {"step": step, "val_bpb": step / 4, "tasks": {}})
    (tmp_path / "hub").mkdir()
    text = card.curve_and_scores(run, 50, tmp_path / "hub")
    assert text.startswith("\n![Loss, nats per token](curve_loss.svg)\n\n## Scores\n\n|")
    assert "12.5000" in text and "25.0000" not in text
    picture = (tmp_path / "hub/curve_loss.svg").read_text()
    assert ">50</text>" in picture and ">60</text>" not in picture
    assert "## Scores" not in card.curve_and_scores(run, 60, tmp_path / "hub")
    (run / "metrics.jsonl").write_text("")
    assert card.curve_and_scores(run, 70, tmp_path / "hub") == ""
    assert capsys.readouterr().out == (f"no curve in the model card: {run}/metrics.jsonl holds no "
                                       "rows yet; come back after a few steps\n")


# ---- the command's own lines

def test_what_report_says_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(make_run(Path(f"out/{name}"), n_layer=3 + i)) for i, name in enumerate("abc")]
    assert run_main(runs[:1]) == 0
    assert capsys.readouterr().out == ("1 run(s) -> out/a/report.html and out/a/report.md\n")
    assert run_main([*runs, "--out=x.html"]) == 0
    assert capsys.readouterr().out == "3 run(s) -> x.html and x.md\n"
    (tmp_path / "out/b").rename(tmp_path / f"out/{'b' * 120}")
    runs[1] = f"out/{'b' * 120}"
    assert run_main(runs) == 0
    assert capsys.readouterr().out.startswith(
        f"3 run(s) -> out/a/report_with_{'b' * 100}.html and ")
    for words, says in ((["--compare=x", "--out=y.html"], "exclude each other"),
                        (["--compare=x", "--save_reference=y"], "exclude each other"),
                        (["--watch", "--save_reference=y"], "--watch writes pages; leave out"),
                        (["--every=0", "--watch"], "every is 0, must be at least 1"),
                        (["--out=page.htm"], "--out=page.htm must end in .html; the Markdown")):
        with pytest.raises(settings.UserError, match=says):
            run_main([runs[0], *words])
    assert report.Flags() == report.Flags(ckpt="", out="", watch=False, every=10, compare="",
                                          save_reference="")


def test_what_is_said_while_a_run_is_watched(tmp_path, monkeypatch, capsys):
    """Of two runs one is killed and one ends; one has no rows at first."""
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path(f"out/{name}"), n_layer=3 + i) for i, name in enumerate("ab")]
    for run in runs:
        write(run / "status.json", {"state": "running", "step": 100})
    os.utime(runs[0] / "metrics.jsonl", (1e9, 1e9))
    rows, slept = (runs[1] / "metrics.jsonl").read_text(), []
    (runs[1] / "metrics.jsonl").write_text("")

    def sleep(seconds: int) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            (runs[1] / "metrics.jsonl").write_text(rows)
        if len(slept) == 4:
            write(runs[1] / "status.json", {"state": "done", "step": 100})

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert run_main([*map(str, runs), "--watch", "--every=7"]) == 0
    out = "out/a/report_with_b.html"
    assert slept == [7] * 4 and capsys.readouterr().out == (
        "waiting for the first rows of metrics.jsonl\n" * 2
        + f"{out}, anew every 7 s; Ctrl-C ends this and not the run\n"
        "out/a has not written for long; it may have been killed\n"
        f"2 run(s) -> {out}: the last page, nothing goes on\n")


def test_models_are_ranked_beside_those_that_count():
    """By the newest evaluation that has them, of each run."""
    evals = [{"step": step, "val_bpb": 1.0 * step, "baselines": {
        "unigram_bpb": 4.0, "5-gram_bpb": 2.5, "tokens": 9}} for step in (2, 3)] + [{"step": 4}]
    [block] = baselines([made(evals=evals)])
    assert block.markdown.splitlines() == [
        "| step 3 | bits per byte | below unigram |", "| --- | --- | --- |",
        "| 5-gram | 2.5000 | 37.5% |", "| out/r | 3.0000 | 25.0% |", "| unigram | 4.0000 | 0.0% |"]
    assert baselines([made(evals=evals[2:])]) == []


def test_a_reference_of_a_newer_format_is_refused(tmp_path):
    run = made({"step": 1, "tokens": 7, "val_loss": 1.5}, config=vars(settings.Settings()))
    kept = {"recipe": compare.recipe({}), "data": {}, "runs": [{"evaluations": [[7, 1.0]]}]}
    write(tmp_path / "r.json", kept | {"format": 1})
    assert len(compare.read(tmp_path / "r.json", run)) == 1
    write(tmp_path / "r.json", kept | {"format": 2})
    with pytest.raises(settings.UserError, match="a format newer than this program's 1; update it"):
        compare.read(tmp_path / "r.json", run)


def test_what_a_page_holds_for_its_script(tmp_path):
    assert as_data({"a": "</script>\ud800é"}) == '{"a": "\\u003c/script>\\ud800é"}'
    run = made(*ROWS)
    twin = write_page([run], tmp_path / "new/p.html")
    text = (tmp_path / "new/p.html").read_text()
    assert twin == tmp_path / "new/p.md" and runs_of(tmp_path / "new/p.html") == ["out/r"]
    assert "<noscript>" not in text and '{"every": 0, "charts": [{' in text
    write_page([run], tmp_path / "new/p.html", 5)
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in (
        tmp_path / "new/p.html").read_text()
    assert runs_of(tmp_path / "none.html") == [] == runs_of(tmp_path / "new/p.md")
    with pytest.raises(settings.UserError, match=r"p\.html is the page of out/r; name another"):
        write_page([made(*ROWS, name="out/s")], tmp_path / "new/p.html")
    (tmp_path / "q.md").write_text("mine")
    with pytest.raises(settings.UserError, match=r"q\.html or .*q\.md is there already; name anot"):
        write_page([run], tmp_path / "q.html")


def test_the_environment_of_a_run():
    run = made(info={"started": 86400 * 365 + 60, "git": {"commit": "a"}}, config={
        "mixture": {"a": 0.5}})
    [block] = environment([run], Path())
    assert [line.split(" | ") for line in block.markdown.splitlines()[2:]] == [
        ["| started", "1971-01-01 00:01 UTC |"], ["| device count", "1 |"],
        ["| device name", "CPU |"], ["| git commit", "a |"], ["| mixture a", "0.5 |"]]
    [block] = environment([made(info={"started": None})], Path())
    assert "| started | null |" in block.markdown and "mixture" not in block.markdown


def test_of_a_page_of_several_runs_the_head_compares(tmp_path):
    runs = [made(*ROWS, name=name, config={"seed": i}) for i, name in enumerate("rs")]
    blocks = head(runs)
    assert [block.markdown for block in blocks[::2]][:2] == [
        "## What differs between these runs", "## What came of them"]
    assert blocks[1].markdown.splitlines() == ["|  | r | s |", "| --- | --- | --- |",
                                               "| seed | 0 | 1 |"]
    assert blocks[4].markdown == "**In sentences**" and len(blocks) == 8
    assert head([made(*ROWS), made(*ROWS)])[1].markdown == "Nothing of their configs."
    assert head(runs[:1]) == verdict(runs[0])
    blocks = folded("A <b>", [paragraph("x")])
    assert [block.html for block in blocks] == [
        '<details class="panel"><summary><h2>A &lt;b&gt;</h2></summary>', "<p>x</p>", "</details>"]
    config = vars(settings.Settings()) | {"n_layer": 3, "out_dir": "x"}
    run = made(config=config, info={"config_file": "c.py", "instead": {"seed": 4}})
    found = [block.markdown for block in differences([run], tmp_path)]
    assert found == [
        "out/r was last started by: train.py c.py --out_dir=x",
        "|  | c.py | this run |\n| --- | --- | --- |\n| seed | 4 | 1337 |",
        "**1 other keys differ from the parent, the defaults**",
        "|  | parent | out/r |\n| --- | --- | --- |\n| n_layer | 16 | 3 |", ""]
