"""Every command of the README and of its chapters is run as it stands there, in order, on configs
made small."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, documents, run_script
from hub_stub import Hub

from model import LLaMA, ModelConfig
from plainllama.parallel import World
from plainllama.tokens import tokenizer
from plainllama.weights.adapters import initialise
from plainllama.weights.huggingface import write_folder

SMALL = """
n_layer = 1
n_head = 2
d_model = 32
d_ff = 48
block_size = 32
global_batch_tokens = 16 * 32
max_steps = 6
eval_interval = 3
eval_tokens = 64
save_interval = 3
sample_tokens = 5
warmup_steps = 2
"""
# What a README may say and a test cannot do, with the reason.
LEFT_OUT = {"make": "test_make_demo_is_the_readme; `make test` is what runs this",
            "python -m pip install": "no network", "python3 -m venv": "there is one",
            "torchrun --nnodes": "needs several machines"}
CHAPTERS = ("README.md", *(f"docs/{name}.md" for name in (
    "text", "pretraining", "dialogs", "preferences", "tables", "adapters", "expansion", "serving",
    "scores", "runs")))
# the lines that must work exactly as written
FOUR = ("python prepare.py", "torchrun --nproc_per_node=8 train.py config/llama100m.py",
        "python sample.py --ckpt out/", "python eval.py")
SLOW = r"torchrun|python (export|eval)\.py|python prepare\.py$|.*--sources=hf:|.*--prompts"


def commands() -> list[str]:
    """The commands in the blocks (indented lines), without comments, in their order, each once."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in CHAPTERS)
    lines = [line.strip().split("  #")[0].strip() for line in text.split("\n")
             if line.startswith("    ")]
    return [line for line in dict.fromkeys(lines)
            if re.match(r"(make|python3?|torchrun|git|tensorboard) ", line)]


def place(folder: Path) -> dict:
    """A checkout whose configs are small, with a user's own text beside it; an environment."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in (*ROOT.glob("*.py"), ROOT / "runs", ROOT / "plainllama"):
        (folder / path.name).symlink_to(path)
    (folder / "config").mkdir()
    for path in (ROOT / "config").glob("*.py"):
        small = SMALL if not re.search(r"^base = ", path.read_text(), re.MULTILINE) else ""
        (folder / "config" / path.name).write_text(path.read_text() + small)
    quick = folder / "config/quickstart.py"
    quick.write_text(quick.read_text() + "sources = [{'path': 'embedded', 'max_documents': 25}]\n"
                     "tokenizer = 'bpe:400'\n")
    chat = folder / "config/chat.py"
    chat.write_text(chat.read_text() + "block_size = 512\nglobal_batch_tokens = 4 * 512\n"
                    "sources = [{'path': 'embedded:chat', 'slice': ':200'}]\n")
    pairs = folder / "config/dpo.py"
    pairs.write_text(pairs.read_text() + "block_size = 512\nglobal_batch_tokens = 2 * 512\n"
                     "sources = [{'path': 'embedded:preference', 'slice': ':100'}]\n")
    bank = folder / "config/transactions.py"
    bank.write_text(bank.read_text() + "block_size = 512\nglobal_batch_tokens = 2 * 512\n")
    large = folder / "config/llama100m.py"
    large.write_text(large.read_text() + "tokenizer = 'bpe:400'\nval_fraction = 0.1\n")
    adapted = folder / "config/lora_8b.py"
    adapted.write_text(adapted.read_text() + "n_kv_head = 0\nglobal_batch_tokens = 256\n")
    rows = [f'{{"prompt": "Hi {i}", "response": "Yes."}}\n' for i in range(60)]
    (folder / "my.jsonl").write_text("".join(rows))
    llama, words = folder / "models/Llama-3-8B", tokenizer.make_tokenizer("bytes")
    llama.mkdir(parents=True)
    words.save(llama)
    with torch.device("meta"):
        model = LLaMA(ModelConfig(1, 2, 32, 48, words.vocab_size, 32, rope_theta=500000.0))
    World().place(model, torch.float32)
    initialise(model, 1, World().piece)
    write_folder(llama, model.config, dict(model.named_parameters()), llama / "tokenizer.json")
    (llama.parent / "Llama-3-8B-Instruct").symlink_to(llama)
    (folder / "rows.jsonl").write_text('{"id": 1, "text": "paid 5"}\n' * 3)
    (folder / "rewrite.txt").write_text("Anew: {text}")
    (folder / "kept.jsonl").write_text("".join(
        json.dumps({"completion": text}) + "\n" for text in documents(300)))
    (folder / "my.txt").write_text("\n".join(documents(300)))
    question = '{"question": "What is 1 + 1?", "choices": ["1", "2"], "answer": 1}\n'
    (folder / "questions.jsonl").write_text(question * 3)
    (folder / "prompts.jsonl").write_text('{"prompt": "def "}\n' * 5)
    (folder / "examples.jsonl").write_text(question)
    (folder / "test.jsonl").write_text('{"en": "a cat", "de": "eine Katze"}\n' * 2)
    (folder / "calls.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "1 + 1?"}], "tools": [{"type": "function", "function": {
            "name": "add", "parameters": {"type": "object", "properties": {}}}}],
        "reference": {"role": "assistant", "tool_calls": [{"type": "function", "function": {
            "name": "add", "arguments": "{}"}}]}}) + "\n")
    clients = pa.table({"client_id": range(120), "emb_0001": [i % 7 + i % 2 for i in range(120)]})
    pq.write_table(clients, folder / "clients.parquet")
    (folder / "clients.jsonl").write_text("".join(
        f'{{"client_id": {i}, "prompt": "x{i}"}}\n' for i in range(9)))
    for name, column, last in (("labels", ",bins", 120), ("sums", ",sum", 120), ("test", "", 20)):
        lines = [f"{i}{f',{i % 2}' if column else ''}\n" for i in range(last)]
        (folder / f"{name}.csv").write_text(f"client_id{column}\n{''.join(lines)}")
    (folder / "bin").mkdir()
    for name, words in (("python", sys.executable), ("torchrun", f"{sys.executable} -m "
                                                     "torch.distributed.run")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_command_of_the_readme(tmp_path, full):
    """`full` starts each as its user does, and adds those that take long to load: torchrun, the
    hub's libraries, transformers."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    env, sink = place(tmp_path), pa.BufferOutputStream()
    pq.write_table(pa.table({"text": documents(400)}), sink)
    files = {"data/train-00000-of-00001.parquet": sink.getvalue().to_pybytes()}
    ran = []
    with Hub({"ashaba1in/small_openwebtext": files}) as hub:
        for line in commands():
            if any(line.startswith(words) for words in LEFT_OUT):
                continue
            if not full and re.match(SLOW, line):
                continue
            # two processes where the README has a machine's eight
            words = shlex.split(line.replace("--nproc_per_node=8", "--nproc_per_node=2"))
            if words[0] == "python" and words[1].endswith(".py") and not full:
                done = run_script(*words[1:], cwd=tmp_path, env=env)
            else:
                done = subprocess.run(words, cwd=tmp_path, env={**env, "HF_ENDPOINT": hub.url},
                                      capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
            ran.append(line)
    assert not full or set(FOUR) <= set(ran)
    assert len(ran) >= (12 if full else 7)


def test_make_demo_is_the_readme():
    """The lines of `make demo` are those that the README gives without make."""
    done = subprocess.run(["make", "-n", "-o", ".venv/.core", "VENV=.venv", "demo"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    lines = [line.replace(".venv/bin/python", "python") for line in done.stdout.split("\n")
             if line.startswith(".venv/bin/python")]
    assert len(lines) == 5
    for line in lines:
        assert shlex.split(line) in [shlex.split(one) for one in commands()], line


def test_what_the_readme_names_is_there():
    known = {path.name for folder in ("config", "bench", "runs", "plainllama", "tests")
             for path in (ROOT / folder).rglob("*.py")} | {path.name for path in ROOT.glob("*.py")}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for _, link in re.findall(r"\[([^]]*)\]\(([^)]+)\)", text):
            if link.startswith("#"):
                assert f"\n## {link[1:].replace('-', ' ')}\n" in text.lower(), (page, link)
            else:
                assert "://" in link or (page.parent / link).exists(), (page, link)
        for name in re.findall(r"`(?:config/)?(\w+\.py)`", text):
            assert name in known, (page, name)
