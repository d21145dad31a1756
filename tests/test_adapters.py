"""LoRA, partial tuning and quantised bases: what is frozen stays, peft agrees, bits come back."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TUNED, documents, metrics, write_data_set
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import export
import train
from model import Linear, LLaMA, ModelConfig, trained
from plainllama.command import parse
from plainllama.files import read_json, sha256, sha256_bytes, write_json
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.weights import adapters, checkpoint, expansion, peft
from plainllama.weights.adapters import Adapter
from plainllama.weights.huggingface import load_weights, write_folder
from plainllama.weights.peft import load_model
from plainllama.weights.quantised import QUANTISED

CONFIG = TUNED
LORA = ("--init_from=out/base", "--lora_r=4")


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory):
    """A folder with data/toy and out/base, a run of eight steps."""
    home = tmp_path_factory.mktemp("base")
    write_data_set(home / "data/toy", {"train": documents(60), "val": documents(6)})
    (home / "toy.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run("--out_dir=out/base") == 0
    return home


@pytest.fixture
def home(trained_base, tmp_path, monkeypatch):
    for name in ("data", "out", "toy.py"):
        (tmp_path / name).symlink_to(trained_base / name)
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    shutil.copytree(trained_base / "out/base", tmp_path / "out/base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    """train.py in this process."""
    return train.main(parse(["toy.py", *words], "", train.Flags))


def newest(run: str) -> Path:
    return checkpoint.find_checkpoint(run)


def losses(run: str) -> list[float]:
    return [row["loss"] for row in metrics(Path(run)) if "loss" in row]


def some_ids(vocab: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(vocab, size=(2, 24)))


def test_a_run_with_an_adapter_leaves_its_base_alone_and_saves_little(home, capsys):
    before = sha256(newest("out/base") / "model.safetensors")
    first = load_model(newest("out/base"))(some_ids())
    assert run(*LORA, "--out_dir=out/a") == 0
    said = capsys.readouterr().out
    assert "learns: " in said and "adapters beside 14 matrices" in said
    folder = newest("out/a")
    assert sha256(newest("out/base") / "model.safetensors") == before
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "config.json"}
    assert not (folder / "model.safetensors").exists()
    moments = load_file(folder / "training/optimizer-00000.safetensors")
    assert {key.rpartition("/")[0].rpartition(".")[2] for key in moments} == {"lora_A", "lora_B"}
    note = Path(f"{newest('out/base')}.base")  # its own run, made longer, does not delete it
    assert note.read_text() == f"{Path('out/a').resolve()}\n"
    after = load_model(folder)(some_ids())
    assert not torch.equal(first, after)  # it has learned
    assert losses("out/a")[0] == pytest.approx(losses("out/base")[-1], abs=0.7)
    assert losses("out/a")[-1] < losses("out/a")[0]


@pytest.mark.parametrize("keys", [(), ("--frozen_dtype=nf4",), ("--frozen_dtype=int8",),
                                  ("--frozen_dtype=bf16", "--lora_dropout=0.2",
                                   "--activation_checkpointing")])
def test_killed_and_resumed_equals_whole(home, keys):
    assert run(*LORA, *keys, "--out_dir=out/whole") == 0
    assert run(*LORA, *keys, "--out_dir=out/parts", "--max_steps=8", "--max_minutes=1e-9") == 75
    while run(*LORA, *keys, "--out_dir=out/parts") != 0:
        pass
    a, b = (load_file(newest(name) / "adapter_model.safetensors")
            for name in ("out/whole", "out/parts"))
    assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def test_the_first_step_has_the_logits_of_the_base_to_the_bit(home):
    base = newest("out/base")
    plain = load_model(base)
    config = parse(["toy.py", *LORA], "", train.Flags).config
    config.vocab_size = plain.config.vocab_size
    from plainllama.training.engine import Engine
    engine = Engine(config, World(), 0, base)
    assert torch.equal(engine.model(some_ids()), plain(some_ids()))
    ids = some_ids()
    engine.model(ids[:, :-1], ids[:, 1:]).backward()
    for name, p in engine.model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == name.endswith(("lora_A", "lora_B"))
    config.lora_r, config.train_only = 0, "last:1"
    partial = Engine(config, World(), 0, base)
    assert {n.rpartition(".layers.")[2][:1] for n, _ in trained(partial.model)} == {"1"}


def test_an_adapter_is_merged_and_exported(home, capsys):
    assert run(*LORA, "--out_dir=out/a", "--lora_targets=q,v") == 0
    folder = newest("out/a")
    unmerged = attached(folder)
    ids = some_ids()
    want = unmerged(ids)
    got = load_model(folder)(ids)
    assert (want - got).abs().max() < 1e-5


def attached(folder: Path) -> LLaMA:
    """The model of an adapter, not merged."""
    base, adapter = peft.base_of(folder)
    with torch.device("meta"):
        model = LLaMA(peft.whole_config(folder))
    adapters.attach(model, adapter)
    World().place(model, torch.float32)
    load_weights(base, model, World(), True)
    peft.load_adapter(folder, model, World())
    return model.eval()


# ---- beside peft

def in_peft(folder: Path, entries: int = 0, **keys):
    """An adapter on its base, opened by transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, _ = peft.base_of(folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if entries:
        model.resize_token_embeddings(entries, mean_resizing=False)
    return PeftModel.from_pretrained(model, folder, **keys)


def made_by_peft(base: Path, folder: Path, **keys):
    """A folder that peft saved, its B not zero; the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                           LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3} | keys))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("targets", ["all", "q,v", "layers.1.mlp.up"])
def test_peft_opens_ours(home, targets):
    assert run(*LORA, "--out_dir=out/a", f"--lora_targets={targets}") == 0
    theirs = in_peft(newest("out/a"))
    ids = some_ids()
    with torch.no_grad():
        assert (theirs(ids).logits - load_model(newest("out/a"))(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("keys", [
    {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 7},
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": ["o_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"}])
def test_we_open_what_peft_saved(home, keys):
    theirs = made_by_peft(newest("out/base"), home / "theirs", **keys)
    ids = some_ids()
    with torch.no_grad():
        want = theirs(ids).logits
        assert (want - attached(home / "theirs")(ids)).abs().max() < 1e-5
        assert (want - load_model(checkpoint.find_checkpoint("theirs"))(ids)).abs().max() < 1e-5


def test_an_adapter_of_peft_without_a_tokenizer_is_sampled_and_trained_on(home):
    import sample

    made_by_peft(newest("out/base"), home / "theirs", r=4, lora_alpha=16,
                 target_modules="all-linear")
    prompts = home / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    assert sample.main(parse(["--ckpt=theirs", f"--prompts={prompts}", "--out=texts.jsonl",
                              "--max_new_tokens=2"], "", sample.Flags, takes="files")) == 0
    assert run("--init_from=theirs", "--lora_r=4", "--max_steps=1", "--out_dir=out/on") == 0


@pytest.mark.parametrize(("keys", "said"), [
    ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
    ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 5}}, "rank_pattern"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "changes the base"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}, "the end"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": {
        "embed_tokens": [3, 4], "lm_head": [3, 4]}}, "not the last"),
    ({"target_modules": ["q_proj", "lm_head"]}, "beside lm_head, which is no matrix")])
def test_what_we_do_not_compute_is_refused_by_name(home, keys, said):
    made_by_peft(newest("out/base"), home / "theirs", **keys)
    with pytest.raises(UserError, match=said):
        load_model(home / "theirs")


def test_gradients_and_a_curve_are_those_of_peft(home):
    from plainllama.training.engine import Engine

    base = newest("out/base")
    config = parse(["toy.py", *LORA, "--lora_targets=q,up", "--weight_decay=0", "--grad_clip=0"],
                   "", train.Flags).config
    config.vocab_size = load_model(base).config.vocab_size
    engine = Engine(config, World(), 0, base)
    theirs = made_by_peft(base, home / "theirs", r=4, lora_alpha=16,
                          target_modules=["q_proj", "up_proj"]).train()
    ours = dict(engine.model.named_parameters())
    learned = {peft.our_name(name.replace(".default", "")): p
               for name, p in theirs.named_parameters() if p.requires_grad}
    assert learned.keys() == {name for name, _ in trained(engine.model)}
    with torch.no_grad():
        for name, p in learned.items():
            ours[name].copy_(p)
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    for step in range(20):
        rows = torch.from_numpy(np.random.default_rng(step).integers(256, size=(8, 33)))
        x, y = rows[:, :-1], rows[:, 1:]
        loss = cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        if step == 0:
            engine.model(x, y).div(y.numel()).backward()
            for name, p in learned.items():
                assert (p.grad - ours[name].grad).abs().max() <= 1e-5 * p.grad.abs().max()
            engine.optimizer.zero_grad()
        from plainllama.tokens.rows import to_batch
        nll = engine.update(to_batch(rows.numpy(), 0, None), 1e-2, y.numel())[0].item() / y.numel()
        assert nll == pytest.approx(loss.item(), abs=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_a_pattern_is_a_part_of_a_name_and_its_numbers_are_whole():
    with torch.device("meta"):
        model = LLaMA(ModelConfig(12, 4, 32, 48, 64, 32, 2))
    first = adapters.targets_of(model, "layers.1")
    assert len(first) == 7 and all(name.startswith("model.layers.1.") for name in first)
    assert len(adapters.targets_of(model, "1.mlp")) == 3
    assert len(adapters.targets_of(model, "layers.1?.mlp.up")) == 2
    assert len(adapters.targets_of(model, "layers.[12]")) == 2 * 7
    assert len(adapters.targets_of(model, "[12].mlp")) == 2 * 3
    assert len(adapters.targets_of(model, "all")) == 7 * 12
    assert len(adapters.named(model, "layers.1")) == 9
    assert len(adapters.named(model, "norm")) == 2 * 12 + 1


# ---- a vocabulary that grows

@pytest.mark.parametrize("tied", [False, True])
def test_only_rows_of_new_tokens_learn_beside_an_adapter(home, tied):
    """A base of 256 entries gets five: its own rows stay to the bit, peft opens what was saved."""
    from plainllama.training.engine import Engine

    entries = load_model(newest("out/base")).config.vocab_size
    base = home / "small"
    with torch.device("meta"):
        small = LLaMA(ModelConfig(2, 4, 32, 48, entries, 32, 2, tie_embeddings=tied))
    World().place(small, torch.float32)
    adapters.initialise(small, 5, World().piece)
    base.mkdir()
    write_folder(base, small.config, dict(small.named_parameters()),
                 newest("out/base") / "tokenizer.json")
    config = parse(["toy.py", f"--init_from={base}", "--lora_r=2", f"--tie_embeddings={tied}"], "",
                   train.Flags).config
    config.vocab_size = entries + 5
    engine = Engine(config, World(), 0, base)
    assert engine.adapter.first_row == entries
    ids = some_ids()
    ids[:, ::3] = entries + torch.arange(8) % 5
    assert torch.equal(engine.model(some_ids())[..., :entries], small(some_ids()))
    before = engine.model.model.embed_tokens.weight[:entries].clone()
    chunks = engine.model(ids[:, :-1], ids[:, 1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.LOGITS_BYTES", 4 * 8 * (entries + 5))
        grads = torch.autograd.grad(chunks, [p for _, p in trained(engine.model)])
        again = engine.model(ids[:, :-1], ids[:, 1:])
        other = torch.autograd.grad(again, [p for _, p in trained(engine.model)])
    assert again.item() == pytest.approx(chunks.item(), rel=1e-6)
    for (name, _), a, b in zip(trained(engine.model), grads, other, strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    from plainllama.tokens.rows import to_batch
    rows = np.random.default_rng(0).integers(entries + 5, size=(8, 33))
    for _ in range(3):
        engine.update(to_batch(rows, 0, None), 1e-2, 256)
    assert torch.equal(engine.model.model.embed_tokens.weight[:entries], before)
    assert ((engine.model.lm_head.rows is engine.model.model.embed_tokens.rows) == tied)
    saved = checkpoint.save(home / "out/grown", 1, engine.model, engine.optimizer.state, {},
                            newest("out/base") / "tokenizer.json", World(), engine.adapter)
    want = engine.model.eval()(ids)
    assert (load_model(saved)(ids) - want).abs().max() < 1e-5
    assert (attached(saved)(ids) - want).abs().max() < 1e-5
    with torch.no_grad():
        assert (in_peft(saved, entries + 5)(ids).logits - want).abs().max() < 1e-5
    names = load_file(saved / "adapter_model.safetensors")
    assert sum("trainable_tokens" in name for name in names) == 2 - tied


# ---- commands, and what is refused

def test_an_adapter_is_sampled_scored_and_exported(home, checked_here, capsys):
    import eval as scoring
    import sample

    words = (*LORA, "--frozen_dtype=nf4", "--max_steps=4", "--out_dir=out/a")
    assert run(*words) == 0
    assert sample.main(parse(["--ckpt=out/a", "--prompt=x", "--max_new_tokens=4"], "",
                             sample.Flags, takes="files")) == 0
    loads = []
    with pytest.MonkeyPatch.context() as patch:
        load = peft.load_weights
        patch.setattr(peft, "load_weights", lambda *a, **k: loads.append(1) or load(*a, **k))
        assert run(*words[:-1], "--out_dir=out/b", "--seed=2") == 0
        loads.clear()
        assert scoring.main(parse(["--ckpt=out/a,out/b"], "", scoring.Flags, takes="files")) == 0
    assert len(loads) == 1  # the base, once for both
    said = capsys.readouterr().out
    assert said.count("val_loss") == 2
    assert said.index("scores of out/a") < said.index("val_loss") < said.index("scores of out/b")
    for name, flags in (("held", ()), ("own", ("--original",)), ("peft", ("--adapter",))):
        assert export.main(parse(["--ckpt=out/a", f"--to=hub/{name}", *flags], "", export.Flags,
                                 takes="files")) == 0
    said = capsys.readouterr().out
    assert said.count("tokens, merged onto the base as it was held, in nf4") == 2
    ids = some_ids()
    held, own = (load_model(home / "hub" / name)(ids) for name in ("held", "own"))
    assert (held - load_model(newest("out/a"))(ids)).abs().max() < 1e-5
    assert (held - own).abs().max() > 1e-4
    assert (load_model(home / "hub/peft")(ids) - held).abs().max() < 1e-5
    cards = {name: (home / "hub" / name / "README.md").read_text() for name in ("held", "own",
                                                                                "peft")}
    assert "this is --original" in cards["own"] and "this is the base as it" in cards["held"]
    assert "AutoPeftModelForCausalLM.from_pretrained" in cards["peft"]
    assert "--enable-lora --lora-modules peft=peft" in cards["peft"]
    assert "--merge --to=peft.gguf" in cards["peft"] and "--enable-lora" not in cards["held"]
    learned = sum(t.numel() for t in load_file(newest("out/a") / peft.WEIGHTS).values())
    assert f"adapter beside a LLaMA of {learned:,}" in cards["peft"]


def test_a_base_that_moved_or_changed(home):
    assert run(*LORA, "--max_steps=4", "--out_dir=out/a") == 0
    folder = newest("out/a")
    (home / "out/base").rename(home / "elsewhere")
    with pytest.raises(UserError, match="is not there; say where the base is now with --base"):
        load_model(folder)
    moved = newest("elsewhere")
    for place in (moved, "elsewhere", "."):  # a run, and a folder of runs
        assert load_model(folder, base=str(place)).config.n_layer == 2
    shutil.copytree("elsewhere", "a_run_before/elsewhere")  # another one, with the same step
    other = newest("a_run_before/elsewhere") / "model.safetensors"
    save_file({name: p + 1 for name, p in load_file(other).items()}, other, {"format": "pt"})
    (home / "a_run_before/elsewhere").rename(home / "aa")
    assert load_model(folder, base=".").config.n_layer == 2
    (home / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no model, and no checkpoint step_8"):
        load_model(folder, base="empty")
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="of other weights"):
        load_model(folder, base=str(moved))
    with pytest.raises(UserError, match="--base is for adapters"):
        load_model(moved, base=str(moved))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_keys_of_an_adapter_must_be_the_models(home, change):
    assert run(*LORA, "--max_steps=4", "--out_dir=out/a") == 0
    folder = newest("out/a")
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    key = min(weights)
    if change == "missing":
        del weights[key.replace("lora_A", "lora_B")]
    elif change == "unknown":
        weights[key.replace("lora_A", "lora_magnitude_vector")] = torch.zeros(3)
    else:
        weights[key] = weights[key][:, :3].contiguous()
    save_file(weights, path)
    with pytest.raises(UserError, match=change):
        load_model(folder)


@pytest.mark.parametrize(("words", "said"), [
    (("--lora_alpha=8",), "no effect without lora_r"),
    (("--lora_targets=q", "--lora_dropout=0.1"), "lora_dropout, lora_targets: no effect"),
    (("--lora_r=4", "--train_only=last:1"), "train_only has no place"),
    (("--lora_r=4", "--optimizer=muon"), "--optimizer=adamw"),
    (("--frozen_dtype=bf16",), "nothing is frozen"),
    (("--frozen_dtype=nf4", "--train_only=last:1"), "is for lora_r"),
    (("--frozen_dtype=nf4", "--lora_r=2", "--parallel=fsdp"), "not sharded"),
    (("--lora_r=2", "--lora_dropout=0.5", "--deterministic"), "lora_dropout"),
    (("--lora_r=2", "--lora_targets=query"), "'query' means no matrix of a block"),
    (("--lora_r=2", "--lora_targets=q,"), "'' means no matrix"),
    (("--lora_r=2", "--lora_targets=q,w"), "'w' means no matrix"),
    (("--lora_r=2", "--n_layer=30000", "--d_model=8192"), "say --n_layer=2 --d_model=32"),
    (("--lora_r=2", "--lora_targets=lm_head"), "means no matrix of a block"),
    (("--lora_r=-1",), "lora_r"),
    (("--lora_r=2", "--lora_alpha=0"), "lora_alpha"),
    (("--train_only=last:3",), "N from 1 to 2 blocks"),
    (("--train_only=every:0",), "N from 1 to 2 blocks"),
    (("--train_only=middle:1",), "not first:N, last:N or every:N"),
    (("--train_only=atention",), "means no parameter"),
    (("--train_only=norm,,",), "'' means no parameter"),
    (("--lora_r=2", "--frozen_dtype=fp4"), "frozen_dtype"),
    (("--init_from=out/a",), "is an adapter"),
    (("--init_from=out/a", "--lora_r=3"), "--lora_r=4"),
    (("--init_from=out/a", "--lora_r=4", "--lora_targets=q"), "--lora_targets="),
])
def test_what_does_not_fit_together_is_said_in_a_line(home, words, said):
    if "--init_from=out/a" in words:
        assert run(*LORA, "--max_steps=4", "--out_dir=out/a") == 0
    else:
        words = ("--init_from=out/base", *words)
    with pytest.raises(UserError, match=said):
        run(*words, "--out_dir=out/x")
    assert not (home / "out/x/checkpoints").exists()


def test_an_adapter_goes_on_with_other_data(home):
    assert run(*LORA, "--max_steps=4", "--out_dir=out/a") == 0
    assert run("--init_from=out/a", "--lora_r=4", "--max_steps=4", "--out_dir=out/b") == 0
    assert losses("out/b")[0] == pytest.approx(losses("out/a")[-1], abs=0.4)
    a, b = (peft.read_adapter(newest(name)) for name in ("out/a", "out/b"))
    assert a == b


@pytest.mark.parametrize(("patterns", "blocks"), [("first:1", {0}), ("last:1", {1}),
                                                  ("every:2", {1}), ("lm_head,layers.0.mlp", {0})])
def test_partial_tuning_keeps_the_rest_to_the_bit(home, patterns, blocks):
    assert run("--init_from=out/base", f"--train_only={patterns}", "--out_dir=out/p") == 0
    before, after = (load_file(newest(name) / "model.safetensors") for name in
                     ("out/base", "out/p"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {int(name.split(".")[2]) for name in moved if "layers" in name} == blocks
    assert ("lm_head.weight" in moved) == ("lm_head" in patterns)
    moments = load_file(newest("out/p") / "training/optimizer-00000.safetensors")
    assert {key.rpartition("/")[0] for key in moments} == moved


def test_a_full_rank_adapter_starts_where_its_merged_model_starts(home, monkeypatch):
    """Training goes on from the adapter's folder and from its export with the same first loss."""
    assert run(*LORA, "--max_steps=4", "--out_dir=out/a", "--lora_r=32") == 0
    monkeypatch.setattr(export, "compare_with_transformers", lambda *_: "")
    assert export.main(parse(["--ckpt=out/a", "--to=merged"], "", export.Flags, takes="files")) == 0
    shutil.copy(newest("out/base") / "tokenizer.json", home / "merged")
    words = ("--max_steps=1", "--warmup_steps=0")
    assert run("--init_from=out/a", "--lora_r=32", *words, "--out_dir=out/on") == 0
    assert run("--init_from=merged", *words, "--out_dir=out/whole") == 0
    assert losses("out/on")[0] == pytest.approx(losses("out/whole")[0], abs=1e-5)


def test_memory_is_reckoned_as_torch_counts_it(home):
    """What is held is the tensors' bytes; an adapter needs less than half of all weights' run."""
    from plainllama.training.memory import reckon

    shape = {"n_layer": 4, "d_model": 256, "d_ff": 688, "n_head": 4, "vocab_size": 1000,
             "block_size": 64, "optimizer": "adamw"}
    whole = reckon(Settings(**shape), 1, torch.float32)
    lora = reckon(Settings(**shape, lora_r=4, frozen_dtype="nf4"), 1, torch.float32)
    weights = whole["weights"] - 2 * 64 * 64 * 4  # without the tables of RoPE
    assert whole["gradients"] == weights and 2 * weights <= whole["moments"] < 2 * weights + 400
    assert lora["weights"] < 0.35 * weights and lora["moments"] < 0.1 * whole["moments"]
    assert lora["activations"] > 0 and sum(lora.values()) < 0.5 * sum(whole.values())


@pytest.mark.parametrize("keys", [(*LORA, "--lora_targets=q,down"), (*LORA, "--frozen_dtype=nf4"),
                                  (*LORA, "--frozen_dtype=bf16"),
                                  ("--init_from=out/base", "--train_only=last:1"),
                                  ("--init_from=out/base", "--train_only=norm")])
def test_check_holds_for_what_is_partly_frozen(home, keys, capsys):
    assert run(*keys, "--check", "--out_dir=out/x") == 0
    said = capsys.readouterr().out
    assert "learns: " in said and "memory reckoned for 4 rows" in said
    assert ("  q_proj of all blocks\n" in said) == ("--lora_r=4" in keys)
    assert not (home / "out/x").exists()


def test_what_an_adapter_or_a_part_cannot_learn_is_refused(home):
    from plainllama.training.engine import Engine

    with pytest.raises(UserError, match="no folder out/nowhere"):
        run("--init_from=out/nowhere", "--lora_r=4", "--out_dir=out/x")
    with pytest.raises(UserError, match="say --init_from=MODEL"):
        run("--lora_r=4", "--out_dir=out/x")
    with pytest.raises(UserError, match="would round"):
        run("--init_from=out/base", "--train_only=last:1", "--frozen_dtype=bf16", "--out_dir=out/x")
    assert run(*LORA, "--max_steps=1", "--out_dir=out/a") == 0
    config = parse(["toy.py", *LORA], "", train.Flags).config
    config.vocab_size = load_model(newest("out/a")).config.vocab_size + 5
    with pytest.raises(UserError, match=r"an adapter that knows \d+ entries"):
        Engine(config, World(), 0, newest("out/a"))
    from plainllama.training.resume import refuse_other_part
    config.lora_r, config.train_only = 0, "last:1"
    with pytest.raises(UserError, match="freezes the rows of new tokens"):
        refuse_other_part(newest("out/base"), config)


def test_adapters_of_other_shapes_do_not_share_a_base(home):
    assert run(*LORA, "--max_steps=1", "--out_dir=out/a") == 0
    assert run(*LORA, "--max_steps=1", "--out_dir=out/b", "--rope_scaling=linear",
               "--rope_factor=4", "--block_size=64", "--global_batch_tokens=256") == 0
    kept: dict = {}
    ids = some_ids()
    for name in ("out/a", "out/b", "out/a"):
        assert (load_model(newest(name), kept=kept)(ids) - load_model(newest(name))(ids)
                ).abs().max() < 1e-5
    assert len(kept) == 1


def test_a_run_goes_on_when_its_base_has_moved(home):
    words = (*LORA[1:], "--out_dir=out/a")
    assert run("--init_from=out/base", *words, "--max_minutes=1e-9") == 75
    with pytest.raises(UserError, match="say --init_from=out/base, or choose another out_dir"):
        run("--init_from=out/other", *words)
    (home / "out/base").rename(home / "elsewhere")
    with pytest.raises(UserError, match=r"to train\.py with --init_from=FOLDER"):
        run("--init_from=out/base", *words)
    while (code := run("--init_from=elsewhere", *words)) == 75:
        pass
    assert code == 0
    assert checkpoint.find_checkpoint("out/a").name == "step_8"


def test_a_project_that_moved_goes_on(home, monkeypatch):
    words = (*LORA, "--out_dir=out/a")
    assert run(*words, "--max_minutes=1e-9") == 75
    moved = home / "moved"
    shutil.copytree(home / "out", moved / "out")
    (moved / "data").symlink_to(home / "data")
    (moved / "toy.py").symlink_to(home / "toy.py")
    shutil.rmtree(home / "out")
    monkeypatch.chdir(moved)
    while run(*words):
        pass
    assert read_json(newest("out/a") / "base.json")["path"].startswith(str(moved))


# ---- the pieces by direct calls, without a run

def small(**changes) -> LLaMA:
    """A model of two blocks with its first weights."""
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 64,
             "vocab_size": 264, "block_size": 32}
    model = expansion.outline(ModelConfig(**{**shape, **changes}))
    adapters.initialise(model, 0, World().piece)
    return model


Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("kind", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapted_map_is_its_formula(kind, r, dropout):
    source = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False)
    linear.weight.data.normal_(generator=source)
    one = adapters.AdaptedLinear(linear, kind, r, 6.0, dropout)
    held = linear.weight.detach()
    if kind != "fp32":
        to, back = QUANTISED[kind]
        held = back(to(held), (48, 64), torch.float32)
        assert one.weight is None
    assert (one.in_features, one.out_features, one.factor) == (64, 48, 6.0 / r if r else 0.0)
    assert set(one.state_dict()) == ({"lora_A", "lora_B"} if r else set()) | (
        {"weight"} if kind == "fp32" else set())
    assert one.matrix().equal(held) and one.matrix(torch.bfloat16).equal(held.bfloat16())
    if r:
        one.lora_A.data.normal_(generator=source), one.lora_B.data.normal_(generator=source)
        whole = held + 2.0 * one.lora_B @ one.lora_A
    else:
        whole = held
    assert torch.allclose(one.merged(), whole, atol=1e-5)
    for shape in ((64,), (5, 64), (2, 3, 64))[1 - (r == 0):]:
        x = torch.randn(shape, generator=source)
        assert torch.allclose(one.eval()(x), x @ whole.T, atol=1e-3)
        torch.manual_seed(5)
        found = one.train()(x)
        torch.manual_seed(5)
        dropped = torch.nn.functional.dropout(x, dropout) if dropout else x
        wanted = x @ held.T + (2.0 * dropped @ one.lora_A.T @ one.lora_B.T if r else 0)
        assert torch.allclose(found, wanted, atol=1e-3)
    plainly = adapters.AdaptedLinear(linear, "fp32")
    assert (plainly.r, plainly.factor, plainly.dropout) == (0, 0.0, 0.0)


def test_slopes_of_an_adapted_map_are_those_of_its_formula():
    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=source)

    source = torch.Generator().manual_seed(0)
    x, weight, a, b = drawn(2, 3, 5), drawn(4, 5), drawn(2, 5), drawn(4, 2)
    for needed in (True, False):
        given = x.requires_grad_(needed), weight, a.requires_grad_(), b.requires_grad_(), 0.7
        assert torch.autograd.gradcheck(adapters.Adapted.apply, given)


def test_rows_of_a_grown_vocabulary():
    model = small()
    adapters.attach(model, adapters.Adapter(2, 4.0, 0.0, (Q,), first_row=260))
    ends = model.model.embed_tokens, model.lm_head
    ids, x = torch.tensor([[0, 259, 260, 263]]), torch.randn(2, 3, 32)
    for end in ends:
        assert (end.first, end.rows.shape) == (260, (4, 32))
        end.rows.data.normal_()
    whole = [torch.cat([end.weight[:260], end.rows]).detach() for end in ends]
    assert ends[0](ids).equal(whole[0][ids])
    assert torch.allclose(ends[1](x), x @ whole[1].T, atol=1e-5)
    ends[1].weight.data = ends[1].weight.data.bfloat16()
    matrix, rows = ends[1].parts(torch.float32)  # what is held in bf16 may not round the rows
    assert matrix.dtype == torch.float32 and matrix[260:].equal(rows) and len(matrix) == 264
    for held, dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32),
                        (torch.float32, torch.bfloat16)):
        ends[1].weight.data = ends[1].weight.data.to(held)
        matrix, rows = ends[1].parts(dtype)
        assert matrix is ends[1].weight and rows is ends[1].rows
        assert matrix[260:].equal(rows.to(held))
    tied = small(tie_embeddings=True)
    adapters.grow(tied, 260)
    assert tied.lm_head.rows is tied.model.embed_tokens.rows


MEANT = ("there are first:N, last:N, every:N, and parts of names, of two letters or more: "
         "down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, "
         "post_attention_layernorm, q_proj, up_proj, v_proj")


def test_which_parameters_an_item_means():
    model = small(n_layer=4)
    names = [name for name, _ in model.named_parameters()]
    for pattern, blocks in (("first:1", [0]), ("first:4", [0, 1, 2, 3]), ("last:1", [3]),
                            ("last:4", [0, 1, 2, 3]), ("every:1", [0, 1, 2, 3]),
                            ("every:2", [1, 3]), ("every:3", [2]), ("every:4", [3])):
        assert adapters.named(model, pattern) == {
            name for name in names if name.startswith("model.layers.")
            and int(name.split(".")[2]) in blocks}, pattern
    for pattern in ("first:0", "first:5", "last:5", "every:5", "every:0", "middle:1", "first:",
                    "last:-1", "every:1.5"):
        with pytest.raises(UserError) as caught:
            adapters.named(model, pattern)
        assert str(caught.value) == (f"train_only: {pattern!r} is not first:N, last:N or every:N "
                                     "with N from 1 to 4 blocks")
    for pattern in ("q", "", "nothing"):
        with pytest.raises(UserError) as caught:
            adapters.named(model, pattern)
        assert str(caught.value) == f"train_only: {pattern!r} means no parameter; {MEANT}"
    adapters.freeze(model, Settings(train_only=" lm_head , layers.1.mlp.up", frozen_dtype="bf16"))
    assert {name for name, _ in trained(model)} == {"lm_head.weight",
                                                    "model.layers.1.mlp.up_proj.weight"}
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in names if "norm" in name or name in dict(trained(model))}
    other = small()
    adapters.freeze(other, Settings(frozen_dtype="bf16"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in other.parameters())


def test_parts_of_names():
    names = ["a.1.qq.w", "a.11.qq.w", "a.2.kq.w", "b.12", "norm"]
    for pattern, found in (("a.1", [0]), ("1", []), ("11", [1]), ("12", [3]), ("qq", [0, 1]),
                           ("q", []), ("?q.w", [0, 1, 2]), ("[12].qq", [0]), ("a.[12]", [0, 2]),
                           ("a.?", [0, 2]), (".1?", [0, 1, 3]), ("no*m", [4]), ("b.1", []),
                           ("", [])):
        assert adapters.parts_of(names, pattern) == {names[i] for i in found}, pattern


def test_which_matrices_are_targets():
    model = small()
    every = adapters.targets_of(model, "all")
    assert len(every) == 14 and every[0] == "model.layers.0.self_attn.q_proj"
    assert adapters.targets_of(model, "v, q_proj") == tuple(
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj"))
    assert adapters.targets_of(model, "layers.0.,down") == (*every[:7], every[13])
    for wanted, item, hint in (("q,querry", "querry", ""), ("gat", None, ""),
                               ("gaet", "gaet", "; did you mean gate?"), ("norm", "norm", "")):
        if item is None:
            assert len(adapters.targets_of(model, wanted)) == 2
            continue
        with pytest.raises(UserError) as caught:
            adapters.targets_of(model, wanted)
        assert str(caught.value) == (
            f"lora_targets: {item!r} means no matrix of a block{hint}; there are all, q, k, v, o, "
            "gate, up, down, or a part of a name such as 'layers.0.'")


@pytest.mark.parametrize(("dtype", "dropout", "first"), [
    ("fp32", 0.0, 0), ("bf16", 0.1, 0), ("int8", 0.0, 260), ("nf4", 0.5, 0)])
def test_what_is_attached_learns_and_the_rest_is_frozen(dtype, dropout, first):
    model = small()
    with pytest.raises(UserError) as caught:
        adapters.attach(model, adapters.Adapter(2, 4.0, 0.0, (Q, "lm_head", "model.x")))
    assert str(caught.value) == ("the adapter stands beside lm_head, which is no matrix of a block "
                                 "of this base")
    assert len(list(trained(model))) == 21
    adapters.attach(model, adapters.Adapter(2, 4.0, dropout, (Q, DOWN), dtype, first))
    learns = {f"{name}.lora_{part}" for name in (Q, DOWN) for part in "AB"}
    learns |= {"model.embed_tokens.rows", "lm_head.rows"} if first else set()
    assert {name for name, _ in trained(model)} == learns
    assert {block.random for block in model.model.layers} == {bool(dropout)}
    held = {name for name, _ in adapters.quantised(model)}
    assert held == (set(adapters.targets_of(model, "all")) if dtype in QUANTISED else set())
    for name, p in model.named_parameters():
        low = dtype != "fp32" and p.dim() > 1 and name not in learns
        assert p.dtype == (torch.bfloat16 if low else torch.float32), name
    one = model.get_submodule(Q)
    assert (one.r, one.factor, one.dropout) == (2, 2.0, dropout)
    names = {name for name, _ in small().named_parameters()}
    assert set(adapters.base_weights(model)) == names
    total = sum(p.numel() for p in small().parameters())
    rows = 2 * 4 * 32 if first else 0
    lora = 2 * (32 + 32) + 2 * (64 + 32)
    inner = total - 2 * 264 * 32
    assert adapters.parameter_counts(model) == (total + rows + lora, inner + rows + lora,
                                                rows + lora)
    new = " and 4 new entries" if first else ""
    assert adapters.summary(model, adapters.Adapter(2, 4.0, dropout, (Q, DOWN), dtype, first),
                            dtype) == (
        f"learns: {rows + lora:,} of {total + rows + lora:,} weights "
        f"({(rows + lora) / (total + rows + lora):.2%}), adapters beside 2 matrices (down_proj, "
        f"q_proj){new}; the rest is frozen, {dtype}")


def test_summaries_and_counts():
    model = small(tie_embeddings=True)
    total = sum(p.numel() for p in model.parameters())
    assert adapters.parameter_counts(model) == (total, total - 264 * 32, total)
    assert adapters.summary(model, None, "fp32") == ""
    adapters.freeze(model, Settings(train_only="norm"))
    assert adapters.summary(model, None, "bf16") == (
        f"learns: 160 of {total:,} weights ({160 / total:.2%}), 5 parameters, from "
        "model.layers.0.input_layernorm.weight to model.norm.weight; the rest is frozen, bf16")
    for first, new in ((0, ""), (260, " and 4 new entries")):
        grown = small(n_layer=4, expand="concat", expand_blocks=2, first_row=first)
        for name, p in grown.named_parameters():
            p.requires_grad_(".expansion." in name)
        assert f"), copies of the blocks 1, 3 (concat){new}; the rest is frozen, fp32" in (
            adapters.summary(grown, None, "fp32"))
        copies = {name for name, _ in trained(grown)}
        assert copies and not copies & set(adapters.base_weights(grown))
        assert copies < set(adapters.base_weights(grown, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_what_is_merged_is_a_plain_model(kind, dtype):
    model = small()
    adapters.attach(model, adapters.Adapter(2, 4.0, 0.0, (Q, DOWN), kind, 260))
    for _, p in trained(model):
        p.data.normal_(std=0.1)
    whole = {name: model.get_submodule(name).merged() for name in (Q, DOWN)}
    rows = [end.rows.detach().clone() for end in (model.model.embed_tokens, model.lm_head)]
    wanted = model(some_ids())
    assert adapters.merge(model, dtype) is model
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in small().named_parameters()]
    assert type(model.get_submodule(Q)) is type(model.lm_head) is Linear
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    for name, matrix in whole.items():
        assert model.get_parameter(f"{name}.weight").equal(matrix.to(dtype))
    assert model.model.norm.weight.dtype == torch.float32
    other = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert other.dtype == (torch.bfloat16 if dtype == torch.bfloat16 and kind != "fp32"
                           else torch.float32)
    for end, new in zip((model.model.embed_tokens, model.lm_head), rows, strict=True):
        assert end.weight.dtype == torch.float32 and end.weight[260:].equal(new)
    if dtype == torch.float32:
        assert (model(some_ids()) - wanted).abs().max() < 1e-4


def test_first_weights_are_drawn_as_said():
    """Each by its name, with the deviation of its kind."""
    config = ModelConfig(4, 4, 4096, 64, 264, 32)
    tied = ModelConfig(4, 4, 4096, 64, 264, 32, tie_embeddings=True)
    narrow = ModelConfig(4, 4, 64, 64, 264, 32, tie_embeddings=True)

    def source(name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"7/{name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") // 2)

    def first(name, shape, config=config):
        return adapters.initial_weight(name, torch.Size(shape), config, 7)

    layer = "model.layers.3."
    for name, std, which in (
            (f"{layer}self_attn.q_proj.weight", 0.02, config),
            (f"{layer}self_attn.o_proj.weight", 0.02 / 8**0.5, config),
            ("model.layers.0.mlp.down_proj.weight", 0.02 / 2**0.5, config),
            (f"{layer}mlp.up_proj.weight", 0.02, tied),
            ("lm_head.weight", 0.4 / 64, config), ("lm_head.weight", 0.02, narrow),
            ("model.embed_tokens.weight", 0.02, config),
            ("model.embed_tokens.weight", 2 / 4096, tied),
            ("model.embed_tokens.weight", 0.02, narrow)):
        wanted = torch.empty(5, 6).normal_(0.0, std, generator=source(name))
        assert torch.allclose(first(name, (5, 6), which), wanted, rtol=1e-6), name
    assert first("model.norm.weight", (3,)).tolist() == [1, 1, 1]
    assert first(f"{layer}input_layernorm.weight", (2,)).tolist() == [1, 1]
    for name in (f"{layer}expansion.mlp.up_proj.weight", f"{layer}mlp.up_proj.lora_B"):
        assert not first(name, (2, 3)).any()
    name = f"{layer}mlp.up_proj.lora_A"
    wanted = torch.empty(2, 9).uniform_(-1, 1, generator=source(name)) / 3
    assert first(name, (2, 9)).equal(wanted)
    whole = first("lm_head.weight", (264, 4096))
    assert first("lm_head.rows", (4, 4096)).equal(whole[260:])
    with pytest.raises(ValueError, match=r"^no rule initialises model\.x$"):
        first("model.x", (2, 2))
    model, ones = small(), small()
    for p in ones.parameters():
        p.data.fill_(5)
    adapters.initialise(ones, 0, lambda tensor: (tensor[1:3], 1), ("q_proj.weight", "norm.weight"))
    for name, p in ones.named_parameters():
        if name.endswith(("q_proj.weight", "norm.weight")):
            assert p[1:3].equal(model.get_parameter(name)[1:3]) and (p[3:] == 5).all()
        else:
            assert (p == 5).all()
    adapters.shrink(ones.requires_grad_(False), "int8")
    adapters.hold_first_weights(ones, 0)
    to, back = QUANTISED["int8"]
    for name, module in adapters.quantised(ones):
        weight = model.get_parameter(f"{name}.weight").detach()
        assert module.matrix().equal(back(to(weight), tuple(weight.shape), torch.float32))


# ---- adapters on disk by direct calls

@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A folder with base/ and adapter/, of q_proj in both blocks."""
    monkeypatch.chdir(tmp_path)
    model = small(vocab_size=258)
    (tmp_path / "words").mkdir()
    make_tokenizer("bytes").save(tmp_path / "words")
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    write_folder(tmp_path / "base", model.config, dict(model.named_parameters()),
                 tmp_path / "words" / "tokenizer.json")
    save(tmp_path)
    return tmp_path


def save(home: Path, vocab: int = 258, **changes) -> adapters.Adapter:
    """Write adapter/ anew."""
    made = Adapter(**{"r": 2, "alpha": 4.0, "dropout": 0.25, "targets": (
        "model.layers.0.self_attn.q_proj", Q), "frozen_dtype": "fp32", "first_row": 0,
        "base": str(home / "base"), "sha256": sha256(home / "base/model.safetensors"), **changes})
    weights = {}
    for name in made.targets:
        weights |= {f"{name}.lora_A": torch.ones(made.r, 32),
                    f"{name}.lora_B": torch.ones(32, made.r)}
    if made.first_row:
        for name in ("model.embed_tokens", "lm_head"):
            weights[f"{name}.rows"] = torch.ones(vocab - made.first_row, 32)
    peft.write_adapter(home / "adapter", weights, made,
                       replace(small().config, vocab_size=vocab))
    write_json(home / "adapter/config.json", read_json(home / "base/config.json") | {
        "vocab_size": vocab})
    return made


def test_what_an_adapter_s_folder_says(disk):
    file = disk / "adapter/adapter_config.json"
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
             "base_model_name_or_path": str(disk / "base"), "r": 2, "lora_alpha": 4.0,
             "lora_dropout": 0.25, "target_modules": ["q_proj"], "trainable_token_indices": None}
    assert read_json(file) == known
    assert read_json(disk / "adapter/base.json") == {
        "format": 1, "path": str(disk / "base"), "sha256": sha256(disk / "base/model.safetensors"),
        "frozen_dtype": "fp32"}
    assert set(load_file(disk / "adapter/adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{part}.weight"
        for i in (0, 1) for part in "AB"}
    assert peft.read_adapter(disk / "adapter") == save(disk)
    made = save(disk, 261, first_row=258, targets=(Q, DOWN), frozen_dtype="nf4", sha256="")
    assert peft.read_adapter(disk / "adapter") == replace(made, targets=tuple(sorted(made.targets)))
    found = read_json(file)
    assert found["target_modules"] == [Q, DOWN]
    assert found["trainable_token_indices"] == {name: [258, 259, 260] for name in ("embed_tokens",
                                                                                   "lm_head")}
    config = replace(small().config, vocab_size=261, tie_embeddings=True)
    peft.write_adapter(disk / "adapter", {"lm_head.rows": torch.ones(3, 2)}, made, config)
    assert read_json(file)["trainable_token_indices"] == [258, 259, 260]
    for ours, theirs in ((f"{Q}.lora_A", f"base_model.model.{Q}.lora_A.weight"),
                         ("lm_head.rows", "base_model.model.lm_head.token_adapter."
                          "trainable_tokens_delta")):
        assert (peft.peft_name(ours), peft.our_name(theirs)) == (theirs, ours)


@pytest.mark.parametrize(("changes", "reads"), [
    ({"use_dora": False, "rank_pattern": {}, "loftq_config": None}, {}), ({"bias": None}, {}),
    ({"init_lora_weights": True}, {}), ({"init_lora_weights": "gaussian"}, {}),
    ({"r": 1}, {"r": 1}), ({"use_rslora": True, "r": 4}, {"r": 4, "alpha": 8.0}),
    ({"lora_dropout": None}, {"dropout": 0.0}), ({"lora_dropout": 0.5}, {"dropout": 0.5}),
    ({"trainable_token_indices": []}, {}),
    ({"trainable_token_indices": [259, 258, 260]}, {"first_row": 258}),
    ({"trainable_token_indices": {"embed_tokens": [258], "lm_head": [258]}}, {"first_row": 258})])
def test_what_of_peft_s_keys_is_read(disk, changes, reads):
    known = peft.read_adapter(disk / "adapter")
    file = disk / "adapter/adapter_config.json"
    write_json(file, read_json(file) | changes)
    assert peft.read_adapter(disk / "adapter") == replace(known, **reads)
    (disk / "adapter/base.json").unlink()
    assert peft.read_adapter(disk / "adapter") == replace(known, **reads, sha256="")
    write_json(file, read_json(file) | {"base_model_name_or_path": None})
    assert peft.read_adapter(disk / "adapter").base == ""


PLAIN = "only plain LoRA can be read, with rsLoRA or without; this asks for "
LORA_KEYS = "is not the config of a LoRA: "


@pytest.mark.parametrize(("changes", "says"), [
    ({"use_dora": True, "alpha_pattern": {"a": 1}}, f": {PLAIN}alpha_pattern, use_dora"),
    ({"bias": "all"}, f": {PLAIN}bias"), ({"peft_type": "IA3"}, f": {PLAIN}peft_type 'IA3'"),
    ({"peft_type": None}, f": {PLAIN}peft_type None"),
    ({"init_lora_weights": "pissa"}, f": {PLAIN}init_lora_weights=pissa, which changes the base"),
    ({"r": 0}, f" {LORA_KEYS}ValueError('r 0 with 2 targets')"),
    ({"r": "x"}, f" {LORA_KEYS}ValueError(\"invalid literal for int() with base 10: 'x'\")"),
    ({"r": None}, f" {LORA_KEYS}TypeError"),
    *(({"trainable_token_indices": ids},
       f" {LORA_KEYS}ValueError('trainable_token_indices are not the new rows at the end')")
      for ids in ([258, 260], {"embed_tokens": [258, 259], "lm_head": [258, 260]},
                  {"embed_tokens": [258], "lm_head": [259]})),
    ({"trainable_token_indices": 5}, f" {LORA_KEYS}TypeError"),
    ({"trainable_token_indices": {}}, "")])
def test_what_of_peft_s_keys_is_refused(disk, changes, says):
    file = disk / "adapter/adapter_config.json"
    write_json(file, read_json(file) | changes)
    if not says:
        assert peft.read_adapter(disk / "adapter").first_row == 0
        return
    with pytest.raises(UserError) as caught:
        peft.read_adapter(disk / "adapter")
    assert str(caught.value).startswith(f"{disk / 'adapter/adapter_config.json'}{says}")


def test_folders_that_are_no_whole_adapter(disk):
    weights = load_file(disk / "adapter/adapter_model.safetensors")
    save_file({name: w for name, w in weights.items() if "lora_B" in name},
              disk / "adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match="'r 2 with 0 targets'"):
        peft.read_adapter(disk / "adapter")
    (disk / "adapter/adapter_model.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"the adapter's weights cannot be read: .*; copy it again"):
        peft.read_adapter(disk / "adapter")
    write_json(disk / "adapter/base.json", {"format": 2})
    with pytest.raises(UserError, match=r"base.json has format 2, not 1; use the plainllama that"):
        peft.read_adapter(disk / "adapter")
    assert peft.is_adapter(disk / "adapter") and not peft.is_adapter(disk / "base")


def test_where_a_base_is_found(disk):
    folder, base = disk / "adapter", disk / "base"

    def refused(message, moved="", **changes):
        save(disk, 261 if changes.get("first_row") else 258, **changes)
        with pytest.raises(UserError) as caught:
            peft.base_of(folder, moved)
        assert str(caught.value) == message

    where = ("; say where the base is now with --base=FOLDER, to train.py with "
             "--init_from=FOLDER")
    assert peft.base_of(folder) == (base, save(disk)) and peft.base_of(folder, "base")[0] == Path(
        "base")
    refused(f"{folder} is an adapter of the model gone; gone is not there{where}", base="gone")
    refused(f"{folder} is an adapter of the model (none); (none) is not there{where}", base="")
    refused(f"{folder} is an adapter of the model {base}; nowhere is not there{where}", "nowhere")
    refused(f"{folder} is an adapter of the model {base}; words holds no model, and no checkpoint "
            f"base{where}", "words")
    refused(f"{folder} is an adapter of the model words; words is not there{where}", base="words")
    refused(f"{folder} is an adapter of other weights than those in {base}; say where its base is "
            "with --base=FOLDER", sha256="x")
    refused(f"{folder} learned the vocabulary from entry 259 on, {base} has only 258: they do not "
            "belong together", first_row=259)
    save(disk, 261, first_row=258, sha256="")
    assert peft.base_of(folder)[0] == base
    # by the name of its checkpoint, in a run or a folder of runs; by its hash among several
    made = save(disk, base="there/base")
    shutil.copytree(base, "runs/a/checkpoints/base")
    shutil.copytree(base, "runs/a/checkpoints/other")
    assert peft.base_of(folder, "runs")[0] == Path("runs/a/checkpoints/base")
    assert peft.base_of(folder, "runs/a")[0] == Path("runs/a/checkpoints/base")
    shutil.copytree(base, "runs/b/checkpoints/base")
    changed = load_file("runs/b/checkpoints/base/model.safetensors")
    changed["model.norm.weight"] += 1
    for wrong, right in (("b", "a"), ("a", "b")):
        shutil.copy(base / "model.safetensors", f"runs/{right}/checkpoints/base/model.safetensors")
        save_file(changed, f"runs/{wrong}/checkpoints/base/model.safetensors")
        peft.hashed.cache_clear()
        assert peft.found_in(Path("runs"), made) == Path(f"runs/{right}/checkpoints/base")
    with pytest.raises(UserError) as caught:
        peft.found_in(Path("runs"), replace(made, sha256=""))
    assert str(caught.value) == (
        "runs holds 2 models base, and nothing says which is the adapter's base; name one of "
        "runs/a/checkpoints/base, runs/b/checkpoints/base")
    assert peft.found_in(Path("runs/a"), replace(made, sha256="")) is not None
    assert peft.found_in(Path("words"), made) is None and peft.found_in(folder, made) is None
    assert peft.lost_its_base(folder) and not peft.lost_its_base(base)
    assert peft.moved_base(made, Settings(init_from="runs")) == "runs/b/checkpoints/base"
    assert peft.moved_base(made, Settings(init_from="words")) == ""
    save(disk, base="there/base", sha256="")
    assert not peft.lost_its_base(folder)
    assert not peft.lost_its_base(folder) and peft.moved_base(save(disk), Settings(
        init_from="nowhere")) == ""
    assert not peft.lost_its_base(folder)


def test_hashes_of_models(disk, tmp_path):
    base, folder = disk / "base", disk / "adapter"
    one = peft.weights_sha256(base)
    assert one == sha256(base / "model.safetensors")
    (tmp_path / "shards").mkdir()
    model = load_model(base)
    write_folder(tmp_path / "shards", model.config, dict(model.named_parameters()),
                 disk / "words/tokenizer.json", shard_bytes=60_000)
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(names) > 1 and peft.weights_sha256(tmp_path / "shards") == sha256_bytes("".join(
        f"{sha256(tmp_path / 'shards' / name)}  {name}\n" for name in names).encode())
    files = [base / "config.json", base / "tokenizer.json"]
    assert peft.model_sha256(base) == sha256_bytes((one + "".join(map(sha256, files))).encode())
    there = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors",
                                        "config.json")]
    assert peft.model_sha256(folder) == sha256_bytes(
        (one + "".join(map(sha256, [*there, *files]))).encode())
    (folder / "checksums.json").write_text("{}")
    assert peft.model_sha256(folder) == sha256_bytes(sha256(folder / "checksums.json").encode())


def test_the_model_that_an_adapter_makes(disk, capsys):
    folder, base = disk / "adapter", disk / "base"
    assert peft.whole_config(base) == peft.whole_config(folder) == load_model(base).config
    assert peft.tokenizer_folder(folder) == base and peft.tokenizer_folder(base) == base
    (folder / "config.json").unlink()
    assert peft.whole_config(folder).vocab_size == 258
    for vocab in (259, 261):
        save(disk, vocab, first_row=258)
        assert peft.whole_config(folder).vocab_size == vocab
        (folder / "config.json").unlink()
        assert peft.whole_config(folder).vocab_size == vocab
    save(disk, 261, first_row=250)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vocab_size": 262})
    with pytest.raises(UserError, match="trainable_token_indices are not the last of the vocabul"):
        peft.whole_config(folder)
    save(disk)
    capsys.readouterr()
    model, plain = load_model(folder), load_model(base)
    assert capsys.readouterr().out == ""
    changed = plain.get_parameter(f"{Q}.weight") + 2 * 2  # alpha / r times ones (32, 2) (2, 32)
    assert torch.allclose(model.get_parameter(f"{Q}.weight"), changed, atol=1e-6)
    assert model.get_parameter(f"{DOWN}.weight").equal(plain.get_parameter(f"{DOWN}.weight"))
    low = load_model(folder, dtype=torch.bfloat16)
    assert low.lm_head.weight.dtype == low.get_parameter(f"{Q}.weight").dtype == torch.bfloat16
    assert low.model.norm.weight.dtype == torch.float32 and not low.training
    save(disk, frozen_dtype="nf4", sha256="")
    held = load_model(folder)
    assert capsys.readouterr().out == (f"{folder} does not say which weights of {base} it belongs "
                                       "to: not checked\n")
    assert any(adapters.quantised(held)) and not any(adapters.quantised(load_model(folder,
                                                                                   original=True)))
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert peft.tokenizer_folder(folder) == folder
    kept: dict = {}
    first = load_model(folder, kept=kept)
    assert list(kept.values()) == [first] and load_model(folder, kept=kept) is first
    save(disk, dropout=0.0)  # which does not matter here, as the frozen_dtype does
    second = load_model(folder, kept=kept)
    assert second is not first and list(kept.values()) == [second]
    save(disk, dropout=0.5)
    assert load_model(folder, kept=kept) is second
    assert isinstance(second.get_submodule(Q), adapters.AdaptedLinear)  # not merged
    with pytest.raises(UserError, match=r"^--base is for adapters; .*base is a whole model$"):
        load_model(base, base="x")
    assert load_model(folder, base="base").config == plain.config


@pytest.mark.parametrize(("change", "says"), [
    ({f"{Q}.lora_B": None}, f"1 missing weights of the adapter, the first is {Q}.lora_B"),
    ({f"{Q}.lora_A": None, f"{Q}.lora_B": None}, ""),
    ({f"{Q}.lora_magnitude": torch.ones(2), "x.y": torch.ones(1)},
     f"2 unknown weights of the adapter, the first is {Q}.lora_magnitude"),
    ({f"{Q}.lora_B": torch.ones(32, 3)}, f"{Q}.lora_B has shape [32, 3], [32, 2] is asked for")])
def test_weights_that_are_not_the_adapter_s(disk, change, says):
    weights = {f"{name}.lora_{part}": torch.ones((2, 32) if part == "A" else (32, 2))
               for name in ("model.layers.0.self_attn.q_proj", Q) for part in "AB"}
    weights = {name: w for name, w in (weights | change).items() if w is not None}
    save_file({peft.peft_name(name): w for name, w in weights.items()},
              disk / "adapter/adapter_model.safetensors")
    if not says:  # a target less
        assert len(peft.read_adapter(disk / "adapter").targets) == 1
        return
    with pytest.raises(UserError) as caught:
        load_model(disk / "adapter")
    assert str(caught.value) == f"{disk / 'adapter'}: {says}"


def test_what_a_run_s_adapter_is(disk):
    base, folder, model = disk / "base", disk / "adapter", small(vocab_size=258)

    def made(source, **changes):
        keys = {"lora_r": 2, "lora_alpha": 4.0, "lora_targets": "q", "vocab_size": 258}
        return peft.adapter_for(model, Settings(**{**keys, **changes}), source)

    def refused(source, message, **changes):
        with pytest.raises(UserError) as caught:
            made(source, **changes)
        assert str(caught.value) == message

    known = save(disk)
    fresh = Adapter(2, 4.0, 0.0, known.targets, "fp32")
    assert made(None, lora_r=0) is made(base, lora_r=0) is None
    assert made(None) == fresh
    assert made(base) == replace(fresh, base=str(base.resolve()), sha256=known.sha256)
    assert made(base, vocab_size=261).first_row == 258
    assert made(folder, lora_dropout=0.5) == replace(known, dropout=0.5, base=str(base.resolve()))
    merge = f"python export.py --ckpt {folder} --merge --to DIR"
    refused(folder, f"{folder} is an adapter: train it on with its own --lora_r, or make a model "
            f"of it first: {merge}", lora_r=0)
    other = f"{folder} is another adapter than the config's; to go on with it say "
    refused(folder, f"{other}--lora_r=2 --lora_alpha=4.0", lora_r=3, lora_alpha=5.0)
    refused(folder, f"{other}--frozen_dtype=fp32", frozen_dtype="nf4")
    refused(folder, f"{other}--lora_targets=q_proj", lora_targets="v")
    grown = (f"{folder} is an adapter that knows 258 entries of the vocabulary, the data set has "
             f"more; make a model of it first: {merge}")
    refused(folder, grown, vocab_size=261)
    known = save(disk, sha256="")
    assert made(folder).sha256 == sha256(base / "model.safetensors")
    known = save(disk, 261, first_row=258)
    assert made(folder, vocab_size=261) == replace(known, dropout=0.0, base=str(base.resolve()))
    refused(folder, grown.replace("258", "261"), vocab_size=262)


def test_what_a_run_begins_with(disk, monkeypatch):
    base, folder = disk / "base", disk / "adapter"
    stored, begun = load_model(base), []
    monkeypatch.setattr(expansion, "begin", lambda model: begun.append(model))
    real = adapters.initialise
    only: list = []
    monkeypatch.setattr(peft, "initialise", lambda *words: only.append(words[3:]) or real(*words))

    def start(source, adapter=None, model=None, **config):
        model = model or small(vocab_size=config.pop("vocab_size", 258))
        if adapter:
            adapters.attach(model, adapter)
        peft.load_start(model, Settings(seed=0, **config), source, adapter, World())
        return model

    model = start(None)
    assert begun == [model] and only == [()]
    for (name, p), wanted in zip(model.named_parameters(), small(vocab_size=258).parameters(),
                                 strict=True):
        assert p.equal(wanted), name
    begun.clear(), only.clear()
    model = small(vocab_size=258)
    for p in model.parameters():
        p.data.fill_(5)
    start(base, model=model)
    for name, p in model.named_parameters():
        assert p.equal(stored.get_parameter(name)), name
    assert begun == [model] and only == [(adapters.ADDED,)]
    grown = start(base, vocab_size=261)
    assert only[-1] == ((*adapters.ADDED, "model.embed_tokens.weight", "lm_head.weight"),)
    first = small(vocab_size=261)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert grown.get_parameter(name)[:258].equal(stored.get_parameter(name))
        assert grown.get_parameter(name)[258:].equal(first.get_parameter(name)[258:])
    known = save(disk)
    on = start(folder, known)
    assert (on.get_parameter(f"{Q}.lora_B") == 1).all()
    fresh = start(base, known)
    assert not fresh.get_parameter(f"{Q}.lora_B").any()
    assert fresh.get_submodule(Q).weight.equal(stored.get_parameter(f"{Q}.weight"))
    alone = start(None, replace(known, base=""))
    assert not alone.get_parameter(f"{Q}.lora_B").any()
    with pytest.raises(UserError, match=r"^frozen_dtype=bf16 would round"):
        low = small(vocab_size=258)
        low.lm_head.weight.data = low.lm_head.weight.data.bfloat16()
        start(base, model=low, frozen_dtype="bf16")
    low = small(vocab_size=258)
    low.lm_head.weight.data = low.lm_head.weight.data.bfloat16()
    start(base, model=low, frozen_dtype="fp32")
    start(folder, replace(known, frozen_dtype="bf16"), frozen_dtype="bf16")
    bigger = start(folder, save(disk, 261, first_row=258), vocab_size=261)
    assert (bigger.lm_head.rows == 1).all()
    monkeypatch.setattr(peft, "load_weights", lambda *words: begun.append(words[3:]))
    begun.clear()
    expanded = replace(stored.config, expand="concat", expand_blocks=1)
    monkeypatch.setattr(peft, "read_config", lambda _: expanded)
    start(base)
    assert begun == [(False, False)]
