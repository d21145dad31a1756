"""Configs that must give one curve: what learns, on which documents, by which objective, however it
is cut into micro-batches, ranks and restarts. One table; every new key that changes what is learned
has its line here, and every new way to compute it."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TUNED, documents, metrics, run_script, write_data_set

import train
from plainllama.command import parse

BASE = "--init_from=out/base"
DIALOGS = ("--documents=chat", "--dataset=talk", "--block_size=64", "--global_batch_tokens=512")
PAIRS = (BASE, "--documents=preference", "--dataset=pairs", "--block_size=64",
         "--global_batch_tokens=512", "--max_steps=6")
KINDS = {  # what is learned: its keys
    "text, 50 steps": ("--max_steps=50",),
    "muon": ("--optimizer=muon",),
    "each document alone": ("--doc_mask",),
    "a document in each row": ("--packing=doc",),
    "two sets": ("--mixture={'toy': 0.7, 'other': 0.3}",),
    "dialogs": DIALOGS,
    "LoRA": (BASE, "--lora_r=4"),
    "LoRA beside 4 bits": (BASE, "--lora_r=4", "--frozen_dtype=nf4"),
    "LoRA beside bf16": (BASE, "--lora_r=4", "--frozen_dtype=bf16"),
    "a part": (BASE, "--train_only=last:1,lm_head"),
    "copies of blocks": (BASE, "--expand=concat", "--expand_blocks=2", "--divergence_weight=1"),
    "copies, one weight a token": (BASE, "--expand=hybrid", "--expand_blocks=2",
                                   "--expand_merge=dlerp"),
    "DPO": (*PAIRS, "--objective=dpo"),
    "ORPO": (*PAIRS, "--objective=orpo"),
    "DPO of an adapter": (*PAIRS, "--objective=dpo", "--lora_r=4", "--frozen_dtype=nf4"),
}
WAYS = {  # how it is computed: its keys, and how far losses may lie apart
    "rows one by one": (("--micro_batch=1",), 2e-5),
    "a remainder": (("--micro_batch=3",), 2e-5),
    "blocks computed twice": (("--micro_batch=8", "--activation_checkpointing"), 2e-5),
    "added up in a tree": (("--deterministic", "--micro_batch=1"), 2e-5),
    "attention by its formula": (("--attention=reference",), 2e-5),
    "frozen as it is": (("--frozen_dtype=fp32",), 0.0),
    "resumed": ((), 0.0),
}
SLOW = {
    "compiled": (("--compile=true",), 2e-5),
    "compiled, computed twice": (("--compile=true", "--activation_checkpointing"), 2e-5),
    "two ranks": (("--parallel=ddp",), 2e-5),
    "two ranks, sharded": (("--parallel=fsdp",), 2e-5),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data sets of all kinds, and out/base, a run of eight steps."""
    home = tmp_path_factory.mktemp("curves")
    write_data_set(home / "data/toy", {"train": documents(60), "val": documents(6)})
    write_data_set(home / "data/other", {"train": documents(20), "val": ["0123456789 " * 40] * 4})
    (home / "toy.py").write_text(TUNED + "n_layer = 4\n")
    answers = [{"prompt": f"{i}?", "chosen": f"{i * 7}", "rejected": "no"} for i in range(60)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run("--out_dir=out/base") == 0
        for name, kind in (("talk", "chat"), ("pairs", "preference")):
            rows = answers if name == "pairs" else [
                {"prompt": row["prompt"], "response": row["chosen"]} for row in answers]
            Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            done = run_script("prepare.py", "toy.py", f"--dataset={name}", f"--documents={kind}",
                              f"--sources={name}.jsonl", "--tokenizer=out/base/checkpoints/step_8",
                              "--block_size=64", "--val_fraction=0.1", "--workers=1", cwd=home)
            assert done.returncode == 0, done.stdout + done.stderr
    return home


def run(*words: str) -> int:
    """train.py in this process."""
    return train.main(parse(["toy.py", *words], "", train.Flags))


def curve(name: str) -> list[tuple]:
    """What each step and each evaluation of a run logged, without what time tells."""
    kept = ("loss", "val_loss", "rewards/margins", "divergence/mse")
    by_step = {}
    for row in metrics(Path("out") / name):
        by_step |= {(row["step"], key): row[key] for key in kept if key in row}
    return sorted(by_step.items())


def compared(kind: str, ways: dict, monkeypatch, home: Path) -> None:
    """Run a kind once, and in every way that there is for it."""
    monkeypatch.chdir(home)
    keys = KINDS[kind]
    shutil.rmtree("out/one", ignore_errors=True)
    assert run(*keys, "--out_dir=out/one") == 0
    one = curve("one")
    assert len(one) > 6 and one[-2][1] != one[0][1]
    for way, (others, apart) in ways.items():
        if way.startswith("frozen") and ("--lora_r=4" not in keys or "frozen" in str(keys)):
            continue  # nothing is frozen, or it says how
        if way.endswith("sharded") and "--frozen_dtype=nf4" in keys:
            continue  # which is refused
        shutil.rmtree("out/other", ignore_errors=True)
        words = (*keys, *others, "--out_dir=out/other")
        if way == "resumed":  # from the middle on, once more
            shutil.copytree("out/one", "out/other")
            steps = sorted(Path("out/other/checkpoints").glob("step_*"),
                           key=lambda path: int(path.name[5:]))
            shutil.rmtree(steps[-1])
            Path("out/other/status.json").unlink()
            assert run(*words) == 0
        elif "ranks" in way:
            done = run_script("train.py", "toy.py", *words, "--micro_batch=2", cwd=home,
                              processes=2)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            assert run(*words) == 0
        other = curve("other")
        assert [place for place, _ in other] == [place for place, _ in one], way
        assert [v for _, v in other] == pytest.approx([v for _, v in one], abs=apart, rel=0), way


@pytest.mark.parametrize("kind", KINDS)
def test_one_curve(kind, made, monkeypatch):
    compared(kind, WAYS, monkeypatch, made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_curve_of_ranks_and_compiled(kind, made, monkeypatch):
    compared(kind, SLOW, monkeypatch, made)
