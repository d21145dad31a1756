"""export.py --code: our own model.py opens through transformers as LlamaForCausalLM would, in a
process that knows nothing of this checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import TINY, run, write_run

from plainllama.files import CHECKOUT
from plainllama.weights.peft import load_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

# In a fresh process elsewhere: what the model computes, before and after save_pretrained.
LOOK = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, out, auto = load_file("ids.safetensors"), {}, AutoModelForCausalLM
model = auto.from_pretrained(sys.argv[1], trust_remote_code=True)
words = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    found = model(input_ids=ids["ids"], labels=ids["labels"])
    out |= {"logits": found.logits, "loss": found.loss.reshape(1)}
    out["padded"] = model(ids["padded"], attention_mask=ids["mask"]).logits
    out["half"] = auto.from_pretrained(sys.argv[1], trust_remote_code=True,
                                       dtype=torch.bfloat16)(ids["ids"]).logits
    out["greedy"] = model.generate(ids["ids"][:, :9], max_new_tokens=8, do_sample=False)
model.save_pretrained("again")
words.save_pretrained("again")
with torch.no_grad():
    out["again"] = auto.from_pretrained("again", trust_remote_code=True)(ids["ids"]).logits
try:
    model(ids["ids"], attention_mask=ids["mask"].flip(1))
except ValueError as error:
    refused = str(error)
try:
    auto.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    untrusted = str(error)
save_file({name: value.contiguous() for name, value in out.items()}, "out.safetensors")
tied = model.lm_head.weight is model.model.embed_tokens.weight
moved = model.to("meta")(ids["ids"].to("meta")).logits.device.type  # the tables go along
print(json.dumps([type(model).__name__, type(model).__module__, "model" in sys.modules,
                  refused, untrusted, tied, model.config.max_position_embeddings,
                  moved]))
"""


@pytest.fixture(scope="module", params=[
    pytest.param({"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 16}, id="llama3"),
    pytest.param({}, id="gqa", marks=pytest.mark.slow), pytest.param(
        {"tie_embeddings": True, "rope_scaling": "linear", "rope_factor": 4.0}, id="tied",
        marks=pytest.mark.slow)])
def opened(request, tmp_path_factory):
    """(folder with --code, the same without, ids, what the fresh process found)."""
    place = tmp_path_factory.mktemp("code")
    export_both(place, **request.param)
    return place, *look(place)


def export_both(place: Path, **changes) -> None:
    """place/code with our code and place/plain without."""
    step = write_run(place / "run", **changes)
    assert run("--ckpt", step, "--to", place / "code", "--code") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.compare_with_transformers", lambda *_: "")
        assert run("--ckpt", step, "--to", place / "plain") == 0


def look(place: Path, packages: Path | None = None) -> tuple[dict, dict, list]:
    """(ids given, tensors found, facts found) of a fresh process in a folder of its own."""
    ids = torch.randint(264, (2, 48), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    given = {"ids": ids, "labels": ids.where(ids % 5 != 0, -100), "mask": mask,
             "padded": ids.where(mask > 0, 7)}
    elsewhere = place / f"elsewhere{len(list(place.iterdir()))}"
    elsewhere.mkdir()
    save_file(given, elsewhere / "ids.safetensors")
    path = {"PYTHONPATH": str(packages)} if packages else {}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(place / "code")], cwd=elsewhere, capture_output=True,
        text=True, env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **path,
                        "HF_MODULES_CACHE": str(elsewhere / "modules"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return given, load_file(elsewhere / "out.safetensors"), json.loads(done.stdout.splitlines()[-1])


def assert_as_llama(place: Path, given: dict, found: dict, facts: list) -> None:
    """All that a process found in place/code is what LlamaForCausalLM makes of place/plain."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "plain")
    with torch.no_grad():
        want = theirs(given["ids"], labels=given["labels"])
        half = transformers.AutoModelForCausalLM.from_pretrained(
            place / "plain", dtype=torch.bfloat16)(given["ids"]).logits.float()
    largest = want.logits.abs().max()
    assert largest > 1
    for name in ("logits", "again"):
        assert (found[name] - want.logits).abs().max() <= 1e-5 * largest, name
    assert found["half"].dtype == torch.bfloat16
    assert (found["half"].float() - half).abs().max() <= 0.05 * largest
    assert found["loss"].item() == pytest.approx(want.loss.item(), rel=1e-5)
    real = given["mask"] > 0
    assert (found["padded"] - want.logits)[real].abs().max() <= 1e-5 * largest
    wanted = theirs.generate(given["ids"][:, :9], max_new_tokens=8, do_sample=False)
    assert torch.equal(found["greedy"], wanted)
    name, module, checkout, refused, untrusted, tied, length, moved = facts
    assert name == "PlainLlamaForCausalLM" and module.startswith("transformers_modules.")
    assert not checkout, "the process imported the model of this checkout"
    assert "pad on the right" in refused and "trust_remote_code" in untrusted and length == 48
    assert tied == theirs.config.tie_word_embeddings and moved == "meta"


def test_it_opens_elsewhere_and_computes_the_same(opened):
    assert_as_llama(*opened)


def test_the_folder(opened):
    place = opened[0]
    config = json.loads((place / "code/config.json").read_text())
    assert config["model_type"] == "plainllama" and config["max_position_embeddings"] == 48
    assert {"modeling_plainllama.py", "model.py"} <= {
        file.name for file in (place / "code").iterdir()}
    source = (CHECKOUT / "plainllama/weights/modeling_plainllama.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 60
    # it is read here like any other folder, also as transformers saved it again
    for folder in (place / "code", next(place.glob("elsewhere*/again"))):
        model = load_model(folder)
        with torch.no_grad():
            again = model(opened[1]["ids"])
        assert (again - opened[2]["logits"]).abs().max() <= 1e-5 * again.abs().max()


def test_lm_eval_reads_its_length(opened):
    """The harness cuts at our context, and scores padded batches as transformers' Llama does."""
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, ("def f(x" * n, " y" * n), n) for n in range(1, 9)]
    values = []
    for folder, code in (("code", True), ("plain", False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_MODULES_CACHE", str(opened[0] / "modules"))
            hf = lm_eval.HFLM(pretrained=str(opened[0] / folder), trust_remote_code=code,
                              device="cpu", dtype="float32", batch_size=4)
        assert hf.max_length == TINY["block_size"] == 48
        values.append([value for value, _ in hf.loglikelihood(requests, disable_tqdm=True)])
    assert values[0] == pytest.approx(values[1], rel=1e-4)
