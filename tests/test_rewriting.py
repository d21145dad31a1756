"""Rows that a model rewrites: a template filled, numbers lost and added, copies, and what is said
of all of it at the end."""

import datetime
import json
import random
import re
import shutil
import subprocess
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from conftest import run_script
from test_chat import made
from test_prepare import inside
from test_sample import run, tiny, write_checkpoint
from test_tables import FORMATS, HOSTILE, rendered, source, texts_of, write_clients

from plainllama.files import read_json, read_rows
from plainllama.generation import generate, prompt_files, rewriting
from plainllama.settings import UserError
from plainllama.tokens.chat import Chat
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- templates

def template_of(tmp_path, text):
    (tmp_path / "T.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return rewriting.read_template(str(tmp_path / "T.txt"))


@pytest.mark.parametrize(("text", "row", "filled"), [
    ("Say it anew: {text}", {"text": "a {b} {{c}}\n"}, "Say it anew: a {b} {{c}}\n"),
    ("{n}", {"n": 12.5}, "12.5"),
    ("{n} {m}", {"n": -3, "m": 1e-9}, "-3 1e-09"),
    ("{a}{a}", {"a": "x", "b": "y"}, "xx"),
    ("{a}, {b}", {"a": True, "b": None}, "true, null"),
    ("{a}", {"a": [1, {"é": "ü"}]}, '[1, {"é": "ü"}]'),
    ("{a}", {"a": datetime.date(2024, 1, 5)}, "2024-01-05"),
    ("{a}", {"a": Decimal("12.50")}, "12.50"),
    ("{a}", {"a": [datetime.date(2024, 1, 5)]}, '["2024-01-05"]'),
    ('{{"a": {a}}}', {"a": 1}, '{"a": 1}'),
    ("{{{a}}}", {"a": 1}, "{1}"),
    ("{{a}} {a}", {"a": 1}, "{a} 1"),
    ("{a b (EUR)!r:>9}", {"a b (EUR)!r:>9": "x"}, "x"),
    ("{a.b} {a[0]}", {"a.b": 1, "a[0]": 2, "a": 3}, "1 2"),
    ("x {a}\n", {"a": "y"}, "x y"),
    ("x {a}\r\n\n", {"a": "y"}, "x y\n"),
    ("\ufeff{a}", {"a": "y"}, "y"),
    ("{a}", {"a": "\ud800"}, "\ud800"),
])
def test_a_template_is_filled(tmp_path, text, row, filled):
    template = template_of(tmp_path, text)
    assert rewriting.fill(template, row) == filled


ROW = '{"prompt": "a", "id": 1}\n'


@pytest.mark.parametrize(("text", "rows", "words", "says"), [
    ("", ROW, (), "T.txt names no field"),
    ("Write it anew.", ROW, (), "T.txt names no field"),
    ("{{prompt}}", ROW, (), "T.txt names no field"),
    ("a\n{} {prompt}", ROW, (), r"T.txt:2: '{' is no field; .*{{ for a {"),
    ("a { b {prompt}", ROW, (), "T.txt:1: '{' is no field"),
    ("\n\n{prompt} }", ROW, (), "T.txt:3: '}' is no field"),
    ("{prompt", ROW, (), "T.txt:1: '{' is no field"),
    ("{prompt}}", ROW, (), "T.txt:1: '}' is no field"),
    ("{promt}", ROW, (), r"F.jsonl:1 has no 'promt', .*fields are: prompt, id; did you mean "
     "prompt"),
    ("{prompt} {n}", ROW[:-2] + ', "n": 1}\n' + ROW, (), "F.jsonl:2 has no 'n'"),
    ("{prompt.upper}", ROW, (), "has no 'prompt.upper'"),
    ("{prompt[0]}", ROW, (), r"has no 'prompt\[0\]'"),
    ("{prompt!r}", ROW, (), "has no 'prompt!r'"),
    ("{id:>9}", ROW, (), "has no 'id:>9'"),
    ('{"a":\n{prompt}}', ROW, (), "T.txt:1: '{' is no field"),
    ('{"a":\n1}{prompt}', ROW, (), r"""has no '"a":\\n1'"""),
    (b"\xff{prompt}", ROW, (), "T.txt is not text"),
    ("{prompt}", "", (), "has no rows"),
    ("{prompt}", '{"prompt": "a", "lost": 1}', (), "F.jsonl:1: `lost` would be overwritten"),
    ("{prompt}", '{"prompt": "a", "added": 1}', (), "F.jsonl:1: `added` would be overwritten"),
    ("{prompt}", '{"prompt": "a", "copied": 1}', (), "F.jsonl:1: `copied` would be overwritten"),
    ("{prompt}", ROW, ("--template=none.txt",), "no file none.txt"),
    ("{prompt}", ROW, ("--template=.",), r"no file \."),
    ("{prompt}", ROW, ("--embed=mean", "--out=G.parquet"), "--template is for"),
    ("{prompt}", ROW, ("--prompts=", "--out="), "--template is for"),
    ("{prompt}", ROW, ("--prompts=", "--out=", "--prompt=a"), "--template is for"),
    ("{prompt}", ROW, ("--prompts=.",), "is not a data set"),
    ("{prompt}", ROW, ("--out=G.csv",), "takes a .jsonl or .parquet"),
])
def test_what_is_refused_before_a_model_is_looked_for(tmp_path, monkeypatch, text, rows, words,
                                                      says):
    monkeypatch.chdir(tmp_path)
    Path("T.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    Path("F.jsonl").write_text(rows)
    with pytest.raises(UserError, match=says) as problem:
        run("--ckpt=nowhere", "--prompts=F.jsonl", "--template=T.txt", "--out=G.jsonl", *words)
    assert "\n" not in str(problem.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["F.jsonl", "T.txt"]
    with pytest.raises(UserError, match="--template has no effect on --chat"):
        run("--ckpt=nowhere", "--chat", "--template=T.txt")


# ---- numbers

@pytest.mark.parametrize(("text", "values"), [
    ("no number, none", []),
    ("12.50 and 12.5", ["12.5", "12.5"]),
    ("1,000.50 or 1000.5", ["1000.5", "1000.5"]),
    ("1,234,567", ["1234567"]),
    ("1e3 1.5E-05 2e+2", ["1000", "0.000015", "200"]),
    ("-5, -12.5; (-7) =-8 \"-9\" >-1<", ["-5", "-12.5", "-7", "-8", "-9", "-1"]),
    ("\u22125 \u221212.50", ["-5", "-12.5"]),
    ("-$5 $-6 $7 -€1,000.5 5€", ["-5", "-6", "7", "-1000.5", "5"]),
    ("2024-01-05", ["2024", "1", "5"]),
    ("2024-01-05T10:30:00Z", ["2024", "1", "5", "10", "30", "0"]),
    ("05.01.2024", ["5", "1", "2024"]),
    ("1/5/2024", ["1", "5", "2024"]),
    ("12% and 12.5 %", ["12", "12.5"]),
    ("It was 12. Then 13.5. End 14", ["12", "13.5", "14"]),
    ("5-7, 5 - 7, 5 -7, A-7, a--7", ["5", "7", "5", "7", "5", "-7", "7", "7"]),
    ("1,2,3", ["1", "2", "3"]),
    ("5411,200,2024", ["5411", "200", "2024"]),
    ("1,50 12,3456 1,23,456", ["1", "50", "12", "3456", "1", "23", "456"]),
    ("[1, 200] 1, 200", ["1", "200", "1", "200"]),
    ("v1.2.3 192.168.0.1", ["1", "2", "3", "192", "168", "0", "1"]),
    ("EUR12.50 5km Q3 mcc_5411", ["12.5", "5", "3", "5411"]),
    ("007 +7", ["7", "7"]),
    (".5 -.5 a.5 ...5", ["0.5", "-0.5", "5", "5"]),
    ("3e8a 5e 1e1000", ["3", "8", "5", "1", "1000"]),
    ("٣ and ３", ["3", "3"]),
    ("½ x² Ⅷ three", []),
    ("-0 -0.0", ["0", "0"]),
])
def test_numbers_of_a_text(text, values):
    assert [value for _, value in rewriting.numbers_in(text)] == [*map(Decimal, values)]


def test_a_number_is_one_however_it_is_spelled():
    draw = random.Random(3)
    for _ in range(2000):
        value = Decimal(draw.randrange(-10 ** draw.randint(1, 9), 10 ** draw.randint(1, 9)))
        value = value.scaleb(-draw.randint(0, 4))
        spelled = [f"{value:f}", f"{value:,f}", f"{value:.6f}", f"{value:e}", f"{value:E}",
                   f"{value:,f}".replace("-", "\u2212"), f"{value:f} %", f"({value:f})",
                   f"{value:f}."]
        text = draw.choice([" ", ", ", "\n", " | "]).join(spelled)
        assert [found for _, found in rewriting.numbers_in(text)] == [value] * 9, text


def test_any_text_has_numbers_or_none():
    draw = random.Random(4)
    signs = "0123456789.,-+eE_ $€\u2212\n:/a%()\u0663" * 3 + "".join(HOSTILE)
    for _ in range(20000):
        text = "".join(draw.choices(signs, k=draw.randint(0, 14)))
        found = [spelled for spelled, _ in rewriting.numbers_in(text)]
        digits = re.sub(r"\D", "", text)
        assert re.sub(r"\D", "", "".join(found)) == digits, text  # every digit is in one number


# ---- what a rewriting did

@pytest.mark.parametrize(("values", "completion", "lost", "added", "copied"), [
    (["Paid 12.50 on 2024-01-05"], "On 2024-01-05 there was a payment of 12.5", [], [], False),
    (["Paid 12.50 on 2024-01-05"], "On 2024-01-06 12.50 were paid", ["05"], ["06"], False),
    (["Paid 12.50 on 2024-01-05"], "On 5 January 2024 12.50 were paid", ["01"], [], False),
    (["Paid 1,000.50"], "1000.5 paid", [], [], False),
    (["Paid 1000"], "1,000 paid", [], [], False),
    (["Paid 1000"], "100 paid", ["1000"], ["100"], False),
    (["-5 EUR"], "5 Euro", ["-5"], ["5"], False),
    (["-5 EUR"], "EUR \u22125.00", [], [], False),
    (["12 %"], "twelve per cent", ["12"], [], False),
    (["12 %"], "12% of it", [], [], False),
    (["5 and 5"], "of 5", ["5"], [], False),
    (["5"], "5, I say 5", [], [], False),
    (["5"], "5 of 9, 9", [], ["9", "9"], False),
    (["17", "has 3"], "17 has 3", [], [], False),
    (["17", "has 3"], "has 3", ["17"], [], True),
    (["Paid  12\nEUR"], " paid 12 eur", [], [], True),
    (["Straße"], "STRASSE", [], [], True),
    (["a", "b"], "Say a, b", [], [], True),  # the whole prompt
    (["a", "b"], "y a, ", [], [], True),  # cut at both ends
    (["a", "b"], "Say a, b, c", [], [], False),
    (["a"], "", [], [], False),
    (["a 1"], "", ["1"], [], False),
    (["a"], "a!", [], [], False),
    ([""], "new", [], [], False),
])
def test_what_became_of_a_row(values, completion, lost, added, copied):
    prompt = "Say " + ", ".join(values)
    assert rewriting.compared(values, prompt, completion) == {
        "lost": lost, "added": added, "copied": copied}


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "grouped"])
def test_one_number_changed_in_a_table_is_lost_and_the_new_one_added(form):
    draw = random.Random(form)
    for _ in range(200):
        rows = [(f"2024-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}",
                 draw.choice(["shop", "cash 24", "-5", *HOSTILE]),
                 draw.choice([draw.randint(-9999, 9999), round(draw.gauss(0, 500), 2), 1e-9, 1e16]))
                for _ in range(draw.randint(1, 8))]
        names, place = ["day", "what", "sum"], draw.randrange(len(rows))
        old, new = rows[place][2], draw.choice([10 ** 7 + draw.randrange(99), -77777.125])
        text = rendered(rows, names, form)
        other = rendered([(*row[:2], new) if i == place else row for i, row in enumerate(rows)],
                         names, form)
        assert rewriting.compared([text], text, text) == {"lost": [], "added": [], "copied": True}
        done = rewriting.compared([text], text, other)
        assert [*map(Decimal, done["lost"])] == [Decimal(str(old))], (text, other)
        assert [*map(Decimal, done["added"])] == [Decimal(str(new))] and not done["copied"]


# ---- from end to end

ROWS = [
    {"id": 3, "text": "paid 12.50 on 2024-01-05", "prompt": "not read: 99"},
    {"id": 4, "text": "got 7", "prompt": ""},
    {"id": 5, "text": "has 1,000", "prompt": ""},
    {"id": 6, "text": "none", "prompt": ""},
    {"id": 7, "text": "was 5 or 5", "prompt": ""},
]
ANSWERS = {3: ("12.5 went away on 05.01.2024 by 3", "eos"), 4: ("Got  7", "eos"),
           5: ("5 had 1000 of 1001", "eos"), 6: ("Nothing of 6", "length"), 7: ("7 was 5", "stop")}
JUDGED = {3: ([], [], False), 4: (["4"], [], True), 5: ([], ["1001"], False), 6: ([], [], False),
          7: (["5"], [], False)}
COUNTS = {"rows": 5, "numbers": 13, "lost": 2, "rows_lost": 2, "rows_added": 1, "rows_copied": 1,
          "rows_empty": 0, "rows_cut": 1}
SAID = ("rewritten: 5 rows; with lost numbers 2 (2 of 13 numbers, 15.4 %), with added ones 1; "
        "copies 1, empty 0, cut at the limit of tokens 1\n")


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A model that answers by ANSWERS, in a folder with files to work on; the prompts that it was
    given, as text."""
    prompts = []

    def complete(model, tokenizer, given, *_, **__):
        texts = [tokenizer.decode(ids) for ids in given]
        prompts.extend(texts)
        answers = [ANSWERS[int(re.search(r"client (\d)", text)[1])] for text in texts]
        return [generate.Completion(why, text, [1]) for text, why in answers]

    monkeypatch.setattr(generate, "complete", complete)
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", tiny(block_size=400))
    Path("F.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("T.txt").write_text("Write 2 sentences.\nclient {id}: {text}\n")
    return prompts


WORDS = ["--ckpt=model", "--prompts=F.jsonl", "--template=T.txt", "--device=cpu", "--batch=2"]


@pytest.mark.parametrize("out", ["G.jsonl", "G.parquet"])
def test_rows_are_rewritten_and_what_it_did_is_told(scripted, capsys, out):
    pq = pytest.importorskip("pyarrow.parquet")
    assert run(*WORDS, f"--out={out}") == 0
    made = pq.read_table(out).to_pylist() if out == "G.parquet" else read_rows(Path(out))
    assert made == [row | {"completion": ANSWERS[row["id"]][0], "stop": ANSWERS[row["id"]][1],
                           "lost": JUDGED[row["id"]][0], "added": JUDGED[row["id"]][1],
                           "copied": JUDGED[row["id"]][2]} for row in ROWS]
    assert sorted(scripted) == [f"Write 2 sentences.\nclient {row['id']}: {row['text']}"
                                for row in ROWS]
    said = capsys.readouterr().out
    assert said.count(SAID) == said.count("rewritten: ") == 1
    note = read_json(Path(f"{out}.made.json"))
    assert note["rewriting"] == COUNTS
    assert note["recipe"]["sha256 of --template"] and "template" not in note["recipe"]
    before = Path(out).read_bytes()
    assert run(*WORDS, f"--out={out}") == 0
    assert f"{out} is complete" in capsys.readouterr().out
    shutil.copy("T.txt", "same.txt")
    assert run(*WORDS, f"--out={out}", "--template=same.txt") == 0
    Path("T.txt").write_text("client {id}: {text}, anew:")
    with pytest.raises(UserError, match="not made from this: sha256 of --template="):
        run(*WORDS, f"--out={out}")
    with pytest.raises(UserError, match=r"not made from this: sha256 of --template=.*, now it is "):
        run(*WORDS, f"--out={out}", "--template=")
    assert Path(out).read_bytes() == before


def test_rows_without_any_number_fit_into_a_parquet(scripted, monkeypatch):
    """No row has lost or added one: the columns have their type all the same."""
    pq = pytest.importorskip("pyarrow.parquet")
    Path("F.jsonl").write_text(json.dumps({"id": 6, "text": "none"}))
    Path("T.txt").write_text("client 6: {text}")
    monkeypatch.setitem(ANSWERS, 6, ("nothing", "eos"))
    assert run(*WORDS, "--out=G.parquet") == 0
    table = pq.read_table("G.parquet")
    assert str(table.schema.field("lost").type) == str(table.schema.field("added").type)
    assert "string" in str(table.schema.field("lost").type)
    assert table.to_pylist()[0]["lost"] == []


def test_a_rewriting_goes_on_after_a_kill_and_counts_all(scripted, monkeypatch, capsys):
    add = prompt_files.Journal.add

    def dies(journal, rows):
        add(journal, rows)
        journal.file.close()
        raise KeyboardInterrupt

    assert run(*WORDS, "--out=whole.jsonl") == 0
    monkeypatch.setattr(prompt_files.Journal, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*WORDS, "--out=G.jsonl")
    monkeypatch.setattr(prompt_files.Journal, "add", add)
    text = Path("T.txt").read_text()
    for words, other in (([], text + "Anew:"), (["--template="], text)):
        Path("T.txt").write_text(other)
        with pytest.raises(UserError, match=r"begun with sha256 of --template=.*, now it is"):
            run(*WORDS, "--out=G.jsonl", *words)
    Path("T.txt").write_text(text)
    scripted.clear()
    capsys.readouterr()
    assert run(*WORDS, "--out=G.jsonl") == 0
    assert len(scripted) == 3 and SAID in capsys.readouterr().out
    assert Path("G.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert read_json(Path("G.jsonl.made.json"))["rewriting"] == COUNTS


def test_what_was_begun_without_a_template_is_not_gone_on_with(scripted):
    Path("F.jsonl").write_text(json.dumps({"prompt": "client 3: a", "id": 3, "text": "b"}))
    assert run(*WORDS, "--out=G.jsonl", "--template=") == 0
    note = read_json(Path("G.jsonl.made.json"))
    assert "rewriting" not in note and {*read_rows(Path("G.jsonl"))[0]} == {
        "prompt", "id", "text", "completion", "stop"}
    with pytest.raises(UserError, match="not made from this: sha256 of --template=, now it is "):
        run(*WORDS, "--out=G.jsonl")


def test_several_rewritings_of_each_row(scripted):
    assert run(*WORDS, "--out=G.jsonl", "--num_samples=3") == 0
    rows = read_rows(Path("G.jsonl"))
    assert [(row["id"], row["sample"]) for row in rows] == [(i, n) for i in range(3, 8)
                                                            for n in range(3)]
    assert [row["lost"] for row in rows] == [JUDGED[i][0] for i in range(3, 8) for _ in range(3)]
    assert read_json(Path("G.jsonl.made.json"))["rewriting"] == {
        name: 3 * count for name, count in COUNTS.items()}


def test_ranks_rewrite_together(tmp_path):
    """The same file and the same counts as one process, which the file itself confirms."""
    write_checkpoint(tmp_path / "model", tiny(block_size=400))
    draw = random.Random(1)
    rows = [{"n": draw.randrange(99), "text": f"paid {draw.random():.3f}"} for _ in range(17)]
    (tmp_path / "F.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "T.txt").write_text("Once more: {n} {text}")
    words = [*WORDS, "--max_new_tokens=12"]
    for out, processes in (("A.jsonl", 0), ("B.jsonl", 2)):
        done = run_script("sample.py", *words, f"--out={out}", cwd=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("rewritten: 17 rows; ") == 1
    assert (tmp_path / "A.jsonl").read_bytes() == (tmp_path / "B.jsonl").read_bytes()
    found = read_rows(tmp_path / "A.jsonl")
    counts = [read_json(tmp_path / f"{name}.jsonl.made.json")["rewriting"] for name in "AB"]
    assert counts[0] == counts[1] == {
        "rows": 17, "numbers": 34, "lost": sum(len(row["lost"]) for row in found),
        "rows_lost": sum(row["lost"] != [] for row in found),
        "rows_added": sum(row["added"] != [] for row in found),
        "rows_copied": sum(row["copied"] for row in found),
        "rows_empty": sum(row["completion"].split() == [] for row in found),
        "rows_cut": Counter(row["stop"] for row in found)["length"]}


def test_what_is_saved_with_a_run_has_the_filled_prompt(scripted):
    write_checkpoint(Path("run/checkpoints/step_12"), tiny(block_size=400))
    Path("run/run.json").write_text("{}")
    assert run("--ckpt=run/checkpoints/step_12", *WORDS[1:], "--out=G.jsonl", "--save") == 0
    assert [(row["prompt"], row["lost"]) for row in read_rows(Path("run/samples.jsonl"))] == [
        (f"Write 2 sentences.\nclient {row['id']}: {row['text']}", JUDGED[row["id"]][0])
        for row in ROWS]


def test_lines_of_text_are_a_field(scripted, capsys):
    Path("F.txt").write_text("client 4: got 7\n")
    Path("T.txt").write_text("Anew: {row}")
    assert run(*WORDS, "--prompts=F.txt", "--column=row", "--out=G.jsonl") == 0
    assert scripted == ["Anew: client 4: got 7"]
    assert "without effect" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"F.txt:1 has no 'row'"):
        run(*WORDS, "--prompts=F.txt", "--out=H.jsonl")
    Path("T.txt").write_text("client {id}")
    assert run(*WORDS, "--column=text", "--out=H.jsonl", "--id=id") == 0
    assert "without effect here: column, id\n" in capsys.readouterr().out


def test_a_model_of_dialogs_is_asked_and_one_of_text_goes_on(scripted, monkeypatch, capsys):
    given, complete = [], generate.complete
    monkeypatch.setattr(generate, "complete", lambda *args: given.extend(args[2]) or complete(
        *args))
    with pytest.raises(UserError, match=r"--system and --tools are for .* dialogs"):
        run(*WORDS, "--out=G.jsonl", "--system=Be brief.")
    made("bytes").save(Path("model"))
    Path("F.jsonl").write_text(json.dumps(ROWS[0] | {"messages": "of the row's own"}))
    assert run(*WORDS, "--out=G.jsonl", "--system=Be brief.") == 0
    chat = Chat(Tokenizer.load("model"))
    assert given == [chat.prompt([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Write 2 sentences.\nclient 3: {ROWS[0]['text']}"}])]
    row = read_rows(Path("G.jsonl"))[0]
    assert row["message"] == {"role": "assistant", "content": ANSWERS[3][0]}
    assert row["messages"] == "of the row's own" and row["lost"] == []
    assert "bare text" not in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_named(scripted):
    Path("T.txt").write_text("{text}" * 99)
    with pytest.raises(UserError, match=r"F.jsonl:1: the prompt has .* tokens, room is for 399"):
        run(*WORDS, "--out=G.jsonl")


def test_the_clients_of_a_set_of_tables(scripted, tmp_path, monkeypatch):
    write_clients(tmp_path / "t.csv", 20)
    with open(tmp_path / "t.csv", "a") as file:
        file.write("".join(f'x{i},5,"{text}",1\n' for i, text in enumerate(
            ["é ü", "<td>&amp;</td>", "  two  ", "😀"])))
    folder = inside(tmp_path, monkeypatch, documents="table", sources=[source()], block_size=64)
    Path("T.txt").write_text("client 4, {id}, {split}: {text}")
    assert run(*WORDS, f"--prompts={folder}", "--out=G.jsonl") == 0
    texts = [(part, who, text) for part in ("train", "val")
             for who, text in texts_of(folder, part).items()]
    rows = read_rows(Path("G.jsonl"))
    assert [(row["split"], row["id"], row["text"]) for row in rows] == texts and len(texts) == 24
    assert sorted(scripted) == sorted(f"client 4, {who}, {part}: {text}"
                                      for part, who, text in texts)
    assert read_json(Path("G.jsonl.made.json"))["rewriting"]["rows"] == 24
    with pytest.raises(UserError, match=r"has no 'client', .*fields are: id, split, text"):
        Path("T.txt").write_text("{client}")
        run(*WORDS, f"--prompts={folder}", "--out=H.jsonl")
    Path("my.txt").write_text("some text " * 200)
    other = inside(tmp_path, monkeypatch, dataset="e", sources="my.txt")
    with pytest.raises(UserError, match=r"--embed, .*or --template, of a set of tables"):
        run(*WORDS, f"--prompts={other}", "--out=H.jsonl")


def test_what_was_rewritten_is_learned_from(scripted, tmp_path, monkeypatch):
    """As docs/tables.md says: the rows that are whole, new and without other numbers."""
    assert run(*WORDS, "--out=G.jsonl") == 0
    page = (Path(__file__).parent.parent / "docs/tables.md").read_text()
    line = re.search(r"^    jq -c '(.*)' (\S+) > (\S+)$", page, re.MULTILINE)
    if jq := shutil.which("jq"):
        kept = subprocess.run([jq, "-c", line[1], "G.jsonl"], capture_output=True, check=True)
        Path("kept.jsonl").write_bytes(kept.stdout)
        assert [row["id"] for row in read_rows(Path("kept.jsonl"))] == [3]
    folder = inside(tmp_path, monkeypatch, sources={"path": "G.jsonl", "column": "completion"},
                    val_fraction=0.3, min_chars=0)
    assert make_tokenizer("bytes").sha256 == read_json(folder / "manifest.json")["tokenizer"][
        "sha256"]
    stored = b"".join(path.read_bytes() for path in folder.glob("*.bin")).replace(b"\0", b"")
    assert all(text.encode() in stored for text, _ in ANSWERS.values())


# ---- counted and said

def test_rows_are_counted_by_what_became_of_them():
    template = ["Say ", "a", ", ", "b", ", ", "a", ""]
    rows = [{"a": 1, "b": 2}, {"a": "x", "b": None}, {"a": 5, "b": 6}]
    made = {0: {"completion": " \n", "stop": "length"}, 1: {"completion": "new 7", "stop": "eos"},
            2: {"completion": "6", "stop": "stop"}}
    assert rewriting.judge(template, rows, made) == {
        "rows": 3, "numbers": 4, "lost": 3, "rows_lost": 2, "rows_added": 1, "rows_copied": 1,
        "rows_empty": 1, "rows_cut": 1}
    assert [made[i]["lost"] for i in range(3)] == [["1", "2"], [], ["5"]]
    assert [made[i]["added"] for i in range(3)] == [[], ["7"], []]


@pytest.mark.parametrize(("lost", "numbers", "share"), [(0, 0, "0.0"), (1, 1, "100.0"),
                                                        (1, 3, "33.3"), (2, 2, "100.0")])
def test_a_share_is_said(lost, numbers, share):
    counts = COUNTS | {"lost": lost, "numbers": numbers}
    assert f"({lost} of {numbers} numbers, {share} %)" in rewriting.sentence(counts)


def test_messages_about_templates_are_whole(tmp_path):
    for text, says in (("a\n\n{ b", ":3: '{' is no field; write {FIELD}, and {{ for a {, }} for a "
                        "}"), ("x", " names no field of the rows; write {FIELD} where one goes")):
        with pytest.raises(UserError) as caught:
            template_of(tmp_path, text)
        assert str(caught.value) == f"{tmp_path}/T.txt{says}"
    assert template_of(tmp_path, "{a}b{{{c}}}") == ["", "a", "b{", "c", "}"]
    for row, says in (({}, "none"), ({"x": 1, "y": 2}, "x, y")):
        with pytest.raises(UserError) as caught:
            rewriting.check_fields(["", "a", "", "b", ""], row, "F:1")
        assert str(caught.value) == ("F:1 has no 'a', which --template names; its fields are: "
                                     f"{says} ({{{{ is a brace)")
    assert rewriting.check_fields(["", "a", "b", "c", ""], {"a": 1, "c": 2}, "F:1") is None
