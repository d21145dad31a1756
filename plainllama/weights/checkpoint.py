"""Checkpoints: atomic, verified, elastic. A checkpoint is a Hugging Face model folder.

step_N/            config.json, generation_config.json, model.safetensors, tokenizer files
step_N/training/   optimizer-RANK.safetensors (each rank's slices), state.json
step_N/checksums.json  size and sha256 of every file above

Training waits while weights and optimizer are copied to host memory; a thread writes them as
step_N.tmp, every file is synced, and the rename makes the checkpoint visible. Readers trust a
folder only after its checksums. Nothing is unpickled.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import LLaMA, ModelConfig
from plainllama.files import as_json, check_space, sha256, steps_of, sync, write_json
from plainllama.parallel import World
from plainllama.settings import UserError
from plainllama.tokens.tokenizer_json import boundaries, write_hf_files
from plainllama.training.optim import Optimizer
from plainllama.weights.huggingface import config_json

FORMAT = 1


def damage(folder: Path, training: bool = True) -> str:
    """What is wrong with a checkpoint, or ''. Every file is hashed; `training` False leaves out
    the optimizer's state, which only a resumed run reads. UserError for another format."""
    try:
        text = (folder / "checksums.json").read_text(encoding="utf-8")
        sums = json.loads(text)
        if text != as_json(sums):  # nothing else vouches for this file
            return "checksums.json is not as it was written"
        if sums["format"] != FORMAT:
            raise UserError(f"{folder} has format {sums['format']}, this program reads {FORMAT}; "
                            "use the plainllama that wrote it")
        entries = {name: entry for name, entry in sums["files"].items()
                   if training or not name.startswith("training/")}
        needed = {"model.safetensors", "config.json", *(["training/state.json"] * training)}
        if missing := needed - entries.keys():
            return f"checksums.json does not name {min(missing)}"
        for name, entry in entries.items():
            path = folder / name
            if Path(name).is_absolute() or path.resolve() != folder.resolve() / name:
                return f"checksums.json names {name!r}, outside the checkpoint"
            if path.stat().st_size != entry["size"] or not path.is_file():
                return f"{name} does not match its checksum"
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(entries, pool.map(sha256, map(folder.joinpath, entries)),
                                    strict=True):
                if digest != entries[name]["sha256"]:
                    return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{error!r}"
    return ""


def newest_good(run: Path, training: bool = True) -> Path | None:
    """The newest checkpoint of a run that is whole; damaged ones are named and passed over."""
    for folder in steps_of(run):
        try:
            problem = damage(folder, training)
        except UserError as error:
            problem = str(error)
        if not problem:
            return folder
        print(f"checkpoint {folder} is damaged ({problem}); looking for the one before", flush=True)
    return None


def find_checkpoint(path: str, quiet: bool = False) -> Path:
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


class Saver:
    """Writes the checkpoints of a run beside its training, one at a time. Collective.

    `saved`: the last step that was committed; `problem`: why the last save failed, or ''.
    """

    def __init__(self, run: Path, tokenizer_json: Path, world: World,
                 say: Callable[[str], None] = print, keep_last: int = 0, keep_every: int = 0):
        self.run, self.tokenizer_json, self.world, self.say = run, tokenizer_json, world, say
        self.keep_last, self.keep_every = keep_last, keep_every  # keep_last=0: all
        self.saved, self.problem = -1, ""
        self.thread: threading.Thread | None = None

    def start(self, step: int, model: LLaMA, optimizer: Optimizer, state: dict) -> None:
        """Copy weights and optimizer to host memory, once the save before is done; a thread writes
        them as checkpoints/step_N."""
        self.wait()
        slices = slices_of(model, optimizer, self.world)
        need = 4 * sum(tensor.numel() for p in model.parameters()
                       for tensor in (p, *optimizer.state[p].values()))
        weights = gather_weights(model, self.world)
        self.thread = threading.Thread(target=self.write, name="saver", daemon=True, args=(
            step, need, weights, slices, model.config, {"format": FORMAT, **state}))
        self.thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the save under way, if there is one."""
        if self.thread:
            self.thread.join(seconds)

    def write(self, step: int, need: int, *content) -> None:
        """The thread. If any rank fails nothing new is visible, earlier checkpoints are as they
        were, and every rank knows the problem."""
        final = self.run / "checkpoints" / f"step_{step}"
        folder = final.with_name(final.name + ".tmp")
        try:
            self.together(self.make_room, folder, need)
            entries = self.together(self.write_files, folder, *content)
            self.together(self.commit, folder, final, entries)
            self.saved, self.problem = step, ""
        except Exception as error:  # also that another rank failed or is gone
            self.problem = str(error) or repr(error)
            self.say(f"WARNING: no checkpoint at step {step}: {self.problem}; going on")
            if self.world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def together(self, part: Callable, *args) -> list:
        """Do this rank's part and hear of the others'; what each gave. OSError if one failed."""
        answer, problem = None, ""
        try:
            answer = part(*args)
        except Exception as error:
            problem = str(error) or repr(error)
        answers = self.world.gather((answer, problem))
        for rank, (_, problem) in enumerate(answers):
            if problem:
                raise OSError(f"{problem} (rank {rank})" if rank else problem)
        return [answer for answer, _ in answers]

    def make_room(self, folder: Path, need: int) -> None:
        """An empty folder on a disk with room for `need` bytes."""
        if self.world.rank == 0:
            for old in folder.parent.glob("*.tmp"):
                shutil.rmtree(old, ignore_errors=old != folder)
            (folder / "training").mkdir(parents=True)
            check_space(folder, need)

    def write_files(self, folder: Path, weights: dict[str, Tensor], slices: tuple[dict, dict],
                    config: ModelConfig, state: dict) -> dict[str, dict]:
        """This rank's files, on the disk; their entries in checksums.json."""
        written = []
        if slices[0]:
            written.append(folder / "training" / f"optimizer-{self.world.rank:05d}.safetensors")
            save_file(slices[0], written[0], {"places": json.dumps(slices[1])})
        if self.world.rank == 0:
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            write_json(folder / "training" / "state.json", state)
            spec = json.loads(self.tokenizer_json.read_text(encoding="utf-8"))
            vocab = {token["content"]: token["id"] for token in spec["added_tokens"]}
            bos, eos = (vocab.get(token) for token in boundaries(spec))
            eos = bos if eos is None else eos
            write_json(folder / "config.json", config_json(config, bos, eos))
            write_json(folder / "generation_config.json",
                       {"bos_token_id": bos, "eos_token_id": eos})
            write_hf_files(self.tokenizer_json, folder, config.block_size)
            written += [folder / "training" / "state.json",
                        *(path for path in folder.iterdir() if path.is_file())]
        return sealed(folder, written)

    def commit(self, folder: Path, final: Path, entries: list[dict]) -> None:
        """Make the folder visible and delete what need not be kept."""
        if self.world.rank == 0:
            commit(folder, final, {name: entry for part in entries for name, entry in part.items()})
            if self.keep_last:
                try:
                    prune(self.run, self.keep_last, self.keep_every)
                except OSError as error:
                    self.say(f"WARNING: an old checkpoint could not be deleted: {error}")


def save(run: Path, step: int, model: LLaMA, optimizer: Optimizer, state: dict,
         tokenizer_json: Path, world: World) -> Path:
    """Write checkpoints/step_N and wait for it; collective. OSError on every rank if any rank
    cannot write."""
    saver = Saver(run, tokenizer_json, world, lambda _: None)
    saver.start(step, model, optimizer, state)
    saver.wait()
    if saver.problem:
        raise OSError(saver.problem)
    return run / "checkpoints" / f"step_{step}"


def sealed(folder: Path, files: list[Path]) -> dict[str, dict]:
    """Sync files to the disk; name in `folder` -> size and hash."""
    for path in files:
        sync(path)
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in files}


def commit(folder: Path, final: Path, entries: dict[str, dict] | None = None) -> None:
    """Write checksums.json for the files of `folder` (`entries`: of sealed()) and rename it to
    `final`: here it becomes visible."""
    entries = entries or sealed(folder, [p for p in folder.rglob("*") if p.is_file()])
    write_json(folder / "checksums.json",
               {"format": FORMAT, "files": dict(sorted(entries.items()))})
    for name in entries:  # safetensors writes files that only their owner can read
        shutil.copymode(folder / "checksums.json", folder / name)
    for path in (folder / "checksums.json", folder / "training", folder):
        sync(path)
    if final.exists():  # the run was started again from an earlier step
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
    """Delete all but the newest `keep_last` checkpoints, those at multiples of `keep_every`, and
    the best: the one with the least validation loss, of those saved right after an evaluation."""
    scores = {}
    for folder in steps_of(run):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((folder / "training" / "state.json").read_text(encoding="utf-8"))
            scores[folder] = float(state["val_loss"])
    best = min(scores, key=lambda folder: scores[folder], default=None)
    for folder in steps_of(run)[keep_last:]:
        if folder != best and not (keep_every and int(folder.name[5:]) % keep_every == 0):
            doomed = folder.with_name(folder.name + ".tmp")  # half deleted, it must not look whole
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # what is left goes at the next save


def gather_weights(model: LLaMA, world: World) -> dict[str, Tensor]:
    """Every parameter, whole, in host memory of rank 0 (elsewhere {}), one by one, so that no
    device holds more than one; collective."""
    weights = {}
    for name, parameter in model.named_parameters():  # a tied matrix is named once
        whole = world.whole(parameter.data)
        if world.rank == 0:
            weights[name] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
    return weights


def slices_of(model: LLaMA, optimizer: Optimizer, world: World) -> tuple[dict, dict]:
    """This rank's rows of the optimizer's state that no rank before it has, in host memory, and of
    each its first row and the full shape; both by PARAMETER/KIND."""
    tensors, places = {}, {}
    for name, parameter in model.named_parameters():
        if parameter not in optimizer.state:
            raise RuntimeError(f"the optimizer knows no {name}: it is not the model's parameter")
        for kind, value in optimizer.state[parameter].items():
            local, offset = world.piece(value) if value.dim() else (value.reshape(1), 0)
            if world.holds_a_piece and local.numel():
                tensors[f"{name}/{kind}"] = local.detach().to("cpu", copy=True).contiguous()
                places[f"{name}/{kind}"] = {"offset": offset, "shape": list(value.shape)}
    return tensors, places


def load_optimizer(folder: Path, model: LLaMA, optimizer: Optimizer,
                   world: World) -> None:
    """Fill the optimizer's state, which exists already, from slices written by any world size."""
    pieces: dict[str, list] = {}
    try:  # only files that were verified
        listed = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))["files"]
        for path in (folder / name for name in listed if name.startswith("training/optimizer-")):
            file = safe_open(path, "pt")
            for key, place in json.loads(file.metadata()["places"]).items():
                pieces.setdefault(key, []).append((int(place["offset"]), file.get_slice(key)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder}: its optimizer state cannot be read: {error!r}") from None
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
    try:
        state = json.loads((folder / "training" / "state.json").read_text(encoding="utf-8"))
        found = state["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: training/state.json is not a run's state: {error!r}") from None
    if found != FORMAT:
        raise UserError(f"{folder} has format {found}, this program reads {FORMAT}; use the "
                        "plainllama that wrote it")
    return state
