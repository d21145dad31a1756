"""prepare.py on dialogs: the bytes on the disk against ids and masks that the test writes itself,
of a byte-level tokenizer, where a text's ids are its bytes."""

import gzip
import hashlib
import io
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_prepare import inside, run, zst

import prepare
from model import ModelConfig
from plainllama.command import DEFAULT_CONFIG, CommandLine, parse
from plainllama.files import write_json
from plainllama.settings import Settings, UserError, check_keys
from plainllama.text import embedded_chat, records
from plainllama.text.documents import Part, Tally, documents
from plainllama.text.selection import DEDUP, choose_hold_out, placed
from plainllama.text.sources import survey
from plainllama.tokens import parts as parts_room
from plainllama.tokens import shards
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer
from plainllama.weights.huggingface import config_json

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
BOS, ROLES, END = 256, {"system": 258, "user": 259, "assistant": 260, "tool": 261}, 262
WORDS = ["red", "blue", "seven", "7", "Grüße", "мир", "你好", "🎉", "x=1\n", "<|end|>", "<s>",
         "the", "of\t"]


def words(rng, most=20):
    return "w" + " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def turns(rng, most=3):
    """Questions and answers."""
    return [{"role": role, "content": words(rng)} for _ in range(rng.randint(1, most))
            for role in ("user", "assistant")]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows, size=7):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=size)
    return file.getvalue()


def rendered(dialog):
    """(ids, mask) of a dialog without tools."""
    ids, mask = [BOS], [0]
    for message in dialog:
        text = list(message["content"].encode())
        learned = int(message["role"] == "assistant" and message.get("learn", True))
        ids += [ROLES[message["role"]], *text, END]
        mask += [0, *[learned] * (len(text) + 1)]
    return ids, mask


def stored(folder, source=None):
    """[(ids, mask)] of both splits, read with nothing of the project."""
    manifest, out = json.loads((folder / "manifest.json").read_text()), []
    for path in sorted(folder.glob("*-*.bin")):
        if source not in (None, manifest["source_of"][path.name]):
            continue
        ids = np.frombuffer(path.read_bytes()[64:], "<u2")
        starts = np.frombuffer(path.with_suffix(".idx").read_bytes(), "<u8").tolist()
        bits = np.unpackbits(np.frombuffer(path.with_suffix(".mask").read_bytes(), "u1"),
                             bitorder="little")
        out += [(ids[a:b].tolist(), bits[a:b].tolist())
                for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return out


OWN = """
def clean(record):
    if record["n"] % 5:
        return {"prompt": record["q"], "response": record["a"]}
"""


def test_five_sources_in_as_many_forms(tmp_path, monkeypatch, capsys):
    rng = random.Random(1)
    talks = [[turns(rng) for _ in range(60)] for _ in range(5)]
    talks[4] = [talk[:2] for talk in talks[4]]
    (tmp_path / "a.jsonl").write_bytes(jsonl({"messages": talk} for talk in talks[0]))
    names = {"user": "human", "assistant": "gpt"}
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]}
        for talk in talks[1]], indent=2, ensure_ascii=False).encode()))
    (tmp_path / "c.parquet").write_bytes(parquet([
        {"id": i, "messages": [m | {"weight": None if m["role"] == "user" else int(i != 3)}
                               for m in talk]} for i, talk in enumerate(talks[2])]))
    (tmp_path / "d.json.xz").write_bytes(lzma.compress(json.dumps([
        {"instruction": talk[-2]["content"], "input": "", "output": talk[-1]["content"],
         "history": [[q["content"], a["content"]] for q, a in zip(
             talk[:-2:2], talk[1:-2:2], strict=True)]} for talk in talks[3]]).encode()))
    (tmp_path / "e.jsonl.zst").write_bytes(zst(jsonl(
        {"n": i, "q": talk[0]["content"], "a": talk[1]["content"]}
        for i, talk in enumerate(talks[4]))))
    (tmp_path / "own.py").write_text(OWN)
    given = [{"path": "a.jsonl", "slice": "10:40", "train_on": "last"},
             {"path": "b.json.gz", "system": "Be brief."}, "c.parquet", "d.json.xz",
             {"path": "e.jsonl.zst", "name": "own", "converter": "own.py:clean"}]
    keys = {"documents": "chat", "block_size": 4096, "sources": given}
    folder = inside(tmp_path, monkeypatch, **keys)
    out = capsys.readouterr().out
    want = [[[m | {"learn": m is talk[-1]} for m in talk] for talk in talks[0][10:40]],
            [[{"role": "system", "content": "Be brief."}, *talk] for talk in talks[1]],
            [talk for i, talk in enumerate(talks[2]) if i != 3], talks[3],
            [talk for i, talk in enumerate(talks[4]) if i % 5]]
    for i, expected in enumerate(want):
        assert sorted(stored(folder, i)) == sorted(map(rendered, expected)), i
    manifest = shards.read_manifest(folder)
    assert manifest["dropped"] == {
        "nothing of it is learned": {"count": 1, "first": "c.parquet row 4"},
        "left out by its converter": {"count": 12, "first": "e.jsonl.zst:1"}}
    made = manifest["by_source"]
    assert [sum(entry["count"] for entry in one["dropped"].values()) for one in made] == [
        0, 0, 1, 0, 12]
    learned = sum(sum(mask) for talks in want for _, mask in map(rendered, talks))
    assert sum(split["learned"] for split in manifest["splits"].values()) == learned
    assert out.count("its rows go through own.py:clean") == 1
    assert shards.verify(folder) == (0, [])
    capsys.readouterr()
    assert prepare.inspect(folder) == 0
    assert "train, " in (out := capsys.readouterr().out) and "<s><|user|>w" in out
    # the same bytes of two workers, and another converter is another source
    two = inside(tmp_path, monkeypatch, dataset="two", workers=2, **keys)
    assert {p.name: p.read_bytes() for p in two.glob("*.???")} == {
        p.name: p.read_bytes() for p in folder.glob("*.???")}
    (tmp_path / "own.py").write_text(OWN + "\n")
    with pytest.raises(UserError, match=r"held something else \(its converter\)"):
        inside(tmp_path, monkeypatch, **keys)


def read(path, how="assistant", cut=None):
    """What documents() gives of a source, and what was dropped."""
    dropped = Tally()
    _, parts = survey(path, documents="chat", train_on=how)
    return [*documents(parts, dropped, Tally() if cut is None else cut)], dropped


def objects(path: Path) -> list[str]:
    """The texts of a file's objects."""
    _, parts = survey(str(path))
    return [*documents(parts, Tally())]


def test_an_array_is_read_as_it_comes(tmp_path):
    """Of any layout and packing, in memory that does not grow with the file."""
    rng = random.Random(3)
    texts = [words(rng, 4000) for _ in range(300)]
    rows = [{"text": text, "n": [i, {"x": "]}"}]} for i, text in enumerate(texts)]
    layouts = {"a": json.dumps(rows), "b": json.dumps(rows, indent=1, ensure_ascii=False),
               "c": " \n[" + "\n,\n".join(map(json.dumps, rows)) + "\n]\n ",
               "d": "\n".join(map(json.dumps, rows)), "e": "\ufeff" + json.dumps(rows),
               "f": json.dumps(rows) + " " * (3 << 20)}
    for name, text in layouts.items():
        assert len(text) > 2 << 20
        for ending, pack in (("", bytes), (".gz", gzip.compress), (".zst", zst)):
            path = tmp_path / f"{name}.json{ending}"
            path.write_bytes(pack(text.encode()))
            assert objects(path) == texts
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=2))
    assert objects(tmp_path / "one.json") == texts[:1]
    big = tmp_path / "big.json"
    big.write_text(json.dumps(rows * 8))
    _, parts = survey(str(big))
    tracemalloc.start()
    assert sum(1 for _ in documents(parts, Tally())) == 2400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20 < big.stat().st_size / 2


def test_an_array_that_is_broken_off_is_damage_wherever_that_is(tmp_path):
    text = ' [{"text": "a\\n", "n": [1]}, {"text": "b"} ]'
    path = tmp_path / "a.json"
    for end in range(text.index("{"), len(text)):
        path.write_text(text[:end])
        with pytest.raises(UserError, match=r"a\.json is damaged or cut short") as error:
            objects(path)
        assert "\n" not in str(error.value)
    path.write_text(text)
    assert objects(path) == ["a\n", "b"]
    path.write_text('[1, "x", null, [{"text": "c"}], {"text": "d"}, {"text": 3}]')
    dropped = Tally()
    texts = [*documents(survey(str(path))[1], dropped)]
    assert texts == ["c", "d"]
    assert dropped == {"not an object": {"count": 3, "first": "a.json object 1"},
                       "text is not a string": {"count": 1, "first": "a.json object 6"}}
    for bad in ("[{]", '[{"text": "a"} x]', "[" * 9, '{"text":' * 100_000, '[{"text": \xff}]'):
        path.write_bytes(bad.encode("latin-1"))
        with pytest.raises(UserError, match=r"is damaged or cut short|is no UTF-8 text"):
            objects(path)


def test_columns_of_objects_give_no_key_that_a_row_had_not(tmp_path):
    """pyarrow unites two unlike tools to one type, with nulls for what either lacks."""
    tools = [{"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}},
             {"name": "say", "description": "x", "parameters": {"properties": {
                 "word": {"type": "string", "enum": ["a", "b"]}}}}]
    rows = []
    for tool, arguments in zip(tools, ({"a": 2.5}, {"word": "a"}), strict=True):
        rows.append({"messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"function": {"name": tool["name"], "arguments": arguments}}]},
            {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}],
            "tools": [tool]})
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    texts, dropped = read(str(tmp_path / "a.parquet"))
    assert not dropped
    for text, row in zip(texts, rows, strict=True):
        dialog = json.loads(text)
        assert dialog["tools"] == row["tools"]
        call = row["messages"][1]["tool_calls"][0]["function"]
        assert dialog["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_a_row_of_invalid_utf8_costs_no_other(tmp_path):
    texts = pa.array([b"q", b"\xff", b"r"], pa.binary()).cast(pa.large_binary())
    column = pa.Array.from_buffers(pa.large_string(), 3, texts.buffers())
    pq.write_table(pa.table({"prompt": column, "response": ["a"] * 3}), tmp_path / "a.parquet")
    texts, dropped = read(str(tmp_path / "a.parquet"))
    assert [json.loads(text)["messages"][0]["content"] for text in texts] == ["q", "r"]
    assert dropped == {"invalid utf-8": {"count": 1, "first": "a.parquet row 2"}}


ROWS = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(40)]


def test_what_is_dropped_and_cut_is_counted_and_named(tmp_path, monkeypatch):
    rows = [dict(row) for row in ROWS]
    rows[3] = {"messages": [{"role": "narrator", "content": "x"}]}
    rows[5] = {"messages": [{"role": "narrator2", "content": "x"}]}
    rows[7] = {"messages": [*ROWS[7]["messages"], {"role": "user", "content": "thanks"}]}
    rows[9] = {"messages": [ROWS[9]["messages"][0], {"role": "assistant", "content": "x" * 2900}]}
    rows[11] = {"messages": [*ROWS[11]["messages"], {"role": "user", "content": "more"},
                             {"role": "assistant", "content": "y" * 700}]}
    lines = jsonl(rows).splitlines(keepends=True)
    lines[1] = b"{broken\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    monkeypatch.setattr(records, "DOCUMENT", 2000)
    keys = {"documents": "chat", "sources": "a.jsonl", "block_size": 256}
    folder = inside(tmp_path, monkeypatch, **keys)
    manifest = shards.read_manifest(folder)
    assert manifest["dropped"] == {
        "broken line": {"count": 1, "first": "a.jsonl:2"},
        "unknown role": {"count": 2, "first": "a.jsonl:4 ('narrator')"},
        "dialog over 0 MB": {"count": 1, "first": "a.jsonl:10"}}
    assert manifest["cut"] == {
        "messages behind the last answer": {"count": 1, "first": "a.jsonl:8"},
        "dialogs to block_size 256": {"count": 1, "first": "a.jsonl:12"},
        "learned tokens behind that": {"count": 701, "first": "a.jsonl:12"}}
    assert (sorted(ids for ids, _ in stored(folder))[-1][1] == ROLES["user"]
            and len(stored(folder)) == 36)
    with pytest.raises(UserError, match=r"a\.jsonl:2: broken line; mend it"):
        inside(tmp_path, monkeypatch, dataset="e", strict=True, **keys)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[2:]))
    with pytest.raises(UserError, match=r"a\.jsonl:2 \('narrator'\): unknown role; mend it"):
        inside(tmp_path, monkeypatch, dataset="e", strict=True, **keys)
    with pytest.raises(UserError, match=r"3 of 38 rows of a\.jsonl are dropped: 2 unknown role "
                       r"\(first a\.jsonl:2 \('narrator'\)\); 1 dialog over.*max_dropped=0\.08"):
        inside(tmp_path, monkeypatch, dataset="f", max_dropped=0.05, **keys)
    inside(tmp_path, monkeypatch, dataset="f", max_dropped=0.08, **keys)


def test_dialogs_are_held_out_whole(tmp_path, monkeypatch):
    """Also of few long ones, which text would be cut of; of one alone there is no validation."""
    long = [{"messages": [{"role": "user", "content": "q"},
                          {"role": "assistant", "content": f"{i} " + "word " * 3000}]}
            for i in range(3)]
    for rows in (long, ROWS):
        (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
        with monkeypatch.context() as patch:  # over which a text is cut up
            patch.setattr("plainllama.text.documents.DOCUMENT", 20)
            patch.setattr("plainllama.text.documents.chunks_of", None)
            texts, _ = read(str(tmp_path / "a.jsonl"))
        assert len(texts) == len(rows)
        _, parts = survey(str(tmp_path / "a.jsonl"), documents="chat", train_on="last")
        hold_out = choose_hold_out(parts, 0.1, whole=True)
        splits = [*placed(documents(parts, Tally()), hold_out)]
        assert [text for _, text in splits] == texts
        assert {split for split, _ in splits} == {"train", "val"}
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS[:1]))
    with pytest.raises(UserError, match="a single dialog, pair or client is left"):
        inside(tmp_path, monkeypatch, documents="chat", sources="b.jsonl")


def test_near_duplicates_of_dialogs(tmp_path, monkeypatch):
    """A fifth are planted: one word in fifteen is another. All have one long system message."""
    pytest.importorskip("rensa")
    rng = random.Random(7)
    vocabulary = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(2000)]
    system = {"role": "system", "content": " ".join(rng.choices(vocabulary, k=400))}

    def talk(sides):
        return {"messages": [system, *({"role": ("user", "assistant")[i % 2], "content":
                                        " ".join(side)} for i, side in enumerate(sides))]}

    originals = [[rng.choices(vocabulary, k=rng.randint(15, 80))
                  for _ in range(2 * rng.randint(1, 3))] for _ in range(800)]
    copies = []
    for sides in originals[:200]:
        copy = [list(side) for side in sides]
        for side in copy:
            for i in rng.sample(range(len(side)), len(side) // 15):
                side[i] = rng.choice(vocabulary)
        copies.append(copy)
    rows = [talk(sides) for sides in originals + copies]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    keys = {"documents": "chat", "sources": "a.jsonl", "block_size": 8192, "max_dropped": 0}
    folder = inside(tmp_path, monkeypatch, dedup="near", **keys)
    kept = {tuple(ids) for ids, _ in stored(folder)}
    false = sum(tuple(rendered(row["messages"])[0]) not in kept for row in rows[:800])
    found = sum(tuple(rendered(row["messages"])[0]) not in kept for row in rows[800:])
    assert false <= 8 and found >= 190
    assert shards.read_manifest(folder)["dropped"] == {
        "near duplicate": {"count": false + found, "first": "a.jsonl:801"}}
    # equal to the letter are only those of one system message and one mask
    other = {"messages": [system | {"content": "another"}, *rows[0]["messages"][1:]]}
    (tmp_path / "a.jsonl").write_bytes(jsonl([*rows[:20], other, *rows[:5]]))
    folder = inside(tmp_path, monkeypatch, dataset="exact", dedup="exact", **keys)
    assert len(stored(folder)) == 21
    assert DEDUP["near"].mark("a text").shape == (128,)


def test_dialogs_of_standard_input(tmp_path):
    keys = ("--documents=chat", "--sources=-", "--tokenizer=bytes", "--dataset=d",
            "--block_size=64")
    run(tmp_path, *keys, stdin=json.dumps(ROWS, indent=1).encode())
    assert len(stored(tmp_path / "data/d")) == 40


def test_a_set_that_no_run_could_take_is_not_complete(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(jsonl(ROWS))
    with pytest.raises(UserError, match=r"no dialog of b.jsonl is left to train on"):
        inside(tmp_path, monkeypatch, documents="chat", dedup="exact", block_size=64, sources=[
            {"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 1}])
    assert not list(tmp_path.glob("data/*/manifest.*"))


@pytest.mark.parametrize(("long", "split"), [("012345678", "train"), ("2", "val")])
def test_a_split_of_which_every_dialog_is_too_long_is_lacking(tmp_path, monkeypatch, long, split):
    rows = [{"prompt": str(i) + "q" * (90 if str(i) in long else 3), "response": "ok"}
            for i in range(9 if split == "train" else 3)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(UserError, match=f"no dialog is left in its {split} split"):
        inside(tmp_path, monkeypatch, documents="chat", sources="a.jsonl", max_dropped=1)
    assert not list(tmp_path.glob("data/d/*"))


def test_what_is_counted_is_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS + ROWS[:2]))
    folder = inside(tmp_path, monkeypatch, documents="chat", dedup="exact", block_size=64,
                    sources="a.jsonl")
    out, n = capsys.readouterr().out, shards.read_manifest(folder)["splits"]["train"]
    line = next(line for line in out.splitlines() if line.startswith("train "))
    assert line.split()[-2] == f"{n['learned'] / n['tokens']:.3f}"  # of JSON there are more bytes
    table = [line.split("  ") for line in out.splitlines() if "left out" in line or "a.js" in line]
    head, row = [[word.strip() for word in words if word.strip()] for words in table[-2:]]
    assert dict(zip(head, row, strict=True)) | {"rows": "42", "dropped": "0", "left out": "2"} == (
        dict(zip(head, row, strict=True)))


def test_dialogs_from_all_over_the_set_are_shown(tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([
            {"prompt": f"{name} {i}", "response": "yes"} for i in range(10)]))
    folder = inside(tmp_path, monkeypatch, documents="chat",
                    sources=["a.jsonl", "b.jsonl", "c.jsonl"])
    capsys.readouterr()
    manifest = shards.read_manifest(folder)
    for count, lines in ((6, 6), (1, 1), (1000, manifest["splits"]["train"]["documents"])):
        prepare.show(folder, manifest, count)
        shown = capsys.readouterr().out.splitlines()
        assert shown[::2][:4] == [f"--- {name}.jsonl" for name in "abca"][:lines]
        assert len(set(shown[1::2])) == len(shown[::2]) == lines
        assert all("<|end|><|assistant|>[[yes<|end|>]]" in line for line in shown[1::2])
        names = {line.removeprefix("<s><|user|>")[0] for line in shown[1::2]}
        assert names == (set("a") if count == 1 else set("abc"))


def test_what_is_taken_often_or_left_is_said(tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(ROWS))
    inside(tmp_path, monkeypatch, documents="chat", sources=[
        {"path": "a.jsonl", "count": 300}, {"path": "b.jsonl", "count": 9}, "c.jsonl"])
    out = capsys.readouterr().out
    (a,), (b,), (c,) = ([line for line in out.splitlines() if line.startswith(f"{name}.jsonl")]
                        for name in "abc")
    assert "  each 8." in a and b.endswith(" of it") and c.endswith("%"), out
    assert "an epoch: dialogs or pairs that a pass takes" in out


def test_dialogs_are_cut_to_the_context_of_the_model_that_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    config = ModelConfig(1, 2, 16, 16, 258, 32)
    (tmp_path / "mine").mkdir()
    write_json(tmp_path / "mine/config.json", config_json(config, 256, None))
    (tmp_path / "a.py").write_text("dataset = 'd'\ndocuments = 'chat'\nsources = 'a.jsonl'\n"
                                   "tokenizer = 'bytes'\ninit_from = 'mine'\nworkers = 1\n")
    monkeypatch.chdir(tmp_path)
    for words, size, says in ((["a.py"], 32, "block_size = 32 (inherited from mine)"),
                              (["a.py", "--dataset=e", "--block_size=64"], 64, "(as you say; m")):
        assert prepare.main(parse(words, "", prepare.Flags)) == 0
        out = capsys.readouterr().out
        assert says in out and "n_layer" not in out
        assert shards.read_manifest(tmp_path / "data" / words[-2][10:] if words[1:] else
                                    tmp_path / "data/d")["block_size"] == size


def test_sources_of_a_config_have_a_data_set_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "a.py").write_text("documents = 'chat'\nsources = 'a.jsonl'\ntokenizer = 'bytes'\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="would be openwebtext, with the tokenizer bytes; add"):
        prepare.main(parse(["a.py"], "", prepare.Flags))
    assert not (tmp_path / "data").exists()


IDLE = {"documents": "text"}


@pytest.mark.parametrize("source, keys, says", [
    ({"path": "a.txt"}, {}, "a.txt: dialogs are rows of .jsonl, .json, .parquet, not plain text"),
    ({"path": "a.jsonl", "column": "x"}, {}, "column of a.jsonl has no effect on documents=chat"),
    ({"path": "a.jsonl", "train_on": "first"}, {}, "train_on of a.jsonl is assistant, last or all"),
    ({"path": "a.jsonl", "converter": "mesages"}, {}, "did you mean messages?"),
    ({"path": "a.jsonl", "converter": "x.py:f"}, {}, "converter x.py:f: x.py is not there"),
    ({"path": "a.jsonl", "fields": {"question": "prompt"}}, {}, "takes {our name: yours}"),
    ({"path": "a.jsonl", "fields": {"prompt": 3}}, {}, "takes {our name: yours}"),
    ({"path": "a.jsonl", "fields": "prompt"}, {}, "fields of a.jsonl takes"),
    ({"paht": "a.jsonl"}, {}, "unknown key 'paht'; did you mean path?"),
    ({"name": "a"}, {}, "sources: {'name': 'a'} is not a path, glob,"),
    ({"path": "a.jsonl", "slice": "0-50"}, {}, "slice of a.jsonl is FROM:TO, not '0-50'"),
    ({"path": "a.jsonl"}, IDLE, "say --documents=chat"),
    ({"path": "d.parquet"}, IDLE, "say --documents=chat"),
    ({"path": "c.jsonl"}, {}, "or give a converter"),
    ({"path": "a.jsonl", "convertor": "x"}, {}, "unknown key 'convertor'; did you mean converter?"),
    ({"path": "a.jsonl", "count": 0}, {}, "count of a.jsonl takes a whole number above 0, not 0"),
    ({"path": "a.jsonl", "count": 2.5}, {}, "takes a whole number above 0, not 2.5"),
    ({"path": "a.jsonl", "weight": -1}, {}, "weight of a.jsonl takes a number above 0, not -1"),
    ({"path": "a.jsonl", "weight": True}, {}, "weight of a.jsonl takes a number above 0, not True"),
    ({"path": "a.jsonl", "weight": 1, "count": 1}, {}, "has a count and a weight; give one"),
    ({"path": "a.jsonl", "max_tokens": "9"}, {}, "takes a whole number above 0, not '9'"),
    ({"path": "a.jsonl", "system": None}, {}, "system of a.jsonl takes a text, not None"),
    ([{"path": "a.jsonl", "weight": 1}, "b.jsonl"], {}, "a weight, or none; a count is for"),
    ({"path": "b.jsonl"}, {}, "no document is left; dropped: 1 no known fields (first b.jsonl:1 "
     "(question, answer)); say which they are, as fields={'prompt'"),
    ({"path": "a.jsonl", "converter": "prompt"}, {}, "40 no field prompt (first a.jsonl:1"),
    ({"path": "a.jsonl"}, {"min_chars": 3}, "min_chars=3 has no effect on documents=chat"),
    ({"path": "a.jsonl"}, {"max_chars": 3}, "max_chars=3 has no effect on documents=chat"),
    *(({"path": "a.jsonl", key: value}, IDLE, f"{key} of a.jsonl is for documents='chat'")
      for key, value in (("name", "x"), ("converter", "auto"), ("fields", {}), ("system", "x"),
                         ("count", 1), ("weight", 1), ("max_tokens", 9), ("train_on", "all"))),
    ({"path": "a.jsonl"}, IDLE | {"train_on": "all"}, "train_on=all has no effect on"),
    ({"path": "a.jsonl"}, IDLE | {"max_dropped": 0.5}, "max_dropped=0.5 has no effect on"),
])
def test_bad_sources_are_one_line_and_leave_nothing(source, keys, says, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"question": "q", "answer": "a"}]))
    (tmp_path / "c.jsonl").write_bytes(jsonl([{"text": "q"}]))
    (tmp_path / "d.parquet").write_bytes(parquet(ROWS))
    keys = {"documents": "chat", "sources": source} | keys
    with pytest.raises(UserError) as error:
        check_keys(Settings(**keys))
        inside(tmp_path, monkeypatch, **keys)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_set_of_text_does_not_become_one_of_dialogs(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "a.txt").write_text("text " * 999)
    inside(tmp_path, monkeypatch, sources="a.txt")
    with pytest.raises(UserError, match="documents was 'text', is now 'chat'"):
        inside(tmp_path, monkeypatch, sources="a.jsonl", documents="chat")


# ---- the generated dialogs

def test_the_embedded_dialogs_are_the_same_everywhere():
    """Reports name this set: whoever draws other dialogs has another set."""
    embedded_chat.write_rows(file := io.BytesIO())
    made = file.getvalue()
    assert made.count(b"\n") == 8000
    assert hashlib.sha256(made).hexdigest()[:16] == "b9932ebbe848ddca"
    first = made.splitlines()[:300]
    assert [json.dumps(row).encode() for row in embedded_chat.dialogs("train", 300)] == first
    for split, digest in (("train", "bcdd33da5da222a0"), ("held_out", "cb0ecb7b492941a5")):
        drawn = json.dumps([*embedded_chat.dialogs(split, 300, seed=7)])
        assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == digest
    assert max(map(embedded_chat.size_of, map(json.loads, made.splitlines()))) == 500


def test_the_size_of_a_dialog_is_that_of_its_parts():
    call = {"name": "f", "arguments": {"x": "1"}}  # 37 characters of JSON
    spoken = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    tool = {"name": "f"}  # 13, and a line's end
    size = embedded_chat.size_of
    assert size({"messages": spoken, "tools": []}) == 5 + 4 + 24
    assert size({"messages": spoken, "tools": [tool, tool]}) == 5 + 4 + 2 * 14 + 24
    called = [spoken[0], {"role": "assistant", "content": "", "tool_calls": [call, call]},
              {"role": "tool", "content": "4"}, spoken[1]]
    assert size({"messages": called, "tools": [tool]}) == (
        6 + 8 + 14 + 2 * (len(json.dumps(call)) + 26) + 24)


# ---- the whole output

def lines_of(tmp_path, monkeypatch, capsys, given, files=(), flags=(), **keys):
    """What prepare.py prints, but for how far it was."""
    monkeypatch.chdir(tmp_path)
    config = Settings(**{"dataset": "d", "tokenizer": "bytes", "workers": 1, "block_size": 64,
                         "val_fraction": 0.1} | keys)
    assert prepare.main(CommandLine(config, prepare.Flags(**dict(flags)), list(files),
                                    str(ROOT / DEFAULT_CONFIG), "", {}, given)) == 0
    return [line for line in capsys.readouterr().out.splitlines() if " a second, " not in line]


COUNTED = [
    "            46 documents in", "             1 dropped: duplicate (first: b.jsonl:5)",
    "             1 dropped: no known fields (first: b.jsonl:6 (bad))",
    "           documents          tokens        MB      learned    longest",
    "train             40             456       0.0        0.414         15",
    "val                4              45       0.0        0.400         12"]
BY_SOURCE = [
    "source                        rows   dropped  left out      kept       tokens     learned  an "
    "epoch   share",
    "first                           40         0         0        40          465         195 "
    "       10   49.5%  28% of it",
    "b.jsonl                          6         1         1         4           36          12 "
    "       17   50.5%  each 4.2 times",
    "an epoch: dialogs or pairs that a pass takes; share: of the learned tokens in it"]


def test_all_that_is_printed_of_dialogs(tmp_path, monkeypatch, capsys):
    def row(question, answer):
        return {"messages": [{"role": "user", "content": question},
                             {"role": "assistant", "content": answer}]}

    (tmp_path / "a.jsonl").write_bytes(jsonl(row(f"q{i}", "a" * (i % 7 + 1)) for i in range(40)))
    rows = [row(f"x{i}", "bb") for i in range(4)]
    (tmp_path / "b.jsonl").write_bytes(jsonl([*rows, rows[0], {"bad": 1}]))
    sources = [{"path": "a.jsonl", "count": 10, "name": "first"}, {"path": "b.jsonl", "count": 17}]
    keys = {"documents": "chat", "sources": sources, "dedup": "exact", "max_dropped": 0.5}
    hint = (f"its text is {sources}; for your own: python prepare.py config/quickstart.py "
            "--dataset=mine --sources=my.txt")
    shown = [line for source, question, answer in (
        ("first", "q5", 6), ("b.jsonl", "x0", 0), ("first", "q37", 3), ("b.jsonl", "x3", 0),
        ("first", "q33", 6)) for line in (
            f"--- {source}", f"<s><|user|>{question}<|end|><|assistant|>[["
            f"{'a' * answer or 'bb'}<|end|>]]")]
    lines = lines_of(tmp_path, monkeypatch, capsys, {"dataset": "d"}, flags={"show": 5}, **keys)
    assert lines == [
        hint, "data/d: looking for repeated documents", "data/d: 2 parts, 0 of them done; 1 "
        "workers; tokenizer bytes, 263 entries (tiktoken)", "data/d: complete", *COUNTED,
        *BY_SOURCE, *shown, "next: python train.py --dataset=d --out_dir=out/d"]
    given = {"dataset": "d", "learning_rate": 0.1, "epochs": 2.0, "max_dropped": 0.5}
    lines = lines_of(tmp_path, monkeypatch, capsys, given, **keys)
    assert lines == [
        hint, "no effect here, but on train.py: epochs, learning_rate", "data/d: already prepared",
        *COUNTED, *BY_SOURCE,
        "next: python train.py --dataset=d --epochs=2.0 --learning_rate=0.1 --out_dir=out/d"]
    assert not any(line.startswith("its text") for line in lines_of(
        tmp_path, monkeypatch, capsys, {"sources": "a.jsonl", "dataset": "d"}, **keys))
    assert not any(line.startswith("its text") for line in lines_of(
        tmp_path, monkeypatch, capsys, {"dataset": "d"}, files=["c.py"], **keys))
    monkeypatch.setattr(prepare.sys.stdout, "isatty", lambda: True, raising=False)
    for no_colour, begin in (("", "\033[32m"), ("1", "[[")):
        monkeypatch.setenv("NO_COLOR", no_colour)
        lines = lines_of(tmp_path, monkeypatch, capsys, {"dataset": "d"}, flags={"show": 1}, **keys)
        assert any(f"<|assistant|>{begin}aaaaaa<|end|>" in line for line in lines)
    lines = lines_of(tmp_path, monkeypatch, capsys, {}, flags={"inspect": "data/d"})
    assert [line.partition(":")[0] for line in lines[:3]] == ["recipe", "source", "tokenizer"]
    assert lines[3:] == [*COUNTED, *(
        f"{split}, {size + 7} tokens: <s><|user|>{question}<|end|><|assistant|>[[{'a' * size}"
        "<|end|>]]" for split, question, size in (
            ("train", "q0", 1), ("train", "q1", 2), ("train", "q2", 3), ("val", "q3", 4),
            ("val", "q29", 2), ("val", "q31", 4)) if len(question) == 2),
        "val, 10 tokens: <s><|user|>q29<|end|><|assistant|>[[aa<|end|>]]",
        "val, 12 tokens: <s><|user|>q31<|end|><|assistant|>[[aaaa<|end|>]]"]
    files = [*shards.read_manifest(tmp_path / "data/d")["files"]]
    assert lines_of(tmp_path, monkeypatch, capsys, {}, flags={"verify": "data/d"}) == [
        f"data/d: ok, {len(files)} files, train 456 tokens, val 45 tokens"]


def test_all_that_is_printed_of_a_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("some words of a text\nand more\n" * 400)
    given = {"dataset": "e", "sources": "t.txt"}
    counted = ["             2 documents in",
               "           documents          tokens        MB  bytes/token    longest",
               "train              1          10,802       0.0        1.000     10,802",
               "val                1           1,202       0.0        0.998      1,202"]
    lines = lines_of(tmp_path, monkeypatch, capsys, given, **given)
    assert lines[:6] == ["data/e: 1 parts, 0 of them done; 1 workers; tokenizer bytes, 258 entries "
                         "(tiktoken)", "data/e: complete", *counted]
    assert lines[6].startswith("note: little text: ") and lines[9:] == [
        "next: python train.py --dataset=e --out_dir=out/e"]
    assert "would read this text" in lines[7] and lines[8].startswith("this run: ")
    lines = lines_of(tmp_path, monkeypatch, capsys, given, files=["c.py"], **given)
    assert lines[0] == "data/e: already prepared"
    assert lines[-1] == "next: python train.py c.py --dataset=e --out_dir=out/e"
    lines = lines_of(tmp_path, monkeypatch, capsys, {}, flags={"inspect": "data/e"})
    assert lines[3:] == [*counted, "train, 10,802 tokens: some words of a text",
                         "val, 1,202 tokens: some words of a text"]
    long = "".join("abcdefghij" * 20) + "\n"
    (tmp_path / "u.jsonl").write_bytes(jsonl({"text": f"{i}{long}"} for i in range(60)))
    lines_of(tmp_path, monkeypatch, capsys, {}, files=["c.py"], dataset="u", sources="u.jsonl")
    lines = lines_of(tmp_path, monkeypatch, capsys, {}, flags={"inspect": "data/u"})
    texts = [line.partition(": ")[2] for line in lines if line.startswith(("train, ", "val, "))]
    assert len(texts) == 6 and {len(text) for text in texts} == {63}  # 64 tokens, of them <s>


def test_some_clients_are_shown_as_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.csv").write_text("who,day,what\n" + "".join(
        f"{i % 9},{i},a{i}\n" for i in range(27)))
    source = {"path": "t.csv", "id": "who", "time": "day", "columns": ["day", "what"]}
    lines = lines_of(tmp_path, monkeypatch, capsys, {"dataset": "t"}, flags={"show": 2},
                     dataset="t", documents="table", sources=[source], block_size=256)
    shown = lines[lines.index(next(line for line in lines if line.startswith("--- "))):-1]
    clients = [line.split()[1].rstrip(",") for line in shown if line.startswith("--- ")]
    assert len(clients) == 2 and shown == [line for who in clients for line in (
        f"--- {who}, {2 + len(chr(10).join(rows_of(int(who))))} tokens", *rows_of(int(who)))]


def rows_of(who: int) -> list[str]:
    return ["day|what", *(f"{i}, a{i}" for i in (who, who + 9, who + 18))]


def test_what_cannot_go_together_is_one_line(tmp_path, monkeypatch, capsys):
    for given, files, flags, keys, says in (
            ({"workers": 2}, ["c.py"], {"ray": "auto"}, {}, "--workers counts processes of this "
             "machine, and --ray takes all places of a cluster; leave one out"),
            ({}, ["c.py"], {"show": 1}, {}, "--show is for dialogs and tables: --documents=chat; "
             "text is shown by --inspect"),
            ({"sources": "a"}, [], {}, {}, "sources without a dataset would be d, with the "
             "tokenizer bytes; add --dataset=NAME, best also config/quickstart.py"),
            *(({}, ["c.py"], {}, {"dataset": name}, f"dataset {name!r} is not the name of a folder "
               "under data/") for name in ("../x", "", ".x", "a/b", "a b", "-x"))):
        with pytest.raises(UserError) as error:
            lines_of(tmp_path, monkeypatch, capsys, given, files, flags, **keys)
        assert str(error.value) == says
    for name in ("a", "a.b-c+d", "7", "ы"):
        with pytest.raises(UserError, match="sources"):
            lines_of(tmp_path, monkeypatch, capsys, {}, ["c.py"], dataset=name, sources="none.txt")
    assert [*tmp_path.iterdir()] == []


# ---- dialogs -> tokens of a part

def encoder(room, drops=False, **source):
    """A DialogEncoder and the tokenizer of bytes with the tokens of dialogs."""
    words = parts_room.for_documents({"documents": "chat", "tokenizer": "bytes", "chat_template":
                                      "own"}, make_tokenizer("bytes"))
    return parts_room.DialogEncoder([{"path": "a"} | source], room, drops), words


def encoded(made, *rows, pairs=False):
    encode, words = made
    texts = []
    for number, row in enumerate(rows):
        text = records.Dialog(json.dumps(row))
        text.where = f"a:{number}".format
        texts.append(text)
    dropped, cut = Tally(), Tally()
    found = encode(words, texts, Part([], source=0), dropped, cut)
    return [[(len(ids), int(learned.sum())) for ids, learned in sides] for sides in found], {
        rule: (entry["count"], entry["first"]) for rule, entry in dropped.items()}, {
        rule: (entry["count"], entry["first"]) for rule, entry in cut.items()}


TALK = {"messages": [{"role": "user", "content": "12345"}, {"role": "assistant", "content": "123"},
                     {"role": "user", "content": "1"}, {"role": "assistant", "content": "1234"}]}


@pytest.mark.parametrize(("room", "drops", "most", "found", "dropped", "cut"), [
    (22, False, 22, [[(22, 9)]], {}, {}), (22, True, 22, [[(22, 9)]], {}, {}),
    (21, False, 22, [[(13, 4)]], {}, {"dialogs to block_size 20": (1, "a:0"),
                                      "learned tokens behind that": (5, "a:0")}),
    (13, False, 99, [[(13, 4)]], {}, {"dialogs to block_size 12": (1, "a:0"),
                                      "learned tokens behind that": (5, "a:0")}),
    (12, False, 99, [[]], {"longer than block_size 11": (1, "a:0")}, {}),
    (21, True, 99, [[]], {"longer than block_size 20": (1, "a:0")}, {}),
    (22, False, 21, [[]], {"over max_tokens 21": (1, "a:0")}, {}),
    (12, False, 21, [[]], {"over max_tokens 21": (1, "a:0")}, {})])
def test_a_dialog_is_cut_to_its_room(room, drops, most, found, dropped, cut):
    made = encoder(room, drops, max_tokens=most)
    assert encoded(made, TALK) == (found, dropped, cut)


PAIR = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "12345"},
                     {"role": "assistant", "content": "123"}, {"role": "user", "content": "1"},
                     {"role": "assistant", "content": "1234"}],
        "rejected": [{"role": "assistant", "content": "12"}]}


@pytest.mark.parametrize(("room", "drops", "most", "found", "dropped", "cut"), [
    # <s>, system 3, 7 + 5 before the last question of 3, the answers 6 and 4
    (48, False, 99, [[(25, 5), (23, 3)]], {}, {}), (48, True, 48, [[(25, 5), (23, 3)]], {}, {}),
    (47, False, 99, [[(13, 5), (11, 3)]], {}, {
        "prompts at their beginning, to block_size 46": (1, "a:0")}),
    (24, False, 99, [[(13, 5), (11, 3)]], {}, {
        "prompts at their beginning, to block_size 23": (1, "a:0")}),
    (23, False, 99, [[]], {"longer than block_size 22": (1, "a:0")}, {}),
    (47, True, 99, [[]], {"longer than block_size 46": (1, "a:0")}, {}),
    (47, False, 47, [[]], {"over max_tokens 47": (1, "a:0")}, {}),
    (48, False, 47, [[]], {"over max_tokens 47": (1, "a:0")}, {})])
def test_a_pair_loses_the_beginning_of_its_prompt(room, drops, most, found, dropped, cut):
    made = encoder(room, drops, max_tokens=most)
    row = json.loads(json.dumps(PAIR))
    row["messages"][2]["learn"] = False
    assert encoded(made, row) == (found, dropped, cut)


def test_rows_that_share_their_last_token_leave_a_tail(tmp_path, monkeypatch):
    (tmp_path / "work.tmp").mkdir()
    words = make_tokenizer("bytes")
    words.save(tmp_path)
    config = Settings(block_size=8, sources="a.txt", tokenizer="bytes")
    for tokens, tail in ((0, 0), (1, 1), (8, 8), (9, 0), (10, 1), (16, 7), (17, 0), (25, 0)):
        counts = {"documents": 1, "tokens": tokens, "bytes": 3, "longest": tokens}
        for number, own in enumerate(({"train": counts}, {"val": counts | {"tokens": 2}})):
            write_json(tmp_path / f"work.tmp/part-{number:05}.json", {
                "files": {}, "splits": own, "cut": {},
                "dropped": {"empty": {"count": 1, "first": f"{number}"}}})
        made = parts_room.merged(tmp_path, [Part([]), Part([])], config, words)
        assert made["splits"]["train"] == counts | {"tail": tail}
        assert made["splits"]["val"]["tail"] == 2 and made["block_size"] == 8
        assert made["dropped"] == {"empty": {"count": 2, "first": "0"}} and made["cut"] == {}
        assert made["tokenizer"] == {"spec": "bytes", "sha256": words.sha256, "vocab_size": 258,
                                     "bos": 256, "eos": 257, "engine": "tiktoken"}
        assert [*made["files"]] == ["tokenizer.json"] and "by_source" not in made


def test_a_tokenizer_is_made_once_and_its_engine_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} text of words " * 99)
    _, parts = survey(["a.txt", "b.txt"])
    config = Settings(tokenizer="bpe:300", sources=["a.txt", "b.txt"])
    (folder := tmp_path / "d").mkdir()
    seen = []
    real = Tokenizer.check
    monkeypatch.setattr(Tokenizer, "check", lambda self, texts: seen.append(texts) or
                        real(self, texts))
    words = parts_room.choose_tokenizer(config, folder, parts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: training the tokenizer bpe:300"
    assert lines[1].startswith(f"{folder}: bytes per token this one ") and len(lines) == 2
    assert [(tmp_path / f"{name}.txt").read_text() for name in "ba"] in seen
    words.save(folder)
    again = parts_room.choose_tokenizer(config, folder, parts)
    assert again.sha256 == words.sha256 and capsys.readouterr().out == ""
    monkeypatch.setattr(Tokenizer, "check", lambda self, texts: False)
    parts_room.choose_tokenizer(config, folder, parts)
    assert capsys.readouterr().out == (f"{folder}: the faster engine differs on this text; "
                                       "`tokenizers` is used\n")
    monkeypatch.setattr(Tokenizer, "check", lambda self, texts: seen.append(texts) or True)
    monkeypatch.setattr(parts_room, "CHECKED", 10)
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 50)
    for count in (1, 7, 8, 9, 16, 17, 40):  # of at most nine files, from the last on
        parts_room.choose_tokenizer(config, folder, [Part([records.replace(
            parts[0].pieces[0], path=str(tmp_path / f"{i:02}.txt"), size=10)])
            for i in range(count)])
        assert seen[-1] == [f"{i:02}" * 5 for i in reversed(range(count))][::count // 8 + 1]


@pytest.mark.parametrize(("keys", "kind"), [
    ({"documents": "text"}, None), ({"documents": "table"}, "TableEncoder"),
    ({"documents": "chat", "too_long": "drop"}, "DialogEncoder"),
    ({"documents": "preference", "too_long": "cut"}, "DialogEncoder")])
def test_what_encodes_documents(keys, kind):
    made = parts_room.encoder_of(Settings(block_size=64, sources="a", **keys))
    if kind is None:
        assert made is parts_room.encode_texts
    else:
        assert type(made).__name__ == kind and made.room == 65
    if kind == "DialogEncoder":
        assert made.drops == (keys["too_long"] == "drop") and made.sources == [{"path": "a"}]


def test_dialogs_need_a_template_of_ours_or_of_a_model(tmp_path):
    words = make_tokenizer("bytes")
    base = words.sha256
    assert parts_room.for_documents({"documents": "text"}, words) is words and words.base == ""
    recipe = {"documents": "chat", "tokenizer": "bytes", "chat_template": "own"}
    grown = parts_room.for_documents(recipe, words)
    assert (grown.vocab_size, grown.base) == (263, base) and grown.template
    with pytest.raises(UserError) as error:
        parts_room.for_documents(recipe | {"chat_template": "model"}, words)
    assert str(error.value) == ("chat_template=model takes the template of a model's folder, and "
                                "tokenizer=bytes is none")
    grown.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        made = parts_room.for_documents({"documents": "chat", "tokenizer": str(place),
                                         "chat_template": "model"}, make_tokenizer(str(place)))
        assert "add_generation_prompt" in made.template and made.base == grown.sha256


def test_pairs_are_shown_side_by_side(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_bytes(jsonl(
        {"prompt": f"q{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(12)))
    lines = lines_of(tmp_path, monkeypatch, capsys, {"dataset": "d"}, flags={"show": 4},
                     documents="preference", sources=["p.jsonl"])
    shown = lines[lines.index("--- p.jsonl"):-1]
    assert len(shown) == 12 and shown[::3] == ["--- p.jsonl"] * 4
    numbers = [line.partition("q")[2].partition("<")[0] for line in shown[1::3]]
    assert len(set(numbers)) == 4
    for number, chosen, rejected in zip(numbers, shown[1::3], shown[2::3], strict=True):
        for side, text, line in (("chosen", "good", chosen), ("rejected", "bad", rejected)):
            assert line == (f"{side}: <s><|user|>q{number}<|end|><|assistant|>[[{text}{number}"
                            "<|end|>]]")


def test_a_restart_writes_what_an_undisturbed_run_does(tmp_path, monkeypatch):
    """Also what the tokenizer was made of, which is noted alone."""
    rows = [{"messages": turns(random.Random(i))} for i in range(30)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    keys = {"documents": "chat", "sources": "a.jsonl", "block_size": 512, "dedup": "exact"}
    whole = shards.read_manifest(inside(tmp_path, monkeypatch, **keys))
    assert len(whole["tokenizer"]["base"]) == 64
    for name in ("make_shards", "merged"):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                inside(tmp_path, monkeypatch, dataset=name, **keys)
        folder = inside(tmp_path, monkeypatch, dataset=name, **keys)
        assert shards.read_manifest(folder) == whole and not (folder / "work.tmp").exists()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "merged", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            inside(tmp_path, monkeypatch, dataset="f", **keys)
    (tmp_path / "data/f/mine.txt").touch()
    with pytest.raises(UserError, match=r"data/f holds files of somebody else \(mine\.txt\); take"):
        inside(tmp_path, monkeypatch, dataset="f", **keys)
