"""Files that cannot be read as they are: each error ends with a line that makes them readable."""

import gzip
import json
import os
import re
import subprocess
import sys
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
