"""A checkpoint -> a Hugging Face folder that transformers, vLLM and others open as it is, or one
.gguf file for llama.cpp and Ollama.

  export.py out/RUN --to=DIR [--dtype=bf16] [--code] [--push=user/name]
  export.py --ckpt=out/ADAPTER --to=DIR [--merge [--original] | --adapter] [--base=FOLDER]
  export.py --ckpt=out/EXPANDED --to=DIR [--merge_back]
  export.py --ckpt=out/RUN --to=M.gguf [--type=q8_0] [--verify]

The folder gets config.json, generation_config.json, the weights (in shards above 5 GB), the
tokenizer and a model card. Before it gets its name, the weights in it are compared with the
model's bit by bit, and a fresh Python process opens it with transformers elsewhere: logits and
token ids must be ours. --code adds our own model.py, which then opens with trust_remote_code=True;
without it the folder is transformers' LlamaForCausalLM and needs no code. --push uploads it to the
Hugging Face hub, once everything here is done.

A run that trained an adapter becomes a plain model, its adapter added to the base as that was held
in training (with --original: to the base as it is), or with --adapter the folder that peft opens.
A run that expanded a model becomes a plain one: copies behind their blocks are blocks of their own;
copies beside them are another kind of model, until --merge_back interpolates the weights of both,
which changes what it says.

Beside M.gguf comes M.Modelfile for `ollama create`. A tokenizer that llama.cpp would apply
otherwise is refused. Where llama.cpp is installed (the extra llamacpp), the ids of 2,000 texts are
compared before the file gets its name; with --verify also greedy tokens behind 20 prompts,
log-probs and perplexity.
"""

from dataclasses import dataclass

from plainllama.command import complain, parse_arguments, run_command
from plainllama.files import UNFINISHED, as_json, read_json, run_of, sync, write_text
from plainllama.settings import UserError, install, key

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass
class Flags:
    """What export.py takes."""

    ckpt: str = key("out", "a checkpoint, a run (its newest step) or a folder of runs (the newest)")
    to: str = key("", "the folder to write, new or empty; or a new file that ends in .gguf")
    type: str = key("", "of the matrices in a .gguf (empty: f32)", ("", *GGUF_TYPES))
    verify: bool = key(False, "a .gguf by llama.cpp: tokens, log-probs and perplexity too")
    dtype: str = key("fp32", "of the weights in the folder", ("fp32", "bf16"))
    code: bool = key(False, "with our model.py, to be opened with trust_remote_code=True")
    merge: bool = key(False, "an adapter and its base as one model (also without saying so)")
    original: bool = key(False, "merge into the base's own weights, not those held in few bits")
    adapter: bool = key(False, "the adapter alone, for the package peft")
    base: str = key("", "the folder of an adapter's base, where that has moved")
    merge_back: bool = key(False, "of copied blocks and the copies beside them one block each")
    license: str = key("", "for the model card, such as apache-2.0")
    push: str = key("", "user/name on the hub to upload to (after `hf auth login`)")


if __name__ == "__main__":  # --help and a misspelt key are answered before torch is loaded
    COMMAND = parse_arguments(__doc__, Flags, takes="model")

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import LLaMA
from plainllama.evaluation.likelihood import evaluate, validation_rows
from plainllama.evaluation.validation import ValSet
from plainllama.parallel import World, pick_dtype
from plainllama.report.card import card
from plainllama.tokens.tokenizer import SAMPLE, Tokenizer
from plainllama.tokens.tokenizer_json import byte_info, read_spec
from plainllama.weights import adapters, checkpoint, expansion, gguf, llama_cpp, peft
from plainllama.weights.huggingface import described, load_weights, write_code, write_folder
from plainllama.weights.peft import load_model

HELD_OUT = 1 << 16  # tokens of the validation split, at most, by which two models are compared
SHARD_BYTES = 5_000_000_000
TOLERANCE = 1e-4  # largest difference of logits in fp32, as a share of the largest logit
# Run by a fresh Python process in an empty folder; writes logits and token ids into it.
CHECK = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
asked = json.loads(sys.argv[2])
options = {"trust_remote_code": asked["code"]}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **options)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
logits = model.requires_grad_(False)(torch.tensor(asked["ids"])).logits
save_file({"logits": logits.contiguous()}, "logits.safetensors")
ids = {text: tokenizer(text, split_special_tokens=True)["input_ids"] for text in asked["texts"]}
json.dump(ids, open("ids.json", "w"))
"""
TEXTS = [SAMPLE, "", " ", "Once upon a time", "  two  spaces ", "\n\n\tif x == 1:\n\t\treturn",
         "naïve café 北京 😀👩‍👩‍👧 ½", "<s>[INST] text that spells specials </s><|endoftext|>"]


def main(command) -> int:
    """Write the folder under a temporary name, check it, rename it, upload it; the exit code."""
    flags = command.flags
    final = Path(os.path.realpath(flags.to))
    if not flags.to:
        raise UserError("name the folder to write with --to=DIR, or a file with --to=M.gguf, and "
                        "the model in front: export.py out/RUN --to=DIR")
    if any(map(run_of, (final, final.parent))):  # where train.py deletes
        raise UserError(f"--to {flags.to} lies among a run's checkpoints; name another place")
    if not re.fullmatch(r"[\w.+-]*", flags.license):
        raise UserError(f"--license takes a name such as apache-2.0, not {flags.license!r}")
    if final.suffix == ".gguf":
        return make_file(flags, final)
    if flags.type or flags.verify:
        raise UserError(f"--{'type' if flags.type else 'verify'} is for a .gguf; a folder has "
                        "--dtype, and is always checked")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"--to {flags.to} exists and is not empty; name a new folder")
    if flags.adapter and (flags.merge or flags.original or flags.code or flags.dtype != "fp32"):
        raise UserError("--adapter writes the adapter as it is, in fp32; leave out --merge, "
                        "--original, --code and --dtype")
    if flags.push and flags.push.count("/") != 1:
        raise UserError(f"--push takes user/name, not {flags.push!r}")
    if flags.push and importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("--push needs huggingface_hub: " + install("hf"))
    folder = Path(f"{final}{UNFINISHED}")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--to {final} cannot be made: {error.strerror}; name another") from None
    try:
        total, problem = checkpoint.with_checkpoint(flags.ckpt, World(),
                                                    partial(write, flags, folder))
        if problem:
            return complain(f"the export was not right and is removed: {problem}", 1)
        for path in [*folder.iterdir(), folder]:
            sync(path)
        os.rename(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{total:,} parameters as {flags.dtype} -> {flags.to}")
    return push(flags.to, flags.push) if flags.push else 0


def write(flags: Flags, folder: Path, source: Path) -> tuple[int, str]:
    """Write the checkpoint `source` into `folder` and check it; the number of its parameters and
    what is wrong, or ''."""
    if flags.adapter:
        refuse_unfit(flags, source)
        return write_adapter(flags, folder, source)
    model, merged, home = plain_model(flags, source)
    tokenizer = Tokenizer.load(home)
    dtype = pick_dtype(flags.dtype, torch.device("cpu"))
    for name, weight in model.named_parameters():  # from here on it holds what is exported
        weight.data = weight.data.to(dtype).float()
        if not weight.isfinite().all():
            raise UserError(f"{source}: {name} is not finite in {flags.dtype}; export another step")
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    write_folder(folder, model.config, weights, home / "tokenizer.json", dtype, SHARD_BYTES)
    if flags.code:
        write_code(folder, model.config)
    counts = adapters.parameter_counts(model)[:2]
    about = source, folder, flags, described(model.config), counts, merged
    write_text(folder / "README.md", card(*about))
    return counts[0], compare_with_transformers(model, tokenizer, folder, flags.code)


def make_file(flags: Flags, final: Path) -> int:
    """Write a .gguf and its Modelfile under temporary names, check them, rename them; the exit
    code."""
    wrong = [name for name in ("adapter", "code", "push") if getattr(flags, name)]
    if flags.dtype != "fp32":
        raise UserError("--dtype is for a folder; of a .gguf say --type=bf16")
    if wrong:
        raise UserError(f"--{wrong[0]} has no effect on a .gguf, which is one whole model, an "
                        "adapter merged; leave it away")
    beside = final.with_suffix(".Modelfile")
    for path in (final, beside):
        if path.exists():
            raise UserError(f"{path} exists; name a new file")
    gguf.check_installed()
    if flags.verify:
        llama_cpp.check_installed()
    file, recipe = (Path(f"{path}{UNFINISHED}") for path in (final, beside))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise UserError(f"--to {final} cannot be made: {error.strerror}; name another") from None
    try:
        total, problem = checkpoint.with_checkpoint(
            flags.ckpt, World(), partial(write_file, flags, file, recipe, final.name))
        if problem:
            return complain(f"the export was not right and is removed: {problem}", 1)
        for path in (recipe, file):
            sync(path)
        os.rename(recipe, beside)
        os.rename(file, final)
    finally:
        file.unlink(missing_ok=True)
        recipe.unlink(missing_ok=True)
    print(f"{total:,} parameters as {flags.type or 'f32'} -> {flags.to}; Ollama: {beside.name}")
    return 0


def write_file(flags: Flags, file: Path, recipe: Path, name: str, source: Path) -> tuple[int, str]:
    """Write the checkpoint `source` into `file`, which will be called `name`, and its Modelfile,
    and check it; as write()."""
    kind = flags.type or "f32"
    home = peft.tokenizer_folder(source, flags.base)
    spec, tokenizer = read_spec(home)[0], Tokenizer.load(home)
    gguf.vocabulary_of(spec, 0)  # what llama.cpp lacks is said before the model is loaded
    model = plain_model(flags, source)[0]
    for weight_name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{source}: {weight_name} is not finite; export another step")
    title = (run_of(source) or source).name
    gguf.write_gguf(file, model, spec, tokenizer.template, kind, title, flags.license)
    write_text(recipe, gguf.modelfile(name, model.config, tokenizer.template))
    problem, held, text = gguf.compare(file, model, kind), None, None
    if flags.verify:
        held = held_out(flags, source, model.config.block_size, "the file")
    if held:
        text = expansion.first_tokens(held[0].rows, held[0].bos_id)[0].flatten().numpy()
    problem = problem or llama_cpp.verify(file, model, tokenizer, kind, text, flags.verify)
    return adapters.parameter_counts(model)[0], problem


def refuse_unfit(flags: Flags, source: Path) -> None:
    """Refuse flags that are for another kind of checkpoint than `source` is."""
    said = [name for name in ("merge", "original", "adapter") if getattr(flags, name)]
    if said and not peft.is_adapter(source):
        raise UserError(f"--{said[0]} is for a run that trained an adapter, {source} is a whole "
                        f"model; leave --{said[0]} away")
    refuse_expansion(flags, source)
    if flags.original and held_as(source) == "fp32":
        raise UserError(f"--original has no effect: the base of {source} was held as it is; leave "
                        "it away")


def held_as(source: Path) -> str:
    """Say in which frozen_dtype a checkpoint's base was held, fp32 for a whole model."""
    return peft.read_adapter(source).frozen_dtype if peft.is_adapter(source) else "fp32"


def plain_model(flags: Flags, source: Path) -> tuple[LLaMA, str, Path]:
    """Load a checkpoint as a plain LLaMA, adapters and copies merged; what merging has changed, or
    '', and the folder of its tokenizer."""
    refuse_unfit(flags, source)
    held = held_as(source)
    model, merged = load_model(source, base=flags.base, original=flags.original), ""
    if held != "fp32":
        adapters.merge(model)
        merged = compare_merges(flags, source, model, held)
    if model.config.expand_blocks:
        model, merged = without_copies(flags, source, model)
    if merged:
        print(merged)
    return model, merged, peft.tokenizer_folder(source, flags.base)


def held_out(flags: Flags, source: Path, block_size: int,
             what: str = "what is merged") -> tuple[ValSet, int] | None:
    """Open the validation split of the run that made a checkpoint, and say how many tokens of it
    are looked at; None, and a line on the screen that names `what`, where it is not here."""
    run = run_of(source)
    config = read_json(run / "run.json")["config"] if run else {}
    data = Path("data", config.get("dataset") or "of no run")
    try:
        if not (data / "manifest.json").is_file():
            raise UserError(f"{data} is not here")
        rows = validation_rows(data, peft.tokenizer_folder(source, flags.base), block_size)
    except UserError as error:
        print(f"{what} is not compared on held-out text: {error}")
        return None
    bos = Tokenizer.load(data).bos_id if config["doc_mask"] else None
    return ValSet(rows, byte_info(data), bos), min(HELD_OUT, config["eval_tokens"])


def loss_of(model: LLaMA, held: ValSet, tokens: int) -> float:
    """The loss of a model on held-out text, nats per token."""
    return evaluate(model, held.rows, held.info, tokens, 4, World(), held.bos_id)["val_loss"]


def compare_merges(flags: Flags, source: Path, model: LLaMA, frozen_dtype: str) -> str:
    """Say what the run's validation split thinks of an adapter merged onto the base as it was held
    and onto the base as it is, of which `model` is one."""
    held = held_out(flags, source, model.config.block_size)
    if not held:
        return f"onto the {'original base' if flags.original else f'base in {frozen_dtype}'}"
    other = adapters.merge(load_model(source, base=flags.base, original=not flags.original))
    losses = [loss_of(it, *held) for it in ((other, model) if flags.original else (model, other))]
    here = "--original" if flags.original else "the base as it was held"
    return (f"validation loss on {held[1]:,} tokens, merged onto the base as it was held, in "
            f"{frozen_dtype}: {losses[0]:.4f} nats; onto the base's own weights (--original): "
            f"{losses[1]:.4f}; this is {here}")


def refuse_expansion(flags: Flags, source: Path) -> None:
    """Refuse a plain model of copies beside their blocks, unless they are to be merged."""
    kind = peft.whole_config(source, flags.base).expand
    if flags.merge_back and kind in ("none", "stack"):
        has = "no copies of blocks" if kind == "none" else "copies behind their blocks alone"
        raise UserError(f"--merge_back has no effect: {source} has {has}; leave it away")
    if kind in ("concat", "hybrid") and not flags.merge_back:
        raise UserError(f"{source} has copies beside its blocks (expand={kind}), which no other "
                        "program knows; --merge_back interpolates the weights of both into a plain "
                        "model, and says what that costs")


def without_copies(flags: Flags, source: Path, model: LLaMA) -> tuple[LLaMA, str]:
    """Make a plain model of an expanded one; where weights are interpolated, also say what the
    run's validation split thinks of that. A share that differs from token to token counts by its
    mean there, or where there is none by its bias."""
    merging = expansion.merging(model)
    shares = {layer: block.expansion.mix_bias.sigmoid().item() for layer, block in merging.items()}
    held = held_out(flags, source, model.config.block_size) if merging else None
    if held:
        seen = expansion.look(model, expansion.first_tokens(held[0].rows, held[0].bos_id))
        shares = {layer: found["expansion_share"] for layer, found in seen.items()}
    made = expansion.plain(model, shares)
    if not held:
        return made, "copies were interpolated with their blocks" if merging else ""
    return made, (f"validation loss on {held[1]:,} tokens, expanded: {loss_of(model, *held):.4f} "
                  f"nats; merged back: {loss_of(made, *held):.4f}")


def write_adapter(flags: Flags, folder: Path, source: Path) -> tuple[int, str]:
    """Write the adapter of a checkpoint alone; as write()."""
    for path in source.iterdir():
        if path.is_file() and path.name != "checksums.json":
            shutil.copyfile(path, folder / path.name)
    config = peft.whole_config(source, flags.base)
    learned = {name: tensor.numel() for name, tensor in load_file(folder / peft.WEIGHTS).items()}
    total = sum(learned.values())
    counts = total, sum(size for name, size in learned.items() if ".layers." in name)
    write_text(folder / "README.md", card(source, folder, flags, described(config), counts))
    return total, ""


def compare_with_transformers(model: LLaMA, tokenizer: Tokenizer, folder: Path, code: bool) -> str:
    """Compare weights, logits and token ids of `folder` with ours; what differs, or ''."""
    stored = LLaMA(model.config)
    load_weights(folder, stored, World())
    for name, weight in model.named_parameters():
        if not torch.equal(weight, stored.get_parameter(name)):
            return f"{name} is not what was written"
    del stored
    if importlib.util.find_spec("transformers") is None:
        print(f"NOT checked with transformers, which is not installed; to do so: {install('hf')}")
        return ""
    ids = torch.randint(model.config.vocab_size, (2, min(model.config.block_size, 128)),
                        generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as elsewhere:
        asked = as_json({"ids": ids.tolist(), "texts": TEXTS, "code": code})
        environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{elsewhere}/modules"}
        done = subprocess.run([sys.executable, "-c", CHECK, folder, asked], cwd=elsewhere,
                              env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            return f"transformers cannot open it: {done.stderr.strip()[-2000:]}"
        logits = load_file(f"{elsewhere}/logits.safetensors")["logits"]
        their_ids = read_json(Path(elsewhere, "ids.json"))
    with torch.inference_mode():
        ours = model(ids)
    share = ((ours - logits).abs().max() / ours.abs().max()).item()
    print(f"checked with transformers: largest difference of logits {share:.1e} of the largest")
    if not share <= TOLERANCE:  # nan too
        return f"its logits differ by {share:.1e} of the largest, allowed are {TOLERANCE:.0e}"
    for text in TEXTS:
        if their_ids[text] != [tokenizer.bos_id, *tokenizer.encode(text)]:
            return f"its tokenizer reads {text[:40]!r} as {their_ids[text][:12]}, ours does not"
    return ""


def push(folder: str, name: str) -> int:
    """Upload the folder; what fails there leaves it as it is."""
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # no network, no login, no rights: the library has many kinds
        return complain(f"{folder} is complete, but was not uploaded: {error}; "
                        f"try again with: hf upload {name} {shlex.quote(folder)}", 1)
    print(f"uploaded to {url}")
    return 0


if __name__ == "__main__":
    run_command(main, COMMAND)
