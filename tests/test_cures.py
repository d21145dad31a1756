"""Files that cannot be read as they are: each error ends with a line that makes them readable."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from plainllama.settings import UserError
from plainllama.text import cures, documents, selection
from plainllama.text.documents import Tally
from plainllama.text.records import KINDS
from plainllama.text.sources import survey

TEXT = "Käse und Öl, the same words again and again. " * 40
ROWS = [{"id": i, "content": f"{i} {TEXT}"} for i in range(9)]


def texts(source, kind: str = "text") -> list[str]:
    """What prepare.py would read of a source."""
    parts = survey(source, documents=kind)[1]
    selection.choose_hold_out(parts, 0.1)
    return list(documents.documents(parts, Tally()))


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# file -> its bytes, a pattern of the message whose first group is a line for a shell
ODD = {
    "latin.txt": (TEXT.encode("latin1"), r"looks like latin1: (iconv .*)"),
    "windows.txt": (("„" + TEXT).encode("cp1252"), r"looks like cp1252: (iconv .*)"),
    "wide.txt": (TEXT.encode("utf-16"), r"looks like utf-16: (iconv .*)"),
    "it's $1 wide.jsonl": (json.dumps({"text": TEXT}, ensure_ascii=False).encode("utf-16le"),
                           r"looks like utf-16le: (iconv .*)"),
    "list.json": (json.dumps([f"{i} {TEXT}" for i in range(9)]).encode(),
                  r"300 not|not an object .* make rows of them: (python -c .*)"),
    "table.csv": (f"id,text\n1,\"{TEXT}\"\n2,\"b {TEXT}\"\n".encode(),
                  r"(python -c .*), and then --sources=table.jsonl; of clients"),
    "excel.csv": (f"\ufefftext;id\n{TEXT * 99};1\nb {TEXT};2\n".encode(),
                  r"(python -c .*), and then --sources=excel.jsonl; of clients"),
    "table.tsv": (f"id\ttext\n1\t{TEXT}\n2\tb {TEXT}\n".encode(), r"(python -c .*), and then"),
}


@pytest.mark.parametrize("name", ODD)
def test_the_line_of_the_message_makes_the_file_readable(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    data, pattern = ODD[name]
    Path(name).write_bytes(data)
    with pytest.raises(UserError) as found:
        texts(name)
    assert "\n" not in str(found.value)
    line = re.search(pattern, str(found.value))[1]
    subprocess.run(["bash", "-c", line], check=True,
                   env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    made = re.search(r" > (.*)", line)[1]
    made = subprocess.run(["bash", "-c", f"echo {made}"], capture_output=True, text=True,
                          check=True).stdout.strip()
    assert "Käse und Öl, the same words" in texts(made)[0]


@pytest.mark.parametrize(("name", "data", "says"), [
    ("col.jsonl", jsonl(ROWS), "--sources=\"{'path': 'col.jsonl', 'column': 'content'}\""),
    ("col.json", json.dumps(ROWS).encode(), "{'path': 'col.json', 'column': 'content'}"),
    ("odd.jsonl", jsonl([{"id": 1, "line": "a"}]), "{'path': 'odd.jsonl', 'column': 'line'}"),
    ("array.jsonl", json.dumps(ROWS, indent=1).encode(), "is named .json"),
    ("chat.jsonl", jsonl([{"messages": [{"role": "user", "content": "a"}]}]), "--documents=chat"),
    ("turns.jsonl", jsonl([{"instruction": "a", "output": "b"}]), "--documents=chat"),
    ("pairs.jsonl", jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
     "--documents=preference"),
    ("a b.html", b"<p>hello", "make text of it: pandoc -t plain -o 'a b.txt' 'a b.html'"),
    ("a.pdf", b"%PDF", "pdftotext a.pdf a.txt"), ("a.zip", b"PK", "unzip a.zip -d a"),
    ("word.txt", b"PK\3\4\xff", "by its first bytes it is no text, but .docx or .zip; give it"),
    ("page.txt", b"%PDF-1.7 \xff", "it is no text, but .pdf; give it that name"),
    ("packed.txt", gzip.compress(b"a", mtime=0), "it is no text, but .gz; give it that name"),
    ("a.xyz", b"", f"unknown kind of file; known are {', '.join(KINDS)}, also packed")])
def test_what_is_said_of_odd_files(name, data, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    with pytest.raises(UserError) as found:
        texts(name)
    assert says in str(found.value)


@pytest.mark.parametrize("name", ["table.csv", "list.json", "latin.txt", "a.html", "a.zip"])
def test_no_line_writes_over_a_file(name, tmp_path, monkeypatch):
    """The names that it makes are not there yet."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(ODD[name][0] if name in ODD else b"<p>hello")
    for there in ("table.jsonl", "list.jsonl", "utf8_latin.txt", "a.txt", "a"):
        Path(there).write_text("mine")
    with pytest.raises(UserError) as found:
        texts(name)
    assert re.search(r" new_(table.jsonl|list.jsonl|utf8_latin.txt|a.txt|a)\b", str(found.value))
    assert not re.search(r" (> table|> list|> utf8|-o a|-d a)", str(found.value))


def test_a_packed_file_is_unpacked_before_it_is_mended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt.gz").write_bytes(gzip.compress(TEXT.encode("latin1")))
    with pytest.raises(UserError, match="unpack it, and name the file: what mends it is then"):
        texts("latin.txt.gz")


def test_the_named_column_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("col.jsonl").write_bytes(jsonl(ROWS))
    assert cures.source("col.jsonl", ["id", "content"]).startswith('--sources="{')
    assert len(texts({"path": "col.jsonl", "column": "content"})) == 9


def test_markdown_is_read_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.md").write_text("# A\n\n" + TEXT)
    Path("notes/b.MD").write_text("# B\n\n" + TEXT)
    with pytest.raises(UserError, match=r"2 .md .read if it is named: --sources='notes/.*/..md'"):
        texts("notes")
    for source in ("notes/**/*.[mM][dD]", "notes/*", ["notes/a.md", "notes/b.MD"]):
        assert [text[:3] for text in texts(source)] == ["# A", "# B"]
    with pytest.raises(UserError, match="not plain text"):
        survey("notes/a.md", documents="chat")


# ---- each cure, to the letter

@pytest.mark.parametrize(("name", "says"), [
    ("a b.html", "; make text of it: pandoc -t plain -o 'a b.txt' 'a b.html'"),
    ("a.PDF", "; make text of it: pdftotext a.PDF a.txt"),
    ("a.zip", "; make text of it: unzip a.zip -d a"), ("a.exe", ""), ("a", ""),
    ("a.tar", "; make text of it: mkdir -p a && tar -xf a.tar -C a"),
    ("https://h/a.pdf", "; download it, and name the file: what mends it is then said"),
    ("https://h/a", "; a folder of a web server ends in /")])
def test_a_file_of_another_kind(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cures.for_kind(name) == says
    for there in ("a b.txt", "a.txt", "new_a.txt"):
        Path(there).touch()
    if says.startswith("; make text of it: p"):  # what is there stays
        assert cures.for_kind(name) == says.replace("a b.txt", "new_a b.txt").replace(
            " a.txt", " new_new_a.txt")


@pytest.mark.parametrize(("head", "mark", "column"), [
    ("id,text", "", "--sources=t.jsonl"), ("id;body", "chr(59)", "body"), ("id\tx", "chr(9)", "x"),
    ("a;b,c;d", "chr(59)", "a"), ('"Index";"Title"', "chr(59)", "Title"), ("id", "chr(9)", "id"),
    ("raw,body", "", "body")])
def test_a_table_becomes_rows(head, mark, column, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(head + "\n1,2,3\n", encoding="utf-8-sig")
    said = cures.for_kind("t.csv")
    assert said.startswith("; make rows of it: python -c ") and said.endswith(
        "; of clients and their transactions, say --documents=table")
    assert (f", delimiter={mark})" in said) == bool(mark) and " > t.jsonl, and then " in said
    assert column in said.partition("and then ")[2]


def test_what_is_left_is_listed_by_its_name():
    left = Counter({".md": 2, ".py": 1, "links to nothing": 0})
    assert cures.for_left("my data", left) == (
        "2 .md, 1 .py (read if it is named: --sources='my data/**/*.md')")
    assert cures.for_left("d", Counter({"b": 3, "a": 1})) == "1 a, 3 b"
    assert cures.for_left("d", Counter()) == "" == cures.for_left("d", Counter({"a": 0}))


@pytest.mark.parametrize(("names", "says"), [
    (["chosen", "rejected", "x"], "its rows are pairs: --documents=preference"),
    (["chosen", "x"], "name another: --sources=\"{'path': 'p', 'column': 'chosen'}\"; or say "
     "--documents=chat"),
    (["id", "prompt"], "its rows look like dialogs: say --documents=chat, best with "
     "config/chat.py"),
    (["id", "text"], "name another: --sources=p; or say --documents=chat"),
    (["ID", "Index", ""], "name another: --sources=\"{'path': 'p', 'column': 'ID'}\"; or say "
     "--documents=chat"),
    ([], "name another: --sources=\"{'path': 'p', 'column': 'content'}\"; or say "
     "--documents=chat")])
def test_a_column_that_is_not_there(names, says):
    assert cures.for_column("p", names) == says


@pytest.mark.parametrize(("content", "encoding"), [
    (b"\xff\xfea\0", "utf-16"), (b"\xfe\xff\0a", "utf-16"), (b"a\0b\0", "utf-16le"),
    (b"a\x80", "cp1252"), (b"a\x9f", "cp1252"), (b"a\xa0\x7f", "latin1"), (b"\xe4\xf6", "latin1"),
    (b"\xff", "latin1"), (b"x" * 65535 + b"\x80", "cp1252"), (b"x" * 65536 + b"\x80", "latin1"),
    (None, "latin1")])
def test_an_encoding_is_guessed(content, encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("a b").write_bytes(content)
    assert cures.for_bytes("a b") == (f"it looks like {encoding}: iconv -f {encoding} -t utf-8 "
                                      "'a b' > 'utf8_a b'")


@pytest.mark.parametrize(("rule", "first", "says"), [
    ("no column 'text', only id, body", "d/a.jsonl:1", ["name another: --sources=\"{'path': "
     "'/x/d/a.jsonl', 'column': 'body'}\"; or say --documents=chat"]),
    ("invalid utf-8", "a.jsonl.gz:3", ["unpack it, and name the file: what mends it is then said"]),
    ("not an object", "u:1", ["download it, and name the file: what mends it is then said"]),
    ("invalid utf-8", "else:1", ["it looks like latin1: iconv -f latin1 -t utf-8 my.jsonl > "
                                 "utf8_my.jsonl"]),
    ("broken line", "d/a.jsonl:1", ["a file that is one JSON array, and no row a line, is named "
                                    ".json"]),
    ("broken line", "d/a.jsonl:2", []), ("empty", "d/a.jsonl:1", []),
    ("no known fields", "d/a.jsonl:7", ["say which they are, as fields={'prompt': 'YOURS', ...}, "
                                        "or give a converter"]),
    ("not an object", "d/a.jsonl:7", ["if they are texts, make rows of them: python -c \"import "
     "json; [print(json.dumps(dict(text=text))) for text in json.load(open('/x/d/a.jsonl'))]\" > "
     "/x/d/a.jsonl"])])
def test_what_was_dropped_is_mended(rule, first, says):
    paths = {"d/a": "/x/short", "d/a.jsonl": "/x/d/a.jsonl", "u": "https://h/u",
             "a.jsonl.gz": "/x/a.jsonl.gz"}
    assert cures.for_dropped({rule: {"count": 2, "first": first}}, paths) == says


def test_words_are_quoted_so_that_they_can_be_read():
    assert [cures.quoted(word) for word in ("a 'b'", 'a "b"', "a$b", "a`b", "a\\b", "a!b")] == [
        "\"a 'b'\"", "'a \"b\"'", "'a$b'", "'a`b'", "'a\\b'", "'a!b'"]
    assert [cures.packed(name) for name in ("a.gz", "a.XZ", "a.zst", "a.zip", "a")] == [
        True, True, True, False, False]


def test_so_much_is_looked_at():
    assert cures.LOOK == 2**16
