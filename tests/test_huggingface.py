"""Model folders of others: what transformers writes is read, trained on, or refused by name. Both
lines of transformers write and read; the older one, 4.57, in a process with its own packages."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import documents, metrics
from safetensors.torch import load_file, save_file
from test_code import assert_as_llama, export_both, look

import train
from model import LLaMA, ModelConfig, trained
from plainllama.command import parse
from plainllama.files import write_json
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.tokens import chat, shards, tokenizer
from plainllama.tokens.tokenizer_json import write_hf_files
from plainllama.training import optim, resume
from plainllama.weights import adapters, checkpoint, expansion, huggingface
from plainllama.weights.adapters import initial_weight
from plainllama.weights.huggingface import weight_files
from plainllama.weights.peft import load_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

# Run by either line of transformers: writes a Llama (tied, grouped heads, llama3 positions, in
# shards), a Mistral, and what they compute, into the folder that is its argument.
WRITE = """
import sys, torch, transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
torch.manual_seed(3)
shape = dict(vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16)
rope = (dict(rope_parameters=dict(rope, rope_theta=5e5)) if transformers.__version__[0] == "5" else
        dict(rope_scaling=rope, rope_theta=5e5))
ids = torch.randint(258, (2, 64))
for name, model, size in (
        ("llama", LlamaForCausalLM(LlamaConfig(**shape, **rope, tie_word_embeddings=True,
                                               max_position_embeddings=128)), "60KB"),
        ("mistral", MistralForCausalLM(MistralConfig(**shape, sliding_window=None,
                                                     max_position_embeddings=64)), "5GB")):
    model.save_pretrained(f"{sys.argv[1]}/{name}", max_shard_size=size)
    with torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits}, f"{sys.argv[1]}/{name}.safetensors")
"""
# Run by either line: what it computes from our checkpoints and makes of our texts.
READ = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
texts = json.loads(Path("texts.json").read_text())
for folder in sys.argv[1:]:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        logits = model(load_file("ids.safetensors")["ids"]).logits
    save_file({"logits": logits.contiguous()}, folder + "/theirs.safetensors")
    words = AutoTokenizer.from_pretrained(folder)
    ids = words(texts, split_special_tokens=True)["input_ids"]
    facts = [transformers.__version__, words.model_max_length, ids]
    Path(folder, "theirs.json").write_text(json.dumps(facts))
"""


def by_transformers(code: str, *words, cwd: Path, packages: Path | None = None) -> None:
    """Run `code` in a fresh process, with the `packages` before those that are installed."""
    path = {"PYTHONPATH": str(packages)} if packages else {}
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **path})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with llama/, mistral/ and what they compute, by the transformers that is here."""
    folder = tmp_path_factory.mktemp("written")
    by_transformers(WRITE, folder, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """A folder with the packages of transformers 4.57, which then needs this environment's torch
    and nothing else."""
    folder = tmp_path_factory.mktemp("older")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                           str(folder), "transformers==4.57.6", "tokenizers==0.22.2",
                           "huggingface-hub==0.36.2"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57.6 cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


def assert_equal_logits(folder: Path) -> None:
    """What we compute from a folder is what transformers did that wrote it."""
    known = load_file(f"{folder}.safetensors")
    with torch.no_grad():
        logits = load_model(folder)(known["ids"])
    assert known["logits"].abs().max() > 1
    assert (logits - known["logits"]).abs().max() <= 1e-5 * known["logits"].abs().max()


def go_on(home: Path, folder: Path, *words: str) -> None:
    """Train on, as the message tells; the first evaluation is what transformers measures."""
    def start(*more: str) -> int:
        return train.main(parse(
            ["toy.py", f"--init_from={folder}", f"--out_dir=out/{folder.name}", "--max_steps=6",
             "--learning_rate=1e-3", "--block_size=64", "--global_batch_tokens=512",
             "--eval_tokens=128", *words, *more], "", train.Flags))

    with pytest.raises(UserError, match="to go on from it say") as refused:
        start()
    keys = str(refused.value).split(" say ")[1].split()
    assert {"--n_layer=3", "--d_model=64", "--d_ff=96"} <= set(keys)
    assert not (home / "out").exists()
    assert start(*keys) == 0
    rows = metrics(home / "out" / folder.name)
    tokens = shards.open_split(home / "data/toy", "val").read(0, 129).astype(np.int64)
    windows = torch.from_numpy(np.stack([tokens[:65], tokens[64:]]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        loss = theirs(windows, labels=windows).loss.item()
    assert rows[0]["step"] == 0 and rows[0]["val_loss"] == pytest.approx(loss, abs=1e-4)
    assert [row["val_loss"] for row in rows if "val_loss" in row][-1] < loss - 0.3


def test_what_transformers_writes_is_read(written):
    assert_equal_logits(written / "llama")
    assert_equal_logits(written / "mistral")
    config = huggingface.read_config(written / "llama")
    assert (config.rope_scaling, config.rope_factor, config.rope_original) == ("llama3", 8.0, 16)
    assert config.tie_embeddings and config.kv_heads == 2 and config.rope_theta == 5e5
    assert len(weight_files(written / "llama")) > 3


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_transformers_writes_is_trained_on(home, written, name):
    go_on(home, written / name)


def test_keys_to_set():
    """A stretch that was learnt may grow and is not dropped; the context may be any."""
    plain = ModelConfig(2, 4, 32, 64, 258, 64)
    linear = replace(plain, rope_scaling="linear", rope_factor=4.0)
    llama3 = replace(plain, rope_scaling="llama3", rope_factor=8.0, rope_original=16)
    keys = huggingface.other_keys
    assert keys(plain, replace(plain, block_size=8, attention="reference")) == ""
    assert keys(plain, linear) == keys(plain, llama3) == keys(linear, linear) == ""
    assert keys(linear, replace(linear, rope_factor=8.0)) == ""
    assert keys(linear, replace(linear, rope_factor=2.0)) == "--rope_factor=4.0"
    assert keys(linear, plain) == "--rope_scaling=linear --rope_factor=4.0"
    assert keys(llama3, plain) == "--rope_scaling=llama3 --rope_factor=8.0 --rope_original=16"
    assert keys(llama3, replace(llama3, rope_original=32)) == "--rope_original=16"
    assert keys(replace(plain, n_kv_head=2, tie_embeddings=True, rope_theta=5e5), plain) == (
        "--n_kv_head=2 --rope_theta=500000.0 --tie_embeddings=True")
    with pytest.raises(UserError, match="low_freq_factor"):
        keys(replace(llama3, rope_low=2.0), llama3)


def test_every_field_of_the_architecture_is_written_and_read(tmp_path):
    """A new field of ModelConfig needs its name in config.json or, here, the reason why not."""
    here = {"attention": "reference", "activation_checkpointing": True}  # how, not what, we compute
    full = {"n_layer": 3, "n_head": 4, "d_model": 64, "d_ff": 80, "vocab_size": 300,
            "block_size": 32, "n_kv_head": 2, "rope_theta": 5e5, "rope_scaling": "llama3",
            "rope_factor": 8.0, "rope_original": 16, "rope_low": 2.0, "rope_high": 5.0,
            "norm_eps": 1e-6, "tie_embeddings": True, "expand": "concat", "expand_blocks": 2,
            "expand_merge": "dlerp", "first_row": 290}
    assert {field.name for field in fields(ModelConfig)} == full.keys() | here.keys()
    assert set(huggingface.NAMES) - set(full) == {"kv_heads", "head_dim"}  # derived from others
    config = ModelConfig(**full, **here)
    assert not any(getattr(config, field.name) == field.default for field in fields(ModelConfig))
    write_json(tmp_path / "config.json", huggingface.config_json(config, 0, 1))
    assert huggingface.read_config(tmp_path) == ModelConfig(**full)
    choices = Settings.__dataclass_fields__["rope_scaling"].metadata["choices"]
    assert set(huggingface.ROPE) == set(choices)


@pytest.mark.parametrize("keys", [
    {}, {"rope_theta": 5e5}, {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 512, "rope_theta": 5e5},
    {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_original": 64, "rope_high": 5.0}])
def test_rotary_tables_are_those_of_transformers(keys):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = ModelConfig(1, 2, 128, 8, 16, 2048, **keys)
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=2048, rope_parameters={
            "rope_type": keys.get("rope_scaling", "default"), "factor": keys.get("rope_factor"),
            "rope_theta": keys.get("rope_theta", 1e4), "low_freq_factor": 1.0,
            "high_freq_factor": keys.get("rope_high", 4.0),
            "original_max_position_embeddings": keys.get("rope_original")})
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(2048)[None])
    ours = LLaMA(config)
    # fp32 angles of up to 2,048 turns are good to 2048 * 2^-24
    assert (ours.rope_cos - cos[0]).abs().max() < 3e-4
    assert (ours.rope_sin - sin[0]).abs().max() < 3e-4


@pytest.mark.parametrize(("change", "says"), [
    ({"model_type": "qwen2"}, "model_type is 'qwen2'; only plain LLaMA"),
    ({"attention_bias": True}, "attention_bias is True"), ({"mlp_bias": True}, "mlp_bias is True"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096"),
    ({"model_type": "mistral"}, "sliding_window is 4096"),  # if it does not say, it has
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .'sliding_att"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"head_dim": 16}, "head_dim is 16"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"num_key_value_heads": 3}, "4 heads, 3 of keys and values, do not fit"),
    ({"num_attention_heads": "4"}, "is not the config of a LLaMA"),
    ({"num_attention_heads": 0}, "is not the config of a LLaMA"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"num_key_value_heads": -1}, "n_kv_head is -1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
     "RoPE type is 'dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32}},
     "unknown keys of RoPE is .'beta_fast"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "RoPE is .'full_att"),
    ({"rope_theta": 5e5}, "say something else than rope_parameters"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "something else than rope_para"),
    ({"plainllama": {"n_layer": 2, "n_expert": 8}}, "newer plainllama is .'n_expert'"),
    ({"rms_norm_eps": ...}, "does not say rms_norm_eps"),
    ({"hidden_size": ..., "n_embd": 32, "model_type": "gpt2"}, "hidden_size .model_type 'gpt2'"),
])
def test_what_would_compute_something_else_is_refused(tmp_path, change, says):
    config = huggingface.config_json(ModelConfig(2, 4, 32, 64, 258, 64), 1, 2) | change
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says) as refused:
        load_model(checkpoint.find_checkpoint(str(tmp_path)))
    assert "\n" not in str(refused.value)


def test_half_copied_folders_are_refused(tmp_path, written):
    def copy(name: str, *without: str) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in (written / name).iterdir():
            if file.name not in without:
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    shard = weight_files(written / "llama")[2]
    cut, index, outside = copy("mistral"), copy("llama"), copy("llama")
    os.truncate(cut / "model.safetensors", 50_000)
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "mo')
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.bin"}}')
    pickled = copy("mistral", "model.safetensors")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    for folder, says in (
            (copy("llama", shard), f"{shard} is missing; copy the folder again"),
            (copy("llama", "config.json"), "weights but no config.json; copy the folder again"),
            (copy("mistral", "model.safetensors"), "model.safetensors is missing; copy"),
            (cut, "weights cannot be read: .* copy it again"), (index, "not an index of weights"),
            (outside, "names '../a.bin', outside the folder"), (pickled, "pickled weights")):
        with pytest.raises(UserError, match=says):
            load_model(checkpoint.find_checkpoint(str(folder)))
    biased = copy("mistral")
    weights = load_file(biased / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(weights, biased / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown weights, the first is .*q_proj\.bias"):
        load_model(biased)


def test_a_tokenizer_that_transformers_wrote(tmp_path):
    """A data set prepared with it fits a model that lies beside it; one that is too large for the
    embedding does not."""
    words = tokenizer.make_tokenizer("bpe:300", lambda: documents(9))
    words.save(tmp_path)
    write_hf_files(tmp_path / "tokenizer.json", tmp_path, 64)
    folder = tmp_path / "theirs"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(huggingface.config_json(
        ModelConfig(2, 4, 32, 64, words.vocab_size - 1, 64), 0, 1)))
    hashed = tokenizer.make_tokenizer(str(folder)).sha256
    resume.refuse_other_tokenizer(folder, {"tokenizer": {"sha256": hashed}})
    with pytest.raises(UserError, match="not the tokenizer of the data set; prepare one with"):
        resume.refuse_other_tokenizer(folder, {"tokenizer": {"sha256": words.sha256[::-1]}})
    with pytest.raises(UserError, match="entries, the model's embedding only"):
        load_model(folder)


def test_a_sentencepiece_model_beside_the_weights(tmp_path):
    """Llama 2 and TinyLlama come with tokenizer.model; the data set must be made with it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(documents(30)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, minloglevel=9)
    model = ModelConfig(2, 4, 32, 64, 330, 64)
    (tmp_path / "config.json").write_text(json.dumps(huggingface.config_json(model, 1, 2)))
    hashed = tokenizer.make_tokenizer(str(tmp_path)).sha256
    resume.refuse_other_tokenizer(tmp_path, {"tokenizer": {"sha256": hashed}})
    with pytest.raises(UserError, match=r"tokenizer\.model is not the tokenizer of the data set"):
        resume.refuse_other_tokenizer(tmp_path, {"tokenizer": {"sha256": hashed[::-1]}})


# ---- the pieces by direct calls

TINY = {"n_layer": 2, "n_head": 4, "d_model": 32, "d_ff": 64, "vocab_size": 258, "block_size": 48}


def small(**changes) -> LLaMA:
    model = expansion.outline(ModelConfig(**{**TINY, **changes}))
    for number, p in enumerate(model.parameters()):
        p.data.fill_(number)
    return model


@pytest.fixture
def words(tmp_path) -> Path:
    (tmp_path / "words").mkdir()
    tokenizer.make_tokenizer("bytes").save(tmp_path / "words")
    return tmp_path / "words" / "tokenizer.json"


@pytest.mark.parametrize(("changes", "keys"), [
    ({}, {}), ({"n_kv_head": 2, "tie_embeddings": True, "norm_eps": 1e-6, "rope_theta": 5e5},
              {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
               "rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ({"rope_scaling": "linear", "rope_factor": 4.0}, {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": {
            "rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ({"expand": "concat", "expand_blocks": 1, "first_row": 9}, {
        "architectures": ["PlainLlamaExpanded"], "model_type": "plainllama", "plainllama": {
            "expand": "concat", "expand_blocks": 1, "expand_merge": "lerp", "first_row": 9}})])
def test_the_whole_config(tmp_path, changes, keys):
    config = ModelConfig(**{**TINY, **changes})
    made = huggingface.config_json(config, 5, 6, torch.bfloat16)
    assert made == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
        "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 258,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 48, "num_key_value_heads": 4,
        "head_dim": 8, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.02,
        "use_cache": True, "bos_token_id": 5, "eos_token_id": 6, "torch_dtype": "bfloat16",
        "dtype": "bfloat16"} | keys
    write_json(tmp_path / "config.json", made)
    assert huggingface.read_config(tmp_path) == replace(config, n_kv_head=config.kv_heads)
    grown = {"expand", "expand_blocks", "expand_merge", "first_row"}
    assert huggingface.described(config) == {
        name: value for name, value in vars(config).items()
        if config.expand_blocks or name not in grown}


def test_what_ends_a_text_and_an_answer(tmp_path, words):
    def ends(folder, **how):
        folder.mkdir()
        huggingface.write_description(folder, ModelConfig(**TINY), words, **how)
        config = json.loads((folder / "config.json").read_text())
        found = json.loads((folder / "generation_config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
        assert found.keys() == {"bos_token_id", "eos_token_id"} and found["bos_token_id"] == 256
        return found["eos_token_id"]

    assert ends(tmp_path / "text") == 257
    _, data = chat.with_roles(json.loads(words.read_text()), "x")
    words.write_bytes(data)
    assert ends(tmp_path / "talk", template=chat.TEMPLATE) == [257, 262]


def test_shards_hold_at_most_so_many_bytes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = {name: torch.full((size,), float(size)) for name, size in (("a", 10), ("b", 10),
                                                                         ("c", 5), ("d", 40))}

    def files(limit, dtype=torch.float32):
        for path in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.index.json")):
            path.unlink()
        huggingface.write_weights(tmp_path, weights, dtype, limit)
        found = {path.name: load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))}
        whole = {name: w for each in found.values() for name, w in each.items()}
        assert {name: w.float().tolist() for name, w in whole.items()} == {
            name: w.tolist() for name, w in weights.items()}
        assert {w.dtype for w in whole.values()} == {dtype}
        index = tmp_path / "model.safetensors.index.json"
        if len(found) > 1:
            assert json.loads(index.read_text()) == {
                "metadata": {"total_size": 65 * dtype.itemsize},
                "weight_map": {name: file for file, each in found.items() for name in each}}
            assert list(found) == [f"model-{i:05d}-of-{len(found):05d}.safetensors"
                                   for i in range(1, len(found) + 1)]
        else:
            assert list(found) == ["model.safetensors"] and not index.exists()
        return [sorted(each) for each in found.values()]

    assert files(0) == files(260) == files(10**9) == [["a", "b", "c", "d"]]
    assert files(259) == [["a", "b", "c"], ["d"]]
    assert files(100) == [["a", "b", "c"], ["d"]] and files(99) == [["a", "b"], ["c"], ["d"]]
    assert files(80) == [["a", "b"], ["c"], ["d"]] and files(79) == [["a"], ["b", "c"], ["d"]]
    assert files(1) == [["a"], ["b"], ["c"], ["d"]]
    assert files(130, torch.bfloat16) == [["a", "b", "c", "d"]]
    assert files(129, torch.bfloat16) == [["a", "b", "c"], ["d"]]
    file = tmp_path / "config.json"
    file.chmod(0o640)
    files(0)
    assert (tmp_path / "model.safetensors").stat().st_mode == file.stat().st_mode


def test_our_code_beside_the_weights(tmp_path):
    config = ModelConfig(**TINY)
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "model_type": "llama"}')
    huggingface.write_code(tmp_path, config)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.py",
                                                          "modeling_plainllama.py"}
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "hidden_size": 32, "model_type": "plainllama", "architectures": ["PlainLlamaForCausalLM"],
        "plainllama": huggingface.described(config), "auto_map": {
            "AutoConfig": "modeling_plainllama.PlainLlamaConfig",
            "AutoModelForCausalLM": "modeling_plainllama.PlainLlamaForCausalLM"}}


BARE = {"num_hidden_layers": 2, "num_attention_heads": 16, "hidden_size": 64, "vocab_size": 258,
        "intermediate_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 48,
        "model_type": "llama"}


@pytest.mark.parametrize(("changes", "reads"), [
    ({}, {"n_kv_head": 0}), ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
    ({"model_type": "mistral", "sliding_window": None}, {"n_kv_head": 8}),
    ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4},
     {"n_kv_head": 4}), ({"num_key_value_heads": 2}, {"n_kv_head": 2}),
    ({"num_key_value_heads": None}, {"n_kv_head": 0}), ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
    ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}},
     {"rope_scaling": "linear", "rope_factor": 2.0}),
    ({"rope_scaling": None, "rope_parameters": None, "plainllama": None, "layer_types": None}, {}),
    ({"layer_types": ["full_attention"] * 2, "attention_bias": False, "head_dim": 4,
      "hidden_act": "silu", "sliding_window": None, "quantization_config": None}, {}),
    ({"head_dim": None}, {}), ({"rms_norm_eps": 1}, {"norm_eps": 1}),
    *(({"plainllama": {"expand": kind, "expand_blocks": 2, "expand_merge": merge,
                       "first_row": 257, "n_layer": 99}},
       {"expand": kind, "expand_blocks": 2, "expand_merge": merge, "first_row": 257})
      for kind, merge in (("concat", "lerp"), ("stack", "lerp"), ("hybrid", "dlerp"))),
    ({"plainllama": {"expand": "concat", "expand_blocks": 1}},
     {"expand": "concat", "expand_blocks": 1}),
    ({"plainllama": {"expand": "none", "expand_blocks": 0, "first_row": 0}}, {})])
def test_what_a_config_says_is_read_and_what_it_does_not_is_the_default(tmp_path, changes, reads):
    write_json(tmp_path / "config.json", BARE | changes)
    assert huggingface.read_config(tmp_path) == ModelConfig(
        **{"n_layer": 2, "n_head": 16, "d_model": 64, "d_ff": 64, "vocab_size": 258,
           "block_size": 48, "norm_eps": 1e-5, **reads})


GROWTH = {"expand": "concat", "expand_blocks": 1, "expand_merge": "lerp", "first_row": 0}


@pytest.mark.parametrize(("changes", "says"), [
    *(({"plainllama": GROWTH | more}, f"its expansion is {GROWTH | more}") for more in (
        {"expand": "none"}, {"expand": "other"}, {"expand_blocks": 0}, {"expand_blocks": 3},
        {"first_row": 258}, {"expand_merge": "mean"})),
    ({"plainllama": {"first_row": 5}}, f"its expansion is {GROWTH | {'expand': 'none'}}".replace(
        "'expand_blocks': 1", "'expand_blocks': 0").replace("'first_row': 0", "'first_row': 5")),
    ({"num_attention_heads": 64}, "64 heads, 64 of keys and values, do not fit a width of 64"),
    ({"num_attention_heads": 12}, "12 heads, 12 of keys and values, do not fit a width of 64"),
    ({"num_key_value_heads": 3}, "16 heads, 3 of keys and values, do not fit a width of 64"),
    ({"hidden_act": "gelu", "mlp_bias": True}, "hidden_act is 'gelu', mlp_bias is True"),
    ({"model_type": "mistral", "num_key_value_heads": 16}, "sliding_window is 4096"),
    ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
      "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
     "rope_scaling and rope_theta say something else than rope_parameters")])
def test_what_a_config_asks_for_is_refused_whole(tmp_path, changes, says):
    write_json(tmp_path / "config.json", BARE | changes)
    with pytest.raises(UserError) as caught:
        huggingface.read_config(tmp_path)
    assert str(caught.value) == (f"{tmp_path / 'config.json'}: {says}; only plain LLaMA models can "
                                 "be read")


@pytest.mark.parametrize(("changes", "says"), [
    ({"num_hidden_layers": -1}, "ValueError('num_hidden_layers is -1')"),
    ({"vocab_size": True}, "ValueError('vocab_size is True')"),
    ({"num_hidden_layers": 2.0}, "ValueError('num_hidden_layers is 2.0')"),
    ({"rms_norm_eps": True}, "ValueError('rms_norm_eps is True')"),
    ({"rope_theta": "x"}, "ValueError(\"rope_theta is 'x'\")"),
    ({"rope_scaling": {"rope_type": "linear"}}, "KeyError('factor')")])
def test_what_is_no_config_is_said_whole(tmp_path, changes, says):
    write_json(tmp_path / "config.json", BARE | changes)
    with pytest.raises(UserError) as caught:
        huggingface.read_config(tmp_path)
    assert str(caught.value) == (f"{tmp_path / 'config.json'} is not the config of a LLaMA: {says}")


def test_keys_to_set_of_a_model_that_grew():
    plain = ModelConfig(**TINY)
    grown = replace(plain, expand="concat", expand_blocks=2, first_row=9)
    assert huggingface.other_keys(grown, plain) == "--expand=concat --expand_blocks=2"
    assert huggingface.other_keys(grown, replace(grown, first_row=0, expand_merge="dlerp")) == (
        "--expand_merge=lerp")
    assert huggingface.other_keys(plain, grown) == ""
    linear = replace(plain, rope_scaling="linear", rope_factor=4.0, rope_low=2.0)
    assert huggingface.other_keys(linear, replace(linear, rope_low=1.0)) == ""
    assert huggingface.other_keys(plain, replace(linear, rope_high=9.0)) == ""


def test_weights_are_copied_where_they_fit(tmp_path, words):
    model = small()
    (tmp_path / "plain").mkdir()
    huggingface.write_folder(tmp_path / "plain", model.config, dict(model.named_parameters()),
                             words)

    def loaded(made, folder="plain", **how):
        for p in made.parameters():
            p.data.fill_(-1)
        huggingface.load_weights(tmp_path / folder, made, World(), **how)
        return made

    def refused(made, says, folder="plain", **how):
        with pytest.raises(UserError) as caught:
            huggingface.fitting(tmp_path / folder, made, **how)
        assert str(caught.value) == f"{tmp_path / folder}: {says}"

    for (name, p), q in zip(loaded(small()).named_parameters(), model.parameters(), strict=True):
        assert p.equal(q), name
    refused(small(n_layer=3), "9 missing weights, the first is model.layers.2.input_layernorm."
            "weight")
    refused(small(n_layer=1), "9 unknown weights, the first is model.layers.1.input_layernorm."
            "weight")
    refused(small(d_ff=65), "model.layers.0.mlp.gate_proj.weight has shape [64, 32], the config "
            "says [65, 32]")
    refused(small(vocab_size=260), "model.embed_tokens.weight has shape [258, 32], the config says "
            "[260, 32]")
    refused(small(vocab_size=260, d_ff=65), "model.layers.0.mlp.gate_proj.weight has shape [64, 32]"
            ", the config says [65, 32]", grows=True)
    refused(small(vocab_size=250), "model.embed_tokens.weight has shape [258, 32], the config says "
            "[250, 32]", grows=True)
    grown = loaded(small(vocab_size=260), grows=True)
    for name in huggingface.ENDS:
        assert grown.get_parameter(name)[:258].equal(model.get_parameter(name))
        assert (grown.get_parameter(name)[258:] == -1).all()
    tied = loaded(small(tie_embeddings=True))  # of the folder's own output matrix nothing is read
    assert tied.lm_head.weight.equal(model.model.embed_tokens.weight)
    copies = loaded(small(expand="stack", expand_blocks=1), expands=True)
    assert all((p == -1).all() == (".expansion." in name)
               for name, p in copies.named_parameters())
    refused(small(expand="stack", expand_blocks=1), "9 missing weights, the first is model.layers.1"
            ".expansion.input_layernorm.weight", expands=False)
    # the rows that learn stand in the matrix, as many of them as the folder has
    for vocab, first in ((258, 250), (261, 256)):
        rows = small(vocab_size=vocab)
        adapters.attach(rows, adapters.Adapter(
            2, 4.0, 0.0, ("model.layers.0.mlp.down_proj",), "int8", first))
        for _, p in trained(rows):
            p.data.fill_(-1)
        huggingface.load_weights(tmp_path / "plain", rows, World(), grows=vocab > 258)
        for end in (rows.model.embed_tokens, rows.lm_head):
            found = 258 - first
            assert (end.rows[:found] == end.weight[0, 0]).all() and (end.rows[found:] == -1).all()
            assert end.weight[0, 0] > -1
        held = rows.model.layers[0].mlp.down_proj.matrix()
        assert torch.allclose(held, model.model.layers[0].mlp.down_proj.weight, rtol=0.01)


class Sharded(World):
    """A rank of two that have the rows of each matrix between them."""

    def piece(self, tensor):
        half = -(-len(tensor) // 2)
        return (tensor[:half], 0) if self.rank == 0 else (tensor[half:], half)


@pytest.mark.parametrize("vocab", [258, 260, 600])
def test_each_rank_copies_its_rows(tmp_path, words, vocab):
    model = small()
    for p in model.parameters():
        p.data.copy_(torch.arange(float(p.numel())).view(p.shape))
    (tmp_path / "plain").mkdir()
    huggingface.write_folder(tmp_path / "plain", model.config, dict(model.named_parameters()),
                             words)
    made = small(vocab_size=vocab)
    for p in made.parameters():
        p.data.fill_(-1)
    for rank in (0, 1):
        huggingface.load_weights(tmp_path / "plain", made, Sharded(rank, 2), vocab > 258)
    for name, p in made.named_parameters():
        stored = model.get_parameter(name)
        assert p[:len(stored)].equal(stored) and (p[len(stored):] == -1).all(), name


def test_what_bf16_would_round_is_refused(tmp_path, words):
    model = small()
    model.lm_head.weight.data[250] = 1 + 2**-10  # which bf16 has not
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        (tmp_path / name).mkdir()
        huggingface.write_folder(tmp_path / name, model.config, dict(model.named_parameters()),
                                 words, dtype)

    def held(first=0, part="lm_head", vocab=258):
        made = small(first_row=first, vocab_size=vocab)
        matrix = made.get_submodule(part).weight
        matrix.data = matrix.data.bfloat16()
        return made

    says = ("frozen_dtype=bf16 would round lm_head.weight of FOLDER, and a checkpoint that is no "
            "adapter's holds what is frozen; say frozen_dtype=fp32")
    for made, refused in ((held(), True), (held(251), True), (held(250), False), (small(), False),
                          (held(part="model.embed_tokens"), False)):
        huggingface.refuse_rounding(tmp_path / "bf16", made)
        if not refused:
            huggingface.refuse_rounding(tmp_path / "fp32", made)
            continue
        with pytest.raises(UserError) as caught:
            huggingface.refuse_rounding(tmp_path / "fp32", made)
        assert str(caught.value) == says.replace("FOLDER", str(tmp_path / "fp32"))
    model.model.layers[0].mlp.up_proj.weight.data[63, 5] = 1 + 2**-10
    (tmp_path / "up").mkdir()
    huggingface.write_folder(tmp_path / "up", model.config, dict(model.named_parameters()), words)
    with pytest.raises(UserError, match=r"would round model.layers.0.mlp.up_proj.weight of"):
        huggingface.refuse_rounding(tmp_path / "up", held(5, "model.layers.0.mlp.up_proj"))
    grown = small(expand="stack", expand_blocks=1)
    for p in grown.parameters():
        p.data = p.data.bfloat16()
    huggingface.refuse_rounding(tmp_path / "bf16", grown)  # of copies the folder has none


def test_which_files_hold_the_weights(tmp_path):
    def refused(says):
        with pytest.raises(UserError) as caught:
            weight_files(tmp_path)
        assert str(caught.value) == says

    index = tmp_path / "model.safetensors.index.json"
    gone = f"{tmp_path}: model.safetensors is missing; "
    refused(gone + "copy the folder again")
    (tmp_path / "pytorch_model-1.bin").write_text("")
    refused(gone + "convert its pickled weights")
    index.write_text('{"weight_map": {"b": "y", "a": "x", "c": "y"}}')
    refused(f"{tmp_path}: x is missing; convert its pickled weights")
    (tmp_path / "x").write_text("")
    (tmp_path / "y").write_text("")
    assert weight_files(tmp_path) == ["x", "y"]
    index.write_text('{"weight_map": {"a": "../x"}}')
    refused(f"{index} names '../x', outside the folder")
    for text in ('{"weight_map": 5}', "[]", "{", "{}"):
        index.write_text(text)
        with pytest.raises(UserError, match="is not an index of weights: "):
            weight_files(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    assert weight_files(tmp_path) == ["model.safetensors"]
    save_file({"a": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)},
              tmp_path / "model.safetensors")
    assert list(huggingface.open_weights(tmp_path)) == ["a"]


# ---- transformers 4.57

@pytest.mark.slow
def test_what_the_older_line_writes(home, tmp_path, older):
    by_transformers(WRITE, tmp_path, cwd=tmp_path, packages=older)
    config = json.loads((tmp_path / "llama/config.json").read_text())
    assert config["transformers_version"] == "4.57.6" and "rope_parameters" not in config
    for name in ("llama", "mistral"):
        assert_equal_logits(tmp_path / name)
    go_on(home, tmp_path / "llama")


def hard_strings(count: int) -> list[str]:
    """Strings that tokenizers disagree on: spaces, line ends, scripts, emoji, specials."""
    chance = random.Random(5)
    parts = [" ", "  ", "\n", "\r\n", "\t", "a", "The", "ing", "0", "1234", "'s", "'LL", "é",
             "e\u0301", "ß", "中文", "日本", "שלום", "हि", "🙂", "👩\u200d👧", "🏽", "\u00a0",
             "\ufeff", "½", "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "▁", "Ġ", "\x00",
             "\x7f", "\u200b", "(", "==", "_", "http://", "def f(x):\n    "]
    return ["", *("".join(chance.choices(parts, k=chance.randint(1, 12))) for _ in range(count))]


@pytest.mark.parametrize("line", ["newer", pytest.param("older", marks=pytest.mark.slow)])
def test_our_checkpoints_as_they_lie(tmp_path, request, line):
    """Random architectures with large weights, and strings that are hard to cut, in both lines."""
    packages = request.getfixturevalue("older") if line == "older" else None
    chance, ids = random.Random(1), torch.randint(258, (2, 48))
    texts, folders, wanted = hard_strings(300), [], []
    words = {"bytes": tokenizer.make_tokenizer("bytes"),
             "bpe": tokenizer.make_tokenizer("bpe:400", lambda: documents(30))}
    if importlib.util.find_spec("mistral_common"):
        words["mistral"] = tokenizer.make_tokenizer("mistral")
    for number in range(9 if line == "older" else 3):
        heads, kv = chance.choice([(4, 4), (4, 2), (6, 2), (8, 1)])
        config = ModelConfig(
            n_layer=chance.randint(1, 4), n_head=heads, n_kv_head=kv, d_ff=chance.randint(30, 90),
            d_model=heads * chance.choice([4, 8, 16]), block_size=chance.choice([48, 64, 128]),
            vocab_size=chance.choice([400, 413]), tie_embeddings=chance.random() < 0.5,
            rope_theta=chance.choice([1e4, 5e5]), norm_eps=chance.choice([1e-5, 1e-6]),
            **[{}, {"rope_scaling": "linear", "rope_factor": 4.0},
               {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 16}][number % 3])
        kind = list(words)[(number + number // 3) % len(words)]  # each with each kind of positions
        config = replace(config, vocab_size=max(config.vocab_size, words[kind].vocab_size))
        model = LLaMA(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                value = initial_weight(name, p.shape, config, number)
                p.copy_(value if p.dim() == 1 else value * chance.choice([5, 20]))
        (tmp_path / kind).mkdir(exist_ok=True)
        words[kind].save(tmp_path / kind)
        moments = optim.make(model, Settings()).state
        folder = checkpoint.save(tmp_path / str(number), 1, model, moments, {"step": 1, "rows": 1},
                                 tmp_path / kind / "tokenizer.json", World())
        folders.append(folder)
        with torch.no_grad():
            wanted.append((model(ids), kind, config))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    by_transformers(READ, *folders, cwd=tmp_path, packages=packages)
    ours = {kind: [[one.bos_id, *one.encode(text)] for text in texts]
            for kind, one in words.items()}
    for folder, (logits, kind, config) in zip(folders, wanted, strict=True):
        theirs = load_file(folder / "theirs.safetensors")["logits"]
        assert (logits - theirs).abs().max() <= 1e-4 * logits.abs().max(), config
        version, length, their_ids = json.loads((folder / "theirs.json").read_text())
        assert (version == "4.57.6") == (line == "older") and length == config.block_size
        assert their_ids == ours[kind], kind


@pytest.mark.slow
def test_our_code_in_the_older_line(tmp_path, older):
    export_both(tmp_path, tie_embeddings=True)
    assert_as_llama(tmp_path, *look(tmp_path, older))
