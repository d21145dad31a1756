"""Checkpoints: atomic, verified, elastic. A checkpoint is a Hugging Face model folder.

step_N/            config.json, generation_config.json, model.safetensors, tokenizer files
step_N/training/   optimizer-RANK.safetensors (each rank's slices), state.json
step_N/checksums.json  size and sha256 of every file above

A checkpoint is written as step_N.tmp, every file is synced, and the rename makes it visible.
Readers trust a folder only after its checksums. Nothing is unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from huggingface import hf_config, model_config
from model import LLaMA
from optim import Optimizer
from parallel import World
from settings import UserError
from tokenizer import boundaries, byte_info, write_hf_files

FORMAT = 1


def steps_of(run: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first, not yet verified."""
    found = [p for p in run.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name[5:]))


def damage(folder: Path, training: bool = True) -> str:
    """What is wrong with a checkpoint, or ''. Every file is hashed; `training` False leaves out
    the optimizer's state, which only a resumed run reads. UserError for another format."""
    try:
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        if sums["format"] != FORMAT:
            raise UserError(f"{folder} has format {sums['format']}, this program reads {FORMAT}; "
                            "use the plainllama that wrote it")
        entries = sums["files"]
        if "model.safetensors" not in entries or "config.json" not in entries:
            return "checksums.json does not name the model"
        for name, entry in entries.items():
            path = folder / name
            if ".." in Path(name).parts or Path(name).is_absolute() or path.is_symlink():
                return f"checksums.json names {name!r}, outside the checkpoint"
            if not training and name.startswith("training/"):
                continue
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{error!r}"
    return ""


def newest_good(run: Path, training: bool = True) -> Path | None:
    """The newest checkpoint of a run that is whole; damaged ones are named and passed over."""
    for folder in steps_of(run):
        problem = damage(folder, training)
        if not problem:
            return folder
        print(f"checkpoint {folder} is damaged ({problem}); looking for the one before", flush=True)
    return None


def find(path: str, quiet: bool = False) -> Path:
    """What --ckpt X means: a checkpoint, a run (its newest good step) or a folder of runs (the
    newest run). Prints the choice. UserError if there is none."""
    start = Path(path)
    if not start.is_dir():
        beside = ", ".join(step.name for step in steps_of(start.parent.parent))
        raise UserError(f"{path} is a file; --ckpt names a checkpoint, a run or a folder of runs"
                        if start.exists() else f"no checkpoint {path}; its run has {beside}"
                        if beside else f"no folder {path}; train a model first (python train.py) "
                        "or name a checkpoint or run with --ckpt")
    if (start / "config.json").is_file():
        problem = damage(start, training=False) if (start / "checksums.json").is_file() else ""
        if problem:
            raise UserError(f"checkpoint {start} is damaged: {problem}")
        chosen = start
    else:
        runs = [start] if (start / "checkpoints").is_dir() else [p.parent for p in
                                                                 start.glob("*/checkpoints")]
        runs = [run for run in runs if steps_of(run)]
        if any(start.glob("*.safetensors")):
            raise UserError(f"{path} holds weights but no config.json; copy the folder again, "
                            "whole")
        if not runs:
            raise UserError(f"{path} holds no complete checkpoint; is it a run's folder, and has "
                            "the run saved one (save_interval)?")
        run = max(runs, key=lambda run: max(p.stat().st_mtime for p in steps_of(run)))
        good = newest_good(run, training=False)
        if good is None:
            raise UserError(f"{run}: every checkpoint is damaged")
        chosen = good
    if not quiet:
        print(f"checkpoint {chosen}", flush=True)
    return chosen


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in, or None for a model folder from elsewhere."""
    run = checkpoint.absolute().parent.parent
    in_run = checkpoint.absolute().parent.name == "checkpoints" and (run / "run.json").is_file()
    return run if in_run else None


def load_model(folder: Path, device="cpu", dtype: torch.dtype = torch.float32) -> LLaMA:
    """The model of a checkpoint or other Hugging Face LLaMA folder, in eval mode, its matmuls in
    `dtype`."""
    config = model_config(folder)
    if (folder / "tokenizer.json").is_file() and (
            entries := len(byte_info(folder).lengths)) > config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {entries} entries, the model's embedding "
                        f"only {config.vocab_size}; they do not belong together")
    with torch.device("meta"):
        model = LLaMA(config)
    model.to_empty(device=device)
    model.reset_derived(device)
    load_weights(folder, model, World())
    model.compute_dtype = dtype
    return model.eval()


def load_weights(folder: Path, model: LLaMA, world: World) -> None:
    """Copy the weights of a model folder into `model`'s parameters, which exist already: a tensor
    mapped from a file may be unaligned, and alignment changes the bits of a matmul."""
    try:
        files = {name: safe_open(folder / name, "pt") for name in weight_files(folder)}
        names = {key: name for name, file in files.items() for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {error}; if it is a copy, copy it "
                        "again") from None
    wanted = dict(model.named_parameters())
    names = {key: name for key, name in names.items() if "rotary_emb" not in key}
    if model.config.tie_embeddings:
        names.pop("lm_head.weight", None)
    if missing := sorted(set(wanted) - set(names)):
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    if extra := sorted(set(names) - set(wanted)):
        raise UserError(f"{folder}: unknown weights, the first is {extra[0]}")
    for key, parameter in wanted.items():
        value = files[names[key]].get_slice(key)
        if list(value.get_shape()) != list(parameter.shape):
            raise UserError(f"{folder}: {key} has shape {value.get_shape()}, the config says "
                            f"{list(parameter.shape)}")
        local, offset = world.piece(parameter.data)
        with torch.no_grad():
            local.copy_(value[offset:offset + local.shape[0]])


def weight_files(folder: Path) -> list[str]:
    """The names of a model folder's weight files, as transformers looks for them: one, or what an
    index names. UserError if one of them is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        names = ["model.safetensors"]
    else:
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of weights: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, outside the folder")
        if not (folder / name).is_file():
            pickled = any(folder.glob("pytorch_model*.bin"))
            raise UserError(f"{folder}: {name} is missing; " + (
                "pickled weights (pytorch_model.bin) are not read, convert them to safetensors"
                if pickled else "copy the folder again, whole"))
    return names


def save(run: Path, step: int, model: LLaMA, optimizer: Optimizer, state: dict,
         tokenizer_json: Path, world: World) -> Path:
    """Write checkpoints/step_N; collective. Raises OSError on every rank if any rank cannot write;
    then nothing new is visible and earlier checkpoints are as they were."""
    final = run / "checkpoints" / f"step_{step}"
    folder = final.with_name(final.name + ".tmp")
    problem: OSError | None = None
    try:
        if world.rank == 0:
            for old in run.glob("checkpoints/*.tmp"):
                shutil.rmtree(old, ignore_errors=old != folder)
            (folder / "training").mkdir(parents=True)
            check_space(folder, model)
    except OSError as error:
        problem = error
    if not world.any(problem is not None):  # a barrier too: the folder is there
        weights = gather_weights(model, world)
        try:
            if world.holds_a_piece:
                save_optimizer(folder / "training" / f"optimizer-{world.rank:05d}.safetensors",
                               model, optimizer, world)
            if world.rank == 0:
                save_file(weights, folder / "model.safetensors", {"format": "pt"})
                write_json(folder / "training" / "state.json", {"format": FORMAT, **state})
                spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
                vocab = {token["content"]: token["id"] for token in spec["added_tokens"]}
                bos, eos = (vocab.get(token) for token in boundaries(spec))
                eos = bos if eos is None else eos
                write_json(folder / "config.json", hf_config(model.config, bos, eos))
                write_json(folder / "generation_config.json",
                           {"bos_token_id": bos, "eos_token_id": eos})
                write_hf_files(tokenizer_json, folder, model.config.block_size)
        except (OSError, SafetensorError) as error:
            problem = error if isinstance(error, OSError) else OSError(str(error))
    if not world.any(problem is not None) and world.rank == 0:
        try:
            commit(folder, final)
        except OSError as error:
            problem = error
    if world.any(problem is not None):
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise problem or OSError("another rank could not write its part of the checkpoint")
    return final


def commit(folder: Path, final: Path) -> None:
    """Hash and sync every file of `folder`, then rename it to `final`: here it becomes visible."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)}
               for p in files}
    write_json(folder / "checksums.json", {"format": FORMAT, "files": entries})
    for path in files:  # safetensors writes files that only their owner can read
        shutil.copymode(folder / "checksums.json", path)
    for path in [*files, folder / "checksums.json", folder / "training", folder]:
        sync(path)
    if final.exists():  # a damaged one, or the run was started again from an earlier step
        shutil.rmtree(final)
    os.rename(folder, final)
    sync(final.parent)


def set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which were found damaged, to step_N.damaged."""
    for folder in steps_of(run):
        if int(folder.name[5:]) > step:
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)


def prune(run: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every`."""
    for folder in steps_of(run)[keep_last:]:
        if not (keep_every and int(folder.name[5:]) % keep_every == 0):
            doomed = folder.with_name(folder.name + ".tmp")  # half deleted, it must not look whole
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # what is left goes at the next save


def gather_weights(model: LLaMA, world: World) -> dict[str, Tensor]:
    """Every parameter, whole, in host memory of rank 0 (elsewhere {}), one by one; collective."""
    weights = {}
    for name, parameter in model.named_parameters():  # a tied matrix is named once
        whole = world.whole(parameter.data)
        if world.rank == 0:
            weights[name] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
    return weights


def save_optimizer(path: Path, model: LLaMA, optimizer: Optimizer,
                   world: World) -> None:
    """This rank's slices of the optimizer's state, each with its first row and the full shape."""
    tensors, places = {}, {}
    for name, parameter in model.named_parameters():
        if parameter not in optimizer.state:
            raise RuntimeError(f"the optimizer knows no {name}: it is not the model's parameter")
        for kind, value in optimizer.state[parameter].items():
            local, offset = world.piece(value) if value.dim() else (value.reshape(1), 0)
            if local.numel():
                tensors[f"{name}/{kind}"] = local.detach().to("cpu", copy=True).contiguous()
                places[f"{name}/{kind}"] = {"offset": offset, "shape": list(value.shape)}
    save_file(tensors, path, {"places": json.dumps(places)})


def load_optimizer(folder: Path, model: LLaMA, optimizer: Optimizer,
                   world: World) -> None:
    """Fill the optimizer's state, which exists already, from slices written by any world size."""
    pieces: dict[str, list] = {}
    for path in sorted((folder / "training").glob("optimizer-*.safetensors")):
        file = safe_open(path, "pt")
        for key, place in json.loads(file.metadata()["places"]).items():
            pieces.setdefault(key, []).append((place["offset"], file.get_slice(key)))
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            local, start = world.piece(value) if value.dim() else (value.reshape(1), 0)
            end, covered = start + local.shape[0], start
            for offset, piece in sorted(pieces.get(f"{name}/{kind}", []), key=lambda p: p[0]):
                last = min(end, offset + piece.get_shape()[0])
                if offset <= covered < last:
                    local[covered - start:last - start].copy_(piece[covered - offset:last - offset])
                    covered = last
            if covered != end:
                raise UserError(f"{folder}: the optimizer's {kind} of {name} is incomplete; "
                                "was it written by another optimizer?")


def read_state(folder: Path) -> dict:
    """training/state.json of a checkpoint."""
    state = json.loads((folder / "training" / "state.json").read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise UserError(f"{folder} has format {state['format']}, we read {FORMAT}")
    return state


def check_space(folder: Path, model: LLaMA) -> None:
    """OSError before a byte is written if weights and two moments would not fit on the disk."""
    need = sum(p.numel() for p in model.parameters()) * 4 * 3
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(28, f"{need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free", str(folder))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict) -> None:
    """Plain JSON; the caller syncs."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
