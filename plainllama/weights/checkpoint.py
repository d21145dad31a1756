"""Checkpoints: atomic, verified, elastic. A checkpoint is a Hugging Face model folder.

step_N/            config.json, generation_config.json, model.safetensors, tokenizer files; of a run
                   that trains an adapter, that adapter's files in place of the model's weights
step_N/training/   optimizer-RANK.safetensors (each rank's slices), state.json
step_N/checksums.json  size and sha256 of every file above

Training waits while weights and moments are copied to host memory; a thread writes them as
step_N.tmp, every file is synced, and the rename makes the checkpoint visible. Readers trust a
folder only after its checksums. Nothing is unpickled.
"""

import contextlib
import json
import os
import shutil
import threading
from collections import ChainMap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import LLaMA, ModelConfig, trained
from plainllama import files
from plainllama.parallel import World
from plainllama.settings import UserError
from plainllama.weights import peft
from plainllama.weights.adapters import Adapter
from plainllama.weights.huggingface import write_description, write_weights

FORMAT = 1
STATE = "training/state.json"
Moments = Mapping[Tensor, Mapping[str, Tensor]]  # the optimizer's state of each trained parameter

# ---- found and verified


def damage(folder: Path, training: bool = True) -> str:
    """Say what is wrong with a checkpoint, '' if nothing is. Every file is hashed; `training` False
    leaves out the optimizer's state, which only a resumed run reads."""
    try:
        text = (folder / "checksums.json").read_text(encoding="utf-8")
        sums, home = json.loads(text), folder.resolve()
        if text != files.as_json(sums):  # nothing else vouches for this file
            return "checksums.json is not as it was written"
        if sums["format"] != FORMAT:
            return f"its format is {sums['format']}, not {FORMAT}; use the plainllama that wrote it"
        entries = {name: entry for name, entry in sums["files"].items()
                   if training or not name.startswith("training/")}
        weights = {peft.CONFIG, peft.WEIGHTS, peft.BASE}
        if not weights & entries.keys():
            weights = {"model.safetensors"}
        needed = weights | {"config.json"} | ({STATE} if training else set())
        if missing := needed - entries.keys():
            return f"checksums.json does not name {min(missing)}"
        for name in entries:
            there = (folder / name).resolve()
            # the hub's cache keeps the files themselves in blobs/, above the folder
            cached = there.parent.name == "blobs" and home.is_relative_to(there.parent.parent)
            if not cached and not there.is_relative_to(home):
                return f"checksums.json names {name!r}, outside the checkpoint"
            if not there.is_file():
                return f"{name} does not match its checksum"
        with ThreadPoolExecutor() as pool:
            found = pool.map(files.file_entry, map(folder.joinpath, entries))
            for name, entry in zip(entries, found, strict=True):
                if entry != entries[name]:
                    return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{error!r}"
    return ""


def newest_good(run: Path, training: bool = True) -> Path | None:
    """Choose the newest checkpoint of a run that is whole; damaged ones are named and passed
    over."""
    for folder in files.steps_of(run):
        problem = damage(folder, training)
        if not problem:
            return folder
        if not os.path.lexists(folder):  # a run at work has just deleted it: there is a newer one
            return newest_good(run, training)
        print(f"checkpoint {folder} is damaged ({problem}); looking for the one before", flush=True)
    return None


def find_checkpoint(path: str) -> Path:
    """Choose and print what --ckpt X means: a checkpoint, a run (its newest good step) or a folder
    of runs (the newest run). UserError if there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(no_folder(path))
    if (folder / "config.json").is_file() or peft.is_adapter(folder):
        is_ours = (folder / "checksums.json").is_file()  # a model folder from elsewhere has none
        if is_ours and (problem := damage(folder, training=False)):
            raise UserError(f"checkpoint {folder} cannot be used: {problem}")
    elif any(folder.glob("*.safetensors")):
        raise UserError(f"{path} holds weights but no config.json; copy the folder again, whole")
    else:
        run = folder if (folder / "checkpoints").is_dir() else files.newest_run(folder)
        good = newest_good(run, training=False) if run else None
        if good is None:
            raise UserError(f"{path} holds no complete checkpoint; name a run that has saved one")
        folder = good
    print(f"checkpoint {folder}", flush=True)
    return folder


def with_checkpoint(path: str, world: World, use: Callable, found: Path | None = None) -> Any:
    """Do use(the checkpoint that `path` means), and what that gave. If a run at work deletes the
    checkpoint before it is read, one process looks again, once. `found`: what was found before,
    and is all there is if `path` is ''."""
    if not path:
        return use(found)
    for _ in range(2 if world.size == 1 else 1):
        folder, found = found or world.decide(lambda: find_checkpoint(path)), None
        try:
            return use(folder)
        except (UserError, OSError):
            if folder.is_dir():
                raise
    raise UserError(f"{folder} was deleted while it was read, by a run that goes on; start again")


def no_folder(path: str) -> str:
    """Say what is in the place of a folder, and what to name in its stead."""
    if Path(path).exists():
        return f"{path} is a file; name a checkpoint, a run or a folder of runs"
    if there := files.steps_of(Path(path).parent.parent):
        return f"no checkpoint {path}; its run has {', '.join(step.name for step in there)}"
    return f"no folder {path}; name a checkpoint or a run, or train one first (train.py)"


# ---- written

class Saver:
    """Writes the checkpoints of a run beside its training, one at a time. Collective.

    `saved`: the last step that was committed, which `tell` is told; `problem`: why the last save
    failed, or ''; `template`: of dialogs, for checkpoints of a data set that has none.
    """

    template = ""

    def __init__(self, run: Path, tokenizer_json: Path, world: World,
                 say: Callable[[str], None] = print, keep_last: int = 0, keep_every: int = 0):
        self.run, self.tokenizer_json, self.world, self.say = run, tokenizer_json, world, say
        self.keep_last, self.keep_every = keep_last, keep_every  # keep_last=0: all
        self.saved, self.problem = -1, ""
        self.tell: Callable[[int], None] = lambda step: None
        self.thread: threading.Thread | None = None

    def start(self, step: int, model: LLaMA, moments: Moments, state: dict,
              adapter: Adapter | None = None) -> None:
        """Copy weights and moments to host memory, once the save before is done; a thread writes
        them as checkpoints/step_N. Of a model with an adapter, the adapter's."""
        self.wait()
        if adapter and self.world.rank == 0:
            hold(Path(adapter.base), self.run)
        kept = dict(trained(model) if adapter else model.named_parameters())
        copies = (model.config, gather_weights(kept, self.world),
                  *slices_of(model, moments, self.world), {"format": FORMAT, **state}, adapter)
        whole = [*kept.values(), *(t for kinds in moments.values() for t in kinds.values())]
        self.thread = threading.Thread(target=self.write, daemon=True, name="saver", args=(
            step, 4 * sum(t.numel() for t in whole), *copies))
        self.thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the save under way, if there is one."""
        if self.thread:
            self.thread.join(seconds)

    def write(self, step: int, need: int, *copies) -> None:
        """Write a checkpoint of `copies`, in the thread. If any rank fails nothing new is visible,
        earlier checkpoints are as they were, and every rank knows the problem."""
        final = self.run / "checkpoints" / f"step_{step}"
        folder = final.with_name(final.name + ".tmp")
        try:
            self.together(self.make_room, folder, need)
            entries = self.together(self.write_files, folder, *copies)
            self.together(self.commit, folder, final, entries)
            self.saved, self.problem = step, ""
            self.tell(step)
        except Exception as error:  # also that another rank failed or is gone
            self.problem = str(error) or repr(error)
            self.say(f"WARNING: no checkpoint at step {step}: {self.problem}; going on")
            if self.world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def together(self, part: Callable, *args) -> list:
        """Do this rank's part and hear of the others'; what each gave. OSError if one failed."""
        try:
            outcome = part(*args), ""
        except Exception as error:
            outcome = None, str(error) or repr(error)
        answers = self.world.gather(outcome)
        for rank, (_, problem) in enumerate(answers):
            if problem:
                raise OSError(f"{problem} (rank {rank})" if rank else problem)
        return [answer for answer, _ in answers]

    def make_room(self, folder: Path, need: int) -> None:
        """Make an empty folder on a disk with room for `need` bytes; rank 0's part."""
        if self.world.rank == 0:
            for old in folder.parent.glob("*.tmp/"):
                shutil.rmtree(old, ignore_errors=old != folder)
            (folder / "training").mkdir(parents=True)
            files.check_space(folder, need)

    def write_files(self, folder: Path, config: ModelConfig, weights: dict[str, Tensor],
                    slices: dict[str, Tensor], places: dict, state: dict,
                    adapter: Adapter | None) -> dict[str, dict]:
        """Write this rank's files to the disk; their entries in checksums.json."""
        written = []
        if slices:
            written.append(folder / f"training/optimizer-{self.world.rank:05d}.safetensors")
            save_file(slices, written[0], {"places": json.dumps(places)})
        if self.world.rank == 0:
            files.write_json(folder / STATE, state)
            write_description(folder, config, self.tokenizer_json, template=self.template)
            if adapter:
                peft.write_adapter(folder, weights, adapter, config)
            else:
                write_weights(folder, weights)
            written += [folder / STATE, *(path for path in folder.iterdir() if path.is_file())]
        return sealed(folder, written)

    def commit(self, folder: Path, final: Path, entries: list[dict]) -> None:
        """Make the folder visible and delete what need not be kept; rank 0's part."""
        if self.world.rank == 0:
            commit(folder, final, dict(ChainMap(*entries)))
            try:
                prune(self.run, self.keep_last, self.keep_every)
            except OSError as error:
                self.say(f"WARNING: an old checkpoint could not be deleted: {error}")


def save(run: Path, step: int, model: LLaMA, moments: Moments, state: dict, tokenizer_json: Path,
         world: World, adapter: Adapter | None = None) -> Path:
    """Write checkpoints/step_N and wait for it; collective. OSError on every rank if any rank
    cannot write."""
    saver = Saver(run, tokenizer_json, world, lambda _: None)
    saver.start(step, model, moments, state, adapter)
    saver.wait()
    if saver.problem:
        raise OSError(saver.problem)
    return run / "checkpoints" / f"step_{step}"


def gather_weights(parameters: dict[str, nn.Parameter], world: World) -> dict[str, Tensor]:
    """Copy parameters, whole, to host memory of rank 0 (elsewhere {}), one by one, so that no
    device holds more than one; collective."""
    weights = {}
    for name, parameter in parameters.items():  # a tied matrix is named once
        whole = world.whole(parameter.data)
        if world.rank == 0:
            weights[name] = whole.to("cpu", torch.float32, copy=True).contiguous()
    for name in [name for name in weights if name.endswith(".rows")]:
        if (matrix := name.replace("rows", "weight")) in weights:  # of a model that is saved whole
            rows = weights.pop(name)
            weights[matrix][-len(rows):] = rows
    return weights


def slices_of(model: LLaMA, moments: Moments, world: World) -> tuple[dict, dict]:
    """Copy to host memory this rank's rows of the moments that no rank before it has; also returns
    of each {offset: its first row, shape: of the whole}. Both by PARAMETER/KIND."""
    slices, places = {}, {}
    for name, parameter in trained(model):
        if parameter not in moments:
            raise RuntimeError(f"the optimizer knows no {name}: it is not the model's parameter")
        for kind, value in moments[parameter].items():
            local, first = world.piece(torch.atleast_1d(value))
            if world.holds_a_piece and local.numel():
                key = f"{name}/{kind}"
                slices[key] = local.detach().to("cpu", copy=True).contiguous()
                places[key] = {"offset": first, "shape": list(value.shape)}
    return slices, places


def sealed(folder: Path, paths: list[Path]) -> dict[str, dict]:
    """Sync files to the disk; name in `folder` -> size and hash."""
    for path in paths:
        files.sync(path)
    return {str(path.relative_to(folder)): files.file_entry(path) for path in paths}


def commit(folder: Path, final: Path, entries: dict[str, dict]) -> None:
    """Write checksums.json with `entries`, which sealed() made of the files of `folder`, and rename
    the folder to `final`: here it becomes visible."""
    sums, ordered = folder / "checksums.json", dict(sorted(entries.items()))
    files.write_json(sums, {"format": FORMAT, "files": ordered})
    for name in entries:  # safetensors writes files that only their owner can read
        shutil.copymode(sums, folder / name)
    for path in (sums, folder / "training", folder):
        files.sync(path)
    if final.exists():  # the run was started again from an earlier step
        shutil.rmtree(final)
    os.rename(folder, final)
    files.sync(final.parent)


# ---- kept or not

def set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which were found damaged, to step_N.damaged."""
    for folder in files.steps_of(run):
        if files.step_of(folder) > step:
            shutil.rmtree(aside := Path(f"{folder}.damaged"), ignore_errors=True)
            os.rename(folder, aside)


def hold(base: Path, run: Path) -> None:
    """Note beside a checkpoint that the adapters of another run stand on it, so that its own run
    keeps it."""
    note = Path(f"{base}.base")
    if not note.exists() and base in files.steps_of(base.parent.parent):
        with contextlib.suppress(OSError):  # of a run that may only be read
            files.write_text(note, f"{run.resolve()}\n")


def prune(run: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints (0: delete none), those at multiples of
    `keep_every`, those on which adapters stand, and the best: the one with the least validation
    loss, of those saved right after an evaluation."""
    if not keep_last:
        return
    steps = files.steps_of(run)
    states = {folder: files.read_json(folder / STATE, tolerant=True) for folder in steps}
    evaluated = [folder for folder in steps if isinstance(states[folder].get("val_loss"), float)]
    best = min(evaluated, key=lambda folder: states[folder]["val_loss"], default=None)
    for folder in steps[keep_last:]:
        every = keep_every and files.step_of(folder) % keep_every == 0
        if folder != best and not every and not Path(f"{folder}.base").exists():
            doomed = folder.rename(f"{folder}.tmp")  # half deleted, it must not look whole
            shutil.rmtree(doomed, ignore_errors=True)  # what is left goes at the next save


# ---- read

def read_state(folder: Path) -> dict:
    """Read training/state.json of a checkpoint. UserError if it is damaged or of another format."""
    state = files.read_json(folder / STATE, tolerant=True)
    if state.get("format") != FORMAT:
        raise UserError(f"{folder}: {STATE} is not a run's state in format {FORMAT}")
    return state


def load_moments(folder: Path, model: LLaMA, moments: Moments, world: World) -> None:
    """Fill the moments of the trained parameters, which exist already, from slices written by any
    world size. UserError if some are missing."""
    stored: dict[str, list] = {}  # PARAMETER/KIND -> [(first row, safetensors' slice), ...]
    try:  # only files that were verified
        names = files.read_json(folder / "checksums.json")["files"]
        for path in (folder / name for name in names if name.startswith("training/optimizer-")):
            file = safe_open(path, "pt")
            for key, place in json.loads(file.metadata()["places"]).items():
                stored.setdefault(key, []).append((int(place["offset"]), file.get_slice(key)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder}: its optimizer state cannot be read: {error!r}") from None
    for name, parameter in trained(model):
        for kind, value in moments[parameter].items():
            local, first = world.piece(torch.atleast_1d(value))
            covered, end = first, first + local.shape[0]
            for offset, rows in stored.get(f"{name}/{kind}", []):  # of rank after rank
                last = min(end, offset + rows.get_shape()[0])
                if offset <= covered < last:
                    local[covered - first:last - first].copy_(rows[covered - offset:last - offset])
                    covered = last
            if covered < end:
                raise UserError(f"{folder}: {kind} of {name} is incomplete: another optimizer's?")
