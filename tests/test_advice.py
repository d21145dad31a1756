"""What prepare.py says of a text that is small for its config, or that another run suits better."""

import re
import shlex
from pathlib import Path

import pytest
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
    assert "--val_fraction" in note and lines[-1].startswith("next: python train.py c.py")


def test_enough_text_is_not_remarked_on(tmp_path, monkeypatch, capsys):
    lines = prepared(tmp_path, monkeypatch, capsys, "word " * 2000, "--val_fraction=0.2")
    assert not [line for line in lines if "note:" in line or "suggested" in line]
    said, = [line for line in lines if line.startswith("this run: ")]
    tokens = int(re.search(r"train +\d+ +([\d,]+)", "\n".join(lines))[1].replace(",", ""))
    times = 16000 / (tokens - 1 - (tokens - 1) % 32)
    assert said.startswith("this run: c.py, 16 layers of 768, context 32, 50 steps of 320 tokens, "
                           f"{times:.1f} times the text: about ")
    minutes, speed = re.search(r"about ([\d.]+) minutes here \(cpu, ([\d,]+) tok", said).groups()
    assert float(minutes) == pytest.approx(16000 / float(speed.replace(",", "")) / 60, rel=0.1)
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
    assert "quickstart.py, 2 layers of 192, context 256" in said and "(cpu, " in said
    assert any("1.43 bits per byte" in line for line in lines)
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
    ({"d_model": 2048}, ("sources",), True), ({"d_model": 2049}, ("sources",), False)])
def test_who_hears_what_to_expect(keys, given, told, monkeypatch):
    monkeypatch.setattr(advice, "tokens_per_second", lambda run, size: (1000.0, "cpu"))
    lines = advice.outlook(Settings(**keys), "config/quickstart.py", dict.fromkeys(given, "1"), "",
                           {}, splits(3_000_000), 300)
    assert len(lines) == 2 * told
    if told:
        assert "about 335 hours here (cpu, 1,000 tokens/s" in lines[0]
        assert lines[1].startswith("for comparison, validation: the demo ends at")


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
