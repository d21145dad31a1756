"""What prepare.py says of a text that is small for its config, or that another run suits better."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import prepare
from plainllama.command import parse
from plainllama.settings import Settings, check_keys
from plainllama.tokens import advice

SMALL = """
dataset = 'x'
tokenizer = 'bytes'
block_size = 32
global_batch_tokens = 320
max_steps = 50
"""


def splits(train: int, val: int = 0) -> dict:
    return {name: {"documents": 3, "tokens": n} for name, n in (("train", train), ("val", val))}


def prepared(tmp_path, monkeypatch, capsys, text: str, *words: str) -> list[str]:
    """The lines of prepare.py on a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(text)
    (tmp_path / "c.py").write_text(SMALL)
    assert prepare.main(parse(["c.py", "--sources=t.txt", "--val_fraction=0.1", *words], "",
                              prepare.Flags)) == 0
    return capsys.readouterr().out.splitlines()


def test_a_text_too_small_for_its_config_is_said(tmp_path, monkeypatch, capsys):
    """With what there is of each split, counted here from the text, and the remedy."""
    lines = prepared(tmp_path, monkeypatch, capsys, "word " * 60)
    note, = [line for line in lines if line.startswith("note: little text: ")]
    trained, held = (int(found) for found in re.findall(r" ([\d,]+) tokens", note))
    assert trained + held == 300 + 2 + 2  # bytes, and both ends of two documents
    assert f"train 1 documents, {trained} tokens, {(trained - 1) // 32} windows of" in note
    assert "a step takes 10 rows" in note and "fewer than 20 windows" in note
    assert "--val_fraction" in note and held == 32 and lines[-1] == (  # what train.py would refuse
        "no run yet: its val split is shorter than a row of block_size 32 + 1 tokens; give more "
        "text, a larger --val_fraction or a smaller --block_size")
    lines = prepared(tmp_path, monkeypatch, capsys, "word " * 62, "--dataset=y")
    held = int(re.search(r"val 1 documents, (\d+) tokens", "".join(lines))[1])
    assert 33 <= held < 40 and lines[-1].startswith("next: ")


def test_enough_text_is_not_remarked_on(tmp_path, monkeypatch, capsys):
    lines = prepared(tmp_path, monkeypatch, capsys, "word " * 2000, "--val_fraction=0.2")
    assert not [line for line in lines if "note:" in line or "suggested" in line]
    said, = [line for line in lines if line.startswith("this run: ")]
    tokens = int(re.search(r"train +\d+ +([\d,]+)", "\n".join(lines))[1].replace(",", ""))
    times = 16000 / (tokens - 1 - (tokens - 1) % 32)
    assert said.startswith("this run: c.py, 16 layers of 768, context 32, 50 steps of 320 tokens, "
                           f"{times:.1f} times the text: about ")
    assert re.search(r"about [\d.]+ minutes here \(one \w+, [\d,]+ tokens/s, eager, meas", said)
    assert lines[-2] == said and lines[-1].startswith("next: ")  # no run of ours was such a one
    config = Settings(block_size=32, global_batch_tokens=320)
    assert advice.small(config, splits(10 * 32 + 1, 20 * 32 + 1)) == ""
    assert "10 rows" in advice.small(config, splits(10 * 32, 20 * 32 + 1))
    val = advice.small(config, splits(10 * 32 + 1, 20 * 32))
    assert "fewer than 20" in val and "a step takes" not in val


def test_the_suggestion_is_a_line_that_can_be_copied(tmp_path, monkeypatch, capsys):
    """Of a text that would be read too often: measured, and the line gives what it says."""
    monkeypatch.setattr(advice, "SECONDS", 0.05)
    lines = prepared(tmp_path, monkeypatch, capsys, "some words of a text " * 3000,
                     "--max_steps=90000", "--dataset=mine")
    assert not [line for line in lines if "suggested" in line]  # max_steps is given, and stays
    (tmp_path / "c.py").write_text(SMALL.replace("50", "90000"))
    assert prepare.main(parse(["c.py", "--sources=t.txt", "--val_fraction=0.1", "--dataset=mine"],
                              "", prepare.Flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    said = next(line for line in lines if line.startswith("suggested: "))
    assert "quickstart.py, 2 layers of 192, context 256" in said and "(one cpu, " in said
    assert not any("1.43 bits per byte" in line for line in lines)  # its tokenizer is another
    words = shlex.split(lines[-1].removeprefix("next: python train.py "))
    config = parse(words, "").config
    check_keys(config)
    assert (config.n_layer, config.d_model, config.block_size) == (2, 192, 256)
    assert (config.dataset, config.out_dir, config.optimizer) == ("mine", "out/mine", "muon")
    tokens = int(re.search(r"train +\d+ +([\d,]+)", "\n".join(lines))[1].replace(",", ""))
    assert config.max_steps == round(4 * tokens / 2048)
    assert f"{config.max_steps:,} steps of 2,048 tokens" in said


def advised(config: Settings, given: dict, n: int, file: str = "mine.py") -> tuple[str, Settings]:
    """The suggested file's name and run for a text of n tokens, ("", ...) if none is."""
    file, keys = advice.suited(config, file, {"sources": "x"} | given, splits(n))
    return Path(file).name, advice.run_of(file, given | keys) if file else config


def test_the_suggestion_is_the_one_of_the_chapter():
    """Of each row of docs/text.md: its config and about its steps."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in (ROOT / "docs/text.md").read_text().splitlines() if ".py" in line
            and re.match(r"\| 1\d* [MG]B", line)]
    assert len(rows) == 4
    for _, tokens, config, _, told, *_ in rows:
        command = parse(shlex.split(f"{ROOT}/config/{config.strip('`')}"), "")
        number = float(tokens.split()[0]) * 1e6
        file, run = advised(Settings(max_steps=10**9), {}, int(number))
        assert file == Path(command.config_file).name
        theirs = command.config.max_steps * command.config.global_batch_tokens / number
        assert float(re.search(r"([\d.]+) epochs", told)[1]) == pytest.approx(theirs, abs=0.1)
        assert 2.5 < theirs < 4.2
        assert run.max_steps * run.global_batch_tokens / number == pytest.approx(4, rel=0.01)
        assert (run.learning_rate, run.d_model) == (
            command.config.learning_rate, command.config.d_model)


def test_much_text_is_read_once():
    for tokens, passes in ((500_000_000, 2), (10_000_000_000, 1)):
        file, run = advised(Settings(max_steps=3), {}, tokens)
        assert file == "llama100m.py"
        assert run.max_steps * run.global_batch_tokens / tokens == pytest.approx(passes, rel=0.01)


@pytest.mark.parametrize(("keys", "given", "told"), [
    ({}, ("sources",), True), ({}, ("dataset",), False), ({}, ("sources", "max_steps"), True),
    ({"epochs": 3.0}, ("sources",), False), ({"mixture": {"a": 1}}, ("sources",), False),
    ({"init_from": "out/a"}, ("sources",), False), ({"max_minutes": 5.0}, ("sources",), False),
    ({"documents": "chat"}, ("sources",), False), ({"overfit_rows": 1}, ("sources",), False),
    ({"d_model": 4096}, ("sources",), True)])
def test_who_hears_what_to_expect(keys, given, told, monkeypatch):
    monkeypatch.setattr(advice, "tokens_per_second", lambda run, size: (1000.0, "cpu"))
    lines = advice.outlook(Settings(**keys), "a.py", dict.fromkeys(given, "1"), "", {},
                           splits(3_000_000), 300)
    assert len(lines) == 2 * told
    assert not told or "about 335 hours here (one cpu, 1,000 tokens/s" in lines[1]
    assert not told or lines[0] == (
        "note: 2,300 steps of 524,288 tokens would read this text 402.0 times; take more text, or "
        "fewer --max_steps")


def test_a_time_that_cannot_be_measured_is_left_out():
    """Of a device that is not here, of a model that is too large to try; all else is said."""
    run = {"max_steps": 9, "global_batch_tokens": 2048, "block_size": 256, "d_model": 128}
    for keys, size in (({"device": "cuda"}, 99), ({"d_model": 4096, "d_ff": 11008}, 99),
                       ({}, 800_000)):
        if keys.get("device") == "cuda" and torch.cuda.is_available():
            continue
        line, = advice.outlook(Settings(**run | keys), "a.py", {"sources": "x"}, "", {},
                               splits(20_001), size)
        assert line == (f"this run: a.py, 16 layers of {(run | keys)['d_model']}, context 256, 9 "
                        "steps of 2,048 tokens, 0.9 times the text")


def test_what_ours_reached_is_said_of_their_shape_alone(monkeypatch):
    monkeypatch.setattr(advice, "tokens_per_second", lambda run, size: (1000.0, "cpu"))
    named = str(ROOT / "config/quickstart.py")
    for keys, told in (({}, True), ({"max_steps": 900}, True), ({"d_model": 96}, False),
                       ({"block_size": 128}, False), ({"tokenizer": "bytes"}, False)):
        lines = advice.outlook(advice.run_of(named, keys), named, {"sources": "x"}, "", {},
                               splits(3_000_000), 300)
        assert [line.startswith("for comparison, validation of our runs: 1.43 bits") for line in
                lines[1:]] == [True] * told


@pytest.mark.parametrize(("keys", "given", "advised"), [
    ({}, ("sources",), True), ({}, ("dataset",), False), ({}, ("sources", "max_steps"), False),
    ({"epochs": 3.0}, ("sources",), False), ({"mixture": {"a": 1}}, ("sources",), False),
    ({"init_from": "out/a"}, ("sources",), False), ({"max_minutes": 5.0}, ("sources",), False),
    ({"documents": "chat"}, ("sources",), False), ({"overfit_rows": 1}, ("sources",), False),
    # 524,288 tokens a step of a text of 3 M: 10.1 and 10.0 passes, 0.52 and 0.35
    ({"max_steps": 58}, ("sources",), True), ({"max_steps": 57}, ("sources",), False),
    ({"max_steps": 3}, ("sources",), False), ({"max_steps": 2}, ("sources",), True)])
def test_who_is_advised(keys, given, advised):
    config, given = Settings(**{"max_steps": 10**6} | keys), dict.fromkeys(given, "1")
    assert bool(advice.suited(config, "mine.py", given, splits(3_000_000))[0]) == advised
    assert not advice.suited(config, "mine.py", given, splits(9000))[0]  # too little for any run


def test_what_is_given_stays():
    named, given = str(ROOT / "config/bench_muon.py"), {"d_model": 64, "n_head": 2, "seed": 3}
    file, run = advised(Settings(max_steps=10**6), given, 100_000_000, named)
    assert file == "bench_muon.py" and (run.d_model, run.n_head, run.seed) == (64, 2, 3)
    assert run.max_steps == round(4e8 / run.global_batch_tokens)
    for name in ("quickstart", "bench_muon"):
        named = str(ROOT / f"config/{name}.py")
        file, run = advised(Settings(max_steps=10**6), {"learning_rate": 0.5}, 3_000_000, named)
        assert file == "quickstart.py" and run.learning_rate == 0.5


# ---- what is printed, to the letter

def test_counts_are_printed(capsys):
    manifest = {
        "recipe": {"val_fraction": 0.1},
        "dropped": {"empty": {"count": 2, "first": "a:1"},
                    "a transaction without who": {"count": 1, "first": "a:2"}},
        "cut": {"note: odd": {"count": 3, "first": "a:3"},
                "document over 16 MB": {"count": 1200, "first": "a:4"}},
        "splits": {"train": {"documents": 1500, "tokens": 2_000_000, "bytes": 5_000_000,
                             "longest": 1024},
                   "val": {"documents": 3, "tokens": 0, "bytes": 500_000, "longest": 7}}}
    advice.print_counts(manifest)
    assert capsys.readouterr().out.splitlines() == [
        "         1,506 documents in", "             2 dropped: empty (first: a:1)",
        "             1 dropped: a transaction without who (first: a:2)",
        "             3 note: odd (first: a:3)", "         1,200 cut: document over 16 MB (first: "
        "a:4)", "           documents          tokens        MB  bytes/token    longest",
        "train          1,500       2,000,000       5.0        2.500      1,024",
        "val                3               0       0.5   500000.000          7"]
    manifest["cut"] = {"a client": {"count": 1, "first": "b"}}  # it is no cut, but a client less
    manifest["by_source"], manifest["recipe"]["documents"] = [], "preference"
    manifest["splits"]["train"]["learned"] = 250_000
    advice.print_counts(manifest)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "         1,506 pairs in"
    assert lines[3] == "             1 dropped: a client (first: b)"
    assert lines[4:] == ["               pairs          tokens        MB      learned    longest",
                         "train          1,500       2,000,000       5.0        0.125      1,024",
                         "val                3               0       0.5        0.000          7"]
    manifest["recipe"]["documents"] = "table"
    advice.print_counts(manifest)
    assert "clients in" in capsys.readouterr().out


@pytest.mark.parametrize(("val", "said"), [(8, False), (12, False), (7.9, True), (12.1, True)])
def test_a_split_of_another_size_than_asked_is_said(val, said, capsys):
    counts = {"documents": 1, "tokens": 1, "longest": 1}
    manifest = {"recipe": {"val_fraction": 0.1}, "dropped": {}, "splits": {
        "train": counts | {"bytes": int(1000 - 10 * val)},
        "val": counts | {"bytes": int(10 * val)}}}
    advice.print_counts(manifest)
    note = (f"note: validation is {val:.3g} % of the text, 10 % was asked (val_fraction): "
            "documents are held out whole")
    assert (note in capsys.readouterr().out.splitlines()) == said
    del manifest["recipe"]["val_fraction"]
    manifest["splits"]["train"]["bytes"] = manifest["splits"]["val"]["bytes"] = 0
    advice.print_counts(manifest)
    assert "note" not in capsys.readouterr().out


def test_windows_share_their_last_token():
    assert [advice.windows_of(tokens, 8) for tokens in (0, 1, 8, 9, 16, 17)] == [0, 0, 0, 1, 1, 2]
    config = Settings(max_steps=3, block_size=8, global_batch_tokens=40)
    assert advice.passes_of(config, splits(17)) == 120 / 16
    assert advice.passes_of(config, splits(8)) == 0


def test_little_text_is_said_to_the_letter():
    config = Settings(block_size=32, global_batch_tokens=32 * 2000)
    made = {"train": {"documents": 1000, "tokens": 64001}, "val": {"documents": 3, "tokens": 0}}
    assert advice.small(config, made) == (
        "note: little text: train 1,000 documents, 64,001 tokens, 2,000 windows of block_size 32; "
        "val 3 documents, 0 tokens, 0 windows of block_size 32; validation of fewer than 20 "
        "windows says little: more text, a larger --val_fraction or a smaller --block_size")
    made["train"]["tokens"] -= 1
    assert "; a step takes 2,000 rows: more text, or a smaller --global_batch_tokens; validation " \
        in advice.small(config, made)
    assert advice.small(Settings(documents="chat"), splits(1)) == ""


@pytest.mark.parametrize(("speed", "file", "hours"), [
    (1000, "quickstart", "3.4 minutes"), (28.5, "laptop", "119.8 minutes"),
    (28.4, "quickstart", "2 hours")])
def test_what_a_run_is_worth_is_said_to_the_letter(speed, file, hours, monkeypatch):
    monkeypatch.setattr(advice, "tokens_per_second", lambda run, vocab: (speed, f"cpu {vocab}"))
    config = Settings(max_steps=4000, global_batch_tokens=1000, block_size=10)
    keys = {"max_steps": 2048, "global_batch_tokens": 100, "d_model": 64, "block_size": 10}
    lines = advice.outlook(config, "mine.py", {"sources": "x", "n_layer": 3}, str(
        ROOT / f"config/{file}.py"), keys, splits(40_001), 99)
    assert lines[:2] == [
        "note: 4,000 steps of 1,000 tokens would read this text 100.0 times",
        f"suggested: {file}.py, 3 layers of 64, context 10, 2,048 steps of 100 tokens, 5.1 times "
        f"the text: about {hours} here (one cpu 99, {speed:,.0f} tokens/s, eager, measured for a "
        "moment)"]
    assert lines[2:] == []  # none of ours had such a shape


def test_the_speed_is_that_of_the_part_that_is_measured(monkeypatch):
    """A clock that a forward pass moves: each turn takes a second, but for the first."""
    from model import LLaMA, ModelConfig, flops_per_token

    made, now = [], [0.0]
    monkeypatch.setattr(advice.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(advice, "SECONDS", 3)
    monkeypatch.setattr(advice, "CONTEXT", 16)
    real = LLaMA.forward

    def forward(self, ids, *words):
        now[0] += 2 if not made else 1
        made.append((self.config.n_layer, self.config.block_size, *ids.shape))
        return real(self, ids, *words)

    monkeypatch.setattr(LLaMA, "forward", forward)
    run = Settings(n_layer=5, n_head=2, n_kv_head=1, d_model=16, d_ff=24, block_size=64,
                   global_batch_tokens=16 * 7, device="cpu")
    speed, device = advice.tokens_per_second(run, 50)
    assert device == "cpu" and made == [(2, 16, 7, 16)] * 4  # one to warm up, three that count
    whole = ModelConfig(5, 2, 16, 24, 50, 64, 1)
    part = ModelConfig(2, 2, 16, 24, 50, 16, 1)
    share = flops_per_token(part, 16) / flops_per_token(whole, 64)
    assert speed == pytest.approx(share * 3 * 7 * 16 / 3)
    made.clear()
    size = 16 * sum(p.numel() for p in LLaMA(part).parameters())
    for budget, rows in ((3 * size, 3), (4 * size - 1, 3), (size / 2, 1)):
        monkeypatch.setattr(advice, "PASS", budget)
        advice.tokens_per_second(run, 50)
        assert made[-1] == (2, 16, rows, 16)
    made.clear()
    monkeypatch.setattr(advice, "SECONDS", 1)  # a slow first turn is the only one, and counts
    speed, _ = advice.tokens_per_second(run, 50)
    assert len(made) == 1 and speed == pytest.approx(share * 16 / 2)


def test_from_how_much_text_on_which_config_is_suggested():
    """docs/text.md has the table."""
    for tokens, name in ((3_000_000, "quickstart"), (5_999_999, "quickstart"),
                         (6_000_000, "laptop"), (99_999_999, "laptop"),
                         (100_000_000, "llama100m")):
        assert advised(Settings(max_steps=10**9), {}, tokens)[0] == f"{name}.py"
    for tokens, passes in ((250_000_000, 4), (250_100_000, 4 * 250 / 250.1), (10**9, 1)):
        _, run = advised(Settings(max_steps=3), {}, tokens)
        assert run.max_steps * run.global_batch_tokens / tokens == pytest.approx(passes, rel=3e-4)
    least = next(n for n in range(1000, 10**6, 64) if advised(Settings(max_steps=10**9), {}, n)[0])
    assert advised(Settings(max_steps=10**9), {}, least)[1].max_steps == 100
    assert (advice.LAYERS, advice.PASS) == (2, 5e9)
