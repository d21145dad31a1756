"""A client's transactions -> text: its formats, names of columns, words for codes, and what of that
is drawn for each client.

This is the one renderer: what a model learns from and what it is asked about are written by it, and
the hash of its settings says whether both are alike.
"""

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from plainllama.files import as_json, sha256_bytes
from plainllama.settings import UserError, nearest

VERSION = 1  # of what is written here: raised where the text of a table changes
# keys of a source that holds a table, with what they take
KEYS = {"id": str, "time": str, "time_format": str, "decimal": str, "columns": list,
        "format": object, "shuffle": bool, "group": str, "seed": int}
COLUMN = {"column": str, "name": object, "unit": str, "decimals": int, "words": object}
EXAMPLE = "{'path': 'my.csv', 'id': 'client', 'time': 'date', 'columns': ['date', 'amount']}"
CODE = re.compile(r"[0-9]+[eE][0-9]+")  # more likely than a number
WHOLE = re.compile(r"-?[0-9]+\.0")
CACHED = 65536  # cells and times that are kept as they were read or written
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# text that stands without quotes in a line of cells, and in YAML, which has words of its own
BARE = re.compile(r'(?![#"\s])(?:(?!, )[^|\x00-\x1f\x7f-\x9f\u2028\u2029])+(?<!\s)')
WORDS = re.compile(r"[^\W\d_][\w-]*( [\w-]+)*")
TAKEN = {"y", "n", "yes", "no", "true", "false", "on", "off", "null"}
UNSEEN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # not allowed, or lost, in YAML


class Client(NamedTuple):
    """A client and what it did: `columns`, name -> values (None, int, float or text), the oldest
    first."""

    id: str
    columns: dict[str, list]


class Table(str):
    """A client's table as text: never cut as text is."""

    client: Client
    renderer: "Renderer"
    where: Callable[[], str]  # names its place
    kept: str  # the text of what a context has room for


class Number(str):
    """A number that is written as it stands."""


# ---- a value -> a cell, by format

def literal(value: Any) -> str:
    """Write a number so that JSON, YAML and SQL read it alike: YAML wants a point before an e."""
    text = str(value)
    return text if "." in text else text.replace("e", ".0e")


def quoted(text: str) -> str:
    """Write text in quotes, as JSON does."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def bare(value: Any) -> str:
    """Write a cell of a line: text in quotes only where it would be taken for something else."""
    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, Number):
        return literal(value)
    return value if BARE.fullmatch(value) and not NUMBER.fullmatch(value) else quoted(value)


def json_cell(value: Any) -> str:
    """Write a value of JSON."""
    if value is None:
        return "null"
    text = isinstance(value, str) and not isinstance(value, Number)
    return quoted(value) if text else literal(value)


def yaml_cell(value: Any) -> str:
    """Write a value of YAML: words without quotes, if YAML has no meaning for them."""
    word = isinstance(value, str) and WORDS.fullmatch(value) and value.lower() not in TAKEN
    return value if word else json_cell(value)


def html_cell(value: Any) -> str:
    """Write what stands between <td> and </td>."""
    return bare(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_cell(value: Any) -> str:
    """Write what stands between two bars."""
    return bare(value).replace("\\", "\\\\").replace("|", "\\|")


def sql_cell(value: Any) -> str:
    """Write a literal of SQL, which knows no NUL inside of text."""
    if value is None or not isinstance(value, str) or isinstance(value, Number):
        return "NULL" if value is None else literal(value)
    return "'" + value.replace("'", "''").replace("\0", "'||char(0)||'") + "'"


# ---- cells -> a table: names of the columns, rows of cells, the column that groups them

Rows = list[tuple[str, ...]]


def as_plain(names: list[str], rows: Rows, group: int) -> str:
    """Write a line of names, and a line for each transaction."""
    return "\n".join(["|".join(map(bare, names)), *map(", ".join, rows)])


def as_grouped(names: list[str], rows: Rows, group: int) -> str:
    """Write a section for each value of one column, in the order of their first transactions."""
    sections: dict[str, list[str]] = {}
    for row in rows:
        sections.setdefault(row[group], []).append(", ".join(row[:group] + row[group + 1:]))
    lines = ["|".join(map(bare, names[:group] + names[group + 1:]))]
    for value, own in sections.items():
        lines += [f"### {bare(names[group])}: {value}".rstrip(), *own]
    return "\n".join(lines)


def as_markdown(names: list[str], rows: Rows, group: int) -> str:
    """Write a table with bars."""
    lines = [map(markdown_cell, names), ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_html(names: list[str], rows: Rows, group: int) -> str:
    """Write a table of HTML, a row a line."""
    head = "".join(f"<th>{html_cell(name)}</th>" for name in names)
    body = (f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return "\n".join(["<table>", f"<tr>{head}</tr>", *body, "</table>"])


def as_objects(names: list[str], rows: Rows, group: int) -> str:
    """Write an array of objects, one a line."""
    keys = [f"{quoted(name)}: " for name in names]
    objects = ("{" + ", ".join(map(str.__add__, keys, row)) + "}" for row in rows)
    return "[\n" + ",\n".join(objects) + "\n]"


def as_yaml(names: list[str], rows: Rows, group: int) -> str:
    """Write a list of mappings, a value a line."""
    keys = [f"{'  ' if i else '- '}{yaml_cell(name)}: " for i, name in enumerate(names)]
    return "\n".join(["transactions:", *("\n".join(map(str.__add__, keys, row)) for row in rows)])


def as_sql(names: list[str], rows: Rows, group: int) -> str:
    """Write a statement that inserts the transactions."""
    columns = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
    values = ",\n".join(f"({', '.join(row)})" for row in rows)
    return f"INSERT INTO transactions ({columns}) VALUES\n{values};"


FORMATS: dict[str, tuple[Callable[[Any], str], Callable[[list[str], Rows, int], str]]] = {
    "plain": (bare, as_plain), "yaml": (yaml_cell, as_yaml), "json": (json_cell, as_objects),
    "html": (html_cell, as_html), "markdown": (markdown_cell, as_markdown),
    "sql": (sql_cell, as_sql), "grouped": (bare, as_grouped)}


# ---- a client -> text

class Renderer:
    """Writes clients as text, by settings_of() a source."""

    def __init__(self, settings: dict):
        self.settings, self.columns = settings, settings["columns"]
        self.cell = lru_cache(CACHED, typed=True)(self.made_cell)  # the same ones come often

    def made_cell(self, form: str, number: int, value: Any) -> str:
        """Write a value of column `number`."""
        column = self.columns[number]
        if value is None:
            return FORMATS[form][0](None)
        value = column["words"].get(code_of(value), value) if column["words"] else value
        if column["decimals"] is not None and not isinstance(value, str):
            text = f"{value:.{column['decimals']}f}"
            value = Number(text if float(text) else text.lstrip("-"))
        return FORMATS[form][0](value)

    def text(self, client: Client, newest: int = 0) -> str:
        """Write a client's table, or its `newest` transactions: what is drawn for it is the
        same."""
        draw, settings = random.Random(f"{self.settings['seed']}/{client.id}"), self.settings
        form, order = draw.choice(settings["formats"]), list(range(len(self.columns)))
        if settings["shuffle"]:
            draw.shuffle(order)
        names = [draw.choice(self.columns[i]["names"]) for i in order]
        cells = [[self.cell(form, i, value)
                  for value in client.columns[self.columns[i]["column"]][-newest:]] for i in order]
        read = [self.columns[i]["column"] for i in order]
        group = read.index(settings["group"]) if settings["group"] else 0
        return FORMATS[form][1](names, list(zip(*cells, strict=True)), group)

    def unknown(self, client: Client) -> dict[str, int]:
        """Count what is written as it came, by what names it: codes without a word, and text where
        decimals are asked."""
        found = {}
        for column in self.columns:
            name, values = column["column"], client.columns[column["column"]]
            if column["words"]:
                found[f"note: codes of {name} without a word"] = sum(
                    value is not None and code_of(value) not in column["words"]
                    for value in values)
            elif column["decimals"] is not None:
                found[f"note: values of {name} that are no numbers, so without decimals"] = sum(
                    isinstance(value, str) for value in values)
        return {rule: count for rule, count in found.items() if count}


def code_of(value: Any) -> str:
    """Write a code or an id: 5 and 5.0 are one, be they numbers or text."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value)
    return text.removesuffix(".0") if text.endswith(".0") and WHOLE.fullmatch(text) else text


# ---- a source -> its settings

def settings_of(source: dict) -> dict:
    """Read of a source how its clients are written: all that decides their text. UserError for what
    is not there, not known or without effect."""
    path = source["path"]
    for name in ("id", "columns"):
        if not source.get(name):
            raise UserError(f"sources: {path} has no {name!r}; a table is {EXAMPLE}")
    if "time_format" in source and not source.get("time"):
        raise UserError(f"sources: time_format of {path} has no effect without 'time'")
    if source.get("decimal", ",") != ",":
        raise UserError(f"sources: decimal of {path} is ',', where a comma stands before decimals "
                        f"(a point always may), not {source['decimal']!r}")
    formats = source.get("format", "plain")
    formats = [formats] if isinstance(formats, str) else formats
    if not (isinstance(formats, list) and formats):
        raise UserError(f"sources: format of {path} is one of {', '.join(FORMATS)}, or a list")
    for form in formats:
        if not (isinstance(form, str) and form in FORMATS):
            raise UserError(f"sources: format {form!r} of {path} is none of {', '.join(FORMATS)}"
                            f"{nearest(str(form), FORMATS)}")
    columns = [column_of(path, item) for item in source["columns"]]
    names = [name.casefold() for column in columns for name in column["names"]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"sources: columns of {path}: {twice[0]!r} names two of them")
    group, known = source.get("group", ""), [column["column"] for column in columns]
    if bool(group) != ("grouped" in formats):
        raise UserError(f"sources: {path}: group={group!r} and format=grouped go together")
    if group and group not in known:
        raise UserError(f"sources: group {group!r} of {path} is none of its columns"
                        f"{nearest(group, known)}")
    drawn = len(formats) > 1 or source.get("shuffle") or len(names) > len(columns)
    if "seed" in source and not drawn:
        raise UserError(f"sources: seed of {path} has no effect: nothing is drawn; give several "
                        "formats, several names of a column, or 'shuffle': True")
    shown = source.get("time_format", "") if source.get("time") in known else ""
    return {"version": VERSION, "formats": formats, "time_format": shown, "columns": columns,
            "shuffle": source.get("shuffle", False), "group": group, "seed": source.get("seed", 1)}


def hash_of(settings: dict) -> str:
    """Hash a renderer's settings: equal where equal clients become equal text."""
    return sha256_bytes(as_json(settings).encode())


def column_of(path: str, item: Any) -> dict:
    """Read an item of `columns`."""
    item = {"column": item} if isinstance(item, str) else item
    where = f"sources: columns of {path}"
    if not (isinstance(item, dict) and isinstance(item.get("column"), str) and item["column"]):
        raise UserError(f"{where}: {item!r} is not a name or {{'column': NAME, ...}}")
    for key, value in item.items():
        if key not in COLUMN:
            raise UserError(f"{where}: {item['column']} has an unknown key {key!r}"
                            f"{nearest(str(key), COLUMN)}")
        if COLUMN[key] is not object and type(value) is not COLUMN[key]:
            raise UserError(f"{where}: {key} of {item['column']} is not {value!r}, but "
                            f"{'a whole number' if key == 'decimals' else 'a text'}")
    names = item.get("name", item["column"])
    names = [names] if isinstance(names, str) else names
    if not (isinstance(names, list) and names and all(isinstance(n, str) and n for n in names)):
        raise UserError(f"{where}: name of {item['column']} is a text or a list, not {names!r}")
    unit, decimals = item.get("unit", ""), item.get("decimals")
    if decimals is not None and not 0 <= decimals <= 15:
        raise UserError(f"{where}: decimals of {item['column']} are 0 to 15, not {decimals}")
    return {"column": item["column"], "decimals": decimals, "words": words_of(where, item),
            "names": [f"{name} ({unit})" if unit else name for name in names]}


def words_of(where: str, item: dict) -> dict[str, str]:
    """Read the words for the codes of a column: a dict, or a file .json or .csv of pairs."""
    words = item.get("words", {})
    if isinstance(words, str):
        path = Path(words).expanduser()
        if path.suffix.lower() not in (".json", ".csv") or not path.is_file():
            raise UserError(f"{where}: words of {item['column']}: {words} is no file .json or .csv")
        try:
            text = path.read_text("utf-8-sig")
            words = json.loads(text) if path.suffix.lower() == ".json" else [*filter(
                None, csv.reader(io.StringIO(text), delimiter=delimiter(text), strict=True))]
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path}: it holds no pairs of code and word ({error})") from None
    pairs = [*words.items()] if isinstance(words, dict) else words
    sound = isinstance(pairs, list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], str)
        for pair in pairs)
    if not sound or ("words" in item and not pairs):
        raise UserError(f"{where}: words of {item['column']} are {{code: word}} or a file of such "
                        "pairs, two cells a row")
    found: dict[str, str] = {}
    for code, word in pairs:
        if found.setdefault(code_of(code), word) != word:
            raise UserError(f"{where}: words of {item['column']}: {code} is {word!r} and "
                            f"{found[code_of(code)]!r}; keep one")
    return found


def delimiter(text: str) -> str:
    """Tell what stands between the cells of a .csv, by its first line."""
    return max(",;\t|", key=text.partition("\n")[0].count)


# ---- values as they come

def typed(text: str) -> int | float | str:
    """Read a cell of text: a number where that loses nothing but spelling (007 stays text, and so
    does what a double does not hold, and 4E10, which programs write as 4e+10)."""
    if not NUMBER.fullmatch(text) or CODE.fullmatch(text):
        return text
    if text.lstrip("-").isdigit():
        return int(text) if len(text) < 19 else text
    number = float(text) + 0.0  # -0.0 is 0.0, as they are equal
    same = math.isfinite(number) and Decimal(repr(number)) == Decimal(text)
    return number if same else text
