"""Checkpoints: whole or absent, verified, elastic, and Hugging Face folders as they lie."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_script

import checkpoint
import optim
import settings
import tokenizer
from model import LLaMA, ModelConfig, initial_weight
from parallel import World
from settings import Settings, UserError


def build(**keys) -> LLaMA:
    config = ModelConfig(**{"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 48,
                            "vocab_size": 258, "block_size": 64} | keys)
    model = LLaMA(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(name, p.shape, config, 1) * (6 if p.dim() > 1 else 1))
    return model


@pytest.fixture
def words(tmp_path) -> Path:
    tokenizer.make("bytes").save(tmp_path)
    return tmp_path / "tokenizer.json"


def save(run: Path, step: int, model: LLaMA, words: Path, optimizer=None) -> Path:
    optimizer = optimizer or optim.make(model, Settings())
    return checkpoint.save(run, step, model, optimizer, {"step": step}, words, World())


@pytest.mark.parametrize("keys", [
    {}, {"tie_embeddings": True}, {"n_kv_head": 4, "rope_theta": 5e5},
    {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_original": 32}])
def test_opens_in_transformers_as_it_lies(tmp_path, words, keys):
    transformers = pytest.importorskip("transformers")
    model = build(**keys)
    folder = save(tmp_path / "run", 7, model, words)
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 258, (2, 64))
    ours, theirs = model(ids), twin(ids).logits
    assert twin.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    pieces = transformers.AutoTokenizer.from_pretrained(folder)
    own = tokenizer.Tokenizer.load(folder)
    text = "def f(x):\n    return '<s> é 🙂'"
    assert pieces(text, split_special_tokens=True)["input_ids"] == [own.bos, *own.encode(text)]
    assert twin.config.max_position_embeddings == 64
    assert twin.config.bos_token_id == own.bos and twin.config.eos_token_id == own.eos
    again = checkpoint.load_model(folder)
    assert again.config == model.config and torch.equal(again(ids), ours)


def test_config_has_both_forms_of_rope():
    config = checkpoint.hf_config(build(rope_scaling="linear", rope_factor=2.0).config, 1, 2)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("change", [
    {"model_type": "gpt2"}, {"attention_bias": True}, {"hidden_act": "gelu"}, {"head_dim": 5},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}])
def test_other_architectures_are_refused_with_the_reason(tmp_path, change):
    config = checkpoint.hf_config(build().config, 1, 2) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="only plain LLaMA"):
        checkpoint.model_config(tmp_path)


def test_every_damage_is_found(tmp_path, words):
    folder = save(tmp_path / "run", 1, build(), words)
    assert checkpoint.damage(folder) == ""
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert {str(f) for f in files} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "checksums.json", "training/state.json",
        "training/optimizer-00000.safetensors"}
    for name in files:
        for kind in ("flip", "truncate", "remove"):
            if str(name) == "checksums.json" and kind == "flip":
                continue  # a flip there may hit a space; below
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            content = bytearray((copy / name).read_bytes())
            content[len(content) // 3] ^= 4
            if kind == "remove":
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(content if kind == "flip" else content[:-2])
            assert checkpoint.damage(copy), (name, kind)
            if "training" not in str(name) and str(name) != "checksums.json":
                with pytest.raises(UserError):
                    checkpoint.find(str(copy))
            shutil.rmtree(copy)
    sums = json.loads((folder / "checksums.json").read_text())
    sums["files"]["../../outside"] = {"size": 1, "sha256": "0"}
    (folder / "checksums.json").write_text(json.dumps(sums))
    assert "outside the checkpoint" in checkpoint.damage(folder)


def test_find_takes_a_checkpoint_a_run_or_a_folder_of_runs(tmp_path, words, capsys):
    model = build()
    for run, step in (("a", 5), ("a", 30), ("b", 10)):
        save(tmp_path / "out" / run, step, model, words)
    os.utime(tmp_path / "out/a/checkpoints/step_30", (1, 1))
    os.utime(tmp_path / "out/a/checkpoints/step_5", (1, 1))
    assert checkpoint.find(str(tmp_path / "out")).name == "step_10"
    assert "step_10" in capsys.readouterr().out
    assert checkpoint.find(str(tmp_path / "out/a")).name == "step_30"
    assert checkpoint.find(str(tmp_path / "out/a/checkpoints/step_5")).name == "step_5"
    (tmp_path / "out/a/checkpoints/step_40.tmp").mkdir()
    assert checkpoint.find(str(tmp_path / "out/a")).name == "step_30"
    (tmp_path / "out/a/checkpoints/step_30/model.safetensors").write_bytes(b"")
    assert checkpoint.find(str(tmp_path / "out/a")).name == "step_5"
    for wrong, message in ((tmp_path / "none", "no folder"), (tmp_path, "no complete checkpoint")):
        with pytest.raises(UserError, match=message):
            checkpoint.find(str(wrong))


def test_prune_keeps_the_last_and_the_milestones(tmp_path, words):
    model = build()
    for step in range(10, 70, 10):
        save(tmp_path, step, model, words)
        checkpoint.prune(tmp_path, keep_last=2, keep_every=30)
    assert [p.name for p in checkpoint.steps_of(tmp_path)] == ["step_60", "step_50", "step_30"]


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, words, monkeypatch):
    model = build()
    save(tmp_path, 10, model, words)

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "write_json", "sync", "check_space"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(OSError, match="No space"):
                save(tmp_path, 20, model, words)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_10"]
    assert checkpoint.damage(tmp_path / "checkpoints/step_10") == ""


def test_optimizer_state_is_readable_by_any_world_size(tmp_path, words):
    """Slices as three ranks would write them are put together by one."""
    model = build()
    optimizer = optim.make(model, Settings())
    for state in optimizer.state.values():
        for value in state.values():
            value.copy_(torch.randn_like(value))
    folder = save(tmp_path, 1, model, words, optimizer)

    class Third(World):  # cuts as fully_shard does on three ranks: the last one may be short
        def piece(self, tensor):
            rows = -(-tensor.shape[0] // 3)
            first = min(self.rank * rows, tensor.shape[0])
            return tensor[first:first + rows], first

    (folder / "training/optimizer-00000.safetensors").unlink()
    for rank in range(3):
        path = folder / "training" / f"optimizer-{rank:05d}.safetensors"
        checkpoint.save_optimizer(path, model, optimizer, Third(rank, 3))
    fresh = optim.make(model, Settings())
    checkpoint.load_optimizer(folder, model, fresh, World())
    for p in model.parameters():
        for kind, value in optimizer.state[p].items():
            assert torch.equal(fresh.state[p][kind], value)
    (folder / "training/optimizer-00001.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete"):
        checkpoint.load_optimizer(folder, model, fresh, World())


def test_weights_must_fit_the_config(tmp_path, words):
    folder = save(tmp_path, 1, build(), words)
    for keys, message in (({"n_layer": 1}, "unknown weights"), ({"n_layer": 3}, "missing"),
                          ({"d_ff": 40}, "shape")):
        with pytest.raises(UserError, match=message):
            checkpoint.load_weights(folder, build(**keys), World())
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_weights(folder, build(), World())


def test_nothing_is_unpickled(tmp_path, words, home):
    """No module of the program loads pickles, and a planted one is not touched."""
    root = Path(checkpoint.__file__).parent
    for path in root.glob("*.py"):
        text = path.read_text()
        for word in ("torch.load", "import pickle", "dcp.", "allow_pickle=True"):
            assert word not in text, (path.name, word)
    import train

    def run():
        return train.main(settings.parse(["toy.py", "--out_dir=out/a", "--max_steps=10"], "",
                                         train.Flags))

    assert run() == 0
    planted = home / "out/a/checkpoints/step_10/.metadata"
    planted.write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    assert run() == 0 and not (home / "harmed").exists()
    done = run_script("train.py", "toy.py", "--out_dir=out/a", "--max_steps=10", cwd=home)
    assert done.returncode == 0 and "already complete" in done.stdout
