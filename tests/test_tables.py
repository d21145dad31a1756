"""Tables of transactions: what becomes of files, whose they are, and what their text gives back to
readers that share nothing with the program."""

import csv
import datetime
import decimal
import gzip
import hashlib
import html.parser
import io
import itertools
import json
import lzma
import math
import random
import re
import shutil
import sqlite3
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_script
from test_prepare import inside, stored

import prepare
from plainllama.settings import UserError
from plainllama.text import clients as reading
from plainllama.text import embedded_table, tables
from plainllama.text.documents import Part, Tally
from plainllama.text.sources import clients, described, survey
from plainllama.text.tables import FORMATS, Client, Renderer, hash_of, settings_of
from plainllama.tokens import shards
from plainllama.tokens.newest import TableEncoder
from plainllama.tokens.rows import FitRows, val_rows
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer

HOSTILE = ["NaN", "nan", "NULL", "null", "", " ", "007", "-5", "1e5", "12", "1.50", "a, b",
           "a|b", "# x", "### y", '"', 'say "no"', "it's", "<td>&amp;</td>", "a\nb", "\r", "\t",
           "\\", "\0", "\x85", "\u2028", "\ufeff", "Привет", "日本", "😀", "yes", "No", "~", "true",
           "- x", "a: b", "1970-01-01", "1969-12-31", "{}", "[1]", "&lt;", "x,", ",", "0x1F",
           "a #b", "1:30", "1_000", ".5", "-", "'", "''", "--", "/*", "\x7f", "</table>", "y"]
NUMBERS = [0, -1, 5, 10**12, -(10**17), 2**62, 1e-9, -1e-9, 1e12, 1.5, 0.1, -2.5e-300, 1e300,
           5e-324, 12345678.125, 1e16, 3.0, -0.0]


def source(**keys):
    return {"path": "t.csv", "id": "who", "time": "day", "columns": ["day", "what", "sum"]} | keys


def rendered(rows, names, form, **keys):
    """Rows of values as text of a format."""
    settings = settings_of({"path": "t", "id": "i", "columns": names, "format": form} | keys)
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    return Renderer(settings).text(Client("1", columns))


# ---- readers of the formats

def from_json(text):
    found = json.loads(text)
    return [*found[0]], [[*row.values()] for row in found]


def from_yaml(text):
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(text)["transactions"]
    return [*found[0]], [[*row.values()] for row in found]


class Cells(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "tr", "th", "td")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def value_of(cell):
    """What a cell of a line says: nothing, text in quotes, a number, or text."""
    if cell == "":
        return None
    if cell[0] == '"':
        return json.loads(cell)
    if re.fullmatch(r"-?\d+", cell, re.ASCII) and cell.lstrip("-") == str(int(cell.lstrip("-"))):
        return int(cell)
    if re.fullmatch(r"-?\d+\.\d+(e[+-]\d+)?", cell, re.ASCII):
        return float(cell)
    return cell


def from_html(text):
    parser = Cells()
    parser.feed(text)
    parser.close()
    names, *rows = [[*map(value_of, row)] for row in parser.rows]
    return names, rows


def from_sql(text):
    names = re.match(r"INSERT INTO transactions \((.*?)\) VALUES\n", text, re.DOTALL)[1]
    with sqlite3.connect(":memory:") as base:
        base.execute(f"CREATE TABLE transactions ({names})")
        base.execute(text)
        found = base.execute("SELECT * FROM transactions")
        return [column[0] for column in found.description], [[*row] for row in found]


def cells_of(line):
    """The cells of a line with ", " between them, where one in quotes may hold that."""
    found = re.findall(r'("(?:[^"\\]|\\.)*"|(?:(?!, ).)*)(?:, |$)', line)
    return found if line.endswith(", ") else found[:-1] if found[-1] == "" and line else found


def from_plain(text):
    head, *lines = text.split("\n")
    return head.split("|"), [[*map(value_of, cells_of(line))] for line in lines]


def from_markdown(text):
    head, _, *lines = text.split("\n")
    undo = [[re.sub(r"\\(.)", r"\1", cell) for cell in re.split(r"(?<=(?<!\\)) \| ", line[2:-2])]
            for line in (head, *lines)]
    return undo[0], [[*map(value_of, row)] for row in undo[1:]]


READERS = {"json": from_json, "yaml": from_yaml, "html": from_html, "sql": from_sql,
           "plain": from_plain, "markdown": from_markdown}


def random_value(draw):
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice(HOSTILE)
    if kind == 1:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice([None, draw.randint(-10**6, 10**6), draw.uniform(-1e3, 1e3),
                            draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300)])
    letters = "aZя é9-.,:;'\"<>&|#\\/\n\t{}[]()%_=~`!?*@$^+日😀"
    text = "".join(draw.choices(letters, k=draw.randint(0, 12)))
    return text if kind == 3 else draw.choice(["Food", "car wash", "5411", text])


def check_inverses(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        width = draw.randint(1, 5)
        names = draw.sample(["Day", "Сумма, руб", "a: b", "it's", 'q"q', "x<y", "mcc", "NO", "7",
                             "two words", "%s", "{0}"], width)
        rows = [[random_value(draw) for _ in range(width)] for _ in range(draw.randint(1, 6))]
        for form in ("json", "yaml", "html", "sql"):
            text = rendered(rows, names, form)
            heads, found = READERS[form](text)
            assert [*map(str, heads)] == names, (form, text)
            assert len(found) == len(rows), (form, text)
            for row, back in zip(rows, found, strict=True):
                for value, other in zip(row, back, strict=True):
                    same = value == other
                    if form == "sql" and isinstance(value, float):  # sqlite rounds a little
                        same = math.isclose(value, other, rel_tol=1e-15)
                    assert same and isinstance(value, str) == isinstance(other, str), (
                        form, value, other, text)


def test_formats_give_the_table_back():
    check_inverses(300, 1)


@pytest.mark.slow
def test_formats_give_ten_thousand_tables_back():
    check_inverses(10_000, 2)


@pytest.mark.parametrize("value", [*HOSTILE, *NUMBERS, None], ids=repr)
def test_hostile_values_come_back_alone(value):
    rows = [["a", value, 3]]
    for form, reader in READERS.items():
        if form == "markdown" and isinstance(value, str) and re.search(r"[|\\]", value):
            continue
        names, found = reader(rendered(rows, ["x", "y", "z"], form))
        assert names == ["x", "y", "z"] and found == rows, form
        assert isinstance(found[0][1], str) == isinstance(value, str), form


GOLDEN = {
    "plain": "date|category|amount (EUR)\n2024-01-02, food, 12.50\n2024-01-03, , -3.00\n"
             '2024-01-04, "a, b", 0.00',
    "grouped": "date|amount (EUR)\n### category: food\n2024-01-02, 12.50\n### category:\n"
               '2024-01-03, -3.00\n### category: "a, b"\n2024-01-04, 0.00',
    "markdown": "| date | category | amount (EUR) |\n| --- | --- | --- |\n"
                "| 2024-01-02 | food | 12.50 |\n| 2024-01-03 |  | -3.00 |\n"
                '| 2024-01-04 | "a, b" | 0.00 |',
    "json": '[\n{"date": "2024-01-02", "category": "food", "amount (EUR)": 12.50},\n'
            '{"date": "2024-01-03", "category": null, "amount (EUR)": -3.00},\n'
            '{"date": "2024-01-04", "category": "a, b", "amount (EUR)": 0.00}\n]',
    "yaml": 'transactions:\n- date: "2024-01-02"\n  category: food\n  "amount (EUR)": 12.50\n'
            '- date: "2024-01-03"\n  category: null\n  "amount (EUR)": -3.00\n'
            '- date: "2024-01-04"\n  category: "a, b"\n  "amount (EUR)": 0.00',
    "html": "<table>\n<tr><th>date</th><th>category</th><th>amount (EUR)</th></tr>\n"
            "<tr><td>2024-01-02</td><td>food</td><td>12.50</td></tr>\n"
            "<tr><td>2024-01-03</td><td></td><td>-3.00</td></tr>\n"
            '<tr><td>2024-01-04</td><td>"a, b"</td><td>0.00</td></tr>\n</table>',
    "sql": 'INSERT INTO transactions ("date", "category", "amount (EUR)") VALUES\n'
           "('2024-01-02', 'food', 12.50),\n('2024-01-03', NULL, -3.00),\n"
           "('2024-01-04', 'a, b', 0.00);"}


@pytest.mark.parametrize("form", FORMATS)
def test_golden(form):
    keys = {"group": "mcc"} if form == "grouped" else {}
    settings = settings_of({"path": "t", "id": "i", "format": form, **keys, "columns": [
        "date", {"column": "mcc", "name": "category", "words": {5411: "food"}},
        {"column": "sum", "name": "amount", "unit": "EUR", "decimals": 2}]})
    client = Client("7", {"date": ["2024-01-02", "2024-01-03", "2024-01-04"],
                          "mcc": [5411.0, None, "a, b"], "sum": [12.5, -3, -0.001]})
    assert Renderer(settings).text(client) == GOLDEN[form]
    assert Renderer(settings).unknown(client) == {"note: codes of mcc without a word": 1}


def test_what_is_drawn_keeps_the_values():
    names = [{"column": "a", "name": ["a", "first"]}, "b", {"column": "c", "name": ["c", "third"]}]
    settings = settings_of({"path": "t", "id": "i", "columns": names, "shuffle": True,
                            "format": ["json", "json", "json", "yaml"], "seed": 5})
    renderer, seen, forms = Renderer(settings), set(), Counter()
    for number in range(2000):
        client = Client(str(number), {"a": [1, 4], "b": [2, 5], "c": [3, None]})
        text = renderer.text(client)
        form = "yaml" if text.startswith("trans") else "json"
        heads, rows = READERS[form](text)
        forms[form] += 1
        seen.add(tuple(heads))
        own = {"first": "a", "third": "c"}
        found = [{own.get(head, head): value for head, value in zip(heads, row, strict=True)}
                 for row in rows]
        assert found == [{"a": 1, "b": 2, "c": 3}, {"a": 4, "b": 5, "c": None}]
        newest = READERS[form](renderer.text(client, 1))
        assert newest == (heads, rows[1:])  # the same draws
    assert abs(forms["json"] / 2000 - 0.75) < 0.04 and len(seen) == 6 * 4
    other = Renderer(settings | {"seed": 6})
    assert [other.text(Client(str(i), {"a": [1], "b": [2], "c": [3]})) for i in range(20)] != [
        renderer.text(Client(str(i), {"a": [1], "b": [2], "c": [3]})) for i in range(20)]


def test_the_hash_tells_renderers_apart(monkeypatch):
    base = hash_of(settings_of(source()))
    assert base == hash_of(settings_of(source(path="other.csv", format=["plain"])))
    changed = [source(format="json"), source(columns=["day", "what"]), source(shuffle=True),
               source(columns=["day", "what", {"column": "sum", "words": {"1": "one"}}]),
               source(columns=["day", "what", {"column": "sum", "decimals": 2}])]
    hashes = {base, *(hash_of(settings_of(item)) for item in changed)}
    monkeypatch.setattr(tables, "VERSION", tables.VERSION + 1)
    assert len(hashes | {hash_of(settings_of(source()))}) == 7


# ---- files

def test_cells_of_a_csv_are_what_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_bytes((
        "\ufeffwho,day,what,sum\r\n"
        '5,1969-12-31,"NaN",NaN\r\n5,1969-01-01,NaN,-7\r\n'
        '"5",1970-01-01,"say ""NULL"", <b>",1e-9\r\n5,1970-01-02,"a\nb",1e12\r\n\r\n'
        "5,1970-01-03,Ёж,007\r\n5.0,1970-01-04,NULL,\r\n5,1970-01-05,\"null\",1e999\r\n"
        "5,1970-01-06,x,12345678901234567890\r\n5,1970-01-07,\"x,\"\"NaN\"\",y\",+1\r\n"
    ).encode())
    [client] = clients(source())
    with open("ids.csv", "w") as file:  # no numbers: none is another's
        file.write("who,day,what,sum\n1e5,1,a,1\n100000,1,a,1\n0012,1,a,1\n12,1,a,1\n")
    assert [own.id for own in clients(source(path="ids.csv"))] == ["1e5", "100000", "0012", "12"]
    assert client.id == "5" and client.columns["day"] == sorted(client.columns["day"])
    assert client.columns["what"] == [None, "NaN", 'say "NULL", <b>', "a\nb", "Ёж", None, "null",
                                      "x", 'x,"NaN",y']
    assert client.columns["sum"] == [-7, None, 1e-9, "1e12", "007", None, "1e999",
                                     "12345678901234567890", "+1"]


@pytest.mark.parametrize(("cell", "value"), [
    ("-0", 0), ("-0.0", 0.0), ("0.10", 0.1), ("1e-400", "1e-400"), ("1E3", "1E3"), ("1E+3", 1e3),
    ("1.5e3", 1500.0),
    ("0.12345678901234567890", "0.12345678901234567890"), ("9007199254740993.0",) * 2,
    ("0.30000000000000004", 0.30000000000000004), ("1234567890123456.78",) * 2, ("１２", "１２")])
def test_a_number_is_one_where_a_double_holds_it(cell, value):
    found = tables.typed(cell)
    assert (found, type(found)) == (value, type(value))
    assert str(found).lstrip("-") == str(found) or value != 0  # no -0


def test_ids_are_merged_only_where_they_are_one_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = ["v1.0", "v1", "10.0.0.0", "10.0.0", "1.0", "1", "-2.0", "-2", "01", "1.00"]
    (tmp_path / "t.csv").write_text("who,day,what,sum\n" + "".join(f"{i},1,a,1\n" for i in ids))
    assert [client.id for client in clients(source())] == [
        "v1.0", "v1", "10.0.0.0", "10.0.0", "1", "-2", "01", "1.00"]


def test_a_comma_before_decimals_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("who;day;what;sum\n1;1;a, b;5906,20\n1;2;1,5;-0,05\n"
                                    "1;3;x;1,2,3\n")
    [client] = clients(source(decimal=","))
    assert client.columns == {"day": [1, 2, 3], "what": ["a, b", 1.5, "x"],
                              "sum": [5906.2, -0.05, "1,2,3"]}
    [client] = clients(source())
    assert client.columns["sum"] == ["5906,20", "-0,05", "1,2,3"]
    renderer = Renderer(settings_of(source(columns=[{"column": "sum", "decimals": 2}])))
    assert renderer.unknown(client) == {
        "note: values of sum that are no numbers, so without decimals": 3}
    with open("t.csv", "a") as file:
        file.write("2;1;a;1\n")
    inside(tmp_path, monkeypatch, documents="table", sources=[source(
        columns=[{"column": "sum", "decimals": 2}])], block_size=64)
    assert "3 note: values of sum that are no numbers" in capsys.readouterr().out
    assert hash_of(settings_of(source(time_format="%d"))) != hash_of(settings_of(source()))


def test_a_client_of_two_sources_is_refused(tmp_path, monkeypatch):
    write_clients(tmp_path / "t.csv")
    shutil.copy(tmp_path / "t.csv", tmp_path / "u.csv")
    with pytest.raises(UserError, match="is in two sources, and would be two"):
        inside(tmp_path, monkeypatch, documents="table", block_size=128,
               sources=[source(), source(path="u.csv")])


def test_a_quote_that_is_not_closed_swallows_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head, rows = "who,day,what,sum\n", "".join(f"3,2024-01-{i:02},x,{i}\n" for i in range(1, 29))
    for begin, end, says in (
            ('1,2024-01-01,"Joe,1\n', "", "t.csv:2: unexpected end of data .to line 30"),
            ('1,2024-01-01,"Joe,1\n', '4,2024-01-01,"b",2\n', "t.csv:2: .* expected after"),
            ('1,2024-01-01,"Joe,1\n', '4,2024-01-01,Bob",2\n', "t.csv:2: .*holds whole rows")):
        (tmp_path / "t.csv").write_text(head + begin + rows + end)
        with pytest.raises(UserError, match=says):
            [*clients(source())]
    (tmp_path / "t.csv").write_text(head + '1,2024-01-01,"Dear,\none, two, three,\n4","5"\n')
    assert [client.columns["what"] for client in clients(source())] == [
        ["Dear,\none, two, three,\n4"]]
    (tmp_path / "t.csv").write_text(head + '1,2024-01-01,foo;"NaN",1\n1,2024-01-02,"NaN",1\n')
    assert [client.columns["what"] for client in clients(source())] == [['foo;"NaN"', "NaN"]]


@pytest.mark.parametrize(("form", "days"), [("%Y.%m", ["2024.09", "2024.10", "2024.11"]),
                                            ("%d.%m", ["30.09", "1.10", "31.10"])])
def test_dates_with_points_are_no_numbers(tmp_path, monkeypatch, form, days):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("who,day,what,sum\n" + "".join(
        f"1,{days[i]},a,{i}\n" for i in (1, 2, 0)))
    [client] = clients(source(time_format=form))
    assert client.columns == {"day": days, "what": ["a"] * 3, "sum": [0, 1, 2]}


def test_columns_of_a_parquet_are_values_or_arrays(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    keys = {"path": "t.parquet", "columns": ["who", "sum"]}
    two = pa.list_(pa.int64(), 2)
    pq.write_table(pa.table({"who": ["a", "b"], "day": pa.array([[2, 1], [1, 2]], two),
                             "sum": pa.array([[5, 6], [7, 8]], two)}), "t.parquet")
    assert as_rows(clients(source(**keys))) == {"a": [["a", 6], ["a", 5]],
                                                "b": [["b", 7], ["b", 8]]}
    exact = ["1.10", "1234567890123456789.12", "-0.00"]
    pq.write_table(pa.table({"who": [1.0] * 3, "day": [1, 2, 3], "sum": pa.array(
        map(decimal.Decimal, exact), pa.decimal128(38, 2))}), "t.parquet")
    assert as_rows(clients(source(**keys))) == {"1": [[1.0, 1.1], [1.0, exact[1]], [1.0, 0.0]]}
    for wrong in ([{"x": 5}], [[{"x": 5}]], [[[5]]]):
        pq.write_table(pa.table({"who": ["a"], "day": [[1]], "sum": wrong}), "t.parquet")
        with pytest.raises(UserError, match=r"t.parquet: 'sum' holds (struct|list)<.*arrays of"):
            [*clients(source(**keys))]


def test_clients_without_a_sound_transaction_are_counted(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"who": range(40), "day": [[], None, [1, 2, 3], *[[1]] * 37],
                             "what": [[], None, ["a"], *[["a"]] * 37],
                             "sum": [[], None, [1], *[[1]] * 37]}), tmp_path / "t.parquet")
    nested = {"documents": "table", "sources": [source(path="t.parquet")], "block_size": 64}
    with pytest.raises(UserError, match=r"5 of 42 rows .*2 a client without .*first t.parquet row 1"
                                        ".*; 3 a transaction of a client whose arrays differ"):
        inside(tmp_path, monkeypatch, **nested, max_dropped=0.1)
    folder = inside(tmp_path, monkeypatch, **nested)
    assert [entry["count"] for entry in shards.read_manifest(folder)["cut"].values()] == [2, 3]


def test_bad_rows_are_counted_anew_at_a_restart(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("who,day,what,sum\n1,soon,a,1\n" + "1,2,a,1\n" * 9)
    monkeypatch.chdir(tmp_path)
    [part] = survey([source()], documents="table")[1]
    assert reading.group(part.pieces[0].table, tmp_path, False, 0.2).is_dir()
    for strict, most in ((True, 0.2), (False, 0.01)):
        with pytest.raises(UserError, match=r"t\.csv:2"):
            reading.group(part.pieces[0].table, tmp_path, strict, most)


def events_of(count, seed=0):
    """Rows (who, day, what, sum) in no order, some twice, many at the same time."""
    draw = random.Random(seed)
    rows = [(f"c{draw.randint(1, 200)}", draw.randint(-50, 50), draw.choice(["a", "b, c", "7"]), i)
            for i in range(count)]
    return rows + rows[:50]


def by_hand(rows):
    """{client: transactions}, the oldest first."""
    found = {}
    for who, *rest in rows:
        found.setdefault(who, []).append(rest)
    return {who: sorted(own, key=lambda row: row[0]) for who, own in found.items()}


def as_rows(found):
    return {client.id: [[*row] for row in zip(*client.columns.values(), strict=True)]
            for client in found}


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.xz", "parquet"])
def test_rows_in_any_order_become_clients(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    rows = events_of(3000)
    for part in range(2):  # two files, a client in both
        own, path = rows[part::2], tmp_path / f"t{part}.{ending}"
        if ending == "parquet":
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            columns = dict(zip(["who", "day", "what", "sum"], map(list, zip(*own, strict=True)),
                               strict=True))
            pq.write_table(pa.table(columns), path)
            continue
        lines = ["who;day;what;sum"] + [";".join(
            f'"{cell}"' if cell == "b, c" else str(cell) for cell in row) for row in own]
        data = "\n".join(lines).encode()
        pack = {"csv": bytes, "csv.gz": gzip.compress, "csv.xz": lzma.compress}[ending]
        path.write_bytes(pack(data))
    right = by_hand(rows[::2] + rows[1::2])
    if ending != "parquet":  # there 7 is a text
        right = {who: [[day, 7 if what == "7" else what, n] for day, what, n in own]
                 for who, own in right.items()}
    whole = as_rows(clients(source(path=f"t*.{ending}")))
    assert whole == right
    monkeypatch.setattr(reading, "PIECE", 3000)  # many pieces, of a few clients
    monkeypatch.setattr(reading, "HELD", 100)
    assert as_rows(clients(source(path=f"t*.{ending}"))) == whole
    monkeypatch.setattr(reading, "NEWEST", 6)
    assert as_rows(clients(source(path=f"t*.{ending}"))) == {
        who: own[-6:] for who, own in whole.items()}


def test_rows_of_clients_are_read_as_their_transactions(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    day = datetime.date(1969, 12, 31)
    table = pa.table({
        "who": [3, 1, 3, 8], "day": [[2, 1], [5], [9], []], "label": [0, 1, 0, 1],
        "date": [[day, None], [day], [day], []],
        "what": [["b", "NaN"], [None], [""], []], "sum": [[0.5, math.nan], [1e-9], [2.0], None]})
    pq.write_table(table, "t.parquet")
    keys = {"path": "t.parquet", "columns": ["date", "what", "sum"]}
    assert as_rows(clients(source(**keys))) == {
        "3": [[None, "NaN", None], ["1969-12-31", "b", 0.5], ["1969-12-31", "", 2.0]],
        "1": [["1969-12-31", None, 1e-9]]}
    in_order = source(**keys)
    del in_order["time"]
    assert as_rows(clients(in_order))["3"][0] == ["1969-12-31", "b", 0.5]
    for wrong, says in (({"columns": ["what", "label"]}, "one value in 'label'"),
                        ({"id": "what"}, "an array in 'what'"), ({"time": "label"}, "'label'")):
        with pytest.raises(UserError, match=f"a row has an array in .*{says}"):
            [*clients(source(**keys) | wrong)]


@pytest.fixture
def own_zone():
    """The zone of this machine again, afterwards."""
    yield
    time.tzset()


def test_times_are_ordered_as_times(own_zone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # where this runs does not matter
    time.tzset()
    (tmp_path / "t.csv").write_text("who,day,what,sum\n1,02JAN70:10,a,2\n1,31DEC69:23,b,1\n"
                                    "1,01FEB70:00,c,3\n")
    with pytest.raises(UserError, match="say time_format"):
        inside(tmp_path, monkeypatch, documents="table", sources=[source()])
    [client] = clients(source(time_format="%d%b%y:%H"))
    assert client.columns["sum"] == [1, 2, 3]
    (tmp_path / "t.csv").write_text("who,day,what,sum\n1,1970-01-01T05:00:00+03:00,a,2\n"
                                    "1,1970-01-01 01:59:00,b,1\n1,1970-01-01 02:00:01,c,3\n")
    [client] = clients(source())
    assert client.columns["sum"] == [1, 2, 3]


def test_words_come_from_files_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.csv").write_text("code;word\n7;seven\nb, c;both\n")
    (tmp_path / "w.json").write_text('{"7": "seven", "b, c": "both"}')
    made = [settings_of(source(columns=[{"column": "what", "words": words}])) for words in (
        "w.csv", "w.json", {7: "seven", "b, c": "both"})]
    texts = {Renderer(one).text(Client("1", {"what": [7, "7", "b, c", "d"]})) for one in made}
    assert texts == {"what\nseven\nseven\nboth\nd"}
    assert hash_of(made[1]) == hash_of(made[2])
    (tmp_path / "w.json").write_text('["x"]')
    (tmp_path / "three.csv").write_text("7,Grocery stores, supermarkets\n")
    (tmp_path / "latin.csv").write_bytes("7,ж\n".encode("cp1251"))
    seven = settings_of(source(columns=[{"column": "what", "words": {7.0: "a", "8.0": "b"}}]))
    assert seven["columns"][0]["words"] == {"7": "a", "8": "b"}
    for wrong in ({"5411": "a", 5411: "b"}, "w.json", "three.csv", "latin.csv", "w.txt",
                  "none.csv", {}, {"1": 2}, 5):
        with pytest.raises(UserError, match=r"words of what|no pairs"):
            settings_of(source(columns=[{"column": "what", "words": wrong}]))


# ---- what is refused, in one line

REFUSED = [
    ({"id": ""}, "no 'id'"), ({"columns": []}, "no 'columns'"), ({"time": ""}, "no 'time'"),
    ({"time": "", "time_format": "%Y"}, "no effect without 'time'"),
    ({"format": "jsn"}, "did you mean json"), ({"format": ["plain", "xml"]}, "'xml'"),
    ({"format": [["json"]]}, "is none of"), ({"decimal": "."}, "decimal of t.csv is ','"),
    ({"path": "t.parquet", "decimal": ","}, "no effect on .parquet"),
    ({"path": "mixed.csv", "time_format": "%Y"}, "none of the first 2 rows .*is sound"),
    ({"path": "mixed.csv"}, "no date, as the first"),
    ({"time_format": "%d.%m"}, "written as time_format=%d.%m .first t.csv:2"),
    ({"format": []}, "or a list"), ({"format": 3}, "or a list"),
    ({"id": "wo"}, "did you mean who"), ({"time": "days"}, "did you mean day"),
    ({"columns": ["day", "wat"]}, "no 'wat'.*did you mean what"),
    ({"colums": ["day"]}, "did you mean columns"), ({"shufle": True}, "did you mean shuffle"),
    ({"shuffle": "yes"}, "takes True or False"), ({"id": 3}, "takes a text"),
    ({"columns": "day"}, "takes a list"), ({"columns": [3]}, "not a name or"),
    ({"columns": [{"name": "x"}]}, "not a name or"),
    ({"columns": [{"column": "sum", "decimal": 2}]}, "did you mean decimals"),
    ({"columns": [{"column": "sum", "decimals": "2"}]}, "a whole number"),
    ({"columns": [{"column": "sum", "decimals": -1}]}, "0 to 15"),
    ({"columns": [{"column": "sum", "unit": 3}]}, "a text"),
    ({"columns": [{"column": "sum", "name": []}]}, "a text or a list"),
    ({"columns": ["sum", {"column": "day", "name": ["d", "SUM"]}]}, "names two"),
    ({"group": "what"}, "go together"), ({"format": "grouped"}, "go together"),
    ({"format": "grouped", "group": "wat"}, "did you mean what"),
    ({"seed": 3}, "nothing is drawn"), ({"seed": 0}, "above 0"),
    ({"column": "x"}, "column of .* has no effect on documents=table"),
    ({"slice": ":5"}, "slice of .* has no effect"), ({"weight": 1.0}, "weight of .* no effect"),
    ({"path": "none.csv"}, "none.csv"), ({"path": "t.txt"}, "a .csv"),
    ({"path": "empty.csv"}, "'who'"), ({"path": "twice.csv"}, "2 columns 'who'"),
    ({"path": "head.csv"}, "is empty"), ({"path": "latin.csv"}, "no UTF-8 text.*iconv"),
    ({"path": "short.csv"}, "2 of 3 rows .*more or fewer cells.*short.csv:3"),
    ({"path": "no_id.csv"}, "without who .first no_id.csv:2"),
    ({"path": "cut.csv.gz"}, "damaged or cut short")]


@pytest.mark.parametrize(("keys", "says"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_wrong_is_said(tmp_path, monkeypatch, keys, says):
    head, row = "who,day,what,sum\n", "1,2,a,3\n"
    texts = {"t.csv": head + row + "2" + row[1:], "t.txt": "x", "empty.csv": "",
             "mixed.csv": head + "1,2024-01-01,a,1\n" + row,
             "twice.csv": "who," + head, "head.csv": head, "short.csv": head + row + "1\n1,2\n",
             "no_id.csv": head + ",1,a,3\n" + row}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setattr(reading, "HELD", 2)
    (tmp_path / "latin.csv").write_bytes((head + row).encode() + "ж".encode("cp1251"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((head + row * 99).encode())[:-20])
    with pytest.raises(UserError, match=says) as found:
        inside(tmp_path, monkeypatch, documents="table", sources=[source() | keys])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("keys", "says"), [
    ({"dedup": "near"}, "dedup=near has no effect on documents=table"),
    ({"min_chars": 4}, "min_chars"), ({"too_long": "drop"}, "too_long"),
    ({"chat_template": "model"}, "chat_template"), ({"packing": "concat"}, "packed with fit")])
def test_keys_of_other_documents_are_refused(tmp_path, keys, says):
    (tmp_path / "t.csv").write_text("who,day,what,sum\n1,2,a,3\n")
    words = [f"--{key}={value}" for key, value in keys.items()]
    done = run_script("prepare.py", "--dataset=d", "--documents=table", f"--sources={source()}",
                      *words, cwd=tmp_path)
    assert done.returncode == 2 and re.search(says, done.stderr), done.stderr


def test_keys_of_tables_are_refused_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    for documents, says in (("text", "is for documents='table'"), ("chat", "has no effect on")):
        with pytest.raises(UserError, match=f"id of t.jsonl {says}"):
            inside(tmp_path, monkeypatch, documents=documents,
                   sources=[{"path": "t.jsonl", "id": "who"}])


def test_bad_rows_are_counted_or_end_it(tmp_path, monkeypatch, capsys):
    rows = [f"{i % 9},{i},a,1" for i in range(90)]
    rows[7], rows[50], rows[60] = ",7,a,1", "3,soon,a,1", "3,50"
    (tmp_path / "t.csv").write_text("\n".join(["who,day,what,sum", *rows]))
    folder = inside(tmp_path, monkeypatch, documents="table", sources=[source()],
                    block_size=256)
    cut = shards.read_manifest(folder)["cut"]
    assert {rule[:24]: entry["first"] for rule, entry in cut.items()} == {
        "a transaction without wh": "t.csv:9", "a transaction whose day ": "t.csv:52",
        "a row with more or fewer": "t.csv:62"}
    for keys, says in (({"strict": True}, "t.csv:9: a transaction without who; mend it"),
                       ({"max_dropped": 0.01}, "3 of 90 rows")):
        with pytest.raises(UserError, match=says):
            inside(tmp_path, monkeypatch, documents="table", sources=[source()], dataset="e",
                   **keys)


# ---- what is planned, read and drawn, to the letter

def test_settings_are_those_of_the_source():
    assert settings_of(source()) == {
        "version": 1, "formats": ["plain"], "time_format": "", "shuffle": False, "group": "",
        "seed": 1, "columns": [
            {"column": name, "decimals": None, "words": {}, "names": [name]}
            for name in ("day", "what", "sum")]}
    full = settings_of(source(
        format=["json", "grouped"], group="what", shuffle=True, seed=7, time_format="%Y", columns=[
            "what", {"column": "day", "name": ["when", "date"], "unit": "UTC"},
            {"column": "sum", "name": "amount", "decimals": 0, "words": {5.0: "five"}}]))
    assert full == {
        "version": 1, "formats": ["json", "grouped"], "time_format": "%Y", "shuffle": True,
        "group": "what", "seed": 7, "columns": [
            {"column": "what", "decimals": None, "words": {}, "names": ["what"]},
            {"column": "day", "decimals": None, "words": {}, "names": ["when (UTC)", "date (UTC)"]},
            {"column": "sum", "decimals": 0, "words": {"5": "five"}, "names": ["amount"]}]}
    unread = settings_of(source(time_format="%Y", columns=["sum"]))
    assert unread["time_format"] == ""  # the time is not shown
    for decimals in (0, 15):
        assert settings_of(source(columns=[{"column": "sum", "decimals": decimals}]))
    for wrong in ({"decimals": 16}, {"decimals": -1}, {"name": ""}, {"name": [""]}, {"name": [3]},
                  {"name": []}, {"name": 3}):
        with pytest.raises(UserError):
            settings_of(source(columns=[{"column": "sum"} | wrong]))


@pytest.mark.parametrize(("text", "value"), [
    ("9" * 18, int("9" * 18)), ("9" * 19, "9" * 19), ("-" + "9" * 17, -int("9" * 17)),
    ("-" + "9" * 18, "-" + "9" * 18), ("1", 1), ("1.0", 1.0), ("", ""), ("-", "-")])
def test_whole_numbers_have_at_most_eighteen_characters(text, value):
    assert (tables.typed(text), type(tables.typed(text))) == (value, type(value))


def test_equal_values_of_other_types_are_written_as_they_are():
    assert rendered([[1], [1.0], [1]], ["a"], "plain").split("\n")[1:] == ["1", "1.0", "1"]


@pytest.mark.parametrize(("head", "between"), [
    ("a,b;c,d", ","), ("a;b", ";"), ("a\tb", "\t"), ("a|b", "|"), ("a", ","), ("a;b,c", ","),
    ("a\nb;c;d", ",")])
def test_the_first_line_tells_what_stands_between_cells(head, between):
    assert tables.delimiter(head) == between


def planned(tmp_path, size, **keys):
    path = tmp_path / keys.pop("name", "t.csv")
    path.write_bytes(b"x" * size)
    own = source(**keys)
    return reading.clients_pieces(own, {"files": "f"}, [("t.csv", path)], settings_of(own))


@pytest.mark.parametrize(("size", "count"), [
    (0, 1), (1, 1), (64 << 10, 1), ((64 << 10) + 1, 2), (12 << 16, 12), ((12 << 16) - 1, 12),
    (24 << 16, 12), (8 << 20, 13)])
def test_transactions_are_sorted_into_a_dozen_pieces_or_more(size, count, tmp_path, monkeypatch):
    found = planned(tmp_path, size)
    assert len(found) == count and [piece.start for piece in found] == [*range(count)]
    assert {piece.size for piece in found} == {size // count}
    origin = found[0].table
    assert (origin.path, origin.id, origin.time, origin.pieces) == ("t.csv", "who", "day", count)
    assert (origin.time_format, origin.decimal) == ("", "") and len(origin.name) == 16
    assert origin.files == (("t.csv", str(tmp_path / "t.csv")),)
    assert origin.read == ["who", "day", "day", "what", "sum"]
    assert all((piece.kind, piece.label, piece.path) == ("table", "t.csv", "") for piece in found)
    monkeypatch.setattr(reading, "PIECE", 1 << 10)
    assert len(planned(tmp_path, size)) == max(1, math.ceil(size / 1024))


def test_packed_tables_are_larger_than_their_files(tmp_path):
    assert len(planned(tmp_path, 64 << 10, name="t.csv.gz")) == 3
    assert planned(tmp_path, 0, decimal=",", time_format="%Y")[0].table.decimal == ","
    named = planned(tmp_path, 0, columns=["sum", "who"])[0].table
    assert named.read == ["who", "day", "sum", "who"]
    untimed = planned(tmp_path, 0, name="t.parquet", time="", columns=["a", {"column": "a",
                                                                          "name": "b"}])
    assert untimed[0].table.read == ["who", "a"]


def test_dates_of_a_csv_and_numbers_of_a_parquet_are_times_alike(tmp_path, monkeypatch):
    """As time_format says: there is no first kind that the others must have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("who,day,what,sum\n1,20240102,b,2\n1,20231231,a,1\n")
    pq.write_table(reading_table({"who": [1], "day": [20240103], "what": ["c"], "sum": [3]}),
                   tmp_path / "b.parquet")
    [client] = clients(source(path="*", time_format="%Y%m%d"))
    assert client.columns["sum"] == [1, 2, 3]
    assert client.columns["day"] == ["20231231", "20240102", 20240103]


def reading_table(columns):
    import pyarrow

    return pyarrow.table(columns)


@pytest.mark.parametrize(("value", "form", "seconds"), [
    (5, "", 5), (2.5, "", 2.5), (-1, "", -1), ("1970-01-01", "", 0), ("1970-01-02", "", 86400),
    ("1969-12-31T23:59:59", "", -1), ("1970-01-01T01:00:00+01:00", "", 0), ("soon", "", None),
    (None, "", None), ("1970", "%Y", 0), (1971, "%Y", 365 * 86400), (1971.0, "%Y", 365 * 86400),
    (1971.5, "%Y", None), ("x", "%Y", None), ("01.02.1970", "%d.%m.%Y", 31 * 86400),
    ("1970-01-01 00:00 +0100", "%Y-%m-%d %H:%M %z", -3600)])
def test_a_time_orders(value, form, seconds):
    assert reading.moment(value, form) == seconds


@pytest.mark.parametrize(("value", "plain"), [
    (None, None), (float("nan"), None), (float("inf"), "inf"), (-0.0, 0.0), (2.5, 2.5), ("a", "a"),
    (7, 7), (2**63 - 1, 2**63 - 1), (2**63, str(2**63)), (-2**63, str(-2**63)),
    (1 - 2**63, 1 - 2**63), (True, "true"), (False, "false"), (b"x", "x"),
    (decimal.Decimal("1.50"), 1.5), (datetime.date(2024, 1, 2), "2024-01-02")], ids=repr)
def test_values_of_a_parquet_are_plain(value, plain):
    found = reading.plain(value)
    assert (found, type(found)) == (plain, type(plain)) and str(found) == str(plain)


@pytest.mark.parametrize(("cell", "comma", "value"), [
    ("", False, None), ("NULL", True, None), (reading.MARK + "NULL", False, "NULL"),
    ("1,5", True, 1.5),
    ("1,5", False, "1,5"), ("1,5,2", True, "1,5,2"), ("a,5", True, "a,5"), ("-0,25", True, -0.25),
    (reading.MARK + "7", False, 7), ("x", False, "x")])
def test_cells_are_read(cell, comma, value):
    assert reading.cell_of(cell, comma) == value
    if not comma:
        assert reading.text_of(cell) == (None if value is None else str(value))


def test_arrays_become_transactions():
    who = itertools.repeat("c")
    assert [*reading.unfolded([who, [1, 2], ["a", None]])] == [["c", 1, "a"], ["c", 2, None]]
    assert [*reading.unfolded([who, [1], ["a", "b"]])] == [
        "a transaction of a client whose arrays differ in length"] * 2
    assert [*reading.unfolded([who, [], []])] == ["a client without a transaction"]


def test_the_newest_rows_are_kept_in_their_order(monkeypatch):
    for most, kept, lost in ((2, [(1, "b"), (2, "a")], 2), (4, [(0, "c"), (1, "d"), (1, "b"),
                                                               (2, "a")], 0), (9, None, 0)):
        monkeypatch.setattr(reading, "NEWEST", most)
        rows = [(2, "a"), (1, "d"), (0, "c"), (1, "b")]
        assert reading.keep_newest(rows) == lost
        assert rows == (kept or [(0, "c"), (1, "d"), (1, "b"), (2, "a")])


def test_clients_of_a_piece_come_with_what_is_left_out_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "NEWEST", 2)
    [piece] = planned(tmp_path, 0)
    lines = [["b", 3, [3, "x", 1]], ["", "a rule", "t.csv:7"], ["a", 1, [1, "y", 2]],
             *(["b", n, [n, "z", n]] for n in (9, 8, 7, 6, 5))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    noted = []
    found = [*reading.clients_in(piece.table, str(tmp_path / "p.jsonl"), lambda rule, where, count:
                                 noted.append((rule, where(), count)))]
    assert found == [Client("b", {"day": [8, 9], "what": ["z", "z"], "sum": [8, 9]}),
                     Client("a", {"day": [1], "what": ["y"], "sum": [2]})]
    assert noted == [("a rule", "t.csv:7", 1),
                     ("transactions before a client's newest 2", "t.csv: client b", 4)]


def test_where_a_csv_is_broken_is_said_by_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, says in (('who,"day,what,sum\n1,2,a,3\n', "t.csv:1: unexpected end of data (to line "
                        "2); mend the quotes of that row"),
                       ('who,day,what,sum\n1,2,a,3\n1,2,"a"b,3\n', "t.csv:3: "),
                       ('who,day,what,sum\n1,2,"a\nb",3\n1,2,"a\n1,3,b,4\n",5\n', "t.csv:4: a cell "
                        "in quotes holds whole rows, such as '1,3,b,4'; close its quote, or double "
                        "a quote that is text")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(UserError) as error:
            [*clients(source())]
        assert str(error.value).startswith(says), text
    (tmp_path / "t.csv").write_text('who,day,what,sum\n1,2,"a\nb",3\n\n1,2\n,2,a,3\n1,2,a,3\n')
    rows = [*reading.transactions(survey(source(), documents="table")[1][0].pieces[0].table)]
    assert rows == [("1", [2, [2, "a\nb", 3]]),
                    ("", ["a row with more or fewer cells than the first line", "t.csv:5"]),
                    ("", ["a transaction without who", "t.csv:6"]), ("1", [2, [2, "a", 3]])]


def test_what_is_written_as_it_came_is_counted():
    renderer = Renderer(settings_of(source(columns=[
        {"column": "what", "words": {"7": "seven"}}, {"column": "sum", "decimals": 1}, "day"])))
    columns = {"what": [7, 7.0, "8", None, "x"], "sum": [1, 2.5, "3,1", None, "y"],
               "day": ["z"] * 5}
    assert renderer.unknown(Client("c", columns)) == {
        "note: codes of what without a word": 2,
        "note: values of sum that are no numbers, so without decimals": 2}
    sound = {"what": [7, None], "sum": [1, None], "day": ["z", None]}
    assert not any(renderer.unknown(Client("c", sound)).values())


def test_of_a_client_the_most_transactions_that_fit_are_kept():
    """Beside a search through all numbers of them."""
    words = make_tokenizer("bytes")
    draw = random.Random(3)
    renderer = Renderer(settings_of(source(columns=["what"])))
    for count in (1, 2, 3, 7, 30):
        client = Client("c", {"what": ["x" * draw.randint(1, 30) for _ in range(count)]})
        texts = [renderer.text(client, n) for n in range(1, count + 1)]
        sizes = [len(text) + 2 for text in texts]
        for room in {min(sizes) - 1, *(size + more for size in sizes for more in (-1, 0, 1)), 999}:
            table = tables.Table(renderer.text(client))
            table.client, table.renderer, table.kept = client, renderer, table
            table.where = "t.csv: client c".format
            dropped, cut = Tally(), Tally()
            [found] = TableEncoder(room)(words, [table], Part([]), dropped, cut)
            most = sum(size <= room for size in sizes)
            if not most:
                assert (found, cut) == ([], {}) and dropped == {
                    f"a transaction alone longer than block_size {room - 1}": {
                        "count": 1, "first": "t.csv: client c"}}
                continue
            [(ids, learned)] = found
            assert words.decode(ids) == texts[most - 1] == str(table.kept) and learned is None
            assert dropped == {} and {rule: entry["count"] for rule, entry in cut.items()} == (
                {} if most == count else {f"clients to block_size {room - 1}": 1,
                                          "transactions before that": count - most})


# ---- a data set

def write_clients(path, count=40):
    draw = random.Random(3)
    rows = [(who, day, draw.choice(["food", "car"]), draw.randint(1, 99))
            for who in range(count) for day in range(draw.choice([1, 3, 60]))]
    draw.shuffle(rows)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("who", "day", "what", "sum"), *rows])
    return by_hand(rows)


def texts_of(folder, split):
    words = Tokenizer.load(folder)
    names = shards.open_split(folder, split).clients()
    return dict(zip(names, map(words.decode, stored(folder, split)), strict=True))


def test_a_set_holds_each_client_once_cut_to_its_newest(tmp_path, monkeypatch, capsys):
    right = write_clients(tmp_path / "t.csv")
    monkeypatch.setattr(reading, "PIECE", 1000)
    folder = inside(tmp_path, monkeypatch, documents="table", sources=[source()], block_size=128)
    found = texts_of(folder, "train") | texts_of(folder, "val")
    assert found.keys() == {str(who) for who in right} and texts_of(folder, "val")
    cut, before = 0, 0
    for who, own in right.items():
        lines = [", ".join(map(str, row)) for row in own]
        kept = lines
        while len("\n".join(["day|what|sum", *kept])) + 2 > 129:
            kept = kept[1:]
        cut, before = cut + (len(kept) < len(own)), before + len(own) - len(kept)
        assert found[str(who)] == "\n".join(["day|what|sum", *kept])
    manifest = shards.read_manifest(folder)
    assert {rule: entry["count"] for rule, entry in manifest["cut"].items()} == {
        "clients to block_size 128": cut, "transactions before that": before} and cut > 5
    assert manifest["format"] == 3 and manifest["recipe"]["block_size"] == 128
    assert manifest["source"][0]["renderer"] == hash_of(settings_of(source()))
    sizes = sum(len(text.encode()) for text in found.values())
    assert sum(split["bytes"] for split in manifest["splits"].values()) == sizes
    held = {who for who in found if int.from_bytes(hashlib.blake2b(
        who.encode(), digest_size=8).digest(), "big") < 0.1 * 2**64}
    assert texts_of(folder, "val").keys() == held  # by the client alone
    rows = val_rows(folder, manifest, 128)  # of whole tables, none of which sees another
    assert isinstance(rows, FitRows) and rows.targets(0, rows.windows) == sum(
        len(ids) - 1 for ids in stored(folder, "val"))
    assert shards.verify(folder) == (0, [])
    capsys.readouterr()
    inside(tmp_path, monkeypatch, documents="table", sources=[source()], block_size=128)
    assert "already prepared" in capsys.readouterr().out
    for keys in ({"sources": [source(columns=["day", "sum"])]}, {"block_size": 64}):
        with pytest.raises(UserError, match="prepared with another recipe"):
            inside(tmp_path, monkeypatch, documents="table", **{
                "sources": [source()], "block_size": 128} | keys)
    prepare.show(folder, manifest, 2)
    assert capsys.readouterr().out.count("day|what|sum\n") == 2
    write_clients(tmp_path / "t.csv", 41)
    with pytest.raises(UserError, match="held something else"):
        inside(tmp_path, monkeypatch, documents="table", sources=[source()], block_size=128)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "mistral"])
def test_tables_of_all_tokenizers_have_room(tmp_path, monkeypatch, tokenizer):
    write_clients(tmp_path / "t.csv")
    forms = [*FORMATS]
    folder = inside(tmp_path, monkeypatch, documents="table", tokenizer=tokenizer, block_size=200,
                    sources=[source(format=forms, group="what", shuffle=True)], val_fraction=0.3)
    split = shards.open_split(folder, "train")
    sizes = np.diff(split.bounds())
    assert sizes.max() <= 201 and sizes.max() > 150
    for text in (texts_of(folder, "train") | texts_of(folder, "val")).values():
        if text.startswith("["):
            json.loads(text)  # whole to its end
        if text.startswith("<table>"):
            assert text.endswith("</table>")


def test_workers_give_the_same_bytes(tmp_path):
    write_clients(tmp_path / "t.csv", 400)
    code = "from plainllama.text import clients\nclients.PIECE = 4000\n"

    def files(name, *words):
        done = run_script("prepare.py", f"--dataset={name}", "--documents=table",
                          "--tokenizer=bytes", f"--sources={source(format=['plain', 'json'])}",
                          "--val_fraction=0.1", "--block_size=256", *words, cwd=tmp_path, code=code)
        assert done.returncode == 0, done.stderr
        return {path.name: path.read_bytes() for path in (tmp_path / "data" / name).iterdir()
                if path.name not in ("sources.json", "work.tmp")}

    one = files("one", "--workers=1")
    assert len([name for name in one if name.endswith(".ids")]) >= 4
    assert files("two", "--workers=2") == one
    assert not (tmp_path / "data/two/work.tmp").exists()


def test_one_transaction_that_is_too_long_drops_its_client(tmp_path, monkeypatch):
    write_clients(tmp_path / "t.csv", 30)
    with open(tmp_path / "t.csv", "a") as file:
        file.write(f"long,5,{'x' * 99},1\nlast,1,{'x' * 99},1\nlast,2,b,1\n")
    folder = inside(tmp_path, monkeypatch, documents="table", sources=[source()], block_size=64)
    found = texts_of(folder, "train") | texts_of(folder, "val")
    assert "long" not in found and found["last"] == "day|what|sum\n2, b, 1"
    assert shards.read_manifest(folder)["dropped"] == {
        "a transaction alone longer than block_size 64": {
            "count": 1, "first": "t.csv: client long"}}


def test_a_run_on_tables_is_one_of_whole_texts(tmp_path):
    write_clients(tmp_path / "t.csv", 60)
    (tmp_path / "t.py").write_text(
        f"dataset = 't'\ndocuments = 'table'\nsources = {source()!r}\ntokenizer = 'bytes'\n"
        "val_fraction = 0.2\nn_layer = 1\nn_head = 2\nd_model = 32\nd_ff = 48\nblock_size = 128\n"
        "global_batch_tokens = 512\nmax_steps = 4\nwarmup_steps = 1\neval_interval = 2\n"
        "eval_tokens = 256\nsave_interval = 4\nsample_tokens = 5\ndevice = 'cpu'\n")
    done = {}
    for words in (("prepare.py", "t.py", "--show=1"), ("train.py", "t.py", "--replay=1"),
                  ("train.py", "t.py"), ("sample.py", "--ckpt=out/t", "--prompt=day|what|sum",
                                         "--max_new_tokens=4"),
                  ("eval.py", "--ckpt=out/t", "--tasks="), ("report.py", "out/t")):
        done[words[0]] = run_script(*words, cwd=tmp_path)
        assert done[words[0]].returncode == 0, done[words[0]].stderr + done[words[0]].stdout
    assert "day|what|sum" in done["prepare.py"].stdout
    assert "next: python sample.py --ckpt out/t\n" in done["train.py"].stdout
    assert "packing=fit" not in done["train.py"].stderr
    assert "learned tokens" not in (tmp_path / "out/t/report.md").read_text()
    assert "bits/byte" in done["train.py"].stdout + done["eval.py"].stdout
    refused = run_script("sample.py", "--ckpt=out/t", "--chat", cwd=tmp_path)
    assert refused.returncode == 2 and "documents=chat" in refused.stderr
    embed = "sample.py", "--ckpt=out/t", "--embed=mean", "--layers=1:", "--dtype=fp32"
    refused = run_script(*embed, "--prompts=data/t", "--out=set.parquet", "--id=whom", cwd=tmp_path)
    assert refused.returncode == 2 and "data/t go by who; leave --id out" in refused.stderr
    made = run_script(*embed, "--prompts=data/t", "--out=set.parquet", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    states = pq.read_table(tmp_path / "set.parquet")
    assert states.column_names == ["who", *(f"emb_{i:04d}" for i in range(1, 33))]
    assert sorted(states["who"].to_pylist()) == sorted({str(i) for i in range(60)})
    split = shards.open_split(tmp_path / "data/t", "val")
    words, ends = Tokenizer.load(tmp_path / "data/t"), split.bounds().tolist()
    texts = [words.decode(split.read(a, b)) for a, b in pairwise(ends)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(
        {"prompt": text, "who": who}) + "\n" for text, who in zip(texts, split.clients(),
                                                                  strict=True)))
    made = run_script(*embed, "--prompts=texts.jsonl", "--id=who", "--out=texts.parquet",
                      "--batch=1", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    rows = {row.pop("who"): row for row in states.to_pylist()}
    alone = {row.pop("who"): row for row in pq.read_table(tmp_path / "texts.parquet").to_pylist()}
    assert alone and all(rows[who][name] == pytest.approx(value, abs=1e-5)
                         for who, row in alone.items() for name, value in row.items())
    same = repr(source()).partition("'columns'")[1] + repr(source()).partition("'columns'")[2][:-1]
    for change, says in (("'columns': ['day', 'sum']", "written otherwise"), ("", "another token")):
        other = f"'path': 't.csv', 'id': 'who', 'time': 'day', {change or same}"
        key = "" if change else "tokenizer = 'bpe:300'\n"
        (tmp_path / "u.py").write_text(
            f"base = 't.py'\ndataset = 'u'\n{key}sources = {{{other}}}\n")
        assert run_script("prepare.py", "u.py", cwd=tmp_path).returncode == 0
        refused = run_script(*embed, "--prompts=data/u", "--out=u.parquet", cwd=tmp_path)
        assert refused.returncode == 2 and says in refused.stderr
        shutil.rmtree(tmp_path / "data/u")
    (tmp_path / "u.py").write_text(f"base = 't.py'\ndataset = 'u'\nblock_size = 64\n"
                                   f"tokenizer = 'data/t/tokenizer.json'\nsources = {source()!r}\n")
    assert run_script("prepare.py", "u.py", cwd=tmp_path).returncode == 0
    made = run_script(*embed, "--prompts=data/u", "--out=u.parquet", cwd=tmp_path)
    assert made.returncode == 0 and "cut to 64 tokens, and the model reads 128" in made.stdout
    refused = run_script("sample.py", "--ckpt=out/t", "--prompts=data/t", "--out=u.jsonl",
                         cwd=tmp_path)
    assert refused.returncode == 2 and "what can be made of one is --embed" in refused.stderr
    refused = run_script("train.py", "t.py", "--block_size=64", "--global_batch_tokens=512",
                         "--out_dir=out/u", cwd=tmp_path)
    assert refused.returncode == 2 and "its tables were cut to 128 tokens" in refused.stderr


# ---- the generated clients

def auroc(scores, labels):
    """The share of pairs of one of each label in which it has the higher score."""
    order = np.argsort(np.argsort(scores)) + 1
    n = labels.sum()
    return (order[labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n))


def test_the_planted_signal_lies_in_the_order(tmp_path):
    made = [*embedded_table.clients(1000)]
    labels = np.array([leaves for _, leaves, _ in made])
    first, _ = zip(*embedded_table.PAIRS, strict=True)
    ways = [sum(((a[1], b[1]) in embedded_table.PAIRS) - ((b[1], a[1]) in embedded_table.PAIRS)
                for a, b in pairwise(events)) for _, _, events in made]
    assert auroc(-np.array(ways), labels) > 0.9
    counts = np.array([sum(event[1] in first for event in events) for _, _, events in made])
    assert abs(auroc(counts, labels) - 0.5) < 0.06
    mean = np.array([np.mean([float(e[2] or 20) for e in events]) for _, _, events in made])
    assert 0.55 < auroc(-mean, labels) < 0.8
    embedded_table.write_labels(str(tmp_path / "labels.csv"))
    with open(tmp_path / "labels.csv") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == embedded_table.COUNT
    assert [int(row["leaves"]) for row in rows[:1000]] == labels.tolist()
    assert described("embedded:table") == [{"path": "embedded:table"}]


def test_the_generated_clients_are_the_same_everywhere(tmp_path, monkeypatch):
    made = [*embedded_table.clients(120, seed=1)]
    monkeypatch.setattr(embedded_table, "clients", lambda: iter(made))
    embedded_table.write_rows(file := io.BytesIO())
    embedded_table.write_sums(str(tmp_path / "sums.csv"))
    found = [file.getvalue(), (tmp_path / "sums.csv").read_bytes(), repr(made).encode()]
    assert [hashlib.sha256(content).hexdigest()[:16] for content in found] == [
        "454cceefec7f8ad7", "4bd05177f3cda766", "65005db4b9ca5ba2"]
    with open(tmp_path / "sums.csv") as file:
        rows = [*csv.DictReader(file)]
    by_hand = [float(event[2]) for event in made[0][2] if event[2]]
    assert float(rows[0]["sum"]) == pytest.approx(sum(by_hand))
    assert float(rows[0]["greatest"]) == max(by_hand)
    assert int(rows[0]["count"]) == len(made[0][2])


def test_the_bounds_of_what_is_sorted():
    assert (reading.PIECE, reading.HELD, reading.NEWEST) == (2**24, 2**16, 2**16)
    assert (tables.VERSION, reading.EPOCH.timestamp()) == (1, 0)
