"""export.py --to M.gguf, with llama.cpp (by xllamacpp) as the oracle."""

import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import documents
from safetensors.torch import load_file, save_file

import export
from model import LLaMA, ModelConfig
from plainllama.command import parse
from plainllama.settings import UserError
from plainllama.tokens import templates, vocabulary
from plainllama.tokens.chat import END, TEMPLATE, Chat, with_roles
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer
from plainllama.tokens.tokenizer_json import TEMPLATE_FILE, complete
from plainllama.weights import gguf, llama_cpp
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
