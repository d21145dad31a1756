"""A checkpoint -> a Hugging Face folder that transformers, vLLM and others open as it is.

  export.py --ckpt=out/RUN --to=DIR [--dtype=bf16] [--code] [--push=user/name]

The folder gets config.json, generation_config.json, the weights (in shards above 5 GB), the
tokenizer and a model card. Before it gets its name, the weights in it are compared with the
model's bit by bit, and a fresh Python process opens it with transformers elsewhere: logits and
token ids must be ours. --code adds our own model.py, which then opens with trust_remote_code=True;
without it the folder is transformers' LlamaForCausalLM and needs no code. --push uploads it to the
Hugging Face hub, once everything here is done.
"""

from dataclasses import asdict, dataclass

from plainllama import settings
from plainllama.command import complain, parse_arguments, run_command
from plainllama.files import CHECKOUT, read_json, sync, write_json
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What export.py takes."""

    ckpt: str = key("out", "a checkpoint, a run (its newest step) or a folder of runs (the newest)")
    to: str = key("", "the folder to write; it must be new or empty")
    dtype: str = key("fp32", "of the weights in the folder", ("fp32", "bf16"))
    code: bool = key(False, "with our model.py, to be opened with trust_remote_code=True")
    license: str = key("", "for the model card, such as apache-2.0")
    push: str = key("", "user/name on the hub to upload to (after `hf auth login`)")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import LLaMA
from plainllama.parallel import World
from plainllama.report.card import card
from plainllama.tokens.tokenizer import SAMPLE, Tokenizer
from plainllama.tokens.tokenizer_json import write_hf_files
from plainllama.weights import checkpoint
from plainllama.weights.huggingface import (
    config_json,
    load_model,
    load_weights,
    read_config,
    write_weights,
)

CODE = ("model.py", "plainllama/weights/modeling_plainllama.py")  # imported by their last names
SHARD_BYTES = 5_000_000_000
TOLERANCE = 1e-4  # largest difference of logits in fp32, as a share of the largest logit
# Run by a fresh Python process: arguments are the folder and a place for questions and answers.
CHECK = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, place, code = sys.argv[1], Path(sys.argv[2]), len(sys.argv) > 3
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=code).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
with torch.no_grad():
    logits = model(load_file(place / "ids.safetensors")["ids"]).logits
save_file({"logits": logits.contiguous()}, place / "logits.safetensors")
texts = json.loads((place / "texts.json").read_text())
ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
(place / "theirs.json").write_text(json.dumps(ids))
"""
TEXTS = [SAMPLE, "", " ", "Once upon a time", "  two  spaces ", "\n\n\tif x == 1:\n\t\treturn",
         "naïve café 北京 😀👩‍👩‍👧 ½", "<s>[INST] text that spells specials </s><|endoftext|>"]


def write_code(folder: Path, model: LLaMA) -> None:
    """Our model beside the weights, and where config.json says that it is."""
    for name in CODE:
        shutil.copyfile(CHECKOUT / name, folder / Path(name).name)
    where = "modeling_plainllama.PlainLlama"
    write_json(folder / "config.json", read_json(folder / "config.json") | {
        "model_type": "plainllama", "architectures": ["PlainLlamaForCausalLM"],
        "plainllama": asdict(model.config),
        "auto_map": {"AutoConfig": f"{where}Config",
                     "AutoModelForCausalLM": f"{where}ForCausalLM"}})


def compare_with_transformers(model: LLaMA, tokenizer: Tokenizer, folder: Path,
                              code: bool = False) -> str:
    """Open `folder` with transformers in a fresh process and compare; what differs, or ''."""
    again = LLaMA(model.config)
    load_weights(folder, again, World())
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        if not torch.equal(ours, theirs):
            return f"{name} is not what was written"
    del again
    if importlib.util.find_spec("transformers") is None:
        print("NOT checked against transformers, which is not installed; for that export into a "
              f"new folder after: {settings.install('hf')}")
        return ""
    ids = torch.randint(model.config.vocab_size, (2, min(model.config.block_size, 128)),
                        generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as elsewhere:
        place = Path(elsewhere)
        save_file({"ids": ids}, place / "ids.safetensors")
        (place / "texts.json").write_text(json.dumps(TEXTS))
        done = subprocess.run([sys.executable, "-c", CHECK, str(folder.absolute()), elsewhere,
                               *["code"] * code],
                              cwd=elsewhere, env={**os.environ, "HF_HUB_OFFLINE": "1",
                                                 "HF_MODULES_CACHE": str(place / "modules")},
                              capture_output=True, text=True)
        if done.returncode:
            return f"transformers cannot open it: {done.stderr.strip()[-2000:]}"
        logits = load_file(place / "logits.safetensors")["logits"]
        their_ids = json.loads((place / "theirs.json").read_text())
    with torch.inference_mode():
        wanted = model(ids)
    share = ((wanted - logits).abs().max() / wanted.abs().max()).item()
    print(f"checked with transformers: largest difference of logits {share:.1e} of the largest")
    if not share <= TOLERANCE:  # nan too
        return f"its logits differ by {share:.1e} of the largest, allowed are {TOLERANCE:.0e}"
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text, found in zip(TEXTS, their_ids, strict=True):
        if found != begin + tokenizer.encode(text):
            return f"its tokenizer reads {text[:40]!r} as {found[:12]}, not as ours does"
    return ""


def push(folder: Path, name: str) -> int:
    """Upload the folder; what fails there leaves it as it is."""
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # no network, no login, no rights: the library has many kinds
        reason = str(error).strip().split("\n")[0]
        return complain(f"{folder} is complete, but was not uploaded to {name}: {reason}; "
                                 f"try again with: hf upload {name} {folder}", 1)
    print(f"uploaded to {url}")
    return 0


def main(command) -> int:
    """Write the folder under a temporary name, check it, rename it, upload it."""
    flags, final = command.flags, Path(command.flags.to)
    if command.files or not flags.to:
        raise UserError("name the folder to write with --to=DIR and the model with --ckpt")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"--to {final} exists and is not empty; name a new folder")
    if flags.push and flags.push.count("/") != 1:
        raise UserError(f"--push takes user/name, not {flags.push!r}")
    if flags.push and importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("--push needs huggingface_hub: " + settings.install("hf"))
    source = checkpoint.find_checkpoint(flags.ckpt)
    tokenizer, config = Tokenizer.load(source), read_config(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{source}: its tokenizer has {tokenizer.vocab_size} entries, the model's "
                        f"embedding only {config.vocab_size}; they do not belong together")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[flags.dtype]
    model = load_model(source)
    for weight in model.parameters():
        weight.data = weight.data.to(kind).float()  # from here on the model holds what is exported
    folder = final.absolute().with_name(final.absolute().name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir(parents=True)
    try:
        end = tokenizer.stop_ids[0] if tokenizer.stop_ids else None
        dtypes = dict.fromkeys(("torch_dtype", "dtype"), str(kind).removeprefix("torch."))
        write_json(folder / "config.json", {
            **config_json(config, tokenizer.bos_id, end), **dtypes})
        write_json(folder / "generation_config.json",
                              {"bos_token_id": tokenizer.bos_id, "eos_token_id": end})
        write_hf_files(source / "tokenizer.json", folder, config.block_size)
        write_weights(model, folder, kind, SHARD_BYTES)
        if flags.code:
            write_code(folder, model)
        (folder / "README.md").write_text(card(model, source, flags, folder), encoding="utf-8")
        if wrong := compare_with_transformers(model, tokenizer, folder, flags.code):
            return complain(f"the export was not right and is removed: {wrong}", 1)
        for path in [*folder.iterdir(), folder]:
            sync(path)
        os.rename(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{model.parameter_counts()[0]:,} parameters as {flags.dtype} -> {final}")
    return push(final, flags.push) if flags.push else 0


if __name__ == "__main__":
    run_command(main, COMMAND)
