"""Expanded models: the start is the base, what is frozen stays, formulas by hand, plain models."""

import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TUNED, documents, metrics, run_script, write_data_set
from safetensors.torch import load_file, save_file

import export
import prepare
import train
from model import KVCache, LLaMA, ModelConfig, trained
from plainllama.command import parse
from plainllama.files import read_json, sha256
from plainllama.generation.generate import generate
from plainllama.parallel import World
from plainllama.settings import Sampling, Settings, UserError
from plainllama.tokens.rows import to_batch
from plainllama.training.engine import Engine
from plainllama.weights import adapters, checkpoint, expansion
from plainllama.weights.huggingface import read_config
from plainllama.weights.peft import load_model

CONFIG = TUNED + "n_layer = 4\n"
KINDS = {"concat": ("--expand=concat",), "stack": ("--expand=stack",),
         "hybrid": ("--expand=hybrid",), "dlerp": ("--expand=concat", "--expand_merge=dlerp")}
GROW = ("--init_from=out/base", "--expand_blocks=2")


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory):
    """A folder with data/toy, data/other and out/base, a run of eight steps."""
    home = tmp_path_factory.mktemp("base")
    write_data_set(home / "data/toy", {"train": documents(60), "val": documents(6)})
    write_data_set(home / "data/other", {"train": documents(20), "val": ["0123456789 " * 40] * 4})
    (home / "toy.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run("--out_dir=out/base") == 0
    return home


@pytest.fixture
def home(trained_base, tmp_path, monkeypatch):
    for name in ("data", "toy.py"):
        (tmp_path / name).symlink_to(trained_base / name)
    (tmp_path / "out").mkdir()
    shutil.copytree(trained_base / "out/base", tmp_path / "out/base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    """train.py in this process."""
    return train.main(parse(["toy.py", *words], "", train.Flags))


def newest(run: str) -> Path:
    return checkpoint.find_checkpoint(run)


def rows_of(run: str, name: str) -> list[float]:
    return [row[name] for row in metrics(Path(run)) if name in row]


def some_ids(vocab: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(vocab, size=(2, 24)))


def grown(kind: str, seed: int = 0, **keys) -> LLaMA:
    """A small expanded model whose copies have gone their own way."""
    torch.manual_seed(seed)
    merge = "dlerp" if kind == "dlerp" else "lerp"
    shape = {"n_layer": 4, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 48,
             "vocab_size": 64, "block_size": 48} | keys
    model = expansion.outline(ModelConfig(**shape, expand=kind.replace("dlerp", "concat"),
                                          expand_blocks=2, expand_merge=merge))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_the_base(home, kind):
    """To the bit, and with a cache too; the first loss is the base's."""
    base = load_model(newest("out/base"))
    assert run(*GROW, *KINDS[kind], "--out_dir=out/a", "--learning_rate=0", "--min_lr=0",
               "--max_steps=1") == 0
    model = load_model(newest("out/a"))
    assert len(expansion.expanded(model)) == 2
    assert torch.equal(model(some_ids()), base(some_ids()))
    prompts = [[1, 5, 9, 4], [7, 8]]
    assert list(generate(model, prompts, 9, Sampling(temperature=0), [0, 0])) == list(
        generate(base, prompts, 9, Sampling(temperature=0), [0, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_its_copies_alone_and_resumes_to_the_bit(home, kind, capsys):
    keys = *GROW, *KINDS[kind]
    weight = () if kind == "stack" else ("--divergence_weight=0.3",)
    assert run(*keys, *weight, "--out_dir=out/whole") == 0
    said = capsys.readouterr().out
    assert "learns: " in said and "copies of the blocks 1, 3" in said
    assert run(*keys, *weight, "--out_dir=out/parts", "--max_minutes=1e-9") == 75
    while run(*keys, *weight, "--out_dir=out/parts") != 0:
        pass
    a, b = (load_file(newest(f"out/{name}") / "model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    base = load_file(newest("out/base") / "model.safetensors")
    assert base.keys() < a.keys()
    assert all(torch.equal(base[name], a[name]) for name in base)  # to the bit
    model = load_model(newest("out/whole"))
    for block in expansion.expanded(model).values():
        for name, copy in block.expansion.named_parameters():
            if name.startswith("mix_"):
                assert copy.any(), name
            else:
                assert not torch.equal(copy, block.get_parameter(name)), name
    moments = load_file(newest("out/whole") / "training/optimizer-00000.safetensors")
    assert all(".expansion." in name for name in moments)
    assert rows_of("out/whole", "loss")[-1] < rows_of("out/whole", "loss")[0]
    if kind == "stack":
        assert not rows_of("out/whole", "divergence/mse")
    else:
        found = rows_of("out/whole", "divergence/mse")
        assert found[0] == 0 and found[-1] > 0
        layer = 3
        shares = rows_of("out/whole", f"expansion_share/{layer}")
        assert shares[0] == 0.5 and 0 < shares[-1] < 1 and shares[-1] != 0.5
        alike = rows_of("out/whole", f"expansion_cosine/{layer}")
        assert alike[0] == pytest.approx(1, abs=1e-5) and alike[-1] < 0.999


def by_hand(model: LLaMA, layer: int, x: np.ndarray) -> np.ndarray:
    """One expanded block that merges by dlerp, in float64 by numpy: (T, C) -> (T, C)."""
    config, names = model.config, dict(model.model.layers[layer].named_parameters())
    weights = {name: p.detach().double().numpy() for name, p in names.items()}
    T, D = len(x), config.head_dim
    place, pair = np.arange(T)[:, None], np.arange(D // 2)[None]
    turn = np.exp(1j * place * config.rope_theta ** (-2.0 * pair / D))[:, None]

    def norm(h, gain):
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * gain

    def turned(h):
        z = (h[..., :D // 2] + 1j * h[..., D // 2:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    def block(at):
        w = {name.removeprefix(at): value for name, value in weights.items()
             if name.startswith(at) and ".expansion." not in f".{name.removeprefix(at)}"}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = ((h @ w[f"self_attn.{one}_proj.weight"].T).reshape(T, -1, D) for one in "qkv")
        group = config.n_head // config.kv_heads
        k, v = np.repeat(turned(k), group, 1), np.repeat(v, group, 1)
        scores = np.einsum("qhd,khd->hqk", turned(q), k) / np.sqrt(D)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        heads = np.einsum("hqk,khd->qhd", chances, v).reshape(T, -1)
        y = x + heads @ w["self_attn.o_proj.weight"].T
        h = norm(y, w["post_attention_layernorm.weight"])
        gate, up = (h @ w[f"mlp.{one}_proj.weight"].T for one in ("gate", "up"))
        return y + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T

    base, copy = block(""), block("expansion.")
    score = np.concatenate([base, copy], -1) @ weights["expansion.mix_weight"]
    share = 1 / (1 + np.exp(-(score + weights["expansion.mix_bias"])))
    return (1 - share[:, None]) * base + share[:, None] * copy


def test_a_block_that_merges_by_dlerp_is_what_numpy_says():
    model = grown("dlerp")
    x = torch.randn(1, 11, 32)
    rope = model.rope_cos[:11], model.rope_sin[:11]
    ours = model.model.layers[3](x, rope, None, None, None, None)[0].detach()
    theirs = by_hand(model, 3, x[0].double().numpy())
    assert np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max() < 1e-6


def test_divergences_by_hand():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for row in range(2):
        for token in range(3):
            u, v = a[row, token].tolist(), b[row, token].tolist()
            squares = sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) / 4
            dot = sum(p * q for p, q in zip(u, v, strict=True))
            size = sum(p * p for p in u) ** 0.5 * sum(q * q for q in v) ** 0.5
            apart = max(0.0, 1 - dot / size)
            smooth = 0.5 * apart**2 if apart < 1 else apart - 0.5
            assert expansion.mse(a, b)[row, token].item() == pytest.approx(squares, rel=1e-5)
            assert expansion.cosine(a, b)[row, token].item() == pytest.approx(smooth, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_the_same_logits(kind):
    """Block and copy have a place of their own in it."""
    model, ids = grown(kind), some_ids(64)
    whole = model(ids)
    cache = KVCache(model.config, 2, 40, "cpu", torch.float32)
    parts = []
    for piece in ids.split(5, 1):
        parts.append(model(piece, cache=cache))
        cache.lengths += piece.shape[1]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)


@pytest.mark.parametrize(("kind", "beside"), [("concat", [1, 3]), ("stack", []), ("hybrid", [3])])
def test_which_blocks_are_expanded(kind, beside):
    """hybrid: behind first."""
    model = grown(kind)
    assert list(expansion.expanded(model)) == [1, 3] and list(expansion.merging(model)) == beside


@pytest.mark.parametrize("tied", [False, True])
def test_copies_behind_their_blocks_are_a_deeper_llama(tied):
    model = grown("stack", tie_embeddings=tied)
    made = expansion.plain(model, {})
    assert type(made) is LLaMA and made.config.n_layer == 6 and made.config.expand == "none"
    assert torch.allclose(made(some_ids(64)), model(some_ids(64)), atol=1e-5)


def test_merging_back_an_untouched_expansion_gives_the_base_to_the_bit():
    base = grown("concat")
    expansion.begin(base)
    plain = LLaMA(expansion.plain(base, {1: 0.3, 3: 0.9}).config)
    kept = {name: p for name, p in base.named_parameters() if ".expansion." not in name}
    merged = dict(expansion.plain(base, {1: 0.3, 3: 0.9}).named_parameters())
    assert merged.keys() == dict(plain.named_parameters()).keys() == kept.keys()
    assert all(torch.equal(merged[name], kept[name]) for name in kept)


def test_merging_back_goes_from_block_to_copy():
    """A share of 0 is the block, 1 the copy; a quarter lies nearer to the block."""
    model = grown("concat")
    for share in (0, 0.25, 1):
        made = expansion.plain(model, {1: share, 3: 0}).model.layers
        for name, weight in made[1].named_parameters():
            block = model.model.layers[1].get_parameter(name)
            copy = model.model.layers[1].get_parameter(f"expansion.{name}")
            assert torch.allclose(weight, (1 - share) * block + share * copy, atol=1e-6), name
            assert torch.equal(made[3].get_parameter(name), model.model.layers[3].get_parameter(
                name))


def engine(**keys) -> Engine:
    """An engine on a model whose copies differ from their blocks."""
    config = Settings(**{"n_layer": 4, "n_head": 4, "d_model": 32, "d_ff": 48, "vocab_size": 64,
                         "block_size": 16, "global_batch_tokens": 128, "compile": "false",
                         "expand": "concat", "expand_blocks": 2, "divergence_weight": 0.7} | keys)
    made = Engine(config, World(), 1)
    torch.manual_seed(5)
    for _, parameter in trained(made.model):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def batch(seed: int = 0):
    rows = np.random.default_rng(seed).integers(2, 64, size=(8, 17))
    return to_batch(rows)


@pytest.mark.parametrize("keys", [{}, {"divergence": "cosine"}, {"expand_merge": "dlerp"}])
def test_the_gradient_is_that_of_the_loss_and_the_divergence(keys):
    """By autograd over a loss that is written out; the loss that is told has no divergence in
    it."""
    one = engine(**keys)
    ids, targets = batch().ids, batch().targets
    told = one.gradients(batch(), targets.numel())
    states: list = []
    x = one.model.hidden(ids, watch=states.append)
    rope = one.model.rope_cos[:16], one.model.rope_sin[:16]
    apart = []
    for layer, block in expansion.merging(one.model).items():
        pair = block.both(states[layer], rope, None, None, None, None)
        apart.append(expansion.DIVERGENCES[one.config.divergence](*pair).mean())
    logits = one.model.lm_head(x).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
    divergence = torch.stack(apart).mean()
    learned = dict(trained(one.model))
    theirs = torch.autograd.grad(loss + 0.7 * divergence, list(learned.values()))
    for (name, parameter), grad in zip(learned.items(), theirs, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-6, rtol=1e-4), name
    assert told[0].item() / 128 == pytest.approx(loss.item(), rel=1e-5)
    assert told[1].item() / 128 == pytest.approx(divergence.item(), rel=1e-5)
    assert one.logged == ("divergence/" + one.config.divergence,) and divergence.item() > 1e-4


def test_of_pairs_the_divergence_is_the_mean_of_both_answers():
    """However long they are. In a row of 16 targets the first of each answer is context."""
    one = engine(objective="orpo", doc_mask=True)
    pairs = one.stand_in(np.random.default_rng(0).integers(2, 64, size=(8, 17)))
    told = one.gradients(pairs, 8)
    ids, _, documents, _ = pairs.to(torch.device("cpu"))
    states: list = []
    one.model.hidden(ids, documents=documents, watch=states.append)
    rope = one.model.rope_cos[:16], one.model.rope_sin[:16]
    apart = torch.stack([
        expansion.mse(*block.both(states[layer], rope, None, None, None, documents))
        for layer, block in expansion.merging(one.model).items()]).mean(0)
    wanted = (apart[:, :7].mean(1) + apart[:, 8:].mean(1)).sum() / 2
    assert wanted > 1e-4 and told[-1].item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("keys", [
    {"micro_batch": 2}, {"micro_batch": 3}, {"activation_checkpointing": True},
    {"activation_checkpointing": True, "micro_batch": 2}, {"deterministic": True}])
def test_one_gradient_however_it_is_computed(keys):
    """Micro-batches, also those that are filled up, and activation checkpointing, which must not
    count the divergence twice."""
    threads = torch.get_num_threads()
    first, other = engine(micro_batch=8), engine(**keys)
    a, b = (one.gradients(to_batch(np.random.default_rng(0).integers(2, 64, size=(8, 17)),
                                   one.accumulate * one.micro), 128) for one in (first, other))
    torch.set_num_threads(threads)
    assert torch.allclose(a, b, rtol=1e-5)
    for (name, p), (_, q) in zip(trained(first.model), trained(other.model), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6, rtol=1e-4), name
    frozen = [p for p in other.model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def test_compiled_blocks_have_no_break_and_the_same_gradient():
    first, other = engine(micro_batch=8), engine(micro_batch=8)
    told = first.gradients(batch(), 128)
    seen: list[int] = []

    def backend(graph, inputs):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    other.model.compile(backend=backend, fullgraph=True, dynamic=False)
    again = other.gradients(batch(), 128)
    assert len(seen) == 1
    assert torch.allclose(told, again, rtol=1e-5)
    for (name, p), (_, q) in zip(trained(first.model), trained(other.model), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6, rtol=1e-4), name


def test_stack_exports_as_a_plain_llama_and_concat_by_merge_back_alone(home, checked_here, capsys,
                                                                       monkeypatch):
    for kind in ("stack", "concat", "hybrid"):
        assert run(*GROW, f"--expand={kind}", f"--out_dir=out/{kind}") == 0
    capsys.readouterr()

    def exported(*words: str) -> int:
        return export.main(parse(list(words), "", export.Flags, takes="files"))

    assert exported("--ckpt=out/stack", "--to=plain_stack") == 0
    assert "largest difference of logits" in capsys.readouterr().out
    assert read_json(Path("plain_stack/config.json"))["num_hidden_layers"] == 6
    stack, plain = load_model(newest("out/stack")), load_model(Path("plain_stack"))
    assert torch.allclose(stack(some_ids()), plain(some_ids()), atol=1e-5)
    monkeypatch.setattr(export, "compare_with_transformers", lambda *_: "")  # once is enough
    for kind, depth in (("concat", 4), ("hybrid", 5)):
        with pytest.raises(UserError, match="--merge_back"):
            exported(f"--ckpt=out/{kind}", f"--to=plain_{kind}")
        assert not Path(f"plain_{kind}").exists()
        assert exported(f"--ckpt=out/{kind}", f"--to=plain_{kind}", "--merge_back") == 0
        said = capsys.readouterr().out
        assert "expanded: " in said and "merged back: " in said
        told = next(line for line in said.splitlines() if "merged back: " in line)
        assert told in Path(f"plain_{kind}/README.md").read_text()  # not the run's loss alone
        assert read_config(Path(f"plain_{kind}")).n_layer == depth
    for ckpt in ("out/stack", "out/base"):
        with pytest.raises(UserError, match="--merge_back has no effect"):
            exported(f"--ckpt={ckpt}", "--to=other", "--merge_back")


def test_transformers_does_not_take_an_expanded_checkpoint_for_a_llama(home):
    transformers = pytest.importorskip("transformers")
    assert run(*GROW, "--expand=concat", "--out_dir=out/a") == 0
    with pytest.raises((ValueError, KeyError)):
        transformers.AutoModelForCausalLM.from_pretrained(newest("out/a"))


@pytest.mark.parametrize("wrong", [
    {"expand": "foo"}, {"expand": "none"}, {"expand": ["concat"]}, {"expand_blocks": 99},
    {"expand_blocks": -1}, {"expand_blocks": "2"}, {"expand_blocks": 0}, {"expand_merge": "slerp"},
    {"first_row": 10**9}, {"first_row": None}, {"newer": 1}])
def test_a_config_of_no_expansion_is_refused_in_one_line(tmp_path, wrong):
    from plainllama.weights.huggingface import config_json

    there = config_json(grown("concat").config, 0, 1)
    assert read_config_of(tmp_path, there).expand_blocks == 2
    there["plainllama"] |= wrong
    with pytest.raises(UserError) as seen:
        read_config_of(tmp_path, there)
    assert "\n" not in str(seen.value) and "config.json" in str(seen.value)


def read_config_of(folder: Path, config: dict) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


def test_a_base_that_bf16_would_round_is_refused(home):
    with pytest.raises(UserError, match=r"would round .* that is no adapter's") as seen:
        run(*GROW, "--expand=stack", "--frozen_dtype=bf16", "--out_dir=out/a")
    assert "\n" not in str(seen.value) and not Path("out/a").exists()
    even = foreign("out/base", "even")  # weights that bf16 holds as they are
    base = {name: p.bfloat16().float() for name, p in
            load_file(even / "model.safetensors").items()}
    save_file(base, even / "model.safetensors", {"format": "pt"})
    assert run("--init_from=even", *GROW[1:], "--expand=concat", "--frozen_dtype=bf16",
               "--out_dir=out/a") == 0
    after = load_file(newest("out/a") / "model.safetensors")
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_an_expanded_run_begins_another(home, capsys):
    """It is taken over as it is, copies included, and they alone learn on."""
    assert run(*GROW, "--expand=hybrid", "--out_dir=out/a") == 0
    assert run("--init_from=out/a", "--out_dir=out/b", "--divergence_weight=1") == 0
    assert "expand = hybrid (inherited from" in capsys.readouterr().out
    a, b = (load_file(newest(f"out/{name}") / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) == (".expansion." not in name), name
    assert rows_of("out/b", "loss")[0] < rows_of("out/a", "loss")[0]


def test_several_validation_sets_are_measured_and_drawn(home, capsys):
    sets = "{'toy': 'data/toy', 'digits': 'data/other'}"
    for arm, keys in (("a", ("--expand=stack", *GROW)), ("b", ("--init_from=out/base",))):
        assert run(*keys, f"--eval_sets={sets}", f"--out_dir=out/{arm}") == 0
    said = capsys.readouterr().out
    assert "; toy " in said and "; digits " in said
    toy, own = rows_of("out/a", "val_loss/toy"), rows_of("out/a", "val_loss")
    assert toy == own and len(toy) == 2  # at step 0 and at the end
    assert rows_of("out/a", "val_loss/digits")[0] > toy[0]
    done = run_script("report.py", "out/a", "out/b", "--out=both.html", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    page = Path("both.html").read_text()
    assert Path("both_val_loss.svg").is_file()
    assert "Trade-off: loss on toy against loss on digits" in page
    assert "Validation by set" in page and "digits, out/a" in page


def test_a_set_sees_documents_as_the_run_does(home):
    """The run's own split under another name, with doc_mask: the same loss, and without another."""
    shutil.copytree("data/toy", "twin")
    for name, keys in (("mask", ["--doc_mask"]), ("whole", [])):
        assert run("--eval_sets={'twin': 'twin'}", "--max_steps=1", *keys, f"--out_dir=out/{name}"
                   ) == 0
        assert rows_of(f"out/{name}", "val_loss/twin") == rows_of(f"out/{name}", "val_loss")
    assert rows_of("out/mask", "val_loss/twin") != rows_of("out/whole", "val_loss/twin")
    with pytest.raises(UserError, match="other names '', no data set; name the folder of one"):
        run("--eval_sets={'other': ''}", "--out_dir=out/x")


CONCAT = (*GROW, "--expand=concat", "--divergence_weight=1")


@pytest.mark.parametrize("kind", KINDS)
def test_check_holds_for_an_expanded_model(home, kind, capsys):
    assert run(*GROW, *KINDS[kind], "--check", "--out_dir=out/x",
               "--eval_sets={'a': 'data/other'}") == 0
    assert "copies of the blocks 1, 3" in capsys.readouterr().out
    assert not Path("out/x").exists()


def dialogs(folder: Path, documents: str, rows: list[dict]) -> None:
    """A set of dialogs or pairs whose tokenizer has five tokens more than the base's, in a data/ of
    the test's own."""
    shutil.copytree(Path("data").resolve(), "moved")
    Path("data").unlink()
    Path("moved").rename("data")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare.main(parse(["toy.py", f"--dataset={folder.name}", f"--documents={documents}",
                               "--sources=rows.jsonl", "--tokenizer=data/toy/tokenizer.json",
                               "--val_fraction=0.2"], "", prepare.Flags)) == 0


TALKS = [{"messages": [{"role": "user", "content": f"say {n}"},
                       {"role": "assistant", "content": f"{n} it is"}]} for n in range(40)]


def test_an_expanded_model_learns_dialogs_and_their_tokens(home, capsys):
    """The rows of new tokens learn beside the copies, those of the others stay to the bit; the run
    resumes, and its model is whole."""
    dialogs(Path("data/talks"), "chat", TALKS)
    keys = *CONCAT, "--dataset=talks", "--eval_sets={'old': 'data/toy', 'new': 'data/talks'}"
    assert run(*keys, "--out_dir=out/whole") == 0
    said = capsys.readouterr().out
    assert "and 5 new entries" in said
    assert run(*keys, "--out_dir=out/parts", "--max_minutes=1e-9") == 75
    while run(*keys, "--out_dir=out/parts") != 0:
        pass
    a, b, base = (load_file(newest(f"out/{name}") / "model.safetensors")
                  for name in ("whole", "parts", "base"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    old = len(base["lm_head.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert len(a[name]) == old + 5 and torch.equal(a[name][:old], base[name])
    moments = load_file(newest("out/whole") / "training/optimizer-00000.safetensors")
    assert "lm_head.rows/exp_avg" in moments
    assert rows_of("out/whole", "val_loss/new")[-1] < rows_of("out/whole", "val_loss/new")[0]
    assert rows_of("out/whole", "val_loss/new") == rows_of("out/whole", "val_loss")
    # it goes on, as it is, with other dialogs
    assert run("--init_from=out/whole", "--dataset=talks", "--out_dir=out/on") == 0
    on = load_file(newest("out/on") / "model.safetensors")
    assert torch.equal(on["lm_head.weight"][:old], base["lm_head.weight"])
    assert not torch.equal(on["lm_head.weight"][old:], a["lm_head.weight"][old:])
    assert rows_of("out/on", "loss")[0] < rows_of("out/whole", "loss")[0]


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_learn_whose_rows_a_wide_embedding_had_already(home, tied, capsys):
    """A base whose embedding is larger than its tokenizer: what dialogs add lies among its rows."""
    tie = f"--tie_embeddings={tied}"
    assert run("--vocab_size=300", tie, "--out_dir=out/wide") == 0
    dialogs(Path("data/talks"), "chat", TALKS)
    base = load_file(newest("out/wide") / "model.safetensors")
    old = read_json(Path("data/toy/manifest.json"))["tokenizer"]["vocab_size"]
    for keys in (["--lora_r=2"], ["--expand=concat", "--expand_blocks=2"]):
        words = "--init_from=out/wide", "--dataset=talks", tie, *keys
        capsys.readouterr()
        assert run(*words, "--out_dir=out/x", "--check") == int(tied)  # ln V is far at this width
        assert f"and {300 - old} new entries" in capsys.readouterr().out
        assert run(*words, "--out_dir=out/x") == 0
        model = load_model(newest("out/x"))
        after = {"lm_head.weight": model.lm_head.weight,
                 "model.embed_tokens.weight": model.model.embed_tokens.weight}
        for name, matrix in after.items():
            before = base.get(name, base["model.embed_tokens.weight"])
            assert torch.equal(matrix[:old], before[:old]), name
            assert not torch.equal(matrix[old:old + 5], before[old:old + 5]), name
        assert run(*words, "--learning_rate=1e-9", "--min_lr=1e-9", "--max_steps=1",
                   "--out_dir=out/still") == 0
        still = load_model(newest("out/still")).lm_head.weight  # they begin as the base has them
        assert torch.allclose(still, base["lm_head.weight" if not tied else
                                          "model.embed_tokens.weight"], atol=1e-7)
        assert run("--init_from=out/x", "--dataset=talks", tie, *keys[:1] * ("lora_r" in keys[0]),
                   "--out_dir=out/on", "--max_steps=1") == 0  # whose rows are not new again
        for name in ("x", "still", "on"):
            shutil.rmtree(f"out/{name}")
    done = run_script("train.py", "toy.py", *words, "--out_dir=out/x", "--parallel=fsdp",
                      cwd=Path.cwd(), processes=2)
    assert done.returncode == 0, done.stderr
    assert run(*words, "--out_dir=out/on") == 0
    assert rows_of("out/x", "loss") == pytest.approx(rows_of("out/on", "loss"), abs=2e-5)
    with pytest.raises(UserError, match="freezes the rows of new tokens"):
        run(*words[:3], "--train_only=last:1", "--out_dir=out/y")
    assert run("--init_from=out/wide", tie, "--lora_r=2", "--out_dir=out/a") == 0
    with pytest.raises(UserError, match="the data set has more"):
        run("--init_from=out/a", "--dataset=talks", tie, "--lora_r=2", "--out_dir=out/y")


@pytest.mark.parametrize("keys", [["--lora_r=2"], ["--expand=concat", "--expand_blocks=2"]])
def test_tokens_learn_that_an_embedding_is_too_short_for(home, keys):
    """A tokenizer with an entry more than its model, as a pad token makes it: that row is new."""
    old = read_json(Path("data/toy/manifest.json"))["tokenizer"]["vocab_size"]
    short = foreign("out/base", "short")
    config = read_json(short / "config.json")
    (short / "config.json").write_text(json.dumps(config | {"vocab_size": old - 1}))
    base = load_file(short / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        base[name] = base[name][:-1].clone()
    save_file(base, short / "model.safetensors", {"format": "pt"})
    dialogs(Path("data/talks"), "chat", TALKS)
    assert run("--init_from=short", "--dataset=talks", *keys, "--out_dir=out/x") == 0
    matrix = load_model(newest("out/x")).lm_head.weight
    assert torch.equal(matrix[:old - 1], base["lm_head.weight"])
    assert matrix[old - 1:].abs().max() < 1 and len(matrix) == old + 5
    (short / "tokenizer.json").unlink()  # nobody knows what of a wide embedding is new
    (short / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(UserError, match="has no tokenizer, which would say"):
        run("--init_from=short", "--dataset=talks", *keys, "--out_dir=out/y")
    assert not Path("out/y").exists()


def foreign(run: str, to: str) -> Path:
    """A copy of a run's model without our hashes."""
    shutil.copytree(newest(run), to)
    (Path(to) / "checksums.json").unlink()
    return Path(to)


def test_an_expanded_run_with_new_rows_goes_on_in_bf16(home):
    """What is frozen is even, and what learns need not be."""
    even = foreign("out/base", "even")
    base = {name: p.bfloat16().float() for name, p in load_file(even / "model.safetensors").items()}
    save_file(base, even / "model.safetensors", {"format": "pt"})
    dialogs(Path("data/talks"), "chat", TALKS)
    keys = "--dataset=talks", "--frozen_dtype=bf16"
    assert run("--init_from=even", *keys, "--expand=stack", "--expand_blocks=2", "--out_dir=out/a"
               ) == 0
    assert run("--init_from=out/a", *keys, "--out_dir=out/b") == 0
    after = load_file(newest("out/b") / "model.safetensors")
    old = len(base["lm_head.weight"])
    assert all(torch.equal(after[name][:old], p) for name, p in base.items())


def test_chunks_of_the_loss_round_no_row_that_learns(home, monkeypatch):
    model = grown("stack", first_row=60)
    adapters.grow(model, 60)
    for end in (model.lm_head, model.model.embed_tokens):
        torch.nn.init.normal_(end.rows)
        end.weight.requires_grad_(False).data = end.weight.data.bfloat16()
    ids = some_ids() % 64
    whole = model(ids[:, :-1], ids[:, 1:])
    monkeypatch.setattr("model.LOGITS_BYTES", 4 * 8 * 64)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(whole.item(), rel=1e-7)


def test_an_expanded_model_learns_preferences(home):
    dialogs(Path("data/pairs"), "preference", [
        {"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no no"} for n in range(40)])
    keys = *CONCAT, "--dataset=pairs", "--objective=dpo"
    assert run(*keys, "--out_dir=out/whole") == 0
    first = rows_of("out/whole", "loss")[0]
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert rows_of("out/whole", "divergence/mse")[-1] > 0
    assert run(*keys, "--out_dir=out/small", "--micro_batch=1") == 0
    for name in ("loss", "divergence/mse", "rewards/margins"):
        assert rows_of("out/small", name) == pytest.approx(rows_of("out/whole", name), abs=2e-5)


@pytest.mark.parametrize(("words", "what"), [
    (("--expand=concat",), "expand_blocks=0: say both"),
    (("--expand_blocks=2",), "say both, or neither"),
    (("--expand=hybrid", "--expand_blocks=1"), "takes turns"),
    (("--expand=concat", "--expand_blocks=5"), "above the 4 blocks"),
    (("--expand=stack", "--expand_blocks=2", "--expand_merge=dlerp"), "no effect without"),
    (("--expand=stack", "--expand_blocks=2", "--divergence_weight=1"), "no effect without"),
    (("--divergence=cosine",), "no effect without"),
    (("--expand=concat", "--expand_blocks=2", "--lora_r=2"), "lora_r has no place"),
    (("--expand=concat", "--expand_blocks=2", "--train_only=last:1"), "train_only has no place"),
    (("--expand=concat", "--expand_blocks=2", "--frozen_dtype=nf4"), "is for lora_r"),
    (("--expand=concat", "--expand_blocks=2", "--init_from="), "say --init_from"),
    (("--init_from=out/grown", "--expand=stack", "--expand_blocks=2"), "--expand=concat"),
    (("--init_from=out/grown", "--expand_blocks=4"), "--expand_blocks=2"),
    (("--init_from=out/grown", "--lora_r=2"), "lora_r has no place"),
    (("--eval_sets=data/toy",), "is not {'NAME'"),
    (("--eval_sets={}",), "is not {'NAME'"),
    (("--eval_sets={'a/b': 'data/toy'}",), "is not {'NAME'"),
    (("--eval_sets={'a': 'data/none'}",), "data/none"),
    (("--eval_sets={'a': 'data/foreign'}",), "another tokenizer"),
])
def test_what_does_not_go_together_is_refused_at_once(home, words, what):
    if "out/grown" in "".join(words):
        assert run(*GROW, "--expand=concat", "--out_dir=out/grown", "--max_steps=1") == 0
    if "foreign" in "".join(words):
        shutil.copytree(Path("data").resolve(), "moved")
        Path("data").unlink()
        Path("moved").rename("data")
        shutil.copytree("data/toy", "data/foreign")
        manifest = Path("data/foreign/manifest.json")
        told = read_json(manifest)["tokenizer"]["sha256"]
        manifest.write_text(manifest.read_text().replace(told, "0" * 64))
        manifest.with_suffix(".sha256").write_text(sha256(manifest) + "\n")
    with pytest.raises(UserError, match=what.replace("{", r"\{")) as seen:
        run(*(() if "init_from" in "".join(words) else ("--init_from=out/base",)), *words,
            "--out_dir=out/x")
    assert "\n" not in str(seen.value) and not Path("out/x").exists()


# ---- the parts, one by one

@pytest.mark.parametrize(("layers", "copies", "kind", "places", "beside"), [
    (4, 2, "concat", [1, 3], [1, 3]), (5, 2, "hybrid", [1, 3], [3]),
    (6, 3, "hybrid", [1, 3, 5], [3]), (6, 4, "hybrid", [0, 1, 2, 3], [1, 3]),
    (3, 1, "stack", [2], []), (3, 3, "concat", [0, 1, 2], [0, 1, 2]),
    (7, 2, "stack", [2, 5], []), (2, 0, "none", [], [])])
def test_where_copies_stand(layers, copies, kind, places, beside):
    for merge in ("lerp", "dlerp"):
        with torch.device("meta"):
            model = expansion.outline(ModelConfig(layers, 2, 8, 12, 20, 4, expand=kind,
                                                  expand_blocks=copies, expand_merge=merge))
        found = expansion.expanded(model)
        assert list(found) == places and list(expansion.merging(model)) == beside
        for number, block in enumerate(found.values()):
            assert block.self_attn.layer == places[number]
            assert block.expansion.self_attn.layer == layers + number
            mixes = {name: tuple(p.shape) for name, p in block.expansion.named_parameters()
                     if "mix" in name}
            assert mixes == ({} if not block.beside else {
                "mix_bias": (1,), **({"mix_weight": (16,)} if merge == "dlerp" else {})})
            assert (block.divergence, block.measure) == (None, "")


def test_a_share_by_hand():
    """0.5 at first; of states, the base's come first."""
    for kind in ("concat", "dlerp"):
        copy = grown(kind).model.layers[1].expansion
        base, other = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
        copy.mix_bias.data.fill_(0.75)
        wanted = torch.full((1,), 0.75)
        if kind == "dlerp":
            ours, theirs = copy.mix_weight.data.split(32)
            wanted = (base @ ours + other @ theirs + 0.75)[..., None]
        assert torch.allclose(copy.share(base, other), wanted.sigmoid(), atol=1e-6)
        assert copy.share(base.bfloat16(), other.bfloat16()).dtype == torch.bfloat16


def test_when_a_divergence_is_measured():
    """In training alone, and where the loss wants it."""
    for measure, grads, there in (("mse", True, True), ("mse", False, False), ("", True, False),
                                  ("", False, False)):
        model = grown("concat")
        for block in expansion.merging(model).values():
            block.measure = measure
        with torch.set_grad_enabled(grads):
            model(some_ids(64))
        assert [block.divergence is not None
                for block in expansion.merging(model).values()] == [there] * 2


def test_cosines_that_are_far_apart():
    """Smooth L1: linear beyond 1, and nothing of what is more than alike."""
    base = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    copy = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    wanted = [0.0, 1.5, 0.5, 0.5 * (1 - 2**-0.5) ** 2]
    assert torch.allclose(expansion.cosine(base, copy), torch.tensor(wanted), atol=1e-6)
    assert expansion.mse(base, copy).tolist() == [0.5, 8.0, 1.0, 0.5]
    found = expansion.mse(base.bfloat16(), copy.bfloat16())
    assert found.dtype == torch.float32 and expansion.DIVERGENCES.keys() == {"mse", "cosine"}


@pytest.mark.parametrize(("known", "entries", "named", "asked", "first"), [
    # (tokenizer's entries, embedding's, the data set's and whether it was made of it, vocab_size)
    (258, 258, None, 258, 0), (258, 258, None, 300, 258), (258, 258, None, 200, 0),
    (258, 258, (263, ""), 263, 258), (258, 258, (263, "b"), 263, 258),
    (258, 300, (263, "b"), 300, 258), (258, 257, (263, "b"), 263, 257),
    (263, 300, (263, "b"), 300, 0), (263, 263, (263, "b"), 270, 263),
    (270, 263, (263, "b"), 263, 0), (0, 262, (263, "b"), 263, 262),
    (0, 263, (263, "b"), 263, None), (0, 300, (263, "b"), 300, None)])
def test_which_entries_are_new(tmp_path, monkeypatch, known, entries, named, asked, first):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(expansion, "entries_of", lambda _: known)
    Path("data/toy").mkdir(parents=True)
    tokenizer = {"vocab_size": named[0], "base": named[1]} if named else None
    Path("data/toy/manifest.json").write_text(json.dumps({"tokenizer": tokenizer}))
    config = Settings(dataset="toy", vocab_size=asked)
    if first is None:
        with pytest.raises(UserError) as seen:
            expansion.first_new(Path("m"), entries, config)
        assert str(seen.value) == ("m has no tokenizer, which would say what of the data set's "
                                   "tokens is new to it; copy its tokenizer.json there")
        return
    assert expansion.first_new(Path("m"), entries, config) == first
    monkeypatch.setattr(expansion, "read_config", lambda _: theirs)
    for grew in (0, 100):
        theirs = types.SimpleNamespace(vocab_size=entries, first_row=grew)
        if first and grew:
            with pytest.raises(UserError) as seen:
                expansion.new_rows(config, Path("m"))
            assert str(seen.value) == (
                f"m grew its vocabulary to {first} entries beside a frozen one, and cannot grow it "
                "again; make a plain model of it first: export.py")
        else:
            assert expansion.new_rows(config, Path("m")) == (first or grew)
    assert expansion.new_rows(config, None) == 0
    Path("data/toy/manifest.json").write_text("{")
    assert expansion.first_new(Path("m"), entries, config) == (entries if entries < asked else 0)


def test_entries_of_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(expansion, "byte_info", lambda folder: types.SimpleNamespace(
        lengths=[0] * 7))
    monkeypatch.setattr(expansion, "make_tokenizer", lambda spec: types.SimpleNamespace(
        vocab_size=9 if spec.endswith("tokenizer.model") else 0))
    assert expansion.entries_of(tmp_path) == 0
    (tmp_path / "tokenizer.model").write_text("")
    assert expansion.entries_of(tmp_path) == 9
    (tmp_path / "tokenizer.json").write_text("")
    assert expansion.entries_of(tmp_path) == 7


def test_what_of_an_expanded_model_learns():
    model = grown("hybrid")
    expansion.freeze(model, Settings(divergence="cosine"))
    for name, p in model.named_parameters():
        assert p.requires_grad == (".expansion." in name), name
    assert [block.measure for block in expansion.expanded(model).values()] == ["", "cosine"]
    model = grown("stack", first_row=60)
    expansion.freeze(model, Settings())
    learned = [name for name, _ in trained(model) if ".expansion." not in name]
    assert learned == ["model.embed_tokens.rows", "lm_head.rows"]
    model = grown("hybrid")
    expansion.begin(model)
    for block in expansion.expanded(model).values():
        for name, copy in block.expansion.named_parameters():
            silent = name.startswith("mix_") or (
                not block.beside and name.endswith(("o_proj.weight", "down_proj.weight")))
            assert not copy.any() if silent else torch.equal(copy, block.get_parameter(name)), name


def test_the_tokens_by_which_a_run_looks():
    """512 of them, or all there are, or the first row."""
    asked: list = []
    for block, windows, rows in ((128, 99, 4), (128, 3, 3), (512, 99, 1), (513, 99, 1),
                                 (9999, 5, 1), (100, 99, 5), (27, 99, 18)):
        some = types.SimpleNamespace(block_size=block, windows=windows, read_windows=lambda which: (
            asked.append(which) or np.zeros((len(which), 5), np.int64)))
        found = expansion.first_tokens(some, 1)
        assert asked.pop() == range(rows) and len(found.ids) == rows
        assert found.starts is not None


def test_what_is_seen_of_expanded_blocks(monkeypatch):
    model, some, rows, said = grown("hybrid"), to_batch(some_ids(64).numpy()), [], []
    found = expansion.look(model, some)
    states: list = []
    model.hidden(some.ids, watch=states.append)
    rope = model.rope_cos[:23], model.rope_sin[:23]
    block = model.model.layers[3]
    base, copy = block.both(states[3], rope, *[None] * 4)
    dots = (base * copy).sum(-1) / base.norm(dim=-1) / copy.norm(dim=-1)
    share = block.expansion.mix_bias.sigmoid().item()
    assert found == {3: {"expansion_share": pytest.approx(share),
                         "expansion_cosine": pytest.approx(dots.mean().item(), abs=1e-6)}}
    monkeypatch.setattr(expansion, "first_tokens", lambda *_: some)
    monkeypatch.setattr(expansion, "look", lambda *_: {1: {"expansion_share": 0.5, "x": 1.0},
                                                       3: {"expansion_share": 0.25, "x": 2.0}})
    probe = expansion.Probe(None, 1)
    probe.add(model, 7, types.SimpleNamespace(row=rows.append, say=said.append))
    assert rows == [{"step": 7, "expansion_share/1": 0.5, "x/1": 1.0, "expansion_share/3": 0.25,
                     "x/3": 2.0}]
    assert said == ["step 7: share of the copies, by block: 1: 0.50, 3: 0.25"]


@pytest.mark.parametrize("objective", ["next", "dpo"])
def test_a_divergence_in_the_slope_alone(objective):
    """The first loss keeps its value and gets its gradient; the divergence stands behind all."""
    model = grown("concat")
    blocks = list(expansion.merging(model).values())
    flags, begins = 1 << 40, 1 << 41
    rows = np.full((2, 7), 5)
    rows[:, 0] |= flags | begins
    rows[:, 4] |= flags | begins  # (3 learned, 2 learned) in each row
    rows[1, 6] |= flags  # and one less
    some = to_batch(rows, 0, 1)
    values = [torch.rand(2, 6, requires_grad=True) for _ in blocks]
    for block, value in zip(blocks, values, strict=True):
        block.divergence = value
    losses = torch.tensor([3.0, 5.0], requires_grad=True)
    found = expansion.with_divergence(losses, model, some, Settings(
        objective=objective, divergence_weight=0.5))
    each = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0]]).float()
    if objective == "dpo":
        each = torch.tensor([[1 / 6] * 3 + [0, 1 / 4, 1 / 4], [1 / 6] * 3 + [0, 1 / 2, 0]])
    mean = (values[0] + values[1]).detach() / 2
    assert found.tolist() == pytest.approx([3.0, 5.0, (mean * each).sum().item()])
    slopes = torch.autograd.grad(found[0], [losses, *values])
    assert slopes[0].tolist() == [1.0, 0.0]
    for slope in slopes[1:]:
        assert torch.allclose(slope, 0.5 * each / 2)
    assert all(block.divergence is None for block in blocks)


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model_of_a_mixed_one(tied):
    """Behind their blocks copies become blocks, beside them they are merged by their share."""
    model = grown("hybrid", tie_embeddings=tied)
    model.compute_dtype = torch.bfloat16
    made = expansion.plain(model, {3: 0.25})
    assert made.config == ModelConfig(
        5, 4, 32, 48, 64, 48, n_kv_head=2, tie_embeddings=tied) and not made.training
    assert made.compute_dtype == torch.bfloat16 and (made.lm_head.weight is
                                                     made.model.embed_tokens.weight) == tied
    layers = model.model.layers
    for number, block in enumerate((layers[0], layers[1], layers[1].expansion, layers[2])):
        for name, p in made.model.layers[number].named_parameters():
            assert torch.equal(p, block.get_parameter(name)), name
    for name, p in made.model.layers[4].named_parameters():
        old, new = layers[3].get_parameter(name), layers[3].expansion.get_parameter(name)
        assert torch.allclose(p, 0.75 * old + 0.25 * new, atol=1e-6), name
    assert torch.equal(made.model.norm.weight, model.model.norm.weight)
