"""export.py: what is written opens in transformers and is the model; what is not is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import report
from model import LLaMA, ModelConfig
from plainllama.command import parse
from plainllama.files import write_json
from plainllama.settings import UserError
from plainllama.tokens.chat import TEMPLATE, with_roles
from plainllama.tokens.tokenizer import make_tokenizer
from plainllama.weights import checkpoint, huggingface
from plainllama.weights.adapters import initial_weight
from plainllama.weights.huggingface import config_json, read_config
from plainllama.weights.peft import load_model

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny matrices lose time on more
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64, vocab_size=264, block_size=48)
VARIANTS = {
    "gqa": {}, "tied": {"tie_embeddings": True, "n_kv_head": 0},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0, "rope_theta": 5e5},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 16},
}


def write_run(folder: Path, **changes) -> Path:
    """A run with one checkpoint, its metrics and scores."""
    model = LLaMA(ModelConfig(**{**TINY, **changes}))
    for name, p in model.named_parameters():
        value = initial_weight(name, p.shape, model.config, 0)
        p.data.copy_(value if p.dim() == 1 else value * 6)
    step, tokenizer = folder / "checkpoints" / "step_7.tmp", make_tokenizer("bytes", None)
    (step / "training").mkdir(parents=True)
    (folder / "eval").mkdir()
    tokenizer.save(step)
    write_json(step / "config.json",
                          config_json(model.config, tokenizer.bos_id, tokenizer.eos_id))
    write_json(step / "training" / "state.json", {"step": 7, "rows": 70})
    save_file(dict(model.named_parameters()), step / "model.safetensors", {"format": "pt"})
    write_json(folder / "run.json", {
        "config": {"block_size": 100}, "data": {"name": "code", "sources": [{"path": "a.txt"}]},
        "config_file": "config/quickstart.py", "overrides": {"max_steps": 7},
        "parameters": {"total": 1}, "device": {"count": 1, "name": "cpu"}})
    write_json(folder / "eval" / "step_7.json", {
        "step": 7, "tokens": 7000, "val_loss": 1.5, "val_bpb": 2.25,
        "tasks": {"arc": {"acc": 0.25, "acc_stderr": 0.01, "chance": 0.2, "n": 9}},
        "baselines": {"unigram_bpb": 5.0, "5-gram_bpb": 2.5}})
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "loss": 9 - step, "val_loss": 9.5 - step}) + "\n"
        for step in range(9)))
    there = [path for path in step.rglob("*") if path.is_file()]
    checkpoint.commit(step, step.with_suffix(""), checkpoint.sealed(step, there))
    return step.with_suffix("")


def test_the_card_says_what_was_learned(tmp_path, unchecked):
    """Of a mixture every data set with its share; the tokens that were learned, not the rows."""
    step = write_run(tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    info["config"] |= {"mixture": {"code": 3, "prose": 1.0}, "init_from": "out/first"}
    write_json(tmp_path / "run" / "run.json", info)
    state = step / "training" / "state.json"
    write_json(state, {"step": 7, "rows": 70, "tokens": 5244})
    there = [path for path in step.rglob("*") if path.is_file() and path.name != "checksums.json"]
    write_json(step / "checksums.json", {"format": 1, "files": checkpoint.sealed(step, there)})
    assert run("--ckpt", step, "--to", tmp_path / "hub") == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    for part in ("| data set | code (75.0%), prose (25.0%) |", "| validated on | code |",
                 "| tokens trained on | 5,244 |", "| started from | out/first |"):
        assert part in card, part
    assert "a.txt" not in card
    info["overrides"] |= {"learning_rate": 1e-3, "out_dir": "x"}
    info["config"] |= {"learning_rate": 1e-3, "max_steps": 7, "out_dir": "x"}
    info["instead"] = {"learning_rate": 6e-4}
    write_json(tmp_path / "run" / "run.json", info)
    assert run("--ckpt", step, "--to", tmp_path / "again") == 0
    assert ("| changed of config/quickstart.py | learning_rate 0.001 (there: 0.0006) |"
            in (tmp_path / "again/README.md").read_text())


def test_the_card_of_a_model_of_dialogs_shows_how_to_talk_with_it(tmp_path, checked_here):
    transformers = pytest.importorskip("transformers")
    step = write_run(tmp_path / "run", vocab_size=263)
    _, data = with_roles(json.loads((step / "tokenizer.json").read_text()), "bytes")
    (step / "tokenizer.json").write_bytes(data)
    (step / "chat_template.jinja").write_text(TEMPLATE)
    there = [path for path in step.rglob("*") if path.is_file() and path.name != "checksums.json"]
    write_json(step / "checksums.json", {"format": 1, "files": checkpoint.sealed(step, there)})
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    info["config"] |= {"documents": "chat", "train_on": "assistant", "chat_template": "own"}
    info["data"] |= {"train_tokens": 4000, "train_learned": 1000}
    write_json(tmp_path / "run" / "run.json", info)
    assert run("--ckpt", step, "--to", tmp_path / "hub") == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| learned tokens | 7,000 |" in card and "trained from dialogs by" in card
    assert "| learned | assistant, 25.0% of the tokens |" in card
    assert "| chat template | plainllama's own, chat_template.jinja |" in card
    assert "/v1/chat/completions" in card and "llama-cli -m hub.gguf\n" in card
    sent = json.loads(card.partition("-d '")[2].partition("'")[0])
    assert sent["messages"] == [{"role": "user", "content": "Hello!"}]
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "apply_chat_template" in code and transformers
    made: dict = {}
    exec(code.replace('"hub"', repr(str(tmp_path / "hub"))).replace("=50", "=3"), made)
    said = made["tokenizer"].decode(made["ids"][0])
    assert said.startswith("<s><|user|>Hello!<|end|><|assistant|>")


def run(*words) -> int:
    return export.main(parse([str(word) for word in words], "", export.Flags, "model"))


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(export, "compare_with_transformers", lambda *_: "")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same(tmp_path, unchecked, variant, dtype):
    transformers = pytest.importorskip("transformers")
    step = write_run(tmp_path / "run", **VARIANTS[variant])
    assert run("--ckpt", step, "--to", tmp_path / "hub", "--dtype", dtype) == 0
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {kind}
    assert ("lm_head.weight" in stored) == (variant != "tied")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(kind)[6:]
    auto = transformers.AutoModelForCausalLM
    assert auto.from_pretrained(tmp_path / "hub", dtype="auto").dtype == kind
    theirs = auto.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    ours = load_model(step)
    for weight in ours.parameters():
        weight.data = weight.data.to(kind).float()
    ids = torch.randint(264, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = ours(ids), theirs(ids).logits
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()
    assert read_config(tmp_path / "hub") == ours.config


def test_shards_with_an_index(tmp_path, unchecked, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    step = write_run(tmp_path / "run")
    assert run("--ckpt", step, "--to", tmp_path / "hub") == 0
    files = sorted((tmp_path / "hub").glob("*.safetensors"))
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and {p.name for p in files} == set(index["weight_map"].values())
    whole = {name: weight for p in files for name, weight in load_file(p).items()}
    assert index["metadata"]["total_size"] == sum(w.numel() * 4 for w in whole.values())
    for state in (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").state_dict(),
                  load_model(tmp_path / "hub").state_dict()):
        for name, weight in load_file(step / "model.safetensors").items():
            assert state[name].equal(weight), name


def test_a_whole_export(tmp_path, capsys):
    pytest.importorskip("transformers")
    write_run(tmp_path / "run", **VARIANTS["linear"])
    words = ("--ckpt", tmp_path / "run", "--to", tmp_path / "models" / "hub", "--dtype=bf16",
             "--license=apache-2.0")
    assert run(*words) == 0
    assert "largest difference of logits" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["hub"]
    card = (tmp_path / "models" / "hub" / "README.md").read_text()
    for part in ("license: apache-2.0", "| data set | code |", "| steps | 7 |", "7,000", "2.25",
                 "arc acc | 0.2500 ± 0.0196 | 0.2 |",
                 "5-gram | 2.5000", "](curve_loss.svg)",
                 "python train.py config/quickstart.py --max_steps=7",
                 'AutoModelForCausalLM.from_pretrained("hub")', "rope_factor", "vllm serve hub",
                 "export.py --ckpt=CHECKPOINT --to=hub.gguf", "ollama create hub -f hub.Modelfile",
                 "llama-completion -m hub.gguf", "| objective | the next token |",
                 '-d \'{"model": "hub", "prompt": "The", "max_tokens": 50}\''):
        assert part in card, part
    assert str(tmp_path) not in card and "trust_remote_code" not in card
    curve = (tmp_path / "models" / "hub" / "curve_loss.svg").read_text()  # to step 7 and no further
    assert [len(path.split()) for path in re.findall('<path d="M([^"]*)h0"', curve)] == [
        8, 8, 7]  # training, its running mean, validation but for that of the first weights


def test_a_flipped_weight_is_caught(tmp_path, monkeypatch, capsys):
    def damaged(tensors, path, metadata=None):
        name = "model.layers.1.mlp.up_proj.weight"
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name][3, 5] *= -1
        save_file(tensors, path, metadata)

    step = write_run(tmp_path / "run")
    monkeypatch.setattr(huggingface, "save_file", damaged)
    assert run("--ckpt", step, "--to", tmp_path / "hub") == 1
    assert "up_proj.weight is not what was written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_transformers_would_compute_otherwise_is_caught(tmp_path, checked_here, monkeypatch,
                                                             capsys):
    pytest.importorskip("transformers")
    step, right = write_run(tmp_path / "run"), config_json
    monkeypatch.setattr(huggingface, "config_json", lambda *args: {
        **right(*args), "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}})
    assert run("--ckpt", step, "--to", tmp_path / "hub") == 1
    assert "its logits differ by" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_without_transformers_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert run("--ckpt", write_run(tmp_path / "run"), "--to", tmp_path / "hub") == 0
    assert "transformers, which is not installed" in capsys.readouterr().out


def test_push(tmp_path, unchecked, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(name)
            return f"hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            calls.append(sorted(p.name for p in Path(folder_path).iterdir()))

    step = write_run(tmp_path / "run")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert run("--ckpt", step, "--to", tmp_path / "a", "--push=me/tiny") == 0
    assert calls == ["me/tiny", ["README.md", "config.json", "curve_loss.svg",
                                 "generation_config.json", "model.safetensors", "tokenizer.json",
                                 "tokenizer_config.json"]]
    Hub.create_repo = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route\nmore"))
    capsys.readouterr()
    assert run("--ckpt", step, "--to", tmp_path / "b", "--push=me/tiny") == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "no route" in said.err and "hf upload me/tiny" in said.err
    assert run("--ckpt", step, "--to", tmp_path / "a b", "--push=me/tiny") == 1
    assert f"hf upload me/tiny '{tmp_path}/a b'" in capsys.readouterr().err
    assert (tmp_path / "b" / "model.safetensors").is_file()


def test_every_text_is_compared(tmp_path, checked_here, monkeypatch):
    """Token ids that the fresh process does not hand over are not taken for equal ones."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(export, "CHECK", export.CHECK.replace('in asked["texts"]', "in []"))
    with pytest.raises(KeyError):
        run("--ckpt", write_run(tmp_path / "run"), "--to", tmp_path / "hub")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_weights_that_are_not_finite_are_not_exported(tmp_path, unchecked):
    step = write_run(tmp_path / "run")
    for value, dtype in ((float("nan"), "fp32"), (float("-inf"), "fp32"), (3.4e38, "bf16")):
        weights = load_file(step / "model.safetensors")
        weights["lm_head.weight"][3, 5] = value
        (step / "checksums.json").unlink(missing_ok=True)
        save_file(weights, step / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"lm_head.weight is not finite in {dtype}"):
            run("--ckpt", step, "--to", tmp_path / "hub", "--dtype", dtype)
        assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_deleted_while_it_is_exported(tmp_path, unchecked, monkeypatch):
    """keep_last=1 in a run that goes on: the newer one is exported, whole."""
    step, load = write_run(tmp_path / "run"), export.load_model
    newer = write_run(tmp_path / "two").rename(step.with_name("newer"))

    def deleted(folder, **keys):
        if newer.exists():
            shutil.rmtree(step)
            newer.rename(step.with_name("step_8"))
        return load(folder)

    monkeypatch.setattr(export, "load_model", deleted)
    assert run("--ckpt", tmp_path / "run", "--to", tmp_path / "hub") == 0
    assert not step.exists() and load_model(tmp_path / "hub").config == load_model(
        step.with_name("step_8")).config


def test_a_place_that_cannot_be_made_is_said_at_once(tmp_path, unchecked, monkeypatch):
    step = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("there/hub")
    (tmp_path / "loop").symlink_to("loop")
    assert run("--ckpt", step, "--to", tmp_path / "link") == 0  # a link to where it shall be
    assert (tmp_path / "there" / "hub" / "model.safetensors").is_file()
    monkeypatch.setattr(checkpoint, "find_checkpoint", lambda _: pytest.fail("not at once"))
    for place in ("file/hub", "loop/hub", "x" * 253):
        with pytest.raises(UserError, match="cannot be made"):
            run("--ckpt", step, "--to", tmp_path / place)


def test_what_lies_beside_the_folder_stays(tmp_path, unchecked):
    """Not ours are X.tmp, be it a folder or a file, nor page.html.tmp; what a killed export left
    is."""
    step = write_run(tmp_path / "run")
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp/notes").write_text("mine")
    for name in ("b.tmp", "page.html.tmp", "page.md.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / f"a{export.UNFINISHED}/half").mkdir(parents=True)
    for name in "ab":
        assert run("--ckpt", step, "--to", tmp_path / name) == 0
    report.main(parse([str(tmp_path / "run"), f"--out={tmp_path}/page.html"], "", report.Flags,
                      "files"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "run", "a", "a.tmp", "b", "b.tmp", "page.html", "page.html.tmp", "page.md", "page.md.tmp",
        "page_loss.svg"}
    assert {path.read_text() for path in [tmp_path / "a.tmp/notes", *tmp_path.glob("*.tmp")]
            if path.is_file()} == {"mine"}


def test_bad_input(tmp_path, unchecked):
    step = write_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    for words, says in (
            (["--to", tmp_path / "full"], "exists and is not empty"),
            (["--to", tmp_path / "full" / "notes"], "exists and is not empty"),
            ([], "--to=DIR"), (["--to=x", "--push=tiny"], "user/name"),
            (["--to", tmp_path / "x", "--ckpt", tmp_path / "full"], "no complete checkpoint")):
        with pytest.raises(UserError, match=says):
            run("--ckpt", step, *words)
    assert (tmp_path / "full" / "notes").read_text() == "mine"
    assert run("--ckpt", step, "--to", tmp_path / "empty") == 0
    (step / "checksums.json").unlink()
    config = json.loads((step / "config.json").read_text()) | {"vocab_size": 200}
    (step / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not belong together"):
        run("--ckpt", step, "--to", tmp_path / "small")
