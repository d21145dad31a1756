"""export.py --to M.gguf, with llama.cpp (by xllamacpp) as the oracle."""

import copy
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import documents
from safetensors.torch import load_file, save_file

import export
from model import LLaMA, ModelConfig
from plainllama.command import parse
from plainllama.files import write_json
from plainllama.settings import UserError
from plainllama.tokens import templates, vocabulary
from plainllama.tokens.chat import END, TEMPLATE, Chat, with_roles
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer
from plainllama.tokens.tokenizer_json import TEMPLATE_FILE, complete
from plainllama.weights import gguf, llama_cpp, llama_cpp_process
from plainllama.weights.adapters import Adapter, initial_weight
from plainllama.weights.huggingface import write_folder
from plainllama.weights.peft import write_adapter

pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")
here = pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
# what Ollama gives a template: objects of tools and arguments print themselves as JSON
RENDER = """package main

import ("encoding/json"; "os"; "text/template")

type function struct {
	Name string `json:"name"`
	Description string `json:"description"`
	Parameters any `json:"parameters"`
}
func (f function) String() string { b, _ := json.Marshal(f); return string(b) }
type arguments map[string]any
func (a arguments) String() string { b, _ := json.Marshal(a); return string(b) }
type called struct { Name string; Arguments arguments }
type call struct { Function called }
type message struct { Role, Content, Thinking string; ToolCalls []call }
type tool struct { Function function }
type talk struct { Messages []message; Tools []tool; System, Prompt string }

func main() {
	var t talk
	if err := json.NewDecoder(os.Stdin).Decode(&t); err != nil { panic(err) }
	made := template.Must(template.ParseFiles(os.Args[1]))
	if err := made.Execute(os.Stdout, t); err != nil { panic(err) }
}
"""
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 16}
LINEAR = {"rope_scaling": "linear", "rope_factor": 4.0, "rope_theta": 5e5}


@pytest.fixture
def few(monkeypatch):
    """Less than what users get: seconds count here."""
    monkeypatch.setattr(llama_cpp, "TEXTS", 400)
    monkeypatch.setattr(llama_cpp, "PLACES", 24)
    monkeypatch.setattr(llama_cpp, "NEW", 6)


def write_model(folder: Path, kind: str = "bytes", chat: bool = False, padding: int = 3,
                spec: dict | None = None, **changes) -> Path:
    """A model folder of random weights, so large that its tokens differ."""
    if spec is None:
        tokenizer = make_tokenizer(kind, lambda: documents(40))
        spec = json.loads(tokenizer.json_bytes)
    if chat:
        spec, _ = with_roles(spec, "here")
    spec, data = complete(spec, "here")
    home = folder.with_name(f"{folder.name}_tokenizer")
    home.mkdir(parents=True)
    (home / "tokenizer.json").write_bytes(data)
    if chat:
        (home / TEMPLATE_FILE).write_text(TEMPLATE)
    entries = Tokenizer.load(home).vocab_size + padding
    model = LLaMA(ModelConfig(**{**dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96,
                                        vocab_size=entries, block_size=96), **changes}))
    for name, p in model.named_parameters():
        value = initial_weight(name, p.shape, model.config, 0)
        p.data.copy_(value + torch.linspace(0, 0.5, len(p)) if p.dim() == 1 else value * 6)
    folder.mkdir(parents=True)
    write_folder(folder, model.config, dict(model.named_parameters()), home / "tokenizer.json")
    return folder


def run(*words) -> int:
    return export.main(parse([str(word) for word in words], "", export.Flags, "files"))


def fields(path: Path) -> dict:
    import gguf as library

    return {name: field.contents() for name, field in library.GGUFReader(path).fields.items()}


@here
@pytest.mark.parametrize(("kind", "words", "changes"), [
    ("bytes", ["--verify"], LINEAR), ("bpe:400", ["--verify"], LLAMA3),
    ("bpe:400", ["--verify", "--type=q8_0"], {"tie_embeddings": True}),
    ("mistral", [], {"tie_embeddings": True}),
    pytest.param("gpt2", [], {"n_kv_head": 0}, marks=pytest.mark.slow)])
def test_llama_cpp_computes_the_same(tmp_path, few, capsys, kind, words, changes):
    chat = kind in ("bpe:400", "mistral")
    source = write_model(tmp_path / "model", kind, chat, **changes)
    assert run("--ckpt", source, "--to", tmp_path / "m.gguf", *words) == 0
    said = capsys.readouterr().out
    assert f"ids of 400 texts and {20 if chat else 0} dialogs are equal" in said
    if "--verify" in words:
        assert "log-probs at" in said
        assert "--type=q8_0" in words or "equal behind 20 of 20" in said
    else:
        assert "NOT checked" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "model_tokenizer", "m.gguf", "m.Modelfile"}


@here
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [
    ("bytes", "f32"), ("bpe:400", "f32"), ("mistral", "f32"), ("gpt2", "f32"), ("bpe:400", "f16"),
    ("bpe:400", "bf16"), ("mistral", "q8_0")])
def test_every_kind_and_every_type(tmp_path, capsys, kind, form):
    source = write_model(tmp_path / "model", kind, kind != "gpt2", **LLAMA3)
    assert run("--ckpt", source, "--to", tmp_path / "m.gguf", f"--type={form}", "--verify") == 0
    print(kind, form, capsys.readouterr().out)


@pytest.mark.parametrize(("wrong", "says"), [
    ("ids", "as [0]"), ("greedy", "token 1 is"), ("logprobs", "log-probs differ"),
    ("dialogs", "renders dialog 1"), ("nan", "log-probs differ"), ("end", "the model goes on")])
def test_what_llama_cpp_computes_otherwise_is_caught(tmp_path, monkeypatch, capsys, wrong, says):
    """No file is left, whatever differs."""
    source = write_model(tmp_path / "model", chat=True)
    words, model = Tokenizer.load(source), export.load_model(source)

    def answers(asked):
        ids = [words.encode(text) for text in asked["texts"]]
        chat = Chat(words)
        dialogs = [chat.prompt(dialog["messages"], [llama_cpp.TOOL] if "tools" in dialog else None)
                   for dialog in asked["dialogs"]]
        with torch.no_grad():
            greedy = [{"tokens": [int(model(torch.tensor([ids]))[0, -1].argmax())], "ended": False}
                      for ids in asked["prompts"]]
            probs = torch.cat([model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
                               for window in asked["windows"]]).clone()
        if wrong == "ids":
            ids[7] = [0]
        elif wrong == "dialogs":
            dialogs[0] = dialogs[0][1:]
        elif wrong == "greedy":
            greedy[3]["tokens"][0] ^= 1
        elif wrong == "end":
            greedy[3]["ended"] = True
        elif wrong in ("logprobs", "nan"):
            probs[5, 5] += 0.01 if wrong == "logprobs" else float("nan")
        return llama_cpp.Answers(ids, dialogs, greedy, probs)

    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "ask", answers)
    assert run("--ckpt", source, "--to", tmp_path / "m.gguf", "--verify") == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model_tokenizer"}


@here
def test_queries_in_the_wrong_order_are_caught(tmp_path, few, monkeypatch, capsys):
    """What is planted is in both directions, so that only llama.cpp can see it."""
    source = write_model(tmp_path / "model")
    for name in ("halves_to_neighbours", "neighbours_to_halves"):
        monkeypatch.setattr(gguf, name, lambda weight, heads: weight)
    assert run("--ckpt", source, "--to", tmp_path / "m.gguf", "--verify") == 1
    assert "in llama.cpp" in capsys.readouterr().err
    assert not list(tmp_path.glob("m.*"))


def test_weights_are_read_back(tmp_path, monkeypatch, capsys):
    source = write_model(tmp_path / "model")
    right = gguf.type_for
    monkeypatch.setattr(gguf, "type_for", lambda weight, kind: right(weight.mul_(1.01), kind))
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    model = export.load_model(source)
    gguf.write_gguf(tmp_path / "x", model, json.loads((source / "tokenizer.json").read_text()), "",
                    "f32", "x")
    monkeypatch.undo()
    assert "is not what was written" in gguf.compare(tmp_path / "x", export.load_model(source),
                                                     "f32")


def test_metadata(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    source = write_model(tmp_path / "tuned", "bpe:300", chat=True, d_model=48, **LINEAR)
    assert run("--ckpt", source, "--to", tmp_path / "a.gguf", "--type=q8_0",
               "--license=apache-2.0") == 0
    assert "NOT checked with llama.cpp" in capsys.readouterr().out
    found, words = fields(tmp_path / "a.gguf"), Tokenizer.load(source)
    ids = words.special_ids
    assert {key: found[key] for key in found if key.startswith("general.")} == {
        "general.architecture": "llama", "general.name": "tuned", "general.file_type": 7,
        "general.license": "apache-2.0", "general.quantization_version": 2}
    assert found["llama.context_length"] == 96
    assert found["llama.rope.scaling.type"] == "linear" and found["llama.rope.scaling.factor"] == 4
    assert found["tokenizer.ggml.pre"] == "qwen35"
    assert found["tokenizer.ggml.bos_token_id"] == words.bos_id
    assert found["tokenizer.ggml.eos_token_id"] == words.eos_id
    assert found["tokenizer.ggml.eot_token_id"] == ids[END]
    assert found["tokenizer.ggml.add_bos_token"] and not found["tokenizer.ggml.add_eos_token"]
    assert found["tokenizer.chat_template"] == TEMPLATE
    types, pieces = found["tokenizer.ggml.token_type"], found["tokenizer.ggml.tokens"]
    assert {pieces[i] for i, kind in enumerate(types) if kind == 3} == ids.keys()
    assert types[-3:] == [5, 5, 5] and len(pieces) == len(types) == words.vocab_size + 3
    # rows of 48 are no whole blocks of q8_0
    import gguf as library

    stored = {t.name: t.tensor_type.name for t in library.GGUFReader(tmp_path / "a.gguf").tensors}
    assert stored["blk.0.attn_q.weight"] == "F16" and stored["blk.0.ffn_down.weight"] == "Q8_0"
    assert stored["output_norm.weight"] == "F32"


@here
def test_a_greedy_chat_stops_by_itself(tmp_path, few):
    """Whatever is asked, the model ends its answer: in llama.cpp too, at <|end|>."""
    source = write_model(tmp_path / "model", chat=True)
    weights = load_file(source / "model.safetensors")
    end = Tokenizer.load(source).special_ids[END]
    weights["lm_head.weight"][end] = 0
    weights["model.norm.weight"] *= 0  # all logits are equal: the first is chosen
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    weights["model.norm.weight"] += 1
    weights["model.embed_tokens.weight"][:, 0] = 9  # a channel that all states have
    weights["lm_head.weight"][end, 0] = 5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    model = export.load_model(source)
    spec = json.loads((source / "tokenizer.json").read_text())
    gguf.write_gguf(tmp_path / "m.gguf", model, spec, TEMPLATE, "f32", "x")
    prompt = Chat(Tokenizer.load(source)).prompt([{"role": "user", "content": "Hello"}])
    said = llama_cpp.ask({"model": str(tmp_path / "m.gguf"), "texts": [], "dialogs": [],
                          "prompts": [prompt], "windows": [], "entries": 0, "new": 9, "filler": 0,
                          "threads": 1, "context": 90})
    assert said.greedy[0]["ended"] and len(said.greedy[0]["tokens"]) <= 1


@here
def test_an_adapter_is_merged(tmp_path, few, capsys):
    """Also one with new tokens, which llama.cpp takes in no adapter."""
    base = write_model(tmp_path / "base", padding=0)
    adapted = tmp_path / "adapter"
    shutil.copytree(write_model(tmp_path / "chat", chat=True, padding=0), adapted)
    (adapted / "model.safetensors").unlink()
    config = export.load_model(tmp_path / "chat").config
    targets = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    first = export.load_model(base).config.vocab_size
    weights, source = {}, torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        """As large as the base's: larger ones make logits whose rounding alone is beyond 1e-3."""
        return 0.1 * torch.randn(shape, generator=source)

    for name in targets:
        weights |= {f"{name}.lora_A": drawn(4, 64), f"{name}.lora_B": 3 * drawn(64, 4)}
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"{name}.rows"] = drawn(config.vocab_size - first, 64)
    write_adapter(adapted, weights, Adapter(4, 8.0, 0.0, tuple(targets), "fp32", first, str(base),
                                            ""), config)
    assert run("--ckpt", adapted, "--to", tmp_path / "m.gguf", "--verify") == 0
    said = capsys.readouterr().out
    assert "equal behind 20 of 20" in said
    difference, perplexity = re.search("difference (.*?); perplexity (.*?),", said).groups()
    assert float(difference) < 1e-4 and float(perplexity) < 5 * config.vocab_size
    with pytest.raises(UserError, match=r"--adapter has no effect on a \.gguf"):
        run("--ckpt", adapted, "--to", tmp_path / "n.gguf", "--adapter")


# ---- refused

def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path, monkeypatch):
    old = json.loads(make_tokenizer("bpe:300", lambda: documents(9)).json_bytes)
    old["pre_tokenizer"] = vocabulary.cut_like(vocabulary.OLD_SPLIT)
    source = write_model(tmp_path / "old", spec=old)
    monkeypatch.setattr(export, "load_model", lambda *_, **__: pytest.fail("not at once"))
    with pytest.raises(UserError, match="bpe:N of an older plainllama"):
        run("--ckpt", source, "--to", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.*"))
    mistral = json.loads(make_tokenizer("mistral").json_bytes)
    model = mistral["model"]
    for change, says in (
            ({"normalizer": {"type": "NFKC"}}, "changes texts"),
            ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts words"),
            ({"model": model | {"byte_fallback": False}}, "no bytes"),
            ({"model": model | {"merges": model["merges"][::-1][:-1]}}, "merges have an order"),
            ({"model": model | {"type": "Unigram", "vocab": [["a", 0]]}}, "Unigram model")):
        with pytest.raises(UserError, match=says):
            gguf.vocabulary_of(mistral | change, 0)


def test_bad_input(tmp_path, monkeypatch):
    source = write_model(tmp_path / "model")
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "recipe.Modelfile").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(export, "plain_model", lambda *_: pytest.fail("not at once"))
    for words, says in (
            (["there.gguf"], "there.gguf exists"), (["recipe.gguf"], "recipe.Modelfile exists"),
            (["file/m.gguf"], "cannot be made"), (["m.gguf", "--code"], "--code has no effect"),
            (["m.gguf", "--dtype=bf16"], "say --type=bf16"), (["m.gguf", "--push=a/b"], "--push"),
            (["folder", "--type=f16"], "--type is for a .gguf"),
            (["folder", "--verify"], "--verify is for a .gguf")):
        with pytest.raises(UserError, match=re.escape(says)):
            run("--ckpt", source, "--to", tmp_path / words[0], *words[1:])
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with pytest.raises(UserError, match=re.escape("'.[llamacpp]'")):
        run("--ckpt", source, "--to", tmp_path / "m.gguf", "--verify")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=re.escape("'.[gguf]'")):
        run("--ckpt", source, "--to", tmp_path / "m.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine" and not list(tmp_path.glob("m.*"))


def test_weights_beyond_f16_are_refused(tmp_path):
    model = export.load_model(write_model(tmp_path / "model"))
    model.lm_head.weight.data[3, 5] = 7e4
    spec = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    with pytest.raises(UserError, match=r"lm_head.weight has values beyond 65504.*--type=bf16"):
        gguf.write_gguf(tmp_path / "m", model, spec, "", "f16", "x")
    assert not (tmp_path / "m").exists()


# ---- a tokenizer in the terms of GGUF

def small(**model) -> dict:
    """A sentencepiece BPE of a few pieces; its merges are all that its vocabulary allows."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab",
              "▁ab", "aa", "aaa"]
    merges = [["a", "b"], ["▁", "ab"], "a a", ["a", "aa"], ["aa", "a"]]
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "merges": merges,
             "vocab": {piece: i for i, piece in enumerate(pieces)}} | model
    return {"model": model, "decoder": {"type": "ByteFallback"}, "pre_tokenizer": None,
            "added_tokens": [{"content": piece, "id": i, "special": True}
                             for i, piece in enumerate(pieces[:3])],
            "normalizer": {"type": "Sequence", "normalizers": [
                gguf.PREPEND, vocabulary.replace(" ", "▁")]}}


def test_a_sentencepiece_vocabulary():
    spec = small()
    made = gguf.vocabulary_of(spec, 268)
    assert made[:2] == ("llama", "default") and made[5:] == ([], True)
    assert made.pieces == [*spec["model"]["vocab"], "<|unused266|>", "<|unused267|>"]
    assert made.types == [2, 3, 3, *[6] * 256, *[1] * 7, 5, 5]
    scores = {"▁ab": -1, "aa": -2, "aaa": -3}  # the earlier a merge, the better; ab is the best
    assert made.scores == [scores.get(piece, 0) for piece in made.pieces]
    assert gguf.pairs_of(spec) == [("a", "b"), ("▁", "ab"), ("a", "a"), ("a", "aa"), ("aa", "a")]
    for changes, adds in (({"normalizer": vocabulary.replace(" ", "▁")}, False),
                          ({"pre_tokenizer": vocabulary.SPACES}, True)):
        assert gguf.vocabulary_of(spec | changes, 0).adds_space is adds


TEXTS = "it changes texts before it reads them"
WORDS = "cuts words in a way that llama.cpp does not have"
ORDER = "its merges have an order that no scores of pieces give"
BYTES = "it has no bytes for characters without a piece"


@pytest.mark.parametrize(("changes", "reason"), [
    ({"normalizer": None}, TEXTS), ({"normalizer": gguf.PREPEND}, TEXTS),
    ({"pre_tokenizer": {"type": "Whitespace"}}, f"it {WORDS}"),
    ({"ignore_merges": True}, f"it {WORDS}"), ({"byte_fallback": False}, BYTES),
    ({"vocab": {piece: i for piece, i in small()["model"]["vocab"].items() if piece != "<0xFF>"}},
     BYTES), ({"merges": small()["model"]["merges"][:-1]}, ORDER),
    ({"merges": [*small()["model"]["merges"], ["a", "b"]]}, ORDER),
    ({"merges": [*small()["model"]["merges"], ["b", "a"]]}, ORDER),
    ({"type": "Unigram"}, "it is a Unigram model"),
    ({"added_tokens": [{"content": "x", "id": 300, "special": False}]},
     "it takes added tokens out of texts that are not special")])
def test_a_sentencepiece_vocabulary_that_would_be_read_otherwise(changes, reason):
    spec = small(**{name: value for name, value in changes.items() if name not in small()})
    spec |= {name: value for name, value in changes.items() if name in spec}
    with pytest.raises(UserError) as caught:
        gguf.vocabulary_of(spec, 0)
    assert str(caught.value) == (
        f"llama.cpp would read text otherwise than this model's tokenizer: {reason}; export a "
        "folder (--to=DIR), which transformers and vLLM open, or train with mistral, gpt2, bytes "
        "or a new bpe:N")


def test_a_byte_level_vocabulary():
    spec = json.loads(make_tokenizer("bytes").json_bytes)
    made = gguf.vocabulary_of(spec, 260)
    assert made[:2] == ("gpt2", made.pre) and made[4:] == ([], ["ÿ ÿ"], False)
    assert set(made.pieces[:256]) == set(vocabulary.BYTES)
    assert made.pieces[256:] == ["<s>", "</s>", "<|unused258|>", "<|unused259|>"]
    assert made.types == [1] * 256 + [3, 3, 5, 5]
    bpe = json.loads(make_tokenizer("bpe:300", lambda: documents(9)).json_bytes)
    made = gguf.vocabulary_of(bpe, 0)
    assert made.merges == [" ".join(pair) for pair in gguf.pairs_of(bpe)] and made.pre == "qwen35"
    llama3 = vocabulary.cut_like(gguf.LLAMA3_SPLIT)
    for words, ignores, name in ((vocabulary.BYTE_LEVEL, False, "gpt-2"), (llama3, True,
                                                                           "llama-bpe")):
        changed = bpe | {"pre_tokenizer": words, "model": bpe["model"] | {"ignore_merges": ignores}}
        assert gguf.byte_level(changed).pre == name
        steps = [{**step, "trim_offsets": "other"} for step in gguf.list_steps(words)]
        changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        assert gguf.byte_level(changed).pre == name  # which changes no ids
    older = "bpe:N of an older plainllama, or another program's, " + WORDS
    pieces = bpe["model"]["vocab"]
    for changes, reason in (
            ({"pre_tokenizer": llama3}, older),  # llama.cpp takes whole pieces there
            ({"pre_tokenizer": vocabulary.BYTE_LEVEL, "ignore_merges": True}, WORDS),
            ({"pre_tokenizer": vocabulary.SPACES}, WORDS), ({"normalizer": {"type": "NFC"}}, TEXTS),
            ({"byte_fallback": True}, TEXTS),
            ({"vocab": pieces | {"▁": 999}}, "its pieces are not bytes"),
            ({"vocab": {piece: i for piece, i in pieces.items() if piece != "Ġ"}},
             "its pieces are not bytes")):
        outer = {name: value for name, value in changes.items() if "izer" in name}
        inner = {name: value for name, value in changes.items() if "izer" not in name}
        with pytest.raises(UserError) as caught:
            gguf.byte_level(bpe | outer | {"model": bpe["model"] | inner})
        assert f"this model's tokenizer: {reason}; export" in str(caught.value)


def test_what_an_entry_is():
    spec = {"model": {"unk_token": "<unk>", "byte_fallback": True}}
    for piece, special, there, kind in (("<unk>", True, True, 2), ("x", False, True, 1),
                                        ("<s>", True, True, 3), ("<0x4F>", False, True, 6),
                                        ("<0x4f>", False, True, 1), ("x", False, False, 5)):
        assert gguf.type_of(piece, special, there, spec) == kind, piece
    assert gguf.type_of("<0x4F>", False, True, {"model": {}}) == 1


# ---- weights as GGUF has them

def test_rows_that_rope_turns_together_are_neighbours():
    rows = torch.arange(24.0).view(12, 2)
    for heads, order in ((1, [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]),
                         (3, [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11])):
        moved = gguf.halves_to_neighbours(rows, heads)
        assert moved.equal(rows[order]) and gguf.neighbours_to_halves(moved, heads).equal(rows)
    config = ModelConfig(1, 4, 8, 8, 9, 8, n_kv_head=2)
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 0), ("o_proj", 0)):
        assert gguf.heads_of(f"model.layers.0.self_attn.{name}.weight", config) == heads
    assert gguf.gguf_name("lm_head.weight") == "output.weight"
    assert gguf.gguf_name("model.layers.12.mlp.up_proj.weight") == "blk.12.ffn_up.weight"


def test_the_type_of_each_weight():
    for shape, kind, name in (((64,), "q8_0", "F32"), ((64,), "f16", "F32"),
                              ((8, 64), "q8_0", "Q8_0"), ((8, 48), "q8_0", "F16"),
                              ((48, 32), "q8_0", "Q8_0"), ((8, 48), "f32", "F32"),
                              ((8, 48), "f16", "F16"), ((8, 48), "bf16", "BF16")):
        assert gguf.type_for(torch.zeros(shape), kind).name == name, (shape, kind)


def test_rotary_frequencies_are_divided_as_llama3_says():
    config = ModelConfig(1, 2, 128, 8, 9, 2048, rope_theta=5e5, **LLAMA3 | {"rope_original": 512})
    ours, found = gguf.tensors_of(LLaMA(config))["rope_freqs.weight"]
    wanted = []
    for i in range(32):
        frequency = 5e5 ** (-2 * i / 64)
        turns = 512 * frequency / (2 * math.pi)  # within the original context
        smooth = min(max((turns - 1) / 3, 0), 1)
        wanted.append(1 / ((1 - smooth) / 8 + smooth))
    assert ours == "" and found.tolist() == pytest.approx(wanted, rel=1e-4)
    assert wanted[0] == 1 and wanted[-1] == pytest.approx(8) and len({*wanted}) > 4
    for other in ({}, LINEAR):
        assert "rope_freqs.weight" not in gguf.tensors_of(LLaMA(ModelConfig(1, 2, 32, 8, 9, 8,
                                                                            **other)))


@pytest.fixture
def plain(tmp_path):
    """(model, spec) of a model folder of one block."""
    source = write_model(tmp_path / "model", n_layer=1, d_model=64, d_ff=64, **LLAMA3)
    return export.load_model(source), json.loads((source / "tokenizer.json").read_text())


@pytest.mark.parametrize(("kind", "value", "fits"), [
    ("f16", 65504.0, True), ("f16", -65504.0, True), ("f16", 65505.0, False),
    ("q8_0", -65505.0, False), ("bf16", 7e4, True), ("f32", 7e4, True)])
def test_how_large_weights_may_be(tmp_path, plain, kind, value, fits):
    model, spec = plain
    model.model.norm.weight.data[0] = 1e9  # a gain is fp32
    model.lm_head.weight.data[3, 5] = value
    if fits:
        gguf.write_gguf(tmp_path / "m", model, spec, "", kind, "x")
        assert gguf.compare(tmp_path / "m", model, kind) == ""
        return
    with pytest.raises(UserError) as caught:
        gguf.write_gguf(tmp_path / "m", model, spec, "", kind, "x")
    assert str(caught.value) == (f"lm_head.weight has values beyond 65504, the largest of "
                                 f"--type={kind}; say --type=bf16")


def test_what_was_written_is_compared_to_half_a_step(tmp_path, plain):
    model, spec = plain
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[3, :32] = 0
    weight[4, :32], weight[4, 0] = 0.1, 1.27  # in steps of 0.01
    gguf.write_gguf(tmp_path / "m", model, spec, "", "q8_0", "x")
    assert gguf.compare(tmp_path / "m", model, "q8_0") == ""
    for change, same in ((0.0055, True), (-0.0055, True), (0.009, False), (-0.009, False)):
        weight[4, 7] = 0.1 + change
        assert gguf.compare(tmp_path / "m", model, "q8_0") == (
            "" if same else "blk.0.ffn_up.weight is not what was written of "
            "model.layers.0.mlp.up_proj.weight")
    weight[4, 7] = 0.1
    assert gguf.compare(tmp_path / "m", model, "q8_0") == ""
    for kind in ("f32", "f16", "bf16"):
        gguf.write_gguf(tmp_path / kind, model, spec, "", kind, "x")
        assert gguf.compare(tmp_path / kind, model, kind) == ""
    for name, says in (("model.norm.weight", "output_norm.weight is not what was written of model."
                        "norm.weight"), ("model.layers.0.self_attn.k_proj.weight",
                                         "blk.0.attn_k.weight is not what was written of "
                                         "model.layers.0.self_attn.k_proj.weight")):
        other = copy.deepcopy(model)
        other.get_parameter(name).data[1] += 0.5
        assert gguf.compare(tmp_path / "f32", other, "f32") == says
    other = copy.deepcopy(model)
    other.config = replace(model.config, rope_factor=9.0)
    assert gguf.compare(tmp_path / "f32", other, "f32") == (
        "rope_freqs.weight is not what was written of the rotary frequencies")
    other.config = replace(model.config, rope_scaling="none")
    assert gguf.compare(tmp_path / "f32", other, "f32") == (
        f"{tmp_path / 'f32'} holds 13 weights, the model has 12")


def test_what_a_file_says_of_itself(tmp_path, plain, monkeypatch):
    model, spec = plain
    gguf.write_gguf(tmp_path / "m", model, spec, "", "f16", "name")
    found = fields(tmp_path / "m")
    assert {key: value for key, value in found.items() if not key.startswith(("GGUF", "tokenizer.",
                                                                              "general.arch"))} == {
        "general.name": "name", "general.file_type": 1, "general.quantization_version": 2,
        "llama.vocab_size": 261, "llama.context_length": 96, "llama.embedding_length": 64,
        "llama.feed_forward_length": 64, "llama.block_count": 1, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.freq_base": 10000}
    assert {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()
            if key.startswith("tokenizer") and not isinstance(value, list)} == {
        "model": "gpt2", "pre": "qwen35" if found["tokenizer.ggml.pre"] == "qwen35" else "gpt-2",
        "bos_token_id": 256, "eos_token_id": 257, "add_bos_token": True, "add_eos_token": False}
    assert len(found["tokenizer.ggml.tokens"]) == 261
    monkeypatch.setattr(gguf, "answer_ends", lambda *_: {"</s>", "<x>", "<b>"})  # of some the first
    spec["added_tokens"] += [{"content": piece, "id": i, "special": True}
                             for piece, i in (("<x>", 258), ("<b>", 259))]
    gguf.write_gguf(tmp_path / "m", model, spec, "", "f16", "name")
    assert fields(tmp_path / "m")["tokenizer.ggml.eot_token_id"] == 259


def test_the_whole_modelfile():
    config = ModelConfig(1, 1, 2, 2, 9, block_size=77)
    keys = ("PARAMETER num_ctx 77\nPARAMETER temperature 1.0\nPARAMETER top_k 0\nPARAMETER top_p "
            "1.0\nPARAMETER min_p 0.0\nPARAMETER repeat_penalty 1.0\n")
    head = "# ollama create NAME -f m.Modelfile\nFROM ./m.gguf\n"
    go = gguf.GO_TEMPLATE.read_text().strip()
    for template, middle, end in (
            ("", 'TEMPLATE """{{ .Prompt }}"""\n', ""),
            (TEMPLATE, f'TEMPLATE """{go}"""\n', 'PARAMETER stop "<|end|>"\n'),
            ("{{ messages }}", "# Ollama takes the template from the file if it is one that it "
             "knows.\n", "")):
        assert gguf.modelfile("m.gguf", config, template) == head + middle + keys + end


# ---- what llama.cpp is asked, and what of its answers counts

@pytest.fixture
def words(tmp_path):
    _, data = with_roles(json.loads(make_tokenizer("bytes").json_bytes), "here")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_bytes(data)
    (tmp_path / "words" / TEMPLATE_FILE).write_text(TEMPLATE)
    return Tokenizer.load(tmp_path / "words")


def test_hostile_texts_are_the_same_ones_always():
    texts = llama_cpp.hostile_texts(2000)
    assert len(texts) == 2000 and texts[:2] == [llama_cpp.SAMPLE, ""]
    assert texts[2:2 + len(llama_cpp.FRAGMENTS)] == llama_cpp.FRAGMENTS
    assert [llama_cpp.hostile_texts(n) for n in (0, 1, 300)] == [[], texts[:1], texts[:300]]
    # those without characters that a newer Unicode may add
    digest = hashlib.sha256("\n".join(texts[::2]).encode(errors="surrogatepass")).hexdigest()
    assert digest[:16] == "ace45ebf8f6bb2e1"
    known = set("".join(llama_cpp.FRAGMENTS) + llama_cpp.SAMPLE)
    assert all(set(text) <= known for text in texts[::2])
    other = [len(set(text) - known) for text in texts[len(llama_cpp.FRAGMENTS) + 3::2]]
    assert min(other) >= 0 and sum(count > 0 for count in other) > 0.9 * len(other)
    assert max(other) <= 12


def test_the_dialogs_that_llama_cpp_is_asked(words):
    chat = Chat(words)
    dialogs, wanted = llama_cpp.dialogs_of(words)
    assert len(dialogs) == len(wanted) == len(llama_cpp.PROMPTS) == 20
    for i, (dialog, ids) in enumerate(zip(dialogs, wanted, strict=True)):
        said = llama_cpp.PROMPTS[i] + ("\n 😀" if i in range(1, 20, 2) else "")
        messages = [{"role": "user", "content": said}]
        if i in (1, 4, 7, 10, 13, 16, 19):
            messages.insert(0, {"role": "system", "content": "Be  brief.\n"})
        if i in (2, 6, 10, 14, 18):
            messages += [{"role": "assistant", "content": f" yes, {i}\n\n"},
                         {"role": "user", "content": "  and\tthen?"}]
        tools = [llama_cpp.TOOL] if i in (3, 8, 13, 18) else None
        assert dialog == {"messages": messages} | ({"tools": [
            {"type": "function", "function": llama_cpp.TOOL}]} if tools else {})
        assert ids == chat.prompt(messages, tools)
    words.template = ""
    assert llama_cpp.dialogs_of(words) == ([], [])
    words.template = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') "
                      "}}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                      "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    dialogs, wanted = llama_cpp.dialogs_of(words)
    assert len(dialogs) == len(wanted) == 10  # without system messages and tools


def test_windows_have_so_many_places(words):
    ids = np.arange(1000)
    for length, count, size in ((33, 4, 33), (34, 4, 34), (65, 2, 65), (129, 1, 129), (2, 128, 2),
                                (44, 3, 44)):
        found = llama_cpp.windows_of(words, ids, length)
        assert found == [ids[i * size:(i + 1) * size].tolist() for i in range(count)], length
    for n, count in ((3, 1), (4, 1), (7, 1), (8, 2), (9, 2)):
        assert len(llama_cpp.windows_of(words, ids[:n], 4)) == count
    text = [256, *words.encode(" ".join(llama_cpp.PROMPTS) + llama_cpp.SAMPLE)]
    assert llama_cpp.windows_of(words, None, 9)[0] == text[:9]
    assert llama_cpp.windows_of(words, None, 10**6) == [text]


class Next:
    """A model whose likeliest token is the one after the last, by so much."""

    config = ModelConfig(1, 1, 2, 2, 10, block_size=12)

    def __init__(self, ahead=5.0):
        self.ahead = ahead

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, 10)
        return logits.scatter(-1, ((ids + 1) % 10)[..., None], self.ahead)


@pytest.mark.parametrize(("prompt", "tokens", "ended", "says"), [
    ([1, 2], [3, 4], False, ""), ([1, 2], [3, 5], False, "token 2 is 5 in llama.cpp, 4 in the mod"),
    ([2], [4], False, "token 1 is 4 in llama.cpp, 3 in the model"), ([8], [9], True, ""),
    ([7], [8, 9, 0], False, "llama.cpp does not stop at token 9"), ([7], [8, 9], False, ""),
    ([7], [8], True, ""), ([8], [], True, ""), ([1], [], True, "llama.cpp stops after 0 tokens, "
                                                "the model goes on"), ([1], [], False, ""),
    ([1], [2, 3], True, "llama.cpp stops after 2 tokens, the model goes on"), ([7], [8, 9], True,
                                                                              "")])
def test_the_first_token_that_differs(prompt, tokens, ended, says):
    tokenizer = SimpleNamespace(decode=str, stop_ids={9})
    found = llama_cpp.first_difference(Next(), tokenizer, prompt, {"tokens": tokens,
                                                                    "ended": ended})
    assert found.startswith(f"behind {str(prompt)!r} {says}") if says else found == ""


def test_logits_that_are_equal_but_for_rounding_may_change_places(capsys):
    tokenizer, wrong = SimpleNamespace(decode=str, stop_ids={9}), [{"tokens": [5], "ended": False}]
    right = [{"tokens": [2], "ended": False}]
    assert llama_cpp.first_difference(Next(0.0009), tokenizer, [1], wrong[0]) == ""
    assert llama_cpp.first_difference(Next(0.0011), tokenizer, [1], wrong[0]) != ""
    for said, kind, count in ((right + wrong + wrong, "f32", 1), (right * 3, "f32", 3),
                              (right + wrong + wrong, "q8_0", 1)):
        problem = llama_cpp.compare_greedy(Next(), tokenizer, [[1], [1], [1]], said, kind)
        assert bool(problem) == (kind == "f32" and count == 1)
        assert capsys.readouterr().out == f"greedy tokens: equal behind {count} of 3 prompts\n"


@pytest.mark.parametrize(("kind", "change", "says"), [
    ("f32", {}, ""), ("f32", {(0, 5): 0.9e-3}, ""),
    ("f32", {(0, 5): 1.1e-3}, "log-probs differ by 1.1e-03, allowed are 1e-03"),
    ("f32", {(0, 5): math.nan}, "log-probs differ by nan, allowed are 1e-03"),
    ("q8_0", {(0, 5): 0.5}, ""), ("q8_0", {(0, 2): -0.039}, ""), ("q8_0", {(0, 2): 0.039}, ""),
    ("q8_0", {(0, 2): -0.05}, "q8_0 changes perplexity by +2.5%, allowed are 2%"),
    ("q8_0", {(0, 2): 0.05}, "q8_0 changes perplexity by -2.5%, allowed are 2%"),
    ("f32", {(1, 7): -3.0}, "")])  # so unlikely that it is no part of an answer
def test_log_probs_may_differ_so_far(capsys, kind, change, says):
    model = Next()
    wanted = model(torch.tensor([[1, 2]]))[0]
    wanted[1, 7] = -31
    model = lambda ids: wanted[None]  # noqa: E731
    said = wanted.log_softmax(-1).clone()
    for place, more in change.items():
        said[place] += more
    found = llama_cpp.compare_logprobs(model, [[1, 2, 3]], said, kind)
    assert found == says
    line = capsys.readouterr().out
    here = wanted.log_softmax(-1)
    before, after = (torch.exp(-(found[0, 2] + found[1, 3]) / 2) for found in (here, said))
    largest = max((abs(value) for place, value in change.items() if place != (1, 7)), default=0.0)
    if not math.isnan(largest):
        assert line == (f"log-probs at 2 places: largest difference "
                        f"{(here - said)[here > -30].abs().max():.1e}; perplexity {before:.4f}, of "
                        f"the file {after:.4f} ({after / before - 1:+.3%})\n")
        assert float(line.split("difference ")[1].split(";")[0]) == pytest.approx(largest, rel=0.1,
                                                                                 abs=1e-6)


def test_what_llama_cpp_is_asked(tmp_path, words, monkeypatch, capsys):
    asked, problems = [], {}
    model = SimpleNamespace(config=ModelConfig(1, 1, 2, 2, 263, block_size=48))
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    said = llama_cpp.Answers([], [], [], torch.zeros(1))
    monkeypatch.setattr(llama_cpp, "ask", lambda given: asked.append(given) or said)
    for name in ("compare_ids", "compare_dialogs", "compare_greedy", "compare_logprobs"):
        monkeypatch.setattr(llama_cpp, name, lambda *_, name=name: problems.get(name, ""))

    def verify(**how):
        return llama_cpp.verify(tmp_path / "m", model, words, "f32", **how)

    ids = np.arange(200)
    assert verify(text=ids) == ""
    assert capsys.readouterr().out == ("checked with llama.cpp: ids of 2,000 texts and 20 dialogs "
                                       "are equal\n")
    found = asked.pop()
    dialogs, wanted = llama_cpp.dialogs_of(words)
    windows = llama_cpp.windows_of(words, ids, 33)
    assert found.pop("texts") == llama_cpp.hostile_texts(2000)
    assert found == {"model": str(tmp_path / "m"), "dialogs": dialogs, "windows": windows,
                     "prompts": [prompt[:32] for prompt in wanted], "entries": 263, "new": 16,
                     "filler": 97, "threads": torch.get_num_threads(), "context": 33 + 16}
    model.config = replace(model.config, block_size=10)
    assert verify() == ""
    found = asked.pop()
    assert {len(prompt) for prompt in found["prompts"]} == {1} and found["context"] == 26
    assert {len(window) for window in found["windows"]} == {10}
    capsys.readouterr()
    assert verify(numbers=False) == "" and capsys.readouterr().out == (
        "checked with llama.cpp: ids of 2,000 texts and 20 dialogs are equal\n"
        "tokens and log-probs are NOT checked with llama.cpp; --verify does that\n")
    found = asked.pop()
    assert (found["prompts"], found["windows"], found["context"]) == ([], [], 17)
    words.template, model.config = "", replace(model.config, block_size=48)
    assert verify() == ""
    assert asked.pop()["prompts"][1] == [256, *words.encode("Once upon a time")]
    for name in ("compare_ids", "compare_dialogs", "compare_greedy", "compare_logprobs"):
        problems[name] = name
        assert verify() == name
        problems.clear()
    assert verify(numbers=False) == ""

    def fails(_):
        raise RuntimeError("no such file")

    monkeypatch.setattr(llama_cpp, "ask", fails)
    assert verify() == "llama.cpp cannot open it: no such file"
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    capsys.readouterr()
    assert verify() == "" and capsys.readouterr().out.startswith("NOT checked with llama.cpp, whi")


def test_ids_and_dialogs_are_compared(words, capsys):
    ids = [words.encode(text) for text in ("a", "bc")]
    assert llama_cpp.compare_ids(words, ["a", "bc"], ids) == ""
    assert llama_cpp.compare_ids(words, ["a", "bc"], [ids[0], [5]]) == (
        f"llama.cpp reads 'bc' as [5], the model's tokenizer as {ids[1]}")
    ours = [[256, 97], [256, 98, 262]]
    assert llama_cpp.compare_dialogs(words, ours, ours) == ""
    says = "llama.cpp renders dialog 2 of 2 as '<s>c', the model reads '<s>b<|end|>'"
    assert llama_cpp.compare_dialogs(words, ours, [ours[0], [256, 99]]) == says
    assert capsys.readouterr().out == ""
    words.template = "another"
    assert llama_cpp.compare_dialogs(words, ours, [ours[0], [256, 99]]) == ""
    assert capsys.readouterr().out == f"WARNING: {says}\n"


def test_a_process_is_asked(tmp_path, monkeypatch):
    ended = SimpleNamespace(returncode=0, stderr="")

    def process(command, cwd, capture_output, text, errors):
        assert capture_output and text and command[1:3] == [
            "-m", "plainllama.weights.llama_cpp_process"]
        folder = Path(command[3])
        assert json.loads((folder / "asked.json").read_text()) == {"model": "m"}
        np.save(folder / "logprobs.npy", np.ones((1, 2), np.float32))
        (folder / "said.json").write_text('{"ids": [[1]], "dialogs": [[2]], "greedy": [3]}')
        return ended

    monkeypatch.setattr(llama_cpp.subprocess, "run", process)
    found = llama_cpp.ask({"model": "m"})
    assert found[:3] == ([[1]], [[2]], [3]) and found.logprobs.tolist() == [[1, 1]]
    for error, says in ((" bad \n", "bad"), ("", "it ended with 3"),
                        ("x" + "y" * 1500, "y" * 1500)):
        ended.returncode, ended.stderr = 3, error
        with pytest.raises(RuntimeError) as caught:
            llama_cpp.ask({"model": "m"})
        assert str(caught.value) == says


def test_what_the_process_asks_of_the_server(tmp_path, monkeypatch):
    posts: list = []

    def post(line, path, **body):
        posts.append((line.host, line.port, path, body))
        return {"tokens": [len(posts)], "prompt": "P", "stop_type": "eos" if len(posts) == 5 else
                "limit", "completion_probabilities": [{"top_logprobs": [
                    {"id": 2, "logprob": -len(posts)}, {"id": 0, "logprob": -0.5}]}]}

    monkeypatch.setattr(llama_cpp_process, "post", post)
    monkeypatch.setattr(llama_cpp_process, "start", lambda asked: SimpleNamespace(
        listening_address="http://127.0.0.1:99"))
    write_json(tmp_path / "asked.json", {
        "texts": ["a", "b"], "dialogs": [{"messages": 1}], "prompts": [[1], [2]], "new": 7,
        "windows": [[5, 6, 7], [8, 9]], "entries": 4, "filler": 3})
    llama_cpp_process.answer(tmp_path)
    assert json.loads((tmp_path / "said.json").read_text()) == {
        "ids": [[1], [2]], "dialogs": [[4]], "greedy": [{"tokens": [5], "ended": True},
                                                        {"tokens": [6], "ended": False}]}
    top = {"samplers": ["top_k"], "top_k": 1}
    ids = {"add_special": False, "parse_special": False}
    assert {post[:2] for post in posts} == {("127.0.0.1", 99)}
    assert [post[2:] for post in posts] == [
        ("/tokenize", {"content": "a"} | ids), ("/tokenize", {"content": "b"} | ids),
        ("/apply-template", {"messages": 1}),
        ("/tokenize", {"content": "P", "add_special": True, "parse_special": True}),
        *(("/completion", {"prompt": [i], "n_predict": 7, "return_tokens": True} | top)
          for i in (1, 2)),
        *(("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 4,
                           "logit_bias": [[3, 1e6]]} | top) for ids in ([5], [5, 6], [8]))]
    assert np.load(tmp_path / "logprobs.npy").tolist() == [
        [-0.5, -math.inf, -n, -math.inf] for n in (7, 8, 9)]


def test_how_the_server_is_started_and_answers(monkeypatch):
    class Names:
        def __init__(self):
            self.model, self.cpuparams = SimpleNamespace(), SimpleNamespace()

    library = SimpleNamespace(
        CommonParams=Names, Server=lambda options: options,
        ggml_type=SimpleNamespace(GGML_TYPE_F32="f32"),
        llama_flash_attn_type=SimpleNamespace(LLAMA_FLASH_ATTN_TYPE_DISABLED="off"))
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    found = vars(llama_cpp_process.start({"model": "m", "context": 77, "threads": 3}))
    assert (vars(found.pop("model")), vars(found.pop("cpuparams"))) == ({"path": "m"},
                                                                        {"n_threads": 3})
    assert found == {"n_ctx": 77, "n_parallel": 1, "n_gpu_layers": 0, "warmup": False, "ui": False,
                     "hostnames": ["127.0.0.1"], "port": 0, "cache_type_k": "f32",
                     "cache_type_v": "f32", "flash_attn_type": "off"}
    reply = SimpleNamespace(status=200, read=lambda: b'{"a": 1}')
    asked: list = []
    line = SimpleNamespace(request=lambda *words: asked.append(words), getresponse=lambda: reply)
    assert llama_cpp_process.post(line, "/x", b=2) == {"a": 1}
    assert asked == [("POST", "/x", '{"b": 2}', {"Content-Type": "application/json"})]
    for reply.status in (199, 201, 500):
        with pytest.raises(RuntimeError, match=r'^/x: \{"a": 1\}$'):
            llama_cpp_process.post(line, "/x")


# ---- Ollama

def test_modelfile():
    config = ModelConfig(1, 1, 2, 2, 9, block_size=77)
    text = gguf.modelfile("m.gguf", config, "")
    assert text.startswith("# ollama create NAME -f m.Modelfile\nFROM ./m.gguf\n")
    assert 'TEMPLATE """{{ .Prompt }}"""' in text and "PARAMETER num_ctx 77\n" in text
    own = gguf.modelfile("m.gguf", config, TEMPLATE)
    assert 'PARAMETER stop "<|end|>"' in own and own.count('"""') == 2
    assert "TEMPLATE" not in gguf.modelfile("m.gguf", config, "{{ messages }}")


def as_ollama(messages: list[dict]) -> list[dict]:
    return [{"Role": message["role"], "Content": message["content"],
             "Thinking": message.get("reasoning", ""),
             "ToolCalls": [{"Function": {"Name": call["name"], "Arguments": call["arguments"]}}
                           for call in message.get("tool_calls", ())]} for message in messages]


@pytest.mark.skipif(not shutil.which("go"), reason="Go is not installed")
def test_go_renders_dialogs_as_we_do(tmp_path):
    """Tools and arguments of calls are JSON without blanks there: Go writes it so."""
    (tmp_path / "render.go").write_text(RENDER)
    tool = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    call = {"name": "f", "arguments": {"a": 1}}
    dialogs = [
        ([{"role": "user", "content": "  a\n"}], None),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], [tool]),
        ([{"role": "user", "content": "a"}], [tool, tool]),
        ([{"role": "user", "content": "a"},
          {"role": "assistant", "content": "b", "reasoning": "why", "tool_calls": [call, call]},
          {"role": "tool", "content": "c"}], None),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "",
                                             "tool_calls": [call, call]},
          {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"},
          {"role": "user", "content": ""}], [tool])]
    jinja = templates.compiled(TEMPLATE, datetime.now())  # as transformers renders it
    for messages, tools in dialogs:
        wanted = jinja.render(messages=messages, tools=tools, bos_token="",
                              add_generation_prompt=True)
        done = subprocess.run(
            ["go", "run", "render.go", str(gguf.GO_TEMPLATE)], cwd=tmp_path, text=True, check=True,
            input=json.dumps({"Messages": as_ollama(messages), "Tools": [
                {"Function": tool} for tool in tools or []]}), capture_output=True)
        for said in [*(tools or []), call["arguments"]]:
            wanted = wanted.replace(json.dumps(said), json.dumps(said, separators=(",", ":")))
        assert done.stdout == wanted
