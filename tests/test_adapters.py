"""LoRA, partial tuning and quantised bases: what is frozen stays, peft agrees, bits come back."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TUNED, documents, metrics, write_data_set
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import export
import train
from model import LLaMA, ModelConfig, trained
from plainllama.command import parse
from plainllama.files import read_json, sha256
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.weights import adapters, checkpoint, peft
from plainllama.weights.huggingface import load_weights, write_folder
from plainllama.weights.peft import load_model

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
