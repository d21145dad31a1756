"""What to do with files that cannot be read as they are: lines to copy."""

import os
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from plainllama.text.stores import is_url

LOOK = 1 << 16  # bytes from which an encoding is guessed
PLAIN = "pandoc -t plain -o {text} {file}"
KINDS = {".html": PLAIN, ".htm": PLAIN, ".docx": PLAIN, ".epub": PLAIN, ".rtf": PLAIN,
         ".pdf": "pdftotext {file} {text}", ".zip": "unzip {file} -d {folder}",
         ".tar": "mkdir -p {folder} && tar -xf {file} -C {folder}"}
MAGIC = {b"PK\3\4": (".docx", ".zip"), b"%PDF": (".pdf",), b"\x1f\x8b": (".gz",),
         b"\xfd7zXZ": (".xz",), b"(\xb5/\xfd": (".zst",)}  # the first bytes of files of these kinds
ROWS = ("import csv, json; csv.field_size_limit(1 << 30); [print(json.dumps(row)) for row in "
        "csv.DictReader(open({file}, encoding='utf-8-sig', newline=''){how})]")
TEXTS = "import json; [print(json.dumps(dict(text=text))) for text in json.load(open({file}))]"
PLAINLY = "and name the file: what mends it is then said"
# columns by whose names a record is known
DIALOG = {"messages", "conversations", "conversation", "dialog", "instruction", "prompt",
          "question", "response"}
TEXT = ("content", "body", "article", "document", "story", "abstract", "markdown", "code", "raw")


def for_kind(path: str) -> str:
    """Say how a file of an unknown kind becomes one that is read; '' if that is not known."""
    name, kind = Path(path), Path(path).suffix.lower()
    if is_url(path):
        return f"; download it, {PLAINLY}" if kind else "; a folder of a web server ends in /"
    words = {"file": shlex.quote(path), "text": shlex.quote(unused(name.with_suffix(".txt"))),
             "folder": shlex.quote(unused(name.with_suffix("")))}
    if kind in KINDS:
        return f"; make text of it: {KINDS[kind].format(**words)}"
    if kind not in (".csv", ".tsv"):
        return ""
    rows = unused(name.with_suffix(".jsonl"))
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(LOOK).strip()
    mark = max("\t;,", key=line.count)  # of equally many the first: a tab is no part of a name
    names = [name.strip('" ') for name in line.split(mark)]
    code = ROWS.format(file=repr(path), how="" if mark == "," else f", delimiter=chr({ord(mark)})")
    return (f"; make rows of it: python -c {quoted(code)} > {shlex.quote(rows)}, and "
            f"then {source(rows, names)}; of clients and their transactions, say "
            "--documents=table")


def unused(path: Path) -> str:
    """Give the name of a file to be made: this one, or one like it if there is such a file."""
    while path.exists():
        path = path.with_name(f"new_{path.name}")
    return str(path)


def for_left(path: str, left: Counter) -> str:
    """List what of a folder or glob is not read, how often it is there, and how Markdown would be
    read; '' for nothing."""
    said = ", ".join(f"{count} {what}" for what, count in sorted((+left).items()))
    if left[".md"]:
        said += f" (read if it is named: --sources={shlex.quote(os.path.join(path, '**/*.md'))})"
    return said


def source(path: str, names: Iterable[str]) -> str:
    """Write the option that names a column as the text: the likeliest of what there is."""
    names = list(names)
    likely = [name for name in ("text", *TEXT) if name in names]
    likely += [name for name in names if name.lower() not in ("id", "index", "")]
    column = (likely or names or ["content"])[0]
    if column == "text":
        return f"--sources={shlex.quote(path)}"
    return f"--sources={quoted(str({'path': path, 'column': column}))}"


def quoted(text: str) -> str:
    """Quote a word of a shell, so that ' in it can still be read."""
    return shlex.quote(text) if set(text) & set('"$`!\\') else f'"{text}"'


def for_column(path: str, names: list[str]) -> str:
    """Say what to do with a file of records that have no column of the asked name, but these."""
    if {"chosen", "rejected"} <= set(names):
        return "its rows are pairs: --documents=preference"
    if DIALOG & set(names):
        return "its rows look like dialogs: say --documents=chat, best with config/chat.py"
    return f"name another: {source(path, names)}; or say --documents=chat"


def for_bytes(path: str) -> str:
    """Say how a text that is not UTF-8 becomes it, or what the file is, if it is no text."""
    begin = b""
    if os.path.exists(path):
        with open(path, "rb") as file:
            begin = file.read(LOOK)
    for magic, kinds in MAGIC.items():
        if begin.startswith(magic):
            return (f"by its first bytes it is no text, but {' or '.join(kinds)}; give it that "
                    "name, and what mends it is then said")
    encoding = "utf-16" if begin[:2] in (b"\xff\xfe", b"\xfe\xff") else (
        "utf-16le" if begin[1:2] == b"\0" else "cp1252" if any(
            0x80 <= byte < 0xa0 for byte in begin) else "latin1")
    new = unused(Path(path).with_name(f"utf8_{Path(path).name}"))
    return (f"it looks like {encoding}: iconv -f {encoding} -t utf-8 {shlex.quote(path)} > "
            f"{shlex.quote(new)}")


def packed(path: str) -> bool:
    """Whether a file has to be unpacked before another program can read it."""
    return Path(path).suffix.lower() in (".gz", ".xz", ".zst")


def for_dropped(dropped: dict, paths: dict[str, str]) -> list[str]:
    """Say what to do where nothing is left but what these rules dropped; `paths`: of labels."""
    said = []
    for rule, entry in dropped.items():
        path = max((label for label in paths if entry["first"].startswith(label)), key=len,
                   default="")
        path = paths.get(path, "my.jsonl")
        if rule.startswith("no column"):
            said.append(for_column(path, rule.rpartition(", only ")[2].split(", ")))
        elif rule in ("invalid utf-8", "not an object") and (is_url(path) or packed(path)):
            said.append(f"{'unpack' if packed(path) else 'download'} it, {PLAINLY}")
        elif rule == "invalid utf-8":
            said.append(for_bytes(path))
        elif rule == "not an object":
            code = TEXTS.format(file=repr(path))
            rows = shlex.quote(unused(Path(path).with_suffix(".jsonl")))
            said.append(f"if they are texts, make rows of them: python -c {quoted(code)} > "
                        f"{rows}")
        elif rule == "broken line" and entry["first"].endswith(":1"):
            said.append("a file that is one JSON array, and no row a line, is named .json")
        elif rule.startswith("no known fields"):
            said.append("say which they are, as fields={'prompt': 'YOURS', ...}, or give a "
                        "converter")
    return said
