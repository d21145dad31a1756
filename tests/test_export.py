"""export.py: what is written opens in transformers and is the model; what is not is refused."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import report
from model import LLaMA, ModelConfig
from plainllama.command import parse
from plainllama.files import write_json
from plainllama.settings import UserError, install
from plainllama.tokens.chat import TEMPLATE, with_roles
from plainllama.tokens.tokenizer import Tokenizer, make_tokenizer
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


# ---- the pieces by direct calls

def test_flags_are_off_unless_they_are_said():
    assert vars(export.Flags()) == {
        "ckpt": "out", "to": "", "type": "", "verify": False, "dtype": "fp32", "code": False,
        "merge": False, "original": False, "adapter": False, "base": "", "merge_back": False,
        "license": "", "push": ""}


GIVEN = "leave out --merge, --original, --code and --dtype"
UNPUSHED = "--push takes user/name, not "


@pytest.mark.parametrize(("words", "message"), [
    ([], "name the folder to write with --to=DIR, or a file with --to=M.gguf, and the model in "
     "front: export.py out/RUN --to=DIR"),
    (["--to=run/checkpoints/x"], "--to run/checkpoints/x lies among a run's checkpoints; name "
     "another place"),
    (["--to=run/checkpoints/step_7/x"], "--to run/checkpoints/step_7/x lies among a run's "
     "checkpoints; name another place"),
    (["--to=x", "--license=a b"], "--license takes a name such as apache-2.0, not 'a b'"),
    (["--to=x", "--type=f16"], "--type is for a .gguf; a folder has --dtype, and is always "
     "checked"),
    (["--to=x", "--type=f16", "--verify"], "--type is for a .gguf; a folder has --dtype, and is "
     "always checked"),
    (["--to=x", "--verify"], "--verify is for a .gguf; a folder has --dtype, and is always "
     "checked"),
    (["--to=run"], "--to run exists and is not empty; name a new folder"),
    (["--to=file"], "--to file exists and is not empty; name a new folder"),
    *((["--to=x", "--adapter", word], "--adapter writes the adapter as it is, in fp32; " + GIVEN)
      for word in ("--merge", "--original", "--code", "--dtype=bf16")),
    (["--to=x", "--push=a"], UNPUSHED + "'a'"), (["--to=x", "--push=a/b/c"], UNPUSHED + "'a/b/c'"),
    (["--to=x", "--push=a/b"], "--push needs huggingface_hub: "),
    (["--to=m.gguf", "--dtype=bf16"], "--dtype is for a folder; of a .gguf say --type=bf16"),
    *((["--to=m.gguf", word], f"{word.partition('=')[0]} has no effect on a .gguf, which is one "
       "whole model, an adapter merged; leave it away")
      for word in ("--adapter", "--code", "--push=a/b")),
    *((["--to=x", word], f"{word} is for a run that trained an adapter, STEP is a whole model; "
       f"leave {word} away") for word in ("--merge", "--original", "--adapter")),
    (["--to=x", "--merge_back"], "--merge_back has no effect: STEP has no copies of blocks; leave "
     "it away")])
def test_what_is_asked_wrong_is_said_whole(tmp_path, unchecked, monkeypatch, words, message):
    step = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    if "huggingface_hub" in message:
        monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        run("--ckpt", step, *words)
    assert str(caught.value).removesuffix(install("hf")) == message.replace("STEP", str(step))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file"}


def test_what_was_written_is_said_whole(tmp_path, unchecked, monkeypatch, capsys):
    step, written = write_run(tmp_path / "run"), []
    real = export.write_folder
    monkeypatch.setattr(export, "write_folder", lambda *words: written.append(words) or real(
        *words))
    monkeypatch.chdir(tmp_path)
    assert run("--ckpt", step, "--to=hub", "--dtype=bf16") == 0
    assert capsys.readouterr().out.endswith("35,488 parameters as bf16 -> hub\n")
    assert written[0][4:] == (torch.bfloat16, 5_000_000_000)  # bytes of a shard
    card = Path("hub/README.md").read_text()
    assert "\nA LLaMA of 35,488 parameters (18,592 without embeddings)" in card


def test_an_export_that_is_not_right_is_removed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    step = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "compare_with_transformers", lambda *_: "planted")
    monkeypatch.setattr(export.gguf, "compare", lambda *_: "planted")
    for place in ("hub", "m.gguf"):
        assert run("--ckpt", step, f"--to={place}") == 1
        said = capsys.readouterr()
        assert "the export was not right and is removed: planted" in said.err
        assert "->" not in said.out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_for_llama_cpp(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    step = write_run(tmp_path / "run")
    there = [step, *step.rglob("*")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export.llama_cpp, "is_installed", lambda: False)
    made, real = [], export.gguf.write_gguf
    monkeypatch.setattr(export.gguf, "write_gguf", lambda *words: made.append(words) or real(
        *words))
    for word, kind in (("", "f32"), ("--type=f16", "f16")):
        assert run("--ckpt", step, f"--to=deep/{kind}.gguf", *[word] * bool(word)) == 0
        assert capsys.readouterr().out.endswith(
            f"35,488 parameters as {kind} -> deep/{kind}.gguf; Ollama: {kind}.Modelfile\n")
        assert made[-1][3:] == ("", kind, "run", "")
        assert Path(f"deep/{kind}.Modelfile").read_text() == export.gguf.modelfile(
            f"{kind}.gguf", load_model(step).config, "")
    assert len(list(Path("deep").iterdir())) == 4 and [step, *step.rglob("*")] == there
    with pytest.raises(UserError, match=r"--verify needs the package xllamacpp"):
        run("--ckpt", step, "--to=n.gguf", "--verify")
    for name in ("deep/f32.gguf", "deep/f16.gguf"):
        with pytest.raises(UserError, match=f"{name} exists; name a new file"):
            run("--ckpt", step, "--to", name)
    Path("deep/f32.gguf").unlink()
    with pytest.raises(UserError, match=r"deep/f32.Modelfile exists; name a new file"):
        run("--ckpt", step, "--to=deep/f32.gguf")
    Path("file").write_text("mine")
    with pytest.raises(UserError, match=r"--to .*/file/m.gguf cannot be made: .*; name another$"):
        run("--ckpt", step, "--to=file/m.gguf")
    # with --verify on held-out text, if there is some, and a first problem is the one that counts
    asked, rows = [], SimpleNamespace(rows="rows", bos_id=256)
    monkeypatch.setattr(export.llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(export.llama_cpp, "verify", lambda *words: asked.append(words[3:]) or "")
    monkeypatch.setattr(export, "held_out", lambda flags, source, size, what: (
        rows, 9) if what == "the file" and size == 48 and held else None)
    monkeypatch.setattr(export.expansion, "first_tokens", lambda *words: asked.append(words) or (
        torch.tensor([[5, 6], [7, 8]]), "targets"))
    for held in (True, False):
        assert run("--ckpt", step, f"--to=v{held}.gguf", "--verify") == 0
    assert asked[0] == ("rows", 256) and asked[1][1].tolist() == [5, 6, 7, 8]
    assert asked[1][::2] == asked[2][::2] == ("f32", True) and asked[2][1] is None
    monkeypatch.setattr(export.llama_cpp, "verify", lambda *_: "planted")
    assert run("--ckpt", step, "--to=w.gguf") == 1 and not Path("w.gguf").exists()
    weights = load_file(step / "model.safetensors")
    weights["lm_head.weight"][3, 5] = float("nan")
    (step / "checksums.json").unlink()
    save_file(weights, step / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight is not finite; export another step"):
        run("--ckpt", step, "--to=x.gguf")


def test_a_folder_with_our_code_is_the_model(tmp_path, unchecked, monkeypatch):
    """Opened as transformers opens it, from the files of the folder."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    step = write_run(tmp_path / "run")
    assert run("--ckpt", step, "--to", tmp_path / "hub", "--code") == 0
    assert {"model.py", "modeling_plainllama.py"} <= {
        path.name for path in (tmp_path / "hub").iterdir()}
    monkeypatch.setitem(sys.modules, "plainllama.weights.model", sys.modules["model"])
    from plainllama.weights import modeling_plainllama as ours

    config = ours.PlainLlamaConfig(**json.loads((tmp_path / "hub/config.json").read_text()))
    model = ours.PlainLlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(tmp_path / "hub/model.safetensors"))
    assert isinstance(model, transformers.PreTrainedModel)
    ids = torch.randint(264, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.rand(2, 9, generator=torch.Generator().manual_seed(2)) < 0.4, -100,
                         ids)
    with torch.no_grad():
        wanted = load_model(step)(ids)
        found = model(ids)
        assert found.loss is None and torch.allclose(found.logits, wanted, atol=1e-5)
        losses = [-wanted[row, at].log_softmax(-1)[labels[row, at + 1]] for row in range(2)
                  for at in range(8) if labels[row, at + 1] >= 0]
        found = model(ids, labels=labels)
        assert found.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        right = torch.ones(2, 9, dtype=torch.long)
        right[1, 1:] = 0
        assert model(ids, attention_mask=right).logits.equal(found.logits)
        for mask in (1 - right.roll(1, 1), torch.tensor([[1] * 9, [0] + [1] * 8])):
            with pytest.raises(ValueError, match="pad on the right"):
                model(ids, attention_mask=mask)
        moved = []
        monkeypatch.setattr(model.core, "reset_derived", moved.append)
        model(ids)
        assert moved == []
        model.core.rope_cos = model.core.rope_cos.to("meta")
        with pytest.raises(Exception):  # noqa: B017  it stays there: reset_derived does nothing
            model(ids)
        assert moved == [ids.device]
    assert model.prepare_inputs_for_generation(ids, attention_mask=1, cache_position=2) == {
        "input_ids": ids, "attention_mask": 1}


def told(tmp_path, monkeypatch, kind="adapter", frozen="fp32", expand="none") -> Path:
    """A checkpoint of which peft would say this."""
    monkeypatch.setattr(export.peft, "is_adapter", lambda source: kind == "adapter")
    monkeypatch.setattr(export.peft, "read_adapter", lambda source: SimpleNamespace(
        frozen_dtype=frozen))
    monkeypatch.setattr(export.peft, "whole_config", lambda *_: SimpleNamespace(expand=expand))
    return tmp_path / "step"


def flags_of(*words) -> export.Flags:
    return parse(list(words), "", export.Flags, "model").flags


@pytest.mark.parametrize(("words", "said", "message"), [
    ([], {}, ""), (["--merge"], {}, ""), (["--adapter"], {}, ""), ([], {"kind": "whole"}, ""),
    (["--original"], {"frozen": "nf4"}, ""),
    (["--original"], {}, "--original has no effect: the base of STEP was held as it is; leave it "
     "away"),
    (["--merge"], {"kind": "whole"}, "--merge is for a run that trained an adapter, STEP is a "
     "whole model; leave --merge away"),
    (["--merge_back"], {}, "--merge_back has no effect: STEP has no copies of blocks; leave it "
     "away"),
    (["--merge_back"], {"expand": "stack"}, "--merge_back has no effect: STEP has copies behind "
     "their blocks alone; leave it away"),
    ([], {"expand": "stack"}, ""), (["--merge_back"], {"expand": "concat"}, ""),
    (["--merge_back"], {"expand": "hybrid"}, ""),
    *(([], {"expand": kind}, f"STEP has copies beside its blocks (expand={kind}), which no other "
       "program knows; --merge_back interpolates the weights of both into a plain model, and says "
       "what that costs") for kind in ("concat", "hybrid"))])
def test_flags_for_another_kind_of_checkpoint(tmp_path, monkeypatch, words, said, message):
    step = told(tmp_path, monkeypatch, **said)
    if not message:
        assert export.refuse_unfit(flags_of(*words), step) is None
        return
    with pytest.raises(UserError) as caught:
        export.refuse_unfit(flags_of(*words), step)
    assert str(caught.value) == message.replace("STEP", str(step))


def test_how_a_base_is_held(tmp_path, monkeypatch):
    for kind, frozen, held in (("adapter", "nf4", "nf4"), ("adapter", "fp32", "fp32"),
                               ("whole", "nf4", "fp32")):
        assert export.held_as(told(tmp_path, monkeypatch, kind, frozen)) == held


@pytest.mark.parametrize(("held", "copies", "steps", "said"), [
    ("fp32", False, [], ""), ("nf4", False, ["merge", "compare"], "compared"),
    ("fp32", True, ["plain"], "copied"), ("nf4", True, ["merge", "compare", "plain"], "copied")])
def test_a_checkpoint_as_a_plain_model(monkeypatch, capsys, held, copies, steps, said):
    done, model = [], SimpleNamespace(config=SimpleNamespace(expand_blocks=copies))
    monkeypatch.setattr(export, "refuse_unfit", lambda *_: None)
    monkeypatch.setattr(export, "held_as", lambda _: held)
    monkeypatch.setattr(export, "load_model", lambda source, base, original: model)
    monkeypatch.setattr(export.peft, "tokenizer_folder", lambda *words: words)
    monkeypatch.setattr(export.adapters, "merge", lambda _: done.append("merge"))
    monkeypatch.setattr(export, "compare_merges", lambda *_: done.append("compare") or "compared")
    monkeypatch.setattr(export, "without_copies", lambda *_: done.append("plain") or (
        "plain", "copied"))
    found = export.plain_model(flags_of("--base=b"), "source")
    assert found == ("plain" if copies else model, said, ("source", "b")) and done == steps
    assert capsys.readouterr().out == (f"{said}\n" if said else "")


def test_held_out_text_of_a_run(tmp_path, monkeypatch, capsys):
    step = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(export, "validation_rows", lambda *words: asked.append(words) or "rows")
    monkeypatch.setattr(export, "byte_info", lambda data: f"info of {data}")

    def held(**config):
        info = json.loads((tmp_path / "run" / "run.json").read_text())
        info["config"] = config
        write_json(tmp_path / "run" / "run.json", info)
        return export.held_out(flags_of(), step, 48)

    assert export.held_out(flags_of(), tmp_path / "elsewhere", 48, "the file") is None
    assert held(dataset="set") is None and held(dataset="") is None
    assert capsys.readouterr().out == "".join(
        f"{what} is not compared on held-out text: data/{name} is not here\n" for what, name in (
            ("the file", "of no run"), ("what is merged", "set"), ("what is merged", "of no run")))
    (tmp_path / "data/set").mkdir(parents=True)
    (tmp_path / "data/set/manifest.json").write_text("{}")
    make_tokenizer("bytes").save(tmp_path / "data/set")
    found, tokens = held(dataset="set", doc_mask=True, eval_tokens=10**9)
    assert (found.rows, found.info, found.bos_id, tokens) == ("rows", "info of data/set", 256,
                                                              65_536)
    assert asked == [(Path("data/set"), step, 48)]
    found, tokens = held(dataset="set", doc_mask=False, eval_tokens=99)
    assert (found.bos_id, tokens) == (None, 99) and capsys.readouterr().out == ""


def test_what_merging_costs_is_said(monkeypatch):
    """Each of both ways is measured, whichever is exported."""
    held = SimpleNamespace(rows="rows", info="info", bos_id=5), 1234
    monkeypatch.setattr(export, "held_out", lambda *_: held)
    monkeypatch.setattr(export, "evaluate", lambda model, rows, info, tokens, batch, world, bos: {
        "val_loss": {"as held": 1.25, "own": 1.5}[model]} if (rows, info, tokens, bos) == (
            "rows", "info", 1234, 5) else None)
    monkeypatch.setattr(export, "load_model", lambda source, base, original: (
        "own" if original else "as held"))
    monkeypatch.setattr(export.adapters, "merge", lambda model: model)
    model = SimpleNamespace(config=SimpleNamespace(block_size=48))
    for words, this, here in (([], "as held", "the base as it was held"),
                              (["--original"], "own", "--original")):
        class Model(str):
            config = model.config
        said = export.compare_merges(flags_of(*words), "source", Model(this), "nf4")
        assert said == ("validation loss on 1,234 tokens, merged onto the base as it was held, in "
                        "nf4: 1.2500 nats; onto the base's own weights (--original): 1.5000; this "
                        f"is {here}")
    held = None
    assert export.compare_merges(flags_of(), "source", model, "nf4") == "onto the base in nf4"
    assert export.compare_merges(flags_of("--original"), "source", model, "nf4") == (
        "onto the original base")


def test_what_merging_back_costs_is_said(monkeypatch):
    block = SimpleNamespace(expansion=SimpleNamespace(mix_bias=torch.tensor(0.0)))
    held, made = (SimpleNamespace(rows="rows", bos_id=5), 1234), []
    monkeypatch.setattr(export, "held_out", lambda *_: held)
    monkeypatch.setattr(export, "loss_of", lambda model, held, tokens: 1.5 if model == "plain"
                        else 1.25)
    monkeypatch.setattr(export.expansion, "first_tokens", lambda rows, bos: (rows, bos))
    monkeypatch.setattr(export.expansion, "look", lambda model, batch: {
        3: {"expansion_share": 0.75}} if batch == ("rows", 5) else None)
    monkeypatch.setattr(export.expansion, "plain", lambda model, shares: made.append(
        shares) or "plain")
    model = SimpleNamespace(config=SimpleNamespace(block_size=48))

    def without(blocks):
        monkeypatch.setattr(export.expansion, "merging", lambda _: blocks)
        return export.without_copies(flags_of(), "source", model)

    assert without({3: block}) == ("plain", "validation loss on 1,234 tokens, expanded: 1.2500 "
                                   "nats; merged back: 1.5000")
    assert without({}) == ("plain", "")
    held = None
    assert without({3: block}) == ("plain", "copies were interpolated with their blocks")
    assert without({}) == ("plain", "") and made == [{3: 0.75}, {}, {3: 0.5}, {}]


def test_an_adapter_alone(tmp_path, monkeypatch):
    step, to = told(tmp_path, monkeypatch), tmp_path / "to"
    (step / "training").mkdir(parents=True), to.mkdir()
    for name in ("checksums.json", "tokenizer.json", "training/state.json"):
        (step / name).write_text(name)
    save_file({"base.model.layers.0.a": torch.zeros(2, 3), "base.lm_head.a": torch.zeros(5)},
              step / export.peft.WEIGHTS)
    cards = []
    monkeypatch.setattr(export, "described", lambda config: "described")
    monkeypatch.setattr(export, "card", lambda *words: cards.append(words[3:]) or "the card")
    assert export.write(flags_of("--adapter"), to, step) == (11, "")
    assert {path.name for path in to.iterdir()} == {"tokenizer.json", export.peft.WEIGHTS,
                                                    "README.md"}
    assert (to / "README.md").read_text() == "the card" and cards == [("described", (11, 6))]


@pytest.mark.parametrize(("change", "message"), [
    ({}, ""), ({"off": 0.9e-4}, ""),
    ({"off": 1.2e-4}, "its logits differ by 1.2e-04 of the largest, allowed are 1e-04"),
    ({"off": float("nan")}, "its logits differ by nan of the largest, allowed are 1e-04"),
    ({"code": 3}, "transformers cannot open it: no such class"),
    ({"ids": [1, 2]}, "its tokenizer reads '  two  spaces ' as [1, 2], ours does not"),
    ({"weight": 1}, "model.norm.weight is not what was written")])
def test_what_transformers_says_is_compared(tmp_path, monkeypatch, capsys, change, message):
    step, asked = write_run(tmp_path / "run", block_size=130), []
    model, tokenizer = load_model(step), Tokenizer.load(step)

    def answer(words, cwd, env, capture_output, text):
        assert capture_output and text and env["HF_HUB_OFFLINE"] == "1" and env["PATH"]
        asked.append(json.loads(words[4]))
        with torch.no_grad():
            logits = model(torch.tensor(asked[-1]["ids"]))
        logits[0, 0, 0] += change.get("off", 0) * logits.abs().max()
        save_file({"logits": logits}, f"{cwd}/logits.safetensors")
        ids = {text: [256, *tokenizer.encode(text)] for text in asked[-1]["texts"]}
        if "ids" in change:
            ids["  two  spaces "] = change["ids"]
        write_json(Path(cwd, "ids.json"), ids)
        return SimpleNamespace(returncode=change.get("code", 0), stderr=" no such class\n")

    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(export, "subprocess", SimpleNamespace(run=answer))
    if "weight" in change:
        model.model.norm.weight.data += 1
    assert export.compare_with_transformers(model, tokenizer, step, True) == message
    if asked:
        ids = torch.tensor(asked[0]["ids"])
        assert ids.shape == (2, 128) and ids.max() < 264 and asked[0]["code"] is True
        assert "" in asked[0]["texts"]


def test_what_is_pushed(monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))
            return f"hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(hub, "HfApi", Hub)
    assert export.push("folder", "a/b") == 0
    assert calls == [("a/b", True), ("a/b", "folder")]
    assert capsys.readouterr().out == "uploaded to hub/a/b\n"
