"""Sources on object stores: the bytes of local files, whatever a server does meanwhile."""

import gzip
import io
import json
import lzma
import random
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

import prepare
from plainllama import command
from plainllama.settings import Incomplete, Settings, UserError
from plainllama.text import stores
from plainllama.text.documents import Tally, documents
from plainllama.text.selection import choose_hold_out
from plainllama.text.sources import survey

pytest.importorskip("aiohttp")


def texts(count: int = 900) -> list[str]:
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijäß", k=draw.randint(2, 9))) for _ in range(2000)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(count)]


def parquet(rows: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), file, row_group_size=200)
    return file.getvalue()


def zst(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(data)
    return out.getvalue().to_pybytes()


ROWS = texts()
LINES = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
FILES = {"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES), "c.jsonl.xz": lzma.compress(LINES),
         "d.jsonl.zst": zst(LINES), "e.parquet": parquet(ROWS), "f.txt": "\n".join(ROWS).encode(),
         "g.json": json.dumps([{"text": row} for row in ROWS]).encode(),
         "h.txt.gz": gzip.compress("\n".join(ROWS).encode())}


class Server(ThreadingHTTPServer):
    """Serves files by ranges, with their ETags and a page of links; with faults if asked to."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.draw, self.faults = dict(files), random.Random(1), 0.0
        self.asked, self.failed, self.most, self.ranges = 0, 0, 0, True
        self.before = lambda path, first: None  # a range is sent
        self.gone = False  # it answers nothing but 503
        self.page = b""  # which it answers in place of a range

    def handle_error(self, *_):
        """Say nothing of those who hang up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        server, name = self.server, self.path.partition("?")[0].lstrip("/")
        server.asked += 1
        fault = server.draw.random() < server.faults
        server.failed += fault
        if server.gone or (fault and server.draw.random() < 0.5):
            return self.answer(503, b"", {}, body)
        if name == "":
            links = "".join(f'<a href="{path}">{path}</a>' for path in server.files)
            return self.answer(200, links.encode(), {"Content-Type": "text/html"}, body)
        if name not in server.files:
            return self.answer(404, b"", {}, body)
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if body and bounds:
            server.before(name, int(bounds[1]))
        data = server.files[name]
        named = {"ETag": f'"{hash(data)}"'}
        if server.page and bounds:
            return self.answer(200, server.page, named, body)
        if not (bounds and server.ranges):
            return self.answer(200, data, named, body)
        part = data[int(bounds[1]):int(bounds[2]) + 1]
        server.most = max(server.most, len(part))
        if fault and server.draw.random() < 0.5:  # a server may send less than it was asked for
            part, fault = part[:server.draw.choice([0, len(part) // 2])], False
        named["Content-Range"] = f"bytes {bounds[1]}-{int(bounds[1]) + len(part) - 1}/{len(data)}"
        self.answer(206, part, named, body, server.draw.randrange(len(part)) if fault else None)

    def answer(self, code, data, headers, body, most=None):
        """Send it; with `most` no more than that, and then nothing."""
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:most])
        if most is not None:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture()
def server(monkeypatch):
    monkeypatch.setattr(stores, "WAITS", (0,) * 9)
    with Server(FILES) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def made(place: Path, monkeypatch, dataset: str, sources, **keys) -> Path:
    """Prepare a set in this process."""
    monkeypatch.chdir(place)
    keys = {"dataset": dataset, "sources": sources, "tokenizer": "bytes", "workers": 1,
            "block_size": 64, "val_fraction": 0.1} | keys
    line = command.CommandLine(Settings(**keys), prepare.Flags(), [],
                               str(ROOT / command.DEFAULT_CONFIG), "", {},
                               {"dataset": dataset} | keys)
    assert prepare.main(line) == 0
    return place / "data" / dataset


def same(ours: Path, theirs: Path) -> None:
    """Hold that two sets differ in nothing but what they say of their sources."""
    for name in {path.name for path in (*ours.iterdir(), *theirs.iterdir())}:
        one, two = (ours / name).read_bytes(), (theirs / name).read_bytes()
        if name == "manifest.json":
            one, two = json.loads(one), json.loads(two)
            for each in (one, two):
                del each["source"], each["recipe"]["sources"]
        if name not in ("sources.json", "manifest.sha256"):
            assert one == two, name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("faults", [0, 0.3])
def test_an_object_gives_the_bytes_of_the_file(name, faults, server, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(FILES[name])
    local = made(tmp_path, monkeypatch, "local", name)
    server.faults = faults
    same(made(tmp_path, monkeypatch, "there", f"{server.url}/{name}?key=1&name=x.txt"), local)
    assert (server.failed > 0) == (faults > 0)
    entry = json.loads((tmp_path / "data/there/manifest.json").read_text())["source"][0]["files"]
    assert entry == {name: f'{len(FILES[name])} bytes, ETag {hash(FILES[name])}'}


def test_a_folder_of_a_store_is_one_of_the_disk(server, tmp_path, monkeypatch):
    import fsspec

    (tmp_path / "in/deep").mkdir(parents=True)
    for name, data in FILES.items():
        (tmp_path / ("in/deep" if name > "d" else "in") / name).write_bytes(data)
    (tmp_path / "in/.hidden.jsonl").write_bytes(b"broken")
    (tmp_path / "in/read.me").write_bytes(b"unknown")
    local = made(tmp_path, monkeypatch, "local", "in")
    same(made(tmp_path, monkeypatch, "as_url", f"file://{tmp_path}/in"), local)
    same(made(tmp_path, monkeypatch, "two", f"file://{tmp_path}/in", workers=2), local)
    same(made(tmp_path, monkeypatch, "glob", f"file://{tmp_path}/in/**/*.*[!e]"), local)
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True)
    memory.put(str(tmp_path / "in"), "/in", recursive=True)
    same(made(tmp_path, monkeypatch, "memory", "memory://in"), local)
    memory.rm("/", recursive=True)
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    for name, data in FILES.items():
        (tmp_path / "in" / name).write_bytes(data)
    local = made(tmp_path, monkeypatch, "flat", "in")
    same(made(tmp_path, monkeypatch, "web", f"{server.url}/"), local)
    same(made(tmp_path, monkeypatch, "two_webs", f"{server.url}/*[a-h].*"), local)


def test_markdown_that_is_named_is_text(server, tmp_path, monkeypatch):
    """Of a store as of the disk; of a folder it is left, and said."""
    (tmp_path / "in").mkdir()
    for name in ("a.md", "b.MD"):
        server.files[name] = ("# title\n\n" + "\n".join(ROWS)).encode()
        (tmp_path / "in" / name).write_bytes(server.files[name])
    same(made(tmp_path, monkeypatch, "web", f"{server.url}/a.md?key=1"),
         made(tmp_path, monkeypatch, "local", "in/a.md"))
    same(made(tmp_path, monkeypatch, "glob", f"file://{tmp_path}/in/**/*.[mM][dD]"),
         made(tmp_path, monkeypatch, "globbed", "in/**/*.[mM][dD]"))
    (tmp_path / "in/b.MD").unlink()
    with pytest.raises(UserError, match=r"1 \.md .read if it is named: --sources='file:///.*md'"):
        survey(f"file://{tmp_path}/in")


def test_a_page_in_place_of_a_range_is_not_taken(server, monkeypatch):
    """What a server answers where it is busy, with 200 and less than was asked for."""
    monkeypatch.setattr(stores, "WAITS", (0,))
    _, parts = survey(f"{server.url}/a.jsonl")
    server.page = b'{"text": "please slow down"}\n' * 1000
    with pytest.raises(Incomplete, match="29,000 bytes have come of"):
        list(documents(parts, Tally()))


def test_dialogs_and_pairs_come_from_stores_and_tables_do_not(server, tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": row}, {"role": "assistant", "content": "ja"}]}
            for row in ROWS[:60]]
    server.files["chat.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "chat.jsonl").write_bytes(server.files["chat.jsonl"])
    keys = {"documents": "chat", "block_size": 1024, "packing": "fit"}
    local = made(tmp_path, monkeypatch, "local", "chat.jsonl", **keys)
    there = made(tmp_path, monkeypatch, "there", f"{server.url}/chat.jsonl", **keys)
    for path in local.glob("*-0*"):
        assert path.read_bytes() == (there / path.name).read_bytes()
    with pytest.raises(UserError, match="copy it"):
        survey({"path": f"{server.url}/t.csv", "id": "a", "time": "b", "columns": ["c"]},
               documents="table")


def test_nothing_is_loaded_whole(server, monkeypatch):
    monkeypatch.setattr(stores, "MOST", 1 << 20)
    server.files["big.jsonl"] = LINES * 90
    assert len(server.files["big.jsonl"]) > 25 * stores.MOST
    _, parts = survey(f"{server.url}/big.jsonl")
    assert sum(1 for _ in documents(parts, Tally())) == 90 * len(ROWS)
    assert server.most == stores.MOST


def test_a_stream_is_a_file(server):
    file = io.BufferedReader(stores.Stream(survey(f"{server.url}/a.jsonl")[1][0].pieces[0].path))
    draw, plain = random.Random(0), io.BytesIO(LINES)
    for _ in range(200):
        place = draw.randrange(len(LINES) + 10)
        assert file.seek(place) == plain.seek(place) and file.tell() == place
        size = draw.choice([0, 1, 100, 70_000, 300_000])
        assert file.read(size) == plain.read(size)
    assert file.seek(-5, 2) == plain.seek(-5, 2) and file.read() == plain.read()


# ---- what goes wrong

REFUSED = [
    ("nosuch://a/b.jsonl", UserError, "no store is known that begins with nosuch://"),
    ("s3://bucket/a.jsonl", UserError, "python -m pip install s3fs"),
    ("{}/none.jsonl", UserError, "404"),
    ("{}/x.bin", UserError, "x.bin: unknown kind of file; known are"),
    ("{}/x.csv", UserError, "; download it, and name the file: what mends it is then said"),
    ("{}/latin.txt", UserError, "invalid utf-8 (first latin.txt); download it, and name the file"),
    ("{}/list.json", UserError, "; download it, and name the file: what mends it is then said"),
    ("{}/folder", UserError, "; a folder of a web server ends in /"),
    ("{}/*.nothing", UserError, "no glob or folder"),
    ("{}/empty.jsonl", UserError, "is empty"),
    ("{}/cut.jsonl.gz", UserError, "is damaged or cut short"),
    ("{}/cut.jsonl.zst", UserError, "is damaged or cut short"),
    ("{}/cut.parquet", UserError, "is damaged or cut short"),
    ("http://127.0.0.1:9/a.jsonl", Incomplete, "10 times; the same command goes on"),
    ("file:///nowhere/a.jsonl", UserError, "FileNotFoundError"),
]


@pytest.mark.parametrize(("source", "kind", "says"), REFUSED)
def test_what_cannot_be_read_is_one_line(source, kind, says, server, monkeypatch):
    if "s3" in source:
        monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    server.files |= {"x.bin": b"x", "x.csv": b"a,b", "latin.txt": "Öl".encode("latin1"),
                     "folder": b"", "list.json": b'["a", "b"]', "empty.jsonl": b"",
                     "cut.jsonl.gz": FILES["b.jsonl.gz"][:-99],
                     "cut.jsonl.zst": FILES["d.jsonl.zst"][:-99],
                     "cut.parquet": FILES["e.parquet"][:-99]}
    with pytest.raises(kind, match=re.escape(says)) as caught:
        choose_hold_out(survey(source.format(server.url))[1], 0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "d.jsonl.zst", "e.parquet"])
def test_an_object_that_changes_is_named_and_ends_the_run(name, server):
    _, parts = survey(f"{server.url}/{name}")
    server.files[name] = FILES[name][:-1] + b" "
    with pytest.raises(Incomplete, match=f"{name} has changed since it was surveyed: .* bytes"):
        list(documents(parts, Tally()))
    del server.files[name]
    with pytest.raises(Incomplete, match=f"{name} at byte .* 404"):
        list(documents(parts, Tally()))


def test_an_object_that_changes_while_it_is_read_is_named(server):
    _, parts = survey(f"{server.url}/a.jsonl")
    server.before = lambda name, first: server.files.update(
        {name: LINES[::-1]}) if first > 200_000 else None
    with pytest.raises(Incomplete, match="has changed since"):
        list(documents(parts, Tally()))


def test_a_server_without_ranges_is_refused(server):
    server.files["a.jsonl"] = LINES * 10
    server.ranges = False
    with pytest.raises(UserError, match="its server sends no ranges of bytes; download it"):
        list(documents(survey(f"{server.url}/a.jsonl")[1], Tally()))


def test_a_server_that_goes_leaves_what_is_complete(server, tmp_path, monkeypatch, capsys):
    """Half of the parts are made; the same command makes the rest of them."""
    monkeypatch.setattr(stores, "WAITS", (0, 0, 0))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    local = made(tmp_path, monkeypatch, "local", "a.jsonl")
    begun = []

    def before(name, first):
        begun.append(first)
        server.gone = bool([*(tmp_path / "data").glob("there/work.tmp/part-00002.json")])

    server.before = before
    with pytest.raises(Incomplete, match=r"a\.jsonl at byte .*4 times; the same command goes on"):
        made(tmp_path, monkeypatch, "there", f"{server.url}/a.jsonl")
    out = capsys.readouterr().out
    assert "again in 0 s" in out and "503" in out
    server.gone, server.before = False, lambda *_: None
    there = made(tmp_path, monkeypatch, "there", f"{server.url}/a.jsonl")
    assert re.search(r"parts, [1-9]\d* of them done", capsys.readouterr().out)
    same(there, local)
    server.files["a.jsonl"] = LINES + b"\n"
    with pytest.raises(UserError, match="was prepared when"):
        made(tmp_path, monkeypatch, "there", f"{server.url}/a.jsonl")
    server.gone = True  # what was made of it still stands
    made(tmp_path, monkeypatch, "there", f"{server.url}/a.jsonl")


# ---- rules of stores, without one

@pytest.mark.parametrize(("path", "url", "name"), [
    ("s3://b/c?d", True, "s3://b/c?d"), ("https://h/a?sign=1?2", True, "https://h/a"),
    ("http://h/a", True, "http://h/a"), ("C:\\x", False, "C:\\x"), ("hf:name", False, "hf:name"),
    ("a/b?c", False, "a/b?c"), ("3s://x", False, "3s://x"), ("git+ssh://x", True, "git+ssh://x")])
def test_what_lies_in_a_store(path, url, name):
    assert (stores.is_url(path), stores.name_of(path)) == (url, name)


def test_an_object_is_told_by_the_best_that_its_store_says():
    for info, stamp in (({"size": 5}, "5 bytes"), ({}, "None bytes"),
                        ({"size": 5, "ETag": '"x"', "mtime": 3}, "5 bytes, ETag x"),
                        ({"size": 5, "mtime": 3, "created": 2}, "5 bytes, mtime 3"),
                        ({"size": 5, "generation": 7, "ETag": "x"}, "5 bytes, generation 7")):
        assert stores.stamp_of(info) == stamp


def failure(status=None, kind=OSError, **said):
    error = kind("x")
    if status is not None:
        error.status = status
    for name, value in said.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(("error", "passes"), [
    (failure(), True), (failure(500), True), (failure(499), False), (failure(503), True),
    (failure(404), False), (failure(408), True), (failure(429), True), (failure(403), False),
    (failure(kind=FileNotFoundError), False), (failure(503, FileNotFoundError), True),
    (failure(kind=ValueError), False), (failure(kind=PermissionError), False),
    (failure(response={"ResponseMetadata": {"HTTPStatusCode": 500}}), True),
    (failure(response={"ResponseMetadata": {"HTTPStatusCode": 404}}), False),
    (failure(response={}), True), (failure(response=SimpleNamespace(status_code=502)), True),
    (failure(response=SimpleNamespace(status_code=401)), False),
    (failure(__cause__=failure(404)), False), (failure(404, __cause__=failure(500)), True),
    (failure(kind=type("OfflineModeIsEnabled", (OSError,), {})), False)])
def test_what_may_pass(error, passes):
    assert stores.may_pass(error) == passes


def test_a_request_is_made_again_after_a_while(monkeypatch, capsys):
    slept, calls = [], []
    monkeypatch.setattr(stores.time, "sleep", slept.append)

    def failing(times, error):
        calls.clear()

        def call(*words, **keys):
            calls.append((words, keys))
            if len(calls) <= times:
                raise error
            return "done"
        return call

    assert stores.again("it", failing(3, OSError("a  b\nc")), 1, x=2) == "done"
    assert slept == [1, 3, 9] and calls == [((1,), {"x": 2})] * 4
    assert capsys.readouterr().out.splitlines() == [
        f"it: OSError: a b c; again in {seconds} s" for seconds in (1, 3, 9)]
    slept.clear()
    with pytest.raises(OSError, match="x"):
        stores.again("it", failing(4, OSError("x")))
    assert len(calls) == 4 and slept == [1, 3, 9]
    with pytest.raises(FileNotFoundError):
        stores.again("it", failing(1, FileNotFoundError("x")))
    assert len(calls) == 1
    with pytest.raises(Incomplete) as error:
        stores.asked("it", failing(4, OSError("x" * 400)))
    assert str(error.value) == (f"it: OSError: {'x' * 300}, 4 times; the same command goes on from "
                                "what is complete")
    for refused in (UserError, Incomplete):
        with pytest.raises(refused, match=r"^it: FileNotFoundError: x$"):
            stores.asked("it", failing(1, FileNotFoundError("x")), refused=refused)
    for own in (UserError("mine"), Incomplete("mine")):
        with pytest.raises(type(own), match=r"^mine$"):
            stores.asked("it", failing(1, own))
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise OSError("outer") from inner
    except OSError as outer:
        assert stores.line_of(outer) == "KeyError: 'inner'"


def test_how_stores_are_opened(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    aiohttp = pytest.importorskip("aiohttp")
    asked = []
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **keys: asked.append(keys))
    for url in ("s3://b/c", "http://h/a", "https://h/a"):
        stores.store_of(url)
    assert asked[0] == {"use_listings_cache": False}
    for options in asked[1:]:
        assert options == {
            "use_listings_cache": False, "headers": {"Accept-Encoding": "identity"},
            "client_kwargs": {"trust_env": True, "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=20, sock_read=60)}}


class Store:
    """A store of one object, which notes the ranges that are asked for."""

    def __init__(self, content, **info):
        self.content, self.asked = content, []
        self.information = {"size": len(content), "ETag": "e"} | info

    def info(self, name):
        return self.information

    def open(self, name, mode, cache_type, size):
        assert (name, mode, cache_type, size) == ("name", "rb", "none", len(self.content))
        store, file = self, io.BytesIO(self.content)

        class Asked:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def seek(self, place):
                store.asked.append([place])
                file.seek(place)

            def read(self, count):
                store.asked[-1].append(count)
                return file.read(count)

        return Asked()


def test_requests_grow_as_long_as_they_follow(monkeypatch):
    content = random.Random(1).randbytes(4000)
    store = Store(content)
    monkeypatch.setattr(stores, "store_of", lambda url: (store, "name"))
    monkeypatch.setattr(stores, "FIRST", 100)
    monkeypatch.setattr(stores, "MOST", 400)
    url = stores.surveyed(store, "x://name")
    assert (url, url.size, url.stamp) == ("x://name", 4000, "4000 bytes, ETag e")
    stream = stores.Stream(url)
    assert stream.readable() and stream.seekable() and stream.tell() == 0
    assert stream.read(50) == content[:50] and stream.read(50) == content[50:100]
    assert store.asked == [[0, 100]]
    assert stream.read(1) == content[100:101] and store.asked[1:] == [[100, 200]]
    assert stream.seek(299) == 299 and stream.read(9) == content[299:300]  # it has come already
    assert len(store.asked) == 2 and stream.tell() == 300
    assert stream.read(1) and stream.seek(400, 1) == 701 and store.asked[2:] == [[300, 400]]
    assert stream.read(3) == content[701:704] and store.asked[3:] == [[701, 100]]  # anew
    assert stream.seek(-1, 1) == 703 and stream.read(1) == content[703:704]
    assert store.asked[4:] == [[703, 100]]
    assert stream.seek(-10, 2) == 3990 and stream.readall() == content[3990:]
    assert store.asked[5:] == [[3990, 10]] and stream.read(1) == b"" and stream.tell() == 4000
    stream.seek(0)
    store.asked.clear()
    assert stream.readall() == content
    sizes = [100, 200, *[400] * 9, 100]
    assert store.asked == [[sum(sizes[:i]), size] for i, size in enumerate(sizes)]
    store.information = store.information | {"ETag": "f"}
    stream.seek(0)
    with pytest.raises(Incomplete, match=r"x://name has changed since it was surveyed: 4000 bytes, "
                       "ETag e, now 4000 bytes, ETag f; bring that one back"):
        stream.read(1)


def test_an_object_without_a_size_or_ranges_is_refused():
    for info in ({"size": None}, {"partial": False}):
        with pytest.raises(UserError, match="x://n: its server gives no size or no ranges"):
            stores.surveyed(Store(b"abc", **info), "x://n")
    assert stores.surveyed(Store(b"abc", partial=True), "x://n").size == 3


def test_what_lies_somewhere_now(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    assert stores.look_at(str(tmp_path / "a")) == 3
    monkeypatch.setattr(stores, "store_of", lambda url: (Store(b"abcd"), url))
    assert stores.look_at("xy://a") == "4 bytes, ETag e"


class Listing:
    """A store of a few objects, which notes what it is asked for."""

    def __init__(self, *names, kind="file"):
        self.found, self.kind, self.asked = {name: {"type": "file"} for name in names}, kind, []
        self.found["b/d/sub"] = {"type": "directory"}

    def glob(self, name, detail):
        self.asked.append(("glob", name, detail))
        return self.found

    find = glob

    def info(self, name):
        self.asked.append(("info", name))
        return {"type": self.kind}


@pytest.mark.parametrize(("url", "kind", "asked", "labels", "folder"), [
    ("s3://b/d/*", "file", ["glob"], {"x.txt": "b/d/x.txt", "y/z.txt": "b/d/y/z.txt"}, False),
    ("s3://b/d/?.txt", "file", ["glob"], None, False),
    ("s3://b/[d]", "file", ["glob"], None, False),
    ("s3://b/d/", "file", ["glob"], None, True), ("s3://b/d", "directory", ["info", "glob"], None,
                                                  True),
    ("s3://b/d/x.txt", "file", ["info"], {"x.txt": "b/d/x.txt"}, False),
    ("https://b/d/x.txt?sign=1", "file", ["info"], {"x.txt": "https://b/d/x.txt?sign=1"}, False),
    ("https://b/d/*", "file", ["glob"], None, False)])
def test_what_a_store_lists(url, kind, asked, labels, folder, monkeypatch):
    store = Listing("b/d/x.txt", "b/d/y/z.txt", "b/d/.hidden", "b/d/.x/a", kind=kind)
    name = url if url.startswith("http") else url.partition("://")[2]
    monkeypatch.setattr(stores, "store_of", lambda url: (store, name))
    found = stores.listed(url)
    assert found[0] is store and found[2] == folder
    assert found[1] == (labels or {"x.txt": "b/d/x.txt", "y/z.txt": "b/d/y/z.txt"})
    assert [one[0] for one in store.asked] == asked
    assert all(one[1] == name and one[2:] in ((), (True,)) for one in store.asked)


def test_how_long_and_how_much_is_asked_for():
    assert (stores.WAITS, stores.FIRST, stores.MOST) == ((1, 3, 9), 2**16, 2**23)
    assert (stores.Url("x").size, stores.Url("x").stamp) == (0, "")
