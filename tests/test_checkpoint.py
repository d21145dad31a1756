"""Checkpoints: whole or absent, verified, elastic, and Hugging Face folders as they lie."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import threading
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from model import LLaMA, ModelConfig
from plainllama import files
from plainllama.command import parse
from plainllama.files import as_json, sha256, steps_of, sync, write_json
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.tokens import tokenizer
from plainllama.training import optim
from plainllama.weights import checkpoint, huggingface
from plainllama.weights.adapters import initial_weight
from plainllama.weights.huggingface import config_json, load_weights, read_config
from plainllama.weights.peft import load_model


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
    tokenizer.make_tokenizer("bytes").save(tmp_path)
    return tmp_path / "tokenizer.json"


def save(run: Path, step: int, model: LLaMA, words: Path, optimizer=None) -> Path:
    optimizer = optimizer or optim.make(model, Settings())
    return checkpoint.save(run, step, model, optimizer.state, {"step": step}, words, World())


def reseal(folder: Path) -> None:
    """Checksums for what is there now, as an attacker would write them."""
    (folder / "checksums.json").unlink()
    there = [path for path in folder.rglob("*") if path.is_file()]
    checkpoint.commit(folder, folder.with_name("sealed"), checkpoint.sealed(folder, there))
    (folder.with_name("sealed")).rename(folder)


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
    assert pieces(text, split_special_tokens=True)["input_ids"] == [own.bos_id, *own.encode(text)]
    assert twin.config.max_position_embeddings == 64
    assert twin.config.bos_token_id == own.bos_id and twin.config.eos_token_id == own.eos_id
    again = load_model(folder)
    assert again.config == model.config and torch.equal(again(ids), ours)


def test_config_has_both_forms_of_rope():
    config = config_json(build(rope_scaling="linear", rope_factor=2.0).config, 1, 2)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("change", [
    {"model_type": "gpt2"}, {"attention_bias": True}, {"hidden_act": "gelu"}, {"head_dim": 5},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}])
def test_other_architectures_are_refused_with_the_reason(tmp_path, change):
    config = config_json(build().config, 1, 2) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="only plain LLaMA"):
        read_config(tmp_path)


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
                    checkpoint.find_checkpoint(str(copy))
            shutil.rmtree(copy)
    sums = json.loads((folder / "checksums.json").read_text())
    sums["files"]["../../outside"] = {"size": 1, "sha256": "0"}
    write_json(folder / "checksums.json", sums)
    assert "outside the checkpoint" in checkpoint.damage(folder)


def test_find_takes_a_checkpoint_a_run_or_a_folder_of_runs(tmp_path, words, capsys):
    model = build()
    for run, step in (("a", 5), ("a", 30), ("b", 10)):
        save(tmp_path / "out" / run, step, model, words)
    os.utime(tmp_path / "out/a/checkpoints/step_30", (1, 1))
    os.utime(tmp_path / "out/a/checkpoints/step_5", (1, 1))
    assert checkpoint.find_checkpoint(str(tmp_path / "out")).name == "step_10"
    assert "step_10" in capsys.readouterr().out
    assert checkpoint.find_checkpoint(str(tmp_path / "out/a")).name == "step_30"
    assert checkpoint.find_checkpoint(str(tmp_path / "out/a/checkpoints/step_5")).name == "step_5"
    (tmp_path / "out/a/checkpoints/step_40.tmp").mkdir()
    assert checkpoint.find_checkpoint(str(tmp_path / "out/a")).name == "step_30"
    (tmp_path / "out/a/checkpoints/step_30/model.safetensors").write_bytes(b"")
    assert checkpoint.find_checkpoint(str(tmp_path / "out/a")).name == "step_5"
    for wrong, message in ((tmp_path / "none", "no folder"), (tmp_path, "no complete checkpoint")):
        with pytest.raises(UserError, match=message):
            checkpoint.find_checkpoint(str(wrong))


def test_the_last_the_best_and_the_milestones_are_kept(tmp_path, words):
    model, losses = build(), {10: 3.0, 20: 1.5, 30: None, 40: 2.0}
    optimizer = optim.make(model, Settings())
    saver = checkpoint.Saver(tmp_path, words, World(), print, keep_last=2, keep_every=30)
    for step in range(10, 90, 10):
        saver.start(step, model, optimizer.state, {"step": step, "val_loss": losses.get(step)})
    saver.wait()
    assert [p.name[5:] for p in steps_of(tmp_path)] == ["80", "70", "60", "30", "20"]


def test_training_waits_for_the_copy_only(tmp_path, words, monkeypatch):
    """The disk hangs, and meanwhile weights and moments move."""
    model = build()
    optimizer = optim.make(model, Settings())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    disk, real = threading.Event(), sync
    monkeypatch.setattr(files, "sync", lambda path: disk.wait(600) and real(path))
    saver = checkpoint.Saver(tmp_path, words, World())
    saver.start(1, model, optimizer.state, {"step": 1})
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            optimizer.state[p]["exp_avg"].fill_(7.0)
    assert not steps_of(tmp_path) and saver.saved == -1
    disk.set()
    saver.start(2, model, optimizer.state, {"step": 2})  # waits for the first
    assert saver.saved == 1
    saver.wait()
    first, second = (tmp_path / "checkpoints" / name for name in ("step_1", "step_2"))
    assert checkpoint.damage(first) == checkpoint.damage(second) == ""
    assert all(torch.equal(value, before[name]) for name, value in
               load_file(first / "model.safetensors").items())
    assert not any(value.any() for value in load_file(second / "model.safetensors").values())
    for folder, expected in ((first, 0.0), (second, 7.0)):
        moments = load_file(folder / "training/optimizer-00000.safetensors")
        assert (moments["model.norm.weight/exp_avg"] == expected).all()


def test_a_save_that_fails_is_said_and_the_next_one_works(tmp_path, words, monkeypatch):
    model, said = build(), []
    optimizer = optim.make(model, Settings())
    saver = checkpoint.Saver(tmp_path, words, World(), said.append)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
        saver.start(1, model, optimizer.state, {"step": 1})
        saver.wait()
    assert saver.saved == -1 and "0.0 GB free" in saver.problem and len(said) == 1
    assert "no checkpoint at step 1" in said[0] and "going on" in said[0]
    saver.start(2, model, optimizer.state, {"step": 2})
    saver.wait()
    assert saver.saved == 2 and not saver.problem and len(said) == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, words, monkeypatch):
    model = build()
    save(tmp_path, 10, model, words)

    def full(*args):
        raise OSError(28, "No space left on device")

    for room, name in ((checkpoint, "save_file"), (huggingface, "save_file"),
                       (files, "write_json"), (huggingface, "write_json"), (files, "sync"),
                       (files, "check_space"), (files, "sha256")):
        with monkeypatch.context() as patch:
            patch.setattr(room, name, full)
            with pytest.raises(OSError, match="No space"):
                save(tmp_path, 20, model, words)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_10"]
    assert checkpoint.damage(tmp_path / "checkpoints/step_10") == ""


class Third(World):
    """Cuts as fully_shard does on three ranks: the last one may be short."""

    def piece(self, tensor):
        rows = -(-tensor.shape[0] // 3)
        first = min(self.rank * rows, tensor.shape[0])
        return tensor[first:first + rows], first


def write_as_three(folder: Path, model: LLaMA, moments: checkpoint.Moments) -> None:
    """Put the slices that three ranks would write in the place of one rank's."""
    (folder / "training/optimizer-00000.safetensors").unlink()
    for rank in range(3):
        tensors, places = checkpoint.slices_of(model, moments, Third(rank, 3, mode="fsdp"))
        save_file(tensors, folder / f"training/optimizer-{rank:05d}.safetensors",
                  {"places": json.dumps(places)})
    reseal(folder)


def test_optimizer_state_is_readable_by_any_world_size(tmp_path, words):
    """Slices as three ranks would write them are put together by one."""
    model = build()
    optimizer = optim.make(model, Settings())
    for state in optimizer.state.values():
        for value in state.values():
            value.copy_(torch.randn_like(value))
    folder = save(tmp_path, 1, model, words, optimizer)

    write_as_three(folder, model, optimizer.state)
    fresh = optim.make(model, Settings())
    checkpoint.load_moments(folder, model, fresh.state, World())
    for p in model.parameters():
        for kind, value in optimizer.state[p].items():
            assert torch.equal(fresh.state[p][kind], value)
    (folder / "training/optimizer-00001.safetensors").unlink()
    reseal(folder)
    with pytest.raises(UserError, match="incomplete"):
        checkpoint.load_moments(folder, model, fresh.state, World())


@pytest.mark.parametrize("ranks", [1, 3])
def test_half_a_model_is_trained(tmp_path, words, ranks):
    """All weights are saved, moments of those that learn alone, and both come back to the bit."""
    model = build()
    for number, p in enumerate(model.parameters()):
        p.requires_grad = number % 2 == 0
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert 0 < len(learning) < len(list(model.parameters()))
    moments = {p: {"step": torch.tensor(9.0), "momentum": torch.randn_like(p)}
               for p in model.parameters() if p.requires_grad}
    folder = checkpoint.save(tmp_path, 1, model, moments, {"step": 1}, words, World())
    if ranks == 3:
        write_as_three(folder, model, moments)
    assert checkpoint.damage(folder) == ""
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == {name for name, _ in model.named_parameters()}
    written = [load_file(path) for path in folder.glob("training/optimizer-*")]
    assert {key for tensors in written for key in tensors} == {
        f"{name}/{kind}" for name in learning for kind in ("step", "momentum")}
    again = build()
    for p, old in zip(again.parameters(), model.parameters(), strict=True):
        p.data.zero_()
        p.requires_grad = old.requires_grad
    empty = {p: {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
             for p in again.parameters() if p.requires_grad}
    load_weights(folder, again, World())
    checkpoint.load_moments(folder, again, empty, World())
    for p, old in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, old)
        for kind, value in moments.get(old, {}).items():
            assert torch.equal(empty[p][kind], value)
    del moments[dict(model.named_parameters())[learning[0]]]  # it learns and has none: an error
    with pytest.raises(RuntimeError, match=learning[0]):
        checkpoint.slices_of(model, moments, World())
    for p in again.parameters():  # a resumed run that trains more than the one before
        p.requires_grad = True
        empty.setdefault(p, {"step": torch.zeros(()), "momentum": torch.zeros_like(p)})
    with pytest.raises(UserError, match="incomplete"):
        checkpoint.load_moments(folder, again, empty, World())


def test_weights_must_fit_the_config(tmp_path, words):
    folder = save(tmp_path, 1, build(), words)
    for keys, message in (({"n_layer": 1}, "unknown weights"), ({"n_layer": 3}, "missing"),
                          ({"d_ff": 40}, "shape")):
        with pytest.raises(UserError, match=message):
            load_weights(folder, build(**keys), World())
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(folder, build(), World())


def test_random_damage_is_named_and_the_one_before_is_taken(tmp_path, words, capsys):
    model, dice = build(), random.Random(5)
    older, newest = (save(tmp_path, step, model, words) for step in (1, 2))
    shutil.copytree(newest, tmp_path / "whole")
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    small = [name for name in files if name.suffix == ".json"]
    for turn in range(60):
        name = dice.choice(small if turn % 2 else files)
        content = bytearray((newest / name).read_bytes())
        where, kind = dice.randrange(len(content)), turn % 4
        if kind == 0:
            content[where] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del content[where:]
        elif kind == 2:
            content[where:where] = b"[" * 100_000
        if kind == 3 and turn % 3 == 0:
            shutil.rmtree(newest)
            newest.mkdir()
        elif kind == 3:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(content)
        assert checkpoint.newest_good(tmp_path) == older, (turn, name, kind)
        assert f"{newest} is damaged (" in capsys.readouterr().out
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "whole", newest)
    sums = json.loads((newest / "checksums.json").read_text())
    for change in ({"format": 3}, {"files": {}}, {"files": []}, {"files": None}):
        write_json(newest / "checksums.json", sums | change)
        assert checkpoint.newest_good(tmp_path) == older
        assert "is damaged" in capsys.readouterr().out
    whole = as_json(sums)
    for text in (whole[:-1], whole.replace("\n", " "), whole + " ", whole.replace(": ", ":", 1)):
        (newest / "checksums.json").write_text(text)
        assert checkpoint.newest_good(tmp_path) == older


def test_nothing_in_a_checkpoint_leads_out_of_it(tmp_path, words):
    folder = save(tmp_path / "run", 1, build(), words)
    (tmp_path / "secret").write_text("mine")
    os.mkfifo(folder / "pipe")
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "away").symlink_to(tmp_path)
    entry = {"size": 4, "sha256": sha256(tmp_path / "secret")}
    for name in ("../../../secret", str(tmp_path / "secret"), "link", "away/secret", "pipe"):
        write_json(folder / "checksums.json", sums | {"files": sums["files"] | {
            name: entry if name != "pipe" else {"size": 0, "sha256": ""}}})
        said = checkpoint.damage(folder)
        assert ("does not match" if name == "pipe" else "outside the checkpoint") in said, name
    (folder / "checksums.json").unlink()  # now it is a model folder from elsewhere
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(load_file(tmp_path / "model.safetensors"),
                                     "../../../model.safetensors")}))
    with pytest.raises(UserError, match="outside the folder"):
        load_model(folder)


def test_a_checkpoint_in_the_cache_of_the_hub(tmp_path, words, capsys):
    """Every file is a link into blobs/, at the top of a repository or deeper in it."""
    folder = save(tmp_path / "run", 1, build(), words)
    repo = tmp_path / "hub" / "models--me--tiny"
    (repo / "blobs").mkdir(parents=True)
    for place in (repo / "snapshots" / "abc", repo / "snapshots" / "abc" / "out" / "step_1"):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            blob = repo / "blobs" / sha256(path)
            shutil.copy(path, blob)
            link = place / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        assert checkpoint.find_checkpoint(str(place)) == place and not checkpoint.damage(place)
        assert load_model(place).config == build().config
        (place / ".DS_Store").write_text("x")
        assert not checkpoint.damage(place)
        link = place / "config.json"
        blob = tmp_path / "blobs2" / "config"
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "config.json", blob)
        link.unlink()
        link.symlink_to(blob)
        assert "outside the checkpoint" in checkpoint.damage(place)


def test_a_checkpoint_that_is_deleted_while_it_is_looked_for(tmp_path, words, monkeypatch, capsys):
    """keep_last=1 in a run that goes on: the one that came instead is taken, once or again."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, build(), words)
    steps, damage = [tmp_path / f"checkpoints/step_{step}" for step in range(5)], checkpoint.damage
    for step in steps[2:]:
        step.rename(tmp_path / step.name)

    def pruned(folder, training=True):  # deleted while its files are hashed
        if folder == steps[1]:
            (tmp_path / "step_2").rename(steps[2])
            shutil.rmtree(folder)
        return damage(folder, training)

    monkeypatch.setattr(checkpoint, "damage", pruned)
    assert checkpoint.find_checkpoint(str(tmp_path)) == steps[2]
    assert "damaged" not in capsys.readouterr().out

    def use(folder):  # deleted before it is loaded
        used.append(folder)
        if folder != steps[4] or not len(used) % 2:
            shutil.rmtree(folder, ignore_errors=True)
            newer = steps[steps.index(folder) + 1]
            (tmp_path / newer.name).rename(newer)
        return len(load_model(folder).model.layers)

    used = []
    with pytest.raises(UserError, match=r"step_3 was deleted while it was read.*start again"):
        checkpoint.with_checkpoint(str(tmp_path), World(), use)
    assert checkpoint.with_checkpoint(str(tmp_path), World(), use) == 2 and len(used) == 3
    (steps[4] / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="does not match"):
        checkpoint.with_checkpoint(str(steps[4]), World(), use)
    assert len(used) == 3


def test_what_is_planted_does_no_harm(tmp_path, words, monkeypatch):
    """A pickle, a config with code, and safetensors files with lying headers, all with right
    checksums: refused in a line, or not looked at."""
    monkeypatch.chdir(tmp_path)
    model = build()
    optimizer = optim.make(model, Settings())
    folder = save(tmp_path / "run", 1, model, words, optimizer)
    evil = b"cos\nsystem\n(S'touch harmed'\ntR."
    for name in (".metadata", "training/.metadata", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(evil)
    (folder / "modeling_evil.py").write_text("open('harmed', 'w')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.C"},
        "rope_theta": config["rope_theta"], "_name_or_path": "../../etc"}))
    (folder / "training/optimizer-00009.safetensors").write_bytes(
        (folder / "training/optimizer-00000.safetensors").read_bytes())
    reseal(folder)
    (folder / "training/optimizer-00008.safetensors").write_bytes(evil)  # not in the checksums
    assert checkpoint.damage(folder) == ""
    assert load_model(checkpoint.find_checkpoint(str(tmp_path / "run"))).config == model.config
    checkpoint.load_moments(folder, model, optimizer.state, World())
    good = (folder / "training/optimizer-00000.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8:8 + length])
    key = "model.norm.weight/exp_avg"
    places = json.loads(header["__metadata__"]["places"])
    for change in ({key: header[key] | {"data_offsets": [0, 1 << 60]}},
                   {key: header[key] | {"shape": [-1]}}, {key: header[key] | {"shape": [1 << 40]}},
                   {"__metadata__": {"places": "cos"}}, {"__metadata__": {}},
                   {"__metadata__": {"places": json.dumps(places | {key: {"offset": -9}})}},
                   {"__metadata__": {"places": json.dumps(places | {key: {"offset": "x"}})}},
                   {"__metadata__": {"places": json.dumps(places | {key: 3})}}):
        text = json.dumps(header | change).encode()
        for path in folder.glob("training/optimizer-*"):
            path.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length:])
        reseal(folder)
        with pytest.raises(UserError):
            checkpoint.load_moments(folder, model, optimizer.state, World())
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + good[8:])
    (folder / "training/state.json").write_text("[" * 100_000)
    reseal(folder)
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(folder, model, World())
    with pytest.raises(UserError, match="not a run's state"):
        checkpoint.read_state(folder)
    assert not (tmp_path / "harmed").exists()


def test_loading_holds_no_more_than_a_fresh_start(tmp_path, words):
    """Beside the parameters, one of them at a time."""
    model = build()
    optimizer = optim.make(model, Settings())
    folder = save(tmp_path, 1, model, words, optimizer)
    limit, seen = 4 * max(p.numel() for p in model.parameters()), [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, call, kinds, args=(), kwargs=None):
            out = call(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel() * out.element_size())
            return out

    with Watch():
        load_weights(folder, model, World())
        checkpoint.load_moments(folder, model, optimizer.state, World())
    assert 0 < max(seen) <= limit


def test_nothing_is_unpickled(tmp_path, words, home):
    """No module of the program loads pickles, and a planted one is not touched."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("plainllama/**/*.py")):
        text = path.read_text()
        for word in ("torch.load", "import pickle", "dcp.", "allow_pickle=True"):
            if path.name == "irt.py" and word == "import pickle":
                continue  # one file of known hash, arrays alone: test_irt.py offers it others
            assert word not in text, (path.name, word)
    import train

    def run():
        return train.main(parse(["toy.py", "--out_dir=out/a", "--max_steps=10"], "",
                                         train.Flags))

    assert run() == 0
    planted = home / "out/a/checkpoints/step_10/.metadata"
    planted.write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    assert run() == 0 and not (home / "harmed").exists()


# ---- small files

def test_json_is_written_as_one_whole(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.json", []
    assert as_json({"a": [1, None]}) == (
        '{\n "a": [\n  1,\n  null\n ]\n}\n')
    write_json(path, build().config)
    assert json.loads(path.read_text())["n_layer"] == 2
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.name, path.exists())))
    files.write_text(path, "é")
    assert path.read_bytes() == "é".encode() and not synced
    files.write_text(path, "x", durable=True)
    assert synced == [("a.json.plainllama.tmp", True)] and list(tmp_path.iterdir()) == [path]


def test_damaged_json_is_named_or_passed_over(tmp_path):
    path = tmp_path / "a.json"
    for text, found in (('{"a": 1}', {"a": 1}), (None, {}), ("{", None), ("3", None), ("[1]", None),
                        (b"\xff", None)):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert files.read_json(path, tolerant=True) == (found or {})
        if found is not None:
            assert files.read_json(path) == found
            continue
        with pytest.raises(UserError) as seen:
            files.read_json(path)
        assert str(seen.value) == f"{path} is damaged: it is not a JSON object"
    assert files.read_json(tmp_path, tolerant=True) == {}
    with pytest.raises(IsADirectoryError):
        files.read_json(tmp_path)


def test_rows_of_which_the_last_is_half_written(tmp_path):
    path, one, two = tmp_path / "a.jsonl", {"step": 1}, {"step": 2}
    assert files.read_rows(path) == []
    for text, found, damaged in (
            ('{"step": 1}\n{"step": 2}\n', [one, two], 0), ('{"step": 1}\n{"st', [one], 0),
            ('{"step": 1}\n{"step": 2}', [one, two], 0), ('{"step"\n{"step": 2}\n', [two], 1),
            ('{"step": 1}\n3\n{"step": 2}\n', [one, two], 2), ("{\n", [], 1), ("", [], 0)):
        path.write_text(text)
        assert files.read_rows(path, tolerant=True) == found
        if not damaged:
            assert files.read_rows(path) == found
            continue
        with pytest.raises(UserError) as seen:
            files.read_rows(path)
        assert str(seen.value) == f"{path}:{damaged} is damaged: it is not JSON"
    rows = [{"step": 1}, {"x": 1}, {"step": 2}, {"step": 3}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for step, kept in ((0, 0), (1, 1), (2, 2), (3, 3), (9, 3)):
        path.write_text("{\n" + text)
        files.cut_rows(path, step)
        whole = [row for row in rows if "step" in row][:kept]
        assert path.read_text() == "".join(json.dumps(row) + "\n" for row in whole)
    files.cut_rows(tmp_path / "none", 3)
    assert not (tmp_path / "none").exists()


def test_fingerprints_of_files(tmp_path):
    """Of its size and both ends; the whole of one that changed is read again, and only then."""
    path, end = tmp_path / "a", 64 << 10
    for size in (0, 9, end, end + 1, 2 * end, 2 * end + 5, 300000):
        data = random.Random(size).randbytes(size)
        path.write_bytes(data)
        ends = data[:end] + data[max(0, size - end):]
        assert files.fingerprint(path) == hashlib.blake2b(
            str(size).encode() + ends, digest_size=8).hexdigest()
        assert files.file_entry(path) == {"size": size, "sha256": sha256(path)}
    assert files.sha256_bytes(data) == sha256(path) == hashlib.sha256(data).hexdigest()
    seen: dict = {}
    assert files.content_hash(path, seen) == sha256(path)
    stat = os.stat(path)
    assert seen == {str(path): [300000, stat.st_mtime_ns, stat.st_ctime_ns, sha256(path)]}
    seen[str(path)][3] = "noted"
    assert files.content_hash(path, seen) == "noted"
    for place in range(3):
        old = {str(path): [*seen[str(path)]]}
        old[str(path)][place] += 1
        assert files.content_hash(path, old) == sha256(path) == old[str(path)][3]


def test_room_on_the_disk_and_who_holds_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: types.SimpleNamespace(
        free=5 * 10**9))
    files.check_space(tmp_path, 5 * 10**9)
    with pytest.raises(OSError) as seen:
        files.check_space(tmp_path, 5 * 10**9 + 1)
    assert (seen.value.errno, seen.value.strerror, seen.value.filename) == (
        28, "5.0 GB needed, 5.0 GB free", str(tmp_path))
    holder = files.lock_run(tmp_path)
    with pytest.raises(UserError) as refused:
        files.lock_run(tmp_path)
    assert str(refused.value) == (f"another process is training in {tmp_path}; choose another "
                                  "out_dir")
    holder.close()
    files.lock_run(tmp_path).close()

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    files.lock_run(tmp_path).close()
    assert capsys.readouterr().out == (
        f"WARNING: no lock on {tmp_path}/.lock ([Errno 95] Operation not supported); start no "
        "second job on it\n")


def test_what_lies_in_a_folder_of_runs(tmp_path):
    assert files.newest_run(tmp_path) is None and files.read_status(tmp_path) == ""
    times = {"a/checkpoints/step_2": 30, "a/checkpoints/step_10": 20, "b/checkpoints/step_3": 40,
             "b/checkpoints/step_9.tmp": 99, "b/checkpoints/step_x": 99, "c/run.json": 50,
             "c/metrics.jsonl": 60, "d/run.json": 1}
    for name, moment in times.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}") if path.suffix in (".json", ".jsonl") else path.mkdir()
        os.utime(path, (moment, moment))
    assert [p.name for p in steps_of(tmp_path / "a")] == ["step_10", "step_2"]
    assert [p.name for p in steps_of(tmp_path / "b")] == ["step_3"]
    assert files.newest_run(tmp_path) == tmp_path / "b"
    shutil.rmtree(tmp_path / "b")
    assert files.newest_run(tmp_path) == tmp_path / "a"
    shutil.rmtree(tmp_path / "a")
    os.utime(tmp_path / "c/metrics.jsonl", (0.5, 0.5))
    assert files.newest_run(tmp_path) == tmp_path / "c"
    write_json(tmp_path / "d/metrics.jsonl", {})
    assert files.newest_run(tmp_path) == tmp_path / "d"
    files.write_status(tmp_path, "running", 4)
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "running", "step": 4}
    assert files.read_status(tmp_path) == "running"
    (tmp_path / "status.json").write_text("{")
    assert files.read_status(tmp_path) == ""
    step = tmp_path / "d/checkpoints/step_1"
    assert files.run_of(step) == tmp_path / "d" and files.run_of(tmp_path / "d/x/step_1") is None
    (tmp_path / "d/run.json").unlink()
    assert files.run_of(step) is None


# ---- parts of a checkpoint, one by one

def test_what_is_wrong_is_said(tmp_path, words):
    folder = save(tmp_path, 1, build(), words)
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums["format"] == 1 and not checkpoint.damage(folder, training=False)

    def said(training: bool = True, **change) -> str:
        write_json(folder / "checksums.json", sums | change)
        return checkpoint.damage(folder, training)

    assert said(format=2) == "its format is 2, not 1; use the plainllama that wrote it"
    for missing, needs in (("config.json", (True, False)), ("model.safetensors", (True, False)),
                           ("training/state.json", (True,))):
        left = {name: entry for name, entry in sums["files"].items() if name != missing}
        for training in (True, False):
            assert said(training, files=left) == (
                f"checksums.json does not name {missing}" if training in needs else "")
    adapter = {name: entry for name, entry in sums["files"].items() if name != "model.safetensors"}
    lora = ("adapter_config.json", "adapter_model.safetensors", "base.json")
    for name in lora:
        (folder / name).write_text("{}")
    entries = {name: files.file_entry(folder / name) for name in lora}
    assert said(files=adapter | entries) == ""
    for name in lora:
        left = {other: entry for other, entry in entries.items() if other != name}
        assert said(files=adapter | left) == f"checksums.json does not name {name}"
    (folder / "training/state.json").write_text("{}")
    assert said() == "training/state.json does not match its checksum"
    assert said(training=False) == ""
    (folder / "checksums.json").write_text(json.dumps(sums))
    assert checkpoint.damage(folder) == "checksums.json is not as it was written"
    (folder / "checksums.json").unlink()
    assert checkpoint.damage(folder).startswith("FileNotFoundError")


def test_what_a_name_of_a_checkpoint_means(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "out/a", 3, build(), words)
    step = Path("out/a/checkpoints/step_3")
    Path("file").write_text("")
    Path("weights").mkdir()
    (Path("weights") / "x.safetensors").write_text("")
    shutil.copytree(step, "hub")
    (Path("hub") / "checksums.json").unlink()
    (Path("hub") / "model.safetensors").write_text("")  # whose hash nobody knows
    Path("lora").mkdir()
    (Path("lora") / "adapter_config.json").write_text("{}")
    Path("data").mkdir()
    shutil.copytree(step, "torn")
    (Path("torn") / "config.json").write_text("{}")
    Path("out/old/checkpoints").mkdir(parents=True)
    for name, found in (("out", step), ("out/a", step), (str(step), step), ("hub", Path("hub")),
                        ("lora", Path("lora"))):
        assert checkpoint.find_checkpoint(name) == found
        assert capsys.readouterr().out == f"checkpoint {found}\n"
    for name, says in (
            ("file", "file is a file; name a checkpoint, a run or a folder of runs"),
            ("gone", "no folder gone; name a checkpoint or a run, or train one first (train.py)"),
            ("out/a/checkpoints/step_9", "no checkpoint out/a/checkpoints/step_9; its run has "
                                         "step_3"),
            ("weights", "weights holds weights but no config.json; copy the folder again, whole"),
            ("data", "data holds no complete checkpoint; name a run that has saved one"),
            ("out/old", "out/old holds no complete checkpoint; name a run that has saved one"),
            ("torn", "checkpoint torn cannot be used: config.json does not match its checksum")):
        with pytest.raises(UserError) as seen:
            checkpoint.find_checkpoint(name)
        assert str(seen.value) == says


def test_a_checkpoint_is_looked_for_again_once(tmp_path, monkeypatch):
    """By one process, if it was deleted; several would not find the same."""
    world, looked, used = World(), [], []
    (tmp_path / "there").mkdir()

    def find(path):
        looked.append(path)
        return tmp_path / ("there" if len(looked) == good else "gone")

    def use(folder):
        used.append(folder)
        if folder and folder.name == "gone":
            raise OSError("no such file")
        return "made"

    monkeypatch.setattr(checkpoint, "find_checkpoint", find)
    for size, good, found, calls in ((1, 1, None, 1), (1, 2, None, 2), (1, 1, "gone", 1),
                                     (1, 9, None, 2), (2, 1, None, 1), (2, 9, None, 1),
                                     (1, 9, "there", 0)):
        looked.clear()
        world.size = size
        monkeypatch.setattr(world, "decide", lambda call: call())
        before = tmp_path / found if found else None
        if good == 9 and found is None:
            with pytest.raises(UserError, match="gone was deleted while it was read, by a run"):
                checkpoint.with_checkpoint("x", world, use, before)
        else:
            assert checkpoint.with_checkpoint("x", world, use, before) == "made"
        assert looked == ["x"] * calls
    used.clear()
    assert checkpoint.with_checkpoint("", world, use, None) == "made" and used == [None]
    assert checkpoint.with_checkpoint("", world, use, tmp_path / "there") == "made"

    def broken(folder):
        raise UserError("torn")

    good, world.size = 1, 1
    looked.clear()
    with pytest.raises(UserError, match="torn"):
        checkpoint.with_checkpoint("x", world, broken)
    assert looked == ["x"]


def test_each_rank_does_its_part(tmp_path, words):
    """What rank 0 alone writes, and whose failure all hear of."""
    said: list = []
    for rank in (0, 1):
        world = World(rank, 2)
        world.gather = lambda value, world=world: [value] if world.rank == 0 else [(9, ""), value]
        saver = checkpoint.Saver(tmp_path / str(rank), words, world, said.append, 1, 0)
        assert (saver.saved, saver.problem, saver.thread, saver.template) == (-1, "", None, "")
        assert saver.together(lambda a, b: a + b, 1, 2) == ([3] if rank == 0 else [9, 3])
        for error, text in ((ValueError("torn"), "torn"), (ValueError(), "ValueError()")):
            def fail(error=error):
                raise error

            with pytest.raises(OSError) as seen:
                saver.together(fail)
            assert str(seen.value) == (f"{text} (rank 1)" if rank else text)
        folder = tmp_path / str(rank) / "checkpoints/step_4.tmp"
        old = folder.with_name("step_3.tmp")
        for path in (folder, old):
            path.mkdir(parents=True)
            (path / "x").write_text("")
        saver.make_room(folder, 0)
        assert old.exists() == bool(rank) and (folder / "x").exists() == bool(rank)
        assert (folder / "training").exists() != bool(rank)
        (folder / "training").mkdir(exist_ok=True)
        model = build()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        slices = {"a/exp_avg": torch.ones(2)} if rank else {}
        entries = saver.write_files(folder, model.config, weights, slices, {}, {"format": 1}, None)
        assert set(entries) == ({"training/optimizer-00001.safetensors"} if rank else {
            "training/state.json", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json"})
        saver.commit(folder, folder.with_name("step_4"), [entries])
        assert folder.with_name("step_4").exists() != bool(rank)
        (tmp_path / str(rank) / "checkpoints/step_5.tmp").mkdir()
        saver.make_room = lambda *_, fail=fail: fail()
        saver.write(5, 0)
        assert saver.problem == "ValueError()" + " (rank 1)" * rank and saver.saved == -1
        assert (tmp_path / str(rank) / "checkpoints/step_5.tmp").exists() == bool(rank)
        assert said.pop() == f"WARNING: no checkpoint at step 5: {saver.problem}; going on"
    assert checkpoint.gather_weights(dict(model.named_parameters()), World(1, 2)) == {}
    told: list = []
    saver = checkpoint.Saver(tmp_path / "t", words, World())
    saver.tell = told.append
    saver.start(7, model, optim.make(model, Settings()).state, {"step": 7})
    assert saver.thread.daemon and saver.thread.name == "saver"
    saver.wait()
    assert told == [7] and saver.saved == 7


def test_how_much_room_a_checkpoint_needs(tmp_path, words, monkeypatch):
    """Four bytes for each weight and moment."""
    needs, model = [], build()
    monkeypatch.setattr(files, "check_space", lambda folder, need: needs.append(need))
    numbers = sum(p.numel() for p in model.parameters())
    count = len(list(model.parameters()))
    save(tmp_path, 1, model, words)
    assert needs == [4 * (3 * numbers + count)]


def test_rows_of_new_tokens_are_those_of_the_matrix():
    """Of a model that is saved whole; an adapter has them alone."""
    matrix, rows = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.ones(3, 2))
    whole = checkpoint.gather_weights({"a.weight": matrix, "a.rows": rows}, World())
    assert whole.keys() == {"a.weight"} and whole["a.weight"].sum(1).tolist() == [0, 2, 2, 2]
    assert not matrix.any()
    assert checkpoint.gather_weights({"a.rows": rows}, World()).keys() == {"a.rows"}
    kept = checkpoint.gather_weights({"b": rows}, World())["b"]
    assert kept.data_ptr() != rows.data_ptr() and torch.equal(kept, rows)


def test_which_checkpoints_stay(tmp_path, monkeypatch):
    def there(*steps: str) -> None:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        for step in steps:
            (tmp_path / "checkpoints" / f"step_{step}" / "training").mkdir(parents=True)
            if (loss := losses.get(step)) is not None:
                write_json(tmp_path / "checkpoints" / f"step_{step}" / checkpoint.STATE,
                           {"val_loss": loss})

    losses = {"2": 3.0, "4": 1.0, "6": 2.0, "7": None, "8": 1.0}
    names = ("1", "2", "3", "4", "6", "7", "8")
    for last, every, kept in ((0, 0, names), (1, 0, ("8",)), (2, 0, ("7", "8")),
                              (1, 3, ("3", "6", "8")), (3, 2, ("2", "4", "6", "7", "8")),
                              (99, 0, names)):
        there(*names)
        checkpoint.prune(tmp_path, last, every)
        assert sorted(p.name[5:] for p in (tmp_path / "checkpoints").iterdir()) == list(kept)
    losses["8"] = 1.5
    there(*names)
    checkpoint.prune(tmp_path, 1, 0)
    assert [p.name for p in steps_of(tmp_path)] == ["step_8", "step_4"]
    there(*names)  # on one of them the adapters of another run stand
    checkpoint.hold(tmp_path / "checkpoints/step_2", Path("out/a"))
    checkpoint.hold(tmp_path / "checkpoints", Path("out/a"))  # what is no checkpoint has no note
    checkpoint.prune(tmp_path, 1, 0)
    assert [p.name for p in steps_of(tmp_path)] == ["step_8", "step_4", "step_2"]
    note = tmp_path / "checkpoints/step_2.base"
    assert note.read_text() == f"{Path('out/a').resolve()}\n" and len([*note.parent.iterdir()]) == 4
    there("1", "2", "3")
    (tmp_path / "checkpoints/step_3.damaged").mkdir()
    checkpoint.set_aside(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step_1", "step_2", "step_3.damaged"]
    assert (tmp_path / "checkpoints/step_3.damaged/training").is_dir()
    monkeypatch.setattr(checkpoint, "prune", lambda *_: (_ for _ in ()).throw(OSError("stuck")))
    said: list = []
    saver = checkpoint.Saver(tmp_path, tmp_path, World(), said.append, 1)
    folder = tmp_path / "checkpoints/step_9.tmp"
    (folder / "training").mkdir(parents=True)
    saver.commit(folder, folder.with_name("step_9"), [{}])
    assert said == ["WARNING: an old checkpoint could not be deleted: stuck"]
    assert (tmp_path / "checkpoints/step_9/checksums.json").is_file()


@pytest.mark.parametrize(("cuts", "whole"), [
    ([(0, 6)], True), ([(0, 2), (2, 6)], True), ([(0, 4), (2, 6)], True), ([(0, 6), (0, 6)], True),
    ([(0, 2), (3, 6)], False), ([(1, 6)], False), ([(0, 5)], False), ([], False),
    ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)], True)])
def test_moments_from_slices_of_any_cut(tmp_path, cuts, whole):
    """Slices that were cut elsewhere, or overlap, for ranks that want some rows."""
    net = torch.nn.Linear(2, 6, bias=False)
    stored = torch.arange(12.0).view(6, 2)
    (tmp_path / "training").mkdir()
    names = []
    for number, (a, b) in enumerate(cuts):
        names.append(f"training/optimizer-{number:05d}.safetensors")
        save_file({"weight/m": stored[a:b].clone()}, tmp_path / names[-1], {
            "places": json.dumps({"weight/m": {"offset": a, "shape": [6, 2]}})})
    write_json(tmp_path / "checksums.json", {"files": dict.fromkeys(names)})
    for first, last in ((0, 6), (2, 4), (2, 6), (1, 5), (6, 6)):
        world, target = World(), torch.full((6, 2), -1.0)
        world.piece = lambda tensor, first=first, last=last: (tensor[first:last], first)
        covered = all(any(a <= row < b for a, b in cuts) for row in range(first, last))
        if covered:
            checkpoint.load_moments(tmp_path, net, {net.weight: {"m": target}}, world)
            assert torch.equal(target[first:last], stored[first:last])
        else:
            with pytest.raises(UserError, match="m of weight is incomplete: another optimizer's"):
                checkpoint.load_moments(tmp_path, net, {net.weight: {"m": target}}, world)
        assert (target[:first] == -1).all() and (target[last:] == -1).all()
    assert whole == all(any(a <= row < b for a, b in cuts) for row in range(6))
    world = World(1, 2)
    world.shards = 1  # its moments are rank 0's too
    assert checkpoint.slices_of(net, {net.weight: {"m": stored}}, world) == ({}, {})
    slices, places = checkpoint.slices_of(net, {net.weight: {"m": stored}}, World())
    assert places == {"weight/m": {"offset": 0, "shape": [6, 2]}}
    assert torch.equal(slices["weight/m"], stored)
    assert slices["weight/m"].data_ptr() != stored.data_ptr()
    world = World()
    world.piece = lambda tensor: (tensor[:0], 6)
    assert checkpoint.slices_of(net, {net.weight: {"m": stored}}, world) == ({}, {})
