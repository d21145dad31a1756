"""prepare.py against what the test itself reads from the sources and encodes with `tokenizers`."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import start_fork
from hub_stub import SHA, Hub

import prepare
from plainllama import command
from plainllama.settings import Settings, UserError
from plainllama.text import documents, records, selection, sources, stores, workers
from plainllama.text.documents import Tally
from plainllama.text.selection import choose_hold_out, placed
from plainllama.text.sources import survey
from plainllama.tokens import parts as parts_room
from plainllama.tokens import shards, tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[1]
WORDS = ["the", "model", "reads ", "  tokens", "naïve", "Привет",
         "你好", "🎉", "x=1\n", "\t<s>", "\x00"]


def texts(n, words=40, seed=0):
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words))) for i in range(n)]


def jsonl(lines):
    rows = [json.dumps({"text": t, "n": 1}, ensure_ascii=False) + "\n" for t in lines]
    return "".join(rows).encode()


def as_array(texts: list[str], **how) -> bytes:
    """An array of objects."""
    return json.dumps([{"text": text, "n": i} for i, text in enumerate(texts)], **how).encode()


def parquet(lines, rows=50, column="text", kind=None):
    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(lines)), column: pa.array(lines, kind)}), file,
                   row_group_size=rows)
    return file.getvalue()


def zst(data):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(data)
    return out.getvalue().to_pybytes()


HELD = """
import time
from plainllama.tokens import shards
shards.write_manifest = lambda *_: time.sleep(3600)
"""


def run(cwd, *words, stdin=None, env=(), code=0, start=False, held=False):
    """Run the command in `cwd`, or `start` it, `held` before it writes its manifest."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    process = start_fork([ROOT / "prepare.py", *words], cwd=cwd, env={**own, **dict(env)},
                         code=HELD if held else "", input=stdin)
    if start:
        return process
    out, error = process.communicate(600)
    assert process.returncode == code, error
    return out, error


def inside(tmp_path, monkeypatch, **keys):
    """prepare in this process, except for its workers."""
    monkeypatch.chdir(tmp_path)
    config = Settings(**{"dataset": "d", "tokenizer": "bytes", "workers": 1, "block_size": 64,
                         "val_fraction": 0.1} | keys)
    given = command.CommandLine(config, prepare.Flags(), [], str(ROOT / command.DEFAULT_CONFIG), "",
                                {}, {"dataset": "d"} | keys)
    assert prepare.main(given) == 0
    return tmp_path / "data" / config.dataset


def stored(folder, split):
    """[document ids] of a split, read with nothing of the project."""
    out = []
    for path in sorted(folder.glob(f"{split}-*.bin")):
        data, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
        magic, version, width, count = struct.unpack("<8sIIQ", data[:24])
        assert (magic, version) == (b"plnllama", 1)
        ids = np.frombuffer(data[64:], f"<u{width}")
        starts = struct.unpack(f"<{len(index) // 8}Q", index)
        assert len(ids) == count and starts[0] == 0
        out += [ids[a:b].tolist() for a, b in zip(starts, [*starts[1:], count], strict=True)]
    return out


def held_out(text, fraction=0.1):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") \
        < int(fraction * 2**64)


def expected(folder, lines, split, fraction=0.1):
    """The same, from the texts and the folder's tokenizer.json."""
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.encode_special_tokens = True
    about = json.loads((folder / "manifest.json").read_bytes())["tokenizer"]
    ends = [] if about["eos"] is None else [about["eos"]]
    return [[about["bos"], *engine.encode(t, add_special_tokens=False).ids, *ends]
            for t in lines if held_out(t, fraction) == (split == "val")]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def good(folder, lines, fraction=0.1):
    """Every id, every boundary, the order, and the counts of the manifest."""
    manifest = shards.read_manifest(folder)
    for split in ("train", "val"):
        have, want = stored(folder, split), expected(folder, lines, split, fraction)
        assert have == want
        counts = manifest["splits"][split]
        mine = [t for t in lines if held_out(t, fraction) == (split == "val")]
        assert (counts["documents"], counts["tokens"], counts["bytes"], counts["longest"]) == (
            len(want), sum(map(len, want)), sum(len(t.encode()) for t in mine),
            max(map(len, want), default=0))
        block = manifest["block_size"]
        assert (counts["tokens"] - counts["tail"] - 1) % block == 0 and counts["tail"] < block
    assert shards.verify(folder) == (0, [])


LINES = texts(300)
KINDS = {
    "a.jsonl": jsonl(LINES),
    "a.jsonl.gz": gzip.compress(jsonl(LINES)),
    "a.jsonl.xz": lzma.compress(jsonl(LINES)),
    "a.jsonl.zst": zst(jsonl(LINES)),
    "a.json": as_array(LINES),
    "a.json.gz": gzip.compress(as_array(LINES)),
    "bom.json": b"\xef\xbb\xbf" + as_array(LINES, indent=1),
    "a.parquet": parquet(LINES),
    "b.parquet": parquet(LINES, kind=pa.large_string()),
    "crlf.jsonl": jsonl(LINES).replace(b"\n", b"\r\n\n").removesuffix(b"\r\n\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(LINES),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(KINDS[name])
    good(inside(tmp_path, monkeypatch, sources=name), LINES)


def test_the_table_of_kinds_is_all_there_is_to_a_kind(tmp_path, monkeypatch):
    """Every entry is read by documents(), a new one by its entry alone, another name refused."""
    samples = {"a.txt": LINES[0].encode(), **KINDS}
    for kind, reader in records.KINDS.items():
        packings = records.PACKINGS if reader.packable else ()
        assert f"a{kind}" in samples, f"no sample of the kind {kind}"
        for name in (f"a{kind}", *(f"a{kind}{packing}" for packing in packings)):
            pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}.get(
                name.removeprefix(f"a{kind}"), bytes)
            (tmp_path / name).write_bytes(pack(samples[f"a{kind}"]))
            assert records.kind_of(name) == kind
            _, parts = survey(str(tmp_path / name))
            want = LINES[:1] if kind == ".txt" else LINES
            assert list(documents.documents(parts, Tally())) == want
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.log").write_text("# text")
    for name in ("a.parquet.gz", "a.gz", "in/a.log"):
        (tmp_path / name).write_bytes(b"text")
        with pytest.raises(UserError, match=rf"{name}: unknown kind .*\.txt, \.jsonl, \.json, "):
            survey(str(tmp_path / name))
    with pytest.raises(UserError, match=r"with a file of a known kind \(\.txt, \.jsonl, \.json, "):
        survey(str(tmp_path / "in"))
    monkeypatch.setitem(records.KINDS, ".log", records.KINDS[".txt"])
    _, parts = survey(str(tmp_path / "in"))
    assert list(documents.documents(parts, Tally())) == ["text"]


@pytest.mark.parametrize("tokenizer", ["gpt2", "mistral", "bpe:300"])
def test_tokenizers_and_boundaries(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES))
    good(inside(tmp_path, monkeypatch, sources="a.jsonl", tokenizer=tokenizer), LINES)


def test_txt_folders_globs_and_lists_keep_their_order(tmp_path, monkeypatch):
    for i in range(30):
        path = tmp_path / "in" / f"d{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINES[i].encode())
        (path.parent / "README.md").write_text("no source")
    (tmp_path / "in" / ".hidden.txt").write_text("no source")
    (tmp_path / "b.parquet").write_bytes(parquet(LINES[100:]))
    order = [LINES[i] for i in sorted(range(30), key=lambda i: (i % 3, i))]
    good(inside(tmp_path, monkeypatch, dataset="folder", sources="in", val_fraction=0.3),
         order, 0.3)
    good(inside(tmp_path, monkeypatch, dataset="glob", sources="in/*/*.txt", val_fraction=0.3),
         order, 0.3)
    good(inside(tmp_path, monkeypatch, dataset="list", sources=["b.parquet", "in"]),
         LINES[100:] + order)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.parquet"])
def test_slices_and_columns(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(KINDS[name])
    source = {"path": name, "slice": "60:290", "max_documents": 120}
    good(inside(tmp_path, monkeypatch, sources=source), LINES[60:180])
    (tmp_path / "c.parquet").write_bytes(parquet(LINES, column="body"))
    good(inside(tmp_path, monkeypatch, dataset="c",
                sources={"path": "c.parquet", "column": "body"}), LINES)


@pytest.mark.parametrize("width", [63, 64, 65])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_cut_at_or_beside_a_line_end_loses_nothing(width, packed, tmp_path):
    lines = [f"{i:0{width - 13}}" for i in range(4096)]  # 13: the bytes of {"text": ""} and newline
    data = "".join(f'{{"text": "{t}"}}\n' for t in lines).encode()
    assert len(data) == 4096 * width
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(gzip.compress(data) if packed else data)
    _, parts = survey(str(path))
    assert packed or len(parts) >= 4
    assert list(documents.documents(parts, Tally())) == lines


def test_standard_input(tmp_path):
    words = ("--sources=-", "--tokenizer=bytes", "--block_size=64", "--val_fraction=0.1")
    run(tmp_path, *words, "--dataset=lines", stdin=jsonl(LINES))
    good(tmp_path / "data/lines", LINES)
    run(tmp_path, *words, "--dataset=text", stdin="\n".join(LINES).encode())
    have = stored(tmp_path / "data/text", "train") + stored(tmp_path / "data/text", "val")
    assert len(have) == 2  # one document, of which the end is held out, at the end of a line
    text = b"".join(bytes(ids[1:-1]) for ids in have)
    assert len(text) == sum(len(d) - 2 for d in have)
    _, error = run(tmp_path, *words, "--dataset=lines", stdin=jsonl(LINES[1:]), code=2)
    assert "held something else" in error


def test_few_documents_still_have_a_validation_split(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES[:6]))
    folder = inside(tmp_path, monkeypatch, sources="a.jsonl", val_fraction=1e-9)
    least = min(LINES[:6], key=lambda t: hashlib.blake2b(t.encode(), digest_size=8).digest())
    assert [bytes(ids[1:-1]).decode() for ids in stored(folder, "val")] == [least]
    assert len(stored(folder, "train")) == 5
    none = inside(tmp_path, monkeypatch, dataset="none", sources="a.jsonl", val_fraction=0.0)
    assert stored(none, "val") == [] and len(stored(none, "train")) == 6


def test_embedded_is_the_packages_source(tmp_path, monkeypatch):
    import mpmath
    import networkx
    import sympy

    want = {}
    for package in (mpmath, networkx, sympy):
        root = Path(package.__file__).parent
        for path in root.rglob("*.py"):
            name = path.relative_to(root.parent)
            if not {"tests", "benchmarks"} & set(name.parts) and path.stat().st_size:
                want[name.as_posix()] = path.read_bytes().decode()
    records, parts = survey("embedded")
    assert len(parts) >= 8 and str(ROOT) not in json.dumps(records)
    have = list(documents.documents(parts, Tally()))
    assert have == [want[name] for name in sorted(want)] and sum(map(len, have)) > 20e6


# ---- killed, shared, repeated

BIG = texts(3000, words=200)  # about 5 MB
COMMON = ("--sources=big.jsonl", "--tokenizer=mistral", "--block_size=64", "--val_fraction=0.1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with big.jsonl and the data set that one undisturbed worker makes of it."""
    root = tmp_path_factory.mktemp("big")
    (root / "big.jsonl").write_bytes(jsonl(BIG))
    run(root, *COMMON, "--dataset=one", "--workers=1")
    return root


def test_many_parts_hold_every_document_once(reference):
    folder = reference / "data/one"
    assert len(list(folder.glob("train-*.bin"))) >= 8
    good(folder, BIG)


def test_two_workers_write_the_same_bytes(reference):
    run(reference, *COMMON, "--dataset=two", "--workers=2")
    assert contents(reference / "data/two") == contents(reference / "data/one")


def test_killed_and_restarted_writes_the_same_bytes(reference):
    folder = reference / "data/killed"
    words = (*COMMON, "--dataset=killed", "--workers=2")
    interrupted = 0
    for done_parts in (0, 3):
        process = run(reference, *words, start=True, held=True)
        while process.poll() is None and done_parts >= len(list(folder.glob("*/part-*.json"))):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
        process.wait()
        interrupted += not (folder / "manifest.json").exists()
        with pytest.raises(ProcessLookupError):
            for _ in range(30000):
                os.killpg(process.pid, 0)
                time.sleep(0.01)
    assert interrupted == 2
    with pytest.raises(UserError, match="unfinished"):
        shards.read_manifest(folder)
    out, _ = run(reference, *words)
    assert " 0 of them done" not in out
    assert contents(folder) == contents(reference / "data/one")


def test_second_run_is_instant_and_another_recipe_is_refused(reference):
    before = contents(reference / "data/one")
    out, _ = run(reference, *COMMON, "--dataset=one")
    assert "already prepared" in out and "a second" not in out and "tokens/s" not in out
    _, error = run(reference, *COMMON, "--dataset=one", "--tokenizer=bytes", code=2)
    assert "tokenizer was 'mistral', is now 'bytes'" in error and "--dataset" in error
    _, error = run(reference, *COMMON, "--dataset=one", "--val_fraction=0.2", code=2)
    assert "val_fraction" in error
    assert contents(reference / "data/one") == before


def test_a_source_that_changed_is_refused_and_one_that_went_is_not_missed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES))
    inside(tmp_path, monkeypatch, sources="a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES).replace(b"7", b"8"))
    with pytest.raises(UserError, match="held something else"):
        inside(tmp_path, monkeypatch, sources="a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    inside(tmp_path, monkeypatch, sources="a.jsonl")


def rewritten(path, old, new):
    """Change a word of a file, whose size and time of change stay."""
    before = path.stat()
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_word_changed_in_the_middle_is_noticed(tmp_path, monkeypatch, capsys):
    """Of a complete data set, of a begun one, and while it is made; a copy of the same is not
    another, and what has not changed is not read again."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl([f"{i}: " + "word " * 40 for i in range(3000)]))
    folder = inside(tmp_path, monkeypatch, sources="a.jsonl")
    files = shards.read_manifest(folder)["source"][0]["files"]
    assert files == {"a.jsonl": hashlib.sha256(source.read_bytes()).hexdigest()}
    with monkeypatch.context() as patch:
        patch.setattr(sources, "sha256", None)  # not called
        inside(tmp_path, monkeypatch, sources="a.jsonl")
    source.touch()
    inside(tmp_path, monkeypatch, sources="a.jsonl")
    assert "already prepared" in capsys.readouterr().out and shards.verify(folder) == (0, [])
    rewritten(source, b"1500: word", b"1500: bird")
    with pytest.raises(UserError, match=r"held something else \(a\.jsonl\)"):
        inside(tmp_path, monkeypatch, sources="a.jsonl")

    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inside(tmp_path, monkeypatch, dataset="begun", sources="a.jsonl")
    words = tmp_path / "own.json"
    shutil.copy(folder / "tokenizer.json", words)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inside(tmp_path, monkeypatch, dataset="own", sources="a.jsonl", tokenizer=str(words))
    words.write_bytes(words.read_bytes().replace(b"</s>", b"</z>"))
    with pytest.raises(UserError, match="the tokenizer's file has changed"):
        inside(tmp_path, monkeypatch, dataset="own", sources="a.jsonl", tokenizer=str(words))
    rewritten(source, b"1500: bird", b"1500: cart")
    with pytest.raises(UserError, match="held something else"):
        inside(tmp_path, monkeypatch, dataset="begun", sources="a.jsonl")

    prepare_shards = prepare.make_shards

    def make(*args):
        prepare_shards(*args)
        rewritten(source, b"1500: cart", b"1500: dust")
    monkeypatch.setattr(prepare, "make_shards", make)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        inside(tmp_path, monkeypatch, dataset="while", sources="a.jsonl")
    assert not (tmp_path / "data/while/manifest.json").exists()


def test_a_data_set_with_the_older_hash_of_its_sources_stays_readable(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(LINES))
    folder = inside(tmp_path, monkeypatch, sources="a.jsonl")
    manifest = shards.read_manifest(folder)
    manifest["source"][0]["files"] = {"a.jsonl": sources.fingerprint(source)}
    shards.write_manifest(folder, manifest)
    (folder / shards.SEEN).unlink()
    inside(tmp_path, monkeypatch, sources="a.jsonl")
    source.write_bytes(jsonl(LINES[1:]))
    with pytest.raises(UserError, match="held something else"):
        inside(tmp_path, monkeypatch, sources="a.jsonl")


def test_unfinished_folder_of_another_recipe_and_foreign_files(reference):
    folder = reference / "data/other"
    process = run(reference, *COMMON, "--dataset=other", "--workers=1", start=True, held=True)
    while not list(folder.glob("work.tmp/part-*.json")) and process.poll() is None:
        time.sleep(0.005)
    _, error = run(reference, *COMMON, "--dataset=other", code=2)
    assert "another prepare.py is at work" in error
    process.kill()
    process.wait()
    _, error = run(reference, *COMMON, "--dataset=other", "--tokenizer=bytes", code=2)
    assert "another recipe" in error
    (folder / "thesis.doc").write_text("mine")
    _, error = run(reference, *COMMON, "--dataset=other", code=2)
    assert "thesis.doc" in error and (folder / "thesis.doc").read_text() == "mine"


def test_a_set_without_one_training_row_is_not_complete(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("too short\n" * 5)
    for _ in range(2):  # nothing of it stays, and more text is no other source
        with pytest.raises(UserError, match=r"train split has 42 tokens, fewer than one row of "
                                            r"block_size 64 \+ 1"):
            inside(tmp_path, monkeypatch, sources="a.txt", val_fraction=0.2)
        assert not (tmp_path / "data").exists() and "complete" not in capsys.readouterr().out
    folder = inside(tmp_path, monkeypatch, sources="a.txt", val_fraction=0.2, block_size=41)
    before = contents(folder)
    with pytest.raises(UserError, match="block_size 42"):
        inside(tmp_path, monkeypatch, sources="a.txt", val_fraction=0.2, block_size=42)
    inside(tmp_path, monkeypatch, sources="a.txt", val_fraction=0.2, packing="doc")  # fills rows up
    assert contents(folder) == before


def test_own_text_without_a_config_needs_a_name_and_hints_can_be_copied(tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(book(9000))
    (tmp_path / "my run.py").write_text("dataset = 'x'\ntokenizer = 'bytes'\nblock_size = 64\n"
                                        "global_batch_tokens = 640\n")
    parse = partial(command.parse, doc="", flags=prepare.Flags)
    with pytest.raises(UserError, match=r"would be openwebtext, with the tokenizer mistral; .*"
                                        r"--dataset=NAME.* config/quickstart\.py"):
        prepare.main(parse(["--sources=my.txt"]))
    assert len(list(tmp_path.iterdir())) == 2
    prepare.main(parse(["--sources=my.txt", "--dataset=a", "--tokenizer=bytes",
                        "--val_fraction=0.2"]))
    assert "next: python train.py --dataset=a --out_dir=out/a\n" in capsys.readouterr().out
    prepare.main(parse(["my run.py", "--sources=my.txt", "--dataset=b", "--block_size=32",
                        "--out_dir=out/so so"]))
    assert capsys.readouterr().out.endswith(
        "next: python train.py 'my run.py' --block_size=32 --dataset=b '--out_dir=out/so so'\n")
    (tmp_path / "my.txt").write_text(book(20000))
    prepare.main(parse(["my run.py", "--sources=my.txt"]))
    assert capsys.readouterr().out.endswith("next: python train.py 'my run.py'\n")


# ---- verify and inspect

def test_verify_finds_a_changed_byte_in_every_kind_of_file(reference, tmp_path, capsys):
    whole = reference / "data/one"
    out, _ = run(reference, "--verify", "data/one")
    assert "ok" in out
    names = ["train-00002.bin", "train-00000.idx", "val-00001.bin", "val-00003.idx",
             "tokenizer.json", "manifest.json", "manifest.sha256"]
    for name in names:
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 3] ^= 1
        (folder / name).write_bytes(data)
        assert prepare.verify(folder) == 1
        assert name in capsys.readouterr().err
    (tmp_path / names[0] / "extra").write_text("")
    assert prepare.verify(tmp_path / names[0]) == 1 and "extra" in capsys.readouterr().err
    assert prepare.verify(tmp_path) == 2


def test_what_a_system_puts_into_folders_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES))
    (tmp_path / "data/d").mkdir(parents=True)
    (tmp_path / "data/d/.DS_Store").write_text("")
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match="fewer than one row"):
        inside(tmp_path, monkeypatch, sources="a.txt")
    folder = inside(tmp_path, monkeypatch, sources="a.jsonl")
    (folder / "Thumbs.db").write_text("")
    assert (folder / ".DS_Store").exists() and shards.verify(folder) == (0, [])


def test_a_file_where_a_folder_shall_be(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("")
    (tmp_path / "data/link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"data/{name} is a file or a link to nowhere"):
            inside(tmp_path, monkeypatch, sources="a.jsonl", dataset=name)
        code, problems = shards.verify(tmp_path / "data" / name)
        assert code == 2 and "is a file or a link" in problems[0]
    (tmp_path / "data").rename(tmp_path / "was")
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="data is a file"):
        inside(tmp_path, monkeypatch, sources="a.jsonl")
    assert (tmp_path / "data").is_file() and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("keys", "says"), [
    ({"val_fraction": 1e-9}, "1e-07 % was asked"), ({"val_fraction": 0.5}, "complete"),
    ({"min_chars": 2**62}, f"300 under {2**62} characters"), ({"max_chars": 2**62}, "complete"),
    ({"max_chars": 1}, "300 over 1 characters"), ({"workers": 10**6}, "complete"),
    ({"block_size": 1}, "complete"), ({"tokenizer": ""}, "no such file"),
    ({"tokenizer": "bpe:9" + "9" * 30}, "from 258 to"), ({"tokenizer": "bpe:258"}, "complete")])
def test_keys_at_their_bounds(keys, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES))
    with contextlib.ExitStack() as stack:
        if re.match("300|no|from", says):
            stack.enter_context(pytest.raises(UserError, match=says))
        inside(tmp_path, monkeypatch, sources="a.jsonl", **keys)
        assert says in capsys.readouterr().out


def test_inspect_shows_the_documents(reference):
    out, _ = run(reference, "--inspect=data/one")
    assert "mistral" in out and f"{len(BIG):,} documents in" in out
    first = next(t for t in BIG if not held_out(t))
    assert first.split("\n")[0][:20] in out


# ---- the hub

def test_no_argument_takes_openwebtext_from_the_hub(tmp_path):
    files = {"data/train-00000-of-00002.parquet": parquet(LINES[:150]),
             "data/train-00001-of-00002.parquet": parquet(LINES[150:]),
             "data/validation-00000-of-00001.parquet": parquet(texts(9)),
             "README.md": b"# text\n"}
    with Hub({"ashaba1in/small_openwebtext": files}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "cache"}
        run(tmp_path, "--val_fraction=0.1", env=env)
        folder = tmp_path / "data/openwebtext"
        good(folder, LINES)
        source = shards.read_manifest(folder)["source"][0]
        assert source["revision"] == SHA and list(source["files"]) == sorted(files)[1:3]
        hub.asked.clear()
        out, _ = run(tmp_path, "--val_fraction=0.1", env=env)
        assert "already prepared" in out and not hub.asked
        _, error = run(tmp_path, "--sources=hf:ashaba1in/small_openwebtext:test", "--dataset=x",
                       env=env, code=2)
        assert "no split 'test'" in error and "validation" in error
    _, error = run(tmp_path, "--sources=hf:a/b", "--dataset=x", env=env, code=2)
    assert "--sources=PATH" in error and error.count("\n") == 1
    assert not (tmp_path / "data/x").exists()


def test_a_download_that_breaks_off_goes_on(tmp_path):
    files = {"data/train-00000-of-00001.parquet": parquet(LINES)}
    with Hub({"owner/name": files}) as hub:
        hub.breaks = 2
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "cache"}
        run(tmp_path, "--sources=hf:owner/name", "--dataset=d", "--tokenizer=bytes",
            "--val_fraction=0.1", "--block_size=64", env=env)
        good(tmp_path / "data/d", LINES)
        assert hub.breaks == 0


# ---- bad input

def bad_sources(folder):
    """{name: (sources, what the message says)}."""
    write = {
        "empty.txt": b"", "empty.jsonl": b"", "x.docx": b"x", "null.jsonl": b'{"text": null}\n',
        "cut.parquet": KINDS["a.parquet"][:-100], "cut.jsonl.xz": KINDS["a.jsonl.xz"][:-100],
        "cut.jsonl.gz": KINDS["a.jsonl.gz"][:-100], "cut.jsonl.zst": KINDS["a.jsonl.zst"][:-100],
        "body.jsonl": b'{"body": "x", "id": 1}\n', "latin.txt": "café".encode("latin-1"),
        "broken.jsonl": b"{oops\n" * 3, "body.parquet": parquet(LINES, column="body"),
        "number.parquet": parquet([1, 2], kind=pa.int64()),
        "it's $1 b.parquet": parquet(LINES, column="body"),
        "rot.jsonl.xz": b"not xz at all",
    }
    for name, data in write.items():
        (folder / name).write_bytes(data)
    (folder / "nothing").mkdir()
    return {
        "missing path": ("gone.jsonl", "gone.jsonl"),
        "glob without a match": ("*.nope", r"\*.nope"),
        "folder without text": ("nothing", "nothing"),
        "empty txt": ("empty.txt", "empty"),
        "empty beside full": (["a.jsonl", "empty.jsonl"], "empty.jsonl is empty"),
        "unknown kind": ("x.docx", r"x.docx.*\.txt.*\.jsonl.*\.parquet"),
        "no text at all": ("null.jsonl", r"not a string \(first null.jsonl:1\)"),
        "truncated parquet": ("cut.parquet", "cut.parquet is damaged or cut short"),
        "truncated xz": ("cut.jsonl.xz", "cut.jsonl.xz is damaged or cut short"),
        "truncated gz": ("cut.jsonl.gz", "cut.jsonl.gz is damaged or cut short"),
        "truncated zst": ("cut.jsonl.zst", "cut.jsonl.zst is damaged or cut short"),
        "not an xz": ("rot.jsonl.xz", "rot.jsonl.xz is damaged or cut short"),
        "absent column": ("body.jsonl", "no column 'text'.*body, id"),
        "absent parquet column": ("body.parquet", "no column 'text'; it has id, body"),
        "number column": ("number.parquet", "int64, not text"),
        "quotes in a name": ("it's $1 b.parquet", re.escape("--sources=" + shlex.quote(
            str({"path": "it's $1 b.parquet", "column": "body"})))),
        "latin-1": ("latin.txt", r"invalid utf-8 \(first latin.txt\)"),
        "only broken lines": ("broken.jsonl", r"3 broken line \(first broken.jsonl:1\)"),
        "no sources": ([], "sources"),
        "not a source": (7, "7"),
        "misspelt dict": ({"path": "a.jsonl", "colum": "x"}, "colum"),
        "odd slice": ({"path": "a.jsonl", "slice": "a-b"}, "slice"),
        "no hub name": ("hf:", "hf:NAME"),
    }


@pytest.mark.parametrize("case", range(23))
def test_bad_sources_are_one_line_and_leave_nothing(case, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(KINDS["a.jsonl"])
    sources, message = list(bad_sources(tmp_path).values())[case]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        inside(tmp_path, monkeypatch, sources=sources)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_tokenizer_and_exit_code(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES))
    for words in (("--tokenizer=mistrel",), ("--tokenizer=bpe:100",), ("--dataset=../x",),
                  ("--workerz=2",), ("--sources=gone",)):
        _, error = run(tmp_path, "--sources=a.jsonl", *words, code=2)
        assert error.startswith("error: ") and error.count("\n") == 1, error
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_is_dropped_is_counted_and_the_first_is_named(tmp_path, monkeypatch):
    odd = [b'{"text": "half', b'["text"]', b'{"text": 7}', b'{"text": ""}', b'{"id": 1}',
           b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"   "]
    lines = jsonl(LINES).splitlines()
    content = b"\n".join([*lines[:200], *odd, *lines[200:], *odd]) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.parquet").write_bytes(parquet([*LINES[:60], None, "", *LINES[60:]]))
    folder = inside(tmp_path, monkeypatch, sources=["a.jsonl", "a.parquet"])
    good(folder, LINES + LINES)
    dropped = {rule: (entry["count"], entry["first"]) for rule, entry in
               shards.read_manifest(folder)["dropped"].items()}
    assert dropped == {
        "broken line": (4, "a.jsonl:201"), "text is not a string": (3, "a.jsonl:203"),
        "empty": (3, "a.jsonl:204"), "no column 'text', only id": (2, "a.jsonl:205"),
        "invalid utf-8": (4, "a.jsonl:206")}


def test_help_loads_nothing_slow():
    code = ("import runpy, sys; sys.modules['numpy'] = None; sys.argv = ['prepare.py', '--help']; "
            f"runpy.run_path({str(ROOT / 'prepare.py')!r}, run_name='__main__')")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert out.returncode == 0 and b"--verify" in out.stdout


# ---- long texts, cleaning

def test_long_documents_are_cut_before_a_space_and_long_words_anywhere(tmp_path, monkeypatch):

    monkeypatch.setattr(documents, "DOCUMENT", 1000)
    monkeypatch.setattr(records, "DOCUMENT", 1000)
    monkeypatch.setattr(records, "LINE", 30000)
    rng = random.Random(4)
    long = " ".join("".join(rng.choices("aя你🎉", k=rng.randint(1, 9))) for _ in range(900))
    word = "я" * 1801
    (tmp_path / "a.jsonl").write_bytes(jsonl(["short", long, word, "y" * 30000, "end"]))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + long.encode())
    (tmp_path / "c.parquet").write_bytes(parquet([long, "short"]))
    for name, want in (("a.jsonl", ["short", long, word, "end"]), ("b.txt", [long]),
                       ("c.parquet", [long, "short"])):
        dropped, cut = Tally(), Tally()
        _, parts = survey(str(tmp_path / name))
        have = list(documents.documents(parts, dropped, cut))
        assert "".join(have) == "".join(want) and max(len(t.encode()) for t in have) <= 1003
        assert cut["document over 0 MB"]["count"] == 1 + (name == "a.jsonl")
        assert dropped.records == len(want)
        assert all(t[0] == " " for t in have[1:] if t[0] in " aя你🎉" and name == "b.txt")
        if name == "a.jsonl":
            assert dropped == {"line over 0 MB": {"count": 1, "first": "a.jsonl:4"}}
    monkeypatch.setattr(tokenizer, "CUT", 500)
    for spec in ("mistral", "gpt2", "bpe:300"):
        words = tokenizer.make_tokenizer(spec, lambda: [long])
        assert words.engine == "tiktoken"
        for text in (long, "  b \t c" * 300, "x\n\n y z" * 300):
            assert words.encode(text) == words._ids([text])[0]
        assert words.cut_words == 0
        assert words.decode(words.encode(word)) == word and words.cut_words == 3
        words.give_up()
        assert words.decode(words.encode(word)) == word


def test_one_long_text_is_held_out_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENT", 1000)
    monkeypatch.setattr(records, "DOCUMENT", 1000)
    text = "\n".join(f"line {i} of it" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    _, parts = survey(str(tmp_path / "a.txt"))
    held_out = choose_hold_out(parts, 0.1)
    assert held_out == selection.HoldOut(start=int(0.9 * len(text)))
    have = list(placed(documents.documents(parts[:1], Tally()), held_out))
    assert "".join(t for _, t in have) == text
    assert [s for s, _ in have] == sorted(s for s, _ in have)
    held = "".join(t for s, t in have if s == "val")
    assert text.endswith("\n" + held) and 0 <= len(held) - len(text) / 10 < 20


def book(size, seed=0):
    """About `size` bytes of lines."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(["plain", "words", "of", "a", "book"], k=12)) for _ in
             range(size // 57)]
    return "\n".join(lines)


@pytest.mark.parametrize("fraction", [0.005, 0.1, 0.5])
def test_of_few_long_documents_the_ends_are_held_out(fraction, tmp_path, monkeypatch, capsys):
    """Two books, a book beside rows, a book of one line: validation is what was asked for; rows
    beside them go by their hash, as ever."""
    rows = texts(40)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/a.txt").write_text(book(400_000))
    (tmp_path / "two/b.txt").write_text(book(60_000, 1))
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.txt").write_text(book(400_000))
    (tmp_path / "mixed/b.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "line.txt").write_text("Title\n" + book(300_000).replace("\n", " "))
    (tmp_path / "cjk.txt").write_text("Title\n" + "语言模型" * 30_000)
    for i, name in enumerate(("two", "mixed", "line.txt", "cjk.txt")):
        folder = inside(tmp_path, monkeypatch, dataset=f"d{i}", sources=name, val_fraction=fraction)
        splits = shards.read_manifest(folder)["splits"]
        share = splits["val"]["bytes"] / (splits["val"]["bytes"] + splits["train"]["bytes"])
        assert abs(share - fraction) <= 0.2 * fraction, (name, share)
        assert "was asked" not in capsys.readouterr().out
    texts_of = [bytes(ids[1:-1]).decode() for ids in stored(tmp_path / "data/d0", "val")]
    for text, number in zip(texts_of, (0, 1), strict=True):  # each book's end
        assert book(400_000 if number == 0 else 60_000, number).endswith(text)
    held = [bytes(ids[1:-1]).decode() for ids in stored(tmp_path / "data/d1", "val")]
    assert held[1:] == [t for t in rows if held_out(t, fraction)]


def test_a_split_far_from_what_was_asked_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES[:6]))
    folder = inside(tmp_path, monkeypatch, sources="a.jsonl", val_fraction=0.01)
    splits = shards.read_manifest(folder)["splits"]
    share = splits["val"]["bytes"] / (splits["val"]["bytes"] + splits["train"]["bytes"])
    said = f"validation is {100 * share:.3g} % of the text, 1 % was asked"
    assert said in capsys.readouterr().out


def test_length_bounds_and_strict(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES))
    kept = [t for t in LINES if 50 <= len(t) <= 300]
    folder = inside(tmp_path, monkeypatch, sources="a.jsonl", min_chars=50, max_chars=300)
    good(folder, kept)
    dropped = shards.read_manifest(folder)["dropped"]
    assert dropped["under 50 characters"]["count"] == sum(len(t) < 50 for t in LINES)
    assert dropped["over 300 characters"]["count"] == sum(len(t) > 300 for t in LINES)
    with pytest.raises(UserError, match="min_chars was 50, is now 51"):
        inside(tmp_path, monkeypatch, sources="a.jsonl", min_chars=51, max_chars=300)
    (tmp_path / "b.jsonl").write_bytes(jsonl(LINES[:250]) + b"{oops\n")
    with pytest.raises(UserError, match=r"b\.jsonl:251: broken line.*--strict"):
        inside(tmp_path, monkeypatch, dataset="b", sources="b.jsonl", strict=True)
    inside(tmp_path, monkeypatch, dataset="b", sources="b.jsonl")


def test_exact_duplicates(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES[:200] + LINES[50:90]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(LINES[150:]))
    folder = inside(tmp_path, monkeypatch, sources=["a.jsonl", "b.jsonl"], dedup="exact", workers=2)
    good(folder, LINES)
    assert shards.read_manifest(folder)["dropped"] == {
        "duplicate": {"count": 90, "first": "a.jsonl:201"}}


def test_near_duplicates(tmp_path, monkeypatch):
    """Planted copies with one word in fifteen changed, among texts of the same few words."""
    pytest.importorskip("rensa")
    rng = random.Random(7)
    vocabulary = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(2000)]
    originals = [rng.choices(vocabulary, k=rng.randint(60, 300)) for _ in range(600)]
    copies = []
    for text in originals[:300]:
        text = list(text)
        for i in rng.sample(range(len(text)), len(text) // 15):
            text[i] = rng.choice(vocabulary)
        copies.append(text)
    lines = [" ".join(text) for text in originals + copies]
    (tmp_path / "a.jsonl").write_bytes(jsonl(lines))
    folder = inside(tmp_path, monkeypatch, sources="a.jsonl", dedup="near")
    ids = stored(folder, "train") + stored(folder, "val")
    kept = {bytes(one[1:-1]).decode() for one in ids}
    assert len(kept & set(lines[:600])) >= 594  # at most one in a hundred removed wrongly
    assert len(kept & set(lines[600:])) <= 15  # nineteen in twenty copies found
    count = shards.read_manifest(folder)["dropped"]["near duplicate"]["count"]
    assert count == 900 - len(kept)


def test_who_may_not_work_in_a_folder_leaves_it_there(tmp_path):
    folder = tmp_path / "data" / "x"
    with prepare.held(folder):
        with pytest.raises(UserError, match="another prepare"), \
                prepare.held(folder):
            pass
        assert folder.is_dir()
    assert not folder.parent.exists()  # nothing was begun


def test_a_folder_is_read_once_and_whole(tmp_path, capsys, monkeypatch):
    """Endings in any case; links to what is there already count once; what is not read is said."""
    folder = tmp_path / "f"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "B.TXT", "deep/c.Txt.GZ", "d.JSONL"):
        data = json.dumps({"text": name}).encode() if "JSON" in name else name.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    for name in ("r.md", "s.md", "t.csv", ".hidden.txt"):
        (folder / name).write_text("not read")
    (folder / "self").symlink_to(".")
    (folder / "sibling").symlink_to("deep")
    (folder / "0link.txt").symlink_to("a.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(folder), "~/f"):
        records, parts = survey(path)
        assert sorted(t for p in parts for t in documents.documents([p], Tally())) == sorted(
            ["a.txt", "B.TXT", "deep/c.Txt.GZ", "d.JSONL"])
        assert set(records[0]["files"]) == {"a.txt", "B.TXT", "deep/c.Txt.GZ", "d.JSONL"}
        out = capsys.readouterr().out
        assert ("not read: 1 .csv, 2 .md, 1 links to files that are read, 2 links to folders that "
                "are read, 1 links to nothing, 1 pipes or devices (read") in out
    assert len(survey([f"{folder}/*.txt"])[0][0]["files"]) == 1
    for given in (["~/f/*"], {"path": "~/f/*"}):
        with pytest.raises(UserError, match="csv: unknown kind"):
            survey(given)
    assert "not read: 3 folders, 1 links" in capsys.readouterr().out
    survey(["~/f/a.txt", "~/f"])
    assert "1 of its files belong to an earlier source too" in capsys.readouterr().out
    for name, says in (("gone.txt", "1 links to nothing"), ("pipe.txt", "1 pipes or devices")):
        with pytest.raises(UserError, match=says):
            survey(str(folder / name))
    with monkeypatch.context() as patch:  # who runs the tests may be allowed to read everything
        patch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "deep")))
        with pytest.raises(PermissionError):
            survey(str(folder))
    (tmp_path / "a,b.txt").write_text("a comma")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--sources=~/a,b.txt"])
    found = command.parse_arguments("", prepare.Flags).overrides["sources"]
    assert list(survey(found)[0][0]["files"]) == ["a,b.txt"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--sources=~/a, b.txt,~/a,b.txt"])
    found = command.parse_arguments("", prepare.Flags).overrides["sources"]
    with pytest.raises(UserError, match=r"/a is no file.*if '~/a, b.txt,~/a,b.txt' is one name"):
        survey(found)


def test_blank_files_are_counted_and_said(tmp_path, capsys):
    """Empty or white space alone, packed or not: beside others no document comes of them."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.txt").write_text("words")
    for name, data in (("b.jsonl", b" \n\n\t\n"), ("c.txt", b"\n  \n"), ("d.txt", b""),
                       ("e.jsonl", b""), ("g.jsonl.gz", gzip.compress(b"\n\n")),
                       ("h.txt", b"\xef\xbb\xbf\n")):
        (tmp_path / "f" / name).write_bytes(data)
    dropped = Tally()
    _, parts = survey(f"{tmp_path}/f")
    assert list(documents.documents(parts, dropped)) == ["words"] and dropped["empty"]["count"] == 3
    assert "/f: 6 of its files are blank: b.jsonl, c.txt, d.txt, e.j" in capsys.readouterr().out
    for name in ("b.jsonl", "c.txt", "e.jsonl", "g.jsonl.gz", "h.txt"):
        with pytest.raises(UserError, match=f"{name} is empty"):
            survey([f"{tmp_path}/f/a.txt", f"{tmp_path}/f/{name}"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_source_of_which_nothing_is_taken_is_refused(name, tmp_path):
    """Also beside others: what a slice leaves of it is nothing."""
    (tmp_path / name).write_bytes(KINDS.get(name, b"a text"))
    (tmp_path / "b.txt").write_text("another")
    for keys in ({"slice": ":0"}, {"slice": "3:0"}, {"slice": "20:10"}, {"slice": "300:"},
                 {"max_documents": 0}, {"max_documents": -1}):
        empty = "slice and max_documents leave none" if "slice" in keys else "number above 0, not"
        with pytest.raises(UserError, match=empty):
            survey([str(tmp_path / "b.txt"), {"path": str(tmp_path / name)} | keys])


@pytest.mark.parametrize(("ending", "pack"), [
    (".gz", gzip.compress), (".xz", lzma.compress), (".zst", lambda data: zst(data))])
def test_what_follows_packed_data(ending, pack, tmp_path):
    """More streams are read, after padding too; what is no stream is refused: it may be one that is
    damaged. zstd knows no padding."""
    path, one, two = tmp_path / f"a.jsonl{ending}", jsonl(LINES[:9]), jsonl(LINES[9:])
    zeros = [] if ending == ".zst" else [b"\0" * 4, b"\0" * 20_000]
    for pad in (b"", *zeros):
        path.write_bytes(pack(one) + pad + pack(two) + b"".join(zeros))
        assert list(documents.documents(survey(str(path))[1], Tally())) == LINES
    for tail in (b"x", b"garbage that follows", b"\0\0x", pack(two)[:5], pack(two)[:-9],
                 b"??" + pack(two)[2:]):
        path.write_bytes(pack(one) + tail)
        with pytest.raises(UserError, match=f"{ending} is damaged or cut short: .*replace it"):
            list(documents.documents(survey(str(path))[1], Tally()))


# ---- what is held out, document by document

def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def parts_with(folder, lines, name="a.jsonl"):
    (folder / name).write_bytes(jsonl(lines))
    return survey(str(folder / name))[1]


def test_what_decides_a_split(tmp_path):
    assert selection.text_hash("Привет") == hash_of("Привет")
    assert selection.deciding_part("a text") == "a text" == selection.said("a text")
    pair = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "m"},
                         {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}], "tools": [{"name": "t"}]}
    assert json.loads(selection.deciding_part(records.Dialog(json.dumps(pair)))) == [
        pair["messages"][:3], [{"name": "t"}]]
    alone = records.Dialog(json.dumps({"messages": pair["messages"]}))
    assert selection.deciding_part(alone) == alone


def test_the_bound_is_that_of_the_fraction_or_beside_the_nearest_document(tmp_path):
    hashes = sorted(map(hash_of, LINES))
    parts = parts_with(tmp_path, LINES)
    assert choose_hold_out(parts, 0.1) == selection.HoldOut(bound=int(0.1 * 2**64))
    assert choose_hold_out(parts, 0) == selection.HoldOut()
    few = parts_with(tmp_path, LINES[:3])
    low, _, high = sorted(map(hash_of, LINES[:3]))
    assert low > int(1e-6 * 2**64)
    assert choose_hold_out(few, 1e-6).bound == low + 1  # the nearest one, so that there is one
    assert high < int((1 - 1e-9) * 2**64)
    assert choose_hold_out(few, 1 - 1e-9).bound == high  # all but the furthest
    assert choose_hold_out(few, (low + 1) / 2**64).bound >= low
    assert hashes[0] < int(0.1 * 2**64) <= hashes[-1]


def test_it_is_read_no_further_than_needed(tmp_path, monkeypatch):
    """SCAN characters, and on until both splits have a document."""
    read = []
    lines = [str(i) * 10 for i in range(400)]
    parts = parts_with(tmp_path, lines)
    real = documents.documents
    monkeypatch.setattr(selection, "documents",
                        lambda *words: (read.append(text) or text for text in real(*words)))
    for scan, fraction in ((100, 0.5), (100, 0.02), (10**6, 0.5)):
        monkeypatch.setattr(selection, "SCAN", scan)
        read.clear()
        choose_hold_out(parts, fraction)
        held = [hash_of(line) < int(fraction * 2**64) for line in lines]
        settled = max(held.index(True), held.index(False)) + 1
        sizes = np.cumsum([len(line) for line in lines])
        enough = int(np.searchsorted(sizes, scan, "right")) + 1
        assert len(read) == min(len(lines), max(settled, enough, 2))


def test_one_document_is_cut_and_none_is_an_error(tmp_path):
    text = "".join(f"line {i}\n" for i in range(300))
    parts = parts_with(tmp_path, [text])
    assert choose_hold_out(parts, 0.25) == selection.HoldOut(fraction=0.25, long=0)
    assert choose_hold_out(parts, 0) == selection.HoldOut()
    with pytest.raises(UserError) as error:
        choose_hold_out(parts, 0.25, whole=True)
    assert str(error.value) == ("sources: a single dialog, pair or client is left, and validation "
                                "needs another; give more")
    with pytest.raises(UserError) as error:
        choose_hold_out(parts_with(tmp_path, ["", ""], "b.jsonl"), 0.1)
    assert str(error.value).startswith(
        "sources: no document is left; dropped: 2 empty (first b.jsonl:1)")
    with pytest.raises(UserError, match="needs another; give more; dropped: 1 empty"):
        choose_hold_out(parts_with(tmp_path, ["", "x"], "b.jsonl"), 0.1, whole=True)
    with pytest.raises(UserError, match=r"no document is left: there is no record in them$"):
        choose_hold_out([], 0.1)
    twice = parts_with(tmp_path, ["same", "same"], "c.jsonl")
    assert choose_hold_out(twice, 0.25) == selection.HoldOut(fraction=0.25, long=0)


@pytest.mark.parametrize(("sizes", "fraction", "long"), [
    ([4096] * 3, 0.1, True), ([4095] * 3, 0.1, False), ([4096] * 63, 0.05, True),
    ([4096] * 64, 0.05, False), ([9000] + [100] * 300, 0.1, True),
    ([9000] + [100] * 1000, 0.1, False), ([9000] + [100] * 300, 0.05, False)])
def test_ends_are_held_out_where_few_documents_are_most_of_the_text(sizes, fraction, long,
                                                                    tmp_path):
    """The last one: by their hashes nearly the fraction is held out."""
    lines = [chr(0x4e00 + i) * size for i, size in enumerate(sizes)]
    found = choose_hold_out(parts_with(tmp_path, lines), fraction)
    assert found.long == (4096 if long else sys.maxsize)
    assert found.fraction == (fraction if long else 0)


def test_the_least_end_is_a_hundred_characters(tmp_path):
    parts = parts_with(tmp_path, ["a" * 30000, "b" * 9000])
    found = choose_hold_out(parts, 0.01)
    assert (found.long, found.fraction) == (10000, 0.01)
    assert [(split, len(text)) for split, text in placed(["c" * 10000, "d" * 9999], found)] == [
        ("train", 9900), ("val", 100), ("train", 9999)]


def test_where_a_document_is_cut():
    def cut(texts, **how):
        return [*placed(texts, selection.HoldOut(**how))]

    line, word = "a" * 85 + "\n" + "b" * 14, "a" * 85 + " " + "b" * 14
    assert cut([line], fraction=0.1, long=100) == [("train", line[:90]), ("val", line[90:])]
    line, word = "a" * 88 + "\n" + "b" * 11, "a" * 88 + " " + "b" * 11
    for text in (line, word):  # near: a fifth of the end before it
        assert cut([text], fraction=0.1, long=100) == [("train", text[:89]), ("val", text[89:])]
    both = "a" * 88 + "\n \n " + "b" * 8  # a line's end rather than a word's
    assert cut([both], fraction=0.1, long=100) == [("train", both[:89]), ("val", both[89:])]
    edge = "a" * 87 + "\n" + "b" * 12  # just too far
    assert cut([edge], fraction=0.1, long=100) == [("train", edge[:90]), ("val", edge[90:])]
    assert cut(["xy"], fraction=1.0, long=0) == [("val", "xy")]  # no empty text
    assert cut(["abcd"] * 3, start=6) == [("train", "abcd"), ("train", "ab"), ("val", "cd"),
                                          ("val", "abcd")]
    low, high = sorted(["x", "y"], key=hash_of)
    assert cut([low, high], bound=hash_of(high)) == [("val", low), ("train", high)]


def test_rows_repeat_earlier_ones_by_the_keys_of_a_shard():
    marks = np.array([[[5], [7], [5], [5], [9], [7]]], np.uint64)
    shards_of = [selection.repeats(marks, selection.Shard(i, 3, 0)) for i in range(3)]
    assert sum(found.astype(int) for found in shards_of).tolist() == [0, 0, 1, 1, 0, 1]
    whole = selection.repeats(marks, selection.Shard(0, 1, 0))
    assert whole.tolist() == [False, False, True, True, False, True]
    # signatures: of 32 bands of four hashes half must be equal, and a band altogether
    draw = np.random.default_rng(1)
    first = draw.integers(0, 2**32, 128, dtype=np.uint32)
    for equal, repeated in ((64, True), (63, False)):
        other = first.copy()
        other[equal:] += 1
        marks = np.stack([first, other]).reshape(2, 32, 4).swapaxes(0, 1)
        assert selection.repeats(marks, selection.Shard(0, 1, 0)).tolist() == [False, repeated]


def test_some_that_agree_in_a_band_by_chance_may_stand_between():
    draw = np.random.default_rng(1)
    for between, found in ((2, True), (3, False)):
        rows = draw.integers(0, 2**32, (between + 2, 128), dtype=np.uint32)
        rows[:, :4] = rows[0, :4]  # all agree in the first band; elsewhere none does
        rows[-1] = np.where(np.arange(128) % 4 < 3, rows[0], rows[-1])  # but for three of four
        marks = rows.reshape(len(rows), 32, 4).swapaxes(0, 1)
        repeated = selection.repeats(marks, selection.Shard(0, 1, 0))
        assert repeated.tolist() == [False] * (between + 1) + [found]


def test_marks_of_all_parts_lie_band_by_band(tmp_path):
    (tmp_path / "work.tmp").mkdir()
    kind = selection.DEDUP["near"]
    marks = [np.arange(n * 128, dtype="<u4").reshape(n, 128) + 1000 * n for n in (3, 0, 2)]
    for number, own in enumerate(marks):
        assert selection.marks_of(tmp_path, number).name == f"marks-0000{number}.npy"
        np.save(selection.marks_of(tmp_path, number), own)
    path, sizes = selection.gather_marks(tmp_path, 3, kind)
    assert sizes == [3, 0, 2] and path == tmp_path / "work.tmp/marks-5.bin"
    whole = np.concatenate(marks)
    found = np.fromfile(path, "<u4").reshape(32, 5, 4)
    assert all(np.array_equal(found[band], whole[:, 4 * band:4 * band + 4]) for band in range(32))
    assert (kind.rule, kind.width, kind.bands) == ("near duplicate", 128, 32)
    exact = selection.DEDUP["exact"]
    assert (exact.rule, exact.width, exact.bands) == ("duplicate", 1, 1)
    assert exact.mark("a").tolist() == [hash_of("a")]


def test_a_signature_is_of_runs_of_three_words():
    rensa = pytest.importorskip("rensa")

    def of(runs):
        made = rensa.RMinHash(num_perm=128, seed=1)
        made.update(runs)
        return made.digest()

    assert selection.signature("One two, THREE four!").tolist() == of(["one two three",
                                                                        "two three four"])
    assert selection.signature("One two").tolist() == of(["One two"])  # shorter: as it is
    assert selection.signature("a b c").dtype == np.dtype("<u4")


def test_near_duplicates_need_their_package(monkeypatch):
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: None)
    selection.check_dedup("exact")
    with pytest.raises(UserError, match="dedup=near needs the package rensa: "):
        selection.check_dedup("near")
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: name == "rensa")
    selection.check_dedup("near")


# ---- documents

@pytest.mark.parametrize(("rules", "text", "says"), [
    ({}, "", "empty"), ({}, "x", ""), ({"min_chars": 3}, "ab", "under 3 characters"),
    ({"min_chars": 3}, "abc", ""), ({"max_chars": 3}, "abc", ""),
    ({"max_chars": 3}, "abcd", "over 3 characters"), ({"max_chars": 0}, "abcd", ""),
    ({"min_chars": 9}, records.Dropped("broken line"), "broken line")])
def test_rules_name_what_they_drop(rules, text, says):
    assert documents.Rules(**rules).broken_by(text) == says


def test_what_is_noted_is_added_up_and_the_first_is_named():
    tally, asked = Tally(), []
    for place in "abc":
        tally.note("rule", lambda place=place: asked.append(place) or place, 2)
    tally.note("other", lambda: "d")
    assert tally == {"rule": {"count": 6, "first": "a"}, "other": {"count": 1, "first": "d"}}
    assert asked == ["a"] and tally.records == 0
    tally.add({"rule": {"count": 5, "first": "z"}, "third": {"count": 1, "first": "y"}})
    assert tally["rule"] == {"count": 11, "first": "a"} and tally["third"]["first"] == "y"


def test_texts_are_cut_only_over_their_bound(monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENT", 16)
    monkeypatch.setattr(records, "DOCUMENT", 16)
    assert documents.cut_up("abc ") == ["abc "]
    assert documents.cut_up("abcd efgh ijkl m") == ["abcd efgh ijkl m"]  # 16 bytes
    assert documents.cut_up("abcd efgh ijkl mn") == ["abcd efgh ijkl", " mn"]
    assert documents.cut_up("я" * 9) == ["я" * 8, "я"]
    dialog = records.Dialog("x" * 100)
    assert documents.cut_up(dialog) == [dialog]


def test_beginnings_are_spread_evenly(tmp_path):
    """`size` characters in all, of each part a share; everything if there is less."""
    def of(*sizes):
        found = []
        for number, size in enumerate(sizes):
            lines = [f"{number}{'x' * 99}"] * (size // 100)
            (tmp_path / f"{number}.jsonl").write_bytes(jsonl(lines))
            found.append(records.Piece(str(tmp_path / f"{number}.jsonl"), "", ".jsonl", "text",
                                       size))
        return [documents.Part([piece]) for piece in found]

    def taken(parts, size):
        return [text[0] for text in documents.beginnings(parts, size)]

    parts = of(1000, 2000)
    assert parts[0].size == 1000
    assert taken(parts, 600) == ["0"] * 2 + ["1"] * 4
    assert taken(parts, 610) == ["0"] * 3 + ["1"] * 5
    assert taken(parts, 603) == ["0"] * 3 + ["1"] * 5  # 201 and 402 characters
    small = [documents.Part([records.replace(part.pieces[0], size=150)]) for part in parts[:1]]
    assert small[0].size == 150 and taken(small, 150) == taken(small, 200) == ["0"] * 10
    assert taken(small, 149) == ["0"] * 2  # of a packed file, whose size is a guess
    assert taken(parts, 2999) == ["0"] * 10 + ["1"] * 20
    assert taken(parts, 3000) == taken(parts, 10**6) == ["0"] * 10 + ["1"] * 20
    assert taken([], 5) == []


# ---- workers, and how far they are

def overview(parts, counters):
    parts = {number: Mock(size=size) for number, size in parts.items()}
    made = workers.Overview(Path("data/x"), parts, counters)
    made.began -= 8
    return made


def test_how_far_all_parts_are(capsys):
    counters = [30, 8000, 50_000, 40_000, 10_000]
    view = overview({0: 100_000, 1: 200_000}, counters)
    view.update()
    assert (view.done, view.total, view.unit, view.active) == (50, 300, "kB", True)
    assert capsys.readouterr().out == ""
    assert view.details(8) == (", 30 documents, 1,000 tokens/s, 0 of 2 parts, 8 s, slowest: part "
                               "1, 5%")
    view.waiting = {0}
    assert view.details(4) == (", 30 documents, 2,000 tokens/s, 1 of 2 parts, 4 s, slowest: part "
                               "0, 40%")
    counters[3] = 0
    assert view.details(4).endswith("1 of 2 parts, 4 s")  # it has not begun
    counters[2] = 3_000_000  # packed files were larger than guessed: a tenth for what waits
    view.update()
    assert (view.done, view.total) == (3000, 3000 + 150)
    view.waiting = set()
    view.update()
    assert (view.done, view.total) == (3000, 3000)
    line = capsys.readouterr().out
    assert line.startswith("data/x: 3,000 of 3,000 kB, ") and line.endswith("2 of 2 parts, 8 s\n")
    assert workers.Overview(Path("y"), {3: Mock(size=0)}, [1, 1, 5, 0, 0, 0, 7]).details(
        1).endswith("slowest: part 3, 700%")


def test_what_workers_report_is_added_up():
    import multiprocessing

    counters, shown = multiprocessing.get_context("spawn").Array("q", 6), []
    report = partial(workers.count_up, counters, lambda: shown.append(1))
    report(2, 1, 10, 100)
    report(0, 2, 20, 200)
    report(2, 1, 10, 100)
    assert list(counters) == [4, 40, 400, 200, 0, 200] and len(shown) == 3
    told = []
    there = workers.There("tools", told.append)
    there.report(5, 1, 2, 3)
    there.report(5, 1, 2, 3)
    assert told == [[1, 2, 3], [2, 4, 6]]
    made = workers.make_there(lambda worker, number, part: worker.report(number, part, 0, 1),
                              "tools", 7, 9, told.append)
    assert made == [9, 0, 1] == told[-1]


def test_as_many_processes_as_are_asked_or_needed(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 5)
    assert [workers.Processes(most).count(jobs) for most, jobs in (
        (0, 9), (0, 4), (3, 9), (3, 2), (1, 1))] == [5, 4, 3, 2, 1]
    cluster = Mock(places=lambda jobs: jobs + 1)
    assert workers.Nodes(cluster).count(3) == 4


def test_one_process_makes_the_parts_in_their_order(tmp_path, capsys):
    made = []

    def make(worker, number, part):
        made.append((worker.tools, number, part.size))
        worker.report(number, 1, 2, part.size)

    parts = {3: Mock(size=7000), 1: Mock(size=5000)}
    workers.Processes(1).run(tmp_path, make, parts, loaded="tools")
    assert made == [("tools", 3, 7000), ("tools", 1, 5000)]
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 and out[0].startswith(f"{tmp_path}: 12 of 12 kB, ")
    assert ", 2 documents, " in out[0] and "2 of 2 parts" in out[0]


def test_several_processes_share_the_parts_and_an_error_ends_them(tmp_path, capsys, monkeypatch):
    """With threads in place of the processes."""
    asked, ended, views = [], [], []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count, context, start, given):
            asked.append((count, context.get_start_method(), start, given[0]))
            workers.POOL[:] = [workers.Worker("tools", partial(
                workers.count_up, given[1], workers.nothing))]
            super().__init__(count)

        def shutdown(self, wait=True, *, cancel_futures=False):
            ended.append((wait, cancel_futures))
            super().shutdown(wait, cancel_futures=cancel_futures)

    class Spied(workers.Overview):
        def update(self):
            views.append((list(self.counters), sorted(self.waiting)))
            super().update()

    def make(worker, number, part):
        if part.size == 13:
            raise UserError("bad luck")
        worker.report(number, 1, 10, part.size)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(workers, "Overview", Spied)
    monkeypatch.setattr(workers, "POOL", [])
    parts = {number: Mock(size=1000 * number) for number in (1, 2, 4)}
    workers.Processes(2).run(tmp_path, make, parts, load="load")
    assert asked == [(2, "spawn", workers.start_worker, "load")] and ended == [(True, False)]
    assert views[-1] == ([3, 30, 7000, 0, 1000, 2000, 0, 4000], [])
    assert "3 of 3 parts" in capsys.readouterr().out
    child = Mock()
    monkeypatch.setattr(workers.multiprocessing, "active_children", lambda: [child])
    with pytest.raises(UserError, match="bad luck"):
        workers.Processes(2).run(tmp_path, make, parts | {3: Mock(size=13)})
    assert child.kill.call_count == 1 and ended[1] == (False, True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGINT not in mask  # Ctrl-C is heard again


def test_a_process_of_the_pool_is_prepared(monkeypatch):
    import multiprocessing

    calls, counters = [], multiprocessing.get_context("spawn").Array("q", 4)
    monkeypatch.setattr(workers, "POOL", [])
    monkeypatch.setattr(workers.signal, "signal", lambda *words: calls.append(words))
    monkeypatch.setattr(workers.signal, "pthread_sigmask", lambda *words: calls.append(words))
    monkeypatch.setattr(workers.threading, "Thread", lambda **keys: calls.append(keys) or Mock())
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")
    workers.start_worker(lambda: "tools", counters)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert calls == [(signal.SIGINT, signal.SIG_DFL), (signal.SIG_UNBLOCK, {signal.SIGINT}),
                     {"target": workers.die_with, "args": [None], "daemon": True}]
    workers.work(lambda worker, number, part: worker.report(number, part, 2, 3), 0, 1)
    assert list(counters) == [1, 2, 3, 3] and workers.POOL[0].tools == "tools"
    codes, parent = [], Mock()
    monkeypatch.setattr(workers.os, "_exit", codes.append)
    workers.die_with(parent)
    assert codes == [1] and parent.join.call_count == 1


def test_nodes_report_what_they_make_and_what_is_made_counts_once(tmp_path, capsys,
                                                                  monkeypatch):
    parts, seen = {0: Mock(size=4000), 2: Mock(size=6000)}, []

    def each(make, jobs, load, show):
        assert jobs is parts and make.func is workers.make_there
        views = []
        for reports, number in (({0: [1, 10, 1000]}, 0), ({2: [5, 50, 2000]}, 2)):
            show(reports)
            yield number, [n * 2 for n in reports[number]]
            show({})
            views.append(number)
        seen.extend(views)

    class Spied(workers.Overview):
        def update(self):
            views.append((list(self.counters), sorted(self.waiting)))
            super().update()

    views: list = []
    monkeypatch.setattr(workers, "Overview", Spied)
    workers.Nodes(Mock(each=each)).run(tmp_path, None, parts)
    assert seen == [0, 2] and views == [
        ([1, 10, 1000, 1000, 0, 0], [0, 2]), ([2, 20, 2000, 2000, 0, 0], [2]),
        ([7, 70, 4000, 2000, 0, 2000], [2]), ([12, 120, 6000, 2000, 0, 4000], [])]
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: 6 of 6 kB, ") and ", 12 documents, " in out
    views.clear()
    workers.Nodes(Mock(each=lambda make, jobs, load, show: show({}) or [])).run(
        tmp_path, None, parts)
    assert views == [([0] * 6, [0, 2])]


# ---- parts

@pytest.mark.parametrize(("sizes", "expected"), [
    ([], [[]]), ([5], [[5]]), ([3, 4], [[3, 4]]), ([9], [[9]]), ([10], [[10], []]),
    ([11, 1], [[11], [1]]), ([4, 6, 1], [[4, 6], [1]])])
def test_documents_are_encoded_by_the_megabyte(sizes, expected, monkeypatch):
    monkeypatch.setattr(parts_room, "BATCH", 10)
    found = [*parts_room.batches(("train", "x" * size) for size in sizes)]
    assert [[len(text) for _, text in batch] for batch in found] == expected


def test_counts_of_parts_are_added_up_and_the_longest_stays():
    none = parts_room.no_counts()
    assert none == {split: {"documents": 0, "tokens": 0, "bytes": 0, "longest": 0}
                    for split in ("train", "val")}
    counts = none["train"]
    for more in ({"tokens": 3, "longest": 3}, {"tokens": 9, "longest": 9},
                 {"tokens": 5, "longest": 5, "learned": 2}):
        parts_room.add_counts(counts, more)
    assert counts == {"documents": 0, "tokens": 17, "bytes": 0, "longest": 9, "learned": 2}
    assert none["val"]["tokens"] == 0


def test_a_part_is_finished_when_its_files_are_whole(tmp_path):
    (tmp_path / "work.tmp").mkdir()
    assert parts_room.finished_part(tmp_path, 3) == {}
    made = {"files": {"train-00003.bin": {"size": 4}, "train-00003.idx": {"size": 2}}}
    (tmp_path / "work.tmp/part-00003.json").write_text(json.dumps(made))
    for name, size, whole in (("train-00003.bin", 4, False), ("train-00003.idx", 2, True),
                              ("train-00003.idx", 1, False), ("train-00003.idx", 3, False)):
        (tmp_path / name).write_bytes(bytes(size))
        assert parts_room.finished_part(tmp_path, 3) == (made if whole else {})


@pytest.mark.parametrize(("tokens", "held", "keys", "says"), [
    (64, 1, {}, "its train split has 64 tokens, fewer than one row of block_size 64 + 1; give more "
     "text or lower block_size"), (65, 1, {}, ""), (65, 0, {}, ""), (64, 1, {"packing": "doc"}, ""),
    (64, 0, {"packing": "fit", "documents": "chat"}, "no dialog is left in its val split; give "
     "more, or a greater block_size"),
    (64, 0, {"packing": "fit", "documents": "table"}, "no client is left in its val split; give "
     "more, or a greater block_size"), (64, 1, {"packing": "fit", "documents": "table"}, "")])
def test_what_a_set_lacks_is_said(tokens, held, keys, says):
    config = Settings(**{"block_size": 64, "packing": "concat"} | keys)
    splits = {"train": {"tokens": tokens, "documents": 1}, "val": {"tokens": 1, "documents": held}}
    assert parts_room.what_is_lacking(config, splits) == says


def test_rows_that_were_not_asked_for_may_be_dropped_up_to_a_share():
    made = {"splits": {"train": {"documents": 6}, "val": {"documents": 1}}, "dropped": {
        "duplicate": {"count": 9, "first": "a:1"}, "over max_tokens 3": {"count": 2, "first": "b"},
        "unknown role": {"count": 2, "first": "a:7"}, "broken line": {"count": 1, "first": "a:9"}}}
    manifest = {"recipe": {"sources": [{"path": "a.jsonl"}]}, "by_source": [made]}
    assert parts_room.rows_in(made) == 21
    parts_room.refuse_many_dropped(manifest, 3 / 21)
    parts_room.refuse_many_dropped({"recipe": {"sources": [{"path": "a"}]}}, 0)
    with pytest.raises(UserError) as error:
        parts_room.refuse_many_dropped(manifest, 3 / 21 - 1e-9)
    assert str(error.value) == (
        "sources: 3 of 21 rows of a.jsonl are dropped: 2 unknown role (first a:7); 1 broken line "
        "(first a:9); mend it by its converter, fields or block_size, or allow it with "
        "--max_dropped=0.15")


# ---- sources

@pytest.mark.parametrize(("given", "expected"), [
    ("a.txt", [{"path": "a.txt"}]), (["a", {"path": "b"}], [{"path": "a"}, {"path": "b"}]),
    (("a",), [{"path": "a"}]), ({"path": "a", "max_documents": 1}, None),
    ({"path": "a", "slice": ":"}, None), ({"path": "a", "slice": "3:17"}, None),
    ({"path": "a", "weight": 1}, None), ({"path": "a", "weight": 0.1}, None),
    ({"path": "a", "fields": {}}, None), ({"path": "a", "shuffle": False}, None)])
def test_sources_are_read_as_dicts(given, expected):
    found = sources.described(given)
    assert found == (expected or [given]) and all(one is not given for one in found)


@pytest.mark.parametrize(("given", "says"), [
    ({"path": "a", "colum": "x"}, "{'path': 'a', 'colum': 'x'} has an unknown key 'colum'; did you "
     "mean column?"),
    *((bad, f"{bad!r} is not a path, glob, -, hf:NAME, embedded or {{'path': ..., 'column': ..., "
       "'slice': '10:20', 'max_documents': 5}") for bad in (3, {"column": "x"}, {"path": ""})),
    *(({"path": "a", "slice": bad}, f"slice of a is FROM:TO, not {bad!r}") for bad in (
        "3", "a:b", "1:2:3", "-1:2", 5)),
    *(({"path": "a", "max_documents": bad}, "max_documents of a takes a whole number above 0, "
       f"not {bad!r}") for bad in (0, -1, 1.0, True, "5")),
    *(({"path": "a", "weight": bad}, f"weight of a takes a number above 0, not {bad!r}") for bad
      in (0, 0.0, -1.5, float("inf"), float("nan"), True, "1")),
    ({"path": "a", "name": 3}, "name of a takes a text, not 3"),
    ({"path": "a", "fields": []}, "fields of a takes a dict, not []"),
    ({"path": "a", "columns": "x"}, "columns of a takes a list, not 'x'"),
    ({"path": "a", "shuffle": 1}, "shuffle of a takes True or False, not 1")], ids=str)
def test_sources_that_are_none_are_refused(given, says):
    with pytest.raises(UserError) as error:
        sources.described([given])
    assert str(error.value) == f"sources: {says}"


@pytest.mark.parametrize(("documents", "given", "says"), [
    ("text", {"name": "x"}, "name of a is for documents='chat' and 'preference'"),
    ("text", {"id": "x"}, "id of a is for documents='table'"),
    ("chat", {"column": "x"}, "column of a has no effect on documents=chat"),
    ("preference", {"id": "x"}, "id of a has no effect on documents=preference"),
    ("table", {"slice": ":3"}, "slice of a has no effect on documents=table"),
    ("table", {"system": "x"}, "system of a has no effect on documents=table"),
    ("chat", {"train_on": "user"}, "train_on of a is assistant, last or all, not 'user'"),
    ("chat", {"fields": {"x": "y"}}, "fields of a takes {our name: yours}, not 'x': 'y'; ours "),
    ("chat", {"fields": {"messages": 3}}, "fields of a takes {our name: yours}, not 'messages': "),
    ("chat", {"count": 1, "weight": 1.0}, "a has a count and a weight; give one")])
def test_keys_of_sources_have_an_effect_or_are_refused(documents, given, says):
    with pytest.raises(UserError) as error:
        sources.check_sources([{"path": "a"} | given], documents)
    assert str(error.value).startswith(f"sources: {says}")


def test_keys_of_sources_that_go_together(tmp_path, capsys):
    def check(*given, documents="chat"):
        sources.check_sources([{"path": "a"} | one for one in given], documents)

    for train_on in ("assistant", "last", "all"):
        check({"train_on": train_on, "fields": {"messages": "m"}, "system": "s", "slice": ":3"})
    check({"weight": 1}, {"weight": 2})
    check({"count": 1}, {}, documents="preference")
    check({"column": "x", "slice": ":3", "max_documents": 4}, documents="text")
    with pytest.raises(UserError, match="give all of them a weight, or none; a count is for"):
        check({"weight": 1}, {})
    assert capsys.readouterr().out == ""
    (tmp_path / "c.py").write_text("def f(record):\n    return record\n")
    check({"converter": f"{tmp_path}/c.py:f", "fields": {"own": "theirs"}})
    assert capsys.readouterr().out == f"sources: a: its rows go through {tmp_path}/c.py:f\n"
    with pytest.raises(UserError, match="fields of a takes"):
        check({"converter": f"{tmp_path}/c.py:f", "fields": {"own": 3}})


def test_how_records_become_dialogs():
    bare = sources.how_of({}, "last", "chat")
    assert (bare.converter, bare.fields, bare.system, bare.train_on, bare.pairs) == (
        "auto", (), "", "last", False)
    full = sources.how_of({"converter": "rows", "fields": {"a": "b"}, "system": "s",
                           "train_on": "all"}, "last", "preference")
    assert (full.converter, full.fields, full.system, full.train_on, full.pairs) == (
        "rows", (("a", "b"),), "s", "all", True)


def piece(size, number=0):
    return records.Piece(f"{number}", f"{number}", ".txt", "text", size)


@pytest.mark.parametrize(("sizes", "expected"), [
    ([], [[]]), ([10], [[10]]), ([40 << 10] * 4, [[40 << 10]] * 4), ([32 << 10] * 5,
     [[32 << 10] * 2] * 2 + [[32 << 10]]), ([(64 << 10) + 1, 1], [[(64 << 10) + 1], [1]]),
    ([1, 64 << 10], [[1], [64 << 10]]), ([1, (64 << 10) - 1], [[1, (64 << 10) - 1]]),
    ([50 << 10] * 24, [[50 << 10] * 2] * 12), ([1 << 20] * 2400, [[1 << 20] * 64] * 37 +
     [[1 << 20] * 32])])
def test_pieces_are_joined_to_parts(sizes, expected):
    found = sources.parts_of([piece(size) for size in sizes])
    assert [[one.size for one in part.pieces] for part in found] == expected


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "abcdefghi"), ({"slice": "2:"}, "cdefghi"), ({"slice": ":7"}, "abcdefg"),
    ({"slice": "2:7"}, "cdefg"), ({"slice": "3:6"}, "def"), ({"slice": "4:4"}, ""),
    ({"slice": "0:1"}, "a"), ({"slice": "8:"}, "i"), ({"slice": "9:"}, ""),
    ({"max_documents": 1}, "a"), ({"max_documents": 3}, "abc"), ({"max_documents": 4}, "abcd"),
    ({"slice": "2:7", "max_documents": 3}, "cde"), ({"slice": "2:4", "max_documents": 3}, "cd"),
    ({"slice": "5:", "max_documents": 3}, "fgh")])
def test_a_slice_is_of_all_files_of_a_source(given, expected, tmp_path):
    for name, letters in (("1", "abc"), ("2", "def"), ("3", "ghi")):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(letters))
    files = [records.Piece(str(path), path.name, ".jsonl", "text", path.stat().st_size)
             for path in sorted(tmp_path.iterdir())]
    taken = [*sources.pieces_of({"path": "x"} | given, files)]
    assert "".join(documents.documents([documents.Part(taken)], Tally())) == expected
    assert all(one.skip < one.take for one in taken)
    if not given:
        assert taken == [records.replace(one, stop=one.size) for one in files]


def test_few_pieces_are_made_of_a_packed_file(tmp_path):
    line = jsonl(["x" * 90])
    (tmp_path / "0.jsonl.gz").write_bytes(gzip.compress(line * 900_000, 1))
    size = (tmp_path / "0.jsonl.gz").stat().st_size * 3
    file = records.Piece(str(tmp_path / "0.jsonl.gz"), "0.jsonl.gz", ".jsonl", "text", size)
    for files, pieces in ((1, 4), (2, 4), (3, 2), (4, 2), (5, 1), (9, 1)):
        found = [*sources.pieces_of({"path": "x"}, [file] * files)]
        assert len(found) == files * pieces, files


def test_what_a_file_is_told_by(tmp_path, monkeypatch):
    def kind(name, source="x", how=None, content=b"x"):
        (tmp_path / name).write_bytes(content)
        made = sources.whole_file({"path": source}, name, tmp_path / name, how)
        assert made.path == str(tmp_path / name) and made.label == name
        assert made.column == "text" and made.how is how
        return made.kind, made.size

    assert kind("a.py", "embedded") == (".txt", 1) == kind("a.md") == kind("a.txt")
    assert kind("a.jsonl.gz") == (".jsonl", 3) and kind("a.txt.xz") == (".txt", 4)
    how = sources.how_of({}, "last", "chat")
    for content, text, dialogs in ((b' \n{"a": 1}', ".jsonl", ".jsonl"), (b"[1]", ".txt", ".json")):
        assert kind("in.csv", "-", None, content)[0] == text
        assert kind("in.csv", "-", how, content)[0] == dialogs
    assert kind("in.csv", "-", None, b"word {")[0] == ".txt"
    assert kind("in.csv", "-", None, b" " * 65535 + b"{")[0] == ".jsonl"
    assert kind("in.csv", "-", None, b" " * 65536 + b"{")[0] == ".txt"
    with pytest.raises(UserError) as error:
        kind("a.txt", how=how)
    assert str(error.value) == (f"{tmp_path / 'a.txt'}: dialogs are rows of .jsonl, .json, "
                                ".parquet, not plain text")
    with pytest.raises(UserError, match="unknown kind of file"):
        kind("a.exe")
    assert sources.whole_file({"path": "x", "column": "c"}, "a.txt", tmp_path / "a.txt",
                              None).column == "c"


def test_what_is_read_twice_or_blank_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.txt", "a"), ("b.txt", " \n"), ("c.txt", "c")):
        (tmp_path / name).write_text(content)
    found, parts = survey(["*.txt", "a.txt"])
    assert capsys.readouterr().out == (
        "sources: *.txt: 1 of its files are blank: b.txt\n"
        "sources: a.txt: 1 of its files belong to an earlier source too\n")
    assert [one["path"] for one in found] == ["*.txt", "a.txt"]
    assert [[one.label for one in part.pieces] for part in parts] == [
        ["a.txt", "b.txt", "c.txt", "a.txt"]]
    prints = found[0]["files"]
    assert prints["a.txt"] == sources.content_hash(Path("a.txt"), {}) and len(prints) == 3
    old = [{"files": dict.fromkeys(prints, "0" * 16)}, {"files": {}}]
    older = survey(["*.txt", "a.txt"], old)[0]  # of an older data set
    assert {len(one) for one in older[0]["files"].values()} == {16}
    assert older[1]["files"] == {"a.txt": prints["a.txt"]}
    capsys.readouterr()
    with pytest.raises(UserError, match=r"^sources: b\.txt is empty$"):
        survey("b.txt")
    with pytest.raises(UserError) as error:
        survey(["none.txt", "a.txt"])
    assert str(error.value).endswith("; if 'none.txt,a.txt' is one name, write in a config file: "
                                     "sources = ['none.txt,a.txt']")
    with pytest.raises(UserError) as error:
        survey(["none.txt"])
    assert "is one name" not in str(error.value)
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES[:3]))
    with pytest.raises(UserError, match=r"a\.jsonl has no record, or its slice and max_documents "):
        survey({"path": "a.jsonl", "slice": "3:"})
    survey("a.txt", seen=(seen := {}))
    assert len(seen) == 1


def test_parts_of_dialogs_are_of_one_source_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"prompt": "q", "response": "a"}\n')
    found, parts = survey(["a.jsonl", "b.jsonl"], documents="chat", train_on="last")
    assert [(part.source, [one.label for one in part.pieces]) for part in parts] == [
        (0, ["a.jsonl"]), (1, ["b.jsonl"])]
    assert [sorted(one) for one in found] == [["files", "path"]] * 2
    assert {one.how.train_on for part in parts for one in part.pieces} == {"last"}
    (tmp_path / "c.py").write_text("def f(record):\n    return record\n")
    found, _ = survey({"path": "a.jsonl", "converter": "c.py:f"}, documents="chat",
                      train_on="last")
    assert found[0]["converter"] == hashlib.sha256((tmp_path / "c.py").read_bytes()).hexdigest()


# ---- records

@pytest.mark.parametrize(("text", "expected"), [
    ("", [""]), ("x" * 16, ["x" * 16]), ("x" * 17, ["x" * 16, "x"]),
    ("a" * 7 + " " + "b" * 9, ["a" * 7 + " " + "b" * 8, "b"]),
    ("a" * 8 + " " + "b" * 8, ["a" * 8, " " + "b" * 8]),  # from the half on
    ("a" * 15 + " b", ["a" * 15, " b"]), ("a" * 16 + " b", ["a" * 16, " b"]),
    ("a b c d e f g h i j", ["a b c d e f g h", " i j"]),
    ("a" * 15 + "я", ["a" * 15, "я"]), ("a" * 14 + "你b", ["a" * 14, "你b"]),
    ("a" * 13 + "🎉", ["a" * 13, "🎉"]), ("a" * 12 + "🎉b", ["a" * 12 + "🎉", "b"]),
    ("я" * 17, ["я" * 8, "я" * 8, "я"])])
def test_a_text_is_cut_before_a_space_or_a_character(text, expected, monkeypatch):
    monkeypatch.setattr(records, "DOCUMENT", 16)
    found = [*records.chunks_of(io.BytesIO(text.encode()))]
    assert [chunk.decode() for chunk in found] == expected


@pytest.mark.parametrize(("name", "size", "few", "expected"), [
    ("a.jsonl", 10, 4, [(0, 10, 10)]), ("a.jsonl", 0, 4, []),
    ("a.jsonl", 65536, 4, [(0, 65536, 65536)]),
    ("a.jsonl", 65537, 4, [(0, 65536, 65536), (65536, 1, 65537)]),
    ("a.jsonl", 12 << 16, 1, [(i << 16, 1 << 16, (i + 1) << 16) for i in range(12)]),
    ("a.jsonl", 24 << 16, 1, [(i << 17, 1 << 17, (i + 1) << 17) for i in range(12)]),
    ("a.jsonl", 1 << 30, 1, [(i << 26, 1 << 26, (i + 1) << 26) for i in range(16)]),
    ("a.jsonl.gz", 1 << 20, 4, [(i << 18, 1 << 18, (i + 1) << 18 if i < 3 else sys.maxsize)
                                for i in range(4)]),
    ("a.jsonl.xz", (1 << 20) + 1, 1, [(0, (1 << 20) + 1, sys.maxsize)]),
    ("a.jsonl.zst", 1 << 20, 4, [(0, 1 << 20, sys.maxsize)])])
def test_where_lines_are_cut_into_pieces(name, size, few, expected):
    file = records.Piece(name, name, ".jsonl", "text", size)
    assert [(one.start, one.size, one.stop) for one in records.line_pieces(file, few)] == expected


def test_a_line_that_is_too_long_is_one_record(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE", 20)
    fits, over = b'{"text": "' + b"x" * 7 + b'"}\n', b'{"text": "' + b"x" * 8 + b'"}\n'
    assert (len(fits), len(over)) == (20, 21)
    content = over + fits + b"\n" + b"y" * 45 + b"\n" + fits + over
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))  # cannot be sought in
    starts = (0, 1, 20, 21, 22, 41, 42, 43, 60, 87, 88, 89, 107, 108, 109)
    for start, name in itertools.product(starts, ("a.jsonl", "a.jsonl.gz")):
        piece = records.Piece(str(tmp_path / name), "a", ".jsonl", "text", 0, start)
        found = [(at, *texts) for at, texts in records.line_records(piece)]
        wanted = [(0, "line over 0 MB"), (21, "xxxxxxx"), (42, "line over 0 MB"), (88, "xxxxxxx"),
                  (108, "line over 0 MB")]
        assert found == [one for one in wanted if one[0] >= start], start
        stopped = records.replace(piece, start=0, stop=start)
        found = [(at, *texts) for at, texts in records.line_records(stopped)]
        assert found == [one for one in wanted if one[0] < start], start
    places = [records.line_place(piece, at) for at in (0, 21, 42, 88, 108)]
    assert places == [":1", ":2", ":4", ":5", ":6"]


def test_objects_may_lie_over_the_ends_of_chunks(tmp_path):
    texts = ["a" * 700_000, "b" * 700_000, "c", "é" * 1_200_000, "d" * 10]
    for content in (as_array(texts), "\n".join(json.dumps({"text": text}, ensure_ascii=False)
                                               for text in texts).encode()):
        (tmp_path / "a.json").write_bytes(content)
        piece = records.Piece(str(tmp_path / "a.json"), "a.json", ".json", "text", 0)
        found = [(at, *one) for at, one in records.object_records(piece)]
        assert found == [*enumerate(texts)]


def test_a_file_is_read_to_a_byte_in_chunks():
    megabyte = 1 << 20
    for size, sizes in ((0, []), (5, [5]), (megabyte, [megabyte]), (megabyte + 1, [megabyte, 1]),
                        (2 * megabyte + 7, [megabyte, megabyte, 7])):
        file = io.BytesIO(bytes(3 * megabyte))
        assert [len(chunk) for chunk in records.first_bytes(file, size)] == sizes


@pytest.mark.parametrize(("line", "text", "dropped"), [
    (b'{"text": "a", "n": 1}', "a", False), (b'{"text": ""}', "", False),
    (b'{"n": 1, "m": 2}', "no column 'text', only n, m", True), (b"{}", "no column 'text', only ",
                                                                 True),
    (b'{"text": 3}', "text is not a string", True), (b'{"text": null}', "text is not a string",
                                                     True),
    (b"[1]", "broken line", True), (b'{"text": "a"', "broken line", True), (b"{" * 9999,
                                                                            "broken line", True),
    (b'{"text": "\xff"}', "invalid utf-8", True), (b'{"text": "\\ud800"}', "invalid utf-8", True),
    (b'{"text": "\\udfff"}', "invalid utf-8", True), (b'{"text": "\\ue000\\ud7ff"}', "\ue000\ud7ff",
                                                    False),
    (b'{"text": "\\ud83c\\udf89"}', "🎉", False)])
def test_what_is_taken_of_a_line(line, text, dropped):
    found = records.text_in(piece(1), False, line)
    assert found == text and isinstance(found, records.Dropped) == dropped


def test_a_byte_order_mark_begins_a_file_alone():
    mark = b"\xef\xbb\xbf"
    assert records.decoded(mark + b"a", True) == "a"
    assert records.decoded(mark + b"a") == "\ufeffa" == records.decoded(mark * 2 + b"a", True)
    assert records.text_in(piece(1), True, mark + b'{"text": "a"}') == "a"
    assert records.text_in(piece(1), False, mark + b'{"text": "a"}') == "broken line"


def test_a_dialog_of_the_greatest_size(monkeypatch):
    how = sources.how_of({}, "last", "chat")
    one = records.replace(piece(1), how=how)
    record = {"prompt": "q", "response": "a"}
    text = records.taken(one, record)
    assert isinstance(text, records.Dialog) and text.left_out == 0
    for size, fits in ((len(text), True), (len(text) - 1, False)):
        monkeypatch.setattr(records, "DOCUMENT", size)
        assert (records.taken(one, record) == text) == fits
    found = records.taken(one, {"messages": [{"role": "narrator", "content": "x"}]})
    assert (found, found.found) == ("unknown role", "'narrator'")


@pytest.mark.parametrize(("name", "kind", "named"), [
    ("a.txt", ".txt", ".txt"), ("A.TXT.GZ", ".txt", ".txt"), ("a.json.zst", ".json", ".json"),
    ("a.jsonl.xz", ".jsonl", ".jsonl"), ("a.parquet", ".parquet", ".parquet"),
    ("a.parquet.gz", "", ""), ("a.md", "", ".txt"), ("a.md.gz", "", ".txt"), ("a.mdx", "", ""),
    ("a", "", ""), ("jsonl", "", ""), ("a.txt.bak", "", ""), ("a.csv.gz", "", "")])
def test_kinds_are_told_by_names(name, kind, named):
    assert (records.kind_of(name), records.kind_named(name)) == (kind, named)
    assert records.kind_of("x/B.Csv.gz", [".csv"]) == ".csv"


def test_how_files_are_unpacked(tmp_path):
    for ending, growth, seekable in (("", 1, True), (".gz", 3, True), (".XZ", 4, True),
                                     (".zst", 3, False)):
        packing = records.packing_of(f"a.jsonl{ending}")
        assert (packing.growth, packing.seekable) == (growth, seekable)
    content = random.Random(1).randbytes(50_000)
    half = 20_000
    for ending, pack in ((".gz", gzip.compress), (".xz", lzma.compress)):
        path = tmp_path / f"a{ending}"
        for packed in (pack(content[:half]) + pack(content[half:]),
                       pack(content[:half]) + bytes(9000) + pack(content[half:]) + bytes(3)):
            path.write_bytes(packed)
            with records.opened(str(path)) as file:
                assert file.readable() and file.read(7) == content[:7]
                assert file.read() == content[7:]
        path.write_bytes(pack(content)[:-9])
        with pytest.raises(UserError) as error, records.naming_damage(str(path)):
            records.opened(str(path)).read()
        assert str(error.value) == (f"{path} is damaged or cut short: its last packed stream does "
                                    "not end; replace it")
        path.write_bytes(b"")
        assert records.opened(str(path)).read() == b""


def test_blank_files_are_those_of_white_space(tmp_path):
    for content, blank in ((b"", True), (b"\xef\xbb\xbf \t\r\n", True), (b" " * 9000 + b"x", False),
                           (b"x" + b" " * 9000, False), (b"\0", False)):
        (tmp_path / "a.txt").write_bytes(content)
        assert records.is_blank(str(tmp_path / "a.txt")) == blank


def test_row_groups_are_pieces_with_their_sizes(tmp_path):
    lines = [str(i) * 50 for i in range(7)]
    (tmp_path / "a.parquet").write_bytes(parquet(lines, rows=3))
    file = records.Piece(str(tmp_path / "a.parquet"), "a", ".parquet", "text", 0)
    meta = pq.ParquetFile(tmp_path / "a.parquet").metadata
    cuts = [*records.row_pieces(file, 4)]
    assert [(one.start, one.size) for one in cuts] == [
        (i, meta.row_group(i).column(1).total_uncompressed_size) for i in range(3)]
    found = [(at, *texts) for one in cuts for at, texts in records.row_records(one)]
    assert found == [*enumerate(lines)]
    how = sources.how_of({}, "last", "chat")
    cuts = [*records.row_pieces(records.replace(file, how=how), 4)]
    assert [(one.start, one.size) for one in cuts] == [
        (i, meta.row_group(i).total_byte_size) for i in range(3)]
    places = [at for one in cuts for at, _ in records.row_records(one)]
    assert places == [*range(7)] and records.KINDS[".parquet"].place(file, 3) == " row 4"
    assert records.KINDS[".json"].place(file, 3) == " object 4"


@pytest.mark.parametrize(("kind", "text"), [
    (pa.string(), True), (pa.large_string(), True), (pa.binary(), True), (pa.int64(), False),
    (pa.dictionary(pa.int32(), pa.string()), True), (pa.list_(pa.string()), False)])
def test_columns_of_text_are_read_and_others_refused(kind, text, tmp_path):
    values = pa.array([["x"]] if pa.types.is_list(kind) else [1] if kind == pa.int64() else ["x"])
    pq.write_table(pa.table({"text": values.cast(kind) if not pa.types.is_dictionary(kind) else
                             values.dictionary_encode()}), tmp_path / "a.parquet")
    file = records.Piece(str(tmp_path / "a.parquet"), "a", ".parquet", "text", 0)
    if text:
        assert [*next(iter(records.row_records(*records.row_pieces(file, 1))))[1]] == ["x"]
    else:
        with pytest.raises(UserError, match=r"column 'text' is .*, not text$"):
            [*records.row_pieces(file, 1)]


def test_damage_names_the_file_and_the_system_names_its_own():
    for raised, says in ((ValueError("x"), "a is damaged or cut short: x; replace it"),
                         (EOFError("y"), "a is damaged or cut short: y; replace it"),
                         (UnicodeDecodeError("utf-8", b"a", 0, 1, "z"), "a is no UTF-8 text: ")):
        with pytest.raises(UserError) as error, records.naming_damage("a"):
            raise raised
        assert str(error.value).startswith(says)
    with pytest.raises(FileNotFoundError), records.naming_damage("a"):
        Path("nowhere/at/all").read_bytes()


# ---- bounds and defaults

def test_the_bounds_of_what_is_read_at_a_time():
    """A document of 16 MB, a line of 64, parts of 64: docs/design.md counts on them."""
    assert (records.DOCUMENT, records.LINE, records.PART) == (2**24, 2**26, 2**26)
    assert (records.READ, parts_room.BATCH, prepare.LOOKED_AT) == (8192, 2**20, 500)
    assert (parts_room.SAMPLE, parts_room.CHECKED) == (2**25, 2**16)
    assert (selection.SCAN, selection.KEYS) == (2**24, 2**22)
    assert (selection.FEW, selection.NEARLY, selection.LONG, selection.TAIL) == (64, 0.2, 4096, 100)
    assert (selection.BANDS, selection.NEAR) == (32, 0.5)


def test_what_is_not_said_is_the_plain_case():
    assert documents.Rules() == documents.Rules(False, 0, 0)
    part = documents.Part([])
    assert (part.rules, part.source, part.repeated) == (documents.Rules(), 0, {})
    assert selection.HoldOut() == selection.HoldOut(0, 0.0, sys.maxsize, sys.maxsize)
    bare = records.Piece("p", "l", "k", "c", 3)
    assert (bare.start, bare.stop, bare.skip, bare.take) == (0, sys.maxsize, 0, sys.maxsize)
    assert bare.how is None and bare.table is None
    assert records.Dialog("x").left_out == 0 and records.Dropped("x").found == ""
    assert [kind.packable for kind in records.KINDS.values()] == [True, True, True, False]
    assert records.OF_ROWS == [".jsonl", ".json", ".parquet"]
    assert (records.PLAIN.growth, records.PLAIN.seekable) == (1, True)
    assert (prepare.Flags().show, prepare.Flags().ray) == (0, "")


def test_the_end_of_a_long_record_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENT", 16)
    monkeypatch.setattr(records, "DOCUMENT", 16)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["ab cd", "a b c d e f g h i j k l m n o p q r", ""]))
    for cut in (Tally(), None):
        dropped = Tally()
        found = [*documents.documents(survey(str(tmp_path / "a.jsonl"))[1], dropped, cut)]
        assert "".join(found) == "ab cda b c d e f g h i j k l m n o p q r" and len(found) == 4
        assert dropped.records == 2 and dropped == {"empty": {"count": 1, "first": "a.jsonl:3"}}
        assert cut is None or cut == {"document over 0 MB": {"count": 1, "first": "a.jsonl:2"}}


@pytest.mark.parametrize(("path", "revision", "split"), [
    ("hf:a/b", None, "train"), ("hf:a/b@r", "r", "train"), ("hf:a/b:val", None, "val"),
    ("hf:a/b@r:val", "r", "val")])
def test_what_is_asked_of_the_hub(path, revision, split, monkeypatch, capsys):
    asked = []
    hub = Mock(hf_hub_download=lambda *words, **keys: asked.append((words, keys)) or words[1])
    hub.HfApi().dataset_info = lambda name, **keys: asked.append((name, keys)) or Mock(sha="abc")
    files = {"train": ["hf://x@abc/2.txt", "hf://x@abc/1.txt"], "val": ["hf://x@abc/v.txt"]}
    built = Mock(**{"config.data_files": files})
    datasets = Mock(load_dataset_builder=lambda name, **keys: asked.append((name, keys)) or built)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    wanted = ["1.txt", "2.txt"] if split == "train" else ["v.txt"]
    downloads = [(("a/b", name), {"repo_type": "dataset", "revision": "abc", "etag_timeout": 20})
                 for name in wanted]
    about, found = sources.hub_files(path, {})
    assert about == {"revision": "abc"} and found == [(name, Path(name)) for name in wanted]
    assert asked == [("a/b", {"revision": revision, "timeout": 20}), ("a/b", {"revision": "abc"}),
                     *downloads]
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: file {number} of {len(wanted)}, {name}" for number, name in enumerate(wanted, 1)]
    asked.clear()  # what an earlier run found is asked for alone
    assert sources.hub_files(path, {"revision": "abc", "files": {name: "" for name in wanted}})[
        1] == found and asked == downloads
    with pytest.raises(UserError, match=r"no split 'x'; there are train, val$"):
        sources.hub_files("hf:a/b:x", {})
    built.config.data_files = None
    with pytest.raises(UserError, match=r"no split 'train'; there are $"):
        sources.hub_files("hf:a/b", {})
    hub.hf_hub_download = Mock(side_effect=KeyError("gone"))
    monkeypatch.setattr(stores, "WAITS", ())
    with pytest.raises(UserError) as error:
        sources.hub_files(path, {"revision": "abc", "files": {"1.txt": ""}})
    assert str(error.value) == (
        f"{path}: KeyError: 'gone'. Try again: what is downloaded stays. Offline: copy the files "
        "of datasets/a/b into a folder and say --sources=PATH; its files: 1.txt")
    for bad in ("hf:", "hf:a:b:c", "hf:a@", "hf:a:"):
        with pytest.raises(UserError, match=r"is not hf:NAME\[@REVISION\]\[:SPLIT\]"):
            sources.hub_files(bad, {})
